"""From a model to a folder, to the Hub, and back: in timm, in transformers, in this package, each in a process of its own."""

import argparse
import dataclasses
import importlib.util
import inspect
import io
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from hub_server import Hub, Repo
from PIL import Image
from test_model import slow_positions
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mvmae
from mvmae import hub
from mvmae.inputs import Inputs
from mvmae.weights import WeightsError, read_weights, sha256

ROOT = Path(__file__).parents[1]
NAME = "me/mvmae_vit_tiny_patch16.untrained"
TINY = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
BLOCKED = """import sys
sys.modules["mvmae"] = None  # as if it were not installed
try:
    import mvmae
    raise SystemExit("mvmae can be imported here")
except ImportError:
    pass
"""


def tiny_mae(encoder: str = "mvmae_vit_tiny_patch16", projector: bool = True, **kwargs: Any) -> Any:
    vit = timm.create_model(encoder, **({"patch_size": 8} | TINY | kwargs))
    head = mvmae.projection_mlp(48, 16, 8) if projector else None
    return mvmae.MultiViewMAE(vit, decoder_dim=32, decoder_depth=1, decoder_heads=4, mask_ratio=0.5, projector=head).eval()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def hub_repo(folder: Path) -> Repo:
    repo = Repo()
    repo.commit(files_of(folder))
    return repo


def client(code: str, home: Path, endpoint: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code with the real client, in a fresh process that knows of no Hub but this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MVMAE_"))}
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    own = {"PYTHONPATH": str(ROOT), "NO_PROXY": "*", "no_proxy": "*", "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + textwrap.dedent(code), *arguments]
    environment = {**kept, **hub, **own, **environment}
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=900)


def features(code: str, home: Path, endpoint: str, images: Path, **environment: str) -> torch.Tensor:
    """Runs code that sets `features` for `images`, and gives them."""
    blocked = BLOCKED if code.startswith(BLOCKED) else ""
    first = f"import safetensors.torch\nimages = safetensors.torch.load_file({str(images)!r})['images']\n"
    last = "\nsafetensors.torch.save_file({'features': features.detach()}, 'features.safetensors')"
    done = client(blocked + first + textwrap.dedent(code.removeprefix(blocked)) + last, home, endpoint, **environment)
    assert done.returncode == 0, done.stderr
    return safetensors.torch.load_file(home / "features.safetensors")["features"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path, Path, torch.Tensor]]:
    """A run on a Hub: the Hub, the folder of the run, images, and the run's own features of them."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    model = tiny_mae()
    images = torch.randn(2, 3, 32, 32)
    safetensors.torch.save_file({"images": images}, folder / "images.safetensors")
    hub.export(model, folder / "run")
    hub.write_card(folder / "run", repo=NAME, datasets=["imagenet-1k"], metrics={"k-NN": 12.5})
    with Hub() as server:
        server.repos[NAME] = hub_repo(folder / "run")
        yield server, folder / "run", folder / "images.safetensors", model.encoder.forward_features(images).detach()


def test_the_card_says_what_is_known_and_no_more(published):
    card = (published[1] / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    entries = dict(line.split(": ", 1) for line in metadata.splitlines())
    assert json.loads(entries["license"]) == "apache-2.0"
    assert json.loads(entries["library_name"]) == "timm"
    assert json.loads(entries["datasets"]) == ["imagenet-1k"]
    assert "- `k-NN`: 12.5" in text
    assert "- Command: not recorded" in text
    assert sha256(published[1] / "model.safetensors") in text


EVIL = "<img src=x>\n\n## Measured\n\n- top-1: 99.9 ``` `` [a](http://b) \x1b[31m"


@pytest.mark.parametrize("weights", [EVIL, ""])  # what is empty must not open a quotation that the next text closes
def test_f60_what_others_wrote_is_quoted_in_the_card_and_paths_stay_at_home(weights, tmp_path):
    started = {"weights": weights, "license": EVIL, "training": EVIL}
    hub.export(timm.create_model("mvmae_vit_tiny_patch16", **TINY), tmp_path, started_from=started, training=EVIL)
    settings = {"data": "/home/me/secret", "model": "/home/me", "epochs": 3, "encoder_args": EVIL}
    settings |= {"an_option_of_tomorrow": 0.1, "crop_scale": [0.2, 1.0], "files": ["/home/me"]}
    path = hub.write_card(tmp_path, repo="me/x", command=EVIL, datasets=[EVIL], metrics={EVIL: 1.0}, settings=settings)
    _, _, text = path.read_text().split("---\n", 2)
    outside = re.sub(r"(?ms)^```json\n.*?^```$", "", text)  # a fence that no line of JSON can close
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    assert "<" not in outside and "99.9" not in outside and "http" not in outside and "\x1b" not in text
    assert text.count("\n## Measured") == 1
    shown = json.loads(re.findall(r"(?ms)^```json\n(.*?)^```$", text)[0])
    assert shown == {"epochs": 3, "encoder_args": EVIL, "an_option_of_tomorrow": 0.1, "crop_scale": [0.2, 1.0]}
    assert "/home/me" not in text


WAYS = {
    "timm without mvmae, from a folder and the Hub": f"""{BLOCKED}import timm, torch
vits = [timm.create_model(name, pretrained=True).eval() for name in ("local-dir:FOLDER", "hf-hub:{NAME}")]
features = torch.stack([vit.forward_features(images) for vit in vits])
""",
    "transformers without mvmae": f"""{BLOCKED}from transformers import AutoModel
features = AutoModel.from_pretrained("{NAME}").eval()(images).last_hidden_state
""",
    "mvmae, and timm by its names": f"""import timm, torch, mvmae
sizes = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, pretrained_cfg_overlay=dict(hf_hub_id="{NAME}"))
named = timm.create_model("mvmae_vit_tiny_patch16", pretrained=True, **sizes)
whole = mvmae.MultiViewMAE.from_pretrained("{NAME}")
features = torch.stack([vit.eval().forward_features(images) for vit in (named, whole.encoder)])
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_process_gets_the_runs_features(way, published, tmp_path):
    server, folder, images, expected = published
    if "transformers" in way:
        pytest.importorskip("transformers")
    code = WAYS[way].replace("FOLDER", str(folder))
    found = features(code, tmp_path, server.endpoint, images)
    assert found.shape[-3:] == expected.shape and (found - expected).abs().max() <= 1e-6
    if "names" in way:  # the cache serves offline
        offline = features(code, tmp_path, "http://127.0.0.1:9", images, HF_HUB_OFFLINE="1")
        assert torch.equal(offline, found)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_loads_a_fine_tuned_head_with_its_names(tmp_path):
    vit = timm.create_model("mvmae_vit_tiny_patch16", **TINY, num_classes=3).eval()
    hub.export(vit, tmp_path / "run", mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], label_names=["cat", "dog", "eel"])
    images = torch.randn(2, 3, 32, 32)
    safetensors.torch.save_file({"images": images}, tmp_path / "images.safetensors")
    code = f"""{BLOCKED}
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({str(tmp_path / "run")!r}).eval()
assert model.config.id2label == {{0: "cat", 1: "dog", 2: "eel"}}, model.config.id2label
processor = AutoImageProcessor.from_pretrained({str(tmp_path / "run")!r})
assert list(processor.data_config["mean"]) == [0.1, 0.2, 0.3], processor.data_config
features = model(images).logits
"""
    found = features(code, tmp_path, "http://127.0.0.1:9", tmp_path / "images.safetensors", HF_HUB_OFFLINE="1")
    assert (found - vit(images)).abs().max() <= 1e-6


OLD_CLIENT = int(huggingface_hub.__version__.split(".")[0]) < 1
"""Before 1.0 the client does not try again after a 503, and reads offline mode once, when it is imported."""

FAILURES = [
    ("create('hf-hub:me/nothing')", ["me/nothing", "there is no", "hf auth login"]),
    ("load('me/nothing')", ["me/nothing", "there is no"]),
    ("create('mvmae_vit_base_patch16')", ["no weights of mvmae_vit_base_patch16 exist", "local-dir:", "hf-hub:"]),
    ("create('hf-hub:me/gated')", ["me/gated", "gated", "hf auth login"]),
    ("create('hf-hub:me/good@' + '0' * 40)", ["me/good", "no revision", "0" * 40]),
    ("load('me/good', revision='v9')", ["me/good", "no revision", "v9"]),
    ("create('mvmae_vit_tiny_patch16', hf_hub_id='me/good@v9')", ["me/good", "no revision", "v9"]),
    ("load('me/encoder')", ["me/encoder", "holds no pretraining/pretraining.json"]),
    ("create('hf-hub:me/truncated')", ["model.safetensors", "cut or damaged"]),
    ("load('me/truncated')", ["pretraining.safetensors", "sha256 differs"]),
    ("create('hf-hub:me/page')", ["model.safetensors", "cut or damaged"]),
    ("faults('model', 0) or create('hf-hub:me/good')", ["model.safetensors of me/good cannot be transferred"]),
    ("faults('', 0) or cached('me/good', 'config.json') or 1 / 0", []),
    ("cached('me/good', 'model.safetensors') and 1 / 0", []),
    ("faults('', 1000) or load('me/good')", ["pretraining/pretraining.json of me/good", "503"]),
    ("faults('', 2) or create('hf-hub:me/good')", []),
    ("create('hf-hub:me/moved@FIRST')", []),
    ("load('me/moved', revision='FIRST')", []),
    ("create('hf-hub:me/moved')", ["model.safetensors", "cut or damaged"]),
    ("create('hf-hub:me/good', embed_dim=96)", ["hf-hub:me/good does not fit", "cls_token", "30 such"]),
    ("create('mvmae_vit_tiny_patch16', hf_hub_id='me/good', embed_dim=96)", ["model.safetensors", "cls_token is (1, 1, 48)"]),
    *((f"create('hf-hub:me/evil_{name}')", ["names 'evil.bin'", "only .safetensors are read"]) for name in ("timm", "mvmae")),
    ("timm.create_model('hf-hub:me/evil_mvmae', pretrained=True)", ["names 'evil.bin'", "only .safetensors are read"]),
    ("push(FOLDER, 'me/gated', private=True)", ["me/gated exists and is public"]),
    ("push('.', 'me/gated')", ["holds no model.safetensors"]),
    ("load('a b')", ["must be an existing folder or a repository"]),
    ("load('local-dir:/no')", ["must be an existing folder"]),
    ("load('')", ["holds no"]),
]
CALLS = """
import json, sys, time, urllib.request, huggingface_hub, timm, mvmae
from huggingface_hub import constants
from mvmae.hub import push
from mvmae import WeightsError
time.sleep = lambda seconds: None  # the client waits 23 seconds in all between its tries
def create(name, hf_hub_id=None, **kwargs):
    overlay = {"pretrained_cfg_overlay": {"hf_hub_id": hf_hub_id}} if hf_hub_id else {}
    return mvmae.create_model(name, pretrained=True, **overlay, **kwargs)
def faults(cut, errors):
    urllib.request.urlopen(f"{constants.ENDPOINT}/test/{cut}/{errors}").close()
def cached(repo, name):
    return isinstance(huggingface_hub.try_to_load_from_cache(repo, name), str)
load = mvmae.MultiViewMAE.from_pretrained
said = []
for call in sys.argv[1:]:
    try:
        eval(call)
        said.append("")
    except WeightsError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def said(home: Path, endpoint: str, *calls: str, **environment: str) -> list[str]:
    """Gives what each call is refused with, in a fresh process; an empty text where it is not."""
    done = client(CALLS, home, endpoint, *calls, **environment)
    assert done.returncode == 0, done.stderr
    messages: list[str] = json.loads(done.stdout.splitlines()[-1])
    assert not any("\n" in message for message in messages)
    return messages


def test_what_goes_wrong_on_the_hub_is_said_in_one_line(published, tmp_path):
    good = files_of(published[1])
    cut = {name: data[:-100] for name, data in good.items() if name.endswith(".safetensors")}
    contents = {
        "good": good,
        "gated": good,
        "encoder": {name: good[name] for name in ("config.json", "model.safetensors")},
        "truncated": good | cut,
        "page": {**good, "model.safetensors": b"<html>" + b" " * 100},
    }
    for name, architecture in (("timm", "vit_tiny_patch16_224"), ("mvmae", "mvmae_vit_tiny_patch16")):
        config = json.loads(good["config.json"]) | {"architecture": architecture}
        config["pretrained_cfg"]["hf_hub_filename"] = "evil.bin"  # which the loader of timm would unpickle
        contents[f"evil_{name}"] = {**good, "config.json": json.dumps(config).encode(), "evil.bin": saved({})}
    with Hub() as server:
        for name, files in contents.items():
            server.repos[f"me/{name}"] = repo = Repo()
            repo.commit(files)
            repo.gated = name == "gated"
        server.repos["me/moved"] = Repo()
        first, _ = server.repos["me/moved"].commit(good), server.repos["me/moved"].commit(cut)
        calls = [call.replace("FOLDER", repr(str(published[1]))).replace("FIRST", first) for call, _ in FAILURES]
        messages = said(tmp_path, server.endpoint, *calls)
        assert server.errors == 0  # the client met both before it succeeded
        assert len(server.repos["me/gated"].commits) == 1
        assert not any("evil.bin" in request or "a b" in request for request in server.requests)
    for message, (call, parts) in zip(messages, FAILURES, strict=True):
        if "faults('', 2)" in call and OLD_CLIENT:
            continue
        assert all(part in message for part in parts) and bool(message) == bool(parts), f"{call}: {message}"


def test_without_network_and_cache_the_cause_is_one_line(tmp_path):
    calls = ["create('hf-hub:me/good')", "create('mvmae_vit_base_patch16', hf_hub_id='me/good')", "load('me/good')"]
    offline = "setattr(constants, 'HF_HUB_OFFLINE', True) or create('hf-hub:me/good')"
    messages = said(tmp_path, "http://127.0.0.1:9", *calls, offline)
    for message, repo in zip(messages, ["me/good"] * 4, strict=True):
        assert f" of {repo} is not in the cache {tmp_path}/hub, and http://127.0.0.1:9 cannot be reached" in message
    assert "refused" in messages[0]
    assert OLD_CLIENT or "offline mode" in messages[3]


ENCODERS = {
    "mvmae_vit_base_patch16": ("vit_base_patch16_224", {"in_chans": 1, "img_size": (32, 64), "dynamic_img_size": True}),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", {"drop_path_rate": 0.1, "num_classes": 7}),
    "vit_base_patch16_clip_quickgelu_224": ("vit_base_patch16_clip_quickgelu_224", {}),
    "deit3_small_patch16_224": ("deit3_small_patch16_224", {"in_chans": 4}),
    "vit_little_patch16_reg1_gap_256": ("vit_little_patch16_reg1_gap_256", {"qk_norm": True, "act_layer": "relu"}),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_any_encoder_comes_back_by_its_own_name_with_the_same_features(name, tmp_path):
    plain, kwargs = ENCODERS[name]
    torch.manual_seed(2)
    model = tiny_mae(name, **kwargs)
    chans = model.encoder.patch_embed.proj.in_channels
    hub.export(model, tmp_path, mean=[0.4] * chans, std=[0.2] * chans)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == plain
    assert "num_classes" not in config["model_args"]
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, chans, *model.encoder.patch_embed.img_size)
    assert torch.equal(other(images), model.encoder(images))
    assert list(other.pretrained_cfg["mean"]) == [0.4] * chans
    assert list(timm.data.resolve_model_data_config(other)["input_size"]) == list(images.shape[1:])
    whole = mvmae.MultiViewMAE.from_pretrained(tmp_path).eval()
    assert (whole.encoder.pretrained_cfg["mean"], whole.encoder.pretrained_cfg["std"]) == ((0.4,) * chans, (0.2,) * chans)
    assert str(whole) == str(model)  # the regularisers, which the encoder's own config leaves out, among others
    assert [p.requires_grad for p in whole.parameters()] == [p.requires_grad for p in model.parameters()]
    views = torch.stack([images, images.roll(1, 0)], dim=1)
    outputs = [mae(views, generator=torch.Generator().manual_seed(0)) for mae in (model, whole)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)


class Head(torch.nn.Module):
    """A projector of somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / 2


def batch_norm_mlp() -> torch.nn.Module:
    """A head as SimCLR's and BYOL's code has it."""
    norms = [torch.nn.BatchNorm1d(16, eps=1e-3), torch.nn.BatchNorm1d(8, affine=False)]
    linears = [torch.nn.Linear(48, 16, bias=False), torch.nn.Linear(16, 8, bias=False)]
    return torch.nn.Sequential(linears[0], norms[0], torch.nn.GELU(), linears[1], norms[1])


HEADS = {
    "batch norm": (batch_norm_mlp, True),
    "our batch norm": (lambda: mvmae.projection_mlp(48, 16, 8, depth=3, batch_norm=True), True),
    "layer norm": (lambda: torch.nn.Sequential(torch.nn.Linear(48, 8), torch.nn.LayerNorm(8), torch.nn.Tanh()), True),
    "dropout": (lambda: torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(48, 8)), True),
    "one layer": (lambda: torch.nn.Linear(48, 8), False),
    "nested": (lambda: torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(48, 8)), torch.nn.ReLU()), False),
    "another's": (Head, False),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_model_with_any_projector_is_exported_and_comes_back(kind, tmp_path, caplog):
    build, described = HEADS[kind]
    model = mvmae.MultiViewMAE(tiny_mae().encoder, decoder_dim=32, decoder_depth=1, decoder_heads=4, projector=build()).eval()
    hub.export(model, tmp_path)
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model.encoder(images))
    options = {} if described else {"projector": build()}
    if described:
        assert caplog.messages == []
    else:
        assert "the projector, a" in caplog.text and "cannot be described in a file" in caplog.text
        with pytest.raises(WeightsError, match="pass one like it as projector="):
            mvmae.MultiViewMAE.from_pretrained(tmp_path)
    loaded = mvmae.MultiViewMAE.from_pretrained(tmp_path, **options).eval()
    views = torch.stack([images, images.roll(1, 0)], dim=1)
    assert str(loaded) == str(model)
    outputs = [mae(views, generator=torch.Generator().manual_seed(0)) for mae in (model, loaded)]
    assert torch.equal(outputs[0].projected, outputs[1].projected)


def test_every_option_of_a_pretraining_model_comes_back(tmp_path):
    options = {"mask_ratio": 0.6, "loss_weight": 0.5, "pool": "token", "norm_pix": False, "loss_on": "all"}
    decoder = {"decoder_dim": 48, "decoder_depth": 2, "decoder_heads": 6}
    nt_xent = {"temperature": 0.2, "gather": False, "chunk_size": 30_000}
    keywords = inspect.signature(mvmae.MultiViewMAE).parameters.keys() - {"encoder", "projector", "temperature"}
    assert options.keys() | decoder.keys() | {"contrastive_loss", "reconstruction_loss"} == keywords  # a new one: try it here
    vit = timm.create_model("mvmae_vit_tiny_patch16", **TINY)
    model = mvmae.MultiViewMAE(vit, contrastive_loss=mvmae.NTXentLoss(**nt_xent), **options, **decoder)
    model.save_pretrained(tmp_path)
    other = mvmae.MultiViewMAE.from_pretrained(tmp_path)
    assert str(other) == str(model)
    assert hub.describe(other)["options"] == options | decoder | nt_xent
    rebuilt = hub.build(json.loads(json.dumps(hub.describe(model))))
    assert str(rebuilt) == str(model) and hub.describe(rebuilt) == hub.describe(model)


class Alignment(torch.nn.Module):
    """A contrastive loss of somebody else's, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.scale * (z[:, 0] - z[:, 1]).square().mean()


class Absolute(torch.nn.Module):
    """A reconstruction loss of somebody else's."""

    def forward(self, pred: torch.Tensor, target: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        return (pred - target).abs().mean(dim=-1)[masked].mean()


def test_a_model_with_losses_of_ones_own_is_saved_and_asks_for_them(tmp_path):
    own = {"contrastive_loss": Alignment(), "reconstruction_loss": Absolute()}
    model = mvmae.MultiViewMAE(tiny_mae().encoder, decoder_dim=32, decoder_depth=1, decoder_heads=4, **own)
    torch.nn.init.constant_(own["contrastive_loss"].scale, 3.0)
    hub.export(model, tmp_path)
    described = json.loads((tmp_path / "pretraining" / "pretraining.json").read_text())
    assert (described["contrastive_loss"], described["reconstruction_loss"]) == ("Alignment", "Absolute")
    given = {"contrastive_loss": Alignment(), "reconstruction_loss": Absolute()}
    for missing in given:
        others = {name: loss for name, loss in given.items() if name != missing}
        with pytest.raises(WeightsError, match=f"pass one like it as {missing}="):
            mvmae.MultiViewMAE.from_pretrained(tmp_path, **others)
    loaded = mvmae.MultiViewMAE.from_pretrained(tmp_path, **given)
    views, mask = torch.randn(3, 2, 3, 32, 32), mvmae.random_mask(6, 16, 0.5)
    outputs = [mae.eval()(views, mask=mask) for mae in (model, loaded, hub.build(hub.describe(model), **given))]
    assert outputs[0].loss_con == outputs[1].loss_con == 3 * (outputs[0].z[:, 0] - outputs[0].z[:, 1]).square().mean()
    assert outputs[0].loss == outputs[1].loss != outputs[2].loss
    with pytest.raises(TypeError, match="projector, a contrastive_loss or a reconstruction_loss, got .'loss'"):
        mvmae.MultiViewMAE.from_pretrained(tmp_path, loss=Alignment())


class Trainers(torch.nn.Module):
    """As trainers' frameworks wrap a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def with_wrapped_blocks(model):
    encoder = getattr(model, "encoder", model)
    for number, block in enumerate(encoder.blocks):
        encoder.blocks[number] = checkpoint_wrapper(block)
    return model


WRAPPED = [lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel, Trainers, with_wrapped_blocks]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_wrapped_model_is_exported_and_embeds_as_it_would_alone(wrap, tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    images = [np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8) for i in range(3)]
    expected = mvmae.embed(vit, images).features
    model = mvmae.MultiViewMAE(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    hub.export(wrap(model), tmp_path)
    assert mvmae.MultiViewMAE.from_pretrained(tmp_path).state_dict().keys() == {
        name.replace("._checkpoint_wrapped_module", "") for name in model.state_dict()
    }
    for encoder in (vit if wrap is with_wrapped_blocks else wrap(vit), tmp_path):
        assert torch.equal(mvmae.embed(encoder, images).features, expected)


def test_a_changed_encoder_is_described_as_it_is(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", **TINY)
    vit.set_input_size(img_size=(48, 64))
    vit.reset_classifier(4, "avg")
    hub.export(vit.eval(), tmp_path)
    images = torch.randn(1, 3, 48, 64)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), vit(images))


@pytest.mark.parametrize("options", [{"reg_tokens": 2, "init_values": 0.1}, {"class_token": False, "global_pool": "avg"}])
def test_an_encoder_built_by_hand_is_described_by_its_modules_or_refused(options, tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    vit = timm.models.VisionTransformer(**sizes, **options).eval()
    hub.export(vit, tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), vit(images))
    vit.blocks[1].attn.num_heads = 6  # of the same shapes
    with pytest.raises(WeightsError, match="blocks.1.attn.num_heads is 6, but 3 where timm builds it"):
        hub.export(vit, tmp_path, mean=[0.5] * 3, std=[0.5] * 3)


def test_how_images_are_read_is_one_record_of_the_export(tmp_path):
    vit = timm.create_model("mvmae_vit_tiny_patch16", **TINY)
    record = Inputs((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.75, "#102030", (0.0, 4095.0), 10**6)
    hub.export(vit, tmp_path / "whole", inputs=record)
    hub.export(vit, tmp_path / "changed", inputs=record, background="black", mean=None)
    hub.export(vit, tmp_path / "cfg")
    configs = {path.name: json.loads((path / "config.json").read_text()) for path in tmp_path.iterdir()}
    for config in (configs["whole"], {"inputs": json.loads(json.dumps(record.to_dict()))}):
        assert Inputs.from_config(config) == record
    assert Inputs.from_config(configs["changed"]) == dataclasses.replace(record, background="black")
    cfg = configs["whole"]["pretrained_cfg"]  # what timm reads says the same
    expected = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 0.75}
    assert {name: cfg[name] for name in expected} == expected
    assert Inputs.from_config(configs["cfg"]).mean == IMAGENET_DEFAULT_MEAN
    old = {name: value for name, value in configs["whole"].items() if name != "inputs"} | {"background": "black"}
    written_by_1c37e2a = Inputs((32, 32), record.mean, record.std, "bilinear", 0.75, "black")
    assert Inputs.from_config(old) == written_by_1c37e2a
    for content in ({}, {"inputs": {"sise": 3}}, {"inputs": {**record.to_dict(), "std": [1]}}):
        with pytest.raises(WeightsError, match="does not say how images are read"):
            Inputs.from_config(content)


@pytest.mark.parametrize("older", [False, True])
def test_a_model_that_is_loaded_and_exported_again_reads_images_as_before(older, tmp_path):
    vit = timm.create_model("mvmae_vit_tiny_patch16", **TINY)
    record = Inputs((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.75, "#102030", (0.0, 4095.0), 10**6)
    hub.export(mvmae.MultiViewMAE(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2), tmp_path / "first", inputs=record)
    file = tmp_path / "first/pretraining/pretraining.json"
    description = json.loads(file.read_text())
    if older:  # whose record is in config.json alone
        del description["encoder"]["inputs"]
        file.write_text(json.dumps(description))
    loaded = mvmae.MultiViewMAE.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "saved")
    hub.export(mvmae.MultiViewMAE.from_pretrained(tmp_path / "saved"), tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "again"))
    assert Inputs.from_config(again) == record and again["inputs"] == first["inputs"]
    assert again["pretrained_cfg"] == first["pretrained_cfg"]
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        deep = np.arange(4096, dtype=np.uint16).reshape(64, 64) // number
        Image.fromarray(deep).save(tmp_path / f"images/{number}.png")
    expected = mvmae.embed(tmp_path / "first", tmp_path / "images").features
    assert expected.isfinite().all() and not torch.equal(expected[0], expected[1])
    for model in (loaded.encoder, tmp_path / "again"):
        assert torch.equal(mvmae.embed(model, tmp_path / "images").features, expected)


@pytest.mark.parametrize(
    ("change", "options", "cause"),
    [
        (
            lambda vit: setattr(vit.blocks[1], "norm1", torch.nn.LayerNorm(48, eps=0.5)),
            {},
            r"blocks.1.norm1 is LayerNorm\(\(48,\), eps=0.5",
        ),
        (lambda vit: torch.nn.init.constant_(vit.norm.bias, float("nan")), {}, r"norm\.bias with NaN or infinity"),
        (lambda vit: vit.to("meta"), {}, "on the meta device: load weights first"),
        (None, {"mean": [0.5], "std": [0.5]}, "one number for each of 3 channels"),
        (None, {"label_names": ["a", "b"]}, "one name for each of the 0 classes of the head, got 2"),
    ],
)
def test_what_a_file_cannot_describe_is_refused_by_name(change, options, cause, tmp_path):
    vit = timm.create_model("mvmae_vit_tiny_patch16", **TINY)
    if change:
        change(vit)
    with pytest.raises(ValueError, match=cause):
        hub.export(vit, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def mae_positions(width: int, side: int) -> torch.Tensor:
    """Computes MAE's positions number by number, with a row of zeros for the class token."""
    return torch.nn.functional.pad(slow_positions(width, side), (0, 0, 1, 0))[None].float()


def mae_weights(model: Any) -> dict[str, torch.Tensor]:
    """Names the weights of a model as MAE's code names them, and adds its table of the decoder's positions."""
    weights = {}
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        new = {"mask_token": "mask_token", "head.weight": "decoder_pred.weight", "head.bias": "decoder_pred.bias"}.get(rest)
        weights[rest if part == "encoder" else new or f"decoder_{rest}"] = value
    return {**weights, "decoder_pos_embed": mae_positions(32, 4)}


def test_a_checkpoint_of_mae_fills_the_whole_model(tmp_path):
    source, target = tiny_mae(projector=False), tiny_mae(projector=False)
    namespace = argparse.Namespace(lr=1.0)
    torch.save({"model": mae_weights(source), "epoch": 7, "args": namespace}, tmp_path / "mae.pth")
    hub.load_pretraining(target, tmp_path / "mae.pth")
    views = torch.randn(2, 2, 3, 32, 32)
    outputs = [model(views, generator=torch.Generator().manual_seed(0)) for model in (source, target)]
    assert torch.equal(outputs[0].pred, outputs[1].pred)
    source.save_pretrained(tmp_path)
    larger = tiny_mae(projector=False, img_size=48)
    hub.load_pretraining(larger, tmp_path)
    assert torch.equal(larger.decoder.head.weight, source.decoder.head.weight)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def saved(content: Any) -> bytes:
    """The bytes of a file of torch."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


DAMAGE: dict[str, tuple[str, str]] = {  # the ending of the file, and the cause that is named
    "cut": (".safetensors", "cut or damaged"),
    "empty": (".safetensors", r"\(0 bytes\) is cut or damaged"),
    "header of 2^62": (".safetensors", "cut or damaged"),
    "lying shape": (".safetensors", "cut or damaged"),
    "NaN": (".safetensors", "norm.bias with NaN or infinity"),
    "LFS pointer": (".safetensors", "git lfs pull"),
    "text": (".pth", "is no PyTorch file"),
    "pickle with a payload": (".pth", "could run code, and was not loaded"),
    "zipped pickle with a payload": (".pth", "could run code, and was not loaded"),
    "pickle of a number": (".pth", "must hold a dictionary of tensors|cut or damaged"),
    "sparse": (".pth", "sparse, nested, quantized"),
    "meta": (".pth", "norm.bias without numbers"),
    "huge stride": (".pth", "with less data"),
    "quantized": (".pth", "quantized or complex|cut"),
    "complex": (".pth", "quantized or complex"),
}


def damaged(kind: str, weights: dict[str, torch.Tensor], ran: Path) -> bytes:
    """The bytes of a file of weights that is damaged in some way, or runs code that leaves the file `ran`."""
    whole = safetensors.torch.save(weights)
    contents: dict[str, Any] = {
        "cut": lambda: whole[:-50],
        "empty": lambda: b"",
        "header of 2^62": lambda: (2**62).to_bytes(8, "little") + whole[8:],
        "lying shape": lambda: whole.replace(b"[48]", b"[49]", 1),
        "NaN": lambda: safetensors.torch.save({**weights, "norm.bias": torch.full((48,), float("nan"))}),
        "LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "text": lambda: b"weights of a model\n",
        "pickle with a payload": lambda: pickle.dumps({"model": weights, "payload": Payload(ran)}),
        "zipped pickle with a payload": lambda: saved({"model": weights, "payload": Payload(ran)}),
        "pickle of a number": lambda: saved({"model": 3}),
        "sparse": lambda: saved({**weights, "norm.bias": torch.eye(48).to_sparse()}),
        "meta": lambda: saved({**weights, "norm.bias": torch.empty(48, device="meta")}),
        "huge stride": lambda: saved({**weights, "norm.bias": torch.zeros(1).expand(2**40)}),
        "quantized": lambda: saved({**weights, "norm.bias": torch.quantize_per_tensor(torch.zeros(48), 0.1, 0, torch.qint8)}),
        "complex": lambda: saved({**weights, "norm.bias": torch.zeros(48, dtype=torch.complex64)}),
    }
    content: bytes = contents[kind]()
    return content


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.filterwarnings("ignore")  # torch's, of formats that it will give up
def test_a_damaged_or_dangerous_file_is_named_and_the_model_untouched(kind, tmp_path):
    ending, cause = DAMAGE[kind]
    path = tmp_path / f"file{ending}"
    path.write_bytes(damaged(kind, dict(timm.create_model("mvmae_vit_tiny_patch16", **TINY).state_dict()), tmp_path / "ran"))
    vit = timm.create_model("mvmae_vit_tiny_patch16", **TINY)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    for call in (
        lambda: read_weights(path),
        lambda: hub.load_encoder(vit, path),
        lambda: timm.create_model("mvmae_vit_tiny_patch16", **overlay, **TINY),
    ):
        with pytest.raises(WeightsError, match=cause) as error:
            call()
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert not (tmp_path / "ran").exists()
    if kind == "pickle with a payload":  # which runs where it is not refused
        pickle.loads(path.read_bytes())
        assert (tmp_path / "ran").exists()


VIT = {"architecture": "vit_tiny_patch16_224"}
CONFIGS: list[Any] = [
    *([], "x", 3, None, {}, {"architecture": 3}, {"architecture": "no_such_model"}, {"architecture": "hf-hub:me/evil"}),
    *(VIT | {"model_args": value} for value in ([], "x", {"x": 1}, {"pretrained_cfg": "x"}, {"num_heads": 7})),
    *(VIT | {"model_args": {"depth": value}} for value in ("x", -1, 0.5, 3_000_000, 1e400, [3_000_000])),
    *(VIT | {"model_args": {"embed_dim": value}} for value in (0, -3, 10**12, {})),
    *(VIT | {"pretrained_cfg": value} for value in ([], 3, {"x": 1}, {"input_size": [3], "fixed_input_size": True})),
    *(VIT | {"num_classes": value} for value in ("x", 10**12)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: json.dumps(config)[:80])
@pytest.mark.filterwarnings("ignore")  # torch's, of tensors without elements
def test_f66_a_config_that_describes_no_model_is_refused_in_one_line(config, tmp_path):
    hub.export(timm.create_model("mvmae_vit_tiny_patch16", **TINY), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for pretrained in (False, True):
        with pytest.raises(WeightsError) as error:
            mvmae.create_model(f"local-dir:{tmp_path}", pretrained=pretrained)
        assert "\n" not in str(error.value)


def test_f66_a_description_of_no_model_is_refused_in_one_line(tmp_path):
    tiny_mae().save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "pretraining.json").read_text())
    encoder = whole["encoder"]
    changes: dict[str, list[Any]] = {
        "encoder": [3, VIT | {"model_args": 3}, encoder | {"model_args": {"depth": 3_000_000}}, encoder | {"mean": 3}],
        "projector": ["x", [48, 10**9, 8], [48, -1], [{"layer": "Module"}], [{"layer": "Linear", "in_features": 10**9}]],
        "options": [3, {"decoder_depth": 3_000_000}, {"decoder_heads": 0}, {"chunk_size": -1}, {"decoder_dim": "x"}],
    }
    for name, value in [(name, value) for name, values in changes.items() for value in values]:
        (tmp_path / "pretraining.json").write_text(json.dumps(whole | {name: value}))
        with pytest.raises(WeightsError) as error:
            mvmae.MultiViewMAE.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
        with pytest.raises(WeightsError):
            hub.build(whole | {name: value})


def test_f50_a_wrapped_model_is_exported_as_the_model_in_it(tmp_path):
    model, vit, images = tiny_mae(), tiny_mae().encoder, torch.randn(2, 3, 32, 32)
    wrapped, alone = (torch.nn.DataParallel(torch.compile(module, backend="eager")) for module in (model, vit))
    hub.export(wrapped, tmp_path / "whole")
    hub.export(alone, tmp_path / "vit")
    assert hub.describe(wrapped) == hub.describe(model)
    whole = mvmae.MultiViewMAE.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()(images), vit(images))


@pytest.mark.parametrize(
    "prefix",
    ["model.encoder.", "model.", "module.model.encoder.", "net._orig_mod.encoder.", "backbone.vit.", "encoder._orig_mod."],
)
def test_f50_an_encoder_is_found_under_any_prefix(prefix, tmp_path):
    """As Lightning's and other frameworks' checkpoints have it."""
    source, target, vit = (tiny_mae(projector=False) for _ in range(3))
    whole = prefix.rpartition("encoder.")[0] if "encoder." in prefix else None
    weights = {f"{prefix}{name}": value for name, value in source.encoder.state_dict().items()}
    if whole is not None:
        others = {name: value for name, value in source.state_dict().items() if not name.startswith("encoder.")}
        weights |= {f"{whole}{name}": value for name, value in others.items()}
    weights["criterion.weight"] = torch.zeros(3)
    torch.save({"state_dict": weights, "epoch": 3, "pytorch-lightning_version": "2.5.0"}, tmp_path / "last.ckpt")
    images = torch.randn(2, 3, 32, 32)
    hub.load_encoder(vit.encoder, tmp_path / "last.ckpt")
    assert torch.equal(vit.encoder(images), source.encoder(images))
    if whole:
        hub.load_pretraining(target, tmp_path / "last.ckpt")
        assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    elif whole is None:
        with pytest.raises(WeightsError, match="use load_encoder"):
            hub.load_pretraining(target, tmp_path / "last.ckpt")


def test_several_encoders_and_adapters_are_named(tmp_path):
    vit = tiny_mae().encoder
    weights = {f"{part}.{name}": value.clone() for part in ("one", "other") for name, value in vit.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "two.safetensors")
    adapted = {f"base_model.model.{name}": value for name, value in vit.state_dict().items()}
    adapted["base_model.model.blocks.0.attn.qkv.lora_A.default.weight"] = torch.zeros(3)
    safetensors.torch.save_file(adapted, tmp_path / "lora.safetensors")
    for load, model in ((hub.load_encoder, vit), (hub.load_pretraining, tiny_mae())):
        with pytest.raises(
            WeightsError, match=r"must hold one encoder, got several under one\., other\.: save the state dict of one"
        ):
            load(model, tmp_path / "two.safetensors")
        with pytest.raises(WeightsError, match="merge_and_unload"):
            load(model, tmp_path / "lora.safetensors")


def test_who_wants_peft_wraps_the_encoder_and_merges_it_for_the_export(tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_mae().encoder, peft.LoraConfig(target_modules=["qkv", "proj"], r=2))
    model = mvmae.MultiViewMAE(wrapped.base_model.model, decoder_dim=32, decoder_depth=1, decoder_heads=4)
    output = model(torch.randn(3, 2, 3, 32, 32))
    output.loss.backward()
    trained = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in name and value.grad is not None for name, value in trained.items())
    assert any("patch_embed" in name for name in trained)
    for value in trained.values():
        torch.nn.init.normal_(value, std=0.1)
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(WeightsError):  # timm builds no adapters
        hub.export(model, tmp_path)
    expected = wrapped.eval()(images)
    hub.export(wrapped.merge_and_unload(), tmp_path)
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    tiny_mae().save_pretrained(tmp_path)
    config, weights = tmp_path / "pretraining.json", tmp_path / "pretraining.safetensors"
    good = config.read_text()
    changes = {
        "is not JSON": good[:50],
        "one JSON object": "[]",
        "must have the format 1, got 2": good.replace('"format": 1', '"format": 2'),
        "architecture must be a ViT of timm .*, got 'hf-hub:me/evil'": good.replace("mvmae_vit_tiny_patch16", "hf-hub:me/evil"),
        "no ViT arguments checkpoint_path": good.replace('"embed_dim"', '"checkpoint_path"'),
        "options secret are unknown": good.replace('"pool"', '"secret"'),
        "does not describe": good.replace('"options"', '"choices"'),
        "missing": good.replace('"depth": 2', '"depth": 3'),
        "the contrastive_loss, a Own, cannot be built": good.replace('"format"', '"contrastive_loss": "Own", "format"'),
        "sha256 differs": good,  # the last: a bit of the weights is flipped
    }
    for cause, content in changes.items():
        config.write_text(content)
        if cause == "sha256 differs":
            flipped = bytearray(weights.read_bytes())
            flipped[-100] ^= 1
            mvmae.MultiViewMAE.from_pretrained(tmp_path)
            weights.write_bytes(flipped)
        with pytest.raises(WeightsError, match=cause) as error:
            mvmae.MultiViewMAE.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model = tiny_mae()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    torch.nn.init.zeros_(model.decoder.norm.weight)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
