"""The progress bar of a run: on a terminal only, and in no line's way."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

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


def on_a_terminal(*argv) -> tuple[int, str]:
    """The exit status of a command, and what it writes to a terminal of 100 columns."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        os.execv(sys.executable, [sys.executable, *argv])
    drawn = b""
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # its end, on Linux
            break
        drawn += data
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), drawn.decode()


def test_a_terminal_gets_a_bar_and_whole_lines(monkeypatch):
    monkeypatch.chdir(ROOT)
    status, drawn = on_a_terminal("-c", DRAW)
    assert status == 0
    pieces = drawn.replace("\n", "\r").split("\r")
    assert [piece for piece in pieces if piece.startswith("train:")] == LINES
    bars = [piece for piece in pieces if piece.startswith("epoch ")]
    assert bars[0].startswith("epoch 1/2:") and any("epoch 2/2:" in bar for bar in bars)
    assert any("loss 1.5000, 8.0 samples/s, run 0:00:0" in bar for bar in bars)
    assert all(len(piece) <= 100 for piece in pieces)


def test_a_pipe_gets_lines_only():
    done = subprocess.run([sys.executable, "-c", DRAW], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == LINES and done.stderr == ""


def shown(drawn: str) -> list[str]:
    """The lines of a terminal after all that was written to it, as far as this needs it."""
    lines, column = [""], 0
    for piece in re.findall(r"\r|\n|\x1b\[K|[^\r\n\x1b]+", drawn):
        if piece == "\n":
            lines.append("")
        elif piece == "\r":
            column = 0
        elif piece == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column] + piece + lines[-1][column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in lines]


@pytest.mark.long
@pytest.mark.parametrize("rate, status", [("0.01", 0), ("1e30", 1)])
def test_a_parent_prints_above_the_bar_of_its_first_worker(tmp_path, monkeypatch, rate, status):
    """Notices, which it passes on, and the error that ends the job."""
    monkeypatch.chdir(tmp_path)
    found, drawn = on_a_terminal(
        *(str(ROOT / "tests" / "train_small.py"), "--model=plain", "--device=cpu"),
        *("--gpu_num_per_node=2", "--batch_size_per_device=4", "--num_examples=160"),
        *("--num_epochs=2", "--loss_print_every_n_iter=5", f"--learning_rate={rate}"),
    )
    assert found == status, drawn
    assert "epoch 1/2:" in drawn and "%|" in drawn
    lines = shown(drawn)
    assert not [line for line in lines if "%|" in line]  # it is gone
    beginnings = (
        r"(train|validation): epoch \d|Saving model to \S+$|Loading |Init |Device: |"
        r"Synthetic data |Learning rate: |Snapshots: |2 epochs of |Compiling |Time left: |$|"
        r"train_small.py: error: rank .* the loss is |"
        r".*UserWarning: Zeros|  warnings.warn"  # of the tests' networks
    )
    assert [line for line in lines if not re.match(beginnings, line)] == []
    assert any("train_small.py: error" in line for line in lines) == (status == 1)
