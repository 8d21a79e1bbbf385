"""Types of flags' values: each takes a text and returns a value, or raises ArgumentTypeError.

Nothing needs OneFlow.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

MAX_INTEGER = 2**31 - 1  # so that steps, epochs times steps, fit in the 64 bits that OneFlow has

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def boolean(text: str) -> bool:
    try:
        return BOOLEANS[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False") from None


def number(
    kind: type, low: float, high: float = math.inf, *, above: bool = False
) -> Callable[[str], Any]:
    """The type of an int or float of at least `low` (more, if `above`) up to `high`.

    An int has 31 bits unless `high` allows more.
    """
    if kind is int and high == math.inf:
        high = MAX_INTEGER

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} must be finite")
        if not (low < value if above else low <= value) or not value <= high:
            upper = "" if high == math.inf else f" and at most {high:g}"
            lower = f"{'above' if above else 'at least'} {low:g}"
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise argparse.ArgumentTypeError(f"{shown} must be {lower}{upper}")
        return value

    return parse


def numbers(count: int | None, *, low: float = -math.inf) -> Callable[[str], tuple[float, ...]]:
    """The type of a comma-separated list of `count` numbers (any count if None)."""

    parse_one = number(float, low)

    def parse(text: str) -> tuple[float, ...]:
        values = tuple(parse_one(part.strip()) for part in text.split(","))
        if count is not None and len(values) != count:
            raise argparse.ArgumentTypeError(f"{text!r} must be {count} numbers joined by commas")
        return values

    return parse


def interval(low: float, high: float = math.inf) -> Callable[[str], tuple[float, float]]:
    """The type of `a,b` with low < a <= b <= high."""

    def parse(text: str) -> tuple[float, float]:
        a, b = numbers(2)(text)
        if not low < a <= b <= high:
            bound = "" if high == math.inf else f" <= {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a,b with {low:g} < a <= b{bound}")
        return a, b

    return parse


def path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a path is needed, and it is empty")
    return text


def onnx_path(text: str) -> str:
    if not text.endswith(".onnx"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .onnx")
    return text


COUNT, PIXELS = number(int, 1), number(int, 1, 2**32)


def rgb_std(text: str) -> tuple[float, ...]:
    values = numbers(3)(text)
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 in each channel")
    return values


def addresses(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def names(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} must be names joined by commas")
    return found


def count_or_all(text: str) -> int:
    return 0 if text == "all" else number(int, 0)(text)


def optimizer_name(text: str) -> str:
    """The 2020 page says --model_update=momentum for what is now --optimizer=sgd, and PyTorch AdamW
    for what is adam here."""
    return {"momentum": "sgd", "adamw": "adam"}.get(text.lower(), text.lower())
