"""CLEAR checkpoints (paper, Sec. 3.3): rules for their names and tensors, without torch.

Names give the radius r and, with down-sampled keys, their factor d: `clear_local_<r>.safetensors`,
`clear_local_<r>_down_<d>.safetensors`. With down-sampled keys each layer also has a spatial weight of d x d numbers.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from clear_dist.options import Refusal, Window

Shapes = Mapping[str, tuple[int, ...]]

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
"""Image side of an attention layer, which a checkpoint replaces; some layers have no to_out, some only the last."""
JOINT = re.compile(r"(.+\.attn|layers\.\d+\.attention)\.")
ALONE = re.compile(r"(.+\.attn2|noise_refiner\.\d+\.attention)\.")
"""Names of layers whose image tokens see the text, or each other alone, without down-sampled keys."""
SPATIAL_WEIGHT = "processor.spatial_weight"
"""Weights that pool d x d tokens in an attention layer, [1, 1, 1, d, 1, d, 1]."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NAME = re.compile(r"clear_local_([1-9]\d*)(?:_down_([1-9]\d*))?\.safetensors")


def radius_of(checkpoint: str | Path) -> int | None:
    """Radius in tokens by a checkpoint's file name; None where the name has none."""
    match = _match(checkpoint)
    return int(match[1]) if match else None


def named_down_factor(checkpoint: str | Path) -> int | None:
    """Factor of down-sampled keys by a checkpoint's name, 1 without such keys; None where the name says nothing."""
    match = _match(checkpoint)
    return int(match[2] or 1) if match else None


def down_factor_of(tensors: Shapes, where: Path | str) -> int:
    """Factor of down-sampled keys, 1 without; raises a Refusal for a wrong shape, or another factor in the name."""
    weights = {name: shape for name, shape in tensors.items() if name.endswith(f".{SPATIAL_WEIGHT}")}
    found = max((size for shape in weights.values() for size in shape), default=1)
    for name, shape in weights.items():
        if found < 2 or shape != spatial_shape(found):
            expected = list(spatial_shape(max(found, 2)))
            raise Refusal(f"{name} must have the shape {expected}, got {list(shape)} in {where}; download it again")
    named = named_down_factor(where)
    if named not in (None, found):
        shown = ["no spatial weights" if d == 1 else f"spatial weights of {d} x {d}" for d in (named or 1, found)]
        raise Refusal(f"by its name {where} must hold {shown[0]}, got {shown[1]}; download it again")
    return found


def spatial_shape(factor: int) -> tuple[int, ...]:
    return 1, 1, 1, factor, 1, factor, 1


def with_spatial_weights(tensors: Shapes, factor: int) -> Shapes:
    """The tensors and, where the factor is above 1, a spatial weight per attention layer."""
    layers = dict.fromkeys(found[1] for found in map(JOINT.match, tensors) if found) if factor > 1 else {}
    return {**tensors, **{f"{layer}.{SPATIAL_WEIGHT}": spatial_shape(factor) for layer in layers}}


def refuse_pickled(file: str | Path) -> None:
    """Raises a Refusal for a file whose name ends as pickles' do: reading one may run code."""
    path = Path(file)
    if path.suffix in PICKLED:
        raise Refusal(f"weights must be safetensors, got the pickled file {file}; nearest: {path.stem}.safetensors")


def refuse_other_radius(checkpoint: str | Path, window: Window | None) -> None:
    """Raises a Refusal where the checkpoint's name has another radius than was asked for."""
    radius = radius_of(checkpoint)
    if radius is not None and window not in (None, "full", radius):
        raise Refusal(f"the window must be the {radius} of {checkpoint}, or full, got {window}; nearest: {radius}")


def is_image_side(tensor: str) -> bool:
    """Whether a checkpoint replaces the transformer's tensor of that name."""
    layer = JOINT.match(tensor) or ALONE.match(tensor)
    return layer is not None and any(tensor[layer.end() :].startswith(f"{projection}.") for projection in PROJECTIONS)


def require_same_tensors(expected: Shapes, got: Shapes, where: Path | str) -> None:
    """Raises a Refusal naming the first tensor that is missing, unexpected or of another shape."""
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
