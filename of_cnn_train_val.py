"""Train a CNN with OneFlow and validate it after each epoch.

python3 of_cnn_train_val.py                                # synthetic data
python3 of_cnn_train_val.py --train_data_dir=DIR/train --val_data_dir=DIR/validation
python3 of_cnn_train_val.py --num_nodes=2 --node_ips=ADDRESS,ADDRESS --gpu_num_per_node=8 ...
python3 of_cnn_train_val.py --help
"""

import oneflow_setup  # noqa: F401  (first, see there)

import io
import math
import os
import sys
from argparse import Namespace
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial

import oneflow as flow
from oneflow import nn

import checkpoint_util
import config
import graph_util
import launch_util
import metric_util
import model_util
import ofrecord_util
import optimizer_util
from checkpoint_util import Checkpoint, Snapshot
from config import Plan, RunError, UsageError
from interrupt_util import Interrupted, Interrupts
from layer_util import Switches
from metric_util import Log, Meter, notice
from ofrecord_util import Dataset


def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    if not launch_util.is_worker():
        job = launch_util.make_job(**config.job_flags(args))
        if job.world_size > 1 or graph_util.takes_cuda(args.device):
            memory = config.memory_flags(args, batch="batch_size_per_device")
            return launch_util.launch(
                launch_util.command(__file__, argv),
                job=job,
                facts=lambda: facts(argv),
                explain=partial(graph_util.explain_crash, **memory),
            )
    setup = prepare(argv)
    args, device, snapshot = setup.args, setup.device, setup.snapshot
    graph_util.set_communication(
        use_fp16=args.use_fp16,
        nccl_fusion_threshold_mb=args.nccl_fusion_threshold_mb,
        nccl_fusion_max_ops=args.nccl_fusion_max_ops,
    )
    model = graph_util.place(build_model(args, snapshot, setup.resumed), device)
    log = metric_util.open_log(args.log_dir, "of_cnn_train_val")
    with checkpoint_util.open_save_dir(args.model_save_dir, resumed=setup.resumed) as save_dir:
        see_that_nothing_came(args, setup.resumed)
        graph, loader = build_training(
            args, setup.train_data, model, snapshot, setup.plan, device, log
        )
        if snapshot.step > 0:
            state = checkpoint_util.read_training_state(setup.resumed)
            checkpoint_util.load_training_state(graph, model, state, device=device)
        run = Run(
            args,
            model=model,
            graph=graph,
            loader=loader,
            evaluator=build_evaluator(args, setup.val_data, model, snapshot, device, log),
            plan=setup.plan,
            snapshot=snapshot,
            save_dir=save_dir,
            log=log,
            device=device,
            resumed=setup.resumed,
        )
        run.start()
        run.run()
    return None


def see_that_nothing_came(args: Namespace, resumed: str | None) -> None:
    """Raise RunError where a run that was still saving has left a newer snapshot meanwhile."""
    if args.resume == "auto" and flow.env.get_rank() == 0:
        found = checkpoint_util.find_resume(args.resume, args.model_save_dir)
        if found != resumed:
            raise RunError(f"{found} has been written meanwhile, by another run; start again")


def facts(argv: list[str] | None) -> dict:
    """What has to be the same on every node. Raises as `prepare`."""
    with redirect_stderr(io.StringIO()):  # the processes will say it
        setup = prepare(argv)
    snapshot = setup.snapshot
    return config.flags_of_a_job(setup.args) | {
        "device": setup.device,
        "training data": None if setup.train_data is None else setup.train_data.fingerprint(),
        "validation data": None if setup.val_data is None else setup.val_data.fingerprint(),
        "snapshot to go on from": checkpoint_util.position(snapshot),
        "model": [snapshot.model, snapshot.num_classes, *vars(snapshot.preprocessing).values()],
        "versions": snapshot.versions,
    }


@dataclass
class Setup:
    """A run that has been checked: what is known of it before anything is built."""

    args: Namespace
    device: str
    train_data: Dataset | None  # None: synthetic
    val_data: Dataset | None  # None: synthetic, or no validation
    snapshot: Snapshot
    plan: Plan
    resumed: str | None  # path of the snapshot to go on from


def prepare(argv: list[str] | None) -> Setup:
    """Check flags, data and snapshots. Raises UsageError or RunError."""
    args = parse_args(argv)
    device = graph_util.choose_device(args.device, count=args.gpu_num_per_node)
    resumed = checkpoint_util.find_resume(args.resume, args.model_save_dir)
    notices = []
    if resumed is not None:
        flags = checkpoint_util.read_description(resumed).flags
        args = parse_args(argv, flags, device=device)
        notices += config.compare_flags(args, flags, path=resumed)
    trial = model_util.MODELS[args.model].trial if args.model else {}
    notices += config.finish_train_args(args, device=device, trial=trial)
    train_data, val_data = open_data(args)
    if train_data is not None:
        notices += ofrecord_util.check_shares(
            train_data, num_processes=config.num_processes(args), path=args.train_data_dir
        )
    snapshot = describe_run(args, train_data, val_data, resumed)
    if args.learning_rate is None:
        notices.append(choose_learning_rate(args, model=snapshot.model))
    plan = make_plan(args, train_data)
    notices += go_on(args, snapshot, plan, resumed)
    for text in notices:
        notice(text)
    return Setup(args, device, train_data, val_data, snapshot, plan, resumed)


def parse_args(
    argv: list[str] | None, resumed_flags: dict | None = None, *, device: str = "cpu"
) -> Namespace:
    """The flags; what is not given is as in the run to go on with, if there is one."""
    parser = config.train_parser(
        models=model_util.MODELS,
        optimizers=optimizer_util.OPTIMIZERS,
        schedules=optimizer_util.SCHEDULES,
    )
    args = config.parse_resumed(parser, argv, resumed_flags or {}, device=device)
    if args.resume not in (None, "auto") and args.model_load_dir is not None:
        raise UsageError(
            "--resume and --model_load_dir both name weights to start from; give one of them"
        )
    if args.resume not in (None, "auto") and args.finetune:
        raise UsageError("--resume goes on with all weights of a run; leave --finetune out")
    if resumed_flags is not None:
        args.model_load_dir, args.finetune = None, False  # of the first start
    return args


def global_batch_size(args: Namespace, per_device: int | None = None) -> int:
    return (per_device or args.batch_size_per_device) * config.num_processes(args)


def open_data(args: Namespace) -> tuple[Dataset | None, Dataset | None]:
    """The training and validation data, checked; None is synthetic training, or no validation."""
    train_data = val_data = None
    if args.train_data_dir is not None:
        train_data = ofrecord_util.open_train_dataset(
            args.train_data_dir,
            part_num=args.train_data_part_num,
            num_examples=args.num_examples,
        )
        batch_size = global_batch_size(args)
        if batch_size > train_data.num_examples:
            raise UsageError(
                f"--batch_size_per_device={args.batch_size_per_device} makes batches of "
                f"{batch_size}, and there are {train_data.num_examples} training images; give a "
                "smaller one"
            )
    pool = ofrecord_util.SyntheticLoader.POOL_BATCHES * global_batch_size(args)
    if args.train_data_dir is None and (args.num_val_examples or 0) > pool:
        raise UsageError(
            f"--num_val_examples={args.num_val_examples}, but synthetic data have {pool} images; "
            "give at most that, or leave the flag out"
        )
    if args.val_data_dir is not None:
        val_data = ofrecord_util.open_val_dataset(
            args.val_data_dir,
            part_num=args.val_data_part_num,
            num_examples=args.num_val_examples,
        )
    return train_data, val_data


def choose_learning_rate(args: Namespace, *, model: str) -> str:
    """Set the default peak rate, in proportion to the global batch; returns a notice."""
    rate = model_util.learning_rate_per_256(model, args.optimizer)
    args.learning_rate = rate * global_batch_size(args) / 256
    return f"Learning rate: {args.learning_rate:g} ({rate:g} per 256 images)."


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


def describe_run(
    args: Namespace, train_data: Dataset | None, val_data: Dataset | None, resumed: str | None
) -> Snapshot:
    """What snapshots of this run will say of themselves.

    Model, class count and preprocessing are those of the flags, else of the snapshot to start from,
    else of the training data and the table of models.
    """
    start = None if resumed is None else checkpoint_util.read_description(resumed)
    if args.finetune and args.model is not None and args.model_load_dir is None:
        args.model_load_dir = model_util.installed_weights(args.model)
    if resumed is None and args.model_load_dir is not None:
        checkpoint = open_start(args)
        start = checkpoint.snapshot
        for text in checkpoint.notices():
            notice(text)
    if start is not None:
        checkpoint_util.check_fits(
            start,
            model=args.model,
            num_classes=args.num_classes,
            path=resumed or args.model_load_dir,
            finetune=args.finetune if resumed is None else None,
        )
    elif args.finetune:
        raise UsageError(
            "--finetune needs --model_load_dir, the weights to start from, or a --model with "
            "installed ones (efficientnet_lite0)"
        )
    model = args.model or (start.model if start else "resnet50")
    model_util.MODELS[model].check_switches(Switches(**config.switch_flags(args)))
    known = None if train_data is None else train_data.num_classes
    num_classes = args.num_classes or known if args.finetune else args.num_classes
    if num_classes is None:
        num_classes = start.num_classes if start else known
    if num_classes is None:
        num_classes = 1000
        if train_data is not None:
            notice(f"Classes: 1000 ({args.train_data_dir} does not say; see --num_classes).")
    for data, path in ((train_data, args.train_data_dir), (val_data, args.val_data_dir)):
        if data is not None:
            ofrecord_util.check_labels(data, num_classes=num_classes, path=path)
    classes = None if train_data is None else train_data.classes
    return Snapshot(
        model=model,
        num_classes=num_classes,
        preprocessing=model_util.override(
            start.preprocessing if start else model_util.preprocessing(model),
            model=model,
            **config.preprocessing_flags(args),
        ),
        classes=classes or (start.classes if start and not args.finetune else None),
        train_data=None if train_data is None else train_data.fingerprint(),
        flags=vars(args),
        versions=checkpoint_util.versions(),
    )


def open_start(args: Namespace) -> Checkpoint:
    """The weights of --model_load_dir, of any format."""
    path = checkpoint_util.find_snapshot(args.model_load_dir)
    return checkpoint_util.open_checkpoint(path, model=args.model)


def go_on(args: Namespace, snapshot: Snapshot, plan: Plan, resumed: str | None) -> list[str]:
    """Let the description of the run begin where the snapshot `resumed` stood, if it fits.

    Returns notices for the user. Raises UsageError.
    """
    notices = []
    snapshot.steps_per_epoch = plan.steps_per_epoch
    snapshot.global_batch_size = global_batch_size(args)
    if resumed is None:
        return notices
    was = checkpoint_util.read_description(resumed)
    if was.global_batch_size != snapshot.global_batch_size:
        raise UsageError(
            f"--batch_size_per_device={args.batch_size_per_device} makes batches of "
            f"{snapshot.global_batch_size} images, but {resumed} is of a run with batches of "
            f"{was.global_batch_size}; {config.num_processes(args)} processes need "
            f"{was.global_batch_size / config.num_processes(args):g} each"
        )
    if was.steps_per_epoch != snapshot.steps_per_epoch:
        raise UsageError(
            f"--num_examples: an epoch has {snapshot.steps_per_epoch} iterations, but {resumed} is "
            f"of a run with {was.steps_per_epoch}; the training data are not the same"
        )
    if was.train_data != snapshot.train_data:
        raise UsageError(
            f"--train_data_dir={args.train_data_dir} is not what {resumed} was trained on: it has "
            f"{snapshot.train_data['examples']} images, and there were "
            f"{was.train_data['examples']}, or the parts differ"
        )
    for field, now in vars(snapshot.preprocessing).items():
        if now != getattr(was.preprocessing, field):
            raise UsageError(
                f"--{field}={now}, but {resumed} is of a run with "
                f"{getattr(was.preprocessing, field)}; leave it out"
            )
    processes = was.flags.get("num_nodes", 1) * was.flags.get("gpu_num_per_node", 1)
    if processes != config.num_processes(args):
        notice(
            f"The run had {processes} processes; what is left of it has its data in other order."
        )
    if args.gpu_image_decoder:
        notices.append(
            "--gpu_image_decoder: reading starts at the beginning of the parts, in a new order; "
            "only runs without this flag go on as if they had never stopped."
        )
    if was.epoch is not None and was.epoch + 1 >= args.num_epochs:
        notices.append(f"{resumed} has finished all {args.num_epochs} epochs; more: --num_epochs.")
    for field in ("epoch", "iteration", "step", "metrics", "best"):
        setattr(snapshot, field, getattr(was, field))
    return notices


def build_model(args: Namespace, snapshot: Snapshot, resumed: str | None) -> nn.Module:
    """The network with initial weights drawn by --seed, or with those of a snapshot."""
    flow.manual_seed(args.seed)
    model = model_util.MODELS[snapshot.model].build(
        snapshot.num_classes, Switches(**config.switch_flags(args))
    )
    if resumed is not None:
        checkpoint_util.load_weights(model, checkpoint_util.read_weights(resumed), path=resumed)
    elif args.model_load_dir is not None:
        checkpoint = open_start(args)
        checkpoint.load(model, finetune=args.finetune)
        for text in checkpoint.foreign.notices if checkpoint.foreign else ():
            notice(text)
        if args.finetune:
            notice("--finetune: the last layer starts from random weights.")
    return model


def build_training(
    args: Namespace,
    train_data: Dataset | None,
    model: nn.Module,
    snapshot: Snapshot,
    plan: Plan,
    device: str,
    log: Log,
) -> tuple[graph_util.TrainGraph, nn.Module]:
    """The training graph, and the loader whose batches its calls take."""
    if train_data is None:
        log("Loading synthetic data.")
        loader = ofrecord_util.SyntheticLoader(**synthetic_settings(args, snapshot, device))
    else:
        log(f"Loading data from {args.train_data_dir}")
        loader = ofrecord_util.train_loader(
            train_data,
            batch_size=global_batch_size(args),
            preprocessing=snapshot.preprocessing,
            augmentation=ofrecord_util.Augmentation(
                area=args.random_area,
                aspect_ratio=args.random_aspect_ratio,
                flip=args.random_flip,
                shuffle_buffer_size=args.shuffle_buffer_size,
            ),
            seed=args.seed,
            device=device,
            gpu_image_decoder=args.gpu_image_decoder,
            first_step=snapshot.step,
        )
    optimizer = optimizer_util.build_optimizer(
        model,
        args.optimizer,
        learning_rate=args.learning_rate,
        weight_decay=args.wd,
        gradient_clipping=args.gradient_clipping,
        momentum=args.momentum,
        decay_rate=args.decay_rate,
        epsilon=args.epsilon,
    )
    schedule = optimizer_util.build_schedule(
        optimizer, args.lr_decay, **schedule_settings(args, plan)
    )
    graph = graph_util.TrainGraph(
        model,
        loader,
        optimizer,
        schedule,
        label_smoothing=args.label_smoothing,
        top_k=args.top_k,
        use_fp16=args.use_fp16,
        num_nodes=args.num_nodes,
    )
    return graph, loader


def schedule_settings(args: Namespace, plan: Plan) -> dict:
    return {
        "total_steps": plan.total_steps,
        "warmup_steps": plan.warmup_steps,
        "step_milestones": plan.step_milestones,
        "decay_rate": args.lr_decay_rate,
        "exponential_steps": plan.exponential_steps,
    }


def synthetic_settings(args: Namespace, snapshot: Snapshot, device: str) -> dict:
    return {
        "batch_size": global_batch_size(args),
        "num_classes": snapshot.num_classes,
        "image_size": snapshot.preprocessing.image_size,
        "seed": args.seed,
        "device": device,
    }


def build_evaluator(
    args: Namespace,
    val_data: Dataset | None,
    model: nn.Module,
    snapshot: Snapshot,
    device: str,
    log: Log,
) -> graph_util.Evaluator | None:
    """What validates after each epoch. Synthetic validation is over the training pool."""
    if args.train_data_dir is None:
        log("Loading synthetic data.")
        settings = synthetic_settings(args, snapshot, device)
        available = ofrecord_util.SyntheticLoader.POOL_BATCHES * settings["batch_size"]
        num_examples = min(args.num_val_examples or available, available)
        loader = ofrecord_util.SyntheticValLoader(num_examples=num_examples, **settings)
    elif val_data is not None:
        log(f"Loading data from {args.val_data_dir}")
        num_examples = val_data.num_examples
        loader = ofrecord_util.val_loader(
            val_data,
            batch_size=global_batch_size(args, args.val_batch_size_per_device),
            preprocessing=snapshot.preprocessing,
            device=device,
        )
    else:
        return None
    return graph_util.Evaluator(
        model, loader, num_examples=num_examples, top_k=args.top_k, use_fp16=args.use_fp16
    )


class Run:
    """A run on its way: it trains, validates, prints and saves, from where its snapshot stands."""

    def __init__(
        self,
        args: Namespace,
        *,
        model: nn.Module,
        graph: graph_util.TrainGraph,
        loader: nn.Module,
        evaluator: graph_util.Evaluator | None,
        plan: Plan,
        snapshot: Snapshot,
        save_dir: str,
        log: Log,
        device: str,
        resumed: str | None = None,
    ):
        self.args, self.plan, self.log = args, plan, log
        self.model, self.graph, self.loader, self.evaluator = model, graph, loader, evaluator
        self.save_dir, self.snapshot = save_dir, snapshot
        self.last_good = resumed  # path of the newest snapshot
        self.saved_step = snapshot.step
        self.meter = Meter(snapshot.global_batch_size)
        self.interrupts = Interrupts()
        self.agreement = graph_util.Agreement(self.interrupts, device)
        self.masks = graph_util.DropoutMasks(
            model, seed=args.seed, batch_size=snapshot.global_batch_size, device=device
        )
        self.saves = flow.env.get_rank() == 0

    @property
    def epoch(self) -> int:
        """The epoch that is on its way."""
        return 0 if self.snapshot.epoch is None else self.snapshot.epoch + 1

    def start(self) -> None:
        """Say where the weights come from, and save them if asked to."""
        resumed, loaded = self.last_good, self.args.model_load_dir
        if resumed is not None:
            self.log(f"Restoring model from {resumed}.")
            trained = self.snapshot.iteration == self.plan.steps_per_epoch
            what = "validation" if trained else f"iteration {self.snapshot.iteration + 1}"
            if self.epoch < self.args.num_epochs:
                notice(f"Going on with epoch {self.epoch}, {what}.")
            if os.path.dirname(os.path.abspath(resumed)) == os.path.abspath(self.save_dir):
                self.link(resumed)  # a kill may have come before that
        elif loaded is not None:
            self.log(f"Restoring model from {loaded}.")
        if resumed is None and self.args.save_init:
            self.save("initial_model")
        if resumed is None and loaded is None:
            self.log("Init model on demand.")
        if self.epoch < self.args.num_epochs:
            notice("Compiling the training graph; on a CPU this takes 5 to 30 seconds.")

    def run(self) -> None:
        """The epochs that are left. A signal ends them after an iteration, with a snapshot."""
        with self.interrupts:
            try:
                while self.epoch < self.args.num_epochs:
                    self.train_epoch()
                    self.validate()
                    self.snapshot.epoch, self.snapshot.iteration = self.epoch, 0
                    self.save_epoch()
                    self.agreement.check(None)
            except Interrupted as interrupted:
                self.print_line()
                if self.snapshot.step > self.saved_step:
                    self.save("last", replace=True)
                graph_util.wait_for_all()  # one of them may be saving
                where = f"go on with --resume={self.last_good}" if self.last_good else "no snapshot"
                raise interrupted.saying(where) from None

    def train_epoch(self) -> None:
        """What is left of an epoch. A line is due at each interval, the end, and each snapshot."""
        snapshot, every = self.snapshot, self.args.save_every_n_iter
        self.model.train()
        batches = self.loader.batches(self.epoch, snapshot.iteration)
        self.meter.restart()
        for iteration in range(snapshot.iteration + 1, self.plan.steps_per_epoch + 1):
            compiled = self.graph.is_compiled
            masks = self.masks.at(snapshot.step)
            output = self.graph(*next(batches), **masks, **self.agreement.vote())
            done = self.meter.add(output)
            if not compiled:
                self.meter.restart_clock()
            snapshot.iteration, snapshot.step = iteration, snapshot.step + 1
            end = iteration == self.plan.steps_per_epoch
            save = every is not None and iteration % every == 0 and not end
            if iteration % self.args.loss_print_every_n_iter == 0 or save or end:
                self.print_line()
                done = output
            if save:
                self.save("last", replace=True)
            self.agreement.check(done)

    def validate(self) -> None:
        if self.evaluator is None:
            return
        graph_util.average_statistics(self.model)
        counts, seconds = self.evaluator.round(self.agreement)
        num_batches = self.evaluator.loader.num_batches
        self.log(metric_util.validation_line(self.epoch, num_batches, counts, seconds))
        snapshot = self.snapshot
        snapshot.metrics = counts.as_metrics()
        if snapshot.metrics["val_top_1"] > snapshot.best.get("val_top_1", -1.0):
            snapshot.best = {"epoch": self.epoch} | snapshot.metrics

    def print_line(self) -> None:
        """The line over the iterations since the last one. Raises RunError if they went wrong."""
        if not self.meter.pending:
            return
        losses, counts, bad_labels, seconds = self.meter.read()
        iteration = self.snapshot.iteration
        if bad_labels:
            raise RunError(
                f"{self.args.train_data_dir} has {bad_labels} labels outside the network's classes "
                f"in the {len(losses)} iterations up to epoch {self.epoch}, iter {iteration}; give "
                "a larger --num_classes or mend the data"
            )
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            self.refuse_loss(losses[bad[0]], back=len(losses) - 1 - bad[0])
        loss = sum(losses) / len(losses)
        self.log(metric_util.train_line(self.epoch, iteration, loss, counts, seconds))

    def refuse_loss(self, loss: float, *, back: int) -> None:
        """Raise RunError for the loss of the step that lies `back` steps before the newest."""
        step = self.snapshot.step - back
        rate = optimizer_util.learning_rate_at(
            step - 1,
            self.args.lr_decay,
            learning_rate=self.args.learning_rate,
            **schedule_settings(self.args, self.plan),
        )
        way = "try a lower --learning_rate or --gradient_clipping"
        if self.last_good is not None:
            way = (
                f"the last good snapshot is {self.last_good}; {way} with --resume={self.last_good}"
            )
        raise RunError(
            f"the loss is {loss} at epoch {self.epoch}, iter {self.snapshot.iteration - back} "
            f"(step {step}, learning rate {rate:g}); {way}"
        )

    def save_epoch(self) -> None:
        """What is due after an epoch. `best` and `last` share the files of the epoch's snapshot."""
        epoch, keep = self.snapshot.epoch, self.args.keep_snapshots
        if epoch + 1 == self.args.num_epochs or (epoch + 1) % self.args.save_epoch_interval == 0:
            self.link(self.save(f"epoch_{epoch}"))
            if keep is not None and self.saves:
                checkpoint_util.prune_snapshots(self.save_dir, keep)
        elif self.snapshot.best.get("epoch") == epoch:
            self.save("best", replace=True)

    def save(self, name: str, *, replace: bool = False) -> str:
        """On the first process; the others have the same weights."""
        graph_util.average_statistics(self.model)
        self.log(f"Saving model to {self.save_dir}/{checkpoint_util.PREFIX}{name}.")
        self.last_good = os.path.join(self.save_dir, checkpoint_util.PREFIX + name)
        if self.saves:
            checkpoint_util.save_snapshot(
                self.save_dir,
                name,
                self.model,
                self.snapshot,
                graph=self.graph if self.snapshot.step > 0 else None,
                replace=replace,
            )
        self.saved_step = self.snapshot.step
        return self.last_good

    def link(self, path: str) -> None:
        """Let `best` and `last` be the snapshot of an epoch, where they are."""
        name = f"{checkpoint_util.PREFIX}epoch_{self.snapshot.epoch}"
        if not self.saves or os.path.basename(path) != name:
            return
        if self.snapshot.best.get("epoch") == self.snapshot.epoch:
            checkpoint_util.link_snapshot(path, "best")
        if self.args.save_last:
            checkpoint_util.link_snapshot(path, "last")


if __name__ == "__main__":
    sys.exit(config.run_main(main, leave=launch_util.leave))
