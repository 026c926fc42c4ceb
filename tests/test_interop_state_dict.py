"""State dicts: transforms against torch's meaning of a tensor, round trips, and errors that name the keys."""

import numpy as np
import pytest

from flowjax.interop import state_dict

PARAMS = {
    "a": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.arange(3.0)},
    "b": {"kernel": np.arange(24.0).reshape(2, 1, 3, 4)},
    "c": {"scale": np.arange(2.0)},
    "d": {"embedding": np.arange(10.0).reshape(5, 2)},
}


def rename(path):
    return "net." + ".".join(path)


def test_axes_mean_the_same():
    state = state_dict.to_torch(PARAMS, rename)
    assert set(state) == {"net.a.weight", "net.a.bias", "net.b.weight", "net.c.weight", "net.d.weight"}
    np.testing.assert_array_equal(state["net.a.weight"], PARAMS["a"]["kernel"].T)
    assert state["net.b.weight"].shape == (4, 3, 2, 1)  # out, in, height, width
    assert state["net.b.weight"][3, 1, 1, 0] == PARAMS["b"]["kernel"][1, 0, 1, 3]
    np.testing.assert_array_equal(state["net.d.weight"], PARAMS["d"]["embedding"])
    assert all(value.flags["C_CONTIGUOUS"] for value in state.values())


def test_round_trip():
    back = state_dict.from_torch(state_dict.to_torch(PARAMS, rename), PARAMS, rename)
    for module, leaves in PARAMS.items():
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(back[module][name], leaf)
            assert back[module][name].flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"net.extra": np.zeros(1), "net.more": np.zeros(1)}, r"left over \['net.extra', 'net.more'\]"),
        ({"net.c.weight": None}, r"missing \['net.c.weight'\]"),
        ({"net.c.weight": np.zeros(3)}, r"net.c.weight \(3,\) for c/scale \(2,\)"),
    ],
)
def test_what_does_not_fit_is_listed(change, message):
    state = {**state_dict.to_torch(PARAMS, rename), **change}
    with pytest.raises(ValueError, match=message):
        state_dict.from_torch({key: value for key, value in state.items() if value is not None}, PARAMS, rename)


def test_two_parameters_with_one_key_are_refused():
    with pytest.raises(ValueError, match="net.x.weight"):
        state_dict.names(PARAMS, lambda path: "net.x")
