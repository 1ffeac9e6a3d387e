"""How fast the scripts are, as ratios measured in one run: `python tests/benchmark.py [part ...]`.

Part 1 and its photos need the MNIST files (`DATA_DIR`, default `data`). Times on a shared machine
vary; a ratio of two times taken in the same run varies less. Each section says what it compares.
"""

import contextlib
import os
import statistics
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
    data = part1.load_data(DATA_DIR, config.seed, torch.device("cpu"))
    for dropout in (0.2, 0.0):
        torch.manual_seed(config.seed)
        model = part1.MLP(config.hidden, dropout)
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
            contextlib.redirect_stdout(None),
        ):
            part1.train(model, data, part1.Config(epochs=1), [])
        total = products = 0.0
        for row in profile.key_averages():
            total += row.self_cpu_time_total
            products += row.self_cpu_time_total * (row.key in ("aten::addmm", "aten::mm"))
        share = 1 - products / total
        print(
            f"  dropout {dropout}: {share:.0%} of the operators' time outside the matrix products"
        )

    torch.manual_seed(config.seed)
    model, history = part1.MLP(config.hidden, config.dropout), []
    part1.train(model, data, config, history)
    ours = history[-1].seconds
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
    """Forward and backward of the tanh RNN over torch.nn.RNN's, same weights, 28 steps of 28."""
    import part2_rnn_fashion as part2

    device = part2.pick_device("auto")
    ratios = []
    for batch, hidden in ((64, 128), (256, 128), (256, 256)):
        torch.manual_seed(0)
        theirs = nn.RNN(28, hidden).to(device)
        ours = part2.TanhRNN(28, hidden).to(device)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(28, batch, 28, device=device)
        direction = torch.randn(28, batch, hidden, device=device)

        def step(rnn: nn.Module, x: Tensor = x, direction: Tensor = direction) -> None:
            output, h_n = rnn(x)
            ((output * direction).sum() + h_n.sum()).backward()

        # In turns, so that a slow spell of the machine meets both.
        pairs = [
            [median_seconds(partial(step, rnn), 10) for rnn in (ours, theirs)] for _ in range(8)
        ]
        mine, torchs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios.append(mine / torchs)
        print(
            f"  batch {batch}, hidden {hidden}: {1e3 * mine:.2f} ms, nn.RNN {1e3 * torchs:.2f} ms, "
            f"ratio {ratios[-1]:.2f}"
        )
    print(f"  mean ratio {statistics.mean(ratios):.2f} on {device}")


@torch.no_grad()
def part3() -> None:
    """One decoding step (batch 4, 32 heads of 64, 8,192 tokens): ours beside PyTorch's."""
    import part3_attention as part3

    device = part3.pick_device("auto")
    ours = {}
    for name, n_kv_head in (("MHA", 32), ("GQA-8", 8), ("MQA", 1)):
        q = torch.randn(4, 32, 1, 64, device=device)
        k, v = torch.randn(2, 4, n_kv_head, 8192, 64, device=device)

        def mine(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return part3.attention(q, k, v)[0]

        def torchs(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        pairs = [(median_seconds(mine, 5), median_seconds(torchs, 5)) for _ in range(5)]
        ours[name], theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"  {name}: {1e3 * ours[name]:.2f} ms, PyTorch's enable_gqa {1e3 * theirs:.2f} ms, "
            f"PyTorch over ours {theirs / ours[name]:.2f}"
        )
    print(f"  MHA over GQA-8 {ours['MHA'] / ours['GQA-8']:.1f} (bytes read: 4)")
    print(f"  MHA over MQA {ours['MHA'] / ours['MQA']:.1f} (bytes read: 32) on {device}")
    scores = torch.randn(128, 16, 10, 10, device=device)
    by_hand = median_seconds(partial(part3.softmax, scores), 20)
    library = median_seconds(partial(torch.softmax, scores, -1), 20)
    print(f"  softmax over rows of 10: PyTorch's over ours {library / by_hand:.2f}")


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["part1", "photos", "part2", "part3"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in wanted:
        print(name)
        globals()[name]()
