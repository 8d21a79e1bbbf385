"""Plots as PNG files: the style and fonts of all of them, and those of an evaluation."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed
from matplotlib import font_manager, pyplot

from cnns.errors import printable
from cnns.report.metrics import Calibration, bin_edges, divide

__all__ = ["draw_confusion", "draw_reliability", "installed_fonts", "plot_style", "pyplot"]

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "figure.figsize": (6.4, 4.0),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.3,
    "text.parse_math": False,  # names may hold dollar signs
}
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "SimHei",
)
MAX_NAME = 18  # characters of a class's name beside a matrix
MAX_NUMBERED = 15  # classes of a matrix whose cells hold their numbers


def installed_fonts() -> list[str]:
    """DejaVu Sans, which comes with matplotlib, and what draws Chinese here, if anything."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in installed)]


@contextmanager
def plot_style() -> Iterator[None]:
    with warnings.catch_warnings():
        # A name in letters that no font has is drawn as boxes, and stands in the page as it is.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        with matplotlib.rc_context(STYLE | {"font.family": installed_fonts()}):
            yield


def shorten(name: str, number: int) -> str:
    """A class beside a matrix: its number too, as its name may not be drawn."""
    name = printable(name)
    short = name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
    return f"{short} {number}"


def draw_confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """A matrix (C, C) with the share of each label's examples as colour."""
    shares = divide(matrix.T, matrix.sum(axis=1)).T
    side = min(4 + 0.2 * len(names), 12)
    figure, axes = pyplot.subplots(figsize=(side + 0.6, side))
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [shorten(name, number) for number, name in enumerate(names)]
    size = 9 if len(names) <= 20 else 7
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), labels, fontsize=size)
    axes.grid(visible=False)
    if len(names) <= MAX_NUMBERED:
        for (i, j), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("label")
    figure.colorbar(shown, shrink=0.8, label="share of the label's images")
    figure.savefig(path)
    pyplot.close(figure)


def draw_reliability(calibration: Calibration, path: Path) -> None:
    """A reliability diagram: accuracy in each bin of confidence, and the answers in each."""
    edges = bin_edges(len(calibration.count))
    width = edges[1]
    figure, (top, bottom) = pyplot.subplots(
        2, sharex=True, figsize=(4.8, 4.8), height_ratios=(3, 1)
    )
    middles = edges[:-1] + width / 2
    top.bar(middles, np.nan_to_num(calibration.accuracy), width, edgecolor="white", lw=0.5,
            label="accuracy")  # fmt: skip
    top.plot(calibration.confidence, calibration.confidence, "k.", label="mean confidence")
    top.plot((0, 1), (0, 1), color="grey", ls="--", lw=1)
    top.set_ylim(0, 1)
    top.set_title(f"Expected calibration error {calibration.expected_error:.4f}", loc="left")
    top.legend(fontsize="small", loc="upper left", edgecolor="none", framealpha=0.9)
    bottom.bar(middles, calibration.count, width, color="C7", edgecolor="white", lw=0.5)
    bottom.set_xlim(0, 1)
    bottom.set_xlabel("confidence")
    bottom.set_ylabel("images")
    figure.savefig(path)
    pyplot.close(figure)
