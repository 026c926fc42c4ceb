"""Where the files of a run lie: a folder of this machine, or a bucket (gs://..., s3://...) through etils.

A bucket has no appending and no cheap renaming, so what grows (metrics.jsonl) is kept in memory and written whole now and then.
"""

import pathlib


def remote(where) -> bool:
    """Whether a path or text names a bucket."""
    return "://" in str(where)


def path(where):
    """pathlib.Path, or for a bucket etils' epath.Path, which has the same methods."""
    if not remote(where):
        return pathlib.Path(where)
    from etils import epath

    return epath.Path(where)
