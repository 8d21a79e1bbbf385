"""Export a network to ONNX, and check that ONNX Runtime computes what OneFlow computes.

python3 resnet_to_onnx.py                                    # the newest run, its best
python3 resnet_to_onnx.py --check_only --image_path photos   # compares the file that is there
python3 resnet_to_onnx.py --precision=int8 --preprocess --softmax --onnx_path=small.onnx

The file takes `images` (batch, 3, H, W) float32, RGB, normalised, of any batch size, and gives
`logits` (batch, classes); cnns/export.py describes its metadata. tools/deploy.py does the rest.
"""

import cnns.startup  # noqa: F401  (first, see there)

import io
import logging
import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

import numpy as np
import oneflow as flow
import onnx
from oneflow import nn
from oneflow_onnx.oneflow2onnx.flow2onnx import Export
from onnx import version_converter
from onnx.external_data_helper import convert_model_to_external_data, write_external_data_tensors

import config
from cnns.checkpoint.files import (
    find_leftovers,
    lock_directory,
    sync_directory,
    temporary_name,
    write_durably,
)
from cnns.checkpoint.find import restore
from cnns.checkpoint.snapshot import PREFIX, Snapshot
from cnns.data.images import class_names
from cnns.deploy.gate import FLOAT32
from cnns.deploy.pictures import Pictures, find_photographs, named_images
from cnns.deploy.sizes import free_size
from cnns.deploy.variants import finish, lowest_opset, open_data
from cnns.errors import RunError, UsageError, printable, run_main
from cnns.export import (
    DATA_SUFFIX,
    INPUT,
    OUTPUT,
    ExportedModel,
    describe,
    find_export,
    is_utf_8,
    softmax,
)
from cnns.flags.export import EXPORT_FLAGS, OPSET, VARIANT_FLAGS
from cnns.graphs import LogitsGraph
from cnns.interrupts import exit_on_signals
from cnns.launch.external import refuse_ranks
from cnns.log import notice
from cnns.places import ONNX_ROOT

# Shapes in the exported graph that begin with this number depend on the batch.
EXPORT_BATCH = 8
CHECK_BATCHES = (1, EXPORT_BATCH)  # of random images
# The newest that oneflow-onnx gets right: from 11 on it loses the bounds of ReLU6, from 13 on its
# graphs fail onnx's checker.
OWN_OPSET = 10
RTOL, ATOL = 1e-4, 1e-5


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    paths = named_images(args.image_path or [])
    network, snapshot, snapshot_path = restore(**config.restore_flags(args))
    notice(f"Restoring model from {snapshot_path}.")
    data = open_data(**data_flags(args, snapshot)) if args.precision != FLOAT32 else None
    photographs = find_photographs(paths, flags=snapshot.flags)
    reference = Reference(network)
    path = args.onnx_path or default_path(snapshot_path)
    if not is_utf_8(path):
        raise UsageError(f"--onnx_path: {path} is not UTF-8, and ONNX Runtime needs that")
    if args.check_only:
        exported = ExportedModel(find_export(path))
        check_metadata(exported, snapshot)
        comparison = compare(exported, reference, photographs, snapshot)
    else:
        with staging(path) as temporary:
            settings = {"opset": choose_opset(args), "dynamic_size": args.dynamic_size}
            model = convert(reference, snapshot, snapshot_path, **settings)
            write(model, temporary, external_data=args.external_data)
            comparison = compare(ExportedModel(temporary), reference, photographs, snapshot)
            if comparison.equal:
                if args.precision != FLOAT32 or args.preprocess or args.softmax:
                    model = finish(model, data, **finish_flags(args, photographs, snapshot))
                    write(model, temporary, external_data=args.external_data)
                replace_export(temporary, path)
        if comparison.equal:
            print("Convert to onnx success! >> ", printable(path))
    print_comparison(comparison, snapshot)
    if not comparison.equal:
        raise RunError(
            f"{path} differs from {snapshot_path}: logits by {comparison.difference:.3g}, and "
            f"{RTOL:g} relative, {ATOL:g} absolute are allowed"
            + ("" if args.check_only else "; it was not kept")
        )


def parse_args(argv: list[str] | None) -> Namespace:
    refuse_ranks("the export")
    args = config.make_parser("export", __doc__).read(argv)
    for flag in ("external_data", "opset", *VARIANT_FLAGS):
        default = (EXPORT_FLAGS | VARIANT_FLAGS)[flag].default
        if args.check_only and getattr(args, flag) != default:
            raise UsageError(f"--{flag} has no effect with --check_only; leave it out")
    if args.dynamic_size and args.preprocess:
        raise UsageError("--preprocess takes pictures of any size as it is; drop --dynamic_size")
    choose_opset(args)
    return args


def choose_opset(args: Namespace) -> int:
    """Raises UsageError where the one that is given cannot express the file."""
    lowest = lowest_opset(precision=args.precision, preprocess=args.preprocess)
    if args.opset is not None and args.opset < lowest:
        flag = "--preprocess" if args.preprocess else f"--precision={args.precision}"
        raise UsageError(f"--opset={args.opset}: {flag} needs at least {lowest}")
    return args.opset or max(OPSET, lowest)


def data_flags(args: Namespace, snapshot: Snapshot) -> dict:
    """The arguments of cnns.deploy.variants.open_data."""
    return {
        "precisions": (args.precision,),
        "calibration_dir": args.calibration_dir,
        "calibration_images": args.calibration_images,
        "val_data_dir": args.val_data_dir,
        "max_drop": args.max_drop,
        "flags": snapshot.flags,
        "classes": snapshot.classes,
        "num_classes": snapshot.num_classes,
    }


def finish_flags(args: Namespace, photographs: Pictures, snapshot: Snapshot) -> dict:
    """The arguments of cnns.deploy.variants.finish beside model and data."""
    own = {name: getattr(args, name) for name in ("precision", "preprocess", "softmax")}
    return {"photographs": photographs, "preprocessing": snapshot.preprocessing, **own}


def default_path(snapshot_path: str) -> str:
    """Where the export of a snapshot goes.

    >>> default_path("output/snapshots/model_save-20200723124215/snapshot_epoch_9")
    'onnx/model/model_save-20200723124215_epoch_9.onnx'
    >>> default_path("resnet_v15_of_best_model_val_top1_77318")
    'onnx/model/resnet_v15_of_best_model_val_top1_77318.onnx'
    """
    directory, name = os.path.split(os.path.abspath(snapshot_path))
    if name.startswith(PREFIX):  # of a run, whose name tells it from others
        run = os.path.basename(directory)
        name = "_".join(filter(None, (run, name.removeprefix(PREFIX))))
    elif os.path.isfile(snapshot_path):
        name = os.path.splitext(name)[0]
    return os.path.join(ONNX_ROOT, f"{name}.onnx")


class Reference:
    """What OneFlow computes, on the CPU."""

    def __init__(self, model: nn.Module):
        self.model = model.eval()
        self.graphs: dict[tuple[int, ...], LogitsGraph] = {}

    def graph(self, shape: tuple[int, ...]) -> LogitsGraph:
        if shape not in self.graphs:
            self.graphs[shape] = LogitsGraph(self.model)
        return self.graphs[shape]

    def logits(self, images: np.ndarray) -> np.ndarray:
        return self.graph(images.shape)(flow.tensor(images)).numpy()


def convert(
    reference: Reference,
    snapshot: Snapshot,
    snapshot_path: str,
    *,
    opset: int,
    dynamic_size: bool = False,
) -> onnx.ModelProto:
    """The network as an ONNX model, in memory. Raises RunError where it cannot be expressed."""
    size = snapshot.preprocessing.image_size
    shape = (EXPORT_BATCH, 3, size, size)
    reference.logits(np.zeros(shape, np.float32))  # compiles
    model = call_oneflow_onnx(reference.graph(shape), opset=min(opset, OWN_OPSET))
    rename(model, model.graph.input[0].name, INPUT)
    rename(model, model.graph.output[0].name, OUTPUT)
    make_batch_dynamic(model)
    model.graph.name = snapshot.model
    if dynamic_size:
        free_size(model)
    if opset > OWN_OPSET:
        model = version_converter.convert_version(model, opset)
    directory, name = os.path.split(os.path.abspath(snapshot_path))
    metadata = describe(
        model=snapshot.model,
        snapshot=name,
        run=os.path.basename(directory) if name.startswith(PREFIX) else None,
        classes=class_names(snapshot.num_classes, snapshot.classes),
        preprocessing=snapshot.preprocessing,
    )
    onnx.helper.set_model_props(model, metadata)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RunError(f"opset {opset} cannot express this {snapshot.model}: {error}") from None
    return model


def call_oneflow_onnx(graph: nn.Graph, *, opset: int) -> onnx.ModelProto:
    """The graph as oneflow-onnx exports it. Raises RunError."""
    with tempfile.TemporaryDirectory() as place, library_errors() as errors:
        path = os.path.join(place, "model.onnx")
        try:
            with redirect_stdout(io.StringIO()), loading(read_once(graph.state_dict())):
                Export(graph, place, path, opset=opset, dynamic_batch_size=True)
        except Exception as error:  # of any kind, for a layer that it does not know
            errors.append(f"{type(error).__name__}: {error}")
        if errors:
            raise RunError(f"oneflow-onnx cannot export the network: {errors[0]}")
        return onnx.load(path)


class Weight:
    """A tensor that was read once. oneflow-onnx reads and copies each a hundred times."""

    def __init__(self, tensor: flow.Tensor):
        self.array = tensor.numpy()

    def numpy(self) -> np.ndarray:
        return self.array

    def __deepcopy__(self, memo: dict) -> "Weight":
        return self


def read_once(state: dict) -> dict:
    """A graph's state, a dict of dicts of tensors, with a Weight for each tensor."""
    return {
        name: read_once(value) if isinstance(value, dict) else Weight(value)
        for name, value in state.items()
    }


@contextmanager
def loading(state: dict) -> Iterator[None]:
    """A context in which `flow.load` gives this state, whatever it is asked for."""
    load, flow.load = flow.load, lambda path: state
    try:
        yield
    finally:
        flow.load = load


@contextmanager
def library_errors() -> Iterator[list[str]]:
    """Collects the errors that oneflow-onnx only logs, and hides its log."""
    errors: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    handler = Handler(logging.ERROR)
    logger = logging.getLogger("oneflow_onnx")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield errors
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    """Give an input or output of the graph another name."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name == old:
            value.name = new
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def make_batch_dynamic(model: onnx.ModelProto) -> None:
    """Make the graph, exported with EXPORT_BATCH images, take any number of them.

    A Reshape to a constant shape that begins with the batch takes that dimension from its input
    instead.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[0] in constants:
            continue
        if node.input[1] in constants:
            shape = onnx.numpy_helper.to_array(constants[node.input[1]]).copy()
            if shape.size and shape[0] == EXPORT_BATCH:
                shape[0] = 0  # as in the input
                name = f"{node.output[0]}/shape"
                graph.initializer.append(onnx.numpy_helper.from_array(shape, name))
                node.input[1] = name
    del graph.value_info[:]  # intermediate shapes with that batch; they are inferred
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    used = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused:
        graph.initializer.remove(tensor)


@contextmanager
def staging(path: str) -> Iterator[str]:
    """A name for the new file in a temporary directory next to `path`, which is removed at the end.

    Raises UsageError where nothing can be written there.
    """
    directory, name = os.path.split(path)
    place = temporary_name(path)
    try:
        for taken in (path, path + DATA_SUFFIX):
            if os.path.isdir(taken):
                raise IsADirectoryError(0, f"{taken} is a directory", path)
        if os.path.isfile(directory):
            raise NotADirectoryError(0, f"{directory} is a file", path)
        os.makedirs(directory or ".", exist_ok=True)
        for left in find_leftovers(directory, f".{name}.tmp-"):
            undo_replace(os.path.join(left, name), path)
            shutil.rmtree(left, ignore_errors=True)
        os.mkdir(place)
        handle = lock_directory(place)
    except OSError as error:
        raise UsageError(
            f"--onnx_path: cannot write {path}: {error.strerror}; give another"
        ) from None
    try:
        yield os.path.join(place, name)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; nothing was changed") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(handle)


def write(model: onnx.ModelProto, path: str, *, external_data: bool) -> None:
    """Write a model, its weights into `<path>.data` if asked to. Raises OSError, or RunError."""
    if external_data:
        model = onnx.ModelProto.FromString(model.SerializeToString())
        data = os.path.basename(path) + DATA_SUFFIX
        convert_model_to_external_data(model, location=data)  # what is over 1 kB
        model = write_external_data_tensors(model, os.path.dirname(path))
        sync_directory(path + DATA_SUFFIX)
    write_durably(path, model.SerializeToString())
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise RunError(f"onnx's checker refuses the file: {error}") from None


def replace_export(temporary: str, path: str) -> None:
    """Move a new file, and that of its weights, to `path`.

    Two files cannot be replaced in one step, and an old one must not be read with a new one: where
    there is a file of weights, the old files are moved away first, and back if the move fails.
    """
    old = temporary + ".old"
    if os.path.exists(path + DATA_SUFFIX) or os.path.exists(temporary + DATA_SUFFIX):
        move(path, old)
    try:
        move(temporary, path)
    except OSError:
        move(old, path)
        raise
    sync_directory(os.path.dirname(path) or ".")


def undo_replace(temporary: str, path: str) -> None:
    """Undo a `replace_export` that was killed halfway. Raises OSError."""
    old = temporary + ".old"
    if not (os.path.exists(old) and os.path.exists(path)):  # else it was complete
        move(old, path)


def move(source: str, target: str) -> None:
    """Rename a file and that of its weights, where they exist; the file itself last."""
    for suffix in (DATA_SUFFIX, ""):
        if os.path.exists(source + suffix):
            os.replace(source + suffix, target + suffix)


@dataclass
class Comparison:
    """Of the logits of OneFlow and of ONNX Runtime."""

    # Name, logits (1, C) of ONNX Runtime, and whether they are equal.
    photographs: list[tuple[str, np.ndarray, bool]]
    equal: bool  # these, and on random images
    difference: float  # the largest, of logits
    largest: float  # logit


def compare(
    exported: ExportedModel, reference: Reference, photographs: Pictures, snapshot: Snapshot
) -> Comparison:
    """Run both on photographs, one by one, and on random images in batches. Raises RunError."""
    rng, size = np.random.default_rng(0), snapshot.preprocessing.image_size
    images = [photographs.array(i, snapshot.preprocessing)[0] for i in range(len(photographs))]
    shapes = [(batch, 3, size, size) for batch in CHECK_BATCHES]
    if exported.takes_any_size:
        shapes.append((1, 3, size + 7, size + 26))  # odd somewhere at each stride
    batches = [image[None] for image in images]
    batches += [rng.standard_normal(shape, np.float32) for shape in shapes]
    pairs = [(exported.logits(batch), reference.logits(batch)) for batch in batches]
    results = [are_equal(theirs, ours) for theirs, ours in pairs]
    return Comparison(
        photographs=[(photographs.names(i), pairs[i][0], results[i]) for i in range(len(images))],
        equal=all(results),
        difference=max(
            np.abs(theirs - ours).max() if theirs.shape == ours.shape else np.inf
            for theirs, ours in pairs
        ),
        largest=max(np.abs(ours).max() for _, ours in pairs),
    )


def are_equal(theirs: np.ndarray, ours: np.ndarray) -> bool:
    """Whether logits (N, C) and their probabilities are the same within RTOL and ATOL.

    A logit near 0 is a difference of large numbers, so the relative part of its tolerance is of the
    largest logit of its image.
    """
    if theirs.shape != ours.shape:
        return False
    allowed = ATOL + RTOL * np.abs(ours).max(axis=1, keepdims=True)
    return bool((np.abs(theirs - ours) <= allowed).all()) and np.allclose(
        softmax(theirs), softmax(ours), rtol=RTOL, atol=ATOL
    )


def check_metadata(exported: ExportedModel, snapshot: Snapshot) -> None:
    """Raise RunError where model, classes or preprocessing of a file differ from the snapshot's, or
    it is not float32."""
    if exported.precision != FLOAT32:
        raise RunError(
            f"{exported.path} is {exported.precision}, whose answers differ; --check_only is for "
            "float32"
        )
    classes = tuple(class_names(snapshot.num_classes, snapshot.classes))
    for name, theirs, ours in (
        ("model", exported.model, snapshot.model),
        ("classes", exported.classes, classes),
        ("preprocessing", exported.preprocessing, snapshot.preprocessing),
    ):
        if theirs != ours:
            raise RunError(f"{exported.path} and the snapshot differ in {name}; export it again")


def print_comparison(comparison: Comparison, snapshot: Snapshot) -> None:
    """The original's lines for each photograph."""
    names = class_names(snapshot.num_classes, snapshot.classes)
    for name, logits, equal in comparison.photographs:
        probabilities = softmax(logits)[0]
        best = int(probabilities.argmax())
        print(printable(name))
        print(f"Are the results equal? {'Yes' if equal else 'No'}")
        print(f"Class: {printable(names[best])}; score: {probabilities[best]}", flush=True)
    notice(
        f"Largest difference: {comparison.difference:.3g}, of logits up to "
        f"{comparison.largest:.3g} ({len(comparison.photographs)} photographs, and random images "
        f"in batches of {' and '.join(map(str, CHECK_BATCHES))})."
    )


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(run_main(main))
