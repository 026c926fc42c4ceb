"""What lives share: where their runs lie, how long they are, and how a stage begins with what another left."""

import pathlib

from absl import flags

from experiments.studies import common

SHORTEN = flags.DEFINE_float(
    "shorten", 1.0, "All stages have this share of their steps: for a look at the chain, whose runs and page go to a folder of its own in --runs.",
    lower_bound=0.0,
)  # fmt: skip
PREFERENCE = flags.DEFINE_enum("preference", "dpo", ["refl", "grpo", "dpo"], "The way of preference that the later stages go on from.")


class Life:
    """A chain of stages on one data set.

    name; count (what its figures are measured on); about (lines of its page: what is measured, and how); columns, {figure: its heading}.
    """

    name: str
    count: int
    about: tuple
    columns: dict

    def stages(self):
        """(name, workdir, how to sample it) of every stage that makes images, in order."""
        raise NotImplementedError

    def measured(self, workdir: pathlib.Path, how: dict) -> dict:
        """{figure: number} of what a stage left, sampled so."""
        raise NotImplementedError

    def figures(self, workdir: pathlib.Path, how: dict) -> dict:
        """`measured`, kept beside the stage."""
        return common.kept(workdir, {"life": self.name, "count": self.count, "how": how}, lambda: self.measured(workdir, how))

    def picture(self, name: str, workdir: pathlib.Path, how: dict):
        """Save samples of a stage as <name>.png."""
        raise NotImplementedError

    @property
    def folder(self) -> str:
        """Of the runs, in --runs: those of another --shorten are others, which a longer run must not go on with."""
        return self.name if SHORTEN.value == 1 else f"{self.name}_{SHORTEN.value:g}"

    def result(self, name: str) -> str:
        """Where a result lies: an absolute path takes the place of the studies' own folder."""
        return name if SHORTEN.value == 1 else str((pathlib.Path(common.RUNS.value) / self.folder / name).absolute())

    def file(self, name: str) -> pathlib.Path:
        """Of what is made on the way, an absolute path."""
        return pathlib.Path(common.RUNS.value).absolute() / self.folder / name

    def trained(self, stage: str, config: str, steps: int, arg: str = "", **changes) -> pathlib.Path:
        """The workdir of a stage: configs/<config>.py for `steps` steps; of roles only what is given changes."""
        settings = common.config(config, arg, **{k: v for k, v in changes.items() if k != "roles"})
        for role, section in changes.get("roles", {}).items():
            settings["roles"][role] = {**settings["roles"].get(role, {}), **section}
        settings["steps"] = max(2, round(steps * SHORTEN.value))
        settings["sample"] = {**settings["sample"], "every": 0}
        settings["validation"] = {**settings["validation"], "every": 0}
        return common.train(f"{self.folder}/{stage}", settings)

    def made(self, name: str, module: str, *arguments: str) -> pathlib.Path:
        """A data set that a tool makes once."""
        out = self.file(name)
        if not out.exists():
            common.binary(module, *arguments, f"--out={out}")
        return out

    def few(self, count: int, least: int) -> int:
        """So many examples made on the way, fewer in a shortened life."""
        share = 1.0 if SHORTEN.value >= 1 else max(SHORTEN.value, 0.05)
        return max(least, round(count * share))


def begins(workdir: pathlib.Path) -> dict:
    """The section of a role that has these weights."""
    return {"checkpoint": str(workdir.absolute())}
