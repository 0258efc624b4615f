"""ControlNets on stripes: N ranks against an oracle in the unmodified pipelines, and against those pipelines."""

from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetPipeline, SD3ControlNetModel
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.geometry import stripe_image
from clear_dist.parallelize import parallelize
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.stale_oracle import StaleProcessor
from tests.test_parallelize import HEIGHT, WIDTH, relative_error, run
from tests.tiny import make_tiny_pipeline
from tests.tiny_controlnet import make_tiny_controlled, make_tiny_controlnet, picture

RADIUS = 4
CONTROL, OTHER = picture(HEIGHT, WIDTH, 1), picture(HEIGHT, WIDTH, 2)
MASK = torch.zeros(1, 1, 16 * HEIGHT, 16 * WIDTH).index_fill(2, torch.arange(60, 140), 1.0)


def refined(**arguments: Any) -> dict[str, Any]:
    return {"image": OTHER, "strength": 0.7, "steps": 4, "control_image": CONTROL} | arguments


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one": (lambda: make_tiny_controlled(make_tiny_controlnet()), {"control_image": CONTROL}),
    "guided batch": (
        lambda: make_tiny_controlled(make_tiny_controlnet()),
        {
            "prompt": ["a hill", "the sea"],
            "negative_prompt": ["fog", "rain"],
            "true_cfg_scale": 2.0,
            "num_images_per_prompt": 2,
            "control_image": CONTROL,
            "controlnet_conditioning_scale": 0.6,
            "control_guidance_start": 0.2,
            "control_guidance_end": 0.8,
        },
    ),
    "several": (
        lambda: make_tiny_controlled(make_tiny_controlnet(), make_tiny_controlnet(seed=6)),
        {"control_image": [CONTROL, OTHER], "controlnet_conditioning_scale": [0.5, 0.8]},
    ),
    "union": (
        lambda: make_tiny_controlled(make_tiny_controlnet(modes=3)),
        {"control_image": CONTROL, "control_mode": 1},
    ),
    "union, twice a step": (
        lambda: make_tiny_controlled(make_tiny_controlnet(modes=3), multi=True),
        {
            "control_image": [CONTROL, OTHER],
            "control_mode": [2, 0],
            "controlnet_conditioning_scale": [0.5, 0.8],
            "control_guidance_start": [0.0, 0.0],
            "control_guidance_end": [1.0, 1.0],
        },
    ),
    "pixels": (lambda: make_tiny_controlled(make_tiny_controlnet(hint=True)), {"control_image": CONTROL}),
    "image-to-image": (lambda: make_tiny_controlled(make_tiny_controlnet(), start="picture"), refined()),
    "inpainting": (lambda: make_tiny_controlled(make_tiny_controlnet(), start="mask"), refined(mask_image=MASK)),
}


def nets_of(pipe: Any) -> list[Any]:
    return list(getattr(pipe.controlnet, "nets", [pipe.controlnet]))


def striped_latents(group: Group, names: list[str], settings: dict[str, Any]) -> list[Tensor]:
    """A rank's latents; uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True)
    results = []
    for name in names:
        make, arguments = CASES[name]
        pipe = make()
        parallelize(pipe, group=group, **settings)
        results.append(run(pipe, **arguments))
    return results


@cache
def expected(name: str, radius: int | None, net_radius: int | None) -> Tensor:
    """The unmodified pipeline; a radius: with a dense processor in place of full attention."""
    make, arguments = CASES[name]
    pipe = make()
    for model, of_model in ((pipe.transformer, radius), *((net, net_radius) for net in nets_of(pipe))):
        if of_model is not None:
            model.set_attn_processor(DenseClearProcessor(HEIGHT, WIDTH, of_model))
    return run(pipe, **arguments)


@pytest.mark.parametrize("size", [1, 3])
def test_the_same_stripes_and_window(size: int) -> None:
    """On 3 ranks, and on one, against the oracle."""
    settings = {"window": RADIUS, "text_attention": "exact", "controlnet_window": RADIUS}
    for rank_results in run_ranks(striped_latents, size, list(CASES), settings):
        for name, latents in zip(CASES, rank_results, strict=True):
            assert relative_error(latents, expected(name, RADIUS, RADIUS)) < 1e-4, name
            assert relative_error(latents, expected(name, None, None)) > 1e-2, name


def test_the_same_columns() -> None:
    settings, names = {"window": RADIUS, "text_attention": "exact", "cut": "columns"}, ["one", "union", "pixels"]
    for rank_results in run_ranks(striped_latents, 3, names, settings):
        for name, latents in zip(names, rank_results, strict=True):
            assert relative_error(latents, expected(name, RADIUS, None)) < 1e-4, name


def test_full_windows_are_the_stock_pipelines() -> None:
    for rank_results in run_ranks(striped_latents, 3, list(CASES), {"window": "full"}):
        for name, latents in zip(CASES, rank_results, strict=True):
            assert relative_error(latents, expected(name, None, None)) < 1e-4, name


def test_a_window_of_its_own() -> None:
    """Full attention where none is given, as in the paper, on the transformer's stripes: alone it would have columns."""
    assert stripe_image((HEIGHT, WIDTH), 3, cut="auto", radius=None).by_columns
    for given, net_radius in (({}, None), ({"controlnet_window": 2}, 2)):
        settings = {"window": RADIUS, "text_attention": "exact", **given}
        for (latents,) in run_ranks(striped_latents, 3, ["one"], settings):
            assert relative_error(latents, expected("one", RADIUS, net_radius)) < 1e-4


@pytest.mark.parametrize("name", ["one", "guided batch", "union, twice a step"])
@pytest.mark.parametrize("mode", ["exact", "average"])
def test_stale_neighbours_are_those_of_the_step_before(name: str, mode: str) -> None:
    make, arguments = CASES[name]
    emulated = make()
    layers = partial(StaleProcessor, HEIGHT, WIDTH, RADIUS, 3, average=mode == "average", warmup=1)
    guided = "true_cfg_scale" in arguments
    for model, passes in ((emulated.transformer, 1 + guided), (emulated.controlnet, 1)):
        twice = name == "union, twice a step" and model is emulated.controlnet
        model = nets_of(emulated)[0] if model is emulated.controlnet else model
        model.set_attn_processor({each: layers(passes=passes + twice) for each in model.attn_processors})
    late = run(emulated, **arguments)
    settings = {"window": RADIUS, "text_attention": mode, "schedule": "stale", "warmup_steps": 1}
    settings |= {"controlnet_window": RADIUS}
    for (latents,) in run_ranks(striped_latents, 3, [name], settings):
        assert relative_error(latents, late) < 1e-4
        assert relative_error(latents, expected(name, RADIUS, RADIUS)) > 1e-3


def whole_and_undone(group: Group) -> list[Tensor]:
    """A ControlNet that came after `parallelize` stays whole; on stripes, and taken off again."""
    net = make_tiny_controlnet()
    plain = make_tiny_pipeline(double_blocks=2, single_blocks=2)
    handle = parallelize(plain, window=RADIUS, text_attention="exact", group=group)
    pipe = FluxControlNetPipeline(**plain.components, controlnet=net)
    results = [run(pipe, control_image=CONTROL)]
    handle.undo()
    stock = run(pipe, control_image=CONTROL)
    handle = parallelize(pipe, window=RADIUS, text_attention="exact", controlnet_window=RADIUS, group=group)
    results.append(run(pipe, control_image=CONTROL))
    joined = [sum(counters.as_dict()["join_bytes"]) for counters in (handle.counters, *handle.controlnet_counters)]
    assert joined[0] > 0 == joined[1]
    sent = [sum(counters.as_dict()["halo_bytes_sent"]) for counters in (handle.counters, *handle.controlnet_counters)]
    assert sent[0] * 3 == sent[1] * 4, "4 layers and 3 of the same width"
    handle.undo()
    assert torch.equal(run(pipe, control_image=CONTROL), stock)
    return results


def test_a_controlnet_that_comes_later_stays_whole() -> None:
    for whole, striped in run_ranks(whole_and_undone, 3):
        assert relative_error(whole, expected("one", RADIUS, None)) < 1e-4
        assert relative_error(striped, expected("one", RADIUS, RADIUS)) < 1e-4


def hoisted(group: Group) -> list[Tensor]:
    results = []
    for hoist in (False, True):
        pipe = make_tiny_controlled(make_tiny_controlnet())
        handle = parallelize(pipe, window=RADIUS, hoist_modulation=hoist, group=group)
        results.append(run(pipe, control_image=CONTROL))
        handle.undo()
        results.append(run(pipe, control_image=CONTROL))
    return results


def test_modulation_in_host_memory_is_the_same_to_the_bit() -> None:
    for plain, undone, moved, moved_back in run_ranks(hoisted, 2):
        assert torch.equal(plain, moved) and torch.equal(undone, moved_back)


def unequal(group: Group, what: str) -> None:
    pipe = make_tiny_controlled(make_tiny_controlnet())
    parallelize(pipe, window=RADIUS, group=group)
    control = OTHER if what == "picture" and group.rank == 1 else CONTROL
    scale = 0.5 if what == "scale" and group.rank == 1 else 1.0
    with pytest.raises(ValueError, match="every rank must be given the same noise, pictures, scales and step"):
        run(pipe, control_image=control, controlnet_conditioning_scale=scale)


@pytest.mark.parametrize("what", ["picture", "scale"])
def test_ranks_with_different_controls_are_told(what: str) -> None:
    run_ranks(unequal, 2, what)


def test_what_cannot_be_cut_is_refused_by_name_and_nothing_is_changed() -> None:
    pipe = make_tiny_pipeline()
    pipe.controlnet = SD3ControlNetModel(num_layers=1, num_attention_heads=2, attention_head_dim=8)
    with pytest.raises(ValueError, match=r"must be one of FluxControlNetModel.*, got SD3ControlNetModel"):
        parallelize(pipe, window=RADIUS)
    pipe = make_tiny_controlled(make_tiny_controlnet())
    pipe.controlnet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"pipe\.controlnet\.unfuse_qkv_projections"):
        parallelize(pipe, window=RADIUS)
    pipe.controlnet.unfuse_qkv_projections()
    pipe.controlnet.transformer_blocks[0].norm1.linear = torch.nn.Identity()
    with pytest.raises(ValueError, match="hoist_modulation needs plain linear layers"):
        parallelize(pipe, window=RADIUS, hoist_modulation=True)
    assert not any(hasattr(each, "striped") for each in pipe.transformer.attn_processors.values())
    assert type(pipe.transformer.norm_out.linear) is torch.nn.Linear


def test_residuals_and_conditions_of_another_size_are_refused() -> None:
    pipe = make_tiny_controlled(make_tiny_controlnet())
    handle = parallelize(pipe, window=RADIUS)
    pipe.controlnet.register_forward_hook(lambda *call: ([x[:, 1:] for x in call[-1][0]], call[-1][1]))
    with pytest.raises(ValueError, match="`controlnet_block_samples` must have a token for each of the 143 latents"):
        run(pipe, control_image=CONTROL)
    handle.undo()
