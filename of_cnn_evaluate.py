"""Score a snapshot, or an exported file, on a validation set: every image exactly once.

python3 of_cnn_evaluate.py --val_data_dir=DIR/validation            # the newest snapshot
python3 of_cnn_evaluate.py --val_data_dir=DIR/validation --model_load_dir=SNAPSHOT
python3 of_cnn_evaluate.py --val_data_dir=DIR/validation --backend=onnxruntime
python3 of_cnn_evaluate.py --val_data_dir=DIR/validation --report=report    # what it gets wrong
python3 of_cnn_evaluate.py --help
"""

import cnns.startup  # noqa: F401  (first, see there)

import io
import sys
from argparse import Namespace
from contextlib import redirect_stderr
from typing import Any

import config
import ofrecord_util
from cnns.checkpoint.find import restore
from cnns.checkpoint.snapshot import checksum, versions
from cnns.data.datasets import open_val_dataset
from cnns.data.images import class_names
from cnns.data.kinds import Dataset
from cnns.distributed import launch_script, place, takes_cuda
from cnns.errors import UsageError, run_main
from cnns.evaluation import ArrayEvaluator, Collector, Evaluator
from cnns.export import ExportedModel, find_export
from cnns.launch.job import make_job
from cnns.launch.worker import is_worker, leave
from cnns.log import Counts, is_first_rank, notice, open_log, validation_line
from cnns.report.folder import check_report_folder
from cnns.report.metrics import Answers
from cnns.resume import num_processes


def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    if not is_worker():
        job = make_job(**config.job_flags(args))
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
    evaluator: Evaluator
    settings: dict = {"top_k": args.top_k, "gives_logits": args.report is not None}
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
        top_k=args.top_k,
    )
    written = write_report(evaluation, args.report)
    if evaluation.balance_line:
        notice(evaluation.balance_line)
    notice(f"Report: {written}")


def parse_args(argv: list[str] | None) -> Namespace:
    args = config.make_parser("evaluate").read(argv)
    config.check_backend_flags(args)
    if args.val_data_dir is None:
        raise UsageError("--val_data_dir is needed: the directory of the validation parts")
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
    device = config.take_device(args) if of_oneflow else "cpu"
    data = open_val_dataset(
        args.val_data_dir, part_num=args.val_data_part_num, num_examples=args.num_val_examples
    )
    if of_oneflow:
        network: tuple = restore(**config.restore_flags(args), switches=config.switches(args))
    else:
        exported = ExportedModel(find_export(args.onnx_path))
        network = exported, exported, exported.path
    return device, data.for_network(network[1].num_classes), network


if __name__ == "__main__":
    sys.exit(run_main(main, leave=leave))
