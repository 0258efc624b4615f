"""Attention that trains: a layer's stock processor, its one `scaled_dot_product_attention` answered by a pattern.

Every family's processors project, norm, rotate and call PyTorch's attention; only that call differs under CLEAR, so
nothing here knows a model. The teacher is the same module with the image side of its attention as it was (`Passes`).

Shapes: B batch, N heads, L tokens, D head dim, T text tokens, H rows and W columns of the image.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tokens of a layer: a raster of `height` x `width`, and all others, which are text."""

    layer: int
    """Number among the layers that see the image, in the order of the model's modules."""
    height: int
    width: int
    text_first: bool
    sees_text: bool = True
    """False where the image is alone (SD3.5-medium's second attention, Z-Image's refiner), padding aside."""

    @property
    def image(self) -> int:
        return self.height * self.width

    def split(self, x_BNLD: Tensor) -> tuple[Tensor, Tensor]:
        """Text [B, N, T, D], and image in raster order [B, N, H W, D]."""
        text = x_BNLD.shape[2] - self.image
        if self.text_first:
            return x_BNLD[:, :, :text], x_BNLD[:, :, text:]
        return x_BNLD[:, :, self.image :], x_BNLD[:, :, : self.image]

    def join(self, text_BNTD: Tensor, image_BNLD: Tensor) -> Tensor:
        parts = (text_BNTD, image_BNLD) if self.text_first else (image_BNLD, text_BNTD)
        return torch.cat(parts, dim=2)


class Pattern(Protocol):
    """Who attends to whom: a row of `training/patterns`."""

    def parameters(self, layout: Layout, heads: int, head_dim: int) -> Mapping[str, Tensor]:
        """Initial values of what a layer learns beside its projections, by name; equal on all ranks."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        """Output [B, N, L, D] for queries, keys and values [B, N, L, D] after norm and rotation, none of it padding."""

    def operations(self, layout: Layout, text: int, heads: int, head_dim: int) -> int:
        """Operations of a layer with `text` tokens of text, counted as in Table 2: 4 channels x pairs seen."""


@dataclass
class Passes:
    """What the teacher's pass leaves for the student's: the outputs of the layers that the loss compares (Eq. 5)."""

    compared: frozenset[int] = frozenset()
    """Numbers of layers."""
    weight: float = 0.0
    """Factor of each layer's mean squared difference in the gradient."""
    teaching: bool = False
    outputs: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Context in which the model is its own teacher: full attention, and the weights that it had."""
        self.teaching = True
        self.outputs.clear()
        self.losses.clear()
        try:
            with torch.no_grad():
                yield
        finally:
            self.teaching = False

    def compare(self, layer: int, out_BNLD: Tensor) -> Tensor:
        """The output, kept or compared with what was; a layer computed again in the backward pass compares it again."""
        if self.teaching and layer in self.compared:
            self.outputs[layer] = out_BNLD
        if self.teaching or layer not in self.outputs:
            return out_BNLD
        difference = out_BNLD.detach().float() - self.outputs[layer].float()
        self.losses[layer] = difference.square().mean()
        return _WithLoss.apply(out_BNLD, difference, 2 * self.weight / difference.numel())


class _WithLoss(torch.autograd.Function):
    """Identity whose gradient is that of a squared difference, too: no layer's loss waits for the others'."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, difference: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(difference.to(output.dtype))
        ctx.factor = factor
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return torch.add(gradients[0], difference, alpha=ctx.factor), None, None


class PatternProcessor(nn.Module):
    """A layer's stock processor, its attention by `pattern`, or full where the teacher passes."""

    def __init__(
        self, attn: Any, pattern: Pattern, layout: Layout, passes: Passes, teacher: Mapping[str, nn.Module]
    ) -> None:
        """`teacher`: the projections as they were, by their names in `attn`."""
        super().__init__()
        self.stock, self.pattern, self.layout, self.passes = attn.processor, pattern, layout, passes
        like = next(attn.parameters())
        for name, value in pattern.parameters(layout, attn.heads, attn.inner_dim // attn.heads).items():
            self.register_parameter(name, nn.Parameter(value.to(like.device, like.dtype)))
        self.names = tuple(teacher)
        self.teacher = nn.ModuleList(teacher.values())
        # What diffusers passes on is what the signature names: it asks the object, while Python calls its class.
        vars(self)["__call__"] = self.stock.__call__

    def forward(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        with self._projections(attn), _Answered(self._attend):
            return self.stock(attn, *args, **kwargs)

    @contextmanager
    def _projections(self, attn: Any) -> Iterator[None]:
        """Context in which the layer has the teacher's projections, where the teacher passes."""
        if not self.passes.teaching:
            yield
            return
        own = [attn.get_submodule(name) for name in self.names]
        try:
            for name, module in zip(self.names, self.teacher, strict=True):
                attn.set_submodule(name, module)
            yield
        finally:
            for name, module in zip(self.names, own, strict=True):
                attn.set_submodule(name, module)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """A picture whose text is padded comes alone and without the padding, whose output is 0."""
        assert not any(options.get(name) for name in ("dropout_p", "is_causal", "scale", "enable_gqa")), options
        if attn_mask is None:
            out = self._pattern(query, key, value)
        else:
            tokens = query.shape[2]
            lengths = attn_mask.expand(len(query), 1, 1, tokens).sum(dim=-1).flatten().tolist()
            each = (
                self._pattern(*(x[index : index + 1, :, :length] for x in (query, key, value)))
                for index, length in enumerate(lengths)
            )
            out = torch.cat([functional.pad(x, (0, 0, 0, tokens - x.shape[2])) for x in each])
        return self.passes.compare(self.layout.layer, out)

    def _pattern(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.passes.teaching:
            return functional.scaled_dot_product_attention(query, key, value)
        return self.pattern(query, key, value, self.layout, dict(self.named_parameters(recurse=False)))


class _Answered(TorchFunctionMode):
    """Context in which a function of ours is PyTorch's attention; the one that a processor is called in."""

    def __init__(self, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            func = self._answer
        return func(*args, **(kwargs or {}))
