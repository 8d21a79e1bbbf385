"""The rooms of docs/architecture.md: who may import whom, and how large a room may be."""

import ast

import pytest

from small import ROOT

PACKAGE = sorted((ROOT / "cnns").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_imports_nothing_of_the_root(path):
    root = {script.stem for script in SCRIPTS} | {"tools", "tests"}
    assert not {name.split(".")[0] for name in imported(path)} & root


@pytest.mark.parametrize("name", ["errors", "flags.parser", "places", "data.format", "data.crops"])
def test_what_needs_no_oneflow_imports_none(name):
    """Nor does what these import of the package."""
    seen, waiting = set(), {f"cnns.{name}"}
    while waiting:
        module = waiting.pop()
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if module in seen or not path.exists():
            continue
        seen.add(module)
        found = imported(path)
        assert not any(each.split(".")[0] == "oneflow" for each in found), module
        waiting |= {each for each in found if each.startswith("cnns")}


@pytest.mark.parametrize("path", SCRIPTS + PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_says_what_it_is_for_and_is_not_too_large(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)) or not text
    assert text.count("\n") <= 500
