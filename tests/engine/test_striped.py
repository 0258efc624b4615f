"""What a step hands over, and when: it does not grow with the height of the image, but for its join."""

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


def sent_before_each_mlp(group: Group) -> tuple[list[int], int]:
    """Messages handed over when each single block begins its MLP, and the number of double blocks."""
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, window=3, group=group)
    sent: list[int] = []

    def look(*_: Any) -> None:
        sent.append(sum(parallelized.counters.as_dict()["halo_messages_sent"]))

    for block in pipe.transformer.single_transformer_blocks:
        block.proj_mlp.register_forward_pre_hook(look)
    run(pipe, height=12, width=6, steps=1)
    return sent, len(pipe.transformer.transformer_blocks)


def test_a_single_block_sends_its_halos_before_its_mlp() -> None:
    for sent, double_blocks in run_ranks(sent_before_each_mlp, 2):  # one neighbour, so one message a layer
        assert sent == [double_blocks + number + 1 for number in range(len(sent))]
