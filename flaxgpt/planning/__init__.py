"""Plans: what a compiler says about a program, without allocating its arrays or running it.

For TPU, with libtpu, on a machine that needs no TPU:

chips          TPU chips: clock, peak, memory and bandwidth
topology       devices that describe chips which are not attached
tasks          what to plan: `GenerateTask` and `TrainTask`
plan           `plan`: memory, estimated times and communication of a task
largest        the largest batch that fits
operations     estimated time of each operation
traffic        HBM traffic of each operation
kernels        compute cycles of Pallas kernels
model_parts    operations to parts of the model

For any devices:

program_text   the text of a compiled program, parsed
collectives    what the devices of a mesh send each other, read from a compiled program
step_cost      memory per device and communication of one training step
"""

from flaxgpt.planning.chips import CHIPS, Chip
from flaxgpt.planning.collectives import Collective, collectives
from flaxgpt.planning.largest import largest_batch_plan
from flaxgpt.planning.operations import Operation, StepTime
from flaxgpt.planning.plan import HbmUse, Plan, plan
from flaxgpt.planning.step_cost import StepCost, Unsplit, step_cost
from flaxgpt.planning.tasks import GenerateTask, TrainTask
from flaxgpt.planning.topology import topology_devices

__all__ = [
    "CHIPS",
    "Chip",
    "Collective",
    "GenerateTask",
    "HbmUse",
    "Operation",
    "Plan",
    "StepCost",
    "StepTime",
    "TrainTask",
    "Unsplit",
    "collectives",
    "largest_batch_plan",
    "plan",
    "step_cost",
    "topology_devices",
]
