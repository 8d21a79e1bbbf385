"""Several functions timed by turns, so that a busy machine slows all of them."""

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable

SIZES = ("model", "image_size", "batch_size_per_device", "steps", "rounds")


def asked(args: Namespace, *names: str) -> dict:
    """The flags that a figure depends on."""
    return {name: getattr(args, name) for name in names}


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def by_turns(
    rounds: int, *functions: Callable[[], object], before: Callable[[], object] = lambda: None
) -> tuple[list[float], float]:
    """The median seconds of each function, and the median of first to second.

    The ratio compares runs next to each other in time, so that a busy machine slows both.
    """
    seconds: list[list[float]] = []
    for _ in range(rounds):
        seconds.append([])
        for function in functions:
            before()
            seconds[-1].append(timed(function))
    medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
    return medians, statistics.median(first / second for first, second, *_ in seconds)


def compare(
    rounds: int, kinds: dict[str, dict[str, Callable[[], float]]], images: int
) -> dict[str, dict]:
    """images/s of each of `kinds`: {what: {who: seconds of one round of so many images}}.

    Everybody takes a turn in each round, so that a busy machine slows all. "ours_to" has the
    median, over the rounds, of ours against each of the others.
    """
    report: dict[str, dict] = {}
    for what, sides in kinds.items():
        for measure in sides.values():
            measure()  # compiles, and warms up
        seconds = [{who: measure() for who, measure in sides.items()} for _ in range(rounds)]
        report[what] = {
            "images_per_second": {
                who: round(images / statistics.median(each[who] for each in seconds), 2)
                for who in sides
            },
            "ours_to": {
                who: round(statistics.median(each[who] / each["ours"] for each in seconds), 3)
                for who in sides
                if who != "ours"
            },
        }
    return report


def print_table(report: dict[str, dict]) -> None:
    """The figures of `compare` for reading, on stderr: stdout has the JSON."""
    for what, found in report.items():
        for who, rate in found["images_per_second"].items():
            ratio = found["ours_to"].get(who)
            against = "" if ratio is None else f"   ours is {ratio:.2f} of it"
            print(f"{what:12} {who:26} {rate:9.2f} images/s{against}", file=sys.stderr)
