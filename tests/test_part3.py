"""Part 3: attention against PyTorch's own, the cache, the task, and the command line."""

import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F

import part3_attention as part3
from part3_attention import GroupedQueryAttention, KVCache, attention

CPU = torch.device("cpu")
FIGURES = [
    "attention_heatmaps",
    "training_curves",
    "confusion_matrix",
    "head_sharing",
    "decode",
    "qkv",
]


def random_heads(draw):
    """(n_head, n_kv_head): MHA, MQA and everything between."""
    n_kv_head = draw.choice([1, 2, 3, 4])
    return n_kv_head * draw.choice([1, 2, 3]), n_kv_head


# ------------------------------------------ attention ----------------------------------------- #


@pytest.mark.parametrize("case", range(60))
def test_values_and_gradients_equal_scaled_dot_product_attention(case):
    draw = random.Random(case)
    torch.manual_seed(case)
    n_head, n_kv_head = random_heads(draw)
    B, T, S, d = (draw.randint(1, n) for n in (4, 7, 9, 8))
    q = torch.randn(B, n_head, T, d, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, n_kv_head, S, d, dtype=torch.float64, requires_grad=True) for _ in "kv")
    mask = None
    if case % 3:
        shape = (B if case % 2 else 1, n_head if draw.random() < 0.5 else 1, T, S)
        mask = torch.rand(shape) < 0.6
        mask[..., 0] = True  # PyTorch's result for an empty row has changed between versions
    ours, weights = attention(q, k, v, mask)
    reference = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert (ours - reference).abs().max() < 1e-9
    assert (weights.sum(-1) - 1).abs().max() < 1e-9
    direction = torch.randn_like(ours)
    for mine, torchs in zip(
        torch.autograd.grad((ours * direction).sum(), (q, k, v)),
        torch.autograd.grad((reference * direction).sum(), (q, k, v)),
        strict=True,
    ):
        assert (mine - torchs).abs().max() < 1e-9


def test_a_query_with_nothing_to_attend_to_gets_zeros():
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in "qkv")
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    output, weights = attention(q, k, v, mask)
    assert (output[:, :, 1] == 0).all() and (weights[:, :, 1] == 0).all()
    assert (output[:, :, 0] != 0).any()
    for gradient in torch.autograd.grad(output.sum(), (q, k, v)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_scores_stay_finite(size):
    q, k = torch.eye(3).view(1, 1, 3, 3) * size, torch.eye(3).view(1, 1, 3, 3)
    v = torch.arange(9.0).view(1, 1, 3, 3)
    output, weights = attention(q, k, v)
    assert torch.equal(weights[0, 0], torch.eye(3))
    assert torch.equal(output, v)


def test_scores_are_scaled():
    """Two keys with scores 0 and 2 sqrt(d) / sqrt(d) = 2 before softmax."""
    d = 16
    q = torch.ones(1, 1, 1, d)
    k = torch.stack([torch.zeros(d), torch.full((d,), 2 * math.sqrt(d) / d)])[None, None]
    weights = attention(q, k, k)[1].flatten()
    assert torch.allclose(weights[1] / weights[0], torch.tensor(math.e**2))


def test_heads_that_do_not_divide_are_refused():
    q, k = torch.randn(1, 4, 2, 3), torch.randn(1, 3, 2, 3)
    with pytest.raises(ValueError, match="4 query heads"):
        attention(q, k, k)
    with pytest.raises(ValueError, match="n_kv_head 3"):
        GroupedQueryAttention(8, 4, 3)
    with pytest.raises(ValueError, match="d_model 10"):
        GroupedQueryAttention(10, 4, 4)


# ------------------------------------------- module ------------------------------------------- #


@pytest.mark.parametrize("case", range(20))
def test_module_equals_torch_nn_multihead_attention(case):
    draw = random.Random(case)
    torch.manual_seed(case)
    n_head, d = draw.randint(1, 5), draw.randint(1, 6)
    C, B, T = n_head * d, draw.randint(1, 4), draw.randint(1, 8)
    ours = GroupedQueryAttention(C, n_head, n_head).double()
    reference = torch.nn.MultiheadAttention(C, n_head, bias=False, batch_first=True).double()
    with torch.no_grad():
        projections = (ours.q_proj, ours.k_proj, ours.v_proj)
        reference.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        reference.out_proj.weight.copy_(ours.o_proj.weight)
    x = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(T, T, dtype=torch.bool).tril() if case % 2 else None
    y, weights = ours(x, mask, need_weights=True)
    forbidden = None if mask is None else ~mask
    y_ref, weights_ref = reference(x, x, x, attn_mask=forbidden, average_attn_weights=False)
    assert (y - y_ref).abs().max() < 1e-9
    assert (weights - weights_ref).abs().max() < 1e-9
    direction = torch.randn_like(y)
    ours_grad = torch.autograd.grad((y * direction).sum(), (x, *ours.parameters()))
    parameters = (x, reference.in_proj_weight, reference.out_proj.weight)
    ref_grad = torch.autograd.grad((y_ref * direction).sum(), parameters)
    assert (ours_grad[0] - ref_grad[0]).abs().max() < 1e-9
    assert (torch.cat(ours_grad[1:4]) - ref_grad[1]).abs().max() < 1e-9
    assert (ours_grad[4] - ref_grad[2]).abs().max() < 1e-9


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_module_equals_attention_written_out_head_by_head(n_kv_head):
    torch.manual_seed(0)
    module = GroupedQueryAttention(12, 4, n_kv_head).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    heads = []
    for h in range(4):
        shared = h // (4 // n_kv_head)
        rows, kv_rows = slice(3 * h, 3 * h + 3), slice(3 * shared, 3 * shared + 3)
        q = x @ module.q_proj.weight[rows].T
        k, v = x @ module.k_proj.weight[kv_rows].T, x @ module.v_proj.weight[kv_rows].T
        heads.append((q @ k.transpose(1, 2) / math.sqrt(3)).softmax(-1) @ v)
    by_hand = torch.cat(heads, 2) @ module.o_proj.weight.T
    assert (module(x)[0] - by_hand).abs().max() < 1e-9


def test_mqa_equals_mha_whose_heads_have_the_same_keys_and_values():
    torch.manual_seed(0)
    mqa, mha = GroupedQueryAttention(12, 4, 1), GroupedQueryAttention(12, 4, 4)
    state = mqa.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].repeat(4, 1)
    mha.load_state_dict(state)
    x = torch.randn(2, 5, 12)
    assert torch.allclose(mqa(x)[0], mha(x)[0], atol=1e-6)


def test_from_mha_pools_by_the_mean_and_changes_nothing_at_equal_heads():
    torch.manual_seed(0)
    mha = GroupedQueryAttention(12, 4, 4)
    x = torch.randn(2, 5, 12)
    assert torch.equal(GroupedQueryAttention.from_mha(mha, 4)(x)[0], mha(x)[0])
    gqa = GroupedQueryAttention.from_mha(mha, 2)
    old, new = mha.k_proj.weight, gqa.k_proj.weight  # (4 heads of 3, 12), (2 heads of 3, 12)
    assert torch.allclose(new[:3], (old[0:3] + old[3:6]) / 2)
    assert torch.allclose(new[3:], (old[6:9] + old[9:12]) / 2)
    assert torch.equal(gqa.q_proj.weight, mha.q_proj.weight)


def test_causal_mask_hides_every_later_token():
    torch.manual_seed(0)
    module = GroupedQueryAttention(12, 4, 2)
    x = torch.randn(1, 6, 12)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    for t in range(6):
        changed = x.clone()
        changed[:, t] += 1
        moved = (module(x, mask)[0] - module(changed, mask)[0]).abs().amax((0, 2)) > 1e-7
        assert moved.tolist() == [s >= t for s in range(6)]


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 1, 3], [7]])
def test_token_by_token_through_the_cache_equals_the_causal_pass(n_kv_head, chunks):
    torch.manual_seed(0)
    module = GroupedQueryAttention(12, 4, n_kv_head).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    whole = module(x, torch.ones(7, 7, dtype=torch.bool).tril())[0]
    cache = KVCache(2, n_kv_head, 7, 3, dtype=torch.float64)
    parts = [module(part, cache=cache)[0] for part in x.split(chunks, dim=1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-9
    assert cache.length == 7
    assert cache.nbytes == 2 * 2 * n_kv_head * 7 * 3 * 8  # K and V, batch, heads, tokens, d, bytes
    with pytest.raises(ValueError, match="holds 7 tokens"):
        module(x[:, :1], cache=cache)


# -------------------------------------------- task -------------------------------------------- #


def test_labels_equal_a_slow_and_obvious_loop():
    data = part3.draw_sequences(50, 6, torch.Generator().manual_seed(0))
    for n in range(50):
        for t in range(6):
            total, found = 0, 0
            for s in range(6):
                if data.name_a[n, s] == data.wanted_a[n, t]:
                    assert data.where_a[n, t] == s
                    total, found = total + int(data.digit[n, s]), found + 1
                if data.name_b[n, s] == data.wanted_b[n, t]:
                    assert data.where_b[n, t] == s
                    total, found = total + int(data.digit[n, s]), found + 1
            assert found == 2
            assert data.label[n, t] == total % 10


def test_classes_are_balanced_and_splits_are_disjoint():
    drawn = {
        split: part3.draw_sequences(2000, 8, part3.generator_for(split, 0, CPU))
        for split in ("train", "validation", "test", "study")
    }
    counts = drawn["test"].label.flatten().bincount()
    assert len(counts) == 10  # 1,600 of each expected, with a standard deviation of 38
    assert counts.min() > 1450 and counts.max() < 1750
    rows = [{tuple(row) for row in torch.cat(data[:5], 1).tolist()} for data in drawn.values()]
    assert sum(map(len, rows)) == 8000 == len(set.union(*rows))
    again = part3.draw_sequences(2000, 8, part3.generator_for("test", 0, CPU))
    other = part3.draw_sequences(2000, 8, part3.generator_for("test", 1, CPU))
    assert torch.equal(again.label, drawn["test"].label)
    assert not torch.equal(other.label, drawn["test"].label)


def test_alignment_of_heads_that_look_right_and_wrong():
    data = part3.draw_sequences(10, 8, torch.Generator().manual_seed(0))
    looks_a, looks_b = (F.one_hot(where, 8).float() for where in (data.where_a, data.where_b))
    share = part3.alignment(torch.stack([looks_a, looks_b], 1), data)
    agree = (data.where_a == data.where_b).float().mean().item()
    assert torch.allclose(share, torch.tensor([[1, agree], [agree, 1]]))


def test_wide_mqa_gets_the_parameters_back_but_no_more():
    config = part3.Config()

    def size(*shape):
        return sum(p.numel() for p in GroupedQueryAttention(*shape).parameters())

    mha, wide = size(64, 16, 16), size(64, 16, 1, part3.wide_head_dim(config))
    assert 0.9 * mha < wide <= mha
    assert size(64, 16, 1, part3.wide_head_dim(config) + 1) > mha


def test_same_seed_same_bits_other_seed_other_bits():
    def weights(seed):
        config = part3.Config(steps=3, seed=seed, batch_size=8)
        torch.manual_seed(seed)
        net = part3.LookupNet(config, 2)
        part3.train_variant(net, config, CPU, verbose=False)
        return net.state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["attention.q_proj.weight"], other["attention.q_proj.weight"])


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("d_model", {"d_model": 60}), ("d_model", {"d_model": 0}), ("n_head", {"n_head": 0}),
        ("n_kv_head", {"n_kv_head": (3,)}), ("n_kv_head", {"n_kv_head": ()}),
        ("n_kv_head", {"n_kv_head": (8, 8)}), ("seq_len", {"seq_len": 1}),
        ("steps", {"steps": 0}), ("lr", {"lr": math.nan}), ("seed", {"seed": -1}),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(field, settings):
    with pytest.raises(ValueError, match=f"^{field}"):
        part3.Config(**settings)


# ---------------------------------------- command line ---------------------------------------- #


def test_command_writes_every_figure(run_script, tmp_path):
    run = run_script("part3_attention.py", "--steps", "20", "--batch-size", "16", "--study")
    assert run.returncode == 0, run.stderr
    assert "macro avg" in run.stdout and "MQA-wide" in run.stdout and "GQA pooled" in run.stdout
    names = {f"part3_{name}.png" for name in FIGURES} | {"part3_study_from_mha.png"}
    assert {path.name for path in (tmp_path / "images").iterdir()} == names
    for path in (tmp_path / "images").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 300_000


def test_help_names_every_field(run_script):
    run = run_script("part3_attention.py", "--help")
    assert run.returncode == 0
    for field in dataclasses.fields(part3.Config):
        assert f"--{field.name.replace('_', '-')}" in run.stdout
