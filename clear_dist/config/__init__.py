"""What a user asks for. A mistake that the request alone shows is a Refusal here, before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path

from clear_dist.config import rules
from clear_dist.config.request import Request
from clear_dist.config.rules import Refusal, Schedule, TextAttention, TextTokens, Window, nearest_word, shortened

__all__ = [
    "CLEAR_REPOSITORY",
    "FLUX_DEV",
    "FLUX_SCHNELL",
    "GenerateConfig",
    "PictureConfig",
    "Refusal",
    "Request",
    "Schedule",
    "TextAttention",
    "TextTokens",
    "UpscaleConfig",
    "Window",
    "nearest_word",
    "shortened",
]

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
FLUX_SCHNELL = "black-forest-labs/FLUX.1-schnell"
CLEAR_REPOSITORY = "Huage001/CLEAR"


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """What all commands that draw take, as given; None: not given, and a default is chosen that fits the model.

    Raises:
        Refusal: a number is out of its range, a word is not one of the choices, or two flags contradict each other.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    model: str = "auto"
    revision: str | None = None
    clear_weights: str = "auto"
    lora: list[str] | None = None
    res: int | None = None
    """Pixels, as all sizes."""
    height: int | None = None
    width: int | None = None
    base_res: int | None = None
    """Side of the square with as many pixels as the first stage."""
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None
    seed: int | None = None
    strength: float | None = None
    """Share of noise at which the upper stages of a cascade begin."""
    upscale_steps: int | None = None
    ntk_factor: float | None = None
    window: str | None = None
    """Radius in tokens, or `full`."""
    text_attention: TextAttention | None = None
    text_tokens: TextTokens = "auto"
    schedule: Schedule = "sync"
    warmup_steps: int | None = None
    attention_backend: str = "auto"
    hoist_modulation: bool = False
    """Keep AdaLN's weights in host memory."""
    compile: bool = False
    float8: bool = False
    keep_text_encoder: bool = False
    int8: bool = False
    shard_weights: bool = False
    """Each rank holds a share of every block."""
    offload: bool = False
    """Keep text encoders and VAE in host memory while they are not in use."""
    dtype: str = "auto"
    device: str = "auto"
    nproc: int | None = None
    output: Path = Path("clear-dist.png")
    save_stages: bool = False
    preview_every: int | None = None
    metadata: bool = True
    latents_out: Path | None = None
    report: Path | None = None
    profile: Path | None = None
    traceback: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            rules.check_encoding(name, value)
            if name in rules.WHOLE_NUMBERS:
                rules.check_whole_number(f"--{rules.flag(name)}", value, *rules.WHOLE_NUMBERS[name])
            elif name in rules.REAL_NUMBERS:
                rules.check_real_number(f"--{rules.flag(name)}", value, *rules.REAL_NUMBERS[name])
            elif name in rules.CHOICES and value is not None:
                rules.check_choice(f"--{rules.flag(name)}", value, rules.CHOICES[name])
        rules.radius(self.window)
        rules.check_text_tokens("--text-tokens", self.text_tokens, self.schedule)
        if self.res is not None and (self.height is not None or self.width is not None):
            given = "--height" if self.height is not None else "--width"
            raise Refusal(f"--res is both height and width, got {given} too; leave one out")
        if self.float8 and self.int8:
            raise Refusal("either --float8 or --int8 can be given, got both; leave one out")

    @property
    def radius(self) -> Window | None:
        """The window as a number of tokens, `full`, or None where none was given."""
        return rules.radius(self.window)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(PictureConfig):
    """One `clear-dist generate`."""

    prompts: Path | None = None
    """A file with one prompt a line."""
    num_images: int = 1
    steps: int | None = None
    cascade: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompts is not None:
            raise Refusal("either a prompt or --prompts can be given, got both; leave one out")


@dataclass(frozen=True, kw_only=True)
class UpscaleConfig(PictureConfig):
    """One `clear-dist upscale`."""

    image: Path
