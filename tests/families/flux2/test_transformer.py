"""FLUX.2 on N ranks against the unmodified pipeline, and against an oracle written apart from the engine."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.engine.references import raster_ids
from clear_dist.families.flux2.transformer import Flux2
from clear_dist.parallelize import parallelize
from tests.families.flux2.oracle import put_oracle
from tests.families.flux2.tiny import make_tiny_dev, make_tiny_klein
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error

HEIGHT, WIDTH, TEXT, STEPS = 13, 11, 9, 2
"""In tokens: rows that 2, 3 and 5 ranks don't divide; with 5 and a radius of 4, stripes are thinner than a halo."""
RADII = (1, 4, 1000)
KLEIN, BASE, DEV = "klein", "klein-base", "dev"


def make(name: str) -> Any:
    pipe = make_tiny_dev() if name == DEV else make_tiny_klein(is_distilled=name == KLEIN)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, name: str, *, height: int = HEIGHT, width: int = WIDTH, steps: int = STEPS) -> Tensor:
    """Latents after the last step; klein-base is guided, a pass of each step with a negative prompt."""
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randn(2, TEXT, 24, generator=generator).to(pipe.transformer.dtype).split(1)
    negative = {"negative_prompt_embeds": prompts[1]} if name == BASE else {}
    return pipe(
        prompt_embeds=prompts[0],
        **negative,
        height=16 * height,
        width=16 * width,
        num_inference_steps=steps,
        guidance_scale=1.0 if name == KLEIN else 3.0,
        generator=generator,
        output_type="latent",
    ).images


def striped(group: Group, name: str, cases: list[dict[str, Any]]) -> list[Tensor]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    pipe, results = make(name), []
    for case in cases:
        handle = parallelize(pipe, group=group, **case)
        results.append(run(pipe, name))
        handle.undo()
    return results


@cache
def stock(name: str) -> Tensor:
    return run(make(name), name)


@cache
def oracle(name: str, radius: int, ranks: int | None) -> Tensor:
    """`ranks`: of the mean of text parts (Eq. 7), None: exact."""
    pipe, parts = make(name), None
    if ranks is not None:
        tall, rest = divmod(HEIGHT, ranks)
        starts = [rank * tall + min(rank, rest) for rank in range(ranks + 1)]
        parts = [range(*ends) for ends in pairwise(starts)]
    put_oracle(pipe, HEIGHT, WIDTH, radius, parts)
    return run(pipe, name)


FULL: list[dict[str, Any]] = [
    {"window": "full"},
    {"window": "full", "text_tokens": "sharded"},
    {"window": "full", "cut": "columns"},
]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", [KLEIN, BASE, DEV])
def test_full_attention_is_the_stock_pipeline(name: str, size: int) -> None:
    for results in run_ranks(striped, size, name, FULL):
        for latents in results:
            assert relative_error(latents, stock(name)) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_windows_are_those_of_the_oracle(size: int) -> None:
    cases = [
        {"window": radius, "text_attention": "exact", "text_tokens": text}
        for radius in RADII
        for text in ("replicated", "sharded")
    ]
    cases += [case | {"cut": "columns"} for case in cases[2:4]]
    for results in run_ranks(striped, size, KLEIN, cases):
        for case, latents in zip(cases, results, strict=True):
            assert relative_error(latents, oracle(KLEIN, case["window"], None)) < 1e-4, case
    assert relative_error(stock(KLEIN), oracle(KLEIN, 4, None)) > 1e-2, "the window matters"


@pytest.mark.parametrize("size", [2, 3])
def test_average_is_equation_7(size: int) -> None:
    for (latents,) in run_ranks(striped, size, DEV, [{"window": 4}]):
        assert relative_error(latents, oracle(DEV, 4, size)) < 1e-4
        assert relative_error(latents, oracle(DEV, 4, None)) > 1e-4


@pytest.fixture(scope="module")
def family() -> Flux2:
    return Flux2(make(KLEIN).transformer)


@pytest.mark.parametrize(("height", "width"), [(13, 11), (1, 7), (7, 1), (512, 3)])
def test_the_grid_is_read_from_ids(family: Flux2, height: int, width: int) -> None:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    zeros = torch.zeros_like(y)
    ids = torch.stack([zeros, y, x, zeros], dim=-1).reshape(1, -1, 4)
    assert family.grid_of({"img_ids": ids}) == (height, width)
    assert family.grid_of({"img_ids": ids[0].bfloat16()}) == (height, width)


@pytest.mark.parametrize("change", ["reference image first", "references alone", "shuffled", "cut"])
def test_other_ids_are_refused(family: Flux2, change: str) -> None:
    ids = raster_ids(4, 5, torch.device("cpu"), axes=4)
    changed = {
        "reference image first": torch.cat([ids + torch.tensor([10.0, 0.0, 0.0, 0.0]), ids]),
        "references alone": ids + torch.tensor([10.0, 0.0, 0.0, 0.0]),
        "shuffled": ids.flip(0),
        "cut": ids[:-1],
    }[change]
    with pytest.raises(ValueError, match="one image in raster order"):
        family.grid_of({"img_ids": changed})


def test_undo_gives_back_the_stock_model() -> None:
    pipe = make(DEV)
    classes = {name: type(module) for name, module in pipe.transformer.named_modules()}
    processors = {name: type(each) for name, each in pipe.transformer.attn_processors.items()}
    handle = parallelize(pipe, window=3)
    assert {type(block) for block in Flux2(pipe.transformer).blocks}.isdisjoint(classes.values())
    handle.undo()
    assert {name: type(module) for name, module in pipe.transformer.named_modules()} == classes
    assert {name: type(each) for name, each in pipe.transformer.attn_processors.items()} == processors
    assert torch.equal(run(pipe, DEV), stock(DEV))
