"""`flaxgpt plot`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import flaxgpt
from flaxgpt._checks import check_size
from flaxgpt._files import write_file_atomically
from flaxgpt.cli.common import load_with_tokenizer, say
from flaxgpt.config import PRESETS, GPTConfig
from flaxgpt.inspection.gradients import gradient_norms
from flaxgpt.inspection.plots import (
    attention_maps,
    lens_table,
    lines_by_depth,
    parameter_shares,
    to_png,
)
from flaxgpt.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw what a model does with a text, as a PNG file.

    attention: where each head looks. lens: what would come next, read off after each block.
    activations: how large the residual stream and its parts are, by block. gradients: how far the
    loss reaches back, with shortcuts and without. shares: what the parameters of the presets are
    spent on (no text).

    Examples:
      flaxgpt plot attention "The cat sat" --block 2 --out attention.png
      flaxgpt plot lens "Once upon a time" --out lens.png
    """

    kind: Annotated[
        Literal["attention", "lens", "activations", "gradients", "shares"], tyro.conf.Positional
    ]
    """Which picture."""

    text: Annotated[str | None, tyro.conf.Positional] = None
    """What the model reads."""

    out: str = ""
    """The file to write; the kind and .png unless given. One that is there is replaced."""

    model: str = "tales"
    """As for generate."""

    block: int | None = None
    """For attention, the only block to draw, counted from 0; all of them unless given."""

    def run(self) -> None:
        """Draws, and prints where the picture is."""
        out = Path(self.out or f"{self.kind}.png").expanduser()
        if out.is_dir():
            raise IsADirectoryError(f"--out {self.out} is a folder: name a .png file in it")
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out {self.out} must end in .png")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"--out {self.out}: there is no folder {out.parent}")
        if self.block is not None and self.kind != "attention":
            raise ValueError(f"--block does nothing for {self.kind}: leave it out")
        if self.kind == "shares":
            if self.text is not None:
                raise ValueError("shares draws the presets and reads no text: leave it out")
            figure = parameter_shares({name: GPTConfig.preset(name) for name in PRESETS})
        else:
            if not self.text:
                raise ValueError(
                    f'no text: give what the model reads, as flaxgpt plot {self.kind} "The cat sat"'
                )
            if self.block is not None:
                check_size("--block", self.block, 0)
            cfg, params, tokenizer = load_with_tokenizer(self.model)
            ids = np.array([tokenizer.encode(self.text)])
            if ids.size > cfg.context_length:
                raise ValueError(
                    f"the text is {ids.size} tokens and {self.model} reads {cfg.context_length} at "
                    "most: give a shorter one"
                )
            figure = self._figure(cfg, params, tokenizer, ids)
        write_file_atomically(out, to_png(figure))
        say(f"{out}\n")

    def _figure(self, cfg: GPTConfig, params: Any, tokenizer: Tokenizer, ids: np.ndarray) -> Any:
        tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
        title = f"{self.model}: {self.text!r}" if len(self.text or "") < 60 else self.model
        if self.kind == "attention":
            if self.block is not None and self.block >= cfg.n_layers:
                raise ValueError(f"--block {self.block}: {self.model} has {cfg.n_layers} blocks")
            chosen = range(cfg.n_layers) if self.block is None else [self.block]
            names = [f"trf_blocks_{i}/att/weights" for i in chosen]
            found = flaxgpt.activations(cfg, params, ids, select=names)
            maps = np.stack([found[name][0] for name in names])
            if self.block is None:
                return attention_maps(maps, tokens, title)
            return attention_maps(maps[0], tokens, f"{title}, block {self.block}")
        if self.kind == "lens":
            lens = flaxgpt.logit_lens(cfg, params, ids)[:, 0]
            return lens_table(lens, tokens, lambda token: tokenizer.decode([token]), title)
        if self.kind == "gradients":
            curves = {
                "with shortcuts": gradient_norms(cfg, params, ids),
                "without": gradient_norms(cfg, params, ids, shortcuts=False),
            }
            return lines_by_depth(curves, "norm of the loss's gradient", title)
        parts = {"residual stream": "", "attention adds": "/att", "feed-forward adds": "/ff"}
        blocks = [f"trf_blocks_{i}" for i in range(cfg.n_layers)]
        wanted = [block + part for block in blocks for part in parts.values()]
        found = flaxgpt.activations(cfg, params, ids, select=wanted)
        sizes = {
            name: jax.device_get(
                jnp.stack([jnp.sqrt(jnp.square(found[block + part]).mean()) for block in blocks])
            )
            for name, part in parts.items()
        }
        return lines_by_depth(sizes, "root mean square", title)
