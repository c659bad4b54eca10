r"""Split numbers from their units: which words are units, and the size of each.

```python
split_unit(r"16\text{ cm}^2")        # ("16", Unit("length^2", Fraction(1, 10000)))
split_unit("16 legs")                # ("16", None): a counted thing
split_unit("7x")                     # ("7x", None): no unit
```

If both answers have a unit of measure, the units must agree. Counted things need not.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from rbfast.grading.numerals import GROUPS


class Unit(NamedTuple):
    """A dimension, and the size of the unit in that dimension's base unit."""

    dimension: str
    size: Fraction


_TABLE = """
length: m meter metre =1; cm centimeter centimetre =1/100; mm millimeter millimetre =1/1000
length: km kilometer kilometre =1000
length: in inch inches =127/5000; ft foot feet =381/1250; yd yard =1143/1250; mi mile =201168/125
mass: g gram gm =1; kg kilogram kilo =1000; mg milligram =1/1000; lb pound =45359237/100000; oz ounce =45359237/1600000
mass in tons: ton =1; tonne =1
time: s sec second =1; min minute =60; h hr hour =3600; day =86400; week =604800; millisecond =1/1000
months: month =1; year yr =12; decade =120; century centuries =1200
volume: l liter litre =1; ml milliliter millilitre cc =1/1000
volume in cups: cup =1; pint =2; quart =4; gallon gal =16; tablespoon tbsp =1/16; teaspoon tsp =1/48
acres: acre =1
hectares: hectare =1
force: newton =1
energy: joule =1; kilojoule =1000
electronvolts: electronvolt =1
heat: calorie =1; kilocalorie kcal =1000
power: watt =1; kilowatt =1000; megawatt =1000000
voltage: volt =1
resistance: ohm =1; kilohm kiloohm =1000; megohm megaohm =1000000
current: ampere amp =1
pressure: pascal =1
frequency: hertz =1
amount: mole =1
money: dollar usd buck =1; cent =1/100
angle: degree deg =1
radians: radian rad =1
angle/time: rpm =1
temperature: celsius =1
temperature f: fahrenheit =1
temperature k: kelvin =1
length/time: mph =1397/3125; kph kmh kmph =5/18
euros: euro =1
sterling: gbp =1
rupees: rupee rs =1
yen or yuan: yen yuan rmb =1
"""
_UNITS: dict[str, Unit] = {}
for _line in _TABLE.strip().splitlines():
    _dimension, _, _names = _line.partition(": ")
    for _entry in _names.split(";"):
        _words, _, _size = _entry.partition("=")
        _UNITS |= {word: Unit(_dimension, Fraction(_size)) for word in _words.split()}

# Symbols, which are case-sensitive.
_PREFIXES = {prefix: Fraction(10) ** power for prefix, power in zip("kMGmn", (3, 6, 9, -3, -9), strict=True)}
_PREFIXES[""] = Fraction(1)
_BASES = {"N": "newton", "J": "joule", "eV": "electronvolt", "W": "watt", "V": "volt", "A": "amp", "K": "kelvin"}
_BASES |= {"Pa": "pascal", "Hz": "hertz", "mol": "mole", "cal": "calorie", "ohm": "ohm"}
_SYMBOLS = {
    prefix + base: Unit(_UNITS[name].dimension, _UNITS[name].size * size)
    for base, name in _BASES.items()
    for prefix, size in _PREFIXES.items()
}
_SYMBOLS |= {prefix + base: Unit(_UNITS[base].dimension, _PREFIXES[prefix]) for prefix, base in ("nm", "ms", "ns")}

_MULTIPLIERS = {"dozen": 12, "hundred": 100} | GROUPS
CURRENCIES = {"money", "euros", "sterling", "rupees", "yen or yuan"}
"""The dimensions of money."""
_CURRENCY = {"$": "dollar", "€": "euro", "£": "gbp", "₹": "rupee", "¥": "yen"}
CURRENCY_SIGNS = "".join(_CURRENCY)
"""Currency signs."""
_SIGN_LAST = re.compile(rf"([-+]?)([\d,.\u200b]*\d)\s*([{CURRENCY_SIGNS}])")
_SIGN_FIRST = re.compile(rf"([-+]?)\s*([{CURRENCY_SIGNS}])\s*(.*)$", re.DOTALL)
# Words that change the number beside them, and so are not units.
_OTHER_WORDS = """
pi sin cos tan cot sec csc log ln exp sqrt mod modulo times over squared cubed factorial half halves third thirds
quarter quarters fourth fourths fifth fifths tenth tenths hundredths root roots plus minus or and out choose more less
greater fewer than most least between by divided power e i x y z ab xy not never no nor neither negative infinity
score pair pairs couple base radical theta alpha beta to versus vs ratio rem remainder either approximately dozen
hundred thousand million billion trillion excluding except without before after twice thrice double triple ago tens
hundreds thousands millions billions dozens false wrong incorrect bc bce almost nearly under over above below
exceed exceeds cannot can't isn't wasn't aren't doesn't don't
"""
OTHER_VALUE = frozenset(_OTHER_WORDS.split())
_SHORT_WORDS = "of in on a an the per cu sq men way ant cat dog pen cow hen pig car cup day egg toy box row leg"
_SHORT = frozenset(_SHORT_WORDS.split())
_WORD = r"[A-Za-z][A-Za-z'.\-]*(?:\s*\^\s*\{?[23]\}?)?"
_TAIL = re.compile(rf"(?P<gap>\s*)(?<![\\A-Za-z])(?P<unit>{_WORD}(?:(?:\s*/\s*|[^\S\n]+){_WORD})*)\.?$")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_LETTER_LAST = re.compile(rf"(?<=\d)\s*([{''.join(symbol for symbol in _SYMBOLS if len(symbol) == 1)}])$")
_OHM = re.compile(r"(?<=\d)(?:\\[,;:! ]|\s){0,4}(?:\\text\{ ?)?([kMGm]?) ?\}? ?\\Omega ?\}?$")
_DEGREES = re.compile(r"\^\\circ\s*(?:\\text\{\s*)?([CF]?)\}?$")


def split_unit(text: str) -> tuple[str, Unit | None]:
    """The text before the unit, and the unit (None if there is none or it counts things), of normalized text."""
    sign, currency, rest = _currency(text)
    if currency:
        return sign + _scaled(rest), _UNITS[currency]
    text = _OHM.sub(r"\\text{ \1ohm}", text)
    if match := _DEGREES.search(text):
        name = {"C": "celsius", "F": "fahrenheit", "": "degree"}[match[1]]
        return text[: match.start()].strip(), _UNITS[name]
    return _split_word_unit(text)


def mark_symbol(text: str, other: str) -> str:
    r"""`100 N` as `100\text{ N}`, if the other text has a unit of measure; without one the letter may be a variable."""
    return text if split_unit(other)[1] is None else _LETTER_LAST.sub(r"\\text{ \1}", text)


def _currency(text: str) -> tuple[str, str, str]:
    if match := _SIGN_LAST.fullmatch(text):
        return match[1], _CURRENCY[match[3]], match[2]
    match = _SIGN_FIRST.match(text)
    return (match[1], _CURRENCY[match[2]], match[3]) if match else ("", "", text)


def _scaled(amount: str) -> str:
    """`3 million` as a product; any other amount as it is."""
    number, _, word = _TEXT.sub(r" \1", amount).strip().rpartition(" ")
    size = _MULTIPLIERS.get(word.lower())
    return f"({number.strip()})\\cdot {size}" if size and number.strip() else amount


def _split_word_unit(text: str) -> tuple[str, Unit | None]:
    spelled = _TEXT.sub(lambda match: f"\x01{match[1]} ", text).rstrip()
    marked = "\x01" in spelled
    match = _TAIL.search(spelled.replace("\x01", " ") if marked else spelled)
    if match is None:
        return text, None
    phrase = match["unit"]
    core = spelled.replace("\x01", " ")[: match.start()].strip()
    if not re.search(r"[\d)}%!.]$|\\[a-zA-Z]+$", core):
        return text, None
    if not marked and not _may_be_unit(phrase, bool(match["gap"])):
        return text, None
    return _apply_multiplier(text, core, phrase)


def _may_be_unit(phrase: str, spaced: bool) -> bool:
    """Whether plain letters may be a unit rather than a product of variables."""
    words = re.split(r"[ /]+", phrase)
    if any(word in _SYMBOLS and (len(word) == 1 or (word.islower() and not spaced)) for word in words):
        return False  # a product of variables
    if not spaced:
        return len(words[0].rstrip("^{}23")) > 1 and unit_of(phrase) is not None
    # A power is not counted as letters: `3 x^{2}` is a product.
    return unit_of(phrase) is not None or all(len(word.rstrip("^{}23")) > 3 or word in _SHORT for word in words)


def _apply_multiplier(text: str, core: str, phrase: str) -> tuple[str, Unit | None]:
    words = phrase.split()
    size = _MULTIPLIERS.get(words[0].lower())
    if size is not None:
        scaled = f"({core})\\cdot {size}"
        return (scaled, None) if len(words) == 1 else _apply_multiplier(text, scaled, " ".join(words[1:]))
    if any(word.strip(".-'").lower() in OTHER_VALUE for word in re.split(r"[ /\-]+", phrase) if unit_of(word) is None):
        return text, None
    return core, unit_of(phrase)


def same_dimension(one: Unit, other: Unit) -> bool:
    """Whether both have the same dimension. Degrees may be of an angle or of either temperature scale."""
    dimensions = {one.dimension, other.dimension}
    return len(dimensions) == 1 or ("angle" in dimensions and any(d.startswith("temperature") for d in dimensions))


def unit_of(phrase: str) -> Unit | None:
    """The unit of measure that words name: `cm^2`, `square inches`, `miles per hour`, `km/h`; None for other words."""
    phrase = re.sub(r"[{}\s]+", " ", phrase.replace(".", "")).strip()
    above, per, below = re.sub(r"\s+per\s+", "/", phrase).partition("/")
    unit = _simple_unit(above)
    if not per or unit is None:
        return unit
    other = _simple_unit(below)
    return other and Unit(f"{unit.dimension}/{other.dimension}", unit.size / other.size)


def _simple_unit(phrase: str) -> Unit | None:
    power, words = 1, phrase.strip().split(" ")
    for names, exponent in ((("square", "sq"), 2), (("cubic", "cu"), 3)):
        if words[0].lower() in names and len(words) > 1:
            power, words = exponent, words[1:]
    match = re.fullmatch(r"([A-Za-z]+) ?(?:\^ ?([23]))?", " ".join(words))
    if match is None:
        return None
    unit = _look_up_unit(match[1])
    power = int(match[2] or power)
    return unit and (unit if power == 1 else Unit(f"{unit.dimension}^{power}", unit.size**power))


def _look_up_unit(word: str) -> Unit | None:
    if word in _SYMBOLS:
        return _SYMBOLS[word]
    if len(word) == 1:
        return _UNITS.get("l" if word == "L" else word)
    word = word.lower()
    return _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
