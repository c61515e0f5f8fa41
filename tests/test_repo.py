"""The house rules: what the files may import, that commands and links of the documents work, that
checkpoints are small, and that every file runs alone."""

import ast
import importlib
import re
import runpy
import shlex
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}


def imported(path):
    """Top-level packages that a file imports, with the column of the statement."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.col_offset) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0], node.col_offset


def test_imports():
    """Lessons: the standard library, torch, numpy, tqdm; fid.py also Pillow, inside a function.
    Experiments: also matplotlib, one lesson, fid.py, which judges, and other experiments; other
    packages inside a function."""
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "tqdm"}
    for path in FILES:
        for name, column in imported(path):
            assert name in allowed or (path.stem, name) == ("fid", "PIL") and column, (path, name)
    for path in EXPERIMENTS:
        lessons = {name for name, _ in imported(path)} & {p.stem for p in FILES}
        assert len(lessons - {"fid"}) <= 1, path
        more = {*allowed, "matplotlib", *lessons, *(p.stem for p in EXPERIMENTS)}
        assert all(column or name in more for name, column in imported(path)), path


def commands():
    """Every `python <file>.py ...` in the code blocks of the documents, without comments, and every
    <file>.py with flags within their text."""
    for text in TEXT.values():
        for block in re.findall(r"```(?:sh|bash)?\n(.*?)```", text, re.S):
            for line in block.splitlines():
                line = line.split("#")[0]
                if match := re.search(r"(?:python|torchrun\s.*?) (\S+\.py)(.*)", line):
                    yield match.group(1), match.group(2)
        yield from re.findall(r"`(?:python )?([\w/]+\.py)( [^`]*)`", text)


def test_commands_parse(monkeypatch):
    """Each command of the documents names an existing file and flags that it knows."""
    monkeypatch.chdir(ROOT)
    found = list(commands())
    assert len(found) > 60
    for file, rest in found:
        assert (ROOT / file).exists(), file
        if (ROOT / file) in FILES:
            importlib.import_module(file[:-3]).parse_args(shlex.split(rest))


def test_the_training_step_of_the_readme():
    """The Python block of README.md, but for its comment, consists of lines of ddpm.py."""
    source = (ROOT / "ddpm.py").read_text(encoding="utf-8")
    lines = "\n".join(line.strip() for line in source.splitlines())
    block = re.search(r"```python\n(.*?)```", TEXT[ROOT / "README.md"], re.S)[1]
    parts = re.sub(r"^#.*\n", "", block, flags=re.M).split("\n\n\n")
    assert len(parts) == 3
    for part in parts:
        assert "\n".join(line.strip() for line in part.strip().splitlines()) in lines


def test_line_counts_of_the_readme():
    """In the table of files, and their sum."""
    counts = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    found = re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", TEXT[ROOT / "README.md"], re.M)
    assert {name: int(count.replace(",", "")) for name, count in found[:7]} == counts
    assert f"{sum(counts.values()):,} lines" in TEXT[ROOT / "README.md"]


def test_links_and_pictures_exist():
    """What the documents link to inside the repository is there, and every picture is used."""
    used = set()
    for document, text in TEXT.items():
        for a, b in re.findall(r"\]\((?!http|#)([^)]+)\)|src=\"([^\"]+)\"", text):
            path, _, section = (a or b).partition("#")
            path = (document.parent / path).resolve()
            assert path.exists(), (document.name, path)
            used.add(path)
            if section:  # as GitHub names them
                headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
                names = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
                assert section in names, (document.name, section)
    assert set((ROOT / "assets").iterdir()) <= used


def test_checkpoints_are_small():
    """pretrained/ holds at most one checkpoint per file, of at most 4 MB, in half precision; one
    more for video_diffusion.py's other world; and the judge of scenes."""
    names = {path.stem for path in FILES} | {"video_diffusion_orbit", "scene_judge"}
    for path in (ROOT / "pretrained").iterdir():
        assert path.suffix == ".pt" and path.stem in names
        assert path.stat().st_size <= 4_000_000
        ckpt = torch.load(path, weights_only=True)
        weights = ckpt.get("ema", ckpt.get("model"))
        assert weights and all(v.dtype == torch.float16 for v in weights.values())


def test_one_file_alone(tmp_path, monkeypatch, capsys):
    """Each file, copied alone to an empty folder without data and network, says in one line what to
    get and where to put it. (video_diffusion.py renders its data; asked for a file, it names it.)"""
    def offline(url, path):
        raise urllib.error.URLError("offline")

    monkeypatch.setattr(urllib.request, "urlretrieve", offline)
    monkeypatch.chdir(tmp_path)
    digits = ["train-images-idx3-ubyte.gz", "https://", "data/mnist"]
    for path in FILES:
        video = path.stem == "video_diffusion"
        argv = [path.name, "--train", *(["--data", "none.npz"] if video else [])]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(shutil.copy(path, tmp_path), run_name="__main__")
        message = capsys.readouterr().err
        assert end.value.code == 2 and message.count("\n") == 1, message
        assert all(part in message for part in (["none.npz"] if video else digits)), message
