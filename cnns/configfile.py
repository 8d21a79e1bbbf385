"""The file of --config: the flags.yaml of a run, YAML of one's own, or a snapshot.

Nothing here needs OneFlow.
"""

import argparse
import difflib
import os
from collections.abc import Mapping
from typing import Any

from cnns.errors import UsageError
from cnns.flags.parser import Flag
from cnns.jsonfile import Damaged, brief, read_json
from cnns.record import FLAGS
from cnns.yamlfile import read_yaml

SNAPSHOT = "snapshot.json"


def read_config(path: str, flags: Mapping[str, Flag]) -> dict[str, object]:
    """The flags that a file sets, as the command line would have parsed them.

    Args:
        path: a YAML file, a snapshot.json, or the directory of a run or of a snapshot.
        flags: the ones there are.

    Raises UsageError where it cannot be read, names an unknown flag, or gives a value that a flag
    does not take.
    """
    file = config_file(path)
    where = f"--config={path}"
    try:
        is_snapshot = os.path.basename(file) == SNAPSHOT
        content = read_json(file) if is_snapshot else read_yaml(file)
        if isinstance(content, dict) and isinstance(content.get("flags"), dict):
            content = content["flags"]
        if not isinstance(content, dict):
            raise Damaged("it has no lines `flag: value`")
    except (OSError, Damaged) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{where}: {file} cannot be read ({reason})") from None
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_").lstrip("_")
        flag = flags.get(name)
        if flag is None:
            near = difflib.get_close_matches(name, flags, 1)
            hint = f"; did you mean {near[0]}?" if near else " (--help lists the flags)"
            raise UsageError(f"{where}: {brief(key)} is not a flag{hint}")
        # Where a snapshot's run began is not what this one is.
        if value is None or is_snapshot and flag.of != "run":
            continue
        try:
            values[name] = parse_value(flag, value)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{where}: {name}: {error}") from None
    return values


def config_file(path: str) -> str:
    """The file meant: of a directory its flags.yaml, else its snapshot.json."""
    if not os.path.isdir(path):
        return path
    names = [name for name in (FLAGS, SNAPSHOT) if os.path.exists(os.path.join(path, name))]
    return os.path.join(path, names[0] if names else FLAGS)


def parse_value(flag: Flag, value: Any) -> object:
    """A value of a file as the command line would have given it. Raises ArgumentTypeError."""
    if isinstance(value, dict) or isinstance(value, list) and not all(map(is_scalar, value)):
        raise argparse.ArgumentTypeError(f"{brief(value)} is not a value of a flag")
    if flag.is_switch != isinstance(value, bool):
        needed = "True or False" if flag.is_switch else "a value"
        raise argparse.ArgumentTypeError(f"it is {brief(value)}, and {needed} is needed")
    if flag.is_switch:
        return value
    if flag.many:
        return [flag.parse(str(each)) for each in (value if isinstance(value, list) else [value])]
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if flag.choices and text not in flag.choices:
        near = difflib.get_close_matches(text, flag.choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise argparse.ArgumentTypeError(
            f"it is {brief(text)}, and must be one of {', '.join(sorted(flag.choices))}{hint}"
        )
    return flag.parse(text)


def is_scalar(value: Any) -> bool:
    return not isinstance(value, list | dict)
