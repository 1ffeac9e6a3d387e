"""How fast the scripts are, as ratios measured in one run: `python tests/benchmark.py [part ...]`.

Part 1 and its photos need the MNIST files (`DATA_DIR`, default `data`), part 1 torchvision as well.
Times on a shared machine vary; a ratio of two times taken in the same run varies less. Each section
says what it compares.
"""

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA_DIR = Path(os.environ.get("DATA_DIR", ROOT / "data"))


def usual_script(target: float, max_epochs: int = 30) -> tuple[float, int, float]:
    """Train as the usual tutorial does, to `target` test accuracy; seconds, epochs, accuracy.

    torchvision with ToTensor and Normalize, a DataLoader, 784-512-512-10, Adam, batches of 128.
    Only the training epochs are timed. Like most tutorials, it watches the test set.
    """
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import MNIST

    torch.manual_seed(0)
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    loader = DataLoader(MNIST(DATA_DIR, True, scale), batch_size=128, shuffle=True)
    test_loader = DataLoader(MNIST(DATA_DIR, False, scale), batch_size=1000)
    model = nn.Sequential(
        *[nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()],
        nn.Linear(512, 10),
    )
    optimizer = torch.optim.Adam(model.parameters())
    seconds = 0.0
    for epoch in range(1, max_epochs + 1):
        start = time.perf_counter()
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.perf_counter() - start
        with torch.no_grad():
            right = sum((model(x).argmax(1) == y).sum().item() for x, y in test_loader)
        print(f"  usual script, epoch {epoch}: {right / 10_000:.4f}, {seconds:.1f} s", flush=True)
        if right / 10_000 >= target:
            break
    return seconds, epoch, right / 10_000


def plain_script(images: Tensor, labels: Tensor, epochs: int, batch: int) -> float:
    """Seconds of part 1's net in plain PyTorch on tensors: what the data path alone gives."""
    layers = [nn.Flatten()]
    for width in (784, 512):
        layers += [nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    start = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for i in range(0, len(images) - batch + 1, batch):
            x, y = images[order[i : i + batch]], labels[order[i : i + batch]]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return time.perf_counter() - start


def part1() -> None:
    """Part 1's training against two plain scripts, and the share spent outside the products."""
    import part1_mlp_mnist as part1

    config = part1.Config(data_dir=DATA_DIR)
    data = part1.load_data(config, torch.device("cpu"))
    for dropout in (0.2, 0.0):
        torch.manual_seed(config.seed)
        model = part1.MLP(config.hidden, dropout)
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
            contextlib.redirect_stdout(None),
        ):
            part1.train(model, data, part1.Config(epochs=1))
        total = products = 0.0
        for row in profile.key_averages():
            total += row.self_cpu_time_total
            products += row.self_cpu_time_total * (row.key in ("aten::addmm", "aten::mm"))
        share = 1 - products / total
        print(
            f"  dropout {dropout}: {share:.0%} of the operators' time outside the matrix products"
        )

    torch.manual_seed(config.seed)
    ours = part1.train(part1.MLP(config.hidden), data, config)[-1].seconds
    plain = plain_script(data.train_images, data.train_labels, config.epochs, config.batch_size)
    print(f"  part 1, {config.epochs} epochs: {ours:.1f} s, validation included")
    print(f"  the same net, batches and epochs in plain PyTorch on tensors: {plain:.1f} s")
    usual, epochs, accuracy = usual_script(target=0.984)
    each = usual / epochs
    ratio = each / plain * config.epochs
    print(
        f"  usual script with a DataLoader: {each:.1f} s an epoch, {ratio:.1f} times plain tensors'"
    )
    short = "" if accuracy >= 0.984 else " (and it had not reached 98.4 % by then)"
    print(f"  usual script to {accuracy:.4f}: {epochs} epochs, {usual:.1f} s{short}")
    print(f"  part 1 takes 1/{usual / ours:.1f} of that")


def photos() -> None:
    """Part 1's net on 500 photographed test digits: with the preparation, and with less of it."""
    import numpy as np
    from photos import photograph
    from PIL import Image

    import part1_mlp_mnist as part1

    with tempfile.TemporaryDirectory() as folder:
        file, path = Path(folder) / "mlp.pt", Path(folder) / "photo.jpg"
        config = part1.Config(data_dir=DATA_DIR, images_dir=Path(folder), save=file)
        results = part1.main(config, draw=False)
        saved, model = torch.load(file, weights_only=True), part1.MLP(config.hidden)
        model.load_state_dict(saved["weights"])
        _, _, _, _, images, labels = part1.read_dataset(DATA_DIR)
        rng, made = np.random.default_rng(0), {}
        for image in images[:500]:
            photograph(Image.fromarray(image.numpy()), rng).save(path)
            small = torch.tensor(np.asarray(Image.open(path).resize((28, 28))))
            prepared = part1.prepare_photo(path)
            row = {"as it is, 28 x 28": small, "turned over": 255 - small, "prepared": prepared}
            row |= {"prepared, dark on light": 255 - prepared}
            row |= {"prepared, in the corner": prepared.roll((-4, -4), (0, 1))}
            for name, picture in row.items():
                made.setdefault(name, []).append(picture)
        path, untouched = Path(folder) / "digit.png", []
        for image in images:
            Image.fromarray(image.numpy()).save(path)
            untouched.append(part1.prepare_photo(path))

    def answers(pictures: Tensor) -> Tensor:
        return part1.predict(model, (pictures - saved["mean"]) / saved["std"]).argmax(1)

    original = answers(images[:500])
    for name, pictures in made.items():
        found = answers(torch.stack(pictures))
        right, same = (found == labels[:500]).float().mean(), (found == original).float().mean()
        print(f"  500 photos, {name}: {right:.1%} right, {same:.1%} as the original")
    right = (answers(torch.stack(untouched)) == labels).float().mean()
    print(f"  all 10,000 originals: {results['accuracy']:.2%}; prepared like photos {right:.2%}")


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


def part2() -> None:
    """Forward and backward of each cell over torch.nn's, same weights, 28 steps, in turns."""
    import part2_rnn_fashion as part2

    device = part2.pick_device("auto")
    for cell, kind in (("tanh", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)):
        for batch, size, hidden in ((64, 28, 128), (256, 128, 128), (256, 128, 256)):
            torch.manual_seed(0)
            theirs = kind(size, hidden).to(device)
            ours = part2.RecurrentLayer(size, hidden, cell).to(device)
            ours.load_state_dict(theirs.state_dict())
            x = torch.randn(28, batch, size, device=device)
            direction = torch.randn(28, batch, hidden, device=device)

            def step(rnn: nn.Module, x: Tensor = x, direction: Tensor = direction) -> None:
                (rnn(x)[0] * direction).sum().backward()

            # In turns, so that a slow spell of the machine meets both.
            pairs = [
                [median_seconds(partial(step, rnn), 5) for rnn in (ours, theirs)] for _ in range(5)
            ]
            mine, torchs = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(
                f"  {cell}, batch {batch}, hidden {hidden}: {1e3 * mine:.1f} ms, "
                f"PyTorch's {1e3 * torchs:.1f} ms, ratio {mine / torchs:.2f}"
            )


@torch.no_grad()
def decode_once() -> None:
    """One decoding step (batch 4, 32 heads of 64, 8,192 tokens): ours and PyTorch's, in ms."""
    import part3_attention as part3

    device, row = part3.pick_device("auto"), []
    for n_kv_head in (32, 8, 1):
        q = torch.randn(4, 32, 1, 64, device=device)
        k, v = torch.randn(2, 4, n_kv_head, 8192, 64, device=device)
        ours = partial(part3.attention, q, k, v)
        theirs = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
        row += [1e3 * median_seconds(run, 7) for run in (ours, theirs)]
    print(" ".join(f"{milliseconds:.3f}" for milliseconds in row))


def part3() -> None:
    """Decoding ratios over fresh processes, and a training step's time.

    The C library hands the large temporaries back to the system and each step faults them in again,
    in some processes and not in others: with these two settings it keeps them.
    """
    import part3_attention as part3

    keep = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
    command, rows = [sys.executable, __file__, "decode_once"], []
    for _ in range(5):
        done = subprocess.run(command, env=os.environ | keep, capture_output=True, text=True)
        rows.append([float(number) for number in done.stdout.splitlines()[-1].split()])
    mha, mha_torch, gqa, gqa_torch, mqa, mqa_torch = zip(*rows, strict=True)

    def ratio(what: str, above: tuple[float, ...], below: tuple[float, ...]) -> None:
        ratios = sorted(a / b for a, b in zip(above, below, strict=True))
        print(f"  {what}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")

    for name, times in (("MHA", mha), ("GQA-8", gqa), ("MQA", mqa)):
        print(f"  {name}: {statistics.median(times):.2f} ms (median of {len(rows)} processes)")
    ratio("MHA over GQA-8 (bytes read: 4)", mha, gqa)
    ratio("MHA over MQA (bytes read: 32)", mha, mqa)
    for name, theirs, ours in (
        ("MHA", mha_torch, mha), ("GQA-8", gqa_torch, gqa), ("MQA", mqa_torch, mqa)
    ):  # fmt: skip
        ratio(f"PyTorch's enable_gqa over ours, {name}", theirs, ours)
    config, stream = part3.Config(), torch.Generator().manual_seed(0)
    for name in part3.variant_names(config):
        net = part3.LookupNet(part3.make_attention(name, config), config)
        adamw = torch.optim.AdamW(net.parameters(), fused=True)
        step = partial(part3.learn, net, config, stream, adamw, range(10))
        print(f"  {name}: {100 * median_seconds(step, 3):.1f} ms a training step")


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["part1", "photos", "part2", "part3"]
    if wanted != ["decode_once"]:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}")
    for name in wanted:
        if name != "decode_once":
            print(name)
        globals()[name]()
