"""Each script stands alone; what several of them need stands in each, word for word."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("part*.py"))
# Names that mean another thing in each script.
OWN = {"Config", "Training", "train", "predict", "report", "main", "study"}
OWN |= {"curves_figure", "mistakes_figure"}


def definitions(path):
    """Source text of every function and class at the top level of a script, by name."""
    text = path.read_text(encoding="utf-8")
    nodes = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)))
def test_shared_helpers_are_the_same_text(one, other):
    first, second = definitions(one), definitions(other)
    shared = first.keys() & second.keys() - OWN
    assert {
        "UserError",
        "best",
        "score",
        "confusion_figure",
        "check_fields",
        "command_line",
    } <= shared
    assert [name for name in shared if first[name] != second[name]] == []


@pytest.mark.parametrize("path", SCRIPTS)
def test_the_lesson_and_the_file_keep_their_length(path):
    lesson, whole = {"part1": (340, 790), "part2": (390, 735), "part3": (430, 875)}[path.stem[:5]]
    text = path.read_text(encoding="utf-8")
    ends = {getattr(n, "name", ""): n.end_lineno for n in ast.parse(text).body}
    assert ends["main"] <= lesson and len(text.splitlines()) <= whole


def imported_modules(node):
    """The modules that an import statement names."""
    return [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]


@pytest.mark.parametrize("path", SCRIPTS)
def test_script_needs_no_other_file_of_the_project(path):
    own = {p.stem for p in ROOT.glob("*.py")} | {"tests"}
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported_modules(node)
    }
    assert not imported & own


def test_nothing_runs_on_import(tmp_path):
    names = ", ".join(path.stem for path in SCRIPTS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
