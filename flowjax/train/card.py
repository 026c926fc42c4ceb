"""The start-up card: what will really run, printed and saved before step 1."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import storage
from flowjax.config import keywords
from flowjax.train import ema as ema_lib
from flowjax.train import hardware, optim


def peak_flops() -> float | None:
    """bf16 FLOP/s of one device of this kind, or None where it is not known (CPU)."""
    chip = hardware.here()
    return chip and chip.flops


def size(tree) -> int:
    """Number of parameters."""
    return sum(int(np.prod(v.shape)) for v in jax.tree.leaves(tree))


def bytes_per_device(tree) -> int:
    """Bytes that one device holds of a tree of sharded arrays or ShapeDtypeStructs with shardings."""
    total = 0
    for v in jax.tree.leaves(tree):
        shape = v.sharding.shard_shape(v.shape) if getattr(v, "sharding", None) is not None else v.shape
        total += int(np.prod(shape)) * v.dtype.itemsize
    return total


def histogram(t, bins: int = 10) -> list[float]:
    """Share of the times in each tenth of [0, 1]."""
    counts, _ = np.histogram(np.asarray(t), bins=bins, range=(0.0, 1.0))
    return [round(int(c) / max(1, int(counts.sum())), 4) for c in counts]


def write(workdir, facts: dict):
    """Save card.json and card.txt; returns the text."""
    lines = []

    def walk(value, name, depth):
        pad = "  " * depth
        if isinstance(value, dict) and value:
            lines.append(f"{pad}{name}")
            for k, v in value.items():
                walk(v, k, depth + 1)
        else:
            lines.append(f"{pad}{name}: {value}")

    for k, v in facts.items():
        walk(v, k, 0)
    text = "\n".join(lines)
    if jax.process_index() == 0:
        workdir = storage.path(workdir)
        (workdir / "card.json").write_text(json.dumps(facts, indent=1, default=str))
        (workdir / "card.txt").write_text(text + "\n")
    return text


def start(this) -> dict:
    """Where the parameters of each trained role come from, and what its averages begin with."""
    facts = {}
    for name in this.trained:
        if name not in this.loaded:
            facts[name] = f"drawn with seed {this.config['seed']}"
            continue
        section, (_, info) = this.config["roles"][name], this.loaded[name]
        facts[name] = f"{section['checkpoint']} at step {info['step']}, weights {info['weights']}"
        facts[name] += ", frozen under a fresh adapter" if this.roles[name].lora is not None else "; optimizer state anew"
        for average in (k for k, (_, of) in this.averages.items() if of == name):
            facts[f"ema.{average}"] = "restarted there"
            if average in this.continued:
                facts[f"ema.{average}"] = f"goes on with its {section['average']} of {this.continued[average][1]} updates"
    return facts


def rules(this):
    """What per-parameter rules do: which parameters are frozen, and which learn at another rate."""
    told = {}
    for name in this.trained:
        own = (this.config["roles"].get(name) or {}).get("optimizer")
        told[name] = optim.described(own or this.config["optimizer"], this.target.params[name])
    return {k: v for k, v in told.items() if v} or "none"


def shares(this):
    """What share of a mixture each part has, and which parts rehearse what the start of a trained role was trained on (replay)."""
    name, section = keywords(this.config["data"])["name"], this.config["data"]
    if name != "mixture":
        return "one data set"
    before = [plainly(this.loaded[k][1].get("config", {}).get("data")) for k in this.trained if k in this.loaded]
    before += [plainly(part) for data in before if isinstance(data, dict) and data.get("name") == "mixture" for part in data["parts"]]
    total, told = sum(section["weights"]), {}
    for i, (part, weight) in enumerate(zip(section["parts"], section["weights"])):
        said = ", ".join(f"{k} {v}" for k, v in keywords(part).items())
        told[f"part {i}"] = f"{100 * weight / total:.4g} %{' replay' if plainly(part) in before else ''}: {said}"
    return told


def plainly(section):
    """A data section in one form: a name alone is a section without settings."""
    return None if section is None else json.loads(json.dumps(keywords(section)))


def schedule_points(schedule, steps: int) -> dict:
    """Learning rate at a few steps of the run."""
    at = sorted({0, min(100, steps - 1), steps // 4, steps // 2, 3 * steps // 4, steps - 1})
    return {str(n): float(f"{float(schedule(jnp.asarray(n, jnp.float32))):.4g}") for n in at}


def averages(built: dict, steps: int) -> dict:
    """Half-life in steps, at the end of the run, of each average."""
    return {name: f"of {of}, half-life {ema_lib.half_life(decay, steps):.1f} steps at the end" for name, (decay, of) in built.items()}


def human(count: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"."""
    for bound, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= bound:
            return f"{count / bound:.3g} {letter}{unit}"
    return f"{count:.3g} {unit}"
