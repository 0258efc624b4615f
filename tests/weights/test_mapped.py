"""Weights as views of mapped files: equal to those of diffusers' own loader, and one copy for all ranks."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from clear_dist.cards.clear import is_image_side
from clear_dist.cards.folder import read_folder
from clear_dist.cards.single_file import PartFile
from clear_dist.comm.group import Group
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import CARD
from clear_dist.observe import peaks
from clear_dist.observe.progress import Phases
from clear_dist.options import Refusal
from clear_dist.weights import loading
from clear_dist.weights.clear import load_clear_weights
from clear_dist.weights.loading import load_pipeline
from clear_dist.weights.mapped import load_mapped
from tests import original_layout
from tests.cards.test_damaged_models import TRANSFORMER, split
from tests.ranks import run_ranks
from tests.stand_in import make_stand_in, meta_transformer, write_safetensors
from tests.tiny import make_tiny_flux

CPU = torch.device("cpu")
RANKS = 4
SHARING = 1.1
"""Times one copy of the weights, all ranks together (the goal is 1.2; a rank's own copy of CLEAR's would make 1.22)."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_flux(tmp_path / "tiny")


def load_transformer(folder: Path, dtype: torch.dtype, phases: Phases | None = None) -> FluxTransformer2DModel:
    return load_pipeline(folder, CARD, with_text_encoders=False, dtype=dtype, device=CPU, phases=phases).transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("files", [1, 2])
def test_as_by_diffusers_own_loader(folder: Path, files: int, dtype: torch.dtype) -> None:
    if files == 2:
        split(folder)
    stock = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)
    ours = load_transformer(folder, dtype)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, expected in stock.state_dict().items():
        got = ours.state_dict()[name]
        assert got.dtype == expected.dtype == dtype and torch.equal(got, expected), name
    assert dict(ours.config) | {"_name_or_path": stock.config["_name_or_path"]} == dict(stock.config)
    assert not ours.training


class WithBuffers(nn.Module):
    """A parameter, a buffer that is saved, and one that is computed instead."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 3, device="meta"))
        self.count: torch.Tensor
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.table: torch.Tensor
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_buffers_are_loaded_or_stay_as_computed_and_whole_numbers_are_not_cast(tmp_path: Path) -> None:
    saved = {"weight": torch.randn(2, 3), "count": torch.tensor([1, 2, 3])}
    save_file(saved, tmp_path / "x.safetensors")
    told: list[int] = []
    loaded = WithBuffers()
    load_mapped(loaded, [tmp_path / "x.safetensors"], dtype=torch.float16, device=CPU, advance=told.append)
    assert torch.equal(loaded.weight, saved["weight"].half()) and not loaded.weight.requires_grad
    assert torch.equal(loaded.count, saved["count"])
    assert torch.equal(loaded.table, torch.arange(4.0))
    assert sorted(told) == [24, 24]


def test_rows_of_another_layout_are_views_of_its_file(folder: Path, tmp_path: Path) -> None:
    """All but the layer whose halves are in the other order, which is a copy."""
    expected = load_transformer(folder, torch.float32).state_dict()
    file = tmp_path / "original.safetensors"
    save_file(original_layout.flux(expected), file)
    files = {"transformer": PartFile(file=file)}
    pipe = load_pipeline(folder, CARD, with_text_encoders=False, dtype=torch.float32, device=CPU, files=files)
    got = pipe.transformer.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    storages = {name: tensor.untyped_storage().data_ptr() for name, tensor in got.items()}
    block = [f"single_transformer_blocks.0.{name}.weight" for name in ("attn.to_q", "attn.to_v", "proj_mlp")]
    assert len({storages[name] for name in block}) == 1
    copied = {name for name, tensor in got.items() if tensor.untyped_storage().nbytes() == tensor.nbytes}
    whole = {
        name
        for name in got
        if not any(part in name for part in ("to_q", "to_k", "to_v", "add_q", "add_k", "add_v", "proj_mlp"))
    }
    assert copied == whole


@pytest.mark.parametrize(
    ("part", "tensor", "change", "message"),
    [
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight", None, "clip_l.safetensors lacks .*fc1.weight"),
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight", (7, 16), r"fc1.weight must have the shape .*\[7, 16\]"),
        ("vae", "decoder.mid.block_1.conv1.weight", None, "ae.safetensors must hold what can be loaded as Auto"),
    ],
)  # fmt: skip
def test_a_part_in_a_file_that_lacks_something_is_refused(
    folder: Path, tmp_path: Path, part: str, tensor: str, change: tuple[int, ...] | None, message: str
) -> None:
    pipe = load_pipeline(folder, CARD, with_text_encoders=True, dtype=torch.float32, device=CPU)
    convert, name = {"vae": (original_layout.vae, "ae"), "text_encoder": (original_layout.clip, "clip_l")}[part]
    tensors = convert(getattr(pipe, part).state_dict())
    del tensors[tensor]
    save_file(tensors | ({} if change is None else {tensor: torch.zeros(change)}), tmp_path / f"{name}.safetensors")
    files = {part: PartFile(file=tmp_path / f"{name}.safetensors")}
    with pytest.raises(Refusal, match=message):
        load_pipeline(folder, CARD, with_text_encoders=True, dtype=torch.float32, device=CPU, files=files)


def test_what_is_written_to_a_weight_does_not_reach_the_file(folder: Path) -> None:
    before = (folder / TRANSFORMER).read_bytes()
    transformer = load_transformer(folder, torch.float32)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.zero_()
    assert (folder / TRANSFORMER).read_bytes() == before


def test_parts_are_timed_with_the_bytes_of_their_files(folder: Path) -> None:
    phases = Phases()
    load_transformer(folder, torch.float32, phases)
    assert [part.name for part in phases.parts] == ["transformer", "vae"]
    assert phases.parts[0].nbytes == (folder / TRANSFORMER).stat().st_size
    assert all(part.seconds > 0 for part in phases.parts)


def load_and_measure(group: Group, small: Path, large: Path) -> int:
    """Bytes by which the rank's proportional share of the host's memory grows, all ranks holding the model."""
    load_transformer(small, torch.float32)  # what the libraries take for themselves at first use
    before = peaks.host_memory()
    transformer = load_transformer(large, torch.bfloat16)
    load_clear_weights(transformer, large / "clear_local_8.safetensors")
    for parameter in transformer.parameters():
        parameter.view(-1).view(torch.uint8)[::4096].sum()
    group.barrier()
    after = peaks.host_memory()
    group.barrier()
    assert before is not None and after is not None
    return after - before


@pytest.mark.skipif(peaks.host_memory() is None, reason="the system does not tell proportional set sizes")
def test_ranks_share_one_copy_of_the_weights(folder: Path, tmp_path: Path) -> None:
    large = make_stand_in(tmp_path / "large", shards=2, clear_radius=8)
    files = [*large.glob("transformer/*.safetensors"), large / "clear_local_8.safetensors"]
    weights = sum(file.stat().st_size for file in files)
    together = sum(run_ranks(load_and_measure, RANKS, folder, large))
    assert 0.95 * weights < together <= SHARING * weights


def test_the_stand_in_has_the_names_and_shapes_of_flux_dev(tmp_path: Path) -> None:
    whole = make_stand_in(tmp_path / "whole", double_blocks=19, single_blocks=38, shards=3)  # 24 GB of holes
    transformer = meta_transformer()
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 11_901_408_320
    facts = read_folder(whole, CARDS)  # compares names and shapes
    assert facts.shape is not None and facts.takes_guidance and facts.native_size == 1024
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    assert facts.shape.tensors() == shapes
    index = json.loads((whole / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == shapes.keys()
    assert sum(is_image_side(name) for name in shapes) == 2 * (4 * 19 + 3 * 38)


def test_weights_go_straight_to_a_device_and_are_cast_there(tmp_path: Path) -> None:
    """The meta device stands for a GPU: 24 GB of bfloat16 would be 48 GB of float32, had they to pass through here."""
    whole = make_stand_in(tmp_path / "whole", double_blocks=19, single_blocks=38, shards=3)
    phases, meta = Phases(), torch.device("meta")
    load_transformer(make_tiny_flux(tmp_path / "tiny"), torch.float32)  # what the libraries take at first use
    if not peaks.reset_peak_memory(CPU):
        pytest.skip("the system does not let us reset the high-water mark")
    before = peaks.peak_memory(CPU)
    pipe = load_pipeline(whole, CARD, with_text_encoders=False, dtype=torch.float32, device=meta, phases=phases)
    assert peaks.peak_memory(CPU) - before < 100_000_000
    assert {(tensor.device, tensor.dtype) for tensor in pipe.transformer.state_dict().values()} == {
        (meta, torch.float32)
    }
    assert phases.parts[0].nbytes > 2 * 11_901_408_320


def test_running_out_of_memory_is_not_a_damaged_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "load_mapped", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        load_transformer(folder, torch.float32)


def test_stand_ins_may_hold_numbers(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": (3, 5), "b": (7,)}, torch.bfloat16, sparse=False)
    tensors = load_file(tmp_path / "x.safetensors")
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "a": ((3, 5), torch.bfloat16),
        "b": ((7,), torch.bfloat16),
    }
    assert all(tensor.float().std() > 0.001 for tensor in tensors.values())
