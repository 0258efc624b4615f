"""The documents: the page of flags is what the records give, and names and links in all of them lead somewhere."""

import re
from pathlib import Path

import pytest
from PIL import Image

from clear_dist.commands.app import COMMANDS
from docs import flags

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOREIGN = {
    *("--help", "--version", "--install-completion", "--nproc-per-node", "--no-python", "--table", "--check"),
    *("--page", "--results", "--max-restarts", "--nodes", "--gpus-per-node", "--requeue"),
    *("--flow-alone", "--rm", "--gpus", "--ipc", "--shm-size", "--pid", "--oldest", "--newest", "--cuda", "--cuda-all"),
}
"""Not in our records: typer's, ours without a command, torchrun's, SLURM's, the benchmarks', ruff's, Docker's and CI's."""
FLAGS = {
    name.strip()
    for command in COMMANDS.values()
    for field, flag in command.flags().items()
    for names in (flag.names or (flags.spelled(field),))
    for name in names.split("/")
}
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)


def test_the_page_of_flags_is_made_from_the_records() -> None:
    assert flags.PAGE.read_text() == flags.page(), "python -m docs.flags makes it anew"


def test_only_flags_are_explained_at_length_and_each_once() -> None:
    headings = re.findall(r"^### `(.*)`$", flags.LONG.read_text(), flags=re.MULTILINE)
    assert set(headings) <= FLAGS
    assert len(headings) == len(set(headings)), "the last one would hide the others"


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


def test_the_image_of_docker_copies_what_exists() -> None:
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert [name for line in copied for name in line.split() if not (ROOT / name).exists()] == []
    assert {"pyproject.toml", "README.md", "LICENSE", "clear_dist"} <= set(" ".join(copied).split())


def test_the_example_for_a_cpu_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "docs" / "python.md").read_text().split("## On a CPU")[1].split("\n## ")[0]
    lines = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    for slow, quick in {"steps=20": "steps=1", "height=256, width=256": "height=64, width=64"}.items():
        assert slow in lines
        lines = lines.replace(slow, quick)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    with Image.open("sunset.png") as picture:
        assert picture.size == (64, 64)


def anchors(file: Path) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_hooks_run_the_checks_of_ci() -> None:
    entries = re.findall(r"entry: ([^,}]*?)[,}]", (ROOT / ".pre-commit-config.yaml").read_text())
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert entries == lines[lines.index("ruff check .") : lines.index("pytest")]
