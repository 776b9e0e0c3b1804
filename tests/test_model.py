import math
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mvmae
from mvmae import MultiViewMAE, hub, projection_mlp, random_mask

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}
VIEWS = torch.randn(3, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def build(tiny_vit):
    def build_model(vit=None, **kwargs):
        return MultiViewMAE(vit or tiny_vit(), **(DECODER | kwargs))

    return build_model


def slow_block(x, w, prefix, heads):
    """A pre-norm transformer block on one sequence (N, D), one head at a time."""

    def linear(name, y):
        return y @ w[f"{prefix}.{name}.weight"].T + w[f"{prefix}.{name}.bias"]

    def norm(name, y):
        centred = y - y.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        return scaled * w[f"{prefix}.{name}.weight"] + w[f"{prefix}.{name}.bias"]

    width = x.shape[1] // heads
    qkv = linear("attn.qkv", norm("norm1", x))
    out = []
    for h in range(heads):
        q, k, v = (qkv[:, part * x.shape[1] + h * width :][:, :width] for part in range(3))
        scores = (q @ k.T / math.sqrt(width)).exp()
        out.append(scores / scores.sum(dim=1, keepdim=True) @ v)
    x = x + linear("attn.proj", torch.cat(out, dim=1))
    hidden = linear("mlp.fc1", norm("norm2", x))
    return x + linear("mlp.fc2", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def slow_positions(width, side):
    rows = []
    for row in range(side):
        for column in range(side):
            line = []
            for place in (column, row):
                omegas = [1 / 10000 ** (i / (width / 4)) for i in range(width // 4)]
                line += [math.sin(place * o) for o in omegas] + [math.cos(place * o) for o in omegas]
            rows.append(line)
    return torch.tensor(rows, dtype=torch.float64)


def slow_mae_loss(w, image, masked, side, patch):
    """MAE of one image: keep, encode, fill with mask tokens, decode, error of normalised pixels on masked patches."""
    patches = []
    for i in range(side * side):
        y, x = i // side * patch, i % side * patch
        patches.append(image[:, y : y + patch, x : x + patch])
    kept = [i for i in range(len(patches)) if not masked[i]]
    kernel, bias = w["encoder.patch_embed.proj.weight"], w["encoder.patch_embed.proj.bias"]
    positions = slow_positions(kernel.shape[0], side)
    tokens = [w["encoder.cls_token"][0, 0]]
    tokens += [(kernel * patches[i]).sum(dim=(1, 2, 3)) + bias + positions[i] for i in kept]
    x = torch.stack(tokens)
    for depth in range(2):
        x = slow_block(x, w, f"encoder.blocks.{depth}", 3)
    x = F.layer_norm(x, x.shape[1:], w["encoder.norm.weight"], w["encoder.norm.bias"], 1e-6)
    x = x @ w["decoder.embed.weight"].T + w["decoder.embed.bias"]
    positions = slow_positions(x.shape[1], side)
    full = [w["decoder.mask_token"][0, 0] + positions[i] for i in range(len(patches))]
    for place, i in enumerate(kept):
        full[i] = x[1 + place] + positions[i]
    x = slow_block(torch.stack([x[0], *full]), w, "decoder.blocks.0", 4)
    x = F.layer_norm(x, x.shape[1:], w["decoder.norm.weight"], w["decoder.norm.bias"], 1e-6)
    x = (x @ w["decoder.head.weight"].T + w["decoder.head.bias"])[1:]
    errors = []
    for i, true in enumerate(patches):
        if masked[i]:
            pixels = torch.stack([true[:, y, x_] for y in range(patch) for x_ in range(patch)]).flatten()
            pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            errors.append((x[i] - pixels).square().mean())
    return torch.stack(errors).mean()


def test_one_view_without_the_contrastive_loss_is_mae():
    vit = timm.create_model("mvmae_vit_tiny_patch16", **SIZES)
    model = MultiViewMAE(vit, loss_weight=0, **DECODER).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "encoder.pos_embed":
                parameter.add_(0.05 * torch.randn_like(parameter))  # biases and norms away from 0 and 1
        vit.pos_embed.copy_(F.pad(slow_positions(48, 4), (0, 0, 1, 0))[None])  # float64 instead of float32
        model.decoder.pos_embed.copy_(slow_positions(32, 4))
    views, mask = torch.randn(3, 1, 3, 32, 32, dtype=torch.float64), random_mask(3, 16, 0.75)
    output = model(views, mask=mask)
    expected = [slow_mae_loss(model.state_dict(), views[b, 0], mask.masked[b], 4, 8) for b in range(3)]
    torch.testing.assert_close(output.loss, torch.stack(expected).mean(), rtol=1e-9, atol=0)
    assert output.loss_con == 0 and output.loss == output.loss_rec


def test_the_loss_is_the_weighted_sum_of_its_parts(build):
    model = build(loss_weight=0.5)
    output = model(torch.randn(3, 2, 3, 32, 32))
    assert output.loss == output.loss_rec + 0.5 * output.loss_con
    assert output.loss_con == mvmae.NTXentLoss(0.07)(output.z)
    assert output.loss_rec == mvmae.ReconstructionLoss()(output.pred, output.target, output.mask.masked)


@pytest.mark.parametrize("views", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"img_size": (24, 40)},
        {"in_chans": 5, "patch_size": 4},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2},
        {"dynamic_img_size": True},
    ],
)
def test_shapes_for_any_number_of_views_channels_and_sides(build, tiny_vit, views, options):
    vit = tiny_vit(**options)
    model = build(vit, loss_weight=2.0 if views > 1 else 0.0)
    height, width = (16, 48) if options.get("dynamic_img_size") else vit.patch_embed.img_size
    channels, patch = vit.patch_embed.proj.in_channels, vit.patch_embed.patch_size[0]
    length = height * width // patch**2
    output = model(torch.randn(2, views, channels, height, width))
    assert output.z.shape == (2, views, 48)
    assert output.pred.shape == output.target.shape == (2 * views, length, patch * patch * channels)
    assert output.mask.visible.shape == (2 * views, round(length * 0.2))
    assert output.loss.isfinite()


def test_losses_of_ones_own_take_the_place_of_the_papers(build):
    seen = []

    class Contrast(nn.Module):
        def forward(self, z):
            seen.append(z)
            return z.square().mean()

    class Pixels(nn.Module):
        def forward(self, pred, target, masked):
            return (pred - target).abs()[masked].mean()

    output = build(contrastive_loss=Contrast(), reconstruction_loss=Pixels(), projector=nn.Linear(48, 6))(VIEWS)
    assert seen[0].shape == (3, 2, 6) and output.loss_con == output.projected.square().mean()
    assert output.loss_rec == (output.pred - output.target).abs()[output.mask.masked].mean()
    assert output.loss == output.loss_rec + 2 * output.loss_con
    for options in ({"contrastive_loss": Contrast(), "temperature": 0.1}, {"reconstruction_loss": Pixels(), "norm_pix": False}):
        with pytest.raises(ValueError, match=r"belongs? to the \w+_loss that is given"):
            build(**options)


def test_the_loss_weight_of_a_call_takes_the_place_of_the_models(build, tiny_vit):
    """With a weight of 0, what the contrastive loss alone trains keeps the gradient None, and an optimizer leaves it."""
    model = build(tiny_vit(global_pool="avg", fc_norm=True, final_norm=True), projector=projection_mlp(48, 16, 8))
    mask = random_mask(6, 16, 0.75)
    whole, half, none = (model(VIEWS, mask=mask, loss_weight=weight) for weight in (None, 0.5, 0))
    assert whole.loss == whole.loss_rec + 2 * whole.loss_con and half.loss == half.loss_rec + 0.5 * half.loss_con
    assert none.loss == none.loss_rec == whole.loss_rec and none.loss_con == 0 and torch.equal(none.z, whole.z)
    none.loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith(("projector.", "encoder.fc_norm."))}
    with pytest.raises(ValueError, match="loss_weight must be at least 0 .*, got -1"):
        model(VIEWS, loss_weight=-1)


def test_z_is_the_mean_of_the_visible_patch_tokens_or_the_class_token(build):
    model, mask = build(), random_mask(6, 16, 0.75)
    tokens = mvmae.encode_visible(model.encoder, VIEWS.flatten(0, 1), mask)
    torch.testing.assert_close(model(VIEWS, mask=mask).z.flatten(0, 1), tokens[:, 1:].sum(dim=1) / 4)
    assert torch.equal(build(model.encoder, pool="token")(VIEWS, mask=mask).z.flatten(0, 1), tokens[:, 0])


def test_with_nothing_masked_z_is_the_feature_of_the_published_encoder():
    vit = timm.create_model("mvmae_vit_tiny_patch16", **SIZES).eval()
    output = MultiViewMAE(vit, mask_ratio=0.0, loss_on="all", **DECODER)(VIEWS)
    torch.testing.assert_close(output.z.flatten(0, 1), vit(VIEWS.flatten(0, 1)), rtol=1e-4, atol=1e-5)


def test_a_generator_fixes_the_masks_and_leaves_the_global_one_alone(build):
    model, views = build(), torch.randn(2, 2, 3, 32, 32)
    before = torch.get_rng_state()
    first, second = (model(views, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.loss == second.loss and torch.equal(first.mask.visible, second.mask.visible)
    assert not torch.equal(first.mask.masked[0], first.mask.masked[1]), "the masks of two views are independent"


@pytest.mark.parametrize(
    ("vit", "options"),
    [
        ({}, {}),
        ({"num_classes": 3, "global_pool": "map"}, {}),
        ({"global_pool": "avg"}, {}),
        ({"global_pool": "avg"}, {"loss_weight": 0}),
        ({}, {"projector": projection_mlp(48, 16, 8)}),
        ({}, {"projector": projection_mlp(48, 16, 8), "loss_weight": 0}),
        ({"reg_tokens": 2, "init_values": 0.1, "qk_norm": True, "pre_norm": True}, {"pool": "token"}),
    ],
)
def test_every_trainable_parameter_gets_a_gradient_and_stands_in_one_group(build, tiny_vit, vit, options):
    model = build(tiny_vit(**vit), **options)
    model(torch.randn(4, 2, 3, 32, 32)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert [name for name, p in trained.items() if p.grad.stride() != p.stride()] == []
    groups = create_optimizer_v2(model, opt="adamw", weight_decay=0.05).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trained.values())


@pytest.mark.parametrize(
    ("vit", "sizes"), [({}, [(4, 32, 32), (3, 32, 32)]), ({"dynamic_img_size": True}, [(4, 32, 32), (3, 40, 24)])]
)
def test_compiled_it_takes_a_smaller_last_batch_and_other_sizes_and_draws_the_same_masks(build, tiny_vit, vit, sizes):
    model = build(tiny_vit(depth=1, **vit))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch, height, width in sizes:
        views = torch.randn(batch, 2, 3, height, width)
        torch.manual_seed(batch)
        found = compiled(views)
        torch.manual_seed(batch)
        expected = model(views)
        assert torch.equal(found.mask.visible, expected.mask.visible)
        torch.testing.assert_close(found.loss, expected.loss)
        found.loss.backward()
    alone = compiled(views, mask=found.mask, loss_weight=0)
    torch.testing.assert_close(alone.loss, expected.loss_rec)


def test_the_residual_streams_and_the_losses_stay_float32_under_autocast(build):
    """As MAE's: there the decoder's tokens take the type of its positions."""
    model, seen = build(decoder_depth=2), []
    for block in (*model.encoder.blocks, *model.decoder.blocks, model.decoder.norm):
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(VIEWS)
    assert seen == [torch.float32] * 5
    assert output.loss_rec.dtype == output.loss_con.dtype == output.loss.dtype == torch.float32


ENCODERS = {
    "fixed positions": ("mvmae_vit_tiny_patch16", {}),
    "learned positions, fc_norm": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": True}),
    "rotary positions": ("vit_small_patch16_dinov3", {"num_heads": 4}),
}


def made_on(device, encoder):
    name, options = ENCODERS[encoder]
    with torch.device(device):
        return MultiViewMAE(timm.create_model(name, **(SIZES | options)), **DECODER)


def undefined(model):
    """Give a model from the meta device memory, in the worst state that it can be in."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    return model


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_model_from_the_meta_device_is_whole_once_its_weights_are_loaded(encoder):
    model, views, mask = made_on("cpu", encoder), torch.randn(3, 2, 3, 32, 32), random_mask(6, 16, 0.75)
    loaded, assigned = undefined(made_on("meta", encoder)), made_on("meta", encoder)
    loaded.load_state_dict(model.state_dict())
    assigned.load_state_dict(model.state_dict(), assign=True)
    for other in (loaded, assigned):
        assert torch.equal(other(views, mask=mask).loss, model(views, mask=mask).loss)
        trained = [[p.requires_grad for p in x.parameters()] for x in (other, model)]
        assert trained[0] == trained[1]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_init_weights_defines_all_that_a_model_from_the_meta_device_lacks(encoder):
    model, new = made_on("cpu", encoder), made_on("meta", encoder)
    new.projector = projection_mlp(48, 16, 8).to("meta")
    undefined(new).init_weights()
    assert [name for name, value in (*new.named_parameters(), *new.named_buffers()) if not value.isfinite().all()] == []
    buffers = dict(new.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    constant = {name: value for name, value in model.named_parameters() if not value.std() > 0}
    parameters = dict(new.named_parameters())
    assert constant and all(torch.equal(value, parameters[name]) for name, value in constant.items())
    if encoder == "fixed positions":
        assert torch.equal(new.encoder.pos_embed, model.encoder.pos_embed)


def step_of_half(state, views, mask, folder):
    """A step on this process's half of the batch, plain and sharded by FSDP: losses, and gradients over both processes."""
    rank, found = dist.get_rank(), []
    for sharded, parts in ((False, 1), (True, 1), (True, 2)):
        model = made_on("cpu", "fixed positions")
        model.load_state_dict(state)
        for unit in (*model.encoder.blocks, model) if sharded else ():
            fully_shard(unit, mesh=init_device_mesh("cpu", (2,)))
        own = mask.select(slice(4 * rank, 4 * rank + 4))
        losses = mvmae.backward_in_parts(model, views[2 * rank : 2 * rank + 2], parts, mask=own)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, gradient in gradients.items():
            if sharded:
                gradients[name] = gradient.full_tensor()
            else:
                dist.all_reduce(gradient, op=dist.ReduceOp.SUM)
                gradient /= 2
        found.append((losses.loss, gradients))
    with pytest.raises(mvmae.WeightsError, match=r"^.*in shards over processes: gather[^\n]*$"):
        hub.export(model, folder)
    return found


def test_with_blocks_and_root_sharded_by_fsdp_a_step_is_the_same_and_an_export_is_refused(two_processes, tmp_path):
    state = made_on("cpu", "fixed positions").state_dict()
    views, mask = torch.randn(4, 2, 3, 32, 32), random_mask(8, 16, 0.75)
    for plain, *sharded in two_processes(step_of_half, state, views, mask, str(tmp_path)):
        for found in sharded:
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, r"in \[0, 1\) .*, got 1.0"),
        ({"mask_ratio": -0.1}, r"in \[0, 1\) .*, got -0.1"),
        ({"mask_ratio": 0.0}, r"got 0.0: raise it, or use loss_on=\"all\""),
        ({"loss_weight": -1}, "at least 0 .*, got -1"),
        ({"pool": "max"}, "got 'max'"),
        ({"decoder_dim": 30}, "multiple of the 4 heads, got 30"),
        ({"temperature": -0.07}, "above 0 .*, got -0.07"),
        ({"loss_on": "some"}, "one of .*, got 'some'"),
    ],
)
def test_options_out_of_range_are_refused_with_the_cure(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_class_token_that_is_not_there_and_unknown_keywords_are_refused(build, tiny_vit):
    for make in (build, partial(timm.create_model, "mvmae_vit_tiny_patch16")):
        with pytest.raises(TypeError, match="mask_rate"):
            make(mask_rate=0.8)
    with pytest.raises(ValueError, match="with a class token, got 'token'"):
        build(tiny_vit(class_token=False, global_pool="avg"), pool="token")


@pytest.mark.parametrize(
    ("views", "mask", "message"),
    [
        (torch.zeros(2, 3, 32, 32), None, r"\(B, V, C, H, W\), got \(2, 3, 32, 32\)"),
        (torch.zeros(1, 2, 3, 32, 32), None, "at least 2 images, got 1"),
        (torch.zeros(2, 2, 3, 32, 32, dtype=torch.uint8), None, "floating point, .*, got torch.uint8"),
        (torch.zeros(2, 2, 3, 32, 32), random_mask(3, 16, 0.5), r"for \(4, 16\) .*, got \(3, 16\)"),
    ],
)
def test_views_that_do_not_fit_are_refused(build, views, mask, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()(views, mask=mask)


def test_tokens_that_do_not_fit_the_mask_are_refused(build):
    with pytest.raises(ValueError, match=r"\(2, 1 prefix \+ 4 visible, D\), got \(2, 6, 48\)"):
        build().decoder(torch.zeros(2, 6, 48), random_mask(2, 16, 0.75))
