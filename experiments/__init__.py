"""Thin absl binaries: train, sample, evaluate, export. The work is in flowjax."""

import time

BEGAN = time.monotonic()  # before the binaries' own imports, which take time as well (flowjax.train.goodput)
