"""What the benchmark compares is the same work, and its parts run; nothing here depends on time."""

import json
import sys

import pytest
import torch
from running import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import benchmark
from engine.options import parse


def test_it_measures_every_part_and_writes_the_figures(tmp_path, capsys):
    pytest.importorskip("transformers")
    typed = [
        "--encoder",
        "vit_tiny_patch16_224",
        "--image-size",
        32,
        "--rounds",
        1,
        "--device",
        "cpu",
        "--output-dir",
        tmp_path,
    ]
    benchmark.main(parse(benchmark.Config, {}, None, list(map(str, typed))))
    figures = json.loads((tmp_path / "benchmark.json").read_text())
    assert figures.keys() == {"config", "torch", "device", *benchmark.PARTS}
    assert figures["loader"].keys() == {"500x375", "3000x2000"}
    tables = [*figures["loader"].values(), figures["step"]]
    assert all(next(iter(table.values()))["ratio"] == 1.0 for table in tables)
    assert all(row["per_second"] > 0 for table in tables for row in table.values())
    assert "written to" in capsys.readouterr().out


def test_the_peer_has_the_size_of_our_encoder(tiny_vit):
    pytest.importorskip("transformers")
    encoder = tiny_vit()
    peer = benchmark.build_vitmae(encoder)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (encoder, peer.vit)]
    assert sizes[0] == sizes[1]
    assert peer(torch.randn(2, 3, 32, 32)).loss.isfinite()
