"""What the three scripts agree on: scores, settings, seeds, devices, notebooks."""

import dataclasses
import importlib
import math
import random
import signal
import socket
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import PARTS, WITH_DATA, small_config, small_data
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

FIGURES = {
    "part1_mlp_mnist": "training_curves confusion_matrix mistakes loss_vs_weight first_layer",
    "part2_rnn_fashion": "training_curves confusion_matrix mistakes belief_by_row gradient_by_step",
    "part3_attention": "training_curves confusion_matrix attention_heatmaps decode qkv "
    "cache_tradeoff study_from_mha",
}


# ------------------------------------------- scores ------------------------------------------- #


@pytest.mark.parametrize("case", range(20))
def test_scores_equal_scikit_learns(part, case):
    """Random answers, with classes that never occur, are never predicted, or neither."""
    rng = np.random.default_rng(case)
    n, classes = rng.integers(1, 60), int(rng.integers(2, 8))
    labels = rng.integers(0, rng.integers(1, classes + 1), n)
    answers = rng.integers(0, rng.integers(1, classes + 1), n)
    names = [f"class {i}" for i in range(classes)]
    results = part.score(torch.tensor(labels), torch.tensor(answers), names)
    options = {"labels": list(range(classes)), "zero_division": 0}
    each = precision_recall_fscore_support(labels, answers, average=None, **options)
    macro = precision_recall_fscore_support(labels, answers, average="macro", **options)
    assert math.isclose(results["accuracy"], accuracy_score(labels, answers))
    for i, name in enumerate(("precision", "recall", "f1")):
        assert np.allclose(results["per_class"][name], each[i], atol=1e-12)
        assert math.isclose(results[name], macro[i], abs_tol=1e-12)
    matrix = confusion_matrix(labels, answers, labels=list(range(classes)))
    assert (results["confusion_matrix"] == matrix).all()
    assert all(name in results["report"] for name in names)


def test_learning_rate_goes_up_to_its_peak_then_down_to_nothing(part):
    rates = [part.learning_rate(step, 100, 0.3) for step in range(100)]
    peak = int(np.argmax(rates))
    assert math.isclose(max(rates), 0.3) and peak in (19, 20)
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[21:]) < 0).all()
    assert 0 < rates[0] < 0.03 and 0 < rates[-1] < 0.01
    assert all(0 < part.learning_rate(step, n, 1) <= 1 for n in (1, 2, 3) for step in range(n))


# ------------------------------------------ settings ------------------------------------------ #

COMMON = [("lr", 0), ("lr", math.nan), ("lr", math.inf), ("weight_decay", -1), ("seed", -1),
          ("seed", 2**32), ("seed", 0.5), ("batch_size", 0), ("device", "gpu"),
          ("seeds", 0), ("seeds", 1001),
          ("images_dir", 5)]  # fmt: skip
IMAGES = [("epochs", 0), ("epochs", 1.5), ("batch_size", 55_001), ("dropout", 1.0),
          ("dropout", -0.1), ("label_smoothing", 1.0), ("precision", "float16"),
          ("data_dir", None)]  # fmt: skip
REFUSED = {
    "part1_mlp_mnist": [("hidden", (64)), ("hidden", (64, 0)), ("hidden", (64, 1.5)),
                        ("hidden", [64]), ("batch_size", 1), ("augment", 3.1),
                        ("augment", -1), *IMAGES],
    "part2_rnn_fashion": [("hidden_size", 0), ("num_layers", 65), ("encoder_size", 1),
                          ("context", 28), ("rows_per_step", 3), ("readout", "mean"),
                          ("bidirectional", 2), ("mirror", 0.5), *IMAGES],
    "part3_attention": [("d_model", 60), ("n_head", 0), ("n_head", 257),
                        ("n_kv_head", (3,)), ("n_kv_head", ()),
                        ("n_kv_head", (8, 8)), ("n_kv_head", 4), ("kv_latent", (0,)),
                        ("lookups", 4), ("seq_len", 129), ("seq_len", 1), ("steps", 0)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "field", "value"),
    [(script, *case) for script in PARTS for case in [*COMMON, *REFUSED[script]]],
)
def test_a_setting_that_cannot_work_is_refused_by_name(script, field, value):
    """By a flag or by an edited default: both come through here. One case for each bound."""
    with pytest.raises(ValueError, match=f"^{field} is "):
        importlib.import_module(script).Config(**{field: value})


@pytest.mark.parametrize("n_kv_head", [(5, 1), (5,)])
def test_a_study_of_an_odd_number_of_heads_ends(n_kv_head, monkeypatch, tmp_path):
    part3, saved = importlib.import_module("part3_attention"), []
    monkeypatch.setattr(part3, "save_figure", lambda figure, path: saved.append(path.stem))
    heads = {"d_model": 10, "n_head": 5, "n_kv_head": n_kv_head, "kv_latent": (), "seed": 2**32 - 1}
    part3.main(part3.Config(**heads, steps=1, batch_size=2, images_dir=tmp_path, study=True))
    assert "part3_cache_tradeoff" in saved


def test_a_study_of_pooling_needs_mha():
    part3 = importlib.import_module("part3_attention")
    with pytest.raises(ValueError, match="study"):
        part3.Config(n_kv_head=(4, 1), study=True)


def test_folders_are_taken_as_strings_and_home_is_expanded(part, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert part.Config(images_dir="figures").images_dir == Path("figures")
    assert part.Config(images_dir="~/figures").images_dir == tmp_path / "figures"
    config = part.Config(images_dir=Path("~/figures"))
    assert dataclasses.replace(config).images_dir == tmp_path / "figures"


CHOICES = {
    "part1_mlp_mnist": {
        "hidden": [(), (1,), (40, 5), (3, 3, 3)], "dropout": [0, 0.5, 0.99], "epochs": [1, 2],
        "batch_size": [2, 250, 1284], "lr": [1e-12, 1e-2, 1], "weight_decay": [0, 0.5],
        "label_smoothing": [0, 0.99], "augment": [0, 0.5, 3], "precision": ["float32", "bfloat16"],
    },
    "part2_rnn_fashion": {
        "hidden_size": [1, 9], "num_layers": [1, 3], "bidirectional": [False, True],
        "rows_per_step": [1, 4, 28], "context": [0, 1, 27], "encoder_size": [2, 9],
        "readout": ["pool", "last"], "orthogonal": [False, True], "dropout": [0, 0.99],
        "epochs": [1, 2], "batch_size": [250, 1284], "lr": [1e-12, 1e-2], "weight_decay": [0, 0.5],
        "label_smoothing": [0, 0.99], "mirror": [False, True], "precision": ["float32", "bfloat16"],
    },
    "part3_attention": {
        "d_model": [12, 60], "n_head": [1, 3, 6], "n_kv_head": [(1,), "n_head", ("n_head", 1)],
        "kv_latent": [(), (1,), (3, 70)], "lookups": [1, 2, 3], "seq_len": [2, 3, 9],
        "steps": [1, 17], "batch_size": [1, 20], "lr": [1e-12, 1e-2], "weight_decay": [0, 0.5],
    },
}  # fmt: skip


def random_settings(script, case):
    """A setting that Config accepts, drawn at random; part 3's heads divide."""
    draw = random.Random(f"{script}{case}")
    settings = {name: draw.choice(choices) for name, choices in CHOICES[script].items()}
    if script == "part3_attention":
        n_head, kv = settings["n_head"], settings["n_kv_head"]
        kv = [n_head if n == "n_head" else n for n in (kv if isinstance(kv, tuple) else (kv,))]
        settings["n_kv_head"] = tuple(dict.fromkeys(kv))
    return settings | {"seed": draw.choice([0, 5, 2**32 - 1])}


@pytest.mark.parametrize("case", range(4))
def test_every_setting_that_passes_runs_to_its_end(part, case, monkeypatch, tmp_path):
    """Everything is computed and every figure built; only the files are not written."""
    saved = []
    monkeypatch.setattr(part, "save_figure", lambda figure, path: saved.append(path.stem))
    settings = random_settings(part.__name__, case)
    results = part.main(part.Config(images_dir=tmp_path, device="cpu", **settings))
    for row in results.values() if part.__name__ == "part3_attention" else [results]:
        assert 0 <= row["f1"] <= 1 and row["train_seconds"] > 0 and row["epochs_run"] >= 1
        assert row["confusion_matrix"].sum() in (300, 2000 * settings.get("seq_len", 0))
    assert len(saved) == len(set(saved)) >= 5


# ----------------------------------- figures, seeds, devices ---------------------------------- #


def test_run_and_study_write_every_figure_and_nothing_else(part, tmp_path, capsys):
    study = {"n_kv_head": (2, 1), "study": True} if part.__name__ == "part3_attention" else {}
    theirs = {"text.usetex": True, "image.cmap": "magma", "axes.facecolor": "black"}
    with matplotlib.rc_context(theirs):  # somebody's own matplotlibrc changes nothing
        results = part.main(small_config(part, images_dir=tmp_path, **study))
    folder = tmp_path if part.__name__ == "part3_attention" else tmp_path / "offline"
    names = {f"{part.__name__[:5]}_{name}.png" for name in FIGURES[part.__name__].split()}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == names
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 300_000
    out, err = capsys.readouterr()
    assert "macro avg" in out
    if part.__name__ in WITH_DATA:
        assert results["dataset"] == "sklearn-digits" and "sklearn-digits, test set" in out
        assert "WARNING" in err


def state(part, seed):
    """The weights of a small run."""
    found = {}

    def keep(model, *arguments, **options):
        nets = model if isinstance(model, dict) else {"net": model}
        found.update({name: net.state_dict() for name, net in nets.items()})
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "report", keep)
        part.main(small_config(part, seed=seed, device="cpu"))
    return {f"{n} {k}": v for n, weights in found.items() for k, v in weights.items()}


def test_same_seed_same_bits_other_seed_other_bits(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, again, other = state(part, 1), state(part, 1), state(part, 2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_several_seeds_are_runs_of_their_own_and_only_the_first_is_drawn(
    part, monkeypatch, tmp_path, capsys
):
    saved = []
    monkeypatch.setattr(part, "save_figure", lambda figure, path: saved.append(path))
    runs = {"seed": 2**32 - 1, "seeds": 3, "images_dir": tmp_path}
    runs |= (
        {"study": False} if part.__name__ == "part3_attention" else {"save": tmp_path / "net.pt"}
    )
    results = part.main(small_config(part, **runs))
    assert len(saved) == len(set(saved)) >= 5
    lines = capsys.readouterr().out.split(f"3 seeds from {2**32 - 1}")[1].splitlines()
    other = part.main(small_config(part, seed=0, images_dir=Path("/proc/no")), draw=False)
    for name in results if part.__name__ == "part3_attention" else [None]:
        first, second = (results[name], other[name]) if name else (results, other)
        assert first["runs"][0]["f1"] == first["f1"] and first["runs"][1]["f1"] == second["f1"]
        values = [100 * run["f1"] for run in first["runs"]]
        told = f"{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}  ("
        assert any("f1" in line and told in line for line in lines)
    assert len(saved) == len(set(saved))  # draw=False drew nothing
    if part.__name__ in WITH_DATA:
        assert torch.load(tmp_path / "offline-net.pt")["seed"] == 2**32 - 1  # the first one's net


def test_an_interrupted_series_of_seeds_tells_what_is_finished(part, monkeypatch, capsys):
    """The study runs once, not for each seed; the second run after the first is interrupted."""
    train, begun, studies = part.train, [], []

    def third_is_interrupted(*arguments):
        begun.append(1)
        if len(begun) > 2 * variants:
            raise KeyboardInterrupt
        train(*arguments)

    variants = 4 if part.__name__ == "part3_attention" else 1
    monkeypatch.setattr(part, "train", third_is_interrupted)
    if variants > 1:
        monkeypatch.setattr(part, "study", lambda *_: studies.append(1))
        part.main(small_config(part, seeds=2, steps=5, study=True), draw=False)
        begun.clear()
    with pytest.raises(KeyboardInterrupt):
        part.main(small_config(part, seeds=4, **({"steps": 5} if variants > 1 else {})), draw=False)
    assert "2 seeds from 0: mean +- std" in capsys.readouterr().out
    assert len(studies) == (variants > 1)


def nets(part, device):
    """The script's nets on `device`, each with an input."""
    if part.__name__ == "part3_attention":
        config = small_config(part)
        kinds = [part.Sequences._fields, ["names", "wanted", "where"]]
        shapes = [(4, 3, 10) if name in kinds[1] else (4, 10) for name in kinds[0]]
        data = part.Sequences(*(torch.zeros(s, dtype=torch.int64, device=device) for s in shapes))
        for name in ("MHA", "MQA", "MLA-8"):
            yield part.LookupNet(part.make_attention(name, config), config).to(device), data
    else:
        images = torch.zeros(6, 28, 28, device=device)
        for strength in (0, 0.5, 2):
            yield part.MLP((8,)) if part.__name__ == "part1_mlp_mnist" else None, images
            assert part.augment(images, strength).device.type == device


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_nothing_of_the_cpu_is_mixed_in(part, device):
    """The meta device computes nothing, but refuses a tensor of the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if part.__name__ == "part2_rnn_fashion":
        for settings in ({}, {"readout": "last", "bidirectional": True, "num_layers": 2}):
            net = part.RowRNN(small_config(part, **settings)).to(device)
            images = part.mirror(torch.zeros(6, 28, 28, device=device))
            net(images).sum().backward()
            assert all(p.grad.device.type == device for p in net.parameters())
        return
    for net, data in nets(part, device):
        output = net.to(device)(data)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
        assert all(p.grad.device.type == device for p in net.parameters())


def test_a_device_that_is_not_there_is_an_error(part):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert part.pick_device("auto") == part.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(part.UserError, match=f"{name} is not available here; use --device cpu"):
            part.pick_device(name)


# ------------------------------------- notebooks and edits ------------------------------------ #


def test_from_a_notebook(part, monkeypatch, tmp_path):
    """In a thread, with another default dtype, after another run; nothing is left changed."""
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    before = dict(matplotlib.rcParams), socket.getdefaulttimeout(), handlers
    mirrors = list(part.DATASET.mirrors) if part.__name__ in WITH_DATA else []
    ended = []

    def run():
        ended.append(part.main(small_config(part)))

    torch.set_default_dtype(torch.float64)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(ended) == 1
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert before == (dict(matplotlib.rcParams), socket.getdefaulttimeout(), handlers)
    assert mirrors == (part.DATASET.mirrors if part.__name__ in WITH_DATA else [])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "--batch-size"),
        (MemoryError(), "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), "--batch-size"),
        (RuntimeError("unsupported operation: some elements refer to a single memory location"), 0),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 0),
        (FileNotFoundError(2, "No such file or directory", "no/such/file"), 0),
        (ValueError("too many values to unpack"), 0),
        (IndexError("list index out of range"), 0),
    ],
)
def test_what_a_user_can_mend_is_told_and_a_mistake_in_the_code_is_raised(part, error, told):
    if told:
        assert told in part.explain(error)
    else:
        with pytest.raises(type(error)):
            part.explain(error)


def test_interrupted_inside_the_optimizer_everything_is_drawn(part, monkeypatch, tmp_path):
    """There Ctrl-C can leave autograd switched off, and some figures need a gradient."""
    train = part.train

    def interrupted(*arguments):
        train(*arguments)
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    monkeypatch.setattr(part, "train", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            part.main(small_config(part, images_dir=tmp_path))
    finally:
        torch.set_grad_enabled(True)
    assert len(list(tmp_path.rglob("*.png"))) >= 5


def test_interrupted_while_figures_are_drawn_they_are_drawn_again(part, monkeypatch, tmp_path):
    """Ctrl-C after the last epoch: everything is scored and drawn, marked, then it ends."""
    calls, save = [], part.save_figure

    def first_is_interrupted(figure, path):
        calls.append(figure._suptitle.get_text())
        if len(calls) == 1:
            raise KeyboardInterrupt
        save(figure, path)

    monkeypatch.setattr(part, "save_figure", first_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        part.main(small_config(part, images_dir=tmp_path))
    assert len(list(tmp_path.rglob("*.png"))) == len(calls) - 1 >= 5
    assert sum("interrupted after" in title for title in calls) >= 3


def test_validation_that_is_not_finite_stops_the_run(part):
    """With a huge learning rate one step is fine, and what follows is not."""
    if part.__name__ == "part3_attention":
        with pytest.raises(part.UserError, match=r"NaN or infinite in step 2: try a lower"):
            part.main(small_config(part, lr=1e30, steps=1))
        return
    data = small_data(part)
    data.val_images[:] = torch.nan
    config = small_config(part)
    net = part.MLP((8,)) if part.__name__ == "part1_mlp_mnist" else part.RowRNN(config)
    with pytest.raises(part.UserError, match=r"NaN or infinite in epoch 1, step 5: try a lower"):
        part.train(net, data, config, [])
    data.train_images[70:] = torch.nan
    with pytest.raises(part.UserError, match=r"epoch 1, step [12]: try a lower"):
        part.train(net, data, config, [])
