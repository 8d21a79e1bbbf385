"""What cnns.startup does before OneFlow is loaded."""

import cnns.startup

import os
import subprocess
import sys

import pytest

from small import ROOT

AMD = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu sse2 avx avx2 fma\n"


def test_blas_kernels_are_chosen_for_processors_with_avx2():
    assert cnns.startup.openblas_core(AMD) == "Zen"
    assert cnns.startup.openblas_core(AMD.replace("AuthenticAMD", "GenuineIntel")) == "Haswell"
    assert cnns.startup.openblas_core(AMD.replace("avx2 ", "")) is None
    assert cnns.startup.openblas_core("processor : 0\nFeatures : asimd") is None


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )


def test_a_choice_of_the_user_stands():
    code = "import os, cnns.startup; print(os.environ['OPENBLAS_CORETYPE'])"
    assert run(code, OPENBLAS_CORETYPE="Haswell").stdout == "Haswell\n"


def test_ctrl_c_is_an_exception_again():
    code = """
import cnns.startup, oneflow, os, signal, sys
from cnns.errors import run_main
def main():
    oneflow.zeros(1)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        print("cleaned up")
sys.exit(run_main(main))
"""
    done = run(code)
    assert (done.returncode, done.stdout) == (130, "cleaned up\n")
    assert done.stderr.endswith("interrupted\n")


def test_ctrl_c_during_the_import_ends_quietly():
    code = """
import os, signal, sys

class PressCtrlC:
    \"\"\"In the middle of the import of OneFlow, where it starts to load its library.\"\"\"

    def find_spec(name, path=None, target=None):
        if name == "oneflow._oneflow_internal":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, PressCtrlC)
import cnns.startup
print("not reached")
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is an NVIDIA driver here")
def test_only_the_harmless_lines_are_held_back():
    code = "import cnns.startup, oneflow; oneflow.zeros(1)"
    assert run(code).stderr == ""
    broken = "import sys; sys.modules['oneflow._oneflow_internal'] = None; import cnns.startup"
    failed = run(broken)
    assert failed.returncode == 1
    assert "ModuleNotFoundError" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "limit, words",
    [
        ("-n 8", "needs 64 open files (ulimit -n), and the limit is 8"),
        ("-n 12", "needs 64 open files (ulimit -n), and the limit is 12"),
        ("-v 1000000", "kB of address space (ulimit -v), and the limit is 1000000 kB"),
    ],
)
def test_a_limit_that_is_too_low_is_one_line(limit, words):
    done = subprocess.run(
        ["sh", "-c", f"ulimit {limit}; exec {sys.executable} of_cnn_train_val.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_limit_that_may_be_raised_is_raised():
    code = "import cnns.startup, resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    done = subprocess.run(
        ["bash", "-c", f'ulimit -S -n 12; exec {sys.executable} -c "$0"', code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("64\n", "")
