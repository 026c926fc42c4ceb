"""Checkpoints: asynchronous, atomic, checked after loading, restorable onto another mesh.

One wrapper around orbax (API v1). A step directory holds `state` (the arrays) and `extra` (JSON: data position, config,
fingerprints). orbax notices truncated files but not flipped bits, and its "latest" may be a damaged step; so every leaf's
fingerprint is stored, compared after loading, and a damaged step is named and skipped in favour of the one before it.

There is one tier, the workdir, which may be a bucket. A SIGTERM at any process makes all save the same step, so a preemption
that is announced loses nothing; a machine that dies loses the steps since the last checkpoint. Copies on each host's own disk,
from which a slice that lives restores one that is new, are not here: orbax 0.12.8 has them in experimental.emergency (its
CheckpointManager, for several slices with a whole copy each; ReplicatorCheckpointManager, with a replicator service beside
each host), which it marks as experimental and not for general use, on its older interface and only for jobs of several processes.
"""

import json
import logging
import pathlib
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import storage
from flowjax.config import ConfigError

log = logging.getLogger(__name__)


def names_of(tree) -> list[str]:
    """Leaf names in tree order, "params/net/blocks/attn/q/kernel"."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


@jax.jit
def _fingerprints(leaves):
    def one(x):
        x = jnp.asarray(x)
        if x.dtype == bool:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize])
        bits = bits.reshape(-1).astype(jnp.uint32)
        # Odd multipliers are invertible mod 2^32: any single changed element changes the sum. Integer sums do not depend on
        # their order, hence not on the sharding either.
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [one(x) for x in leaves]


def _on_host(x) -> bool:
    """Whether all of x is in this process's memory, so that no program has to be compiled for it (a second at each start)."""
    if not isinstance(x, jax.Array):
        return True
    return x.is_fully_addressable and x.is_fully_replicated and all(device.platform == "cpu" for device in x.devices())


def _fingerprint_on_host(x) -> int:
    """What `_fingerprints` computes of one leaf."""
    x = np.ascontiguousarray(x).reshape(-1)
    bits = x.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[x.dtype.itemsize]).astype(np.uint32)
    return int(np.sum(bits * (2 * np.arange(bits.size, dtype=np.uint32) + 1), dtype=np.uint32))


def fingerprint(tree) -> int:
    """One 32-bit hash of a tree of parameters."""
    return sum(fingerprints(tree).values()) % 2**32


def fingerprints(tree) -> dict[str, int]:
    """{leaf name: 32-bit hash of the values}, the same for every sharding of the same values."""
    leaves, names = jax.tree.leaves(tree), names_of(tree)
    here = [_on_host(x) for x in leaves]
    away = iter(_fingerprints([x for x, host in zip(leaves, here) if not host]) if not all(here) else ())
    return {name: _fingerprint_on_host(x) if host else int(next(away)) for name, x, host in zip(names, leaves, here)}


class Checkpoints:
    """The checkpoints of one run.

    keep: how many of the latest survive; keep_every: those at multiples of it survive for ever (0 = none); best: name of the
    metric (smaller is better) whose best checkpoint survives too.
    """

    def __init__(self, directory, keep: int = 3, keep_every: int = 0, best: str | None = None):
        from orbax.checkpoint import v1 as ocp

        policies = ocp.training.preservation_policies
        keepers = [policies.LatestN(keep)]
        if keep_every:
            keepers.append(policies.EveryNSteps(keep_every))
        if best:
            worst = float("inf")
            score = lambda m: -m.get(best, worst) if m else -worst  # noqa: E731
            keepers.append(policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        self.directory = _absolute(directory)
        self._writer = None
        self._sweep()
        self._writer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keepers),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(c.step for c in self._writer.checkpoints)

    def save(self, step: int, state, extra: Mapping, metrics: Mapping | None = None):
        """Write in the background; the state may be donated as soon as this returns. An existing step is left alone."""
        if step in self.steps():
            return
        extra = {**extra, "fingerprints": fingerprints(state), "shapes": _shapes(state)}
        metrics = {k: float(v) for k, v in (metrics or {}).items()}
        self._writer.save_checkpointables_async(step, {"state": as_dict(state), "extra": _sealed(extra)}, metrics=metrics)

    def restore(self, target, step: int | None = None):
        """(state, extra, step) of the newest intact checkpoint, or of `step`; None when there is none.

        target: State of ShapeDtypeStructs with the shardings wanted now, whatever they were when saved. A damaged checkpoint is
        logged by name and the one before it tried; if that is intact, the damaged one is moved to <directory>-damaged, because
        orbax saves no step that is not later than all that it sees. A state of another shape is an error.
        """
        available = self.steps()
        if step is not None and step not in available:
            raise ConfigError(f"no checkpoint of step {step} in {self.directory}; there are {available}")
        candidates = [step] if step is not None else available[::-1]
        damaged = []
        for candidate in candidates:
            try:
                extra = _opened(self._load(candidate, {"extra": None})["extra"])
                _check_fit(extra["shapes"], target, self.directory / str(candidate))
                state = from_dict(self._load(candidate, {"state": as_dict(target)})["state"], target)
                found = fingerprints(state)
                broken = [k for k, v in found.items() if v != extra["fingerprints"][k]]
                if broken:
                    raise OSError(f"values changed on disk in {', '.join(broken[:4])}")
                self._set_aside(damaged)
                return state, extra, candidate
            except ConfigError:
                raise
            except Exception as error:  # orbax raises many types for damaged files
                log.error("checkpoint %s is damaged (%s)", self.directory / str(candidate), _reason(error))
                damaged.append(candidate)
        if candidates:
            raise ConfigError(f"every checkpoint in {self.directory} is damaged: {candidates}")
        return None

    def _sweep(self):
        """Set aside steps whose small files orbax could not read when it opens the directory, which would stop it for good."""
        found = [p for p in self.directory.iterdir() if p.name.isdigit()] if self.directory.exists() else []
        unreadable = [p for p in found if not all(_is_json(p / name) for name in ("metrics/metrics", "_CHECKPOINT_METADATA"))]
        for place in unreadable:
            log.error("checkpoint %s is damaged (its metrics or metadata cannot be read)", place)
        if found and len(unreadable) == len(found):
            raise ConfigError(f"every checkpoint in {self.directory} is damaged: {sorted(int(p.name) for p in found)}")
        _together("all processes have looked for damaged checkpoints")  # before process 0 moves what the others still look for
        self._set_aside([int(p.name) for p in unreadable])

    def _set_aside(self, steps):
        if not steps:
            return
        if jax.process_index() == 0:
            place = self.directory.parent / f"{self.directory.name}-damaged"
            place.mkdir(parents=True, exist_ok=True)
            for step in steps:
                if (place / str(step)).exists():
                    (place / str(step)).rmtree()
                (self.directory / str(step)).rename(place / str(step))
        _together("damaged checkpoints are set aside")
        if self._writer is not None:
            self._writer.reload()

    def _load(self, step, wanted):
        return self._writer.load_checkpointables(step, wanted)

    def wait(self):
        """Block until what is being written is complete."""
        self._writer.wait()

    def close(self):
        """Finish writing and release the directory."""
        self._writer.close()


def _together(what: str):
    """Go on when all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def _is_json(file) -> bool:
    try:
        json.loads(file.read_text())
    except FileNotFoundError:
        return True
    except ValueError:  # not JSON, or not even text
        return False
    return True


def as_dict(state):
    """State -> plain dict, which orbax stores by leaf name."""
    return {"step": state.step, "params": state.params, "opt": state.opt, "ema": state.ema}


def from_dict(tree, like):
    """Plain dict -> State."""
    return like.replace(**tree)


def _shapes(state):
    return {name: list(leaf.shape) for name, leaf in zip(names_of(state), jax.tree.leaves(state))}


def _check_fit(stored, target, where):
    """ConfigError naming leaves unless a checkpoint holds the leaves of `target` in its shapes."""
    wanted = _shapes(target)
    groups = {
        "lacks": sorted(wanted.keys() - stored.keys()),
        "has besides": sorted(stored.keys() - wanted.keys()),
        "has in other shapes": sorted(k for k in wanted.keys() & stored.keys() if wanted[k] != stored[k]),
    }
    parts = [f"{label} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" for label, names in groups.items() if names]
    if parts:
        raise ConfigError(f"checkpoint {where} was written by another configuration: it {'; '.join(parts)}")


def _sealed(extra):
    """The JSON item with a checksum: a flipped digit would otherwise load as another number."""
    text = json.dumps(extra)
    return {"text": text, "crc": zlib.crc32(text.encode())}


def _opened(item):
    if zlib.crc32(item["text"].encode()) != item["crc"]:
        raise OSError("its description changed on disk")
    return json.loads(item["text"])


def _reason(error) -> str:
    return (str(error).splitlines()[0] if str(error) else type(error).__name__)[:300]


def _absolute(directory):
    """etils' epath of an absolute path, which orbax asks for, or of a bucket's."""
    from etils import epath

    return epath.Path(directory if storage.remote(directory) else pathlib.Path(directory).absolute())


def save_tree(directory, params):
    """Write one parameter tree as a stand-alone orbax checkpoint (an export)."""
    from orbax.checkpoint import v1 as ocp

    ocp.save(_absolute(directory), params, overwrite=True)


def load_checked(directory, target, expected: Mapping[str, int]):
    """Read a tree written by save_tree into the shapes (and shardings) of `target`; ConfigError unless it has these fingerprints."""
    from orbax.checkpoint import v1 as ocp

    try:
        tree = ocp.load(_absolute(directory), target)
    except Exception as error:  # orbax raises many types for damaged files
        raise ConfigError(f"{directory} is damaged ({_reason(error)})") from error
    broken = [k for k, v in fingerprints(tree).items() if v != expected.get(k)]
    if broken:
        raise ConfigError(f"{directory} is damaged or replaced: its values are not those that were written, in {', '.join(broken[:4])}")
    return tree


def host(tree):
    """Fully addressable copies on the host (gathered across processes where needed)."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def load_part(directory, part: str, target, step: int | None = None):
    """(tree, step): only the subtree `part` ("params/net", "ema/ema") of a run's state, from its newest intact checkpoint."""
    from orbax.checkpoint import v1 as ocp

    root = _absolute(directory)
    steps = sorted((int(p.name) for p in root.iterdir() if p.name.isdigit()), reverse=True)
    if not steps or (step is not None and step not in steps):
        raise ConfigError(f"no checkpoint{'' if step is None else f' of step {step}'} in {directory}; there are {steps[::-1]}")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    for candidate in steps if step is None else [step]:
        place = root / str(candidate)
        try:
            extra = _opened(ocp.load_checkpointables(place, {"extra": None})["extra"])
            wanted = target
            for name in reversed(part.split("/")):
                wanted = {name: wanted}
            with context:
                tree = ocp.load(place, wanted, checkpointable_name="state")
            if any(v != extra["fingerprints"].get(k) for k, v in fingerprints(tree).items()):
                raise OSError("values changed on disk")
            for name in part.split("/"):
                tree = tree[name]
            return tree, candidate
        except Exception as error:
            log.error("checkpoint %s cannot be read (%s)", place, _reason(error))
    raise ConfigError(f"no readable checkpoint with {part} in {directory}: tried {steps}")
