"""What tools/benchmark.py --train_data_dir and --against=dali measure: loaders of parts."""

import itertools
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import model_registry
import ofrecord_util
from cnns.data.crops import Augmentation
from cnns.data.datasets import open_train_dataset
from cnns.data.kinds import Dataset
from cnns.errors import UsageError
from cnns.log import limit_run_ahead
from tools.against import start_peer
from tools.photographs import draw_imagenet, shrink, write_photographs
from tools.timing import asked, by_turns, compare, print_table, timed

LOADERS = {  # --data_order and augmentation
    "native": ("native", Augmentation()),
    "global": ("global", Augmentation()),
    "trivialaugment_wide": (
        "global",
        Augmentation(auto_augment="trivialaugment_wide", random_erasing=0.1),
    ),
    "randaugment": ("global", Augmentation(auto_augment="randaugment")),
    "color_jitter": ("global", Augmentation(color_jitter=(0.4, 0.4, 0.4, 0.1))),
}


def make_load(
    args: Namespace, data: Dataset, device: str, name: str, processor: list[float]
) -> Callable[[], None]:
    """What takes --steps batches from one of LOADERS, and notes the processor's seconds."""
    data_order, augmentation = LOADERS[name]
    loader = ofrecord_util.train_loader(
        data,
        batch_size=args.batch_size_per_device,
        preprocessing=model_registry.MODELS[args.model].preprocessing(image_size=args.image_size),
        augmentation=augmentation,
        seed=0,
        device=device,
        data_order=data_order,
    )

    def load() -> None:
        held, start = [], time.process_time()
        for image, label, *_ in itertools.islice(loader.batches(0), args.steps):
            held.append((image.to_local()[0, 0, 0, 0], label))
            limit_run_ahead(held)
        held[-1][0].numpy()
        processor.append(time.process_time() - start)

    return load


def benchmark_loader(args: Namespace, device: str) -> dict:
    """images/s of reading, decoding and augmenting OFRecord parts, without a network.

    Each of LOADERS in turn. The native one normalises, and the others leave that to the graph. The
    processor's time tells more than the clock where other programs run beside.
    """
    if args.train_data_dir.endswith(".npz"):
        raise UsageError(f"--train_data_dir={args.train_data_dir}: a directory of parts is needed")
    data = open_train_dataset(args.train_data_dir)
    processor: dict[str, list[float]] = {name: [] for name in LOADERS}
    loads = [make_load(args, data, device, name, processor[name]) for name in LOADERS]
    for load in loads:
        load()  # warms up
    seconds, ratio = by_turns(args.rounds, *loads)
    count = args.steps * args.batch_size_per_device
    rates = [round(count / each, 1) for each in seconds]
    return {
        **asked(args, "train_data_dir"),
        "num_examples": data.num_examples,
        **asked(args, "image_size", "batch_size_per_device", "steps", "rounds"),
        "images_per_second": dict(zip(LOADERS, rates, strict=True)),
        "global_to_native": round(ratio, 3),
        "processor_milliseconds_per_image": {
            name: round(1000 * statistics.median(each[1:]) / count, 3)
            for name, each in processor.items()
        },
    }


NUM_PHOTOGRAPHS, NUM_PARTS, STORED_SHORTER = 512, 4, 256  # pixels


def against_dali(args: Namespace, device: str) -> dict:
    """images/s of the loaders and of DALI's CPU pipeline, from the same JPEGs to training images.

    As ImageNet has them, and as --resize_shorter stores them. Both decode, crop, resize and flip
    with a thread for each core; the native loader and DALI normalise, the other leaves that to the
    graph.
    """
    count = args.steps * args.batch_size_per_device
    processor: dict[str, dict[str, list[float]]] = {}
    kinds: dict[str, dict[str, Callable[[], float]]] = {}
    sizes = args.batch_size_per_device, args.image_size
    with (
        tempfile.TemporaryDirectory() as folder,
        start_peer("dali", args.peer_python, *sizes) as peer,
    ):
        stored = {"photographs": draw_imagenet(NUM_PHOTOGRAPHS)}
        stored["stored smaller"] = shrink(stored["photographs"], STORED_SHORTER)
        for what, photographs in stored.items():
            root = Path(folder, what)
            write_photographs(photographs, root, num_parts=NUM_PARTS)
            used = processor[what] = {"ours": [], "ours, global order": [], "dali": []}

            def ask(files: str, used: list[float]) -> float:
                answer = peer.ask(files, args.steps)
                used.append(answer["processor"])
                return answer["seconds"]

            data = open_train_dataset(str(root / "parts"))
            kinds[what] = {
                who: partial(timed, make_load(args, data, device, name, used[who]))
                for who, name in (("ours", "native"), ("ours, global order", "global"))
            }
            kinds[what]["dali"] = partial(ask, str(root / "files"), used["dali"])
        kinds["stored smaller"]["dali, photographs"] = partial(
            ask, str(Path(folder, "photographs", "files")), []
        )
        report = compare(args.rounds, kinds, count)
        version = peer.about["version"]
    print_table(report)
    return asked(args, "image_size", "batch_size_per_device", "steps", "rounds") | {
        "dali": version,
        "bytes_per_image": {
            what: sum(map(len, each)) // len(each) for what, each in stored.items()
        },
        **report,
        "processor_milliseconds_per_image": {
            what: {
                who: round(1000 * statistics.median(s[1:]) / count, 3) for who, s in used.items()
            }
            for what, used in processor.items()
        },
    }
