"""Cards: what is known without torch of a model family. `families/<name>/card.py` has one, `families/cards.py` all."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clear_dist.cards.clear import Shapes
from clear_dist.stages import Sampling, Upscaling

INDEX = "model_index.json"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Names of weight files, without their ending, by the library that writes them."""
ENDINGS = ("json", "safetensors", "txt", "model")
"""Endings of the files that a model is made of."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Values for a model where the user gives none."""

    takes_guidance: bool = True
    """Whether it was distilled with guidance."""
    sampling: Sampling = field(default_factory=Sampling)
    upscaling: Upscaling = field(default_factory=Upscaling)
    """All but its steps, which follow from those of `sampling`."""
    negative_prompt: str | None = None
    max_sequence_length: int = 512


class TransformerShape(Protocol):
    """The numbers in a transformer's config.json that decide its tensors; attributes have diffusers' names."""

    @property
    def in_channels(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_single_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def attention_head_dim(self) -> int: ...
    @property
    def joint_attention_dim(self) -> int: ...

    def tensors(self) -> Shapes:
        """All tensors of the transformer."""
        ...

    def clear_tensors(self, down_factor: int = 1) -> Shapes:
        """All tensors of a CLEAR checkpoint; with a factor above 1 its spatial weights too."""
        ...

    def lora_layers(self) -> Mapping[str, tuple[int, int]]:
        """Outputs and inputs of layers that a LoRA may adapt, by all names in use, with underscores for dots."""
        ...

    def defaults(self, scheduler: Mapping[str, Any]) -> Defaults:
        """Defaults of the model, given its scheduler's configuration."""
        ...


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model on the hub that is known before its files are here."""

    id: str
    native_size: int
    """Pixels."""
    shape: TransformerShape
    defaults: Defaults


@dataclass(frozen=True, kw_only=True)
class Published:
    """CLEAR checkpoints that are published for all of a family's known models."""

    repository: str
    files: tuple[str, ...]
    radius: int
    """Taken where no window was asked for."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One model family."""

    pipeline: str
    """Name of diffusers' class, as the scheduler's."""
    scheduler: str
    parts: Mapping[str, str | None]
    """Folders of the pipeline by diffusers' names, each with the class that its weights are loaded as, as
    "library.Class"; None: it has no weights."""
    shape_of: Callable[[Mapping[str, Any], Path | str], TransformerShape]
    """Reads the transformer's configuration; takes the name of its file too, for a Refusal where a number is wrong."""
    packing: int
    """Latents along the side of a token."""
    channels_per_latent: int
    """Channels that the transformer takes for each channel of the VAE."""
    vae_channels: tuple[int, ...]
    """Channels of the VAE's blocks where its configuration has none; likewise the next two."""
    latent_channels: int
    native_size: int
    """Pixels."""
    token_limits: Mapping[str, int]
    """Tokenizers whose own configuration says how many tokens are encoded, and the number where it says nothing."""
    schedule: Mapping[str, float]
    """Numbers above 0 in the scheduler's configuration, each with its usual value."""
    hub_models: tuple[HubModel, ...] = ()
    clear: Published | None = None

    @property
    def transformer(self) -> str:
        """Name of the transformer's class."""
        return self.class_of("transformer")[1]

    @property
    def weights(self) -> dict[str, str]:
        """Parts with weights, each with the name of its files."""
        return {part: STEMS[self.class_of(part)[0]] for part, kind in self.parts.items() if kind is not None}

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts if part.startswith("text_encoder"))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts if part.startswith("tokenizer"))

    def class_of(self, part: str) -> tuple[str, str]:
        """Library and class that a part with weights is loaded as."""
        kind = self.parts[part]
        assert kind is not None, part
        library, _, name = kind.partition(".")
        return library, name


@dataclass(frozen=True, kw_only=True)
class Cards:
    """All families, and what finds one."""

    cards: tuple[Card, ...]
    default: str
    """The hub's model that is drawn with where CUDA is and no model was asked for."""

    def of_pipeline(self, name: object) -> Card | None:
        """The family of a pipeline's class."""
        return next((card for card in self.cards if card.pipeline == name), None)

    def of_transformer(self, name: object) -> Card | None:
        """The family of a transformer's class."""
        return next((card for card in self.cards if card.transformer == name), None)

    def on_hub(self, model: str) -> tuple[Card, HubModel] | None:
        """Family and facts of a model on the hub; None: it is not known."""
        return next(((card, known) for card, known in self._hub_models() if known.id == model), None)

    @property
    def hub_ids(self) -> tuple[str, ...]:
        """All known models on the hub."""
        return tuple(known.id for _, known in self._hub_models())

    @property
    def lora_layers(self) -> frozenset[str]:
        """Layers of all known models together, which a LoRA for a model that is not known yet may adapt."""
        return frozenset(layer for _, known in self._hub_models() for layer in known.shape.lora_layers())

    @property
    def published(self) -> tuple[Published, ...]:
        """CLEAR checkpoints of all families."""
        return tuple(card.clear for card in self.cards if card.clear is not None)

    def files_of(self, model: str) -> tuple[str, ...]:
        """Patterns of the files to fetch of a model on the hub; of one that is not known those of any family."""
        known = self.on_hub(model)
        cards = self.cards if known is None else known[:1]
        parts = dict.fromkeys(part for card in cards for part in card.parts)
        return (INDEX, *(f"{part}/*.{ending}" for part in parts for ending in ENDINGS))

    def _hub_models(self) -> Iterator[tuple[Card, HubModel]]:
        for card in self.cards:
            for known in card.hub_models:
                yield card, known
