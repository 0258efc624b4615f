"""CLEAR checkpoints as files: names, tensors, contradictions; on the hub, in folders; of FLUX.1-dev's true shapes."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from clear_dist import demo
from clear_dist.cards.folder import find_model, read_folder
from clear_dist.cards.hub_name import HubFile
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV, FLUX_SCHNELL
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.parallelize import parallelize
from clear_dist.request.clear_weights import find_checkpoint
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import choose, settle
from clear_dist.weights.clear import load_clear_weights
from tests.cards.test_clear import PUBLISHED
from tests.tiny import make_clear_weights, make_tiny_flux, make_tiny_pipeline

ALONE = Place()


@pytest.fixture(scope="module")
def dev() -> FluxTransformer2DModel:
    """FLUX.1-dev's tensors, without their numbers."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def sparse_checkpoint(file: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of bfloat16 with a true header; its numbers are a hole, which takes no space."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)
    return file


def official_shapes(transformer: FluxTransformer2DModel, factor: int) -> dict[str, tuple[int, ...]]:
    """What the official code's state dict of attention holds (`distill.py` saves what it trains)."""
    trained = ("attn.to_q.", "attn.to_k.", "attn.to_v.", "attn.to_out.0.")
    parameters = transformer.state_dict().items()
    shapes = {name: tuple(value.shape) for name, value in parameters if any(part in name for part in trained)}
    for name in transformer.attn_processors if factor > 1 else ():
        shapes[f"{name}.spatial_weight"] = (1, 1, 1, factor, 1, factor, 1)
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("base", [FLUX_DEV, FLUX_SCHNELL])
def test_the_published_files_by_their_headers(
    dev: FluxTransformer2DModel, tmp_path: Path, name: str, base: str
) -> None:
    """Nothing of the base model is here yet: both are known by their names. Nor need there be memory for it."""
    radius, factor = PUBLISHED[name]
    shapes = official_shapes(dev, factor)
    file = sparse_checkpoint(tmp_path / name, shapes)
    assert len(shapes) == 19 * 8 + 38 * 6 + (57 if factor > 1 else 0)
    config = GenerateFlags(model=base, clear_weights=str(file), device="cpu", res=1024)
    request, *_ = choose(config, ALONE, CARDS, device="cpu", gpus=())
    assert (request.clear_weights, request.window, request.down_factor) == (str(file), radius, factor)
    by_folder = find_checkpoint(str(tmp_path), None, find_model(base, CARDS, has_cuda=False), CARDS)
    assert by_folder == str(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"single_transformer_blocks.37.attn.processor.spatial_weight": None},
            "lacks single_transformer_blocks.37.attn",
        ),
        ({"transformer_blocks.3.attn.to_out.0.bias": None}, "lacks transformer_blocks.3.attn.to_out.0.bias"),
        (
            {"transformer_blocks.0.attn.norm_q.weight": (128,)},
            "unexpected tensor transformer_blocks.0.attn.norm_q.weight",
        ),
        (
            {"transformer_blocks.2.attn.processor.spatial_weight": (1, 1, 1, 2, 1, 2, 1)},
            r"transformer_blocks.2.attn.processor.spatial_weight must have the shape \[1, 1, 1, 4, 1, 4, 1\], got",
        ),
        ({"transformer_blocks.0.attn.processor.spatial_weight": (4, 4)}, r"got \[4, 4\]"),
        ({"transformer_blocks.1.attn.to_q.weight": (1536, 1536)}, r"\[3072, 3072\], got \[1536, 1536\]"),
    ],
)
def test_what_does_not_fit_is_named(
    dev: FluxTransformer2DModel, tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    shapes = {name: shape for name, shape in (official_shapes(dev, 4) | change).items() if shape is not None}
    file = sparse_checkpoint(tmp_path / "clear_local_8_down_4.safetensors", shapes)
    with pytest.raises(Refusal, match=message):
        find_checkpoint(str(file), None, find_model(FLUX_DEV, CARDS, has_cuda=False), CARDS)


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [
        ("clear_local_8_down_4", 1, "must hold spatial weights of 4 x 4, got no spatial weights"),
        ("clear_local_8_down_4", 2, "must hold spatial weights of 4 x 4, got spatial weights of 2 x 2"),
        ("clear_local_8", 4, "must hold no spatial weights, got spatial weights of 4 x 4"),
    ],
)
def test_name_and_tensors_that_contradict_each_other(tmp_path: Path, name: str, factor: int, message: str) -> None:
    pipe = make_tiny_pipeline()
    file = make_clear_weights(pipe.transformer, tmp_path / f"{name}.safetensors", down_factor=factor)
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    with pytest.raises(Refusal, match=message):
        find_checkpoint(str(file), None, find_model(FLUX_DEV, CARDS, has_cuda=False), CARDS)
    with pytest.raises(ValueError, match=message):
        parallelize(pipe, clear_weights=file)
    assert all(torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items())


def test_a_student_of_the_first_embedded_model_is_refused_by_name(tmp_path: Path) -> None:
    """Which had four single blocks."""
    later = re.compile(r"single_transformer_blocks\.[45]\.")
    held = load_file(demo.CLEAR_WEIGHTS).items()
    shapes = {name: tuple(value.shape) for name, value in held if not later.match(name)}
    file = sparse_checkpoint(tmp_path / "clear_local_8.safetensors", shapes)
    with pytest.raises(Refusal, match="for the first version of the embedded model; nearest: --clear-weights none"):
        find_checkpoint(str(file), None, find_model("demo", CARDS, has_cuda=False), CARDS)


def test_a_window_that_contradicts_the_name(tmp_path: Path) -> None:
    pipe = make_tiny_pipeline()
    folder = make_tiny_flux(tmp_path / "model")
    file = make_clear_weights(pipe.transformer, tmp_path / "clear_local_8.safetensors")
    message = r"the window must be the 8 of .*clear_local_8.safetensors, or full, got 16; nearest: 8"
    for word in (str(file), str(tmp_path), "a/b:clear_local_8.safetensors"):
        with pytest.raises(Refusal, match=message):
            settle(GenerateFlags(model=str(folder), clear_weights=word, window=16), ALONE, CARDS)
    with pytest.raises(ValueError, match=message):
        parallelize(pipe, window=16, clear_weights=file)
    config = GenerateFlags(model=str(folder), clear_weights=str(file), window="full")
    assert settle(config, ALONE, CARDS)[0].window == "full"
    unnamed = file.rename(tmp_path / "mine.safetensors")
    config = GenerateFlags(model=str(folder), clear_weights=str(unnamed), window=16)
    assert settle(config, ALONE, CARDS)[0].window == 16


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickles_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    folder = make_tiny_flux(tmp_path / "model")
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / f"clear_local_8{suffix}"
    torch.save({"x": torch.zeros(1)}, file)
    message = f"must be safetensors, got the pickled file .*clear_local_8{suffix}; nearest: clear_local_8.safetensors"
    for word in (str(file), str(file.parent), f"a/b:clear_local_8{suffix}"):
        with pytest.raises(Refusal, match=message):
            settle(GenerateFlags(model=str(folder), clear_weights=word), ALONE, CARDS)
    with pytest.raises(ValueError, match=message):
        load_clear_weights(make_tiny_pipeline().transformer, file)


@pytest.mark.parametrize(
    ("word", "window", "found"),
    [
        ("o/n:some.safetensors", None, HubFile("o/n", None, "some.safetensors")),
        ("o/n@v1.0:sub/some.safetensors", None, HubFile("o/n", "v1.0", "sub/some.safetensors")),
        ("o/n@9f1c0de:clear_local_8.safetensors", 8, HubFile("o/n", "9f1c0de", "clear_local_8.safetensors")),
        ("o/n", None, HubFile("o/n", None, "clear_local_16.safetensors")),
        ("o/n@refs/pr/3", 8, HubFile("o/n", "refs/pr/3", "clear_local_8.safetensors")),
        ("Huage001/CLEAR", 32, HubFile("Huage001/CLEAR", None, "clear_local_32.safetensors")),
    ],
)
def test_words_for_files_on_the_hub(word: str, window: int | None, found: HubFile) -> None:
    checkpoint = find_checkpoint(word, window, find_model(FLUX_DEV, CARDS, has_cuda=False), CARDS)
    assert checkpoint == str(found)
    assert HubFile.of(checkpoint) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clear_weights": "o/n@:x.safetensors"}, r"must be owner/name:file.safetensors, or owner/name@revision:file"),
        ({"clear_weights": "../n"}, r"there is no \.\./n; nearest: auto"),
        ({"clear_weights": "o/n:x.gguf"}, r"must be owner/name:file.safetensors"),
        (
            {"clear_weights": "Huage001/CLEAR:clear_local_8_down_2.safetensors"},
            "nearest: clear_local_8_down_4.safetensors",
        ),
        (
            {"clear_weights": "clear_local_8_down_4.safetensors"},
            "there is no clear_local_8_down_4.safetensors; nearest: Huage001/CLEAR:clear_local_8_down_4.safetensors",
        ),
        (
            {"window": 12},
            "--window must be one of 8, 16, 32, which Huage001/CLEAR has weights for, got 12; nearest: 8",
        ),
        (
            {"clear_weights": "Huage001/CLEAR:clear_local_8_down_4.safetensors", "res": 1040},
            r"--res must be a multiple of 64 pixels \(4 tokens, which CLEAR's .*got 1040; nearest: 1024 or 1088",
        ),
        (
            {"clear_weights": "Huage001/CLEAR:clear_local_8_down_4.safetensors", "nproc": 17},
            "64 rows of tokens can be cut for 1 to 16 ranks, got 17; nearest: 16",
        ),
    ],
)
def test_wrong_requests_for_flux(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        settle(GenerateFlags(model=FLUX_DEV, device="cpu", **given), ALONE, CARDS)


def test_a_checkpoint_of_another_model_is_refused_before_the_model_is_fetched(tmp_path: Path) -> None:
    file = make_clear_weights(make_tiny_pipeline().transformer, tmp_path / "clear_local_8.safetensors")
    with pytest.raises(Refusal, match="are these the weights of another model"):
        settle(GenerateFlags(model=FLUX_DEV, clear_weights=str(file), device="cpu"), ALONE, CARDS)


def test_a_file_that_is_cut_off_is_refused(dev: FluxTransformer2DModel, tmp_path: Path) -> None:
    file = sparse_checkpoint(tmp_path / "clear_local_16.safetensors", official_shapes(dev, 1))
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(Refusal, match=f"must have {size} bytes by its own header, got {size - 1}; download it again"):
        find_checkpoint(str(file), None, find_model(FLUX_SCHNELL, CARDS, has_cuda=False), CARDS)


def test_down_sampled_weights_come_last_in_a_folder(tmp_path: Path) -> None:
    folder = make_tiny_flux(tmp_path / "model")
    facts, transformer = read_folder(folder, CARDS), make_tiny_pipeline().transformer
    pooled = make_clear_weights(transformer, folder / "clear_local_2_down_4.safetensors", down_factor=4)
    assert find_checkpoint("auto", None, facts, CARDS) == str(pooled)
    plain = make_clear_weights(transformer, folder / "clear_local_8.safetensors")
    assert find_checkpoint("auto", None, facts, CARDS) == str(plain)
    assert find_checkpoint("auto", 2, facts, CARDS) == str(pooled)


def test_an_unnamed_file_tells_its_factor(tmp_path: Path) -> None:
    transformer = make_tiny_pipeline().transformer
    file = make_clear_weights(transformer, tmp_path / "mine.safetensors", down_factor=2)
    replaced = load_clear_weights(transformer, file)
    assert (replaced.figures["radius"], replaced.figures["down_factor"]) == (None, 2)
    weights = load_file(file)
    assert replaced.pooling is not None
    for name, weight in zip(transformer.attn_processors, replaced.pooling.weights, strict=True):
        assert torch.equal(weight.flatten(), weights[f"{name}.spatial_weight"].flatten())
    save_file({name: x for name, x in weights.items() if "single" not in name}, file)
    with pytest.raises(
        ValueError, match=r"lacks single_transformer_blocks\.0\.attn\.processor\.spatial_weight and 6 more"
    ):
        load_clear_weights(transformer, file)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"down_factor": 4}, "clear_local_16_down_4"),
        ({"down_factor": 4, "window": 8}, "clear_local_8_down_4"),
        ({"down_factor": 1, "window": 8}, "clear_local_8"),
        ({"down_factor": 4, "clear_weights": "o/n"}, "clear_local_16_down_4"),
        ({"down_factor": 4, "window": 32}, r"--window must be one of 8, 16, which .* with --down-factor 4, got 32"),
        ({"down_factor": 2}, r"--down-factor must be one of 1, 4, which Huage001/CLEAR has, got 2; nearest: 1"),
        ({"down_factor": 4, "window": "full"}, "the CLEAR weights, 1 with --window full, got 4; nearest: 1"),
        ({"down_factor": 4, "clear_weights": "none"}, f"the CLEAR weights, 1 of {FLUX_DEV} without any, got 4"),
        ({"down_factor": 1, "clear_weights": "o/n:clear_local_8_down_4.safetensors"}, "4 of o/n:.*, got 1; nearest: 4"),
        ({"down_factor": 4, "model": "demo"}, "weights, 1 of .*clear_local_8.safetensors, got 4; nearest: 1"),
        ({"down_factor": 4, "model": "z-image"}, "weights, 1 of Tongyi-MAI/Z-Image without any, got 4; nearest: 1"),
    ],
)  # fmt: skip
def test_a_down_factor_chooses_the_file(given: dict[str, Any], found: str) -> None:
    flags = GenerateFlags(**{"model": FLUX_DEV, "device": "cpu", "res": 1024} | given)
    if not found.startswith("clear_local"):
        with pytest.raises(Refusal, match=found):
            choose(flags, ALONE, CARDS, device="cpu", gpus=())
        return
    request, *_ = choose(flags, ALONE, CARDS, device="cpu", gpus=())
    assert str(request.clear_weights).endswith(f":{found}.safetensors")
    assert request.down_factor == given["down_factor"]


def test_a_down_factor_chooses_the_file_of_a_folder(tmp_path: Path) -> None:
    pipe, folder = make_tiny_pipeline(), make_tiny_flux(tmp_path / "model")
    for name, factor in (("2", 1), ("2_down_2", 2), ("4_down_2", 2)):
        make_clear_weights(pipe.transformer, folder / f"clear_local_{name}.safetensors", down_factor=factor)
    for given, found in (({}, "2"), ({"down_factor": 2}, "2_down_2"), ({"down_factor": 2, "window": 4}, "4_down_2")):
        request, *_ = settle(GenerateFlags(model=str(folder), **given), ALONE, CARDS)
        assert Path(str(request.clear_weights)).name == f"clear_local_{found}.safetensors"
