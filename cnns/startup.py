"""What has to happen before OneFlow's native library is loaded. Each script imports this first.

- On a machine without CUDA or InfiniBand, `import oneflow` and the first graph write up to three
  lines on file descriptor 2 that look like faults but are not. They are held back, and only they:
  whatever else is written during the import is passed on, and where an NVIDIA driver is present its
  warnings stay, for there they mean something.
- The OpenBLAS in OneFlow's wheel does not know AMD's processors since Zen 3 nor Intel's newer ones,
  and takes kernels from 2004 to 2007 for them. The best that it has, those for Zen and Haswell (it
  has none for AVX-512), are asked for instead: products of matrices are up to 5 times as fast.
- It gives up when what it waits for takes 2 hours, by the wall clock: one that is set forward, or a
  machine that wakes up, would end a run. It is told to wait for a century.
- Under a low limit of open files it aborts, and under one of memory its libraries cannot be mapped;
  both are seen first.
- A worker of a job of several processes prepares itself, see cnns.launch.worker; what another
  launcher says of its processes is noted and hidden, see cnns.launch.external.
- OneFlow installs a handler for SIGINT that ends the process in the middle of native code. Python's
  own is put back, so that Ctrl-C is an exception that clean-up can follow.
"""

import cnns.environment  # noqa: F401  (before all else, see there)

import os
import resource
import signal
import sys
import threading

from cnns.errors import UsageError, report
from cnns.interrupts import SIGNALS
from cnns.launch.external import take_place
from cnns.launch.worker import is_worker, prepare_worker

NVIDIA_DRIVER = "/dev/nvidiactl"
# With fewer open files than 15, or less address space than some 5.2 GB, a run of a tiny network on
# a CPU with 2 cores aborts.
MIN_OPEN_FILES = 64
MIN_ADDRESS_SPACE = 6 << 30  # bytes
WAIT_SECONDS = 100 * 365 * 24 * 60 * 60
HARMLESS = ("libibverbs not available",)


def openblas_core(cpuinfo: str) -> str | None:
    """The OpenBLAS core to ask for on a machine with this /proc/cpuinfo; None: its own choice."""
    words = set(cpuinfo.split())
    if not {"avx2", "fma"} <= words:
        return None
    return "Zen" if words & {"AuthenticAMD", "HygonGenuine"} else "Haswell"


def choose_blas_kernels() -> None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            core = openblas_core(file.read())
    except OSError:  # not Linux
        return
    if core is not None:
        os.environ.setdefault("OPENBLAS_CORETYPE", core)


def outwait_clocks() -> None:
    os.environ.setdefault("ONEFLOW_TIMEOUT_SECONDS", str(WAIT_SECONDS))


def import_quietly() -> None:
    if not os.path.exists(NVIDIA_DRIVER):
        os.environ.setdefault("GLOG_minloglevel", "3")  # fatal only
    sys.stderr.flush()
    stderr = os.dup(2)
    # A signal in the middle of this import would leave half a module, or a native stack.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sigint = signal.getsignal(signal.SIGINT)
    with open(os.memfd_create("stderr"), "w+b") as held_back:  # needs no disk
        os.dup2(held_back.fileno(), 2)
        failure = None
        try:
            import oneflow  # noqa: F401
        except (ImportError, MemoryError, OSError) as error:
            failure = error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held_back.seek(0)
            lines = held_back.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.write("".join(line for line in lines if not line.startswith(HARMLESS)))
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, sigint)
    if failure is not None:
        report(
            f"OneFlow cannot be loaded ({type(failure).__name__}: {failure}); requirements.txt "
            "names what has to be installed, and the .sh scripts install it"
        )
        sys.exit(1)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    except KeyboardInterrupt:  # it came while it was blocked, before any script could catch it
        sys.exit(130)


def heed_other_launchers() -> None:
    """Note which rank another launcher has started; OneFlow would wait for the others here."""
    try:
        if not is_worker():
            take_place()
    except UsageError as error:
        report(error)
        sys.exit(2)


def check_limits() -> None:
    """End where a limit of the system would make OneFlow abort; raise it where that is allowed."""
    for limit, needed, text in (
        (resource.RLIMIT_NOFILE, MIN_OPEN_FILES, f"{MIN_OPEN_FILES} open files (ulimit -n)"),
        (
            resource.RLIMIT_AS,
            MIN_ADDRESS_SPACE,
            f"{MIN_ADDRESS_SPACE >> 10} kB of address space (ulimit -v)",
        ),
    ):
        soft, hard = resource.getrlimit(limit)
        if soft == resource.RLIM_INFINITY or soft >= needed:
            continue
        if hard == resource.RLIM_INFINITY or hard >= needed:
            resource.setrlimit(limit, (needed, hard))
            continue
        found = hard if limit == resource.RLIMIT_NOFILE else f"{hard >> 10} kB"
        report(f"OneFlow needs {text}, and the limit is {found}; raise it")
        sys.exit(1)


heed_other_launchers()
check_limits()
prepare_worker()
choose_blas_kernels()
outwait_clocks()
import_quietly()
