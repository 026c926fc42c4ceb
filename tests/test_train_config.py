"""No config value is unread, no key is unknown: refusals at every level, and a visible effect of every default."""

import importlib
import json
import pathlib

import jax
import pytest

from flowjax.config import ConfigError
from flowjax.train import loop, settings
from flowjax.train.assembly import Run
from binaries import shell_in
from train_runs import DIT, rows, tiny, train

ROOT = pathlib.Path(__file__).resolve().parent.parent
ADAM = {"name": "adamw", "schedule": {"name": "constant"}}


def refused(message, tmp_path, **changes):
    """The run stops with `message` and leaves nothing behind."""
    with pytest.raises(ConfigError, match=message):
        loop.run(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_top_level_key(tmp_path):
    with pytest.raises(ConfigError, match="config.step is unknown; valid: seed, steps"):
        tiny(step=3)
    # What the command line can do past the lock.
    config = tiny().to_dict() | {"step": 3}
    with pytest.raises(ConfigError, match="config.step is unknown; valid: seed, steps"):
        loop.run(config, tmp_path / "run")


FLOW = {"name": "flow_matching"}
UNKNOWN = {
    "log": ({"log": {"ever": 1}}, "log.ever is unknown; valid: every, tensorboard, progress"),
    "mesh": ({"mesh": {"pipeline": 2}}, "mesh.pipeline is unknown; valid: data, fsdp, tensor, context"),
    "checkpoint": ({"checkpoint": {"max": 2}}, "checkpoint.max is unknown; valid: every, keep, keep_every, best"),
    "validation": ({"validation": {"batch": 2}}, "validation.batch is unknown; valid: every, batches, split"),
    "sample": ({"sample": {"nfe": 2}}, "sample.nfe is unknown; valid: steps, sampler"),
    "evaluate": ({"evaluate": {"fid": 1}}, "evaluate.fid is unknown; valid: count, metrics"),
    "data": ({"data": {"name": "mix4", "flop": True}}, "data.flop is unknown for mix4; valid: "),
    "data name": ({"data": "mix5"}, "data.name = 'mix5' is unknown; valid: "),
    "model": ({"model": {"name": "mlp", "widht": 3}}, "model.widht is unknown; valid: width, depth"),
    "model name": ({"model": "mlpp"}, "model.name = 'mlpp' is unknown; valid: autoencoder_kl"),
    "path": ({"path": {"name": "rectified", "shift": 2}}, "path.shift is unknown"),
    "prediction": ({"prediction": "flow"}, "prediction = 'flow' is unknown; valid: .*velocity"),
    "objective": ({"objective": FLOW | {"label_dorp": 0.1}}, "objective.label_dorp is unknown; valid: .*label_drop"),
    "objective name": ({"objective": "flow"}, "objective.name = 'flow' is unknown; valid: .*consistency"),
    "objective.time": ({"objective": FLOW | {"time": {"name": "uniform", "statified": True}}}, "statified is unknown for uniform; valid: .*stratified"),
    "objective.time name": ({"objective": FLOW | {"time": "unifrom"}}, "'unifrom' is unknown; valid: .*uniform"),
    "objective.weight": ({"objective": FLOW | {"weight": "min_snrr"}}, "'min_snrr' is unknown; valid: .*min_snr"),
    "optimizer": ({"optimizer": ADAM | {"lr": 1.0}}, "optimizer.lr is unknown for adamw; valid: schedule, clip"),
    "optimizer.schedule": ({"optimizer": {"name": "adamw", "schedule": {"name": "cosine", "peak": 1}}}, "schedule.peak is unknown; valid: rate"),
    "optimizer.rules": ({"optimizer": ADAM | {"rules": ({"match": "out", "lr": 0},)}}, r"rules\[0\].lr is unknown; valid: match, rate, decay"),
    "optimizer.rules match": ({"optimizer": ADAM | {"rules": ({"match": "nothing"},)}}, "matches no parameter; parameters: .*x_embed/kernel"),
    "sampler": ({"sample": {"sampler": "huen"}}, "'huen' is unknown; valid: .*heun"),
    "sampler key": ({"sample": {"sampler": {"name": "ddim", "etta": 1}}}, "etta is unknown; valid: .*eta"),
    "grid": ({"sample": {"grid": "unifrom"}}, "'unifrom' is unknown; valid: .*uniform"),
    "guidance": ({"sample": {"guidance": {"name": "cfg", "sclae": 2.0}}}, "sample.guidance.sclae is unknown; valid: .*scale"),
    "guidance name": ({"sample": {"guidance": "cgf"}}, "sample.guidance.name = 'cgf' is unknown; valid: .*cfg"),
    "ema": ({"ema": {"ema": {"name": "constant", "rate": 0.9}}}, "ema.ema.rate is unknown; valid: decay, of, snapshot_every"),
    "ema of": ({"ema": {"ema": {"name": "constant", "of": "critic"}}}, "ema.ema.of = 'critic' is not a trained role; valid: net"),
    "roles": ({"roles": {"teacher": {"checkpoint": "x"}}}, "roles.teacher takes no part in objective .*; valid: net, perceptual, text, vae"),
    "roles key": ({"roles": {"net": {"chekpoint": "x"}}}, "roles.net.chekpoint is unknown; valid: checkpoint, weights"),
    "rules": ({"rules": {"mpl": None}}, "rules.mpl is unknown; valid: batch, seq"),
    "rules axis": ({"rules": {"mlp": "model"}}, "no mesh axis 'model'; valid: data, fsdp, tensor"),
    "metric": ({"evaluate": {"metrics": ("fid",)}}, "evaluate.metrics.name = 'fid' is unknown; valid: agreement"),
    "features": ({"evaluate": {"features": ("inception",)}}, "evaluate.features.name = 'inception' is unknown; valid: classifier"),
    "judge": ({"evaluate": {"judge": "clip"}}, "evaluate.judge.name = 'clip' is unknown; valid: .*svm"),
    "label rule": ({"evaluate": {"labels": "even"}}, "evaluate.labels = 'even' is unknown; valid: balanced, random"),
    "split": ({"validation": {"every": 1, "split": "tset"}, "data": {"name": "digits"}, "model": DIT}, "tset"),
    "best": ({"checkpoint": {"best": "fid"}}, "checkpoint.best = 'fid' is not measured by this run; valid: "),
}


@pytest.mark.parametrize("changes, message", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_is_refused_with_the_valid_ones(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loop.run(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__"))
def test_the_argument_of_a_config_is_used_or_refused(name):
    get_config = importlib.import_module(f"configs.{name}").get_config
    try:
        config = get_config("smok")
    except ConfigError as error:
        assert "smok" in str(error)
    else:
        assert "smok" in json.dumps(config.to_dict())  # a path of data


WRONG = {
    "type int": ({"steps": "4"}, "config.steps = '4' should be int"),
    "type bool": ({"seed": True}, "config.seed = True should be int"),
    "type section": ({"log": {"every": 1.5}}, "log.every = 1.5 should be int"),
    "type model": ({"model": {"name": "mlp", "width": "wide", "num_classes": 4}}, "model.width = 'wide' should be int"),
    "no section": ({"ema": "power"}, "config.ema = 'power' should be a section"),
    "no role section": ({"roles": {"net": "x"}}, "config.roles.net = 'x' should be a section"),
    "zero steps": ({"steps": 0}, "config.steps = 0 should be at least 1"),
    "zero log": ({"log": {"every": 0}}, "config.log.every = 0 should be at least 1"),
    "negative every": ({"checkpoint": {"every": -1}}, "config.checkpoint.every = -1 should be at least 0"),
    "negative role every": ({"roles": {"net": {"every": -1}}}, "config.roles.net.every = -1 should be at least 0"),
    "no updates": ({"roles": {"net": {"updates": 0}}}, "config.roles.net.updates = 0 should be at least 1"),
    "updates of the batch": ({"roles": {"net": {"updates": 3}}}, "batch_size = 16 .* of updates x accumulate x data x fsdp = 3 x 1 x 8"),
    "keep none": ({"checkpoint": {"keep": 0}}, "config.checkpoint.keep = 0 should be at least 1"),
    "batch": ({"batch_size": 12}, "batch_size = 12 .global. must be a multiple"),
    "classes": ({"model": {"name": "mlp", "num_classes": 3}}, "model.num_classes = 3 but the data has 4 classes"),
    "no labels": ({"data": "checkerboard"}, "model.num_classes = 4 but the data has no labels"),
    "drop without classes": ({"model": "mlp", "objective": FLOW | {"label_drop": 0.1}}, "label_drop"),
    "no teacher": ({"objective": "consistency_distillation", "ema": {"target": "constant"}}, "roles.teacher.checkpoint is missing"),
    "no target": ({"objective": "consistency_training"}, "needs an average ema.target of net"),
    "no pairs": ({"objective": "diffusion_dpo"}, "roles.reference.checkpoint is missing"),
    "weights of nothing": ({"roles": {"net": {"weights": "params"}}}, "roles.net.weights chooses among the weights of roles.net.checkpoint, which is missing"),
    "net's own optimizer": ({"roles": {"net": {"optimizer": ADAM}}}, "roles.net takes its network and optimizer from the config"),
    "mesh": ({"mesh": {"data": 3}}, "mesh = .* does not fit 8 devices"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_wrong_values_are_refused(changes, message, tmp_path):
    refused(message, tmp_path, **changes)


@pytest.mark.parametrize("key", ["data", "model", "objective", "optimizer"])
def test_missing_sections_are_named(key, tmp_path):
    config = {k: v for k, v in tiny().to_dict().items() if k != key}
    with pytest.raises(ConfigError, match=f"config lacks {key}"):
        loop.run(config, tmp_path / "run")


def test_a_workdir_belongs_to_one_configuration(tmp_path):
    train(tiny(), tmp_path / "run", stop_at=1)
    before = (tmp_path / "run" / "config.json").read_text()
    for changes, message in [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"batch_size": 32}, "batch_size: 16 -> 32"),
        ({"objective": FLOW | {"label_drop": 0.2}}, "objective.label_drop: 0.1 -> 0.2"),
        ({"steps": 8}, "steps: 4 -> 8 changes the learning rate's schedule"),
        ({"ema": {}}, "ema.ema: "),
    ]:
        with pytest.raises(ConfigError, match=f"belongs to a run with other settings(.|\n)*{message}"):
            train(tiny(**changes), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == before
    # What does not touch the computation may change.
    assert train(tiny(log={"every": 2, "tensorboard": False, "progress": False}, checkpoint={"every": 1, "keep": 1}), tmp_path / "run")[0] == 4


# --- every default is read: changing it is visible in the run, or an error


def leaves(section, prefix=()):
    for key, value in section.items():
        if isinstance(value, dict) and value and "name" not in value:
            yield from leaves(value, (*prefix, key))
        else:
            yield ".".join((*prefix, key))


class Watched(dict):
    """A dict that remembers which of its keys were asked for."""

    def __init__(self, values, seen, prefix=""):
        super().__init__({k: Watched(v, seen, f"{prefix}{k}.") if type(v) is dict else v for k, v in values.items()})
        self.seen, self.prefix = seen, prefix

    def __getitem__(self, key):
        self.seen.add(self.prefix + key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(self.prefix + key)
        return super().get(key, default)

    def __iter__(self):  # without it, ** would go past this class
        return super().__iter__()

    def items(self):
        self.seen |= {self.prefix + k for k in self}
        return super().items()

    def keys(self):
        # dict(section) and **section read everything.
        self.seen |= {self.prefix + k for k in super().keys()}
        return super().keys()


def test_every_setting_is_read(tmp_path, monkeypatch):
    """Whatever settings.defaults() offers is looked at by a run with everything switched on, or by experiments.evaluate."""
    seen = set()
    resolve = settings.resolve
    monkeypatch.setattr(settings, "resolve", lambda config: Watched(resolve(config), seen))
    dumps = json.dumps

    def unseen(value, **options):  # writing down is not reading
        before = set(seen)
        text = dumps(value, **options)
        seen.intersection_update(before)
        return text

    monkeypatch.setattr(json, "dumps", unseen)
    monkeypatch.setattr(loop.card, "write", lambda workdir, facts: "")
    config = tiny(
        steps=2, sample={"every": 1, "steps": 1, "count": 4, "sampler": "euler"}, validation={"every": 1, "batches": 1},
        roles={"net": {}}, log={"every": 1, "tensorboard": False, "progress": False}, checkpoint={"every": 0},
        data="digits", model=DIT | {"depth": 1}, panel={"every": 1, "count": 20, "steps": 1, "sampler": "euler", "metrics": ("frechet",)},
    )  # fmt: skip
    train(config, tmp_path / "run")
    by_evaluate = {"evaluate." + k for k in ("count", "seed")}
    everything = set(leaves(settings.defaults()))
    assert everything - seen == by_evaluate
    source = (ROOT / "experiments" / "evaluate.py").read_text()
    for key in by_evaluate:
        assert f'section["{key.removeprefix("evaluate.")}"]' in source, key


@pytest.mark.slow
def test_every_setting_has_an_effect(tmp_path):
    """Changing any one setting of training changes the record of the run or what it leaves behind."""
    base = dict(steps=2, validation={"every": 2, "batches": 1}, sample={"every": 2, "steps": 1, "count": 4, "sampler": "euler"})

    def outcome(name, **changes):
        workdir = tmp_path / name
        train(tiny(**(base | changes)), workdir)
        pictures = {p.name: p.read_bytes() for p in (workdir / "samples").glob("*.png")} if (workdir / "samples").exists() else {}
        files = {str(p.relative_to(workdir)) for p in workdir.rglob("*") if p.suffix == ".png" or "tfevents" in p.name or p.name.isdigit()}
        return rows(workdir), pictures, {f.split("events")[0] for f in files}

    want = outcome("base")
    assert outcome("again") == want
    quiet = {"tensorboard": False, "progress": False}
    changed = {
        "seed": {"seed": 1}, "accumulate": {"accumulate": 2}, "batch_size": {"batch_size": 24}, "steps": {"steps": 1},
        "log.every": {"log": {"every": 2, **quiet}}, "log.tensorboard": {"log": {"every": 1, **quiet, "tensorboard": True}},
        "validation.every": {"validation": {"every": 1, "batches": 1}}, "validation.batches": {"validation": {"every": 2, "batches": 2}},
        "validation.split": {"validation": {"every": 2, "batches": 1, "split": "train"}},
        "sample.seed": {"sample": base["sample"] | {"seed": 1}}, "sample.steps": {"sample": base["sample"] | {"steps": 2}},
        "sample.count": {"sample": base["sample"] | {"count": 5}}, "sample.every": {"sample": base["sample"] | {"every": 1}},
        "checkpoint.every": {"checkpoint": {"every": 1}}, "prediction": {"prediction": "eps"}, "ema": {"ema": {}},
        "path": {"path": {"name": "trigonometric"}},
    }  # fmt: skip
    without = [name for name, changes in changed.items() if outcome(name.replace(".", "_"), **changes) == want]
    assert not without
    assert jax.device_count() == 8


def test_defaults_resolve_to_themselves():
    resolved = Run(tiny()).config
    assert settings.resolve(resolved) == resolved == json.loads(json.dumps(resolved))
    assert resolved["roles"] == {} and resolved["path"] == {"name": "rectified"}
    assert settings.differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 2}, "d": 3}) == ["a.b: 1 -> 2", "c: 2 -> None", "d: None -> 3"]


# --- the command line


def test_a_name_in_place_of_a_section_and_a_config_that_is_not_there(tmp_path):
    run, config = shell_in(tmp_path), f"--config={ROOT}/configs/digits.py:smoke"
    said = run("experiments.train", "--config=configs/nowhere.py:smoke", "--workdir=w", code=2)
    assert "error: --config=configs/nowhere.py: no such file" in said and "Traceback" not in said
    # Two names for sections; the second is no name of a schedule. Without guidance's being a name the first would have ended it.
    said = run("experiments.train", config, "--workdir=w", "--config.sample.guidance=none", "--config.optimizer.schedule=none", code=2)
    assert "error: optimizer.schedule.name = 'none' is unknown; valid: constant" in said and "Traceback" not in said
    assert settings.resolve(tiny(sample={"guidance": {"name": "none"}}))["sample"]["guidance"] == "none"
