"""Arrays on several devices: one model, one step, over a mesh of devices.

mesh         the devices as a grid with three named axes
rules        which axes split each parameter: a table, and the functions that apply it
constrain    which axes split each activation: a table of dimension letters
per_device   functions that each device runs on its part, such as kernels
gather       arrays of several processes, brought together
automatic    arrays on meshes that users make, with automatic or explicit axes

The mesh decides what is split; the values do not depend on it beyond rounding. Nothing else in
flaxgpt names an axis of a mesh.
"""

from flaxgpt.sharding.automatic import automatic, to_automatic
from flaxgpt.sharding.constrain import (
    activation_sharding,
    batch_parts,
    constrain,
    gather_weight,
    in_force,
    place_rows,
    replicated,
    share_of_rows,
)
from flaxgpt.sharding.gather import gather_on_first, is_shared, wait_for_all
from flaxgpt.sharding.mesh import Mesh, axis_names, check_mesh, make_mesh, mesh_of, parse_mesh
from flaxgpt.sharding.per_device import per_device
from flaxgpt.sharding.rules import (
    ShardRules,
    check_rules,
    constrain_tree,
    place,
    rules_of,
    shard,
    shard_rules,
)

__all__ = [
    "Mesh",
    "ShardRules",
    "activation_sharding",
    "automatic",
    "axis_names",
    "batch_parts",
    "check_mesh",
    "check_rules",
    "constrain",
    "constrain_tree",
    "gather_on_first",
    "gather_weight",
    "in_force",
    "is_shared",
    "make_mesh",
    "mesh_of",
    "parse_mesh",
    "per_device",
    "place",
    "place_rows",
    "replicated",
    "rules_of",
    "shard",
    "shard_rules",
    "share_of_rows",
    "to_automatic",
    "wait_for_all",
]
