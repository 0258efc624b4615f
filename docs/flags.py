"""Makes docs/flags.md from the records of flags and from docs/flags_long.md.  python -m docs.flags"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, get_type_hints

from clear_dist.commands.app import COMMANDS
from clear_dist.commands.flags import ALL_PANELS, Command
from clear_dist.options import Flag, Options, spelled

FOLDER = Path(__file__).parent
PAGE, LONG = FOLDER / "flags.md", FOLDER / "flags_long.md"
NOTICE = "<!-- Made by `python -m docs.flags`; change the records of flags, or flags_long.md, instead. -->"
ARGUMENTS, OTHERS = "Arguments", "Others"
TITLES = [ARGUMENTS, *(panel or OTHERS for panel in ALL_PANELS)]
HEADS = "| flag | values | default | what it does | commands | in Python |\n|---|---|---|---|---|---|"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One flag as some of the commands have it."""

    name: str
    flag: Flag
    values: str
    default: str

    @property
    def title(self) -> str:
        """Heading of its table."""
        return ARGUMENTS if self.flag.is_argument else self.flag.panel or OTHERS

    @property
    def shown(self) -> str:
        """Spelling on the command line, as code."""
        if self.flag.is_argument:
            return f"`{self.name.upper()}`"
        return ", ".join(f"`{name.strip(' /')}`" for name in self.flag.names or (spelled(self.name),))


def page() -> str:
    """The page in Markdown."""
    introduction, details = long_texts()
    rows: dict[Row, list[str]] = {}
    for name, command in COMMANDS.items():
        for row in rows_of(command):
            rows.setdefault(row, []).append(name)
    names = list(dict.fromkeys(row.name for row in rows))
    ordered = sorted(rows, key=lambda row: (TITLES.index(row.title), names.index(row.name)))
    parts = [NOTICE, introduction]
    for title, group in groupby(ordered, key=lambda row: row.title):
        lines = [line_of(row, rows[row], linked=spelled(row.name) in details) for row in group]
        parts.append("\n".join([f"## {title}\n", HEADS, *lines]))
    parts.append("## More about some of them")
    parts += [f"### `{name}`\n\n{text}" for name, text in details.items()]
    return "\n\n".join(parts) + "\n"


def long_texts() -> tuple[str, dict[str, str]]:
    """What stands before the tables, and what is to be said of single flags, by their names."""
    introduction, *sections = LONG.read_text().split("\n### ")
    named = (section.partition("\n") for section in sections)
    return introduction.strip(), {name.strip("` "): text.strip() for name, _, text in named}


def rows_of(command: Command) -> Iterator[Row]:
    """The flags of a command."""
    hints, defaults = get_type_hints(command.record), {each.name: each.default for each in fields(command.record)}
    for name, flag in command.flags().items():
        values = "" if hints[name] in (bool, bool | None) else values_of(flag, hints[name])
        yield Row(name=name, flag=flag, values=values, default=default_of(defaults[name], flag))


def values_of(flag: Flag, hint: Any) -> str:
    """What a flag takes."""
    if flag.bounds is not None:
        return " to ".join(f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in flag.bounds)
    words = flag.choices or (flag.metavar or ("FILE" if hint is Path else "TEXT")).split("|")
    return ", ".join(f"`{word}`" for word in words)


def default_of(value: Any, flag: Flag) -> str:
    """What holds where a flag is not given; nothing where it depends on something else, which the help tells."""
    if value is MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return "" if value is None else "off"
    return f"`{value}`"


def line_of(row: Row, commands: list[str], *, linked: bool) -> str:
    """A line of a table."""
    shown = f"[{row.shown}](#{spelled(row.name)})" if linked else row.shown
    everywhere = "all" if len(commands) == len(COMMANDS) else ", ".join(commands)
    argument = f"`{row.name}`" if row.name in {each.name for each in fields(Options)} else ""
    cells = (shown, row.values, row.default, row.flag.help.replace("\\[", "["), everywhere, argument)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
