"""What people and machines get wrong: DESIGN's table, one clear message, the right exit status."""

import contextlib
import hashlib
import io
import itertools
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import PARTS, SMALL, WITH_DATA, unrendered

in_part1 = pytest.mark.parametrize("part", PARTS[:1], indirect=True)
in_parts_1_and_2 = pytest.mark.parametrize("part", WITH_DATA, indirect=True)
in_part3 = pytest.mark.parametrize("part", PARTS[2:], indirect=True)


class Ended(NamedTuple):
    status: int
    out: str
    err: str
    drawn: dict


def flags_of(name, **more):
    """The settings of a run that takes a second, as flags."""
    few = {"cache": (), "seq_len": 4, "steps": 30} if name == PARTS[2] else {"epochs": 3}
    for setting, value in (SMALL[name] | few | more).items():
        yield f"--{setting.replace('_', '-')}"
        yield from map(str, value if isinstance(value, tuple) else [value])


def run(part, *flags, small=True):
    """Call a script's command line here, with figures that are not rendered."""
    out = io.StringIO()
    err = io.StringIO()
    few = list(flags_of(part.__name__)) if small else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{part.__name__}.py", *few, *map(str, flags)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(out, "reconfigure", lambda **_: None, raising=False)
        drawn = unrendered(part, patch)
        with contextlib.redirect_stderr(err):
            try:
                part.command_line()
            except SystemExit as end:
                code = end.code
            except BaseException:
                code = traceback.format_exc()
    told = f"{code}\n" if isinstance(code, str) else ""  # as Python does
    return Ended(1 if told else code, out.getvalue(), err.getvalue() + told, drawn)


def test_a_bad_flag_ends_with_status_2_and_a_bad_default_with_1(part, tmp_path):
    ended = run(part, "--lr", -1)
    assert ended.status == 2 and "lr" in ended.err and os.listdir() == []  # nothing was started
    text = Path(part.__file__).read_text("utf-8")
    edited = text.replace("seeds: PositiveInt = 1", "seeds: PositiveInt = 0.5")
    Path("part.py").write_text(edited, "utf-8")
    done = subprocess.run([sys.executable, "part.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "seeds" in done.stderr and "Traceback" not in done.stderr


def test_folders_that_cannot_be_made_are_told_before_training(part):
    Path("file").touch()
    Path("folder").mkdir()
    saved = [["--save", "folder"], ["--save", "file/net.pt"]] if part.__name__ == PARTS[0] else []
    for flags in [["--images-dir", "file/below"], *saved]:
        ended = run(part, *flags)
        assert ended.status == 1 and "Error" in ended.err and "train loss" not in ended.out


@in_parts_1_and_2
def test_without_a_network_digits_stand_in_with_a_warning(part):
    ended = run(part)
    name = part.DATASET.__name__
    assert ended.status == 0 and f"WARNING: no {name}" in ended.err and "downloading" in ended.err
    assert all("sklearn-digits" in title for title in ended.drawn.values())


def write_toy_dataset(part, monkeypatch):
    """Noise in torchvision's files and folder, whose checksums are the known ones."""
    raw = Path("data", part.DATASET.__name__, "raw")
    raw.mkdir(parents=True)
    checksums = []
    for prefix, n in (("train", 700), ("t10k", 100)):
        pixels = torch.randint(256, (n, 28, 28), dtype=torch.uint8).numpy().tobytes()
        labels = bytes(range(10)) * (n // 10)
        sizes = b"".join(size.to_bytes(4, "big") for size in (n, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels)
        header = b"\0\0\x08\x01" + n.to_bytes(4, "big")
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels)
        checksums.append(hashlib.md5(pixels + labels).hexdigest())
    monkeypatch.setattr(part, "MD5", checksums)
    return raw / "train-labels-idx1-ubyte"


@in_parts_1_and_2
@pytest.mark.parametrize("fault", ["none", "truncated", "swapped", "empty"])
def test_a_damaged_file_is_told_and_never_trained_on(part, fault, monkeypatch):
    labels = write_toy_dataset(part, monkeypatch)
    content = labels.read_bytes()
    faults = {"truncated": content[:500], "swapped": content[:8] + content[:7:-1], "empty": b""}
    labels.write_bytes(faults.get(fault, content))
    ended = run(part)
    if fault == "none":
        assert ended.status == 0 and ended.err == "" and part.DATASET.__name__ in ended.out
    else:
        assert ended.status == 1 and "train loss" not in ended.out
        assert f"data/{part.DATASET.__name__} is damaged" in ended.err.splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_the_run(part):
    ended = run(part, "--lr", "1e30")
    assert ended.status == 1 and ended.drawn == {} and "macro avg" not in ended.out
    assert "the loss is NaN or infinite" in ended.err.splitlines()[-1]


def interrupt(part, patch, name, call):
    """A real Ctrl-C in a call of `tqdm`, as an epoch begins, or of `predict`, after training."""
    calls = itertools.count(1)
    original = getattr(part, name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it

    def interrupted(*arguments, **options):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    patch.setattr(part, name, interrupted)


@pytest.mark.parametrize("name", ["tqdm", "predict"])
def test_ctrl_c_scores_and_draws_the_best_so_far(part, name, monkeypatch):
    """Nothing is there yet in the first epoch; in the second it is the first epoch's net."""
    with monkeypatch.context() as patch:
        interrupt(part, patch, name, call=1)
        ended = run(part)
    assert ended.status == 130 and "macro avg" not in ended.out and ended.drawn == {}
    interrupt(part, monkeypatch, name, call=2)
    ended = run(part)
    assert ended.status == 130 and "Traceback" not in ended.err
    assert ended.out.count("macro avg") == 1
    assert all("stopped" in title for title in ended.drawn.values()) and len(ended.drawn) >= 2


@in_part3
def test_ctrl_c_in_a_later_variant_tells_those_that_are_finished(part, monkeypatch):
    interrupt(part, monkeypatch, "tqdm", call=16)  # the second variant's first step
    ended = run(part)
    assert ended.status == 130 and ended.out.count("macro avg") == 1 and len(ended.drawn) == 3


@pytest.mark.parametrize("part", [PARTS[0], PARTS[2]], indirect=True)
def test_several_seeds_are_summed_up_also_after_ctrl_c(part, monkeypatch):
    ended = run(part, "--seeds", 2)
    assert ended.status == 0 and "2 seeds: mean +- standard deviation" in ended.out
    calls = 3 if part.__name__ == PARTS[0] else 30  # of tqdm, in a run
    interrupt(part, monkeypatch, "tqdm", call=2 * calls + 1)
    ended = run(part, "--seeds", 5)
    assert ended.status == 130 and "2 seeds: mean +- standard deviation" in ended.out


@in_part1
def test_a_file_that_is_no_saved_net_is_one_line_and_runs_no_code(part):
    assert run(part, "--save", "a/net.pt").status == 0
    saved = torch.load("a/net.pt", weights_only=True)
    trap = type("Trap", (), {"__reduce__": lambda _: (open, ("trapped", "w"))})()
    Path("bad0.pt").write_bytes(Path("a/net.pt").read_bytes()[:-100])
    torch.save(saved | {"weights": {}}, "bad1.pt")
    torch.save(saved | {"dataset": trap}, "bad2.pt")
    torch.save({"cell": "tanh"}, "bad3.pt")
    Path("7.jpg").touch()
    for i in range(4):
        ended = run(part, "--load", f"bad{i}.pt", "--predict", "7.jpg", small=False)
        assert ended.status == 1 and len(ended.err.splitlines()) == 1
        assert f"bad{i}.pt is no net of this script" in ended.err
    assert not Path("trapped").exists()


@in_part1
def test_rows_reach_a_pipe_while_the_run_goes_on(part):
    flags = list(flags_of(part.__name__, epochs=9999))
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, part.__file__, *flags]
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with subprocess.Popen(
        command, env=plain | nowhere, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        lines = [process.stdout.readline() for _ in range(3)]  # sizes, heading, first epoch
        running = process.poll() is None
        process.kill()
    assert running and lines[2].split()[0] == "1"
