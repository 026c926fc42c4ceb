"""Diffusion-DPO: its identities, its gradient at the reference, and that it moves mass to what is preferred."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flowjax import exact, predictions
from flowjax.config import ConfigError
from flowjax.objectives import dpo
from flowjax.paths import PATHS, rectified
from flowjax.predictions import Model
from flowjax.times import draw, interval

pytestmark = pytest.mark.usefixtures("float64")

RF = rectified()
LINE = exact.mixture([0.5, 0.5], [-1.0, 1.0], [0.3, 0.3])
KEY = jax.random.key(0)
T = jnp.linspace(0.1, 0.9, 16)


def pairs(n=16, dim=2):
    win, lose, z = jnp.asarray(np.random.RandomState(0).standard_normal((3, n, dim)))
    return {"win": win, "lose": lose, "z": z, "t": jnp.linspace(0.1, 0.9, n), "cond": {}}


def linear(scale, offset=0.0, prediction="velocity", path=RF):
    return Model(lambda x_t, t, cond, key: scale * x_t + offset, path, prediction)


NET, REFERENCE = linear(0.3, 0.2), linear(-0.1)


def with_errors(net, reference):
    """(nets, batch) of one pair for which networks have these errors (win, lose): net predicts 0 + sqrt(error) too much."""

    def model(errors):
        # At t = 0.5, z = 0 the winner (x = 2) comes as x_t = 1 and the loser (x = -2) as -1; the velocity is -x.
        def apply(x_t, t, cond, key):
            return -2 * x_t + jnp.where(x_t > 0, errors[0] ** 0.5, errors[1] ** 0.5)

        return Model(apply, RF, "velocity")

    batch = {"win": jnp.full((1, 3), 2.0), "lose": jnp.full((1, 3), -2.0), "z": jnp.zeros((1, 3)), "t": jnp.full(1, 0.5), "cond": {}}
    return {"net": model(net), "reference": model(reference)}, batch


def test_golden_number():
    """(beta / 2) ((0.12 - 0.10) - (0.11 - 0.11)) = 1 at beta = 100: the winner is fitted better, the loss is log(1 + 1/e)."""
    nets, batch = with_errors((0.10, 0.12), (0.11, 0.11))
    value, metrics = dpo.loss(nets, batch, None, beta=100.0)
    assert float(value) == pytest.approx(0.313262, abs=1e-6)
    assert float(metrics["margin"]) == pytest.approx(1.0) and metrics["accuracy"] == 1.0
    assert float(metrics["drift_win"]) == pytest.approx(-0.01) and float(metrics["drift_lose"]) == pytest.approx(0.01)
    nets, batch = with_errors((0.10, 0.12), (0.11, 0.15))
    value, metrics = dpo.loss(nets, batch, None, beta=100.0)
    assert float(metrics["margin"]) == pytest.approx(-1.0) and metrics["accuracy"] == 0.0
    assert float(value) == pytest.approx(1.313262, abs=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", ["velocity", "eps"])
def test_loss_is_log_two_and_accuracy_one_half_at_the_reference(path, form):
    net = linear(0.3, 0.2, path=PATHS[path]())
    value, metrics = dpo.loss({"net": net, "reference": net}, pairs(), None, form=form)
    assert float(value) == pytest.approx(np.log(2), rel=1e-14)
    assert metrics["accuracy"] == 0.5 and metrics["margin"] == 0 == metrics["drift_win"] == metrics["drift_lose"]


def test_gradient_at_the_reference_is_a_quarter_beta_of_the_errors_difference():
    batch = pairs()

    def difference(scale):
        def mean_error(x):
            return jnp.mean(((batch["z"] - x) - scale * RF.perturb(x, batch["z"], batch["t"])) ** 2)

        return mean_error(batch["win"]) - mean_error(batch["lose"])

    def value(scale):
        return dpo.loss({"net": linear(scale), "reference": linear(0.3)}, batch, None, beta=50.0)[0]

    assert float(jax.grad(value)(0.3)) == pytest.approx(50 / 4 * float(jax.grad(difference)(0.3)), rel=1e-12)


def test_swapping_winner_and_loser_flips_the_margin():
    batch = pairs()
    swapped = {**batch, "win": batch["lose"], "lose": batch["win"]}
    value, metrics = dpo.loss({"net": NET, "reference": REFERENCE}, batch, None, beta=3.0)
    other, flipped = dpo.loss({"net": NET, "reference": REFERENCE}, swapped, None, beta=3.0)
    assert float(flipped["margin"]) == pytest.approx(-float(metrics["margin"])) and metrics["margin"] != 0
    assert float(flipped["accuracy"]) == pytest.approx(1 - float(metrics["accuracy"]))
    assert flipped["drift_win"] == metrics["drift_lose"]
    # log sigmoid(u) - log sigmoid(-u) = u
    assert float(other - value) == pytest.approx(float(metrics["margin"]))


def test_each_pair_counts_alike():
    """The loss is the mean over pairs of the loss of each."""
    batch = pairs(4)
    nets = {"net": NET, "reference": REFERENCE}
    single = [dpo.loss(nets, {k: v[i : i + 1] if k != "cond" else v for k, v in batch.items()}, None, beta=9.0)[0] for i in range(4)]
    assert float(dpo.loss(nets, batch, None, beta=9.0)[0]) == pytest.approx(float(np.mean(single)))


def test_constant_added_to_both_errors_changes_nothing():
    shared = with_errors((0.10 + 0.4, 0.12 + 0.4), (0.11, 0.11)), with_errors((0.10, 0.12), (0.11 + 0.7, 0.11 + 0.7))
    for nets, batch in shared:
        assert float(dpo.loss(nets, batch, None, beta=100.0)[0]) == pytest.approx(0.313262, abs=1e-6)


def test_error_is_a_mean_over_dimensions():
    """Repeating every dimension changes nothing."""
    batch = pairs()
    doubled = {k: jnp.concatenate([v, v], axis=1) if k in ("win", "lose", "z") else v for k, v in batch.items()}
    nets = {"net": NET, "reference": REFERENCE}
    assert float(dpo.loss(nets, batch, None)[0]) == pytest.approx(float(dpo.loss(nets, doubled, None)[0]), rel=1e-12)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_eps_form_is_the_velocity_form_with_beta_one_minus_t_squared(t):
    batch = {**pairs(), "t": jnp.full(16, t)}
    nets = {"net": NET, "reference": REFERENCE}
    eps = dpo.loss(nets, batch, None, beta=5.0, form="eps")[1]["margin"]
    velocity = dpo.loss(nets, batch, None, beta=5.0 * (1 - t) ** 2, form="velocity")[1]["margin"]
    assert float(eps) == pytest.approx(float(velocity), rel=1e-12)


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("path", ["rectified", "vp_linear"])
def test_loss_does_not_depend_on_what_the_network_predicts(prediction, path):
    path = PATHS[path]()
    batch = pairs(dim=1)
    values = {}
    for form in ("velocity", "eps"):
        for kind in ("velocity", prediction):
            nets = {"net": LINE.model(path, kind), "reference": exact.gaussian([0.1], 0.5).model(path, kind)}
            values[form, kind] = float(dpo.loss(nets, batch, None, beta=2.0, form=form)[0])
        assert values[form, prediction] == pytest.approx(values[form, "velocity"], rel=1e-9)
    assert abs(values["velocity", "velocity"] - values["eps", "velocity"]) > 1e-3


def test_no_gradient_reaches_the_reference():
    def value(net, reference):
        return dpo.loss({"net": linear(net), "reference": linear(reference)}, pairs(), None, beta=3.0)[0]

    of_net, of_reference = jax.grad(value, argnums=(0, 1))(0.3, 0.1)
    assert abs(of_net) > 1e-2 and of_reference == 0


def test_dropout_is_off_and_the_condition_is_given_to_both_networks_for_both_sides():
    calls = []

    def apply(x_t, t, cond, key):
        calls.append((cond["label"][0], key))
        return x_t

    net = Model(apply, RF, "velocity")
    dpo.loss({"net": net, "reference": net}, {**pairs(), "cond": {"label": jnp.full(16, 7)}}, KEY)
    assert calls == [(7, None)] * 4


def test_anchor_adds_the_winners_error():
    nets, batch = with_errors((0.10, 0.12), (0.11, 0.11))
    plain = dpo.loss(nets, batch, None, beta=100.0)[0]
    assert float(dpo.loss(nets, batch, None, beta=100.0, anchor=3.0)[0] - plain) == pytest.approx(0.3)
    of_eps = dpo.loss(nets, batch, None, beta=100.0, anchor=3.0, form="eps")[0] - dpo.loss(nets, batch, None, beta=100.0, form="eps")[0]
    assert float(of_eps) == pytest.approx(0.3 * 0.25)


def test_default_strength_is_that_of_the_docstring():
    """beta = 1000 without settings, on the velocity."""
    nets, batch = with_errors((0.110, 0.112), (0.11, 0.11))
    assert float(dpo.loss(nets, batch, None)[1]["margin"]) == pytest.approx(1.0)


def test_learning_from_preferences_tilts_the_reference_towards_the_winners():
    """The trained network is the exact velocity of the mixture with weight sigmoid(theta) on the right component."""
    reference = LINE.model(RF)

    def tilted(theta):
        def apply(x_t, t, cond, key):
            zeros = jnp.zeros(len(x_t), int)
            left, right = LINE.velocity(RF, x_t, t, zeros), LINE.velocity(RF, x_t, t, zeros + 1)
            rho = LINE.responsibilities(RF, x_t, t)[:, 1:]
            rho = rho * jnp.exp(theta) / (1 - rho + rho * jnp.exp(theta))
            return left + rho * (right - left)

        return Model(apply, RF, "velocity")

    x, label = LINE.sample_labelled(KEY, 512, jnp.float64)
    right, left = (x[label == k][:200] for k in (1, 0))
    z, t = jax.random.normal(jax.random.key(1), (200, 1), jnp.float64), jax.random.uniform(jax.random.key(2), (200,), jnp.float64)

    def value(theta, win, lose):
        batch = {"win": win, "lose": lose, "z": z, "t": t, "cond": {}}
        return dpo.loss({"net": tilted(theta), "reference": reference}, batch, None, beta=10.0)[0]

    slope = jax.jit(jax.grad(value))
    assert slope(0.0, right, left) < -1e-2 < 1e-2 < slope(0.0, left, right)
    # Preferred at random, pairs lead back to the reference.
    coin = (jnp.arange(200) % 2 == 0)[:, None]
    both = jnp.where(coin, right, left), jnp.where(coin, left, right)
    assert slope(1.0, *both) > 1e-2 and slope(-1.0, *both) < -1e-2


# Rollout.


def rollout(prediction="velocity", n=20_000, **settings):
    batch = {"win": jnp.zeros((n, 2), jnp.float32), "lose": jnp.ones((n, 2), jnp.float32), "cond": {}, "step": 0}
    return batch, dpo.rollout({"net": linear(1.0, prediction=prediction)}, batch, KEY, **settings)


def test_rollout_draws_one_time_and_one_noise_for_the_pair():
    batch, out = rollout()
    assert set(out) == {"win", "lose", "cond", "step", "t", "z"} and out["win"] is batch["win"] and out["lose"] is batch["lose"]
    assert out["z"].shape == (20_000, 2) and out["z"].dtype == jnp.float32 and out["t"].shape == (20_000,)
    assert stats.kstest(np.ravel(out["z"]), "norm").pvalue > 1e-3
    assert stats.kstest(np.asarray(out["t"]), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(out["t"], out["z"][:, 0])[0, 1]) < 0.03


def test_rollout_follows_the_time_law_within_the_predictions_interval():
    t = rollout(time={"name": "logit_normal", "mean": 0.7})[1]["t"]
    assert stats.ks_2samp(t, draw(jax.random.key(5), 20_000, RF, "logit_normal", mean=0.7)).pvalue > 1e-3
    high = interval(RF, "eps")[1]
    assert 0.999 * high < rollout("eps")[1]["t"].max() <= high < 1


def test_networks_see_the_same_noise_and_time_for_both_members():
    seen = []

    def apply(x_t, t, cond, key):
        seen.append((x_t, t))
        return x_t

    net = Model(apply, RF, "velocity")
    batch = pairs()
    dpo.loss({"net": net, "reference": net}, {**batch, "win": batch["lose"]}, None)
    for x_t, t in seen:
        np.testing.assert_array_equal(x_t, RF.perturb(batch["lose"], batch["z"], batch["t"]))
        np.testing.assert_array_equal(t, batch["t"])


def test_bad_settings_are_refused():
    for beta, anchor in ((0.0, 0.0), (-5.0, 0.0), (5.0, -1.0)):
        with pytest.raises(ConfigError, match=f"objective.beta = {beta} should be positive, and objective.anchor = {anchor} not negative"):
            dpo.loss({"net": NET, "reference": REFERENCE}, pairs(), None, beta=beta, anchor=anchor)
    with pytest.raises(ConfigError, match="objective.form = 'x' is unknown; valid: velocity, eps"):
        dpo.loss({"net": NET, "reference": REFERENCE}, pairs(), None, form="x")
    with pytest.raises(ConfigError, match=r"roles.reference was trained with another path than the config's: \('vp_linear', 0.1, 20.0\) is not"):
        dpo.loss({"net": NET, "reference": linear(0.1, path=PATHS["vp_linear"]())}, pairs(), None)
    with pytest.raises(ConfigError, match="needs preference pairs .*the data has no win/lose"):
        dpo.rollout({"net": NET}, {"x": jnp.zeros((2, 1)), "win": jnp.zeros((2, 1)), "cond": {}}, KEY)


# --- other links


@pytest.mark.parametrize(("link", "expected"), [("squared", 0.25), ("hinge", 0.0), ("sigmoid", 1 / (1 + np.e)), ("log_sigmoid", np.log1p(1 / np.e))])
def test_cost_of_a_margin_of_one(link, expected):
    nets, batch = with_errors((0.10, 0.12), (0.11, 0.11))
    assert float(dpo.loss(nets, batch, None, beta=100.0, link=link)[0]) == pytest.approx(expected, abs=1e-7)
    if link != "hinge":
        return
    swapped = {**batch, "win": batch["lose"], "lose": batch["win"]}
    assert float(dpo.loss(nets, swapped, None, beta=100.0, link=link)[0]) == pytest.approx(2.0)


def test_ipo_wants_log_ratios_one_over_two_beta_apart():
    """2310.12036 eq. 17: the optimum of the difference of log-ratios, half the errors' difference here, is 1 / (2 beta)."""
    beta = 40.0

    def value(gap):
        nets, batch = with_errors((0.2 - gap, 0.2), (0.2, 0.2))
        return dpo.loss(nets, batch, None, beta=beta, link="squared")[0]

    assert abs(float(jax.grad(value)(1 / beta))) < 1e-9 < 1e-2 < -float(jax.grad(value)(0.5 / beta))
    # The paper's own loss times beta^2.
    assert float(value(0.01)) == pytest.approx(beta**2 * (0.01 / 2 - 1 / (2 * beta)) ** 2)


def test_weights_of_pairs():
    batch, nets = pairs(4), {"net": NET, "reference": REFERENCE}
    single = [dpo.loss(nets, {k: v[i : i + 1] if k != "cond" else v for k, v in batch.items()}, None, beta=9.0, anchor=0.3)[0] for i in range(4)]
    weighted = dpo.loss(nets, {**batch, "weight": jnp.asarray([2.0, 0.0, 1.0, 1.0])}, None, beta=9.0, anchor=0.3)[0]
    assert float(weighted) == pytest.approx(float(2 * single[0] + single[2] + single[3]) / 4)


# --- KTO


def asked(scale, offset=0.0):
    """v = scale x_t + offset + label / 10."""
    return Model(lambda x_t, t, cond, key: scale * x_t + offset + cond["label"][:, None] / 10, RF, "velocity")


def judged(**batch):
    """A batch as the rollout makes it, with the reference point that the train step would find."""
    nets = {"net": asked(0.3, 0.2), "reference": asked(-0.1)}
    out = dpo.judged_rollout({"net": asked(0.3)}, {"cond": {"label": jnp.arange(6)}} | jax.tree.map(jnp.asarray, batch), KEY)
    return nets, out | {"measured": dpo.reference_point(nets, out, None, beta=3.0)}


X = np.random.RandomState(1).standard_normal((6, 2))
GOOD = np.array([True, False, True, True, False, True])


def test_kto_by_hand():
    """2404.04465: 1 - sigmoid(+-(beta log ratio - Q)) with Q = max(0, mean of the mismatched log-ratios), here with one row's neighbour."""
    nets, batch = judged(x=X, desirable=GOOD)
    x_t = (1 - batch["t"])[:, None] * X + batch["t"][:, None] * batch["z"]

    def gain(label):
        own, other = (np.asarray(s * x_t + o + label[:, None] / 10 - (batch["z"] - X)) for s, o in ((0.3, 0.2), (-0.1, 0.0)))
        return 1.5 * ((other**2).mean(1) - (own**2).mean(1))

    matched, mismatched = gain(np.arange(6)), gain(np.roll(np.arange(6), 1))
    assert float(batch["measured"]["reference_point"]) == pytest.approx(mismatched.mean())
    for point in (mismatched.mean(), -mismatched.mean()):
        u = np.where(GOOD, 1, -1) * (matched - max(point, 0))
        value, metrics = dpo.judged_loss(nets, batch | {"measured": {"reference_point": jnp.asarray(point)}}, None, beta=3.0, desirable=2.0)
        assert float(value) == pytest.approx(np.mean(np.where(GOOD, 2, 1) / (1 + np.exp(u))))
        assert float(metrics["reference_point"]) == max(point, 0) and float(metrics["margin"]) == pytest.approx(u.mean())
    assert mismatched.mean() != 0


def test_kto_of_pairs_takes_both_members_of_each():
    nets, batch = judged(win=X, lose=-X)
    np.testing.assert_array_equal(batch["x"], np.concatenate([X, -X]))
    np.testing.assert_array_equal(batch["good"], [True] * 6 + [False] * 6)
    np.testing.assert_array_equal(batch["z"][:6], batch["z"][6:])
    np.testing.assert_array_equal(batch["other"]["label"], np.roll(np.tile(np.arange(6), 2), 1))
    # Parts of the batch see the reference point of the whole: the mean over slices is the loss.
    whole = dpo.judged_loss(nets, batch, None, beta=3.0)[0]
    part = lambda i: jax.tree.map(lambda v: v[i::2] if v.ndim else v, batch)  # noqa: E731
    assert float(whole) == pytest.approx(float(np.mean([dpo.judged_loss(nets, part(i), None, beta=3.0)[0] for i in (0, 1)])), rel=1e-12)


def test_kto_gradient_is_none_of_the_reference_points():
    """Where net = reference: - w beta / 4 of the drift's gradient, good rows down and bad rows up."""
    _, batch = judged(x=X, desirable=GOOD)

    def value(scale):
        nets = {"net": asked(scale), "reference": asked(0.3)}
        return dpo.judged_loss(nets, batch | {"measured": dpo.reference_point(nets, batch, None, beta=3.0)}, None, beta=3.0)[0]

    def signed(scale):
        return jnp.mean(jnp.where(GOOD, 1, -1) * dpo.error(asked(scale), X, batch["z"], batch["t"], batch["cond"], "velocity"))

    # sigmoid'(0) = 1 / 4, and g falls with half the error; the reference point is a constant only because its gradient is stopped.
    nets = {"net": asked(0.3), "reference": asked(0.3)}
    at_zero = batch | {"measured": {"reference_point": jnp.zeros(())}}
    fixed = jax.grad(lambda scale: dpo.judged_loss(nets | {"net": asked(scale)}, at_zero, None, beta=3.0)[0])
    assert float(fixed(0.3)) == pytest.approx(3.0 / 8 * float(jax.grad(signed)(0.3)), rel=1e-9)
    assert float(value(0.3)) == pytest.approx(0.5)


def test_kto_needs_judgements():
    with pytest.raises(ConfigError, match="needs preference pairs .* or examples with a mark 'desirable'"):
        judged(x=X)
    nets, batch = judged(x=X, desirable=GOOD)
    with pytest.raises(ConfigError, match="objective.beta = -1.0 should be positive"):
        dpo.judged_loss(nets, batch, None, beta=-1.0)
    with pytest.raises(ConfigError, match="objective.undesirable = 0 should be positive"):
        dpo.judged_loss(nets, batch, None, undesirable=0)
    with pytest.raises(ConfigError, match="objective.link = 'ipo' is unknown; valid: hinge, log_sigmoid"):
        dpo.judged_loss(nets, batch, None, link="ipo")
