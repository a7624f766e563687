"""`PrefixStore` reads what its prefixes lack, and drops those that were not used for long."""

import jax
import numpy as np
import pytest

import flaxgpt
from flaxgpt.generation import prefilling

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = flaxgpt.GPTConfig(vocab_size=61, context_length=64, emb_dim=16, n_heads=2, n_layers=1)
PARAMS = flaxgpt.init(CFG, jax.random.key(0))
IDS = np.random.default_rng(0).integers(0, CFG.vocab_size, 64).tolist()
SMALL = 2 * 16 * CFG.emb_dim * 4  # bytes of a prefix in the smallest size class


@pytest.fixture
def read(monkeypatch):
    """A list that gets the number of ids, rounded up, of every reading."""
    widths = []
    compiled = prefilling._read

    def recorded(cfg, static, params, known, unread, length):
        widths.append(unread.shape[1])
        return compiled(cfg, static, params, known, unread, length)

    monkeypatch.setattr(prefilling, "_read", recorded)
    return widths


def assert_equal(prefix, ids):
    """Assert that a prefix is the one that `prefill` makes, up to rounding."""
    expected = flaxgpt.prefill(CFG, PARAMS, ids)
    assert prefix.ids == tuple(ids)
    assert int(prefix.cache.length) == len(ids)
    for found, keys in zip(
        prefix.cache.keys + prefix.cache.values,
        expected.cache.keys + expected.cache.values,
        strict=True,
    ):
        assert found.shape == keys.shape
        filled = ..., slice(len(ids)), slice(None)
        np.testing.assert_allclose(found[filled], keys[filled], atol=1e-6)


def test_a_stored_prefix_is_returned_as_it_is(read):
    store = flaxgpt.PrefixStore(CFG, PARAMS)
    first = store.prefill(IDS[:12])
    assert store.prefill(np.array(IDS[:12])) is first
    assert read == [16]
    assert (len(store), store.nbytes) == (1, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ids", "width"),
    [
        (IDS[:60], 24),  # longer than a stored one
        (IDS[:9], 16),  # its beginning
        ([*IDS[:30], *IDS[:20]], 24),  # the same up to a place
        ([*IDS[:40], 1], 16),
        (IDS, 24),  # the whole context
    ],
)
def test_only_what_the_longest_common_beginning_lacks_is_read(read, ids, width):
    store = flaxgpt.PrefixStore(CFG, PARAMS)
    store.prefill([IDS[0], 7, 8])
    store.prefill(IDS[:40])
    del read[:]
    prefix = store.prefill(ids)
    assert read == [width]
    assert_equal(prefix, ids)
    assert flaxgpt.generate(CFG, PARAMS, [ids], 8, prefix=prefix) == flaxgpt.generate(
        CFG, PARAMS, [ids], 8
    )


@pytest.mark.slow
def test_ids_that_begin_with_another_id_are_read_whole(read):
    store = flaxgpt.PrefixStore(CFG, PARAMS)
    store.prefill(IDS[:40])
    assert_equal(store.prefill([(IDS[0] + 1) % 61, *IDS[1:40]]), [(IDS[0] + 1) % 61, *IDS[1:40]])
    assert read[:2] == [48, 48]


@pytest.mark.slow
def test_the_prefixes_that_were_used_least_recently_are_dropped(read):
    store = flaxgpt.PrefixStore(CFG, PARAMS, max_bytes=2 * SMALL)
    a, b, c = ([first, *IDS[:9]] for first in range(3))
    kept = store.prefill(a)
    store.prefill(b)
    assert store.prefill(a) is kept
    store.prefill(c)  # drops b
    assert (len(store), store.nbytes) == (2, 2 * SMALL)
    del read[:]
    assert store.prefill(a) is kept
    assert read == []
    store.prefill(b)
    assert read == [16]


@pytest.mark.slow
def test_a_prefix_that_was_extended_counts_as_used():
    store = flaxgpt.PrefixStore(CFG, PARAMS, max_bytes=2 * SMALL)
    kept = store.prefill(IDS[:9])
    store.prefill([(IDS[0] + 1) % 61])
    store.prefill(IDS[:12])
    assert store.prefill(IDS[:9]) is kept


@pytest.mark.slow
def test_a_prefix_larger_than_the_limit_is_returned_and_not_stored():
    store = flaxgpt.PrefixStore(CFG, PARAMS, max_bytes=SMALL)
    kept = store.prefill(IDS[:9])
    assert_equal(store.prefill(IDS[:40]), IDS[:40])
    assert store.prefill(IDS[:9]) is kept
    assert len(store) == 1


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="max_bytes=0 must be a whole number"):
        flaxgpt.PrefixStore(CFG, PARAMS, max_bytes=0)
    with pytest.raises(ValueError, match="params do not fit the configuration"):
        flaxgpt.PrefixStore(CFG, {})
    with pytest.raises(ValueError, match="dtype='int8' must be float32"):
        flaxgpt.PrefixStore(CFG, PARAMS, dtype="int8")
    with pytest.raises(ValueError, match="id 61"):
        flaxgpt.PrefixStore(CFG, PARAMS).prefill([61])
