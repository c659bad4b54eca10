"""Field names and their meanings: what datasets call a problem, thinking, a reply, an answer.

```python
fields_by_meaning(("question", "deepseek_thinking_trajectory", "deepseek_attempt"))
# {"problem": [Field("question", "")], "reasoning": [Field("deepseek_thinking_trajectory", "deepseek")], ...}
```
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from rbfast.data.trace import TraceError

NAMES = {
    "problem": "problem question instruction query prompt input problem_statement user_prompt user task_prompt "
    "inputs human q 问题 题目",
    "context": "context passage body paragraph article",
    "earlier": "history chat_history prev_messages previous_messages previous_turns",
    "system": "system system_prompt system_message system_instruction instructions developer",
    "reasoning": "reasoning thinking thought thoughts think reasoning_content think_content thinking_content "
    "trajectory trace reasoning_trace reasoning_text thinking_trace thinking_trajectory thinking_trajectories cot "
    "chain_of_thought cot_content rationale explanation scratchpad reasoning_steps steps "
    "thought_process thinking_process analysis 思考 思考过程 推理 推理过程 思维链",
    "reply": "response output completion generation generated_text reply attempt model_output model_response chosen "
    "answer_content generations completions responses outputs generated_solution generated_solutions samples "
    "candidates rollouts attempts assistant gpt content preferred_output preferred_response preferred resps "
    "final final_response final_output reannotated_assistant_content 回答 回复",
    "rejected": "rejected rejected_response rejected_output non_preferred_output non_preferred dispreferred",
    "solution": "solution solutions worked_solution full_solution answer_cot",
    "answer": "answer final_answer expected_answer gold gold_answer ground_truth golden_answer ground_truth_answer "
    "reference_answer correct_answer target targets short_answer gt gt_answer short_ans answer_key gold_label gts "
    "ideal a 答案",
    "reference": "ground_truth_solution reference_solution gold_solution reference",
    "conversation": "messages conversations conversation dialogue dialog turns chat contents",
    "options": "options choices answer_choices",
    "choice": "answer_index answer_idx correct_index correct_option cop",
    "verdict": "correctness correct is_correct verified grade is_verified passed right judgement judgment "
    "reward rewards verifier_score exact_match label",
    "complete": "is_reasoning_complete is_complete complete",
    "finish": "finish_reason finish_reasons done_reason stop_reason",
    "plan": "plan",
    "domain": "domain subject topic category cot_type problem_type subset type",
    "source": "source source_type data_source dataset",
    "teacher": "teacher generator model model_name teacher_model generation_model",
    "id": "id uuid unique_id custom_id problem_id question_id _id",
    "difficulty": "difficulty",
}
_MEANINGS = {name.replace("_", ""): meaning for meaning, names in NAMES.items() for name in names.split()}
_ORDER = {name.replace("_", ""): order for names in NAMES.values() for order, name in enumerate(names.split())}
# Field names that a teacher's name may prefix: "deepseek_attempt", "r1_solution_1", "claude_thinking_trajectory".
_BY_TEACHER = (
    "thinking_trajectory thinking_trajectories reasoning reasoning_content reasoning_trace thinking think thought "
    "trace cot attempt response solution output completion generation generations grade answer correctness correct "
    "verified judgement"
)
_TEACHERS_FIELD = re.compile(
    rf"(?P<teacher>\w+?)_(?P<name>{'|'.join(sorted(_BY_TEACHER.split(), key=len, reverse=True))})"
)
_NUMBERED = re.compile(r"(?P<name>.+?)_?(?P<number>\d+)")
_NOT_TEACHERS = re.compile(
    r"(?:ground_truth|gold|golden|reference|expected|correct|incorrect|wrong|rejected|non|orig|original|final|short|human)"
    r"(?:_.*)?"
)
# Prefixes that do not name a teacher: "model_answer", "long_cot", "CoT_Native_Reasoning".
_NO_TEACHER = re.compile(
    r"(?:model|llm|ai|assistant|generated|predicted|long|full|complex|native|raw|step|cot)(?:_.*)?"
)
_JSON_BLOCK = re.compile(r"```(?:json)?\s*(\{.*\})\s*```\s*", re.DOTALL)


class Field(NamedTuple):
    """A field of a row. `teacher`: the teacher in its name, if any. `number`: the number that its name ends in."""

    name: str
    teacher: str = ""
    number: int | None = None


@lru_cache(maxsize=1024)
def fields_by_meaning(names: tuple[str, ...]) -> Mapping[str, list[Field]]:
    """The fields of a row by meaning, in the order of NAMES, a teacher's fields last. Unknown names are left out."""
    by_meaning: dict[str, list[Field]] = {}
    numbered = [match["name"] for name in names if (match := _NUMBERED.fullmatch(name))]
    for name in names:
        meaning, field = _meaning_of(name, numbered)
        if meaning is not None:
            by_meaning.setdefault(meaning, []).append(field)
    for meaning, fields in by_meaning.items():
        if any(_is_plain(field) for field in fields):
            by_meaning[meaning] = fields = [
                field for field in fields if field.teacher or field.number is not None or _is_plain(field)
            ]
        fields.sort(key=lambda field: (bool(field.teacher), _ORDER.get(_squeezed(field.name), 0)))
    return by_meaning


def _meaning_of(name: str, numbered: list[str]) -> tuple[str | None, Field]:
    if meaning := _MEANINGS.get(_squeezed(name)):
        return meaning, Field(name)
    match = _NUMBERED.fullmatch(name)
    if match and numbered.count(match["name"]) > 1:
        meaning, field = _meaning_of(match["name"], [])
        return ("reply" if meaning == "solution" else meaning), Field(name, field.teacher, int(match["number"]))
    if (owned := _TEACHERS_FIELD.fullmatch(_snake(name))) and not _NOT_TEACHERS.fullmatch(owned["teacher"]):
        meaning = _MEANINGS[_squeezed(owned["name"])]
        teacher = "" if _NO_TEACHER.fullmatch(owned["teacher"]) else name[: owned.end("teacher")].strip("_")
        return ("reply" if meaning in ("solution", "answer") else meaning), Field(name, teacher)
    return None, Field(name)


def _is_plain(field: Field) -> bool:
    return _squeezed(field.name) in _MEANINGS


def _snake(name: str) -> str:
    """`modelAnswer` and `Model Answer` as `model_answer`."""
    is_camel = not re.search(r"[\W_]", name) and not name.isupper()
    return re.sub(r"\W+", "_", re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name) if is_camel else name).lower()


def _squeezed(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


_MAPPED = "problem reasoning answer reply solution conversation system plan domain source teacher id difficulty verdict"
MAPPED = tuple(_MAPPED.split())
_SYNONYMS = {"response": "reply", "completion": "reply", "messages": "conversation", "verified": "verdict"}


def parse_map(text: str) -> dict[str, str]:
    """Parse `problem=question,answer=gold` into a mapping from meanings to fields. Raises ValueError if malformed."""
    mapping = {}
    for part in filter(None, text.split(",")):
        meaning, equals, field = (piece.strip() for piece in part.partition("="))
        if not equals or not field:
            raise ValueError(f"map: expected problem=FIELD,answer=FIELD, got {part!r}")
        mapping[meaning] = field
    return mapping


def check_map(fields: Mapping[str, str]) -> dict[str, str]:
    """The mapping with synonyms replaced by the canonical meanings. Raises ValueError for an unknown meaning."""
    renamed = {_SYNONYMS.get(meaning, meaning): field for meaning, field in fields.items()}
    if unknown := set(renamed) - set(MAPPED):
        raise ValueError(f"map: expected one of {', '.join(MAPPED)}, got {', '.join(sorted(unknown))}")
    return renamed


def value_at(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field. `info.answer` is the field `answer` of the object `info`, which may be JSON text."""
    found = _values_at(row, field)
    if not found:
        raise TraceError(f"{field}: expected this field, got {field_names(row)}; name another with --map")
    return found[0]


def _values_at(row: Mapping[str, Any], field: str) -> list[Any]:
    """The value of a field, or none. A name may contain dots itself, so the longest first part that fits counts."""
    if field in row:
        return [row[field]]
    dots = [at for at, letter in enumerate(field) if letter == "."]
    heads = (at for at in reversed(dots) if field[:at] in row)
    return next(filter(None, (_values_at(as_mapping(row[field[:at]]), field[at + 1 :]) for at in heads)), [])


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, also one given as JSON text, with or without a code fence; empty for anything else."""
    if isinstance(value, str) and (fenced := _JSON_BLOCK.fullmatch(value)):
        value = fenced[1]
    if isinstance(value, str) and value[:1] == "{":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, Mapping) else {}


def field_names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(row)[:20])) or "no fields"
