"""Convolutions as products on a CPU: the sums of OneFlow's own, and where they are taken."""

import cnns.startup  # noqa: F401  (first, see there)

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn

from cnns.graphs import QuietGraph
from cnns.models import products
from cnns.models.products import Convolution, convolutions_as_products, form

# inputs, outputs, kernel, stride, padding, (height, width), batch -> the form
CASES = {
    "pixels": (600, 700, 1, 1, 0, (5, 3), 5),
    "pixels, stride 2": (600, 700, 1, 2, 0, (5, 7), 5),
    "pixels, one": (600, 700, 1, 1, 0, (1, 1), 5),
    "window": (200, 300, 3, 1, 1, (1, 1), 4),
    "window, stride 2": (200, 300, 3, 2, 1, (2, 2), 4),
    "window, whole": (300, 300, (2, 3), 1, 0, (2, 3), 4),
    "window, 7x7": (99, 130, 7, 2, 3, (2, 1), 4),
    "unfold": (200, 300, 3, 1, 1, (2, 2), 4),
    "unfold, stride 2": (200, 300, 3, 2, 1, (3, 4), 4),
    "unfold, 1x3": (400, 450, (1, 3), 1, (0, 1), (2, 2), 4),
}


def gradients(layer: nn.Module, x: np.ndarray) -> list[np.ndarray]:
    """What a layer gives, and the gradients of its input and weights under uneven weights."""
    image = flow.tensor(x, requires_grad=True)
    layer.zero_grad()
    y = layer(image)
    scale = flow.tensor(np.random.default_rng(1).standard_normal(tuple(y.shape), np.float32))
    (y * scale).sum().backward()
    return [t.numpy().copy() for t in (y, image.grad, *(p.grad for p in layer.parameters()))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_form_gives_the_sums_of_oneflow_and_their_gradients(case, bias):
    inputs, outputs, kernel, stride, padding, size, batch = CASES[case]
    layer = Convolution(inputs, outputs, kernel, stride=stride, padding=padding, bias=bias)
    how = form(
        batch,
        layer.weight.shape,
        size,
        stride=layer.stride,
        padding=layer.padding,
    )
    assert how == case.split(",")[0]
    x = np.random.default_rng(0).standard_normal((batch, inputs, *size), np.float32)
    expected = gradients(layer, x)
    with convolutions_as_products(True):
        found = gradients(layer, x)
    assert not products.enabled
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "batch, weight, size, stride, padding",
    [
        (16, (512, 256, 1, 1), (56, 56), (2, 2), (0, 0)),  # large pictures
        (16, (256, 64, 1, 1), (56, 56), (1, 1), (0, 0)),
        (64, (512, 512, 3, 3), (7, 7), (1, 1), (1, 1)),
        (16, (256, 256, 3, 3), (28, 28), (2, 2), (1, 1)),
        (16, (64, 3, 7, 7), (224, 224), (2, 2), (3, 3)),
        (64, (512, 512, 5, 5), (2, 2), (1, 1), (2, 2)),
        (1, (512, 512, 1, 1), (2, 2), (1, 1), (0, 0)),  # saves less than it takes to compile
        (1, (64, 64, 3, 3), (1, 1), (1, 1), (1, 1)),
        (2, (64, 64, 3, 3), (16, 16), (1, 1), (1, 1)),
    ],
)
def test_other_shapes_are_computed_as_oneflow_does(batch, weight, size, stride, padding):
    assert form(batch, weight, size, stride=stride, padding=padding) is None


def operators(graph: nn.Graph) -> set[str]:
    return {op.user_conf.op_type_name for op in graph._full_graph_proto.net.op}


class Layer(QuietGraph):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def build(self, x):
        return self.layer(x)


def compiled(layer: nn.Module) -> set[str]:
    placement = flow.placement("cpu", [0])
    layer = layer.to_global(placement, flow.sbp.broadcast)
    graph = Layer(layer)
    graph(flow.zeros(8, 600, 2, 2, placement=placement, sbp=flow.sbp.split(0))).numpy()
    return operators(graph)


def test_a_graph_for_a_cpu_takes_the_product():
    found = compiled(Convolution(600, 700, 1))
    assert "conv2d" not in found
    assert found & {"matmul", "broadcast_matmul"}


def test_groups_and_dilation_stay_oneflows():
    assert "conv2d" in compiled(Convolution(600, 700, 1, groups=2))
    assert "conv2d" in compiled(Convolution(600, 600, 3, dilation=2, padding=2))


def test_a_graph_that_is_exported_has_convolutions():
    import resnet_to_onnx

    graph = resnet_to_onnx.LogitsGraph(Convolution(600, 700, 1))
    graph(flow.zeros(8, 600, 2, 2)).numpy()
    assert "conv2d" in operators(graph)


def test_an_error_while_tracing_leaves_the_context():
    with pytest.raises(ZeroDivisionError), convolutions_as_products(True):
        raise ZeroDivisionError
    assert not products.enabled
