"""Score a snapshot, or an exported file, on a validation set: every image exactly once.

python3 of_cnn_evaluate.py                                          # the newest run, its best
python3 of_cnn_evaluate.py --val_data_dir=DIR/validation --model_load_dir=RUN
python3 of_cnn_evaluate.py --val_data_dir=DIR/validation --report=report    # what it gets wrong
python3 of_cnn_evaluate.py --help
"""

import cnns.startup  # noqa: F401  (first, see there)

import io
import os
import sys
from argparse import Namespace
from contextlib import redirect_stderr
from typing import Any

import config
import ofrecord_util
from cnns.checkpoint.find import compare_export, restore
from cnns.checkpoint.snapshot import checksum, read_description, versions
from cnns.convert.cache import convert_for_evaluation, is_photo_folder
from cnns.data.datasets import open_val_dataset
from cnns.data.images import class_names
from cnns.data.kinds import Dataset
from cnns.distributed import launch_script, place, share_usage_errors, takes_cuda, wait_for_all
from cnns.errors import UsageError, run_main
from cnns.evaluation import ArrayEvaluator, Collector, Evaluator
from cnns.export import ExportedModel, find_export
from cnns.flags.checks import check_backend_flags, check_folder_flags, take_device
from cnns.graphs import limit_top_k
from cnns.inputs import is_within
from cnns.launch.external import find_job, take_numbers
from cnns.launch.worker import is_worker, leave
from cnns.log import Counts, is_first_rank, notice, open_log, validation_line
from cnns.places import SNAPSHOT_ROOT, VAL_DATA_DIR
from cnns.report.folder import check_report_folder
from cnns.report.metrics import Answers
from cnns.resume import num_processes


def main(argv: list[str] | None = None) -> int | None:
    with share_usage_errors():
        args = parse_args(argv)
        job = None if is_worker() else find_job(args)
    if job is not None:
        of_oneflow = args.backend == "oneflow"
        if job.world_size > 1 or of_oneflow and takes_cuda(args.device):
            memory = config.memory_flags(args, batch="val_batch_size_per_device")
            return launch_script(__file__, argv, job=job, facts=lambda: facts(args), memory=memory)
    if args.report is not None and is_first_rank():
        check_report_folder(args.report)
    device, data, (model, about, path) = prepare(args)
    log = open_log(args.log_dir, "of_cnn_evaluate")
    log(f"Restoring model from {path}.")
    log(data.loading_line)
    loader = ofrecord_util.val_loader(
        data,
        batch_size=args.val_batch_size_per_device * num_processes(vars(args)),
        preprocessing=about.preprocessing,
        device=device,
    )
    top_k = limit_top_k(args.top_k, about.num_classes)
    if top_k < args.top_k:
        notice(f"top_k is {top_k}, as there are {about.num_classes} classes.")
    evaluator: Evaluator
    settings: dict = {"top_k": top_k, "gives_logits": args.report is not None}
    if args.backend == "onnxruntime":
        evaluator = ArrayEvaluator(model.logits, loader, **settings)
    else:
        model = place(model, device)
        evaluator = Evaluator(model, loader, use_fp16=args.use_fp16, **settings)
    for i in range(args.num_epochs):
        collector = Collector(loader) if args.report is not None and i == 0 else None
        counts, seconds = evaluator.round(collector=collector)
        # Always epoch 0, as OneFlow-Benchmark prints it: the field is the epoch of training.
        log(validation_line(0, loader.num_batches, counts, seconds))
        notice(f"Loss: {counts.loss:.6f}, without label smoothing.")
        if collector is not None:
            answers = collector.answers()
            if is_first_rank():
                report(args, answers, counts=counts, data=data, about=about, path=path)
    wait_for_all()  # a process that ends while others still read from it aborts them
    return None


def report(
    args: Namespace, answers: Answers, *, counts: Counts, data: Dataset, about: Any, path: str
) -> None:
    """Write the report of a round. Raises RunError where it cannot be written."""
    from cnns.report.evaluation import Evaluation, write_report  # matplotlib takes a second

    evaluation = Evaluation(
        about={"network": about.model, "weights": path, "data": data.path, "backend": args.backend},
        data=data,
        class_names=class_names(about.num_classes, about.classes or data.classes),
        answers=answers,
        counts=counts,
        top_k=limit_top_k(args.top_k, about.num_classes),
    )
    written = write_report(evaluation, args.report)
    if evaluation.balance_line:
        notice(evaluation.balance_line)
    notice(f"Report: {written}")


def parse_args(argv: list[str] | None) -> Namespace:
    parser = config.make_parser("evaluate", __doc__)
    given = parser.parse_args(argv)
    take_numbers(given)
    args = parser.complete(given)
    check_backend_flags(args)
    check_folder_flags(args, args.val_data_dir)
    return args


def facts(args: Namespace) -> dict:
    """What has to be the same on every node. Raises as `prepare`."""
    with redirect_stderr(io.StringIO()):  # the processes will print it
        device, data, (model, snapshot, _) = prepare(args)
    return config.flags_of_a_job(args, config.make_parser("evaluate")) | {
        "device": device,
        "validation data": data.fingerprint(),
        "model": [snapshot.model, snapshot.num_classes, *vars(snapshot.preprocessing).values()],
        "weights": checksum(model),
        "versions": versions(),
        "report": args.report is not None,
    }


def prepare(args: Namespace) -> tuple[str, Dataset, tuple]:
    """Device, data and network, all checked. Raises UsageError or RunError.

    The network is (model, what has its preprocessing and num_classes, path).
    """
    of_oneflow = args.backend == "oneflow"
    device = take_device(args) if of_oneflow else "cpu"
    path, data = args.val_data_dir, None
    # The labels of a folder are the network's, so it waits for that; the rest is checked first.
    if path is not None and not is_photo_folder(path):
        data = open_data(args, path)
    if of_oneflow:
        network: tuple = restore(**config.restore_flags(args), switches=config.switches(args))
        flags = network[1].flags
    else:
        exported = ExportedModel(find_export(args.onnx_path))
        if args.onnx_path is None:
            compare_export(exported.path, run=exported.run)
        network = exported, exported, exported.path
        flags = flags_of_run(exported)
    if path is None:
        path = own_val_data(flags, path=network[2])
        check_folder_flags(args, path)
    known = network[1]
    if data is None and is_photo_folder(path):
        data = open_folder(args, path, known, flags)
    elif data is None:
        data = open_data(args, path)
    return device, data.for_network(known.num_classes), network


def open_folder(args: Namespace, folder: str, known: Any, flags: dict) -> Dataset:
    """What is to be scored of a folder of images, with the labels of the network's classes."""
    path, notices = convert_for_evaluation(
        folder,
        settings=config.folder_settings(args),
        classes=list(known.classes) if known.classes else None,
        trained_on=flags,
    )
    for text in notices:
        notice(text)
    return open_data(args, path)


def open_data(args: Namespace, path: str) -> Dataset:
    return open_val_dataset(
        path, part_num=args.val_data_part_num, num_examples=args.num_val_examples
    )


def flags_of_run(exported: ExportedModel) -> dict:
    """The flags of the run that a file was exported from, where its snapshot is still there."""
    names = exported.run or "", exported.snapshot
    path = os.path.join(SNAPSHOT_ROOT, *names)
    if not os.path.isdir(path) or not is_within(path, SNAPSHOT_ROOT) or exported.run is None:
        return {}
    return read_description(path).flags


def own_val_data(flags: dict, *, path: str) -> str:
    """The validation data of the run that left `flags`. Raises UsageError where it had none."""
    own = flags.get("val_data_dir")
    if own is None and is_photo_folder(flags.get("train_data_dir")):
        own = flags["train_data_dir"]
    if isinstance(own, str):
        notice(f"Validation data: {own}, of the run that made {path} (--val_data_dir).")
        return own
    if os.path.isdir(VAL_DATA_DIR):
        notice(f"Validation data: {VAL_DATA_DIR} (--val_data_dir).")
        return VAL_DATA_DIR
    raise UsageError(
        f"--val_data_dir is needed: the directory of the validation parts; {path} does not name one"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, leave=leave))
