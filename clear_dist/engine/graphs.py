"""A transformer's forward captured in a generation's first steps, and replayed in all others by one launch.

    begins          each generation, by rules that are equal on all ranks
    1st forward     as ever: kernels are compiled, NCCL connects
    2nd forward     captured (a few launches of its own bring the inputs), then replayed
    further ones    inputs copied in, replayed, output copied out

Forwards are alike where shapes, shares of the text and all other arguments are: both passes of classifier-free guidance
share a graph. All ranks capture at the same forward, and agree that all have; a replay posts the messages that the
forward would, so that a rank may go on without graphs while others replay.

What a graph reads must stay where it is: inputs are its own, buffers of messages are made in the capture, and weights
are compared before each replay, together with all that Python decides within a forward.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters, labelled
from clear_dist.engine.agreement import SameCall
from clear_dist.engine.cut import Cut
from clear_dist.engine.joint_attention import WindowJointAttention
from clear_dist.engine.settings import Settings
from clear_dist.geometry import TextPlan

DECIDING = ("processor", "forward", "training", "scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
"""Attributes of modules, peft's layers among them, that decide what a forward launches, and with which numbers."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    inputs: list[Tensor]
    replay: Callable[[], None]
    output: Any
    amounts: dict[str, int]
    """Bytes and messages that a replay sends."""


class Graphs:
    """Graphs of one model; without a `capture` it changes nothing."""

    def __init__(
        self, model: nn.Module, settings: Settings, *, clock: Clock, same_call: SameCall, counters: Counters
    ) -> None:
        """Put an attribute `forward` on the model, until `remove`: its own hooks stay around it."""
        self._model = model
        self._capture = settings.capture
        self._options = settings.options
        self._clock = clock
        self._same_call = same_call
        self._counters = counters
        self.text_plan: TextPlan | None = None
        """The running forward's; two of them may have equal shapes on one rank, and not on another."""
        self._made: dict[str, Captured] = {}
        self._seen: set[str] = set()
        self._steps = self._tokens = 0
        """This generation's; no steps: no graphs."""
        self._passes = 0
        self._state: list[Any] | None = None
        self._cut: Cut | None = None
        self._stock: Callable[..., Any] = model.forward
        self._had = {name: held for name, held in vars(model).items() if name == "forward"}

        @wraps(self._stock)
        def forward(*args: Any, **named: Any) -> Any:
            return self._forward(*args, **named)

        self._ours = forward
        if self._capture is not None:
            vars(model).update(forward=forward)

    def begin(self, cut: Cut, *, steps: int, tokens: int, is_masked: bool) -> None:
        """Begin a generation; `tokens`: text and pictures of the largest stripe. All ranks call this alike."""
        self.drop()
        self._cut, self._tokens = cut, tokens
        needs_host = is_masked or cut.group.transport == "host"
        if self._capture is None or needs_host or not self._may_replay(cut, steps):
            return
        self._state = state_of(self._model)
        if not cut.group.agree(self._state is None):
            self._steps = steps

    def drop(self) -> None:
        """Take no part in this generation any more."""
        self._made.clear()
        self._seen.clear()
        self._steps = self._passes = 0
        self._state = self._cut = None

    def remove(self) -> None:
        """Take the attribute off, unless another has taken its place."""
        self.drop()
        if vars(self._model).get("forward") is self._ours:
            del vars(self._model)["forward"]
            vars(self._model).update(self._had)

    def _forward(self, *args: Any, **named: Any) -> Any:
        given = [x for x in tree_leaves((args, named)) if isinstance(x, Tensor)]
        if not self._steps or self._cut is None or any(x.device != self._cut.group.device for x in given):
            return self._stock(*args, **named)
        key = repr((self.text_plan, tree_map(kind_of, (args, named))))
        captured = self._made.get(key)
        if captured is None and self._is_due(key, self._cut):
            self._same_call.require()
            captured = self._record(key, self._cut, args, named)
        if captured is None or state_of(self._model) != self._state:
            return self._stock(*args, **named)
        return self._replayed(captured, self._cut, given)

    def _is_due(self, key: str, cut: Cut) -> bool:
        is_known = key in self._seen
        self._seen.add(key)
        return is_known and self._may_replay(cut, self._steps - self._clock.step)

    def _may_replay(self, cut: Cut, steps: int) -> bool:
        attention = cut.joint_attention
        backend = attention.backend.name if isinstance(attention, WindowJointAttention) else None
        return self._options.may_replay(ranks=cut.group.size, tokens=self._tokens, steps=steps, backend=backend)

    def _record(self, key: str, cut: Cut, args: tuple[Any, ...], named: dict[str, Any]) -> Captured | None:
        """Capture the forward with inputs of its own; None, on all ranks, where one has failed."""
        assert self._capture is not None
        with torch.inference_mode(False):  # or a later forward without it could not write to them
            args, named = tree_map_only(Tensor, torch.clone, (args, named))
        cut.exchanges.drain()
        captured, why = None, "another rank's capture failed"
        try:
            if state_of(self._model) != self._state:
                raise RuntimeError("the model has changed since the generation began")
            with self._counters.apart() as amounts:
                replay, output = self._capture(partial(self._stock, *args, **named))
            inputs = [x for x in tree_leaves((args, named)) if isinstance(x, Tensor)]
            captured = Captured(inputs=inputs, replay=replay, output=output, amounts=amounts)
        except RuntimeError as error:
            why = str(error.__context__ or error).partition("\n")[0]  # to end an invalid capture fails, too
        finally:
            if captured is None:
                cut.exchanges.abandon()
        if cut.group.agree(captured is None):
            warnings.warn(f"CUDA graphs are left out, steps take longer: {why}", stacklevel=2)
            self.drop()
            return None
        assert captured is not None
        self._made[key] = captured
        return captured

    def _replayed(self, captured: Captured, cut: Cut, given: list[Tensor]) -> Any:
        self._same_call.require()
        with labelled("compute: graph, its waits included"):
            for x, new in zip(captured.inputs, given, strict=True):
                x.copy_(new)
            captured.replay()
            output = tree_map_only(Tensor, torch.clone, captured.output)  # the next replay overwrites it
        for name, amount in captured.amounts.items():
            self._counters.add(name, amount)
        self.pass_by()
        return output

    def pass_by(self) -> None:
        """End a pass that is replayed, or other ranks'; what follows the last one, such as the VAE, has the memory."""
        self._passes = max(self._passes, self._clock.turn + 1)
        if self._cut is not None and (self._clock.step, self._clock.turn) == (self._steps - 1, self._passes - 1):
            exchanges = self._cut.exchanges
            self.drop()
            exchanges.drain()


def kind_of(x: Any) -> Any:
    """What must be equal for an argument to be replayed: all but a tensor's values."""
    return (tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else repr(x)


def state_of(model: nn.Module) -> list[Any] | None:
    """What a forward depends on but its inputs, weights by their places; None where others' hooks run inside of it."""
    state: list[Any] = []
    for module in model.modules():
        own = vars(module)
        hooks = module is not model and (own["_forward_hooks"] or own["_forward_pre_hooks"])
        if hooks or "_hf_hook" in own or getattr(own.get("_diffusers_hook"), "hooks", None):
            return None
        state += module, type(module)
        state += (held if held is None else held.data_ptr() for held in own["_parameters"].values())
        state += (held if held is None else held.data_ptr() for held in own["_buffers"].values())
        state += ((name, copied(own[name])) for name in DECIDING if name in own)
    return state


def copied(value: Any) -> Any:
    """A list as it is now, or a dict of scales, without what is left of scaling them to and fro."""
    if isinstance(value, dict):
        return {name: f"{scale:.6g}" if isinstance(scale, float) else scale for name, scale in value.items()}
    return value.copy() if isinstance(value, list) else value
