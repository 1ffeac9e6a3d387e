"""Start a script's command line in a process of its own, without paying for the imports each time.

A server process imports the libraries once; every run is a fork of it that executes the script as
`__main__`. Starting Python anew takes 3 to 4 s a run, a fork a tenth of a second.
"""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEAD_PROXY = "http://127.0.0.1:9"  # nothing listens there: every download fails at once


@cache
def server():
    """The server process: it starts with the first run. Unix only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torchvision", "sklearn.datasets", "sklearn.metrics", "matplotlib.style", "tyro"]
    )
    return context


def child(script, flags, cwd, out, err, buffered, limits, changes):
    """What the forked process does: become `python script.py flags` in the folder `cwd`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("http_proxy", "https_proxy"):
        os.environ[name] = DEAD_PROXY
    os.environ["no_proxy"] = "127.0.0.1"
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=not buffered)
    os.chdir(cwd)
    import resource

    for kind, value in limits.items():
        if kind == resource.RLIMIT_AS:  # on top of what the libraries have mapped already
            value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(kind, (value, value))
    import torch

    torch.set_num_threads(1)  # so small a net is faster with one
    sys.argv = [f"{script}.py", *flags]
    if not changes:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")  # script may be a path
    part = importlib.import_module(script)
    for name, value in changes.items():
        setattr(part, name, value)
    sys.exit(part.command_line())


class Forked:
    """A running script: its output so far, its end. Output to a place of one's own is buffered."""

    def __init__(self, script, cwd, *flags, out=None, limits=None, changes=None):
        self.err = cwd.parent / f"{cwd.name}-{time.monotonic_ns()}.err"
        self.out = out or self.err.with_suffix(".out")
        places = (script, flags, cwd, self.out, self.err)
        arguments = (*places, out is not None, limits or {}, changes or {})
        self.process = server().Process(target=child, args=arguments)
        self.process.start()

    def wait_for(self, word, seconds=60):
        """Return once the output holds `word`."""
        self.wait_until(lambda: self.out.exists() and word in self.out.read_text(), seconds)

    def wait_until(self, true, seconds=60):
        """Return once `true()` is."""
        end = time.monotonic() + seconds
        while not true():
            assert self.process.is_alive() and time.monotonic() < end, self.err.read_text()
            time.sleep(0.005)

    def send(self, sign):
        os.kill(self.process.pid, sign)

    def end(self, seconds=120):
        """Exit status, stdout, stderr."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.err.read_text()}")
        out = ""
        with contextlib.suppress(OSError):  # a closed pipe or a full disk holds nothing to read
            out = self.out.read_text() if self.out.is_file() else ""
        return self.process.exitcode, out, self.err.read_text()
