"""What the package promises to those who install it: its version, its dependencies, its names and signatures."""

import ast
import importlib.metadata
import inspect
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mvmae

ROOT = Path(__file__).parents[1]
PROVIDERS = {"skimage": ["scikit-image"], **importlib.metadata.packages_distributions()}  # Python 3.10 reads no RECORD
REQUIREMENTS = [Requirement(line) for line in importlib.metadata.requires("mvmae") or []]


def extra(requirement: Requirement) -> str:
    """The extra that asks for a requirement, "" for a dependency."""
    found = re.search(r'extra == "([^"]+)"', str(requirement.marker or ""))
    return found.group(1) if found else ""


def test_the_version_is_the_installed_one():
    assert importlib.metadata.version("mvmae") == mvmae.__version__, 'install again: pip install -e ".[test]"'


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_dependency_has_a_lower_bound_and_is_not_pinned(requirement):
    if requirement.name != "mvmae":  # an extra that holds another one
        operators = [specifier.operator for specifier in requirement.specifier]
        assert operators.count(">=") == 1
        assert set(operators) <= {">=", "<", "!="}


def distributions_of(module: str) -> set[str]:
    """The distributions that provide a top-level module, by the names that requirements use."""
    return {canonicalize_name(name) for name in PROVIDERS.get(module, [module])}


def imported(path: Path) -> tuple[set[str], set[str]]:
    """Top-level third-party modules that a file imports when it is itself imported, and those inside functions or `try`."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    at_once, lazily = set(), set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        (lazily if id(node) in inside else at_once).update(name.split(".")[0] for name in names)
    own = {*sys.stdlib_module_names, "mvmae"}
    return at_once - own, lazily - own


# modules that come with a dependency whose business they are: torchvision with timm, numpy with torchvision
COMES_WITH = {"torchvision": "timm", "numpy": "torchvision"}


@pytest.mark.parametrize("path", sorted((ROOT / "mvmae").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_module_imports_is_declared(path):
    dependencies = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS if not extra(requirement)}
    extras = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS if extra(requirement) not in ("", "lint")}
    at_once, lazily = imported(path)
    for module in at_once:
        assert distributions_of(module) & dependencies or module in COMES_WITH, f"declare {module}"
    for module in lazily:
        assert distributions_of(module) & (dependencies | extras) or module in COMES_WITH, f"an extra for {module}"


@pytest.mark.parametrize(("module", "parent"), COMES_WITH.items())
def test_what_is_not_declared_comes_with_a_dependency(module, parent):
    requirements = map(Requirement, importlib.metadata.requires(parent) or [])
    assert module in {requirement.name for requirement in requirements if not extra(requirement)}


# Parameters may be added, with defaults; what stands here stays.
SIGNATURES = {
    "MultiViewMAE": "encoder, *, decoder_dim=512, decoder_depth=4, decoder_heads=16, mask_ratio=0.8, loss_weight=2.0, "
    "temperature=0.07, pool='avg', projector=None, norm_pix=True, loss_on='masked', contrastive_loss=None, "
    "reconstruction_loss=None",
    "MultiViewMAE.forward": "self, views, *, mask=None, generator=None, loss_weight=None",
    "backward_in_parts": "model, views, parts, *, mask, loss_weight=None",
    "NTXentLoss": "temperature=0.07, *, gather=True, chunk_size=None",
    "NTXentLoss.forward": "self, z",
    "ReconstructionLoss": "*, norm_pix=True, loss_on='masked'",
    "ReconstructionLoss.forward": "self, pred, target, masked",
    "MAEDecoder.forward": "self, tokens, mask",
    "MultiViewTransform": "image_size=224, *, num_views=2, scale=(0.2, 1.0)",
    "MultiViewTransform.__call__": "self, image, *, generator=None",
    "random_mask": "batch_size, length, mask_ratio, *, generator=None, device=None",
    "patchify": "images, patch_size",
    "unpatchify": "patches, patch_size, grid_size, in_chans",
    "encode_visible": "vit, images, mask",
    "embed": "model, source, *, split='train', image_size=0, background=None, value_range=None, batch_size=64, num_workers=0",
}


def differences(promised: inspect.Signature, actual: inspect.Signature) -> list[str]:
    """What a call that the promised signature allows would find changed."""
    old, new = promised.parameters, actual.parameters
    found = [f"{name} is gone" for name in old.keys() - new.keys()]
    for name in old.keys() & new.keys():
        kind_and_default = [(one[name].kind, one[name].default) for one in (old, new)]
        if kind_and_default[0] != kind_and_default[1]:
            found.append(f"{name} was {old[name]} and is {new[name]}")
    found += [
        f"{name} is new, without a default"
        for name in new.keys() - old.keys()
        if new[name].default is inspect.Parameter.empty and new[name].kind is not inspect.Parameter.VAR_KEYWORD
    ]
    positional = [name for name in old if old[name].kind is not inspect.Parameter.KEYWORD_ONLY]
    return found if list(new)[: len(positional)] == positional else [*found, f"the order is {list(new)}"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_public_signature_keeps_what_was_promised(name):
    thing = mvmae
    for part in name.split("."):
        thing = getattr(thing, part)
    promised = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None"))
    assert differences(promised, inspect.signature(thing)) == []
