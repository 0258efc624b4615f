"""Forwards that are replayed draw what forwards draw, to the bit; what a graph knows nothing of is drawn without one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from clear_dist import options
from clear_dist.attention import choose_backend
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.engine.pooled_keys import Pooling
from clear_dist.engine.settings import Settings
from clear_dist.engine.striped import StripedModel
from clear_dist.families.transformers import family_of
from clear_dist.options import FEWEST_REPLAYED, Options
from clear_dist.parallelize import put_model_on_stripes
from tests.ranks import run_ranks
from tests.test_parallelize import run
from tests.tiny import make_tiny_pipeline

STEPS = 7
EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact", "attention_backend": "reference"}
SHARDED = EXACT | {"text_tokens": "sharded"}
FULL: dict[str, Any] = {"window": "full"}
PICTURES: list[dict[str, Any]] = [
    {},
    {"prompt": "a harbour", "guidance_scale": 7.0, "seed": 8},
    {"negative_prompt": "fog", "true_cfg_scale": 2.0},
    {"height": 9, "width": 12},
    {"num_images_per_prompt": 2},
]
FORWARDS = (STEPS, STEPS, 2 * STEPS, STEPS, STEPS)


class Recorder:
    """Captures without CUDA: a function that is kept, and run again; until then its output is NaN, as if never run."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.counters = Counters()
        self.breaks: Callable[[], None] = lambda: None

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        output = work()
        for x in tree_leaves(output):
            x.fill_(torch.nan)

        def replay() -> None:
            self.replays += 1
            self.breaks()
            with self.counters.apart():  # a graph tells nobody what it sends
                new = work()
            for x, value in zip(tree_leaves(output), tree_leaves(new), strict=True):
                x.copy_(value)

        return replay, output


def on_stripes(
    pipe: Any, group: Group, chosen: dict[str, Any], capture: Recorder | None, pooling: Pooling | None = None
) -> StripedModel:
    settled = Options(**chosen).settled("full")
    choose = partial(choose_backend, settled.attention_backend, device=group.device, dtype=torch.float32)
    settings = Settings(options=settled, choose_backend=choose, capture=capture, pooling=pooling)
    striped = put_model_on_stripes(family_of(pipe.transformer), pipe.scheduler, group, settings)
    if capture is not None:
        capture.counters = striped.counters
    return striped


def drawn(pipe: Any, group: Group, chosen: dict[str, Any], *pictures: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """Latents without graphs, and the amounts of all steps."""
    striped = on_stripes(pipe, group, chosen, None)
    latents = [run(pipe, **{"steps": STEPS} | picture) for picture in pictures]
    amounts = striped.counters.as_dict()
    striped.remove()
    return latents, amounts


def equal(group: Group, chosen: dict[str, Any]) -> list[tuple[int, int]]:
    """Captures and replays of each picture, which is what it is without graphs."""
    pipe = make_tiny_pipeline()
    expected, amounts = drawn(pipe, group, chosen, *PICTURES)
    recorder, counts = Recorder(), []
    striped = on_stripes(pipe, group, chosen, recorder)
    for picture, latents in zip(PICTURES, expected, strict=True):
        recorder.captures = recorder.replays = 0
        assert torch.equal(run(pipe, **{"steps": STEPS} | picture), latents)
        counts.append((recorder.captures, recorder.replays))
    found = striped.counters.as_dict()
    assert {**found, "seconds_waiting": 0} == {**amounts, "seconds_waiting": 0}
    striped.remove()
    assert "forward" not in vars(pipe.transformer)
    return counts


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("chosen", [EXACT, SHARDED, FULL], ids=str)
def test_pictures_and_amounts_are_what_they_are_without_graphs(size: int, chosen: dict[str, Any]) -> None:
    for counts in run_ranks(equal, size, chosen):
        # All forwards but the first; of two passes, both by the graph of the one.
        assert counts == [(1, forwards - 1) for forwards in FORWARDS]


def change_weight(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 2:
        layer = pipe.transformer.proj_out
        layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)
    return {}


def set_module(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 2:
        norm = pipe.transformer.norm_out.norm
        pipe.transformer.norm_out.norm = nn.Sequential(norm, nn.Hardtanh(-1, 1))
    return {}


def hook(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 2:
        pipe.transformer.norm_out.register_forward_hook(lambda module, args, output: output * 2)
    return {}


def changed(group: Group, change: Callable[..., dict[str, Any]]) -> tuple[bool, int, int]:
    """Whether a generation that `change` is called in is right, and the next one; captures and replays of both."""
    first, second = make_tiny_pipeline(), make_tiny_pipeline()
    expected, _ = drawn(first, group, EXACT, {"callback_on_step_end": change}, {})
    recorder = Recorder()
    striped = on_stripes(second, group, EXACT, recorder)
    found = [run(second, steps=STEPS, callback_on_step_end=change), run(second, steps=STEPS)]
    striped.remove()
    return all(map(torch.equal, found, expected)), recorder.captures, recorder.replays


@pytest.mark.parametrize(
    ("change", "captures", "replays"),
    [(change_weight, 2, 2 + STEPS - 1), (set_module, 2, 2 + STEPS - 1), (hook, 1, 2)],
)
def test_a_model_that_changes_is_drawn_as_it_is(
    change: Callable[..., dict[str, Any]], captures: int, replays: int
) -> None:
    """No graphs until the generation ends, nor while others' hooks are on it."""
    assert run_ranks(changed, 2, change) == [(True, captures, replays)] * 2


class FailingOnce(Recorder):
    """One rank's first capture breaks off, a single one's within attention; the others' sends nothing."""

    def __init__(self, striped: Callable[[], StripedModel], *, fails: bool) -> None:
        super().__init__()
        self._striped = striped
        self._fails = fails

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.captures:
            return super().__call__(work)
        self.captures = 1
        if self._fails:
            if self._striped().group.size > 1:  # what is sent here would arrive
                not_permitted()
            vars(self._striped()).update(attend=not_permitted)
            try:
                work()
            finally:
                del vars(self._striped())["attend"]
        return (lambda: None), None


def not_permitted(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("operation not permitted when stream is capturing")


def failing(group: Group, chosen: dict[str, Any], failing_rank: int) -> tuple[bool, int, int]:
    pipe = make_tiny_pipeline()
    expected, amounts = drawn(pipe, group, chosen, {}, {})
    recorder = FailingOnce(lambda: striped, fails=group.rank == failing_rank)
    striped = on_stripes(pipe, group, chosen, recorder)
    with pytest.warns(UserWarning, match="CUDA graphs are left out"):
        found = [run(pipe, steps=STEPS)]
    found.append(run(pipe, steps=STEPS))
    same = {**striped.counters.as_dict(), "seconds_waiting": 0} == {**amounts, "seconds_waiting": 0}
    striped.remove()
    return same and all(map(torch.equal, found, expected)), recorder.captures, recorder.replays


def test_what_a_capture_that_broke_off_has_begun_is_forgotten() -> None:
    assert run_ranks(failing, 1, EXACT, 0) == [(True, 2, STEPS - 1)]


@pytest.mark.parametrize("chosen", [EXACT, SHARDED], ids=str)
def test_where_one_rank_cannot_capture_none_uses_graphs_until_the_next_picture(chosen: dict[str, Any]) -> None:
    assert run_ranks(failing_on_the_second, 2, chosen) == [(True, 2, STEPS - 1)] * 2


def failing_on_the_second(group: Group, chosen: dict[str, Any]) -> tuple[bool, int, int]:
    return failing(group, chosen, 1)


def interrupted(group: Group) -> tuple[bool, int]:
    """A replay that raises, then two pictures."""
    pipe = make_tiny_pipeline()
    expected, _ = drawn(pipe, group, EXACT, {}, {"seed": 8})
    recorder = Recorder()
    striped = on_stripes(pipe, group, EXACT, recorder)

    def broken() -> None:
        if recorder.replays == 3:
            raise KeyboardInterrupt

    recorder.breaks = broken
    with pytest.raises(KeyboardInterrupt):
        run(pipe, steps=STEPS)
    found = [run(pipe, steps=STEPS), run(pipe, steps=STEPS, seed=8)]
    striped.remove()
    return all(map(torch.equal, found, expected)), recorder.captures


def test_after_a_generation_that_broke_off_the_next_one_has_graphs_of_its_own() -> None:
    assert run_ranks(interrupted, 2) == [(True, 3)] * 2


def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    pipe._interrupt = step == 3
    return {}


@pytest.mark.parametrize(
    ("chosen", "arguments"),
    [
        (EXACT | {"hoist_modulation": True}, {}),  # a hook looks its outputs up, step by step
        (EXACT | {"attention_backend": "masked"}, {}),
        (EXACT, {"steps": FEWEST_REPLAYED - 1}),
    ],
)
def test_what_rules_exclude_is_never_captured(chosen: dict[str, Any], arguments: dict[str, Any]) -> None:
    ((same, captures),) = run_ranks(excluded, 1, chosen, arguments)
    assert same and not captures


def excluded(
    group: Group, chosen: dict[str, Any], arguments: dict[str, Any], before: Callable[[Any], None] | None = None
) -> tuple[bool, int]:
    pipe, recorder = make_tiny_pipeline(), Recorder()
    if before is not None:
        before(pipe)
    expected, _ = drawn(pipe, group, chosen, arguments)
    striped = on_stripes(pipe, group, chosen, recorder)
    found = run(pipe, **{"steps": STEPS} | arguments)
    striped.remove()
    return torch.equal(found, expected[0]), recorder.captures


def on_a_block(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(("chosen", "before"), [(EXACT, on_a_block), (EXACT | {"schedule": "stale"}, None)])
def test_others_hooks_and_late_halos_are_not_captured(chosen: dict[str, Any], before: Any) -> None:
    assert run_ranks(excluded, 2, chosen, {}, before) == [(True, 0)] * 2


def test_many_tokens_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 13 * 11 + 9
    group = Group.create("cpu")
    for most, captures in ((tokens - 1, 0), (tokens, 1)):
        monkeypatch.setattr(options, "MOST_REPLAYED", most)
        assert excluded(group, EXACT, {}) == (True, captures)
    group.close()


def test_a_generation_that_is_stopped_early_leaves_nothing_to_the_next() -> None:
    group = Group.create("cpu")
    pipe, recorder = make_tiny_pipeline(), Recorder()
    expected, _ = drawn(pipe, group, EXACT, {"callback_on_step_end": stop}, {"prompt": "a harbour"})
    striped = on_stripes(pipe, group, EXACT, recorder)
    found = [run(pipe, steps=STEPS, callback_on_step_end=stop), run(pipe, steps=STEPS, prompt="a harbour")]
    striped.remove()
    group.close()
    assert all(map(torch.equal, found, expected)) and recorder.captures == 2
