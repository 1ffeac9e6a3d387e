"""How fast the scripts are, as ratios measured in one run: `python tests/benchmark.py [part ...]`.

Part 1 needs the MNIST files (`DATA_DIR`, default `data`). Times on a shared machine vary; a ratio
of two times taken in the same run varies less. Each section says what it compares.
"""

import os
import statistics
import sys
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


def part1() -> None:
    """Part 1's training against the usual script's, and the share spent outside the products."""
    import part1_mlp_mnist as part1

    config = part1.Config(data_dir=DATA_DIR)
    torch.manual_seed(config.seed)
    data = part1.load_data(DATA_DIR, config.seed, torch.device("cpu"))
    model = part1.MLP(config.hidden, config.dropout)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        part1.train(model, data, part1.Config(epochs=1), [])
    total = products = 0.0
    for row in profile.key_averages():
        total += row.self_cpu_time_total
        products += row.self_cpu_time_total * (row.key in ("aten::addmm", "aten::mm"))

    torch.manual_seed(config.seed)
    model, history = part1.MLP(config.hidden, config.dropout), []
    part1.train(model, data, config, history)
    ours = history[-1].seconds
    right = part1.predict(model, data.test_images).argmax(1) == data.test_labels
    print(f"  part 1, {config.epochs} epochs: {right.float().mean():.4f}, {ours:.1f} s")
    print(f"  outside the matrix products: {1 - products / total:.0%} of the operators' time")
    usual, epochs, accuracy = usual_script(target=0.984)
    print(f"  usual script to {accuracy:.4f}: {epochs} epochs, {usual:.1f} s")
    short = "" if accuracy >= 0.984 else " (and it had not reached 98.4 % by then)"
    print(f"  part 1 takes 1/{usual / ours:.1f} of the usual script's training time{short}")


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
    wanted = sys.argv[1:] or ["part1", "part2", "part3"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in wanted:
        print(name)
        globals()[name]()
