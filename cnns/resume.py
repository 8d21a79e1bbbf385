"""What a resumed run takes from its snapshot, and what must not differ from it."""

import os
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from typing import Any

from cnns.checkpoint.snapshot import DESCRIPTION, Snapshot
from cnns.checkpoint.weights import Checkpoint
from cnns.errors import RunError, UsageError
from cnns.flags.parser import Flag, FlagParser
from cnns.jsonfile import brief

# What flags were in snapshots of earlier versions that say null.
EARLIER = {"keep_snapshots": 0}
MAX_NAMES = 10  # of flags, in one line


def as_now(flags: Mapping[str, object]) -> dict[str, object]:
    """The flags in a snapshot, which an earlier version may have written, as this one has them."""
    return {k: EARLIER.get(k) if v is None else v for k, v in flags.items()}


def from_json(value: object) -> object:
    """A flag's value as it was before it went into a snapshot."""
    return tuple(value) if isinstance(value, list) else value


def check_flags(snapshot: Snapshot, path: str, *, parser: FlagParser) -> None:
    """Raise RunError where a flag in the snapshot `path` has a value that it does not take."""
    for name, value in as_now(snapshot.flags).items():
        if name in parser.flags and not takes(parser.flags[name], value):
            raise RunError(
                f"{os.path.join(path, DESCRIPTION)} is damaged: --{name} is {brief(value)}, which "
                "it does not take; use another snapshot"
            )


def takes(flag: Flag, value: object) -> bool:
    """Whether a flag can have a value, as a snapshot holds it."""
    if value is None:
        return flag.default is None or flag.needs is not None
    if flag.is_switch or isinstance(value, bool):
        return flag.is_switch and isinstance(value, bool)
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        # As the command line gives it: ranges stand in the flag's own type.
        parsed = flag.parse(text)
    except ArgumentTypeError:
        return False
    return parsed == from_json(value) and (not flag.choices or text in flag.choices)


def unknown_flags(flags: Mapping[str, object], parser: FlagParser, *, path: str) -> list[str]:
    """A notice of the flags in the snapshot `path` that this version does not have."""
    unknown = [f"--{brief(name)[1:-1]}" for name in sorted(flags) if name not in parser.flags]
    if not unknown:
        return []
    more = f" and {len(unknown) - MAX_NAMES} more" if len(unknown) > MAX_NAMES else ""
    return [f"{path} has flags that are unknown here: {', '.join(unknown[:MAX_NAMES])}{more}."]


def inherited_flags(
    snapshot: Snapshot, parser: FlagParser, *, given: Namespace, device: str
) -> dict[str, object]:
    """Of the flags in a snapshot, those that a resumed run inherits; on a CPU none of CUDA's.

    The global batch is inherited unless the batch of a device is given: `compare_runs` then says
    what it should be.
    """
    flags = as_now(snapshot.flags) | {"global_batch_size": snapshot.global_batch_size}
    if "batch_size_per_device" in given:
        del flags["global_batch_size"]
    known = {name: parser.flags[name] for name in flags if name in parser.flags}
    return {
        name: from_json(flags[name])
        for name, flag in known.items()
        if flag.of == "run" and not (flag.cuda and device == "cpu")
    }


def first_start(snapshot: Snapshot) -> dict[str, object]:
    """Flags of a run that are over where it is resumed, and that its record keeps."""
    names = ("model_load_dir", "finetune")
    return {name: snapshot.flags[name] for name in names if name in snapshot.flags}


def kind_of_data(path: object) -> str:
    """The kind of data that --train_data_dir names."""
    if path is None:
        return "synthetic data"
    return "arrays" if str(path).endswith(".npz") else "OFRecord parts"


def compare_flags(
    args: Namespace, flags: Mapping[str, object], parser: FlagParser, *, path: str
) -> list[str]:
    """Refuse flags that contradict the run that left `flags` in the snapshot `path`.

    Returns a notice for each other flag that differs, since it holds from here on. Raises
    UsageError.
    """
    now, was = map(kind_of_data, (args.train_data_dir, flags.get("train_data_dir")))
    if now != was:
        raise UsageError(
            f"--train_data_dir: {path} is of a run on {was}, and this would be {now}; start a new "
            f"run from the weights with --model_load_dir={path}"
        )
    flags = as_now(flags)
    notices = unknown_flags(flags, parser, path=path)
    for name, flag in parser.flags.items():
        if flag.of != "run" or not (name in flags or flag.fixed):
            continue
        # A fixed flag that a snapshot does not know came later, and had its default before.
        value, before = getattr(args, name), from_json(flags.get(name, flag.default))
        if value == before:
            continue
        if flag.fixed:
            raise UsageError(
                f"--{name}={value}, but {path} is of a run with {before}; leave it out, or start a "
                f"new run from the weights with --model_load_dir={path}"
            )
        came_with_choice = before is None and value == flag.default
        if value is not None and not came_with_choice:  # None: it belonged to another schedule
            notices.append(
                f"--{name}={value} from here on; it was {'not set' if before is None else before}."
            )
    return notices


def num_processes(flags: Mapping[str, Any]) -> int:
    """One for each device of the job."""
    return flags.get("num_nodes", 1) * flags.get("gpu_num_per_node", 1)


def num_parts(flags: Mapping[str, Any]) -> int:
    """Into which the batch of a step is divided: --batch_size_per_device is the size of one."""
    return num_processes(flags) * flags.get("accumulate_steps", 1)


def compare_runs(now: Snapshot, was: Snapshot, *, path: str) -> list[str]:
    """Refuse a run, described by what its snapshots will hold, that cannot resume `path`.

    Returns notices for the user. Raises UsageError.
    """
    flags, ranks, ranks_before = now.flags, num_processes(now.flags), num_processes(was.flags)
    if was.global_batch_size is None:
        raise UsageError(
            f"--resume={path}: it holds only weights, not a run; start one from them with "
            f"--model_load_dir={path}"
        )
    if was.global_batch_size != now.global_batch_size:
        raise UsageError(
            f"--batch_size_per_device={flags['batch_size_per_device']} makes batches of "
            f"{now.global_batch_size} images, but {path} is of a run with batches of "
            f"{was.global_batch_size}; leave the size of batches out"
        )
    if was.steps_per_epoch != now.steps_per_epoch:
        raise UsageError(
            f"--num_examples: an epoch has {now.steps_per_epoch} iterations, but {path} is "
            f"of a run with {was.steps_per_epoch}; the training data are not the same"
        )
    if was.train_data != now.train_data:
        examples, before = (
            (data or {}).get("examples") for data in (now.train_data, was.train_data)
        )
        raise UsageError(
            f"--train_data_dir={flags['train_data_dir']} is not what {path} was trained on: it has "
            f"{examples} images, and there were {before}, or the parts differ"
        )
    for field, value in vars(now.preprocessing).items():
        other = getattr(was.preprocessing, field)
        if value != other:
            raise UsageError(
                f"--{field}={value}, but {path} is of a run with {other}; leave it out"
            )
    notices = []
    if ranks_before != ranks:
        native = kind_of_data(flags["train_data_dir"]) == "OFRecord parts" and (
            flags["data_order"] == "native"
        )
        rest = "in another order" if native else "in the same batches"
        notices.append(
            f"The run had {ranks_before} processes; the rest of it takes its data {rest}."
        )
    if flags["gpu_image_decoder"]:
        notices.append(
            "--gpu_image_decoder: reading starts at the beginning of the parts, in a new order; "
            "only runs without this flag resume as if they had never stopped."
        )
    num_epochs = flags["num_epochs"]
    if was.current_epoch >= num_epochs:
        notices.append(f"{path} has finished all {num_epochs} epochs; raise --num_epochs for more.")
    return notices


def check_records(
    digest: str | None, said: str | None, *, about: Snapshot, resumed: Checkpoint
) -> None:
    """Raise RunError where the records that a run has used, which follow from seed, epoch and
    iteration, are not those that its snapshot says; None: one of an earlier version."""
    if said not in (None, digest):
        raise RunError(
            f"{resumed.path} is of a run that has used its records in another order than is made "
            f"here (numpy {resumed.snapshot.versions.get('numpy')} then, {about.versions['numpy']} "
            f"now); start a new run from the weights with --model_load_dir={resumed.path}"
        )
