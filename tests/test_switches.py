"""Half precision, layouts and the switches of a GPU: the same function, the same snapshots."""

import re
from pathlib import Path

import numpy as np
import oneflow as flow
import pytest

import model_registry
import of_cnn_evaluate
import of_cnn_train_val
import ofrecord_util
import optimizer_util
from cnns.checkpoint.snapshot import TRAINING_STATE, read_arrays, state_arrays
from cnns.checkpoint.weights import load_weights
from cnns.data.crops import Augmentation
from cnns.data.datasets import open_train_dataset
from cnns.data.images import Preprocessing
from cnns.data.kinds import Synthetic
from cnns.data.synthetic import SyntheticTrainLoader
from cnns.distributed import place, set_communication
from cnns.flags import checks
from cnns.flags.devices import CUDA_FLAGS
from cnns.graphs import EvalGraph, PredictGraph, TrainGraph
from cnns.losses import CrossEntropy
from cnns.models.layers import Switches, from_standard
from small import TINY, Tiny, call, losses, tree, validation_figures, write_parts

LAYOUTS = [
    Switches(channel_last=True),
    Switches(pad_output=True),
    Switches(channel_last=True, pad_output=True),
]


@pytest.fixture
def _any_layout(monkeypatch):
    """Convolutions and batch norms that compute right in any layout.

    On a CPU, OneFlow's are wrong in (N, H, W, C); docs/oneflow-notes.md says how.
    """
    batch_norm, conv2d = flow.nn.BatchNorm2d.forward, flow.nn.Conv2d.forward

    def norm_in_nchw(self, x):
        if self.channel_axis == 1:
            return batch_norm(self, x)
        self.channel_axis = 1
        y = batch_norm(self, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        self.channel_axis = 3
        return y

    def conv_in_nchw(self, x):
        if self.channel_pos == "channels_first":
            return conv2d(self, x)
        weight = self.weight.permute(0, 3, 1, 2)
        y = flow.nn.functional.conv2d(
            x.permute(0, 3, 1, 2), weight, None, self.stride, self.padding
        )
        return y.permute(0, 2, 3, 1)

    monkeypatch.setattr(flow.nn.BatchNorm2d, "forward", norm_in_nchw)
    monkeypatch.setattr(flow.nn.Conv2d, "forward", conv_in_nchw)


def initial(switches: Switches):
    flow.manual_seed(0)
    return Tiny(10, switches)


@pytest.mark.usefixtures("_any_layout")
@pytest.mark.parametrize("switches", LAYOUTS)
def test_initial_weights_and_logits_do_not_depend_on_the_layout(switches):
    plain, other = initial(Switches()), initial(switches)
    expected = state_arrays(plain)
    found = state_arrays(other)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
    rng = np.random.default_rng(1)
    weights = {
        name: rng.uniform(0.1, 0.3, array.shape).astype("f") for name, array in found.items()
    }
    image = flow.tensor(rng.standard_normal((3, 3, 48, 40), np.float32))
    logits = []
    for model in (plain, other):
        load_weights(model, weights, path="-")
        logits.append(model.eval()(image).numpy())
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4)


def test_the_layout_is_the_one_that_was_asked_for():
    model = initial(Switches(channel_last=True, pad_output=True))
    assert tuple(model.conv1.weight.shape) == (8, 7, 7, 4)
    assert model.conv1.channel_pos == model.maxpool.channel_pos == "channels_last"
    assert model.layer2[0].bn1.channel_axis == 3
    assert not model.conv1.weight.numpy()[..., 3].any()
    later = initial(Switches())  # the switch is not left on
    assert later.conv1.channel_pos == "channels_first"


@pytest.mark.parametrize("switches", LAYOUTS)
def test_standard_layout_and_back(switches):
    model = initial(switches)
    for name, array in state_arrays(model).items():
        own = model.state_dict()[name].numpy()
        np.testing.assert_array_equal(from_standard(model, name, array), own)


@pytest.mark.parametrize(
    "switches, fused",
    [
        (Switches(fuse_bn_relu=True), r"bn1|layer\d\.0\.bn[12]"),
        (Switches(fuse_bn_add_relu=True), r"layer\d\.0\.bn3"),
    ],
)
def test_fused_kernels_are_where_they_belong(switches, fused):
    model = initial(switches)
    found = {
        name
        for name, module in model.named_modules()
        if isinstance(module, flow.nn.FusedBatchNorm2d)
    }
    norms = {name for name, _ in model.named_modules() if re.search(r"bn\d$", name)}
    assert found == {name for name in norms if re.fullmatch(fused, name)} and found
    expected = state_arrays(initial(Switches()))
    arrays = state_arrays(model)
    assert arrays.keys() == expected.keys()
    assert all((arrays[name] == expected[name]).all() for name in arrays)
    no_decay = optimizer_util.no_decay_names(model)
    assert no_decay == optimizer_util.no_decay_names(initial(Switches()))


def make_train_graph(*, use_fp16, num_nodes=1):
    model = place(initial(Switches()), "cpu")
    optimizer = optimizer_util.build_optimizer(
        model, "sgd", learning_rate=0.1, weight_decay=0.0, momentum=0.9
    )
    loader = SyntheticTrainLoader(
        Synthetic(num_examples=8, num_classes=10),
        batch_size=4,
        preprocessing=TINY.preprocessing(),
        device="cpu",
    )
    graph = TrainGraph(
        model,
        loader,
        optimizer,
        loss=CrossEntropy(label_smoothing=0.1),
        top_k=5,
        use_fp16=use_fp16,
        num_nodes=num_nodes,
    )
    return graph, loader


def test_what_graphs_are_configured_to():
    plain, _ = make_train_graph(use_fp16=False)
    half, loader = make_train_graph(use_fp16=True, num_nodes=2)
    assert not plain.config.proto.enable_auto_mixed_precision
    assert half.config.proto.enable_auto_mixed_precision
    assert plain._grad_scaler is None
    scaler = half._grad_scaler
    assert isinstance(scaler, flow.amp.GradScaler)
    expected = {"init_scale": 2**16, "growth_factor": 2, "backoff_factor": 0.5}
    assert expected | {"growth_interval": 2000} == {
        name: getattr(scaler, f"_{name}") for name in (*expected, "growth_interval")
    }
    heuristic = [g.config.proto.cudnn_conv_heuristic_search_algo for g in (plain, half)]
    assert heuristic == [False, True]
    for use_fp16 in (False, True):
        model = place(initial(Switches()), "cpu")
        for graph in (
            EvalGraph(model, loader, top_k=5, use_fp16=use_fp16),
            PredictGraph(model, use_fp16=use_fp16),
        ):
            assert graph.config.proto.enable_auto_mixed_precision == use_fp16


def test_the_settings_of_nccl(monkeypatch):
    called = {}
    for name in ("set_fusion_threshold_mbytes", "set_fusion_max_ops_num"):
        monkeypatch.setattr(
            flow.boxing.nccl, name, lambda value, name=name: called.update({name: value})
        )
    set_communication(use_fp16=True)
    assert called == {}
    set_communication(use_fp16=False, nccl_fusion_threshold_mb=16, nccl_fusion_max_ops=24)
    assert called == {"set_fusion_threshold_mbytes": 16, "set_fusion_max_ops_num": 24}


@pytest.fixture
def _tiny_model(monkeypatch, tmp_path):
    monkeypatch.setitem(model_registry.MODELS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)


def train(*argv):
    flags = ("--model=tiny", "--device=cpu", "--num_examples=32", "--num_classes=10")
    return call(of_cnn_train_val.main, *flags, "--loss_print_every_n_iter=1", *argv)


@pytest.mark.long
@pytest.mark.usefixtures("_tiny_model")
def test_half_precision_on_a_cpu_is_float32(tmp_path):
    plain = train("--model_save_dir=plain")
    half = train("--model_save_dir=half", "--use_fp16")
    assert half.status == 0, half.stderr
    assert half.stderr.count("--use_fp16: a CPU computes in float32.") == 1
    assert losses(half.stdout) == losses(plain.stdout) and len(losses(plain.stdout)) == 8
    weights = "snapshot_epoch_1/model.safetensors"
    assert tree(tmp_path / "half")[weights] == tree(tmp_path / "plain")[weights]
    # Dynamic loss scaling has a state of its own, and that resumes as well.
    resumed = train("--resume=half/snapshot_epoch_0", "--model_save_dir=resumed", "--use_fp16")
    assert resumed.status == 0, resumed.stderr
    for name in ("model.safetensors", "training.safetensors"):
        path = f"snapshot_epoch_1/{name}"
        assert tree(tmp_path / "resumed")[path] == tree(tmp_path / "half")[path]
    state = read_arrays("half/snapshot_epoch_1", TRAINING_STATE)
    assert any("loss" in key.lower() for key in state), sorted(state)


@pytest.mark.long
@pytest.mark.usefixtures("_tiny_model", "_any_layout")
def test_training_goes_on_in_another_layout(tmp_path, monkeypatch):
    flags = [flag for flag in CUDA_FLAGS if flag != "channel_last"]
    monkeypatch.setattr(checks, "CUDA_FLAGS", flags)
    whole = train("--model_save_dir=whole")
    assert whole.status == 0, whole.stderr
    other = train(
        "--resume=whole/snapshot_epoch_0",
        "--model_save_dir=other",
        "--channel_last",
        "--pad_output",
    )
    assert other.status == 0, other.stderr
    np.testing.assert_allclose(losses(other.stdout), losses(whole.stdout)[4:], rtol=1e-4)
    for name in ("model", "training"):
        one = read_arrays("whole/snapshot_epoch_1", f"{name}.safetensors")
        two = read_arrays("other/snapshot_epoch_1", f"{name}.safetensors")
        assert one.keys() == two.keys()
        for key, array in one.items():
            assert array.shape == two[key].shape
    write_parts(tmp_path / "val", [[0, 1, 2, 3] * 3])
    figures = [
        validation_figures(
            call(
                of_cnn_evaluate.main,
                "--device=cpu",
                "--val_data_dir=val",
                "--model_load_dir=whole/snapshot_epoch_1",
                *flags,
            ).stdout
        )
        for flags in ((), ("--channel_last", "--pad_output", "--use_fp16"))
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 1


@pytest.mark.usefixtures("_tiny_model")
@pytest.mark.parametrize("flag", CUDA_FLAGS)
def test_a_cpu_refuses_what_needs_cuda(flag, tmp_path):
    write_parts(tmp_path / "train", [[0, 1, 2, 3] * 3])
    value = "=4" if flag.startswith("nccl") else ""
    result = call(
        of_cnn_train_val.main, "--device=cpu", "--train_data_dir=train", f"--{flag}{value}"
    )
    assert result.status == 2
    assert f"--{flag} needs CUDA, and the device is a CPU" in result.stderr


def test_the_reader_of_the_gpu_decoder_starts_over_when_a_run_is_resumed(tmp_path):
    """The order of its parts and its seeds are of the step at which it begins.

    That the graph reads, decodes and ends is in tests/fakecuda: a CPU cannot even build it.
    """
    directory = write_parts(tmp_path / "train", [[0, 1], [2, 3], [4], [5, 6], [7]])

    def make(first_step):
        loader = ofrecord_util.train_loader(
            open_train_dataset(str(directory)),
            batch_size=4,
            preprocessing=Preprocessing(32, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
            augmentation=Augmentation(area=(0.5, 1.0), shuffle_buffer_size=1),
            seed=0,
            device="cpu",
            gpu_image_decoder=True,
            first_step=first_step,
        )
        links = Path(loader.links.name)
        names = [links.joinpath(f"part-{i:05d}").resolve().name for i in range(5)]
        assert sorted(names) == [f"part-{i:05d}" for i in range(5)]
        assert next(loader.batches(epoch=0, iteration=3)) == ()
        return names, loader.decode

    (first, decoder), (again, _), (later, other) = make(0), make(0), make(6)
    assert first == again != later
    assert decoder.seed != other.seed
    assert (decoder.target_width, decoder.target_height) == (32, 32)
    assert tuple(decoder.random_area) == (0.5, 1.0)
