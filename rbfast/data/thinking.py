r"""How a model's chat template renders an assistant's turn: where its thinking goes, and what ends the turn.

```python
found = thinking_format(tokenizer)                       # of Qwen3: kind "reply", opener "<think>\n"
"".join(found.pieces("2 + 2 = 4", "It is 4."))           # "<think>\n2 + 2 = 4\n</think>\n\nIt is 4."
```

The format is detected by rendering: a turn with a thought, in every form that templates accept, is compared with the
generation prompt. The text after that prompt is what the model writes. A template that drops the thought of a turn (R1
distills) shows only how a turn begins and ends; the thought then goes into the tags that the template names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from rbfast.data.thinking_marks import THINKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["none", "reply", "prompt", "channels"]
Message = Mapping[str, Any]

_PROBLEM, _THOUGHT, _REPLY, _NEXT = "RBFASTASKED", "RBFASTTHOUGHT", "RBFASTSAID", "RBFASTNEXT"
# Some templates render thinking only if it is switched on.
_SWITCHES: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": True}, {"thinking": True})
_OFF: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})
_FIELDS = ("reasoning_content", "thinking", "reasoning")
_TAGS = tuple((opener, closer) for opener, closer, is_sure in THINKING if is_sure)
# What a template raises for messages that it does not expect, besides jinja2's TemplateError.
_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_FIXED_DAY = datetime(2024, 7, 26)  # the default of Llama 3.1's template
# A template's own switch: a variable whose name contains `think` or `reason`.
_SWITCH = re.compile(r"\bif (?:not )?(\w*(?:think|reason)\w*)\b(?! *[.(])")


@dataclass(frozen=True)
class ThinkingFormat:
    """What a model writes after its generation prompt: opener, thought, closer, reply, tail, and the end of the turn.

    Attributes:
        kind: "none": no thinking. "reply": the model opens the thinking. "prompt": the prompt opens it. "channels":
            thought and reply are separate messages.
        opening: the end of the generation prompt, after the problem.
        opener: written before the thought; before the reply if there is no thinking.
        closer: written between thought and reply; empty if there is no thinking.
        tail: written after the reply, before the token `end`.
        end: the id of the token that ends the turn; None if nothing does.
        switches: arguments of the chat template besides the messages.
        is_composed: the template drops a turn's thought; the tags come from its source, the spaces from its prompts.
        takes_parts: contents are lists of blocks, not strings.
        trims: white space around a reply is removed.
        adds_blank: the tokenizer puts a space before every text.
    """

    kind: Kind = "none"
    opening: str = ""
    opener: str = ""
    closer: str = ""
    tail: str = ""
    end: int | None = None
    switches: Mapping[str, Any] = field(default_factory=dict)
    is_composed: bool = False
    takes_parts: bool = False
    trims: bool = False
    adds_blank: bool = False

    @property
    def thinks(self) -> bool:
        return self.kind != "none"

    @property
    def close(self) -> str:
        """The tag that ends the thinking, without the space around it; empty if there is no thinking."""
        return self.closer.strip()

    def pieces(self, thought: str, said: str) -> tuple[str, str, str, str, str]:
        """What is written after the prompt: opener, thought, closer, reply, tail. The token `end` follows.

        White space around a thought, and around the reply after it, is removed. Without thinking `thought` must be
        empty. Raises ValueError for a thought that contains its own closing tag.
        """
        if self.thinks:
            thought = thought.strip()
            if self.close in thought:
                raise ValueError(f"expected text without {self.close}, which ends the student's thinking")
        return self.opener, thought, self.closer, said.strip() if self.thinks or self.trims else said, self.tail


_CACHE: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, ThinkingFormat]] = WeakKeyDictionary()


def thinking_format(tokenizer: PreTrainedTokenizerBase) -> ThinkingFormat:
    """The format of a tokenizer's chat template (cached). Without a template, a turn is its text and the eos token.

    Raises:
        ValueError: the template fails, omits the problem, or renders a turn that does not continue its generation
            prompt; the message shows both.
    """
    state = (str(tokenizer.chat_template), tokenizer.eos_token, tokenizer.bos_token, len(tokenizer))
    cached = _CACHE.get(tokenizer)
    if cached is None or cached[0] != state:
        cached = _CACHE[tokenizer] = state, _detect(tokenizer)
    return cached[1]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    open_reply: bool,
    switches: Mapping[str, Any],
    takes_parts: bool = False,
) -> str:
    """Render a conversation with the chat template; with `open_reply`, up to where the model continues.

    A template that writes today's date gets a fixed date, so that a trace has the same tokens every day.
    Raises ValueError for a template that fails.
    """
    from jinja2.exceptions import TemplateError

    turns = [{**turn, "content": _parts(turn["content"])} for turn in messages] if takes_parts else list(messages)
    template = str(tokenizer.get_chat_template())
    dated = {"chat_template": _DATE_CALL.sub(_fixed_date, template)} if _DATE_CALL.search(template) else {}
    try:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_reply, **dated, **switches)  # type: ignore[arg-type]
        )
    except (TemplateError, *_FAILURES) as error:
        raise ValueError(f"the chat template fails: {error!r}; set another tokenizer.chat_template") from error


def _fixed_date(call: re.Match[str]) -> str:
    return repr(_FIXED_DAY.strftime(call[2]))


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _detect(tokenizer: PreTrainedTokenizerBase) -> ThinkingFormat:
    if tokenizer.chat_template is None:
        return ThinkingFormat(end=tokenizer.eos_token_id, adds_blank=_adds_blank(tokenizer))
    template = _TemplateProbe(tokenizer)
    known = (*_SWITCHES, *template.own_switches())
    shown = [found for switches in known if (found := template.detect_rendered(switches)) is not None]
    if shown:  # prefer a switch that changes the prompt: it asks for the thought
        plain = template.prompt(shown[0].switches)
        return next((found for found in shown if template.prompt(found.switches) != plain), shown[0])
    if template.refused is not None:
        raise template.unknown(*template.refused)
    return template.detect_composed() or template.detect_plain()


class _TemplateProbe:
    """Renders probe conversations with a chat template, to detect its format."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.text = str(tokenizer.get_chat_template())
        self.takes_parts = False
        self.refused: tuple[str, str] | None = None  # a prompt, and a turn with a thought that does not continue it
        prompt = self.prompt({})
        if _PROBLEM not in prompt:
            self.takes_parts = True
            if _PROBLEM not in self.prompt({}):
                raise ValueError(
                    "the chat template leaves the problem out: a user's turn, as text or as a list of parts, is "
                    f"rendered as {prompt[-200:]!r}; set another tokenizer.chat_template"
                )

    def prompt(self, switches: Mapping[str, Any]) -> str:
        return render(self.tokenizer, [_user_message()], True, switches, self.takes_parts)

    def turn(self, message: Message, switches: Mapping[str, Any], *after: Message) -> str | None:
        """The rendered conversation, or None if the template fails."""
        try:
            return render(self.tokenizer, [_user_message(), message, *after], False, switches, self.takes_parts)
        except ValueError:
            return None

    def unknown(self, prompt: str, turn: str) -> ValueError:
        return ValueError(
            "the chat template writes turns in an unknown way: expected a turn that continues the generation prompt, "
            f"with at most one thought before the reply; the prompt is {prompt[-160:]!r}, the turn "
            f"{turn[turn.find(_PROBLEM) + len(_PROBLEM) :][-240:]!r}; set another tokenizer.chat_template"
        )

    # ------------------------------------------------------------------------------------------- the three detectors

    def detect_rendered(self, switches: Mapping[str, Any]) -> ThinkingFormat | None:
        """The format of a template that renders the thought of a turn."""
        prompt = self.prompt(switches)
        for message in self._thinking_turns(prompt):
            turn = self.turn(message, switches)
            if turn is None or _THOUGHT not in turn:
                continue
            written = _continuation(turn, prompt)
            before, _, rest = written.partition(_THOUGHT)
            closer, reply, after = rest.partition(_REPLY)
            if not reply or not closer.strip() or _THOUGHT in after or "'type'" in closer:
                self.refused = self.refused or (prompt, turn)
                if written:
                    return None
                continue  # a turn in another form may continue this prompt
            kind: Kind = "channels" if "<|channel|>" in closer else "reply" if before.strip() else "prompt"
            return self._format(kind, switches, after, opener=before, closer=closer)
        return None

    def _thinking_turns(self, prompt: str) -> Iterator[Message]:
        """A turn with a thought, in each form that templates accept."""
        for name in _FIELDS:
            yield _assistant_message(_REPLY, **{name: _THOUGHT})
        if "thinking" in self.text:
            yield _assistant_message([{"type": "thinking", "thinking": _THOUGHT}, {"type": "text", "text": _REPLY}])
        if "blocks" in self.text:
            thought, reply = {"type": "thoughts", "text": _THOUGHT}, {"type": "response", "text": _REPLY}
            yield _assistant_message({"blocks": [thought, reply]})
        if self.tags is not None:
            opener, closer = self._spaced_tags(prompt)
            yield _assistant_message(f"{opener}{_THOUGHT}{closer}{_REPLY}")
            if not opener:  # some templates want the turn to repeat the tag that the prompt opened
                yield _assistant_message(f"{prompt[prompt.rindex(self.tags[0]) :]}{_THOUGHT}{closer}{_REPLY}")

    def detect_composed(self) -> ThinkingFormat | None:
        """The format of a template that names thinking tags but drops the thought in them."""
        if self.tags is None:
            return None
        opener = self.tags[0]
        for switches in sorted(_SWITCHES, key=lambda switches: opener not in self.prompt(switches)):
            prompt, turn = self.prompt(switches), self.turn(_assistant_message(_REPLY), switches)
            if turn is None or prompt.rstrip().endswith(self.tags[1]):
                continue  # this prompt closes the thinking
            opener, closer = self._spaced_tags(prompt)
            after = turn.partition(_REPLY)[2]
            return self._format("reply" if opener else "prompt", switches, after, opener, closer, is_composed=True)
        return None

    def detect_plain(self) -> ThinkingFormat:
        """The format of a template without thinking."""
        prompt, turn = self.prompt({}), self.turn(_assistant_message(_REPLY), {}) or ""
        opener, reply, after = _continuation(turn, prompt).partition(_REPLY)
        if not reply:
            raise self.unknown(prompt, turn)
        blank = f" \n{_REPLY}\n "
        return self._format(
            "none", {}, after, opener, trims=blank not in (self.turn(_assistant_message(blank), {}) or "")
        )

    def _format(
        self, kind: Kind, switches: Mapping[str, Any], after: str, opener: str = "", closer: str = "", **rest: Any
    ) -> ThinkingFormat:
        opening = self.prompt(switches).partition(_PROBLEM)[2]
        tail, end = self._ending(after, switches, opening)
        rest |= {"takes_parts": self.takes_parts, "adds_blank": _adds_blank(self.tokenizer)}
        return ThinkingFormat(kind, opening, opener, closer, tail, end, switches, **rest)

    # ------------------------------------------------------------------------------------- what the detectors share

    @cached_property
    def tags(self) -> tuple[str, str] | None:
        """The thinking tags in the template's source or prompt."""
        opening = self.prompt({}).rstrip()
        return next((tags for tags in _TAGS if tags[1] in self.text or opening.endswith(tags[0])), None)

    def own_switches(self) -> list[dict[str, Any]]:
        """Switches that only this template has, if they put the opening tag into the prompt."""
        if self.tags is None or self.tags[0] in self.prompt({}):
            return []
        names = dict.fromkeys(_SWITCH.findall(self.text))
        return [{name: True} for name in names if self.tags[0] in self.prompt({name: True})]

    def _spaced_tags(self, prompt: str) -> tuple[str, str]:
        """The text before and after a thought for this prompt, spaces included.

        A prompt with thinking switched off opens and closes an empty thought, which shows the spaces.
        """
        assert self.tags is not None
        opener, closer = self.tags
        inside, after = "\n\n", "\n\n"
        for switches in _OFF:
            if empty := re.search(rf"{re.escape(opener)}(\s*){re.escape(closer)}(\s*)\Z", self.prompt(switches)):
                inside, after = empty.groups()
                break
        if opened := re.search(rf"{re.escape(opener)}(\s*)\Z", prompt):
            return "", f"\n{closer}{after}" if opened[1] else f"{closer}{after if inside == '' else ''}"
        return opener + inside[:1], inside[1:] + closer + after

    def _ending(self, after: str, switches: Mapping[str, Any], opening: str) -> tuple[str, int | None]:
        """What ends a turn: some text, then a token.

        The token is the added token that the template writes after the reply; else the one that opens the next turn;
        else eos. If several added tokens follow the reply, it is the one that also ends a user's turn.
        """
        numbers = {token.content: number for number, token in self.tokenizer.added_tokens_decoder.items()}
        added = added_tokens(self.tokenizer)
        if added is not None:
            if tokens := list(added.finditer(after)):
                match = next((one for one in tokens if one[0] in opening), tokens[0])
                return after[: match.start()], numbers[match[0]]
            longer = self.turn(_assistant_message(_REPLY), switches, {"role": "user", "content": _NEXT}) or ""
            header = added.match(longer.partition(_REPLY)[2].lstrip())
            if header and header[0] != self.tokenizer.bos_token:
                return "", numbers[header[0]]
        return "", self.tokenizer.eos_token_id


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern that finds the added tokens (tags, ends of turns) in a text; None if the tokenizer has none."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def _adds_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    twice = [*tokenizer("a", add_special_tokens=False).input_ids] * 2
    return str(tokenizer.decode(twice, clean_up_tokenization_spaces=False)).strip() == "a a"


def _user_message() -> Message:
    return {"role": "user", "content": _PROBLEM}


def _assistant_message(content: Any, **fields: str) -> Message:
    return {"role": "assistant", "content": content, **fields}


def _continuation(turn: str, prompt: str) -> str:
    """The part of `turn` after `prompt`, which may end in more white space; empty if `turn` does not continue it."""
    if turn.startswith(prompt):
        return turn[len(prompt) :]
    short = prompt.rstrip()
    return turn[len(short) :].lstrip() if turn.startswith(short) and short.endswith(tuple(o for o, _ in _TAGS)) else ""
