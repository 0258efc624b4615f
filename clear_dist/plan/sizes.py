"""The sizes of a model's tensors, before it is loaded: FLUX.1's are known, those of a folder are read."""

from math import prod
from pathlib import Path

from clear_dist.cards.folder import LATENT_CHANNELS, VAE_CHANNELS, WEIGHT_STEMS, ModelFacts
from clear_dist.cards.headers import read_component, read_json, whole_number, whole_numbers
from clear_dist.families.flux.card import FLUX_DEV, FLUX_SCHNELL, FluxShape
from clear_dist.plan import ModelSizes, TextSizes, VaeSizes

LAYERS_PER_BLOCK = 1
T5 = {"num_heads": 8, "d_model": 512, "d_ff": 2048}
"""diffusers' and transformers' own, where a configuration tells nothing."""
KNOWN = {FLUX_DEV: FluxShape(guidance_embeds=True), FLUX_SCHNELL: FluxShape()}


def find(facts: ModelFacts) -> ModelSizes | None:
    """Those of the model; None: a hub model whose configuration is not known yet.

    Raises:
        Refusal: a configuration of its folder is damaged.
    """
    if facts.folder is None:
        shape = KNOWN.get(facts.location)
        return None if shape is None else _sizes(facts, shape, VaeSizes(), TextSizes())
    assert facts.flux is not None, "read with the folder"
    return _sizes(facts, facts.flux, _vae(facts.folder / "vae"), _text(facts.folder))


def _sizes(facts: ModelFacts, flux: FluxShape, vae: VaeSizes, text: TextSizes) -> ModelSizes:
    name = "demo" if facts.is_demo else facts.location if facts.folder is None else facts.folder.name
    return ModelSizes(
        name=name,
        double_blocks=flux.num_layers,
        single_blocks=flux.num_single_layers,
        heads=flux.num_attention_heads,
        head_dim=flux.attention_head_dim,
        text_channels=flux.joint_attention_dim,
        transformer=flux.tensors(),
        vae=vae,
        text=text,
        token=facts.token_size,
        latent_channels=flux.in_channels,
    )


def _vae(folder: Path) -> VaeSizes:
    file = folder / "config.json"
    config = read_json(file)
    return VaeSizes(
        channels=whole_numbers(config, "block_out_channels", VAE_CHANNELS, file),
        layers_per_block=whole_number(config, "layers_per_block", LAYERS_PER_BLOCK, file),
        latent_channels=whole_number(config, "latent_channels", LATENT_CHANNELS, file),
        attention=bool(config.get("mid_block_add_attention", True)),
        numbers=_numbers(folder),
    )


def _text(folder: Path) -> TextSizes:
    file = folder / "text_encoder_2" / "config.json"
    config = read_json(file)
    heads, channels, hidden = (whole_number(config, name, default, file) for name, default in T5.items())
    numbers = sum(_numbers(folder / part) for part in ("text_encoder", "text_encoder_2"))
    return TextSizes(numbers=numbers, heads=heads, channels=channels, hidden=hidden)


def _numbers(folder: Path) -> int:
    """Of a component's weights."""
    return sum(map(prod, read_component(folder, WEIGHT_STEMS[folder.name]).values()))
