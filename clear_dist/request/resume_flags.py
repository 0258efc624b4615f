"""Flags of drawing on after an interruption."""

from dataclasses import dataclass

from clear_dist.options import Flags, Refusal, flag

CHECKPOINT_EVERY = 5


@dataclass(frozen=True, kw_only=True)
class ResumeFlags(Flags):
    """Raises a Refusal for a flag that has no effect without --resume."""

    resume: bool = flag(
        False, "keep checkpoints beside the output, go on from them, leave out pictures that are there",
        "What is written", names=("--resume/--no-resume",), planned=False,
    )  # fmt: skip
    checkpoint_every: int | None = flag(
        None, f"with --resume: steps from one checkpoint to the next ({CHECKPOINT_EVERY})", "What is written",
        metavar="STEPS", bounds=(1, 1_000), planned=False,
    )  # fmt: skip

    keep_going: bool = flag(
        True, "the first of a list that fails ends the others; else it is told at the end, with exit status 3",
        "What is written", names=(" /--no-keep-going",), planned=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_every is not None and not self.resume:
            raise Refusal(f"--checkpoint-every is for --resume, got {self.checkpoint_every} alone; nearest: --resume")


def check_resume(*, resume: bool, **others: bool) -> None:
    """Raises a Refusal for `others`, flags by their names that were given, which --resume cannot be combined with."""
    given = next((name for name, is_given in others.items() if is_given), None)
    if resume and given is not None:
        raise Refusal(f"--resume cannot be combined with --{given.replace('_', '-')}, got both; leave one out")
