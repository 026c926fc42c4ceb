"""What a run's parts have to have in common: each check is a ConfigError that names the setting, found before the first step.

`run` is a flowjax.train.assembly.Run, as far as it is built where the check is called.
"""

from flowjax import conditions
from flowjax.config import ConfigError, bind, keywords, lookup
from flowjax.data import text as text_lib
from flowjax.data.sources import MARK
from flowjax.models import sharding
from flowjax.train import checkpoint
from flowjax.train import mesh as mesh_lib
from flowjax.train.roles import domain, same_domain


def evaluation(section):
    """ConfigError where config.evaluate names what does not exist: found before the training, not after it."""
    from flowjax.evals import agreement, evaluate, features, protocol

    for metric in section["metrics"]:
        bind(evaluate.METRICS, metric, "evaluate.metrics", ("sets",))
    for network in section["features"]:
        bind(features.FEATURES, network, "evaluate.features", ("images", "labels", "cache"))
    bind(agreement.JUDGES, section["judge"], "evaluate.judge", ("images", "labels"))
    lookup(protocol.LABEL_RULES, section["labels"], "evaluate.labels")


def rules(section):
    """ConfigError unless config.rules moves known logical axes to axes of the mesh."""
    if unknown := {*section} - {*sharding.RULES}:
        raise ConfigError(f"rules.{min(unknown)} is unknown; valid: {', '.join(sharding.RULES)}")
    for name, axes in section.items():
        if wrong := {*((axes,) if isinstance(axes, str) else axes or ())} - {*mesh_lib.AXES}:
            raise ConfigError(f"rules.{name} = {axes!r}: no mesh axis {min(wrong)!r}; valid: {', '.join(mesh_lib.AXES)}, None")


def classes(run):
    """ConfigError where the networks are of another kind than the data, or made for another number of classes."""
    if (run.pipeline.dtype == "int32") != (kind := run.roles["net"].module.kind == "language_model"):
        raise ConfigError("a language model learns from texts, and the data are none" if kind else "the data are texts, for a language model")
    if not any(r.module.kind in ("denoiser", "reward") for r in run.roles.values()):
        return
    count = getattr(run.roles["net"].module, "num_classes", 0)
    have = run.pipeline.num_classes
    if count and have and count != have:
        raise ConfigError(f"model.num_classes = {count} but the data has {have} classes")
    if count and not have:
        raise ConfigError(f"model.num_classes = {count} but the data has no labels; set it to 0")


def data(run):
    """ConfigError where the data hold what the objective has no use for, or lack what it weighs."""
    objective = run.config["objective"]
    if "z" in run.columns and not run.objective.coupled:
        raise ConfigError(f"the data are couplings, whose noise objective {objective!r} does not use")
    if MARK in run.columns and not run.objective.judged:
        raise ConfigError(f"the data are marked as good and bad ({MARK}), which objective {objective!r} does not look at")
    if ("prior" in run.pipeline.manifest) != (keywords(objective).get("prior") is not None):
        raise ConfigError("data.prior (of a mixture) marks the rows whose weight objective.prior says: give both or none")
    if "prior" in run.pipeline.manifest and max(run.updates.values()) > 1:
        raise ConfigError("roles.net.updates > 1 takes slices of a batch, in which the parts of data.prior have other shares; use 1")


def teachers(run):
    """ConfigError where a frozen denoiser, of which the trained one learns, was made for other examples or conditions."""
    if "perceptual" in run.loaded and (seen := run.loaded["perceptual"][1].get("shape")):
        if seen[-1] != (mine := run.example[0].shape[-1]):
            raise ConfigError(f"roles.perceptual looks at {seen[-1]} channels, and the examples of this run have {mine}")
    asked = {k for k, v in run.objective.roles.items() if v in ("frozen", "optional")}
    teachers = [k for k, r in run.roles.items() if k in asked and r.module.kind == "denoiser"]
    if not teachers:
        return
    x, cond = run.example
    added = {} if run.objective.shared else run.objective.conditions
    mine = domain(run.roles["net"], {
        "shape": x.shape[1:], "latent_space": run.latent_space, "data": run.pipeline.manifest,
        "conditions": {k: v for k, v in conditions.shapes_of(cond).items() if k not in added},
        "frozen": {k: checkpoint.fingerprint(run.loaded[k][0]) for k in ("text",) if k in run.loaded},
    })  # fmt: skip
    for name in teachers:
        same_domain(domain(run.roles[name], run.loaded[name][1]), mine, f"roles.{name}")


def reward(run):
    """ConfigError where roles.reward was made for other images or conditions than are judged."""
    if "reward" not in run.loaded:
        return
    judge, info = run.roles["reward"].module, run.loaded["reward"][1]
    have, known = run.pipeline.num_classes, judge.num_classes
    if have and known != have and (known or judge.kind == "classifier"):
        raise ConfigError(f"roles.reward knows {known} classes, and the data has {have}")
    about = {"shape of images": (tuple(info["shape"]), tuple(run.image_shape()))}
    if judge.kind == "reward" and run.tokenizer and judge.text:
        mine = run.pipeline.manifest.get("tokenizer", {}).get("sha256"), run.tokenizer.length
        about["tokenizer"] = (info["data"].get("tokenizer", {}).get("sha256"), *info["conditions"]["tokens"]), mine
    for what, (its, ours) in about.items():
        if its != ours:
            raise ConfigError(f"roles.reward was trained with another {what} than this run's: {its} is not {ours}")


def captions(run):
    """ConfigError where captions were asked for and no network looks at them, or one that knows fewer tokens or another padding."""
    for name, role in run.roles.items() if run.tokenizer else ():
        fields = getattr(role.module, "text_encoder", None) or getattr(role.module, "text", None) or {}
        vocab = fields.get("vocab") or getattr(role.module, "vocab", None)
        if (fields or role.module.kind == "language_model") and run.tokenizer.pad:
            raise ConfigError(f"text.pad = {run.tokenizer.pad}, but what is trained here on text takes token 0 for padding")
        if vocab and (wrong := text_lib.mismatch(run.tokenizer, vocab, getattr(role.module, "lengths", None))):
            raise ConfigError(f"{'model' if name == 'net' else f'roles.{name}'}: {wrong}")
    idle = {*run.example[1]} - {"label"} - run.read - run.objective.conditions.keys()  # of those the objective takes care
    if ("text" in run.roles or "embedded" in run.pipeline.manifest) and run.read & {"text", "pooled"}:
        idle -= {"text", "pooled"}  # the encoder gives both, and one may be all that is needed
    if idle:
        name, has = keywords(run.config["model"])["name"], ", ".join(sorted(idle))
        raise ConfigError(f"the data has {has} (data.text, roles.text, or embeddings), but model {name!r} does not use them")
