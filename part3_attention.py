"""Multi-head, grouped-query, multi-query and latent attention by hand, and what each one costs.

    attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V             (Vaswani et al. 2017, equation 1)

A model that writes keeps the keys and values of all earlier tokens: the KV cache. Every query head
has a key/value head of its own (MHA), shares one with its group (GQA) or with all the others (MQA),
or makes its own from a few cached numbers (MLA). What does each way save, and what does it cost?

    python part3_attention.py          # train and score every variant, draw; --help has settings
    python part3_attention.py --study  # then go on from the trained MHA to GQA and MQA

Expect 100 % for MHA, GQA-2, MLA-32, 63 for MHA-2, 44 for MQA in 2 min. The lesson ends with `main`.

References: Vaswani et al. 2017 (MHA); Shazeer 2019 (MQA); Ainslie et al. 2023 (GQA); DeepSeek-V2.
"""

import contextlib
import copy
import io
import math
import os
import sys
import time
from collections import namedtuple
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from sklearn.metrics import classification_report
from torch import Generator, Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    d_model: int = 64  # numbers that stand for one token
    n_head: int = 8  # query heads, of d_model / n_head numbers each
    n_kv_head: tuple[int, ...] = (8, 2, 1)  # key/value heads of MHA, GQA and MQA
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
    study: bool = False  # also go on from the trained MHA, converted to GQA and MQA

    def __post_init__(self) -> None:
        limits = {
            "d_model": (1, 16384), "n_head": (1, 256), "n_kv_head": (1, 256), "seq_len": (2, 128),
            "kv_latent": (1, 16384), "lookups": (1, 3), "steps": (1, 10_000_000),
            "batch_size": (1, 1_000_000), "lr": (1e-9, math.inf), "weight_decay": (0, math.inf),
            "seed": (0, 2**32 - 1), "seeds": (1, 1000),
        }  # fmt: skip
        check_fields(self, limits)
        n, c = self.n_kv_head, self.kv_latent
        if not n or len(set(n)) < len(n) or any(self.n_head % divisor for divisor in n):
            raise UserError(f"n_kv_head is {n}: give different divisors of n_head = {self.n_head}")
        if len(set(c)) < len(c):
            raise UserError(f"kv_latent is {c}: give different numbers")
        if self.d_model % self.n_head != 0:
            raise UserError(f"d_model is {self.d_model}: no multiple of n_head = {self.n_head}")
        if self.study and self.n_head not in n:
            raise UserError(f"study is on: n_kv_head must hold n_head = {self.n_head}, for MHA")


# ----------------------------------------- attention ------------------------------------------ #
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v, where a key/value head may serve a group of query heads.

    By definition it is repeated, two heads for four query heads as [K1, K1, K2, K2]:

        k = k.repeat_interleave(n_head // n_kv_head, 1)
        v = v.repeat_interleave(n_head // n_kv_head, 1)

    Here the queries of a group are laid one below the other instead and meet K1 in one product: the
    same numbers, and k and v are not copied. The mask is True where a query may attend, one token
    at least, for a row of only -inf becomes NaN; `scale` is 1 / sqrt(d) if it is not given.
    Shapes: q (B, n_head, T, d), k, v (B, n_kv_head, S, d), mask broadcastable to (B, n_head, T, S)
        -> output (B, n_head, T, d), weights (B, n_head, T, S); ValueError if heads do not divide
    """
    B, n_head, T, d = q.shape
    n_kv_head, S = k.shape[1:3]
    if n_head % n_kv_head != 0:
        raise ValueError(f"{n_head} query heads cannot share {n_kv_head} key/value heads evenly")
    q = q / math.sqrt(d) if scale is None else q * scale
    q = q.reshape(B, n_kv_head, -1, d)  # (B, n_kv_head, group T, d)
    scores = (q @ k.mT).view(B, n_head, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    exp = torch.exp(scores - scores.detach().amax(-1, keepdim=True))  # at most 1: no overflow
    weights = exp / exp.sum(-1, keepdim=True)  # softmax (B, n_head, T, S): each row adds up to 1
    output = weights.view(B, n_kv_head, -1, S) @ v  # (B, n_kv_head, group T, d)
    return output.view(B, n_head, T, d), weights


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """Cut each token's row into heads: (B, T, n_head d) -> (B, n_head, T, d).

    Four tokens, two heads of one number each: a0 b0 | a1 b1 | a2 b2 | a3 b3 become a0 a1 a2 a3 and
    b0 b1 b2 b3. x.view(B, n_head, T, d) has the same shape, but its first head would be a0 b0 a1
    b1: both heads of two tokens, and nothing of the rest.
    """
    B, T, _ = x.shape
    return x.view(B, T, n_head, -1).transpose(1, 2)


class KVCache:
    """Keys and values, or MLA's c, of up to max_len tokens, in memory that is allocated once."""

    def __init__(self, max_len: int) -> None:
        self.max_len, self.length, self.memory = max_len, 0, []

    def append(self, *new: Tensor) -> list[Tensor]:
        """Add tensors (..., T, numbers); returns all that is held."""
        end = self.length + new[0].shape[-2]
        if not self.memory:  # the first token allocates it all
            self.memory = [x.new_zeros(*x.shape[:-2], self.max_len, x.shape[-1]) for x in new]
        for memory, x in zip(self.memory, new, strict=True):
            memory.narrow(-2, self.length, x.shape[-2]).copy_(x)  # an error beyond max_len
        self.length = end
        return [memory[..., :end, :] for memory in self.memory]


class GroupedQueryAttention(nn.Module):
    """Multi-head (n_kv_head = n_head), multi-query (1) and grouped-query attention (between them).

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
        return q, k, split_heads(self.v_proj(x), self.n_kv_head)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> tuple:
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_kv_head, S, d)
        output, weights = attention(q, k, v, mask)
        return self.o_proj(output.transpose(1, 2).flatten(2)), weights  # heads side by side again


class MultiHeadLatentAttention(nn.Module):
    """MLA: kv_latent numbers c of a token are cached; each head makes its key and value from them.

    DeepSeek-V2 (arXiv 2405.04434), section 2.1.2, equations 9 to 11; it caches a rotary key as well
    (512 + 64 numbers) and compresses queries too. Shapes as in GroupedQueryAttention.
    """

    def __init__(self, d_model: int, n_head: int, kv_latent: int, head_dim: int) -> None:
        super().__init__()
        self.n_head, self.kv_latent, self.head_dim = n_head, kv_latent, head_dim
        self.q_proj = nn.Linear(d_model, n_head * head_dim, bias=False)
        self.kv_down = nn.Linear(d_model, kv_latent, bias=False)  # W_DKV
        self.k_up = nn.Linear(kv_latent, n_head * head_dim, bias=False)  # W_UK
        self.v_up = nn.Linear(kv_latent, n_head * head_dim, bias=False)  # W_UV
        self.o_proj = nn.Linear(n_head * head_dim, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> tuple:
        q, c = split_heads(self.q_proj(x), self.n_head), self.kv_down(x)  # c: (B, T, kv_latent)
        if cache is None:
            k, v = split_heads(self.k_up(c), self.n_head), split_heads(self.v_up(c), self.n_head)
            output, weights = attention(q, k, v, mask)
        else:  # make no keys: q . (W_UK c) = (W_UK^T q) . c, which is MQA with one wide head, c
            (c,) = cache.append(c)  # (B, S, kv_latent)
            W_UK = self.k_up.weight.view(self.n_head, self.head_dim, -1)  # (n_head, d, kv_latent)
            W_UV = self.v_up.weight.view(self.n_head, self.head_dim, -1)
            output, weights = attention(q @ W_UK, c[:, None], c[:, None], mask, self.head_dim**-0.5)
            output = output @ W_UV.mT  # (B, n_head, T, d)
        return self.o_proj(output.transpose(1, 2).flatten(2)), weights  # heads side by side again


def variant_names(config: Config) -> list[str]:
    """MHA, GQA-2, MQA, MLA-32, and MHA-2: as few heads as GQA-2 caches, but unshared."""
    names = [{1: "MQA", config.n_head: "MHA"}.get(n, f"GQA-{n}") for n in config.n_kv_head]
    few = [f"MHA-{n}" for n in config.n_kv_head if 1 < n < config.n_head]
    return names + [f"MLA-{numbers}" for numbers in config.kv_latent] + few


def make_attention(name: str, config: Config) -> nn.Module:
    """The module called MHA, GQA-2 (key/value heads), MQA, MLA-32 (cached) or MHA-2 (two heads)."""
    C, n_head, d = config.d_model, config.n_head, config.d_model // config.n_head
    kind, _, number = name.partition("-")
    if kind == "MLA":
        return MultiHeadLatentAttention(C, n_head, int(number), d)
    if kind == "MHA":
        return GroupedQueryAttention(C, int(number or n_head), int(number or n_head), d)
    return GroupedQueryAttention(C, n_head, int(number or 1), d)


# -------------------------------------------- task -------------------------------------------- #
# N sequences of T tokens with L lookups each. names (N, L, T): each token's name in each of L
# alphabets, a permutation of 0 .. T - 1; wanted (N, L, T): the names that each token looks for;
# digit (N, T): 0 .. 9; where (N, L, T): the answer key, the tokens of those names; label (N, T):
# the sum of FACTORS times the digits found, mod 10. All are int64.
Sequences = namedtuple("Sequences", "names wanted digit where label")
FACTORS = (1, 3, 7)  # with inverses modulo 10, so each digit can move the label to any value


def draw_sequences(n: int, config: Config, stream: Generator) -> Sequences:
    """Draw n sequences on the stream's device. What a token wants stands before it.

    Three tokens, two lookups. Token 2 wants    token     0  1  2
    1 in A (token 0: 7) and 2 in B (token 1:    names, A  1  0  2    wanted, A  1  1  1
    5); its label is 1 * 7 + 3 * 5 = 2 mod 10.  names, B  0  2  1    wanted, B  0  0  2
    The first token, with nobody before it,     digit     7  5  8
    wants itself, and token 1 the first one.
    """
    T, L, device = config.seq_len, config.lookups, stream.device
    names = torch.rand(n, L, T, generator=stream, device=device).argsort(2)
    digit = torch.randint(10, (n, T), generator=stream, device=device)
    token = torch.arange(T, device=device)
    where = (torch.rand(n, L, T, generator=stream, device=device) * token).long()  # 0 .. t - 1
    found = digit[:, None].expand(n, L, T).gather(2, where)  # (N, L, T)
    label = sum(factor * found[:, i] for i, factor in enumerate(FACTORS[:L])) % 10  # (N, T)
    return Sequences(names, names.gather(2, where), digit, where, label)


class LookupNet(nn.Module):
    """Embed, attend once, work out the label: Sequences -> logits (N, T, 10) and the weights."""

    def __init__(self, attention: nn.Module, config: Config) -> None:
        super().__init__()
        C, T, L = config.d_model, config.seq_len, config.lookups
        self.name = nn.ModuleList(nn.Embedding(T, C) for _ in range(L))
        self.wanted = nn.ModuleList(nn.Embedding(T, C) for _ in range(L))
        self.digit = nn.Embedding(10, C)
        self.attention = attention
        layers = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, 10)
        self.mlp = nn.Sequential(*layers)  # on the attention's output alone: no residual
        self.register_buffer("causal", torch.ones(T, T, dtype=torch.bool).tril())  # t sees 0 .. t

    def embed(self, data: Sequences) -> Tensor:
        x = self.digit(data.digit)  # (N, T, C); no position: where a token stands tells nothing
        for i in range(len(self.name)):
            x = x + self.name[i](data.names[:, i]) + self.wanted[i](data.wanted[:, i])
        return x

    def forward(self, data: Sequences, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        start = 0 if cache is None else cache.length
        end = start + data.digit.shape[1]
        mask = self.causal[start:end, :end]  # (T, S); for one more token all True
        y, weights = self.attention(self.embed(data), mask, cache)
        return self.mlp(y), weights


# ------------------------------------------ training ------------------------------------------ #
Validation = namedtuple("Validation", "step val_loss val_accuracy seconds")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear up to `peak` over the first fifth of the steps, then linear down towards zero."""
    return peak * min(1.0, (step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))


def learn(net: LookupNet, config: Config, stream: Generator, adamw: AdamW, steps: range) -> Tensor:
    """Gradient steps on sequences that the stream draws; returns each step's loss, (steps,)."""
    net.train()
    losses = []  # kept on the device: to look at one, the CPU would wait for the GPU in every step
    for step in tqdm(steps, f"steps to {steps.stop}", leave=False, disable=None):
        adamw.param_groups[0]["lr"] = learning_rate(step, config.steps, config.lr)
        batch = draw_sequences(config.batch_size, config, stream)
        logits, _ = net(batch)  # (B, T, 10)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.label.flatten())
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()  # here the CPU waits for the GPU


def train(net: LookupNet, config: Config, validation: Sequences, stream: Generator) -> list:
    """Fit `net` with AdamW, validate every 15th of the steps, load the best; Ctrl-C ends it."""
    adamw = AdamW(net.parameters(), weight_decay=config.weight_decay, fused=True)  # lr: each step
    every, history, best, start = max(1, config.steps // 15), [], (-1.0, 0.0), time.perf_counter()
    print(" step  train loss  val loss  val accuracy         lr  seconds")
    for done in range(0, config.steps, every):
        end = min(done + every, config.steps)
        try:
            losses = learn(net, config, stream, adamw, range(done, end))
            logits, _ = predict(net, validation)
        except KeyboardInterrupt:
            break
        val_loss = F.cross_entropy(logits.flatten(0, 1), validation.label.flatten()).item()
        train_loss = losses.mean().item()
        val_accuracy = (logits.argmax(2) == validation.label).float().mean().item()
        if not math.isfinite(train_loss + val_loss):
            step = done + losses.isfinite().sum()
            raise UserError(f"loss NaN or infinite after step {step}: lower lr")
        if (val_accuracy, -val_loss) > best:  # among equals the lower loss
            best, weights = (val_accuracy, -val_loss), copy.deepcopy(net.state_dict())
        history.append(Validation(end, val_loss, val_accuracy, time.perf_counter() - start))
        row = f"{end:5d}  {train_loss:10.4f}  {val_loss:8.4f}  {val_accuracy:12.4f}  "
        print(f"{row}{adamw.param_groups[0]['lr']:9.2e}  {history[-1].seconds:7.1f}")
    if history:
        net.load_state_dict(weights)
    return history


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
    """Accuracy and macro averages (means over the classes) of all predictions (N,) at once."""
    labels, predictions = labels.numpy(force=True), predictions.numpy(force=True)
    C = len(class_names)
    matrix = np.zeros((C, C), dtype=int)
    np.add.at(matrix, (labels, predictions), 1)  # rows: true class; columns: predicted class
    right, predicted, true = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)  # (C,) each
    accuracy = right.sum() / matrix.sum()
    precision = right / predicted.clip(min=1)  # of all that was called c, the share that is c
    recall = right / true.clip(min=1)  # of all that is c, the share that was found
    f1 = 2 * right / (predicted + true).clip(min=1)  # = 2 P R / (P + R); 0/0 counts as 0
    return {
        "accuracy": float(accuracy), "precision": float(precision.mean()),
        "recall": float(recall.mean()), "f1": float(f1.mean()), "confusion_matrix": matrix,
        "report": classification_report(labels, predictions, labels=range(C), digits=4,
                                        target_names=class_names, zero_division=0),
    }  # fmt: skip


def main(config: Config, draw: bool = True) -> dict[str, dict]:
    """Train, score, print and draw every variant; returns each one's results by its name."""
    device, results, note = pick_device(config.device), {}, ""
    check_writable(config.images_dir / "part3")  # now, not after minutes of training
    stream = Generator(device).manual_seed(config.seed)
    test, validation = (draw_sequences(n, config, stream) for n in (2000, 1000))
    for name in variant_names(config):
        torch.manual_seed(config.seed)
        net = LookupNet(make_attention(name, config), config).to(device)
        print(f"\n{name}: {cached_numbers(net)} numbers cached for a token; device {device}")
        history = train(net, config, validation, stream.clone_state())  # the same draws for each
        if history:
            logits, weights = predict(net, test)  # once: nothing is chosen by it
            results[name] = score(test.label.flatten(), logits.argmax(2).flatten(), DIGITS)
            results[name] |= {
                "dataset": f"{config.lookups} lookups", "train_seconds": history[-1].seconds,
                "steps_to_99": next((v.step for v in history if v.val_accuracy >= 0.99), math.nan),
                "epochs_run": 1, "history": history, "net": net, "weights": weights,
                "alignment": alignment(weights, test).amax(1).tolist(),  # of the best heads
                "decode_difference": (decode(net, test) - logits).abs().max().item(),
            }  # fmt: skip
        if not history or history[-1].step < config.steps:
            note = f", stopped in {name}"
            break
    if results:
        print_tables(results, note)
    if draw and results:
        draw_figures(results, test, config, note)
    if note:
        raise KeyboardInterrupt  # what was trained is scored and drawn
    if config.seeds > 1:
        repeat(config, results)
    if config.study:
        study(config, results)
    return results


# ============= The lesson ends here. Below: figures, the study, devices, errors. ============== #


def cached_numbers(net: LookupNet) -> int:
    """How many numbers its attention keeps of one token."""
    cache, weight = KVCache(max_len=1), net.attention.q_proj.weight
    net.attention(weight.new_zeros(1, 1, weight.shape[1]), None, cache)
    return sum(memory.numel() for memory in cache.memory)


def alignment(weights: Tensor, data: Sequences) -> Tensor:
    """(L, n_head): how often the largest of weights (N, n_head, T, T) is on the right token."""
    return (weights.argmax(3)[:, None] == data.where[:, :, None]).float().mean((0, 3))


def print_tables(results: dict[str, dict], note: str) -> None:
    """Each variant's scores by class, then one row for each variant."""
    for name, row in results.items():
        print(f"\n{name}, test sequences{note}\n{row['report']}")
    print("variant  cached  accuracy  precision  recall      f1  to 99 %  seconds  alignment")
    for name, row in results.items():
        scores = "{accuracy:8.4f}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}".format(**row)
        scores = f"{cached_numbers(row['net']):6}  {scores}  {row['steps_to_99']:7.0f}"
        print(f"{name:7}  {scores}  {row['train_seconds']:7.1f} ", *np.round(row["alignment"], 2))
    worst = max(row["decode_difference"] for row in results.values())
    print(f"token by token from the cache, all logits are within {worst:.0e} of these")


def draw_figures(results: dict[str, dict], test: Sequences, config: Config, note: str) -> None:
    """Draw every figure; the decoding steps are timed here, and only here."""
    scores = ", ".join(f"{name} {row['accuracy']:.2%}" for name, row in results.items())
    title = f"{config.lookups} lookups among {config.seq_len} tokens{note}\ntest accuracy: {scores}"
    worst, row = min(results.items(), key=lambda item: item[1]["accuracy"])
    figures = {
        "attention_heatmaps": heatmap_figure(results, test, title),
        "confusion_matrix": confusion_figure(row["confusion_matrix"], DIGITS, f"{title}\n{worst}"),
        "cache_tradeoff": tradeoff_figure([results], title),
        "decode": decode_figure(list(results), config, test.digit.device),
        "qkv": qkv_figure(results, test),
    }
    for name, figure in figures.items():
        save_figure(figure, config.images_dir / f"part3_{name}.png")


def new_figure(title: str, size: tuple[float, float], *grid: int, **more: object) -> tuple:
    """A figure and its axes; `grid` is rows and columns, `size` is in inches of 100 pixels."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(*grid, **more)


def confusion_figure(matrix: np.ndarray, class_names: list[str], title: str) -> Figure:
    """Counts and row percentages of a confusion matrix; rows true, columns predicted."""
    figure, axes = new_figure(title, (9, 8.5))
    share = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    scale = PowerNorm(0.4, vmin=0, vmax=1)  # tells 0.1 % from 1 %
    axes.imshow(share, cmap="magma_r", norm=scale)
    for (true, said), count in np.ndenumerate(matrix):
        text = f"{count}\n{share[true, said]:.1%}" if count else ""
        grey = "white" if scale(share[true, said]) > 0.5 else "black"
        axes.text(said, true, text, ha="center", va="center", fontsize=9, color=grey)
    axes.set_xticks(range(len(matrix)), class_names, rotation=45 * (max(map(len, class_names)) > 3))
    axes.set(xlabel="predicted", ylabel="true", yticks=range(len(matrix)), yticklabels=class_names)
    return figure


def heatmap_figure(results: dict[str, dict], test: Sequences, title: str) -> Figure:
    """For each lookup the truth, and the best head of each variant, on one sequence."""
    _, L, T = test.where.shape
    chance = np.mean([1 / max(t, 1) for t in range(T)])  # token t has t tokens before it
    title += (
        f"\nrow: the token that asks, column: the one it looks at; right by chance: {chance:.0%}"
    )
    figure, grid = new_figure(title, (10, 1.2 + 2 * L), L, 1 + len(results), squeeze=False)
    for i, axes in enumerate(grid):
        axes[0].imshow(F.one_hot(test.where[0, i], T).numpy(force=True))
        axes[0].set(title=f"lookup {i + 1}: truth", xticks=[], yticks=[])
        for right, (name, row) in zip(axes[1:], results.items(), strict=True):
            share, head = alignment(row["weights"], test)[i].max(0)
            right.imshow(row["weights"][0, head].numpy(force=True), vmin=0, vmax=1)
            right.set(title=f"{name}, head {head}\n{share:.0%} right", xticks=[], yticks=[])
    return figure


def tradeoff_figure(runs: list[dict[str, dict]], title: str) -> Figure:
    """Accuracy of every seed over the numbers cached, and its way there by step."""
    figure, (left, right) = new_figure(title, (10, 4.6), 1, 2)
    for i, name in enumerate(runs[0]):
        rows = [run[name] for run in runs]
        x, y = cached_numbers(rows[0]["net"]), [100 * row["accuracy"] for row in rows]
        left.plot([x] * len(rows), y, f"oC{i}", alpha=0.6)
        left.annotate(name, (x, y[0]), (7, -6 * i), textcoords="offset points", color=f"C{i}")
        steps = [row["steps_to_99"] for row in rows]
        mean = "not always" if np.isnan(steps).any() else f"{np.mean(steps):,.0f}"
        label = f"{name}: {'never' if np.isnan(steps).all() else mean}"
        for row in rows:
            step, _, val_accuracy, _ = np.array(row["history"]).T
            right.plot(step, 100 * val_accuracy, f".-C{i}", label=label if row is rows[0] else None)
    left.set(xlabel="numbers cached a token", ylabel="test accuracy (%)", xmargin=0.2, ymargin=0.2)
    right.set(xlabel="step", ylabel="validation accuracy (%)")
    figure.legend(loc="outside lower center", ncols=5, title="99 % after steps (mean)")
    return figure


@torch.no_grad()
def decode_figure(names: list[str], config: Config, device: torch.device) -> Figure:
    """Time of one more token by context, projections included: heads of 64 numbers, batch 4."""
    title = f"One decoding step: batch 4, {config.n_head} heads of 64, float32, {device}"
    figure, axes = new_figure(title, (10, 5))
    wide, longest = replace(config, d_model=64 * config.n_head), min(8192, 2**18 // config.n_head)
    for name in names:
        if name.startswith("MLA"):
            name = f"MLA-{math.ceil(int(name[4:]) * wide.d_model / config.d_model)}"
        module, x = (
            make_attention(name, wide).to(device),
            torch.randn(4, 1, wide.d_model).to(device),
        )
        contexts, milliseconds = [longest // n for n in (16, 8, 4, 2, 1)], []
        for context in contexts:
            cache, times = KVCache(context), []
            for _ in range(12):
                start = time.perf_counter()
                module(x, None, cache)[0].sum().item()  # .item() waits until the device is done
                times.append(1e3 * (time.perf_counter() - start))
                cache.length = context - 1  # as if all tokens but the last were there
            milliseconds.append(np.median(times[2:]))  # the first two warm up
        size = sum(memory.nbytes for memory in cache.memory) // 2**20
        axes.plot(
            contexts, milliseconds, "o-", label=f"{name}: {size} MiB, {milliseconds[-1]:.1f} ms"
        )
    axes.set(xlabel="tokens in the cache", ylabel="milliseconds", yscale="log")
    axes.legend(title=f"{longest:,} tokens: cache, time of a step")
    return figure


@torch.no_grad()
def qkv_figure(results: dict[str, dict], test: Sequences) -> Figure:
    """The first variant's best head for the first lookup, on one sequence, with its numbers."""
    name, row = next(iter(results.items()))
    net, head = row["net"], int(alignment(row["weights"], test)[0].argmax())
    q, k, v = net.attention.heads(net.embed(Sequences(*(field[:1] for field in test))))
    output, weights = attention(q, k, v, net.causal)
    kv = head * k.shape[1] // q.shape[1]
    scores = q[0, head] @ k[0, kv].T / math.sqrt(q.shape[3])  # (T, T)
    panels = {
        "Q: what each token wants": q[0, head], "K: what each token is called": k[0, kv],
        "V: what each token has to give": v[0, kv],
        "scores = Q K^T / sqrt(d), causal": scores.masked_fill(~net.causal, math.nan),
        "weights = softmax of each row": weights[0, head], "output = weights V": output[0, head],
    }  # fmt: skip
    figure, grid = new_figure(f"{name}, head {head}, one test sequence", (12, 8), 2, 3)
    for axes, (heading, matrix) in zip(grid.flat, panels.items(), strict=True):
        matrix = matrix[:12, :12].numpy(force=True)  # as much as can be read
        limit = 1.4 * np.nanmax(np.abs(matrix))  # black text is readable on all of it
        axes.imshow(matrix, aspect="auto", cmap="coolwarm", vmin=-limit, vmax=limit)
        for (i, j), value in np.ndenumerate(matrix):
            if not math.isnan(value):
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=11)
        across = "token looked at" if heading[0] in "sw" else "dimension"
        axes.set(title=heading, ylabel="token", xlabel=across)
    return figure


def repeat(config: Config, first: dict[str, dict]) -> None:
    """Run `main` with the next seeds too; print and draw each variant's scores by seed."""
    runs, once = [first], replace(config, seeds=1, study=False)
    try:
        for seed in range(config.seed + 1, config.seed + config.seeds):
            runs.append(main(replace(once, seed=seed % 2**32), draw=False))
    finally:  # what is finished is told even if a later run is not
        print(f"\ntest sequences, {len(runs)} seeds from {config.seed}: mean +- std (each)")
        for name, row in first.items():
            row["runs"] = [run[name] for run in runs]
            for key, unit in (("accuracy", 100), ("f1", 100), ("steps_to_99", 1)):
                x = unit * np.array([run[key] for run in row["runs"]])
                each = ", ".join(f"{value:.{2 * (unit > 1)}f}" for value in x)
                print(f"{name:6} {key:11} {x.mean():.2f} +- {x.std(ddof=len(x) > 1):.2f} ({each})")
    figure = tradeoff_figure(runs, f"{config.lookups} lookups, {len(runs)} seeds")
    save_figure(figure, config.images_dir / "part3_cache_tradeoff.png")


def pool_heads(state: dict[str, Tensor], n_kv_head: int, head_dim: int) -> dict[str, Tensor]:
    """Each key/value head becomes the mean of those it replaces (Ainslie 2023, section 2.1)."""
    pooled = dict(state)
    for name in ("attention.k_proj.weight", "attention.v_proj.weight"):
        heads = state[name].unflatten(0, (n_kv_head, -1, head_dim))  # (n_kv_head, group, d, C)
        pooled[name] = heads.mean(1).flatten(0, 1)
    return pooled


def study(config: Config, results: dict[str, dict]) -> None:
    """From MHA to GQA and MQA by pooling, beside a new start: accuracy after further steps."""
    shares, runs = (0, 5, 10, 20, 40), results["MHA"].get("runs", [results["MHA"]])
    figure, axes = new_figure(f"From MHA by pooling key/value heads, {len(runs)} seeds", (10, 4.6))
    print("\nfrom MHA; steps, %  " + "".join(f"{share:8}" for share in shares))
    divisors = [n for n in range(config.n_head - 1, 0, -1) if config.n_head % n == 0]
    for n, way in ((n, way) for n in divisors for way in ("pooled", "from scratch")):
        name = f"GQA-{n}" if n > 1 else "MQA"
        table = np.zeros((len(runs), len(shares)))  # accuracies in %
        for i, j in np.ndindex(table.shape):
            mha = runs[i]["net"]
            stream = Generator(mha.causal.device).manual_seed(config.seed + i)
            _, validation = (draw_sequences(n, config, stream) for n in (2000, 1000))
            torch.manual_seed(config.seed + i)
            net = LookupNet(make_attention(name, config), config).to(stream.device)
            if way == "pooled":
                net.load_state_dict(pool_heads(mha.state_dict(), n, mha.attention.head_dim))
            if shares[j] > 0:
                shorter = replace(config, steps=max(1, config.steps * shares[j] // 100))
                with contextlib.redirect_stdout(None):  # no rows
                    history = train(net, shorter, validation, stream)
                if not history or history[-1].step < shorter.steps:
                    raise KeyboardInterrupt
            answers = predict(net, validation)[0].argmax(2)
            table[i, j] = 100 * (answers == validation.label).float().mean()
        print(f"{name:5} {way:14}" + "".join(f"{value:8.2f}" for value in table.mean(0)))
        axes.plot(shares, table.mean(0), "o-" if way == "pooled" else "o--", label=f"{name} {way}")
    axes.set(xlabel="further training (% of the steps)", ylabel="validation accuracy (%)")
    axes.legend()
    save_figure(figure, config.images_dir / "part3_study_from_mha.png")


DIGITS = list("0123456789")
# The rest is the same in all three parts: see test_standalone.


class UserError(ValueError):
    """Something the user can mend: shown as one line, without a traceback."""


def check_fields(config: object, limits: dict[str, tuple[float, float]]) -> None:
    """Raise UserError for a value not of its field's type, or a number not within its limits."""
    every = CollectionCheckStrategy.ALL_ITEMS
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if "Path" in str(field.type) and isinstance(value, str | Path):  # a string will do
            object.__setattr__(config, name, value := Path(value).expanduser())
        try:
            check_type(value, field.type, collection_check_strategy=every)
        except TypeCheckError as error:
            raise UserError(f"{name} is {value!r}, but that {error}") from None
        low, high = limits.get(name, (-math.inf, math.inf))
        if name in limits and not all(low <= n <= high for n in np.ravel(value)):  # as NaN is not
            raise UserError(f"{name} is {value}: it must be from {low} to {high}")


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name, then rename it: nobody ever meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    return temporary.replace(path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG, and say where."""
    figure.savefig(png := io.BytesIO(), format="png", dpi=100)
    print(f"drew {write_whole(path, png.getvalue())}")


def check_writable(*paths: Path | None) -> None:
    """Raise UserError if a file could not be written at one of the paths."""
    for path in filter(None, paths):
        try:
            write_whole(path.with_name(f"{path.name}.try"), b"").unlink(missing_ok=True)
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): choose another") from None


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto is the accelerator that is there (CUDA, MPS), else the CPU."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name not in ("auto", "cpu", there and there.type):
        raise UserError(f"device {name} is not available here; use --device cpu or auto")
    return torch.device("cpu") if name == "cpu" or there is None else there


def command_line() -> None:
    """Run `main` with the flags given; what a user can cause ends in one line, not a traceback."""
    try:
        Config()  # a default that was edited into something impossible is told first
        main(tyro.cli(Config))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit(f"{Path(__file__).name}: out of memory: try a smaller --batch-size, or net")


if __name__ == "__main__":
    command_line()
