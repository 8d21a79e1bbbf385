"""Write weights of any known format as a snapshot.

python3 tools/convert_snapshot.py resnet50.pth output/snapshots/snapshot_resnet50
python3 tools/convert_snapshot.py weights.safetensors output/weights --model=mobilenetv2
python3 tools/convert_snapshot.py resnet_v15_of_best_model_val_top1_77318 output/published
python3 tools/convert_snapshot.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.startup  # noqa: F401  (before oneflow, see there)

import os

import model_registry
from cnns.checkpoint.external import LAYOUTS
from cnns.checkpoint.find import find_snapshot
from cnns.checkpoint.snapshot import save_snapshot
from cnns.checkpoint.weights import check_fits, open_checkpoint
from cnns.errors import UsageError, run_main
from cnns.flags.parser import Parser
from cnns.interrupts import exit_on_signals
from cnns.log import notice


def make_parser() -> Parser:
    parser = Parser(
        "Write weights of any known format as a snapshot: model.safetensors and JSON.",
        doc=__doc__,
        epilog="Read on: docs/weights.md.",
    )
    parser.add_argument("source", metavar="SRC", help="snapshot, .safetensors, .pth or a folder")
    parser.add_argument("target", metavar="DST", help="directory to make")
    parser.add_argument(
        "--model",
        choices=sorted(model_registry.MODELS),
        help="network; unless given, recognised by the names of the weights",
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="of the convolutions in a OneFlow folder of 2020 without meta files; unless given, "
        "OIHW",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    path = find_snapshot(args.source, models=model_registry.MODELS)
    if os.path.lexists(args.target):
        raise UsageError(f"DST: {args.target} exists; nothing is overwritten, so give another")
    checkpoint = open_checkpoint(
        path, models=model_registry.MODELS, model=args.model, layout=args.layout
    )
    snapshot = checkpoint.snapshot
    check_fits(checkpoint, models=model_registry.MODELS, model=args.model, num_classes=None)
    network = model_registry.MODELS[snapshot.model].build(snapshot.num_classes)
    for text in [*checkpoint.notices(), *checkpoint.load(network)]:
        notice(text)
    os.makedirs(os.path.dirname(os.path.abspath(args.target)), exist_ok=True)
    save_snapshot(args.target, network, snapshot)
    print(f"{path} -> {args.target}: {snapshot.model}, {snapshot.num_classes} classes")


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(run_main(main))
