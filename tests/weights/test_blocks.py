"""The flags that make a model fit on smaller GPUs, from the command line: refused, told, and carried out."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from clear_dist.cli import main
from clear_dist.comm.counters import Counters
from clear_dist.comm.weight_shards import weights_of
from clear_dist.commands.prepare import parts_on_host
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import CARD
from clear_dist.families.flux.transformer import Flux
from clear_dist.launch.env import Place
from clear_dist.options import Options, Refusal
from clear_dist.plan.allocated import Allocated
from clear_dist.request import devices
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import located, settle
from clear_dist.weights import blocks
from clear_dist.weights.hoisted import HoistedModulation
from clear_dist.weights.loading import load_pipeline
from tests.forked import forked
from tests.tiny import make_clear_weights, make_tiny_flux, make_tiny_pipeline

QUICK = ("--res", "64", "--steps", "2", "--seed", "5", "--device", "cpu", "--max_sequence_length", "16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("tiny"), double_blocks=2)


def settled(model: Path, **flags: Any) -> tuple[Any, tuple[str, ...]]:
    request, _, lines = settle(GenerateFlags(model=str(model), device="cpu", **flags), Place(), CARDS)
    return request, lines


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(Refusal, match="either --float8 or --int8 can be given, got both"):
        GenerateFlags(float8=True, int8=True)


def test_shards_need_all_ranks_in_every_stage(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's native size is 128 pixels, 8 rows of tokens; whether files are here is found out later."""
    message = r"128 x 128 pixels are for 8 at most, got 9 ranks; nearest: --nproc 8"
    with pytest.raises(Refusal, match=message):
        settled(model, shard_weights=True, nproc=9, res=256)
    assert settled(model, shard_weights=True, nproc=8, res=256)[0].shard_weights
    assert not settled(model, nproc=9, res=256)[0].shard_weights
    monkeypatch.setattr(devices, "find_gpus", lambda: ())
    on_hub = GenerateFlags(model="someone/flux-like", clear_weights="none", nproc=9, shard_weights=True, res=256)
    request, *_ = settle(on_hub, Place(), CARDS)
    with pytest.raises(Refusal, match=message):
        located(request, model, None, (), CARDS)


def test_shards_need_all_ranks_where_down_sampled_keys_bind_rows_together(model: Path, tmp_path: Path) -> None:
    """8 rows of tokens are 2 times 4: a third rank would idle in the first stage of what has 16."""
    transformer = make_tiny_pipeline(double_blocks=2).transformer
    file = str(make_clear_weights(transformer, tmp_path / "clear_local_2_down_4.safetensors", down_factor=4))
    with pytest.raises(Refusal, match=r"128 x 128 pixels are for 2 at most, got 3 ranks; nearest: --nproc 2"):
        settled(model, shard_weights=True, nproc=3, res=256, clear_weights=file)
    assert settled(model, shard_weights=True, nproc=2, res=256, clear_weights=file)[0].down_factor == 4
    assert not settled(model, nproc=3, res=256, clear_weights=file)[0].shard_weights
    full = settled(model, shard_weights=True, nproc=3, res=256, clear_weights=file, window="full")
    assert full[0].down_factor == 1


def test_flags_without_effect_are_told(model: Path) -> None:
    lines = settled(model, shard_weights=True, offload=True, nproc=1)[1]
    assert "warning: --offload has no effect on a CPU: its memory is the host's" in lines
    assert "warning: --shard-weights has no effect on one rank" in lines
    assert not any("--shard-weights" in line for line in settled(model, shard_weights=True, nproc=2)[1])


def test_what_comes_to_the_device_later_stays_on_the_host(model: Path) -> None:
    """`meta` stands in for a GPU."""
    for flags, expected in (
        ({}, ()),
        ({"offload": True, "nproc": 2}, ("text_encoder", "text_encoder_2", "vae")),
        ({"shard_weights": True, "nproc": 1}, ()),
        ({"shard_weights": True, "nproc": 2}, ("transformer",)),
        ({"int8": True}, ("transformer",)),
        ({"int8": True, "offload": True}, ("text_encoder", "text_encoder_2", "vae", "transformer")),
        ({"hoist_modulation": True}, ("transformer",)),
    ):
        on_host = parts_on_host(settled(model, **flags)[0], CARD)
        assert on_host == expected
        meta = torch.device("meta")
        pipe = load_pipeline(model, CARD, with_text_encoders=True, dtype=torch.float32, device=meta, on_host=on_host)
        for name in ("text_encoder", "text_encoder_2", "vae", "transformer"):
            devices_of_part = {weight.device.type for weight in getattr(pipe, name).parameters()}
            assert devices_of_part == {"cpu" if name in on_host else "meta"}, name


def test_from_the_command_to_the_report(model: Path, tmp_path: Path) -> None:
    """Two ranks with shards against one rank without."""
    pictures, reports = {}, {}
    for name, flags in (("whole", ()), ("sharded", ("--nproc", "2", "--shard-weights", "--offload"))):
        files = str(tmp_path / f"{name}.png"), str(tmp_path / f"{name}.json")
        written = ["--output", files[0], "--report", files[1]]
        process = forked(partial(main, ["generate", "--model", str(model), *QUICK, *flags, *written]))
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert all(line.startswith("clear-dist: ") for line in errors.splitlines()), errors
        with Image.open(files[0]) as picture:
            pictures[name] = np.asarray(picture).astype(int)
        reports[name] = json.loads(Path(files[1]).read_text())
    assert np.abs(pictures["sharded"] - pictures["whole"]).max() <= 1
    whole, sharded = reports["whole"], reports["sharded"]
    weights = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    outside = sum(weight.nbytes for name, weight in weights.items() if "transformer_blocks." not in name)
    assert sum(sharded["weight_bytes"]) == whole["weight_bytes"][0] + outside, "of the blocks each rank has its own"
    assert all(sharded["settings"][name] for name in ("shard_weights", "offload"))
    assert all(sent > 0 for rank in sharded["comm"] for sent in rank["weight_bytes_sent"])
    assert whole["comm"][0]["weight_bytes_sent"] == [0, 0]


GPU: Any = SimpleNamespace(size=1, device=torch.device("meta"))


def counted(transformer: Any, group: Any = GPU, **flags: bool) -> Allocated:
    """What comes to a GPU while the weights are changed there, for which the meta device stands."""
    family, options = Flux(transformer), Options(**flags)
    with Allocated() as allocated:
        hoisted = HoistedModulation(family, group.device).weights if options.hoist_modulation else set()
        blocks.quantise_and_shard(family, group, Counters(), options, elsewhere=hoisted)
    return allocated


@pytest.mark.parametrize(
    ("flags", "largest"),
    [
        ({"int8": True}, 2),
        ({"float8": True}, 2),
        ({"hoist_modulation": True}, 0),
        ({"int8": True, "hoist_modulation": True}, 2),
    ],
)
def test_a_layer_at_a_time_comes_to_the_gpu_and_nothing_stays(flags: dict[str, bool], largest: int) -> None:
    """Beside the result at most twice a layer: itself, and its numbers in float32."""
    transformer = make_tiny_pipeline(double_blocks=2, single_blocks=2).transformer
    hoists = flags.get("hoist_modulation", False)
    products = [transformer.get_submodule(name).weight for name in Flux(transformer).products]
    modulation = sum(x.nbytes for norm in Flux(transformer).modulated.values() for x in norm.linear.parameters())
    held = sum(x.nbytes for x in transformer.parameters()) - hoists * modulation
    if largest:  # one byte for four, and a scale in float32 for each row
        held -= sum(3 * x.numel() - 4 * len(x) for x in products)
    allocated = counted(transformer, **flags)
    most = max(x.nbytes for x in products)
    assert allocated.bytes == held
    assert held <= allocated.peak <= held + largest * most


@pytest.mark.parametrize("int8", [False, True])
def test_shards_hold_a_block_at_a_time(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block held is gone from the device before the next one comes."""

    def empty(block: nn.Module) -> None:
        for owner, name, weight in weights_of(block):
            setattr(owner, name, nn.Parameter(weight.new_empty(0), requires_grad=False))

    def shard(blocks: Iterable[nn.Module], *_: Any, **__: Any) -> None:
        for block in blocks:
            empty(block)

    monkeypatch.setattr(blocks, "ShardedWeights", shard)
    transformer = make_tiny_pipeline(double_blocks=3, single_blocks=3).transformer
    sizes = [sum(x.nbytes for x in block.parameters()) for block in Flux(transformer).blocks]
    outside = sum(x.nbytes for x in transformer.parameters()) - sum(sizes)
    group: Any = SimpleNamespace(size=2, device=torch.device("meta"))
    allocated = counted(transformer, group, shard_weights=True, int8=int8)
    scales = sum(x.nbytes for x in transformer.buffers())
    assert allocated.bytes == outside + scales
    assert allocated.peak <= outside + scales + max(sizes)


def test_weights_that_hooks_move_stay_where_they_are() -> None:
    """diffusers' group offload keeps them in host memory, and brings a group at a time."""
    transformer = make_tiny_pipeline().transformer
    transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert counted(transformer).bytes == 0
