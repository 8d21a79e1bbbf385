"""Import OneFlow without what its native library prints where there is no GPU.

Each script imports this first. On a machine without CUDA or InfiniBand, `import oneflow` and the
first graph write up to three lines on file descriptor 2 that look like faults and are none. They
are held back here, and only they: whatever else is written during the import is passed on, and
where an NVIDIA driver is present its warnings stay, for there they mean something.
"""

import os
import sys
import tempfile

NVIDIA_DRIVER = "/dev/nvidiactl"
HARMLESS = ("libibverbs not available",)


def import_oneflow() -> None:
    if not os.path.exists(NVIDIA_DRIVER):
        os.environ.setdefault("GLOG_minloglevel", "3")  # fatal only
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            import oneflow  # noqa: F401
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held_back.seek(0)
            lines = held_back.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.write("".join(line for line in lines if not line.startswith(HARMLESS)))


import_oneflow()
