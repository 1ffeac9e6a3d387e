"""Multi-head, grouped-query, multi-query and latent attention by hand, and what each one costs.

    attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V             (Vaswani et al. 2017, equation 1)

A model that writes keeps the keys and values of all earlier tokens: the KV cache. Every query
head has a key/value head of its own (MHA), shares one with its group (GQA) or with all others
(MQA), or makes its own from a few cached numbers (MLA). How is a cache spent best?

    python part3_attention.py    # train and score every variant, draw; --help has every setting

Expect 100 % but of MQA 1x4 and MHA 8x1, in three minutes on a CPU. The lesson ends with `main`.
References: Vaswani et al. 2017 (MHA); Shazeer 2019; Ainslie et al. 2023; DeepSeek-V2 2024 (MLA).
"""

import copy
import math
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from sklearn.metrics import classification_report, confusion_matrix
from torch import Generator, Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm

CHECKS = {"validate_default": True, "allow_inf_nan": False, "extra": "forbid"}
FACTORS = (1, 2, 3)  # of the three digits that a token finds
MODULUS = 11  # a prime, so no sum of factors cancels a digit that is found twice
CLASS_NAMES = [str(label) for label in range(MODULUS)]
ROW = "{step:5}  {train_loss:10.4f}  {val_loss:8.4f}  {val_accuracy:12.4f}  {seconds:7.1f}"


@dataclass(frozen=True, config=CHECKS)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    d_model: PositiveInt = 64  # numbers that stand for one token
    n_head: PositiveInt = 8  # query heads
    n_kv_head: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (8, 2, 1)  # 8: MHA, 1: MQA
    head_dim: PositiveInt = 4  # numbers in a query, and in a key
    value_dim: PositiveInt = 4  # numbers in a value
    cache: tuple[PositiveInt, ...] = (16,)  # numbers for a token, to be spent in every way
    lookups: Literal[1, 2, 3] = 3  # tokens that each token has to find
    seq_len: Annotated[int, Field(ge=2)] = 10  # tokens in a sequence
    steps: PositiveInt = 3000  # gradient steps for each variant
    batch_size: PositiveInt = 128  # sequences in one gradient step, drawn fresh each time
    lr: PositiveFloat = 6e-3  # peak learning rate: it rises to this, then falls to zero
    weight_decay: NonNegativeFloat = 0.01  # AdamW's pull of the weights towards zero
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of the sequences and the weights
    seeds: PositiveInt = 1  # runs of the command line, with seed, seed + 1, ...
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, MPS or CPU
    images_dir: Path = Path("images")  # where the figures go

    def __post_init__(self) -> None:
        for n in self.n_kv_head:
            if self.n_head % n != 0:
                raise UserError(f"n_head is {self.n_head}: n_kv_head {n} does not divide it")
            if any(numbers % (2 * n) for numbers in self.cache):
                raise UserError(f"cache is {self.cache}: not all are multiples of {2 * n}")


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v, where a key/value head may serve a group of query heads.

    By definition it is repeated, two heads for four query heads as [K1, K1, K2, K2]:

        k = k.repeat_interleave(n_head // n_kv_head, 1)
        v = v.repeat_interleave(n_head // n_kv_head, 1)

    Here the queries of a group are laid one below the other instead and meet K1 in one product:
    the same numbers, and k and v are not copied. The mask is True where a query may attend; one
    that may attend to nothing gets zeros. `scale` is 1 / sqrt(d) if it is not given.
    Shapes: q (B, n_head, T, d), k (B, n_kv_head, S, d), v (B, n_kv_head, S, d_v), mask to be
        broadcast to (B, n_head, T, S) -> output (B, n_head, T, d_v), weights (B, n_head, T, S)
    """
    B, n_head, T, d = q.shape
    n_kv_head, S = k.shape[1:3]
    if n_head % n_kv_head != 0:
        raise ValueError(f"{n_head} query heads cannot share {n_kv_head} key/value heads evenly")
    group = n_head // n_kv_head
    precise = torch.promote_types(q.dtype, torch.float32)  # bfloat16 scores would be too coarse
    q = q.to(precise).reshape(B, n_kv_head, group * T, d)
    q = q / math.sqrt(d) if scale is None else q * scale
    scores = (q @ k.to(precise).mT).view(B, n_head, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    # softmax: without the row's largest score, which changes nothing, no exponential overflows
    largest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(precise).min)
    exp = torch.exp(scores - largest)
    weights = exp / exp.sum(-1, keepdim=True).clamp(min=0.5)  # 1 or more; 0 if all is masked
    output = weights.to(v.dtype).view(B, n_kv_head, group * T, S) @ v
    return output.view(B, n_head, T, v.shape[-1]), weights


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """Cut each token's row into heads: (B, T, n_head d) -> (B, n_head, T, d).

    Four tokens, two heads of one number each: a0 b0 | a1 b1 | a2 b2 | a3 b3 become a0 a1 a2 a3 and
    b0 b1 b2 b3. x.view(B, n_head, T, d) has the same shape, but its first head would be a0 b0 a1
    b1: both heads of two tokens, and nothing of the rest.
    """
    B, T, C = x.shape
    return x.view(B, T, n_head, C // n_head).transpose(1, 2)


def causal_mask(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """(T, S), True for what a query may see: no later token, and only where `mask` is True."""
    earlier = k.shape[2] - q.shape[2]  # tokens before the first query
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(earlier)
    return causal if mask is None else causal & mask


class KVCache:
    """Keys and values, or MLA's c, of up to max_len tokens, in memory allocated once."""

    def __init__(self, max_len: int) -> None:
        self.max_len = max_len
        self.length = 0  # tokens held
        self.memory = []

    def append(self, *new: Tensor) -> list[Tensor]:
        """Add tensors (..., T, numbers); returns all that is held. ValueError if it is full."""
        end = self.length + new[0].shape[-2]
        if end > self.max_len:
            raise ValueError(f"the cache is full: it holds {self.max_len} tokens")
        if not self.memory:  # the first tokens allocate it all
            self.memory = [x.new_zeros(*x.shape[:-2], self.max_len, x.shape[-1]) for x in new]
        for memory, x in zip(self.memory, new, strict=True):
            memory[..., self.length : end, :] = x
        self.length = end
        return [memory[..., :end, :] for memory in self.memory]


class GroupedQueryAttention(nn.Module):
    """Multi-head (n_kv_head = n_head), multi-query (1), grouped-query attention (in between).

    Causal; `mask` hides more. x (B, T, d_model) -> y (B, T, d_model), weights (B, n_head, T, S)
    """

    def __init__(
        self, d_model: int, n_head: int, n_kv_head: int, head_dim: int, value_dim: int
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.cached = n_kv_head * (head_dim + value_dim)  # numbers for a token
        self.way = f"key/value heads: {n_kv_head}"
        self.q_proj = nn.Linear(d_model, n_head * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_head * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_head * value_dim, bias=False)
        self.o_proj = nn.Linear(n_head * value_dim, d_model, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = split_heads(self.q_proj(x), self.n_head)  # (B, n_head, T, d)
        k = split_heads(self.k_proj(x), self.n_kv_head)  # (B, n_kv_head, T, d)
        v = split_heads(self.v_proj(x), self.n_kv_head)  # (B, n_kv_head, T, d_v)
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> tuple:
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_kv_head, S, d), S tokens so far
        output, weights = attention(q, k, v, causal_mask(q, k, mask))
        return self.o_proj(output.transpose(1, 2).flatten(2)), weights  # heads side by side again


class MultiHeadLatentAttention(nn.Module):
    """MLA: `latent` numbers c of a token are cached; each head makes a key and value of them.

    DeepSeek-V2, section 2.1.2, equations 9 to 11; it caches a rotary key as well (512 + 64
    numbers) and compresses queries too. Mask and shapes as in GroupedQueryAttention.
    """

    def __init__(
        self, d_model: int, n_head: int, latent: int, head_dim: int, value_dim: int
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self.cached = latent  # numbers for a token
        self.way = "latent"
        self.q_proj = nn.Linear(d_model, n_head * head_dim, bias=False)
        self.kv_down = nn.Linear(d_model, latent, bias=False)  # W_DKV
        self.k_up = nn.Linear(latent, n_head * head_dim, bias=False)  # W_UK
        self.v_up = nn.Linear(latent, n_head * value_dim, bias=False)  # W_UV
        self.o_proj = nn.Linear(n_head * value_dim, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> tuple:
        q = split_heads(self.q_proj(x), self.n_head)  # (B, n_head, T, d)
        c = self.kv_down(x)  # (B, T, latent)
        if cache is None:
            k = split_heads(self.k_up(c), self.n_head)  # (B, n_head, T, d)
            v = split_heads(self.v_up(c), self.n_head)  # (B, n_head, T, d_v)
            output, weights = attention(q, k, v, causal_mask(q, k, mask))
        else:
            output, weights = self.decode(q, c, mask, cache)
        return self.o_proj(output.transpose(1, 2).flatten(2)), weights  # heads side by side again

    def decode(self, q: Tensor, c: Tensor, mask: Tensor | None, cache: KVCache) -> tuple:
        """No key is made: q . (W_UK c) = (W_UK^T q) . c, which is MQA with one wide head, c."""
        d = q.shape[3]
        (c,) = cache.append(c[:, None])  # (B, 1, S, latent)
        W_UK = self.k_up.weight.view(self.n_head, d, self.cached)  # (n_head, d, latent)
        W_UV = self.v_up.weight.view(self.n_head, -1, self.cached)  # (n_head, d_v, latent)
        mask = causal_mask(q, c, mask)
        output, weights = attention(q @ W_UK, c, c, mask, scale=1 / math.sqrt(d))  # as before
        return output @ W_UV.mT, weights  # (B, n_head, T, d_v)


# ----------------------------------- task ------------------------------------ #
class Sequences(NamedTuple):
    """N sequences of T tokens with L lookups each; all are int64."""

    name: Tensor  # (N, L, T): each token's name in L alphabets, a permutation of 0 .. T - 1
    wanted_name: Tensor  # (N, L, T): the names that each token looks for
    digit: Tensor  # (N, T): 0 .. 9
    wanted_token: Tensor  # (N, L, T): the answer key, the tokens of those names
    label: Tensor  # (N, T): the sum of FACTORS times the digits found, modulo MODULUS


def make_sequences(n: int, config: Config, generator: Generator) -> Sequences:
    """Draw n sequences on the generator's device. What a token wants stands before it.

    Three tokens, two lookups. Token 2 wants    token     0  1  2
    1 in A (token 0: 7) and 2 in B (token 1:    names, A  1  0  2    wanted, A  1  1  1
    5); its label is 1 * 7 + 2 * 5 = 6 mod 11.  names, B  0  2  1    wanted, B  0  0  2
    The first token, with nobody before it,     digit     7  5  8
    wants itself, and token 1 the first one.
    """
    T = config.seq_len
    L = config.lookups
    device = generator.device
    name = torch.rand(n, L, T, generator=generator, device=device).argsort(2)
    digit = torch.randint(10, (n, T), generator=generator, device=device)
    wanted_token = torch.rand(n, L, T, generator=generator, device=device)
    wanted_token = (wanted_token * torch.arange(T, device=device)).long()  # 0 .. t - 1
    found = digit[:, None].expand(n, L, T).gather(2, wanted_token)  # (N, L, T)
    factors = torch.tensor(FACTORS[:L], device=device)
    return Sequences(
        name=name,
        wanted_name=name.gather(2, wanted_token),
        digit=digit,
        wanted_token=wanted_token,
        label=(factors[:, None] * found).sum(1) % MODULUS,
    )


class LookupNet(nn.Module):
    """Embed, attend once, work out the label: Sequences -> logits (N, T, 11), weights."""

    def __init__(self, attention: nn.Module, config: Config) -> None:
        super().__init__()
        C = config.d_model
        T = config.seq_len
        L = config.lookups
        self.name_embedding = nn.ModuleList(nn.Embedding(T, C) for _ in range(L))
        self.wanted_embedding = nn.ModuleList(nn.Embedding(T, C) for _ in range(L))
        self.digit_embedding = nn.Embedding(10, C)
        self.attention = attention
        layers = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, MODULUS)
        self.mlp = nn.Sequential(*layers)  # on the attention's output alone: no residual

    def embed(self, data: Sequences) -> Tensor:
        x = self.digit_embedding(data.digit)  # (N, T, C); where a token stands tells nothing
        for i in range(data.name.shape[1]):
            x = x + self.name_embedding[i](data.name[:, i])
            x = x + self.wanted_embedding[i](data.wanted_name[:, i])
        return x

    def forward(self, data: Sequences, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(self.embed(data), cache=cache)
        return self.mlp(y), weights


# --------------------------------- training ---------------------------------- #
def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear up to `peak` over a fifth of the steps, then linear down to nearly zero."""
    return peak * min(1.0, (step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))


def train_steps(
    net: LookupNet, config: Config, generator: Generator, optimizer: AdamW, steps: range
) -> float:
    """Gradient steps on sequences that the generator draws; returns their mean loss."""
    losses = []  # on the device: to look at one, the CPU would wait for the GPU in every step
    net.train()
    for step in tqdm(steps, f"steps to {steps.stop}", leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.steps, config.lr)
        batch = make_sequences(config.batch_size, config, generator)
        logits, _ = net(batch)  # (B, T, 11)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.label.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()  # here the CPU waits for the GPU


def train(net: LookupNet, config: Config, validation: Sequences, generator: Generator) -> list:
    """Fit `net`, validate every 15th of the steps, load the weights that validated best."""
    optimizer = AdamW(net.parameters(), weight_decay=config.weight_decay, fused=True)
    every = max(1, config.steps // 15)
    history = []
    best = None
    start = time.perf_counter()
    print(" step  train loss  val loss  val accuracy  seconds")
    try:
        for done in range(0, config.steps, every):
            end = min(done + every, config.steps)
            train_loss = train_steps(net, config, generator, optimizer, range(done, end))
            logits, _ = predict(net, validation)  # (1000, T, 11)
            row = {
                "step": end,
                "train_loss": train_loss,
                "val_loss": F.cross_entropy(logits.mT, validation.label).item(),
                "val_accuracy": (logits.argmax(2) == validation.label).float().mean().item(),
                "seconds": time.perf_counter() - start,
            }
            if not math.isfinite(row["train_loss"] + row["val_loss"]):
                raise UserError(f"the loss is NaN or infinite by step {end}: lower lr")
            history.append(row)
            if best is None or row["val_accuracy"] > best["val_accuracy"]:
                best_weights = copy.deepcopy(net.state_dict())
                best = row
            print(ROW.format(**row))
    except KeyboardInterrupt:  # Ctrl-C: go on with the best so far
        if best is None:
            raise
        torch.set_grad_enabled(True)  # a step that was interrupted may have left it off
    net.load_state_dict(best_weights)
    return history


@torch.no_grad()
def predict(net: LookupNet, data: Sequences) -> tuple[Tensor, Tensor]:
    """Logits (N, T, 11), and how often each head looks at the right token (L, n_head)."""
    net.eval()
    logits = []
    right = 0
    for pieces in zip(*(field.split(200) for field in data), strict=True):  # 200 always fit
        piece = Sequences(*pieces)
        piece_logits, weights = net(piece)  # weights: (200, n_head, T, T)
        logits.append(piece_logits)
        found = weights.argmax(3)[:, None] == piece.wanted_token[:, :, None]
        right = right + found.sum((0, 3))
    return torch.cat(logits), right / data.label.numel()


def score(labels: Tensor, predictions: Tensor, class_names: list[str]) -> dict:
    """Accuracy, and macro averages (means over the classes), of all predictions (N,)."""
    matrix = confusion_matrix(labels.cpu(), predictions.cpu(), labels=range(len(class_names)))
    right = matrix.diagonal()  # (C,)
    predicted = matrix.sum(axis=0)  # (C,): how often each class was the answer
    true = matrix.sum(axis=1)  # (C,): how often it should have been
    accuracy = right.sum() / matrix.sum()
    precision = right / predicted.clip(min=1)  # of all that was called c, the share that is c
    recall = right / true.clip(min=1)  # of all that is c, the share that was found
    f1 = 2 * right / (predicted + true).clip(min=1)  # = 2 P R / (P + R); 0/0 counts as 0
    return {
        "accuracy": float(accuracy),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
        "confusion_matrix": matrix,
    }


def run_variant(
    net: LookupNet, config: Config, generator: Generator, validation: Sequences, test: Sequences
) -> dict:
    """Train one variant's net and score it on the test sequences; returns its results."""
    history = train(net, config, validation, generator)
    logits, right = predict(net, test)  # once: nothing is chosen by it
    predictions = logits.argmax(2)
    solved = [row["step"] for row in history if row["val_accuracy"] >= 0.99]
    return score(test.label.flatten(), predictions.flatten(), CLASS_NAMES) | {
        "dataset": f"{config.lookups} lookups among {config.seq_len} tokens",
        "way": net.attention.way,
        "cached": net.attention.cached,
        "train_seconds": history[-1]["seconds"],
        "stopped": history[-1]["step"] < config.steps,
        "history": history,
        "steps_to_99": solved[0] if solved else math.nan,
        "right_token": right.cpu(),  # (L, n_head)
        "decode_difference": (decode(net, test) - logits).abs().max().item(),
        "predictions": predictions.cpu(),  # (N, T)
        "net": net,
    }


def main(config: Config) -> dict[str, dict]:
    """Train, score, print and draw every variant; returns each one's results by its name."""
    config.images_dir.mkdir(parents=True, exist_ok=True)  # told now if that is impossible
    device = pick_device(config.device)
    generator = Generator(device).manual_seed(config.seed)
    test = make_sequences(2000, config, generator)
    validation = make_sequences(1000, config, generator)
    state = generator.get_state()
    results = {}
    try:
        for name, make_attention in variants(config).items():
            torch.manual_seed(config.seed)
            net = LookupNet(make_attention(), config).to(device)
            print(f"\n{name}: {net.attention.cached} numbers cached a token; device {device}")
            generator.set_state(state)  # the same batches for each variant
            results[name] = run_variant(net, config, generator, validation, test)
            if results[name]["stopped"]:
                break
    except KeyboardInterrupt:  # Ctrl-C: tell those that are finished
        if not results:
            raise
        list(results.values())[-1]["stopped"] = True
    title = headline(config, results)
    print_tables(results, test, title)
    draw_figures(results, test, config, title)
    return results


# ====== The lesson ends here. Below: tables, figures, devices, the command line. ======= #


def variants(config: Config) -> dict[str, Callable[[], nn.Module]]:
    """What makes each module: MHA, GQA and MQA at one head size, then all at one cache.

    MHA 8x1 has eight key/value heads, with 1 number a key and 1 a value; MLA 16 caches 16.
    """
    C = config.d_model
    H = config.n_head
    makers = {}
    shapes = [(n, config.head_dim, config.value_dim) for n in config.n_kv_head]
    for numbers in config.cache:
        shapes += [(n, numbers // (2 * n), numbers // (2 * n)) for n in config.n_kv_head]
    for n, d, d_v in shapes:
        kind = {1: "MQA", H: "MHA"}.get(n, "GQA")
        width = d if d == d_v else f"{d}+{d_v}"
        makers[f"{kind} {n}x{width}"] = partial(GroupedQueryAttention, C, H, n, d, d_v)
    for latent in config.cache:
        widths = (config.head_dim, config.value_dim)
        makers[f"MLA {latent}"] = partial(MultiHeadLatentAttention, C, H, latent, *widths)
    return makers


@torch.no_grad()
def decode(net: LookupNet, data: Sequences) -> Tensor:
    """Logits (N, T, 11) as a model that writes gets them: token by token, from the cache."""
    net.eval()
    T = data.digit.shape[1]
    cache = KVCache(max_len=T)
    logits = []
    for t in range(T):
        token = Sequences(*(field[..., t : t + 1] for field in data))
        logits.append(net(token, cache)[0])  # (N, 1, 11)
    return torch.cat(logits, 1)


def print_tables(results: dict[str, dict], test: Sequences, title: str) -> None:
    """Each variant's scores by class, then one row for each variant."""
    for name, row in results.items():
        predictions = row["predictions"].flatten()
        print_report(f"{name}, {title}", test.label.flatten(), predictions, CLASS_NAMES)
    print("variant   cached  accuracy  precision  recall      f1  to 99 %  seconds  right token")
    line = "{cached:6}  {accuracy:8.4f}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {steps:>7}"
    for name, row in results.items():
        steps = "never" if math.isnan(row["steps_to_99"]) else row["steps_to_99"]
        best = " ".join(f"{share:.2f}" for share in row["right_token"].amax(1))  # of all heads
        print(f"{name:8}  {line.format(**row, steps=steps)}  {row['train_seconds']:7.1f}  {best}")
    worst = max(row["decode_difference"] for row in results.values())
    print(f"token by token from the cache, all logits are within {worst:.0e} of these")


def draw_figures(results: dict[str, dict], test: Sequences, config: Config, title: str) -> None:
    """Draw every figure; the confusion matrix is that of the least accurate variant."""
    folder = config.images_dir
    save_figure(heatmap_figure(results, test, title), folder / "part3_attention_heatmaps.png")
    worst = min(results, key=lambda name: results[name]["accuracy"])
    title_of_worst = f"{title}\n{worst}: test accuracy {results[worst]['accuracy']:.2%}"
    figure = confusion_figure(results[worst]["confusion_matrix"], CLASS_NAMES, title_of_worst)
    save_figure(figure, folder / "part3_confusion_matrix.png")
    save_figure(tradeoff_figure([results], title), folder / "part3_cache_tradeoff.png")


@torch.no_grad()
def heatmap_figure(results: dict[str, dict], test: Sequences, title: str) -> Figure:
    """For each lookup the truth, and the best head of each variant, on one sequence."""
    _, L, T = test.wanted_token.shape
    first = Sequences(*(field[:1] for field in test))
    columns = 1 + len(results)
    title += "\nrow: the token that asks; column: the one it looks at"
    size = (max(8, 1.45 * columns), 1.2 + 1.75 * L)
    figure, grid = new_figure(title, size, L, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for i in range(L):
        truth = F.one_hot(test.wanted_token[0, i], T)
        grid[i, 0].imshow(truth.cpu().numpy())
        grid[i, 0].set_title(f"lookup {i + 1}\ntruth", fontsize=10)
    for column, (name, row) in enumerate(results.items(), start=1):
        _, weights = row["net"](first)  # (1, n_head, T, T)
        for i in range(L):
            share, head = row["right_token"][i].max(0)
            grid[i, column].imshow(weights[0, head].cpu().numpy(), vmin=0, vmax=1)
            grid[i, column].set_title(f"{name}\nhead {head}: {share:.0%}", fontsize=10)
    return figure


def tradeoff_figure(runs: list[dict[str, dict]], title: str) -> Figure:
    """Accuracy over the numbers cached, a line for each way; each variant's way there."""
    figure, (left, right) = new_figure(title, (10, 5.5), 1, 2)
    names = list(runs[0])
    ways = {runs[0][name]["way"]: [] for name in names}
    for i, name in enumerate(names):
        rows = [run[name] for run in runs]
        accuracy = 100 * np.mean([row["accuracy"] for row in rows])
        ways[rows[0]["way"]].append((rows[0]["cached"], accuracy))
        steps = np.array([row["steps_to_99"] for row in rows])
        missed = "never" if np.isnan(steps).all() else "not always"
        label = f"{name}: {missed if np.isnan(steps).any() else f'{steps.mean():,.0f}'}"
        for row in rows:
            x = [point["step"] for point in row["history"]]
            y = [100 * point["val_accuracy"] for point in row["history"]]
            right.plot(x, y, f".-C{i}", label=label)
            label = None  # one line in the legend is enough
    for size, (way, points) in zip((14, 11, 8, 5, 3), ways.items(), strict=False):
        left.plot(*zip(*sorted(points), strict=True), "o-", markersize=size, label=way)
    left.set(xlabel="numbers cached for a token", ylabel="test accuracy (%)", ylim=(0, 105))
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:.0f}")
    left.legend(loc="lower right")
    right.set(xlabel="step (below: to 99 %)", ylabel="validation accuracy (%)", ylim=(0, 105))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def headline(config: Config, results: dict[str, dict]) -> str:
    """The task, each setting that is not the default, and where Ctrl-C came."""
    text = next(iter(results.values()))["dataset"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in PLACES:
            text += f", {field.name} {value}"
    if any(row["stopped"] for row in results.values()):
        text += f", stopped in or after {list(results)[-1]}"
    return textwrap.fill(text, 90)


def run_seeds(config: Config) -> bool:
    """Run `main` for each seed, tell the scores of several; True if Ctrl-C ended one."""
    runs = []
    try:
        for seed in range(config.seed, config.seed + config.seeds):
            results = main(replace(config, seed=seed))
            if any(row["stopped"] for row in results.values()):
                return True
            runs.append(results)
    finally:  # what is finished is told even if a later run is not
        if len(runs) > 1:
            print(f"\n{len(runs)} seeds: mean +- standard deviation (each)")
            for variant in runs[0]:
                for name in ("accuracy", "f1", "steps_to_99"):
                    values = [run[variant][name] for run in runs]
                    spread = np.std(values, ddof=1)
                    each = ", ".join(f"{value:.4f}" for value in values)
                    told = f"{np.mean(values):.4f} +- {spread:.4f} ({each})"
                    print(f"{variant:9}{name:11} {told}")
            figure = tradeoff_figure(runs, f"{headline(config, runs[0])}, {len(runs)} seeds")
            save_figure(figure, config.images_dir / "part3_cache_tradeoff.png")
    return False


PLACES = ("seeds", "device", "images_dir")  # settings that change no score

# Parts 1 and 2 have the functions from here on, too.


def print_report(title: str, labels: Tensor, answers: Tensor, class_names: list[str]) -> None:
    """scikit-learn's table of precision, recall and F1 for each class."""
    options = {"labels": range(len(class_names)), "target_names": class_names}
    options |= {"digits": 4, "zero_division": 0}
    report = classification_report(labels.cpu(), answers.cpu(), **options)
    print(f"\n{title}\n{report}")


def new_figure(title: str, size: tuple[float, float], *grid: int, **more: object) -> tuple:
    """A figure and its axes; `grid` is rows and columns, `size` in inches of 100 pixels."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(*grid, **more)


def confusion_figure(matrix: np.ndarray, class_names: list[str], title: str) -> Figure:
    """Counts and row percentages of a confusion matrix; rows true, columns predicted."""
    figure, axes = new_figure(title, (9, 8.5))
    share = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    scale = PowerNorm(0.4, vmin=0, vmax=1)  # tells 0.1 % from 1 %
    axes.imshow(share, cmap="magma_r", norm=scale)
    for (true, predicted), count in np.ndenumerate(matrix):
        if count > 0:
            text = f"{count}\n{share[true, predicted]:.1%}"
            color = "white" if scale(share[true, predicted]) > 0.5 else "black"
            axes.text(predicted, true, text, ha="center", va="center", fontsize=9, color=color)
    axes.set_xticks(range(len(matrix)), class_names)
    axes.set_yticks(range(len(matrix)), class_names)
    axes.set(xlabel="predicted", ylabel="true")
    if len(class_names[0]) > 1:
        axes.tick_params(axis="x", labelrotation=45)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"drew {path}")


class UserError(ValueError):
    """Something the user can mend: told in one line, without a traceback."""


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto is CUDA if it is there, else MPS, else the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available["cpu"] = True
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        raise UserError(f"device {name} is not available here: use cpu or auto")
    return torch.device(name)


def command_line() -> None:
    """Run with the flags given; exit status 1 for what a user can mend, 130 for Ctrl-C."""
    sys.stdout.reconfigure(line_buffering=True)  # rows reach a file or a pipe at once
    try:
        config = tyro.cli(Config, default=Config())
        stopped = run_seeds(config)
    except KeyboardInterrupt:
        stopped = True
    except (UserError, ValidationError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    sys.exit(130 if stopped else 0)


if __name__ == "__main__":
    command_line()
