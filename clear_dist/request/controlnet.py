"""A ControlNet before anything is loaded: whether it fits the model, and what it is shown; without torch."""

import os
from collections.abc import Iterator
from pathlib import Path

from clear_dist.cards.card import STEMS, Cards
from clear_dist.cards.clear import require_same_tensors
from clear_dist.cards.controlnets import ControlNets, ControlNetShape
from clear_dist.cards.folder import ModelFacts
from clear_dist.cards.headers import read_component, read_json
from clear_dist.cards.hub_name import HubFile
from clear_dist.options import Refusal, nearest_word, shortened
from clear_dist.request.flags import PictureFlags
from clear_dist.request.pictures import decoded_file
from clear_dist.request.request import Control, Request
from clear_dist.stages import Size

CONFIG = "config.json"
STEM = STEMS["diffusers"]
STRETCHED = 1.02
"""Shapes that differ by more are worth a word."""


def find_control(flags: PictureFlags, facts: ModelFacts, cards: Cards) -> Control | None:
    """The ControlNet that is asked for; raises a Refusal where it or its picture cannot be read, or does not fit."""
    if flags.controlnet is None:
        return None
    kinds = kinds_for(facts, cards)
    source = _source(flags.controlnet, cards)
    image = None if flags.control_image is None else flags.control_image.absolute()
    decoded = None if image is None else decoded_file(image)
    control = Control(
        source=source,
        image=image,
        size=None if decoded is None else (decoded.image.height, decoded.image.width),
        scale=1.0 if flags.control_scale is None else flags.control_scale,
        mode=None if flags.control_mode is None else _mode(flags.control_mode, kinds),
        window=flags.controlnet_window or "full",
    )
    compare_control(control, folder_of(control), facts, cards, has_mode=not flags.only_planned)
    return control


def folder_of(control: Control) -> Path | None:
    """Its folder; None: on the hub."""
    return Path(control.source) if os.path.isdir(control.source) else None


def kinds_for(facts: ModelFacts, cards: Cards) -> ControlNets:
    """ControlNets of the model's family; those of any for a model that is not known yet. Raises a Refusal for none."""
    if facts.card is None:
        return next(iter(cards.controlnets.values()))
    if facts.card.pipeline not in cards.controlnets:
        others = [card for card in cards.cards if card.pipeline in cards.controlnets]
        nearest = next(model.short for card in others for model in card.hub_models)
        rule = f"--controlnet is for a {' or '.join(card.transformer for card in others)}"
        raise Refusal(f"{rule}, got {facts.name}, a {facts.card.transformer}; nearest: --model {nearest}")
    return cards.controlnets[facts.card.pipeline]


def shape_of(control: Control, folder: Path | None, facts: ModelFacts, cards: Cards) -> ControlNetShape | None:
    """By the folder's config.json, or by what is known of the hub's; None: nothing is. Raises a Refusal if damaged."""
    kinds = kinds_for(facts, cards)
    if folder is None:
        known = cards.controlnet_on_hub(control.source)
        return None if known is None else kinds.shape_of(known.config, known.id)
    config = read_json(folder / CONFIG)
    if (found := config.get("_class_name")) != kinds.kind:
        raise Refusal(f"the class of a ControlNet must be {kinds.kind}, got {found} in {folder}; nearest: union-pro")
    return kinds.shape_of(config, folder / CONFIG)


def compare_control(
    control: Control, folder: Path | None, facts: ModelFacts, cards: Cards, *, has_mode: bool = True
) -> None:
    """Compare a ControlNet with the model and with its own files, as far as they are here; raises a Refusal.

    `has_mode`: whether a union's mode must be given.
    """
    shape, where = shape_of(control, folder, facts, cards), folder or control.source
    if shape is None:
        return
    if facts.shape is not None and (misfit := shape.misfit(facts.shape)):
        raise Refusal(f"the ControlNet must fit {facts.name}: {misfit} in {where}; is it for another model?")
    if folder is not None:
        require_same_tensors(shape.tensors(), read_component(folder, STEM), folder)
    if has_mode:
        _check_mode(control.mode, shape, kinds_for(facts, cards).modes, where)


def stretching(request: Request) -> Iterator[str]:
    """A warning where what a ControlNet is shown has another shape than the picture."""
    control = request.control
    if control is None or control.size is None or request.height is None or request.width is None:
        return
    ratio = _ratio(control.size) / _ratio(request.size)
    if max(ratio, 1 / ratio) > STRETCHED:
        (height, width), (high, wide) = control.size, request.size
        yield f"warning: --control-image is {width}x{height} and is stretched to the shape of {wide}x{high}"


def _ratio(size: Size) -> float:
    return size[1] / size[0]


def _source(word: str, cards: Cards) -> str:
    known = cards.controlnet_on_hub(word)
    path = Path(word).expanduser()
    if known is not None and not os.path.exists(path):
        return known.id
    if os.path.isdir(path):
        return str(path)
    on_hub = HubFile.of(word, default=CONFIG)
    if os.path.exists(path) or on_hub is None or on_hub.file != CONFIG:
        shorts = [each.short for kinds in cards.controlnets.values() for each in kinds.on_hub]
        what = "got the file" if os.path.exists(path) else "there is no"
        raise Refusal(
            f"--controlnet must be {', '.join(shorts)}, a hub id owner/name, or a folder in diffusers' layout; "
            f"{what} {shortened(word)!r}; nearest: {nearest_word(word, shorts)}"
        )
    return word


def _mode(word: str, kinds: ControlNets) -> int:
    if word.isascii() and word.isdecimal():
        return int(word[:9])
    name = word.lower().replace("_", "-").replace(" ", "-")
    if name not in kinds.modes:
        raise Refusal(
            f"--control-mode must be one of {', '.join(kinds.modes)}, or a number, got {shortened(word)!r}; "
            f"nearest: {nearest_word(name, kinds.modes)}"
        )
    return kinds.modes.index(name)


def _check_mode(mode: int | None, shape: ControlNetShape, names: tuple[str, ...], where: Path | str) -> None:
    if shape.modes is None and mode is not None:
        raise Refusal(f"--control-mode is for unions, got {mode} for {where}, which is none; nearest: leave it out")
    if shape.modes is None:
        return
    has = [f"{name} ({number})" for number, name in enumerate(names[: shape.modes])]
    rule = f"--control-mode must be {', '.join(has)}, or a number below {shape.modes}, for the union {where}"
    if mode is None:
        raise Refusal(f"{rule}, got none; nearest: {names[0]}")
    if mode >= shape.modes:
        given = f"{names[mode]} ({mode})" if mode < len(names) else mode
        raise Refusal(f"{rule}, got {given}; nearest: {shape.modes - 1}")
