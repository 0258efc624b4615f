"""Step caches: forwards that are computed in part, or not at all, as all ranks decide together.

    first-block    The first block always runs. Where its residual has changed little since the last computed step,
                   the other blocks are left out (First Block Cache of ParaAttention and diffusers, with diffusers'
                   measure). What they would add goes on along a straight line through the last two computed steps
                   (cache-dit's DBCache with TaylorSeer, of order 1); after only one, what they added is added again.
    taylor         Each N-th step is computed. Between, the output goes on along such a line (TaylorSeer, arXiv
                   2503.06923, of order 1, the model's output: diffusers' lite mode).

diffusers' own hooks decide in each process from what it holds: ranks would decide apart, and wait for each other. Here
sums over all ranks decide. Each pass of guidance, each size and each number of pictures has a state of its own; a
generation's last steps are always computed.

Shapes: B pictures, R image tokens of this rank, C channels.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.sums import summed
from clear_dist.engine.cut import Cut
from clear_dist.options import Options

LAST = 2
"""Steps at a generation's end that are always computed: they draw what is finest."""
FIRST = 3
"""Steps from which on `taylor` extrapolates, as in diffusers."""


class Line:
    """The straight line through what a pass gave in its last two computed steps: tensors, alone or in a tree."""

    def __init__(self) -> None:
        self._points: deque[tuple[int, Any]] = deque(maxlen=2)

    @property
    def has_slope(self) -> bool:
        return len(self._points) == 2

    def add(self, step: int, values: Any) -> None:
        self._points.append((step, values))

    def at(self, step: int) -> Any:
        """What a later step would give; after only one computed step, what that gave."""
        (step_0, values_0), (step_1, values_1) = self._points[0], self._points[-1]
        if not self.has_slope:
            return values_1
        weight = (step - step_0) / (step_1 - step_0)
        return tree_map(lambda x, y: x.lerp(y, weight), values_0, values_1)  # in float32 within, if x has fewer bits

    def told(self) -> tuple[list[Tensor], list[int]]:
        """Its tensors, a computed step's after the other's, and these steps."""
        return [x for _, values in self._points for x in tree_leaves(values)], [step for step, _ in self._points]

    def take(self, tensors: Sequence[Tensor], steps: Sequence[int], like: Any) -> "Line":
        """Take what another line told, whose values were trees as `like` is; returns itself."""
        leaves, spec = tree_flatten(like)
        for number, step in enumerate(steps):
            self.add(step, tree_unflatten(tensors[number * len(leaves) :][: len(leaves)], spec))
        return self

    @property
    def newest(self) -> Any:
        return self._points[-1][1]


class StepCache:
    """No cache: all is computed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._steps = 0
        self._where: Any = None
        """Which state is the running forward's: pass, size in tokens, pictures."""
        self._held: dict[Any, Any] = {}
        self.skipped: list[int] = []
        """Steps of this generation in which a pass of this rank was left out."""

    def begin_generation(self, steps: int) -> None:
        self.forget()
        self._steps, self.skipped = steps, []

    def begin(self, group: Group, cut: Cut, batch: int) -> bool:
        """Begin a forward that the ranks of `group` answer; whether its output is known without it."""
        self._where = self._clock.turn, cut.size, batch
        if self._is_last:
            self._held.clear()
        return False

    def end(self, output: Any) -> Any:
        """The output of the forward, on this rank's stripe; None where it was left out."""
        return output

    def forget(self) -> None:
        self._held.clear()

    def remove(self) -> None:
        self.forget()

    def collected(self) -> tuple[list[Tensor], dict[str, Any]]:
        """What this rank's steps to come depend on, between two steps: tensors, and the rest in JSON's types."""
        tensors, held = [], []
        for (turn, size, batch), state in self._held.items():
            mine, about = self._told(state)
            tensors += mine
            held.append([turn, size, batch, len(mine), about])
        return tensors, {"skipped": self.skipped, "held": held}

    def put_back(self, tensors: list[Tensor], about: Mapping[str, Any]) -> None:
        """Take what was `collected` on the same rank of as many, after a first step of the same generation."""
        left, held = iter(tensors), {}
        for turn, size, batch, count, told in about["held"]:
            where = turn, tuple(size), batch
            held[where] = self._made(list(islice(left, count)), told, self._held.get(where))
        self._held, self.skipped = held, list(about["skipped"])

    def _told(self, state: Any) -> tuple[list[Tensor], Any]:
        raise NotImplementedError

    def _made(self, tensors: list[Tensor], about: Any, like: Any) -> Any:
        """The inverse of `_told`; `like`: a state of an earlier step, if there is one."""
        raise NotImplementedError

    @property
    def _is_last(self) -> bool:
        return self._clock.step >= self._steps - LAST

    def _note(self) -> None:
        self.skipped += [] if self._clock.step in self.skipped else [self._clock.step]


class Blocks(nn.ModuleList):
    """A transformer's blocks, of which a forward that is left out takes the first one only."""

    def __init__(self, blocks: Any = (), cache: "FirstBlock | None" = None) -> None:
        super().__init__(blocks)
        self._cache = cache

    def __iter__(self) -> Iterator[nn.Module]:
        for block in super().__iter__():
            if self._cache is not None and self._cache.skips_rest:
                return
            yield block


@dataclass(frozen=True)
class Change:
    """What was added to my image tokens, [B, R, C]: by the first block in the last computed step, by all others."""

    first: Tensor
    others: Line


class FirstBlock(StepCache):
    def __init__(self, model: nn.Module, threshold: float, *, clock: Clock, counters: Counters) -> None:
        """Put `Blocks` in the place of the model's lists, and hooks on its first and last block, until `remove`.

        Raises ValueError for a model without blocks under names that diffusers knows.
        """
        super().__init__(clock)
        self._model = model
        self._threshold = threshold
        self._counters = counters
        self._lists = {
            name: blocks
            for name, blocks in model.named_children()
            if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(blocks, nn.ModuleList)
        }
        blocks = [block for each in self._lists.values() for block in each]
        if not blocks:
            raise ValueError(f"cache first-block knows no blocks of {type(model).__name__}; nearest: cache='taylor:3'")
        self.skips_rest = False
        """Whether the running forward leaves out all further blocks."""
        self._begun: tuple[Tensor, Tensor] | None = None
        """The first block's residual, and its output, in a forward that is computed."""
        self._last_BRC: Tensor | None = None
        for name, each in self._lists.items():
            setattr(model, name, Blocks(each, self))
        self._hooks = [
            blocks[0].register_forward_hook(self._after_first, with_kwargs=True),
            blocks[-1].register_forward_hook(self._after_last),
        ]

    def remove(self) -> None:
        super().remove()
        for hook in self._hooks:
            hook.remove()
        for name, each in self._lists.items():
            setattr(self._model, name, each)

    def forget(self) -> None:
        super().forget()
        self.skips_rest, self._begun, self._last_BRC = False, None, None

    def begin(self, group: Group, cut: Cut, batch: int) -> bool:
        self.skips_rest, self._begun, self._last_BRC = False, None, None
        self._group, self._own = group, slice(-len(cut.plan.own) * cut.width, None)
        return super().begin(group, cut, batch)

    def end(self, output: Any) -> Any:
        # A pass that leaves out the last block (`skip_layers`) is computed each time.
        if self._begun is not None and self._last_BRC is not None and not self._is_last:
            first_BRC, after_first_BRC = self._begun
            others = self._held[self._where].others if self._where in self._held else Line()
            others.add(self._clock.step, self._last_BRC - after_first_BRC)
            self._held[self._where] = Change(first_BRC, others)
        self.skips_rest, self._begun, self._last_BRC = False, None, None
        return output

    def _told(self, state: Change) -> tuple[list[Tensor], list[int]]:
        others, steps = state.others.told()
        return [state.first, *others], steps

    def _made(self, tensors: list[Tensor], about: list[int], like: Any) -> Change:
        first, *others = tensors
        return Change(first, Line().take(others, about, first))

    def _after_first(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = named["hidden_states"] if "hidden_states" in named else args[0]
        image_BRC = self._image(output)
        residual_BRC = image_BRC - given[:, self._own]
        held = self._held.get(self._where)
        if held is not None and self._is_near(residual_BRC, held.first):
            # A new tensor's: blocks on stripes never return what they are given.
            image_BRC += held.others.at(self._clock.step)
            self.skips_rest = True
            self._note()
        else:
            self._begun = residual_BRC, image_BRC

    def _after_last(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._last_BRC = self._image(output)

    def _image(self, output: Any) -> Tensor:
        """My image tokens, which are the last in each family: alone, after the text, or in a pair with it."""
        return (output[-1] if isinstance(output, tuple) else output)[:, self._own]

    def _is_near(self, residual_BRC: Tensor, before_BRC: Tensor) -> bool:
        """Whether the mean change over all ranks is less than the threshold, of the mean that was there."""
        precise = torch.promote_types(residual_BRC.dtype, torch.float32)
        sums = [x.abs().sum(dtype=precise) for x in (residual_BRC - before_BRC, before_BRC)]
        change, whole = summed(torch.stack(sums), self._group, self._counters)
        return change < self._threshold * whole  # never with 0 or NaN


class Taylor(StepCache):
    def __init__(self, every: int, *, clock: Clock) -> None:
        """Each `every`-th step is computed."""
        super().__init__(clock)
        self._every = every
        self._is_known = False

    def begin(self, group: Group, cut: Cut, batch: int) -> bool:
        super().begin(group, cut, batch)
        step, line = self._clock.step, self._held.get(self._where)
        is_due = step < FIRST or (step + 1 - FIRST) % self._every == 0
        self._is_known = not is_due and line is not None and line.has_slope
        return self._is_known

    def end(self, output: Any) -> Any:
        if self._is_known:
            self._note()
            return self._held[self._where].at(self._clock.step)
        if not self._is_last:
            self._held.setdefault(self._where, Line()).add(self._clock.step, output)
        return output

    def _told(self, state: Line) -> tuple[list[Tensor], list[int]]:
        return state.told()

    def _made(self, tensors: list[Tensor], about: list[int], like: Line) -> Line:
        return Line().take(tensors, about, like.newest)


def step_cache(model: nn.Module, options: Options, *, clock: Clock, counters: Counters) -> StepCache:
    """The cache that the options ask for; raises ValueError where the model cannot have it."""
    name, number = options.step_cache
    if name == "first-block":
        return FirstBlock(model, number, clock=clock, counters=counters)
    return Taylor(int(number), clock=clock) if name == "taylor" else StepCache(clock)
