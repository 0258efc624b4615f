"""Bodies of requests, OpenAI's parameters and our own; what is not named here is refused."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from clear_dist.options import TextAttention
from clear_dist.request.serve import LimitFlags
from clear_dist.serving.errors import ApiError

ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
MOST_SEED = 2**63 - 1
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
LOW = "low"
"""The quality that takes half of the model's steps."""

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


class Lora(BaseModel):
    """A LoRA of the server's folder."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200)]
    weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 1.0


class Drawn(BaseModel):
    """What generations and edits have in common."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=32_000)]
    model: Annotated[str, Field(max_length=400)] | None = None
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] | None = None
    quality: Quality | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None

    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = None
    steps: Annotated[int, Field(ge=1, le=1_000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    true_cfg_scale: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] | None = None
    negative_prompt: Annotated[str, Field(max_length=32_000)] | None = None
    strength: Annotated[float, Field(ge=0.001, le=1, allow_inf_nan=False)] | None = None
    refine: Annotated[str, Field(max_length=40)] | None = None
    window: Annotated[int, Field(ge=1, le=8_192)] | Literal["full"] | None = None
    text_attention: TextAttention | None = None
    lora: Annotated[list[Lora], Field(max_length=8)] | None = None

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _is_text(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            raise ValueError("it must hold no zero bytes")
        return value

    @property
    def ending(self) -> str:
        return ENDINGS[self.output_format or "png"]

    @property
    def sides(self) -> tuple[int, int] | None:
        """Width and height; None: the model's own."""
        found = None if self.size is None else SIZE.fullmatch(self.size)
        return None if found is None else (int(found[1]), int(found[2]))

    def check(self, limits: LimitFlags) -> None:
        """Raises ApiError for more than this server draws, or parameters that exclude each other."""
        width, height = self.sides or (0, 0)
        for name, value, most, unit in (
            ("size", max(width, height), limits.max_side, " pixels a side"),
            ("steps", self.steps or 0, limits.max_steps, ""),
            ("n", self.n or 1, limits.max_images, ""),
            ("prompt", len(self.prompt), limits.max_prompt, " characters"),
            ("lora", len(self.lora or ()), limits.max_loras, ""),
            ("negative_prompt", len(self.negative_prompt or ""), limits.max_prompt, " characters"),
        ):
            if value > most:
                raise ApiError(400, f"{name} must be at most {most}{unit} here, got {value}", param=name)
        if self.output_compression is not None and self.output_format in (None, "png"):
            raise ApiError(400, "output_compression is for jpeg and webp", param="output_compression")
        if self.partial_images and not self.stream:
            raise ApiError(400, "partial_images is for stream: true", param="partial_images")
        if self.stream and self.response_format == "url":
            raise ApiError(400, "response_format must be b64_json where stream is true", param="response_format")

    def flags(self) -> dict[str, Any]:
        """Flags of `generate` for what was given."""
        width, height = self.sides or (None, None)
        named = ("seed", "steps", "guidance_scale", "true_cfg_scale", "negative_prompt", "strength", "refine")
        given = {name: getattr(self, name) for name in named} | {"width": width, "height": height, "num_images": self.n}
        return {name: value for name, value in given.items() if value is not None}


class Generation(Drawn):
    """Body of `POST /v1/images/generations`."""


class Edit(Drawn):
    """Fields of `POST /v1/images/edits`, beside the pictures."""

    use: Literal["edit", "upscale"] | None = None
    """edit: begin from the picture, with so much noise as `strength` says; upscale: make it larger."""
    input_fidelity: Literal["high", "low"] | None = None

    @field_validator("lora", mode="before")
    @classmethod
    def _from_form(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    def check(self, limits: LimitFlags) -> None:
        super().check(limits)
        if self.use == "upscale" and (self.n or 1) > 1:
            raise ApiError(400, f"n must be 1 where a picture is made larger, got {self.n}", param="n")
        if self.use == "upscale" and self.steps is not None:
            raise ApiError(400, "steps are for edits; those of upscale go by strength", param="steps")
