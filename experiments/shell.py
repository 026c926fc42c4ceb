"""What every binary does around its work: read sections, refuse stray words, turn a ConfigError into one plain message."""

import ast
import sys

from absl import app

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
    """absl's parser, with one plain line for --config.a.b=... where the config has no section a."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError) as error:
        inside = str(error.args[0]).splitlines()[0].strip("'\"") if error.args else ""
        hint = "a --config.section.key flag needs that section in the config; a whole one is given as --config.section=\"{'key': ...}\""
        print(f"error: {hint} ({inside})", file=sys.stderr)
        sys.exit(2)
