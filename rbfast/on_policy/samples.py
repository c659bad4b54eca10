"""The completions that a student writes in a round: their file, and the training examples made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.data.chat_template import format_prompt
from rbfast.data.completions import RenderedReply
from rbfast.data.encoding import Example, example_of, token_roles
from rbfast.data.instruction import Instruction
from rbfast.data.spans import ANSWER, split_spans
from rbfast.data.thinking import thinking_format
from rbfast.grading.grade import grade
from rbfast.inference.decoding import batches_by_length, encode_prompts, greedy_settings
from rbfast.inference.guide import Guide
from rbfast.inference.local import guided
from rbfast.inference.solver import Sampling, Solution, seed_named
from rbfast.inference.tokens import Vocabulary, phrases_for
from rbfast.teacher.align import spellings
from rbfast.teacher.jobs import Question
from rbfast.utils.files import Journal
from rbfast.utils.memory import trim_memory
from rbfast.utils.processes import is_first_process, process_count, process_index
from rbfast.utils.records import check_numbers, check_shape

_RECORD: dict[str, Any] = {"number": int, "sample": int, "problem": str, "ids": [int], "truncated": bool}


@dataclass(frozen=True)
class Writing:
    """How a student writes the completions of a round.

    Args:
        samples: completions of each problem.
        max_new_tokens: the limit of a completion. A completion that reaches it is trained on, without an end of turn.
        temperature, top_p: of the distribution that tokens are drawn from; temperature 0 is greedy.
        batch_size: the most completions at a time. It may differ when a run resumes.

    Raises:
        ValueError: a number out of its range, or several samples at temperature 0.
        TypeError: something other than a number.
    """

    samples: int = 1
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_numbers(self)
        Sampling(self.samples, self.temperature, self.top_p)
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Writer:
    """A model with its prompt. The system prompt is the problem's own, else the instruction's."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    instruction: Instruction

    def system(self, question: Question) -> str:
        return self.instruction.system if question.system is None else question.system

    def prompt(self, question: Question) -> str:
        return format_prompt(question.text, self.tokenizer, self.instruction, system=question.system)

    def prompt_ids(self, question: Question) -> list[int]:
        return list(self.tokenizer(self.prompt(question), add_special_tokens=False, verbose=False).input_ids)


def write_samples(
    writer: Writer,
    questions: Sequence[Question],
    writing: Writing,
    path: Path,
    seed: str,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """A record of every completion, the samples of a problem next to each other.

    A completion's last bits depend on the others in its batch, so a batch is the unit of work: processes take turns at
    the batches, the first process appends whole batches to `path`, and a batch that the file holds only in part is
    written again.

    Args:
        seed: names the draws, with the number of the problem and its text.
        progress: called with (problems done, problems in all) at the start and after each batch.

    Raises:
        ValueError: the file holds something else.
    """
    journal = Journal(path)
    batches = list(
        batches_by_length(list(map(writer.prompt_ids, questions)), max(1, writing.batch_size // writing.samples))
    )
    [done] = broadcast_object_list([_whole_batches(journal, questions, batches, writing) if is_first_process() else {}])
    progress(len(done), len(questions))
    missing = [batch for batch in batches if batch[0] not in done]
    for start in range(0, len(missing), process_count()):
        turn = missing[start : start + process_count()]  # one batch for each process, at most
        mine = [{number: questions[number] for number in batch} for batch in turn[process_index() :][:1]]
        for records in gather_object([_write(writer, batch, writing, seed) for batch in mine]):
            done |= records
        if is_first_process():
            journal.append(record for batch in turn for number in batch for record in done[number])
        trim_memory()
        progress(len(done), len(questions))
    return [record for number in range(len(questions)) for record in done[number]]


def _whole_batches(
    journal: Journal, questions: Sequence[Question], batches: Sequence[Sequence[int]], writing: Writing
) -> dict[int, list[dict[str, Any]]]:
    """The records of the batches that a file holds in whole, by the number of the problem. Removes the others."""
    found = _read(journal, questions)
    whole = [batch for batch in batches if all(len(found.get(number, ())) == writing.samples for number in batch)]
    done = {number: found[number] for batch in whole for number in batch}
    if len(done) < len(found):  # a process was killed while it wrote
        journal.rewrite(record for records in done.values() for record in records)
    return done


def _read(journal: Journal, questions: Sequence[Question]) -> dict[int, list[dict[str, Any]]]:
    """The records of a file by the number of the problem."""
    found: dict[int, list[dict[str, Any]]] = {}
    for where, record in journal.read():
        check_shape(record, _RECORD, where)
        number, records = record["number"], found.setdefault(record["number"], [])
        is_next = record["sample"] == len(records) and record["ids"]
        if not (0 <= number < len(questions) and record["problem"] == questions[number].text and is_next):
            raise ValueError(f"{where}: expected a completion of this round's problems; name another folder")
        records.append(record)
    return found


def _write(
    writer: Writer, batch: Mapping[int, Question], writing: Writing, seed: str
) -> dict[int, list[dict[str, Any]]]:
    seeds = [seed_named(f"{seed}:{number}:{question.text}") for number, question in batch.items()]
    solutions = guided(
        writer.model,
        writer.tokenizer,
        list(map(writer.prompt, batch.values())),
        Guide.plain(writing.max_new_tokens),
        Sampling(writing.samples, writing.temperature, writing.top_p, seeds, early_stop=False),
        batch_size=writing.batch_size,
    )
    return {
        number: [_record(number, question, sample, solution) for sample, solution in enumerate(of_one)]
        for (number, question), of_one in zip(batch.items(), solutions, strict=True)
    }


def _record(number: int, question: Question, sample: int, solution: Solution) -> dict[str, Any]:
    """A line of the file: the tokens to train on; for readers, the text and, if an answer is known, whether it is
    right."""
    record = {"number": number, "sample": sample, "problem": question.text, "text": solution.text}
    record |= {"truncated": solution.truncated, "ids": [*solution.ids]}
    if question.known is not None:
        record["correct"] = grade(question.known, solution.text, truncated=solution.truncated) >= 1
    return record


def example_of_sample(writer: Writer, question: Question, record: Mapping[str, Any]) -> Example:
    """The example of a completion: the tokens as they were written, each with its role."""
    ids, finished = record["ids"], not record["truncated"]
    inner = ids[:-1] if finished else ids
    roles = [*_roles(writer, inner), *([ANSWER] if finished else [])]
    return example_of(writer.prompt_ids(question), ids, roles)


def _roles(writer: Writer, ids: Sequence[int]) -> np.ndarray:
    """The roles of tokens: strategic and tactical in the thinking, answer after it."""
    spelled = [spelling or b"" for spelling in spellings(writer.tokenizer, ids)]
    text = b"".join(spelled).decode(errors="surrogateescape")  # a token may be a part of a character, or have no text
    if not text:
        return np.full(len(ids), ANSWER)
    close = phrases_for(writer.tokenizer, writer.instruction).close
    # A plain chain of thought may mention the answer marker before the answer, so its last occurrence counts.
    at = text.find(close) if thinking_format(writer.tokenizer).thinks else text.rfind(close)
    thought = text if at < 0 else text[:at]
    roles = np.full(len(text), ANSWER)
    for start, end, role in split_spans(thought) if thought else ():
        roles[start:end] = role
    # A character belongs to the token in which it begins.
    begins = np.cumsum([0, *(len(letter.encode(errors="surrogateescape")) for letter in text)])[:-1]
    ends = np.searchsorted(begins, np.cumsum([0, *map(len, spelled)]))
    offsets = np.stack([ends[:-1], ends[1:]], axis=1)
    return token_roles(RenderedReply(((text, True),), roles, (0, len(thought)), (len(thought), len(text))), offsets)


def longest_example(writer: Writer, questions: Sequence[Question], writing: Writing) -> Example:
    """An example of the longest prompt and a completion of the greatest length.

    Raises:
        ValueError: the model has too few positions, or its tokenizer is not fast or has no end of turn.
    """
    stops = greedy_settings(writer.model, writer.tokenizer)["eos_token_id"]
    Vocabulary(writer.tokenizer, Guide.plain(writing.max_new_tokens), stops)
    longest = max(questions, key=lambda question: len(writer.prompt_ids(question)))
    try:
        [prompt] = encode_prompts(writer.model, writer.tokenizer, [writer.prompt(longest)], writing.max_new_tokens)
    except ValueError as error:
        raise ValueError(f"{longest.text[:60]!r}: {error}") from None
    completion = [0] * writing.max_new_tokens
    return example_of(prompt, completion, [ANSWER] * len(completion))
