"""A hand-rolled tanh RNN that reads Fashion-MNIST images row by row.

An image is a sequence of 28 rows of 28 pixels. A small linear layer encodes each row as x_t, and
the recurrent layer carries one state h through the picture, from the top row to the bottom row:

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

The mean and the maximum of h over the rows then give one score (logit) for each kind of clothing.

    python part2_rnn_fashion.py            # train, score, draw
    python part2_rnn_fashion.py --study    # then batch size, RNN against MLP, and memory
    python part2_rnn_fashion.py --help     # every setting below, as a flag

It prints one row for each epoch, then accuracy, precision, recall and F1 on the 10,000 test images,
and saves its figures in images/. Expect 90.2 % test accuracy (90.24 +- 0.05 over seeds 0, 1, 2),
after 115 s of training on two cores of an AMD EPYC (Zen 5).

References: Elman 1990 (the recurrent layer; with two biases, as in torch.nn.RNN); Werbos 1990
(back-propagation through time); Pascanu, Mikolov & Bengio 2013 (why gradients fade or explode);
Le, Jaitly & Hinton 2015 (images as sequences, and the start of W_hh); Xiao, Rasul & Vollgraf 2017
(Fashion-MNIST).
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
from collections.abc import Callable
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
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------- #
#                                             Config                                             #
# ---------------------------------------------------------------------------------------------- #


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    hidden_size: int = 256  # numbers in the state h
    num_layers: int = 1  # recurrent layers, one on top of the other
    bidirectional: bool = False  # also read from the bottom row to the top row
    rows_per_step: Literal[1, 2, 4, 7, 14, 28] = 1  # rows read in a step; 28: no sequence at all
    encoder_size: int = 128  # each step's pixels are first encoded as this many numbers; 0: not
    readout: Literal["pool", "last"] = "pool"  # classify mean and max of the states, or the last
    orthogonal: bool = True  # start W_hh as a rotation, which keeps the length of the state
    dropout: float = 0.1  # share zeroed in training, between layers and before the classifier
    epochs: int = 14  # passes over the training split
    batch_size: int = 128  # images in one gradient step
    lr: float = 3e-3  # peak learning rate; it warms up to this, then falls to zero
    weight_decay: float = 0.01  # AdamW's pull of the weights towards zero
    label_smoothing: float = 0.05  # share of each target spread over all ten classes
    augment: float = 0.5  # 0: off; 0.5: mirrored at random; n: also moved by up to n pixels
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products in training
    seed: int = 0  # of the split, the weights, the batches, dropout and augmentation
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else the CPU
    data_dir: Path = Path("data")  # where Fashion-MNIST lies, or is downloaded to
    images_dir: Path = Path("images")  # where the figures go
    study: bool = False  # also run the experiments: batch size, RNN against MLP, memory

    def __post_init__(self) -> None:
        """Raise ValueError, naming field, value and what is allowed, before anything is done."""

        def check(name: str, allowed: str, ok: bool) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {allowed}")

        check("hidden_size", "from 1 to 16384", 1 <= self.hidden_size <= 16384)
        check("num_layers", "from 1 to 64", 1 <= self.num_layers <= 64)
        check("encoder_size", "from 0 to 16384", 0 <= self.encoder_size <= 16384)
        check("dropout", "at least 0 and below 1", 0 <= self.dropout < 1)
        check("epochs", "from 1 to 100000", 1 <= self.epochs <= 100_000)
        # Batch norm needs two images to have a variance; the training split has 55,000.
        check("batch_size", "from 2 to 55000", 2 <= self.batch_size <= 55_000)
        check("lr", "above 0 and finite", 0 < self.lr < math.inf)
        check("weight_decay", "at least 0 and finite", 0 <= self.weight_decay < math.inf)
        check("label_smoothing", "at least 0 and below 1", 0 <= self.label_smoothing < 1)
        check("augment", "from 0 to 14", 0 <= self.augment <= 14)
        check("seed", "from 0 to 2**63 - 1", 0 <= self.seed < 2**63)


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------- #
#                                              Data                                              #
# ---------------------------------------------------------------------------------------------- #

DATASET = FashionMNIST
MIRRORS = [
    *FashionMNIST.mirrors,  # torchvision's own
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
]
TIMEOUT = 20  # seconds without a byte: a mirror that hangs must not hang the run
MD5 = {  # of the unpacked files; MNIST's bear the same names, so only this tells them apart
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
CLASS_NAMES = FashionMNIST.classes


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
    """Mirror each image left to right with probability 1/2, and move it by some whole pixels.

    Args:
        strength: 0 returns the images as they came; below 1 mirrors only; from 1 on it is also the
            largest shift in whole pixels, in each direction.

    Shapes: (B, 28, 28) -> (B, 28, 28)
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, images: Tensor) -> Tensor:
        if self.strength == 0:
            return images
        B, device = len(images), images.device
        mirrored = torch.rand(B, 1, 1, device=device) < 0.5
        images = torch.where(mirrored, images.flip(2), images)
        # Pixel i of the moved image is pixel i + shift of the old one; the border repeats.
        limit = int(self.strength)
        shift = torch.randint(-limit, limit + 1, (2, B, 1), device=device)
        rows, columns = (torch.arange(28, device=device) + shift).clamp(0, 27)  # (B, 28) each
        return images[
            torch.arange(B, device=device)[:, None, None], rows[:, :, None], columns[:, None]
        ]


# ---------------------------------------------------------------------------------------------- #
#                                             Model                                              #
# ---------------------------------------------------------------------------------------------- #


class Recurrence(torch.autograd.Function):
    """h_t = tanh(p_t + W_hh h_{t-1}) for all t, with back-propagation through time by hand.

    p (T, B, H) is the projected input W_ih x_t + b_ih + b_hh of every step; returns all the states
    (T, B, H) and the last one (B, H). The gradients follow from tanh' = 1 - tanh^2 (Werbos 1990).
    With g_t = dL/dh_t, what later steps send back included, and delta_t = dL/dp_t:

        delta_t = g_t * (1 - h_t^2)          g_{t-1} = dL/doutput_{t-1} + W_hh^T delta_t
                                             dL/dW_hh = sum over t of delta_t h_{t-1}^T

    Autograd alone would add up dL/dW_hh in T small products; here it is one large one. The states
    overwrite a copy of p, and delta a copy of the states' gradient: one tensor each for all steps.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, p: Tensor, weight_hh: Tensor, h_0: Tensor
    ) -> tuple[Tensor, Tensor]:
        states, h = p.clone(), h_0
        for state in states:  # (B, H): p_t at first, then h_t in the same memory
            h = state.addmm_(h, weight_hh.T).tanh_()
        ctx.save_for_backward(states, weight_hh, h_0)
        return states, h.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_states: Tensor, grad_last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        states, weight_hh, h_0 = ctx.saved_tensors
        delta = grad_states.clone(memory_format=torch.contiguous_format)  # (T, B, H), g at first
        delta[-1] += grad_last
        for t in reversed(range(len(states))):
            torch.ops.aten.tanh_backward.grad_input(delta[t], states[t], grad_input=delta[t])
            if t > 0:
                delta[t - 1].addmm_(delta[t], weight_hh)
        grad_weight_hh = delta[1:].flatten(0, 1).T @ states[:-1].flatten(0, 1)  # (H, H)
        return delta, grad_weight_hh.addmm_(delta[0].T, h_0), delta[0] @ weight_hh


class TanhRNN(nn.Module):
    """A drop-in for torch.nn.RNN(batch_first=True), same parameter names, written by hand.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)      (Elman 1990; torch.nn.RNN's form)

    W_hh is what makes it recurrent: without it, h_t would not know the earlier steps. And the
    state starts at zero (or h_0) in every call: the steps of one image belong together, but the
    images of two batches do not, so nothing is carried from one batch to the next.

    Args:
        input_size, hidden_size: numbers in x_t and in h_t.
        num_layers: layers, each reading the states of the one below.
        bidirectional: a second set of weights reads the steps from last to first.
        dropout: share of the states zeroed between layers in training.

    Shapes: x (B, T, input_size), h_0 (num_layers * directions, B, hidden_size), or None for zeros
        -> output (B, T, directions * hidden_size), h_n like h_0
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_layers, self.dropout = hidden_size, num_layers, dropout
        self.directions = ("", "_reverse") if bidirectional else ("",)
        bound = 1 / math.sqrt(hidden_size)  # torch.nn.RNN's start: uniform within +- bound
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size * len(self.directions)
            for direction in self.directions:
                for name, *shape in (
                    *(("weight_ih", hidden_size, width), ("weight_hh", hidden_size, hidden_size)),
                    *(("bias_ih", hidden_size), ("bias_hh", hidden_size)),
                ):
                    parameter = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
                    self.register_parameter(f"{name}_l{layer}{direction}", parameter)

    def forward(self, x: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1).contiguous()  # (B, T, I) -> (T, B, I): a step's rows lie together
        h_n = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in self.directions:
                weight_ih, weight_hh, bias_ih, bias_hh = (
                    getattr(self, f"{name}_l{layer}{direction}")
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                p = F.linear(x, weight_ih, bias_ih + bias_hh)  # (T, B, H): all steps in one product
                start = p.new_zeros(p.shape[1:]) if h_0 is None else h_0[len(h_n)].to(p.dtype)
                p = p.flip(0) if direction else p  # from the last step to the first
                states, h_T = Recurrence.apply(p, weight_hh.to(p.dtype), start)  # (T, B, H), (B, H)
                h_n.append(h_T)
                outputs.append(states.flip(0) if direction else states)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)  # (T, B, directions H)
        return x.transpose(0, 1), torch.stack(h_n)


class RowRNN(nn.Module):
    """Encode the rows of an image, read them with a TanhRNN, classify what it has seen.

    Shapes: (B, R, 28), R a multiple of rows_per_step (28 for a whole image) -> logits (B, 10)
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.rows_per_step, self.readout = config.rows_per_step, config.readout
        width = 28 * config.rows_per_step
        self.encoder = nn.Identity()
        if config.encoder_size > 0:
            self.encoder = nn.Sequential(
                nn.Linear(width, config.encoder_size), nn.LayerNorm(config.encoder_size), nn.ReLU()
            )
            width = config.encoder_size
        self.rnn = TanhRNN(
            *(width, config.hidden_size, config.num_layers),
            *(config.bidirectional, config.dropout),
        )
        if config.orthogonal:
            for name, parameter in self.rnn.named_parameters():
                if name.startswith("weight_hh"):
                    nn.init.orthogonal_(parameter)
        features = config.hidden_size * (2 if config.bidirectional else 1)
        features *= 2 if config.readout == "pool" else 1
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(features, 10))

    def forward(self, images: Tensor) -> Tensor:
        B = len(images)
        x = images.reshape(B, -1, 28 * self.rows_per_step)  # (B, T, 28 rows_per_step)
        states, h_n = self.rnn(self.encoder(x))  # (B, T, F): the state after each step
        if self.readout == "pool":
            seen = torch.cat([states.mean(1), states.amax(1)], 1)  # (B, 2F)
        else:  # the last state of each direction of the last layer
            directions = len(self.rnn.directions)
            seen = h_n[-directions:].transpose(0, 1).reshape(B, -1)  # (B, F)
        return self.classifier(seen)  # (B, 10)


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


@torch.no_grad()
def belief_figure(model: RowRNN, data: Data, title: str) -> Figure:
    """Four test images, and the class probabilities after each step from the top row down."""
    model.eval()
    chosen = [int((data.test_labels == label).nonzero()[0]) for label in (9, 1, 8, 6)]
    images = data.test_images[chosen]  # (4, 28, 28)
    ends = range(model.rows_per_step, 29, model.rows_per_step)
    # Only the rows above an end are shown to the net, so it cannot look ahead.
    belief = torch.stack([model(images[:, :end]).softmax(1) for end in ends], 2)  # (4, 10, T)
    figure = Figure(figsize=(10, 10.5), layout="constrained")
    grid = figure.subplots(4, 2, width_ratios=[1, 2.6])
    for (left, right), image, probabilities, i in zip(
        grid, images.numpy(force=True), belief.numpy(force=True), chosen, strict=True
    ):
        left.imshow(image, cmap="gray")
        left.set(title=f"true: {data.class_names[data.test_labels[i]]}", ylabel="row")
        shown = right.imshow(
            *(probabilities,),
            **{"cmap": "viridis", "vmin": 0, "vmax": 1, "aspect": "auto"},
            extent=(0, 28, 9.5, -0.5),
        )
        right.set_yticks(range(10), data.class_names, fontsize=8)
        right.set(xlabel="rows read, from the top")
    figure.colorbar(shown, ax=grid, label="probability", shrink=0.5)
    figure.suptitle(title)
    return figure


def gradient_by_step(model: RowRNN, data: Data) -> np.ndarray:
    """(T,) mean over 500 validation images of |dL/dx_t|, x_t the pixels read in step t.

    Each image's own loss is differentiated, in evaluation mode.
    """
    model.eval()
    images = data.val_images[:500].clone().requires_grad_()
    loss = F.cross_entropy(model(images), data.val_labels[:500], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)  # (500, 28, 28)
    by_step = gradient.view(len(gradient), -1, 28 * model.rows_per_step)  # (500, T, pixels)
    return by_step.norm(dim=2).mean(0).cpu().numpy()


def gradient_figure(curves: dict[str, np.ndarray], title: str) -> Figure:
    """`gradient_by_step` of several nets on one logarithmic axis."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, norms in curves.items():
        axes.plot(range(1, len(norms) + 1), norms, "o-", markersize=4, label=name)
    axes.set(xlabel="step t, from the top row down", ylabel="mean norm of dL/dx_t", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(title)
    return figure


# ---------------------------------------------------------------------------------------------- #
#                                            Studies                                             #
# ---------------------------------------------------------------------------------------------- #


def study(data: Data, config: Config, rnn_row: dict, images_dir: Path) -> dict[str, dict]:
    """Three experiments with one seed, scored on the validation split; two figures and a table.

    Batch size: 64 against 640 images a step, three epochs each, all else equal.
    RNN against MLP: the run's own net (`rnn_row`) beside 784-512-512-10 with the same budget.
    Memory: the last state alone is read, W_hh started at random or as a rotation; three epochs.
    """
    found = {"RNN": rnn_row}
    histories, gradients = {}, {}

    def run(name: str, make: Callable[[], nn.Module], setting: Config) -> nn.Module:
        torch.manual_seed(setting.seed)
        model = make().to(data.train_images.device)
        if isinstance(model, RowRNN) and model.readout == "last":
            gradients[f"{name}, before training"] = gradient_by_step(model, data)
        histories[name] = train(model, data, setting, verbose=False)
        if histories[name].interrupted:
            raise KeyboardInterrupt
        if isinstance(model, RowRNN) and model.readout == "last":
            gradients[f"{name}, after"] = gradient_by_step(model, data)
        found[name] = summary(model, histories[name])
        return model

    def mlp() -> nn.Module:
        layers = [nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Dropout(config.dropout)]
        layers += [nn.Linear(512, 512), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(512, 10)]
        return nn.Sequential(*layers)

    bar = tqdm(desc="study", total=5, disable=None)
    run("MLP", mlp, config)
    bar.update()
    for batch_size in (64, 640):
        setting = replace(config, batch_size=batch_size, epochs=3)
        run(f"batch {batch_size}", lambda s=setting: RowRNN(s), setting)
        bar.update()
    for name, orthogonal in (("random W_hh", False), ("orthogonal W_hh", True)):
        setting = replace(config, readout="last", orthogonal=orthogonal, epochs=3)
        run(name, lambda s=setting: RowRNN(s), setting)
        bar.update()
    bar.close()

    what = f"{data.name}, validation split, seed {config.seed}"
    print(f"\n{what}\nnet              epochs  accuracy  parameters  seconds an epoch")
    for name, row in found.items():
        print(
            f"{name:15}  {row['epochs']:6d}  {row['accuracy']:8.4f}  {row['parameters']:10,}  "
            f"{row['seconds_per_epoch']:16.1f}"
        )

    print("\nlast state read out: gradient of the first row, over the last row's")
    for name, norms in gradients.items():
        print(f"{name:32}  {norms[0] / norms[-1]:.1e}")

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for name in ("batch 64", "batch 640"):
        history = histories[name]
        window = max(1, len(history.step_loss) // 60)  # a moving mean, or 64's noise hides all
        loss = np.convolve(history.step_loss, np.ones(window) / window, mode="valid")
        steps = np.arange(window, len(history.step_loss) + 1)
        label = f"{name}: {history.val_accuracy[-1]:.2%}, {history.seconds:.0f} s"
        by_step.plot(steps, loss, label=label)
        by_second.plot(steps / steps[-1] * history.seconds, loss, label=label)
    by_step.set(xlabel="step", ylabel="training loss (nats, moving mean)", yscale="log")
    by_second.set(xlabel="seconds")
    for axes in (by_step, by_second):
        axes.grid(alpha=0.3)
        axes.legend(title="validation accuracy, training time")
    figure.suptitle(f"{what}: batch size, 3 epochs each")
    save_figure(figure, images_dir / "part2_study_batch_size.png")
    title = f"{what}: last state read out, gradient before and after 3 epochs"
    save_figure(gradient_figure(gradients, title), images_dir / "part2_study_memory.png")
    return found


def summary(model: nn.Module, history: Training) -> dict:
    """A row of the study's table: the kept epoch's validation accuracy, and what it cost."""
    epochs = len(history.val_loss)
    return {
        "accuracy": history.val_accuracy[history.best_epoch - 1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_epoch": history.seconds / epochs,
        "epochs": epochs,
    }


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
    model = RowRNN(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{data.name}: {len(data.train_images):,} training, {len(data.val_images):,} validation, "
        f"{len(data.test_images):,} test images; {parameters:,} parameters; device {device}"
    )

    gradients = {"before training": gradient_by_step(model, data)}
    history = train(model, data, config)
    gradients["after training"] = gradient_by_step(model, data)
    probabilities = predict(model, data.test_images).softmax(1)  # the one look at the test set
    predictions = probabilities.argmax(1)
    results = {"dataset": data.name}
    results |= score(data.test_labels, predictions, data.class_names)
    results["train_seconds"] = history.seconds
    results["epochs_run"] = len(history.val_loss)
    results["parameters"] = parameters
    print(f"\n{data.name}, test set\n{results['report']}")

    title = f"{data.name}, tanh RNN {config.hidden_size}: test accuracy {results['accuracy']:.2%}"
    if history.interrupted:
        title += f", interrupted after epoch {results['epochs_run']}"
    figures = {
        "part2_training_curves": curves_figure(history, title),
        "part2_confusion_matrix": confusion_figure(
            results["confusion_matrix"], data.class_names, title
        ),
        "part2_mistakes": mistakes_figure(data, probabilities, title),
        "part2_belief_by_row": belief_figure(model, data, f"{title}\nwhat it believes row by row"),
        "part2_gradient_by_step": gradient_figure(
            gradients, f"{title}\nhow much the pixels of each step move the loss"
        ),
    }
    for name, figure in figures.items():
        save_figure(figure, images_dir / f"{name}.png")
    if history.interrupted:
        raise KeyboardInterrupt
    if config.study:
        results["study"] = study(data, config, summary(model, history), images_dir)
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
