"""What a step hands over does not grow with the height of the image, but for its join."""

from typing import Any

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.ranks import run_ranks
from tests.test_parallelize import run
from tests.tiny import make_tiny_pipeline


def counted_at_two_heights(group: Group, text_attention: str) -> dict[str, list[Any]]:
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, window=3, text_attention=text_attention, group=group)
    for height in (12, 24):
        run(pipe, height=height, width=6, steps=1)
    return parallelized.counters.as_dict()


def test_only_the_join_grows_with_the_image() -> None:
    for text_attention in ("average", "exact"):
        for counted in run_ranks(counted_at_two_heights, 2, text_attention):
            for name in ("text_bytes_reduced", "halo_bytes_sent", "halo_messages_sent"):
                low, high = counted[name]
                assert low == high > 0
            low, high = counted["join_bytes"]
            assert high == 2 * low
