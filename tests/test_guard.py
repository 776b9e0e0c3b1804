"""The guard against forgetting, the average and the mix of weights, and which encoder a run leaves."""

import copy
import math
import sys

import pytest
import torch
from PIL import Image
from running import EXAMPLES
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from mvmae import MultiViewMAE

sys.path.append(str(EXAMPLES))
from engine.distributed import Processes
from engine.ends import Stop
from engine.snapshot import restore
from tasks import gains
from tasks.choice import Average, Choice, interpolate, score
from tasks.guard import Guard, cosine_penalty, relational_penalty

ALONE = Processes(0, 1, torch.device("cpu"), None)


def test_the_penalties_equal_loops_over_images_and_pairs():
    new, old = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    cosines = [(f @ s / math.sqrt((f @ f) * (s @ s))).item() for f, s in zip(new, old, strict=True)]
    assert cosine_penalty(new, old).item() == pytest.approx(sum(1 - c for c in cosines) / 5)
    distances = [
        [math.dist(x[i].tolist(), x[j].tolist()) for i in range(5) for j in range(i + 1, 5)] for x in (new, 30 * old**3)
    ]
    gaps = [a / (sum(distances[0]) / 10) - b / (sum(distances[1]) / 10) for a, b in zip(*distances, strict=True)]
    assert any(abs(gap) > 1 for gap in gaps) and any(abs(gap) < 1 for gap in gaps)
    huber = [gap**2 / 2 if abs(gap) <= 1 else abs(gap) - 0.5 for gap in gaps]
    assert relational_penalty(new, 30 * old**3).item() == pytest.approx(sum(huber) / 10)


def test_the_relational_penalty_lets_features_turn_and_grow_together_and_the_cosine_does_not():
    old = torch.randn(6, 8)
    turned = 3 * old @ torch.linalg.qr(torch.randn(8, 8))[0] + 1
    assert relational_penalty(turned, old) < 1e-10 and cosine_penalty(turned, old) > 0.1
    assert cosine_penalty(3 * old, old) < 1e-6 and relational_penalty(old[[1, 0, 2, 3, 4, 5]], old) > 1e-3
    same = torch.ones(4, 3, requires_grad=True)  # collapsed: the gradient stays finite
    relational_penalty(same, torch.randn(4, 3)).backward()
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["cosine", "relational"])
def test_with_a_large_guard_the_features_hardly_move(kind, tiny_vit):
    views = torch.randn(8, 2, 3, 32, 32)
    moved = {}
    for weight in (0.0, 1000.0):
        torch.manual_seed(0)
        model = MultiViewMAE(tiny_vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
        before = model.features(views[:, 0]).detach()
        guard = Guard(model, weight, kind, 8, batch_size=8, processes=ALONE) if weight else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(20):
            penalty = guard.backward(views) if guard else None
            model(views, generator=torch.Generator().manual_seed(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        measure = cosine_penalty if kind == "cosine" else relational_penalty
        moved[weight] = measure(model.features(views[:, 0]).detach(), before).item()
        assert penalty is None or (penalty > 0 and not penalty.requires_grad)
    assert moved[1000.0] < 0.25 * moved[0.0], moved


def test_the_guard_adds_the_gradient_of_its_weight_and_keeps_the_start(tiny_vit):
    model = MultiViewMAE(tiny_vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    guard = Guard(model, 3.0, "cosine", 2, batch_size=8, processes=ALONE)
    old = model.features(torch.ones(1, 3, 32, 32)).detach()
    for parameter in model.encoder.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    views = torch.randn(8, 2, 3, 32, 32)
    penalty = guard.backward(views)
    found = model.encoder.blocks[0].mlp.fc1.weight.grad.clone()
    model.zero_grad()
    start = copy.copy(model)
    start._modules = {**model._modules, "encoder": guard.start}
    torch.testing.assert_close(start.features(torch.ones(1, 3, 32, 32)), old)  # the copy did not move
    images = views[[0, 4], 0]
    expected = cosine_penalty(model.features(images), start.features(images))
    (3 * expected).backward()
    torch.testing.assert_close(penalty, expected.detach())
    torch.testing.assert_close(found, model.encoder.blocks[0].mlp.fc1.weight.grad)
    model.encoder.requires_grad_(False)
    assert guard.backward(views) == 0
    for number, kind, processes in ((9, "cosine", 1), (3, "cosine", 2), (2, "relational", 1)):
        with pytest.raises(Stop, match=f"--guard-images {number} must be at most the batch of 8 images"):
            Guard(model, 1.0, kind, number, batch_size=8, processes=ALONE._replace(world_size=processes))


def test_interpolation_is_the_start_at_0_the_end_at_1_and_between_what_layers_compute_is_interpolated():
    start = {"w": torch.randn(3, 4), "x.lora_A.default.weight": torch.randn(2, 4), "x.lora_B.default.weight": torch.zeros(3, 2)}
    end = {name: torch.randn_like(value) for name, value in start.items()}
    at = {share: interpolate(start, end, share) for share in (0.0, 0.3, 1.0)}
    assert torch.equal(at[0.0]["w"], start["w"]) and all(torch.equal(at[1.0][name], end[name]) for name in end)
    updates = {share: mix["x.lora_B.default.weight"] @ mix["x.lora_A.default.weight"] for share, mix in at.items()}
    assert torch.equal(updates[0.0], torch.zeros(3, 4))
    torch.testing.assert_close(updates[0.3], 0.3 * updates[1.0])
    torch.testing.assert_close(at[0.3]["w"], 0.7 * start["w"] + 0.3 * end["w"])


def test_the_average_equals_a_loop_and_leaves_frozen_weights_bit_for_bit():
    weights = {"a": torch.randn(3), "still": torch.randn(3)}
    average, slow, still = Average(weights, 0.9), weights["a"].clone(), weights["still"].clone()
    for _ in range(5):
        weights["a"] += 1
        average.update()
        slow = 0.9 * slow + 0.1 * weights["a"]
    torch.testing.assert_close(average.weights["a"], slow)
    assert torch.equal(average.weights["still"], still)
    other = Average({"a": torch.zeros(3), "still": torch.zeros(3)}, 0.9)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.weights["a"], average.weights["a"])


def chosen_after(looks, *, keep="best", measure="auto", **options):
    """The choice after looks at an encoder whose one weight is the number of the look."""
    encoder = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(encoder.weight)
    choice = Choice(encoder, keep=keep, measure=measure, images=100, **options)
    for step, found in enumerate(looks):
        nn.init.constant_(encoder.weight, step)
        if choice.average and step:
            choice.average.update()
        with choice.applied():
            seen = encoder.weight.item()
        assert seen == choice.candidate()["weight"].item()
        choice.consider(step, found)
    assert encoder.weight.item() == len(looks) - 1
    return choice


def weight_of(choice):
    return choice.chosen()["weight"].item()


def test_the_best_look_is_kept_and_the_start_where_none_beats_it():
    shares = [{"retrieval": share} for share in (5.0, 70.0, 60.0)]
    best = chosen_after(shares, measure="retrieval")
    assert (best.step, weight_of(best)) == (1, 1) and best.lines(2)[0].startswith(
        "encoder/ holds the latest within 5.0 points of the best of 3 looks, after step 1 of 2"
    )
    labelled = [{"retrieval": share, "knn": knn} for share, knn in ((5.0, 60.0), (70.0, 60.0), (90.0, 59.0))]
    start = chosen_after(labelled)
    assert (start.step, weight_of(start)) == (0, 0)
    assert start.lines(2) == [
        "no look of 3 was better than the start (k-NN accuracy 60.00): encoder/ holds the start, unchanged"
    ]
    assert weight_of(chosen_after(labelled, measure="retrieval")) == 2
    last = chosen_after(labelled, keep="last")
    assert (last.step, weight_of(last), last.lines(2)) == (2, 2, [])
    unmeasured = chosen_after([{}, {}, {}])
    assert weight_of(unmeasured) == 2 and unmeasured.lines(2) == [] and "because none is measured" in unmeasured.note({})
    assert score({"knn": math.nan}, "auto") is None
    with pytest.raises(Stop, match="--keep-by knn must be measured"):
        chosen_after(shares, measure="knn").note(shares[0])
    assert "whatever its standard error, at most 5.0 points; the start counts" in start.note(labelled[0])


def test_without_labels_the_encoder_is_kept_that_tells_views_of_images_apart_best():
    looks = [{"effective_rank": rank, "retrieval": share} for rank, share in ((5.0, 30.0), (9.0, 60.0), (30.0, 50.0))]
    best, start = chosen_after(looks), chosen_after([looks[1], looks[2], looks[0]])
    assert (best.step, weight_of(best)) == (1, 1) and (start.step, weight_of(start)) == (0, 0)
    assert best.lines(2)[0].endswith(" of the best of 3 looks, after step 1 of 2 (view retrieval 60.00)")
    assert start.lines(2)[0].startswith("no look of 3 was as good as the start (view retrieval 60.00): ")
    assert "as good as the best, within its standard error, at most 5.0 points; the start counts" in best.note(looks[0])
    assert weight_of(chosen_after([found | {"knn": 10.0 * i} for i, found in enumerate(looks)])) == 2  # labels count more


def test_of_encoders_with_the_same_view_retrieval_the_latest_is_kept():
    def kept(*shares):
        return chosen_after([{"retrieval": share} for share in shares]).step  # of 100 images: 5 points

    assert kept(97.0, 96.0, 95.5) == 2  # none is clearly worse than the best
    assert kept(97.0, 93.0, 90.0) == 1  # the second look is compared with the best, not with the one kept
    assert kept(30.0, 60.0, 54.0) == 1
    assert kept(30.0, 20.0, 24.0) == 0


def test_the_look_sees_and_keeps_the_average_and_the_mix():
    shares = [{"retrieval": share} for share in (5.0, 6.0, 7.0)]
    average = chosen_after(shares, decay=0.5)  # 0, then 0.5, then 1.25
    assert weight_of(average) == 1.25 and "averaged with decay 0.5" in average.lines(2)[0]
    mixed = chosen_after(shares, share=0.25)
    assert weight_of(mixed) == 0.5 and "0.25 of the way from the start" in mixed.lines(2)[0]
    assert weight_of(chosen_after(shares, share=0.0)) == 0
    last = chosen_after(shares, keep="last", decay=0.5, share=0.5)
    assert weight_of(last) == 0.625 and last.lines(2) == [
        "encoder/ holds the encoder after step 2 (averaged with decay 0.5, 0.5 of the way from the start)"
    ]


@pytest.mark.parametrize("options", [{}, {"keep": "last"}, {"decay": 0.5}, {"keep": "last", "share": 0.5}])
def test_the_choice_survives_a_checkpoint(options, tmp_path):
    shares = [{"retrieval": share} for share in (5.0, 70.0, 60.0)]
    choice = chosen_after(shares, **options)
    torch.save({"choice": choice.state_dict()}, tmp_path / "state")
    found = torch.load(tmp_path / "state", weights_only=True)
    fresh = Choice(nn.Linear(1, 1, bias=False), **{"keep": "best", "measure": "auto"} | options)
    restore(found, tmp_path, {"choice": fresh})
    assert (fresh.step, fresh.found, fresh.looked, fresh.images) == (choice.step, choice.found, 3, 100)
    if fresh.keep == "best":
        assert torch.equal(fresh.chosen()["weight"], choice.chosen()["weight"])
        fresh.consider(9, {"retrieval": 64.0})
        assert fresh.step == 1
        fresh.consider(9, {"retrieval": 66.0})
        assert fresh.step == 9


def test_looks_at_other_images_compare_anew():
    choice = chosen_after([{"retrieval": share} for share in (5.0, 70.0)])
    choice.restart(50, {"retrieval": 40.0}, {"retrieval": 45.0})
    assert (choice.images, choice.step, choice.found, weight_of(choice)) == (50, 1, {"retrieval": 45.0}, 1)
    choice.restart(60, {"retrieval": 40.0}, {"retrieval": 30.0})
    assert (choice.step, choice.found, weight_of(choice)) == (0, {"retrieval": 40.0}, 0)


def test_the_measures_of_the_table_are_those_of_scikit_learn():
    centres = 2 * torch.randn(3, 6)
    labels, known = torch.arange(90) % 3, torch.arange(60) % 3
    bank, queries = (centres[of] + 1.5 * torch.randn(len(of), 6) for of in (labels, known))
    found = gains.measured(bank, labels, queries, known)
    assert found.keys() >= {"knn_avg", "linear", "shot1_avg", "shot5_avg", "rank_avg"} and 40 < found["linear"] < 100
    scaler = StandardScaler().fit(bank.numpy())
    x, y = (scaler.transform(part.numpy()) / 6**0.5 for part in (bank, queries))
    peer = LogisticRegression(C=1 / (1e-4 * len(x)), tol=1e-8, max_iter=5000).fit(x, labels.numpy())
    assert found["linear"] == pytest.approx(100 * peer.score(y, known.numpy()))
    shared = 1000 * torch.randn(6).double()  # a vector that all features have in common tells nothing
    assert gains.measured(bank.double() + shared, labels, queries.double() + shared, known)["linear"] == found["linear"]
    assert gains.measured(bank[:0], labels[:0], queries, torch.full((60,), -1)).keys() == {"rank_avg"}
    assert gains.measured(bank, torch.full((90,), -1), queries, known).keys() == {"rank_avg"}


class Looked:
    """Stands for a `Monitor`: images are their own pixels."""

    def __init__(self, train, val):
        self.train, self.val, self.limit = train, val, 0

    @property
    def looked_at(self):
        return self.train if self.val is None else self.val

    def extract(self, encode, source, limit):
        return encode(source[0]), source[1]

    def retrieval(self, encode, limit):
        return {"retrieval": encode(torch.ones(6)).sum().item()} if self.val is None else {}


def test_the_table_compares_the_start_with_what_is_left_and_puts_the_weights_back(tmp_path, monkeypatch):
    encoder = nn.Linear(6, 6, bias=False)
    nn.init.eye_(encoder.weight)
    model = nn.Module()
    model.encoder, model.features = encoder, encoder
    choice = Choice(encoder, keep="last", measure="auto")
    nn.init.zeros_(encoder.weight)
    encoder.weight.data[0, 0] = 1.0  # all but one direction is lost
    ended = encoder.weight.detach().clone()
    centres = 5 * torch.eye(6)[1:4]
    train, val = ((centres[torch.arange(60) % 3] + torch.randn(60, 6), torch.arange(60) % 3) for _ in range(2))
    found = gains.compare(choice, model, {"own": Looked(train, val), "also": Looked((train[0], torch.full((60,), -1)), None)})
    lines = gains.table(found)
    assert torch.equal(encoder.weight, ended) and model.training
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:4] == ["images", "encoder", "k-NN", "linear probe"] and set(cells[1]) == {"---"}
    assert [row[:2] for row in cells[2:]] == [[name, when] for name in ("own", "also") for when in ("before", "after")]
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    assert float(rows[0]["k-NN"]) > 90 > 60 > float(rows[1]["k-NN"]) and rows[2]["k-NN"] == ""
    assert rows[1]["effective rank"] == "1.0" and float(rows[0]["effective rank"]) > 3
    expected = nn.functional.cosine_similarity(val[0], val[0] * ended[0]).mean().item()
    assert float(rows[1]["cosine to the start"]) == pytest.approx(expected, abs=6e-4) and rows[0]["cosine to the start"] == ""
    assert "±" in rows[0]["1 label a class"]
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.pyplot.close", figures.append)
        gains.draw(tmp_path / "gains.png", found)
    panels = {axis.get_title(): [line.lines[0].get_ydata().tolist() for line in axis.containers] for axis in figures[0].axes}
    assert [len(lines) for lines in panels.values()] == [1, 1, 1, 1, 2, 1, 2, 2]  # without labels, also has no accuracies
    assert panels["view retrieval"] == [[6, 1]] and [row["view retrieval"] for row in rows] == ["", "", "6.0", "1.0"]
    assert panels["k-NN"] == [[row["knn_avg"] for row in found[:2]]] and panels["CKA with the start"][0] == [1, found[1]["cka"]]
    with Image.open(tmp_path / "gains.png") as image:
        assert min(image.size) > 300
