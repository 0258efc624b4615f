"""Pictures of the stock pipelines on any number of ranks, stage by stage, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clear_dist import generate, upscale
from clear_dist.cli import main
from clear_dist.comm.group import Group
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.striped import require_striped
from clear_dist.families.transformers import adapter_of
from clear_dist.families.z_image.pipeline import captions
from clear_dist.families.z_image.sequence import ScaledRope
from clear_dist.families.z_image.transformer import ZImage
from clear_dist.parallelize import parallelize
from clear_dist.stages import Stage, Upscaling
from tests.families.tiny import save_pipeline
from tests.families.z_image.test_transformer import NEGATIVE, PROMPT
from tests.families.z_image.tiny import BASE_SHIFT, TURBO_SHIFT, make_tiny_z_image
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error

NATIVE, LARGE = (96, 176), (192, 336)
"""In pixels: 66 tokens, 30 of padding; 12 rows of 21."""
GUIDED = {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0, "guidance_scale": 0.0}


def drawn(group: Group, options: dict[str, Any], settings: dict[str, Any]) -> list[np.ndarray]:
    pipe = make_tiny_z_image()
    handle = parallelize(pipe, group=group, **options)
    pictures = generate(pipe, PROMPT, height=NATIVE[0], width=NATIVE[1], num_inference_steps=2, seed=5, **settings)
    handle.undo()
    return [np.asarray(picture) for picture in pictures]


def stock(guidance: float, shift: float = TURBO_SHIFT) -> np.ndarray:
    (picture,) = make_tiny_z_image(shift=shift)(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=NATIVE[0],
        width=NATIVE[1],
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
    ).images
    return np.asarray(picture)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_pictures_are_the_stock_pipelines(size: int, guidance: float) -> None:
    """The VAE over stripes too; a byte may round the other way."""
    settings = GUIDED if guidance else {"guidance_scale": 0.0}
    (picture,), *others = run_ranks(drawn, size, {"window": "full"}, settings)
    assert not any(others)
    assert np.abs(picture.astype(int) - stock(guidance)).max() <= 1


def start_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(1, 16, size[0] // 8, size[1] // 8, generator=torch.Generator().manual_seed(2))


STRENGTH, STEPS = 0.6, 3


def refined(group: Group) -> Tensor:
    pipe = make_tiny_z_image()
    parallelize(pipe, group=group, window="full")
    adapter = adapter_of(pipe)
    embeddings = dict(zip(adapter.arguments, adapter.encode([PROMPT], 512), strict=False))
    sampling = Upscaling(steps=STEPS, strength=STRENGTH, guidance_scale=0.0)
    stage = Stage(height=LARGE[0], width=LARGE[1], sampling=sampling)
    with require_striped(pipe).running(scheduler=(refining := adapter.refining(stage)).scheduler):
        return adapter.denoise(refining, embeddings, stage, seed=3, start=start_of(LARGE))


def test_refining_starts_from_the_picture_and_its_share_of_noise() -> None:
    """By the stock text-to-image pipeline, which takes noisy latents and sigmas; its schedule shifts both."""
    noise = torch.randn(1, 16, LARGE[0] // 8, LARGE[1] // 8, generator=torch.Generator().manual_seed(3))
    share = TURBO_SHIFT * STRENGTH / (1 + (TURBO_SHIFT - 1) * STRENGTH)
    expected = make_tiny_z_image()(
        PROMPT,
        height=LARGE[0],
        width=LARGE[1],
        sigmas=[STRENGTH * (STEPS - step) / STEPS for step in range(STEPS)],
        num_inference_steps=STEPS,
        guidance_scale=0.0,
        latents=(1 - share) * start_of(LARGE) + share * noise,
        output_type="latent",
    ).images
    for latents in run_ranks(refined, 2):
        assert relative_error(latents, expected) < 1e-4


CASCADE = {"height": LARGE[0], "width": LARGE[1], "base_resolution": 96, "num_inference_steps": 3, "seed": 5}
SETTINGS: list[dict[str, Any]] = [
    {"window": 3, "text_attention": "exact"},
    {"window": 3, "text_attention": "exact", "text_tokens": "sharded", "shard_weights": True, "offload": True},
]


def cascades(group: Group) -> list[list[np.ndarray]]:
    results = []
    for options in SETTINGS:
        pipe = make_tiny_z_image(sample_size=96)
        handle = parallelize(pipe, group=group, **options)
        pictures = generate(pipe, PROMPT, **CASCADE, upscaling=Upscaling(steps=2, true_cfg_scale=2.0), **GUIDED)
        image = Image.fromarray(np.asarray(pictures[0])) if pictures else None
        pictures += upscale(pipe, image, PROMPT, height=224, width=352, upscaling=Upscaling(steps=1))
        results.append([np.asarray(picture).astype(int) for picture in pictures])
        handle.undo()
    return results


def test_a_cascade_and_an_enlarged_picture_do_not_depend_on_the_number_of_ranks() -> None:
    alone, three = (run_ranks(cascades, size)[0] for size in (1, 3))
    for expected, found in zip(alone, three, strict=True):
        assert [picture.shape for picture in found] == [(*LARGE, 3), (224, 352, 3)]
        for one, other in zip(expected, found, strict=True):
            assert np.abs(one - other).max() <= 2
            assert one.std() > 10


def test_a_prompt_that_is_too_long_is_told() -> None:
    adapter = adapter_of(make_tiny_z_image())
    assert adapter.too_long("a hill", 512) == []
    (line,) = adapter.too_long("a hill " * 8 + "zebra", 60)
    assert "longer than the 60 tokens that Qwen3 takes here" in line and "zebra" in line


def test_captions_keep_their_lengths() -> None:
    pipe = make_tiny_z_image()
    adapter, texts = adapter_of(pipe), [PROMPT, "fog"]
    encoded = dict(zip(adapter.arguments, adapter.encode(texts, 512), strict=False))
    expected, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    for mine, theirs in zip(captions(encoded, "prompt") or [], expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("named", ["controlnet_block_samples", "siglip_feats", "image_noise_mask"])
def test_what_stripes_do_not_know_is_refused(named: str) -> None:
    pipe = make_tiny_z_image()
    handle = parallelize(pipe)
    inputs = ZImage(pipe.transformer).empty_inputs((4, 4), images=1, text_tokens=32)
    with torch.no_grad(), pytest.raises(ValueError, match=f"cannot be combined with parallelize, got `{named}`"):
        pipe.transformer(list(inputs["x"]), inputs["t"], inputs["cap_feats"], **{named: {}})
    with pytest.raises(ValueError, match="positions for 48 x 48 tokens at most, got 49 x 2"):
        pipe(PROMPT, height=16 * 49, width=32, num_inference_steps=1, guidance_scale=0.0)
    handle.undo()


def test_rows_and_columns_turn_as_extrapolated_and_captions_do_not() -> None:
    stock = make_tiny_z_image().transformer.rope_embedder
    ids = torch.tensor([[5, 0, 0], [33, 7, 11], [0, 0, 0]])
    same = ScaledRope(stock, Extrapolation(native_tokens=36))
    torch.testing.assert_close(same(ids), stock(ids))
    scaled = ScaledRope(stock, Extrapolation(native_tokens=36, ntk_factor=10.0, position_scale=0.5))(ids)
    assert torch.equal(scaled[0], stock(ids)[0]) and torch.equal(scaled[2], torch.ones(8, dtype=torch.complex64))
    for pair in range(3):
        for axis, place in ((1, 7), (2, 11)):
            angle = torch.tensor(0.5 * place / (256 * 10.0) ** (2 * pair / 6))
            found = scaled[1, 2 + 3 * (axis - 1) + pair]
            torch.testing.assert_close(found, torch.polar(torch.ones(()), angle))


def test_from_the_command_to_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded, encoded ahead, drawn on two ranks, guided: the stock pipeline's picture."""
    monkeypatch.chdir(tmp_path)
    save_pipeline(make_tiny_z_image(shift=BASE_SHIFT), tmp_path / "model")
    words = "generate", PROMPT, "--negative-prompt", NEGATIVE, "--true-cfg-scale", "3", "--model", "model"
    size = "--height", str(NATIVE[0]), "--width", str(NATIVE[1]), "--steps", "2", "--seed", "5"
    with pytest.raises(SystemExit) as ending:
        main([*words, *size, "--device", "cpu", "--nproc", "2", "--cascade", "off", "--quiet"])
    assert not ending.value.code
    found = np.asarray(Image.open("clear-dist.png")).astype(int)
    assert np.abs(found - stock(3.0, BASE_SHIFT)).max() <= 1
