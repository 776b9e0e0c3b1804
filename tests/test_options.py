"""Options of all scripts: their ranges, what a preset says, what a mistake in them ends in."""

import dataclasses
import importlib
import math
import os
import re
import shlex
import sys
import typing

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import EXAMPLES, run_script
from tiny_run import pretrain

sys.path.insert(0, str(EXAMPLES))
import ablate
import finetune
import pretrain as pretraining
from engine.cli import changeable, flag, inherit, option, parse, run
from engine.config import RunConfig
from engine.ends import Stop
from engine.help import SECTIONS, sections
from tasks import backbones, starting
from tasks.backbones import summary

SCRIPTS = {path.stem: importlib.import_module(path.stem) for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
OPTIONS = [(name, field) for name, script in SCRIPTS.items() for field in dataclasses.fields(script.Config)]


def kind_of(name, field):
    """The type of an option's value, or of each of its values."""
    hint = typing.get_type_hints(SCRIPTS[name].Config)[field.name]
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def presets_of(name):
    return getattr(SCRIPTS[name], "PRESETS", {})


def chosen_presets(name):
    """What asks for each preset of a script; nothing, once, where a script has none."""
    return [["--preset", preset] for preset in presets_of(name)] or [[]]


REQUIRED = {"adapt": ("data", "encoder")}


def needed(name, *without):
    """The least that a script has to be given, but for some options."""
    names = [field.name for script, field in OPTIONS if script == name]
    asked = [one for one in names if one in REQUIRED.get(name, ("data", "model", "models", "run")) and one not in without]
    return [word for one in asked for word in (flag(one), "x")]


def outcome(name, arguments, monkeypatch, capsys):
    """What ``run`` makes of a command line: the options that the script sees, its exit code, what is printed as an error."""

    def leave(code):
        raise SystemExit(code)

    seen, code = [], 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(os, "_exit", leave)
        try:
            run(seen.append, SCRIPTS[name].Config, presets_of(name), None)
        except SystemExit as end:
            code = end.code
    return seen, code, capsys.readouterr().err


NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers(-3, 3).map(str),
    st.floats().map(repr),
    st.sampled_from(
        ["nan", "inf", "-inf", "-0.0", "1e999", "1e-400", "0x10", "1_0", "", " ", "--", "None", "auto", "9" * 5000]
    ),
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=8),
)


@pytest.mark.parametrize(("name", "field"), OPTIONS, ids=lambda value: getattr(value, "name", value))
def test_f42_any_value_is_in_its_range_or_ends_in_one_line(name, field, monkeypatch, capsys):
    bounds = field.metadata["bounds"]
    several = typing.get_origin(typing.get_type_hints(SCRIPTS[name].Config)[field.name]) is tuple

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(NUMBERS)
    def holds(text):
        typed = [f"{flag(field.name)}={text}"]
        if field.metadata["lengths"] == (2,):
            typed = [flag(field.name), text, text]
        seen, code, error = outcome(name, [*needed(name, field.name), *typed], monkeypatch, capsys)
        if code:
            assert not seen and code == 2 and error.startswith("error: ") and error.count("\n") == 1, (code, error)
            return
        (config,) = seen
        values = getattr(config, field.name)
        for value in values if several else [values]:
            if field.metadata["choices"]:
                assert value in field.metadata["choices"]
            elif not isinstance(value, str | bool):  # any text is one: what it names is for the script to find
                assert math.isfinite(value) and value < 2**31
                assert bounds.get("of at least", -math.inf) <= value <= bounds.get("at most", math.inf)
                assert bounds.get("above", -math.inf) < value < bounds.get("below", math.inf)

    holds()


def test_f42_every_number_has_a_range_and_every_preset_is_in_it():
    free = {(name, field.name) for name, field in OPTIONS if kind_of(name, field) in (int, float, float | str)}
    free -= {(name, field.name) for name, field in OPTIONS if field.metadata["bounds"]}
    assert {one for _, one in free} == {"value_range"}
    for name, script in SCRIPTS.items():
        for preset in chosen_presets(name):
            plain, typed = parse(script.Config, presets_of(name), None, [*preset, *needed(name)]), []
            for one, value in dataclasses.asdict(plain).items():
                if isinstance(value, bool):
                    typed.append(flag(one) if value else flag(f"no_{one}"))
                elif isinstance(value, tuple):
                    typed += [flag(one), *map(str, value)] if value else []
                else:
                    typed.append(f"{flag(one)}={value}")
            assert parse(script.Config, presets_of(name), None, [*preset, *typed]) == plain


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("pretrain.py", ["--data", "x", "--log-every", 0], ["--log-every", "at least 1", "'0'"]),
        ("pretrain.py", ["--data", "x", "--temperature", 0], ["--temperature", "above 0"]),
        ("finetune.py", ["--data", "x", "--model", "x", "--workers", -1], ["--workers", "at least 0", "'-1'"]),
        ("segment.py", ["--data", "x", "--lr", "nan"], ["--lr", "finite", "'nan'"]),
        ("linear_probe.py", ["--data", "x", "--models", "x", "--val", 0.1], ["no option --val", "--val-images"]),
        ("pretrain.py", ["--data", "sample", "--encoder", "resnet50", "--preset", "quick"], ["ResNet", "plain ViT"]),
        ("pretrain.py", ["--data", "sample", "--preset", "quick", "--encoder-args", "patch_size=0"], ["patch_size=0"]),
        ("finetune.py", ["--data", "sample", "--model", "rums/quick"], ["no file or folder rums/quick"]),
        ("visualize.py", ["--data", "sample", "--models", "random:mvmae_vit_tiny_patch16", "--image-size", 7], ["7", "patch"]),
        (
            "finetune.py",
            ["--data", "sample", "--model", "random:vit_tiny_patch16_224", "--augment", "foo"],
            ["--augment", "foo"],
        ),
    ],
)
def test_f42_a_script_ends_in_one_line_and_exit_code_2(script, arguments, words, tmp_path):
    result = run_script(script, *arguments, "--output-dir", "run", folder=tmp_path)
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2 and len(lines) == 1 and "Traceback" not in result.err, result
    assert [word for word in words if word not in lines[0]] == []


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--val", "0.1"], "there is no option --val: did you mean --value-range?"),
        (["--epoch", "3"], "there is no option --epoch: did you mean --epochs?"),
        (["--log-evry=3"], "did you mean --log-every"),
        (["more"], "'more' belongs to no option"),
        (["--crop-scale", "0.2"], "--crop-scale must be two numbers, low and high, got 0.2"),
        (["--crop-scale", "1", "0.2"], "--crop-scale must be two numbers, low and high, got 1 0.2"),
        (["--image-size", "1", "2", "3"], "--image-size must be 1 or 2 numbers, got 1 2 3"),
        (["--preset", "adpt"], "--preset: invalid choice: 'adpt'"),
        (["--output-dir", "~nobody-of-this-name/x"], "names no user's home"),
    ],
)
def test_a_mistake_in_an_option_is_told_with_its_cure(typed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(pretraining.Config, pretraining.PRESETS, None, ["--data", "x", *typed])
    with pytest.raises(ValueError, match="--data must be given"):
        parse(pretraining.Config, pretraining.PRESETS, None, [])


def test_f56_the_home_is_put_for_a_tilde_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    for name, script in SCRIPTS.items():
        for field in dataclasses.fields(script.Config):
            if field.name in ("data", "also", "rehearse", "output_dir", "encoder", "model", "models", "run"):
                for before in ("", "random:", "random:local-dir:") if "model" in field.name else ("",):
                    typed = [*needed(name), f"{flag(field.name)}={before}~/x"]
                    value = getattr(parse(script.Config, presets_of(name), None, typed), field.name)
                    assert value in (f"{before}/somebody/x", (f"{before}/somebody/x",)), (name, field.name)
            else:
                assert not field.metadata["path"]
    typed = parse(SCRIPTS["export"].Config, {}, None, ["--run", "x", "--command", "~/python a"])
    assert typed.command == "~/python a"


def test_a_presets_encoder_arguments_go_with_its_encoder_alone():
    def chosen(*typed):
        return parse(pretraining.Config, pretraining.PRESETS, None, ["--data", "x", "--preset", "quick", *typed]).encoder_args

    assert chosen() == chosen("--encoder", "mvmae_vit_tiny_patch16") == pretraining.PRESETS["quick"]["encoder_args"]
    assert chosen("--encoder", "vit_small_patch16_224") == ""
    assert chosen("--encoder", "vit_small_patch16_224", "--encoder-args", "depth=2") == "depth=2"
    own = pretraining.PRESETS["quick"]["encoder_args"]
    assert chosen("--encoder", "vit_small_patch16_224", "--encoder-args", own) == own
    toy = parse(SCRIPTS["segment"].Config, SCRIPTS["segment"].PRESETS, None, ["--preset", "toy", "--model", "runs/shapes"])
    assert toy.model_args == ""


def test_the_first_lines_of_a_run_say_what_is_trained(images, tmp_path):
    arguments = ["--encoder", "vit_tiny_patch16_224", "--encoder-args", "depth=2", "--max-steps", 1, "--workers", 10**6]
    result = pretrain(tmp_path, images, *arguments)
    assert result.code == 0, result.err
    first, second = result.out.splitlines()[:2]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert first == f"--workers 1000000 is more than this machine's processor cores: {cores} processes load images"
    number = sum(p.numel() for p in timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=0).parameters())
    assert second == (
        f"model       vit_tiny_patch16_224, {number / 1e6:.2f} M parameters, 2 blocks of width 192, "
        "images of 32x32 pixels, patches of 16x16"
    )
    peak, base, batch = re.search(r", peak learning rate (\S+) \((\S+) x (\d+) / 256\), on cpu", result.out).groups()
    assert float(peak) == pytest.approx(float(base) * int(batch) / 256, rel=0.01) != 0
    assert "UserWarning" not in result.err


WITH_DATA = [name for name in SCRIPTS if any(one == name and field.name == "data" for one, field in OPTIONS)]


@pytest.mark.parametrize("name", [name for name in WITH_DATA if name != "ablate"])  # which names the data to the others
def test_a_data_set_that_is_not_there_is_named_alone(name, tmp_path):
    given = {"data": "nowhere/x", "model": "random:vit_tiny_patch16_224", "encoder": "random:vit_tiny_patch16_224"}
    given |= {"models": given["model"], "workers": 10**6, "device": "cpu"}
    fields = {field.name for one, field in OPTIONS if one == name}
    typed = [word for one, value in given.items() if one in fields for word in (flag(one), value)]
    done = run_script(f"{name}.py", *typed, folder=tmp_path)
    told = re.fullmatch(
        r"error: --data: no such folder(, file or data set)?: nowhere/x \(the current folder is (.*)\)\n", done.err
    )
    assert told and told[2] == str(tmp_path), done.err
    assert (done.code, done.out) == (2, "")


def test_models_of_other_kinds_are_summed_up_too():
    resnet = timm.create_model("resnet18", num_classes=0)
    assert summary(resnet) == "resnet18, 11.18 M parameters, images of 224x224 pixels"
    assert summary(resnet, name="runs/x") == f"runs/x (like {summary(resnet).replace(',', '),', 1)}"
    tagged = summary(resnet, name="resnet18.a1_in1k")
    assert tagged == summary(resnet).replace("resnet18", "resnet18.a1_in1k")
    assert summary(torch.nn.Sequential(), 8, "runs/x") == "runs/x, 0.00 M parameters, images of 8x8 pixels"
    assert summary(resnet, 96) == "resnet18, 11.18 M parameters, images of 96x96 pixels"
    with torch.device("meta"):
        for name in ("swin_tiny_patch4_window7_224", "hiera_tiny_224", "levit_128", "pvt_v2_b0", "xcit_nano_12_p16_224"):
            for model in timm.list_models(f"{name}*")[:1]:
                assert summary(timm.create_model(model)).startswith(f"{model}, ")


def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(monkeypatch):
    asked, create = [], timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **kw: (asked.append(kw.get("pretrained", False)), create(*args, **kw))[1]
    )
    with pytest.raises(TypeError, match="must be a timm VisionTransformer or Eva, got ResNet"):
        starting.start_encoder("resnet18", "patch_size=8 embed_dim=128", pretrained=True, image_size=(48,))
    assert asked == [False]


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, field in OPTIONS if name not in ("export", "visualize")])
def test_torchrun_passes_an_option_on(name, field):
    """Its parser takes the beginning of an option of its own for that option, after the script's name too.

    Not asked of the two scripts that run in one process.
    """
    from torch.distributed.run import get_args_parser  # not collected on Windows, whose signals it was not written for

    for typed in ([flag(field.name), "1"], [flag(field.name).replace("--", "--no-")]):
        line = get_args_parser().parse_args(["--nproc-per-node", "2", f"examples/{name}.py", *typed])
        assert line.training_script_args == typed and line.nproc_per_node == "2"


def test_an_encoder_of_random_weights_is_named_without_random():
    with pytest.raises(Stop, match="takes no 'random:', .* give 'vit_tiny_patch16_224': .*--no-pretrained"):
        starting.start_encoder("random:vit_tiny_patch16_224")


def test_a_mistyped_path_is_told_with_near_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "adapted" / "encoder").mkdir(parents=True)
    (tmp_path / "runs" / "adapter").mkdir()  # no model lies in it
    (tmp_path / "runs" / "adapted" / "encoder" / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    for name in ("runs/adaptd", "run/adapted", "./runs/adaptd", f"{tmp_path}/runs/adaptd", "local-dir:runs/adaptd"):
        with pytest.raises(Stop, match=r"there is no file or folder .*: did you mean [^ ]*runs/adapted\?$"):
            backbones.find_weights(name)
    with pytest.raises(Stop, match="there is no file or folder nothing/like/it$"):
        backbones.find_weights("nothing/like/it")
    assert backbones.find_weights("hf-hub:owner/name") == ("hf-hub:owner/name", None)


def test_a_function_that_is_not_there_is_told_before_the_first_look(images, tmp_path):
    result = pretrain(tmp_path, images, "--transform", "nowhere:function", "--monitor-images", 16)
    assert result.code == 2 and "--transform must be module:function" in result.err and "nowhere:function" in result.err
    assert "effective_rank" not in result.out and not (tmp_path / "run").exists()


def test_none_leaves_a_measure_of_an_ablation_out_and_its_lines_are_read_first(tmp_path, monkeypatch):
    line = " ".join(map(str, ["--encoder-args=depth=1", "--image-size", 32, "--encoder", "mvmae_vit_tiny_patch16"]))

    def config(*typed):
        given = ["--data", "sample", "--output-dir", str(tmp_path), "--seeds", "0", "--pretrain", line, *typed]
        return parse(ablate.Config, ablate.PRESETS, None, given)

    ran = []
    monkeypatch.setattr(ablate, "run_arm", lambda planned, processes: ran.append(set(planned.scripts)))
    with pytest.raises(Stop, match="has finished"):
        ablate.main(config("--preset", "fashion", "--finetune", "none", "--tables", "contrast"))
    assert ran == [{"pretrain", "probe"}] * 2
    for typed, message in (
        (["--probe", "--epochs none"], "--probe: --epochs: must be a whole number"),
        (["--finetune", "--epoch 3"], "--finetune: there is no option --epoch"),
        (["--finetune", "'"], "--finetune: No closing quotation"),
    ):
        with pytest.raises(Stop, match=message):
            ablate.main(config("--preset", "fashion", *typed))
    assert len(ran) == 2


def test_options_of_a_preset_that_are_typed_stay_typed():
    @dataclasses.dataclass(frozen=True)
    class Config:
        name: str = option("a", "name", section="Run")
        size: int = option(1, "size", at_least=1, belongs_to="name")

    presets = {"plain": {}, "other": {"name": "b", "size": 2}}

    def chosen(*typed):
        return dataclasses.astuple(parse(Config, presets, None, list(typed)))

    assert chosen() == ("a", 1)
    assert chosen("--preset", "other") == ("b", 2)
    assert chosen("--preset", "other", "--name", "c") == ("c", 1)
    assert chosen("--preset", "other", "--name", "c", "--size", "2") == ("c", 2)
    assert chosen("--preset", "other", "--name", "b") == ("b", 2)


TRAINED = ("pretrain", "adapt", "finetune", "linear_probe", "detect", "segment")


@pytest.mark.parametrize("name", TRAINED)
def test_the_options_of_a_run_are_the_same_in_every_script_that_trains(name):
    config = SCRIPTS[name].Config
    for option_name, shared in RunConfig.__dataclass_fields__.items():
        own = config.__dataclass_fields__[option_name]
        assert {**own.metadata, "help": ""} == {**shared.metadata, "help": ""} and own.type == shared.type, option_name
    assert changeable(RunConfig) < changeable(config)


def help_of(name, monkeypatch, capsys, *typed, columns=100):
    """What a script prints for ``--help``."""
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "argv", [f"{name}.py"])
        with pytest.raises(SystemExit):
            parse(SCRIPTS[name].Config, presets_of(name), SCRIPTS[name].__doc__, [*typed, "--help"])
    return capsys.readouterr().out


def options_in(text):
    """The words about each option in a help, by its flag, and the titles of the sections with the options in them."""
    found, titles, flags = {}, {}, []
    for line in text.partition("\noptions:\n")[2].partition("\nA preset ")[0].splitlines():
        if title := re.fullmatch(r"([A-Z][\w ]*):", line):
            flags = titles.setdefault(title[1], [])
        elif option := re.match(r"  (--[\w-]+)(?:, --no-[\w-]+)?((?: [\w{},.\[\]-]+)*)(.*)", line):
            flags.append(option[1])
            found[option[1]] = option[3]
        elif line.startswith("   ") and found:
            found[flags[-1] if flags else next(iter(found))] += f" {line.strip()}"
    return {name: " ".join(words.split()) for name, words in found.items()}, titles


def told_default(words):
    return re.search(r"default: ([^;]*?)(?: \(.*\))?\]$", words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_stands_in_a_section_and_its_help_begins_with_a_word(name, monkeypatch, capsys):
    words, titles = options_in(help_of(name, monkeypatch, capsys))
    config = SCRIPTS[name].Config
    wanted = {flag(field.name) for script, field in OPTIONS if script == name}
    assert {one for flags in titles.values() for one in flags} == wanted
    assert sum(map(len, titles.values())) == len(wanted)
    assert set(titles) <= set(SECTIONS) and list(titles) == sorted(titles, key=SECTIONS.index)
    for one in wanted:
        assert re.match(r"[A-Za-z]{2,}", words[one]), (one, words[one])
        told = config.__dataclass_fields__[one[2:].replace("-", "_")].metadata["help"]
        assert set(re.findall(r"\w+", told)) <= set(re.findall(r"\w+", words[one])), (one, words[one])
        assert "()" not in words[one] and "''" not in words[one] and "{," not in words[one]
        assert (told_default(words[one]) is None) == (one in titles.get("Required", [])), (one, words[one])


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_defaults_of_the_preset_that_is_asked_for(name, monkeypatch, capsys):
    fields = {field.name: field for script, field in OPTIONS if script == name}
    for preset in chosen_presets(name):
        text = help_of(name, monkeypatch, capsys, *preset)
        words, titles = options_in(text)
        values = presets_of(name)[preset[1]] if preset else {}
        for one, field in fields.items():
            value = values.get(one, field.default)
            if value is dataclasses.MISSING:
                assert flag(one) in titles["Required"]
                assert f"{flag(one)} " in text.partition("\n")[0]
                continue
            shown = told_default(words[flag(one)])[1]
            if isinstance(value, bool):
                assert shown == ("yes" if value else "no")
            elif isinstance(value, str) and value:
                assert shown == value
            elif not isinstance(value, str):
                given = value if isinstance(value, tuple) else (value,)
                kind = float if kind_of(name, field) is float else str
                assert not given or [kind(word) for word in shown.split()] == list(map(kind, given)), (one, shown)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if presets_of(name)])
def test_help_says_what_each_preset_is_for_and_what_it_sets(name, monkeypatch, capsys):
    presets, config = presets_of(name), SCRIPTS[name].Config
    for preset, values in presets.items():
        assert set(values) <= {"help", *config.__dataclass_fields__} and values["help"]
        text = help_of(name, monkeypatch, capsys, "--preset", preset)
        about = " ".join(text.partition("\nA preset replaces ")[2].split())
        assert [other for other in presets if f" {other} {presets[other]['help']}" not in about] == []
        line = text.partition(f"\npreset {preset} sets:\n")[2]
        assert bool(line) != (f"\npreset {preset} sets nothing beyond the defaults above" in text)
        others = needed(name, *values)
        whole = parse(config, presets, None, ["--preset", preset, *others])
        assert parse(config, {}, None, [*shlex.split(line), *others]) == whole


@pytest.mark.parametrize("columns", [80, 100, 130])
@pytest.mark.parametrize("name", SCRIPTS)
def test_no_line_of_a_help_ends_inside_a_command_or_an_option(name, columns, monkeypatch, capsys):
    for preset in chosen_presets(name):
        lines = help_of(name, monkeypatch, capsys, *preset, columns=columns).splitlines()
        assert [line for line in lines if line.endswith("-")] == []
        command = re.compile(r"^  (?:python|torchrun) (?:.*\\\n)*.*$", re.MULTILINE)  # on until a line without a backslash
        commands = command.findall("\n".join(lines))
        assert commands == command.findall(SCRIPTS[name].__doc__) != []
        commands = "\n".join(commands).splitlines()
        assert max(map(len, commands)) <= 100
        assert [line for line in lines if line.endswith("\\")] == [line for line in commands if line.endswith("\\")]
        long = [line for line in lines if len(line) > columns - 2 and line not in commands]
        assert [line for line in long if not re.match(r"  --", line)] == []  # an option with its value is one word too


def test_an_option_stays_in_the_section_of_the_dataclass_that_declares_it_first():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Parent:
        size: int = option(1, "size", section="Data")
        depth: int = option(1, "depth", section="Model")
        width: int = option(1, "width")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Child(Parent):
        epochs: int = option(1, "epochs", section="Optimization")
        width: int = inherit(Parent, "width", 2)
        rate: float = option(0.1, "rate")

    own = {"size": "Data", "depth": "Model", "width": "Model"}
    assert sections(Parent) == own
    assert sections(Child) == own | {"epochs": "Optimization", "rate": "Optimization"}


def test_the_source_of_a_default_is_told_with_its_value_where_a_preset_sets_another(monkeypatch, capsys):
    assert options_in(help_of("pretrain", monkeypatch, capsys))[0]["--epochs"].endswith("[default: 1600 (paper)]")
    quick = options_in(help_of("pretrain", monkeypatch, capsys, "--preset", "quick"))[0]
    assert quick["--epochs"].endswith("[default: 30 (paper: 1600)]")
    assert quick["--crop-scale"].endswith("[two numbers, low and high; above 0 and at most 1; default: 0.2 1 (MAE)]")


def test_help_lists_what_must_be_given_first_and_what_all_runs_share_last(capsys):
    with pytest.raises(SystemExit):
        parse(finetune.Config, finetune.PRESETS, None, ["--help"])
    listed = re.findall(
        r"^  (--[a-z-]+)", capsys.readouterr().out.partition("\nRequired:")[2].partition("\nA preset ")[0], re.MULTILINE
    )
    assert listed[:2] == ["--data", "--model"]
    assert set(listed[-len(RunConfig.__dataclass_fields__) :]) == {flag(name) for name in RunConfig.__dataclass_fields__}
