import sys

import pytest
import timm
import torch
import torch.distributed as dist
from running import EXAMPLES
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mvmae import MultiViewMAE, backward_in_parts, projection_mlp, random_mask
from mvmae.data import normalize

sys.path.append(str(EXAMPLES))


SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}


def build(dtype=torch.float64, projector=False, loss_weight=2.0, **kwargs):
    torch.manual_seed(3)
    vit = timm.create_model("vit_tiny_patch16_224", **(SIZES | kwargs))
    head = projection_mlp(16, 8, 4, depth=3, batch_norm=projector == "batch norm") if projector else None
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    return MultiViewMAE(vit, projector=head, loss_weight=loss_weight, **decoder).to(dtype)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"projector": True}, {"projector": "batch norm"}, {"loss_weight": 0}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_four_parts_equal_the_whole_batch(options, dtype, tolerance):
    views, mask = torch.randn(16, 2, 3, 16, 16, dtype=dtype), random_mask(32, 16, 0.75)
    whole, parts = build(dtype, **options), build(dtype, **options)
    output = whole(views, mask=mask)
    output.loss.backward()
    losses = backward_in_parts(parts, views, 4, mask=mask)
    for name in ("loss", "loss_rec", "loss_con"):
        torch.testing.assert_close(getattr(losses, name), getattr(output, name).detach(), rtol=tolerance, atol=0)
    scale = max(gradient.abs().max() for gradient in gradients(whole).values())
    assert gradients(whole).keys() == gradients(parts).keys()
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_loss_weight_of_a_call_takes_the_place_of_the_models(parts):
    views, mask = torch.randn(8, 2, 3, 16, 16, dtype=torch.float64), random_mask(16, 16, 0.75)
    for weight in (0.0, 0.5):
        expected, found = build(loss_weight=weight, projector=True), build(projector=True)
        output = expected(views, mask=mask)
        output.loss.backward()
        losses = backward_in_parts(found, views, parts, mask=mask, loss_weight=weight)
        torch.testing.assert_close(list(losses), [x.detach() for x in (output.loss, output.loss_rec, output.loss_con)])
        assert (losses.loss_con == 0) == (weight == 0)
        assert gradients(expected).keys() == gradients(found).keys()  # none where the weight is 0: not even zeros
        for name, gradient in gradients(expected).items():
            torch.testing.assert_close(gradients(found)[name], gradient, msg=name)


def test_dropout_draws_the_same_numbers_in_both_passes():
    views, mask = torch.randn(8, 2, 3, 16, 16, dtype=torch.float64), random_mask(16, 16, 0.75)
    parts, plain = build(drop_path_rate=0.5), build(drop_path_rate=0.5)
    torch.manual_seed(11)
    losses = backward_in_parts(parts, views, 2, mask=mask)
    torch.manual_seed(11)
    seen: list[torch.Tensor] = []
    hook = plain.projector.register_forward_hook(lambda module, given, z: seen.append(z))
    outputs = [plain(views[i : i + 4], mask=mask.select(slice(2 * i, 2 * i + 8))) for i in (0, 4)]
    hook.remove()
    contrastive = plain.contrastive_loss(torch.cat(seen).unflatten(0, (8, 2)))
    loss = (outputs[0].loss_rec + outputs[1].loss_rec) / 2 + 2 * contrastive
    loss.backward()
    torch.testing.assert_close(losses.loss, loss.detach())
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, msg=name)


def test_every_backward_pass_runs_outside_autocast():
    views, mask, seen = torch.randn(8, 2, 3, 16, 16), random_mask(16, 16, 0.75), []
    model = build(torch.float32, projector=True)
    contrast = model.contrastive_loss.forward

    def watched(projected):
        projected.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        return contrast(projected)

    model.contrastive_loss.forward = watched
    for part in (model.encoder.cls_token, model.decoder.mask_token, model.projector[0].weight):
        part.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        backward_in_parts(model, views, 2, mask=mask)
        backward_in_parts(model, views, 1, mask=mask)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 12  # the contrast and its projector, three in each of two parts, then all four at once


class Copied(TorchDispatchMode):
    """Counts the tensors made of Python's numbers: on a GPU each of them waits for all that the GPU has still to do."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_step_copies_no_numbers_to_the_device(parts, chunk_size):
    model, mask = build(torch.float32), random_mask(8, 16, 0.75)
    model.contrastive_loss.chunk_size = chunk_size
    images = torch.randint(256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (0.5, 0.25, 0.5), (0.25, 0.25, 0.5)
    views = normalize(images, mean, std)
    torch.testing.assert_close(views[:, :, 1], (images[:, :, 1] / 255 - 0.25) / 0.25)
    with Copied() as copied:
        backward_in_parts(model, normalize(images, mean, std), parts, mask=mask)
    assert copied.count == 0
    with Copied() as copied:
        torch.tensor(mean)
    assert copied.count == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_that_draws_random_numbers_is_refused_in_parts(in_place):
    """It would draw others in its second pass, the compiled one, than in the first."""

    def compiled(**options):
        model = build(**options)
        if in_place:
            model.compile(backend="eager")
        return model if in_place else torch.compile(model, backend="eager")

    views, mask = torch.randn(4, 2, 3, 16, 16, dtype=torch.float64), random_mask(8, 16, 0.75)
    with pytest.raises(ValueError, match=r"must draw no random numbers \(dropout, drop path\).* rates of 0"):
        backward_in_parts(compiled(drop_path_rate=0.5), views, 2, mask=mask)
    expected = backward_in_parts(build(), views, 2, mask=mask)
    torch.testing.assert_close(backward_in_parts(compiled(), views, 2, mask=mask), expected)


def half_in_parts(views, mask):
    """Steps without and with the contrastive loss, whole and in parts, by each process on its half."""
    rank = dist.get_rank()
    own, rows = views[rank * 8 : rank * 8 + 8], mask.select(slice(rank * 16, rank * 16 + 16))
    model, found = DistributedDataParallel(build(projector="batch norm"), find_unused_parameters=True), []
    for weight in (0.0, 0.0, None):
        for parts in (1, 4):
            model.zero_grad(set_to_none=True)
            losses = backward_in_parts(model, own, parts, mask=rows, loss_weight=weight)
            found.append((losses.loss, {name.removeprefix("module."): g for name, g in gradients(model).items()}))
    return found


def test_two_processes_with_parts_equal_one_whole_with_and_without_contrast(two_processes):
    views, mask = torch.randn(16, 2, 3, 16, 16, dtype=torch.float64), random_mask(32, 16, 0.75)
    first, second = two_processes(half_in_parts, views, mask)
    for (loss0, grads0), (loss1, grads1), weight in zip(first, second, (0.0,) * 4 + (2.0,) * 2, strict=True):
        whole = build(projector="batch norm")
        loss = whole(views, mask=mask, loss_weight=weight).loss
        loss.backward()
        torch.testing.assert_close((loss0 + loss1) / 2, loss.detach(), rtol=1e-10, atol=0)
        assert gradients(whole).keys() == grads0.keys() and any("projector" in name for name in grads0) == (weight > 0)
        for name, gradient in gradients(whole).items():
            torch.testing.assert_close(grads0[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
            assert torch.equal(grads0[name], grads1[name])


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"parts must divide the batch of 16 images, got 3: use a divisor of 16"):
        backward_in_parts(build(), torch.zeros(16, 2, 3, 16, 16), 3, mask=random_mask(32, 16, 0.75))
