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
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import oneflow as flow
from oneflow import nn

import config
import ofrecord_util
import optimizer_util
from cnns.advice import check_room
from cnns.checkpoint.find import find_resume, list_snapshots, open_save_dir, position
from cnns.checkpoint.snapshot import Progress, Snapshot, load_training_state, versions
from cnns.checkpoint.training import fit_state
from cnns.checkpoint.weights import Checkpoint, standard_shapes
from cnns.configfile import read_config
from cnns.data.kinds import Dataset, Synthetic
from cnns.data.mixing import Mixing
from cnns.data.uneven import find_class_weights
from cnns.distributed import (
    choose_device,
    cuda_devices,
    launch_script,
    on_all_devices,
    place,
    set_communication,
    share_usage_errors,
    takes_cuda,
)
from cnns.ema import Average, make_average_schedule
from cnns.errors import RunError, UsageError, run_main
from cnns.evaluation import Evaluator
from cnns.flags.checks import take_learning_rate
from cnns.flags.parser import CONFIGURED
from cnns.freeze import freeze
from cnns.graphs import DropoutMasks, TrainGraph, limit_top_k
from cnns.launch.external import find_job, take_numbers
from cnns.launch.worker import is_worker, leave
from cnns.log import Log, is_first_rank, notice, open_log
from cnns.losses import build_loss
from cnns.models.layers import drop_blocks
from cnns.prepare import describe_network, open_data, open_start
from cnns.record import Record, describe_process, open_record
from cnns.report.finished import finish
from cnns.resume import (
    check_flags,
    check_records,
    compare_flags,
    compare_runs,
    first_start,
    inherited_flags,
    num_processes,
)
from cnns.run import Parts, Run, Saver, announce, make_intervals
from cnns.stages import TrainSizes, make_train_sizes
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
            batch = "global_batch_size" if args.global_batch_size else "batch_size_per_device"
            memory = config.memory_flags(args, batch=batch)
            return launch_script(__file__, argv, job=job, facts=lambda: facts(given), memory=memory)
    spec = make_spec(given)
    log = open_log(spec.flags["log_dir"], "of_cnn_train_val")
    resumed = spec.resumed.path if spec.resumed else None
    with (
        open_save_dir(spec.flags["model_save_dir"], resumed=resumed) as save_dir,
        make_record(spec, save_dir) as record,
    ):
        for text in spec.notices:
            notice(text)
        check_still_newest(spec)
        run = build_run(spec, save_dir=save_dir, log=log, record=record)
        check_room(
            run.parts.model,
            spec.flags,
            save_dir=save_dir,
            validates=spec.val_data is not None,
        )
        announce(
            run,
            restored=spec.start.path if spec.start else None,
            resumed=spec.resumed is not None,
            save_init=spec.flags["save_init"],
        )
        run.run()
        finish(
            run,
            spec.about,
            save_dir=save_dir,
            val_data=spec.val_data,
            scripts=os.path.dirname(os.path.abspath(__file__)),
        )
    return None


def parse_args(argv: list[str] | None) -> Namespace:
    """The flags that were given, and no other."""
    parser = config.make_parser("train", __doc__)
    given = parser.parse_args(argv)
    if "config" in given:
        setattr(given, CONFIGURED, read_config(given.config, parser.flags))
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
    about: Snapshot  # what its snapshots hold, without the progress; has the final flags
    train_data: Dataset
    val_data: Dataset | None  # None: no validation
    batch_size: int  # global
    plan: Plan
    schedule: Schedule
    start: Checkpoint | None  # weights to start from; None: random ones
    resumed: Checkpoint | None  # the same, if a run is resumed from it
    found: frozenset  # snapshots that were in --model_save_dir when it was checked
    notices: list[str]  # for the user
    class_weights: np.ndarray | None = None  # (C,) float32, of the loss; None: all equal

    @property
    def flags(self) -> dict[str, Any]:
        return self.about.flags

    @property
    def train_sizes(self) -> TrainSizes:
        return make_train_sizes(self.flags, image_size=self.about.preprocessing.image_size)

    @property
    def top_k(self) -> int:
        return limit_top_k(self.flags["top_k"], self.about.num_classes)

    @property
    def progress(self) -> Progress:
        """Where the run begins."""
        if self.resumed is None:
            return Progress()
        return Progress(**{name: getattr(self.resumed.snapshot, name) for name in vars(Progress())})

    def describe(self, progress: Progress) -> Snapshot:
        """What a snapshot of this run holds."""
        return replace(self.about, **vars(progress))


def make_spec(given: Namespace) -> RunSpec:
    """Check flags, data and snapshots. Raises UsageError or RunError."""
    parser = config.make_parser("train")
    args = parser.complete(given)
    notices: list[str] = []
    device = choose_device(args.device, count=args.gpu_num_per_node)
    found = list_snapshots(args.model_save_dir)
    resumed = find_resume(
        args.resume, args.model_save_dir, check=partial(check_flags, parser=parser)
    )
    if resumed is not None:
        flags = inherited_flags(resumed.snapshot, parser, given=given, device=device)
        args = parser.complete(given, flags)
        args.model_load_dir, args.finetune = None, False  # those of the first start are over
        notices += compare_flags(args, resumed.snapshot.flags, parser, path=resumed.path)
    notices += config.finish_train_args(args, device=device)
    start = resumed or open_start(args, MODELS)
    train_data, val_data = open_data(args, notices, settings=config.folder_settings(args))
    if args.data_order == "native":
        notices += train_data.check_shares(num_processes(vars(args)))
    about = describe_network(
        args,
        notices,
        models=MODELS,
        start=start,
        train_data=train_data,
        switches=config.switches(args),
    )
    train_data = train_data.for_network(about.num_classes)
    if val_data is not None:
        val_data = val_data.for_network(about.num_classes)
    batch_size = args.global_batch_size
    notices += take_learning_rate(args, MODELS[about.model])
    top_k = limit_top_k(args.top_k, about.num_classes)
    if top_k < args.top_k:
        notices.append(f"top_k is {top_k}, as there are {about.num_classes} classes.")
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
        flags=vars(args) | (first_start(resumed.snapshot) if resumed else {}),
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
        schedule=config.make_schedule(args, plan),
        start=start,
        resumed=resumed,
        found=found,
        notices=notices,
        class_weights=find_class_weights(
            args.class_weights, train_data, num_classes=about.num_classes, flag="--class_weights"
        ),
    )


def facts(given: Namespace) -> dict:
    """What has to be the same on every node. Raises as `make_spec`."""
    with redirect_stderr(io.StringIO()):  # the processes will print it
        spec = make_spec(given)
    about = spec.about
    return config.flags_of_a_job(Namespace(**spec.flags), config.make_parser("train")) | {
        "device": spec.device,
        "training data": about.train_data,
        "validation data": spec.val_data.fingerprint() if spec.val_data else None,
        "snapshot to resume": position(spec.describe(spec.progress)),
        "model": [about.model, about.num_classes, *vars(about.preprocessing).values()],
        "versions": about.versions,
        "class weights": None if spec.class_weights is None else spec.class_weights.tolist(),
    }


def check_still_newest(spec: RunSpec) -> None:
    """Raise RunError where a run that had not ended has written a snapshot meanwhile."""
    if spec.flags["resume"] == "auto" and flow.env.get_rank() == 0:
        new = list_snapshots(spec.flags["model_save_dir"]) - spec.found
        if new:
            path, _ = min(new)
            raise RunError(f"{path} has been written meanwhile by another run; start again")


# Building it.


def make_record(spec: RunSpec, save_dir: str) -> AbstractContextManager[Record]:
    """The record of the run; only that of the first process writes."""
    if not is_first_rank():
        return nullcontext(Record())
    about = spec.about
    start = spec.start.path if spec.start else None
    devices = [device.name for device in cuda_devices()] if spec.device == "cuda" else ["cpu"]
    return open_record(
        save_dir,
        step=spec.progress.step,
        epochs=spec.progress.current_epoch,
        about={
            "flags": config.recorded_flags(spec.flags),
            "device": spec.device,
            "model": about.model,
            "num_classes": about.num_classes,
            "train_images": spec.train_data.num_examples,
            "val_images": spec.val_data.num_examples if spec.val_data else None,
            "steps_per_epoch": about.steps_per_epoch,
            "global_batch_size": about.global_batch_size,
            "resumed_from" if spec.resumed else "weights_from": start,
            "versions": about.versions,
            **describe_process(devices),
        },
        tensorboard=spec.flags["tensorboard"],
    )


def build_run(spec: RunSpec, *, save_dir: str, log: Log, record: Record | None = None) -> Run:
    """The run of a spec, on its devices, about to start where its progress stands."""
    flags, device = spec.flags, spec.device
    set_communication(
        use_fp16=flags["use_fp16"],
        nccl_fusion_threshold_mb=flags["nccl_fusion_threshold_mb"],
        nccl_fusion_max_ops=flags["nccl_fusion_max_ops"],
    )
    model = place(build_model(spec), device)
    last_layer = MODELS[spec.about.model].last_layer
    frozen_norms = freeze(model, flags["freeze"] or (), last_layer=last_layer)
    train_sizes, progress = spec.train_sizes, spec.progress
    size = train_sizes.at(progress.current_epoch)
    log(spec.train_data.loading_line)
    loader = build_train_loader(spec, size)
    evaluator = build_evaluator(spec, model, log)
    average = build_average(spec, model) if flags["ema_decay"] else None
    resumed = spec.resumed
    state = resumed.take_state() if resumed is not None and resumed.state is not None else None
    parts = Parts(
        model=model,
        graph=build_train_graph(spec, model, loader, average, step=progress.step, state=state),
        loader=loader,
        build_stage=partial(build_stage, spec, model, average),
        train_sizes=train_sizes,
        train_size=size,
        evaluator=evaluator,
        record_order=getattr(loader, "record_order", None),
        masks=DropoutMasks(model, seed=flags["seed"], batch_size=spec.batch_size, device=device),
        learning_rate=spec.schedule.rate,
        batch_size=spec.batch_size,
        device=device,
        use_fp16=flags["use_fp16"] and device == "cuda",
        frozen_norms=frozen_norms,
        average=average,
        average_evaluator=evaluator.of(average.network) if evaluator and average else None,
    )
    intervals = make_intervals(flags, steps_per_epoch=spec.plan.steps_per_epoch)
    last_good = resumed.path if resumed else None
    progress = start_progress(spec, parts)
    saver = Saver(save_dir, spec.describe, log, last_good=last_good, saved_step=progress.step)
    return Run(parts, intervals, progress, saver, log, record or Record())


def start_progress(spec: RunSpec, parts: Parts) -> Progress:
    """Where the run begins. Raises as `check_records`."""
    progress, said = spec.progress, spec.progress.records_digest
    if parts.record_order is not None and spec.resumed is not None:
        progress.records_digest = parts.record_order.digest_at(
            progress.current_epoch, progress.iteration, steps_per_epoch=spec.plan.steps_per_epoch
        )
        check_records(progress.records_digest, said, about=spec.about, resumed=spec.resumed)
    return progress


def build_model(spec: RunSpec) -> nn.Module:
    """The network with initial weights drawn by --seed, or with those to start from."""
    flow.manual_seed(spec.flags["seed"])
    model = build_network(spec)
    if spec.start is not None:
        finetune = spec.flags["finetune"] and spec.resumed is None
        for text in spec.start.load(model, finetune=finetune):
            notice(text)
    return model


def build_network(spec: RunSpec) -> nn.Module:
    """The network with weights that OneFlow draws."""
    switches = config.switches(Namespace(**spec.flags))
    model = MODELS[spec.about.model].build(spec.about.num_classes, switches)
    momentum = spec.flags["batch_norm_momentum"]
    for module in model.modules():
        if momentum is not None and hasattr(module, "running_mean"):
            module.momentum = momentum
    if spec.flags["stochastic_depth"]:
        drop_blocks(model, spec.flags["stochastic_depth"])
    return model


def build_average(spec: RunSpec, model: nn.Module) -> Average:
    """What averages the weights of `model`."""
    resumed, start = spec.resumed, None
    if resumed is not None and resumed.average is not None:
        start = resumed.average, resumed.path
    schedule = make_average_schedule(spec.flags, batch_size=spec.batch_size)
    return Average(
        build_network(spec),
        model,
        schedule,
        start=start,
        device=spec.device,
        within_graph=spec.flags["accumulate_steps"] == 1,
    )


def build_train_loader(spec: RunSpec, size: int) -> nn.Module:
    """What feeds the training graph with images of `size` x `size` pixels."""
    flags = spec.flags
    return ofrecord_util.train_loader(
        spec.train_data,
        batch_size=spec.batch_size,
        preprocessing=replace(spec.about.preprocessing, image_size=size),
        augmentation=config.augmentation(Namespace(**flags)),
        mixing=Mixing(flags["mixup_alpha"], flags["cutmix_alpha"], flags["seed"]),
        seed=flags["seed"],
        device=spec.device,
        data_order=flags["data_order"],
        gpu_image_decoder=flags["gpu_image_decoder"],
        first_step=spec.progress.step,
    )


def build_train_graph(
    spec: RunSpec,
    model: nn.Module,
    loader: nn.Module,
    average: Average | None,
    *,
    step: int,
    state: Mapping[str, np.ndarray] | None,
) -> TrainGraph:
    """The graph of a step; `state` is what another remembered after `step` updates, if any."""
    flags = spec.flags
    optimizer = optimizer_util.build_optimizer(
        model,
        flags["optimizer"],
        learning_rate=spec.schedule.learning_rate,
        **config.optimizer_settings(Namespace(**flags)),
    )
    graph = TrainGraph(
        model,
        loader,
        optimizer,
        spec.schedule.build(optimizer, first_step=step),
        loss=build_loss(
            flags["loss"],
            **config.loss_settings(Namespace(**flags)),
            class_weights=None
            if spec.class_weights is None
            else on_all_devices(spec.class_weights, flow.env.all_device_placement(spec.device)),
        ),
        top_k=spec.top_k,
        average=average.network if average and average.within_graph else None,
        accumulate_steps=flags["accumulate_steps"],
        use_fp16=flags["use_fp16"],
        num_nodes=flags["num_nodes"],
    )
    if state is not None:
        fitted = fit_state(state, shapes=standard_shapes(model), flags=flags, step=step)
        load_training_state(graph, model, fitted, device=spec.device)
    return graph


def build_stage(
    spec: RunSpec, model: nn.Module, average: Average | None, size: int, **where: Any
) -> tuple[nn.Module, TrainGraph]:
    """Loader and graph for images of another size; `where` are a graph's step and state."""
    loader = build_train_loader(spec, size)
    return loader, build_train_graph(spec, model, loader, average, **where)


def build_evaluator(spec: RunSpec, model: nn.Module, log: Log) -> Evaluator | None:
    """What validates after each epoch. Synthetic validation is over the training pool."""
    flags, data = spec.flags, spec.val_data
    if data is None:
        return None
    log(data.loading_line)
    batch_size = flags["val_batch_size_per_device"] * num_processes(flags)
    loader = ofrecord_util.val_loader(
        data,
        batch_size=spec.batch_size if isinstance(data, Synthetic) else batch_size,
        preprocessing=spec.about.preprocessing,
        device=spec.device,
    )
    return Evaluator(
        model,
        loader,
        top_k=spec.top_k,
        use_fp16=flags["use_fp16"],
        gives_logits=flags["report"],
    )


if __name__ == "__main__":
    sys.exit(run_main(main, leave=leave))
