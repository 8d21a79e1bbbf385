"""Weights from elsewhere: read, with the names and layouts of snapshots.

.safetensors                    of PyTorch, with torchvision's or timm's names
.pth, .pt                       of PyTorch's torch.save, in its zip format and in the one before
a folder with `pickled_data`    of OneFlow's flow.save
a folder of folders with `out`  of OneFlow in 2020, and of flow.save of a graph
"""

import math
import os
import re
from dataclasses import dataclass, field

import numpy as np

from cnns.checkpoint.folders import PICKLE_NAME, has_variables, read_flow_save, read_variables
from cnns.checkpoint.pickles import Refused, excerpt
from cnns.checkpoint.pytorch import OLD_PTH_MAGIC, read_old_pth, read_safetensors, read_zip_pth
from cnns.errors import RunError, UsageError
from cnns.inputs import check_ordinary
from cnns.models.model import Models

ZIP_MAGIC = b"PK\x03\x04"
PREFIXES = ("module.", "_orig_mod.", "model.")
LAYOUTS = ("OIHW", "OHWI")
MAX_NAME = 1000  # characters


@dataclass
class ExternalWeights:
    """Weights from elsewhere, named as in torchvision where the names were known."""

    kind: str  # what the file is, for the user
    arrays: dict[str, np.ndarray]
    flat: bool = False  # shapes are not known: arrays are (N,)
    from_2020: bool = False  # layouts may be (O, H, W, I), and the stem may have a fourth channel
    layout: str | None = None  # OIHW or OHWI, where the user says so
    notices: list[str] = field(default_factory=list)


def read_external(path: str, *, layout: str | None = None) -> ExternalWeights:
    """Read the weights in the file or folder `path`, whatever their format.

    Args:
        layout: of the convolutions, OIHW or OHWI, for a 2020 folder without shapes.

    Raises RunError where it is damaged, in an unknown format, or holds more than data.
    """
    try:
        external = read_folder(path) if os.path.isdir(path) else read_file(path)
    except Refused as error:
        way = "flow.save" if os.path.isdir(path) else "torch.save"
        raise RunError(
            f"{path} is refused: {error}; a file that holds nothing but weights is written by "
            f"{way}(model.state_dict(), PATH)"
        ) from None
    except OSError as error:
        raise RunError(f"cannot read {error.filename or path}: {error.strerror}") from None
    external.layout = layout
    if any(len(name) > MAX_NAME for name in external.arrays):
        raise RunError(f"{path} has a tensor with a name of more than {MAX_NAME} characters")
    external.arrays = {
        name: array
        for name, array in strip(external.arrays).items()
        if not name.endswith("num_batches_tracked")
    }
    if not external.from_2020:
        external.arrays = from_timm(external.arrays)
    for name, array in external.arrays.items():
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise RunError(f"{path}: {excerpt(name)} is not finite; use other weights")
    if not external.arrays:
        raise RunError(f"{path} holds no weights")
    return external


def read_folder(path: str) -> ExternalWeights:
    if os.path.isfile(os.path.join(path, PICKLE_NAME)):
        return ExternalWeights("a folder of flow.save", read_flow_save(path))
    if has_variables(path):
        arrays, has_shapes = read_variables(path)
        renamed = from_2020(arrays)
        if not renamed:
            return ExternalWeights("a folder of OneFlow", arrays, flat=not has_shapes)
        kind = "a OneFlow folder of 2020"
        return ExternalWeights(kind, renamed, flat=not has_shapes, from_2020=True)
    raise RunError(
        f"{path} is not a snapshot, or only part of one: it holds no snapshot.json, and no weights "
        "in another known format either"
    )


def read_file(path: str) -> ExternalWeights:
    check_ordinary(path)
    with open(path, "rb") as file:
        start = file.read(len(OLD_PTH_MAGIC))
    size = os.path.getsize(path)
    if start.startswith(ZIP_MAGIC):
        return ExternalWeights("a file of PyTorch", read_zip_pth(path))
    if start == OLD_PTH_MAGIC:
        return ExternalWeights("a file of PyTorch before 1.6", read_old_pth(path))
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return ExternalWeights("a safetensors file", read_safetensors(path))
    if path.endswith(".safetensors"):
        raise RunError(f"{path} is damaged or cut off: its safetensors header is not whole")
    if start[:1] == b"\x80":
        raise RunError(
            f"{path} is a pickle, but not a file of PyTorch; in PyTorch, convert it by "
            "torch.save(model.state_dict(), PATH)"
        )
    raise RunError(
        f"{path} is not in a known format; give a snapshot, .safetensors, .pth or a folder of "
        "OneFlow"
    )


# Names.


def strip(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without a prefix that all names share, as wrappers put before them."""
    for prefix in PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            return strip({name.removeprefix(prefix): array for name, array in arrays.items()})
    return arrays


BATCH_NORM_2020 = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
NAME_2020 = re.compile(
    "Resnet-(?P<layer>conv1|fc1001|res(?P<stage>[2-5])_(?P<block>[0-9]+)_branch(?P<branch>1|2[abc]))"
    "(?P<bn>_bn(_add)?(_relu)?)?-(?P<what>[a-z_]+)"
)


def from_2020_name(name: str) -> str:
    """`layer1.0.bn3.weight` of `Resnet-res2_0_branch2c_bn_add_relu-gamma`; others unchanged."""
    match = NAME_2020.fullmatch(name)
    if match is None:
        return name
    layer, what, bn = match["layer"], match["what"], match["bn"] is not None
    if bn != (what in BATCH_NORM_2020):
        return name
    what = BATCH_NORM_2020.get(what, what)
    if layer == "fc1001":
        return f"fc.{what}"
    if layer == "conv1":
        return f"{'bn1' if bn else 'conv1'}.{what}"
    block = f"layer{int(match['stage']) - 1}.{match['block']}"
    if match["branch"] == "1":
        return f"{block}.downsample.{int(bn)}.{what}"
    return f"{block}.{'bn' if bn else 'conv'}{'abc'.index(match['branch'][1]) + 1}.{what}"


def from_2020(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the network of 2020, with our names."""
    of_network = [name for name in arrays if name.startswith("Resnet-")]
    renamed = {from_2020_name(name): arrays[name] for name in of_network}
    if len(renamed) < len(of_network):
        raise Refused("two of its variables are the same parameter")
    return renamed


def from_timm(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's names as torchvision's, where the two differ: VGG and MobileNetV2.

    Its ResNet, ResNeXt and Inception-v3 have torchvision's names.
    """
    if "pre_logits.fc1.weight" in arrays:
        rename = timm_vgg
    elif "conv_stem.weight" in arrays and "blocks.6.0.bn3.weight" in arrays:
        rename = timm_mobilenetv2
    else:
        return arrays
    result = {rename(name): array for name, array in arrays.items()}
    for name in ("classifier.0.weight", "classifier.3.weight"):  # convolutions in timm
        if name in result and result[name].ndim == 4:
            result[name] = result[name].reshape(len(result[name]), -1)
    return result if len(result) == len(arrays) else arrays


def timm_vgg(name: str) -> str:
    for theirs, ours in (("pre_logits.fc1.", 0), ("pre_logits.fc2.", 3), ("head.fc.", 6)):
        name = name.replace(theirs, f"classifier.{ours}.")
    return name


MOBILENETV2_DEPTHS = (1, 2, 3, 4, 3, 3, 1)  # blocks of each stage
MOBILENETV2_ENDS = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.18.0",
    "bn2": "features.18.1",
    "classifier": "classifier.1",
}
MOBILENETV2_FIRST = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
MOBILENETV2_BLOCK = {
    **{"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1"},
    **{"conv_pwl": "2", "bn3": "3"},
}


def timm_mobilenetv2(name: str) -> str:
    layer, _, what = name.rpartition(".")
    match = re.fullmatch(r"blocks\.([0-6])\.([0-9])\.(\w+)", layer)
    if match is None:
        return f"{MOBILENETV2_ENDS[layer]}.{what}" if layer in MOBILENETV2_ENDS else name
    stage, block = int(match[1]), int(match[2])
    parts = MOBILENETV2_FIRST if stage == 0 else MOBILENETV2_BLOCK
    if match[3] not in parts:
        return name
    number = 1 + sum(MOBILENETV2_DEPTHS[:stage]) + block
    return f"features.{number}.conv.{parts[match[3]]}.{what}"


# Which network it is, and whether it fits.

AUXILIARY = "AuxLogits"  # Inception's second head


def guess_model(external: ExternalWeights, models: Models, *, path: str) -> str:
    """The network, by names and shapes of its weights. Raises UsageError where none matches."""
    if external.from_2020:
        return "resnet50"
    for model, entry in models.items():
        if entry.signature is None:
            continue
        name, shape = entry.signature
        array = external.arrays.get(name)
        if array is not None and (
            array.shape == shape or (external.flat and array.size == math.prod(shape))
        ):
            return model
    raise UsageError(
        f"{path} is {external.kind}, and its names match no network here; give --model"
    )


def is_last(name: str, last_layer: str) -> bool:
    """Whether the parameter `name` has a row for each class."""
    return name.rpartition(".")[0] in (last_layer, f"{AUXILIARY}.fc")


def is_auxiliary(name: str) -> bool:
    """Whether a parameter is of a head that only training uses, which others may leave out."""
    return name.startswith(f"{AUXILIARY}.")


def count_classes(external: ExternalWeights, last_layer: str, *, path: str) -> int:
    """Rows of the last layer. Raises UsageError where there is none."""
    array = external.arrays.get(f"{last_layer}.{'bias' if external.flat else 'weight'}")
    if array is None or not array.size or array.ndim == 0:
        raise UsageError(
            f"{path} is {external.kind}, and it lacks the last layer ({last_layer}), which gives "
            "the number of classes"
        )
    return len(array)


def fit(external: ExternalWeights, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays in the layout of snapshots, as far as they fit `shapes`; others as they are.

    A folder of 2020 may hold convolutions as (O, H, W, I), which their shapes show. Without `meta`
    there are no shapes, and both layouts have the same size: (O, I, H, W) is then assumed, with a
    notice, unless `external.layout` says otherwise. A fourth input channel of the stem, which has
    only ever seen zeros, is cut off.
    """
    if not (external.flat or external.from_2020):
        return external.arrays
    layout = external.layout if external.flat else find_layout(external.arrays, shapes)
    if layout is None:
        layout = LAYOUTS[0]
        external.notices.append(
            "No meta files: the convolutions are taken as (O, I, H, W). If they are (O, H, W, I), "
            "of a run with --channel_last: tools/convert_snapshot.py SRC DST --layout=OHWI."
        )
    return {
        name: fit_one(array, shapes[name], layout, flat=external.flat) if name in shapes else array
        for name, array in external.arrays.items()
    }


def stored_shape(shape: tuple[int, ...], layout: str, size: int) -> tuple[int, ...]:
    """The shape in which a folder of 2020 holds `size` numbers of a parameter."""
    if len(shape) != 4:
        return shape
    o, i, h, w = shape
    if i == 3 and size == o * 4 * h * w:
        i = 4
    return (o, i, h, w) if layout == "OIHW" else (o, h, w, i)


def find_layout(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> str:
    """OIHW or OHWI, by the shapes of all convolutions together."""
    votes = set()
    for name, array in arrays.items():
        shape = shapes.get(name, ())
        fitting = {x for x in LAYOUTS if stored_shape(shape, x, array.size) == array.shape}
        if len(fitting) == 1:
            votes |= fitting
    return votes.pop() if len(votes) == 1 else "OIHW"  # what differs is reported as a wrong shape


def fit_one(array: np.ndarray, shape: tuple[int, ...], layout: str, *, flat: bool) -> np.ndarray:
    stored = stored_shape(shape, layout, array.size)
    if flat and array.size == math.prod(stored):
        array = array.reshape(stored)
    if len(shape) != 4 or array.shape != stored:
        return array
    if layout == "OHWI":
        array = array.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(array[:, : shape[1]])
