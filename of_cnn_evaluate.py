"""Score a snapshot, or an exported file, on a validation set: every image exactly once.

python3 of_cnn_evaluate.py --val_data_dir=DIR/validation            # the newest snapshot
python3 of_cnn_evaluate.py --val_data_dir=DIR/validation --model_load_dir=SNAPSHOT
python3 of_cnn_evaluate.py --val_data_dir=DIR/validation --backend=onnxruntime
python3 of_cnn_evaluate.py --help
"""

import oneflow_setup  # noqa: F401  (first, see there)

import io
import sys
from argparse import Namespace
from contextlib import redirect_stderr
from functools import partial

import checkpoint_util
import config
import graph_util
import launch_util
import metric_util
import model_util
import ofrecord_util
import onnx_util
from config import UsageError
from layer_util import Switches
from metric_util import notice


def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    if not launch_util.is_worker():
        job = launch_util.make_job(**config.job_flags(args))
        of_oneflow = args.backend == "oneflow"
        if job.world_size > 1 or of_oneflow and graph_util.takes_cuda(args.device):
            memory = config.memory_flags(args, batch="val_batch_size_per_device")
            return launch_util.launch(
                launch_util.command(__file__, argv),
                job=job,
                facts=lambda: facts(args),
                explain=partial(graph_util.explain_crash, **memory),
            )
    device, data, (model, about, path) = prepare(args)
    log = metric_util.open_log(args.log_dir, "of_cnn_evaluate")
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
        evaluator = graph_util.ArrayEvaluator(model.logits, loader, **settings)
    else:
        model = graph_util.place(model, device)
        evaluator = graph_util.Evaluator(model, loader, use_fp16=args.use_fp16, **settings)
    for _ in range(args.num_epochs):
        counts, seconds = evaluator.round()
        # The original numbers every round 0: the epoch is that of training.
        log(metric_util.validation_line(0, loader.num_batches, counts, seconds))
    return None


def parse_args(argv: list[str] | None) -> Namespace:
    args = config.evaluate_parser(models=model_util.MODELS).parse_args(argv)
    config.check_backend_flags(args)
    if args.val_data_dir is None:
        raise UsageError("--val_data_dir is needed: the directory of the validation parts")
    return args


def facts(args: Namespace) -> dict:
    """What has to be the same on every node. Raises as `prepare`."""
    with redirect_stderr(io.StringIO()):  # the processes will say it
        device, data, (model, snapshot, _) = prepare(args)
    return config.flags_of_a_job(args) | {
        "device": device,
        "validation data": data.fingerprint(),
        "model": [snapshot.model, snapshot.num_classes, *vars(snapshot.preprocessing).values()],
        "weights": checkpoint_util.checksum(model),
        "versions": checkpoint_util.versions(),
    }


def prepare(args: Namespace) -> tuple[str, ofrecord_util.Dataset, tuple]:
    """Device, data and network, all checked. Raises UsageError or RunError.

    The network comes with what has its preprocessing and classes, and its path.
    """
    if args.backend == "onnxruntime":
        device, open_network = "cpu", open_export
    else:
        device, open_network = choose_device(args), restore
    data = open_data(args)
    network = open_network(args)
    num_classes = network[1].num_classes
    ofrecord_util.check_labels(data, num_classes=num_classes, path=args.val_data_dir)
    return device, data, network


def choose_device(args: Namespace) -> str:
    device = graph_util.choose_device(args.device, count=args.gpu_num_per_node)
    for text in config.check_precision_flags(args, device=device):
        notice(text)
    return device


def restore(args: Namespace) -> tuple:
    return checkpoint_util.restore(
        args.model_load_dir,
        model=args.model,
        num_classes=args.num_classes,
        switches=Switches(**config.switch_flags(args)),
        **config.preprocessing_flags(args),
    )


def open_export(args: Namespace) -> tuple:
    exported = onnx_util.ExportedModel(onnx_util.find_export(args.onnx_path))
    return exported, exported, exported.path


def open_data(args: Namespace) -> ofrecord_util.Dataset:
    return ofrecord_util.open_val_dataset(
        args.val_data_dir,
        part_num=args.val_data_part_num,
        num_examples=args.num_val_examples,
    )


if __name__ == "__main__":
    sys.exit(config.run_main(main, leave=launch_util.leave))
