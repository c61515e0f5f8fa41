"""The house rules: what the files may import, how they are laid out, and that the README tells the
truth about them."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BOTH = README + (ROOT / "RESULTS.md").read_text(encoding="utf-8")
HEADINGS = ["Slides", "Equations", "Notation", "Run", "Expect", "Left out", "Try", "Papers"]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@each_file
def test_imports(path):
    """Standard library, torch, numpy, tqdm; no file imports another. fid.py may use Pillow for other
    formats than PNG, inside a function, if it is there."""
    for node in ast.walk(tree(path)):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            top = name.split(".")[0]
            if not (path.name == "fid.py" and top == "PIL" and node.col_offset):
                assert top in sys.stdlib_module_names or top in ("torch", "numpy", "tqdm"), name


@each_file
def test_header(path):
    """A docstring of 25 to 45 lines with the headings, in order, at the beginning of lines."""
    doc = ast.get_docstring(tree(path))
    assert 25 <= len(doc.splitlines()) <= 45
    places = [re.search(rf"^{h}\b", doc, re.M) for h in HEADINGS]
    assert all(places) and [p.start() for p in places] == sorted(p.start() for p in places)


@each_file
def test_order(path):
    """parse_args comes before the maths, plumbing behind it, main last."""
    names = [n.name for n in tree(path).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert names[0] == "parse_args" and names[-1] == "main"
    assert names.index("train") < names.index("die")


@each_file
def test_lines(path):
    """At most 100 columns, no tabs, no trailing blanks."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 100 and "\t" not in line and line == line.rstrip(), f"line {number}"


@each_file
def test_docstrings(path):
    """Every class and every function of the lesson, that is before the plumbing, says what it
    does."""
    body = tree(path).body
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "die":
            break
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines = node.end_lineno - node.lineno
            assert ast.get_docstring(node) or lines < 4, node.name


@each_file
def test_help(path, capsys):
    """--help names every flag, each with a text; without arguments the file prints the same."""
    module = importlib.import_module(path.stem)
    for argv in (["--help"], []):
        with pytest.raises(SystemExit) as stop:
            module.main(argv)
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "--train" in text and "--device" in text
    flags = re.findall(r"^  (--[a-z-]+)", text, re.M)
    assert len(flags) > 20
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add":
            assert any(k.arg == "help" for k in node.keywords), node.args[0].value


def commands():
    """Every `python <file>.py ...` in the code blocks of README and RESULTS, without comments, and
    every <file>.py with flags within their text."""
    for block in re.findall(r"```(?:sh|bash)?\n(.*?)```", BOTH, re.S):
        for line in block.splitlines():
            if match := re.search(r"(?:python|torchrun\s.*?) (\w+\.py)(.*)", line.split("#")[0]):
                yield match.group(1), match.group(2)
    yield from re.findall(r"`(?:python )?(\w+\.py)( [^`]*)`", BOTH)


def test_commands_parse(monkeypatch):
    """Each command of README and RESULTS names an existing file and flags that it knows."""
    monkeypatch.chdir(ROOT)
    found = list(commands())
    assert len(found) > 60
    for file, rest in found:
        assert (ROOT / file).exists(), file
        if (ROOT / file) in FILES:
            importlib.import_module(file[:-3]).parse_args(shlex.split(rest))


def test_links_and_pictures_exist():
    """What README and RESULTS link to inside the repository is there, and every picture is used."""
    targets = {a or b for a, b in re.findall(r"\]\((?!http|#)([^)]+)\)|src=\"([^\"]+)\"", BOTH)}
    for target in targets:
        path, _, section = target.partition("#")
        assert (ROOT / path).exists(), target
        if section:  # as GitHub names them
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.M)
            names = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert section in names, target
    assert {f"assets/{p.name}" for p in (ROOT / "assets").iterdir()} <= targets


def test_slide_map():
    """Every section that the README's slide map names, as `file.py` 8, is a banner of that file;
    every file is named; the README can be read in one go."""
    table = README[README.index("## Slide by slide") : README.index("## Where the slides")]
    for line in table.splitlines():
        for file, numbers in re.findall(r"`(\w+\.py)` (\d+(?:(?:, | and | to )\d+)*)", line):
            for number in re.findall(r"\d+", numbers):
                source = (ROOT / file).read_text(encoding="utf-8")
                assert f"\n# ---- {number}. " in source, (file, number)
    assert all(f"`{path.stem}" in table for path in FILES)
    assert len(README.splitlines()) <= 200


def test_readme_counts_lines():
    """The README's table gives each file's length, to within 5 lines."""
    for path in FILES:
        row = re.search(rf"`{path.name}`\D+?([\d,]+) lines", README)
        assert (
            row
            and abs(int(row.group(1).replace(",", "")) - len(path.read_text().splitlines())) <= 5
        ), path.name


def test_checkpoints_are_small():
    """pretrained/ holds at most one checkpoint per file, at most 4 MB, with half-precision
    weights."""
    for path in (ROOT / "pretrained").iterdir():
        assert path.suffix == ".pt" and ROOT / f"{path.stem}.py" in FILES
        assert path.stat().st_size <= 4_000_000
        ckpt = torch.load(path, weights_only=True)
        weights = ckpt.get("ema", ckpt.get("model"))
        assert weights and all(v.dtype == torch.float16 for v in weights.values())


def test_one_file_alone(tmp_path):
    """Each file, copied alone to an empty folder without data and network, says in one
    line what to get and where to put it. (All seven at a time: they wait for torch.)"""
    runs = {}
    for path in FILES:
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        runs[path.name] = subprocess.Popen(
            [sys.executable, path.name, "--train", *["--data", "moving-mnist"] * (
                path.stem == "video_diffusion")], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.PIPE, env={**os.environ, "https_proxy": "http://127.0.0.1:9"})
    for name, process in runs.items():
        message = process.communicate(timeout=300)[1]
        assert process.returncode == 2 and message.count("\n") == 1, (name, message)
        for part in ("train-images-idx3-ubyte.gz", "https://", "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                     str(tmp_path / "data/mnist")):
            assert part in message, name
