"""Square windows on stripes against the unmodified transformer under a dense mask."""

import pytest
import torch
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline

HEIGHT, WIDTH = 13, 11
CASES = ((4, "rows"), (6, "rows"), (4, "columns"))


def run(pipe: object) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a lighthouse at dusk", height=16 * HEIGHT, width=16 * WIDTH, num_inference_steps=2, max_sequence_length=9,
        generator=torch.Generator().manual_seed(7), output_type="latent",
    ).images  # fmt: skip


def striped(group: Group) -> list[Tensor]:
    pipe, results = make_tiny_pipeline(), []
    for radius, cut in CASES:
        made = parallelize(pipe, group=group, window=radius, window_shape="square", text_attention="exact", cut=cut)
        results.append(run(pipe))
        made.undo()
    return results


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_draw_what_a_dense_mask_does(ranks: int) -> None:
    place = torch.arange(HEIGHT * WIDTH)
    row, column = place // WIDTH, place % WIDTH
    down, across = (row[:, None] - row).abs(), (column[:, None] - column).abs()
    results = run_ranks(striped, ranks)
    for index, (radius, _) in enumerate(CASES):
        pipe = make_tiny_pipeline()
        processor = DenseClearProcessor(HEIGHT, WIDTH, radius)
        circle, processor.seen = processor.seen, torch.maximum(down, across) < radius
        assert (processor.seen & ~circle).any()
        pipe.transformer.set_attn_processor(processor)
        expected = run(pipe)
        for latents in results:
            assert float((latents[index] - expected).norm() / expected.norm()) < 1e-4
