"""Whether the flags that make a model fit on smaller GPUs can do so, and which of them change nothing."""

from collections.abc import Iterator

from clear_dist.config import PictureConfig, Refusal, Request
from clear_dist.preflight import devices


def check(config: PictureConfig) -> None:
    """Raises a Refusal where 8-bit weights lack their package."""
    if config.int8 and (missing := devices.missing_quantiser()):
        raise Refusal(f"--int8 needs {missing}, got none; nearest: without --int8")


def check_stages(request: Request) -> None:
    """Raises a Refusal where weights are in shards and a stage has no rows, or units of rows, for some of the ranks."""
    if not request.shard_weights:
        return
    smallest = min(request.stages, key=lambda stage: stage.height)
    units, together = smallest.height // request.unit, request.down_factor
    if units < request.world_size:
        rows = "rows of tokens" if together == 1 else f"times {together} rows of tokens, as down-sampled keys need them"
        raise Refusal(
            f"--shard-weights needs all ranks in every stage, and {smallest.width} x {smallest.height} pixels are "
            f"{units} {rows}, got {request.world_size} ranks; nearest: --nproc {units}"
        )


def without_effect(request: Request) -> Iterator[str]:
    """What to tell of flags that change nothing here."""
    if request.offload and request.device == "cpu":
        yield "--offload has no effect on a CPU: its memory is the host's"
    if request.shard_weights and request.world_size == 1:
        yield "--shard-weights has no effect on one rank"
