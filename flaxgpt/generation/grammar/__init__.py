"""Text that matches a regular expression, guaranteed by the ids that may be chosen.

characters  sets of characters, as bytes
regex       a pattern to an automaton that reads bytes
tokens      from bytes to the ids of a tokenizer, as a table
hook        the table as a hook of the decoding loop
"""

from flaxgpt.generation.grammar.tokens import Grammar, compile_grammar

__all__ = ["Grammar", "compile_grammar"]
