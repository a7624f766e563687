"""Plans for TPU: parsing and cost rules on short program texts; tests/tpu/ compiles programs."""

import dataclasses
import importlib.util
import json
import re
import textwrap

import jax
import jax.experimental.topologies
import pytest

import flaxgpt
from command import assert_refused, call, run
from flaxgpt.cli.plan_tables import print_plan
from flaxgpt.planning import (
    CHIPS,
    Collective,
    HbmUse,
    Plan,
    StepTime,
    largest_batch_plan,
    topology,
    topology_devices,
)
from flaxgpt.planning.largest import batch_at, place_of, search
from flaxgpt.planning.model_parts import part_of
from flaxgpt.planning.operations import loops, operations, skipped_branches, step_time
from flaxgpt.planning.plan import exceeds_hbm
from flaxgpt.planning.program_text import parse, read_arrays
from flaxgpt.planning.traffic import hbm_bytes

V5E = CHIPS["v5e"]
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
without_libtpu = pytest.mark.skipif(
    HAS_LIBTPU, reason="libtpu is installed, and this is about its absence"
)
CFG = flaxgpt.GPTConfig(
    vocab_size=512, context_length=64, emb_dim=128, n_heads=2, n_layers=2, tie_embeddings=True
)


def program(*lines, before="", name="main"):
    """Return a parsed program with an entry of these lines."""
    body = "\n".join(f"  {line}" for line in lines)
    return parse(
        f"HloModule m\n\n{textwrap.dedent(before)}\nENTRY %{name} () -> f32[] {{\n{body}\n}}\n"
    )


def moved(*lines, before=""):
    """Return the HBM traffic of the last line."""
    found = program(*lines, before=before)
    entry = found.computations[found.entry]
    return hbm_bytes(found, entry, entry.instructions[-1])


@pytest.mark.parametrize(
    ("shape", "size", "padded", "in_hbm"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096, 4096, True),
        ("f32[8,100]{1,0:T(8,128)}", 3200, 4096, True),
        ("bf16[4,12,256,64]{3,2,1,0:T(8,128)(2,1)}", 1572864, 3145728, True),
        ("bf16[8,256,768]{2,1,0:T(8,128)(2,1)S(1)}", 3145728, 3145728, False),
        ("f32[100,8]{0,1:T(8,128)}", 3200, 4096, True),
        ("f32[8]{0:T(128)S(6)}", 32, 512, False),
        ("pred[8]{0:T(512)(128)(4,1)}", 8, 512, True),
        ("s32[]{:T(128)}", 4, 512, True),
        ("f32[3,5]{1,0}", 60, 60, True),
        ("f32[7]", 28, 28, True),
    ],
)
def test_arrays_are_padded_to_tiles_and_know_their_memory(shape, size, padded, in_hbm):
    (array,) = read_arrays(shape)
    assert dataclasses.astuple(array) == (size, padded, in_hbm)


def test_a_line_is_an_instruction():
    found = program(
        "%p = (f32[4]{0:T(128)}, /*index=1*/s32[]{:T(128)}) parameter(0)",
        "%x.1 = f32[4]{0:T(128)} get-tuple-element(%p), index=0",
        "ROOT %f = (f32[4]{0}, f32[4]{0}) fusion(%x.1, /*index=1*/%p), kind=kLoop, calls=%g, "
        'metadata={op_name="jit(f)/GPT.states/add"}, backend_config={"estimated_cycles":"1825"}',
    )
    entry = found.computations["main"]
    assert [one.opcode for one in entry.instructions] == [
        "parameter",
        "get-tuple-element",
        "fusion",
    ]
    fusion = entry.root
    assert (fusion.name, fusion.operands, fusion.cycles) == ("f", ("x.1", "p"), 1825)
    assert (fusion.op_name, fusion.called("calls")) == ("jit(f)/GPT.states/add", ["g"])
    assert [user.name for user in entry.users["x.1"]] == ["f"]
    assert list(entry.parameters) == [0]


HBM, VMEM = "f32[8,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)S(1)}"
P, V = f"%p = {HBM} parameter(0)", f"%v = {VMEM} parameter(1)"
SIZE = 4096
TABLE = "%t = f32[1000,128]{1,0:T(8,128)} parameter(2)"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((P, f"%y = {HBM} add(%p, %p)"), 2 * SIZE),  # an operand is read once
        ((P, V, f"%y = {VMEM} add(%p, %v)"), SIZE),
        ((V, f"%y = {VMEM} add(%v, %v)"), 0),
        ((P, f"%y = {HBM} bitcast(%p)"), 0),
        ((P, f"%y = ({VMEM}, {HBM}, u32[]{{:S(2)}}) copy-start(%p)"), SIZE),
        ((V, f"%y = ({HBM}, {VMEM}, u32[]{{:S(2)}}) copy-start(%v)"), SIZE),
        ((TABLE, f"%y = ((f32[1000,128]{{1,0:T(8,128)}}), {VMEM}, s32[]) slice-start(%t)"), SIZE),
        ((f"%s = ({VMEM}, {HBM}, u32[]) parameter(0)", f"%y = {VMEM} copy-done(%s)"), 0),
        ((TABLE, V, f"%y = {VMEM} gather(%t, %v)"), SIZE),
        ((TABLE, f"%y = {HBM} dynamic-slice(%t)"), 2 * SIZE),
        ((TABLE, V, "%y = f32[1000,128]{1,0:T(8,128)} dynamic-update-slice(%t, %v)"), SIZE),
        ((TABLE, P, "%y = f32[1000,128]{1,0:T(8,128)} dynamic-update-slice(%t, %p)"), 2 * SIZE),
        ((P, f'%y = {HBM} custom-call(%p), custom_call_target="ConcatBitcast"'), 0),
        ((P, f'%y = {HBM} custom-call(%p), custom_call_target="tpu_custom_call"'), 2 * SIZE),
        ((P, f"%y = {HBM} all-reduce(%p), channel_id=1"), 2 * SIZE),
    ],
)
def test_traffic_is_what_moves_between_hbm_and_the_core(lines, expected):
    assert moved(*lines) == expected


def test_a_fusion_that_gathers_reads_only_the_rows():
    before = f"""
    %inner (t: f32[1000,128], i: s32[8]) -> f32[8,128] {{
      %t = f32[1000,128]{{1,0:T(8,128)}} parameter(0)
      %i = s32[8]{{0:T(128)S(1)}} parameter(1)
      %b = f32[1000,128]{{1,0:T(8,128)}} bitcast(%t)
      ROOT %g = {HBM} gather(%b, %i), slice_sizes={{1,128}}
    }}
    """
    fusion = f"%y = {VMEM} fusion(%t, %v), kind=kLoop, calls=%inner"
    assert moved(TABLE, V, fusion, before=before) == SIZE


def test_a_fusion_that_updates_in_place_writes_only_the_update():
    before = f"""
    %inner (t: f32[1000,128], u: f32[8,128]) -> f32[1000,128] {{
      %t = f32[1000,128]{{1,0:T(8,128)}} parameter(0)
      %u = {HBM} parameter(1)
      ROOT %d = f32[1000,128]{{1,0:T(8,128)}} dynamic-update-slice(%t, %u)
    }}
    """
    fusion = "%y = f32[1000,128]{1,0:T(8,128)} fusion(%t, %v), kind=kLoop, calls=%inner"
    assert moved(TABLE, V, fusion, before=before) == SIZE


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "jit(decode)/while/body/GPT.states/trf_blocks_3/att/W_query/dot_general",
            ("attention", "W_query/dot_general"),
        ),
        ("jit(decode)/GPT.states/trf_blocks_0/norm1/rsqrt", ("norms", "rsqrt")),
        (
            "jit(decode)/while/body/GPT.logits/tok_emb.project/dot_general",
            ("head", "tok_emb.project/dot_general"),
        ),
        ("jit(decode)/while/body/GPT.states/tok_emb/gather", ("embedding", "gather")),
        ("jit(decode)/while/body/cond/branch_0_fun/reduce", ("sampling", "branch_0_fun/reduce")),
        (
            "jit(train_step)/transpose(jvp(jit(_states)))/GPT.states/trf_blocks_1/ff/layers_2/mul",
            ("feed-forward, backward", "layers_2/mul"),
        ),
        (
            "jit(train_step)/jvp(jit(_states))/GPT.states/trf_blocks_1/add",
            ("residual stream", "add"),
        ),
        ("jit(train_step)/transpose(jvp())/add_any", ("loss, backward", "add_any")),
        ("jit(train_step)/jvp()/btd,vd->btv/dot_general", ("head", "btd,vd->btv/dot_general")),
        ("jit(train_step)/sqrt", ("optimizer", "sqrt")),
        ("", ("other", "other")),
    ],
)
def test_operations_belong_to_parts_of_the_model(path, expected):
    assert part_of(path) == expected


def cost(cycles, path=""):
    return f'metadata={{op_name="{path}"}}, backend_config={{"estimated_cycles":"{cycles}"}}'


def test_an_operation_takes_as_long_as_compute_or_traffic():
    small = "%y = f32[8,128]{1,0:T(8,128)S(1)} add(%v, %v), " + cost(1500, "jit(decode)/a/add")
    large = "%z = f32[8192,1024]{1,0:T(8,128)} exp(%w), " + cost(1500, "jit(decode)/b/exp")
    found = program(V, "%w = f32[8192,1024]{1,0:T(8,128)} parameter(2)", small, large)
    ops = operations(found, "main", V5E)
    assert [(one.name, one.cycles, one.bytes) for one in ops] == [
        ("b/exp", 1500, 2**26),
        ("a/add", 1500, 0),
    ]
    assert ops[1].seconds == pytest.approx(1e-6)
    assert ops[0].seconds == pytest.approx(2**26 / 819e9)
    time = step_time(ops, V5E)
    assert (time.cycles, time.seconds) == (3000, pytest.approx(1e-6 + 2**26 / 819e9))


def test_transfers_take_no_time_until_they_are_all_there_is():
    start = "%s = (f32[8192,1024]{1,0:S(1)}, f32[8192,1024]{1,0}, u32[]) copy-start(%p)"
    done = "%d = f32[8192,1024]{1,0:S(1)} copy-done(%s)"
    use = "%y = f32[8,128]{1,0:S(1)} slice(%d), " + cost(1500, "jit(decode)/GPT.states/x/ff/mul")
    found = program("%p = f32[8192,1024]{1,0} parameter(0)", start, done, use)
    by_name = {one.name: one for one in operations(found, "main", V5E)}
    # A transfer belongs to the part that uses what arrives.
    assert by_name["transfers to the core"].part == "feed-forward"
    assert by_name["transfers to the core"].seconds == 0
    time = step_time(operations(found, "main", V5E), V5E)
    assert time.seconds == time.hbm_seconds == pytest.approx(2**25 / 819e9)


@pytest.mark.parametrize(
    ("chip", "expected"),
    [
        # Three blocks of 512 x 512 in each of 8 x 12 heads, by the schedule of the kernel.
        ("v5e", 8 * 12 * 3 * 2135),
        # Two products of them at the peak, of heads that fill half of the 128 lanes.
        ("v5p", 2 * 2 * 8 * 12 * 1024 * 1024 * 128 * 3 / 4 / 459e12 * 1.75e9),
    ],
)
def test_splash_attention_is_counted_though_the_compiler_states_nothing(chip, expected):
    kernel = (
        "%splash_mha_fwd_residuals.1 = (f32[8,512,128]{2,1,0}, bf16[8,12,1024,64]{3,2,1,0:S(1)}) "
        'custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel={\n'
        '"xprof_metadata":"{\\"block_q\\": 512}"\n'
        '}}, metadata={op_name="jit(train_step)/GPT.states/trf_blocks_0/att/pallas_call"}'
    )
    (found,) = operations(program("%p = f32[] parameter(0)", kernel), "main", CHIPS[chip])
    assert found.cycles == pytest.approx(expected, abs=1)
    assert found.part == "attention"


def test_the_iterations_of_a_scan_are_read_from_its_condition():
    before = f"""
    %body (a: (s32[], f32[])) -> (s32[], f32[]) {{
      %a = (s32[], f32[]) parameter(0)
      ROOT %r = (s32[], f32[]) negate(%a), {cost(10, "jit(decode)/mul")}
    }}
    %condition (a: (s32[], f32[])) -> pred[] {{
      %n = s32[] constant(6)
      %a = (s32[], f32[]) parameter(0)
      %i = s32[] get-tuple-element(%a), index=0
      ROOT %l = pred[] compare(%i, %n), direction=LT
    }}
    """
    lines = [
        "%c = s32[] constant(2)",
        "%d = s32[] copy(%c)",
        "%x = f32[] parameter(0)",
        "%t = (s32[], f32[]) tuple(%d, %x)",
        "%w = (s32[], f32[]) while(%t), condition=%condition, body=%body",
    ]
    found = {one.name: one for one in operations(program(*lines, before=before), "main", V5E)}
    assert (found["mul"].cycles, found["mul"].count) == (40, 4)


def test_loops_and_branches_count_as_often_as_they_run():
    before = f"""
    %cheap (a: f32[]) -> f32[] {{
      %a = f32[] parameter(0)
      ROOT %r = f32[] negate(%a), {cost(10, "jit(decode)/cheap")}
    }}
    %dear (a: f32[]) -> f32[] {{
      %a = f32[] parameter(0)
      ROOT %r = f32[] negate(%a), {cost(99, "jit(decode)/dear")}
    }}
    %body (a: f32[]) -> f32[] {{
      %a = f32[] parameter(0)
      %c = f32[] conditional(%a, %a, %a), branch_computations={{%dear, %cheap}}
      ROOT %r = f32[] exp(%c), {cost(5, "jit(decode)/exp")}
    }}
    """
    loop = "%w = f32[] while(%p), condition=%c, body=%body"
    stated = loop + ', backend_config={"known_trip_count":{"n":"7"}}'
    for line, times in ((loop, 1), (stated, 7)):
        found = program("%p = f32[] parameter(0)", line, before=before)
        cycles = {one.name: one.cycles for one in operations(found, "main", V5E)}
        assert cycles == {"cheap": 10 * times, "exp": 5 * times}
    assert operations(found, "main", V5E, frozenset({"w"})) == ()
    assert skipped_branches(found) == {"dear"}


def test_the_decoding_loop_is_the_one_that_runs_the_model():
    before = f"""
    %other (a: f32[]) -> f32[] {{
      ROOT %r = f32[] negate(%a), {cost(1, "jit(decode)/bisect")}
    }}
    %window (a: f32[]) -> f32[] {{
      ROOT %r = f32[] negate(%a), {cost(900, "jit(decode)/while/body/GPT.states/mul")}
    }}
    %extend (a: f32[]) -> f32[] {{
      ROOT %r = f32[] negate(%a), {cost(10, "jit(decode)/while/body/GPT.states/mul")}
    }}
    """
    lines = [
        f"%{name} = f32[] while(%p), condition=%c, body=%{body}"
        for name, body in (("a", "other"), ("b", "window"), ("c", "extend"))
    ]
    assert [loop.name for loop in loops(program(*lines, before=before))] == ["c", "b"]


def test_batches_are_tried_in_ever_larger_steps():
    sizes = [batch_at(place) for place in range(40)]
    assert sizes[:26] == [*range(1, 17), *range(18, 33, 2), 36, 40]
    assert all(place_of(size) == place for place, size in enumerate(sizes))
    assert place_of(17) == place_of(16)


@pytest.mark.parametrize("largest", [-1, 0, 7, 30, 77])
@pytest.mark.parametrize("guess", [None, 0, 29, 5000])
def test_the_search_finds_the_largest_that_fits_whatever_the_guesses(largest, guess):
    tried = []

    def fits(place):
        tried.append(place)
        return place <= largest

    assert search(fits, lambda tries: guess, start=7) == largest
    assert len(tried) == len(set(tried))


def test_a_good_guess_needs_few_compilations():
    tried = []
    search(lambda place: tried.append(place) or place <= 30, lambda tries: 30, start=7)
    assert tried == [7, 30, 31]


@pytest.mark.parametrize(
    ("room", "per_row", "largest", "most_compiled"),
    [(1000, 10, 100, 5), (1000, 9, 104, 5), (95, 10, 9, 5), (5, 10, 1, 2)],
)
def test_the_largest_batch_is_found_by_few_compilations(
    monkeypatch, room, per_row, largest, most_compiled
):
    """With a compiler that gives each row `per_row` bytes of `room`."""

    def compiled(cfg, task, **options):
        used = per_row * task.batch
        hbm = HbmUse(arguments=0, temporaries=used, limit=room, fits=used <= room)
        return Plan("v5e:1x1", (), task, 0.0, hbm)

    monkeypatch.setattr(flaxgpt.planning.largest, "plan", compiled)
    monkeypatch.setattr(flaxgpt.planning.largest, "topology_mesh", lambda *_: flaxgpt.make_mesh(1))
    tried = []
    found = largest_batch_plan(CFG, flaxgpt.GenerateTask(batch=8), tried=tried.append)
    assert found in tried
    assert found.task.batch == batch_at(place_of(largest))
    assert found.hbm.fits == (per_row <= room)
    assert len(tried) <= most_compiled


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: flaxgpt.GenerateTask(batch=0), "batch=0 must be a whole number"),
        (lambda: flaxgpt.GenerateTask(new_tokens=-1), "new_tokens=-1 must be a whole number"),
        (lambda: flaxgpt.GenerateTask(dtype="int8"), "dtype='int8' must be"),
        (lambda: flaxgpt.GenerateTask(int8="yes"), "int8='yes' must be True or False"),
        (lambda: flaxgpt.TrainTask(length=0), "length=0 must be a whole number"),
        (lambda: flaxgpt.TrainTask(accumulate=0), "accumulate=0 must be a whole number"),
        (lambda: flaxgpt.TrainTask(optimizer="sgd"), "optimizer"),
        (lambda: flaxgpt.TrainTask(drop_rate=1), "drop_rate=1 must be a probability"),
        (lambda: flaxgpt.TrainTask(remat="no"), "remat='no' must be True or False"),
        (lambda: flaxgpt.GenerateTask(dtype="float16"), "'float16' must be float32 or bfloat16"),
        (lambda: flaxgpt.TrainTask(dtype="float16"), "'float16' must be float32 or bfloat16"),
    ],
)
def test_an_invalid_task_is_refused(task, message):
    with pytest.raises(ValueError, match=message):
        task()


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_a_training_step_has_the_dropout_of_the_task_whatever_the_configuration(drop_rate):
    cfg = dataclasses.replace(CFG, drop_rate=0.1, drop_rate_emb=0.2)
    task = flaxgpt.TrainTask(batch=1, drop_rate=drop_rate)
    _, (state, _) = task.program(cfg, flaxgpt.make_mesh(1))
    assert set(state.cfg.drop_rates) == {drop_rate}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:2x2", "unknown TPU 'v5': did you mean"),
        ("v5e", "'v5e' must have 2 dimensions, as in v5e:2x2"),
        ("v5e:8", "must have 2 dimensions"),
        ("v5e:0x1", "must have 2 dimensions"),
        ("v5p:2x2", "'v5p:2x2' must have 3 dimensions, as in v5p:2x2x1"),
        (["v5e:1x1"], r"topology=\['v5e:1x1'\] must be a string"),
        (None, "topology=None must be a string"),
    ],
)
def test_an_unknown_topology_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        topology_devices(name)


@pytest.mark.parametrize("make", [flaxgpt.plan, largest_batch_plan])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg": "gpt2"}, "cfg must be a GPTConfig, got str"),
        ({"task": "generate"}, "task='generate' must be a flaxgpt.GenerateTask"),
        ({"topology": 8}, "topology=8 must be a string"),
        ({"mesh": {"model": 2}}, "unknown mesh axis 'model'"),
        ({"mesh": {"data": "2"}}, "data='2' must be a whole number"),
        ({"mesh": {"fsdp": 0}}, "fsdp=0 must be a whole number"),
        ({"mesh": "fsdp=4"}, "mesh='fsdp=4' must be a dict with the sizes of axes"),
        ({"mesh": 4}, "mesh=4 must be a dict with the sizes of axes"),
    ],
)
def test_invalid_arguments_of_a_plan_are_refused(make, options, message):
    arguments = {"cfg": CFG, "task": flaxgpt.GenerateTask(prompt_length=8, new_tokens=8)}
    with pytest.raises(ValueError, match=message):
        make(**(arguments | options))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((65, 1), "prompt_length=65 exceeds context_length=64, .*: use shorter prompts"),
        ((64, 2), "exceed context_length=64, .*: use new_tokens=1"),
        ((60, 60), "exceed context_length=64, .*: use new_tokens=5"),
    ],
)
def test_generation_beyond_the_context_is_refused_with_sizes_that_fit(sizes, message):
    task = flaxgpt.GenerateTask(prompt_length=sizes[0], new_tokens=sizes[1])
    with pytest.raises(ValueError, match=message):
        task.check(CFG, flaxgpt.make_mesh(1))


@pytest.mark.parametrize(("version", "message"), [("0.0.21.1", "does not start"), ("0.0.23", "")])
def test_a_libtpu_that_crashes_without_a_tpu_is_refused_with_what_to_install(
    monkeypatch, version, message
):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topology.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(topology.glob, "glob", lambda pattern: [])

    def describe(*arguments, **options):
        raise RuntimeError("PJRT_Client_Create is missing\nand more")

    monkeypatch.setattr(jax.experimental.topologies, "get_topology_desc", describe)
    expected = message or r"cannot be used by JAX .* \(PJRT_Client_Create is missing\)"
    install = r".*pip install 'jax\[tpu\]=="
    with pytest.raises(ValueError, match=f"libtpu {version} {expected}{install}"):
        topology_devices("v5p:3x1x1")


@without_libtpu
def test_without_libtpu_an_error_says_what_to_install():
    cfg = flaxgpt.GPTConfig.preset("gpt2")
    with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]==\d+\.\d+\.\d+"):
        flaxgpt.plan(cfg, flaxgpt.GenerateTask())


@without_libtpu
@pytest.mark.slow
def test_without_libtpu_the_command_prints_one_line():
    assert_refused(run("plan", "gpt2"), "pip install 'jax[tpu]==")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v7:2x2"), "unknown TPU 'v7'"),
        (("--task", "train", "--new-tokens", 8), "--new-tokens is for --task generate"),
        (("--remat",), "--remat is for --task train"),
        (("--accumulate", 0), "--accumulate is for --task train"),
        (("--length", 0), "--length is for --task train"),
        (("--drop-rate", 0), "--drop-rate is for --task train"),
        (("--task", "train", "--prompt-length", 0), "--prompt-length is for --task generate"),
        (("--task", "train", "--drop-rate", 1), "drop_rate=1.0 must be a probability"),
        (("--batch", 0), "batch=0 must be a whole number"),
        (("--mesh", "model=2"), "unknown mesh axis 'model'"),
        (("--task", "sample"), "--task"),
    ],
)
def test_invalid_arguments_give_one_line(arguments, message):
    assert_refused(call("plan", "gpt2", *arguments), message)


def printed(capsys, found, **options):
    """Return the rows of two columns that `print_plan` prints, by label, and all of the text."""
    print_plan(found, **options)
    text = capsys.readouterr().out
    rows = [re.split(r" +│ +", line.strip(), maxsplit=1) for line in text.splitlines()]
    return dict(row for row in rows if len(row) == 2), text


def too_large(task, mesh=(("data", 1),), topology="v5e:1x1"):
    hbm = HbmUse(arguments=2**30, temporaries=None, limit=V5E.usable, fits=False)
    return Plan(topology, mesh, task, 1.5, hbm)


def test_a_program_that_does_not_fit_has_no_times(capsys):
    found = too_large(flaxgpt.TrainTask(batch=999))
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["hbm"] == {
        "arguments": 2**30,
        "temporaries": None,
        "limit": V5E.usable,
        "fits": False,
    }
    assert (values["step"], values["tokens_per_s"], values["operations"]) == (None, None, [])
    rows, text = printed(capsys, found)
    assert (rows["fits"], rows["HBM, temporaries"]) == ("no", "unknown")
    assert "estimated" not in text.lower()


TRAIN, GENERATE = flaxgpt.TrainTask, flaxgpt.GenerateTask


@pytest.mark.parametrize(
    ("task", "sizes", "is_largest", "advice"),
    [
        (
            TRAIN(batch=8),
            {},
            False,
            "a smaller --batch, --dtype bfloat16, --remat, --accumulate, --mesh with fsdp or more "
            "chips",
        ),
        (
            TRAIN(batch=8, dtype="bfloat16", remat=True, accumulate=2),
            {"fsdp": 2},
            False,
            "a smaller --batch, a larger --accumulate or more chips",
        ),
        (TRAIN(batch=8, dtype="bfloat16", remat=True), {"fsdp": 8}, False, "more chips"),
        (TRAIN(batch=1, dtype="bfloat16"), {}, True, "--remat, --mesh with fsdp or more chips"),
        (GENERATE(batch=8), {}, False, "a smaller --batch, --dtype bfloat16, --int8 or more chips"),
        (GENERATE(batch=1, dtype="bfloat16"), {}, True, "--int8 or more chips"),
        (GENERATE(batch=1, dtype="bfloat16", int8=True), {}, True, "more chips"),
    ],
)
def test_the_advice_names_what_is_left_to_try(capsys, task, sizes, is_largest, advice):
    found = too_large(task, tuple(sizes.items()), "v5e:2x4")
    rows, text = printed(capsys, found, is_largest=is_largest)
    assert text.endswith(f"To need less memory per chip, use {advice}.\n")
    assert ("Not even the smallest batch fits" in text) == is_largest
    assert ("smallest batch" in rows) == is_largest


@pytest.mark.parametrize(("is_largest", "label"), [(False, "batch"), (True, "largest batch")])
def test_a_program_that_fits_has_times_and_says_how_many_chips_it_uses(capsys, is_largest, label):
    hbm = HbmUse(arguments=2**30, temporaries=2**30, limit=V5E.usable, fits=True)
    time = StepTime(cycles=1_500_000, seconds=2e-3, hbm_seconds=1e-3, transfer_seconds=5e-4)
    sent = (Collective("all-reduce", ("data",), 3, 3, 2**20, 2**20),)
    found = Plan(
        *("v5e:2x4", (("data", 2), ("fsdp", 1)), GENERATE(batch=8), 1.5, hbm, time, time),
        **{"tokens_per_s": 4000.0, "mfu": 0.1, "bandwidth_share": 0.5, "collectives": sent},
    )
    rows, text = printed(capsys, found, is_largest=is_largest)
    assert rows[label] == "8"
    assert rows["fits"] == "yes"
    assert rows["chips used"] == "2 of 8"
    assert rows["estimated step"] == "2.00 ms"
    assert rows["estimated transfer between chips"] == "at least 500.0 µs, beside the step"
    assert "collectives of a step" in text and "collectives of a prefill" not in text
    assert "The time that data takes between chips is not included" in text
    everything = dataclasses.replace(found, topology="v5e:1x2")
    assert "chips used" not in printed(capsys, everything)[0]


def test_the_transfer_between_chips_takes_as_long_as_the_links_are_busy():
    time = step_time((), V5E, received=4 * 10**9)
    assert (time.transfer_seconds, time.seconds) == (0.02, 0.0)


def test_the_search_for_the_largest_batch_reports_each_on_standard_error(monkeypatch):
    def compiled(cfg, task, **options):
        used = task.batch * 2**30
        hbm = HbmUse(arguments=0, temporaries=used, limit=V5E.usable, fits=used <= V5E.usable)
        return Plan("v5e:1x1", (), task, 2.0, hbm)

    monkeypatch.setattr(flaxgpt.planning.largest, "plan", compiled)
    monkeypatch.setattr(flaxgpt.planning.largest, "topology_mesh", lambda *_: flaxgpt.make_mesh(1))
    process = call("plan", "gpt2", "--largest-batch", "--json")
    assert json.loads(process.stdout)["settings"]["batch"] == 15
    assert process.stderr.decode().splitlines() == [
        "batch 8: fits, 8.0 of 15.75 GiB",
        "batch 15: fits, 15.0 of 15.75 GiB",
        "batch 16: does not fit, 16.0 of 15.75 GiB",
        "3 batches compiled in 6.0 s",
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (36.74G)", True),
        ("Ran out of memory in memory space hbm. Used 20.0G of 15.75G hbm.", True),
        ("E1000: CompileTimeHbmOom: Program hbm requirement 20.0G", True),
        ("Ran out of memory in memory space vmem. Used 20.0M of 16.0M", False),
        ("E1001: CompileTimeScopedVmemOom: scoped allocation", False),
        ("Allocation (size=268435456) would exceed memory :: #2 [space=vmem, scoped]", False),
    ],
)
def test_only_hbm_that_does_not_suffice_is_reported_as_not_fitting(message, expected):
    assert exceeds_hbm(f"RESOURCE_EXHAUSTED: {message}") == expected
    assert not exceeds_hbm(f"INTERNAL: {message}")
