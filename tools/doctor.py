"""Tell what this machine has for training, what may go wrong on it, and how fast a small step is.

python3 tools/doctor.py           # a page
python3 tools/doctor.py --json    # the same for a program, or for a report of a problem

Works where OneFlow cannot be loaded, too: that is one of its findings.
"""

import fcntl
import json
import os
import platform
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cnns.errors import run_main, say
from cnns.flags.parser import Parser, add_switch

ROOT = Path(__file__).resolve().parent.parent
CTRL_PORT = 50051
SIOCGIFADDR = 0x8915  # the IPv4 address of a network interface, from Linux's sockios.h
GIB = 1 << 30
MIN_SHM_BYTES = 1 * GIB
MIN_DISK_BYTES = 10 * GIB
MIN_FILES = 4096  # ImageNet in 1024 parts needs some 2,300
PROBE_SECONDS, STEP_SECONDS = 120, 300  # a busy machine takes long
PACKAGES = ("oneflow", "numpy", "pillow", "onnx", "onnxruntime", "oneflow-onnx", "safetensors")
# What has to be asked with OneFlow loaded, in a process of its own.
PROBE = """
import cnns.startup, json, os
import oneflow as flow
from cnns.distributed import cuda_devices, unusable_device
devices = [vars(device) for device in cuda_devices()]
for number, device in enumerate(devices):
    device["usable"] = unusable_device(number + 1) is None
print(json.dumps({
    "cuda": flow.cuda.is_available(),
    "devices": devices,
    "blas": os.environ.get("OPENBLAS_CORETYPE", "OpenBLAS's own choice"),
}))
"""


@dataclass(frozen=True)
class Finding:
    """One thing about the machine, and what to do about it where something should be done."""

    subject: str
    value: str
    advice: str | None = None


def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    findings = []
    for finding in look(args):
        findings.append(finding)
        if not args.json:
            say(f"{finding.subject:<18} {finding.value}", sys.stdout)
            if finding.advice:
                say(f"{'':<18} -> {finding.advice}", sys.stdout)
    advice = sum(finding.advice is not None for finding in findings)
    if args.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        say(f"{advice} of {len(findings)} findings come with advice.", sys.stdout)
    return None


def parse_args(argv: list[str] | None) -> Namespace:
    parser = Parser("Tell what this machine has for training, and what may go wrong on it.")
    add_switch(parser, "--json", "print JSON")
    add_switch(parser, "--step", "train a small network for some seconds", default=True)
    return parser.parse_args(argv)


def look(args: Namespace) -> Iterator[Finding]:
    yield from software()
    probed = probe()
    yield from devices(probed)
    yield from processor(probed)
    yield memory()
    yield shared_memory()
    yield from limits()
    yield from disks()
    yield from network()
    if args.step and "error" not in probed:
        yield training_step()


def software() -> Iterator[Finding]:
    found = platform.python_version()
    advice: str | None = None
    if sys.version_info[:2] != (3, 10):
        advice = "OneFlow 0.9.0 needs Python 3.10: run `. .venv/bin/activate`, or sh train.sh first"
    yield Finding("Python", f"{found} ({sys.executable})", advice)
    versions, missing = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    advice = None
    if missing:
        advice = f"{', '.join(missing)} missing: run `. .venv/bin/activate`, or sh train.sh first"
    yield Finding("packages", ", ".join(versions) or "none", advice)


def probe() -> dict:
    """What OneFlow and the driver say; `error`: why OneFlow cannot be loaded."""
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"it ended with status {done.returncode}"}
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"error": str(error)}


def devices(probed: dict) -> Iterator[Finding]:
    if "error" in probed:
        text = f"cannot be loaded: {probed['error']}"
        yield Finding("OneFlow", text, "set up the environment: sh train.sh does it")
        return
    if not probed["devices"]:
        there = os.path.exists("/dev/nvidiactl")
        advice = "there is an NVIDIA device, but no driver library libcuda.so.1" if there else None
        yield Finding("CUDA devices", "none; everything runs on the CPU", advice)
    for number, device in enumerate(probed["devices"]):
        advice = None
        if not device["usable"]:
            advice = "OneFlow 0.9.0 has no code for it: see docs/cuda.md; --device=cpu works"
        elif not probed["cuda"]:
            advice = "OneFlow cannot use it: is the driver 450.80.02 or newer?"
        text = (
            f"{device['name']}, capability {device['major']}.{device['minor']}, "
            f"{device['memory_bytes'] / GIB:.1f} GiB"
        )
        yield Finding(f"CUDA device {number}", text, advice)
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text)
        yield Finding("NVIDIA driver", found[1] if found else text.splitlines()[0])


def processor(probed: dict) -> Iterator[Finding]:
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    name = re.search(r"model name\s*: (.*)", text)
    features = set(text.split())
    advice: str | None = None
    known = [feature for feature in ("avx2", "fma", "avx512f") if feature in features]
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    shown = f"{name[1] if name else platform.machine()}, {cores} cores"
    if quota is not None and quota < cores:
        shown += f", of which a limit leaves {quota:g}"
        advice = f"set OMP_NUM_THREADS={max(1, int(quota))}, or raise the container's limit"
    yield Finding("CPU", shown, advice)
    advice = None if "avx2" in features else "without AVX2 a CPU trains several times slower"
    yield Finding("CPU features", ", ".join(known) or "neither AVX2 nor FMA", advice)
    if "blas" in probed:
        yield Finding("BLAS kernels", probed["blas"])


def cpu_quota() -> float | None:
    """The cores that a container's limit leaves; None: no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no limit is the word `max`
        return None


def memory() -> Finding:
    text = Path("/proc/meminfo").read_text()
    total, free = (
        int(re.search(rf"{name}:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]
        for name in ("MemTotal", "MemAvailable")
    )
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    advice = "ResNet-50 on a CPU takes 2 to 8 GiB" if min(free, total) < 4 * GIB else None
    return Finding("memory", f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free", advice)


def shared_memory() -> Finding:
    try:
        status = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding(
            "/dev/shm", str(error.strerror), "NCCL needs it between the GPUs of a machine"
        )
    size = status.f_blocks * status.f_frsize
    advice = None
    if size < MIN_SHM_BYTES:
        advice = "small for several GPUs: give a container --shm-size=8g (docs/containers.md)"
    return Finding("/dev/shm", f"{size / GIB:.1f} GiB", advice)


def limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    largest = float("inf") if hard == resource.RLIM_INFINITY else hard
    advice: str | None = None
    if largest < MIN_FILES:
        advice = f"many parts need more: ulimit -n {MIN_FILES}, or limits.conf"
    yield Finding("open files", f"{soft}, can be raised to {largest:g}", advice)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        text = "OneFlow maps much more than it uses: ulimit -v unlimited"
        yield Finding("address space", f"{soft / GIB:.1f} GiB", text)


def disks() -> Iterator[Finding]:
    for subject, path in (("disk, here", os.getcwd()), ("disk, temporary", tempfile.gettempdir())):
        free = shutil.disk_usage(path).free
        writable = os.access(path, os.W_OK)
        advice = None if free >= MIN_DISK_BYTES else "a set-up takes 7 GB, a run of ResNet-50 1 GB"
        if not writable:
            advice = "it cannot be written: give --model_save_dir, or set TMPDIR"
        yield Finding(subject, f"{free / GIB:.0f} GiB free in {path}", advice)


def network() -> Iterator[Finding]:
    for port in (CTRL_PORT, CTRL_PORT + 1):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("", port))
            except OSError:
                text = "another program uses it: with several machines give another --ctrl_port"
                yield Finding(f"port {port}", "in use", text)
            else:
                yield Finding(f"port {port}", "free")
    addresses = list(ipv4_addresses())
    shown = ", ".join(f"{address} ({name})" for name, address in addresses) or "none"
    several = len([name for name, _ in addresses if name != "lo"]) > 1
    advice = "several: NCCL_SOCKET_IFNAME names the one to use" if several else None
    yield Finding("addresses", shown, advice)


def ipv4_addresses() -> Iterator[tuple[str, str]]:
    """(interface, address) of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(sock.fileno(), SIOCGIFADDR, request)
                yield name, socket.inet_ntoa(answer[20:24])


def training_step() -> Finding:
    """Train ResNet-18 at 64 pixels for 20 iterations with the training script."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        command = [
            *(sys.executable, str(ROOT / "of_cnn_train_val.py")),
            *("--model=resnet18", "--image_size=64", "--batch_size_per_device=16"),
            *("--num_epochs=1", "--num_examples=320", "--num_val_examples=16"),
            f"--model_save_dir={folder}/run",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_SECONDS)
        except subprocess.TimeoutExpired:
            text = f"not done within {STEP_SECONDS} s"
            return Finding("training", text, "is the machine busy? see top, and nvidia-smi")
    rates = [
        float(rate) for rate in re.findall(r"^train: .*samples/s: ([\d.]+)", done.stdout, re.M)
    ]
    if done.returncode != 0 or not rates:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return Finding("training", f"failed: {lines[-1]}", "docs/errors.md explains the messages")
    rate = sorted(rates)[len(rates) // 2]
    return Finding("training", f"ResNet-18, 64 px, batch 16: {rate:.1f} samples/s")


if __name__ == "__main__":
    sys.exit(run_main(main))
