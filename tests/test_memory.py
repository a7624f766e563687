"""Memory: exact sizes, and estimates compared with the numbers XLA reports."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import flaxgpt
from flaxgpt import GPTConfig
from flaxgpt.generation import programs
from flaxgpt.generation.decoding import Plan, Request
from flaxgpt.generation.programs import Program
from flaxgpt.inspection import LargestBatch, largest_batch
from flaxgpt.model import param_shapes
from flaxgpt.platform import PLATFORMS, Platform
from flaxgpt.training import TrainConfig, init_state, loss, make_optimizer, train_step

WIDE = GPTConfig(vocab_size=65, context_length=64, emb_dim=128, n_heads=4, n_layers=4, drop_rate=0)
LONG = GPTConfig(
    vocab_size=512, context_length=512, emb_dim=128, n_heads=4, n_layers=2, drop_rate=0
)
WORDY = dataclasses.replace(WIDE, vocab_size=8000, n_layers=2, qkv_bias=True)
DROPPING = dataclasses.replace(LONG, context_length=128, drop_rate=0.1)


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_weights_cache_and_optimizer_state_are_exact():
    cfg = GPTConfig.preset("gpt2-medium")
    used = flaxgpt.memory(cfg, 3, 100)
    assert used.weights == size_of(param_shapes(cfg))
    cache = jax.eval_shape(lambda: flaxgpt.init_cache(cfg, 3, 100))
    assert used.kv_cache == size_of((cache.keys, cache.values))
    moments = jax.eval_shape(make_optimizer(TrainConfig()).init, param_shapes(cfg))
    assert used.optimizer == size_of([x for x in jax.tree.leaves(moments) if x.ndim])
    half = flaxgpt.memory(cfg, 3, 100, dtype="bfloat16")
    assert (half.kv_cache, half.weights) == (used.kv_cache // 2, used.weights)


def xla_training(cfg, batch, length):
    """Return the bytes that XLA reports for a training step."""
    state = jax.eval_shape(partial(init_state, cfg, TrainConfig(batch_size=batch)))
    ids = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    found = train_step.lower(state, ids).compile().memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes  # outputs alias arguments


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "batch", "length"),
    [
        (WIDE, 12, 64),
        pytest.param(WIDE, 1, 64, marks=pytest.mark.slow),
        pytest.param(DROPPING, 4, 128, marks=pytest.mark.slow),
        pytest.param(LONG, 4, 512, marks=pytest.mark.slow),
        pytest.param(WORDY, 8, 64, marks=pytest.mark.slow),
    ],
    ids=["activations", "gradients", "dropout", "scores", "logits"],  # what dominates
)
def test_the_training_estimate_agrees_with_xla(cfg, batch, length):
    found = xla_training(cfg, batch, length)
    assert abs(flaxgpt.memory(cfg, batch, length).training / found - 1) < 0.15


def xla_generating(cfg, batch, prompt_positions=None):
    """Return the bytes that XLA reports for generation with a prompt of the context length."""
    length = cfg.context_length
    plan = Plan(length, length, length, exceeds_context=False)
    platform = dataclasses.replace(
        PLATFORMS["cpu"], prompt_positions=prompt_positions or Platform().prompt_positions
    )
    program = Program(cfg, plan, platform, jnp.dtype("float32"))
    scalar = partial(jax.ShapeDtypeStruct, ())
    request = Request(
        key=jax.eval_shape(lambda: jax.random.key(0)),
        temperature=scalar(jnp.float32),
        top_k=scalar(jnp.int32),
        top_p=scalar(jnp.float32),
        stop_ids=jax.ShapeDtypeStruct((4,), jnp.int32),
        prompt_length=scalar(jnp.int32),
        final_length=scalar(jnp.int32),
    )
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    start = jax.ShapeDtypeStruct((batch,), jnp.int32)
    decode = programs.compiled_decode(program.platform.decode_options)
    call = decode.lower(program, param_shapes(cfg), request, ids, start)
    found = call.compile().memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes


@pytest.mark.parametrize(
    ("cfg", "batch"),
    [
        (WIDE, 8),
        *(pytest.param(cfg, n, marks=pytest.mark.slow) for cfg, n in ((LONG, 2), (WORDY, 1))),
    ],
)
def test_the_generation_estimate_agrees_with_xla(cfg, batch):
    found = xla_generating(cfg, batch)
    most = 0.15 if jax.__version_info__ >= (0, 10) else 0.25
    assert abs(flaxgpt.memory(cfg, batch, cfg.context_length).generating / found - 1) < most


@pytest.mark.parametrize(
    ("cfg", "batch"),
    [
        (dataclasses.replace(WIDE, n_layers=2), 64),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((WIDE, 64), (LONG, 8))),
    ],
)
def test_the_generation_estimate_bounds_xla_for_thousands_of_ids(cfg, batch):
    # jax 0.10 to 0.12 need this amount, or a tenth less where attention weights, which the estimate
    # counts whole, are computed in blocks of queries; 0.7 needs half of it or more.
    found = xla_generating(cfg, batch) / flaxgpt.memory(cfg, batch, cfg.context_length).generating
    least = 0.9 if jax.__version_info__ >= (0, 10) else 0.45
    assert least < found < 1.02


@pytest.mark.slow
def test_reading_few_prompts_at_once_takes_the_memory_of_these():
    used = flaxgpt.memory(LONG, 8, LONG.context_length)
    fixed = used.weights + used.kv_cache
    few = xla_generating(LONG, 8, prompt_positions=LONG.context_length) - fixed
    assert few < 0.3 * (xla_generating(LONG, 8) - fixed)


def test_remat_keeps_one_residual_stream_per_block():
    # Residuals as JAX sees them: XLA on CPU merges the duplicate computations again.
    def kept(layers):
        cfg = dataclasses.replace(WIDE, n_layers=layers)
        ids = jax.ShapeDtypeStruct((2, 65), jnp.int32)

        def backward(params, ids):
            return jax.vjp(lambda p: loss(cfg, p, ids, remat=True), params)[1]

        weights = param_shapes(cfg)
        return size_of(jax.eval_shape(backward, weights, ids)) - size_of(weights)

    stream = 2 * 64 * 128 * 4
    assert 0.95 * stream < kept(5) - kept(4) < 1.05 * stream
    used = [
        flaxgpt.memory(dataclasses.replace(WIDE, n_layers=n), 2, 64).activations_with_remat
        for n in (4, 5)
    ]
    assert used[1] - used[0] == stream


def test_the_largest_batch_fits_and_one_more_row_does_not():
    cfg = GPTConfig.preset("gpt2")
    size = 16 * 10**9
    largest = largest_batch(cfg, size, 512)
    for purpose in ("generating", "training", "training_with_remat"):
        batch = getattr(largest, purpose)
        assert batch > 0
        assert getattr(flaxgpt.memory(cfg, batch, 512), purpose) <= size
        assert getattr(flaxgpt.memory(cfg, batch + 1, 512), purpose) > size


def test_a_model_that_does_not_fit_has_a_largest_batch_of_0():
    largest = largest_batch(GPTConfig.preset("gpt2-xl"), 10**9, 1024)
    assert largest == LargestBatch(generating=0, training=0, training_with_remat=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flaxgpt.memory(WIDE, 0, 8), "batch=0 must be a whole number"),
        (lambda: flaxgpt.memory(WIDE, 1, 65), "length=65 exceeds context_length=64"),
        (lambda: flaxgpt.memory(WIDE, 1, 64, dtype="int8"), "dtype='int8' must be float32"),
        (lambda: largest_batch(WIDE, 10**9, 65), "length=65 exceeds"),
        (lambda: largest_batch(WIDE, "16GB", 8), "size='16GB' must be a positive number"),
        (lambda: largest_batch(WIDE, float("inf"), 8), "size=inf must be a positive number"),
    ],
)
def test_invalid_sizes_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
