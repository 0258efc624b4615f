"""Reference images, of models that edit: tokens after the picture's, which are cut and attended to like text.

All ranks have all of them, or each its share, as of the text, which they follow; windows and halos are the picture's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clear_dist.engine.cut import Cut, joined_tokens
from clear_dist.engine.heads import Heads
from clear_dist.geometry import TextPlan


@dataclass
class References:
    """Where those of the generation under way begin."""

    picture: int | None = None
    """Tokens before them; None: there are none."""

    def grid(self, ids: Tensor) -> tuple[int, int]:
        """Height and width of the picture from `ids` [tokens, axes] (waits for the GPU), whose first axis tells images.

        Raises ValueError unless it comes first, its tokens in raster order.
        """
        self.picture = count = int((ids[:, 0] == 0).sum())
        mine = ids[:count]
        width = int((mine[:, 1] == 0).sum())
        height = count // max(width, 1)
        expected = raster_ids(height, width, ids.device, axes=ids.shape[1]).to(ids.dtype)
        if not count or count != height * width or not torch.equal(expected, mine):
            raise ValueError(
                f"`img_ids` must be those of one image in raster order, then those of references, with another number "
                f"of their own in front, got {len(ids)} ids that are not"
            )
        return height, width

    def count(self, tokens: int) -> int:
        """How many of all `tokens` of the image's stream."""
        return 0 if self.picture is None else max(0, tokens - self.picture)

    def own(self, cut: Cut, text: TextPlan, text_tokens: int) -> slice:
        """Those of my share, which follow `text_tokens` of the text, in the image's stream."""
        whole, share = cut.height * cut.width, text.own
        return slice(whole + max(0, share.start - text_tokens), whole + max(0, share.stop - text_tokens))


def come_with_image(heads: Heads, text_tokens: int) -> bool:
    """Whether some of what is shared out like text are references, beside `text_tokens` of the text."""
    share = heads.striped.text_plan.own
    return share.stop - share.start > text_tokens


def after_references(references: Tensor, mine: Tensor, dim: int) -> Tensor:
    """Mine behind mine of the references; no copy where there are none."""
    return torch.cat([references, mine], dim=dim) if references.shape[dim] else mine.contiguous()


def joined_image(x_BLC: Tensor, cut: Cut) -> Tensor:
    """All tokens of the picture, from a forward's output for my references and, behind them, my tokens."""
    return joined_tokens(x_BLC[:, -len(cut.plan.own) * cut.width :].contiguous(), cut)


def own_ids(cut: Cut, device: torch.device, *, axes: int = 3) -> Tensor:
    """Position ids [L, axes] of my tokens, made anew in float32: bfloat16 has no 257."""
    ids = cut.own_tokens(raster_ids(*cut.size, device, axes=axes), dim=0)
    return ids if cut.extrapolation is None else ids * cut.extrapolation.position_scale


def flat_ids(ids: Tensor) -> Tensor:
    """Ids [tokens, axes], without the batch dimension that diffusers still takes."""
    return ids[0] if ids.ndim == 3 else ids


def raster_ids(height: int, width: int, device: torch.device, *, axes: int = 3) -> Tensor:
    """Position ids (0, y, x, ...) of a grid in raster order, float32 [height x width, axes], the others 0."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    zeros = torch.zeros(height, width, device=device)
    y, x = torch.meshgrid(rows.float(), columns.float(), indexing="ij")
    return torch.stack([zeros, y, x, *[zeros] * (axes - 3)], dim=-1).flatten(0, 1)
