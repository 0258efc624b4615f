"""`clear-dist upscale`: a user's own picture, made larger and refined."""

from pathlib import Path

from clear_dist.commands import drawing, options
from clear_dist.config import UpscaleConfig


def upscale(
    image: options.Image,
    prompt: options.UpscalePrompt = None,
    res: options.UpscaleRes = None,
    height: options.UpscalePixels = None,
    width: options.UpscalePixels = None,
    strength: options.Strength = None,
    upscale_steps: options.UpscaleSteps = None,
    ntk_factor: options.NtkFactor = None,
    base_res: options.BaseRes = None,
    save_stages: options.SaveStages = False,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    true_cfg_scale: options.TrueCfgScale = None,
    max_sequence_length: options.MaxSequenceLength = None,
    seed: options.Seed = None,
    model: options.Model = "auto",
    revision: options.Revision = None,
    clear_weights: options.ClearWeights = "auto",
    lora: options.Lora = None,
    window: options.Window = None,
    hoist_modulation: options.HoistModulation = False,
    compile: options.Compile = False,
    float8: options.Float8 = False,
    keep_text_encoder: options.KeepTextEncoder = False,
    int8: options.Int8 = False,
    shard_weights: options.ShardWeights = False,
    offload: options.Offload = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    nproc: options.Nproc = None,
    text_attention: options.TextAttention = None,
    text_tokens: options.TextTokens = "auto",
    schedule: options.Schedule = "sync",
    warmup_steps: options.WarmupSteps = None,
    attention_backend: options.AttentionBackend = "auto",
    output: options.UpscaleOutput = None,
    preview_every: options.PreviewEvery = None,
    no_metadata: options.NoMetadata = False,
    latents_out: options.LatentsOut = None,
    report: options.Report = None,
    profile: options.Profile = None,
    traceback: options.Traceback = False,
) -> int:
    """Make a picture larger: enlarge it, add noise, and denoise it again, stage by stage (SDEdit)."""
    given = locals()
    given["output"] = output or Path(f"{image.stem}-upscaled.png")
    return drawing.run(UpscaleConfig(metadata=not given.pop("no_metadata"), **given))
