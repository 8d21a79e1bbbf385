"""Boxes of pixels, inside a graph."""

import oneflow as flow


def in_boxes(image: flow.Tensor, box: flow.Tensor) -> flow.Tensor:
    """1 where a pixel is in the box of its image, else 0: (N, 1, H, W) float32.

    Args:
        image: (N, C, H, W); only its size matters.
        box: (N, 4) float32 pixels: top, bottom, left, right; bottom and right are outside.
    """
    top, bottom, left, right = (box[:, i].reshape(-1, 1, 1, 1) for i in range(4))
    height, width = image.shape[2:]
    everywhere = {"placement": image.placement, "sbp": flow.sbp.broadcast}
    y = flow.arange(height, dtype=flow.float32, **everywhere).reshape(1, 1, height, 1)
    x = flow.arange(width, dtype=flow.float32, **everywhere).reshape(1, 1, 1, width)
    rows = (y >= top).to(flow.float32) * (y < bottom).to(flow.float32)  # (N, 1, H, 1)
    columns = (x >= left).to(flow.float32) * (x < right).to(flow.float32)  # (N, 1, 1, W)
    return rows * columns
