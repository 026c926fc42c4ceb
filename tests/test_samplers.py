"""Driver, deterministic samplers and what holds for every entry of SAMPLERS, against closed-form flows."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import config, exact
from flowjax.config import ConfigError
from flowjax.paths import PATHS, edm, rectified, trigonometric, ve
from flowjax.predictions import Memory, Model
from flowjax.samplers import SAMPLERS, nfe, noise, sample
from flowjax.times import grid

pytestmark = pytest.mark.usefixtures("float64")

RF = rectified()
KEY = jax.random.key(0)
# Order in the step size on a smooth non-Gaussian problem; None: not a solver of the ODE.
ORDERS = {
    "euler": 1,
    "midpoint": 2,
    "heun": 2,
    "rk4": 4,
    "ddim": 1,
    "ancestral": None,
    "euler_maruyama": None,
    "churn": None,
    "annealed_langevin": None,
    "predictor_corrector": None,
    "dpmpp_2m": 2,
    "dpmpp_2m_sde": None,
    "renoise": None,
    "flow_map": None,
    "adaptive": None,
}
SOLVERS = [name for name, order in ORDERS.items() if order]


def factor(sampler, variance, times, path=RF):
    """x_0 / x_1 for data N(0, variance): the solvers are linear there."""
    model = exact.gaussian([0.0], variance).model(path)
    return float(sample(model, jnp.ones((1, 1)), KEY, times, sampler)[0, 0])


class Count:
    """Counts the evaluations of a model as they run, and the rows of each."""

    def __init__(self, model):
        self.rows = []
        self.times = []

        def apply(x_t, t, cond, key):
            jax.debug.callback(self.note, jnp.asarray(len(x_t)), t[0])
            return model.apply(x_t, t, cond, key)

        self.model = model.replace(apply=apply)

    def note(self, rows, t):
        self.rows.append(int(rows))
        self.times.append(float(t))

    @property
    def calls(self):
        jax.effects_barrier()
        return len(self.rows)


# Closed-form convergence tables: data N(0, s2), rectified path, uniform grid of N = 1, 2, 4, ... steps from 1 to 0.

TABLE = {
    ("euler", 1.0): [0, 0.5, 0.72, 0.85082176, 0.92270422, 0.96061428],
    ("ddim", 1.0): [0, 0.5, 0.72, 0.85082176, 0.92270422, 0.96061428],
    ("euler", 0.25): [0, 0.2, 0.34054054, 0.41478455, 0.45568309, 0.47736357],
    ("heun", 1.0): [0.5, 0.9375, 0.99, 0.9987061, 0.99983696, 0.99997958],
    ("heun", 0.25): [0.5, 0.48, 0.5048347, 0.50244143, 0.50076381, 0.50021000],
    ("midpoint", 0.25): [0.4, 0.49438669, 0.49829122, 0.49977645, 0.49997165, 0.49999644],
    ("rk4", 0.25): [0.38, 0.49678962, 0.50000607, 0.50000007, 0.50000009, 0.50000001],
    ("dpmpp_2m", 1.0): [0, 0.5, 0.81, 0.98845599, 1.00303269],
}


@pytest.mark.parametrize(("name", "variance"), TABLE)
def test_factors_of_a_gaussian(name, variance):
    expected = TABLE[name, variance]
    found = [factor(name, variance, grid(2**i, RF)) for i in range(len(expected))]
    np.testing.assert_allclose(found, expected, atol=1.1e-8)


def test_ddim_on_the_trigonometric_path():
    path = trigonometric()
    found = [factor("ddim", 1.0, grid(n, path), path) for n in (1, 2, 4, 8, 16)]
    np.testing.assert_allclose(found, [math.cos(math.pi / 2 / n) ** n for n in (1, 2, 4, 8, 16)], atol=1e-12)


def test_dpmpp_2m_on_equal_steps_of_log_snr():
    expected = [0.02195, 0.00767, 0.002022, 0.000512, 0.000128]
    ends = math.log(0.05 / 0.95), math.log(0.95 / 0.05)
    found = []
    for i in range(5):
        log_snr = np.linspace(*ends, 8 * 2**i + 1)
        found.append(abs(factor("dpmpp_2m", 1.0, 1 / (1 + np.exp(log_snr))) - 1))
    np.testing.assert_allclose(found, expected, rtol=4e-3)


def test_the_table_of_orders_is_complete():
    assert set(ORDERS) == set(SAMPLERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name):
    """On a mixture: Gaussians hide errors (Heun looks third order there). The ends are those of a smooth problem."""
    data, x = exact.mix4(), noise(RF, KEY, (64, 2), 1.0, jnp.float64)
    start, stop = (0.9, 0.1) if name == "dpmpp_2m" else (1.0, 0.0)
    goal = data.flow_map(RF, x, start, stop)
    if name == "dpmpp_2m":  # second order in the log-SNR
        grids = [1 / (1 + np.exp(np.linspace(-math.log(9), math.log(9), n + 1))) for n in (64, 128)]
    else:
        grids = [np.linspace(start, stop, n + 1) for n in (64, 128)]
    errors = [float(jnp.sqrt(jnp.mean((sample(data.model(RF), x, KEY, g, name) - goal) ** 2))) for g in grids]
    assert errors[0] < 0.05
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.15 * ORDERS[name] ** 0.5)


@pytest.mark.parametrize("name", SOLVERS)
def test_inversion_runs_the_ode_backwards(name):
    data, path = exact.gaussian([0.3], 0.25), trigonometric()
    x = jnp.asarray([[0.8], [-1.0]])
    up = sample(data.model(path), x, KEY, np.linspace(0.1, 0.8, 65), name)
    np.testing.assert_allclose(up, data.flow_map(path, x, 0.1, 0.8), atol=4e-2)


def test_first_euler_step_returns_the_mean_of_any_data():
    data = exact.mixture([0.3, 0.7], [[-1.0, 2.0], [0.8, 0.1]], [0.3, 0.5])
    x = noise(RF, KEY, (5, 2), 1.0, jnp.float64)
    for name in ("euler", "ddim", "dpmpp_2m", "renoise"):
        out = sample(data.model(RF), x, KEY, [1.0, 0.0], name)
        np.testing.assert_allclose(out, np.broadcast_to(data.mean(), (5, 2)), atol=1e-12)


@pytest.mark.parametrize("prediction", ["x", "velocity", "v"])
def test_ddim_is_euler_on_the_rectified_path(prediction):
    net = lambda x_t, t, cond, key: jnp.sin(3 * x_t + t[:, None])
    model = Model(net, RF, prediction)
    x = noise(RF, KEY, (4, 3), 1.0, jnp.float64)
    ends = sample(model, x, KEY, grid(7, RF), "ddim"), sample(model, x, KEY, grid(7, RF), "euler")
    np.testing.assert_allclose(*ends, atol=1e-12)


def test_ddim_visits_the_same_states_on_every_path():
    """With exact predictions the list of noise levels is all that matters."""
    data, sigmas = exact.mix4(), np.geomspace(20.0, 0.05, 9)
    z = jax.random.normal(KEY, (4, 2))
    ends = []
    for name in ("rectified", "trigonometric", "vp_linear", "ve", "edm"):
        path = PATHS[name]()
        times = path.time_of_sigma(jnp.asarray(sigmas))
        x = sample(data.model(path, "x"), path.a(times[0]) * 20.0 * z, KEY, times, "ddim")
        ends.append(x / path.a(times[-1]))
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=1e-9)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("path", ["rectified", "trigonometric", "vp_cosine", "edm"])
def test_constant_eps_gives_the_exact_intermediate_states(name, path):
    """x_s = a_s x + b_s z at every step for a fixed pair (x, z): catches an index that is off by one."""
    path = PATHS[path]()
    x, z = jax.random.normal(KEY, (2, 3, 2))
    times = jnp.asarray(grid(5, path, t_start=0.98))
    model = Model(lambda x_t, t, cond, key: z, path, "eps")
    _, states = sample(model, path.perturb(x, z, times[0]), KEY, times, name, return_trajectory=True)
    expected = jnp.stack([path.perturb(x, z, t) for t in times])
    np.testing.assert_allclose(states, expected, atol=1e-10)


# Every sampler.


# "flow_map" takes the steps of networks of mean velocities, has nothing to do with others, and is tested with them.
OF_VELOCITIES = [name for name in SAMPLERS if name != "flow_map"]


@pytest.mark.parametrize("name", sorted(set(OF_VELOCITIES) - {"annealed_langevin", "euler_maruyama", "predictor_corrector"}))
def test_a_point_mass_is_reached(name):
    point = jnp.asarray([0.7, -1.2])
    model = exact.gaussian(point, 0.0).model(RF, "x")
    x = noise(RF, KEY, (16, 2), 1.0, jnp.float64)
    times = [1.0, 1e-3] if name == "adaptive" else grid(6, RF)
    atol = 1e-2 if name == "adaptive" else 1e-9
    np.testing.assert_allclose(sample(model, x, KEY, times, name), jnp.broadcast_to(point, x.shape), atol=atol)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_models_are_finite_at_both_ends(path):
    path = PATHS[path]()
    with jax.enable_x64(False):
        # The exact velocity of N(0, 1/4), written so that it is cheap to compile.
        slope = lambda t: (path.a(t) * path.da(t) / 4 + path.b(t) * path.db(t)) / (path.a(t) ** 2 / 4 + path.b(t) ** 2)
        model = Model(lambda x_t, t, cond, key: slope(t)[:, None] * x_t, path, "velocity")
        x = noise(path, KEY, (3, 1), path.t_max)
        times = jnp.asarray(grid(3, path), jnp.float32)
        for name in OF_VELOCITIES:
            sampler = config.build(SAMPLERS, name, "sampler")
            if name == "adaptive":  # slow to compile; it has tests of its own
                continue
            state, carry = x, sampler.init(x, times)
            for i in range(3):  # without jit: a step at a time is quick
                state, carry = sampler.step(model, state, times[i], times[i + 1], jax.random.key(i), carry)
                assert bool(jnp.isfinite(state).all()), (name, i)
            assert state.dtype == jnp.float32


def test_gradients_flow_through_a_trajectory():
    """NaN-safe where: also the branches not taken."""
    model = Model(lambda x_t, t, cond, key: (t[:, None] - (1 - t[:, None]) / 4) * x_t, RF, "velocity")
    x = jnp.asarray([[0.4]])
    for name in ("heun", "dpmpp_2m", "dpmpp_2m_sde", "churn", "ancestral", "euler_maruyama"):
        slope = jax.grad(lambda x: sample(model, x, KEY, grid(8, RF), name).sum())(x)
        assert np.isfinite(slope).all(), name


@pytest.mark.parametrize("name", OF_VELOCITIES)
def test_rows_do_not_depend_on_their_batch(name):
    model = Model(lambda x_t, t, cond, key: jnp.tanh(x_t) + t[:, None], RF, "velocity")
    times = np.linspace(0.9, 0.1, 4)
    x = noise(RF, KEY, (8, 2), 0.9, jnp.float64)
    run = jax.jit(lambda x, key: sample(model, x, key, times, name))
    atol = 1e-4 if name == "adaptive" else 1e-12
    whole = run(x, KEY)
    np.testing.assert_allclose(run(x[:3], KEY), whole[:3], atol=atol)
    # With a key per row the place in the batch does not matter either.
    keys, order = jax.random.split(KEY, 8), np.asarray([5, 1, 0, 7])
    np.testing.assert_allclose(run(x[order], keys[order]), run(x, keys)[order], atol=atol)
    if ORDERS[name] is None and name != "adaptive":
        assert not np.allclose(run(x, jax.random.key(1)), whole)
        equal_starts = run(jnp.broadcast_to(x[:1], x.shape), keys)
        assert not np.allclose(equal_starts[0], equal_starts[1])


def test_sharding_changes_nothing():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    data = exact.mix4()
    run = jax.jit(lambda x: sample(data.model(RF), x, KEY, np.linspace(0.9, 0.1, 4), "ancestral"))
    x = noise(RF, KEY, (16, 2), 0.9, jnp.float64)
    sharded = run(jax.device_put(x, rows))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, run(x), atol=1e-12)


def test_steps_draw_fresh_noise():
    model = Model(lambda x_t, t, cond, key: jnp.zeros_like(x_t), RF, "x")
    _, states = sample(model, jnp.zeros((1, 512)), KEY, [1.0, 0.75, 0.5, 0.25], "renoise", return_trajectory=True)
    drawn = states[1:, 0] / jnp.asarray([0.75, 0.5, 0.25])[:, None]
    np.testing.assert_allclose(drawn.std(axis=1), 1.0, atol=0.1)
    assert abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.15


# Model calls.


@pytest.mark.parametrize("name", sorted(set(OF_VELOCITIES) - {"adaptive"}))
@pytest.mark.parametrize("prediction", ["velocity", "x"])
def test_number_of_model_calls(name, prediction):
    path = edm()
    counted = Count(exact.gaussian([0.2], 0.25).model(path, prediction))
    times = grid(4, path)
    out = sample(counted.model, jnp.ones((2, 1)), KEY, times, name)
    assert np.isfinite(out).all()
    assert counted.calls == nfe(config.build(SAMPLERS, name, "sampler"), counted.model, times)


def test_nfe():
    flow, denoiser = (exact.gaussian([0.2], 0.25).model(edm(), p) for p in ("velocity", "x"))
    heun, times = SAMPLERS["heun"](), grid(18, edm(), "karras")
    assert nfe(heun, denoiser, times) == 35  # EDM on CIFAR-10
    assert nfe(heun, flow, times) == 36
    assert nfe(heun, denoiser, times[:-1]) == 34
    assert nfe(SAMPLERS["rk4"](), denoiser, times) == 69
    assert nfe(SAMPLERS["churn"](), denoiser, times) == 35
    assert nfe(SAMPLERS["euler"](), denoiser, times) == 18
    assert nfe(SAMPLERS["annealed_langevin"](updates=3), denoiser, times) == 55
    assert nfe(SAMPLERS["annealed_langevin"](updates=3, denoise=False), denoiser, times) == 54
    assert nfe(SAMPLERS["annealed_langevin"](updates=3), denoiser, times[:-1]) == 51
    assert nfe(SAMPLERS["predictor_corrector"](corrector_updates=2), denoiser, times) == 54
    with pytest.raises(ConfigError, match="adaptive"):
        nfe(SAMPLERS["adaptive"](), denoiser, times)


def test_heun_does_not_call_a_denoiser_without_noise():
    counted = Count(exact.gaussian([0.2], 0.25).model(RF, "x"))
    sample(counted.model, jnp.ones((1, 1)), KEY, [1.0, 0.5, 0.0], "heun")
    assert counted.calls == 3
    assert sorted(counted.times) == [0.5, 0.5, 1.0]
    counted = Count(exact.gaussian([0.2], 0.25).model(RF, "v"))
    sample(counted.model, jnp.ones((1, 1)), KEY, [1.0, 0.5, 0.0], "heun")
    assert counted.calls == 4 and min(counted.times) == 0.0


def test_heun_on_the_edm_path_converges_with_its_euler_end():
    data, path = exact.gaussian([0.3], 0.25), edm()
    x = noise(path, KEY, (4, 1), 1.0, jnp.float64)
    goal = data.flow_map(path, x, 1.0, 0.0)
    found = sample(data.model(path, "x"), x, KEY, grid(80, path, "karras"), "heun")
    np.testing.assert_allclose(found, goal, atol=4e-3)


# Adaptive.


def test_adaptive_agrees_with_the_exact_map_and_with_scipy():
    scipy_integrate = pytest.importorskip("scipy.integrate")
    data, x = exact.mix4(), noise(RF, KEY, (4, 2), 1.0, jnp.float64)
    model = data.model(RF)
    ours = sample(model, x, KEY, [1.0, 0.0], {"name": "adaptive", "rtol": 1e-9, "atol": 1e-9})
    np.testing.assert_allclose(ours, data.flow_map(RF, x, 1.0, 0.0), atol=1e-6)
    field = jax.jit(lambda t, y: model(y.reshape(4, 2), t).reshape(-1))
    theirs = scipy_integrate.solve_ivp(lambda t, y: np.asarray(field(t, y)), (1, 0), np.ravel(x), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.ravel(ours), theirs.y[:, -1], atol=1e-6)
    assert theirs.success


@pytest.mark.parametrize("solver", ["tsit5", "dopri5", "dopri8", "heun"])
def test_adaptive_solvers_and_tolerances(solver):
    data = exact.gaussian([0.3], 0.25)
    x = jnp.asarray([[1.5]])
    goal = data.flow_map(RF, x, 1.0, 0.0)

    def error(tolerance):
        settings = {"name": "adaptive", "solver": solver, "rtol": tolerance, "atol": tolerance}
        return float(abs(sample(data.model(RF), x, KEY, [1.0, 0.0], settings) - goal)[0, 0])

    assert error(1e-7) < 1e-6


def test_adaptive_needs_diffrax_and_no_memory(monkeypatch):
    model = exact.gaussian([0.3], 0.25).model(RF)
    state = Memory(jnp.zeros_like, lambda x_t, t, cond, key, state: (model.apply(x_t, t, cond, key), state))
    with pytest.raises(ConfigError, match="momentum"):
        sample(model.replace(memory=state), jnp.ones((1, 1)), KEY, [1.0, 0.0], "adaptive")
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ConfigError, match="pip install diffrax"):
        sample(model, jnp.ones((1, 1)), KEY, [1.0, 0.0], "adaptive")


# Driver.


def test_trajectory_and_condition():
    model = Model(lambda x_t, t, cond, key: jnp.broadcast_to(cond["shift"][:, None], x_t.shape), RF, "velocity")
    cond = {"shift": jnp.asarray([1.0, -2.0])}
    x, states = sample(model, jnp.zeros((2, 3)), KEY, [1.0, 0.5, 0.2], "euler", cond, return_trajectory=True)
    expected = np.asarray([[0, 0], [-0.5, 1.0], [-0.8, 1.6]])
    np.testing.assert_allclose(states[..., 0], expected, atol=1e-12)
    assert states.shape == (3, 2, 3) and bool((x == states[-1]).all())


def test_states_are_float32_or_wider():
    model = Model(lambda x_t, t, cond, key: jnp.zeros_like(x_t), RF, "velocity")
    assert sample(model, jnp.zeros((1, 2), jnp.bfloat16), KEY, [1.0, 0.0]).dtype == jnp.float32
    assert sample(model, jnp.zeros((1, 2), jnp.float32), KEY, np.asarray([1.0, 0.0])).dtype == jnp.float32
    assert sample(model, jnp.zeros((1, 2), jnp.float64), KEY, np.asarray([1, 0], np.float32)).dtype == jnp.float64


def test_noise_has_the_scale_of_the_path():
    for path, t, scale in ((RF, 1.0, 1.0), (RF, 0.5, 0.5), (edm(), 1.0, 80.0), (ve(), 1.0, 50.0)):
        z = noise(path, KEY, (4096, 2), t)
        assert z.dtype == jnp.float32
        assert float(z.std()) == pytest.approx(scale, rel=0.03)
    keys = jax.random.split(KEY, 4)
    np.testing.assert_array_equal(noise(RF, keys, (4, 2), 1.0)[2:], noise(RF, keys[2:], (2, 2), 1.0))


def test_memory_is_carried_across_steps_and_written_by_the_first_call():
    """A model that counts: its velocity is the number of steps done before."""
    count = Memory(
        lambda x: jnp.zeros_like(x), lambda x_t, t, cond, key, state: (state * cond["gain"][:, None], state + 1)
    )
    model = Model(lambda x_t, t, cond, key: jnp.zeros_like(x_t), RF, "velocity", memory=count)
    cond = {"gain": jnp.asarray([1.0, 10.0])}
    for name in ("euler", "heun", "rk4", "midpoint"):
        x = sample(model, jnp.zeros((2, 1)), KEY, [1.0, 0.75, 0.5, 0.25], name, cond)
        np.testing.assert_allclose(x[:, 0], [-0.75, -7.5], atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("eulr", "euler"),
        ({"name": "euler", "eta": 1.0}, "eta is unknown"),
        ({"name": "ddim", "eta": 1.5}, "eta"),
        ({"name": "ddim", "eta": -0.1}, "eta"),
        ({"name": "ancestral", "variance": "medium"}, "small, large"),
        ({"name": "euler_maruyama", "diffusion": "quadratic"}, "sbdm"),
        ({"name": "euler_maruyama", "last": "tweedie"}, "denoise"),
        ({"name": "euler_maruyama", "scale": -1.0}, "scale"),
        ({"name": "churn", "churn": -1.0}, "churn"),
        ({"name": "ddim", "eta": 1.1}, r"eta = 1.1 should lie in \[0, 1\]"),
        ({"name": "annealed_langevin", "updates": 0}, "updates"),
        ({"name": "predictor_corrector", "predictor": "heun"}, "ancestral"),
        ({"name": "predictor_corrector", "corrector_updates": -1}, "corrector_updates"),
        ({"name": "adaptive", "solver": "rk9"}, "tsit5"),
    ],
)
def test_bad_settings(settings, message):
    model = exact.gaussian([0.3], 0.25).model(RF)
    with pytest.raises(ConfigError, match=message):
        sample(model, jnp.ones((1, 1)), KEY, [1.0, 0.0], settings)


@pytest.mark.parametrize("times", [[1.0], 1.0, [[1.0, 0.0]]])
def test_bad_times(times):
    with pytest.raises(ConfigError, match="times has shape"):
        sample(exact.gaussian([0.3], 0.25).model(RF), jnp.ones((1, 1)), KEY, times)
