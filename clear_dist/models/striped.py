"""A transformer on stripes: cut before its forward, joined after it, by hooks that can be taken off again."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clear_dist.attention import Backend
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.comm.stripe_join import StripeJoin
from clear_dist.comm.text_reduce import TextAttention, TextReduce
from clear_dist.geometry import HaloPlan, Rows, cut_in_stripes, plan_halos
from clear_dist.models.joint_attention import FullJointAttention, JointAttention, WindowJointAttention


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How an image of `height` x `width` tokens is cut; valid for as long as its size is."""

    height: int
    width: int
    stripes: tuple[Rows, ...]
    plan: HaloPlan
    joint_attention: JointAttention
    join: StripeJoin

    @property
    def tokens(self) -> slice:
        """This rank's tokens in raster order."""
        return slice(self.plan.own.start * self.width, self.plan.own.stop * self.width)


class Adaptor(Protocol):
    """What the engine has to know about one model; see `clear_dist.models.flux`."""

    @property
    def transformer(self) -> Any: ...
    @property
    def head_dim(self) -> int: ...
    def processors(self, striped: "StripedModel") -> dict[str, Any]: ...
    def named_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]: ...
    def grid_of(self, inputs: dict[str, Any]) -> tuple[int, int]: ...
    def replicated(self, inputs: dict[str, Any]) -> list[Tensor]: ...
    def cut(self, inputs: dict[str, Any], cut: Cut) -> dict[str, Any]: ...
    def with_sample(self, output: Any, sample: Tensor) -> Any: ...


class StripedModel:
    """Puts an adaptor's processors and the two hooks on a transformer."""

    def __init__(
        self, adaptor: Adaptor, group: Group, *, radius: int | None, text_attention: TextAttention, backend: Backend
    ) -> None:
        self.adaptor = adaptor
        self.group = group
        self.radius = radius
        self.text_attention = text_attention
        self.backend = backend
        self.counters = Counters()
        self.cut: Cut | None = None
        self._generation: object = None
        self._step: object = None
        self._forward_is_under_way = False
        transformer = adaptor.transformer
        self._stock_processors = transformer.attn_processors
        transformer.set_attn_processor(adaptor.processors(self))
        self._hooks = [
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            transformer.register_forward_hook(self._after),
        ]

    @property
    def joint_attention(self) -> JointAttention:
        assert self.cut is not None, "the cut comes before the first layer"
        return self.cut.joint_attention

    def remove(self) -> None:
        """Restores the processors and takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self.adaptor.transformer.set_attn_processor(self._stock_processors)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        inputs = self.adaptor.named_inputs(args, kwargs)
        # A pipeline makes its ids once per generation: another object, another generation (never by length alone).
        if self._generation is not inputs["img_ids"]:
            self._begin_generation(inputs)
        # Both passes of classifier-free guidance are given the same latents: another object, another step.
        if self._step is not inputs["hidden_states"]:
            self._step = inputs["hidden_states"]
            self.counters.begin_step()
        assert self.cut is not None
        self._forward_is_under_way = True
        return (), self.adaptor.cut(inputs, self.cut)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert self.cut is not None
        sample = output[0] if isinstance(output, tuple) else output.sample
        self._forward_is_under_way = False
        return self.adaptor.with_sample(output, self.cut.join.join(sample))

    def _begin_generation(self, inputs: dict[str, Any]) -> None:
        """Checks what a generation brings, and cuts anew where its size has changed."""
        require_own_processors(self.adaptor.transformer, self)
        require_equal_on_all_ranks(self.adaptor.replicated(inputs), self.group, self.counters)
        height, width = self.adaptor.grid_of(inputs)
        # A forward that was broken off has left halos on their way: its buffers must not be used again.
        broken_off, self._forward_is_under_way = self._forward_is_under_way, False
        if self.cut is None or broken_off or (self.cut.height, self.cut.width) != (height, width):
            self.cut = self._cut(height, width)
        self._generation = inputs["img_ids"]

    def _cut(self, height: int, width: int) -> Cut:
        stripes = cut_in_stripes(height, self.group.size)
        plan = plan_halos(stripes, self.group.rank, self.radius)
        halos = HaloExchange(self.group, plan, self.counters)
        return Cut(
            height=height,
            width=width,
            stripes=stripes,
            plan=plan,
            joint_attention=self._joint_attention(plan, height, width, halos),
            join=StripeJoin(self.group, stripes, self.counters),
        )

    def _joint_attention(self, plan: HaloPlan, height: int, width: int, halos: HaloExchange) -> JointAttention:
        if self.radius is None:
            return FullJointAttention(plan=plan, width=width, halos=halos)
        return WindowJointAttention(
            plan=plan,
            grid=Rows(0, height),
            width=width,
            radius=self.radius,
            halos=halos,
            text_reduce=TextReduce(self.group, self.text_attention, self.counters),
            backend=self.backend,
            counts_text_keys=self.text_attention == "average" or self.group.rank == 0,
        )


def require_own_processors(transformer: Any, striped: StripedModel) -> None:
    """Raises ValueError where something has replaced our attention processors since (`load_ip_adapter` does)."""
    for name, processor in transformer.attn_processors.items():
        if getattr(processor, "striped", None) is not striped:
            raise ValueError(
                f"the attention processor of {name} must stay clear_dist's, got {type(processor).__name__}; "
                "IP-Adapters and other processors cannot be combined with parallelize"
            )


def require_equal_on_all_ranks(tensors: list[Tensor], group: Group, counters: Counters) -> None:
    """Compares a checksum of each tensor over ranks.

    Raises:
        ValueError: on all ranks, where one differs: noise drawn without a common generator, mostly.
    """
    sizes = torch.tensor([x.numel() for x in tensors], dtype=torch.float64, device=group.device)
    sums = torch.stack([total for x in tensors for total in (x.double().sum(), x.double().abs().sum())])
    mine = torch.cat([sizes, sums]).nan_to_num()
    extremes = group.all_reduce(torch.cat([mine, -mine]), "max")
    counters.add("other_bytes", extremes.nbytes)
    highest, lowest = extremes.chunk(2)
    if not torch.equal(highest, -lowest):
        raise ValueError(
            "every rank must be given the same noise, prompt and step, but they differ; "
            "pass generator=torch.Generator().manual_seed(n) with the same n on all ranks"
        )
