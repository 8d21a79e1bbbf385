"""Runs while the wall clock is set forward and back by years, each second."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_several import (
    PROMISE,
    SYNTHETIC,
    both,
    finish,
    needs_namespaces,
    start,
    wait_for_training,
    workers,
)

import netns
from small import LINE, losses

# The offset follows from the monotonic clock, so all processes see the same. A wait that ends at a
# time of the wall clock ends when that jumps past it, as the kernel ends it.
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const long DAY = 86400, OFFSETS[] = {0, 400, -4000, 1, 3650, -1};  /* days */

static long offset(void) {
  struct timespec now;
  syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
  return DAY * OFFSETS[now.tv_sec % 6];
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int failed = syscall(SYS_clock_gettime, clock, now);
  if (!failed && clock == CLOCK_REALTIME) now->tv_sec += offset();
  return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *copy) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (copy) *copy = now.tv_sec;
  return now.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex,
                           const struct timespec *end) {
  static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
  if (!wait) wait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  if (end->tv_sec < 1000000000) return wait(cond, mutex, end);  /* of the monotonic clock */
  for (;;) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (now.tv_sec >= end->tv_sec) return ETIMEDOUT;
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &now);
    now.tv_nsec += 100000000;
    if (now.tv_nsec >= 1000000000) now.tv_sec++, now.tv_nsec -= 1000000000;
    int result = wait(cond, mutex, &now);
    if (result != ETIMEDOUT) return result;
  }
}
"""

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    """For processes whose wall clock jumps each second. Monotonic clocks go on, as they do."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(SOURCE)
    library = folder / "clock.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", folder / "clock.c", "-o", library, "-ldl"]
    subprocess.run(command, check=True)
    environ = {**os.environ, "LD_PRELOAD": str(library)}
    code = "import time\nfor _ in range(4): print(time.time()); time.sleep(1)"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    times = [float(line) for line in done.stdout.split()]
    assert max(times) - min(times) > 300 * 24 * 60 * 60
    return environ


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_and_is_resumed(environ, tmp_path, processes):
    flags = ("--model=toy", "--device=cpu", "--num_examples=40", "--batch_size_per_device=4")
    flags += ("--num_val_examples=8", "--loss_print_every_n_iter=1", "--warmup_epochs=0")
    flags += (f"--gpu_num_per_node={processes}", "--num_classes=4")
    first = start(*flags, "--num_epochs=3", "--model_save_dir=run", cwd=tmp_path, env=environ)
    out, _ = finish(first)
    again = start(*flags, "--num_epochs=4", "--resume=run", cwd=tmp_path, env=environ)
    more, _ = finish(again)
    lines = [line for line in (out + more).splitlines() if LINE.fullmatch(line)]
    assert len(losses(out)) == 30 // processes and len(losses(more)) == 10 // processes
    rates = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert all(0.1 < rate < 100_000 for rate in rates), rates


@pytest.mark.slow
@needs_namespaces
def test_nodes_hear_one_another_and_notice_a_killed_process(environ, tmp_path):
    """For longer than the silence after which a node is taken for lost."""
    with netns.two_nodes() as nodes:
        runs = both(nodes, tmp_path, SYNTHETIC, env=environ)
        wait_for_training(runs[0])
        time.sleep(1.5 * PROMISE)
        assert [run.poll() for run in runs] == [None, None]
        os.kill(workers(runs[1].pid)[1], signal.SIGKILL)
        begin = time.monotonic()
        errors = [finish(run, 1, timeout=30)[1] for run in runs]
        assert time.monotonic() - begin < PROMISE
    assert all("was killed by SIGKILL" in text for text in errors)
