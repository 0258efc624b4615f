"""A transformer on stripes: cut before its forward, joined after it, by hooks that can be taken off again."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import PendingHalos
from clear_dist.comm.weight_shards import ShardedWeights
from clear_dist.engine.agreement import SameCall
from clear_dist.engine.beginning import require_same_generation, steps_of
from clear_dist.engine.cut import Cut, choose_text_plan, cut_image, others_first, stale_bytes
from clear_dist.engine.exchanges import Exchange
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.family import Family, Inputs, Modulation, Removable
from clear_dist.engine.fused import choose_parts
from clear_dist.engine.graphs import Graphs
from clear_dist.engine.guidance import Guidance
from clear_dist.engine.half_token import on_grid
from clear_dist.engine.room import require_room
from clear_dist.engine.settings import Settings
from clear_dist.engine.step_cache import step_cache
from clear_dist.engine.stock import OnStripes, attention_layers, require_not_wrapped
from clear_dist.geometry import plan_text


class StripedModel:
    """A transformer with its family's processors and hooks, and two hooks that cut and join."""

    _cuts: tuple[Cut, ...] = ()  # of even and odd steps, where they differ
    _forward_is_under_way = False
    _most_stale_bytes = 0

    def __init__(
        self,
        family: Family,
        scheduler: Any,
        group: Group,
        settings: Settings,
        *,
        counters: Counters,
        modulation: Modulation | None = None,
        shards: Sequence[ShardedWeights] = (),
        stripes: Group | None = None,
    ) -> None:
        """`counters` are shared with `shards`; `remove` undoes these and `modulation`; `stripes` as in `Guidance`."""
        self.family = family
        self.group, self.scheduler = self._given = group, scheduler
        self.settings = settings
        self.counters = counters
        self.modulation = modulation
        self.shards = shards
        self.extrapolation: Extrapolation | None = None
        self.parts = choose_parts(group.device.type, compile=settings.options.compile)
        self.cut: Cut | None = None
        self.text_plan = plan_text(0, 1, 0)
        """Text tokens of the running forward that are this rank's."""
        self._text_mask: Tensor | None = None
        self._clock = Clock(warmup_steps=settings.warmup_steps)
        self._same_call = SameCall(counters)
        shared: dict[str, Any] = {"clock": self._clock, "counters": counters}
        self.graphs = Graphs(family.transformer, settings, same_call=self._same_call, **shared)
        self.guidance = Guidance(family, group, stripes or group, **shared)
        self.cache = step_cache(family.transformer, settings.options, **shared)
        self._extrapolated = ExitStack()
        transformer = family.transformer
        self._layers = attention_layers(transformer)
        processors = family.processors(self)
        self._stock_processors = {name: self._layers[name].processor for name in processors}
        for name, processor in processors.items():
            self._layers[name].set_processor(processor)
        self._hooks: list[Removable] = [
            *shards,
            *family.hooks(self),
            OnStripes(transformer),
            self.guidance,
            self.graphs,
            self.cache,
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            transformer.register_forward_hook(self._after),
        ]

    def start_text(self, layer: int, *qkv_BLND: Tensor) -> None:
        """Send my share of the text, which follows room for other ranks'; nothing where all have all of it."""
        if self.text_plan.is_shared:
            with labelled(f"layer {layer}"):
                self._same_call.require()
                self._exchange(layer).gather.start(*qkv_BLND)

    def start_halos(
        self, layer: int, key_BLND: Tensor, value_BLND: Tensor, *, alone: bool = False, own_text: bool = False
    ) -> PendingHalos:
        """Send my border rows, as soon as there are keys and values.

        My rows' tokens are the last; text before them is left out. `alone`: no text, no down-sampled keys; `own_text`
        as in `Heads`.
        """
        cut = self.running_cut
        image = slice(-len(cut.plan.own) * cut.width, None)
        rows = [x[:, image].unflatten(1, (-1, cut.width)) for x in (key_BLND, value_BLND)]
        exchange = self._exchange(layer, own_text=own_text)
        with labelled(f"layer {layer}"):
            if not exchange.halos.lags:
                self._same_call.require()
            halos = exchange.halos.start(*rows)
            if exchange.pooled is not None and not alone:
                exchange.pooled.start(layer, *rows)
            return halos

    def attend(
        self,
        layer: int,
        halos: PendingHalos,
        query_BLND: Tensor,
        key_BLND: Tensor,
        value_BLND: Tensor,
        *,
        alone: bool = False,
        own_text: bool = False,
        out_BLND: Tensor | None = None,
    ) -> Tensor:
        """Attention's output of my tokens [B, L, N, D], text first as in all arguments; after this layer's starts.

        `out_BLND`: where to write it.
        """
        cut = self.running_cut
        with labelled(f"layer {layer}"):
            self._same_call.require()
            qkv_BLND = query_BLND, key_BLND, value_BLND
            if alone:
                return cut.joint_attention.alone(halos, qkv_BLND, out_BLND)
            mask_BT = None if own_text else self._text_mask
            return cut.joint_attention(self._exchange(layer, own_text=own_text), halos, qkv_BLND, mask_BT, out_BLND)

    def _exchange(self, layer: int, *, own_text: bool = False) -> Exchange:
        plan = plan_text(0, 1, 0) if own_text else self.text_plan
        return self.running_cut.exchanges.of(self._clock.turn, layer, plan, has_pooled=not own_text)

    @property
    def running_cut(self) -> Cut:
        assert self.cut is not None, "the cut comes before the first layer"
        return self.cut

    @property
    def stale_bytes(self) -> int:
        """Largest number of bytes that the stale schedule has kept from step to step."""
        return max(self._most_stale_bytes, self.cut.exchanges.stale_bytes if self.cut is not None else 0)

    @contextmanager
    def running(
        self,
        *,
        group: Group | None = None,
        scheduler: Any = None,
        extrapolation: Extrapolation | None = None,
        is_guided: bool = True,
        done: int = 0,
    ) -> Iterator[None]:
        """Context in which the model runs on another group, with another scheduler, above its native size.

        The ranks of `group` enter together, with equal arguments; the others don't call the model meanwhile. None: as
        before. The caller closes the group, and gives the scheduler to the pipeline. The rest is as in `Guidance`.
        """
        before = self.group, self.scheduler, self.extrapolation
        try:
            chosen = group or self.group, scheduler or self.scheduler, extrapolation or self.extrapolation
            self._run_on(*chosen, is_guided=is_guided, done=done)
            yield
        finally:
            self._run_on(*before)

    def _run_on(self, group: Group, scheduler: Any, beyond: Extrapolation | None, **how: Any) -> None:
        self.graphs.drop()
        if not self._forward_is_under_way:  # else messages in flight may never arrive
            self.drain()
        self.group, self.scheduler, self.extrapolation = group, scheduler, beyond
        self.guidance.run_on(group, grids=1 if beyond is None else beyond.grids, **how)
        self._clock.forget()
        self._cuts = ()
        if self.modulation is not None:
            self.modulation.forget()
        self._extrapolated.close()
        if beyond is not None and self._hooks:  # none: taken off inside `running`
            self._extrapolated.enter_context(self.family.extrapolated(beyond))

    def remove(self) -> None:
        """Restore processors and take hooks off, unless others have taken their place; ends `running`."""
        self._run_on(*self._given, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name, stock in self._stock_processors.items():
            if getattr(self._layers[name].processor, "striped", None) is self:
                self._layers[name].set_processor(stock)
        if self.modulation is not None:
            self.modulation.undo()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        inputs = self.family.named_inputs(args, kwargs)
        if self._forward_is_under_way:  # the last one was interrupted
            self._clock.forget()
        generation = self.family.generation(inputs)
        self._clock.tick(self.scheduler.timesteps if generation is None else generation, self.family.latents(inputs))
        self._forward_is_under_way = True
        if self._clock.turn == 0:
            self.counters.begin_step()
        else:
            self.counters.resume()
        mine = self.guidance.begin(inputs)
        self._same_call.begin(self.guidance.checked, self._clock, [*chain(*self.family.replicated(inputs))])
        if self._clock.begins:
            self._same_call.require()
            self._begin_generation(inputs, mine)
        self.cut = self._cuts[self._clock.step % 2] if self._cuts else self.cut
        cut, batch, tokens = self.running_cut, len(self.family.latents(mine)), self.family.text_tokens(mine)
        self.guidance.skips = not self.guidance.answers or self.cache.begin(self.guidance.answering, cut, batch)
        if self.guidance.skips:
            self._same_call.require()
            self.graphs.pass_by()
            return args, kwargs
        inputs = on_grid(cut, mine, self._cuts, self.family)
        if cut.stale and not cut.exchanges.fit(batch):
            self.drain()  # guidance has ended (`cfg_truncation`): this step is synchronous
        if cut.stale and not cut.exchanges.has_begun(self._clock.turn):
            self._same_call.require()
            self.require_room(cut.size, batch=batch, passes=1, steps=steps_of(self.scheduler))
        if self.modulation is not None:
            self.modulation.begin(self._clock.turn, self.scheduler, generation=self._clock.begins)
        self.text_plan = choose_text_plan(self.settings.options.text_tokens, tokens, cut)
        self.graphs.text_plan = self.text_plan
        mask_BT = self.family.text_mask(inputs)
        self._text_mask = None if mask_BT is None else others_first(mask_BT, self.text_plan)
        return (), self.family.cut(inputs, cut, self.text_plan)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        joined = self.guidance.end(self.cache.end(output) if self.guidance.answers else None, self.running_cut)
        self.counters.pause()
        self._forward_is_under_way = False
        return joined

    def require_room(self, size: tuple[int, int], *, batch: int, passes: int, steps: int) -> None:
        """All ranks call this before buffers are made; raises Refusal on all where they do not fit on one."""
        if not self._is_stale(steps):
            return
        if not self._forward_is_under_way:  # buffers of the last image make room
            self.drain()
        itemsize, layers = self.family.transformer.dtype.itemsize, passes * len(self._stock_processors)
        token_bytes, stripes = 2 * batch * self.family.channels * itemsize, self.guidance.stripes
        require_room(stale_bytes(size, stripes, self.settings, token_bytes=token_bytes, layers=layers), self.group)

    def _is_stale(self, steps: int) -> bool:
        """Whether a run of `steps` steps has any stale step; a single rank waits for nobody."""
        return self.guidance.stripes.size > 1 and self.settings.options.lags_within(steps)

    def drain(self) -> None:
        """Wait for messages in flight, after a step; all ranks call this. The next step is synchronous."""
        self.graphs.drop()
        if self.cut is not None:
            self._most_stale_bytes = self.stale_bytes
            self.cut.exchanges.drain()

    def _begin_generation(self, given: Inputs, inputs: Inputs) -> None:
        """Check what is given, the settings and the model, and cut anew unless the last cut serves these inputs."""
        alike = {"number of steps": (steps := steps_of(self.scheduler)), "extrapolation": self.extrapolation}
        require_same_generation(self, given, self._stock_processors, alike)
        self.cache.begin_generation(steps)
        size, group = self.family.grid_of(inputs), self.guidance.stripes
        if self.cut is not None and self.cut.group is group:
            self.drain()
        stale, text_tokens = self._is_stale(steps), self.family.text_tokens(inputs)
        wanted = size, self.extrapolation, text_tokens, stale
        how: dict[str, Any] = {"text_tokens": text_tokens, "counters": self.counters}
        image: Any = group, self.extrapolation, self.settings
        if self.cut is None or self.cut.group is not group or self.cut.made_for != wanted:
            self.cut = cut_image(size, *image, clock=self._clock if stale else None, **how)
        shifts = self.extrapolation is not None and self.extrapolation.grids > 1
        self._cuts = (cut_image((size[0] + 1, size[1] + 1), *image, clock=None, **how), self.cut) if shifts else ()
        is_masked = self.family.text_mask(inputs) is not None
        tokens = len(self.family.latents(inputs)) * self.cut.most_tokens(text_tokens)
        self.graphs.begin(self.cut, steps=0 if shifts else steps, tokens=tokens, is_masked=is_masked)


def striped_of(model: Any) -> StripedModel | None:
    """A transformer or ControlNet that `parallelize` put on stripes; shared by pipelines made with `from_pipe`."""
    found = (getattr(layer.processor, "striped", None) for layer in attention_layers(model).values())
    return next((each for each in found if isinstance(each, StripedModel)), None)


def require_striped(pipe: Any) -> StripedModel:
    """`striped_of` its transformer; raises ValueError where there is none, or torch.compile has been put around it."""
    require_not_wrapped(pipe.transformer)
    if (striped := striped_of(pipe.transformer)) is None:
        raise ValueError("the pipeline must be on stripes: call clear_dist.parallelize(pipe) first")
    return striped
