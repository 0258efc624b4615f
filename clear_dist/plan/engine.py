"""The engine as a plan asks it: a process that runs it without values (measure.py), and its answers."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clear_dist.launch.ranks import QUIET
from clear_dist.options import Options, Refusal
from clear_dist.plan.asked import Part, PlanRequest
from clear_dist.plan.questions import (
    ANSWERS,
    Question,
    Step,
    StepQuestion,
    VaePass,
    VaeQuestion,
    Weights,
    WeightsQuestion,
    as_json,
)
from clear_dist.stages import Stage

PACKAGES = Path(__file__).parents[2]
PROGRAM = """
import gc, sys
gc.disable()  # imports leave little garbage, and to look for it takes a fifth of their time
sys.modules |= {"transformers": None, "peft": None}  # no use here, and a third of the time to import diffusers
from clear_dist.launch.ranks import die_with
die_with(int(sys.argv[1]))
from clear_dist.plan.measure import main
gc.enable()
main()
"""
OF_WEIGHTS = ("int8", "float8", "shard_weights")
"""Options that weights depend on."""


def started() -> "subprocess.Popen[str]":
    paths = (str(PACKAGES), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )


@dataclass(frozen=True)
class Engine:
    """A process that imports the engine from now on, until `stop`; what was asked once is remembered.

    All questions raise a Refusal where the model cannot be built, RuntimeError where the process has ended.
    """

    process: "subprocess.Popen[str]" = field(default_factory=started)
    answers: dict[str, Any] = field(default_factory=dict)

    def weights(self, asked: PlanRequest) -> Weights:
        chosen = {name: getattr(asked.request, name) for name in OF_WEIGHTS}
        options = Options(**chosen, hoist_modulation=asked.keeps_modulation_apart)
        ranks = asked.ranks if asked.in_shards else 1
        return self.ask(WeightsQuestion(module=asked.model.transformer, ranks=ranks, options=options, **asked.kind))

    def step(self, asked: PlanRequest, stage: Stage, part: Part) -> Step:
        """Asked once for all ranks whose parts in the transformer, of which `part` is one, are alike."""
        return self.ask(self._question(asked, stage, part))

    def _question(self, asked: PlanRequest, stage: Stage, part: Part) -> StepQuestion:
        parts, request = asked.parts[asked.stages.index(stage)], asked.request
        calls = 2 if asked.has_halves(stage) else 1
        batches = (calls, 1) if asked.model.guides_in_one_pass else (1, calls)
        hoist = asked.keeps_modulation_apart and request.shard_weights  # else it moves weights alone
        return StepQuestion(
            module=asked.model.transformer,
            ranks=part.stripes,
            options=replace(asked.options, schedule="sync", warmup_steps=None, hoist_modulation=hoist),
            transport=asked.transport,
            height=stage.height // asked.model.token,
            width=stage.width // asked.model.token,
            rank=next(other.rank for other in parts if other.shape == part.shape) % part.stripes,
            images=batches[0] * asked.images(stage),
            text_tokens=asked.text_tokens,
            passes=batches[1] * asked.passes(stage),
            shifts=asked.shifts(stage),
            text_block=asked.text_block(stage),
            halves=asked.has_halves(stage),
            steps=stage.sampling.steps if asked.lags(stage, part.stripes) else 1,
            down_factor=request.down_factor,
            has_lora=asked.lora_numbers > 0 and len(stage.resting) < len(request.loras),
            **asked.kind,
        )

    def control_weights(self, asked: PlanRequest) -> Weights | None:
        """The ControlNet's; None: there is none."""
        chosen = {name: getattr(asked.request, name) for name in OF_WEIGHTS}
        options = Options(**chosen, hoist_modulation=asked.keeps_modulation_apart)
        if asked.model.controlnet is None:
            return None
        ranks = asked.ranks if asked.in_shards else 1
        return self.ask(WeightsQuestion(module=asked.model.controlnet, ranks=ranks, options=options, **asked.kind))

    def control_step(self, asked: PlanRequest, stage: Stage, part: Part) -> Step | None:
        """The ControlNet's forward in a step, one for all passes; None: there is none."""
        control, module = asked.request.control, asked.model.controlnet
        if control is None or module is None:
            return None
        text_attention = "exact" if control.window == "full" else asked.options.text_attention
        own: dict[str, Any] = {"window": control.window, "text_attention": text_attention, "text_tokens": "replicated"}
        question = replace(
            self._question(asked, stage, part),
            module=module,
            options=replace(asked.options, schedule="sync", warmup_steps=None, hoist_modulation=False, **own),
            images=asked.request.images_at_once,
            passes=1,
            steps=1,
            shifts=False,
            text_block=None,
            down_factor=1,
            has_lora=False,
        )
        return self.ask(question)

    def vae(self, asked: PlanRequest, part: Part | None = None, *, encode: bool = False) -> VaePass:
        """A pass over a part's stripe; no part: weights alone."""
        question = VaeQuestion(module=asked.model.vae, ranks=1, **asked.kind)
        if part is not None:
            question = replace(
                question,
                encode=encode,
                rows=asked.model.packing * part.picture_rows,
                columns=asked.model.packing * part.picture_columns,
                ranks=part.ranks,
                images=asked.request.images_at_once,
            )
        return self.ask(question)

    def ask(self, question: Question) -> Any:
        line = json.dumps(as_json(question))
        if line not in self.answers:
            self.answers[line] = self._asked(line)
        found = self.answers[line]
        if "error" in found:
            raise Refusal(found["error"])
        return ANSWERS[type(question)](**found["answer"])

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _asked(self, line: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and tells why on stderr
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        lines = self.process.communicate()[1].strip().splitlines() or ["it ended without a word"]
        raise RuntimeError(f"the engine cannot tell what it takes: {lines[-1]}")
