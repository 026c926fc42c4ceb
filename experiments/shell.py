"""What every binary does around its work: refuse stray words, turn a ConfigError into one plain message."""

import re
import sys

from absl import app, flags

from flowjax.config import ConfigError


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
    """Parse flags; an override of something that the config does not have is one plain line instead of a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        print(f"error: {_unknown(argv) or error}", file=sys.stderr)
        sys.exit(2)


def _unknown(argv):
    """What is wrong with the first --config.a.b in argv that names nothing, or None."""
    for arg in argv:
        path = re.match(r"--(?:no)?config\.([\w.]+)", arg)
        node = flags.FLAGS["config"].value if path else None
        for key in path[1].split(".") if path else ():
            if not hasattr(node, "keys") or key not in node:
                have = f"valid here: {', '.join(node.keys())}" if hasattr(node, "keys") else "its parent is not a section"
                return f"--config.{path[1]}: the config has no {key!r}; {have}. Settings that a config leaves at their defaults are set in its file"
            node = node[key]
    return None
