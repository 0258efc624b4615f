"""Small random networks in the layouts of CLIP, DINOv2, a ViT, Inception and LPIPS' AlexNet."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from tests.tiny import make_clip_tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SEES = {**SMALL, "image_size": 32, "patch_size": 8}
FEATURES = 6
CHANNELS = (4, 6, 8, 5, 3)


def processor_into(folder: Path) -> None:
    sides = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(folder)


def make_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = make_clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**SMALL, "intermediate_size": 37, "vocab_size": len(tokenizer), "max_position_embeddings": 20, **ends}
    config = CLIPConfig(text_config=text, vision_config={**SEES, "intermediate_size": 37}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor_into(folder)
    return folder


def make_dino(folder: Path, kind: str = "dinov2") -> Path:
    torch.manual_seed(1)
    if kind == "dinov2":
        Dinov2Model(Dinov2Config(**SEES)).save_pretrained(folder)
    else:
        ViTModel(ViTConfig(**SEES, intermediate_size=37), add_pooling_layer=False).save_pretrained(folder)
    processor_into(folder)
    return folder


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Conv2d(3, FEATURES, 8, 8)
        self.output = nn.Linear(FEATURES, 12)

    def forward(self, pictures: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = self.seen(pictures.float() / 255).relu().mean(dim=[2, 3])
        if return_features:
            return features
        classes = features @ self.output.weight.T * 9
        return (classes if no_output_bias else classes + self.output.bias).softmax(dim=1)


def make_inception(file: Path) -> Path:
    torch.manual_seed(2)
    torch.jit.script(Inception()).save(str(file))
    return file


def make_alexnet(file: Path) -> Path:
    """LPIPS' heads are in it, too: torchmetrics' own are for the channels of the real one."""
    torch.manual_seed(3)
    sizes = zip((0, 3, 6, 8, 10), (3, *CHANNELS), CHANNELS, (11, 5, 3, 3, 3), strict=False)
    weights = {}
    for number, inputs, outputs, size in sizes:
        layer = nn.Conv2d(inputs, outputs, size)
        weights |= {f"features.{number}.{name}": x.detach() for name, x in layer.named_parameters()}
    weights |= {f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1) for number, width in enumerate(CHANNELS)}
    save_file(weights, file)
    return file


def processor_of(folder: Path) -> AutoImageProcessor:
    return AutoImageProcessor.from_pretrained(folder)
