"""Make a folder that classifies pictures anywhere: smaller networks, programs, and a card.

python3 tools/deploy.py output/snapshots/run1 --output=served
python3 tools/deploy.py --model=efficientnet_lite0 --output=served
python3 served/serve.py

Takes the best snapshot of a run, exports it, makes fp16 and int8 of it, measures all on the
validation data, and refuses what has lost accuracy. The folder needs nothing of this repository.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.startup  # noqa: F401  (first, see there)

import numpy as np
import onnx
import onnxruntime
from oneflow import nn

import config
import model_registry
import resnet_to_onnx
from cnns.checkpoint.files import atomic_directory, write_durably
from cnns.checkpoint.find import restore
from cnns.checkpoint.snapshot import Snapshot
from cnns.data.images import class_names
from cnns.deploy import template
from cnns.deploy.card import Card, Variant
from cnns.deploy.gate import FLOAT32, measure_milliseconds, score
from cnns.deploy.pictures import (
    DEMO,
    Pictures,
    calibration_pictures,
    crops,
    demo_photographs,
    find_photographs,
    validation_pictures,
)
from cnns.deploy.preprocess import OPSET, add_softmax
from cnns.deploy.variants import Data, explain_refusal, make_smaller, take_pictures
from cnns.errors import RunError, UsageError, run_main, say
from cnns.export import ExportedModel
from cnns.flags.export import GATE_FLAGS, PRECISIONS
from cnns.flags.parser import Parser
from cnns.interrupts import exit_on_signals
from cnns.log import notice
from cnns.record import git_commit

TEMPLATE = Path(template.__file__).parent
PROGRAMS = ("predict.py", "serve.py", "page.html", "Dockerfile", "requirements.txt")
CARD, ABOUT = "model_card.md", "about.json"
PICTURES_FILE = "pictures.onnx"
ONNX_FILES = (PICTURES_FILE, *(f"model_{name}.onnx" for name in PRECISIONS))
BATCHES = (1, 8)  # that are timed
CROPS = 256  # of the photographs of data/, where there are no other pictures
SECONDS = 120  # that predict.py may take for its check


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    network, snapshot, path = restore(
        args.run, models=model_registry.MODELS, model=args.model, num_classes=None
    )
    notice(f"Restoring model from {path}.")
    output = check_output(args.output or default_output(path))
    data = find_data(args, snapshot)
    photographs = find_photographs([], flags=snapshot.flags)
    model, compared = export(network, snapshot, path, photographs)
    variants = make_variants(model, args.precisions, data, snapshot)
    kept = [each for each in variants if each.variant.refusal is None]
    default = min(kept, key=lambda each: each.variant.milliseconds[BATCHES[0]])
    pictures = onnx.ModelProto.FromString(default.model)
    difference = take_pictures(pictures, snapshot.preprocessing, data.validation)
    add_softmax(pictures)
    files = {each.variant.file: each.model for each in kept}
    files[PICTURES_FILE] = pictures.SerializeToString()
    files |= {name: (TEMPLATE / name).read_bytes() for name in PROGRAMS}
    files[ABOUT] = about_file(snapshot, default.variant)
    card = Card(
        name=os.path.basename(output),
        network=snapshot.model,
        snapshot=os.path.normpath(path),
        about=describe_making(),
        classes=class_names(snapshot.num_classes, snapshot.classes),
        variants=[each.variant for each in variants],
        default=default.variant,
        compared=compared,
        pixels=str(difference),
        validation=describe_pictures(data.validation),
        calibration=describe_calibration(data, args.precisions),
        recipe=recipe(snapshot),
        command=["python3", "tools/deploy.py", *(sys.argv[1:] if argv is None else argv)],
        checksums={name: hashlib.sha256(held).hexdigest() for name, held in sorted(files.items())},
    )
    files[CARD] = card.text().encode()
    with atomic_directory(output, replace=True) as folder:
        for name, held in files.items():
            write_durably(os.path.join(folder, name), held)
        check_folder(folder, default, data, snapshot)
    print_summary(output, card)
    for each in variants:
        if each.variant.refusal is not None:
            raise RunError(f"{each.variant.refusal}; {output} has the others")
    return 0


def parse_args(argv: list[str] | None) -> Namespace:
    parser = Parser(
        "Make a folder that classifies pictures anywhere, from a run or a snapshot.",
        doc=__doc__,
        epilog="Read on: docs/deploy.md.",
    )
    parser.add_argument(
        "run",
        nargs="?",
        help="directory of a run, whose best is taken, or a snapshot, or weights from elsewhere; "
        "unless given, as resnet_to_onnx.py chooses",
    )
    parser.add_argument("--model", choices=sorted(model_registry.MODELS), help="network")
    parser.add_argument("--output", metavar="DIR", help="folder; unless given, deploy/<snapshot>")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="what to make; float32 is always there",
    )
    group = parser.add_argument_group("data")
    for name, flag in GATE_FLAGS.items():
        flag.add_to(group, name)
    args = parser.parse_args(argv)
    for name, flag in GATE_FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, flag.default)
    return args


def default_output(path: str) -> str:
    """Named as the export of a snapshot is."""
    name = os.path.basename(resnet_to_onnx.default_path(path))
    return os.path.join("deploy", os.path.splitext(name)[0])


def check_output(path: str) -> str:
    """Raise UsageError for a place with something else in it, before anything is computed."""
    path = os.path.normpath(path)
    if not os.path.lexists(path):
        return path
    if not os.path.isfile(os.path.join(path, CARD)):
        raise UsageError(f"--output: {path} exists and is not a folder of tools/deploy.py")
    ours = {CARD, ABOUT, *PROGRAMS, "__pycache__", *ONNX_FILES}
    others = sorted(set(os.listdir(path)) - ours)
    if others:
        raise UsageError(
            f"--output: {path} would be replaced, and holds {others[0]}, which is not of "
            "tools/deploy.py; move it, or name another folder"
        )
    return path


# Data.


def find_data(args: Namespace, snapshot: Snapshot) -> Data:
    """What is calibrated and scored on. Without labelled pictures, any have to do."""
    validation = validation_pictures(
        args.val_data_dir,
        flags=snapshot.flags,
        classes=snapshot.classes,
        num_classes=snapshot.num_classes,
    )
    calibration = None
    if "int8" in args.precisions:
        calibration = calibration_pictures(args.calibration_dir, flags=snapshot.flags)
    if validation is None:
        found = calibration or demo_crops()
        half = len(found) // 2
        if half == 0:
            raise UsageError(
                f"{found.path} has one picture: one is needed to take ranges from, and another to "
                "compare answers on"
            )
        calibration, validation = (
            found.part(list(range(half))),
            found.part(list(range(half, len(found)))),
        )
        validation = replace(validation, labelled=False)
        notice(
            f"No labelled pictures (--val_data_dir): accuracy is not measured. {len(validation)} "
            f"pictures of {found.path} show how far smaller networks differ from float32."
        )
    elif calibration is None and "int8" in args.precisions:
        raise UsageError(
            "--calibration_dir is needed: images of the kind that the network was trained on"
        )
    return Data(calibration, validation, args.max_drop, args.calibration_images)


def demo_crops() -> Pictures:
    """Random parts of the photographs of data/, for want of others."""
    demo = demo_photographs()
    pictures = [(os.path.basename(name), demo.open(i)[0]) for i, name in enumerate(DEMO)]
    return crops(pictures, count=CROPS, path=f"random crops of {' and '.join(DEMO)}")


def describe_pictures(pictures: Pictures) -> str:
    return f"{len(pictures)} pictures of {pictures.path}"


def describe_calibration(data: Data, precisions: list[str]) -> str:
    return describe_pictures(data.chosen()) if "int8" in precisions else ""


# The network.


def export(
    network: nn.Module, snapshot: Snapshot, path: str, photographs: Pictures
) -> tuple[onnx.ModelProto, str]:
    """The network as an ONNX model that equals OneFlow's, and on how far. Raises RunError."""
    reference = resnet_to_onnx.Reference(network)
    model = resnet_to_onnx.convert(reference, snapshot, path, opset=OPSET)
    with tempfile.TemporaryDirectory() as place:
        file = os.path.join(place, "model.onnx")
        resnet_to_onnx.write(model, file, external_data=False)
        comparison = resnet_to_onnx.compare(ExportedModel(file), reference, photographs, snapshot)
    if not comparison.equal:
        raise RunError(f"the export differs from {path}: logits by {comparison.difference:.3g}")
    return model, (
        f"logits differ by at most {comparison.difference:.3g}, and are up to "
        f"{comparison.largest:.3g} ({len(photographs)} photographs, and random images in batches "
        f"of {' and '.join(map(str, resnet_to_onnx.CHECK_BATCHES))})."
    )


@dataclass(frozen=True)
class Made:
    """A variant and its file."""

    variant: Variant
    model: bytes


def make_variants(
    model: onnx.ModelProto, precisions: list[str], data: Data, snapshot: Snapshot
) -> list[Made]:
    """Float32 and the smaller ones, measured, in the order of PRECISIONS."""
    wanted = [name for name in PRECISIONS if name == FLOAT32 or name in precisions]
    models = {FLOAT32: model}
    for name in wanted[1:]:
        notice(f"Making {name} ...")
        models[name] = make_smaller(model, name, data, snapshot.preprocessing)
    files = {name: each.SerializeToString() for name, each in models.items()}
    notice(f"Scoring {', '.join(files)} on {describe_pictures(data.validation)} ...")
    scores = score(files, data.validation, snapshot.preprocessing)
    size = snapshot.preprocessing.image_size
    times = {batch: measure_milliseconds(files, size, batch=batch) for batch in BATCHES}
    made = []
    for name, held in files.items():
        refused = None
        if name != FLOAT32 and not scores[name].passes(data.max_drop):
            refused = explain_refusal(
                model, models[name], name, scores[name], data, snapshot.preprocessing
            )
        milliseconds = {batch: times[batch][name] for batch in BATCHES}
        file = f"model_{name}.onnx"
        made.append(Made(Variant(name, file, len(held), scores[name], milliseconds, refused), held))
    return made


# The folder.


def about_file(snapshot: Snapshot, default: Variant) -> bytes:
    """about.json: the file to take, and what the metadata of the files say."""
    classes = class_names(snapshot.num_classes, snapshot.classes)
    about = {"default": default.file, "classes": classes, **vars(snapshot.preprocessing)}
    return json.dumps(about, indent=1, ensure_ascii=True).encode() + b"\n"


def describe_making() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    commit = git_commit()
    return {
        "made on": date.today().isoformat(),
        "by": "tools/deploy.py" + (f" of commit {commit[:12]}" if commit else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
    }


def processor() -> str:
    """Its name, and whether it has the instructions that make int8 fast."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    vnni = {"avx_vnni", "avx512_vnni"} & set(found.get("flags", "").split())
    name = found.get("model name", platform.machine()).strip()
    return f"{name} {'with' if vnni else 'without'} VNNI" if "flags" in found else name


def recipe(snapshot: Snapshot) -> dict[str, object]:
    """The flags of the training that are not at their defaults."""
    flags = config.make_parser("train").flags
    return {
        name: value
        for name, value in snapshot.flags.items()
        if value is not None and name in flags and value != flags[name].default
    }


def check_folder(folder: str, default: Made, data: Data, snapshot: Snapshot) -> None:
    """Run predict.py as it lies there on one picture. Raises RunError where it does not give what
    was measured."""
    picture, _ = data.validation.open(0)
    with tempfile.TemporaryDirectory() as place:
        path = os.path.join(place, "picture.png")
        picture.save(path)
        program = os.path.join(os.path.abspath(folder), "predict.py")
        command = [sys.executable, program, path, "--output=json"]
        try:
            done = subprocess.run(
                command, cwd=place, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"predict.py took more than {SECONDS} s in the new folder") from None
    shutil.rmtree(os.path.join(folder, "__pycache__"), ignore_errors=True)
    expected = int(default.variant.score.answers.predicted[0])
    try:
        answer = json.loads(done.stdout)["classes"][0]["class"]
    except (ValueError, LookupError):
        raise RunError(f"predict.py failed in the new folder: {done.stderr.strip()}") from None
    if answer != expected:
        raise RunError(f"predict.py gives class {answer} in the new folder, and not {expected}")


def print_summary(output: str, card: Card) -> None:
    """The table of the card, and what to do next."""
    say(f"{output}/{CARD}", sys.stdout)
    for variant in card.variants:
        result = variant.score
        kind = "right" if result.labelled else "of float32's confident answers"
        times = ", ".join(f"{ms:.1f} ms (batch {n})" for n, ms in variant.milliseconds.items())
        cells = [
            f"{variant.name:8} {variant.num_bytes / 1e6:7.1f} MB",
            f"{result.top_1:.2%} {kind} ({result.hits} of {result.count})",
            f"same answer {result.agreement:.2%}",
            times,
        ]
        cells += ["refused"] if variant.refusal else ["default"] * (variant == card.default)
        say("  ".join(cells), sys.stdout)
    say(f"Serve it: python3 {output}/serve.py", sys.stdout)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(run_main(main))
