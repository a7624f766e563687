"""`flaxgpt.plan` with the TPU compiler, of small models."""

import dataclasses
import json

import jax
import pytest

pytest.importorskip("libtpu", reason="libtpu, which has the TPU compiler, is not installed")

import flaxgpt
from command import call
from flaxgpt.cli.plan_tables import print_plan
from flaxgpt.planning import CHIPS

V5E = CHIPS["v5e"]
CFG = flaxgpt.GPTConfig(
    vocab_size=512, context_length=64, emb_dim=128, n_heads=2, n_layers=2, tie_embeddings=True
)
PARTS = ("cycles", "seconds", "hbm_seconds", "transfer_seconds")


def test_generation_is_planned_without_a_tpu():
    devices = jax.devices()
    task = flaxgpt.GenerateTask(batch=2, prompt_length=16, new_tokens=16, dtype="bfloat16")
    found = flaxgpt.plan(CFG, task, topology="v5e:1x1")
    assert jax.devices() == devices
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(values) == {
        *("topology", "mesh", "task", "settings", "compile_s", "hbm", "step", "prefill"),
        *("tokens_per_s", "mfu", "bandwidth_share", "collectives", "prefill_collectives"),
        "operations",
    }
    assert (values["task"], values["settings"]["new_tokens"]) == ("generate", 16)
    assert values["hbm"]["fits"] and values["hbm"]["limit"] == V5E.usable
    # Matrices in bfloat16, and the rest.
    assert 2 * flaxgpt.count_params(CFG).total < values["hbm"]["arguments"] < 2**20
    assert set(values["step"]) == set(values["prefill"]) == set(PARTS)
    assert values["step"]["transfer_seconds"] == 0
    assert values["tokens_per_s"] == pytest.approx(2 / values["step"]["seconds"])
    assert values["step"]["seconds"] >= values["step"]["cycles"] / V5E.clock
    assert 0 < values["mfu"] < 1 and 0 < values["bandwidth_share"] <= 1
    assert len(values["operations"]) == 10
    assert {"attention", "feed-forward", "norms", "head", "sampling"} <= {
        one.part for one in found.operations
    }


def test_a_training_step_is_planned_for_several_chips(capsys):
    task = flaxgpt.TrainTask(batch=4, length=32, dtype="bfloat16")
    found = flaxgpt.plan(CFG, task, topology="v5e:2x2", mesh={"fsdp": 4})
    assert {"prefill", "prefill_collectives"}.isdisjoint(found.to_dict())
    received = sum(one.received for one in found.collectives)
    assert found.step.transfer_seconds == received / V5E.link_bandwidth > 0
    assert found.tokens_per_s == pytest.approx(4 * 32 / found.step.seconds)
    assert {"attention, backward", "loss", "optimizer"} <= {one.part for one in found.operations}
    assert {one.axes for one in found.collectives} == {("fsdp",)}
    # A quarter of weights and optimizer state, unless padded.
    assert found.hbm.arguments < 2 * 3 * 4 * flaxgpt.count_params(CFG).total / 4
    print_plan(found)
    text = capsys.readouterr().out
    assert "train on v5e:2x2, fsdp=4, bfloat16" in text
    assert "Estimated, not measured" in text


def test_generation_is_planned_for_several_chips():
    task = flaxgpt.GenerateTask(batch=3, prompt_length=16, new_tokens=16)
    found = flaxgpt.plan(CFG, task, topology="v5e:2x2", mesh={"data": 2, "tensor": 2})
    assert found.tokens_per_s == pytest.approx(3 / found.step.seconds)
    assert {axis for one in found.collectives for axis in one.axes} >= {"tensor"}
    # A step reads one id per row where the prefill reads 16, and neither counts the other.
    step, prefill = (
        sum(one.bytes for one in sent if (one.kind, one.axes) == ("all-reduce", ("tensor",)))
        for sent in (found.collectives, found.prefill_collectives)
    )
    assert 0 < step < prefill / 4


def test_a_program_that_is_too_large_does_not_fit():
    cfg = dataclasses.replace(flaxgpt.GPTConfig.preset("gpt2"), n_layers=2)
    found = flaxgpt.plan(cfg, flaxgpt.GenerateTask(batch=20_000, dtype="bfloat16"))
    assert not found.hbm.fits
    assert found.hbm.temporaries > V5E.usable
    # The parameters, in bfloat16, and a few more.
    assert found.hbm.arguments == pytest.approx(2 * flaxgpt.count_params(cfg).total, rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v5e:3x3"}, "libtpu does not know the topology 'v5e:3x3'"),
        ({"mesh": {"data": 2}}, "needs 2 chips, but v5e:1x1 has 1"),
        ({"task": flaxgpt.GenerateTask(prompt_length=60)}, "exceed context_length=64"),
        ({"task": flaxgpt.TrainTask(length=65)}, "length=65 exceeds context_length=64"),
        (
            {"task": flaxgpt.TrainTask(batch=6), "topology": "v5e:2x2"},
            "batch=6 must be a multiple of 4",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message):
    task = options.pop("task", flaxgpt.GenerateTask(prompt_length=16, new_tokens=16))
    with pytest.raises(ValueError, match=message):
        flaxgpt.plan(CFG, task, **options)


def test_the_command_says_which_chips_it_leaves_out():
    chips = ("--topology", "v5e:2x2", "--mesh", "data=1")
    process = call("plan", "tales", "--n-layers", 1, "--new-tokens", 8, *chips)
    assert process.returncode == 0, process.stderr
    assert "1 of 4" in process.stdout.decode()
