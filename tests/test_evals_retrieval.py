"""Retrieval: closed forms, ties as chance has them, and the same numbers by simulation."""

import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.evals.retrieval import retrieval, same_captions, similarities


def test_rank_of_the_right_candidate():
    """Candidates worth 3, 2, 1, 0 to every query: query i finds its own at rank i + 1."""
    similarity = np.tile(np.arange(4.0)[::-1], (4, 1))
    assert [retrieval(similarity, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert retrieval(np.eye(5)) == 1.0 and retrieval(-np.eye(5)) == 0.0 and retrieval(-np.eye(5), 5) == 1.0


def test_ties_score_as_guessing():
    for k in range(1, 7):
        assert retrieval(np.zeros((6, 6)), k) == pytest.approx(k / 6)
    # One better, the right one tied with two others: it is second, third or fourth.
    row = np.array([[1.0, 1.0, 2.0, 1.0, 0.0]])
    right = np.array([[True, False, False, False, False]])
    assert [retrieval(row, k, right) for k in (1, 2, 3, 4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_several_right_answers():
    """Two of four tied candidates are right: 1 - C(2, k) / C(4, k)."""
    right = np.array([[True, True, False, False]])
    assert [retrieval(np.zeros((1, 4)), k, right) for k in (1, 2, 3)] == pytest.approx([1 / 2, 5 / 6, 1])
    # The best of the right ones counts.
    assert retrieval(np.array([[0.0, 3.0, 2.0, 1.0]]), 1, right) == 1.0


def test_equals_simulation():
    random = np.random.RandomState(0)
    similarity, right = random.randint(0, 4, (40, 9)).astype(float), random.uniform(size=(40, 9)) < 0.2
    right[np.arange(40), random.randint(0, 9, 40)] = True
    for k in (1, 3):
        found = []
        for _ in range(3000):
            order = np.argsort(-similarity - 1e-6 * random.uniform(size=similarity.shape), axis=1)[:, :k]
            found.append(np.take_along_axis(right, order, 1).any(1).mean())
        assert retrieval(similarity, k, right) == pytest.approx(np.mean(found), abs=5e-3)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="needs a right answer"):
        retrieval(np.zeros((2, 3)), 1, np.array([[True, False, False], [False, False, False]]))
    with pytest.raises(ValueError, match="needs a right answer"):
        retrieval(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="valid: 1 .. 3"):
        retrieval(np.zeros((3, 3)), 4)
    with pytest.raises(ValueError, match="valid: 1 .. 3"):
        retrieval(np.zeros((3, 3)), 0)
    with pytest.raises(ValueError, match="not a number"):
        retrieval(np.full((2, 2), np.nan))


def test_equal_captions_are_recognised():
    a, b = np.array([[1, 2], [3, 4], [1, 2]]), np.array([[3, 4], [1, 2], [5, 6], [2, 1]])
    np.testing.assert_array_equal(same_captions(a, b), [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])


class Net:
    @staticmethod
    def embed_images(x):
        return x.reshape(len(x), -1)

    @staticmethod
    def embed_texts(tokens):
        return 10.0 * jnp.asarray(tokens, float)


def test_similarities_do_not_depend_on_the_batch():
    random = np.random.RandomState(0)
    images, tokens = random.uniform(size=(7, 1, 2, 1)).astype(np.float32), random.randint(0, 5, (5, 2))
    for batch in (3, 7, 100):
        np.testing.assert_allclose(similarities(Net, images, tokens, batch), 10 * images.reshape(7, 2) @ tokens.T, rtol=1e-6)
