"""What every binary does around its work: read sections, refuse stray words, turn a ConfigError into one plain message."""

import ast
import pathlib
import re
import sys

from absl import app, flags

from flowjax.config import ConfigError


def section(text: str, flag: str):
    """A name or a Python literal of a config section."""
    if not text.startswith("{"):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"--{flag}={text} is neither a name nor a section like {{'name': ...}}: {error}") from None


def run(main):
    """absl's app.run for main() without positional arguments. Exit code 2 on bad settings."""

    def guarded(argv):
        if len(argv) > 1:
            print(f"error: unexpected argument {argv[1]!r}; settings are given as --flag=value", file=sys.stderr)
            return 2
        try:
            return main()
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    app.run(guarded, flags_parser=_parse)


def _parse(argv):
    """absl's parser; --config.a=name means --config.a="{'name': 'name'}" where the config has a section; one plain line for
    --config.a.b=... where it has no section a, and for a config that is not there."""
    try:
        if told := _missing(argv):
            raise flags.Error(told)
        return _parsed(argv)
    except flags.Error as error:
        print(f"error: {error}; --helpshort lists the flags", file=sys.stderr)
    except (AttributeError, KeyError, TypeError) as error:
        inside = str(error.args[0]).splitlines()[0].strip("'\"") if error.args else ""
        hint = "a --config.section.key flag needs that section in the config; a whole one is given as --config.section=\"{'key': ...}\""
        print(f"error: {hint} ({inside})", file=sys.stderr)
    sys.exit(2)


def _parsed(argv):
    while True:
        try:
            return flags.FLAGS(argv)
        except flags.IllegalFlagValueError as error:
            name = re.match(r"flag --(config\.[\w.]+)=([A-Za-z]\w*): Failed to parse .* as a ConfigDict", str(error))
            given = name and f"{name[1]}={name[2]}"
            if not name or all(a.lstrip("-") != given for a in argv):
                raise
            for defined in [flag for flag in flags.FLAGS if flag.startswith("config.")]:
                delattr(flags.FLAGS, defined)  # as ml_collections made them of this argv; it will of the next
            argv = [f"--{name[1]}={{'name': '{name[2]}'}}" if a.lstrip("-") == given else a for a in argv]


def _missing(argv) -> str:
    """What to say where the file of --config is not there, else ""; ml_collections would say it when the file is first needed."""
    if "config" not in flags.FLAGS:
        return ""
    given = [a.partition("=")[2] for a in argv if a.lstrip("-").startswith("config=")]
    given += [b for a, b in zip(argv, argv[1:]) if a.lstrip("-") == "config"]
    file = given[-1].partition(":")[0] if given else ""
    return f"--config={file}: no such file" if file and not pathlib.Path(file).is_file() else ""
