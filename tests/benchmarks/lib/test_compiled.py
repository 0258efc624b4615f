"""`--compile` of the tables: everyone's blocks are compiled, or nobody's."""

from typing import Any

import pytest

from benchmarks.lib import baselines, cells, tables
from clear_dist.comm.group import Group
from clear_dist.engine.on_cpu import ON_CPU
from clear_dist.engine.parts import Parts
from clear_dist.engine.striped import require_striped, striped_of
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline


def compiled_blocks(transformer: Any) -> list[bool]:
    """Whether each of diffusers' own blocks is compiled."""
    blocks = *transformer.transformer_blocks, *transformer.single_transformer_blocks
    return [block._compiled_call_impl is not None for block in blocks]


@pytest.fixture
def group() -> Any:
    alone = Group.create("cpu")
    yield alone
    alone.close()


@pytest.mark.parametrize("compile", [False, True])
def test_all_that_one_rank_measures(group: Group, compile: bool) -> None:
    pipe = make_tiny_pipeline()
    limits = tables.Limits(tables.SMALL, 1.0, 1, 1.0, 2**30)
    bench = cells.Bench(pipe=pipe, world=group, limits=limits, settings=(), groups={1: group}, compile=compile)
    window, full = tables.windows([4])[0], tables.FULL
    with cells.prepared(cells.Place(setting=full, ranks=1), 208, bench) as stock:
        assert striped_of(stock.transformer) is None
        assert compiled_blocks(stock.transformer) == [compile] * 2
    for setting, ranks, is_share in [
        (window, 1, False), (window, 2, True), (full, 2, True), (cells.DISTRIFUSION, 2, True),
    ]:  # fmt: skip
        place = cells.Place(setting=setting, ranks=ranks, is_share=is_share)
        with cells.prepared(place, 208, bench) as ours:
            assert (require_striped(ours).parts is ON_CPU) is not compile
            assert not any(compiled_blocks(ours.transformer))


def blocks_of_baseline(group: Group, compile: bool) -> tuple[list[bool], list[bool], bool]:
    """Compiled blocks of Ulysses and of the pipeline it is a copy of, and whether they share weights."""
    pipe = make_tiny_pipeline()
    with baselines.Baseline(pipe, "Ulysses", 2, group, compile=compile).ready() as theirs:
        weights = zip(pipe.transformer.parameters(), theirs.transformer.parameters(), strict=True)
        shared = all(mine is other for mine, other in weights)
        return compiled_blocks(theirs.transformer), compiled_blocks(pipe.transformer), shared


@pytest.mark.parametrize("compile", [False, True])
def test_the_baselines_on_several_ranks(compile: bool) -> None:
    for theirs, mine, shared in run_ranks(blocks_of_baseline, 2, compile):
        assert set(theirs) == {compile} and not any(mine) and shared


def test_the_settings_are_the_engines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("torch.compile", lambda part, **options: asked.append(options))
    Parts.compiled()
    assert asked and all(options == baselines.COMPILATION for options in asked)
