"""`clear-dist generate`: pictures from a prompt."""

from pathlib import Path

from clear_dist.commands import drawing, options
from clear_dist.config import GenerateConfig


def generate(
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    res: options.Res = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    true_cfg_scale: options.TrueCfgScale = None,
    max_sequence_length: options.MaxSequenceLength = None,
    seed: options.Seed = None,
    num_images: options.NumImages = 1,
    cascade: options.Cascade = "auto",
    base_res: options.BaseRes = None,
    strength: options.Strength = None,
    upscale_steps: options.UpscaleSteps = None,
    ntk_factor: options.NtkFactor = None,
    save_stages: options.SaveStages = False,
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
    output: options.Output = Path("clear-dist.png"),
    preview_every: options.PreviewEvery = None,
    no_metadata: options.NoMetadata = False,
    latents_out: options.LatentsOut = None,
    report: options.Report = None,
    profile: options.Profile = None,
    traceback: options.Traceback = False,
) -> int:
    """Draw pictures from a prompt, on one rank or many. No argument is required."""
    given = locals()
    return drawing.run(GenerateConfig(metadata=not given.pop("no_metadata"), **given))
