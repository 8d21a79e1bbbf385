"""Pages of one file: tables, pictures and text, with names that may hold anything."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cnns.errors import printable
from cnns.flags.parser import show


def text(value: str) -> str:
    return html.escape(printable(value))


def cell(value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return text(show(value))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["".join(f"<th>{text(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{cell(value)}</td>" for value in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>{body}</table></div>'


def picture(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{text(title)}" src="data:image/png;base64,{data}">'


def pictures(images: Iterable[str]) -> str:
    """What `picture` gave, side by side where there is room."""
    return "\n".join(['<div class="pictures">', *images, "</div>"])


def page(title: str, parts: Iterable[str]) -> str:
    return PAGE.format(title=text(title), body="\n".join(parts))


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; }}
body {{ margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin-top: 2rem; overflow-wrap: anywhere; }}
.pictures {{ display: grid; gap: 1rem; margin-top: 1rem; }}
.pictures {{ grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); }}
img {{ max-width: 100%; height: auto; }}
.pictures img {{ width: 100%; }}
.wide {{ overflow-x: auto; }}
.wide img {{ max-width: none; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
table {{ margin-top: 0.5rem; }}
th, td {{ border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; }}
th, td {{ text-align: left; white-space: nowrap; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
