"""What people and machines get wrong: one clear line, the right exit status, nothing lost."""

import contextlib
import gzip
import hashlib
import io
import itertools
import os
import random
import runpy
import signal
import socket
import traceback
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock
from urllib import request

import pytest
import torch
from conftest import PARTS, WITH_DATA
from test_scripts import part3, unrendered

SMALL = {  # flags for a run of a second or less
    "part1_mlp_mnist": "--hidden 8 --batch-size 64 --epochs 3",
    "part2_rnn_fashion": "--hidden-size 8 --encoder-size 8 --batch-size 64 --epochs 3",
    "part3_attention": "--d-model 8 --n-head 2 --n-kv-head 2 1 --kv-latent --seq-len 4 --steps 6",
}
Ended = namedtuple("Ended", "status out err drawn")
in_part1 = pytest.mark.parametrize("part", PARTS[:1], indirect=True)  # the others share the code
in_parts_1_and_2 = pytest.mark.parametrize("part", WITH_DATA, indirect=True)


def run(part, *flags):
    """Call a script's command line here; returns status, stdout, stderr and figures' titles."""
    small = [] if "--load" in flags else SMALL[part.__name__].split()
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with pytest.MonkeyPatch.context() as patch, out as out, err as err:
        patch.setattr("sys.argv", [f"{part.__name__}.py", *small, *map(str, flags)])
        drawn = unrendered(part, patch)
        try:
            code = part.command_line() or 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
    told = f"{code}\n" if isinstance(code, str) else ""  # as Python does
    return Ended(1 if told else code, out.getvalue(), err.getvalue() + told, drawn)


def assert_one_line(ended, *words, alone=True):
    """What is wrong is told in the last line on stderr; `alone`: it is all the output."""
    assert ended.status == 1 and "macro avg" not in ended.out and ended.drawn == {}, ended
    last = ended.err.splitlines()[-1]
    assert last.startswith("part") and all(word in last for word in words), ended.err
    assert "Traceback" not in ended.err and (not alone or ended[1:3] == ("", f"{last}\n")), ended


def test_a_bad_flag_ends_with_status_2_and_a_bad_default_in_one_line(part, monkeypatch):
    ended = run(part, "--lr", -1)
    assert (ended.status, ended.out, os.listdir()) == (2, "", [])  # nothing is fetched or drawn
    assert "lr is -1.0: it must be from" in " ".join(ended.err.replace("\u2502", " ").split())
    text = Path(part.__file__).read_text(encoding="utf-8")
    Path("part.py").write_text(text.replace("seed: int = 0", "seed: int = 0.5"), encoding="utf-8")
    monkeypatch.setattr(part, "command_line", runpy.run_path("part.py")["command_line"])
    assert_one_line(run(part, "--lr", -1), "seed is 0.5", "int")
    assert os.listdir() == ["part.py"]


def test_what_cannot_be_written_is_told_before_training(part, tmp_path):
    Path("folder").mkdir()
    Path("file").write_text("mine")
    flags = ["--images-dir file", "--images-dir file/below"]
    flags += ["--save folder", "--save file/net.pt"] * (part.__name__ in WITH_DATA)
    for flag, place in map(str.split, flags):
        assert_one_line(run(part, flag, place), "cannot write", place)
    assert Path("file").read_text() == "mine"
    assert {path.name for path in tmp_path.rglob("*")} <= {"file", "folder", "images"}


MISTAKES = [io.UnsupportedOperation("x"), NameError("x")]  # the former is an OSError, and more


@in_part1
@pytest.mark.parametrize("error", [*MISTAKES, torch.OutOfMemoryError("x"), MemoryError("x")])
def test_a_mistake_shows_its_traceback_and_out_of_memory_is_one_line(part, error, monkeypatch):
    monkeypatch.setattr(part, "confusion_figure", broken := Mock(side_effect=error))
    ended, mistake = run(part), error in MISTAKES
    told = f"{type(error).__name__}: x\n" if mistake else "out of memory: try a smaller --batch-"
    assert ended.status == broken.call_count == 1 and told in ended.err
    assert ended.err.count("Traceback") == mistake and "macro avg" in ended.out


TOY, LABELS = {}, "train-labels-idx1-ubyte"
for prefix, n in (("train", 700), ("t10k", 100)):  # noise, in MNIST's own format
    TOY[f"{prefix}-images-idx3-ubyte"] = bytes(16) + random.Random(n).randbytes(784 * n)
    TOY[f"{prefix}-labels-idx1-ubyte"] = bytes(8) + bytes(range(10)) * (n // 10)
WHOLE = "MNIST: 600 training, 100 validation, 100 test images"


@pytest.fixture
def toy(part, monkeypatch, tmp_path_factory):
    """The folder with a toy dataset of the script's, and its mirrors: all but the last are bad."""
    monkeypatch.setattr(part, "MD5", {k: hashlib.md5(v).hexdigest() for k, v in TOY.items()})
    (raw := Path("data", part.DATASET, "raw")).mkdir(parents=True)
    folder, urlopen = tmp_path_factory.mktemp("mirrors"), request.urlopen
    for name, content in TOY.items():
        (raw / name).write_bytes(content)
        good = gzip.compress(content, 1)
        bad = {"html": b"<html>", "half": good[: len(good) // 2], "wrong": gzip.compress(b"?")}
        for fault, body in (bad | {"good": good}).items():
            (folder / f"{fault}-{name}.gz").write_bytes(body)
    monkeypatch.setattr(request, "urlopen", lambda url, timeout: urlopen(url, timeout=timeout / 20))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # whoever asks gets no answer
        odd = ["http://[broken/", *(f"http://127.0.0.1:{n}/" for n in (9, silent.getsockname()[1]))]
        yield raw, [*odd, *(f"{folder.as_uri()}/{fault}-" for fault in ("absent", *bad, "good"))]


@in_part1
def test_a_mirrors_fault_is_told_and_the_next_one_works(part, toy, monkeypatch):
    raw, mirrors = toy
    raw.rename("elsewhere")
    monkeypatch.setattr(part, "MIRRORS", [*mirrors, "http://spare/"])
    ended = run(part)
    assert ended.status == 0 and WHOLE in ended.out and len(ended.drawn) == 5, ended.err
    for name in TOY:
        assert all(f"{mirror}{name}.gz failed: " in ended.err for mirror in mirrors[:-1])
        assert ended.err.count(f"downloaded {mirrors[-1]}{name}.gz\n") == 1
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == TOY
    assert "spare" not in ended.err and run(part).err == ""  # all is here now


@in_parts_1_and_2
def test_a_dead_network_is_told_within_a_minute_and_digits_stand_in(part, monkeypatch):
    monkeypatch.setattr(part, "MIRRORS", runpy.run_path(part.__file__)["MIRRORS"])
    monkeypatch.setattr(request, "urlopen", dead := Mock(side_effect=TimeoutError("dead")))
    ended = run(part, "--save", "net.pt")
    assert ended.status == 0 and "sklearn-digits, test set" in ended.out, ended.err
    assert f"WARNING: {part.DATASET} is not in data" in ended.err and "('dead')" in ended.err
    assert dead.call_count >= 4 and sum(call.kwargs["timeout"] for call in dead.mock_calls) <= 60
    assert sorted(os.listdir()) == ["images", "offline-net.pt"]


FILES = {  # what stands in the labels' place, and what a run without a network says
    "truncated": ({LABELS: TOY[LABELS][:500]}, "damaged"),
    "swapped": ({LABELS: TOY[LABELS][::-1]}, "damaged"),
    "a dangling link": ({LABELS: None}, "damaged"),
    "half a .gz": ({f"{LABELS}.gz": gzip.compress(TOY[LABELS])[:20]}, "damaged"),
    "a whole .gz": ({f"{LABELS}.gz": gzip.compress(TOY[LABELS])}, WHOLE),
    "missing": ({}, "sklearn-digits, test set"),
}


@in_part1
@pytest.mark.parametrize("fault", FILES)
def test_a_bad_file_is_never_trained_on(fault, part, toy, monkeypatch):
    """Without a network it is named and kept; with one, it is fetched again, and nothing else."""
    (raw, mirrors), (files, told) = toy, FILES[fault]
    monkeypatch.setattr(part, "draw_figures", Mock())
    (raw / LABELS).unlink()
    for name, content in files.items():
        (raw / name).write_bytes(content) if content else (raw / name).symlink_to("nowhere")
    before, ended = sorted((p, p.lstat().st_mtime) for p in raw.iterdir()), run(part)
    assert before == sorted((p, p.lstat().st_mtime) for p in raw.iterdir())
    if told == "damaged":
        assert_one_line(ended, f"data/MNIST/raw/{LABELS} is damaged", alone=False)
    else:
        assert ended.status == 0 and told in ended.out and ("WARNING" in ended.err) == (not files)
    monkeypatch.setattr(part, "MIRRORS", mirrors[-1:])
    ended, good = run(part), f"downloaded {mirrors[-1]}{LABELS}.gz\n"
    assert ended.status == 0 and WHOLE in ended.out, ended.err
    assert ended.err.count("downloaded") == ended.err.count(good) == (told != WHOLE)


@pytest.mark.parametrize("part", WITH_DATA[1:], indirect=True)
def test_files_of_mnist_in_fashion_mnists_folder_are_found_out(part, data_dir):
    Path("data", "FashionMNIST").mkdir(parents=True)
    Path("data", "FashionMNIST", "raw").symlink_to(data_dir / "MNIST" / "raw")
    assert_one_line(run(part), "train-images-idx3-ubyte is damaged", alone=False)


def test_a_loss_that_is_not_finite_is_one_line_and_nothing_is_drawn(part, monkeypatch):
    """In part 3 it is the second variant that diverges, after the first has been scored."""
    place, train, lrs = " of epoch 1", part.train, [1e30, 3e-3]
    if part is part3:
        place = "1: lower lr"
        monkeypatch.setattr(part, "train", lambda n, c, *m: train(n, replace(c, lr=lrs.pop()), *m))
    ended = run(part, "--lr", "1e30")
    assert_one_line(ended, "loss NaN or infinite after step ", place, alone=False)


def interrupt(part, patch, name, call):
    """Ctrl-C in a call of `tqdm`, as an epoch begins, or of `predict`, after its training."""
    calls, original = itertools.count(1), getattr(part, name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def interrupted(*arguments, **options):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)  # the real one
        return original(*arguments, **options)

    patch.setattr(part, name, interrupted)


@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_scores_draws_and_saves_the_best_so_far(part, call, monkeypatch):
    """There is nothing yet in the first epoch; later it is the first epoch's net."""
    images, reports = part.__name__ in WITH_DATA, set()
    note = "stopped after epoch 1 of 3" if images else "stopped in MHA"
    for name in ("tqdm", "predict"):
        with monkeypatch.context() as patch:
            interrupt(part, patch, name, call)
            ended = run(part, *["--save", "net.pt"] * images)
        assert ended.status == 130 and "Traceback" not in ended.err
        if call == 1:
            assert "avg" not in ended.out and "within" not in ended.out and ended.drawn == {}
            assert os.listdir() == ["images"]
        else:
            assert ended.out.count(f", {note}\n") == ended.out.count("macro avg") == 1
            assert sum(note in title for title in ended.drawn.values()) >= 3
            again = run(part, "--load", "offline-net.pt") if images else ended  # it keeps the note
            reports |= {e.out.split(f"{note}\n")[-1].split("weighted")[0] for e in (ended, again)}
    assert len(reports) == call - 1


@pytest.mark.parametrize(("call", "tables", "marked"), [(7, 1, 1), (8, 2, 2), (13, 2, 0)])
def test_ctrl_c_later_keeps_what_is_finished(call, tables, marked, monkeypatch):
    """MQA's first step, when there is nothing of it yet; its second; the study's first."""
    interrupt(part3, monkeypatch, "tqdm", call)
    ended = run(part3, "--study")
    assert ended.status == 130 and len(ended.drawn) == 5 and "part3_decode" in ended.drawn
    assert ended.out.count("macro avg") == tables and ended.out.count("stopped in MQA") == marked


@pytest.mark.parametrize("part", [PARTS[0], PARTS[2]], indirect=True)
def test_ctrl_c_in_a_series_of_seeds_tells_what_is_finished(part, monkeypatch):
    """The third run of five is stopped in its second epoch, or step: it is told, not counted."""
    interrupt(part, monkeypatch, "tqdm", call=8 if part.__name__ in WITH_DATA else 26)
    ended = run(part, "--seeds", 5)
    assert ended.status == 130 and ", stopped" in ended.out, ended.err
    assert "2 seeds from 0: mean +- std" in ended.out


@in_parts_1_and_2
def test_a_loaded_net_needs_no_other_flag_and_keeps_to_its_dataset(part, toy):
    saved, again = run(part, "--seed", 3, "--save", "a/net.pt"), run(part, "--load", "a/net.pt")
    assert saved.status == again.status == 0 and os.listdir("a") == ["net.pt"]
    assert "'seed': 3" in again.out  # and so the same splits
    assert f"test set{again.out.split('test set')[1]}saved a/net.pt" in saved.out  # as before
    toy[0].rename("elsewhere")
    assert_one_line(run(part, "--load", "a/net.pt"), f"needs {part.DATASET}, but", alone=False)


@in_parts_1_and_2
def test_a_file_that_is_no_net_of_this_script_is_one_line_and_runs_no_code(part):
    assert run(part, "--save", "net.pt").status == 0
    good, saved = Path("offline-net.pt").read_bytes(), torch.load("offline-net.pt")
    at = good.index(list(saved["weights"].values())[-1].numpy().tobytes())
    bad = [b"", b"text", good[:-100], good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]]
    trap = type("Trap", (), {"__reduce__": lambda _: (open, ("trapped", "w"))})()
    other_part = {"hidden": (8,), "cell": "tanh", "seed": 0}
    for strange in ({"weights": {}}, {"note": trap}, {"net": 1}, {"net": other_part}):
        torch.save(saved | strange, content := io.BytesIO())
        bad.append(content.getvalue())
    for content in bad:
        Path("bad.pt").write_bytes(content)
        assert_one_line(run(part, "--load", "bad.pt"), "bad.pt is no net that was saved here")
    assert_one_line(run(part, "--load", "missing.pt"), "missing.pt is no net that was saved here")
    assert not Path("trapped").exists() and run(part, "--load", "offline-net.pt").status == 0
