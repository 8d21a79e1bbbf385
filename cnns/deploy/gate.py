"""Scores of the variants of a network, and the gate that a smaller one has to pass.

Every variant answers the same pictures. Where these have labels, the share of right answers must
not fall by more than --max_drop points. Where they have none, no accuracy can be measured: then the
answers of float32 that have at least CONFIDENT probability take the place of labels.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime

from cnns.data.images import Preprocessing
from cnns.deploy.pictures import Pictures
from cnns.errors import RunError
from cnns.export import INPUT, OUTPUT, open_session
from cnns.report.metrics import Answers, reduce_logits

BATCH = 32  # pictures that are scored at once
CONFIDENT = 0.5
ROUNDS = 40  # of the timing
FLOAT32 = "float32"
NUM_NAMED = 3  # layers that a refusal names


@dataclass(frozen=True)
class Score:
    """What one variant answered, beside what float32 answered."""

    answers: Answers
    reference: Answers
    labelled: bool

    @property
    def scored(self) -> np.ndarray:
        """(N,) which pictures count: all, or the confident ones where there are no labels."""
        if self.labelled:
            return np.ones(len(self.answers.label), bool)
        return self.reference.confidence >= CONFIDENT

    @property
    def count(self) -> int:
        return int(self.scored.sum())

    def hits_of(self, answers: Answers) -> int:
        truth = self.answers.label if self.labelled else self.reference.predicted
        return int((answers.predicted == truth)[self.scored].sum())

    @property
    def hits(self) -> int:
        return self.hits_of(self.answers)

    @property
    def top_1(self) -> float:
        return self.hits / self.count if self.count else math.nan

    @property
    def agreement(self) -> float:
        """Share of all pictures whose first answer is that of float32."""
        return float((self.answers.predicted == self.reference.predicted).mean())

    @property
    def drop(self) -> float:
        """Points of accuracy lost against float32; less than 0 where some were won."""
        lost = self.hits_of(self.reference) - self.hits
        return 100 * lost / self.count if self.count else math.nan

    def passes(self, max_drop: float) -> bool:
        """Whether no more than `max_drop` points are lost; never where nothing could be scored."""
        return self.drop <= max_drop + 1e-9


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share. Wilson 1927, Probable inference.

    >>> tuple(round(each, 4) for each in wilson(750, 1000))
    (0.7222, 0.7759)
    """
    if count == 0:
        return 0.0, 1.0
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def score(
    variants: dict[str, bytes],
    pictures: Pictures,
    preprocessing: Preprocessing,
) -> dict[str, Score]:
    """The answers of each variant, ONNX files in memory, one of them FLOAT32, to all pictures."""
    sessions = {name: open_session(model) for name, model in variants.items()}
    parts: dict[str, list[Answers]] = {name: [] for name in variants}
    done = 0
    for images, labels in pictures.batches(preprocessing, BATCH):
        index = np.arange(done, done + len(images))
        for name, session in sessions.items():
            logits = session.run([OUTPUT], {INPUT: images})[0]
            parts[name].append(reduce_logits(index, labels, logits))
        done += len(images)
    answers = {
        name: Answers.unpack(np.concatenate([each.pack() for each in own]))
        for name, own in parts.items()
    }
    num_classes = sessions[FLOAT32].get_outputs()[0].shape[1]
    if pictures.labelled and answers[FLOAT32].label.max() >= num_classes:
        raise RunError(
            f"{pictures.path} has labels up to {answers[FLOAT32].label.max()}, and the network has "
            f"{num_classes} classes: they are for another data set"
        )
    return {
        name: Score(each, answers[FLOAT32], pictures.labelled) for name, each in answers.items()
    }


def measure_milliseconds(
    variants: dict[str, bytes], image_size: int, *, batch: int, rounds: int = ROUNDS
) -> dict[str, float]:
    """The time of a call with `batch` images, the variants by turns: what the fastest quarter of
    the calls stayed below, since other work on the machine makes some of them slower."""
    images = np.random.default_rng(0).standard_normal((batch, 3, image_size, image_size))
    feed = {INPUT: images.astype(np.float32)}
    sessions = {name: open_session(model) for name, model in variants.items()}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for session in sessions.values():
        session.run([OUTPUT], feed)  # the first one makes room
    for _ in range(rounds):
        for name, session in sessions.items():
            taken[name].append(timed(session, feed))
    return {name: 1000 * float(np.percentile(each, 25)) for name, each in taken.items()}


def timed(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> float:
    start = time.perf_counter()
    session.run([OUTPUT], feed)
    return time.perf_counter() - start


def refusal(
    name: str, score: Score, *, max_drop: float, path: str, layers: Sequence[tuple[str, float]]
) -> str:
    """The line that says why a variant is not written."""
    if score.count == 0:
        return (
            f"{name} cannot be checked: of {len(score.answers.label)} pictures of {path}, none has "
            f"labels or an answer with a probability of {CONFIDENT}; name labelled ones with "
            "--val_data_dir"
        )
    before, after = score.hits_of(score.reference), score.hits
    text = (
        f"{name} loses {score.drop:.2f} points on {path} ({after} of {score.count} right, and "
        f"{before} in float32), and --max_drop={max_drop:g} are allowed; it is not written"
    )
    if layers:
        worst = ", ".join(f"{layer} ({error:.0%})" for layer, error in layers[:NUM_NAMED])
        text += f". Layers that change the logits most when they alone are {name}: {worst}"
    return text
