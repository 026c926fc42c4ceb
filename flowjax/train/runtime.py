"""The process: compile cache, memory of CPUs, several processes, log format. Called by the binaries before anything touches a device."""

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Mapping

import jax

from flowjax.config import ConfigError

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # parameters of glibc's mallopt, from its malloc.h
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def setup(coordinator: str = "", processes: int = 0, process_id: int = -1, heartbeat: int = 100):
    """Turn on the persistent compile cache and, when asked, join a multi-process job.

    coordinator: "" for a single process, "auto" where the platform tells (TPU pods, GKE, SLURM, Open MPI), or host:port
    together with processes and process_id. heartbeat: seconds of silence after which a process counts as dead and the others
    end. The cache lives in JAX_COMPILATION_CACHE_DIR, by default under ~/.cache/flowjax.
    """
    from absl import logging as absl_logging

    # orbax narrates every file it writes at the INFO level.
    absl_logging.set_verbosity(absl_logging.WARNING)
    # What the library decides by itself (which attention, ...) is said, by process 0; warnings by whoever has them.
    logger = logging.getLogger("flowjax")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.addFilter(lambda record: record.levelno >= logging.WARNING or jax.process_index() == 0)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    if _only_cpu():
        _keep_memory()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path("~/.cache/flowjax/jax").expanduser()))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if heartbeat < 1:
        raise ConfigError(f"--heartbeat = {heartbeat} should be at least 1 second")
    options = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": heartbeat}
    if coordinator == "auto":
        try:
            jax.distributed.initialize(**options)
        except ValueError as error:  # jax names the first thing that it could not find out
            raise ConfigError(
                f"--coordinator=auto: neither a TPU pod, nor GKE, SLURM or Open MPI was found here ({error}) "
                "give --coordinator=host:port --processes=N --process_id=i"
            ) from None
    elif coordinator:
        jax.distributed.initialize(coordinator, processes, process_id, **options)


def _only_cpu() -> bool:
    """Whether this process will compute on CPUs, as far as can be told without starting a device: it was asked to, or jax has no other."""
    if asked := jax.config.jax_platforms:
        return asked == "cpu"
    others = importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("jax_plugins")
    return not others and importlib.util.find_spec("libtpu") is None


def _keep_memory():
    """Let malloc keep what is freed. XLA allocates what a step holds on a CPU anew each time; glibc gives blocks of 32 MiB and more
    back to the kernel, which then has to clear every page of them again: a quarter of the time of the digits' train step.

    Without an effect where the C library is another. Not for accelerators, whose hosts allocate little and often, in many threads.
    """
    if adjust := getattr(ctypes.CDLL(None), "mallopt", None):
        # One arena: those of other threads cannot hold such blocks. Only before these threads allocate, that is, before devices start.
        for parameter, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
            adjust(parameter, value)


def job(coordinator: str = "", processes: int = 0, process_id: int = -1, environment: Mapping[str, str] | None = None):
    """(coordinator, processes, process_id) from the flags or, where none is given, from JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID; ConfigError unless they describe one process of a job (or none)."""
    environment = os.environ if environment is None else environment
    told = {k: environment[k] for k in VARIABLES if environment.get(k)}
    where = "--coordinator, --processes and --process_id"
    if coordinator == "auto" or not (coordinator or processes or process_id >= 0 or told):
        if processes or process_id >= 0:
            raise ConfigError("--coordinator=auto finds --processes and --process_id itself; leave them out")
        return coordinator, 0, -1
    if not (coordinator or processes or process_id >= 0):
        where = ", ".join(VARIABLES)
        if missing := [k for k in VARIABLES if k not in told]:
            raise ConfigError(f"{', '.join(told)} without {', '.join(missing)}: set all three or none, or give --coordinator=auto")
        if wrong := [k for k in VARIABLES[1:] if not told[k].isdecimal()]:
            raise ConfigError(f"{wrong[0]} = {told[wrong[0]]!r} should be a number")
        coordinator, processes, process_id = told[VARIABLES[0]], int(told[VARIABLES[1]]), int(told[VARIABLES[2]])
    if not coordinator:
        raise ConfigError("--processes and --process_id mean something only together with --coordinator=host:port")
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdecimal():
        raise ConfigError(f"the coordinator {coordinator!r} should be host:port of process 0, or --coordinator=auto")
    if processes < 1 or not 0 <= process_id < processes:
        raise ConfigError(f"{where}: processes = {processes} and process_id = {process_id}, not 0 <= process_id < processes")
    return coordinator, processes, process_id


def leave(error: Exception, advice: str = "the same command resumes from the last checkpoint"):
    """End this process of several at once, saying why: a process that lingers after an error keeps the others waiting.

    Exit code 4 where the error came from the devices or from another process (the next step's collective fails when one is
    gone), 1 with the traceback where it is our own. Does nothing in a single process, nor for bad settings, which all
    processes meet alike.
    """
    if jax.process_count() == 1 or isinstance(error, ConfigError):
        return
    who = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, jax.errors.JaxRuntimeError):
        print(
            f"error: {who} cannot go on, most likely because another one ended: {str(error).splitlines()[0]}. "
            f"See what the others said; {advice}.",
            file=sys.stderr,
        )
    else:
        print(f"error: {who} failed, and the job with it; {advice}", file=sys.stderr)
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(4 if isinstance(error, jax.errors.JaxRuntimeError) else 1)
