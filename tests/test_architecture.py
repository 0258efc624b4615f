"""The rooms of the house and who may call whom, read from the source."""

import ast
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clear_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
ARROWS = {
    "geometry": set(),
    "stages": {"geometry"},
    "resize": {"geometry"},
    "host_memory": set(),
    "planning": {"geometry", "stages", "config"},
    "clock": set(),
    "labels": set(),
    "config": {"demo", "stages"},
    "clear_checkpoint": {"config"},
    "merge": {"geometry"},
    "comm": {"merge", "geometry", "config", "clock", "labels"},
    "attention": {"merge", "geometry", "config"},
    "models": {
        "attention",
        "comm",
        "merge",
        "geometry",
        "config",
        "clear_checkpoint",
        "clock",
        "labels",
        "host_memory",
    },
    "text": {"comm", "merge", "geometry", "config"},
    "demo": {"config"},
}
"""What a room may import besides itself; rooms that are not named may import all but `cli` and `commands`."""


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
def test_imports_follow_the_arrows(file: Path) -> None:
    room = room_of(module_of(file))
    used = {room_of(name) for name in imports(file) if name.startswith("clear_dist.")} - {room, ""}
    if room in ARROWS:
        assert used <= ARROWS[room]
    elif room not in ("", "cli", "commands"):
        assert not used & {"cli", "commands"}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_only_comm_knows_torch_distributed(file: Path) -> None:
    if room_of(module_of(file)) != "comm":
        assert not [name for name in imports(file) if name.startswith("torch.distributed")]


def test_geometry_knows_no_tensors_and_env_only_the_standard_library() -> None:
    assert not [name for name in imports(PACKAGE / "geometry.py") if name.startswith(("torch", "numpy"))]
    assert not [name for name in imports(PACKAGE / "comm" / "env.py") if name.startswith(("torch", "clear_dist"))]


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
