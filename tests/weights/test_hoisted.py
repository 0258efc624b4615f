"""Modulation computed beforehand equals modulation computed in each step, to the bit, whatever the generation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.engine.references import raster_ids
from clear_dist.engine.striped import require_striped
from clear_dist.families.flux.transformer import Flux
from clear_dist.parallelize import parallelize
from clear_dist.stages import Upscaling
from clear_dist.weights.hoisted import HoistedLinear, HoistedModulation
from tests.engine.test_stale import GUIDED, edited
from tests.engine.test_stale_generations import GENERATIONS, STOPS
from tests.ranks import run_ranks
from tests.test_parallelize import run
from tests.tiny import make_tiny_pipeline

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}
STALE: dict[str, Any] = {**EXACT, "schedule": "stale", "warmup_steps": 1}
MORE: dict[str, Callable[[Any], Tensor]] = {
    "more steps": lambda pipe: run(pipe, steps=5),
    "sigmas": lambda pipe: run(pipe, sigmas=[1.0, 0.4, 0.3]),
    "other guidance": lambda pipe: run(pipe, guidance_scale=7.5),
}
LAYERS = 4
"""Modulation layers of the tiny model: two in its double block, one in its single block, one before its output."""


def compared(group: Group, settings: dict[str, Any]) -> dict[str, bool]:
    """One generation after another, and after each way to stop one: whether hoisted equals not hoisted."""
    stock, hoisted = make_tiny_pipeline(), make_tiny_pipeline()
    parallelize(stock, group=group, **settings)
    handle = parallelize(hoisted, group=group, hoist_modulation=True, **settings)
    same = {name: torch.equal(draw(hoisted), draw(stock)) for name, draw in (GENERATIONS | MORE).items()}
    for how, stop in STOPS.items():
        stop(hoisted)
        same[how] = torch.equal(run(hoisted), run(stock))
    handle.undo()
    parallelize(hoisted, group=group, **settings)
    return same | {"undone": torch.equal(run(hoisted), run(stock))}


@pytest.mark.parametrize(("size", "settings"), [(1, EXACT), (3, {"window": "full"}), (3, STALE)])
def test_hoisted_is_not_hoisted_to_the_bit(size: int, settings: dict[str, Any]) -> None:
    for same in run_ranks(compared, size, settings):
        assert [name for name, equal in same.items() if not equal] == []


def cascade(group: Group, hoist: bool) -> tuple[list[bytes], bool]:
    """Three stages, the first on two of three ranks; and whether anything is held afterwards."""
    pipe = make_tiny_pipeline(sample_size=32)
    pipe.set_progress_bar_config(disable=True)
    parallelize(pipe, group=group, hoist_modulation=hoist, **EXACT)
    upscaling = Upscaling(steps=2, strength=0.5)
    pictures = clear_dist.generate(
        pipe, "a hill", height=96, width=96, num_inference_steps=2, upscaling=upscaling, max_sequence_length=8
    )
    modulation = require_striped(pipe).modulation
    return [picture.tobytes() for picture in pictures], modulation is not None and modulation._tables != {}


def test_stages_of_a_cascade() -> None:
    (stock, _), *_ = run_ranks(cascade, 3, False)
    (hoisted, *_), *others = zip(*run_ranks(cascade, 3, True), strict=True)
    assert hoisted == stock != []
    assert others == [(False, False, False)]


class Reads(TorchDispatchMode):
    """Names of the modulation layers whose weights each forward reads."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.forwards: list[set[str]] = []
        weights = {name: norm.linear.weight for name, norm in Flux(transformer).modulated.items()}
        self._names = {weight.data_ptr(): name for name, weight in weights.items()}
        transformer.register_forward_pre_hook(lambda *_: self.forwards.append(set()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in args:
            if isinstance(x, Tensor) and self.forwards and x.data_ptr() in self._names:
                self.forwards[-1].add(self._names[x.data_ptr()])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance_embeds", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize(
    ("draw", "passes", "steps"),
    [
        (lambda pipe: run(pipe, steps=5), 1, 5),
        (lambda pipe: run(pipe, prompt=["a hill", "the sea"]), 1, 3),
        (lambda pipe: run(pipe, sigmas=[1.0, 0.4, 0.3]), 1, 3),
        (lambda pipe: run(pipe, **(GUIDED | {"steps": 3})), 2, 3),
        (edited, 1, None),
    ],
    ids=["steps", "batch", "sigmas", "two passes", "from a picture"],
)
def test_weights_are_read_once_a_pass(
    draw: Callable[[Any], Tensor], passes: int, steps: int | None, guidance_embeds: bool, dtype: torch.dtype
) -> None:
    """Every step finds its embedding among those that were foreseen; twice, for another generation reads anew."""
    pipe = make_tiny_pipeline(guidance_embeds=guidance_embeds).to(dtype)
    handle = parallelize(pipe, hoist_modulation=True, **EXACT)
    try:
        draw(pipe)  # image-to-image's `from_pipe` makes new weights, in float32
        for _ in range(2):
            with Reads(pipe.transformer) as reads:
                draw(pipe)
            read = [len(names) for names in reads.forwards]
            assert read[:passes] == [LAYERS] * passes
            assert not any(read[passes:])
            assert len(read) == (passes * steps if steps else len(read)) > passes
    finally:
        handle.undo()


def inputs(timestep: float, seed: int = 0) -> dict[str, Tensor]:
    """For a transformer called by hand."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 6 * 5, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 24, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.tensor([timestep]),
        "guidance": torch.tensor([3.5]),
        "txt_ids": torch.zeros(4, 3),
    }


def test_a_transformer_called_by_hand() -> None:
    """Without a schedule, against a schedule, with other prompts, batches and weights in the midst of a generation."""
    stock, hoisted = make_tiny_pipeline(), make_tiny_pipeline()
    handles = [parallelize(stock, **EXACT), parallelize(hoisted, hoist_modulation=True, **EXACT)]
    new_ids = partial(raster_ids, 6, 5, torch.device("cpu"))
    ids = new_ids()

    def same(**given: Tensor) -> bool:
        ours, theirs = (pipe.transformer(**given, img_ids=ids).sample for pipe in (hoisted, stock))
        return torch.equal(ours, theirs)

    try:
        assert all(same(**inputs(timestep)) for timestep in (0.5, 0.5, 0.4))
        for pipe in (stock, hoisted):
            pipe.scheduler.set_timesteps(3, mu=1.0)
        ids = new_ids()  # a generation begins
        assert all(same(**inputs(timestep, seed)) for timestep, seed in ((0.9, 0), (0.1, 0), (0.9, 1), (0.9, 0)))
        ids = new_ids()
        for batch in (2, 3, 1, 2):
            assert same(**{name: x if name == "txt_ids" else torch.cat([x] * batch) for name, x in inputs(0.9).items()})
        ids = new_ids()
        assert same(**inputs(0.9))
        table = require_striped(hoisted).modulation._tables[0]
        for pipe in (stock, hoisted):
            pipe.transformer.norm_out.linear.weight.mul_(2)
        assert same(**inputs(0.9))
        assert require_striped(hoisted).modulation._tables[0] is not table
    finally:
        for handle in handles:
            handle.undo()


def test_names_stay_and_undo_puts_everything_back() -> None:
    pipe = make_tiny_pipeline()
    before = {name: (module, type(module)) for name, module in pipe.transformer.named_modules()}
    values = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    handle = parallelize(pipe, hoist_modulation=True, **EXACT)
    run(pipe)
    hoisted = [name for name, module in pipe.transformer.named_modules() if isinstance(module, HoistedLinear)]
    assert len(hoisted) == LAYERS
    now = pipe.transformer.state_dict()
    assert list(now) == list(values)
    assert all(torch.equal(now[name], value) for name, value in values.items())
    tokens, embedding = torch.ones(1, 2, 32), torch.ones(1, 32)
    ours, stock = (x.transformer.norm_out(tokens, embedding) for x in (pipe, make_tiny_pipeline()))
    assert torch.equal(ours, stock)  # a norm called by itself is not given what was meant for a forward
    handle.undo()
    handle.undo()  # to no effect
    assert {name: (module, type(module)) for name, module in pipe.transformer.named_modules()} == before
    assert torch.equal(run(pipe), run(make_tiny_pipeline()))


def test_weights_stay_on_the_host_and_undo_brings_them_to_the_model() -> None:
    """The meta device stands for a GPU: what is on it is not on the host."""
    transformer = make_tiny_pipeline().transformer
    modulation = HoistedModulation(Flux(transformer), torch.device("meta"))
    linear = transformer.norm_out.linear
    outputs = linear.outputs([torch.empty(2, linear.in_features, device="meta")] * 3)
    assert [(x.device.type, tuple(x.shape)) for x in outputs] == [("meta", (2, linear.out_features))] * 3
    assert {x.device.type for x in linear.parameters()} == {"cpu"}
    transformer.time_text_embed.to("meta")
    modulation.undo()
    assert {x.device.type for x in transformer.norm_out.linear.parameters()} == {"meta"}


class Quantised(nn.Linear):
    pass


def test_layers_that_are_not_plain_are_refused_before_anything_is_changed() -> None:
    pipe = make_tiny_pipeline()
    norm = pipe.transformer.single_transformer_blocks[0].norm
    linear = norm.linear
    norm.linear = Quantised(linear.in_features, linear.out_features)
    before = dict(pipe.transformer.named_modules())
    with pytest.raises(ValueError, match=r"got a Quantised for single_transformer_blocks\.0\.norm\.linear"):
        parallelize(pipe, hoist_modulation=True, **EXACT)
    assert dict(pipe.transformer.named_modules()) == before
    norm.linear = linear.to("meta")
    with pytest.raises(ValueError, match="weights on no device"):
        parallelize(pipe, hoist_modulation=True, **EXACT)
