"""Blocks whose parts are compiled: the same numbers, one graph of each part for all steps, stages, chunks and blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.engine import parts
from clear_dist.engine.parts import Parts
from clear_dist.engine.striped import require_striped
from clear_dist.observe.profiling import CompileTime
from clear_dist.parallelize import parallelize
from clear_dist.request.devices import missing_compiler
from tests.ranks import run_ranks
from tests.test_parallelize import oracle_latents, relative_error, run
from tests.tiny import make_tiny_pipeline
from tests.weights.test_hoisted_lora import adapt

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}
PARTS = 6
needs_compiler = pytest.mark.skipif(missing_compiler("cpu") is not None, reason="torch.compile needs a C++ compiler")


def compiled_and_eager(group: Group, settings: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    results = []
    for arguments in settings:
        latents = []
        for compile in (True, False):
            pipe = make_tiny_pipeline()
            handle = parallelize(pipe, group=group, compile=compile, **arguments)
            latents.append(run(pipe))
            handle.undo()
        results.append((latents[0], latents[1]))
    return results


@needs_compiler
def test_compiled_is_eager() -> None:
    stale = EXACT | {"schedule": "stale", "warmup_steps": 1}
    for results in run_ranks(compiled_and_eager, 2, [EXACT, EXACT | {"hoist_modulation": True}, stale], timeout=500):
        for compiled, eager in results:
            assert relative_error(compiled, eager) < 1e-5
        for compiled, _ in results[:2]:
            assert relative_error(compiled, oracle_latents(4, None)) < 1e-4


@pytest.fixture
def compilations() -> Any:
    torch._dynamo.reset()
    compile_time = CompileTime()
    with compile_time.measuring():
        yield compile_time
    torch._dynamo.reset()


def test_one_graph_for_each_part(compilations: CompileTime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of each kind, several steps and sizes, whole and in chunks; more for batches, as often for all sizes."""
    pipe = make_tiny_pipeline(double_blocks=2, single_blocks=2)
    handle = parallelize(pipe, **EXACT)
    require_striped(pipe).parts = Parts.compiled(backend="eager", fullgraph=True)
    run(pipe)
    assert compilations.times == PARTS
    assert compilations.seconds > 0
    for height, width in ((13, 11), (11, 13), (6, 5), (20, 16)):
        run(pipe, height=height, width=width, steps=2)
    monkeypatch.setattr(parts, "MOST_TOKENS", 50)
    run(pipe, height=20, width=16)
    assert compilations.times == PARTS
    run(pipe, prompt=["a hill", "the sea"])
    with_batches = compilations.times
    assert with_batches <= 3 * PARTS
    run(pipe, prompt=["a hill", "the sea"], height=6, width=5)
    assert compilations.times == with_batches
    handle.undo()


@pytest.mark.parametrize("inference", [True, False])
def test_alone_is_the_same_memory(inference: bool) -> None:
    with torch.inference_mode(inference):
        whole = torch.randn(1, 9, 4, 3)
        part = whole[:, 2:5]
        own = parts.alone(part)
        assert torch.equal(own, part)
        assert (own.storage_offset(), own.stride()) == (0, (36, 12, 3, 1))
        own.zero_()
        assert not whole[:, 2:5].any() and whole[:, :2].all() and whole[:, 5:].all()


def test_lora_is_compiled_with_it(compilations: CompileTime) -> None:
    pipe, stock = make_tiny_pipeline(), make_tiny_pipeline()
    handles = [parallelize(pipe, **EXACT), parallelize(stock, **EXACT)]
    require_striped(pipe).parts = Parts.compiled(backend="eager", fullgraph=True)
    run(pipe)
    for each in (pipe, stock):
        adapt(each, targets=["to_q", "to_v", "proj_mlp", "ff.net.2", "proj_out", "norm1.linear"])
    before = compilations.times
    assert relative_error(run(pipe), run(stock)) < 1e-5
    assert before < compilations.times <= before + 2 * PARTS
    once = compilations.times
    run(pipe, height=6, width=5)
    assert compilations.times == once
    for handle in handles:
        handle.undo()


def test_undone_is_eager(compilations: CompileTime) -> None:
    pipe = make_tiny_pipeline()
    parallelize(pipe, compile=missing_compiler("cpu") is None, **EXACT).undo()
    run(pipe, steps=1)
    parallelize(pipe, **EXACT)
    run(pipe, steps=1)
    assert compilations.times == 0


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler \(no-such-compiler\), got none"):
        parallelize(make_tiny_pipeline(), compile=True, **EXACT)
