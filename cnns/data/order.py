"""Which records the batches of a run hold: a function of seed, epoch and iteration alone."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def permutation(num_records: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num_records)


@dataclass(frozen=True)
class RecordOrder:
    """Every record once an epoch. The first of an epoch fill its last batch up."""

    num_records: int
    batch_size: int  # global
    seed: int

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The numbers of the records at these positions of an epoch."""
        return permutation(self.num_records, self.seed, epoch)[positions % self.num_records]

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
