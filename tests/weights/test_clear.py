from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear_dist.weights.clear import load_clear_weights, require_radius
from tests.tiny import make_clear_weights, make_tiny_pipeline


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_clear_weights(make_tiny_pipeline().transformer, tmp_path / "clear_local_4.safetensors")


def test_image_side_of_attention_is_replaced_and_nothing_else(checkpoint: Path) -> None:
    transformer = make_tiny_pipeline().transformer
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    loaded = load_file(checkpoint)
    replaced = load_clear_weights(transformer, checkpoint)
    assert sorted(replaced.tensors) == sorted(loaded) and replaced.pooling is None
    assert replaced.figures == {
        "file": str(checkpoint),
        "radius": 4,
        "down_factor": 1,
        "tensors": len(loaded),
        "layers": 2,
    }
    for name, value in transformer.state_dict().items():
        assert torch.equal(value, loaded.get(name, before[name]))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_what_does_not_fit_is_named(checkpoint: Path, change: str) -> None:
    tensors = load_file(checkpoint)
    name = "transformer_blocks.0.attn.to_k.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        name = "transformer_blocks.0.attn.norm_q.weight"
        tensors[name] = torch.ones(16)
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, checkpoint)
    transformer = make_tiny_pipeline().transformer
    before = {key: value.clone() for key, value in transformer.state_dict().items()}
    with pytest.raises(ValueError, match=name):
        load_clear_weights(transformer, checkpoint)
    assert all(torch.equal(value, before[key]) for key, value in transformer.state_dict().items())


def test_truncated_files_are_refused(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ValueError, match="complete safetensors"):
        load_clear_weights(make_tiny_pipeline().transformer, checkpoint)


def test_the_radius_is_in_the_name() -> None:
    assert require_radius("somewhere/clear_local_16.safetensors") == 16
    with pytest.raises(ValueError, match="pass window="):
        require_radius("my_weights.safetensors")
    assert require_radius("clear_local_8_down_4.safetensors") == 8
