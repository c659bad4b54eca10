"""A teacher behind a server, for a model too large to run beside the student. It scores what the student wrote.

```python
server = Server("http://localhost:8000/v1", "their-model")       # vLLM or SGLang
distill_on_policy(model, tokenizer, questions, "runs/own", teacher=ServedTeacher(server))
```
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from rbfast.data.encoding import IGNORE, NO_ROLE, Example, example_of
from rbfast.data.signal_store import SignalStore, example_key
from rbfast.data.spans import ANSWER
from rbfast.teacher.client import Server, ServerError
from rbfast.teacher.logprobs import Progress
from rbfast.teacher.prompt_scores import BY_IDS, Dialect
from rbfast.teacher.server_logprobs import add_example_logprobs, check_scores
from rbfast.utils.processes import process_count, process_index


@dataclass(frozen=True)
class ServedTeacher:
    """A model with the student's tokens on a server that scores prompts given by token ids.

    Args:
        k: candidates per token. The written token is always one more. vLLM gives as many as its --max-logprobs (20).
        concurrency: requests at a time, of each process.
        dialect: "vllm" or "sglang", see `rbfast.teacher.prompt_scores`.

    Raises:
        ValueError: a number below 1, or another dialect.
    """

    server: Server
    k: int = 20
    concurrency: int = 8
    dialect: Dialect = "vllm"

    def __post_init__(self) -> None:
        if self.dialect not in BY_IDS:
            raise ValueError(f"dialect must be {' or '.join(BY_IDS)} for on-policy rounds, got {self.dialect!r}")
        for name in ("k", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def check(self, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
        """Score a prompt, to find out before the student writes whether the server can.

        Raises:
            ServerError: it cannot.
            TokenizersDiffer: its tokens differ from the student's.
        """
        scored = [*prompt[1:], prompt[-1]]  # one token more than a prompt, which may have a single one
        example = example_of(prompt[:1], scored, [ANSWER] * len(scored))
        check_scores(self.server, example, tokenizer, self.k, self.dialect)

    def correct(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, folder: Path, progress: Progress
    ) -> list[str]:
        """Give the examples the teacher's log-probs, and keep these in `folder`, so that none is requested twice. A
        label without log-probs is no longer trained on. Processes share the requests.

        Returns:
            The reasons for which examples got none.

        Raises:
            ServerError: no example got any, or as `add_example_logprobs`.
            TokenizersDiffer: the server's tokens differ from the student's.
        """
        distinct = list({example_key(example): example for example in examples}.values())
        share = distinct[process_index() :: process_count()]
        reasons = list(gather_object(self._score(share, tokenizer, folder, progress)))
        if len(reasons) == len(distinct):
            raise ServerError(f"{self.server.url} scored none of the completions of a round: {reasons[0]}")
        self._store(tokenizer, folder).fill(examples)  # opened anew, so with the shards of all processes
        for example in examples:
            _drop_labels_without_logprobs(example)
        return reasons

    def _score(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        progress: Progress,
    ) -> list[str]:
        with self._store(tokenizer, folder) as store:
            refused = add_example_logprobs(
                self.server,
                examples,
                tokenizer,
                store,
                dialect=self.dialect,
                concurrency=self.concurrency,
                progress=progress,
            )
        return [reason for _, reason in refused]

    def _store(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> SignalStore:
        return SignalStore(folder, self.server.model, self.k + 1, len(tokenizer))


def _drop_labels_without_logprobs(example: Example) -> None:
    dropped = np.ones(len(example.labels), dtype=bool)
    if example.teacher_rows is not None:
        dropped[example.teacher_rows] = False
    example.labels[dropped], example.roles[dropped] = IGNORE, NO_ROLE
