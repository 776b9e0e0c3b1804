"""Run timm's own tests of models on the encoders of this package: a minute or two.

  python tests/timm_tests.py

Fetches the sdist of the installed timm, puts `mvmae_vit_tiny_patch16` in the place of `vit_tiny_patch16_224` in its tests, and
runs them. Prints why, and succeeds, where the sdist cannot be had.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

OURS, THEIRS = "mvmae_vit_tiny_patch16", "vit_tiny_patch16_224"
RUNS = {"test_model_input.py": "", "test_checkpoint_loading.py": "", "test_utils.py": OURS, "test_models.py": OURS}
"""Files of tests, and what the names of those that are run must hold."""
NOT_OURS = (
    "test_native_checkpoint_file_overrides_custom_load_source",
    "test_source_overlay_resets_custom_load",
    "test_clearing_",
    "test_train_pretrained_cfg_overlay",
)  # these hold the .npz file that timm's own cfg names, or timm's train.py, against what they should be
BACKEND = """
from pathlib import Path
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder, "timm.dist-info")
    info.mkdir()
    Path(info, "METADATA").write_text("Metadata-Version: 2.1\\nName: timm\\nVersion: {version}\\n")
    return info.name
"""
"""Takes the place of timm's build backend, which pip asks for metadata even of what it only downloads."""


def fetch(work: Path) -> Path | None:
    """Download and unpack the sdist, without building it; None, with a line, where it cannot be had."""
    (work / "pdm").mkdir()
    (work / "pdm" / "backend.py").write_text(BACKEND.format(version=timm.__version__))
    command = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "--no-build-isolation", "-d", work]
    done = subprocess.run(
        [*command, f"timm=={timm.__version__}"], env={**os.environ, "PYTHONPATH": str(work)}, capture_output=True, text=True
    )
    sdist = next(work.glob("timm-*.tar.gz"), None)
    if sdist is None:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        print(f"skipped: the sdist of timm {timm.__version__} cannot be had ({reason})")
        return None
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    return work / sdist.name.removesuffix(".tar.gz") / "tests"


def rename(text: str) -> str:
    """Put our encoder in the place of timm's, and ours among the names and modules that timm's tests sort models by."""
    text = text.replace(THEIRS, OURS).replace("NON_STD_FILTERS = [", "NON_STD_FILTERS = ['mvmae_*',", 1)
    return text.replace("FEAT_INTER_FILTERS = [", "FEAT_INTER_FILTERS = ['encoders',", 1)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = fetch(work)
        if source is None:
            return 0
        folder = work / "renamed"
        folder.mkdir()
        (folder / "conftest.py").write_text("import mvmae\n" + (source / "conftest.py").read_text())
        code = 0
        for file, wanted in RUNS.items():
            if not (source / file).exists():
                print(f"timm {timm.__version__} has no tests/{file}")
                continue
            (folder / file).write_text(rename((source / file).read_text()))
            chosen = " and ".join([wanted] * bool(wanted) + [f"not {name}" for name in NOT_OURS])
            options = ["-p", "no:cacheprovider", "-W", "ignore", "-k", chosen]
            command = [sys.executable, "-m", "pytest", "-q", *options, file]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
            print(f"timm {timm.__version__} tests/{file} with {OURS}: {summary}", flush=True)
            if done.returncode or not re.search(r"\d+ passed", summary):
                print(done.stdout, done.stderr)
                code = 1
        return code


if __name__ == "__main__":
    sys.exit(main())
