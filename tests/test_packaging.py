"""What the package promises to those who install it: its version, its dependencies, its names and signatures."""

import importlib.metadata
import inspect
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_layers import ROOMS

import mvmae

COMES_WITH = {"torchvision": "timm", "numpy": "torchvision"}
"""Modules that come with a dependency whose business they are."""
PROVIDERS = {"skimage": ["scikit-image"], **importlib.metadata.packages_distributions()}  # Python 3.10 reads no RECORD
REQUIREMENTS = [Requirement(line) for line in importlib.metadata.requires("mvmae") or []]


def extra(requirement: Requirement) -> str:
    """The extra that asks for a requirement, "" for a dependency."""
    found = re.search(r'extra == "([^"]+)"', str(requirement.marker or ""))
    return found.group(1) if found else ""


def test_the_version_is_the_installed_one():
    assert importlib.metadata.version("mvmae") == mvmae.__version__, 'install again: pip install -e ".[test]"'


def test_a_dependency_has_a_lower_bound_and_is_not_pinned():
    for requirement in REQUIREMENTS:
        if requirement.name != "mvmae":  # an extra that holds another one
            operators = [specifier.operator for specifier in requirement.specifier]
            assert operators.count(">=") == 1 and set(operators) <= {">=", "<", "!="}, requirement


def test_what_the_modules_may_import_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS if extra(requirement) != "lint"}
    allowed = {name for names in ROOMS.values() for part in names for name in part.split()}
    distributions = {name: PROVIDERS.get(name, [name]) for name in allowed - COMES_WITH.keys()}
    assert [name for name, own in distributions.items() if not declared & set(map(canonicalize_name, own))] == []
    for module, parent in COMES_WITH.items():
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


def test_a_public_signature_keeps_what_was_promised():
    for name, parameters in SIGNATURES.items():
        thing = mvmae
        for part in name.split("."):
            thing = getattr(thing, part)
        promised = inspect.signature(eval(f"lambda {parameters}: None"))
        assert differences(promised, inspect.signature(thing)) == [], name
