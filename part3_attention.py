"""Multi-head, grouped-query, multi-query and latent attention by hand, and what each one costs.

    attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V             (Vaswani et al. 2017, equation 1)

A model that writes keeps the keys and values of all earlier tokens: the KV cache. Every query head
has a key/value head of its own (MHA), shares one with its group (GQA) or with all the others (MQA),
or makes its own from a few cached numbers (MLA). What does each way save, and what does it cost?

    python part3_attention.py            # train, score and time every variant, draw
    python part3_attention.py --seeds 5  # five times: mean +- deviation; --help lists every setting
    python part3_attention.py --study    # then many cache sizes, and from MHA to GQA by pooling

Expect, over seeds 0 to 4, 100 % for MHA, 99 for MLA-32, 60 for GQA-4, 44 for MQA; 4 to 9 s each.
The lesson ends with `main`; below it stand figures, the study, devices and errors.

References: Vaswani et al. 2017, section 3.2 (MHA); Shazeer 2019 (MQA); Ainslie et al. 2023 (GQA;
pooling: section 2.1); DeepSeek-V2, 2024, section 2.1 (MLA); Arora et al. 2023 (recall tasks).
"""

import contextlib
import io
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import matplotlib.style
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, classification_report
from torch import Tensor, nn
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    d_model: int = 64  # numbers that stand for one token
    n_head: int = 16  # query heads, of d_model / n_head numbers each
    n_kv_head: tuple[int, ...] = (16, 4, 1)  # key/value heads of MHA, GQA and MQA
    kv_latent: tuple[int, ...] = (32,)  # numbers that MLA caches for a token; () for no MLA
    lookups: int = 3  # tokens that each token has to find
    seq_len: int = 10  # tokens in a sequence
    steps: int = 1500  # gradient steps for each variant
    batch_size: int = 128  # sequences in one gradient step, drawn fresh each time
    lr: float = 3e-3  # peak learning rate: it rises to this, then falls to zero
    weight_decay: float = 0.01  # AdamW's pull of the weights towards zero
    seed: int = 0  # of the sequences and the weights
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else the CPU
    images_dir: Path = Path("images")  # where the figures go
    seeds: int = 1  # runs, with seed, seed + 1, ...; several end with mean and standard deviation
    study: bool = False  # also many cache sizes, and the trained MHA converted to GQA and MQA

    def __post_init__(self) -> None:
        """Raise ValueError with field, value and what is allowed, before anything is done."""
        limits = {
            "d_model": (1, 16384), "n_head": (1, 256), "n_kv_head": (1, 256),
            "kv_latent": (1, 16384), "lookups": (1, 3), "seq_len": (2, 128), "lr": (1e-12, 1e30),
            "steps": (1, 10_000_000), "batch_size": (1, 1_000_000), "weight_decay": (0, 1e30),
            "seed": (0, 2**32 - 1), "seeds": (1, 1000),
        }  # fmt: skip
        check_fields(self, limits)
        if self.d_model % self.n_head != 0:
            raise UserError(f"d_model is {self.d_model}: no multiple of n_head = {self.n_head}")
        n = self.n_kv_head
        if not n or len(n) > len(set(n)) or any(self.n_head % divisor for divisor in n):
            raise UserError(f"n_kv_head is {n}: give different divisors of n_head = {self.n_head}")
        if self.study and self.n_head not in n:
            raise UserError(f"study is on: n_kv_head must hold n_head = {self.n_head}, for MHA")


# ------------------------------------------- model -------------------------------------------- #


def softmax(scores: Tensor) -> Tensor:
    """exp(s) / sum of exp(s), of each row; a row of nothing but -inf becomes zeros."""
    # Subtracting the row's maximum only keeps exp from overflowing; the clamps are for empty rows.
    limits = torch.finfo(scores.dtype)
    exp = torch.exp(scores - scores.detach().amax(-1, keepdim=True).clamp(min=limits.min))
    return exp / exp.sum(-1, keepdim=True).clamp(min=limits.tiny)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v, where a key/value head may serve a group of query heads.

    By definition it is repeated for its group: k.repeat_interleave(2, 1) turns two key heads into
    [K1, K1, K2, K2], one for each of four query heads. Here the queries of a group are laid one
    below the other instead and meet K1 in one product: the same numbers, and nothing is copied.
    sqrt(d), because a dot product of d independent numbers of variance 1 has variance d (Vaswani
    et al. 2017, section 3.2.1). The mask is True where a query may attend.

    Shapes: q (B, n_head, T, d), k, v (B, n_kv_head, S, d), mask broadcastable to (B, n_head, T, S)
        -> output (B, n_head, T, d), weights (B, n_head, T, S); ValueError if heads do not divide
    """
    B, n_head, T, d = q.shape
    n_kv_head, S = k.shape[1:3]
    if n_head % n_kv_head != 0:
        raise ValueError(f"{n_head} query heads cannot share {n_kv_head} key/value heads evenly")
    q = q.reshape(B, n_kv_head, -1, d)  # (B, n_kv_head, group T, d)
    scores = (q @ k.mT / math.sqrt(d)).view(B, n_head, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = softmax(scores)  # (B, n_head, T, S): each row adds up to 1
    output = weights.view(B, n_kv_head, -1, S) @ v  # (B, n_kv_head, group T, d)
    return output.view(B, n_head, T, d), weights


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """Cut each token's row into heads: (B, T, n_head d) -> (B, n_head, T, d).

    Four tokens, two heads of one number. Each head gets     token 0: a0 b0     a: a0 a1 a2 a3
    its number of every token. x.view(B, n_head, T, d) has   token 1: a1 b1     b: b0 b1 b2 b3
    the same shape, but its first head would be a0 b0 a1     token 2: a2 b2
    b1: both heads of two tokens, and nothing of the rest.   token 3: a3 b3
    """
    B, T, _ = x.shape
    return x.view(B, T, n_head, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """The heads of each token side by side again: (B, n_head, T, d) -> (B, T, n_head d)."""
    return x.transpose(1, 2).flatten(2)


class KVCache:
    """Keeps what is needed of up to max_len tokens, in memory that is allocated once."""

    def __init__(self, max_len: int) -> None:
        self.max_len, self.length, self.memory = max_len, 0, []

    def append(self, *new: Tensor) -> list[Tensor]:
        """Add tensors (..., T, numbers); returns all that is held. ValueError if it is too much."""
        end = self.length + new[0].shape[-2]
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, not {end}")
        if not self.memory:  # the first token allocates it all
            self.memory = [x.new_zeros(*x.shape[:-2], self.max_len, x.shape[-1]) for x in new]
        for memory, x in zip(self.memory, new, strict=True):
            memory[..., self.length : end, :] = x
        self.length = end
        return [memory[..., :end, :] for memory in self.memory]


class GroupedQueryAttention(nn.Module):
    """Attention with n_head query heads and n_kv_head key/value heads of head_dim numbers.

    n_kv_head == n_head is multi-head attention (MHA, Vaswani et al. 2017), n_kv_head == 1 is
    multi-query attention (MQA, Shazeer 2019), between them lies grouped-query attention (GQA,
    Ainslie et al. 2023). With a cache, the S tokens are all that it holds after these T.

    Shapes: x (B, T, d_model), mask (T, S) -> y (B, T, d_model), weights (B, n_head, T, S)
    """

    def __init__(self, d_model: int, n_head: int, n_kv_head: int, head_dim: int) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim
        self.q_proj = nn.Linear(d_model, n_head * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_head * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_head * head_dim, bias=False)
        self.o_proj = nn.Linear(n_head * head_dim, d_model, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = split_heads(self.q_proj(x), self.n_head)  # (B, n_head, T, d)
        k = split_heads(self.k_proj(x), self.n_kv_head)  # (B, n_kv_head, T, d); MQA: (B, 1, T, d)
        v = split_heads(self.v_proj(x), self.n_kv_head)
        return q, k, v

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_kv_head, S, d)
        output, weights = attention(q, k, v, mask)
        return self.o_proj(merge_heads(output)), weights


class MultiHeadLatentAttention(nn.Module):
    """MLA: kv_latent numbers c of a token are cached; each head makes its key and value from them.

    DeepSeek-V2 (arXiv 2405.04434), section 2.1.2, equations 9 to 11, without its rotary part and
    compressed queries. Shapes as in GroupedQueryAttention.
    """

    def __init__(self, d_model: int, n_head: int, kv_latent: int, head_dim: int) -> None:
        super().__init__()
        self.n_head, self.kv_latent, self.head_dim = n_head, kv_latent, head_dim
        self.q_proj = nn.Linear(d_model, n_head * head_dim, bias=False)
        self.kv_down = nn.Linear(d_model, kv_latent, bias=False)  # W_DKV
        self.k_up = nn.Linear(kv_latent, n_head * head_dim, bias=False)  # W_UK
        self.v_up = nn.Linear(kv_latent, n_head * head_dim, bias=False)  # W_UV
        self.o_proj = nn.Linear(n_head * head_dim, d_model, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        q, c = split_heads(self.q_proj(x), self.n_head), self.kv_down(x)  # c: (B, T, kv_latent)
        if cache is None:
            k, v = split_heads(self.k_up(c), self.n_head), split_heads(self.v_up(c), self.n_head)
            output, weights = attention(q, k, v, mask)
        else:  # make no keys: q . (W_UK c) = (W_UK^T q) . c, which is MQA with one wide head, c
            (c,) = cache.append(c)  # (B, S, kv_latent)
            W_UK = self.k_up.weight.view(self.n_head, self.head_dim, -1)  # (n_head, d, kv_latent)
            W_UV = self.v_up.weight.view(self.n_head, self.head_dim, -1)
            q = q @ W_UK * math.sqrt(self.kv_latent / self.head_dim)  # the scale stays sqrt(d)
            output, weights = attention(q, c[:, None], c[:, None], mask)
            output = output @ W_UV.mT  # (B, n_head, T, d)
        return self.o_proj(merge_heads(output)), weights


class LookupNet(nn.Module):
    """Embed the tokens, attend once, and let a small MLP work out the label from the digits found.

    Shapes: Sequences of N sequences of T tokens -> logits (N, T, 10), weights (N, n_head, T, S)
    """

    def __init__(self, attention: nn.Module, config: Config) -> None:
        super().__init__()
        C, T, L = config.d_model, config.seq_len, config.lookups
        self.name = nn.ModuleList(nn.Embedding(T, C) for _ in range(L))
        self.wanted = nn.ModuleList(nn.Embedding(T, C) for _ in range(L))
        self.digit = nn.Embedding(10, C)
        self.attention = attention
        layers = [nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, 10)]
        self.mlp = nn.Sequential(*layers)
        # Causal: token t (row) may look at itself and at the tokens before it (columns up to t).
        self.register_buffer("causal", torch.ones(T, T, dtype=torch.bool).tril())

    def embed(self, data: "Sequences") -> Tensor:
        x = self.digit(data.digit)  # (N, T, C); no position: where a token stands tells nothing
        for i in range(len(self.name)):
            x = x + self.name[i](data.names[:, i]) + self.wanted[i](data.wanted[:, i])
        return x

    def forward(self, data: "Sequences", cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        start = 0 if cache is None else cache.length
        end = start + data.digit.shape[1]
        mask = self.causal[start:end, :end]  # for one more token: all that is held
        y, weights = self.attention(self.embed(data), mask, cache)
        return self.mlp(y), weights


# -------------------------------------------- data -------------------------------------------- #

FACTORS = (1, 3, 7)  # with inverses modulo 10, so each digit can move the label to any value


class Sequences(NamedTuple):
    """N sequences of T tokens with L names each; all int64."""

    names: Tensor  # (N, L, T): each token's name in each alphabet, a permutation of 0 .. T - 1
    wanted: Tensor  # (N, L, T): the name, in each alphabet, of the token whose digit is wanted
    digit: Tensor  # (N, T): 0 .. 9
    where: Tensor  # (N, L, T): the answer key: the token that has the wanted name
    label: Tensor  # (N, T): the sum of FACTORS times the digits found, mod 10


def draw_sequences(n: int, config: Config, stream: torch.Generator) -> Sequences:
    """Draw n sequences on the stream's device. What a token wants stands before it.

    Three tokens, two lookups. Token 2 wants    token            0  1  2
    1 in A (token 0: 7) and 2 in B (token 1:    names, A         1  0  2
    5); its label is 1 * 7 + 3 * 5 = 2 mod 10.  names, B         0  2  1
    The first token, with nobody before it,     digit            7  5  8
    wants itself, and token 1 the first one.    wanted, A and B  1 0  1 0  1 2
    """
    T, L, device = config.seq_len, config.lookups, stream.device
    names = torch.rand(n, L, T, generator=stream, device=device).argsort(2)
    digit = torch.randint(10, (n, T), generator=stream, device=device)
    token = torch.arange(T, device=device)
    where = (torch.rand(n, L, T, generator=stream, device=device) * token).long()  # 0 .. t - 1
    factors = torch.tensor(FACTORS[:L], device=device)[:, None]  # (L, 1)
    found = digit[:, None].expand(n, L, T).gather(2, where)  # (N, L, T)
    return Sequences(names, names.gather(2, where), digit, where, (factors * found).sum(1) % 10)


# ------------------------------------------ training ------------------------------------------ #


class Training(NamedTuple):
    """Where training stands at a validation: one record, which Ctrl-C finds whole or not at all."""

    step: int  # steps taken
    val_loss: float
    val_accuracy: float
    seconds: float  # since the start
    weights: dict[str, Tensor]


def best(history: list[Training]) -> int:
    """The index of the highest validation accuracy; among equals, of the lowest loss."""
    return max(range(len(history)), key=lambda i: (history[i].val_accuracy, -history[i].val_loss))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear up to `peak` over the first fifth of the steps, then linear down towards zero."""
    return peak * min(1.0, (step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))


def train(
    net: LookupNet, config: Config, validation: Sequences, stream: torch.Generator,
    history: list[Training],
) -> None:  # fmt: skip
    """Fit `net` on sequences from `stream`, validate about 15 times, load the best weights.

    Raises UserError if the loss becomes NaN or infinite.
    """
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    every, start = max(1, config.steps // 15), time.perf_counter()
    print(" step  train loss  val loss  val accuracy         lr  seconds")
    for done in range(0, config.steps, every):
        net.train()
        losses = []  # stay on the device: to look at one would make a GPU wait
        end = min(done + every, config.steps)
        for step in tqdm(range(done, end), f"steps to {end}", leave=False, disable=None):
            lr = optimizer.param_groups[0]["lr"] = learning_rate(step, config.steps, config.lr)
            batch = draw_sequences(config.batch_size, config, stream)
            logits, _ = net(batch)  # (B, T, 10)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.label.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())

        losses = torch.stack(losses).tolist()  # here the CPU waits for the GPU
        logits, _ = predict(net, validation)
        val_loss = F.cross_entropy(logits.flatten(0, 1), validation.label.flatten()).item()
        val_accuracy = (logits.argmax(2) == validation.label).float().mean().item()
        if not math.isfinite(sum(losses) + val_loss):
            bad = done + np.isfinite([*losses, val_loss]).argmin() + 1
            advice = f"try a lower learning rate than lr = {config.lr:g}"
            raise UserError(f"the loss became NaN or infinite in step {bad}: {advice}")
        seconds = time.perf_counter() - start
        weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        history.append(Training(end, val_loss, val_accuracy, seconds, weights))
        row = f"{end:5d}  {np.mean(losses):10.4f}  {val_loss:8.4f}  {val_accuracy:12.4f}  "
        print(f"{row}{lr:9.2e}  {seconds:7.1f}")
    net.load_state_dict(history[best(history)].weights)


@torch.no_grad()
def predict(net: LookupNet, data: Sequences) -> tuple[Tensor, Tensor]:
    """Logits (N, T, 10) and attention weights (N, n_head, T, T) in evaluation mode."""
    return net.eval()(data)


@torch.no_grad()
def decode(net: LookupNet, data: Sequences) -> Tensor:
    """Logits (N, T, 10) as a model that writes gets them: token by token, from the cache."""
    cache, logits = KVCache(max_len=data.digit.shape[1]), []
    for t in range(cache.max_len):
        token = Sequences(*(field[..., t : t + 1] for field in data))
        logits.append(net.eval()(token, cache)[0])  # (N, 1, 10)
    return torch.cat(logits, 1)


def score(labels: Tensor, predictions: Tensor, class_names: list[str]) -> dict:
    """Accuracy, precision, recall and F1 of all predictions (N,) at once, as fractions of 1.

    `precision`, `recall` and `f1` are macro averages: plain means over the C classes. `per_class`
    holds the (C,) arrays, `report` a table of it all. A class that is never predicted counts as 0.
    """
    labels, predictions = labels.numpy(force=True), predictions.numpy(force=True)
    matrix = np.zeros((len(class_names), len(class_names)), dtype=int)
    np.add.at(matrix, (labels, predictions), 1)  # rows: true class; columns: predicted class
    right, predicted, true = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)  # (C,) each
    accuracy = right.sum() / matrix.sum()
    precision = right / predicted.clip(min=1)  # of all that was called c, the share that is c
    recall = right / true.clip(min=1)  # of all that is c, the share that was found
    f1 = 2 * right / (predicted + true).clip(min=1)  # = 2 P R / (P + R); 0/0 counts as 0
    table = {"labels": range(len(class_names)), "target_names": class_names, "digits": 4}
    return {
        "accuracy": float(accuracy),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
        "confusion_matrix": matrix,
        "per_class": {"precision": precision, "recall": recall, "f1": f1},
        "report": classification_report(labels, predictions, zero_division=0, **table),
    }


# -------------------------------------------- main -------------------------------------------- #


def main(config: Config, draw: bool = True) -> dict[str, dict]:
    """Train, score and time every variant, and draw; returns a dict of results for each.

    After Ctrl-C what has been trained is scored and drawn, then KeyboardInterrupt is raised again.
    """
    device = pick_device(config.device)
    check_writable(config.images_dir / "part3.png" if draw else None)  # before training
    test, validation, stream = draw_splits(config, device)
    names = [{1: "MQA", config.n_head: "MHA"}.get(n, f"GQA-{n}") for n in config.n_kv_head]
    names += [f"MLA-{numbers}" for numbers in config.kv_latent]
    names += [f"MHA-{n}" for n in config.n_kv_head if n < config.n_head]  # few heads, unshared
    nets, histories = {}, {}
    try:
        for name in names:
            nets[name], histories[name] = new_net(name, config, device), []
            numbers = cached_numbers(nets[name].attention)
            print(f"\n{name}: {numbers} numbers cached for a token; device {device}")
            train(nets[name], config, validation, stream.clone_state(), histories[name])
        results = report(nets, histories, test, config, "", draw)
    except (KeyboardInterrupt, UserError):
        nets = {name: net for name, net in nets.items() if histories.get(name)}
        if nets:
            last, history = [(name, histories[name]) for name in nets][-1]
            note = f", interrupted after step {history[-1].step} of {last}"
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("interrupted: what has been trained is scored", file=sys.stderr)
            report(nets, histories, test, config, note, draw)
        raise
    if config.seeds > 1:
        repeat_variants(config, results)
    if config.study:
        results["study"] = study(nets["MHA"], config, device)
    return results


# ============= The lesson ends here. Below: figures, the study, devices, errors. ============== #


def make_attention(name: str, config: Config) -> nn.Module:
    """The module called MHA, GQA-4 (key/value heads) or MQA, of heads of d_model / n_head numbers.

    MHA-4 has four heads only, MQA-8 has heads of 8 numbers, MLA-32 caches 32 numbers a token.
    """
    C, n_head, d = config.d_model, config.n_head, config.d_model // config.n_head
    kind, _, digits = name.partition("-")
    number = int(digits or 0)
    if kind == "MLA":
        return MultiHeadLatentAttention(C, n_head, number, d)
    if kind == "GQA":
        return GroupedQueryAttention(C, n_head, number, d)
    if kind == "MQA":
        return GroupedQueryAttention(C, n_head, 1, number or d)
    return GroupedQueryAttention(C, number or n_head, number or n_head, d)


def new_net(name: str, config: Config, device: torch.device) -> LookupNet:
    """The net of a variant, untrained, the same for the same seed."""
    torch.manual_seed(config.seed)
    return LookupNet(make_attention(name, config), config).to(device)


def draw_splits(
    config: Config, device: torch.device
) -> tuple[Sequences, Sequences, torch.Generator]:
    """Test and validation sequences, and the stream that goes on with those to train on."""
    stream = torch.Generator(device).manual_seed(config.seed)
    return draw_sequences(2000, config, stream), draw_sequences(1000, config, stream), stream


def pool_heads(mha: GroupedQueryAttention, n_kv_head: int) -> GroupedQueryAttention:
    """Each key/value head becomes the mean of those it replaces (Ainslie 2023, section 2.1)."""
    C, d, state = mha.q_proj.in_features, mha.head_dim, mha.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].view(n_kv_head, -1, d, C).mean(1).view(-1, C)
    new = GroupedQueryAttention(C, mha.n_head, n_kv_head, d).to(mha.q_proj.weight)
    new.load_state_dict(state)
    return new


def cached_numbers(module: nn.Module) -> int:
    """How many numbers `module` keeps of one token."""
    cache, weight = KVCache(max_len=1), module.q_proj.weight
    module(weight.new_zeros(1, 1, weight.shape[1]), cache=cache)
    return sum(memory.numel() for memory in cache.memory)


def alignment(weights: Tensor, data: Sequences) -> Tensor:
    """(L, n_head): how often the largest of weights (N, n_head, T, T) is on the right token."""
    looks_at = weights.argmax(3)[:, None]  # (N, 1, n_head, T)
    return (looks_at == data.where[:, :, None]).float().mean((0, 3))


def accuracy(net: LookupNet, data: Sequences) -> float:
    """The share of right labels, in %."""
    return 100 * (predict(net, data)[0].argmax(2) == data.label).float().mean().item()


def steps_to_99(history: list[Training]) -> float:
    """The step of the first validation with 99 %; NaN: never."""
    return next((h.step for h in history if h.val_accuracy >= 0.99), math.nan)


@torch.no_grad()
def decode_times(name: str, config: Config, device: torch.device) -> dict[str, list[float]]:
    """By context: seconds of a decoding step of the module, projections included; cache in bytes.

    As many heads as the variant has, but of 64 numbers, as in real models; batch 4.
    """
    wide = replace(config, d_model=64 * config.n_head)
    if name.startswith("MLA"):
        name = f"MLA-{int(name[4:]) * wide.d_model // config.d_model}"
    module, x = make_attention(name, wide).to(device), torch.randn(4, 1, wide.d_model).to(device)
    longest = min(8192, 2**29 // (2048 * config.n_head))  # MHA's cache is 512 MB at the most
    found = {"context": [longest // n for n in (16, 8, 4, 2, 1)], "seconds": [], "bytes": []}
    for context in found["context"]:
        cache, times = KVCache(context), []
        for _ in range(12):
            start = time.perf_counter()
            module(x, cache=cache)[0].sum().item()  # .item() waits until the device has finished
            times.append(time.perf_counter() - start)
            cache.length = context - 1  # as if all tokens but the last were there
        found["seconds"].append(np.median(times[2:]))  # the first two warm up
        found["bytes"].append(sum(memory.nbytes for memory in cache.memory))
    return found


@matplotlib.style.context("default")  # whatever the matplotlibrc on this machine says
def report(
    nets: dict[str, LookupNet], histories: dict[str, list[Training]], test: Sequences,
    config: Config, note: str, draw: bool,
) -> dict[str, dict]:  # fmt: skip
    """Score every net on the test sequences, decode from its cache, draw, print the tables."""
    results, weights, times, few = {}, {}, {}, Sequences(*(field[:100] for field in test))
    for name, net in nets.items():
        history = histories[name]
        net.load_state_dict(history[best(history)].weights)
        logits, weights[name] = predict(net, test)  # they are scored once, here
        times[name] = decode_times(name, config, test.digit.device)
        results[name] = {"dataset": f"{config.lookups} lookups"}
        results[name] |= score(test.label.flatten(), logits.argmax(2).flatten(), DIGITS)
        results[name] |= {
            "train_seconds": history[-1].seconds,
            "epochs_run": 1,  # every sequence is seen once
            "steps_to_99": steps_to_99(history),
            "parameters": sum(p.numel() for p in net.parameters()),
            "cached_numbers": cached_numbers(net.attention),
            "decode_microseconds": 1e6 * times[name]["seconds"][-1],
            "decode_difference": (decode(net, few) - logits[:100]).abs().max().item(),
            "alignment": alignment(weights[name], test).amax(1).tolist(),
        }

    title = f"{config.lookups} lookups among {config.seq_len} tokens{note}\ntest accuracy: "
    title += ", ".join(f"{name} {row['accuracy']:.2%}" for name, row in results.items())
    first, worst = next(iter(results)), min(results, key=lambda name: results[name]["accuracy"])
    matrices = {name: results[name]["confusion_matrix"] for name in (first, worst)}
    if draw:
        figures = {
            "attention_heatmaps": heatmap_figure(weights, test, title),
            "training_curves": curves_figure(histories, title),
            "confusion_matrix": confusion_figure(matrices, DIGITS, title),
            "decode": decode_figure(times, test.digit.device),
            "qkv": qkv_figure(first, nets[first], test),
        }
        for name, figure in figures.items():
            save_figure(figure, config.images_dir / f"part3_{name}.png")

    for name, row in results.items():
        print(f"\n{name}, test sequences{note}\n{row['report']}")
    columns = {"accuracy": ".4f", "precision": ".4f", "recall": ".4f", "f1": "6.4f"}
    columns |= {"parameters": ",", "cached_numbers": "", "steps_to_99": ".0f"}
    columns |= {"train_seconds": ".1f", "decode_microseconds": ",.0f"}
    print("variant  " + "  ".join(f"{key:>6}" for key in columns) + "  alignment")
    for name, row in results.items():
        cells = (f"{format(row[key], form):>{max(6, len(key))}}" for key, form in columns.items())
        print(f"{name:7}", *cells, " ".join(f"{a:.2f}" for a in row["alignment"]), sep="  ")
    print(f"decode: batch 4, heads of 64, {times[name]['context'][-1]:,} tokens in the cache")
    difference = max(row["decode_difference"] for row in results.values())
    print(
        f"100 sequences token by token from the cache: logits within {difference:.0e} of the above"
    )
    return results


def new_figure(title: str, size: tuple[float, float], *grid: int, **more: object) -> tuple:
    """A figure and its axes; `grid` is rows and columns, `size` is in inches of 100 pixels."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(*grid, **more)


def confusion_figure(matrices: dict[str, np.ndarray], classes: list[str], title: str) -> Figure:
    """Confusion matrices by heading: counts and row percentages, rows true, columns predicted."""
    down, across = math.ceil(len(matrices) / 2), min(2, len(matrices))
    size = (11, 5.8 * down) if across == 2 else (9, 8.5)
    figure, grid = new_figure(title, size, down, across, squeeze=False)
    slant = 45 if max(map(len, classes)) > 3 else 0
    for axes, (heading, matrix) in zip(grid.flat, matrices.items(), strict=False):
        share = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
        display = ConfusionMatrixDisplay(share, display_labels=classes)
        display.plot(ax=axes, cmap="magma_r", colorbar=False, xticks_rotation=slant)
        display.im_.set_clim(0, 1)
        for cell, text in np.ndenumerate(display.text_):
            text.set_text(f"{matrix[cell]}\n{share[cell]:.1%}" if matrix[cell] else "")
            text.set(fontsize=8, color="white" if share[cell] > 0.5 else "black")
        axes.set(xlabel="predicted", ylabel="true", title=heading)
    return figure


def curves_figure(histories: dict[str, list[Training]], title: str) -> Figure:
    """Validation loss and accuracy of every variant by training step."""
    figure, (left, right) = new_figure(title, (10, 4), 1, 2)
    for name, history in histories.items():
        steps, percent = [h.step for h in history], [100 * h.val_accuracy for h in history]
        left.plot(steps, [h.val_loss for h in history], "o-", markersize=3, label=name)
        right.plot(steps, percent, "o-", markersize=3, label=name)
    left.set(xlabel="step", ylabel="validation cross-entropy (nats)", yscale="log")
    right.set(xlabel="step", ylabel="validation accuracy (%)")
    left.legend()
    return figure


def heatmap_figure(weights: dict[str, Tensor], data: Sequences, title: str) -> Figure:
    """For each lookup the truth, and the best head of each variant, on one sequence."""
    L, T = data.where.shape[1:]
    title += "\nrow: the token that asks; column: the token that it looks at"
    figure, grid = new_figure(title, (14, 1 + 2.4 * L), L, 1 + len(weights), squeeze=False)
    for i in range(L):
        pictures = {f"lookup {i + 1}: truth": F.one_hot(data.where[0, i], T)}
        for name, by_head in weights.items():
            share, head = alignment(by_head, data)[i].max(0)
            pictures[f"{name}, head {head}\nright: {share:.0%}"] = by_head[0, head]
        for axes, (heading, picture) in zip(grid[i], pictures.items(), strict=True):
            shown = axes.imshow(picture.numpy(force=True), vmin=0, vmax=1)
            axes.set(title=heading, xticks=[], yticks=[])
    figure.colorbar(shown, ax=grid, label="weight", shrink=0.6)
    return figure


def decode_figure(times: dict[str, dict], device: torch.device) -> Figure:
    """Time of a decoding step of every variant by context length, with its cache's size."""
    title = f"One decoding step: batch 4, heads of 64, float32, {device}"
    figure, axes = new_figure(title, (10, 5))
    for name, row in times.items():
        label = f"{name}: cache of {row['bytes'][-1] / 2**20:,.0f} MiB at the end"
        axes.plot(row["context"], 1e3 * np.array(row["seconds"]), "o-", label=label)
    axes.set(xlabel="tokens in the cache", ylabel="milliseconds", xscale="log", yscale="log")
    axes.set_xticks(row["context"], row["context"], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    return figure


@torch.no_grad()
def qkv_figure(name: str, net: LookupNet, data: Sequences) -> Figure:
    """The best head for the first lookup, on one sequence: Q, K, V, ... with their numbers."""
    head = int(alignment(predict(net, data)[1], data)[0].argmax())
    q, k, v = net.attention.heads(net.embed(Sequences(*(field[:1] for field in data))))
    output, weights = attention(q, k, v, net.causal)
    kv = head * net.attention.n_kv_head // net.attention.n_head
    q, k, v = q[0, head], k[0, kv], v[0, kv]  # (T, d)
    scores = (q @ k.T / math.sqrt(q.shape[1])).masked_fill(~net.causal, math.nan)
    panels = {
        "Q: what each token wants": q,
        "K: what each token is called": k,
        "V: what each token has to give": v,
        "scores = Q K^T / sqrt(d), causal": scores,
        "weights = softmax of each row": weights[0, head],
        "output = weights V": output[0, head],
    }
    title = f"{name}, head {head}, one test sequence, step by step"
    figure, grid = new_figure(title, (13, 9), 2, 3)
    for axes, (heading, matrix) in zip(grid.flat, panels.items(), strict=True):
        matrix = matrix[:12, :12].numpy(force=True)  # as much as can be read
        limit = np.nanmax(np.abs(matrix))
        axes.imshow(matrix, aspect="auto", cmap="coolwarm", vmin=-limit, vmax=limit)
        for (row, col), value in np.ndenumerate(matrix):
            text, colour = f"{value:.1f}", "white" if abs(value) > 0.7 * limit else "black"
            if not math.isnan(value):
                axes.text(col, row, text, ha="center", va="center", color=colour, fontsize=9)
        across = "token looked at" if "scores" in heading or "weights" in heading else "dimension"
        axes.set(title=heading, ylabel="token", xlabel=across)
        axes.set_xticks(range(matrix.shape[1]))
    return figure


def repeat_variants(config: Config, first: dict[str, dict]) -> None:
    """Run `main` with the next seeds too; print each variant's scores, mean and deviation."""
    runs = [first]
    try:
        for seed in range(config.seed + 1, config.seed + config.seeds):
            setting = replace(config, seed=seed % 2**32, seeds=1, study=False)
            runs.append(main(setting, draw=False))
    finally:  # what is finished is told even if a later run is not
        print(f"\ntest sequences, {len(runs)} seeds from {config.seed}: mean +- std (each)")
        for name, key in ((n, k) for n in first for k in ("accuracy", "f1", "steps_to_99")):
            values = [run[name][key] * (1 if key == "steps_to_99" else 100) for run in runs]
            each = ", ".join(f"{round(v, 2):g}" for v in values)
            std = np.std(values, ddof=len(runs) > 1)
            print(f"{name:7} {key:11}  {np.mean(values):.2f} +- {std:.2f}  ({each})")
    for name, row in first.items():
        row["runs"] = [run[name] for run in runs]


@matplotlib.style.context("default")
def study(mha: LookupNet, config: Config, device: torch.device) -> dict[str, list]:
    """Many cache sizes with three seeds; then fewer heads from the trained MHA by pooling."""
    n, d = config.n_head, config.d_model // config.n_head
    families = {
        "MHA": ["MHA", *(f"MHA-{n // k}" for k in (2, 4, 8, 16) if n % k == 0)],
        "GQA": [f"GQA-{n // k}" for k in (2, 4, 8) if n % k == 0],
        "MQA": [f"MQA-{d * k}" for k in (1, 2, 4)],
        "MLA": [f"MLA-{d * k}" for k in (2, 4, 8, 16)],
    }
    what, found = f"{config.lookups} lookups, {config.steps:,} steps, three seeds", {}
    print(f"\n{what}\nvariant  cached  accuracy by seed, %   steps to 99 % (nan: never)")
    order = [name for names in families.values() for name in names]
    for name in tqdm(order, "study", disable=None):
        found[name] = []
        for i in range(3):
            setting = replace(config, seed=(config.seed + i) % 2**32)
            test, validation, stream = draw_splits(setting, device)
            net, history = new_net(name, setting, device), []
            with contextlib.redirect_stdout(None):  # no rows
                train(net, setting, validation, stream, history)
            numbers = cached_numbers(net.attention)
            found[name].append((numbers, accuracy(net, test), steps_to_99(history)))
        _, percents, steps = zip(*found[name], strict=True)
        tqdm.write(f"{name:7}  {numbers:6}  {' '.join(f'{p:6.2f}' for p in percents)}  {steps}")

    figure, axes = new_figure(f"{what}: accuracy on test sequences", (10, 5))
    for i, (family, names) in enumerate(families.items()):
        points = np.array([found[name] for name in names]).reshape(len(names), 3, 3)
        numbers, percents, _ = points.transpose(2, 0, 1)  # (sizes, seeds) each
        axes.plot(numbers * 1.02**i, percents, f"C{i}o", markersize=4)  # side by side, not hidden
        axes.plot(numbers[:, 0] * 1.02**i, percents.mean(1), f"C{i}", label=family)
    sizes = sorted({rows[0][0] for rows in found.values()})
    axes.set(xlabel="numbers cached for a token", ylabel="accuracy (%): each seed, and the mean")
    axes.set(xscale="log", xlim=(sizes[0] / 1.2, None))
    axes.set_xticks(sizes, sizes, minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, config.images_dir / "part3_cache_tradeoff.png")

    few, (test, validation, stream) = sorted(config.n_kv_head)[:-1], draw_splits(config, device)
    if not few:
        return found
    figure, axes = new_figure(f"From MHA by pooling key/value heads, seed {config.seed}", (10, 4.4))
    print("\nfrom MHA by pooling; further steps    0 %    1 %    5 %   10 %   20 %")
    for n_kv_head, pooled in ((n, pooled) for n in few for pooled in (True, False)):
        accuracies, percents = [], (0, 1, 5, 10, 20)
        for percent in percents:
            net = new_net(f"GQA-{n_kv_head}", config, device)
            if pooled:
                net.load_state_dict(
                    mha.state_dict() | net.attention.state_dict(prefix="attention.")
                )
                net.attention = pool_heads(mha.attention, n_kv_head)
            if percent > 0:
                setting = replace(config, steps=max(1, config.steps * percent // 100))
                with contextlib.redirect_stdout(None):  # no rows
                    train(net, setting, validation, stream.clone_state(), [])
            accuracies.append(accuracy(net, test))
        name = f"{n_kv_head} key/value heads, {'pooled' if pooled else 'from scratch'}"
        print(f"{name:33}" + "".join(f"{a:7.2f}" for a in accuracies))
        axes.plot(percents, accuracies, "o-" if pooled else "o--", label=name)
        found[name] = accuracies
    axes.set(xlabel="further training (% of the original steps)", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, config.images_dir / "part3_study_from_mha.png")
    return found


DIGITS = list("0123456789")


class UserError(ValueError):
    """Something the user can mend: shown as one line, without a traceback."""


def check_fields(config: object, limits: dict[str, tuple[float, float]]) -> None:
    """Raise UserError for a value not of its field's type, or a number not within its limits."""
    for field in fields(config):
        value, every = getattr(config, field.name), CollectionCheckStrategy.ALL_ITEMS
        is_path = Path in (field.type, *get_args(field.type))
        if is_path and isinstance(value, str | Path):  # a string will do
            value = Path(os.path.expanduser(value))
            object.__setattr__(config, field.name, value)
        try:
            check_type(value, field.type, collection_check_strategy=every)
        except TypeCheckError as error:
            raise UserError(f"{field.name} is {value!r}, but that {error}") from None
        low, high = limits.get(field.name, (-math.inf, math.inf))
        for number in value if isinstance(value, tuple) else (value,):
            if field.name in limits and not low <= number <= high:  # as NaN is not
                raise UserError(f"{field.name} is {value}: it must be from {low} to {high}")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: nobody ever meets half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path} ({error.strerror}): choose another folder") from None


def check_writable(path: Path | None) -> None:
    """Raise UserError if a file could not be written at `path`."""
    if path and os.path.isdir(path):
        raise UserError(f"{path} is a folder: name a file in it")
    if path:
        write_whole(attempt := path.with_name(f"{path.name}.try"), b"")
        attempt.unlink()


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG."""
    figure.savefig(picture := io.BytesIO(), format="png", dpi=100)
    write_whole(path, picture.getvalue())


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto is the accelerator that is there (CUDA, MPS), else the CPU."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = torch.device(name) if name != "auto" else there or torch.device("cpu")
    if found.type not in ("cpu", there and there.type):
        raise UserError(f"device {name} is not available here; use --device cpu or auto")
    return found


def explain(error: Exception) -> str:
    """What a user can do about `error`; a mistake in the code goes on as a traceback."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if known or "DefaultCPUAllocator" in str(error):
        return "out of memory: try a smaller --batch-size, or a smaller net"
    if isinstance(error, OSError) and error.filename is None:  # no file, so it is the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's own last flush fails again
        return f"stopped, for the output failed ({error.strerror})"
    if isinstance(error, UserError):
        return str(error)
    raise error


def command_line() -> int:
    """Run `main` with the flags given; what a user can cause ends in one line, not a traceback."""
    for sign in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(sign) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(sign, signal.default_int_handler)  # end the run as Ctrl-C does
    try:
        Config()  # a default that was edited into something impossible is told first
        try:
            main(tyro.cli(Config))
        finally:
            print(end="", flush=True)  # here, where a failure can still be told
        return 0
    except KeyboardInterrupt:
        problem, status = "stopped", 130
    except Exception as error:
        problem, status = explain(error), 1
    print(f"{Path(__file__).name}: {problem}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(command_line())
