"""Programs are lowered for platforms that are not attached, with the choices for each."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import flaxgpt
from flaxgpt.generation import programs
from flaxgpt.generation.beam_options import BeamOptions
from flaxgpt.generation.prompts import prepare
from flaxgpt.generation.sampling import Sampling
from flaxgpt.model.attend import attend, resolve_attention
from flaxgpt.model.visibility import Visibility
from flaxgpt.platform import PLATFORMS
from flaxgpt.training import TrainConfig, abstract_state, train_step

CFG = flaxgpt.GPTConfig(
    vocab_size=61, context_length=256, emb_dim=128, n_heads=2, n_layers=1, drop_rate=0.0
)
CUDNN = "__cudnn$fmhaSoftmax"
platforms = pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])


def lowered(function, platform, *arguments):
    """Return the text of a program for a platform."""
    calls = CUDNN, f"{CUDNN}Backward"
    checks = [export.DisabledSafetyCheck.custom_call(call) for call in calls]
    exported = export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)
    return exported(*arguments).mlir_module()


def attention_gradient(choices, dtype):
    """Return a function that differentiates attention, and its arguments."""

    def total(*arrays):
        return attend(*arrays, Visibility(), choices).astype(jnp.float32).sum()

    return jax.grad(total, argnums=(0, 1, 2)), [jax.ShapeDtypeStruct((2, 2, 256, 64), dtype)] * 3


@pytest.fixture
def choose(monkeypatch):
    """Return a function that makes traced programs use the choices for a platform."""

    def choose(platform):
        monkeypatch.setitem(PLATFORMS, "cpu", PLATFORMS[platform])
        jax.clear_caches()

    yield choose
    jax.clear_caches()


@pytest.fixture
def cudnn(monkeypatch):
    """Let JAX believe that cuDNN 9.10 and a Hopper GPU are present."""
    attention = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    for name, answer in {"check_cudnn_version": 91000, "check_compute_capability": True}.items():
        if not hasattr(attention, name):
            pytest.skip(f"this version of JAX has no {name}")
        monkeypatch.setattr(attention, name, lambda *args, answer=answer: answer)


def test_bfloat16_attention_on_tpu_is_three_kernels():
    function, arguments = attention_gradient(PLATFORMS["tpu"], "bfloat16")
    assert lowered(function, "tpu", *arguments).count("tpu_custom_call") == 3


def test_bfloat16_attention_on_cuda_is_cudnns(cudnn):
    function, arguments = attention_gradient(PLATFORMS["cuda"], "bfloat16")
    found = set(re.findall(r"__cudnn[$\w]+", lowered(function, "cuda", *arguments)))
    assert found == {CUDNN, f"{CUDNN}Backward"}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_float32_attention_is_plain(platform):
    function, arguments = attention_gradient(PLATFORMS[platform], "float32")
    assert "custom_call" not in lowered(function, platform, *arguments)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_attention_can_be_asked_for(platform):
    choices = resolve_attention("plain", PLATFORMS[platform], "bfloat16")
    function, arguments = attention_gradient(choices, "bfloat16")
    assert "custom_call" not in lowered(function, platform, *arguments)


@pytest.mark.slow
@platforms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_decoding_loop_is_lowered(platform, dtype, choose):
    choose(platform)
    params = flaxgpt.init(CFG, jax.random.key(0))
    program, params, *rest = prepare(CFG, params, np.ones((1, 5), int), 8, Sampling(), dtype)

    def decode(params, *rest):
        return programs.decode(program, params, *rest)

    assert "stablehlo.while" in lowered(decode, platform, params, *rest)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_beam_search_is_lowered(platform, choose):
    choose(platform)
    params = flaxgpt.init(CFG, jax.random.key(0))
    program, params, *rest = prepare(CFG, params, np.ones((1, 5), int), 8, Sampling(), "bfloat16")
    request, *rows = rest

    def search(params, request, *rest):
        return programs.search(program, 4, params, request, *rest)

    arguments = (params, request, BeamOptions(4).rules(), *rows)
    assert "stablehlo.while" in lowered(search, platform, *arguments)


@pytest.mark.slow
@platforms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_is_lowered(platform, dtype, choose, cudnn):
    choose(platform)
    state = abstract_state(CFG, TrainConfig(batch_size=2, dtype=dtype))
    ids = jax.ShapeDtypeStruct((2, 257), jnp.int32)
    text = lowered(lambda *args: train_step(*args)[1], platform, state, ids)
    kernels = {"cuda": "__cudnn", "tpu": "tpu_custom_call"}
    assert (kernels.get(platform, "no kernel") in text) == (
        platform != "cpu" and dtype == "bfloat16"
    )
