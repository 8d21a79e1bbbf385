"""The loaders of OFRecord parts, and which loader feeds the graphs from which kind of data set.

A loader is an `nn.Module` that a graph owns, in two halves. `batches(...)` runs outside the graph
and yields, without end, the tensors that one call of the graph takes; `forward(*batch)` runs inside
it and gives

    image  (N, 3, H, W) float32, RGB, normalised, on the device
    label  (N,) int32, on the device

with N the global batch size; where images are mixed, it also gives what cnns/losses.py says. A
training loader's `batches(epoch, iteration)` begins after the first `iteration` batches of an
epoch, and what it yields depends on the seed, the epoch and the iteration alone, so that a run can
stop and be resumed anywhere. A validation loader's `batches()` are one round, of `num_batches`, and
have one tensor more in front,

    row_mask  (N,) int32, 1 in rows to score, 0 in padding and repetitions

With several processes each makes the rows that its device gets; a validation loader's
`positions(iteration)` says where those of a batch lie in the data set.
"""

import itertools
import os
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.data.arrays import ArrayTrainLoader, ArrayValLoader
from cnns.data.crops import SHUFFLE_BUFFER_SIZE, Augmentation, derive_seeds
from cnns.data.format import PART_PREFIX
from cnns.data.images import Preprocessing
from cnns.data.kinds import Arrays, Dataset, Shards, Synthetic, split_evenly
from cnns.data.mixing import Mixing, MixingLoader
from cnns.data.pictures import PictureTrainLoader
from cnns.data.records import RecordSource
from cnns.data.synthetic import SyntheticTrainLoader, SyntheticValLoader
from cnns.distributed import to_global, wait_for_all
from cnns.errors import RunError
from cnns.polling import sleep_instead_of_polling


class OFRecordLoader(nn.Module):
    """What training and validation share: OneFlow's native reader, and the label.

    Reader and decoders run on the CPU and outside the graph, so that each epoch can make new ones:
    a new reader begins at its first record, and a new decoder's random numbers at its seed. Each
    process reads parts of its own.
    """

    def __init__(self, data: Shards, *, batch_size: int, device: str):
        super().__init__()
        self.shards = data
        self.rank, self.num_ranks = flow.env.get_rank(), flow.env.get_world_size()
        self.batch_size = batch_size // self.num_ranks  # of this process
        self.placement = flow.env.all_device_placement(device)
        self.label = nn.OFRecordRawDecoder("class/label", shape=(), dtype=flow.int32)
        allow_open_files(len(data.part_counts))
        if device == "cpu":
            sleep_instead_of_polling()  # also where no graph of OneFlow's will run

    def share(self, order: Sequence[int]) -> list[int]:
        """The parts that this process reads when all are taken in the given order."""
        counts = [self.shards.part_counts[number] for number in order]
        cuts = split_evenly(counts, self.num_ranks)
        return list(order[cuts[self.rank] : cuts[self.rank + 1]])

    def read(self, parts: Sequence[int], *, skip: int = 0, **reader: Any) -> Iterator[flow.Tensor]:
        """Batches of records after the first `skip`, from `parts` in this order, over and over.

        OneFlow gives parts to ranks by their numbers, so links renumber them: this rank gets
        exactly `parts`. The reader opens all of them before the first batch.
        """
        with link_parts(self.shards, parts, self.rank * len(parts)) as links:
            num_parts = len(parts) * self.num_ranks
            read = make_reader(links, num_parts, batch_size=self.batch_size, **reader)
            record = read()
            self.label(record).numpy()  # waits until it was read
        for i in range(skip):
            record = read()
            if i % 64 == 0:
                self.label(record).numpy()  # the host must not ask for all of them at once
        while True:
            yield record
            record = read()

    def forward(self, image: flow.Tensor, label: flow.Tensor) -> tuple[flow.Tensor, flow.Tensor]:
        return image, label


class OFRecordTrainLoader(OFRecordLoader):
    """Shuffled records, random crop, resize, flip, normalise.

    Parts are shuffled and shared out among the processes again in each epoch. OneFlow draws from a
    shuffle buffer that it refills beyond the end of the parts from their beginning: in an epoch,
    about 0.37 times the size of the buffer are missed, and as many records are read twice.
    """

    def __init__(
        self,
        data: Shards,
        *,
        batch_size: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int,
        device: str,
    ):
        super().__init__(data, batch_size=batch_size, device=device)
        self.seed = seed
        self.augmentation = augmentation
        self.shuffle_buffer_size = choose_buffer_size(augmentation, data, self.num_ranks)
        size = preprocessing.image_size
        self.resize = nn.image.Resize(target_size=[size, size])
        self.normalise = make_normalisation(preprocessing)

    def order(self, epoch: int) -> list[int]:
        """The parts of all processes, as they follow one another in an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        return rng.permutation(len(self.shards.part_counts)).tolist()

    def batches(self, epoch: int, iteration: int = 0) -> Iterator[tuple]:
        """Batches of an epoch after the first `iteration` of them, which are read and dropped."""
        records = self.read(
            self.share(self.order(epoch)),
            skip=iteration,
            random_shuffle=True,
            shuffle_buffer_size=self.shuffle_buffer_size,
            random_seed=derive_seeds(1, self.seed, self.rank, epoch)[0],
        )
        for step, record in enumerate(records, iteration):
            crop_seed, flip_seed = derive_seeds(2, self.seed, self.rank, epoch, step)
            label = to_global(self.label(record), self.placement)
            flip = nn.CoinFlip(
                batch_size=self.batch_size,
                random_seed=flip_seed,
                probability=self.augmentation.flip,
            )()
            decode = nn.OFRecordImageDecoderRandomCrop(
                "encoded",
                color_space="RGB",
                random_seed=crop_seed,
                random_area=self.augmentation.area,
                random_aspect_ratio=self.augmentation.aspect_ratio,
            )
            image = self.normalise(self.resize(decode(record))[0], flip)
            yield to_global(image, self.placement), label


class RecordTrainLoader(PictureTrainLoader):
    """Every record once per epoch, in an order over all parts: --data_order=global.

    The first process of each machine makes the indexes of the parts, where there are none.
    """

    def __init__(self, data: Shards, **train_loader: Any):
        first = flow.env.get_local_rank() == 0
        if not first:
            wait_for_all()
        source = RecordSource(data, say=first)
        if first:
            wait_for_all()
        super().__init__(source, **train_loader)


class GPUDecodingTrainLoader(nn.Module):
    """As OFRecordTrainLoader, but nvJPEG decodes and crops, on the device: --gpu_image_decoder.

    That decoder exists in graphs only, and a graph that is handed records has copies of them which
    are no longer valid, so the reader is in the graph as well. There it cannot be positioned: each
    process keeps its parts for the whole run, and a resumed run reads from the beginning of its
    parts, in an order drawn for the step at which it is resumed.
    """

    def __init__(
        self,
        data: Shards,
        *,
        batch_size: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int,
        device: str,
        first_step: int = 0,
    ):
        super().__init__()
        self.device = device
        placement = flow.env.all_device_placement("cpu")
        on_cpu = {"placement": placement, "sbp": [flow.sbp.split(0)]}
        num_ranks, num_parts = flow.env.get_world_size(), len(data.part_counts)
        record_seed, crop_seed, flip_seed = derive_seeds(3, seed, first_step)
        allow_open_files(num_parts)
        order = np.random.default_rng((seed, first_step)).permutation(num_parts)
        self.links = link_parts(data, order.tolist())  # opened when the graph is compiled
        self.read = make_reader(
            self.links.name,
            num_parts,
            batch_size=batch_size,
            random_shuffle=True,
            shuffle_buffer_size=choose_buffer_size(augmentation, data, num_ranks),
            # Several processes would come to disagree about who reads which part.
            shuffle_after_epoch=num_ranks == 1,
            random_seed=record_seed,
            **on_cpu,
        )
        self.label = nn.OFRecordRawDecoder("class/label", shape=(), dtype=flow.int32)
        self.encoded = nn.OFRecordBytesDecoder("encoded")
        self.decode = nn.OFRecordImageGpuDecoderRandomCropResize(
            target_width=preprocessing.image_size,
            target_height=preprocessing.image_size,
            random_area=augmentation.area,
            random_aspect_ratio=augmentation.aspect_ratio,
            seed=crop_seed,
            # As in OneFlow's own ResNet-50.
            num_workers=3,
            warmup_size=2048,
        )
        self.flip = nn.CoinFlip(
            batch_size=batch_size, probability=augmentation.flip, random_seed=flip_seed, **on_cpu
        )
        self.normalise = make_normalisation(preprocessing)

    def batches(self, epoch: int, iteration: int = 0) -> Iterator[tuple]:
        """An empty tuple for each call of the graph, which reads by itself."""
        return itertools.repeat(())

    def forward(self) -> tuple[flow.Tensor, flow.Tensor]:
        record = self.read()
        image = self.decode(self.encoded(record))  # (N, H, W, 3) uint8, on the device
        image = self.normalise(image, self.flip().to(self.device))
        return image, self.label(record).to(self.device)


def make_reader(directory: str, num_parts: int, **settings: Any) -> nn.Module:
    """OneFlow's reader of `link_parts`."""
    return nn.OFRecordReader(
        directory,
        data_part_num=num_parts,
        part_name_prefix=PART_PREFIX,
        part_name_suffix_length=5,
        **settings,
    )


def make_normalisation(preprocessing: Preprocessing, **crop: float) -> nn.Module:
    """(N, H, W, 3) uint8, and (N,) flips if any, to (N, 3, H, W) float32, normalised."""
    return nn.CropMirrorNormalize(
        color_space="RGB",
        output_layout="NCHW",
        mean=preprocessing.rgb_mean,
        std=preprocessing.rgb_std,
        output_dtype=flow.float,
        **crop,
    )


def link_parts(data: Shards, order: Sequence[int], first: int = 0) -> tempfile.TemporaryDirectory:
    """A directory of links to parts, numbered from `first` on in the given order."""
    links = tempfile.TemporaryDirectory(prefix="ofrecord-order-")
    for i, number in enumerate(order, first):
        path = os.path.abspath(data.part_path(number))
        os.symlink(path, os.path.join(links.name, f"{PART_PREFIX}{i:05d}"))
    return links


class OFRecordValLoader(OFRecordLoader):
    """Records in order, shorter side resized, centre crop, normalise.

    Where there are fewer parts than processes, some read a part and count none of it.
    """

    def __init__(self, data: Shards, *, batch_size: int, preprocessing: Preprocessing, device: str):
        super().__init__(data, batch_size=batch_size, device=device)
        self.num_examples = data.num_examples
        cuts = split_evenly(data.part_counts, self.num_ranks)
        ends = [0, *itertools.accumulate(data.part_counts)]
        self.bounds = [ends[cut] for cut in cuts]  # of each process, in records
        largest = max(b - a for a, b in itertools.pairwise(self.bounds))
        self.num_batches = -(-largest // self.batch_size)
        self.decode = nn.OFRecordImageDecoder("encoded", color_space="RGB")
        # Its default, the mean over the area of a pixel, is the nearest to Pillow's bilinear, which
        # smooths as it shrinks; OneFlow's bilinear does not. All are as close to Pillow's bicubic.
        self.resize = nn.image.Resize(
            resize_side="shorter",
            keep_aspect_ratio=True,
            target_size=preprocessing.resize_shorter,
        )
        size = preprocessing.image_size
        self.normalise = make_normalisation(
            preprocessing, crop_h=size, crop_w=size, crop_pos_y=0.5, crop_pos_x=0.5
        )

    def positions(self, iteration: int) -> np.ndarray:
        """Where the rows of a batch that are this process's lie in the data set."""
        first = self.bounds[self.rank] + iteration * self.batch_size
        return np.arange(first, first + self.batch_size)

    def batches(self) -> Iterator[tuple]:
        end = min(self.bounds[self.rank + 1], self.num_examples)
        records = self.read(self.share(range(len(self.shards.part_counts))) or [0])
        for i, record in enumerate(itertools.islice(records, self.num_batches)):
            row_mask = (self.positions(i) < end).astype(np.int32)
            image = self.normalise(self.resize(self.decode(record))[0])
            yield (
                to_global(flow.tensor(row_mask), self.placement),
                to_global(image, self.placement),
                to_global(self.label(record), self.placement),
            )


def choose_buffer_size(augmentation: Augmentation, data: Shards, num_ranks: int) -> int:
    """Records in the shuffle buffer of a process, by default 1024 or a 50th of its share.

    So under 1 % of an epoch's records are repeats.
    """
    share = data.available // num_ranks
    return augmentation.shuffle_buffer_size or max(1, min(SHUFFLE_BUFFER_SIZE, share // 50))


def allow_open_files(num_parts: int) -> None:
    """Let this process open all parts at once, as OneFlow's reader does, and some other files.

    Raises RunError where the system does not allow it: the reader would end the process.
    """
    needed = 2 * num_parts + 256  # the next epoch's reader is opened before the last one's is gone
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise RunError(
                f"OneFlow keeps all {num_parts} parts open and this process may open {hard} files; "
                f"raise the limit (ulimit -n {needed}), or make fewer parts"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


DATA_ORDERS: dict[str, Callable] = {  # loaders of training from parts
    "native": OFRecordTrainLoader,
    "global": RecordTrainLoader,
}
LOADERS: dict[type[Dataset], tuple[Callable, Callable]] = {  # of training and validation
    Shards: (OFRecordTrainLoader, OFRecordValLoader),
    Arrays: (ArrayTrainLoader, ArrayValLoader),
    Synthetic: (SyntheticTrainLoader, SyntheticValLoader),
}


def train_loader(
    data: Dataset,
    *,
    batch_size: int,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    mixing: Mixing | None = None,
    seed: int,
    device: str,
    data_order: str = "native",
    gpu_image_decoder: bool = False,
    first_step: int = 0,
) -> nn.Module:
    """The training loader of a data set. `batch_size` is the global one.

    `data_order`, a key of DATA_ORDERS, is that of OFRecord parts. `first_step` is the step at which
    a run is resumed; only the GPU's decoder needs to know.
    """
    loader, _ = LOADERS[type(data)]
    if isinstance(data, Shards):
        loader = DATA_ORDERS[data_order]
    if gpu_image_decoder:
        loader = partial(GPUDecodingTrainLoader, first_step=first_step)
    made = loader(
        data,
        batch_size=batch_size,
        preprocessing=preprocessing,
        augmentation=augmentation,
        seed=seed,
        device=device,
    )
    if mixing is None or not mixing.is_on:
        return made
    size = preprocessing.image_size
    return MixingLoader(made, mixing, batch_size=batch_size, size=size, device=device)


def val_loader(
    data: Dataset, *, batch_size: int, preprocessing: Preprocessing, device: str
) -> nn.Module:
    """The validation loader of a data set. `batch_size` is the global one."""
    _, loader = LOADERS[type(data)]
    return loader(data, batch_size=batch_size, preprocessing=preprocessing, device=device)
