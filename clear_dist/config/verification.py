"""One `clear-dist verify`, as given."""

from dataclasses import dataclass

from clear_dist.config import rules

STDOUT = "-"


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """None: not given.

    Raises:
        Refusal: a number is out of its range, or a word is not one of the choices.
    """

    device: str = "auto"
    nproc: int | None = None
    json: str | None = None
    """A file, or `-` for stdout."""
    traceback: bool = False

    def __post_init__(self) -> None:
        rules.check_choice("--device", self.device, rules.DEVICES)
        rules.check_whole_number("--nproc", self.nproc, *rules.WHOLE_NUMBERS["nproc"])
        rules.check_encoding("json", self.json)
