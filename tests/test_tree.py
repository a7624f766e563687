"""Parameter trees as rows, what their numbers are like, and what differs between two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxgpt import GPTConfig
from flaxgpt.inspection import compare, rows
from flaxgpt.model import param_shapes

CFG = GPTConfig(vocab_size=50, context_length=8, emb_dim=16, n_heads=2, n_layers=11)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape), param_shapes(CFG))


def names(tree, depth):
    return [row.name for row in rows(tree) if len(row.path) == depth]


# Rows


def test_rows_are_in_the_order_in_which_data_flows(params):
    blocks = [f"trf_blocks_{i}" for i in range(11)]
    assert names(params, 1) == ["tok_emb", "pos_emb", *blocks, "final_norm", "out_head"]
    assert names(params["trf_blocks_3"], 1) == ["norm1", "att", "norm2", "ff"]


def test_a_group_comes_before_what_is_in_it_and_counts_it(params):
    found = rows(params)
    for i, row in enumerate(found):
        inside = [other for other in found if other.path[:-1] == row.path]
        if row.shape is None:
            assert found[i + 1] in inside
            assert row.count == sum(other.count for other in inside)
            assert row.bytes == sum(other.bytes for other in inside)
        else:
            assert not inside and row.count == np.prod(row.shape)


def test_models_in_one_tree_come_one_after_the_other(params):
    found = names({"b": params, "a": params}, 2)
    assert found == [f"{model}/{name}" for model in "ab" for name in names(params, 1)]


def test_an_array_alone_is_a_row():
    (row,) = rows(jnp.ones((2, 3)), statistics=True)
    assert (row.name, row.shape, row.count, row.statistics.mean) == ("(array)", (2, 3), 6, 1.0)


def test_statistics_are_those_of_all_numbers_together():
    far = {"a": np.array([1e8, 1e8 + 1], np.float64), "b": np.array([1e8 + 2, 1e8 + 3])}
    together = rows({"group": far}, statistics=True)[0].statistics
    assert together.mean == 1e8 + 1.5
    np.testing.assert_allclose(together.std, np.std([0, 1, 2, 3]), rtol=1e-12)
    np.testing.assert_allclose(together.norm, 2e8, rtol=1e-7)


def test_statistics_are_of_finite_numbers_and_count_the_others():
    values = {"a": jnp.array([jnp.nan, jnp.inf, -jnp.inf, 3.0, 0.0])}
    (row,) = rows(values, statistics=True)
    s = row.statistics
    assert (s.mean, s.norm, s.nan, s.inf, s.zero, s.count) == (1.5, 3.0, 1, 2, 1, 5)
    assert s.faults == ("1 NaN", "2 Inf")
    assert rows({"a": jnp.zeros(3)}, statistics=True)[0].statistics.faults == ("all zero",)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (param_shapes(CFG), "tok_emb/weight is a shape without numbers"),
        ({"a": np.ones(2, complex)}, "a is complex128: statistics take real numbers"),
    ],
)
def test_what_has_no_statistics_is_named(tree, message):
    with pytest.raises(ValueError, match=message):
        rows(tree, statistics=True)


# Differences


def test_equal_trees_differ_in_nothing(params):
    assert compare(params, jax.tree.map(np.asarray, params)) == []
    nan = {"a": np.array([np.nan, 0.0])}
    assert compare(nan, {"a": np.array([np.nan, -0.0])}) == []


def test_changed_numbers_are_measured():
    (item,) = compare({"a": np.array([3.0, 4.0, 0.0])}, {"a": np.array([3.0, 4.5, -1.0])})
    assert (item.name, item.kind, item.changed, item.largest) == ("a", "values", 2, 1.0)
    np.testing.assert_allclose(item.relative, np.sqrt(1.25) / 5)


def test_a_number_that_became_nan_is_a_change():
    (item,) = compare({"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, np.nan])})
    assert item.changed == 1 and np.isnan(item.largest)


def test_dtypes_shapes_and_names_are_compared_too():
    a = {"x": jnp.ones(2), "y": jnp.ones(2), "z": jnp.ones(2)}
    b = {"x": jnp.ones(3), "y": jnp.ones(2, jnp.bfloat16), "w": jnp.ones(2)}
    kinds = {item.name: (item.kind, item.a, item.b) for item in compare(a, b)}
    assert kinds == {
        "x": ("shape", "float32[2]", "float32[3]"),
        "y": ("dtype", "float32[2]", "bfloat16[2]"),
        "z": ("only in A", "float32[2]", None),
        "w": ("only in B", None, "float32[2]"),
    }


def test_shapes_without_numbers_are_compared_as_shapes(params):
    assert compare(params, param_shapes(CFG)) == []


@pytest.mark.parametrize(("one", "other"), [(2**60, 2**60 + 1), (1 + 2j, 1 + 1j), (True, False)])
def test_numbers_of_any_kind_are_told_apart(one, other):
    (item,) = compare({"a": np.array([one])}, {"a": np.array([other])})
    assert item.changed == 1
