"""What cnns.startup does before OneFlow is loaded."""

import cnns.startup

import os
import subprocess
import sys

import pytest

from small import ROOT

AMD = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu sse2 avx avx2 fma\n"


def test_blas_kernels_are_chosen_for_amd_with_avx2_only():
    assert cnns.startup.openblas_core(AMD) == "Zen"
    assert cnns.startup.openblas_core(AMD.replace("AuthenticAMD", "GenuineIntel")) is None
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
import subprocess
subprocess.Popen(["sh", "-c", "sleep 0.2; kill -INT $PPID"])
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
