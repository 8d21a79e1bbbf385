"""Make mixing.npz, the golden file of tests/test_mixing.py, with torchvision on a CPU.

    python3.11 -m venv venv-torchvision
    venv-torchvision/bin/pip install torch==2.14.1 torchvision==0.29.1
    venv-torchvision/bin/python tests/golden/make_mixing.py

torchvision's MixUp and CutMix mix each row with the one before it. Of two rows that are each
other, so pairs are handed to them one by one. Training is that of make_recipes.py, in float64, with
lambdas and boxes drawn here once more, as the toolkit's documentation says. Nothing here imports
the project.
"""

from pathlib import Path

import make_recipes
import numpy as np
import seeded
import torch
import torchvision
from make_recipes import BATCH, NUM_CLASSES, SMOOTHING, STEPS
from torch.nn import functional
from torchvision.transforms import v2

FILE = Path(__file__).resolve().parent / "mixing.npz"
SIZE, SEED, STEPS_PER_EPOCH = BATCH["pixels"], 7, 8
# lambda and the centre of the box
BOXES = [(0.0, 5, 9), (0.3, 0, 0), (0.51, 15, 2), (0.75, 8, 8), (0.999, 3, 14), (1.0, 6, 6)]
ALPHAS = (0.2, 1.0)  # of mixup and CutMix
LOSSES = {
    "cross_entropy": lambda logits, target: functional.cross_entropy(
        logits, target, label_smoothing=SMOOTHING
    ),
    # timm: targets are mixed from smoothed ones, which is the same as smoothing mixed ones
    "bce": lambda logits, target: functional.binary_cross_entropy_with_logits(
        logits, target * (1 - SMOOTHING) + SMOOTHING / NUM_CLASSES
    ),
}


class Fixed:
    """In the place of a beta distribution."""

    def __init__(self, value: float):
        self.value = value

    def sample(self, _):
        return torch.tensor([self.value], dtype=torch.float64)


def mix_by_pairs(transform, image: torch.Tensor, label: torch.Tensor) -> tuple:
    pairs = zip(image.split(2), label.split(2), strict=True)
    images, targets = zip(*(transform(*pair) for pair in pairs), strict=True)
    return torch.cat(images), torch.cat(targets)


def mixup(lam: float):
    transform = v2.MixUp(alpha=1.0, num_classes=NUM_CLASSES)
    transform._dist = Fixed(lam)
    return transform


def cutmix(lam: float, x: int, y: int):
    transform = v2.CutMix(alpha=1.0, num_classes=NUM_CLASSES)
    transform._dist = Fixed(lam)

    def make_params(inputs):
        centres, original = iter((x, y)), torch.randint
        torch.randint = lambda *_, size: torch.tensor([next(centres)])
        try:
            return v2.CutMix.make_params(transform, inputs)
        finally:
            torch.randint = original

    transform.make_params = make_params
    return transform


def draw(step: int):
    """The transform of a step: by (seed, 2, epoch, iteration), either of the two at even odds."""
    rng = np.random.default_rng((SEED, 2, step // STEPS_PER_EPOCH, step % STEPS_PER_EPOCH))
    cut = rng.random() < 0.5
    lam = rng.beta(ALPHAS[cut], ALPHAS[cut])
    if not cut:
        return mixup(lam)
    x, y = rng.integers(0, SIZE, 2).tolist()
    return cutmix(lam, x, y)


def train(loss) -> dict:
    network = make_recipes.make_network()
    optimizer = make_recipes.sgd(network)
    losses = []
    for step in range(STEPS):
        image, label, *_ = make_recipes.make_batch(step)
        image, target = mix_by_pairs(draw(step), image, label)
        value = loss(network(image), target.double())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    state = make_recipes.state(network)
    return {"losses": np.array(losses)} | make_recipes.prefixed("state", state)


def main() -> None:
    content = {"torchvision": torchvision.__version__, "seed": SEED, "boxes": np.array(BOXES)}
    content |= {"alphas": np.array(ALPHAS), "steps_per_epoch": STEPS_PER_EPOCH}
    image, label = (torch.tensor(each) for each in seeded.batch(1, **(BATCH | {"size": 4})))
    label = label.long()
    for number, (lam, x, y) in enumerate(BOXES):
        for name, transform in (("mixup", mixup(lam)), ("cutmix", cutmix(lam, x, y))):
            images, targets = mix_by_pairs(transform, image, label)
            content[f"{name}/{number}/images"] = images.numpy()
            content[f"{name}/{number}/targets"] = targets.double().numpy()
    for name, loss in LOSSES.items():
        result = train(loss)
        print(f"{name}: {result['losses'].round(3).tolist()}")
        content |= make_recipes.prefixed(name, result)
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main()
