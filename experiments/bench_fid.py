"""Is fid.py's number that of pytorch-fid and torch-fidelity, and how long does it take?

Question   Equal distances from equal statistics; equal features from equal weights and images
           (random ones, so that the published file is not needed); seconds.
Run        in an environment of its own, since the peers need torchvision:
           pip install torch==2.14.1 torchvision==0.29.1 tqdm pytest pillow
           pip install pytorch-fid torch-fidelity 'scipy<1.18'
           python experiments/bench_fid.py                       a peer that is missing is left out
"""
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fid


def random_weights():
    """A state dict with the names of the published file, and weights under which nothing vanishes:
    He's scale, batch norms far from the identity."""
    g, model, values = torch.Generator().manual_seed(0), fid.inception(), []
    for name, v in model.state_dict().items():
        if v.ndim == 4:
            values.append(torch.randn(v.shape, generator=g) * (2 / v[0].numel()) ** 0.5)
        elif name.endswith(("weight", "var")):
            values.append(0.5 + torch.rand(v.shape, generator=g))
        elif v.ndim:
            values.append(0.2 * torch.randn(v.shape, generator=g))
    state = defaultdict(iter(values).__next__)  # the names asked for get the next values
    fid.load_published(model, state)
    return dict(state)


def in_turns(jobs, rounds=3):
    """{name: (median seconds, result)} of functions that are called one after the other."""
    seconds, results = {name: [] for name in jobs}, {}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            results[name] = job()
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(s), results[name]) for name, s in seconds.items()}


def distances():
    """Statistics of 5,000 points in 2,048 dimensions, with a falling spectrum, as real features."""
    rng, stats = np.random.default_rng(0), []
    spectrum = 1 / np.arange(1, 2049) ** 0.5
    for _ in range(2):
        Q = np.linalg.qr(rng.normal(size=(2048, 2048)))[0]
        X = rng.normal(size=(5000, 2048)) * spectrum @ Q
        stats += [X.mean(0), np.cov(X, rowvar=False)]
    jobs = {"fid.py": lambda: fid.frechet_distance(*stats)}
    try:
        from pytorch_fid.fid_score import calculate_frechet_distance
        jobs["pytorch-fid"] = lambda: calculate_frechet_distance(*stats)
    except ImportError as e:
        print(f"pytorch-fid is left out: {e}")
    try:
        from torch_fidelity.metric_fid import fid_statistics_to_metric
        both = [dict(mu=stats[i], sigma=stats[i + 1]) for i in (0, 2)]
        name = "frechet_inception_distance"
        jobs["torch-fidelity"] = lambda: fid_statistics_to_metric(*both, False)[name]
    except ImportError as e:
        print(f"torch-fidelity is left out: {e}")
    return in_turns(jobs)


@torch.no_grad()
def features(size, batch=50):
    """2,048 features of a batch of random images (batch, 3, size, size)."""
    weights = random_weights()
    ours = fid.load_published(fid.inception(), weights)
    ours = ours.to(memory_format=torch.channels_last)
    weights |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}  # for the peers
    x = torch.randint(256, (batch, 3, size, size), generator=torch.Generator().manual_seed(0))
    x = x.to(torch.uint8)
    jobs = {"fid.py": lambda: ours((fid.resize_tf1(x.float(), 299) - 128) / 128)}
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        path = tempfile.mkdtemp() + "/weights.pth"
        torch.save(weights, path)
        peer = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=path)
        jobs["torch-fidelity"] = lambda: peer(x)[0]
    except ImportError as e:
        print(f"torch-fidelity is left out: {e}")
    try:
        import pytorch_fid.inception
        pytorch_fid.inception.load_state_dict_from_url = lambda *a, **k: weights
        net = pytorch_fid.inception.InceptionV3([3], normalize_input=False).eval()
        jobs["pytorch-fid"] = lambda: net((x.float() - 128) / 128)[0].flatten(1)
    except ImportError as e:
        print(f"pytorch-fid is left out: {e}")
    return in_turns(jobs)


def main():
    with torch.no_grad():
        print(f"torch {torch.__version__}\n| 2,048 features | distance | seconds | ratio |")
        print("| --- | --- | --- | --- |")
        found = distances()
        first = found["fid.py"][0]
        for name, (seconds, value) in found.items():
            print(f"| {name} | {value:.9f} | {seconds:.2f} | {seconds / first:.1f} |")
        print("| Inception, images of | network | img/s | largest difference, relative |")
        print("| --- | --- | --- | --- |")
        for size, batch in ((32, 50), (299, 20)):
            found = features(size, batch)
            ours = found["fid.py"][1]
            for name, (seconds, value) in found.items():
                apart = ((value - ours).abs().max() / ours.abs().max()).item()
                print(f"| {size} x {size} | {name} | {batch / seconds:.1f} | {apart:.1e} |")


if __name__ == "__main__":
    main()
