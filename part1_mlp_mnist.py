"""A multilayer perceptron on MNIST, written out by hand.

Each image of 28 x 28 pixels is laid out as one row x of 784 numbers. Every hidden layer computes,
from x or from the h of the layer below,

    h = dropout(relu(batch_norm(W x + b)))

and a last linear layer turns the final h into one score (logit) for each of the ten digits.

    python part1_mlp_mnist.py                                  # train, score, draw
    python part1_mlp_mnist.py --seeds 5                        # five times: mean +- deviation
    python part1_mlp_mnist.py --save mlp.pt                    # keep the net, then read a photo:
    python part1_mlp_mnist.py --load mlp.pt --predict 7.jpg    # --help lists every setting

Expect 98.71 +- 0.04 % on the test set (seeds 0 to 4), 7 s of training on two AMD Zen 5 cores.
The lesson ends with `main`; below it stand figures, saved nets, downloads and errors.

References: Rumelhart, Hinton & Williams 1986 (back-propagation); Ioffe & Szegedy 2015 (batch norm);
Srivastava et al. 2014 (dropout); Simard, Steinkraus & Platt 2003, section 2 (elastic distortion);
Loshchilov & Hutter 2019 (AdamW).
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
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay, classification_report
from torch import Tensor, nn
from torchvision.datasets import MNIST
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    hidden: tuple[int, ...] = (512, 512)  # widths of the hidden layers, (64,) for one, () for none
    dropout: float = 0.0  # share of hidden activations zeroed in training
    epochs: int = 6  # passes over the training split
    batch_size: int = 256  # images in one gradient step
    lr: float = 6e-3  # peak learning rate: it rises to this, then falls to zero
    weight_decay: float = 0.05  # AdamW's pull of the weights towards zero
    label_smoothing: float = 0.1  # share of each target spread over all ten classes
    augment: float = 0.0  # strength of the random affine and elastic warp; 0 is off, 1 is full
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products in training
    seed: int = 0  # of the split, the weights, the batches, dropout and the warp
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else the CPU
    data_dir: Path = Path("data")  # where MNIST lies, or is downloaded to
    images_dir: Path = Path("images")  # where the figures go
    seeds: int = 1  # runs, with seed, seed + 1, ...; several end with mean and standard deviation
    save: Path | None = None  # file for the trained net
    load: Path | None = None  # file of a saved net, to score it instead of training one
    predict: tuple[Path, ...] = ()  # pictures of digits, to be read by the loaded net

    def __post_init__(self) -> None:
        """Raise ValueError with field, value and what is allowed, before anything is done."""
        limits = {
            "hidden": (1, 65536), "dropout": (0, 0.99), "epochs": (1, 100_000),
            "batch_size": (2, 55_000), "lr": (1e-12, 1e30), "weight_decay": (0, 1e30),
            "label_smoothing": (0, 0.99), "augment": (0, 3), "seed": (0, 2**32 - 1),
            "seeds": (1, 1000),
        }  # fmt: skip
        check_fields(self, limits)
        if self.load and (self.save or self.seeds > 1):
            raise UserError("load trains nothing: it cannot go with save or seeds")
        if self.predict and not self.load:
            raise UserError("predict needs a trained net: name its file with --load")


# ------------------------------------------- model -------------------------------------------- #


class MLP(nn.Module):
    """A fully connected network; `hidden` holds the widths of its hidden layers.

    Shapes: (B, 28, 28) or (B, 784) -> logits (B, 10)
    """

    def __init__(self, hidden: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 784
        for n in hidden:
            layers += [nn.Linear(width, n), nn.BatchNorm1d(n), nn.ReLU(), nn.Dropout(dropout)]
            width = n
        self.layers = nn.Sequential(*layers, nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 784)  # (B, 28, 28) -> (B, 784): from here on, no pixel has neighbours
        return self.layers(x)  # (B, 10)


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
            images = augment(data.train_images[batch], config.augment)  # (B, 28, 28)
            labels = data.train_labels[batch]
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
    model: MLP, data: Data, config: Config, history: list[Training], note: str, draw: bool
) -> dict:
    """Score the net on the test set, save it and its figures where wanted, print the table."""
    probabilities = predict(model, data.test_images).softmax(1)  # the one look at the test set
    results = score(data.test_labels, probabilities.argmax(1), data.class_names)
    results |= {"dataset": data.name, "epochs_run": len(history), "train_seconds": 0.0}
    if history:
        results["train_seconds"] = history[-1].seconds
        results["val_accuracy"] = history[best(history)].val_accuracy
    results["parameters"] = sum(p.numel() for p in model.parameters())
    title = f"{data.name}, MLP {config.hidden}: test accuracy {results['accuracy']:.2%}{note}"
    if draw:
        matrices = {"": results["confusion_matrix"]}
        figures = {"training_curves": curves_figure(history, title)} if history else {}
        figures["confusion_matrix"] = confusion_figure(matrices, data.class_names, title)
        figures["mistakes"] = mistakes_figure(data, probabilities, title)
        figures["loss_vs_weight"] = loss_vs_weight_figure(model, data, title)
        figures["first_layer"] = first_layer_figure(model, title)
        for name, figure in figures.items():
            save_figure(figure, config.images_dir / f"part1_{name}.png")
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
    check_writable(config.images_dir / "part1.png" if draw else None)  # before training
    check_writable(config.save)
    model = MLP(config.hidden, config.dropout)
    saved = load_net(model, config)  # {} without --load
    if config.predict:
        return predict_photos(model, saved, config)
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


# ============ The lesson ends here. Below: figures, own digits, downloads, errors. ============== #


def augment(images: Tensor, strength: float) -> Tensor:
    """Warp images (B, 28, 28) at random: rotation, scale, shear, shift, and elastic distortion.

    The last is a random displacement for each pixel, smoothed by a Gaussian (Simard et al. 2003,
    section 2). strength scales it all; 0 returns the images as they came.
    """
    if strength == 0:
        return images
    B, device, pixel = len(images), images.device, 2 / 28  # grid_sample's image is 2 wide
    # Affine: at strength 1, each entry of the map is up to this far from the identity.
    spread = torch.tensor([[0.15, 0.25, 0.14], [0.25, 0.15, 0.14]], device=device)
    unit = torch.eye(2, 3, device=device)
    affine = unit + strength * spread * (2 * torch.rand(B, 2, 3, device=device) - 1)
    grid = F.affine_grid(affine, [B, 1, 28, 28], align_corners=False)  # (B, 28, 28, 2)
    # Elastic: noise with a standard deviation of 0.9 pixels, smoothed over 4, rows and columns.
    i = torch.arange(28, device=device, dtype=images.dtype)
    kernel = torch.exp(-((i[:, None] - i) ** 2) / (2 * 4**2))  # (28, 28)
    kernel = kernel / kernel.norm(dim=1, keepdim=True)  # smoothed noise is as strong as before
    noise = torch.randn(B, 2, 28, 28, device=device) * (0.9 * strength * pixel)
    grid = grid + (kernel @ noise @ kernel.T).permute(0, 2, 3, 1)
    grid = grid.clamp(-1 + pixel / 2, 1 - pixel / 2)  # beyond the edge the border repeats
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


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


def picture_grid(
    pictures: Tensor, headings: list[str], columns: int, title: str, **colours: object
) -> Figure:
    """Pictures (N, 28, 28) in rows of `columns`, each below its heading."""
    rows = max(1, math.ceil(len(pictures) / columns))
    size = (10, rows * 13 / columns + 0.6)
    figure, grid = new_figure(title, size, rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        axes.axis("off")
        if i < len(pictures):
            axes.imshow(pictures[i].numpy(force=True), **colours)
            axes.set_title(headings[i], fontsize=10)
    return figure


def mistakes_figure(data: Data, probabilities: Tensor, title: str) -> Figure:
    """The 18 wrong answers on the test set that the net was most certain of."""
    confidence, answers = probabilities.max(1)
    wrong = (answers != data.test_labels).nonzero().squeeze(1)
    worst = wrong[confidence[wrong].argsort(descending=True)][:18]
    headings = []
    for i in worst:
        true, said = data.class_names[data.test_labels[i]], data.class_names[answers[i]]
        headings.append(f"true: {true}\nsaid: {said} ({confidence[i]:.1%})")
    title = f"{title}: {len(wrong)} wrong of {len(answers)}, the most confident"
    return picture_grid(data.test_images[worst], headings, columns=6, title=title, cmap="gray")


def first_layer_figure(model: MLP, title: str) -> Figure:
    """The 32 first-layer weight vectors with the largest norms, as 28 x 28 pictures."""
    weight = model.layers[0].weight.detach()  # (units, 784)
    norms, units = weight.norm(dim=1).sort(descending=True)
    pictures, headings = weight[units[:32]], [f"norm {norm:.1f}" for norm in norms[:32]]
    title += "\nthe longest weight vectors of the first layer: red is positive, blue negative"
    colours = {"cmap": "coolwarm", "vmin": -pictures.abs().max(), "vmax": pictures.abs().max()}
    return picture_grid(pictures.view(-1, 28, 28), headings, columns=8, title=title, **colours)


def loss_vs_weight_figure(model: MLP, data: Data, title: str) -> Figure:
    """Gradient descent on the real loss along w + alpha w / |w|, w the weights of output unit 8."""
    output, labels = model.layers[-1], data.train_labels[:5000]
    with torch.no_grad():
        features = model.eval().layers[:-1](data.train_images[:5000].flatten(1))  # (5000, width)
        logits, w = output(features), output.weight[8]  # (5000, 10), (width,)
        change = torch.zeros_like(logits)  # (5000, 10): of the logits, by alpha
        change[:, 8] = features @ w / w.norm()
    title += "\nloss of 5,000 training images along the weights of output unit 8"
    figure, grid = new_figure(title, (10, 4.4), 1, 2, sharey=True)
    for axes, lr in zip(grid, (2.0, 20.0), strict=True):
        alpha, path, losses = -4.0 * w.norm().detach(), [], []
        for _ in range(21):
            alpha.requires_grad_()
            loss = F.cross_entropy(logits + alpha * change, labels)
            (gradient,) = torch.autograd.grad(loss, alpha)
            path.append(alpha.item())
            losses.append(loss.item())
            alpha = alpha.detach() - lr * gradient  # gradient descent
        curve = np.linspace(path[0], max(-path[0], *path), 100).tolist()
        heights = [F.cross_entropy(logits + a * change, labels).item() for a in curve]
        axes.plot(curve, heights, color="grey", label="loss")
        axes.plot(path, losses, "o-C1", markersize=4, label="start and 20 steps")
        axes.axvline(0, color="grey", linestyle=":", label="trained weights")
        axes.set(xlabel="alpha: distance from the trained weights", ylabel="cross-entropy (nats)")
        axes.set_title(f"learning rate {lr:g}")
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


def open_photo(path: Path) -> Image.Image:
    """The picture in a file: grey, upright, at most 112 x 112 pixels, nothing transparent."""
    try:
        with Image.open(path) as file:
            photo = ImageOps.exif_transpose(file)
            if photo.mode[0] in "IF":  # 16 or 32 bits: darkest to lightest becomes 0 to 255
                pixels = np.asarray(photo, dtype=float)
                pixels = (pixels - pixels.min()) / max(np.ptp(pixels), 1e-9)
                photo = Image.fromarray((255 * pixels).astype(np.uint8))
            photo = photo.convert("RGBA")
            photo.thumbnail((112, 112))
    except Exception as error:  # there is no end to what a damaged picture can cause
        raise UserError(f"cannot read {path} as a picture: {error!s:.150}") from None
    rgba = np.asarray(photo, dtype=float)
    dark = (rgba[:, :, :3].mean(2) * rgba[:, :, 3]).sum() < 128 * rgba[:, :, 3].sum()
    behind = Image.new("RGBA", photo.size, "white" if dark else "black")
    return Image.alpha_composite(behind, photo).convert("L")


def prepare_photo(path: Path) -> Tensor:
    """The digit in a picture file as MNIST would have it: (28, 28) uint8, white on black.

    As LeCun et al. 1998, section III A: it fills 20 x 20, its shape kept, and its centre of mass is
    in the middle. Raises UserError if the file is no picture, or no digit is to be seen in it.
    """
    grey = np.asarray(open_photo(path), dtype=float)  # (H, W)
    # The paper's shade is a smooth surface, a quadratic in x and y: fitted to the rim at first,
    # then to all that is close to it. What stands out from it is ink, dark or light.
    y, x = np.mgrid[-1 : 1 : grey.shape[0] * 1j, -1 : 1 : grey.shape[1] * 1j]
    terms = np.stack([x**0, x, y, x * x, x * y, y * y], 2)
    paper = np.maximum(abs(x), abs(y)) > 0.8
    for _ in range(3):
        ink = grey - terms @ np.linalg.lstsq(terms[paper], grey[paper], rcond=None)[0]
        paper = abs(ink) <= max(1, 0.3 * abs(ink).max())
    ink = (ink if ink.max() > -ink.min() else -ink).clip(0)
    noise, top, z = ink[paper].std(), ink.max(), ink - ink.mean()
    # Pixels of a stroke are like their neighbours, above or beside; those of noise are not.
    alike = max((z[1:] * z[:-1]).sum(), (z[:, 1:] * z[:, :-1]).sum()) / (z * z).sum().clip(1e-9)
    if top < max(20, 8 * noise) or alike < 0.35:
        raise UserError(f"{path}: no digit is to be seen")
    ink = ink / top  # 0 to 1
    rows, columns = (np.flatnonzero((ink > 0.2).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # MNIST's lines are 2.4 pixels wide at this size, a pen's are often thinner: thicken those.
    edges = abs(np.diff(ink, axis=0)).sum() + abs(np.diff(ink, axis=1)).sum()
    width, wanted = 2.5 * ink.sum() / edges.clip(1e-9), 2.4 * max(ink.shape) / 20
    if width < 0.75 * wanted and (radius := round((wanted - width) / 2)) > 0:
        thin = Image.fromarray(np.pad(np.float32(ink), radius))
        ink = np.asarray(thin.filter(ImageFilter.MaxFilter(2 * radius + 1)))
    h, w = (max(1, round(20 * n / max(ink.shape))) for n in ink.shape)
    small = np.asarray(Image.fromarray(np.float32(ink)).resize((w, h), Image.Resampling.BICUBIC))
    small = (small / (0.8 * small.max())).clip(0, 1)  # MNIST's lines are mostly all white
    middle = (np.indices((h, w)) * small).sum((1, 2)) / small.sum()
    top, left = np.clip(np.round(14 - middle), 0, (28 - h, 28 - w)).astype(int)
    picture = torch.zeros(28, 28, dtype=torch.uint8)
    picture[top : top + h, left : left + w] = torch.tensor(255 * small).round().byte()
    return picture


@matplotlib.style.context("default")
def predict_photos(model: MLP, saved: dict, config: Config) -> dict:
    """Read the digits in the picture files `config.predict`; print and draw what is likeliest."""
    pictures = torch.stack([prepare_photo(path) for path in config.predict])  # (N, 28, 28)
    probabilities = predict(model, (pictures - saved["mean"]) / saved["std"]).softmax(1)  # (N, 10)
    n, names = min(8, len(pictures)), saved["class_names"]
    title = f"read by a net trained on {saved['dataset']}{saved['note']}"
    figure, grid = new_figure(title, (10, 3 * n), n, 3, squeeze=False)
    for i, (path, row) in enumerate(zip(config.predict, probabilities, strict=True)):
        likely = ", ".join(f"{names[k]} {row[k]:.1%}" for k in row.topk(3).indices)
        print(f"{path}: {names[row.argmax()]} ({likely})")
        if i < n:  # more would not be readable
            grid[i, 0].imshow(open_photo(path), cmap="gray", vmin=0, vmax=255)
            grid[i, 0].set_title(f"photo {i + 1}")
            grid[i, 1].imshow(pictures[i].numpy(), cmap="gray")
            grid[i, 1].set_title("what the net sees")
            grid[i, 2].bar(names, row.numpy())
            grid[i, 2].set(ylim=(0, 1), xlabel="digit", ylabel="probability", title=likely)
    folder = config.images_dir / ("" if saved["dataset"] == DATASET.__name__ else "offline")
    save_figure(figure, folder / "part1_prediction.png")
    return {"predictions": probabilities.argmax(1).tolist(), "probabilities": probabilities.numpy()}


NET = ["hidden"]  # settings that a saved net must share
DATASET = MNIST
CLASS_NAMES = list("0123456789")
MIRRORS = [
    *MNIST.mirrors,  # torchvision's own
    "https://dataset.bj.bcebos.com/mnist/",  # PaddlePaddle's: reachable from mainland China
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
]
TIMEOUT = 8  # seconds that a mirror has; each 10 kB that arrives earns it one more
MD5 = {  # of the unpacked files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
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
