"""Exports: one network with everything needed to rebuild it, and the loading of roles from exports or workdirs.

    export/config.json        model, path, prediction, latent statistics, shape, classes, the whole run config, step, hash
    export/params/            orbax checkpoint
    export/model.safetensors  the same arrays, names joined by dots
    export/vae/, export/text/ exports of the frozen autoencoder and text encoder that the network works with
    export/tokenizer.json     the tokenizer's file, where captions are tokenised by one (tokenizer_0.json, ... of several)

The export of an adapter (flowjax.train.lora) holds the adapter alone; config.json says where its base is, with a hash of it, as
the workdir of its training does.
"""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import conditions, storage
from flowjax.config import ConfigError
from flowjax.models import vae
from flowjax.train import checkpoint as ck
from flowjax.train import ema, inversion, lora, posthoc
from flowjax.train.roles import build_role


def write(out, params, info: dict):
    """Write an export directory; config.json comes last, so an export cut short is not mistaken for a whole one."""
    from safetensors.numpy import save

    out = storage.path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    params = ck.host(params)
    ck.save_tree(out / "params", params)
    # safetensors writes a strided view wrongly without a word; every array is made contiguous first.
    flat = {k.replace("/", "."): np.ascontiguousarray(v) for k, v in zip(ck.names_of(params), jax.tree.leaves(params))}
    (out / "model.safetensors").write_bytes(save(flat, metadata={"format": "flowjax"}))
    info = {**info, "fingerprints": ck.fingerprints(params)}
    (out / "config.json").write_text(json.dumps(info, indent=1, sort_keys=True, default=str))


def info_of(path) -> dict:
    """config.json of an export or a workdir, as {"model", "path", "prediction", ...}."""
    path = storage.path(path)
    file = path / "config.json"
    if not file.exists():
        raise ConfigError(f"{path} is neither an export nor a workdir: it has no config.json")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is damaged ({error})") from None


def role_of(info: dict, where: str):
    """The Role that an export's or workdir's config describes."""
    sections = info["model"], info["path"], info["prediction"]
    role = build_role(*sections, f"{where}.model", info.get("latents"), info.get("input_scaling", "none"))
    if not info.get("lora"):
        return role
    section = {k: v for k, v in info["lora"].items() if k not in ("base", "added")}
    return dataclasses.replace(role, lora=lora.build(section, f"{where}.lora", info["lora"].get("added", ())))


def boxed(role, info: dict):
    """Shapes of the role's parameters, or of its adapter, with the names of their axes."""
    x = jnp.zeros((1, *info["shape"]), jnp.float32)
    cond = conditions.zeros(info.get("conditions") or ({"label": ()} if info.get("num_classes") else {}), 1)
    return jax.eval_shape(lambda k: role.trained(k, role.init(k, x, cond)), jax.random.key(0))


def local(params):
    """Loaded parameters for what this process computes by itself, while the others do something else."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else x.addressable_data(0), params)


def abstract(role, info: dict, place=None):
    """Shapes of the role's parameters, or of its adapter, with the shardings that place(boxed shapes) gives; without, on one device
    (on all, replicated, when there are several processes)."""
    from flax.core import meta

    shapes = boxed(role, info)
    if place is not None:
        return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), meta.unbox(shapes), place(shapes))
    if jax.process_count() == 1:
        at = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    else:
        at = jax.NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), jax.P())
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), meta.unbox(shapes))


def load(path, weights: str = "ema", step: int | None = None, where: str = "checkpoint", posthoc_std: float = 0.0, place=None):
    """(role, params, info) from an export, or from a workdir's newest intact checkpoint; an adapter is merged with its base.

    weights, for a workdir: the name of an average ("ema"), or "params" for the raw weights; posthoc_std > 0: instead, the
    power average of that width, reconstructed from the run's snapshots (flowjax.train.posthoc). An export has one set.
    place: see `abstract`; a network larger than one device is read into its shards.
    """
    role, params, info = stored(path, weights, step, where, posthoc_std, place)
    if role.lora is None:
        return role, params, info
    merged = jax.jit(lambda params, base: role.whole(params, base))(params, base_of(path, info, where))
    return dataclasses.replace(role, lora=None), merged, {k: v for k, v in info.items() if k != "lora"}


def base_of(path, info, where: str = "checkpoint"):
    """The parameters that the adapter in `path` was trained on; ConfigError where they are gone or others now."""
    base = info["lora"]["base"]
    try:
        _, params, _ = load(base["checkpoint"], base["weights"], where=where)
    except ConfigError as error:
        raise ConfigError(f"{where}: {path} is an adapter, whose base is needed: {error}") from None
    same_base(info, params, f"{where}: {path}")
    return params


def same_base(info, base, where: str):
    """ConfigError unless these are the parameters that the adapter of this info was trained on."""
    was, now = info["lora"]["base"], ck.fingerprint(base)
    if was["fingerprint"] != now:
        told = f"{was['checkpoint']} as it was (hash {was['fingerprint']}, not {now})"
        raise ConfigError(f"{where} adapts another base than this: {told}")


def stored(path, weights: str = "ema", step: int | None = None, where: str = "checkpoint", posthoc_std: float = 0.0, place=None):
    """`load` without the base of an adapter: the role has a `lora` then, and the params are the adapter's."""
    path = storage.path(path)
    info = info_of(path)
    role = role_of(info, where)
    target = abstract(role, info, place)
    if (path / "params").exists():
        return role, ck.load_checked(path / "params", target, info["fingerprints"]), info
    if not (path / "checkpoints").exists():
        raise ConfigError(f"{path} holds neither params/ (an export) nor checkpoints/ (a workdir)")
    averages = info["config"]["ema"]
    mine = [k for k, v in averages.items() if ema.build(v, f"ema.{k}")[1] == "net"]
    if posthoc_std:
        names = [k for k in averages if k in mine and ema.snapshots(averages[k], f"ema.{k}")]
        params, step = posthoc.load(path, names, target, step, posthoc_std)
        return role, params, {**info, "step": step, "weights": f"posthoc-{posthoc_std:g}"}
    if weights != "params" and weights not in mine:
        raise ConfigError(f"{where}: weights = {weights!r} is unknown in {path}; valid: params, {', '.join(mine)}")
    part = "params/net" if weights == "params" else f"ema/{weights}"
    params, step = ck.load_part(path / "checkpoints", part, target, step)
    return role, params, {**info, "step": step, "weights": weights}


def _origin(path, info, name: str):
    """(checkpoint, weights) of the frozen role `name` (vae, text) that a network works with, or None: inside the export itself,
    or where its run took it from."""
    nested = storage.path(path) / name
    section = info.get("config", {}).get("roles", {}).get(name)
    if (nested / "config.json").exists():
        return nested, "ema"
    return (section["checkpoint"], section["weights"]) if section else None


def companion_of(path, info, name: str, where: str):
    """(role, params, info) of the frozen role `name` (vae, text) that a network works with, or None; ConfigError where it is another
    than the one that it was trained with."""
    if (origin := _origin(path, info, name)) is None:
        return None
    role, params, its_info = load(*origin, where=where)
    same = info.get("frozen", {}).get(name, (now := ck.fingerprint(params))) == now
    if maker := (info.get("data") or {}).get({"vae": "latents", "text": "embedded"}[name], {}).get(name):
        same &= maker == identity(params, its_info)
    if not same:
        raise ConfigError(f"{where}: {origin[0]} has changed since {path} was trained with it")
    return role, params, its_info


def tokenizer_of(path, info):
    """The tokenizer of the network's captions; ConfigError where it has none."""
    from flowjax.data import text

    if not info.get("text") and {"text", "pooled"} & {*(info.get("conditions") or ())}:
        raise ConfigError(f"{path} takes embedded captions and has no text encoder for prompts: train with roles.text, the one that embedded them")
    if not info.get("text"):
        raise ConfigError(f"{path} was not trained with captions (data.text)")
    found = text.build(tokenizer_section(path, info), "text")
    if (was := info["data"].get("tokenizer", {}).get("sha256", found.digest)) != found.digest:
        held = ", ".join(map(str, found.files.values()))
        raise ConfigError(f"{held} is not the tokenizer that {path} was made with (sha256 {found.digest[:12]}, was {was[:12]})")
    return found


def tokenizer_section(path, info) -> dict:
    """The section of `tokenizer_of`, with the files that an export has of its own."""
    from flowjax.data import text

    return text.kept(info["text"], storage.path(path))


def write_tokenizer(out, contents: dict):
    """Make {name: content} the tokenizer's files of an export directory, and remove those of another one."""
    out = storage.path(out)
    for old in list(out.glob("tokenizer*.json")):
        old.unlink()
    for name, content in contents.items():
        (out / name).write_bytes(content)


def export(
    source, out, weights: str = "ema", step: int | None = None, latents=None, posthoc_std: float = 0.0, adapter: bool = False
):
    """Export a workdir's network (and the frozen networks it works with) to `out`. Returns the info written.

    latents: {"mean", "std"} per channel to store with an autoencoder; see measure_latents. adapter: not the network, but the
    adapter that was trained of it.
    """
    role, params, info = (stored if adapter else load)(source, weights, step, posthoc_std=posthoc_std)
    if adapter and role.lora is None:
        raise ConfigError(f"{source} holds a whole network, no adapter (roles.net.lora)")
    if latents is not None:
        info = {**info, "latents": {k: [float(v) for v in latents[k]] for k in ("mean", "std")}}
    companions = {name: None if adapter else companion_of(source, info, name, f"roles.{name}") for name in ("vae", "text")}
    tokenizer = {k: v.read_bytes() for k, v in tokenizer_of(source, info).files.items()} if info.get("text") else {}
    out = storage.path(out)
    # What stands there stops being an export before any part of it is replaced; nothing of another one may stay.
    (out / "config.json").unlink(missing_ok=True)
    for name, found in companions.items():
        if found:
            write(out / name, *found[1:])
        elif (out / name / "config.json").exists():
            (out / name / "config.json").unlink()
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out, tokenizer)
    write(out, params, info)
    return info


def adapted(role, params, info, adapters, where: str = "--lora"):
    """(params, info) of a network with adapters on it: (name, tree, Lora, info or None, weight) each, the info of one that
    knows its base.

    What each changes is added, times its weight. ConfigError where one was trained on another network.
    """
    for name, tree, _, its_info, _ in adapters:
        lora.check_fit(params, tree, f"{where}={name}")
        if its_info is not None:
            same_base(its_info, params, f"{where}={name}")
    names, trees, loras, infos, weights = zip(*adapters, strict=True)
    scales = [lora.scale_of(made) for made in loras]
    words = [i for i, made in zip(infos, loras) if isinstance(made, inversion.Inversion)]
    if len(words) > 1 or (words and words[0] is None):
        raise ConfigError(f"{where}: one adapter at a time can bring a new word; export the network with the first, and train the second of that")
    merged = jax.jit(lambda params, trees: lora.merge(params, zip(trees, scales, weights, strict=True)))
    told = "+".join([str(info["weights"]), *(f"{w:g}*{name}" for name, w in zip(names, weights, strict=True))])
    knows = {k: words[0][k] for k in ("model", "text")} if words else {}  # its table and its tokenizer have the word
    return merged(params, trees), {**info, "weights": told, **knows}


def identity(params, info) -> str:
    """A hash of a frozen encoder: its network's settings, its weights, and the statistics of an autoencoder's latents."""
    content = {"model": info["model"], "weights": ck.fingerprints(params), "latents": info.get("latents")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def measure_latents(role, params, batches):
    """{"mean", "std"} (C,) of the posterior means over batches of images, in float64 on the host."""
    encode = jax.jit(lambda x: role.net(params).encode(x)[0])
    stats = vae.measure(np.asarray(encode(x)) for x in batches)
    return stats._asdict()
