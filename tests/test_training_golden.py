"""Training loses as PyTorch with Hugging Face's model does, step by step."""

import dataclasses

import numpy as np
import pytest

import golden
from flaxgpt.training import TrainConfig, init_state, loss, train_step, train_steps


@pytest.mark.parametrize("per_call", [1, 10])
def test_thirty_steps_lose_as_pytorch_with_hugging_face_loses(per_call):
    cfg, params, expected = golden.model("hf-small")
    cfg = dataclasses.replace(
        cfg, drop_rate=0.0, drop_rate_emb=0.0, drop_rate_attn=0.0, drop_rate_shortcut=0.0
    )
    batches = expected["train_batches"].astype(np.int32)
    recipe = TrainConfig(
        steps=len(batches),
        batch_size=batches.shape[1],
        warmup_steps=0,
        learning_rate=1e-3,
        min_learning_rate=1e-3,  # no schedule
        beta2=0.95,
        decay="everything",
    )
    state = init_state(cfg, recipe, params)
    losses = []
    for chunk in np.split(batches, len(batches) // per_call):
        if per_call == 1:
            state, metrics = train_step(state, chunk[0])
        else:
            state, metrics = train_steps(state, chunk)
        losses += np.ravel(metrics["loss"]).tolist()
    # The differences of rounding grow with each step: 2e-4 is what 30 of them may come to.
    np.testing.assert_allclose(losses, expected["train_losses"], atol=2e-4, rtol=0)


def test_the_loss_is_hugging_faces():
    cfg, params, expected = golden.model("hf-small")
    np.testing.assert_allclose(
        loss(cfg, params, expected["input_ids"]), expected["lm_loss"], rtol=2e-6
    )
