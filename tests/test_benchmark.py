import json
import math

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


def test_it_measures_how_much_of_a_device_a_step_uses_and_whether_loading_keeps_up(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    arguments = ["--parts", "card", "feeding", "--data", "images", "--image-size", 32, "--rounds", 1, "--workers", 0]
    arguments += ["--encoders", "vit_tiny_patch16_224", "--batch-sizes", 2, "--ways", "eager", "--device", "cpu", "--profile"]
    result = run_script("benchmark.py", *arguments, folder=tmp_path)
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / "runs" / "benchmark" / "benchmark.json").read_text())
    (found,) = figures["card"]["settings"].values()
    rate, peak = found["images_per_second"], figures["card"]["product_flops_per_second"]
    assert found["mfu"] == pytest.approx(found["flops_per_image"] * rate / peak)
    assert found["waiting"] == pytest.approx(max(1 - found["fed_images_per_second"] / rate, 0)) and found["peak_memory_mb"] > 0
    shares = [kernel["share"] for kernel in found["kernels"]]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    assert all(kernel["kernel"] in result.out for kernel in found["kernels"])
    trace = json.loads((tmp_path / "runs" / "benchmark" / found["trace"]).read_text())
    assert found["kernels"][0]["kernel"] in {event.get("name") for event in trace["traceEvents"]}
    fed, (own,) = figures["feeding"], figures["feeding"]["encoders"].values()
    assert own["workers_that_keep_up"] == math.ceil(own["images_per_second"] / fed["loader_images_per_second"])


def test_a_setting_without_memory_is_told_and_the_others_are_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tasks import card

    def measure(bench, encoder, way, batch_size, *_):
        if batch_size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return {"images_per_second": 1.0, "mfu": 0.5, "waiting": 0.0, "peak_memory_mb": 1.0}

    monkeypatch.setattr(card, "measure_setting", measure)
    monkeypatch.setattr(card, "flops_per_image", lambda bench, encoder: 1.0)
    monkeypatch.setattr(card, "product_rate", lambda bench: 1.0)
    bench = card.Bench([], 32, "float32", torch.device("cpu"), 1, 0)
    found = card.measure_card(bench, ("vit",), ("eager",), (4, 2), None)["settings"]
    assert found["vit, eager, 4 images"] == {"flops_per_image": 1.0, "error": "out of memory"}
    assert found["vit, eager, 2 images"]["mfu"] == 0.5
    assert "out of memory" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="another error"):
        card.within_memory(lambda: (_ for _ in ()).throw(RuntimeError("another error")))


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_rate_of_a_card_is_that_of_a_matrix_product_in_the_step_s_type(monkeypatch, precision, dtype):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tasks import card

    multiplied = []
    matmul = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b, out: multiplied.append((a.shape, b.dtype)) or matmul(a, b, out=out))
    monkeypatch.setattr(
        card, "clock", lambda ways, rounds, device, units: ways["product"]() or {"product": {"per_second": units}}
    )
    bench = card.Bench([], 32, precision, torch.device("cpu"), 1, 0)
    assert card.product_rate(bench, 8) == 2 * 8**3 and multiplied == [((8, 8), dtype)]


def test_the_peer_has_the_size_of_our_encoder(monkeypatch, tiny_vit):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tasks.peers import ViTMAE

    encoder = tiny_vit()
    peer = ViTMAE(encoder)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (encoder, peer.model.vit)]
    assert sizes[0] == sizes[1]
    assert peer(torch.randn(2, 2, 3, 32, 32)).isfinite()
