import json

import pytest
import torch
from running import EXAMPLES, run_script
from tiny_run import write_images
from torch.nn.attention import SDPBackend, sdpa_kernel


def test_it_measures_every_part_and_writes_the_figures(tmp_path):
    arguments = ["--encoder", "vit_tiny_patch16_224", "--image-size", 32, "--batch-size", 2, "--rounds", 1, "--device", "cpu"]
    result = run_script("benchmark.py", *arguments, "--parts", "loader", "model", folder=tmp_path)
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / "runs" / "benchmark" / "benchmark.json").read_text())
    assert figures["loader"].keys() == {"500x375", "3000x2000"}
    model = figures["model"]
    ratio = model["timed"]["matrix products alone"]["seconds"] / model["timed"]["step"]["seconds"]
    assert model["share_of_floor"] == pytest.approx(ratio)
    vit, decoder = (depth * (24 * n * w**2 + 4 * n**2 * w) for depth, n, w in ((12, 2, 192), (4, 5, 512)))
    layers = 2 * 2 * 192 * 512 + 2 * 4 * 512 * 768  # into the decoder, and out of it
    embedding = 2 * 2 * 768 * 192  # of the one visible patch, forward and the weights' gradient
    counted = 2 * (3 * (vit + decoder + layers) + embedding)
    assert model["flops_per_image"] == pytest.approx(counted, rel=1e-4)  # the contrastive loss has some more
    assert "share of the floor" in result.out and "written to" in result.out


def test_it_measures_loading_processes(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")  # small: 3000 are loaded in each round
    arguments = ["--parts", "workers", "--data", "images", "--image-size", 16, "--rounds", 1, "--device", "cpu"]
    result = run_script("benchmark.py", *arguments, folder=tmp_path)
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / "runs" / "benchmark" / "benchmark.json").read_text())["workers"]
    assert figures.keys() == {"ours", "two decodes, torchvision"} and figures["ours"]["times_the_first"] > 0


def test_wrong_parts_and_folders_are_named(tmp_path):
    result = run_script("benchmark.py", "--parts", "everything", folder=tmp_path)
    assert result.code == 2 and "--parts: invalid choice: 'everything'" in result.err
    result = run_script("benchmark.py", "--parts", "loader", "--data", "nowhere", folder=tmp_path)
    assert result.code == 2 and "--data: no such folder, file or data set: nowhere (the current folder is " in result.err
    assert result.out == ""
    (tmp_path / "set.parquet").write_bytes(b"PAR1")
    result = run_script("benchmark.py", "--parts", "model", "loader", "--data", "set.parquet", folder=tmp_path)
    assert result.code == 2 and result.err.startswith("error: --data") and result.out == ""


@pytest.mark.parametrize(
    ("kernel", "backward"),
    [
        (SDPBackend.MATH, [(7, 8, 7), (7, 7, 8), (7, 7, 8), (8, 7, 7)]),
        (SDPBackend.FLASH_ATTENTION, [(7, 8, 7), (7, 8, 7), (7, 7, 8), (7, 7, 8), (7, 7, 8)]),  # the first product again
    ],
)
def test_the_products_of_a_step_are_all_counted(monkeypatch, kernel, backward):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tasks.timing import Products

    linear, x = torch.nn.Linear(6, 4), torch.randn(3, 6, requires_grad=True)
    q, k, v = (torch.randn(2, 5, 7, 8, requires_grad=True) for _ in range(3))
    with Products() as products:
        linear(x).sum().backward()
        with sdpa_kernel(kernel):
            torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    counted = [a[-2:] + b[-1:] for a, b, _ in products.shapes]
    forward, gradients = [(3, 6, 4)], [(4, 3, 6), (3, 4, 6)]
    attention = [(7, 8, 7), (7, 7, 8)]
    assert sorted(counted) == sorted(forward + gradients + attention + backward)
    products.alone(torch.device("cpu"))()
