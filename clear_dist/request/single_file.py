"""A model whose transformer is a single file: which one it is, and where its other parts are; without torch."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from clear_dist import demo
from clear_dist.cards.card import INDEX, Card, Cards, HubModel
from clear_dist.cards.folder import HUB_ID, ModelFacts, card_of, find_model, read_folder
from clear_dist.cards.headers import read_tensors
from clear_dist.cards.single_file import Files, PartFile, fits, is_like, layout_of, part_in
from clear_dist.options import Refusal, nearest_word, shortened
from clear_dist.request.flags import PictureFlags

COMFYUI = {"transformer": ("unet", "diffusion_models", "checkpoints"), "vae": ("vae",)}
"""ComfyUI's folders of a part's files, beside each other; of text encoders:"""
TEXT_ENCODERS = ("text_encoders", "clip")
ENDINGS = (".safetensors", ".sft", ".gguf")


def find(flags: PictureFlags, cards: Cards, *, has_cuda: bool) -> ModelFacts:
    """The model that `--model` names, a file's other parts by `--base` and the like; raises as `find_model`.

    Raises a Refusal, too, for a file of an unknown layout, and where a part is nowhere.
    """
    path = Path(flags.model).expanduser()
    if os.path.isfile(path):
        return _of_file(path, flags, cards)
    if path.suffix in ENDINGS and not os.path.exists(path):
        beside = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        near = sorted(name for name in beside if name.endswith(ENDINGS)) or ["demo"]
        raise Refusal(f"--model: there is no file {shortened(str(path))}; nearest: {nearest_word(path.name, near)}")
    for name, value in {"--base": flags.base, "--text-encoder": flags.text_encoder, "--vae": flags.vae}.items():
        if value is not None:
            raise Refusal(f"{name} is for a --model that is a safetensors file, got {shortened(flags.model)!r}")
    return find_model(flags.model, cards, has_cuda=has_cuda)


def _of_file(file: Path, flags: PictureFlags, cards: Cards) -> ModelFacts:
    names = read_tensors(file)
    transformer = part_in(file, names, "transformer") or PartFile(file=file)
    transformer.shapes()  # of plain numbers
    base = os.path.expanduser(flags.base or "")
    if not base and (file.parent / INDEX).is_file():
        base = str(file.parent)
    folder = demo.WEIGHTS if base == "demo" else Path(base) if os.path.exists(base) else None
    if folder is not None:
        if not folder.is_dir():
            raise Refusal(f"--base must be a folder in diffusers' layout, got the file {folder}; nearest: --vae FILE")
        card = card_of(folder, cards)
        return read_folder(
            folder, cards, {"transformer": transformer} | _others(file, card, flags, folder, card.hub_models[0].id)
        )
    card, known = _known(base, transformer, cards)
    files = {"transformer": transformer} | _others(file, card, flags, None, base if known is None else known.id)
    if known is None:
        return ModelFacts(location=base, files=files)
    location = base if base and cards.on_hub(base) is None else known.id
    return replace(find_model(known.id, cards, has_cuda=False), location=location, files=files)


def _known(base: str, transformer: PartFile, cards: Cards) -> tuple[Card, HubModel | None]:
    """The model of `--base`, or the one whose tensors the file has; of several the one that its name fits best.

    None: of a family, but of another size than all that are known, which only an unknown hub model may be.
    """
    found = cards.on_hub(base)
    if found is not None:
        layout_of(transformer, found[0], found[1].shape)
        return found
    if base and not HUB_ID.fullmatch(base):
        names = ", ".join(cards.short_names)
        raise Refusal(
            f"--base must be {names}, a hub id or a folder, there is no {shortened(base)}; nearest: {cards.default}"
        )
    alike = [each for each in cards.hub_models if fits(transformer, each[0], each[1].shape)]
    if alike:
        name = _words(transformer.file.stem)
        return min(alike, key=lambda each: (len(_words(each[1].id) - name), -len(_words(each[1].id))))
    family = next((card for card, known in cards.hub_models if is_like(transformer, card, known.shape)), None)
    got = f"{transformer.file} with {shortened(', '.join(sorted(transformer.shapes())[:2]))}"
    if family is None:
        layouts = dict.fromkeys(card.transformer for card in cards.cards)
        rule = f"--model must have the layout of a {' or '.join(layouts)}"
        raise Refusal(f"{rule}, got {got}; nearest: {cards.default}")
    if not base:
        rule = f"a {family.transformer} of another size than {', '.join(cards.short_names)} needs --base"
        raise Refusal(f"{rule}, got {got}; nearest: --base FOLDER")
    return family, None


def _words(name: str) -> set[str]:
    """Words and numbers of a model's name, without its owner."""
    return set(re.findall(r"[a-z]+|\d+", name.rpartition("/")[2].lower()))


def _others(file: Path, card: Card, flags: PictureFlags, folder: Path | None, likely: str) -> dict[str, PartFile]:
    """Files of the other parts, as given, in the file, or beside it; those the card cannot name are the base's.

    Raises a Refusal where the base has not got them, or is not to be asked for more than small files.
    """
    names, given = read_tensors(file), _given(card, flags)
    found = {}
    for part, known in card.files.items():
        places = tuple(_places(file, part))
        beside = (place / f"{name}.safetensors" for place in places for name in known)
        within = part_in(file, names, part, known[0])
        source = given.get(part) or within or next((PartFile(file=each) for each in beside if each.is_file()), None)
        if source is not None:
            source.shapes()  # of plain numbers
            found[part] = source
        elif not (flags.base if folder is None else any((folder / part).glob("*.safetensors"))):
            flag = "--vae FILE" if part == "vae" else "--text-encoder FILE"
            raise Refusal(
                f"the {part} of {file.name} must be beside it, found none of {', '.join(known)} "
                f"(.safetensors) in {', '.join(map(str, places))}; nearest: {flag}, or --base {likely}, "
                "which is asked for all that is missing"
            )
    return found


def _given(card: Card, flags: PictureFlags) -> Files:
    files = flags.text_encoder or []
    if files and len(files) != len(card.text_encoders):
        rule = f"--text-encoder must be given once for each of {', '.join(card.text_encoders)}"
        raise Refusal(f"{rule}, got {len(files)}; nearest: {len(card.text_encoders)} files")
    if flags.vae and "vae" not in card.files:
        rule = f"the VAE of a {card.pipeline} is read from a folder in diffusers' layout only"
        raise Refusal(f"{rule}, got --vae {shortened(flags.vae)}; nearest: --base {card.hub_models[0].id}")
    parts = [*zip(card.text_encoders, files, strict=bool(files)), *([("vae", flags.vae)] if flags.vae else ())]
    return {part: PartFile(file=Path(file).expanduser()) for part, file in parts}


def _places(file: Path, part: str) -> Iterator[Path]:
    """Folders where a part's file may be: beside the transformer's, below, or in ComfyUI's folders."""
    folders = COMFYUI.get(part, TEXT_ENCODERS)
    yield file.parent
    yield from (file.parent / name for name in folders if (file.parent / name).is_dir())
    root = next((each.parent for each in file.absolute().parents if each.name in COMFYUI["transformer"]), None)
    yield from (root / name for name in folders if root is not None)
