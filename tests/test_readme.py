"""The pages: pictures and links that exist, commands that parse, two languages that agree."""

import ast
import importlib
import re
import shlex
from collections import Counter

import pytest
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
