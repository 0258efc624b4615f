"""Model facts before loading: family, sizes and defaults, from a folder or a name."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from clear_dist import demo
from clear_dist.cards.card import INDEX, Card, Cards, Defaults, HubModel, TransformerShape
from clear_dist.cards.clear import require_same_tensors
from clear_dist.cards.headers import positive_number, read_json, whole_number, whole_numbers
from clear_dist.cards.single_file import Files, check_other_part, layout_of, weight_shapes
from clear_dist.options import Refusal, nearest_word, shortened
from clear_dist.stages import Sampling, Upscaling

HUB_ID = re.compile(r"(?=.{3,96}$)[\w.-]+/[\w.-]+", re.ASCII)
WIDTHS = ("latent_channels", "d_model", "hidden_size")
"""Names of the channels of a VAE's latents, and of a text encoder."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


@dataclass(frozen=True, kw_only=True)
class ModelFacts(Defaults):
    """Facts about a model for checks and defaults; sizes in pixels, `token_size` along a token's side."""

    location: str
    """A folder, or a hub id."""
    is_demo: bool = False
    folder: Path | None = None
    card: Card | None = None
    """None, like the next two, for a hub model not known before its files are here."""
    shape: TransformerShape | None = None
    native_size: int | None = None
    token_size: int = 16
    on_hub: HubModel | None = None
    """What is known of a hub model before its files are here."""
    files: Files = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name that may be shared: no folders of this machine."""
        if "transformer" in self.files:
            return self.files["transformer"].file.name
        return "demo" if self.is_demo else self.location if self.folder is None else self.folder.name


def find_model(model: str, cards: Cards, *, has_cuda: bool) -> ModelFacts:
    """The model that `--model` names; raises a Refusal for a folder that is missing, damaged or of no known family."""
    if model == "auto":
        model = cards.default if has_cuda else "demo"
    if model == "demo":
        return _demo(cards)
    found = cards.on_hub(model)
    is_on_hub = found is not None or (HUB_ID.fullmatch(model) and not model.startswith((".", "/", "~")))
    if os.path.exists(model) or not is_on_hub:
        return read_folder(Path(model).expanduser(), cards)
    if found is None:
        return ModelFacts(location=model)
    card, known = found
    token_size = _token_size(card, card.vae_channels)
    facts = ModelFacts(
        location=known.id,
        card=card,
        shape=known.shape,
        native_size=known.native_size,
        token_size=token_size,
        on_hub=known,
    )
    return replace(facts, **vars(known.defaults))


def card_of(folder: Path, cards: Cards) -> Card:
    """The family of a folder in diffusers' layout; raises a Refusal where its pipeline is of none."""
    name = read_json(folder / INDEX).get("_class_name")
    card = cards.of_pipeline(name)
    if card is None:
        known = " or ".join(card.pipeline for card in cards.cards)
        raise Refusal(f"--model must be a {known}, got {name} in {folder}; nearest: {cards.default}")
    return card


def read_folder(folder: Path, cards: Cards, files: Files | None = None) -> ModelFacts:
    """The model in a folder, its weights' headers compared with its configurations; raises as `find_model`.

    Weights in `files` take the place of the folder's.
    """
    files = files or {}
    _check_folder(folder, cards)
    card = card_of(folder, cards)
    _check_parts(folder, card, cards.default)
    _check_tokenizers(folder, card)
    configuration, vae_file = folder / "transformer" / "config.json", folder / "vae" / "config.json"
    shape, vae = card.shape_of(read_json(configuration), configuration), read_json(vae_file)
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(scheduler_file)
    for name, usual in card.schedule.items():
        positive_number(scheduler, name, usual, scheduler_file)
    vae_channels = whole_numbers(vae, "block_out_channels", card.vae_channels, vae_file)
    token_size = _token_size(card, vae_channels) * whole_number(vae, "stride", 1, vae_file)
    channels = card.channels_per_latent * whole_number(vae, "latent_channels", card.latent_channels, vae_file)
    native_size = whole_number(vae, "sample_size", card.native_size, vae_file)
    if shape.in_channels != channels:
        raise Refusal(
            f"the transformer must take {channels} channels, {card.channels_per_latent} per channel of the VAE, "
            f"got {shape.in_channels} in {folder}: models that take another picture are not supported; "
            f"nearest: {cards.default}"
        )
    for part in card.weights:
        if part in files:
            continue
        shapes = weight_shapes(folder, card, part, {})
        if part == "transformer":
            require_same_tensors(shape.tensors(), shapes, folder / part)
    _check_files(folder, card, shape, files)
    defaults = shape.defaults(scheduler, read_json(folder / INDEX))
    native_tokens = defaults.native_tokens or max(native_size // token_size, 1)
    return ModelFacts(
        location=str(folder),
        folder=folder,
        card=card,
        shape=shape,
        native_size=native_tokens * token_size,
        token_size=token_size,
        files=files,
        **vars(defaults),
    )


def _demo(cards: Cards) -> ModelFacts:
    return replace(
        read_folder(demo.WEIGHTS, cards),
        is_demo=True,
        sampling=Sampling(steps=demo.DEFAULT_STEPS, guidance_scale=0.0, true_cfg_scale=demo.DEFAULT_TRUE_CFG_SCALE),
        upscaling=Upscaling(guidance_scale=0.0, strength=demo.DEFAULT_STRENGTH),
        max_sequence_length=demo.DEFAULT_MAX_SEQUENCE_LENGTH,
        negative_prompt="",
    )


def _token_size(card: Card, vae_channels: tuple[int, ...]) -> int:
    """Pixels along the side of a token: each block of the VAE but the last halves the sides."""
    return card.packing * 2 ** (len(vae_channels) - 1)


def _check_folder(folder: Path, cards: Cards) -> None:
    if not os.path.exists(folder):  # a Path raises for a name that is too long
        words = "auto", "demo", *cards.short_names
        nearest = nearest_word(str(folder), (*words[1:], *cards.hub_ids))
        raise Refusal(
            f"--model must be {', '.join(words)}, a hub id such as {cards.default}, or a folder; "
            f"there is no {shortened(str(folder))}; nearest: {nearest}"
        )
    if not folder.is_dir():
        raise Refusal(f"--model must be a folder in diffusers' layout, got the file {folder}; nearest: {folder.parent}")
    if not any(folder.iterdir()):
        raise Refusal(f"--model must be a folder in diffusers' layout, got the empty folder {folder}; nearest: demo")


def _check_parts(folder: Path, card: Card, nearest: str) -> None:
    for part in card.parts:
        if not (folder / part).is_dir():
            raise Refusal(f"a {card.pipeline} must have the folder {part}, and {folder} has none; download it again")
    vae = (card.parts["vae"] or "").rpartition(".")[2]
    for part, kind in {"transformer": card.transformer, "vae": vae, "scheduler": card.scheduler}.items():
        if others := _classes(folder, part) - {kind}:
            got = ", ".join(sorted(others))
            raise Refusal(f"the class of the {part} must be {kind}, got {got} in {folder}; nearest: {nearest}")
    stride = read_json(folder / "vae" / "config.json").get("stride", 1)
    if stride not in card.vae_strides:  # diffusers would leave it out
        got = f"got a stride of {shortened(str(stride))} in {folder / 'vae'}"
        raise Refusal(f"the VAE must be diffusers' {vae}, {got}; nearest: {card.vae_strides[-1]}")


def _classes(folder: Path, part: str) -> set[str]:
    """A part's class by the pipeline's index, if that has the part, and by its own configuration."""
    listed = read_json(folder / INDEX).get(part, part)
    by_index = listed[1] if isinstance(listed, list) and len(listed) == 2 else None
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    own = str(read_json(folder / part / file).get("_class_name"))
    return {own} if listed == part else {own, str(by_index)}


def _check_files(folder: Path, card: Card, shape: TransformerShape, files: Files) -> None:
    for part, source in files.items():
        config = {} if part == "transformer" else read_json(folder / part / "config.json")
        config = config.get("text_config", config)  # of a model that sees pictures too
        name = next((name for name in WIDTHS if name in config), None)
        if part == "transformer":
            layout_of(source, card, shape)
        elif name is not None:
            check_other_part(part, source, whole_number(config, name, 1, folder / part / "config.json"))


def _check_tokenizers(folder: Path, card: Card) -> None:
    for tokenizer in card.tokenizers:
        files = {file.name: file for file in (folder / tokenizer).iterdir()}
        if not files.keys() & set(VOCABULARIES):
            raise Refusal(
                f"{folder / tokenizer} must hold one of {', '.join(VOCABULARIES)}, and has none; download it again"
            )
        for file in files.values():
            if file.suffix == ".json":
                read_json(file)
    for tokenizer, usual in card.token_limits.items():
        settings = folder / tokenizer / "tokenizer_config.json"
        whole_number(read_json(settings), "model_max_length", usual, settings)
