"""Runs on a device that computes nothing: what OneFlow compiled for them, what the device noted.

As a script it runs the project's scripts one after the other in its own process, as that saves the
import of OneFlow and the making of a device each time, and notes every job that is compiled.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
FAULT = re.compile(r"^(?:ERROR|MISSING|OOM)\b.*", re.MULTILINE)
DTYPES = {"kFloat": "float32", "kFloat16": "float16", "kDouble": "float64"}


# What was compiled.


@dataclass(frozen=True)
class Blob:
    """A tensor of a job. Its shape is over all devices."""

    name: str
    dtype: str  # "float16", "int64", ...
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Operator:
    name: str
    kind: str  # "conv2d", "learning_rate_schedule", ...
    device: str  # "cuda" or "cpu", by its placement
    inputs: tuple[Blob, ...]
    outputs: tuple[Blob, ...]

    @property
    def dtypes(self) -> set[str]:
        return {blob.dtype for blob in self.inputs + self.outputs}


def read_operators(job) -> list[Operator]:
    """The operators of OneFlow's Job message, in its order."""
    from oneflow.core.common.data_type_pb2 import DataType

    def dtype(number: int) -> str:
        name = DataType.Name(number)
        return DTYPES.get(name, name.removeprefix("k").lower())

    devices = {
        name: group.parallel_conf.device_tag
        for group in job.placement.placement_group
        for name in group.op_set.op_name
    }
    descriptions = job.helper.lbn2logical_blob_desc

    def blobs(arguments) -> tuple[Blob, ...]:
        names = [name for argument in sorted(arguments) for name in arguments[argument].s]
        return tuple(
            Blob(name, dtype(descriptions[name].data_type), tuple(descriptions[name].shape.dim))
            for name in names
            if name in descriptions
        )

    operators = []
    for op in job.net.op:
        kind, inputs, outputs = op.WhichOneof("op_type"), (), ()
        if kind == "user_conf":
            kind = op.user_conf.op_type_name
            inputs, outputs = blobs(op.user_conf.input), blobs(op.user_conf.output)
        elif kind == "variable_conf":
            conf = op.variable_conf
            outputs = (Blob(f"{op.name}/out", dtype(conf.data_type), tuple(conf.shape.dim)),)
        operators.append(
            Operator(op.name, kind.removesuffix("_conf"), devices[op.name], inputs, outputs)
        )
    return operators


def note_jobs(note: Callable[[str, list[Operator]], None]) -> None:
    """Call `note` with the name and the operators of each graph that is compiled from now on."""
    from oneflow import nn

    compile_graph = nn.Graph.finish_complie_and_init_runtime  # spelt so in OneFlow

    def compile_and_note(graph):
        compile_graph(graph)
        note(type(graph).__name__, read_operators(graph._compiled_job_proto))

    nn.Graph.finish_complie_and_init_runtime = compile_and_note


# Several scripts in one process.


@dataclass
class Done:
    """A script that has ended, and the jobs it compiled, by the names of their graphs."""

    status: int
    stdout: str
    stderr: str
    jobs: dict[str, list[Operator]] = field(default_factory=dict)


class Session:
    """Scripts that run one after the other in a process of their own."""

    def __init__(self, *commands: Sequence[str], env: dict[str, str], cwd: Path):
        """
        Args:
            commands: `train`, `evaluate` or `inference`, then the flags.
            env: from `fake.environment`.
        """
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps([list(map(str, c)) for c in commands])],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, timeout: float = 600) -> list[Done]:
        """What each command gave."""
        try:
            out, errors = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()  # if it is still there
        assert self.process.returncode == 0, (out[-2000:], errors[-4000:])
        return [Done(**done, jobs=self.operators(jobs)) for done, jobs in json.loads(out)]

    @staticmethod
    def operators(jobs: dict) -> dict[str, list[Operator]]:
        def blobs(rows):
            return tuple(Blob(name, dtype, tuple(shape)) for name, dtype, shape in rows)

        return {
            graph: [Operator(*head, blobs(ins), blobs(outs)) for *head, ins, outs in rows]
            for graph, rows in jobs.items()
        }


def run(commands: list[list[str]]) -> list[tuple[dict, dict]]:
    """What `Session.finish` reads, of commands that run here."""
    sys.path.insert(0, str(TESTS.parent))
    sys.path.insert(0, str(TESTS))
    from cnns.launch.job import Job, reserve_port
    from cnns.launch.worker import worker_environ

    # As the only worker of a job, for on CUDA the scripts start others to do the work.
    with reserve_port(None) as port:
        os.environ |= worker_environ(Job(), 0, port.getsockname())
    import cnns.startup  # noqa: F401

    import model_registry
    import of_cnn_evaluate
    import of_cnn_inference
    import of_cnn_train_val
    import small

    scripts = {
        "train": of_cnn_train_val,
        "evaluate": of_cnn_evaluate,
        "inference": of_cnn_inference,
    }
    model_registry.MODELS.update(small.MODELS)
    jobs: dict[str, list] = {}

    def rows(blobs: tuple[Blob, ...]) -> list[tuple]:
        return [(blob.name, blob.dtype, blob.shape) for blob in blobs]

    def note(graph: str, operators: list[Operator]) -> None:
        jobs[graph] = [
            (op.name, op.kind, op.device, rows(op.inputs), rows(op.outputs)) for op in operators
        ]

    note_jobs(note)
    done = []
    for script, *argv in commands:
        result = small.call(scripts[script].main, *argv)
        done.append((vars(result), dict(jobs)))
        jobs.clear()
    return done


# What the device noted.


@dataclass
class Log:
    """One process's log of its devices; their lines are told in README.md here."""

    faults: list[str]
    devices: set[int]  # on which it made a context or memory, copied or launched anything
    peak: int  # most bytes in use at once, over all devices
    copies: Counter  # (from and to, "HD" for host to device; bytes) -> how often
    waits: Counter  # ("device", "stream", "event" or "copy"; "main" or "other") -> how often
    allocations: int  # of the device's memory, and releases, which wait for the whole device
    calls: dict[str, list[str]]  # name of a communicator -> what NCCL was asked for, in order
    rank: int | None  # None: the process has no communicator

    def copied(self, direction: str) -> Counter:
        """Bytes of a copy -> how often, for one direction."""
        return Counter({size: n for (way, size), n in self.copies.items() if way == direction})


def read_log(path: Path) -> Log:
    """The log of one process; an empty one where it never touched a device."""
    text = path.read_text() if path.exists() else ""
    names = dict(re.findall(r"NCCL id comm (\d+) is (\S+)", text))
    calls: dict[str, list[str]] = {name: [] for name in names.values()}
    for number, call in re.findall(r"NCCL comm (\d+) (.+)", text):
        calls[names[number]].append(call)
    ranks = {int(rank) for rank in re.findall(r"NCCL init comm \d+ rank (\d+) of", text)}
    assert len(ranks) <= 1, f"{path}: ranks {ranks} in one process"
    used = re.findall(r"^(?:CONTEXT|MALLOC|COPY|LAUNCH)\b.*\bdevice (\d+)", text, re.MULTILINE)
    return Log(
        faults=FAULT.findall(text),
        devices=set(map(int, used)),
        peak=max(map(int, re.findall(r"^MALLOC .* used (\d+)", text, re.MULTILINE)), default=0),
        copies=Counter((way, int(n)) for way, n in re.findall(r"COPY (HD|DH|DD) (\d+)", text)),
        waits=Counter(re.findall(r"^WAIT (\w+) (\w+)", text, re.MULTILINE)),
        allocations=len(re.findall(r"^(?:MALLOC|FREE) ", text, re.MULTILINE)),
        calls=calls,
        rank=ranks.pop() if ranks else None,
    )


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
