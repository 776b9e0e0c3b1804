"""Going on from published weights on images of one's own: adapt.py, and what it asks of the package."""

import dataclasses
import json
import math
import signal
import sys
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import EXAMPLES, run_script, without_clock
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny_run import assert_identical, end_of, write_images
from torch import nn

from mvmae import CentreCropTransform, MultiViewMAE, MultiViewTransform, backward_in_parts, hub, projection_mlp, random_mask
from mvmae.architecture import read_pretraining
from mvmae.data import AugmentedViews, measure_channels, open_images
from mvmae.hub import license_warning
from mvmae.metrics import linear_cka, mean_cosine

sys.path.append(str(EXAMPLES))
import adapt as script
import pretrain
from engine.distributed import Ranks
from engine.optim import set_learning_rate
from engine.options import parse
from engine.signals import Stop
from tasks import gains
from tasks.best import Best
from tasks.config import build_model
from tasks.inputs import jittered
from tasks.models import describe_start, save_classifier, starting_weights
from tasks.pretraining import load_run, open_data, parameter_groups, train_last_blocks
from tasks.probe import linear_accuracy
from tasks.schedule import describe_schedule, fit_schedule
from tasks.splits import draw, open_splits

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
ARGUMENTS = ["--data", "sample", "--output-dir", "run", "--epochs", 2, "--batch-size", 32, "--workers", 0]
ARGUMENTS += ["--decoder-dim", 16, "--decoder-depth", 1, "--decoder-heads", 2, "--device", "cpu", "--log-every", 1]
ARGUMENTS += ["--freeze", 0.07, "--warmup-epochs", 0.1, "--projector", 8]  # of 56 steps four with the encoder as it is
ARGUMENTS += ["--contrast-from", 0.04]  # two steps of the reconstruction alone
ARGUMENTS += ["--optimizer", "adamw", "--base-lr", 1e-4]  # Muon's matrices make more of a change in the last bits
WHOLE = ["--max-steps", 10, "--eval-images", 60, "--mean", "auto"]


def adapt(folder, *arguments, **kwargs):
    return run_script("adapt.py", *ARGUMENTS, *arguments, folder=folder, **kwargs)


def config_of(*given):
    return parse(script.Config, {}, None, [*map(str, ARGUMENTS), *map(str, given)])


def lines(folder):
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def encoder_of(state):
    return {name[8:]: value for name, value in state.items() if name.startswith("encoder.")}


def differ(left, right):
    assert left.keys() == right.keys()
    return {name for name, value in left.items() if not torch.equal(value, right[name])}


def loaded(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).state_dict()


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
    result = adapt(folder, "--encoder", f"local-dir:{start}", *WHOLE)
    assert result.code == 0, result.err
    return folder, result


def test_the_defaults_train_an_existing_encoder_gently_and_pretraining_has_no_such_options():
    given = ["--data", "x", "--encoder", "y"]
    chosen = dataclasses.asdict(parse(script.Config, {}, None, given))
    plain = dataclasses.asdict(parse(pretrain.Config, pretrain.PRESETS, None, given))
    own = {"pretrained": True, "freeze": 0.05, "layer_decay": 0.75, "train_blocks": 0, "rehearse": "", "arch": ""}
    recipe = "jitter grayscale mask_ratio loss_weight temperature projector decoder_depth epochs batch_size optimizer base_lr"
    small = pretrain.PRESETS["small"]
    changed = {name: small[name] for name in recipe.split()} | {
        "decoder_dim": 0,
        "decoder_heads": 0,
        "warmup": 0.05,
        "lr_batch": 0,
    }
    assert chosen == plain | own | changed | {"output_dir": "runs/adapt"}
    with pytest.raises(ValueError, match="--encoder must be given"):
        parse(script.Config, {}, None, given[:2])
    for option in ("--freeze", "--train-blocks", "--rehearse"):
        with pytest.raises(ValueError, match=f"there is no option {option}"):
            parse(pretrain.Config, pretrain.PRESETS, None, [*given, option, "0"])


@pytest.mark.parametrize("channels", [3, 1])
def test_what_is_not_given_suits_the_number_of_images_and_the_encoder(channels):
    """Of 56 images 3 steps of 16 in an epoch, 44 (50 000 / 56)^1/2 = 1315 epochs."""
    given = ["--data", "x", "--encoder", "vit_tiny_patch16_224", "--image-size", "16"]
    given += ["--encoder-args", "patch_size=8 embed_dim=128 depth=2 num_heads=2", "--in-chans", str(channels)]
    config = dataclasses.replace(parse(script.Config, {}, None, given), pretrained=False)  # no weights of this size exist
    length, decoder = fit_schedule(config, 56, ALONE), build_model(config, CPU).decoder
    assert (len(decoder.blocks), decoder.embed.out_features, decoder.blocks[0].attn.num_heads) == (1, 64, 2)
    expected = "3945 steps of 16 images (1315 epochs), peak learning rate 0.004; warm-up of 197 steps; encoder frozen for 197"
    assert describe_schedule(length, config) == expected
    rates = [length.learning_rates(step) for step in (1, 197, 198, 394, 395)]
    shares = [rate["lr_encoder"] / rate["lr"] for rate in rates[1:]]
    assert rates[0] == {"lr": 0, "lr_encoder": 0} and shares == pytest.approx([0, 1 / 198, 197 / 198, 1])


# ----------------------------------------------------------------------------------------------------- stages and resuming


def test_the_encoder_stays_bit_for_bit_while_the_new_parts_warm_up(start, tmp_path):
    """A run that is resumed may evaluate more images than before."""
    arguments = ["--encoder", f"local-dir:{start}"]
    assert adapt(tmp_path, *arguments, "--max-steps", 4, "--eval-images", 0).code == 0
    first = end_of(tmp_path)
    assert differ(encoder_of(first["model"]), loaded(start)) == set()
    resumed = adapt(tmp_path, *arguments, "--max-steps", 5, "--eval-images", 20, "--resume")
    assert resumed.code == 0 and "eval_images was 0 and is 20 now" in resumed.out, resumed.err
    last = end_of(tmp_path)
    assert differ(last["model"], first["model"]) == first["model"].keys()
    groups = last["optimizer"]["param_groups"]
    assert sorted({group["lr_scale"] for group in groups if group["encoder"]}) == [0.75**2, 0.75, 1.0]
    new = next(group["lr"] for group in groups if not group["encoder"])
    logged = [line for line in lines(tmp_path) if "lr" in line]
    assert logged[0]["lr_encoder"] == 0 and logged[-1]["lr"] == new and logged[-1]["lr_encoder"] == pytest.approx(new / 5)
    for group in groups:
        if group["encoder"]:
            assert group["lr"] == pytest.approx(new * group["lr_scale"] / 5)  # the first of four steps of its own warm-up


@pytest.mark.posix
@pytest.mark.parametrize("killed", [4, 6])
def test_a_run_cut_at_either_side_of_the_freeze_ends_bit_identical(whole, start, tmp_path, killed):
    arguments = ["--encoder", f"local-dir:{start}", *WHOLE, "--save-every", killed - 1]
    assert adapt(tmp_path, *arguments, fault=f"kill@{killed}").code == -signal.SIGKILL
    resumed = adapt(tmp_path, *arguments, "--resume")
    assert resumed.code == 0, resumed.err
    left, right = end_of(tmp_path), end_of(whole[0])
    assert_identical(left, right)
    assert differ(left["best"].pop("weights"), right["best"].pop("weights")) == set()
    assert left["best"] == right["best"] and left["before"] == right["before"] != {}
    assert without_clock(lines(tmp_path)) == without_clock(lines(whole[0]))
    exported = [loaded(folder / "run" / "encoder") for folder in (tmp_path, whole[0])]
    assert differ(*exported) == set()


# --------------------------------------------------------------------------------- the best encoder, and what it gained


def test_the_encoder_of_the_best_evaluation_is_left_and_the_start_counts(whole, start):
    folder, result = whole
    found, end = [line for line in lines(folder) if "knn" in line], end_of(folder)
    assert [line["step"] for line in found] == [0, 6, 10]
    best = max(found, key=lambda line: line["knn"])["step"]  # the first of the best
    left, ended = loaded(folder / "run" / "encoder"), encoder_of(end["model"])
    assert differ(ended, loaded(start)) == ended.keys()  # the checkpoint goes on from the last
    assert (differ(left, loaded(start)) == set()) == (best == 0) and (differ(left, ended) == set()) == (best == 10)
    words = "the starting encoder, unchanged" if best == 0 else f"step {best} of 10, the best evaluation"
    assert f"exported: {words}" in result.out and f"exported: {words}" in (folder / "run" / "summary.md").read_text()
    again = run_script("export.py", "--run", "run", "--output-dir", "again", folder=folder)
    assert again.code == 0 and differ(loaded(folder / "again"), left) == set(), again.err


def test_a_run_goes_on_with_decoder_and_projector_and_tells_how_far_the_features_moved(whole, tmp_path):
    """Of unlabelled images, from a run, the last block alone; compared with plain timm's features of the same files."""
    run, images = whole[0] / "run", tmp_path / "images"
    images.mkdir()
    write_images(images)
    given = ["--encoder", run, "--data", "images", "--train-blocks", 1, "--freeze", 0, "--contrast-from", 0, "--base-lr", 1e-3]
    given += ["--steps", 6, "--batch-size", 8, "--eval-every", 0.5, "--eval-images", 24, "--layer-decay", 1]
    result = adapt(tmp_path, *given)
    assert result.code == 0, result.err
    assert "; decoder and projector too\n" in result.out and "the last 1 of 2 blocks, the final norm, " in result.out
    before, end = loaded(run / "encoder"), encoder_of(end_of(tmp_path)["model"])
    trained = {name for name in before if name.startswith(("blocks.1.", "norm."))}
    assert differ(end, before) == trained
    shares = {line["step"]: line["retrieval"] for line in lines(tmp_path) if "retrieval" in line}
    assert list(shares) == [0, 2, 4, 6] or list(shares) == [0, 2, 4, 6, 6]
    tops = {step: max(value for other, value in shares.items() if other <= step) for step in shares}
    best = max(step for step in shares if shares[step] >= tops[step] - 50 / math.sqrt(24))  # within a standard error
    if best == 6:  # which is measured after the last step was saved
        again = run_script("export.py", "--run", "run", "--output-dir", "again", folder=tmp_path)
        assert again.code == 0 and differ(loaded(tmp_path / "again"), end) == set(), again.err
    left = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True).eval()
    assert best != 6 or differ(left.state_dict(), end) == set()
    source, transform = open_images(str(images)), timm.data.create_transform(**timm.data.resolve_model_data_config(left))
    files = [source.name(i) for i in draw(len(source), 24).tolist()]
    batch, features = torch.stack([transform(Image.open(file).convert("RGB")) for file in files]), []
    for model in (timm.create_model(f"local-dir:{run}/encoder", pretrained=True).eval(), left):
        with torch.inference_mode():
            features.append(model.forward_features(batch)[:, model.num_prefix_tokens :].mean(dim=1))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.out.splitlines() if line[:1] == "|"]
    after = dict(zip(rows[0], rows[3], strict=True))
    assert [row[:2] for row in rows[2:]] == [["own", "before"], ["own", "after"]]
    assert float(after["cosine to the start"]) == pytest.approx(mean_cosine(*features), abs=6e-4)
    assert float(after["CKA with the start"]) == pytest.approx(linear_cka(*features), abs=6e-4)
    assert "| own | after | " in (tmp_path / "run" / "summary.md").read_text()
    assert (tmp_path / "run" / "gains.png").stat().st_size > 10_000 and "on 24 training images, view retrieval" in result.out


def test_parts_of_a_run_are_loaded_where_they_fit(whole, start, tmp_path):
    run = whole[0] / "run"
    weights = read_pretraining(run / "encoder")[1]
    for given, expected in (
        ([], ["decoder", "projector"]),
        (["--decoder-dim", 32], ["projector"]),
        (["--projector", 0], ["decoder"]),
        (["--decoder-dim", 32, "--projector", 4], []),
    ):
        config = config_of("--encoder", run, *given)
        model = build_model(config, CPU)
        said = load_run(model, config)
        assert said == (f"; {' and '.join(expected)} too" if expected else "; neither its decoder nor its projector fits")
        for name in expected:
            part = {key: value for key, value in weights.items() if key.startswith(f"{name}.")}
            assert differ(part, {key: value for key, value in model.state_dict().items() if key in part}) == set()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "encoder").symlink_to(run / "encoder")  # of another run
    file = tmp_path / "weights.safetensors"
    file.write_bytes((start / "model.safetensors").read_bytes())
    config = config_of("--encoder", file, "--arch", "vit_small_patch16_dinov3")
    assert load_run(model, config) == load_run(model, config_of("--encoder", start)) == ""


def best_of(evaluations, images=100):
    """The choice after evaluations of an encoder whose one weight is the step; as a resumed run has it."""
    encoder = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(encoder.weight)
    best = Best(encoder)
    for step, metrics in enumerate(evaluations):
        nn.init.constant_(encoder.weight, step)
        best.consider(step, metrics, images)
        if step == 1:
            best, state = Best(encoder), best.state_dict()
            nn.init.constant_(best.start["weight"], 7.0)  # the state holds the start too, where that is the best
            best.load_state_dict(state)
    assert best.chosen()["weight"] == (best.step if best.metrics else len(evaluations) - 1)
    return best


def test_k_nn_must_be_strictly_better_and_of_equal_view_retrieval_the_latest_is_kept():
    def steps(**shares):
        return best_of([{name: value} for name, values in shares.items() for value in values]).step

    assert steps(knn=(60.0, 60.0, 59.0)) == 0 and steps(knn=(60.0, 61.0, 61.0)) == 1 and steps(knn=(60.0, 50.0, 61.0)) == 2
    assert steps(retrieval=(97.0, 96.0, 95.5)) == 2  # of 100 images: 5 points, and none is clearly worse than the best
    said = best_of([{"retrieval": 97.0}, {"retrieval": 96.0}]).describe(1)
    assert said == "exported: step 1 of 1, the latest evaluation within 5.0 points of the best (view retrieval 96.0 %)"
    assert steps(retrieval=(97.0, 93.0, 90.0)) == 1  # compared with the best, not with the one kept
    assert steps(retrieval=(30.0, 60.0, 54.0)) == 1 and steps(retrieval=(30.0, 20.0, 24.0)) == 0
    both = best_of([{"retrieval": r, "knn": k} for r, k in ((5.0, 60.0), (70.0, 60.0), (90.0, 59.0))])
    assert both.step == 0 and "the starting encoder, unchanged" in both.describe(2)  # labels count more
    assert best_of([{}, {}, {}]).metrics == {} and "nothing was measured" in best_of([{}, {}]).describe(1)
    said = best_of([{"knn": 60.0}, {"knn": 61.0}]).describe(2)
    assert said == "exported: step 1 of 2, the best evaluation (k-NN accuracy on held-out images 61.0 %)"


class Measured:
    """Stands for an `Evaluation`: images are their own pixels."""

    def __init__(self, encoder, train, val):
        self.encoder, self.train, self.val, self.source, self.labelled = encoder, train, val, val, train is not None

    def features(self, part):
        return self.encoder(part[0]), part[1]

    def bank(self, queries):
        return self.features(self.train) if self.labelled else (queries[0][:0], queries[1][:0])

    def retrieval(self):
        return {} if self.labelled else {"retrieval": self.encoder(torch.ones(6)).sum().item()}


def test_the_table_compares_the_start_with_what_is_left_and_puts_the_weights_back(tmp_path):
    encoder = nn.Linear(6, 6, bias=False)
    nn.init.eye_(encoder.weight)
    best = Best(encoder)
    nn.init.zeros_(encoder.weight)
    encoder.weight.data[0, 0] = 1.0  # all but one direction is lost
    ended = encoder.weight.detach().clone()
    centres = 5 * torch.eye(6)[1:4]
    train, val = ((centres[torch.arange(60) % 3] + torch.randn(60, 6), torch.arange(60) % 3) for _ in range(2))
    found = gains.compare(best, {"own": Measured(encoder, train, val), "rehearsed": Measured(encoder, None, train)})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in gains.table(found)]
    assert torch.equal(encoder.weight, ended)
    assert cells[0][:4] == ["images", "encoder", "k-NN", "linear probe"] and set(cells[1]) == {"---"}
    assert [row[:2] for row in cells[2:]] == [[name, when] for name in ("own", "rehearsed") for when in ("before", "after")]
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    assert float(rows[0]["k-NN"]) > 90 > 60 > float(rows[1]["k-NN"]) and rows[2]["k-NN"] == ""
    assert rows[1]["effective rank"] == "1.0" and float(rows[0]["effective rank"]) > 3
    expected = nn.functional.cosine_similarity(val[0], val[0] * ended[0]).mean().item()
    assert float(rows[1]["cosine to the start"]) == pytest.approx(expected, abs=6e-4) and rows[0]["cosine to the start"] == ""
    assert "±" in rows[0]["1 label a class"] and [row["view retrieval"] for row in rows] == ["", "", "6.0", "1.0"]
    gains.draw(tmp_path / "gains.png", found)
    with Image.open(tmp_path / "gains.png") as image:
        assert min(image.size) > 300


def test_the_linear_probe_of_the_table_is_that_of_scikit_learn():
    centres = 2 * torch.randn(3, 6)
    labels, known = torch.arange(90) % 3, torch.arange(60) % 3
    bank, queries = (centres[of] + 1.5 * torch.randn(len(of), 6) for of in (labels, known))
    found = linear_accuracy(bank, labels, queries, known)
    scaler = StandardScaler().fit(bank.numpy())
    x, y = (scaler.transform(part.numpy()) / 6**0.5 for part in (bank, queries))
    peer = LogisticRegression(C=1 / (1e-4 * len(x)), tol=1e-8, max_iter=5000).fit(x, labels.numpy())
    assert 40 < found < 100 and found == pytest.approx(100 * peer.score(y, known.numpy()))
    shared = 1000 * torch.randn(6).double()  # a vector that all features have in common tells nothing
    assert linear_accuracy(bank.double() + shared, labels, queries.double() + shared, known) == found


# ------------------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize(
    "name", ["vit_small_patch16_rope_mixed_ape_224", "vit_base_patch16_siglip_224", "vit_small_patch16_224"]
)
def test_every_trained_parameter_is_in_one_group_and_has_a_gradient(name, blocks):
    vit = timm.create_model(name, **TINY, num_classes=0)
    model = MultiViewMAE(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2, projector=projection_mlp(48, 16, 8))
    said = train_last_blocks(vit, blocks)
    groups = parameter_groups(model, 0.05, 0.5)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    mask = random_mask(8, 16, 0.75, generator=torch.Generator().manual_seed(0))
    backward_in_parts(model, torch.randn(4, 2, 3, 32, 32), 1, mask=mask)
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"] if group["encoder"]}
    for layer_decay, fixed in ((1.0, set()), (0.5, vit.no_weight_decay())):
        parts = parameter_groups(model, 0.05, layer_decay)
        decayed = {id(parameter) for group in parts for parameter in group["params"] if group["weight_decay"]}
        for key, parameter in model.named_parameters():
            wanted = parameter.requires_grad and parameter.ndim > 1 and key.removeprefix("encoder.") not in fixed
            assert (id(parameter) in decayed) == wanted, key
    if blocks:
        assert {name for name in with_gradient if name.startswith("encoder.")} == {
            f"encoder.{name}" for name, _ in vit.named_parameters() if name.startswith(("blocks.1.", "norm.", "fc_norm."))
        }
        assert said.startswith("the last 1 of 2 blocks")
    else:
        first, last = (scale[id(vit.blocks[i].mlp.fc1.weight)] for i in (0, 1))
        assert scale[id(vit.patch_embed.proj.weight)] < first < last <= 1 and said == ""
    optimizer = torch.optim.SGD(groups, lr=1)
    for rates, expected in (({"lr": 0.1}, 0.1), ({"lr": 0.1, "lr_encoder": 0.05}, 0.05)):
        set_learning_rate(optimizer, **rates)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(group["lr_scale"] * (expected if group["encoder"] else 0.1))
    with pytest.raises(Stop, match="--train-blocks must be at most the encoder's 2 blocks, got 3"):
        train_last_blocks(vit, 3)


@pytest.mark.parametrize("number", [8, 60])
def test_rehearsal_trains_on_as_many_old_images_none_of_them_held_out_and_evaluates_both(number, start, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in {"own/a": 10, "own/b": 10, "old/x": number // 2, "old/y": number // 2}.items():
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    own, old = (open_splits(str(tmp_path / name)) for name in ("own", "old"))
    given = ["--data", tmp_path / "own", "--encoder", f"local-dir:{start}", "--epochs", 0]
    config = config_of(*given, "--rehearse", tmp_path / "old")
    images, alone = open_data(config), open_data(config_of(*given))
    different = min(18, len(old.train))
    assert len(own.train) == 18 and len(images.train) == 36
    few = f" ({different} different ones)" if different < 18 else ""
    assert images.listed == f"18 images and 18 of --rehearse{few}"
    names = [images.train.name(i) for i in range(len(images.train))]
    assert names[:18] == [own.train.name(i) for i in range(18)] == [alone.train.name(i) for i in range(18)]
    assert set(names[18:]) <= {old.train.name(i) for i in range(len(old.train))} and len(set(names)) == 18 + different
    assert names == [images.train.image(i) for i in range(len(names))]
    assert max(Counter(names[18:]).values()) == -(-18 // different)
    assert images.train.labels is None and len(images.splits.train) == 18
    assert fit_schedule(config, 36, ALONE).steps == round(44 * (50_000 / 36) ** 0.5) * (36 // 32)
    assert alone.train.fingerprint == own.train.fingerprint and images.train.fingerprint != alone.train.fingerprint
    if number == 60:
        given = [*given[:4], "--rehearse", "old", "--batch-size", 16, "--loss-weight", 0, "--eval-images", 99]
        result = adapt(tmp_path, *given)
        assert result.code == 0, result.err
        assert "18 images and 18 of --rehearse\n" in result.out and "on 2 held-out images, k-NN" in result.out
        assert [line["epoch"] for line in lines(tmp_path) if "epoch" in line] == [0.5, 1.0, 1.5, 2.0]
        assert "| own | after | " in result.out and "| rehearsed | after | " in result.out


# ------------------------------------------------------------------------------------------------------ licences and weights


def test_the_licence_of_the_start_is_told_and_goes_through_adapting_and_fine_tuning_to_the_card(whole, start, tmp_path):
    folder, result = whole
    words = f"{'/'.join(start.parts[-2:])} is under cc-by-nc-4.0, which forbids commercial use"  # no more of a path
    assert words in result.out and words in result.err
    given = ["--model", folder / "run", "--data", "sample", "--preset", "quick", "--output-dir", "tuned", "--device", "cpu"]
    given += ["--max-steps", 1, "--epochs", 1, "--warmup-epochs", 0, "--workers", 0, "--train-images", 64, "--val-images", 8]
    done = run_script("finetune.py", *given, folder=tmp_path)
    assert done.code == 0 and words in done.out, done.err
    for place, run in ((folder, "run"), (tmp_path, "tuned")):
        encoders = [place / run / "encoder"] * 2 + [tmp_path / "tuned" / "best"]
        exported = run_script("export.py", "--run", run, folder=place)
        assert exported.code == 0 and words in exported.err, exported.err
        for encoder in encoders:
            config = json.loads((encoder / "config.json").read_text())
            assert config["pretrained_cfg"]["license"] == config["started_from"]["license"] == "cc-by-nc-4.0"
        card = (place / run / "encoder" / "README.md").read_text()
        assert 'license: "cc-by-nc-4.0"' in card and f"**Licence:** `{words}" in card and str(start) not in card
        ended = "stopped at step 10 of 56; the schedule was not finished: this encoder is for trying out"
        assert ended in card  # of what was fine-tuned from it too
    assert "fine-tuned for classification" in card and "2 blocks of width 48 with 2 heads" in card


@pytest.mark.parametrize(
    ("name", "trained"),
    [("random:vit", "trained for classification from random weights"), ("vit", "fine-tuned for classification")],
)
def test_a_run_from_nothing_claims_no_pretraining_and_warns_of_nothing(name, trained, tmp_path, tiny_vit, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    model = MultiViewMAE(tiny_vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    hub.export(model, "vit", license="")  # as pretrain.py writes a run from nothing
    started = starting_weights(tiny_vit(), name)
    assert describe_start(name, started) == ("random" if ":" in name else "vit (yours)")
    assert describe_start("runs/paper", {**started, "training": "pretrained", "license": "mit"}) == "runs/paper (yours, mit)"
    save_classifier(tiny_vit(num_classes=2), tmp_path / "out", ("cat", "dog"), started)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["training"].endswith(trained) and "started_from" not in config and caplog.records == []
    card = hub.write_card("out", repo="me/mine").read_text()
    assert f"{trained}`" in card and "**Licence:**" not in card


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
def test_a_licence_is_kept_by_any_model_and_warned_of_where_it_must_be(license, words, tmp_path, caplog):
    started = {"weights": "some_vit.tag", "license": license, "repo": "timm/some_vit.tag"}
    warning = license_warning(started)
    assert warning is None if words is None else words in warning and "some_vit.tag" in warning
    hub.export(timm.create_model("vit_small_patch16_224", **TINY, num_classes=0), tmp_path / "vit", started_from=started)
    assert (caplog.records == []) == (words is None)
    card = hub.write_card(tmp_path / "vit", repo="me/mine").read_text()
    assert 'base_model: "timm/some_vit.tag"' in card and ("**Licence:**" in card) == (words is not None)
    save_classifier(timm.create_model("test_convnext", num_classes=2), tmp_path / "conv", ("cat", "dog"), started)
    assert timm.create_model(f"local-dir:{tmp_path}/conv", pretrained=True).pretrained_cfg["license"] == license
    assert starting_weights(None, f"local-dir:{tmp_path}/conv")["license"] == license


def test_measured_statistics_equal_numpys_and_travel_with_the_export(whole):
    data, centre = open_images("sample"), CentreCropTransform(32)
    pixels = np.stack([centre(image).numpy() for image, _ in (data[i] for i in range(len(data)))]) / 255  # (N, C, H, W)
    measured = measure_channels(data, centre)
    assert measured.mean == pytest.approx(pixels.mean(axis=(0, 2, 3)), abs=1e-7)
    assert measured.std == pytest.approx(pixels.std(axis=(0, 2, 3)), abs=1e-7)
    assert measure_channels(data, centre, limit=50) == measure_channels(data, centre, limit=50) != measured
    state = end_of(whole[0])["about"]["inputs"]
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
    (tmp_path / "mine.py").write_text("import torch\n\ndef invert(view):\n    return 255 - view // 2\n")
    arguments = ["--data", "images", "--encoder", "mvmae_vit_micro_patch8_64", "--eval-images", 3]
    arguments += ["--in-chans", 1, "--image-size", 24, 40]
    arguments += ["--value-range", 0, 4095, "--mean", "auto", "--std", "auto"]
    arguments += ["--transform", "mine:invert", "--crop-scale", 0.05, 0.3, "--max-steps", 2]
    result = adapt(tmp_path, *arguments)
    assert result.code == 0, result.err
    assert "2 steps of 3 images (2 epochs)" in result.out and "view retrieval: " in result.out
    told = "jitter of brightness 0.4, contrast 0.4; no jitter of colour, which 1 channels do not have; then mine:invert"
    assert told in result.out
    cfg = json.loads((tmp_path / "run" / "encoder" / "config.json").read_text())["pretrained_cfg"]
    assert cfg["input_size"] == [1, 24, 40]
    assert cfg["mean"] == pytest.approx([0.5], abs=0.02) and 0.05 < cfg["std"][0] < 0.3


def test_a_file_of_weights_needs_its_architecture(start, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes((start / "model.safetensors").read_bytes())
    torch.save({"model": timm.create_model(f"local-dir:{start}", pretrained=True).state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(Stop, match="does not say its architecture: add --arch"):
        build_model(config_of("--encoder", file), CPU)
    shape = ["--encoder-args", "patch_size=8 embed_dim=48 depth=2 num_heads=2", "--image-size", 32]
    for name in (file, tmp_path / "weights.pth"):
        config = config_of("--encoder", name, "--arch", "vit_small_patch16_dinov3", *shape)
        encoder = build_model(config, CPU).encoder
        assert differ(encoder.state_dict(), loaded(start)) == set()
        assert "not recorded" in describe_start(config.encoder, starting_weights(encoder, config.encoder, config.arch))
    with_config = build_model(config_of("--encoder", start / "model.safetensors"), CPU)
    assert differ(with_config.encoder.state_dict(), loaded(start)) == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--encoder", "swin_tiny_patch4_window7_224"], ["SwinTransformer", "windows"]),
        (["--encoder", "no/such.safetensors"], ["there is no file or folder no/such.safetensors"]),
        (["--encoder", "local-dir:no/such"], ["no/such"]),
        (["--mean", "automatic"], ["--mean must be numbers, or auto alone, got 'automatic'"]),
        (["--rehearse", "no/such"], ["--rehearse", "no/such"]),
        (["--freeze", "0.5"], ["--freeze", "below 0.5"]),
        (["--train-blocks", "3"], ["--train-blocks", "2 blocks", "got 3"]),
        (["--value-range", "9", "3"], ["--value-range must be two numbers, low and high, got 9 3"]),
        (["--transform", "mine:invent"], ["--transform must be module:function", "got mine:invent"]),
    ],
)
def test_what_cannot_be_is_one_line(start, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Stop, ValueError, TypeError)) as caught:
        script.main(config_of("--encoder", f"local-dir:{start}", *arguments))
    assert getattr(caught.value, "code", 2) == 2 and [word for word in words if word not in str(caught.value)] == []
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_drift_of_what_stays_turns_and_is_lost():
    x = torch.randn(200, 16)
    turn = torch.linalg.qr(torch.randn(16, 16))[0]
    assert mean_cosine(x, 3 * x) == pytest.approx(1) and linear_cka(x, x) == pytest.approx(1)
    assert mean_cosine(x, -x) == pytest.approx(-1) and linear_cka(x, 2 * x @ turn + 1) == pytest.approx(1)
    assert linear_cka(x, torch.randn(200, 16)) < 0.2 and linear_cka(x, torch.ones(200, 3)) == 0
    gram = [(y - y.mean(0)) @ (y - y.mean(0)).T for y in (x, x[:, :5])]
    expected = (gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm())
    assert linear_cka(x, x[:, :5]) == pytest.approx(float(expected), rel=1e-5)


def test_an_augmentation_of_ones_own_must_return_bytes():
    with pytest.raises(TypeError, match="torch.uint8"):
        AugmentedViews(MultiViewTransform(16), torch.Tensor.float)(np.zeros((40, 50, 3), dtype=np.uint8))


def test_jitter_of_the_command_line_changes_the_views_and_one_of_zeros_none():
    red = np.broadcast_to(np.array([200, 20, 20], dtype=np.uint8), (40, 50, 3))
    plain = MultiViewTransform(16)
    assert jittered(plain, (), 0) is plain and jittered(plain, (0, 0, 0, 0), 0) is plain
    grey = jittered(plain, (), 1)(red, generator=torch.Generator().manual_seed(0))
    assert grey.shape == (2, 3, 16, 16) and (grey == 74).all()  # 0.299 x 200 + 0.701 x 20 = 73.8
    first, second = jittered(plain, (0.5, 0), 0)(red, generator=torch.Generator().manual_seed(0))
    assert len(first.unique()) == 2 and not torch.equal(first, second)
    assert abs(int(first[0, 0, 0]) - 10 * int(first[1, 0, 0])) <= 5 or int(first[0, 0, 0]) == 255
