"""Where the time of a run goes, over all its restarts.

The clock is in exactly one phase at any moment, so the phases sum to the time that the run's processes have been alive. The
names, here and nowhere else, in seconds:

    start       imports, data, tracing, restoring, the card: whatever comes before the first step and is not
    compile     waiting for the compiled train step, which compiles beside `start`
    step        the steps: waiting for the device, and the host's own work between steps
    data        waiting for the next batch while the device has nothing to do
    save        checkpoints and snapshots, as far as they hold up the loop
    validation  the held-out loss and the panel, with their compilation
    sample      pictures and curves, with their compilation
    lost        what a killed process did after the checkpoint from which the next one went on

goodput = step / (sum of all). The time between two processes, when nothing ran, is in none of them. Of several processes,
process 0 keeps the record.

workdir/goodput.json holds {"seconds": all until now, "at": {step: all until that checkpoint}}. What a killed process had spent
is read from it by the next one; only its last KEEP_EVERY seconds, and those since its last row of metrics, are not known.
"""

import contextlib
import json
import time

PHASES = ("start", "compile", "step", "data", "save", "validation", "sample", "lost")
KEEP_EVERY = 5.0  # seconds between two writings of the record, which may lie in a bucket


class Goodput:
    """The clock of one process of a run. began: when it started, on the same clock."""

    def __init__(self, began: float | None = None, clock=time.monotonic):
        self._clock, self._phase = clock, "start"
        self._since = clock() if began is None else began
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._at, self._kept = {}, -float("inf")

    def enter(self, phase: str, was: str | None = None):
        """The phase from now on. was: what the one that ends here turned out to be, where that is only known now."""
        now = self._clock()
        self._seconds[was or self._phase] += now - self._since
        self._phase, self._since = phase, now

    @contextlib.contextmanager
    def during(self, phase: str):
        """A phase within another one."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Seconds by phase until now, of this process and those before it."""
        self.enter(self._phase)
        return dict(self._seconds)

    def row(self) -> dict[str, float]:
        """What a row of metrics says of it."""
        seconds = self.seconds()
        total = sum(seconds.values())
        return {"goodput": seconds["step"] / total if total else 0.0} | {f"seconds/{k}": round(v, 3) for k, v in seconds.items()}

    def text(self) -> str:
        """"412 s: step 92 %, compile 5 %, ...": largest first, without what rounds to nothing."""
        seconds = self.seconds()
        total = sum(seconds.values())
        shares = {k: round(100 * v / total) if total else 0 for k, v in sorted(seconds.items(), key=lambda item: -item[1])}
        return f"{total:.0f} s: " + ", ".join(f"{k} {v} %" for k, v in shares.items() if v)

    def resume(self, file, step: int):
        """Add what the processes before this one spent until checkpoint `step`; what they spent after it is lost."""
        seconds, at = _read(file)
        until = at.get(step, dict.fromkeys(PHASES, 0.0))
        for phase in PHASES:
            self._seconds[phase] += until[phase]
        self._seconds["lost"] += sum(seconds.values()) - sum(until.values())
        self._at = {k: v for k, v in at.items() if k <= step}
        self._write(file, self.seconds())

    def keep(self, file, checkpoints=None, step: int | None = None):
        """Write the record, not too often; always, when checkpoint `step` is being saved beside the `checkpoints` there are."""
        now = self.seconds()
        if step is not None:
            self._at = {k: v for k, v in self._at.items() if k in checkpoints} | {step: now}
        if step is not None or self._clock() - self._kept >= KEEP_EVERY:
            self._write(file, now)

    def _write(self, file, seconds):
        self._kept = self._clock()
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"seconds": seconds, "at": self._at}, indent=1))
        temporary.replace(file)


def _read(file):
    """(seconds, {step: seconds}) of the record; zeros where none can be read: a clock is not worth stopping a run for."""
    try:
        record = json.loads(file.read_text())
        whole = lambda seconds: {k: float(seconds[k]) for k in PHASES}  # noqa: E731
        return whole(record["seconds"]), {int(k): whole(v) for k, v in record["at"].items()}
    except (FileNotFoundError, AttributeError, KeyError, TypeError, ValueError):
        return dict.fromkeys(PHASES, 0.0), {}
