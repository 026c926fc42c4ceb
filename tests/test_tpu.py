"""What XLA's TPU compiler makes of our programs, without a TPU: `bash tools/test.sh --tpu` (needs libtpu)."""

import jax
import jax.numpy as jnp
import pytest

from flowjax.config import ConfigError
from flowjax.models import attention, sharding
from flowjax.train import hlo
from flowjax.train import mesh as mesh_lib
from flowjax.train import settings
from tools import plan
from train_runs import tiny

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: bash tools/test.sh --tpu")

DIT = {"name": "dit", "patch": 2, "width": 512, "depth": 2, "heads": 4, "num_classes": 10, "dtype": "bfloat16"}
DATA = {"name": "array_record", "path": "nowhere", "expect_shape": (16, 16, 4), "expect_classes": 10}


@pytest.fixture(scope="module")
def slice_():
    return plan.devices_of("v5e:2x4")


def planned(slice_, **changes):
    config = settings.resolve(tiny(**{"data": DATA, "model": DIT, "batch_size": 16, **changes}))
    run = plan.assemble(config, slice_[0])
    return run, plan.plan(run, slice_[1])


def size(run):
    return sum(v.size for v in jax.tree.leaves(run.target.params))


def test_fsdp_gathers_and_scatters_and_never_reduces_parameters_whole(slice_):
    run, found = planned(slice_, mesh={"data": 1, "fsdp": 8})
    assert found["fits"] and found["flops"]["ratio"] == pytest.approx(1, abs=0.03)
    whole = {k: v["bytes sent"] * 8 / 7 for k, v in found["collectives"].items()}
    moved = sum(whole.get(k, 0) for k in ("all-gather", "collective-permute"))
    # bfloat16 parameters are gathered for the forward and for the backward pass, where the compiler does not keep them.
    assert 2 * size(run) < moved + whole.get("reduce-scatter", 0) < 14 * size(run)
    assert whole.get("all-reduce", 0) < 0.6 * size(run), "something as large as the parameters is reduced whole"
    # The first matrix of the time's embedding is small in any network but one as small as this.
    assert found["reduced whole"] == {} and found["unsplit"]["kernels"].keys() == {"net/t_embed/fc1/kernel"}
    # Parameters, two moments and the average, an eighth each; biases stay whole.
    assert found["memory"]["state"] == pytest.approx(4 * 4 * size(run) / 8, rel=0.15)


@pytest.mark.parametrize(("topology", "fsdp", "kind"), [("v5e:4x4", 16, "all-reduce"), ("v5e:4x4", 8, "reduce-scatter"), ("v5e:4x8", 32, "reduce-scatter")])
def test_over_a_whole_square_slice_the_compiler_scatters_nothing(topology, fsdp, kind):
    """It makes an all-reduce even of a reduce-scatter that is written as one: what tools.plan says of such meshes, and why our
    configs take a part of the slice. If this fails, the compiler has learnt it and the advice can go."""
    devices, _ = plan.devices_of(topology)
    mesh = mesh_lib.make_mesh(data=-1, fsdp=fsdp, devices=devices)
    scatter = jax.shard_map(
        lambda x: jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True), mesh=mesh, in_specs=jax.P(), out_specs=jax.P("fsdp"), check_vma=False
    )
    text = jax.jit(scatter).lower(jax.ShapeDtypeStruct((2048, 512), jnp.float32)).compile().as_text()
    assert [c.kind for c in hlo.collectives(text, len(devices)) if c.bytes > 2**20] == [kind]


def test_data_parallel_reduces_float32_gradients_once(slice_):
    run, found = planned(slice_)
    sent = sum(v["bytes sent"] for v in found["collectives"].values())
    assert sent == pytest.approx(2 * 4 * size(run) * 7 / 8, rel=0.05)


def test_a_program_that_is_too_large_is_reported_with_advice(slice_):
    config = settings.resolve(tiny(data=DATA, model={**DIT, "width": 4096, "heads": 32, "depth": 6}, batch_size=8, mesh={"data": 8}))
    found = plan.plan(plan.assemble(config, slice_[0]), slice_[1])
    assert not found["fits"]
    text = plan.report(found, "train step") + "\n".join(plan.advice(found, config, slice_[1]))
    assert "DOES NOT FIT" in text and "config.mesh.fsdp, now 1" in text


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "tensor": 2, "context": 2}])
def test_splash_compiles_and_takes_less_memory(slice_, sizes):
    mesh = mesh_lib.make_mesh(**sizes, devices=slice_[0])
    q = jax.ShapeDtypeStruct((8, 4096, 4, 72), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("data")))

    def temporaries(implementation):
        def loss(q, k, v):
            with sharding.use(mesh):
                q, k, v = (sharding.constrain(x, *attention.LAYOUT) for x in (q, k, v))
                return attention.attention(q, k, v, implementation=implementation).astype(jnp.float32).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("splash") < temporaries("xla") / 2


def test_offloaded_block_inputs_leave_the_device(slice_):
    deep = {**DIT, "depth": 64}  # the inputs of 64 blocks: 1/2 GiB a device
    (_, kept), (_, moved) = (planned(slice_, model={**deep, "remat": r}, batch_size=1024) for r in ("full", "offload"))
    assert moved["memory"]["temporaries"] < 0.92 * kept["memory"]["temporaries"]


def test_what_a_fused_kernel_makes_is_kept_with_the_products(slice_, tmp_path):
    """model.remat = dots runs splash forward once, as if everything were kept; full runs it again for the backward pass."""
    data, file = {**DATA, "expect_shape": (128, 128, 4)}, tmp_path / "text"

    def kernels(remat):
        config = tiny(data=data, model={**DIT, "remat": remat}, batch_size=8, mesh={"data": 1, "fsdp": 8})
        plan.plan(plan.assemble(settings.resolve(config), slice_[0]), slice_[1], save_text=file)
        return file.read_text().count('custom_call_target="tpu_custom_call"')

    assert kernels("dots") == kernels("none") == kernels("full") - 1 > 0


def test_a_slice_that_is_not_made_of_whole_hosts():
    with pytest.raises(ConfigError, match="v5e:3x3.*valid are for example v5e:2x2"):
        plan.devices_of("v5e:3x3")


def test_several_slices(slice_):
    devices, chip = plan.devices_of("v5e:2x2", 2)
    assert len(devices) == 8
    mesh = mesh_lib.make_mesh(data=2, fsdp=4, devices=devices)
    assert [{d.slice_index for d in row.ravel()} for row in mesh.devices] == [{0}, {1}], "a slice holds a whole copy"
    with pytest.raises(ValueError, match="mesh.data = 1 must be a multiple of the number of TPU slices, 2"):
        mesh_lib.make_mesh(data=1, fsdp=8, devices=devices)
