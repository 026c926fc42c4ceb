"""A run assembled from its config: objective, roles, data, mesh, shardings, optimizers, and the functions to jit."""

import copy
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import conditions, generate, objectives, storage
from flowjax.config import ConfigError, arguments, keywords
from flowjax.data import text as text_lib
from flowjax.data.pipeline import pipeline
from flowjax.data.sources import MARK
from flowjax.models import layers, sharding, text_encoders
from flowjax.objectives import repa
from flowjax.objectives.base import same_meaning
from flowjax.train import checkpoint, checks, ema, export, generator, inversion, lora, optim, settings
from flowjax.train import mesh as mesh_lib
from flowjax.train import step as step_lib
from flowjax.train.roles import build_role, same_shapes

# Frozen networks that stand between the data and any objective's networks: images -> latents, tokens -> embeddings.
CODECS = ("vae", "text")
# What describes a network that this run trains.
NETWORK = ("model", "path", "prediction", "input_scaling")


def build_roles(config, objective, place=None):
    """(roles, loaded): every role of the run, and (params, info) of those that come from a checkpoint, placed as export.load does."""
    roles, loaded = {}, {}
    known = {*objective.roles, *CODECS}
    for name in config["roles"]:
        if name not in known or objective.roles.get(name, "").startswith("ema:"):
            valid = [k for k in sorted(known) if not objective.roles.get(k, "").startswith("ema:")]
            raise ConfigError(f"roles.{name} takes no part in objective {config['objective']!r}; valid: {', '.join(valid)}")
    for name, kind in {**objective.roles, **{k: "frozen" for k in CODECS if k in config["roles"]}}.items():
        section = config["roles"].get(name)
        if kind.startswith("ema:"):
            if name not in config["ema"]:
                raise ConfigError(f"objective {config['objective']!r} needs an average ema.{name} of {kind.removeprefix('ema:')}")
        elif kind == "optional" and not section:
            continue
        elif kind in ("frozen", "optional"):
            if not section or not section["checkpoint"]:
                raise ConfigError(f"roles.{name}.checkpoint is missing: the objective needs a frozen {name!r} (an export or a workdir)")
            if any(section[k] for k in (*NETWORK, "optimizer", "every", "lora", "average")) or section["updates"] != 1:
                raise ConfigError(f"roles.{name} is frozen and described by its checkpoint; only checkpoint and weights may be set")
            roles[name], params, info = export.load(section["checkpoint"], section["weights"], where=f"roles.{name}", place=place)
            usual = {"vae": "autoencoder", "text": "text_encoder"}.get(name, "denoiser" if kind == "frozen" else None)
            wanted = _several(objective.kinds.get(name, usual))
            if wanted and roles[name].module.kind not in wanted:
                raise ConfigError(f"roles.{name}.checkpoint = {section['checkpoint']!r} is a {roles[name].module.kind}, not a {' or '.join(wanted)}")
            loaded[name] = params, info
        else:
            section = section or {}
            if name == "net":
                if any(section.get(k) for k in (*NETWORK, "optimizer")):
                    raise ConfigError(f"roles.net takes its network and optimizer from the config's {', '.join(NETWORK)}, optimizer")
            model, path, prediction, scaling = (section.get(k) or config[k] for k in NETWORK)
            label = "model" if name == "net" else f"roles.{name}.model"
            roles[name] = build_role(model, path, prediction, label, input_scaling=scaling)
            wanted = _several(objective.kinds.get(name, roles[name].module.kind))
            if roles[name].module.kind not in wanted:
                raise ConfigError(f"{label}: objective {config['objective']!r} needs a network of kind {' or '.join(map(repr, wanted))} as {name!r}")
            if section.get("checkpoint"):
                saved, params, info = export.load(section["checkpoint"], section["weights"], where=f"roles.{name}", place=place)
                where = f"roles.{name}.checkpoint = {section['checkpoint']!r}"
                if saved.module.kind != roles[name].module.kind and hasattr(roles[name].module, "adopt"):
                    params = roles[name].module.adopt(saved.module, params, where)
                same_meaning(saved, roles[name], where, ("path", "prediction", "scaling"))
                loaded[name] = params, info
            if section.get("lora") is not None:
                added = [k for k in layers.ADDED if k not in loaded[name][0]]
                roles[name] = dataclasses.replace(roles[name], lora=lora.build(section["lora"], f"roles.{name}.lora", added))
    return roles, loaded


def _several(kinds) -> tuple[str, ...]:
    """One kind, several or none, as a tuple."""
    return (kinds,) if isinstance(kinds, str) else tuple(kinds or ())


class Run:
    """Everything of a run that is built once; `flowjax.train.loop` is the loop over it."""

    def __init__(self, config, devices=None, data=None):
        """devices: those of the mesh, by default all of this job; others, of a machine that is not here, allow compiling only.
        data: stands in for the pipeline (flowjax.data.pipeline.declared)."""
        self.config = config = settings.resolve(config)
        checks.evaluation(config["evaluate"])
        self.objective = objectives.build(config["objective"])
        self.mesh = mesh_lib.make_mesh(**config["mesh"], devices=devices)
        self.rules = {**sharding.RULES, **{k: tuple(v) if isinstance(v, list) else v for k, v in config["rules"].items()}}
        checks.rules(config["rules"])
        sections = {p.role: config["roles"].get(p.role) or {} for p in self.objective.players}
        self.every = {p.role: sections[p.role].get("every") or p.every for p in self.objective.players}
        self.updates = {role: section.get("updates", 1) for role, section in sections.items()}
        for count in self.updates.values():
            mesh_lib.check_batch(config["batch_size"], config["accumulate"], self.mesh, count)
        self.pipeline = data or self.stream("train", config["seed"])
        self.here = {*self.mesh.devices.flat} <= {*jax.devices()}
        self.roles, self.loaded = build_roles(config, self.objective, self._shards if self.here else None)
        checks.classes(self)
        self.objective = self._leaving_out()
        self.encoded, self.embedded = self._encoded(), self._embedded()
        self.tokenizer, self.text = self._prompts()
        for name, role in self.roles.items():
            if isinstance(role.lora, inversion.Inversion):
                made, module = role.lora.placed(role.module, self.tokenizer, f"roles.{name}.lora")
                self.roles[name] = dataclasses.replace(role, module=module, lora=made)
        self.averages = {k: ema.build(v, f"ema.{k}") for k, v in config["ema"].items()}
        kept = {k: ema.snapshots(v, f"ema.{k}") for k, v in config["ema"].items()}
        self.snapshots = {k: v for k, v in kept.items() if v}
        for name, (_, of) in self.averages.items():
            if self.objective.roles.get(of) != "trained":
                raise ConfigError(f"ema.{name}.of = {of!r} is not a trained role; valid: {', '.join(self.trained)}")
        self.continued = {k: v for name in self.trained for k, v in self._continued(name).items()}
        checks.data(self)
        self.example = self._example()
        checks.teachers(self)
        checks.reward(self)
        self._places()
        self.added = {name: self._added(name) for name in self.trained if name in self.loaded}
        checks.captions(self)

    @property
    def columns(self):
        """What the data hold of an example; of a mixture, what each of its parts does."""
        manifest = self.pipeline.manifest
        return manifest.get("parts", [manifest])[0].get("columns", ())

    @property
    def trained(self):
        return [k for k, v in self.objective.roles.items() if v == "trained"]

    def stream(self, split, seed, **options):
        """A data pipeline of this process's rows."""
        return pipeline(
            self.config["data"], self.config["batch_size"], seed, split=split,
            process_index=jax.process_index(), process_count=jax.process_count(), **options,
        )

    @property
    def latent_space(self) -> str | None:
        """The autoencoder (by export.identity) whose latents the networks work on; None where there is none, or none is known."""
        if "vae" in self.roles and not self.encoded:
            return export.identity(*self.loaded["vae"])
        return self.pipeline.manifest.get("latents", {}).get("vae")

    def _encoded(self) -> bool:
        """Whether the data are latents already (flowjax.data.latents): then roles.vae only decodes, and must be who made them."""
        if (maker := self.pipeline.manifest.get("latents", {}).get("vae")) is None:
            return False
        if "vae" in self.roles and maker != (mine := export.identity(*self.loaded["vae"])):
            raise ConfigError(
                f"the data hold latents of another autoencoder ({maker}) than roles.vae ({mine}): encode them again with tools.encode_latents"
            )
        seeing = [f"roles.{k}" for k in self.loaded if self.roles[k].module.kind == "image_encoder"]
        if seeing := seeing + ["the objective"] * self.objective.pixels:
            raise ConfigError(f"{seeing[0]} looks at images, and the data hold latents: train on the images, which roles.vae encodes")
        return True

    def _embedded(self) -> bool:
        """Whether the data hold captions embedded already: then roles.text embeds prompts only, and must be who embedded them."""
        if not {"text", "pooled"} & {*self.pipeline.conditions}:
            return False
        maker = self.pipeline.manifest.get("embedded", {}).get("text", "unknown")
        if "text" in self.roles and maker != (mine := export.identity(*self.loaded["text"])):
            raise ConfigError(
                f"the data hold captions embedded by another text encoder ({maker}) than roles.text ({mine}): embed them again with "
                "tools.encode_latents --text"
            )
        return True

    def _leaving_out(self):
        """The objective, whose rollout begins with leaving out parts of the captions where roles.text.drop says so."""
        if not (drop := (self.config["roles"].get("text") or {}).get("drop")):
            return self.objective
        inner = self.objective.rollout
        if "label_drop" not in arguments(inner):
            raise ConfigError(f"roles.text.drop = {drop!r}: objective {keywords(self.config['objective'])['name']!r} leaves no conditions out (label_drop)")
        leave = text_encoders.left_out(self.roles["text"].module, self.loaded["text"][0], drop, "roles.text.drop")
        if leave is None:
            return self.objective

        def rollout(nets, batch, key):
            key, mine = jax.random.split(key)
            return inner(nets, {**batch, "cond": leave(batch["cond"], mine)}, key)

        return self.objective._replace(rollout=rollout)

    def _prompts(self):
        """(tokenizer, section that describes it) of captions and prompts, or (None, None): the data's own, or the one with which
        roles.text embedded them, which lies beside the data."""
        if not (self.embedded and "text" in self.roles):
            return self.pipeline.tokenizer, self.pipeline.tokenizer and self.pipeline.text
        manifest = self.pipeline.manifest
        path = manifest.get("parts", [manifest])[0]["path"]
        section = text_lib.stored(manifest["embedded"]["section"], pathlib.Path(path).expanduser())
        return export.tokenizer_of(path, {"text": section, "data": manifest}), section

    def _example(self):
        """One example as the network sees it: (x (1, ...), cond)."""
        shape = tuple(self.pipeline.shape)
        if "vae" in self.roles and not self.encoded:
            codec = self.roles["vae"].net(self.loaded["vae"][0])
            shape = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).shape[1:]
        cond = conditions.zeros(self.pipeline.conditions, 1)
        if "text" in self.roles and not self.embedded:
            if "tokens" not in cond:
                raise ConfigError("roles.text embeds captions, and the data has no tokens: set data.text")
            text = self.roles["text"].net(self.loaded["text"][0])
            cond = conditions.zeros(conditions.shapes_of(jax.eval_shape(lambda c: conditions.embed(text, c), cond)), 1)
        if twice := cond.keys() & self.objective.conditions.keys():
            objective = keywords(self.config["objective"])["name"]
            raise ConfigError(f"the data has {', '.join(twice)}, which objective {objective!r} makes itself")
        return jnp.zeros((1, *shape), self.pipeline.dtype), cond | conditions.zeros(self.objective.conditions, 1)

    def image_shape(self):
        """Shape of one sample, whether the data are images or the latents of some."""
        if not (self.encoded and "vae" in self.roles):
            return self.pipeline.shape
        codec = self.roles["vae"].net(self.loaded["vae"][0])
        return jax.eval_shape(codec.decode, self.example[0]).shape[1:]

    def _init_params(self, key):
        """(boxed trained parameters, boxed parameters of the whole networks) by role: the same, but for adapters."""
        x, cond = self.example
        boxed, trained, cond = {}, {}, conditions.Watched(cond)
        with sharding.use(self.mesh, self.rules):
            for i, name in enumerate(self.trained):
                boxed[name] = self.roles[name].init(jax.random.fold_in(key, i), self._seen_by(name, x), cond)
                adapter = jax.random.fold_in(key, len(self.trained) + i), boxed[name], f"roles.{name}.lora"
                trained[name] = self.roles[name].trained(*adapter)
        self.read = cond.read  # the conditions that the trained networks look at
        return trained, boxed

    def _seen_by(self, name, x):
        """What a trained role takes where the networks take x (1, ...): x, or an encoder's tokens (Objective.reads)."""
        source = self.objective.reads.get(name)
        if source not in self.loaded:
            return x
        encoder = self.roles[source].net(self.loaded[source][0])
        image = jnp.zeros((1, *self.pipeline.shape), jnp.float32)
        tokens = jax.eval_shape(lambda image: repa.features(encoder, image), image)
        return jnp.zeros(tokens.shape, tokens.dtype)

    def _places(self):
        from flax.core import meta

        config = self.config
        boxed, whole = jax.eval_shape(self._init_params, jax.random.key(0))
        places = {k: sharding.param_specs(v, self.mesh, self.rules) for k, v in boxed.items()}
        shapes = meta.unbox(boxed)
        self.transforms, self.schedules = {}, {}
        for name in self.trained:
            section = config["roles"].get(name) or {}
            where = "optimizer" if name == "net" or not section.get("optimizer") else f"roles.{name}.optimizer"
            optimizer = section.get("optimizer") or config["optimizer"]
            built = optim.build(optimizer, shapes[name], config["steps"] * self.updates[name], where, self.every[name])
            self.transforms[name], self.schedules[name] = built

        def init(key):
            params = meta.unbox(self._init_params(jax.random.fold_in(key, 0))[0])
            # Copies: the step donates its state, and a buffer cannot be donated twice.
            averages = {k: jax.tree.map(lambda p: p.astype(jnp.float32) + 0, params[of]) for k, (_, of) in self.averages.items()}
            opt = {k: self.transforms[k].init(params[k]) for k in self.trained}
            return step_lib.State(jnp.zeros((), jnp.int32), params, opt, averages)

        self._init = init
        abstract = jax.eval_shape(init, jax.random.key(0))
        replicated = jax.NamedSharding(self.mesh, jax.P())
        self.shardings = step_lib.State(
            step=replicated,
            params=places,
            opt={k: mesh_lib.like(abstract.opt[k], abstract.params[k], places[k]) for k in self.trained},
            ema={k: mesh_lib.like(abstract.ema[k], abstract.params[of], places[of]) for k, (_, of) in self.averages.items()},
        )
        self.target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, self.shardings)
        put = lambda v, at: jax.device_put(v, at) if self.here else jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=at)  # noqa: E731
        placed = {}  # frozen networks lie as they would if they were trained
        for name in self.loaded.keys() - {*self.trained}:
            params, info = self.loaded[name]
            placed[name] = jax.tree.map(put, params, self._shards(export.boxed(self.roles[name], info)))
            if self.here:
                self.loaded[name] = placed[name], info  # another copy, of an adapter that was merged, say, can go
        self.codecs = {k: placed[k] for k in CODECS if k in placed}
        absent = [k for k, away in (("vae", self.encoded), ("text", self.embedded)) if away]
        self.frozen = {k: placed[k] for k in self.loaded if k in placed and k not in absent}
        self._merge, self._at = {}, {}
        for name in self.trained:
            if self.roles[name].lora is not None:  # what is adapted lies where it would lie if it were trained
                base, at = self.loaded[name][0], sharding.param_specs(whole[name], self.mesh, self.rules)
                held, of_base = self.roles[name].lora.held, self.roles[name].lora.of_base
                same_shapes(base, of_base(held(meta.unbox(whole[name]))), f"roles.{name}.checkpoint")
                self.frozen[name] = jax.tree.map(put, base, held(at))
                merge = lambda params, base, role=self.roles[name]: role.whole(params, base)  # noqa: E731
                self._merge[name], self._at[name] = jax.jit(merge, out_shardings=at), at

    def _shards(self, boxed):
        """Where parameters lie whose axes have names."""
        return sharding.param_specs(boxed, self.mesh, self.rules)

    def whole(self, name: str, params):
        """The parameters of a trained role's network, of which `params` are trained or averaged (flowjax.train.roles.Role)."""
        return self._merge[name](params, self.frozen[name]) if name in self._merge else params

    @property
    def network(self):
        """Shapes and places of all parameters of the role "net"."""
        if "net" not in self._merge:
            return self.target.params["net"]
        whole, at = jax.eval_shape(self._merge["net"], self.target.params["net"], self.frozen["net"]), self._at["net"]
        return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), whole, at)

    def _added(self, name: str) -> tuple[str, ...]:
        """The parts of a role's parameters that its checkpoint may lack and does; ConfigError where it does not fit otherwise."""
        found, wanted = self.loaded[name][0], self.target.params[name]
        added = tuple(k for k in layers.ADDED if k in wanted and k not in found)
        if name in self._merge:
            return added
        same_shapes(found, {k: v for k, v in wanted.items() if k not in added}, f"roles.{name}.checkpoint")
        return added

    def _continued(self, role: str):
        """{average: (parameters of the one that it goes on with, how many updates that has had)} (roles.<role>.average)."""
        section = self.config["roles"].get(role) or {}
        if not (source := section.get("average")):
            return {}
        where = f"roles.{role}.average = {source!r}"
        if section["lora"] is not None:
            raise ConfigError(f"{where}: an adapter begins anew, and so do its averages")
        mine = [k for k, (_, of) in self.averages.items() if of == role and k not in self.objective.roles]
        if not mine:
            raise ConfigError(f"{where}: this run has no average of {role} (ema) that could go on with it")
        if kept := [k for k in mine if k in self.snapshots]:
            raise ConfigError(f"{where}: ema.{kept[0]}.snapshot_every counts from the start of a run; set it to 0")
        if source == "params" or (storage.path(section["checkpoint"]) / "params").exists():
            raise ConfigError(f"{where} goes on with an average of a workdir; 'params' are none, and an export has none beside its weights")
        _, params, info = export.load(section["checkpoint"], source, self.loaded[role][1]["step"], where=f"roles.{role}")
        count = info["step"] + info.get("continued", {}).get(source, 0)
        for name in mine:
            decay, of = self.averages[name]
            self.averages[name] = (lambda n, decay=decay: decay(n + count)), of
        return dict.fromkeys(mine, (params, count))

    def fresh(self):
        """The state at step 0, created straight into its shards; roles with a checkpoint start from it, except what it lacks."""
        state = jax.jit(self._init, out_shardings=self.shardings)(jax.random.key(self.config["seed"]))
        for name in self.trained:
            if name in self.loaded and name not in self._merge:
                params = self.loaded[name][0]
                put = lambda p, s: jax.device_put(jnp.asarray(p, s.dtype), s.sharding)  # noqa: E731
                begun = lambda own, params=params: own | jax.tree.map(put, params, {k: own[k] for k in params})  # noqa: E731
                new = begun(state.params[name])
                copies = {k: begun(state.ema[k], self.continued.get(k, (params,))[0]) for k, (_, of) in self.averages.items() if of == name}
                state = state.replace(params={**state.params, name: new}, ema={**state.ema, **jax.tree.map(jnp.copy, copies)})
            elif name in self._merge and (begun := self.roles[name].lora.begun(self.loaded[name][0], self.tokenizer)) is not None:
                new = jax.tree.map(lambda p, s: jax.device_put(p.astype(s.dtype), s.sharding), begun, state.params[name])
                copies = {k: jax.tree.map(jnp.copy, new) for k, (_, of) in self.averages.items() if of == name}
                state = state.replace(params={**state.params, name: new}, ema={**state.ema, **copies})
        return state

    def step(self):
        """The jitted train step (state donated)."""
        pure = step_lib.make_step(
            self.objective, self.roles, self.transforms, self.averages, seed=self.config["seed"],
            accumulate=self.config["accumulate"], every=self.every, updates=self.updates, mesh=self.mesh, rules=self.rules,
        )
        replicated = jax.NamedSharding(self.mesh, jax.P())
        frozen = jax.tree.map(lambda v: v.sharding, self.frozen)
        return jax.jit(
            pure,
            in_shardings=(self.shardings, frozen, mesh_lib.batch_sharding(self.mesh)),
            out_shardings=(self.shardings, replicated),
            donate_argnums=0,
        )

    def batch(self, shape=None):
        """The global batch as ShapeDtypeStructs, for compiling ahead of time; shape: of an example, where buckets have several."""
        rows = mesh_lib.batch_sharding(self.mesh)
        one = lambda shape, dtype: jax.ShapeDtypeStruct((self.config["batch_size"], *shape), dtype, sharding=rows)  # noqa: E731
        columns = self.columns
        names = ("win", "lose") if "win" in columns else ("x", "z") if "z" in columns else ("x",)
        lead = (self.pipeline.manifest["ranks"],) if "ranked" in columns else ()
        names = ("ranked",) if lead else names
        cond = {k: one(shape, conditions.DTYPES[k]) for k, shape in self.pipeline.conditions.items()}
        marks = {k: one((), bool) for k, there in (("prior", "prior" in self.pipeline.manifest), (MARK, MARK in columns)) if there}
        return {**{k: one((*lead, *(shape or self.pipeline.shape)), self.pipeline.dtype) for k in names}, **marks, "cond": cond}

    def jit(self, fn):
        """jit of a function of parameters and small inputs, on this mesh (see flowjax.models.sharding), with results everywhere."""

        def on_mesh(*arguments):
            with sharding.use(self.mesh, self.rules):
                return fn(*arguments)

        return jax.jit(on_mesh, out_shardings=jax.NamedSharding(self.mesh, jax.P()))

    def sampler(self, section):
        """jitted sample(drawing(params), seed, indices, cond) of the role "net" (see flowjax.generate), as a `sample` section says."""
        shape = self.example[0].shape[1:]
        guidance, besides = generator.second_network(section["guidance"], shape)
        options = {k: section[k] for k in ("steps", "sampler", "grid")} | {"guidance": guidance, "besides": besides}
        options["negative"] = self.tokens([section["negative"]], "sample.negative") if section["negative"] else None

        def sample(weights, *asked):
            params, codecs = weights
            nets = {k: self.roles[k].net(v) for k, v in codecs.items()}
            return generate.make(self.roles["net"], shape, codec=nets.get("vae"), text=nets.get("text"), **options)(params, *asked)

        return self.jit(sample)

    def drawing(self, params):
        """What a `sampler` takes: parameters of the role "net" with those of the networks between it and the user."""
        return params, self.codecs

    def average(self, role: str):
        """Name of the average by which a role is judged: the first that no objective takes for itself; None where there is none."""
        return next((k for k, (_, of) in self.averages.items() if of == role and k not in self.objective.roles), None)

    def tokens(self, prompts, where: str):
        """{"tokens": ids} of prompts."""
        if self.tokenizer is None:
            needed = "roles.text, the text encoder that embedded the captions" if self.embedded else "data.text, the tokenizer of captions"
            raise ConfigError(f"{where} needs {needed}")
        return {"tokens": self.tokenizer(prompts, where)}

    def first(self, count: int):
        """The first `count` examples of the validation split, the same on every process."""
        return next(pipeline(self.config["data"], count, 0, split=self.config["validation"]["split"], shuffle=False))

    def asked(self, section):
        """Conditions for the `count` samples of a `sample` section: its prompts and classes in turn, or what goes with the first
        images of the validation split. Without pictures only the shapes matter, and nothing need be there to read."""
        count, cond = section["count"], {}
        if section["prompts"]:
            ids = self.tokens(section["prompts"], "sample.prompts")["tokens"]
            cond["tokens"] = np.resize(ids, (count, *ids.shape[1:]))
        if {*self.pipeline.conditions} - {"label", *(conditions.CAPTION if cond else ())}:
            cond = (self.first(count)["cond"] if section["every"] else conditions.zeros(self.pipeline.conditions, count)) | cond
        elif self.pipeline.num_classes:
            seen = generate.classes_of(self.config, self.pipeline.num_classes)
            cond["label"] = seen[generate.balanced_labels(count, len(seen))]
        return cond

    def plain(self):
        """This run with plain attention and nothing recomputed: the same mathematics, whose operations can all be counted.

        What utilisation is measured in are these, and neither the work that a remat policy repeats nor what is hidden in a kernel.
        """

        wanted = {"remat": "none"}
        if self.mesh.devices.flat[0].platform != "cpu":  # where "auto" is plain, and another trace would take time
            wanted["attention"] = "xla"

        def one(role):
            fields = {k: v for k, v in wanted.items() if getattr(role.module, k, v) != v}
            return dataclasses.replace(role, module=role.module.clone(**fields)) if fields else role

        roles = {name: one(role) for name, role in self.roles.items()}
        if all(roles[k] is self.roles[k] for k in roles):
            return self
        this = copy.copy(self)
        this.roles = roles
        return this

    def validate(self):
        """jitted (state, frozen, batch, index) -> loss of the first average of the first player's role, or of its parameters."""
        player = self.objective.players[0]
        name = self.average(player.role)

        def loss(state, frozen, batch, index):
            with sharding.use(self.mesh, self.rules):
                params = state.params if name is None else {**state.params, player.role: state.ema[name]}
                nets = step_lib.nets_of(self.objective, self.roles, params, state.ema, frozen)
                # One key per validation batch, the same at every validation: noise and times are fixed.
                key = jax.random.fold_in(jax.random.key(self.config["seed"] + 1), index)
                batch = step_lib.prepare(self.objective, nets, batch, key, state.step)
                return player.loss(nets, batch | step_lib.measured(player, nets, batch, None), None)[0]

        return jax.jit(loss, out_shardings=jax.NamedSharding(self.mesh, jax.P()))

    def info(self, step, weights):
        """What an export or a workdir says about its network."""
        grown = self.roles["net"].module.text_encoder if isinstance(self.roles["net"].lora, inversion.Inversion) else None
        return {
            **{k: self.config[k] for k in NETWORK},
            **({"model": self.config["model"] | {"text_encoder": dict(grown)}} if grown else {}),
            "shape": list(self.example[0].shape[1:]), "num_classes": self.pipeline.num_classes,
            "conditions": {k: list(v) for k, v in conditions.shapes_of(self.example[1]).items()},
            "text": self.text,
            "image_shape": list(self.image_shape()), "latent_space": self.latent_space,
            "config": self.config, "step": step, "weights": weights,
            "data": self.pipeline.manifest, "frozen": self.fingerprints(),
            "frozen_models": {k: self.loaded[k][1]["model"] for k in self.frozen},
            "continued": {k: count for k, (_, count) in self.continued.items()},
        } | ({"lora": self._adapter()} if "net" in self._merge else {})

    def _adapter(self):
        """What is needed to load the adapter of "net": its settings, and its base with a hash of that."""
        section, made = self.config["roles"]["net"], self.roles["net"].lora
        base = {k: section[k] for k in ("checkpoint", "weights")}
        whole = {"added": list(added)} if (added := self._added("net")) else {}
        places = {"first": made.first, "rows": made.rows} if isinstance(made, inversion.Inversion) else {}
        return {**section["lora"], **whole, **places, "base": {**base, "fingerprint": checkpoint.fingerprint(self.frozen["net"])}}

    def fingerprints(self):
        """{frozen role: hash of its parameters}: a resumed run must meet the same teachers."""
        return {k: checkpoint.fingerprint(v) for k, v in self.frozen.items()}
