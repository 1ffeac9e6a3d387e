"""Multi-head, grouped-query and multi-query attention by hand, on a task with a known answer.

    attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V             (Vaswani et al. 2017, equation 1)

Every query head has keys and values of its own (MHA), shares them with its group (GQA), or shares
one set with all the others (MQA). The task: each token wants the digits of two other tokens, which
it knows by name, and must add them. So it is known beforehand where two heads ought to look.

    python part3_attention.py            # train and score MHA, GQA and MQA, time decoding, draw
    python part3_attention.py --study    # then from MHA to GQA and MQA by pooling heads
    python part3_attention.py --help     # every setting below, as a flag

It prints accuracy, precision, recall and F1 of each variant on 2,000 test sequences, with its
parameters, cache and times, and saves its figures in images/. Expect 100 % for MHA and GQA and
82 to 100 % for MQA, by the seed, after 10 s of training each on two cores of an AMD EPYC (Zen 5).

References: Vaswani et al. 2017, section 3.2 (MHA); Shazeer 2019 (MQA); Ainslie et al. 2023 (GQA,
and section 2.1: from MHA to GQA).
"""

import io
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix
from torch import Tensor
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------- #
#                                             Config                                             #
# ---------------------------------------------------------------------------------------------- #


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    d_model: int = 64  # numbers that stand for one token
    n_head: int = 16  # query heads, of d_model / n_head numbers each
    n_kv_head: tuple[int, ...] = (16, 4, 1)  # the variants, by key/value heads: MHA, GQA, MQA
    seq_len: int = 8  # tokens in a sequence
    steps: int = 1000  # gradient steps for each variant
    batch_size: int = 256  # sequences in one gradient step, drawn fresh each time
    lr: float = 3e-3  # peak learning rate; it warms up to this, then falls to zero
    weight_decay: float = 0.01  # AdamW's pull of the weights towards zero
    seed: int = 0  # of the sequences and the weights
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else the CPU
    images_dir: Path = Path("images")  # where the figures go
    study: bool = False  # also convert the trained MHA to GQA and MQA, and train on

    def __post_init__(self) -> None:
        """Raise ValueError, naming field, value and what is allowed, before anything is done."""

        def check(name: str, allowed: str, ok: bool) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {allowed}")

        check("n_head", "from 1 to 1024", 1 <= self.n_head <= 1024)
        fits = 1 <= self.d_model <= 16384 and self.d_model % self.n_head == 0
        check("d_model", f"a multiple of n_head = {self.n_head}, at most 16384", fits)
        fits = all(1 <= n <= self.n_head and self.n_head % n == 0 for n in self.n_kv_head)
        fits = fits and 0 < len(self.n_kv_head) == len(set(self.n_kv_head))
        check("n_kv_head", f"one or more different divisors of n_head = {self.n_head}", fits)
        check("seq_len", "from 2 to 128", 2 <= self.seq_len <= 128)  # weights take its square
        check("steps", "from 1 to 10000000", 1 <= self.steps <= 10_000_000)
        check("batch_size", "from 1 to 1000000", 1 <= self.batch_size <= 1_000_000)
        check("lr", "above 0 and finite", 0 < self.lr < math.inf)
        check("weight_decay", "at least 0 and finite", 0 <= self.weight_decay < math.inf)
        check("seed", "from 0 to 2**62", 0 <= self.seed <= 2**62)
        fits = self.n_head in self.n_kv_head and len(self.n_kv_head) > 1
        allowed = f"off, unless n_kv_head holds n_head = {self.n_head} (MHA) and a smaller one"
        check("study", allowed, fits or not self.study)


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------- #
#                                              Data                                              #
# ---------------------------------------------------------------------------------------------- #


class Sequences(NamedTuple):
    """N sequences of T tokens. Every tensor is (N, T) int64; the names are in 0 .. T-1."""

    name_a: Tensor  # each token's name in alphabet A: a permutation in each sequence
    name_b: Tensor  # each token's name in alphabet B: another permutation
    wanted_a: Tensor  # the A-name of the token whose digit this token wants first
    wanted_b: Tensor  # the B-name of the token whose digit this token wants second
    digit: Tensor  # 0 .. 9
    where_a: Tensor  # the answer key of the first lookup: where name_a equals wanted_a
    where_b: Tensor  # the answer key of the second lookup
    label: Tensor  # (digit at where_a + digit at where_b) mod 10


def draw_sequences(n: int, seq_len: int, generator: torch.Generator) -> Sequences:
    """Draw n sequences on the generator's device.

    Four tokens, one of them in full:        token        0  1  2  3
                                             name_a       2  0  3  1
    token 1 wants the digits of              name_b       1  3  0  2
    the token called 3 in A (token 2: 5)     digit        7  1  5  8
    and of the one called 1 in B             wanted_a     .  3  .  .
    (token 0: 7); its label is 12 mod 10.    wanted_b     .  1  .  .
    """
    shape, device = (n, seq_len), generator.device

    def permutations() -> Tensor:  # the order of random numbers is a random permutation
        return torch.rand(shape, generator=generator, device=device).argsort(1)

    name_a, name_b = permutations(), permutations()
    where_a = torch.randint(seq_len, shape, generator=generator, device=device)
    # Another token than where_a: the same one twice would make even labels likelier than odd.
    further = torch.randint(1, seq_len, shape, generator=generator, device=device)
    where_b = (where_a + further) % seq_len
    digit = torch.randint(10, shape, generator=generator, device=device)
    wanted_a, wanted_b = name_a.gather(1, where_a), name_b.gather(1, where_b)
    label = (digit.gather(1, where_a) + digit.gather(1, where_b)) % 10
    return Sequences(name_a, name_b, wanted_a, wanted_b, digit, where_a, where_b, label)


def generator_for(split: str, seed: int, device: torch.device) -> torch.Generator:
    """A random stream of its own for each split, so that none of them depends on the others."""
    place = ("train", "validation", "test", "study").index(split)
    return torch.Generator(device).manual_seed(4 * (seed % 2**60) + place)


# ---------------------------------------------------------------------------------------------- #
#                                             Model                                              #
# ---------------------------------------------------------------------------------------------- #


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v, with n_head / n_kv_head query heads to each key/value head.

    The scores are divided by sqrt(d) because a dot product of d numbers of size one has a standard
    deviation of sqrt(d): unscaled, a large d would push softmax to its flat ends
    (Vaswani et al. 2017, section 3.2.1).

    Args:
        q: (B, n_head, T, d). Head h uses key/value head h // (n_head / n_kv_head).
        k, v: (B, n_kv_head, S, d)
        mask: boolean, True where a query may attend; broadcastable to (B, n_head, T, S).

    Returns the output (B, n_head, T, d) and the weights (B, n_head, T, S). A query that may attend
    to nothing gets zeros. Raises ValueError if n_head is not a multiple of n_kv_head.
    """
    B, n_head, T, d = q.shape
    n_kv_head, S = k.shape[1:3]
    if n_head % n_kv_head != 0:
        raise ValueError(f"{n_head} query heads cannot share {n_kv_head} key/value heads evenly")
    # The queries of a group lie one below the other and meet their keys in one matrix product:
    # keys and values are read once and never copied out to n_head heads.
    grouped = q.reshape(B, n_kv_head, -1, d) * d**-0.5  # (B, n_kv_head, group T, d)
    # (q k^T) as (k q^T)^T: with one query, as in decoding, the long side first is the faster way.
    scores = (k @ grouped.mT).mT.reshape(B, n_head, T, S)
    if mask is not None:  # the lowest finite number, not -inf: an empty row must not become NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)  # (B, n_head, T, S); subtracts each row's maximum before exp
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    output = weights.view(B, n_kv_head, -1, S) @ v  # (B, n_kv_head, group T, d)
    return output.view(B, n_head, T, d), weights


class KVCache:
    """Keys and values of the tokens seen so far, in memory that is allocated once.

    Raises ValueError when more than max_len tokens are put in.
    """

    def __init__(
        self,
        batch: int,
        n_kv_head: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, n_kv_head, max_len, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0  # tokens held

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values take for all max_len tokens."""
        return self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, n_kv_head, T, d) keys and values; returns views of all held so far."""
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"the cache holds {self.k.shape[2]} tokens, not {end}")
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class GroupedQueryAttention(nn.Module):
    """Self-attention with n_head query heads and n_kv_head key/value heads.

    n_kv_head == n_head is multi-head attention (MHA, Vaswani et al. 2017), n_kv_head == 1 is
    multi-query attention (MQA, Shazeer 2019), anything between is grouped-query attention (GQA,
    Ainslie et al. 2023).

    Cutting heads, worked for four tokens and two heads of one number each. A projection gives each
    token a row with a column for each head, (T, n_head d):

        token 0: a0 b0        .view(T, n_head, d).transpose(0, 1)    head a: a0 a1 a2 a3
        token 1: a1 b1                                               head b: b0 b1 b2 b3
        token 2: a2 b2
        token 3: a3 b3        .view(n_head, T, d)                    head a: a0 b0 a1 b1
                                                                     head b: a2 b2 a3 b3

    The second way has the right shape, but its "head a" mixes both heads of two tokens and never
    sees the other two.

    Args:
        d_model: numbers of a token.
        n_head, n_kv_head: heads; n_head must be a multiple of n_kv_head.
        head_dim: numbers of a head; None is d_model / n_head, which must then be whole.

    Raises ValueError if the numbers do not divide.
    """

    def __init__(
        self, d_model: int, n_head: int, n_kv_head: int, head_dim: int | None = None
    ) -> None:
        super().__init__()
        if n_head % n_kv_head != 0:
            raise ValueError(f"n_head {n_head} must be a multiple of n_kv_head {n_kv_head}")
        if head_dim is None and d_model % n_head != 0:
            raise ValueError(f"d_model {d_model} must be a multiple of n_head {n_head}")
        self.n_head, self.n_kv_head = n_head, n_kv_head
        self.head_dim = d_model // n_head if head_dim is None else head_dim
        self.q_proj = nn.Linear(d_model, n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(n_head * self.head_dim, d_model, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, T, d_model) to q (B, n_head, T, d) and k, v (B, n_kv_head, T, d)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from x (B, T, d_model) to itself, and to the tokens in the cache before it.

        With a cache and no mask, attention is causal: each token sees itself and all before it.
        Returns y (B, T, d_model), and the weights (B, n_head, T, S) or None.
        """
        B, T, _ = x.shape
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_kv_head, S, d)
            if mask is None and T > 1:
                S = cache.length
                mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        output, weights = attention(q, k, v, mask)
        y = self.o_proj(output.transpose(1, 2).reshape(B, T, -1))  # heads side by side again
        return y, weights if need_weights else None

    @classmethod
    def from_mha(cls, mha: "GroupedQueryAttention", n_kv_head: int) -> "GroupedQueryAttention":
        """Pool the key and value heads of each group by their mean (Ainslie 2023, section 2.1)."""
        d_model, d = mha.q_proj.in_features, mha.head_dim
        new = cls(d_model, mha.n_head, n_kv_head, d).to(mha.q_proj.weight)
        with torch.no_grad():
            new.q_proj.weight.copy_(mha.q_proj.weight)
            new.o_proj.weight.copy_(mha.o_proj.weight)
            for old, pooled in ((mha.k_proj, new.k_proj), (mha.v_proj, new.v_proj)):
                groups = old.weight.view(n_kv_head, -1, d, d_model)  # (kv, heads of a group, d, C)
                pooled.weight.copy_(groups.mean(1).view(-1, d_model))
        return new


class LookupNet(nn.Module):
    """Embed the tokens, attend once, and let a small MLP add the digits found.

    Shapes: Sequences of N sequences of T tokens -> logits (N, T, 10), weights (N, n_head, T, T)
    """

    def __init__(self, config: Config, n_kv_head: int, head_dim: int | None = None) -> None:
        super().__init__()
        C, T = config.d_model, config.seq_len
        self.embed = nn.ModuleList(nn.Embedding(size, C) for size in (T, T, T, T, 10))
        self.attention = GroupedQueryAttention(C, config.n_head, n_kv_head, head_dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, 10)
        )

    def forward(self, data: Sequences) -> tuple[Tensor, Tensor]:
        # A token is the sum of what it is called, what it wants, and its digit. It has no
        # position: where a token stands tells nothing, its names tell all.
        x = sum(
            embed(field) for embed, field in zip(self.embed, data[:5], strict=True)
        )  # (N, T, C)
        y, weights = self.attention(x, need_weights=True)
        return self.mlp(y), weights


# ---------------------------------------------------------------------------------------------- #
#                                            Training                                            #
# ---------------------------------------------------------------------------------------------- #


class Trained(NamedTuple):
    """What `train_variant` leaves behind; the lists have one value for each validation."""

    step: list[int]
    train_loss: list[float]  # mean since the last validation
    val_loss: list[float]
    val_accuracy: list[float]
    best_step: int
    seconds: float
    interrupted: bool


def train_variant(
    net: LookupNet, config: Config, device: torch.device, verbose: bool = True
) -> Trained:
    """Fit `net` in place on fresh sequences; keep the weights with the best validation accuracy.

    Ctrl-C ends training early and keeps the best weights so far.
    Raises UserError if the loss becomes NaN or infinite.
    """
    stream = generator_for("train", config.seed, device)
    validation = draw_sequences(
        1000, config.seq_len, generator_for("validation", config.seed, device)
    )
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=max(10, config.steps), pct_start=0.2
    )  # at least 10: with 5, the warm-up would be one step long and divide by zero
    every = max(1, config.steps // 15)
    trained = Trained([], [], [], [], 0, 0.0, False)
    losses: list[float] = []
    best_step, best_weights, best_score = 0, {}, (-1.0, 0.0)
    interrupted = False
    start = time.perf_counter()
    if verbose:
        print(" step  train loss  val loss  val accuracy         lr  seconds")
    try:
        for step in tqdm(range(1, config.steps + 1), "training", leave=False, disable=None):
            net.train()
            batch = draw_sequences(config.batch_size, config.seq_len, stream)
            loss = F.cross_entropy(net(batch)[0].flatten(0, 1), batch.label.flatten())
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"the loss became {losses[-1]} in step {step}: "
                    f"try a lower learning rate than lr = {config.lr:g}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % every != 0 and step != config.steps:
                continue

            logits, _ = answer(net, validation)
            loss_now = F.cross_entropy(logits.flatten(0, 1), validation.label.flatten()).item()
            accuracy_now = (logits.argmax(2) == validation.label).float().mean().item()
            if (accuracy_now, -loss_now) > best_score:
                best_weights = {k: v.clone() for k, v in net.state_dict().items()}
                best_step, best_score = step, (accuracy_now, -loss_now)
            trained.step.append(step)
            trained.train_loss.append(sum(losses) / len(losses))
            trained.val_loss.append(loss_now)
            trained.val_accuracy.append(accuracy_now)
            losses.clear()
            if verbose:
                print(
                    f"{step:5d}  {trained.train_loss[-1]:10.4f}  {loss_now:8.4f}  "
                    f"{accuracy_now:12.4f}  {schedule.get_last_lr()[0]:9.2e}  "
                    f"{time.perf_counter() - start:7.1f}"
                )
    except KeyboardInterrupt:
        if not best_weights:  # nothing to keep yet
            raise
        interrupted = True
        print(f"interrupted: step {best_step}, the best so far, is scored", file=sys.stderr)
    net.load_state_dict(best_weights)
    seconds = time.perf_counter() - start
    return trained._replace(best_step=best_step, seconds=seconds, interrupted=interrupted)


# ---------------------------------------------------------------------------------------------- #
#                                           Evaluation                                           #
# ---------------------------------------------------------------------------------------------- #


@torch.no_grad()
def answer(net: LookupNet, data: Sequences) -> tuple[Tensor, Tensor]:
    """Logits (N, T, 10) and attention weights (N, n_head, T, T) in evaluation mode."""
    net.eval()
    return net(data)


def score(labels: Tensor, predictions: Tensor, class_names: list[str]) -> dict:
    """Accuracy, precision, recall and F1 of all predictions at once, as fractions of 1.

    labels, predictions: (N,) class numbers. A class that is never predicted has precision 0, one
    that never occurs has recall 0. `precision`, `recall` and `f1` are macro averages, the plain
    means over the classes; `report` is a table of them all, `per_class` the same as a dict.
    """
    truth, answer = labels.cpu().numpy(), predictions.cpu().numpy()
    classes = list(range(len(class_names)))
    options = {"labels": classes, "target_names": class_names, "zero_division": 0, "digits": 4}
    per_class = classification_report(truth, answer, output_dict=True, **options)
    macro = per_class["macro avg"]
    return {
        "accuracy": float(accuracy_score(truth, answer)),
        "precision": float(macro["precision"]),
        "recall": float(macro["recall"]),
        "f1": float(macro["f1-score"]),
        "confusion_matrix": confusion_matrix(truth, answer, labels=classes),
        "per_class": {name: per_class[name] for name in class_names},
        "report": classification_report(truth, answer, **options),
    }


def alignment(weights: Tensor, data: Sequences) -> Tensor:
    """(2, n_head): the share of first and of second lookups on which a head looks where it should.

    A head looks at the token with its largest weight. By chance it is the right one in 1 / T.
    """
    looks_at = weights.argmax(3)  # (N, n_head, T)
    truth = torch.stack([data.where_a, data.where_b])[:, :, None]  # (2, N, 1, T)
    return (looks_at == truth).float().mean((1, 3))


@torch.no_grad()
def decode_seconds(n_kv_head: int, context: int, device: torch.device) -> float:
    """Median seconds of one decoding step's attention: batch 4, 32 query heads of 64.

    One new token's queries attend to `context` tokens in the cache, as when a model writes.
    """
    cache = KVCache(4, n_kv_head, context, 64, device=device)
    k, v = cache.append(*torch.randn(2, 4, n_kv_head, context, 64, device=device))
    q = torch.randn(4, 32, 1, 64, device=device)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        attention(q, k, v)[0].sum().item()  # .item() waits until the device has finished
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))  # the first two warm up


def kv_heads_of_32(config: Config, n_kv_head: int) -> int:
    """The key/value heads of 32 query heads, shared as the variant shares them; MQA keeps one."""
    return 1 if n_kv_head == 1 else 32 * n_kv_head // config.n_head


# ---------------------------------------------------------------------------------------------- #
#                                            Figures                                             #
# ---------------------------------------------------------------------------------------------- #


def require_writable(folder: Path, flag: str) -> None:
    """Create `folder` if need be; raise UserError if no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror}); see {flag}") from None


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG under a temporary name, then rename: never a half-written file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100)
        # A palette of 256 colours is a third of the size, and looks the same.
        Image.open(picture).convert("RGB").quantize(256).save(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def draw_confusion(axes: Axes, matrix: np.ndarray, class_names: list[str], title: str) -> None:
    """Counts and row percentages of a (C, C) confusion matrix, rows true, columns predicted."""
    share = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(share, cmap="magma_r", vmin=0, vmax=1)
    for row, col in zip(*matrix.nonzero(), strict=True):
        text, shade = f"{matrix[row, col]}\n{share[row, col]:.1%}", share[row, col]
        colour = "white" if shade > 0.5 else "black"
        axes.text(col, row, text, color=colour, ha="center", va="center", fontsize=8)
    slanted = {"rotation": 45, "ha": "right"} if max(map(len, class_names)) > 3 else {}
    axes.set_xticks(range(len(class_names)), class_names, **slanted)
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="predicted", ylabel="true", title=title)


def confusions_figure(matrices: dict[str, np.ndarray], title: str) -> Figure:
    """The confusion matrix of every variant, two in a row."""
    rows = math.ceil(len(matrices) / 2)
    figure = Figure(figsize=(11, 5.7 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes in grid[len(matrices) :]:
        axes.axis("off")
    for axes, (name, matrix) in zip(grid, matrices.items(), strict=False):
        heading = f"{name}: accuracy {matrix.trace() / matrix.sum():.2%}"
        draw_confusion(axes, matrix, list("0123456789"), heading)
    figure.suptitle(title)
    return figure


def learning_figure(runs: dict[str, Trained], title: str) -> Figure:
    """Validation loss and accuracy of every variant by training step."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, run in runs.items():
        left.plot(run.step, run.val_loss, "o-", markersize=3, label=name)
        right.plot(run.step, [100 * a for a in run.val_accuracy], "o-", markersize=3, label=name)
    left.set(xlabel="step", ylabel="validation cross-entropy (nats)", yscale="log")
    right.set(xlabel="step", ylabel="validation accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(title)
    return figure


def heatmap_figure(
    nets: dict[str, LookupNet], data: Sequences, shares: dict[str, Tensor], title: str
) -> Figure:
    """Every head of every variant on one test sequence, beside the two true lookups."""
    one = Sequences(*(field[:1] for field in data))
    T, n_head = one.label.shape[1], next(iter(nets.values())).attention.n_head
    columns = 1 + math.ceil(n_head / 2)  # two rows for each variant: a truth, then half the heads
    size = (1.25 * columns + 0.8, 3.1 * len(nets) + 1)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(2 * len(nets), columns, squeeze=False)
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[], frame_on=False)
    for i, (name, net) in enumerate(nets.items()):
        weights = answer(net, one)[1][0].numpy(force=True)  # (n_head, T, T)
        rows = grid[2 * i : 2 * i + 2]
        pictures = {}
        for axes, where, which in zip(
            rows[:, 0], (one.where_a, one.where_b), ("1st", "2nd"), strict=True
        ):
            pictures[axes] = F.one_hot(where[0], T).numpy(force=True), f"truth,\n{which} lookup"
            axes.set_ylabel(name, fontsize=11)
        for head, axes in zip(range(n_head), rows[:, 1:].ravel(), strict=False):
            share = shares[name][:, head]
            which = ("1st", "2nd")[int(share.argmax())]
            pictures[axes] = weights[head], f"head {head}\n{which}: {share.max():.0%}"
        for axes, (picture, heading) in pictures.items():
            shown = axes.imshow(picture, cmap="viridis", vmin=0, vmax=1)
            axes.set_title(heading, fontsize=9)
    figure.colorbar(shown, ax=grid, label="weight", shrink=0.4)
    figure.suptitle(
        f"{title}\nrow: the token that asks; column: the token looked at; heading: the lookup that "
        "a head serves best, and how often it is right",
        fontsize=11,
    )
    return figure


def sharing_figure(nets: dict[str, LookupNet], title: str) -> Figure:
    """Which query heads read which key/value head, and the numbers cached for a token."""
    figure = Figure(figsize=(10, 1.7 * len(nets) + 0.5), layout="constrained")
    grid = figure.subplots(len(nets), 1, squeeze=False).ravel()
    for axes, (name, net) in zip(grid, nets.items(), strict=True):
        module = net.attention
        group = module.n_head // module.n_kv_head
        for head in range(module.n_head):
            shared = head // group
            centre = (shared + 0.5) * group - 0.5  # below the middle of its group
            colour = f"C{shared % 10}"
            axes.plot([head, centre], [1, 0], color=colour)
            axes.text(head, 1, f"q{head}", ha="center", va="center", bbox={"fc": "w", "ec": colour})
            axes.text(centre, 0, f"k{shared}\nv{shared}", ha="center", va="center", color="white",
                      bbox={"fc": colour, "ec": colour})  # fmt: skip
        cached = module.k_proj.out_features + module.v_proj.out_features
        axes.set(ylim=(-0.5, 1.5), xlim=(-0.6, module.n_head - 0.4))
        axes.set_title(
            f"{name}: {module.n_head} query heads of {module.head_dim}, {module.n_kv_head} "
            f"key/value heads; {cached} numbers cached for a token",
            fontsize=10,
        )
        axes.axis("off")
    figure.suptitle(title)
    return figure


def decode_figure(config: Config, device: torch.device) -> tuple[Figure, dict[int, float]]:
    """Time and cache size of a decoding step by context length; also seconds at 8,192 tokens."""
    contexts = [512, 1024, 2048, 4096, 8192]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    longest = {}
    for n_kv_head in config.n_kv_head:
        shared = kv_heads_of_32(config, n_kv_head)
        seconds = [decode_seconds(shared, context, device) for context in contexts]
        longest[n_kv_head] = seconds[-1]
        label = f"{variant_name(config, n_kv_head)}: {shared} key/value heads"
        left.plot(contexts, [1e6 * s for s in seconds], "o-", label=label)
        cache = [KVCache(4, shared, context, 64, device="meta").nbytes for context in contexts]
        right.plot(contexts, [n / 2**20 for n in cache], "o-", label=label)
    left.set(ylabel="microseconds for one step")
    right.set(ylabel="cache (MiB)")
    for axes in (left, right):
        axes.set(xlabel="tokens in the cache", xscale="log", yscale="log")
        axes.set_xticks(contexts, [f"{n:,}" for n in contexts], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"One decoding step: batch 4, 32 query heads of 64, float32, {device}")
    return figure, longest


@torch.no_grad()
def qkv_figure(net: LookupNet, data: Sequences, head: int, title: str) -> Figure:
    """One head on one test sequence: Q, K, V, scores, softmax and output, with their numbers."""
    one = Sequences(*(field[:1] for field in data))
    x = sum(embed(field) for embed, field in zip(net.embed, one[:5], strict=True))
    q, k, v = net.attention.heads(x)  # (1, heads, T, d)
    output, weights = attention(q, k, v)
    group = net.attention.n_head // net.attention.n_kv_head
    q, k, v = q[0, head], k[0, head // group], v[0, head // group]  # (T, d)
    panels = {
        "Q: what each token wants": q,
        "K: what each token is called": k,
        "V: what each token has to give": v,
        "scores = Q K^T / sqrt(d)": q @ k.T / math.sqrt(q.shape[1]),
        "weights = softmax of each row": weights[0, head],
        "output = weights V": output[0, head],
    }
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    for axes, (name, matrix) in zip(figure.subplots(2, 3).ravel(), panels.items(), strict=True):
        matrix = matrix.numpy(force=True)
        limit = np.abs(matrix).max()
        colours = {"cmap": "coolwarm", "vmin": -limit, "vmax": limit}
        if name.startswith("weights"):
            colours = {"cmap": "viridis", "vmin": 0, "vmax": 1}
        axes.imshow(matrix, aspect="auto", **colours)
        axes.set_xticks(range(matrix.shape[1]))
        for (row, col), value in np.ndenumerate(matrix):
            dark = value < 0.6 if name.startswith("weights") else abs(value) > 0.7 * limit
            colour = "white" if dark else "black"
            axes.text(col, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=9)
        square = name.startswith(("scores", "weights"))
        axes.set(title=name, ylabel="token", xlabel="token looked at" if square else "dimension")
    figure.suptitle(title)
    return figure


# ---------------------------------------------------------------------------------------------- #
#                                            Studies                                             #
# ---------------------------------------------------------------------------------------------- #


def study(
    nets: dict[str, LookupNet], results: dict, config: Config, device: torch.device
) -> dict[str, list[float]]:
    """From MHA to fewer heads: pool the trained MHA's heads, then train on for a little.

    Each further training is a full one-cycle of 1, 5, 10 or 20 % of the original steps, beside the
    same steps from scratch; 0 % is the pooled net as it comes. Scored on one validation draw.
    """
    shares = (0.0, 0.01, 0.05, 0.1, 0.2)
    few = [n for n in config.n_kv_head if n != config.n_head]
    held_out = draw_sequences(1000, config.seq_len, generator_for("study", config.seed, device))
    mha = nets[variant_name(config, config.n_head)]
    found = {}
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    grid = figure.subplots(1, len(few), sharey=True, squeeze=False).ravel()
    bar = tqdm(desc="study", total=2 * len(few) * len(shares), disable=None)
    for axes, n_kv_head in zip(grid, few, strict=True):
        name = variant_name(config, n_kv_head)
        for start in ("pooled", "scratch"):
            accuracies = []
            for share in shares:
                torch.manual_seed(config.seed)
                net = LookupNet(config, n_kv_head).to(device)
                if start == "pooled":
                    net.embed.load_state_dict(mha.embed.state_dict())
                    net.mlp.load_state_dict(mha.mlp.state_dict())
                    net.attention = GroupedQueryAttention.from_mha(mha.attention, n_kv_head)
                if share > 0:
                    setting = replace(config, steps=max(1, round(share * config.steps)))
                    if train_variant(net, setting, device, verbose=False).interrupted:
                        raise KeyboardInterrupt
                right = answer(net, held_out)[0].argmax(2) == held_out.label
                accuracies.append(right.float().mean().item())
                bar.update()
            found[f"{name} {start}"] = accuracies
            percent = [100 * a for a in accuracies]
            axes.plot([100 * s for s in shares], percent, "o-", label=f"{start} start")
        full = results[name]["accuracy"]
        axes.axhline(100 * full, color="grey", linestyle=":", label="from scratch, all steps")
        axes.set(xlabel="further training (% of the original steps)", title=name)
        axes.grid(alpha=0.3)
        axes.legend()
    bar.close()
    grid[0].set_ylabel("accuracy (%)")
    figure.suptitle(f"From MHA by pooling key/value heads: 1,000 sequences, seed {config.seed}")
    print(f"\nfrom MHA by pooling, accuracy on 1,000 held-out sequences, seed {config.seed}")
    print("start        " + "".join(f"{share:>8.0%}" for share in shares))
    for name, accuracies in found.items():
        print(f"{name:13}" + "".join(f"{a:8.4f}" for a in accuracies))
    save_figure(figure, config.images_dir / "part3_study_from_mha.png")
    return found


# ---------------------------------------------------------------------------------------------- #
#                                              Main                                              #
# ---------------------------------------------------------------------------------------------- #


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto takes CUDA, then MPS, then the CPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((n for n, ok in there.items() if ok), "cpu")
    if not there.get(name, True):
        raise UserError(f"device {name} is not available here; use --device cpu or auto")
    return torch.device(name)


def variant_name(config: Config, n_kv_head: int) -> str:
    """MHA, MQA or GQA; with several GQAs, GQA-2, GQA-4 and so on."""
    if n_kv_head == config.n_head:
        return "MHA"
    if n_kv_head == 1:
        return "MQA"
    between = [n for n in config.n_kv_head if 1 < n < config.n_head]
    return "GQA" if len(between) == 1 else f"GQA-{n_kv_head}"


def wide_head_dim(config: Config) -> int:
    """The head size at which MQA has as many attention parameters as MHA, rounded down.

    MHA has 4 C^2 of them; MQA with heads of d has (2 n_head + 2) C d.
    """
    return 4 * config.d_model // (2 * config.n_head + 2)


def main(config: Config) -> dict[str, dict]:
    """Train, score and time every variant, and draw; returns a dict of results for each.

    Raises KeyboardInterrupt, after all is drawn, if training was interrupted.
    """
    device = pick_device(config.device)
    require_writable(config.images_dir, "--images-dir")
    test = draw_sequences(2000, config.seq_len, generator_for("test", config.seed, device))
    variants = {variant_name(config, n): (n, None) for n in config.n_kv_head}
    if 1 in config.n_kv_head and config.n_head > 1:
        variants["MQA-wide"] = (1, wide_head_dim(config))
    decode, decode_times = decode_figure(config, device)
    nets, runs, results, shares, interrupted = {}, {}, {}, {}, ""
    for name, (n_kv_head, head_dim) in variants.items():
        torch.manual_seed(config.seed)
        net = LookupNet(config, n_kv_head, head_dim).to(device)
        module = net.attention
        print(
            f"\n{name}: {module.n_head} query heads of {module.head_dim}, {n_kv_head} key/value "
            f"heads; device {device}"
        )
        try:
            run = train_variant(net, config, device)
        except KeyboardInterrupt:  # it has nothing to score yet; draw what the others have
            if not results:
                raise
            interrupted = f"interrupted before {name} could be scored"
            print(interrupted, file=sys.stderr)
            break
        logits, weights = answer(net, test)  # the one look at the test sequences
        shares[name] = alignment(weights, test).cpu()
        results[name] = {"dataset": "two lookups"}
        results[name] |= score(test.label.flatten(), logits.argmax(2).flatten(), list("0123456789"))
        results[name] |= {
            "train_seconds": run.seconds,
            "epochs_run": 1,  # every sequence is seen once
            "steps_run": run.step[-1],
            "parameters": sum(p.numel() for p in net.parameters()),
            "cache_bytes_per_token": KVCache(1, n_kv_head, 1, module.head_dim).nbytes,
            "alignment": tuple(shares[name].amax(1).tolist()),
            "decode_microseconds": 1e6 * decode_times[n_kv_head] if head_dim is None else math.nan,
            "interrupted": run.interrupted,
        }
        nets[name], runs[name] = net, run
        print(f"\n{name}, test sequences\n{results[name]['report']}")
        if run.interrupted:
            interrupted = f"{name} interrupted after step {run.step[-1]}"
            break

    print(
        "variant   accuracy  precision  recall      F1  parameters  cache bytes/token  "
        "train s  decode us  alignment"
    )
    for name, row in results.items():
        decode_time = row["decode_microseconds"]  # NaN for MQA-wide, which is not timed
        print(
            f"{name:8}  {row['accuracy']:8.4f}  {row['precision']:9.4f}  {row['recall']:6.4f}  "
            f"{row['f1']:6.4f}  {row['parameters']:10,}  {row['cache_bytes_per_token']:17,}  "
            f"{row['train_seconds']:7.1f}  "
            f"{'-' if math.isnan(decode_time) else format(decode_time, ',.0f'):>9}  "
            f"{row['alignment'][0]:.2f} {row['alignment'][1]:.2f}"
        )
    print("decode: one token, batch 4, 32 query heads of 64, 8,192 tokens of context")

    title = "Two lookups, test accuracy: " + ", ".join(
        f"{name} {row['accuracy']:.2%}" for name, row in results.items()
    )
    if interrupted:
        title += f" ({interrupted})"
    first = next(iter(nets))
    looker = int(shares[first][0].argmax())
    figures = {
        "part3_attention_heatmaps": heatmap_figure(nets, test, shares, title),
        "part3_training_curves": learning_figure(runs, title),
        "part3_confusion_matrix": confusions_figure(
            {name: row["confusion_matrix"] for name, row in results.items()}, "Two lookups, test"
        ),
        "part3_head_sharing": sharing_figure(nets, "Which query heads share a key/value head"),
        "part3_decode": decode,
        "part3_qkv": qkv_figure(
            nets[first], test, looker, f"{first}, head {looker}, one test sequence, step by step"
        ),
    }
    for name, figure in figures.items():
        save_figure(figure, config.images_dir / f"{name}.png")
    if interrupted:
        raise KeyboardInterrupt
    if config.study:
        study(nets, results, config, device)
    return results


def command_line() -> int:
    """Run `main` with the flags given; what a user can cause ends in one line, not a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        main(tyro.cli(Config))
        print(end="", flush=True)  # here, where a failure can still be told
        return 0
    except UserError as error:
        problem = str(error)
    except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        problem = "out of memory: try a smaller --batch-size, or a smaller net"
    except OSError as error:  # the output's disk is full, or its reader has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        problem = f"stopped, for a file or the output failed ({error.strerror})"
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(f"{Path(__file__).name}: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(command_line())
