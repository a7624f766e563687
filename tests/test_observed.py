"""`generate` returns intermediate values of its own computations, and replaces them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import flaxgpt
import golden
from flaxgpt.generation import hooks, programs
from flaxgpt.generation.observed import check_watch
from flaxgpt.generation.prompts import prepare
from flaxgpt.generation.sampling import Sampling
from flaxgpt.model import param_shapes
from flaxgpt.platform import PLATFORMS

pytestmark = pytest.mark.usefixtures("quick_compilation")

SLOW = pytest.mark.slow
PROMPTS = [[5, 6, 7, 8, 9], [8], [1, 2, 3]]
NEW = 9
DIRECTION = np.sin(np.arange(64, dtype=np.float32))  # of the residual stream

PATCHES = {
    "a head": {"trf_blocks_1/att/heads": lambda heads: heads.at[:, 2].set(0)},
    "the weights of a head": {"trf_blocks_0/att/weights": lambda w: w.at[:, 1].multiply(0.25)},
    "steering": {"hidden_1": lambda x: x + 3 * DIRECTION[None, None]},
    "keys and values": {
        "trf_blocks_0/att/key": lambda key: -2 * key,
        "trf_blocks_1/att/value": lambda value: value[:, ::-1],
    },
    "logits": {"logits": lambda logits: jnp.roll(logits, 7, axis=-1)},
    "the middle of the stream": {"trf_blocks_2/middle": lambda x: 2 * x},
    "positions": {"pos_emb": lambda x: 0.5 * x},
}


@pytest.fixture(scope="module")
def model():
    return golden.model("hf-small")[:2]


@pytest.fixture(scope="module")
def shallow(model):
    """The model with its first block only, which compiles faster."""
    cfg = dataclasses.replace(model[0], n_layers=1)
    return cfg, {part: model[1][part] for part in param_shapes(cfg)}


@pytest.fixture(scope="module")
def tales():
    return flaxgpt.load("tales")


@pytest.fixture
def choose(monkeypatch):
    """A function that selects a layout of the cache, or all choices for a platform."""

    def use(name):
        cpu = PLATFORMS["cpu"]
        choice = PLATFORMS["tpu"] if name == "tpu" else dataclasses.replace(cpu, cache_layout=name)
        monkeypatch.setitem(PLATFORMS, "cpu", dataclasses.replace(choice, interpreted=True))

    return use


def padded(rows, prompts):
    """Return the texts without their last ids, with zeros after them, and their lengths."""
    texts = [[*prompt, *ids][:-1] for prompt, ids in zip(prompts, rows, strict=True)]
    most = max(map(len, texts))
    return np.array([text + [0] * (most - len(text)) for text in texts]), list(map(len, texts))


def assert_captured(model, rows, prompts, *, select=("*",), tolerance=2e-6, **options):
    """Assert that rows have the activations of their texts without the last id."""
    texts, lengths = padded([row.ids for row in rows], prompts)
    expected = flaxgpt.activations(*model, texts, select=select, **options)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert list(row.activations) == list(expected)
        for name, value in row.activations.items():
            whole = np.asarray(expected[name])[i if name != "pos_emb" else 0]
            whole = whole[..., :length, :length] if "weights" in name else whole[..., :length, :]
            assert (value.shape, value.dtype) == (whole.shape, whole.dtype), name
            value, whole = value.astype(np.float32), whole.astype(np.float32)
            # 6e-7 of the largest number is observed in float32.
            difference = np.abs(value - whole).max()
            assert difference <= tolerance * np.abs(whole).max(), name


def assert_patched(model, rows, prompts, patches):
    """Assert that each id is the most likely one by the patched logits of the whole text."""
    texts, lengths = padded(rows, prompts)
    whole = flaxgpt.patch(*model, texts, patches)
    for i, (ids, prompt, length) in enumerate(zip(rows, prompts, lengths, strict=True)):
        logits = whole[i, len(prompt) - 1 : length]
        chosen = logits[jnp.arange(len(ids)), jnp.array(ids)]
        # The two computations round differently, so equally likely ids may change places.
        np.testing.assert_allclose(chosen, logits.max(-1), atol=1e-4)


# --- Capture


def test_every_value_is_that_of_the_whole_text(shallow):
    rows = flaxgpt.generate(*shallow, PROMPTS[:2], 4, capture=["*"])
    assert_captured(shallow, rows, PROMPTS[:2])


@SLOW
def test_values_have_the_shapes_of_activations_of_the_text_without_its_last_id(shallow):
    (row,) = flaxgpt.generate(*shallow, [[5, 6]], 3, capture=["*"])
    expected = flaxgpt.activations(*shallow, [[5, 6, *row.ids][:-1]])
    assert {name: (1, *value.shape) for name, value in row.activations.items()} == {
        name: value.shape for name, value in expected.items()
    }


@SLOW
@pytest.mark.parametrize("choice", ["merged", "separate", "tpu"])
def test_it_is_so_on_every_platform_and_where_rows_end_early(choice, choose, model):
    plain = flaxgpt.generate(*model, PROMPTS, NEW, stop_ids=[174])
    assert len({*map(len, plain)}) > 1
    choose(choice)
    rows = flaxgpt.generate(*model, PROMPTS, NEW, capture=["*"], stop_ids=[174])
    assert [row.ids for row in rows] == plain
    assert_captured(model, rows, PROMPTS)


@SLOW
@pytest.mark.parametrize("name", ["hf-inverse-layer"])
def test_it_is_so_for_other_architectures(name):
    other = golden.model(name)[:2]
    assert_captured(other, flaxgpt.generate(*other, PROMPTS, 4, capture=["*"]), PROMPTS)


@SLOW
def test_a_text_may_fill_the_context(shallow):
    new = shallow[0].context_length + 1 - max(map(len, PROMPTS))
    rows = flaxgpt.generate(*shallow, PROMPTS, new, capture=["*"])
    assert [row.ids for row in rows] == flaxgpt.generate(*shallow, PROMPTS, new)
    # Sums over 64 keys instead of a few.
    assert_captured(shallow, rows, PROMPTS, tolerance=1e-5)


@SLOW
def test_one_new_id_has_the_values_of_the_prompt(shallow):
    rows = flaxgpt.generate(*shallow, PROMPTS, 1, capture=["hidden_1"])
    assert [len(row.activations["hidden_1"]) for row in rows] == [5, 1, 3]
    assert_captured(shallow, rows, PROMPTS, select=["hidden_1"])


@SLOW
def test_only_the_named_values_are_returned(shallow):
    names = ["trf_blocks_*/att/weights", "hidden_1"]
    (row,) = flaxgpt.generate(*shallow, [[5, 6]], 3, capture=names)
    assert list(row.activations) == ["trf_blocks_0/att/weights", "hidden_1"]
    (none,) = flaxgpt.generate(*shallow, [[5, 6]], 3, capture=[])
    assert (none.ids, none.activations) == (row.ids, {})


@SLOW
@pytest.mark.parametrize("choice", ["merged", "tpu"])
def test_in_bfloat16_values_have_the_dtypes_of_activations(choice, choose, model):
    choose(choice)
    rows = flaxgpt.generate(*model, PROMPTS, NEW, capture=["*"], dtype="bfloat16")
    # bfloat16 has 8 bits, and the differences of several layers add up.
    assert_captured(model, rows, PROMPTS, dtype="bfloat16", tolerance=0.05)


@SLOW
def test_sampling_and_hooks_leave_the_values_those_of_the_model(shallow):
    options = {"temperature": 1.0, "key": jax.random.key(3), "logits_fn": hooks.ban([7])}
    rows = flaxgpt.generate(*shallow, PROMPTS, NEW, capture=["*"], **options)
    assert [row.ids for row in rows] == flaxgpt.generate(*shallow, PROMPTS, NEW, **options)
    assert_captured(shallow, rows, PROMPTS)


@SLOW
def test_the_size_that_is_checked_is_the_size_of_the_record(shallow):
    cfg, params = shallow
    for name in flaxgpt.activation_names(cfg):
        watch = check_watch(cfg, [name], None)
        program, *arrays = prepare(cfg, params, PROMPTS, 4, Sampling(), "bfloat16", watch=watch)
        _, record = jax.tree.leaves(jax.eval_shape(partial(programs.decode, program), *arrays))
        slots = min(program.plan.width, cfg.context_length)
        expected = record.size * record.dtype.itemsize
        assert watch.size(cfg, len(PROMPTS), slots, "bfloat16") == expected, name


# --- Patches


@SLOW
@pytest.mark.parametrize("name", PATCHES)
def test_ids_follow_from_the_patched_logits_of_the_whole_text(name, model):
    rows = flaxgpt.generate(*model, PROMPTS, NEW, patches=PATCHES[name])
    assert rows != flaxgpt.generate(*model, PROMPTS, NEW)
    assert_patched(model, rows, PROMPTS, PATCHES[name])


@SLOW
@pytest.mark.parametrize("choice", ["separate", "tpu"])
def test_patches_work_on_every_platform(choice, choose, model):
    patches = PATCHES["the weights of a head"] | PATCHES["keys and values"]
    choose(choice)
    rows = flaxgpt.generate(*model, PROMPTS, NEW, patches=patches)
    assert_patched(model, rows, PROMPTS, patches)


@SLOW
def test_captured_values_are_the_patched_ones(model):
    patches = PATCHES["a head"] | PATCHES["steering"] | PATCHES["logits"]
    rows = flaxgpt.generate(*model, PROMPTS, NEW, capture=["*"], patches=patches)
    assert_captured(model, rows, PROMPTS, patches=patches)


@SLOW
def test_log_probabilities_are_those_of_the_patched_model(shallow):
    patches = PATCHES["steering"]
    (row,) = flaxgpt.generate(*shallow, [[5, 6]], 4, patches=patches, return_logprobs=True)
    logits = flaxgpt.patch(*shallow, [[5, 6, *row.ids][:-1]], patches)[0, 1:]
    expected = jax.nn.log_softmax(logits)[jnp.arange(4), jnp.array(row.ids)]
    np.testing.assert_allclose(row.log_probs, expected, atol=1e-4)


@SLOW
def test_past_the_context_each_window_is_patched(shallow):
    cfg, patches = shallow[0], PATCHES["steering"]
    prompt, new = [5, 6, 7], cfg.context_length + 4
    (ids,) = flaxgpt.generate(*shallow, [prompt], new, patches=patches)
    text = prompt + ids
    for end in range(cfg.context_length + 1, len(text)):
        window = text[end - cfg.context_length : end]
        logits = flaxgpt.patch(*shallow, [window], patches)[0, -1]
        assert logits[text[end]] >= logits.max() - 1e-4


@SLOW
def test_a_stream_has_the_ids_of_generate(shallow):
    patches = PATCHES["steering"]
    (row,) = flaxgpt.generate(*shallow, [[5, 6]], NEW, patches=patches)
    assert list(flaxgpt.stream(*shallow, [5, 6], NEW, patches=patches)) == row


@SLOW
def test_texts_are_patched_with_and_without_stop_strings(tales):
    direction = jnp.full((1, 1, tales[0].emb_dim), 0.5)
    patches = {"hidden_3": lambda x: x + direction}
    (ids,) = flaxgpt.generate(tales[0], tales[1], [tales[2].encode("The king")], 8, patches=patches)
    expected = tales[2].decode(ids)
    found = [
        flaxgpt.generate_text(*tales, ["The king"], 8, patches=patches)[0],
        flaxgpt.generate_text(*tales, ["The king"], 8, patches=patches, stop=["~"])[0],
        "".join(flaxgpt.stream_text(*tales, "The king", 8, patches=patches)),
    ]
    assert found == [expected] * 3


@SLOW
def test_the_same_functions_and_other_arrays_compile_nothing(shallow, compilations):
    def steer(direction, x):
        return x + direction[None, None]

    def run(scale):
        patches = {"hidden_0": Partial(steer, scale * DIRECTION), "logits": jnp.tanh}
        return flaxgpt.generate(*shallow, [[5, 6]], 3, capture=["hidden_1"], patches=patches)

    (first,) = run(1.0)
    del compilations[:]
    (other,) = run(-4.0)
    assert compilations == []
    assert not np.allclose(first.activations["hidden_1"][0], other.activations["hidden_1"][0])


# --- Errors


@dataclasses.dataclass
class WithoutHash:
    scale: float

    def __call__(self, x):
        return self.scale * x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"capture": ["trf_blocks_0/att/wieghts"]},
            "unknown intermediate 'trf_blocks_0/att/wieghts': did you mean "
            "'trf_blocks_0/att/weights'",
        ),
        ({"capture": "logits"}, r"capture='logits' must be a list .* use \['logits'\]"),
        ({"capture": [3]}, "capture has 3, which is not the name"),
        ({"capture": ["logits"], "beams": 2}, "capture does not work with beam search"),
        ({"patches": {"logits": abs}, "return_beams": 1}, "patches does not work with beam search"),
        (
            {"capture": ["logits"], "return_logprobs": True},
            'return_logprobs does not work with capture: capture "logits"',
        ),
        ({"capture": ["logits"], "window_step": 2}, "window_step does not work with capture"),
        ({"patches": {"hidden_9": abs}}, "did you mean 'hidden_"),
        ({"patches": [abs]}, "patches must be a dict of name: function, got list"),
        ({"patches": {"logits": 3}}, "the patch of logits must be a function of the value there"),
        ({"patches": {"hidden_0": abs, "embeddings": abs}}, "which already has a patch"),
        (
            {"patches": {"final_norm": lambda x: x[0]}},
            r"the patch of final_norm returned shape \(16, 64\); expected \(1, 16, 64\)",
        ),
        ({"patches": {"final_norm": lambda x: None}}, "returned NoneType, not an array"),
        ({"patches": {"logits": WithoutHash(2.0)}}, "WithoutHash, which has no hash"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message, shallow):
    with pytest.raises(ValueError, match=message):
        flaxgpt.generate(*shallow, [[5]], 3, **options)


@pytest.mark.parametrize(
    ("length", "new", "message"),
    [(5, 61, "set max_new_tokens to at most 60"), (65, 1, "65 ids exceed context_length=64")],
)
def test_capture_needs_texts_within_the_context(length, new, message, shallow):
    with pytest.raises(ValueError, match=message):
        flaxgpt.generate(*shallow, [[5] * length, [5]], new, capture=["logits"])


@SLOW
def test_a_patch_that_returns_nan_is_an_error(shallow):
    patches = {"hidden_0": lambda x: x * jnp.nan}
    with pytest.raises(ValueError, match="became NaN at new id 0"):
        flaxgpt.generate(*shallow, [[5]], 3, patches=patches)


def test_a_record_that_is_too_large_is_refused_with_its_size():
    gpt2 = flaxgpt.GPTConfig.preset("gpt2")
    watch = check_watch(gpt2, ["trf_blocks_*/att/weights"], None)
    watch.check_size(gpt2, 7, 1024, "float32")
    with pytest.raises(ValueError, match=r"needs 4\.5 GiB for 8 rows .* capture fewer names"):
        watch.check_size(gpt2, 8, 1024, "float32")
