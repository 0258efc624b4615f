"""Options that cannot be chosen beside ControlNets, as their fields say."""

from dataclasses import Field, fields, replace
from typing import Any

from clear_dist.options import Options, Refusal, flag_of, spelled


def check_beside_controlnets(options: Options) -> None:
    """Raises a Refusal where one of them is chosen."""
    for each in _fields():
        if getattr(options, each.name) != each.default:
            raise Refusal(f"either --controlnet or {spelled(each.name)} can be given, got both; leave one out")


def without_them(options: Options) -> Options:
    """Options for a ControlNet: all as they are but these."""
    usual: dict[str, Any] = {each.name: each.default for each in _fields()}
    return replace(options, **usual)


def _fields() -> list[Field]:
    return [each for each in fields(Options) if not flag_of(each).beside_controlnets]
