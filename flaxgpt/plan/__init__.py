"""Plans: what the compiler says about a program, without allocating its arrays or running it.

collectives    what the devices of a mesh send each other, read from a compiled program
step_cost      memory per device and communication of one training step
"""

from flaxgpt.plan.collectives import Collective, collectives
from flaxgpt.plan.step_cost import StepCost, Unsplit, step_cost

__all__ = ["Collective", "StepCost", "Unsplit", "collectives", "step_cost"]
