"""Whether the transformer's weights are cast while they are loaded, which on CPUs takes memory in each rank."""

import math
from collections.abc import Iterator

from clear_dist.config import Request
from clear_dist.preflight.headers import component_files, read_tensors
from clear_dist.preflight.model import WEIGHT_STEMS, ModelFacts

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What safetensors call them."""
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
WORTH_A_WORD = 1_000_000_000
"""Bytes."""


def casting(request: Request, facts: ModelFacts, ranks: int) -> Iterator[str]:
    """A warning where several ranks on CPUs hold weights of their own that they could share.

    Args:
        ranks: on this machine.
    """
    if request.device != "cpu" or ranks == 1 or facts.folder is None:
        return
    stored = [
        kind
        for file in component_files(facts.folder / "transformer", WEIGHT_STEMS["transformer"])
        for kind in read_tensors(file).values()
    ]
    cast = sum(math.prod(shape) for dtype, shape in stored if dtype != STORED[request.dtype])
    nbytes = cast * ITEMSIZE[request.dtype]
    shared = next((name for name, dtype in STORED.items() if {dtype} == {found for found, _ in stored}), None)
    if nbytes * (ranks - 1) >= WORTH_A_WORD and shared is not None:
        yield (
            f"warning: each of {ranks} ranks casts the weights to {request.dtype}, {nbytes / 1e9:.1f} GB of its own; "
            f"with --dtype {shared} they share one copy"
        )
