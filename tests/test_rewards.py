import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.evals import rewards


def image(rows):
    return np.array(rows, np.uint8)[None, :, :, None]


def test_ink_is_mean_brightness():
    assert rewards.reward("ink", image([[255, 255], [255, 255]]), None) == [1.0]
    assert rewards.reward("ink", image([[255, 0], [0, 0]]), None) == [0.25]


def test_upper_is_the_share_above_the_middle():
    assert rewards.reward("upper", image([[30, 0], [10, 0]]), None) == [0.75]
    assert rewards.reward("upper", image([[0, 0], [0, 0]]), None) == [0.5]
    # Counted per image, and not a matter of brightness.
    two = np.concatenate([image([[3, 0], [1, 0]]), image([[0, 0], [9, 9]])])
    np.testing.assert_array_equal(rewards.reward("upper", two, None), [0.75, 0.0])


def test_win_rate_counts_ties_half_and_is_antisymmetric():
    a, b = [1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]
    assert rewards.win_rate(a, b) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert rewards.win_rate(a, b) + rewards.win_rate(b, a) == 1.0


def test_unknown_reward_lists_the_known():
    with pytest.raises(ConfigError, match="ink"):
        rewards.reward("beauty", image([[0]]), None)


def test_pairs_are_best_against_worst_and_ties_are_left_out():
    x = np.arange(6).reshape(2, 3)
    win, lose, kept = rewards.best_and_worst(x, np.array([[0.1, 0.5, 0.3], [1.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(win, [1])
    np.testing.assert_array_equal(lose, [0])
    np.testing.assert_array_equal(kept, [True, False])
