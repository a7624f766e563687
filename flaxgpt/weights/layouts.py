"""The layouts that flaxgpt reads and writes. A new one is a module with a `Layout`, listed here."""

from flaxgpt.weights.book import BOOK
from flaxgpt.weights.huggingface import HUGGINGFACE

LAYOUTS = {"huggingface": HUGGINGFACE, "book": BOOK}
