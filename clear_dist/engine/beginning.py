"""Checks of a generation that begins: all ranks draw the same picture with a model that can be run, or all refuse."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch

from clear_dist.comm.group import Group
from clear_dist.engine.agreement import adapters_of, fingerprint, require_equal_on_all_ranks, schedule_of
from clear_dist.engine.family import Family, Inputs
from clear_dist.engine.stock import require_supported


class Model(Protocol):
    """A model on stripes, as it is checked."""

    family: Family
    group: Group
    scheduler: Any


def require_same_generation(model: Model, inputs: Inputs, layers: Collection[str], alike: Mapping[str, Any]) -> None:
    """Raises as `require_equal_on_all_ranks`, which compares `alike` too; `layers` must have kept their processors."""
    family, group = model.family, model.group
    drawn, encoded = family.replicated(inputs)
    settings = {
        **alike,
        "adapters": adapters_of(family.transformer),
        "weights": fingerprint(family.transformer),
        "schedule": schedule_of(model.scheduler),
    }
    refusal = why_not(family, inputs, group.device, striped=model, layers=layers)
    require_equal_on_all_ranks(drawn, encoded, settings, group, refusal=refusal)


def why_not(
    family: Family, inputs: Inputs, device: torch.device, *, striped: object, layers: Collection[str]
) -> str | None:
    """Why this rank cannot run the model as it is now; the others must know before they wait for it."""
    try:
        require_supported(family.transformer, striped, layers, inputs)
    except ValueError as error:
        return str(error)
    if (found := family.latents(inputs).device) != device:
        return (
            f"the latents must be on {device}, where parallelize found the pipeline, got {found}; "
            "call parallelize after pipe.to(...)"
        )
    return None


def steps_of(scheduler: Any) -> int:
    """Steps of the generation that begins; image-to-image leaves the first ones out."""
    return len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or 0)
