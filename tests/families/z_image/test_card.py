"""What is known of Z-Image before it is loaded, and what is refused then."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import nn

from clear_dist.cards.folder import read_folder
from clear_dist.families.cards import CARDS
from clear_dist.families.z_image.card import BASE, TURBO, ZImageShape
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.parallelize import parallelize
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import settle
from tests.families.tiny import save_pipeline
from tests.families.z_image.tiny import BASE_SHIFT, TURBO_SHIFT, make_tiny_z_image


def tensors_of(transformer: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}


@pytest.mark.parametrize(("layers", "refiners"), [(2, 1), (3, 2)])
def test_every_tensor_of_the_transformer_is_known(layers: int, refiners: int) -> None:
    transformer = make_tiny_z_image(layers=layers, refiners=refiners).transformer
    assert ZImageShape.of(transformer.config, "here").tensors() == tensors_of(transformer)


@pytest.mark.parametrize("model", [TURBO, BASE])
def test_the_models_of_the_hub_have_diffusers_tensors(model: str) -> None:
    found = CARDS.on_hub(model)
    assert found is not None
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel.from_config(dict(found[1].configs["transformer"]))
    assert found[1].shape.tensors() == tensors_of(transformer)
    assert sum(x.numel() for x in transformer.parameters()) == 6_154_908_736


def settled(**flags: Any) -> tuple[Any, Any, tuple[str, ...]]:
    return settle(GenerateFlags(device="cpu", **flags), Place(), CARDS)


def test_turbo_and_base_differ_in_steps_and_guidance() -> None:
    turbo, base = (settled(model=model)[0] for model in ("z-image-turbo", "z-image"))
    assert (turbo.sampling.steps, turbo.sampling.passes, turbo.negative_prompt) == (8, 1, None)
    assert (base.sampling.steps, base.sampling.passes, base.negative_prompt) == (50, 2, "")
    assert (turbo.upscaling.steps, base.upscaling.passes) == (6, 2)


def test_a_folder_is_told_from_its_schedule(tmp_path: Path) -> None:
    for shift, steps in ((TURBO_SHIFT, 8), (BASE_SHIFT, 50)):
        folder = save_pipeline(make_tiny_z_image(shift=shift), tmp_path / str(shift))
        assert read_folder(folder, CARDS).sampling.steps == steps


def test_a_guidance_scale_is_noted() -> None:
    notes = settled(model="z-image-turbo", guidance_scale=5.0)[2]
    assert any("--guidance-scale has no effect" in note for note in notes)


@pytest.mark.parametrize(("size", "nearest"), [((8208, 1024), "8192 x 1024"), ((16384, 16384), "8192 x 8192")])
def test_a_size_beyond_the_table_of_positions_is_refused(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(Refusal, match=f"up to 8192 x 8192 px, got {size[0]} x {size[1]}; nearest: {nearest}"):
        settled(model="z-image", width=size[0], height=size[1])
    settled(model="z-image", width=8192, height=8192)


def test_a_folder_has_its_own_limit(tmp_path: Path) -> None:
    folder = save_pipeline(make_tiny_z_image(), tmp_path / "model")
    with pytest.raises(Refusal, match="up to 768 x 768 px, got 784 x 64; nearest: 768 x 64"):
        settled(model=str(folder), width=784, height=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes_dims": [4, 6, 8]}, "sum up to dim / n_heads"),
        ({"axes_lens": [64, 48]}, "axes_lens must be three numbers"),
        ({"all_patch_size": [2, 4]}, r"all_patch_size must be \[2\]"),
        ({"siglip_feat_dim": 32}, "Z-Image Omni"),
    ],
)
def test_other_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    config = dict(make_tiny_z_image().transformer.config)
    ZImageShape.of(config, "here")
    with pytest.raises(Refusal, match=message):
        ZImageShape.of(config | changes, "here")


def test_modulation_cannot_be_hoisted() -> None:
    with pytest.raises(Refusal, match="--hoist-modulation"):
        settled(model="z-image", hoist_modulation=True)
    with pytest.raises(ValueError, match="hoist_modulation"):
        parallelize(make_tiny_z_image(), hoist_modulation=True)


def test_the_table_of_lora_names_every_linear_layer() -> None:
    transformer = make_tiny_z_image().transformer
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    layers = ZImageShape.of(transformer.config, "here").lora_layers()
    assert {module for layer in layers.values() for module in layer.modules} == linear
    for layer in layers.values():
        outputs = [transformer.get_submodule(name).out_features for name in layer.modules]
        assert (sum(outputs), layer.outputs) == (layer.outputs, sum(layer.modules.values()))
