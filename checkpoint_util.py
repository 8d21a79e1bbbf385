"""Snapshots: write, find and read them.

A snapshot is a directory `snapshot_<name>` that holds

    model.safetensors   parameters and buffers, float32, named as in torchvision
    snapshot.json       what the weights belong to: model, classes, preprocessing, epoch, figures

It is written under a temporary name beside its place, flushed to disk and renamed, so that it is
whole or is not there. Nothing of it is a pickle.
"""

import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from datetime import datetime

import numpy as np
import oneflow as flow
from oneflow import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

import model_util
from config import SNAPSHOT_ROOT, RunError, UsageError
from file_util import sync_directory, write_durably
from image_util import Preprocessing

FORMAT_VERSION = 1
PREFIX = "snapshot_"
WEIGHTS = "model.safetensors"
DESCRIPTION = "snapshot.json"


@dataclass
class Snapshot:
    """What snapshot.json says."""

    model: str
    num_classes: int
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None  # names, in label order
    epoch: int | None = None  # last finished epoch, from 0; None before the first
    step: int = 0  # updates made
    metrics: dict = field(default_factory=dict)
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
    """Parameters and buffers of a model as float32 arrays, by name.

    `num_batches_tracked` is left out: nothing counts it inside a graph, and PyTorch fills it in.
    """
    arrays = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            arrays[name] = np.ascontiguousarray(local(tensor).numpy(), np.float32)
    return arrays


def local(tensor) -> flow.Tensor:
    """The whole of a tensor as an ordinary one of this process."""
    if tensor.is_global:
        tensor = tensor.to_global(sbp=flow.sbp.broadcast).to_local()
    return tensor


def prepare_save_dir(save_dir: str | None) -> str:
    """Make the directory that snapshots go to, see that it can be written, and return it.

    Unless one is given it is a new one under SNAPSHOT_ROOT, named after the time; of two runs that
    start within one second the later has `-2` behind it.

    Raises UsageError where it cannot be written, or holds the snapshots of another run.
    """
    try:
        if save_dir is None:
            return make_timed_dir()
        os.makedirs(save_dir, exist_ok=True)
        probe = os.path.join(save_dir, f".{PREFIX}probe-{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
        held = sorted(name for name in os.listdir(save_dir) if name.startswith(PREFIX))
    except OSError as error:
        raise UsageError(
            f"--model_save_dir: cannot write to {error.filename}: {error.strerror}; give another"
        ) from None
    if held:
        raise UsageError(
            f"--model_save_dir: {save_dir} already holds {held[0]} of another run; nothing is "
            "overwritten, so give another directory"
        )
    return save_dir


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


def save_snapshot(save_dir: str, name: str, model: nn.Module, snapshot: Snapshot) -> str:
    """Write `<save_dir>/snapshot_<name>` and return its path.

    Raises RunError where it cannot be written, with the disk as it was before.
    """
    path = os.path.join(save_dir, PREFIX + name)
    temporary = os.path.join(save_dir, f".{PREFIX}{name}.tmp-{os.getpid()}")
    try:
        os.makedirs(temporary)
        write_durably(os.path.join(temporary, WEIGHTS), save(state_arrays(model)))
        text = json.dumps(asdict(snapshot), indent=2) + "\n"
        write_durably(os.path.join(temporary, DESCRIPTION), text.encode())
        sync_directory(temporary)
        os.rename(temporary, path)
        sync_directory(save_dir)
    except OSError as error:
        raise RunError(
            f"cannot save the model to {path}: {error.strerror}; earlier snapshots are untouched"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def find_snapshot(model_load_dir: str | None) -> str:
    """The snapshot to read: the one named, else the newest under SNAPSHOT_ROOT.

    Raises UsageError where there is none, with the ways to get one.
    """
    if model_load_dir is not None:
        if not os.path.isdir(model_load_dir):
            raise UsageError(
                f"--model_load_dir: there is no directory {model_load_dir}; check the path"
            )
        return model_load_dir
    found = []
    for directory, names, _ in os.walk(SNAPSHOT_ROOT):
        names[:] = [name for name in names if not name.startswith(".")]
        for name in names:
            path = os.path.join(directory, name)
            description = os.path.join(path, DESCRIPTION)
            if name.startswith(PREFIX) and os.path.isfile(description):
                found.append((os.stat(description).st_mtime_ns, path))
    if not found:
        raise UsageError(
            f"no snapshot under {SNAPSHOT_ROOT}: train one first (sh train.sh), or name one with "
            "--model_load_dir"
        )
    return max(found)[1]


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
        settings = content["preprocessing"]
        content["preprocessing"] = Preprocessing(
            image_size=int(settings["image_size"]),
            resize_shorter=int(settings["resize_shorter"]),
            rgb_mean=tuple(map(float, settings["rgb_mean"])),
            rgb_std=tuple(map(float, settings["rgb_std"])),
        )
        if content.get("classes") is not None:
            content["classes"] = tuple(content["classes"])
        snapshot = Snapshot(**content)
        snapshot.num_classes = int(snapshot.num_classes)
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
    file_path = os.path.join(path, WEIGHTS)
    try:
        weights = load_file(file_path)
    except FileNotFoundError:
        raise RunError(
            f"{path} is no snapshot, or only part of one: it holds no {WEIGHTS}"
        ) from None
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{file_path} is damaged or cut off ({error}); use another snapshot"
        ) from None
    except (TypeError, KeyError) as error:  # a number format that numpy has not
        raise RunError(f"{file_path} is not of float32: {error}") from None
    for name, array in weights.items():
        if array.dtype != np.float32:
            raise RunError(f"{file_path}: {name} is {array.dtype}, and float32 is needed")
    return weights


def load_weights(model: nn.Module, weights: dict[str, np.ndarray], *, path: str) -> None:
    """Copy arrays into a model that has not been moved to its placement yet.

    Raises UsageError where names or shapes differ, with the first of each kind.
    """
    state = model.state_dict()
    wanted = {name for name in state if not name.endswith("num_batches_tracked")}
    faults = []
    for kind, names in (("missing", wanted - weights.keys()), ("unknown", weights.keys() - wanted)):
        if names:
            faults.append(f"{len(names)} {kind}, first {min(names)}")
    for name in sorted(wanted & weights.keys()):
        if tuple(state[name].shape) != weights[name].shape:
            faults.append(f"{name} is {weights[name].shape}, not {tuple(state[name].shape)}")
            break
    if faults:
        raise UsageError(f"the weights of {path} do not fit the network: {'; '.join(faults)}")
    for name in wanted:
        state[name] = flow.tensor(weights[name])
    model.load_state_dict(state)


def check_fits(snapshot: Snapshot, *, model: str | None, num_classes: int | None, path: str):
    """Raise UsageError where flags ask for another network or class count than the snapshot's."""
    if snapshot.model not in model_util.MODELS:
        raise UsageError(f"{path} holds a {snapshot.model}, which this version does not know")
    if model is not None and model != snapshot.model:
        raise UsageError(f"--model={model}, but {path} holds a {snapshot.model}")
    if num_classes is not None and num_classes != snapshot.num_classes:
        raise UsageError(
            f"--num_classes={num_classes}, but {path} has {snapshot.num_classes} classes"
        )


def restore(
    model_load_dir: str | None, *, model: str | None, num_classes: int | None, **preprocessing
) -> tuple[nn.Module, Snapshot, str]:
    """The network of a snapshot, on the host, with what the snapshot says and its path.

    Args:
        model_load_dir: as in `find_snapshot`.
        model, num_classes: refused where they contradict the snapshot.
        preprocessing: fields of Preprocessing; what is not None replaces the snapshot's.
    """
    path = find_snapshot(model_load_dir)
    snapshot = read_description(path)
    check_fits(snapshot, model=model, num_classes=num_classes, path=path)
    snapshot.preprocessing = model_util.override(snapshot.preprocessing, **preprocessing)
    network = model_util.MODELS[snapshot.model].build(snapshot.num_classes)
    load_weights(network, read_weights(path), path=path)
    return network, snapshot, path
