"""Bytes that a rank hands over in a step, by the engine's counters, and what they are on the wire."""

from dataclasses import dataclass

from clear_dist.plan.asked import Part, PlanRequest
from clear_dist.plan.engine import Engine
from clear_dist.plan.refined import below, clean_bytes
from clear_dist.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All passes and pictures of a step together, each kind as a run's report counts it."""

    ranks: int
    """Those that a pass is cut over."""
    halos_sent: int
    halos_received: int
    text_gathered: int
    text_reduced: int
    join: int
    pooled_sent: int = 0
    """Down-sampled keys and values."""
    pooled_received: int = 0
    weights_sent: int = 0
    """A rank's share of blocks that are in shards."""
    clean: int = 0
    """A rank's share of the stage below's clean latents that the step goes by."""
    text_apart: bool = False
    """Whether what is reduced of the text goes to ranks that hold the same copies of it, and to no others."""
    halves: int = 1
    """2: as many ranks have the other pass, with whom these join, and share weights."""

    @property
    def everyone(self) -> int:
        return self.halves * self.ranks

    @property
    def in_layers(self) -> float:
        """Each way through a rank's link while layers run; an all-reduce goes round in a ring, an all-to-all once."""
        others = self.ranks - 1
        times = 1 if self.text_apart else others / self.ranks * (1 if self.text_gathered else 2)
        reduced = times * self.text_reduced
        rows = max(self.halos_sent, self.halos_received) + max(self.pooled_sent, self.pooled_received)
        return rows + others * self.text_gathered + reduced

    @property
    def weights(self) -> int:
        """Each way through a rank's link for weights: everyone's share to everyone."""
        return (self.everyone - 1) * self.weights_sent

    @property
    def sent(self) -> int:
        """All that a rank hands over."""
        in_layers = self.halos_sent + self.pooled_sent + self.text_gathered + self.text_reduced
        return in_layers + self.weights_sent + self.join + self.clean

    @property
    def at_the_end(self) -> int:
        """Each way through a rank's link for the join, and clean latents: everyone's stripe to everyone."""
        return (self.everyone - 1) * (self.join + self.clean)


def step_traffic(engine: Engine, asked: PlanRequest, stage: Stage, part: Part) -> Traffic:
    """One rank's; what it receives follows from the rows that it sends, which are as long."""
    step, controlled = engine.step(asked, stage, part), engine.control_step(asked, stage, part)
    sent, net = step.bytes, {} if controlled is None else controlled.bytes
    rows = sum(len(stripe) for stripe in asked.striping(stage).stripes)
    halos, pooled = sent.get("halo_bytes_sent", 0), sent.get("pooled_bytes_sent", 0)
    lower = below(asked, stage)
    others_rows = (rows - part.rows) / max(1, (part.stripes - 1) * part.rows)
    net_halos, weights = net.get("halo_bytes_sent", 0), engine.control_weights(asked)
    return Traffic(
        ranks=part.stripes,
        halves=2 if asked.has_halves(stage) else 1,
        halos_sent=halos + net_halos,
        halos_received=halos * part.received // max(1, part.sent) + round(net_halos * others_rows),
        text_gathered=sent.get("text_bytes_gathered", 0),
        text_reduced=(sent.get("text_bytes_reduced", 0) + net.get("text_bytes_reduced", 0)) * (part.stripes > 1),
        text_apart=step.copies_apart,
        join=sent.get("join_bytes", 0),
        clean=0 if lower is None else clean_bytes(asked, lower, part.ranks),
        pooled_sent=pooled,
        pooled_received=round(pooled * others_rows),
        weights_sent=asked.passes(stage) * engine.weights(asked).sent + (0 if weights is None else weights.sent),
    )
