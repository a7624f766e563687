"""Pictures, as Python's users draw them."""

import warnings

import matplotlib
import numpy as np
import pytest

from flaxgpt.inspection import plots

TOKENS = ["The", " cat", " sat"]


def test_a_picture_does_not_depend_on_the_callers_style():
    curves = {"loss": [3.0, 2.0, 1.0]}
    plain = plots.to_png(plots.lines_by_depth(curves, "size"))
    with matplotlib.rc_context({"font.size": 30, "font.family": "monospace", "axes.grid": True}):
        assert plots.to_png(plots.lines_by_depth(curves, "size")) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_characters_without_a_shape_are_told_by_number_and_dollars_are_dollars():
    assert plots.shown(" 中$x$\n") == r"␣U+4E2D\$x\$⏎"
    weights = np.tril(np.ones((2, 3, 3))) / np.arange(1, 4)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as matplotlib's, of what the font lacks
        plots.to_png(plots.attention_maps(weights, ["中", "$", "🙂"], "的 $x$"))


def test_every_curve_is_drawn_however_many():
    curves = {f"curve {i}": np.arange(1, 2 + i) for i in range(15)}
    (axes,) = plots.lines_by_depth(curves, "size").axes
    assert len(axes.lines) == 15
    assert axes.get_xticks()[-1] == 14


def test_a_lens_shows_the_likeliest_token_and_how_likely_it_is():
    logits = np.log([[[0.7, 0.2, 0.1]] * 3, [[0.1, 0.3, 0.6]] * 3])
    axes = plots.lens_table(logits, TOKENS, "abc".__getitem__).axes[0]
    assert [text.get_text() for text in axes.texts] == ["c"] * 3 + ["a"] * 3  # last block on top
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.6] * 3, [0.7] * 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.attention_maps(np.ones((2, 4, 4)), TOKENS), r"must be \[heads, 3, 3\]"),
        (lambda: plots.attention_maps(np.ones((0, 3, 3)), TOKENS), "nothing to draw"),
        (lambda: plots.lens_table(np.ones((2, 4, 9)), TOKENS, str), r"must be \[layers \+ 1, 3, "),
        (lambda: plots.lens_table(np.full((2, 3, 9), np.nan), TOKENS, str), "NaN or Inf"),
        (lambda: plots.lens_table(np.ones((2, 65, 9)), ["a"] * 65, str), "too wide to read"),
        (lambda: plots.lines_by_depth({}, "size"), "give numbers of each"),
        (lambda: plots.lines_by_depth({"a": []}, "size"), "curves a: give numbers of each"),
        (lambda: plots.lines_by_depth({"a": [1, np.inf]}, "size"), "size of a is NaN or Inf"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
