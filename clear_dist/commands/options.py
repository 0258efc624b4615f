"""The flags of commands that draw pictures: a type each, with its help."""

from pathlib import Path
from typing import Annotated, Any

import typer

from clear_dist.config import rules
from clear_dist.planning import GPUS, LINKS

DRAWN, LARGE, MODEL = "What to draw", "Above the native size", "Model"
CUT, WRITTEN = "How it is cut", "What is written"


def _flag(text: str, panel: str | None, *names: str, takes: str | tuple[str, ...] | None = None) -> Any:
    metavar = "|".join(takes) if isinstance(takes, tuple) else takes
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


Prompt = Annotated[str | None, typer.Argument(help="what the picture shows; quote it", show_default=False)]
Prompts = Annotated[Path | None, _flag("one prompt a line; the model is loaded once", DRAWN, takes="FILE")]
Res = Annotated[int | None, _flag("height and width in pixels (the model's native size)", DRAWN)]
Pixels = Annotated[int | None, _flag("pixels", DRAWN)]
Steps = Annotated[int | None, _flag("denoising steps (dev 28, schnell 4)", DRAWN, "--steps", "--num-inference-steps")]
GuidanceScale = Annotated[float | None, _flag("distilled guidance (3.5; above the native size 7.5)", DRAWN)]
NegativePrompt = Annotated[str | None, _flag("what to keep out; with --true-cfg-scale", DRAWN)]
TrueCfgScale = Annotated[
    float | None, _flag("classifier-free guidance; above 1: on (1; demo 3, at its native size)", DRAWN)
]
MaxSequenceLength = Annotated[int | None, _flag("text tokens (dev 512, schnell 256)", DRAWN)]
Seed = Annotated[int | None, _flag("of the noise, on any number of ranks (drawn and reported)", DRAWN)]
NumImages = Annotated[int, _flag("pictures of each prompt (1)", DRAWN)]

Image = Annotated[Path, typer.Argument(help="the picture to make larger", show_default=False)]
UpscaleRes = Annotated[int | None, _flag("the longer side in pixels (twice the picture's)", DRAWN)]
UpscalePrompt = Annotated[
    str | None, typer.Argument(help="what it shows (the prompt that clear-dist wrote into it)", show_default=False)
]
UpscalePixels = Annotated[int | None, _flag("pixels; with both, the picture is cropped to their shape", DRAWN)]

Cascade = Annotated[
    str, _flag("auto: draw at the native size, then enlarge and refine; off (auto)", LARGE, takes=rules.CASCADE)
]
BaseRes = Annotated[int | None, _flag("side of a square as large as the first stage (the native size)", LARGE)]
Strength = Annotated[float | None, _flag("share of noise that enlarged pictures get (0.7; demo 0.3)", LARGE)]
UpscaleSteps = Annotated[int | None, _flag("steps of each upper stage (the model's steps x strength)", LARGE)]
NtkFactor = Annotated[float | None, _flag("of the rotary embedding's base (10)", LARGE)]
SaveStages = Annotated[bool, _flag("write the lower stages' pictures too", LARGE, "--save-stages")]

Model = Annotated[str, _flag("auto, demo, a folder in diffusers' layout, or a hub id (auto)", MODEL)]
Revision = Annotated[str | None, _flag("of a hub model", MODEL)]
ClearWeights = Annotated[
    str, _flag("auto, none, a file, a folder, or owner/name\\[@revision]:file on the hub (auto)", MODEL)
]
Lora = Annotated[
    list[str] | None,
    _flag("a LoRA with its weight (1); once for each", MODEL, "--lora", takes="FILE|FOLDER|HUB-ID[:WEIGHT]"),
]
HoistModulation = Annotated[
    bool,
    _flag("AdaLN's weights (6.5 GB of FLUX.1's) in host memory; no effect on a CPU", MODEL, "--hoist-modulation"),
]
Compile = Annotated[
    bool, _flag("fuse norms, rotations and gates by torch.compile, which the first step waits for", MODEL, "--compile")
]
Float8 = Annotated[
    bool, _flag("linear layers of the blocks in float8, for GPUs of Ada's generation and later", MODEL, "--float8")
]
KeepTextEncoder = Annotated[
    bool, _flag("encode each prompt when its turn comes, not all before the rest loads", MODEL, "--keep-text-encoder")
]
Int8 = Annotated[
    bool, _flag("linear layers of the blocks with weights in 8 bits, on any device; needs torchao", MODEL, "--int8")
]
ShardWeights = Annotated[
    bool, _flag("each rank holds a share of every block; the next one's travel meanwhile", MODEL, "--shard-weights")
]
Offload = Annotated[
    bool, _flag("text encoders and VAE in host memory while not in use; no effect on a CPU", MODEL, "--offload")
]
Window = Annotated[
    str | None, _flag("radius in tokens, or full (the CLEAR weights'; full without)", MODEL, takes=("RADIUS", "full"))
]
Dtype = Annotated[str, _flag("auto: bfloat16 on CUDA, float32 on CPU", MODEL, takes=rules.DTYPES)]
Device = Annotated[str, _flag("auto: CUDA where it is", MODEL, takes=rules.DEVICES)]

Nproc = Annotated[int | None, _flag("ranks to start here (visible GPUs; 1 on CPU); not under torchrun", CUT)]
TextAttention = Annotated[
    str | None,
    _flag("average: the paper's; exact: independent of the ranks (average)", CUT, takes=rules.TEXT_ATTENTION),
]
TextTokens = Annotated[
    str,
    _flag("text tokens' linear layers: on all ranks, or a share on each (auto: by size)", CUT, takes=rules.TEXT_TOKENS),
]
Schedule = Annotated[
    str, _flag("sync: this step's halos; stale: the step before's, for slow links (sync)", CUT, takes=rules.SCHEDULES)
]
WarmupSteps = Annotated[int | None, _flag("synchronous steps before --schedule stale sets in (4)", CUT)]
AttentionBackend = Annotated[
    str, _flag("auto: the fastest for the image, as far as measured", CUT, takes=rules.ATTENTION_BACKENDS)
]

Output = Annotated[
    Path, _flag("picture: png, jpg, webp or tiff; several are numbered (clear-dist.png)", WRITTEN, takes="FILE")
]
UpscaleOutput = Annotated[
    Path | None, _flag("picture: png, jpg, webp or tiff (IMAGE-upscaled.png, in this folder)", WRITTEN, takes="FILE")
]
PreviewEvery = Annotated[
    int | None, _flag("write a small preview beside the output every so many steps", WRITTEN, takes="STEPS")
]
NoMetadata = Annotated[bool, _flag("no prompt, seed and settings in the picture", WRITTEN, "--no-metadata")]
LatentsOut = Annotated[Path | None, _flag("packed latents, safetensors", WRITTEN, takes="FILE")]
Report = Annotated[Path | None, _flag("times, memory and communication, JSON", WRITTEN, takes="FILE")]
Profile = Annotated[
    Path | None,
    _flag("what is in flight when, in the last 3 steps: json or json.gz, one for each rank", WRITTEN, takes="FILE"),
]
Traceback = Annotated[bool, _flag("if a rank fails, show where", None, "--traceback")]

GpuKind = Annotated[
    str, _flag("kind (those of this machine; else H100, for the demo the CPU)", CUT, takes=("auto", "cpu", *GPUS))
]
LinkKind = Annotated[str, _flag("between ranks (what such GPUs usually have)", CUT, takes=("auto", *LINKS))]
PlannedRanks = Annotated[int | None, _flag("ranks (the GPUs of this machine, or 1)", CUT)]
Sweep = Annotated[bool, _flag("a table over 1 to 64 ranks", WRITTEN, "--sweep")]
Json = Annotated[bool, _flag("for programs", WRITTEN, "--json")]
