"""The report of an evaluation: what a network gets wrong, as tables, pictures and one page."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cnns.data.kinds import Dataset
from cnns.errors import printable
from cnns.log import Counts
from cnns.report.examples import Examples, look_up
from cnns.report.folder import report_folder
from cnns.report.metrics import (
    NONE,
    Answers,
    Calibration,
    ClassFigures,
    calibrate,
    class_figures,
    confident_mistakes,
    confusion_cells,
    confusion_matrix,
    most_confused,
)
from cnns.report.page import page, picture, pictures, table, text
from cnns.report.plots import draw_confusion, draw_reliability, plot_style
from cnns.report.sheet import draw_sheet

FORMAT_VERSION = 1  # of report.json
MAX_DRAWN = 50  # classes of a confusion matrix that is drawn
MAX_DENSE = 2000  # classes of one that is written whole; beyond, its cells that are not 0
MAX_MISTAKES = 36  # on the contact sheet
MAX_CONFUSED = 20  # pairs of classes that are listed
MAX_LISTED = 1000  # classes on the page
CLASS_COLUMNS = ("label", "class", "images", "predicted", "right", "accuracy", "precision", "f1")
PAIR_COLUMNS = ("label", "class", "predicted", "predicted_class", "images")


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, and the answers."""

    about: dict[str, str]  # network, weights and data, as the page names them
    data: Dataset
    class_names: Sequence[str]
    answers: Answers
    counts: Counts
    top_k: int

    @cached_property
    def figures(self) -> ClassFigures:
        return class_figures(self.answers.label, self.answers.predicted, len(self.class_names))

    @cached_property
    def cells(self) -> np.ndarray:
        return confusion_cells(self.answers.label, self.answers.predicted)

    @cached_property
    def calibration(self) -> Calibration:
        return calibrate(self.answers.confidence, self.answers.right)

    @cached_property
    def mistakes(self) -> Sequence[int]:
        return confident_mistakes(self.answers, MAX_MISTAKES)

    @property
    def balance_line(self) -> str | None:
        """Balanced accuracy, where classes are uneven."""
        if not self.figures.are_uneven:
            return None
        low, high = self.figures.bounds
        return (
            f"Balanced accuracy: {self.figures.balanced_accuracy:.6f}, the mean of the classes' "
            f"accuracies, as the classes have {low} to {high} images."
        )

    def class_rows(self) -> list[tuple]:
        """As CLASS_COLUMNS."""
        figures = self.figures
        names = ("support", "predicted", "hits", "recall", "precision", "f1")
        columns = [getattr(figures, name).tolist() for name in names]
        numbers = range(len(self.class_names))
        return list(zip(numbers, self.class_names, *columns, strict=True))


def write_report(evaluation: Evaluation, folder: str) -> str:
    """Write all files of a report, or none. Gives the path of its page.

    Raises RunError where the disk is full or the like.
    """
    answers, names = evaluation.answers, evaluation.class_names
    examples = look_up(evaluation.data, {int(answers.index[row]) for row in evaluation.mistakes})
    with report_folder(folder) as new:
        write_csv(new / "predictions.csv", *prediction_table(answers, names, examples))
        write_csv(new / "classes.csv", CLASS_COLUMNS, evaluation.class_rows())
        write_csv(new / "confusion_matrix.csv", *confusion_table(evaluation.cells, names))
        with plot_style():
            draw_reliability(evaluation.calibration, new / "reliability.png")
            if len(names) <= MAX_DRAWN:
                matrix = confusion_matrix(evaluation.cells, len(names))
                draw_confusion(matrix, names, new / "confusion_matrix.png")
        mistakes = [mistake(answers, names, examples, row) for row in evaluation.mistakes]
        if examples.pictures:
            found = [examples.pictures[int(answers.index[row])] for row in evaluation.mistakes]
            sheet = draw_sheet(list(zip(found, map(caption, mistakes), strict=True)))
            sheet.save(new / "mistakes.png")
        summary = summarise(evaluation, mistakes)
        content = json.dumps(finite(summary), indent=1, allow_nan=False) + "\n"
        (new / "report.json").write_text(content)
        html = make_page(evaluation, summary, new)
        (new / "report.html").write_text(html, encoding="utf-8")
    return str(Path(folder) / "report.html")


# Tables as CSV.


def csv_cell(value: Any) -> Any:
    """Text on one line; what a spreadsheet would take for a formula begins with an apostrophe."""
    if isinstance(value, str):
        value = printable(value)
        return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
    return "" if isinstance(value, float) and math.isnan(value) else value


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for row in (head, *rows):
            writer.writerow(map(csv_cell, row))


def float32(value: np.float32) -> float:
    """With the digits that a float32 has."""
    return float(str(value))


def prediction_table(
    answers: Answers, names: Sequence[str], examples: Examples
) -> tuple[list[str], Iterable[list]]:
    head = [*examples.columns, "label", "class", "probability"]
    for rank in range(1, answers.best.shape[1] + 1):
        head += [f"label_{rank}", f"class_{rank}", f"probability_{rank}"]

    def make_row(row: int) -> list:
        label = int(answers.label[row])
        cells = [*examples.names[answers.index[row]], label, names[label]]
        cells.append(float32(answers.label_probability[row]))
        for number, probability in zip(answers.best[row], answers.probabilities[row], strict=True):
            known = number != NONE
            cells += [int(number), names[number]] if known else ["", ""]
            cells.append(float32(probability))
        return cells

    return head, map(make_row, range(len(answers.label)))


def confusion_table(
    cells: np.ndarray, names: Sequence[str]
) -> tuple[Sequence[str], Iterable[Sequence]]:
    """Whole, a row for each label; or for many classes the cells that are not 0."""

    def name(number: int) -> str:
        return names[number] if number != NONE else "none"

    if len(names) > MAX_DENSE:
        cell_list = cells.tolist()
        return PAIR_COLUMNS, ((a, name(a), b, name(b), count) for a, b, count in cell_list)
    matrix = confusion_matrix(cells, len(names))
    nothing = np.zeros(len(names), np.int32)  # of each label, answers that name no class
    of_none = cells[cells[:, 1] == NONE]
    nothing[of_none[:, 0]] = of_none[:, 2]
    more = int(nothing.any())
    numbers = range(len(names))
    rows = ([i, name(i), *matrix[i].tolist(), *nothing[i : i + more].tolist()] for i in numbers)
    return ["label", "class", *names, *["none"] * more], rows


# Figures, and the page.


def mistake(answers: Answers, names: Sequence[str], examples: Examples, row: int) -> dict:
    label, predicted = int(answers.label[row]), int(answers.predicted[row])
    where = dict(zip(examples.columns, examples.names[answers.index[row]], strict=True))
    return where | {
        "label": label,
        "class": names[label],
        "predicted": predicted,
        "predicted_class": names[predicted],
        "probability": float32(answers.confidence[row]),
        "label_probability": float32(answers.label_probability[row]),
    }


def caption(mistake: dict) -> tuple[str, str]:
    """The label, and the answer. Numbers too, as not every name can be drawn."""
    said = f"{mistake['probability']:.1%} {mistake['predicted']} {mistake['predicted_class']}"
    return f"label {mistake['label']} {mistake['class']}", said


def summarise(evaluation: Evaluation, mistakes: list[dict]) -> dict[str, Any]:
    """All numbers, as in report.json."""
    answers, counts, figures = evaluation.answers, evaluation.counts, evaluation.figures
    calibration, names = evaluation.calibration, evaluation.class_names
    top_1, top_k = counts.accuracies()
    confidence = answers.confidence[~np.isnan(answers.confidence)]
    return {
        "format_version": FORMAT_VERSION,
        **evaluation.about,
        "images": counts.samples,
        "num_classes": len(names),
        "classes_with_images": int((figures.support > 0).sum()),
        "top_1": top_1,
        f"top_{evaluation.top_k}": top_k,
        "loss": counts.loss,
        "classes_are_uneven": figures.are_uneven,
        "balanced_accuracy": figures.balanced_accuracy,
        "mean_precision": figures.mean(figures.precision),
        "mean_f1": figures.mean(figures.f1),
        "mean_confidence": float(confidence.mean()) if len(confidence) else math.nan,
        "expected_calibration_error": calibration.expected_error,
        "maximum_calibration_error": calibration.largest_error,
        "answers_without_confidence": len(answers.confidence) - len(confidence),
        "calibration": [
            dict(zip(("images", "confidence", "accuracy"), values, strict=True))
            for values in zip(
                calibration.count.tolist(),
                calibration.confidence.tolist(),
                calibration.accuracy.tolist(),
                strict=True,
            )
        ],
        "most_confused": [
            {
                "label": a,
                "class": names[a],
                "predicted": b,
                "predicted_class": names[b],
                "images": count,
            }
            for a, b, count in most_confused(evaluation.cells, MAX_CONFUSED).tolist()
        ],
        "most_confident_mistakes": mistakes,
        "classes": [dict(zip(CLASS_COLUMNS, row, strict=True)) for row in evaluation.class_rows()],
    }


def finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_page(evaluation: Evaluation, summary: dict[str, Any], folder: Path) -> str:
    parts = ["<h1>Evaluation</h1>"]
    lines = [(key, value) for key, value in summary.items() if not isinstance(value, list)]
    parts.append(table(("figure", "value"), lines[1:]))
    if evaluation.balance_line:
        parts.append(f"<p><b>{text(evaluation.balance_line)}</b></p>")
    titles = {"reliability.png": "Reliability", "confusion_matrix.png": "Confusion matrix"}
    found = {folder / name: title for name, title in titles.items() if (folder / name).exists()}
    parts.append(pictures(picture(path, title) for path, title in found.items()))
    parts.append("<h2>Most confident mistakes</h2>")
    if (folder / "mistakes.png").exists():
        parts.append("<p>Black: the label. Red: the answer, with its probability.</p>")
        sheet = picture(folder / "mistakes.png", "Most confident mistakes")
        parts.append(f'<div class="wide">{sheet}</div>')
    mistakes, confused = summary["most_confident_mistakes"], summary["most_confused"]
    parts += [table_of(mistakes), "<h2>Classes most often taken for another</h2>"]
    parts += [table_of(confused), "<h2>Classes, the worst first</h2>"]
    rows = [row for row in evaluation.class_rows() if row[2]]
    rows.sort(key=lambda row: row[5])
    if len(rows) > MAX_LISTED:
        parts.append(f"<p>{MAX_LISTED} of {len(rows)}; classes.csv has all.</p>")
    parts.append(table(CLASS_COLUMNS, rows[:MAX_LISTED]))
    return page("Evaluation", parts)


def table_of(rows: list[dict]) -> str:
    return table(list(rows[0]), [list(row.values()) for row in rows]) if rows else "<p>None.</p>"
