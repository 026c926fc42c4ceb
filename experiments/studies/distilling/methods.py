"""The methods of distillation, as runs of the students of a part (parts.Part).

Each is a function (part, seed) -> {steps: (workdir, sampler) or (workdir, sampler, guidance)}; {} where a part has nothing that it needs.
"""

UNIFORM = {"name": "uniform", "stratified": True}
ONE_STEP = {"name": "steps", "count": 1, "stratified": True}
LORA = {"pattern": r"^block_\d+/(attn|mlp)/\w+/kernel$", "rank": 16, "alpha": 16.0}


def teaching(part, seed):
    """The frozen teacher, and the student that begins as its network."""
    return {"teacher": part.teacher(seed), "net": part.start(seed)}


def always(part, workdir, *how):
    return {n: (workdir, *how) for n in part.steps}


def adam(part, kind="constant", rate=0.5):
    """The optimizer of players that follow each other: no momentum."""
    return {"name": "adamw", "b1": 0.0, "b2": 0.99, "clip": 1.0, "schedule": {"name": kind, "rate": rate * part.rate, "warmup": 20}}


def one_step(part, **settings):
    return {"name": "flow_matching", "time": ONE_STEP, **settings}


# --- on couplings


def output(part, seed):
    pairs = part.coupled(part.teacher(seed), "teacher", seed, guided=True)
    return {1: (part.train("output", seed, one_step(part), {"net": part.start(seed)}, data=pairs), "euler")}


def output_half(part, seed):
    """A network of half the width, which can begin as no other."""
    if not part.half:
        return {}
    pairs = part.coupled(part.teacher(seed), "teacher", seed, guided=True)
    return {1: (part.train("output_half", seed, one_step(part), {}, data=pairs, model=part.half, **part.scratch), "euler")}


def reflowed(part, seed, k, share):
    """The network after k reflows, `share` of the budget each."""
    if k == 0:
        return part.start(seed)
    before = reflowed(part, seed, k - 1, share)
    source, name = (before, f"reflow_{k - 1}_{share}") if k > 1 else (part.teacher(seed), "teacher")
    pairs = part.coupled(source, name, seed, guided=k == 1)
    objective = {"name": "flow_matching", "time": UNIFORM, **part.flow}
    return part.train(f"reflow_{k}_{share}", seed, objective, {"net": before}, data=pairs, share=share)


def reflow(k):
    share = round(1 / k, 3)
    return lambda part, seed: always(part, reflowed(part, seed, k, share if k > 1 else 1.0), "euler")


def instaflow(part, seed):
    straight = reflowed(part, seed, 1, 0.5)
    pairs = part.coupled(straight, "reflow_1_0.5", seed, guided=False)
    return {1: (part.train("instaflow", seed, one_step(part), {"net": straight}, data=pairs, share=0.5), "euler")}


def instaflow_perceptual(part, seed):
    """The last quarter of the budget by the distance of features."""
    if not hasattr(part, "judge"):
        return {}
    straight = reflowed(part, seed, 1, 0.5)
    pairs = part.coupled(straight, "reflow_1_0.5", seed, guided=False)
    squares = part.train("instaflow_squares", seed, one_step(part), {"net": straight}, data=pairs, share=0.25)
    objective = one_step(part, perceptual_weight=1.0, squares=0.0)
    roles = {"net": squares, "perceptual": part.judge(seed)}
    return {1: (part.train("instaflow_perceptual", seed, objective, roles, data=pairs, share=0.25), "euler")}


# --- along the teacher's trajectories


def halved(part, seed, folder, roles, objective, *how, share=1.0, guided=False, **changes):
    """Students of ever half the steps, `share` of the budget for all; guided: the first one's teacher is."""
    counts, found = [part.finest // 2**i for i in range(1, part.finest.bit_length())], {}
    for n in counts:
        first = guided and n == counts[0]
        made = part.train(f"{folder}/{n}", seed, objective | {"steps": n}, roles, share=share / len(counts), guided=first, **changes)
        found[n], roles = (made, "ddim", *how), {"teacher": made, "net": made}
    return {n: found[n] for n in part.steps if n in found}


def progressive(part, seed):
    return halved(part, seed, "progressive", teaching(part, seed), {"name": "progressive_distillation"}, guided=True)


def scales(part):
    """(settings of an objective that draws scales of guidance, changes of a config whose network takes them, the scale asked for)."""
    ask = {"name": "embedded", "scale": part.guidance["scale"]}
    return {"scale_min": 1.0, "scale_max": 2 * ask["scale"]}, {"model": {"guidance_embed": True}, "sample": {"guidance": ask}}, ask


def embedded(part, seed, share=1.0):
    """A network that takes the scale as an input."""
    drawn, changes, _ = scales(part)
    name = "guidance" if share == 1 else f"guidance_{share}"
    return part.train(name, seed, {"name": "guidance_distillation", "time": UNIFORM} | drawn, teaching(part, seed), share=share, **changes)


def guidance_distillation(part, seed):
    return always(part, embedded(part, seed), "euler", scales(part)[2]) if part.guidance else {}


def guided_progressive(part, seed):
    """Half of the budget for the scale as an input, half for the halvings (2210.03142)."""
    if not part.guidance:
        return {}
    (drawn, changes, ask), base = scales(part), embedded(part, seed, 0.5)
    objective = {"name": "guided_progressive_distillation"} | drawn
    return halved(part, seed, "guided_progressive", {"teacher": base, "net": base}, objective, ask, share=0.5, **changes)


def consistency_distillation(part, seed):
    objective = {"name": "consistency_distillation", "steps": 16, "solver": "heun", "metric": "pseudo_huber", "huber": 0.03}
    averages = {"target": {"name": "constant", "decay": 0.95}}
    made = part.train("consistency_distillation", seed, objective, teaching(part, seed), guided=True, ema=averages)
    return always(part, made, "renoise")


def consistency_training(part, seed):
    objective = {"name": "consistency_training", "steps": 16, "metric": "pseudo_huber", "huber": 0.03}
    averages = {"target": {"name": "constant", "decay": 0.0}}
    return always(part, part.train("consistency_training", seed, objective, {"net": part.start(seed)}, ema=averages), "renoise")


def latent_consistency(adapter):
    """LCM; adapter: its student a LoRA of the teacher, with the embedding of the scale."""

    def method(part, seed):
        if not part.guidance:
            return {}
        drawn, changes, ask = scales(part)
        objective = {"name": "latent_consistency", "steps": 50, "skip": 2, "metric": "pseudo_huber", "huber": 0.03} | drawn
        roles, averages = teaching(part, seed), {"target": {"name": "constant", "decay": 0.95}}
        if adapter:
            roles["net"] = {"checkpoint": str(roles["net"]), "lora": LORA}
            changes["optimizer"] = {"name": "adamw", "clip": 1.0, "schedule": {"name": "cosine", "rate": 4 * part.rate, "warmup": 20}}
        made = part.train("lcm" + "_lora" * adapter, seed, objective, roles, ema=averages, **changes)
        return always(part, made, "renoise", ask)

    return method


def continuous(name):
    """sCM, with a teacher or without."""

    def method(part, seed):
        objective = {"name": name, "time": {"name": "edm_lognormal", "p_mean": -0.8, "p_std": 1.6, "stratified": True}, "warmup": 500}
        roles = {"teacher": part.teacher(seed)} if name == "scm_distillation" else {}
        changes = part.scratch | {"model": part.smooth}
        return always(part, part.train(name, seed, objective | part.plain.get(name, {}), roles, guided=bool(roles), **changes), "renoise")

    return method


# --- distributions


def matching(steps, regression=0.0):
    """Distribution matching with a student of so many steps; regression: of couplings besides, DMD's."""

    def method(part, seed):
        objective = {"name": "distribution_matching", "steps": steps, "time": {"name": "uniform", "t_min": 0.02, "t_max": 0.98}}
        start, name, changes = {"checkpoint": str(part.start(seed))}, f"distribution_matching_{steps}", {}
        if regression:
            name, objective["regression"] = f"{name}_regression", regression
            changes["data"] = part.coupled(part.teacher(seed), "teacher", seed, guided=True)
        roles = {"teacher": part.teacher(seed), "net": start | {"every": 5}, "fake": start | {"optimizer": adam(part)}}
        return {steps: (part.train(name, seed, objective, roles, guided=True, optimizer=adam(part), **changes), "renoise")}

    return method


def judging(part, seed, optimizer, every=False):
    """A discriminator that is the teacher's network with a head on its second layer, or on every one; the plane's have none."""
    model = part.own(seed)["model"]
    layer = tuple(range(1, model["depth"] + 1)) if every else 2
    model = model | {"projector": {"layer": layer, "features": 1, "hidden": 64}}
    return {"checkpoint": str(part.start(seed)), "model": model, "optimizer": optimizer}


def gan(adapter):
    """DMD2 in one step; adapter: its generator a LoRA."""

    def method(part, seed):
        if part.base == "mix4":
            return {}
        objective = {
            "name": "distribution_matching_gan", "steps": 1, "adversarial_weight": 3e-3, "time": {"name": "uniform", "t_min": 0.02, "t_max": 0.98},
        }  # fmt: skip
        start = {"checkpoint": str(part.start(seed))}
        net = start | {"every": 5} | ({"lora": LORA} if adapter else {})
        roles = {
            "teacher": part.teacher(seed), "net": net, "fake": start | {"optimizer": adam(part)}, "discriminator": judging(part, seed, adam(part)),
        }  # fmt: skip
        name = "distribution_matching_gan" + "_lora" * adapter
        own = adam(part, rate=2.0 if adapter else 0.5)  # adapters take larger steps
        return {1: (part.train(name, seed, objective, roles, guided=True, optimizer=own), "renoise")}

    return method


def adversarial(latent):
    """ADD with a discriminator of clean images, or LADD with one of noisy ones, heads on every layer of the teacher, which learn faster
    than the student: one on one layer, as fast as the student, is fooled for good."""

    def method(part, seed):
        if part.base == "mix4":
            return {}
        start = {"checkpoint": str(part.start(seed))}
        if latent:
            objective = {"distill": 0.0, "gan_time": {"name": "logit_normal", "mean": 0.0, "std": 1.0}}
            heads = adam(part, rate=4.0) | {"rules": [{"match": "^(?!projector)", "rate": 0.0}]}
            roles = {"net": start, "discriminator": judging(part, seed, heads, every=True)}
        else:
            objective = {"distill": 2.5}
            judge = {"model": {"name": "patch_gan", "channels": 32, "layers": 1, "groups": 8}, "optimizer": adam(part)}
            roles = {"net": start, "teacher": part.teacher(seed), "discriminator": judge}
        name = "ladd" if latent else "add"
        objective = {"name": "adversarial_distillation", "steps": 4, **objective}
        made = part.train(name, seed, objective, roles, guided=not latent, optimizer=adam(part, rate=0.1 if latent else 0.5))
        return {n: how for n, how in always(part, made, "renoise").items() if objective["steps"] % n == 0}  # at other times it was never asked

    return method


def moments(steps, parameters=False):
    """Moment matching; parameters: without an auxiliary."""

    def method(part, seed):
        name = "parameter_moment_matching" if parameters else "moment_matching"
        objective = {"name": name, "steps": steps, "time": {"name": "uniform", "t_min": 0.02}}
        roles = teaching(part, seed) | ({} if parameters else {"auxiliary": part.start(seed)})
        return {steps: (part.train(f"{name}_{steps}", seed, objective, roles, guided=True, optimizer=adam(part, "cosine", 1.0)), "ancestral")}

    return method


# --- from nothing


def meanflow(tangent=None):
    """MeanFlow; tangent: of (r, t), a wrong one."""

    def method(part, seed):
        guide = {"scale": 1.0, "mix": 1 - 1 / part.guidance["scale"], "label_drop": 0.1} if part.guidance else {}
        objective = {"name": "meanflow", "time": {"name": "logit_normal", "mean": -0.4, "std": 1.0, "stratified": True}, "same": 0.75}
        name = "meanflow"
        if tangent:
            name, objective["tangent"] = f"meanflow_{tangent[0]:g}_{tangent[1]:g}", tangent
        changes = part.scratch | {"model": {"step_embed": True} | part.smooth}
        return always(part, part.train(name, seed, objective | guide | part.plain["meanflow"], {}, **changes), "flow_map")

    return method


def shortcut(part, seed):
    """In numbers of steps whose length it learns: between the finest of them, which is guided, and 0, which is not, there is nothing to ask for."""
    guide = {"guidance": part.guidance["scale"], "label_drop": 0.1} if part.guidance else {}
    objective = {"name": "shortcut", "time": UNIFORM, "bootstrap": 0.25, "finest": 32} | guide
    averages = {"target": {"name": "constant", "decay": 0.99}}
    made = part.train("shortcut", seed, objective, {}, model={"step_embed": True}, ema=averages, **part.scratch)
    return {n: how for n, how in always(part, made, "flow_map").items() if objective["finest"] % n == 0}


def inductive(part, seed):
    """IMM; its guidance is at sampling, so that of images goes without."""
    objective, begin = {"name": "inductive_moment_matching", "particles": 4}, {"grid": {"name": "uniform", "t_start": 0.994}}
    return always(part, part.train("imm", seed, objective, {}, model={"step_embed": True}, sample=begin, **part.scratch), "flow_map")


METHODS = {
    "output distillation": output,
    "output distillation, half the width": output_half,
    "reflow": reflow(1),
    "reflow twice": reflow(2),
    "reflow three times": reflow(3),
    "reflow, then output (InstaFlow)": instaflow,
    "reflow, then output, then perceptual": instaflow_perceptual,
    "progressive distillation": progressive,
    "guidance distillation": guidance_distillation,
    "guidance distillation, then progressive": guided_progressive,
    "consistency distillation": consistency_distillation,
    "consistency training": consistency_training,
    "latent consistency (LCM)": latent_consistency(False),
    "latent consistency, LoRA": latent_consistency(True),
    "distribution matching, 1 step": matching(1),
    "distribution matching with regression, 1 step": matching(1, 0.25),
    "distribution matching, 4 steps": matching(4),
    "distribution matching with a GAN, 1 step": gan(False),
    "distribution matching with a GAN, LoRA, 1 step": gan(True),
    "adversarial distillation (ADD)": adversarial(False),
    "adversarial distillation (LADD)": adversarial(True),
    "MeanFlow, from nothing": meanflow(),
    "MeanFlow, tangent (v, 0, 0)": meanflow((0.0, 0.0)),
    "MeanFlow, tangent (v, 1, 0)": meanflow((1.0, 0.0)),
    "MeanFlow, tangent (v, 1, 1)": meanflow((1.0, 1.0)),
    "shortcut model, from nothing": shortcut,
    "sCM distillation, from nothing": continuous("scm_distillation"),
    "sCM training, from nothing": continuous("scm_training"),
    "moment matching, 1 step": moments(1),
    "moment matching, 4 steps": moments(4),
    "moment matching by parameters, 1 step": moments(1, True),
    "moment matching by parameters, 4 steps": moments(4, True),
    "IMM, from nothing": inductive,
}


def of(part, chosen=()) -> dict:
    """{name: method} for a part; chosen: those whose names have one of these in them."""
    return {
        name: method
        for name, method in METHODS.items()
        if (not part.only or name in part.only)
        and not any(word in name for word in part.leaves_out)
        and (not chosen or any(word in name for word in chosen))
    }
