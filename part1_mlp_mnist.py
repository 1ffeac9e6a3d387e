"""A multilayer perceptron on MNIST: the metrics, the training loop and the data path by hand.

Each image of 28 x 28 pixels is laid out as one row x of 784 numbers. Every hidden layer computes,
from x or from the h of the layer below,

    h = dropout(relu(batch_norm(W x)))

and a last linear layer, W h + b, turns the final h into one score (logit) for each digit.

    python part1_mlp_mnist.py                                  # train, score, draw
    python part1_mlp_mnist.py --save mlp.pt                    # keep the net, then read a photo:
    python part1_mlp_mnist.py --load mlp.pt --predict 7.jpg    # --help lists every setting

Expect 98.8 % on the test set after 20 s of training on one CPU core. The lesson ends with `main`.

References: Rumelhart, Hinton & Williams 1986 (back-propagation); Ioffe & Szegedy 2015 (batch norm).
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
from PIL import Image, ImageChops, ImageFilter, ImageOps
from sklearn.datasets import load_digits
from sklearn.metrics import classification_report
from torch import Tensor, nn
from torch.optim import AdamW
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
    predict: tuple[Path | str, ...] = ()  # pictures of digits, to be read by the loaded net

    def __post_init__(self) -> None:
        limits = {
            "hidden": (1, 65536), "dropout": (0, 0.99), "epochs": (1, 100_000), "seeds": (1, 1000),
            "batch_size": (2, 55_000), "lr": (1e-9, math.inf), "weight_decay": (0, math.inf),
            "label_smoothing": (0, 0.99), "augment": (0, 3), "seed": (0, 2**32 - 1),
        }  # fmt: skip
        check_fields(self, limits)
        if self.load and (self.save or self.seeds > 1):
            raise UserError("load trains nothing: it cannot go with save or seeds")
        if self.predict and not self.load:
            raise UserError("predict needs a trained net: name its file with --load")


# ------------------------------------------- model -------------------------------------------- #
class MLP(nn.Module):
    """A fully connected network of hidden layers of these widths: (B, 28, 28) -> logits (B, 10)."""

    def __init__(self, hidden: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        layers, width = [], 784
        for n in hidden:
            linear = nn.Linear(width, n, bias=False)  # batch norm would subtract a bias again
            layers += [linear, nn.BatchNorm1d(n), nn.ReLU(), nn.Dropout(dropout)]
            width = n
        self.layers = nn.Sequential(*layers, nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))  # (B, 784): from here on, no pixel has neighbours


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
        images = augment(images, config.augment) if config.augment else images
        with autocast:
            logits = model(images).float()  # (B, 10)
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(F.cross_entropy(logits.detach(), labels))
    return torch.stack(losses).cpu()  # here the CPU waits for the GPU


def train(model: nn.Module, data: Data, config: Config) -> list[Epoch]:
    """Fit `model` with AdamW, load what validated best; Ctrl-C ends it with fewer epochs."""
    adamw = AdamW(model.parameters(), weight_decay=config.weight_decay, fused=True)  # lr: each step
    history, best, start = [], (-1.0, 0.0), time.perf_counter()
    print("epoch  train loss  val loss  val accuracy         lr  seconds")
    for epoch in range(1, config.epochs + 1):
        try:
            losses = train_epoch(model, data, config, adamw, epoch)
            logits = predict(model, data.val_images)
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
            best, weights = (val_accuracy, -val_loss), copy.deepcopy(model.state_dict())
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
    check_writable(config.images_dir / "part1", config.save)  # now, not after minutes of training
    data = load_data(config, device)
    model = MLP(config.hidden, config.dropout).to(device)
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


# ========= The lesson ends here. Below: figures, photos, saved nets, downloads, errors. ========= #


def augment(images: Tensor, strength: float) -> Tensor:
    """Warp images (B, 28, 28), each by its own affine map and elastic distortion.

    Simard, Steinkraus & Platt 2003, section 2: a random displacement for each pixel, smoothed.
    """
    B, device, pixel = len(images), images.device, 2 / 28  # grid_sample's image is 2 wide
    # At strength 1, each entry of the affine map is up to this far from the identity.
    spread = strength * torch.tensor([[0.15, 0.25, 0.14], [0.25, 0.15, 0.14]], device=device)
    affine = torch.eye(2, 3, device=device) + spread * (2 * torch.rand(B, 2, 3, device=device) - 1)
    grid = F.affine_grid(affine, [B, 1, 28, 28], align_corners=False)  # (B, 28, 28, 2)
    i = torch.arange(28.0, device=device)  # elastic: noise of 0.9 pixels, smoothed over 4
    kernel = F.normalize(torch.exp(-((i[:, None] - i) ** 2) / (2 * 4**2)), dim=1)  # (28, 28)
    noise = torch.randn(B, 2, 28, 28, device=device) * (0.9 * strength * pixel)
    grid = grid + (kernel @ noise @ kernel.T).permute(0, 2, 3, 1)
    return F.grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def draw_figures(model: MLP, data: Data, results: dict, config: Config, note: str) -> None:
    """Draw every figure; those of a stand-in for the dataset never replace the real ones."""
    title = f"{data.name}, MLP {config.hidden}: test accuracy {results['accuracy']:.2%}{note}"
    figures = {
        "training_curves": curves_figure(results["history"], title),
        "confusion_matrix": confusion_figure(results["confusion_matrix"], data.class_names, title),
        "mistakes": mistakes_figure(data, results["probabilities"], title),
        "learning_rates": learning_rates_figure(data),
        "first_layer": first_layer_figure(model, title),
    }
    folder = config.images_dir / ("" if data.name == DATASET else "offline")
    for name, figure in figures.items():
        save_figure(figure, folder / f"part1_{name}.png")


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


def mistakes_figure(data: Data, probabilities: Tensor, title: str) -> Figure:
    """The 18 wrong answers on the test set that the net was most certain of."""
    confidence, answers = probabilities.max(1)
    wrong = (answers != data.test_labels).nonzero().squeeze(1)
    worst = wrong[confidence[wrong].argsort(descending=True)].tolist()
    title += f": {len(wrong)} wrong of {len(answers)}, the most confident"
    figure, grid = new_figure(title, (10, 7.1), 3, 6, subplot_kw={"xticks": [], "yticks": []})
    for axes, i in zip(grid.flat, worst, strict=False):
        true, said = data.class_names[data.test_labels[i]], data.class_names[answers[i]]
        axes.imshow(data.test_images[i].numpy(force=True), cmap="gray")
        axes.set_title(f"true: {true}\nsaid: {said} ({confidence[i]:.1%})", fontsize=9)
    return figure


def first_layer_figure(model: MLP, title: str) -> Figure:
    """The 32 first-layer weight vectors with the largest norms, as 28 x 28 pictures."""
    weight = model.layers[0].weight.numpy(force=True)  # (units, 784)
    norms = np.linalg.norm(weight, axis=1)
    title += "\nthe first layer's weight vectors of largest norm: red is positive, blue negative"
    figure, grid = new_figure(title, (10, 7), 4, 8, subplot_kw={"xticks": [], "yticks": []})
    for axes, i in zip(grid.flat, (-norms).argsort(), strict=False):
        axes.imshow(weight[i].reshape(28, 28) / norms[i], cmap="coolwarm", vmin=-0.17, vmax=0.17)
        axes.set_title(f"norm {norms[i]:.1f}", fontsize=10)
    return figure


def learning_rates_figure(data: Data) -> Figure:
    """Plain gradient descent, its gradient by hand, on a net without a hidden layer."""
    x, y = data.train_images[:1000].flatten(1), data.train_labels[:1000]  # (N, 784), (N,)
    title = f"{data.name}: gradient descent on {len(y):,} images, no hidden layer, starting at 0"
    figure, axes = new_figure(title, (10, 4.4))
    for lr in (0.001, 0.1, 10):
        W, losses = x.new_zeros(10, 784), []
        for _ in range(31):
            logits = x @ W.T  # (N, 10)
            losses.append(F.cross_entropy(logits, y).item())
            W -= lr * (logits.softmax(1) - F.one_hot(y, 10)).T @ x / len(y)  # (p - y) x, the mean
        axes.plot(losses, "o-", markersize=4, label=f"learning rate {lr}")
    axes.set(xlabel="steps", ylabel="cross-entropy (nats)", yscale="log")
    axes.legend()
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
    """Score the net in the file `config.load` again, or read pictures; runs no code from it."""
    try:
        if zipfile.ZipFile(config.load).testzip():  # torch.load does not look at the checksums
            raise ValueError("its checksum is wrong")
        saved = torch.load(config.load, map_location="cpu", weights_only=True)
        config = replace(config, **saved["net"])  # with the seed, and so the same splits
        model = MLP(config.hidden)
        model.load_state_dict(saved["weights"])
        print(f"{config.load}: {saved['net']}, trained on {saved['dataset']}{saved['note']}")
    except Exception as error:  # there is no end to what a strange file can cause
        raise UserError(f"{config.load} is no net that was saved here: {error!r:.150}") from None
    if config.predict:
        return predict_photos(model, saved, config)
    data = load_data(config, pick_device(config.device))
    if data.name != saved["dataset"]:
        raise UserError(f"this net needs {saved['dataset']}, but here is {data.name}")
    answers = predict(model.to(data.test_images.device), data.test_images).argmax(1)
    results = score(data.test_labels, answers, data.class_names) | {"dataset": data.name}
    print(f"\n{data.name}, test set{saved['note']}\n{results['report']}")
    return results


def open_photo(path: Path) -> Image.Image:
    """The picture in a file: grey, upright, at most 160 x 160 pixels, nothing transparent."""
    try:
        with Image.open(path) as file:
            photo = ImageOps.exif_transpose(file)
        if photo.mode[0] in "IF":  # 16 or 32 bits: darkest to lightest becomes 0 to 255
            scaled = np.interp(photo, (np.min(photo), np.max(photo)), (0, 255))
            photo = Image.fromarray(scaled.astype(np.uint8))
        photo = photo.convert("RGBA")
        photo.thumbnail((160, 160))
        page = Image.new("RGBA", photo.size, "grey")  # both black and white ink stand out from it
        return Image.alpha_composite(page, photo).convert("L")
    except Exception as error:  # there is no end to what a damaged picture can cause
        raise UserError(f"cannot read {path} as a picture: {error!s:.150}") from None


def prepare_photo(path: Path) -> Tensor:
    """The digit in a picture file as MNIST would have it: (28, 28) uint8, white on black.

    As LeCun et al. 1998, section III A: it fits 20 x 20, its centre of mass is in the middle.
    """
    photo = open_photo(path)
    paper = photo.filter(ImageFilter.BoxBlur(max(photo.size) / 3))  # its shade, without the digit
    inks = ImageChops.subtract(paper, photo), ImageChops.subtract(photo, paper)
    ink = max(inks, key=np.max)  # darker or lighter than the paper: what stands out more
    top = np.max(ink)
    ink = ink.point(lambda value: 255 * (value > top / 3))
    # A 3 x 3 blur leaves a third of the standard deviation of noise, but more of a stroke's.
    if top < 30 or np.std(ink.filter(ImageFilter.BoxBlur(1))) < 0.42 * np.std(ink):
        raise UserError(f"{path}: no digit is to be seen")
    ink = ink.crop(ink.getbbox())
    while np.mean(ink) < 64:  # less than a quarter is white: thicken the thin lines of a pen
        ink = ink.filter(ImageFilter.MaxFilter(3))
    ink = ink.resize([math.ceil(20 * n / max(ink.size)) for n in ink.size])
    row, column = (np.indices(np.shape(ink)) * ink).sum((1, 2)) / np.sum(ink)
    picture = Image.new("L", (28, 28))
    picture.paste(ink, (round(14 - column), round(14 - row)))
    return torch.tensor(np.asarray(picture))


def predict_photos(model: MLP, saved: dict, config: Config) -> dict:
    """Read the digits in the picture files `config.predict`; print and draw what is likeliest."""
    pictures = torch.stack([prepare_photo(path) for path in config.predict])  # (N, 28, 28)
    probabilities = predict(model, (pictures - saved["mean"]) / saved["std"]).softmax(1)  # (N, 10)
    title = f"photo; what the net sees; its answer (trained on {saved['dataset']}{saved['note']})"
    n = min(8, len(pictures))  # more could not be read
    figure, grid = new_figure(title, (10, 3 * n), n, 3, squeeze=False)
    for i, (path, p) in enumerate(zip(config.predict, probabilities, strict=True)):
        likely = ", ".join(f"{k} {p[k]:.1%}" for k in p.topk(3).indices.tolist())
        print(f"{path}: {p.argmax()} ({likely})")
        if i < n:
            grid[i, 0].imshow(open_photo(path), cmap="gray", vmin=0, vmax=255).axes.set_axis_off()
            grid[i, 1].imshow(pictures[i].numpy(), cmap="gray").axes.set_axis_off()
            grid[i, 2].bar(range(10), p.numpy())
            grid[i, 2].set(ylim=(0, 1), xticks=range(10), xlabel="digit", ylabel="probability")
    folder = config.images_dir / ("" if saved["dataset"] == DATASET else "offline")
    save_figure(figure, folder / "part1_prediction.png")
    return {"predictions": probabilities.argmax(1).tolist(), "probabilities": probabilities}


DATASET, CLASS_NAMES = "MNIST", list("0123456789")
NET = ["hidden", "seed"]  # settings that a saved net brings with it
MIRRORS = [
    "https://ossci-datasets.s3.amazonaws.com/mnist/",  # torchvision's own are the first two
    "http://yann.lecun.com/exdb/mnist/",
    "https://dataset.bj.bcebos.com/mnist/",  # PaddlePaddle's: reachable from mainland China
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
]
MD5 = {  # of the unpacked files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
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
