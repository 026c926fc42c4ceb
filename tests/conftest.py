"""Test environment: CPU, eight simulated devices, a compile cache that outlives the run. Set before jax is imported."""

import gc
import importlib.metadata
import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tiny programs compile longer than they run. Level 0 takes half the time for that, and runs convolutions six times slower: nets.optimised
# is for the few that run long.
flags = "--xla_backend_optimization_level=0"
# The older way of writing fusions compiles transformers in half the time; XLA refuses flags that it does not know, and jax 0.11's lost this one.
# Cut in parts that threads compile, a program takes a sixth more of them in all, and the workers keep the cores busy already.
if importlib.metadata.version("jax").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"

gc.set_threshold(100_000, 50, 50)  # tracing makes many objects and few cycles: a sixth of its time

import pytest  # noqa: E402


@pytest.fixture
def float64():
    """Double precision within a test; use it for a whole file with pytest.mark.usefixtures."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Compiled programs of a file are of no use to the next; kept, they fill several GB by the end."""
    yield
    import jax

    jax.clear_caches()


# The longest files, longest first: a worker that starts one of them last keeps the others waiting.
LONGEST = ("smoke", "smoke_text", "train_processes", "sharding", "train_parallel", "train_config", "models_unet", "models_dit", "samplers", "train_checkpoint")


def pytest_collection_modifyitems(items):
    """Files in the order of LONGEST, then the others as they come."""
    order = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
