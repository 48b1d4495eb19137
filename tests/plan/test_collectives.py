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
