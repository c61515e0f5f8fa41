"""A file's main as a command would run it, but without a new process, which takes seconds to import
torch."""

import contextlib
import io

import pytest


def call(module, *argv, cwd, code=0):
    """module.main(argv) in the folder cwd: what it printed, or what it complained of if it is to end
    with another code than 0."""
    out, err, ended = io.StringIO(), io.StringIO(), 0
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.chdir(cwd)
        try:
            module.main([*map(str, argv)])
        except SystemExit as e:
            ended = e.code or 0
    assert ended == code, err.getvalue()
    return out.getvalue() if code == 0 else err.getvalue()
