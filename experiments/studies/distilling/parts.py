"""The data sets on which methods of distillation are compared: their teachers, and how students are trained and measured."""

import functools
import json
import pathlib
import time

import numpy as np

from experiments.studies import common, digits, emoji, mnist

# Network passes of a step of a sampler.
PASSES = {"euler": 1, "heun": 2, "rk4": 4}


def cost(settings: dict) -> float:
    """FLOP of one train step, on average where a player acts in every few steps only (all of one pace, if several)."""
    from flowjax.models import flops
    from flowjax.train.assembly import Run

    run = Run(settings)
    step = run.step(), run.target, run.frozen, run.batch()
    full, rest, pace = flops.count(*step), flops.count(*step, branch=min), max(run.every.values())
    return rest + (full - rest) / pace


class Part:
    """One data set, its teacher, and how students of it are trained and measured.

    name, base (a config) and arg of it, model (changes of its network), budget (steps of the teacher's training), rate (of students),
    guidance (of the teacher, a section or None), finest (its steps, for progressive distillation), couplings (how they are made), flow
    (settings of flow matching), half (changes that make the network half as wide), steps (in which students are sampled); leaves_out
    (methods that are not for it, by a part of their names), only (if any, the methods that are), classes (or captions: without them there is
    no distance to data, and nothing is said of what was published); spent: what was trained and made
    since it was emptied, [{"budget": steps of the teacher's training, "seconds": or None, "couplings": whether}, ...].
    """

    arg, model, flow, smooth, steps, leaves_out, only = "", {}, {}, {"time_scale": 1.0}, (1, 2, 4, 8, 50), ("tangent",), ()
    plain = {"meanflow": {}, "scm_training": {}}
    half: dict = {}
    notes: tuple = ()
    classes = True

    def __init__(self):
        self.spent = []

    def config(self, seed: int, **changes) -> dict:
        """The teacher's own config."""
        return common.config(self.base, self.arg, seed=seed, **changes)

    def own(self, seed: int) -> dict:
        """The config of the teacher's training, on what students are trained on."""
        return self.config(seed, batch_size=self.batch, model=self.model)

    def roles(self, seed: int) -> dict:
        """Frozen networks that the teacher works with."""
        return {}

    def train(self, name: str, seed: int, objective: dict, roles: dict, *, share: float = 1.0, guided: bool = False, **changes):
        """Workdir of a student; `share` of the budget. guided: the objective wraps the teacher in its guidance. Sections among
        `changes` change those of the teacher's config, but for data, optimizer and evaluations, which they replace."""
        if guided and self.guidance:
            objective = objective | {"guidance": self.guidance}
        settings = self.own(seed)
        settings |= {
            "objective": objective, "roles": {role: v if isinstance(v, dict) else {"checkpoint": str(v)} for role, v in roles.items()} | self.roles(seed),
            "optimizer": {"name": "adamw", "clip": 1.0, "schedule": {"name": "cosine", "rate": self.rate, "warmup": 20}},
            "ema": {"ema": {"name": "warmup", "decay": 0.99}}, "steps": 1,
        }  # fmt: skip
        settings["sample"] |= {"every": 0, "guidance": "none"}
        settings["validation"] |= {"every": 0}
        for key, value in changes.items():
            settings[key] = settings[key] | value if key in ("model", "ema", "sample") else value
        workdir = f"distillation/{self.name}/{self.budget}/{name}/{seed}"
        # The cost is that of the first time, so that a workdir is found again without asking for it.
        file = pathlib.Path(common.RUNS.value) / workdir / "config.json"
        known = json.loads(file.read_text())["config"]["steps"] if file.exists() else 0
        settings["steps"] = known or max(1, round(share * self.budget * self.unit() / cost(settings)))
        settings["checkpoint"] |= {"every": settings["steps"]}
        made = common.train(workdir, settings)
        self.spent.append({"budget": share * self.budget, "seconds": seconds(made), "couplings": False})
        return made

    @property
    def scratch(self) -> dict:
        """Changes for a network that begins from nothing: the teacher's own optimizer."""
        return {"optimizer": self.own(0)["optimizer"]}

    @functools.cache
    def unit(self) -> int:
        """FLOP of a step of the teacher's own training."""
        return cost(self.own(0) | {"roles": self.roles(0)})

    def coupled(self, source, name: str, seed: int, guided: bool) -> dict:
        """The data section of couplings made by a checkpoint."""
        made_by = "" if name == "teacher" else f"{self.budget}/"
        out = pathlib.Path(common.RUNS.value).absolute() / f"distillation/{self.name}/{made_by}couplings/{name}/{seed}"
        clock, guided = out.with_suffix(".seconds"), guided and bool(self.guidance)
        if not (out / "manifest.json").exists():
            how = [f"--{k}={v}" for k, v in self.couplings.items()] + ["--guidance=" + (str(self.guidance["scale"]) if guided else "none")]
            began = time.monotonic()
            common.binary("tools.make_couplings", f"--checkpoint={pathlib.Path(source).absolute()}", f"--out={out}", f"--seed={1000 + seed}", *how)
            clock.write_text(f"{time.monotonic() - began:.1f}")
        self.spent.append({
            "budget": self.passes(guided) / (3 * self.batch), "seconds": float(clock.read_text()) if clock.exists() else None, "couplings": True,
        })  # fmt: skip
        return {"name": "array_record", "path": str(out)}

    def passes(self, guided: bool) -> int:
        """Network passes of one image that couplings take; a train step has three of every image of its batch."""
        how = self.couplings
        return how["count"] * how["steps"] * PASSES[how["sampler"]] * (1 + guided)

    def straightness(self, workdir, seed: int) -> float:
        """E int |(z - x) - v|^2 dt per dimension along the trajectories of a network (2209.03003 eq. 7), kept beside it: 0 where one step is as
        good as many. The teacher's are guided."""
        file = pathlib.Path(workdir) / "study" / "straightness.json"
        if not file.exists():
            teacher = pathlib.Path(workdir) == pathlib.Path(self.teacher(seed))
            value = straightness(workdir, self.guidance if teacher else None, self.weights(workdir, seed), seed=seed)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(value))
        return json.loads(file.read_text())

    def weights(self, workdir, seed: int) -> str:
        """Which weights of a checkpoint are sampled."""
        return "ema"

    def floor(self, seed: int) -> dict:
        """What the measures are of true samples, where that is known."""
        return {}


class Plane(Part):
    """Four Gaussians without labels."""

    name, base, model, batch, budget, rate, guidance, finest = "plane", "mix4", {"num_classes": 0}, 1024, 3000, 1e-3, None, 32
    smooth = {"time_scale": 10.0}  # of networks that are differentiated by t
    # Norms of single examples, which hardly differ between images, favour some points of a plane over others.
    plain = {"meanflow": {"power": 0.0}, "scm_training": {"normalise": False}}
    couplings = {"count": 50_000, "sampler": "rk4", "steps": 50, "batch": 5000}
    half, steps, leaves_out = {"width": 64}, (1, 2, 4, 8), ("LoRA",)
    measures = {
        "sliced W2": "sliced 2-Wasserstein distance of 20,000 points to 20,000 of the mixture", "W2": "2-Wasserstein distance of 1,500 to 1,500",
        "rarest": "points % nearest to the Gaussian that has the fewest (25 % are right)",
    }  # fmt: skip
    modes = "rarest"

    def own(self, seed):
        return self.config(seed, batch_size=self.batch, model=self.model, objective={"label_drop": 0.0})

    def start(self, seed):
        """What students start as: a network trained on the data, which is not the teacher."""
        settings = self.own(seed)
        settings["sample"]["every"] = 0
        return common.train(f"distillation/plane/start/{seed}", settings)

    def teacher(self, seed):
        """An export of the exact network."""
        import jax

        from flowjax.models.mixture import Mixture
        from flowjax.train import export

        out = pathlib.Path(common.RUNS.value) / "distillation/plane/exact"
        if not (out / "config.json").exists():
            params = Mixture().init(jax.random.key(0), np.zeros((1, 2), np.float32), np.ones(1, np.float32), {})["params"]
            info = {
                "model": {"name": "mixture"}, "path": {"name": "rectified"}, "prediction": "velocity", "shape": [2], "num_classes": 0,
                "image_shape": [2], "conditions": {}, "config": self.own(seed), "step": 0, "weights": "exact",
            }  # fmt: skip
            export.write(out, params, info)
        return out

    def weights(self, workdir, seed):
        return "exact" if pathlib.Path(workdir) == self.teacher(seed) else "ema"

    def measure(self, workdir, seed, steps, sampler, guidance=None):
        return distances(common.draw(workdir, {}, 20_000, seed=seed, steps=steps, sampler=sampler, weights=self.weights(workdir, seed)), seed)

    def floor(self, seed):
        return distances(truth(20_000, 100 + seed), seed)


class Images(Part):
    """Images of ten classes."""

    features, metrics, modes = "pixels", ("frechet", "agreement", "prdc"), "recall"
    half = {"width": 48}
    measures = {
        "ratio": "Frechet distance to held-out images, divided by that of the training images", "agreement": "class agreement %, by a scikit-learn SVM",
        "precision": "precision % (samples near held-out images)", "recall": "recall % (held-out images near samples)",
        "coverage": "coverage of held-out images %",
    }  # fmt: skip

    def start(self, seed):
        return self.teacher(seed)

    def pictures(self, seed: int) -> dict:
        """The data section of what samples are compared with."""
        return self.config(seed)["data"]

    def measure(self, workdir, seed, steps, sampler, guidance=None):
        """guidance: a section, by default that of the teacher for it and none for students."""
        if guidance is None and workdir == self.teacher(seed):
            guidance = self.guidance["scale"]
        how = {"seed": seed, "steps": steps, "sampler": sampler, "guidance": guidance}
        found = common.measure(workdir, metrics=self.metrics, features=(self.features,), data=self.pictures(seed), **how)
        near = {k: 100 * v for k, v in next(iter(found["prdc"].values())).items() if k in self.measures}
        return {"ratio": common.frechet(found)["ratio"], "agreement": 100 * found["agreement"]["agreement"], **near}

    def speed(self, workdir, seed: int, steps: int, sampler: str, guidance=None) -> float:
        """Images a second, the best of three times 1,000, kept beside the network: clocks of a busy machine differ from day to day."""
        file = pathlib.Path(workdir) / "study" / f"speed_{steps}.json"
        if not file.exists():
            times, labels = [], np.arange(1000) % 10
            for _ in range(4):  # the first of which compiles
                began = time.monotonic()
                common.draw(workdir, {"label": labels}, len(labels), seed=seed, steps=steps, sampler=sampler, guidance=guidance)
                times.append(time.monotonic() - began)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(len(labels) / min(times[1:])))
        return json.loads(file.read_text())


class Digits(Images):
    """8x8 digits by class."""

    name, base, batch, budget, rate, guidance, finest = "digits", "digits", 128, 1500, 5e-4, {"name": "cfg", "scale": 1.5}, 16
    couplings = {"count": 10_000, "sampler": "rk4", "steps": 10, "batch": 500}
    notes = (
        "All are guided (scale 1.5), which raises agreement and distance alike, but consistency training, LADD, sCM training and IMM. Not counted is the",
        "classifier in whose features images are compared.", "",
    )  # fmt: skip

    def teacher(self, seed):
        return digits.teacher(seed)

    def judge(self, seed):
        """A network in whose features images are compared."""
        return common.train("distillation/digits/classifier/0", common.config("digits_classifier", "clean", seed=0))


class Mnist(Images):
    """MNIST by class, on the latents of the autoencoder of experiments.study mnist."""

    name, base, batch, budget, rate, guidance, finest = "mnist", "mnist_latent", 128, 1500, 5e-4, {"name": "cfg", "scale": 2.0}, 16
    features, leaves_out = "pca", ("tangent", "perceptual")  # whose features would have to be those of latents
    couplings = {"count": 10_000, "sampler": "rk4", "steps": 10, "batch": 500}
    notes = ("All are guided (scale 2), but consistency training, LADD, sCM training and IMM.", "")

    @property
    def arg(self):
        return common.DATA.value or "data/mnist"

    def teacher(self, seed):
        return mnist.teacher(seed)

    def roles(self, seed):
        return {"vae": {"checkpoint": str(mnist.autoencoder().absolute())}}

    def own(self, seed):
        """On latents that were made once."""
        out = pathlib.Path(common.RUNS.value).absolute() / "distillation/mnist/latents"
        if not (out / "manifest.json").exists():
            common.binary("tools.encode_latents", f"--vae={self.roles(seed)['vae']['checkpoint']}", f"--out={out}")
        return super().own(seed) | {"data": {"name": "array_record", "path": str(out)}, "roles": self.roles(seed)}


class Pixels(Images):
    """MNIST by class, in pixels; JiT, which predicts the image."""

    name, base, batch, budget, rate, guidance, finest = "pixels", "mnist_jit", 128, 1500, 5e-4, {"name": "cfg", "scale": 2.0}, 16
    features, half = "pca", {"width": 64}
    flow = {"weight": {"name": "velocity", "floor": 0.05}}
    # Those of mean velocities, which JiT is not for, and sCM, which nothing holds to the data where x is predicted.
    leaves_out = ("tangent", "perceptual", "MeanFlow", "shortcut", "IMM", "sCM")
    couplings = Mnist.couplings
    notes = Mnist.notes

    arg = Mnist.arg

    def teacher(self, seed):
        return common.train(f"mnist_jit/{seed}", self.config(seed))


class Emoji(Part):
    """64x64 emoji from captions; JiT. Five methods, the others' order being known from smaller images."""

    name, base, batch, budget, rate, guidance, finest = "emoji", "emoji_pixel", 64, 1000, 5e-4, {"name": "cfg", "scale": 3.0}, 16
    flow, steps, classes = Pixels.flow, (1, 2, 4, 8), False
    couplings = {"count": 4000, "sampler": "heun", "steps": 10, "batch": 100}
    only = (
        "reflow, then output (InstaFlow)", "progressive distillation", "consistency distillation", "distribution matching, 1 step",
        "adversarial distillation (LADD)",
    )  # fmt: skip
    notes = ("All are guided (scale 3), but LADD.", "")
    measures = {
        "train": "images % of whose training captions two towers find the right one of 100", "test": "the same of held-out captions",
    }  # fmt: skip

    @property
    def arg(self):
        return common.DATA.value or "data/emoji"

    def teacher(self, seed):
        return emoji.teacher(seed)

    start = teacher

    def coupled(self, source, name, seed, guided):
        return super().coupled(source, name, seed, guided) | {"text": self.config(seed)["data"]["text"]}

    def measure(self, workdir, seed, steps, sampler, guidance=None):
        if guidance is None and workdir == self.teacher(seed):
            guidance = self.guidance["scale"]
        how = {"seed": seed, "steps": steps, "sampler": sampler, "guidance": guidance}
        return common.kept(workdir, how | {"captions": emoji.COUNT.value}, lambda: emoji.scores(workdir, self.config(seed)["data"], **how))


PARTS = {part.name: part for part in (Plane, Digits, Mnist, Pixels, Emoji)}


def seconds(workdir) -> float | None:
    """Of the steps of a run: without what compiles and what starts."""
    file = pathlib.Path(workdir) / "goodput.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text())["seconds"]
    return found["step"] + found["data"]


def straightness(workdir, guidance, weights: str, *, count: int = 500, steps: int = 100, seed: int = 0) -> float:
    """Mean over `count` trajectories, their dimensions and `steps` Euler steps of ((z - x) - v)^2, on paths whose length in t is 1."""
    import jax

    from flowjax import generate, samplers, times
    from flowjax.config import build
    from flowjax.guidance import GUIDANCE
    from flowjax.train import export

    role, params, info = export.load(workdir, weights)
    model, at = role.net(params), np.asarray(times.grid(steps, role.path, prediction=role.prediction))
    if guidance:
        model = build(GUIDANCE, guidance, "guidance", model=model)
    z = generate.noise(seed, np.arange(count), tuple(info["shape"]))
    cond = {"label": np.arange(count, dtype=np.int32) % info["num_classes"]} if info["num_classes"] else {}
    walk = jax.jit(lambda z, cond: samplers.sample(model, z, jax.random.key(0), at, "euler", cond=cond, return_trajectory=True)[1])
    return bend(np.asarray(walk(z, cond), np.float64), at)


def bend(states: np.ndarray, at: np.ndarray) -> float:
    """The measure of `straightness` of states (N + 1, B, ...) at times (N + 1,) that fall from 1 to 0."""
    lengths = (at[:-1] - at[1:]).reshape(-1, *(1,) * (states.ndim - 1))
    velocity = (states[:-1] - states[1:]) / lengths
    return float(np.sum(lengths * (states[0] - states[-1] - velocity) ** 2) / states[0].size)


def distances(x, seed: int) -> dict:
    """What the plane measures of 20,000 points."""
    true = truth(len(x), seed)
    return {"sliced W2": sliced(x, true), "W2": wasserstein(x[:1500], true[:1500]), "rarest": rarest(x)}


def truth(count: int, seed: int) -> np.ndarray:
    """Points of the four Gaussians."""
    import jax

    from flowjax import exact

    return np.asarray(exact.mix4().sample(jax.random.fold_in(jax.random.key(7), seed), count))


def rarest(x) -> float:
    """Share, in percent, of the points that are nearest to the mean which has the fewest."""
    from flowjax import exact

    means = exact.mix4().means
    nearest = np.argmin(((np.asarray(x)[:, None] - means) ** 2).sum(-1), axis=1)
    return float(100 * np.bincount(nearest, minlength=len(means)).min() / len(x))


def wasserstein(a, b) -> float:
    """2-Wasserstein distance of two equal numbers of points (N, D): root of the mean squared distance of the best pairing."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    costs = cdist(a, b, "sqeuclidean")
    return float(np.sqrt(costs[linear_sum_assignment(costs)].mean()))


def sliced(a, b, directions: int = 180) -> float:
    """Sliced 2-Wasserstein distance of two equal numbers of points of the plane: the root of the mean square over directions, in each of
    which points are paired in order. Of a shift by v it is |v| / sqrt 2."""
    angles = np.pi * np.arange(directions) / directions
    lines = np.stack([np.cos(angles), np.sin(angles)])
    a, b = (np.sort(np.asarray(v, np.float64) @ lines, axis=0) for v in (a, b))
    return float(np.sqrt(np.mean((a - b) ** 2)))
