import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mvmae import MultiViewMAE, NTXentLoss, ReconstructionLoss, random_mask
from mvmae.gradients import unit_length


def slow_nt_xent(z, temperature):
    """Eqs. 4 to 6, one scalar at a time; for more than two views, averaged over the positives of an anchor."""
    images, views, _ = z.shape
    flat = [z[n, v] / z[n, v].square().sum().sqrt() for n in range(images) for v in range(views)]
    total = 0
    for i, anchor in enumerate(flat):
        denominator = sum(torch.exp((anchor @ other) / temperature) for k, other in enumerate(flat) if k != i)
        positives = [j for j in range(len(flat)) if j != i and j // views == i // views]
        terms = [-torch.log(torch.exp((anchor @ flat[j]) / temperature) / denominator) for j in positives]
        total = total + sum(terms) / len(terms)
    return total / len(flat)


def value_and_gradient(loss, z):
    z = z.detach().requires_grad_()
    value = loss(z)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
def test_nt_xent_equals_the_double_loop_of_the_equations(views, chunk_size):
    z = torch.randn(5, views, 7, dtype=torch.float64)
    fast = value_and_gradient(NTXentLoss(0.3, chunk_size=chunk_size), z)
    slow = value_and_gradient(lambda x: slow_nt_xent(x, 0.3), z)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-9)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes, in bytes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel() * result.element_size())
        return result


def test_memory_is_linear_in_a_large_batch():
    z = torch.randn(4200, 2, 8, requires_grad=True)  # 8400 x 8400 logits would take 282 MB
    with Largest() as largest:
        NTXentLoss()(z).backward()
    assert largest.size <= 64 * 2**20
    with Largest() as largest:
        NTXentLoss(chunk_size=2100)(z).backward()
    assert largest.size > 64 * 2**20


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-9, 0.0])
def test_unit_length_equals_that_of_torch_with_all_its_gradients(scale):
    z = (torch.randn(5, 2, 7, dtype=torch.float64) * scale).requires_grad_()
    weights, results = torch.randn(5, 2, 7, dtype=torch.float64), []
    for normalize in (lambda z: unit_length(z, 1e-6), lambda z: torch.nn.functional.normalize(z, dim=-1, eps=1e-6)):
        unit = normalize(z)
        (first,) = torch.autograd.grad((unit * weights).sum(), z, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), z)[0] if scale else torch.zeros(())
        results.append((unit, first, second))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("norm", [1e-12, 1.0, 1e4])
def test_extreme_latents_give_finite_losses_and_gradients(dtype, temperature, norm):
    z = (torch.randn(6, 2, 16) * norm / 4).to(dtype)
    z[1] = z[0]
    z[2] = 0
    value, gradient = value_and_gradient(NTXentLoss(temperature), z)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("chunk_size", [None, 48])
def test_losses_and_gradients_stay_float32_where_the_backward_pass_runs_under_autocast(chunk_size):
    z = torch.randn(64, 2, 16)
    expected = value_and_gradient(NTXentLoss(), z.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradient(NTXentLoss(chunk_size=chunk_size), z)
    largest = expected[1].abs().max()  # bfloat16 would be off by 0.3 %
    torch.testing.assert_close([x.double() for x in found], list(expected), rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_the_gradient_has_a_gradient_and_torch_func_takes_the_loss(chunk_size):
    z = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    loss = NTXentLoss(0.3, chunk_size=chunk_size)
    assert torch.autograd.gradgradcheck(loss, z)
    (first,) = torch.autograd.grad(loss(z), z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z)
    torch.testing.assert_close(torch.func.grad(loss)(z.detach()), first.detach())
    squared = lambda x: torch.func.grad(loss)(x).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(squared)(z.detach()), second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NTXentLoss()(torch.randn(1, 2, 4)), "at least 2 images, got 1, .*: use a larger batch, or loss_weight=0"),
        (lambda: NTXentLoss()(torch.randn(4, 1, 8)), r"at least 2 views, got \(4, 1, 8\)"),
        (lambda: NTXentLoss(0), "temperature must be above 0 .*, got 0"),
        (lambda: NTXentLoss(chunk_size=0), "chunk_size must be at least 1, or None, got 0"),
        (lambda: ReconstructionLoss(loss_on="some"), "loss_on must be one of .*, got 'some'"),
        (lambda: ReconstructionLoss()(torch.ones(1, 4, 3), torch.ones(1, 4, 2), torch.ones(1, 4)), r"got .*\(1, 4, 2\)"),
    ],
)
def test_bad_arguments_are_refused_with_the_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_reconstruction_equals_slow_loops_of_eq_3(norm_pix, loss_on):
    pred, target = torch.randn(2, 4, 6, 12, dtype=torch.float64).unbind()
    masked = random_mask(4, 6, 0.5).masked
    total, count = 0.0, 0
    for b in range(4):
        for p in range(6):
            if loss_on == "all" or masked[b, p]:
                true = target[b, p]
                if norm_pix:
                    true = (true - true.mean()) / (true.var() + 1e-6).sqrt()
                total += sum((pred[b, p, k] - true[k]).item() ** 2 for k in range(12)) / 12
                count += 1
    loss = ReconstructionLoss(norm_pix=norm_pix, loss_on=loss_on)(pred, target, masked)
    assert loss.item() == pytest.approx(total / count, rel=1e-12)


def loss_and_gradients(views, mask):
    """The loss and the gradients of one model on these images."""
    import timm

    torch.manual_seed(3)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes)
    model = MultiViewMAE(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2).double()
    loss = model(views, mask=mask).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def half_of_the_batch(views, mask, z):
    """The same of this process's half, and the loss of its latents without those of the other process."""
    rank = dist.get_rank()
    own = slice(rank * 3, rank * 3 + 3)
    alone = NTXentLoss(gather=False)(z[own])
    return *loss_and_gradients(views[own], mask.select(slice(2 * own.start, 2 * own.stop))), alone


def test_two_processes_equal_one_unless_each_has_the_negatives_of_its_own_images_alone(two_processes):
    views, mask = torch.randn(6, 2, 3, 16, 16, dtype=torch.float64), random_mask(12, 16, 0.75)
    z = torch.randn(6, 2, 8, dtype=torch.float64)
    (loss0, grads0, alone0), (loss1, grads1, alone1) = two_processes(half_of_the_batch, views, mask, z)
    loss, gradients = loss_and_gradients(views, mask)
    torch.testing.assert_close((loss0 + loss1) / 2, loss, rtol=1e-6, atol=0)
    assert gradients.keys() == grads0.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close((grads0[name] + grads1[name]) / 2, gradient, rtol=1e-6, atol=1e-12, msg=name)
    torch.testing.assert_close([alone0, alone1], [NTXentLoss()(z[:3]), NTXentLoss()(z[3:])])
