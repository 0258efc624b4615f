"""The rooms of the house and who may call whom, read from the source: `docs/architecture.md` in a test."""

import ast
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clear_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = (
    ("options", "geometry", "stages", "refining", "pictures", "demo", "kernels", "products"),
    ("merge", "cards", "launch", "observe"),
    ("attention", "comm", "request"),
    ("engine", "hub"),
    ("families", "weights"),
    ("vae",),
    ("parallelized",),
    ("parallelize", "drawing"),
    ("evaluate",),
    ("plan", "verify"),
    ("training", "serving"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A room imports rooms below it, not its neighbours: so there is no circle."""
ON_THE_GROUND = {"stages": {"refining"}, "demo": {"options"}}
"""Neighbours that a room on the ground imports all the same."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TORCH = (
    "options", "geometry", "stages", "refining", "pictures", "cards", "launch", "request", "hub", "families.cards",
)  # fmt: skip


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def functions(file: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(file.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_rooms_import_rooms_below(file: Path) -> None:
    room = room_of(module_of(file))
    if not room:  # the package itself: public names, imported lazily
        return
    used = {room_of(name) for name in imports(file) if name.startswith("clear_dist.")} - {room, "", "__version__"}
    allowed = {other for other, floor in FLOOR_OF.items() if floor < FLOOR_OF[room]} | ON_THE_GROUND.get(room, set())
    assert used <= allowed


def test_every_room_has_a_floor() -> None:
    assert {room_of(module_of(file)) for file in FILES} - {""} == set(FLOOR_OF)


def test_what_answers_the_user_imports_no_torch() -> None:
    modules = [module_of(file) for file in FILES]
    chosen = [name for name in modules if name.removeprefix("clear_dist.").startswith(WITHOUT_TORCH)]
    cards = [name for name in modules if re.fullmatch(r"clear_dist\.families\.\w+\.card", name)]
    assert cards and len(chosen) > 20
    code = f"import sys; from importlib import import_module; [import_module(name) for name in {[*chosen, *cards]}]"
    check = "import clear_dist.commands.app; assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True, cwd=PACKAGE.parent)


def test_a_card_rests_on_cards() -> None:
    for file in PACKAGE.glob("families/*/card.py"):
        own = f"{module_of(file).rpartition('.')[0]}."
        others = {name for name in imports(file) if name.startswith("clear_dist.") and not name.startswith(own)}
        assert {room_of(name) for name in others} <= {
            "cards",
            "options",
            "stages",
        }
    for folder in ("families", "families/flux", "families/flux2"):
        assert not (PACKAGE / folder / "__init__.py").read_text()


def test_a_model_is_a_folder() -> None:
    """And a row in each table; the embedded model is one of FLUX's."""
    apart = re.compile(r"families/(flux2?/.*|\w+\.py)|demo/.*")
    named = [file for file in FILES if not apart.fullmatch(file.relative_to(PACKAGE).as_posix())]
    assert [module_of(file) for file in named if "flux" in file.read_text().lower()] == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_only_comm_knows_torch_distributed(file: Path) -> None:
    if room_of(module_of(file)) != "comm":
        assert not [name for name in imports(file) if name.startswith("torch.distributed")]


def test_no_module_needs_peft_to_be_imported() -> None:
    """It is an extra, which only a LoRA asks for."""
    for file in FILES:
        named = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [node for node in named if "import peft" in ast.unparse(node) or "from peft" in ast.unparse(node)]


def test_geometry_knows_no_tensors_and_env_only_the_standard_library() -> None:
    assert not [name for name in imports(PACKAGE / "geometry.py") if name.startswith(("torch", "numpy"))]
    assert not [name for name in imports(PACKAGE / "launch" / "env.py") if name.startswith(("torch", "clear_dist"))]


def test_only_env_reads_the_ranks_environment() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    readers = {
        module_of(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert readers <= {"clear_dist.launch.env"}


def test_files_and_functions_keep_their_bounds() -> None:
    tests = sorted(Path(__file__).parent.rglob("*.py"))
    lengths = {file: len(file.read_text().splitlines()) for file in (*FILES, *tests)}
    assert {str(file): length for file, length in lengths.items() if length > 300} == {}
    code = sorted(lengths[file] for file in FILES)
    assert code[len(code) // 2] <= 150
    too_long = [
        f"{module_of(file)}.{function.name}"
        for file in FILES
        for function in functions(file)
        if function.end_lineno is not None and function.end_lineno - function.lineno + 1 > 50
    ]
    assert too_long == []


def test_what_is_imported_is_declared_with_a_lower_bound() -> None:
    """`.ci/run --oldest` installs these bounds."""
    lowest = subprocess.run([sys.executable, ".ci/lowest"], cwd=PACKAGE.parent, capture_output=True, text=True)
    declared = {line.partition("==")[0].replace("pillow", "PIL") for line in lowest.stdout.split()}
    imported = {name.partition(".")[0] for file in FILES for name in imports(file)}
    assert imported - sys.stdlib_module_names - {"clear_dist"} <= declared


def test_no_test_has_a_limit_of_its_own() -> None:
    """`tests/patience.py` has them: what is long enough here is not on a busy machine."""
    own = re.compile(r"communicate\(timeout|mark\.timeout|perf_counter\(\)")
    tests = set(Path(__file__).parent.rglob("*.py")) - {Path(__file__)}
    assert [str(file) for file in tests if own.search(file.read_text())] == []


def test_no_global_statement_and_no_state_on_modules() -> None:
    trees = {file: ast.parse(file.read_text()) for file in FILES}
    assert not [
        module_of(file) for file, tree in trees.items() if any(isinstance(n, ast.Global) for n in ast.walk(tree))
    ]
    mutable = (ast.Set, ast.ListComp, ast.List)
    assert not [
        module_of(file)
        for file, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, mutable)
        and ast.unparse(node.targets[0]) != "__all__"
    ]


def test_no_foreign_class_is_patched() -> None:
    """No assignment to an attribute of an imported class or module, and none to `forward` of anything but self."""
    for file in FILES:
        tree = ast.parse(file.read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        imported = {(a.asname or a.name).split(".")[0] for a in chain.from_iterable(node.names for node in nodes)}
        for node in ast.walk(tree):
            for target in node.targets if isinstance(node, ast.Assign) else []:
                if isinstance(target, ast.Attribute):
                    owner = ast.unparse(target.value)
                    ours = owner == "sys.modules[__name__]"
                    assert ours or owner.split(".")[0] not in imported, f"{module_of(file)}:{node.lineno}"
                    assert target.attr != "forward" or owner == "self", f"{module_of(file)}:{node.lineno}"


def test_halo_exchange_is_found_at_once() -> None:
    assert "HALOS ARE EXCHANGED HERE" in (PACKAGE / "comm" / "halo_exchange.py").read_text().splitlines()[0]
