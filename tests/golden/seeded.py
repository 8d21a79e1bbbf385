"""Weights, images and labels from seeds, and short summaries of large arrays.

Both sides of the comparison use this: make_golden.py beside PyTorch and numpy 2, the tests beside
OneFlow and numpy 1.23. It needs numpy only, and draws only by `default_rng` with `standard_normal`,
`uniform`, `integers` and `bytes`, which give the same numbers in both; golden files hold a checksum
of what was drawn, so that a numpy that draws something else is noticed as such.
"""

import zlib

import numpy as np

NUM_PROJECTIONS = 16


def rng_of(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for each name, so that the order of drawing does not matter."""
    return np.random.default_rng((seed, zlib.crc32(name.encode())))


def state(
    shapes: dict[str, tuple[int, ...]], seed: int, *, beta: float, fc_std: float
) -> dict[str, np.ndarray]:
    """Parameters and buffers of a ResNet, float32, by their names in torchvision.

    Nothing is 0 or 1: gammas, betas and running statistics are random too. Betas keep away from 0,
    three of four above and one below it, and so do most inputs of the ReLUs. Else a rounding error
    now and then puts an input on the other side of 0, and gradients differ by a percent from there
    on down: between PyTorch's own float32 and float64 as well.

    Args:
        beta: betas are from `beta` to 1.5 `beta`, or from -1.5 `beta` to -`beta`.
        fc_std: standard deviation of the fc weights, to give logits of a few units.
    """
    return {
        name: _array(name, shape, rng_of(seed, name), beta, fc_std).astype(np.float32)
        for name, shape in shapes.items()
    }


def _array(
    name: str, shape: tuple[int, ...], rng: np.random.Generator, beta: float, fc_std: float
) -> np.ndarray:
    if name == "fc.weight":
        return rng.standard_normal(shape) * fc_std
    if name == "fc.bias":
        return rng.standard_normal(shape) * 0.1
    if len(shape) == 4:  # a convolution; its sum is 0, so that the large means cancel in it
        weight = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        return weight - weight.mean(axis=(1, 2, 3), keepdims=True)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape)
    if name.endswith("running_mean"):
        return rng.standard_normal(shape) * 0.2
    if name.endswith("bias"):
        sign = np.where(rng.uniform(0, 1, shape) < 0.75, 1, -1)
        return sign * rng.uniform(1, 1.5, shape) * beta
    if name.endswith("bn3.weight"):  # small, so that activations grow little from block to block
        return rng.uniform(0.1, 0.3, shape)
    return rng.uniform(0.5, 1.5, shape)


def any_state(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Parameters and buffers of any network, float32, by PyTorch's names; nothing is 0 or 1."""
    return {
        name: _any_array(name, shape, rng_of(seed, name)).astype(np.float32)
        for name, shape in shapes.items()
    }


def _any_array(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if len(shape) > 1:  # a convolution or a linear layer
        return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if name.endswith(("bias", "running_mean")):
        return rng.standard_normal(shape) * 0.2
    return rng.uniform(0.5, 1.5, shape)  # gammas and running variances


def features(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 as behind a ReLU: half of them 0."""
    return np.maximum(rng_of(seed, "features").standard_normal(shape, np.float32), 0)


def listing(shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
    """(n,) str: `conv1.weight 64 3 7 7`, sorted."""
    return np.array([" ".join([name, *map(str, shape)]) for name, shape in sorted(shapes.items())])


def batch(seed: int, *, size: int, pixels: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (size, 3, pixels, pixels) float32 and labels (size,) int32.

    An image is noise on a pattern of its class, so that there is something to learn.
    """
    rng = np.random.default_rng((seed, 0))
    label = rng.integers(0, num_classes, size).astype(np.int32)
    image = rng.standard_normal((size, 3, pixels, pixels))
    for i, n in enumerate(label):
        image[i] += np.random.default_rng((int(n), 1)).standard_normal((3, pixels, pixels))
    return image.astype(np.float32), label


def checksum(arrays: dict[str, np.ndarray]) -> int:
    """CRC-32 over the bytes of all arrays, in the order of their names."""
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), value)
    return value


def summary(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a golden file keeps of arrays: a row for each name, in the order of the names.

    name         (n,) str
    norm         (n,) float64, Euclidean
    projections  (n, NUM_PROJECTIONS) float64, scalar products with random vectors of -1 and 1
    """
    names = sorted(arrays)
    flat = [np.asarray(arrays[name], np.float64).ravel() for name in names]
    return {
        "name": np.array(names),
        "norm": np.array([np.sqrt(array @ array) for array in flat]),
        "projections": np.array([project(*pair) for pair in zip(names, flat, strict=True)]),
    }


def project(name: str, flat: np.ndarray) -> np.ndarray:
    """(size,) float64 to (NUM_PROJECTIONS,), by signs that depend on the name."""
    rng = rng_of(0, name)
    total, values = flat.sum(), np.empty(NUM_PROJECTIONS)
    for i in range(NUM_PROJECTIONS):
        bits = np.frombuffer(rng.bytes(-(-flat.size // 8)), np.uint8)
        values[i] = 2 * (np.unpackbits(bits, count=flat.size).astype(np.float64) @ flat) - total
    return values


def relative_errors(mine: dict, theirs: dict) -> np.ndarray:
    """How far arrays are from golden ones, as a share of the golden ones' norms: (n,) float64.

    Both are summaries. The mean square of the projections of a difference is the square of its
    norm, within a fifth of it as a rule. A fault that changes an array as a whole, or any part of
    it that matters, cannot hide.
    """
    assert mine["name"].tolist() == theirs["name"].tolist()
    square = ((mine["projections"] - theirs["projections"]) ** 2).mean(axis=1)
    return np.sqrt(square) / theirs["norm"]
