"""LoRA in some stages only, on N ranks: against two calls of unmodified pipelines, the second with other adapters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.drawing.cascade import Cascade
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.striped import require_striped
from clear_dist.families.transformers import adapter_of
from clear_dist.stages import check_adapter, with_adapters
from tests.drawing.stock_cascade import stock, two_stages
from tests.drawing.test_cascade import NATIVE, TEXT, relative_error
from tests.ranks import run_ranks
from tests.refining.drawing import PROMPT, SEED, Drawn, picture_of
from tests.tiny import make_clear_weights, make_tiny_pipeline
from tests.tiny_lora import make_lora, save_lora

LOWER, UPPER = two_stages((64, 64), (112, 96))
STAGES = with_adapters((LOWER, UPPER), {"urae": "upper"})
WEIGHTS = {"style": 0.5, "urae": 0.8}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, transformer = tmp_path_factory.mktemp("lora"), make_tiny_pipeline(sample_size=NATIVE).transformer
    made = {name: make_lora(transformer, seed=seed) for seed, name in enumerate(WEIGHTS)}
    saved = {name: save_lora(tensors, folder / f"{name}.safetensors") for name, tensors in made.items()}
    return saved | {"clear": make_clear_weights(transformer, folder / "clear_local_3.safetensors")}


def tiny() -> Any:
    pipe = make_tiny_pipeline(sample_size=NATIVE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(pipe: Any, files: dict[str, Path], *names: str) -> None:
    for name in names:
        pipe.load_lora_weights(str(files[name].parent), weight_name=files[name].name, adapter_name=name)
    pipe.set_adapters(list(names), [WEIGHTS[name] for name in names])


def drawn(group: Group, files: dict[str, Path], names: tuple[str, ...], **options: Any) -> Drawn:
    """All LoRA of `names` are loaded before the first stage."""
    pipe = tiny()
    handle = clear_dist.parallelize(pipe, group=group, **options)
    if names:
        load(pipe, files, *names)
    found = [(each.latents, each.pixels) for each in cascade_of(pipe, group).run(STAGES)]
    assert not names or pipe.get_active_adapters() == list(names)
    handle.undo()
    return found


def cascade_of(pipe: Any, group: Group) -> Cascade:
    counters = require_striped(pipe).counters
    return Cascade(
        pipe, encode_prompts(adapter_of(pipe), group, counters, [PROMPT], max_sequence_length=TEXT), seed=SEED
    )


def expected(pipe: Any, files: dict[str, Path], picture: Image.Image) -> tuple[Tensor, Tensor]:
    """Latents of both stages by diffusers alone."""

    def adapt(refining: Any) -> None:
        refining.load_lora_weights(str(files["urae"].parent), weight_name=files["urae"].name, adapter_name="urae")
        refining.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))

    load(pipe, files, "style")
    return stock(pipe, picture, (LOWER, UPPER), between=adapt)


@pytest.mark.parametrize("size", [1, 2])
def test_the_upper_stage_alone_has_it(files: dict[str, Path], size: int) -> None:
    """A style is in both. Without the other LoRA the lower stage is the same to the bit."""
    found = run_ranks(drawn, size, files, tuple(WEIGHTS), window="full")
    without = run_ranks(drawn, size, files, ("style",), window="full")
    lower, upper = expected(tiny(), files, picture_of(found, 0))
    for mine, other in zip(found, without, strict=True):
        assert relative_error(mine[0][0], lower) < 1e-4
        assert relative_error(mine[1][0], upper) < 1e-4
        assert torch.equal(mine[0][0], other[0][0]) and torch.equal(mine[0][1], other[0][1])
        assert relative_error(other[1][0], upper) > 1e-2


def switched_and_loaded_later(group: Group, files: dict[str, Path], options: dict[str, Any]) -> list[Drawn]:
    """A stage's LoRA as it is switched; and with none in the lower stage, loaded for the upper one."""
    pipe = tiny()
    options = options | ({"clear_weights": files["clear"]} if options.get("window") == 3 else {})
    handle = clear_dist.parallelize(pipe, group=group, **options)
    cascade = cascade_of(pipe, group)
    first = cascade.draw(LOWER)
    load(pipe, files, "urae")
    second = cascade.draw(UPPER, first)
    later = [(each.latents, each.pixels) for each in (first, second)]
    handle.undo()
    return [drawn(group, files, ("urae",), **options), later]


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "text_attention": "exact"},
        {"shard_weights": True},
        {"int8": True},
        {"hoist_modulation": True, "shard_weights": True},
    ],
)
def test_switching_is_loading_later(files: dict[str, Path], options: dict[str, Any]) -> None:
    """Under CLEAR's weights (where there is a window), in shards, in 8 bits, and on modulation computed ahead."""
    for switched, later in run_ranks(switched_and_loaded_later, 2, files, options):
        for (mine, _), (theirs, _) in zip(switched, later, strict=True):
            assert torch.equal(mine, theirs)


def loaded_before_shards(group: Group, files: dict[str, Path]) -> list[Drawn]:
    pipe = tiny()
    load(pipe, files, "urae")
    handle = clear_dist.parallelize(pipe, group=group, shard_weights=True)
    found = [(each.latents, each.pixels) for each in cascade_of(pipe, group).run(STAGES)]
    handle.undo()
    return [found, drawn(group, files, ("urae",))]


def test_it_may_be_in_shards_itself(files: dict[str, Path]) -> None:
    for in_shards, whole in run_ranks(loaded_before_shards, 2, files):
        for (mine, _), (theirs, _) in zip(in_shards, whole, strict=True):
            assert relative_error(mine, theirs) < 1e-4


def generated(group: Group, files: dict[str, Path]) -> tuple[list[np.ndarray], list[str]]:
    pipe, common = tiny(), {"height": 112, "width": 96, "num_inference_steps": 2, "max_sequence_length": TEXT}
    handle = clear_dist.parallelize(pipe, group=group, window="full")
    messages = []

    def refused(**given: Any) -> None:
        with pytest.raises(ValueError, match=r"LoRA|stage") as caught:
            clear_dist.generate(pipe, PROMPT, **common | given)
        messages.append(str(caught.value))

    refused(lora_stages={"urae": "upper"})
    load(pipe, files, *WEIGHTS)
    how: dict[str, Any] = {"seed": SEED, "upscaling": UPPER.sampling, **common}
    found = clear_dist.generate(pipe, PROMPT, lora_stages={"urae": "upper"}, **how)
    found += clear_dist.generate(pipe, PROMPT, lora_stages={"urae": 100}, **how)
    own = found[0] if group.rank == 0 else None
    found += clear_dist.upscale(pipe, own, lora_stages={"urae": 200}, height=192, width=208, upscaling=how["upscaling"])
    refused(lora_stages={"ure": "upper"})
    refused(lora_stages={"urae": 113})
    refused(lora_stages={"urae": "upper"}, cascade=False)
    refused(lora_stages={"urae": "lower"})
    pipe.fuse_lora(adapter_names=["urae"])
    refused(lora_stages={"urae": "upper"})
    handle.undo()
    return [np.asarray(each) for each in found], messages


def test_from_python(files: dict[str, Path]) -> None:
    (pictures, messages), (others, same) = run_ranks(generated, 2, files)
    expected = np.asarray(picture_of(run_ranks(drawn, 2, files, tuple(WEIGHTS), window="full"), 1))
    assert np.array_equal(pictures[0], expected) and np.array_equal(pictures[1], expected)
    assert pictures[2].shape == (192, 208, 3) and others == [] and same == messages
    for message, words in zip(
        messages,
        (
            "must be loaded first, got 'urae'; nearest: pipe.load_lora_weights",
            "must be one of style, urae, got 'ure'; nearest: urae",
            "no stage has 113 px along its longer side, the largest has 112; nearest: 112",
            "no stage refines a picture, the largest has 112; nearest: 112",
            "must be upper or a number of pixels, got 'lower'; nearest: upper",
            "must not be fused, got 'urae'; call pipe.unfuse_lora() first",
        ),
        strict=True,
    ):
        assert words in message


def test_stages_are_chosen_by_name_or_by_their_longer_side() -> None:
    where: dict[str, Any] = {"a": "upper", "b": 64, "c": 100}
    assert [stage.resting for stage in with_adapters((LOWER, UPPER), where)] == [("a", "c"), ()]
    check_adapter((LOWER, UPPER), 112)
    with pytest.raises(ValueError, match="got 0; nearest: upper"):
        check_adapter((), 0)
