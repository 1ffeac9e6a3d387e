"""A multilayer perceptron on MNIST, written out by hand.

Each image of 28 x 28 pixels is laid out as one row x of 784 numbers. Every hidden layer computes

    h = dropout(relu(batch_norm(W x + b)))

and a last linear layer turns the final h into one score (logit) for each of the ten digits.

    python part1_mlp_mnist.py            # train, score, draw
    python part1_mlp_mnist.py --study    # then the experiments on depth and on shuffled pixels
    python part1_mlp_mnist.py --help     # every setting below, as a flag

It prints one row for each epoch, then accuracy, precision, recall and F1 on the 10,000 test images,
and saves its figures in images/. Expect 98.5 % test accuracy (98.53 +- 0.08 over seeds 0, 1, 2),
after 10 s of training and 17 s in all on two cores of an AMD EPYC (Zen 5).

References: Rumelhart, Hinton & Williams 1986 (back-propagation); Ioffe & Szegedy 2015 (batch norm);
Srivastava et al. 2014 (dropout); Simard, Steinkraus & Platt 2003, section 2 (elastic distortion);
Loshchilov & Hutter 2019 (AdamW); Smith & Topin 2019 (one-cycle learning rate).
"""

import hashlib
import http.client
import io
import math
import os
import shutil
import signal
import socket
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
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix
from torch import Tensor
from torchvision.datasets import MNIST
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------- #
#                                             Config                                             #
# ---------------------------------------------------------------------------------------------- #


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    hidden: tuple[int, ...] = (512, 512)  # widths of the hidden layers; none is softmax regression
    dropout: float = 0.2  # share of hidden activations zeroed in training, 0 <= dropout < 1
    epochs: int = 6  # passes over the training split
    batch_size: int = 256  # images in one gradient step
    lr: float = 6e-3  # peak learning rate; it warms up to this, then falls to zero
    weight_decay: float = 0.05  # AdamW's pull of the weights towards zero
    label_smoothing: float = 0.0  # share of each target spread over all ten classes
    augment: float = 0.0  # strength of the random affine and elastic warp; 0 is off, 1 is full
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products in training
    seed: int = 0  # of the split, the weights, the batches, dropout and the warp
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else the CPU
    data_dir: Path = Path("data")  # where MNIST lies, or is downloaded to
    images_dir: Path = Path("images")  # where the figures go
    study: bool = False  # also run the experiments on depth and on shuffled pixels

    def __post_init__(self) -> None:
        """Raise ValueError, naming field, value and what is allowed, before anything is done."""

        def check(name: str, allowed: str, ok: bool) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {allowed}")

        check("hidden", "widths from 1 to 65536", all(1 <= n <= 65536 for n in self.hidden))
        check("dropout", "at least 0 and below 1", 0 <= self.dropout < 1)
        check("epochs", "from 1 to 100000", 1 <= self.epochs <= 100_000)
        # Batch norm needs two images to have a variance; the training split has 55,000.
        check("batch_size", "from 2 to 55000", 2 <= self.batch_size <= 55_000)
        check("lr", "above 0 and finite", 0 < self.lr < math.inf)
        check("weight_decay", "at least 0 and finite", 0 <= self.weight_decay < math.inf)
        check("label_smoothing", "at least 0 and below 1", 0 <= self.label_smoothing < 1)
        check("augment", "from 0 to 3", 0 <= self.augment <= 3)
        check("seed", "from 0 to 2**63 - 1", 0 <= self.seed < 2**63)


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------- #
#                                              Data                                              #
# ---------------------------------------------------------------------------------------------- #

DATASET = MNIST
MIRRORS = [
    *MNIST.mirrors,  # torchvision's own
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
]
TIMEOUT = 20  # seconds without a byte: a mirror that hangs must not hang the run
MD5 = {  # of the unpacked files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
CLASS_NAMES = list("0123456789")


class Data(NamedTuple):
    """The three splits on the device: images (N, 28, 28) float32, normalised; labels (N,) int64."""

    name: str
    class_names: list[str]
    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def damaged_files(folder: Path) -> list[Path]:
    """The dataset's files in `folder` that are missing or whose MD5 checksum is wrong."""

    def good(path: Path, md5: str) -> bool:
        try:
            return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5
        except OSError:
            return False

    return [folder / name for name, md5 in MD5.items() if not good(folder / name, md5)]


def fetch(data_dir: Path) -> bool:
    """Make sure that the whole, undamaged dataset lies in `data_dir`; download what does not.

    Downloads go to a temporary folder and are moved in when whole, so that nobody ever meets half a
    file. A damaged file that is replaced stays beside it as *.damaged.

    Returns False if files are missing and no mirror could be reached.
    Raises UserError if a file is damaged and cannot be replaced, or the folder cannot be written.
    """
    folder = data_dir / DATASET.__name__ / "raw"
    wanting = damaged_files(folder)
    if not wanting:
        return True
    require_writable(folder, "--data-dir")
    socket.setdefaulttimeout(TIMEOUT)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        fresh = Path(temporary) / DATASET.__name__ / "raw"
        fresh.mkdir(parents=True)
        for packed in folder.glob("*.gz"):  # fetched by hand: torchvision checks and unpacks them
            shutil.copy(packed, fresh)
        for mirror in MIRRORS:
            DATASET.mirrors = [mirror]
            try:
                DATASET(temporary, download=True)  # with a progress bar, and checksums
            except (RuntimeError, OSError, EOFError, http.client.HTTPException) as error:
                print(f"{mirror} failed: {' '.join(str(error).split())[:150]}", file=sys.stderr)
            if damaged_files(fresh):
                continue
            for path in wanting:
                if path.exists():
                    path.replace(f"{path}.damaged")
                (fresh / path.name).replace(path)
            return True
    damaged = ", ".join(str(path) for path in wanting if path.exists())
    if damaged:
        raise UserError(f"{damaged}: damaged or unreadable, and no mirror could replace it")
    return False


def load_data(data_dir: Path, seed: int, device: torch.device) -> Data:
    """Read the dataset and split it into training, validation and test images on `device`.

    MNIST's 60,000 training images are split 55,000 / 5,000 by `seed`; its 10,000 test images stay.
    Without a network, scikit-learn's 1,797 bundled digits stand in, and the name says so.
    """
    if fetch(data_dir):
        name, class_names, n_val = DATASET.__name__, CLASS_NAMES, 5000
        train, test = DATASET(data_dir, train=True), DATASET(data_dir, train=False)
        images = torch.cat([train.data, test.data]).to(device)  # (70000, 28, 28) uint8
        labels = torch.cat([train.targets, test.targets]).to(device)  # (70000,)
        n_train = len(train.data) - n_val
    else:
        name, class_names, n_train, n_val = "sklearn-digits", list("0123456789"), 1297, 200
        print(
            f"\n*** WARNING: {DATASET.__name__} is not in {data_dir}, and no mirror answered."
            f"\n*** This run uses scikit-learn's bundled 8x8 digits: its numbers say nothing about"
            f"\n*** {DATASET.__name__}. Its figures go to a folder of their own, offline/.\n",
            file=sys.stderr,
        )
        bundled = load_digits()
        small = torch.tensor(bundled.images, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8), 0..16
        large = F.interpolate(small, size=(28, 28), mode="bilinear")[:, 0]  # (1797, 28, 28)
        images = large.mul(255 / 16).round().to(torch.uint8).to(device)
        labels = torch.tensor(bundled.target).to(device)

    n_fit = n_train + n_val
    shuffled = torch.randperm(n_fit, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([shuffled, torch.arange(n_fit, len(images))]).to(device)  # test stays last
    sizes = [n_train, n_val, len(images) - n_fit]
    pixels = images[order].float()
    std, mean = torch.std_mean(pixels[:n_train])  # of the training split alone
    splits = zip(pixels.sub_(mean).div_(std).split(sizes), labels[order].split(sizes), strict=True)
    return Data(name, class_names, *(tensor for split in splits for tensor in split))


class Augment(nn.Module):
    """Warp each image of a batch at random: rotation, scale, shear, shift and elastic distortion.

    The elastic part follows Simard et al. 2003, section 2: a random displacement for each pixel,
    smoothed by a Gaussian. Smoothing rows and columns is two small matrix products, K noise K^T.

    Args:
        strength: scales every distortion; 0 returns the images as they came, to the bit.

    Shapes: (B, 28, 28) -> (B, 28, 28)
    """

    ROTATION, SCALE, SHEAR = math.radians(12), 0.15, 0.1  # largest angle, and share of the size
    SHIFT = 2.0  # largest, in pixels
    ELASTIC, SIGMA = 0.9, 4.0  # displacement's standard deviation, and its smoothness, in pixels

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength
        i = torch.arange(28.0)
        gauss = torch.exp(-((i[:, None] - i) ** 2) / (2 * self.SIGMA**2))  # (28, 28)
        # Scaled so that smoothed unit noise has a standard deviation of one again.
        self.register_buffer("kernel", gauss / gauss.norm(dim=1, keepdim=True))

    def forward(self, images: Tensor) -> Tensor:
        if self.strength == 0:
            return images
        B, device = len(images), images.device

        def uniform(limit: float) -> Tensor:  # (B,), within +- limit
            return (torch.rand(B, device=device) * 2 - 1) * limit * self.strength

        angle, shear = uniform(self.ROTATION), uniform(self.SHEAR)
        scale_x, scale_y = 1 + uniform(self.SCALE), 1 + uniform(self.SCALE)
        pixel = 2 / 28  # grid_sample's coordinates run from -1 to 1 over the 28 pixels
        row_x = [angle.cos() * scale_x, shear - angle.sin() * scale_y, uniform(self.SHIFT * pixel)]
        row_y = [angle.sin() * scale_x, angle.cos() * scale_y, uniform(self.SHIFT * pixel)]
        affine = torch.stack([torch.stack(row_x, 1), torch.stack(row_y, 1)], 1)  # (B, 2, 3)
        grid = F.affine_grid(affine, [B, 1, 28, 28], align_corners=False)  # (B, 28, 28, 2)

        noise = torch.randn(B, 2, 28, 28, device=device)
        elastic = self.kernel @ noise @ self.kernel.T * (self.ELASTIC * self.strength * pixel)
        grid = grid + elastic.permute(0, 2, 3, 1)
        # Beyond the edge the border repeats: it is black in MNIST.
        warped = F.grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)
        return warped[:, 0]


# ---------------------------------------------------------------------------------------------- #
#                                             Model                                              #
# ---------------------------------------------------------------------------------------------- #


class MLP(nn.Module):
    """A fully connected network for 28 x 28 images and ten classes.

    Args:
        hidden: widths of the hidden layers; an empty tuple is softmax regression.
        dropout: share of hidden activations zeroed in training.

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


# ---------------------------------------------------------------------------------------------- #
#                                            Training                                            #
# ---------------------------------------------------------------------------------------------- #


class Training(NamedTuple):
    """What `train` leaves behind. The lists by epoch have one value for each epoch that ended."""

    step_loss: list[float]  # by step: of the batch, before the step
    train_loss: list[float]
    val_loss: list[float]
    val_accuracy: list[float]
    best_epoch: int  # counted from 1
    seconds: float
    interrupted: bool


def train(model: nn.Module, data: Data, config: Config, verbose: bool = True) -> Training:
    """Fit `model` in place with AdamW and a one-cycle learning rate; keep the best epoch's weights.

    The best epoch has the highest validation accuracy; among equals, the lowest validation loss.
    Ctrl-C ends training early and keeps the best epoch so far.

    Raises UserError if the loss becomes NaN or infinite, or a batch is larger than the split.
    """
    n, device = len(data.train_images), data.train_images.device
    steps = n // config.batch_size  # the ragged last batch waits for another epoch's shuffle
    if steps == 0:
        raise UserError(f"batch_size is {config.batch_size}, but there are {n} training images")
    augment = Augment(config.augment).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=max(10, config.epochs * steps), pct_start=0.2
    )  # at least 10: with 5, the warm-up would be one step long and divide by zero
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")

    step_loss, train_loss, val_loss, val_accuracy = [], [], [], []
    best_epoch, best_weights, best_score = 0, {}, (-1.0, 0.0)
    interrupted = False
    start = time.perf_counter()
    if verbose:
        print("epoch  train loss  val loss  val accuracy         lr  seconds")
    try:
        for epoch in range(1, config.epochs + 1):
            model.train()
            order = torch.randperm(n, device=device)[: steps * config.batch_size]
            bar = tqdm(order.split(config.batch_size), f"epoch {epoch}", leave=False, disable=None)
            for step, batch in enumerate(bar, start=1):
                images, labels = augment(data.train_images[batch]), data.train_labels[batch]
                with autocast:
                    logits = model(images)  # (B, 10)
                loss = F.cross_entropy(
                    logits.float(), labels, label_smoothing=config.label_smoothing
                )
                step_loss.append(loss.item())
                if not math.isfinite(step_loss[-1]):
                    raise UserError(
                        f"the loss became {step_loss[-1]} in epoch {epoch}, step {step}: "
                        f"try a lower learning rate than lr = {config.lr:g}"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

            logits = predict(model, data.val_images)
            loss_now = F.cross_entropy(logits, data.val_labels).item()
            accuracy_now = (logits.argmax(1) == data.val_labels).float().mean().item()
            if not math.isfinite(loss_now):
                raise UserError(
                    f"the validation loss became {loss_now} after epoch {epoch}, step {steps}: "
                    f"try a lower learning rate than lr = {config.lr:g}"
                )
            if (accuracy_now, -loss_now) > best_score:
                best_weights = {k: v.clone() for k, v in model.state_dict().items()}
                best_epoch, best_score = epoch, (accuracy_now, -loss_now)
            train_loss.append(sum(step_loss[-steps:]) / steps)
            val_loss.append(loss_now)
            val_accuracy.append(accuracy_now)
            if verbose:
                print(
                    f"{epoch:5d}  {train_loss[-1]:10.4f}  {val_loss[-1]:8.4f}  "
                    f"{val_accuracy[-1]:12.4f}  {schedule.get_last_lr()[0]:9.2e}  "
                    f"{time.perf_counter() - start:7.1f}"
                )
    except KeyboardInterrupt:
        if not best_weights:  # nothing to keep yet
            raise
        interrupted = True
        print(f"interrupted: epoch {best_epoch}, the best so far, is scored", file=sys.stderr)
    model.load_state_dict(best_weights)
    seconds = time.perf_counter() - start
    return Training(step_loss, train_loss, val_loss, val_accuracy, best_epoch, seconds, interrupted)


# ---------------------------------------------------------------------------------------------- #
#                                           Evaluation                                           #
# ---------------------------------------------------------------------------------------------- #


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 10) of `model` in evaluation mode for images (N, 28, 28), in order."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(5000)])


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


def confusion_figure(matrix: np.ndarray, class_names: list[str], title: str) -> Figure:
    """One confusion matrix on a page of its own."""
    figure = Figure(figsize=(9, 8.5), layout="constrained")
    draw_confusion(figure.subplots(), matrix, class_names, title)
    return figure


def curves_figure(history: Training, title: str) -> Figure:
    """Losses and validation accuracy by epoch, with the epoch that was kept."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history.val_loss) + 1)
    left.plot(epochs, history.train_loss, "o-", markersize=3, label="training, mean of the epoch")
    left.plot(epochs, history.val_loss, "o-", markersize=3, label="validation, after the epoch")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
    right.plot(epochs, [100 * a for a in history.val_accuracy], "o-", color="C1", markersize=3)
    right.axvline(history.best_epoch, color="grey", linestyle=":", label="epoch kept")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    return figure


def mistakes_figure(data: Data, probabilities: Tensor, title: str) -> Figure:
    """The 18 wrong answers on the test set that the net was most certain of."""
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != data.test_labels).nonzero().squeeze(1)
    worst = wrong[confidence[wrong].argsort(descending=True)][:18].tolist()
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.subplots(3, 6).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, i in zip(grid, worst, strict=False):
        axes.imshow(data.test_images[i].numpy(force=True), cmap="gray")
        truth, answer = data.class_names[data.test_labels[i]], data.class_names[predicted[i]]
        axes.set_title(f"true: {truth}\nsaid: {answer} ({confidence[i]:.1%})", fontsize=9)
    figure.suptitle(f"{title}: {len(wrong)} wrong of {len(predicted)}, the most confident")
    return figure


def flattening_figure(data: Data, title: str) -> Figure:
    """A digit as 28 x 28 pixels and as the row of 784 numbers that the first layer sees."""
    image = data.test_images[0].numpy(force=True)
    row, col = divmod(int(image.argmax()), 28)
    row = min(row, 26)
    a, b = 28 * row + col, 28 * (row + 1) + col  # two neighbours, one above the other
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    picture, flat = figure.subplots(1, 2, width_ratios=[1, 2.2])
    picture.imshow(image, cmap="gray")
    picture.scatter([col, col], [row, row + 1], s=30, c=["C1", "C0"], edgecolors="white")
    picture.set(xlabel="column", ylabel="row", title="28 x 28: the marked pixels touch")
    flat.plot(image.ravel(), color="grey", linewidth=0.7)
    marks = image.ravel()[[a, b]]
    flat.scatter([a, b], marks, s=50, c=["C1", "C0"], edgecolors="white", zorder=3)
    for edge in range(0, 785, 28):
        flat.axvline(edge - 0.5, color="grey", linewidth=0.3)
    flat.set(
        xlabel="position in the row of 784 (a line at each 28)",
        ylabel="normalised brightness",
        title=f"784 in a row: positions {a} and {b}, 28 apart",
        xlim=(-0.5, 783.5),
    )
    figure.suptitle(title)
    return figure


def loss_vs_weight_figure(model: MLP, data: Data, title: str) -> Figure:
    """The real loss along one weight vector, and the steps of gradient descent down that curve.

    The weight vector w of one output unit moves to w + alpha w / |w|, all else stays as trained;
    the loss is the cross-entropy on 5,000 training images. Two learning rates start alike.
    """
    digit, output, labels = 8, model.layers[-1], data.train_labels[:5000]
    with torch.no_grad():
        features = model.eval().layers[:-1](data.train_images[:5000].flatten(1))  # (5000, width)
        length = output.weight[digit].norm()
        direction = torch.zeros_like(output.weight)
        direction[digit] = output.weight[digit] / length

    def loss(alpha: Tensor) -> Tensor:
        weight = output.weight.detach() + alpha * direction
        return F.cross_entropy(F.linear(features, weight, output.bias), labels)

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, lr in zip(figure.subplots(1, 2, sharey=True), (2.0, 20.0), strict=True):
        alpha, path = -4 * length.clone(), []
        for _ in range(20):
            alpha = alpha.detach().requires_grad_()
            value = loss(alpha)
            path.append((alpha.item(), value.item()))
            (slope,) = torch.autograd.grad(value, alpha)
            alpha = alpha - lr * slope  # gradient descent
        end = max(4 * length.item(), *(x for x, _ in path))
        curve = torch.linspace(-4 * length.item(), end, 100, device=features.device)
        with torch.no_grad():
            axes.plot(curve.tolist(), [loss(x).item() for x in curve], color="grey", label="loss")
        axes.plot(*zip(*path, strict=True), "o-", color="C1", markersize=4, label="20 steps")
        axes.axvline(0, color="grey", linestyle=":", label="trained weights")
        axes.set(xlabel="alpha: distance from the trained weights", title=f"learning rate {lr:g}")
        axes.set_ylabel("cross-entropy (nats)")
        axes.legend()
    figure.suptitle(
        f"{title}\nloss of 5,000 training images along the weight vector of output unit {digit}"
    )
    return figure


def first_layer_figure(model: MLP, title: str) -> Figure:
    """The 32 first-layer weight vectors with the largest norms, as 28 x 28 pictures."""
    weight = model.layers[0].weight.numpy(force=True)  # (units, 784)
    strongest = np.linalg.norm(weight, axis=1).argsort()[::-1][:32]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    grid = figure.subplots(4, 8)
    limit = np.abs(weight[strongest]).max()
    for axes in grid.flat:
        axes.axis("off")
    for axes, unit in zip(grid.flat, strongest, strict=False):
        picture = axes.imshow(
            weight[unit].reshape(28, 28), cmap="coolwarm", vmin=-limit, vmax=limit
        )
    figure.colorbar(picture, ax=grid, label="weight", shrink=0.8)
    figure.suptitle(title)
    return figure


# ---------------------------------------------------------------------------------------------- #
#                                            Studies                                             #
# ---------------------------------------------------------------------------------------------- #

STUDY_SEEDS = 3


def study_setting(data: Data, config: Config, bar: tqdm) -> dict:
    """Train one setting with three seeds and score each net on the validation split."""
    accuracies, seconds, matrix = [], [], 0
    for seed in range(config.seed, config.seed + STUDY_SEEDS):
        torch.manual_seed(seed)
        model = MLP(config.hidden, config.dropout).to(data.train_images.device)
        history = train(model, data, config, verbose=False)
        if history.interrupted:
            raise KeyboardInterrupt
        predictions = predict(model, data.val_images).argmax(1)
        results = score(data.val_labels, predictions, data.class_names)
        accuracies.append(results["accuracy"])
        seconds.append(history.seconds)
        matrix = matrix + results["confusion_matrix"]
        bar.update()
    return {
        "accuracy": float(np.mean(accuracies)),
        "std": float(np.std(accuracies, ddof=1)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": float(np.mean(seconds)),
        "confusion_matrix": matrix,
    }


def study(data: Data, config: Config, images_dir: Path) -> dict[str, dict]:
    """Two experiments, scored on the validation split: depth, and one fixed shuffle of the pixels.

    All settings share the epochs and the width of the run; the shuffled net has two hidden layers.
    """
    shuffle = torch.randperm(784, generator=torch.Generator().manual_seed(config.seed))
    shuffled = data._replace(
        train_images=data.train_images.flatten(1)[:, shuffle].view(-1, 28, 28),
        val_images=data.val_images.flatten(1)[:, shuffle].view(-1, 28, 28),
    )
    width = config.hidden[0] if config.hidden else 512
    settings = {f"{depth} hidden": (data, depth) for depth in (0, 1, 2, 4, 8)}
    settings["2, shuffled"] = (shuffled, 2)
    found = {}
    with tqdm(total=len(settings) * STUDY_SEEDS, desc="study", disable=None) as bar:
        for name, (images, depth) in settings.items():
            found[name] = study_setting(images, replace(config, hidden=(width,) * depth), bar)

    what = f"{data.name}, validation split, {STUDY_SEEDS} seeds, {config.epochs} epochs"
    print(f"\n{what}\nlayers       accuracy     std  parameters  seconds")
    for name, row in found.items():
        print(
            f"{name:11}  {row['accuracy']:8.4f}  {row['std']:6.4f}  {row['parameters']:10,}  "
            f"{row['seconds']:7.1f}"
        )

    depths = {name: row for name, row in found.items() if name != "2, shuffled"}
    best = max(depths, key=lambda name: depths[name]["accuracy"])
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    axes = figure.subplot_mosaic([["depth", "depth"], ["none", "best"]], height_ratios=[1, 2.4])
    percent = [(100 * row["accuracy"], 100 * row["std"]) for row in depths.values()]
    axes["depth"].errorbar(list(depths), *zip(*percent, strict=True), fmt="o-", capsize=4)
    axes["depth"].set(ylabel="accuracy (%)", title=f"mean and standard deviation, width {width}")
    axes["depth"].grid(alpha=0.3)
    for place, name in (("none", "0 hidden"), ("best", best)):
        heading = f"{name}: {depths[name]['accuracy']:.2%}"
        draw_confusion(axes[place], depths[name]["confusion_matrix"], data.class_names, heading)
    figure.suptitle(f"{what}: depth")
    save_figure(figure, images_dir / "part1_study_depth.png")

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    before, after, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.1])
    before.imshow(data.val_images[0].numpy(force=True), cmap="gray")
    after.imshow(shuffled.val_images[0].numpy(force=True), cmap="gray")
    pair = {"in place": found["2 hidden"], "shuffled": found["2, shuffled"]}
    for axis, (name, row) in zip((before, after), pair.items(), strict=True):
        axis.set(title=f"pixels {name}: {row['accuracy']:.2%}", xlabel="column", ylabel="row")
    percent = [(100 * row["accuracy"], 100 * row["std"]) for row in pair.values()]
    bars.errorbar(list(pair), *zip(*percent, strict=True), fmt="o", capsize=6)
    bars.set(ylabel="accuracy (%)", title="mean and standard deviation", xlim=(-0.5, 1.5))
    bars.grid(alpha=0.3)
    figure.suptitle(f"{what}: the same shuffle of the 784 pixels for every image")
    save_figure(figure, images_dir / "part1_study_shuffled_pixels.png")
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


def main(config: Config) -> dict:
    """Train, score the test set once, draw; returns the results as a dict.

    Raises KeyboardInterrupt, after all is drawn, if training was interrupted.
    """
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    require_writable(config.images_dir, "--images-dir")
    data = load_data(config.data_dir, config.seed, device)
    offline = data.name != DATASET.__name__
    images_dir = config.images_dir / "offline" if offline else config.images_dir
    require_writable(images_dir, "--images-dir")
    model = MLP(config.hidden, config.dropout).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{data.name}: {len(data.train_images):,} training, {len(data.val_images):,} validation, "
        f"{len(data.test_images):,} test images; {parameters:,} parameters; device {device}"
    )

    history = train(model, data, config)
    probabilities = predict(model, data.test_images).softmax(1)  # the one look at the test set
    predictions = probabilities.argmax(1)
    results = {"dataset": data.name}
    results |= score(data.test_labels, predictions, data.class_names)
    results["train_seconds"] = history.seconds
    results["epochs_run"] = len(history.val_loss)
    results["parameters"] = parameters
    print(f"\n{data.name}, test set\n{results['report']}")

    title = f"{data.name}, MLP {config.hidden}: test accuracy {results['accuracy']:.2%}"
    if history.interrupted:
        title += f", interrupted after epoch {results['epochs_run']}"
    figures = {
        "part1_training_curves": curves_figure(history, title),
        "part1_confusion_matrix": confusion_figure(
            results["confusion_matrix"], data.class_names, title
        ),
        "part1_mistakes": mistakes_figure(data, probabilities, title),
        "part1_flattening": flattening_figure(data, f"{data.name}: what flattening loses"),
        "part1_loss_vs_weight": loss_vs_weight_figure(model, data, title),
        "part1_first_layer": first_layer_figure(
            model, f"{title}\nthe 32 strongest weight vectors of the first layer"
        ),
    }
    for name, figure in figures.items():
        save_figure(figure, images_dir / f"{name}.png")
    if history.interrupted:
        raise KeyboardInterrupt
    if config.study:
        results["study"] = study(data, config, images_dir)
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
