"""The rules of CLEAR checkpoints (paper, Sec. 3.3): their names, and the tensors they hold. No torch here."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from clear_dist.config import Refusal

Shapes = Mapping[str, tuple[int, ...]]

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""The image side of attention, which a checkpoint replaces. Single blocks have no to_out."""
DOWN_SAMPLED = "spatial_weight"
_NAME = re.compile(r"clear_local_(\d+)(_down_\d+)?\.safetensors")


def radius_of(checkpoint: str | Path) -> int | None:
    """The radius in tokens that a checkpoint (a file, or `owner/name:file`) was distilled for, if its name tells."""
    match = _match(checkpoint)
    return int(match[1]) if match and not match[2] else None


def refuse_down_sampled(checkpoint: str | Path, tensors: Iterable[str] = ()) -> None:
    """Raises a Refusal for a checkpoint with down-sampled keys, by its name or by those of its tensors."""
    match = _match(checkpoint)
    if (match and match[2]) or any(DOWN_SAMPLED in name for name in tensors):
        raise Refusal(
            f"checkpoints with down-sampled keys are not supported, got {checkpoint}; "
            f"nearest: clear_local_{match[1] if match else 8}.safetensors"
        )


def is_image_side(tensor: str) -> bool:
    """Whether a checkpoint holds the transformer's tensor of that name."""
    return any(f".attn.{projection}." in tensor for projection in PROJECTIONS)


def require_same_tensors(expected: Shapes, got: Shapes, where: Path | str) -> None:
    """Raises a Refusal that names the first tensor that is missing, unexpected or of another shape."""
    missing, unexpected = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    for kind, names in (("lacks", missing), ("has an unexpected tensor", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise Refusal(f"{where} {kind} {names[0]}{more}; are these the weights of another model?")
    for name, shape in expected.items():
        if got[name] != shape:
            raise Refusal(
                f"{name} must have the shape {list(shape)}, got {list(got[name])} in {where}; "
                "are these the weights of another model?"
            )


def _match(checkpoint: str | Path) -> re.Match[str] | None:
    return _NAME.fullmatch(re.split(r"[/:]", str(checkpoint))[-1])
