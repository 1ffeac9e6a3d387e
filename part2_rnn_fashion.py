"""A hand-rolled tanh RNN that reads Fashion-MNIST images row by row; also as a GRU or an LSTM.

An image is a sequence of 28 rows of 28 pixels. A small network encodes each row as x_t, and the
recurrent layer carries one state h from top to bottom; its mean and maximum are classified:

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    python part2_rnn_fashion.py  # train, score, draw; --cell gru, --help for every setting

Expect 90.5 % after five minutes on one CPU core. From `Data` to `main`, where the lesson ends, it
is part 1's plus mirroring, clipping and averaging. References: Elman 1990; Pascanu et al. 2013.
"""

import copy
import gzip
import hashlib
import io
import math
import os
import sys
import time
import urllib.request
import zipfile
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
from sklearn.datasets import load_digits
from sklearn.metrics import classification_report
from torch import Tensor, nn
from torch.optim import AdamW, swa_utils
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    cell: Literal["tanh", "gru", "lstm"] = "tanh"  # what one step computes
    hidden_size: int = 256  # numbers in the state h
    bidirectional: bool = False  # also read from the bottom row to the top row
    rows_per_step: Literal[1, 2, 4, 7, 14, 28] = 1  # rows read in a step; 28: no sequence at all
    context: int = 0  # rows above and below these that a step sees as well
    encoder_size: int = 128  # numbers that each step's pixels are first encoded as
    readout: Literal["pool", "last"] = "pool"  # classify mean and max of the states, or the last
    orthogonal: bool = True  # start W_hh orthogonal: then W_hh h is as long as h
    dropout: float = 0.0  # share of what the classifier sees that is zeroed in training
    epochs: int = 16  # passes over the training split
    batch_size: int = 256  # images in one gradient step
    lr: float = 3e-3  # peak learning rate: it rises to this, then falls to zero
    clip_norm: float = 1.0  # a longer gradient is scaled down to this length
    ema: float = 0.06  # the weights' running mean over this share of the steps is scored; 0: none
    weight_decay: float = 0.01  # AdamW's pull of the weights towards zero
    label_smoothing: float = 0.05  # share of each target spread over all ten classes
    mirror: bool = True  # mirror images left to right at random in training
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products in training
    seed: int = 0  # of the split, the weights, the batches and what is random in training
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else the CPU
    data_dir: Path = Path("data")  # where Fashion-MNIST lies, or is downloaded to
    images_dir: Path = Path("images")  # where the figures go
    seeds: int = 1  # runs, with seed, seed + 1, ...; several end with mean and standard deviation
    save: Path | None = None  # file for the trained net
    load: Path | None = None  # file of a saved net, to score it instead of training one

    def __post_init__(self) -> None:
        limits = {
            "hidden_size": (1, 16384), "encoder_size": (2, 16384), "batch_size": (1, 55_000),
            "epochs": (1, 100_000), "context": (0, 27), "seed": (0, 2**32 - 1), "seeds": (1, 1000),
            "lr": (1e-9, math.inf), "clip_norm": (1e-9, math.inf), "weight_decay": (0, math.inf),
            "dropout": (0, 0.99), "label_smoothing": (0, 0.99), "ema": (0, 1),
        }  # fmt: skip
        check_fields(self, limits)
        if self.load and (self.save or self.seeds > 1):
            raise UserError("load trains nothing: it cannot go with save or seeds")


# ------------------------------------------- model -------------------------------------------- #
# A cell: from p = W_ih x_t + b_ih (B, G H), G blocks of weights, and h, c (B, H) to the next h, c.


def tanh_cell(p: Tensor, h: Tensor, c: Tensor, W_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    """Elman 1990."""
    return torch.tanh(p + F.linear(h, W_hh, b_hh)), c


def gru_cell(p: Tensor, h: Tensor, c: Tensor, W_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    """Cho et al. 2014, but with the reset gate after the product, as in PyTorch: r (W h + b)."""
    p_r, p_z, p_n = p.chunk(3, 1)
    q_r, q_z, q_n = F.linear(h, W_hh, b_hh).chunk(3, 1)
    r = torch.sigmoid(p_r + q_r)  # reset: how much of h the candidate n sees
    z = torch.sigmoid(p_z + q_z)  # update: how much of h stays
    n = torch.tanh(p_n + r * q_n)
    return (1 - z) * n + z * h, c


def lstm_cell(p: Tensor, h: Tensor, c: Tensor, W_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000."""
    i, f, g, o = (p + F.linear(h, W_hh, b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # forget some, add some
    return torch.sigmoid(o) * torch.tanh(c), c


class RecurrentLayer(nn.Module):
    """torch.nn.RNN, GRU or LSTM of one layer and direction, with their parameter names.

    The state starts at zero (or `state`) in every call: nothing goes on to the next batch. Shapes:
    x (T, B, input_size) -> output (T, B, H) and the last h_n (1, B, H), for the LSTM (h_n, c_n).
    """

    def __init__(self, input_size: int, hidden_size: int, cell: str = "tanh") -> None:
        super().__init__()
        self.cell, G = {"tanh": (tanh_cell, 1), "gru": (gru_cell, 3), "lstm": (lstm_cell, 4)}[cell]
        self.weight_ih_l0 = nn.Parameter(torch.empty(G * hidden_size, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(G * hidden_size, hidden_size))
        self.bias_ih_l0 = nn.Parameter(torch.empty(G * hidden_size))
        self.bias_hh_l0 = nn.Parameter(torch.empty(G * hidden_size))
        for parameter in self.parameters():  # as PyTorch starts them
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))

    def forward(self, x: Tensor, state: Tensor | tuple | None = None) -> tuple:
        W_hh, b_hh, is_lstm = self.weight_hh_l0, self.bias_hh_l0, self.cell is lstm_cell
        h = c = x.new_zeros(x.shape[1], W_hh.shape[1])  # (B, H)
        if state is not None:
            h, c = (state[0][0], state[1][0]) if is_lstm else (state[0], None)
        p = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)  # (T, B, G H): all steps at once
        output = []
        for p_t in p:
            h, c = self.cell(p_t, h, c, W_hh, b_hh)
            output.append(h)
        return torch.stack(output), (h[None], c[None]) if is_lstm else h[None]


class RowRNN(nn.Module):
    """Encode an image's rows, read them, classify the states: (B, 28, 28) -> logits (B, 10)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, E, H = config, config.encoder_size, config.hidden_size
        self.rows = config.rows_per_step + 2 * config.context  # that a step sees
        self.encoder = nn.Sequential(nn.Linear(28 * self.rows, E), nn.LayerNorm(E), nn.ReLU())
        directions = 1 + config.bidirectional  # down, and up
        self.rnns = nn.ModuleList(RecurrentLayer(E, H, config.cell) for _ in range(directions))
        for rnn in self.rnns if config.orthogonal else []:
            for W in rnn.weight_hh_l0.detach().split(H):  # of each gate
                nn.init.orthogonal_(W)
        features = H * directions * (2 if config.readout == "pool" else 1)
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(features, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = F.pad(images, (0, 0, self.config.context, self.config.context))  # zero is the mean
        x = x.unfold(1, self.rows, self.config.rows_per_step)  # (B, T, 28, rows)
        x = self.encoder(x.permute(1, 0, 3, 2).flatten(2))  # (T, B, E): time comes first
        h = [rnn(x.flip(0) if up else x)[0] for up, rnn in enumerate(self.rnns)]  # (T, B, H) each
        if self.config.readout == "last":
            return self.classifier(torch.cat([s[-1] for s in h], 1))  # (B, 10)
        return self.classifier(torch.cat([s.mean(0) for s in h] + [s.amax(0) for s in h], 1))


# -------------------------------------------- data -------------------------------------------- #
# The splits on the device: normalised images (N, 28, 28), labels (N,); training pixels' mean, std.
Data = namedtuple("Data", "name class_names mean std train_images train_labels val_images "
                  "val_labels test_images test_labels")  # fmt: skip


def load_data(config: Config, device: torch.device) -> Data:
    """Read the dataset, split it by the seed into training and validation, normalise it."""
    name, class_names, images, labels, test_images, test_labels = read_dataset(config.data_dir)
    n_val = min(5000, len(images) // 7)
    if config.batch_size > len(images) - n_val:
        raise UserError(f"batch_size is {config.batch_size}: {name} has only {len(images) - n_val}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    train, val = order[:-n_val].to(device), order[-n_val:].to(device)
    images, labels = images.to(device), labels.to(device)
    pixels = images[train].float()
    std, mean = (x.item() for x in torch.std_mean(pixels))  # of the training split only
    return Data(
        name, class_names, mean, std, pixels.sub_(mean).div_(std), labels[train],
        (images[val] - mean) / std, labels[val],
        (test_images.to(device) - mean) / std, test_labels.to(device),
    )  # fmt: skip


# ------------------------------------------ training ------------------------------------------ #
# How an epoch ended; both losses are mean cross-entropies in nats, without label smoothing.
Epoch = namedtuple("Epoch", "train_loss val_loss val_accuracy seconds")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear up to `peak` over the first fifth of the steps, then linear down towards zero."""
    return peak * min(1.0, (step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))


def mirror(x: Tensor) -> Tensor:
    """Each of the images x (B, 28, 28) mirrored left to right with probability 1/2."""
    return torch.where(torch.rand(len(x), 1, 1, device=x.device) < 0.5, x.flip(2), x)


def train_epoch(model: nn.Module, data: Data, config: Config, adamw: AdamW, epoch: int) -> Tensor:
    """One pass over the training split in random batches; returns each step's loss, (steps,)."""
    n, device = len(data.train_labels), data.train_labels.device
    steps = n // config.batch_size  # the ragged last batch waits for another epoch's shuffle
    order = torch.randperm(n, device=device)[: steps * config.batch_size]
    batches = tqdm(order.split(config.batch_size), f"epoch {epoch}", leave=False, disable=None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    losses = []  # kept on the device: to look at one, the CPU would wait for the GPU in every step
    model.train()
    for step, batch in enumerate(batches, start=(epoch - 1) * steps):
        adamw.param_groups[0]["lr"] = learning_rate(step, config.epochs * steps, config.lr)
        images, labels = data.train_images[batch], data.train_labels[batch]  # (B, 28, 28), (B,)
        images = mirror(images) if config.mirror else images
        with autocast:
            logits = model(images).float()  # (B, 10)
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        adamw.step()  # then its hook, set in `train`, moves the running mean
        losses.append(F.cross_entropy(logits.detach(), labels))
    return torch.stack(losses).cpu()  # here the CPU waits for the GPU


def train(model: nn.Module, data: Data, config: Config) -> list[Epoch]:
    """Fit `model` with AdamW, load what validated best; Ctrl-C ends it with fewer epochs."""
    adamw = AdamW(model.parameters(), weight_decay=config.weight_decay, fused=True)  # lr: each step
    decay = 1 - 1 / max(1, config.ema * config.epochs * len(data.train_labels) / config.batch_size)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    adamw.register_step_post_hook(lambda *_: ema.update_parameters(model))  # after each step
    history, best, start = [], (-1.0, 0.0), time.perf_counter()
    print("epoch  train loss  val loss  val accuracy         lr  seconds")
    for epoch in range(1, config.epochs + 1):
        try:
            losses = train_epoch(model, data, config, adamw, epoch)
            logits = predict(ema.module, data.val_images)
        except KeyboardInterrupt:
            if not history:
                raise
            break
        train_loss, val_loss = losses.mean().item(), F.cross_entropy(logits, data.val_labels).item()
        if not math.isfinite(train_loss + val_loss):
            step = losses.isfinite().sum()
            raise UserError(f"loss NaN or infinite after step {step} of epoch {epoch}: lower lr")
        val_accuracy = (logits.argmax(1) == data.val_labels).float().mean().item()
        if (val_accuracy, -val_loss) > best:  # among equals the lower loss
            best, weights = (val_accuracy, -val_loss), copy.deepcopy(ema.module.state_dict())
        history.append(Epoch(train_loss, val_loss, val_accuracy, time.perf_counter() - start))
        row = f"{epoch:5d}  {train_loss:10.4f}  {val_loss:8.4f}  {val_accuracy:12.4f}  "
        print(f"{row}{adamw.param_groups[0]['lr']:9.2e}  {history[-1].seconds:7.1f}")
    model.load_state_dict(weights)
    return history


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 10) of `model` in evaluation mode for images (N, 28, 28), in order."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(5000)])


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


def main(config: Config, draw: bool = True) -> dict:
    """Train, score the test set once, draw, return the results; after Ctrl-C, raise at the end."""
    if config.load:
        return use_saved_net(config)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    check_writable(config.images_dir / "part2", config.save)  # now, not after minutes of training
    data = load_data(config, device)
    model = RowRNN(config).to(device)
    sizes = f"{len(data.train_labels):,} training, {len(data.val_labels):,} validation"
    print(f"{data.name}: {sizes}, {len(data.test_labels):,} test images", end="; ")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; device {device}")
    history = train(model, data, config)
    probabilities = predict(model, data.test_images).softmax(1)  # once: nothing is chosen by it
    results = score(data.test_labels, probabilities.argmax(1), data.class_names)
    results |= {"dataset": data.name, "probabilities": probabilities, "history": history}
    results |= {"epochs_run": len(history), "train_seconds": history[-1].seconds}
    results["val_accuracy"] = max(epoch.val_accuracy for epoch in history)
    stopped = len(history) < config.epochs
    note = f", stopped after epoch {len(history)} of {config.epochs}" if stopped else ""
    print(f"\n{data.name}, test set{note}\n{results['report']}")
    if config.save:
        save_net(model, data, config, note)
    if draw:
        draw_figures(model, data, results, config, note)
    if stopped:
        raise KeyboardInterrupt  # all is scored and drawn
    if config.seeds > 1:
        results["runs"] = repeat(config, results)
    return results


# ============= The lesson ends here. Below: figures, saved nets, downloads, errors. ============= #


def draw_figures(model: RowRNN, data: Data, results: dict, config: Config, note: str) -> None:
    """Draw every figure; those of a stand-in for the dataset never replace the real ones."""
    title = f"{data.name}, {config.cell} cell: test accuracy {results['accuracy']:.2%}{note}"
    figures = {
        "training_curves": curves_figure(results["history"], title),
        "confusion_matrix": confusion_figure(results["confusion_matrix"], data.class_names, title),
        "belief_by_row": belief_figure(model, data, results["probabilities"], title),
        "gradient_by_step": gradient_figure(model, data, config, title),
    }
    folder = config.images_dir / ("" if data.name == DATASET else "offline")
    for name, figure in figures.items():
        save_figure(figure, folder / f"part2_{name}.png")


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


def curves_figure(history: list[Epoch], title: str) -> Figure:
    """Losses and validation accuracy by epoch, with the epoch that was kept."""
    figure, (left, right) = new_figure(title, (10, 4), 1, 2)
    train_loss, val_loss, val_accuracy, _ = np.array(history).T
    epochs, kept = range(1, len(history) + 1), np.lexsort((-val_loss, val_accuracy))[-1] + 1
    left.plot(epochs, train_loss, "o-", label="training, in the epoch")
    left.plot(epochs, val_loss, "o-", label="validation, after it")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
    right.plot(epochs, 100 * val_accuracy, "o-C1", label="validation")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
    for axes in (left, right):
        axes.axvline(kept, color="grey", linestyle=":", label="epoch kept")
        axes.legend()
    return figure


@torch.no_grad()
def belief_figure(model: RowRNN, data: Data, probabilities: Tensor, title: str) -> Figure:
    """The class probabilities after each step: two test images, and the two worst mistakes."""
    confidence, answers = probabilities.max(1)
    mistakes = (confidence * (answers != data.test_labels)).argsort(descending=True)[:2]
    figure, grid = new_figure(title, (10, 10.5), 4, 2, width_ratios=[1, 2.6])
    ends = range(model.config.rows_per_step, 29, model.config.rows_per_step)
    for (left, right), i in zip(grid, [0, 5, *mistakes.tolist()], strict=True):
        image = data.test_images[i : i + 1]  # (1, 28, 28), cut below: no looking ahead
        belief = torch.cat([model(image[:, :end]) for end in ends]).softmax(1)  # (T, 10)
        left.imshow(image[0].numpy(force=True), cmap="gray")
        true, said = data.class_names[data.test_labels[i]], data.class_names[answers[i]]
        left.set(title=f"true: {true}\nsaid: {said}", xticks=[], yticks=[])
        shown = right.imshow(belief.T.numpy(force=True), vmin=0, vmax=1, extent=(0, 28, 9.5, -0.5))
        right.set(xlabel="rows read", aspect="auto", yticks=range(10), yticklabels=data.class_names)
    figure.colorbar(shown, ax=grid, label="probability", shrink=0.5)
    return figure


@torch.enable_grad()  # Ctrl-C inside the optimizer can leave it off
def gradient_by_step(model: RowRNN, data: Data) -> np.ndarray:
    """(T,) mean over 500 validation images of |dL/d pixels| of each step's own rows."""
    images = data.val_images[:500].clone().requires_grad_()
    loss = F.cross_entropy(model.eval()(images), data.val_labels[:500], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)  # (500, 28, 28)
    gradient = gradient.view(len(gradient), -1, 28 * model.config.rows_per_step)  # (500, T, pixels)
    return gradient.norm(dim=2).mean(0).numpy(force=True)


def gradient_figure(model: RowRNN, data: Data, config: Config, title: str) -> Figure:
    """`gradient_by_step` of the net, and of untrained ones that read out the last state alone."""
    figure, axes = new_figure(f"{title}\ngradient by row; untrained nets: last state read", (10, 5))
    last = replace(config, readout="last", bidirectional=False, orthogonal=False)
    nets = {f"trained {config.cell}, readout {config.readout}": model}
    nets["tanh, W_hh orthogonal"] = RowRNN(replace(last, cell="tanh", orthogonal=True))
    cell = {"tanh": "tanh", "GRU": "gru", "LSTM": "lstm", "LSTM, forget bias 1": "lstm"}
    nets |= {name: RowRNN(replace(last, cell=cell[name])) for name in cell}
    nets["LSTM, forget bias 1"].rnns[0].bias_hh_l0.detach().chunk(4)[1].fill_(1)
    for name, net in nets.items():
        norms = gradient_by_step(net.to(data.val_images.device), data)
        label = f"{name}: first over last {norms[0] / norms[-1]:.1e}"
        axes.plot(range(1, len(norms) + 1), norms, "o-", markersize=4, label=label)
    axes.set(xlabel="step t, from the top down", ylabel="mean norm of dL/d(row t)", yscale="log")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def repeat(config: Config, first: dict) -> list[dict]:
    """Run `main` with the next seeds too; print the scores of each, their mean and deviation."""
    runs = [first]
    try:
        for seed in range(config.seed + 1, config.seed + config.seeds):
            runs.append(main(replace(config, seed=seed % 2**32, seeds=1, save=None), draw=False))
    finally:  # what is finished is told even if a later run is not
        print(f"\n{first['dataset']}, {len(runs)} seeds from {config.seed}: mean +- std (each)")
        for name in ("val_accuracy", "accuracy", "f1", "train_seconds"):
            x = np.array([run[name] for run in runs]) * (1 if name == "train_seconds" else 100)
            each = ", ".join(f"{value:.2f}" for value in x)
            print(f"{name:13}  {x.mean():.2f} +- {x.std(ddof=len(runs) > 1):.2f}  ({each})")
    return runs


def save_net(model: nn.Module, data: Data, config: Config, note: str) -> None:
    """Write the net with all that is needed to use it; a stand-in's never replaces a real one."""
    saved = {"net": {name: getattr(config, name) for name in NET}, "weights": model.state_dict()}
    saved |= {"dataset": data.name, "class_names": data.class_names, "note": note}
    torch.save(saved | {"mean": data.mean, "std": data.std}, content := io.BytesIO())
    name = config.save.name if data.name == DATASET else f"offline-{config.save.name}"
    print(f"saved {write_whole(config.save.with_name(name), content.getvalue())}")


def use_saved_net(config: Config) -> dict:
    """Score the net in the file `config.load` again; this runs no code from the file."""
    try:
        if zipfile.ZipFile(config.load).testzip():  # torch.load does not look at the checksums
            raise ValueError("its checksum is wrong")
        saved = torch.load(config.load, map_location="cpu", weights_only=True)
        config = replace(config, **saved["net"])  # with the seed, and so the same splits
        model = RowRNN(config)
        model.load_state_dict(saved["weights"])
        print(f"{config.load}: {saved['net']}, trained on {saved['dataset']}{saved['note']}")
    except Exception as error:  # there is no end to what a strange file can cause
        raise UserError(f"{config.load} is no net that was saved here: {error!r:.150}") from None
    data = load_data(config, pick_device(config.device))
    if data.name != saved["dataset"]:
        raise UserError(f"this net needs {saved['dataset']}, but here is {data.name}")
    answers = predict(model.to(data.test_images.device), data.test_images).argmax(1)
    results = score(data.test_labels, answers, data.class_names) | {"dataset": data.name}
    print(f"\n{data.name}, test set{saved['note']}\n{results['report']}")
    return results


DATASET, CLASS_NAMES = "FashionMNIST", ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
CLASS_NAMES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
NET = ["cell", "hidden_size", "bidirectional", "rows_per_step", "context", "encoder_size"]
NET += ["readout", "seed"]  # settings that a saved net brings with it
MIRRORS = [
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # torchvision's own
    "https://dataset.bj.bcebos.com/fashion_mnist/",  # PaddlePaddle's: reachable from mainland China
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
]
MD5 = {  # of the unpacked files; MNIST's bear the same names, so only this tells them apart
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
# The rest is the same in parts 1 and 2, from `UserError` on in part 3 as well: see test_standalone.


def read_file(path: Path, md5: str) -> bytes | None:
    """The file of this MD5 from `path`, its .gz or a mirror; None if it is out of reach."""
    here = [file.resolve().as_uri() for file in path.parent.glob(f"{path.name}*")]
    for source in [*here, *(f"{mirror}{path.name}.gz" for mirror in MIRRORS)]:
        try:
            content = urllib.request.urlopen(source, timeout=8).read()
            content = gzip.decompress(content) if source.endswith(".gz") else content
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise ValueError("not the right file: its MD5 differs")
        except Exception as error:  # there is no end to what a mirror or a proxy can answer
            print(f"{source} failed: {error!r:.150}", file=sys.stderr)
        else:
            if source not in here:
                print(f"downloaded {source}", file=sys.stderr)
                write_whole(path, content)
            return content
    if here:
        raise UserError(f"{path} is damaged, and no mirror could replace it")


def read_dataset(data_dir: Path) -> tuple[str, list[str], Tensor, Tensor, Tensor, Tensor]:
    """Name, class names, images (N, 28, 28) uint8 and labels (N,) int64, test images and labels."""
    tensors = []
    for name, md5 in MD5.items():  # IDX: a header of 16 or 8 bytes, then one byte a pixel or label
        if (content := read_file(data_dir / DATASET / "raw" / name, md5)) is None:
            break
        flat = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        tensors.append(flat[16:].view(-1, 28, 28) if "images" in name else flat[8:].long())
    else:
        return DATASET, CLASS_NAMES, *tensors
    print(f"\n*** WARNING: {DATASET} is not in {data_dir}, and no mirror was reached: 8x8 digits"
          "\n*** of scikit-learn stand in. Figures go to offline/.\n", file=sys.stderr)  # fmt: skip
    digits = load_digits()
    small = torch.tensor(digits.images)[:, None] * (255 / 16)  # (1797, 1, 8, 8)
    images = F.interpolate(small, size=(28, 28), mode="bilinear")[:, 0].round().byte()
    labels, names = torch.tensor(digits.target).long(), list("0123456789")
    return "sklearn-digits", names, images[:1497], labels[:1497], images[1497:], labels[1497:]


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
