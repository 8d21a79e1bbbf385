"""The progress bar of a run: on a terminal only, and in no line's way."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

from small import ROOT

DRAW = """
import sys
from cnns import errors
from cnns.log import Bar
bar = Bar(num_epochs=2, steps_per_epoch=6)
for epoch in range(2):
    with bar.epoch(epoch, 0):
        for step in range(1, 7):
            bar.step()
            if step % 3 == 0:
                errors.say(f"train: epoch {epoch}, iter {step}", sys.stdout)
                bar.show(step=6 * epoch + step, loss=1.5, rate=8.0)
assert errors.aside == []
"""
LINES = [f"train: epoch {epoch}, iter {step}" for epoch in (0, 1) for step in (3, 6)]


def test_a_terminal_gets_a_bar_and_whole_lines():
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", DRAW])
    drawn = b""
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # its end, on Linux
            break
        drawn += data
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    pieces = drawn.decode().replace("\n", "\r").split("\r")
    assert [piece for piece in pieces if piece.startswith("train:")] == LINES
    bars = [piece for piece in pieces if piece.startswith("epoch ")]
    assert bars[0].startswith("epoch 1/2:") and any("epoch 2/2:" in bar for bar in bars)
    assert any("loss 1.5000, 8.0 samples/s, run 0:00:0" in bar for bar in bars)
    assert all(len(piece) <= 100 for piece in pieces)


def test_a_pipe_gets_lines_only():
    done = subprocess.run([sys.executable, "-c", DRAW], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == LINES and done.stderr == ""
