"""Worked traces for the demo: code solves reasoning-gym problems step by step, first a plan, then explicit steps.

```python
traces, problems = split("leg_counting", train=200, held_out=40, seed=0)     # no question is in both
```

Every family uses its generator's default difficulty. The steps write down each intermediate value, so that a small
model only has to copy a value, or to do one short operation on values that are already in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from rbfast.data.trace import Trace
from rbfast.grading.grade import Problem, grade
from rbfast.grading.tasks import load_problems


@dataclass(frozen=True)
class Worked:
    """A worked solution: the method in a sentence or two, the steps, and the answer."""

    plan: str
    steps: str
    answer: str


@dataclass(frozen=True)
class Family:
    """A reasoning-gym generator with the code that solves its problems, from the generator's entry."""

    name: str
    domain: str
    work: Callable[[dict[str, Any]], Worked]


def make_traces(family: str, n: int, seed: int, *, exclude: Collection[str] = ()) -> list[Trace]:
    """`n` worked traces of distinct problems, each verified by the task's own verifier.

    Problems whose worked answer the verifier rejects are left out (some answer keys are wrong; evaluation keeps them).

    Args:
        exclude: questions never to train on, such as the held-out ones.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    # Drawing more from one seed extends the same sequence of problems, so replacements are deterministic.
    wanted = n
    while True:
        traces = [_trace(FAMILIES[family], problem) for problem in load_problems(family, wanted, seed, exclude=exclude)]
        verified = [trace for trace in traces if trace is not None]
        if len(verified) >= n:
            return verified[:n]
        wanted += n - len(verified)


def split(family: str, *, train: int, held_out: int, seed: int) -> tuple[list[Trace], list[Problem]]:
    """Traces to train on and problems to evaluate on, from different seeds; no question is in both."""
    problems = load_problems(family, held_out, seed=2 * seed + 1)
    return make_traces(family, train, seed=2 * seed, exclude={p.question for p in problems}), problems


def _trace(family: Family, problem: Problem) -> Trace | None:
    worked = family.work(problem.entry)
    trace = Trace(
        problem=problem.question,
        reasoning=worked.steps,
        answer=worked.answer,
        plan=worked.plan,
        domain=family.domain,
        source=f"reasoning-gym:{family.name}",
        teacher="worked by code",
        verified=True,
    )
    return trace if grade(problem, trace.completion()) >= 1.0 else None


# -------------------------------------------------------------------------------------------------- letters and words


def _letter_counting(entry: dict[str, Any]) -> Worked:
    letter, count, lines = entry["metadata"]["target_letter"], 0, []
    for word in entry["metadata"]["span"]:
        spelled = []
        for character in word.lower():
            count += character == letter
            spelled.append(f"{character}{count}" if character == letter else character)
        lines.append(f"{word}: {' '.join(spelled)}")
    plan = f'Spell each word letter by letter and number every "{letter}".'
    return Worked(plan, "\n".join([*lines, f"The last number is {count}."]), str(count))


def _spell_backward(entry: dict[str, Any]) -> Worked:
    word = entry["metadata"]["word"]
    backward = word[::-1]
    steps = f"Letters: {' '.join(word)}\nBackward: {' '.join(backward)}"
    return Worked("Spell the word letter by letter, then read the letters from the last to the first.", steps, backward)


def _word_sequence_reversal(entry: dict[str, Any]) -> Worked:
    words = entry["metadata"]["words"]
    forward = "\n".join(f"{number} {word}" for number, word in enumerate(words, start=1))
    backward = "\n".join(f"{number} {words[number - 1]}" for number in range(len(words), 0, -1))
    plan = "Number the words, then list them from the last number down to 1."
    return Worked(plan, f"{forward}\nFrom {len(words)} down to 1:\n{backward}", ", ".join(reversed(words)))


def _palindrome_generation(entry: dict[str, Any]) -> Worked:
    letters = sorted(entry["metadata"]["letters"])
    half = [letter for letter in dict.fromkeys(letters) for _ in range(letters.count(letter) // 2)]
    middle = [letter for letter in dict.fromkeys(letters) if letters.count(letter) % 2]
    palindrome = [*half, *middle, *reversed(half)]
    steps = f"Pairs: {' '.join(2 * letter for letter in half)}\nAlone: {' '.join(middle) or 'none'}\n"
    steps += f"First half: {' '.join(half)}\nBackward: {' '.join(reversed(half))}\nTogether: {' '.join(palindrome)}"
    plan = "Find the letters that come in pairs; one of each pair makes the first half, a letter left alone the middle."
    return Worked(plan, steps, "".join(palindrome))


# ------------------------------------------------------------------------------------------------------------ numbers


def _running_total(terms: list[tuple[str, int]], total: int) -> tuple[list[str], int]:
    """One line per term: `+47: 38+40=78, +7=85`. A step changes one digit place, as much as a small model can do."""
    lines = []
    for sign, term in terms:
        steps, total = _by_places(total, sign, term)
        lines.append(f"{sign}{term}: {steps}")
    return lines, total


def _by_places(total: int, sign: str, term: int) -> tuple[str, int]:
    """`total + term` or `total - term`, the largest place of `term` first: (the steps, the result).

    A place with the digit 0 gets a step too: without it, students made one up.
    """
    digits = str(term)
    steps: list[str] = []
    for place, digit in enumerate(digits, start=1):
        part = int(digit) * 10 ** (len(digits) - place)
        before, total = total, total + part if sign == "+" else total - part
        steps.append(f"{'' if steps else before}{sign}{part}={total}")
    return ", ".join(steps), total


def _chain_sum(entry: dict[str, Any]) -> Worked:
    first, *rest = entry["metadata"]["expression"].split()
    lines, total = _running_total(
        [(sign, int(term)) for sign, term in zip(rest[::2], rest[1::2], strict=True)], int(first)
    )
    plan = "Keep a running total: term by term, place by place."
    return Worked(plan, "\n".join([*lines, "All terms are used."]), str(total))


def _leg_counting(entry: dict[str, Any]) -> Worked:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, lines = 0, []
    for animal, count in entry["metadata"]["animals"].items():
        legs = ANIMALS[animal]
        steps, total = _by_places(total, "+", count * legs)
        lines.append(f"{count} {animal} x{legs}={count * legs}: {steps}")
    plan = "Multiply each number by the legs of the animal. Keep a running total, place by place."
    return Worked(plan, "\n".join([*lines, "All animals are counted."]), str(total))


def _simple_geometry(entry: dict[str, Any]) -> Worked:
    sides, angles = entry["metadata"]["n_sides"], [int(angle) for angle in entry["metadata"]["known_angles"]]
    whole = 180 * (sides - 2)
    lines, rest = _running_total([("-", angle) for angle in angles], whole)
    plan = f"The angles of {sides} sides add up to ({sides}-2)x180. Subtract the known ones, place by place."
    return Worked(
        plan, "\n".join([f"{sides}-2={sides - 2}, {sides - 2}x180={whole}", *lines, "All angles are used."]), str(rest)
    )


def _gcd(entry: dict[str, Any]) -> Worked:
    larger, smaller = sorted(entry["metadata"]["numbers"], reverse=True)
    lines = []
    while smaller:
        lines.append(f"{larger}={larger // smaller}x{smaller}+{larger % smaller}")
        larger, smaller = smaller, larger % smaller
    plan = "Divide the larger number by the smaller and keep the remainder, until the remainder is 0."
    return Worked(plan, "\n".join([*lines, f"The last divisor is {larger}."]), str(larger))


def _simple_equations(entry: dict[str, Any]) -> Worked:
    import sympy

    left, right = entry["metadata"]["equation"].split(" = ")
    name = entry["metadata"]["variable"]
    symbol = sympy.Symbol(name)
    slope, offset = sympy.Poly(sympy.sympify(left, locals={name: symbol}), symbol).all_coeffs()
    product = int(right) - int(offset)
    answer = product // int(slope)
    steps = f"{slope}*{name}={right}{'-' if offset >= 0 else '+'}{abs(offset)}={product}\n"
    steps += f"{name}={product}/{slope}={answer}\nCheck: {slope}x{answer}={product}"
    return Worked("Move the constant to the right side, then divide by the factor.", steps, str(answer))


def _prime_factorization(entry: dict[str, Any]) -> Worked:
    rest, lines = entry["metadata"]["number"], []
    *factors, last = entry["metadata"]["factors"]
    for factor in factors:
        lines.append(f"{rest}/{factor}={rest // factor}")
        rest //= factor
    plan = "Divide by the smallest prime that fits, again and again, until a prime is left."
    answer = " × ".join(map(str, (*factors, last)))
    return Worked(plan, "\n".join([*lines, f"{rest} is prime."]), answer)


def _complex_arithmetic(entry: dict[str, Any]) -> Worked:
    (a, b), (c, d) = ([int(part) for part in entry["metadata"][key]] for key in ("num1", "num2"))
    operation = entry["metadata"]["operation"]
    if operation in "+-":
        sign = 1 if operation == "+" else -1
        real, imaginary = a + sign * c, b + sign * d
        steps = f"Real: {a}{operation}({c})={real}\nImaginary: {b}{operation}({d})={imaginary}"
        return Worked("Work on the real parts and on the imaginary parts separately.", steps, _complex(real, imaginary))
    if operation == "*":
        real, imaginary = a * c - b * d, a * d + b * c
        steps = f"{a}x{c}={a * c}\n{b}x{d}={b * d}\nReal: {a * c}-({b * d})={real}\n"
        steps += f"{a}x{d}={a * d}\n{b}x{c}={b * c}\nImaginary: {a * d}+({b * c})={imaginary}"
        return Worked("Multiply every part with every part; i times i is -1.", steps, _complex(real, imaginary))
    size, real, imaginary = c * c + d * d, a * c + b * d, b * c - a * d
    steps = f"Size: {c * c}+{d * d}={size}\nReal: {a * c}+({b * d})={real}, {real}/{size}={real // size}\n"
    steps += f"Imaginary: {b * c}-({a * d})={imaginary}, {imaginary}/{size}={imaginary // size}"
    plan = "Multiply by the conjugate of the divisor, then divide by its size."
    return Worked(plan, steps, _complex(real // size, imaginary // size))


def _complex(real: int, imaginary: int) -> str:
    return f"{real} {'-' if imaginary < 0 else '+'} {abs(imaginary)}i"


def _number_filtering(entry: dict[str, Any]) -> Worked:
    data = entry["metadata"]
    action, size = data["operation"].split("_")
    bound = float(data["filter_value"])
    lines, kept = [], []
    for text in data["original_numbers"]:
        outside = float(text) > bound if size == "larger" else float(text) < bound
        keeps = outside == (action == "keep")
        lines.append(f"{text} {'keep' if keeps else 'remove'}")
        kept += [text] if keeps else []
    plan = f"Compare each number with {data['filter_value']}: {action} it if it is {size}."
    return Worked(plan, "\n".join(lines), str(kept))


# ------------------------------------------------------------------------------------------------------------ kinship

_COUPLE = re.compile(r"(\w+) is married to (\w+)\.(?: They have (?:a child|children) called ([^.]+)\.)?")
_KIN = {  # kind: (female, male)
    "parent": ("mother", "father"),
    "child": ("daughter", "son"),
    "spouse": ("wife", "husband"),
    "sibling": ("sister", "brother"),
    "grandparent": ("grandmother", "grandfather"),
    "parent-in-law": ("mother-in-law", "father-in-law"),
}


def _family_relationships(entry: dict[str, Any]) -> Worked:
    from reasoning_gym.graphs.family_relationships import FamilyRelationshipsConfig

    spouse: dict[str, str] = {}
    parents: dict[str, tuple[str, str]] = {}
    for one, other, children in _COUPLE.findall(entry["question"]):
        spouse |= {one: other, other: one}
        parents |= {child: (one, other) for child in re.split(r", | and ", children) if child}
    who, whose = entry["metadata"]["person1"], entry["metadata"]["person2"]
    kind, facts = _kinship(who, whose, spouse, parents)
    women = FamilyRelationshipsConfig().female_names
    # For a child's spouse, the generator's key is the relation of the parent to them, so the last step states that.
    who, whose = (whose, who) if kind == "parent-in-law" else (who, whose)
    answer = _KIN[kind][0 if who in women else 1]
    facts.append(f"{who} is {'female' if who in women else 'male'}.\nSo {who} is the {answer} of {whose}.")
    return Worked(f"Look up the parents and the spouse of {whose} and {who}.", "\n".join(facts), answer)


def _kinship(
    who: str, whose: str, spouse: dict[str, str], parents: dict[str, tuple[str, str]]
) -> tuple[str, list[str]]:
    """What `who` is to `whose`, with the facts that show it."""

    def born(child: str) -> str:
        return f"{child} is a child of {' and '.join(parents[child])}."

    if spouse.get(whose) == who:
        return "spouse", [f"{whose} is married to {who}."]
    if who in parents.get(whose, ()):
        return "parent", [born(whose)]
    if whose in parents.get(who, ()):
        return "child", [born(who)]
    if whose in parents and parents.get(who) == parents[whose]:
        return "sibling", [born(whose), born(who)]
    for parent in parents.get(whose, ()):
        if who in parents.get(parent, ()):
            return "grandparent", [born(whose), born(parent)]
    return "parent-in-law", [f"{who} is married to {spouse[who]}.", born(spouse[who])]


_AIW_KINDS = {"siblings": "sisters", "friends": "female friends", "colleagues": "female colleagues"}


def _aiw(entry: dict[str, Any]) -> Worked:
    question = entry["question"]
    name, kind = question.split()[0], _AIW_KINDS[entry["metadata"]["task_type"]]
    counts = [int(count) for count in re.findall(rf"(\d+) {kind}", question)]
    total = counts[0] + 1
    steps = f"{name} has {counts[0]} {kind}.\n{name} is a woman too, so she is one more: {counts[0]}+1={total}"
    if len(counts) == 2:
        # Matilda is in both circles. The generator's key ignores the second circle, so it rarely agrees with this.
        total = counts[0] + counts[1] - 1
        steps = (
            f"In the circle of {name}, Matilda has {counts[0]} {kind}.\n"
            f"In the other circle she has {counts[1]}-1={counts[1] - 1}.\n{counts[0]}+{counts[1] - 1}={total}"
        )
    return Worked(f"Count the {kind}, and do not forget {name} herself.", steps, str(total))


def _color_cube_rotation(entry: dict[str, Any]) -> Worked:
    from reasoning_gym.cognition.color_cube_rotation import Color, Cube, Side

    facts = entry["metadata"]
    cube = Cube({Side(side): Color(color) for side, color in facts["initial_state"].items()})
    lines = [f"Start: {_faces(cube)}"]
    for side in facts["rotations"]:
        getattr(cube, f"rotate_{side}_to_top")()
        lines.append(f"{side} to top: {_faces(cube)}")
    target, color = facts["target_side"], cube.colors[Side(facts["target_side"])].value
    lines.append(f"The {target} is {color}.")
    return Worked("Write down all six sides, and again after each turn.", "\n".join(lines), color)


def _faces(cube: Any) -> str:
    return ", ".join(f"{side.value} {cube.colors[side].value}" for side in cube.colors)


FAMILIES: dict[str, Family] = {
    name: Family(name, domain, work)
    for name, domain, work in (
        ("letter_counting", "algorithmic", _letter_counting),
        ("aiw", "logic", _aiw),
        ("color_cube_rotation", "cognition", _color_cube_rotation),
        ("chain_sum", "arithmetic", _chain_sum),
        ("leg_counting", "arithmetic", _leg_counting),
        ("simple_geometry", "geometry", _simple_geometry),
        ("complex_arithmetic", "algebra", _complex_arithmetic),
        ("word_sequence_reversal", "algorithmic", _word_sequence_reversal),
        ("family_relationships", "graphs", _family_relationships),
        ("number_filtering", "algorithmic", _number_filtering),
        ("spell_backward", "algorithmic", _spell_backward),
        ("palindrome_generation", "algorithmic", _palindrome_generation),
        ("gcd", "arithmetic", _gcd),
        ("simple_equations", "algebra", _simple_equations),
        ("prime_factorization", "arithmetic", _prime_factorization),
    )
}
