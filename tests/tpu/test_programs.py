"""Every program compiles for TPU, within 10 % of the recorded memory, cycles and transfers.

figures.json has them by version of JAX and compiler, number of blocks and program. After a change
that is meant to change them, `scripts/test_tpu --record` writes them anew, and the difference shows
what the change did. All of them are the compiler's estimates; nothing runs.
"""

import pytest

pytest.importorskip("libtpu", reason="libtpu, which has the TPU compiler, is not installed")

from flaxgpt.planning.chips import chip_of
from flaxgpt.planning.collectives import collectives_of
from flaxgpt.planning.operations import loops, operations, step_time
from flaxgpt.planning.program_text import parse
from flaxgpt.planning.tasks import GenerateTask
from flaxgpt.planning.topology import topology_mesh
from tpu.programs import CFG, IS_RECORDING, programs

TOLERANCE = 0.1
SLACK = 2**20  # bytes, for small programs
PROGRAMS = programs()
DECODING = [program for program in PROGRAMS if isinstance(program.task, GenerateTask)]
_compiled = {}


def compiled(program):
    """Return the compiled program and its text, compiled once for all tests."""
    if program.id not in _compiled:
        found = program.compile()
        _compiled[program.id] = found.memory_analysis(), parse(found.as_text())
    return _compiled[program.id]


def read_figures(program):
    memory, parsed = compiled(program)
    chip = chip_of(program.topology)
    found = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    if program.sizes is not None:
        mesh = topology_mesh(program.topology, program.sizes)
        sent = collectives_of(parsed, parsed.entry, mesh)
        found["received_bytes"] = sum(one.received for one in sent)
    if program in DECODING:
        body = loops(parsed)[0].called("body")[0]
        found["step_cycles"] = step_time(operations(parsed, body, chip), chip).cycles
    without = frozenset(loop.name for loop in loops(parsed))
    outside = step_time(operations(parsed, parsed.entry, chip, without), chip).cycles
    return found | {"prefill_cycles" if program in DECODING else "cycles": outside}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.id)
def test_memory_and_cycles_are_those_recorded(program, figures):
    found = read_figures(program)
    if IS_RECORDING:
        figures[program.id] = found
    if figures is None:
        pytest.skip("it compiles, but no figures of this compiler are recorded: run --record")
    assert program.id in figures, "not recorded: run scripts/test_tpu --record"
    for name, value in figures[program.id].items():
        slack = TOLERANCE * value + (SLACK if name.endswith("bytes") else 0)
        assert found[name] == pytest.approx(value, abs=slack), name


@pytest.mark.parametrize("program", DECODING, ids=lambda program: program.id)
def test_a_step_of_decoding_copies_no_cache(program):
    _, parsed = compiled(program)
    body = parsed.computations[loops(parsed)[0].called("body")[0]]
    task = program.task
    cache = 2 * task.batch * (task.prompt_length + task.new_tokens) * CFG.emb_dim  # of keys, bytes
    copies = [
        one.name
        for one in body.instructions
        if one.opcode == "copy" and any(array.size >= cache for array in one.arrays)
    ]
    assert copies == []
