"""Each script stands alone, keeps its length, and says one thing a line."""

import ast
import itertools
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("part*.py"))
BUDGETS = {"part1": (270, 580), "part2": (340, 560), "part3": (430, 660)}  # lesson, whole file
# Names that mean another thing in each script; those whose copies differ in a few lines.
OWN = {"Config", "main", "predict", "train", "train_epoch", "headline", "run_seeds", "command_line"}
LIKE = {"train", "train_epoch", "main", "predict", "run_seeds", "command_line"}
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def definitions(path):
    text = path.read_text(encoding="utf-8")
    nodes = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)))
def test_shared_helpers_are_the_same_text(one, other):
    first = definitions(one)
    second = definitions(other)
    shared = first.keys() & second.keys() - OWN
    assert {"UserError", "score", "confusion_figure", "learning_rate", "pick_device"} <= shared
    assert [name for name in shared if first[name] != second[name]] == []


def test_parts_1_and_2_train_with_the_same_lines():
    """But for the few lines that warp or mirror, clip, average the weights, save and load."""
    first, second = (definitions(path) for path in SCRIPTS[:2])
    for name in LIKE:
        lines = [set(d[name].splitlines()) for d in (first, second)]
        assert len(lines[0] ^ lines[1]) <= 20, lines[0] ^ lines[1]


@each_script
def test_the_lesson_and_the_file_keep_their_length(path):
    lesson, whole = BUDGETS[path.stem[:5]]
    text = path.read_text(encoding="utf-8")
    ends = {getattr(n, "name", ""): n.end_lineno for n in ast.parse(text).body}
    assert ends["main"] <= lesson
    assert len(text.splitlines()) <= whole
    assert "The lesson ends here" in text.splitlines()[ends["main"] + 2]


@each_script
def test_a_line_says_one_thing(path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    nodes = list(ast.walk(ast.parse(text)))
    assigned = [node for node in nodes if isinstance(node, ast.Assign)]
    packed = [n for n in assigned if isinstance(n.targets[0], ast.Tuple)]
    packed = [n.lineno for n in packed if isinstance(n.value, ast.Tuple)]
    chained = [n.lineno for n in assigned if len(n.targets) > 1]
    assert 20 * sum(len(line) >= 95 for line in lines) <= len(lines)
    assert len(packed) <= 2 and chained == []
    assert not any(isinstance(node, ast.NamedExpr) for node in nodes)
    assert "fmt: skip" not in text


def test_the_tests_keep_their_length():
    paths = set((ROOT / "tests").glob("*.py")) - {ROOT / "tests/benchmark.py"}
    lines = [path.read_text("utf-8").count("\n") for path in paths if path.stem != "mistakes"]
    assert sum(lines) <= 1480


@each_script
def test_nothing_runs_on_import_and_no_other_script_is_needed(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:
        monkeypatch.setitem(sys.modules, script.stem, None)  # to import it is an error
    runpy.run_path(str(path))
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
