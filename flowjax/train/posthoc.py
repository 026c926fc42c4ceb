"""Post-hoc EMA: the average of any length, after training, from snapshots of power-function averages (EDM2, 2312.02696 sec. 3.2).

A power average of width std at step T is an integral of the parameters theta over training with the profile

    p(tau; T, g) = (g + 1) tau^g / T^(g + 1),   0 <= tau <= T,   g = gamma_of_std(std)                           (eq. 3)

exactly so for our updates, whose weight of step k is the integral of p over (k - 1, k]. The profile that is wanted is fitted
in the least-squares sense by the profiles of the snapshots; the fit's coefficients combine the snapshots (eqs. 13-15).

    workdir/snapshots/<average>-<step>/        parameters
    workdir/snapshots/<average>-<step>.json    step, std, fingerprints; written last
"""

import json
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from flowjax import storage
from flowjax.config import ConfigError
from flowjax.train import checkpoint
from flowjax.train.ema import gamma_of_std


def inner(step_a, gamma_a, step_b, gamma_b):
    """Integral of the product of two profiles, in closed form (eq. 13); broadcasts, float64.

    (g_a + 1)(g_b + 1)/(g_a + g_b + 1) m^(g_a + g_b + 1) / (T_a^(g_a + 1) T_b^(g_b + 1)) with m = min(T_a, T_b): the power of
    one ratio below 1, divided by the later step, so that nothing overflows.
    """
    step_a, gamma_a, step_b, gamma_b = (np.asarray(v, np.float64) for v in (step_a, gamma_a, step_b, gamma_b))
    early, late = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    ratio = (early / late) ** np.where(step_a < step_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / late


def coefficients(steps: Sequence[int], stds: Sequence[float], step: int, std: float) -> np.ndarray:
    """(n,) float64 weights of n snapshots whose combination is closest to the average of width `std` at `step`."""
    steps, gammas = np.asarray(steps, np.float64), np.array([gamma_of_std(s) for s in stds])
    gram = inner(steps[:, None], gammas[:, None], steps[None], gammas[None])
    wanted = inner(steps, gammas, step, gamma_of_std(std))
    # Profiles of long trainings overlap, so the Gram matrix is close to singular; unit diagonal first, then least squares.
    scale = np.sqrt(np.diag(gram))
    solution, *_ = np.linalg.lstsq(gram / np.outer(scale, scale), wanted / scale, rcond=1e-15)
    return solution / scale


def combine(weights: Iterable[float], trees: Iterable):
    """Weighted sum of parameter trees, accumulated in float64 on the host one tree at a time; leaves keep their dtype."""
    total, like = None, None
    for weight, tree in zip(weights, trees, strict=True):
        part = jax.tree.map(lambda v, w=weight: w * np.asarray(v, np.float64), tree)
        total, like = (part, tree) if total is None else (jax.tree.map(np.add, total, part), like)
    return jax.tree.map(lambda v, l: v.astype(l.dtype), total, like)


def reconstruct(snapshots: Sequence[tuple], step: int, std: float):
    """The average of width `std` at `step` from snapshots (step, std, tree)."""
    steps, stds, trees = zip(*snapshots, strict=True)
    return combine(coefficients(steps, stds, step, std), trees)


def save(workdir, name: str, step: int, std: float, tree):
    """Keep the average `name` as it is at `step`."""
    folder = storage.path(workdir) / "snapshots"
    checkpoint.save_tree(folder / f"{name}-{step}", tree)
    told = {"step": step, "std": std, "name": name, "fingerprints": checkpoint.fingerprints(tree)}
    if jax.process_index() == 0:
        (folder / f"{name}-{step}.json").write_text(json.dumps(told))


def load(workdir, names: Iterable[str], target, step: int | None, std: float):
    """(tree, step): the average of width `std` at `step` (None: the last) from the snapshots of `names` under workdir.

    Raises ConfigError where there are none, where none is of that step, and where one is damaged.
    """
    folder, names = storage.path(workdir) / "snapshots", set(names)
    gamma_of_std(std)
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    found = sorted((f for f in found if f["name"] in names), key=lambda f: (f["step"], f["std"]))
    if not found:
        raise ConfigError(f"{folder} has no snapshots of {', '.join(sorted(names)) or 'a power average'}; train with ema.<name>.snapshot_every")
    steps = sorted({f["step"] for f in found})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ConfigError(f"no snapshot of step {step} in {folder}; there are {', '.join(map(str, steps))}")
    # Later snapshots average over parameters that the wanted average has not seen.
    found = [f for f in found if f["step"] <= step]
    weights = coefficients([f["step"] for f in found], [f["std"] for f in found], step, std)
    trees = (checkpoint.load_checked(folder / f"{f['name']}-{f['step']}", target, f["fingerprints"]) for f in found)
    return combine(weights, trees), step
