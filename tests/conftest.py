import cnns.startup  # noqa: F401  (before any test imports oneflow)

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz import Fuzzing

# A shell starts what is behind `&` with SIGINT ignored, and nohup ignores SIGHUP; what the tests
# start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

HERE = Path(__file__).resolve().parent
# Whole runs, and processes with a fake CUDA device.
LONG_FOLDERS = ("end_to_end", "fakecuda")
# A process that has compiled many graphs takes up to this much.
GIB_PER_PROCESS = 6
# OneFlow computes with several threads in each.
MAX_PROCESSES = 4


@pytest.fixture(autouse=True)
def _plans_do_not_depend_on_the_tests_before() -> Iterator[None]:
    """OneFlow 0.9.0 sets this for good where gradients are accumulated; other graphs, and processes
    that are started later, would compile to other plans."""
    yield
    os.environ.pop("ENABLE_LOGICAL_CHAIN", None)


def pytest_addoption(parser):
    parser.addoption(
        "--fast",
        action="store_true",
        help="leave out whole runs, the fake CUDA device and tests marked long",
    )
    parser.addoption(
        "--fuzz",
        type=float,
        metavar="MINUTES",
        help="run the fuzzers only, each for so long (of the processor), with other examples",
    )


def pytest_configure(config):
    minutes = config.getoption("--fuzz")
    if minutes is not None:
        config.pluginmanager.register(Fuzzing(minutes, config.pluginmanager))


def pytest_xdist_auto_num_workers(config):
    """Test processes of `-n auto`: what cores and memory allow."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / GIB_PER_PROCESS), MAX_PROCESSES))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fuzz") is not None:
        items[:] = [item for item in items if item.get_closest_marker("fuzz")]
        return
    if not config.getoption("--fast"):
        return
    long = [item for item in items if is_long(item)]
    items[:] = [item for item in items if not is_long(item)]
    config.hook.pytest_deselected(items=long)


def is_long(item: pytest.Item) -> bool:
    folder = item.path.relative_to(HERE).parts[0]
    return folder in LONG_FOLDERS or item.get_closest_marker("long") is not None
