"""Several processes, and two nodes on one machine: the same results, and an end in any case."""

import csv
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import netns
from cnns.checkpoint.find import find_resume
from cnns.checkpoint.snapshot import read_arrays, read_description, read_weights
from cnns.data.kinds import split_evenly
from cnns.report.folder import FILES
from small import (
    RECORD,
    ROOT,
    jpeg,
    losses,
    record,
    tree,
    validation_figures,
    write_manifest,
    write_sets,
)

NUM_CLASSES = 4
TRAIN_SMALL = str(ROOT / "tests" / "train_small.py")
PROMISE = 15.0  # seconds until all has ended when something dies


def start(*argv, cwd, prefix=(), **more):
    return subprocess.Popen(
        [*prefix, sys.executable, TRAIN_SMALL, *argv],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finish(process, status=0, timeout=120):
    out, errors = process.communicate(timeout=timeout)
    assert process.returncode == status, f"{out}\n{errors}"
    return out, errors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Parts of unequal size, and the same number of arrays."""
    parts = {"train": (13, 9, 11, 7), "validation": (5, 1, 9, 6)}
    return write_sets(tmp_path_factory.mktemp("data"), parts, num_classes=NUM_CLASSES)


def recipe(data, model, *, processes, suffix=".npz", epochs=2):
    """A global batch of 8, whatever the number of processes."""
    return (
        "--device=cpu",
        f"--model={model}",
        f"--train_data_dir={data / 'train'}{suffix}",
        f"--val_data_dir={data / 'validation'}{suffix}",
        "--val_batch_size_per_device=2",
        f"--batch_size_per_device={8 // processes}",
        f"--gpu_num_per_node={processes}",
        f"--num_epochs={epochs}",
        "--learning_rate=0.1",
        "--warmup_epochs=1",
        "--loss_print_every_n_iter=1",
    )


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8))
def test_parts_are_shared_out_without_a_gap(counts, num_shares):
    cuts = split_evenly(counts, num_shares)
    assert len(cuts) == num_shares + 1 and (cuts[0], cuts[-1]) == (0, len(counts))
    assert cuts == sorted(cuts)
    shares = [sum(counts[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    if len(counts) >= num_shares:
        assert min(np.diff(cuts)) >= 1
        assert max(shares) <= sum(counts) / num_shares + max(counts) * 2


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """stdout of runs by (network, number of processes)."""
    root = tmp_path_factory.mktemp("runs")
    done = {}
    for model, processes in (
        ("plain", 1), ("plain", 2), ("plain", 4), ("dropping", 1), ("dropping", 2), ("ghost", 1),
        ("toy", 2),
    ):  # fmt: skip
        flags = recipe(data, model, processes=processes)
        run = start(*flags, f"--model_save_dir={model}-{processes}", cwd=root)
        done[model, processes], _ = finish(run)
    return root, done


def test_losses_do_not_depend_on_the_number_of_processes(runs):
    """The same batches, and sums in another order.

    A loss is a mean over 8 samples of float32, and so are the gradients: rounding is 2**-24 of each
    term, and 10 updates with a rate of 0.1 let it grow by a small factor. 1e-5 leaves room for 100
    roundings.
    """
    _, done = runs
    for model, counts in (("plain", (2, 4)), ("dropping", (2,))):
        alone = done[model, 1]
        assert len(losses(alone)) == 10 and len(set(losses(alone))) == 10
        for processes in counts:
            several = done[model, processes]
            np.testing.assert_allclose(losses(several), losses(alone), rtol=1e-5, atol=2e-6)
            assert validation_figures(several) == validation_figures(alone)


MIXED = ("--mixup_alpha=0.2", "--cutmix_alpha=1")
AUGMENTED = {
    "mixed": (".npz", MIXED),
    "augmented": (
        "",
        (
            "--auto_augment=trivialaugment_wide",
            "--color_jitter=0.4,0.4,0.4,0.1",
            "--random_erasing=0.5",
            "--repeated_augmentation=3",
            "--interpolation=bicubic",
            "--class_weights=auto",
            "--train_image_size=24",
            *MIXED,
        ),
    ),
    "balanced": (
        "",
        (
            "--balanced_sampler",
            "--loss=bce",
            "--auto_augment=rand-m7-mstd0.5-inc1",
            "--train_interpolation=random",
            *MIXED,
        ),
    ),
}


@pytest.mark.parametrize("kind", AUGMENTED)
def test_nor_do_those_of_augmented_images(data, tmp_path, runs, kind):
    """As above."""
    found = []
    suffix, more = AUGMENTED[kind]
    for processes in (1, 2):
        flags = recipe(data, "plain", processes=processes, suffix=suffix) + more
        run = start(*flags, f"--model_save_dir={kind}-{processes}", cwd=tmp_path)
        found.append(losses(finish(run)[0]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=2e-6)
    if kind == "mixed":  # pairs are in one part of a batch, too
        flags = recipe(data, "plain", processes=2, suffix=suffix) + more
        run = start(*flags, "--gpu_num_per_node=1", "--accumulate_steps=2", cwd=tmp_path)
        np.testing.assert_allclose(losses(finish(run)[0]), found[0], rtol=1e-5, atol=2e-6)
    _, plain = runs
    assert len(found[0]) == 10 and found[0] != losses(plain["plain", 1])


def test_each_process_normalises_by_its_own_share(runs):
    """Two processes are one whose batch norms look at each half of a batch by itself."""
    root, done = runs
    np.testing.assert_allclose(
        losses(done["toy", 2]), losses(done["ghost", 1]), rtol=1e-4, atol=2e-6
    )
    two = read_weights(str(root / "toy-2" / "snapshot_epoch_1"))
    one = read_weights(str(root / "ghost-1" / "snapshot_epoch_1"))
    for name, array in two.items():
        if "running" not in name:
            np.testing.assert_allclose(array, one[name], rtol=1e-3, atol=1e-5)


def compare_reports(folders: list[Path], *, top_1: str) -> None:
    """The same for any number of processes, but for the rounding of probabilities."""
    assert len(folders) >= 2
    tables = []
    for folder in folders:
        assert sorted(os.listdir(folder)) == sorted(FILES)
        with open(folder / "predictions.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        summary = json.loads((folder / "report.json").read_text())
        assert summary["images"] == len(rows) == 21 and f"{summary['top_1']:.6f}" == top_1
        right = sum(row["label"] == row["label_1"] for row in rows)
        assert right == round(21 * summary["top_1"])
        probability = np.array([float(row.pop("probability_1")) for row in rows])
        where = [[row.get(name) for name in ("index", "part", "record")] for row in rows]
        tables.append((where, [row["label"] for row in rows], summary["classes"], probability))
    *first, probability = tables[0]
    for *other, other_probability in tables[1:]:
        assert other == first
        np.testing.assert_allclose(other_probability, probability, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_evaluation_is_exact_for_any_number_of_processes(runs, data, suffix):
    root, done = runs
    found = set()
    for processes, batch_size, first in ((1, 50, 21), (2, 3, 21), (3, 2, 21), (5, 1, 21)):
        if suffix and processes == 5:
            continue
        flags = ("--device=cpu", f"--val_data_dir={data / 'validation'}{suffix}", "--num_epochs=2")
        flags += (f"--num_val_examples={first}", f"--val_batch_size_per_device={batch_size}")
        run = start(
            "evaluate",
            *flags,
            "--model_load_dir=toy-2/snapshot_epoch_1",
            f"--gpu_num_per_node={processes}",
            *[f"--report={root / f'report{suffix}-{processes}'}"] * (processes != 3),
            cwd=root,
        )
        out, errors = finish(run)
        assert errors.count("Report: ") == (processes != 3)
        figures = validation_figures(out)
        assert len(figures) == 2
        found |= set(figures)
    assert len(found) == 1
    compare_reports(sorted(root.glob(f"report{suffix}-?")), top_1=found.pop()[0])
    if suffix:  # what training said with two processes of unequal statistics
        assert figures[-1] == validation_figures(done["toy", 2])[-1]


def test_no_image_goes_to_two_processes(tmp_path):
    encoded, number = jpeg(np.full((8, 8, 3), 99, np.uint8)), 0
    (tmp_path / "data").mkdir()
    for i, count in enumerate((20, 3, 14, 9, 30, 8, 11)):
        records = [record(encoded, number + k) for k in range(count)]
        (tmp_path / "data" / f"part-{i:05d}").write_bytes(b"".join(records))
        number += count
    code = """
import sys
sys.path[:0] = sys.argv[1:3]
import cnns.startup, json, os, test_ofrecord
loader = test_ofrecord.numbered_loader("data", shuffle_buffer_size=1, batch_size=3)
epochs = []
for epoch in range(3):
    share = loader.share(loader.order(epoch))
    count = sum(loader.shards.part_counts[part] for part in share)
    records = loader.read(share)
    epochs.append([int(loader.label(next(records)).numpy()[0]) for _ in range(count)])
open(f"rank-{os.environ['RANK']}", "w").write(json.dumps(epochs))
"""
    driver = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from cnns.launch.job import make_job
from cnns.launch.parent import launch
job = make_job(num_nodes=1, node_ips=None, processes_per_node=3, ctrl_port=50051)
command = [sys.executable, "-c", {code!r}, {str(ROOT)!r}, {str(ROOT / "tests")!r}]
sys.exit(launch(command, job=job, facts=dict))
"""
    done = subprocess.run([sys.executable, "-c", driver], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(3)]
    for epoch in range(3):
        shares = [set(rank[epoch]) for rank in ranks]
        assert sum(map(len, shares)) == len(set.union(*shares)) == number
        assert max(map(len, shares)) < 60
    assert len({tuple(sorted(epoch)) for epoch in ranks[0]}) == 3  # another share each epoch


def test_stopped_and_resumed_with_two_processes(data, tmp_path):
    """After an epoch to the last bit; inside one but for running statistics."""
    flags = recipe(data, "toy", processes=2, suffix="", epochs=3)
    finish(start(*flags, "--model_save_dir=whole", cwd=tmp_path))
    run = start(*flags, "--model_save_dir=run", "--resume=auto", cwd=tmp_path)
    while not run.stdout.readline().startswith("train: epoch 1, iter 2,"):
        pass
    run.send_signal(signal.SIGTERM)
    rest, errors = run.stdout.read(), run.stderr.read()
    assert run.wait(60) == 143, errors
    assert "Saving model to run/snapshot_last.\n" in rest
    stopped = read_description(str(tmp_path / "run" / "snapshot_last"))
    # The line of iteration 2 was there; by 4 both processes know.
    assert stopped.epoch == 0 and stopped.iteration in (2, 3, 4, 5)
    finish(start(*flags, "--model_save_dir=run", "--resume=auto", cwd=tmp_path))
    for state in ("model", "training"):
        one, other = (
            read_arrays(str(tmp_path / run / "snapshot_epoch_2"), f"{state}.safetensors")
            for run in ("whole", "run")
        )
        for name, array in one.items():
            if "running" not in name:
                np.testing.assert_array_equal(array, other[name])
    again = "--resume=whole/snapshot_epoch_0", "--model_save_dir=again"
    finish(start("--device=cpu", "--gpu_num_per_node=2", *again, cwd=tmp_path))
    names = ("model.safetensors", "training.safetensors")
    for name in names:
        path = f"snapshot_epoch_2/{name}"
        assert tree(tmp_path / "again")[path] == tree(tmp_path / "whole")[path]


RECORDING = """
import os, sys
sys.path[:0] = {paths}
import cnns.startup
from cnns.data.pictures import PictureTrainLoader
original = PictureTrainLoader.batches

def batches(self, epoch, iteration=0):
    for step, (image, label) in enumerate(original(self, epoch, iteration), iteration):
        rows = label.to_local().numpy().tolist()
        with open(f"read-{os.getpid()}", "a") as file:
            print(epoch, step, max(0, int(os.environ.get("RANK", "0"))), *rows, file=file)
        yield image, label

PictureTrainLoader.batches = batches
import train_small
"""


def records_read(directory):
    """The numbers of the records of each global batch, by epoch and iteration."""
    read = {}
    for path in directory.glob("read-*"):
        rows = {}
        for line in path.read_text().splitlines():
            epoch, iteration, rank, *numbers = map(int, line.split())
            rows[epoch, iteration] = rank, numbers
        for batch, (rank, numbers) in rows.items():
            read.setdefault((batch, len(numbers)), {})[rank] = numbers
    whole = {}
    for (batch, _), ranks in sorted(read.items()):
        numbers = sum((ranks[rank] for rank in sorted(ranks)), [])
        if len(numbers) == 8:  # else a process was killed before it read its share
            assert whole.setdefault(batch, numbers) == numbers
    return whole


def test_killed_and_resumed_on_other_numbers_of_processes(tmp_path):
    """1, 2 and 1 processes read what one process reads that is never stopped."""
    counts, numbers = (13, 9, 11, 7), itertools.count()
    (tmp_path / "data").mkdir()
    levels = np.random.default_rng(0).integers(0, 255, (40, 24, 24, 3), np.uint8)
    for i, count in enumerate(counts):
        data = [record(jpeg(levels[n]), n) for n in itertools.islice(numbers, count)]
        (tmp_path / "data" / f"part-{i:05d}").write_bytes(b"".join(data))
    code = RECORDING.replace("{paths}", repr([str(ROOT), str(ROOT / "tests")]))
    (tmp_path / "recording.py").write_text(code)
    flags = ("--device=cpu", "--model=plain", f"--train_data_dir={tmp_path / 'data'}")
    flags += ("--num_classes=40", "--data_order=global", "--global_batch_size=8")
    flags += ("--num_epochs=3", "--learning_rate=0.1", "--loss_print_every_n_iter=1")

    def run(directory, *argv):
        (tmp_path / directory).mkdir(exist_ok=True)
        command, pipe = [sys.executable, "../recording.py", *argv], subprocess.PIPE
        return subprocess.Popen(
            command, cwd=tmp_path / directory, stdout=pipe, stderr=pipe, text=True
        )

    def until(process, start):
        lines = []
        while not (lines and lines[-1].startswith(start)):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()

    out, _ = finish(run("whole", *flags, "--model_save_dir=run"))
    first = run("run", *flags, "--model_save_dir=run", "--save_every_n_iter=1")
    until(first, "train: epoch 0, iter 4,")
    first.kill()
    first.communicate()
    second = run("run", "--device=cpu", "--resume=run", "--gpu_num_per_node=2")
    until(second, "train: epoch 1, iter 3,")
    second.send_signal(signal.SIGTERM)
    _, errors = finish(second, 143)
    assert "The run had 1 processes; the rest of it takes its data in the same batch" in errors
    again = run("run", "--device=cpu", "--resume=run", "--gpu_num_per_node=3")
    assert "--global_batch_size=8 cannot be divided among 3" in finish(again, 2)[1]
    third, _ = finish(run("run", "--device=cpu", "--resume=run"))
    np.testing.assert_allclose(losses(third), losses(out)[-len(losses(third)) :], rtol=1e-5)

    read = records_read(tmp_path / "run")
    assert read == records_read(tmp_path / "whole") and len(read) == 15
    digest = ""
    for (epoch, iteration), batch in sorted(read.items()):
        text = bytes.fromhex(digest) + np.array([epoch, iteration, *batch], "<i8").tobytes()
        digest = hashlib.sha256(text).hexdigest()
    for epoch in range(3):
        once = sum((batch for (e, _), batch in read.items() if e == epoch), [])
        assert sorted(once) == list(range(40))
    for directory in ("whole", "run"):
        last = read_description(str(tmp_path / directory / "run" / "snapshot_last"))
        assert last.records_digest == digest

    path = tmp_path / "run" / "run" / "snapshot_epoch_1" / "snapshot.json"
    said = read_description(str(path.parent)).records_digest
    path.write_text(path.read_text().replace(said, digest))
    wrong = run("run", "--device=cpu", "--resume=run/snapshot_epoch_1", "--model_save_dir=other")
    assert "has used its records in another order than is made here" in finish(wrong, 1)[1]


def wait_for_training(run):
    line = run.stdout.readline()
    while line and not line.startswith("train:"):
        line = run.stdout.readline()
    assert line, run.stderr.read()


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(pid):
    """Worker processes of a parent, by rank."""
    found = {}
    for child in children(pid):
        environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(entry[5:]) for entry in environ if entry.startswith(b"RANK=")]
        if ranks and b"CNNS_WORKER=1" in environ:
            found[ranks[0]] = child
    return found


LONG = ("--num_examples=4000", "--num_epochs=50", "--loss_print_every_n_iter=1")
SYNTHETIC = ("--device=cpu", "--model=toy", "--image_size=32", "--num_classes=10")
SYNTHETIC += ("--batch_size_per_device=4", *LONG)


def test_a_killed_process_ends_all(tmp_path):
    run = start(*SYNTHETIC, "--gpu_num_per_node=2", cwd=tmp_path)
    wait_for_training(run)
    found = workers(run.pid)
    os.kill(found[1], signal.SIGKILL)
    begin = time.monotonic()
    _, errors = finish(run, 1, timeout=PROMISE)
    assert time.monotonic() - begin < PROMISE
    line = next(line for line in errors.splitlines() if "error:" in line)
    assert "rank 1 on node 0 was killed by SIGKILL" in line
    assert not any(Path(f"/proc/{pid}").exists() for pid in found.values())


def test_an_error_of_one_process_ends_all(data, tmp_path):
    """A disk that is full on the first node: the others would wait for ever."""
    (tmp_path / "run").mkdir()
    flags = recipe(data, "tiny", processes=2)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))"
    (tmp_path / "sitecustomize.py").write_text(limit)
    run = start(
        *flags,
        "--model_save_dir=run",
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    _, errors = finish(run, 1)
    first = next(line for line in errors.splitlines() if "error:" in line)
    assert "rank 0 on node 0" in first and "cannot save the model to run/snapshot_epoch_0" in first
    assert sorted(os.listdir(tmp_path / "run")) == RECORD


needs_namespaces = pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not() or "-")


@pytest.fixture
def project(tmp_path):
    """The wrappers and scripts as in a clone whose .venv is the Python of this test."""
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".sh") or path.name == "data":
            os.symlink(path, tmp_path / path.name)
    (tmp_path / "env.sh").unlink()
    (tmp_path / "env.sh").write_text(f"python={sys.executable}\n")
    (tmp_path / "train.sh").unlink()
    shutil.copy(ROOT / "train.sh", tmp_path)
    shutil.copy(ROOT / "evaluate.sh", tmp_path / "evaluate-here.sh")
    return tmp_path


@needs_namespaces
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_train_sh_on_two_machines(project, data, processes):
    environ = os.environ | {
        "NUM_NODES": "2",
        "NODE_IPS": "10.77.0.1, 10.77.0.2",
        "GPU_NUM_PER_NODE": str(processes),
        "DATA_ROOT": str(data),
        "NUM_EPOCH": "1",
    }
    flags = ("--model=resnet18", "--image_size=32", "--batch_size_per_device=2", "--device=cpu")
    with netns.two_nodes() as nodes:

        def on_both(*argv):
            runs = [
                subprocess.Popen(
                    node.command("sh", *argv),
                    cwd=project,
                    env=environ,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for node in nodes
            ]
            return [finish(run) for run in runs]

        (out, _), (silent, errors) = on_both("train.sh", *flags, "--model_save_dir=run")
        assert silent == errors == ""
        lines = out.splitlines()
        assert sum(line.startswith("validation: epoch 0, ") for line in lines) == 1
        assert sum("snapshot_epoch_0" in line for line in lines) == 1
        assert len(losses(out)) >= 1
        names = ("best", "epoch_0", "initial_model", "last")
        assert sorted(os.listdir(project / "run")) == [
            *RECORD,
            *(f"snapshot_{name}" for name in names),
        ]
        load = "--model_load_dir=run/snapshot_epoch_0"
        (out2, _), (silent, errors) = on_both("evaluate-here.sh", "--device=cpu", load)
        assert silent == errors == ""
    assert set(validation_figures(out2)) == set(validation_figures(out))


def both(nodes, tmp_path, flags, second=None, **options):
    """The same command on both nodes, or another on the second."""
    common = ("--num_nodes=2", "--node_ips=10.77.0.1,10.77.0.2", "--start_timeout=20")
    return [
        start(*common, *more, cwd=tmp_path, prefix=node.command(), **options)
        for node, more in zip(nodes, (flags, second or flags), strict=True)
    ]


@needs_namespaces
def test_a_cut_link_ends_both_sides(tmp_path):
    with netns.two_nodes() as nodes:
        runs = both(nodes, tmp_path, SYNTHETIC)
        wait_for_training(runs[0])
        nodes[1].cut()
        begin = time.monotonic()
        errors = [finish(run, 1, timeout=30)[1] for run in runs]
        assert time.monotonic() - begin < PROMISE
    for i, text in enumerate(errors):
        line = next(line for line in text.splitlines() if "error:" in line)
        assert f"node {1 - i} (10.77.0.{2 - i})" in line


@needs_namespaces
@pytest.mark.parametrize("node", [0, 1])
def test_a_killed_process_ends_both_nodes(tmp_path, node):
    with netns.two_nodes() as nodes:
        runs = both(nodes, tmp_path, SYNTHETIC)
        wait_for_training(runs[0])
        os.kill(workers(runs[node].pid)[node], signal.SIGKILL)
        begin = time.monotonic()
        errors = [finish(run, 1, timeout=30)[1] for run in runs]
        assert time.monotonic() - begin < PROMISE
    for text in errors:
        line = next(line for line in text.splitlines() if "error:" in line)
        assert f"rank {node} on node {node} (10.77.0.{node + 1}) was killed by SIGKILL" in line


@needs_namespaces
def test_sigterm_to_either_parent_ends_both_with_a_snapshot(tmp_path):
    with netns.two_nodes() as nodes:
        runs = both(nodes, tmp_path, (*SYNTHETIC, "--model_save_dir=run"))
        wait_for_training(runs[0])
        runs[1].send_signal(signal.SIGTERM)
        ends = [finish(run, 143, timeout=60) for run in runs]
    assert "Saving model to run/snapshot_last.\n" in ends[0][0]
    found = find_resume("auto", str(tmp_path / "run"))
    assert found.path.endswith("snapshot_last")


@needs_namespaces
def test_nodes_that_do_not_agree_or_do_not_come(tmp_path, data):
    with netns.two_nodes() as nodes:
        other = (*SYNTHETIC, "--learning_rate=0.5")
        for run in both(nodes, tmp_path, SYNTHETIC, other):
            _, errors = finish(run, 2)
            (line,) = errors.splitlines()
            assert "--learning_rate differs:" in line and "0.5 on node 1 (10.77.0.2)" in line
        good = recipe(data, "toy", processes=1, suffix="")
        bad = [flag.replace(str(data / "train"), "/nowhere") for flag in good]
        for run in both(nodes, tmp_path, good, bad):
            _, errors = finish(run, 2)
            (line,) = errors.splitlines()
            assert "node 1 (10.77.0.2): --train_data_dir: there is no directory /nowhere" in line
        smaller = tmp_path / "smaller"
        shutil.copytree(data / "train", smaller)
        (smaller / "part-00003").unlink()
        write_manifest(smaller, NUM_CLASSES)
        bad = [flag.replace(str(data / "train"), str(smaller)) for flag in good]
        for run in both(nodes, tmp_path, good, bad):
            _, errors = finish(run, 2)
            assert "differs" in errors and "node 1 (10.77.0.2)" in errors
        alone = start(
            *SYNTHETIC,
            "--num_nodes=2",
            "--node_ips=10.77.0.1,10.77.0.2",
            "--start_timeout=2",
            cwd=tmp_path,
            prefix=nodes[0].command(),
        )
        _, errors = finish(alone, 1)
        (line,) = errors.splitlines()
        assert "node 1 (10.77.0.2) did not connect to 10.77.0.1 port 50051 within 2 s" in line
