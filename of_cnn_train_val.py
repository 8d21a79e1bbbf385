"""Train a CNN with OneFlow and validate it after each epoch.

python3 of_cnn_train_val.py                                # synthetic data
python3 of_cnn_train_val.py --train_data_dir=DIR/train --val_data_dir=DIR/validation
python3 of_cnn_train_val.py --help
"""

import oneflow_setup  # noqa: F401  (first, see there)

import math
import sys
from argparse import Namespace
from collections.abc import Iterator

import oneflow as flow
from oneflow import nn

import checkpoint_util
import config
import graph_util
import metric_util
import model_util
import ofrecord_util
import optimizer_util
from checkpoint_util import Snapshot
from config import Plan, RunError, UsageError
from metric_util import Log, Meter, notice
from ofrecord_util import Dataset


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = graph_util.choose_device(args.device)
    for text in config.finish_train_args(args, device=device):
        notice(text)
    train_data, val_data = open_data(args)
    snapshot = describe_run(args, train_data, val_data)
    plan = make_plan(args, train_data)
    model = graph_util.place(build_model(args, snapshot), device)
    log = metric_util.open_log(args.log_dir, "of_cnn_train_val")
    args.model_save_dir = checkpoint_util.prepare_save_dir(args.model_save_dir)

    train_graph, batches = build_training(args, train_data, model, snapshot, plan, device, log)
    evaluator = build_evaluator(args, val_data, model, snapshot, device, log)
    start(args, model, snapshot, log)
    meter = Meter(global_batch_size(args))
    for epoch in range(args.num_epochs):
        model.train()
        train_epoch(args, epoch, train_graph, batches, plan, meter, log)
        snapshot.epoch, snapshot.step = epoch, (epoch + 1) * plan.steps_per_epoch
        if evaluator is not None:
            counts, seconds = evaluator.round()
            log(metric_util.validation_line(epoch, evaluator.num_batches, counts, seconds))
            snapshot.metrics = counts.as_metrics()
        last = epoch + 1 == args.num_epochs
        if last or (epoch + 1) % args.save_epoch_interval == 0:
            save(args, f"epoch_{epoch}", model, snapshot, log)
    if args.save_last:
        save(args, "last", model, snapshot, log)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = config.train_parser(
        models=model_util.MODELS,
        optimizers=optimizer_util.OPTIMIZERS,
        schedules=optimizer_util.SCHEDULES,
    )
    args = parser.parse_args(argv)
    config.check_devices(args)
    return args


def global_batch_size(args: Namespace, per_device: int | None = None) -> int:
    return (per_device or args.batch_size_per_device) * args.num_nodes * args.gpu_num_per_node


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
    if args.val_data_dir is not None:
        val_data = ofrecord_util.open_val_dataset(
            args.val_data_dir,
            part_num=args.val_data_part_num,
            num_examples=args.num_val_examples,
        )
    return train_data, val_data


def make_plan(args: Namespace, train_data: Dataset | None) -> Plan:
    """Epochs as steps; prints the learning rate where it was not given."""
    batch_size = global_batch_size(args)
    if args.learning_rate is None:
        args.learning_rate = config.default_learning_rate(args.optimizer, batch_size)
        rate = config.LEARNING_RATE_PER_256[args.optimizer]
        notice(f"Learning rate: {args.learning_rate:g} ({rate:g} per 256 images).")
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


def describe_run(args: Namespace, train_data: Dataset | None, val_data: Dataset | None) -> Snapshot:
    """What snapshots of this run will say of themselves.

    Model, class count and preprocessing are those of the flags, else of the snapshot to start from,
    else of the training data and the table of models.
    """
    start = None
    if args.model_load_dir is not None:
        start = checkpoint_util.read_description(checkpoint_util.find_snapshot(args.model_load_dir))
        checkpoint_util.check_fits(
            start, model=args.model, num_classes=args.num_classes, path=args.model_load_dir
        )
    model = args.model or (start.model if start else "resnet50")
    known = None if train_data is None else train_data.num_classes
    num_classes = args.num_classes or (start.num_classes if start else known)
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
            image_size=args.image_size,
            resize_shorter=args.resize_shorter,
            rgb_mean=args.rgb_mean,
            rgb_std=args.rgb_std,
        ),
        classes=classes or (start.classes if start else None),
        flags=vars(args),
        versions=checkpoint_util.versions(),
    )


def build_model(args: Namespace, snapshot: Snapshot) -> nn.Module:
    """The network with initial weights drawn by --seed, or with those of --model_load_dir."""
    flow.manual_seed(args.seed)
    model = model_util.MODELS[snapshot.model].build(snapshot.num_classes)
    if args.model_load_dir is not None:
        path = checkpoint_util.find_snapshot(args.model_load_dir)
        checkpoint_util.load_weights(model, checkpoint_util.read_weights(path), path=path)
    return model


def build_training(
    args: Namespace,
    train_data: Dataset | None,
    model: nn.Module,
    snapshot: Snapshot,
    plan: Plan,
    device: str,
    log: Log,
) -> tuple[graph_util.TrainGraph, Iterator[tuple]]:
    """The training graph and the endless stream of what its calls take."""
    batch_size = global_batch_size(args)
    if train_data is None:
        log("Loading synthetic data.")
        loader = synthetic_loader(args, batch_size, snapshot, device)
    else:
        log(f"Loading data from {args.train_data_dir}")
        loader = ofrecord_util.train_loader(
            train_data,
            batch_size=batch_size,
            preprocessing=snapshot.preprocessing,
            augmentation=ofrecord_util.Augmentation(
                area=args.random_area,
                aspect_ratio=args.random_aspect_ratio,
                flip=args.random_flip,
                shuffle_buffer_size=args.shuffle_buffer_size,
            ),
            seed=args.seed,
            device=device,
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
        optimizer,
        args.lr_decay,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        step_milestones=plan.step_milestones,
        decay_rate=args.lr_decay_rate,
        exponential_steps=plan.exponential_steps,
    )
    graph = graph_util.TrainGraph(
        model,
        loader,
        optimizer,
        schedule,
        label_smoothing=args.label_smoothing,
        top_k=args.top_k,
    )
    return graph, loader.batches()


def synthetic_loader(
    args: Namespace, batch_size: int, snapshot: Snapshot, device: str
) -> ofrecord_util.SyntheticLoader:
    return ofrecord_util.SyntheticLoader(
        batch_size=batch_size,
        num_classes=snapshot.num_classes,
        image_size=snapshot.preprocessing.image_size,
        seed=args.seed,
        device=device,
    )


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
        batch_size = global_batch_size(args)
        loader = synthetic_loader(args, batch_size, snapshot, device)
        available = loader.num_examples
        num_examples = min(args.num_val_examples or available, available)
    elif val_data is not None:
        log(f"Loading data from {args.val_data_dir}")
        batch_size = global_batch_size(args, args.val_batch_size_per_device)
        loader = ofrecord_util.val_loader(
            val_data, batch_size=batch_size, preprocessing=snapshot.preprocessing, device=device
        )
        available, num_examples = val_data.available, val_data.num_examples
    else:
        return None
    return graph_util.Evaluator(
        model,
        loader,
        available=available,
        num_examples=num_examples,
        batch_size=batch_size,
        top_k=args.top_k,
        device=device,
    )


def start(args: Namespace, model: nn.Module, snapshot: Snapshot, log: Log) -> None:
    """Say where the weights come from, and save them if asked to."""
    if args.model_load_dir is not None:
        log(f"Restoring model from {args.model_load_dir}.")
    if args.save_init:
        save(args, "initial_model", model, snapshot, log)
    if args.model_load_dir is None:
        log("Init model on demand.")
    notice("Compiling the training graph; on a CPU this takes 5 to 30 seconds.")


def save(args: Namespace, name: str, model: nn.Module, snapshot: Snapshot, log: Log) -> None:
    log(f"Saving model to {args.model_save_dir}/{checkpoint_util.PREFIX}{name}.")
    checkpoint_util.save_snapshot(args.model_save_dir, name, model, snapshot)


def train_epoch(
    args: Namespace,
    epoch: int,
    graph: graph_util.TrainGraph,
    batches: Iterator[tuple],
    plan: Plan,
    meter: Meter,
    log: Log,
) -> None:
    """One epoch. A line is printed at each interval and at the end."""
    meter.restart()
    for iteration in range(1, plan.steps_per_epoch + 1):
        meter.add(graph(*next(batches)))
        if epoch == 0 and iteration == 1:
            meter.restart_clock()  # that call compiled the graph
        if iteration % args.loss_print_every_n_iter == 0 or iteration == plan.steps_per_epoch:
            loss, counts, bad_labels, seconds = meter.read()
            check_step(args, epoch, iteration, loss, bad_labels)
            log(metric_util.train_line(epoch, iteration, loss, counts, seconds))


def check_step(args: Namespace, epoch: int, iteration: int, loss: float, bad_labels: int) -> None:
    where = (
        f"in the {args.loss_print_every_n_iter} iterations up to epoch {epoch}, iter {iteration}"
    )
    if bad_labels:
        raise RunError(
            f"{args.train_data_dir} has {bad_labels} labels outside the network's classes {where}; "
            "give a larger --num_classes or mend the data"
        )
    if not math.isfinite(loss):
        raise RunError(
            f"the loss is {loss} {where}; try a lower --learning_rate (now {args.learning_rate:g}) "
            "or --gradient_clipping"
        )


if __name__ == "__main__":
    sys.exit(config.run_main(main))
