import inspect

import flaxgpt
import flaxgpt.tokenizer


def test_the_public_names_are_in_the_order_data_flows():
    assert flaxgpt.__all__ == [
        "GPTConfig",
        "init",
        "book_params",
        "load",
        "save",
        "load_tokenizer",
        "GPT",
        "forward",
        "KVCache",
        "init_cache",
        "extend",
        "generate",
        "stream",
        "generate_text",
    ]


def test_every_public_name_explains_itself():
    for name in flaxgpt.__all__:
        item = getattr(flaxgpt, name)
        text = inspect.getdoc(item) or ""
        assert len(text) > 60, name
        if inspect.isfunction(item) or hasattr(item, "__wrapped__"):
            assert "Args:" in text, name
            assert "Returns" in text or "yields" in text or "Writes" in text, name


def test_the_configuration_comes_first_so_that_it_can_be_bound():
    for name in ("init", "book_params", "forward", "init_cache", "extend", "generate", "stream"):
        assert next(iter(inspect.signature(getattr(flaxgpt, name)).parameters)) == "cfg"


def test_no_public_function_swallows_arguments():
    for name in flaxgpt.__all__:
        item = getattr(flaxgpt, name)
        if inspect.isfunction(item):
            kinds = [p.kind for p in inspect.signature(item).parameters.values()]
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name
