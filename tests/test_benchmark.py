import json

import pytest
import torch
from running import EXAMPLES, run_script


def test_it_measures_every_part_and_writes_the_figures(tmp_path):
    arguments = ["--encoder", "vit_tiny_patch16_224", "--image-size", 32, "--batch-size", 2, "--rounds", 1, "--device", "cpu"]
    result = run_script("benchmark.py", *arguments, "--parts", "loader", "model", "workers", folder=tmp_path)
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / "runs" / "benchmark" / "benchmark.json").read_text())
    assert figures["loader"].keys() == {"500x375", "3000x2000"}
    assert figures["workers"]["ours"]["times_the_first"] > 0
    model = figures["model"]
    ratio = model["timed"]["matrix products alone"]["seconds"] / model["timed"]["step"]["seconds"]
    assert model["share_of_floor"] == pytest.approx(ratio)
    assert 5e8 < model["flops_per_image"] < 2e9
    assert "share of the floor" in result.out and "written to" in result.out


def test_wrong_parts_and_folders_are_named(tmp_path):
    result = run_script("benchmark.py", "--parts", "everything", folder=tmp_path)
    assert result.code == 2 and "--parts everything is unknown" in result.err
    result = run_script("benchmark.py", "--parts", "loader", "--data", "nowhere", folder=tmp_path)
    assert result.code == 2 and "no such folder: nowhere" in result.err


def test_the_products_of_a_step_are_all_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from timing import Products

    linear, x = torch.nn.Linear(6, 4), torch.randn(3, 6, requires_grad=True)
    q, k, v = (torch.randn(2, 5, 7, 8, requires_grad=True) for _ in range(3))
    with Products() as products:
        linear(x).sum().backward()
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    counted = [a[-2:] + b[-1:] for a, b, _ in products.shapes]
    forward, gradients = [(3, 6, 4)], [(4, 3, 6), (3, 4, 6)]
    attention = [(7, 8, 7), (7, 7, 8)] + 2 * [(7, 8, 7)] + 3 * [(7, 7, 8)]
    assert sorted(counted) == sorted(forward + gradients + attention)
    products.alone(torch.device("cpu"))()
