"""What makes a number comparable: the record stored with every measurement, and the labels that samples are asked for."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Collection

import numpy as np

import flowjax
from flowjax.config import ConfigError, lookup
from flowjax.evals.image import QUANTISATION


def _balanced(n: int, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Every class n // num_classes times, a random choice of classes once more, in random order."""
    rest = rng.permutation(num_classes)[: n % num_classes]
    return rng.permutation(np.concatenate([np.repeat(np.arange(num_classes), n // num_classes), rest]))


def _random(n: int, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Independent uniform draws: class counts vary, which alone moves a Frechet distance."""
    return rng.integers(0, num_classes, n)


LABEL_RULES = {"balanced": _balanced, "random": _random}


def labels(n: int, num_classes: int, rule: str = "balanced", seed: int = 0) -> np.ndarray:
    """int32 (n,) class labels to ask for, by a rule of LABEL_RULES; deterministic in `seed`."""
    if n < 1 or num_classes < 1:
        raise ConfigError(f"labels need n >= 1 and num_classes >= 1, got {n} and {num_classes}")
    return lookup(LABEL_RULES, rule, "label_rule")(n, num_classes, np.random.default_rng(seed)).astype(np.int32)


def code_version() -> str:
    """Package version and a hash of its sources: tells apart what a version number or an unclean checkout would not."""
    root = pathlib.Path(flowjax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{flowjax.__version__}+{digest.hexdigest()[:12]}"


def digest(settings: dict) -> str:
    """Eight hexadecimal digits that tell settings apart, for file names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement with its circumstances. Fields are names, numbers or nested settings; all of it must be JSON without NaN.

    sampler, guidance  name, or settings with a name; None for no guidance. "negative" is the prompt that was guided away from
    steps              sampler steps; ema: which average of the weights, or None for the raw ones
    label_rule         key of LABEL_RULES, or which classes or captions in turn; None when unconditional; seed: of labels and noise; samples: how many
    features           names of the feature networks, hash included; reference: {split: {count, hash}} of the real sets
    checkpoint_step    training step of the weights; checkpoint: where they came from, if that is told
    results            what was measured
    """

    sampler: str | dict
    steps: int
    guidance: str | dict | None
    ema: str | float | dict | None
    label_rule: str | None
    seed: int
    samples: int
    features: list[str]
    reference: dict
    checkpoint_step: int
    results: dict
    checkpoint: str | None = None
    quantisation: str = QUANTISATION
    code: str = dataclasses.field(default_factory=code_version)

    def json(self) -> str:
        """The record as JSON text; NaN and infinity are refused by the path of the first one."""
        record = dataclasses.asdict(self)
        _require_finite(record, "record")
        return json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"

    def write(self, path: str | os.PathLike):
        """Write JSON, whole or not at all."""
        path = path if hasattr(path, "write_text") else pathlib.Path(path)
        text = self.json()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        partial.write_text(text)
        partial.replace(path)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Record":
        """The record that `write` stored."""
        try:
            return cls(**json.loads(pathlib.Path(path).read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(f"{path} is not an evaluation record: {error}") from error


def _require_finite(value, where: str):
    if isinstance(value, dict):
        for key, item in value.items():
            _require_finite(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _require_finite(item, f"{where}[{i}]")
    elif isinstance(value, float) and not np.isfinite(value):
        raise ConfigError(f"{where} = {value} cannot be stored: NaN and infinity are no JSON")
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise ConfigError(f"{where} = {value!r} cannot be stored: {type(value).__name__} is no JSON")


def comparable(a: Record, b: Record, ignore: Collection[str] = ()) -> list[str]:
    """Names of the fields, results apart, in which two records differ: [] means that their numbers may stand side by side.

    ignore: fields that are meant to differ, such as ("checkpoint_step", "checkpoint") along one training run.
    """
    names = [field.name for field in dataclasses.fields(Record) if field.name != "results"]
    unknown = set(ignore) - set(names)
    if unknown:
        raise ConfigError(f"comparable.ignore = {sorted(unknown)} is unknown; valid: {', '.join(names)}")
    left, right = (json.loads(record.json()) for record in (a, b))
    return [name for name in names if name not in ignore and left[name] != right[name]]
