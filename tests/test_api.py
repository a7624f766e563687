import doctest
import importlib
import inspect
import pkgutil

import pytest

import flaxgpt

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_public_names_are_in_the_order_data_flows():
    assert flaxgpt.__all__ == [
        "GPTConfig",
        "init",
        "book_params",
        "load",
        "save",
        "quantize",
        "dequantize",
        "load_tokenizer",
        "GPT",
        "forward",
        "states",
        "logits",
        "score",
        "KVCache",
        "init_cache",
        "extend",
        "prefill",
        "Prefix",
        "PrefixStore",
        "Sampling",
        "generate",
        "stream",
        "generate_text",
        "stream_text",
        "count_params",
        "flops",
        "mfu",
        "memory",
        "activation_names",
        "activations",
        "patch",
        "logit_lens",
        "GenerateTask",
        "TrainTask",
        "plan",
        "make_mesh",
        "ShardRules",
        "shard_rules",
        "shard",
    ]


def test_every_public_name_explains_itself():
    for name in flaxgpt.__all__:
        item = getattr(flaxgpt, name)
        text = inspect.getdoc(item) or ""
        assert len(text) > 60, name
        if inspect.isfunction(item) or hasattr(item, "__wrapped__"):
            assert "Args:" in text, name
            assert "Returns:" in text or "Yields:" in text or "Write" in text, name


def test_the_configuration_comes_first_so_that_it_can_be_bound():
    for name in (
        "init",
        "book_params",
        "forward",
        "states",
        "logits",
        "score",
        "init_cache",
        "extend",
        "prefill",
        "generate",
        "stream",
        "flops",
        "mfu",
        "memory",
        "activation_names",
        "activations",
        "patch",
        "logit_lens",
    ):
        assert next(iter(inspect.signature(getattr(flaxgpt, name)).parameters)) == "cfg"


def test_no_public_function_swallows_arguments():
    for name in flaxgpt.__all__:
        item = getattr(flaxgpt, name)
        if inspect.isfunction(item):
            kinds = [p.kind for p in inspect.signature(item).parameters.values()]
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def test_the_examples_in_docstrings_are_true():
    attempted = 0
    for module in pkgutil.walk_packages(flaxgpt.__path__, "flaxgpt."):
        if not module.name.endswith("__main__"):
            results = doctest.testmod(importlib.import_module(module.name))
            assert results.failed == 0, module.name
            attempted += results.attempted
    assert attempted > 0
