"""tools/doctor.py: what it says of this machine, and of machines that lack something."""

import json
import os
import re
import socket

import pytest

import tools.doctor as doctor
from small import call


def findings(result) -> dict[str, dict]:
    assert result.status == 0, result.stderr
    return {each["subject"]: each for each in json.loads(result.stdout)}


def test_this_machine():
    found = findings(call(doctor.main, "--json", "--step=False"))
    assert found["Python"]["advice"] is None and "3.10" in found["Python"]["value"]
    assert "oneflow 0.9.0" in found["packages"]["value"] and found["packages"]["advice"] is None
    assert "OneFlow" not in found  # it could be loaded
    assert str(len(os.sched_getaffinity(0))) in found["CPU"]["value"]
    assert "127.0.0.1 (lo)" in found["addresses"]["value"]
    page = call(doctor.main, "--step=False").stdout.splitlines()
    assert [line.split("  ")[0] for line in page if not line.startswith((" ", "->"))][:-1] == list(
        found
    )
    assert re.fullmatch(r"\d+ of \d+ findings come with advice\.", page[-1])


def test_a_port_in_use():
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        port = sock.getsockname()[1]
        doctor_port, doctor.CTRL_PORT = doctor.CTRL_PORT, port
        try:
            first = next(doctor.network())
        finally:
            doctor.CTRL_PORT = doctor_port
    assert (
        first.subject == f"port {port}"
        and first.value == "in use"
        and "--ctrl_port" in first.advice
    )


DEVICE = {"name": "H100", "major": 9, "minor": 0, "memory_bytes": 80 << 30, "usable": False}


@pytest.mark.parametrize(
    "probed, value, advice",
    [
        ({"error": "No module named 'oneflow'"}, "cannot be loaded: No module", "sh train.sh"),
        ({"cuda": True, "devices": [DEVICE]}, "H100, capability 9.0, 80.0 GiB", "docs/cuda.md"),
        ({"cuda": False, "devices": [DEVICE | {"usable": True}]}, "H100", "450.80.02"),
        ({"cuda": False, "devices": []}, "none; everything runs on the CPU", None),
    ],
)
def test_devices(probed, value, advice):
    first = next(doctor.devices(probed))
    assert value in first.value
    assert advice is None or advice in first.advice


def test_without_oneflow(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE", "import no_such_module")
    assert "no_such_module" in doctor.probe()["error"]
    monkeypatch.setattr(doctor, "PROBE", "import os; os.abort()")
    assert doctor.probe()["error"]


@pytest.mark.slow
def test_the_step_is_that_of_the_training_script():
    found = doctor.training_step()
    rate = re.fullmatch(r"ResNet-18, 64 px, batch 16: ([\d.]+) samples/s", found.value)
    assert rate and float(rate[1]) > 0 and found.advice is None
