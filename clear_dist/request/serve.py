"""Flags of `clear-dist serve`, and the request that its model is loaded for."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from clear_dist.options import Flags, Refusal, flag
from clear_dist.request.flags import GenerateFlags, PictureFlags, UpscaleFlags
from clear_dist.request.model_flags import ModelFlags, RunFlags

SERVER, LIMITS = "The server", "What a client may ask for"
SERVE_PANELS = (SERVER, LIMITS)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEY_VARIABLE = "CLEAR_DIST_API_KEY"


@dataclass(frozen=True, kw_only=True)
class LimitFlags(Flags):
    max_side: int = flag(4_096, "most pixels along a side (4096)", LIMITS, bounds=(16, 32_768))
    max_steps: int = flag(100, "most denoising steps (100)", LIMITS, bounds=(1, 1_000))
    max_images: int = flag(10, "most pictures of a request (10)", LIMITS, bounds=(1, 10))
    max_loras: int = flag(4, "most LoRA of a request (4)", LIMITS, bounds=(0, 8))
    max_prompt: int = flag(4_000, "most characters of a prompt (4000)", LIMITS, bounds=(1, 32_000))
    max_body: int = flag(50, "most MB that a request sends (50)", LIMITS, bounds=(1, 1_000))
    max_seconds: int = flag(
        3_600, "seconds after which a picture is given up, counted from its first step (3600)", LIMITS,
        bounds=(1, 604_800),
    )  # fmt: skip
    max_queue: int = flag(64, "most requests that wait; others are told to come back (64)", LIMITS, bounds=(1, 10_000))


@dataclass(frozen=True, kw_only=True)
class ServeFlags(RunFlags, ModelFlags, LimitFlags):
    """Raises a Refusal for flags that contradict each other."""

    host: str = flag(
        "127.0.0.1", "address to listen at; any but this machine's own asks for an API key (127.0.0.1)", SERVER
    )
    port: int = flag(8_000, "port to listen at; 0: a free one, which is told (8000)", SERVER, bounds=(0, 65_535))
    api_key_file: Path | None = flag(
        None, f"file that holds the key clients must send (the environment's {KEY_VARIABLE})", SERVER, metavar="FILE"
    )
    results: Path = flag(
        Path("clear-dist-results"), "folder of the pictures, made if need be (clear-dist-results)", SERVER,
        metavar="FOLDER",
    )  # fmt: skip
    lora_dir: Path | None = flag(
        None, "folder of LoRA that requests may name; the same on all machines", SERVER, metavar="FOLDER"
    )
    keep_hours: float = flag(24.0, "hours that pictures are kept (24)", SERVER, bounds=(0.01, 8_760.0))
    keep_gb: float = flag(10.0, "GB of pictures kept, the newest (10)", SERVER, bounds=(0.0001, 100_000.0))

    def for_pictures(self, **asked: Any) -> GenerateFlags:
        """Flags of `generate` for pictures by this server's model, which is held as it is; raises as they do."""
        return GenerateFlags(**self._shared(GenerateFlags) | asked)

    def for_upscaling(self, file: Path, prompt: str, **asked: Any) -> "OneUpscaleFlags":
        """The same of `upscale`, for one picture."""
        return OneUpscaleFlags(images=[str(file)], text=prompt, **self._shared(UpscaleFlags) | asked)

    def _shared(self, kind: type[PictureFlags]) -> dict[str, Any]:
        shared = {each.name for each in fields(self)} & {each.name for each in fields(kind)}
        return {name: getattr(self, name) for name in shared} | {"keep_text_encoder": True, "quiet": True}


@dataclass(frozen=True, kw_only=True)
class OneUpscaleFlags(UpscaleFlags):
    """One picture and its prompt, which is a prompt whatever files there are by that name."""

    text: str

    @property
    def files(self) -> list[Path]:
        return [Path(self.images[0])]

    @cached_property
    def words(self) -> list[str]:
        return [self.text]


def check_key(flags: ServeFlags, key: str | None) -> None:
    """Raises a Refusal where anybody on the network could draw."""
    if key is None and flags.host not in LOOPBACK:
        raise Refusal(
            f"--host must be this machine's own address where there is no API key, got {flags.host}; nearest: "
            f"--api-key-file FILE, or {KEY_VARIABLE}"
        )


def key_of(flags: ServeFlags, given: str | None) -> str | None:
    """The key that clients must send, from the file or as `given` by the environment; None: there is none.

    Raises a Refusal where the file cannot be read, or a key is empty or has spaces in it.
    """
    if flags.api_key_file is not None:
        try:
            given = flags.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not UTF-8"
            raise Refusal(
                f"--api-key-file must be a file that can be read, got {flags.api_key_file} ({why})"
            ) from error
    if given is not None and not (given.isascii() and given.isprintable() and given and " " not in given):
        raise Refusal("an API key must be ASCII without spaces, got one that is not; nearest: openssl rand -hex 32")
    return given
