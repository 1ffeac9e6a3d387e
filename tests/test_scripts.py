"""What the three scripts agree on: scores, settings, figures, seeds, devices."""

import dataclasses
import importlib
import math
import random
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from conftest import PARTS, WITH_DATA, small_config
from sklearn import metrics

import part3_attention as part3

FIGURES = {
    "part1_mlp_mnist": "training_curves confusion_matrix mistakes learning_rates first_layer",
    "part2_rnn_fashion": "training_curves confusion_matrix belief_by_row gradient_by_step",
    "part3_attention": "confusion_matrix attention_heatmaps cache_tradeoff decode qkv",
}


def rows(part, results):
    return list(results.values()) if part.__name__ == "part3_attention" else [results]


def unrendered(part, monkeypatch):
    """Figures are built, but not rendered: that takes seconds. Returns their titles by name."""
    titles = {}

    def save_figure(figure, path):
        titles[f"{path.stem} again" if path.stem in titles else path.stem] = figure.get_suptitle()

    def timer(step, globals):  # part 3's decoding steps are taken once, and no time is measured
        exec(step, globals)
        return SimpleNamespace(blocked_autorange=lambda min_run_time: SimpleNamespace(median=1.0))

    monkeypatch.setattr(part, "save_figure", save_figure)
    monkeypatch.setattr(part, "Timer", timer, raising=False)
    return titles


@pytest.mark.parametrize("case", range(8))
def test_scores_equal_scikit_learns(part, case):
    rng = np.random.default_rng(case)
    n, classes = 1 + case**2, int(rng.integers(2, 8))
    labels = rng.integers(0, rng.integers(1, classes + 1), n)
    answers = rng.integers(0, rng.integers(1, classes + 1), n) if case else labels
    names, every = [f"class {i}" for i in range(classes)], list(range(classes))
    results = part.score(torch.tensor(labels), torch.tensor(answers), names)
    options = {"labels": every, "zero_division": 0}
    macro = metrics.precision_recall_fscore_support(labels, answers, average="macro", **options)
    found = [results[name] for name in ("accuracy", "precision", "recall", "f1")]
    expected = [metrics.accuracy_score(labels, answers), *macro[:3]]
    assert found == pytest.approx(expected, abs=1e-12) and {*map(type, found)} == {float}
    matrix = metrics.confusion_matrix(labels, answers, labels=every)
    assert (results["confusion_matrix"] == matrix).all()
    options |= {"target_names": names, "digits": 4}
    assert results["report"] == metrics.classification_report(labels, answers, **options)


def test_learning_rate_goes_up_to_its_peak_then_down_to_nothing(part):
    rates = [part.learning_rate(step, 100, 0.3) for step in range(100)]
    peak = int(np.argmax(rates))
    assert math.isclose(max(rates), 0.3) and peak in (19, 20)
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[21:]) < 0).all()
    assert 0 < rates[0] < 0.03 and 0 < rates[-1] < 0.01
    assert all(0 < part.learning_rate(step, n, 1) <= 1 for n in (1, 2, 3) for step in range(n))


COMMON = [{"lr": 0}, {"lr": math.nan}, {"weight_decay": -1}, {"seed": -1}, {"seed": 2**32},
          {"seed": 0.5}, {"seeds": 0}, {"seeds": 1001}, {"device": "gpu"}, {"batch_size": 0},
          {"images_dir": 5}]  # fmt: skip
IMAGES = [{"epochs": 0}, {"epochs": 1.5}, {"batch_size": 55_001}, {"dropout": 1.0},
          {"dropout": -0.1}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1},
          {"precision": "float16"}, {"data_dir": None}, {"load": "net.pt", "seeds": 2},
          {"load": "net.pt", "save": "other.pt"}]  # fmt: skip
REFUSED = {
    "part1_mlp_mnist": [*IMAGES, {"hidden": (64)}, {"hidden": (64, 1.5)}, {"hidden": (64, 0)},
                        {"hidden": (65_537,)}, {"batch_size": 1}, {"augment": 3.1},
                        {"augment": -0.1}, {"predict": "7.jpg"}, {"predict": ("7.jpg",)}],
    "part2_rnn_fashion": [*IMAGES, {"cell": "rnn"}, {"hidden_size": 0}, {"hidden_size": 16_385},
                          {"encoder_size": 1}, {"context": -1}, {"context": 28}, {"clip_norm": 0},
                          {"rows_per_step": 3}, {"readout": "mean"}, {"mirror": 0.5}],
    "part3_attention": [{"d_model": 0}, {"d_model": 60}, {"n_head": 0}, {"n_head": 257},
                        {"n_kv_head": 8}, {"n_kv_head": (3,)}, {"n_kv_head": ()},
                        {"n_kv_head": (8, 8)}, {"n_kv_head": (0,)}, {"kv_latent": (0,)},
                        {"kv_latent": (32, 32)}, {"lookups": 0}, {"lookups": 4}, {"seq_len": 1},
                        {"seq_len": 129}, {"steps": 0}, {"study": True, "n_kv_head": (4, 1)}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "settings"),
    [(script, settings) for script in PARTS for settings in [*COMMON, *REFUSED[script]]],
)
def test_a_setting_that_cannot_work_is_refused_by_name(script, settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} "):
        importlib.import_module(script).Config(**settings)


def test_a_string_is_taken_for_a_path_and_home_is_expanded(part, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ["images_dir", *["data_dir", "save", "load"] * (part.__name__ in WITH_DATA)]:
        assert getattr(part.Config(**{name: "here"}), name) == Path("here")
        for home in ("~/there", Path("~/there")):  # a string from Python, a path from a flag
            assert getattr(part.Config(**{name: home}), name) == tmp_path / "there"
    if part.__name__ == "part1_mlp_mnist":
        assert len(part.Config(load="mlp.pt", predict=("7.jpg", Path("8.jpg"))).predict) == 2


CHOICES = {
    "part1_mlp_mnist": {
        "hidden": [(), (1,), (40, 5), (3, 3, 3)], "dropout": [0, 0.5, 0.99], "epochs": [1, 2],
        "batch_size": [20, 1284], "lr": [1e-9, 1e-2, 1], "weight_decay": [0, 0.5],
        "label_smoothing": [0, 0.99], "augment": [0, 0.5, 3], "precision": ["float32", "bfloat16"],
    },
    "part2_rnn_fashion": {
        "cell": ["tanh", "gru", "lstm"], "hidden_size": [1, 9], "bidirectional": [False, True],
        "rows_per_step": [1, 4, 28], "context": [0, 1, 27], "encoder_size": [2, 9],
        "readout": ["pool", "last"], "orthogonal": [False, True], "dropout": [0, 0.99],
        "epochs": [1, 2], "batch_size": [250, 1284], "lr": [1e-9, 1e-2], "clip_norm": [1e-9, 1],
        "label_smoothing": [0, 0.99], "mirror": [False, True], "ema": [0, 1],
    },
    "part3_attention": {
        "d_model": [12, 36], "n_head": [1, 3, 4], "n_kv_head": [(1,), ("all",), ("all", 1)],
        "kv_latent": [(), (1,), (3, 70)], "lookups": [1, 2, 3], "seq_len": [2, 3, 9],
        "steps": [1, 6], "batch_size": [1, 20], "lr": [1e-9, 1e-2], "study": [False, True],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", range(2))
def test_every_setting_that_passes_runs_to_its_end(part, case, monkeypatch):
    draw, drawn = random.Random(f"{part.__name__}{case}"), unrendered(part, monkeypatch)
    settings = {name: draw.choice(choices) for name, choices in CHOICES[part.__name__].items()}
    if part.__name__ == "part3_attention":
        heads = [settings["n_head"] if n == "all" else n for n in settings["n_kv_head"]]
        settings["n_kv_head"] = tuple(dict.fromkeys(heads))
        settings["study"] &= settings["n_head"] in heads
    results = part.main(part.Config(device="cpu", seed=draw.choice([0, 2**32 - 1]), **settings))
    for row in rows(part, results):
        assert 0 <= row["f1"] <= 1 and 60 > row["train_seconds"] > 0 and row["epochs_run"] >= 1
        assert row["confusion_matrix"].sum() in (300, 2000 * settings.get("seq_len", 0))
        assert torch.allclose(row.get("probabilities", torch.eye(1)).sum(1), torch.ones(1))
    assert len(drawn) == len(FIGURES[part.__name__].split()) + settings.get("study", False)


def test_a_latent_far_smaller_than_a_head_is_drawn_too(monkeypatch, tmp_path):
    drawn = unrendered(part3, monkeypatch)
    small = {"d_model": 128, "n_head": 1, "n_kv_head": (1,), "kv_latent": (1,), "batch_size": 2}
    part3.main(part3.Config(**small, seq_len=2, steps=1, device="cpu", images_dir=tmp_path))
    assert "part3_decode" in drawn


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_in_a_notebook_writes_its_figures_and_changes_nothing(part, device, tmp_path, capsys):
    def state():
        return dict(matplotlib.rcParams), signal.getsignal(signal.SIGINT), torch.is_grad_enabled()

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    study = {"study": True} if part.__name__ == "part3_attention" else {}
    config, before, ended = small_config(part, device=device, **study), state(), []
    thread = threading.Thread(target=lambda: ended.append(part.main(config)), daemon=True)
    thread.start()
    thread.join(120)
    assert len(ended) == 1 and state() == before
    folder = tmp_path / "images" / ("" if study else "offline")
    names = FIGURES[part.__name__] + (" study_from_mha" if study else "")
    expected = {folder / f"{part.__name__[:5]}_{name}.png" for name in names.split()}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == expected
    for path in expected:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 300_000
    out, err = capsys.readouterr()
    assert "macro avg" in out and f"device {device}" in out
    assert study or (ended[0]["dataset"] == "sklearn-digits" and "WARNING" in err)


def test_several_seeds_are_the_runs_of_these_seeds_to_the_last_bit(part, monkeypatch, capsys):
    drawn, images, last = unrendered(part, monkeypatch), part.__name__ in WITH_DATA, 2**32 - 1
    config = small_config(part, device="cpu", **({} if images else {"seq_len": 4, "steps": 6}))
    more = {"save": "net.pt"} if images else {}
    results = part.main(dataclasses.replace(config, seed=last, seeds=3, **more))
    lines = capsys.readouterr().out.split(f"3 seeds from {last}")[1].splitlines()
    output = "probabilities" if images else "weights"
    other = rows(part, part.main(config, draw=False))  # of seed 0, which comes after the last
    for first, second in zip(rows(part, results), other, strict=True):
        one, two, three = (run[output] for run in first["runs"])
        assert one is first[output] and torch.equal(two, second[output])
        assert not torch.equal(one, two) and not torch.equal(two, three)
        f1 = [100 * run["f1"] for run in first["runs"]]
        told = f"{np.mean(f1):.2f} +- {np.std(f1, ddof=1):.2f} "
        assert any("f1" in line and told in line for line in lines)
    assert sum("again" in name for name in drawn) == (not images)
    if images:
        assert all("sklearn-digits" in title for title in drawn.values())
        assert torch.load("offline-net.pt", weights_only=True)["net"]["seed"] == last


def nets(part, device):
    if part.__name__ == "part3_attention":
        config = small_config(part)
        data = part.draw_sequences(4, config, torch.Generator().manual_seed(0))
        data = part.Sequences(*(field.to(device) for field in data))
        for name in ("MHA", "MQA", "MLA-8"):
            yield part.LookupNet(part.make_attention(name, config), config), data
    elif part.__name__ == "part2_rnn_fashion":
        images = part.mirror(torch.zeros(6, 28, 28, device=device))
        for cell in ("tanh", "gru", "lstm"):
            yield part.RowRNN(small_config(part, cell=cell, bidirectional=True, context=1)), images
    else:
        yield part.MLP((8,)), part.augment(torch.zeros(6, 28, 28, device=device), 0.5)


def test_nothing_of_the_cpu_is_mixed_in(part):
    for net, data in nets(part, "meta"):
        output = net.to("meta")(data)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
        assert all(p.grad.device.type == "meta" for p in net.parameters())


def test_a_device_that_is_not_there_is_an_error(part):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert part.pick_device("auto") == part.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(part.UserError, match=f"{name} is not available here; use --device cpu"):
            part.main(part.Config(device=name))
