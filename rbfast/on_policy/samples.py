"""What a student writes in a round: completions as tokens, kept in a file, and the examples made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.data.chat_template import format_prompt
from rbfast.data.completions import RenderedReply
from rbfast.data.encoding import Example, example_of, token_roles
from rbfast.data.instruction import Instruction
from rbfast.data.spans import ANSWER, split_spans
from rbfast.grading.grade import grade
from rbfast.inference.decoding import batches_by_length, encode_prompts
from rbfast.inference.guide import Guide, Limits
from rbfast.inference.local import guided
from rbfast.inference.solver import Sampling, Solution, seed_named
from rbfast.inference.tokens import phrases_for
from rbfast.teacher.align import spellings
from rbfast.teacher.jobs import Question
from rbfast.utils.files import Journal
from rbfast.utils.memory import trim_memory
from rbfast.utils.records import check_shape

_RECORD: dict[str, Any] = {"number": int, "sample": int, "ids": [int], "truncated": bool}


@dataclass(frozen=True)
class Writing:
    """How a student writes the completions of a round.

    Args:
        samples: completions of each problem.
        max_new_tokens: the limit of a completion. One that reaches it is trained on too, without an end of turn.
        temperature, top_p: what tokens are drawn from; 0 writes greedily.
        batch_size: the most completions at a time. It does not count among the settings of a run.

    Raises:
        ValueError: a number out of its range, or several samples at temperature 0.
    """

    samples: int = 1
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        Sampling(self.samples, self.temperature, self.top_p)
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Student:
    """A model that writes, and how it is asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    instruction: Instruction

    def prompt(self, question: Question) -> str:
        return format_prompt(question.text, self.tokenizer, self.instruction, system=question.system)

    def prompt_ids(self, question: Question) -> list[int]:
        return list(self.tokenizer(self.prompt(question), add_special_tokens=False, verbose=False).input_ids)


def write_samples(
    student: Student,
    questions: Sequence[Question],
    how: Writing,
    path: Path,
    seed: str,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """A record of every completion, the samples of a problem next to each other. The file `path` grows by a batch of
    problems at a time; those that it holds already are not written again.

    Args:
        seed: names the draws, with the place of the problem and its text. They do not depend on what is left to do.
        progress: called with (problems done, problems in all) after each batch.

    Raises:
        ValueError: the file holds something else.
    """
    journal, found = Journal(path), dict[int, list[dict[str, Any]]]()
    for where, record in journal.read():
        check_shape(record, _RECORD, where)
        found.setdefault(record["number"], []).append(record)
    done = {number: records for number, records in found.items() if len(records) == how.samples}
    if len(done) < len(found):  # a process was killed while it wrote
        journal.rewrite(record for records in done.values() for record in records)
    todo = [number for number in range(len(questions)) if number not in done]
    prompts = [student.prompt_ids(questions[number]) for number in todo]
    for rows in batches_by_length(prompts, max(1, how.batch_size // how.samples)):
        batch = [todo[row] for row in rows]
        written = _write(student, {number: questions[number] for number in batch}, how, seed)
        journal.append(record for number in batch for record in written[number])
        done |= written
        trim_memory()
        progress(len(done), len(questions))
    return [record for number in range(len(questions)) for record in done[number]]


def _write(student: Student, batch: Mapping[int, Question], how: Writing, seed: str) -> dict[int, list[dict[str, Any]]]:
    seeds = [seed_named(f"{seed}:{number}:{question.text}") for number, question in batch.items()]
    solutions = guided(
        student.model,
        student.tokenizer,
        [student.prompt(question) for question in batch.values()],
        Guide(Limits(how.max_new_tokens), interventions=()),
        Sampling(how.samples, how.temperature, how.top_p, seeds, early_stop=False),
        batch_size=how.batch_size,
    )
    return {
        number: [_record(number, question, sample, solution) for sample, solution in enumerate(of_one)]
        for (number, question), of_one in zip(batch.items(), solutions, strict=True)
    }


def _record(number: int, question: Question, sample: int, solution: Solution) -> dict[str, Any]:
    """A line of the file: the tokens to train on, and for its reader the text and, if it can be told, whether it is
    right."""
    record = {"number": number, "sample": sample, "problem": question.text, "text": solution.text}
    record |= {"truncated": solution.truncated, "ids": [*solution.ids]}
    if question.known is not None:
        record["correct"] = grade(question.known, solution.text, truncated=solution.truncated) >= 1
    return record


def example_of_sample(student: Student, question: Question, record: Mapping[str, Any]) -> Example:
    """The example of a completion: the very tokens that were written, with the role that each has in the text."""
    ids, finished = record["ids"], not record["truncated"]
    inner = ids[:-1] if finished else ids
    roles = [*_roles(student, inner), *([ANSWER] if finished else [])]
    return example_of(student.prompt_ids(question), ids, roles)


def _roles(student: Student, ids: Sequence[int]) -> np.ndarray:
    """The thinking is split into strategic and tactical spans; what follows its end is the answer."""
    spelled = [spelling or b"" for spelling in spellings(student.tokenizer, ids)]
    text = b"".join(spelled).decode(errors="replace")
    if not text:
        return np.full(len(ids), ANSWER)
    at = text.find(phrases_for(student.tokenizer, student.instruction).close)
    thought = text if at < 0 else text[:at]
    roles = np.full(len(text), ANSWER)
    for start, end, role in split_spans(thought) if thought else ():
        roles[start:end] = role
    # A character counts for the token in which it begins: bytes 0x80 to 0xBF continue one.
    ends = np.cumsum([0, *(sum(byte & 0xC0 != 0x80 for byte in spelling) for spelling in spelled)])
    offsets = np.stack([ends[:-1], ends[1:]], axis=1)
    return token_roles(RenderedReply(((text, True),), roles, (0, len(thought)), (len(thought), len(text))), offsets)


def longest_example(student: Student, questions: Sequence[Question], how: Writing) -> Example:
    """An example as long as a completion of these problems can be. Raises ValueError if the model has not the positions
    for it."""
    prompts = [student.prompt(question) for question in questions]
    encoded = encode_prompts(student.model, student.tokenizer, prompts, how.max_new_tokens)
    completion = [0] * how.max_new_tokens
    return example_of(max(encoded, key=len), completion, [ANSWER] * len(completion))
