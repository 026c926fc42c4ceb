"""Several text encoders side by side: what training leaves out of each (SD3, 2403.03206, appendix B)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from train_runs import same, tiny

from flowjax import models
from flowjax.config import ConfigError
from flowjax.data import latents, records
from flowjax.models import text_encoders
from flowjax.models.mmdit import empty
from flowjax.objectives import flow_matching
from flowjax.train import export
from flowjax.train import mesh as mesh_lib
from flowjax.train import step as step_lib
from flowjax.train.assembly import Run

LENGTH, WIDTHS = 3, (4, 6, 12)
SECTIONS = [{"name": "text", "vocab": 257, "length": LENGTH, "width": w, "depth": 1, "heads": 2} for w in WIDTHS]
LAYOUTS = {  # which encoders, and where each is found: (tokens, channels) of "text" and channels of "pooled"
    "sd3": ((0, 1, 2), (((0, 3), (0, 4), (0, 4)), ((0, 3), (4, 10), (4, 10)), ((3, 6), (0, 12), None))),
    "without_t5": ((0, 1), (((0, 3), (0, 4), (0, 4)), ((0, 3), (4, 10), (4, 10)))),
    "flux": ((0, 2), ((None, None, (0, 4)), ((0, 3), (0, 12), None))),
}


def composed(layout):
    which, _ = LAYOUTS[layout]
    section = {"name": "text_encoders", "encoders": [SECTIONS[i] for i in which], "lengths": [LENGTH] * len(which)}
    return section | {"layout": layout.replace("without_t5", "sd3")} | ({"absent": [3, 12]} if layout == "without_t5" else {})


def parameters(module):
    length = sum(getattr(module, "lengths", [LENGTH]))
    return meta.unbox(jax.jit(module.init)(jax.random.key(0), np.zeros((1, length), np.int32)))["params"]


def place(bounds):
    return (slice(None), *(slice(*b) for b in bounds))


@pytest.mark.parametrize("layout, rates", [("sd3", (0.464, 0.2, 0.7)), ("without_t5", (0.464, 0.464)), ("flux", (0.3, 0.6))])
def test_each_encoder_is_left_out_alone_at_its_rate(layout, rates):
    module, rows = models.build(composed(layout)), 4096
    leave = text_encoders.left_out(module, jax.eval_shape(lambda: parameters(module)), rates, "drop")
    sizes = {"text": (rows, 3 if layout == "flux" else 6, 12), "pooled": (rows, 4 if layout == "flux" else 10)}
    cond = {k: np.random.default_rng(1).uniform(1, 2, s).astype(np.float32) for k, s in sizes.items()} | {"label": np.arange(rows)}
    cond["text"][:, :, 3] = np.inf  # 0 times this would be no zero
    made = {k: np.asarray(v) for k, v in jax.jit(leave)(cond, jax.random.key(2)).items()}
    np.testing.assert_array_equal(made["label"], cond["label"])
    gone, seen = [], {k: np.zeros(s, bool) for k, s in sizes.items()}
    for tokens, channels, pooled in LAYOUTS[layout][1]:
        parts = [(name, place(at)) for name, at in (("text", (tokens, channels)), ("pooled", (pooled,))) if None not in at]
        lost = (made[parts[0][0]][parts[0][1]] == 0).reshape(rows, -1)[:, 0]
        for name, at in parts:  # sequence and pooled vector go together, whole; what stays is bit for bit what it was
            want = np.where(lost.reshape(-1, *(1,) * (len(sizes[name]) - 1)), np.float32(0), cond[name][at])
            np.testing.assert_array_equal(made[name][at], want)
            assert not seen[name][at].any()
            seen[name][at] = True
        gone.append(lost)
    for name, mine in seen.items():  # the layouts' own zeros have no encoder
        assert not made[name][~mine].any()
    near = lambda found, p: abs(np.mean(found) - p) < 4 * (p * (1 - p) / rows) ** 0.5  # noqa: E731
    assert all(near(lost, rate) for lost, rate in zip(gone, rates, strict=True))
    assert near(np.all(gone, axis=0), np.prod(rates)) and near(~np.any(gone, axis=0), np.prod(1 - np.array(rates)))
    same(jax.jit(leave)(mesh_lib.place(cond, mesh_lib.make_mesh(2, 4)), jax.random.key(2)), made)  # however the rows are split
    again = jax.jit(leave)(cond, jax.random.key(3))
    assert 0 < np.mean((np.asarray(again["pooled"]) == 0)[:, 0] != gone[0]) < 1


def test_the_clips_of_sd3_stand_beside_each_other():
    with pytest.raises(ConfigError, match=r"lengths = \(3, 2, 3\): .* beside each other, and need the same length"):
        _ = models.build(composed("sd3") | {"lengths": (3, 2, 3)}).vocab


def test_all_left_out_is_the_empty_prompt_and_none_is_nothing():
    module = models.build(composed("sd3"))
    params = jax.eval_shape(lambda: parameters(module))
    text, pooled = jnp.ones((2, 6, 12)).at[:, :3, 10:].set(0), jnp.ones((2, 10))
    cond = {"text": text, "pooled": pooled}
    same(text_encoders.left_out(module, params, 1.0, "drop")(cond, jax.random.key(0)), empty(cond))
    one = text_encoders.left_out(module, params, [0, 0, 1], "drop")(cond, jax.random.key(0))
    same(one, {"text": text.at[:, 3:].set(0), "pooled": pooled})
    assert text_encoders.left_out(module, params, [0, 0.0, 0], "drop") is None


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The export of SD3's three encoders, captioned images, and the same with captions that are embedded."""
    out = tmp_path_factory.mktemp("composed")
    parts = [{"name": "bytes", "length": LENGTH}] * 3
    for name, section in (("text", composed("sd3")), ("single", SECTIONS[2])):
        tokens = [LENGTH * len(section.get("lengths", "1"))]
        info = {"model": section, "path": "rectified", "prediction": "velocity", "shape": [], "conditions": {"tokens": tokens}}
        export.write(out / name, parameters(models.build(section)), info)
    rows = (("train", f"row {i}", {"image": np.full((8, 8, 1), i, np.uint8), "caption": chr(97 + i)}) for i in range(16))
    records.write(out / "images", rows, name="captioned")
    data = {"name": "array_record", "path": str(out / "images"), "text": {"name": "joined", "parts": parts}}
    role, params, info = export.load(out / "text")
    encode = latents.Encoder(jax.jit(lambda tokens: role.net(params)(tokens)), export.identity(params, info), role.module.vocab, [*role.module.lengths])
    latents.write(out / "embedded", data, text=encode, splits=("train",), dtype="float32")
    return out, data, {"name": "array_record", "path": str(out / "embedded")}


def run(home, data, text="text", objective="flow_matching", roles=(), **section):
    roles = {"text": {"checkpoint": str(home[0] / text), **section}} | dict(roles)
    model = {"name": "mmdit", "depth": 1, "width": 16, "heads": 2, "table": 4, "base": 4}
    return Run(tiny(data=data, model=model, roles=roles, objective={"name": objective}, ema={"target": {"name": "constant", "decay": 0.9}}))


def prepared(this):
    """A batch as the step prepares it, split over the mesh."""

    def prepare(frozen, batch):
        nets = step_lib.nets_of(this.objective, this.roles, {"net": {}}, {}, frozen)
        return step_lib.prepare(this.objective, nets, batch, step_lib.rollout_key(0, 0), jnp.int32(0))

    return jax.device_get(jax.jit(prepare)(this.frozen, mesh_lib.place(next(this.pipeline), this.mesh)))


def test_runs_leave_parts_out_whether_captions_are_embedded_before_or_now(home):
    _, data, embedded = home
    now, before = (prepared(run(home, section, drop=0.464)) for section in (data, embedded))
    plain = run(home, data, drop=[0, 0, 0])
    assert plain.objective.rollout.func is flow_matching.rollout  # nothing in between, as by default
    whole = prepared(plain)
    gone = now["cond"]["text"][:, 3:].reshape(16, -1)[:, 0] == 0
    assert 0 < gone.sum() < 16
    np.testing.assert_array_equal(gone, before["cond"]["text"][:, 3:].reshape(16, -1)[:, 0] == 0)
    for name, value in now["cond"].items():
        np.testing.assert_allclose(value, before["cond"][name], atol=1e-5)
        np.testing.assert_array_equal(value, np.where(value == 0, 0, whole["cond"][name]))
    assert np.abs(now["z"] - whole["z"]).max() > 0  # keys of their own


def test_what_cannot_be_left_out_is_refused(home):
    _, data, _ = home
    for wrong in (1.5, -0.1, "half", [0.1, 0.2], [0.1, 0.2, True]):
        with pytest.raises(ConfigError, match=r"roles.text.drop = .* should be a probability, or a list of 3, one for each encoder"):
            run(home, data, drop=wrong)
    single = data | {"text": {"name": "bytes", "length": LENGTH}}
    with pytest.raises(ConfigError, match=r"roles.text.drop = 0.5 is for several text encoders side by side .*; a TextTransformer is one"):
        run(home, single, "single", drop=0.5)
    with pytest.raises(ConfigError, match="config.roles.vae.drop leaves out parts of captions"):
        run(home, data, roles={"vae": {"checkpoint": "nowhere", "drop": 0.5}})
    with pytest.raises(ConfigError, match="objective 'consistency_training' leaves no conditions out"):
        run(home, data, objective="consistency_training", drop=0.5)
