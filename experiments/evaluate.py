"""Evaluate: python -m experiments.evaluate --checkpoint=<export or workdir> [--count=1000 --guidance=none --seed=1 ...]

Samples, measures against the held-out split of the run's data, and writes one protocol record (JSON) per setting. For an
autoencoder: PSNR and SSIM of the held-out split's reconstructions. For a reward model: how many of the held-out preferences it
shares, and whether it is calibrated.

All devices make samples. Several processes, started as those of experiments.train are, make and look at a share each; the
numbers are those of one process, and process 0 writes them.
"""

import json

import jax
import numpy as np
from absl import flags

from experiments import job, sampling, shell
from flowjax import generate
from flowjax.config import ConfigError, keywords
from flowjax.train import runtime

RECORD = flags.DEFINE_string("record", "", "JSON file to write; default: <checkpoint>/evaluation-<weights>-<step>-<hash>.json.")
METRICS = flags.DEFINE_list("metrics", [], "Metrics instead of the run's config.")
DATA = flags.DEFINE_string("data", "", "Data section (or name) to measure against instead of the run's, e.g. \"{'name': 'array_record', 'path': ...}\".")
FEATURES = flags.DEFINE_list("features", [], "Feature networks instead of the run's config.")


def measure_autoencoder(role, params, info, section):
    """(circumstances, results) of an autoencoder on the held-out split."""
    from flowjax.data.pipeline import arrays
    from flowjax.evals import image
    from flowjax.train import generator

    given = [k for k in (*sampling.SAMPLING, "metrics", "features") if flags.FLAGS[k].present]
    if given:
        raise ConfigError(f"--{given[0]} means nothing for an autoencoder: its held-out reconstructions are measured")
    x = arrays(info["config"]["data"], section["test_split"])["x"]
    about = {"samples": len(x), "features": [], "reference": {section["test_split"]: {"count": len(x)}}}
    x = x[_share(len(x), f"images of {section['test_split']}")]
    results = {"reconstruction": image.reconstruction(generator.reconstructions(role, params, x, section["batch"]), x)}
    return {"sampler": "reconstruction", "steps": 0, "guidance": None, "label_rule": None, "seed": 0, **about}, results


def _share(count, of: str):
    """This process's rows of `count`."""
    from flowjax.evals import processes

    if count < jax.process_count():
        raise ConfigError(f"{count} {of} are too few for {jax.process_count()} processes")
    return processes.share(count)


def measure_reward(role, params, info, section):
    """(circumstances, results) of a reward model on the held-out split of its preferences."""
    from flowjax.data.pipeline import arrays
    from flowjax.evals import rewards

    given = [k for k in (*sampling.SAMPLING, "metrics", "features") if flags.FLAGS[k].present]
    if given:
        raise ConfigError(f"--{given[0]} means nothing for a reward model, which is measured on the held-out preferences")
    data = arrays(info["config"]["data"], section["test_split"])
    results = {"preferences": rewards.calibration(rewards.differences(role.net(params), data, section["batch"]))}
    count = results["preferences"]["pairs"]
    about = {"samples": count, "features": [], "reference": {section["test_split"]: {"count": count}}}
    return {"sampler": "none", "steps": 0, "guidance": None, "label_rule": None, "seed": 0, **about}, results


def captions(info, checkpoint, data, split, count):
    """cond of `count` samples: the captions of a split in turn, as tokens or as the data hold them embedded, and the classes that go
    with them where the network has classes."""
    from flowjax.data.pipeline import arrays, ordered
    from flowjax.data.text import without
    from flowjax.train import export

    manifest, _ = ordered(without(data), split, 1)
    if "embeddings" in manifest:
        made, mine = (m.get("embedded", {}).get("text") for m in (manifest, info["data"]))
        if made != mine:
            raise ConfigError(f"{manifest['name']} holds captions embedded by another text encoder ({made}) than the network's ({mine})")
        cond, names = arrays(without(data), split, count)["cond"], [*manifest["embeddings"]]
    else:
        export.tokenizer_of(checkpoint, info)  # which says what is wrong with it, if anything
        cond, names = arrays(data | {"text": export.tokenizer_section(checkpoint, info)}, split)["cond"], ["tokens"]
    names += ["label"] * bool(info["model"].get("num_classes"))
    return {k: np.resize(cond[k], (count, *cond[k].shape[1:])) for k in names}


def measure_samples(role, params, info, section, checkpoint):
    """(circumstances, results) of samples."""
    from flowjax.evals import protocol
    from flowjax.evals.evaluate import evaluate, real
    from flowjax.train import generator

    captioned = sampling.captioned(info)
    strange = ["prompt", "prompts", "size", "init", "strength", "mask"] + ["labels"] * (captioned or not info["model"].get("num_classes"))
    if given := [k for k in strange if flags.FLAGS[k].present]:
        raise ConfigError(f"--{given[0]} means nothing here: this network is measured as it was trained, against the held-out split")
    data = keywords(info["config"]["data"])
    count = sampling.COUNT.value or section["count"]
    seed = section["seed"] if sampling.SEED.value < 0 else sampling.SEED.value
    chosen = sampling.options(info)
    rule, cond = None, {}
    if captioned:
        cond = captions(info, checkpoint, data, section["test_split"], count)
        rule = f"captions{' with classes' if 'label' in cond else ''} of {section['test_split']}, in turn"
    elif info["model"].get("num_classes"):
        rule = "in turn: " + ",".join(sampling.LABELS.value) if sampling.LABELS.value else section["labels"]
        cond = sampling.labels(info, count)
        if not sampling.LABELS.value:
            seen = generate.classes_of(info["config"], info["num_classes"])
            cond = {"label": seen[protocol.labels(count, len(seen), rule, seed)]}
            if len(seen) < info["num_classes"]:
                rule += " among " + ",".join(map(str, seen))
    mine = _share(count, "samples (--count)")
    cond = {k: v[mine] for k, v in cond.items()}
    x = generator.build(role, params, info, checkpoint, chosen)(cond, mine.stop - mine.start, seed, sampling.BATCH.value, mine.start)

    results = evaluate(
        x,
        cond.get("label"),
        real(data, info["data"], section),
        {
            "metrics": METRICS.value or section["metrics"],
            "features": FEATURES.value or section["features"],
            "judge": section["judge"],
            "seed": seed,
            "sampled": True,
        },
    )
    about = results.pop("circumstances")
    guidance = None if chosen["guidance"] == "none" else chosen["guidance"]
    if chosen["negative"]:
        guidance = keywords(guidance) | {"negative": chosen["negative"]}
    results["clipped"] = about["clipped"]
    return {
        "sampler": {"sampler": chosen["sampler"], "grid": chosen["grid"]}, "steps": chosen["steps"], "guidance": guidance,
        "label_rule": rule, "seed": seed, **{k: about[k] for k in ("samples", "features", "reference")},
    }, results  # fmt: skip


def main():
    job.join()
    try:
        return measure()
    except Exception as error:
        runtime.leave(error, "start it again")
        raise


def measure():
    from flowjax import storage
    from flowjax.evals import protocol

    checkpoint = sampling.CHECKPOINT.value
    role, params, info = sampling.load()
    section = info["config"]["evaluate"]
    if other := shell.section(DATA.value, "data") if DATA.value else section.get("data"):
        known = {k: info["data"][k] for k in ("tokenizer", "embedded") if k in info["data"]}
        info = {**info, "data": known, "config": {**info["config"], "data": other}}
    if role.module.kind == "autoencoder":
        circumstances, results = measure_autoencoder(role, params, info, section)
    elif role.module.kind == "reward":
        circumstances, results = measure_reward(role, params, info, section)
    else:
        circumstances, results = measure_samples(role, params, info, section, checkpoint)
    record = protocol.Record(
        **circumstances, ema=None if info["weights"] == "params" else info["weights"], checkpoint_step=info["step"],
        checkpoint=str(checkpoint), results=results,
    )  # fmt: skip
    name = f"evaluation-{info['weights'].replace('/', '_')}-{info['step']}-{protocol.digest(circumstances)}.json"
    path = storage.path(RECORD.value) if RECORD.value else storage.path(checkpoint) / name
    if jax.process_index() == 0:
        record.write(path)
        print(json.dumps(results, indent=1))
        print(f"record: {path}")
    return 0


if __name__ == "__main__":
    shell.run(main)
