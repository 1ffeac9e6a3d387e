"""A hand-rolled tanh RNN that reads Fashion-MNIST images row by row.

An image is a sequence of 28 rows of 28 pixels. A small linear layer encodes each row as x_t, and
the recurrent layer carries one state h through the picture, from the top row to the bottom row:

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

The mean and the maximum of h over the rows then give one score (logit) for each kind of clothing.

    python part2_rnn_fashion.py            # train, score, draw
    python part2_rnn_fashion.py --seeds 5  # five times: mean and standard deviation
    python part2_rnn_fashion.py --help     # every setting below, as a flag

Expect 90.38 +- 0.18 % on the test set (seeds 0 to 4), 115 s of training on two AMD Zen 5 cores.
The lesson ends with `main`; below it stand figures, saved nets, downloads and errors.

References: Elman 1990 (the layer); Pascanu, Mikolov & Bengio 2013 (vanishing gradients); Le, Jaitly
& Hinton 2015 (images as sequences).
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import signal
import sys
import time
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import matplotlib.style
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay, classification_report
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    hidden_size: int = 256  # numbers in the state h
    num_layers: int = 1  # recurrent layers, one on top of the other
    bidirectional: bool = False  # also read from the bottom row to the top row
    rows_per_step: Literal[1, 2, 4, 7, 14, 28] = 1  # rows read in a step; 28: no sequence at all
    context: int = 0  # rows above and below these that a step sees as well
    encoder_size: int = 128  # numbers that each step's pixels are first encoded as
    readout: Literal["pool", "last"] = "pool"  # classify mean and max of the states, or the last
    orthogonal: bool = True  # start W_hh orthogonal: then W_hh h is as long as h
    dropout: float = 0.0  # share of what the classifier sees that is zeroed in training
    epochs: int = 16  # passes over the training split
    batch_size: int = 256  # images in one gradient step
    lr: float = 4e-3  # peak learning rate: it rises to this, then falls to zero
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
        """Raise ValueError with field, value and what is allowed, before anything is done."""
        limits = {
            "hidden_size": (1, 16384), "num_layers": (1, 64), "encoder_size": (2, 16384),
            "context": (0, 27), "dropout": (0, 0.99), "epochs": (1, 100_000), "lr": (1e-12, 1e30),
            "batch_size": (1, 55_000), "weight_decay": (0, 1e30), "label_smoothing": (0, 0.99),
            "seed": (0, 2**32 - 1), "seeds": (1, 1000),
        }  # fmt: skip
        check_fields(self, limits)
        if self.load and (self.save or self.seeds > 1):
            raise UserError("load trains nothing: it cannot go with save or seeds")


# ------------------------------------------- model -------------------------------------------- #


class TanhRNN(nn.Module):
    """A drop-in for torch.nn.RNN, with its arguments and parameter names, written by hand.

    The state starts at zero (or h_0) in every call: the steps of one image belong together, but the
    images of two batches do not, so nothing is carried from one batch to the next.

    Shapes: x (T, B, input_size), h_0 (num_layers * directions, B, hidden_size)
        -> output (T, B, directions * hidden_size), h_n like h_0
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.directions = ("", "_reverse") if bidirectional else ("",)
        bound = 1 / math.sqrt(hidden_size)  # torch.nn.RNN's start: uniform within +- bound
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size * len(self.directions)
            shapes = {"weight_ih": (hidden_size, width), "weight_hh": (hidden_size, hidden_size)}
            shapes |= {"bias_ih": (hidden_size,), "bias_hh": (hidden_size,)}
            for direction in self.directions:
                for name, shape in shapes.items():
                    start = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
                    self.register_parameter(f"{name}_l{layer}{direction}", start)

    def forward(self, x: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        T, B, _ = x.shape
        h_n = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in self.directions:
                end = f"_l{layer}{direction}"
                W_ih, W_hh = getattr(self, "weight_ih" + end), getattr(self, "weight_hh" + end)
                b_ih, b_hh = getattr(self, "bias_ih" + end), getattr(self, "bias_hh" + end)
                # The input's half needs no h: one product for all the steps, then cut into steps.
                p = F.linear(x, W_ih, b_ih + b_hh).unbind(0)  # T times (B, H)
                h = p[0].new_zeros(B, self.hidden_size) if h_0 is None else h_0[len(h_n)]
                states = [h] * T  # overwritten below
                for t in reversed(range(T)) if direction else range(T):
                    h = torch.tanh(p[t] + h @ W_hh.T)  # (B, H)
                    states[t] = h
                outputs.append(torch.stack(states))  # (T, B, H)
                h_n.append(h)
            x = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]  # (T, B, directions H)
        return x, torch.stack(h_n)


class RowRNN(nn.Module):
    """Encode the rows of an image, read them with a TanhRNN, classify what it has seen.

    Shapes: (B, R, 28), R a multiple of rows_per_step (28 for a whole image) -> logits (B, 10)
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.rows_per_step, self.context = config.rows_per_step, config.context
        self.readout, E, H = config.readout, config.encoder_size, config.hidden_size
        self.rows = config.rows_per_step + 2 * config.context  # that a step sees
        self.encoder = nn.Sequential(nn.Linear(28 * self.rows, E), nn.LayerNorm(E), nn.ReLU())
        self.rnn = TanhRNN(E, H, config.num_layers, config.bidirectional)
        for name, parameter in self.rnn.named_parameters():
            if config.orthogonal and name.startswith("weight_hh"):
                nn.init.orthogonal_(parameter)
        features = H * len(self.rnn.directions) * (2 if config.readout == "pool" else 1)
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(features, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = F.pad(images, (0, 0, self.context, self.context))  # zero is the mean
        x = x.unfold(1, self.rows, self.rows_per_step)  # (B, T, 28, rows)
        x = x.permute(1, 0, 3, 2).flatten(2)  # (T, B, 28 rows): time comes first
        output, h_n = self.rnn(self.encoder(x))  # (T, B, D): the state after each step
        if self.readout == "pool":
            seen = torch.cat([output.mean(0), output.amax(0)], 1)  # (B, 2 D)
        else:  # the last state of each direction of the last layer
            seen = torch.cat(list(h_n[-len(self.rnn.directions) :]), 1)  # (B, D)
        return self.classifier(seen)  # (B, 10)


# -------------------------------------------- data -------------------------------------------- #


class Data(NamedTuple):
    """The three splits on the device: images (N, 28, 28), normalised; labels (N,) int64."""

    name: str
    class_names: list[str]
    mean: float  # of the training split's pixels, 0 to 255
    std: float
    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(data_dir: Path, seed: int, device: torch.device) -> Data:
    """Read the dataset, split it by `seed` into training, validation and test, and normalise it.

    60,000 training images are split 55,000 / 5,000. Where the dataset cannot be had, scikit-learn's
    digits stand in, and the name says so.
    """
    name, class_names, images, labels, test_images, test_labels = read_dataset(data_dir)
    n_val = min(5000, len(images) // 7)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, val = order[:-n_val].to(device), order[-n_val:].to(device)
    images, labels = images.to(device), labels.to(device)
    pixels = images[train].to(torch.get_default_dtype())
    std, mean = (x.item() for x in torch.std_mean(pixels))  # of the training split alone
    return Data(
        name, class_names, mean, std,
        pixels.sub_(mean).div_(std), labels[train],
        (images[val] - mean) / std, labels[val],
        (test_images.to(device) - mean) / std, test_labels.to(device),
    )  # fmt: skip


# ------------------------------------------ training ------------------------------------------ #


class Training(NamedTuple):
    """Where training stands after an epoch: one record, which Ctrl-C finds whole or not at all."""

    losses: list[float]  # by step: cross-entropy of the batch before the step, without smoothing
    val_loss: float
    val_accuracy: float
    seconds: float  # since the start
    weights: dict[str, Tensor]  # emptied where another epoch is the best


def best(history: list[Training]) -> int:
    """The index of the highest validation accuracy; among equals, of the lowest loss."""
    return max(range(len(history)), key=lambda i: (history[i].val_accuracy, -history[i].val_loss))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear up to `peak` over the first fifth of the steps, then linear down towards zero."""
    return peak * min(1.0, (step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))


def train(model: nn.Module, data: Data, config: Config, history: list[Training]) -> None:
    """Fit `model` with AdamW; each epoch is added to `history`, the best one's weights are loaded.

    Raises UserError if the loss becomes NaN or infinite, or a batch is larger than the split.
    """
    n, device = len(data.train_images), data.train_images.device
    steps = n // config.batch_size  # the ragged last batch waits for another epoch's shuffle
    if steps == 0:
        raise UserError(f"batch_size is {config.batch_size}, but there are {n} training images")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    start = time.perf_counter()
    print("epoch  train loss  val loss  val accuracy         lr  seconds")
    for epoch in range(1, config.epochs + 1):
        model.train()
        order = torch.randperm(n, device=device)[: steps * config.batch_size]
        batches = tqdm(order.split(config.batch_size), f"epoch {epoch}", leave=False, disable=None)
        losses = []  # stay on the device: to look at one would make a GPU wait
        for step, batch in enumerate(batches, start=(epoch - 1) * steps):
            lr = learning_rate(step, config.epochs * steps, config.lr)
            optimizer.param_groups[0]["lr"] = lr
            images, labels = data.train_images[batch], data.train_labels[batch]  # (B, 28, 28), (B,)
            images = mirror(images) if config.mirror else images
            with autocast:
                logits = model(images).float()  # (B, 10)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(F.cross_entropy(logits.detach(), labels))

        losses = torch.stack(losses).tolist()  # here the CPU waits for the GPU, once an epoch
        logits = predict(model, data.val_images)
        val_loss = F.cross_entropy(logits, data.val_labels).item()
        val_accuracy = (logits.argmax(1) == data.val_labels).float().mean().item()
        if not math.isfinite(sum(losses) + val_loss):
            step = np.isfinite([*losses, val_loss]).argmin() + 1  # validation counts as one more
            what = f"the loss became NaN or infinite in epoch {epoch}, step {step}"
            raise UserError(f"{what}: try a lower learning rate than lr = {config.lr:g}")
        seconds = time.perf_counter() - start
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        history.append(Training(losses, val_loss, val_accuracy, seconds, weights))
        for i, other in enumerate(history):
            if i != best(history):
                other.weights.clear()
        row = f"{epoch:5d}  {np.mean(losses):10.4f}  {val_loss:8.4f}  {val_accuracy:12.4f}  "
        print(f"{row}{lr:9.2e}  {seconds:7.1f}")
    model.load_state_dict(history[best(history)].weights)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 10) of `model` in evaluation mode for images (N, 28, 28), in order."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(5000)])


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


@torch.enable_grad()  # Ctrl-C inside the optimizer may have left it off
@matplotlib.style.context("default")  # whatever the matplotlibrc on this machine says
def report(
    model: RowRNN, data: Data, config: Config, history: list[Training], note: str, draw: bool
) -> dict:
    """Score the net on the test set, save it and its figures where wanted, print the table."""
    probabilities = predict(model, data.test_images).softmax(1)  # the one look at the test set
    results = score(data.test_labels, probabilities.argmax(1), data.class_names)
    results |= {"dataset": data.name, "epochs_run": len(history), "train_seconds": 0.0}
    if history:
        results["train_seconds"] = history[-1].seconds
        results["val_accuracy"] = history[best(history)].val_accuracy
    results["parameters"] = sum(p.numel() for p in model.parameters())
    title = f"{data.name}, tanh RNN: test accuracy {results['accuracy']:.2%}{note}"
    if draw:
        matrices = {"": results["confusion_matrix"]}
        figures = {"training_curves": curves_figure(history, title)} if history else {}
        figures["confusion_matrix"] = confusion_figure(matrices, data.class_names, title)
        figures["mistakes"] = mistakes_figure(data, probabilities, title)
        figures["belief_by_row"] = belief_figure(model, data, title)
        figures["gradient_by_step"] = gradient_figure(model, data, config, title)
        for name, figure in figures.items():
            save_figure(figure, config.images_dir / f"part2_{name}.png")
    if config.save:
        save_net(model, data, config, history, note)
    print(f"\n{data.name}, test set{note}\n{results['report']}")
    return results


# -------------------------------------------- main -------------------------------------------- #


def main(config: Config, draw: bool = True) -> dict:
    """Train, score the test set once, draw; returns the results as a dict.

    After Ctrl-C the best epoch so far is scored and drawn, then KeyboardInterrupt is raised again.
    """
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    check_writable(config.images_dir / "part2.png" if draw else None)  # before training
    check_writable(config.save)
    model = RowRNN(config)
    saved = load_net(model, config)  # {} without --load
    data = load_data(config.data_dir, saved.get("seed", config.seed), device)
    if data.name != saved.get("dataset", data.name):
        raise UserError(f"{config.load} was trained on {saved['dataset']}, but here is {data.name}")
    if data.name != DATASET.__name__:  # a stand-in's figures never replace the real ones
        config = replace(config, images_dir=config.images_dir / "offline")
    counts = (f"{len(x):,}" for x in (data.train_labels, data.val_labels, data.test_labels))
    print("{}: {} training, {} validation, {} test images".format(data.name, *counts), end="; ")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; device {device}")
    history: list[Training] = []
    try:
        if not config.load:
            train(model.to(device), data, config, history)
        results = report(model.to(device), data, config, history, saved.get("note", ""), draw)
    except KeyboardInterrupt:
        if history:
            model.load_state_dict(history[best(history)].weights)
            note = f", interrupted after epoch {len(history)}"
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"{data.name}{note}: the best so far is scored", file=sys.stderr)
            report(model, data, config, history, note, draw)
        raise
    if config.seeds > 1:
        results["runs"] = repeat(config, results)
    return results


# ============ The lesson ends here. Below: figures, saved nets, downloads, errors. ============== #


def mirror(images: Tensor) -> Tensor:
    """Each of the images (B, 28, 28) mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(images), 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(2), images)


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


def curves_figure(history: list[Training], title: str) -> Figure:
    """Losses and validation accuracy by epoch, with the epoch that was kept."""
    figure, (left, right) = new_figure(title, (10, 4), 1, 2)
    epochs = range(1, len(history) + 1)
    left.plot(epochs, [np.mean(h.losses) for h in history], "o-", label="training, in the epoch")
    left.plot(epochs, [h.val_loss for h in history], "o-", label="validation, after it")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
    right.plot(epochs, [100 * h.val_accuracy for h in history], "o-C1", label="validation")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
    for axes in (left, right):
        axes.axvline(best(history) + 1, color="grey", linestyle=":", label="epoch kept")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def mistakes_figure(data: Data, probabilities: Tensor, title: str) -> Figure:
    """The 18 wrong answers on the test set that the net was most certain of."""
    confidence, answers = probabilities.max(1)
    wrong = (answers != data.test_labels).nonzero().squeeze(1)
    worst = wrong[confidence[wrong].argsort(descending=True)][:18].tolist()
    title = f"{title}: {len(wrong)} wrong of {len(answers)}, the most confident"
    figure, grid = new_figure(title, (10, 7.1), 3, 6)
    for axes, i in zip(grid.flat, worst, strict=False):
        true, said = data.class_names[data.test_labels[i]], data.class_names[answers[i]]
        axes.imshow(data.test_images[i].numpy(force=True), cmap="gray")
        axes.set_title(f"true: {true}\nsaid: {said} ({confidence[i]:.1%})", fontsize=9)
    for axes in grid.flat:
        axes.axis("off")
    return figure


@torch.no_grad()
def belief_figure(model: RowRNN, data: Data, title: str) -> Figure:
    """Four test images, and the class probabilities after each step from the top row down."""
    figure, grid = new_figure(title, (10, 10.5), 4, 2, width_ratios=[1, 2.6])
    ends = range(model.rows_per_step, 29, model.rows_per_step)
    for (left, right), label in zip(grid, (9, 1, 8, 6), strict=True):
        image = data.test_images[data.test_labels == label][:1]  # (1, 28, 28)
        # Only the rows above an end are shown to the net, so it cannot look ahead.
        belief = torch.cat([model.eval()(image[:, :end]).softmax(1) for end in ends])  # (T, 10)
        left.imshow(image[0].numpy(force=True), cmap="gray")
        left.set(title=f"true: {data.class_names[label]}", ylabel="row")
        shown = right.imshow(belief.T.numpy(force=True), vmin=0, vmax=1, extent=(0, 28, 9.5, -0.5))
        right.set(xlabel="rows read, from the top", aspect="auto")
        right.set_yticks(range(10), data.class_names, fontsize=8)
    figure.colorbar(shown, ax=grid, label="probability", shrink=0.5)
    return figure


def gradient_by_step(model: RowRNN, data: Data) -> np.ndarray:
    """(T,) mean over 500 validation images of |dL/dx_t|, x_t the pixels of step t's own rows."""
    images = data.val_images[:500].clone().requires_grad_()
    loss = F.cross_entropy(model.eval()(images), data.val_labels[:500], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)  # (500, 28, 28)
    by_step = gradient.view(len(gradient), -1, 28 * model.rows_per_step)  # (500, T, pixels)
    return by_step.norm(dim=2).mean(0).numpy(force=True)


def gradient_figure(model: RowRNN, data: Data, config: Config, title: str) -> Figure:
    """`gradient_by_step` of the net, and of untrained ones that read out the last state alone."""
    title += "\nhow much the pixels of each step move the loss"
    figure, axes = new_figure(title, (10, 4.4))
    last, nets = replace(config, readout="last"), {"trained": model}
    nets["untrained"] = RowRNN(config)
    nets["untrained, last state read, W_hh orthogonal"] = RowRNN(replace(last, orthogonal=True))
    nets["untrained, last state read, W_hh random"] = RowRNN(replace(last, orthogonal=False))
    for name, net in nets.items():
        norms = gradient_by_step(net.to(data.val_images.device), data)
        name += f": first over last {norms[0] / norms[-1]:.1e}"
        axes.plot(range(1, len(norms) + 1), norms, "o-", markersize=4, label=name)
    axes.set(xlabel="step t, from the top row down", ylabel="mean norm of dL/dx_t", yscale="log")
    axes.legend()
    return figure


def repeat(config: Config, first: dict) -> list[dict]:
    """Run `main` with the next seeds too; print the scores of each, their mean and deviation."""
    runs = [first]
    try:
        for seed in range(config.seed + 1, config.seed + config.seeds):
            runs.append(main(replace(config, seed=seed % 2**32, seeds=1, save=None), draw=False))
            if runs[-1]["dataset"] != first["dataset"]:
                raise UserError(f"seed {seed} had {runs.pop()['dataset']}, not {first['dataset']}")
    finally:  # what is finished is told even if a later run is not
        print(f"\n{first['dataset']}, {len(runs)} seeds from {config.seed}: mean +- std (each)")
        for name in ("val_accuracy", "accuracy", "f1", "train_seconds"):
            values = [run[name] if name == "train_seconds" else 100 * run[name] for run in runs]
            each, std = ", ".join(f"{v:.2f}" for v in values), np.std(values, ddof=len(runs) > 1)
            print(f"{name:13}  {np.mean(values):.2f} +- {std:.2f}  ({each})")
    return runs


def save_net(
    model: nn.Module, data: Data, config: Config, history: list[Training], note: str
) -> None:
    """Write the weights to `config.save`, with all that is needed to use them again."""
    saved = {"net": {name: getattr(config, name) for name in NET}, "weights": model.state_dict()}
    saved |= {"seed": config.seed, "dataset": data.name, "class_names": data.class_names}
    saved |= {"mean": data.mean, "std": data.std, "note": note}
    saved["val_accuracy"] = history[best(history)].val_accuracy
    torch.save(saved, content := io.BytesIO())
    stand_in = "" if data.name == DATASET.__name__ else "offline-"  # never replaces a real net
    path = config.save.with_name(stand_in + config.save.name)
    write_whole(path, content.getvalue())
    print(f"the trained net is in {path}")


def load_net(model: nn.Module, config: Config) -> dict:
    """Fill `model` from `config.load`; returns all that `save_net` wrote there, {} if None.

    Raises UserError if the file is missing, damaged or of another net. It can run no code.
    """
    if config.load is None:
        return {}
    wanted = {name: getattr(config, name) for name in NET}
    try:
        if zipfile.ZipFile(config.load).testzip():  # torch.load does not look at the checksums
            raise ValueError("its checksum is wrong")
        saved = dict(torch.load(config.load, map_location="cpu", weights_only=True))
        keys = ("seed", "dataset", "class_names", "mean", "std", "note")
        found = {key: saved[key] for key in keys}
        if saved["net"] == wanted:
            model.load_state_dict(saved["weights"])
    except Exception as error:  # there is no end to what a strange file can cause
        raise UserError(f"{config.load} is no net that was saved here: {error!s:.150}") from None
    if saved["net"] != wanted:
        raise UserError(f"{config.load} is a net of {saved['net']}, the settings say {wanted}")
    return found


NET = ["hidden_size", "num_layers", "bidirectional", "rows_per_step", "context"]
NET += ["encoder_size", "readout"]  # settings that a saved net must share
DATASET = FashionMNIST
CLASS_NAMES = FashionMNIST.classes
MIRRORS = [
    *FashionMNIST.mirrors,  # torchvision's own
    "https://dataset.bj.bcebos.com/fashion_mnist/",  # PaddlePaddle's: reachable from mainland China
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
]
TIMEOUT = 8  # seconds that a mirror has; each 10 kB that arrives earns it one more
MD5 = {  # of the unpacked files; MNIST's bear the same names, so only this tells them apart
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


def download(url: str, md5: str) -> bytes:
    """The file with this MD5 whose .gz is at `url`; raises whatever a mirror or proxy can cause."""
    start, body = time.monotonic(), bytearray()
    with ThreadPool(1) as pool:  # urlopen's own timeout is blind to a name server that is silent
        answer = pool.apply_async(urllib.request.urlopen, (url, None, TIMEOUT)).get(TIMEOUT)
    while chunk := answer.read1(2**16):
        body += chunk
        if time.monotonic() - start > TIMEOUT + len(body) / 10_000 or len(body) > 2**26:
            raise TimeoutError("too slow, or too long")
    content = gzip.decompress(body)
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError("not the right file")
    return content


def fetch(data_dir: Path) -> dict[str, bytes] | None:
    """The dataset's files, checked, from `data_dir`; what is missing there is downloaded to it.

    Returns None if a file is missing and no mirror has it. Raises UserError if a file is damaged
    and cannot be replaced, or the folder cannot be written.
    """
    folder, files, mirrors = data_dir / DATASET.__name__ / "raw", {}, list(MIRRORS)
    for name, md5 in MD5.items():
        paths = folder / name, folder / f"{name}.gz"
        for path in paths:
            with contextlib.suppress(OSError, EOFError, zlib.error):  # missing, or no whole .gz
                content = b"" if name in files else path.read_bytes()
                content = gzip.decompress(content) if path.suffix == ".gz" else content
                if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
                    files[name] = content
        while name not in files and mirrors:
            print(f"downloading {mirrors[0]}{name}.gz", file=sys.stderr)
            try:
                content = download(f"{mirrors[0]}{name}.gz", md5)
            except Exception as error:  # there is no end to what a mirror or a proxy can answer
                print(f"{mirrors.pop(0)} failed: {error!r:.150}", file=sys.stderr)
                continue
            write_whole(folder / name, content)
            files[name] = content
        if name not in files and any(map(os.path.lexists, paths)):
            raise UserError(f"{paths[0]}: damaged or unreadable, and no mirror could replace it")
    return files if len(files) == len(MD5) else None


def read_dataset(data_dir: Path) -> tuple[str, list[str], Tensor, Tensor, Tensor, Tensor]:
    """Name, class names, images (N, 28, 28) uint8 and labels (N,) int64, test images and labels.

    Without the dataset and without a network they are scikit-learn's 1,797 digits of 8 x 8 pixels.
    """
    if files := fetch(data_dir):
        tensors = []
        for name in MD5:  # IDX: a header of 16 or 8 bytes, then one byte for each pixel or label
            flat = torch.frombuffer(bytearray(files[name]), dtype=torch.uint8)
            tensors.append(flat[16:].view(-1, 28, 28) if "images" in name else flat[8:].long())
        return DATASET.__name__, CLASS_NAMES, *tensors
    print(f"\n*** WARNING: {DATASET.__name__} is not in {data_dir}, and no mirror could be reached."
          f"\n*** This run uses scikit-learn's bundled 8x8 digits: its numbers say nothing about"
          f"\n*** {DATASET.__name__}. Its figures go to a folder of their own, offline/.\n",
          file=sys.stderr)  # fmt: skip
    digits, names = load_digits(), list("0123456789")
    small = torch.tensor(digits.images)[:, None]  # (1797, 1, 8, 8), 0..16
    large = F.interpolate(small, size=(28, 28), mode="bilinear")[:, 0]  # (1797, 28, 28)
    images, labels = large.mul(255 / 16).round().byte(), torch.tensor(digits.target).long()
    return "sklearn-digits", names, images[:1497], labels[:1497], images[1497:], labels[1497:]


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
