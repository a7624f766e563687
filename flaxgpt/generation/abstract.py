"""The arguments of the decoding loop without their arrays, to compile it for other devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from flaxgpt._checks import check_context, check_dtype, check_size
from flaxgpt.config import GPTConfig
from flaxgpt.generation.decoding import Request
from flaxgpt.generation.loop_params import loop_params
from flaxgpt.generation.programs import Program
from flaxgpt.generation.prompts import Prepared, loop_sizes
from flaxgpt.model import param_shapes
from flaxgpt.platform import Platform
from flaxgpt.sharding import Mesh, ShardRules, batch_parts, shard_rules
from flaxgpt.typing import Params


def abstract_arguments(
    cfg: GPTConfig,
    batch: int,
    prompt_length: int,
    max_new_tokens: int,
    dtype: DTypeLike,
    *,
    platform: Platform,
    mesh: Mesh,
    rules: ShardRules | None = None,
    params: Params | None = None,
) -> Prepared:
    """Return what `generate` passes to its program, with a `jax.ShapeDtypeStruct` for each array.

    Args:
        cfg: the configuration.
        batch: rows (B).
        prompt_length: ids per prompt.
        max_new_tokens: new ids per row.
        dtype: dtype to compute in.
        platform: the choices for the devices of the mesh.
        mesh: the mesh, also for one device.
        rules: how to split the parameters, if not by `flaxgpt.shard_rules(cfg)`.
        params: shapes and dtypes of the parameters, if not `flaxgpt.model.param_shapes(cfg)`.

    Raises:
        ValueError: an argument is out of range.
    """
    batch = check_size("batch", batch)
    prompt_length = check_context(cfg.context_length, prompt_length)
    plan = loop_sizes(cfg, prompt_length, check_size("max_new_tokens", max_new_tokens))
    dtype = check_dtype(dtype)
    copies = -batch % batch_parts(mesh)  # every device gets as many rows
    whole = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    integer, real = array((), jnp.int32), array((), jnp.float32)
    request = Request(
        key=jax.eval_shape(partial(jax.random.key, 0)).update(sharding=whole),
        temperature=real,
        top_k=integer,
        top_p=real,
        stop_ids=array((8,), jnp.int32),
        prompt_length=integer,
        final_length=integer,
        rows=integer if copies else None,
    )
    platform = platform.over_devices() if mesh.size > 1 else platform
    params = param_shapes(cfg) if params is None else params
    params = jax.eval_shape(partial(loop_params, platform, dtype), params)
    shardings = (rules or shard_rules(cfg)).shardings(params, mesh)
    params = jax.tree.map(lambda leaf, s: leaf.update(sharding=s), params, shardings)
    program = Program(cfg, plan, platform, dtype, mesh if mesh.size > 1 else None)
    ids = array((batch + copies, plan.prompt_width), jnp.int32)
    return Prepared(program, params, request, ids, array((batch + copies,), jnp.int32))
