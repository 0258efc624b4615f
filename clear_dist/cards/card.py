"""Facts about model families, without torch: a card in each `families/<name>/card.py`, all in `families/cards.py`."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clear_dist.cards.clear import Shapes
from clear_dist.cards.controlnets import ControlNets, HubControlNet
from clear_dist.stages import Sampling, Upscaling

INDEX = "model_index.json"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Names of weight files, without their ending, by the library that writes them."""
ENDINGS = ("json", "safetensors", "txt", "model", "jinja")


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Values for a model where the user gives none."""

    takes_guidance: bool = True
    takes_negative_prompts: bool = True
    has_rotary_positions: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    upscaling: Upscaling = field(default_factory=Upscaling)
    """All but its steps, which follow from those of `sampling`."""
    negative_prompt: str | None = None
    max_sequence_length: int = 512
    positions: tuple[int, int] | None = None
    """Most rows and columns of tokens that have positions; None: any number."""
    interpolated_above: int | None = None
    """Side in tokens of a table that the positions of larger pictures are spread over."""
    has_yarn: bool = False
    """Whether rotary positions go on above the native size by themselves: nothing else is lowered or sharpened."""
    native_tokens: int | None = None
    """Side in tokens of the square that it was trained at, where the VAE's configuration is of another model."""
    static_shift: bool = False
    """Whether the schedule's shift stays as it is at all sizes, whatever its configuration says."""


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """A layer as files of LoRA have it: one linear layer, or several whose outputs follow each other."""

    modules: Mapping[str, int]
    """Outputs of each, by its name in the model."""
    inputs: int
    is_swapped: bool = False
    """Whether the model has the halves of the outputs in the other order."""

    @property
    def outputs(self) -> int:
        return sum(self.modules.values())


class TransformerShape(Protocol):
    """The numbers in a transformer's config.json that decide its tensors."""

    @property
    def in_channels(self) -> int: ...

    def tensors(self) -> Shapes: ...

    def clear_tensors(self, down_factor: int = 1) -> Shapes:
        """Tensors of a CLEAR checkpoint; with a factor above 1 its spatial weights too."""
        ...

    def lora_layers(self) -> Mapping[str, LoraLayer]:
        """Layers that a LoRA may adapt, by all names in use, with underscores for dots."""
        ...

    def defaults(self, scheduler: Mapping[str, Any], pipeline: Mapping[str, Any]) -> Defaults:
        """By the configuration of the scheduler and the pipeline's index."""
        ...


@dataclass(frozen=True, kw_only=True)
class TextEncoders:
    """All text encoders of a model together: numbers in their weights, and the widest one's layers."""

    numbers: int
    heads: int
    channels: int
    hidden: int
    """Channels of its feed-forward layers."""


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model on the hub that is known before its files are here; `native_size` in pixels."""

    id: str
    short: str | None = None
    """Name that `--model` takes instead of the id."""
    native_size: int
    shape: TransformerShape
    defaults: Defaults
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The config.json of transformer and VAE, as far as it differs from diffusers' defaults."""
    text: TextEncoders | None = None
    loras: Mapping[str, str] = field(default_factory=dict)
    """Published LoRA for upper stages: hub files `owner/name:file` by the names that `--lora` takes instead."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """CLEAR checkpoints for all of a family's known models; `radius` is taken where no window was asked for."""

    repository: str
    files: tuple[str, ...]
    radius: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """One model family: diffusers' classes by name, `native_size` in pixels."""

    pipeline: str
    scheduler: str
    parts: Mapping[str, str | None]
    """Folders of the pipeline, each with the "library.Class" that its weights are loaded as; None: it has none."""
    shape_of: Callable[[Mapping[str, Any], Path | str], TransformerShape]
    """Reads the transformer's configuration; the second argument is its file, for refusals."""
    packing: int
    """Latents along the side of a token."""
    channels_per_latent: int
    """Input channels of the transformer per channel of the VAE."""
    vae_channels: tuple[int, ...]
    """Channels of the VAE's blocks where its configuration has none; likewise the next two."""
    latent_channels: int
    native_size: int
    further_text_tokens: int = 0
    """Text tokens besides those of `--max-sequence-length`."""
    guides_in_one_pass: bool = False
    """Whether classifier-free guidance is a batch of two; else it is two passes."""
    vae_strides: tuple[int, ...] = (1,)
    """Strides that its VAE may have besides its blocks, which halve the sides each."""
    starts_from_pictures: bool = True
    """Whether diffusers has image-to-image for it."""
    reference_area: int | None = None
    """Most pixels of a picture that it looks at; None: it looks at none."""
    hoists_modulation: bool = True
    """Whether `--hoist-modulation` has weights to move."""
    token_limits: Mapping[str, int]
    """Tokens that each tokenizer encodes where its own configuration says nothing."""
    schedule: Mapping[str, float]
    """Positive numbers of the scheduler's configuration, with their usual values."""
    needs: tuple[str, ...] = ()
    """Packages that its tokenizer is not made without, beside those of every family."""
    originals: Mapping[str, str] = field(default_factory=dict)
    """Patterns of names in single files that are of no linear layer, with diffusers' names; empty: not in the model."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of other parts' single files, without `.safetensors`; the first as in all-in-one files."""
    hub_models: tuple[HubModel, ...] = ()
    clear: Published | None = None

    @property
    def transformer(self) -> str:
        return self.class_of("transformer")[1]

    @property
    def weights(self) -> dict[str, str]:
        return {part: STEMS[self.class_of(part)[0]] for part, kind in self.parts.items() if kind is not None}

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts if part.startswith("text_encoder"))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts if part.startswith("tokenizer"))

    def class_of(self, part: str) -> tuple[str, str]:
        kind = self.parts[part]
        assert kind is not None, part
        library, _, name = kind.partition(".")
        return library, name


@dataclass(frozen=True, kw_only=True)
class Cards:
    """All families; `default` is the hub's model for CUDA where none was asked for."""

    cards: tuple[Card, ...]
    default: str
    controlnets: Mapping[str, ControlNets] = field(default_factory=dict)
    """By the name of the pipeline without them."""

    @property
    def hub_models(self) -> Iterator[tuple[Card, HubModel]]:
        return ((card, known) for card in self.cards for known in card.hub_models)

    def of_pipeline(self, name: object) -> Card | None:
        return next((card for card in self.cards if card.pipeline == name), None)

    def of_transformer(self, name: str) -> Card | None:
        return next((card for card in self.cards if card.transformer == name), None)

    def on_hub(self, model: str) -> tuple[Card, HubModel] | None:
        return next(((card, known) for card, known in self.hub_models if model in (known.id, known.short)), None)

    def controlnet_on_hub(self, name: str) -> HubControlNet | None:
        known = (each for kind in self.controlnets.values() for each in kind.on_hub)
        return next((each for each in known if name in (each.id, each.short)), None)

    @property
    def hub_ids(self) -> tuple[str, ...]:
        return tuple(known.id for _, known in self.hub_models)

    @property
    def short_names(self) -> tuple[str, ...]:
        return tuple(known.short for _, known in self.hub_models if known.short is not None)

    def made_for(self, tensors: Collection[str], down_factor: int, *, but: Card | None) -> HubModel | None:
        """The known model of a family other than `but` whose CLEAR checkpoints have tensors of these names."""
        others = (known for card, known in self.hub_models if card is not but)
        return next((known for known in others if known.shape.clear_tensors(down_factor).keys() == set(tensors)), None)

    @property
    def lora_layers(self) -> frozenset[str]:
        """Layers of all known models, for a LoRA whose model is not known yet."""
        return frozenset(layer for _, known in self.hub_models for layer in known.shape.lora_layers())

    @property
    def published(self) -> tuple[Published, ...]:
        return tuple(card.clear for card in self.cards if card.clear is not None)

    def files_of(self, model: str, *, without_weights: Collection[str] = ()) -> tuple[str, ...]:
        """Patterns of a hub model's files; those of any family for an unknown model."""
        known = self.on_hub(model)
        cards = self.cards if known is None else known[:1]
        parts = dict.fromkeys(part for card in cards for part in card.parts)
        patterns = {f"{part}/*.{ending}": None for part in parts for ending in ENDINGS}
        for part in without_weights:
            patterns.pop(f"{part}/*.safetensors", None)
        return (INDEX, *patterns)
