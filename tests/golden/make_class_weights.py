"""Make class_weights.npz, the golden file of tests/test_uneven.py, with PyTorch on a CPU.

    python3.11 -m venv venv-torch
    venv-torch/bin/pip install torch==2.13.0
    venv-torch/bin/python tests/golden/make_class_weights.py

The training of make_recipes.py with weights of the classes. PyTorch's own loss computes it for
labels, with smoothing; it divides mixed targets by their number, so that is written out, and so is
the binary loss, which has no such weights. Nothing here imports the project.
"""

from pathlib import Path

import make_recipes
import numpy as np
import torch
from make_recipes import SMOOTHING, mixed_target
from torch.nn import functional

FILE = Path(__file__).resolve().parent / "class_weights.npz"
WEIGHTS = np.array([0.2, 3.0, 1.0, 0.5, 2.5], np.float32)
W = torch.tensor(WEIGHTS).double()


def labels(logits, batch):
    return functional.cross_entropy(logits, batch[1], W, label_smoothing=SMOOTHING)


def mixed(logits, batch):
    target = mixed_target(batch)
    soft = target * (1 - SMOOTHING) + SMOOTHING / target.shape[1]
    losses = -(soft * W * logits.log_softmax(1)).sum()
    return losses / (target * W).sum()


def bce(logits, batch):
    target = make_recipes.one_hot(batch[1])
    soft = target * (1 - SMOOTHING) + SMOOTHING / target.shape[1]
    rows = functional.binary_cross_entropy_with_logits(logits, soft, reduction="none").mean(1)
    weights = W[batch[1]]
    return (rows * weights).sum() / weights.sum()


def main() -> None:
    content = {"torch": torch.__version__, "weights": WEIGHTS}
    for loss in (labels, mixed, bce):
        result = make_recipes.train(loss)
        print(f"{loss.__name__}: {result['losses'].round(3).tolist()}")
        content |= make_recipes.prefixed(loss.__name__, result)
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main()
