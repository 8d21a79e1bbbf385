"""Make randaugment.npz, the golden file of tests/cnns/test_randaugment.py, with timm on a CPU.

    python3.11 -m venv venv-timm
    venv-timm/bin/pip install numpy==2.4.4 pillow==12.3.0
    venv-timm/bin/pip install --no-deps timm==1.0.31
    venv-timm/bin/python tests/golden/make_randaugment.py

timm's RandAugment, applied to the picture of augment.npz. The file of timm that has it is loaded
alone: it needs no PyTorch. What it draws is kept beside what it made, of which the many draws keep
the SHA-256 of the pixels. Nothing here imports the project.
"""

import hashlib
import importlib.metadata
import importlib.util
import random
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL
from PIL import Image

HERE = Path(__file__).resolve().parent
FILE, PICTURES = HERE / "randaugment.npz", HERE / "augment.npz"
FILL = (124, 116, 104)  # what timm makes of ImageNet's mean
RUNS = 120  # of each
NAMES = {
    "rand-m7-mstd0.5-inc1": None,  # A1 and A2, resampled at random
    "rand-m6-mstd0.5-inc1": "bicubic",  # A3
    "rand-m9-n3-mstd101-inc1": "bilinear",
    "rand-m9-mstd0.5": None,
    "rand-inc0-m10-p1-n4": "bicubic",
}
MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
VALUES = {
    "AutoContrast": (None,),
    "Equalize": (None,),
    "Invert": (None,),
    "Rotate": (-30.0, 9.3, 21.0),
    "Posterize": (0, 1, 2, 4),
    "Solarize": (0, 77, 200, 256),
    "SolarizeAdd": (0, 35, 77, 110),
    "Color": (0.1, 0.37, 1.63, 1.9),
    "Contrast": (0.1, 0.37, 1.63, 1.9),
    "Brightness": (0.1, 0.37, 1.63, 1.9),
    "Sharpness": (0.1, 0.37, 1.63, 1.9),
    "ShearX": (-0.3, 0.21, 0.057),
    "ShearY": (-0.3, 0.21, 0.057),
    "TranslateXRel": (-0.45, 0.31, 0.07),
    "TranslateYRel": (-0.45, 0.31, 0.07),
}
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
LEVELS = np.linspace(0, 10, 41)


def load_timm() -> ModuleType:
    folder = Path(importlib.util.find_spec("timm").origin).parent
    spec = importlib.util.spec_from_file_location("timm_aa", folder / "data" / "auto_augment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def kept_draws(kept: list):
    """Keep what timm draws, in order: of a choice, the index."""
    names = ("random", "gauss", "uniform")
    originals = {name: getattr(random, name) for name in names}
    choice, choices = random.choice, np.random.choice

    def keep(draw):
        def drawn(*args):
            kept.append(draw(*args))
            return kept[-1]

        return drawn

    def choose(values):
        kept.append(values.index(choice(values)))
        return values[int(kept[-1])]

    def choose_several(values, size, replace, p):
        indices = choices(len(values), size, replace=replace, p=p)
        kept.extend(indices.tolist())
        return [values[index] for index in indices]

    for name, draw in originals.items():
        setattr(random, name, keep(draw))
    random.choice, np.random.choice = choose, choose_several
    try:
        yield
    finally:
        for name, draw in originals.items():
            setattr(random, name, draw)
        random.choice, np.random.choice = choice, choices


def apply_all(timm: ModuleType, picture: Image.Image) -> dict[str, np.ndarray]:
    content = {}
    for name, values in VALUES.items():
        for value in values:
            for mode in MODES if name in GEOMETRIC else ("bilinear",):
                made = timm.NAME_TO_OP[name](
                    picture,
                    *(() if value is None else (value,)),
                    fillcolor=FILL,
                    resample=MODES[mode],
                )
                content[f"operation/{name}/{value or 0}/{mode}"] = np.asarray(made)
    return content


def values(timm: ModuleType) -> dict[str, np.ndarray]:
    """The value of each operation at LEVELS, with either sign where it has one."""
    content = {}
    original = random.random
    for kind, names in (
        ("inc0", timm._RAND_TRANSFORMS),
        ("inc1", timm._RAND_INCREASING_TRANSFORMS),
    ):
        for name in names:
            for drawn in (0.25, 0.75):
                random.random = lambda drawn=drawn: drawn
                value_of = timm.LEVEL_TO_ARG[name] or (lambda level, _: (0.0,))
                found = [value_of(float(level), {})[0] for level in LEVELS]
                content[f"value/{kind}/{name.removesuffix('Increasing')}/{drawn}"] = found
    random.random = original
    return {key: np.array(found, float) for key, found in content.items()}


def draw_all(timm: ModuleType, picture: Image.Image) -> dict[str, np.ndarray]:
    content = {}
    for name, mode in NAMES.items():
        more = {} if mode is None else {"interpolation": MODES[mode]}
        transform = timm.rand_augment_transform(name, {"img_mean": FILL} | more)
        draws, made = [], []
        for run in range(RUNS):
            random.seed(run)
            np.random.seed(run)
            kept: list[float] = []
            with kept_draws(kept):
                pixels = transform(picture).tobytes()
            draws.append(kept)
            made.append(np.frombuffer(hashlib.sha256(pixels).digest(), np.uint8))
        longest = max(map(len, draws))
        padded = [kept + [np.nan] * (longest - len(kept)) for kept in draws]
        content[f"draws/{name}/{mode or 'random'}"] = np.array(padded)
        content[f"made/{name}/{mode or 'random'}"] = np.array(made)
    return content


def main() -> None:
    timm = load_timm()
    with np.load(PICTURES) as file:
        picture = Image.fromarray(file["picture"])
    content = {"timm": importlib.metadata.version("timm"), "pillow": PIL.__version__}
    content |= {"picture": np.asarray(picture), "fill": np.array(FILL), "levels": LEVELS}
    content["operations"] = np.array([*VALUES])
    content |= apply_all(timm, picture) | values(timm) | draw_all(timm, picture)
    assert [*VALUES] == timm._RAND_TRANSFORMS
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main()
