"""Memory of a rank by phase: weights that it holds all the time, and what the engine says that each phase adds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from clear_dist.plan.asked import Part, PlanRequest
from clear_dist.plan.engine import Engine
from clear_dist.plan.questions import Step
from clear_dist.plan.refined import FLOAT32, below, clean_bytes, held_bytes
from clear_dist.stages import Stage

CONTEXT = 600_000_000
"""Bytes of CUDA, cuBLAS and cuDNN on a GPU: assumed, not measured."""
CHANNELS_OF_NCCL = 400_000_000
"""Bytes of NCCL's groups where there are several ranks: assumed, not measured."""
LIBRARIES, FORKED = 630_000_000, 450_000_000
"""Bytes of Python, torch, diffusers and transformers in a process on a CPU, and in one of several forked ranks, which
touch less of them: measured, benchmarks/memory/plan.py."""
SHARED = 370_000_000
"""Bytes of FORKED that ranks have in common: pages of files, and of the process that they come from."""
PICTURE_CHANNELS = 3
Items = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A phase of a stage, at its highest."""

    name: str
    stage: int
    """Number; -1: before all stages."""
    items: Items
    """Bytes by name: weights first."""
    where: str = ""
    """Function at work when most is alive."""
    as_stored: int = 0
    """Bytes of weights on a CPU that ranks may share: the files' pages, if those have the dtype asked for."""

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    rank: int
    phases: tuple[Phase, ...]

    @property
    def before(self) -> Phase:
        """The largest phase before anything is drawn."""
        return max((phase for phase in self.phases if phase.stage < 0), key=lambda phase: phase.total)

    @property
    def drawing(self) -> Phase:
        """The largest one after that."""
        return max((phase for phase in self.phases if phase.stage >= 0), key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        return self.largest.total

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What each rank of a request takes."""

    asked: PlanRequest
    engine: Engine

    def of_rank(self, rank: int) -> RankMemory:
        """All phases; raises a Refusal where the model cannot be built."""
        stages = range(len(self.asked.stages))
        drawing = (phase for number in stages for phase in self.of_stage(rank, number))
        return RankMemory(rank=rank, phases=(*self.before(rank), *drawing))

    def before(self, rank: int) -> Iterator[Phase]:
        """Rank 0 encodes the prompt; the others have loaded by then, and wait."""
        asked = self.asked
        if rank:
            yield self._phase("wait", -1, self.held(rank))
        else:
            around = self.held(rank) if asked.request.keep_text_encoder else self._surroundings()
            text = {"text encoders": self.text_encoders, "text activations": self._text_activations()}
            yield self._phase("text", -1, {**around, **text})
        weights = self.engine.weights(asked)
        if not asked.in_shards and weights.held < weights.loading:  # a step gathers more than shards take to load
            yield self._phase("load", -1, self._loaded(rank, weights.loading) | self._surroundings())

    def of_stage(self, rank: int, number: int) -> Iterator[Phase]:
        """Phases of one stage; a rank without a part idles."""
        asked, stage = self.asked, self.asked.stages[number]
        held, parts = self.held(rank), asked.parts[number]
        if rank >= len(parts):
            yield self._phase("idle", number, held)
            return
        part, own = parts[rank], self._clean(number, len(parts))
        kept = {**held, **self._drawn_before(rank, number), **self._clean(number, len(parts), with_below=True)}
        if stage.starts_from_picture:
            encoding, masks = self.engine.vae(asked, part, encode=True), self._masks(rank, number - 1)
            yield self._phase("encode", number, {**self._with_vae(kept), **masks, "VAE activations": encoding.peak})
        if asked.reference is not None:
            height, width = asked.reference
            whole = replace(part, ranks=1, rank=0, picture_rows=height, picture_columns=width)
            encoding = self.engine.vae(asked, whole, encode=True)
            yield self._phase("encode", number, {**self._with_vae(kept), "VAE activations": encoding.peak})
        step, masks = self.engine.step(asked, stage, part), self._masks(rank, number)
        controlled, residuals = self.engine.control_step(asked, stage, part), self._residuals(stage, part)
        if controlled is not None:
            rows = {**kept, **self._denoising(stage, controlled), **residuals[1], **masks}
            yield self._phase("denoise", number, rows, controlled.where)
        rows = {**kept, **self._denoising(stage, step), **residuals[0], **masks}
        yield self._phase("denoise", number, rows, step.where)
        held = {**held, **masks}
        joined = 2 * self._latents(stage) + self._latents(stage) // part.ranks  # and buffers of all, and of mine
        drawn, decoding = {"latents": joined}, self.engine.vae(asked, part)
        yield self._phase(
            "decode", number, {**self._with_vae({**kept, **held}), **drawn, "VAE activations": decoding.peak}
        )
        sent = self._pixels(part) // asked.request.images_at_once if part.ranks > 1 else 0
        yield self._phase("save", number, {**held, **own, **drawn, "picture": self._pixels(part) + sent})

    def held(self, rank: int) -> dict[str, int]:
        """What a rank holds while pictures are drawn, whatever their size."""
        lora = {"LoRA": self.asked.lora_numbers * self.asked.itemsize} if self.asked.lora_numbers else {}
        return self._loaded(rank, self.engine.weights(self.asked).held) | lora | self._surroundings()

    @property
    def text_encoders(self) -> int:
        """Bytes; only rank 0 has any."""
        return self.asked.model.text.numbers * self.asked.itemsize

    @property
    def pinned(self) -> int:
        """Bytes of the modulation that all ranks of a machine keep in its host's memory, each its own."""
        return self.asked.request.world_size * self.engine.weights(self.asked).modulation * self.asked.hoists

    def _loaded(self, rank: int, transformer: int) -> dict[str, int]:
        items = {"transformer": transformer}
        if (controlnet := self.engine.control_weights(self.asked)) is not None:
            items["ControlNet"] = controlnet.held
        if not self.asked.offloads:
            items["VAE"] = self.engine.vae(self.asked).weights
            if rank == 0 and self.asked.request.keep_text_encoder:
                items["text encoders"] = self.text_encoders
        return items

    def _surroundings(self) -> dict[str, int]:
        several = self.asked.request.world_size > 1
        if self.asked.on_cuda:
            return {"CUDA": CONTEXT + CHANNELS_OF_NCCL * several}
        return {"libraries": FORKED if self.asked.forked and several else LIBRARIES}

    def _with_vae(self, items: Items) -> Items:
        """A VAE in use is there, offloaded or not."""
        return {**items, "VAE": self.engine.vae(self.asked).weights}

    def _text_activations(self) -> int:
        """The widest encoder's scores or its widest layer, a prompt at a time."""
        text, tokens, size = self.asked.model.text, self.asked.request.max_sequence_length, self.asked.itemsize
        scores = text.heads * tokens**2 * (3 * size + FLOAT32)
        hidden = 3 * tokens * text.hidden * size
        return max(scores, hidden) + 4 * tokens * text.channels * size

    def _phase(self, name: str, stage: int, items: Items, where: str = "") -> Phase:
        as_stored = 0
        if not self.asked.on_cuda and "transformer" in items:
            weights = self.engine.weights(self.asked)
            as_stored = (weights.whole if name == "load" else weights.as_stored) + items["VAE"]
            if (controlnet := self.engine.control_weights(self.asked)) is not None:
                as_stored += controlnet.as_stored
        return Phase(name=name, stage=stage, items=items, where=where, as_stored=as_stored)

    def _denoising(self, stage: Stage, step: Step) -> Items:
        """Rows of the table, and what the pipeline holds besides: other passes' outputs, the start, tables."""
        rows, latents = dict(step.peak), self._latents(stage)
        if self.asked.lags(stage, len(self.asked.striping(stage).stripes)):
            rows["stale halos"] = rows.pop("halos", 0)
        else:
            rows["halos"] = rows.get("halos", 0) + rows.pop("halos on their way", 0)
        start = latents + latents * FLOAT32 // self.asked.itemsize if stage.starts_from_picture else 0
        rows["latents"] = rows.get("latents", 0) + start + self._led(stage) + self._tables(stage)
        return {name: amount for name, amount in rows.items() if amount}

    def _led(self, stage: Stage) -> int:
        """Bytes, float32, of two velocities that go on to the next step, and of the stage below's latents, joined."""
        lower = below(self.asked, stage)
        if lower is None:
            return 0
        ranks = len(self.asked.parts[self.asked.stages.index(stage)])
        joined = clean_bytes(self.asked, lower, 1) + clean_bytes(self.asked, lower, ranks)
        return 2 * clean_bytes(self.asked, stage, 1) + joined

    def _clean(self, number: int, ranks: int, *, with_below: bool = False) -> Items:
        """Clean latents on each rank, of the stage's own steps and of those that they go by."""
        stages = range(max(0, number - with_below), number + 1)
        amount = sum(held_bytes(self.asked, each, ranks) for each in stages)
        return {"clean latents": amount} if amount else {}

    def _residuals(self, stage: Stage, part: Part) -> tuple[Items, Items]:
        """What a ControlNet hands to the transformer's blocks, and at most holds of its own at its end: hidden states,
        outputs, and those scaled."""
        controlled, weights = self.engine.control_step(self.asked, stage, part), self.engine.control_weights(self.asked)
        if controlled is None or weights is None:
            return {}, {}
        tokens = self.asked.request.num_images * part.rows * part.columns
        one = tokens * controlled.channels * self.asked.itemsize
        return {"residuals": weights.blocks * one}, {"residuals": 3 * weights.blocks * one}

    def _masks(self, rank: int, number: int) -> Items:
        """Masks kept after stage `number`; several ranks have up to three in one, which take the places of others."""
        masks = 0
        for earlier in range(max(0, number) if self.asked.on_cuda else 0, number + 1):
            if rank < len(self.asked.parts[earlier]):
                made = self.engine.step(self.asked, self.asked.stages[earlier], self.asked.parts[earlier][rank]).masks
                masks = masks + made if self.asked.ranks == 1 else made or masks
        return {"masks": masks} if masks else {}

    def _tables(self, stage: Stage) -> int:
        """Bytes of hoisted modulation for all steps."""
        steps, images = max(each.sampling.steps for each in self.asked.stages), self.asked.request.images_at_once
        numbers = steps * stage.sampling.passes * images * self.engine.weights(self.asked).modulation_outputs
        return numbers * self.asked.itemsize * self.asked.hoists

    def _latents(self, stage: Stage) -> int:
        """Bytes of all tokens' latents, once."""
        tokens = stage.height * stage.width // self.asked.model.token**2
        return self.asked.request.images_at_once * tokens * self.asked.model.channels * self.asked.itemsize

    def _drawn_before(self, rank: int, number: int) -> Items:
        """The stage before, of which this one starts."""
        if not number or rank >= len(self.asked.parts[number - 1]):
            return {}
        parts = self.asked.parts[number - 1]
        kept = held_bytes(self.asked, number - 1, len(parts))
        return {"stage before": self._pixels(parts[rank]) + self._latents(self.asked.stages[number - 1]) + kept}

    def _pixels(self, part: Part) -> int:
        """Bytes of a stripe's pixels, one for each channel."""
        pixels = part.picture_rows * part.picture_columns * self.asked.model.token**2
        return self.asked.request.images_at_once * PICTURE_CHANNELS * pixels
