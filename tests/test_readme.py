"""The pages: what they show exists, commands parse, code runs, and two languages agree."""

import ast
import importlib
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md")}
each_page = pytest.mark.parametrize("page", PAGES)


def pictures(text):
    return re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)


def code_blocks(text):
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)  # the fenced ones are executed below
    return re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)


def code(text):
    """The lines of code in the code blocks, without their comments: those are translated."""
    lines = [line.split("  #")[0].strip() for line in "".join(code_blocks(text)).splitlines()]
    start = r"[\w, ]+ = |(optimizer|ema|loss|nn\.utils)\.\w+\(|return "
    return [line for line in lines if re.match(start, line)]


def commands(text):
    """The flags of every command that starts one of the scripts, with the script's name."""
    found = re.findall(r"python (part\w+)\.py([^\n`&]*)", text)
    return [(script, shlex.split(flags, comments=True)) for script, flags in found]


def numbers(text):
    """Every number with a decimal point or a thousands separator: what was measured or counted."""
    return Counter(re.findall(r"\d+(?:,\d{3})*\.\d+|\d+(?:,\d{3})+", text))


@each_page
def test_every_picture_is_shown_and_exists_and_links_lead_somewhere(page):
    text = PAGES[page]
    assert set(pictures(text)) == {f"images/{p.name}" for p in (ROOT / "images").glob("*.png")}
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    targets = re.findall(r"(?<!!)\[[^\]]+\]\(([^)]+)\)", text)
    assert targets and "@@" not in text
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("http"):
            assert (ROOT / target).is_file()


@each_page
def test_commands_parse_and_code_stands_in_the_scripts_whose_lengths_are_true(
    page, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name in ("mlp.pt", "3.jpg", "5.jpg", "7.jpg"):  # files that a command names must be there
        Path(name).touch()
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("part*.py")}
    found = commands(PAGES[page])
    assert {script for script, _ in found} == set(scripts)
    for script, flags in found:
        tyro.cli(importlib.import_module(script).Config, args=flags)  # SystemExit if it does not
    lines = code(PAGES[page])
    assert len(lines) >= 15
    assert [line for line in lines if line not in "".join(scripts.values())] == []
    for text in scripts.values():
        ends = {getattr(n, "name", ""): n.end_lineno for n in ast.parse(text).body}
        assert re.search(rf"\b{ends['main']}\b.{{,9}}\b{len(text.splitlines())}\b", PAGES[page])


def test_both_pages_show_the_same_pictures_commands_and_numbers():
    english, chinese = PAGES.values()
    assert len(english.splitlines()) <= 900
    assert len(code_blocks(english)) == len(code_blocks(chinese))
    for part in (pictures, code, commands, numbers):
        assert part(english) == part(chinese)
    assert re.findall(r"\d %|[\u4e00-\u9fff]\n[\u4e00-\u9fff]", chinese) == []


def executed(page, part, names):
    """What the page's block for a part computes from `names`."""
    blocks = re.findall(r"```python\n# [^\n]*(\d)\n(.*?)```", PAGES[page], re.DOTALL)
    with torch.no_grad():
        exec(dict(blocks)[str(part)], names)
    return names


def equal(mine, loss, tensors):
    reference = torch.autograd.grad(loss, tensors)
    return all((a - b).abs().max() < 1e-9 for a, b in zip(mine, reference, strict=True))


def tensors(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@each_page
def test_two_layers_by_hand_equal_autograd(page):
    x, W1, b1, W2, b2 = tensors((9, 7), (6, 7), (6,), (5, 6), (5,))
    y = torch.randint(5, (9,))
    given = {"F": F, "x": x, "y": y, "B": 9, "W1": W1, "b1": b1, "W2": W2, "b2": b2}
    found = executed(page, 1, given)
    loss = F.cross_entropy((x @ W1.T + b1).relu() @ W2.T + b2, y)
    assert equal([found[f"d{n}"] for n in ("W1", "b1", "W2", "b2")], loss, (W1, b1, W2, b2))


@each_page
def test_backpropagation_through_time_by_hand_equals_autograd(page):
    x, W_ih, W_hh, b, dh_out = tensors((6, 3, 4), (5, 4), (5, 5), (5,), (6, 3, 5))
    states = [torch.zeros(3, 5, dtype=torch.float64)]
    for t in range(6):
        states.append(torch.tanh(x[t] @ W_ih.T + b + states[-1] @ W_hh.T))
    h = torch.stack(states)
    found = executed(page, 2, {"T": 6, "x": x, "h": h, "W_hh": W_hh, "dh_out": dh_out})
    mine, loss = [found[f"d{n}"] for n in ("W_hh", "W_ih", "b")], (h[1:] * dh_out.detach()).sum()
    assert equal(mine, loss, (W_hh, W_ih, b))


@each_page
def test_the_gradient_of_softmax_by_hand_equals_autograd(page):
    s, dw = tensors((8, 6), (8, 6))
    w = s.softmax(-1)
    found = executed(page, 3, {"w": w, "dw": dw})
    assert equal([found["ds"]], (w * dw.detach()).sum(), (s,))
