"""What a request will take: stripes, memory, bytes, time; asked of the engine itself, without a GPU.

    asked    a settled request, and where it is to run
    engine   a process that runs the engine on tensors without values: asked by questions.py, answered by measure.py
    phases   what a rank holds in each phase: weights, and what the engine says
    traffic  bytes handed over, by the engine's counters
    timing   operations over assumed rates
    choice   stages that fewer ranks draw sooner
    fits     does it fit, and if not, what does

Nothing but `measure`, `stepped`, `built`, `allocated` and `emulated`, which are that process, imports torch.
"""

from clear_dist.plan.asked import PlanRequest
from clear_dist.plan.engine import Engine
from clear_dist.plan.fits import Change, Plan, Room, nearest
from clear_dist.request.hardware import GPUS, LINKS, Gpu, Link

__all__ = ["GPUS", "LINKS", "Change", "Engine", "Gpu", "Link", "Plan", "PlanRequest", "Room", "nearest"]
