"""The formulas of tools/plan_scale.py, by hand, and how far it is off published figures."""

from dataclasses import replace

import pytest

import model_registry
from small import call
from tools import plan_scale
from tools.plan_scale import Cluster

# 100 images take a second, of which 0.1 s remain beside a group of gradients or so.
CLUSTER = Cluster(rate=100, batch_size=100, half=False, per_node=8, link=300e9, nic=12.5e9)


def test_gradients_are_those_of_the_network():
    network = model_registry.MODELS["resnet50"].build(1000)
    parameters = [parameter for parameter in network.parameters()]
    assert plan_scale.PARAMETERS == sum(each.numel() for each in parameters)
    assert plan_scale.KERNELS == sum(each.numel() for each in parameters if each.dim() > 1)
    running = [value for name, value in network.named_buffers() if "running" in name]
    assert plan_scale.STATISTICS == sum(each.numel() for each in running)
    whole, half = (plan_scale.gradient_bytes(half=half) for half in (False, True))
    assert whole == 4 * (plan_scale.PARAMETERS + plan_scale.STATISTICS)
    assert whole - half == 2 * plan_scale.KERNELS


def test_a_ring():
    assert plan_scale.ring_seconds(1e9, 1, 1e9) == 0
    assert plan_scale.ring_seconds(1e9, 2, 1e9) == 1  # each sends half of it, twice
    assert plan_scale.ring_seconds(1e9, 1000, 1e9) == pytest.approx(2, rel=0.01)


def test_an_all_reduce_within_machines_and_between_them():
    within = plan_scale.all_reduce_seconds(300e6, CLUSTER, 8)
    assert within == pytest.approx(2 * 7 / 8 * 1e-3 + 14 * plan_scale.LINK_SECONDS)
    both = plan_scale.all_reduce_seconds(300e6, CLUSTER, 32)  # 4 machines
    between = 2 * 3 / 4 * 300e6 / 12.5e9 + 4 * plan_scale.NIC_SECONDS
    assert both == pytest.approx(within + between)
    single = plan_scale.all_reduce_seconds(300e6, CLUSTER, 1)
    assert single == 0


def test_gradients_travel_beside_the_backward_pass():
    assert plan_scale.step_seconds(CLUSTER, 1) == 1
    num_bytes = plan_scale.gradient_bytes(half=False)
    groups = 7
    # Fast: all but the last group is hidden.
    last = plan_scale.all_reduce_seconds(num_bytes / groups, CLUSTER, 16)
    assert plan_scale.step_seconds(CLUSTER, 16) == pytest.approx(1 + last)
    # Slow: the backward pass is over long before.
    slow = replace(CLUSTER, nic=1e6)
    group = plan_scale.all_reduce_seconds(num_bytes / groups, slow, 16)
    assert plan_scale.step_seconds(slow, 16) == pytest.approx(1 / 3 + groups * group)


def test_a_slow_loader_sets_the_pace():
    slow = replace(CLUSTER, loader=400)  # images/s of a machine, and its devices train 800
    assert plan_scale.step_seconds(slow, 8) == plan_scale.step_seconds(slow, 16) == 2
    assert plan_scale.throughput(slow, 16) == 800
    assert plan_scale.step_seconds(slow, 4) == plan_scale.step_seconds(CLUSTER, 4)


def test_an_epoch_has_whole_batches():
    assert plan_scale.epoch_seconds(CLUSTER, 1) == 12_811


def test_float32_agrees_with_published_figures_and_half_precision_is_an_upper_bound():
    for what, devices, theirs, model in plan_scale.check_published():
        off = model / theirs - 1
        assert 0 < off < (0.42 if what.endswith("half") else 0.04), (what, devices)


def test_the_tables():
    check = call(plan_scale.main, "--check")
    assert check.status == 0 and check.stdout.count("\n") == 2 + 10
    flags = ("--rate=2470", "--use_fp16", "--nic_gigabits=25", "--cores_per_node=24")
    plan = call(plan_scale.main, *flags)
    rows = [line.split("|")[1].strip() for line in plan.stdout.splitlines()[2:]]
    assert rows == ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1,024"]
    last = call(plan_scale.main, "--batch_size_per_device=2048").stdout.splitlines()[-1]
    assert last.endswith(" | - |")  # a batch of 2 million
    for wrong in (["--rate=0"], ["--images_per_core=9"], ["--check", "--rate=9"]):
        result = call(plan_scale.main, *wrong)
        assert result.status == 2 and wrong[0].partition("=")[0] in result.stderr
