"""The pages: pictures and links that exist, commands that parse, two languages that agree."""

import ast
import importlib
import re
import shlex
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import tyro
from forked import ROOT

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("README*.md"))}
each_page = pytest.mark.parametrize("page", PAGES)


def pictures(text):
    return re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)


def code_blocks(text):
    return re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)


def code(text):
    """The lines of code in the code blocks, without their comments: those are translated."""
    lines = [
        line.split("  #")[0].strip() for block in code_blocks(text) for line in block.splitlines()
    ]
    return [line for line in lines if re.match(r"[\w, ]+ = |(optimizer|loss)\.\w+\(|return ", line)]


def executed(text):
    """The blocks of the backward passes, by part: they are run below."""
    found = re.findall(r"```python\n# [^\n]*(\d)\n(.*?)```", text, re.DOTALL)
    return {int(part): block for part, block in found}


def commands(text):
    """The flags of every command that starts one of the scripts, with the script's name."""
    found = re.findall(r"python (part\w+)\.py([^\n`&]*)", text)
    return [(script, shlex.split(flags, comments=True)) for script, flags in found]


def numbers(text):
    """Every number with a decimal point or a thousands separator: what was measured or counted."""
    return Counter(re.findall(r"\d+(?:,\d{3})*\.\d+|\d+(?:,\d{3})+", text))


def anchor(heading):
    """The address that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_there_are_two_pages():
    assert list(PAGES) == ["README.md", "README.zh-CN.md"]


@each_page
def test_every_picture_is_shown_and_exists(page):
    shown = pictures(PAGES[page])  # images/offline may be there too, from a run without a network
    assert set(shown) == {f"images/{path.name}" for path in (ROOT / "images").glob("*.png")}


@each_page
def test_links_within_the_project_lead_somewhere(page):
    text = PAGES[page]
    headings = {anchor(h) for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    targets = re.findall(r"(?<!!)\[[^\]]+\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("http"):
            assert (ROOT / target).is_file()


@each_page
def test_every_command_parses(page):
    found = commands(PAGES[page])
    assert {script for script, _ in found} == {path.stem for path in ROOT.glob("part*.py")}
    for script, flags in found:
        tyro.cli(importlib.import_module(script).Config, args=flags)  # SystemExit if it does not


@each_page
def test_code_on_the_page_stands_in_the_scripts(page):
    scripts = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("part*.py"))
    lines = code(PAGES[page])
    assert len(lines) >= 15
    assert [line for line in lines if line not in scripts] == []


def test_chinese_has_no_space_before_percent_and_no_line_break_within_a_sentence():
    text = PAGES["README.zh-CN.md"]
    assert re.findall(r"\d %", text) == []
    assert re.findall(r"[\u4e00-\u9fff]\n[\u4e00-\u9fff]", text) == []


@each_page
def test_the_lengths_that_it_tells_are_true(page):
    for path in ROOT.glob("part*.py"):
        text = path.read_text(encoding="utf-8")
        ends = {getattr(n, "name", ""): n.end_lineno for n in ast.parse(text).body}
        for length in (ends["main"], len(text.splitlines())):
            assert re.search(rf"\b{length}\b", PAGES[page]), (path.name, length)


def test_both_pages_show_the_same_pictures_commands_and_numbers():
    english, chinese = PAGES.values()
    assert pictures(english) == pictures(chinese)
    assert code(english) == code(chinese)
    assert len(code_blocks(english)) == len(code_blocks(chinese))
    assert commands(english) == commands(chinese)
    assert numbers(english) == numbers(chinese)


# ------------------------------ the backward passes of the page ------------------------------ #


def close(mine, reference):
    return all((a - b).abs().max() < 1e-9 for a, b in zip(mine, reference, strict=True))


def tensors(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@each_page
def test_two_layers_by_hand_equal_autograd(page):
    torch.manual_seed(0)
    B, y = 9, torch.randint(5, (9,))
    x, W1, b1, W2, b2 = tensors((9, 7), (6, 7), (6,), (5, 6), (5,))
    loss = F.cross_entropy((x @ W1.T + b1).relu() @ W2.T + b2, y)
    names = {"F": F, "x": x, "y": y, "B": B, "W1": W1, "b1": b1, "W2": W2, "b2": b2}
    with torch.no_grad():
        exec(executed(PAGES[page])[1], names)
    mine = [names[f"d{name}"] for name in ("W1", "b1", "W2", "b2")]
    assert close(mine, torch.autograd.grad(loss, (W1, b1, W2, b2)))


@each_page
def test_backpropagation_through_time_by_hand_equals_autograd(page):
    torch.manual_seed(0)
    T, H = 6, 5
    x, W_ih, W_hh, b, dh_out = tensors((T, 3, 4), (H, 4), (H, H), (H,), (T, 3, H))
    states = [torch.zeros(3, H, dtype=torch.float64)]
    for t in range(T):
        states.append(torch.tanh(x[t] @ W_ih.T + b + states[-1] @ W_hh.T))
    h = torch.stack(states)
    names = {"torch": torch, "x": x, "h": h, "W_ih": W_ih, "W_hh": W_hh, "b": b, "T": T}
    names["dh_out"] = dh_out
    with torch.no_grad():
        exec(executed(PAGES[page])[2], names)
    loss = (h[1:] * dh_out.detach()).sum()
    mine = [names[f"d{name}"] for name in ("W_hh", "W_ih", "b")]
    assert close(mine, torch.autograd.grad(loss, (W_hh, W_ih, b)))


@each_page
def test_the_gradient_of_softmax_by_hand_equals_autograd(page):
    torch.manual_seed(0)
    s, dw = tensors((8, 6), (8, 6))
    w = s.softmax(-1)
    names = {"w": w.detach(), "dw": dw.detach()}
    exec(executed(PAGES[page])[3], names)
    assert close([names["ds"]], torch.autograd.grad(w, s, dw.detach()))
