"""The report's examples: completions before and after the training, coloured by role."""

from collections.abc import Iterator
from itertools import pairwise

from rbfast.data.spans import ROLES, split_spans
from rbfast.report.accuracy import NOTHING_MEASURED
from rbfast.report.html import escape, remark
from rbfast.report.read_run import Measurement, Record, RunFolder, main_measurement, task_name

_MOST_EXAMPLES = 12
_OPEN_EXAMPLES = 2
_VERDICTS = [(False, True), (True, False), (False, False), (True, True)]  # (before, after), in the order of display


def examples(run: RunFolder) -> Iterator[str]:
    measured = main_measurement(run)
    if measured is None:
        yield remark(NOTHING_MEASURED)
        return
    roles = " ".join(f'<span class="{role}">{role}</span>' for role in ROLES)
    yield f"<p>Colours show the roles that the splitter finds in the text: {roles}.</p>"
    chosen = _choose_problems(measured)
    if not chosen:
        yield remark("No problem was measured both before and after the training.")
    for number, problem in enumerate(chosen):
        yield _example(problem, measured, opened=number < _OPEN_EXAMPLES)


def _choose_problems(measured: Measurement) -> list[tuple[str, str]]:
    """The first problem of every task with each verdict: gained first, then lost, never solved, always solved."""
    after = measured.after or measured.before
    before = measured.before or after
    firsts: dict[tuple[int, str], tuple[str, str]] = {}
    for problem in after:
        if problem in before:
            verdict = before[problem][0]["correct"], after[problem][0]["correct"]
            firsts.setdefault((_VERDICTS.index(verdict), problem[0]), problem)
    return [firsts[key] for key in sorted(firsts, key=lambda key: key[0])][:_MOST_EXAMPLES]


def _example(problem: tuple[str, str], measured: Measurement, opened: bool) -> str:
    sides = [(side, getattr(measured, side).get(problem)) for side in ("before", "after")]
    shown = [(side, records[0]) for side, records in sides if records]
    task, question = problem
    verdicts = ", ".join(f"{_verdict(record)} {side}" for side, record in shown)
    answer = escape(shown[0][1].get("answer", "not recorded"))
    return (
        f"<details{' open' if opened else ''}><summary>{escape(task_name(task))}: {verdicts}</summary>"
        f'<div class="text">{escape(question)}</div><p>The answer: {answer}</p>'
        f'<div class="pair">{"".join(_completion(side, record) for side, record in shown)}</div></details>'
    )


def _verdict(record: Record) -> str:
    return "right" if record["correct"] else "wrong"


def _completion(side: str, record: Record) -> str:
    cut = ", cut at the limit" if record["truncated"] else ""
    title = f"{side}: {_verdict(record)}, {record['tokens']:,} tokens{cut}"
    return f'<div><b>{title}</b><div class="text">{_colour_roles(record)}</div></div>'


def _colour_roles(record: Record) -> str:
    """The completion coloured by role, with each intervention and the text that it struck marked in place."""
    text = record["completion"]
    marks: dict[int, str] = {}
    for event in record.get("events", ()):
        at = min(max(event["at"], 0), len(text))
        struck = f"<del>{escape(event['struck'])}</del>" if event["struck"] else ""
        marks[at] = f"{marks.get(at, '')}<mark>{escape(event['kind'])}</mark>{struck}"
    pieces = []
    for start, end, role in split_spans(text):
        cuts = [start, *sorted(at for at in marks if start < at < end), end]
        for left, right in pairwise(cuts):
            pieces.append(f'{marks.get(left, "")}<span class="{ROLES[role]}">{escape(text[left:right])}</span>')
    return "".join([*pieces, marks.get(len(text), "")])
