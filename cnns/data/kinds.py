"""The kinds of data set: OFRecord parts, arrays in memory, synthetic data."""

import itertools
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cnns.data.format import PART_PREFIX
from cnns.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set that has been checked, before any loader opens it."""

    path: str
    num_examples: int  # to use, of those there are
    num_classes: int | None = None  # if known
    classes: tuple[str, ...] | None = None  # names, if known
    max_label: int | None = None  # the largest there is, if known

    @property
    def loading_line(self) -> str:
        return f"Loading data from {self.path}"

    @property
    def available(self) -> int:
        """Examples in what is read."""
        raise NotImplementedError

    def content(self) -> bytes:
        """What tells it from another data set of as many examples."""
        raise NotImplementedError

    def fingerprint(self) -> dict | None:
        """What two nodes, or a run and the one that resumes it, compare; None: synthetic."""
        return {
            "examples": self.num_examples,
            "classes": self.num_classes,
            "checksum": zlib.crc32(self.content()),
        }

    def only_needed(self) -> "Dataset":
        """This data set without what follows the first `num_examples`."""
        raise NotImplementedError

    def check_shares(self, num_processes: int) -> list[str]:
        """Raise UsageError where so many processes cannot share it in training. Gives notices."""
        return []

    def for_network(self, num_classes: int) -> "Dataset":
        """This data set for a network of `num_classes` classes.

        Raises UsageError where it is known to have labels outside the network's classes.
        """
        needed = self.num_classes
        if needed is None and self.max_label is not None:
            needed = self.max_label + 1
        if needed is not None and needed > num_classes:
            raise UsageError(
                f"--num_classes={num_classes}, but {self.path} has labels up to {needed - 1}; give "
                f"at least --num_classes={needed}"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Shards(Dataset):
    """A directory of OFRecord parts."""

    suffix_length: int  # digits of `part-00000`; -1: not padded
    part_counts: tuple[int, ...]  # records of each part
    source: str = ""  # digest of the files that they were made of, if known

    @property
    def available(self) -> int:
        return sum(self.part_counts)

    def content(self) -> bytes:
        return (repr(self.part_counts) + self.source).encode()

    def part_path(self, number: int) -> str:
        suffix = str(number).zfill(max(self.suffix_length, 1))
        return os.path.join(self.path, PART_PREFIX + suffix)

    def only_needed(self) -> "Shards":
        ends = itertools.accumulate(self.part_counts)
        count = next(i for i, end in enumerate(ends, 1) if end >= self.num_examples)
        return replace(self, part_counts=self.part_counts[:count])

    def check_shares(self, num_processes: int) -> list[str]:
        """Gives a notice where the shares are so unequal that an epoch, which is as long for each
        process, leaves out more than 1 % of the images."""
        counts = self.part_counts
        if len(counts) < num_processes:
            raise UsageError(
                f"--train_data_dir: {self.path} has {len(counts)} parts to read, and each of "
                f"{num_processes} processes needs one of its own; make the data set again with "
                "more (--num_parts)"
            )
        cuts = split_evenly(counts, num_processes)
        shares = [sum(counts[a:b]) for a, b in itertools.pairwise(cuts)]
        mean = sum(counts) / num_processes
        missed = sum(max(0, share - mean) for share in shares) / sum(counts)
        if missed <= 0.01:
            return []
        return [
            f"{self.path}: {len(counts)} parts cannot be shared out evenly among {num_processes} "
            f"processes; each epoch leaves out about {missed:.0%} of the images, others each time, "
            "and repeats as many. A multiple of the processes, or many more parts (--num_parts), "
            "would fix that."
        ]


@dataclass(frozen=True, kw_only=True)
class Arrays(Dataset):
    """Images and labels in memory."""

    images: np.ndarray  # (N, H, W, 3) uint8
    labels: np.ndarray  # (N,) int32

    @property
    def available(self) -> int:
        return len(self.images)

    def content(self) -> bytes:
        return self.images.tobytes() + self.labels.tobytes()

    def only_needed(self) -> "Arrays":
        count = self.num_examples
        return replace(self, images=self.images[:count], labels=self.labels[:count])


@dataclass(frozen=True, kw_only=True)
class Synthetic(Dataset):
    """Random images with random labels of as many classes as the network has."""

    path: str = ""
    loading_line = "Loading synthetic data."
    seed: int = 0

    def fingerprint(self) -> None:
        return None

    def for_network(self, num_classes: int) -> "Synthetic":
        return replace(self, num_classes=num_classes)


def split_evenly(counts: Sequence[int], num_shares: int) -> list[int]:
    """Cut a row of parts into shares with about as many records each.

    Share i is parts `cuts[i]` to `cuts[i + 1]`. None is empty unless there are fewer parts than
    shares.

    >>> split_evenly([5, 3, 4, 2], 2)
    [0, 2, 4]
    """
    ends = np.cumsum(counts)
    middles = ends - np.asarray(counts) / 2
    cuts = [0]
    for i in range(1, num_shares):
        cut = int((middles < ends[-1] * i / num_shares).sum())
        if len(counts) >= num_shares:
            cut = min(max(cut, cuts[-1] + 1), len(counts) - (num_shares - i))
        cuts.append(cut)
    return [*cuts, len(counts)]
