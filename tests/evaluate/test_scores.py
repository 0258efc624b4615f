"""Scores of pictures against figures computed apart."""

import sys

import numpy as np
import pytest
import torch

from clear_dist.evaluate.scores import likeness
from clear_dist.options import Refusal


def noisy(pictures: torch.Tensor, most: int) -> torch.Tensor:
    return (pictures.int() + torch.randint(-most, most + 1, pictures.shape)).clamp(0, 255).to(torch.uint8)


def test_likeness_of_each_picture() -> None:
    references = torch.randint(0, 256, (3, 176, 192, 3), dtype=torch.uint8)
    pictures = torch.cat([references[:1], noisy(references[1:2], 5), noisy(references[2:], 60)])
    found = likeness(pictures, references)
    assert found.psnr[0] == np.inf and found.ssim[0] == pytest.approx(1)
    for index in (1, 2):
        errors = pictures[index].double() - references[index].double()
        assert found.psnr[index] == pytest.approx(10 * np.log10(255**2 / float(errors.square().mean())))
    assert found.ms_ssim is not None
    for values in (found.psnr, found.ssim, found.ms_ssim):
        assert values[0] > values[1] > values[2]
    summary = found.summary()
    assert (summary["psnr"], summary["worst_psnr"]) == (found.psnr[1], found.psnr[2])
    assert found.summary().keys() == {f"{worst}{name}" for worst in ("", "worst_") for name in vars(found)}
    alone = likeness(pictures[1:2], references[1:2])
    assert [alone.psnr, alone.ssim] == [pytest.approx(found.psnr[1:2]), pytest.approx(found.ssim[1:2])]


def test_small_pictures_have_one_scale() -> None:
    references = torch.randint(0, 256, (2, 64, 160, 3), dtype=torch.uint8)
    found = likeness(noisy(references, 5), references)
    assert found.ms_ssim is None and "ms_ssim" not in found.summary()


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\] like their references"):
        likeness(pictures, pictures[:, :32])
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(
        Refusal, match=r"need the package torchmetrics, .* nearest: pip install 'clear-dist\[evaluate\]'"
    ):
        likeness(pictures, pictures)
