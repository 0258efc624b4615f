"""Feature networks from folders, files or the hub: of the kind that a figure needs, with all weights, or refused."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clear_dist.cards.hub_name import HubFile
from clear_dist.hub.fetching import Wanted, cached, fetch
from clear_dist.launch.ends import Failure, describe
from clear_dist.options import Refusal, shortened

CONFIG = "config.json"
FOLDER_PATTERNS = ("*.json", "*.txt", "model*.safetensors", "model*.safetensors.index.json")
SEES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
"""Transformers' kinds of networks whose first token is a picture's feature."""
INCEPTION_SIDE = 299
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")


class Dino:
    """The class token after the last norm, [B, D], of bytes [B, H, W, 3]."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self._model = whole("--dino", folder, AutoModel, SEES, device)
        self._processor = _read("--dino", folder, AutoImageProcessor)

    def seen(self, pictures: Tensor) -> Tensor:
        return self._model(_prepared(self._processor, pictures).to(self._model.device)).last_hidden_state[:, 0].cpu()


class Clip:
    """Projected features [B, D] of bytes [B, H, W, 3], and of captions, which are cut off after the last position."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self._model = whole("--clip", folder, CLIPModel, ("clip",), device)
        self._processor = _read("--clip", folder, AutoImageProcessor)
        self._tokenizer = _read("--clip", folder, AutoTokenizer)

    def seen(self, pictures: Tensor) -> Tensor:
        pixels = _prepared(self._processor, pictures).to(self._model.device)
        return self._model.get_image_features(pixel_values=pixels).pooler_output.cpu()

    def read(self, captions: Sequence[str]) -> Tensor:
        most = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(captions), padding=True, truncation=True, max_length=most, return_tensors="pt")
        return self._model.get_text_features(**tokens.to(self._model.device)).pooler_output.cpu()


def load_inception(file: Path, device: str) -> tuple[Any, int]:
    """The network, and the number of its features; a Refusal where it does not answer as `Distribution` asks."""
    try:
        with warnings.catch_warnings(action="ignore"):  # TorchScript is old, and this file is what there is
            network = torch.jit.load(str(file), map_location=device).eval()
        black = torch.zeros(1, 3, INCEPTION_SIDE, INCEPTION_SIDE, dtype=torch.uint8, device=device)
        with torch.inference_mode():
            features, shares = network(black, return_features=True), network(black, no_output_bias=True)
        if features.ndim != 2 or shares.ndim != 2 or abs(float(shares.sum()) - 1) > 1e-3:
            raise ValueError(f"it gives {tuple(features.shape)} and {tuple(shares.shape)}")
    except Exception as error:
        rule = "--inception must be a TorchScript file that gives features and probabilities"
        raise Refusal(f"{rule}, got {shortened(str(file))} ({cut(error)}); nearest: inception-2015-12-05.pt") from error
    return network, features.shape[1]


def load_perceptual(file: Path, device: str) -> torch.nn.Module:
    """LPIPS' network from a file of weights; a Refusal where they are another network's."""
    from clear_dist.evaluate.perceptual import perceptual  # torchmetrics

    try:
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        return perceptual(weights).to(device)
    except Exception as error:
        rule = "--lpips must be weights of AlexNet or VGG16 with torchvision's names"
        raise Refusal(
            f"{rule}, got {shortened(str(file))} ({cut(error)}); nearest: alexnet-owt-7be5be79.pth"
        ) from error


def whole(flag: str, folder: Path, kind: Any, models: Sequence[str], device: str) -> Any:
    """A transformers model with every weight from its folder; a Refusal where one is missing, or the kind is wrong."""
    from transformers import AutoConfig

    found = _read(flag, folder, AutoConfig).model_type
    if found not in models:
        raise Refusal(f"{flag} must be a model of the kind {' or '.join(models)}, got {found} in {folder}")
    given = {"add_pooling_layer": False} if found == "vit" else {}
    try:
        model, told = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **given)
    except Exception as error:
        raise Refusal(f"{flag} must be a folder with a whole model, got {folder} ({cut(error)})") from error
    lacking = sorted(told["missing_keys"]) + sorted(map(str, told["mismatched_keys"]))
    if lacking:
        raise Refusal(f"{flag} must hold all weights, got {folder} without {len(lacking)}, {lacking[0]} first")
    return model.to(device).eval()


def located(flag: str, word: str, *, is_folder: bool) -> Path:
    """The folder, or file, that a flag names, fetched from the hub where it is not here.

    Raises a Refusal where there is none, a Failure where the hub cannot be reached.
    """
    path = Path(word)
    if path.exists():
        return path if is_folder else _only_file(flag, path)
    hub = HubFile.of(word, default=CONFIG if is_folder else "")
    if hub is None:
        kind = "a folder or a hub id" if is_folder else "a file or a hub id with a file (owner/name:file)"
        raise Refusal(f"{flag} must be {kind}, got {shortened(word)}, which is neither")
    patterns = FOLDER_PATTERNS if is_folder else (hub.file,)
    want = Wanted(
        repository=hub.repository, revision=hub.revision, patterns=patterns, needed=hub.file, nearest=f"{flag} FOLDER"
    )
    if cached(want) is None:
        fetch([want])
    folder = cached(want)
    if folder is None:
        raise Failure(f"{want.repository} was downloaded, but is not in the hub's cache")
    return folder if is_folder else folder / hub.file


def cut(error: BaseException) -> str:
    """A foreign error on a short line."""
    return shortened(" ".join(describe(error).split()))


def _only_file(flag: str, path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(each for each in path.iterdir() if each.suffix in WEIGHTS)
    if len(files) != 1:
        raise Refusal(
            f"{flag} must be a file, or a folder with one of {', '.join(WEIGHTS)}, got {len(files)} in {path}"
        )
    return files[0]


def _read(flag: str, folder: Path, kind: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise Refusal(f"{flag} must be a folder in transformers' layout, got {folder} ({cut(error)})") from error


def _prepared(processor: Any, pictures: Tensor) -> Tensor:
    return processor(images=list(pictures.movedim(-1, 1).cpu()), return_tensors="pt")["pixel_values"]
