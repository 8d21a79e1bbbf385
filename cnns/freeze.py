"""Parts of a network that are not trained: `--freeze`.

Their parameters get no gradient and no update, and their batch norms normalise by the statistics
that they came with, which stay as they are.
"""

from collections.abc import Iterable

from oneflow import nn

from cnns.errors import UsageError
from cnns.models.layers import BATCH_NORMS

BACKBONE = "backbone"  # all but the last layer


def is_within(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a parameter or module is one of `prefixes`, or below one: layer1.0 is in layer1."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def freeze(model: nn.Module, prefixes: tuple[str, ...], *, last_layer: str) -> list[nn.Module]:
    """Freeze parts of a network by their names; BACKBONE is all but `last_layer`.

    Returns their batch norms, which have to be set to evaluation whenever the network is set to
    training. Raises UsageError for a name that is none of the network, or where nothing is left.
    """
    known = {*dict(model.named_modules()), *dict(model.named_parameters())}
    for prefix in prefixes:
        if prefix not in known and prefix != BACKBONE:
            children = ", ".join(name for name, _ in model.named_children())
            raise UsageError(
                f"--freeze={prefix}: the network has no such part; it has {children}, what is "
                f"below them (layer1.0), and {BACKBONE}, which is all but {last_layer}"
            )

    def is_frozen(name: str) -> bool:
        rest = BACKBONE in prefixes and not is_within(name, (last_layer,))
        return rest or is_within(name, prefixes)

    parameters = dict(model.named_parameters())
    frozen = [name for name in parameters if is_frozen(name)]
    if len(frozen) == len(parameters):
        raise UsageError(f"--freeze={','.join(prefixes)} leaves nothing to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and is_frozen(name)
    ]
