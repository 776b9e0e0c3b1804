"""An exported encoder as one file for ONNX Runtime, where neither PyTorch nor timm is needed.

Shapes: B images of a batch, C channels, H x W pixels, D width of a feature or number of classes.
"""

import json
import logging
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from ..inputs import Inputs
from ..weights import CONFIG_FILE, WeightsError, locate, read_json, replace_file

ONNX_FILES = ("encoder.onnx", "encoder.onnx.data")  # the second: weights above 2 GB, where the format of the first ends
TOLERANCE = 1e-4  # largest distance between the outputs of ONNX Runtime and PyTorch, as a share of the norm of PyTorch's


def require_onnx() -> Any:
    """Import what `write_onnx` needs, and return the module onnxruntime, or raise an ImportError that names the extra."""
    try:
        import_module("onnx")
        import_module("onnxscript")
        return import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(f'{ONNX_FILES[0]} cannot be written ({error}): pip install "mvmae[onnx]"') from error


def write_onnx(folder: str | Path, images: Tensor) -> float:
    """Write the encoder of an exported folder as ``encoder.onnx`` beside it, and compare it with PyTorch.

    Its input ``images`` is (B, C, H, W) float32, normalised, with any B and the encoder's own H and W. Its output is what
    timm's forward returns: ``features`` (B, D), or ``logits`` (B, D) of a fine-tuned model. The file's metadata hold, each as
    JSON, the attributes of `Inputs`, and label_names if the classes have names.

    Both compute ``images``, (B, C, H, W), normalised: pictures like those that the encoder will meet. Returns the largest
    distance between their outputs as a share of the norm of PyTorch's; above `TOLERANCE` no file is written.

    Raises:
        ImportError: if onnx, onnxscript or onnxruntime is not installed.
        WeightsError: if the folder holds no export, or the distance is above `TOLERANCE`.
    """
    runtime, folder = require_onnx(), Path(folder)
    config = read_json(locate(folder, CONFIG_FILE))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    output = "logits" if config.get("num_classes") else "features"
    for name in ("onnxscript", "onnx_ir"):  # which report what they leave as it is
        logging.getLogger(name).setLevel(logging.ERROR)
    program: Any = torch.onnx.export(
        model,
        (images[:1].repeat(2, 1, 1, 1),),  # torch takes a batch of 1 for a constant
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=[output],
        opset_version=20,
        verbose=False,
    )
    about = Inputs.from_config(config).to_dict() | {key: config[key] for key in ("label_names",) if key in config}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's stack traces, with paths of this machine
    with torch.inference_mode():
        expected = model(images).flatten(1)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as part:
        written = Path(part, ONNX_FILES[0])
        program.save(written)
        session = runtime.InferenceSession(written, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run([output], {"images": images.numpy()})[0]).flatten(1)
        del session  # Windows moves no file that is open
        distance = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
        if not distance <= TOLERANCE:
            cause = f"ONNX Runtime's outputs differ from PyTorch's by {distance:.1e} of their norm, more than {TOLERANCE:g}"
            raise WeightsError(f"{folder}: {cause}; no {written.name} is written: please report it")
        remove_onnx(folder)
        for file in sorted(Path(part).iterdir(), reverse=True):  # the weights first
            replace_file(folder / file.name, file.replace)
    return distance


def remove_onnx(folder: Path) -> None:
    """Remove what `write_onnx` wrote of other weights."""
    for name in ONNX_FILES:
        (folder / name).unlink(missing_ok=True)
