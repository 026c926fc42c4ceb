"""Guidance distillation against exact velocities, from the loss to a student that is trained, exported and sampled."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import randomise
from scipy import stats
from train_runs import DIT, tiny, train

from flowjax import exact
from flowjax.config import ConfigError
from flowjax.guidance import embedded
from flowjax.objectives import guidance_distillation as gd
from flowjax.paths import PATHS, rectified, vp_linear
from flowjax.predictions import Model
from flowjax.train import export, generator
from flowjax.train.assembly import Run
from flowjax.train.roles import domain, same_domain

RF = rectified()
KEY = jax.random.key(0)
TWO = exact.mixture([0.4, 0.6], [-1.0, 0.8], [0.3, 0.5])
T = jnp.linspace(0.1, 0.9, 12)


def student(fn, path=RF, prediction="velocity"):
    """A network that is the function fn(x_t, t, label, scale), the scale (B, 1)."""
    return Model(lambda x_t, t, cond, key: fn(x_t, t, cond["label"], cond["guidance"][:, None]), path, prediction, guidance_embed=True)


def perfect(path=RF, prediction="velocity", data=TWO):
    """u_0 + w (u_1 - u_0) of the exact conditional and unconditional predictions."""

    def fn(x_t, t, label, scale):
        with_, without = data.predict(path, prediction, x_t, t, label), data.predict(path, prediction, x_t, t)
        return without + scale * (with_ - without)

    return student(fn, path, prediction)


def batch(n=12, **more):
    x, z = jax.random.normal(KEY, (2, n, 1))
    cond = {"label": jnp.arange(n) % 2, "guidance": jnp.linspace(1.0, 5.0, n)}
    return {"x": x, "z": z, "t": T[:n], "cond": cond} | more


# --- the loss


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("path", "prediction"), [*zip(PATHS, ["velocity", "x", "eps", "v", "velocity", "edm"])])
def test_loss_is_zero_at_the_guided_prediction_stationary_there_and_nowhere_near(path, prediction):
    path = PATHS[path]()
    nets = {"net": perfect(path, prediction), "teacher": TWO.model(path, prediction, conditional=True)}

    def loss(theta):
        def apply(x_t, t, cond, key):
            right = nets["net"].apply(x_t, t, cond, key)
            return right + theta[0] + theta[1] * x_t + theta[2] * (cond["guidance"] - 1)[:, None] * right

        return gd.loss({**nets, "net": nets["net"].replace(apply=apply)}, batch(), None, weight="velocity")[0]

    both = jax.jit(jax.value_and_grad(loss))
    value, slope = both(jnp.zeros(3))
    assert value < 1e-20 and np.abs(slope).max() < 1e-9
    for theta in 0.1 * jnp.eye(3):
        off, back = both(theta)
        assert off > 1e-6 and jnp.dot(back, theta) > 1e-6


@pytest.mark.usefixtures("float64")
def test_golden_number():
    """N(1, 1/4) under the condition and N(0, 1) without, at x = 0.4 and t = 1/2: velocities -1.12 and 0, so -3.36 at scale 3."""
    with_, without = exact.gaussian([1.0], 0.25), exact.gaussian([0.0], 1.0)

    def apply(x_t, t, cond, key):
        return jnp.where(cond["label"][:, None] == 1, without.velocity(RF, x_t, t), with_.velocity(RF, x_t, t))

    teacher = Model(apply, RF, "velocity", null=lambda cond: {"label": jnp.ones_like(cond["label"])})
    one = {"x": jnp.asarray([[0.4]]), "z": jnp.asarray([[0.4]]), "t": jnp.asarray([0.5]), "cond": {"label": jnp.zeros(1, int)}}
    nothing = student(lambda x_t, t, label, scale: 0 * x_t)
    # SNR + 1 on the velocity is t^2 (SNR + 1) = 1/2.
    for scale, weight, expected in ((3.0, "none", 3.36**2), (1.0, "none", 1.12**2), (0.0, "none", 0.0), (3.0, "snr_plus_one", 3.36**2 / 2)):
        given = one | {"cond": one["cond"] | {"guidance": jnp.asarray([scale])}}
        value, metrics = gd.loss({"net": nothing, "teacher": teacher}, given, None, weight=weight)
        assert float(value) == pytest.approx(expected, abs=1e-12)
        assert float(metrics["mse"]) == pytest.approx((1.12 * scale) ** 2, abs=1e-12)


@pytest.mark.usefixtures("float64")
def test_scale_one_is_the_teacher_itself_and_scale_zero_the_teacher_without_its_condition():
    teacher = TWO.model(RF, conditional=True)
    for scale, label in ((1.0, lambda given: given), (0.0, lambda given: jnp.full_like(given, 2))):
        net = student(lambda x_t, t, given, _, label=label: teacher(x_t, t, {"label": label(given)}))
        value = jax.jit(lambda w, net=net: gd.loss({"net": net, "teacher": teacher}, batch() | {"cond": batch()["cond"] | {"guidance": w}}, None)[0])
        assert value(jnp.full(12, scale)) < 1e-24 and value(jnp.full(12, scale + 0.5)) > 1e-4


def test_each_row_has_its_own_scale_and_the_student_alone_is_given_it():
    """A teacher of +-1 with and 0 without its condition; a student that answers its scale; both know only what they are given."""
    seen = []

    def apply(x_t, t, cond, key):
        seen.append((set(cond), key))
        return jnp.where(cond["label"] == 2, 0.0, 1.0)[:, None] + 0 * x_t

    teacher = Model(apply, RF, "velocity", null=lambda cond: {"label": jnp.full_like(cond["label"], 2)})
    net = student(lambda x_t, t, label, scale: scale + 0 * x_t)
    assert gd.loss({"net": net, "teacher": teacher}, batch(), KEY)[0] < 1e-12
    assert seen == [({"label"}, None)]
    keys = []
    net = net.replace(apply=lambda x_t, t, cond, key: keys.append(key) or x_t)
    gd.loss({"net": net, "teacher": teacher}, batch(), KEY)
    assert keys == [KEY]  # dropout is the student's


def test_no_gradient_reaches_the_teacher():
    def value(of_net, of_teacher):
        teacher = TWO.model(RF, conditional=True)
        scaled = teacher.replace(apply=lambda *inputs: of_teacher * teacher.apply(*inputs))
        net = student(lambda x_t, t, label, scale: of_net * x_t)
        return gd.loss({"net": net, "teacher": scaled}, batch(), None)[0]

    of_net, of_teacher = jax.jit(jax.grad(value, argnums=(0, 1)))(0.3, 0.9)
    assert abs(of_net) > 1e-2 and of_teacher == 0


# --- the rollout


def rollout(n=20_000, **settings):
    given = {"x": jnp.zeros((n, 2)), "cond": {"label": jnp.arange(n) % 3}, "step": 0}
    return given, gd.rollout({"net": student(None)}, given, KEY, **settings)


def test_rollout_draws_a_uniform_scale_for_each_row():
    given, out = rollout(scale_min=2.0, scale_max=7.0)
    scale = np.asarray(out["cond"]["guidance"])
    assert scale.shape == (20_000,) and scale.dtype == np.float32 and set(out["cond"]) == {"label", "guidance"}
    assert stats.kstest(scale, stats.uniform(2.0, 5.0).cdf).pvalue > 1e-3
    for other in (out["t"], out["z"][:, 0]):
        assert abs(np.corrcoef(scale, other)[0, 1]) < 0.03
    np.testing.assert_array_equal(out["cond"]["label"], given["cond"]["label"])  # none is dropped
    assert stats.kstest(np.asarray(out["t"]), "uniform").pvalue > 1e-3
    assert stats.kstest(np.asarray(rollout()[1]["cond"]["guidance"]), stats.uniform(1.0, 4.0).cdf).pvalue > 1e-3
    shifted = rollout(time={"name": "uniform", "shift": 3.0})[1]["t"]
    assert 0.5 < np.mean(shifted) and (rollout(8, scale_min=3, scale_max=3)[1]["cond"]["guidance"] == 3.0).all()


# --- what is refused


def test_refused():
    right = {"net": perfect(), "teacher": TWO.model(RF, conditional=True)}
    for teacher, message in (
        (TWO.model(vp_linear(), conditional=True), r"roles.teacher was trained with another path than the config's: \('vp_linear', 0.1, 20.0\)"),
        (TWO.model(RF, "eps", conditional=True), "roles.teacher was trained with another prediction than the config's: eps is not velocity"),
        (TWO.model(RF), "'cfg' needs a model with a null condition"),
    ):
        with pytest.raises(ConfigError, match=message):
            gd.loss({**right, "teacher": teacher}, batch(), None)
    with pytest.raises(ConfigError, match="objective.scale_max = 1.0 should be at least objective.scale_min = 2.0"):
        rollout(scale_min=2.0, scale_max=1.0)
    with pytest.raises(ConfigError, match="set model.guidance_embed = True"):
        gd.rollout({"net": TWO.model(RF)}, batch(), KEY)


def test_domains():
    """The first difference is named; what one side does not say is no difference, and neither is the length of a text."""
    role = export.role_of({"model": {**DIT}, "path": "rectified", "prediction": "velocity"}, "role")
    info = {
        "shape": [8, 8, 1], "latent_space": "abc", "conditions": {"label": [], "text": [5, 7], "tokens": [6]}, "frozen": {"text": 3},
        "data": {"tokenizer": {"sha256": "0f", "vocab": 9}},
    }  # fmt: skip
    want = domain(role, info)
    same_domain(domain(role, info | {"conditions": {"text": [9, 7], "tokens": [6]}, "latent_space": None, "frozen": {}, "data": None}), want, "it")
    for change, message in (
        ({"shape": [8, 8, 2]}, r"it was trained with another shape than this run's: \(8, 8, 2\) is not \(8, 8, 1\)"),
        ({"latent_space": "abd"}, "another latent space than this run's: abd is not abc"),
        ({"conditions": {"label": [], "text": [5, 8], "tokens": [6]}}, "another set of conditions"),
        ({"conditions": {"label": [], "text": [5, 7], "tokens": [7]}}, "another set of conditions"),
        ({"conditions": {"label": []}}, "another set of conditions"),
        ({"frozen": {"text": 4}}, "another text encoder"),
        ({"data": {"tokenizer": {"sha256": "f0"}}}, "another tokenizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            same_domain(domain(role, info | change), want, "it")


# --- a run


STUDENT = DIT | {"guidance_embed": True}
SAMPLE = {"steps": 1, "sampler": "euler", "count": 4, "guidance": {"name": "embedded", "scale": 3.0}}


def info_of(**changes):
    return {
        "model": DIT, "path": {"name": "rectified"}, "prediction": "velocity", "shape": [8, 8, 1], "num_classes": 10, "conditions": {"label": []},
        "step": 0, "weights": "ema",
    } | changes  # fmt: skip


def write(out, **changes):
    """An export of a network with random parameters."""
    info = info_of(**changes)
    role = export.role_of(info, "teacher")
    export.write(out, randomise(export.abstract(role, info)), info)
    return str(out)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write(tmp_path_factory.mktemp("teacher") / "export")


def config(teacher, start=None, **changes):
    roles = {"teacher": {"checkpoint": teacher}, "net": {"checkpoint": start or teacher}}
    return tiny(**(dict(data={"name": "digits"}, model=STUDENT, objective="guidance_distillation", roles=roles, sample=SAMPLE) | changes))


@pytest.fixture(scope="module")
def begun(teacher):
    """(run, its network at step 0, the average of that, the teacher, the parameters), on the host."""
    this = Run(config(teacher))
    state = this.fresh()
    params = jax.device_get((state.params["net"], state.ema["ema"], this.frozen["teacher"]))
    return this, *(this.roles[name].net(p) for name, p in zip(("net", "net", "teacher"), params)), params[0]


def test_the_student_begins_as_its_teacher_whatever_the_scale(begun):
    this, net, average, taught_by, params = begun
    assert this.added == {"net": ("g_embed",)} and params["g_embed"]["fc1"]["kernel"].any()
    x, t = jax.random.normal(KEY, (3, 8, 8, 1)), jnp.asarray([0.1, 0.5, 1.0])
    cond = {"label": jnp.asarray([0, 4, 9])}
    want = taught_by(x, t, cond)  # op by op: two programs would round differently
    assert jnp.abs(want).max() > 0.1
    for student in (net, average):
        np.testing.assert_array_equal(student(x, t, cond | {"guidance": jnp.asarray([1.0, 2.5, 9.0])}), want)
    np.testing.assert_array_equal(embedded(net, 4.0)(x, t, cond), want)
    with pytest.raises(ConfigError, match=r"with guidance_embed .sampled with guidance = .*'embedded'.* needs cond\['guidance'\]"):
        net(x, t, cond)
    with pytest.raises(ConfigError, match="'embedded' needs a network that takes the scale as an input .model.guidance_embed = True"):
        embedded(taught_by, 2.0)


def test_the_first_loss_of_a_run_is_what_guidance_changes(begun):
    """The student is the teacher without guidance, so the error is (w - 1) (u_1 - u_0), squared and averaged."""
    this, net, _, taught_by, _ = begun
    nets = {"net": net, "teacher": taught_by}
    given = {"x": jax.random.normal(KEY, (6, 8, 8, 1)), "cond": {"label": jnp.arange(6)}, "step": 0}
    drawn = this.objective.rollout(nets, given, KEY)
    value, _ = jax.jit(lambda batch: this.objective.players[0].loss(nets, batch, None))(drawn)
    x_t = RF.perturb(drawn["x"], drawn["z"], drawn["t"])
    ask = jax.jit(lambda label: taught_by(x_t, drawn["t"], {"label": label}))
    step = (drawn["cond"]["guidance"] - 1)[:, None, None, None] * (ask(jnp.arange(6)) - ask(jnp.full(6, 10)))
    assert float(value) == pytest.approx(float(jnp.mean(step**2)), rel=1e-4) and value > 1e-2


@pytest.mark.slow
def test_train_export_and_sample(teacher, tmp_path):
    said = train(config(teacher, steps=2), tmp_path / "run")[1]
    assert "net, not in its checkpoint: g_embed" in said
    export.export(tmp_path / "run", tmp_path / "out", weights="params")
    assert export.info_of(tmp_path / "out")["conditions"] == {"guidance": [], "label": []}
    cond = {"label": np.arange(4, dtype=np.int32)}
    own, other = (generator.load(tmp_path / "out", settings=s)(cond, 4) for s in ({}, {"guidance": {"name": "embedded", "scale": 1.5}}))
    assert np.abs(own - other).max() > 1e-5  # the scale is learned and looked at
    for guidance in ("none", {"name": "cfg", "scale": 2.0}):
        with pytest.raises(ConfigError, match=r"needs cond\['guidance'\]"):
            generator.load(tmp_path / "out", settings={"guidance": guidance})(cond, 4)
    # Started from a student, nothing is new.
    assert Run(config(teacher, start=str(tmp_path / "out"))).added == {"net": ()}


def test_checkpoints_that_do_not_fit_are_refused(teacher, tmp_path):
    wider = write(tmp_path / "wide", model=DIT | {"width": 24})
    with pytest.raises(ConfigError, match="roles.net.checkpoint does not fit the model"):
        Run(config(teacher, start=wider))
    # Another part than the embedding of the scale may not be missing.
    with pytest.raises(ConfigError, match=r"does not fit the model:\n  blocks/attn/k_norm/scale: has nothing, needs"):
        Run(config(teacher, model=STUDENT | {"qk_norm": True}))


def test_a_network_without_the_input_is_refused_before_anything_is_written(teacher, tmp_path):
    with pytest.raises(ConfigError, match="set model.guidance_embed = True"):
        train(config(teacher, model=DIT, sample={"steps": 1, "count": 4}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"needs cond\['guidance'\]"):  # an objective that does not supply it
        train(tiny(data={"name": "digits"}, model=STUDENT, sample=SAMPLE), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [8, 12, 1]}, r"roles.teacher was trained with another shape than this run's: \(8, 12, 1\) is not \(8, 8, 1\)"),
        ({"model": DIT | {"num_classes": 4}}, "roles.teacher was trained with another number of classes than this run's: 4 is not 10"),
        ({"conditions": {"label": [], "text": [3, 5]}}, "roles.teacher was trained with another set of conditions"),
        ({"conditions": {"label": [], "guidance": []}}, "roles.teacher was trained with another set of conditions"),
    ],
)
@pytest.mark.parametrize("objective", ["guidance_distillation", "consistency_distillation"])
def test_a_teacher_of_something_else_is_refused_by_every_objective(objective, changes, message, teacher, tmp_path):
    other = write(tmp_path / "other", **changes)
    roles = {"teacher": {"checkpoint": other}, "net": {"checkpoint": teacher}}
    with pytest.raises(ConfigError, match=message):
        Run(config(teacher, objective=objective, roles=roles, ema={"target": "constant"}))


def test_data_with_a_scale_of_their_own_are_refused():
    has = {"guidance": ()}
    run = types.SimpleNamespace(
        pipeline=types.SimpleNamespace(shape=(2,), conditions=has, dtype="float32"), roles={}, encoded=False, objective=gd.OBJECTIVE,
        config={"objective": "guidance_distillation"},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="the data has guidance, which objective 'guidance_distillation' makes itself"):
        Run._example(run)
    run.pipeline.conditions = {"label": ()}
    assert {k: (v.shape, v.dtype) for k, v in Run._example(run)[1].items()} == {"label": ((1,), jnp.int32), "guidance": ((1,), jnp.float32)}


def test_a_teacher_that_is_no_denoiser_is_refused(teacher, tmp_path):
    judge = {"name": "classifier", "num_classes": 10}
    with pytest.raises(ConfigError, match="roles.teacher.checkpoint = .* is a classifier, not a denoiser"):
        Run(config(write(tmp_path / "judge", model=judge), start=teacher))
