"""Scorers: each turns batches of pictures into some of the figures, by torchmetrics.

Shapes: B pictures, H x W pixels, D features.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clear_dist.evaluate.figures import Figure
from clear_dist.evaluate.scores import likeness

FEWEST_FOR_FID, FEWEST_FOR_IS = 1_000, 100
"""The paper computes FID with 1,000 pictures; where features are few, a covariance of full rank needs fewer."""
SPLITS = 10
"""Parts of the set that IS is the mean over."""
LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as Pillow's grey."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Bytes [B, H, W, 3] of pictures of one size, and what they are compared with; None: nothing."""

    pictures: Tensor
    others: Tensor | None = None
    conditions: Tensor | None = None
    captions: Sequence[str] | None = None


class Scorer(Protocol):
    def add(self, batch: Batch) -> Mapping[str, Sequence[float]]:
        """Figures of each picture, by name."""
        ...

    def of_set(self) -> Mapping[str, Figure]:
        """Figures that only all pictures together have."""
        ...


class OfEach:
    """A scorer without figures of the set."""

    def of_set(self) -> Mapping[str, Figure]:
        return {}


class Pixels(OfEach):
    """PSNR, SSIM and MS-SSIM."""

    def add(self, batch: Batch) -> Mapping[str, Sequence[float]]:
        if batch.others is None:
            return {}
        found = likeness(batch.pictures, batch.others)
        return {"psnr": found.psnr, "ssim": found.ssim} | ({} if found.ms_ssim is None else {"ms_ssim": found.ms_ssim})


class Conditions(OfEach):
    """RMSE, from 0 to 1, between a condition and the same operation on the drawn picture."""

    def __init__(self, condition: str) -> None:
        self._made: Callable[[Tensor], Tensor] = {"same": lambda x: x, "gray": gray}[condition]

    def add(self, batch: Batch) -> Mapping[str, Sequence[float]]:
        from torchmetrics.functional import mean_squared_error

        if batch.conditions is None:
            return {}
        made, given = (x.double().flatten(1).T for x in (self._made(batch.pictures), batch.conditions))
        errors = mean_squared_error(made / 255, given / 255, squared=False, num_outputs=made.shape[1])
        return {"rmse": errors.reshape(-1).tolist()}


class Perceived(OfEach):
    """LPIPS by a network that takes two batches [B, 3, H, W] from 0 to 1, with `normalize`."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @torch.inference_mode()
    def add(self, batch: Batch) -> Mapping[str, Sequence[float]]:
        if batch.others is None:
            return {}
        pair = (x.movedim(-1, 1).float() / 255 for x in (batch.pictures, batch.others))
        return {"lpips": self._network(*pair, normalize=True).reshape(-1).tolist()}


class Seen(OfEach):
    """DINO: 100 x cosine between features of a picture and of its other."""

    def __init__(self, seen: Callable[[Tensor], Tensor]) -> None:
        """`seen`: features [B, D] of bytes [B, H, W, 3]."""
        self._seen = seen

    @torch.inference_mode()
    def add(self, batch: Batch) -> Mapping[str, Sequence[float]]:
        if batch.others is None:
            return {}
        return {"dino": cosines(self._seen(batch.pictures), self._seen(batch.others))}


class Captioned(OfEach):
    """CLIP-I, and CLIP-T: the cosines of pictures and their others, and of pictures and their captions."""

    def __init__(self, seen: Callable[[Tensor], Tensor], read: Callable[[Sequence[str]], Tensor]) -> None:
        """`read`: features [B, D] of captions."""
        self._seen, self._read = seen, read

    @torch.inference_mode()
    def add(self, batch: Batch) -> Mapping[str, Sequence[float]]:
        found, features = {}, self._seen(batch.pictures)
        if batch.others is not None:
            found["clip_i"] = cosines(features, self._seen(batch.others))
        if batch.captions is not None:
            found["clip_t"] = cosines(features, self._read(batch.captions))
        return found


class Distribution:
    """FID between pictures and others, and IS of pictures, by one network.

    It takes bytes [B, 3, H, W] and gives features [B, D] with `return_features`, else probabilities of classes without
    the last layer's bias, with `no_output_bias`, as StyleGAN's TorchScript file of Inception does.
    """

    def __init__(self, network: Any, *, features: int, compares: bool) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        self._network, self._compares, self._count = network, compares, 0
        self._fewest = min(FEWEST_FOR_FID, features + 1)
        given = nn.Identity()
        given.num_features = features  # type: ignore[assignment]  # how torchmetrics learns it
        self._fid = FrechetInceptionDistance(feature=given)
        with warnings.catch_warnings(action="ignore"):  # it keeps classes of all pictures: 4 kB each
            self._score = InceptionScore(feature=given, splits=SPLITS)

    @torch.inference_mode()
    def add(self, batch: Batch) -> Mapping[str, Sequence[float]]:
        self._count += len(batch.pictures)
        pictures = batch.pictures.movedim(-1, 1)
        shares = self._network(pictures, no_output_bias=True).cpu()
        self._score.update(shares.clamp_min(torch.finfo(shares.dtype).tiny).log())
        if batch.others is not None:
            self._fid.update(self._network(batch.others.movedim(-1, 1), return_features=True).cpu(), real=True)
            self._fid.update(self._network(pictures, return_features=True).cpu(), real=False)
        return {}

    def of_set(self) -> Mapping[str, Figure]:
        few = f"needs {{}} pictures, got {self._count}"
        found = {"is": Figure(value=None, note=few.format(FEWEST_FOR_IS))}
        if self._count >= FEWEST_FOR_IS:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)  # torchmetrics shuffles pictures
                found["is"] = Figure(value=float(self._score.compute()[0]))
        if self._compares and self._count >= self._fewest:
            found["fid"] = Figure(value=float(self._fid.compute()))
        elif self._compares:
            found["fid"] = Figure(value=None, note=few.format(self._fewest))
        return found


def cosines(features: Tensor, others: Tensor) -> list[float]:
    from torchmetrics.functional import cosine_similarity

    return (100 * cosine_similarity(features.double(), others.double(), reduction="none")).tolist()


def gray(pictures: Tensor) -> Tensor:
    """Luma of bytes [B, H, W, 3] on all three channels."""
    weights = torch.tensor(LUMA, dtype=torch.float64, device=pictures.device)
    return (pictures.double() @ weights).round()[..., None].expand(pictures.shape)
