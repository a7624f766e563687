"""Plots, as drawn from Python."""

import warnings

import matplotlib
import numpy as np
import pytest

from flaxgpt.inspection import plots

TOKENS = ["The", " cat", " sat"]


def test_a_plot_does_not_depend_on_the_style_of_the_caller():
    curves = {"loss": [3.0, 2.0, 1.0]}
    plain = plots.to_png(plots.lines_by_depth(curves, "size"))
    with matplotlib.rc_context({"font.size": 30, "font.family": "monospace", "axes.grid": True}):
        assert plots.to_png(plots.lines_by_depth(curves, "size")) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_missing_characters_are_shown_by_number_and_dollars_are_escaped():
    assert plots.shown(" 中$x$\n") == r"␣U+4E2D\$x\$⏎"
    weights = np.tril(np.ones((2, 3, 3))) / np.arange(1, 4)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns about characters that the font lacks
        plots.to_png(plots.attention_maps(weights, ["中", "$", "🙂"], "的 $x$"))


def test_all_of_many_curves_are_drawn():
    curves = {f"curve {i}": np.arange(1, 2 + i) for i in range(15)}
    (axes,) = plots.lines_by_depth(curves, "size").axes
    assert len(axes.lines) == 15
    assert axes.get_xticks()[-1] == 14


def test_a_lens_table_shows_the_likeliest_tokens_and_their_probabilities():
    logits = np.log([[[0.7, 0.2, 0.1]] * 3, [[0.1, 0.3, 0.6]] * 3])
    axes = plots.lens_table(logits, TOKENS, "abc".__getitem__).axes[0]
    assert [text.get_text() for text in axes.texts] == ["c"] * 3 + ["a"] * 3  # last block on top
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.6] * 3, [0.7] * 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.attention_maps(np.ones((2, 4, 4)), TOKENS), r"must be \[heads, 3, 3\]"),
        (
            lambda: plots.attention_maps(np.ones((0, 3, 3)), TOKENS),
            "are empty: expected at least one head",
        ),
        (lambda: plots.lens_table(np.ones((2, 4, 9)), TOKENS, str), r"must be \[layers \+ 1, 3, "),
        (lambda: plots.lens_table(np.full((2, 3, 9), np.nan), TOKENS, str), "NaN or Inf"),
        (lambda: plots.lens_table(np.ones((2, 65, 9)), ["a"] * 65, str), "too wide to read"),
        (lambda: plots.lines_by_depth({}, "size"), "curves {}: each must have"),
        (lambda: plots.lines_by_depth({"a": []}, "size"), "curves a: each must have"),
        (lambda: plots.lines_by_depth({"a": [1, np.inf]}, "size"), "size of a is NaN or Inf"),
    ],
)
def test_data_that_cannot_be_drawn_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
