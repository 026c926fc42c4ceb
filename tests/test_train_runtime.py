"""Which process of which job this is: flags, environment, and what is refused."""

import pathlib
import platform
import subprocess
import sys

import pytest

from flowjax.config import ConfigError
from flowjax.train import runtime

ROOT = pathlib.Path(__file__).resolve().parent.parent
WHOLE = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    "flags, environment, job",
    [
        ((), {}, ("", 0, -1)),
        ((), {"JAX_NUM_PROCESSES": ""}, ("", 0, -1)),
        (("host:1", 2, 1), {}, ("host:1", 2, 1)),
        (("host:1", 1, 0), {}, ("host:1", 1, 0)),
        (("[::1]:80", 2, 0), {}, ("[::1]:80", 2, 0)),
        ((), WHOLE, ("host:1234", 4, 2)),
        (("other:1", 2, 0), WHOLE, ("other:1", 2, 0)),  # flags come first, all three of them
        (("auto",), {}, ("auto", 0, -1)),
        (("auto",), WHOLE, ("auto", 0, -1)),
    ],
)
def test_one_process_of_a_job(flags, environment, job):
    assert runtime.job(*flags, environment=environment) == job


@pytest.mark.parametrize(
    "flags, environment, said",
    [
        (("", 2, -1), {}, "together with --coordinator=host:port"),
        (("", 0, 0), {}, "together with --coordinator=host:port"),
        (("", 2, 0), WHOLE, "together with --coordinator=host:port"),
        (("host:1", 0, 0), {}, "--processes and --process_id: processes = 0 and process_id = 0"),
        (("host:1", 2, 2), {}, "process_id = 2"),
        (("host:1", 2, -1), {}, "process_id = -1"),
        (("host", 2, 0), {}, "'host' should be host:port of process 0"),
        ((":80", 2, 0), {}, "':80' should be host:port of process 0"),
        (("host:x", 2, 0), {}, "'host:x' should be host:port"),
        (("auto", 2, -1), {}, "finds --processes and --process_id itself"),
        (("auto", 0, 0), {}, "finds --processes and --process_id itself"),
        ((), WHOLE | {"JAX_PROCESS_ID": ""}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES without JAX_PROCESS_ID: set all three"),
        ((), {"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        ((), WHOLE | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES = 'four' should be a number"),
        ((), WHOLE | {"JAX_PROCESS_ID": "4"}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID: processes = 4 and process_id = 4"),
    ],
)
def test_what_is_no_job(flags, environment, said):
    with pytest.raises(ConfigError) as refused:
        runtime.job(*flags, environment=environment)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_heartbeat_takes_time():
    with pytest.raises(ConfigError, match="--heartbeat = 0 should be at least 1 second"):
        runtime.setup(heartbeat=0)


FAULTS = """
import resource
import jax
from flowjax.train import runtime

if {setup}:
    runtime.setup()
step = jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda i, v: v[::-1] + v, x))
x = jax.numpy.ones((3072, 3072))  # 36 MiB, as is every sum
faults = []
for _ in range(25):  # the first ones grow the heap, and where its blocks lie can make another one do so later
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is of glibc's malloc")
def test_a_step_on_a_cpu_reuses_its_memory():
    """A program that allocates arrays of 36 MiB at each call asks the kernel for their pages at each call, unless malloc keeps them."""

    def faults(setup):
        run = subprocess.run([sys.executable, "-c", FAULTS.format(setup=setup)], capture_output=True, text=True, check=True, cwd=ROOT)
        return int(run.stdout)

    assert faults(False) >= 2**13  # pages of 4 KiB
    assert faults(True) < 100
