"""tools.plan: what it says of programs that can be checked here, on eight simulated devices; TPU compiles where libtpu is."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from flowjax import conditions, models
from flowjax.config import ConfigError
from flowjax.data.pipeline import declared
from flowjax.models import sharding
from flowjax.train import hardware, hlo
from flowjax.train import mesh as mesh_lib
from flowjax.train import settings
from nets import GOLDEN
from tools import plan
from train_runs import DIT, tiny

PAPERS = ("imagenet_dit_xl2", "imagenet_sit_xl2", "imagenet_dit_xl2_512")
TEXT_TO_IMAGE = {"t2i_sd3_2b": 2_028_328_000, "t2i_sd35_8b": 8_056_627_520, "t2i_flux_12b": 11_891_178_560}


def config_of(name, arg=None):
    module = importlib.import_module(f"configs.{name}")
    return settings.resolve(module.get_config(arg) if arg else module.get_config())


def planned(**changes):
    config = settings.resolve(tiny(**{"data": {"name": "digits"}, "model": DIT, **changes}))
    run = plan.assemble(config, jax.devices())
    return run, plan.plan(run, None)


def test_data_parallel_step():
    run, found = planned()
    assert found["fits"] and found["devices"] == 8 and found["mesh"]["data"] == 8
    assert found["flops"]["ratio"] == pytest.approx(1, abs=0.01)
    # Replicated parameters: their gradients are all that travels, but for a few scalars.
    size = sum(v.size for v in jax.tree.leaves(run.target.params))
    sent = sum(v["bytes sent"] for v in found["collectives"].values())
    assert sent == pytest.approx(2 * 4 * size * 7 / 8, rel=0.01)
    assert found["memory"]["state"] == sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(run.target))
    text = plan.report(found, "train step")
    assert "batch 16 on 8 devices, data 8" in text and "ratio 1.0" in text


def test_fsdp_splits_the_state_and_recomputation_is_executed_work():
    replicated, whole = planned(model={**DIT, "width": 64})
    _, split = planned(model={**DIT, "width": 64, "remat": "full"}, mesh={"data": 1, "fsdp": 8})
    assert split["memory"]["state"] < whole["memory"]["state"] / 4
    assert split["flops"]["needed"] == whole["flops"]["needed"]
    assert 1.2 < split["flops"]["ratio"] < 1.45  # the forward pass of the blocks once more: 4/3 less what is outside
    assert split["collectives"]["all-gather"]["bytes sent"] > 0


def test_what_fsdp_leaves_whole_is_said():
    """8 divides the MLP's and the modulation's 4 x 20 and 6 x 20, not 20: those are split there, attention's kernels are not split."""
    _, found = planned(model={**DIT, "width": 20}, mesh={"data": 1, "fsdp": 8})
    unsplit = found["unsplit"]["kernels"]
    assert {f"net/blocks/attn/{k}/kernel": [2, 20, 20] for k in "qkv"}.items() <= unsplit.items()
    assert not any("mlp" in name or "blocks/adaln" in name for name in unsplit)
    assert 4 * 2 * 20 * 20 < found["unsplit"]["parameters"] < found["unsplit"]["of"] / 2
    assert "fsdp 8 divides no dimension that a rule splits of" in plan.report(found, "train step")
    (line,) = (line for line in plan.advice(found, {"model": {}, "batch_size": 16}, None) if "divisors" in line)
    assert line.endswith("of its divisors 2, 4 would")
    _, found = planned(mesh={"data": 1, "fsdp": 8})
    assert {*found["unsplit"]["kernels"]} == {"net/t_embed/fc1/kernel"}  # of sines and cosines, which no rule splits


@pytest.mark.parametrize(("axes", "whole"), [(("data",), []), (("tensor",), []), (("fsdp",), ["net/blocks/mlp/fc1/kernel"]), (("data", "fsdp"), ["net/blocks/mlp/fc1/kernel"])])
def test_whole_all_reduces_of_what_fsdp_splits_are_named(axes, whole):
    run = plan.assemble(settings.resolve(tiny(data={"name": "digits"}, model={**DIT, "width": 32}, mesh={"data": 2, "fsdp": 2, "tensor": 2})), jax.devices())
    places = np.arange(8).reshape(tuple(run.mesh.shape.values()))
    members = tuple(places[tuple(slice(None) if a in axes else 0 for a in run.mesh.shape)].ravel().tolist())
    size = run.target.params["net"]["blocks"]["mlp"]["fc1"]["kernel"].size
    where = "jit(step)/transpose(jvp(DiT))/while/body/blocks.body/blocks/mlp/fc1/dot_general"
    reduce = hlo.Collective("all-reduce", 4 * size // 2 // 2, len(members), 2, where, members)  # float32, two layers, split over tensor
    assert [*plan.reduced_whole(run, [reduce])] == whole
    assert plan.reduced_whole(run, [reduce._replace(kind="reduce-scatter"), reduce._replace(bytes=1000)]) == {}


def test_sampler_and_json(tmp_path):
    run, _ = planned()
    found = plan.plan(run, None, "sampler")
    assert found["batch"] == run.config["sample"]["count"] and found["flops"]["needed"] > 0
    (tmp_path / "p.json").write_text(json.dumps(found))


def test_bad_input():
    for bad in ("v5e", "v9:2x2", "v5e-16", "gpu:8", "cpu:x", "v5litepod:4x4"):
        with pytest.raises(ConfigError, match="unknown; valid are for example v5e:2x2"):
            plan.devices_of(bad)
    for bad in ("v5e:32x32", "v6e:4x4x4"):
        with pytest.raises(ConfigError, match="has two sides, at most 16x16; larger jobs are several"):
            plan.devices_of(bad)
    with pytest.raises(ConfigError, match="a slice of v5p has three sides, for example v5p:2x2x1"):
        plan.devices_of("v5p:4x4")
    with pytest.raises(ConfigError, match="8 CPU devices already"):
        plan.devices_of("cpu:4096")
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(ConfigError, match="needs the package libtpu"):
            plan.devices_of("v5e:2x2")
    with pytest.raises(ConfigError, match="expect_shape and data.expect_classes are needed"):
        declared({"name": "array_record", "path": "nowhere", "expect_shape": (4, 4, 3)})


def test_advice_fits_the_trouble():
    chip = hardware.Chip(1e12, 16e9, 1e11, 1e10)
    mesh = {"data": 4, "fsdp": 1, "tensor": 1, "context": 1}
    config = {"model": {"remat": "none"}, "batch_size": 32}
    lines = plan.advice({"fits": False, "mesh": mesh, "memory": {"state": 12e9}}, config, chip)
    assert [w for w in ("mesh.fsdp", "model.remat", "accumulate up to 8") if not any(w in line for line in lines)] == []
    lines = plan.advice({"fits": False, "mesh": mesh, "memory": {"state": 1e9}}, {"model": {"remat": "full"}, "batch_size": 4}, chip)
    assert len(lines) == 1 and "mesh.context" in lines[0]
    (line,) = plan.advice({"fits": True, "mesh": mesh, "roofline": {"bound by": "network"}}, config, chip)
    assert "network is the bound" in line
    assert plan.advice({"fits": True, "mesh": mesh, "roofline": {"bound by": "compute"}}, config, chip) == []


@pytest.mark.parametrize(("kind", "name"), [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H200", "H200"), ("cpu", None)])
def test_chips_by_their_kinds(kind, name):
    assert hardware.chip(kind) == (hardware.CHIPS[name] if name else None)


# --- configs of paper scale


@pytest.mark.parametrize("name", [*PAPERS, *TEXT_TO_IMAGE])
def test_layout_of_paper_scale_parameters(name):
    """Every parameter's layout on the mesh of its config over 256 devices, as text: a change shows in a diff.

    FLOWJAX_WRITE_GOLDEN=1 writes it anew.
    """
    import os

    config = config_of(name)
    sizes = {**config["mesh"]}
    sizes["data"] = 256 // (sizes["fsdp"] * sizes["tensor"] * sizes["context"])
    mesh = jax.sharding.AbstractMesh(tuple(sizes[a] for a in mesh_lib.AXES), mesh_lib.AXES)
    module, data = models.build(config["model"], "model"), declared(config["data"])
    x = jnp.zeros((1, *data.shape))
    boxed = jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(1), conditions.zeros(data.conditions, 1))["params"]
    places = traverse_util.flatten_dict(sharding.param_specs(boxed, mesh), sep="/")
    shapes = traverse_util.flatten_dict(meta.unbox(boxed), sep="/")
    lines = [f"{name}: {' x '.join(f'{k} {v}' for k, v in mesh.shape.items())}"]
    lines += [f"{k:32} {str(shapes[k].shape):24} {tuple(places[k].spec)}" for k in sorted(shapes)]
    replicated = sum(v.size for k, v in shapes.items() if places[k].is_fully_replicated)
    total = sum(v.size for v in shapes.values())
    lines.append(f"parameters {total:,}, of which replicated {replicated:,}")
    assert replicated < 0.002 * total, "fsdp is meant to split what is large"
    assert total == TEXT_TO_IMAGE.get(name, total)
    path = pathlib.Path(GOLDEN) / f"layout_{name}.txt"
    if os.environ.get("FLOWJAX_WRITE_GOLDEN"):
        path.write_text("\n".join(lines) + "\n")
    assert path.read_text().splitlines() == lines


def test_parameters_of_the_paper():
    """DiT-XL/2: 675,129,632 (2212.09748), of which 256 x 1152 are the fixed position table, no parameter of ours."""
    for name in PAPERS:
        config = config_of(name)
        module = models.build(config["model"], "model")
        x = jnp.zeros((1, *config["data"]["expect_shape"]))
        tree = jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(1), {"label": jnp.zeros(1, int)})
        assert sum(v.size for v in jax.tree.leaves(tree)) == 675_129_632 - 256 * 1152
