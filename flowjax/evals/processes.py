"""Evaluation by several processes: each makes and looks at its share of the images, and what was seen is put together.

Images stay where they were made; features, statistics and votes travel. With one process nothing here does anything.
"""

import jax
import numpy as np


def share(count: int) -> slice:
    """This process's rows of `count`: in order of the processes, as many for each as for any other, or one more."""
    processes, mine = jax.process_count(), jax.process_index()
    return slice(count * mine // processes, count * (mine + 1) // processes)


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows (n_i, ...) of all processes one after another, bit for bit, on every process; n_i may differ. All have to call it."""
    if jax.process_count() == 1:
        return rows
    from jax.experimental import multihost_utils

    counts = multihost_utils.process_allgather(np.int32(len(rows)))
    # Sent as bytes: without x64, jax would round float64 to float32 and a Frechet distance would lose its digits.
    words = np.ascontiguousarray(rows).reshape(len(rows), int(np.prod(rows.shape[1:]))).view(np.uint8)
    padded = multihost_utils.process_allgather(np.pad(words, [(0, counts.max() - len(rows)), (0, 0)]))
    together = np.concatenate([part[:n] for part, n in zip(padded, counts, strict=True)])
    return together.view(rows.dtype).reshape(-1, *rows.shape[1:])


def agree(value: np.ndarray) -> np.ndarray:
    """The value of process 0 on all: what each has worked out for itself may differ in the last digits between machines."""
    return gather(np.asarray(value)[None])[0]
