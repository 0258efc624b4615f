"""Sizes of a model's tensors before it is loaded: a known hub model's from its card, a folder's from its files."""

from math import prod
from pathlib import Path

from clear_dist.cards.card import Card, TransformerShape
from clear_dist.cards.folder import ModelFacts
from clear_dist.cards.headers import read_component, read_json, whole_number, whole_numbers
from clear_dist.plan import ModelSizes, TextSizes, VaeSizes

LAYERS_PER_BLOCK = 1
T5 = {"num_heads": 8, "d_model": 512, "d_ff": 2048}
"""diffusers' and transformers' own, where a configuration tells nothing."""


def find(facts: ModelFacts) -> ModelSizes | None:
    """Sizes of the model; None: a hub model whose configuration is not known yet.

    Raises:
        Refusal: a configuration of its folder is damaged.
    """
    if facts.shape is None or facts.card is None:
        return None
    if facts.folder is None:
        return _sizes(facts, facts.shape, VaeSizes(), TextSizes())
    return _sizes(facts, facts.shape, _vae(facts.folder, facts.card), _text(facts.folder, facts.card))


def _sizes(facts: ModelFacts, shape: TransformerShape, vae: VaeSizes, text: TextSizes) -> ModelSizes:
    return ModelSizes(
        name=facts.name,
        double_blocks=shape.num_layers,
        single_blocks=shape.num_single_layers,
        heads=shape.num_attention_heads,
        head_dim=shape.attention_head_dim,
        text_channels=shape.joint_attention_dim,
        transformer=shape.tensors(),
        vae=vae,
        text=text,
        token=facts.token_size,
        latent_channels=shape.in_channels,
    )


def _vae(folder: Path, card: Card) -> VaeSizes:
    file = folder / "vae" / "config.json"
    config = read_json(file)
    return VaeSizes(
        channels=whole_numbers(config, "block_out_channels", card.vae_channels, file),
        layers_per_block=whole_number(config, "layers_per_block", LAYERS_PER_BLOCK, file),
        latent_channels=whole_number(config, "latent_channels", card.latent_channels, file),
        attention=bool(config.get("mid_block_add_attention", True)),
        numbers=_numbers(folder, "vae", card),
    )


def _text(folder: Path, card: Card) -> TextSizes:
    """Sizes of all text encoders together; the last one's layers, which is the largest."""
    file = folder / card.text_encoders[-1] / "config.json"
    config = read_json(file)
    heads, channels, hidden = (whole_number(config, name, default, file) for name, default in T5.items())
    numbers = sum(_numbers(folder, part, card) for part in card.text_encoders)
    return TextSizes(numbers=numbers, heads=heads, channels=channels, hidden=hidden)


def _numbers(folder: Path, part: str, card: Card) -> int:
    """Numbers in the weights of a part."""
    return sum(map(prod, read_component(folder / part, card.weights[part]).values()))
