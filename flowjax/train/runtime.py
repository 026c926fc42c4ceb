"""The process: compile cache, several processes, log format. Called by the binaries before anything touches a device."""

import os
import pathlib

import jax

from flowjax.config import ConfigError


def setup(coordinator: str = "", processes: int = 0, process_id: int = -1):
    """Turn on the persistent compile cache and, when asked, join a multi-process job.

    coordinator: "" for a single process, "auto" where the platform tells (TPU pods, SLURM), or host:port together with
    processes and process_id. The cache lives in JAX_COMPILATION_CACHE_DIR, by default under ~/.cache/flowjax.
    """
    from absl import logging as absl_logging

    # orbax narrates every file it writes at the INFO level.
    absl_logging.set_verbosity(absl_logging.WARNING)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path("~/.cache/flowjax/jax").expanduser()))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator:
        if processes < 1 or not 0 <= process_id < processes:
            raise ConfigError(f"--coordinator needs --processes >= 1 and 0 <= --process_id < processes, got {processes}, {process_id}")
        jax.distributed.initialize(coordinator, processes, process_id)
    elif processes or process_id >= 0:
        raise ConfigError("--processes and --process_id mean something only together with --coordinator=host:port")
