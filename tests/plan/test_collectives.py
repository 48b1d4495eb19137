"""Collectives read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.plan.collectives import read_collectives


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "%a = f32[8,4]{1,0} all-reduce(f32[8,4] %x), replica_groups={{0,1},{2,3},{4,5},{6,7}}",
            ("all-reduce", ("tensor",), 128),
        ),
        (
            "%a = bf16[3]{0} all-gather(bf16[1] %x), replica_groups=[4,2]<=[2,2,2]T(0,2,1)",
            ("all-gather", ("fsdp",), 3),
        ),
        (
            "%a = f32[] all-reduce(f32[] %x), replica_groups=[1,8]<=[8]",
            ("all-reduce", ("order", "fsdp", "tensor"), 7),
        ),
        (
            "%a = f32[2] all-gather(%x), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, dims={0}",
            ("all-gather", ("fsdp",), 4),
        ),
        (
            "%a = f32[2] all-gather(%x), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c','a'}",
            ("all-gather", ("order", "tensor"), 6),
        ),
        (
            "%a = f32[2] all-gather(%x), replica_groups=mesh['a'=8] {'a':(2)2}, dimensions={0}",
            ("all-gather", ("fsdp",), 4),
        ),
        (
            "%a = f32[] all-reduce(f32[] %x), replica_groups={}, to_apply=%add",
            ("all-reduce", ("order", "fsdp", "tensor"), 7),
        ),
        (
            "%a = s8[6]{0} collective-permute(s8[6] %x), source_target_pairs={{0,4},{4,0}}",
            ("collective-permute", ("order",), 6),
        ),
        (
            "%a = (f32[2]{0}, pred[3]{0}) all-to-all(%x, %y), replica_groups=[4,2]<=[8]",
            ("all-to-all", ("tensor",), 5.5),
        ),
        (
            "%a = (f32[1]{0}, f32[2]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8]",
            ("all-gather", ("tensor",), 4),
        ),
        (
            "%a = f32[2] reduce-scatter(f32[4] %x), replica_groups=[4,2]<=[8], to_apply=%add",
            ("reduce-scatter", ("tensor",), 8),
        ),
        (
            "%a = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%x),"
            " source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", ("tensor",), 12),
        ),
        # the forms in which XLA writes what begins, from its own tests and from compiled programs:
        # operands, results, and numbers. Operands are not received.
        (
            "%a = ((f32[20]{0}), f32[10]{0}) reduce-scatter-start(%x), replica_groups=[4,2]<=[8],"
            " dimensions={0}, to_apply=%add",
            ("reduce-scatter", ("tensor",), 40),
        ),
        (
            "%a = ((f32[16,64]{1,0:T(8,128)}, /*index=1*/bf16[16]{0}), (f32[2,64]{1,0:T(8,128)},"
            " bf16[2]{0})) reduce-scatter-start(%x, %y), replica_groups=[1,8]<=[8]",
            ("reduce-scatter", ("order", "fsdp", "tensor"), 7 * (512 + 4)),
        ),
        (
            "%a = ((f32[1]{0}, bf16[4]{0}), (f32[2]{0}, bf16[8]{0})) all-gather-start(%x, %y),"
            " replica_groups=[4,2]<=[8], dimensions={0}",
            ("all-gather", ("tensor",), (8 + 16) / 2),
        ),
        (
            "%a = ((f32[8]{0}), f32[8]{0}) all-to-all-start(%x), replica_groups=[4,2]<=[8]",
            ("all-to-all", ("tensor",), 16),
        ),
        (
            "%a = (f32[8]{0}, f32[2]{0}) all-reduce-start(%x, %y), replica_groups=[4,2]<=[8]",
            ("all-reduce", ("tensor",), 40),
        ),
        (
            "%a = ((f32[8]{0}), f32[8]{0}, u32[]) all-reduce-start(%x), replica_groups=[4,2]<=[8]",
            ("all-reduce", ("tensor",), 32),
        ),
        (
            "%a = ((f32[3]{0}, s8[2]{0}), (f32[3]{0}, s8[2]{0}), u32[], u32[])"
            " collective-permute-start(%x, %y), source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", ("tensor",), 14),
        ),
        (
            "%a = f8e4m3fn[16]{0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}",
            ("all-gather", ("tensor",), 8),
        ),
        (
            "%a = s4[16]{0} ragged-all-to-all(%x, %y), replica_groups=[4,2]<=[8]",
            ("ragged-all-to-all", ("tensor",), 4),
        ),
    ],
)
def test_received_bytes_by_kind_and_axes(line, expected):
    kind, axes, size = expected
    assert read_collectives(f"  {line}", make_mesh(2, 2, 2)) == {(kind, axes): (1, size)}


def test_other_lines_are_no_read_collectives():
    text = (
        "%all-reduce.1 = f32[2] get-tuple-element(%x), index=0\n"
        "%b = f32[2] all-gather-done(%a)\n"
        "%c = f32[2] add(%all-reduce.1, %b)"
    )
    assert read_collectives(text, make_mesh(2, 2, 2)) == {}


SCATTERED = """
%all-reduce-scatter.3 (p: bf16[32,64]) -> bf16[16,64] {
  %p = bf16[32,64]{1,0} parameter(0)
  %r = bf16[32,64]{1,0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %s = bf16[16,64]{1,0} dynamic-slice(%r, %i, %zero), dynamic_slice_sizes={16,64}
}

ENTRY %main (x: bf16[32,64]) -> bf16[16,64] {
  %x = bf16[32,64]{1,0} parameter(0)
  ROOT %f = bf16[16,64]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_a_fusion_that_reduces_and_scatters_is_no_all_reduce():
    """A TPU receives the other half of its slice, as in a reduce-scatter of the result."""
    collectives = read_collectives(SCATTERED, make_mesh(2, 2, 2))
    assert collectives == {("reduce-scatter", ("tensor",)): (1, 16 * 64 * 2)}


ASYNC = """
%begun (x: f32[8]) -> f32[4] {
  %x = f32[8]{0} parameter(0)
  ROOT %r = f32[4]{0} reduce-scatter(%x), replica_groups=[4,2]<=[8], to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[4] {
  %x = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[4]{0}, u32[]) async-start(%x), calls=%begun
  %update = ((f32[8]{0}), f32[4]{0}, u32[]) async-update(%start), calls=%begun
  ROOT %done = f32[4]{0} async-done(%update), calls=%begun
}
"""


def test_what_begins_and_ends_elsewhere_counts_once():
    collectives = read_collectives(ASYNC, make_mesh(2, 2, 2))
    assert collectives == {("reduce-scatter", ("tensor",)): (1, 16)}


LOOP = """
%body (p: (u32[], f32[2])) -> (u32[], f32[2]) {
  %p = (u32[], f32[2]{0}) parameter(0)
  %two = u32[] constant(STRIDE)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[2]{0} get-tuple-element(%p), index=1
  %next = u32[] add(%i, %two)
  %r = f32[2]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %t = (u32[], /*index=1*/f32[2]{0}) tuple(%next, /*index=1*/%r)
}

%condition (p: (u32[], f32[2])) -> pred[] {
  %p = (u32[], f32[2]{0}) parameter(0)
  %last = u32[] constant(6)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, COMPARED), direction=LT
}

%short (x: f32[2]) -> f32[2] {
  ROOT %r = f32[2]{0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
}

%long (x: f32[2]) -> f32[2] {
  ROOT %r = f32[2]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (a: (u32[], f32[2])) -> (u32[], f32[2]) {
  %c = f32[2] conditional(%which, %x, %x), branch_computations={%short, %long}
  ROOT %w = (u32[], f32[2]{0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("stride", "compared", "rounds"),
    [("1", "%last", 6), ("2", "%last", 3), ("4", "%last", 2), ("1", "%n", 9)],
)
def test_loops_count_per_iteration_and_conditionals_by_their_last_branch(stride, compared, rounds):
    collectives = read_collectives(
        LOOP.replace("STRIDE", stride).replace("COMPARED", compared), make_mesh(2, 2, 2), rounds=9
    )
    assert collectives == {
        ("all-reduce", ("tensor",)): (rounds, rounds * 8),
        ("collective-permute", ("tensor",)): (1, 8),
    }


def test_a_loop_of_a_program_that_xla_compiled():
    mesh = make_mesh(1, 8)

    def program(x_LIO, y_RI):
        return jax.lax.scan(lambda y, weights_IO: (jnp.tanh(y @ weights_IO), None), y_RI, x_LIO)[0]

    rows, weights = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P(None, None, "fsdp"))
    shapes = (
        jax.ShapeDtypeStruct((5, 64, 64), jnp.float32),
        jax.ShapeDtypeStruct((1024, 64), jnp.float32),
    )
    text = (
        jax.jit(program, in_shardings=(weights, rows), out_shardings=rows)
        .lower(*shapes)
        .compile()
        .as_text()
    )
    ((kind, axes), (count, size)) = next(iter(read_collectives(text, mesh).items()))
    assert (kind, axes, count, size) == ("all-gather", ("fsdp",), 5, 5 * 64 * 64 * 4 * 7 / 8)
