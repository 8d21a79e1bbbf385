"""model_card.md: what a deployed network is, and what was measured of it.

Every figure comes from the command that writes the card; what was not measured, it says so.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cnns.advice import size as size_text
from cnns.deploy.gate import CONFIDENT, ROUNDS, Score, wilson
from cnns.errors import printable
from cnns.report.metrics import class_figures, confusion_cells, most_confused

MAX_PAIRS = 5  # of classes that are confused
FEW = 30  # examples of a class, below which its figures say little


@dataclass(frozen=True)
class Variant:
    """One file with the network, measured."""

    name: str
    file: str
    num_bytes: int
    score: Score
    milliseconds: dict[int, float]  # by images at once
    refusal: str | None  # why it was not written


@dataclass(frozen=True)
class Card:
    name: str
    network: str
    snapshot: str
    about: dict[str, str]  # lines of the first table
    classes: Sequence[str]
    variants: Sequence[Variant]
    default: Variant
    compared: str  # what the comparison with OneFlow gave
    pixels: str  # and that of the preprocessing in pictures.onnx
    validation: str
    calibration: str
    recipe: dict[str, object]
    command: Sequence[str]
    checksums: dict[str, str]

    def text(self) -> str:
        parts = [
            f"# {cell(self.name)}",
            self.head(),
            self.usage(),
            self.figures(),
            *([self.per_class()] if self.default.score.labelled else []),
            self.limits(),
            self.origin(),
            self.files(),
        ]
        return "\n\n".join(parts) + "\n"

    def head(self) -> str:
        rows = {
            "network": self.network,
            "made from": self.snapshot,
            "classes": f"{len(self.classes)}: {some(self.classes)}",
            **self.about,
        }
        return table(("", ""), rows.items())

    def usage(self) -> str:
        return "\n".join(
            [
                "## Use",
                "",
                "```sh",
                "python3 -m pip install -r requirements.txt",
                "python3 predict.py photo.jpg",
                "python3 serve.py",
                "```",
                "",
                f"Both take `{self.default.file}`, the fastest one below, unless `--model` names "
                "another. The files take `images` (batch, 3, H, W) float32, RGB, normalised as "
                "their metadata say, and give `logits`. `pictures.onnx` is the same network for "
                "other programs: it takes `pictures` (batch, height, width, 3) uint8, RGB, of any "
                "size, does the preprocessing, and gives `probabilities`.",
            ]
        )

    def figures(self) -> str:
        batches = sorted(self.default.milliseconds)
        labelled = self.default.score.labelled
        head = ["file", "size", "top-1" if labelled else "confident answers kept"]
        head += ["95 % interval", "points lost", "same first answer"]
        head += [f"ms, batch {batch}" for batch in batches]
        rows = []
        for variant in self.variants:
            score = variant.score
            low, high = wilson(score.hits, score.count)
            shown = f"`{variant.file}`" if variant.refusal is None else f"{variant.name}, refused"
            rows.append(
                [
                    shown,
                    size_text(variant.num_bytes),
                    f"{score.top_1:.2%} ({score.hits} of {score.count})",
                    f"{low:.2%} to {high:.2%}",
                    f"{score.drop:.2f}",
                    f"{score.agreement:.2%}",
                    *(f"{variant.milliseconds[batch]:.2f}" for batch in batches),
                ]
            )
        lines = []
        if labelled:
            lines.append(f"Accuracy on {self.validation}; the interval is Wilson's.")
        else:
            lines.append(
                "**Accuracy was not measured**: there were no labelled pictures "
                f"(`--val_data_dir`). On {self.validation}, answers of float32 with a probability "
                f"of at least {CONFIDENT:g} took the place of labels: the figures say how much a "
                "smaller file differs from float32, not how often it is right."
            )
        lines.append(
            f"Milliseconds are what the fastest quarter of {ROUNDS} calls of ONNX Runtime took at "
            "most on the machine above, the files by turns, without reading and resizing the "
            "picture."
        )
        lines += [f"Refused: {cell(v.refusal)}." for v in self.variants if v.refusal is not None]
        if self.calibration:
            lines.append(f"Integers: ranges and rounding are from {self.calibration}.")
        lines.append(f"OneFlow against `{self.variants[0].file}`: {self.compared}")
        lines.append(f"Preprocessing in `pictures.onnx` against `predict.py`: {self.pixels}.")
        notes = (f"- {line}" for line in lines)
        return "\n".join(["## Measured", "", table(head, rows), "", *notes])

    def per_class(self) -> str:
        answers = self.default.score.answers
        figures = class_figures(answers.label, answers.predicted, len(self.classes))
        rows = [
            [
                name,
                str(figures.support[i]),
                *(percent(values[i]) for values in (figures.recall, figures.precision, figures.f1)),
            ]
            for i, name in enumerate(self.classes)
            if figures.support[i] or figures.predicted[i]
        ]
        lines = [f"## Each class, by `{self.default.file}`", ""]
        lines.append(table(("class", "images", "recall", "precision", "F1"), rows))
        pairs = most_confused(confusion_cells(answers.label, answers.predicted), MAX_PAIRS)
        if len(pairs):
            named = (f"{self.classes[a]} taken for {self.classes[b]} ({n})" for a, b, n in pairs)
            lines += ["", f"Most confused: {cell('; '.join(named))}."]
        return "\n".join(lines)

    def limits(self) -> str:
        answers = self.default.score.answers
        lines = ["## Limits", ""]
        lines.append(
            f"- It knows these {len(self.classes)} classes and nothing else: any picture gets one "
            "of them, and a probability is no proof that it shows one."
        )
        if self.default.score.labelled:
            figures = class_figures(answers.label, answers.predicted, len(self.classes))
            held = np.flatnonzero(figures.support)
            worst = held[np.argmin(figures.recall[held])]
            lines.append(
                f"- Weakest class: {cell(self.classes[worst])}, recall "
                f"{percent(figures.recall[worst])} of {figures.support[worst]} images."
            )
            few = [self.classes[i] for i in range(len(self.classes)) if figures.support[i] < FEW]
            if few:
                lines.append(
                    f"- Fewer than {FEW} images were there to score {len(few)} classes "
                    f"({cell(some(few))}); their figures say little."
                )
            lines.append(
                "- Where the same pictures chose the snapshot among those of a training (`best`), "
                "the accuracy is a little too favourable."
            )
        lines.append(
            "- The figures hold for pictures like those they were measured on. Others, of another "
            "camera, light or crop, were not tried."
        )
        lines.append(
            "- Times are of the machine above. Another processor may rank the files otherwise."
        )
        if not self.default.score.labelled:
            lines.append(
                "- Before it is relied on, score it: `--val_data_dir` takes labelled pictures, and "
                "`--calibration_dir` ones of the kind that it will see."
            )
        return "\n".join(lines)

    def origin(self) -> str:
        lines = ["## Recipe, and how to make this again", ""]
        if self.recipe:
            flags = " ".join(f"--{name}={shown(value)}" for name, value in self.recipe.items())
            lines += ["Flags of the training, but for those left at their defaults:", ""]
            lines += ["```text", printable(flags), "```", ""]
        else:
            lines += ["The weights were not trained here; nothing is known of their recipe.", ""]
        lines += ["This folder:", "", "```text", printable(shlex.join(self.command)), "```"]
        return "\n".join(lines)

    def files(self) -> str:
        rows = [(f"`{name}`", f"`{digest}`") for name, digest in self.checksums.items()]
        return "## Files\n\n" + table(("file", "SHA-256"), rows)


def table(head: Sequence[str], rows) -> str:  # type: ignore[no-untyped-def]
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(each) for each in line) + " |" for line in lines)


def cell(text: object) -> str:
    """A name from outside, as a cell of a table."""
    return printable(str(text)).replace("|", "\\|").replace("<", "&lt;")


def some(names: Sequence[str], count: int = 12) -> str:
    return "; ".join(names[:count]) + ("; ..." if len(names) > count else "")


def percent(share: float) -> str:
    return "none" if np.isnan(share) else f"{share:.1%}"


def shown(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return shlex.quote(text)
