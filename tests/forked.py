"""Start a script's command line in a process of its own, without paying for the imports each time.

A server process imports the libraries once; every run is a fork of it that executes the script as
`__main__`. Starting Python anew takes 3 to 4 s a run, a fork a tenth of a second. Nothing here can
hang: every wait has a limit after which the run is killed, and a run ends itself in any case.
"""

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
        ["torch", "sklearn.datasets", "sklearn.metrics", "matplotlib.figure", "tyro", "typeguard"]
    )
    return context


def child(script, flags, cwd, out, err, changes):
    """What the forked process does: become `python script.py flags` in the folder `cwd`."""
    signal.alarm(150)  # the system ends it, whatever it does then
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"http_proxy": DEAD_PROXY, "https_proxy": DEAD_PROXY, "no_proxy": "127.0.0.1"}
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.chdir(cwd)
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
    """A running script: its output so far, its end."""

    def __init__(self, script, cwd, *flags, changes=None):
        self.out = cwd.parent / f"{cwd.name}-{time.monotonic_ns()}.out"
        self.err = self.out.with_suffix(".err")
        arguments = (script, flags, cwd, self.out, self.err, changes or {})
        self.process = server().Process(target=child, args=arguments, daemon=True)
        self.process.start()

    def wait_for(self, word, seconds=60):
        """Return once the output holds `word`."""
        end = time.monotonic() + seconds
        while not (self.out.exists() and word in self.out.read_text()):
            if not self.process.is_alive() or time.monotonic() > end:
                raise AssertionError(f"{word!r} never came: {self.end(0)}")
            time.sleep(0.005)

    def end(self, seconds=120):
        """Exit status (-9 if it had to be killed), stdout, stderr."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join(10)
        out, err = (path.read_text() if path.exists() else "" for path in (self.out, self.err))
        return self.process.exitcode, out, err
