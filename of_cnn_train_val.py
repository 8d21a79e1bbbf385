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

import oneflow as flow
from oneflow import nn

import config
import model_registry
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
from cnns.checkpoint.weights import Checkpoint, check_fits, open_checkpoint
from cnns.data.crops import Augmentation
from cnns.data.datasets import (
    Dataset,
    check_labels,
    check_shares,
    open_train_dataset,
    open_val_dataset,
)
from cnns.data.images import Preprocessing
from cnns.data.synthetic import SyntheticLoader, SyntheticValLoader
from cnns.distributed import choose_device, launch_script, place, set_communication, takes_cuda
from cnns.errors import RunError, UsageError, run_main
from cnns.evaluation import Evaluator
from cnns.flags import FlagParser
from cnns.graphs import DropoutMasks, TrainGraph
from cnns.launch.job import make_job
from cnns.launch.worker import is_worker, leave
from cnns.log import Log, notice, open_log
from cnns.models.layers import Switches
from cnns.models.model import check_switches
from cnns.run import Intervals, Parts, Progress, Run, Saver, announce
from config import Plan
from optimizer_util import Schedule


def main(argv: list[str] | None = None) -> int | None:
    given = parse_args(argv)
    if not is_worker():
        args = make_parser().complete(given)
        job = make_job(**config.job_flags(args))
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


def make_parser() -> FlagParser:
    return config.train_parser(
        models=model_registry.MODELS,
        optimizers=optimizer_util.OPTIMIZERS,
        schedules=optimizer_util.SCHEDULES,
    )


def parse_args(argv: list[str] | None) -> Namespace:
    """The flags that were given, and no other."""
    given = make_parser().parse_args(argv)
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

    flags: dict  # as they hold, by name; snapshots keep them
    device: str
    model: str
    num_classes: int
    classes: tuple[str, ...] | None  # names, in label order
    preprocessing: Preprocessing
    train_data: Dataset | None  # None: synthetic
    val_data: Dataset | None  # None: synthetic, or no validation
    batch_size: int  # global
    plan: Plan
    start: Checkpoint | None  # weights to start from; None: random ones
    resumed: Checkpoint | None  # the same, where it is the snapshot of a run that is resumed
    held: frozenset  # snapshots that were in --model_save_dir when it was looked at
    notices: tuple[str, ...]  # for the user

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            self.flags["lr_decay"],
            learning_rate=self.flags["learning_rate"],
            total_steps=self.plan.total_steps,
            warmup_steps=self.plan.warmup_steps,
            step_milestones=self.plan.step_milestones,
            decay_rate=self.flags["lr_decay_rate"],
            exponential_steps=self.plan.exponential_steps,
        )

    @property
    def progress(self) -> Progress:
        """Where the run begins."""
        if self.resumed is None:
            return Progress()
        return Progress(**{name: getattr(self.resumed.snapshot, name) for name in vars(Progress())})

    def describe(self, progress: Progress) -> Snapshot:
        """What a snapshot of this run says."""
        return Snapshot(
            model=self.model,
            num_classes=self.num_classes,
            preprocessing=self.preprocessing,
            classes=self.classes,
            steps_per_epoch=self.plan.steps_per_epoch,
            global_batch_size=self.batch_size,
            train_data=None if self.train_data is None else self.train_data.fingerprint(),
            flags=self.flags,
            versions=versions(),
            **vars(progress),
        )


def make_spec(given: Namespace) -> RunSpec:
    """Check flags, data and snapshots. Raises UsageError or RunError."""
    parser = make_parser()
    args = parser.complete(given)
    device = choose_device(args.device, count=args.gpu_num_per_node)
    notices = []
    held = held_snapshots(args.model_save_dir)
    resumed = find_resume(args.resume, args.model_save_dir)
    if resumed is not None:
        flags = config.inherited_flags(resumed.snapshot.flags, parser, device=device)
        args = parser.complete(given, flags)
        args.model_load_dir, args.finetune = None, False  # of the first start
        notices += config.compare_flags(args, resumed.snapshot.flags, parser, path=resumed.path)
    trial = model_registry.MODELS[args.model].trial if args.model else {}
    notices += config.finish_train_args(args, device=device, trial=trial)
    train_data, val_data = open_data(args)
    if train_data is not None:
        notices += check_shares(
            train_data, num_processes=config.num_processes(args), path=args.train_data_dir
        )
    start = resumed or open_start(args)
    network, more = choose_network(args, start, train_data, val_data)
    notices += more
    if args.learning_rate is None:
        own_rates = model_registry.MODELS[network["model"]].learning_rates
        rate = (config.LEARNING_RATE_PER_256 | own_rates)[args.optimizer]
        args.learning_rate = rate * global_batch_size(args) / 256
        notices.append(f"Learning rate: {args.learning_rate:g} ({rate:g} per 256 images).")
    spec = RunSpec(
        flags=vars(args),
        device=device,
        train_data=train_data,
        val_data=val_data,
        batch_size=global_batch_size(args),
        plan=make_plan(args, train_data),
        start=start,
        resumed=resumed,
        held=held,
        notices=(),
        **network,
    )
    if resumed is not None:
        notices += check_resumed(spec, resumed)
    return replace(spec, notices=tuple(notices))


def open_start(args: Namespace) -> Checkpoint | None:
    """The weights to start from, of any format. Raises UsageError where --finetune has none."""
    path = args.model_load_dir
    if args.finetune and args.model is not None and path is None:
        path = model_registry.MODELS[args.model].installed_weights()
        args.model_load_dir = path
    if path is not None:
        path = find_snapshot(path, models=model_registry.MODELS)
        return open_checkpoint(path, models=model_registry.MODELS, model=args.model)
    if args.finetune:
        raise UsageError(
            "--finetune needs --model_load_dir, the weights to start from, or a --model with "
            "installed ones (efficientnet_lite0)"
        )
    return None


def global_batch_size(args: Namespace, per_device: int | None = None) -> int:
    return (per_device or args.batch_size_per_device) * config.num_processes(args)


def open_data(args: Namespace) -> tuple[Dataset | None, Dataset | None]:
    """The training and validation data, checked; None is synthetic training, or no validation."""
    train_data = val_data = None
    batch_size = global_batch_size(args)
    if args.train_data_dir is not None:
        train_data = open_train_dataset(
            args.train_data_dir, part_num=args.train_data_part_num, num_examples=args.num_examples
        )
        if batch_size > train_data.num_examples:
            raise UsageError(
                f"--batch_size_per_device={args.batch_size_per_device} makes batches of "
                f"{batch_size}, and there are {train_data.num_examples} training images; give a "
                "smaller one"
            )
    pool = SyntheticLoader.POOL_BATCHES * batch_size
    if args.train_data_dir is None and (args.num_val_examples or 0) > pool:
        raise UsageError(
            f"--num_val_examples={args.num_val_examples}, but synthetic data have {pool} images; "
            "give at most that, or leave the flag out"
        )
    if args.val_data_dir is not None:
        val_data = open_val_dataset(
            args.val_data_dir, part_num=args.val_data_part_num, num_examples=args.num_val_examples
        )
    return train_data, val_data


def make_plan(args: Namespace, train_data: Dataset | None) -> Plan:
    """Epochs as steps."""
    batch_size = global_batch_size(args)
    if train_data is None:
        num_examples = args.num_examples or config.SYNTHETIC_STEPS_PER_EPOCH * batch_size
    else:
        num_examples = train_data.num_examples
    return config.epochs_to_steps(
        num_examples=num_examples,
        global_batch_size=batch_size,
        num_epochs=args.num_epochs,
        warmup_epochs=args.warmup_epochs,
        lr_step_epochs=args.lr_step_epochs,
        lr_decay_epochs=args.lr_decay_epochs,
    )


def choose_network(
    args: Namespace,
    start: Checkpoint | None,
    train_data: Dataset | None,
    val_data: Dataset | None,
) -> tuple[dict, list[str]]:
    """Fields of RunSpec that say what the network is, and notices for the user.

    Model, class count and preprocessing are those of the flags, else of the weights to start from,
    else of the training data and the table of models.
    """
    notices = []
    known = start.snapshot if start else None
    if start is not None:
        notices += start.notices()
        check_fits(
            start.snapshot,
            models=model_registry.MODELS,
            model=args.model,
            num_classes=args.num_classes,
            path=start.path,
            finetune=args.finetune if args.resume is None else None,
        )
    model = args.model or (known.model if known else "resnet50")
    check_switches(model_registry.MODELS, model, Switches(**config.switch_flags(args)))
    of_data = None if train_data is None else train_data.num_classes
    num_classes = args.num_classes or (of_data if args.finetune else None)
    if num_classes is None:
        num_classes = known.num_classes if known else of_data
    if num_classes is None:
        num_classes = 1000
        if train_data is not None:
            notices.append(
                f"Classes: 1000 ({args.train_data_dir} does not say; see --num_classes)."
            )
    for data, path in ((train_data, args.train_data_dir), (val_data, args.val_data_dir)):
        if data is not None:
            check_labels(data, num_classes=num_classes, path=path)
    classes = None if train_data is None else train_data.classes
    if classes is None and known and not args.finetune:
        classes = known.classes
    entry = model_registry.MODELS[model]
    preprocessing = entry.override(
        known.preprocessing if known else entry.preprocessing(), **config.preprocessing_flags(args)
    )
    return {
        "model": model,
        "num_classes": num_classes,
        "classes": classes,
        "preprocessing": preprocessing,
    }, notices


def check_resumed(spec: RunSpec, resumed: Checkpoint) -> list[str]:
    """Raise UsageError where the run of a snapshot cannot be resumed as `spec`. Returns notices."""
    was, flags, path = resumed.snapshot, spec.flags, resumed.path
    ranks = flags["num_nodes"] * flags["gpu_num_per_node"]
    if was.global_batch_size != spec.batch_size:
        raise UsageError(
            f"--batch_size_per_device={flags['batch_size_per_device']} makes batches of "
            f"{spec.batch_size} images, but {path} is of a run with batches of "
            f"{was.global_batch_size}; {ranks} processes need {was.global_batch_size / ranks:g} "
            "each"
        )
    if was.steps_per_epoch != spec.plan.steps_per_epoch:
        raise UsageError(
            f"--num_examples: an epoch has {spec.plan.steps_per_epoch} iterations, but {path} is "
            f"of a run with {was.steps_per_epoch}; the training data are not the same"
        )
    data = None if spec.train_data is None else spec.train_data.fingerprint()
    if was.train_data != data:
        raise UsageError(
            f"--train_data_dir={flags['train_data_dir']} is not what {path} was trained on: it has "
            f"{data['examples']} images, and there were {was.train_data['examples']}, or the parts "
            "differ"
        )
    for field, now in vars(spec.preprocessing).items():
        if now != getattr(was.preprocessing, field):
            raise UsageError(
                f"--{field}={now}, but {path} is of a run with "
                f"{getattr(was.preprocessing, field)}; leave it out"
            )
    notices = []
    ranks_before = was.flags.get("num_nodes", 1) * was.flags.get("gpu_num_per_node", 1)
    if ranks_before != ranks:
        notices.append(
            f"The run had {ranks_before} processes; what is left of it has its data in another "
            "order."
        )
    if flags["gpu_image_decoder"]:
        notices.append(
            "--gpu_image_decoder: reading starts at the beginning of the parts, in a new order; "
            "only runs without this flag resume as if they had never stopped."
        )
    num_epochs = flags["num_epochs"]
    if was.epoch is not None and was.epoch + 1 >= num_epochs:
        notices.append(f"{path} has finished all {num_epochs} epochs; more: --num_epochs.")
    return notices


def facts(given: Namespace) -> dict:
    """What has to be the same on every node. Raises as `make_spec`."""
    with redirect_stderr(io.StringIO()):  # the processes will say it
        spec = make_spec(given)
    description = spec.describe(spec.progress)
    return config.flags_of_a_job(Namespace(**spec.flags), make_parser()) | {
        "device": spec.device,
        "training data": description.train_data,
        "validation data": None if spec.val_data is None else spec.val_data.fingerprint(),
        "snapshot to resume": position(description),
        "model": [spec.model, spec.num_classes, *vars(spec.preprocessing).values()],
        "versions": description.versions,
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
    flags, progress = spec.flags, spec.progress
    saver = Saver(
        save_dir,
        spec.describe,
        log,
        last_good=spec.resumed.path if spec.resumed else None,
        saved_step=progress.step,
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
    return Run(build_parts(spec, log), intervals, progress, saver, log)


def build_parts(spec: RunSpec, log: Log) -> Parts:
    """Network, graphs and loaders, on their devices."""
    flags = spec.flags
    set_communication(
        use_fp16=flags["use_fp16"],
        nccl_fusion_threshold_mb=flags["nccl_fusion_threshold_mb"],
        nccl_fusion_max_ops=flags["nccl_fusion_max_ops"],
    )
    model = place(build_model(spec), spec.device)
    loader = build_train_loader(spec, log)
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
    if spec.progress.step > 0:
        load_training_state(graph, model, spec.start.take_state(), device=spec.device)
    return Parts(
        model=model,
        graph=graph,
        loader=loader,
        evaluator=build_evaluator(spec, model, log),
        masks=DropoutMasks(
            model, seed=flags["seed"], batch_size=spec.batch_size, device=spec.device
        ),
        learning_rate=spec.schedule.rate,
        batch_size=spec.batch_size,
        device=spec.device,
    )


def build_model(spec: RunSpec) -> nn.Module:
    """The network with initial weights drawn by --seed, or with those to start from."""
    flow.manual_seed(spec.flags["seed"])
    model = model_registry.MODELS[spec.model].build(
        spec.num_classes, Switches(**config.switch_flags(Namespace(**spec.flags)))
    )
    if spec.start is not None:
        for text in spec.start.load(model, finetune=spec.flags["finetune"]):
            notice(text)
    return model


def build_train_loader(spec: RunSpec, log: Log) -> nn.Module:
    """What feeds the training graph."""
    flags = spec.flags
    if spec.train_data is None:
        log("Loading synthetic data.")
        return SyntheticLoader(**synthetic_settings(spec))
    log(f"Loading data from {flags['train_data_dir']}")
    return ofrecord_util.train_loader(
        spec.train_data,
        batch_size=spec.batch_size,
        preprocessing=spec.preprocessing,
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


def synthetic_settings(spec: RunSpec) -> dict:
    return {
        "batch_size": spec.batch_size,
        "num_classes": spec.num_classes,
        "image_size": spec.preprocessing.image_size,
        "seed": spec.flags["seed"],
        "device": spec.device,
    }


def build_evaluator(spec: RunSpec, model: nn.Module, log: Log) -> Evaluator | None:
    """What validates after each epoch. Synthetic validation is over the training pool."""
    flags = spec.flags
    if spec.train_data is None:
        log("Loading synthetic data.")
        available = SyntheticLoader.POOL_BATCHES * spec.batch_size
        num_examples = min(flags["num_val_examples"] or available, available)
        loader = SyntheticValLoader(num_examples=num_examples, **synthetic_settings(spec))
    elif spec.val_data is not None:
        log(f"Loading data from {flags['val_data_dir']}")
        num_examples = spec.val_data.num_examples
        ranks = flags["num_nodes"] * flags["gpu_num_per_node"]
        loader = ofrecord_util.val_loader(
            spec.val_data,
            batch_size=flags["val_batch_size_per_device"] * ranks,
            preprocessing=spec.preprocessing,
            device=spec.device,
        )
    else:
        return None
    return Evaluator(
        model,
        loader,
        num_examples=num_examples,
        top_k=flags["top_k"],
        use_fp16=flags["use_fp16"],
    )


if __name__ == "__main__":
    sys.exit(run_main(main, leave=leave))
