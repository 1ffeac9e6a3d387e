"""What the page says beyond a run: times, tables, and the figures that no run draws.

    python tests/benchmark.py                          # part1 photos part2 part3
    python tests/benchmark.py cache keys --seeds 5     # --help has all sections and options

Times on a shared machine vary; a ratio of two times that were taken in turns varies less.
Each section's docstring says what it compares, and how long it takes on two cores.
"""

import contextlib
import functools
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from photos import photograph
from PIL import Image
from torch import Generator, Tensor, nn, profiler
from torch.optim import AdamW
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import part1_mlp_mnist as part1
import part2_rnn_fashion as part2
import part3_attention as part3

ROOT = Path(__file__).resolve().parent.parent
LIMIT_STEPS = 10  # in one timing of `limit`
Maker = Callable[[], nn.Module]
Section = Literal[
    "part1",
    "photos",
    "part2",
    "part3",
    "limit",
    "cache",
    "keys",
    "pooling",
    "mistakes",
    "first_layer",
    "learning_rates",
    "gradients",
    "qkv",
    "decode",
]
Sections = tyro.conf.Positional[tuple[Section, ...]]


@dataclass(frozen=True)
class Options:
    """What to run, and the settings of the sections that have any."""

    sections: Sections = ("part1", "photos", "part2", "part3")
    data_dir: Path = Path(os.environ.get("DATA_DIR", ROOT / "data"))  # MNIST, Fashion-MNIST
    images_dir: Path = ROOT / "images"  # where the figures go
    epochs: int = part2.Config().epochs  # of gradients
    seeds: int = 3  # of cache, keys, pooling: 0, 1, ...
    steps: int = part3.Config().steps  # of cache, keys, pooling, qkv
    lookups: int = part3.Config().lookups  # of cache, keys, pooling, qkv
    seq_len: int = part3.Config().seq_len  # of cache, keys, pooling, qkv


# ----------------------------------- helpers ----------------------------------- #
def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of `run`, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def medians_in_turns(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """`median_seconds` of each, five times in turns: a slow spell meets all of them."""
    rounds = []
    for _ in range(5):
        rounds.append([median_seconds(run, repeats) for run in runs])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


@functools.cache
def trained_mlp(options: Options) -> tuple[part1.MLP, part1.Data]:
    """Part 1's default net, as its `main` trains it, and the data; trained once a run."""
    config = part1.Config(data_dir=options.data_dir)
    torch.manual_seed(config.seed)
    device = part1.pick_device(config.device)
    data = part1.load_data(config, device)
    model = part1.MLP(config.hidden, config.dropout).to(device)
    history, _ = part1.train(model, data, config)
    if len(history) < config.epochs:
        raise KeyboardInterrupt  # train makes the best of Ctrl-C; here it is the end
    return model, data


def mlp_title(model: part1.MLP, data: part1.Data) -> str:
    """The net and its test accuracy."""
    answers = part1.predict(model, data.test.images).argmax(1)
    accuracy = (answers == data.test.labels).float().mean().item()
    return f"{data.name}, MLP {part1.Config().hidden}: test accuracy {accuracy:.2%}"


def lookup_config(options: Options) -> part3.Config:
    """Part 3's default settings with those of the options."""
    return part3.Config(steps=options.steps, lookups=options.lookups, seq_len=options.seq_len)


def train_quietly(
    net: part3.LookupNet,
    config: part3.Config,
    validation: part3.Sequences,
    generator: Generator,
) -> list[dict]:
    """Part 3's `train` without its rows; Ctrl-C is the end."""
    with contextlib.redirect_stdout(None):
        history = part3.train(net, config, validation, generator)
    if history[-1]["step"] < config.steps:
        raise KeyboardInterrupt
    return history


def train_variant(make_attention: Maker, config: part3.Config, seed: int) -> dict:
    """Train a net with this attention, on what part 3's `main` draws with this seed."""
    device = part3.pick_device("auto")
    generator = Generator(device).manual_seed(seed)
    test = part3.make_sequences(2000, config, generator)
    validation = part3.make_sequences(1000, config, generator)
    torch.manual_seed(seed)
    net = part3.LookupNet(make_attention(), config).to(device)
    history = train_quietly(net, config, validation, generator)
    logits, right_token = part3.predict(net, test)
    solved = [row["step"] for row in history if row["val_accuracy"] >= 0.99]
    return {
        "net": net,
        "test": test,
        "validation": validation,
        "right_token": right_token,  # (L, n_head)
        "accuracy": (logits.argmax(2) == test.label).float().mean().item(),
        "steps_to_99": solved[0] if solved else math.nan,
        "seconds": history[-1]["seconds"],
    }


def print_variants(makers: dict[str, Maker], options: Options) -> None:
    """Train each variant with each seed; one row each, as soon as it is there."""
    config = lookup_config(options)
    print(f"  {config.lookups} lookups among {config.seq_len} tokens, {config.steps} steps")
    by_seed = "by seed".ljust(8 * options.seeds)
    print(f"  variant     cached  accuracy, %  {by_seed}  99 % after steps, by seed")
    for name, make_attention in makers.items():
        runs = [train_variant(make_attention, config, seed) for seed in range(options.seeds)]
        cached = runs[0]["net"].attention.cached
        accuracies = [100 * run["accuracy"] for run in runs]
        each = "".join(f"{accuracy:8.2f}" for accuracy in accuracies)
        steps = "".join(f"{run['steps_to_99']:8.0f}" for run in runs).replace("nan", "  -")
        print(f"  {name:10}  {cached:6}  {np.mean(accuracies):11.2f}  {each}  {steps}")


# ------------------------------------ times ------------------------------------ #
def usual_script(data_dir: Path, target: float) -> tuple[float, int, float]:
    """Train as the usual tutorial does, to `target` test accuracy; seconds, epochs, accuracy.

    torchvision with ToTensor and Normalize, a DataLoader, 784-512-512-10, Adam, batches of
    128. Only the training epochs are timed, at most 30. Like most tutorials, it watches the
    test set.
    """
    torch.manual_seed(0)
    normalise = transforms.Normalize((0.1307,), (0.3081,))
    scale = transforms.Compose([transforms.ToTensor(), normalise])
    training = datasets.MNIST(data_dir, train=True, transform=scale)
    test = datasets.MNIST(data_dir, train=False, transform=scale)
    loader = DataLoader(training, batch_size=128, shuffle=True)
    test_loader = DataLoader(test, batch_size=1000)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    optimizer = torch.optim.Adam(model.parameters())
    seconds = 0.0
    for epoch in range(1, 31):
        start = time.perf_counter()
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.perf_counter() - start
        right = 0
        with torch.no_grad():
            for images, labels in test_loader:
                right += (model(images).argmax(1) == labels).sum().item()
        accuracy = right / len(test)
        print(f"  usual script, epoch {epoch}: {accuracy:.4f}, {seconds:.1f} s")
        if accuracy >= target:
            break
    return seconds, epoch, accuracy


def plain_script(split: part1.Split, epochs: int, batch_size: int) -> float:
    """Seconds of part 1's net in plain PyTorch on tensors: what the data path alone gives."""
    model = part1.MLP((512, 512))
    optimizer = AdamW(model.parameters())
    n = len(split.labels) // batch_size * batch_size
    start = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(split.labels))
        for batch in order[:n].split(batch_size):
            loss = F.cross_entropy(model(split.images[batch]), split.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.perf_counter() - start


def part1_times(options: Options) -> None:
    """Part 1's training against two plain scripts, and the share spent outside the products.

    It takes three minutes, or as long as the usual script needs to 98.4 %.
    """
    config = part1.Config(data_dir=options.data_dir)
    data = part1.load_data(config, torch.device("cpu"))
    for dropout in (0.2, 0.0):
        torch.manual_seed(config.seed)
        model = part1.MLP(config.hidden, dropout)
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profile:
            part1.train(model, data, replace(config, epochs=1))
        total = 0.0
        products = 0.0
        for row in profile.key_averages():
            total += row.self_cpu_time_total
            if row.key in ("aten::addmm", "aten::mm"):
                products += row.self_cpu_time_total
        share = 1 - products / total
        print(f"  dropout {dropout}: {share:.0%} of operators' time not in matrix products")
    torch.manual_seed(config.seed)
    history, _ = part1.train(part1.MLP(config.hidden), data, config)
    ours = history[-1]["seconds"]
    plain = plain_script(data.train, config.epochs, config.batch_size)
    print(f"  part 1, {config.epochs} epochs: {ours:.1f} s, validation included")
    print(f"  the same net, batches and epochs in plain PyTorch on tensors: {plain:.1f} s")
    usual, epochs, accuracy = usual_script(options.data_dir, target=0.984)
    each = usual / epochs
    ratio = each / (plain / config.epochs)
    print(f"  usual script: {each:.1f} s an epoch, {ratio:.1f} times that of plain tensors")
    print(f"  usual script to 98.4 % ({accuracy:.2%}): {epochs} epochs, {usual:.1f} s")
    print(f"  part 1 takes 1/{usual / ours:.1f} of that")


def prepared_photo(path: Path) -> Tensor:
    """Part 1's `prepare_photo`; without a digit, NaN, of which no net is sure."""
    try:
        return part1.prepare_photo(path).float()
    except part1.UserError:
        return torch.full((28, 28), math.nan)


def photos(options: Options) -> None:
    """Part 1's net on 500 photographed test digits: with the preparation, and with less.

    The last row is all originals, prepared as if they were photos. It takes three minutes.
    """
    model, data = trained_mlp(options)
    _, _, _, test = part1.read_dataset(options.data_dir)
    rng = np.random.default_rng(0)
    untouched = []
    prepared = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        for image in test.images[:500]:
            photograph(Image.fromarray(image.numpy()), rng).save(path)
            small = Image.open(path).resize((28, 28))
            untouched.append(torch.tensor(np.asarray(small)))
            prepared.append(prepared_photo(path))
        path = Path(folder) / "digit.png"
        originals = []
        for image in test.images:
            Image.fromarray(image.numpy()).save(path)
            originals.append(prepared_photo(path))
    untouched = torch.stack(untouched)
    prepared = torch.stack(prepared)
    pictures = {
        "photos as they are, 28 x 28": untouched,
        "photos turned over, light on dark": 255 - untouched,
        "photos prepared": prepared,
        "photos prepared, but dark on light": 255 - prepared,
        "photos prepared, 4 pixels off the middle": prepared.roll((-4, -4), (1, 2)),
        "originals": test.images,
        "originals prepared like photos": torch.stack(originals),
    }
    print("  pictures                                  number   right  wrong  not sure, none")
    for name, images in pictures.items():
        images = (images.to(data.test.images.device) - data.mean) / data.std
        confidence, answers = part1.predict(model, images).softmax(1).cpu().max(1)
        named = confidence > part1.NOT_SURE
        right = (named & (answers == test.labels[: len(images)])).sum() / len(images)
        wrong = named.sum() / len(images) - right
        shares = f"{right:6.1%}  {wrong:5.1%}  {1 - right - wrong:14.1%}"
        print(f"  {name:40}  {len(images):6}  {shares}")


def part2_times(options: Options) -> None:
    """Forward and backward of each cell over torch.nn's, same weights, 28 steps, in turns.

    It takes three minutes.
    """
    device = part2.pick_device("auto")
    for cell, kind in (("tanh", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)):
        for batch, size, hidden in ((64, 28, 128), (256, 128, 128), (256, 128, 256)):
            torch.manual_seed(0)
            theirs = kind(size, hidden).to(device)
            ours = part2.RecurrentLayer(size, hidden, cell, orthogonal=False).to(device)
            weights = {
                "W_ih.weight": theirs.weight_ih_l0,
                "W_ih.bias": theirs.bias_ih_l0,
                "W_hh.weight": theirs.weight_hh_l0,
                "W_hh.bias": theirs.bias_hh_l0,
            }
            ours.load_state_dict(weights)
            x = torch.randn(28, batch, size, device=device)
            direction = torch.randn(28, batch, hidden, device=device)
            our_step = partial(forward_and_backward, ours, x, direction)
            their_step = partial(forward_and_backward, theirs, x, direction)
            mine, torchs = medians_in_turns([our_step, their_step], repeats=5)
            times = f"{1e3 * mine:.1f} ms, PyTorch's {1e3 * torchs:.1f} ms"
            ratio = mine / torchs
            print(f"  {cell}, batch {batch}, hidden {hidden}: {times}, ratio {ratio:.2f}")


def forward_and_backward(rnn: nn.Module, x: Tensor, direction: Tensor) -> None:
    """Gradients of a sum over all states (T, B, H), weighted by `direction`."""
    states = rnn(x)
    if isinstance(states, tuple):  # torch.nn's return the last state, too
        states = states[0]
    (states * direction).sum().backward()


@torch.no_grad()
def decode_once() -> None:
    """One decoding step, batch 4, 32 heads of 64, 8,192 tokens: ours and PyTorch's, in ms."""
    device = part3.pick_device("auto")
    row = []
    for n_kv_head in (32, 8, 1):
        q = torch.randn(4, 32, 1, 64, device=device)
        k = torch.randn(4, n_kv_head, 8192, 64, device=device)
        v = torch.randn(4, n_kv_head, 8192, 64, device=device)
        ours = partial(part3.attention, q, k, v)
        theirs = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
        for run in (ours, theirs):
            row.append(1e3 * median_seconds(run, 7))
    print(" ".join(f"{milliseconds:.3f}" for milliseconds in row))


def print_ratio(what: str, above: tuple[float, ...], below: tuple[float, ...]) -> None:
    """Median and range of the ratios of two columns of times."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    print(f"  {what}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def part3_times(options: Options) -> None:
    """Decoding ratios over five fresh processes, and the time of a step of each training.

    The C library hands the large temporaries back to the system and each step faults them in
    again, in some processes and not in others: with these two settings it keeps them. It
    takes a minute.
    """
    keep = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
    run_it = "import benchmark; benchmark.decode_once()"
    rows = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", run_it],
            cwd=ROOT / "tests",
            env=os.environ | keep,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        rows.append([float(number) for number in done.stdout.split()])
    mha, mha_torch, gqa, gqa_torch, mqa, mqa_torch = zip(*rows, strict=True)
    for name, times in (("MHA", mha), ("GQA-8", gqa), ("MQA", mqa)):
        median = statistics.median(times)
        print(f"  {name}: {median:.2f} ms (median of {len(rows)} processes)")
    print_ratio("MHA over GQA-8 (bytes read: 4)", mha, gqa)
    print_ratio("MHA over MQA (bytes read: 32)", mha, mqa)
    print_ratio("PyTorch's enable_gqa over ours, MHA", mha_torch, mha)
    print_ratio("PyTorch's enable_gqa over ours, GQA-8", gqa_torch, gqa)
    print_ratio("PyTorch's enable_gqa over ours, MQA", mqa_torch, mqa)
    config = part3.Config()
    generator = Generator().manual_seed(0)
    for name, make_attention in part3.variants(config).items():
        net = part3.LookupNet(make_attention(), config)
        optimizer = AdamW(net.parameters(), fused=True)
        ten = partial(part3.train_steps, net, config, generator, optimizer, range(10))
        print(f"  {name}: {100 * median_seconds(ten, 3):.1f} ms a training step")


def products_alone(layers: list[tuple[int, int, int, int]], dtype: torch.dtype) -> Callable:
    """A function that does a step's matrix products: y = x W^T, dW = dy^T x, dx = dy W.

    The first layer's dx is not needed: x is data. Each layer is (rows of x, numbers in,
    numbers out, times in a step).
    """
    tensors = []
    for rows, n_in, n_out, times in layers:
        x = torch.randn(rows, n_in, dtype=dtype)
        W = torch.randn(n_out, n_in, dtype=dtype)
        dy = torch.randn(rows, n_out, dtype=dtype)
        tensors.append((x, W, dy, times))

    def run() -> None:
        for i, (x, W, dy, times) in enumerate(tensors):
            for _ in range(times):
                torch.mm(x, W.T)
                torch.mm(dy.T, x)
                if i > 0:
                    torch.mm(dy, W)

    return run


def limit(options: Options) -> None:
    """A step of parts 1 and 2 over its matrix products alone: how much more can be gained.

    The step is the script's own (`train_epoch`) on random images; part 2's includes its
    mirroring, clipping and averaging. Medians of five, in turns. It takes 40 seconds.
    """
    B = 256
    mlp_layers = [(B, 784, 512, 1), (B, 512, 512, 1), (B, 512, 10, 1)]
    rows = 28 * B  # encoder and W_ih take all steps at once, W_hh one at a time
    rnn_layers = [(rows, 28, 128, 1), (rows, 128, 256, 1), (B, 256, 256, 28), (B, 512, 10, 1)]
    images = torch.randn(LIMIT_STEPS * B, 28, 28)
    split = part1.Split(images, torch.randint(10, (len(images),)))
    data = part1.Data("random", [], 0.0, 1.0, train=split, val=split, test=split)
    precisions = ["float32"]
    if "bf16" in cpu_info():
        precisions.append("bfloat16")
    threads_before = torch.get_num_threads()
    print("  part  precision  threads  products, ms  step, ms  ratio")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for precision in precisions:
            dtype = getattr(torch, precision)
            config = part1.Config(batch_size=B, precision=precision)
            model = part1.MLP(config.hidden)
            optimizer = AdamW(model.parameters(), fused=True)
            epoch = partial(part1.train_epoch, model, data, config, optimizer, 1)
            print_limit(1, precision, products_alone(mlp_layers, dtype), epoch)
            config = part2.Config(batch_size=B, precision=precision)
            model = part2.RowRNN(config)
            optimizer = AdamW(model.parameters(), fused=True)
            averaging = part2.swa_utils.get_ema_multi_avg_fn(0.99)
            ema = part2.swa_utils.AveragedModel(model, multi_avg_fn=averaging)
            epoch = partial(part2.train_epoch, model, ema, data, config, optimizer, 1)
            print_limit(2, precision, products_alone(rnn_layers, dtype), epoch)
    torch.set_num_threads(threads_before)


def print_limit(part: int, precision: str, products: Callable, epoch: Callable) -> None:
    """One row of `limit`: `epoch` is LIMIT_STEPS steps."""
    products_seconds, epoch_seconds = medians_in_turns([products, epoch], repeats=1)
    step_seconds = epoch_seconds / LIMIT_STEPS
    times = f"{1e3 * products_seconds:12.2f}  {1e3 * step_seconds:8.2f}"
    ratio = step_seconds / products_seconds
    print(f"  {part:4}  {precision:9}  {torch.get_num_threads():7}  {times}  {ratio:5.2f}")


# ------------------------------- part 3's tables ------------------------------- #
KINDS = {8: "MHA", 4: "GQA", 2: "GQA", 1: "MQA"}  # by key/value heads, for 8 query heads


def cache(options: Options) -> None:
    """Ways to spend a cache of 16 to 32 numbers a token: test accuracy, steps to 99 %.

    With three seeds it takes 25 minutes.
    """
    config = lookup_config(options)
    C = config.d_model
    H = config.n_head
    d_own = config.head_dim  # of the keys and values that MLA's heads make
    makers = {}
    for numbers in (16, 24, 32):
        for n_kv_head in KINDS:
            if numbers % (2 * n_kv_head) == 0:
                d = numbers // (2 * n_kv_head)
                make = partial(part3.GroupedQueryAttention, C, H, n_kv_head, d, d)
                makers[f"{KINDS[n_kv_head]} {n_kv_head}x{d}"] = make
        make = partial(part3.MultiHeadLatentAttention, C, H, numbers, d_own, d_own)
        makers[f"MLA {numbers}"] = make
    print_variants(makers, options)


def keys(options: Options) -> None:
    """How wide must a key be? Tried below and at the page's rule; values of 8 numbers are ample.

    The rule: two numbers for each lookup in a key that all query heads share, two in a head's
    own key. With `--steps 6000 --seeds 2` it takes ten minutes.
    """
    config = lookup_config(options)
    C = config.d_model
    H = config.n_head
    makers = {}
    for n_kv_head, at_rule in ((1, 2 * config.lookups), (H, 2)):
        for d in (at_rule - 1, at_rule):
            make = partial(part3.GroupedQueryAttention, C, H, n_kv_head, d, 8)
            makers[f"{KINDS[n_kv_head]} {n_kv_head}x{d}+8"] = make
    print_variants(makers, options)


def pool_heads(weights: dict[str, Tensor], n_head: int, n_kv_head: int) -> dict[str, Tensor]:
    """Each key/value head becomes the mean of those it replaces (Ainslie et al. 2023)."""
    pooled = dict(weights)
    for name in ("attention.k_proj.weight", "attention.v_proj.weight"):
        heads = weights[name].unflatten(0, (n_kv_head, n_head // n_kv_head, -1))
        pooled[name] = heads.mean(1).flatten(0, 1)  # (n_kv_head d, C)
    return pooled


def pooling(options: Options) -> None:
    """From MHA to GQA and MQA by pooling, beside a new start: accuracy after further steps.

    Mean accuracy on the validation sequences. With three seeds it takes eight minutes.
    """
    config = lookup_config(options)
    device = part3.pick_device("auto")
    C = config.d_model
    H = config.n_head
    d = config.head_dim
    make_mha = partial(part3.GroupedQueryAttention, C, H, H, d, d)
    runs = [train_variant(make_mha, config, seed) for seed in range(options.seeds)]
    accuracy = 100 * np.mean([run["accuracy"] for run in runs])
    shares = (0, 5, 10, 20, 40)
    print(f"  MHA {H}x{d}: test accuracy {accuracy:.2f} %, {len(runs)} seeds")
    print("  further steps, %     " + "".join(f"{share:8}" for share in shares))
    for n_kv_head in (4, 2, 1):
        for start in ("pooled", "from scratch"):
            row = f"  {KINDS[n_kv_head]} {n_kv_head}x{d}, {start:12}"
            for share in shares:
                accuracies = []
                for seed, run in enumerate(runs):
                    torch.manual_seed(seed)
                    attention = part3.GroupedQueryAttention(C, H, n_kv_head, d, d)
                    net = part3.LookupNet(attention, config).to(device)
                    if start == "pooled":
                        net.load_state_dict(pool_heads(run["net"].state_dict(), H, n_kv_head))
                    if share > 0:
                        shorter = replace(config, steps=max(1, config.steps * share // 100))
                        generator = Generator(device).manual_seed(1000 + seed)
                        train_quietly(net, shorter, run["validation"], generator)
                    logits, _ = part3.predict(net, run["validation"])
                    right = logits.argmax(2) == run["validation"].label
                    accuracies.append(100 * right.float().mean().item())
                row += f"{np.mean(accuracies):8.2f}"
            print(row)


# ----------------------------------- figures ----------------------------------- #
def mistakes(options: Options) -> None:
    """Draw the 18 wrong answers on the test set that part 1's net was most certain of.

    It takes the training of that net, 20 s.
    """
    model, data = trained_mlp(options)
    confidence, answers = part1.predict(model, data.test.images).softmax(1).max(1)
    wrong = (answers != data.test.labels).nonzero().squeeze(1)
    worst = wrong[confidence[wrong].argsort(descending=True)].tolist()
    title = mlp_title(model, data)
    title += f"\n{len(wrong)} wrong of {len(answers):,}, the most confident"
    figure, grid = part1.new_figure(title, (10, 7.1), 3, 6)
    for axes in grid.flat:
        axes.set_axis_off()  # there may be fewer mistakes than places
    for axes, i in zip(grid.flat, worst, strict=False):
        true = data.class_names[data.test.labels[i]]
        answer = data.class_names[answers[i]]
        axes.imshow(data.test.images[i].cpu(), cmap="gray")
        axes.set_title(f"true: {true}\nanswer: {answer} ({confidence[i]:.1%})", fontsize=10)
    folder = part1.figure_folder(options, data.name)
    part1.save_figure(figure, folder / "part1_mistakes.png")


def first_layer(options: Options) -> None:
    """Draw the 32 weight vectors of largest norm in the first layer of part 1's net.

    It takes the training of that net, 20 s.
    """
    model, data = trained_mlp(options)
    weight = model.layers[0].weight.detach().cpu()  # (512, 784)
    norms = weight.norm(dim=1)
    title = mlp_title(model, data)
    title += "\nfirst layer, weight vectors of largest norm: red is positive, blue negative"
    figure, grid = part1.new_figure(title, (10, 6.5), 4, 8)
    for axes, i in zip(grid.flat, norms.argsort(descending=True), strict=False):
        picture = weight[i].view(28, 28) / norms[i]
        axes.imshow(picture, cmap="coolwarm", vmin=-0.17, vmax=0.17)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"norm {norms[i]:.1f}", fontsize=10)
    folder = part1.figure_folder(options, data.name)
    part1.save_figure(figure, folder / "part1_first_layer.png")


def learning_rates(options: Options) -> None:
    """Draw plain gradient descent, its gradient by hand, on a net without a hidden layer.

    It takes a second.
    """
    data = part1.load_data(part1.Config(data_dir=options.data_dir), torch.device("cpu"))
    x = data.train.images[:1000].flatten(1)  # (N, 784)
    y = data.train.labels[:1000]  # (N,)
    title = f"{data.name}: gradient descent on 1,000 images, no hidden layer, starting at 0"
    figure, axes = part1.new_figure(title, (10, 4.4))
    for lr in (0.001, 0.1, 10):
        W = torch.zeros(10, 784)
        losses = []
        for _ in range(31):
            logits = x @ W.T  # (N, 10)
            losses.append(F.cross_entropy(logits, y).item())
            error = logits.softmax(1) - F.one_hot(y, 10)  # p - y, (N, 10)
            W -= lr * error.T @ x / len(y)
        axes.plot(losses, "o-", markersize=4, label=f"learning rate {lr}")
        told = f"from {losses[0]:.2f}, at most {max(losses):.2f}, to {losses[-1]:.2f}"
        print(f"  rate {lr}: {told}")
    axes.set(xlabel="steps", ylabel="cross-entropy (nats)", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    folder = part1.figure_folder(options, data.name)
    part1.save_figure(figure, folder / "part1_learning_rates.png")


def gradient_by_step(model: part2.RowRNN, data: part2.Data) -> np.ndarray:
    """(T,) mean over 500 validation images of |dL/d pixels| of each step's own rows."""
    model.eval()
    images = data.val.images[:500].clone().requires_grad_()
    loss = F.cross_entropy(model(images), data.val.labels[:500], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)  # (500, 28, 28)
    gradient = gradient.view(len(images), -1, model.pixels)  # (500, T, pixels)
    return gradient.norm(dim=2).mean(0).cpu().numpy()


def gradients(options: Options) -> None:
    """Draw `gradient_by_step` of part 2's net, and of untrained ones, which read the last h.

    It takes the training of that net, four minutes; `--epochs` makes it shorter.
    """
    config = part2.Config(data_dir=options.data_dir, epochs=options.epochs)
    torch.manual_seed(config.seed)
    device = part2.pick_device(config.device)
    data = part2.load_data(config, device)
    trained = part2.RowRNN(config).to(device)
    history, best = part2.train(trained, data, config)
    if len(history) < config.epochs:
        raise KeyboardInterrupt
    orthogonal = replace(config, readout="last")
    random = replace(config, readout="last", orthogonal=False)
    nets = {
        f"trained {config.cell}, reads mean and maximum": trained,
        "tanh, W_hh orthogonal": part2.RowRNN(orthogonal),
        "tanh": part2.RowRNN(random),
        "GRU": part2.RowRNN(replace(random, cell="gru")),
        "LSTM": part2.RowRNN(replace(random, cell="lstm")),
        "LSTM, forget bias 1": part2.RowRNN(replace(random, cell="lstm")),
    }
    layer = nets["LSTM, forget bias 1"].down
    forget = 1  # the second of the four blocks
    layer.W_hh.bias.detach().chunk(4)[forget].fill_(1)
    layer.W_ih.bias.detach().chunk(4)[forget].fill_(0)
    title = f"{data.name}: gradient by row. Trained net: validation accuracy "
    title += f"{best['val_accuracy']:.2%}; untrained nets read the last state"
    figure, axes = part2.new_figure(title, (10, 5.5))
    for name, net in nets.items():
        norms = gradient_by_step(net.to(device), data)
        label = f"{name}: first over last {norms[0] / norms[-1]:.2g}"
        print(f"  {label}")
        axes.plot(range(1, len(norms) + 1), norms, "o-", markersize=4, label=label)
    axes.set(xlabel="row t, from the top", ylabel="mean norm of dL/d(row t)", yscale="log")
    axes.set_xticks([1, 4, 8, 12, 16, 20, 24, 28])
    figure.legend(loc="outside lower center", ncols=2)
    part2.save_figure(
        figure, part2.figure_folder(options, data.name) / "part2_gradient_by_step.png"
    )


@torch.no_grad()
def qkv(options: Options) -> None:
    """Draw the numbers in a trained MHA: its best head for the first lookup, on one sequence.

    It takes the training of that net, 30 s.
    """
    config = lookup_config(options)
    name, make_attention = next(iter(part3.variants(config).items()))
    with torch.enable_grad():
        run = train_variant(make_attention, config, config.seed)
    net = run["net"]
    first = part3.Sequences(*(field[:1] for field in run["test"]))
    q, k, v = net.attention.heads(net.embed(first))
    _, weights = net(first)
    head = int(run["right_token"][0].argmax())
    kv = head * k.shape[1] // q.shape[1]  # the key/value head that it uses
    panels = {
        "Q: what each token wants": (q[0, head], "dimension"),
        "K: what each token is called": (k[0, kv], "dimension"),
        "V: what each token has to give": (v[0, kv], "dimension"),
        "Q K^T: not yet divided, nor masked": (q[0, head] @ k[0, kv].T, "token looked at"),
        "weights: each row adds up to 1": (weights[0, head], "token looked at"),
        "output = weights V": (weights[0, head] @ v[0, kv], "dimension"),
    }
    title = f"{name}, head {head}, one test sequence; test accuracy {run['accuracy']:.2%}"
    figure, grid = part3.new_figure(title, (11, 8), 2, 3)
    for axes, (heading, (matrix, across)) in zip(grid.flat, panels.items(), strict=True):
        matrix = matrix[:12, :12].cpu().numpy()  # as much as can be read
        largest = 1.4 * np.abs(matrix).max()  # black text is readable on all of it
        axes.imshow(matrix, aspect="auto", cmap="coolwarm", vmin=-largest, vmax=largest)
        decimals = 1 if np.abs(matrix).max() < 20 else 0  # more would not fit
        for (i, j), value in np.ndenumerate(matrix):
            axes.text(j, i, f"{value:.{decimals}f}", ha="center", va="center", fontsize=9)
        axes.set(title=heading, ylabel="token", xlabel=across)
        axes.set_xticks(range(matrix.shape[1]))
        axes.set_yticks(range(matrix.shape[0]))
    part3.save_figure(figure, options.images_dir / "part3_qkv.png")


def decoding_step(module: nn.Module, context: int) -> tuple[float, int]:
    """Median milliseconds of one more token for a batch of 4, and the bytes of the cache."""
    x = torch.randn(4, 1, module.q_proj.in_features, device=module.q_proj.weight.device)
    memory = part3.KVCache(context)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        y, _ = module(x, cache=memory)
        y.sum().item()  # waits until the device is done
        times.append(1e3 * (time.perf_counter() - start))
        memory.length = context - 1  # as if all tokens but the last were there
    return statistics.median(times[2:]), sum(tensor.nbytes for tensor in memory.memory)


@torch.no_grad()
def decode(options: Options) -> None:
    """Draw the time of one decoding step by context, projections included, for each variant.

    It takes two seconds.
    """
    config = part3.Config()
    device = part3.pick_device("auto")
    times_as_wide = 64 // config.head_dim
    wide = replace(
        config,
        d_model=times_as_wide * config.d_model,
        head_dim=times_as_wide * config.head_dim,
        value_dim=times_as_wide * config.value_dim,
        cache=tuple(times_as_wide * numbers for numbers in config.cache),
    )
    title = f"One decoding step: batch 4, {wide.n_head} query heads, float32, {device}\n"
    title += f"every width is {times_as_wide} times the default's, so heads are of 64 there"
    figure, axes = part3.new_figure(title, (10, 5.5))
    contexts = [512, 1024, 2048, 4096, 8192]
    for name, make_attention in part3.variants(wide).items():
        module = make_attention().to(device)
        milliseconds = []
        for context in contexts:
            median, size = decoding_step(module, context)
            milliseconds.append(median)
        label = f"{name}: {size // 2**20} MiB, {milliseconds[-1]:.1f} ms"
        print(f"  {label}")
        axes.plot(contexts, milliseconds, "o-", label=label)
    axes.set(xlabel="tokens in the cache", ylabel="milliseconds", yscale="log")
    axes.set_xticks(contexts[1:])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(title=f"{contexts[-1]:,} tokens: cache, time of a step")
    part3.save_figure(figure, options.images_dir / "part3_decode.png")


def cpu_info() -> str:
    """What Linux tells of the processor; nothing on other systems."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    for line in cpu_info().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


SECTIONS = {
    "part1": part1_times,
    "photos": photos,
    "part2": part2_times,
    "part3": part3_times,
    "limit": limit,
    "cache": cache,
    "keys": keys,
    "pooling": pooling,
    "mistakes": mistakes,
    "first_layer": first_layer,
    "learning_rates": learning_rates,
    "gradients": gradients,
    "qkv": qkv,
    "decode": decode,
}

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # rows reach a file or a pipe at once
    options = tyro.cli(Options)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}")
    for name in options.sections:
        print(name)
        start = time.perf_counter()
        SECTIONS[name](options)
        print(f"  {name} took {time.perf_counter() - start:.0f} s")
