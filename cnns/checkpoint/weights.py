"""Weights to start from, in any known format, and how they are loaded into a network."""

import math
import os
from dataclasses import dataclass

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.checkpoint.external import (
    ExternalWeights,
    count_classes,
    fit,
    guess_model,
    is_auxiliary,
    is_last,
    read_external,
)
from cnns.checkpoint.snapshot import (
    AVERAGE,
    DESCRIPTION,
    TRAINING_STATE,
    WEIGHTS,
    Snapshot,
    check_checksum,
    read_arrays,
    read_description,
    read_weights,
    state_arrays,
    state_tensors,
    versions,
)
from cnns.checkpoint.training import check_state
from cnns.data.format import MAX_CLASSES
from cnns.errors import RunError, UsageError
from cnns.models.layers import from_standard, to_standard
from cnns.models.model import Models

MAX_NAMES = 3  # of a kind, in one line
MANY_CLASSES = 20_000  # a network of more is not built before its last layer has been looked at


def standard_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and buffers by name, as snapshots hold them."""
    return {
        name: to_standard(model, name, np.empty(tuple(tensor.shape), np.bool_)).shape
        for name, tensor in state_tensors(model).items()
    }


def load_weights(
    model: nn.Module, weights: dict[str, np.ndarray], *, path: str, without: str | None = None
) -> None:
    """Copy arrays into a model that has not been moved to its placement yet.

    Args:
        without: a last layer that is left as it is.

    Raises UsageError where names or shapes differ, with the first of each kind; RunError where a
    weight is not float32.
    """
    shapes = standard_shapes(model)
    if without is not None:
        fresh = {name for name in shapes if is_last(name, without)}
        shapes = {name: shape for name, shape in shapes.items() if name not in fresh}
        weights = {name: array for name, array in weights.items() if name not in fresh}
    missing, unexpected = sorted(shapes.keys() - weights), sorted(weights.keys() - shapes)
    wrong = [
        f"{name} is {weights[name].shape}, not {shape}"
        for name, shape in sorted(shapes.items())
        if name in weights and weights[name].shape != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong}
    faults = [
        f"{len(names)} {kind}, first {', '.join(names[:MAX_NAMES])}"
        for kind, names in kinds.items()
        if names
    ]
    if faults:
        raise UsageError(f"the weights of {path} do not fit the network: {'; '.join(faults)}")
    state = model.state_dict()
    for name in shapes:
        if weights[name].dtype != np.float32:
            raise RunError(f"{path}: {name} is {weights[name].dtype}, and floats are needed")
        state[name] = flow.tensor(from_standard(model, name, weights[name]))
    model.load_state_dict(state)


@dataclass
class Checkpoint:
    """Weights to start from, a snapshot or weights from elsewhere, and what is known of them."""

    path: str
    snapshot: Snapshot
    external: ExternalWeights | None = None  # None: a snapshot
    last_layer: str = "fc"  # of its network
    weights: dict[str, np.ndarray] | None = None  # of a snapshot, where they have been read
    state: dict[str, np.ndarray] | None = None  # its training state, where that has been read
    average: dict[str, np.ndarray] | None = None  # of its weights, where that has been read
    file: str = WEIGHTS  # of a snapshot, what is taken: its weights, or AVERAGE

    @property
    def directory(self) -> str:
        """Of a snapshot."""
        return self.path if self.file == WEIGHTS else os.path.dirname(self.path)

    def read(self) -> dict[str, np.ndarray]:
        """The weights of a snapshot. Raises as `read_weights`."""
        return read_weights(self.directory, self.file)

    def take_state(self) -> dict[str, np.ndarray]:
        """The training state, which is not kept: it is as large as the weights, or twice that."""
        assert self.state is not None
        state, self.state = self.state, None
        return state

    def load(self, network: nn.Module, *, finetune: bool = False) -> list[str]:
        """Copy the weights into a network, and free them. Returns notices for the user.

        Raises as `load_weights` and `read_weights`.
        """
        notices = []
        if self.external is None:
            weights = self.read() if self.weights is None else self.weights
        else:
            shapes = standard_shapes(network)
            before = len(self.external.notices)
            weights = fit(self.external, shapes)
            notices += self.external.notices[before:]
            self.external.arrays = {}
            auxiliary = {name for name in shapes if is_auxiliary(name)}
            if auxiliary and not auxiliary & weights.keys():
                own = state_arrays(network)
                weights = weights | {name: own[name] for name in auxiliary}
                notices.append(
                    "It has no auxiliary classifier, which only training uses; its weights are "
                    "random."
                )
        self.weights = None
        load_weights(
            network, weights, path=self.path, without=self.last_layer if finetune else None
        )
        if self.external is None:
            check_checksum(self.directory, self.file, self.snapshot)
        if finetune:
            notices.append("--finetune: the last layer starts from random weights.")
        return notices

    def notices(self) -> list[str]:
        """What the user should know of weights from elsewhere."""
        if self.external is None:
            return []
        text = (
            f"{self.path} is {self.external.kind}: taken as {self.snapshot.model} with "
            f"{self.snapshot.num_classes} classes."
        )
        return [text, *self.external.notices]


def read_resumable(path: str, snapshot: Snapshot) -> Checkpoint:
    """All that resuming needs of a snapshot. Raises RunError where something is missing."""
    weights, average, state = read_weights(path), None, None
    check_checksum(path, WEIGHTS, snapshot)
    if os.path.lexists(os.path.join(path, AVERAGE)):
        average = read_weights(path, AVERAGE)
        check_checksum(path, AVERAGE, snapshot)
    elif AVERAGE in snapshot.checksums:
        raise RunError(f"{path} lacks {AVERAGE}; use another snapshot")
    if snapshot.step > 0:
        if not os.path.lexists(os.path.join(path, TRAINING_STATE)):
            raise RunError(
                f"{path} holds weights only, no {TRAINING_STATE}; start a new run from them with "
                f"--model_load_dir={path}"
            )
        state = read_arrays(path, TRAINING_STATE)
        check_checksum(path, TRAINING_STATE, snapshot)
        check_state(
            state,
            weights=weights,
            flags=snapshot.flags,
            step=snapshot.step,
            path=os.path.join(path, TRAINING_STATE),
            as_written=bool(snapshot.checksums),
        )
    return Checkpoint(path, snapshot, weights=weights, state=state, average=average)


def open_checkpoint(
    path: str, *, models: Models, model: str | None = None, layout: str | None = None
) -> Checkpoint:
    """Weights in any known format. Only a snapshot says which network it is of; its file AVERAGE
    may be named as well.

    Args:
        model: the network of weights from elsewhere; unless given, it is guessed by their names.
        layout: see `external.read_external`.

    Raises RunError where it cannot be read, UsageError where the network is unknown.
    """
    directory, file = os.path.split(path)
    if file != AVERAGE:
        directory, file = path, WEIGHTS
    if os.path.lexists(os.path.join(directory, DESCRIPTION)):
        snapshot = read_description(directory)
        known = models.get(snapshot.model)
        last_layer = known.last_layer if known else "fc"
        return Checkpoint(path, snapshot, last_layer=last_layer, file=file)
    external = read_external(path, layout=layout)
    model = model or guess_model(external, models, path=path)
    snapshot = Snapshot(
        model=model,
        num_classes=count_classes(external, models[model].last_layer, path=path),
        preprocessing=models[model].preprocessing(),
        versions=versions(),
    )
    return Checkpoint(path, snapshot, external, models[model].last_layer)


def check_fits(
    checkpoint: Checkpoint,
    *,
    models: Models,
    model: str | None,
    num_classes: int | None,
    finetune: bool | None = None,
) -> None:
    """Raise UsageError where flags ask for another network or class count than the checkpoint's.

    Args:
        finetune: whether the class count may differ; None where there is no such flag.
    """
    snapshot, path = checkpoint.snapshot, checkpoint.path
    if snapshot.model not in models:
        raise UsageError(f"{path} holds a {snapshot.model}, which this version does not know")
    if model is not None and model != snapshot.model:
        raise UsageError(f"--model={model}, but {path} holds a {snapshot.model}")
    if num_classes is not None and num_classes != snapshot.num_classes and not finetune:
        way = "" if finetune is None else "; --finetune takes all but the last layer"
        raise UsageError(
            f"--num_classes={num_classes}, but {path} has {snapshot.num_classes} classes{way}"
        )
    if not finetune and snapshot.num_classes > MANY_CLASSES:
        check_last_layer(checkpoint, models)


def check_last_layer(checkpoint: Checkpoint, models: Models) -> None:
    """Raise UsageError unless the last layer is as large as its classes make that of the network.

    A small file may claim a million classes, and a network that has them takes 8 GB.
    """
    snapshot, path = checkpoint.snapshot, checkpoint.path
    entry, count = models[snapshot.model], snapshot.num_classes
    if checkpoint.external is not None:
        arrays = checkpoint.external.arrays
    else:
        arrays = checkpoint.weights = checkpoint.weights or checkpoint.read()
    name = f"{entry.last_layer}.weight"
    needed = count * math.prod(standard_shapes(entry.build(1))[name])
    held = arrays[name].size if name in arrays else 0
    if count > MAX_CLASSES or held != needed:
        raise UsageError(
            f"the weights of {path} do not fit the network: {name} has {held} numbers, and "
            f"{count} classes need {needed} ({MAX_CLASSES} classes at most)"
        )
