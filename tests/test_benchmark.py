"""What the benchmark compares is the same work, and its parts run; nothing here depends on time."""

import json
import sys

import pytest
import torch
from running import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import benchmark
from engine.options import parse

TINY = ["--encoders", "vit_tiny_patch16_224", "--image-size", 32, "--rounds", 1, "--device", "cpu"]


def test_it_measures_every_part_and_writes_the_figures(tmp_path, capsys):
    pytest.importorskip("transformers")
    typed = [*TINY, "--parts", *benchmark.PARTS, "--batch-sizes", 2, 4, "--output-dir", tmp_path]
    config = parse(benchmark.Config, {}, None, list(map(str, typed)))
    benchmark.main(config)
    figures = json.loads((tmp_path / "benchmark.json").read_text())
    assert figures.keys() == {"config", "torch", "device", *benchmark.PARTS}
    assert figures["loader"].keys() == {"500x375", "3000x2000"}
    tables = [*figures["loader"].values(), figures["step"]]
    assert all(next(iter(table.values()))["ratio"] == 1.0 for table in tables)
    assert all(row["per_second"] > 0 for table in tables for row in table.values())
    vit, decoder = (depth * (24 * n * w**2 + 4 * n**2 * w) for depth, n, w in ((12, 2, 192), (4, 5, 512)))
    layers = 2 * 2 * 192 * 512 + 2 * 4 * 512 * 768  # into the decoder, and out of it
    embedding = 2 * 2 * 768 * 192  # of the one visible patch, forward and the weights' gradient
    mfu = figures["mfu"]
    assert len(mfu["steps"]) == 2
    for row in mfu["steps"].values():
        assert row["flops"] == pytest.approx(2 * (3 * (vit + decoder + layers) + embedding), rel=1e-4)  # and the contrast
        assert row["mfu"] == pytest.approx(row["flops"] * row["per_second"] / mfu["product_flops_per_second"])
    assert "written to" in capsys.readouterr().out


def test_the_peer_has_the_size_of_our_encoder(tiny_vit):
    pytest.importorskip("transformers")
    encoder = tiny_vit()
    peer = benchmark.build_vitmae(encoder)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (encoder, peer.vit)]
    assert sizes[0] == sizes[1]
    assert peer(torch.randn(2, 3, 32, 32)).loss.isfinite()
