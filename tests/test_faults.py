"""What people and machines get wrong: one clear line, the right exit status, nothing lost.

Every test runs a script's real command line in a process of its own, offline, on a tiny budget.
Where a fault needs a network, a server on the loopback address is the mirror, with a toy dataset
whose checksums take the place of the real one's. What several scripts share, word for word, is
broken in one of them.
"""

import gzip
import hashlib
import http.server
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import PARTS, WITH_DATA
from forked import DEAD_PROXY, ROOT, Forked
from PIL import Image

resource = pytest.importorskip("resource", reason="forks and limits are Unix's")

RUNS = {  # flags for a run of a second or two
    "part1_mlp_mnist": "--hidden 8 --batch-size 64 --epochs 2",
    "part2_rnn_fashion": "--hidden-size 8 --encoder-size 8 --batch-size 64 --epochs 2",
    "part3_attention": "--d-model 16 --n-head 2 --n-kv-head 1 --kv-latent --steps 30",
}
SMALL = {name: flags.split() for name, flags in RUNS.items()}
LONG = {name: [*flags[:-1], "15000"] for name, flags in SMALL.items()}  # to be stopped
ENVIRONMENT = os.environ | {"http_proxy": DEAD_PROXY, "https_proxy": DEAD_PROXY, "no_proxy": ""}
each_script = pytest.mark.parametrize("script", PARTS)
SHARED = "part1_mlp_mnist"  # stands for all where the code is the same, word for word


def run(script, cwd, *flags, **options):
    """Run a script to its end: exit status, stdout, stderr."""
    return Forked(script, cwd, *flags, **options).end()


def assert_one_line(err, *words):
    """The last line of stderr says what is wrong, and there is no traceback."""
    # Python reports a signal that meets a weakref's callback so, and ignores it.
    assert "Traceback" not in err or "Exception ignored in" in err, err
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
    path = folder / f"{script[:5]}_training_curves.png"
    Image.new("RGB", (10, 10), "red").save(path)
    return path, path.read_bytes()


# ------------------------------------- flags and settings ------------------------------------- #


@each_script
def test_a_bad_flag_is_refused_with_status_2(script, tmp_path):
    status, out, err = run(script, tmp_path, "--lr", "-1")
    assert status == 2 and out == "" and "Traceback" not in err
    assert "lr is -1.0: it must be from 1e-12 to 1e+30" in " ".join(
        err.replace("\u2502", " ").split()
    )
    assert list(tmp_path.iterdir()) == []  # nothing was downloaded or drawn


@each_script
def test_an_edited_default_that_cannot_work_is_one_line(script, tmp_path):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert text.count("seed: int = 0") == 1
    (tmp_path / f"{script}.py").write_text(text.replace("seed: int = 0", "seed: int = 0.5"))
    status, _, err = run(tmp_path / script, tmp_path)
    assert status == 1
    assert_one_line(err, "seed is 0.5", "int")
    assert [path.name for path in tmp_path.iterdir()] == [f"{script}.py"]


@pytest.mark.parametrize("folder", ["a file", "a file/below", "/proc/nowhere"])
def test_images_folder_that_cannot_be_written_is_told_before_training(folder, tmp_path):
    (tmp_path / "a file").write_text("mine")
    status, out, err = run(SHARED, tmp_path, "--images-dir", folder)
    assert status == 1 and out == ""
    assert_one_line(err, "cannot write", folder)
    assert (tmp_path / "a file").read_text() == "mine"


def test_a_mistake_in_the_code_shows_its_traceback(tmp_path):
    text, line = (ROOT / f"{SHARED}.py").read_text(encoding="utf-8"), "    device = pick_device"
    (tmp_path / "edited.py").write_text(text.replace(line, f"    undefined = unknown\n{line}"))
    status, _, err = run(tmp_path / "edited", tmp_path)
    assert status == 1 and "Traceback" in err and "NameError: name 'unknown'" in err


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
MD5 = {name: hashlib.md5(content).hexdigest() for name, content in TOY.items()}


class Mirrors(http.server.BaseHTTPRequestHandler):
    """Mirrors with a fault each: the first part of the path says which."""

    protocol_version = "HTTP/1.0"
    asked: ClassVar[list[str]] = []  # the paths of all requests

    def do_GET(self):
        fault, name = self.path.strip("/").split("/")
        self.asked.append(self.path)
        body, status, length = PACKED[name], 200, len(PACKED[name])
        if fault.isdigit():
            body, status, length = b"", int(fault), 0
        elif fault == "html":
            body = b"<html>Please log in.</html>"
            length = len(body)
        elif fault == "half":
            body = body[: len(body) // 2]
        elif fault == "wrong":
            body = bytes(len(body))
        elif fault == "hangs":
            time.sleep(4)
        elif fault == "moved":
            status = 302
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://[broken")
        if fault != "endless":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        try:
            self.wfile.write(body[:1] if fault == "drips" else body)
            for _ in range(40 if fault == "drips" else 2000 if fault == "endless" else 0):
                time.sleep(0.1 if fault == "drips" else 0)
                self.wfile.write(b"x" if fault == "drips" else bytes(2**17))
        except OSError:  # the script has hung up
            pass

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirrors) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run_with_toy(script, cwd, mirrors, *flags, **options):
    """Run a script with the toy's checksums, and mirrors of our own that may hang for a second."""
    changes = {"MD5": MD5, "MIRRORS": mirrors, "TIMEOUT": 0.6}
    return run(script, cwd, *SMALL[script], *flags, changes=changes, **options)


def raw_folder(script, cwd):
    return cwd / "data" / ("MNIST" if "mnist" in script else "FashionMNIST") / "raw"


def lay_out(script, cwd, files=TOY):
    folder = raw_folder(script, cwd)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


WHOLE = "4,458 training, 742 validation, 100 test images"


def test_every_fault_of_a_mirror_and_then_the_next_one_works(address, tmp_path):
    """One that fails is not asked for another file; the good one is asked for each just once."""
    faults = ["403", "404", "503", "html", "half", "wrong", "hangs", "drips", "endless", "moved"]
    mirrors = [f"{address}/{fault}/" for fault in [*faults, "good"]]
    broken = ["nonsense://mirror/", "http://127.0.0.1:1/", "http://[broken/"]
    Mirrors.asked.clear()
    status, out, err = run_with_toy(SHARED, tmp_path, [*broken, *mirrors])
    assert status == 0, err
    assert WHOLE in out
    for mirror in [*broken, *mirrors[:-1]]:
        assert f"downloading {mirror}" in err and f"{mirror} failed" in err
    assert [sum(f"/{f}/" in path for path in Mirrors.asked) for f in faults] == [1] * len(faults)
    assert sum("/good/" in path for path in Mirrors.asked) == 4
    folder = raw_folder(SHARED, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == TOY  # and nothing else
    assert assert_whole(tmp_path / "images") >= 5


def test_a_dead_network_is_told_within_a_minute(tmp_path):
    """All mirrors of both scripts together; nothing listens, or nobody answers for TIMEOUT."""
    for name in WITH_DATA:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        timeout = int(text.split("\nTIMEOUT = ")[1].split()[0])
        mirrors = text.split("MIRRORS = [")[1].split("]")[0].count("https://") + 2
        assert timeout * mirrors <= 55
    status, out, err = run_with_toy(SHARED, tmp_path, ["http://127.0.0.1:1/"])
    assert status == 0 and "sklearn-digits, test set" in out, err
    assert "WARNING" in err and "Connection refused" in err  # the cause is named
    assert not (tmp_path / "data").exists()
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["offline"]


def test_only_what_is_missing_is_fetched(address, tmp_path):
    lay_out(SHARED, tmp_path, {k: v for k, v in TOY.items() if "labels" in k})
    Mirrors.asked.clear()
    status, out, err = run_with_toy(SHARED, tmp_path, [f"{address}/good/"])
    assert status == 0 and WHOLE in out, err
    assert sorted(path.split("/")[2][:12] for path in Mirrors.asked) == [
        "t10k-images-",
        "train-images",
    ]


def test_packed_files_fetched_by_hand_need_no_mirror(tmp_path):
    folder = lay_out(SHARED, tmp_path, PACKED)
    status, out, err = run_with_toy(SHARED, tmp_path, [])
    assert status == 0 and WHOLE in out, err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == PACKED


BAD_FILES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "swapped": lambda path: path.write_bytes(toy_files(seed=1)[path.name]),
    "half a .gz": lambda path: (path.unlink(), path.with_name(f"{path.name}.gz").write_bytes(
        PACKED[f"{path.name}.gz"][:99])),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_file_is_never_trained_on(fault, address, tmp_path):
    """Without a network it is named and kept; with one, only it is fetched again."""
    path = lay_out(SHARED, tmp_path) / "train-labels-idx1-ubyte"
    BAD_FILES[fault](path)
    before = sorted((p.name, p.lstat().st_size) for p in path.parent.iterdir())
    status, out, err = run_with_toy(SHARED, tmp_path, [])
    assert status == 1 and out == ""
    assert_one_line(err, str(path.relative_to(tmp_path)), "damaged")
    assert before == sorted((p.name, p.lstat().st_size) for p in path.parent.iterdir())
    if fault in ("swapped", "a folder"):
        status, out, err = run_with_toy(SHARED, tmp_path, [f"{address}/good/"])
        if fault == "swapped":
            assert status == 0 and WHOLE in out, err
            assert path.read_bytes() == TOY[path.name]
        else:
            assert status == 1
            assert_one_line(err, "cannot write", path.name)


def test_a_folder_of_an_older_torchvision_is_read_from_its_checked_files(tmp_path):
    """Beside raw/ it has processed/, whose labels nobody checked: here they are shifted."""
    folder = lay_out(SHARED, tmp_path).parent / "processed"
    folder.mkdir()
    images = torch.zeros(5200, 28, 28, dtype=torch.uint8)
    for name in ("training.pt", "test.pt"):
        torch.save((images, torch.zeros(5200, dtype=torch.int64)), folder / name)
    status, out, err = run_with_toy(SHARED, tmp_path, [], "--epochs", "4")
    assert status == 0 and WHOLE in out, err
    assert float(out.split("accuracy")[-1].split()[0]) > 0.9  # learned from raw/


def test_a_disk_that_is_full_while_downloading_is_told(address, tmp_path):
    limits = {resource.RLIMIT_FSIZE: 10_000}  # bytes a file: as if the disk were full
    status, out, err = run_with_toy(SHARED, tmp_path, [f"{address}/good/"], limits=limits)
    assert status == 1 and out == ""
    assert_one_line(err, "cannot write", "train-images-idx3-ubyte", "File too large")
    assert list(raw_folder(SHARED, tmp_path).iterdir()) == []


def test_a_data_folder_that_cannot_be_written(address, tmp_path):
    """It will do if the files are there, packed or not; if one is missing, that one is named."""
    status, _, err = run_with_toy(SHARED, tmp_path, [f"{address}/good/"], "--data-dir", "/proc/no")
    assert status == 1
    assert_one_line(err, "cannot write /proc/no", "train-images-idx3-ubyte")
    folder = lay_out(SHARED, tmp_path, PACKED)
    for path in (folder, folder.parent, folder.parent.parent):
        path.chmod(0o555)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "data").rglob("*"))
    status, out, err = run_with_toy(SHARED, tmp_path, [f"{address}/good/"])
    assert status == 0 and WHOLE in out, err
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "data").rglob("*"))


def test_four_first_runs_at_once(address, tmp_path):
    changes = {"MD5": MD5, "MIRRORS": [f"{address}/good/"], "TIMEOUT": 5}
    runs = [Forked(SHARED, tmp_path, *SMALL[SHARED], changes=changes) for _ in range(4)]
    for running in runs:
        status, out, err = running.end()
        assert status == 0 and WHOLE in out, err
    files = {path.name: path.read_bytes() for path in raw_folder(SHARED, tmp_path).iterdir()}
    assert files == TOY
    assert assert_whole(tmp_path / "images") >= 5


def test_files_of_mnist_in_fashion_mnists_folder_are_found_out(data_dir, tmp_path):
    (tmp_path / "data" / "FashionMNIST").mkdir(parents=True)
    (tmp_path / "data" / "FashionMNIST" / "raw").symlink_to(data_dir / "MNIST" / "raw")
    status, out, err = run("part2_rnn_fashion", tmp_path, changes={"MIRRORS": []})
    assert status == 1 and out == ""
    assert_one_line(err, "train-images-idx3-ubyte", "damaged")


# ------------------------------------------- running ------------------------------------------ #


def stop(script, cwd, word, sign=signal.SIGINT, flags=LONG):
    """Start a run, send `sign` as soon as it has printed `word`; its end."""
    running = Forked(script, cwd, *flags[script])
    running.wait_for(word)
    running.send(sign)
    running.process.join(3)
    while running.process.is_alive() and "is scored" not in running.err.read_text():
        running.send(sign)  # Python ignores a signal that meets a weakref's callback
        running.process.join(3)
    return running.end()


def second_row(script):
    """What a run has printed when there is something to score."""
    return "\n 1000 " if script == "part3_attention" else "\n    2 "


@each_script
def test_ctrl_c_before_there_is_anything_to_score(script, tmp_path):
    path, old = old_figure(tmp_path, script)
    slow = {"part1_mlp_mnist": ["--hidden", "3072", "3072"], "part3_attention": []}
    slow = slow.get(
        script, ["--hidden-size", "256"]
    )  # with batches of 2: many seconds for an epoch
    slow += ["--batch-size", "2"] if script in WITH_DATA else []
    running = Forked(script, tmp_path, *LONG[script], *slow)
    running.wait_for("train loss")
    while running.process.is_alive():  # Python ignores one that meets a weakref's callback
        running.send(signal.SIGINT)
        running.process.join(3)
    status, out, err = running.end()
    assert status == 130 and err.strip().endswith("stopped"), err
    assert "macro avg" not in out
    assert path.read_bytes() == old and assert_whole(tmp_path / "images") == 1


@pytest.mark.parametrize(
    ("script", "sign"), [*((script, signal.SIGINT) for script in PARTS), (SHARED, signal.SIGTERM)]
)
def test_ctrl_c_and_sigterm_score_and_draw_the_best_so_far(script, sign, tmp_path):
    status, out, err = stop(script, tmp_path, second_row(script), sign)
    assert status == 130, err
    assert "is scored" in err
    assert_one_line(err, "stopped")
    assert "macro avg" in out and "interrupted after" in out
    assert assert_whole(tmp_path / "images") >= 5


def test_ctrl_c_early_in_a_later_variant_keeps_the_earlier_ones(tmp_path):
    flags = {"part3_attention": [*SMALL["part3_attention"][:-1], "600"]}
    status, out, err = stop("part3_attention", tmp_path, "\nMHA-1: ", flags=flags)
    assert status == 130, err
    assert "MQA, test sequences" in out and "MHA-1, test sequences" not in out
    assert assert_whole(tmp_path / "images") >= 5


def test_ctrl_c_in_the_study_leaves_the_figures_of_the_run(tmp_path):
    script, flags = "part3_attention", ["--steps", "60", "--n-kv-head", "2", "1", "--study"]
    running = Forked(script, tmp_path, *SMALL[script], *flags)
    running.wait_for("logits within")
    time.sleep(0.3)
    running.send(signal.SIGINT)
    status, _, err = running.end()
    assert status == 130, err
    assert_one_line(err, "stopped")
    names = [path.name for path in (tmp_path / "images").rglob("*.png")]
    assert len(names) >= 5 and not any("study" in name for name in names)
    assert_whole(tmp_path / "images")


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    running = Forked(SHARED, tmp_path, *LONG[SHARED])
    running.wait_for(second_row(SHARED))
    running.send(signal.SIGINT)
    running.wait_until(lambda: "is scored" in running.err.read_text())
    running.send(signal.SIGINT)
    status, out, err = running.end(seconds=10)
    assert status == 130 and "macro avg" not in out, err
    assert_one_line(err, "stopped")
    assert_whole(tmp_path / "images")


def test_a_terminal_that_is_closed_scores_and_draws_the_best_so_far(tmp_path):
    """SIGHUP, with an output that can be written to no more."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        flags = [*LONG[SHARED], "--data-dir", "data"]
        os.execve(sys.executable, [sys.executable, ROOT / f"{SHARED}.py", *flags], ENVIRONMENT)
    seen = b""
    while b"\n    2 " not in seen:
        seen += os.read(terminal, 10_000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (1, 120, 130)  # there is nobody to tell
    assert assert_whole(tmp_path / "images") >= 5


def test_full_disk_leaves_the_old_figure_and_says_so(tmp_path):
    script = SHARED
    path, old = old_figure(tmp_path, script)
    limits = {resource.RLIMIT_FSIZE: 10_000}  # bytes a file: as if the disk were full
    status, _, err = run(script, tmp_path, *SMALL[script], limits=limits)
    assert status == 1
    assert_one_line(err, "cannot write", ".png")
    assert path.read_bytes() == old and assert_whole(tmp_path / "images") == 1


@each_script
def test_a_loss_that_is_not_finite(script, tmp_path):
    status, out, err = run(script, tmp_path, *SMALL[script], "--lr", "1e30")
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


def test_output_into_a_closed_pipe(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    running = Forked(SHARED, tmp_path, *SMALL[SHARED], out=pipe)
    with open(pipe) as reader:  # as `| head -1` does
        reader.readline()
    status, _, err = running.end()
    assert status == 1
    assert_one_line(err, "Broken pipe")
    assert_whole(tmp_path / "images")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_onto_a_full_disk(tmp_path):
    status, _, err = run(SHARED, tmp_path, *SMALL[SHARED], out=Path("/dev/full"))
    assert status == 1
    assert_one_line(err, "No space left")


# ------------------------------------------ platforms ----------------------------------------- #


def test_a_plain_terminal_a_read_only_checkout_and_no_warning_of_our_own(tmp_path):
    """A C locale, ASCII output, no display; Python's -W error; another folder than the script's."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    checkout.mkdir()
    elsewhere.mkdir()
    shutil.copy(ROOT / f"{SHARED}.py", checkout)
    checkout.chmod(0o555)
    plain = {"LC_ALL": "C", "TERM": "dumb", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    plain |= {"DISPLAY": "", "MPLBACKEND": "", "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-W", "error"]
    for module in ("matplotlib._fontconfig_pattern", "matplotlib._mathtext", "pyparsing.util"):
        words += ["-W", f"ignore::DeprecationWarning:{module}"]  # older matplotlib, newer pyparsing
    words += [f"../checkout/{SHARED}.py", *SMALL[SHARED], "--images-dir", "\u56fe\u7247"]
    done = subprocess.run(
        words, cwd=elsewhere, env=ENVIRONMENT | plain, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in checkout.iterdir()] == [f"{SHARED}.py"]
    assert assert_whole(elsewhere / "\u56fe\u7247") >= 5
