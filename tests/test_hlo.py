"""Reading compiled programs: collectives and products against what the program is known to do."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flowjax.models import flops
from flowjax.train import hlo
from flowjax.train import mesh as mesh_lib


def compiled(fn, *shapes):
    return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_sizes_of_shapes():
    assert hlo.size("bf16[2,3]{1,0:T(8,128)}") == 12 and hlo.size("(f32[4]{0}, s32[], pred[3])") == 23
    assert hlo.size("token[]") == 0 and hlo.dims("f32[5,7]{1,0}") == [5, 7] and hlo.dims("f32[]") == []


def test_loops_count_as_often_as_they_turn():
    def nested(x):
        inner = lambda c, _: (jnp.sin(c @ c), None)  # noqa: E731
        outer = lambda c, _: (jax.lax.scan(inner, c, length=3)[0] @ c, None)  # noqa: E731
        return jax.lax.scan(outer, x, length=5)[0] @ x

    one = 2 * 8**3
    assert hlo.flops(compiled(nested, (8, 8))) == (5 * (3 + 1) + 1) * one


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), ((3, 5, 7), (3, 7, 2))),
        (functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")), ((2, 9, 8, 3), (3, 2, 3, 4))),
        (functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 3), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")), ((2, 9, 8, 3), (3, 2, 3, 4))),
        (functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3), ((2, 9, 8, 3), (3, 2, 1, 6))),
    ],
)  # fmt: skip
def test_products_agree_with_the_count_of_the_jaxpr(fn, shapes):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    assert hlo.flops(compiled(fn, *shapes)) == flops.count(fn, *arguments) > 0


def test_padding_and_dilation_are_no_work():
    """A convolution that only ever meets zeros but for one product an output: as TPUs write batched matrix products."""
    text = """
ENTRY %main (a: f32[4,2,3], b: f32[4,3,5]) -> f32[4,2,5] {
  %a = f32[4,2,3]{2,1,0} parameter(0)
  %b = f32[4,3,5]{2,1,0} parameter(1)
  ROOT %c = f32[4,2,5]{2,1,0} convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo.flops(text) == 2 * 4 * 2 * 5 * 3


def on_mesh(fn, in_spec, out_spec, shape=(16, 8), **sizes):
    mesh = mesh_lib.make_mesh(**sizes)
    jitted = jax.jit(fn, in_shardings=NamedSharding(mesh, in_spec), out_shardings=NamedSharding(mesh, out_spec))
    text = jitted.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()
    return hlo.collectives(text, 8)


def test_collectives_of_known_programs():
    whole = 16 * 8 * 4
    (gather,) = on_mesh(lambda x: 2 * x, P("data"), P())
    assert (gather.kind, gather.bytes, gather.group, gather.turns) == ("all-gather", whole, 8, 1)
    assert gather.sent == whole * 7 / 8  # a device passes on all shards but one
    (reduce,) = on_mesh(lambda x: x.sum(0), P("data"), P())
    assert (reduce.kind, reduce.bytes, reduce.group) == ("all-reduce", 8 * 4, 8)
    assert reduce.sent == 2 * 8 * 4 * 7 / 8  # reduce-scatter, then all-gather
    (part,) = on_mesh(lambda x: 2 * x, P("fsdp"), P(), data=2, fsdp=4)
    assert (part.kind, part.bytes, part.group) == ("all-gather", whole, 4)
    assert part.members == (0, 1, 2, 3)
    (part,) = on_mesh(lambda x: 2 * x, P("data"), P(), data=2, fsdp=4)
    assert part.members == (0, 4), "the first group along data"
    assert on_mesh(lambda x: 2 * x, P("data"), P("data")) == []


def test_collectives_in_loops_count_as_often_as_they_turn():
    def spin(x):
        shift = lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])  # noqa: E731
        return jax.lax.scan(lambda c, _: (shift(c), None), x, length=5)[0]

    mesh = mesh_lib.make_mesh()
    fn = jax.jit(jax.shard_map(spin, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    (hop,) = hlo.collectives(fn.lower(jax.ShapeDtypeStruct((16, 8), jnp.float32)).compile().as_text(), 8)
    assert (hop.kind, hop.turns, hop.bytes, hop.sent) == ("collective-permute", 5, 2 * 8 * 4, 5 * 2 * 8 * 4)


@pytest.mark.parametrize(
    ("written", "members"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", (0, 2)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", (0, 2, 4, 6)),
        ("replica_groups={}, to_apply=%add", tuple(range(8))),
    ],
)
def test_who_takes_part(written, members):
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %r = f32[8]{{0}} all-reduce(%x), {written}\n}}\n"
    (found,) = hlo.collectives(text, 8)
    assert found.members == members and found.group == len(members)


TPU = """
%all-reduce-scatter.1 (input: bf16[1152,64]) -> bf16[72,64] {
  %input = bf16[1152,64]{1,0} parameter(0)
  %all-reduce.7 = bf16[1152,64]{1,0} all-reduce(%input), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice = bf16[72,64]{1,0} dynamic-slice(%all-reduce.7, %i), dynamic_slice_sizes={72,64}
}
%body (p: (s32[], bf16[72,64])) -> (s32[], bf16[72,64]) {
  %p = (s32[], bf16[72,64]{1,0}) parameter(0)
  %f1 = bf16[72,64]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %ag.1 = bf16[64,64]{1,0} all-gather(%f1), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
  %ag.2 = bf16[64,64]{1,0} all-gather(%f1), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
  %f2 = bf16[72,64]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], /*index=1*/bf16[72,64]{1,0}) tuple(%p, %f1)
}
%cond (p: (s32[], bf16[72,64])) -> pred[] {
  %p = (s32[], bf16[72,64]{1,0}) parameter(0)
  %c = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%p, %c), direction=LT
}
ENTRY %main (x: bf16[72,64]) -> bf16[72,64] {
  %x = bf16[72,64]{1,0} parameter(0)
  ROOT %w = (s32[], bf16[72,64]{1,0}) while(%x), condition=%cond, body=%body
}
"""


def test_the_dialect_of_tpus():
    """An all-reduce of which each device keeps a part is a reduce-scatter; one channel is one exchange; a loop's end is in its condition."""
    scatter, gather = sorted(hlo.collectives(TPU, 8), key=lambda c: c.kind, reverse=True)
    assert (scatter.kind, scatter.bytes, scatter.group, scatter.turns) == ("reduce-scatter", 1152 * 64 * 2, 4, 28)
    assert (gather.kind, gather.bytes, gather.group, gather.turns) == ("all-gather", 64 * 64 * 2, 4, 28)
    assert scatter.sent == 28 * 1152 * 64 * 2 * 3 / 4


def test_an_unrolled_loop_turns_less_often_than_its_bound():
    """The compiler unrolls loops twice and leaves the bound: the counter moves by two."""
    counter = """
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %i1 = s32[] add(%i, %one)
  %i1c = s32[] copy(%i1)
  %i2a = s32[] add(%i1c, %one)
  %i2 = s32[] copy(%i2a)
"""
    body, cond = "%p = (s32[], bf16[72,64]{1,0}) parameter(0)\n", "%c = s32[]{:T(128)} constant(28)"
    head, tail = TPU.split("%cond (p")
    text = head.replace(body, body + counter, 1).replace("tuple(%p, %f1)", "tuple(%i2, %f1)") + "%cond (p" + tail
    text = text.replace(cond, cond + "\n  %i = s32[] get-tuple-element(%p), index=0").replace("compare(%p, %c)", "compare(%i, %c)")
    assert {c.turns for c in hlo.collectives(text, 8)} == {14}


def test_an_exchange_that_is_made_in_pieces_beside_an_inner_loop_is_one():
    """The compiler hides an all-gather behind the turns of a loop: its copies in that loop are not more of them."""
    inner = """%inner (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %ag.3 = bf16[64,64]{1,0} all-gather(%x), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
  ROOT %t = (s32[]) tuple(%p)
}
%inner_cond (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %c = s32[] constant(4)
  ROOT %lt = pred[] compare(%p, %c), direction=LT
}
"""
    text = inner + TPU.replace("  %f2 =", "  %w4 = (s32[]) while(%p), condition=%inner_cond, body=%inner\n  %f2 =")
    assert [c.turns for c in hlo.collectives(text, 8) if c.kind == "all-gather"] == [28]
