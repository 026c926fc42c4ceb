"""What may import what: the package stays light, and its core runs on a machine that has jax, flax, optax and einops only."""

import json
import subprocess
import sys

CORE = (
    "paths", "predictions", "times", "weights", "guidance", "exact", "config", "rewards", "generate", "objectives", "samplers",
    "samplers.likelihood", "models", "models.flops", "train.step", "train.ema", "train.optim", "train.mesh", "train.roles",
)  # fmt: skip
ALLOWED = {"jax", "jaxlib", "flax", "optax", "einops", "numpy", "flowjax"}

PROBE = """
import sys, json
baseline = set()
allowed, modules = json.loads(sys.argv[1]), json.loads(sys.argv[2])
import jax, flax.linen, optax, einops, jax.scipy.special, optax.contrib
before = set(sys.modules)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names and top not in {m.split(".")[0] for m in before}:
            raise ImportError(f"the core imports {name}")
        # What jax and flax themselves brought along (msgpack, orbax, ...) must not be used by us either.
sys.meta_path.insert(0, Refuse())
for module in modules:
    __import__("flowjax." + module)
used = {v.__name__.split(".")[0] for m in list(sys.modules) if m.startswith("flowjax") for v in vars(sys.modules[m]).values() if type(v) is type(sys)}
print(json.dumps(sorted(used - set(allowed) - set(sys.stdlib_module_names))))
"""


def run(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True).stdout


def test_import_flowjax_loads_nothing_else():
    loaded = run("import sys; before = set(sys.modules); import flowjax; print(sorted(set(sys.modules) - before))")
    assert eval(loaded) == ["flowjax"]


def test_core_needs_only_the_core_libraries():
    assert json.loads(run(PROBE, json.dumps(sorted(ALLOWED)), json.dumps(CORE)).splitlines()[-1]) == []


def test_core_imports_within_two_seconds_beyond_jax():
    code = (
        "import time, jax, flax.linen, optax, optax.contrib; start = time.perf_counter();"
        f"[__import__('flowjax.' + m) for m in {CORE!r}]; print(time.perf_counter() - start)"
    )
    assert min(float(run(code)) for _ in range(2)) < 2.0
