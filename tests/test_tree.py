"""Parameter trees as rows, statistics, and differences between two trees."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxgpt import GPTConfig
from flaxgpt.inspection import compare, show, tree_rows
from flaxgpt.model import param_shapes

CFG = GPTConfig(vocab_size=50, context_length=8, emb_dim=16, n_heads=2, n_layers=11)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape), param_shapes(CFG))


def names(tree, depth):
    return [row.name for row in tree_rows(tree) if len(row.path) == depth]


# Rows and statistics


def test_rows_follow_the_flow_of_data(params):
    blocks = [f"trf_blocks_{i}" for i in range(11)]
    assert names(params, 1) == ["tok_emb", "pos_emb", *blocks, "final_norm", "out_head"]
    assert names(params["trf_blocks_3"], 1) == ["norm1", "att", "norm2", "ff"]


def test_a_group_precedes_its_members_and_counts_them(params):
    found = tree_rows(params)
    for i, row in enumerate(found):
        inside = [other for other in found if other.path[:-1] == row.path]
        if row.shape is None:
            assert found[i + 1] in inside
            assert row.count == sum(other.count for other in inside)
            assert row.bytes == sum(other.bytes for other in inside)
        else:
            assert not inside and row.count == np.prod(row.shape)


def test_models_in_one_tree_are_listed_one_after_the_other(params):
    found = names({"b": params, "a": params}, 2)
    assert found == [f"{model}/{name}" for model in "ab" for name in names(params, 1)]


def test_a_single_array_is_one_row():
    (row,) = tree_rows(jnp.ones((2, 3)), statistics=True)
    assert (row.name, row.shape, row.count, row.statistics.mean) == ("(array)", (2, 3), 6, 1.0)


def test_statistics_of_a_group_are_those_of_all_its_elements():
    far = {"a": np.array([1e8, 1e8 + 1], np.float64), "b": np.array([1e8 + 2, 1e8 + 3])}
    combined = tree_rows({"group": far}, statistics=True)[0].statistics
    assert combined.mean == 1e8 + 1.5
    np.testing.assert_allclose(combined.std, np.std([0, 1, 2, 3]), rtol=1e-12)
    np.testing.assert_allclose(combined.norm, 2e8, rtol=1e-7)


def test_statistics_ignore_and_count_nan_and_infinities():
    values = {"a": jnp.array([jnp.nan, jnp.inf, -jnp.inf, 3.0, 0.0])}
    (row,) = tree_rows(values, statistics=True)
    s = row.statistics
    assert (s.mean, s.norm, s.nan, s.inf, s.zero, s.count) == (1.5, 3.0, 1, 2, 1, 5)
    assert s.faults == ("1 NaN", "2 Inf")
    (row,) = tree_rows({"a": jnp.zeros(3)}, statistics=True)
    assert row.statistics.faults == ("all zero",)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (param_shapes(CFG), "tok_emb/weight is a shape without values"),
        ({"a": np.ones(2, complex)}, "a is complex128: statistics require real numbers"),
    ],
)
def test_an_array_without_statistics_is_an_error(tree, message):
    with pytest.raises(ValueError, match=message):
        tree_rows(tree, statistics=True)


# Differences


def test_equal_trees_have_no_differences(params):
    assert compare(params, jax.tree.map(np.asarray, params)) == []
    nan = {"a": np.array([np.nan, 0.0])}
    assert compare(nan, {"a": np.array([np.nan, -0.0])}) == []


def test_changed_values_are_measured():
    (item,) = compare({"a": np.array([3.0, 4.0, 0.0])}, {"a": np.array([3.0, 4.5, -1.0])})
    assert (item.name, item.kind, item.changed, item.largest) == ("a", "values", 2, 1.0)
    np.testing.assert_allclose(item.relative, np.sqrt(1.25) / 5)


def test_a_value_that_becomes_nan_is_a_change():
    (item,) = compare({"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, np.nan])})
    assert item.changed == 1 and np.isnan(item.largest)


def test_dtypes_shapes_and_names_are_compared():
    a = {"x": jnp.ones(2), "y": jnp.ones(2), "z": jnp.ones(2)}
    b = {"x": jnp.ones(3), "y": jnp.ones(2, jnp.bfloat16), "w": jnp.ones(2)}
    kinds = {item.name: (item.kind, item.a, item.b) for item in compare(a, b)}
    assert kinds == {
        "x": ("shape", "float32[2]", "float32[3]"),
        "y": ("dtype", "float32[2]", "bfloat16[2]"),
        "z": ("only in A", "float32[2]", None),
        "w": ("only in B", None, "float32[2]"),
    }


def test_shapes_without_values_can_be_compared(params):
    assert compare(params, param_shapes(CFG)) == []


@pytest.mark.parametrize(("one", "other"), [(2**60, 2**60 + 1), (1 + 2j, 1 + 1j), (True, False)])
def test_values_of_any_dtype_are_compared_exactly(one, other):
    (item,) = compare({"a": np.array([one])}, {"a": np.array([other])})
    assert item.changed == 1


# Notebooks


# treescope 0.1.10 visits all of NumPy's names, and NumPy 2.5 deprecates one of them.
@pytest.mark.filterwarnings("ignore:The chararray class is deprecated:DeprecationWarning")
def test_a_tree_is_displayed_as_html_or_text(params):
    shown = show(params["trf_blocks_0"]["norm1"])
    assert "treescope" in shown._repr_html_()
    assert "'scale': <jax.Array float32(" in repr(shown)


def test_displaying_a_tree_without_treescope_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "treescope", None)
    with pytest.raises(
        ImportError, match=r"requires treescope .*: pip install 'flaxgpt\[notebook\]'"
    ):
        show({})
