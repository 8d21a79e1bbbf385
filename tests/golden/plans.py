"""The plans that compute_plan.py computes: their cases, their files, and how two are compared.

A plan is the job that OneFlow compiled for one training step, as tests/fakecuda/dump_job.py writes
it. Used beside OneFlow and beside PyTorch, so it needs nothing but the standard library.
"""

import gzip
import hashlib
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent

# The recipe in small: 20 steps, of which 5 are the warm-up.
STEPS, WARMUP_STEPS = 20, 5
BATCH = {"size": 8, "pixels": 40, "num_classes": 100}
PEAK_RATE = 0.002
RECIPE = (
    "--device=cuda",
    f"--num_classes={BATCH['num_classes']}",
    f"--image_size={BATCH['pixels']}",
    f"--batch_size_per_device={BATCH['size']}",
    f"--num_examples={STEPS * BATCH['size']}",
    "--num_epochs=1",
    f"--warmup_epochs={WARMUP_STEPS / STEPS}",
    f"--learning_rate={PEAK_RATE}",
)
LAYOUT = ("--channel_last", "--pad_output", "--fuse_bn_relu", "--fuse_bn_add_relu")

# case -> flags of of_cnn_train_val.py, after those of the recipe
CASES = {
    "resnet18_float32": ("--model=resnet18",),
    "resnet18_float32_all": ("--model=resnet18", *LAYOUT),
    "resnet18_fp16": ("--model=resnet18", "--use_fp16"),
    "resnet18_fp16_all": ("--model=resnet18", "--use_fp16", *LAYOUT),
}
# Computed by hand, and not stored.
BY_HAND = {
    "resnet50_float32": ("--model=resnet50",),
    "resnet50_fp16_all": ("--model=resnet50", "--use_fp16", *LAYOUT),
}


def flags(case: str) -> list[str]:
    """Of a case, as a user would give them to of_cnn_train_val.py."""
    return [*RECIPE, *(CASES | BY_HAND)[case]]


def path(case: str, directory: Path = HERE) -> Path:
    return directory / f"plan_{case}.json.gz"


def write(plan: dict, file: Path) -> None:
    """The same plan is the same bytes, whenever it is written; an operator a line."""
    lines = ",\n".join(json.dumps(each, sort_keys=True) for each in plan["operators"])
    settings = json.dumps(plan["settings"], sort_keys=True)
    text = f'{{"settings": {settings},\n"operators": [\n{lines}\n]}}\n'
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


def read(file: Path) -> dict:
    return json.loads(gzip.decompress(file.read_bytes()))


def digest(plan: dict) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def differences(before: dict, now: dict) -> list[str]:
    """What distinguishes two plans, a line each, for a reader; none if they are the same."""
    lines = [
        f"setting {name}: {before['settings'].get(name)} -> {now['settings'].get(name)}"
        for name in sorted(before["settings"].keys() | now["settings"].keys())
        if before["settings"].get(name) != now["settings"].get(name)
    ]
    old, new = ({op["name"]: op for op in plan["operators"]} for plan in (before, now))
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new:
            lines.append(f"gone: {name} ({old[name]['type']})")
        elif name not in old:
            lines.append(f"new: {name} ({new[name]['type']})")
        else:
            lines += [
                f"{name}: {field}: {old[name][field]} -> {new[name][field]}"
                for field in old[name]
                if old[name][field] != new[name][field]
            ]
    return lines
