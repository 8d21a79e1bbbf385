"""Builds the device of fakecuda.py, and gives tests what they need to run scripts on it.

python3 tests/fakecuda/fake.py    # build it, and print the variables to set
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
COMPILE = ["g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall"]
# Whoever loads the CUDA driver gets this library, see driver.cpp.
LINK = ["-shared", "-Wl,-soname,libcuda.so.1", "-ldl", "-lpthread"]


class NotHere(Exception):
    """The device cannot be built or used on this machine; the message says why."""


def library() -> Path:
    """Where the library built from these sources is, or will be."""
    digest = hashlib.sha256(repr(COMPILE + LINK).encode())
    for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return BUILD / f"libfakecuda-{digest.hexdigest()[:16]}.so"


def compile_sources(target: Path) -> None:
    """Compile all sources at a time, each on its own, and link them to `target`."""
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        objects = {path: Path(scratch, path.stem + ".o") for path in HERE.glob("*.cpp")}
        commands = [[*COMPILE, "-c", str(path), "-o", str(o)] for path, o in objects.items()]
        compilers = [
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands
        ]
        errors = [compiler.communicate()[1] for compiler in compilers]
        if any(compiler.returncode for compiler in compilers):
            raise NotHere("g++ does not compile tests/fakecuda:\n" + "".join(errors))
        made = Path(scratch, target.name)
        link = ["g++", *map(str, objects.values()), *LINK, "-o", str(made)]
        done = subprocess.run(link, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise NotHere("g++ does not link tests/fakecuda:\n" + done.stderr)
        # Whoever builds at the same time gets the old file or the new one, never a part.
        os.replace(made, target)


def build() -> Path:
    """The library, built unless these sources were built before."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NotHere("the fake CUDA device needs Linux on x86-64")
    for program in ("g++", "nm"):
        if shutil.which(program) is None:
            raise NotHere(f"the fake CUDA device is built with g++ and binutils; no {program} here")
    target = library()
    if not target.exists():
        BUILD.mkdir(exist_ok=True)
        compile_sources(target)
    return target


def require() -> Path:
    """The library; skips the test, or the module, where there cannot be one."""
    import pytest

    import fakecuda

    try:
        path = build()
        fakecuda.check_symbols(path)
    except NotHere as reason:
        pytest.skip(str(reason), allow_module_level=True)
    return path


def environment(
    *,
    devices: int = 1,
    memory_mb: int = 16384,
    capability: int = 80,
    log: Path | str | None = None,
    conv_workspace_mb: int = 0,
) -> dict[str, str]:
    """This process's environment, with `devices` fake devices for a process started with it."""
    found = {k: v for k, v in os.environ.items() if not k.startswith("FAKECUDA_")}
    above = found.get("PYTHONPATH")
    found |= {
        "FAKECUDA_DEVICES": str(devices),
        "FAKECUDA_MEMORY_MB": str(memory_mb),
        "FAKECUDA_CAPABILITY": str(capability),
        "FAKECUDA_CONV_WORKSPACE_MB": str(conv_workspace_mb),
        "PYTHONPATH": f"{HERE}{os.pathsep}{above}" if above else str(HERE),
    }
    if log is not None:
        found["FAKECUDA_LOG"] = str(log)
    return found


if __name__ == "__main__":
    build()
    print(f"FAKECUDA_DEVICES=1 PYTHONPATH={HERE}")
