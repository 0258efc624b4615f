"""The documents: the page of flags is what the records give, and names and links in all of them lead somewhere."""

import re
from pathlib import Path

import pytest

from clear_dist.commands.app import COMMANDS
from docs import flags

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOREIGN = {"--help", "--version", "--nproc-per-node", "--no-python", "--table", "--check"}
"""Not of our records: typer's, ours without a command, torchrun's, a benchmark's, and ruff's."""
FLAGS = {
    name.strip(" /")
    for command in COMMANDS.values()
    for field, flag in command.flags().items()
    for name in (flag.names or (flags.spelled(field),))
}
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)


def test_the_page_of_flags_is_made_from_the_records() -> None:
    assert flags.PAGE.read_text() == flags.page(), "python -m docs.flags makes it anew"


def test_only_flags_are_explained_at_length() -> None:
    assert set(flags.long_texts()[1]) <= FLAGS


@every_document
def test_flags_in_documents_exist(document: Path) -> None:
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text())
    assert {name.replace("_", "-") for name in named} <= FLAGS | FOREIGN


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", document.read_text()):
        file = document.parent / target if target else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@every_document
def test_files_named_in_documents_exist(document: Path) -> None:
    named = re.findall(r"`((?:clear_dist|tests|docs|benchmarks|launchers|\.ci)/[\w./-]*)`", document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def anchors(file: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_hooks_run_the_checks_of_ci() -> None:
    entries = re.findall(r"entry: ([^,}]*?)[,}]", (ROOT / ".pre-commit-config.yaml").read_text())
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert entries == lines[lines.index("ruff check .") : lines.index("pytest")]
