"""What is trained of an encoder: all of it, its last blocks, LoRA; masked encoding, export and resume under each."""

import json
import signal
import sys

import pytest
import timm
import torch
from mvmae.wrappers import merged, merged_weights
from running import EXAMPLES, run_processes, run_script, without_clock
from tiny_run import assert_identical, end_of, losses, write_images

from mvmae import Mask, MultiViewMAE, backward_in_parts, encode_visible, hub, projection_mlp, random_mask

sys.path.append(str(EXAMPLES))
from engine.ends import Stop
from tasks.gentle import train_part
from tasks.starting import parameter_groups

peft = pytest.importorskip("peft")
WAYS = ["all", "last", "lora", "explora"]
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2, "num_classes": 0}
KINDS = {"ViT": "vit_tiny_patch16_224", "rotary": "vit_small_patch16_dinov3", "EVA-02": "eva02_tiny_patch14_224"}


def gentle(way, name=KINDS["ViT"], *, moved=True, blocks=1, layers="attention"):
    """A pretraining model of which one part is trained; with ``moved`` LoRA is no longer 0."""
    torch.manual_seed(0)
    vit = timm.create_model(name, **SIZES)
    options = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "projector": projection_mlp(48, 16, 8)}
    model = MultiViewMAE(vit, **options)
    said = train_part(vit, way, blocks=blocks, rank=4, layers=layers, seed=1)
    for key, value in vit.named_parameters():
        if moved and ".lora_B." in key:
            torch.nn.init.normal_(value, std=0.05)
    return model, said


def trained_names(vit):
    return {name for name, parameter in vit.named_parameters() if parameter.requires_grad}


def test_each_way_trains_what_it_says():
    model, said = gentle("all")
    everything = trained_names(model.encoder)
    assert "all 3 blocks" in said and "patch_embed.proj.weight" in everything
    last, said = gentle("last", blocks=2)
    of_last = {name for name in everything if name.startswith(("blocks.1.", "blocks.2.", "norm."))}
    assert trained_names(last.encoder) == of_last and "the last 2 of 3 blocks and the final norm" in said
    lora, said = gentle("lora")
    expected = {f"blocks.{i}.attn.{layer}.lora_{x}.default.weight" for i in range(3) for layer in ("qkv", "proj") for x in "AB"}
    assert trained_names(lora.encoder) == expected and "LoRA of rank 4 in 6 layers of all 3 blocks, 0.0" in said
    wide, _ = gentle("lora", layers="all")
    assert {name.split(".")[3] for name in trained_names(wide.encoder)} == {"qkv", "proj", "fc1", "fc2"}
    both, said = gentle("explora")
    names = {name for name in everything if name.startswith(("blocks.2.", "norm."))}
    names |= {name for name in expected if not name.startswith("blocks.2.")}
    assert trained_names(both.encoder) == names and "LoRA of rank 4 in 4 layers of the first 2 blocks" in said
    groups = parameter_groups(both, 0.05, 0.5)
    grouped = sorted(id(parameter) for group in groups for parameter in group["params"])
    assert grouped == sorted(id(parameter) for parameter in both.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_masked_encoding_and_gradients_work_and_the_export_is_plain(way, kind, tmp_path):
    model, _ = gentle(way, KINDS[kind])
    vit = model.eval().encoder
    assert type(vit).__name__ == ("VisionTransformer" if kind == "ViT" else "Eva")
    images = torch.randn(3, 3, 32, 32)
    nothing = Mask.from_masked(torch.zeros(3, 16, dtype=torch.bool))
    torch.testing.assert_close(encode_visible(vit, images, nothing), vit.forward_features(images), rtol=1e-5, atol=1e-5)
    views, mask = torch.randn(4, 2, 3, 32, 32), random_mask(8, 16, 0.75, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointed, parts in ((False, 1), (True, 1), (True, 2)):
        vit.set_grad_checkpointing(checkpointed)
        model.zero_grad(set_to_none=True)
        backward_in_parts(model.train(), views, parts, mask=mask)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
        assert all(value is not None and value.abs().sum() > 0 for value in gradients[-1].values() if value is not None)
        assert [name for name, value in gradients[-1].items() if value is None] == []
        assert [name for name, value in model.named_parameters() if not value.requires_grad and value.grad is not None] == []
    for name, value in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-6)
    hub.export(model, tmp_path, mean=(0.5,) * 3, std=(0.5,) * 3)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    whole = MultiViewMAE.from_pretrained(tmp_path).eval()
    assert not [name for name in plain.state_dict() if "lora" in name or "base_layer" in name]
    with torch.inference_mode():
        expected, tokens = model.eval().features(images), plain.forward_features(images)
        pooled = plain.fc_norm(tokens[:, plain.num_prefix_tokens :].mean(dim=1))
        torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(whole.features(images), expected, rtol=0, atol=1e-6)
    weights = merged(model).state_dict()
    assert list(merged_weights(model.state_dict())) == list(weights) == list(whole.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in merged_weights(model.state_dict()).items())


def test_lora_that_has_learned_nothing_is_exported_as_the_start_bit_for_bit(tmp_path):
    model, _ = gentle("explora", moved=False)
    hub.export(model, tmp_path, mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.manual_seed(0)
    start = timm.create_model(KINDS["ViT"], **SIZES).state_dict()
    written = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict()
    assert start.keys() == written.keys() and all(torch.equal(value, written[name]) for name, value in start.items())


def test_a_peft_wrapper_of_a_user_is_an_encoder(tiny_vit, tmp_path):
    vit = tiny_vit(global_pool="avg")
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], modules_to_save=["norm"], r=2)
    wrapper = peft.get_peft_model(vit, config)
    for name, value in wrapper.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(value, std=0.1)
    model, images = MultiViewMAE(wrapper, decoder_dim=16, decoder_depth=1, decoder_heads=2).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.features(images), wrapper.eval()(images), rtol=0, atol=1e-6)
    assert model.encoder is vit and any("lora_A" in name for name in trained_names(vit))
    model.save_pretrained(tmp_path)
    loaded = MultiViewMAE.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded.features(images), model.features(images), rtol=0, atol=1e-6)


def test_adapters_past_which_the_encoder_computes_are_refused(tiny_vit):
    convolution = peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["patch_embed.proj"], r=2))
    with pytest.raises(TypeError, match="the patch projection must have no adapter"):
        MultiViewMAE(convolution)
    eva = timm.create_model(KINDS["EVA-02"], **SIZES)
    wrapper = peft.get_peft_model(eva, peft.LoraConfig(target_modules=[f"blocks.{i}.attn.qkv" for i in range(3)], r=2))
    separate = [block.attn.qkv_bias_separate for block in eva.blocks]
    if hasattr(eva.blocks[0].attn, "qkv") and eva.blocks[0].attn.q_bias is not None and not all(separate):
        with pytest.raises(TypeError, match="qkv_bias_separate = True"):
            MultiViewMAE(wrapper)
    for block in eva.blocks:
        block.attn.qkv_bias_separate = True
    assert MultiViewMAE(wrapper, decoder_depth=1).encoder is eva


def test_what_no_way_can_train_is_one_line(tiny_vit, monkeypatch):
    options = {"rank": 2, "layers": "attention", "seed": 0}
    for way, blocks, words in (("last", 3, "none or more of 2 blocks"), ("explora", 2, "one or more of 2 blocks")):
        with pytest.raises(Stop, match=f"--train-blocks {blocks} must leave {words}"):
            train_part(tiny_vit(), way, blocks=blocks, **options)
    past = tiny_vit()
    past.blocks[1].attn.forward = lambda x, **_: x @ past.blocks[1].attn.proj.weight.T
    with pytest.raises(Stop, match=r"no effect in blocks\.1\.attn\.qkv, blocks\.1\.attn\.proj of this encoder"):
        train_part(past, "lora", blocks=1, **options)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Stop, match=r'must have the package peft: pip install "mvmae\[lora\]"'):
        train_part(tiny_vit(), "lora", blocks=1, **options)


ARGUMENTS = ["--data", "images", "--output-dir", "run", "--encoder", "vit_tiny_patch16_224", "--no-pretrained"]
ARGUMENTS += ["--encoder-args", "patch_size=8 embed_dim=32 depth=3 num_heads=2", "--image-size", 32, "--epochs", 5]
ARGUMENTS += ["--batch-size", 8, "--workers", 0, "--decoder-dim", 16, "--decoder-depth", 1, "--decoder-heads", 2]
ARGUMENTS += ["--device", "cpu", "--log-every", 1, "--freeze-epochs", 0.5, "--warmup-epochs", 0, "--projector", 8]
ARGUMENTS += ["--contrast-from", 0.1, "--optimizer", "adamw"]  # two steps of the reconstruction alone
ARGUMENTS += ["--base-lr", 0.05, "--monitor-every", 1, "--max-steps", 10, "--train-blocks", 1]
ARGUMENTS += ["--lora-rank", 4, "--guard-images", 4]
RUNS = {
    "all": ["--guard", 2, "--interpolate", 0.5],
    "last": ["--guard", 2, "--ema", 0.7, "--keep", "last"],
    "lora": ["--ema", 0.7, "--interpolate", 0.5, "--keep-by", "retrieval"],
    "explora": ["--guard", 2, "--guard-kind", "relational", "--accumulate", 2, "--grad-checkpointing"],
}


def adapt(folder, way, *more, **options):
    arguments = [*ARGUMENTS, "--train", way, *RUNS[way], *more]
    return run_script("adapt.py", *map(str, arguments), folder=folder, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs to the end, each on demand: ten steps, two of them with the encoder frozen, and looks after 4, 8 and 10."""
    done = {}

    def run(way):
        if way not in done:
            folder = tmp_path_factory.mktemp(way)
            (folder / "images").mkdir()
            write_images(folder / "images")
            done[way] = folder, adapt(folder, way)
        folder, result = done[way]
        assert result.code == 0 and "Traceback" not in result.err, result.err
        return folder, result

    return run


def exported(folder):
    return timm.create_model(f"local-dir:{folder}/run/encoder", pretrained=True).state_dict()


@pytest.mark.posix
@pytest.mark.parametrize("way", WAYS)
def test_a_cut_run_ends_bit_identical_under_each_way(way, runs, tmp_path):
    folder, result = runs(way)
    (tmp_path / "images").symlink_to(folder / "images")
    assert adapt(tmp_path, way, "--save-every", 5, fault="kill@5").code == -signal.SIGKILL
    resumed = adapt(tmp_path, way, "--save-every", 5, "--resume")
    assert resumed.code == 0, resumed.err
    left, right = end_of(tmp_path), end_of(folder)
    assert_identical(left, right)
    for part in ("choice", "average"):
        assert (part in left) == (part in right) == (part == "choice" or "--ema" in RUNS[way])
    weights = [state["choice"].pop("weights") | state.get("average", {}) for state in (left, right)]
    assert weights[0].keys() == weights[1].keys() and all(
        torch.equal(value, weights[1][name]) for name, value in weights[0].items()
    )
    assert left["choice"] == right["choice"] and left["choice"]["looked"] == 4
    here, there = exported(tmp_path), exported(folder)
    assert all(torch.equal(value, there[name]) for name, value in here.items())
    assert result.out.splitlines()[-1] == resumed.out.splitlines()[-1]
    logs = [[json.loads(line) for line in (f / "run" / "log.jsonl").read_text().splitlines()] for f in (tmp_path, folder)]
    assert without_clock(logs[0]) == without_clock(logs[1])
    summary = (folder / "run" / "summary.md").read_text()
    assert "## Before and after\n\n| images | encoder | effective rank |" in summary and "| own | after | " in result.out
    assert (folder / "run" / "gains.png").stat().st_size > 10_000
    assert (result.out.splitlines()[-1] in summary) and "parameters for the " in result.out
    trained = sum(len(group["params"]) for group in right["optimizer"]["param_groups"])
    assert len(right["optimizer"]["state"]) == trained  # of frozen weights there is none


def test_two_processes_train_alike_with_lora_the_guard_and_parts(runs, tmp_path):
    folder, _ = runs("explora")
    (tmp_path / "images").symlink_to(folder / "images")
    arguments = [*ARGUMENTS, "--train", "explora", *RUNS["explora"]]
    results = run_processes("adapt.py", *map(str, arguments), folder=tmp_path)
    assert [result.code for result in results] == [0, 0], results
    assert losses(tmp_path) == pytest.approx(losses(folder), rel=1e-4)
    guards = [
        [
            line["loss_guard"]
            for line in map(json.loads, (f / "run" / "log.jsonl").read_text().splitlines())
            if "loss_guard" in line
        ]
        for f in (tmp_path, folder)
    ]
    assert guards[0] == pytest.approx(guards[1], rel=1e-3, abs=1e-7)
    assert guards[1][:2] == [0, 0] and guards[1][-1] > 0  # frozen, then moved


def test_the_export_script_writes_what_the_run_has_chosen(runs):
    folder, result = runs("lora")
    before = exported(folder)
    assert not [name for name in before if "lora" in name]
    again = run_script("export.py", "--run", "run", folder=folder)
    assert again.code == 0, again.err
    after = exported(folder)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-7)
    assert "encoder/ holds" in result.out.splitlines()[-1]
