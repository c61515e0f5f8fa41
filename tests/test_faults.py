"""Faults on purpose, the short form of bench_faults.py: damaged files, a full disk, two trainings in
one folder, kill -9, a checkpoint that wants to run a command."""

import random
import shutil
import signal
import warnings

import bench_faults
import dalle_mini
import pytest
from inprocess import call


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return folder, bench_faults.loaders(folder)


KINDS = ["idx", "npz of images", "npy of images", "npz of pairs", "npz of clips", "npz of cameras",
         "png for a prompt", "checkpoint"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused_in_a_line(loaders, kind):
    """60 damaged files of each kind, half of them with checksums that fit again: no traceback, no
    hang, no memory beyond the file's."""
    folder, found = loaders
    with warnings.catch_warnings():
        refused, longest, grown = bench_faults.fuzz(kind, found[kind], folder, 60, random.Random(0))
    assert refused > 10 and longest < 5 and grown < 100


def test_all_kinds_are_tested(loaders):
    assert list(loaders[1]) == KINDS


@pytest.mark.parametrize("module", bench_faults.FILES, ids=lambda m: m.__name__)
def test_malicious_checkpoints_are_refused(module, tmp_path):
    """Nothing in a checkpoint is run."""
    bench_faults.malicious(module, tmp_path)


def test_kill_full_disk_and_two_runs(tmp_path):
    """Killed while it writes checkpoints; then the next is too long for the disk; then a second
    training in the same folder. Each time the checkpoint is whole."""
    bench_faults.make_data(tmp_path)
    bench_faults.kill_nine("dalle_mini", tmp_path, 1, random.Random(0))
    size = (tmp_path / "dalle_mini/model.pt").stat().st_size
    assert "File too large" in bench_faults.full_disk("dalle_mini", tmp_path, limit=size // 2)
    assert "another training" in bench_faults.two_runs("dalle_mini", tmp_path, again=False)
    assert dalle_mini.read_checkpoint(tmp_path / "dalle_mini/model.pt")["step"] > 0


@pytest.mark.parametrize("module", bench_faults.FILES, ids=lambda m: m.__name__)
def test_ctrl_c_ends_every_training(module, tmp_path, monkeypatch):
    """After Ctrl-C the step at hand is the last: it is in the checkpoint, and how to go on is told."""
    def pressed(real=module.ctrl_c):
        found = real()
        signal.raise_signal(signal.SIGINT)
        return found

    bench_faults.make_data(tmp_path)
    monkeypatch.setattr(module, "ctrl_c", pressed)
    said = call(module, "--train", *bench_faults.FLAGS[module.__name__].split(), "--steps", 3, "--out",
                "out", cwd=tmp_path)
    assert "stopped at 1; to go on" in said
    assert module.read_checkpoint(tmp_path / "out/model.pt")["step"] == 1
    assert not (tmp_path / "out/samples.png").exists()


@pytest.mark.parametrize("module", bench_faults.FILES, ids=lambda m: m.__name__)
def test_an_enclosed_model_cannot_be_trained_further(module, tmp_path):
    """It has the weights alone, without what an optimiser needs: told in one line."""
    (tmp_path / "out").mkdir()
    shutil.copy(bench_faults.ROOT / f"pretrained/{module.__name__}.pt", tmp_path / "out/model.pt")
    said = call(module, "--train", "--resume", "--steps", 10**6, "--out", "out", cwd=tmp_path, code=2)
    assert "was made to sample, and cannot be trained further" in said and len(said.splitlines()) == 1
