"""YAML files that others may have written: small, not deep, no key twice, no alias, no code.

Nothing here needs OneFlow.
"""

from typing import Any

import yaml

from cnns.inputs import open_input
from cnns.jsonfile import Damaged, brief

MAX_BYTES = 1 << 16  # that PyYAML takes some 3 s for; a run's flags.yaml has 4 kB
MAX_DEPTH = 8


def read_yaml(path: str) -> Any:
    """The content of a YAML file. Raises OSError or Damaged."""
    with open_input(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise Damaged(f"it has more than {MAX_BYTES >> 10} KiB")
    try:
        text = data.decode()
        check_structure(text)
        check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise Damaged(f"it is not YAML: {brief(reason)}") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Damaged(f"it is not YAML: {brief(str(error))}") from None


def check_structure(text: str) -> None:
    """Raise Damaged where lists and mappings lie in one another deeper than flags need, or stand in
    several places by an alias.

    PyYAML's time grows with the square of that depth, and what is printed of a value with the
    product of its aliases.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise Damaged("it is nested too deeply")
        if isinstance(event, yaml.AliasEvent):
            raise Damaged(f"it has an alias, {brief('*' + event.anchor)}; write the value out")


def check_keys(node: yaml.Node | None) -> None:
    """Raise Damaged where a mapping has a key twice, of which YAML would take the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in seen:
            raise Damaged(f"{brief(key.value)} stands in it twice")
        seen.add(key.value)
        if key.value == "flags":
            check_keys(value)
