"""Guidance ranks: both predictions of classifier-free guidance at once, each by half of the ranks on thicker stripes.

    a batch of two    each half takes half of every even batch; both take an odd one
    two passes        both take all passes of a generation's first step, which tells how many there are (of the first
                      two, where steps take turns on two grids); of two, each takes one from then on

The pipeline calls and is answered as ever. A pass that is the other half's is answered by values to come, and all have
them at the end of the second one: one exchange a step. Without halves nothing is changed.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.rows import StripeJoin
from clear_dist.engine.cut import Cut
from clear_dist.engine.family import Family, Inputs

ENDED = (
    "with guidance ranks all steps of a generation take as many passes as its first, and one has taken a single pass; "
    "nearest: guidance_ranks=1"
)


class Guidance:
    """What a model's halves take of each forward, and their exchange; both are in the same forward at any time."""

    def __init__(self, family: Family, group: Group, stripes: Group, *, clock: Clock, counters: Counters) -> None:
        """Put an attribute `forward` on the model, until `remove`, around one that is there.

        The ranks of `group` draw together, those of `stripes` take each pass; the same group: no halves.
        """
        self._family = family
        self._clock = clock
        self._counters = counters
        self._given = group, stripes
        self.run_on(group)
        model = family.transformer
        self._had = {name: held for name, held in vars(model).items() if name == "forward"}
        self._stock: Callable[..., Any] = model.forward

        @wraps(self._stock)
        def forward(*args: Any, **named: Any) -> Any:
            return None if self.skips else self._stock(*args, **named)

        self._ours = forward
        vars(model).update(forward=forward)

    def run_on(self, group: Group, *, is_guided: bool = True, grids: int = 1, done: int = 0) -> None:
        """Forget a generation, and draw on another group: in halves if it is the first, and guided.

        Steps take turns on so many grids. The first `done` steps have been taken before: of their forwards only those
        are computed that tell what an answer looks like.
        """
        self._group = group
        self.stripes = self._given[1] if is_guided and group is self._given[0] else group
        """Ranks that an image is cut over."""
        self.takes_part = True
        """Whether this rank answers the running forward."""
        self.skips = False
        """Whether the running forward is left out here: it is the other half's, or its output is known."""
        self._is_split = False
        self._passes = 0
        self._grids = grids
        self._done = range(grids, done)
        self._joins: dict[tuple[int, int], tuple[Cut, StripeJoin]] = {}
        """With the other half, by the size of the grid."""
        self._first: Any = None
        """Answer to a step's first pass, until the second one's end."""
        self._mine: Any = None
        """Output of the first pass on my stripe, where it is mine."""
        self._like: dict[tuple[int, int], Any] = {}
        """Answers without values, by the size of the grid."""

    def remove(self) -> None:
        """Take the attribute off, unless another has taken its place."""
        model = self._family.transformer
        if vars(model).get("forward") is self._ours:
            del vars(model)["forward"]
            vars(model).update(self._had)

    @property
    def has_halves(self) -> bool:
        return self.stripes is not self._group

    @property
    def answers(self) -> bool:
        """Whether this rank computes an answer to the running forward, or knows it."""
        return self.takes_part and self._clock.step not in self._done

    @property
    def checked(self) -> Group:
        """Ranks that call the running forward at the same time: a half that takes no part goes ahead."""
        return self.stripes if self._takes_turns and self._clock.turn else self._group

    @property
    def answering(self) -> Group:
        """Ranks that answer the running forward."""
        return self.stripes if self._takes_turns else self._group

    def begin(self, inputs: Inputs) -> Inputs:
        """This rank's part of a forward's inputs; raises ValueError on all ranks where guidance has ended."""
        names = self._family.per_picture
        if names:
            half, rest = divmod(len(self._family.latents(inputs)), 2)
            self._is_split = self.has_halves and not rest
            mine = slice(self._half * half, (self._half + 1) * half)
            return {name: x[mine] if name in names else x for name, x in inputs.items()} if self._is_split else inputs
        if self._clock.step == 0:
            self._first, self._passes = None, self._clock.turn + 1
        self._is_split = self.has_halves and self._clock.step >= self._grids and self._passes == 2
        if self._first is not None and not self._clock.turn:
            raise ValueError(ENDED)
        self.takes_part = not self._is_split or self._clock.turn == self._half
        return inputs

    def end(self, output: Any, cut: Cut) -> Any:
        """The pipeline's answer for all rows and pictures; without values where its step has been taken before."""
        if self._clock.step in self._done:
            return self._without_values(cut)
        if not self._is_split:
            return self._noted(self._family.joined(output, cut), cut)
        if self._takes_turns and not self._clock.turn:
            self._mine, self._first = output, self._without_values(cut)
            return self._first
        mine, self._mine = self._mine if self._takes_turns and not self._half else output, None
        both = self._family.joined(mine, replace(cut, join=self._join_of(cut)))
        return self._second_of(both) if self._takes_turns else self._noted(both, cut)

    def _noted(self, whole: Any, cut: Cut) -> Any:
        self._like[cut.size] = tree_map_only(Tensor, partial(torch.empty_like, device="meta"), whole)
        return whole

    def _without_values(self, cut: Cut) -> Any:
        """An answer in which whoever reads it finds NaN."""
        to_come = partial(torch.full_like, fill_value=torch.nan, device=self._group.device)
        return tree_map_only(Tensor, to_come, self._like[cut.size])

    @property
    def _takes_turns(self) -> bool:
        return self._is_split and not self._family.per_picture

    @property
    def _half(self) -> int:
        """0: the positive prompt's, or the batch's first half; 1: the other."""
        return self._group.rank // self.stripes.size

    def _join_of(self, cut: Cut) -> StripeJoin:
        made_for, join = self._joins.get(cut.size, (None, None))
        if made_for is not cut or join is None:
            join = StripeJoin(self._group, cut.stripes, self._counters)
            self._joins[cut.size] = cut, join
        return join

    def _second_of(self, both: Any) -> Any:
        """The second pass's answer; the first one's is filled in."""
        for answer, found in zip(tree_leaves(self._first), tree_leaves(both), strict=True):
            answer.copy_(found.chunk(2)[0])
        self._first = None
        return tree_map_only(Tensor, lambda found: found.chunk(2)[1].clone(), both)
