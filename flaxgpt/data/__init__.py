"""Training data: text files to ids to batches.

`scan_texts` reads text files to learn their size and characters, and `write_ids` tokenizes them
into a file, block by block. `read_ids` maps that file into memory, and `batches` and
`evaluation_windows` take windows from it. Neither text nor ids need to fit in memory.
"""

from flaxgpt.data.corpus import TextFile, TextScan, scan_texts
from flaxgpt.data.token_file import TokenFile, check_same_source, read_ids, write_ids
from flaxgpt.data.windows import BatchIterator, batches, count_windows, evaluation_windows

__all__ = [
    "BatchIterator",
    "TextFile",
    "TextScan",
    "TokenFile",
    "batches",
    "check_same_source",
    "count_windows",
    "evaluation_windows",
    "read_ids",
    "scan_texts",
    "write_ids",
]
