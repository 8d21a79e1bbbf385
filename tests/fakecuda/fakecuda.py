"""CUDA devices that compute nothing, under an unmodified OneFlow 0.9.0. See README.md.

`install()` has to be called before oneflow is imported; sitecustomize.py does so.
"""

import ctypes
import glob
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import fake

# Functions of the CUDA runtime, as local symbols of liboneflow.
RUNTIME = re.compile(r"([0-9a-f]+) t ((?:cuda[A-Z]|__cudaP(?:ush|op)Call)\w*)$", re.MULTILINE)

library = None  # ctypes.CDLL, once it is installed


def package() -> Path:
    """The directory of the package oneflow, without importing it."""
    spec = importlib.util.find_spec("oneflow")
    if spec is None:
        raise fake.NotHere("oneflow is not installed")
    return Path(spec.origin).parent


def liboneflow() -> Path:
    found = glob.glob(str(package().parent / "oneflow.libs" / "liboneflow-*.so"))
    if len(found) != 1:
        raise fake.NotHere("this OneFlow is not a wheel with one liboneflow in oneflow.libs")
    return Path(found[0])


def symbols(path: Path) -> str:
    done = subprocess.run(["nm", str(path)], capture_output=True, text=True)
    return done.stdout


def runtime_offsets() -> dict[str, int]:
    """Where the functions of the CUDA runtime are in liboneflow; kept, for nm takes a second."""
    path = liboneflow()
    stat = path.stat()
    fake.BUILD.mkdir(exist_ok=True)
    kept = fake.BUILD / f"offsets-{path.stem}-{stat.st_size}-{stat.st_mtime_ns}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    found = {name: int(offset, 16) for offset, name in RUNTIME.findall(symbols(path))}
    with tempfile.NamedTemporaryFile("w", dir=fake.BUILD, delete=False) as file:
        json.dump(found, file)
    os.replace(file.name, kept)
    return found


def check_symbols(path: Path) -> None:
    """Raise unless this OneFlow holds every function that the library at `path` stands in for."""
    loaded = ctypes.CDLL(str(path))
    loaded.fakecuda_names.restype = ctypes.c_char_p
    wanted = set(loaded.fakecuda_names().decode().split())
    missing = sorted(wanted - runtime_offsets().keys())
    if missing:
        raise fake.NotHere(
            f"this OneFlow is not the wheel of 0.9.0 that tests/fakecuda knows: it has no "
            f"{missing[0]} (and {len(missing) - 1} others are missing)"
        )


def base_address(path: Path) -> int:
    """Where a library that is loaded begins in memory."""
    real = os.path.realpath(path)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5] == real and int(fields[2], 16) == 0:
            return int(fields[0].split("-")[0], 16)
    raise RuntimeError(f"{path} is not loaded")


def install() -> None:
    """Build and load the library in front of OneFlow's, and redirect the CUDA runtime to it."""
    global library
    loaded = ctypes.CDLL(str(fake.build()), ctypes.RTLD_GLOBAL)
    # Kernels would be uploaded to every device otherwise.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    (internal,) = glob.glob(str(package() / "_oneflow_internal*.so"))
    ctypes.CDLL(internal)
    offsets = runtime_offsets()
    names = (ctypes.c_char_p * len(offsets))(*(name.encode() for name in offsets))
    places = (ctypes.c_size_t * len(offsets))(*offsets.values())
    base = ctypes.c_void_p(base_address(liboneflow()))
    if loaded.fakecuda_redirect(base, names, places, ctypes.c_size_t(len(offsets))) != 0:
        raise RuntimeError("the CUDA runtime in liboneflow could not be redirected")
    loaded.fakecuda_used.restype = ctypes.c_size_t
    loaded.fakecuda_peak.restype = ctypes.c_size_t
    loaded.fakecuda_launches.restype = ctypes.c_long
    loaded.fakecuda_runtime.restype = ctypes.c_void_p
    library = loaded


def used(device: int = 0) -> int:
    """Bytes that are allocated on a device now."""
    return library.fakecuda_used(device)


def peak(device: int = 0) -> int:
    """The most bytes that were ever allocated on a device at a time."""
    return library.fakecuda_peak(device)


def runtime(name: str):
    """A function of the CUDA runtime, such as cudaMalloc, to be called with ctypes' values."""
    return ctypes.CFUNCTYPE(ctypes.c_int)(library.fakecuda_runtime(name.encode()))


def launches() -> dict[str, int]:
    """How often each kernel was launched, by its demangled name."""
    size = library.fakecuda_launches(None, None, ctypes.c_long(0))
    if size == 0:
        return {}
    functions, counts = (ctypes.c_void_p * size)(), (ctypes.c_long * size)()
    library.fakecuda_launches(functions, counts, ctypes.c_long(size))
    path = liboneflow()
    base = base_address(path)
    counted = {function - base: count for function, count in zip(functions, counts, strict=True)}
    names = {}
    for line in symbols(path).splitlines():
        offset, _, name = line.partition(" ")
        if offset and int(offset, 16) in counted:
            names[int(offset, 16)] = name[2:]
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(names.values()), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {name: counted[o] for o, name in zip(names, demangled, strict=True)}
