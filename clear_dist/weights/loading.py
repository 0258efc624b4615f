"""A pipeline from a folder, quietly, with nothing missing from its weights."""

import gc
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights

from clear_dist.cards.card import Card
from clear_dist.cards.headers import component_files
from clear_dist.observe.progress import Phases
from clear_dist.options import Refusal
from clear_dist.weights.mapped import load_mapped

HOST = torch.device("cpu")
CUTTABLE = ("transformer", "vae")


def load_part(folder: Path, card: Card, name: str, dtype: torch.dtype, device: torch.device, phases: Phases) -> Any:
    """A part with weights, from a pipeline's folder, on `device`.

    Raises:
        Refusal: weights are missing, or do not fit their configuration.
    """
    files = component_files(folder / name, card.weights[name])
    library, kind = card.class_of(name)
    stock = getattr(import_module(library), kind)
    with phases.loading(name, sum(file.stat().st_size for file in files)) as advance:
        if name == "transformer":
            return _load_transformer(stock, folder / name, files, dtype, device, advance)
        return _load_stock(stock, folder, name, dtype).to(device)


def _load_transformer(
    kind: Any,
    folder: Path,
    files: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[int], None],
) -> Any:
    """By ourselves: it is the largest part, and all ranks have it."""
    try:
        with init_empty_weights():
            transformer: Any = kind.from_config(kind.load_config(folder))
    except Exception as error:  # as in `_load_stock`
        raise unloadable(folder, kind.__name__, error) from error
    load_mapped(transformer, files, dtype=dtype, device=device, advance=advance)
    return transformer.eval()


def _load_stock(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """By the part's own library, which knows the names that its tensors had in earlier versions."""
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
    """The Refusal for a folder that a library could not load."""
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


def load_pipeline(
    folder: Path,
    card: Card,
    *,
    with_text_encoders: bool,
    dtype: torch.dtype,
    device: torch.device,
    on_host: Collection[str] = (),
    phases: Phases | None = None,
) -> Any:
    """The pipeline of a folder in diffusers' layout, on `device`, its progress bars off.

    The transformer's tensors are not compared with its configuration here: `cards.folder` has done so by headers.

    Args:
        with_text_encoders: without them the pipeline takes embeddings only.
        on_host: names of parts that stay in host memory.
        phases: where the parts are timed, and shown.

    Raises:
        Refusal: weights are missing, or do not fit their configuration.
    """
    names = (*card.text_encoders, *CUTTABLE) if with_text_encoders else CUTTABLE
    without = () if with_text_encoders else (*card.text_encoders, *card.tokenizers)
    places = {name: HOST if name in on_host else device for name in names}
    return _assemble(folder, card, places, without, dtype, phases or Phases())


def load_text_pipeline(folder: Path, card: Card, *, dtype: torch.dtype, device: torch.device, phases: Phases) -> Any:
    """Pipeline of text encoders and tokenizers only, as `load_pipeline`."""
    return _assemble(folder, card, dict.fromkeys(card.text_encoders, device), CUTTABLE, dtype, phases)


def free(device: torch.device) -> None:
    """Give back what was dropped: to other processes, and to what is loaded next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _assemble(
    folder: Path,
    card: Card,
    places: Mapping[str, torch.device],
    without: Collection[str],
    dtype: torch.dtype,
    phases: Phases,
) -> Any:
    with quietly():
        parts = {name: load_part(folder, card, name, dtype, place, phases) for name, place in places.items()}
        try:
            given = dict.fromkeys(without) | parts
            pipe = getattr(diffusers, card.pipeline).from_pretrained(
                folder, **given, dtype=dtype, local_files_only=True
            )
        except Exception as error:  # what the tokenizers' library raises is of no other class
            raise unloadable(folder, f"the tokenizers and the scheduler of a {card.pipeline}", error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe
