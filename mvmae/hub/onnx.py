"""An exported encoder as one file for ONNX Runtime, where neither PyTorch nor timm is needed.

Shapes: B images of a batch, C channels, H W pixels, D width of a feature or number of classes.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..files import CONFIG_FILE, WeightsError, locate, read_config, replace_file

ONNX_FILE = "encoder.onnx"
ONNX_DATA_FILE = "encoder.onnx.data"
"""The weights, where they are too large for one file of ONNX."""
LARGEST = 2_000_000_000
"""Bytes of weights that `ONNX_FILE` holds; its format ends at 2 GiB."""
TOLERANCE = 1e-4
"""Largest distance between the outputs of ONNX Runtime and PyTorch, as a share of the norm of PyTorch's."""
OPSET = 20
CFG = ("mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode")
CONFIG = ("architecture", "background", "label_names")


def require_onnx() -> Any:
    """Import what `write_onnx` needs, and return the module onnxruntime.

    Raises:
        ImportError: in one line, with the extra to install.
    """
    try:
        import_module("onnx")
        import_module("onnxscript")
        return import_module("onnxruntime")
    except ImportError as error:
        cause = f"{ONNX_FILE} needs onnx, onnxscript and onnxruntime ({error})"
        raise ImportError(f'{cause}: pip install "mvmae[onnx]"') from error


def write_onnx(folder: str | Path, images: Tensor) -> float:
    """Write the encoder of an exported folder as ``encoder.onnx`` beside it, and compare it with PyTorch.

    Its input ``images`` is (B, C, H, W) float32, normalised, with any B and the encoder's own H and W. Its output is what
    timm's forward returns: ``features`` (B, D), or ``logits`` (B, D) of a fine-tuned model. The file's metadata hold, each as
    JSON, what prepares an image: mean, std, input_size (C, H, W), interpolation, crop_pct, crop_mode and background, and
    label_names if the classes have names.

    Args:
        folder: as `export` wrote it.
        images: what both compute, (B, C, H, W), normalised: pictures like those that the encoder will meet.

    Returns:
        The largest distance between an output of ONNX Runtime and one of PyTorch, as a share of the norm of PyTorch's.

    Raises:
        ImportError: if onnx, onnxscript or onnxruntime is not installed.
        WeightsError: if the folder holds no export, or the distance is above `TOLERANCE`; then no file is written.
    """
    runtime, folder = require_onnx(), Path(folder)
    config = read_config(locate(folder, CONFIG_FILE))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    output = "logits" if config.get("num_classes") else "features"
    program = _export(model, images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1), output)
    about = {key: config["pretrained_cfg"][key] for key in CFG} | {key: config[key] for key in CONFIG if key in config}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    with torch.inference_mode():
        expected = model(images).flatten(1)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as part:
        program.save(os.path.join(part, ONNX_FILE), external_data=size > LARGEST)
        session = runtime.InferenceSession(os.path.join(part, ONNX_FILE), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run([output], {"images": images.numpy()})[0]).flatten(1)
        del session  # Windows moves no file that is open
        distance = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
        if not distance <= TOLERANCE:
            cause = f"ONNX Runtime's outputs differ from PyTorch's by {distance:.1e} of their norm, more than {TOLERANCE:g}"
            raise WeightsError(f"{folder}: {cause}; no {ONNX_FILE} is written: please report it")
        remove_onnx(folder)
        for name in (ONNX_DATA_FILE, ONNX_FILE):
            if os.path.exists(os.path.join(part, name)):
                replace_file(folder / name, partial(os.replace, os.path.join(part, name)))
    return distance


def remove_onnx(folder: Path) -> None:
    """Remove what `write_onnx` wrote of other weights."""
    for name in (ONNX_FILE, ONNX_DATA_FILE):
        (folder / name).unlink(missing_ok=True)


def _export(model: nn.Module, images: Tensor, output: str) -> Any:
    batch = torch.export.Dim("batch")
    with _quiet("onnxscript"), _quiet("onnx_ir"):
        return torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=["images"],
            output_names=[output],
            opset_version=OPSET,
            verbose=False,
        )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library from reporting what it leaves as it is."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def usage(config: dict[str, Any]) -> str:
    """Return an example in Python of how to use the file, for the model card.

    Args:
        config: the export's config.json.
    """
    channels = config["pretrained_cfg"]["input_size"][0]
    lines = [
        "import json",
        "",
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image, ImageOps",
        "",
        f'session = onnxruntime.InferenceSession("{ONNX_FILE}")',
        "about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}",
        'channels, height, width = about["input_size"]',
    ]
    if channels in (1, 3):
        lines += [
            f'image = Image.open("photograph.jpg").convert("{"RGB" if channels == 3 else "L"}")  # an image of yours',
            f"method = Image.Resampling.{config['pretrained_cfg']['interpolation'].upper()}",
            'image = ImageOps.fit(image, (width, height), method, bleed=(1 - about["crop_pct"]) / 2)  # the centre of it',
            "pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255",
        ]
    else:
        lines += ["pixels = np.zeros((height, width, channels), np.float32)  # an image of yours, from 0 to 1"]
    lines += ['pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])']
    if config.get("num_classes"):
        lines += ['(logits,) = session.run(None, {"images": pixels.transpose(2, 0, 1)[None]})  # (1, classes)']
        if "label_names" in config:
            lines += ['print(about["label_names"][logits[0].argmax()])']
    else:
        lines += ['(features,) = session.run(None, {"images": pixels.transpose(2, 0, 1)[None]})  # (1, width)']
    return "```python\n" + "\n".join(lines) + "\n```"
