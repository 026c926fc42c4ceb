import pytest

from flowjax import config
from flowjax.config import ConfigError


def plain(x, size: int, rate: float = 0.5, flag: bool = False, kind: str = "a"):
    return x, size, rate, flag, kind


def bare():
    return "bare"


TABLE = {"plain": plain, "bare": bare}


def test_build_passes_settings_and_supplied_values():
    section = {"name": "plain", "size": 3, "flag": True}
    assert config.build(TABLE, section, "model", x="X") == ("X", 3, 0.5, True, "a")
    assert section == {"name": "plain", "size": 3, "flag": True}, "the caller's section is left alone"


def test_build_supplies_only_what_the_entry_takes():
    assert config.build(TABLE, "bare", "model", x="X") == "bare"
    assert config.build(TABLE, {"name": "bare"}, "model") == "bare"


def test_bind_leaves_given_parameters_to_the_caller():
    fn = config.bind(TABLE, {"name": "plain", "size": 2, "kind": "b"}, "model", given=("x",))
    assert fn("later") == ("later", 2, 0.5, False, "b")


def test_an_integer_is_a_valid_float():
    assert config.build(TABLE, {"name": "plain", "size": 1, "rate": 2}, "m", x=0)[2] == 2


def test_none_is_accepted_for_any_type():
    assert config.build(TABLE, {"name": "plain", "size": 1, "rate": None}, "m", x=0)[2] is None


@pytest.mark.parametrize(
    "section, words",
    [
        ({"name": "plane", "size": 1}, ["model.name", "'plane'", "bare, plain"]),
        ({"size": 1}, ["model.name is missing"]),
        ({"name": "plain", "size": 1, "raet": 0.1}, ["model.raet", "unknown", "size, rate, flag, kind"]),
        ({"name": "plain"}, ["model lacks size"]),
        ({"name": "bare", "size": 1}, ["model.size", "(none)"]),
        ({"name": "plain", "size": 1.5}, ["model.size = 1.5", "int"]),
        ({"name": "plain", "size": True}, ["model.size = True", "int"]),
        ({"name": "plain", "size": 1, "rate": "fast"}, ["model.rate = 'fast'", "float"]),
        ({"name": "plain", "size": 1, "rate": False}, ["model.rate = False", "float"]),
        ({"name": "plain", "size": 1, "flag": 1}, ["model.flag = 1", "bool"]),
        ({"name": "plain", "size": 1, "kind": 3}, ["model.kind = 3", "str"]),
        ({"name": "plain", "size": 1, "x": 0}, ["model.x", "unknown"]),
    ],
)
def test_bad_sections_are_refused_by_name(section, words):
    with pytest.raises(ConfigError) as error:
        config.build(TABLE, section, "model", x="X")
    for word in words:
        assert word in str(error.value)
    assert isinstance(error.value, ValueError)


def test_a_supplied_value_is_not_a_setting():
    with pytest.raises(ConfigError, match="unknown; valid: size"):
        config.bind(TABLE, {"name": "plain", "size": 1, "x": 0}, "model", given=("x",))


def test_lookup_lists_the_valid_names():
    assert config.lookup(TABLE, "bare", "here") is bare
    with pytest.raises(ConfigError, match="here = 'no' is unknown; valid: bare, plain"):
        config.lookup(TABLE, "no", "here")
