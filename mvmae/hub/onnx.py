"""An exported encoder as one file for ONNX Runtime, where neither PyTorch nor timm is needed.

Shapes: B images of a batch, C channels, H W pixels, D width of a feature or number of classes.
"""

import json
import logging
import os
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..inputs import Inputs
from ..weights import CONFIG_FILE, WeightsError, locate, read_json, replace_file

ONNX_FILE = "encoder.onnx"
ONNX_DATA_FILE = "encoder.onnx.data"  # the weights, where they are too large for one file of ONNX
LARGEST = 2_000_000_000  # bytes of weights that ONNX_FILE holds; its format ends at 2 GiB
TOLERANCE = 1e-4  # largest distance between the outputs of ONNX Runtime and PyTorch, as a share of the norm of PyTorch's


def require_onnx() -> Any:
    """Import what `write_onnx` needs, and return the module onnxruntime, or raise an ImportError that names the extra."""
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
    JSON, the attributes of `Inputs`, and label_names if the classes have names.

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
    config = read_json(locate(folder, CONFIG_FILE))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    output = "logits" if config.get("num_classes") else "features"
    program = _export(model, images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1), output)
    about = Inputs.from_config(config).to_dict() | {key: config[key] for key in ("label_names",) if key in config}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's stack traces, with paths of this machine
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
    for name in ("onnxscript", "onnx_ir"):  # which report what they leave as it is
        logging.getLogger(name).setLevel(logging.ERROR)
    shapes: Any = ({0: torch.export.Dim("batch")},)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": [output]}
    return torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=shapes, opset_version=20, verbose=False, **names)


def usage(config: dict[str, Any]) -> str:
    """Return an example in Python of how to use the file, for the model card of an export with this config.json."""
    inputs = Inputs.from_config(config)
    channels, mode = len(inputs.mean), {1: "L", 3: "RGB"}.get(len(inputs.mean))
    image = f"""image = Image.open("photograph.jpg").convert("{mode}")  # an image of yours
method = Image.Resampling.{inputs.interpolation.upper()}
image = ImageOps.fit(image, (width, height), method, bleed=(1 - about["crop_pct"]) / 2)  # the centre of it
pixels = np.asarray(image, np.float32).reshape(height, width, {channels}) / 255"""
    if mode is None:
        image = f"pixels = np.zeros((height, width, {channels}), np.float32)  # an image of yours, from 0 to 1"
    output, shape = ("logits", "classes") if config.get("num_classes") else ("features", "width")
    last = '\nprint(about["label_names"][logits[0].argmax()])' if "label_names" in config else ""
    return f"""```python
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{ONNX_FILE}")
about = {{key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}}
height, width = about["size"]
{image}
pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
({output},) = session.run(None, {{"images": pixels.transpose(2, 0, 1)[None]}})  # (1, {shape}){last}
```"""
