"""examples/export.py: what a run leaves becomes a folder, a card, and a repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Hub
from PIL import Image
from running import EXAMPLES, run_script

from mvmae import MultiViewMAE, hub, projection_mlp
from mvmae.inputs import inputs_of

TINY = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}


def leave(folder: Path, model: torch.nn.Module, **about: object) -> None:
    """Leaves what a run of a model does."""
    folder.mkdir()
    settings = {"lr": 0.1, "data": str(folder), "output_dir": str(folder)}
    state = {"model": model.state_dict(), "optimizer": {}, "settings": settings, "step": 9}
    read = {name: about.pop(name, None) for name in ("mean", "std", "crop_pct")}
    about["inputs"] = inputs_of(getattr(model, "encoder", model), **read).to_dict()
    about |= {"description": hub.describe(model), "command": f"python train.py --data {folder}/images"}
    torch.save({**state, "about": about}, folder / "checkpoint.pt")
    records = [{"step": 3, "knn": 11.0}, {"step": 9, "loss": 1.0}, {"step": 9, "knn": 44.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "results.json").write_text(json.dumps({"top1": 61.5, "data": "sample"}))
    Image.new("RGB", (8, 8)).save(folder / "curves.png")


def fine_tuned(folder: Path, **about: object) -> torch.nn.Module:
    """Leaves what a fine-tuned run does."""
    vit = timm.create_model("mvmae_vit_tiny_patch16", **TINY, num_classes=3).eval()
    leave(folder, vit, label_names=["cat", "dog", "eel"], training="fine-tuned for classification", **about)
    return vit


def test_a_fine_tuned_run_keeps_its_head_and_the_names_of_its_classes(tmp_path: Path) -> None:
    vit = fine_tuned(tmp_path / "run", crop_pct=0.9)
    done = run_script("export.py", "--run", "run", "--output-dir", "out", "--datasets", "cifar10", folder=tmp_path)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (3, ["cat", "dog", "eel"])
    assert config["pretrained_cfg"]["crop_pct"] == 0.9 and config["training"] == "fine-tuned for classification"
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(images), vit(images))
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("images, %`: 44", "`top1`: 61.5", "`python train.py --data images`", '"lr": 0.1', "cifar10", "3 classes"):
        assert part in card
    assert "11" not in card.partition("## Measured")[2].partition("## Files")[0]  # measured on other weights
    assert not (tmp_path / "out" / "pretraining").exists()


def test_a_pretraining_run_goes_to_the_hub_in_one_commit(tmp_path: Path) -> None:
    vit = timm.create_model("mvmae_vit_tiny_patch16", **TINY)
    model = MultiViewMAE(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2, projector=projection_mlp(48, 16, 8))
    leave(tmp_path / "run", model, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    with Hub() as server:
        environment = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*"}
        command = [sys.executable, str(EXAMPLES / "export.py"), "--run", "run", "--push", "me/quick", "--private"]
        python_path = {"PYTHONPATH": str(EXAMPLES.parent)}
        kwargs = {"cwd": tmp_path, "env": {**os.environ, **environment, **python_path}, "capture_output": True, "text": True}
        ended = subprocess.run(command, check=False, timeout=900, **kwargs)
        assert ended.returncode == 0, ended.stderr
        repo = server.repos["me/quick"]
    assert repo.private
    assert len(repo.commits) == 2
    commit, files = repo.commits[-1]
    assert f"hf-hub:me/quick@{commit}" in ended.stdout
    for name, data in files.items():  # what is uploaded is shown before
        assert name.startswith(".") or f"  {name}, {len(data)} bytes" in ended.stdout.partition("is uploaded")[0]
    assert str(tmp_path).encode() not in b"".join(files.values()) and b"train.py" in files["README.md"]
    expected = {"config.json", "model.safetensors", "README.md", "curves.png"}
    expected |= {f"pretraining/pretraining.{ending}" for ending in ("json", "safetensors")}
    assert set(files) - {".gitattributes"} == expected
    assert all((tmp_path / "run/encoder" / name).read_bytes() == files[name] for name in expected)
    cfg = json.loads(files["config.json"])["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert b"![Losses of the run](curves.png)" in files["README.md"]
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    loaded = MultiViewMAE.from_pretrained(tmp_path / "run" / "encoder").state_dict()
    assert list(loaded) == list(weights)
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_an_export_asks_the_hub_for_nothing_that_a_checkpoint_names(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    state = {"model": {}, "optimizer": {}, "step": 1, "settings": {"encoder": "hf-hub:me/evil"}}
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    with Hub() as server:
        online = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = run_script("export.py", "--run", "run", folder=tmp_path, env=online)
        assert server.requests == []
    assert done.code == 2 and "must say which model it holds" in done.err


@pytest.mark.parametrize("about", [None, {"description": {"architecture": "x"}}])
def test_a_folder_that_is_no_run_is_refused_in_one_line(about, tmp_path):
    (tmp_path / "run").mkdir()
    if about is not None:
        state = {"model": {}, "optimizer": {}, "step": 1, "settings": {}, "about": about}
        torch.save(state, tmp_path / "run" / "checkpoint.pt")
    done = run_script("export.py", "--run", "run", folder=tmp_path)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1


@pytest.mark.parametrize(("pretrained", "best"), [(True, 1.0), (False, 0.0)])
def test_of_an_adaptation_the_best_encoder_is_exported_and_of_other_runs_the_last(tmp_path, pretrained, best):
    model = MultiViewMAE(timm.create_model("mvmae_vit_tiny_patch16", **TINY), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    torch.nn.init.zeros_(model.encoder.norm.bias)
    leave(tmp_path / "run", model, mean=[0.5] * 3, std=[0.5] * 3, schedule={"steps": 20})
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    weights = {**model.encoder.state_dict(), "norm.bias": torch.ones(48)}
    for kept in ({}, weights):
        chosen = {"step": 3 if kept else 0, "metrics": {"knn": 11.0}, "weights": kept}
        settings = {**state["settings"], "pretrained": pretrained}
        torch.save({**state, "settings": settings, "best": chosen}, tmp_path / "run" / "checkpoint.pt")
        done = run_script("export.py", "--run", "run", folder=tmp_path)
        assert done.code == (2 if pretrained and not kept else 0), done.err
    exported = timm.create_model(f"local-dir:{tmp_path / 'run/encoder'}", pretrained=True)
    assert exported.norm.bias.unique().tolist() == [best]
    assert "stopped at step 9 of 20" in (tmp_path / "run/encoder/config.json").read_text()
    assert f"images, %`: {11 if pretrained else 44}" in (tmp_path / "run/encoder/README.md").read_text()
