"""What goes wrong, on purpose: kill -9 while checkpoints are written, a full disk, two trainings in
one folder, files with flipped, lost and added bytes, a checkpoint that wants to run a command.

    python tests/bench_faults.py                     all of it, 9 minutes on 2 cores
    python tests/bench_faults.py --kills 2 --inputs 50
"""

import argparse
import atexit
import contextlib
import io
import math
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dalle_mini  # noqa: E402
import latent_diffusion  # noqa: E402
import video_diffusion  # noqa: E402

FILES = [dalle_mini, latent_diffusion, video_diffusion]
LONG = "--steps 100000 --every 1 --batch-size 4 --device cpu --data "
FLAGS = {  # a small network each, which writes a checkpoint every step
    "dalle_mini": LONG + "own.npz --width 8 --code-dim 4 --codebook-size 6 --blocks 1 --model-width 32 "
    "--model-layers 1 --heads 2 --side-width 32",
    "latent_diffusion": LONG + "own.npz --width 16 --codebook-size 6 --channels 32 32 --heads 2 "
    "--text-width 32 --text-layers 1 --side-width 32",
    "video_diffusion": LONG + "own.npz --stage video --frames 2 --patch 2 --width 8 --mults 1",
}


def make_data(folder):
    """own.npz: 40 pictures of 16 x 16 with labels and captions, and the same as clips."""
    x = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    words = np.array(["a red seven", "a blue two"])
    np.savez(folder / "own.npz", images=x, labels=np.arange(40) % 2, captions=words[np.arange(40) % 2],
             clips=x.reshape(20, 2, 16, 16))


def start(file, folder, *more, **options):
    """The training of one file, with standard error in a pipe; it does not outlive this program."""
    command = [sys.executable, ROOT / f"{file}.py", "--train", *FLAGS[file].split(), *more]
    process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, **options)
    atexit.register(process.kill)
    return process


def wait_for_the_next(path, process, seconds=300):
    """Until path is written, or written anew."""
    def written():
        return path.stat().st_mtime_ns if path.exists() else 0

    before, end = written(), time.time() + seconds
    while written() == before:
        assert process.poll() is None and time.time() < end, process.stderr.read()
        time.sleep(0.02)


def refusal(process, code=2):
    """Its exit code and its one line; a traceback is a fault. (A bar of tqdm is no line.)"""
    try:
        text = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    lines = [line for line in text.splitlines() if f"{code and process.args[1].split('/')[-1]}:" in line]
    assert process.returncode == code and "Traceback" not in text and len(lines) == 1, text
    return lines[0]


def kill_nine(file, folder, times, rng):
    """kill -9 at random moments, again and again: each time the checkpoint is whole and is resumed.
    Returns the steps reached."""
    out, steps = folder / file, [0]
    module = sys.modules[file]
    for i in range(times):
        process = start(file, folder, "--out", out, *["--resume"] * (i > 0))
        wait_for_the_next(out / "model.pt", process)
        wait_for_the_next(out / "model.pt", process)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        steps.append(module.read_checkpoint(out / "model.pt")["step"])
        assert steps[-1] > steps[-2], steps
    return steps[1:]


def full_disk(file, folder, limit=None):
    """No room for the next checkpoint: one line, exit code 2, the last one whole, nothing left lying
    about. The folder is on a disk that fills, or files may not be longer than limit bytes."""
    out = folder / file
    if not (out / "model.pt").exists():
        process = start(file, folder, "--out", out)
        wait_for_the_next(out / "model.pt", process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    for part in out.glob("*.part"):
        part.unlink()  # what kill -9 may leave
    whole = (out / "model.pt").read_bytes()
    if limit:
        options = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    else:
        options = {}
        with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as filler:
            while filler.write(b"0" * 4096):
                pass
    line = refusal(start(file, folder, "--out", out, "--resume", **options))
    assert (out / "model.pt").read_bytes() == whole and not list(out.glob("*.part"))
    return line


def two_runs(file, folder, again=True):
    """The second training in a folder is refused, as long as the first is alive, even if it is
    asleep; once it is dead, no longer (again)."""
    out = folder / file
    first = start(file, folder, "--out", out)
    try:
        wait_for_the_next(out / "model.pt", first)
        first.send_signal(signal.SIGSTOP)  # two on 2 cores would get in each other's way
        line = refusal(start(file, folder, "--out", out))
        assert "another training" in line and first.poll() is None
    finally:
        first.kill()
        first.wait()
    if not again:
        return line
    third = start(file, folder, "--out", out, "--resume")
    wait_for_the_next(out / "model.pt", third)
    third.kill()
    third.wait()
    return line


# ---- Altered files -------------------------------------------------------------------------------


def mutate(data, rng):
    """bytes with one to three faults: bytes changed, blocks lost, repeated, zeroed, the end cut."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, n = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 16, 100])
        kind = rng.randrange(6)
        if kind < 2:
            data[at:at + n] = rng.randbytes(n)
        elif kind == 2:
            del data[at:at + n]
        elif kind == 3:
            data[at:at] = data[at:at + n]
        elif kind == 4:
            data[at:at + n] = bytes(n) if rng.random() < 0.5 else b"\xff" * n
        else:
            del data[at:]
    return bytes(data)


def mutate_zip(data, rng):
    """A fault in a member of a .npz, whose checksum fits again."""
    buffer, old = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
    hit = rng.choice(old.namelist())
    with zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            head = old.read(name)
            if name == hit:  # where shapes and types stand, half of the time
                cut = 128 if rng.random() < 0.5 else len(head)
                head = mutate(head[:cut], rng) + head[cut:]
            new.writestr(name, head)
    return buffer.getvalue()


def mutate_png(data, rng):
    """A fault in a chunk of a .png, whose checksum fits again."""
    out, at, chunks = data[:8], 8, []
    while at < len(data):
        n, tag = struct.unpack(">I4s", data[at:at + 8])
        chunks.append((tag, data[at + 8:at + 8 + n]))
        at += 12 + n
    hit = rng.randrange(len(chunks))
    for i, (tag, body) in enumerate(chunks):
        if i == hit:
            if tag == b"IDAT" and rng.random() < 0.7:
                body = zlib.compress(mutate(zlib.decompress(body), rng))
            else:
                body = mutate(body, rng)
        out += struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
    return out


def bytes_of(save, *args, **kwargs):
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


def loaders(folder):
    """name: (file name, its bytes, ways to damage it, what reads it)."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    labels, texts = np.arange(12) % 3, np.array(["a red seven"] * 12)
    images = bytes_of(np.savez, images=x, labels=labels, captions=texts)
    pose = np.tile(np.eye(3, 4, dtype=np.float32), (8, 1, 1))
    pose[:, 2, 3] = 3
    path = bytes_of(np.savez, K=np.eye(3, dtype=np.float32), pose=pose)
    enclosed = ROOT / "pretrained/dalle_mini.pt"
    ckpt = enclosed.read_bytes()
    network = dalle_mini.DallE(dalle_mini.parse_args(
        ["--sample", "--device", "cpu"], dalle_mini.read_checkpoint(enclosed)["config"]))

    def checkpoint(p):
        dalle_mini.load_state(network, dalle_mini.read_checkpoint(p), "model")

    labels_gz = (ROOT / "data/mnist/t10k-labels-idx1-ubyte.gz").read_bytes()
    (folder / "mnist").mkdir(exist_ok=True)
    dalle_mini.save_png(folder / "x.png", x[:1])
    png = (folder / "x.png").read_bytes()
    zipped, png_ways = [mutate, mutate_zip, mutate_zip], [mutate, mutate_png, mutate_png]
    return {
        "idx": ("mnist/t10k-labels-idx1-ubyte.gz", labels_gz, [mutate], lambda p: dalle_mini.data_file(
            SimpleNamespace(data="mnist", data_dir=folder), p.name)),
        "npz of images": ("x.npz", images, zipped, lambda p: dalle_mini.own_data(str(p))),
        "npy of images": ("x.npy", bytes_of(np.save, x), [mutate], lambda p: dalle_mini.own_data(str(p))),
        "npz of pairs": ("x.npz", images, zipped, lambda p: dalle_mini.load_pairs(
            SimpleNamespace(data=str(p), device="cpu"), "train")),
        "npz of clips": ("x.npz", bytes_of(np.savez, clips=x.reshape(2, 6, 16, 16, 3)), zipped,
                         lambda p: video_diffusion.OwnClips(
                             SimpleNamespace(data=str(p), frames=4, device="cpu"), "train")),
        "npz of cameras": ("x.npz", path, zipped, video_diffusion.read_path),
        "png for a prompt": ("x.png", png, png_ways, lambda p: latent_diffusion.image_file(
            SimpleNamespace(shape=[3, 16, 16], device="cpu"), "--init", p)),
        "checkpoint": ("x.pt", ckpt, [mutate], checkpoint),
    }


def fuzz(name, loader, folder, inputs, rng):
    """inputs damaged files; each is read, or refused in one line. Returns how many were refused, the
    longest time in seconds and what the largest resident memory grew by, in MB."""
    file, data, ways, read = loader
    path, refused, longest = folder / file, 0, 0.0
    path.write_bytes(data)
    warnings.simplefilter("ignore")  # numpy's, of odd headers
    with contextlib.redirect_stdout(io.StringIO()):
        read(path)  # whole, it is read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(inputs):
        path.write_bytes(rng.choice(ways)(data, rng))
        begin, error = time.time(), io.StringIO()
        signal.alarm(20)  # a hang ends the program
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
                read(path)
        except SystemExit as stop:
            refused += 1
            lines = error.getvalue().strip().splitlines()
            assert stop.code == 2 and len(lines) == 1, (name, i, error.getvalue())
        except Exception:
            path.rename(folder / f"{name.replace(' ', '_')}_{i}{path.suffix}")
            raise
        finally:
            signal.alarm(0)
        longest = max(longest, time.time() - begin)
    path.unlink()
    return refused, longest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


class Command:
    """What a pickle can do: run a command when it is read."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def malicious(module, folder):
    """A checkpoint that wants to run a command is refused, in both formats of torch.save, and as a
    plain pickle."""
    lines = []
    for save in (torch.save, lambda o, p: torch.save(o, p, _use_new_zipfile_serialization=False),
                 lambda o, p: p.write_bytes(pickle.dumps(o))):
        save(dict(file=module.__name__, config={}, step=1, ema=Command()), folder / "bad.pt")
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.chdir(folder):
            try:
                module.read_checkpoint(folder / "bad.pt")
            except SystemExit as stop:
                assert stop.code == 2
            else:
                raise AssertionError("it was read")
        assert not (folder / "ran").exists()
        lines.append(error.getvalue().strip())
    return lines


def main():
    import tempfile

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--inputs", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    rng = random.Random(args.seed)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, loader in loaders(folder).items():
            refused, longest, grown = fuzz(kind, loader, folder, args.inputs, rng)
            print(f"{kind:18} {args.inputs} damaged: {refused} refused, {args.inputs - refused} read, "
                  f"at most {longest:.2f} s, {grown:.0f} MB more", flush=True)
        for module in FILES:
            print(f"{module.__name__:18} malicious: {malicious(module, folder)[0]}", flush=True)
        make_data(folder)
        for module in FILES:
            file = module.__name__
            print(f"{file:18} killed at steps {kill_nine(file, folder, args.kills, rng)}", flush=True)
            print(f"{'':18} {two_runs(file, folder)}", flush=True)
        disk = folder / "disk"
        disk.mkdir()
        for module in FILES:
            if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
                print("full disk: needs the right to mount a tmpfs")
                break
            try:
                make_data(disk)
                print(f"{module.__name__:18} {full_disk(module.__name__, disk)}", flush=True)
            finally:
                subprocess.run(["umount", disk], check=True)


if __name__ == "__main__":
    main()
