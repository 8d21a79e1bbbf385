"""YAML files that others may have written: small, not deep, no key twice, no code.

Nothing here needs OneFlow.
"""

from typing import Any

import yaml

from cnns.inputs import open_input
from cnns.jsonfile import Damaged, brief

MAX_BYTES = 1 << 20
MAX_DEPTH = 8


def read_yaml(path: str) -> Any:
    """The content of a YAML file. Raises OSError or Damaged."""
    with open_input(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise Damaged(f"it has more than {MAX_BYTES >> 20} MiB")
    try:
        text = data.decode()
        check_depth(text)
        check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise Damaged(f"it is not YAML: {brief(reason)}") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Damaged(f"it is not YAML of flags: {brief(str(error))}") from None


def check_depth(text: str) -> None:
    """Raise Damaged where lists and mappings lie in one another deeper than flags need.

    PyYAML's time grows with the square of that depth.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise Damaged("it is nested too deeply")


def check_keys(node: yaml.Node | None) -> None:
    """Raise Damaged where a mapping has a key twice, of which YAML would take the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    for key in keys:
        if keys.count(key) > 1:
            raise Damaged(f"{brief(key)} stands in it twice")
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value == "flags":
            check_keys(value)
