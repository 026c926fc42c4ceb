"""Does an image find its caption among others? Measured by a contrastive network (flowjax.models.two_tower)."""

import math
from collections.abc import Callable

import numpy as np


def retrieval(similarity: np.ndarray, k: int = 1, right: np.ndarray | None = None) -> float:
    """Share of the queries with a right answer among their k most similar candidates.

    similarity (Q, N), of queries to candidates; right (Q, N), boolean, by default candidate i for query i (Q = N). Candidates of
    equal similarity stand in random order, over which this is the expectation: a network that cannot tell candidates apart
    scores as guessing does. ValueError if a query has no right answer, a similarity is not a number, or k is not in 1 .. N.
    """
    similarity = np.asarray(similarity)
    queries, candidates = similarity.shape
    right = np.eye(queries, candidates, dtype=bool) if right is None else np.asarray(right, bool)
    if right.shape != similarity.shape or not right.any(axis=1).all():
        raise ValueError(f"every query needs a right answer: similarity {similarity.shape}, right {right.shape}")
    if np.isnan(similarity).any():
        raise ValueError("a similarity is not a number")
    if not 1 <= k <= candidates:
        raise ValueError(f"k = {k}; valid: 1 .. {candidates}")
    best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
    better = (similarity > best).sum(axis=1)
    tied, good = (similarity == best).sum(axis=1), ((similarity == best) & right).sum(axis=1)
    return float(np.mean([_found(int(t), int(g), min(k - int(b), int(t))) for b, t, g in zip(better, tied, good)]))


def _found(tied: int, good: int, drawn: int) -> float:
    """Chance that `drawn` of `tied` candidates, `good` of them right, hold a right one (hypergeometric)."""
    return 0.0 if drawn <= 0 else 1.0 - math.comb(tied - good, drawn) / math.comb(tied, drawn)


def similarities(net, images: np.ndarray, tokens: np.ndarray, batch: int = 256) -> np.ndarray:
    """Cosines (Q, N) of images (Q, H, W, C) in [-1, 1] to captions (N, L), by a two-tower role's net."""
    import jax

    def embedded(fn: Callable, rows):
        fn = jax.jit(fn)
        whole = -len(rows) % batch if len(rows) > batch else 0  # equal batches compile once
        padded = np.concatenate([rows, np.repeat(rows[:1], whole, axis=0)])
        return np.concatenate([np.asarray(fn(padded[i : i + batch])) for i in range(0, len(padded), batch)])[: len(rows)]

    return embedded(net.embed_images, images) @ embedded(net.embed_texts, tokens).T


def same_captions(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(Q, N), True where caption a_i (Q, L) equals b_j (N, L): what `retrieval` takes as right when captions repeat."""
    numbers = np.unique(np.concatenate([a, b]), axis=0, return_inverse=True)[1].reshape(-1)
    return numbers[: len(a), None] == numbers[None, len(a) :]
