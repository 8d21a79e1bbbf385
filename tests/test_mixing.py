"""Mixup and CutMix, against torchvision's own (golden/make_mixing.py)."""

import itertools
from pathlib import Path

import numpy as np
import oneflow as flow
import pytest

import config
import of_cnn_train_val
import test_recipes as recipes
from cnns.data.mixing import Mix, Mixing, MixingLoader, cutmix_box, mix_pairs
from cnns.distributed import to_device
from cnns.errors import UsageError
from cnns.graphs import QuietGraph
from cnns.losses import build_loss, soft_target
from golden import seeded

pytestmark = pytest.mark.long

with np.load(Path(__file__).resolve().parent / "golden" / "mixing.npz") as file:
    GOLDEN = {key: array[()] for key, array in file.items()}
SIZE, BATCH_SIZE = recipes.BATCH["pixels"], recipes.BATCH["size"]
BOXES = [(lam, int(x), int(y)) for lam, x, y in GOLDEN["boxes"]]
SEED, STEPS_PER_EPOCH = GOLDEN["seed"].item(), GOLDEN["steps_per_epoch"].item()


class MixGraph(QuietGraph):
    """Mixed images, and the targets that a loss makes of what is handed to it."""

    def build(self, image, label, mix):
        image, *labels = mix_pairs(image, label, mix)
        logits = flow.zeros(
            label.shape[0],
            recipes.BATCH["num_classes"],
            placement=image.placement,
            sbp=flow.sbp.broadcast,
        )
        return image, soft_target(logits, labels[0], tuple(labels[1:]), smoothing=0.0)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_and_targets(kind):
    graph = MixGraph()
    image, label = seeded.batch(1, **(recipes.BATCH | {"size": 4}))
    for number, (lam, x, y) in enumerate(BOXES):
        mix = Mix(level=lam, share=lam) if kind == "mixup" else cutmix_box(lam, x, y, size=SIZE)
        rows = np.tile(np.array([*vars(mix).values()], np.float32), (len(label), 1))
        outputs = graph(*(to_device(each, recipes.PLACEMENT) for each in (image, label, rows)))
        images, targets = (each.numpy() for each in outputs)
        # A mean of two float32 of up to some 4: each of three operations rounds.
        atol = 0.0 if kind == "cutmix" else 1e-6
        np.testing.assert_allclose(images, GOLDEN[f"{kind}/{number}/images"], rtol=0, atol=atol)
        np.testing.assert_allclose(targets, GOLDEN[f"{kind}/{number}/targets"], rtol=0, atol=1e-7)


class Batches(recipes.Given):
    """The batches of the golden runs, from any epoch and iteration on."""

    def batches(self, epoch, iteration=0):
        for step in itertools.count(epoch * STEPS_PER_EPOCH + iteration):
            yield recipes.batch(step)


def mixed_loader(**alphas) -> MixingLoader:
    given = dict(zip(("mixup_alpha", "cutmix_alpha"), GOLDEN["alphas"].tolist(), strict=True))
    mixing = Mixing(**(given | alphas), seed=SEED)
    return MixingLoader(Batches(), mixing, batch_size=BATCH_SIZE, size=SIZE, device="cpu")


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_twenty_steps(loss):
    """With label smoothing, in three epochs, by lambdas and boxes of a seed."""
    model, loader = recipes.network(), mixed_loader()
    smoothing = recipes.GOLDEN["smoothing"].item()
    graph = recipes.build(model, loss=build_loss(loss, label_smoothing=smoothing), loader=loader)
    found = []
    for epoch in range(3):
        batches = itertools.islice(loader.batches(epoch), STEPS_PER_EPOCH)
        steps = itertools.islice(batches, recipes.STEPS - len(found))
        found += [float(graph(*batch)[0].numpy()) for batch in steps]
    recipes.check(loss, found, model, values=GOLDEN)


def test_a_mix_is_a_function_of_seed_epoch_and_iteration():
    mixing = Mixing(0.2, 1.0, seed=3)
    mixes = [mixing.at(epoch, i, size=224) for epoch in range(4) for i in range(250)]
    assert len(set(mixes)) == 1000
    assert mixing.at(2, 17, size=224) == mixes[517] != Mixing(0.2, 1.0, seed=4).at(2, 17, size=224)
    cut = [mix for mix in mixes if mix.level == 1]
    assert abs(len(cut) - 500) < 64  # four standard deviations of 1000 coins
    for mix in cut:
        pixels = (mix.bottom - mix.top) * (mix.right - mix.left)
        assert mix.share == 1 - pixels / 224**2
    blended = np.array([mix.level for mix in mixes if mix.level != 1])
    # Beta(0.2, 0.2): mean 1/2, variance 1/4/(2 * 0.2 + 1) = 0.1786; 4 standard errors.
    assert abs(blended.mean() - 0.5) < 4 * np.sqrt(0.1786 / len(blended))
    assert abs(blended.var() - 0.1786) < 0.03
    assert {mix.share == mix.level for mix in mixes if mix not in cut} == {True}
    alone = [Mixing(0.0, 0.4, seed=3).at(0, i, size=32) for i in range(50)]
    assert {mix.level for mix in alone} == {1.0}
    alone = [Mixing(0.4, 0.0, seed=3).at(0, i, size=32) for i in range(50)]
    assert {mix.bottom for mix in alone} == {0}


def test_batches_begin_at_any_iteration():
    whole = [each[-1].numpy() for each in itertools.islice(mixed_loader().batches(1), 6)]
    later = [each[-1].numpy() for each in itertools.islice(mixed_loader().batches(1, 4), 2)]
    np.testing.assert_array_equal(later, whole[4:])


def spec(*flags):
    return of_cnn_train_val.make_spec(of_cnn_train_val.parse_args(["--device=cpu", *flags]))


@pytest.mark.parametrize("flag", ["--mixup_alpha=0.2", "--cutmix_alpha=1"])
def test_a_batch_that_cannot_be_paired_is_refused(flag):
    with pytest.raises(UsageError, match="is odd"):
        spec(flag, "--batch_size_per_device=3")
    with pytest.raises(UsageError, match="is odd"):  # 3 for each of 2 devices
        given = of_cnn_train_val.parse_args([flag, "--global_batch_size=6", "--gpu_num_per_node=2"])
        config.finish_train_args(config.make_parser("train").complete(given), device="cpu")
    assert spec(flag, "--batch_size_per_device=4").flags[flag[2:].partition("=")[0]] > 0
