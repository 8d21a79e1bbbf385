"""Which records the batches of a run hold: a function of seed, epoch and iteration alone."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

import numpy as np


@lru_cache(maxsize=2)
def permutation(num_records: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num_records)


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """As many numbers of records as there are labels, of each class that has some equally many.

    Where the length is not a multiple of the classes, some that are drawn have one more. Of a class
    every record comes before any comes again. Where PyTorch's WeightedRandomSampler draws each
    record by itself, so that classes come equally often on average, here they do in every epoch.
    """
    rng = np.random.default_rng((seed, 0, epoch))
    classes, counts = np.unique(labels, return_counts=True)
    records = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    wanted = np.full(len(classes), len(labels) // len(classes))
    wanted[rng.permutation(len(classes))[: len(labels) % len(classes)]] += 1
    drawn = []
    for own, count in zip(records, wanted.tolist(), strict=True):
        rounds = [rng.permutation(own) for _ in range(-(-count // len(own)))]
        drawn.append(np.concatenate([*rounds, own[:0]])[:count])
    return rng.permutation(np.concatenate(drawn))


@dataclass(frozen=True)
class RecordOrder:
    """Every record once an epoch. The first of an epoch fill its last batch up.

    With `repeats` each comes so many times in a row (repeated augmentation, arXiv:1901.09335), so
    that an epoch, which is as long, holds fewer records; in a batch the copies are apart. With
    `labels`, those of the records (N,), classes come equally often.
    """

    num_records: int
    batch_size: int  # global
    seed: int
    repeats: int = 1
    labels: np.ndarray | None = field(default=None, compare=False, repr=False)

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The numbers of the records at these positions of an epoch."""
        if self.repeats > 1:
            positions = self.spread(positions) // self.repeats
        return self.order(epoch)[positions % self.num_records]

    @cached_property
    def order(self) -> Callable[[int], np.ndarray]:
        """The order of an epoch, which is asked for with every image."""
        if self.labels is None:
            return partial(permutation, self.num_records, self.seed)
        return lru_cache(maxsize=2)(partial(balanced_order, self.labels, self.seed))

    @cached_property
    def rows_apart(self) -> np.ndarray:
        """Places in a batch of copies in a row, (batch_size,), for rows without neighbours that are
        copies: 0, R, 2 R, ..., 1, R + 1, ..."""
        return np.argsort(np.arange(self.batch_size) % self.repeats, kind="stable")

    def spread(self, positions: np.ndarray) -> np.ndarray:
        """Positions in an order with copies in a row, for such in one whose copies are apart."""
        batches, rows = np.divmod(positions, self.batch_size)
        return batches * self.batch_size + self.rows_apart[rows]

    def digest(self, before: str | None, epoch: int, iteration: int) -> str:
        """The digest `before`, None at the start of a run, continued with a global batch.

        It is SHA-256 of the digest before, the epoch, the iteration and the numbers of the batch's
        records, int64 each, in hexadecimal.
        """
        positions = iteration * self.batch_size + np.arange(self.batch_size)
        numbers = np.concatenate(([epoch, iteration], self.at(epoch, positions)))
        data = bytes.fromhex(before or "") + numbers.astype("<i8").tobytes()
        return hashlib.sha256(data).hexdigest()

    def digest_at(self, epoch: int, iteration: int, *, steps_per_epoch: int) -> str | None:
        """The digest of a run that has done `iteration` iterations of an epoch.

        For 90 epochs of ImageNet it takes some seconds.
        """
        digest = None
        for earlier in range(epoch):
            for i in range(steps_per_epoch):
                digest = self.digest(digest, earlier, i)
        for i in range(iteration):
            digest = self.digest(digest, epoch, i)
        return digest
