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
import model_registry
import ofrecord_util
from cnns.checkpoint.find import restore
from cnns.checkpoint.snapshot import checksum, versions
from cnns.data.datasets import Dataset, check_labels, open_val_dataset
from cnns.distributed import choose_device, launch_script, place, takes_cuda
from cnns.errors import UsageError, run_main
from cnns.evaluation import ArrayEvaluator, Evaluator
from cnns.export import ExportedModel, find_export
from cnns.flags import FlagParser
from cnns.launch.job import make_job
from cnns.launch.worker import is_worker, leave
from cnns.log import notice, open_log, validation_line
from cnns.models.layers import Switches


def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    if not is_worker():
        job = make_job(**config.job_flags(args))
        of_oneflow = args.backend == "oneflow"
        if job.world_size > 1 or of_oneflow and takes_cuda(args.device):
            memory = config.memory_flags(args, batch="val_batch_size_per_device")
            return launch_script(__file__, argv, job=job, facts=lambda: facts(args), memory=memory)
    device, data, (model, about, path) = prepare(args)
    log = open_log(args.log_dir, "of_cnn_evaluate")
    log(f"Restoring model from {path}.")
    log(f"Loading data from {args.val_data_dir}")
    loader = ofrecord_util.val_loader(
        data,
        batch_size=args.val_batch_size_per_device * config.num_processes(args),
        preprocessing=about.preprocessing,
        device=device,
    )
    settings = {"num_examples": data.num_examples, "top_k": args.top_k}
    if args.backend == "onnxruntime":
        evaluator = ArrayEvaluator(model.logits, loader, **settings)
    else:
        model = place(model, device)
        evaluator = Evaluator(model, loader, use_fp16=args.use_fp16, **settings)
    for _ in range(args.num_epochs):
        counts, seconds = evaluator.round()
        # The original numbers every round 0: the epoch is that of training.
        log(validation_line(0, loader.num_batches, counts, seconds))
    return None


def make_parser() -> FlagParser:
    return config.evaluate_parser(models=model_registry.MODELS)


def parse_args(argv: list[str] | None) -> Namespace:
    args = make_parser().read(argv)
    config.check_backend_flags(args)
    if args.val_data_dir is None:
        raise UsageError("--val_data_dir is needed: the directory of the validation parts")
    return args


def facts(args: Namespace) -> dict:
    """What has to be the same on every node. Raises as `prepare`."""
    with redirect_stderr(io.StringIO()):  # the processes will say it
        device, data, (model, snapshot, _) = prepare(args)
    return config.flags_of_a_job(args, make_parser()) | {
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
    if args.backend == "onnxruntime":
        device, open_network = "cpu", open_export
    else:
        device, open_network = check_device(args), restore_network
    data = open_data(args)
    network = open_network(args)
    num_classes = network[1].num_classes
    check_labels(data, num_classes=num_classes, path=args.val_data_dir)
    return device, data, network


def check_device(args: Namespace) -> str:
    device = choose_device(args.device, count=args.gpu_num_per_node)
    for text in config.check_precision_flags(args, device=device):
        notice(text)
    return device


def restore_network(args: Namespace) -> tuple:
    return restore(
        args.model_load_dir,
        models=model_registry.MODELS,
        model=args.model,
        num_classes=args.num_classes,
        switches=Switches(**config.switch_flags(args)),
        **config.preprocessing_flags(args),
    )


def open_export(args: Namespace) -> tuple:
    exported = ExportedModel(find_export(args.onnx_path))
    return exported, exported, exported.path


def open_data(args: Namespace) -> Dataset:
    return open_val_dataset(
        args.val_data_dir,
        part_num=args.val_data_part_num,
        num_examples=args.num_val_examples,
    )


if __name__ == "__main__":
    sys.exit(run_main(main, leave=leave))
