"""A few denoising steps of a transformer on stripes, on tensors without values: memory, messages and operations."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from clear_dist.attention import choose_backend, masked, tiled
from clear_dist.attention.backend import Backend, WindowCall
from clear_dist.attention.flex_mask import TILE_COLUMNS, TILE_ROWS
from clear_dist.comm.pretend import META, Pretended, PretendedShards, Tally
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.family import Family, Inputs
from clear_dist.engine.half_token import may_shift
from clear_dist.engine.pooled_keys import Pooling
from clear_dist.engine.room import SENDING_LAYERS
from clear_dist.engine.settings import Settings
from clear_dist.engine.striped import StripedModel
from clear_dist.engine.text_copies import may_copy
from clear_dist.geometry import reached_tiles
from clear_dist.plan.allocated import ON_THEIR_WAY, Allocated
from clear_dist.plan.built import Built, quantise
from clear_dist.plan.emulated import add_lora, parts_on
from clear_dist.plan.questions import StepQuestion

ON_CPU = {"masked": masked.run_on_cpu, "tiled": tiled.run_on_cpu}
"""What backends do there, while the tensors are on the meta device."""
DENSE = ("masked", "reference")
"""Backends that compute every pair of a query and a key."""
VISITED = "visited"
"""Pairs of a query and a key that windowed attention computes, for each head."""


class Weighed(StripedModel):
    """The engine, which does not ask whether there is room: that is what the plan is for."""

    def require_room(self, size: tuple[int, int], *, batch: int, passes: int, steps: int) -> None:
        pass


class OnGrid:
    """A family whose grid is known, and need not be read from positions, which have no values."""

    def __init__(self, family: Family, size: tuple[int, int]) -> None:
        self._family = family
        self._size = size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def grid_of(self, inputs: Inputs) -> tuple[int, int]:
        return self._size


class InBlocks:
    """What was sent and kept while each block ran; that of blocks which are not here follows from it."""

    def __init__(self, built: Built, tally: Tally, allocated: Allocated) -> None:
        self._built = built
        self._tally = tally
        self._allocated = allocated
        self._before: Counter[str] = Counter()
        self._sent: dict[int, Counter[str]] = {}
        for number, block in enumerate(built.family.blocks):
            block.register_forward_pre_hook(partial(self._begin, number))
            block.register_forward_hook(partial(self._end, number))

    def begin_step(self) -> None:
        """Forget what was sent and computed so far."""
        self._tally.sums.clear()
        self._sent.clear()
        self._allocated.operations.clear()

    def further(self, of_block: "Callable[[int], Counter[str]]") -> "Counter[str]":
        """An amount of the blocks that are not here, from that of each kind's last one here."""
        amounts: Counter[str] = Counter()
        for number, count in self._built.further.items():
            for name, amount in of_block(number).items():
                amounts[name] += count * amount
        return amounts

    def sent(self) -> "Counter[str]":
        """Bytes of the whole model."""
        return self._tally.sums + self.further(lambda number: self._sent.get(number, Counter()))

    def operations(self) -> "Counter[str]":
        """Operations by kind, of the whole model."""
        found = self._allocated.operations
        here: Counter[str] = Counter()
        for (_, kind), amount in found.items():
            here[kind] += amount
        return here + self.further(
            lambda number: Counter({kind: amount for (block, kind), amount in found.items() if block == number})
        )

    def _begin(self, number: int, *_: Any) -> None:
        self._allocated.block, self._before = number, Counter(self._tally.sums)

    def _end(self, number: int, *_: Any) -> None:
        self._allocated.block = None
        sent = self._sent.setdefault(number, Counter())
        for name, amount in self._tally.sums.items():
            sent[name] += amount - self._before[name]


def run_steps(question: StepQuestion, built: Built) -> dict[str, Any]:
    """Bytes by row where a step holds most, bytes sent, and operations, of the whole model; `built` is changed."""
    masked.bias.cache_clear()  # or those of the last question would not be counted
    tiled.window_bias.cache_clear()
    tally, allocated = Tally(), Allocated()
    striped = _on_stripes(question, built, tally, allocated)
    in_blocks = InBlocks(built, tally, allocated)
    with torch.no_grad(), allocated:
        later = _run(question, striped, in_blocks, allocated)
        kept = in_blocks.further(allocated.kept_by) + later
    if question.steps > 1:  # each layer's messages are as large
        sent = question.steps * question.passes * (len(built.family.blocks) + sum(built.further.values()))
        kept[ON_THEIR_WAY] = allocated.at_peak[ON_THEIR_WAY] * (min(SENDING_LAYERS + 1, sent) - 2) // 2
    text, cut = striped.text_plan, striped.running_cut
    return {
        "peak": {row: amount for row, amount in (allocated.at_peak + kept).items() if amount},
        "where": allocated.where,
        "masks": allocated.by_row()["masks"],
        "bytes": dict(in_blocks.sent()),
        "operations": dict(in_blocks.operations()),
        "tokens": text.counts[text.rank] + len(cut.plan.own) * cut.width,
        "channels": built.family.channels,
        "grids": _grids(striped),
        "copies": cut.copies.most,
        "copies_apart": cut.copies.is_apart,
    }


def _on_stripes(question: StepQuestion, built: Built, tally: Tally, allocated: Allocated) -> Weighed:
    group = Pretended.of(question.rank, question.ranks * (2 if question.halves else 1), question.transport)
    options, elsewhere = question.options, set(built.modulation) if question.options.hoist_modulation else set()
    quantise(built, options, group)
    if question.has_lora:
        add_lora(built)
    family: Any = OnGrid(built.family, (question.height, question.width))
    in_shards = options.shard_weights and group.size > 1
    striped = Weighed(
        family,
        SimpleNamespace(timesteps=range(1000)),
        group,
        _settings(question, family, allocated),
        counters=tally,
        stripes=group.split(question.ranks) if question.halves else None,
        shards=(PretendedShards(family.blocks, group, tally, whole=elsewhere),) if in_shards else (),
    )
    striped.parts = parts_on(question.device, allocated, compile=options.compile)
    shifts = question.shifts and may_shift(family, striped.settings)
    block = question.text_block if may_copy(family, striped.settings) else None
    if shifts or block:
        native = question.height * question.width
        striped.extrapolation = Extrapolation(native_tokens=native, shifts=shifts, text_block=block)
        striped.guidance.run_on(group, grids=_grids(striped))
    return striped


def _grids(striped: StripedModel) -> int:
    return 1 if striped.extrapolation is None else striped.extrapolation.grids


def _settings(question: StepQuestion, family: Family, allocated: Allocated) -> Settings:
    factor, layers = question.down_factor, len(family.blocks)
    pooling = Pooling(weights=(torch.empty(factor, factor, device=META),) * layers) if factor > 1 else None

    def choose(**call: Any) -> Backend:
        chosen = choose_backend(
            question.options.attention_backend,
            device=question.device,
            dtype=getattr(torch, question.dtype),
            head_dim=family.head_dim,
            anywhere=True,
            **call,
        )
        run = partial(_attend, chosen, question, allocated)
        return Backend(chosen.name, lambda shape: None, run, extend=chosen.extend)

    plain = replace(question.options, compile=False, warmup_steps=1, schedule="stale" if question.steps > 1 else "sync")
    pooling = pooling if plain.radius is not None else None
    return Settings(options=plain, choose_backend=choose, pooling=pooling, sending_layers=1)


def _attend(backend: Backend, question: StepQuestion, allocated: Allocated, call: WindowCall) -> tuple[Tensor, Tensor]:
    """Run a backend, its operations counted by the pairs that it visits."""
    before = Counter(allocated.operations)
    results = (ON_CPU if question.device == "cpu" else {}).get(backend.name, backend.run)(call)
    allocated.operations.clear()
    allocated.operations.update(before)
    allocated.operations[allocated.block, VISITED] += call.query.shape[0] * visited_pairs(
        backend.name, call, question.height * question.width
    )
    return results


def visited_pairs(backend: str, call: WindowCall, all_tokens: int) -> int:
    """Pairs of query and key that a kernel computes in one head: whole tiles wherever a circle touches one.

    Keys of halos count with those of the queries' own rows, as if circles were whole; tiles beyond the border too.
    """
    rows, columns = call.query.shape[1:3]
    key_rows, text = call.key.shape[1], call.key_text.shape[1]
    if backend in DENSE:
        return rows * columns * (text + key_rows * columns)
    if call.row_offset:
        return 0
    size, tile = TILE_ROWS * TILE_COLUMNS, (TILE_ROWS, TILE_COLUMNS)
    tiles = -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)
    reached = size * sum(map(len, reached_tiles(call.radius, tile, tile, square=call.square).values()))
    return tiles * size * (text + min(reached, all_tokens))


def _run(question: StepQuestion, striped: StripedModel, in_blocks: InBlocks, allocated: Allocated) -> "Counter[str]":
    """Run steps; returns the bytes of buffers that the first one makes at its end, and the others find."""
    family = striped.family
    size, sizes = (question.height, question.width), {"images": question.images, "text_tokens": question.text_tokens}
    inputs = [family.empty_inputs(size, **sizes) for _ in range(question.passes)]
    shape, generation = family.latents(inputs[0]).shape, family.generation(inputs[0])
    inputs = [_of_one_generation(family, each, generation) for each in inputs]
    before = allocated.by_row()["latents"]
    grids, has_two = _grids(striped), question.halves or question.options.cache
    continues = question.options.step_cache[0] == "first-block"  # what two steps on each grid gave
    # The first one on each grid has both passes, and no late halos; of two grids, the last one's here is the larger.
    for _ in range(1 + grids * (1 + continues) if has_two or grids > 1 else min(question.steps, 2)):
        in_blocks.begin_step()
        latents = _new_latents(shape, getattr(torch, question.dtype))
        calls = ({name: latents if x is None else x for name, x in each.items()} for each in inputs)
        outputs = [family.transformer(**call) for call in calls]
        del outputs, latents
    return Counter({"latents": allocated.by_row()["latents"] - before})


def _of_one_generation(family: Family, inputs: Inputs, generation: object) -> Inputs:
    """Inputs of a pass, None in place of the latents, which are new in each step."""
    shared = {id(family.generation(inputs)): generation, id(family.latents(inputs)): None}
    return {name: shared.get(id(x), x) for name, x in inputs.items()}


def _new_latents(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)
