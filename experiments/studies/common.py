"""What studies share: train once, measure once, write a table."""

import csv
import functools
import importlib
import json
import pathlib
import subprocess
import sys
import threading

import numpy as np
from absl import flags

RUNS = flags.DEFINE_string("runs", "runs/studies", "Where trained runs are kept.")
DATA = flags.DEFINE_string("data", "", "The prepared data set of a study that needs one; by default data/ and its name.")
SEEDS = flags.DEFINE_integer("seeds", 3, "How many seeds.", lower_bound=1)
HERE = pathlib.Path(__file__).parent
_finished: dict[str, str] = {}  # settings of the runs that this process has seen whole


def config(name: str, arg: str = "", **changes) -> dict:
    """configs/<name>.py as a plain dict, top-level sections replaced by `changes` (dicts are merged one level deep)."""
    base = importlib.import_module(f"configs.{name}")
    values = (base.get_config(arg) if arg else base.get_config()).to_dict()
    for key, value in changes.items():
        merge = isinstance(value, dict) and isinstance(values.get(key), dict) and value.get("name") in (None, values[key].get("name"))
        values[key] = {**values[key], **value} if merge else value
    values["log"] = {**values["log"], "tensorboard": False}
    return values


def of_data() -> str:
    """The flag for the data, as it stands on a page: where they are on this machine is nobody's business."""
    return f" --data=data/{pathlib.Path(DATA.value).name}" if DATA.value else ""


def measured_by(study: str) -> str:
    """How a page begins: the command that wrote it, and what its numbers are."""
    count = SEEDS.value
    told = f"`python -m experiments.study {study}{of_data()}{'' if count == 3 else f' --seeds={count}'}`"
    return f"{told}: one seed" if count == 1 else f"{told}: mean ± standard deviation over {count} seeds"


def train(name: str, settings: dict) -> pathlib.Path:
    """The workdir of a finished run of `settings` under --runs/<name>, trained now where it is not.

    A run that is asked to stop ends the study: what comes next needs it whole.
    """
    from flowjax.train import loop

    workdir, told = pathlib.Path(RUNS.value) / name, json.dumps(settings, sort_keys=True, default=str)
    if _finished.get(str(workdir)) != told:  # finding out takes seconds, and studies ask for the same run many times
        loop.run(settings, workdir, stop := threading.Event())
        if stop.is_set():
            raise SystemExit(f"stopped on request in {workdir}; the same command goes on")
        _finished[str(workdir)] = told
    return workdir


@functools.lru_cache(maxsize=16)
def _generator(workdir, weights, steps, sampler, guidance):
    from flowjax.train import generator

    return generator.load(workdir, weights, {"steps": steps, "sampler": sampler, "guidance": json.loads(guidance)})


def draw(workdir, cond, count, *, weights="ema", steps=25, sampler="heun", guidance=None, seed=0):
    """(count, ...) samples for cond, {"label": (count,)} or {}; guidance is a scale of classifier-free guidance, a section or None."""
    section = "none" if guidance is None else guidance if isinstance(guidance, dict) else {"name": "cfg", "scale": guidance}
    return _generator(workdir, weights, steps, sampler, json.dumps(section, sort_keys=True))(cond, count, seed)


def samples(workdir, labels, **options):
    """`draw` for labels (N,)."""
    return draw(workdir, {"label": labels}, len(labels), **options)


def binary(module: str, *arguments: str, codes=(0,)):
    """Run `python -m module arguments` as a user would, from the top of the repository; RuntimeError with its last words when it ends
    with another exit code than `codes`."""
    command = [sys.executable, "-m", module, *arguments]
    print(" ".join(command[1:]), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent.parent)
    if done.returncode not in codes:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


@functools.lru_cache(maxsize=2)
def _real(data: str):
    from flowjax.evals import evaluate

    return evaluate.real(json.loads(data), {}, {"train_split": "train", "test_split": "test"})


def measure(
    workdir, *, count=1000, metrics=("frechet", "agreement", "memorisation"), features=("pixels",), data=None, seed=0, asked=None, **options
) -> dict:  # fmt: skip
    """Evaluation results of `count` balanced samples, stored under <workdir>/study and read back the next time.

    asked: labels (N,) -> the condition that asks for them, where that is not the labels themselves.
    """
    from flowjax.evals import protocol
    from flowjax.evals.evaluate import evaluate
    from flowjax.train import export

    def made():
        info = export.info_of(workdir)
        labels = protocol.labels(count, 10, "balanced", seed)
        x = draw(workdir, asked(labels) if asked else {"label": labels}, count, seed=seed, **options)
        real = _real(json.dumps(data or info["config"]["data"], sort_keys=True))
        return evaluate(x, labels, real, {"metrics": metrics, "features": features, "seed": seed, "sampled": True})

    key = {"count": count, "metrics": list(metrics), "features": list(features), "seed": seed, **({"data": data} if data else {}), **options}
    return kept(workdir, key, made)


def kept(workdir, key: dict, make) -> dict:
    """make(), stored under <workdir>/study by its key and read back the next time, unless the run has gone on since."""
    from flowjax.evals import protocol

    workdir = pathlib.Path(workdir)
    file = workdir / "study" / f"{protocol.digest(key)}.json"
    steps = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
    now = {"key": key, "step": max(steps, default=None)}
    told = json.loads(file.read_text()) if file.exists() else None
    if told is None or told.get("step", now["step"]) != now["step"]:
        told = now | {"results": make()}
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(told, indent=1))
    return told["results"]


def real(workdir) -> dict:
    """{"train", "test"} arrays of the data that a run was trained on."""
    from flowjax.train import export

    return _real(json.dumps(export.info_of(workdir)["config"]["data"], sort_keys=True))


def frechet(results: dict) -> dict:
    """The one Frechet entry of `measure`'s results."""
    return next(iter(results["frechet"].values()))


def spread(values) -> str:
    """"mean ± standard deviation" over seeds, four significant digits; of one seed the value alone."""
    values = np.asarray(values, float)
    return f"{values.mean():.4g}" + (f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else "")


def table(name: str, head: list[str], rows: list[list]):
    """Write <study>.csv and return the same as a Markdown table."""
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def page(name: str, text: str):
    """Write the study's page and print it."""
    path = HERE / "results" / f"{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.rstrip() + "\n")
    print(text)


def picture(name: str, workdir, rows: int = 5, **options):
    """Save `rows` samples of each of ten classes, a column a class, as <name>.png."""
    from flowjax.train import pictures

    pictures.grid(samples(workdir, np.arange(10 * rows) % 10, **options), HERE / "results" / f"{name}.png", columns=10)


def figure(name: str, draw, size=(5, 3.4)):
    """Save what draw(axes) plots as <name>.png."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=size, layout="constrained")
    draw(fig.add_subplot())
    path = HERE / "results" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, dpi=110)
