"""A pipeline from a folder, quietly, with nothing missing from its weights."""

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
from safetensors import safe_open

from clear_dist.cards.card import INDEX, STEMS, Card
from clear_dist.cards.controlnets import ControlNets
from clear_dist.cards.headers import component_files, read_json
from clear_dist.cards.single_file import Files, Layout, PartFile, layout_of, weight_files
from clear_dist.engine.strided import fit_to_vae
from clear_dist.observe.progress import Phases
from clear_dist.options import Refusal
from clear_dist.weights.mapped import load_mapped

HOST = torch.device("cpu")
CUTTABLE = ("transformer", "vae")


def load_pipeline(
    folder: Path,
    card: Card,
    *,
    with_text_encoders: bool,
    dtype: torch.dtype,
    device: torch.device,
    on_host: Collection[str] = (),
    phases: Phases | None = None,
    files: Files | None = None,
) -> Any:
    """The pipeline of a folder in diffusers' layout, on `device` but for parts `on_host`, its progress bars off.

    Weights in `files` take the place of the folder's. Without text encoders it takes embeddings only. The transformer's
    tensors are not compared with its configuration here: `cards.folder` has done so by headers. Raises a Refusal where
    weights are missing or do not fit.
    """
    names = (*card.text_encoders, *CUTTABLE) if with_text_encoders else CUTTABLE
    without = () if with_text_encoders else (*card.text_encoders, *card.tokenizers)
    places = {name: HOST if name in on_host else device for name in names}
    return _assemble(folder, card, places, without, dtype, phases or Phases(), files or {})


def load_text_pipeline(
    folder: Path, card: Card, *, dtype: torch.dtype, device: torch.device, phases: Phases, files: Files | None = None
) -> Any:
    """Pipeline of text encoders and tokenizers only, as `load_pipeline`."""
    return _assemble(folder, card, dict.fromkeys(card.text_encoders, device), CUTTABLE, dtype, phases, files or {})


def load_encoders(
    folder: Path, card: Card, *, dtype: torch.dtype, device: torch.device, phases: Phases, files: Files | None = None
) -> Any:
    """Pipeline of text encoders, tokenizers and VAE, without a transformer, as `load_pipeline`."""
    places = dict.fromkeys((*card.text_encoders, "vae"), device)
    return _assemble(folder, card, places, ("transformer",), dtype, phases, files or {})


def with_controlnet(
    pipe: Any, folder: Path, kinds: ControlNets, *, dtype: torch.dtype, device: torch.device, phases: Phases
) -> Any:
    """A pipeline of the same parts and the ControlNet of a folder, compared with its configuration before."""
    files = component_files(folder, STEMS["diffusers"])
    with _quietly(), phases.loading("controlnet", sum(file.stat().st_size for file in files)) as advance:
        net = _load_mapped(getattr(diffusers, kinds.kind), folder, files, dtype, device, advance)
        controlled = fit_to_vae(getattr(diffusers, kinds.pipeline)(**pipe.components, controlnet=net))
    controlled.set_progress_bar_config(disable=True)
    return controlled


def _assemble(
    folder: Path,
    card: Card,
    places: Mapping[str, torch.device],
    without: Collection[str],
    dtype: torch.dtype,
    phases: Phases,
    files: Files,
) -> Any:
    with _quietly():
        parts = {name: _load_part(folder, card, name, dtype, place, phases, files) for name, place in places.items()}
        given = dict.fromkeys(without) | parts
        with _refusing(folder, f"the tokenizers and the scheduler of a {card.pipeline}"):
            kind = getattr(diffusers, card.pipeline)
            pipe = kind.from_pretrained(folder, **given, dtype=dtype, local_files_only=True)
        if _has_static_shift(folder, card):
            pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    fit_to_vae(pipe).set_progress_bar_config(disable=True)
    return pipe


def _has_static_shift(folder: Path, card: Card) -> bool:
    file = folder / "transformer" / "config.json"
    return card.shape_of(read_json(file), file).defaults({}, read_json(folder / INDEX)).static_shift


def _load_part(
    folder: Path,
    card: Card,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    phases: Phases,
    files: Files,
) -> Any:
    weights = weight_files(folder, card, name, files)
    library, kind = card.class_of(name)
    stock: Any = getattr(import_module(library), kind)
    with phases.loading(name, sum(file.stat().st_size for file in weights)) as advance:
        if name != "transformer" and name in files:
            return _load_file(stock, folder / name, files[name], dtype).to(device)
        if name != "transformer":
            return _load_stock(stock, folder, name, dtype).to(device)
        layout = None
        if name in files:
            layout = layout_of(files[name], card, card.shape_of(read_json(folder / name / "config.json"), folder))
        return _load_mapped(stock, folder / name, weights, dtype, device, advance, layout)


def _load_mapped(
    stock: Any,
    folder: Path,
    files: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[int], None],
    layout: Layout | None = None,
) -> Any:
    """Load by ourselves what all ranks have, and is large."""
    # Buffers too: a table of positions is in the files, and takes seconds and gigabytes to make.
    with _refusing(folder, stock.__name__), init_empty_weights(include_buffers=True):
        model = stock.from_config(stock.load_config(folder))
    load_mapped(model, files, dtype=dtype, device=device, advance=advance, layout=layout)
    return model.eval()


def _load_file(kind: Any, folder: Path, source: PartFile, dtype: torch.dtype) -> Any:
    """A text encoder or VAE from a single file, configured by `folder`, with its own library's converters."""
    with safe_open(source.file, framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(source.prefix)]  # noqa: SIM118 (no mapping)
        tensors = {name.removeprefix(source.prefix): opened.get_tensor(name) for name in names}
    with _refusing(source.file, kind.__name__):
        if not issubclass(kind, transformers.PreTrainedModel):
            return kind.from_single_file(tensors, config=str(folder), local_files_only=True, dtype=dtype)
        part, info = kind.from_pretrained(
            None,
            config=kind.config_class.from_pretrained(folder),
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name the tensor ourselves
            dtype=dtype,
        )
    _require_all(info, source.file)
    return part


def _load_stock(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """Load with the part's own library, which knows the names its tensors had in earlier versions."""
    with _refusing(folder / name, kind.__name__):
        part, info = kind.from_pretrained(
            folder,
            subfolder=name,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name the tensor ourselves
            dtype=dtype,
        )
    _require_all(info, folder / name)
    return part


def _require_all(info: Mapping[str, Any], where: Path) -> None:
    """Raises a Refusal where a library has found tensors missing, or of other shapes."""
    for tensor in sorted(info["missing_keys"]):
        raise Refusal(f"{where} lacks {tensor}; are these the weights of another model?")
    for tensor, got, expected in sorted(info.get("mismatched_keys", ())):
        raise Refusal(
            f"{tensor} must have the shape {list(expected)}, got {list(got)} in {where}; "
            "are these the weights of another model?"
        )


@contextmanager
def _refusing(folder: Path, kind: str) -> Iterator[None]:
    """Turn errors into a Refusal: of a damaged folder the libraries raise what they like."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(
            f"{folder} must hold what can be loaded as {kind}, and does not ({why}); download it again"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """The libraries' progress bars and warnings are for those who call them themselves."""
    loggers = diffusers.utils.logging, transformers.utils.logging
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggers]
    for each in loggers:
        each.set_verbosity(logging.ERROR)
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each, (level, bar) in zip(loggers, before, strict=True):
            each.set_verbosity(level)
            if bar:
                each.enable_progress_bar()
