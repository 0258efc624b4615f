"""The command line: a table of commands, and their errors on one line."""

import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from inspect import getdoc
from itertools import takewhile
from typing import Annotated

import typer

from clear_dist import __version__
from clear_dist.commands.distill import distill
from clear_dist.commands.draw import generate, upscale
from clear_dist.commands.evaluate import evaluate
from clear_dist.commands.flags import Command, no_number
from clear_dist.commands.plan import plan
from clear_dist.commands.serve import serve
from clear_dist.commands.verify import verify
from clear_dist.families.cards import CARDS
from clear_dist.launch import ends, env
from clear_dist.options import Refusal, shortened, spelled
from clear_dist.request.distill import DistillFlags
from clear_dist.request.evaluate import EvaluateFlags
from clear_dist.request.flags import READ_ENDINGS, GenerateFlags, PlanFlags, UpscaleFlags, VerifyFlags
from clear_dist.request.serve import ServeFlags

COMMANDS = {
    "generate": Command(record=GenerateFlags, run=generate),
    "upscale": Command(record=UpscaleFlags, run=upscale),
    "serve": Command(record=ServeFlags, run=serve),
    "plan": Command(record=PlanFlags, run=plan),
    "verify": Command(record=VerifyFlags, run=verify),
    "distill": Command(record=DistillFlags, run=distill),
    "evaluate": Command(record=EvaluateFlags, run=evaluate),
}
ELSEWHERE = {
    "--prompt": "the prompt stands by itself, in quotes; nearest: 'a lighthouse at dusk'",
    "--image": "it is for clear-dist generate, and upscale takes pictures without a flag; nearest: holiday.jpg",
}
"""Flags of other programs: what we have instead."""


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit status."""
    given = with_dashes(arguments) or ["--help"]
    try:
        env.read()
    except ValueError as error:
        ends.say(str(error))
        return ends.REFUSED
    try:
        return _app()(given, standalone_mode=False, prog_name="clear-dist") or 0
    except KeyboardInterrupt:
        return ends.interrupted()
    except typer.Exit as error:
        return error.exit_code
    except Exception as error:
        message = _message(error, given)
        return ends.fail(error, traceback="--traceback" in given) if message is None else ends.refuse(message)


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """`-` and `_` are the same in the names of flags; values stay as they are."""
    names = list(arguments)
    end = names.index("--") if "--" in names else len(names)
    for index, word in enumerate(names[:end]):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            names[index] = name.replace("_", "-") + equals + value
    return names


def _app() -> typer.Typer:
    app = typer.Typer(
        name="clear-dist",
        help="Pictures from diffusion transformers linearised by CLEAR, on many GPUs.",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback(invoke_without_command=True)(_without_command)
    for name, command in COMMANDS.items():
        models = f"Short names of models: {', '.join(CARDS.short_names)}." if "model" in command.flags() else None
        context = {"allow_extra_args": True}
        app.command(name, help=getdoc(command.run), epilog=models, context_settings=context)(command.for_typer())
    return app


def _without_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="show the version and exit")] = False,
) -> None:
    if version:
        print(f"clear-dist {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        raise Refusal(f"a command is needed, one of {', '.join(COMMANDS)}; nearest: clear-dist generate")


def _message(error: Exception, arguments: Sequence[str]) -> str | None:
    """One line for what is wrong with the request; None: it is not the request."""
    if isinstance(error, Refusal):
        return str(error)
    words = getattr(error, "format_message", None)  # typer's, of whichever version
    if words is None:
        return None
    parameter, option = getattr(error, "param", None), getattr(error, "option_name", None)
    command = next((word for word in arguments if word in COMMANDS), "")
    flags = COMMANDS[command].flags() if command else {}
    if parameter is not None and parameter.name in flags and flags[parameter.name].bounds is not None:
        return str(no_number(parameter.name, flags[parameter.name], _value_of(parameter.opts, arguments)))
    if hasattr(error, "possibilities") and (hint := _elsewhere(str(option), command)):
        return hint
    if not command and not arguments[0].startswith("-"):
        return _no_command(arguments)
    return " ".join(words().split()).rstrip(".") + f"; see clear-dist {command}{' ' * bool(command)}--help"


def _elsewhere(option: str, command: str) -> str | None:
    """Where to find what a flag unknown to `command` asks for; None: nobody knows."""
    name = f"clear-dist {command}".rstrip()
    if option in ELSEWHERE:
        return f"{name} has no {option}; {ELSEWHERE[option]}"
    for own in map(spelled, COMMANDS[command].flags() if command else ()):
        if own.endswith(option[1:]):
            return f"{name} has no {option}; nearest: {own}"
    for owner, each in COMMANDS.items():
        if option in {spelled(flag) for flag, kind in each.flags().items() if not kind.is_argument}:
            return f"{name} has no {option}; nearest: clear-dist {owner}, which has it"
    return None


def _no_command(arguments: Sequence[str]) -> str:
    """What is said where a prompt, or a command with a slip, stands in a command's place."""
    words = list(takewhile(lambda word: not word.startswith("-"), arguments))
    close = get_close_matches(words[0], COMMANDS, n=1)
    nearest = close[0] if close else f"generate {shlex.quote(' '.join(words))}"
    if words[0].lower().endswith(READ_ENDINGS):
        nearest = f"upscale {shlex.quote(words[0])}"
    if words[0] in ("help", "version"):
        nearest = f"--{words[0]}"
    given = shortened(words[0])
    return f"a command must be one of {', '.join(COMMANDS)}, got {given!r}; nearest: clear-dist {nearest}"


def _value_of(flags: Sequence[str], arguments: Sequence[str]) -> str:
    values = [""]
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in flags:
            values.append(value if equals else following)
    return values[-1]
