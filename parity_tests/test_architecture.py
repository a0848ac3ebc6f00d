"""The rules of the house that a reader relies on: who imports whom, and the mirror."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "osp_shared": ROOT / "shared/osp_shared",
    "osp_torch": ROOT / "backends/torch_ref/osp_torch",
    "osp_mindspore": ROOT / "backends/mindspore/osp_mindspore",
    "osp_tools": ROOT / "tools/osp_tools",
}
FORBIDDEN = {
    "osp_shared": {"torch", "mindspore", "osp_torch", "osp_mindspore", "osp_tools"},
    "osp_torch": {"mindspore", "osp_mindspore", "osp_tools"},
    "osp_mindspore": {"torch", "osp_torch", "osp_tools"},
    "osp_tools": set(),  # a backend, but only inside a function: checked below
}


def imports(path: Path, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_arrows(room):
    for path in ROOMS[room].rglob("*.py"):
        wrong = imports(path) & FORBIDDEN[room]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_tools_load_a_backend_only_when_asked():
    for path in ROOMS["osp_tools"].rglob("*.py"):
        wrong = imports(path, top_level=True) & {"torch", "mindspore", "osp_torch", "osp_mindspore"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)} at its top"


def test_the_diffusers_library_is_a_witness_not_a_part():
    for folder in ROOMS.values():
        for path in folder.rglob("*.py"):
            assert "diffusers" not in imports(path), path


def test_shared_imports_quickly_and_without_a_framework():
    code = (
        "import sys, pkgutil, importlib, osp_shared\n"
        "for m in pkgutil.walk_packages(osp_shared.__path__, 'osp_shared.'): importlib.import_module(m.name)\n"
        "heavy = {'torch', 'mindspore', 'transformers', 'av', 'decord'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < 30, "a loaded machine takes some seconds; a framework takes more"


def outline(path: Path) -> list:
    """Classes with their public methods and attributes set in __init__, and functions, in order of the file."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            attributes = [
                target.attr
                for item in node.body
                if isinstance(item, ast.FunctionDef) and item.name == "__init__"
                for statement in ast.walk(item)
                if isinstance(statement, (ast.Assign, ast.AnnAssign))
                for target in ast.walk(statement.targets[0] if isinstance(statement, ast.Assign) else statement.target)
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == "self"
            ]
            found.append((node.name, list(dict.fromkeys(attributes))))
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found.append((node.name, None))
    return found


MIRRORED = ["layers.py", "wfvae/modules.py", "wfvae/model.py", "dit/modules.py", "dit/model.py"]


@pytest.mark.parametrize("name", MIRRORED)
def test_mirror(name):
    """Two windows side by side read line by line: the same classes, attributes and functions in the same order."""
    assert outline(ROOMS["osp_torch"] / name) == outline(ROOMS["osp_mindspore"] / name)


def test_every_kernel_has_both_forms_and_a_reference():
    torch_kernels = {name for name, _ in outline(ROOMS["osp_torch"] / "kernels.py")}
    forms = {name for p in (ROOMS["osp_mindspore"] / "kernels").glob("*.py") for name, _ in outline(p)}
    cpu = {n.removesuffix("_cpu") for n in forms if n.endswith("_cpu")}
    ascend = {n.removesuffix("_ascend") for n in forms if n.endswith("_ascend")}
    assert cpu == ascend == torch_kernels - {"raised"}
