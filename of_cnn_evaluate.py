"""Score a snapshot, or an exported file, on a validation set: every image exactly once.

python3 of_cnn_evaluate.py --val_data_dir=DIR/validation            # the newest snapshot
python3 of_cnn_evaluate.py --val_data_dir=DIR/validation --model_load_dir=SNAPSHOT
python3 of_cnn_evaluate.py --val_data_dir=DIR/validation --backend=onnxruntime
python3 of_cnn_evaluate.py --help
"""

import cnns.startup  # noqa: F401  (first, see there)

import io
import sys
from argparse import Namespace
from contextlib import redirect_stderr

import config
import ofrecord_util
from cnns.checkpoint.find import restore
from cnns.checkpoint.snapshot import checksum, versions
from cnns.data.datasets import open_val_dataset
from cnns.data.kinds import Dataset
from cnns.distributed import launch_script, place, share_usage_errors, takes_cuda
from cnns.errors import UsageError, run_main
from cnns.evaluation import ArrayEvaluator, Evaluator
from cnns.export import ExportedModel, find_export
from cnns.launch.external import find_job, take_numbers
from cnns.launch.worker import is_worker, leave
from cnns.log import open_log, validation_line


def main(argv: list[str] | None = None) -> int | None:
    with share_usage_errors():
        args = parse_args(argv)
        job = None if is_worker() else find_job(args)
    if job is not None:
        of_oneflow = args.backend == "oneflow"
        if job.world_size > 1 or of_oneflow and takes_cuda(args.device):
            memory = config.memory_flags(args, batch="val_batch_size_per_device")
            return launch_script(__file__, argv, job=job, facts=lambda: facts(args), memory=memory)
    device, data, (model, about, path) = prepare(args)
    log = open_log(args.log_dir, "of_cnn_evaluate")
    log(f"Restoring model from {path}.")
    log(data.loading_line)
    loader = ofrecord_util.val_loader(
        data,
        batch_size=args.val_batch_size_per_device * config.num_processes(args),
        preprocessing=about.preprocessing,
        device=device,
    )
    evaluator: Evaluator
    if args.backend == "onnxruntime":
        evaluator = ArrayEvaluator(model.logits, loader, top_k=args.top_k)
    else:
        model = place(model, device)
        evaluator = Evaluator(model, loader, top_k=args.top_k, use_fp16=args.use_fp16)
    for _ in range(args.num_epochs):
        counts, seconds = evaluator.round()
        # Always epoch 0, as OneFlow-Benchmark prints it: the field is the epoch of training.
        log(validation_line(0, loader.num_batches, counts, seconds))
    return None


def parse_args(argv: list[str] | None) -> Namespace:
    parser = config.make_parser("evaluate")
    given = parser.parse_args(argv)
    take_numbers(given)
    args = parser.complete(given)
    config.check_backend_flags(args)
    if args.val_data_dir is None:
        raise UsageError("--val_data_dir is needed: the directory of the validation parts")
    return args


def facts(args: Namespace) -> dict:
    """What has to be the same on every node. Raises as `prepare`."""
    with redirect_stderr(io.StringIO()):  # the processes will say it
        device, data, (model, snapshot, _) = prepare(args)
    return config.flags_of_a_job(args, config.make_parser("evaluate")) | {
        "device": device,
        "validation data": data.fingerprint(),
        "model": [snapshot.model, snapshot.num_classes, *vars(snapshot.preprocessing).values()],
        "weights": checksum(model),
        "versions": versions(),
    }


def prepare(args: Namespace) -> tuple[str, Dataset, tuple]:
    """Device, data and network, all checked. Raises UsageError or RunError.

    The network comes with what has its preprocessing and classes, and its path.
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
