"""A head start for CLIP, whose pooled output learns the attributes first: else the transformer learns to ignore it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel

from clear_dist.demo import tokenizers
from clear_dist.demo.grammar import CHOICES, parse, random_landscape, training_caption
from clear_dist.demo.training import Figures, learning_rate, set_learning_rate

STEPS, BATCH, PEAK_RATE, SEED = 400, 48, 2e-3, 14


def attribute_labels(captions: list[str]) -> torch.Tensor:
    """int64 [B, 7]: the choice of each attribute that a caption makes, or one past the last where it makes none."""
    rows = []
    for text in captions:
        words = set(parse(text)[0].replace(",", "").split())
        rows.append([next((i for i, w in enumerate(c) if w in words), len(c)) for c in CHOICES.values()])
    return torch.tensor(rows)


@torch.no_grad()
def spread(clip: CLIPTextModel, captions: list[str]) -> torch.Tensor:
    """Let the last norm give `captions` a pooled output of mean 0 and deviation 1 on average; returns the old mean."""
    ids = tokenizers.clip_tokenizer()(captions, padding="max_length", return_tensors="pt").input_ids
    pooled = clip(ids).pooler_output
    mean, scale = pooled.mean(dim=0), 1 / pooled.std(dim=0).mean()
    norm = clip.final_layer_norm
    norm.weight.mul_(scale)
    norm.bias.sub_(mean).mul_(scale)
    return mean


def pretrain_clip(clip: CLIPTextModel, figures: Figures) -> None:
    torch.manual_seed(SEED)
    rng, tokenizer = np.random.default_rng(SEED), tokenizers.clip_tokenizer()
    sizes = [len(choices) + 1 for choices in CHOICES.values()]
    classifier = nn.Linear(clip.config.hidden_size, sum(sizes))
    optimizer = torch.optim.AdamW([*clip.parameters(), *classifier.parameters()], lr=PEAK_RATE, foreach=True)
    for step in range(1, STEPS + 1):
        captions = [training_caption(random_landscape(rng), rng) for _ in range(BATCH)]
        inputs = tokenizer(captions, padding="max_length", max_length=tokenizers.CLIP_LENGTH, return_tensors="pt")
        logits = classifier(clip(inputs.input_ids).pooler_output).split(sizes, dim=1)
        labels = attribute_labels(captions)
        loss = torch.stack([F.cross_entropy(part, labels[:, i]) for i, part in enumerate(logits)]).mean()
        set_learning_rate(optimizer, learning_rate(step / STEPS, PEAK_RATE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            right = torch.stack([part.argmax(dim=1) == labels[:, i] for i, part in enumerate(logits)]).float().mean()
            figures.add(text_step=step, loss=loss.item(), accuracy=right.item())
    spread(clip, captions)
