"""Evaluation that can be trusted: Fréchet distance, FID, KID, precision and recall, human votes.

An implicit model gives samples and no p(x). Its pictures are compared with real ones as two clouds
of points in the space of a network's features, or by people who choose between two pictures.

Slides     Evaluation, Human Evaluation, Fréchet Distance, FID: Fréchet Inception Distance, FID
Equations  d_F = |mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2))      S is the slides' Sigma
           tr (S_r S_g)^(1/2) = sum of s_i,   the singular values of S_r^(1/2) S_g^(1/2)
           bias of d_F from n_r, n_g images with Gaussian features:
               tr S_r/n_r + tr S_g/n_g + (1/(n_r - 1) + 1/(n_g - 1)) sum_{i<=j} s_i s_j/(s_i + s_j)
           KID = E k(x, x') + E k(y, y') - 2 E k(x, y),    k(x, y) = (x.y/D + 1)^3
           share of the votes won = won/(won + lost), with Wilson's interval
Notation   f(I)      f            (B, D)         D features of images I, (B, C, H, W) uint8
           x, y      X, Y         (N, D)         features of N real images and of N samples
           mu, S     mu, S        (D,), (D, D)   their mean and covariance, float64
           s_i       s            (r,)           singular values, r <= D of them are not zero
Run        python fid.py mnist:train out/ddpm/samples.npz --classes      judge samples of digits
           python fid.py cifar10:train mine.npz --features inception     the FID of the papers
           python fid.py --train --data fashion --out out/fashion        features of your own
           python fid.py --sweep                     what moves the number, from real digits
           python fid.py --vote a.npz b.npz          which do you prefer? then --tally
Expect     --train: 1 minute on 2 CPU cores, 99.6 % of the test digits; the enclosed one has 99.7 %
           (--flip: fashion 90 %, CIFAR-10 75 %, 6,000 steps 85 %). A report on 61,000 digits: 10 s.
           Inception: 18 images a second on 2 cores, 54 with --fast. GPU: runs, not timed.
           In out/fid/: model.pt, mistakes.png, loss (.png, .csv), sweep_*.png, votes.jsonl.
Left out   Inception Score (blind to the real data), sFID, DINOv2 and CLIP features, Elo ratings
Try        1. mnist:train "mnist:test[:500]", then 1000, 2000, 10000: same digits, falling FD.
           2. --sweep: which damage does FD see, which does recall see, which does the eye see?
           3. mnist:train fashion:test with --features ours, pixels, inception: what is far?
Papers     Heusel et al. 2017, FID; Dowson & Landau 1982; Binkowski et al. 2018, KID; Chong &
           Forsyth 2020, FID at infinite N; Kynkaanniemi et al. 2019, precision and recall; Parmar
           et al. 2022, resizing; Szegedy et al. 2015, Inception v3; Dai et al. 2023, Emu (the
           votes of the slide); Podell et al. 2023, SDXL
"""
import argparse
import base64
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import re
import secrets
import signal
import struct
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

SIZES = {  # one dial, --size, sets all of these; a flag given by hand wins
    "small": dict(features="ours", width=32, steps=1200, batch_size=128, lr=4e-3, every=500),
    "base": dict(features="ours", width=96, steps=8000, batch_size=512, lr=4e-3, every=1000),
    "paper": dict(features="inception"),
}
CONFIG = ["width", "steps", "batch_size", "lr", "size", "data", "seed", "flip", "shape",
          "num_classes"]  # what a checkpoint keeps of the flags


def parse_args(argv=None, config=None):
    """Every knob. config, from a checkpoint, replaces the defaults; a flag given by hand wins.
    (HERE, NAME, die, positive and pick_device are plumbing, at the end of the file.)"""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.error = die
    add = p.add_argument
    # what to do
    add("sets", nargs="*", metavar="REAL FAKE", help="two sets of images to compare: mnist:test, "
        "mnist:train[:10000] (or fashion, cifar10), a folder of PNG files, a .npy or .npz file of "
        "(N, H, W, C) uint8, or a .npz with mu and sigma; one set for --save-stats")
    add("--train", action="store_true", help="train a classifier, whose features are then ours")
    add("--sweep", action="store_true", help="pictures of FD against the number of images, blur, "
        "noise, intruders and lost variety, from the real images of --data")
    add("--vote", nargs=2, metavar=("A", "B"), help="a page to vote on, pair by pair")
    add("--tally", nargs="+", type=Path, metavar="JSONL", help="count the votes, one file a rater")
    add("--save-stats", type=Path, metavar="NPZ", help="write mu and sigma of the first set")
    add("--export", type=Path, metavar="PT", help="write the trained weights alone, as fp16")
    # the features
    add("--features", choices=["ours", "inception", "pixels"], help="of the classifier in "
        "OUT/model.pt, or else pretrained/fid.pt; of the FID Inception network; pixels / 255")
    add("--tap", type=int, choices=[64, 192, 768, 2048], default=2048,
        help="which features of Inception: 2048 are FID's")
    add("--weights", type=Path, help="pt_inception-2015-12-05-6726825d.pth; by default it is "
        "looked for in the torch hub cache, and downloaded to there")
    add("--fast", action="store_true", help="features in bf16: faster, and slightly other numbers")
    # the report
    add("--classes", action="store_true", help="also the share of FAKE that our classifier reads "
        "as its labels say")
    add("--keep", type=positive, default=10_000, help="feature vectors kept, a random choice, for "
        "all but FD itself, which sees every image")
    add("--k", type=positive, default=3, help="precision and recall: balls reach to the K-th "
        "neighbour")
    # the votes
    add("--num", type=positive, default=50, help="pairs to vote on, at most as many as there are")
    add("--repeats", type=share, default=0.1, help="share of pairs shown again, sides swapped, "
        "at most 0.5")
    add("--votes", type=Path, help="where votes are kept, by default OUT/votes.jsonl; for several "
        "raters one file and one --seed each")
    add("--port", type=int, default=8000, help="of the page on 127.0.0.1; 0: any that is free")
    # where, and on what
    add("--data", default="mnist", help="mnist, fashion, cifar10, or a .npy/.npz file of your own")
    add("--data-dir", type=Path, default=HERE / "data", help="where data sets lie or are put")
    add("--out", type=Path, default=Path("out") / NAME, help="everything written goes there")
    add("--size", choices=["small", "base", "paper"], help="preset for features and training: "
        "small on a CPU, else base; paper is FID as published")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    add("--seed", type=int, default=0, help="start of all random numbers")
    # training the classifier
    add("--compile", action="store_true", help="torch.compile the training: slow start, then fast")
    add("--resume", action="store_true", help="go on from OUT/model.pt")
    add("--every", type=positive, help="checkpoint every so many steps")
    add("--width", type=positive, help="channels of the first layer; features are 4 times as many")
    add("--steps", type=positive, help="training length")
    add("--batch-size", type=positive, help="images per step")
    add("--lr", type=share, help="peak learning rate of AdamW")
    add("--flip", action="store_true", help="mirror half of the images (never digits)")
    p.set_defaults(**(config or {}))
    args = p.parse_args(argv)
    args.size = args.size or ("small" if pick_device(args.device) == "cpu" else "base")
    for key, value in SIZES[args.size].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.votes = args.votes or args.out / "votes.jsonl"
    for wrong, message in (
            (len(args.sets) > 2, f"{len(args.sets)} sets of images: expected REAL and FAKE"),
            (len(args.sets) == 1 and not args.save_stats,
             f"only one set, {args.sets[:1]}: add the one to compare it with, or --save-stats"),
            (args.save_stats and not args.sets, "--save-stats: name a set of images"),
            (args.classes and (len(args.sets) < 2 or args.features != "ours"),
             "--classes: needs REAL, FAKE and --features ours"),
            (args.train and args.features != "ours", f"--features {args.features}: only those of "
             "--features ours are trained; leave out --train"),
            (args.resume and not args.train, "--resume: needs --train"),
            (args.export and not args.train, "--export: needs --train"),
            (args.save_stats and (args.save_stats.exists() or args.save_stats.suffix != ".npz"),
             f"--save-stats {args.save_stats}: expected a new file, with a name ending in .npz"),
            (not 0 <= args.seed < 2**63, f"--seed {args.seed}: expected 0 or more, below 2^63"),
            (not 0 <= args.port < 65536, f"--port {args.port}: expected 0 to 65535")):
        if wrong:
            die(message)
    return args


# ---- 1. Fréchet distance (slides Fréchet Distance, FID: Fréchet Inception Distance) -------------
#
# The slide's leash is a distance of two paths: over all ways of walking them together, the least
# longest gap. Between two distributions it is the same idea: over all ways of pairing their points,
# the least mean squared gap (Fréchet 1957). For two Gaussians it has a closed form, the slide's
# d_F; features are not Gaussian, and d_F then compares only their means and covariances.


def factor(S):
    """A (D, r) with A A^T = S (D, D), symmetric, float64, of rank r; eigenvalues that are rounding
    errors are left out. Errors: ValueError if S has a clearly negative eigenvalue."""
    A, failed = torch.linalg.cholesky_ex(S)
    if not failed and A.diagonal().min() > 1e-6 * A.diagonal().max():
        return A  # of full rank, the usual case: much quicker
    lam, V = torch.linalg.eigh(S)  # lam (D,), rising; V (D, D)
    noise = len(S) * torch.finfo(S.dtype).eps * lam[-1].abs()
    if lam[0] < -max(1e-8 * lam[-1], noise):
        raise ValueError(f"no covariance matrix: it has the eigenvalue {float(lam[0]):.3g}")
    return V[:, lam > noise] * lam[lam > noise].sqrt()


def overlap(S1, S2):
    """Singular values s (r,) of S1^(1/2) S2^(1/2); their sum is tr (S1 S2)^(1/2)."""
    # How the sum comes to stand for the slide's trace of a root: S1 S2 is not symmetric, but has
    # the eigenvalues of S1^(1/2) S2 S1^(1/2) = (S2^(1/2) S1^(1/2))^T (S2^(1/2) S1^(1/2)), which is.
    # So tr (S1 S2)^(1/2) = sum of sqrt(lam_i), and sqrt(lam_i) are the singular values s_i of
    # S1^(1/2) S2^(1/2). With S1 = A A^T, S2 = B B^T, A^T B has the same ones. No root is taken
    # after the product: a rounding error e stays e, where sqrt(lam_i) would make it sqrt(e).
    return torch.linalg.svdvals(factor(S1).T @ factor(S2))


def frechet_distance(mu1, S1, mu2, S2):
    """d_F = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), a float (slide FID; Dowson & Landau
    1982). Means (D,), covariances (D, D), torch or numpy; computed in float64 on the CPU, exact for
    singular covariances too. Errors: ValueError if shapes differ or a covariance is none."""
    mu1, S1, mu2, S2 = (torch.as_tensor(a).cpu().double() for a in (mu1, S1, mu2, S2))
    if not mu1.shape == mu2.shape == S1.shape[:1] == S2.shape[1:] or S1.shape != S2.shape:
        raise ValueError(f"shapes differ: {[list(a.shape) for a in (mu1, S1, mu2, S2)]}")
    return float((mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * overlap(S1, S2).sum())


def frechet_bias(S1, S2, n1, n2, between=None):
    """How much too large frechet_distance is on average when S1 comes from n1 and S2 from n2 images
    with Gaussian features, to first order in 1/n. between (D, D): the covariance of the second
    set's class means, if its classes were not drawn but fixed in number, which leaves them out of
    the errors. S1 and S2 are themselves estimates, which misses a share D/(2 n) of the bias."""
    # An error in mu adds tr S/n. One in S2 is one in M = A^T S2 A = U diag(s^2) U^T, A A^T = S1.
    # tr M^(1/2) is concave: to second order errors make it lose sum_ij dM_ij^2/(4 s_i s_j (s_i +
    # s_j)), and FD gains twice that. E dM_ij^2 = s_i^2 s_j^2 (1 + [i = j] - b_ii b_jj - b_ij^2)/(n2
    # - 1): Wishart's, but for b = U^T A^T between A U / (s_i s_j), which is fixed. Likewise S1.
    A = factor(S1)
    U, s, _ = torch.linalg.svd(A.T @ factor(S2), full_matrices=False)  # (r, r'), (r',)
    U, s = U[:, s > 0], s[s > 0]
    pair = s[:, None] * s / (s[:, None] + s)  # (r', r')
    bias = S1.trace() / n1 + S2.trace() / n2
    bias += (pair.sum() + pair.trace()) / 2 * (1 / (n1 - 1) + 1 / (n2 - 1))
    if between is not None:
        b = (A @ U).T @ between @ (A @ U) / torch.outer(s, s)  # (r', r')
        fixed = torch.outer(b.diag(), b.diag()) + b.square()
        bias -= between.trace() / n2 + (pair * fixed).sum() / 2 / (n2 - 1)
    return float(bias)


def gaussian(X):
    """mu (D,), S (D, D) of features X (N, D): "fit Gaussians to each set" (slide FID)."""
    X = X.double()
    return X.mean(0), torch.cov(X.T)  # divided by N - 1


def between_classes(X, y):
    """Covariance (D, D) of the class means of X (N, D), each class as often as in labels y (N,)."""
    one = F.one_hot(y.unique(return_inverse=True)[1]).double()  # (N, K)
    share = one.mean(0)
    means = one.T @ X.double() / (len(y) * share)[:, None] - X.double().mean(0)
    return (means.T * share) @ means


class Moments:
    """gaussian() of any number of features, batch by batch, without keeping them."""

    def __init__(self):
        self.n, self.mu, self.scatter = 0, 0.0, 0.0

    def add(self, f):
        """f (B, D). Sums about the running mean (Chan et al. 1979): plain sums of squares lose
        digits where the mean is large."""
        f = f.double()
        b, mean, total = len(f), f.mean(0), self.n + len(f)
        gap, f = mean - self.mu, f - mean
        self.scatter = self.scatter + f.T @ f + torch.outer(gap, gap) * (self.n * b / total)
        self.mu, self.n = self.mu + gap * (b / total), total

    @property
    def S(self):
        return self.scatter / (self.n - 1)


# ---- 2. What else is measured of two clouds (slide FID: "many others have been proposed") --------


def frechet_infinity(X, Y, parts=3):
    """FD extrapolated to infinitely many images (Chong & Forsyth 2020). X, Y (N, D), in random
    order or class by class; or X a pair (mu, S), whose bias then stays. The bias is b/N: split both
    into k parts, and it is k times as large. A straight line through k = 1, 2, 3 meets k = 0 where
    there is none."""
    at = []
    for k in range(1, parts + 1):
        reals = [X] * k if isinstance(X, tuple) else [gaussian(X[i::k]) for i in range(k)]
        at.append(np.mean([frechet_distance(*reals[i], *gaussian(Y[i::k])) for i in range(k)]))
    return float(np.polyfit(range(1, parts + 1), at, 1)[1])


def kid(X, Y, most=1000):
    """Kernel distance, without bias (Binkowski et al. 2018), and its standard error: the mean over
    blocks that share no image. X, Y (N, D), N at least 20. It may come out slightly negative."""
    def mean_kernel(x, y, same=False):
        K = (x @ y.T / x.shape[1] + 1) ** 3  # (n, n)
        return (K.sum() - K.trace()) / (len(x) * (len(x) - 1)) if same else K.mean()

    n = min(len(X), len(Y))
    blocks = max(10, n // most)
    values = []
    for i in range(blocks):
        x, y = (a[i::blocks][:min(n // blocks, most)].double() for a in (X, Y))
        values.append(mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y))
    values = torch.stack(values)
    return float(values.mean()), float(values.std() / math.sqrt(blocks))


def precision_recall(X, Y, k=3):
    """Precision: the share of samples Y (N, D) that lie among the real X (N, D), that is in a ball
    around a real point that reaches its k-th neighbour. Recall: the same with X and Y exchanged
    (Kynkaanniemi et al. 2019). Both sets are cut to the smaller one's number."""
    n = min(len(X), len(Y))
    X, Y = (a[torch.arange(n) * len(a) // n].float() for a in (X, Y))
    X, Y = X - X.mean(0), Y - X.mean(0)  # distances keep more digits near zero

    def share_inside(points, centres):
        radius = torch.cat([torch.cdist(c, centres).kthvalue(min(k + 1, n), 1).values
                            for c in centres.split(1000)])  # (n,); the first neighbour is itself
        inside = [(torch.cdist(p, centres) <= radius).any(1) for p in points.split(1000)]
        return float(torch.cat(inside).float().mean())

    return share_inside(Y, X), share_inside(X, Y)


# ---- 3. The Inception network (slide FID: "the feature space of Inception v3") -------------------
#
# FID's network is the TensorFlow graph of 2015-12-05. It differs from torchvision's Inception v3:
# other weights; averages that do not count the border; a maximum in the last block's pool branch;
# 1008 classes; no scaling to ImageNet's mean. Module names are those of its published PyTorch copy.
# With equal weights all four taps agree to the bit with torch-fidelity 0.4.0's and pytorch-fid
# 0.3.0's networks (float32, on a CPU), and to 6e-7 of the largest feature after fold().

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URLS = [
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"]


def resize_tf1(x, size):
    """Bilinear as in TensorFlow 1: pixel i of the result reads from i in/out, with no shift by half
    a pixel and no smoothing. x (B, C, H, W) float -> (B, C, size, size)."""
    for dim in (3, 2):  # columns, then rows
        n = x.shape[dim]
        at = torch.arange(size, device=x.device) * (n / size)
        low = at.long().clamp(max=n - 1)
        frac = (at - low).view(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * frac
    return x


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average(x):
    """Mean of the 3 x 3 neighbours that exist."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """At 35 x 35: 1x1, 5x5, twice 3x3, and a pool."""

    def __init__(self, c, pool):
        super().__init__()
        self.branch1x1 = Unit(c, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Unit(c, 48, 1), Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(c, 64, 1), Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(c, pool, 1)

    def forward(self, x):
        return torch.cat([
            self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average(x))], 1)


class BlockB(nn.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self, c):
        super().__init__()
        self.branch3x3 = Unit(c, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(c, 64, 1), Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x):
        return torch.cat([
            self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """At 17 x 17: 7x7 as 1x7 and 7x1."""

    def __init__(self, c, mid):
        super().__init__()
        row, col = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Unit(c, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Unit(c, mid, 1), Unit(mid, mid, **row)
        self.branch7x7_3 = Unit(mid, 192, **col)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit(c, mid, 1), Unit(mid, mid, **col)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Unit(mid, mid, **row), Unit(mid, mid, **col)
        self.branch7x7dbl_5 = Unit(mid, 192, **row)
        self.branch_pool = Unit(c, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([
            self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)), self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self, c):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(c, 192, 1), Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(c, 192, 1), Unit(192, 192, (1, 7), 1, (0, 3))
        self.branch7x7x3_3 = Unit(192, 192, (7, 1), 1, (3, 0))
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2)

    def forward(self, x):
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven),
                          F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """At 8 x 8: 3x3 as 1x3 beside 3x1."""

    def __init__(self, c, pool):
        super().__init__()
        row, col = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
        self.branch1x1 = Unit(c, 320, 1)
        self.branch3x3_1 = Unit(c, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Unit(384, 384, **row), Unit(384, 384, **col)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(c, 448, 1), Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Unit(384, 384, **row), Unit(384, 384, **col)
        self.branch_pool = Unit(c, 192, 1)
        self.pool = pool

    def forward(self, x):
        one, two = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([
            self.branch1x1(x), self.branch3x3_2a(one), self.branch3x3_2b(one),
            self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two),
            self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """The FID Inception network (Szegedy et al. 2015). Images (B, 3, H, W), 0..255, to features
    (B, tap), tap 64, 192, 768 or 2048: the means over all places behind four of its layers."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Unit(3, 32, 3, stride=2), Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Unit(64, 80, 1), Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = BlockA(192, 32), BlockA(256, 64)
        self.Mixed_5d, self.Mixed_6a = BlockA(288, 64), BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, average)
        self.Mixed_7c = BlockE(2048, lambda x: F.max_pool2d(x, 3, 1, 1))  # as in the graph of 2015
        self.fc = nn.Linear(2048, 1008)  # classes; not part of FID

    def forward(self, x, tap=2048):
        x = (resize_tf1(x.float(), 299) - 128) / 128  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)  # (B, 64, 73, 73)
        if tap > 64:
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        if tap > 192:
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))  # (B, 768, 17, 17)
        if tap > 768:
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.float().mean((2, 3))  # (B, tap)


def fold(model):
    """Puts each batch norm, constant in a trained network, into the convolution before it."""
    for unit in model.eval().modules():
        if isinstance(unit, Unit):
            unit.conv = nn.utils.fusion.fuse_conv_bn_eval(unit.conv, unit.bn)
            unit.bn = nn.Identity()
    return model


# ---- 4. Features of our own ----------------------------------------------------------------------


class Classifier(nn.Module):
    """A small network for small images. (B, C, H, W) uint8 -> features (B, D), D = 4 width, the
    means over all places of the last layer, as in Inception; logits (B, K) of K classes."""

    def __init__(self, channels, width, classes):
        super().__init__()
        D = 4 * width
        self.body = nn.Sequential(
            Unit(channels, width, 3, padding=1), nn.MaxPool2d(2),
            Unit(width, 2 * width, 3, padding=1), Unit(2 * width, 2 * width, 3, padding=1),
            nn.MaxPool2d(2), Unit(2 * width, D, 3, padding=1), Unit(D, D, 3, padding=1))
        self.head = nn.Linear(D, classes)

    def forward(self, x):
        f = self.body(to_float(x)).float().mean((2, 3))  # (B, D)
        return f, self.head(f)


# ---- 5. The loss ---------------------------------------------------------------------------------


def augment(x, flip):
    """Turns, stretches, slants and shifts each image a little, so that no pixel can be relied on.
    x (B, C, H, W) in [-1, 1]; every second one mirrored if flip."""
    turn, slant, wide, high = ((torch.rand(4, len(x), device=x.device) * 2 - 1)
                               * torch.tensor([0.12, 0.09, 0.07, 0.07], device=x.device)[:, None])
    shift = torch.rand(len(x), 2, 1, device=x.device) * 0.14 - 0.07
    mirror = torch.where(torch.rand(len(x), device=x.device) < 0.5 * flip, -1.0, 1.0)
    rows = torch.stack([turn.cos() * (1 + wide) * mirror, slant - turn.sin() * (1 + high),
                        turn.sin() * (1 + wide) * mirror, turn.cos() * (1 + high)], 1)
    affine = torch.cat([rows.view(-1, 2, 2), shift], 2)  # (B, 2, 3)
    places = F.affine_grid(affine, x.shape, align_corners=False)
    return F.grid_sample(x, places, padding_mode="border", align_corners=False)


def loss(model, x, y):
    """Cross-entropy of images x and labels y (B,); 5 % of each target spread over all classes."""
    return F.cross_entropy(model(x)[1].float(), y, label_smoothing=0.05)


# ---- 6. Sets of images, and their features -------------------------------------------------------


def part_of(spec):
    """"name[a:b]" -> name, a, b: the set meant, and which of its images."""
    part = None if Path(spec).exists() else re.fullmatch(r"(.+)\[(\d*):(\d*)\]", spec, re.S)
    return (part[1], int(part[2] or 0), int(part[3] or sys.maxsize)) if part else (
        spec, 0, sys.maxsize)


def read_set(spec, args):
    """Yields images (B, C, H, W) uint8 and labels (B,) or None of what spec names, B at most 500;
    never more than that is in memory, but for the data sets."""
    source, first, last = part_of(spec)
    at, shape = 0, None
    name, _, split = source.partition(":")
    if name in DATASETS:
        if split not in ("train", "test"):
            die(f"{spec}: expected {name}:train or {name}:test")
        images, labels = load_data(SimpleNamespace(
            data=name, data_dir=args.data_dir, device="cpu"), split)
        batches = zip(images.split(500), labels.split(500))
    elif source and Path(source).is_dir():
        batches = read_folder(Path(source))
    else:
        batches = read_array(source)
    for images, labels in batches:
        rows = slice(max(0, first - at), max(0, last - at))
        at += len(images)
        if shape and shape[0] == 3 and images.shape[1] == 1:  # grey among coloured ones
            images = images.expand(-1, 3, -1, -1)
        if shape and images.shape[1:] != shape:
            die(f"{spec}: images of different sizes or channels, {list(shape)} and "
                f"{list(images.shape[1:])}; make them equal")
        shape = images.shape[1:]
        if len(images[rows]):
            yield images[rows], labels if labels is None else labels[rows]
        if at >= last:
            break


def read_array(path):
    """Batches of a .npy file, or of arr_0 or images in a .npz, read piece by piece."""
    try:
        if path.endswith(".npz"):
            file = np.load(path)
            name = next((k for k in ("arr_0", "images") if k in file.files), None)
            if not name:
                die(f"{path}: expected images as arr_0, or mu and sigma; found {file.files}")
            labels = file["labels"] if "labels" in file.files else None
            stream = zipfile.ZipFile(path).open(f"{name}.npy")
        elif path.endswith(".npy"):
            stream, labels = open(path, "rb"), None
        else:
            die(f"{path} is not known: expected {', '.join(DATASETS)} with :train or :test, a "
                "folder, a .npy or a .npz file")
        with stream:
            version = np.lib.format.read_magic(stream)
            read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            (n, *shape), fortran, dtype = read_header(stream)
            shape = shape if len(shape) == 3 else [*shape, 1]
            if len(shape) != 3 or shape[2] not in (1, 3) or fortran or dtype.kind not in "uf" or (
                    dtype.kind == "u" and dtype != np.uint8):
                die(f"{path}: expected images (N, H, W, 1 or 3), uint8, or float in 0..1; found "
                    f"{dtype} {(n, *shape)}")
            if labels is not None and (labels.shape != (n,) or labels.dtype.kind not in "iuf"
                                       or (labels != labels.round()).any()):
                die(f"{path}: expected labels, one whole number an image; found {labels.dtype} "
                    f"{labels.shape}")
            for at in range(0, n, 500):
                count = min(500, n - at)
                data = stream.read(count * math.prod(shape) * dtype.itemsize)
                x = np.frombuffer(data, dtype).reshape(count, *shape)
                if dtype.kind == "f":
                    if not (x.min() >= 0 and x.max() <= 1):  # nan fails too
                        die(f"{path}: expected uint8 in 0..255 or float in 0..1; found {dtype} in "
                            f"{x.min():g}..{x.max():g}")
                    x = (x * 255).round().astype(np.uint8)
                y = None if labels is None else torch.from_numpy(labels[at:at + 500].astype(int))
                yield torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), y
    except Exception as e:
        die(f"{path} cannot be read: {e}")


def read_folder(folder):
    """Images of a folder and its sub-folders, in the order of their names, up to 50 at a time."""
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds)
    if not paths:
        die(f"{folder}: no images found in this folder; expected PNG files")
    batch = []
    for path in paths:
        batch.append(read_image(path))
        if len(batch) == 50 or path == paths[-1] or batch[0].shape != batch[-1].shape:
            odd = [batch.pop()] if batch[0].shape != batch[-1].shape else []
            for part in filter(None, (batch, odd)):
                yield torch.from_numpy(np.stack(part).transpose(0, 3, 1, 2).copy()), None
            batch = []


def read_image(path):
    """(H, W, C) uint8 of an image file; other formats than PNG through Pillow, if it is there."""
    data = path.read_bytes()
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return read_png(data)
    except NotImplementedError:
        pass
    except Exception as e:
        die(f"{path} is cut off or damaged ({e})")
    try:
        from PIL import Image
    except ImportError:
        die(f"{path}: only PNG with 8 bits, not interlaced, is read here; save as such, or pip "
            "install pillow")
    try:
        image = Image.open(io.BytesIO(data))
        x = None if image.mode[0] in "IF" else np.array(image.convert("RGB"))
    except Exception as e:
        die(f"{path} cannot be read: {e}")
    return die(f"{path}: more than 8 bits; save it with 8") if x is None else x


def read_png(data):
    """(H, W, 1 or 3) uint8; transparency is dropped, as public FID tools do. Errors: ValueError if
    damaged, NotImplementedError if interlaced or not of 8 bits."""
    at, pixels, palette, tag = 8, b"", None, b""
    while tag != b"IEND":
        length, tag = struct.unpack(">I4s", data[at:at + 8])
        body, crc = data[at + 8:at + 8 + length], data[at + 8 + length:at + 12 + length]
        if crc != struct.pack(">I", zlib.crc32(tag + body)):
            raise ValueError(f"chunk {tag} at byte {at}")
        if tag == b"IHDR":
            W, H, bits, kind, _, _, interlaced = struct.unpack(">2I5B", body)
            if bits != 8 or interlaced:
                raise NotImplementedError
        elif tag == b"PLTE":
            palette = np.frombuffer(body, np.uint8).reshape(-1, 3)
        elif tag == b"IDAT":
            pixels += body
        at += 12 + length
    C = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]  # grey, RGB, palette, grey and alpha, RGBA
    pixels = zlib.decompressobj().decompress(pixels, H * (1 + W * C) + 1)  # and no bomb
    rows = np.frombuffer(pixels, np.uint8).reshape(H, 1 + W * C)
    kinds, x = rows[:, 0], rows[:, 1:].reshape(H, W, C)
    if kinds.max() > 4:
        raise ValueError(f"filter {kinds.max()}")
    if kinds.any():
        x = unfilter(kinds, x)
    return palette[x[:, :, 0]] if kind == 3 else x[:, :, :C - 1] if kind in (4, 6) else x


def unfilter(kinds, x):
    """Undoes PNG's prediction of each byte from those to its left a, above b and both c; kinds (H,)
    per row: 0 none, 1 a, 2 b, 3 their mean, 4 Paeth's choice. x (H, W, C) uint8."""
    # A pixel needs its neighbours first: go by diagonals, all rows of one diagonal at once.
    H, W, C = x.shape
    out = np.zeros((H + 1, W + 1, C), np.int32)  # a border of zeros above and to the left
    for d in range(H + W - 1):
        r = np.arange(max(0, d - W + 1), min(H, d + 1))
        col, kind = d - r, kinds[r, None]
        a, b, c = out[r + 1, col], out[r, col + 1], out[r, col]
        to_a, to_b, to_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
        paeth = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
        guess = np.select([kind == 1, kind == 2, kind == 3, kind == 4], [a, b, (a + b) // 2, paeth])
        out[r + 1, col + 1] = (x[r, col] + guess) & 255
    return out[1:, 1:].astype(np.uint8)


def inception_of(args):
    """The FID Inception network with its published weights, checked."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    names = [INCEPTION, INCEPTION.replace("pt_", "weights-")]  # pytorch-fid's, torch-fidelity's
    path = args.weights or next((cache / n for n in names if (cache / n).exists()), None)
    if not path:
        path = cache / INCEPTION
        fetch(INCEPTION_URLS, path, INCEPTION_SHA)
    if not path.is_file():
        die(f"--weights {path} is not there; get it from {INCEPTION_URLS[0]}")
    data = path.read_bytes()
    if (found := digest(data, INCEPTION_SHA)) != INCEPTION_SHA:
        die(f"{path} is cut off or another file: {len(data):,} bytes with sha256 {found[:8]}..., "
            f"expected 95,628,359 with {INCEPTION_SHA[:8]}...; get it from {INCEPTION_URLS[0]}")
    model = Inception()
    model.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    return model


def match(x, C, H=None, W=None):
    """Images x (B, C', H', W') with C channels; refused if a size H, W is asked for and is not
    theirs."""
    if x.shape[1] == 1 < C:
        x = x.expand(-1, C, -1, -1)
    elif x.shape[1] == 3 > C and (x == x[:, :1]).all():  # grey, saved as RGB
        x = x[:, :1]
    if x.shape[1] != C or H and x.shape[2:] != (H, W):
        die(f"images of shape {list(x.shape[1:])}, but the classifier was trained on {[C, H, W]}; "
            "use --features inception, or --train one on such images")
    return x


def extractor(args, ckpt):
    """f, title, tag. f(images (B, C, H, W) uint8) gives features (B, D) and logits (B, K) or None,
    on the CPU; title is what the distance may be called; tag goes into --save-stats."""
    if args.fast and not args.bf16:
        die(f"--fast: {args.device} has no bf16; leave it out")
    cast = SimpleNamespace(device=args.device, bf16=args.fast)
    torch.set_float32_matmul_precision("highest")  # TF32 would move the fourth digit
    torch.backends.cudnn.allow_tf32 = False
    if args.features == "pixels":
        return lambda x: (x.flatten(1).double() / 255, None), "FD (pixels)", "pixels"
    if args.features == "inception":
        model = inception_of(args)
        run = lambda x: (model(match(x, 3), args.tap), None)
        title = "FID" if args.tap == 2048 else f"FD (Inception {args.tap})"
        tag = f"inception-{args.tap}"
    else:
        C, H, W = ckpt["config"]["shape"]
        model = Classifier(C, ckpt["config"]["width"], ckpt["config"]["num_classes"])
        load_state(model, ckpt, "model")
        bits = b"".join(v.half().numpy().tobytes() for v in ckpt["model"].values()
                        if v.is_floating_point())  # the same with and without --export
        run = lambda x: model(match(x, C, H, W))
        title, tag = "FD (our features)", f"ours-{hashlib.md5(bits).hexdigest()[:8]}"
    model = fold(model).to(args.device, memory_format=torch.channels_last)  # twice as fast

    @torch.no_grad()
    def f(x):
        parts = []
        for b in x.split(50):
            with autocast(cast):
                parts.append([v if v is None else v.float().cpu() for v in run(b.to(args.device))])
        return [v[0] if v[0] is None else torch.cat(v) for v in zip(*parts)]

    return f, title, tag + "-bf16" * args.fast


class Features(Moments):
    """Moments of a set's features, a random choice of at most `keep` of them, and the labels."""

    def __init__(self, keep, seed):
        super().__init__()
        self.keep, self.rng = keep, torch.Generator().manual_seed(seed)
        self.batches, self.counts, self.right, self.fixed = [], Counter(), 0, False

    def add(self, f, labels=None, logits=None):
        """f (B, D), labels (B,), logits (B, K), or None."""
        super().add(f)
        lots = torch.rand(len(f), generator=self.rng)  # who draws the highest is kept
        if labels is not None:
            self.counts.update(labels.tolist())
            self.right += 0 if logits is None else int((logits.argmax(1) == labels).sum())
        self.batches.append((lots, f, torch.zeros(len(f), dtype=torch.long) if labels is None
                             else labels))
        if sum(len(batch[0]) for batch in self.batches) > 2 * self.keep:
            self.cut()

    def cut(self):
        """Keeps those with the highest lots: self.kept (M, D) in random order, labels self.y."""
        lots, f, y = (torch.cat(a) for a in zip(*self.batches))
        lots, order = lots.topk(min(self.keep, len(lots)))
        self.kept, self.y = f[order], y[order]
        self.batches = [(lots, self.kept, self.y)]

    def fix(self):
        """To be called if the number of each class was fixed and not drawn. by_class: the features
        sorted by class, so that every k-th is a set with fixed classes too."""
        if self.n <= self.keep:
            self.by_class, self.fixed = self.kept[self.y.argsort(stable=True)], True


def summarise(batches, f, args, name, seed=0):
    """Features of batches of (images, labels); seed: which are kept, and in which order."""
    found = Features(args.keep, (args.seed + seed) % 2**63)
    with tqdm(desc=name, unit=" images", leave=False, disable=None) as bar:
        for images, labels in batches:
            features, logits = f(images)
            found.add(features, labels, logits)
            bar.update(len(images))
    if found.n < 2:
        die(f"{name}: found {found.n} images; expected two or more")
    if not torch.isfinite(found.scatter).all():
        die(f"{name}: features that are not numbers; the network is broken")
    found.cut()
    if len(found.counts) > 1 and len(set(found.counts.values())) == 1:
        found.fix()  # exactly as many of each class: not by chance
    return found


def features_of(spec, f, tag, args, seed=0):
    """Features of what spec names, or mu and S of a .npz as pytorch-fid and --save-stats write."""
    if spec.endswith(".npz") and Path(spec).exists():
        try:
            with np.load(spec) as file:
                stats = {k: file[k] for k in ("mu", "sigma", "n", "features") if k in file.files}
                images = "arr_0" in file.files or "images" in file.files
            mu, S = (torch.as_tensor(stats.get(k, np.zeros(0))).double() for k in ("mu", "sigma"))
            n = int(stats.get("n", 0))
        except Exception as e:
            die(f"{spec} cannot be read: {e}")
        if {"mu", "sigma"} <= set(stats) and (tag.startswith("inception-2048") or not images):
            if mu.ndim != 1 or S.shape != 2 * mu.shape or not torch.isfinite(S.sum() + mu.sum()):
                die(f"{spec}: expected mu (D,) and sigma (D, D) without nan; found "
                    f"{list(mu.shape)} and {list(S.shape)}")
            if not torch.allclose(S, S.T, atol=1e-6 * float(S.abs().max())):
                die(f"{spec}: sigma is not symmetric, so it is no covariance matrix")
            if str(stats.get("features", tag)) != tag:
                die(f"{spec} holds statistics of {stats['features']}, but --features gives {tag}")
            return SimpleNamespace(n=n if n > 1 else 0, mu=mu, S=S, kept=None, counts=None)
    return summarise(read_set(spec, args), f, args, spec, seed)


# ---- 7. Train ------------------------------------------------------------------------------------


def train(args, ckpt=None):
    """Trains the classifier and writes its checkpoint. ckpt: go on from there."""
    data, labels = load_data(args, "train")  # (N, C, H, W) uint8, (N,) int64
    if labels is None:
        die(f"--data {args.data} has no labels, and a classifier needs them")
    args.shape, args.num_classes = list(data.shape[1:]), int(labels.max()) + 1
    torch.manual_seed(args.seed)
    model = Classifier(args.shape[0], args.width, args.num_classes)
    model = model.to(args.device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0.02,
                            fused=True)
    begin, history = 1, []
    if ckpt:
        load_state(model, ckpt, "model")
        load_state(opt, ckpt, "optimizer")
        begin, history = ckpt["step"] + 1, ckpt["history"]
    if begin > args.steps:
        die(f"--resume: all {args.steps} steps are done; ask for more with --steps")
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(data):,} of {args.data}, "
        f"shape {args.shape}, {args.num_classes} classes; {args.steps:,} steps of "
        f"{args.batch_size}")
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        model.compile()
    config = {k: getattr(args, k) for k in CONFIG}
    B, dev, stop, total, counted, done = args.batch_size, args.device, ctrl_c(), 0.0, 0, False
    clock, since = time.time(), begin - 1
    bar = tqdm(range(begin, args.steps + 1), initial=begin - 1, total=args.steps, disable=None)
    for step in bar:
        torch.manual_seed((args.seed * 1_000_003 + step) % 2**63)  # --resume needs no saved state
        pick = torch.randint(len(data), (B,), device=dev)
        x, y = augment(to_float(data[pick]), args.flip), labels[pick]  # (B, C, H, W), (B,)
        for group in opt.param_groups:  # warm up over a tenth, then down to zero
            group["lr"] = args.lr * min(1, 10 * step / args.steps) * (1 - (step - 1) / args.steps)
        with autocast(args):
            error = loss(model.train(), x, y)
        error.backward()
        opt.step()
        opt.zero_grad()
        total, counted, done = total + error.detach(), counted + 1, step == args.steps or bool(stop)
        write = done or step % args.every == 0
        if write or step == 1 or step % 20 == 0:  # not each step: reading the loss waits for a GPU
            history.append((step, float(total) / counted))
            total, counted = 0.0, 0
            state = f"loss {history[-1][1]:.3f} (by chance {math.log(args.num_classes):.2f})"
            bar.set_postfix_str(state)
            if not math.isfinite(history[-1][1]):
                die(f"the loss is {history[-1][1]} at step {step}: lower --lr {args.lr}; the last "
                    "checkpoint is kept")
        if write:
            speed = (step - since) * B / (time.time() - clock)
            save_checkpoint(args.out / "model.pt", dict(
                file=NAME, config=config, step=step, history=history, model=model.state_dict(),
                optimizer=opt.state_dict()))
            save_loss(args.out, history)
            tqdm.write(f"step {step:,}: {state}, {speed:.0f} img/s")
            sys.stdout.flush()
        if write or step == begin:  # the clock leaves out files, and torch.compile's first step
            clock, since = time.time(), step
        if done and step < args.steps:
            say(f"stopped at {step}; to go on: python {NAME}.py --train --resume --out {args.out}")
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if have_data(args):
        test(args, read_checkpoint(args.out / "model.pt"))
    sets = f"{args.data}:train {args.data}:test" if args.data in DATASETS else "REAL FAKE"
    out = "" if args.out == Path("out") / NAME else f" --out {args.out}"
    say(f"now try: python {NAME}.py {sets}{out}")


def test(args, ckpt):
    """Share of the test set that is read rightly; mistakes.png shows what is not, read as what."""
    images, labels = load_data(args, "test")
    logits = extractor(args, ckpt)[0](images)[1]
    labels = labels.cpu()
    wrong = (logits.argmax(1) != labels).nonzero()[:, 0]
    say(f"test accuracy {1 - len(wrong) / len(labels):.4f} ({len(wrong)} of {len(labels):,} wrong)")
    if len(wrong):
        rows = []
        for row in wrong[:48].split(8):
            picture = grid(images[row], 8)
            texts = [f"{labels[i]} as {logits[i].argmax()}" for i in row.tolist()]
            strips = [caption(text, picture.shape[1] // 8) for text in texts]
            rows += [picture, np.concatenate(strips, 1)]
        save_png(args.out / "mistakes.png", stack(rows)[None])


# ---- 8. The report -------------------------------------------------------------------------------


def measures(real, fake, args):
    """{name: number} of all that is measured of two sets; names are missing where the number is not
    defined, or where only mu and sigma are known."""
    found = dict(fd=frechet_distance(real.mu, real.S, fake.mu, fake.S))
    n, D = min(real.n, fake.n), len(fake.mu)
    fixed = fake.kept is not None and fake.fixed
    if n > 2 * D:
        between = between_classes(fake.kept, fake.y) if fixed else None
        found["bias"] = frechet_bias(real.S, fake.S, real.n, fake.n, between)
        found["less"] = found["fd"] - found["bias"]
    if fake.kept is not None and len(fake.kept) >= 20:
        known = (real.mu, real.S) if real.kept is None else real.kept
        if len(fake.kept) > 3 * D and (real.kept is None or len(real.kept) > 3 * D):
            found["infinity"] = frechet_infinity(known, fake.by_class if fixed else fake.kept)
        if real.kept is not None and len(real.kept) >= 20:
            found["kid"], found["kid_error"] = kid(real.kept, fake.kept)
            found["precision"], found["recall"] = precision_recall(real.kept, fake.kept, args.k)
    if args.classes and fake.counts:
        found["accuracy"] = fake.right / fake.n
    return found


def floor_of(real, fake, f, args):
    """What the report would say of real images in FAKE's place: as many of the data set's other
    split, with FAKE's labels; or one part of REAL against the rest. Returns a reference, a set, and
    what it is; or None."""
    name, _, split = args.sets[0].partition("[")[0].partition(":")
    rng, n = torch.Generator().manual_seed(args.seed), fake.n or 10_000
    other = {"train": "test", "test": "train"}.get(split)
    where = SimpleNamespace(data=name, data_dir=args.data_dir, device="cpu")
    if name in DATASETS and have_data(where) and not args.sets[1].startswith(f"{name}:{other}"):
        images, labels = load_data(where, other)
        pick = torch.randperm(len(images), generator=rng)
        if fake.counts and set(fake.counts) <= set(labels.tolist()):
            # a set with other shares of the classes would be further away
            pick = torch.cat([pick[labels[pick] == c][:k] for c, k in sorted(fake.counts.items())])
        pick = pick[:n]
        batches = zip(images[pick].split(500), labels[pick].split(500))
        found = summarise(batches, f, args, "floor", 2)
        if fake.counts:
            found.fix()
        return real, found, f"{found.n:,} of {name}:{other}"
    if real.kept is None or len(real.kept) < 4:
        return None
    n = min(n, len(real.kept) // 2)
    sets = [Features(args.keep, 0), Features(args.keep, 0)]
    for part, rows in zip(sets, (real.kept[n:], real.kept[:n])):
        part.add(rows)
        part.cut()
    return *sets, f"{n:,} of REAL, against its other {len(real.kept) - n:,}"


def evaluate(args, ckpt):
    """Compares two sets of images and prints the report; or writes one's mu and sigma."""
    f, title, tag = extractor(args, ckpt)
    start, found = time.time(), [features_of(spec, f, tag, args, i)
                                 for i, spec in enumerate(args.sets)]
    if args.save_stats:
        buffer, first = io.BytesIO(), found[0]
        np.savez(buffer, mu=first.mu.numpy(), sigma=first.S.numpy(), n=first.n, features=tag)
        write_whole(args.save_stats, buffer.getbuffer())
        say(f"mu and sigma of {first.n:,} images, {len(first.mu)} features, in {args.save_stats}")
    if len(found) < 2:
        return
    real, fake = found
    D = len(fake.mu)
    if len(real.mu) != D:
        die(f"different dimensions: {args.sets[0]} has {len(real.mu)} features, {args.sets[1]} has "
            f"{D}; " + ("the images differ in size or channels" if args.features == "pixels" else
                        "compute both with the same --features"))
    if args.classes and not fake.counts:
        die(f"--classes: {args.sets[1]} has no labels")
    try:
        columns = [measures(real, fake, args)]
    except ValueError as e:
        die(f"{' or '.join(args.sets)}: {e}")
    floor = floor_of(real, fake, f, args)
    if floor:
        columns.append(measures(*floor[:2], args))
    for name, spec, s in zip(("REAL", "FAKE"), args.sets, found):
        say(f"{name:6}{spec}: " + (f"{s.n:,} images" if s.n else "mu and sigma, N is not known"))
    say(f"{'':6}{D} features ({tag}), {time.time() - start:.0f} s\n")
    say(f"{'':26}{'FAKE':20}{f'floor: {floor[2]}' if floor else ''}")
    for row, text in (
            (title, "{fd:.5g}"), ("  bias at this N", "{bias:.4g}"),
            ("  less its bias", "{less:.4g}"), ("  at infinite N", "{infinity:.4g}"),
            ("KID x 1000", "{kid:.3g} +- {kid_error:.2g}"), ("precision", "{precision:.3f}"),
            ("recall", "{recall:.3f}"), ("accuracy", "{accuracy:.4f}")):
        key = re.search(r"\w+", text)[0]
        cells = [text.format(**{k: v * 1000 if "kid" in k else v for k, v in c.items()})
                 if key in c else "-" for c in columns]
        if key != "accuracy" or args.classes:
            say(f"{row:26}" + "".join(f"{c:20}" for c in cells).rstrip())
    n = min(s.n or sys.maxsize for s in found)
    fd, bias = columns[0]["fd"], columns[0].get("bias")
    if n <= 2 * D:
        say(f"\nwarning: {n:,} images for {D:,} features: the covariance is "
            f"{'singular' if n <= D else 'nearly singular'} and FD far too large; take more images"
            + (", or --tap 192" if args.features == "inception" and args.tap > 192 else ""))
    elif bias and fd < 0.5 * bias:
        say("\nwarning: FD is below what independent images give: does FAKE hold images of REAL?")
    elif bias and bias > 0.1 * fd:
        say(f"\nwarning: {n:,} images bias FD by {bias:.3g}: compare it only with others at the "
            "same N, or take the rows below it")
    if floor and floor[1].n != fake.n:
        say("\nThe floor has another number of images than FAKE: of FD, compare the rows below it")
    of, ckpt_of = args.sets[0].partition(":")[0], ckpt["config"]["data"] if ckpt else ""
    if args.features == "ours" and of in DATASETS and of != ckpt_of:
        say(f"\nwarning: the features were trained on {ckpt_of}, not on {of}")
    if args.features == "inception":
        say("\nPublished FIDs take 50,000 samples; images are resized as they come: both sets "
            "should have the same size and the same JPEG history")
    say(f"\nnow try: python {NAME}.py --sweep")


# ---- 9. What moves the number --------------------------------------------------------------------


def blur(x, sigma):
    """Gaussian blur of images (B, C, H, W) uint8; sigma in pixels."""
    if not sigma:
        return x
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    y = F.pad(x.float().flatten(0, 1)[:, None], [reach] * 4, mode="replicate")
    y = F.conv2d(F.conv2d(y, kernel), kernel.transpose(2, 3))  # (B C, 1, H, W)
    return y.view(x.shape).round().to(torch.uint8)


def noise(x, std, rng):
    """Gaussian noise on images (B, C, H, W) uint8; std in grey levels."""
    return (x + std * torch.randn(x.shape, generator=rng)).round().clamp(0, 255).to(torch.uint8)


def replaced(x, fraction, others):
    """Images x (N, C, H, W), the last of them replaced by others (N, C, H, W)."""
    n = round(fraction * len(x))
    return torch.cat([x[:len(x) - n], others[:n]])


def sweep(args, ckpt):
    """FD of real test images to the training images: against their number, and against damage of
    four kinds and five strengths. Tables, and a picture sweep_*.png for each."""
    f, title, _ = extractor(args, ckpt)
    rng = torch.Generator().manual_seed(args.seed)
    where = SimpleNamespace(data=args.data, data_dir=args.data_dir, device="cpu")
    known, x = load_data(where, "train")[0], load_data(where, "test")[0]
    if len(x) < 400:
        die(f"--sweep: {len(x)} test images in {args.data}; expected 400 or more")
    x = x[torch.randperm(len(x), generator=rng)]  # (N, C, H, W)
    real = summarise(((b, None) for b in known.split(500)), f, args, "training images")
    X = torch.cat([f(b)[0] for b in x.split(500)])  # (N, D)

    say(f"{title} of N test images to {real.n:,} training images, mean over up to 10 sets\n"
        f"{'N':>8}{'FD':>10}{'its bias':>10}{'less bias':>11}")
    curve, less = [], []
    for n in (len(x) // k for k in (1, 2, 3, 4, 5, 7, 10, 15, 20)):
        sets = [gaussian(part) for part in X[:n * (len(X) // n)].split(n)[:10]]
        fd = np.mean([frechet_distance(real.mu, real.S, *g) for g in sets])
        curve.append((1000 / n, fd))
        bias = np.nan
        if n > 2 * X.shape[1]:  # as in measures: the formula is of first order in D/n
            bias = np.mean([frechet_bias(real.S, g[1], real.n, n) for g in sets])
            less.append((1000 / n, fd - bias))
        say(f"{n:8,}{fd:10.4f}{bias:10.4f}{fd - bias:11.4f}")
    curves = {"FD": curve} | ({"less its bias": less} if less else {})
    picture = plot({name: tuple(zip(*points)) for name, points in curves.items()}, "1000/N")
    heading = caption(f"{title}: images of the same kind, fewer and fewer", 900)
    save_png(args.out / "sweep_images.png", stack([heading, picture])[None])

    x = x[:2000]
    pixels = x.flatten(1)[:, torch.randperm(x[0].numel(), generator=rng)].view(x.shape)
    copies = x[torch.arange(len(x)) % 20]
    for name, text, strengths, damage in (
            ("blur", "blur, sigma in pixels", (0, 0.5, 1, 1.5, 2), lambda s: blur(x, s)),
            ("noise", "noise, standard deviation of 255", (0, 16, 32, 64, 128),
             lambda s: noise(x, s, rng)),
            ("intruders", "share of images with their pixels shuffled", (0, 0.02, 0.05, 0.1, 0.2),
             lambda s: replaced(x, s, pixels)),
            ("copies", "share of images that are copies of 20 of them", (0, 0.25, 0.5, 0.75, 0.95),
             lambda s: replaced(x, s, copies))):
        rows, examples = [], []
        for s in strengths:
            damaged = damage(s)
            fake = summarise(((b, None) for b in damaged.split(500)), f, args, name)
            rows.append((frechet_distance(real.mu, real.S, fake.mu, fake.S),
                         *precision_recall(real.kept, fake.kept, args.k)))
            examples.append(damaged[len(x) // 32::len(x) // 16][:16])
        fds, precision, recall = zip(*rows)
        say(f"\n{len(x):,} test images, {text}\n{name:>12}"
            + "".join(f"{s:>9g}" for s in strengths))
        for row, values in (("FD", fds), ("precision", precision), ("recall", recall)):
            say(f"{row:>12}" + "".join(f"{v:9.3f}" for v in values))
        rises = all(a < b for a, b in zip(fds, fds[1:]))
        say(f"FD {'rises' if rises else 'does not rise'} with every step")
        plots = [plot({title: (strengths, fds)}, name, W=450, H=300),
                 plot({"precision": (strengths, precision), "recall": (strengths, recall)}, name,
                      W=450, H=300)]
        save_png(args.out / f"sweep_{name}.png", stack([
            caption(f"{text}: {', '.join(f'{s:g}' for s in strengths)}, row by row", 900),
            grid(torch.cat(examples), 16), np.concatenate(plots, 1)])[None])
    say(f"\npictures: {args.out}/sweep_*.png\nnow try: python {NAME}.py --vote A.npz B.npz")


# ---- 10. Votes (slide Human Evaluation) ----------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Which is better?</title>
<style nonce="TOKEN">
 body { font: 18px sans-serif; text-align: center; background: #ddd; margin: 2em }
 canvas { width: 40vmin; image-rendering: pixelated; margin: 1em; cursor: pointer }
 button { font-size: 18px; padding: .4em 1em; margin: .3em }
</style>
<h2 id="prompt">&nbsp;</h2>
<div><canvas id="left" data-vote="left"></canvas
><canvas id="right" data-vote="right"></canvas></div>
<p><button data-vote="left">&larr; left</button><button data-vote="tie">tie (space)</button
><button data-vote="right">right &rarr;</button><button data-vote="undo">undo (u)</button></p>
<p id="progress"></p>
<script nonce="TOKEN">
const keys = {ArrowLeft: "left", ArrowRight: "right", " ": "tie", t: "tie", u: "undo"};
let trial = 0, since = Date.now(), busy = false;
function paint(name, s) {
  const canvas = document.getElementById(name), bytes = atob(s[name]);
  canvas.width = s.width; canvas.height = s.height;
  const pixels = Uint8ClampedArray.from(bytes, c => c.charCodeAt(0));
  canvas.getContext("2d").putImageData(new ImageData(pixels, s.width, s.height), 0, 0);
}
async function send(vote) {
  if (busy) return;
  busy = true;
  try {
    const seconds = (Date.now() - since) / 1000;
    const answer = await fetch("/", {method: "POST", headers: {"X-Token": "TOKEN"},
                                     body: JSON.stringify({trial, vote, seconds})});
    if (!answer.ok) throw new Error(answer.status == 403 ? "reload the page" : answer.status);
    const s = await answer.json();
    const end = s.trial == s.trials;
    document.getElementById("progress").textContent = s.trial + " of " + s.trials + " done";
    document.getElementById("prompt").textContent = end ? "All done, thank you." : s.prompt;
    for (const c of document.querySelectorAll("canvas")) c.style.display = end ? "none" : "";
    if (!end) { paint("left", s); paint("right", s); }
    trial = s.trial; since = Date.now();
  } catch (e) {
    document.getElementById("progress").textContent = "Not saved: " + e.message;
  }
  busy = false;
}
onkeydown = e => {
  if (!keys[e.key] || e.repeat || e.ctrlKey || e.altKey || e.metaKey) return;
  e.preventDefault();
  send(keys[e.key]);
};
for (const e of document.querySelectorAll("[data-vote]"))
  e.onclick = () => { e.blur(); send(e.dataset.vote); };
send("show");
</script></html>"""


def make_trials(pairs, num, repeats, seed):
    """[(pair, is A on the left, is it a repeat), ...]: num of the pairs in random order, sides by
    lot; then a share of them again with the sides swapped, scattered over the second half."""
    rng = np.random.default_rng(seed)
    first = [(int(i), bool(rng.integers(2)), False) for i in rng.permutation(pairs)[:num]]
    trials = list(first)
    for i in rng.permutation(len(first) // 2)[:round(repeats * len(first))]:
        pair, left, _ = first[i]
        at = int(rng.integers(len(first) // 2 + 1, len(trials) + 1))
        trials.insert(at, (pair, not left, True))
    return trials


def read_votes(path):
    """(header, votes) of a file of votes, one JSON object a line, undone ones left out; a last line
    that was cut off by a kill is ignored."""
    votes, lines = [], path.read_bytes().split(b"\n")[:-1]
    if not lines:
        die(f"{path}: no votes yet")
    try:
        header, *rest = (json.loads(line) for line in lines)
        for number, line in enumerate(rest, 2):
            if "undo" in line:
                votes.pop()
                continue
            if (line["trial"] != len(votes) or line["vote"] not in ("A", "B", "tie")
                    or line["left"] not in ("A", "B") or type(line["pair"]) is not int
                    or type(line["repeat"]) is not bool):
                raise ValueError(f"line {number}")
            votes.append(line)
        return {k: header[k] for k in ("A", "B", "digest", "seed", "num", "repeats")}, votes
    except Exception as e:
        die(f"{path} is no file of votes, or an altered one ({type(e).__name__}: {e})")


def read_pairs(args):
    """A, B (N, H, W, C) uint8 and the prompt of each pair, from the labels or captions of the two
    sets of --vote."""
    sets, prompts = [], []
    for spec in args.vote:
        batches = list(read_set(spec, args))
        if not batches:
            die(f"--vote: no images in {spec}")
        images, labels = zip(*batches)
        sets.append(torch.cat(images).numpy().transpose(0, 2, 3, 1))
        prompts.append(None if labels[0] is None else
                       [f"class {y}" for y in torch.cat(labels).tolist()])
        name, first, last = part_of(spec)
        if name.endswith(".npz") and "captions" in (file := np.load(name)).files:
            try:
                captions = np.asarray(file["captions"])[first:last]
                prompts[-1] = captions.tolist()
            except Exception as e:
                die(f"{spec}: captions are damaged ({e})")
            if captions.dtype.kind != "U" or captions.shape != (len(sets[-1]),):
                die(f"{spec}: expected captions, one string an image; found {captions.dtype} "
                    f"{captions.shape}")
    A, B = sets
    if A.shape[:3] != B.shape[:3]:
        die(f"--vote: {args.vote[0]} and {args.vote[1]} differ, {A.shape} and {B.shape}: expected "
            "the same number of images, pair by pair, of the same size")
    if None not in prompts and prompts[0] != prompts[1]:
        die("--vote: labels or captions of the two sets differ; pairs must show the same thing")
    return A, B, prompts[0] or prompts[1] or [""] * len(A)


class Ballot:
    """The pairs, the order in which they are shown, and the votes, each written to a file at once.
    Goes on where the file stands."""

    def __init__(self, args, A, B, prompts):
        self.A, self.B, self.prompts, self.lock = A, B, prompts, threading.Lock()
        self.trials, self.votes = make_trials(len(A), args.num, args.repeats, args.seed), []
        md5 = hashlib.md5(A.tobytes() + B.tobytes()).hexdigest()
        header = dict(A=args.vote[0], B=args.vote[1], digest=md5, seed=args.seed, num=args.num,
                      repeats=args.repeats)
        if args.votes.exists() and args.votes.stat().st_size:
            found, self.votes = read_votes(args.votes)
            if any(found[k] != header[k] for k in ("digest", "seed", "num", "repeats")):
                die(f"--votes {args.votes} holds votes on other pairs: {found}; choose another "
                    "file")
            os.truncate(args.votes, args.votes.read_bytes().rindex(b"\n") + 1)
        args.votes.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(args.votes, "ab")
        if not args.votes.stat().st_size:
            self.append(header)

    def append(self, line):
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def show(self):
        """What the page needs for the next trial; it never learns which side is A."""
        state = dict(trial=len(self.votes), trials=len(self.trials))
        if len(self.votes) < len(self.trials):
            pair, a_left, _ = self.trials[len(self.votes)]
            for side, images in zip(("left", "right"), (self.A, self.B) if a_left else
                                    (self.B, self.A)):
                H, W, _ = images[pair].shape
                rgba = np.full((H, W, 4), 255, np.uint8)
                rgba[:, :, :3] = images[pair]
                state[side] = base64.b64encode(rgba.tobytes()).decode()
            state.update(prompt=self.prompts[pair], width=W, height=H)
        return state

    def take(self, trial, choice, seconds):
        """A vote counts for the trial that the page showed; a second one, sent late, does not."""
        if choice == "undo" and trial == len(self.votes) > 0:
            self.append({"undo": trial - 1})
            self.votes.pop()
        elif choice in ("left", "right", "tie") and trial == len(self.votes) < len(self.trials):
            pair, a_left, repeat = self.trials[trial]
            line = dict(trial=trial, pair=pair, left="AB"[not a_left], repeat=repeat,
                        vote="tie" if choice == "tie" else "AB"[(choice == "left") != a_left],
                        seconds=seconds, time=time.strftime("%Y-%m-%dT%H:%M:%S"))
            self.append(line)
            self.votes.append(line)


class Handler(http.server.BaseHTTPRequestHandler):
    """GET / is the page; POST / {trial, vote, seconds} takes a vote and answers what to show next.
    self.server has the ballot, and the token that only the page knows."""

    timeout = 10  # seconds for a request to come in

    def answer(self, code, body=b"", kind="text/plain"):
        self.send_response(code)
        nonce = f"'nonce-{self.server.token}'"
        for key, value in (
                ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
                ("Content-Security-Policy", "default-src 'none'; connect-src 'self'; "
                 "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
                 f"script-src {nonce}; style-src {nonce}")):
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def mine(self):
        """Is the request for this server's own name? A page elsewhere could point its name here."""
        port = self.server.server_address[1]
        return self.headers.get("Host") in (f"127.0.0.1:{port}", f"localhost:{port}")

    def do_GET(self):
        if not self.mine():
            return self.answer(403)
        if self.path != "/":
            return self.answer(404)
        self.answer(200, PAGE.replace("TOKEN", self.server.token).encode(), "text/html")

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not self.mine() or not secrets.compare_digest(
                self.headers.get("X-Token", "").encode(), self.server.token.encode()):
            return self.answer(403)
        if not re.fullmatch("[0-9]{1,3}", length):
            return self.answer(413)
        try:
            asked = json.loads(self.rfile.read(int(length)))
            trial, choice, seconds = asked["trial"], asked["vote"], float(asked["seconds"])
            if type(trial) is not int or not 0 <= seconds < 1e6:
                raise ValueError
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            return self.answer(400)
        try:
            with self.server.ballot.lock:
                self.server.ballot.take(trial, choice, round(seconds, 2))
                body = json.dumps(self.server.ballot.show()).encode()
        except OSError:  # disk full: the vote is not counted
            return self.answer(500)
        self.answer(200, body, "application/json")

    def log_message(self, *_):
        pass


def make_server(args):
    """The server of the page, not yet running. The port is taken before anything is written."""
    pairs = read_pairs(args)
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except OSError as e:
        die(f"--port {args.port} cannot be had ({e.strerror}); choose another, or 0 for a free one")
    server.ballot, server.token = Ballot(args, *pairs), secrets.token_urlsafe(16)
    server.handle_error = lambda *_: None  # a browser that leaves early
    return server


def vote(args):
    """Serves the page until Ctrl-C."""
    server = make_server(args)
    votes, trials = server.ballot.votes, len(server.ballot.trials)
    say(f"{trials} trials, {len(votes)} done; open http://127.0.0.1:{server.server_address[1]}/\n"
        f"votes go to {args.votes}; Ctrl-C ends, the same command goes on")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
        say(f"\n{len(votes)} of {trials} done; now try: python {NAME}.py --tally {args.votes}")


def wilson(won, n, z=1.959964):
    """95 % interval of a share, won of n (Wilson 1927); within 0..1 also for few votes."""
    p, q = won / n, z * z / n
    centre, half = (p + q / 2) / (1 + q), z * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    return max(0.0, centre - half), min(1.0, centre + half)


def sign_test(won, lost):
    """How often two equal models would give a split at least as uneven: exact, two-sided."""
    n, ways, tail = won + lost, 1, 0
    for k in range(min(won, lost) + 1):  # ways = n over k
        tail, ways = tail + ways, ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def votes_needed(p):
    """Decided votes that show, at 5 % and in 4 of 5 studies, that a true share p is not 1/2
    (Fleiss et al. 2003, with their correction for whole votes)."""
    gap = abs(p - 0.5)
    n = ((1.959964 / 2 + 0.841621 * math.sqrt(p * (1 - p))) / gap) ** 2
    return math.ceil(n / 4 * (1 + math.sqrt(1 + 2 / (n * gap))) ** 2)


def tally(args):
    """Counts the votes of one or more raters as on the slide: win, tie, lose."""
    for path in args.tally:
        if not path.exists():
            die(f"{path} is not there; make it with --vote A.npz B.npz")
    files = [read_votes(path) for path in args.tally]
    header = files[0][0]
    for path, (other, _) in zip(args.tally, files):
        if other["digest"] != header["digest"]:
            die(f"{path} holds votes on other images than {args.tally[0]}")
    score, agree, again, sides = Counter(), 0, 0, Counter()
    for _, votes in files:
        first = {v["pair"]: v["vote"] for v in votes if not v["repeat"]}
        votes = [v for v in votes if v["pair"] in first]
        for v in votes:
            if v["repeat"]:
                again, agree = again + 1, agree + (v["vote"] == first[v["pair"]])
            else:  # votes of several raters on one pair are not independent: their majority counts
                score[v["pair"]] += {"A": 1, "B": -1, "tie": 0}[v["vote"]]
            sides[v["vote"] == v["left"]] += v["vote"] != "tie"
    n = len(score)
    if not n:
        die(f"{args.tally[0]}: no votes yet")
    won, lost = sum(s > 0 for s in score.values()), sum(s < 0 for s in score.values())
    what = "votes" if len(files) == 1 else f"pairs, by the majority of {len(files)} raters,"
    say(f"A = {header['A']}\nB = {header['B']}\n{n} {what.rstrip(',')}\n")
    say(f"{'':12}win (%)   tie (%)   lose (%)")
    say(f"{'A over B':12}{100 * won / n:<10.1f}{100 * (n - won - lost) / n:<10.1f}"
        f"{100 * lost / n:<.1f}\n")
    if decided := won + lost:
        low, high = wilson(won, decided)
        p = sign_test(won, lost)
        say(f"of {decided} decided {what} A won {100 * won / decided:.1f} %, 95 % interval "
            f"{100 * low:.1f} to {100 * high:.1f} % (Wilson's, approximate)\n"
            f"sign test, exact: p = {p:.3g}, a difference is {'' if p < 0.05 else 'not '}shown at "
            "5 %")
        if p >= 0.05:
            rate = won / decided if won != lost else 0.6
            need = votes_needed(rate)
            say(f"if {100 * rate:.1f} % is the truth, a study of {need:,} decided votes, about "
                f"{max(0, need - decided):,} more, would show it 4 times in 5 (a number to fix "
                "before: testing after each vote is no test)")
        left = sides[True] + sides[False]
        say(f"position: the left one was chosen in {100 * sides[True] / left:.1f} % of {left} "
            f"decided votes (p = {sign_test(sides[True], sides[False]):.2g} if sides are alike)")
    if again:
        say(f"self-agreement: {agree} of {again} hidden repeats were answered as before")


# ---- Plumbing: copied, the same in every file; skip it on the first reading ----------------------

HERE, NAME = Path(__file__).resolve().parent, Path(__file__).stem
RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's
DATASETS = {  # name: mirrors, {file: md5, or sha1}
    "mnist": (["https://ossci-datasets.s3.amazonaws.com/mnist/",
               "https://storage.googleapis.com/cvdf-datasets/mnist/"], {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}),
    "fashion": (["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                 "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"], {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}),
    "cifar10": (["https://www.cs.toronto.edu/~kriz/"], {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c"}),
}
# A font of 3 x 5 pixels: five octal digits a character, one a row, their bits the pixels.
FONT = dict(zip(
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz .-+=/_:,()%>", (
        "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717 25755 65656 34443 65556 74647 "
        "74644 34553 55755 72227 11152 55655 44447 57755 65555 25552 65644 25563 65655 34216 72222 "
        "55557 55552 55775 55255 55222 71247 03553 44656 03443 11353 02563 12722 03536 44655 20222 "
        "10116 44565 62227 07755 06555 02552 06564 03531 05644 03416 27221 05553 05552 05577 00525 "
        "05536 07247 00000 00002 00700 02720 07070 11244 00007 02020 00024 12221 42224 51245 42124"
    ).split()))


def die(message):
    """Bad input: one line, exit code 2, no traceback."""
    print(f"{NAME}.py: {message}", file=sys.stderr)
    sys.exit(2)


def say(message, end="\n"):
    if RANK == 0:
        print(message, end=end, flush=True)


def positive(text):
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text):
    """A number from 0 to 1, for argparse."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return float(text)


def pick_device(device):
    """auto: cuda, then mps, then cpu."""
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    return best if device == "auto" else device


def use_device(args):
    """Settles args.device and args.bf16, joins the processes of torchrun."""
    args.device = pick_device(args.device)
    cuda = args.device.startswith("cuda")
    try:
        if WORLD > 1 and cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        die(f"--device {args.device} cannot be used ({str(e).splitlines()[0]}); try --device cpu")
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32, where float32 is left at all
    has = torch.cpu.get_capabilities() if args.device == "cpu" else {}
    args.bf16 = bool(torch.cuda.is_bf16_supported(False) if cuda else
                     has.get("amx_bf16") or has.get("avx512_bf16"))


def setup(args):
    """use_device, the output folder, and the first line printed."""
    use_device(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.train and RANK == 0:
        claim(args)
    say(f"{args.device}, torch {torch.__version__}, {'bf16' if args.bf16 else 'float32'}, "
        f"size {args.size}, writing to {args.out}")


def claim(args):
    """Refuses an output folder that another training writes to; ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    args.lock = open(args.out / ".lock", "w")
    try:
        fcntl.lockf(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(f"--out {args.out}: another training is writing there; choose another folder")
    except OSError:  # a file system without locks
        pass


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def write_whole(path, data):
    """Writes a file whole or not at all: under another name first, then moved into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def digest(data, like):
    """md5, sha1 or sha256 of bytes as hex, whichever is as long as `like`."""
    return hashlib.new({32: "md5", 40: "sha1", 64: "sha256"}[len(like)], data).hexdigest()


def fetch(urls, path, checksum):
    """Downloads path from the first mirror that has the right bytes, and returns them."""
    faults = []
    for url in urls:
        say(f"downloading {url}")
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                data = response.read()
        except Exception as e:  # no network, 404, cut off
            faults.append(f"{url}: {e}")
            continue
        if digest(data, checksum) == checksum:
            write_whole(path, data)
            return data
        faults.append(f"{url}: wrong bytes")
    die(f"{path} is missing and could not be downloaded ({'; '.join(faults)}); get it from "
        f"{urls[0]} (checksum {checksum}) and put it there")


def data_file(args, file):
    """The bytes of a data set's file: downloaded if missing, refused if not the official ones."""
    (mirrors, sums), path = DATASETS[args.data], args.data_dir / args.data / file
    if not path.exists() and args.data == "cifar10":
        name = next(iter(sums))  # all files come in one archive
        archive = fetch([m + name for m in mirrors], path.with_name(name), sums[name])
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                if (name := Path(member.name).name) in sums:
                    write_whole(path.with_name(name), tar.extractfile(member).read())
    elif not path.exists():
        fetch([m + file for m in mirrors], path, sums[file])
    data = path.read_bytes()
    if (found := digest(data, sums[file])) != sums[file]:
        die(f"{path} is cut off or altered: {len(data):,} bytes with checksum {found}, expected "
            f"{sums[file]}; delete it, and it is downloaded anew")
    return gzip.decompress(data) if file.endswith(".gz") else data


def have_data(args):
    """Is all of --data on this disk, so that nothing need be downloaded?"""
    if args.data not in DATASETS:
        return Path(args.data).exists()
    files = [f for f in DATASETS[args.data][1] if not f.endswith(".tar.gz")]
    return all((args.data_dir / args.data / f).exists() for f in files)


def load_data(args, split):
    """Images (N, C, H, W) uint8 and labels (N,) int64 or None, all on the device; split is "train"
    or "test", which in a file of your own is every tenth image."""
    if args.data in ("mnist", "fashion"):
        name = {"train": "train", "test": "t10k"}[split]
        images, labels = (np.frombuffer(data_file(args, f"{name}-{kind}-ubyte.gz"), np.uint8)
                          for kind in ("images-idx3", "labels-idx1"))
        images, labels = images[16:].reshape(-1, 1, 28, 28), labels[8:]  # behind their headers
    elif args.data == "cifar10":
        names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        records = np.frombuffer(b"".join(data_file(args, f"{n}.bin") for n in names), np.uint8)
        records = records.reshape(-1, 3073)  # a label, then planes of red, green and blue
        labels, images = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32)
    else:
        images, labels = own_data(args.data)
        part = (np.arange(len(images)) % 10 == 1) == (split == "test")
        images, labels = images[part], labels if labels is None else labels[part]
    images = torch.from_numpy(images.copy()).to(args.device)
    if labels is not None:
        labels = torch.from_numpy(labels.astype(np.int64)).to(args.device)
    return images, labels


def own_data(path, flag="--data"):
    """Images (N, C, H, W) uint8 and labels (N,) or None of a .npy or .npz file."""
    least, names = (2, f"{', '.join(DATASETS)} or ") if flag == "--data" else (1, "")
    if not path.endswith((".npy", ".npz")):
        die(f"{flag} {path} is not known; choose {names}a .npy or .npz file")
    try:
        file = np.load(path)
        named = not isinstance(file, np.ndarray)
        arrays = {k: np.asarray(file[k]) for k in file.files} if named else {"images": file}
    except Exception as e:
        die(f"{flag} {path} cannot be read: {e}")
    images, labels = arrays.get("images", arrays.get("arr_0")), arrays.get("labels")
    found = ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in arrays.items())
    if (images is None or images.dtype != np.uint8 or images.ndim not in (3, 4)
            or len(images) < least or images.ndim == 4 and images.shape[3] not in (1, 3)):
        die(f"{flag} {path}: expected 'images', uint8 of (N, H, W) or (N, H, W, 1 or 3), N at "
            f"least {least}; found {found}")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"
                               or labels.min() < 0 or len(np.unique(labels)) != labels.max() + 1):
        die(f"{flag} {path}: expected 'labels', one an image, from 0 to K - 1, each at least once; "
            f"found {found}")
    return images.reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2), labels


def to_float(x):
    """uint8 0..255 -> float -1..1; floats pass."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def grid(images, cols, width=900):
    """Images (N, C, H, W) uint8 -> a picture (H', W', 3), row by row, enlarged to about width."""
    x = images.cpu().numpy().transpose(0, 2, 3, 1)  # (N, H, W, C)
    x = np.concatenate([x, np.zeros((-len(x) % cols, *x.shape[1:]), np.uint8)])
    x, k = x.repeat(3 // x.shape[3], 3), max(1, min(8, width // (cols * x.shape[2])))
    x = np.pad(x.repeat(k, 1).repeat(k, 2), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=90)
    N, H, W, _ = x.shape
    return x.reshape(N // cols, cols, H, W, 3).swapaxes(1, 2).reshape(N // cols * H, cols * W, 3)


def stack(pictures):
    """Pictures (H, W, 3) one below the other, white to their right."""
    W = max(p.shape[1] for p in pictures)
    return np.concatenate([np.pad(p, ((0, 0), (0, W - p.shape[1]), (0, 0)), constant_values=255)
                           for p in pictures])


def save_png(path, frames, fps=8):
    """Writes frames (F, H, W, 3) uint8; several become an animated PNG, which browsers play."""
    F, H, W, _ = frames.shape

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", W, H, 8, 2, 0, 0, 0))
    out += chunk(b"acTL", struct.pack(">2I", F, 0)) if F > 1 else b""
    for f, frame in enumerate(frames):  # a 0 before each row: no filter
        data = zlib.compress(np.pad(frame.reshape(H, W * 3), ((0, 0), (1, 0))).tobytes())
        if F > 1:  # chunks of an animation are numbered: fcTL 0, IDAT, fcTL 1, fdAT 2, fcTL 3, ...
            number = max(0, 2 * f - 1)
            out += chunk(b"fcTL", struct.pack(">5I2H2B", number, W, H, 0, 0, 1, fps, 0, 0))
        out += chunk(b"fdAT", struct.pack(">I", 2 * f) + data) if f else chunk(b"IDAT", data)
    write_whole(path, out + chunk(b"IEND", b""))


def draw_line(picture, p, q, colour, thick=1):
    """A line from p to q, (column, row) each, into picture (H, W, 3), cut at its borders."""
    n = int(max(abs(q[0] - p[0]), abs(q[1] - p[1]))) + 2
    cols, rows = (np.linspace(a, b, n).round().astype(int) for a, b in zip(p, q))
    for k in range(thick * thick):
        r, c = rows + k // thick, cols + k % thick
        inside = (r >= 0) & (r < picture.shape[0]) & (c >= 0) & (c < picture.shape[1])
        picture[r[inside], c[inside]] = colour


def draw_text(picture, text, col, row, colour=(0, 0, 0)):
    """Text, 10 pixels high, into picture (H, W, 3) from (col, row) on, as much as fits."""
    for i, char in enumerate(text[:(picture.shape[1] - col) // 8]):
        bits = np.array([[int(d) >> s & 1 for s in (2, 1, 0)] for d in FONT.get(char, FONT[" "])])
        bits = bits.repeat(2, 0).repeat(2, 1).astype(bool)
        picture[row:row + 10, col + 8 * i:col + 8 * i + 6][bits] = colour


def caption(text, width):
    """A white strip (18, width, 3) with text."""
    strip = np.full((18, width, 3), 255, np.uint8)
    draw_text(strip, text, 4, 4)
    return strip


def ticks(low, high, log):
    """About five round numbers in low..high; log: of exponents, those of 1, 2, 3, 5, 7, 10, ..."""
    if log:
        for digits in ((1, 2, 3, 5, 7), (1, 3), (1,)):
            marks = [k + math.log10(m) for k in range(math.floor(low), math.ceil(high))
                     for m in digits]
            marks = [m for m in marks if low <= m <= high]
            if len(marks) < 9:
                return marks
        return marks[::len(marks) // 4]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def plot(curves, xlabel, ylabel="", log=False, W=900, H=400):
    """Curves {name: (xs, ys)} as a picture (H, W, 3); log: the vertical axis is logarithmic."""
    picture, left, right, top, bottom = np.full((H, W, 3), 255, np.uint8), 100, W - 50, 30, H - 45
    scale = (lambda y: np.log10(np.maximum(y, 1e-12))) if log else np.array
    curves = {name: (np.array(x, float), scale(y).astype(float)) for name, (x, y) in curves.items()}
    xs, ys = (np.concatenate([c[i] for c in curves.values()]) for i in (0, 1))
    xs, ys = ((v.min(), max(v.max(), v.min() + 1e-9)) for v in (xs, ys))
    col = lambda x: left + (x - xs[0]) / (xs[1] - xs[0]) * (right - left)
    row = lambda y: bottom - (y - ys[0]) / (ys[1] - ys[0]) * (bottom - top)
    for y in ticks(*ys, log):
        draw_line(picture, (left, row(y)), (right, row(y)), (225, 225, 225))
        draw_text(picture, f"{10**y if log else y:.3g}", 8, int(row(y)) - 5)
    for x in ticks(*xs, False):
        draw_text(picture, f"{x:g}", int(col(x)) - 4 * len(f"{x:g}"), bottom + 10)
    draw_text(picture, xlabel, (left + right) // 2 - 4 * len(xlabel), H - 16)
    draw_text(picture, ylabel, 8, 8)
    for i, (name, (x, y)) in enumerate(curves.items()):
        colour = ((31, 90, 180), (220, 80, 20), (30, 140, 60), (150, 60, 160))[i % 4]
        for k in range(len(x) - 1):
            draw_line(picture, (col(x[k]), row(y[k])), (col(x[k + 1]), row(y[k + 1])), colour, 2)
        draw_text(picture, name, left + 150 * i, 12, colour)
    return picture


def save_loss(out, history):
    """loss.csv and loss.png from history [(step, loss), ...]."""
    rows = "".join(f"{step},{loss:.6f}\n" for step, loss in history)
    write_whole(out / "loss.csv", f"step,loss\n{rows}".encode())
    save_png(out / "loss.png", plot({"loss": list(zip(*history))}, "step", log=True)[None])


def save_checkpoint(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def read_checkpoint(path):
    """A checkpoint that this file wrote, on the CPU; nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not compare checksums
                raise ValueError(damaged)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        die(f"{path} is not there; train first: python {NAME}.py --train")
    except Exception as e:
        die(f"{path} is no checkpoint, or a damaged one ({type(e).__name__})")
    file = ckpt.get("file") if isinstance(ckpt, dict) else None
    if file != NAME or "config" not in ckpt:
        die(f"{path} is no checkpoint of {NAME}.py{f', but of {file}.py' if file else ''}")
    return ckpt


def load_state(part, ckpt, key):
    """Puts ckpt[key] into a module or optimiser, or says in a line that it does not fit."""
    try:
        part.load_state_dict(ckpt[key])
    except KeyError:
        die(f"the checkpoint has no {key}: it was made to sample, and cannot be trained further")
    except (RuntimeError, ValueError):
        die(f"the checkpoint's {key} does not fit; leave out the flags that shape the network")


def ctrl_c():
    """A list that the first Ctrl-C fills, for the loop to end in good order; the second kills."""
    pressed = []

    def handler(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if WORLD == 1:
        signal.signal(signal.SIGINT, handler)
    return pressed

# ---- Main ----------------------------------------------------------------------------------------

def main(argv=None):
    args, ckpt = parse_args(argv), None
    if not any((args.sets, args.train, args.sweep, args.vote, args.tally)):
        return parse_args(["--help"])
    if WORLD > 1:
        die("one process is enough for this file; start it with python instead of torchrun")
    path = args.out / "model.pt"
    if args.train and not args.resume and path.exists():
        if (old := read_checkpoint(path)["config"]["data"]) != args.data:
            die(f"--out {args.out} holds a model of {old}; choose another --out for {args.data}")
    if args.resume:
        ckpt = read_checkpoint(path)
        args = parse_args(argv, ckpt["config"])
        for key in ("data", "size", "width"):
            if getattr(args, key) != ckpt["config"][key]:
                die(f"--{key} {getattr(args, key)}: {path} was trained with {ckpt['config'][key]}")
    try:
        if args.tally:
            return tally(args)
        if args.vote:
            return vote(args)
        if args.train or args.sweep:
            setup(args)
        else:
            use_device(args)
        if args.train:
            train(args, ckpt)
            ckpt = read_checkpoint(path)
            if args.export and ckpt["step"] == args.steps:  # not what Ctrl-C left
                small = {k: ckpt[k] for k in ("file", "config", "step")}
                small["model"] = {
                    k: v.half() for k, v in ckpt["model"].items() if v.is_floating_point()}
                save_checkpoint(args.export, small)
        elif args.features == "ours":
            if not path.exists() and (HERE / "pretrained" / f"{NAME}.pt").exists():
                path = HERE / "pretrained" / f"{NAME}.pt"
            ckpt = read_checkpoint(path)
            say(f"features of {path}, {ckpt['config']['data']}, step {ckpt['step']:,}")
        if args.sweep:
            sweep(args, ckpt)
        if args.sets:
            evaluate(args, ckpt)
    except OSError as e:  # disk full, no right to write
        die(f"{e.filename or args.out}: {e.strerror or e}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
