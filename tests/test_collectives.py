"""Collectives read from the text of compiled programs; tests/devices/ compiles some."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from flaxgpt.planning import Collective, collectives
from flaxgpt.planning.collectives import _groups, collectives_of
from flaxgpt.planning.program_text import parse

MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))


def program(*lines, before=""):
    """Return a program with an entry of these lines."""
    body = "\n".join(f"  %x.{i} = {line}" for i, line in enumerate(lines))
    entry = f"ENTRY %main () -> f32[] {{\n{body}\n}}\n"
    return f"HloModule m, entry_computation_layout={{()}}\n{before}\n{entry}"


def read(*lines, before=""):
    return list(collectives(program(*lines, before=before), MESH))


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp", "tensor")),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data", "fsdp")),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", ("fsdp",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ("data", "tensor")),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2] {'c'}", ("tensor",)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ("fsdp",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",)),
        (
            "replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}",
            ("fsdp",),
        ),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", ("tensor",)),
    ],
)
def test_groups_of_devices_are_named_after_axes(groups, axes):
    line = f"f32[8]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add"
    (found,) = read(line)
    assert found.axes == axes


def test_the_three_forms_of_groups_have_the_same_meaning():
    forms = (
        "replica_groups={{0,2},{1,3},{4,6},{5,7}}",
        "replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}",
        "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, dimensions={0}",
    )
    assert len({str(sorted(_groups(form, MESH))) for form in forms}) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f32[8,4]{1,0} all-reduce(%p)", ("all-reduce", 1, 128, 2 * 96)),
        ("f32[8,4]{1,0} all-gather(%p)", ("all-gather", 1, 128, 96)),
        ("bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%p)", ("all-gather", 1, 64, 48)),
        ("f32[8,4]{1,0} reduce-scatter(%p)", ("reduce-scatter", 1, 128, 3 * 128)),
        ("f32[8,4]{1,0} all-to-all(%p)", ("all-to-all", 1, 128, 96)),
        ("f32[8,4]{1,0} collective-broadcast(%p)", ("collective-broadcast", 1, 128, 128)),
        (
            "(f32[4]{0}, pred[4]{0}, /*index=2*/f32[]) all-reduce(%p, %q, %r)",
            ("all-reduce", 3, 24, 36),
        ),
        ("f32[4]{0} all-reduce-start(%p)", ("all-reduce", 1, 16, 24)),
        ("(f32[4]{0}, f32[16]{0}) all-gather-start(%p)", ("all-gather", 1, 64, 48)),
        (
            "((f32[4]{0}, s8[4]{0}), (f32[16]{0}, s8[16]{0})) all-gather-start(%p, %q)",
            ("all-gather", 2, 80, 60),
        ),
        (
            "((f32[16]{0}), f32[4]{0}, u32[]) reduce-scatter-start(%p)",
            ("reduce-scatter", 1, 16, 48),
        ),
    ],
)
def test_bytes_are_those_of_the_results_and_of_a_ring(line, expected):
    (found,) = read(f"{line}, channel_id=1, replica_groups=[2,4]<=[8]")
    assert (found.kind, found.arrays, found.bytes, found.received) == expected
    assert found.operations == 1


def test_a_permutation_names_the_axes_that_it_crosses():
    pairs = "source_target_pairs={{0,4},{4,0},{1,5},{5,1}}"
    (found,) = read(f"(f32[4], f32[4], u32[], u32[]) collective-permute-start(%p), {pairs}")
    assert found == Collective("collective-permute", ("data",), 1, 1, 16, 16)


@pytest.mark.parametrize(
    "line",
    [
        "f32[4]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}",
        "f32[4]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
        "f32[4]{0} all-reduce-done(%p)",
        'f32[4]{0} add(%all-reduce.1, %p), metadata={op_name="all-reduce(x)"}',
    ],
)
def test_what_moves_nothing_is_left_out(line):
    assert read(line) == []


def test_operations_in_a_loop_count_once_per_iteration():
    line = "f32[8]{0} all-reduce(%p), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add"
    before = f"%inner (p: f32[8]) -> f32[8] {{\n  ROOT %y = {line}\n}}\n\n"
    before += "%outer (p: f32[8]) -> f32[8] {\n  ROOT %z = f32[8]{0} fusion(%p), calls=%inner\n}\n"
    loop = "f32[8]{0} while(%p), condition=%c, body=%outer"
    stated = loop + ', backend_config={"known_trip_count":{"n":"5"}}'
    assert [item.operations for item in read(stated, before=before)] == [5]
    assert [item.operations for item in read(stated, line, loop, before=before)] == [7]
    branches = "f32[8]{0} conditional(%p, %q, %q), branch_computations={%outer, %inner}"
    (found,) = read(branches, before=before)
    assert (found.operations, found.bytes) == (2, 64)


def test_the_collectives_of_a_part_leave_out_loops_and_branches():
    line = "f32[8]{0} all-reduce(%p), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add"
    before = f"%body (p: f32[8]) -> f32[8] {{\n  ROOT %y = {line}\n}}\n\n"
    before += f"%branch (p: f32[8]) -> f32[8] {{\n  ROOT %z = {line}\n}}\n\n"
    loop = "f32[8]{0} while(%p), condition=%c, body=%body"
    either = "f32[8]{0} conditional(%p, %q, %q), branch_computations={%other, %branch}"
    found = parse(program(line, loop, either, before=before))

    def count(computation, *without):
        return sum(
            one.operations for one in collectives_of(found, computation, MESH, frozenset(without))
        )

    assert (count("main"), count("body")) == (3, 1)
    assert (count("main", "x.1"), count("main", "x.1", "branch")) == (2, 1)


def test_the_fusions_of_tpu_are_understood():
    gather = 'channel_id=8, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="3"}'
    gather = f"bf16[384,768]{{1,0:T(8,128)(2,1)S(1)}} all-gather(%p), {gather}"
    scatter = "f32[8,4]{1,0:T(8,128)} all-reduce(%input), channel_id=9, replica_groups=[4,2]<=[8]"
    before = f"%all-reduce-scatter.2 (input: f32[8,4]) -> f32[4,4] {{\n  %y = {scatter}\n}}\n"
    call = "f32[4,4]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2"
    assert read(gather, gather, call, before=before) == [
        Collective("all-gather", ("tensor",), 1, 1, 2 * 384 * 768, 384 * 768),
        Collective("reduce-scatter", ("tensor",), 1, 1, 64, 64),
    ]


def test_collectives_are_summed_by_kind_and_axes_and_sorted():
    lines = [
        "f32[4]{0} all-reduce(%p), replica_groups=[4,2]<=[8]",
        "f32[8]{0} all-reduce(%p), replica_groups=[4,2]<=[8]",
        "f32[999]{0} all-reduce(%p), replica_groups=[4,2]<=[2,4]T(1,0)",
    ]
    assert read(*lines) == [
        Collective("all-reduce", ("data",), 1, 1, 3996, 3996),
        Collective("all-reduce", ("tensor",), 2, 2, 48, 48),
    ]


def test_a_program_for_one_device_has_none():
    compiled = jax.jit(lambda x: x @ x.T).lower(np.ones((4, 4), np.float32)).compile()
    assert collectives(compiled.as_text(), MESH) == ()
