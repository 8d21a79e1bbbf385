"""The toolkit's recipe once more, in plain PyTorch, for `learning_curves.py` to compare with.

Written from the recipe alone (docs/recipe.md): it shares no code, weights or random numbers
with the toolkit, so that a fault of the toolkit's network, gradients, optimizer, schedule,
augmentation or evaluation shows as another accuracy. Needs torch, numpy and pillow, no OneFlow;
with `auto_augment` torchvision too, whose transform of that name, RandomErasing, MixUp and CutMix
it applies.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

MEAN = (123.68, 116.779, 103.939)  # of 0 to 255
STD = (58.393, 57.12, 57.375)
MOMENTUM = 0.875
WEIGHT_DECAY = 1 / 32768
LABEL_SMOOTHING = 0.1
ASPECT_RATIO = (3 / 4, 4 / 3)
VAL_BATCH_SIZE = 200


class ConvNorm(nn.Module):
    """A convolution without bias and its batch norm."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(
            channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False
        )
        self.norm = nn.BatchNorm2d(channels_out, eps=1e-5, momentum=0.1)

    def forward(self, x):
        return self.norm(self.conv(x))


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a 1x1 projection where shapes differ."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.first = ConvNorm(channels_in, channels_out, 3, stride)
        self.second = ConvNorm(channels_out, channels_out, 3)
        self.project = None
        if stride > 1 or channels_in != channels_out:
            self.project = ConvNorm(channels_in, channels_out, 1, stride)

    def forward(self, x):
        branch = self.second(F.relu(self.first(x)))
        return F.relu(branch + (x if self.project is None else self.project(x)))


class ResNet18(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = ConvNorm(3, 64, 7, stride=2)
        shapes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        self.stages = nn.Sequential(
            *(
                block
                for channels_in, channels_out, stride in shapes
                for block in (
                    Residual(channels_in, channels_out, stride),
                    Residual(channels_out, channels_out, 1),
                )
            )
        )
        self.head = nn.Linear(512, num_classes)

    def forward(self, image):  # (N, 3, H, W) float32 -> (N, num_classes) float32 logits
        x = F.max_pool2d(F.relu(self.stem(image)), 3, stride=2, padding=1)
        return self.head(self.stages(x).mean(dim=(2, 3)))


@torch.no_grad()
def draw_weights(model: ResNet18, generator: torch.Generator) -> None:
    """Normal with variance 2 / fan_in; no bias; gamma 1, and 0 where a residual branch ends."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, math.sqrt(2 / fan_in), generator=generator)
    model.head.bias.zero_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(1.0)
            module.bias.zero_()
    for block in model.stages:
        block.second.norm.weight.zero_()


def decay_groups(model: nn.Module) -> list[dict]:
    """Weight decay for everything but batch norms."""
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    known = {id(p) for p in norms}
    others = [p for p in model.parameters() if id(p) not in known]
    return [{"params": others, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0}]


def rate_at(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from 0 to the peak, then half a cosine to 0. Steps count from 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    angle = math.pi * (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (1 + math.cos(angle)) / 2


def crop_box(
    width: int, height: int, min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop; the whole picture if ten draws do not fit."""
    for _ in range(10):
        area = rng.uniform(min_area, 1) * width * height
        ratio = math.exp(rng.uniform(math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


class Mixed:
    """What torchvision's references add: RandAugment or such, random erasing, mixup or CutMix."""

    def __init__(self, auto_augment: str, num_classes: int):
        from torchvision import transforms
        from torchvision.transforms import InterpolationMode, v2

        kind = {
            "trivialaugment_wide": transforms.TrivialAugmentWide,
            "randaugment": transforms.RandAugment,
        }[auto_augment]
        self.change = kind(interpolation=InterpolationMode.BILINEAR)
        self.erase = transforms.RandomErasing(0.1)
        mixes = [v2.MixUp(alpha=0.2, num_classes=num_classes)]
        mixes.append(v2.CutMix(alpha=1.0, num_classes=num_classes))
        self.mix = v2.RandomChoice(mixes)

    def picture(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(self.change(Image.fromarray(pixels)))

    def batch(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images (N, 3, H, W) and labels (N,) to images and targets (N, classes)."""
        return self.mix(torch.stack([self.erase(image) for image in x]), y)


def loss_of(logits: torch.Tensor, target: torch.Tensor, *, bce: bool) -> torch.Tensor:
    """Of labels (N,) or shares (N, classes): cross entropy, or binary summed over the classes, as
    timm has it with `sum_classes`; both smoothed."""
    if not bce:
        return F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING)
    num_classes = logits.shape[1]
    shares = F.one_hot(target, num_classes).float() if target.ndim == 1 else target
    shares = shares * (1 - LABEL_SMOOTHING) + LABEL_SMOOTHING / num_classes
    return F.binary_cross_entropy_with_logits(logits, shares, reduction="none").sum(dim=1).mean()


def start_average(model: nn.Module, decay: float, *, batch_size: int, num_epochs: int) -> nn.Module:
    """PyTorch's own, with the decay that torchvision's references make of theirs."""
    share = min(1.0, (1 - decay) * batch_size / num_epochs)
    blend = torch.optim.swa_utils.get_ema_multi_avg_fn(1 - share)
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=blend, use_buffers=True)


def augment(pixels: np.ndarray, size: int, min_area: float, rng: np.random.Generator) -> np.ndarray:
    picture = Image.fromarray(pixels)
    box = crop_box(*picture.size, min_area, rng)
    picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture)


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """What validation does to a square picture whose shorter side becomes the size of the input."""
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def to_input(pictures: list[np.ndarray]) -> torch.Tensor:
    """Pictures (H, W, 3) uint8 to (N, 3, H, W) float32, normalised."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    hits = 0
    for x, y in zip(images.split(VAL_BATCH_SIZE), labels.split(VAL_BATCH_SIZE), strict=True):
        hits += int((model(x).argmax(dim=1) == y).sum())
    return hits / len(labels)


def train(
    train_set: tuple[np.ndarray, np.ndarray],
    val_set: tuple[np.ndarray, np.ndarray],
    *,
    size: int,
    min_area: float,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    warmup_epochs: float,
    seed: int,
    log: Callable[[str], None],
    auto_augment: str | None = None,
    bce: bool = False,
    ema_decay: float | None = None,
) -> None:
    """Train and log the accuracy after each epoch, in the form of the toolkit's lines.

    Args:
        train_set, val_set: images (N, H, H, 3) uint8 and labels (N,). The training images have to
            fill whole batches.
        size: height and width of the network's input, pixels.
        min_area: smallest share of a picture that a random crop takes.
        learning_rate: peak of the schedule.
        auto_augment: with what `Mixed` does.
        ema_decay: with an average of the weights, in torchvision's terms, blended after each step;
            its accuracy is logged as well.
    """
    (images, labels), (val_images, val_labels) = train_set, val_set
    labels, val_labels = (torch.from_numpy(y.astype(np.int64)) for y in (labels, val_labels))
    val_inputs = to_input([resize(pixels, size) for pixels in val_images])
    rng = np.random.default_rng([seed, 2026])
    model = ResNet18(int(labels.max()) + 1)
    draw_weights(model, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    more = None if auto_augment is None else Mixed(auto_augment, int(labels.max()) + 1)
    average = None
    if ema_decay is not None:
        average = start_average(model, ema_decay, batch_size=batch_size, num_epochs=num_epochs)
    optimizer = torch.optim.SGD(decay_groups(model), lr=learning_rate, momentum=MOMENTUM)
    epoch_steps = len(images) // batch_size
    warmup_steps, total_steps = round(warmup_epochs * epoch_steps), num_epochs * epoch_steps
    for epoch in range(num_epochs):
        start = time.perf_counter()
        model.train()
        losses = 0.0
        for i, indices in enumerate(rng.permutation(len(images)).reshape(epoch_steps, batch_size)):
            pictures = [augment(images[index], size, min_area, rng) for index in indices]
            if more is not None:
                pictures = [more.picture(picture) for picture in pictures]
            x, y = to_input(pictures), labels[indices]
            if more is not None:
                x, y = more.batch(x, y)
            loss = loss_of(model(x), y, bce=bce)
            rate = rate_at(
                epoch * epoch_steps + i,
                peak=learning_rate,
                warmup_steps=warmup_steps,
                total_steps=total_steps,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.item()
            if average is not None:
                average.update_parameters(model)
                if epoch < warmup_epochs:
                    average.n_averaged.fill_(0)  # the next time copies
        speed = len(images) / (time.perf_counter() - start)
        where = f"epoch {epoch}, iter {epoch_steps}"
        log(f"train: {where}, loss: {losses / epoch_steps:.6f}, samples/s: {speed:.3f}")
        log(f"validation: {where}, top_1: {accuracy(model, val_inputs, val_labels):.6f}")
        if average is not None:
            top_1 = accuracy(average, val_inputs, val_labels)
            log(f"validation (ema): {where}, top_1: {top_1:.6f}")
