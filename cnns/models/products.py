"""Convolutions as one product of matrices over the whole batch, which OneFlow's CPU kernel is not.

That kernel goes image by image (source: `conv_kernels.cpp`, v0.9.0): it copies the pixels under the
kernel into columns, one value at a time, even for a 1x1 kernel, and multiplies the weights by them.
The weights are packed again for each image, which takes most of the time where pictures are small.

`Convolution` is OneFlow's layer but for graphs that are compiled for a CPU by `cnns.graphs`: there
it computes the same sums, in another order, by the operations that are quickest for its shape. All
else (CUDA, exports to ONNX, modules that are called without a graph) computes OneFlow's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import oneflow as flow
from oneflow import nn

# All measured on 2 cores of an AMD EPYC (Zen 4), forward and backward.
MAX_PIXELS = 14 * 14  # of the output, for 1x1 kernels
MAX_PIXELS_UNFOLDED = 2 * 2  # of the output, for larger kernels
MAX_KERNEL_PIXELS = 9
# Of a training step, that a product saves for each value of the weights and image.
SAVED_MILLISECONDS = 2.4e-6
# What it has to save, since more operations take longer to compile: some 0.1 s.
MIN_SAVED_MILLISECONDS = 5.0

enabled = False


@contextmanager
def convolutions_as_products(wanted: bool) -> Iterator[None]:
    """A context in which what is traced takes the forms of this module, if `wanted`."""
    global enabled
    before, enabled = enabled, wanted
    try:
        yield
    finally:
        enabled = before


def output_size(length: int, kernel: int, stride: int, padding: int) -> int:
    return (length + 2 * padding - kernel) // stride + 1


def form(
    batch: int,
    weight: Sequence[int],
    size: Sequence[int],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> str | None:
    """How to compute the convolution of (batch, I, *size) by (O, I, h, w); None: as OneFlow does.

    "pixels": one product, between two transpositions; for 1x1 kernels.
    "window": one product with the part of the kernel that meets the image, which gives 1 pixel.
    "unfold": one product with OneFlow's own columns, which it is slow to make.
    """
    outputs, channels, *kernel = weight
    height, width = map(output_size, size, kernel, stride, padding)
    pixels, area = height * width, kernel[0] * kernel[1]
    if area == 1 and padding == (0, 0):
        how, most = "pixels", MAX_PIXELS
    elif pixels == 1:
        how, most = "window", 1
    else:
        how, most = "unfold", MAX_PIXELS_UNFOLDED
    if pixels > most or how == "unfold" and area > MAX_KERNEL_PIXELS:
        return None
    saved = SAVED_MILLISECONDS * batch * outputs * channels * area
    return how if saved >= MIN_SAVED_MILLISECONDS else None


def window(size: int, kernel: int, padding: int) -> tuple[slice, slice]:
    """Which part of a kernel meets which part of the image at the first place."""
    length = min(kernel - padding, size)
    return slice(padding, padding + length), slice(0, length)


def convolve(
    x: flow.Tensor,
    weight: flow.Tensor,
    bias: flow.Tensor | None,
    *,
    how: str,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> flow.Tensor:
    """The convolution of (N, I, H, W) by (O, I, h, w), computed as `form` names it."""
    outputs, _, *kernel = weight.shape
    count, channels, *size = x.shape
    height, width = map(output_size, size, kernel, stride, padding)
    if how == "window":
        (rows, top), (columns, left) = map(window, size, kernel, padding)
        weight, x = weight[:, :, rows, columns], x[:, :, top, left]
        y = flow.matmul(weight.reshape(outputs, -1), x.reshape(count, -1).transpose(0, 1))
    elif how == "unfold":
        x = nn.functional.unfold(x, kernel_size=kernel, padding=padding, stride=stride)
        x = x.permute(1, 0, 2)  # (C kernel pixels, N, output pixels)
        y = flow.matmul(weight.reshape(outputs, -1), x.reshape(x.shape[0], -1))
    else:
        x = x[:, :, :: stride[0], :: stride[1]] if stride != (1, 1) else x
        x = x.permute(1, 0, 2, 3)
        y = flow.matmul(weight.reshape(outputs, channels), x.reshape(channels, -1))
    y = y.reshape(outputs, count, height, width).permute(1, 0, 2, 3)
    return y if bias is None else y + bias.reshape(1, outputs, 1, 1)


def as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class Convolution(nn.Conv2d):
    """OneFlow's, computed as a product where `form` says so and the context above is entered."""

    def forward(self, x):  # (N, I, H, W) -> (N, O, H', W')
        plain = self.groups == 1 and as_pair(self.dilation) == (1, 1)
        if enabled and plain and self.channel_pos == "channels_first":
            stride, padding = as_pair(self.stride), as_pair(self.padding)
            how = form(x.shape[0], self.weight.shape, x.shape[2:], stride=stride, padding=padding)
            if how is not None:
                return convolve(x, self.weight, self.bias, how=how, stride=stride, padding=padding)
        return nn.Conv2d.forward(self, x)  # nn.Graph calls this on a proxy without super()
