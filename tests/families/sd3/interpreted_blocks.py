"""SD3's blocks with our kernels beside diffusers' unmodified ones; `test_blocks.py` runs it in Triton's interpreter."""

from typing import Any
from unittest import mock

import pytest
import torch

from clear_dist import kernels
from clear_dist.engine import fused, parts
from clear_dist.parallelize import parallelize
from tests.families.sd3.tiny import POOLED_WIDTHS, TEXT_WIDTH, Kind, make_tiny_pipeline

ROWS, COLUMNS, TEXT = 4, 3, 5


def inputs(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 16, 2 * ROWS, 2 * COLUMNS, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(batch, sum(POOLED_WIDTHS), generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    }


@pytest.mark.parametrize("most_tokens", [parts.MOST_TOKENS, 7])
@pytest.mark.parametrize(("kind", "batch"), [("large", 2), ("medium", 1), ("3", 2)])
def test_blocks_compute_what_diffusers_do(
    kind: Kind, batch: int, most_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make_tiny_pipeline(kind)
    with torch.no_grad():
        (expected,) = pipe.transformer(**inputs(batch))
        assert kernels.usable("cpu")
        handle = parallelize(pipe, window="full")
        monkeypatch.setattr(parts, "MOST_TOKENS", most_tokens)
        with mock.patch.object(fused, "parts", None):  # none of torch's forms
            (found,) = pipe.transformer(**inputs(batch))
        handle.undo()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.equal(found, expected), "computed by kernels"
