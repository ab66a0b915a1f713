"""Readers of single values: what YAML, JSON or an environment variable held, made typed.

A reader takes any object and returns the value, or raises ``ValueError`` whose text
completes the sentence "<key>: <value> ..." and ends in the way out. ``None`` (a key written
without a value) is refused by every reader that is not wrapped in ``optional``.

Sizes follow LMCache, which multiplies by 1024**3 although its documentation says GB: a bare
number, quoted or not, is GiB. With a unit the unit counts: Ki Mi Gi Ti (and KiB ...) are
powers of 1024, K M G T (and KB ...) powers of 1000, B is bytes. So "1e9" is 10**9 GiB, which
is refused as larger than 1 PiB.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

Reader = Callable[[object], Any]

GIB = 1024**3
PIB = 1024**5
MASK = "***"  # stands for a secret

_SIZE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,3})?\s*([a-z]*)", re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})(e[+-]?[0-9]{1,3})?|[+-]?inf", re.IGNORECASE)
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_UNITS = {"": GIB, "b": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}


def plain(value: object) -> object:
    """Strip blanks and one pair of quotes within a string: LMCache un-quotes ``"'redis://...'"``."""
    if value is None:
        raise ValueError("has no value: give it one, or remove it to get the default")
    if not isinstance(value, str):
        return value
    value = value.strip()
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1].strip()
    return value


def boolean(value: object) -> bool:
    """true/false, yes/no, on/off, 1/0, in any case, quoted or not."""
    value = plain(value)
    word = str(value).lower() if isinstance(value, bool | int | str) else ""
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError("is not a yes or a no: write true or false")


def whole(low: int = 0, high: int = 2**62) -> Reader:
    """An integer in ``[low, high]``; 256.0 is one, 256.5 and true are not."""

    def read(value: object) -> int:
        value = plain(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str) and _WHOLE.fullmatch(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("is not a whole number: write one such as " + str(max(low, 1)))
        if not low <= value <= high:
            raise ValueError(f"is out of range: write a whole number {_range(low, high)}")
        return value

    return read


def _range(low: float, high: float) -> str:
    return f"of at least {low}" if high >= 2**62 else f"from {low} to {high}"


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False) -> Reader:
    """A number in ``[low, high]``, in ``(low, high]`` if ``above``; never NaN."""

    def read(value: object) -> float:
        value = plain(value)
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ValueError("is not a number: write one such as 10")
        if not (low < value <= high if above else low <= value <= high):
            raise ValueError(f"is out of range: write a number {'above ' + str(low) if above else _range(low, high)}")
        return float(value)

    return read


def seconds(value: object) -> float:
    """A positive, finite duration in seconds."""
    value_s: float = number(0.0, 1e9, above=True)(value)
    return value_s


def size_bytes(value: object) -> int:
    """A size in bytes; see the module's docstring for units. Zero is for the caller to judge."""
    value = plain(value)
    found = None
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        found = _SIZE.fullmatch(str(value).removeprefix("+"))
    unit = _UNITS.get(found[3].lower()) if found and found[3] != "m" else None
    if found is None or unit is None:
        raise ValueError('is not a size: write 2.0 (GiB) or a unit, such as "20Gi", "500Mi" or "20GB"')
    size = float(found[1] + (found[2] or "")) * unit
    if not size <= PIB:
        raise ValueError('is more than 1 PiB; a number without a unit is GiB: write "20Gi" or 20 for 20 GiB')
    return int(size)


def in_gib(size: int) -> str:
    """A size as messages show it."""
    return f"{size / GIB:.6g} GiB"


def text(value: object) -> str:
    """A string that is not empty. A bare number is refused: YAML would have rewritten it."""
    value = plain(value)
    if not isinstance(value, str):
        raise ValueError("is not text: put it in quotes")
    if not value or not value.isprintable():
        raise ValueError("is empty or has unprintable characters: write a name, or remove it to get the default")
    return value


def blank_text(value: object) -> str:
    """A string kept as it is, blanks included (LMCache's separator is ``" # # "``)."""
    if not isinstance(value, str):
        raise ValueError("is not text: put it in quotes")
    return value


def one_of(*names: str) -> Reader:
    """One of ``names``, in any case; returned as written here."""

    def read(value: object) -> str:
        word = plain(value)
        for name in names:
            if isinstance(word, str) and word.lower() == name.lower():
                return name
        raise ValueError(f"is not known: write one of {', '.join(names)}")

    return read


def either(*readers: Reader) -> Reader:
    """What the first reader that accepts it makes of it; the last one words the refusal."""

    def read(value: object) -> Any:  # noqa: ANN401
        for reader in readers[:-1]:
            try:
                return reader(value)
            except ValueError:
                continue
        return readers[-1](value)

    return read


def list_of(reader: Reader) -> Reader:
    """A tuple from a list, from ``"a, b"``, from ``"[a, b]"`` or from one value."""

    def read(value: object) -> tuple[object, ...]:
        value = plain(value)
        if isinstance(value, str):
            inner = value[1:-1] if value[:1] + value[-1:] == "[]" else value
            value = [item for item in inner.split(",") if item.strip()]
        items = value if isinstance(value, list | tuple) else [value]
        if not items:
            raise ValueError("is an empty list: give it one element, or remove it to get the default")
        return tuple(reader(item) for item in items)

    return read


def optional(reader: Reader) -> Reader:
    """``None`` for a key without a value, ``null`` or ``"None"``: LMCache's own default of such keys."""

    def read(value: object) -> Any:  # noqa: ANN401
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null")):
            return None
        return reader(value)

    return read


def table(value: object) -> dict[str, object]:
    """A mapping with string keys, or a string that holds one as JSON."""
    value = plain(value)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError('is not a mapping: write "key: value" lines below it, or JSON such as {"key": "value"}')
    return value


def anything(value: object) -> object:
    """Whatever was written."""
    return value


port = whole(1, 65535)
ports = list_of(port)
