"""FID: how far is a set of samples from real images, and what is that number worth?

    python fid.py mnist:train samples.npz         samples against real digits, by our own features
    python fid.py cifar10:train samples/ --features inception       FID, of a folder of PNG files
    python fid.py --train                         train the classifier whose features are "ours"

Make samples.npz, for instance, by `python ddpm.py --sample --num 1000 --save samples.npz`.

Slides     Evaluation, Human Evaluation, Frechet Distance, FID: Frechet Inception Distance
Equations  distance   d_F = |mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2))
           bias       E d_F from N samples = d_F + C / N + ...,  with a C that differs by model
           KID        E k(x, x') + E k(y, y') - 2 E k(x, y),     k(x, y) = (x . y / D + 1)^3
Notation   X, Y (N, D) features of real images and of samples; mu (D,), S (D, D) their mean and
           covariance (r: real, g: generated); images (N, C, H, W) uint8
Papers     Dowson & Landau 1982 (d_F of Gaussians); Heusel et al. 2017 (FID); Binkowski et al. 2018
           (KID); Kynkaanniemi et al. 2019 (precision, recall); Chong & Forsyth 2020 (infinite N);
           Szegedy et al. 2015 (Inception v3); Parmar et al. 2022 (resizing)
"""
import argparse
import gzip
import io
import math
import os
import re
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

SIZES = ("small", "base")
HPARAMS = {  # each row is a flag; --size picks the column
    "width": (32, 96, "channels of the first layer; the features are 4 times as many"),
    "steps": (1200, 8000, "training steps"),
    "batch_size": (128, 512, "images per step"),
    "lr": (4e-3, 4e-3, "peak learning rate"),
    "flip": (0.0, 0.0, "share of images mirrored in training; 0 for digits"),
    "every": (500, 1000, "steps between checkpoints"),
}

# ---- 1. The distance (slides Frechet Distance, FID) ----------------------------------------------
#
# Between two curves, the Frechet distance is the shortest leash for which a man and a dog can walk
# along them. Between two distributions: over all ways of pairing their points, the least mean
# squared gap. For two Gaussians it is the slide's d_F, a squared distance.


def gaussian(X):
    """Fit a Gaussian to features X (N, D): mean (D,) and covariance (D, D), float64."""
    X = X.double()
    return X.mean(0), torch.cov(X.T)


def root(S):
    """A (D, r) with A A^T = S (D, D), of rank r. ValueError if S is not a covariance matrix."""
    A, failed = torch.linalg.cholesky_ex(S)
    if not failed and A.diagonal().min() > 1e-6 * A.diagonal().max():
        return A  # full rank: several times as fast as eigenvalues
    lam, V = torch.linalg.eigh(S)  # ascending
    if not lam[0] >= -1e-6 * lam[-1].abs():  # NaN is refused too
        raise ValueError(f"not a covariance matrix: it has the eigenvalue {lam[0]:.3g}")
    keep = lam > len(S) * torch.finfo(S.dtype).eps * lam[-1]
    return V[:, keep] * lam[keep].sqrt()


def frechet_distance(mu1, S1, mu2, S2):
    """d_F of two Gaussians, a float: means (D,), covariances (D, D), torch or numpy."""
    mu1, S1, mu2, S2 = (torch.as_tensor(a).cpu().double() for a in (mu1, S1, mu2, S2))
    if mu1.shape != mu2.shape or not S1.shape == S2.shape == 2 * mu1.shape:
        raise ValueError(f"shapes differ: {[list(a.shape) for a in (mu1, S1, mu2, S2)]}; "
                         "are both of the same --features?")
    # S1 S2 is not symmetric, but with S1 = A A^T and S2 = B B^T it has the eigenvalues of
    # (A^T B)(A^T B)^T, so the trace of its root is the sum of the singular values of A^T B. No root
    # is taken after the product: a rounding error e stays e, and does not become sqrt(e).
    trace = torch.linalg.svdvals(root(S1).T @ root(S2)).sum()
    return float((mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * trace)


def distance_at_infinity(mu, S, Y, sizes=15):
    """d_F between the Gaussian (mu, S) and infinitely many samples like Y (N, D), a float: the line
    through d_F at several N, as a function of 1 / N, meets 1 / N = 0 there (Chong & Forsyth 2020).

    Y is in random order, or sorted by class: every evenly spaced part of it must be a fair sample.
    The slope C depends on the model, so that an equal N for all models does not make d_F fair. NaN
    if N is at most 4 D: then the covariances of the smallest parts are nearly singular.
    """
    if len(Y) <= 4 * Y.shape[1]:
        return math.nan
    numbers = np.linspace(len(Y) / 3, len(Y), sizes).astype(int)
    parts = [Y[torch.arange(n) * len(Y) // n] for n in numbers]
    distances = [frechet_distance(mu, S, *gaussian(part)) for part in parts]
    return float(np.polyfit(1 / numbers, distances, 1)[1])


# ---- 2. Other numbers (slide FID: "many others have been proposed") ------------------------------


def kid(X, Y):
    """Kernel distance of X (N, D) and Y (M, D), a float: unbiased at every N, so that it may be
    slightly negative. It averages over all pairs of images, which lowers its variance."""
    X, Y = X.double(), Y.double()

    def kernel(A, B):
        return (A @ B.T / A.shape[1] + 1) ** 3

    def mean_within(A):  # over pairs of two different images
        total = sum(kernel(a, A).sum() for a in A.split(1000))
        itself = (A.square().mean(1) + 1) ** 3
        return (total - itself.sum()) / (len(A) * (len(A) - 1))

    between = sum(kernel(x, Y).sum() for x in X.split(1000)) / (len(X) * len(Y))
    return float(mean_within(X) + mean_within(Y) - 2 * between)


def precision_recall(X, Y, k=3):
    """Precision: the share of samples Y (N, D) within the real manifold, the union of balls around
    the points of X (N, D), each with the distance to its k-th nearest neighbour as its radius.
    Recall: the share of X within the manifold of Y. Both depend on N: compare at equal N only."""
    n = min(len(X), len(Y))
    center = X.double().mean(0)  # distances in float32 are accurate only near 0
    X, Y = ((a[torch.arange(n) * len(a) // n] - center).float() for a in (X, Y))

    def share_within(points, centers):
        radius = torch.cat([torch.cdist(c, centers).kthvalue(min(k + 1, n), dim=1).values
                            for c in centers.split(1000)])  # k + 1: the nearest is itself
        within = [(torch.cdist(p, centers) <= radius).any(dim=1) for p in points.split(1000)]
        return float(torch.cat(within).float().mean())

    return share_within(Y, X), share_within(X, Y)


# ---- 3. Inception v3 (slide FID: "in the feature space of Inception v3") -------------------------
#
# FID's network is a TensorFlow graph of 2015, which torchvision's Inception v3 is not: the weights
# are others, averages ignore the border, and the last block pools by the maximum.

Seq = nn.Sequential
ROW, COL = (1, 7), (7, 1)  # kernels
AVERAGE = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")  # ends in the first digits of its sha256


def resize_tf1(x, size):
    """Bilinear as in TensorFlow 1, (B, C, H, W) float -> (B, C, size, size): pixel i of the result
    reads at i H / size, with no shift by half a pixel. (pytorch-fid shifts.)"""
    for dim in (3, 2):  # columns, then rows
        n = x.shape[dim]
        at = torch.arange(size, device=x.device) * (n / size)
        low = at.long().clamp(max=n - 1)
        part = (at - low).view(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * part
    return x


def conv(c_in, c_out, kernel, stride=1, pad=True):
    """Convolution, batch norm, ReLU; it keeps the size unless stride is 2 or pad is False."""
    padding = "same" if pad and stride == 1 else 0
    return Seq(nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
               nn.BatchNorm2d(c_out, eps=1e-3), nn.ReLU(inplace=True))


class Mixed(nn.ModuleList):
    """Branches side by side, concatenated."""

    def forward(self, x):
        return torch.cat([branch(x) for branch in self], dim=1)


def block_a(c, pooled):  # 35 x 35
    return Mixed([conv(c, 64, 1), Seq(conv(c, 48, 1), conv(48, 64, 5)),
                  Seq(conv(c, 64, 1), conv(64, 96, 3), conv(96, 96, 3)),
                  Seq(AVERAGE, conv(c, pooled, 1))])


def block_b(c):  # 35 x 35 -> 17 x 17
    return Mixed([conv(c, 384, 3, 2), Seq(conv(c, 64, 1), conv(64, 96, 3), conv(96, 96, 3, 2)),
                  nn.MaxPool2d(3, 2)])


def block_c(c, m):  # 17 x 17; 7 x 7 as 1 x 7 and 7 x 1
    single = Seq(conv(c, m, 1), conv(m, m, ROW), conv(m, 192, COL))
    double = Seq(conv(c, m, 1), conv(m, m, COL), conv(m, m, ROW), conv(m, m, COL),
                 conv(m, 192, ROW))
    return Mixed([conv(c, 192, 1), single, double, Seq(AVERAGE, conv(c, 192, 1))])


def block_d(c):  # 17 x 17 -> 8 x 8
    long = Seq(conv(c, 192, 1), conv(192, 192, ROW), conv(192, 192, COL), conv(192, 192, 3, 2))
    return Mixed([Seq(conv(c, 192, 1), conv(192, 320, 3, 2)), long, nn.MaxPool2d(3, 2)])


def block_e(c, pool):  # 8 x 8
    cross = lambda: Mixed([conv(384, 384, (1, 3)), conv(384, 384, (3, 1))])
    return Mixed([conv(c, 320, 1), Seq(conv(c, 384, 1), cross()),
                  Seq(conv(c, 448, 1), conv(448, 384, 3), cross()), Seq(pool, conv(c, 192, 1))])


def inception():
    """Images (B, 3, 299, 299) in [-1, 1] -> features (B, 2048)."""
    return Seq(
        conv(3, 32, 3, 2), conv(32, 32, 3, pad=False), conv(32, 64, 3), nn.MaxPool2d(3, 2),
        conv(64, 80, 1), conv(80, 192, 3, pad=False), nn.MaxPool2d(3, 2),
        block_a(192, 32), block_a(256, 64), block_a(288, 64), block_b(288),
        block_c(768, 128), block_c(768, 160), block_c(768, 160), block_c(768, 192),
        block_d(768), block_e(1280, AVERAGE), block_e(2048, nn.MaxPool2d(3, 1, 1)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten())


BRANCHES = {  # names in the published file, in the order of our blocks
    "a": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool",
    "b": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "c": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    "d": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "e": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool"}


def load_published(model, state):
    """Load the published state dict, whose names follow TensorFlow's graph, into inception()."""
    names = [f"Conv2d_{name}" for name in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    for block, kind in zip("5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split(), "aaabccccdee"):
        names += [f"Mixed_{block}.branch{branch}" for branch in BRANCHES[kind].split()]
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    theirs = [state[f"{name}.{part}"] for name in names for part in parts]
    ours = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(ours, theirs, strict=True)), strict=False)
    return model.eval()


def load_inception():
    """inception() with the published weights, downloaded once to the cache of torch.hub."""
    state = torch.hub.load_state_dict_from_url(WEIGHTS_URL, check_hash=True, weights_only=True)
    return load_published(inception(), state)


# ---- 4. Features f(I) of a set -------------------------------------------------------------------
# f is a function of images (B, C, H, W) uint8: features (B, D), and logits (B, classes) or None.


@torch.no_grad()
def summarise(f, images, labels, args, name):
    """What the report needs of a set, see describe()."""
    if len(images) < 2:
        raise ValueError(f"{name}: {len(images)} images; expected two or more")
    batches = tqdm(images.split(100), name, leave=False, disable=None)
    features, logits = zip(*(f(x.to(args.device)) for x in batches))
    logits = None if logits[0] is None else torch.cat(logits).cpu()
    return describe(torch.cat(features).float().cpu(), logits, labels)


def describe(X, logits=None, labels=None):
    """Features X (N, D), their mean and covariance; logits (N, classes) and labels (N,) or None."""
    mu, S = gaussian(X)
    return dict(n=len(X), X=X, mu=mu, S=S, logits=logits, labels=labels)


# ---- 5. Features of our own, for small images ----------------------------------------------------


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> features (B, 4 w), and logits (B, classes)."""

    def __init__(self, C, w, classes):
        super().__init__()
        self.body = Seq(
            conv(C, w, 3), nn.MaxPool2d(2), conv(w, 2 * w, 3), conv(2 * w, 2 * w, 3),
            nn.MaxPool2d(2), conv(2 * w, 4 * w, 3), conv(4 * w, 4 * w, 3))
        self.head = nn.Linear(4 * w, classes)

    def forward(self, x):
        features = self.body(x).float().mean((2, 3))  # over all positions, as in Inception
        return features, self.head(features)


def augment(x, flip):
    """A random affine map near the identity for every image of x (B, C, H, W), so that the network
    cannot memorise pixels. A share flip of them is mirrored."""
    theta = torch.eye(2, 3) + 0.1 * (2 * torch.rand(len(x), 2, 3) - 1)
    mirror = torch.rand(len(x)) < flip
    theta[mirror, 0] *= -1
    places = F.affine_grid(theta.to(x.device), x.shape, align_corners=False)
    return F.grid_sample(x, places, padding_mode="border", align_corners=False)


def build(args):
    model = Classifier(args.shape[0], args.width, args.classes)
    return model.to(args.device, memory_format=torch.channels_last)


def train(args, ckpt=None):
    """Train the classifier, from scratch or from a checkpoint."""
    images, labels = (a.to(args.device) for a in load_data(args.data, "train", args.data_dir))
    args.shape = list(images.shape[1:])  # C, H, W
    args.classes = int(labels.max()) + 1
    if args.classes < 2:
        raise ValueError(f"--data {args.data} has one class; a classifier needs labels")
    torch.manual_seed(args.seed)
    model = build(args).train()
    opt = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0.02, fused=True)
    start = ckpt["step"] if ckpt else 0
    if ckpt:
        model.load_state_dict(ckpt["model"])
        opt.load_state_dict(ckpt["optimizer"])
    say(f"{args.device}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(images):,} images of {args.data}, {args.steps:,} steps of {args.batch_size}")
    if args.compile:
        model.compile()
    bar = tqdm(range(start + 1, args.steps + 1), initial=start, total=args.steps)
    for step in bar:
        torch.manual_seed(args.seed * 10_000_000 + step)  # --resume continues exactly
        index = torch.randint(len(images), (args.batch_size,), device=args.device)
        x, y = augment(to_float(images[index]), args.flip), labels[index]
        for group in opt.param_groups:  # warm up over a tenth, then to almost 0
            group["lr"] = args.lr * min(1, 10 * step / args.steps) * (1 - (step - 1) / args.steps)
        with autocast(args):
            logits = model(x)[1]
        loss = F.cross_entropy(logits.float(), y, label_smoothing=0.05)
        loss.backward()
        opt.step()
        opt.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % args.every == 0 or step == args.steps:
            save_checkpoint(args, step, model=model.state_dict(), optimizer=opt.state_dict())
    images, labels = load_data(args.data, "test", args.data_dir)
    test = summarise(lambda x: model.eval()(to_float(x)), images, labels, args, "test")
    right = (test["logits"].argmax(1) == labels).float().mean()
    say(f"accuracy on {args.data}:test: {right:.4f}")


def choose_features(args):
    """f, as --features asks, and the name of the distance in its space."""
    if args.features == "pixels":
        return lambda x: (x.flatten(1) / 255, None), "FD (pixels)"
    if args.features == "inception":
        net = load_inception().to(args.device, memory_format=torch.channels_last)

        def f(x):
            x = resize_tf1(x.expand(-1, 3, -1, -1).float(), 299)
            return net((x - 128) / 128), None

        return f, "FID"
    path = args.out / "model.pt"
    ckpt = load_checkpoint(path if path.exists() else HERE / "pretrained" / f"{NAME}.pt")
    shape = ckpt["config"]["shape"]
    model = build(parse_args(["--device", args.device], ckpt["config"])).eval()
    model.load_state_dict(ckpt["model"])

    def f(x):
        if shape[0] == 1 and x.shape[1] == 3 and (x == x[:, :1]).all():  # grey, saved as RGB
            x = x[:, :1]
        if list(x.shape[1:]) != shape:
            raise ValueError(f"images of shape {list(x.shape[1:])}, but the classifier was trained "
                             f"on {shape}: use --features inception, or --train one on such images")
        return model(to_float(x))

    return f, "FD (our features)"


# ---- 6. Sets of images ---------------------------------------------------------------------------


def read_images(spec, data_dir):
    """Images (N, C, H, W) uint8 and labels (N,) or None, of mnist:train, an .npz or .npy file, or a
    folder of PNG or JPEG files; or of a slice, as in x.npz[:1000]."""
    part = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", spec)
    source, first, last = part.groups() if part else (spec, "", "")
    rows = slice(int(first or 0), int(last) if last else None)
    name, _, split = source.partition(":")
    if name in URLS and split in ("train", "test"):
        images, labels = load_data(name, split, data_dir)
        return images[rows], labels[rows]
    labels = None
    if Path(source).is_dir():
        try:
            from PIL import Image
        except ImportError:
            raise ValueError("a folder of images needs Pillow: pip install pillow") from None
        kinds = (".png", ".jpg", ".jpeg")
        paths = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in kinds)
        images = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths])
    elif source.endswith(".npz"):
        file = np.load(source)
        images, labels = file["arr_0" if "arr_0" in file else "images"], file.get("labels")
    else:
        images = np.load(source)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"found {images.dtype} {images.shape}, expected uint8 (N, H, W, 1 or 3)")
    if labels is not None:
        if labels.shape != images.shape[:1] or labels.min() < 0:
            raise ValueError(f"found labels {labels.shape}, expected one from 0 for every image")
        labels = torch.from_numpy(labels.astype(np.int64))[rows]
    return torch.from_numpy(images[rows].transpose(0, 3, 1, 2).copy()), labels


def read_set(spec, f, args):
    """summarise() of what spec names; or mu and S alone, of an .npz that holds them, as written by
    --save-stats or pytorch-fid. ValueError if there is no such set."""
    try:
        if spec.endswith(".npz") and "mu" in (file := np.load(spec)):
            return dict(n=0, X=None, mu=file["mu"], S=file["sigma"], logits=None, labels=None)
        images, labels = read_images(spec, args.data_dir)
    except Exception as e:  # damaged files raise many types
        raise ValueError(f"{spec}: {e}") from None
    return summarise(f, images, labels, args, spec)


# ---- 7. The report -------------------------------------------------------------------------------


def measures(real, fake):
    """Every number of the report, by name; those that need images are left out without them."""
    found = {"distance": frechet_distance(real["mu"], real["S"], fake["mu"], fake["S"])}
    if fake["n"]:
        y = fake["labels"]
        order = torch.randperm(fake["n"]) if y is None else y.argsort(stable=True)
        found["  at infinite N"] = distance_at_infinity(real["mu"], real["S"], fake["X"][order])
    if real["n"] and fake["n"]:
        X, Y = (s["X"][torch.randperm(s["n"])[:10_000]] for s in (real, fake))
        found["KID x 1000"] = 1000 * kid(X, Y)
        found["precision"], found["recall"] = precision_recall(X, Y)
    if fake["logits"] is not None and fake["labels"] is not None:
        found["accuracy"] = float((fake["logits"].argmax(1) == fake["labels"]).float().mean())
    return found


def floor_of(real, fake, f, args):
    """Real images treated as if they were samples, up to as many of each class: the other split of
    a data set, or one part of REAL against the rest. Returns a reference and a set, or None."""
    name, _, split = args.sets[0].partition(":")
    other = {"train": "test", "test": "train"}.get(split)
    if name in URLS and other and not args.sets[1].startswith(f"{name}:"):
        images, labels = load_data(name, other, args.data_dir)
        rng = torch.Generator().manual_seed(args.seed)  # the same floor for all samples
        index = torch.randperm(len(images), generator=rng)
        if fake["labels"] is not None:
            counts = fake["labels"].bincount()
            index = torch.cat([index[labels[index] == c][:n] for c, n in enumerate(counts)])
        index = index[:fake["n"] or None]  # 0: unknown
        return real, summarise(f, images[index], labels[index], args, f"{name}:{other}")
    if real["n"] < 4:
        return None
    n, index = min(fake["n"] or real["n"], real["n"] // 2), torch.randperm(real["n"])
    return describe(real["X"][index[n:]]), describe(real["X"][index[:n]])


def report(args):
    """Compare two sets, and print every number beside its floor; or save mu and sigma of one."""
    f, title = choose_features(args)
    torch.manual_seed(args.seed)
    real = read_set(args.sets[0], f, args)
    if args.save_stats:  # as pytorch-fid reads and writes it
        return np.savez(args.save_stats, mu=real["mu"], sigma=real["S"])
    fake = read_set(args.sets[1], f, args)
    columns = {"samples": measures(real, fake)}
    if floor := floor_of(real, fake, f, args):
        columns[f"floor: {floor[1]['n']:,} real images"] = measures(*floor)
    say(f"{'':20}" + "".join(f"{name:<20}" for name in columns))
    for row in columns["samples"]:
        cells = [f"{column[row]:.4f}" if row in column else "-" for column in columns.values()]
        name = title if row == "distance" else row
        say(f"{name:20}" + "".join(f"{cell:<20}" for cell in cells))
    if 0 < fake["n"] <= len(fake["mu"]):
        say(f"{fake['n']:,} samples for {len(fake['mu']):,} features: the covariance is singular, "
            "and the distance far too large. Take more samples.")


# ---- 8. Votes (slide Human Evaluation) -----------------------------------------------------------


def preference(win, tie, lose):
    """The slide's table as shares, and what it leaves out: of the decided votes, the share that was
    won, its 95 % interval (Wilson 1927), and the p-value of a sign test: how often two equal models
    would give a split at least as uneven. Numbers of votes -> dict. (experiments/human_eval.py
    collects the votes.)"""
    n, z = win + lose, 1.96
    p, q = win / n, z * z / n
    center, half = (p + q / 2) / (1 + q), z * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    tail = sum(math.comb(n, i) for i in range(min(win, lose) + 1))
    total = win + tie + lose
    return {"win": win / total, "tie": tie / total, "lose": lose / total, "decided": p,
            "low": center - half, "high": center + half, "p": min(1.0, 2 * tail / 2**n)}


# ---- Plumbing: the same in every file; skip it on a first reading --------------------------------

HERE, NAME = Path(__file__).resolve().parent, Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
URLS = {"mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "fashion": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "cifar10": "https://www.cs.toronto.edu/~kriz/"}


def say(message):
    if RANK == 0:
        print(message, flush=True)


def die(message):
    """For mistakes of the user: one line, exit code 2."""
    print(f"{NAME}.py: {message}", file=sys.stderr)
    sys.exit(2)


def data_file(name, file, folder):
    """The content of a gzip file of a data set, downloaded if missing; gzip checks its CRC."""
    path, url = Path(folder) / name / file, URLS[name] + file
    try:
        if not path.exists():
            say(f"downloading {url}")
            path.parent.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(url, f"{path}.{RANK}.part")
            os.replace(f"{path}.{RANK}.part", path)
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as e:
        die(f"{path} is missing or damaged ({e}); get it from {url}")


def load_data(name, split, folder):
    """Images (N, C, H, W) uint8 and labels (N,) int64; split is train or test."""
    if name in ("mnist", "fashion"):
        part = {"train": "train", "test": "t10k"}[split]
        images = data_file(name, f"{part}-images-idx3-ubyte.gz", folder)
        labels = data_file(name, f"{part}-labels-idx1-ubyte.gz", folder)
        images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        labels = np.frombuffer(labels, np.uint8, offset=8)
    elif name == "cifar10":
        tar = tarfile.open(fileobj=io.BytesIO(data_file(name, "cifar-10-binary.tar.gz", folder)))
        files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{f}.bin").read() for f in files)
        records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)  # a label, then three planes
        images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
    else:
        try:
            with np.load(name) as file:
                images = file["images"].astype(np.uint8, casting="safe").transpose(0, 3, 1, 2)
                labels = file.get("labels", np.zeros(len(images), np.uint8))
            if images.shape[1] not in (1, 3):
                raise ValueError(f"{images.shape[1]} channels")
            part = (np.arange(len(images)) % 10 == 9) == (split == "test")  # a tenth for testing
            images, labels = images[part], labels[part]
        except Exception as e:
            die(f"--data {name}: expected {', '.join(URLS)}, or an .npz file with images "
                f"(N, H, W, 1 or 3) uint8 and labels (N,) from 0 ({e})")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def to_float(x):
    return x.float() / 127.5 - 1  # 0..255 -> -1..1


def save_checkpoint(args, step, **state):
    """Write OUT/model.pt; the rename is atomic, so a kill leaves the previous checkpoint whole."""
    names = [*HPARAMS, "data", "seed", "shape", "classes"]
    config = {name: value for name, value in vars(args).items() if name in names}
    torch.save(dict(file=NAME, config=config, step=step, **state), args.out / "model.part")
    os.replace(args.out / "model.part", args.out / "model.pt")


def load_checkpoint(path):
    """A checkpoint of this file, on the CPU; weights_only: nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not compare checksums
                raise ValueError(damaged)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt.get("file") != NAME:
            die(f"{path} is not a checkpoint of {NAME}.py, but of {ckpt.get('file')}")
        return ckpt
    except FileNotFoundError:
        die(f"{path} is missing: run --train first")
    except Exception as e:
        die(f"{path} is not a checkpoint, or damaged ({type(e).__name__})")


def autocast(args):
    """bf16 on GPUs and CPUs that compute in it."""
    device = args.device.split(":")[0]
    bf16 = (torch.cpu.get_capabilities().get("avx512_bf16", False) if device == "cpu"
            else torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.autocast(device, torch.bfloat16, enabled=bf16)


def parse_args(argv=None, config=None):
    """Flags; those not given come from config (of a checkpoint), then from the column of --size."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("sets", nargs="*", metavar="REAL FAKE", help="mnist:train, x.npz, x.npy, a folder of PNG "
        "or JPEG files; a slice:\nx.npz[:1000]; an .npz of mu and sigma")
    add("--train", action="store_true", help="train the classifier on --data")
    add("--resume", action="store_true", help="with --train: continue from OUT/model.pt")
    add("--save-stats", type=Path, help="write mu and sigma of REAL, as pytorch-fid does (.npz)")
    add("--features", choices=["ours", "inception", "pixels"], default="ours", help="ours: of the "
        "classifier in OUT/model.pt, or else in pretrained/;\ninception: FID as published")
    add("--compile", action="store_true", help="torch.compile: slow start, faster steps")
    add("--data", default="mnist", help="mnist, fashion, cifar10, or an .npz with images, labels")
    add("--data-dir", type=Path, default=HERE / "data", help="folder of the data sets")
    add("--out", type=Path, default=Path("out") / NAME, help="folder for everything written")
    add("--size", choices=SIZES, default="small", help="preset for the flags below")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, (*values, text) in HPARAMS.items():
        add("--" + name.replace("_", "-"), type=type(values[0]), help=f"{text} {tuple(values)}")
    column = SIZES.index(p.parse_known_args(argv)[0].size)
    p.set_defaults(**{name: row[column] for name, row in HPARAMS.items()} | (config or {}))
    return p.parse_args(argv)


def main(argv=None):
    args, ckpt = parse_args(argv), None
    if args.resume:
        ckpt = load_checkpoint(args.out / "model.pt")
        args = parse_args(argv, ckpt["config"])
    try:
        if args.train:
            args.out.mkdir(parents=True, exist_ok=True)
            train(args, ckpt)
        elif len(args.sets) == (1 if args.save_stats else 2):
            report(args)
        elif args.sets or args.save_stats:
            die("name two sets, REAL and FAKE, or one with --save-stats")
        else:
            parse_args(["--help"])
    except (ValueError, OSError) as e:
        die(e)


if __name__ == "__main__":
    main()
