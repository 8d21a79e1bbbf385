"""What the scripts know of a network besides its code: one record each.

The records are in the table of model_registry.py; what is here takes that table as `models`.

A network takes images (N, 3, H, W) float32 and gives logits (N, classes). Its convolutions are
`cnns.models.products.Convolution`, which is quicker on a CPU, its dropout is
`cnns.models.layers.Dropout`, since OneFlow's own draws equal masks inside a graph. One that has a
second classifier gives a pair of logits while it trains, and has `auxiliary_weight`. Parameters are
named as in PyTorch's version of it, and are the same whatever `Switches` say.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from oneflow import nn

from cnns.data.images import Preprocessing
from cnns.errors import UsageError
from cnns.models.layers import Switches

# Of 0 to 255; the values of the original scripts.
RGB_MEAN = (123.68, 116.779, 103.939)
RGB_STD = (58.393, 57.12, 57.375)
ALL_SWITCHES = frozenset(vars(Switches()))


def default_resize_shorter(image_size: int) -> int:
    """256 for 224 pixels, the ratio of the recipe, and in proportion for other sizes."""
    return round(image_size * 256 / 224)


@dataclass(frozen=True)
class Model:
    """A network of the table."""

    network: Callable[..., nn.Module]  # takes the number of classes and, if it has any, Switches
    # A parameter and its shape by which its weights are recognised.
    signature: tuple[str, tuple[int, ...]] | None = None
    last_layer: str = "fc"  # whose rows are the classes
    image_size: int = 224  # height and width of the input, pixels
    rgb_mean: tuple[float, float, float] = RGB_MEAN
    rgb_std: tuple[float, float, float] = RGB_STD
    interpolation: str = "bilinear"  # of validation and inference
    min_image_size: int = 8  # below it, pooling would leave no pixels
    switches: frozenset[str] = frozenset()  # the fields of Switches that it has
    has_blocks: bool = False  # that `drop_blocks` can leave out: they have `drop`
    # Per 256 images, where they are not those of config.LEARNING_RATE_PER_256.
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    # What a first try on a CPU takes in place of cnns.flags.defaults.CPU_TRIAL.
    trial: Mapping[str, int] = field(default_factory=dict)
    # The package of requirements.txt that has weights of it, and the file in that.
    weights: tuple[str, str] | None = None

    def build(self, num_classes: int, switches: Switches = Switches()) -> nn.Module:
        """The network with initial weights. The switches are those it has: see `check_switches`."""
        return self.network(num_classes, switches) if self.switches else self.network(num_classes)

    def installed_weights(self) -> str | None:
        """The file of pretrained weights that was installed for it, if any."""
        if self.weights is None:
            return None
        package, name = self.weights
        found = find_spec(package)  # runs nothing of it
        if found is None or not found.submodule_search_locations:
            return None
        path = os.path.join(found.submodule_search_locations[0], name)
        return os.path.relpath(path) if os.path.isfile(path) else None

    def preprocessing(self, **given: Any) -> Preprocessing:
        """Its own preprocessing, overridden by what is given."""
        own = Preprocessing(
            self.image_size,
            default_resize_shorter(self.image_size),
            self.rgb_mean,
            self.rgb_std,
            self.interpolation,
        )
        return self.override(own, **given)

    def override(self, own: Preprocessing, **given: Any) -> Preprocessing:
        """`own` with the given fields that are not None. A new image size changes resize_shorter
        too, unless that is given.

        Raises UsageError where the crop would not fit into the resized picture, or the network
        cannot take pictures so small.
        """
        fields = {name: value for name, value in given.items() if value is not None}
        if "image_size" in fields:
            fields.setdefault("resize_shorter", default_resize_shorter(fields["image_size"]))
        result = replace(own, **fields)
        self.check_size(result.image_size, "--image_size")
        if result.resize_shorter < result.image_size:
            raise UsageError(
                f"--resize_shorter={result.resize_shorter} is less than the crop, --image_size="
                f"{result.image_size}"
            )
        return result

    def check_size(self, size: int, flag: str) -> None:
        """Raise UsageError where the network cannot take images of `size` pixels."""
        if size < self.min_image_size:
            name = self.network.__name__.lower()
            raise UsageError(
                f"{flag}={size} is too small for {name}; give at least {self.min_image_size}"
            )


Models = Mapping[str, Model]


def check_blocks(models: Models, name: str, *, stochastic_depth: float) -> None:
    """Raise UsageError where the network `name` has no blocks to leave out."""
    if stochastic_depth and not models[name].has_blocks:
        having = ", ".join(n for n, model in models.items() if model.has_blocks)
        raise UsageError(
            f"--stochastic_depth: {name} cannot do that, only {having} can; leave it out"
        )


def check_switches(models: Models, name: str, switches: Switches) -> None:
    """Raise UsageError for a switch that the network `name` does not have."""
    for switch in sorted(ALL_SWITCHES - models[name].switches):
        if getattr(switches, switch):
            having = ", ".join(n for n, model in models.items() if switch in model.switches)
            raise UsageError(f"--{switch}: {name} cannot do that, only {having} can; leave it out")
