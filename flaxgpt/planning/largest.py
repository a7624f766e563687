"""The largest batch that fits: a search that compiles a task for one batch after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from flaxgpt.config import GPTConfig
from flaxgpt.planning.plan import Plan, plan
from flaxgpt.planning.tasks import GenerateTask, TrainTask, check_inputs
from flaxgpt.planning.topology import topology_mesh

_STEPS_PER_OCTAVE = 8
_MOST = 2**20


def largest_batch_plan(
    cfg: GPTConfig,
    task: GenerateTask | TrainTask,
    *,
    topology: str = "v5e:1x1",
    mesh: Mapping[str, int] | None = None,
    tried: Callable[[Plan], None] = lambda plan: None,
) -> Plan:
    """Return the plan with the largest batch that fits, or with the smallest if none fits.

    Batches are multiples of what the mesh and `accumulate` divide them into, up to 8 times that,
    and beyond 8 sizes between one power of two and the next, so that few programs are compiled: the
    result is at most an eighth too small. Memory is taken to grow evenly with the batch to guess
    the next size to try.

    Args:
        cfg: the architecture.
        task: the task, whose batch is where the search begins.
        topology: the chips, as for `plan`.
        mesh: sizes of the mesh, as for `plan`.
        tried: called with the plan for every batch that was compiled.

    Raises:
        ValueError: as for `plan`.
    """
    check_inputs(cfg, task)
    unit = task.unit(topology_mesh(topology, mesh))
    plans: dict[int, Plan] = {}

    def compiled(place: int) -> Plan:
        if place not in plans:
            sized = dataclasses.replace(task, batch=unit * batch_at(place))
            plans[place] = plan(cfg, sized, topology=topology, mesh=mesh)
            tried(plans[place])
        return plans[place]

    start = place_of(max(1, task.batch // unit))
    best = search(lambda place: compiled(place).hbm.fits, lambda place: _guess(plans, unit), start)
    return compiled(max(best, 0))


def batch_at(place: int) -> int:
    """Return the batch at a place of 1, 2, ... 8, 9, ... 16, 18, ... 32, 36, ...

    >>> [batch_at(place) for place in (0, 7, 15, 16, 23, 24)]
    [1, 8, 16, 18, 32, 36]
    """
    octave, rest = divmod(place, _STEPS_PER_OCTAVE)
    return place + 1 if octave == 0 else (_STEPS_PER_OCTAVE + 1 + rest) << (octave - 1)


def place_of(batch: int) -> int:
    """Return the place of the largest batch of `batch_at` that is not larger."""
    place = 0
    while batch_at(place + 1) <= batch:
        place += 1
    return place


def search(fits: Callable[[int], bool], guess: Callable[[int], int | None], start: int) -> int:
    """Return the largest place that fits, or -1, for `fits` that is true up to some place.

    Args:
        fits: whether a place fits; costly.
        guess: a place that may be the largest, given the number of places tried, or None.
        start: the first place to try.
    """
    low, high, tries = -1, place_of(_MOST), 0
    place = start
    while low + 1 < high:
        tries += 1
        if fits(place):
            low = place
        else:
            high = place
        middle = (low + high) // 2 if high < place_of(_MOST) else 2 * max(low, 1) + 1
        guessed = guess(tries)
        place = min(max(middle if guessed is None else guessed, low + 1), high - 1)
    return low


def _guess(plans: Mapping[int, Plan], unit: int) -> int | None:
    """Return the place of the batch that would just fit, by a line through two known sizes."""
    known = sorted(
        (one.task.batch // unit, _used(one)) for one in plans.values() if one.hbm.temporaries
    )
    if not known:
        return None
    limit = next(iter(plans.values())).hbm.limit
    (n, low), (m, high) = known[0], known[-1]
    fixed = 0.0
    if m > n and high > low:
        slope = (high - low) / (m - n)
        fixed = low - slope * n
    else:
        slope = low / n
    return place_of(max(1, int((limit - fixed) / slope)))


def _used(one: Plan) -> int:
    return one.hbm.arguments + (one.hbm.temporaries or 0)
