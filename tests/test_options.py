"""Options of all scripts: their ranges, what a preset says, what a mistake in them ends in, and their help."""

import dataclasses
import importlib
import math
import os
import re
import sys
import typing

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import EXAMPLES, run_script

sys.path.insert(0, str(EXAMPLES))

from engine.optim import warmup_steps
from engine.options import CORES, MEMORY, MOST_USED, SECTIONS, RunConfig, changeable, flag, option, parse, redefine, run
from engine.signals import NOTHING_SAVED, Stop
from mvmae.data import DataError

SCRIPTS = {path.stem: importlib.import_module(path.stem) for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
OPTIONS = [(name, field) for name, script in SCRIPTS.items() for field in dataclasses.fields(script.Config) if field.metadata]
TRAINED = ("pretrain", "adapt", "finetune", "linear_probe", "detect", "segment")


def presets_of(name):
    return getattr(SCRIPTS[name], "PRESETS", {})


def chosen_presets(name):
    """What asks for each preset of a script; nothing, once, where a script has none."""
    return [["--preset", preset] for preset in presets_of(name)] or [[]]


def needed(name, *without):
    """The least that a script has to be given, but for some options."""
    preset = next(iter(presets_of(name).values()), {})
    fields = [field for script, field in OPTIONS if script == name and field.default is dataclasses.MISSING]
    without = {*without, *preset}
    return [word for field in fields if field.name not in without for word in (flag(field.name), "x")]


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


def kind_of(field):
    """What decides how an option is read."""
    return str(field.type), *(str(field.metadata[key]) for key in ("bounds", "choices", "lengths"))


KINDS = {kind_of(field): (name, field) for name, field in OPTIONS}.values()


@pytest.mark.parametrize(("name", "field"), KINDS, ids=lambda value: getattr(value, "name", value))
def test_any_value_is_in_the_range_of_its_option_or_ends_in_one_line(name, field, monkeypatch, capsys):
    bounds, several = field.metadata["bounds"], typing.get_origin(field.type) is tuple

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(NUMBERS)
    def holds(text):
        typed = [flag(field.name), text, text] if field.metadata["lengths"] == (2,) else [f"{flag(field.name)}={text}"]
        seen, code, error = outcome(name, [*needed(name, field.name), *typed], monkeypatch, capsys)
        if code:
            assert not seen and code == 2 and error.startswith("error: ") and error.count("\n") == 1, (code, error)
            return
        values = getattr(seen[0], field.name)
        for value in values if several else [values]:
            if field.metadata["choices"]:
                assert value in field.metadata["choices"]
            elif not isinstance(value, str | bool):  # any text is one: what it names is for the script to find
                assert math.isfinite(value) and value < 2**31
                assert bounds.get("at_least", -math.inf) <= value <= bounds.get("at_most", math.inf)
                assert bounds.get("above", -math.inf) < value < bounds.get("below", math.inf)

    holds()


def test_every_number_has_a_range_and_every_preset_is_in_it():
    numbers = {(name, field.name) for name, field in OPTIONS if re.search(r"\b(int|float)\b", str(field.type))}
    numbers -= {(name, field.name) for name, field in OPTIONS if field.metadata["bounds"]}
    assert {one for _, one in numbers} <= {"value_range"}
    for name, script in SCRIPTS.items():
        fields = {field.name for script, field in OPTIONS if script == name}
        for preset in chosen_presets(name):
            plain, typed = parse(script.Config, presets_of(name), None, [*preset, *needed(name)]), []
            for one, value in dataclasses.asdict(plain).items():
                if one not in fields or value in ((), None):
                    continue
                if isinstance(value, bool):
                    typed.append(flag(one) if value else flag(f"no_{one}"))
                else:
                    typed += [flag(one), *map(str, value)] if isinstance(value, tuple) else [f"{flag(one)}={value}"]
            assert parse(script.Config, presets_of(name), None, [*preset, *typed]) == plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of no script."""

    data: str = option(dataclasses.MISSING, "images", path=True, section="Data")
    crop_scale: tuple[float, float] = option((0.2, 1.0), "share of the area", above=0, at_most=1, lengths=(2,))
    image_size: tuple[int, ...] = option((32,), "side in pixels", at_least=1, lengths=(1, 2))
    encoder: str = option("vit", "timm name", path=True, section="Model")
    encoder_args: str = option("", "arguments for timm")
    log_every: int = option(20, "steps between two lines", at_least=1, section="Run")
    epochs: float | None = option(None, "passes over the images; all if not given", at_least=0, section="Length")
    minutes: float = option(0, "minutes of the run", at_least=0)


PRESETS = {
    "plain": {"help": "nothing set"},
    "quick": {"help": "small", "encoder": "tiny", "encoder_args": "depth=1", "epochs": 3.0},
}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--crop", "0.1"], "there is no option --crop: did you mean --crop-scale?"),
        (["--epoch", "3"], "there is no option --epoch: did you mean --epochs?"),
        (["--log-evry=3"], "did you mean --log-every"),
        (["--minute", "2", "--epoch=x"], "--minute: did you mean --minutes? there is no option --epoch: did you mean"),
        (["more"], "there is no option more"),
        (["--crop-scale", "0.2"], "--crop-scale: expected 2 arguments"),
        (["--crop-scale", "1", "0.2"], "--crop-scale must be two numbers, low and high, got 1 0.2"),
        (["--image-size", "1", "2", "3"], "--image-size must be 1 or 2 values, got 3"),
        (["--preset", "quik"], "--preset: invalid choice: 'quik'"),
        (["--log-every", "0"], "--log-every: must be a whole number at least 1 and below 2147483648, got '0'"),
        (["--minutes", "2", "--epochs", "3"], "the length is given twice, by --minutes and --epochs: leave one out"),
        (["--epochs", "nan"], "--epochs: must be a finite number at least 0 and below 2147483648, got 'nan'"),
    ],
)
def test_a_mistake_in_an_option_is_told_with_its_cure(typed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(Config, PRESETS, None, ["--data", "x", *typed])
    with pytest.raises(ValueError, match="--data must be given"):
        parse(Config, PRESETS, None, [])


def test_a_preset_sets_defaults_what_is_typed_wins_and_its_arguments_are_for_its_own_encoder(monkeypatch):
    def chosen(*typed):
        found = parse(Config, PRESETS, None, ["--data", "x", "--preset", "quick", *typed])
        return found.encoder, found.encoder_args, found.epochs

    assert chosen() == chosen("--encoder", "tiny") == ("tiny", "depth=1", 3)
    assert chosen("--encoder", "other", "--epochs", "4") == ("other", "", 4)
    assert chosen("--encoder", "other", "--encoder-args", "depth=1") == ("other", "depth=1", 3)
    assert parse(Config, PRESETS, None, ["--data", "x"]).epochs is None
    monkeypatch.setenv("HOME", "/somebody")
    assert parse(Config, PRESETS, None, ["--data=~/x", "--encoder-args=~/y"]).data == "/somebody/x"


@pytest.mark.parametrize(
    ("name", "preset", "epochs", "warmup"),
    [
        *(("finetune", "paper", 100, 5), ("finetune", "quick", 20, 2)),
        *(("linear_probe", "mocov3", 100, 0), ("linear_probe", "mae", 100, 10)),
    ],
)
def test_the_warm_up_of_a_recipe_shrinks_with_the_run_unless_it_is_given(name, preset, epochs, warmup):
    script, per_epoch = SCRIPTS[name], 24

    def steps(*typed):
        typed = ["--preset", preset, *needed(name), *typed]
        config = parse(script.Config, script.PRESETS, None, typed)
        return config.epochs, warmup_steps(config, config.epochs * per_epoch, per_epoch)

    assert steps() == (epochs, warmup * per_epoch)
    assert steps("--epochs", "4") == (4, round(4 * per_epoch * warmup / epochs))
    assert steps("--epochs", "4", "--warmup-epochs", "1.5") == (4, 36)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Stop("why", 3), 3, "error: why"),
        (Stop("stopped after step 4", 143), 143, "stopped after step 4"),
        (KeyboardInterrupt(15), 143, NOTHING_SAVED),
        (ValueError("two\nlines"), 2, "error: two lines"),
        (
            torch.OutOfMemoryError("CUDA\nmore"),
            1,
            f"error: {MEMORY.format('OutOfMemoryError: CUDA')}",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, None),
        (DataError("a loading worker died"), 1, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_becomes_one_line_and_an_exit_code(error, code, line, monkeypatch, capsys):
    def fail(_):
        raise error

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["script", "--data", "x"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "stderr", sys.stderr)
        patch.setattr(sys, "stdout", sys.stdout)
        run(fail, Config, PRESETS, None)
    err = capsys.readouterr().err
    assert end.value.code == code and err.count("\n") == 1 and (err == f"{line}\n" or line is None), err


@pytest.mark.parametrize("name", TRAINED)
def test_the_options_of_a_run_are_the_same_in_every_script_that_trains(name):
    config = SCRIPTS[name].Config
    for option_name, shared in RunConfig.__dataclass_fields__.items():
        own = config.__dataclass_fields__[option_name]
        assert {**own.metadata, "help": ""} == {**shared.metadata, "help": ""} and own.type == shared.type, option_name
    assert changeable(RunConfig) < changeable(config)


def test_torchrun_passes_every_option_on():
    """Its parser takes the beginning of an option of its own for that option, after the script's name too."""
    from torch.distributed.run import get_args_parser  # not collected on Windows, whose signals it was not written for

    for name, field in [(name, field) for name, field in OPTIONS if name in TRAINED]:
        for typed in ([flag(field.name), "1"], [flag(field.name).replace("--", "--no-")]):
            line = get_args_parser().parse_args(["--nproc-per-node", "2", f"examples/{name}.py", *typed])
            assert line.training_script_args == typed and line.nproc_per_node == "2"


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("pretrain.py", ["--data", "x", "--log-every", 0], ["--log-every", "at least 1", "'0'"]),
        ("finetune.py", ["--data", "x", "--model", "x", "--workers", -1], ["--workers", "at least 0", "'-1'"]),
        ("linear_probe.py", ["--data", "sample", "--models", "random:mvmae_vit_micro_patch8_64", "rums/quick"], ["rums/quick"]),
        ("segment.py", ["--data", "x", "--lr", "nan"], ["--lr", "finite", "'nan'"]),
        ("pretrain.py", ["--data", "sample", "--preset", "quick", "--encoder-args", "patch_size=0"], ["patch_size=0"]),
        ("pretrain.py", ["--data", "sample", "--preset", "quick", "--transform", "nowhere:f"], ["--transform", "nowhere:f"]),
        ("finetune.py", ["--data", "sample", "--model", "rums/quick"], ["no file or folder rums/quick"]),
        ("visualize.py", ["--data", "sample", "--models", "random:mvmae_vit_tiny_patch16", "--image-size", 7], ["7", "patch"]),
    ],
)
def test_a_script_ends_in_one_line_and_exit_code_2_before_it_trains(script, arguments, words, tmp_path):
    result = run_script(script, *arguments, "--output-dir", "run", folder=tmp_path)
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2 and len(lines) == 1 and "Traceback" not in result.err, result
    assert [word for word in words if word not in lines[0]] == [] and "step 1/" not in result.out
    assert script == "pretrain.py" or not (tmp_path / "run").exists()


WITH_DATA = [name for name in SCRIPTS if any(one == name and field.name == "data" for one, field in OPTIONS)]


@pytest.mark.parametrize("name", [name for name in WITH_DATA if name != "ablate"])  # which names the data to the others
def test_a_data_set_that_is_not_there_is_named_alone(name, tmp_path):
    given = {"data": "nowhere/x", "workers": 1000, "device": "cpu"}
    given |= dict.fromkeys(("model", "models", "encoder"), "mvmae_vit_micro_patch8_64")
    fields = {field.name for one, field in OPTIONS if one == name}
    typed = [word for one, value in given.items() if one in fields for word in (flag(one), value)]
    done = run_script(f"{name}.py", *typed, folder=tmp_path)
    told = re.fullmatch(
        r"error: --data: no such folder(, file or data set)?: nowhere/x \(the current folder is (.*)\)\n", done.err
    )
    assert told and told[2] == str(tmp_path), done.err
    assert (done.code, done.out) == (2, "")


# ----------------------------------------------------------------------------------------------------------------- help


def help_of(config, presets, about, monkeypatch, capsys, *typed, columns=100):
    """What a script prints for ``--help``."""
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "argv", ["script.py"])
        with pytest.raises(SystemExit):
            parse(config, presets, about, [*typed, "--help"])
    return capsys.readouterr().out


def options_in(text):
    """The words about each option in a help, by its flag, and the titles of the sections with the options in them."""
    found, titles, flags = {}, {}, []
    for line in text.partition("\noptions:\n")[2].splitlines():
        if title := re.fullmatch(r"([A-Z][\w ]*):", line):
            flags = titles.setdefault(title[1], [])
        elif one := re.match(r"  (--[\w-]+)(?:, --no-[\w-]+)?((?: [\w{},.\[\]-]+)*)(.*)", line):
            flags.append(one[1])
            found[one[1]] = one[3]
        elif line.startswith("   ") and found:
            found[flags[-1] if flags else next(iter(found))] += f" {line.strip()}"
    return {name: " ".join(words.split()) for name, words in found.items()}, titles


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_option_once_in_its_section_with_the_default_of_the_preset(name, monkeypatch, capsys):
    script, fields = SCRIPTS[name], {flag(field.name): field for one, field in OPTIONS if one == name}
    for preset in chosen_presets(name):
        text = help_of(script.Config, presets_of(name), script.__doc__, monkeypatch, capsys, *preset)
        words, titles = options_in(text)
        assert sorted(one for flags in titles.values() for one in flags) == sorted(fields)
        assert set(titles) <= set(SECTIONS) and list(titles) == sorted(titles, key=SECTIONS.index)
        values = presets_of(name)[preset[1]] if preset else {}
        assert set(values) <= {"help", *script.Config.__dataclass_fields__}
        assert all(f"{other}: {presets_of(name)[other]['help']}" in " ".join(text.split()) for other in presets_of(name))
        for one, field in fields.items():
            value = values.get(field.name, field.default)
            value = min(value, CORES) if field.name == "workers" else value
            about = field.metadata["help"].rpartition(" (")[0] or field.metadata["help"]  # a source has its value beside it
            assert re.match(r"[A-Za-z]{2,}", words[one]) and about.split()[-1] in words[one], (one, words[one])
            shown = re.search(r"default: ([^;]*?)\]$", words[one])
            assert bool(shown) == (value not in ("", (), None, dataclasses.MISSING)), (one, words[one])
            if shown and isinstance(value, float | int) and not isinstance(value, bool):
                assert float(shown[1]) == value, (one, words[one])
            elif value is dataclasses.MISSING:
                assert f"{one} ..." in text.partition("\n\n")[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_line_of_a_help_ends_inside_a_command_or_an_option(name, monkeypatch, capsys, columns=80):
    about = SCRIPTS[name].__doc__
    indented = [line for line in about.splitlines() if line.startswith("  ")]
    commands = [line for line in indented if re.match(r"  (python|torchrun) ", line)]
    assert commands and max(map(len, commands)) <= 100
    for preset in chosen_presets(name):
        lines = help_of(
            SCRIPTS[name].Config, presets_of(name), about, monkeypatch, capsys, *preset, columns=columns
        ).splitlines()
        assert [line for line in lines if line.startswith("  ") and line in indented] == indented
        assert [line for line in lines if line.endswith("-")] == []
        long = [line for line in lines if len(line) > columns - 2 and line not in indented]
        assert [line for line in long if not re.match(r"  --", line)] == []  # an option with its value is one word too


def test_an_option_stays_in_the_section_of_the_dataclass_that_declares_it_first(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Child(Config):
        rate: float = option(0.1, "rate", at_least=0, section="Optimizer")
        log_every: int = redefine(Config, "log_every", 7)
        decay: float = option(0.1, "decay", at_least=0)

    titles = options_in(help_of(Child, {}, "about", monkeypatch, capsys))[1]
    assert titles["Run"] == ["--log-every"] and titles["Optimizer"] == ["--rate", "--decay"]
    assert titles[MOST_USED] == ["--data", "--encoder", "--image-size", "--epochs", "--minutes"]
    assert parse(Child, {}, None, ["--data", "x"]).log_every == 7
