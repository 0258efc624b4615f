"""FlexAttention's mask for the backward pass: the queries that visit each block of keys."""

import pytest
import torch

from clear_dist.attention.backend import Geometry
from clear_dist.attention.flex_mask import block_mask


@pytest.mark.parametrize(("rows", "columns", "text", "radius"), [(24, 40, 130, 5), (64, 64, 512, 8), (9, 17, 0, 40)])
def test_queries_of_each_block_are_those_that_visit_it(rows: int, columns: int, text: int, radius: int) -> None:
    mask = block_mask(Geometry(rows, rows, columns, text, radius, 0), torch.device("cpu"), trains=True)
    for counts, blocks, back_counts, back_blocks in (
        (mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices, mask.full_q_num_blocks, mask.full_q_indices),
    ):
        visits = {(q, int(k)) for q, n in enumerate(counts[0, 0]) for k in blocks[0, 0, q, :n]}
        back = {(int(q), k) for k, n in enumerate(back_counts[0, 0]) for q in back_blocks[0, 0, k, :n]}
        assert back == visits
