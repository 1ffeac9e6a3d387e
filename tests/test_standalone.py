"""Each script stands alone; what several of them need stands in each, word for word."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("part*.py"))
BUDGETS = {"part1": (270, 590), "part2": (330, 590), "part3": (400, 690)}  # lesson, whole file
# Names that mean another thing in each script; of parts 1 and 2 the training is compared below.
OWN = {"Config", "train", "predict", "main", "draw_figures", "repeat"}
LIKE = {"train_epoch", "use_saved_net"}  # parts 1 and 2: the same but for a few lines


def definitions(path):
    text = path.read_text(encoding="utf-8")
    nodes = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)))
def test_shared_helpers_are_the_same_text(one, other):
    first, second = definitions(one), definitions(other)
    shared = first.keys() & second.keys() - OWN - LIKE
    assert {"UserError", "score", "confusion_figure", "check_fields", "command_line"} <= shared
    assert [name for name in shared if first[name] != second[name]] == []


def test_parts_1_and_2_train_with_the_same_lines():
    """Word for word, but for the lines that mirror or warp, clip, and average the weights."""
    first, second = (definitions(path) for path in SCRIPTS[:2])
    lines = second["train"].replace("ema.module", "model").splitlines()
    second["train"] = "\n".join(line for line in lines if "ema" not in line)
    for name in ("train", "predict", "repeat"):
        assert first[name] == second[name]
    for name in LIKE:
        lines = [set(d[name].splitlines()) for d in (first, second)]
        assert len(lines[0] ^ lines[1]) <= 6, lines[0] ^ lines[1]


@pytest.mark.parametrize("path", SCRIPTS)
def test_the_lesson_and_the_file_keep_their_length(path):
    lesson, whole = BUDGETS[path.stem[:5]]
    text = path.read_text(encoding="utf-8")
    ends = {getattr(n, "name", ""): n.end_lineno for n in ast.parse(text).body}
    assert ends["main"] <= lesson and len(text.splitlines()) <= whole
    assert "The lesson ends here" in text.splitlines()[ends["main"] + 2]


def test_the_tests_keep_their_length():
    paths = set((ROOT / "tests").glob("*.py")) - {ROOT / "tests/benchmark.py"}
    lines = [path.read_text("utf-8").count("\n") for path in paths if path.stem != "mistakes"]
    assert sum(lines) <= 1500


def test_nothing_runs_on_import(tmp_path):
    names = ", ".join(path.stem for path in SCRIPTS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
