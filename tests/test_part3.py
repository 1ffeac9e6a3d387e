"""Part 3: attention against PyTorch's own, the modules, the cache, the task, training, quality."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config

import part3_attention as part3
from part3_attention import GroupedQueryAttention, KVCache, MultiHeadLatentAttention, attention

close = partial(torch.testing.assert_close, rtol=0, atol=1e-9)
normal = partial(torch.randn, dtype=torch.float64, requires_grad=True)
small = small_config(part3, seq_len=7, steps=35, lr=0.1, weight_decay=0.5)
MODULES = {  # of four query heads, with 3 numbers a key and 2 a value
    "MHA": partial(GroupedQueryAttention, 16, 4, 4, 3, 2),
    "GQA": partial(GroupedQueryAttention, 16, 4, 2, 3, 2),
    "MQA": partial(GroupedQueryAttention, 16, 4, 1, 3, 2),
    "MLA": partial(MultiHeadLatentAttention, 16, 4, 5, 3, 2),
}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def sequences(n):
    return part3.make_sequences(n, small, torch.Generator().manual_seed(0))


def causal(T, S):
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


@pytest.mark.parametrize("case", range(60))
def test_values_and_gradients_equal_scaled_dot_product_attention(case):
    torch.manual_seed(case)
    B, n_kv_head, group, T, S, d, d_v = torch.randint(1, 6, (7,)).tolist()
    q = normal(B, n_kv_head * group, T, d)
    k = normal(B, n_kv_head, S, d)
    v = normal(B, n_kv_head, S, d_v)
    shapes = [(T, S), (B, 1, 1, S), (B, 1, T, S), (B, n_kv_head * group, T, S)]
    masks = [torch.rand(shape) < 0.5 for shape in shapes]
    mask = [*masks, causal(T, S), torch.ones(T, S) > 0][case % 6]
    scale = [None, 0.7, 50][case // 6 % 3]  # at 50 one weight is nearly 1
    output, _ = attention(q, k, v, None if mask.all() else mask, scale)
    some = mask.any(-1, keepdim=True)
    expected = F.scaled_dot_product_attention(q, k, v, mask | ~some, scale=scale, enable_gqa=True)
    expected = expected * some  # zeros where nothing is seen
    close(output, expected)
    gradients = torch.autograd.grad(output.exp().sum(), (q, k, v))
    close(gradients, torch.autograd.grad(expected.exp().sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_sees_nothing_gets_zeros_with_zero_gradients(dtype):
    q, k, v = torch.randn(3, 1, 2, 3, 4, dtype=dtype, requires_grad=True)
    output, weights = attention(q, k, v, torch.zeros(3, 3, dtype=torch.bool))
    gradients = torch.autograd.grad(output.sum(), (q, k, v))
    for zeros in (output, weights, *gradients):
        assert torch.equal(zeros, torch.zeros_like(zeros))


def test_large_scores_stay_finite():
    eye = torch.eye(3).view(1, 1, 3, 3)
    assert torch.equal(attention(1e30 * eye, eye, 7 * eye)[0], 7 * eye)


def test_bfloat16_is_as_exact_as_torchs():
    q, k, v = (8 * torch.randn(3, 50, 4, 9, 64)).bfloat16()
    exact, _ = attention(q.double(), k.double(), v.double(), causal(9, 9))
    output, _ = attention(q, k, v, causal(9, 9))
    torchs = F.scaled_dot_product_attention(q, k, v, attn_mask=causal(9, 9))
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().max() < 2 * (torchs - exact).abs().max() + 0.01


def test_heads_are_cut_within_each_token():
    x = torch.tensor([[[0, 10], [1, 11], [2, 12], [3, 13]]])
    assert part3.split_heads(x, 2)[0, :, :, 0].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]


@pytest.mark.parametrize("case", range(10))
def test_module_equals_torch_nn_multihead_attention(case):
    torch.manual_seed(case)
    n_head, d, B, T = torch.randint(1, 7, (4,)).tolist()
    C = n_head * d
    ours = GroupedQueryAttention(C, n_head, n_head, d, d).double()
    torchs = torch.nn.MultiheadAttention(C, n_head, bias=False, batch_first=True).double()
    projections = torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight])
    torchs.load_state_dict({"in_proj_weight": projections, "out_proj.weight": ours.o_proj.weight})
    x = normal(B, T, C)
    result = ours(x)
    expected = torchs(x, x, x, attn_mask=~causal(T, T), average_attn_weights=False)
    close(result, expected)
    dx, dq, dk, dv, do = torch.autograd.grad(result[0].exp().sum(), (x, *ours.parameters()))
    gradients = torch.autograd.grad(expected[0].exp().sum(), (x, *torchs.parameters()))
    close((dx, torch.cat([dq, dk, dv]), do), gradients)


@each_module
def test_modules_equal_attention_written_out_head_by_head(make):
    module = make().double()
    x = normal(2, 5, 16)
    q = module.q_proj(x).split(3, dim=2)
    if isinstance(module, MultiHeadLatentAttention):
        c = module.kv_down(x)
        k = module.k_up(c).split(3, dim=2)
        v = module.v_up(c).split(2, dim=2)
    else:
        k = module.k_proj(x).split(3, dim=2)
        v = module.v_proj(x).split(2, dim=2)
    heads = []
    for h in range(4):
        shared = h * len(k) // 4
        scores = (q[h] @ k[shared].mT / math.sqrt(3)).masked_fill(~causal(5, 5), -math.inf)
        heads.append(scores.softmax(-1) @ v[shared])
    close(module(x)[0], module.o_proj(torch.cat(heads, dim=2)))
    assert module(x[:0])[0].shape == (0, 5, 16)


@each_module
def test_padding_changes_no_answer_with_and_without_a_cache(make):
    module = make().double()
    x = normal(2, 7, 16)
    mask = torch.arange(7) >= torch.tensor([0, 3]).view(2, 1, 1, 1)  # seven tokens, and four
    y, _ = module(x, mask)
    close(y[1:], F.pad(module(x[1:, 3:])[0], (0, 0, 3, 0)))  # zeros where nothing is seen
    cache = KVCache(7)
    close(module(x[:, :5], mask[..., :5], cache)[0], y[:, :5])
    close(module(x[:, 5:], mask, cache)[0], y[:, 5:])


@each_module
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 1, 3], [7]])
def test_answers_from_the_cache_equal_those_of_the_whole_sequence(make, chunks):
    net = part3.LookupNet(make(), small).double()
    data = sequences(2)
    whole, weights = net(data)
    cache = KVCache(7)
    for fields in zip(*(field.split(chunks, dim=-1) for field in data), strict=True):
        start = cache.length
        logits, seen = net(part3.Sequences(*fields), cache)
        close(logits, whole[:, start : cache.length])
        close(seen, weights[:, :, start : cache.length, : cache.length])
    close(part3.decode(net, data), whole.detach())
    assert sum(memory.numel() for memory in cache.memory) == 2 * 7 * net.attention.cached
    with pytest.raises(ValueError, match="the cache is full"):
        net(part3.Sequences(*fields), cache)


@each_module
def test_causal_mask_hides_every_later_token(make):
    net = part3.LookupNet(make(), small).double()
    data = sequences(1)
    for t in range(7):
        digit = (data.digit + F.one_hot(torch.tensor(t), 7)) % 10
        moved = (net(data._replace(digit=digit))[0] != net(data)[0]).any(2)
        assert moved.tolist() == [[False] * t + [True] * (7 - t)]


def test_labels_equal_a_slow_and_obvious_loop_and_what_is_wanted_stands_before():
    data = sequences(50)
    for n, t in itertools.product(range(50), range(7)):
        label = 0
        for lookup, factor in enumerate((1, 2, 3)):
            names = data.name[n, lookup].tolist()
            assert sorted(names) == list(range(7))
            place = names.index(data.wanted_name[n, lookup, t])
            assert place < t or place == t == 0
            assert place == data.wanted_token[n, lookup, t]
            label += factor * data.digit[n, place].item()
        assert data.label[n, t] == label % 11


@pytest.mark.parametrize("lookups", [1, 2, 3])
def test_every_digit_found_can_move_the_label_if_several_lookups_find_it_too(lookups):
    for factors in itertools.combinations(part3.FACTORS, lookups):
        assert all(sum(factors) * change % part3.MODULUS != 0 for change in range(1, 10))


def test_right_token_equals_a_slow_and_obvious_loop():
    net = part3.LookupNet(MODULES["GQA"](), small).double()
    data = sequences(250)
    expected, weights = net(data)
    right = torch.zeros(3, 4)
    for n, lookup, head, t in itertools.product(range(250), range(3), range(4), range(7)):
        if weights[n, head, t].argmax() == data.wanted_token[n, lookup, t]:
            right[lookup, head] += 1
    close(part3.predict(net, data), (expected.detach(), right / 1750))


def test_training_is_adamw_on_the_mean_cross_entropy_at_a_rate_that_rises_and_falls():
    net = part3.LookupNet(MODULES["GQA"](), small).double()
    twin = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(twin.parameters(), weight_decay=0.5)
    generator = torch.Generator().manual_seed(0)
    history = part3.train(net, small, sequences(9), torch.Generator().manual_seed(0))
    losses = []
    for rate in [*range(4, 32, 4), *range(28, 0, -1)]:
        batch = part3.make_sequences(16, small, generator)
        loss = -twin(batch)[0].log_softmax(2).gather(2, batch.label[..., None]).mean()
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = 0.1 * rate / 28
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    means = [pair.mean().item() for pair in torch.tensor(losses).split(2)]
    assert [row["train_loss"] for row in history] == pytest.approx(means)


def test_the_weights_that_validated_best_are_kept():
    net = part3.LookupNet(MODULES["MHA"](), small).double()
    validation = sequences(1)
    history = part3.train(net, small, validation, torch.Generator().manual_seed(2))
    best = max(history, key=lambda row: row["val_accuracy"])  # the first of several
    assert [row["val_accuracy"] for row in history].count(best["val_accuracy"]) > 1
    assert best not in (history[0], history[-1])
    assert F.cross_entropy(net(validation)[0].mT, validation.label).item() == best["val_loss"]


def test_quality_gate_all_variants_learn_one_lookup_and_caches_agree(monkeypatch, tmp_path):
    monkeypatch.setattr(part3, "draw_figures", lambda *_: None)
    settings = {"lookups": 1, "seq_len": 5, "d_model": 64, "steps": 100, "batch_size": 64}
    results = part3.main(small_config(part3, **settings, device="cpu", images_dir=tmp_path))
    assert list(results) == ["MHA 2x4", "MQA 1x4", "MHA 2x2", "MLA 8"]
    assert [row["cached"] for row in results.values()] == [16, 8, 8, 8]
    assert min(row["accuracy"] for row in results.values()) > 0.99
    assert max(row["decode_difference"] for row in results.values()) < 1e-3


def test_default_gate_gqa_and_mla_answer_99_percent(data_dir, tmp_path):
    results = part3.main(part3.Config(n_kv_head=(2,), device="cpu", images_dir=tmp_path))
    assert min(row["accuracy"] for row in results.values()) >= 0.99


@pytest.mark.parametrize(("scale", "drawn", "started"), [(None, 0.36, 0.19), (1, 0.875, 0.65)])
def test_the_largest_weight_with_and_without_sqrt_d(scale, drawn, started):
    """The page's numbers: 8 tokens, d = 64, q and k of variance 1, or from PyTorch's own start."""
    q, k = torch.randn(2, 2000, 1, 8, 64)
    assert attention(q, k, k, scale=scale)[1].amax(-1).mean() == pytest.approx(drawn, abs=0.02)
    heads = torch.nn.Linear(64, 40 * 64)(torch.randn(100, 8, 64)).detach()
    q, k = part3.split_heads(heads, 40).chunk(2, dim=1)
    assert attention(q, k, k, scale=scale)[1].amax(-1).mean() == pytest.approx(started, abs=0.02)
