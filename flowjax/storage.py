"""Where the files of a run or a data set lie: a folder of this machine, or a bucket (gs://..., s3://...) through etils.

A bucket has no appending and no cheap renaming, so what grows (metrics.jsonl) is kept in memory and written whole now and then.
"""

import contextlib
import os
import pathlib

from flowjax.config import ConfigError


def remote(where) -> bool:
    """Whether a path or text names a bucket."""
    return "://" in str(where)


def path(where):
    """pathlib.Path, ~ expanded, or for a bucket etils' epath.Path, which has the same methods."""
    if not remote(where):
        return pathlib.Path(where).expanduser()
    from etils import epath

    return epath.Path(where)


def size(file) -> int | None:
    """Bytes of a file of `path`, None where there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.length if hasattr(found, "length") else found.st_size  # etils has a word of its own


@contextlib.contextmanager
def owned(workdir, used: str = "trained in"):
    """A folder for as long as this process uses it (what it does there: `used`); ConfigError where another one does.

    The operating system's lock on a file in it, which ends with the process however that ends. Buckets, and file systems that
    cannot lock, are not guarded.
    """
    if remote(workdir):
        yield
        return
    import fcntl

    with open(workdir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(f"{workdir} is being {used} by process {file.read().strip() or 'unknown'}; wait until it has ended") from None
        except OSError:  # no locks here
            yield
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
