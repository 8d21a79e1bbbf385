"""Train a CNN with OneFlow and validate it after each epoch.

python3 of_cnn_train_val.py                                # synthetic data
python3 of_cnn_train_val.py --train_data_dir=DIR/train --val_data_dir=DIR/validation
python3 of_cnn_train_val.py --num_nodes=2 --node_ips=ADDRESS,ADDRESS --gpu_num_per_node=8 ...
python3 of_cnn_train_val.py --help

The flags become a `RunSpec`, what will be run, checked and never changed; `build_run` makes the run
of it, and cnns/run.py has the loop.
"""

import cnns.startup  # noqa: F401  (first, see there)

import io
import sys
from argparse import Namespace
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import oneflow as flow
from oneflow import nn

import config
import ofrecord_util
import optimizer_util
from cnns.checkpoint.find import (
    find_resume,
    find_snapshot,
    held_snapshots,
    open_save_dir,
    position,
)
from cnns.checkpoint.snapshot import Snapshot, load_training_state, versions
from cnns.checkpoint.training import fit_state
from cnns.checkpoint.weights import Checkpoint, check_fits, open_checkpoint, standard_shapes
from cnns.data.crops import Augmentation
from cnns.data.datasets import open_train_dataset, open_val_dataset
from cnns.data.kinds import Dataset, Synthetic
from cnns.data.synthetic import SyntheticTrainLoader
from cnns.distributed import (
    choose_device,
    launch_script,
    place,
    set_communication,
    share_usage_errors,
    takes_cuda,
)
from cnns.errors import RunError, UsageError, run_main
from cnns.evaluation import Evaluator
from cnns.graphs import DropoutMasks, TrainGraph
from cnns.launch.external import find_job, take_numbers
from cnns.launch.worker import is_worker, leave
from cnns.log import Log, notice, open_log
from cnns.models.model import check_switches
from cnns.resume import (
    check_flags,
    compare_flags,
    compare_runs,
    inherited_flags,
    num_processes,
)
from cnns.run import Intervals, Parts, Progress, Run, Saver, announce
from config import Plan
from model_registry import MODELS
from optimizer_util import Schedule


def main(argv: list[str] | None = None) -> int | None:
    with share_usage_errors():
        given = parse_args(argv)
        args = config.make_parser("train").complete(given)
        job = None if is_worker() else find_job(args)
    if job is not None:
        if job.world_size > 1 or takes_cuda(args.device):
            memory = config.memory_flags(args, batch="batch_size_per_device")
            return launch_script(__file__, argv, job=job, facts=lambda: facts(given), memory=memory)
    spec = make_spec(given)
    for text in spec.notices:
        notice(text)
    log = open_log(spec.flags["log_dir"], "of_cnn_train_val")
    resumed = spec.resumed.path if spec.resumed else None
    with open_save_dir(spec.flags["model_save_dir"], resumed=resumed) as save_dir:
        check_still_newest(spec)
        run = build_run(spec, save_dir=save_dir, log=log)
        announce(
            run,
            restored=spec.start.path if spec.start else None,
            resumed=spec.resumed is not None,
            save_init=spec.flags["save_init"],
        )
        run.run()
    return None


def parse_args(argv: list[str] | None) -> Namespace:
    """The flags that were given, and no other."""
    given = config.make_parser("train").parse_args(argv)
    take_numbers(given)
    if getattr(given, "resume", "auto") != "auto":
        if "model_load_dir" in given:
            raise UsageError(
                "--resume and --model_load_dir both name weights to start from; give one of them"
            )
        if getattr(given, "finetune", False):
            raise UsageError("--resume takes all weights of a run; leave --finetune out")
    return given


# What will be run.


@dataclass(frozen=True)
class RunSpec:
    """What will be run, checked. Nothing is built yet, and nothing of it changes afterwards."""

    device: str
    about: Snapshot  # of its snapshots, except for the progress; with the final flags
    train_data: Dataset
    val_data: Dataset | None  # None: no validation
    batch_size: int  # global
    plan: Plan
    schedule: Schedule
    start: Checkpoint | None  # weights to start from; None: random ones
    resumed: Checkpoint | None  # the same, where it is the snapshot of a run that is resumed
    held: frozenset  # snapshots that were in --model_save_dir when it was looked at
    notices: list[str]  # for the user

    @property
    def flags(self) -> dict[str, Any]:
        return self.about.flags

    @property
    def progress(self) -> Progress:
        """Where the run begins."""
        if self.resumed is None:
            return Progress()
        return Progress(**{name: getattr(self.resumed.snapshot, name) for name in vars(Progress())})

    def describe(self, progress: Progress) -> Snapshot:
        """What a snapshot of this run says."""
        return replace(self.about, **vars(progress))


def make_spec(given: Namespace) -> RunSpec:
    """Check flags, data and snapshots. Raises UsageError or RunError."""
    parser = config.make_parser("train")
    args = parser.complete(given)
    device = choose_device(args.device, count=args.gpu_num_per_node)
    notices: list[str] = []
    held = held_snapshots(args.model_save_dir)
    resumed = find_resume(
        args.resume, args.model_save_dir, check=partial(check_flags, parser=parser)
    )
    if resumed is not None:
        flags = inherited_flags(resumed.snapshot.flags, parser, device=device)
        args = parser.complete(given, flags)
        args.model_load_dir, args.finetune = None, False  # of the first start
        notices += compare_flags(args, resumed.snapshot.flags, parser, path=resumed.path)
    notices += config.finish_train_args(args, device=device)
    train_data, val_data = open_data(args)
    notices += train_data.check_shares(config.num_processes(args))
    start = resumed or open_start(args)
    about = describe_network(args, start, train_data, notices)
    train_data = train_data.for_network(about.num_classes)
    if val_data is not None:
        val_data = val_data.for_network(about.num_classes)
    batch_size = global_batch_size(args)
    if args.learning_rate is None:
        own = MODELS[about.model].learning_rates
        rate = own.get(args.optimizer, config.LEARNING_RATE_PER_256[args.optimizer])
        args.learning_rate = rate * batch_size / 256
        notices.append(f"Learning rate: {args.learning_rate:g} ({rate:g} per 256 images).")
    plan = config.epochs_to_steps(
        num_examples=train_data.num_examples,
        global_batch_size=batch_size,
        num_epochs=args.num_epochs,
        warmup_epochs=args.warmup_epochs,
        lr_step_epochs=args.lr_step_epochs,
        lr_decay_epochs=args.lr_decay_epochs,
    )
    about = replace(
        about,
        steps_per_epoch=plan.steps_per_epoch,
        global_batch_size=batch_size,
        train_data=train_data.fingerprint(),
        flags=vars(args),
        versions=versions(),
    )
    if resumed is not None:
        notices += compare_runs(about, resumed.snapshot, path=resumed.path)
    return RunSpec(
        device=device,
        about=about,
        train_data=train_data,
        val_data=val_data,
        batch_size=batch_size,
        plan=plan,
        schedule=make_schedule(args, plan),
        start=start,
        resumed=resumed,
        held=held,
        notices=notices,
    )


def make_schedule(args: Namespace, plan: Plan) -> Schedule:
    return Schedule(
        args.lr_decay,
        learning_rate=args.learning_rate,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        step_milestones=plan.step_milestones,
        decay_rate=args.lr_decay_rate,
        exponential_steps=plan.exponential_steps,
    )


def global_batch_size(args: Namespace) -> int:
    return args.batch_size_per_device * config.num_processes(args)


def open_data(args: Namespace) -> tuple[Dataset, Dataset | None]:
    """The training and validation data, checked; None: no validation."""
    batch_size = global_batch_size(args)
    if args.train_data_dir is None:
        pool = SyntheticTrainLoader.POOL_BATCHES * batch_size
        if (args.num_val_examples or 0) > pool:
            raise UsageError(
                f"--num_val_examples={args.num_val_examples}, but synthetic data have {pool} "
                "images; give at most that, or leave the flag out"
            )
        epoch = args.num_examples or config.SYNTHETIC_STEPS_PER_EPOCH * batch_size
        val_data = Synthetic(num_examples=args.num_val_examples or pool, seed=args.seed)
        return replace(val_data, num_examples=epoch), val_data
    train_data = open_train_dataset(
        args.train_data_dir, part_num=args.train_data_part_num, num_examples=args.num_examples
    )
    if batch_size > train_data.num_examples:
        raise UsageError(
            f"--batch_size_per_device={args.batch_size_per_device} makes batches of {batch_size}, "
            f"and there are {train_data.num_examples} training images; give a smaller one"
        )
    if args.val_data_dir is None:
        return train_data, None
    return train_data, open_val_dataset(
        args.val_data_dir, part_num=args.val_data_part_num, num_examples=args.num_val_examples
    )


def open_start(args: Namespace) -> Checkpoint | None:
    """The weights to start from, of any format. Raises UsageError where --finetune has none."""
    if args.finetune and args.model is not None and args.model_load_dir is None:
        args.model_load_dir = MODELS[args.model].installed_weights()
    if args.model_load_dir is not None:
        path = find_snapshot(args.model_load_dir, models=MODELS)
        return open_checkpoint(path, models=MODELS, model=args.model)
    if args.finetune:
        installed = ", ".join(name for name, entry in MODELS.items() if entry.weights)
        raise UsageError(
            "--finetune needs --model_load_dir, the weights to start from, or a --model with "
            f"installed ones ({installed})"
        )
    return None


def describe_network(
    args: Namespace, start: Checkpoint | None, train_data: Dataset, notices: list[str]
) -> Snapshot:
    """What the network is; adds notices for the user.

    Model, class count and preprocessing are those of the flags, else of the weights to start from,
    else of the training data and the table of models.
    """
    known = start.snapshot if start else None
    if start is not None:
        notices += start.notices()
        check_fits(
            start.snapshot,
            models=MODELS,
            model=args.model,
            num_classes=args.num_classes,
            path=start.path,
            finetune=args.finetune if args.resume is None else None,
        )
    model = args.model or (known.model if known else "resnet50")
    check_switches(MODELS, model, config.switches(args))
    num_classes: int | None
    if known and not args.finetune:
        num_classes, classes = known.num_classes, train_data.classes or known.classes
    else:
        num_classes = args.num_classes or train_data.num_classes
        if num_classes is None and known:
            num_classes = known.num_classes
        classes = train_data.classes
    if num_classes is None:
        num_classes = 1000
        if args.train_data_dir is not None:
            notices.append(
                f"Classes: 1000 ({args.train_data_dir} does not say; see --num_classes)."
            )
    own = known.preprocessing if known else MODELS[model].preprocessing()
    preprocessing = MODELS[model].override(own, **config.preprocessing_flags(args))
    return Snapshot(model, num_classes, preprocessing, classes)


def facts(given: Namespace) -> dict:
    """What has to be the same on every node. Raises as `make_spec`."""
    with redirect_stderr(io.StringIO()):  # the processes will say it
        spec = make_spec(given)
    about = spec.about
    return config.flags_of_a_job(Namespace(**spec.flags), config.make_parser("train")) | {
        "device": spec.device,
        "training data": about.train_data,
        "validation data": spec.val_data.fingerprint() if spec.val_data else None,
        "snapshot to resume": position(spec.describe(spec.progress)),
        "model": [about.model, about.num_classes, *vars(about.preprocessing).values()],
        "versions": about.versions,
    }


def check_still_newest(spec: RunSpec) -> None:
    """Raise RunError where a run that was still saving has written a snapshot meanwhile."""
    if spec.flags["resume"] == "auto" and flow.env.get_rank() == 0:
        came = held_snapshots(spec.flags["model_save_dir"]) - spec.held
        if came:
            path, _ = min(came)
            raise RunError(f"{path} has been written meanwhile, by another run; start again")


# Building it.


def build_run(spec: RunSpec, *, save_dir: str, log: Log) -> Run:
    """The run of a spec, on its devices, about to start where its progress stands."""
    flags, device = spec.flags, spec.device
    set_communication(
        use_fp16=flags["use_fp16"],
        nccl_fusion_threshold_mb=flags["nccl_fusion_threshold_mb"],
        nccl_fusion_max_ops=flags["nccl_fusion_max_ops"],
    )
    model = place(build_model(spec), device)
    loader = build_train_loader(spec, log)
    parts = Parts(
        model=model,
        graph=build_train_graph(spec, model, loader),
        loader=loader,
        evaluator=build_evaluator(spec, model, log),
        masks=DropoutMasks(model, seed=flags["seed"], batch_size=spec.batch_size, device=device),
        learning_rate=spec.schedule.rate,
        batch_size=spec.batch_size,
        device=device,
    )
    intervals = Intervals(
        num_epochs=flags["num_epochs"],
        steps_per_epoch=spec.plan.steps_per_epoch,
        print_steps=flags["loss_print_every_n_iter"],
        save_steps=flags["save_every_n_iter"],
        save_epochs=flags["save_epoch_interval"],
        keep_snapshots=flags["keep_snapshots"],
        save_last=flags["save_last"],
    )
    last_good = spec.resumed.path if spec.resumed else None
    step = spec.progress.step
    saver = Saver(save_dir, spec.describe, log, last_good=last_good, saved_step=step)
    return Run(parts, intervals, spec.progress, saver, log)


def build_model(spec: RunSpec) -> nn.Module:
    """The network with initial weights drawn by --seed, or with those to start from."""
    flow.manual_seed(spec.flags["seed"])
    switches = config.switches(Namespace(**spec.flags))
    model = MODELS[spec.about.model].build(spec.about.num_classes, switches)
    if spec.start is not None:
        for text in spec.start.load(model, finetune=spec.flags["finetune"]):
            notice(text)
    return model


def build_train_loader(spec: RunSpec, log: Log) -> nn.Module:
    """What feeds the training graph."""
    flags = spec.flags
    log(spec.train_data.loading_line)
    return ofrecord_util.train_loader(
        spec.train_data,
        batch_size=spec.batch_size,
        preprocessing=spec.about.preprocessing,
        augmentation=Augmentation(
            area=flags["random_area"],
            aspect_ratio=flags["random_aspect_ratio"],
            flip=flags["random_flip"],
            shuffle_buffer_size=flags["shuffle_buffer_size"],
        ),
        seed=flags["seed"],
        device=spec.device,
        gpu_image_decoder=flags["gpu_image_decoder"],
        first_step=spec.progress.step,
    )


def build_train_graph(spec: RunSpec, model: nn.Module, loader: nn.Module) -> TrainGraph:
    """The graph of a step, as it was left by the run that is resumed, if one is."""
    flags = spec.flags
    optimizer = optimizer_util.build_optimizer(
        model,
        flags["optimizer"],
        learning_rate=flags["learning_rate"],
        weight_decay=flags["wd"],
        gradient_clipping=flags["gradient_clipping"],
        momentum=flags["momentum"],
        decay_rate=flags["decay_rate"],
        epsilon=flags["epsilon"],
    )
    graph = TrainGraph(
        model,
        loader,
        optimizer,
        spec.schedule.build(optimizer),
        label_smoothing=flags["label_smoothing"],
        top_k=flags["top_k"],
        use_fp16=flags["use_fp16"],
        num_nodes=flags["num_nodes"],
    )
    if spec.resumed is not None and spec.resumed.state is not None:
        state = fit_state(
            spec.resumed.take_state(),
            shapes=standard_shapes(model),
            flags=flags,
            step=spec.progress.step,
        )
        load_training_state(graph, model, state, device=spec.device)
    return graph


def build_evaluator(spec: RunSpec, model: nn.Module, log: Log) -> Evaluator | None:
    """What validates after each epoch. Synthetic validation is over the training pool."""
    flags, data = spec.flags, spec.val_data
    if data is None:
        return None
    log(data.loading_line)
    batch_size = flags["val_batch_size_per_device"] * num_processes(flags)
    loader = ofrecord_util.val_loader(
        data,
        batch_size=batch_size if flags["val_data_dir"] else spec.batch_size,
        preprocessing=spec.about.preprocessing,
        device=spec.device,
    )
    return Evaluator(model, loader, top_k=flags["top_k"], use_fp16=flags["use_fp16"])


if __name__ == "__main__":
    sys.exit(run_main(main, leave=leave))
