"""What benchmarks/compiled.py reads from the text of compiled programs, counted by hand."""

import importlib.util
import json
import pathlib
import sys

import pytest

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "compiled.py"

PROGRAM = """
%moved (p: bf16[8,16]) -> bf16[16,8] {
  %p = bf16[8,16]{1,0} parameter(0)
  %c = bf16[8,16]{0,1} copy(%p)
  ROOT %t = bf16[16,8]{1,0} bitcast(%c)
}

%multiplied (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %c = bf16[8,16]{0,1} copy(%p)
  ROOT %m = bf16[8,16]{0,1} multiply(%c, %c)
}

%async_computation (p: f32[2,32]) -> f32[8,32] {
  %p = f32[2,32]{1,0} parameter(0)
  ROOT %g = f32[8,32]{1,0} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}
}

%body (p: (u32[], f32[2,32])) -> (u32[], f32[2,32]) {
  %p = (u32[], f32[2,32]{1,0}) parameter(0)
  %one = u32[] constant(1)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[2,32]{1,0} get-tuple-element(%p), index=1
  %f = bf16[16,8]{1,0} fusion(%y), kind=kLoop, calls=%moved, config={"estimated_cycles":"10"}
  %h = bf16[8,16]{0,1} fusion(%y), kind=kLoop, calls=%multiplied, config={"estimated_cycles":"5"}
  %k = f32[8]{0} copy(%z), config={"estimated_cycles":"7"}
  %s = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%k)
  %a = ((f32[2,32]), f32[8,32]) fusion-start.1(%x)
  %async-collective-start.1 = (f32[8,32], u32[]) fusion(%x), calls=%async_computation
  %n = f32[4]{0} all-reduce(%k), replica_groups=[1,4]<=[4], to_apply=%add
  %next = u32[] add(%i, %one)
  ROOT %t = (u32[], f32[2,32]{1,0}) tuple(%next, %x)
}

%condition (p: (u32[], f32[2,32])) -> pred[] {
  %p = (u32[], f32[2,32]{1,0}) parameter(0)
  %last = u32[] constant(3)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %last), direction=LT
}

ENTRY %main (a: (u32[], f32[2,32])) -> (u32[], f32[2,32]) {
  %b = (f32[32], f32[32]) all-gather-start(%q), replica_groups=[1,4]<=[4], c={"is_sync":true}
  %d = f32[32] all-gather-done(%b)
  ROOT %w = (u32[], f32[2,32]{1,0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("compiled_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_counts_multiply_loops_and_leave_out_what_is_fused(benchmark):
    counts = benchmark.count(PROGRAM, 4, 32)
    # three trips: all-reduce of 16 bytes to 2 * 3/4 of them, all-gather of 1024 to 3/4; and one
    # all-gather of 128 bytes that XLA has made synchronous
    assert counts.received == {"all-reduce": 3 * 24, "all-gather": 3 * 768 + 96}
    assert counts.synchronous == (3 + 1, 3 * 24 + 96)
    # both all-gathers have 32 as an extent
    assert counts.tables == (3 + 1, 3 * 768 + 96)
    # %f and %k: the copy of %h is part of a product, %s moves %k to another memory as it is
    assert counts.copies == 3 * (16 * 8 * 2 + 8 * 4)
    assert counts.cycles == 3 * (10 + 5 + 7)


def test_the_table_compares_members_with_as_many_steps_of_maxtext(benchmark):
    row = benchmark.ROWS[0]
    one = benchmark.Result(2**30, benchmark.count(PROGRAM, 4, 32))
    counts = one.counts._replace(copies=3 * one.counts.copies, cycles=8 * one.counts.cycles)
    four = benchmark.Result(2**29, counts)
    lines = benchmark.table({(row, "MaxText"): one, (row, "four members"): four}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| 7B v5p:4x4x2: MaxText",
        "| 7B v5p:4x4x2: four members",
        "| ratio to 4 x MaxText",
    ]
    # temporaries 1/2; received bytes 1/4; copies 3/4; cycles 8/4
    assert lines[-1] == "| ratio to 4 x MaxText | 0.50 | 0.25 |  |  |  | 0.75 | 2.00 |"


def test_a_program_is_compiled_again_where_its_code_differs(benchmark, tmp_path, monkeypatch):
    row = benchmark.ROWS[0]
    path = benchmark.path_of(tmp_path, row, "one member")
    path.write_text(json.dumps({"of": benchmark.identity(row, "one member")}))
    assert benchmark.is_complete(path, row, "one member")
    assert not benchmark.is_complete(path, row, "four members")
    monkeypatch.setattr(benchmark, "LENGTH", 512)
    assert not benchmark.is_complete(path, row, "one member")
