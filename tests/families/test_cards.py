"""A second card beside FLUX's: other classes, parts, tensors and names of layers, with nothing changed elsewhere."""

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clear_dist.cards.card import Card, Cards, Defaults, HubModel, LoraLayer, Published, TextEncoders
from clear_dist.cards.clear import Shapes, is_image_side, with_spatial_weights
from clear_dist.cards.folder import card_of
from clear_dist.cards.headers import whole_number
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import CARD as FLUX
from clear_dist.families.flux.card import FLUX_DEV
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.plan import model
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.request import Lora, Request
from clear_dist.request.settle import located, settle
from clear_dist.stages import Sampling
from clear_dist.weights.offload import offloaded_parts
from tests.tiny import make_tiny_flux

CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "SecondPipeline",
        "transformer": ["diffusers", "SecondTransformer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "SecondScheduler"],
    },
    "transformer/config.json": {"_class_name": "SecondTransformer", "depth": 3, "in_channels": 4},
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 8, 8],
        "latent_channels": 4,
        "sample_size": 200,
    },
    "scheduler/scheduler_config.json": {"_class_name": "SecondScheduler"},
    "tokenizer/tokenizer.json": {},
    "text_encoder/config.json": {},
}
VAE, TEXT = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
CLEAR, LORA = "clear_local_3.safetensors", "style.safetensors"


@dataclass(frozen=True, kw_only=True)
class SecondShape:
    """Blocks of one attention and one layer after it."""

    in_channels: int
    num_layers: int
    num_single_layers: int = 0
    num_attention_heads: int = 2
    attention_head_dim: int = 4
    joint_attention_dim: int = 6

    @classmethod
    def of(cls, config: Mapping[str, Any], where: Path | str) -> "SecondShape":
        depth = whole_number(config, "depth", 3, where)
        return cls(in_channels=whole_number(config, "in_channels", 4, where), num_layers=depth)

    def tensors(self) -> Shapes:
        blocks = [f"layers.{index}" for index in range(self.num_layers)]
        layers = {f"{block}.attn.{name}.weight": (8, 8) for block in blocks for name in ("to_q", "to_k", "to_v")}
        return {"patch.weight": (8, self.in_channels, 2, 2), **{f"{x}.mlp.weight": (16, 8) for x in blocks}, **layers}

    def clear_tensors(self, down_factor: int = 1) -> Shapes:
        replaced = {name: shape for name, shape in self.tensors().items() if is_image_side(name)}
        return with_spatial_weights(replaced, down_factor)

    def lora_layers(self) -> dict[str, LoraLayer]:
        layers = {f"layers.{index}.mlp": 16 for index in range(self.num_layers)}
        return {name.replace(".", "_"): LoraLayer(modules={name: size}, inputs=8) for name, size in layers.items()}

    def defaults(self, scheduler: Mapping[str, Any], pipeline: Mapping[str, Any]) -> Defaults:
        return Defaults(takes_guidance=False, sampling=Sampling(steps=9), max_sequence_length=77)


LARGE = SecondShape(in_channels=4, num_layers=8)
SECOND = Card(
    pipeline="SecondPipeline",
    scheduler="SecondScheduler",
    parts={
        "transformer": "diffusers.SecondTransformer",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.T5EncoderModel",
        "tokenizer": None,
        "scheduler": None,
    },
    shape_of=SecondShape.of,
    packing=2,
    channels_per_latent=1,
    vae_channels=(8, 8, 8, 8),
    latent_channels=4,
    native_size=512,
    token_limits={},
    schedule={"shift": 1.0},
    hub_models=(
        HubModel(
            id="someone/second",
            native_size=512,
            shape=LARGE,
            defaults=LARGE.defaults({}, {}),
            configs={"transformer": {"num_layers": LARGE.num_layers}, "vae": {}},
            text=TextEncoders(numbers=1, heads=2, channels=3, hidden=4),
        ),
    ),
    clear=Published(
        repository="someone/clear", files=("clear_local_3.safetensors", "clear_local_5.safetensors"), radius=5
    ),
)
BOTH = Cards(cards=(FLUX, SECOND), default="someone/second")


def save(shapes: Shapes, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with its CLEAR checkpoint and a LoRA."""
    folder, shape = tmp_path / "model", SecondShape(in_channels=4, num_layers=3)
    folder.mkdir()
    for name, shapes in ((TRANSFORMER, shape.tensors()), (VAE, {"x": (2,)}), (TEXT, {"x": (2,)})):
        save(shapes, folder / name)
    for name, config in CONFIGS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    save(shape.clear_tensors(), folder / CLEAR)
    save({"layers.2.mlp.lora_A.weight": (4, 8), "layers.2.mlp.lora_B.weight": (16, 4)}, folder / LORA)
    return folder


def settled(model: Path | str, **given: Any) -> Request:
    return settle(GenerateFlags(model=str(model), device="cpu", **given), Place(), BOTH)[0]


def test_a_folder_is_settled(folder: Path) -> None:
    request = settled(folder, lora=[f"{folder / LORA}:0.5"])
    assert (request.token_size, request.native_size, request.size) == (8, 200, (200, 200))
    assert (request.clear_weights, request.window) == (str(folder / CLEAR), 3)
    assert request.loras == (Lora(source=str(folder / LORA), weight=0.5),)
    assert (request.sampling.steps, request.max_sequence_length) == (9, 77)


def test_a_request_travels_and_its_card_is_found_again(folder: Path) -> None:
    request = pickle.loads(pickle.dumps(settled(folder)))
    assert card_of(Path(request.model), BOTH) is SECOND
    assert (SECOND.text_encoders, SECOND.tokenizers) == (("text_encoder",), ("tokenizer",))
    assert offloaded_parts(SECOND.parts) == ("text_encoder", "vae")
    assert offloaded_parts(FLUX.parts) == ("text_encoder", "text_encoder_2", "vae")
    assert FLUX.weights == {
        "transformer": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
        "text_encoder_2": "model",
    }


def change(name: str, **values: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(CONFIGS[name] | values))


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.rmtree(folder / name)


def tensors(name: str, shapes: Shapes) -> Callable[[Path], object]:
    return lambda folder: save(shapes, folder / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            change("model_index.json", _class_name="OtherPipeline"),
            "--model must be a FluxPipeline or SecondPipeline, got OtherPipeline in .*; nearest: someone/second",
        ),
        (
            change("transformer/config.json", _class_name="FluxTransformer2DModel"),
            "must be SecondTransformer, got Flux",
        ),
        (change("transformer/config.json", depth="deep"), 'depth must be a whole number from 1 to 65536, got "deep"'),
        (change("transformer/config.json", depth=4), "lacks layers.3.attn.to_k.weight and 3 more"),
        (change("vae/config.json", latent_channels=16), "must take 16 channels, 1 per channel of the VAE, got 4 in"),
        (change("scheduler/scheduler_config.json", shift=0), "shift must be a number above 0, got 0"),
        (change("scheduler/scheduler_config.json", _class_name="X"), "must be SecondScheduler, got X"),
        (without("text_encoder"), "a SecondPipeline must have the folder text_encoder, and"),
        (lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), "tokenizer must hold one of tokenizer.json"),
        (
            tensors(CLEAR, LARGE.clear_tensors()),
            "clear_local_3.safetensors has an unexpected tensor layers.3.attn.to_k",
        ),
        (tensors(LORA, {"layers.2.mlp.lora_A.weight": (4, 7)}), "must have 8 inputs, got 7 in .*style"),
        (tensors(LORA, {"x_embedder.lora_A.weight": (4, 64)}), "adapts x_embedder, which this model has not"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(Refusal, match=message):
        settled(folder, lora=[str(folder / LORA)])


def test_a_hub_model_that_is_known(folder: Path) -> None:
    request = settled("someone/second")
    assert (request.size, request.token_size, request.clear_weights) == (
        (512, 512),
        16,
        "someone/clear:clear_local_5.safetensors",
    )
    with pytest.raises(Refusal, match="--window must be one of 3, 5, which someone/clear has weights for, got 4"):
        settled("someone/second", window=4)
    with pytest.raises(Refusal, match=r"lacks layers\.3\.attn\.to_k"):
        settled("someone/second", clear_weights=str(folder / CLEAR))
    assert "text_encoder_2/*.json" not in BOTH.files_of("someone/second")
    assert BOTH.files_of(FLUX_DEV) == CARDS.files_of(FLUX_DEV)


def test_a_hub_model_that_is_not_known_may_be_of_either_family(folder: Path, tmp_path: Path) -> None:
    assert set(BOTH.files_of("someone/else")) == {*BOTH.files_of("someone/second"), *BOTH.files_of(FLUX_DEV)}
    halves = {"A": (4, 64), "B": (3072, 4)}
    save({f"transformer.x_embedder.lora_{x}.weight": halves[x] for x in halves}, tmp_path / "flux.safetensors")
    loras = [str(folder / LORA), str(tmp_path / "flux.safetensors")]
    request = settled("someone/else", clear_weights="none", lora=loras)
    with pytest.raises(Refusal, match=r"flux\.safetensors adapts transformer\.x_embedder, which this model has not"):
        located(request, folder, None, request.loras, BOTH)
    request = located(request, folder, str(folder / CLEAR), request.loras[:1], BOTH)
    assert (request.model, request.size, request.token_size) == (str(folder), (200, 200), 8)
    with pytest.raises(Refusal, match="a hub id such as someone/second, or a folder; there is no secnd; nearest"):
        settled("secnd")


def test_a_plan_knows_what_the_cards_know(folder: Path) -> None:
    found = {
        name: model.find(settle(GenerateFlags(model=name, device="cpu"), Place(), BOTH)[1])
        for name in (str(folder), "someone/second", "someone/else")
    }
    layers = [None if each is None else each.transformer.config.get("num_layers", 3) for each in found.values()]
    assert layers == [3, 8, None]
    assert {each.transformer.kind for each in found.values() if each is not None} == {"diffusers.SecondTransformer"}


def test_each_family_of_both_is_found(tmp_path: Path) -> None:
    flux = make_tiny_flux(tmp_path / "flux")
    assert card_of(flux, BOTH) is card_of(flux, CARDS) is FLUX
