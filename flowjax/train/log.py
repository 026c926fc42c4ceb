"""What a run says: metrics.jsonl (the record of truth), TensorBoard, a progress line. Process 0 only."""

import json
import math
import time

import jax

from flowjax import storage


def plain(value):
    """A JSON number, or the text "nan", "inf", "-inf": bare NaN is not JSON."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


class Log:
    """Writes rows {"step": n, "wall": seconds, ...}. Rows later than `start` (a run cut off after its checkpoint) are dropped.

    In a bucket the rows appear at `flush`, which comes with every checkpoint: later ones would be dropped on resuming anyway.
    """

    def __init__(self, workdir, start: int = 0, total: int = 0, tensorboard: bool = True, progress: bool = True):
        self.main = jax.process_index() == 0
        self.path = storage.path(workdir) / "metrics.jsonl"
        self._bar = self._board = self._file = None
        if not self.main:
            return
        rows = [row for row in read(self.path) if row["step"] <= start] if start and self.path.exists() else []
        self._lines = [json.dumps(row) + "\n" for row in rows]
        self.path.write_text("".join(self._lines))
        self._file = None if storage.remote(self.path) else self.path.open("a", buffering=1)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=start or None)
        if progress:
            import tqdm

            self._bar = tqdm.tqdm(initial=start, total=total, unit="step", dynamic_ncols=True, mininterval=1.0)

    def write(self, step: int, values: dict):
        """Append one row; values are scalars."""
        if not self.main:
            return
        row = {"step": step, "wall": round(time.time(), 3), **{k: plain(v) for k, v in values.items()}}
        line = json.dumps(row) + "\n"
        if self._file:
            self._file.write(line)
        else:
            self._lines.append(line)
        if self._board:
            for k, v in values.items():
                self._board.add_scalar(k, float(v), step)

    def advance(self, step: int, **shown):
        """Move the progress line to `step`."""
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
            self._bar.update(step - self._bar.n)

    def say(self, text: str):
        """Print without breaking the progress line."""
        if self.main:
            if self._bar is not None:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def flush(self):
        """Bring the file in a bucket up to date; elsewhere it always is."""
        if self.main and self._file is None:
            self.path.write_text("".join(self._lines))

    def close(self):
        """Flush and release everything."""
        if self._bar is not None:
            self._bar.close()
        if self._board:
            self._board.close()
        self.flush()
        if self._file is not None:
            self._file.close()


def read(path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line cut off by a crash is ignored."""
    rows = []
    for line in storage.path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
