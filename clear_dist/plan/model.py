"""What a plan needs of a model: how its modules are made, and sizes of its text encoders; read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from clear_dist.cards.card import Card, TextEncoders
from clear_dist.cards.folder import ModelFacts
from clear_dist.cards.headers import read_json, whole_number
from clear_dist.cards.single_file import Files, weight_shapes
from clear_dist.families.cards import CARDS
from clear_dist.plan.questions import Module
from clear_dist.request.controlnet import CONFIG, folder_of, kinds_for
from clear_dist.request.request import Control

WIDTHS = {
    "heads": (("num_heads", 8), ("num_attention_heads", 8)),
    "channels": (("d_model", 512), ("hidden_size", 512)),
    "hidden": (("d_ff", 2048), ("intermediate_size", 2048)),
}
"""transformers' names of a text encoder's sizes, and T5's defaults."""


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    name: str
    transformer: Module
    vae: Module
    controlnet: Module | None = None
    text: TextEncoders
    token: int
    """Pixels along the side of a token."""
    packing: int
    """Latents along it."""
    channels: int
    """Numbers of a token of latents."""
    further_text_tokens: int = 0
    reference_area: int | None = None
    guides_in_one_pass: bool = False
    hoists_modulation: bool = True


def find(facts: ModelFacts, control: Control | None = None) -> PlannedModel | None:
    """The model with its ControlNet; None: one of both is the hub's, and its configuration not known yet.

    Raises a Refusal for a damaged file.
    """
    card = facts.card
    controlnet = None if control is None else controlnet_of(control, facts)
    if card is None or (controlnet is None) != (control is None):
        return None
    configs: Mapping[str, Mapping[str, Any]]
    if facts.folder is not None:
        configs = {part: read_json(facts.folder / part / "config.json") for part in ("transformer", "vae")}
        text = text_encoders(facts.folder, card, facts.files)
    elif facts.on_hub is not None and facts.on_hub.text is not None:
        configs, text = facts.on_hub.configs, facts.on_hub.text
    else:
        return None
    transformer, vae = (Module(kind=card.parts[part] or "", config=configs[part]) for part in ("transformer", "vae"))
    assert facts.shape is not None, "known with the configurations"
    return PlannedModel(
        name=facts.name,
        transformer=transformer,
        vae=vae,
        controlnet=controlnet,
        text=text,
        token=facts.token_size,
        packing=card.packing,
        channels=facts.shape.in_channels * card.packing**2 // card.channels_per_latent,
        further_text_tokens=card.further_text_tokens,
        reference_area=card.reference_area,
        guides_in_one_pass=card.guides_in_one_pass,
        hoists_modulation=card.hoists_modulation,
    )


def controlnet_of(control: Control, facts: ModelFacts) -> Module | None:
    known, folder = CARDS.controlnet_on_hub(control.source), folder_of(control)
    config: Mapping[str, Any]
    if folder is not None:
        config = read_json(folder / CONFIG)
    elif known is not None:
        config = known.config
    else:
        return None
    return Module(kind=f"diffusers.{kinds_for(facts, CARDS).kind}", config=config)


def text_encoders(folder: Path, card: Card, files: Files) -> TextEncoders:
    """Numbers in the weights of all, and widths of the last one, which is the largest."""
    numbers = sum(
        prod(shape) for part in card.text_encoders for shape in weight_shapes(folder, card, part, files).values()
    )
    file = folder / card.text_encoders[-1] / "config.json"
    config = read_json(file)
    config = config.get("text_config", config)  # of a model that sees pictures too
    widths = {}
    for width, names in WIDTHS.items():
        name, default = next((each for each in names if each[0] in config), names[0])
        widths[width] = whole_number(config, name, default, file)
    return TextEncoders(numbers=numbers, **widths)
