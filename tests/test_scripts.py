"""What the three scripts agree on: scores, settings, figures, seeds, devices."""

import math
import random
import signal
import socket
import threading

import matplotlib
import numpy as np
import pydantic
import pytest
import torch
from conftest import WITH_DATA, small_config, unrendered
from sklearn import metrics

import part1_mlp_mnist as part1
import part2_rnn_fashion as part2
import part3_attention as part3

FIGURES = {part1: 2, part2: 3, part3: 3}  # that a run draws


def rows(part, results):
    """The dicts of scores: one, or in part 3 one for each variant."""
    return list(results.values()) if part is part3 else [results]


@pytest.mark.parametrize("case", range(8))
def test_scores_equal_scikit_learns(part, case):
    rng = np.random.default_rng(case)
    n = 1 + case**2
    classes = int(rng.integers(2, 8))
    labels = rng.integers(0, rng.integers(1, classes + 1), n)
    answers = rng.integers(0, rng.integers(1, classes + 1), n)
    names = [f"class {i}" for i in range(classes)]
    results = part.score(torch.tensor(labels), torch.tensor(answers), names)
    options = {"labels": list(range(classes)), "average": "macro", "zero_division": 0}
    macro = metrics.precision_recall_fscore_support(labels, answers, **options)
    found = [results[name] for name in ("accuracy", "precision", "recall", "f1")]
    expected = [metrics.accuracy_score(labels, answers), *macro[:3]]
    assert found == pytest.approx(expected, abs=1e-12)
    assert {type(number) for number in found} == {float}
    counted = np.zeros((classes, classes), int)
    for label, answer in zip(labels, answers, strict=True):
        counted[label, answer] += 1
    assert (results["confusion_matrix"] == counted).all()


def test_learning_rate_rises_over_a_fifth_of_the_steps_then_falls(part):
    rates = [part.learning_rate(step, 10, 0.8) for step in range(10)]
    assert rates == pytest.approx([0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert part.learning_rate(0, 1, 0.8) == 0.8  # of a single step


COMMON = [{"lr": 0}, {"lr": math.inf}, {"weight_decay": -1}, {"seed": -1}, {"seed": 0.5}]
COMMON += [{"seeds": 0}, {"device": "gpu"}, {"images_dir": 5}, {"no_such_field": 1}]
IMAGES = [{"epochs": 0}, {"epochs": 1.5}, {"batch_size": 55_001}, {"dropout": 1.0}]
IMAGES += [{"label_smoothing": -0.1}, {"precision": "float16"}]
REFUSED = {
    part1: [*IMAGES, {"hidden": 64}, {"hidden": (64, 0)}, {"batch_size": 1}, {"augment": -0.1}],
    part2: [*IMAGES, {"cell": "rnn"}, {"hidden_size": 0}, {"encoder_size": 1}, {"clip_norm": 0}],
    part3: [{"n_head": 6}, {"n_kv_head": ()}, {"cache": (24,)}, {"lookups": 4}, {"seq_len": 1}],
}
CASES = [(part, settings) for part in REFUSED for settings in [*COMMON, *REFUSED[part]]]


@pytest.mark.parametrize(("script", "settings"), CASES)
def test_a_setting_that_cannot_work_is_refused_by_name(script, settings):
    with pytest.raises(pydantic.ValidationError, match=next(iter(settings))):
        script.Config(**settings)


def test_reading_a_picture_needs_a_saved_net(tmp_path):
    picture = tmp_path / "7.jpg"
    picture.touch()
    with pytest.raises(pydantic.ValidationError, match="predict needs a trained net"):
        part1.Config(predict=(picture,))
    with pytest.raises(pydantic.ValidationError, match="load reads pictures"):
        part1.Config(load=picture)


CHOICES = {
    part1: {"hidden": [(), (1,), (40, 5)], "dropout": [0, 0.5], "batch_size": [20, 1284]},
    part2: {"cell": ["tanh", "gru", "lstm"], "hidden_size": [1, 9], "rows_per_step": [4, 28]},
    part3: {"n_kv_head": [(1,), (4, 2, 1)], "cache": [(), (8, 16)], "seq_len": [2, 9]},
}
CHOICES[part1] |= {"augment": [0, 1], "precision": ["float32", "bfloat16"], "epochs": [1, 2]}
CHOICES[part2] |= {"bidirectional": [False, True], "readout": ["pool", "last"], "ema": [0, 1]}
CHOICES[part2] |= {"orthogonal": [False, True], "mirror": [False, True], "epochs": [1, 2]}
CHOICES[part3] |= {"n_head": [4], "head_dim": [1, 5], "value_dim": [1, 3], "lookups": [1, 2, 3]}
CHOICES[part3] |= {"steps": [1, 6], "batch_size": [1, 20], "d_model": [12, 36]}


@pytest.mark.parametrize("case", range(2))
def test_every_setting_that_passes_runs_to_its_end(part, case, monkeypatch):
    draw = random.Random(f"{part.__name__}{case}")
    drawn = unrendered(part, monkeypatch)
    settings = {name: draw.choice(choices) for name, choices in CHOICES[part].items()}
    results = part.main(part.Config(device="cpu", seed=draw.choice([0, 2**32 - 1]), **settings))
    for row in rows(part, results):
        assert 0 <= row["f1"] <= 1 and row["train_seconds"] > 0 and row["stopped"] is False
        assert row["confusion_matrix"].sum() in (300, 2000 * settings.get("seq_len", 0))
    assert len(drawn) == FIGURES[part]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_in_a_notebook_writes_its_figures_and_changes_nothing(part, device, tmp_path, capsys):
    def state():
        handler = signal.getsignal(signal.SIGINT)
        return dict(matplotlib.rcParams), handler, socket.getdefaulttimeout()

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    before = state()
    ended = []
    config = small_config(part, device=device, **({"steps": 3} if part is part3 else {}))
    thread = threading.Thread(target=lambda: ended.append(part.main(config)), daemon=True)
    thread.start()
    thread.join(120)
    assert len(ended) == 1 and state() == before
    folder = tmp_path / "images" / ("offline" if part.__name__ in WITH_DATA else "")
    drawn = list(tmp_path.rglob("*.png"))
    assert len(drawn) == FIGURES[part] and {path.parent for path in drawn} == {folder}
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 300_000
    out, err = capsys.readouterr()
    assert "macro avg" in out and f"device {device}" in out
    assert ("WARNING" in err) == (part.__name__ in WITH_DATA)


def outputs(part, results):
    """What a run computed, as tensors."""
    if part is part3:
        return [row["net"].mlp[1].weight for row in results.values()]
    return [results["probabilities"]]


def test_a_seed_gives_the_same_bits_and_another_one_others(part, monkeypatch):
    unrendered(part, monkeypatch)
    few = {"cache": (), "steps": 3} if part is part3 else {}
    runs = [part.main(small_config(part, device="cpu", seed=seed, **few)) for seed in (3, 3, 4)]
    one, same, other = (outputs(part, results) for results in runs)
    for first, second, third in zip(one, same, other, strict=True):
        assert torch.equal(first, second) and not torch.equal(first, third)


def test_a_setting_that_is_not_the_default_stands_in_the_titles(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(part2.DATASET, "mirrors", ())
    titles = unrendered(part2, monkeypatch)
    part2.main(small_config(part2, cell="gru", rows_per_step=14))
    assert all("cell gru" in title and "rows_per_step 14" in title for title in titles.values())


def nets(part):
    """Each kind of net with data, on a device that computes nothing."""
    if part is part3:
        config = small_config(part)
        data = part.make_sequences(4, config, torch.Generator().manual_seed(0))
        data = part.Sequences(*(field.to("meta") for field in data))
        for make in part.variants(config).values():
            yield part.LookupNet(make(), config), data
    elif part is part2:
        images = part.mirror(torch.zeros(6, 28, 28, device="meta"))
        for cell in ("tanh", "gru", "lstm"):
            yield part.RowRNN(small_config(part, cell=cell, bidirectional=True)), images
    else:
        yield part.MLP((8,)), part.augment(torch.zeros(6, 28, 28, device="meta"), 0.5)


def test_nothing_of_the_cpu_is_mixed_in(part):
    for net, data in nets(part):
        output = net.to("meta")(data)
        logits = output[0] if part is part3 else output
        logits.sum().backward()
        assert all(p.grad.device.type == "meta" for p in net.parameters())


def test_a_device_that_is_not_there_is_an_error(part):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert part.pick_device("auto") == part.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(part.UserError, match=f"{name} is not available here: use cpu"):
            part.main(part.Config(device=name))
