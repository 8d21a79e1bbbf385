"""Exported files: their metadata, and how they are run. Nothing here needs OneFlow.

A file of resnet_to_onnx.py takes `images` (batch, 3, H, W) float32, RGB, normalised, and gives
`logits` (batch, classes) float32, before softmax. Its metadata are texts, each of them JSON:

    format_version  1
    model           name in the table of models
    snapshot        name of the snapshot that it was made from
    run             name of the directory of that, if it is of a run
    classes         names of the classes, in the order of the logits
    image_size, resize_shorter, rgb_mean, rgb_std, interpolation   of cnns.data.images.Preprocessing
    precision       fp16 or int8, of a smaller one

Other texts are not looked at: tools that work on such files leave theirs, which are not JSON. With
--dynamic_size the file takes any height and width. One of --preprocess or --softmax is for other
programs, and is not read here.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Timer

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError, Message
from onnxruntime.capi import onnxruntime_pybind11_state as native

from cnns.data.images import Preprocessing, read_preprocessing
from cnns.errors import RunError, UsageError
from cnns.hints import path_hint
from cnns.inputs import check_ordinary, is_within
from cnns.jsonfile import INT64, anything, integer, listed, parse_json, record, refuse
from cnns.places import ONNX_ROOT

INPUT, OUTPUT = "images", "logits"
PICTURES, PROBABILITIES = "pictures", "probabilities"  # in their place: --preprocess, --softmax
HEIGHT, WIDTH = "height", "width"  # in place of numbers: --dynamic_size
FORMAT_VERSION = 1
DATA_SUFFIX = ".data"  # of the file with the weights, where they are kept apart
MAX_BYTES = 2**31 - 1  # of a file without the one of its weights; protobuf reads no more
MAX_NAME = 1000  # characters
MAX_FAULT = 300  # characters of what another library says
DESCRIBED = (
    "format_version",
    "model",
    "snapshot",
    "run",
    "classes",
    "precision",
    *Preprocessing.__annotations__,
)
# What a graph may take while it computes: it is a program, and anybody may have written it.
SECONDS_PER_IMAGE = 60
MEMORY_SHARE = 0.75  # of the machine's
ERRORS = (
    native.EPFail,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.ModelLoaded,
    native.NoModel,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
)


def find_export(path: str | None) -> str:
    """The file to read: the one named, else the newest in ONNX_ROOT.

    Raises UsageError where there is none.
    """
    if path is not None:
        try:
            check_ordinary(path)
        except FileNotFoundError:
            raise UsageError(f"--onnx_path: there is no file {path}; {path_hint(path)}") from None
        except OSError as error:
            raise UsageError(f"--onnx_path: cannot read {path}: {error.strerror}") from None
        return path
    names = os.listdir(ONNX_ROOT) if os.path.isdir(ONNX_ROOT) else []
    found = [
        os.path.join(ONNX_ROOT, name)
        for name in names
        if name.endswith(".onnx") and not name.startswith(".")
    ]
    found = [path for path in found if os.path.isfile(path)]
    if not found:
        raise UsageError(
            f"no exported file in {ONNX_ROOT}: make one first (python3 resnet_to_onnx.py), or name "
            "one with --onnx_path"
        )
    return max(found, key=lambda path: (os.stat(path).st_mtime_ns, path))


def is_utf_8(path: str) -> bool:
    """Whether onnx and ONNX Runtime can open a file of this name."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def describe(
    *,
    model: str,
    snapshot: str,
    classes: list[str],
    preprocessing: Preprocessing,
    run: str | None = None,
) -> dict[str, str]:
    """The metadata of a file."""
    fields = {
        "format_version": FORMAT_VERSION,
        "model": model,
        "snapshot": snapshot,
        **({"run": run} if run else {}),
        "classes": classes,
        **vars(preprocessing),
    }
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in fields.items()}
    # A name with a byte that is not UTF-8: JSON's escape of it is Python's.
    return {name: text.encode(errors="backslashreplace").decode() for name, text in texts.items()}


def name(value: object, where: str) -> None:
    if not isinstance(value, str) or len(value) > MAX_NAME:
        refuse(value, where, f"a text of at most {MAX_NAME} characters")


ABOUT = record(
    {
        "format_version": integer(-INT64),
        "model": name,
        "snapshot": name,
        "classes": listed(name, low=1),
    },
    {"run": name, "precision": name},
    others=anything,  # read_preprocessing checks the rest
)


@dataclass(frozen=True)
class About:
    """The metadata of a file."""

    model: str
    snapshot: str
    run: str | None
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    precision: str


def read_about(texts: dict[str, str], *, path: str) -> About:
    """The metadata of the file `path`, checked.

    Raises ValueError where they are damaged, RunError where they are of another version.
    """
    about = {name: parse_json(text) for name, text in texts.items() if name in DESCRIBED}
    ABOUT(about, "")
    version = about["format_version"]
    if version != FORMAT_VERSION:
        raise RunError(
            f"{path} is of format {version}, and this version reads {FORMAT_VERSION}; export it "
            "again"
        )
    return About(
        about["model"],
        about["snapshot"],
        about.get("run"),
        tuple(about["classes"]),
        read_preprocessing(about),
        about.get("precision", "float32"),
    )


def read_structure(path: str) -> onnx.ModelProto:
    """The file without the weights beside it. Raises RunError where it is not an ONNX file, and
    ValueError where it would have something read from outside of its folder, or has loops."""
    if not is_utf_8(path):
        raise RunError(f"cannot read {path}: its name is not UTF-8, and ONNX Runtime needs that")
    try:
        check_ordinary(path)
        if os.path.getsize(path) > MAX_BYTES:
            raise RunError(f"{path} is larger than {MAX_BYTES} bytes, the limit of an ONNX file")
        with open(path, "rb") as file, warnings.catch_warnings(record=True) as found:
            data = file.read()
            with silent():
                model = onnx.ModelProto.FromString(data)
        del data
        if found:  # of an end before the last byte
            raise DecodeError
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except DecodeError:
        raise RunError(
            f"cannot read {path}: it is not an ONNX file, or damaged or cut off"
        ) from None
    for message in messages(model):
        if isinstance(message, onnx.TensorProto):
            check_place(message, os.path.dirname(path) or ".")
        elif isinstance(message, onnx.AttributeProto) and (message.HasField("g") or message.graphs):
            raise ValueError("it has branches or loops, which the networks here do not have")
    return model


@contextmanager
def silent() -> Iterator[None]:
    """Drops what native code writes on stderr: protobuf's lines about texts, which are checked."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def messages(message: Message) -> Iterator[Message]:
    """A message and all below it; not below tensors, which hold numbers.

    Raises ValueError where a text is not UTF-8, which protobuf then gives as bytes.
    """
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            texts = value if field.label == field.LABEL_REPEATED else [value]
            if any(isinstance(text, bytes) for text in texts):
                raise ValueError(f"{field.name} in it is not UTF-8")
    if isinstance(message, onnx.TensorProto):
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.label == field.LABEL_REPEATED else [value]:
                yield from messages(each)


def check_place(tensor: onnx.TensorProto, folder: str) -> None:
    """Raise ValueError where the numbers of a tensor are not in a file in `folder`, or inside."""
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    if not entries and tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    places = [value for key, value in entries if key == "location"]
    if len(places) != 1 or len(entries) != len(dict(entries)):
        raise ValueError(f"the place of {tensor.name!r} is not one file")
    place = os.path.join(folder, places[0])
    if not is_within(place, folder):
        raise ValueError(f"the weights of {tensor.name!r} are outside of its folder: {places[0]!r}")
    if not os.path.isfile(place):
        raise ValueError(f"there is no file {places[0]!r} beside it, for {tensor.name!r}")
    start, length = (int(dict(entries).get(key, "0")) for key in ("offset", "length"))
    if start < 0 or length < 0 or start + length > os.path.getsize(place):
        raise ValueError(f"{places[0]!r} is shorter than the place of {tensor.name!r}")


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) to probabilities along C."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def open_session(model: bytes | str, *, as_it_is: bool = False) -> onnxruntime.InferenceSession:
    """A file that is one's own, as predict.py runs it, or each node as it is, none fused."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    if as_it_is:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@cache
def limit_memory() -> None:
    """Let what ONNX Runtime takes be no more than MEMORY_SHARE, in this process: it raises then."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    onnxruntime.create_and_register_allocator(
        onnxruntime.OrtMemoryInfo(
            "Cpu",
            onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
            0,
            onnxruntime.OrtMemType.DEFAULT,
        ),
        onnxruntime.OrtArenaCfg(int(MEMORY_SHARE * memory), -1, -1, -1),
    )


@contextmanager
def time_limit(seconds: float) -> Iterator[onnxruntime.RunOptions]:
    """Options of a run that ends it, between two nodes of the graph, when it has taken so long."""
    options = onnxruntime.RunOptions()
    timer = Timer(seconds, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    finally:
        timer.cancel()


class ExportedModel:
    """A file of resnet_to_onnx.py, ready to run on the CPU.

    Raises RunError where it is damaged, or not of resnet_to_onnx.py.
    """

    def __init__(self, path: str):
        self.path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is raised
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.add_session_config_entry("session.use_env_allocators", "1")
        limit_memory()
        try:
            structure = read_structure(path)  # before ONNX Runtime opens anything
            texts = {entry.key: entry.value for entry in structure.metadata_props}
            about = read_about(texts, path=path)
            del structure
            self.model, self.classes = about.model, about.classes
            self.snapshot, self.run = about.snapshot, about.run
            self.preprocessing, self.precision = about.preprocessing, about.precision
            self.session = onnxruntime.InferenceSession(
                path,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"],  # it would compute without a limit of time
            )
            self.check_ends()
        except ERRORS as error:
            raise RunError(f"ONNX Runtime cannot read {path}: {str(error)[:MAX_FAULT]}") from None
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise RunError(
                f"{path} is not a file of resnet_to_onnx.py, or a damaged one "
                f"({type(error).__name__}: {str(error)[:MAX_FAULT]})"
            ) from None

    def check_ends(self) -> None:
        """Raise ValueError where input and output contradict the metadata, and RunError where they
        are those of --preprocess or --softmax."""
        size = self.preprocessing.image_size
        found = [
            (value.name, value.type, value.shape[1:])
            for value in (*self.session.get_inputs(), *self.session.get_outputs())
        ]
        for name, flag in ((PICTURES, "preprocess"), (PROBABILITIES, "softmax")):
            if name in [each[0] for each in found]:
                raise RunError(
                    f"{self.path} was exported with --{flag}, for other programs; name a file that "
                    "was exported without it"
                )
        self.takes_any_size = found[0][2] == [3, HEIGHT, WIDTH]
        if self.takes_any_size:
            found[0] = (*found[0][:2], [3, size, size])
        needed = [
            (INPUT, "tensor(float)", [3, size, size]),
            (OUTPUT, "tensor(float)", [self.num_classes]),
        ]
        if found != needed:
            raise ValueError(f"it has {found} for {needed}")

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) float32, normalised, to (N, C) float32. Raises RunError."""
        try:
            with time_limit(SECONDS_PER_IMAGE * len(images)) as options:
                logits = self.session.run([OUTPUT], {INPUT: images}, options)[0]
        except ERRORS as error:
            if options.terminate:
                raise RunError(
                    f"{self.path} takes more than {SECONDS_PER_IMAGE} s for an image, which is the "
                    "limit"
                ) from None
            raise RunError(
                f"ONNX Runtime cannot run {self.path}: {str(error)[:MAX_FAULT]}"
            ) from None
        if logits.shape != (len(images), self.num_classes) or not np.isfinite(logits).all():
            raise RunError(
                f"{self.path} does not compute {self.num_classes} finite logits for each image"
            )
        return logits

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        return softmax(self.logits(images))
