"""Guidance over token ids: a guide's view of a tokenizer (`Vocabulary`), and the state of a completion."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from rbfast.data.chat_template import default_instruction, end_of_turn
from rbfast.data.instruction import ANSWER, Instruction
from rbfast.data.thinking import thinking_format
from rbfast.inference.decoding import decode_text
from rbfast.inference.guide import Guide, Phrases
from rbfast.inference.solver import Solution
from rbfast.inference.state import GuideState, Order, Phase


def phrases_for(tokenizer: PreTrainedTokenizerBase | None, instruction: Instruction | None = None) -> Phrases:
    """The markers of a tokenizer's model: its template's thinking tags, else those of a plain chain of thought.

    A plain chain of thought ends where its answer begins, as the instruction (None: the default) tells the model.
    Without a tokenizer the model reads plain text, so its thinking is plain.
    """
    if tokenizer is None:
        instruction = instruction or ANSWER
        return Phrases(close=instruction.opens, finish=instruction.closes)
    template, instruction = thinking_format(tokenizer), instruction or default_instruction(tokenizer)
    finish = instruction.closes and instruction.closes + template.tail
    if not template.thinks:
        return Phrases(close=instruction.opens, finish=finish)
    space = template.closer[len(template.closer.rstrip()) :]
    probe = space + (instruction.opens if instruction.text else "")
    return Phrases(close=template.close, finish=finish, probe=probe, open=template.opener)


class Vocabulary:
    """A guide's view of a tokenizer: the tokens of texts (cached), and the ends of turn.

    Raises:
        ValueError: the tokenizer is not a fast one, or it cannot spell a text that the guide inserts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, guide: Guide, stops: Sequence[int]):
        if not tokenizer.is_fast:
            raise ValueError(f"guidance needs a fast tokenizer, got {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        self.stops = frozenset(stops)
        self.end = end_of_turn(tokenizer)
        self._encoded: dict[str, list[int]] = {}
        if not guide.passive:
            for name, text in asdict(guide.phrases).items():
                self._check(name, text)

    def _check(self, name: str, text: str) -> None:
        ids = self.encode(text)
        back = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self.stops.intersection(ids) or text.strip() not in back:
            raise ValueError(
                f"{name} must be a text that the tokenizer can write, got {text!r}, which it decodes to {back!r}: "
                "choose a marker that its vocabulary can spell"
            )

    def encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._encoded[text]

    def count(self, text: str) -> int:
        return len(self.encode(text))


class TokenState:
    """A guided completion over token ids. It depends only on the tokens fed to it.

    Attributes:
        queue: tokens to force before the model may choose again.
        ids: the tokens without struck ones.
        written: the number of tokens fed, struck ones included.
    """

    def __init__(self, guide: Guide, vocabulary: Vocabulary, listen: Callable[[str, str], None] | None = None):
        self.vocabulary = vocabulary
        self.state = GuideState(guide, vocabulary.count)
        self.queue: deque[int] = deque()
        self.ids: list[int] = []
        self.written = 0
        self.abandoned = False
        self._listen = listen
        self._stream = DecodeStream(skip_special_tokens=False)
        self._carry_out(self.state.start())

    @property
    def done(self) -> bool:
        return self.abandoned or (self.state.phase is Phase.DONE and not self.queue)

    @property
    def wants_probe(self) -> bool:
        return not self.queue and not self.done and self.state.wants_probe

    @property
    def key(self) -> str | None:
        """The answer, as a vote counts it; None if there is none."""
        return Solution.of(self.state).key

    def feed(self, token: int, entropy: float | None = None) -> int:
        """Process the next token, the queue's first if there is a queue; returns the number of tokens to strike."""
        self.written += 1
        self.ids.append(token)
        if self.queue:
            if token != self.queue.popleft():
                raise ValueError(f"expected the first token of the queue, got {token}: feed tokens in order")
            return 0
        phase, ended = self.state.phase, token in self.vocabulary.stops
        piece = "" if ended else self._decode(token)
        order = self.state.write(piece, 1, entropy, ended)
        if self._listen and piece:
            self._listen(phase.value, piece)
        return self._carry_out(order)

    def _decode(self, token: int) -> str:
        """The text that a token completes; empty inside a multi-token character."""
        backend = self.vocabulary.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        try:
            return self._stream.step(backend, token) or ""
        except Exception as error:  # the stream raises plain Exceptions
            if "Invalid prefix" not in str(error):
                raise
            # With byte fallback, invalid bytes can change how an earlier byte decodes. Drop them.
            self._stream = DecodeStream(skip_special_tokens=False)
            return self._stream.step(backend, token) or ""

    def probed(self, text: str, tokens: int) -> int:
        """Process the reply to a probe; returns the number of tokens to strike."""
        return self._carry_out(self.state.probed(text, tokens))

    def _carry_out(self, order: Order | None) -> int:
        if order is None:
            return 0
        if order.strike:
            del self.ids[-order.strike :]
        self.queue.extend(self.vocabulary.encode(order.text) if order.text else [])
        if order.end:
            self.queue.append(self.vocabulary.end)
        self._stream = DecodeStream(skip_special_tokens=False)
        if self._listen and order.text:
            self._listen(order.kind, order.text)
        return order.strike

    def solution(self) -> Solution:
        solution = Solution.of(self.state)
        return replace(
            solution,
            text=decode_text(self.vocabulary.tokenizer, self.ids),
            ids=tuple(self.ids),
            tokens=solution.tokens if not self.abandoned else self.written + solution.probe_tokens,
            abandoned=self.abandoned,
        )
