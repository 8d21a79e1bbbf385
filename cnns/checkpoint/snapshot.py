"""Snapshots: write and read them.

A snapshot is a directory `snapshot_<name>` that holds

    model.safetensors     parameters and buffers, float32, named as in torchvision
    ema.safetensors       where weights are averaged, their average, in the same form
    training.safetensors  what else a run needs to resume as if it had never stopped
    snapshot.json         what they belong to: model, classes, preprocessing, epoch, figures, flags

It is written under a temporary name in the same directory, flushed to disk and renamed, so it is
complete or does not exist. It holds no pickles. external.py reads weights from elsewhere.
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
from cnns.checkpoint.files import atomic_directory, write_durably
from cnns.checkpoint.pickles import excerpt
from cnns.data.images import Preprocessing, read_preprocessing
from cnns.data.order import RecordOrder
from cnns.errors import RunError
from cnns.jsonfile import Damaged, check_regular, read_json
from cnns.models.layers import from_standard, to_standard

FORMAT_VERSION = 1
PREFIX = "snapshot_"
EPOCH_NAME = re.compile(f"{PREFIX}epoch_([0-9]+)")
WEIGHTS = "model.safetensors"
AVERAGE = "ema.safetensors"
TRAINING_STATE = "training.safetensors"
GRAPH_NAME = "TrainGraph"  # in names of what belongs to a graph; OneFlow numbers its graphs
DESCRIPTION = "snapshot.json"


@dataclass(kw_only=True)
class Progress:
    """Where a run stands."""

    epoch: int | None = None  # last finished epoch, validation included; None before the first
    iteration: int = 0  # iterations done in the epoch after that
    step: int = 0  # updates made
    metrics: dict = field(default_factory=dict)  # of the last finished epoch
    best: dict = field(default_factory=dict)  # epoch and metrics of the best so far, by top-1
    # RecordOrder.digest of the records used; None where OneFlow's reader chooses them.
    records_digest: str | None = None
    unprinted: dict | None = None  # the fields of Sums, where a run was stopped between two lines

    @property
    def current_epoch(self) -> int:
        return 0 if self.epoch is None else self.epoch + 1

    def advance(self, order: RecordOrder | None) -> None:
        """One iteration more is done."""
        if order is not None:
            batch = (self.current_epoch, self.iteration)
            self.records_digest = order.digest(self.records_digest, *batch)
        self.iteration, self.step = self.iteration + 1, self.step + 1


@dataclass
class Snapshot(Progress):
    """What snapshot.json says."""

    model: str
    num_classes: int
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None  # names, in label order
    steps_per_epoch: int | None = None
    global_batch_size: int | None = None
    train_data: dict | None = None  # Dataset.fingerprint(); None: synthetic
    flags: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    # CRC-32 of the files of arrays, by name; none in snapshots of earlier versions.
    checksums: dict = field(default_factory=dict, compare=False)
    format_version: int = FORMAT_VERSION


def versions() -> dict[str, str]:
    """Of the software that writes a snapshot."""
    return {
        "python": platform.python_version(),
        "oneflow": flow.__version__,
        "numpy": np.__version__,
    }


def state_tensors(model: nn.Module) -> dict[str, flow.Tensor]:
    """The parameters and buffers of a model that snapshots hold, by name.

    `num_batches_tracked` is left out: nothing counts it inside a graph, and PyTorch fills it in.
    """
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def state_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The same as float32 arrays, in the standard layout."""
    return {
        name: to_standard(model, name, local(tensor).numpy().astype(np.float32))
        for name, tensor in state_tensors(model).items()
    }


def checksum(model: nn.Module) -> int:
    """A number by which processes compare their weights."""
    total = 0
    for array in state_arrays(model).values():
        total = zlib.crc32(array.tobytes(), total)
    return total


def local(tensor: flow.Tensor) -> flow.Tensor:
    """A global tensor, whole, as a local one; every process calls this. Local ones as they are."""
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
    average: nn.Module | None = None,
    replace: bool = False,
) -> None:
    """Write a snapshot as the directory `path`.

    Args:
        graph: the training graph, if the run is to be resumed from here.
        average: the network with the average of the weights, where there is one.
        replace: replace one of the same name, which stays complete until then.

    Raises RunError where it cannot be written, with the disk as it was before, or where a weight is
    not finite.
    """
    networks = {WEIGHTS: state_arrays(model)}
    if average is not None:
        networks[AVERAGE] = state_arrays(average)
    for arrays in networks.values():
        for parameter, array in arrays.items():
            if not np.isfinite(array).all():
                raise RunError(f"{parameter} is no longer finite, so {path} is not written")
    with atomic_directory(path, replace=replace) as temporary:
        checksums = {
            name: write_arrays(temporary, name, arrays) for name, arrays in networks.items()
        }
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


def read_weights(path: str, file: str = WEIGHTS) -> dict[str, np.ndarray]:
    """Read model.safetensors, or AVERAGE, of the snapshot directory `path`: float32 arrays by name.

    Raises RunError where it is missing or damaged.
    """
    weights = read_arrays(path, file)
    for name, array in weights.items():
        if array.dtype != np.float32:
            raise RunError(
                f"{os.path.join(path, file)}: {excerpt(name)} is {array.dtype}, and float32 "
                "is needed"
            )
    return weights


def check_files(path: str) -> None:
    """Raise RunError where a file of arrays of the snapshot `path` is missing or cut off.

    Looks at the headers and sizes only, so a flipped bit in a weight is not seen.
    """
    for name in (WEIGHTS, AVERAGE, TRAINING_STATE):
        file_path = os.path.join(path, name)
        if name == WEIGHTS or os.path.lexists(file_path):
            with array_file_errors(path, name), safe_open(file_path, framework="numpy"):
                pass


def read_arrays(path: str, name: str) -> dict[str, np.ndarray]:
    """Read the file `name` of the snapshot directory `path`: arrays by name.

    Raises RunError where it is missing or damaged.
    """
    with array_file_errors(path, name):
        return load_file(os.path.join(path, name))


def check_checksum(path: str, name: str, snapshot: Snapshot) -> None:
    """Raise RunError unless the file `name` in `path` is the one that was written with `snapshot`.

    Snapshots of earlier versions do not say.
    """
    with array_file_errors(path, name):
        if snapshot.checksums and file_checksum(path, name) != snapshot.checksums.get(name):
            raise RunError(
                f"{os.path.join(path, name)} does not belong to the {DESCRIPTION} beside it: it "
                "was changed, or copied from elsewhere; use another snapshot"
            )


@contextmanager
def array_file_errors(path: str, name: str) -> Iterator[None]:
    """Turns what can go wrong with a file of arrays, which others may have made, into one line.

    safetensors bounds every offset by the file; numpy refuses shapes that it cannot hold.
    """
    file_path = os.path.join(path, name)
    try:
        check_regular(file_path)
        open(file_path, "rb").close()  # safetensors calls a file missing that may not be read
        yield
    except PermissionError as error:
        raise RunError(f"cannot read {file_path}: {error.strerror}") from None
    except FileNotFoundError:
        raise RunError(
            f"{path} is not a snapshot, or only part of one: it holds no {name}"
        ) from None
    except (TypeError, KeyError, AttributeError) as error:  # a type that numpy does not have
        raise RunError(f"{file_path} is not float32: {excerpt(str(error))}") from None
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise RunError(
            f"{file_path} is damaged or cut off ({excerpt(str(error))}); use another snapshot"
        ) from None


def file_checksum(path: str, name: str) -> int:
    """CRC-32 of the file `name` in `path`. Raises OSError."""
    total = 0
    with open(os.path.join(path, name), "rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total
