"""A transformer on stripes: cut before its forward, joined after it, by hooks that can be taken off again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import PendingHalos
from clear_dist.engine.agreement import SameCall, require_equal_on_all_ranks
from clear_dist.engine.cut import Cut, choose_text_plan, cut_image, plan_image
from clear_dist.engine.exchanges import Exchange
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.family import Adaptor, Removable
from clear_dist.engine.parts import Parts
from clear_dist.engine.room import needed_bytes, require_room
from clear_dist.engine.settings import Settings
from clear_dist.engine.stock import is_striped_by, require_supported
from clear_dist.geometry import plan_pooled, plan_text
from clear_dist.weights.fit import fit, weight_bytes
from clear_dist.weights.hoisted import HoistedModulation


class StripedModel:
    """Puts an adaptor's processors and the two hooks on a transformer."""

    def __init__(self, adaptor: Adaptor, scheduler: Any, group: Group, settings: Settings) -> None:
        self.adaptor = adaptor
        self.scheduler = scheduler
        self.group = group
        self.settings = settings
        self.extrapolation: Extrapolation | None = None
        self.parts = Parts.compiled() if settings.options.compile else Parts()
        """What its blocks compute with between communications."""
        self.counters = Counters()
        self.cut: Cut | None = None
        self.text_plan = plan_text(0, 1, 0)
        """Which text tokens of the forward under way are this rank's."""
        self._clock = Clock(warmup_steps=settings.warmup_steps)
        self._modulation = HoistedModulation(adaptor) if settings.options.hoist_modulation else None
        self._forward_is_under_way = False
        self._same_call = SameCall(self.counters)
        self._most_stale_bytes = 0
        self._given = group, scheduler
        self._extrapolated = ExitStack()
        transformer = adaptor.transformer
        self._elsewhere = self._modulation.weights if self._modulation is not None else set()
        self.shards = fit(adaptor, group, self.counters, settings, elsewhere=self._elsewhere)
        self._stock_processors = dict(transformer.attn_processors)
        transformer.set_attn_processor(adaptor.processors(self))
        self._hooks: list[Removable] = [
            *self.shards,
            *adaptor.striped_blocks(),
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            transformer.register_forward_hook(self._after),
        ]

    def start_text(self, layer: int, *qkv_BLND: Tensor) -> None:
        """Send my share of the text tokens, as soon as they are projected; nothing where all ranks have all.

        Args:
            qkv_BLND: first other ranks' text tokens, which `joint_attention` fills in, then mine.
        """
        if self.text_plan.is_shared:
            with labelled(f"layer {layer}"):
                self._same_call.require()
                self._exchange(layer).gather.start(*qkv_BLND)

    def start_halos(self, layer: int, key_BLND: Tensor, value_BLND: Tensor) -> PendingHalos:
        """Send my border rows, as soon as there are keys and values: the later others need them the better.

        Args:
            layer: its number among the transformer's attention processors.
            key_BLND: whose last tokens are those of my rows, as those of `value_BLND`; text before them is left out.
        """
        cut = self._running_cut
        image = slice(-len(cut.plan.own) * cut.width, None)
        rows = [x[:, image].unflatten(1, (-1, cut.width)) for x in (key_BLND, value_BLND)]
        exchange = self._exchange(layer)
        with labelled(f"layer {layer}"):
            if not exchange.halos.lags:
                self._same_call.require()
            halos = exchange.halos.start(*rows)
            if exchange.pooled is not None:
                exchange.pooled.start(layer, *rows)
            return halos

    def joint_attention(
        self, layer: int, halos: PendingHalos, query_BLND: Tensor, key_BLND: Tensor, value_BLND: Tensor
    ) -> Tensor:
        """Output of my tokens [B, L, N, D], text tokens first as in all arguments; called after `start_text`.

        Args:
            halos: what `start_halos` gave for this layer.
        """
        cut = self._running_cut
        with labelled(f"layer {layer}"):
            self._same_call.require()
            return cut.joint_attention(self._exchange(layer), halos, query_BLND, key_BLND, value_BLND)

    def _exchange(self, layer: int) -> Exchange:
        return self._running_cut.exchanges.of(self._clock.turn, layer, self.text_plan)

    @property
    def _running_cut(self) -> Cut:
        assert self.cut is not None, "the cut comes before the first layer"
        return self.cut

    @property
    def stale_bytes(self) -> int:
        """Of the buffers that the stale schedule keeps from step to step: the most there have been."""
        return max(self._most_stale_bytes, self.cut.exchanges.stale_bytes if self.cut is not None else 0)

    @property
    def weight_bytes(self) -> int:
        """Of the transformer's weights on this rank's device."""
        return weight_bytes(self.adaptor.transformer, but=self._elsewhere)

    @contextmanager
    def running(
        self,
        *,
        group: Group | None = None,
        scheduler: Any | None = None,
        extrapolation: Extrapolation | None = None,
    ) -> Iterator[None]:
        """While inside, the model runs on another group, with another scheduler, above its native size.

        The ranks of `group` enter together, with equal arguments; the others don't call the model meanwhile. What is
        None stays as it is. `cut` goes on telling the last image's stripes afterwards.

        Args:
            group: on the same device; it stays the caller's to close.
            scheduler: what the pipeline steps with meanwhile; giving it to the pipeline is the caller's part.
        """
        before = self.group, self.scheduler, self.extrapolation
        try:
            self._run_on(
                self.group if group is None else group,
                self.scheduler if scheduler is None else scheduler,
                self.extrapolation if extrapolation is None else extrapolation,
            )
            yield
        finally:
            self._run_on(*before)

    def _run_on(self, group: Group, scheduler: Any, extrapolation: Extrapolation | None) -> None:
        if not self._forward_is_under_way:  # else what is on its way may never arrive
            self.drain()
        self.group, self.scheduler, self.extrapolation = group, scheduler, extrapolation
        self._clock.forget()
        if self._modulation is not None:
            self._modulation.forget()
        self._extrapolated.close()
        if extrapolation is not None and self._hooks:  # none: taken off inside `running`
            self._extrapolated.enter_context(self.adaptor.extrapolated(extrapolation))

    def remove(self) -> None:
        """Restores the processors and takes the hooks off, unless others have taken their place; ends `running`."""
        self._run_on(*self._given, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if is_striped_by(self.adaptor.transformer, self):
            self.adaptor.transformer.set_attn_processor(dict(self._stock_processors))  # emptied by diffusers
        if self._modulation is not None:
            self._modulation.undo()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        inputs = self.adaptor.named_inputs(args, kwargs)
        if self._forward_is_under_way:  # the last one was broken off
            self._clock.forget()
        self._clock.tick(inputs["img_ids"], inputs["hidden_states"])
        self._forward_is_under_way = True
        if self._clock.turn == 0:
            self.counters.begin_step()
        else:
            self.counters.resume()
        drawn, encoded = self.adaptor.replicated(inputs)
        self._same_call.begin(self.group, self._clock, drawn + encoded)
        if self._clock.begins:
            self._same_call.require()
            self._begin_generation(inputs)
        assert self.cut is not None
        if self.cut.stale and not self.cut.exchanges.has_begun(self._clock.turn):
            self._same_call.require()
            size, batch = (self.cut.height, self.cut.width), len(inputs["hidden_states"])
            self.require_room(size, batch=batch, passes=1, steps=self._steps)
        if self._modulation is not None:
            self._modulation.begin(self._clock.turn, self.scheduler, generation=self._clock.begins)
        self.text_plan = choose_text_plan(self.settings.options.text_tokens, self.adaptor.text_tokens(inputs), self.cut)
        return (), self.adaptor.cut(inputs, self.cut, self.text_plan)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert self.cut is not None
        sample = output[0] if isinstance(output, tuple) else output.sample
        whole = self.cut.join.join(sample)
        self._end_forward()
        return self.adaptor.with_sample(output, whole)

    def _end_forward(self) -> None:
        self.counters.pause()
        self._forward_is_under_way = False

    def require_room(self, size: tuple[int, int], *, batch: int, passes: int, steps: int) -> None:
        """All ranks call this before buffers are made for an image of `size` tokens.

        Raises:
            Refusal: on all ranks, where the stale schedule's do not fit in what memory is free on any.
        """
        if not self._is_stale(steps):
            return
        if not self._forward_is_under_way:  # what the last image has kept makes room
            self.drain()
        transformer = self.adaptor.transformer
        pooling = self.settings.pooling
        stripes, plan = plan_image(size, self.group, self.settings.options.radius, self.settings.unit)
        row_bytes = 2 * batch * size[1] * self.adaptor.channels * transformer.dtype.itemsize
        layers = passes * len(transformer.attn_processors)
        needed = needed_bytes(plan, row_bytes=row_bytes, layers=layers)
        if pooling is not None:
            pooled = plan_pooled(stripes, self.group.rank, pooling.factor)
            needed += needed_bytes(pooled, row_bytes=row_bytes // pooling.factor, layers=layers)
        require_room(needed, self.group)

    def _is_stale(self, steps: int) -> bool:
        """Whether anything lags in a generation of so many steps. One rank waits for nobody."""
        return self.settings.options.schedule == "stale" and self.group.size > 1 and self._clock.lags_within(steps)

    @property
    def _steps(self) -> int:
        """Of the generation that begins; image-to-image leaves the first ones out."""
        return len(self.scheduler.timesteps) - (getattr(self.scheduler, "begin_index", None) or 0)

    def drain(self) -> None:
        """Waits for what is on its way; all ranks call this, after a step. What follows it is in sync."""
        if self.cut is not None:
            self._most_stale_bytes = self.stale_bytes
            self.cut.exchanges.drain()

    def _begin_generation(self, inputs: dict[str, Any]) -> None:
        """Checks what a generation brings, and cuts anew where the last cut is not for it."""
        require_supported(self.adaptor.transformer, self)
        if inputs["hidden_states"].device != self.group.device:
            raise ValueError(
                f"the latents must be on {self.group.device}, where parallelize found the pipeline, "
                f"got {inputs['hidden_states'].device}; call parallelize after pipe.to(...)"
            )
        drawn, encoded = self.adaptor.replicated(inputs)
        settings = {"number of steps": self._steps, "extrapolation": self.extrapolation}
        require_equal_on_all_ranks(drawn, encoded, settings, self.group)
        size = self.adaptor.grid_of(inputs)
        if self.cut is not None and self.cut.group is self.group:
            self.drain()
        stale = self._is_stale(self._steps)
        text_tokens = self.adaptor.text_tokens(inputs)
        image = size, self.group, self.extrapolation
        if self.cut is None or not self.cut.serves(*image, text_tokens=text_tokens, stale=stale):
            self.cut = cut_image(
                *image,
                self.settings,
                text_tokens=text_tokens,
                clock=self._clock if stale else None,
                counters=self.counters,
            )


def striped_of(pipe: Any) -> StripedModel | None:
    """What `parallelize` put on the pipeline's transformer; shared by pipelines made with `from_pipe`."""
    processor = next(iter(pipe.transformer.attn_processors.values()))
    return getattr(processor, "striped", None)


def require_striped(pipe: Any) -> StripedModel:
    """As `striped_of`; raises ValueError where there is none."""
    striped = striped_of(pipe)
    if striped is None:
        raise ValueError("the pipeline must be on stripes: call clear_dist.parallelize(pipe) first")
    return striped
