"""LoRA on a pipeline that is on stripes: fetched, checked against the loaded model, put beside its layers."""

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from clear_dist.comm.group import Group
from clear_dist.config import Refusal
from clear_dist.config.request import Lora
from clear_dist.preflight.flux import FluxShape
from clear_dist.preflight.headers import read_shapes
from clear_dist.preflight.lora import require_fit

SECONDS_BETWEEN_WORDS = 1.0


def locate(loras: Iterable[Lora], group: Group, *, local_rank: int) -> tuple[Lora, ...]:
    """The same, each a local file: downloaded once per machine where it is on the hub. All ranks call this.

    Raises:
        Refusal: the hub does not give it.
    """
    here = tuple(loras)
    elsewhere = [lora for lora in here if not Path(lora.source).is_file()]
    if not elsewhere:
        return here
    with ThreadPoolExecutor(1) as pool:
        fetching = [pool.submit(_fetched, lora, offline=False) for lora in elsewhere if local_rank == 0]
        # A download may take longer than a group waits for a rank that is silent.
        while group.agree(bool(wait(fetching, SECONDS_BETWEEN_WORDS).not_done)):
            pass
        for download in fetching:
            download.result()
    return tuple(_fetched(lora, offline=True) if lora in elsewhere else lora for lora in here)


def load(pipe: Any, loras: Iterable[Lora]) -> None:
    """Puts them on the transformer and, where there is one, on the text encoder, each with its weight.

    Raises:
        Refusal: one is for another model.
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
    read_shapes(file)  # refuses what is damaged
    tensors, alphas, metadata = _renamed(pipe, file)
    shapes = {tensor: tuple(value.shape) for tensor, value in tensors.items()}
    require_fit(shapes, FluxShape.of(pipe.transformer.config, "the model's configuration"), file)
    for tensor in tensors:
        if not tensor.startswith(("transformer.", "text_encoder.")):
            raise Refusal(f"{file} must name layers as diffusers, kohya or XLabs do, got {tensor}")
    given = {"network_alphas": alphas, "metadata": metadata, "adapter_name": name, "_pipeline": pipe}
    pipe.load_lora_into_transformer(tensors, transformer=pipe.transformer, **given)
    if pipe.text_encoder is not None:  # of rank 0 alone
        pipe.load_lora_into_text_encoder(tensors, text_encoder=pipe.text_encoder, **given)


def _renamed(pipe: Any, file: Path) -> tuple[dict[str, Any], Any, Any]:
    """Tensors by diffusers' names, and what scales them."""
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


def _fetched(lora: Lora, *, offline: bool) -> Lora:
    repository, file = lora.source.split(":", 1)
    try:
        return replace(lora, source=hf_hub_download(repository, file, local_files_only=offline))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise Refusal(
            f"cannot get {lora.source} from the hub ({type(error).__name__}): check its name, the network and "
            "`hf auth login`; nearest: --lora FILE"
        ) from error
