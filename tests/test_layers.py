"""The layers of the package: what a module may import, held against what it does import."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mvmae

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mvmae"
MODULES = sorted(PACKAGE.rglob("*.py"))

# room: third party that its modules may import | third party that only a function may import, when it is called
ROOMS = {
    "": ("torch timm safetensors huggingface_hub", ""),
    "data": ("torch timm numpy PIL", "simplejpeg tifffile pyarrow skimage datasets fsspec"),
    "dense": ("torch timm torchvision", ""),
    "visualize": ("torch numpy PIL", ""),
    "hub": ("torch timm safetensors huggingface_hub", "onnx onnxscript onnxruntime"),
}


def module_name(path: Path) -> str:
    """`model` for mvmae/model.py, `data.views` for mvmae/data/views.py, `data.__init__` for a door."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree: ast.AST, module: str, inside: bool = False) -> Iterator[tuple[ast.AST, str, bool]]:
    """Each import of a module: the node, the name (`.data.views` for one of ours, `torch` for a package), inside a function."""
    package = ["", *module.split(".")[:-1]]
    for node in ast.iter_child_nodes(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            # `from mvmae import views` is the module, and `from mvmae import MultiViewMAE` the package itself
            names = [f"mvmae.{alias.name}" for alias in node.names] if node.module == "mvmae" else [node.module or ""]
        elif isinstance(node, ast.ImportFrom) and node.level > len(package):
            names = ["(outside)"]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1])
            names = [f"{above}.{node.module}"] if node.module else [f"{above}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            names = [ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "(computed)"]
        for name in names:
            own = name.removeprefix("mvmae") if name.split(".")[0] == "mvmae" else name
            yield node, own if own.startswith(".") else own.split(".")[0], inside
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_optional(node)
        function |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        yield from imports(node, module, inside or function)


def is_optional(node: ast.AST) -> bool:
    """An import that may fail: `try`, with `except ImportError`."""
    return isinstance(node, ast.Try) and any(ast.unparse(h.type or node) == "ImportError" for h in node.handlers)


def problems(module: str, source: str) -> list[str]:
    """What breaks the rules in the source of a module: imports that its room may not have, `print`, `assert`.

    A room imports itself and the root, never another room; the root imports no room, but for the package's own door.
    """
    tree, room = ast.parse(source), module.rpartition(".")[0]
    third_party, lazy = (set(names.split()) for names in ROOMS[room])
    found = []
    for node, name, inside in imports(tree, module):
        if name.startswith("."):
            head, _, rest = name[1:].partition(".")
            to = head if head in ROOMS and (rest or head not in root_modules()) else ""
            good = bool(head) and (module == "__init__" or to in ("", room))
        else:
            good = name in third_party | sys.stdlib_module_names | (lazy if inside else set())
            good |= module == "__init__" and name == "(computed)"
        if not good:
            found.append(f"mvmae/{module}:{node.lineno}: imports {name or 'mvmae'}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(f"mvmae/{module}:{node.lineno}: assert; raise ValueError or TypeError instead")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"mvmae/{module}:{node.lineno}: print; use logging instead")
    return found


def root_modules() -> set[str]:
    return {path.stem for path in PACKAGE.glob("*.py")}


def reached(module: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The modules that come with one: those that it imports outside functions, and so on; a circle is an error."""
    assert module not in seen, f"{module} imports itself through {sorted(seen)}"
    path = PACKAGE / (module.replace(".", "/") + ".py")
    names = {
        name[1:] for _, name, inside in imports(ast.parse(path.read_text()), module) if name.startswith(".") and not inside
    }
    found = set()
    for name in names:
        target = f"{name}.__init__" if (PACKAGE / name).is_dir() else name
        found |= {target} | reached(target, seen | {module})
    return found


def test_a_module_imports_its_own_room_and_the_root_alone_and_is_short_enough_to_read():
    for path in MODULES:
        assert problems(module_name(path), path.read_text()) == []
        reached(module_name(path))
        assert len(path.read_text().splitlines()) <= 300, path


EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SHARED = sorted([*EXAMPLES.glob("engine/*.py"), *EXAMPLES.glob("tasks/*.py")])


def example_problems(path: Path, source: str) -> list[str]:
    """What breaks the rule script -> tasks -> engine: an import against it, of another script, or of the method in engine.

    The engine takes from the package what knows no method: how a loader's errors read, and how a file is replaced.
    """
    room, scripts = path.parent.name, {script.stem for script in SCRIPTS}
    refused = scripts if path.stem not in ("ablate", "adapt") else set()
    refused = refused | ({"tasks"} if room == "engine" else set())
    found = [name for _, name, _ in imports(ast.parse(source), path.stem)]
    method = [name for name in found if name.startswith(".") and name not in (".data", ".weights")]
    return [name for name in found if name in refused] + (method if room == "engine" else [])


def test_a_script_imports_tasks_and_engine_and_never_back_and_is_short_enough_to_read():
    for path in [*SCRIPTS, *SHARED]:
        assert example_problems(path, path.read_text()) == [], path
        assert len(path.read_text().splitlines()) <= (220 if path.name == "pretrain.py" else 340), path


def test_a_room_of_the_examples_imports_itself_one_way():
    used = {path: shared_imports(path) for path in SHARED}
    while ready := [path for path, others in used.items() if not others & used.keys()]:
        for path in ready:
            del used[path]
    assert not used, "these import each other"


def shared_imports(path: Path) -> set[Path]:
    """The files of engine and tasks that one imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {EXAMPLES / (name.replace(".", "/") + ".py") for name in found} & set(SHARED)


def test_public_names_are_re_exported_by_name():
    tree = ast.parse((ROOT / "mvmae" / "__init__.py").read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Import), f"mvmae/__init__.py:{node.lineno}: from .x import Y as Y"
        if isinstance(node, ast.ImportFrom) and node.level:
            assert [alias.asname for alias in node.names] == [alias.name for alias in node.names]


def public_names() -> list[str]:
    tree = ast.parse((ROOT / "mvmae" / "__init__.py").read_text())
    return [alias.name for node in ast.walk(tree) if getattr(node, "level", 0) for alias in node.names]


def test_a_public_name_has_a_docstring_of_its_own():
    for name in public_names():
        thing = getattr(mvmae, name)
        assert (thing.__doc__ or "").strip(), name
        if inspect.isclass(thing):  # not the one that NamedTuple or dataclass made up
            assert "__doc__" in vars(thing) and not thing.__doc__.startswith(f"{name}(")


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_imports_no_extra_and_nothing_that_is_not_re_exported():
    # timm and its own dependencies first: what they import is not ours to judge
    new = run_python(
        "import sys, timm, torchvision, huggingface_hub, safetensors.torch, PIL.Image; before = set(sys.modules);"
        "import mvmae; print(*set(sys.modules) - before)"
    )
    extras = {"matplotlib", "tqdm", "skimage", "scipy", "sklearn", "pyarrow", "datasets", "pycocotools"}
    extras |= {"onnx", "onnxscript", "onnxruntime"}
    assert {name.split(".")[0] for name in new} & extras == set()
    assert "mvmae" in new
    loaded = {name.removeprefix("mvmae.") for name in new if name.startswith("mvmae.")}
    doors = {name.removesuffix(".__init__") for name in reached("__init__")}
    assert loaded == doors | {name.rpartition(".")[0] for name in doors} - {""}
    assert loaded and not loaded & ROOMS.keys(), "a room is imported by those who use it"


def test_the_transforms_are_public_names_although_their_room_is_imported_later():
    code = "import sys, mvmae; print(*{*dir(mvmae)} & {'MultiViewTransform'}, 'mvmae.data' in sys.modules);"
    code += "from mvmae import CentreCropTransform, MultiViewTransform; import mvmae.data as data;"
    code += "print(CentreCropTransform is mvmae.CentreCropTransform is data.CentreCropTransform);"
    code += "print(MultiViewTransform is mvmae.MultiViewTransform is data.MultiViewTransform)"
    assert run_python(code) == ["MultiViewTransform", "False", "True", "True"]


def test_a_module_is_imported_when_it_is_first_asked_for():
    names = [path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"]
    names = [name for name in names if not name.startswith("__")]
    code = "import mvmae; print(*(getattr(mvmae, name).__name__ for name in {!r}), *dir(mvmae))"
    found = run_python(code.format(names))
    assert found[: len(names)] == [f"mvmae.{name}" for name in names]
    assert set(found[len(names) :]) >= {*names, *public_names()}
    assert not hasattr(mvmae, "nothing")
    with pytest.raises(ImportError, match="nothing"):
        exec("from mvmae import nothing")


def test_the_docstring_of_the_package_names_every_module():
    named = re.findall(r"``(\w+)``", (mvmae.__doc__ or "").partition("Where to read:")[2])
    assert sorted(named) == sorted([*(root_modules() - {"__init__"}), *(set(ROOMS) - {""})])


def test_the_top_level_of_the_repository_holds_what_it_should():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode or not git.stdout or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in git.stdout.splitlines()}
    wanted = {"mvmae", "examples", "tests", "setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} == wanted
