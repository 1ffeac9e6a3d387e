"""What people and machines get wrong: one clear line, the right exit status, nothing lost.

Every test starts the scripts' real command line in a process of its own, offline, on a tiny budget.
Where a fault needs a network, a server on the loopback address plays the mirrors, with a toy
dataset whose checksums are put in the place of the real one's.
"""

import gzip
import hashlib
import http.server
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from forked import DEAD_PROXY, ROOT, Forked
from PIL import Image

resource = pytest.importorskip("resource", reason="forks and limits are Unix's")

RUNS = {  # flags for a run of a second or two
    "part1_mlp_mnist": "--hidden 8 --batch-size 64 --epochs 2",
    "part2_rnn_fashion": "--hidden-size 8 --encoder-size 8 --batch-size 64 --epochs 2",
    "part3_attention": "--d-model 16 --n-head 2 --n-kv-head 1 --steps 30",
}
SMALL = {name: flags.split() for name, flags in RUNS.items()}
LONG = {name: [*flags[:-1], "15000"] for name, flags in SMALL.items()}  # to be stopped
WITH_DATA = ["part1_mlp_mnist", "part2_rnn_fashion"]
ENVIRONMENT = os.environ | {"http_proxy": DEAD_PROXY, "https_proxy": DEAD_PROXY, "no_proxy": ""}
each_script = pytest.mark.parametrize("script", SMALL)
each_with_data = pytest.mark.parametrize("script", WITH_DATA)


def run(script, cwd, *flags, **options):
    """Run a script to its end: exit status, stdout, stderr."""
    return Forked(script, cwd, *flags, **options).end()


def assert_one_line(err, *words):
    """The last line of stderr says what is wrong, and there is no traceback."""
    assert "Traceback" not in err, err
    last = err.strip().splitlines()[-1]
    for word in words:
        assert word in last, err


def assert_whole(folder):
    """Every file below `folder` is a PNG that can be read to its end; returns how many."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        Image.open(path).load()
    return len(files)


def old_figure(tmp_path, script):
    """A figure of an earlier run, where this one will want to put its own."""
    folder = tmp_path / "images" / ("offline" if script in WITH_DATA else "")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{script[:5]}_confusion_matrix.png"
    Image.new("RGB", (10, 10), "red").save(path)
    return path, path.read_bytes()


# ------------------------------------- flags and settings ------------------------------------- #

NUMBERS = ["0", "-1", "nan", "inf", "1e300", "99999999999999999999", "many", ""]
ALLOWED = {"0": ["weight-decay", "dropout", "label-smoothing", "augment", "seed", "encoder-size"]}
ALLOWED |= {"1e300": ["lr", "weight-decay"], "99999999999999999999": ["lr", "weight-decay"]}
COMMON = [["--bogus", "1"], ["--device", "tpu"], ["--epochs"], ["--seed", "1.5"], ["12"]]
FIELDS = {
    "part1_mlp_mnist": "hidden dropout epochs batch-size lr weight-decay label-smoothing augment",
    "part2_rnn_fashion": "hidden-size num-layers encoder-size dropout epochs batch-size lr "
    "weight-decay label-smoothing augment rows-per-step",
    "part3_attention": "d-model n-head n-kv-head seq-len steps batch-size lr weight-decay",
}
OTHERS = {
    "part1_mlp_mnist": ["--dropout 1", "--dropout 1.5", "--hidden 512 0", "--batch-size 55001"],
    "part2_rnn_fashion": ["--dropout 1", "--dropout 1.5", "--rows-per-step 3", "--readout first"],
    "part3_attention": [
        *("--d-model 60", "--n-kv-head 3", "--n-kv-head 4 4", "--n-kv-head 32"),
        *("--study --n-kv-head 16", "--study --n-kv-head 4 1"),  # nothing to pool, or from
    ],
}
REFUSALS = [
    (script, flags)
    for script in SMALL
    for flags in [
        *(
            [f"--{field}", number]
            for field in [*FIELDS[script].split(), "seed"]
            for number in NUMBERS
            if field not in ALLOWED.get(number, [])
        ),
        *(flags.split() for flags in OTHERS[script]),
        *COMMON,
    ]
]


@cache
def refusals(script):
    """Exit status and stderr for each wrong flag of a script, all in one process of Python.

    Under the key () stand the files that this has left behind.
    """
    wanted = [flags for name, flags in REFUSALS if name == script]
    code = f"""
import contextlib, io, json, sys
import {script} as part
answers = []
for flags in json.loads(sys.stdin.read()):
    sys.argv = ["{script}.py", *flags]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = part.command_line()
        except SystemExit as leaving:
            status = leaving.code
    answers.append((status, err.getvalue()))
print(json.dumps(answers))
"""
    with tempfile.TemporaryDirectory() as folder:
        environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            **{"cwd": folder, "env": environment, "input": json.dumps(wanted), "timeout": 120},
            **{"capture_output": True, "text": True, "check": True},
        )
        left_behind = os.listdir(folder)
    answers = json.loads(done.stdout.splitlines()[-1])
    answers = {tuple(flags): answer for flags, answer in zip(wanted, answers, strict=True)}
    return answers | {(): left_behind}


@pytest.mark.parametrize(("script", "flags"), REFUSALS)
def test_a_setting_that_cannot_work_is_refused_by_name(script, flags):
    status, err = refusals(script)[tuple(flags)]
    assert status == 2, (flags, err)
    assert "Traceback" not in err
    name = flags[0].removeprefix("--")
    assert name in err.replace("_", "-"), err
    assert refusals(script)[()] == []  # nothing was downloaded or drawn


@each_script
def test_cuda_where_there_is_none(script, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    status, _, err = run(script, tmp_path, "--device", "cuda")
    assert status == 1
    assert_one_line(err, "cuda is not available", "--device cpu")
    assert list(tmp_path.iterdir()) == []


@each_script
@pytest.mark.parametrize("folder", ["a file", "a file/below", "/proc/nowhere"])
def test_images_folder_that_cannot_be_written_is_told_before_training(script, folder, tmp_path):
    (tmp_path / "a file").write_text("mine")
    status, out, err = run(script, tmp_path, "--images-dir", folder)
    assert status == 1
    assert_one_line(err, folder, "--images-dir")
    assert "epoch" not in out and "step" not in out
    assert (tmp_path / "a file").read_text() == "mine"


@each_script
def test_folders_with_spaces_and_chinese_characters(script, tmp_path):
    folders = ["--images-dir", "图 片/a b"]
    if script in WITH_DATA:
        folders += ["--data-dir", "数 据"]
    status, _, err = run(script, tmp_path, *SMALL[script], *folders)
    assert status == 0, err
    assert assert_whole(tmp_path / "图 片" / "a b") >= 5


# -------------------------------------------- data -------------------------------------------- #


def toy_files(seed=0):
    """A dataset of 5,200 and 100 images in MNIST's own format, by file name."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randint(256, (10, 784), generator=generator, dtype=torch.uint8)
    files = {}
    for prefix, n in (("train", 5200), ("t10k", 100)):
        labels = torch.randint(10, (n,), generator=generator)
        images = struct.pack(">IIII", 2051, n, 28, 28) + prototypes[labels].numpy().tobytes()
        files[f"{prefix}-images-idx3-ubyte"] = images
        files[f"{prefix}-labels-idx1-ubyte"] = (
            struct.pack(">II", 2049, n) + labels.byte().numpy().tobytes()
        )
    return files


TOY = toy_files()
PACKED = {f"{name}.gz": gzip.compress(content, 1, mtime=0) for name, content in TOY.items()}


class Mirrors(http.server.BaseHTTPRequestHandler):
    """Mirrors with a fault each: the first part of the path says which."""

    protocol_version = "HTTP/1.0"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        fault, name = self.path.strip("/").split("/")
        body, status = PACKED[name], 200
        if fault.isdigit():
            body, status = b"", int(fault)
        elif fault == "html":
            body = b"<html>Please log in.</html>"
        elif fault == "half":
            body = body[: len(body) // 2]
        elif fault == "wrong":
            body = bytes(len(body))
        elif fault == "hangs":
            time.sleep(5)
        self.send_response(status)
        self.send_header("Content-Length", str(len(PACKED[name]) if fault == "half" else len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirrors) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run_with_toy(script, cwd, mirrors, *flags):
    """Run a script with the toy's checksums, and mirrors of our own that may hang for a second."""
    changes = {
        "MD5": {name: hashlib.md5(content).hexdigest() for name, content in TOY.items()},
        "resources": [(name, hashlib.md5(content).hexdigest()) for name, content in PACKED.items()],
        **{"MIRRORS": mirrors, "TIMEOUT": 1},
    }
    return run(script, cwd, *SMALL[script], *flags, changes=changes)


def raw_folder(script, cwd):
    return cwd / "data" / ("MNIST" if "mnist" in script else "FashionMNIST") / "raw"


def lay_out(script, cwd, files=TOY):
    folder = raw_folder(script, cwd)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@each_with_data
def test_every_fault_of_a_mirror_and_then_the_next_one_works(script, address, tmp_path):
    faults = ["403", "404", "503", "html", "half", "wrong", "hangs"]
    mirrors = [f"{address}/{fault}/" for fault in [*faults, "good"]]
    status, out, err = run_with_toy(script, tmp_path, mirrors)
    assert status == 0, err
    assert "200 training, 5,000 validation, 100 test images" in out
    for mirror in mirrors[:-1]:
        assert f"{mirror} failed" in err
    folder = raw_folder(script, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == TOY  # and nothing else
    assert assert_whole(tmp_path / "images") >= 5


@each_with_data
def test_no_mirror_works(script, address, tmp_path):
    status, out, err = run_with_toy(script, tmp_path, [f"{address}/404/", f"{address}/half/"])
    assert status == 0, err
    assert "WARNING" in err and "sklearn-digits, test set" in out
    assert list(raw_folder(script, tmp_path).iterdir()) == []
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["offline"]


@each_with_data
def test_packed_files_fetched_by_hand_need_no_mirror(script, address, tmp_path):
    folder = lay_out(script, tmp_path, PACKED)
    status, out, err = run_with_toy(script, tmp_path, [f"{address}/404/"])
    assert status == 0, err
    assert "200 training, 5,000 validation, 100 test images" in out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == TOY | PACKED


@each_with_data
def test_a_damaged_packed_file_is_kept_and_not_used(script, address, tmp_path):
    files = PACKED | {"t10k-labels-idx1-ubyte.gz": PACKED["train-labels-idx1-ubyte.gz"]}
    folder = lay_out(script, tmp_path, files)
    status, out, err = run_with_toy(script, tmp_path, [f"{address}/404/"])
    assert status == 0 and "WARNING" in err and "sklearn-digits" in out, err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


BAD_FILES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "unreadable": lambda path: (path.unlink(), path.mkdir()),
    "swapped": lambda path: path.write_bytes(toy_files(seed=1)[path.name]),
    "labels out of range": lambda path: path.write_bytes(path.read_bytes().replace(b"\3", b"\77")),
}


@each_with_data
@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_file_without_a_network_is_named_and_kept(script, fault, tmp_path):
    path = lay_out(script, tmp_path) / "train-labels-idx1-ubyte"
    BAD_FILES[fault](path)
    before = path.is_dir() or path.read_bytes()
    for _ in range(2):  # the second time is no different
        status, out, err = run_with_toy(script, tmp_path, [])
        assert status == 1
        assert_one_line(err, str(path.relative_to(tmp_path)), "damaged")
        assert out == ""
        assert (path.is_dir() or path.read_bytes()) == before
        assert len(list(path.parent.iterdir())) == 4


@each_with_data
@pytest.mark.parametrize("fault", ["truncated", "unreadable"])
def test_a_bad_file_is_fetched_again_and_set_aside(script, fault, address, tmp_path):
    path = lay_out(script, tmp_path) / "t10k-images-idx3-ubyte"
    BAD_FILES[fault](path)
    status, out, err = run_with_toy(script, tmp_path, [f"{address}/good/"])
    assert status == 0, err
    assert "100 test images" in out
    assert path.read_bytes() == TOY[path.name]
    assert path.with_name(f"{path.name}.damaged").exists()
    assert len(list(path.parent.iterdir())) == 5


@each_with_data
def test_a_data_folder_that_cannot_be_written_will_do_when_the_data_is_there(script, tmp_path):
    folder = lay_out(script, tmp_path)
    for path in (folder, folder.parent, folder.parent.parent):
        path.chmod(0o555)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "data").rglob("*"))
    status, out, err = run_with_toy(script, tmp_path, [])
    assert status == 0, err
    assert "200 training" in out
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "data").rglob("*"))


@each_with_data
@pytest.mark.parametrize("folder", ["a file", "/proc/nowhere"])
def test_a_data_folder_that_cannot_be_written_is_told(script, folder, tmp_path):
    (tmp_path / "a file").write_text("mine")
    status, _, err = run(script, tmp_path, *SMALL[script], "--data-dir", folder)
    assert status == 1
    assert_one_line(err, folder, "--data-dir")
    assert (tmp_path / "a file").read_text() == "mine"


# ------------------------------------------- running ------------------------------------------ #


def stop(script, cwd, word, sign=signal.SIGINT, flags=LONG):
    """Start a run, send `sign` as soon as it has printed `word`; its end."""
    running = Forked(script, cwd, *flags[script])
    running.wait_for(word)
    running.send(sign)
    return running.end()


@each_script
def test_ctrl_c_before_there_is_anything_to_score(script, tmp_path):
    path, old = old_figure(tmp_path, script)
    status, out, err = stop(script, tmp_path, "train loss")
    assert status == 130, err
    assert_one_line(err, "stopped")
    assert "macro avg" not in out
    assert path.read_bytes() == old and assert_whole(tmp_path / "images") == 1


@each_script
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_score_and_draw_the_best_so_far(script, sign, tmp_path):
    word = "\n 1000 " if script == "part3_attention" else "\n    2 "  # the row of a step, an epoch
    status, out, err = stop(script, tmp_path, word, sign)
    assert status == 130, err
    assert "interrupted:" in err
    assert_one_line(err, "stopped")
    assert "macro avg" in out
    assert assert_whole(tmp_path / "images") >= 5


def test_ctrl_c_early_in_a_later_variant_keeps_the_earlier_ones(tmp_path):
    flags = {"part3_attention": [*SMALL["part3_attention"][:-1], "900"]}
    status, out, err = stop("part3_attention", tmp_path, "MQA-wide:", flags=flags)
    assert status == 130, err
    assert "interrupted before MQA-wide could be scored" in err
    assert_one_line(err, "stopped")
    assert "\nMQA  " in out and "\nMQA-wide  " not in out  # the table of variants
    assert assert_whole(tmp_path / "images") >= 5


@each_script
def test_ctrl_c_in_the_study_leaves_the_figures_of_the_run(script, tmp_path):
    flags = {"part3_attention": ["--steps", "300", "--n-kv-head", "2", "1"]}
    flags = flags.get(script, ["--epochs", "20"])
    running = Forked(script, tmp_path, *SMALL[script], *flags, "--study")
    last = {"part1": "first_layer", "part2": "gradient_by_step", "part3": "qkv"}[script[:5]]
    offline = "offline" if script in WITH_DATA else ""
    path = tmp_path / "images" / offline / f"{script[:5]}_{last}.png"
    running.wait_until(path.exists)
    running.send(signal.SIGINT)
    status, out, err = running.end()
    assert status == 130, err
    assert_one_line(err, "stopped")
    assert "macro avg" in out and "from MHA by pooling" not in out
    names = [path.name for path in path.parent.iterdir()]
    assert len(names) >= 5 and not any("study" in name for name in names)
    assert_whole(tmp_path / "images")


@each_script
def test_a_second_ctrl_c_ends_at_once(script, tmp_path):
    word = "\n 1000 " if script == "part3_attention" else "\n    2 "
    running = Forked(script, tmp_path, *LONG[script])
    running.wait_for(word)
    running.send(signal.SIGINT)
    running.wait_for("macro avg")
    running.send(signal.SIGINT)
    status, _, err = running.end(seconds=10)
    assert status == 130, err
    assert_one_line(err, "stopped")
    assert_whole(tmp_path / "images")


@each_script
def test_ctrl_c_while_figures_are_drawn(script, tmp_path):
    last = "decode:" if script == "part3_attention" else "weighted avg"
    status, out, err = stop(script, tmp_path, last, flags=SMALL)
    assert status == 130, err
    assert_one_line(err, "stopped")
    assert "macro avg" in out
    assert_whole(tmp_path / "images")


@each_script
def test_full_disk_leaves_the_old_figure_and_says_so(script, tmp_path):
    path, old = old_figure(tmp_path, script)
    limits = {resource.RLIMIT_FSIZE: 10_000}  # bytes a file: as if the disk were full
    status, out, err = run(script, tmp_path, *SMALL[script], limits=limits)
    assert status == 1
    assert_one_line(err, "cannot write", ".png")
    assert "macro avg" in out
    assert path.read_bytes() == old and assert_whole(tmp_path / "images") >= 1


@each_script
def test_a_loss_that_is_not_finite(script, tmp_path):
    status, out, err = run(script, tmp_path, *SMALL[script], "--lr", "1e300")
    assert status == 1
    assert_one_line(err, "loss became", "step", "lower learning rate")
    assert "macro avg" not in out and assert_whole(tmp_path / "images") == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@each_script
def test_out_of_memory_names_the_setting(script, tmp_path):
    flags = {
        "part1_mlp_mnist": ["--hidden", "65536", "65536"],
        "part2_rnn_fashion": ["--hidden-size", "16384", "--no-orthogonal"],
        "part3_attention": ["--seq-len", "128", "--batch-size", "1000000"],
    }[script]
    limits = {resource.RLIMIT_AS: 2**30}
    status, _, err = run(script, tmp_path, *flags, limits=limits)
    assert status == 1
    assert_one_line(err, "out of memory", "--batch-size")


@each_script
def test_output_into_a_closed_pipe(script, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    running = Forked(script, tmp_path, *SMALL[script], out=pipe)
    with open(pipe) as reader:  # as `| head -1` does
        reader.readline()
    status, _, err = running.end()
    assert status == 1
    assert_one_line(err, "Broken pipe")
    assert_whole(tmp_path / "images")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@each_script
def test_output_onto_a_full_disk(script, tmp_path):
    status, _, err = run(script, tmp_path, *SMALL[script], out=Path("/dev/full"))
    assert status == 1
    assert_one_line(err, "No space left")


@each_script
def test_two_runs_at_once_into_the_same_folders(script, tmp_path):
    both = [Forked(script, tmp_path, *SMALL[script]) for _ in range(2)]
    for running in both:
        status, _, err = running.end()
        assert status == 0, err
    assert assert_whole(tmp_path / "images") >= 5


# ------------------------------------------ platforms ----------------------------------------- #


def run_python(words, cwd, **environment):
    """Run a Python of its own, not a fork, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        **{"cwd": cwd, "env": ENVIRONMENT | environment, "capture_output": True, "timeout": 60},
    )


@each_script
def test_plain_terminals_and_locales(script, tmp_path):
    plain = {"LC_ALL": "C", "TERM": "dumb", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    plain |= {"DISPLAY": "", "MPLBACKEND": ""}
    path = ROOT / f"{script}.py"
    flags = [*SMALL[script], "--images-dir", "图片"]
    done = run_python([path, *flags], tmp_path, **plain, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    done = run_python([path, "--help"], tmp_path, **plain, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and b"--seed" in done.stdout, done.stderr
    done = run_python([path, "--lr", "-1"], tmp_path, **plain, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and b"lr is -1.0" in done.stderr
    assert b"Traceback" not in done.stderr


@each_script
def test_no_warning_of_our_own_from_another_folder_and_a_read_only_checkout(script, tmp_path):
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    checkout.mkdir()
    elsewhere.mkdir()
    shutil.copy(ROOT / f"{script}.py", checkout)
    checkout.chmod(0o555)
    words = ["-W", "error"]
    for module in ("matplotlib._fontconfig_pattern", "matplotlib._mathtext", "pyparsing.util"):
        words += ["-W", f"ignore::DeprecationWarning:{module}"]  # older matplotlib, newer pyparsing
    words += [Path("..") / "checkout" / f"{script}.py", *SMALL[script]]
    done = run_python(words, elsewhere)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in checkout.iterdir()] == [f"{script}.py"]
    assert assert_whole(elsewhere / "images") >= 5
