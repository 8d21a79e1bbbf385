"""What the scripts know of a network beside its code: one record each.

The records are in the table of model_registry.py; what is here takes that table as `models`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec

from oneflow import nn

from cnns.data.images import Preprocessing
from cnns.errors import UsageError
from cnns.models.layers import Switches

# Of 0 to 255; the values of the original scripts.
RGB_MEAN = (123.68, 116.779, 103.939)
RGB_STD = (58.393, 57.12, 57.375)
ALL_SWITCHES = frozenset(field.name for field in fields(Switches))


def default_resize_shorter(image_size: int) -> int:
    """256 for 224 pixels, the ratio of the recipe, and in proportion for other sizes."""
    return round(image_size * 256 / 224)


@dataclass(frozen=True)
class Model:
    """A network of the table.

    Args:
        network: number of classes and Switches to nn.Module.
        signature: a parameter, and its shape, by which its weights are told from those of others.
        last_layer: the layer whose rows are the classes.
        image_size: height and width of the input, pixels.
        rgb_mean, rgb_std: of 0 to 255.
        interpolation: of validation and inference.
        min_image_size: pixels; with less, nothing would be left of the image.
        switches: the fields of Switches that it has.
        learning_rates: per 256 images, where they are not those of config.LEARNING_RATE_PER_256.
        trial: what a first try on a CPU takes in place of config.CPU_TRIAL.
        weights: the package of requirements.txt that has weights of it, and the file in that.
    """

    network: Callable[[int, Switches], nn.Module]
    signature: tuple[str, tuple[int, ...]] | None = None
    last_layer: str = "fc"
    image_size: int = 224
    rgb_mean: tuple[float, float, float] = RGB_MEAN
    rgb_std: tuple[float, float, float] = RGB_STD
    interpolation: str = "bilinear"
    min_image_size: int = 8
    switches: frozenset[str] = frozenset()
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    trial: Mapping[str, int] = field(default_factory=dict)
    weights: tuple[str, str] | None = None

    def build(self, num_classes: int, switches: Switches = Switches()) -> nn.Module:
        """The network with initial weights. The switches are those it has: see `check_switches`."""
        return self.network(num_classes, switches)

    def installed_weights(self) -> str | None:
        """The file of pretrained weights that was installed for it, if any."""
        if self.weights is None:
            return None
        package, name = self.weights
        found = find_spec(package)  # runs nothing of it
        if found is None:
            return None
        path = os.path.join(found.submodule_search_locations[0], name)
        return os.path.relpath(path) if os.path.isfile(path) else None

    def preprocessing(self, **given) -> Preprocessing:
        """Its own preprocessing, with what is given and not None in its place."""
        own = Preprocessing(
            image_size=self.image_size,
            resize_shorter=default_resize_shorter(self.image_size),
            rgb_mean=self.rgb_mean,
            rgb_std=self.rgb_std,
            interpolation=self.interpolation,
        )
        return self.override(own, **given)

    def override(
        self,
        own: Preprocessing,
        *,
        image_size: int | None = None,
        resize_shorter: int | None = None,
        rgb_mean: tuple | None = None,
        rgb_std: tuple | None = None,
    ) -> Preprocessing:
        """`own` with what is not None in its place. A new image size brings its own resize_shorter.

        Raises UsageError where the crop would not fit into the resized picture, or the network
        cannot take pictures so small.
        """
        if image_size is not None and resize_shorter is None:
            resize_shorter = default_resize_shorter(image_size)
        given = {
            "image_size": image_size,
            "resize_shorter": resize_shorter,
            "rgb_mean": rgb_mean,
            "rgb_std": rgb_std,
        }
        result = replace(own, **{name: value for name, value in given.items() if value is not None})
        if result.image_size < self.min_image_size:
            raise UsageError(
                f"--image_size={result.image_size} is too small for {self.network.__name__}; give "
                f"at least {self.min_image_size}"
            )
        if result.resize_shorter < result.image_size:
            raise UsageError(
                f"--resize_shorter={result.resize_shorter} is less than the crop, --image_size="
                f"{result.image_size}"
            )
        return result


Models = Mapping[str, Model]


def check_switches(models: Models, name: str, switches: Switches) -> None:
    """Raise UsageError for a switch that the network `name` does not have."""
    for switch in sorted(ALL_SWITCHES - models[name].switches):
        if getattr(switches, switch):
            having = ", ".join(n for n, model in models.items() if switch in model.switches)
            raise UsageError(f"--{switch}: {name} cannot do that, only {having} can; leave it out")
