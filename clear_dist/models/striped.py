"""A transformer on stripes: cut before its forward, joined after it, by hooks that can be taken off again."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from clear_dist.attention import Backend
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.comm.stripe_join import StripeJoin
from clear_dist.comm.text_reduce import TextAttention, TextReduce
from clear_dist.geometry import HaloPlan, Rows, covering_radius, cut_in_stripes, plan_halos
from clear_dist.models.agreement import require_equal_on_all_ranks
from clear_dist.models.joint_attention import FullJointAttention, JointAttention, WindowJointAttention

MOST_SHAPES = 10
"""Two numbers for each input that is compared; models have five at most."""


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
    def replicated(self, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]: ...
    def cut(self, inputs: dict[str, Any], cut: Cut) -> dict[str, Any]: ...
    def with_sample(self, output: Any, sample: Tensor) -> Any: ...


class StripedModel:
    """Puts an adaptor's processors and the two hooks on a transformer."""

    def __init__(
        self,
        adaptor: Adaptor,
        scheduler: Any,
        group: Group,
        *,
        radius: int | None,
        text_attention: TextAttention,
        backend: Backend,
    ) -> None:
        self.adaptor = adaptor
        self.scheduler = scheduler
        self.group = group
        self.radius = radius
        self.text_attention = text_attention
        self.backend = backend
        self.counters = Counters()
        self.cut: Cut | None = None
        self._generation: object = None
        self._step: object = None
        self._passes = 0
        self._forward_is_under_way = False
        transformer = adaptor.transformer
        self._stock_processors = dict(transformer.attn_processors)
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
        """Restores the processors and takes the hooks off, unless others have taken their place."""
        for hook in self._hooks:
            hook.remove()
        if is_striped_by(self.adaptor.transformer, self):
            self.adaptor.transformer.set_attn_processor(dict(self._stock_processors))  # emptied by diffusers

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        inputs = self.adaptor.named_inputs(args, kwargs)
        # A pipeline makes its ids once per generation: another object, another generation (never by length alone).
        # A forward that was broken off has left halos on their way: its buffers must not be used again.
        begins = self._forward_is_under_way or self._generation is not inputs["img_ids"]
        # Both passes of classifier-free guidance are given the same latents: another object, another step.
        self._passes = 1 + (self._passes if self._step is inputs["hidden_states"] else 0)
        if self._passes == 1:
            self.counters.begin_step()
        self._require_same_call(inputs, begins)
        if begins:
            self._begin_generation(inputs)
        self._step = inputs["hidden_states"]
        assert self.cut is not None
        self._forward_is_under_way = True
        return (), self.adaptor.cut(inputs, self.cut)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert self.cut is not None
        sample = output[0] if isinstance(output, tuple) else output.sample
        self._forward_is_under_way = False
        return self.adaptor.with_sample(output, self.cut.join.join(sample))

    def _require_same_call(self, inputs: dict[str, Any], begins: bool) -> None:
        """Raises ValueError on all ranks where they have come to different passes: they would wait for each other."""
        drawn, encoded = self.adaptor.replicated(inputs)
        shapes = [size for x in drawn + encoded for size in (x.ndim, x.numel())]
        padded = (shapes + [0] * MOST_SHAPES)[:MOST_SHAPES]
        if not self.group.equal([int(begins), self._passes, *padded]):
            raise ValueError(
                "every rank must call the pipeline alike, but passes, batch, prompt length or size differ; "
                "give all ranks the same arguments"
            )

    def _begin_generation(self, inputs: dict[str, Any]) -> None:
        """Checks what a generation brings, and cuts anew where its size has changed."""
        require_supported(self.adaptor.transformer, self)
        if inputs["hidden_states"].device != self.group.device:
            raise ValueError(
                f"the latents must be on {self.group.device}, where parallelize found the pipeline, "
                f"got {inputs['hidden_states'].device}; call parallelize after pipe.to(...)"
            )
        drawn, encoded = self.adaptor.replicated(inputs)
        require_equal_on_all_ranks(drawn, encoded, len(self.scheduler.timesteps), self.group)
        height, width = self.adaptor.grid_of(inputs)
        if self.cut is None or self._forward_is_under_way or (self.cut.height, self.cut.width) != (height, width):
            self.cut = self._cut(height, width)
        self._generation = inputs["img_ids"]

    def _cut(self, height: int, width: int) -> Cut:
        stripes = cut_in_stripes(height, self.group.size)
        # A wider circle than the image holds the same keys.
        radius = self.radius and min(self.radius, covering_radius(height, width))
        plan = plan_halos(stripes, self.group.rank, radius)
        halos = HaloExchange(self.group, plan, self.counters)
        return Cut(
            height=height,
            width=width,
            stripes=stripes,
            plan=plan,
            joint_attention=self._joint_attention(plan, radius, height, width, halos),
            join=StripeJoin(self.group, stripes, self.counters),
        )

    def _joint_attention(
        self, plan: HaloPlan, radius: int | None, height: int, width: int, halos: HaloExchange
    ) -> JointAttention:
        if radius is None:
            return FullJointAttention(plan=plan, width=width, halos=halos)
        return WindowJointAttention(
            plan=plan,
            grid=Rows(0, height),
            width=width,
            radius=radius,
            halos=halos,
            text_reduce=TextReduce(self.group, self.text_attention, self.counters),
            backend=self.backend,
            counts_text_keys=self.text_attention == "average" or self.group.rank == 0,
        )


def is_striped_by(transformer: Any, striped: StripedModel) -> bool:
    """Whether all attention processors are those of `striped`."""
    return all(getattr(processor, "striped", None) is striped for processor in transformer.attn_processors.values())


def require_supported(transformer: Any, striped: StripedModel) -> None:
    """Raises ValueError where something has come since that would give wrong pictures, or leave ranks waiting."""
    for name, processor in transformer.attn_processors.items():
        if getattr(processor, "striped", None) is not striped:
            raise ValueError(
                f"the attention processor of {name} must stay clear_dist's, got {type(processor).__name__}; "
                "IP-Adapters and other processors cannot be combined with parallelize"
            )
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "step caches must be off: each rank would decide from its own stripe whether to skip a step; "
            "call pipe.transformer.disable_cache()"
        )
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError("diffusers' own enable_parallelism cannot be combined with parallelize; use one of them")
