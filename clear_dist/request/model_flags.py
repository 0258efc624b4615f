"""Flags of every command that loads a model to draw: which one, where it runs, and how ranks meet."""

from dataclasses import dataclass

from clear_dist.options import CUT, JOIN_SECONDS, MODEL, Flags, Options, flag

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class RunFlags(Options):
    """What all pictures of a run share, beside the model."""

    revision: str | None = flag(None, "of a hub model", MODEL, planned=False)
    join_timeout: int = flag(
        JOIN_SECONDS, "seconds that ranks wait for missing ones (300)", CUT, bounds=(1, 86_400), planned=False
    )
    stage_ranks: str = flag(
        "auto", "all draw every stage; auto: fewer do where the plan says they are clearly sooner (auto)", CUT,
        choices=("auto", "all"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Flags):
    model: str = flag(
        "auto",
        "auto, demo, a short name (below), a hub id, a folder in diffusers' layout, or a safetensors file as "
        "Black Forest Labs and ComfyUI have them (auto)",
        MODEL,
    )
    base: str | None = flag(
        None,
        "where a single file's tokenizers, configurations and further parts are (the folder beside, or the model "
        "whose tensors it has)",
        MODEL,
        metavar="NAME|HUB-ID|FOLDER",
    )
    text_encoder: list[str] | None = flag(
        None, "a text encoder's single file, once for each in the model's order (those beside)", MODEL, metavar="FILE"
    )
    vae: str | None = flag(None, "the VAE's single file (that beside)", MODEL, metavar="FILE")
    clear_weights: str = flag(
        "auto", "auto, none, a file, a folder, or owner/name\\[@revision]:file on the hub (auto)", MODEL
    )
    down_factor: int | None = flag(
        None,
        "of CLEAR's down-sampled keys: which of a window's files; 1: without (as the file has)",
        MODEL,
        bounds=(1, 64),
    )
    dtype: str = flag(
        "auto", "auto: bfloat16 on CUDA (before compute capability 8.0 float16), float32 on CPU", MODEL, choices=DTYPES
    )
    device: str = flag("auto", "auto: CUDA where it is", MODEL, choices=DEVICES, planned=False)
    nproc: int | None = flag(
        None, "ranks to start here (visible GPUs; 1 on CPU); not under torchrun", CUT, bounds=(1, 1_024)
    )
    traceback: bool = flag(False, "if a rank fails, show where")
