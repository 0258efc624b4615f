"""Feature networks of the wrong kind are refused on one line, and weights that are lacking are never drawn at random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear_dist.evaluate import networks
from clear_dist.evaluate.perceptual import perceptual
from clear_dist.options import Refusal
from tests.evaluate.feature_networks import make_alexnet, make_clip, make_dino


def without_a_weight(folder: Path) -> Path:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["embeddings.cls_token"]
    save_file(weights, file, {"format": "pt"})
    return folder


WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (lambda at: networks.Clip(make_dino(at), "cpu"), "--clip must be a model of the kind clip, got dinov2 in "),
    (lambda at: networks.Dino(make_clip(at), "cpu"), "--dino must be a model of the kind dinov2 .* got clip in "),
    (
        lambda at: networks.Dino(without_a_weight(make_dino(at)), "cpu"),
        "all weights, .* without 1, embeddings.cls_token",
    ),
    (lambda at: networks.Dino(at, "cpu"), "--dino must be a folder in transformers' layout"),
    (lambda at: networks.load_inception(make_alexnet(at / "x"), "cpu"), "--inception must be a TorchScript file"),
    (lambda at: networks.located("--clip", "nothing", is_folder=True), "a folder or a hub id, got nothing"),
    (lambda at: networks.located("--lpips", "owner/name", is_folder=False), "a hub id with a file"),
    (lambda at: networks.located("--lpips", str(at), is_folder=False), "a folder with one of .*, got 0 in"),
]


@pytest.mark.parametrize(("load", "words"), WRONG)
def test_wrong_networks_are_refused(tmp_path: Path, load: Callable[[Path], Any], words: str) -> None:
    with pytest.raises(Refusal, match=words) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"features.1.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(Refusal, match="--lpips must be weights of AlexNet or VGG16"):
        networks.load_perceptual(tmp_path / "x.safetensors", "cpu")


def test_heads_are_torchmetrics_own_where_a_file_has_none() -> None:
    sizes = zip((0, 3, 6, 8, 10), (3, 64, 192, 384, 256), (64, 192, 384, 256, 256), (11, 5, 3, 3, 3), strict=True)
    weights = {}
    for number, inputs, outputs, size in sizes:
        layer = torch.nn.Conv2d(inputs, outputs, size)
        weights |= {f"features.{number}.{name}": x.detach() for name, x in layer.named_parameters()}
    network = perceptual(weights)
    picture, other = torch.rand(2, 1, 3, 64, 64).unbind()
    assert float(network(picture, picture)) == 0 and float(network(picture, other)) > 0
    assert [layer.model[0].weight.min() >= 0 for layer in network.lins] == [True] * 5  # LPIPS' are not negative
    assert [len(each.model[0].weight[0]) for each in network.lins] == [64, 192, 384, 256, 256]
