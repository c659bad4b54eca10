r"""Normalize the notation of answers: the many spellings of people and models become plain LaTeX.

```python
normalize("−√13 ⁄ 2")                      # "-\sqrt{13} / 2"
normalize(r"$\dfrac12\,\text{cm}$")        # r"\frac{1}{2} \text{cm}"
```
"""

from __future__ import annotations

import functools
import re
import unicodedata

from rbfast.data.answers import closing_brace
from rbfast.grading.units import CURRENCY_SIGNS

_SIGNS = {
    **dict.fromkeys("−–—‐‑‒﹣－⁻", "-"),
    **dict.fromkeys("⁄∕／", "/"),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("\u2009\u200a\u202f\u2006\u2005\u2004\u2002\u2003\u2007\u2008\u00a0\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u2061\u2062\u2063\u00ad", ""),
    **dict.fromkeys("’′", "'"),
    **dict.fromkeys("“”", '"'),
    **{"÷": "/", "∗": "*", "、": ",", "。": ".", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∛": r"\sqrt[3] "},
    **dict.fromkeys("°º", r"^\circ "),
}
_NAMED = (  # signs, each before its LaTeX name
    "× times ± pm ∓ mp ≤ le ≥ ge ⩽ le ⩾ ge ≠ ne ≈ approx ∞ infty ∪ cup ∩ cap ¬ neg ∧ land ∨ lor ∈ in ∅ emptyset √ sqrt "
    "⟨ langle ⟩ rangle → to ∠ angle Δ Delta Ω Omega Σ Sigma ϕ phi µ mu α alpha β beta γ gamma δ delta ε epsilon ζ zeta "
    "η eta θ theta ι iota κ kappa λ lambda μ mu ν nu ξ xi π pi ρ rho σ sigma τ tau υ upsilon φ phi χ chi ψ psi ω omega"
)
_SIGNS |= dict(zip(_NAMED.split()[::2], (rf"\{name} " for name in _NAMED.split()[1::2]), strict=True))
_UP = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_DOWN = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_FUNCTION = "(?:sin|cos|tan)h?|sec|csc|cot|arc(?:sin|cos|tan)|ln|log|exp"
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\(?=(?:[dtc]?frac|sqrt|text|boxed|pi|left|right|cdot|times|pm|le|ge|in|cup|infty)(?![a-z]))", r"\\"),
        (r"\\\\(?:\[\d+\w+\])?(?![a-zA-Z])", r" \\\\ "),
        (r"(?<!\\)\\[()\[\]]", " "),
        (r"\\(?:underline|(?:text)?color\s*\{\w+\})(?=\s*\{)|(?<!\\)\\$", ""),
        (rf"\\text\{{\s*(\\?[{CURRENCY_SIGNS}])\s*\}}", r"\1"),
        (r"\s*(?:\\text\{\s*)?\((?:rounded|correct|to the nearest|approx)[^()]*\)\}?$", ""),
        (r"^(?:about|around|roughly|approximately|exactly|either|both)\s+(?=\S)", ""),
        (r"^(?:minus|negative)\s+(?=[\d.\\$])", "-"),
        (r"(?<=\d)'(?=\d{3}(?!\d))", "\u200b"),  # Swiss thousands separator
        (r"(?<=[\w)}]) & (?=[\w(\\-])(?!.*\\end)(?<!\\begin)", " and "),
        (r"(\d*\.\d*)\\(?:bar|dot)\s*\{?(\d+)\}?", r"\1\\overline{\2}"),
        (r"(?<!\d)(\d+\.)\((\d+)\)", r"\1\\overline{\2}"),
        (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\colon(?![a-zA-Z])", ":"),
        (r"\\log_\{?e\}?(?![a-zA-Z])", r"\\ln "),
        (r"(?<![\\a-zA-Z{])a(sin|cos|tan)(?=\s*\()", r"\\arc\1"),
        (rf"\\(?:operatorname\*?|mathrm|text)\s*\{{\s*(?!sec)({_FUNCTION})\s*\}}", r"\\\1 "),  # sec: seconds
        (rf"(?<![\\a-zA-Z{{])({_FUNCTION})(?=\s*[({{\\_|^]| ?\d*[a-z](?![a-zA-Z]))", r"\\\1"),
        (r"(?<![\\a-zA-Z{])(?:(ln)(?= ?\d)|(log|sin|cos|tan)(?= \d))", r"\\\1\2 "),  # `log2` may be of base 2
        (
            r"(\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])(?:\^\{?\d\}?)?\s*[({]?)\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\\circ\}?",
            r"\1\\frac{\2\\pi}{180}",
        ),
        (r"\\log_\s*(\d)", r"\\log_{\1}"),
        (r"(?<=\d)(?:\{,\}|, ?\\!) ?(?=\d{3}(?!\d))", "\u200b"),  # certainly a thousands separator
        (r"\{,\}|, ?\\[!,]", ","),  # `(1,\,2)`, or a decimal comma; `1,\,234` may be one number or two
        (r"(?<=\d)\\!(?=\d)", ""),
        (r"(?<=\d)(?:\\,|~)(?=\d{3}(?!\d))", "\u200b"),
        (r"\\!", ""),
        (r"\\lnot(?![a-zA-Z])", r"\\neg"),
        (
            r"(^|\(|\\(?:land|lor|wedge|vee|to|rightarrow|Rightarrow|implies)(?![a-zA-Z]))\s*\\sim(?![a-zA-Z])",
            r"\1\\neg ",
        ),
        (r"(?<![^\s(\[~>&|^])~(?=~|[a-zA-Z](?![a-zA-Z])|\([\s~]*[a-zA-Z])", r"\\neg "),  # any other tilde is a space
        (r"(?<!\\)\\[,;:> ]|~|\\(?:quad|qquad|thinspace|enspace|hfill)(?![a-zA-Z])", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|mathstrut)(?![a-zA-Z])\s*\.?(?=[^\d]|$)", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:mathrm|text)\s*\{\s*([ei])\s*\}", r"\1"),  # the constants e and i, upright
        (
            r"\\(?:mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textnormal|mbox|operatorname\*?|bf|rm)\s*\{",
            r"\\text{",
        ),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])", r"\\le"),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])", r"\\ge"),
        (r"\\neq(?![a-zA-Z])", r"\\ne"),
        (r"\\lt(?![a-zA-Z])|&lt;", "<"),
        (r"\\gt(?![a-zA-Z])|&gt;", ">"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=(?=\s*-?[\d\\a-z])", r"\\ne "),
        (r"\+/-|\+-", r"\\pm "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\(?:degree|degrees)(?![a-zA-Z])", r"^\\circ"),
        (r"\^\s*\{?\s*(?:\^?\\circ|\\text\{o\})\s*\}?", r"^\\circ "),
        (r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset"),
        (r"\\(?:vee|lor)(?![a-zA-Z])", r"\\text{ or }"),
        (r"\\land(?![a-zA-Z])|\\wedge(?![a-zA-Z])", r"\\text{ and }"),
        (r"\\(?:ldots|dots|cdots)(?![a-zA-Z])", "..."),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\(?:mid|vert)(?![a-zA-Z])", "|"),
        (r"\\%", "%"),
        (r"\\\$", "$"),
        (r"\\#", "#"),
        (r"\\text\{\s*(\$?-?\d[\d.,]*)", r"\1\\text{"),  # a number inside \text
        (r"\\text\{\s*\}(?:\s*\^\s*\{?\s*\d\s*\}?)?", ""),
        (r"\*\*(?=\s*[\d({-])(?<=[\w)}]\*\*)", "^"),
        (r"(?<![\\a-zA-Z])sqrt(?![a-zA-Z])", r"\\sqrt"),
        (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"(?<![\\a-zA-Z])(pi|theta|alpha|beta)(?![a-zA-Z])", r"\\\1 "),
        (r"(?<=[\d\s)])pi(?![a-zA-Z])", r"\\pi "),
        (r"^(\d+)\s*(?:\^\s*)?(?:\{?\\text\{\s*)?(?:st|nd|rd|th)\}{0,2}$", r"\1"),
        (r"^USD? ?(?=\$)", ""),
        (r"(?<=\d)\s*[xX]\s*(?=\d)", r"\\times "),
        (r"(?<=[\w)}])\s*\*\s*(?=[\w(\\{])", r"\\cdot "),
    )
]
_BASE_NAMES = "two three four five six seven eight nine ten"
_BASES = {word: str(base) for base, word in enumerate(_BASE_NAMES.split(), start=2)}
_BASE = re.compile(
    r"(?<=[\dA-F)])(?: *\(?(?:in )?base[ -]|_\{?(?:\\text\{|\()?)(?P<base>\d+|[a-z]{3,5})(?![a-z\d])"
    r"(?:[)}]+|(?=[ ,;.]|$))"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LINES = re.compile(r"\\begin\{(cases|aligned|align\*?|gathered)\}(.*)\\end\{\1\}", re.DOTALL)
_DOTS = re.compile(r"(?:\.{3}|…|\\(?:ldots|dots|cdots)(?![a-zA-Z]))")
# A decimal that repeats a digit three times (or a group of digits twice) before dots.
_ENDLESS = re.compile(
    r"(?P<fixed>(?<!\d)\d*\.\d*?)(?:(?P<one>\d)(?P=one){2,}|(?P<several>\d{2,9}?)(?P=several)+)"
    rf"\s*{_DOTS.pattern}"
)
_RAISED, _LOWERED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_EDGES = re.compile(r"^[\s*`]+|[\s*`.:✓✔✅☑🎉✨■□∎\ufe0f]+$")
_COMMAND = re.compile(r"\\[a-zA-Z]+(?:\[[^\]]*\])?")


@functools.lru_cache(maxsize=1024)
def normalize(text: str) -> str:
    r"""An answer in plain LaTeX: ASCII, `\frac` and `\sqrt` with braces, without spacing, sizing, boxes, dollar signs
    and final full stop. Certain thousands separators (`1{,}234`, `1\,234`, a thin space) are removed.
    """
    text = _ENDLESS.sub(_with_overline, text) if _DOTS.search(text) else text
    text = unbox(_ascii(text))
    text = _environment_lines(_french_interval(_strip_dollars(_EDGES.sub("", text))))
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = add_braces(_BASE.sub(_numbered_base, text.replace("\u200b", "")))
    lines = r"\s+" if r"\begin" in text else r"[^\S\n]+"
    return _EDGES.sub("", re.sub(lines, " ", text)).strip()


def _with_overline(match: re.Match[str]) -> str:
    """`0.1666...` as `0.1\\overline{6}`."""
    return rf"{match['fixed']}\overline{{{match['one'] or match['several']}}}"


def _numbered_base(match: re.Match[str]) -> str:
    """`101 base 2` and `101_{\\text{two}}` as `101_2`."""
    base = _BASES.get(match["base"], match["base"])
    return f"_{{{base}}}" if base.isdigit() else match[0]


def _french_interval(text: str) -> str:
    """The French notation of an open interval, `]1, 3[`, as `(1, 3)`."""
    match = re.fullmatch(r"([\[\]])([^\[\]()]*[,;][^\[\]()]*)([\[\]])", text)
    if match is None:
        return text
    return f"{'(' if match[1] == ']' else '['}{match[2]}{')' if match[3] == '[' else ']'}"


def _environment_lines(text: str) -> str:
    """The lines of `\\begin{cases} x = 1 \\\\ y = 2 \\end{cases}`. A piecewise function, which has an `&`, stays."""
    match = _LINES.fullmatch(text)
    lines = re.sub(r"&\s*=", "=", match[2]) if match else text
    return text if "&" in lines else lines.strip()


def _ascii(text: str) -> str:
    if text.isascii():
        return text
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_UP)}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{match[0].translate(_DOWN)}}}", text)
    text = re.sub(r"(?<=\d)[\u2009\u202f\u2006\u00a0\u2007](?=\d{3}(?!\d))", "", text)
    return "".join(map(_ascii_letter, text))


def _ascii_letter(letter: str) -> str:
    if letter.isascii():
        return letter
    if letter in _SIGNS:
        return _SIGNS[letter]
    if unicodedata.decimal(letter, None) is not None:
        return str(unicodedata.decimal(letter))
    plain = unicodedata.normalize("NFKC", letter)
    if "\u2044" in plain:  # a vulgar fraction such as ½
        above, _, below = plain.partition("\u2044")
        return rf"\frac{{{above}}}{{{below}}}"
    return "".join(_SIGNS.get(part, part) for part in plain)


def without_text_command(text: str) -> str:
    r"""The text without `\text{}` around words."""
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text)


def unbox(text: str) -> str:
    r"""The text without `\boxed{}` around its content."""
    while match := _BOX.search(text):
        end = closing_brace(text, match.end() - 1)
        if end is None:
            return text[: match.start()] + text[match.end() :]
        text = text[: match.start()] + text[match.end() : end] + text[end + 1 :]
    return text


def _strip_dollars(text: str) -> str:
    """The text without the dollar signs around mathematics. A single dollar sign is money."""
    text = text.replace("$$", "$")
    if text.replace("\\$", "").count("$") > 1:
        return re.sub(r"(?<!\\)\$", " ", text).strip()
    return text


def add_braces(text: str) -> str:
    r"""The text with braces around the arguments of `\frac` and `\sqrt`, and of `^` if it has a minus or brackets."""
    for command, arguments in ((r"\frac", 2), (r"\sqrt", 1)):
        if command in text:
            text = _with_arguments(text, command, arguments)
    if "^" not in text:
        return text
    text = re.sub(r"\^\s*(-\s*(?:\d+|[a-zA-Z]))", r"^{\1}", text)
    return re.sub(r"\^\s*\(((?:[^()]|\([^()]*\))*)\)", r"^{\1}", text)


def _with_arguments(text: str, command: str, count: int) -> str:
    """Brace the arguments of a command, from the last use to the first, so that nested arguments are braced already."""
    first, *parts = re.split(re.escape(command) + r"(?![a-zA-Z])", text)
    done = ""
    for part in reversed(parts):
        head = re.match(r"\s*(\[[^\]]*\])?", part)
        assert head is not None
        written, rest = command + (head[1] or ""), part[head.end() :] + done
        for _ in range(count):
            argument, rest = _split_argument(rest.lstrip(), whole=count == 1)
            written += f"{{{argument}}}"
        done = written + rest
    return first + done


def _split_argument(text: str, *, whole: bool) -> tuple[str, str]:
    """Split off a command's argument: a group, a command or one character; with `whole` also a number or `(...)`."""
    if text.startswith("{"):
        end = closing_brace(text, 0)
        return (text[1:], "") if end is None else (text[1:end], text[end + 1 :])
    if whole and (match := re.match(r"\d+(?:\.\d+)?|\(([^()]*)\)", text)):
        return match[1] or match[0], text[match.end() :]
    if match := _COMMAND.match(text):
        return match[0], text[match.end() :]
    return text[:1], text[1:]
