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
from clear_dist.plan.questions import Module

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


def find(facts: ModelFacts) -> PlannedModel | None:
    """The model; None: one of the hub whose configuration is not known yet. Raises a Refusal for a damaged file."""
    card = facts.card
    if card is None:
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
        text=text,
        token=facts.token_size,
        packing=card.packing,
        channels=facts.shape.in_channels * card.packing**2 // card.channels_per_latent,
        further_text_tokens=card.further_text_tokens,
        reference_area=card.reference_area,
        guides_in_one_pass=card.guides_in_one_pass,
        hoists_modulation=card.hoists_modulation,
    )


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
