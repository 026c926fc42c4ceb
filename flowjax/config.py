"""Selection by explicit tables: a config section names an entry, its other keys are that entry's arguments.

No key may be unknown and none may be silently ignored: a section is checked against the signature of what it selects.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


class ConfigError(ValueError):
    """A setting is missing, unknown, of the wrong type or out of range; the message names it and what is valid."""


def lookup(table: Mapping[str, Any], name: str, where: str):
    """table[name], or a ConfigError that lists the valid names."""
    if name not in table:
        raise ConfigError(f"{where} = {name!r} is unknown; valid: {', '.join(sorted(table))}")
    return table[name]


def arguments(fn: Callable, given: tuple[str, ...] = ()) -> dict[str, inspect.Parameter]:
    """The settings that `fn` accepts: its named parameters except those in `given`."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {k: p for k, p in inspect.signature(fn).parameters.items() if p.kind in kinds and k not in given}


def _check_type(where: str, key: str, value, parameter: inspect.Parameter):
    simple = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
    wanted = parameter.annotation
    if wanted in simple and value is not None:
        if not isinstance(value, simple[wanted]) or (wanted is not bool and isinstance(value, bool)):
            raise ConfigError(f"{where}.{key} = {value!r} should be {wanted.__name__}")


def check(fn: Callable, settings: Mapping[str, Any], where: str, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check settings against fn's signature (unknown, missing, simple types) and return them as a dict."""
    valid = arguments(fn, given)
    for key, value in settings.items():
        if key not in valid:
            raise ConfigError(f"{where}.{key} is unknown; valid: {', '.join(valid) or '(none)'}")
        _check_type(where, key, value, valid[key])
    missing = [k for k, p in valid.items() if p.default is p.empty and k not in settings]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; valid: {', '.join(valid)}")
    return dict(settings)


def refuse_unread(built, given: Mapping[str, Any], where: str):
    """What was built from the settings `given`; ConfigError at one that its `unread`, {field: why}, says does nothing beside the others."""
    for key, why in getattr(built, "unread", {}).items():
        if key in given:
            raise ConfigError(f"{where}.{key} = {given[key]!r} does nothing {why}; leave it out")
    return built


def keywords(section) -> dict[str, Any]:
    """A section as keyword arguments, `name` included; a bare string is a name without settings."""
    return {"name": section} if isinstance(section, str) else dict(section)


def split(section: Mapping[str, Any] | str, where: str) -> tuple[str, dict[str, Any]]:
    """(name, other settings) of a section; a bare string is a name without settings."""
    if isinstance(section, str):
        return section, {}
    section = dict(section)
    if "name" not in section:
        raise ConfigError(f"{where}.name is missing")
    return section.pop("name"), section


def bind(table: Mapping[str, Callable], section, where: str, given: tuple[str, ...] = ()) -> Callable:
    """functools.partial(table[section.name], **settings); parameters in `given` stay for the caller."""
    name, settings = split(section, where)
    fn = lookup(table, name, f"{where}.name")
    return functools.partial(fn, **check(fn, settings, where, given))


def build(table: Mapping[str, Callable], section, where: str, **supplied):
    """Call table[section.name] with its settings and the values the caller supplies."""
    name, settings = split(section, where)
    fn = lookup(table, name, f"{where}.name")
    taken = {k: v for k, v in supplied.items() if k in arguments(fn)}
    return fn(**check(fn, settings, where, tuple(taken)), **taken)
