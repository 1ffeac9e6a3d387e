"""A hand-rolled tanh RNN that reads Fashion-MNIST images row by row; also as a GRU or an LSTM.

An image is a sequence of 28 rows of 28 pixels. A small network encodes each row as x_t, and the
recurrent layer carries one state h from top to bottom; its mean and maximum are classified:

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    python part2_rnn_fashion.py    # train, score, draw; --cell gru, --help for every setting

Expect 90.5 % on the test set after four minutes of training on a CPU. From `Split` to `main`,
where the lesson ends, it is part 1's, plus mirroring, clipping and averaging.

References: Elman 1990 (tanh RNN); Pascanu et al. 2013 (clipping); Polyak & Juditsky 1992
(averaging).
"""

import copy
import hashlib
import math
import socket
import sys
import textwrap
import time
from dataclasses import fields, replace
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
from sklearn.datasets import load_digits
from sklearn.metrics import classification_report, confusion_matrix
from torch import Tensor, nn
from torch.optim import AdamW, swa_utils
from torchvision import datasets
from tqdm import tqdm

CHECKS = {"validate_default": True, "allow_inf_nan": False, "extra": "forbid"}
Share = Annotated[float, Field(ge=0, lt=1)]
ROW = "{epoch:5}  {train_loss:10.4f}  {val_loss:8.4f}  {val_accuracy:12.4f}  {seconds:7.1f}"


@dataclass(frozen=True, config=CHECKS)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    cell: Literal["tanh", "gru", "lstm"] = "tanh"  # what one step computes
    hidden_size: PositiveInt = 256  # numbers in the state h
    bidirectional: bool = False  # also read from the bottom row to the top row
    rows_per_step: Literal[1, 2, 4, 7, 14, 28] = 1  # rows read in a step; 28: no sequence
    encoder_size: Annotated[int, Field(ge=2)] = 128  # numbers that encode a step's pixels
    readout: Literal["pool", "last"] = "pool"  # classify mean and max of states, or the last
    orthogonal: bool = True  # start W_hh orthogonal: then W_hh h is as long as h
    dropout: Share = 0.0  # share of what the classifier sees that is zeroed in training
    epochs: PositiveInt = 16  # passes over the training split
    batch_size: Annotated[int, Field(ge=1, le=55_000)] = 256  # images in one gradient step
    lr: PositiveFloat = 3e-3  # peak learning rate: it rises to this, then falls to zero
    clip_norm: PositiveFloat = 1.0  # a longer gradient is scaled down to this length
    ema: Annotated[float, Field(ge=0, le=1)] = 0.06  # share of steps that weights are averaged over
    weight_decay: NonNegativeFloat = 0.01  # AdamW's pull of the weights towards zero
    label_smoothing: Share = 0.05  # share of each target spread over all ten classes
    mirror: bool = True  # mirror images left to right at random in training
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products in training
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of every random number
    seeds: PositiveInt = 1  # runs of the command line, with seed, seed + 1, ...
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, MPS or CPU
    data_dir: Path = Path("data")  # where Fashion-MNIST lies, or is downloaded to
    images_dir: Path = Path("images")  # where the figures go


# ----------------------------------- model ----------------------------------- #
# One step of each cell, from the state h (B, H) to the next; the LSTM has a second state, c.
# x_t: the input's part, W_ih x_t + b_ih, H numbers for each gate and candidate; W_hh has a bias.


def tanh_step(x_t: Tensor, h: Tensor, c: Tensor, W_hh: nn.Linear) -> tuple[Tensor, Tensor]:
    """Elman 1990."""
    return torch.tanh(x_t + W_hh(h)), c


def gru_step(x_t: Tensor, h: Tensor, c: Tensor, W_hh: nn.Linear) -> tuple[Tensor, Tensor]:
    """Cho et al. 2014, but the reset gate comes after the product, as in PyTorch: r (W h + b)."""
    x_r, x_z, x_n = x_t.chunk(3, dim=1)
    h_r, h_z, h_n = W_hh(h).chunk(3, dim=1)
    r = torch.sigmoid(x_r + h_r)  # reset: how much of h the candidate n sees
    z = torch.sigmoid(x_z + h_z)  # update: how much of h stays
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h, c


def lstm_step(x_t: Tensor, h: Tensor, c: Tensor, W_hh: nn.Linear) -> tuple[Tensor, Tensor]:
    """Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000."""
    i, f, g, o = (x_t + W_hh(h)).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # forget some, add some
    return torch.sigmoid(o) * torch.tanh(c), c


STEPS = {"tanh": tanh_step, "gru": gru_step, "lstm": lstm_step}
BLOCKS = {"tanh": 1, "gru": 3, "lstm": 4}  # gates and candidates: H rows of weights each


class RecurrentLayer(nn.Module):
    """One layer, one direction: x (T, B, input_size) -> all states h (T, B, hidden_size)."""

    def __init__(self, input_size: int, hidden_size: int, cell: str, orthogonal: bool) -> None:
        super().__init__()
        self.step = STEPS[cell]
        self.W_ih = nn.Linear(input_size, BLOCKS[cell] * hidden_size)
        self.W_hh = nn.Linear(hidden_size, BLOCKS[cell] * hidden_size)
        bound = 1 / math.sqrt(hidden_size)  # as nn.RNN starts: W_hh does so anyway, W_ih not
        for parameter in self.W_ih.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if orthogonal:
            for block in self.W_hh.weight.detach().split(hidden_size):
                nn.init.orthogonal_(block)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], self.W_hh.in_features)  # (B, H), for every batch anew
        c = h
        states = []
        for x_t in self.W_ih(x):  # one product for all steps, then one step after the other
            h, c = self.step(x_t, h, c, self.W_hh)
            states.append(h)
        return torch.stack(states)


class RowRNN(nn.Module):
    """Encode the rows, read them, classify the states: (B, 28, 28) -> logits (B, 10)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.pixels = 28 * config.rows_per_step  # that one step sees
        self.readout = config.readout
        two_ways = config.bidirectional
        E = config.encoder_size
        H = config.hidden_size
        self.encoder = nn.Sequential(nn.Linear(self.pixels, E), nn.LayerNorm(E), nn.ReLU())
        self.down = RecurrentLayer(E, H, config.cell, config.orthogonal)
        self.up = RecurrentLayer(E, H, config.cell, config.orthogonal) if two_ways else None
        features = 2 * H if two_ways else H
        if config.readout == "pool":
            features = 2 * features
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(features, 10))

    def forward(self, images: Tensor) -> Tensor:
        rows = images.reshape(len(images), -1, self.pixels)  # (B, T, pixels)
        x = self.encoder(rows.transpose(0, 1))  # (T, B, E): time comes first
        states = self.down(x)  # (T, B, H)
        if self.up is not None:
            states = torch.cat([states, self.up(x.flip(0))], dim=2)  # (T, B, 2 H)
        if self.readout == "last":
            return self.classifier(states[-1])
        return self.classifier(torch.cat([states.mean(0), states.amax(0)], dim=1))


# ----------------------------------- data ------------------------------------ #
class Split(NamedTuple):
    """Images (N, 28, 28) and their labels (N,)."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """A dataset on the device, its images normalised: mean 0, standard deviation 1."""

    name: str
    class_names: list[str]
    mean: float  # of the training split's pixels, 0 to 255
    std: float
    train: Split
    val: Split
    test: Split


def load_data(config: Config, device: torch.device) -> Data:
    """Read the dataset, split it by the seed into training and validation, normalise it."""
    name, class_names, training, test = read_dataset(config.data_dir)
    n_val = min(5000, len(training.labels) // 7)
    n_train = len(training.labels) - n_val
    if config.batch_size > n_train:
        raise UserError(f"batch_size is {config.batch_size}: {name} has {n_train} images")
    generator = torch.Generator().manual_seed(config.seed)
    train, val = torch.randperm(n_train + n_val, generator=generator).split([n_train, n_val])
    mean = training.images[train].float().mean().item()  # of the training split only
    std = training.images[train].float().std().item()
    images = (training.images.to(device) - mean) / std
    labels = training.labels.to(device)
    return Data(
        name=name,
        class_names=class_names,
        mean=mean,
        std=std,
        train=Split(images[train], labels[train]),
        val=Split(images[val], labels[val]),
        test=Split((test.images.to(device) - mean) / std, test.labels.to(device)),
    )


# --------------------------------- training ---------------------------------- #
def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear up to `peak` over a fifth of the steps, then linear down to nearly zero."""
    return peak * min(1.0, (step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))


def train_epoch(
    model: RowRNN, ema: nn.Module, data: Data, config: Config, optimizer: AdamW, epoch: int
) -> float:
    """One pass over the training split in random batches; returns the mean loss."""
    n = len(data.train.labels)
    device = data.train.labels.device
    steps = n // config.batch_size  # images that fill no batch wait for another epoch's order
    order = torch.randperm(n, device=device)[: steps * config.batch_size]
    batches = order.split(config.batch_size)
    losses = []  # on the device: to look at one, the CPU would wait for the GPU in every step
    model.train()
    for i, batch in enumerate(tqdm(batches, f"epoch {epoch}", leave=False, disable=None)):
        step = (epoch - 1) * steps + i
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.epochs * steps, config.lr)
        images = data.train.images[batch]  # (B, 28, 28)
        labels = data.train.labels[batch]  # (B,)
        if config.mirror:
            images = mirror(images)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = model(images).float()  # (B, 10)
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        ema.update_parameters(model)  # the running mean of the weights
        # Again without smoothing, as in validation; detached, as nothing learns from it.
        losses.append(F.cross_entropy(logits.detach(), labels))
    return torch.stack(losses).mean().item()  # here the CPU waits for the GPU


def train(model: nn.Module, data: Data, config: Config) -> tuple[list[dict], dict]:
    """Fit `model`, load the weights that validated best; returns all epochs and the best."""
    optimizer = AdamW(model.parameters(), weight_decay=config.weight_decay, fused=True)
    steps = config.epochs * (len(data.train.labels) // config.batch_size)
    decay = 1 - 1 / max(1, config.ema * steps)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    history = []
    best = None
    start = time.perf_counter()
    print("epoch  train loss  val loss  val accuracy  seconds")
    try:
        for epoch in range(1, config.epochs + 1):
            train_loss = train_epoch(model, ema, data, config, optimizer, epoch)
            logits = predict(ema.module, data.val.images)  # (5000, 10)
            row = {
                "epoch": epoch,
                "train_loss": train_loss,
                "val_loss": F.cross_entropy(logits, data.val.labels).item(),
                "val_accuracy": (logits.argmax(1) == data.val.labels).float().mean().item(),
                "seconds": time.perf_counter() - start,
            }
            if not math.isfinite(row["train_loss"] + row["val_loss"]):
                raise UserError(f"the loss is NaN or infinite in epoch {epoch}: lower lr")
            history.append(row)
            if best is None or row["val_accuracy"] > best["val_accuracy"]:
                best_weights = copy.deepcopy(ema.module.state_dict())
                best = row
            print(ROW.format(**row))
    except KeyboardInterrupt:  # Ctrl-C: go on with the epochs that are finished
        if best is None:
            raise
        torch.set_grad_enabled(True)  # a step that was interrupted may have left it off
    model.load_state_dict(best_weights)
    return history, best


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 10) of `model` in evaluation mode for images (N, 28, 28), in order."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(1000)])


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


def main(config: Config) -> dict:
    """Train, score the test set once, print, draw; returns the results."""
    config.images_dir.mkdir(parents=True, exist_ok=True)  # told now if that is impossible
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    data = load_data(config, device)
    model = RowRNN(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{data.name}: {parameters:,} parameters; device {device}")
    history, best = train(model, data, config)
    probabilities = predict(model, data.test.images).softmax(1)  # once: it chooses nothing
    predictions = probabilities.argmax(1)
    results = score(data.test.labels, predictions, data.class_names)
    results |= {
        "dataset": data.name,
        "val_accuracy": best["val_accuracy"],
        "train_seconds": history[-1]["seconds"],
        "stopped": len(history) < config.epochs,
        "history": history,
        "probabilities": probabilities,
    }
    title = headline(config, results)
    print_report(title, data.test.labels, predictions, data.class_names)
    folder = figure_folder(config, data.name)
    save_figure(curves_figure(history, best, title), folder / "part2_training_curves.png")
    matrix = confusion_figure(results["confusion_matrix"], data.class_names, title)
    save_figure(matrix, folder / "part2_confusion_matrix.png")
    belief = belief_figure(model, data, probabilities, title)
    save_figure(belief, folder / "part2_belief_by_row.png")
    return results


# ======== The lesson ends here. Below: figures, the dataset, the command line. ======= #


def mirror(images: Tensor) -> Tensor:
    """Each of the images (B, 28, 28) mirrored left to right with probability 1/2."""
    heads = torch.rand(len(images), 1, 1, device=images.device) < 0.5
    return torch.where(heads, images.flip(2), images)


@torch.no_grad()
def belief_figure(model: RowRNN, data: Data, probabilities: Tensor, title: str) -> Figure:
    """Class probabilities after each step: two test images, and the two worst mistakes."""
    confidence, answers = probabilities.max(1)
    wrong = answers != data.test.labels
    worst = (confidence * wrong).argsort(descending=True)[:2].tolist()
    figure, grid = new_figure(title, (10, 10.5), 4, 2, width_ratios=[1, 2.6])
    rows = model.pixels // 28
    for (left, right), i in zip(grid, [0, 5, *worst], strict=True):
        image = data.test.images[i : i + 1]  # (1, 28, 28)
        seen = [image[:, :end] for end in range(rows, 29, rows)]  # cut off: no looking ahead
        belief = torch.cat([model(part) for part in seen]).softmax(1)  # (T, 10)
        true = data.class_names[data.test.labels[i]]
        answer = data.class_names[answers[i]]
        left.imshow(image[0].cpu().numpy(), cmap="gray")
        left.set(title=f"true: {true}\nanswer: {answer}", xticks=[], yticks=[])
        shown = right.imshow(belief.T.cpu().numpy(), vmin=0, vmax=1, extent=(0, 28, 9.5, -0.5))
        right.set(xlabel="rows read", aspect="auto")
        right.set_yticks(range(10), data.class_names)
    figure.colorbar(shown, ax=grid, label="probability", shrink=0.5)
    return figure


class FashionMNIST(datasets.FashionMNIST):
    """torchvision's Fashion-MNIST, with one more mirror, which mainland China can reach."""

    mirrors = (*datasets.FashionMNIST.mirrors, "https://dataset.bj.bcebos.com/fashion_mnist/")


DATASET = FashionMNIST
CLASS_NAMES = FashionMNIST.classes
MD5 = ("819d6ae9214abbc30bd601cb4ad304c0", "2bdc83e1b78e813df8547ccd14b70d8f")  # training, test
PLACES = ("seeds", "device", "data_dir", "images_dir")  # settings that change no score

# Part 1 has the functions from here on, too, and part 3 those from `new_figure` on.


def read_dataset(data_dir: Path) -> tuple[str, list[str], Split, Split]:
    """Its name, class names, training and test split (uint8), downloaded if need be.

    Without them and without a network, scikit-learn's digits. UserError if a file is damaged.
    """
    name = DATASET.__name__
    folder = data_dir / name
    damaged = UserError(f"a file in {folder} is damaged or another's: delete the folder")
    try:
        training = DATASET(data_dir, train=True, download=True)
        test = DATASET(data_dir, train=False, download=True)
    except Exception as error:  # there is no end to what a server or a damaged file can cause
        if len(list(folder.glob("raw/*-ubyte"))) == 4:
            raise damaged from None
        print(f"{error}\n\n*** WARNING: no {name}: it is not in {data_dir}", file=sys.stderr)
        print("*** and no server answered. 8x8 digits stand in.\n", file=sys.stderr)
        return bundled_digits()
    for split, md5 in zip((training, test), MD5, strict=True):
        content = torch.cat([split.data.flatten(), split.targets.byte()]).numpy()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise damaged
    training = Split(training.data, training.targets)
    return name, CLASS_NAMES, training, Split(test.data, test.targets)


def bundled_digits() -> tuple[str, list[str], Split, Split]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged; the last 300 are the test split."""
    digits = load_digits()
    small = torch.tensor(digits.images)[:, None] * (255 / 16)  # (1797, 1, 8, 8)
    images = F.interpolate(small, size=(28, 28), mode="bilinear")[:, 0].round().byte()
    labels = torch.tensor(digits.target).long()
    training = Split(images[:-300], labels[:-300])
    return "sklearn-digits", list("0123456789"), training, Split(images[-300:], labels[-300:])


def figure_folder(config: Config, dataset: str) -> Path:
    """Where the figures of this dataset go: those of a stand-in replace no others."""
    return config.images_dir if dataset == DATASET.__name__ else config.images_dir / "offline"


def print_report(title: str, labels: Tensor, answers: Tensor, class_names: list[str]) -> None:
    """scikit-learn's table of precision, recall and F1 for each class."""
    options = {"labels": range(len(class_names)), "target_names": class_names}
    options |= {"digits": 4, "zero_division": 0}
    report = classification_report(labels.cpu(), answers.cpu(), **options)
    print(f"\n{title}\n{report}")


def curves_figure(history: list[dict], best: dict, title: str) -> Figure:
    """Losses and validation accuracy by epoch, with the epoch that was kept."""
    figure, (left, right) = new_figure(title, (10, 4), 1, 2)
    column = {name: np.array([row[name] for row in history]) for name in best}
    left.plot(column["epoch"], column["train_loss"], "o-", label="training, in the epoch")
    left.plot(column["epoch"], column["val_loss"], "o-", label="validation, after it")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
    right.plot(column["epoch"], 100 * column["val_accuracy"], "o-C1", label="validation")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
    for axes in (left, right):
        axes.axvline(best["epoch"], color="grey", linestyle=":", label="epoch kept")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return figure


def headline(config: Config, results: dict) -> str:
    """The dataset, each setting that is not the default, and the test accuracy."""
    text = results["dataset"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in PLACES:
            text += f", {field.name} {value}"
    text += f": test accuracy {results['accuracy']:.2%}"
    if results["stopped"]:
        text += f", stopped after epoch {len(results['history'])} of {config.epochs}"
    return textwrap.fill(text, 90)


def run_seeds(config: Config) -> bool:
    """Run `main` for each seed, tell the scores of several; True if Ctrl-C ended one."""
    runs = []
    try:
        for seed in range(config.seed, config.seed + config.seeds):
            results = main(replace(config, seed=seed))
            if results["stopped"]:
                return True
            if runs and results["dataset"] != runs[0]["dataset"]:
                raise UserError("the network was gone for some of the seeds: start again")
            runs.append(results)
    finally:  # what is finished is told even if a later run is not
        if len(runs) > 1:
            print(f"\n{len(runs)} seeds: mean +- standard deviation (each)")
            for name in ("val_accuracy", "accuracy", "f1", "train_seconds"):
                values = [run[name] for run in runs]
                spread = np.std(values, ddof=1)
                each = ", ".join(f"{value:.4f}" for value in values)
                print(f"{name:13} {np.mean(values):.4f} +- {spread:.4f} ({each})")
    return False


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
    socket.setdefaulttimeout(8)  # seconds: a server that hangs is given up
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
