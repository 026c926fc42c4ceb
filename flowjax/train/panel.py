"""The panel: samples measured as training goes on, so that it shows when a reward is exploited, and when to stop.

A reward that is trained on says nothing of what is lost for it (2505.05470 section 5; reward hacking). Beside it, of the same samples:

    <reward>, <reward>/sd   every reward's mean and standard deviation, those that nobody trains on (held out) as well; where a metric
                            has the same name (agreement), reward/<reward> and reward/<reward>/sd
    diversity               the standard deviation among samples of one condition: its mean over dimensions and conditions
    kl                      nats to the reference, or to what the network began as: flowjax.evals.divergence, of unguided trajectories
    agreement               share of the samples that a judge assigns to the asked class (flowjax.evals)
    frechet/<features>      Frechet distance to the held-out data; kid/<features>

All are functions of the weights and of panel.seed: a resumed run measures what an uninterrupted one does. They are measured at the
start as well, as step 0. `stop` = {"kl": {"above": 5.0}, "agreement": {"below": 0.95}} ends the run once one of them is out of bounds:
what it read is saved with the checkpoint, so that the same command does not go on, and one with other bounds does.
"""

import numbers
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import conditions, generate, rewards, times
from flowjax.config import ConfigError, arguments, keywords
from flowjax.evals import evaluate as evals
from flowjax.evals import processes
from flowjax.evals.divergence import path_kl
from flowjax.objectives import groups
from flowjax.objectives.base import same_meaning
from flowjax.train import checkpoint

# Metrics of flowjax.evals that are told, and which of their numbers.
METRICS = {"agreement": None, "frechet": "distance", "kid": "distance"}


class Panel:
    """measure = Panel(run); measure(state) -> {"panel/...": value}, the same on every process. ConfigError for bad settings.

    began: a hash of the reference, where it is what the network began as and nobody else keeps it from changing; else "".
    """

    def __init__(self, this):
        self.this, self.section = this, this.config["panel"]
        section, role = self.section, this.roles["net"]
        if role.module.kind != "denoiser":
            raise ConfigError(f"panel.every = {section['every']}: a network of kind {role.module.kind!r} draws nothing; set it to 0")
        self.cond = this.asked(section)
        self.rewards, self.began = self._rewards(), ""
        self.reference, self.others = self._others()
        self.metrics, self.compared = self._metrics()
        self.groups = [rows for rows in _alike(self.cond, section["count"]) if len(rows) > 1]
        self.look = self._look()
        jax.eval_shape(self.look, (this.network, self.others), section["seed"], np.arange(section["count"]), self.cond)
        self.told = {k: f"reward/{k}" if k in self.metrics else k for k in self.rewards}
        self.names = [k + end for k in self.told.values() for end in ("", "/sd")] + ["diversity"] * bool(self.groups)
        self.names += ["kl"] * (self.reference is not None) + self.metrics
        self.rules = self._rules()

    def _rewards(self) -> list[str]:
        asked = keywords(self.this.config["objective"]).get("reward", {})
        names = self.section["rewards"] or ([asked] if isinstance(asked, str) else [*asked])
        if names:
            rewards.weights({name: 1.0 for name in names}, "panel.rewards")
        return list(names)

    def _others(self):
        """(role to compare with or None, parameters that take part besides the network's)."""
        this, others = self.this, {"codecs": self.this.codecs}
        if any("judge" in arguments(rewards.REWARDS[name]) for name in self.rewards) and "reward" in this.frozen:
            others["reward"] = this.frozen["reward"]
        reference = None
        if "reference" in this.frozen and this.roles["reference"].module.kind == "denoiser":
            reference, others["reference"] = this.roles["reference"], this.frozen["reference"]
            same_meaning(reference, this.roles["net"], "roles.reference", ("path",))
        elif "net" in this.loaded and not this.added["net"]:
            reference = this.roles["net"]
            # Copies: what the state begins with may be the loaded arrays themselves, and the step donates it.
            place = lambda p, s: jnp.copy(jax.device_put(jnp.asarray(p, s.dtype), s.sharding))  # noqa: E731
            if "net" not in this.frozen:
                others["reference"] = jax.tree.map(place, this.loaded["net"][0], this.network)
                self.began = checkpoint.fingerprint(others["reference"])
            elif (begun := reference.lora.begun(this.loaded["net"][0], this.tokenizer)) is not None:
                others["reference"] = this.whole("net", jax.tree.map(place, begun, this.target.params["net"]))
            else:
                others["reference"] = this.frozen["net"]
        return reference, others

    def _metrics(self):
        """(names, what flowjax.evals compares with and how)."""
        section, told = self.this.config["evaluate"], []
        for metric in self.section["metrics"]:
            if metric not in METRICS:
                raise ConfigError(f"panel.metrics: {metric!r} is unknown; valid: {', '.join(METRICS)}")
            if metric == "agreement" and "label" not in self.cond:
                raise ConfigError("panel.metrics: 'agreement' needs classes that samples are asked for, and this network has none")
            told += [metric] if METRICS[metric] is None else [f"{metric}/{keywords(net)['name']}" for net in section["features"]]
        if len({*told}) < len(told):
            raise ConfigError(f"panel.metrics and evaluate.features measure something twice: {', '.join(told)}")
        if not told:
            return [], ()
        if len(self.this.image_shape()) != 3:
            raise ConfigError(f"panel.metrics look at images, and samples have the shape {tuple(self.this.image_shape())}; set it to ()")
        data = evals.real(section["data"] or self.this.config["data"], {} if section["data"] else self.this.pipeline.manifest, section)
        settings = {k: section[k] for k in ("features", "judge")} | {"metrics": self.section["metrics"], "seed": self.section["seed"], "sampled": True}
        return told, (data, settings)

    def _look(self):
        """jitted ((params, others), seed, indices, cond) -> samples, and what is known of each of them."""
        this, section, role = self.this, self.section, self.this.roles["net"]
        shape, at = this.example[0].shape[1:], times.grid(
            section["steps"], role.path, prediction=role.prediction, **keywords(section["grid"])
        )  # fmt: skip
        sample = this.sampler({**section, "negative": ""})
        if section["noise"] <= 0:
            raise ConfigError(f"panel.noise = {section['noise']} should be positive: without noise there is no divergence")
        if self.reference is not None and section["steps"] < 2:
            raise ConfigError(f"panel.steps = {section['steps']} should be at least 2: the last step has no noise, and no divergence")

        def look(params, seed, indices, cond):
            (params, others), out = params, {}
            out["x"] = x = sample((params, others["codecs"]), seed, indices, cond)
            if "text" in others["codecs"]:
                cond = conditions.embed(this.roles["text"].net(others["codecs"]["text"]), cond)
            if self.rewards:
                nets = {"reward": this.roles["reward"].net(others["reward"])} if "reward" in others else {}
                _, out["rewards"] = groups.judged(nets, x, cond, {name: 1.0 for name in self.rewards})
            if self.reference is not None:
                net, other = (r.net(p).bind(cond) for r, p in ((role, params), (self.reference, others["reference"])))
                _, walk = generate.keys(seed, indices)
                out["kl"] = path_kl(net, other, generate.noise(seed, indices, shape) * role.path.b(jnp.float32(at[0])), walk, at, section["noise"])
            return out

        return this.jit(look)

    def _rules(self) -> dict[str, Mapping]:
        rules = self.section["stop"]
        for name, rule in rules.items():
            if name not in self.names:
                raise ConfigError(f"panel.stop.{name} is not measured by this run; valid: {', '.join(self.names)}")
            bounds = rule if isinstance(rule, Mapping) else {"": rule}
            if not bounds or {*bounds} - {"above", "below"} or not all(isinstance(v, numbers.Real) for v in bounds.values()):
                raise ConfigError(f"panel.stop.{name} = {rule!r} should be {{'above': number}}, {{'below': number}}, or both")
        return rules

    def __call__(self, state) -> dict[str, float]:
        this, section, found = self.this, self.section, {}
        average = this.average("net")
        params = this.whole("net", state.params["net"] if average is None else state.ema[average])
        batch = this.config["evaluate"]["batch"]
        seen = generate.run(self.look, (params, self.others), self.cond, section["count"], seed=section["seed"], batch=batch)
        for name, value in seen.get("rewards", {}).items():
            found |= {self.told[name]: np.mean(value), f"{self.told[name]}/sd": np.std(value)}
        if "kl" in seen:
            found["kl"] = np.mean(seen["kl"])
        x = np.asarray(seen["x"], np.float64)
        if self.groups:
            found["diversity"] = np.mean([x[rows].std(0, ddof=1).mean() for rows in self.groups])
        found |= self._evaluated(seen["x"])
        agreed = processes.agree(np.array([found[name] for name in self.names], np.float64))  # all have to stop together
        return {f"panel/{name}": float(value) for name, value in zip(self.names, agreed, strict=True)}

    def _evaluated(self, x) -> dict[str, float]:
        if not self.metrics or not np.isfinite(x).all():  # samples that are no numbers: neither is what is said of them
            return dict.fromkeys(self.metrics, np.nan)
        mine, label = processes.share(len(x)), self.cond.get("label")
        results, found = evals.evaluate(x[mine], None if label is None else label[mine], *self.compared), []
        for metric in self.section["metrics"]:
            number = METRICS[metric]
            found += [results[metric][metric]] if number is None else [each[number] for each in results[metric].values()]
        return dict(zip(self.metrics, found, strict=True))

    def halted(self, values: Mapping[str, float]) -> str:
        """Why to stop, or "": which of the values that were measured last is out of the bounds of panel.stop."""
        for name, bounds in self.rules.items():
            if (value := values.get(f"panel/{name}")) is None:
                continue
            for side, inside in (("above", lambda v, bound: v <= bound), ("below", lambda v, bound: v >= bound)):
                if side in bounds and not inside(float(value), bounds[side]):  # also what is not a number
                    return f"panel.stop: {name} = {float(value):.4g} is {f'{side} {bounds[side]}' if value == value else 'no number'}"
        return ""


def _alike(cond, count: int) -> list[np.ndarray]:
    """Numbers of the samples that are asked for the same, for each that is asked for."""
    found: dict[tuple, list[int]] = {}
    for i in range(count):
        found.setdefault(tuple(np.asarray(v[i]).tobytes() for v in cond.values()), []).append(i)
    return [np.asarray(rows) for rows in found.values()]
