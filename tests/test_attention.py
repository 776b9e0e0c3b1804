import pytest
import torch

from mvmae.visualize import attention_maps, patch_heat, rollout


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}, {"qk_norm": True}])
def test_the_weights_are_those_of_a_slow_loop_over_heads_and_queries(tiny_vit, options):
    vit, images = tiny_vit(**options).train(), torch.randn(2, 3, 32, 32)
    maps = attention_maps(vit, images)
    assert vit.training and len(maps) == len(vit.blocks)
    vit.eval()
    with torch.no_grad():
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        for weights, block in zip(maps, vit.blocks, strict=True):
            attn, x = block.attn, block.norm1(tokens)
            query, key, _ = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).unbind(2)
            query, key = attn.q_norm(query), attn.k_norm(key)
            for head in range(attn.num_heads):
                for i in range(x.shape[1]):
                    scores = torch.stack([(query[:, i, head] * key[:, j, head]).sum(1) for j in range(x.shape[1])], 1)
                    expected = (scores * attn.head_dim**-0.5).softmax(1)
                    torch.testing.assert_close(weights[:, head, i], expected, atol=1e-5, rtol=1e-4)
            tokens = block(tokens)


def test_the_model_is_left_as_it_was(tiny_vit):
    vit, images = tiny_vit().eval(), torch.randn(1, 3, 32, 32)
    fused, before = [block.attn.fused_attn for block in vit.blocks], vit(images)
    attention_maps(vit, images)
    assert [block.attn.fused_attn for block in vit.blocks] == fused
    assert all(not block.attn.attn_drop._forward_hooks for block in vit.blocks)
    assert torch.equal(vit(images), before)
    with pytest.raises(AssertionError):
        attention_maps(vit, torch.randn(1, 3, 48, 48))
    assert [block.attn.fused_attn for block in vit.blocks] == fused and not vit.blocks[0].attn.attn_drop._forward_hooks


def test_rollout_equals_a_slow_product_of_matrices(tiny_vit):
    maps = attention_maps(tiny_vit(depth=3), torch.randn(2, 3, 32, 32))
    found = rollout(maps)
    for image in range(2):
        expected = [[float(i == j) for j in range(17)] for i in range(17)]
        for weights in maps:
            heads = weights[image].tolist()
            mixed = [
                [0.5 * sum(head[i][j] for head in heads) / len(heads) + 0.5 * (i == j) for j in range(17)] for i in range(17)
            ]
            expected = [[sum(mixed[i][k] * expected[k][j] for k in range(17)) for j in range(17)] for i in range(17)]
        torch.testing.assert_close(found[image], torch.tensor(expected), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(2), torch.ones(2, 17))
    assert (found > 0).all()


def test_heat_is_of_the_class_token_or_of_the_mean_patch():
    weights = torch.rand(1, 7, 7).softmax(2)
    token = patch_heat(weights, (2, 3), query="token")
    assert torch.equal(token, weights[:, 0, 1:].reshape(1, 2, 3))
    torch.testing.assert_close(patch_heat(weights, (2, 3)), weights[:, 1:, 1:].mean(1).reshape(1, 2, 3))
    with pytest.raises(ValueError, match="got 'token' with 0 prefix tokens"):
        patch_heat(weights, (1, 7), query="token")
    with pytest.raises(ValueError, match="query must be .*, got 'max'"):
        patch_heat(weights, (2, 3), query="max")
    with pytest.raises(ValueError, match="at least one block, got none"):
        rollout([])
