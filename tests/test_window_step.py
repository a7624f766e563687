"""Past the context, `window_step` reads the last ids once for several new ones."""

import jax
import numpy as np
import pytest

import flaxgpt
import golden
from flaxgpt.generation.prompts import bucket

pytestmark = pytest.mark.usefixtures("quick_compilation")

SAMPLED = {"temperature": 1.0, "key": jax.random.key(3)}


def expected(cfg, params, prompt, new, step):
    """Return greedy ids, each from a forward pass of the ids in view."""
    ids, in_view = list(prompt), len(prompt)
    for _ in range(new):
        if in_view > cfg.context_length:
            in_view = cfg.context_length - step + 1
        view = np.zeros((1, cfg.context_length), int)
        view[0, :in_view] = ids[-in_view:]
        logits = flaxgpt.forward(cfg, params, view)[0, in_view - 1]
        ids.append(int(logits.argmax()))
        in_view += 1
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 16))]
)
def test_each_id_follows_from_the_ids_in_view(step):
    cfg, params, _ = golden.model("book-small")
    prompt, new = golden.prompt("book-small", 5), cfg.context_length + 9
    (found,) = flaxgpt.generate(cfg, params, [prompt], new, window_step=step)
    assert found == expected(cfg, params, prompt, new, step)


@pytest.mark.slow
def test_rows_get_what_they_get_alone_where_all_begin_together():
    cfg, params, _ = golden.model("book-small")
    prompts = [golden.prompt("book-small", 5, row) for row in range(2)]
    new = cfg.context_length + 9
    together = flaxgpt.generate(cfg, params, prompts, new, window_step=4, **SAMPLED)
    keys = [jax.random.fold_in(SAMPLED["key"], row)[None] for row in range(2)]
    alone = [
        flaxgpt.generate(cfg, params, [prompt], new, window_step=4, temperature=1.0, key=key)[0]
        for prompt, key in zip(prompts, keys, strict=True)
    ]
    assert together == alone


@pytest.mark.slow
def test_a_stream_has_the_ids_of_generate_far_past_the_context():
    cfg, params, _ = golden.model("book-small")
    prompt, new = golden.prompt("book-small", 5), 3 * bucket(cfg.context_length + 1)
    options = {"window_step": 6, **SAMPLED}
    (whole,) = flaxgpt.generate(cfg, params, [prompt], new, **options)
    assert list(flaxgpt.stream(cfg, params, prompt, new, **options)) == whole


@pytest.mark.slow
def test_within_the_context_it_changes_nothing():
    cfg, params, _ = golden.model("book-small")
    prompt = golden.prompt("book-small", 5)
    plain = flaxgpt.generate(cfg, params, [prompt], 4)
    assert flaxgpt.generate(cfg, params, [prompt], 4, window_step=7) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_step": 0}, "window_step=0 must be a whole number"),
        ({"window_step": 10**6}, "exceeds context_length"),
        ({"window_step": 2, "beams": 2}, "window_step does not work with beam search"),
    ],
)
def test_steps_that_cannot_work_are_refused(options, message):
    cfg, params, _ = golden.model("book-small")
    with pytest.raises(ValueError, match=message):
        flaxgpt.generate(cfg, params, [[1]], 3, **options)
