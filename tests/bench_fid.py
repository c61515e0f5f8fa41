"""Speed and memory of fid.py, beside pytorch-fid (and the scipy it calls) where they are installed.

    python tests/bench_fid.py

Every figure is the median of three, taken in turns in one run, so that the ratios hold on a busy
machine too. Without the published weights the Inception network has random ones: same work.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fid
from test_fid import random_inception

torch.set_num_threads(2)


def in_turns(jobs, rounds=3):
    """{name: median seconds} of functions that are called one after the other, `rounds` times."""
    seconds = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def table(title, seconds, unit, amount=1):
    print(f"\n{title}")
    first = next(iter(seconds.values()))
    for name, s in seconds.items():
        value = amount / s if amount > 1 else s
        print(f"  {name:44}{value:9.2f} {unit:8}{s / first:6.2f} x the time")


def distance():
    """mu and S of 2048 features from 5,000 points with a falling spectrum, as real ones have."""
    rng = np.random.default_rng(0)
    spectrum = 1 / np.arange(1, 2049) ** 0.5
    stats = []
    for _ in range(2):
        X = rng.normal(size=(5000, 2048)) * spectrum @ np.linalg.qr(rng.normal(size=(2048, 2048)))[0]
        stats += [X.mean(0), np.cov(X, rowvar=False)]
    jobs, found = {}, {}

    def job(name, f):
        jobs[name] = lambda: found.__setitem__(name, f(*stats))

    job("fid.py", fid.frechet_distance)
    try:
        from pytorch_fid.fid_score import calculate_frechet_distance
        job("pytorch-fid (scipy sqrtm)", calculate_frechet_distance)
    except ImportError:
        print("pytorch-fid is not installed: no row of it")
    seconds = in_turns(jobs)
    table("Distance, 2048 features", seconds, "s")
    print("  values: " + ", ".join(f"{name} {v:.9f}" for name, v in found.items()))


def features():
    """Images per second through Inception at batch 50, 32 x 32 images."""
    x = torch.randint(256, (50, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    ours = fid.Inception()
    ours.load_state_dict(random_inception())
    ours = fid.fold(ours).to(memory_format=torch.channels_last)

    def run(net, bf16):
        def job():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                net(x)
        return job

    jobs = {"fid.py, float32": run(ours, False)}
    try:
        import pytorch_fid.inception as theirs
        theirs.load_state_dict_from_url = lambda *a, **k: random_inception()
        net = theirs.InceptionV3([3]).eval()
        jobs["pytorch-fid, float32"] = lambda: run(lambda x: net(x / 255), False)()
    except ImportError:
        pass
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16") or has.get("avx512_bf16"):
        jobs["fid.py, bf16 (--fast)"] = run(ours, True)
    run(ours, False)()
    table("Inception features, batch 50", in_turns(jobs), "img/s", 50)


def bf16_error():
    """How far --fast moves the number: our classifier, training digits against 2,000 samples that
    are good, and bad."""
    args = fid.parse_args(["--device", "cpu"])
    ckpt = fid.read_checkpoint(fid.HERE / "pretrained/fid.pt")
    digits = torch.cat([x for x, _ in fid.read_set("mnist:train[:10000]", args)])
    good = torch.cat([x for x, _ in fid.read_set("mnist:test[:2000]", args)])
    sets = {"test digits": good, "noise 16": fid.noise(good, 16, torch.Generator().manual_seed(0))}
    found = {}
    for fast in (False, True):
        args.fast = fast
        fid.use_device(args)
        f, title, _ = fid.extractor(args, ckpt)
        real, fakes = fid.gaussian(f(digits)[0]), {k: fid.gaussian(f(x)[0]) for k, x in sets.items()}
        for name, fake in fakes.items():
            found.setdefault(name, []).append(fid.frechet_distance(*real, *fake))
    print(f"\n{title}: float32, bf16 (--fast)")
    for name, (a, b) in found.items():
        print(f"  {name:44}{a:9.4f} {b:9.4f} {100 * (b / a - 1):+7.2f} %")


def memory():
    """Peak memory of a comparison of N images with themselves, N features kept at most 1,000."""
    print("\nPeak memory, pixel features of 16 x 16 x 3")
    for n in (5000, 50_000, 200_000):
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/x.npy"
            np.save(path, np.random.default_rng(0).integers(256, size=(n, 16, 16, 3), dtype=np.uint8))
            code = (f"import sys; sys.path.insert(0, {str(fid.HERE)!r}); import fid, resource\n"
                    f"fid.main([{path!r}, {path!r}, '--features', 'pixels', '--keep', '1000'])\n"
                    "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                 check=True).stdout
        print(f"  {n:8,} images {out.split('PEAK')[1].strip():>8} MB")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    distance()
    features()
    bf16_error()
    memory()
