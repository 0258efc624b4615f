"""A VAE with a stride (F16) over stripes, and whole, against its makers' decoding in quarters written apart."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.engine.strided import fit_to_vae, scale_of, with_stride
from clear_dist.geometry import cut_in_stripes
from clear_dist.vae import decode_stripes, encode_stripes
from tests.ranks import run_ranks
from tests.ultraflux import made_official, make_ultraflux
from tests.vae.test_vae import FLUX_LIKE, draw, make_vae, mine

SCALE = 8
"""Pixels per latent: three widths, and the stride."""


def strided() -> Any:
    vae = make_vae(**FLUX_LIKE)
    vae.register_to_config(stride=2)
    return vae


def drawn(rows: int) -> tuple[Tensor, Tensor]:
    return draw(2, 4, 2 * rows, 6), draw(2, 3, 2 * rows * SCALE, 6 * SCALE)


def coded(group: Group, rows: int, max_bytes: int) -> tuple[Tensor, Tensor]:
    vae, stripes = with_stride(strided()), cut_in_stripes(rows, group.size)
    latents, pixels = (mine(whole, stripes, group) for whole in drawn(rows))
    decoded = decode_stripes(vae, latents, group, stripes, max_bytes=max_bytes)
    return decoded, encode_stripes(vae, pixels, group, stripes, max_bytes=max_bytes)


@torch.no_grad()
@pytest.mark.parametrize(("size", "rows", "max_bytes"), [(1, 3, 1), (1, 4, 60_000), (2, 3, 1 << 30), (3, 5, 1)])
def test_stripes_are_the_whole_picture_in_quarters(size: int, rows: int, max_bytes: int) -> None:
    found = [torch.cat(stripes, dim=2) for stripes in zip(*run_ranks(coded, size, rows, max_bytes), strict=True)]
    latents, pixels = drawn(rows)
    for vae in (made_official(strided()), with_stride(strided())):
        exact = vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters
        assert exact[0].shape == pixels.shape and exact[1].shape[2:] == latents.shape[2:]
        assert all(0.1 < whole.std() < 10 for whole in exact)
        torch.testing.assert_close(tuple(found), exact, atol=1e-4, rtol=0)


def test_a_pipeline_has_the_scale_of_its_vae() -> None:
    pipe = make_ultraflux()
    assert (pipe.vae_scale_factor, scale_of(pipe.vae)) == (8, 16)
    for _ in range(2):  # once is enough
        fit_to_vae(pipe)
        assert (pipe.vae_scale_factor, pipe.image_processor.config.vae_scale_factor) == (16, 32)
    with torch.no_grad():
        assert pipe.vae.encode(torch.zeros(1, 3, 32, 64)).latent_dist.mode().shape[2:] == (2, 4)
        pipe.vae.enable_tiling()
        assert pipe.vae.decode(torch.zeros(1, 16, 20, 12)).sample.shape[2:] == (320, 192)


def test_other_strides_are_refused() -> None:
    vae = strided()
    vae.register_to_config(stride=3)
    with pytest.raises(ValueError, match="the stride of a VAE must be 1 or 2, got 3; nearest: 2"):
        with_stride(vae)
