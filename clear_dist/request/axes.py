"""Checks of the axes that ranks are shared out along: data, guidance and stripes."""

from clear_dist.options import Refusal
from clear_dist.request.request import Request


def check_axes(request: Request) -> None:
    """Raises a Refusal for data ranks that do not divide the ranks, or guidance ranks without halves or guidance."""
    ranks, groups = request.world_size, request.data_ranks
    if ranks % groups:
        nearest = max(divisor for divisor in range(1, groups) if ranks % divisor == 0)
        raise Refusal(f"--data-ranks must divide the number of ranks, {ranks}, got {groups}; nearest: {nearest}")
    if request.halves(request.ranks) and not request.is_guided:
        raise Refusal(
            f"--guidance-ranks 2 needs classifier-free guidance, --negative-prompt and --true-cfg-scale above 1, and "
            f"{request.model_name} draws without here; nearest: --guidance-ranks 1"
        )


def check_groups(request: Request) -> None:
    """Raises a Refusal for more data groups than pictures."""
    pictures = len(request.prompts) * request.num_images
    if request.data_ranks > pictures:
        nearest = max(groups for groups in range(1, pictures + 1) if request.world_size % groups == 0)
        raise Refusal(
            f"--data-ranks must be at most the number of pictures, {pictures}, got {request.data_ranks}; "
            f"nearest: {nearest}"
        )
