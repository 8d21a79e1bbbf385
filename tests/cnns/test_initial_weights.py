"""What a network starts from, by kind of layer."""

import numpy as np
import oneflow as flow
import pytest

import model_registry
from cnns.checkpoint.snapshot import state_arrays

# Of normal deviations; beyond are 6 of 10,000,000. Some 170 figures are looked at.
SIGMAS = 5


@pytest.mark.long
@pytest.mark.parametrize("name, last_bn", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_initial_weights(name, last_bn):
    flow.manual_seed(0)
    arrays = state_arrays(model_registry.MODELS[name].build(1000))
    kinds = {"weight": 0, "zero": 0, "one": 0}
    for key, array in arrays.items():
        if array.ndim > 1:  # a convolution or the fc layer
            kinds["weight"] += 1
            # (O, I, H, W) or (O, I). Normal with variance 2 / fan_in, so that z is standard normal,
            # and its mean, mean square and mean fourth power have these variances:
            z = array.astype(np.float64) * np.sqrt(array[0].size / 2)
            for moment, expected, variance in (
                (z.mean(), 0, 1 / z.size),
                ((z**2).mean(), 1, 2 / z.size),
                ((z**4).mean(), 3, 96 / z.size),
            ):
                assert abs(moment - expected) < SIGMAS * np.sqrt(variance), key
        elif key.endswith(("bias", "running_mean", f"{last_bn}.weight")):
            kinds["zero"] += 1
            assert not array.any(), key
        else:  # the other gammas, and running_var
            kinds["one"] += 1
            assert (array == 1).all(), key
    # Batch norms: one for each convolution. Blocks: 8 in ResNet-18, 16 in ResNet-50.
    norms, blocks = {"resnet18": (20, 8), "resnet50": (53, 16)}[name]
    assert kinds == {
        "weight": norms + 1,
        "zero": 2 * norms + blocks + 1,
        "one": 2 * norms - blocks,
    }
