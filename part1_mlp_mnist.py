"""A multilayer perceptron on MNIST: the metrics and the training loop by hand.

Each image of 28 x 28 pixels is laid out as one row x of 784 numbers. Every hidden layer makes
of x, or of the h of the layer below,

    h = dropout(relu(batch_norm(W x)))

and a last linear layer, W h + b, makes of the final h one score (logit) for each digit.

    python part1_mlp_mnist.py                                  # train, score, draw
    python part1_mlp_mnist.py --save mlp.pt                    # keep the net, then read a photo:
    python part1_mlp_mnist.py --load mlp.pt --predict 7.jpg    # --help has every setting

Expect 98.8 % on the test set after 20 s of training on a CPU. The lesson ends with `main`.

References: Rumelhart et al. 1986 (back-propagation); Ioffe & Szegedy 2015 (batch norm).
"""

import copy
import hashlib
import math
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageFilter, ImageOps
from pydantic import Field, FilePath, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.metrics import classification_report, confusion_matrix
from torch import Tensor, nn
from torch.optim import AdamW
from torchvision import datasets
from tqdm import tqdm

CHECKS = {"validate_default": True, "allow_inf_nan": False, "extra": "forbid"}
Share = Annotated[float, Field(ge=0, lt=1)]
ROW = "{epoch:5}  {train_loss:10.4f}  {val_loss:8.4f}  {val_accuracy:12.4f}  {seconds:7.1f}"


@dataclass(frozen=True, config=CHECKS)
class Config:
    """Every setting of a run. Edit a default here, or pass the flag of the same name."""

    hidden: tuple[PositiveInt, ...] = (512, 512)  # widths of the hidden layers; (64,) is one
    dropout: Share = 0.0  # share of hidden activations zeroed in training
    epochs: PositiveInt = 6  # passes over the training split
    batch_size: Annotated[int, Field(ge=2, le=55_000)] = 256  # images in one gradient step
    lr: PositiveFloat = 6e-3  # peak learning rate: it rises to this, then falls to zero
    weight_decay: NonNegativeFloat = 0.05  # AdamW's pull of the weights towards zero
    label_smoothing: Share = 0.1  # share of each target spread over all ten classes
    augment: NonNegativeFloat = 0.0  # strength of the random warp; 0 is off, 1 is full
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products in training
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of every random number
    seeds: PositiveInt = 1  # runs of the command line, with seed, seed + 1, ...
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, MPS or CPU
    data_dir: Path = Path("data")  # where MNIST lies, or is downloaded to
    images_dir: Path = Path("images")  # where the figures go
    save: Path | None = None  # file for the trained net
    load: FilePath | None = None  # file of a saved net, to read pictures with
    predict: tuple[FilePath, ...] = ()  # pictures of digits, to be read by it

    def __post_init__(self) -> None:
        if self.predict and not self.load:
            raise UserError("predict needs a trained net: name its file with load")
        if self.load and (self.save or self.seeds > 1 or not self.predict):
            raise UserError("load reads pictures: it needs predict, and no save or seeds")


# ----------------------------------- model ----------------------------------- #
class MLP(nn.Module):
    """Hidden layers of these widths, then ten scores: (B, 28, 28) -> logits (B, 10)."""

    def __init__(self, hidden: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        layers = []
        n_in = 28 * 28
        for n_out in hidden:
            linear = nn.Linear(n_in, n_out, bias=False)  # batch norm would subtract a bias again
            layers += [linear, nn.BatchNorm1d(n_out), nn.ReLU(), nn.Dropout(dropout)]
            n_in = n_out
        layers.append(nn.Linear(n_in, 10))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.flatten(1))  # (B, 784): no pixel has neighbours any more


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


def train_epoch(model: MLP, data: Data, config: Config, optimizer: AdamW, epoch: int) -> float:
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
        if config.augment:
            images = augment(images, config.augment)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = model(images).float()  # (B, 10)
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Again without smoothing, as in validation; detached, as nothing learns from it.
        losses.append(F.cross_entropy(logits.detach(), labels))
    return torch.stack(losses).mean().item()  # here the CPU waits for the GPU


def train(model: nn.Module, data: Data, config: Config) -> tuple[list[dict], dict]:
    """Fit `model`, load the weights that validated best; returns all epochs and the best."""
    optimizer = AdamW(model.parameters(), weight_decay=config.weight_decay, fused=True)
    history = []
    best = None
    start = time.perf_counter()
    print("epoch  train loss  val loss  val accuracy  seconds")
    try:
        for epoch in range(1, config.epochs + 1):
            train_loss = train_epoch(model, data, config, optimizer, epoch)
            logits = predict(model, data.val.images)  # (5000, 10)
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
                best_weights = copy.deepcopy(model.state_dict())
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
    if config.load:
        return predict_photos(config)
    config.images_dir.mkdir(parents=True, exist_ok=True)  # told now if that is impossible
    if config.save:
        config.save.parent.mkdir(parents=True, exist_ok=True)
        config.save.open("ab").close()  # a folder cannot be opened
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    data = load_data(config, device)
    model = MLP(config.hidden, config.dropout).to(device)
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
    if config.save:
        save_net(model, data, config)
    folder = figure_folder(config, data.name)
    save_figure(curves_figure(history, best, title), folder / "part1_training_curves.png")
    matrix = confusion_figure(results["confusion_matrix"], data.class_names, title)
    save_figure(matrix, folder / "part1_confusion_matrix.png")
    return results


# ===== The lesson ends here. Below: figures, photos, saved nets, the command line. ===== #


def augment(images: Tensor, strength: float) -> Tensor:
    """Turn, scale, shear and shift images (B, 28, 28), each by its own random affine map."""
    device = images.device
    # At strength 1, each entry of the map is up to this far from the identity.
    spread = strength * torch.tensor([[0.15, 0.25, 0.14], [0.25, 0.15, 0.14]], device=device)
    change = spread * (2 * torch.rand(len(images), 2, 3, device=device) - 1)
    grid = F.affine_grid(torch.eye(2, 3, device=device) + change, [len(images), 1, 28, 28], False)
    edge = 1 - 1 / 28  # the centre of the outermost pixel, which goes on beyond the border
    return F.grid_sample(images[:, None], grid.clamp(-edge, edge), align_corners=False)[:, 0]


NOT_SURE = 0.7  # largest probability below which no digit is named


def open_photo(path: Path) -> Image.Image:
    """The picture in a file: grey, upright, at most 640 x 640 pixels, nothing transparent."""
    try:
        with Image.open(path) as file:
            photo = ImageOps.exif_transpose(file)
        photo = photo.convert("RGBA")
        photo.thumbnail((640, 640))
        page = Image.new("RGBA", photo.size, "grey")  # both black and white ink stand out from it
        return Image.alpha_composite(page, photo).convert("L")
    except Exception as error:  # there is no end to what a damaged picture can cause
        raise UserError(f"cannot read {path} as a picture, save it as JPEG ({error})") from None


def erase_lines(ink: np.ndarray) -> np.ndarray:
    """Ink (H, W) without the lines that cross it from side to side, as on ruled paper."""
    steps = Image.fromarray(ink).resize((16, len(ink)), Image.Resampling.BOX)
    steps = np.array(steps).T  # (16, H): a line goes up or down by at most a pixel in a step
    for _ in range(2):  # from side to side, and back
        for step in range(1, 16):
            reached = ndimage.maximum_filter1d(steps[step - 1], 3)
            steps[step] = np.minimum(steps[step], reached)
        steps = steps[::-1]
    lines = Image.fromarray(steps.T).resize(ink.shape[::-1], Image.Resampling.NEAREST)
    lines = 1.5 * np.asarray(lines)  # with its soft edges
    left = (ink - lines).clip(0)
    joined = ndimage.grey_closing(left, (11, 1))  # a stroke that crosses a line goes on
    return np.where(lines > ink.max() / 4, joined, left).astype(np.uint8)


def find_digit(photo: Image.Image) -> np.ndarray:
    """Where the digit is, (H, W); nowhere if there is none, or more than one."""
    paper = photo.filter(ImageFilter.BoxBlur(max(photo.size) / 3))  # its shade, without the digit
    inks = ImageChops.subtract(paper, photo), ImageChops.subtract(photo, paper)
    ink = np.array(max(inks, key=np.max))  # darker or lighter than the paper: what stands out more
    if min(photo.size) > 64:  # a small drawing has neither lines nor a table around it
        ink = erase_lines(erase_lines(ink).T).T
        pieces, _ = ndimage.label(ink > 30)
        H, W = ink.shape
        middle = pieces[H // 3 : -H // 3, W // 3 : -W // 3]
        edge = np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])
        ink[np.isin(pieces, np.setdiff1d(edge, middle))] = 0  # the table, a finger
    pieces, _ = ndimage.label(ink > max(ink.max() / 3, 10), np.ones((3, 3)))
    boxes = ndimage.find_objects(pieces)
    if ink.max() < 30:
        return pieces < 0
    sizes = np.array([max(y.stop - y.start, x.stop - x.start) for y, x in boxes])
    y, x = boxes[sizes.argmax()]
    above = max(2, sizes.max() // 3)  # so near are parts of it, as a 5's bar
    beside = max(2, sizes.max() // 8)  # but a second digit stands beside the first
    top = max(0, y.start - above)
    left = max(0, x.start - beside)
    near = np.unique(pieces[top : y.stop + above, left : x.stop + beside])
    others = np.delete(sizes, near[near > 0] - 1)
    if np.any(others > sizes.max() / 2):
        return pieces < 0
    specks = np.flatnonzero(sizes < sizes.max() / 10) + 1
    return np.isin(pieces, np.setdiff1d(near, np.append(specks, 0)))


def prepare_photo(path: Path) -> Tensor:
    """The digit in a file as MNIST has it, (28, 28) uint8 (LeCun et al. 1998, section III A)."""
    digit = find_digit(open_photo(path))
    if not digit.any():
        raise UserError(f"{path}: no digit is to be seen, or more than one")
    image = Image.fromarray(digit)
    image = image.crop(image.getbbox()).convert("L")
    zoom = math.ceil(160 / max(image.size))
    image = image.resize([zoom * n for n in image.size])
    size = max(image.size)
    ink = np.pad(np.asarray(image) > 127, size // 8)
    inside = ndimage.distance_transform_edt(ink)
    outside = ndimage.distance_transform_edt(~ink)
    # MNIST's strokes are 2 to 3 pixels of 20 wide: thinner and thicker ones become so.
    width = 4 * (inside[ink].mean() - 0.5)
    stroke = np.clip(20 * width / size, 2.25, 3)
    wanted = stroke * (size - width) / (20 - stroke)
    image = Image.fromarray(outside - inside < (wanted - width) / 2)
    image = image.crop(image.getbbox()).convert("L")
    image = ImageOps.contain(image, (20, 20))
    row, column = ndimage.center_of_mass(np.asarray(image))  # to stand in the middle
    picture = Image.new("L", (28, 28))
    picture.paste(image, (round(14 - column), round(14 - row)))
    return torch.tensor(np.asarray(picture))


def predict_photos(config: Config) -> dict:
    """Let the net in the file `config.load` read `config.predict`; print and draw its answers."""
    try:
        saved = torch.load(config.load, map_location="cpu", weights_only=True)  # runs no code
        model = MLP(saved["hidden"])
        model.load_state_dict(saved["weights"])
        print(f"{config.load}: hidden {saved['hidden']}, trained on {saved['dataset']}")
    except Exception as error:  # there is no end to what a strange file can cause
        raise UserError(f"{config.load} is no net of this script: {error!r:.150}") from None
    pictures = torch.stack([prepare_photo(path) for path in config.predict])  # (N, 28, 28)
    images = (pictures - saved["mean"]) / saved["std"]
    probabilities = predict(model, images).softmax(1)  # (N, 10)
    n = min(8, len(pictures))  # more could not be seen
    figure, grid = new_figure(f"trained on {saved['dataset']}", (10, 3 * n), n, 3, squeeze=False)
    for i, (path, p) in enumerate(zip(config.predict, probabilities, strict=True)):
        likely = ", ".join(f"{digit} {p[digit]:.1%}" for digit in p.topk(3).indices)
        answer = f"{p.argmax()}" if p.max() > NOT_SURE else "not sure"
        print(f"{path}: {answer} ({likely})")
        if i < n:
            grid[i, 0].imshow(open_photo(path), cmap="gray", vmin=0, vmax=255).axes.set_axis_off()
            grid[i, 1].imshow(pictures[i].numpy(), cmap="gray").axes.set_axis_off()
            grid[i, 1].set(title=f"what the net sees: {answer}")
            grid[i, 2].bar(range(10), p.numpy())
            grid[i, 2].set(ylim=(0, 1), xticks=range(10), xlabel="digit", ylabel="probability")
    folder = figure_folder(config, saved["dataset"])
    save_figure(figure, folder / "part1_prediction.png")
    return {"probabilities": probabilities, "dataset": saved["dataset"], "stopped": False}


def save_net(model: nn.Module, data: Data, config: Config) -> None:
    """Write the trained weights with all that is needed to use them."""
    saved = {"hidden": config.hidden, "weights": model.state_dict(), "dataset": data.name}
    torch.save(saved | {"mean": data.mean, "std": data.std}, config.save)
    print(f"saved {config.save}")


class MNIST(datasets.MNIST):
    """torchvision's MNIST, with one more mirror, which mainland China can reach."""

    mirrors = (*datasets.MNIST.mirrors, "https://dataset.bj.bcebos.com/mnist/")


DATASET = MNIST
CLASS_NAMES = list("0123456789")
MD5 = ("365dab9bac26085dc69f1022fe166e2f", "a9c5e64a683c5dd2f6a9bf7c61b53e6f")  # training, test

# Part 2 has the functions from here on, too, and part 3 those from `new_figure` on.


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
    """What was trained, and its test accuracy."""
    text = f"{results['dataset']}, MLP {config.hidden}: test accuracy {results['accuracy']:.2%}"
    if results["stopped"]:
        text += f", stopped after epoch {len(results['history'])} of {config.epochs}"
    return text


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
