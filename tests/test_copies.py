"""The same top-level name is the same code in every lesson: who has read one knows it in all."""

import ast
import difflib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LESSONS = [p for p in sorted(ROOT.glob("*.py")) if "\nHPARAMS = {" in p.read_text(encoding="utf-8")]
OWN = {  # different in every lesson by design
    "main", "parse_args", "build", "train", "sample", "generate", "save_samples", "HPARAMS", "CHOICES",
    "SIZES", "URLS", "VERBS"}


def definitions(source):
    """(name, lines) of every top-level function, class and constant, with decorators and comments
    directly above."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
            first = min([node.lineno] + [d.lineno for d in node.decorator_list]) - 1
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            first = node.lineno - 1
        else:
            continue
        while first and lines[first - 1].startswith("#"):
            first -= 1
        for name in names:
            yield name, lines[first:node.end_lineno]


def differences(sources):
    """Diffs, as lines, between definitions of the same name in {file name: source}."""
    seen, found = {}, []
    for file, source in sources.items():
        for name, lines in definitions(source):
            if name not in OWN:
                where, reference = seen.setdefault(name, (file, lines))
                found += difflib.unified_diff(
                    reference, lines, f"{where}: {name}", f"{file}: {name}", lineterm="")
    return found


def test_same_name_same_source():
    """No copy has drifted; the printed diff says what to mend."""
    assert LESSONS
    found = differences({path.name: path.read_text(encoding="utf-8") for path in LESSONS})
    assert not found, "\n" + "\n".join(found)


def test_a_drifted_copy_is_found():
    """A changed line, constant, decorator or comment shows; a name of OWN, or one that occurs once,
    does not."""
    a = "# why\nX = 1\n\n\ndef f(x):\n    return x\n\n\ndef train():\n    pass\n"
    assert not differences(
        {"a.py": a, "b.py": a.replace("pass", "return 1") + "\n\ndef g():\n    pass\n"})
    for old, new in (("X = 1", "X = 2"), ("return x", "return -x"), ("# why", "# why not"),
                     ("def f", "@cache\ndef f")):
        assert differences({"a.py": a, "b.py": a.replace(old, new)}), f"{old!r} -> {new!r}"
