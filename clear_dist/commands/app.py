"""The command line: a table of commands, and their errors on one line."""

from collections.abc import Sequence
from inspect import getdoc
from typing import Annotated

import typer

from clear_dist import __version__
from clear_dist.commands.draw import generate, upscale
from clear_dist.commands.flags import Command, no_number
from clear_dist.commands.plan import plan
from clear_dist.commands.verify import verify
from clear_dist.launch import ends, env
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags, PlanFlags, UpscaleFlags, VerifyFlags

COMMANDS = {
    "generate": Command(record=GenerateFlags, run=generate),
    "upscale": Command(record=UpscaleFlags, run=upscale),
    "plan": Command(record=PlanFlags, run=plan),
    "verify": Command(record=VerifyFlags, run=verify),
}


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit status."""
    given = with_dashes(arguments)
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
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback(invoke_without_command=True)(_without_command)
    for name, command in COMMANDS.items():
        app.command(name, help=getdoc(command.run))(command.for_typer())
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
    parameter = getattr(error, "param", None)
    command = next((word for word in arguments if word in COMMANDS), "")
    flags = COMMANDS[command].flags() if command else {}
    if parameter is not None and parameter.name in flags and flags[parameter.name].bounds is not None:
        return str(no_number(parameter.name, flags[parameter.name], _value_of(parameter.opts, arguments)))
    return " ".join(words().split()).rstrip(".") + f"; see clear-dist {command}{' ' * bool(command)}--help"


def _value_of(flags: Sequence[str], arguments: Sequence[str]) -> str:
    values = [""]
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in flags:
            values.append(value if equals else following)
    return values[-1]
