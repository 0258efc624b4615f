"""Transparency: apart from the colours while a picture is drawn, put back where its format has it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

OPAQUE = 255


@dataclass(frozen=True)
class Alpha:
    """Opacity of each pixel, "L", and the colour that transparent parts were laid on."""

    values: Image.Image
    background: tuple[int, int, int]

    def put_back(self, blocks: Iterator[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
        """RGBA rows that look like the RGB of `blocks` on the background."""
        alphas = np.asarray(self.values.resize((width, height), Image.Resampling.BICUBIC))[..., None]
        below, top = np.array(self.background, np.float32), 0
        for block in blocks:
            alpha = alphas[top : top + len(block)]
            top += len(block)
            # The colour that shows as the block's once it is laid on the background.
            share = np.divide(OPAQUE, alpha, out=np.zeros(alpha.shape, np.float32), where=alpha > 0)
            colour = below + (block - below) * share
            yield np.concatenate([colour.clip(0, OPAQUE).round().astype(np.uint8), alpha], axis=-1)
