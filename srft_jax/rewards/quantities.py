"""Numbers as people write them, read by strict patterns into exact fractions."""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 512  # characters of a number
MAX_EXPONENT = 400  # larger ones are not read: Fraction("1e999999999") computes all digits

# 12, 1,234.5, -0.5, .5, 3.; no zero denominator below.
_DECIMAL = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+\.?[0-9]*|\.[0-9]+)"
_PLAIN = re.compile(rf"[+-]?(?:[0-9]+/0*[1-9][0-9]*|{_DECIMAL})")

# 1.5e3, 1.5 \times 10^{3}
_POWER = r"[eE]([+-]?[0-9]+)|\s*(?:[*x×]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{?([+-]?[0-9]+)\}?"
# 3/4, \frac{3}{4}, \frac34
_RATIO = (
    r"([0-9]+)\s*/\s*(0*[1-9][0-9]*)"
    r"|\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*(0*[1-9][0-9]*)\s*\}|\\[dt]?frac\s*([0-9])([1-9])"
)
_NUMBER = re.compile(rf"([+-]|−)?\s*(?:\\?[$€£¥]\s*)?(?:{_RATIO}|({_DECIMAL})(?:{_POWER})?)")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9]{3}(?![0-9]))")  # 1{,}234, 1\,234
_PERCENT = re.compile(r"\s*(?:\\?%|percent\b)")
_NAME = re.compile(r"(?:[A-Za-z]\w*\s*)?(?:=|≈|\\approx)\s*|(?:about|approximately)\s+")
_UNIT_NOISE = re.compile(r"\\(?:text|mathrm|operatorname)\b|\\[,;! ]|[{}~\s]|\^\{?\\?circ\}?")
_UNIT = re.compile(r"[^\W\d]*(?:[²³°·%.]|/(?=[^\W\d])|\^-?[0-9]|[^\W\d])*")
_MAX_UNIT = 40


class Quantity(NamedTuple):
    """A number and the sign or unit behind it: "45 cm^2" is 45 with the unit "cm^2"."""

    value: Fraction
    percent: bool
    unit: str


def plain_number(text: str) -> Fraction | None:
    """Read a decimal or a ratio of whole numbers; None for any other text, exponents included.

    In: "1,234.50".  Out: Fraction(2469, 2).
    """
    if len(text) > MAX_DIGITS or not _PLAIN.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def quantity(text: str) -> Quantity | None:
    """Read the whole text as a number, perhaps with a percent sign or a unit.

    In: "x = 1.2 \\times 10^{3} \\text{ cm}".  Out: Quantity(1200, False, "cm").
    """
    text = _THOUSANDS.sub(",", text.strip())
    if name := _NAME.match(text):
        text = text[name.end() :]
    number = _NUMBER.match(text)
    value = _value(number) if number else None
    if number is None or value is None:
        return None
    percent = _PERCENT.match(text, number.end())
    rest = text[percent.end() if percent else number.end() :]
    unit = _UNIT_NOISE.sub("", rest).rstrip(".").lower()
    if len(unit) > _MAX_UNIT or not _UNIT.fullmatch(unit):
        return None
    return Quantity(value, percent is not None, unit)


def last_quantity(text: str) -> Quantity | None:
    """Read the last number in prose, without its unit.  In: "so 3 of 12 are left".  Out: 12."""
    last = None
    for number in _NUMBER.finditer(_THOUSANDS.sub(",", text[-MAX_DIGITS:])):
        last = number
    value = _value(last) if last else None
    if last is None or value is None:
        return None
    return Quantity(value, _PERCENT.match(last.string, last.end()) is not None, "")


def _value(number: re.Match[str]) -> Fraction | None:
    """The value of a match of `_NUMBER`; None if its exponent is too large."""
    sign, *ratios, decimal, exponent, power = number.groups()
    if decimal is None:
        over, under = (int(digits) for digits in ratios if digits is not None)
        value = Fraction(over, under)
    else:
        scale = exponent or power or "0"
        if len(scale) > 5 or abs(int(scale)) > MAX_EXPONENT:
            return None
        value = Fraction(decimal.replace(",", "")) * Fraction(10) ** int(scale)
    return -value if sign and sign != "+" else value
