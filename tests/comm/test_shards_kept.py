"""Scripts that keep weights, or make them fewer, while each rank has its share: refused, and possible after `undo`."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error, run
from tests.tiny import make_tiny_pipeline
from tests.weights.test_hoisted_lora import adapt


def kept(group: Group, folder: Path) -> None:
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, group=group, shard_weights=True, window=4)
    expected = run(pipe)
    for keep in (
        lambda: pipe.save_pretrained(folder),
        lambda: pipe.transformer.save_pretrained(folder),
        lambda: torch.save(pipe.transformer.state_dict(), folder / "weights.pt"),
    ):
        with pytest.raises(ValueError, match=r"weights in shards cannot be saved.*call undo\(\) first"):
            keep()
    for keep in (lambda: torch.save(pipe.transformer, folder / "model.pt"), lambda: copy.deepcopy(pipe)):
        with pytest.raises(ValueError, match=r"cannot be copied or pickled.*call undo\(\) first"):
            keep()
    with pytest.raises(ValueError, match="fused projections cannot be cut"):
        pipe.transformer.fuse_qkv_projections()
    adapt(pipe, targets=["to_q"])
    with pytest.raises(ValueError, match=r"LoRA loaded after its layers were sharded.*undo\(\)"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), expected)
    handle.undo()
    if group.rank == 0:
        pipe.save_pretrained(folder)
        assert relative_error(run(FluxPipeline.from_pretrained(folder)), run(make_tiny_pipeline())) < 1e-5


def test_shards_are_not_saved_as_if_they_were_weights(tmp_path: Path) -> None:
    run_ranks(kept, 2, tmp_path)
