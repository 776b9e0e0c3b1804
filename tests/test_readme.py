"""What a reader is told to type works: Python in README.md and examples/README.md, commands for the examples, links to files.

A fenced block is left out where the line that opens it says `no-run`.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from PIL import Image
from running import run_script

ROOT = Path(__file__).parents[1]
README, TUTORIAL, NOTEBOOK = ROOT / "README.md", ROOT / "examples" / "README.md", ROOT / "examples" / "tour.ipynb"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / ".github/CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*.md"))]
SCRIPTS = [path for path in sorted((ROOT / "examples").glob("*.py")) if "__main__" in path.read_text()]


def blocks_of(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that can be run."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # open files
@pytest.mark.parametrize(
    "code",
    [
        *blocks_of(README, "python"),
        blocks_of(README, "python")[1].replace("img_size=96", "img_size=96, in_chans=1"),
        *blocks_of(TUTORIAL, "python"),
    ],
)
def test_a_block_of_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'"([\w/-]+\.(?:jpg|png))"', code):
        Image.radial_gradient("L").resize((300, 260)).convert("RGB").save(name)
    namespace = {"__name__": "__main__"}
    exec(code, namespace)
    if "photograph.jpg" in code:
        assert namespace["features"].shape == (1, 192)


@pytest.mark.filterwarnings("default")  # Lightning's own
def test_the_loop_of_lightning_trains_with_a_loss_of_ones_own(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_lightning", reason="Lightning is no dependency: pip install pytorch-lightning")
    monkeypatch.chdir(tmp_path)
    code = (ROOT / "tests" / "lightning_loop.py").read_text()
    assert len(code.splitlines()) <= 42
    exec(code.replace("max_epochs=1", "max_steps=2").replace("num_workers=2", "num_workers=0"), {"__name__": "__main__"})
    assert timm.create_model("local-dir:runs/lightning/encoder", pretrained=True)(torch.zeros(1, 3, 64, 64)).shape == (1, 192)


class Command(NamedTuple):
    """A call of an example: where it stands, the script, what comes after the script, the whole."""

    where: str
    script: str
    arguments: list[str]
    words: list[str]


def commands_of(text: str, where: str) -> list[Command]:
    """The calls of `examples/*.py` in lines of shell, one for each part between `&&`, `||`, `;` and `|`."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if "examples/" not in line:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                for place in [n for n, word in enumerate(words) if re.fullmatch(r"examples/\w+\.py", word)][:1]:
                    found.append(Command(where, words[place], words[place + 1 :], words))
                words = []
            else:
                words.append(word)
    return found


def commands_of_page(page: Path) -> list[Command]:
    return [command for block in blocks_of(page, "bash") for command in commands_of(block, page.name)]


def commands_of_docstring(script: Path) -> list[Command]:
    """The calls in a script's docstring: the lines that start as a command does."""
    lines = (ast.get_docstring(ast.parse(script.read_text())) or "").replace("\\\n", " ").splitlines()
    typed = [line.strip() for line in lines if re.match(r" *(python|torchrun) ", line)]
    return commands_of("\n".join(typed), script.name)


COMMANDS = [command for page in PAGES for command in commands_of_page(page)]
COMMANDS += [command for script in SCRIPTS for command in commands_of_docstring(script)]


@lru_cache
def flags_of(script: str, folder: Path) -> set[str]:
    """The flags in the `--help` of a script."""
    done = run_script(Path(script).name, "--help", folder=folder)
    assert done.code == 0, done.err
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", done.out))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where} {' '.join(command.words)}")
def test_a_command_names_a_script_and_flags_that_exist(command, tmp_path_factory):
    assert (ROOT / command.script).is_file()
    used = {word.split("=")[0] for word in command.arguments if re.fullmatch(r"--?[A-Za-z][\w-]*(=.*)?", word)}
    assert used - flags_of(command.script, tmp_path_factory.getbasetemp()) == set()


def test_every_script_and_the_readmes_commands_are_among_those():
    assert {Path(command.script).name for command in COMMANDS} == {script.name for script in SCRIPTS}
    assert "examples/pretrain.py" in {command.script for command in commands_of_page(README)}


def is_on_sample(command: Command) -> bool:
    return bool(re.search(r"--data[ =]sample\b", " ".join(command.words)))


@pytest.mark.slow
def test_the_commands_on_the_sample_run_one_after_the_other(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [command for page in (README, TUTORIAL) for command in commands_of_page(page)]
    for name in ("linear_probe", "finetune", "visualize"):
        commands += commands_of_docstring(ROOT / f"examples/{name}.py")
    on_sample = [command for command in commands if is_on_sample(command)]
    scripts = {Path(command.script).stem for command in on_sample}
    assert scripts >= {"pretrain", "adapt", "linear_probe", "finetune", "visualize"}
    for command in on_sample:
        words = [sys.executable if re.fullmatch(r"(.*/)?python3?", word) else word for word in command.words]
        done = subprocess.run(["env", *words], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, f"{shlex.join(command.words)}\n{done.stdout}\n{done.stderr}"


PUBLIC = "vit_small_patch14_reg4_dinov2.lvd142m"
LEAVE_OUT = {"--push owner/name --private": "", PUBLIC: "public"}  # the Hub; `public` is a tiny encoder of the same kind
ENDS = {  # behind what is typed: a short course of small models on small views
    "adapt.py": "--epochs 1 --workers 0 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --eval-images 60",
    "embed.py": "--workers 0",
    "finetune.py": "--epochs 1 --warmup-epochs 0 --workers 0",
    "linear_probe.py": "--epochs 2 --workers 0",
    "pretrain.py": "--minutes 0 --steps 2 --workers 0 --eval-images 20 --device cpu",
    "visualize.py": "--count 2 --device cpu",
}


def test_the_commands_of_the_tutorial_run_one_after_the_other_on_200_pictures(tmp_path):
    for name, brightness in (("crack", 0), ("ok", 100)):
        (tmp_path / "my-images" / name).mkdir(parents=True)
        for i in range(100):
            noise, grey = Image.effect_noise((40, 34), 60), Image.new("L", (40, 34), brightness)
            Image.blend(grey, noise, 0.5).convert("RGB").save(tmp_path / "my-images" / name / f"{i}.png")
    small = {"embed_dim": 64, "depth": 1, "num_heads": 4, "num_classes": 0, "img_size": 28}
    public = timm.create_model(PUBLIC.split(".")[0], **small)
    timm.models.save_for_hf(public, tmp_path / "public", model_config={}, safe_serialization=True)
    printed = {}
    text = re.sub(r"`(python examples/[^`]+)`", r"\n\1\n", re.sub(r"^```.*", "", TUTORIAL.read_text(), flags=re.MULTILINE))
    five_minutes = [command for command in commands_of_page(README) if "runs/mine" in command.words]
    for command in [*five_minutes, *commands_of(text, "the tutorial's blocks and lines")]:
        words = shlex.join(command.arguments)
        if is_on_sample(command) or not re.search("my-images|runs/adapted", words):
            continue
        for typed, taken in LEAVE_OUT.items():
            words = words.replace(typed, taken)
        script = Path(command.script).name
        words = words.replace("--image-size 224", "--image-size 28") + " " + ENDS.get(script, "")
        done = run_script(script, *shlex.split(words), folder=tmp_path)
        assert done.code == 0, f"{script} {words}\n{done.out}\n{done.err}"
        printed[script] = done.out
    named = "pretrain visualize embed adapt linear_probe finetune export"
    assert printed.keys() == {f"{name}.py" for name in named.split()}
    assert (tmp_path / "runs/mine/pictures/neighbours.png").is_file()
    assert "180 images" in printed["adapt.py"] and "k-NN accuracy on held-out images" in printed["adapt.py"]
    assert all(
        "trained on 180 images, tested on 20, of 2 classes" in printed[one] for one in ("linear_probe.py", "finetune.py")
    )
    best = timm.create_model(f"local-dir:{tmp_path}/runs/classifier/best", pretrained=True)
    assert best.pretrained_cfg["label_names"] == ["crack", "ok"]


PAPER = [command for command in commands_of_page(TUTORIAL) if re.search("path/to|runs/(paper|depth)", " ".join(command.words))]
STEPS = "--max-steps 2 --workers 0 --device cpu --batch-size 4"
TINY = '--encoder-args "img_size=32 patch_size=8 embed_dim=32 depth=4 num_heads=2" --image-size 32 --decoder-dim 16'
TWO_STEPS = {  # behind what is typed: small models on small images, and two steps
    "pretrain.py": f"{TINY} --eval-images 0 {STEPS}",
    "finetune.py": STEPS,
    "linear_probe.py": f"{STEPS} --few-shot 0",
    "detect.py": f"{STEPS} --image-size 64 --window-size 4 --channels 16 --pictures 1",
    "segment.py": f"{STEPS} --image-size 64 --channels 16 --pictures 1",
    "ablate.py": f"--seeds 0 --tables contrast --pretrain '{TINY} --epochs 2 --eval-images 0 {STEPS}' --finetune '{STEPS}'",
    "visualize.py": "--count 2 --bank 2 --device cpu",
}


def test_the_commands_that_reproduce_the_paper_start(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from tasks.shapes import write_toy

    for name in ("red", "blue"):
        (tmp_path / "path/to/imagenet" / name).mkdir(parents=True)
        for i in range(20):
            Image.effect_noise((40, 36), 20 + 2 * i).convert("RGB").save(tmp_path / f"path/to/imagenet/{name}/{i}.png")
    for name in ("coco", "ADEChallengeData2016"):
        write_toy(tmp_path / "path/to" / name, side=64, train=8, val=2)
    assert {Path(command.script).name for command in PAPER} == TWO_STEPS.keys()
    for command in PAPER:
        script = Path(command.script).name
        words = [*command.arguments, *shlex.split(TWO_STEPS[script])]
        done = run_script(script, *words, folder=tmp_path)
        assert done.code == 0, f"{script} {shlex.join(words)}\n{done.out}\n{done.err}"
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {
        "table1",
        "table2",
        "table3",
        "table4",
        "figure2",
        "figure8",
    }


def prose_of(page: Path) -> str:
    """A page without its code, whose brackets are no links; of a notebook, its text."""
    text = page.read_text()
    if page == NOTEBOOK:
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`([^`\n]+)`", lambda code: re.sub(r"[\[\]()]", "", code[1]), text)


def anchors_of(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: page.name)
def test_a_relative_link_points_at_something(page):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose_of(page))
    if page == README:  # as PyPI shows it, where no file lies beside it
        assert all(inline.startswith("https://") for inline, _ in links) and "](" in page.read_text()
    if page in (TUTORIAL, NOTEBOOK):
        assert len(links) > 3
    for name, _, anchor in [(inline or html).partition("#") for inline, html in links]:
        if re.match(r"[a-z]+:", name):
            continue
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors_of(target), f"{name}#{anchor}"
