"""Why FID falls when you draw more samples, and by how much.

Slide      FID: "fit Gaussians to each set", from however many images there are
Question   How large is the bias of d_F at N images? There is a closed form for Gaussian features,
           to first order in 1/N. Does it hold in a simulation, and for real digits?
Run        python experiments/fid_bias.py                        22 s
Writes     out/fid_bias/bias.png

With s_i the singular values of S_r^(1/2) S_g^(1/2), and n_r, n_g images, the bias is
    tr S_r / n_r + tr S_g / n_g + (1/(n_r - 1) + 1/(n_g - 1)) sum_{i <= j} s_i s_j / (s_i + s_j)
"""
import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fid

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def frechet_bias(S1, S2, n1, n2, between=None):
    """The bias of frechet_distance with S1 (D, D) from n1 images and S2 from n2, a float. between
    (D, D): the covariance of the second set's class means, if the number of images of each class
    was fixed and not drawn, which takes them out of the errors."""
    # An error in mu adds tr S/n. One in S2 is one in M = A^T S2 A = U diag(s^2) U^T, A A^T = S1.
    # tr M^(1/2) is concave: to second order errors make it lose sum_ij dM_ij^2/(4 s_i s_j (s_i +
    # s_j)), and d_F gains twice that. E dM_ij^2 = s_i^2 s_j^2 (1 + [i = j] - b_ii b_jj - b_ij^2) /
    # (n2 - 1): Wishart's, but for b = U^T A^T between A U / (s_i s_j), which is fixed. Likewise S1.
    A = fid.root(S1)
    U, s, _ = torch.linalg.svd(A.T @ fid.root(S2), full_matrices=False)
    U, s = U[:, s > 0], s[s > 0]
    pair = s[:, None] * s / (s[:, None] + s)
    bias = S1.trace() / n1 + S2.trace() / n2
    bias += (pair.sum() + pair.trace()) / 2 * (1 / (n1 - 1) + 1 / (n2 - 1))
    if between is not None:
        b = (A @ U).T @ between @ (A @ U) / torch.outer(s, s)
        fixed = torch.outer(b.diag(), b.diag()) + b.square()
        bias -= between.trace() / n2 + (pair * fixed).sum() / 2 / (n2 - 1)
    return float(bias)


def simulate(D, n, runs):
    """Mean d_F of `runs` pairs of n points each of one Gaussian with a falling spectrum, whose true
    distance is 0; and the closed form."""
    scale = 1 / torch.arange(1.0, D + 1, dtype=torch.float64).sqrt()
    found = [fid.frechet_distance(*fid.gaussian(torch.randn(n, D) * scale),
                                  *fid.gaussian(torch.randn(n, D) * scale)) for _ in range(runs)]
    S = torch.diag(scale**2)
    return np.mean(found), frechet_bias(S, S, n, n)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--runs", type=int, default=50, help="pairs of samples per simulation")
    p.add_argument("--num", type=int, default=10_000, help="test digits")
    p.add_argument("--out", type=Path, default=Path("out/fid_bias"))
    a = p.parse_args(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    print("| simulation: D, N | d_F, truth 0 | closed form |\n| --- | --- | --- |")
    for D, n in ((16, 200), (16, 1000), (128, 500), (128, 2000)):
        print("| {}, {} | {:.4f} | {:.4f} |".format(D, n, *simulate(D, n, a.runs)))

    args = fid.parse_args([])
    f, title = fid.choose_features(args)
    real = fid.summarise(f, *fid.load_data("mnist", "train", ROOT / "data"), args, "train")
    test = fid.load_data("mnist", "test", ROOT / "data")[0]
    X = fid.summarise(f, test[torch.randperm(len(test))][:a.num], None, args, "test")["X"]
    print(f"\n| N test digits | {title} | its bias | less its bias | at infinite N |")
    print("| --- | --- | --- | --- | --- |")
    rows = []
    for n in (len(X) // k for k in (1, 2, 3, 5, 10, 20)):
        sets = X[:n * (len(X) // n)].split(n)[:10]  # up to 10 sets of n
        stats = [fid.gaussian(s) for s in sets]
        distance = np.mean([fid.frechet_distance(real["mu"], real["S"], *s) for s in stats])
        bias = np.mean([frechet_bias(real["S"], s[1], real["n"], n) for s in stats])
        far = np.mean([fid.distance_at_infinity(real["mu"], real["S"], s) for s in sets])
        rows.append((1000 / n, distance, distance - bias, far))
        print(f"| {n:,} | {distance:.4f} | {bias:.4f} | {distance - bias:.4f} | {far:.4f} |")
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    x, *curves = zip(*rows)
    for y, label in zip(curves, (title, "less its bias", "at infinite N")):
        ax.plot(x, y, "o-", label=label)
    ax.set(xlabel="1000 / N", xlim=(0, None), title="real test digits against real training digits")
    ax.legend()
    figure.savefig(a.out / "bias.png", dpi=100)
    print(f"{a.out / 'bias.png'}: the distance is a straight line in 1 / N")


if __name__ == "__main__":
    main()
