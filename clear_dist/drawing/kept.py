"""Clean latents that a stage's last steps expect, kept on stripes for the steps of the next stage.

Stripes are runs of positions in raster order, so that there are some for any number of ranks.
Shapes: B pictures, C channels, P positions of this rank, H rows and W columns of latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.rows import StripeJoin, collect_stripes, move_rows
from clear_dist.geometry import Rows, cut_in_stripes
from clear_dist.stages import Size, Stage, Upscaling


@dataclass
class Kept:
    """What one rank keeps of the last `steps` of a stage's `count` steps, drawn by `ranks` ranks."""

    steps: int
    count: int
    rank: int
    ranks: int
    level: int
    """Refinements up to this stage; 0: it is none."""
    size: Size = field(default=(0, 0), init=False)
    """Rows and columns of latents."""
    sigmas: list[Tensor] = field(default_factory=list, init=False)
    clean: list[Tensor] = field(default_factory=list, init=False)

    @classmethod
    def of(cls, stage: Stage, steps: int, below: "Below | None", rank: int, ranks: int) -> "Kept | None":
        """What a stage keeps of its last `steps` steps; None for none."""
        level = below.level if below is not None else int(isinstance(stage.sampling, Upscaling))
        count = stage.sampling.steps
        return cls(steps=steps, count=count, rank=rank, ranks=ranks, level=level) if steps else None

    def __call__(self, index: int, sigma: Tensor, clean_BCHW: Tensor) -> None:
        """Keep this rank's part of what step `index` expects, float32."""
        if index < self.count - self.steps or self.rank >= self.ranks:
            return
        self.size = clean_BCHW.shape[2], clean_BCHW.shape[3]
        mine = cut_in_stripes(self.size[0] * self.size[1], self.ranks)[self.rank]
        self.sigmas.append(sigma)
        self.clean.append(clean_BCHW.flatten(2)[..., mine.relative_to(0)].clone())

    def collected(self, group: Group) -> tuple[Tensor | None, dict[str, Any]]:
        """On rank 0 whole pictures [positions, steps x B, C], and on all ranks, which call this, the rest of it."""
        about = {
            "steps": self.steps,
            "count": self.count,
            "level": self.level,
            "size": self.size,
            "sigmas": [float(sigma) for sigma in self.sigmas],
            "shape": [len(self.clean) * len(self.clean[0]), self.clean[0].shape[1]] if self.clean else [0, 0],
        }
        about = group.broadcast_object(about)  # rank 0 has always taken part
        mine = torch.cat(self.clean).permute(2, 0, 1) if self.clean else torch.empty(0)
        heights = by_rank(about["size"][0] * about["size"][1], self.ranks, group.size) if about["sigmas"] else ()
        parts = list(collect_stripes(mine, group, tuple(map(len, heights)))) if heights else []
        return torch.cat(parts) if parts else None, about

    def put_back(self, whole: Tensor | None, about: Mapping[str, Any], group: Group, counters: Counters) -> None:
        """Take this rank's part of what rank 0 has `collected` on any number of ranks; all ranks call this."""
        self.size = about["size"][0], about["size"][1]
        self.sigmas = [torch.tensor(sigma) for sigma in about["sigmas"]]
        if not self.sigmas:
            return
        have, want = (by_rank(self.size[0] * self.size[1], ranks, group.size) for ranks in (1, self.ranks))
        moved_BCP1 = move_rows(
            None if whole is None else whole.to(group.device).permute(1, 2, 0)[..., None],
            group,
            have,
            want,
            shape=(*about["shape"], 1),
            dtype=torch.float32,
            counters=counters,
        )
        self.clean = list(moved_BCP1[..., 0].chunk(len(self.sigmas)))


class Below:
    """The steps of the stage below, as the ranks of a stage go by them."""

    def __init__(self, kept: Kept, everyone: Group, part: Group, ranks: int, counters: Counters) -> None:
        """All of `everyone` call this; the first `ranks`, of `part`, go on to call `expected`."""
        shape = tuple(kept.clean[0].shape[:2]) if kept.clean else None
        mine = kept.size, [float(sigma) for sigma in kept.sigmas], shape
        self._size, sigmas, (self._batch, channels) = everyone.broadcast_object(mine)  # rank 0 has always taken part
        self.sigmas: Sequence[float] = sigmas
        self.level = kept.level + 1
        positions = self._size[0] * self._size[1]
        have, want = (by_rank(positions, count, everyone.size) for count in (kept.ranks, ranks))
        self._clean = move_rows(
            torch.cat(kept.clean)[..., None] if kept.clean else None,
            everyone,
            have,
            want,
            shape=(len(sigmas) * self._batch, channels, 1),
            dtype=torch.float32,
            counters=counters,
        )
        self._join = StripeJoin(part, want[:ranks], counters) if everyone.rank < ranks else None

    @classmethod
    def of(cls, kept: Kept | None, everyone: Group, part: Group, ranks: int, counters: Counters) -> "Below | None":
        return None if kept is None else cls(kept, everyone, part, ranks, counters)

    def expected(self, index: int, size: Size) -> Tensor:
        """Clean latents [B, C, *size] that step `index` of those kept expected, enlarged; all of the stage's ranks."""
        assert self._join is not None, "this rank is idle"
        mine_BPC = self._clean[index * self._batch :][: self._batch, ..., 0].transpose(1, 2).contiguous()
        low_BCHW = self._join.join(mine_BPC).transpose(1, 2).unflatten(2, self._size)
        return F.interpolate(low_BCHW, size, mode="bicubic", align_corners=False)


def by_rank(positions: int, ranks: int, everyone: int) -> tuple[Rows, ...]:
    """Stripes of the first `ranks` ranks, none for the others."""
    return (*cut_in_stripes(positions, ranks), *(Rows(0, 0),) * (everyone - ranks))
