"""Weights in shards: the same numbers as whole ones, from a share of the memory, on stripes and in a cascade."""

import os
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clear_dist
from clear_dist.comm.group import Group, PeerLost
from clear_dist.comm.weight_shards import WeightGather
from clear_dist.engine.parts import Parts
from clear_dist.engine.striped import require_striped
from clear_dist.families.flux.transformer import Flux
from clear_dist.parallelize import parallelize
from clear_dist.weights.quantised import to_float8
from tests.ranks import RanksFailedError, run_ranks
from tests.test_parallelize import oracle_latents, relative_error, run
from tests.tiny import make_tiny_pipeline
from tests.weights.test_hoisted_lora import adapt

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}
BLOCKS: dict[str, Any] = {"double_blocks": 2, "single_blocks": 2}


def sharded_and_whole(group: Group, settings: list[dict[str, Any]], inference: bool) -> list[tuple[Tensor, Tensor]]:
    results = []
    with torch.inference_mode(inference):
        for arguments in settings:
            latents = []
            for shard_weights in (True, False):
                pipe = make_tiny_pipeline(**BLOCKS)
                handle = parallelize(pipe, group=group, shard_weights=shard_weights, **arguments)
                latents.append(run(pipe))
                handle.undo()
            results.append((latents[0], latents[1]))
    return results


@pytest.mark.parametrize(("size", "inference"), [(1, False), (2, True), (3, False)])
def test_shards_are_whole_weights(size: int, inference: bool) -> None:
    """The same products of the same numbers: nothing may differ, not by a rounding."""
    stale = EXACT | {"schedule": "stale", "warmup_steps": 1}
    settings = [EXACT, EXACT | {"hoist_modulation": True}, stale, {"window": "full"}]
    for results in run_ranks(sharded_and_whole, size, settings, inference):
        for sharded, whole in results:
            assert torch.equal(sharded, whole)


def sharded_latents(group: Group) -> Tensor:
    pipe = make_tiny_pipeline()
    parallelize(pipe, group=group, shard_weights=True, **EXACT)
    return run(pipe)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_ranks_computes_what_one_does(size: int) -> None:
    """Rows of weights that 3 and 5 ranks do not divide."""
    for latents in run_ranks(sharded_latents, size):
        assert relative_error(latents, oracle_latents(4, None)) < 1e-4


def with_float8(group: Group, pipe: Any, shard: bool) -> Tensor:
    to_float8(pipe.transformer, Flux(pipe.transformer).products)
    parallelize(pipe, group=group, shard_weights=shard, **EXACT)
    return run(pipe)


def with_lora_before(group: Group, pipe: Any, shard: bool) -> Tensor:
    adapt(pipe, targets=["to_q", "proj_mlp", "norm.linear"])
    parallelize(pipe, group=group, shard_weights=shard, **EXACT)
    return run(pipe)


def with_lora_fused(group: Group, pipe: Any, shard: bool) -> Tensor:
    """An older LoRA is fused into this rank's share. Twice: other shards on other process groups."""
    adapt(pipe, targets=["to_q", "norm.linear"])
    latents = []
    for _ in range(2):
        handle = parallelize(pipe, group=group, shard_weights=shard, **EXACT)
        latents.append(run(pipe, steps=1))
        pipe.transformer.fuse_lora()
        latents.append(run(pipe, steps=1))
        pipe.transformer.unfuse_lora()
        handle.undo()
    return torch.cat([*latents, run(pipe, steps=1)])


def with_lora_after(group: Group, pipe: Any, shard: bool) -> Tensor:
    parallelize(pipe, group=group, shard_weights=shard, **EXACT)
    run(pipe, steps=1)
    adapt(pipe, targets=["to_q", "proj_mlp", "norm.linear"])
    return run(pipe)


def compiled(group: Group, pipe: Any, shard: bool) -> Tensor:
    parallelize(pipe, group=group, shard_weights=shard, **EXACT)
    require_striped(pipe).parts = Parts.compiled(backend="eager", fullgraph=True)
    return run(pipe)


def guided(group: Group, pipe: Any, shard: bool) -> Tensor:
    parallelize(pipe, group=group, shard_weights=shard, **EXACT)
    return run(pipe, negative_prompt="fog", true_cfg_scale=2.0, num_images_per_prompt=2)


def through_host_memory(group: Group, pipe: Any, shard: bool) -> Tensor:
    host = Group.create("cpu", transport="host")
    parallelize(pipe, group=host, shard_weights=shard, **EXACT)
    return run(pipe)


def after_an_error(group: Group, pipe: Any, shard: bool) -> Tensor:
    """Fails amid a forward, on all ranks: one block's weights are there and another's under way."""
    parallelize(pipe, group=group, shard_weights=shard, **EXACT)

    def fail(*_: Any) -> None:
        raise KeyError("in between")

    hook = pipe.transformer.single_transformer_blocks[0].attn.to_v.register_forward_hook(fail)
    with pytest.raises(KeyError, match="in between"):
        run(pipe)
    hook.remove()
    return run(pipe)


def parallelized_anew(group: Group, pipe: Any, shard: bool) -> Tensor:
    before = {name: (type(module), len(module._forward_hooks)) for name, module in pipe.transformer.named_modules()}
    weights = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    handle = parallelize(pipe, group=group, shard_weights=shard, **EXACT)
    run(pipe, steps=1)
    shares = [weight for weight in pipe.transformer.parameters() if hasattr(weight, "to_local")]
    handle.undo()
    after = {name: (type(module), len(module._forward_hooks)) for name, module in pipe.transformer.named_modules()}
    assert after == before
    assert all(torch.equal(weight, weights[name]) for name, weight in pipe.transformer.state_dict().items())
    assert bool(shares) == shard
    assert all(share._local_tensor.untyped_storage().nbytes() == 0 for share in shares)
    parallelize(pipe, group=group, shard_weights=shard, **EXACT)
    return run(pipe)


WAYS = (
    with_float8,
    with_lora_before,
    with_lora_fused,
    with_lora_after,
    compiled,
    guided,
    through_host_memory,
    after_an_error,
    parallelized_anew,
)


def every_way(group: Group) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        way.__name__: (way(group, make_tiny_pipeline(**BLOCKS), True), way(group, make_tiny_pipeline(**BLOCKS), False))
        for way in WAYS
    }


def test_together_with_all_else() -> None:
    for results in run_ranks(every_way, 3):
        different = [name for name, (sharded, whole) in results.items() if not torch.equal(sharded, whole)]
        assert different == []


def plain_bytes(block: nn.Module) -> int:
    """Bytes of weights that are whole on this rank."""
    return sum(weight.nbytes for weight in block.parameters() if not hasattr(weight, "to_local"))


def memory(group: Group) -> dict[str, Any]:
    pipe = make_tiny_pipeline(double_blocks=3, single_blocks=4)
    transformer = pipe.transformer
    blocks = Flux(transformer).blocks
    whole = [plain_bytes(block) for block in blocks]
    outside = plain_bytes(transformer) - sum(whole)
    buffers: list[weakref.ref[Any]] = []
    held: list[tuple[int, int, int]] = []
    stock = WeightGather.allocate

    def allocate(gather: Any, size: Any, **options: Any) -> Tensor:
        buffer = stock(gather, size, **options)
        buffers.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    def probe(index: int) -> Any:
        def note(*_: Any) -> None:
            alive = [storage.nbytes() for ref in buffers if (storage := ref()) is not None]
            held.append((index, sum(map(plain_bytes, blocks)), sum(alive)))

        return note

    handle = parallelize(pipe, group=group, shard_weights=True, **EXACT)
    WeightGather.allocate = allocate  # type: ignore[method-assign]
    for index, block in enumerate(blocks):
        block.attn.to_q.register_forward_hook(probe(index))
    run(pipe, steps=2)
    WeightGather.allocate = stock  # type: ignore[method-assign]
    after = sum(map(plain_bytes, blocks))
    sent = handle.counters.as_dict()["weight_bytes_sent"]
    return {
        "whole": whole, "outside": outside, "held": held, "after": after, "bytes": handle.weight_bytes, "sent": sent
    }  # fmt: skip


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_holds_its_share_the_block_at_hand_and_the_next_one(size: int) -> None:
    ranks = run_ranks(memory, size)
    whole, outside = ranks[0]["whole"], ranks[0]["outside"]
    assert sum(rank["bytes"] - outside for rank in ranks) == sum(whole), "each weight is held by one rank"
    for rank in ranks:
        assert rank["bytes"] - outside < 1.1 * sum(whole) / size
        assert rank["after"] == 0
        assert [index for index, _, _ in rank["held"]] == [*range(len(whole))] * 2
        for index, gathered, under_way in rank["held"]:
            assert gathered == whole[index]
            following = whole[index + 1] if index + 1 < len(whole) else 0
            assert following <= under_way <= 1.1 * following, "padded to equal shares"
        for sent in rank["sent"]:
            assert sum(whole) / size <= sent < 1.1 * sum(whole) / size


def cascade(group: Group) -> tuple[list[bytes], list[bytes]]:
    pictures = []
    for shard in (True, False):
        pipe = make_tiny_pipeline(sample_size=64)
        pipe.set_progress_bar_config(disable=True)
        handle = parallelize(pipe, group=group, shard_weights=shard, **EXACT)
        images = clear_dist.generate(pipe, "a hill", height=96, width=80, num_inference_steps=2, max_sequence_length=9)
        handle.undo()
        pictures.append([image.tobytes() for image in images])
    return pictures[0], pictures[1]


def test_in_a_cascade() -> None:
    for sharded, whole in run_ranks(cascade, 3):
        assert sharded == whole


def idle_ranks(group: Group) -> None:
    pipe = make_tiny_pipeline(sample_size=64)
    parallelize(pipe, group=group, shard_weights=True, **EXACT)
    message = r"all ranks in every stage, and 64 x 64 pixels are for 4 at most, by their tokens and Stage.ranks, got 5 ranks; nearest: 4"
    with pytest.raises(ValueError, match=message):
        clear_dist.generate(pipe, "a hill", height=128, width=128, num_inference_steps=1, max_sequence_length=9)


def test_a_stage_that_leaves_ranks_idle_is_refused_on_all() -> None:
    run_ranks(idle_ranks, 5)


def on_some_ranks(group: Group) -> list[Tensor]:
    """Twice: the second group of the same ranks must not call at the addresses of the first."""
    part = group.split(2)
    latents = []
    for _ in range(2):
        pipe = make_tiny_pipeline()
        handle = parallelize(pipe, group=part, shard_weights=True, **EXACT)
        latents.append(run(pipe))
        handle.undo()
        handle.close()  # to no effect
    part.close()
    return latents


def test_on_a_part_of_the_ranks() -> None:
    """Two of them in shards, the third alone."""
    for latents in run_ranks(on_some_ranks, 3):
        for each in latents:
            assert relative_error(each, oracle_latents(4, None)) < 1e-4


def lost(group: Group) -> None:
    pipe = make_tiny_pipeline()
    parallelize(pipe, group=group, shard_weights=True, **EXACT)
    if group.rank == 1:  # while others wait for its share of the first block
        pipe.transformer.x_embedder.register_forward_hook(lambda *_: os._exit(7))
    with pytest.raises(PeerLost):
        run(pipe)


def test_a_lost_rank_is_told() -> None:
    with pytest.raises(RanksFailedError) as error:
        run_ranks(lost, 3)
    assert set(error.value.failures) == {1}
