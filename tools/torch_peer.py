"""ResNet v1.5 in PyTorch: the peer of tools/benchmark.py --against=torch.

Runs under a Python that has PyTorch and needs nothing of this repository. It reads one JSON list a
line, [kind, layout, steps], and answers each with one JSON object, {"seconds": the time of these
steps}; the first line that it writes says what it is. The end of its input ends it.
"""

import json
import sys
import time

import torch
from torch import nn

# Blocks of each stage, and whether they are bottlenecks. He et al., arXiv:1512.03385, table 1.
DEPTHS = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CLASSES = 1000


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Block(nn.Module):
    """A residual block; of a bottleneck, the 3 x 3 convolution has the stride (v1.5)."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        if bottleneck:
            outputs = 4 * width
            self.residual = nn.Sequential(
                conv_norm(inputs, width, 1),
                relu,
                conv_norm(width, width, 3, stride),
                relu,
                conv_norm(width, outputs, 1),
            )
        else:
            outputs = width
            self.residual = nn.Sequential(
                conv_norm(inputs, width, 3, stride), relu, conv_norm(width, width, 3)
            )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


def resnet(name: str) -> nn.Sequential:
    """(N, 3, H, W) float32 to logits (N, 1000)."""
    counts, bottleneck = DEPTHS[name]
    blocks, channels = [], 64
    for stage, count in enumerate(counts):
        width = 64 * 2**stage
        for i in range(count):
            stride = 2 if stage > 0 and i == 0 else 1
            blocks.append(Block(channels, width, stride, bottleneck))
            channels = 4 * width if bottleneck else width
    return nn.Sequential(
        conv_norm(3, 64, 7, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, CLASSES),
    )


class Peer:
    """One network and its optimizer in one layout."""

    def __init__(self, name: str, layout: str, batch_size: int, image_size: int):
        memory = LAYOUTS[layout]
        self.model = resnet(name).to(memory_format=memory)
        images = torch.randn(batch_size, 3, image_size, image_size)
        self.images = images.contiguous(memory_format=memory)
        self.labels = torch.randint(CLASSES, (batch_size,))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.001, momentum=0.875, weight_decay=1 / 32768
        )

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.model(self.images), self.labels).backward()
        self.optimizer.step()

    @torch.inference_mode()
    def predict(self) -> None:
        torch.softmax(self.model(self.images), 1)

    def run(self, kind: str, steps: int) -> float:
        """Seconds of so many steps: "train" or "predict"."""
        self.model.train(kind == "train")
        step = getattr(self, kind)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - start


def main(name: str, batch_size: str, image_size: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    peers = {layout: Peer(name, layout, int(batch_size), int(image_size)) for layout in LAYOUTS}
    parameters = sum(p.numel() for p in peers["nchw"].model.parameters())
    print(json.dumps({"version": torch.__version__, "parameters": parameters}), flush=True)
    for line in sys.stdin:
        kind, layout, steps = json.loads(line)
        print(json.dumps({"seconds": peers[layout].run(kind, steps)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
