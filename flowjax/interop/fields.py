"""The config.json of a library's class, read field by field; and what the configs of denoisers have in common.

The files beside this one hold two functions for each kind of network. `read_<kind>(fields)` returns {"model", "shape",
"conditions", ...}: our model section, the shapes of its inputs and, for denoisers, what the output means and how they are sampled
unless something else is asked for. `write_<kind>(net, info)` returns their config. A field that we do not know is refused by
name, and so is a value that our network cannot express; an absent field has the library's default. What matters to training or
to other classes only is passed over.
"""

from collections.abc import Mapping
from typing import Any

from flowjax.config import ConfigError, keywords

REQUIRED = object()
# The usual meaning of a denoiser: noise at DDPM's steps, or the velocity z - x of the straight path.
DDPM = {"path": {"name": "vp_linear"}, "prediction": "eps", "input_scaling": {"name": "ddpm"}}
FLOW = {"path": {"name": "rectified"}, "prediction": "velocity", "input_scaling": "none"}
CLASSES = {"steps": 50, "guidance": {"name": "cfg", "scale": 4.0}}  # how networks of classes are sampled


class Fields:
    """A config read field by field; `done` refuses what nobody asked for, except `common` fields."""

    def __init__(self, config: Mapping[str, Any], where: str, common: tuple[str, ...] = ()):
        self.left, self.where, self.common = dict(config), where, common

    def take(self, name: str, default=REQUIRED):
        """The field, or the library's default; a list as a tuple."""
        if name not in self.left and default is REQUIRED:
            raise ConfigError(f"{self.where}: {name} is missing")
        value = self.left.pop(name, default)
        return tuple(value) if isinstance(value, list) else value

    def choose(self, name: str, table: Mapping, default=REQUIRED):
        """table[field]; ConfigError where that is none of the table."""
        value = self.take(name, default)
        for key, meaning in table.items():
            if value == key:
                return meaning
        raise ConfigError(f"{self.where}: {name} = {value!r} is not supported; supported: {', '.join(map(repr, table))}")

    def only(self, name: str, *valid, default=REQUIRED):
        """The field must be one of `valid`, the first of which is the library's default unless another one is given."""
        self.choose(name, dict.fromkeys(valid), valid[0] if default is REQUIRED else default)

    def ignore(self, *names: str):
        """Pass over fields that do not touch the network."""
        for name in names:
            self.left.pop(name, None)

    def section(self, name: str) -> "Fields":
        """The nested config `name`."""
        value = self.take(name)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: {name} should be an object")
        return Fields(value, f"{self.where}: {name}", self.common)

    def done(self):
        """ConfigError that lists the fields which are left."""
        if left := {k: v for k, v in self.left.items() if k not in self.common}:
            raise ConfigError(f"{self.where}: unknown {', '.join(f'{k} = {v!r}' for k, v in sorted(left.items()))}")


def needs(net, library: str, **wanted):
    """ConfigError unless fields of `net` have the values that alone can be expressed in `library`."""
    for name, value in wanted.items():
        if getattr(net, name) != value:
            raise ConfigError(f"model.{name} = {getattr(net, name)!r} cannot be expressed in {library}, which has {value!r}")


def means(info, library: str, **wanted):
    """ConfigError unless the network's output means what the users of `library` take it for."""
    for name, value in wanted.items():
        if info[name] != value:
            raise ConfigError(f"{name} = {info[name]!r}: the users of {library} expect a network of {name} = {value!r}")


def condition(info, name: str) -> int:
    """Size of the vectors of a condition."""
    return info["conditions"][name][-1]


def image(size, channels: int) -> list[int]:
    """Shape of an image whose size is one number, (height, width), or not known."""
    height, width = size if isinstance(size, tuple) else (size, size)
    return [height, width, channels]


def channels_of(out: int, channels: int) -> dict:
    """Our fields for `out` channels of a head: twice as many as come in are those of a learned variance."""
    if out == 2 * channels:
        return {"learn_sigma": True}
    return {"out_channels": 0 if out == channels else out}


def out_channels(net, info) -> int:
    """Channels of the head, a learned variance among them."""
    return (net.out_channels or info["shape"][-1]) * (2 if getattr(net, "learn_sigma", False) else 1)


def square(info, library: str) -> int:
    """Side of the images; ConfigError where they are not square."""
    height, width = info["shape"][:2]
    if height != width:
        raise ConfigError(f"the network was made for {height} x {width}; {library} has one size for both")
    return height


def of_classes(model, shape) -> dict:
    """The parts of an info that say which classes there are."""
    count = model.get("num_classes", 0)
    return {"model": model, "shape": shape, "num_classes": count, "conditions": {"label": []} if count else {}}


def plain_input(info, library: str):
    """ConfigError where something stands between x_t and the network that users of `library` would have to know."""
    if keywords(info["input_scaling"])["name"] not in ("none", "ddpm"):
        raise ConfigError(f"input_scaling = {info['input_scaling']!r} cannot be expressed in {library}; it takes x_t as it is")


def plain_dit(net, library: str):
    """ConfigError unless the network is the DiT of the paper, with classes."""
    needs(net, library, conditioning="adaln_zero", norm="layer", qk_norm=False, mlp="gelu", rope=False, sincos=True)
    needs(net, library, guidance_embed=False, step_embed=False)
    if not net.num_classes:
        raise ConfigError(f"model.num_classes = 0 cannot be expressed in {library}, which is a network of classes")
