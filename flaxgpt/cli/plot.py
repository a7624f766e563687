"""`flaxgpt plot`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import flaxgpt
from flaxgpt._checks import check_size
from flaxgpt._files import write_file_atomically
from flaxgpt.cli.common import load_with_tokenizer, say
from flaxgpt.cli.streams import check_text
from flaxgpt.config import PRESETS, GPTConfig
from flaxgpt.inspection import gradient_norms, plots

_STREAMS = {"residual stream": "", "attention output": "/att", "feed-forward output": "/ff"}


@dataclasses.dataclass(frozen=True)
class PlotCommand:
    """Plot what a model computes for a text, as a PNG file.

    attention: attention weights of each head. lens: the most likely next token after each block.
    activations: size of the residual stream and of what is added to it, by block. gradients: norm
    of the gradient by block, with and without shortcuts. shares: parameters of the presets by part
    (no text).

    Examples:
      flaxgpt plot attention "The cat sat" --block 2 --out attention.png
      flaxgpt plot lens "Once upon a time" --out lens.png
    """

    kind: Annotated[
        Literal["attention", "lens", "activations", "gradients", "shares"], tyro.conf.Positional
    ]
    """Kind of plot."""

    text: Annotated[str | None, tyro.conf.Positional] = None
    """Input text."""

    out: str = ""
    """File to write, or to replace; the kind with .png by default."""

    model: str = "tales"
    """A model, as for generate."""

    block: int | None = None
    """For attention, the block to draw, counted from 0; all blocks by default."""

    def run(self) -> None:
        """Write the plot, and print its path."""
        out = Path(self.out or f"{self.kind}.png").expanduser()
        if out.is_dir():
            raise IsADirectoryError(f"--out {self.out} is a folder: give the path of a .png file")
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out {self.out} must end in .png")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"--out {self.out}: there is no folder {out.parent}")
        if self.block is not None and self.kind != "attention":
            raise ValueError(f"--block has no effect on {self.kind}: omit it")
        if self.kind == "shares":
            if self.text is not None:
                raise ValueError("shares plots the presets and takes no text: omit it")
            figure = plots.parameter_shares({name: GPTConfig.preset(name) for name in PRESETS})
        else:
            figure = self._plot_text()
        write_file_atomically(out, plots.to_png(figure))
        say(f"{out}\n")

    def _plot_text(self) -> Any:
        if not self.text:
            example = f'flaxgpt plot {self.kind} "The cat sat"'
            raise ValueError(f"no text: give an input text, as in {example}")
        text = check_text("the text", self.text)
        if self.block is not None:
            check_size("--block", self.block, 0)
        cfg, params, tokenizer = load_with_tokenizer(self.model)
        if self.block is not None and self.block >= cfg.n_layers:
            raise ValueError(f"--block {self.block}: {self.model} has {cfg.n_layers} blocks")
        ids = np.array([tokenizer.encode(text)])
        if ids.size > cfg.context_length:
            raise ValueError(
                f"the text has {ids.size} tokens, but {self.model} reads at most "
                f"{cfg.context_length}: give a shorter text"
            )
        tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
        title = f"{self.model}: {text!r}" if len(text) < 60 else self.model
        blocks = cfg.block_names if self.block is None else (cfg.block_names[self.block],)
        match self.kind:
            case "attention":
                names = [f"{block}/att/weights" for block in blocks]
                found = flaxgpt.activations(cfg, params, ids, select=names)
                maps = np.stack([found[name][0] for name in names])
                if self.block is not None:
                    maps, title = maps[0], f"{title}, block {self.block}"
                return plots.attention_maps(maps, tokens, title)
            case "lens":
                lens = flaxgpt.logit_lens(cfg, params, ids)[:, 0]
                return plots.lens_table(lens, tokens, lambda id: tokenizer.decode([id]), title)
            case "gradients":
                curves = {
                    "with shortcuts": gradient_norms(cfg, params, ids),
                    "without shortcuts": gradient_norms(cfg, params, ids, shortcuts=False),
                }
                return plots.lines_by_depth(curves, "norm of the gradient of the loss", title)
            case _:
                names = [block + part for block in blocks for part in _STREAMS.values()]
                found = flaxgpt.activations(cfg, params, ids, select=names)
                sizes = {
                    label: np.sqrt([np.square(found[block + part]).mean() for block in blocks])
                    for label, part in _STREAMS.items()
                }
                return plots.lines_by_depth(sizes, "root mean square", title)
