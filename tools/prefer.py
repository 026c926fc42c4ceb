"""Preferences between the samples of a checkpoint: by a rule, by a reward model, or by hand in a local web page.

    python -m tools.prefer --checkpoint=runs/digits --reward=ink --pairs=1000 --out=runs/pairs
    python -m tools.prefer --checkpoint=runs/digits --reward=model --reward_checkpoint=runs/digits_reward --out=runs/pairs
    python -m tools.prefer --checkpoint=runs/digits --by=hand --pairs=200 --out=runs/by_hand      # prints the page's address
    python -m tools.prefer --out=runs/by_hand                                                      # goes on with these pairs
    python -m tools.prefer --export=runs/by_hand --out=runs/pairs                                  # what was decided, as data

By a reward, --candidates samples are drawn for each prompt or class; the one of highest and the one of lowest become a pair (or, with
--rankings, all of them in their order). Prompts whose candidates score the same are left out: there is nothing to prefer.

By hand, two samples of each prompt are shown side by side; arrow keys decide. Each decision is a line of votes.jsonl (who, when, what was
asked for, checkpoint, step, seeds), on the disk before the next pair is shown.

What is written, {"name": "preferences", "path": ...}, is what objectives reward_model and diffusion_dpo train on.
"""

import getpass
import pathlib
import signal

import numpy as np
from absl import flags

from experiments import judging, sampling, shell
from flowjax.config import ConfigError

OUT = flags.DEFINE_string("out", None, "Directory of the pairs to write, or of the sitting.", required=True)
BY = flags.DEFINE_enum("by", None, ["reward", "hand"], "Who decides; default: reward.")
PAIRS = flags.DEFINE_integer("pairs", 1000, "How many prompts.", lower_bound=1)
CANDIDATES = flags.DEFINE_integer("candidates", None, "Samples per prompt; default: 4, by hand always 2.", lower_bound=2)
RANKINGS = flags.DEFINE_bool("rankings", False, "Keep all candidates in the order of their rewards.")
HOLDOUT = flags.DEFINE_float("holdout", 0.0, 'Share of the pairs that becomes split "test".')
WHO = flags.DEFINE_string("who", "", "By hand: who decides; default: the user's name.")
PORT = flags.DEFINE_integer("port", 8765, "By hand: port of the page on 127.0.0.1; 0: a free one.", lower_bound=0, upper_bound=65535)
EXPORT = flags.DEFINE_string("export", "", "Directory of a sitting whose decisions are written to --out.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what --out holds.")

DRAWN = ("pairs", "weights", "batch", "lora", *sampling.SAMPLING)  # what says which samples are drawn


class Candidates:
    """What the sampling flags ask for: `count` prompts or classes, k samples of each; drawn when asked for."""

    def __init__(self, count: int, k: int):
        if sampling.COUNT.value:
            raise ConfigError("--count means nothing here; use --pairs and --candidates")
        self.checkpoint, self.count, self.k = sampling.CHECKPOINT.value, count, k
        self.role, self.params, self.info = sampling.load()
        self.chosen, self.seed = sampling.options(self.info), sampling.seed(self.info)
        _, self.cond, self.prompts = sampling.asked(self.checkpoint, self.info, count)
        self.labels = self.cond.get("label")
        self.classes = self.info["num_classes"] if self.labels is not None else 0

    def about(self) -> dict:
        """How they come about."""
        own = {"checkpoint": str(self.checkpoint), "step": self.info["step"], "weights": self.info["weights"], "seed": self.seed}
        return own | {"candidates": self.k, "num_classes": self.classes, **sampling.told(self.chosen)}

    def draw(self) -> np.ndarray:
        """uint8 (count, k, H, W, C)."""
        from flowjax.evals import image
        from flowjax.train import generator

        make = generator.build(self.role, self.params, self.info, self.checkpoint, self.chosen)
        cond = {name: np.repeat(v, self.k, axis=0) for name, v in self.cond.items()}
        x = image.quantise(make(cond, self.count * self.k, self.seed, sampling.BATCH.value), sampled=True)
        return x.reshape(self.count, self.k, *x.shape[1:])


def by_reward():
    """Pairs or rankings, decided by --reward."""
    from flowjax.data import sources
    from flowjax.evals import rewards

    given = Candidates(PAIRS.value, CANDIDATES.value or 4)
    score, k = judging.scorer(), given.k
    x = given.draw()
    each = lambda v: None if v is None else np.repeat(v, k, axis=0)  # noqa: E731
    prompts = [p for p in given.prompts for _ in range(k)]
    scores = score(x.reshape(-1, *x.shape[2:]), each(given.labels), prompts).reshape(given.count, k)
    if RANKINGS.value:
        ranked, kept = rewards.ranked(x, scores)
        write, columns = sources.write_rankings, (ranked,)
    else:
        win, lose, kept = rewards.best_and_worst(x, scores)
        write, columns = sources.write_preferences, (win, lose)
    label = None if given.labels is None else given.labels[kept]
    caption = [p for p, keep in zip(given.prompts, kept, strict=True) if keep] if given.prompts else None
    meta = {**judging.told(), **given.about()}
    write(OUT.value, *columns, label, given.classes, meta, overwrite=OVERWRITE.value, captions=caption, holdout=HOLDOUT.value)
    what = "rankings" if RANKINGS.value else "pairs"
    tied = int((~kept).sum())
    print(f"{given.count - tied} {what} in {OUT.value}; reward {judging.REWARD.value}: {scores.mean():.4f} on average, {tied} prompts tied")


def by_hand():
    """The page, until it is stopped."""
    from flowjax import storage
    from flowjax.data import votes
    from tools import prefer_page

    if sampling.CHECKPOINT.value:
        given = Candidates(PAIRS.value, 2)
        session = votes.create(OUT.value, given.draw, given.about() | {"pairs": given.count}, given.labels, given.prompts)
    else:
        session = votes.Session(OUT.value)
    who = WHO.value or getpass.getuser()
    with storage.owned(session.folder, "used"):
        session.votes()  # damage is told now
        try:
            server = prefer_page.serve(session, who, PORT.value)
        except OSError as error:
            raise ConfigError(f"--port={PORT.value}: {error.strerror}; --port=0 takes a free one") from None

        def leave(*_):
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, leave)
        print(f"{len(session.pending(who))} of {len(session)} pairs wait for {who}: http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()
    print(f"\n{len(session) - len(session.pending(who))} of {len(session)} decided: {session.folder / votes.VOTES}")
    print(f"as data: python -m tools.prefer --export={OUT.value} --out=DIRECTORY")


def export():
    """The decisions of a sitting as preference pairs."""
    from flowjax.data import votes

    made, counts = votes.Session(EXPORT.value).export(OUT.value, HOLDOUT.value, OVERWRITE.value)
    told = ", ".join(f"{counts.get(c, 0)} {c}" for c in votes.CHOICES)
    sizes = ", ".join(f"{k} {v['count']}" for k, v in made["splits"].items())
    print(f"pairs in {OUT.value}: {sizes}; decided: {told}")


def main():
    found = (pathlib.Path(OUT.value) / "session.json").exists()
    if EXPORT.value:
        _refuse("--export", ("checkpoint", "by", "candidates", "rankings", "who", "port", "reward", "reward_checkpoint", *DRAWN))
        export()
    elif BY.value == "hand" or (found and not sampling.CHECKPOINT.value):
        _refuse("deciding by hand", ("candidates", "rankings", "holdout", "overwrite", "reward", "reward_checkpoint"))
        if sampling.CHECKPOINT.value:
            _device()
        else:
            _refuse("pairs that are there already (no --checkpoint)", DRAWN)
        by_hand()
    else:
        _refuse("deciding by a reward", ("who", "port"))
        _device()
        by_reward()
    return 0


def _device():
    from flowjax.train import runtime

    runtime.setup()


def _refuse(doing: str, names):
    for name in names:
        if flags.FLAGS[name].present:
            raise ConfigError(f"--{name} means nothing for {doing}")


if __name__ == "__main__":
    shell.run(main)
