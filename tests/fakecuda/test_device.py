"""The device that computes nothing does what README.md says, and catches what it claims to."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fake
import fakecuda

FOLDER = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def built():
    fake.require()


def run(code: str, tmp_path: Path, *, fill: int = 0, **settings):
    """Run a program on fake devices. Returns the finished process and the lines of its log."""
    log = tmp_path / "device.log"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=fake.environment(log=log, **settings) | {"FAKECUDA_FILL": str(fill)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, log.read_text().splitlines()


def starting(lines: list[str], word: str) -> list[str]:
    return [line for line in lines if line.split()[0] == word]


# Shorthands for the programs below, which call the CUDA libraries themselves.
CALLS = """
import ctypes
import oneflow as flow
import fakecuda
from ctypes import byref, c_size_t, c_void_p

def call(name, *arguments):
    return fakecuda.runtime(name)(*arguments)

def allocate(device, size=1024):
    pointer = c_void_p()
    assert call("cudaSetDevice", device) == 0
    assert call("cudaMalloc", byref(pointer), c_size_t(size)) == 0
    return pointer

def make(name, *arguments):
    made = c_void_p()
    assert getattr(fakecuda.library, name)(byref(made), *arguments) == 0, name
    return made
"""


# ---- what it promises


def test_what_the_host_wrote_reads_back_and_all_else_as_zeros(tmp_path):
    done, log = run(
        """
import numpy as np, oneflow as flow
x = flow.tensor(np.arange(6, dtype=np.float32), device="cuda")
print(x.numpy().tolist(), (x + 1).numpy().tolist(), flow.empty(3, device="cuda").numpy().tolist())
print(flow.ones(2, dtype=flow.int64, device="cuda").numpy().tolist())
""",
        tmp_path,
    )
    assert done.stdout == "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0] [0.0, 0.0, 0.0, 0.0, 0.0, 0.0] " + (
        "[0.0, 0.0, 0.0]\n[0, 0]\n"
    )
    assert starting(log, "COPY").count("COPY HD 24 device 0") == 1
    assert not starting(log, "ERROR") and not starting(log, "MISSING")


def test_what_is_computed_reads_as_the_byte_asked_for(tmp_path):
    done, _ = run(
        """
import numpy as np, oneflow as flow
x = flow.tensor(np.ones(1, np.float32), device="cuda")
print(x.item(), (x + 1).item(), flow.ones(1, dtype=flow.int32, device="cuda").item())
""",
        tmp_path,
        fill=0xFF,
    )
    assert done.stdout == "1.0 nan -1\n"


def test_released_memory_does_not_keep_what_was_in_it(tmp_path):
    code = """
first = allocate(0)
data = ctypes.create_string_buffer(b"\\xff" * 1024, 1024)
read = lambda p: call("cudaMemcpy", data, p, c_size_t(1024), 2) or data.raw[:2]
assert call("cudaMemcpy", first, data, c_size_t(1024), 1) == 0
print(read(first))
assert call("cudaFree", first) == 0
again = allocate(0)
print(again.value == first.value, read(again))
"""
    done, _ = run(CALLS + code, tmp_path)
    assert done.stdout.splitlines() == [r"b'\xff\xff'", r"True b'\x00\x00'"]


def test_memory_and_kernels_are_counted(tmp_path):
    done, log = run(
        """
import numpy as np, oneflow as flow, fakecuda
x = flow.tensor(np.ones(1, np.float32), device="cuda")
assert fakecuda.launches() == {}
(x + 1).numpy()
(x + 2).numpy()
((name, count),) = fakecuda.launches().items()
print(count, name)
print(fakecuda.used(), fakecuda.peak(), fakecuda.used(1))
""",
        tmp_path,
        devices=2,
    )
    launched, memory = done.stdout.splitlines()
    assert re.match(r"2 .*oneflow.*float", launched)
    used, peak, other = map(int, memory.split())
    assert 0 < used <= peak and other == 0
    allocations = starting(log, "MALLOC")
    assert all(line.startswith("MALLOC device 0 ") for line in allocations)
    assert max(int(line.split()[-1]) for line in allocations) == peak


def test_devices_are_as_the_environment_says(tmp_path):
    done, log = run(
        """
import oneflow as flow
print(flow.cuda.is_available(), flow.cuda.device_count())
print(flow.cuda.get_device_capability(2), flow.cuda.get_device_properties(2).total_memory >> 20)
""",
        tmp_path,
        devices=3,
        capability=75,
        memory_mb=2048,
    )
    assert done.stdout.splitlines() == ["True 3", "(7, 5) 2048"]
    assert not starting(log, "MALLOC")


def test_without_the_variable_nothing_is_loaded():
    settings = {k: v for k, v in os.environ.items() if not k.startswith("FAKECUDA_")}
    code = "import sys, oneflow; print('fakecuda' in sys.modules, open('/proc/self/maps').read())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=settings | {"PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("False ") and "liboneflow" in done.stdout
    assert "libfakecuda" not in done.stdout


# ---- faults that it has to catch


@pytest.mark.parametrize("access", ["ctypes.string_at(p, 4)", "ctypes.memset(p, 0, 4)"])
def test_a_host_that_touches_device_memory_dies(access, tmp_path):
    code = f"p = allocate(0).value\nprint('before', flush=True)\n{access}\nprint('after')"
    done, _ = run(CALLS + code, tmp_path)
    assert done.stdout == "before\n" and done.returncode == -signal.SIGSEGV


def test_an_operator_without_a_kernel_is_reported(tmp_path):
    """Eagerly, and when a graph compiles: there is no product of integers on CUDA."""
    done, _ = run(
        """
import oneflow as flow
class Product(flow.nn.Graph):
    def build(self, x):
        return flow.matmul(x, x)
x = flow.ones(4, 4, dtype=flow.int32, device="cuda")
for multiply in (lambda: flow.matmul(x, x), lambda: Product()(x)):
    try:
        multiply()
    except RuntimeError as error:
        text = str(error)
        print("matmul" in text, "kCUDA" in text, text.count("Cannot find the kernel"))
""",
        tmp_path,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("True")]
    assert told == ["True True 1"] * 2


def test_two_devices_mixed_by_oneflow(tmp_path):
    """Allowed on some machines, but no process of this project has two devices."""
    done, log = run(
        """
import oneflow as flow
print(flow.ones(4, device="cuda:0").to("cuda:1").numpy())
""",
        tmp_path,
        devices=2,
    )
    assert done.returncode != 0
    assert all("two devices mixed" in line for line in starting(log, "ERROR"))
    assert starting(log, "ERROR") and "two devices mixed" in done.stderr


def test_two_devices_mixed_in_calls_of_the_libraries(tmp_path):
    code = """
n = c_size_t(1024)
there, here = allocate(1), allocate(0)
cublas, cudnn = make("cublasCreate_v2"), make("cudnnCreate")
random = make("curandCreateGenerator", 100)
class Id(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char * 128)]
comm = make("ncclCommInitRank", 1, Id(b"a"), 0)
stream = c_void_p()
call("cudaStreamCreate", byref(stream))
library = fakecuda.library

def gemm(a, b, c):
    none = c_void_p()
    return library.cublasGemmEx(
        cublas, 0, 0, 4, 4, 4, none, a, 0, 4, b, 0, 4, none, c, 0, 4, 0, 0)

for a, b in ((here, here), (here, there)):
    print(call("cudaMemcpy", a, b, n, 3), call("cudaMemset", b, 0, n), gemm(a, a, b),
          library.ncclAllReduce(a, b, c_size_t(4), 7, 0, comm, c_void_p()),
          library.curandGenerateUniform(random, b, c_size_t(4)))
call("cudaSetDevice", 1)
print(call("cudaMemcpyAsync", there, there, n, 3, stream), gemm(there, there, there),
      library.ncclAllReduce(there, there, c_size_t(4), 7, 0, comm, c_void_p()))
"""
    done, log = run(CALLS + code, tmp_path, devices=2)
    good, mixed, foreign_handles = ([int(n) for n in s.split()] for s in done.stdout.splitlines())
    assert not any(good) and all(mixed) and all(foreign_handles)
    errors = starting(log, "ERROR")
    assert len(errors) == len(mixed) + len(foreign_handles)
    assert all("two devices mixed" in line for line in errors)


def test_copies_and_launches_that_a_device_refuses(tmp_path):
    code = """
device, n = allocate(0), c_size_t(1024)
host = ctypes.create_string_buffer(2048)
class Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]

def launch(grid, block):
    none = c_void_p()
    return call("cudaLaunchKernel", none, Dim3(*grid), Dim3(*block), none, c_size_t(0), none)

assert call("cudaMemcpy", device, host, n, 1) == launch((1, 1, 1), (1024, 1, 1)) == 0
freed = allocate(0)
assert call("cudaFree", freed) == 0
print(
    call("cudaMemcpy", device, host, n, 2),  # the other way
    call("cudaMemcpy", host, host, n, 1),
    call("cudaMemcpy", device, host, n, 3),
    call("cudaMemcpy", device, host, c_size_t(1025), 1),  # beyond the end
    call("cudaMemcpy", freed, host, n, 1),
    call("cudaMemset", host, 0, n),
    call("cudaFree", freed),
    launch((0, 1, 1), (1, 1, 1)),
    launch((1, 65536, 1), (1, 1, 1)),
    launch((1, 1, 1), (1025, 1, 1)),
    launch((1, 1, 1), (32, 32, 2)),
)
"""
    done, log = run(CALLS + code, tmp_path)
    statuses = [int(n) for n in done.stdout.split()]
    assert len(statuses) == 11 and all(statuses), done.stderr
    assert len(starting(log, "ERROR")) == len(statuses)


def test_a_function_of_the_runtime_that_is_not_here_is_reported(tmp_path):
    code = """
offset = fakecuda.runtime_offsets()["cudaDeviceGetLimit"]
function = fakecuda.base_address(fakecuda.liboneflow()) + offset
print(ctypes.CFUNCTYPE(ctypes.c_int)(function)())
"""
    done, log = run(CALLS + code, tmp_path)
    assert done.stdout == "801\n" and "cudaDeviceGetLimit is missing" in done.stderr
    assert starting(log, "MISSING") == ["MISSING cudaDeviceGetLimit"]


def test_shapes_that_disagree_and_operands_of_the_host(tmp_path):
    code = """
ops = ctypes.CDLL("libcudnn_ops_infer.so.8")
convolutions = ctypes.CDLL("libcudnn_cnn_infer.so.8")
handle = make("cudnnCreate")

def describe(of, kind, set_, *values):
    made = c_void_p()
    assert getattr(of, f"cudnnCreate{kind}Descriptor")(byref(made)) == 0
    assert getattr(of, set_)(made, *values) == 0
    return made

x = describe(ops, "Tensor", "cudnnSetTensor4dDescriptor", 0, 0, 2, 3, 8, 8)
w = describe(ops, "Filter", "cudnnSetFilter4dDescriptor", 0, 0, 4, 3, 3, 3)
same = describe(convolutions, "Convolution", "cudnnSetConvolution2dDescriptor",
                1, 1, 1, 1, 1, 1, 1, 0)
data, none = allocate(0, 4096), c_void_p()
host = ctypes.create_string_buffer(4096)
for height, x_data in ((8, data), (7, data), (8, host)):
    y = describe(ops, "Tensor", "cudnnSetTensor4dDescriptor", 0, 0, 2, 4, height, 8)
    print(fakecuda.library.cudnnConvolutionForward(
        handle, none, x, x_data, w, data, same, 1, none, c_size_t(0), none, y, data))
"""
    done, log = run(CALLS + code, tmp_path)
    assert done.stdout.split() == ["0", "3", "3"], done.stderr
    shapes, host = starting(log, "ERROR")
    assert "output would be 2,4,8,8" in shapes and "y f32[2,4,7,8]" in shapes
    assert re.fullmatch(r"ERROR cudnnConvolutionForward: x is 0x[0-9a-f]+, not device memory", host)
    assert starting(log, "CONV")[0] == "CONV fwd x f32[2,3,8,8]nchw y f32[2,4,8,8]nchw"


def test_out_of_memory_in_a_graph_is_an_exception(tmp_path):
    done, log = run(
        """
import oneflow as flow
class Large(flow.nn.Graph):
    def build(self, x):
        return (x.reshape(1, 1024, 1024).expand(90, 1024, 1024) + 1).sum()
try:
    Large()(flow.ones(1024, 1024, device="cuda"))
except RuntimeError as error:
    print("caught", "out of memory" in str(error))
""",
        tmp_path,
        memory_mb=256,
    )
    assert "caught True" in done.stdout.splitlines() and done.returncode == 0
    assert starting(log, "OOM")[0].startswith("OOM device 0 wanted ")


def test_out_of_memory_outside_of_a_graph_ends_the_process(tmp_path):
    code = (
        "import oneflow as flow; flow.ones(90, 1024, 1024, device='cuda').numpy(); print('after')"
    )
    done, log = run(code, tmp_path, memory_mb=256)
    assert done.returncode == -signal.SIGABRT and "out of memory" in done.stderr
    assert "after" not in done.stdout and len(starting(log, "OOM")) == 1


@pytest.mark.parametrize("capability", [50, 89, 90])
def test_the_wheel_has_code_for_some_devices_only(capability, tmp_path):
    code = "import oneflow as flow; print(flow.ones(2, device='cuda').numpy())"
    done, log = run(code, tmp_path, capability=capability)
    if capability == 89:
        assert done.returncode == 0 and starting(log, "LAUNCH")
    else:
        assert done.returncode == -signal.SIGABRT and not starting(log, "LAUNCH")
        assert "no kernel image is available for execution on the device" in done.stderr


# ---- the build


def test_two_builds_at_once(tmp_path):
    """One source of them all, for it is the same race in less time."""
    for name in ("fake.py", "settings.h", "settings.cpp"):
        shutil.copy(FOLDER / name, tmp_path)
    command = [sys.executable, str(tmp_path / "fake.py")]
    builds = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [build.wait(timeout=120) for build in builds] == [0, 0, 0]
    (made,) = (tmp_path / "build").iterdir()
    assert re.fullmatch(r"libfakecuda-[0-9a-f]{16}\.so", made.name)
    ctypes.CDLL(str(made))


def test_a_build_that_fails_leaves_nothing_and_says_what_the_compiler_said(tmp_path):
    shutil.copy(FOLDER / "fake.py", tmp_path)
    (tmp_path / "wrong.cpp").write_text("int main( {")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "fake.py")], capture_output=True, text=True
    )
    assert done.returncode != 0 and "wrong.cpp:1:" in done.stderr
    assert not list((tmp_path / "build").iterdir())


def test_other_wheels_and_machines_are_skipped_with_a_reason(monkeypatch, tmp_path):
    offsets = fakecuda.runtime_offsets()
    monkeypatch.setattr(fakecuda, "runtime_offsets", lambda: {"cudaMalloc": offsets["cudaMalloc"]})
    with pytest.raises(pytest.skip.Exception, match="is not the wheel of 0.9.0"):
        fake.require()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="no g\\+\\+ here"):
        fake.require()
