"""The parts of a pipeline that have weights, each from its folder, with nothing missing."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from clear_dist.clear_checkpoint import require_same_tensors
from clear_dist.config import Refusal
from clear_dist.mapped import load_mapped
from clear_dist.preflight.headers import component_files, read_component
from clear_dist.preflight.model import WEIGHT_STEMS
from clear_dist.progress import Phases

CUTTABLE = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
TEXT = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}


def load_part(folder: Path, name: str, dtype: torch.dtype, device: torch.device, phases: Phases) -> Any:
    """One of CUTTABLE and TEXT, from a pipeline's folder, on `device`.

    Raises:
        Refusal: weights are missing, or do not fit their configuration.
    """
    files = component_files(folder / name, WEIGHT_STEMS[name])
    with phases.loading(name, sum(file.stat().st_size for file in files)) as advance:
        if name == "transformer":
            return _load_transformer(folder / name, files, dtype, device, advance)
        return _load_stock(folder, name, dtype).to(device)


def _load_transformer(
    folder: Path, files: list[Path], dtype: torch.dtype, device: torch.device, advance: Callable[[int], None]
) -> FluxTransformer2DModel:
    """By ourselves: it is 24 GB of FLUX.1's 34, and all ranks have it."""
    try:
        with init_empty_weights():
            transformer: Any = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))
    except Exception as error:  # as in `_load_stock`
        raise unloadable(folder, FluxTransformer2DModel.__name__, error) from error
    expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    require_same_tensors(expected, read_component(folder, WEIGHT_STEMS["transformer"]), folder)
    load_mapped(transformer, files, dtype=dtype, device=device, advance=advance)
    return transformer.eval()


def _load_stock(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """By the part's own library, which knows the names that its tensors had in earlier versions."""
    kind: Any = (CUTTABLE | TEXT)[name]
    try:
        part, info = kind.from_pretrained(
            folder,
            subfolder=name,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name the tensor ourselves
            dtype=dtype,
        )
    except Exception as error:  # for a damaged configuration the libraries raise what they like
        raise unloadable(folder / name, kind.__name__, error) from error
    for tensor in sorted(info["missing_keys"]):
        raise Refusal(f"{folder / name} lacks {tensor}; are these the weights of another model?")
    for tensor, got, expected in sorted(info.get("mismatched_keys", ())):
        raise Refusal(
            f"{tensor} must have the shape {list(expected)}, got {list(got)} in {folder / name}; "
            "are these the weights of another model?"
        )
    return part


def unloadable(folder: Path, kind: str, error: Exception) -> Refusal:
    """What to raise where a library could not load what is in `folder`."""
    why = " ".join(str(error).split()) or type(error).__name__
    return Refusal(f"{folder} must hold what can be loaded as {kind}, and does not ({why}); download it again")


@contextmanager
def quietly() -> Iterator[None]:
    """The libraries' progress bars and warnings are for those who call them themselves."""
    verbosity = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    bars = diffusers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.is_progress_bar_enabled()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.ERROR)
        library.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip((diffusers, transformers), verbosity, bars, strict=True):
            library.utils.logging.set_verbosity(level)
            if bar:
                library.utils.logging.enable_progress_bar()
