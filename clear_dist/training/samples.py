"""Samples of a training in shards: latents and embeddings, read as they are needed, in an order of each epoch.

A cache is a folder of safetensors files; sample i has the tensors `i.mean`, `i.std` and `i.0`, `i.1`, ... for the
embeddings. Mean and deviation are the VAE's, as the transformer takes latents.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clear_dist.options import Refusal
from clear_dist.request.distill import require_left
from clear_dist.training.losses import Batch

MEAN, DEVIATION = "mean", "std"


class Samples:
    """Samples of a folder of shards, the last `held_out` of them kept from training."""

    def __init__(self, folder: Path, held_out: int, seed: int) -> None:
        """Raises a Refusal for a shard that is cut off, or where nothing is left to train on."""
        self._seed = seed
        places = [(file, name) for file in sorted(folder.glob("*.safetensors")) for name in _names(file)]
        require_left(held_out, len(places))
        split = len(places) - held_out
        self._places, self._held_out = places[:split], places[split:]
        self._open: dict[Path, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, numbers: Sequence[int], device: torch.device) -> Batch:
        """Samples by their number in the whole training."""
        return self._batch([self._places[self._index(number)] for number in numbers], numbers, device)

    def first(self, count: int, device: torch.device) -> Batch:
        """Some that are kept from training, or else of the others."""
        places = (self._held_out or self._places)[:count]
        return self._batch(places, range(len(places)), device)

    def held_out(self, size: int, device: torch.device) -> list[Batch]:
        places = self._held_out
        parts = [range(first, min(first + size, len(places))) for first in range(0, len(places), size)]
        return [self._batch([places[index] for index in part], list(part), device) for part in parts]

    def _index(self, number: int) -> int:
        epoch, place = divmod(number, len(self))
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders.clear()
            generator = torch.Generator().manual_seed((self._seed << 40) + epoch)
            self._orders[epoch] = torch.randperm(len(self), generator=generator)
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, Tensor]:
        """The current epoch's."""
        return {}

    def _batch(self, places: Sequence[tuple[Path, str]], numbers: Sequence[int], device: torch.device) -> Batch:
        found = [self._sample(file, name) for file, name in places]
        count = len(found[0]) - 2
        return Batch(
            mean=torch.stack([each[MEAN] for each in found]).to(device),
            deviation=torch.stack([each[DEVIATION] for each in found]).to(device),
            embeddings=[_together([each[str(index)] for each in found]).to(device) for index in range(count)],
            numbers=numbers,
        )

    def _sample(self, file: Path, name: str) -> Mapping[str, Tensor]:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        shard = self._open[file]
        keys = [key for key in shard.keys() if key.partition(".")[0] == name]  # noqa: SIM118 (no mapping)
        return {key.partition(".")[2]: shard.get_tensor(key) for key in keys}


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as shard:
            return list(dict.fromkeys(key.partition(".")[0] for key in shard.keys()))  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise Refusal(f"the shard {file} is cut off or damaged ({error}); delete it, and it is made again") from error


def _together(rows: list[Tensor]) -> Tensor:
    """A row for each sample; texts of different lengths are padded."""
    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else pad_sequence(rows, batch_first=True)
