"""The layers of the package: what a module may import, held against what it does import."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mvmae

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "mvmae").glob("*.py"))
ABOVE = "(all above)"

# module: siblings | third party | third party that only a function may import, when it is called
LAYERS = {
    "patches": ("", "torch", ""),
    "masking": ("", "torch", ""),
    "losses": ("patches", "torch", ""),
    "metrics": ("", "torch", ""),
    "pixels": ("", "numpy", ""),
    "limits": ("", "", ""),
    "images": ("limits pixels", "torch numpy PIL", "simplejpeg tifffile"),
    "views": ("images pixels", "torch numpy PIL", ""),
    "folders": ("images", "numpy", ""),
    "archives": ("limits images pixels folders", "numpy", "pyarrow"),
    "sample": ("folders images pixels", "numpy", "skimage"),
    "sources": ("images folders archives sample", "torch numpy timm PIL", ""),
    "data": ("images folders", "torch", ""),
    "slots": ("", "torch", ""),
    "loading": ("data slots", "torch", ""),
    "channels": ("folders images", "torch", ""),
    "augment": ("images", "torch numpy", ""),
    "drift": ("", "torch", ""),
    "rotary": ("", "torch timm", ""),
    "encoding": ("masking patches rotary", "torch timm", ""),
    "attention": ("encoding", "torch", ""),
    "pretrained": ("", "torch timm safetensors huggingface_hub", ""),
    "encoders": ("masking patches pretrained", "torch timm", ""),
    "architecture": ("encoders encoding pretrained", "torch timm", ""),
    "decoder": ("masking patches", "torch timm", ""),
    "model": ("patches masking losses metrics encoding encoders decoder pretrained architecture", "torch timm", ""),
    "accumulation": ("masking model", "torch", ""),
    "windows": ("", "torch timm", ""),
    "dense": ("patches encoding windows", "torch timm torchvision", ""),
    "upernet": ("", "torch", ""),
    "visualize": (ABOVE, "torch numpy PIL", ""),
    "card": ("pretrained", "", ""),
    "checkpoints": ("encoders encoding model patches pretrained", "torch timm", ""),
    "hub": (ABOVE, "torch timm safetensors huggingface_hub", ""),
    "__init__": (ABOVE, "", "(computed)"),
}


def allowed(module: str) -> tuple[set[str], set[str], set[str]]:
    """Siblings, third party, and third party inside functions, that `module` may import."""
    siblings, third_party, lazy = LAYERS[module]
    above = list(LAYERS)[: list(LAYERS).index(module)]
    return set(above if siblings == ABOVE else siblings.split()), set(third_party.split()), set(lazy.split())


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, str, bool]]:
    """Each import of a tree: the node, the name (`.views` for a sibling, `torch` for a package), inside a function."""
    for node in ast.iter_child_nodes(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            # `from mvmae import views` is the module, and `from mvmae import MultiViewMAE` the package itself
            names = [f"mvmae.{alias.name}" for alias in node.names] if node.module == "mvmae" else [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            names = [dots + node.module] if node.module else [dots + alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            names = [ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "(computed)"]
        for name in names:
            own = name.removeprefix("mvmae") if name.split(".")[0] == "mvmae" else name
            yield (
                node,
                own if own.startswith("..") else ".".join(own.split(".")[: 2 if own.startswith(".") else 1]),
                inside,
            )
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_optional(node)
        yield from imports(node, inside or function)


def is_optional(node: ast.AST) -> bool:
    """An import that may fail: `try`, with `except ImportError`."""
    return isinstance(node, ast.Try) and any(ast.unparse(h.type or node) == "ImportError" for h in node.handlers)


def problems(module: str, source: str) -> list[str]:
    """What breaks the rules in the source of a module: imports outside its layer, `print`, `assert`."""
    tree = ast.parse(source)
    siblings, third_party, lazy = allowed(module)
    found = []
    for node, name, inside in imports(tree):
        good = {f".{sibling}" for sibling in siblings} | third_party | sys.stdlib_module_names | (lazy if inside else set())
        if name not in good:
            found.append(f"mvmae/{module}.py:{node.lineno}: imports {name or 'mvmae'}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(f"mvmae/{module}.py:{node.lineno}: assert; raise ValueError or TypeError instead")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"mvmae/{module}.py:{node.lineno}: print; use logging instead")
    return found


def test_the_table_allows_no_import_upward():
    for number, module in enumerate(LAYERS):
        assert allowed(module)[0] <= set(list(LAYERS)[:number]), module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_its_layer(path):
    assert path.stem in LAYERS, f"{path.name} is not in the table: say what it may import"
    assert problems(path.stem, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("patches", "import timm"),
        ("patches", "def f():\n    import numpy"),
        ("patches", "from .masking import Mask"),
        ("losses", "from . import masking"),
        ("losses", "from mvmae.masking import Mask"),
        ("losses", "from mvmae import masking"),
        ("losses", "import mvmae.masking"),
        ("losses", "import mvmae"),
        ("encoders", "def f():\n    from .model import MultiViewMAE"),
        ("model", "from .data import read"),
        ("model", "from . import hub"),
        ("model", "import examples.common"),
        ("model", "import common"),
        ("model", "from ..examples import common"),
        ("model", "import importlib\n\ndef f(name):\n    importlib.import_module(name)"),
        ("images", "import simplejpeg"),
        ("sources", "import importlib\nimportlib.import_module('skimage.data')"),
        ("hub", "print('saved')"),
        ("hub", "def f(x):\n    assert x"),
    ],
)
def test_the_rules_catch(module, source):
    assert len(problems(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("patches", "import math\nfrom collections.abc import Sequence\nimport torch.nn.functional as F"),
        ("images", "def f():\n    import simplejpeg"),
        ("images", "try:\n    import simplejpeg\nexcept ImportError:\n    pass"),
        ("sample", "def f():\n    import importlib\n    return importlib.import_module('skimage.data')"),
        ("model", "from .losses import NTXentLoss\nfrom . import masking\nfrom torch import nn"),
        ("hub", "from .model import MultiViewMAE\nfrom .visualize import draw\nlog.print('no builtin')"),
    ],
)
def test_the_rules_let_pass(module, source):
    assert problems(module, source) == []


def test_what_the_examples_share_knows_nothing_of_the_method():
    for name in ("options.py", "common.py", "checkpoint.py", "course.py", "locks.py", "snapshot.py"):
        found = [module for _, module, _ in imports(ast.parse((ROOT / "examples" / name).read_text()))]
        assert found
        own = {module for module in found if not module or module.startswith(".")}
        assert own <= ({".loading"} if name == "common.py" else set()), name  # a loader's errors end any run


def test_public_names_are_re_exported_by_name():
    tree = ast.parse((ROOT / "mvmae" / "__init__.py").read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Import), f"mvmae/__init__.py:{node.lineno}: from .x import Y as Y"
        if isinstance(node, ast.ImportFrom) and node.level:
            assert [alias.asname for alias in node.names] == [alias.name for alias in node.names]


def public_names() -> list[str]:
    tree = ast.parse((ROOT / "mvmae" / "__init__.py").read_text())
    return [alias.name for node in ast.walk(tree) if getattr(node, "level", 0) for alias in node.names]


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_has_a_docstring_of_its_own(name):
    thing = getattr(mvmae, name)
    doc = thing.__doc__ or ""
    assert doc.strip()
    if inspect.isclass(thing):
        assert "__doc__" in vars(thing)
        assert not doc.startswith(f"{name}("), "the docstring that NamedTuple or dataclass made up"


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
    assert {name.split(".")[0] for name in new} & extras == set()
    assert "mvmae" in new
    loaded = {name.removeprefix("mvmae.") for name in new if name.startswith("mvmae.")}
    assert loaded == reached("__init__")


def test_a_module_is_imported_when_it_is_first_asked_for():
    names = [path.stem for path in MODULES if path.stem != "__init__"]
    code = "import mvmae; print(*(getattr(mvmae, name).__name__ for name in {!r}), *dir(mvmae))"
    found = run_python(code.format(names))
    assert found[: len(names)] == [f"mvmae.{name}" for name in names]
    assert set(found[len(names) :]) >= {*names, *public_names()}
    assert not hasattr(mvmae, "nothing")
    with pytest.raises(ImportError, match="nothing"):
        exec("from mvmae import nothing")


def reached(module: str) -> set[str]:
    """The siblings that come with a module: those it imports outside functions, and so on."""
    path = ROOT / "mvmae" / f"{module}.py"
    direct = {name[1:] for _, name, inside in imports(ast.parse(path.read_text())) if name.startswith(".") and not inside}
    return direct.union(*(reached(name) for name in direct))


def test_the_top_level_of_the_repository_holds_what_it_should():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode or not git.stdout or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in git.stdout.splitlines()}
    wanted = {"mvmae", "examples", "tests", "setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} == wanted
