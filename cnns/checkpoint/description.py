"""What snapshot.json may hold: types, ranges, and how its numbers depend on one another."""

import re
from typing import Any

from cnns.data.format import MAX_CLASSES
from cnns.data.images import PREPROCESSING
from cnns.jsonfile import Damaged, integer, listed, optional, real, record, refuse, string

MAX_NUMBER = 1 << 53  # of steps and the like


def flag(value: Any, where: str) -> None:
    """A flag's value; cnns.resume knows which values each flag takes."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | int | float | None):  # a bool is an int
            refuse(item, where, "a text, a number, true, false or null")


def digest(value: Any, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        refuse(value, where, "a SHA-256 in hexadecimal")


NUMBER = integer(0, MAX_NUMBER)
COUNT = integer(1, MAX_NUMBER)
CHECKSUM = integer(0, (1 << 32) - 1)
ACCURACIES = {"val_top_1": real(0, 1), "val_top_k": real(0, 1), "num_val_examples": COUNT}
UNPRINTED = record(
    {"steps": COUNT, "loss": real(), "top_1": NUMBER, "top_k": NUMBER, "seconds": real(1e-9)}
)
SCHEMA = record(
    {
        "format_version": integer(1),
        "model": string,
        "num_classes": integer(1, MAX_CLASSES),
        "preprocessing": PREPROCESSING,
    },
    {
        "classes": optional(listed(string, high=MAX_CLASSES)),
        "epoch": optional(integer(-1, MAX_NUMBER)),
        "iteration": NUMBER,
        "step": NUMBER,
        "steps_per_epoch": optional(COUNT),
        "global_batch_size": optional(COUNT),
        "train_data": optional(
            record({"examples": COUNT}, {"classes": optional(NUMBER), "checksum": CHECKSUM})
        ),
        "metrics": record({}, ACCURACIES, others=real()),
        "best": record({}, {"epoch": NUMBER, **ACCURACIES}, others=real()),
        "records_digest": optional(digest),
        "unprinted": optional(UNPRINTED),
        "flags": record({}, others=flag),
        "versions": record({}, others=string),
        "checksums": record({}, others=CHECKSUM),
    },
)


def check_description(content: Any) -> None:
    """Raise Damaged where `content` cannot be that of a snapshot.json."""
    SCHEMA(content, "")
    epoch, best = content.get("epoch"), content.get("best", {}).get("epoch")
    finished = 0 if epoch is None else epoch + 1
    iteration, step = content.get("iteration", 0), content.get("step", 0)
    steps_per_epoch = content.get("steps_per_epoch")
    if (steps_per_epoch is None) != (content.get("global_batch_size") is None):
        raise Damaged("it has one of steps_per_epoch and global_batch_size without the other")
    if iteration > (steps_per_epoch or 0):
        raise Damaged(f"iteration is {iteration}, and an epoch has {steps_per_epoch}")
    if steps_per_epoch is not None and step != finished * steps_per_epoch + iteration:
        raise Damaged(
            f"step is {step}, but {finished} epochs of {steps_per_epoch} iterations and "
            f"{iteration} make {finished * steps_per_epoch + iteration}"
        )
    if unprinted := content.get("unprinted"):
        steps = unprinted["steps"]
        images = steps * (content.get("global_batch_size") or 0)
        if steps > iteration or not unprinted["top_1"] <= unprinted["top_k"] <= images:
            raise Damaged(f"unprinted has more than the {iteration} iterations of the epoch")
    if best is not None and best >= finished:
        raise Damaged(f"the best epoch is {best}, and {finished} are finished")
