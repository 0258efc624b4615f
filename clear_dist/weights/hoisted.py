"""AdaLN modulation ahead of time: computed for all steps of a pass at once, its weights kept in host memory.

These layers hold 27 % of a model of 12 billion parameters (6.46 GB in bfloat16) and see only an embedding of time,
guidance and pooled prompt. Each comes to the device once for all steps; a step looks up the outputs for its embedding,
never for its number.

Shapes: S steps, B batch, C channels of the embedding; a layer's output has several times as many.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clear_dist.engine.family import Modulated

LORA = "peft.tuners.lora.layer.Linear"
"""Adds to the output of the layer below, and changes nothing else."""


class HoistedLinear(nn.Linear):
    """Stand-in of a linear layer, whose parameters keep their names, in host memory."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        self.weight, self.bias = stock.weight, stock.bias
        self.answer: Tensor | None = None
        """Output of the next call only; None: unknown."""

    def forward(self, input: Tensor) -> Tensor:
        answer, self.answer = self.answer, None
        return self.outputs([input])[0] if answer is None else answer

    def outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        """Outputs for inputs [B, C] on the device, one product each: a single one would round differently."""
        parameters = {name: held.to(inputs[0].device, non_blocking=True) for name, held in self.named_parameters()}
        return [functional.linear(x, **parameters) for x in inputs]

    def to_host(self, *, pinned: bool) -> None:
        for held in self.parameters():
            if held.device.type != "cpu" or held.is_pinned() < pinned:
                host = torch.empty(held.shape, dtype=held.dtype, pin_memory=pinned)
                held.data = host.copy_(held.data)


@dataclass(frozen=True)
class HoistedPlace:
    name: str
    norm: Any
    stock: nn.Linear
    hoisted: HoistedLinear

    @classmethod
    def of(cls, name: str, norm: Any) -> "HoistedPlace":
        """Raises ValueError where the layer is not `nn.Linear` itself (mostly a quantised one), or has no weights."""
        stock = innermost(norm)
        if type(stock) is not nn.Linear or stock.weight.is_meta:
            got = "weights on no device" if type(stock) is nn.Linear else f"a {type(stock).__name__}"
            raise ValueError(f"hoist_modulation needs plain linear layers with weights, got {got} for {name}.linear")
        return cls(name, norm, stock, HoistedLinear(stock))

    def put(self, layer: nn.Linear) -> None:
        if hasattr(self.norm.linear, "base_layer"):
            self.norm.linear.base_layer = layer
        else:
            self.norm.linear = layer

    def weights(self, device: torch.device) -> tuple[Any, ...]:
        """Versions of the weights; raises ValueError where an adapter does more than add to the output."""
        outer = self.norm.linear
        versions = tuple(None if held.is_inference() else held._version for held in self.hoisted.parameters())
        if outer is self.hoisted:
            return versions
        kind = f"{type(outer).__module__}.{type(outer).__qualname__}"
        variants = kind == LORA and (any(outer.use_dora.values()) or getattr(outer, "lora_variant", None))
        if kind != LORA or variants or innermost(self.norm) is not self.hoisted:
            got = "a variant of LoRA such as DoRA" if variants else kind
            raise ValueError(f"hoist_modulation takes LoRA and nothing else on {self.name}.linear, got {got}")
        if outer.merged and outer.disable_adapters:  # peft unmerges them within the forward
            raise ValueError(f"a fused LoRA on {self.name}.linear is disabled; call pipe.unfuse_lora() instead")
        for added in () if outer.merged else (outer.lora_A, outer.lora_B):
            if any(held.device != device for held in added.parameters()):  # peft puts them on the layer's device
                added.to(device)
        return *versions, *outer.merged_adapters


def innermost(norm: Any) -> Any:
    return getattr(norm.linear, "base_layer", norm.linear)


@dataclass(frozen=True)
class Table:
    """Outputs per layer and step for embeddings [S, B, C]; `weights`: versions of those behind them, per layer."""

    embeddings: Tensor
    outputs: list[list[Tensor]]
    weights: list[tuple[Any, ...]]

    def find(self, embedding_BC: Tensor) -> int | None:
        """The step that has this very embedding (waits for the device, once per forward)."""
        known = self.embeddings
        if (known.shape[1:], known.dtype) != (embedding_BC.shape, embedding_BC.dtype):
            return None
        equal = (known == embedding_BC).flatten(1).all(dim=1).tolist()
        return equal.index(True) if True in equal else None


class HoistedModulation:
    """A model's modulation in host memory, until `undo`."""

    def __init__(self, model: Modulated, device: torch.device) -> None:
        """`device` computes. Raises ValueError, before any change, where a layer is not plain, or none is worth it."""
        if not model.modulated:
            raise ValueError("hoist_modulation must be False for a model whose modulation is small; nearest: False")
        self._model = model
        self._is_pinned = device.type == "cuda"
        self._places = [HoistedPlace.of(name, norm) for name, norm in model.modulated.items()]
        for place in self._places:
            place.put(place.hoisted)
            place.hoisted.to_host(pinned=self._is_pinned)
        self._tables: dict[int, Table] = {}
        self._turn = 0
        self._scheduler: Any = None
        self._hook = model.embedder.register_forward_hook(self._after_embedding)

    @property
    def weights(self) -> set[nn.Parameter]:
        return {held for place in self._places for held in place.hoisted.parameters()}

    def begin(self, turn: int, scheduler: Any, *, generation: bool) -> None:
        """Start a forward, pass `turn` of its step; steps to come are the scheduler's."""
        if generation:
            self.forget()
        self._turn, self._scheduler = turn, scheduler

    def forget(self) -> None:
        """Drop the last generation's tables: for 12 billion parameters 2.1 MB per step, pass and picture."""
        self._tables.clear()

    def undo(self) -> None:
        """Put the stock layers back, on the device of the rest of the model."""
        self._hook.remove()
        self.forget()
        device = next(self._model.embedder.parameters()).device
        for place in self._places:
            if innermost(place.norm) is place.hoisted:
                place.stock.weight, place.stock.bias = place.hoisted.weight, place.hoisted.bias
                place.put(place.stock)
                place.norm.linear.to(device)  # with what adapters have added
        self._places = []

    def _after_embedding(self, embedder: nn.Module, inputs: tuple[Tensor, ...], embedding_BC: Tensor) -> None:
        weights = [place.weights(embedding_BC.device) for place in self._places]
        table = self._tables.get(self._turn)
        step: int | None = 0
        if table is None or table.weights != weights:
            table = self._tables[self._turn] = self._computed(inputs, embedding_BC, weights)
        else:
            step = table.find(embedding_BC)
        for place, outputs in zip(self._places, table.outputs, strict=True):
            place.hoisted.answer = None if step is None else outputs[step]

    @torch.no_grad()
    def _computed(self, inputs: tuple[Tensor, ...], embedding_BC: Tensor, weights: list[tuple[Any, ...]]) -> Table:
        # Without a call, whose hook would come back here.
        embed, at_step = self._model.embedder.forward, self._model.embedder_inputs
        embeddings = [embedding_BC, *(embed(*at_step(inputs, step)) for step in to_come(self._scheduler))]
        seen = [functional.silu(x) for x in embeddings]
        outputs = []
        for place in self._places:
            outputs.append(place.hoisted.outputs(seen))
            place.hoisted.to_host(pinned=self._is_pinned)  # the whole model may have been moved
        return Table(torch.stack(embeddings), outputs, weights)


def to_come(scheduler: Any) -> list[Tensor]:
    """Timesteps after the current one; where they turn out wrong, steps compute their own: slower, and right."""
    if getattr(scheduler, "num_inference_steps", None) is None:
        return []
    index = getattr(scheduler, "step_index", None)  # None on the first step of a run
    at_hand = index if index is not None else getattr(scheduler, "begin_index", None) or 0
    return list(scheduler.timesteps[at_hand + 1 :])
