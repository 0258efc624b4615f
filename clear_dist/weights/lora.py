"""LoRA on a pipeline, put beside its layers; whether they fit was checked by their headers."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clear_dist.options import Refusal
from clear_dist.request.request import Lora


def load(pipe: Any, loras: Iterable[Lora]) -> None:
    """Puts them on the transformer and on the text encoder, each with its weight, where the pipeline has them.

    Raises:
        Refusal: diffusers cannot read one, or would pass over a part of it.
    """
    weights = {}
    for number, lora in enumerate(loras):
        weights[f"lora_{number}"] = lora.weight
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
            _load(pipe, Path(lora.source), f"lora_{number}")
    on_this_rank = {name for names in pipe.get_list_adapters().values() for name in names} if weights else set()
    chosen = {name: weight for name, weight in weights.items() if name in on_this_rank}
    if chosen:
        pipe.set_adapters(list(chosen), list(chosen.values()))


def _load(pipe: Any, file: Path, name: str) -> None:
    tensors, alphas, metadata = _renamed(pipe, file)
    for tensor in tensors:
        if not tensor.startswith(("transformer.", "text_encoder.")):
            raise Refusal(f"{file} must name layers as diffusers, kohya or XLabs do, got {tensor}")
    given = {"network_alphas": alphas, "metadata": metadata, "adapter_name": name, "_pipeline": pipe}
    if pipe.transformer is not None:
        pipe.load_lora_into_transformer(tensors, transformer=pipe.transformer, **given)
    if pipe.text_encoder is not None:
        pipe.load_lora_into_text_encoder(tensors, text_encoder=pipe.text_encoder, **given)


def _renamed(pipe: Any, file: Path) -> tuple[dict[str, Any], Any, Any]:
    """Tensors by diffusers' names, what scales them, and diffusers' metadata."""
    try:
        return pipe.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            return_alphas=True,
            return_lora_metadata=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except (ValueError, KeyError, RuntimeError) as error:  # diffusers gives up in several ways
        why = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(f"{file} must be a LoRA that diffusers can read, and is not ({why})") from error
