"""What people and machines get wrong: DESIGN's table, one clear message, the right exit status."""

import hashlib
import itertools
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import PARTS, SMALL, WITH_DATA, small_config, unrendered

in_part1 = pytest.mark.parametrize("part", PARTS[:1], indirect=True)
in_parts_1_and_2 = pytest.mark.parametrize("part", WITH_DATA, indirect=True)
Ended = namedtuple("Ended", "status out err titles")  # titles: of the figures


def flags_of(name, **changes):
    """Settings that run in a second, as flags: three epochs, or two variants of three steps."""
    few = {"epochs": 3} if name in WITH_DATA else {"steps": 3, "seq_len": 4, "cache": ()}
    flags = []
    for setting, value in (SMALL[name] | few | changes).items():
        flags.append(f"--{setting.replace('_', '-')}")
        flags += map(str, value if isinstance(value, tuple) else [value])
    return flags


@pytest.fixture
def run(part, monkeypatch, capsys):
    """Calls a script's command line with small settings; figures are not rendered."""

    def call(*flags):
        titles = unrendered(part, monkeypatch)
        monkeypatch.setattr("sys.argv", ["part.py", *flags_of(part.__name__), *map(str, flags)])
        with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
            part.command_line()
        out, err = capsys.readouterr()
        status = end.value.code
        if isinstance(status, str):  # Python prints it and makes 1 of it
            err += status
            status = 1
        return Ended(status, out, err, [" ".join(title.split()) for title in titles.values()])

    return call


def test_a_bad_flag_ends_with_status_2_before_anything_is_started(run):
    ended = run("--lr", -1)
    assert ended.status == 2 and "lr" in ended.err and os.listdir() == []


def test_an_edited_default_that_cannot_work_is_told_by_name(part, monkeypatch):
    text = Path(part.__file__).read_text(encoding="utf-8")
    edited = text.replace("seeds: PositiveInt = 1", "seeds: PositiveInt = 0.5")
    Path("edited.py").write_text(edited, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["edited.py"])
    with pytest.raises(SystemExit, match=r"^edited.py: 1 validation error(.|\n)*seeds"):
        runpy.run_path("edited.py", run_name="__main__")


def test_folders_that_cannot_be_made_are_told_before_training(part, run, capsys):
    Path("file").touch()
    wrong = [["--images-dir", "file/below"]]
    if part.__name__ == "part1_mlp_mnist":
        wrong += [["--save", "."], ["--save", "file/net.pt"]]
    for flags in wrong:
        with pytest.raises(OSError, match=r"'(file|\.)"):
            run(*flags)
        assert "train loss" not in capsys.readouterr().out


@in_parts_1_and_2
def test_without_a_network_digits_stand_in_with_a_warning(part, run):
    ended = run()
    assert "Error downloading" in ended.err  # torchvision's words
    assert f"WARNING: no {part.DATASET.__name__}" in ended.err
    assert ended.status == 0 and all("sklearn-digits" in title for title in ended.titles)


@pytest.fixture
def labels_file(part, monkeypatch):
    """A file of a dataset of noise, in torchvision's folder; its checksums are the known ones."""
    raw = Path("data", part.DATASET.__name__, "raw")
    raw.mkdir(parents=True)
    checksums = []
    for prefix, n in (("train", 700), ("t10k", 100)):
        pixels = torch.randint(256, (n, 28, 28), dtype=torch.uint8).numpy().tobytes()
        labels = bytes(range(10)) * (n // 10)
        sizes = b"".join(size.to_bytes(4, "big") for size in (n, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + labels)
        checksums.append(hashlib.md5(pixels + labels).hexdigest())
    monkeypatch.setattr(part, "MD5", checksums)
    return raw / "train-labels-idx1-ubyte"


@in_parts_1_and_2
def test_a_dataset_on_the_disk_is_trained_on(part, labels_file, run):
    ended = run()
    assert ended.err == "" and all(part.DATASET.__name__ in title for title in ended.titles)


@in_parts_1_and_2
@pytest.mark.parametrize("fault", ["truncated", "empty", "swapped"])
def test_a_damaged_file_is_told_and_never_trained_on(part, labels_file, run, fault):
    content = labels_file.read_bytes()
    swapped = content[:8] + content[:7:-1]  # as many labels, but others
    damage = {"truncated": content[:500], "empty": b"", "swapped": swapped}
    labels_file.write_bytes(damage[fault])
    ended = run()
    assert ended.status == 1 and len(ended.err.splitlines()) == 1
    assert f"data/{part.DATASET.__name__} is damaged or another's: delete the folder" in ended.err
    assert "train loss" not in ended.out


def test_a_loss_that_is_not_finite_stops_the_run(run):
    ended = run("--lr", "1e30")
    assert ended.status == 1 and ended.titles == []
    assert re.search("the loss is NaN or infinite .* [12]: lower lr$", ended.err)


def interrupt(part, monkeypatch, name, call):
    """A real Ctrl-C in a call of `tqdm`, as an epoch begins, or of `predict`, as it is scored."""
    calls = itertools.count(1)
    original = getattr(part, name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it

    def interrupted(*arguments, **options):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(part, name, interrupted)


@pytest.mark.parametrize("name", ["tqdm", "predict"])
def test_ctrl_c_scores_and_draws_the_best_so_far(part, name, monkeypatch, run):
    interrupt(part, monkeypatch, name, call=2)
    ended = run()
    assert ended.status == 130 and ended.out.count("macro avg") == 1
    where = "after epoch 1 of 3" if part.__name__ in WITH_DATA else "in or after MHA 2x4"
    assert len(ended.titles) >= 2 and all(f"stopped {where}" in title for title in ended.titles)


@pytest.mark.parametrize("name", ["tqdm", "predict"])
def test_ctrl_c_before_the_first_epoch_has_ended_is_the_end(part, name, monkeypatch, run):
    interrupt(part, monkeypatch, name, call=1)
    ended = run()
    assert ended.status == 130 and ended.titles == [] and "macro avg" not in ended.out


def test_a_second_ctrl_c_is_the_end(part, monkeypatch, run):
    interrupt(part, monkeypatch, "tqdm", call=2)
    interrupt(part, monkeypatch, "predict", call=2)  # of the test set, after one epoch
    ended = run()
    assert ended.status == 130 and ended.titles == []


@pytest.mark.parametrize("part", PARTS[2:], indirect=True)
@pytest.mark.parametrize(("name", "call"), [("tqdm", 4), ("predict", 8)])
def test_ctrl_c_in_a_later_variant_tells_the_first(part, name, call, monkeypatch, run):
    """In the second variant's first step, or as it is scored."""
    interrupt(part, monkeypatch, name, call)
    ended = run()
    assert ended.status == 130 and ended.out.count("macro avg") == 1
    assert len(ended.titles) == 3
    assert all("stopped in or after MHA 2x4" in title for title in ended.titles)


def test_several_seeds_are_summed_up_also_after_ctrl_c(part, monkeypatch, run):
    calls = 3 if part.__name__ in WITH_DATA else 6  # in one run
    interrupt(part, monkeypatch, "tqdm", call=2 * calls + 2)
    ended = run("--seeds", 5)
    assert ended.status == 130 and "2 seeds: mean +- standard deviation" in ended.out
    told = re.search(r"f1 +(\S+) \+- (\S+) \((\S+), (\S+)\)", ended.out)
    mean, spread, *each = map(float, told.groups())
    assert each[0] != each[1]
    assert mean == pytest.approx(statistics.mean(each), abs=2e-4)
    assert spread == pytest.approx(statistics.stdev(each), abs=2e-4)


@in_part1
def test_a_saved_net_is_the_one_that_was_scored(part):
    results = part.main(small_config(part, save="below/net.pt"))
    saved = torch.load("below/net.pt", weights_only=True)
    model = part.MLP(saved["hidden"])
    model.load_state_dict(saved["weights"])
    *_, test = part.bundled_digits()
    images = (test.images - saved["mean"]) / saved["std"]
    assert torch.equal(part.predict(model, images).softmax(1), results["probabilities"])


@in_part1
def test_a_file_that_is_no_saved_net_is_one_line_and_runs_no_code(part, run):
    trap = type("Trap", (), {"__reduce__": lambda _: (open, ("trapped", "w"))})()
    saved = {"hidden": (8,), "weights": part.MLP((8,)).state_dict(), "dataset": "MNIST"}
    torch.save(saved, "good.pt")
    Path("damaged.pt").write_bytes(Path("good.pt").read_bytes()[:-100])
    torch.save(saved | {"weights": {}}, "foreign.pt")
    torch.save(saved | {"dataset": trap}, "trap.pt")
    Path("7.jpg").touch()
    for name in ("damaged.pt", "foreign.pt", "trap.pt"):
        ended = run("--load", name, "--predict", "7.jpg")
        assert ended.status == 1 and len(ended.err.splitlines()) == 1
        assert f"{name} is no net of this script" in ended.err
    assert not Path("trapped").exists()


@in_part1
def test_rows_reach_a_pipe_while_the_run_goes_on(part):
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    environment |= dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9")  # nowhere
    command = [sys.executable, part.__file__, *flags_of(part.__name__, epochs=60)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        lines = [process.stdout.readline() for _ in range(3)]  # sizes, heading, first epoch
        drawn = list(Path().rglob("*.png"))
        process.kill()
    assert lines[2].split()[0] == "1" and drawn == []  # so 59 epochs are still to come
