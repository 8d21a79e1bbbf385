"""Two nodes on one machine: network namespaces, joined by a cable that can be cut."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

COUNTER = count()


@dataclass(frozen=True)
class Node:
    name: str  # of the namespace
    address: str

    def command(self, *argv: str) -> list[str]:
        """`argv`, to be run on this node. Its process is the program itself, not one above it."""
        return ["ip", "netns", "exec", self.name, *argv]

    def cut(self) -> None:
        """Pull the cable out: nothing arrives any more on either side, and nobody is told."""
        ip("-n", self.name, "link", "set", "veth", "down")


def ip(*argv: str) -> str:
    done = subprocess.run(["ip", *argv], check=True, capture_output=True, text=True)
    return done.stdout


def why_not() -> str:
    """Why no namespace can be made here; empty if one can."""
    name = f"of{os.getpid()}try"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except FileNotFoundError:
        return "network namespaces need iproute2 (`ip`)"
    except subprocess.CalledProcessError as error:
        return f"`ip netns add` is not allowed here: {error.stderr.strip()}"
    return ""


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Nodes at 10.77.0.1 and 10.77.0.2, which see each other, themselves, and nothing else."""
    number = next(COUNTER)
    nodes = [Node(f"of{os.getpid()}n{number}{i}", f"10.77.0.{i + 1}") for i in range(2)]
    made = []
    try:
        for node in nodes:
            ip("netns", "add", node.name)
            made.append(node)
        a, b = (node.name for node in nodes)
        ip("link", "add", "veth", "netns", a, "type", "veth", "peer", "name", "veth", "netns", b)
        for node in nodes:
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "veth")
            for link in ("lo", "veth"):
                ip("-n", node.name, "link", "set", link, "up")
        yield nodes[0], nodes[1]
    finally:
        for node in made:
            for process in ip("netns", "pids", node.name).split():
                subprocess.run(["kill", "-KILL", process], stderr=subprocess.DEVNULL)
            ip("netns", "del", node.name)
