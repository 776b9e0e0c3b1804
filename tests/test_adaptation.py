"""Going on from published weights on images of one's own: adapt.py, and what it asks of the package."""

import dataclasses
import json
import re
import signal
import sys
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import EXAMPLES, run_processes, run_script, without_clock

from mvmae import CentreCropTransform, MultiViewMAE, MultiViewTransform, hub, projection_mlp
from mvmae.data import AugmentedViews, MultiViewDataset, RepeatedSource, measure_channels, open_images
from mvmae.hub import license_warning
from mvmae.hub.export import PRETRAINED
from mvmae.metrics import linear_cka, mean_cosine

sys.path.append(str(EXAMPLES))
from engine.cli import parse
from tasks.backbones import save_classifier
from tasks.monitor import report
from tasks.starting import starting_weights, told

import adapt as adapt_script
import pretrain
from engine.distributed import Processes
from tasks.pretraining import open_data
from tasks.splits import open_splits

ALONE = Processes(0, 1, torch.device("cpu"), None)
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
ARGUMENTS = ["--data", "sample", "--output-dir", "run", "--epochs", 2, "--batch-size", 32, "--workers", 0]
ARGUMENTS += ["--decoder-dim", 16, "--decoder-depth", 1, "--decoder-heads", 2, "--device", "cpu", "--log-every", 1]
ARGUMENTS += ["--freeze-epochs", 0.15, "--warmup-epochs", 0.1, "--projector", 8]  # four steps of the encoder as it is
ARGUMENTS += ["--keep", "last", "--contrast-from", 0.05]  # two steps of the reconstruction alone
ARGUMENTS += ["--optimizer", "adamw", "--base-lr", 1e-4]  # Muon computes in bf16, and two processes not alike to the last bits


def adapt(folder, *arguments, **kwargs):
    return run_script("adapt.py", *ARGUMENTS, *map(str, arguments), folder=folder, **kwargs)


def state_of(folder):
    return torch.load(folder / "run" / "checkpoint.pt", weights_only=True)


def lines(folder):
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights to start from: DINOv3's architecture, under a licence that forbids commercial use."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    hub.export(timm.create_model("vit_small_patch16_dinov3", **TINY, num_classes=5), folder, license="cc-by-nc-4.0")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start):
    """Ten steps from those weights: four with the encoder frozen, four while its rate warms up, two more."""
    folder = tmp_path_factory.mktemp("whole")
    result = adapt(folder, "--encoder", f"local-dir:{start}", "--max-steps", 10, "--monitor-images", 60, "--mean", "auto")
    assert result.code == 0, result.err
    return folder, result


def test_the_defaults_train_an_existing_encoder_gently_and_pretraining_has_no_such_options():
    given = ["--data", "x", "--encoder", "y"]
    chosen = dataclasses.asdict(parse(adapt_script.Config, {}, None, given))
    plain = dataclasses.asdict(parse(pretrain.Config, pretrain.PRESETS, None, given))
    own = {"pretrained": True, "freeze_epochs": 5, "layer_decay": 0.75, "train": "all", "train_blocks": 2, "lora_rank": 16}
    own |= {"lora_layers": "attention", "guard": 0.0, "guard_kind": "cosine", "guard_images": 8, "ema": 0.0, "interpolate": 1.0}
    own |= {"keep": "best", "keep_by": "auto", "also": "", "rehearse": ""}
    recipe = "jitter grayscale mask_ratio loss_weight temperature projector projector_hidden projector_depth "
    recipe += "projector_norm decoder_depth epochs batch_size optimizer base_lr monitor_every"
    small = pretrain.PRESETS["small"]
    changed = {name: small[name] for name in recipe.split()} | {"decoder_dim": 0, "decoder_heads": 0}
    changed |= {"output_dir": "runs/adapt", "warmup_epochs": 5}
    assert chosen == plain | own | changed and not own.keys() & plain.keys()
    with pytest.raises(ValueError, match="--encoder must be given"):
        parse(adapt_script.Config, {}, None, given[:2])


def encoder_moved(folder, start):
    weights = {name[8:]: value for name, value in state_of(folder)["model"].items() if name.startswith("encoder.")}
    given = timm.create_model(f"local-dir:{start}", pretrained=True, num_classes=0).state_dict()
    assert weights.keys() == given.keys()
    return [name for name, value in given.items() if not torch.equal(value, weights[name])]


def test_the_encoder_stays_bit_for_bit_while_the_new_parts_warm_up(start, tmp_path):
    arguments = ["--encoder", f"local-dir:{start}", "--monitor-images", 0]
    assert adapt(tmp_path, *arguments, "--max-steps", 4).code == 0
    first = state_of(tmp_path)
    assert encoder_moved(tmp_path, start) == []
    assert adapt(tmp_path, *arguments, "--max-steps", 5, "--resume").code == 0
    last = state_of(tmp_path)
    assert set(encoder_moved(tmp_path, start)) == {name[8:] for name in first["model"] if name.startswith("encoder.")}
    assert [name for name in first["model"] if torch.equal(first["model"][name], last["model"][name])] == []
    groups = last["optimizer"]["param_groups"]
    assert sorted({group["lr_scale"] for group in groups if group["encoder"]}) == [0.75**2, 0.75, 1.0]
    new = next(group["lr"] for group in groups if not group["encoder"])
    for group in groups:
        if group["encoder"]:
            assert group["lr"] == pytest.approx(new * group["lr_scale"] / 5)  # the first of four steps of its own warm-up


@pytest.mark.posix
@pytest.mark.parametrize("killed", [4, 6])
def test_a_run_cut_at_either_side_of_the_freeze_ends_bit_identical(whole, start, tmp_path, killed):
    arguments = ["--encoder", f"local-dir:{start}", "--max-steps", 10, "--monitor-images", 60, "--mean", "auto"]
    arguments += ["--save-every", killed - 1]
    assert adapt(tmp_path, *arguments, fault=f"kill@{killed}").code == -signal.SIGKILL
    resumed = adapt(tmp_path, *arguments, "--resume")
    assert resumed.code == 0, resumed.err
    left, right = state_of(tmp_path), state_of(whole[0])
    assert [name for name in right["model"] if not torch.equal(left["model"][name], right["model"][name])] == []
    moments = left["optimizer"]["state"], right["optimizer"]["state"]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(*(torch.as_tensor(side[i][key]) for side in moments)) for i in moments[1] for key in moments[1][i])
    assert torch.equal(*(state["monitor"]["start_features"] for state in (left, right)))
    assert left["choice"] == right["choice"] and right["choice"]["weights"] == {}
    assert without_clock(lines(tmp_path)) == without_clock(lines(whole[0]))


def test_two_processes_train_alike_on_either_side_of_the_freeze(whole, start, tmp_path):
    arguments = [*ARGUMENTS, "--encoder", f"local-dir:{start}", "--max-steps", 10, "--monitor-images", 60, "--mean", "auto"]
    results = run_processes("adapt.py", *map(str, arguments), folder=tmp_path)
    assert [result.code for result in results] == [0, 0], results
    here, there = ({line["step"]: line["loss"] for line in lines(folder) if "loss" in line} for folder in (tmp_path, whole[0]))
    assert here == pytest.approx(there, rel=1e-5)


def test_a_resumed_run_may_look_at_more_images_than_before(start, tmp_path):
    arguments = ["--encoder", f"local-dir:{start}", "--mean", "auto"]
    assert adapt(tmp_path, *arguments, "--max-steps", 2, "--monitor-images", 20).code == 0
    result = adapt(tmp_path, *arguments, "--max-steps", 4, "--monitor-images", 40, "--resume")
    assert result.code == 0 and "features against those of the starting weights: cosine " in result.out, result.err
    later = {"similarity": 0.9, "cka": 0.8, "effective_rank": 7.0, "knn": 50.0}  # of a run that looked at none at first
    assert list(report({}, later)) == ["features against those of the starting weights: cosine 0.900, CKA 0.800"]


def test_the_run_reports_how_far_the_features_moved(whole, start):
    folder, result = whole
    looks = [line for line in lines(folder) if "effective_rank" in line]
    assert "similarity" not in looks[0]
    assert 0 < looks[-1]["similarity"] < 1 and 0 < looks[-1]["cka"] < 1
    assert f"cosine {looks[-1]['similarity']:.3f}, CKA {looks[-1]['cka']:.3f}" in result.out
    assert "effective rank of the features: " in result.out and "k-NN accuracy on held-out images: " in result.out
    data, encoder = open_images("sample", split="val"), timm.create_model(f"local-dir:{folder}/run/encoder", pretrained=True)
    cfg, order = encoder.pretrained_cfg, torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:60]
    images = torch.stack([CentreCropTransform(32)(data[i][0]) for i in order.tolist()]).float() / 255
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    features = []
    for model in (timm.create_model(f"local-dir:{start}", pretrained=True), encoder):
        with torch.inference_mode():
            tokens = model.eval().forward_features((images - mean) / std)
        features.append(tokens[:, model.num_prefix_tokens :].mean(dim=1))
    assert mean_cosine(*features) == pytest.approx(looks[-1]["similarity"], abs=1e-5)
    assert linear_cka(*features) == pytest.approx(looks[-1]["cka"], abs=1e-5)


def test_the_export_names_the_starting_weights_and_warns_of_their_licence(whole, start):
    folder, result = whole
    name = "/".join(start.parts[-2:])  # no more of a path of this machine is published
    words = f"{name} is under cc-by-nc-4.0, which forbids commercial use"
    assert words in result.out and words in result.err
    config = json.loads((folder / "run" / "encoder" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == config["started_from"]["license"] == "cc-by-nc-4.0"
    exported = run_script("export.py", "--run", "run", folder=folder)
    assert exported.code == 0 and words in exported.err
    card = (folder / "run" / "encoder" / "README.md").read_text()
    assert 'license: "cc-by-nc-4.0"' in card and f"Started from `{name}`, licence `cc-by-nc-4.0`." in card
    assert f"**Licence:** `{words}" in card and str(start) not in card
    config = json.loads((folder / "run" / "encoder" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == config["started_from"]["license"] == "cc-by-nc-4.0"


def test_f45_the_licence_goes_through_adapting_and_fine_tuning_to_the_card(whole, start, tmp_path):
    folder, _ = whole
    arguments = ["--model", folder / "run", "--data", "sample", "--preset", "quick", "--output-dir", "tuned", "--device", "cpu"]
    arguments += [
        "--max-steps",
        1,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--workers",
        0,
        "--train-images",
        64,
        "--val-images",
        8,
    ]
    done = run_script("finetune.py", *map(str, arguments), folder=tmp_path)
    assert done.code == 0, done.err
    words = f"{'/'.join(start.parts[-2:])} is under cc-by-nc-4.0, which forbids commercial use"
    assert words in done.out
    assert json.loads((tmp_path / "tuned" / "results.json").read_text())["started_from"]["license"] == "cc-by-nc-4.0"
    exported = run_script("export.py", "--run", "tuned", folder=tmp_path)
    assert exported.code == 0 and words in exported.err
    for name in ("best", "encoder"):
        config = json.loads((tmp_path / "tuned" / name / "config.json").read_text())
        assert config["pretrained_cfg"]["license"] == config["started_from"]["license"] == "cc-by-nc-4.0"
        assert config["training"].endswith("then fine-tuned for classification")
    card = (tmp_path / "tuned" / "encoder" / "README.md").read_text()
    assert 'license: "cc-by-nc-4.0"' in card and words in card and "fine-tuned for classification" in card
    assert "2 blocks of width 48 with 2 heads" in card and "images of 32 x 32 pixels" in card


@pytest.mark.parametrize(("name", "trained"), [("random:vit", "trained for classification from random weights"), ("vit", "")])
def test_f45_a_run_from_nothing_claims_no_pretraining_and_warns_of_nothing(
    name, trained, tmp_path, tiny_vit, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    model = MultiViewMAE(tiny_vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    hub.export(model, "vit", license="")  # as pretrain.py writes a run from nothing
    start_of = starting_weights(tiny_vit(), name)
    assert told(start_of).endswith("from random weights" if trained else "licence of their owner")
    vit = tiny_vit(num_classes=2)
    save_classifier(vit, tmp_path / "out", ("cat", "dog"), start_of)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = trained or f"{PRETRAINED}, then fine-tuned for classification"
    assert config["training"] == expected and "started_from" not in config and caplog.records == []
    card = hub.write_card("out", repo="me/mine").read_text()
    assert f"- Weights: `{expected}`" in card and "**Licence:**" not in card
    assert ("Multi-View" in card) == (not trained)


def test_f45_the_licence_of_other_models_is_kept_too(tmp_path):
    model, start_of = timm.create_model("test_convnext", num_classes=2), {"weights": "x", "license": "cc-by-nc-4.0"}
    save_classifier(model, tmp_path, ("cat", "dog"), start_of)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "cc-by-nc-4.0" and config["started_from"] == start_of
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).pretrained_cfg["license"] == "cc-by-nc-4.0"
    assert starting_weights(model, f"local-dir:{tmp_path}")["license"] == "cc-by-nc-4.0"


def test_a_card_names_free_starting_weights_without_a_warning(tmp_path, caplog):
    vit = timm.create_model("vit_small_patch16_224", **TINY, num_classes=0)
    started = {"weights": "some_vit.tag", "license": "mit", "repo": "timm/some_vit.tag"}
    hub.export(vit, tmp_path, started_from=started)
    card = hub.write_card(tmp_path, repo="me/mine").read_text()
    assert 'base_model: "timm/some_vit.tag"' in card and "Started from `some_vit.tag`, licence `mit`." in card
    assert "**Licence:**" not in card and caplog.records == []
    hub.export(vit, tmp_path)
    assert "Started from" not in hub.write_card(tmp_path, repo="me/mine").read_text()


@pytest.mark.parametrize(
    ("license", "words"),
    [
        ("cc-by-nc-4.0", "forbids commercial"),
        ("fair-noncommercial-research-license", "forbids commercial"),
        ("apple-amlr", "forbids commercial"),
        ("dinov3-license", "terms of its own"),
        ("unknown", "not recorded"),
        ("apache-2.0", None),
        ("mit", None),
        ("bsd-3-clause", None),
    ],
)
def test_licences(license, words):
    warning = license_warning({"weights": "some.weights", "license": license})
    assert warning is None if words is None else words in warning and "some.weights" in warning


def test_measured_statistics_equal_numpys_and_travel_with_the_export(whole):
    data, centre = open_images("sample"), CentreCropTransform(32)
    pixels = np.stack([centre(image).numpy() for image, _ in (data[i] for i in range(len(data)))]) / 255  # (N, C, H, W)
    measured = measure_channels(data, centre)
    assert measured.mean == pytest.approx(pixels.mean(axis=(0, 2, 3)), abs=1e-7)
    assert measured.std == pytest.approx(pixels.std(axis=(0, 2, 3)), abs=1e-7)
    assert measure_channels(data, centre, limit=50) == measure_channels(data, centre, limit=50) != measured
    state = state_of(whole[0])
    assert tuple(state["mean"]) == measured.mean
    assert tuple(state["std"]) == timm.create_model("vit_small_patch16_dinov3", device="meta").pretrained_cfg["std"]
    encoder = timm.create_model(f"local-dir:{whole[0]}/run/encoder", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
    assert transform.transforms[-1].mean.tolist() == pytest.approx(measured.mean)
    assert MultiViewMAE.from_pretrained(whole[0] / "run" / "encoder").encoder.pretrained_cfg["mean"] == measured.mean


def test_own_images_deep_oblong_few_and_changed_by_a_function(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 4096, (60, 90), dtype=np.uint16)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "mine.py").write_text("import torch\n\ndef invert(view):\n    return 255 - view\n")
    arguments = ["--data", "images", "--encoder", "vit_tiny_patch16_224", "--no-pretrained", "--monitor-images", 0]
    arguments += ["--encoder-args", "patch_size=8 embed_dim=48 depth=2 num_heads=2", "--in-chans", 1, "--image-size", 24, 40]
    arguments += ["--value-range", 0, 4095, "--mean", "auto", "--std", "auto", "--crops-per-image", 32, "--max-steps", 2]
    arguments += ["--transform", "mine:invert", "--crop-scale", 0.05, 0.3, "--loss-weight", 0]
    result = adapt(tmp_path, *arguments)
    assert result.code == 0, result.err
    assert re.search(r"^images +96 images, listed in [\d.]+ s\ntraining +6 steps of 32, ", result.out, re.MULTILINE)
    cfg = json.loads((tmp_path / "run" / "encoder" / "config.json").read_text())["pretrained_cfg"]
    assert cfg["input_size"] == [1, 24, 40]
    assert cfg["mean"] == pytest.approx([0.5], abs=0.02) and 0.05 < cfg["std"][0] < 0.3
    wrong = adapt(tmp_path, *arguments, "--transform", "mine:invent", "--output-dir", "other")
    assert wrong.code == 2 and "--transform must be module:function" in wrong.err and "got mine:invent" in wrong.err


@pytest.mark.parametrize(("channels", "changed"), [(3, (0.4, 0.4, 0.4, 0.1)), (1, (0.4, 0.4))])
def test_the_run_suits_the_number_of_images_and_the_encoder(channels, changed, tmp_path):
    """Without options for it: 56 images, 3 steps of 16 in an epoch, 44 (50 000 / 56)^1/2 = 1315 epochs."""
    (tmp_path / "images").mkdir()
    rng, shape = np.random.default_rng(0), (24, 24, 3) if channels == 3 else (24, 24)
    for i in range(56):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    given = ["--data", "images", "--encoder", "vit_tiny_patch16_224", "--no-pretrained", "--image-size", 16, "--workers", 0]
    given += ["--encoder-args", "patch_size=8 embed_dim=128 depth=2 num_heads=2", "--monitor-images", 0, "--max-steps", 2]
    given += ["--in-chans", channels, "--mean", "auto", "--std", "auto", "--device", "cpu", "--output-dir", "run"]
    result = run_script("adapt.py", *map(str, given), folder=tmp_path)
    assert result.code == 0, result.err
    assert re.search(r"^decoder +1 block of width 64; ", result.out, re.MULTILINE)
    assert re.search(r"^training +3945 steps of 16, 1315 epochs, peak learning rate 0.004 ", result.out, re.MULTILINE)
    settings = state_of(tmp_path)["settings"]
    assert settings["freeze_epochs"] == pytest.approx(settings["warmup_epochs"]) == 1315 / 20
    assert tuple(settings["jitter"]) == changed and settings["grayscale"] == (0.2 if channels == 3 else 0)


@pytest.mark.parametrize("number", [8, 60])
def test_rehearsal_trains_on_as_many_old_images_none_of_them_held_out_and_looks_at_the_own_alone(number, start, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in {"own/a": 10, "own/b": 10, "old/x": number // 2, "old/y": number // 2}.items():
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    own, old = (open_splits(str(tmp_path / name)) for name in ("own", "old"))
    given = ["--data", str(tmp_path / "own"), "--encoder", f"local-dir:{start}", "--output-dir", str(tmp_path / "run")]
    config, images = open_data(parse(adapt_script.Config, {}, None, given), ALONE, str(tmp_path / "old"))
    different = min(18, len(old.train))
    assert len(own.train) == 18 and len(images.train) == images.per_epoch == 36
    few = f" ({different} different ones)" if different < 18 else ""
    assert images.listed.startswith(f"18 images and 18 of --rehearse{few}, listed in ")
    expected = [own.train.name(i) for i in range(18)]
    names = [images.train.name(i) for i in range(len(images.train))]
    assert names[:18] == expected and names == [images.train.image(i) for i in range(len(names))]
    assert set(names[18:]) <= {old.train.name(i) for i in range(len(old.train))} and len(set(names)) == 18 + different
    assert max(Counter(names[18:]).values()) == -(-18 // different)
    assert images.train.labels is None and len(images.splits.train) == 18
    assert config.epochs == round(44 * (50_000 / len(names)) ** 0.5)
    alone = open_data(parse(adapt_script.Config, {}, None, given), ALONE)[1]
    assert alone.fingerprint == own.train.fingerprint and images.fingerprint != alone.fingerprint
    if number == 60:
        result = adapt(tmp_path, *given[:4], "--rehearse", "old", "--also", "old", "--batch-size", 16, "--loss-weight", 0)
        assert result.code == 0, result.err
        assert "18 images and 18 of --rehearse, listed in" in result.out
        assert "features are measured on 2 held-out images" in result.out
        assert [line["epoch"] for line in lines(tmp_path) if "epoch" in line] == [0.5, 1.0, 1.5, 2.0]


def test_a_file_of_weights_needs_its_architecture(start, tmp_path):
    (tmp_path / "alone").mkdir()
    file = tmp_path / "alone" / "weights.safetensors"
    file.write_bytes((start / "model.safetensors").read_bytes())
    torch.save({"model": timm.create_model(f"local-dir:{start}", pretrained=True).state_dict()}, tmp_path / "weights.pth")
    arguments = ["--max-steps", 1, "--monitor-images", 0]
    refused = adapt(tmp_path, "--encoder", file, *arguments)
    assert refused.code == 2 and "does not tell its architecture: add --arch" in refused.err
    shape = ["--encoder-args", "patch_size=8 embed_dim=48 depth=2 num_heads=2", "--image-size", 32]
    for number, name in enumerate((file, tmp_path / "weights.pth")):
        run = ["--encoder", name, "--arch", "vit_small_patch16_dinov3", *shape, "--output-dir", f"run{number}"]
        result = adapt(tmp_path, *run, *arguments)
        assert result.code == 0, result.err
        assert "the licence of" in result.out and "not recorded" in result.out
    with_config = adapt(tmp_path, "--encoder", start / "model.safetensors", *arguments)
    assert with_config.code == 0 and encoder_moved(tmp_path, start) == [], with_config.err


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_rope_mixed_ape_224", "vit_base_patch16_siglip_224", "vit_small_patch16_224"]
)
def test_every_trained_parameter_is_in_one_group(name, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from tasks.starting import parameter_groups

    vit = timm.create_model(name, **TINY, num_classes=0)
    model = MultiViewMAE(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2, projector=projection_mlp(48, 16, 8))
    groups = parameter_groups(model, 0.05, 0.5)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"] if group["encoder"]}
    first, last = (scale[id(vit.blocks[i].mlp.fc1.weight)] for i in (0, 1))
    assert scale[id(vit.patch_embed.proj.weight)] < first < last <= 1
    decayed = {id(parameter) for group in groups for parameter in group["params"] if group["weight_decay"]}
    assert id(vit.pos_embed) not in decayed and id(model.decoder.mask_token) not in decayed
    assert id(vit.blocks[0].mlp.fc1.weight) in decayed and id(model.projector[0].weight) in decayed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--encoder", "swin_tiny_patch4_window7_224", "--no-pretrained"], ["SwinTransformer", "windows"]),
        (["--encoder", "no/such.safetensors"], ["there is no file or folder no/such.safetensors"]),
        (["--encoder", "local-dir:no/such"], ["no/such"]),
        (["--mean", "automatic"], ["--mean must be numbers, or auto alone, got 'automatic'"]),
        (["--crops-per-image", "0"], ["--crops-per-image", "at least 1"]),
        (["--rehearse", "no/such"], ["--rehearse: no such folder, file or data set: no/such"]),
        (["--data", "https://x/{0..9}.tar", "--rehearse", "sample"], ["--rehearse needs images that can be counted"]),
        (["--also", "no/such"], ["--also: no such folder, file or data set: no/such"]),
        (["--freeze-epochs", "2"], ["--freeze-epochs 2", "--epochs 2"]),
        (["--value-range", "9", "3"], ["--value-range must be two numbers, low and high, got 9 3"]),
    ],
)
def test_what_cannot_be_is_one_line(start, tmp_path, arguments, words):
    result = adapt(tmp_path, "--encoder", f"local-dir:{start}", *arguments)
    assert result.code == 2 and "Traceback" not in result.err, result
    assert [word for word in words if word not in result.err.strip().splitlines()[-1]] == []


def test_drift_of_what_stays_turns_and_is_lost():
    x = torch.randn(200, 16)
    turn = torch.linalg.qr(torch.randn(16, 16))[0]
    assert mean_cosine(x, 3 * x) == pytest.approx(1) and linear_cka(x, x) == pytest.approx(1)
    assert mean_cosine(x, -x) == pytest.approx(-1) and linear_cka(x, 2 * x @ turn + 1) == pytest.approx(1)
    assert linear_cka(x, torch.randn(200, 16)) < 0.2 and linear_cka(x, torch.ones(200, 3)) == 0
    gram = [(y - y.mean(0)) @ (y - y.mean(0)).T for y in (x, x[:, :5])]
    expected = (gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm())
    assert linear_cka(x, x[:, :5]) == pytest.approx(float(expected), rel=1e-5)
    for wrong in (x[:9], x[0]):
        with pytest.raises(ValueError, match=r"before and after must be .*, got \(200, 16\) and "):
            linear_cka(x, wrong)
    with pytest.raises(ValueError, match="must have the same shape"):
        mean_cosine(x, x[:, :5])


def noisy(view):
    return (view.float() + torch.randn(view.shape) + np.random.rand()).clamp(0, 255).to(torch.uint8)


def test_an_own_augmentation_repeats_and_leaves_the_generators_alone():
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    views = AugmentedViews(MultiViewTransform(16), noisy)
    assert views.shape == (2, 3, 16, 16)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (views(image, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    plain = MultiViewTransform(16)(image, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(plain, first) and (plain.float() - first.float()).abs().mean() < 3
    with pytest.raises(TypeError, match=r"must return torch.uint8 \(3, 16, 16\), .*, got torch.float32 \(3, 16, 16\)"):
        AugmentedViews(MultiViewTransform(16), torch.Tensor.float)(image)


def test_a_repeated_source_crops_each_image_anew():
    source = RepeatedSource(open_images("sample"), 3)
    assert len(source) == 3 * 896 and source[5][1] == source[5 + 896][1] and source.name(900) == source.name(4)
    assert source.fingerprint != open_images("sample").fingerprint
    dataset = MultiViewDataset(source, MultiViewTransform(16))
    assert not torch.equal(dataset[0, 5].views, dataset[0, 5 + 896].views)


def test_a_value_range_keeps_the_depth_of_twelve_bits(tmp_path):
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "deep.png")
    for image in (tmp_path / "deep.png", values):
        view = CentreCropTransform(64, crop=1.0, in_chans=1, value_range=(0, 4095))(image)
        assert np.abs(view[0].numpy() - values / 4095 * 255).max() <= 1
        assert CentreCropTransform(64, crop=1.0, in_chans=1)(image).max() <= 17
    cut = CentreCropTransform(64, crop=1.0, in_chans=1, value_range=(1000, 2000))(values)
    assert (cut.min(), cut.max()) == (0, 255)


def test_jitter_of_the_command_line_changes_the_views_and_refuses_what_has_no_colour(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from engine.ends import Stop

    from tasks.inputs import jittered

    red = np.broadcast_to(np.array([200, 20, 20], dtype=np.uint8), (40, 50, 3))
    plain = MultiViewTransform(16)
    assert jittered(plain, (), 0) is plain and jittered(plain, (0, 0, 0, 0), 0) is plain
    grey = jittered(plain, (), 1)(red, generator=torch.Generator().manual_seed(0))
    assert grey.shape == (2, 3, 16, 16) and (grey == 74).all()  # 0.299 x 200 + 0.701 x 20 = 73.8
    first, second = jittered(plain, (0.5, 0), 0)(red, generator=torch.Generator().manual_seed(0))
    assert len(first.unique()) == 2 and not torch.equal(first, second)
    assert abs(int(first[0, 0, 0]) - 10 * int(first[1, 0, 0])) <= 5 or int(first[0, 0, 0]) == 255
    for strength, grayscale in (((0.4, 0.4, 0.4, 0.1), 0), ((), 0.2)):
        with pytest.raises(Stop, match="must have --in-chans 3, got 1"):
            jittered(MultiViewTransform(16, in_chans=1), strength, grayscale)
    assert jittered(MultiViewTransform(16, in_chans=1), (0.4, 0.4), 0).shape == (2, 1, 16, 16)
