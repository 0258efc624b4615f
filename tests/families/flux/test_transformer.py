import pytest
import torch

from clear_dist.engine.references import raster_ids
from clear_dist.families.flux.transformer import Flux
from tests.tiny import make_tiny_pipeline


@pytest.fixture(scope="module")
def family() -> Flux:
    return Flux(make_tiny_pipeline().transformer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(13, 11), (11, 13), (1, 7), (7, 1), (512, 3), (3, 512)])
def test_the_grid_is_read_from_ids(family: Flux, height: int, width: int, dtype: torch.dtype) -> None:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).to(dtype)
    assert family.grid_of({"img_ids": ids}) == (height, width)
    assert family.grid_of({"img_ids": ids[None]}) == (height, width)


def test_ids_are_exact_where_bfloat16_is_not() -> None:
    assert len(raster_ids(512, 1, torch.device("cpu"))[:, 1].unique()) == 512


@pytest.mark.parametrize("change", ["reference image first", "references alone", "shuffled", "cut"])
def test_other_ids_are_refused(family: Flux, change: str) -> None:
    ids = raster_ids(4, 5, torch.device("cpu"))
    changed = {
        "reference image first": torch.cat([ids + torch.tensor([1.0, 0.0, 0.0]), ids]),
        "references alone": ids + torch.tensor([1.0, 0.0, 0.0]),
        "shuffled": ids.flip(0),
        "cut": ids[:-1],
    }[change]
    with pytest.raises(ValueError, match="one image in raster order"):
        family.grid_of({"img_ids": changed})
