"""The one table of models."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import config
import resnet_model
from config import UsageError
from image_util import Preprocessing

# Of 0 to 255; the values of the original scripts.
RGB_MEAN = (123.68, 116.779, 103.939)
RGB_STD = (58.393, 57.12, 57.375)


@dataclass(frozen=True)
class Model:
    build: Callable  # num_classes, Switches -> nn.Module
    image_size: int = 224  # pixels, height and width of the input
    rgb_mean: tuple[float, float, float] = RGB_MEAN
    rgb_std: tuple[float, float, float] = RGB_STD


MODELS: dict[str, Model] = {
    "resnet18": Model(resnet_model.resnet18),
    "resnet50": Model(resnet_model.resnet50),
}


def preprocessing(model: str, **flags) -> Preprocessing:
    """The preprocessing of a model of the table, with the flags that are not None in its place."""
    entry = MODELS[model]
    own = Preprocessing(
        image_size=entry.image_size,
        resize_shorter=config.default_resize_shorter(entry.image_size),
        rgb_mean=entry.rgb_mean,
        rgb_std=entry.rgb_std,
    )
    return override(own, **flags)


def override(
    own: Preprocessing,
    *,
    image_size: int | None = None,
    resize_shorter: int | None = None,
    rgb_mean: tuple | None = None,
    rgb_std: tuple | None = None,
) -> Preprocessing:
    """`own` with what is not None in its place. A new image size brings its own resize_shorter.

    Raises UsageError where the crop would not fit into the resized picture.
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
    if result.resize_shorter < result.image_size:
        raise UsageError(
            f"--resize_shorter={result.resize_shorter} is less than the crop, --image_size="
            f"{result.image_size}"
        )
    return result
