"""Snapshots: write, find and read them.

A snapshot is a directory `snapshot_<name>` that holds

    model.safetensors     parameters and buffers, float32, named as in torchvision
    training.safetensors  the rest of what a run needs to go on as if it had never stopped
    snapshot.json         what they belong to: model, classes, preprocessing, epoch, figures, flags

It is written under a temporary name beside its place, flushed to disk and renamed, so that it is
whole or is not there. Nothing of it is a pickle. foreign_checkpoint.py reads weights of others.
"""

import fcntl
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime

import numpy as np
import oneflow as flow
from oneflow import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

import foreign_checkpoint
import model_util
from config import PUBLISHED_FOLDER, SNAPSHOT_ROOT, RunError, UsageError
from file_util import link_files, replace_directory, sync_directory, write_durably
from foreign_checkpoint import Foreign
from image_util import Preprocessing, read_preprocessing
from layer_util import Switches, from_standard, to_standard
from metric_util import is_first_rank, notice

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
    flags: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
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


def local(tensor) -> flow.Tensor:
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


@contextmanager
def open_save_dir(save_dir: str | None, *, resumed: str | None = None) -> Iterator[str]:
    """The directory that snapshots go to, made, seen to be writable, and locked for this process.

    Unless one is given it is that of the snapshot `resumed`, else a new one under SNAPSHOT_ROOT,
    named after the time; of two runs that start within one second the later has `-2` behind it.
    Only the first process of a job does anything.

    Raises UsageError where it cannot be written, another process is using it, or it holds snapshots
    that this run does not go on from.
    """
    if save_dir is None and resumed is not None:
        save_dir = os.path.dirname(os.path.abspath(resumed))
    if not is_first_rank():
        yield save_dir or "the directory of the first process"
        return
    try:
        if save_dir is None:
            save_dir = make_timed_dir()
        os.makedirs(save_dir, exist_ok=True)
        probe = os.path.join(save_dir, f".{PREFIX}probe.tmp-{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
        handle = os.open(save_dir, os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f"--model_save_dir: cannot write to {error.filename}: {error.strerror}; give another"
        ) from None
    try:
        lock(handle, save_dir)
        check_held(save_dir, resumed)
        yield save_dir
    finally:
        os.close(handle)


def lock(handle: int, save_dir: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"--model_save_dir: another run is writing to {save_dir}; wait for its end, or give "
            "another directory"
        ) from None
    except OSError:  # a file system without locks
        pass


def check_held(save_dir: str, resumed: str | None) -> None:
    """Refuse a directory with snapshots that this run would overwrite.

    Where it goes on in a directory, what a killed process left there half-written is removed, and
    damaged snapshots get another name.
    """
    names = sorted(os.listdir(save_dir))
    held = [name for name in names if name.startswith(PREFIX)]
    if resumed is None or not os.path.samefile(os.path.dirname(os.path.abspath(resumed)), save_dir):
        if held:
            raise UsageError(
                f"--model_save_dir: {save_dir} already holds {held[0]} of another run; nothing is "
                "overwritten, so give another directory, or go on with --resume"
            )
        return
    start = position(read_description(resumed))
    for name in held:
        path = os.path.join(save_dir, name)
        if os.path.samefile(path, resumed):
            continue
        try:
            later = position(read_description(path)) > start
            read_weights(path)
            if os.path.exists(os.path.join(path, TRAINING_STATE)):
                read_training_state(path)
        except RunError:  # it must not stand in the way of a whole one
            aside = os.path.join(save_dir, f"damaged_{name}_{os.getpid()}")
            os.rename(path, aside)
            notice(f"{path} is damaged; it is now called {aside}.")
            continue
        if later:
            raise UsageError(
                f"--resume={resumed}: {save_dir} holds {name}, which is later and would be "
                "overwritten; give another --model_save_dir, or go on from the later one"
            )
    for name in names:
        if name.startswith(f".{PREFIX}") and ".tmp-" in name:  # of a run that was killed
            shutil.rmtree(os.path.join(save_dir, name), ignore_errors=True)


def position(snapshot: Snapshot) -> tuple[int, int]:
    """How far a run had got, for comparisons: updates, then finished epochs."""
    return snapshot.step, -1 if snapshot.epoch is None else snapshot.epoch


def make_timed_dir() -> str:
    stamp = datetime.now().strftime("%Y%m%d%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = f"./{SNAPSHOT_ROOT}/model_save-{stamp}{suffix}"
        try:
            os.makedirs(path)
            return path
        except FileExistsError:
            continue
    raise RunError(f"{path} and 998 more are taken; name one with --model_save_dir")


def save_snapshot(
    save_dir: str,
    name: str,
    model: nn.Module,
    snapshot: Snapshot,
    *,
    graph: nn.Graph | None = None,
    replace: bool = False,
) -> str:
    """Write `<save_dir>/snapshot_<name>` and return its path.

    Args:
        graph: the training graph, if the run is to go on from here.
        replace: put it in the place of one of the same name, which is whole until then.

    Raises RunError where it cannot be written, with the disk as it was before, or where a weight is
    not finite.
    """
    path = os.path.join(save_dir, PREFIX + name)
    write_snapshot(path, model, snapshot, graph=graph, replace=replace)
    return path


def write_snapshot(
    path: str,
    model: nn.Module,
    snapshot: Snapshot,
    *,
    graph: nn.Graph | None = None,
    replace: bool = False,
) -> None:
    """As `save_snapshot`, under any path."""
    arrays = state_arrays(model)
    for parameter, array in arrays.items():
        if not np.isfinite(array).all():
            raise RunError(f"{parameter} is no longer finite, so {path} is not written")
    with writing(path) as temporary:
        os.makedirs(temporary)
        write_durably(os.path.join(temporary, WEIGHTS), save(arrays))
        if graph is not None:
            state = save(training_arrays(graph, model))
            write_durably(os.path.join(temporary, TRAINING_STATE), state)
        text = json.dumps(asdict(snapshot), indent=2) + "\n"
        write_durably(os.path.join(temporary, DESCRIPTION), text.encode())
        put(temporary, path, replace=replace)


def link_snapshot(path: str, name: str) -> None:
    """Let `snapshot_<name>`, beside the snapshot `path`, be the same as it, from now on.

    The files are shared, and are there as long as one of the two is. Raises as `save_snapshot`.
    """
    target = os.path.join(os.path.dirname(path), PREFIX + name)
    with writing(target) as temporary:
        link_files(path, temporary)
        put(temporary, target, replace=True)


@contextmanager
def writing(path: str) -> Iterator[str]:
    """A temporary name beside `path`; nothing is left under it."""
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.tmp-{os.getpid()}")
    try:
        yield temporary
    except OSError as error:
        raise RunError(
            f"cannot save the model to {path}: {error.strerror}; earlier snapshots are untouched"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put(temporary: str, path: str, *, replace: bool) -> None:
    sync_directory(temporary)
    if replace:
        replace_directory(temporary, path)
    else:
        os.rename(temporary, path)
    sync_directory(os.path.dirname(path) or ".")


def prune_snapshots(save_dir: str, keep: int) -> None:
    """Remove the oldest `snapshot_epoch_<n>`, all but the newest `keep`, and nothing else."""
    numbers = sorted(
        int(match[1]) for match in map(EPOCH_NAME.fullmatch, os.listdir(save_dir)) if match
    )
    for number in numbers[:-keep]:
        path = os.path.join(save_dir, f"{PREFIX}epoch_{number}")
        temporary = os.path.join(save_dir, f".{PREFIX}epoch_{number}.tmp-{os.getpid()}")
        try:
            os.rename(path, temporary)  # a snapshot is whole or is not there
            shutil.rmtree(temporary)
        except OSError as error:
            raise RunError(f"--keep_snapshots: cannot remove {path}: {error.strerror}") from None


def find_snapshot(model_load_dir: str | None, *, model: str | None = None) -> str:
    """The weights to read: those named, else the first of these that is there and is of `model`:

    the published folder in the working directory, the newest snapshot under SNAPSHOT_ROOT, and,
    where `model` is given, the weights that were installed with it.

    Raises UsageError where there is none, with the ways to get one.
    """
    if model_load_dir is not None:
        if not (os.path.isdir(model_load_dir) or os.path.isfile(model_load_dir)):
            raise UsageError(
                f"--model_load_dir: there is no file or directory {model_load_dir}; check the path"
            )
        return model_load_dir
    if model in (None, "resnet50") and os.path.isdir(PUBLISHED_FOLDER):
        return PUBLISHED_FOLDER
    found = []
    for directory, names, _ in os.walk(SNAPSHOT_ROOT):
        names[:] = [name for name in names if not name.startswith(".")]
        for name in names:
            path = os.path.join(directory, name)
            description = os.path.join(path, DESCRIPTION)
            if (
                name.startswith(PREFIX)
                and os.path.isfile(description)
                and (model is None or is_of(path, model))
            ):
                # `last` shares its files with an epoch's snapshot, whose name says more.
                is_epoch = EPOCH_NAME.fullmatch(name) is not None
                found.append((os.stat(description).st_mtime_ns, is_epoch, path))
    if found:
        return max(found)[-1]
    installed = None if model is None else model_util.installed_weights(model)
    if installed is not None:
        return installed
    what, flag = ("", "") if model is None else (f" of {model}", f" --model={model}")
    with_weights = [name for name, entry in model_util.MODELS.items() if entry.weights is not None]
    raise UsageError(
        f"no snapshot{what} under {SNAPSHOT_ROOT}, and no folder {PUBLISHED_FOLDER}: train one "
        f"first (sh train.sh{flag}), name weights with --model_load_dir, or take those that were "
        f"installed, of --model={' or '.join(with_weights)}"
    )


def is_of(path: str, model: str) -> bool:
    """Whether a snapshot says that it is of this network. A damaged one says nothing."""
    try:
        return read_description(path).model == model
    except RunError:
        return False


def find_resume(resume: str | None, save_dir: str | None) -> str | None:
    """The snapshot that --resume means, seen to be whole; None for a fresh start.

    Args:
        resume: a snapshot, a directory of snapshots of which the newest whole one is taken, `auto`
            for that of `save_dir`, or None.
        save_dir: --model_save_dir.

    Raises UsageError where there is no such directory, or `auto` has no --model_save_dir; RunError
    where the snapshot cannot be gone on from.
    """
    if resume is None:
        return None
    if resume == "auto":
        if save_dir is None:
            raise UsageError("--resume=auto needs --model_save_dir: the directory of the run")
        if not os.path.isdir(save_dir):
            return None
        found = newest_whole(save_dir)
        if found is None and any(name.startswith(PREFIX) for name in os.listdir(save_dir)):
            raise RunError(
                f"none of the snapshots in {save_dir} is whole, see above; move them away for a "
                "fresh start"
            )
        return found
    if not os.path.isdir(resume):
        raise UsageError(f"--resume: there is no directory {resume}; check the path")
    resume = os.path.normpath(resume)
    if os.path.isfile(os.path.join(resume, DESCRIPTION)):
        check_whole(resume)
        return resume
    found = newest_whole(resume)
    if found is None:
        raise UsageError(f"--resume: {resume} holds no snapshot to go on from")
    return found


def newest_whole(save_dir: str) -> str | None:
    """The snapshot in `save_dir` that got furthest; damaged ones are named and passed over."""
    found = []
    for name in sorted(os.listdir(save_dir)):
        path = os.path.join(save_dir, name)
        if name.startswith(PREFIX) and os.path.isdir(path):
            try:
                is_epoch = EPOCH_NAME.fullmatch(name) is not None  # rather than its twin, `last`
                found.append((position(read_description(path)), is_epoch, path))
            except RunError as error:
                notice(f"Passed over: {error}.")
    for *_, path in sorted(found, reverse=True):
        try:
            check_whole(path)
            return path
        except RunError as error:
            notice(f"Passed over: {error}.")
    return None


def check_whole(path: str) -> None:
    """Raise RunError where a run cannot go on from the snapshot `path`."""
    if read_description(path).step > 0:
        if not os.path.exists(os.path.join(path, TRAINING_STATE)):
            raise RunError(
                f"{path} holds weights only, no {TRAINING_STATE}; start a new run from them with "
                f"--model_load_dir={path}"
            )
        read_training_state(path)
    read_weights(path)


def read_description(path: str) -> Snapshot:
    """Read snapshot.json of the snapshot directory `path`.

    Raises RunError where it is missing or damaged.
    """
    file_path = os.path.join(path, DESCRIPTION)
    try:
        with open(file_path, encoding="utf-8") as file:
            content = json.load(file)
        if content["format_version"] != FORMAT_VERSION:
            raise RunError(
                f"{file_path} is of format {content['format_version']}, and this version reads "
                f"{FORMAT_VERSION}"
            )
        content["preprocessing"] = read_preprocessing(content["preprocessing"])
        if content.get("classes") is not None:
            content["classes"] = tuple(content["classes"])
        snapshot = Snapshot(**content)
        snapshot.num_classes = int(snapshot.num_classes)
        kinds = {"epoch": int | None, "iteration": int, "step": int}
        kinds |= {"flags": dict, "metrics": dict, "best": dict}
        for name, kind in kinds.items():
            if not isinstance(getattr(snapshot, name), kind):
                raise TypeError(f"{name} is {getattr(snapshot, name)!r}")
        return snapshot
    except FileNotFoundError:
        raise RunError(
            f"{path} is no snapshot, or only part of one: it holds no {DESCRIPTION}"
        ) from None
    except OSError as error:
        raise RunError(f"cannot read {file_path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file_path} is damaged ({type(error).__name__}: {error}); use another snapshot"
        ) from None


def read_weights(path: str) -> dict[str, np.ndarray]:
    """Read model.safetensors of the snapshot directory `path`: float32 arrays by name.

    Raises RunError where it is missing or damaged.
    """
    weights = read_arrays(path, WEIGHTS)
    for name, array in weights.items():
        if array.dtype != np.float32:
            raise RunError(
                f"{os.path.join(path, WEIGHTS)}: {name} is {array.dtype}, and float32 is needed"
            )
    return weights


def read_training_state(path: str) -> dict[str, np.ndarray]:
    """Read training.safetensors of the snapshot directory `path`, as `training_arrays` gave it.

    Raises RunError where it is missing or damaged.
    """
    return read_arrays(path, TRAINING_STATE)


def read_arrays(path: str, name: str) -> dict[str, np.ndarray]:
    file_path = os.path.join(path, name)
    try:
        return load_file(file_path)
    except FileNotFoundError:
        raise RunError(f"{path} is no snapshot, or only part of one: it holds no {name}") from None
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{file_path} is damaged or cut off ({error}); use another snapshot"
        ) from None
    except (TypeError, KeyError) as error:  # a number format that numpy has not
        raise RunError(f"{file_path} is not of float32: {error}") from None


MAX_NAMES = 3  # of a kind, in one line


def mismatch(kind: str, names: list[str]) -> str:
    """`2 missing, first fc.bias, fc.weight`."""
    return f"{len(names)} {kind}, first {', '.join(names[:MAX_NAMES])}"


def standard_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and buffers by name, as snapshots hold them."""
    return {
        name: to_standard(model, name, np.empty(tuple(tensor.shape), np.bool_)).shape
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def load_weights(
    model: nn.Module, weights: dict[str, np.ndarray], *, path: str, finetune: bool = False
) -> None:
    """Copy arrays into a model that has not been moved to its placement yet.

    Args:
        finetune: leave the last layer as it is.

    Raises UsageError where names or shapes differ, with the first of each kind; RunError where a
    weight is no float32.
    """
    shapes = standard_shapes(model)
    if finetune:
        fresh = {name for name in shapes if foreign_checkpoint.is_last(name, shapes)}
        shapes = {name: shape for name, shape in shapes.items() if name not in fresh}
        weights = {name: array for name, array in weights.items() if name not in fresh}
    missing, unexpected = sorted(shapes.keys() - weights), sorted(weights.keys() - shapes)
    wrong = [
        f"{name} is {weights[name].shape}, not {shape}"
        for name, shape in sorted(shapes.items())
        if name in weights and weights[name].shape != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong}
    faults = [mismatch(kind, names) for kind, names in kinds.items() if names]
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
    """Weights to start from, a snapshot of ours or of others, with what is known of them."""

    path: str
    snapshot: Snapshot
    foreign: Foreign | None = None  # None: one of ours, not read yet

    def load(self, network: nn.Module, *, finetune: bool = False) -> None:
        """Copy the weights into a network. Raises as `load_weights` and `read_weights`."""
        if self.foreign is None:
            weights = read_weights(self.path)
        else:
            shapes = standard_shapes(network)
            weights = foreign_checkpoint.fit(self.foreign, shapes)
            auxiliary = {name for name in shapes if foreign_checkpoint.is_auxiliary(name)}
            if auxiliary and not auxiliary & weights.keys():
                own = state_arrays(network)
                weights = weights | {name: own[name] for name in auxiliary}
                self.foreign.notices.append(
                    "It has no auxiliary classifier, which only training uses; that one has random "
                    "weights."
                )
        load_weights(network, weights, path=self.path, finetune=finetune)

    def notices(self) -> list[str]:
        """What the user should know of weights of others."""
        if self.foreign is None:
            return []
        snapshot = self.snapshot
        text = (
            f"{self.path} is {self.foreign.kind}: taken as {snapshot.model} with "
            f"{snapshot.num_classes} classes"
        )
        return [text + ".", *self.foreign.notices]


def open_checkpoint(
    path: str, *, model: str | None = None, layout: str | None = None
) -> Checkpoint:
    """Weights of any known format. Only a snapshot of ours says what it is of.

    Args:
        model: the network of weights of others; unless given, it is guessed by their names.
        layout: see `foreign_checkpoint.read`.

    Raises RunError where it cannot be read, UsageError where the network cannot be told.
    """
    if os.path.exists(os.path.join(path, DESCRIPTION)):
        return Checkpoint(path, read_description(path))
    foreign = foreign_checkpoint.read(path, layout=layout)
    model = model or foreign_checkpoint.guess_model(foreign, model_util.MODELS, path=path)
    snapshot = Snapshot(
        model=model,
        num_classes=foreign_checkpoint.count_classes(foreign, path=path),
        preprocessing=model_util.preprocessing(model),
        versions=versions(),
    )
    return Checkpoint(path, snapshot, foreign)


def check_fits(
    snapshot: Snapshot,
    *,
    model: str | None,
    num_classes: int | None,
    path: str,
    finetune: bool | None = None,
) -> None:
    """Raise UsageError where flags ask for another network or class count than the snapshot's.

    Args:
        finetune: whether the class count may differ; None where there is no such flag.
    """
    if snapshot.model not in model_util.MODELS:
        raise UsageError(f"{path} holds a {snapshot.model}, which this version does not know")
    if model is not None and model != snapshot.model:
        raise UsageError(f"--model={model}, but {path} holds a {snapshot.model}")
    if num_classes is not None and num_classes != snapshot.num_classes and not finetune:
        way = "" if finetune is None else "; --finetune takes all of it but the last layer"
        raise UsageError(
            f"--num_classes={num_classes}, but {path} has {snapshot.num_classes} classes{way}"
        )


def restore(
    model_load_dir: str | None,
    *,
    model: str | None,
    num_classes: int | None,
    switches: Switches = Switches(),
    **preprocessing,
) -> tuple[nn.Module, Snapshot, str]:
    """The network of a snapshot, on the host, with what the snapshot says and its path.

    Args:
        model_load_dir: as in `find_snapshot`; of any format.
        model, num_classes: refused where they contradict the snapshot.
        switches: how the network is to compute; a snapshot fits any.
        preprocessing: fields of Preprocessing; what is not None replaces the snapshot's.
    """
    path = find_snapshot(model_load_dir, model=model)
    checkpoint = open_checkpoint(path, model=model)
    snapshot = checkpoint.snapshot
    check_fits(snapshot, model=model, num_classes=num_classes, path=path)
    snapshot.preprocessing = model_util.override(
        snapshot.preprocessing, model=snapshot.model, **preprocessing
    )
    network = model_util.MODELS[snapshot.model].build(snapshot.num_classes, switches)
    checkpoint.load(network)
    for text in checkpoint.notices():
        notice(text)
    return network, snapshot, path
