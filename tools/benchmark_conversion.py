"""What tools/benchmark.py --conversion measures: an archive of photographs to OFRecord parts."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnns.convert.writer import BLOCK_BYTES
from cnns.data.images import CLASSES_FILE, read_classes
from cnns.errors import RunError
from tools.photographs import draw_photographs
from tools.timing import by_turns

# Crops of the demo photographs at this size and quality are 110 kB on average, as ImageNet's are.
PHOTOGRAPH_SIZE = (580, 435)
PHOTOGRAPH_QUALITY = 98
CONVERSION_PARTS = 4  # of 130 MB; ImageNet's have 560


def add_member(archive: tarfile.TarFile, name: str, file: io.BytesIO) -> int:
    """Add what was written to a file in memory; returns the number of its bytes."""
    member = tarfile.TarInfo(name)
    member.size = file.tell()
    file.seek(0)
    archive.addfile(member, file)
    return member.size


def make_archive(path: Path, num_images: int) -> int:
    """An archive of the official shape, a tar of 1000 tars; returns the bytes of its images."""
    _, wordnet_ids = read_classes(CLASSES_FILE)
    photographs = draw_photographs(PHOTOGRAPH_SIZE, quality=PHOTOGRAPH_QUALITY)
    num_bytes, done = 0, 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as outer:
        for label, wordnet_id in enumerate(wordnet_ids):
            members = io.BytesIO()
            with tarfile.open(fileobj=members, mode="w", format=tarfile.USTAR_FORMAT) as inner:
                while done * len(wordnet_ids) < (label + 1) * num_images:
                    encoded = io.BytesIO()
                    encoded.write(next(photographs))
                    num_bytes += add_member(inner, f"{wordnet_id}_{done}.JPEG", encoded)
                    done += 1
            add_member(outer, f"{wordnet_id}.tar", members)
    return num_bytes


def copy_plainly(source: Path, target: Path) -> None:
    """Copy a file and flush it to the disk, as a part is."""
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        while block := reader.read(BLOCK_BYTES):
            writer.write(block)
        os.fsync(writer.fileno())


def resident_megabytes(pid: int) -> float:
    """Resident memory of a process and those that it started."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0.0
    own = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return own + sum(resident_megabytes(int(child)) for child in children)


@contextmanager
def process(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the block: what remains of it is asked to end."""
    with subprocess.Popen(command, **options) as run:
        try:
            yield run
        finally:
            run.terminate()


def convert(archive: Path, output: Path, num_workers: int) -> float:
    """Run the conversion; return the peak memory of all its processes together, in MB."""
    tool, most = str(Path(__file__).with_name("make_ofrecord.py")), 0.0
    command = [sys.executable, tool, "imagenet", f"--train={archive}", f"--output={output}"]
    command += [f"--num_parts={CONVERSION_PARTS}", f"--num_workers={num_workers}"]
    with tempfile.TemporaryFile("w+") as messages:
        with process(command, stdout=messages, stderr=messages) as run:
            while run.poll() is None:
                most = max(most, resident_megabytes(run.pid))
                time.sleep(0.02)
        messages.seek(0)
        if run.returncode:
            raise RunError(f"the conversion failed: {messages.read().strip()}")
    return most


def benchmark_conversion(args: Namespace) -> dict:
    """images/s of the whole command, from its start to its end, and of a copy of the archive.

    Both read from the page cache, where the archive has just been written, and both wait for the
    disk.
    """
    megabytes = []
    with tempfile.TemporaryDirectory(prefix="ofrecord-benchmark-") as folder:
        archive, copied, output = (Path(folder, name) for name in ("a.tar", "copy", "out"))
        num_bytes = make_archive(archive, args.num_images)

        def clear():
            copied.unlink(missing_ok=True)
            shutil.rmtree(output, ignore_errors=True)
            os.sync()

        (copy, conversion), ratio = by_turns(
            args.rounds,
            lambda: copy_plainly(archive, copied),
            lambda: megabytes.append(convert(archive, output, args.num_workers)),
            before=clear,
        )
    return {
        "num_images": args.num_images,
        "bytes_per_image": num_bytes // args.num_images,
        "num_workers": args.num_workers,
        "num_parts": CONVERSION_PARTS,
        "rounds": args.rounds,
        "images_per_second": round(args.num_images / conversion, 1),
        "megabytes_per_second": round(num_bytes / conversion / 1e6, 1),
        "plain_copy_megabytes_per_second": round(num_bytes / copy / 1e6, 1),
        "to_plain_copy": round(ratio, 3),
        "memory_of_all_processes_megabytes": round(max(megabytes), 1),
    }
