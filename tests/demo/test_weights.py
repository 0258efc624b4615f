"""The embedded weights: stock diffusers loads them, they are small, and they draw what they are told."""

import re
from copy import deepcopy
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from clear_dist.demo import CLEAR_WEIGHTS, DEFAULT_MAX_SEQUENCE_LENGTH, NATIVE_SIZE, WEIGHTS, WINDOW
from clear_dist.demo.grammar import CHOICES, DEFAULT_PROMPT
from clear_dist.demo.pipeline import assemble, build_clip, export

MOST_BYTES = 40 * 10**6
CLIP = "c251bcc5862ac459c280fe052b5f2af80cb07ef995dc1718d0b7f79540475103"
"""Digest of its values in float16, by names in order; another one once it is trained anew."""


IMAGE_SIDE = re.compile(
    r"(transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)|single_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v))"
    r"\.(weight|bias)"
)
"""Tensors that CLEAR's own script trains and saves."""


def window_mask(text: int, side: int, radius: int) -> torch.Tensor:
    """bool [text + side^2] squared: text sees everything, the image sees text and dx^2 + dy^2 < radius^2."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    squared = (places[:, None] - places[None, :]).square().sum(dim=-1)
    mask = torch.ones(text + side**2, text + side**2, dtype=torch.bool)
    mask[text:, text:] = squared < radius**2
    return mask


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    loaded = FluxPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(
    pipeline: FluxPipeline, prompt: str, steps: int = 5, seed: int = 0, window: bool = False, size: int = NATIVE_SIZE
) -> np.ndarray:
    """A picture, float [size, size, 3] in [0, 1]."""
    mask = window_mask(DEFAULT_MAX_SEQUENCE_LENGTH, size // 16, WINDOW) if window else None
    return pipeline(
        prompt, height=size, width=size, num_inference_steps=steps, output_type="np",
        max_sequence_length=DEFAULT_MAX_SEQUENCE_LENGTH, generator=torch.Generator().manual_seed(seed),
        joint_attention_kwargs={"attention_mask": mask},
    ).images[0]  # fmt: skip


def test_size():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= MOST_BYTES


def test_no_file_remembers_where_it_was_made():
    for path in WEIGHTS.rglob("*.json"):
        text = path.read_text()
        assert "_name_or_path" not in text
        assert not re.search(r'"/\w', text), path


def test_clip_has_its_published_names_and_the_values_it_was_trained_to(pipeline, tmp_path):
    """A fresh model is exported under the same names; older transformers read no others."""
    file = Path("text_encoder", "model.safetensors")
    stored = load_file(WEIGHTS / file)
    fresh = assemble(pipeline.vae, pipeline.transformer, build_clip(), pipeline.text_encoder_2)
    export(deepcopy(fresh), tmp_path / "weights")
    assert load_file(tmp_path / "weights" / file).keys() == stored.keys()
    assert {name.partition(".")[0] for name in stored} == {"text_model"}
    loaded = sorted(pipeline.text_encoder.state_dict().items())
    assert sha256(b"".join(value.half().numpy().tobytes() for _, value in loaded)).hexdigest() == CLIP


def test_geometry_is_that_of_flux(pipeline):
    assert pipeline.vae_scale_factor == 8
    assert pipeline.vae.config.sample_size == NATIVE_SIZE
    assert pipeline.transformer.config.in_channels == 64
    assert pipeline.scheduler.config.use_dynamic_shifting


def test_every_word_is_one_token(pipeline):
    for word in (word for words in CHOICES.values() for word in words):
        assert len(pipeline.tokenizer(word).input_ids) == 3
        assert len(pipeline.tokenizer_2(word).input_ids) == 2


def test_clear_checkpoint_holds_the_image_side_of_attention(pipeline):
    layers = load_file(CLEAR_WEIGHTS)
    weights = pipeline.transformer.named_parameters()
    expected = {name: value.shape for name, value in weights if IMAGE_SIDE.fullmatch(name)}
    assert {name: value.shape for name, value in layers.items()} == expected
    assert not any("to_out" in name for name in layers if name.startswith("single"))


def test_words_change_the_picture(pipeline):
    noon = draw(pipeline, "noon over snowy hills, sun on the left, clear sky")
    night = draw(pipeline, "night over snowy hills, moon on the left, clear sky")
    sunset = draw(pipeline, "sunset over desert dunes, sun on the right, clear sky")
    assert night.mean() < 0.6 * noon.mean()
    assert noon[:64, :, 2].mean() > noon[:64, :, 0].mean()  # a blue sky
    assert sunset[128:, :, 0].mean() > 1.3 * sunset[128:, :, 2].mean()  # orange land


def test_the_window_draws_too(pipeline):
    full = draw(pipeline, DEFAULT_PROMPT)
    original = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    clear = {name: value.float() for name, value in load_file(CLEAR_WEIGHTS).items()}
    pipeline.transformer.load_state_dict({**original, **clear})
    window = draw(pipeline, DEFAULT_PROMPT, window=True)
    pipeline.transformer.load_state_dict(original)
    assert np.abs(full - window).mean() < 0.2
    assert window[:64, :, 0].std() > 0.01


def test_bfloat16(pipeline):
    lower = FluxPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.bfloat16)
    lower.set_progress_bar_config(disable=True)
    assert (
        np.abs(np.subtract(*(draw(pipe, DEFAULT_PROMPT, steps=3, size=128) for pipe in (lower, pipeline)))).mean()
        < 0.05
    )
