"""From text to batches: `corpus` reads text files, `ids_file` tokenizes them, `windows` cuts.

Text is read once to be looked at (`survey`) and once more to become a file of ids (`write_ids`),
a block at a time. Training maps that file into memory (`read_ids`) and takes windows out of it
(`batches`, `evaluation_windows`), so neither text nor ids need fit in memory.
"""

from flaxgpt.data.corpus import Survey, TextFile, survey
from flaxgpt.data.ids_file import IdsFile, check_same_source, read_ids, write_ids
from flaxgpt.data.windows import BatchIterator, batches, count_windows, evaluation_windows

__all__ = [
    "BatchIterator",
    "IdsFile",
    "Survey",
    "TextFile",
    "batches",
    "check_same_source",
    "count_windows",
    "evaluation_windows",
    "read_ids",
    "survey",
    "write_ids",
]
