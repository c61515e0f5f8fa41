"""The same top-level name is the same code in every lesson: who has read one knows it in all."""

import ast
import difflib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = {  # different in every lesson by design
    "main", "parse_args", "build", "train", "train_autoencoder", "sample", "generate", "save_samples",
    "HPARAMS", "CHOICES", "SIZES", "URLS", "VERBS"}


def definitions(path):
    """(name, lines) of every top-level function, class and constant, with decorators and comments
    directly above."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.parse(source).body:
        first = node.lineno - 1
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
            first = min([first] + [d.lineno - 1 for d in node.decorator_list])
        elif isinstance(node, ast.Assign):
            names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else:
            continue
        while first and lines[first - 1].startswith("#"):
            first -= 1
        yield from ((name, lines[first:node.end_lineno]) for name in names)


def test_same_name_same_source():
    """No copy has drifted; the printed diff says what to mend."""
    seen, copies, found = {}, 0, []
    for path in sorted(ROOT.glob("*.py")):
        for name, lines in definitions(path):
            if name not in OWN:
                where, first = seen.setdefault(name, (path.name, lines))
                copies += where != path.name
                found += difflib.unified_diff(first, lines, where, path.name, lineterm="")
    assert copies > 50 and not found, "\n".join(found)
