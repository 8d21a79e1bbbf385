"""Compute the training step that OneFlow compiled for CUDA, and compare it with PyTorch.

A job as OneFlow has compiled it for a CUDA device is a list of operators with their attributes:
forward, backward, casts to and from half precision, layouts, fused batch norms, loss scale,
schedule, updates. This program reads such a list and computes it with PyTorch on a CPU, 20 steps of
the recipe on seeded weights and batches. Beside it ResNet-18 trains as plain PyTorch has it, in
float64, in float32 and under PyTorch's own autocast. So what a GPU is told to do is proved, and
what remains unproved is how its kernels do it.

The jobs come from tests/fakecuda/dump_job.py, in the environment of the tests, which needs a
device that computes nothing; the rest needs torch and numpy (see make_golden.py):

    export $(python3 tests/fakecuda/fake.py)
    python3 tests/fakecuda/dump_job.py tests/golden resnet18_float32 resnet18_float32_all \\
        resnet18_fp16 resnet18_fp16_all
    venv-torch/bin/python tests/golden/compute_plan.py    # 10 to 20 minutes

It reads plan_*.json.gz beside itself and writes plan_results.json. `compute_plan.py PART ...` does
some parts again and keeps the others; `--help` names them. ResNet-50, by hand:

    python3 tests/fakecuda/dump_job.py DIRECTORY resnet50_float32 resnet50_fp16_all
    venv-torch/bin/python tests/golden/compute_plan.py --resnet50=DIRECTORY
"""

import argparse
import json
import math
import re
import time
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import plans
import seeded
import torch
from plan_operators import WRITES, Misunderstood, Operator
from torch import nn
from torch.nn import functional

WEIGHTS = {"seed": 18, "beta": 1.0, "fc_std": 0.03}
FIRST_BATCH_SEED = 3000  # of step 0, and one more for each step after it
LABEL_SMOOTHING, MOMENTUM, WEIGHT_DECAY = 0.1, 0.875, 1 / 32768
TOP_K = 5
LOSS_SCALE = 2.0**16  # where the recipe starts it

# What is done to the loss scale in the case `planted`: it comes to its 2000th good step in step 9,
# and in step 12 one number of one gradient is infinite.
GOOD_STEPS_BEFORE = 1990
PLANTED_STEP = 12


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    return seeded.batch(FIRST_BATCH_SEED + step, **plans.BATCH)


# The plan.


def before(operators: list[dict]) -> dict[str, set[str]]:
    """The names of all operators that are done before an operator starts, by its name."""
    maker = {out[0]: op["name"] for op in operators for outs in op["out"].values() for out in outs}
    direct = {
        op["name"]: {maker[blob] for blobs in op["in"].values() for blob in blobs} | {*op["after"]}
        for op in operators
    }
    known: dict[str, set[str]] = {}
    for name in TopologicalSorter(direct).static_order():
        known[name] = direct[name].union(*(known[each] for each in direct[name]))
    return known


def check_order(operators: list[dict]) -> None:
    """Raise Misunderstood unless every variable is written once, after all that read it.

    A step can then be computed with the values that variables had when it began, whatever the
    device does at the same time.
    """
    variables = {op["out"]["out"][0][0] for op in operators if op["type"] == "variable"}
    done_before = before(operators)
    writer: dict[str, str] = {}
    for op in operators:
        for key in WRITES.get(op["type"], ()):
            for blob in op["in"][key]:
                if blob in writer:
                    raise Misunderstood(f"{blob} is written by {writer[blob]} and {op['name']}")
                writer[blob] = op["name"]
    for op in operators:
        for blobs in op["in"].values():
            for blob in variables & set(blobs) & writer.keys():
                if writer[blob] != op["name"] and op["name"] not in done_before[writer[blob]]:
                    raise Misunderstood(f"{op['name']} may read {blob} after {writer[blob]}")


def data_format(plan: dict, variable: str) -> str | None:
    """The layout that a weight has by the convolutions that take it; None: by none."""
    blobs, found = {f"{variable}/out"}, set()
    for op in plan["operators"]:
        if op["type"] == "cast" and blobs & set(op["in"]["in"]):
            blobs |= {out[0] for out in op["out"]["out"]}
        if op["type"] == "conv2d" and blobs & set(op["in"]["weight"]):
            found.add(op["attr"]["data_format"])
    assert len(found) <= 1, (variable, found)
    return found.pop() if found else None


class Job:
    """A plan on its way: its variables, and what its steps gave."""

    def __init__(
        self,
        plan: dict,
        weights: dict[str, np.ndarray],
        *,
        work: torch.dtype = torch.float32,
        loss_scale: float | None = None,
        good_steps: int | None = None,
        infinite: tuple[int, str] | None = None,
    ):
        """`weights` by their names in torchvision.

        Args:
            work: what float32 is computed in.
            loss_scale, good_steps: in place of what the job starts them with.
            infinite: a step, and a blob of which one number is made infinite there.
        """
        self.plan, self.given, self.work, self.infinite = plan, weights, work, infinite
        check_order(plan["operators"])
        self.variables = {}
        for op in plan["operators"]:
            if op["type"] == "variable":
                self.variables[f"{op['name']}/out"] = self.initial(op, weights)
        (self.scheduler,) = self.of_type("dynamic_loss_scale_schedule") or [None]
        if loss_scale is not None:
            self.variables[self.scheduled("loss_scale")].fill_(loss_scale)
        if good_steps is not None:
            self.variables[self.scheduled("good_step_counter")].fill_(good_steps)
        self.step = 0

    def of_type(self, kind: str) -> list[dict]:
        return [op for op in self.plan["operators"] if op["type"] == kind]

    def scheduled(self, key: str) -> str:
        """The variable of the loss scale or of the good steps."""
        return self.scheduler["in"][key][0]

    def initial(self, op: dict, weights: dict[str, np.ndarray]) -> torch.Tensor:
        """What a variable starts with: the job's own value, or that of the weights."""
        (((_, kind, shape),),) = op["out"].values()
        dtype = {"float32": self.work, "int64": torch.int64}[kind]
        ((how, settings),) = op["attr"]["initializer"].items()
        if how in ("constant_conf", "constant_int_conf"):
            return torch.full(shape, settings["value"], dtype=dtype)
        if how != "empty_conf":
            raise Misunderstood(f"{op['name']}: initializer {how}")
        name = op["name"].removeprefix("model.")
        if name.endswith("num_batches_tracked"):
            return torch.zeros(shape, dtype=dtype)
        value = torch.tensor(weights[name])
        if value.ndim == 4 and data_format(self.plan, op["name"]) == "channels_last":
            value = value.permute(0, 2, 3, 1)
        # An input channel more than the network has is one of zeros.
        widths = [[0, have - got] for have, got in zip(shape, value.shape, strict=True)]
        return functional.pad(value, sum(reversed(widths), [])).to(dtype).contiguous()

    def weights(self) -> dict[str, np.ndarray]:
        """Those that were given, after the steps so far."""
        found = {}
        for name, given in self.given.items():
            value = self.variables[f"model.{name}/out"]
            if value.ndim == 4 and data_format(self.plan, f"model.{name}") == "channels_last":
                value = value.permute(0, 3, 1, 2)
            if value.ndim > 1:
                assert not value[:, given.shape[1] :].any(), "a channel of zeros has got weights"
                value = value[:, : given.shape[1]]
            found[name] = value.numpy().copy()
        return found

    @torch.no_grad()
    def run_step(self) -> dict:
        """Compute one step; returns its loss and its hits, and the loss scale behind it."""
        values, written = dict(self.variables), {}
        feed = [torch.tensor(array) for array in batch(self.step)]
        feed[0] = feed[0].to(self.work)
        inputs = iter(sorted(op["name"] for op in self.of_type("input")))
        fed = dict(zip(inputs, feed, strict=True))
        outputs = {}
        for spec in self.plan["operators"]:
            if spec["type"] == "variable":
                continue
            if spec["type"] == "input":
                ((out,),) = spec["out"].values()
                value = fed[spec["name"]]
                if list(value.shape) != out[2]:
                    raise Misunderstood(f"{spec['name']} takes {out[2]}")
                values[out[0]] = value
            elif spec["type"] == "output":
                outputs[spec["name"]] = values[spec["in"]["in"][0]]
            else:
                op = Operator(spec, values, self.variables, work=self.work)
                op.compute()
                written |= op.written
                self.plant(spec, values)
        before_step = dict(self.variables)
        self.variables |= written
        (loss,) = self.plan["settings"]["loss"]
        results = {
            "loss": values[loss].item(),
            "outputs": [outputs[name].item() for name in sorted(outputs)],
        }
        assert results["outputs"][0] == results["loss"]
        if self.scheduler:
            results["loss_scale"] = self.variables[self.scheduled("loss_scale")].item()
        results["updated"] = [
            not torch.equal(before_step[op["in"]["model"][0]], written[op["in"]["model"][0]])
            for op in self.of_type("momentum_update")
        ]
        self.step += 1
        return results

    def plant(self, spec: dict, values: dict) -> None:
        if self.infinite is None or self.infinite[0] != self.step:
            return
        for outs in spec["out"].values():
            for name, *_ in outs:
                if name == self.infinite[1]:
                    values[name] = values[name].clone()
                    values[name].view(-1)[0] = math.inf

    def parameter_types(self) -> list[str]:
        updated = [
            op["in"][key][0]
            for op in self.of_type("momentum_update")
            for key in ("model", "momentum")
        ]
        return sorted({str(self.variables[name].dtype).removeprefix("torch.") for name in updated})


# The reference.


def rate_at(step: int) -> float:
    """Linear from 0, then half a cosine over the steps that are left."""
    if step < plans.WARMUP_STEPS:
        return plans.PEAK_RATE * step / plans.WARMUP_STEPS
    done = (step - plans.WARMUP_STEPS) / (plans.STEPS - plans.WARMUP_STEPS)
    return plans.PEAK_RATE * (1 + math.cos(math.pi * done)) / 2


class Block(nn.Module):
    """Of ResNet: convolutions (channels, kernel, stride) beside the identity or a projection."""

    def __init__(self, inputs: int, convolutions: list[tuple[int, int, int]]):
        super().__init__()
        channels = inputs
        for i, (outputs, kernel, stride) in enumerate(convolutions, 1):
            conv = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(outputs))
            channels = outputs
        self.depth = len(convolutions)
        self.downsample = nn.Identity()
        stride = math.prod(stride for *_, stride in convolutions)
        if inputs != channels or stride > 1:
            conv = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = functional.relu(y)
        return functional.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-18 or -50 (v1.5), parameters named as in torchvision."""

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, depth in enumerate({"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}[name]):
            width, blocks = 64 << stage, []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                shape = {
                    "resnet18": [(width, 3, stride), (width, 3, 1)],
                    "resnet50": [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)],
                }[name]
                blocks.append(Block(channels, shape))
                channels = shape[-1][0]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, image):  # (N, 3, H, W) to logits (N, num_classes)
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(image))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


def network(name: str) -> nn.Module:
    return ResNet(name, plans.BATCH["num_classes"])


def state_of(net: nn.Module) -> dict[str, np.ndarray]:
    return {
        name: value.numpy().copy()
        for name, value in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def seeded_weights(name: str) -> dict[str, np.ndarray]:
    """Features are made as small as a trained network's, a quarter of what the seed gives. Else the
    gradient of the fc weight, a sum of features, does not fit into half precision times 2^16.
    """
    shapes = {key: array.shape for key, array in state_of(network(name)).items()}
    arrays = seeded.state(shapes, **WEIGHTS)
    last = {"resnet18": "bn2", "resnet50": "bn3"}[name]
    for key in arrays:
        if re.fullmatch(rf"layer4\.\d\.({last}|downsample\.1)\.(weight|bias)", key):
            arrays[key] = arrays[key] / 4
    return arrays


def train(
    name: str,
    dtype: torch.dtype,
    *,
    steps: int = plans.STEPS,
    autocast: bool = False,
    skip: int | None = None,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Losses and hits of all steps, and parameters and buffers after them, by plain PyTorch.

    Args:
        autocast: in half precision where PyTorch thinks it right, with a fixed loss scale.
        skip: a step whose gradients are thrown away, and after which the schedule stands still.
    """
    net = network(name)
    state = {key: torch.tensor(array) for key, array in seeded_weights(name).items()}
    net.load_state_dict(state, strict=False)
    net = net.to(dtype).train()
    # Batch norms' parameters do not decay, all others do.
    norms = [p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    known = {id(p) for p in norms}
    rest = [p for p in net.parameters() if id(p) not in known]
    groups = [{"params": rest, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM)
    losses, counts, updates = [], [], 0
    for step in range(steps):
        image, label = batch(step)
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            logits = net(torch.tensor(image).to(dtype))
        loss = functional.cross_entropy(
            logits.to(dtype), torch.tensor(label).long(), label_smoothing=LABEL_SMOOTHING
        )
        losses.append(loss.item())
        best = logits.topk(TOP_K, dim=1).indices == torch.tensor(label).unsqueeze(1)
        counts.append([int(best[:, :1].sum()), int(best.sum()), 0])  # no label is outside
        optimizer.zero_grad()
        scale = LOSS_SCALE if autocast else 1.0
        (loss * scale).backward()
        if step == skip:
            continue
        for group in optimizer.param_groups:
            group["lr"] = rate_at(updates)
            for parameter in group["params"]:
                parameter.grad /= scale
                assert torch.isfinite(parameter.grad).all(), step
        optimizer.step()
        updates += 1
    return {"losses": losses, "counts": counts}, state_of(net)


# The comparison.


def relative(losses: list[float], reference: list[float]) -> float:
    """The largest difference of two courses of the loss, as a share of the loss."""
    return float(np.abs(np.array(losses) / np.array(reference[: len(losses)]) - 1).max())


def run(plan: dict, weights: dict[str, np.ndarray], *, steps: int = plans.STEPS, **how) -> dict:
    """All steps of a plan: what is stored of them, and `state`."""
    job = Job(plan, weights, **how)
    results = [job.run_step() for _ in range(steps)]
    return {
        "plan": plans.digest(plan),
        "losses": [each["loss"] for each in results],
        "counts": [each["outputs"][1:] for each in results],
        "loss_scale": [each.get("loss_scale") for each in results],
        "updated": [sum(each["updated"]) for each in results],
        "parameter_types": job.parameter_types(),
        "state": job.weights(),
    }


def filter_gradient(plan: dict) -> str:
    """Some gradient half-way down the network."""
    gradients = [op for op in plan["operators"] if op["type"] == "conv_filter_grad"]
    return gradients[len(gradients) // 2]["out"]["filter_diff"][0][0]


REFERENCES = {
    "exact": {"dtype": torch.float64},
    "single": {"dtype": torch.float32},
    "skipping": {"dtype": torch.float32, "skip": PLANTED_STEP},
    "autocast": {"dtype": torch.float32, "autocast": True},
}
# part -> case, reference, and what is special
RUNS = {case: (case, "exact", {}) for case in plans.CASES} | {
    # In float64 there are no rounding errors to hide behind.
    "in_float64": ("resnet18_float32_all", "exact", {"work": torch.float64}),
    "planted": ("resnet18_fp16_all", "skipping", {"good_steps": GOOD_STEPS_BEFORE}),
    # So OneFlow's own ResNet-50 starts.
    "from_2_30": ("resnet18_fp16", None, {"loss_scale": 2.0**30, "steps": 18}),
}
RESULTS = plans.HERE / "plan_results.json"


def compute_reference(name: str) -> dict:
    settings = dict(REFERENCES[name])
    found, state = train("resnet18", settings.pop("dtype"), **settings)
    summary = seeded.summary(state)
    return found | {
        "name": summary["name"].tolist(),
        "norm": rounded(summary["norm"]),
        "projections": [rounded(row) for row in summary["projections"]],
    }


def rounded(row: np.ndarray) -> list[float]:
    """To ten digits, so that the file stays small."""
    return [float(f"{value:.10g}") for value in row]


def compute_run(name: str, results: dict) -> dict:
    case, reference, how = RUNS[name]
    plan = plans.read(plans.path(case))
    if name == "planted":
        how = how | {"infinite": (PLANTED_STEP, filter_gradient(plan))}
    found = run(plan, seeded_weights("resnet18"), **how)
    state = seeded.summary(found.pop("state"))
    if reference is not None:
        theirs = results[reference]
        found["loss_error"] = relative(found["losses"], theirs["losses"])
        if len(found["losses"]) == len(theirs["losses"]):
            theirs = {key: np.array(theirs[key]) for key in state}
            found["state_error"] = float(seeded.relative_errors(state, theirs).max())
    return found


def add_results(parts: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["torch"] = torch.__version__
    results["checksum"] = seeded.checksum(
        seeded_weights("resnet18") | {f"image {i}": batch(i)[0] for i in range(plans.STEPS)}
    )
    for part in parts:
        start = time.perf_counter()
        if part in REFERENCES:
            results[part] = compute_reference(part)
        else:
            results[part] = compute_run(part, results)
        told = {k: v for k, v in results[part].items() if k not in ("name", "norm", "projections")}
        print(f"{part}: {time.perf_counter() - start:.0f} s, {json.dumps(told)}", flush=True)
        lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(results.items()))
        RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for part in REFERENCES:
        if part != "exact" and part in results:
            print(f"{part} differs from float64 by {relative(*both(results, part)):.1e}")


def both(results: dict, part: str) -> tuple[list[float], list[float]]:
    return results[part]["losses"], results["exact"]["losses"]


def compare_resnet50(directory: Path) -> None:
    """Print how far some steps of ResNet-50 are from PyTorch's."""
    steps = 5
    weights = seeded_weights("resnet50")
    reference, state = train("resnet50", torch.float32, steps=steps)
    for case in plans.BY_HAND:
        plan = plans.read(plans.path(case, directory))
        found = run(plan, weights, steps=steps)
        errors = seeded.relative_errors(seeded.summary(found["state"]), seeded.summary(state))
        kinds = len({op["type"] for op in plan["operators"]})
        differs = relative(found["losses"], reference["losses"])
        print(f"{case}: {len(plan['operators'])} operators of {kinds} types")
        print(f"  losses differ by {differs:.1e}; loss scale {found['loss_scale']}")
        print(f"  weights by {np.median(errors):.1e} (median) to {errors.max():.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    known = [*REFERENCES, *RUNS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(known))
    parser.add_argument("--resnet50", type=Path, metavar="DIRECTORY")
    args = parser.parse_args()
    if args.resnet50:
        compare_resnet50(args.resnet50)
    else:
        unknown = set(args.parts) - set(known)
        if unknown:
            parser.error(f"unknown: {unknown}")
        add_results(args.parts or known)


if __name__ == "__main__":
    main()
