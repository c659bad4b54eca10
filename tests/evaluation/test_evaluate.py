"""Evaluation: completions in order, resuming after an interrupt, and the statistics of scores with intervals."""

import json
import random
from dataclasses import replace
from itertools import combinations
from statistics import mean, stdev

import pytest
from problems import plain
from real_inputs import data_path
from tiny import tiny_model, tiny_tokenizer

from rbfast.data.instruction import ANSWER
from rbfast.evaluation import evaluate as evaluation
from rbfast.evaluation.evaluate import Result, evaluate, summarize, summarize_samples
from rbfast.evaluation.statistics import clustered, paired_bootstrap, paired_difference, pass_at_k, proportion
from rbfast.grading.grade import Problem
from rbfast.grading.tasks import load_problems
from rbfast.inference.decoding import Completion
from rbfast.inference.guide import Guide, Limits, Phrases
from rbfast.inference.local import guided
from rbfast.utils.files import lock_file


def test_evaluate_keeps_order_and_completions():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    problems = [Problem("file", "x" * length, "never", {}) for length in (30, 5, 80)]
    results = evaluate(model, tokenizer, problems, max_new_tokens=6, batch_size=2)
    assert [result.problem for result in results] == problems
    again = evaluate(model, tokenizer, problems[1:2], max_new_tokens=6)
    assert again == results[1:2]
    record = json.loads(json.dumps(results[0].to_dict()))
    assert record["completion"] == results[0].completion.text and record["correct"] is False
    assert all(result.completion.tokens == 6 for result in results if result.completion.truncated)
    assert record["problem"] == "x" * 30 and record["tokens"] == results[0].completion.tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
def test_a_problem_is_asked_with_its_own_system_prompt(tmp_path, temperature):
    model, tokenizer, keep = tiny_model(), tiny_tokenizer(), tmp_path / "results.jsonl"
    rows = [{"problem": "ab", "answer": "1", "system": system} for system in ("Be brief.", "Be long.")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(str(tmp_path / "rows.jsonl"), None, seed=0)
    assert [problem.system for problem in problems] == ["Be brief.", "Be long."]
    options = {"max_new_tokens": 6, "temperature": temperature}
    results = evaluate(model, tokenizer, problems, keep=keep, **options)
    first, second = results
    assert first.completion != second.completion
    assert [record["system"] for record in map(json.loads, keep.read_text().splitlines())] == ["Be brief.", "Be long."]
    for problem, result in zip(problems, results, strict=True):
        bare, instruction = replace(problem, system=None), replace(ANSWER, system=problem.system)
        assert evaluate(model, tokenizer, [bare], instruction=instruction, **options)[0].completion == result.completion
    assert evaluate(model, tokenizer, problems[1:], keep=keep, **options) == [second]  # read from the file
    assert len(keep.read_text().splitlines()) == 2


def test_summary_counts_truncation():
    results = [
        Result(plain("1"), Completion("1", 10, False), 1.0),
        Result(plain("1"), Completion("2", 30, True), 0.4),
    ]
    summary = summarize(results)
    assert (summary["n"], summary["accuracy"], summary["truncated"], summary["tokens"]) == (2, 0.5, 0.5, 20)
    with pytest.raises(ValueError, match="at least one result"):
        summarize([])


def test_paired_difference_matches_agresti_and_min():
    # Wald interval on the table with half a problem added to each cell, written out from counts.
    lost, won, same = 3, 11, 26
    before = [1.0] * lost + [0.0] * won + [1.0] * same
    after = [0.0] * lost + [1.0] * won + [1.0] * same
    b, c, n = lost + 0.5, won + 0.5, lost + won + same + 2
    centre, error = (c - b) / n, ((b + c - (c - b) ** 2 / n) ** 0.5) / n
    interval = paired_difference(before, after)
    assert interval.mean == pytest.approx(8 / 40)
    assert (interval.low, interval.high) == pytest.approx(
        (centre - 1.959964 * error, centre + 1.959964 * error), rel=1e-6
    )


def test_intervals_keep_their_width_if_all_differences_are_equal():
    single = paired_difference([0.0], [1.0])
    assert single.mean == 1.0 and single.low < 0 and single.high == 1.0
    equal = paired_difference([1.0] * 30, [1.0] * 30)
    assert equal.mean == 0.0 and -0.15 < equal.low < -0.01 and equal.low == -equal.high
    all_won = paired_difference([0.0] * 30, [1.0] * 30)
    assert all_won.mean == all_won.high == 1.0 and 0.7 < all_won.low < 1.0
    all_lost = paired_difference([1.0] * 30, [0.0] * 30)
    assert (all_lost.mean, all_lost.low, all_lost.high) == (-1.0, -1.0, -all_won.low)


def test_intervals_have_their_nominal_coverage():
    source = random.Random(0)
    gains, shares, n, runs = 0, 0, 40, 2000
    for _ in range(runs):
        before = [float(source.random() < 0.1) for _ in range(n)]
        after = [float(source.random() < 0.5) for _ in range(n)]
        gain, share = paired_difference(before, after), proportion(after)
        gains += gain.low <= 0.4 <= gain.high
        shares += share.low <= 0.5 <= share.high
    # Four binomial standard errors below 95%, and not so wide as to cover always.
    floor = 0.95 - 4 * (0.95 * 0.05 / runs) ** 0.5
    assert floor < gains / runs < 0.99 and floor < shares / runs < 0.99


def test_proportion_has_the_wilson_interval():
    interval = proportion([1.0] * 3 + [0.0] * 37)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.075, 0.02585, 0.19864), abs=5e-5)
    assert proportion([0.0]).high == pytest.approx(0.7935, abs=1e-4) and proportion([0.0]).low == 0.0
    assert proportion([1.0] * 16).high == 1.0 and proportion([0.0] * 24).low == 0.0


def test_differences_need_matching_scores():
    with pytest.raises(ValueError, match="same problems, got 2 and 1"):
        paired_difference([0.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_difference([], [])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        paired_difference([0.0], [100.0])
    assert paired_difference([0.25, 0.5], [0.5, 0.5]).mean == mean([0.25, 0.0])


# ------------------------------------------------------------------------------------------- samples, files of results


def results_of(pattern: dict[str, str]) -> list[Result]:
    """`{"question": "rwr"}`: right and wrong samples; all wrong ones have the same answer."""
    return [
        Result(Problem("t", question, "1", {}), Completion(reply, 5, False), score, sample)
        for question, letters in pattern.items()
        for sample, (reply, score) in enumerate(
            {"r": ("<answer>1</answer>", 1.0), "w": ("<answer>2</answer>", 0.0)}[letter] for letter in letters
        )
    ]


def test_summary_of_samples():
    summary = summarize_samples(results_of({"a": "rrww", "b": "wwww", "c": "rrrw", "d": "rwww"}))
    assert (summary["items"], summary["samples"], summary["pass@1"]) == (4, 4, 6 / 16)
    assert summary["pass@2"] == pytest.approx(((1 - 1 / 6) + 0 + 1 + 1 / 2) / 4)
    assert summary["pass@4"] == 3 / 4
    # A tie goes to the first answer given: "a" counts, "d" does not.
    assert summary["majority@4"] == 2 / 4
    assert (summary["truncated"], summary["tokens"]) == (0.0, 5.0)
    with pytest.raises(ValueError, match="same number of samples, got \\[1, 2\\]"):
        summarize_samples(results_of({"a": "r", "b": "rw"}))
    with pytest.raises(ValueError, match="got no results"):
        summarize_samples([])


def test_completions_truncated_before_an_answer_do_not_vote():
    problem = Problem("t", "16 + 4?", "20", {})
    truncated = [Result(problem, Completion("16 + 4 = 2", 5, True), 0.0, sample) for sample in range(2)]
    right = Result(problem, Completion("<answer>20</answer>", 5, False), 1.0, 2)
    assert summarize_samples([*truncated, right])["majority@3"] == 1.0
    credited = [replace(result, score=1.0) for result in truncated]  # right by a grader that needs no marked answer
    assert summarize_samples(credited)["majority@2"] == 0.0


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for samples, correct, k in [(5, 2, 3), (6, 1, 2), (4, 0, 2), (3, 3, 1), (7, 3, 7)]:
        drawn = list(combinations([1] * correct + [0] * (samples - correct), k))
        assert pass_at_k(samples, correct, k) == pytest.approx(mean(any(draw) for draw in drawn))
    for samples, correct, k in [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)]:
        with pytest.raises(ValueError, match="expected 1 <= k <= samples"):
            pass_at_k(samples, correct, k)


def test_clustered_error_is_the_error_of_item_means():
    scores = [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    means = [mean(item) for item in scores]
    share, error = clustered(scores)
    assert share == pytest.approx(mean(means))
    assert error == pytest.approx((sum((m - share) ** 2 for m in means)) ** 0.5 / len(means))
    assert clustered([[1.0, 1.0, 1.0], [0.0]])[0] == 0.75  # each sample counts once
    # Samples that all agree count as one.
    assert clustered([[1.0] * 9, [0.0] * 9])[1] == pytest.approx(clustered([[1.0], [0.0]])[1])
    for missing in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="every item needs at least one sample"):
            clustered(missing)


def test_statistics_of_real_samples():
    # 15 tasks of 50 items, 3 completions each; a completion is right if its stored score is at least 0.99.
    items = []
    for path in sorted(data_path("reasoning_gym_claude35").glob("*.json")):
        for item in json.loads(path.read_text())["results"]:
            items.append([float((completion["score"] or 0) >= 0.99) for completion in item["completions"]])
    assert len(items) == 750
    share, error = clustered(items)
    naive = (share * (1 - share) / 2250) ** 0.5
    assert (round(share, 3), round(error, 4), round(naive, 4)) == (0.583, 0.0164, 0.0104)
    assert round(mean(pass_at_k(3, int(sum(item)), 3) for item in items), 3) == 0.679


def test_bootstrap_agrees_with_theory_and_is_reproducible():
    source = random.Random(1)
    before = [[float(source.random() < 0.4) for _ in range(4)] for _ in range(200)]
    after = [[float(source.random() < 0.6) for _ in range(4)] for _ in range(200)]
    gain = paired_bootstrap(before, after, seed=3, draws=4000)
    assert gain == paired_bootstrap(before, after, seed=3, draws=4000)
    assert gain != paired_bootstrap(before, after, seed=4, draws=4000)
    gains = [mean(b) - mean(a) for a, b in zip(before, after, strict=True)]
    error = stdev(gains) / len(gains) ** 0.5
    assert gain.mean == pytest.approx(mean(gains))
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert paired_bootstrap([[1.0]] * 9, [[1.0, 1.0]] * 9).high == 0.0
    with pytest.raises(ValueError, match="same items, got 1 and 2"):
        paired_bootstrap([[1.0]], [[1.0], [0.0]])


def test_cost_of_progress_does_not_grow_with_the_problems_done(monkeypatch):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    problems = [Problem("file", f"{number}", "never", {}) for number in range(40)]
    called, identity = [], evaluation._identity
    monkeypatch.setattr(evaluation, "_identity", lambda problem: called.append(problem) or identity(problem))
    shown = []
    evaluate(model, tokenizer, problems, max_new_tokens=1, batch_size=1, progress=lambda *n: shown.append(n))
    assert shown == [(done, 40) for done in range(41)] and len(called) <= 5 * len(problems)


def test_interrupted_evaluation_resumes(tmp_path, monkeypatch):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    problems = [Problem("file", "x" * length, "never", {}) for length in (30, 5, 80, 12)]
    options = {"max_new_tokens": 6, "batch_size": 2, "samples": 2, "temperature": 0.9, "seed": 4}
    done_after_batches = []  # two completions at a time
    whole = evaluate(model, tokenizer, problems, progress=lambda *n: done_after_batches.append(n[0]), **options)
    assert done_after_batches == [0, 1, 2, 3, 4]
    path = tmp_path / "results.jsonl"

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, problems, keep=path, progress=stop, **options)
    assert len(path.read_text().splitlines()) == 4
    path.write_text(path.read_text() + '{"task": "file", "prob')  # torn while it was written
    graded = []
    monkeypatch.setattr(
        "rbfast.evaluation.evaluate.grade", lambda problem, text, truncated: graded.append(problem) or 0.0
    )
    assert "instruction" not in json.loads(path.read_text().splitlines()[0])["decoding"]  # as in older files
    assert evaluate(model, tokenizer, problems, keep=path, **options) == whole
    assert len(graded) == 4 and len(path.read_text().splitlines()) == 8
    assert evaluate(model, tokenizer, problems, keep=path, **options) == whole and len(graded) == 4
    with pytest.raises(ValueError, match="another model or decoding: its seed is 4, now 5; name"):
        evaluate(model, tokenizer, problems, keep=path, **options | {"seed": 5})
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:1: expected a result of an evaluation"):
        evaluate(model, tokenizer, problems, keep=path, **options)


def test_problem_with_missing_samples_is_asked_again(tmp_path):
    model, tokenizer, path = tiny_model(), tiny_tokenizer(), tmp_path / "results.jsonl"
    problems = [Problem("file", question, "never", {}) for question in ("a", "b")]
    options = {"max_new_tokens": 6, "samples": 2, "temperature": 0.9, "keep": path}
    whole = evaluate(model, tokenizer, problems, **options)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert evaluate(model, tokenizer, problems, **options) == whole
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_single_sample_is_drawn_by_the_seed():
    model, tokenizer, problems = tiny_model(), tiny_tokenizer(), [Problem("file", "x", "never", {})]
    hot = {"max_new_tokens": 12, "temperature": 5.0}
    drawn = [evaluate(model, tokenizer, problems, seed=seed, **hot)[0].completion.text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_only_the_likeliest_tokens_are_drawn_if_top_p_is_small():
    model, tokenizer, problems = tiny_model(), tiny_tokenizer(), [Problem("file", "x", "never", {})]
    greedy = evaluate(model, tokenizer, problems, max_new_tokens=12)
    drawn = evaluate(model, tokenizer, problems, max_new_tokens=12, temperature=5.0, top_p=1e-6)
    assert drawn[0].completion == greedy[0].completion


def test_all_samples_are_drawn_even_if_the_vote_is_decided(monkeypatch):
    """pass@k counts every sample."""
    calls = []
    monkeypatch.setattr(
        "rbfast.evaluation.decoding.guided", lambda *args, **options: calls.append(args[4]) or guided(*args, **options)
    )
    problems = [Problem("file", "x", "never", {})]
    results = evaluate(tiny_model(), tiny_tokenizer(), problems, max_new_tokens=6, samples=5, temperature=1e-9)
    assert len(results) == 5 and [sampling.early_stop for sampling in calls] == [False]


@pytest.mark.parametrize(
    ("options", "message"), [({"samples": 0}, "samples must be at least 1, got 0"), ({"top_p": 0.0}, "top_p in")]
)
def test_decoding_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model(), tiny_tokenizer(), [Problem("file", "x", "never", {})], **options)


def test_kept_completions_are_graded_again_if_an_answer_is_corrected(tmp_path, monkeypatch):
    model, tokenizer, path = tiny_model(), tiny_tokenizer(), tmp_path / "results.jsonl"
    monkeypatch.setattr(
        "rbfast.evaluation.evaluate.grade", lambda problem, text, truncated: float(problem.answer == "right")
    )
    problems = [Problem("file", question, "wrong", {}) for question in ("a", "b")]
    before = evaluate(model, tokenizer, problems, max_new_tokens=3, keep=path)
    problems[1] = Problem("file", "b", "right", {})
    after = evaluate(model, tokenizer, problems, max_new_tokens=3, keep=path)
    assert [result.score for result in after] == [0.0, 1.0]
    assert [result.completion for result in after] == [result.completion for result in before]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [
        {name: record[name] for name in result.to_dict()} for record, result in zip(records, after, strict=True)
    ] == [result.to_dict() for result in after]
    kept = path.read_bytes()
    assert evaluate(model, tokenizer, problems, max_new_tokens=3, keep=path) == after and path.read_bytes() == kept


def test_evaluation_may_use_a_guide():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    guide = Guide(Limits(90, reserve=70), Phrases(close="<answer>", finish="</answer>"))
    [result] = evaluate(model, tokenizer, [Problem("file", "x", "never", {})], guide=guide)
    assert result.completion.tokens <= 90 and "<answer>" in result.completion.text


def test_interventions_of_a_guide_are_recorded(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    guide = Guide(Limits(90, reserve=70), Phrases(close="<answer>", finish="</answer>"))
    problems, path = [Problem("file", "x", "never", {})], tmp_path / "results.jsonl"
    results = evaluate(model, tokenizer, problems, guide=guide, keep=path)
    assert results[0].events
    recorded = json.loads(path.read_text())["events"]
    assert [event["kind"] for event in recorded] == [event.kind for event in results[0].events]
    assert evaluate(model, tokenizer, problems, guide=guide, keep=path) == results


def test_two_evaluations_may_not_write_one_file(tmp_path):
    keep = tmp_path / "results.jsonl"
    problems = [Problem("file", "x", "1", {})]
    with lock_file(keep), pytest.raises(ValueError, match=r"another process is using .*results\.jsonl"):
        evaluate(tiny_model(), tiny_tokenizer(), problems, max_new_tokens=2, keep=keep)
    evaluate(tiny_model(), tiny_tokenizer(), problems, max_new_tokens=2, keep=keep)

    def second(done, total):
        if done:
            evaluate(tiny_model(), tiny_tokenizer(), problems, max_new_tokens=2, keep=keep)

    with pytest.raises(ValueError, match="another process is using"):
        evaluate(tiny_model(), tiny_tokenizer(), problems, max_new_tokens=2, keep=keep, progress=second)
    assert len(keep.read_text().splitlines()) == 1
