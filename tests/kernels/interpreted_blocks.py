"""FLUX's blocks with our kernels beside diffusers' unmodified ones; `test_elementwise.py` runs it in the interpreter."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from clear_dist import kernels
from clear_dist.engine import fused, parts
from clear_dist.engine.fused import Fused
from clear_dist.parallelize import parallelize
from tests.tiny import CLIP_WIDTH, T5_WIDTH, make_tiny_pipeline

ROWS, COLUMNS, TEXT = 4, 3, 5


def inputs(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, ROWS * COLUMNS, 64, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, T5_WIDTH, generator=generator),
        "pooled_projections": torch.randn(batch, CLIP_WIDTH, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


@pytest.mark.parametrize("most_tokens", [parts.MOST_TOKENS, 7])
@pytest.mark.parametrize(("batch", "heads", "head_dim"), [(1, 2, 16), (2, 3, 24)])
def test_blocks_compute_what_diffusers_do(
    batch: int, heads: int, head_dim: int, most_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make_tiny_pipeline(double_blocks=2, single_blocks=2, heads=heads, head_dim=head_dim)
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


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Shifted(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_what_the_kernels_do_not_know_is_left_to_torch() -> None:
    """Other norms, those that others have hooks on, and other activations."""
    hooked = nn.LayerNorm(32, elementwise_affine=False)
    hooked.register_forward_hook(lambda module, given, output: output + 1)
    ours, theirs = Fused().parts, parts.Parts()
    x, (shift, scale), turns = torch.randn(1, 3, 32), torch.randn(2, 1, 32), torch.randn(2, 3, 16)
    with torch.no_grad():
        for norm in (hooked, Doubled(32, elementwise_affine=False), nn.LayerNorm(32)):
            assert torch.equal(ours.modulate(norm, x, shift, scale), theirs.modulate(norm, x, shift, scale))
        for norm in (Shifted(16), nn.RMSNorm(16), nn.Identity(), nn.LayerNorm(16)):
            found, expected = torch.empty(2, 1, 3, 2, 16)
            ours.rotate([(nn.Identity(), norm)], x, *turns, found)
            theirs.rotate([(nn.Identity(), norm)], x, *turns, expected)
            assert torch.equal(found, expected)
        pair = [(nn.Identity(), nn.RMSNorm(16, eps=eps)) for eps in (1e-6, 1e-1)]
        (found, other), (expected, theirs_other) = torch.empty(2, 2, 1, 3, 2, 16)
        ours.rotate(pair, x, *turns, found, other)
        theirs.rotate(pair, x, *turns, expected, theirs_other)
        assert torch.equal(found, expected) and torch.equal(other, theirs_other), "norms that are not alike"
        found, expected = torch.empty(2, 1, 3, 32)
        ours.widen(nn.Identity(), nn.GELU(), x, found)
        theirs.widen(nn.Identity(), nn.GELU(), x, expected)
        assert torch.equal(found, expected)
    double = x.double(), shift.double(), scale.double()
    assert ours.modulate(nn.LayerNorm(32, elementwise_affine=False), *double).dtype == torch.float64
