"""Adapters: the algebra of LoRA and DoRA on trees, and runs that train one."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from flowjax.config import ConfigError
from flowjax.interop import lora as interop
from flowjax.train import export, loop, lora
from flowjax.train import mesh as mesh_lib
from flowjax.train.assembly import Run
from train_runs import DIT, same, stored, tiny, train

RANDOM = np.random.default_rng(0)
SHAPES = {"blocks/attn/q/kernel": (3, 6, 8), "conv/kernel": (3, 3, 4, 5), "out/kernel": (7, 5), "out/bias": (5,), "zero/kernel": (4, 4)}


def normal(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *way, name = path.split("/")
        place = tree
        for part in way:
            place = place.setdefault(part, {})
        place[name] = value
    return tree


def boxed():
    """Parameters of a scanned layer, a convolution, a plain matrix and one that is zero, with their axes."""
    axes = {"blocks/attn/q/kernel": ("layers", "embed", "heads"), "conv/kernel": (None, None, "conv_in", "conv_out"), "out/kernel": ("embed", "mlp")}
    value = {k: normal(*s) if "zero" not in k else jnp.zeros(s) for k, s in SHAPES.items()}
    return nested({k: meta.Partitioned(v, names=axes[k]) if k in axes else v for k, v in value.items()})


def adapter(rank=2, dora=False, alpha=3.0, pattern="kernel$"):
    """(parameters, Lora, fresh adapter, adapter with every leaf random)."""
    whole, made = boxed(), lora.Lora(pattern, rank, alpha, dora)
    fresh = meta.unbox(made.init(jax.random.key(0), whole))
    return meta.unbox(whole), made, fresh, jax.tree.map(lambda v: 0.5 * normal(*v.shape), fresh)


def merged(params, made, tree, weight=1.0):
    return jax.jit(lambda p, t: lora.merge(p, [(t, made.scale, weight)]))(params, tree)


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_no_bit(dora):
    params, made, fresh, _ = adapter(dora=dora)
    same(merged(params, made, fresh), params)
    # ... and its random half is there: A within 1 / sqrt(in), B zero, so that only B (and the magnitude) has a gradient.
    for path, part in lora.parts(fresh).items():
        inputs = np.prod(SHAPES[path][(path.startswith("blocks")) : -1])
        assert 0.5 < float(jnp.abs(part["down"]).max()) * np.sqrt(inputs) < 1 and not part["up"].any()
    target = jax.tree.map(lambda v: normal(*v.shape), params)

    def loss(tree):
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(lora.merge(params, [(tree, made.scale, 1.0)])), jax.tree.leaves(target)))

    for path, part in lora.parts(jax.jit(jax.grad(loss))(fresh)).items():
        assert not part["down"].any() and part["up"].any(), path
        assert "magnitude" not in part or part["magnitude"].any() or path == "zero/kernel"


def test_the_change_is_a_product_of_rank_r():
    params, made, fresh, tree = adapter()
    assert sum(v.size for v in jax.tree.leaves(fresh)) == 2 * (3 * (6 + 8) + 9 * 4 + 5 + 7 + 5 + 4 + 4)
    new = merged(params, made, tree)
    same(new["out"]["bias"], params["out"]["bias"])
    q, part = new["blocks"]["attn"]["q"]["kernel"], tree["blocks"]["attn"]["q"]["kernel"]
    for layer in range(3):
        change = np.asarray(q[layer] - params["blocks"]["attn"]["q"]["kernel"][layer])
        np.testing.assert_allclose(change, 1.5 * np.asarray(part["down"][layer]) @ np.asarray(part["up"][layer]), atol=1e-5)
        s = np.linalg.svd(change, compute_uv=False)
        assert s[1] > 1e-2 and s[2] < 1e-5
    s = np.linalg.svd(np.asarray(new["conv"]["kernel"] - params["conv"]["kernel"]).reshape(36, 5), compute_uv=False)
    assert s[1] > 1e-2 and s[2] < 1e-5


def test_of_a_convolution_the_adapter_is_two():
    params, made, _, tree = adapter()
    x, part = normal(2, 6, 6, 4), tree["conv"]["kernel"]
    apply = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    two = apply(x, params["conv"]["kernel"]) + made.scale * apply(apply(x, part["down"]), part["up"][None, None])
    np.testing.assert_allclose(apply(x, merged(params, made, tree)["conv"]["kernel"]), two, atol=2e-5)


def test_the_norms_of_dora_are_its_magnitudes():
    params, made, _, tree = adapter(dora=True)
    params["zero"]["kernel"] = normal(4, 4)

    def norms(kernel, lead):
        return np.sqrt((np.asarray(kernel, np.float64) ** 2).sum(axis=tuple(range(lead, kernel.ndim - 1))))

    flat = lambda t: {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree.leaves_with_path(t)}  # noqa: E731
    old, new, longer = (flat(t) for t in (params, merged(params, made, tree), merged(params, lora.Lora("", 2, 30.0, True), tree)))
    for path, part in lora.parts(tree).items():
        lead = int(path.startswith("blocks"))
        want = np.abs(norms(old[path], lead) + part["magnitude"])
        np.testing.assert_allclose(norms(new[path], lead), want, rtol=2e-5)
        np.testing.assert_allclose(norms(longer[path], lead), want, rtol=2e-5)  # ten times the change: another direction only
        direction = np.asarray(old[path] + made.scale * (part["down"] @ part["up"]))
        cosine = (direction * new[path]).sum(axis=tuple(range(lead, direction.ndim - 1))) / norms(direction, lead) / norms(new[path], lead)
        np.testing.assert_allclose(np.abs(cosine), 1.0, atol=1e-5)


def test_dora_lets_no_gradient_through_the_norm():
    kernel, part = normal(5, 4), {"down": normal(5, 2), "up": normal(2, 4), "magnitude": normal(4)}
    pull = normal(5, 4)
    grads = jax.grad(lambda p: jnp.vdot(pull, lora.change(kernel, p, 0.7)))(part)
    raw = np.asarray(kernel + 0.7 * part["down"] @ part["up"])
    norm, m = np.linalg.norm(raw, axis=0), np.linalg.norm(kernel, axis=0) + part["magnitude"]
    np.testing.assert_allclose(grads["up"], 0.7 * part["down"].T @ (pull * m / norm), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["down"], 0.7 * (pull * m / norm) @ part["up"].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["magnitude"], (pull * raw).sum(axis=0) / norm, rtol=1e-4, atol=1e-5)


def test_a_kernel_of_zeros_gets_a_direction():
    part = {"down": normal(4, 2), "up": normal(2, 4), "magnitude": jnp.full(4, 2.0)}
    change = np.asarray(lora.change(jnp.zeros((4, 4)), part, 1.0))
    np.testing.assert_allclose(np.linalg.norm(change, axis=0), 2.0, rtol=1e-5)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(jax.grad(lambda p: lora.change(jnp.zeros((4, 4)), p, 1.0).sum())(part)))


def test_several_adapters_add_up():
    params, made, _, a = adapter()
    _, other, _, b = adapter(rank=3, dora=True, pattern="q/kernel")
    both = lora.merge(params, [(a, made.scale, 0.5), (b, other.scale, -2.0)])
    one, two = merged(params, made, a), merged(params, other, b)
    want = jax.tree.map(lambda w, x, y: w + 0.5 * (x - w) - 2.0 * (y - w), params, one, two)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), both, want)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"pattern": "attn/k/"}, r"pattern = 'attn/k/' finds no parameter; what can be adapted: blocks/attn/q/kernel, conv/kernel"),
        ({"pattern": "out/"}, r"finds out/bias, no matrix; what can be adapted: blocks/attn/q/kernel"),
        ({"pattern": "["}, "not a regular expression"),
        ({"pattern": "q", "rank": 0}, "rank = 0 should be at least 1"),
        ({"pattern": "q", "alpha": -1.0}, "alpha = -1.0 not negative"),
        ({"pattern": "q", "dropout": 0.1}, "dropout is unknown; valid: pattern, rank, alpha, dora"),
        ({}, "lacks pattern"),
    ],
)
def test_bad_sections_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        lora.build({"rank": 2, **section}, "roles.net.lora").init(jax.random.key(0), boxed(), "roles.net.lora")


# --- runs

PATTERN = "^blocks/(attn|mlp)/.*kernel$"
DIGITS = dict(data={"name": "digits"}, model=DIT, batch_size=8, sample={"steps": 1, "sampler": "euler", "count": 4})


def config(base, dora=True, **changes):
    net = {"checkpoint": str(base), "lora": {"pattern": PATTERN, "rank": 2, "alpha": 4.0, "dora": dora}}
    return tiny(**(DIGITS | {"roles": {"net": net}, "checkpoint": {"every": 2, "keep": 4}} | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A network, scanned, a few steps old."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    train(tiny(**DIGITS, steps=3, optimizer={"name": "adamw", "schedule": {"name": "constant", "rate": 1e-2}}), workdir)
    return workdir


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    train(config(base), workdir)
    return workdir


def test_a_run_begins_as_its_base_and_moves_the_adapter_alone(base):
    this = Run(config(base, mesh={"fsdp": 2, "tensor": 2}))
    state, (_, params, _) = this.fresh(), export.load(base)
    same(this.whole("net", state.params["net"]), params)
    names = {k for tree in (state.params, state.ema) for k in lora.parts(next(iter(tree.values())))}
    assert names == {f"blocks/attn/{x}/kernel" for x in ("q", "k", "v", "out")} | {"blocks/mlp/fc1/kernel", "blocks/mlp/fc2/kernel"}
    assert not {v.shape for v in jax.tree.leaves(state.opt) if v.ndim} - {v.shape for v in jax.tree.leaves(state.params)}
    # A and the base lie where the kernel would; the rank is on every device.
    part = this.target.params["net"]["blocks"]["attn"]["q"]["kernel"]
    assert part["down"].sharding.spec == jax.P(None, "fsdp", None) and part["up"].sharding.spec == jax.P(None, None, "tensor")
    assert this.frozen["net"]["blocks"]["attn"]["q"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")
    before = jax.device_get(state.params["net"])
    batch = mesh_lib.place(next(this.pipeline), this.mesh)
    state, metrics = this.step()(state, this.frozen, batch)
    assert float(metrics["grad_norm"]) > 0
    same(this.frozen["net"], params)
    new = lora.parts(jax.device_get(state.params["net"]))
    for path, part in lora.parts(before).items():
        assert (new[path]["up"] != part["up"]).any() and (new[path]["magnitude"] != 0).any()
        np.testing.assert_array_equal(new[path]["down"], part["down"])  # B was zero


def test_the_record_of_a_run(base, run):
    card = json.loads((run / "card.json").read_text())
    count = 2 * (4 * (16 * 2 + 2 * 16 + 16) + (16 * 2 + 2 * 64 + 64) + (64 * 2 + 2 * 16 + 16))
    assert card["parameters"]["net"] == f"{count:,} trained" and "frozen" in card["parameters"]["net, adapted"]
    kept = stored(run, 4)["fingerprints"]
    assert {k.rpartition("/")[2] for k in kept if k.startswith(("params/", "ema/"))} == {"down", "up", "magnitude"}
    info = json.loads((run / "config.json").read_text())
    assert info["lora"]["base"] == {"checkpoint": str(base), "weights": "ema", "fingerprint": info["frozen"]["net"]}


def test_resuming_an_adapter_is_exact(base, run, tmp_path):
    assert train(config(base), tmp_path / "parts", stop_at=3)[0] == 3
    train(config(base), tmp_path / "parts")
    whole, parts = stored(run, 4), stored(tmp_path / "parts", 4)
    assert whole["fingerprints"] == parts["fingerprints"] and whole["frozen"] == parts["frozen"]


def test_exports_merged_and_alone(base, run, tmp_path):
    role, params, info = export.load(run)
    assert role.lora is None and "lora" not in info
    its, tree, _ = export.stored(run)
    same(params, merged(export.load(base)[1], its.lora, tree))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(export.load(base)[1])))
    export.export(run, tmp_path / "merged")
    export.export(run, tmp_path / "alone", adapter=True)
    same(export.load(tmp_path / "merged")[1], params)
    same(export.load(tmp_path / "alone")[1], params)
    same(export.stored(tmp_path / "alone")[1], tree)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("alone", "merged")]
    assert sizes[0] < sizes[1] / 2
    with pytest.raises(ConfigError, match="holds a whole network, no adapter"):
        export.export(base, tmp_path / "bad", adapter=True)
    # Half of the adapter on the base; the adapter on anything else.
    role, params, info = export.load(base)
    adapters = lambda weight: [("a", tree, its.lora, export.info_of(run), weight)]  # noqa: E731
    same(export.adapted(role, params, info, adapters(1.0))[0], export.load(run)[1])
    half, told = export.adapted(role, params, info, adapters(0.5))
    same(half, merged(params, its.lora, tree, 0.5))
    assert told["weights"] == "ema+0.5*a"
    changed = jax.tree.map(lambda v: v + 1, params)
    with pytest.raises(ConfigError, match="--lora=a adapts another base than this"):
        export.adapted(role, changed, info, adapters(1.0))
    with pytest.raises(ConfigError, match=r"--lora=a adapts blocks/attn/k/kernel of shape \(2, 16, 16\), and the network has none"):
        export.adapted(role, {"other": params["x_embed"]}, info, adapters(1.0))


def test_a_base_that_is_gone_or_changed_is_an_error(base, run, tmp_path):
    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/config.json").write_text((run / "config.json").read_text().replace(str(base), str(moved)))
    same(export.load(tmp_path / "run")[1], export.load(run)[1])
    shutil.rmtree(moved / "checkpoints" / "3")
    with pytest.raises(ConfigError, match="adapts another base than this: .*base as it was"):
        export.load(tmp_path / "run")
    shutil.rmtree(moved)
    with pytest.raises(ConfigError, match="is an adapter, whose base is needed: .*neither an export nor a workdir"):
        export.load(tmp_path / "run")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"roles": {"net": {"lora": {"pattern": "q", "rank": 2}}}}, "roles.net.lora adapts the network of roles.net.checkpoint, which is missing"),
        ({"roles": {"vae": {"checkpoint": "x", "lora": {"pattern": "q", "rank": 2}}}}, "roles.vae is frozen"),
        ({"model": DIT | {"width": 32}}, "roles.net.checkpoint does not fit the model"),
        ({"optimizer": {"name": "muon", "schedule": {"name": "constant"}}}, "'muon' is for whole matrices, and an adapter"),
    ],
)
def test_runs_that_cannot_be(base, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loop.run(config(base, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- an adapter with an input that its base has not

LCM = dict(
    model=DIT | {"guidance_embed": True}, steps=3,
    objective={"name": "latent_consistency", "steps": 4, "scale_min": 1.0, "scale_max": 3.0},
    ema={"ema": {"name": "warmup", "decay": 0.9}, "target": {"name": "constant", "decay": 0.9}},
    sample={"steps": 1, "sampler": "renoise", "count": 4, "guidance": {"name": "embedded", "scale": 2.0}},
)  # fmt: skip


def latent_consistency(base, **changes):
    net = config(base, dora=False).roles.net.to_dict() | {"lora": {"pattern": "kernel$", "rank": 2}}
    return config(base, **(LCM | {"roles": {"net": net, "teacher": {"checkpoint": str(base)}}} | changes))


@pytest.fixture(scope="module")
def lcm(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lcm") / "run"
    train(latent_consistency(base), workdir)
    return workdir


def test_an_adapter_holds_what_its_base_has_not(base, lcm, tmp_path):
    """LCM-LoRA: the embedding of the scale is trained whole and saved with the adapter, which alone finds its base."""
    info = export.info_of(lcm)
    assert info["lora"]["added"] == ["g_embed"] and "net, not in its checkpoint" in json.loads((lcm / "card.json").read_text())["parameters"]
    role, params, _ = export.load(lcm)
    its, tree, _ = export.stored(lcm)
    assert {k.partition("/")[0] for k in lora.added(tree)} == {"g_embed"} and not any(k.startswith("g_embed") for k in lora.parts(tree))
    same(params["g_embed"], tree["g_embed"])
    assert all(v.any() for k, v in lora.added(tree).items() if k.endswith("kernel"))  # the last was zero
    base_params = export.load(base)[1]
    same(merged(base_params, its.lora, tree), params)
    assert params.keys() == base_params.keys() | {"g_embed"}
    net, x = role.net(params), np.ones((2, 8, 8, 1), np.float32)
    one, two = (net(x, 0.5, {"label": np.zeros(2, np.int32), "guidance": np.full(2, w, np.float32)}) for w in (1.0, 3.0))
    assert (np.asarray(one) != np.asarray(two)).any()
    export.export(lcm, tmp_path / "alone", adapter=True)
    export.export(lcm, tmp_path / "merged")
    for name in ("alone", "merged"):
        same(export.load(tmp_path / name)[1], params)
    # Neither files of others nor a base without the input have room for it.
    with pytest.raises(ConfigError, match="g_embed/.*, which the adapter holds whole, cannot be expressed in the layout of kohya"):
        interop.to_file(role.module, base_params, tree, its.lora, "kohya")
    with pytest.raises(ConfigError, match="--lora=a brings g_embed along"):
        export.adapted(*export.load(base), [("a", tree, its.lora, info, 1.0)])


def test_such_a_run_begins_as_its_base_and_resumes(base, lcm, tmp_path):
    this = Run(latent_consistency(base))
    state, params = this.fresh(), export.load(base)[1]
    same({k: v for k, v in this.whole("net", state.params["net"]).items() if k != "g_embed"}, params)
    assert train(latent_consistency(base), tmp_path / "parts", stop_at=2)[0] == 2
    train(latent_consistency(base), tmp_path / "parts")
    assert stored(lcm, 3)["fingerprints"] == stored(tmp_path / "parts", 3)["fingerprints"]
    with pytest.raises(ConfigError, match="added is unknown; valid: pattern, rank, alpha, dora"):
        lora.build({"pattern": "q", "rank": 1, "added": ["g_embed"]}, "roles.net.lora")
