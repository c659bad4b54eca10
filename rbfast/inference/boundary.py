r"""Find the places where a text that is still being written may be interrupted: never in a number, LaTeX or code.

    boundary = Boundary()
    boundary.write("So $x = 3")          # boundary.safe is False: the formula is open
    boundary.write("$ holds.\n")         # boundary.safe and boundary.sentence_end are True

One pass, a few operations per character; only the last characters are kept.
"""

import re

_LONGEST_MATH = 1_000  # characters; an opener that is not closed within them does not count
_TAIL = 32  # the most characters that the rules below look back

_BEGIN = re.compile(r"\\begin\{([a-zA-Z]{1,20}\*?)\}\Z")
_ARGUMENT = re.compile(r"\\[a-zA-Z]+\*?\{\Z")
_MATH = {"\\(": "\\)", "\\[": "\\]"}
# "$5 per day" is money, "$5 x$" and "$5 + 3$" are formulas
_MONEY = re.compile(r"\d[\d,.]*[)]?\s+[A-Za-z]{2}")
# A digit, and a sign that may join it to the next; a sign that may begin a number; a command name that may continue.
_UNFINISHED = re.compile(r"(?:\d[.,:/]?|\d[eE][-+]?|(?:^|[\s(\[{=*/^<>|,$])[-+.]|\\(?:[a-zA-Z]+\*?)?)\Z")
# A full stop after a digit may be a decimal point until white space follows.
_SENTENCE_END = re.compile(r"(?:(?<!\d)[.!?][.!?)\]\"'*_”]{0,8}|[.!?][.!?)\]\"'*_”]{0,8}\s+|\n\s*)\Z")
_ABBREVIATION = re.compile(r"(?:^|[\s(*#_])(?:[a-z]|e\.g|i\.e|vs|dr|mr|ms|mrs|cf|eq|no|approx)\.\s*\Z", re.IGNORECASE)


class Boundary:
    """Tracks which constructs are open at the end of a growing text.

    Args:
        marker: another text that must not be interrupted (an end-of-thinking marker).
    """

    def __init__(self, marker: str = ""):
        self._prefixes = tuple(marker[:length] for length in range(1, len(marker)))
        self.restart("")

    def restart(self, text: str) -> None:
        """Reset after `text` was inserted: no construct is open."""
        self._tail = text[-_TAIL:]
        self._closer = ""
        self._inside = ""  # the first characters after the opener
        self._length = 0
        self._depth = 0  # of braces

    def write(self, text: str) -> None:
        for character in text:
            self._tail = (self._tail + character)[-_TAIL:]
            if self._closer:
                self._look_for_end(character)
            else:
                self._look_for_opener(character)

    @property
    def open(self) -> bool:
        """Whether the text ends inside LaTeX or code."""
        return bool(self._closer)

    @property
    def in_fence(self) -> bool:
        return self._closer == "```"

    @property
    def in_line(self) -> bool:
        """Whether the text ends within a line, of text or of code."""
        return not self._tail.endswith("\n")

    @property
    def safe(self) -> bool:
        """Whether a text may be inserted here: outside of LaTeX, code, a number and the marker."""
        return not self._closer and not _UNFINISHED.search(self._tail) and not self._tail.endswith(self._prefixes)

    @property
    def sentence_end(self) -> bool:
        """Whether a sentence or a line ends here, in a safe place."""
        return bool(self.safe and _SENTENCE_END.search(self._tail) and not _ABBREVIATION.search(self._tail))

    def _look_for_opener(self, character: str) -> None:
        escaped = self._tail[-2:-1] == "\\"
        if character in "$`" and not escaped:
            self._open(character)
        elif self._tail[-2:] in _MATH and self._tail[-3:-2] != "\\":
            self._open(_MATH[self._tail[-2:]])
        elif character == "{" and _ARGUMENT.search(self._tail):
            self._open("}")

    def _open(self, closer: str) -> None:
        self._closer, self._inside, self._length, self._depth = closer, "", 0, 1

    def _look_for_end(self, character: str) -> None:
        self._length += 1
        self._inside = (self._inside + character)[:_TAIL]
        if self._longer_delimiter():
            return
        if self._closes(character) or (not self.in_fence and self._length > _LONGEST_MATH):
            self._closer = ""
            if environment := _BEGIN.search(self._tail):
                self._open(f"\\end{{{environment[1]}}}")

    def _longer_delimiter(self) -> bool:
        """Whether this character belongs to the opening delimiter: `$$` and code fences begin like `$` and "`"."""
        if self._closer == "$" and self._inside == "$":
            self._open("$$")
        elif self._closer == "`" and self._inside == "``":
            self._open("```")
        else:
            return self._closer == "`" and self._inside == "`"
        return True

    def _closes(self, character: str) -> bool:
        if self._closer == "$":
            # An inline formula neither begins nor ends with a space, and ends with its line.
            ends = character == "$" and self._tail[-2:-1] not in ("\\", " ")
            return ends or character == "\n" or self._inside[0].isspace() or bool(_MONEY.match(self._inside))
        if self._closer == "`":
            return character in "`\n" or (self._inside[0] == "`" and self._length > 1)
        if self._closer == "}":
            self._depth += 0 if self._tail[-2:-1] == "\\" else {"{": 1, "}": -1}.get(character, 0)
            return self._depth == 0
        # The opener's own characters do not close it: four backticks do not end the fence that three began.
        return self._length >= len(self._closer) and self._tail.endswith(self._closer)
