"""Snapshots: write and read them.

A snapshot is a directory `snapshot_<name>` that holds

    model.safetensors     parameters and buffers, float32, named as in torchvision
    training.safetensors  the rest of what a run needs to resume as if it had never stopped
    snapshot.json         what they belong to: model, classes, preprocessing, epoch, figures, flags

It is written under a temporary name beside its place, flushed to disk and renamed, so that it is
whole or is not there. Nothing of it is a pickle. foreign.py reads weights of others.
"""

import json
import os
import platform
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import oneflow as flow
from oneflow import nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from cnns.checkpoint.description import check_description
from cnns.checkpoint.files import write_durably, writing
from cnns.checkpoint.pickles import printable
from cnns.data.images import Preprocessing, read_preprocessing
from cnns.errors import RunError
from cnns.jsonfile import Damaged, check_regular, read_json
from cnns.models.layers import from_standard, to_standard

FORMAT_VERSION = 1
PREFIX = "snapshot_"
EPOCH_NAME = re.compile(f"{PREFIX}epoch_([0-9]+)")
WEIGHTS = "model.safetensors"
TRAINING_STATE = "training.safetensors"
GRAPH_NAME = "TrainGraph"  # in names of what belongs to a graph; OneFlow numbers its graphs
DESCRIPTION = "snapshot.json"


@dataclass
class Snapshot:
    """What snapshot.json says."""

    model: str
    num_classes: int
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None  # names, in label order
    epoch: int | None = None  # last finished epoch, validation included; None before the first
    iteration: int = 0  # iterations done in the epoch behind that
    step: int = 0  # updates made
    steps_per_epoch: int | None = None
    global_batch_size: int | None = None
    train_data: dict | None = None  # Dataset.fingerprint(); None: synthetic
    metrics: dict = field(default_factory=dict)  # of the last finished epoch
    best: dict = field(default_factory=dict)  # epoch and metrics of the best so far, by top-1
    records_digest: str | None = None  # of the records used, see cnns.run.Progress
    flags: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    # CRC-32 of the files of arrays, by name; none in snapshots of earlier versions.
    checksums: dict = field(default_factory=dict, compare=False)
    format_version: int = FORMAT_VERSION


def versions() -> dict[str, str]:
    """Versions of what made a snapshot."""
    return {
        "python": platform.python_version(),
        "oneflow": flow.__version__,
        "numpy": np.__version__,
    }


def state_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Parameters and buffers of a model as float32 arrays, by name, in the standard layout.

    `num_batches_tracked` is left out: nothing counts it inside a graph, and PyTorch fills it in.
    """
    return {
        name: to_standard(model, name, local(tensor).numpy().astype(np.float32))
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def checksum(model: nn.Module) -> int:
    """A number by which two processes see whether they hold the same weights."""
    total = 0
    for array in state_arrays(model).values():
        total = zlib.crc32(array.tobytes(), total)
    return total


def local(tensor: flow.Tensor) -> flow.Tensor:
    """The whole of a tensor, one that every process holds, as an ordinary one of this process."""
    if tensor.is_global:
        if tensor.sbp != (flow.sbp.broadcast,):
            tensor = tensor.to_global(sbp=flow.sbp.broadcast)
        tensor = tensor.to_local()
    return tensor


def training_arrays(graph: nn.Graph, model: nn.Module) -> dict[str, np.ndarray]:
    """What a training graph remembers beside its model, named as OneFlow does.

    The optimizer's buffers (`model.fc.weight-momentum`), float32, in the layout of snapshots, and
    the step counter of the schedule (`System-Train-TrainStep`), int64; in half precision the loss
    scale and its counter as well. Empty before the graph's first call.
    """
    return {
        name.replace(graph.name, GRAPH_NAME): to_standard(
            model, parameter_of(name), local(value).numpy()
        )
        for name, value in graph.state_dict().items()
        if isinstance(value, flow.Tensor)
    }


def parameter_of(buffer: str) -> str:
    """`fc.weight` of `model.fc.weight-momentum`."""
    return buffer.removeprefix("model.").rpartition("-")[0]


def load_training_state(
    graph: nn.Graph, model: nn.Module, arrays: dict[str, np.ndarray], *, device: str
) -> None:
    """Hand `training_arrays` of another process to a graph that has not been called yet."""
    placement = flow.env.all_device_placement(device)
    state = {}
    for name, array in arrays.items():
        array = from_standard(model, parameter_of(name), array)
        name = name.replace(GRAPH_NAME, graph.name)
        state[name] = flow.tensor(array).to_global(placement, flow.sbp.broadcast)
    graph.load_state_dict(state, strict=False)


def save_snapshot(
    path: str,
    model: nn.Module,
    snapshot: Snapshot,
    *,
    graph: nn.Graph | None = None,
    replace: bool = False,
) -> None:
    """Write a snapshot as the directory `path`.

    Args:
        graph: the training graph, if the run is to be resumed from here.
        replace: put it in the place of one of the same name, which is whole until then.

    Raises RunError where it cannot be written, with the disk as it was before, or where a weight is
    not finite.
    """
    arrays = state_arrays(model)
    for parameter, array in arrays.items():
        if not np.isfinite(array).all():
            raise RunError(f"{parameter} is no longer finite, so {path} is not written")
    with writing(path, replace=replace) as temporary:
        checksums = {WEIGHTS: write_arrays(temporary, WEIGHTS, arrays)}
        if graph is not None:
            state = training_arrays(graph, model)
            checksums[TRAINING_STATE] = write_arrays(temporary, TRAINING_STATE, state)
        text = json.dumps(asdict(snapshot) | {"checksums": checksums}, indent=2) + "\n"
        write_durably(os.path.join(temporary, DESCRIPTION), text.encode())


def write_arrays(directory: str, name: str, arrays: dict[str, np.ndarray]) -> int:
    """Write a file of arrays, and return its checksum. Raises OSError."""
    data = save(arrays)
    write_durably(os.path.join(directory, name), data)
    return zlib.crc32(data)


def read_description(path: str) -> Snapshot:
    """Read snapshot.json of the snapshot directory `path`.

    Raises RunError where it is missing or damaged.
    """
    file_path = os.path.join(path, DESCRIPTION)
    try:
        content = read_json(file_path)
        version = content.get("format_version") if isinstance(content, dict) else FORMAT_VERSION
        if type(version) is int and version != FORMAT_VERSION:
            raise RunError(
                f"{file_path} is of format {version}, and this version reads {FORMAT_VERSION}"
            )
        check_description(content)
    except FileNotFoundError:
        raise RunError(
            f"{path} is not a snapshot, or only part of one: it holds no {DESCRIPTION}"
        ) from None
    except OSError as error:
        raise RunError(f"cannot read {file_path}: {error.strerror}") from None
    except Damaged as error:
        raise RunError(f"{file_path} is damaged: {error}; use another snapshot") from None
    content["preprocessing"] = read_preprocessing(content["preprocessing"])
    if content.get("classes") is not None:
        content["classes"] = tuple(content["classes"])
    return Snapshot(**content)


def read_weights(path: str) -> dict[str, np.ndarray]:
    """Read model.safetensors of the snapshot directory `path`: float32 arrays by name.

    Raises RunError where it is missing or damaged.
    """
    weights = read_arrays(path, WEIGHTS)
    for name, array in weights.items():
        if array.dtype != np.float32:
            raise RunError(
                f"{os.path.join(path, WEIGHTS)}: {printable(name)} is {array.dtype}, and float32 "
                "is needed"
            )
    return weights


def check_files(path: str) -> None:
    """Raise RunError where a file of arrays of the snapshot `path` is missing or cut off.

    Looks at the headers and sizes only, so a flipped bit in a weight is not seen.
    """
    for name in (WEIGHTS, TRAINING_STATE):
        file_path = os.path.join(path, name)
        if name == WEIGHTS or os.path.lexists(file_path):
            with arrays_expected(path, name), safe_open(file_path, framework="numpy"):
                pass


def read_arrays(path: str, name: str) -> dict[str, np.ndarray]:
    """Read the file `name` of the snapshot directory `path`: arrays by name.

    Raises RunError where it is missing or damaged.
    """
    with arrays_expected(path, name):
        return load_file(os.path.join(path, name))


def check_belongs(path: str, name: str, snapshot: Snapshot) -> None:
    """Raise RunError unless the file `name` in `path` is the one that was written with `snapshot`.

    Snapshots of earlier versions do not say.
    """
    with arrays_expected(path, name):
        if snapshot.checksums and file_checksum(path, name) != snapshot.checksums.get(name):
            raise RunError(
                f"{os.path.join(path, name)} does not belong to the {DESCRIPTION} beside it: it "
                "was changed, or copied from elsewhere; use another snapshot"
            )


@contextmanager
def arrays_expected(path: str, name: str) -> Iterator[None]:
    """Makes one line of what can go wrong with a file of arrays that somebody else may have made.

    safetensors bounds every offset by the file; numpy refuses shapes that it cannot hold.
    """
    file_path = os.path.join(path, name)
    try:
        check_regular(file_path)
        yield
    except FileNotFoundError:
        raise RunError(
            f"{path} is not a snapshot, or only part of one: it holds no {name}"
        ) from None
    except (TypeError, KeyError, AttributeError) as error:  # a number format that numpy has not
        raise RunError(f"{file_path} is not of float32: {printable(str(error))}") from None
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise RunError(
            f"{file_path} is damaged or cut off ({printable(str(error))}); use another snapshot"
        ) from None


def file_checksum(path: str, name: str) -> int:
    """CRC-32 of the file `name` in `path`. Raises OSError."""
    total = 0
    with open(os.path.join(path, name), "rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total
