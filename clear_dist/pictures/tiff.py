"""TIFF written while rows arrive; BigTIFF where a file might be too large for 4-byte offsets."""

import json
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import tifffile

from clear_dist.pictures.srgb import profile
from clear_dist.pictures.thumbnail import BLOCK_ROWS, CHANNELS

MOST_CLASSIC_BYTES = 2**32 - 2**26
"""Limit of the pixels: they may grow a little when compressed, and tags and metadata come on top."""


def write(
    blocks: Iterator[np.ndarray],
    file: Path,
    shape: tuple[int, int, int],
    metadata: Mapping[str, str],
    *,
    most_classic_bytes: int = MOST_CLASSIC_BYTES,
) -> None:
    with tifffile.TiffWriter(file, bigtiff=prod(shape) > most_classic_bytes) as out:
        out.write(
            map(_strip, blocks),
            shape=shape,
            dtype=np.uint8,
            photometric="rgb",
            extrasamples=["unassalpha"] * (shape[2] - CHANNELS),
            iccprofile=profile(),
            planarconfig="contig",
            compression="adobe_deflate",
            predictor="horizontal",
            rowsperstrip=BLOCK_ROWS,
            description=json.dumps(dict(metadata)) if metadata else None,
            software=metadata.get("Software", False),  # None would be tifffile's own name
            metadata=None,  # else tifffile adds a description
        )


def _strip(block: np.ndarray) -> bytes:
    """Compressed here: tifffile takes pictures whole or in compressed strips."""
    differences = np.diff(block, axis=1, prepend=np.uint8(0))
    deflate = zlib.compressobj(level=1, memLevel=9, strategy=zlib.Z_RLE)
    return deflate.compress(differences.data) + deflate.flush()
