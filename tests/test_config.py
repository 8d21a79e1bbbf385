import argparse
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
import model_registry
from cnns.errors import UsageError, run_main
from cnns.flags.checks import check_backend_flags, take_learning_rate
from cnns.flags.defaults import learning_rate_per_256
from cnns.flags.values import number
from cnns.models.model import default_resize_shorter
from config import epochs_to_steps
from fuzz import bounded, fuzz
from small import call


def parse(*argv: str) -> argparse.Namespace:
    return config.make_parser("train").read(argv)


def finish(*argv: str, device: str = "cuda") -> argparse.Namespace:
    args = parse(*argv)
    config.finish_train_args(args, device=device)
    return args


def test_plan_of_imagenet():
    plan = epochs_to_steps(
        num_examples=1281167,
        global_batch_size=256,
        num_epochs=90,
        warmup_epochs=5,
        lr_step_epochs=(30, 60, 80),
    )
    assert plan.steps_per_epoch == 5005
    assert plan.total_steps == 450450
    assert plan.warmup_steps == 25025
    assert plan.step_milestones == (150150, 300300, 400400)


def test_an_epoch_ends_with_the_step_that_completes_the_data():
    assert epochs_to_steps(num_examples=50, global_batch_size=16, num_epochs=1).total_steps == 4
    assert epochs_to_steps(num_examples=48, global_batch_size=16, num_epochs=1).total_steps == 3


def test_recipe_is_the_default():
    args = finish("--train_data_dir=x", "--val_data_dir=y")
    assert (args.optimizer, args.momentum, args.wd) == ("sgd", 0.875, 1 / 32768)
    assert (args.label_smoothing, args.lr_decay, args.warmup_epochs) == (0.1, "cosine", 5)
    assert (args.num_epochs, args.batch_size_per_device) == (90, 64)
    assert args.random_area == (0.08, 1.0)
    assert args.random_aspect_ratio == pytest.approx((0.75, 4 / 3))
    assert default_resize_shorter(224) == 256
    entry = model_registry.MODELS["resnet50"]
    assert entry.image_size == 224
    assert entry.rgb_mean == (123.68, 116.779, 103.939)
    assert entry.rgb_std == (58.393, 57.12, 57.375)


def test_aliases_of_the_original_page():
    args = parse(
        "--num_epoch=7",
        "--model_update=momentum",
        "--rgb-mean=1,2,3",
        "--rgb-std=4, 5, 6",
        "--node_ips=192.168.1.1, 192.168.1.2",
    )
    assert args.num_epochs == 7
    assert args.optimizer == "sgd"
    assert args.rgb_mean == (1, 2, 3)
    assert args.rgb_std == (4, 5, 6)
    assert args.node_ips == ("192.168.1.1", "192.168.1.2")


@pytest.mark.parametrize("text, value", [("", True), ("=True", True), ("=False", False)])
def test_switches(text, value):
    assert parse(f"--save_last{text}").save_last is value


@pytest.mark.parametrize("epochs, warmup", [(90, 5), (10, 5), (3, 1), (1, 0)])
def test_default_warmup_is_at_most_half_of_the_run(epochs, warmup):
    assert finish(f"--num_epochs={epochs}", "--train_data_dir=x").warmup_epochs == warmup


def test_trial_on_a_cpu_takes_only_what_was_not_given():
    args = finish("--image_size=48", device="cpu")
    assert (args.image_size, args.batch_size_per_device, args.num_epochs) == (48, 8, 2)
    args = finish(device="cuda")
    assert (args.image_size, args.batch_size_per_device, args.num_epochs) == (None, 64, 90)
    args = finish("--train_data_dir=x", device="cpu")
    assert (args.image_size, args.batch_size_per_device, args.num_epochs) == (None, 64, 90)


@pytest.mark.parametrize("model", model_registry.MODELS)
def test_every_network_takes_the_pictures_of_its_trial(model):
    args = finish(f"--model={model}", device="cpu")
    model_registry.MODELS[model].check_size(args.image_size, "--image_size")


def test_the_global_batch_is_divided_among_processes():
    def sizes(*argv):
        args = finish("--gpu_num_per_node=2", "--num_nodes=3", *argv, device="cpu")
        return args.batch_size_per_device, args.global_batch_size

    assert sizes("--global_batch_size=48") == (8, 48)
    assert sizes("--batch_size_per_device=5") == (5, 30)
    assert sizes("--global_batch_size=30", "--batch_size_per_device=5") == (5, 30)
    assert sizes() == (8, 48) and sizes("--train_data_dir=x") == (64, 384)


def test_the_gpu_decoder_reads_in_its_own_order():
    flags = ("--train_data_dir=x", "--data_order=global", "--gpu_image_decoder")
    with pytest.raises(UsageError, match="--gpu_image_decoder contradicts --data_order=global"):
        finish(*flags, device="cuda")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--warmup_epochs=3", "--num_epochs=3"], "--warmup_epochs=3"),
        (["--optimizer=adam", "--momentum=0.9"], "--momentum has no effect"),
        (["--epsilon=1"], "--epsilon has no effect"),
        (["--decay_rate=0.9"], "--decay_rate has no effect"),
        (["--lr_decay_rate=0.9"], "--lr_decay_rate has no effect"),
        (["--lr_step_epochs=1,2"], "--lr_step_epochs has no effect"),
        (["--lr_decay=step", "--lr_step_epochs=60,30"], "must rise"),
        (["--lr_decay=step", "--lr_step_epochs=1,2", "--warmup_epochs=3"], "within"),
        (["--val_data_dir=x"], "--val_data_dir needs --train_data_dir"),
        (["--random_area=0.5,1"], "--random_area has no effect on synthetic"),
        (["--val_batch_size_per_device=4"], "--val_batch_size_per_device has no effect"),
        (["--train_data_dir=x.npz", "--shuffle_buffer_size=9"], "--shuffle_buffer_size has no"),
        (["--train_data_part_num=1"], "--train_data_part_num needs"),
        (["--cache_dir=x"], "--cache_dir needs --train_data_dir"),
        (["--train_data_dir=x", "--num_val_examples=1"], "--num_val_examples needs"),
        (["--data_order=global"], "--data_order has no effect on synthetic"),
        (["--train_data_dir=x.npz", "--data_order=global"], "--data_order has no effect"),
        (
            ["--train_data_dir=x", "--data_order=global", "--shuffle_buffer_size=9"],
            "--shuffle_buffer_size contradicts --data_order=global",
        ),
        (
            ["--global_batch_size=50", "--gpu_num_per_node=4"],
            "--global_batch_size=50 cannot be divided among 4 processes",
        ),
        (
            ["--global_batch_size=8", "--batch_size_per_device=8", "--gpu_num_per_node=2"],
            "--batch_size_per_device=8 contradicts --global_batch_size=8, which is 4 for each of 2",
        ),
        (
            ["--global_batch_size=8", "--accumulate_steps=3"],
            "--global_batch_size=8, 8 for each of 1 processes, cannot be divided by --accum",
        ),
        (
            ["--global_batch_size=8", "--batch_size_per_device=8", "--accumulate_steps=2"],
            "which is 4 for each of 1 processes in 2 steps",
        ),
        (["--accumulate_steps=2", "--use_fp16"], "--accumulate_steps contradicts --use_fp16"),
        (
            ["--accumulate_steps=2", "--gpu_image_decoder", "--train_data_dir=x"],
            "--gpu_image_decoder reads inside the graph",
        ),
        (["--ema_steps=2"], "--ema_steps needs --ema_decay"),
        (["--nesterov", "--momentum=0"], "--nesterov contradicts --momentum=0"),
        (["--optimizer=adam", "--norm_wd=0.2"], "--norm_wd=0.2: with adam each kind"),
        (["--optimizer=adam", "--trust_coefficient=1"], "--trust_coefficient has no effect with"),
        (
            ["--stochastic_depth=0.1", "--fuse_bn_add_relu", "--device=cuda"],
            "--stochastic_depth contr",
        ),
        (["--bce_sum"], "--bce_sum has no effect with --loss=cross_entropy"),
        (
            ["--randaugment_magnitude=4"],
            "--randaugment_magnitude has no effect without --auto_augment",
        ),
    ],
)
def test_contradictions_are_refused(argv, words):
    with pytest.raises(UsageError, match=words):
        finish(*argv)


@pytest.mark.parametrize(
    ("argv", "factor"), [((), 0.0), (("--lr_scaling=linear",), 4.0), (("--lr_scaling=sqrt",), 2.0)]
)
@pytest.mark.parametrize("rate", [None, 0.1])
def test_the_learning_rate_is_scaled_as_asked(argv, factor, rate):
    """Unless asked, only the default is, in proportion. The flag stays as it was given."""
    given = [] if rate is None else [f"--learning_rate={rate}"]
    args = finish("--batch_size_per_device=256", "--gpu_num_per_node=4", *argv, *given)
    take_learning_rate(args, model_registry.MODELS["resnet50"])
    schedule = config.make_schedule(
        args,
        epochs_to_steps(num_examples=4096, global_batch_size=1024, num_epochs=90, warmup_epochs=5),
    )
    plain = 4 * 0.256 if rate is None else 0.1
    expected = plain if not factor else factor * (0.256 if rate is None else 0.1)
    assert schedule.learning_rate == pytest.approx(expected)
    if rate is not None:
        assert args.learning_rate == rate


def test_a_minimum_above_the_peak_is_refused():
    args = finish("--learning_rate=0.1", "--lr_min=0.2")
    with pytest.raises(UsageError, match="--lr_min=0.2 is above the peak learning rate, 0.1"):
        take_learning_rate(args, model_registry.MODELS["resnet50"])


def test_optimizers_without_a_default_rate_ask_for_one():
    resnet = model_registry.MODELS["resnet50"]
    with pytest.raises(
        UsageError, match="--optimizer=lars has no default rate; give --learning_ra"
    ):
        take_learning_rate(finish("--optimizer=lars"), resnet)
    with pytest.raises(UsageError, match="--optimizer=lamb has no default rate with --finetune"):
        learning_rate_per_256(resnet, "lamb", finetune=True)
    args = finish("--optimizer=lamb", "--batch_size_per_device=2048")
    take_learning_rate(args, resnet)
    assert args.learning_rate == pytest.approx(0.005)


def test_adamw_is_adam():
    assert parse("--optimizer=AdamW").optimizer == "adam"


def test_accumulated_batches_make_the_global_one():
    args = finish("--batch_size_per_device=8", "--gpu_num_per_node=2", "--accumulate_steps=4")
    assert args.global_batch_size == 64
    args = finish("--global_batch_size=64", "--gpu_num_per_node=2", "--accumulate_steps=4")
    assert args.batch_size_per_device == 8


@pytest.mark.parametrize(
    "flag",
    [
        "--batch_size_per_device=0",
        "--batch_size_per_device=1.5",
        "--num_epochs=0",
        "--model=resnet51",
        "--optimizer=sdg",
        "--lr_decay=cosinus",
        "--device=tpu",
        "--label_smoothing=1.5",
        "--learning_rate=fast",
        "--learning_rate=nan",
        "--random_area=0,1",
        "--random_area=0.5",
        "--rgb_mean=1,2",
        "--rgb_std=1,0,1",
        "--save_init=maybe",
        "--num_epo=3",
    ],
)
def test_wrong_values_are_one_line_that_names_the_flag(flag):
    with pytest.raises(UsageError) as error:
        parse(flag)
    assert "\n" not in str(error.value)
    assert flag.split("=")[0] in str(error.value)


def test_short_runs_keep_a_step_after_the_warmup():
    plan = epochs_to_steps(num_examples=8, global_batch_size=8, num_epochs=1, warmup_epochs=0.9)
    assert (plan.total_steps, plan.warmup_steps) == (1, 0)
    with pytest.raises(UsageError, match="--lr_step_epochs=0.1,0.2"):
        epochs_to_steps(
            num_examples=8, global_batch_size=8, num_epochs=1, lr_step_epochs=(0.1, 0.2)
        )


def test_a_step_schedule_that_never_drops_is_said():
    args = parse("--lr_decay=step", "--num_epochs=10")
    assert any("never drops" in text for text in config.finish_train_args(args, device="cuda"))


def test_run_main_turns_errors_into_one_line(capsys):
    def fail():
        raise UsageError("two\nlines")

    def interrupt():
        raise KeyboardInterrupt

    def exhaust():
        raise MemoryError("cannot allocate 9 GB")

    def fill_the_disk():
        raise OSError(28, "No space left on device", "x.log")

    for main, status in ((fail, 2), (interrupt, 130), (exhaust, 1), (fill_the_disk, 1)):
        assert run_main(main) == status
        assert capsys.readouterr().err.count("\n") == 1
    assert call(lambda argv: None).status == 0


def test_numbers_have_bounds():
    assert number(int, 1)("3") == 3
    assert number(float, 0)("1e-3") == 1e-3
    for text in ("0", "-1", "x", "1.0"):
        with pytest.raises(argparse.ArgumentTypeError):
            number(int, 1)(text)
    for text in ("nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError):
            number(float, 0, math.inf)(text)


VALUES = (
    *("", "-", "0", "1", "-1", "1.5", "1e308", "1e999", "nan", "inf", "-0", "9" * 30, "9" * 500),
    *("9" * 5000, "0x10", "1_0", "٣", "True", "FALSE", "x", "\x1b[2J", "\udcff", "\ud800", "a\nb"),
    *("1,2", "1,2,3", "1,,2", ",", "0.1,1", "1,0.1", "nan,1", "cpu", "cuda", "auto", "step"),
    *("exponential", "adam", "rmsprop", "momentum", "onnxruntime", "resnet18", "/", "x.npz", "~"),
)


@fuzz(200)
@given(st.data())
def test_any_flags(data):
    """What is parsed, and what is checked before anything is opened, ends in a line or is taken."""
    script = data.draw(st.sampled_from(sorted(config.SCRIPTS)))
    parser = config.make_parser(script)
    argv = []
    for name in data.draw(st.lists(st.sampled_from(sorted(parser.flags)), max_size=6)):
        value = data.draw(st.sampled_from(VALUES) | st.text(max_size=8))
        argv.append(f"--{name}={value}")

    def main(argv):
        args = parser.read(argv)
        if script == "train":
            config.finish_train_args(args, device=data.draw(st.sampled_from(["cpu", "cuda"])))
            steps = {name: getattr(args, name) for name in ("warmup_epochs", "lr_step_epochs")}
            for examples in (1, 2**40):
                plan = epochs_to_steps(
                    num_examples=examples,
                    global_batch_size=args.batch_size_per_device,
                    num_epochs=args.num_epochs,
                    lr_decay_epochs=args.lr_decay_epochs,
                    **steps,
                )
                assert 0 < plan.steps_per_epoch <= plan.total_steps
                assert 0 <= plan.warmup_steps < plan.total_steps
        elif script != "export":
            check_backend_flags(args)

    with bounded():
        result = call(main, *argv)
        assert result.status in (0, 1, 2)
        assert result.status == 0 or len(result.stderr.splitlines()) == 1
        assert "\x1b" not in result.stderr
