"""The peer of tools/benchmark.py --against: PyTorch, in an environment of its own."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnns.errors import RunError, UsageError, printable

PEER = Path(__file__).with_name("torch_peer.py")
NETWORKS = ("resnet18", "resnet50")
LAYOUTS = ("nchw", "channels_last")


class Peer:
    """A process of tools/torch_peer.py."""

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

    def seconds(self, kind: str, layout: str, steps: int) -> float:
        """Of so many steps, "train" or "predict"."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([kind, layout, steps]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why
        return self.answer()["seconds"]


@contextmanager
def start_peer(python: str, *, model: str, batch_size: int, image_size: int) -> Iterator[Peer]:
    """The peer in its own Python, with a thread for each core; it ends with the block.

    Raises UsageError for a network that it has not, or a Python that does not start.
    """
    if model not in NETWORKS:
        raise UsageError(f"--against=torch has {', '.join(NETWORKS)}, and not {model}")
    threads = len(os.sched_getaffinity(0))
    command = [python, str(PEER), model, str(batch_size), str(image_size), str(threads)]
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
