"""Training losses match those of PyTorch with Hugging Face's model, step by step."""

import dataclasses

import numpy as np
import pytest

import golden
from flaxgpt.training import TrainConfig, init_state, loss, train_step, train_steps


@pytest.mark.parametrize("per_call", [1, 10])
def test_the_losses_of_thirty_steps_match_pytorch(per_call):
    cfg, params, expected = golden.model("hf-small")
    cfg = dataclasses.replace(
        cfg, drop_rate=0.0, drop_rate_emb=0.0, drop_rate_attn=0.0, drop_rate_shortcut=0.0
    )
    batches = expected["train_batches"].astype(np.int32)
    train_cfg = TrainConfig(
        steps=len(batches),
        batch_size=batches.shape[1],
        warmup_steps=0,
        learning_rate=1e-3,
        min_learning_rate_fraction=1.0,  # a constant rate
        beta2=0.95,
        decay="everything",
    )
    state = init_state(cfg, train_cfg, params)
    losses = []
    for chunk in np.split(batches, len(batches) // per_call):
        if per_call == 1:
            state, metrics = train_step(state, chunk[0])
        else:
            state, metrics = train_steps(state, chunk)
        losses += np.ravel(metrics["loss"]).tolist()
    # Rounding differences grow with each step, to at most 2e-4 after 30.
    np.testing.assert_allclose(losses, expected["train_losses"], atol=2e-4, rtol=0)


def test_the_loss_matches_hugging_face():
    cfg, params, expected = golden.model("hf-small")
    np.testing.assert_allclose(
        loss(cfg, params, expected["input_ids"]), expected["lm_loss"], rtol=2e-6
    )
