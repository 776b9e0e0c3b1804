"""What a reader is told to type works: Python in README.md and examples/README.md, commands for the examples, links to files.

A fenced block is left out where its info string or the HTML comment above it says `no-run`.
"""

import ast
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
from PIL import Image
from running import run_script

from mvmae import hub

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TUTORIAL = ROOT / "examples" / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md")),
    *sorted((ROOT / "examples").glob("*.md")),
]
SHELL = {"bash", "sh", "shell", "console"}


class Block(NamedTuple):
    """A fenced block: its language, the heading above it, the line of its first line, its text."""

    language: str
    heading: str
    line: int
    text: str
    run: bool


def fenced_blocks(text: str) -> Iterator[Block]:
    heading, above, lines = "", "", text.splitlines()
    numbers = iter(range(len(lines)))
    for number in numbers:
        fence = re.match(r"\s*(`{3,}|~{3,})\s*(\S*)\s*(.*)", lines[number])
        if fence:
            first = number + 1
            last = next(n for n in numbers if lines[n].strip() == fence[1])
            body = textwrap.dedent("\n".join(lines[first:last]))
            run = "no-run" not in fence[3] and not re.fullmatch(r"<!--.*\bno-run\b.*-->", above.strip())
            yield Block(fence[2].lower(), heading, first + 1, body, run)
        elif re.match(r"#{1,2} ", lines[number]):
            heading = lines[number].strip("# ")
        above = lines[number] or above


def blocks_of(path: Path, languages: set[str]) -> list[Block]:
    if not path.exists():
        return []
    return [block for block in fenced_blocks(path.read_text()) if block.language in languages and block.run]


def sections() -> dict[str, list[Block]]:
    found: dict[str, list[Block]] = {}
    for page in (ROOT / "README.md", TUTORIAL):
        for block in blocks_of(page, {"python", "py"}):
            found.setdefault(f"{page.relative_to(ROOT)}: {block.heading}", []).append(block)
    return found


def draw_pictures(code: str) -> None:
    """Leaves a picture under each relative name with a picture's ending that the code holds as a string."""
    for node in ast.walk(ast.parse(code)):
        value = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if re.fullmatch(r"[\w][\w./-]*\.(jpe?g|png|webp)", value) and not Path(value).exists():
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Image.radial_gradient("L").resize((300, 260)).convert("RGB").save(value)


def leave_demo_encoder() -> None:
    """Writes an encoder like that of `pretrain.py --preset quick`, at its place."""
    made = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "img_size": 48}
    hub.export(timm.create_model("mvmae_vit_tiny_patch16", **made), "runs/quick/encoder")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # open files
@pytest.mark.parametrize("heading", sections())
def test_the_python_of_a_section_runs(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leave_demo_encoder()
    namespace = {"__name__": "__main__"}
    for block in sections()[heading]:
        draw_pictures(block.text)
        exec(compile("\n" * (block.line - 1) + block.text, heading.partition(":")[0], "exec"), namespace)
    if "runs/quick/encoder" in "".join(block.text for block in sections()[heading]):
        assert namespace["features"].shape == (1, 128)


class Command(NamedTuple):
    """A call of an example: where it stands, the script, what comes after the script, the whole."""

    where: str
    script: str
    arguments: tuple[str, ...]
    words: tuple[str, ...]


def commands_of(text: str, where: str) -> list[Command]:
    """The calls of `examples/*.py` in lines of shell, one for each part between `&&`, `||`, `;` and `|`."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if "examples/" not in line:
            continue
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                scripts = [n for n, word in enumerate(words) if re.fullmatch(r"(\./)?examples/\w+\.py", word)]
                if scripts:
                    script = words[scripts[0]].removeprefix("./")
                    found.append(Command(where, script, tuple(words[scripts[0] + 1 :]), tuple(words)))
                words = []
            else:
                words.append(word)
    return found


def commands_of_page(path: Path) -> list[Command]:
    return [command for block in blocks_of(path, SHELL) for command in commands_of(block.text, f"{path.name}:{block.line}")]


def commands_of_docstring(path: Path) -> list[Command]:
    """The calls in a script's docstring: the lines that start as a command does."""
    doc = (ast.get_docstring(ast.parse(path.read_text())) or "").replace("\\\n", " ")
    lines = [line.strip(" `$") for line in doc.splitlines()]
    starts = r"(\w+=\S+ )*(python3?|torchrun) "
    return [command for line in lines if re.match(starts, line) for command in commands_of(line, f"examples/{path.name}")]


def commands() -> list[Command]:
    shown = [command for page in PAGES for command in commands_of_page(page)]
    return shown + [command for path in EXAMPLES for command in commands_of_docstring(path)]


@lru_cache
def flags_of(script: str) -> frozenset[str]:
    """The flags in the `--help` of a script."""
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return frozenset(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", done.stdout))


@pytest.mark.parametrize("command", commands(), ids=lambda command: f"{command.where} {' '.join(command.words)}")
def test_a_command_names_a_script_and_flags_that_exist(command):
    assert (ROOT / command.script).is_file()
    used = {word.split("=")[0] for word in command.arguments if re.fullmatch(r"--?[A-Za-z][\w-]*(=.*)?", word)}
    assert used - flags_of(command.script) == set()


@pytest.mark.parametrize("path", [path for path in EXAMPLES if "__main__" in path.read_text()], ids=lambda path: path.name)
def test_a_script_says_how_it_is_called(path):
    assert f"examples/{path.name}" in {command.script for command in commands_of_docstring(path)}


def test_the_readme_shows_python_and_the_pretraining_command():
    assert sections()
    assert "examples/pretrain.py" in {command.script for command in commands_of_page(ROOT / "README.md")}


def is_on_sample(command: Command) -> bool:
    return bool(re.search(r"--data[ =]sample\b", " ".join(command.words)))


@pytest.mark.slow
def test_the_commands_on_the_sample_run_one_after_the_other(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shown = commands_of_page(ROOT / "README.md") + commands_of_page(TUTORIAL)
    on_sample = [command for command in shown if is_on_sample(command)]
    scripts = {Path(command.script).stem for command in on_sample}
    assert scripts >= {"pretrain", "adapt", "linear_probe", "finetune", "visualize"}
    for command in on_sample:
        words = [sys.executable if re.fullmatch(r"(.*/)?python3?", word) else word for word in command.words]
        done = subprocess.run(["env", *words], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, f"{command.where}: {shlex.join(command.words)}\n{done.stdout}\n{done.stderr}"


PUBLIC = "vit_small_patch14_reg4_dinov2.lvd142m"
LEAVE_OUT = {"--push owner/name --private": "", PUBLIC: "public"}  # the Hub; `public` is a tiny encoder of the same kind
ENDS = {  # behind what is typed: a short course of small models on small views
    "adapt.py": "--epochs 1 --workers 0 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --eval-images 60",
    "finetune.py": "--epochs 1 --warmup-epochs 0 --workers 0",
    "linear_probe.py": "--epochs 2 --workers 0",
}


def commands_of_tutorial() -> list[Command]:
    """The commands in blocks and in lines of the text, in their order."""
    text = re.sub(r"`(python examples/[^`]+)`", r"\n\1\n", re.sub(r"^```.*", "", TUTORIAL.read_text(), flags=re.MULTILINE))
    return [command for line in text.replace("\\\n", " ").splitlines() for command in commands_of(line, "examples/README.md")]


def draw_classes(folder: Path, names: Sequence[str], count: int, **kind: object) -> None:
    """Writes a folder of noisy pictures for each name, each of its own brightness."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        grey = Image.new("L", (40, 34), 200 * number // len(names))
        for i in range(count):
            Image.blend(grey, Image.effect_noise((40, 34), 60), 0.5).convert(**kind).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def before_the_tutorial(tmp_path_factory):
    """The pictures and the encoder that the page speaks of."""
    folder = tmp_path_factory.mktemp("tutorial")
    draw_classes(folder / "my-images", ["crack", "ok"], 100, mode="RGB")
    small = {"embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 0}
    public = timm.create_model(PUBLIC.split(".")[0], **{**small, "img_size": 28, "depth": 1})
    timm.models.save_for_hf(public, folder / "public", model_config={}, safe_serialization=True)
    return folder


def test_the_commands_of_the_tutorial_run_one_after_the_other_on_200_pictures(before_the_tutorial):
    said = {}
    for command in commands_of_tutorial():
        words = shlex.join(command.arguments)
        if is_on_sample(command) or not re.search(r"my-images|runs/", words):
            continue
        for typed, taken in LEAVE_OUT.items():
            words = words.replace(typed, taken)
        script = Path(command.script).name
        words = words.replace("--image-size 224", "--image-size 28") + " " + ENDS.get(script, "")
        done = run_script(script, *shlex.split(words), folder=before_the_tutorial)
        assert done.code == 0, f"{script} {words}\n{done.out}\n{done.err}"
        said[script] = done.out
    assert said.keys() == {"adapt.py", "linear_probe.py", "finetune.py", "export.py"}
    assert "180 images" in said["adapt.py"] and "k-NN accuracy on held-out images" in said["adapt.py"]
    assert all("trained on 180 images, tested on 20, of 2 classes (" in said[one] for one in ("linear_probe.py", "finetune.py"))
    best = timm.create_model(f"local-dir:{before_the_tutorial}/runs/classifier/best", pretrained=True)
    assert best.pretrained_cfg["label_names"] == ["crack", "ok"]


def without_code(text: str) -> str:
    """A page without its code, whose brackets are no links."""
    text = re.sub(r"^(\s*)(```+|~~~+).*?^\s*\2\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)[^`].*?\1", "`code`", text)


def links_of(text: str) -> list[str]:
    """The targets of inline links and pictures, of reference links and of HTML in a page of Markdown."""
    prose = without_code(text)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)", prose)
    references = re.findall(r"^\s*\[[^\]]+\]:\s*(\S+)", prose, flags=re.MULTILINE)
    return inline + references + re.findall(r"(?:src|href)=[\"']([^\"']+)", prose)


def anchors_of(text: str) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(
        r"^#+ (.+?)\s*#*$", re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    broken = []
    for link in links_of(path.read_text()):
        if re.match(r"[a-z][a-z+.-]*:|//", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_relative_link_points_at_something(path):
    assert broken_links(path) == []


PAGE = """# Title
[to a file](there.md) ![picture](gone.png) [heading](#the-second-one) [no heading](#third) [web](https://a.org/x)
[two]: missing/x.md
`[code](code.md)`

## The second `one`
<!-- no-run: needs weights -->
```python
never()
```

- in a list:
  ```python
  # no heading
  value = 1
  ```

```python no-run
never()
```
```python
value += 1
```
```bash
pip install -e ".[train]" && python examples/pretrain.py --data sample \\
    --epochs=3  # a comment
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/pretrain.py --resume; ls examples/
```
"""


def test_blocks_and_commands_are_found_in_a_page():
    python = [block for block in fenced_blocks(PAGE) if block.language == "python"]
    assert [(block.heading, block.line, block.text, block.run) for block in python] == [
        ("The second `one`", 9, "never()", False),
        ("The second `one`", 14, "# no heading\nvalue = 1", True),
        ("The second `one`", 19, "never()", False),
        ("The second `one`", 22, "value += 1", True),
    ]
    (shell,) = [block.text for block in fenced_blocks(PAGE) if block.language == "bash"]
    assert [(command.script, command.arguments) for command in commands_of(shell, "here")] == [
        ("examples/pretrain.py", ("--data", "sample", "--epochs=3")),
        ("examples/pretrain.py", ("--resume",)),
    ]


def test_broken_links_are_found_in_a_page(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "there.md").touch()
    assert broken_links(tmp_path / "page.md") == ["gone.png", "#third", "missing/x.md"]
