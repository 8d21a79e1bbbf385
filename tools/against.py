"""The peers of tools/benchmark.py --against: programs in an environment of their own each."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnns.errors import RunError, UsageError, printable

PEERS = {
    name: Path(__file__).with_name(f"{name}_peer.py") for name in ("torch", "onnxruntime", "dali")
}


class Peer:
    """A process of one of PEERS. `about` is the first thing that it says, its version."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self.about = self.answer()

    def answer(self) -> dict:
        """The next line of the peer. Raises RunError where it has ended."""
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines() or ["it said nothing"]
            raise RunError(f"--against: the peer has ended: {printable(said[-1])}")
        return json.loads(line)

    def ask(self, *request: str | int) -> dict:
        """What the peer has measured, "seconds" among it, of a request that it knows."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why
        return self.answer()

    def seconds(self, *request: str | int) -> float:
        return self.ask(*request)["seconds"]


def check_python(name: str, python: str | None) -> None:
    """Before anything is prepared: raises UsageError where no Python is given that can be run."""
    if python is None:
        raise UsageError(f"--against={name} needs --peer_python, a Python that has it")
    if shutil.which(python) is None:
        raise UsageError(f"--peer_python={python} is not a program that can be run")


@contextmanager
def start_peer(name: str, python: str, *arguments: str | int) -> Iterator[Peer]:
    """A peer in its own Python, with a thread for each core; it ends with the block.

    Raises UsageError where its Python does not start.
    """
    threads = len(os.sched_getaffinity(0))
    command = [python, str(PEERS[name]), *map(str, arguments), str(threads)]
    pipe = subprocess.PIPE
    # Ours alone sets the number of threads here (cnns.startup).
    environ = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environ
        )
    except OSError as error:
        raise UsageError(f"--peer_python={python}: {error.strerror}") from None
    with process:
        try:
            yield Peer(process)
        finally:
            process.kill()
