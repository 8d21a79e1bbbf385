"""JSON files that others may have written: read within limits, and checked before they are used.

A check is called with a value and its place in the file, and raises Damaged; a schema is a check
composed of others. Nothing here needs OneFlow.
"""

import gc
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from cnns.inputs import kind_of

MAX_BYTES = 32 << 20  # the worst JSON of that size takes 1 GB of memory
LARGEST = sys.float_info.max
INT64 = 1 << 63

Check = Callable[[Any, str], None]


class Damaged(ValueError):
    """A file is not what it should be, or holds impossible values."""


def check_regular(path: str | os.PathLike) -> None:
    """Raise Damaged where `path` is a FIFO or the like, which would block on opening.

    Raises OSError where there is nothing.
    """
    kind = kind_of(path)
    if kind != "a file":
        raise Damaged(f"it is {kind}, not a file")


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file. Raises OSError, or Damaged."""
    check_regular(path)
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise Damaged(f"it has more than {MAX_BYTES >> 20} MiB")
    try:
        return parse_json(data.decode())
    except UnicodeDecodeError:
        raise Damaged("it is not UTF-8 text") from None


def parse_json(text: str) -> Any:
    """JSON with finite numbers, integers of 64 bits and no key twice. Raises Damaged."""
    collecting = gc.isenabled()
    gc.disable()  # it would scan the growing result again and again for nothing
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise Damaged("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Damaged(f"it is not JSON: {error}") from None
    finally:
        if collecting:
            gc.enable()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Damaged(f"it has {brief(twice)} twice")
    return found


def _integer(text: str) -> int:
    # The length first: Python takes quadratic time for a long one.
    if len(text) > 20 or not -INT64 <= int(text) < INT64:
        raise Damaged(f"{brief(text)} is too large a number")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Damaged(f"{brief(text)} is too large a number")
    return value


def _refuse_constant(text: str) -> None:
    raise Damaged(f"{text} is not a number")


def brief(value: object) -> str:
    """A value from a file, fit for one line on a terminal."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Checks.


def refuse(value: object, where: str, needed: str) -> None:
    raise Damaged(f"{where} is {brief(value)}, and {needed} is needed")


def integer(low: int, high: int = INT64 - 1) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            upper = "" if high == INT64 - 1 else f" up to {high}"
            refuse(value, where, f"a whole number from {low}{upper}")

    return check


def real(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number from `low` to `high`."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:
            refuse(value, where, "a number")
        if not low <= value <= high:
            refuse(value, where, f"a number from {low:g} to {high:g}")

    return check


def string(value: Any, where: str) -> None:
    """A text that can be written as UTF-8."""
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        refuse(value, where, "a text")


def one_of(values: Collection[str]) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or value not in values:
            refuse(value, where, " or ".join(values))

    return check


def optional(check_value: Check) -> Check:
    """null, or what passes `check_value`."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            check_value(value, where)

    return check


def listed(check_item: Check, *, low: int = 0, high: int | None = None) -> Check:
    """A list of `low` to `high` items that each pass `check_item`."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            refuse(value, where, "a list")
        if len(value) < low or (high is not None and len(value) > high):
            count = f"{low}" if low == high else f"{low} or more" if high is None else f"{high}"
            refuse(value, where, f"a list of {count}")
        for i, item in enumerate(value):
            check_item(item, f"{where}[{i}]")

    return check


def record(
    needed: Mapping[str, Check],
    may: Mapping[str, Check] | None = None,
    *,
    others: Check | None = None,
) -> Check:
    """An object with the fields `needed`; with those of `may`; any other passes `others`, if given.

    `where` is put before the names of its fields where it is not empty.
    """
    known = {**needed, **(may or {})}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            refuse(value, where or "it", "an object")
        for name in needed:
            if name not in value:
                raise Damaged(f"{where or 'it'} has no {name}")
        for name, item in value.items():
            check_field = known.get(name, others)
            if check_field is None:
                raise Damaged(f"{where or 'it'} has {brief(name)}, which is unknown")
            field = brief(name)[1:-1]
            check_field(item, f"{where}.{field}" if where else field)

    return check


def anything(value: Any, where: str) -> None:
    """The check that passes everything."""
