"""Make augment.npz, the golden file of tests/cnns/test_augment.py, with torchvision on a CPU.

    python3.11 -m venv venv-torchvision
    venv-torchvision/bin/pip install torch==2.14.1 torchvision==0.29.1 pillow==12.3.0
    venv-torchvision/bin/python tests/golden/make_augment.py

torchvision's transforms of Pillow's pictures, applied to data/cat.jpg, shrunk. What they draw from
PyTorch is kept beside what they made of it. Nothing here imports the project.
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode, autoaugment

HERE = Path(__file__).resolve().parent
FILE, PHOTOGRAPH = HERE / "augment.npz", HERE.parents[1] / "data" / "cat.jpg"
WIDTH, HEIGHT = 44, 36
OPERATIONS = {
    "ShearX": (-0.3, 0.21, 0.99),
    "ShearY": (-0.3, 0.21, 0.99),
    "TranslateX": (-6.7, 5.2, 32.0),
    "TranslateY": (-6.7, 5.2, 32.0),
    "Rotate": (-30.0, 9.3, 135.0),
    "Brightness": (-0.9, 0.27, 0.99),
    "Color": (-0.9, 0.27, 0.99),
    "Contrast": (-0.9, 0.27, 0.99),
    "Sharpness": (-0.9, 0.27, 0.99),
    "Posterize": (2.0, 4.0, 7.0, 8.0),
    "Solarize": (0.0, 93.5, 200.0, 255.0),
    "AutoContrast": (0.0,),
    "Equalize": (0.0,),
}
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
RUNS = 12  # of each random transform
JITTER = {"brightness": 0.4, "contrast": 0.5, "saturation": 1.3, "hue": 0.3}


@contextmanager
def kept_draws(kept: list):
    """Keep every random number that torchvision asks PyTorch for, in order."""
    randint, randperm, rand = torch.randint, torch.randperm, torch.rand
    uniform = torch.Tensor.uniform_

    def keep(draw):
        def drawn(*args, **more):
            result = draw(*args, **more)
            kept.extend(result.double().flatten().tolist())
            return result

        return drawn

    torch.randint, torch.randperm, torch.rand = keep(randint), keep(randperm), keep(rand)
    torch.Tensor.uniform_ = keep(uniform)
    try:
        yield
    finally:
        torch.randint, torch.randperm, torch.rand = randint, randperm, rand
        torch.Tensor.uniform_ = uniform


def photograph() -> Image.Image:
    """Grey is stretched, so that AutoContrast and Equalize have something to do."""
    with Image.open(PHOTOGRAPH) as image:
        picture = image.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture).astype(float)
    return Image.fromarray((30 + pixels * 0.7).astype(np.uint8))


def magnitudes(transform, *size) -> dict[str, np.ndarray]:
    """All 31 magnitudes of each operation that has one."""
    space = transform._augmentation_space(31, *size)
    return {name: values.double().numpy() for name, (values, _) in space.items() if values.ndim}


def apply_all(picture: Image.Image) -> dict[str, np.ndarray]:
    content = {}
    for name, values in OPERATIONS.items():
        for value in values:
            modes = ("bilinear", "bicubic") if name in GEOMETRIC else ("bilinear",)
            for mode in modes:
                made = autoaugment._apply_op(picture, name, value, InterpolationMode(mode), None)
                content[f"operation/{name}/{value}/{mode}"] = np.asarray(made)
    return content


def draw(name: str, transform, given, kind) -> dict[str, np.ndarray]:
    content = {}
    for run in range(RUNS):
        torch.manual_seed(run)
        kept: list[float] = []
        with kept_draws(kept):
            made = transform(given)
        content[f"{name}/{run}/draws"] = np.array(kept)
        content[f"{name}/{run}/made"] = kind(made)
    return content


def main() -> None:
    picture = photograph()
    mode = InterpolationMode.BILINEAR
    content = {"torchvision": torchvision.__version__, "pillow": PIL.__version__}
    content |= {
        "picture": np.asarray(picture),
        "runs": RUNS,
        "jitter": np.array([*JITTER.values()]),
    }
    content |= apply_all(picture)
    randaugment = autoaugment.RandAugment(num_ops=3, magnitude=11, interpolation=mode)
    trivial = autoaugment.TrivialAugmentWide(interpolation=mode)
    for name, found in (
        ("randaugment", magnitudes(randaugment, (HEIGHT, WIDTH))),
        ("trivialaugment_wide", magnitudes(trivial)),
    ):
        content |= {f"magnitudes/{name}/{key}": values for key, values in found.items()}
    content |= draw("randaugment", randaugment, picture, np.asarray)
    content |= draw("trivialaugment_wide", trivial, picture, np.asarray)
    content |= draw("jitter", transforms.ColorJitter(**JITTER), picture, np.asarray)
    # A size that now and then needs more than one attempt.
    erasing = transforms.RandomErasing(p=0.8)
    content |= draw("erasing", erasing, torch.ones(1, 24, 24), lambda made: made[0].bool().numpy())
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main()
