"""Write the tables of docs/flags.md, the page of all flags, from the parsers of the scripts.

python3 tools/write_flags.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.startup  # noqa: F401  (before oneflow, see there)

import config
from cnns.flags.parser import Flag, FlagParser, Parser

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"


def make_parsers() -> dict[str, FlagParser]:
    """The parser of each script, by the word for it in the tables."""
    return {script: config.make_parser(script) for script in config.SCRIPTS}


def describe(name: str, flag: Flag) -> tuple[str, str, str]:
    """The cells flag, default and text of one flag."""
    name = f"`--{name}`"
    if flag.aliases:
        name += f" (also {', '.join(f'`{alias}`' for alias in flag.aliases)})"
    text = flag.whole_text
    if flag.choices:
        text += "; one of " + ", ".join(f"`{choice}`" for choice in sorted(flag.choices))
    default = flag.unless_given
    if default and not (flag.otherwise or flag.is_switch):
        default = f"`{default}`"
    return name, escape(default), escape(text)


def escape(text: str) -> str:
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):  # Markdown's own
        text = text.replace(character, escaped)
    return text


def collect(parsers: dict[str, FlagParser]) -> dict[str, dict[tuple[str, str, str], list[str]]]:
    """For each title of a group, its rows and the scripts that have each, in the parsers' order."""
    groups: dict = {}
    for script, parser in parsers.items():
        for title, flags in parser.groups.items():
            for name, flag in flags.items():
                groups.setdefault(title, {}).setdefault(describe(name, flag), []).append(script)
    return groups


def make_page(page: str, parsers: dict) -> str:
    """The page with its own introduction, up to the first group of flags, and new tables."""
    lines = [page.partition("\n## ")[0]]
    for title, rows in collect(parsers).items():
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| flag | unless given | scripts | what |", "|---|---|---|---|"]
        # Rows of one flag stand together, whichever script they come from.
        flags = list(dict.fromkeys(flag for flag, _, _ in rows))
        for row in sorted(rows, key=lambda row: flags.index(row[0])):
            flag, default, text = row
            lines.append(f"| {flag} | {default} | {', '.join(rows[row])} | {text} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    Parser("Write the tables of docs/flags.md.", doc=__doc__).parse_args(argv)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(make_page(page, make_parsers()), encoding="utf-8")


if __name__ == "__main__":
    main()
