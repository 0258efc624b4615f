"""AdaLN modulation ahead of time: computed for all steps of a pass at once, its weights kept in host memory.

The layers that make shifts, scales and gates hold 27 % of FLUX.1-dev's weights (6.46 GB in bfloat16) and see nothing
but an embedding of the time, the guidance and the pooled prompt. So each is brought to the device once for all steps,
and a step looks up what its own embedding gives: by the embedding itself, never by the number of the step.

Shapes: S steps, B batch, C channels of the embedding; a layer's output has several times as many.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clear_dist.engine.family import Modulated

LORA = "peft.tuners.lora.layer.Linear"
"""It adds to what the layer below puts out, and changes neither that nor its input."""


class HoistedLinear(nn.Linear):
    """Takes the place of a linear layer, with its parameters under their names, in host memory."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        self.weight, self.bias = stock.weight, stock.bias
        self.answer: Tensor | None = None
        """What the next call puts out, and no later one; None: not known."""

    def forward(self, input: Tensor) -> Tensor:
        answer, self.answer = self.answer, None
        return self.outputs([input])[0] if answer is None else answer

    def outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        """For inputs [B, C] on the device; a product each, because one for all together rounds in another way."""
        parameters = {name: held.to(inputs[0].device, non_blocking=True) for name, held in self.named_parameters()}
        return [functional.linear(x, **parameters) for x in inputs]

    def to_host(self) -> None:
        """To memory that the device reads fast. Nothing happens where the parameters are there already."""
        for held in self.parameters():
            if held.device.type != "cpu":
                host = torch.empty(held.shape, dtype=held.dtype, pin_memory=held.is_cuda)
                held.data = host.copy_(held.data)


@dataclass(frozen=True)
class HoistedPlace:
    """Where a linear layer is: in a norm, or in what adapters have put there around it."""

    name: str
    norm: Any
    stock: nn.Linear
    hoisted: HoistedLinear

    @classmethod
    def of(cls, name: str, norm: Any) -> "HoistedPlace":
        """Nothing is changed yet.

        Raises:
            ValueError: the layer is not `nn.Linear` itself (but a quantised one, mostly), or its weights are not here.
        """
        stock = innermost(norm)
        if type(stock) is not nn.Linear or stock.weight.is_meta:
            got = "weights on no device" if type(stock) is nn.Linear else f"a {type(stock).__name__}"
            raise ValueError(f"hoist_modulation needs plain linear layers with weights, got {got} for {name}.linear")
        return cls(name, norm, stock, HoistedLinear(stock))

    def holds(self, layer: nn.Module) -> bool:
        return innermost(self.norm) is layer

    def put(self, layer: nn.Linear) -> None:
        if hasattr(self.norm.linear, "base_layer"):
            self.norm.linear.base_layer = layer
        else:
            self.norm.linear = layer

    def weights(self, device: torch.device) -> tuple[Any, ...]:
        """What tells whether the weights have changed; LoRA's additions go on as ever, on the device.

        Raises:
            ValueError: something has come that does more than add to the output.
        """
        outer = self.norm.linear
        versions = tuple(None if held.is_inference() else held._version for held in self.hoisted.parameters())
        if outer is self.hoisted:
            return versions
        kind = f"{type(outer).__module__}.{type(outer).__qualname__}"
        variants = kind == LORA and (any(outer.use_dora.values()) or getattr(outer, "lora_variant", None))
        if kind != LORA or variants or not self.holds(self.hoisted):
            got = "a variant of LoRA such as DoRA" if variants else kind
            raise ValueError(f"hoist_modulation takes LoRA and nothing else on {self.name}.linear, got {got}")
        if outer.merged and outer.disable_adapters:  # peft takes them out of the weights in the midst of the forward
            raise ValueError(f"a fused LoRA on {self.name}.linear is disabled; call pipe.unfuse_lora() instead")
        for added in () if outer.merged else (outer.lora_A, outer.lora_B):
            if any(held.device != device for held in added.parameters()):  # peft puts them where the layer's are
                added.to(device)
        return *versions, *outer.merged_adapters


def innermost(norm: Any) -> Any:
    """The linear layer itself, under adapters too."""
    return getattr(norm.linear, "base_layer", norm.linear)


@dataclass(frozen=True)
class Table:
    """What the layers put out in the steps of one pass."""

    embeddings: Tensor
    """[S, B, C]."""
    outputs: list[list[Tensor]]
    """Of each layer, in each step."""
    weights: list[tuple[Any, ...]]
    """Those that it was computed from."""

    def find(self, embedding_BC: Tensor) -> int | None:
        """The step that has this very embedding (this waits for the device: once per forward)."""
        known = self.embeddings
        if (known.shape[1:], known.dtype) != (embedding_BC.shape, embedding_BC.dtype):
            return None
        equal = (known == embedding_BC).flatten(1).all(dim=1).tolist()
        return equal.index(True) if True in equal else None


class HoistedModulation:
    """Puts a model's modulation in host memory, and back again."""

    def __init__(self, model: Modulated) -> None:
        """
        Raises:
            ValueError: a layer is not a plain linear one whose weights are there; nothing has been changed then.
        """
        self._model = model
        self._places = [HoistedPlace.of(name, norm) for name, norm in model.modulated.items()]
        for place in self._places:
            place.put(place.hoisted)
            place.hoisted.to_host()
        self._tables: dict[int, Table] = {}
        self._turn = 0
        self._scheduler: Any = None
        self._hook = model.embedder.register_forward_hook(self._after_embedding)

    @property
    def weights(self) -> set[nn.Parameter]:
        """What is in host memory."""
        return {held for place in self._places for held in place.hoisted.parameters()}

    def begin(self, turn: int, scheduler: Any, *, generation: bool) -> None:
        """A forward begins.

        Args:
            turn: the pass within the step.
            scheduler: whose steps are still to come.
            generation: whether it begins too.
        """
        if generation:
            self.forget()
        self._turn, self._scheduler = turn, scheduler

    def forget(self) -> None:
        """Drop what the last generation used: for FLUX.1 2.1 MB a step, pass and picture."""
        self._tables.clear()

    def undo(self) -> None:
        """The stock layers are back, where the rest of the model is."""
        self._hook.remove()
        self.forget()
        device = next(self._model.embedder.parameters()).device
        for place in self._places:
            if place.holds(place.hoisted):
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
        """For the embedding at hand and, as far as it can be known, for those of the steps to come."""
        # Not by a call, which would come back here.
        embed, at_step = self._model.embedder.forward, self._model.embedder_inputs
        embeddings = [embedding_BC, *(embed(*at_step(inputs, step)) for step in to_come(self._scheduler))]
        seen = [functional.silu(x) for x in embeddings]
        outputs = []
        for place in self._places:
            outputs.append(place.hoisted.outputs(seen))
            place.hoisted.to_host()  # the whole model may have been moved
        return Table(torch.stack(embeddings), outputs, weights)


def to_come(scheduler: Any) -> list[Tensor]:
    """The timesteps after the one at hand; none where no schedule was set.

    If they turn out to be others, a step does not find itself in the table and computes its own: slower, and right.
    """
    if getattr(scheduler, "num_inference_steps", None) is None:
        return []
    index = getattr(scheduler, "step_index", None)  # None on the first step of a run
    at_hand = index if index is not None else getattr(scheduler, "begin_index", None) or 0
    return list(scheduler.timesteps[at_hand + 1 :])
