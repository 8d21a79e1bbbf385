"""Whether training.safetensors holds what the run that wrote it needs, and nothing else."""

from collections.abc import Iterable, Mapping

import numpy as np

from cnns.errors import RunError
from cnns.jsonfile import brief

STEP = "System-Train-TrainStep"  # updates made, without those skipped because of an overflow
LOSS_SCALE = "System-Train-DynamicLossScale-TrainGraph"  # of half precision
LOSS_SCALE_STATE = {f"{LOSS_SCALE}-LossScale": "float32", f"{LOSS_SCALE}-GoodStepCounter": "int64"}
# What each optimizer keeps for a parameter: suffixes of its name.
BUFFERS = {
    "sgd": ("momentum",),
    "adam": ("m", "v"),
    "rmsprop": ("mean_square",),
    "lars": ("momentum",),
    "lamb": ("m", "v"),
}
STATISTICS = ("running_mean", "running_var")  # of batch norms; no optimizer changes them


def buffers_of(flags: Mapping[str, object]) -> tuple[str, ...]:
    """What the optimizer of a run with these flags keeps for each parameter."""
    if flags.get("momentum") == 0:  # None: of another optimizer
        return ()
    return BUFFERS.get(str(flags.get("optimizer", "sgd")), ())


def check_state(
    state: Mapping[str, np.ndarray],
    *,
    weights: Mapping[str, np.ndarray],
    flags: Mapping[str, object],
    step: int,
    path: str,
    as_written: bool,
) -> None:
    """Raise RunError unless names, shapes and types are those of the run, and its step is `step`.

    OneFlow loads what there is: a missing momentum would silently start from zero.

    Args:
        as_written: whether a checksum was compared. Only then may a parameter lack its buffers: a
            network need not use all its parameters.
    """
    expected: dict[str, tuple[tuple[int, ...], str]] = {STEP: ((1,), "int64")}
    for parameter in parameters(weights):
        names = [f"model.{parameter}-{buffer}" for buffer in buffers_of(flags)]
        if not as_written or state.keys() & names:
            expected |= {name: (weights[parameter].shape, "float32") for name in names}
    if state.keys() & LOSS_SCALE_STATE:  # --use_fp16 may have come after the last step
        expected |= {name: ((1,), kind) for name, kind in LOSS_SCALE_STATE.items()}
    missing, unexpected = sorted(expected.keys() - state), sorted(state.keys() - expected)
    wrong = sorted(
        name
        for name in expected.keys() & state
        if (state[name].shape, state[name].dtype.name) != expected[name]
    )
    for kind, names in (("lacks", missing), ("has the unexpected", unexpected)):
        if names:
            raise RunError(
                f"{path} {kind} {brief(names[0])}, {len(names)} in all; use another snapshot"
            )
    if wrong:
        name = wrong[0]
        raise RunError(
            f"{path}: {name} is {state[name].shape} {state[name].dtype}, and "
            f"{' '.join(map(str, expected[name]))} is needed; use another snapshot"
        )
    # In half precision, steps whose gradients overflow are not counted by OneFlow.
    half = bool(flags.get("use_fp16")) or bool(state.keys() & LOSS_SCALE_STATE)
    if state[STEP].item() != step and not (half and 0 <= state[STEP].item() < step):
        raise RunError(
            f"{path} is of step {state[STEP].item()}, and the snapshot.json beside it of step "
            f"{step}; use another snapshot"
        )
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise RunError(f"{path}: {name} is not finite; use another snapshot")


def parameters(names: Iterable[str]) -> list[str]:
    """The names of weights that an optimizer changes."""
    return [name for name in names if name.rpartition(".")[2] not in STATISTICS]


def fit_state(
    state: Mapping[str, np.ndarray],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    flags: Mapping[str, object],
    step: int,
) -> dict[str, np.ndarray]:
    """The state for a run whose flags may differ from those of the run that wrote it.

    Buffers that it lacks, because --momentum was 0 before, start from zero; without --use_fp16 the
    step counter includes the steps that were skipped.

    Args:
        shapes: of the parameters and buffers of the network, as snapshots hold them.
    """
    system = {name: array for name, array in state.items() if name.startswith("System-")}
    if not flags["use_fp16"]:
        system[STEP] = np.array([step], np.int64)
    shape_of = {
        f"model.{parameter}-{buffer}": shapes[parameter]
        for parameter in parameters(shapes)
        for buffer in buffers_of(flags)
    }
    kept = {name: state[name] for name in shape_of if name in state}
    return system | (kept or {n: np.zeros(shape, np.float32) for n, shape in shape_of.items()})
