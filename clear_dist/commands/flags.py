"""The command line, made from records of flags: a typer command for each."""

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, get_args, get_type_hints

import typer

from clear_dist.options import Flag, Flags, Refusal, flag_of, shortened, spelled
from clear_dist.request.distill import DISTILL_PANELS
from clear_dist.request.evaluate import EVALUATE_PANELS
from clear_dist.request.flags import PANELS
from clear_dist.request.serve import SERVE_PANELS

ALL_PANELS = (*PANELS[:-1], *DISTILL_PANELS, *SERVE_PANELS, *EVALUATE_PANELS, None)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A record of flags, and the function that takes one and returns the exit status."""

    record: type[Flags]
    run: Callable[[Any], int]

    def flags(self) -> dict[str, Flag]:
        return {each.name: flag_of(each) for each in _shown(self.record)}

    def for_typer(self) -> Callable[..., int]:

        def call(context: typer.Context, **given: Any) -> int:
            if context.args:
                raise _too_many(context.args, given)
            for name, flag in self.flags().items():
                if flag.read is not None and given[name] is not None:
                    try:
                        given[name] = flag.read(given[name])
                    except ValueError:
                        raise no_number(name, flag, given[name]) from None
            return self.run(self.record(**given))

        hints = get_type_hints(self.record)
        parameters = [_parameter(each, hints[each.name]) for each in _shown(self.record)]
        context = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        vars(call)["__signature__"] = Signature([context, *parameters])
        return call


def _too_many(words: list[str], given: dict[str, Any]) -> Refusal:
    """Arguments that nothing takes: a prompt without quotes, most often."""
    if "prompt" not in given:
        return Refusal(f"this command takes flags only, got {shortened(' '.join(words))!r}; leave it out")
    whole = [given["prompt"], *words]
    shown, quoted = shortened(", ".join(map(repr, whole))), shlex.quote(" ".join(whole))
    return Refusal(f"the prompt must be one argument, got {shown}; nearest: {quoted}")


def no_number(name: str, flag: Flag, text: str) -> Refusal:
    assert flag.bounds is not None, name
    least, most = flag.bounds
    whole = isinstance(least, int)
    begun = re.match(r"-?\d+\.?\d*(e[+-]?\d+)?", text)
    given = float(begun[0]) if begun else least
    nearest = min(max(given if math.isfinite(given) else least, least), most)
    kind, shown = ("whole number", str(round(nearest))) if whole else ("number", f"{nearest:g}")
    kind += " or WIDTHxHEIGHT" * (name == "res")
    bounds = f"{least} to {most}" if whole else f"{least:g} to {most:g}"
    return Refusal(f"{spelled(name)} must be a {kind} from {bounds}, got {shortened(text)!r}; nearest: {shown}")


def _shown(record: type[Flags]) -> list[Field]:
    names = dict.fromkeys(name for kind in record.__mro__ for name in vars(kind).get("__annotations__", ()))
    by_name = {each.name: each for each in fields(record)}
    shown = [by_name[name] for name in names if flag_of(by_name[name]).planned or not record.only_planned]
    return sorted(shown, key=lambda each: ALL_PANELS.index(flag_of(each).panel))


def _parameter(each: Field, hint: Any) -> Parameter:
    flag = flag_of(each)
    default = Parameter.empty if each.default is MISSING else each.default
    if flag.is_argument:
        shown: Any = typer.Argument(help=flag.help, metavar=flag.metavar, show_default=False)
    else:
        metavar = flag.metavar or "|".join(flag.choices) or None
        names = flag.names or ((spelled(each.name),) if hint is bool else ())
        shown = typer.Option(
            *names,
            help=flag.help,
            rich_help_panel=flag.panel,
            metavar=metavar,
            show_default=False,
            autocompletion=(lambda: list(flag.choices)) if flag.choices else None,
        )
    if flag.choices or flag.read:  # checked by us, not by typer
        hint = str | None if type(None) in get_args(hint) else str
    return Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, shown])
