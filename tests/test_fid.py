"""fid.py against closed forms, brute force, published numbers and, where they are installed, against
pytorch-fid, torch-fidelity, scipy and Pillow."""

import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fid
from inprocess import call

ROOT = Path(fid.__file__).parent
MNIST = ROOT / "data/mnist"


def cloud(n, d, seed=0, mix=True):
    """Points (n, d) of a Gaussian with a mean and a full covariance of its own."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    A = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5 if mix else torch.eye(d).double()
    return x @ A + torch.randn(d, generator=g, dtype=torch.float64)


def fd(X, Y):
    return fid.frechet_distance(*fid.gaussian(X), *fid.gaussian(Y))


def power(S, p):
    w, V = torch.linalg.eigh(S)
    return V * w**p @ V.T


def fd_of_data(X, Y):
    """The oracle: with centred, scaled data X1, X2 the trace is the nuclear norm of X1 X2^T; no
    covariance and no root is ever formed."""
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (X, Y))
    gap = (X.mean(0) - Y.mean(0)).square().sum()
    return float(gap + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


# ---- The distance (slide FID: Fréchet Inception Distance) ----------------------------------------


@pytest.mark.parametrize("n", [3, 10, 40, 300])
def test_distance_against_the_data_themselves(n):
    """d_F from mu and S equals the nuclear norm of the data matrices to 1e-10, for N < D too."""
    for seed in range(5):
        X, Y = cloud(n, 24, seed), cloud(n + 5, 24, seed + 50)
        assert fd(X, Y) == pytest.approx(fd_of_data(X, Y), rel=1e-10)


@pytest.mark.parametrize("n", [60, 400])
def test_distance_against_eigenvalues(n):
    """The slide's trace from the eigenvalues of S1 S2 directly: 1e-8 where that is well behaved."""
    X, Y = cloud(n, 20, 1), cloud(n, 20, 2)
    (m1, S1), (m2, S2) = fid.gaussian(X), fid.gaussian(Y)
    roots = torch.linalg.eigvals(S1 @ S2).sqrt().real.sum()
    slide = (m1 - m2).square().sum() + torch.trace(S1 + S2) - 2 * roots
    assert fd(X, Y) == pytest.approx(float(slide), rel=1e-8)


def test_distance_of_a_set_to_itself_is_zero():
    """Also with fewer points than features, repeated points, a constant feature, and no spread."""
    X = cloud(200, 32)
    flat, same = X.clone(), torch.ones(5, 8).double()
    flat[:, 3] = 7.0
    for x in (X, X[:10], X[:5].repeat(4, 1), flat, same):
        assert abs(fd(x, x)) <= 1e-9 * max(1.0, float(torch.cov(x.T).trace()))


def test_distance_closed_forms():
    """A shift, one dimension, diagonal and commuting covariances, scaling, rotation, symmetry."""
    X, Y = cloud(100, 6, 3), cloud(90, 6, 4)
    c = torch.arange(6.0).double()
    assert fd(X, X + c) == pytest.approx(55, rel=1e-10)
    a, b = X[:, :1], Y[:, :1]
    one = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert fid.frechet_distance(a.mean(0), a.var(0)[None], b.mean(0), b.var(0)[None]) == \
        pytest.approx(float(one), rel=1e-10)
    zero, A, B = np.zeros(3), np.diag([1.0, 4, 9]), np.diag([4.0, 1, 9])
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    assert fid.frechet_distance(zero, A, zero, B) == pytest.approx(2, abs=1e-12)
    assert fid.frechet_distance(zero, Q @ A @ Q.T, zero, Q @ B @ Q.T) == pytest.approx(2, abs=1e-12)
    assert fd(3 * X, 3 * Y) == pytest.approx(9 * fd(X, Y), rel=1e-10)
    assert fd(X, Y) == pytest.approx(fd(Y, X), rel=1e-10)
    R = torch.linalg.qr(cloud(6, 6, 9))[0]
    assert fd(X @ R, Y @ R) == pytest.approx(fd(X, Y), rel=1e-10)
    assert fd(X, Y) >= float((X.mean(0) - Y.mean(0)).square().sum())


def test_distance_is_the_least_mean_squared_gap():
    """What the slide's leash becomes: the best pairing of two Gaussians' points, x -> m2 + T (x -
    m1) with T S1 T = S2, has d_F as its mean squared gap; other pairings have more."""
    X, Y = cloud(400, 5, 5), cloud(400, 5, 6)
    (m1, S1), (m2, S2) = fid.gaussian(X), fid.gaussian(Y)

    half = power(S1, 0.5)
    T = power(S1, -0.5) @ power(half @ S2 @ half, 0.5) @ power(S1, -0.5)
    assert torch.allclose(T @ S1 @ T, S2)
    gap = lambda M: float((m1 - m2).square().sum() + torch.trace((M - torch.eye(5)) @ S1
                                                                 @ (M - torch.eye(5)).T))
    assert gap(T) == pytest.approx(fd(X, Y), rel=1e-10)
    Q = torch.linalg.qr(cloud(5, 5, 7))[0]
    other = power(S2, 0.5) @ Q @ power(S1, -0.5)  # the same covariance, another pairing
    assert torch.allclose(other @ S1 @ other.T, S2) and gap(other) > fd(X, Y) + 0.1


def test_distance_of_2048_features():
    """pytorch-fid's own test: unit covariances, means 0 and 1, 2048 features: 2048."""
    eye = torch.eye(2048).double()
    assert fid.frechet_distance(0 * eye[0], eye, 0 * eye[0] + 1, eye) == pytest.approx(2048, 1e-12)


def test_distance_refuses_what_is_no_covariance():
    """Unequal shapes and negative eigenvalues raise ValueError, and do not give a number."""
    eye, zero = np.eye(3), np.zeros(3)
    for bad in ((zero, eye, np.zeros(2), np.eye(2)), (zero, eye, zero, np.eye(2)),
                (zero, eye, zero, np.diag([1, 1, -1.0]))):
        with pytest.raises(ValueError):
            fid.frechet_distance(*bad)


def test_mutants_are_caught():
    """The usual mistakes change the number by more than any tolerance above: transposed features,
    dividing by N, float32 sums about a far mean, a forgotten square."""
    X, Y = cloud(40, 40, 1), cloud(40, 40, 2)
    right = fd(X, Y)
    (m1, S1), (m2, S2) = fid.gaussian(X), fid.gaussian(Y)
    for wrong in (fid.frechet_distance(X.mean(0), torch.cov(X), Y.mean(0), torch.cov(Y)),
                  fid.frechet_distance(m1, S1 * 39 / 40, m2, S2 * 39 / 40),
                  right - float((m1 - m2).square().sum() - (m1 - m2).norm())):
        assert abs(wrong / right - 1) > 1e-3
    far = (X + 3000).float()
    plain = (far.T @ far - len(far) * torch.outer(far.mean(0), far.mean(0))) / 39
    assert (plain.double() - torch.cov(far.double().T)).abs().max() > 1e-2
    moments = fid.Moments()
    moments.add(far)
    assert (moments.S - torch.cov(far.double().T)).abs().max() < 1e-9


def test_moments_batch_by_batch():
    """Ragged batches in any order give np.mean and np.cov of all rows."""
    X = cloud(123, 7) + 50
    for order in (torch.arange(123), torch.randperm(123)):
        moments = fid.Moments()
        for part in X[order].split([1, 7, 50, 60, 5]):
            moments.add(part)
        assert moments.n == 123
        assert np.allclose(moments.mu, np.mean(X.numpy(), 0), rtol=1e-12)
        assert np.allclose(moments.S, np.cov(X.numpy(), rowvar=False), rtol=0, atol=1e-11)


# ---- Its bias --------------------------------------------------------------------------------------


def test_bias_of_unit_covariances():
    """For S = I: 2 D/N + D (D + 1)/(2 (N - 1))."""
    eye = torch.eye(16).double()
    assert fid.frechet_bias(eye, eye, 200, 200) == pytest.approx(32 / 200 + 16 * 17 / 2 / 199)


@pytest.mark.parametrize("second", ["same", "other"])
def test_bias_is_what_sampling_shows(second):
    """Mean FD of 500 pairs of samples less the true one is the closed form within a twentieth, for
    equal and for different covariances."""
    D, n1, n2, zero = 8, 200, 300, torch.zeros(8)
    A = torch.diag(1 / torch.arange(1.0, D + 1)).double()
    B = A if second == "same" else A.flip(0, 1)
    S1, S2 = A.T @ A, B.T @ B
    T = torch.linalg.inv(A) @ power(A @ S2 @ A, 0.5) @ torch.linalg.inv(A)  # T S1 T = S2
    g = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(500):
        X = torch.randn(n1, D, generator=g, dtype=torch.float64) @ A
        Y = torch.randn(n2, D, generator=g, dtype=torch.float64) @ B
        # FD's derivatives are I - T and I - T^-1: without these terms, of mean zero, less noise
        linear = ((torch.eye(D) - T) @ (torch.cov(X.T) - S1)).trace()
        linear += ((torch.eye(D) - torch.linalg.inv(T)) @ (torch.cov(Y.T) - S2)).trace()
        draws.append(fd(X, Y) - float(linear))
    bias = np.mean(draws) - fid.frechet_distance(zero, S1, zero, S2)
    assert np.std(draws) / 500**0.5 < 0.025 * bias
    assert bias == pytest.approx(fid.frechet_bias(S1, S2, n1, n2), rel=0.06)
    if second == "other":  # and it is not the bias of equal covariances
        assert abs(bias / fid.frechet_bias(S1, S1, n1, n2) - 1) > 0.1


def test_bias_of_fixed_classes():
    """Classes in fixed numbers leave less to chance: mean FD of 300 such samples of a mixture to
    the whole is the closed form with the class means taken out, and not the one without."""
    g = torch.Generator().manual_seed(0)
    D, K, n = 6, 5, 40
    centres, A = 3 * torch.randn(K, D, generator=g).double(), torch.randn(D, D, generator=g).double()
    y = torch.arange(K).repeat_interleave(n)
    between = fid.between_classes(centres[y], y)
    assert torch.allclose(between, torch.cov(centres.T, correction=0))
    mu, S = centres.mean(0), between + A.T @ A
    draws = [fid.frechet_distance(mu, S, *fid.gaussian(
        centres[y] + torch.randn(K * n, D, generator=g, dtype=torch.float64) @ A)) for _ in range(300)]
    bias = np.mean(draws)
    assert np.std(draws) / 300**0.5 < 0.03 * bias
    assert bias == pytest.approx(fid.frechet_bias(S, S, 10**9, K * n, between), rel=0.1)
    assert fid.frechet_bias(S, S, 10**9, K * n) > 1.4 * bias


def test_bias_of_two_fixed_classes_in_the_plane():
    """Two classes that differ along no axis of the whole: mean FD of 40,000 sets of 200 points, each
    in closed form (of 2 x 2 matrices tr M^(1/2) = (tr M + 2 det M^(1/2))^(1/2)), to 1.5 %."""
    g, n = torch.Generator().manual_seed(0), 200
    W, c = torch.diag(torch.tensor([1.0, 0.02])).double(), torch.full((2,), 0.75**0.5).double()
    between = torch.outer(c, c)
    S, y, found = W + between, torch.tensor([1.0, -1.0]).double().repeat_interleave(n // 2), []
    for _ in range(40):
        x = torch.randn(1000, n, 2, generator=g, dtype=torch.float64) @ W.sqrt() + y[:, None] * c
        mu = x.mean(1)
        C = (x - mu[:, None]).mT @ (x - mu[:, None]) / (n - 1)
        M = S @ C
        root = (M.diagonal(dim1=1, dim2=2).sum(1) + 2 * torch.linalg.det(M).sqrt()).sqrt()
        found.append(mu.square().sum(1) + S.trace() + C.diagonal(dim1=1, dim2=2).sum(1) - 2 * root)
    mean = float(torch.cat(found).mean())
    assert fid.frechet_bias(S, S, 10**9, n, between) == pytest.approx(mean, rel=0.015)


def test_infinity_is_nearer_to_the_truth():
    """Extrapolated FD is closer than plain FD, on average over 20 seeds; the true one is 0."""
    plain, far = [], []
    for seed in range(20):
        X, Y = cloud(2000, 16, seed, mix=False), cloud(2000, 16, seed + 99, mix=False)
        X, Y = X - X.mean(0), Y - Y.mean(0)
        plain.append(abs(fd(X, Y)))
        far.append(abs(fid.frechet_infinity(X, Y)))
        assert abs(fid.frechet_infinity(fid.gaussian(X), Y)) < plain[-1]
    assert np.mean(far) < 0.35 * np.mean(plain)


# ---- KID, precision and recall ---------------------------------------------------------------------


def test_kid_is_unbiased():
    """Of two samples of one distribution it is 0 within 3 standard errors, over 20 seeds, and its
    own standard error tells how much it varies; of others it is above 0."""
    g = torch.Generator().manual_seed(1)
    values, errors = zip(*(fid.kid(torch.randn(400, 8, generator=g), torch.randn(400, 8, generator=g))
                           for _ in range(20)))
    assert abs(np.mean(values)) < 3 * np.std(values) / 20**0.5 and min(values) < 0
    assert 0.5 < np.mean(errors) / np.std(values) < 2
    value, error = fid.kid(torch.randn(400, 8, generator=g), 1 + torch.randn(400, 8, generator=g))
    assert value > 5 * error


def test_kid_against_loops():
    """Ten blocks of two points each: by the definition, pair by pair."""
    X, Y = cloud(20, 3, 1), cloud(20, 3, 2)
    k = lambda a, b: (float(a @ b) / 3 + 1) ** 3
    values = []
    for i in range(10):
        (a, b), (c, d) = X[i::10], Y[i::10]
        values.append(k(a, b) + k(c, d) - 2 * np.mean([k(a, c), k(a, d), k(b, c), k(b, d)]))
    value, error = fid.kid(X, Y)
    assert value == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / 10**0.5)


def test_precision_and_recall_by_hand():
    """On a line: real 0..9, samples inside, outside, and both; a set against itself is 1 and 1."""
    real = torch.arange(10.0)[:, None]
    assert fid.precision_recall(real, real) == (1.0, 1.0)
    assert fid.precision_recall(real, real + 100) == (0.0, 0.0)
    narrow = 4.5 + torch.arange(10.0)[:, None] / 100
    precision, recall = fid.precision_recall(real, narrow)
    assert precision == 1.0 and recall == 0.0
    half = torch.cat([real[:5], real[:5] + 1000])
    precision, recall = fid.precision_recall(real, half, k=1)
    assert precision == 0.5 and recall >= 0.5


def test_balls_reach_to_the_kth_neighbour():
    """Of real points 0..9 the outermost one's first neighbour is at 1, its third at 3: a sample
    between is inside for the larger k only. The point itself is no neighbour."""
    real = torch.arange(10.0)[:, None]
    for k in (1, 2, 3):
        inside, outside = (torch.full((10, 1), 9 + k + d) for d in (-0.1, 0.1))
        assert fid.precision_recall(real, inside, k)[0] == 1.0
        assert fid.precision_recall(real, outside, k)[0] == 0.0


def test_precision_is_of_the_samples():
    """Real points of two kinds, samples of one: all samples are real-looking, half is missed."""
    g = torch.Generator().manual_seed(0)
    real = torch.randn(200, 2, generator=g)
    real[100:] += 50
    fake = torch.randn(200, 2, generator=g)
    precision, recall = fid.precision_recall(real, fake)
    assert precision > 0.9 and 0.4 < recall < 0.6


# ---- Pixels of real digits -------------------------------------------------------------------------


def pixels(spec, data_dir=ROOT / "data"):
    args = fid.parse_args(["--data-dir", str(data_dir), "--features", "pixels"])
    f = lambda x: (x.flatten(1).double() / 255, None)
    return fid.summarise(fid.read_set(spec, args), f, args, spec)


def test_pixel_anchors():
    """Golden numbers of MNIST in pixel space, to 8 digits; the rank is 661 of 784."""
    test = pixels("mnist:test")
    for spec, golden in (("mnist:train[:10000]", 0.589357622), ("mnist:train[:500]", 4.660333231),
                         ("mnist:train[:1000]", 3.357012201), ("mnist:train[:2000]", 1.759719643)):
        x = pixels(spec)
        found = fid.frechet_distance(x.mu, x.S, test.mu, test.S)
        assert found == pytest.approx(golden, rel=1e-8), spec
    a, b = pixels("mnist:train[:5000]"), pixels("mnist:train[5000:10000]")
    assert fid.frechet_distance(a.mu, a.S, b.mu, b.S) == pytest.approx(0.804730743, rel=1e-8)
    shifted = fid.frechet_distance(test.mu, test.S, test.mu + 1 / 255, test.S)
    assert shifted == pytest.approx(0.012056901, rel=1e-7)
    assert abs(fid.frechet_distance(test.mu, test.S, test.mu, test.S)) < 1e-9


def test_pixel_anchor_of_fashion():
    """MNIST against Fashion-MNIST, where the latter has been downloaded."""
    if not (ROOT / "data/fashion/t10k-images-idx3-ubyte.gz").exists():
        pytest.skip("data/fashion is not there")
    a, b = pixels("mnist:test"), pixels("fashion:test")
    assert fid.frechet_distance(a.mu, a.S, b.mu, b.S) == pytest.approx(77.720354173, rel=1e-9)


# ---- The Inception network -------------------------------------------------------------------------


def random_inception(seed=0):
    """Weights under which nothing vanishes: He's scale, batch norms far from the identity."""
    g = torch.Generator().manual_seed(seed)
    state = fid.Inception().state_dict()
    for key, v in state.items():
        if key.endswith("running_var") or key.endswith("bn.weight"):
            state[key] = 0.5 + torch.rand(v.shape, generator=g)
        elif v.ndim > 1:
            state[key] = torch.randn(v.shape, generator=g) * (2 / v[0].numel()) ** 0.5
        elif v.is_floating_point():
            state[key] = torch.randn(v.shape, generator=g) * 0.2
    return state


@pytest.fixture(scope="module")
def inception():
    model = fid.Inception().eval()
    model.load_state_dict(random_inception())
    return model


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_inception_counts(inception):
    """94 convolutions; parameters and keys of the published file; each tap's part of the network."""
    state = inception.state_dict()
    units = [m for m in inception.modules() if isinstance(m, fid.Unit)]
    assert len(units) == 94 and sum(u.conv.weight.numel() for u in units) == 21_751_136
    assert sum(u.bn.num_features for u in units) == 17_216
    assert count(inception) == 23_850_960 and count(inception) - count(inception.fc) == 21_785_568
    stem = [count(m) for name, m in inception.named_children()]
    assert sum(stem[:3]) == 28_768 and sum(stem[:5]) == 172_672 and sum(stem[:13]) == 8_965_856
    assert len(state) == 566
    assert len([k for k in state if not k.endswith("num_batches_tracked")]) == 472
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["fc.weight"].shape == (1008, 2048)


def test_inception_loads_472_and_566_keys(inception):
    """With or without the counters of batch norm, as the public files come."""
    state = {k: v for k, v in random_inception().items() if not k.endswith("tracked")}
    fid.Inception().load_state_dict(state)


def test_resize_is_tensorflow_1s():
    """Vectors that tell it from the two resizes of PyTorch; rows like columns; same size, same."""
    line = lambda v, n: fid.resize_tf1(torch.tensor(v).view(1, 1, 1, -1).float(), n)[0, 0, 0].tolist()
    assert line([0, 10, 20, 30], 6) == pytest.approx([0, 20 / 3, 40 / 3, 20, 80 / 3, 30], abs=1e-5)
    assert line(list(range(8)), 3) == pytest.approx([0, 8 / 3, 16 / 3], abs=1e-5)
    x = torch.rand(2, 3, 5, 9)
    turned = fid.resize_tf1(x.transpose(2, 3), 7).transpose(2, 3)
    assert torch.allclose(turned, fid.resize_tf1(x, 7), atol=1e-6)
    y = torch.rand(1, 2, 11, 11)
    assert torch.equal(fid.resize_tf1(y, 11), y)


def test_inception_batches_and_folding(inception):
    """A picture's features do not depend on its neighbours (that is eval mode), nor on whether batch
    norms are folded into convolutions; each tap has its width."""
    x = torch.randint(256, (4, 3, 20, 24), generator=torch.Generator().manual_seed(0))
    folded = fid.Inception()
    folded.load_state_dict(random_inception())
    folded = fid.fold(folded)
    with torch.no_grad():
        for tap in (64, 192, 768, 2048):
            together = inception(x, tap)
            assert together.shape == (4, tap) and together.std() > 1e-3
            assert torch.allclose(inception(x[1:2], tap), together[1:2], rtol=1e-4, atol=1e-5)
            assert torch.allclose(folded(x, tap), together, rtol=1e-3, atol=1e-4)


def taps(inception, x):
    with torch.no_grad():
        return {tap: inception(x, tap) for tap in (64, 192, 768, 2048)}


def apart(ours, theirs):
    """Largest difference, relative to the largest feature."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def blunders(inception):
    """Undoes the two peculiarities of the graph of 2015 in turn: yields each wrong network."""
    average = fid.average
    fid.average = lambda x: F.avg_pool2d(x, 3, 1, 1)  # counts the border
    yield 768, "border"
    fid.average = average
    pool, inception.Mixed_7c.pool = inception.Mixed_7c.pool, fid.average
    yield 2048, "average in 7c"
    inception.Mixed_7c.pool = pool


def test_features_against_torch_fidelity(inception, tmp_path):
    """All four taps and the logits to 1e-4, resize and scaling included; and the comparison bites."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(random_inception(), tmp_path / "w.pth")
    names = ["64", "192", "768", "2048", "logits"]
    theirs = FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=str(
        tmp_path / "w.pth"))
    x = torch.randint(256, (3, 3, 32, 40), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        expected = dict(zip(names, theirs(x)))
    for tap, f in taps(inception, x).items():
        assert apart(f, expected[str(tap)]) < 1e-4, tap
    with torch.no_grad():
        assert apart(inception.fc(inception(x)), expected["logits"]) < 1e-4
    for tap, name in blunders(inception):
        with torch.no_grad():
            assert apart(inception(x, tap), expected[str(tap)]) > 1e-3, name


def test_features_against_pytorch_fid(inception, monkeypatch):
    """All four taps to 1e-4 on images of 299 x 299, where the resizes agree; its scaling is
    x/127.5 - 1, so it is given (x - 128)/128."""
    theirs = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: random_inception())
    net = theirs.InceptionV3([0, 1, 2, 3], resize_input=False, normalize_input=False).eval()
    x = torch.randint(256, (2, 3, 299, 299), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [f.mean((2, 3)) for f in net((x.float() - 128) / 128)]
    for (tap, f), e in zip(taps(inception, x).items(), expected):
        assert apart(f, e) < 1e-4, tap
    for tap, name in blunders(inception):
        with torch.no_grad():
            assert apart(inception(x, tap), expected[[64, 192, 768, 2048].index(tap)]) > 1e-3, name


def test_distance_against_pytorch_fid_and_torch_fidelity():
    """1e-8 at full rank; and each reads the statistics that the other wrote."""
    theirs = pytest.importorskip("pytorch_fid.fid_score")
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    X, Y = cloud(2000, 64, 1), cloud(1500, 64, 2)
    (m1, S1), (m2, S2) = ((a.numpy() for a in fid.gaussian(x)) for x in (X, Y))
    assert fd(X, Y) == pytest.approx(theirs.calculate_frechet_distance(m1, S1, m2, S2), rel=1e-8)
    stats = [{"mu": m1, "sigma": S1}, {"mu": m2, "sigma": S2}]
    value = metric.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    assert fd(X, Y) == pytest.approx(value, rel=1e-8)


# ---- Reading images --------------------------------------------------------------------------------


def chunk(tag, data):
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png(x, kind, filters, palette=None, bits=8, interlaced=0):
    """A PNG of x (H, W, C) by the specification, byte by byte; filters cycle over the rows."""
    H, W, C = x.shape
    rows = b""
    for r in range(H):
        f = filters[r % len(filters)]
        rows += bytes([f])
        for i in range(W * C):
            at = lambda r, i: int(x[r].reshape(-1)[i]) if r >= 0 and i >= 0 else 0
            a, b, c = at(r, i - C), at(r - 1, i), at(r - 1, i - C)
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            rows += bytes([(at(r, i) - (0, a, b, (a + b) // 2, paeth)[f]) % 256])
    out = b"\x89PNG\r\n\x1a\n"
    out += chunk(b"IHDR", struct.pack(">2I5B", W, H, bits, kind, 0, 0, interlaced))
    out += chunk(b"PLTE", palette.tobytes()) if palette is not None else b""
    packed = zlib.compress(rows)
    for part in (packed[:10], packed[10:]):  # two pieces of one stream
        out += chunk(b"IDAT", part)
    return out + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind, C", [(0, 1), (2, 3), (3, 1), (4, 2), (6, 4)])
def test_png_kinds_and_filters(kind, C):
    """Grey, RGB, palette, with and without alpha; each of the five filters, alone and mixed."""
    rng = np.random.default_rng(kind)
    x = rng.integers(256, size=(7, 5, C), dtype=np.uint8)
    palette = rng.integers(256, size=(256, 3), dtype=np.uint8) if kind == 3 else None
    want = palette[x[:, :, 0]] if kind == 3 else x[:, :, :C - (kind in (4, 6))]
    for filters in ([0], [1], [2], [3], [4], [4, 3, 2, 1, 0]):
        assert np.array_equal(fid.read_png(png(x, kind, filters, palette)), want), filters


def test_png_against_pillow():
    """What Pillow writes is read as Pillow reads it."""
    Image = pytest.importorskip("PIL.Image")
    y, x = np.mgrid[:61, :83]
    wave = np.stack([128 + 100 * np.sin(x / 7 + c) * np.cos(y / 5) for c in range(4)], 2)
    for mode, want in (("L", "L"), ("RGB", "RGB"), ("RGBA", "RGB"), ("P", "RGB")):
        image = Image.fromarray(wave.astype(np.uint8), "RGBA").convert("RGB" if mode == "P" else mode)
        image = image.quantize(200) if mode == "P" else image
        file = io.BytesIO()
        image.save(file, "png")
        assert np.array_equal(fid.read_png(file.getvalue()).squeeze(), np.array(image.convert(want)))


def test_own_pictures_are_read():
    """save_png's file comes back."""
    x = np.random.default_rng(0).integers(256, size=(1, 6, 9, 3), dtype=np.uint8)
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"fid_{os.getpid()}.png"
    fid.save_png(path, x)
    found = fid.read_png(path.read_bytes())
    path.unlink()
    assert np.array_equal(found, x[0])


def read(spec, **flags):
    args = fid.parse_args([])
    for key, value in flags.items():
        setattr(args, key, value)
    images, labels = zip(*fid.read_set(str(spec), args))
    return torch.cat(images), labels if labels[0] is None else torch.cat(labels)


def test_all_sources_give_the_same_images(tmp_path):
    """A folder of PNG, .npy, .npz with and without labels, floats in 0..1, grey without a channel
    axis; slices of each."""
    x = np.random.default_rng(0).integers(256, size=(1203, 5, 4, 3), dtype=np.uint8)
    y = np.arange(1203) % 7
    (tmp_path / "a/b").mkdir(parents=True)
    for i in range(30):
        fid.save_png(tmp_path / "a" / ("b" * (i > 20)) / f"{i:03}.png", x[i][None])
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "f.npy", x.astype(np.float32) / 255)
    np.save(tmp_path / "g.npy", x[..., 0])
    np.savez(tmp_path / "x.npz", arr_0=x, labels=y)
    np.savez_compressed(tmp_path / "z.npz", images=x)
    want = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    for name in ("x.npy", "f.npy", "x.npz", "z.npz"):
        assert torch.equal(read(tmp_path / name)[0], want), name
        assert torch.equal(read(f"{tmp_path / name}[490:1010]")[0], want[490:1010]), name
        assert torch.equal(read(f"{tmp_path / name}[:3]")[0], want[:3]), name
    assert torch.equal(read(tmp_path / "x.npz")[1], torch.from_numpy(y))
    assert torch.equal(read(f"{tmp_path / 'x.npz'}[600:]")[1], torch.from_numpy(y[600:]))
    assert torch.equal(read(tmp_path / "g.npy")[0], want[:, :1])
    assert torch.equal(read(tmp_path / "a")[0].sort(0).values, want[:30].sort(0).values)
    assert torch.equal(read(f"{tmp_path / 'a'}[2:4]")[0], want[2:4])


def test_digits_are_the_official_ones():
    """mnist:test[3:5] are the fourth and fifth image of the file."""
    import gzip

    raw = np.frombuffer(gzip.open(MNIST / "t10k-images-idx3-ubyte.gz").read(), np.uint8, offset=16)
    assert np.array_equal(read("mnist:test[3:5]")[0].numpy().ravel(), raw[3 * 784:5 * 784])


def test_memory_is_flat(tmp_path):
    """Ten times the images take no more memory than the kept features need: peaks of two runs."""
    code = ("import resource, sys; sys.argv[0] = 'fid.py'; sys.path.insert(0, {root!r}); import fid\n"
            "fid.main([{path!r}, {path!r}, '--features', 'pixels', '--keep', '100'])\n"
            "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    runs = []
    for n in (4000, 40_000):
        path = tmp_path / f"{n}.npy"
        np.save(path, np.random.default_rng(0).integers(256, size=(n, 12, 12, 3), dtype=np.uint8))
        runs.append(subprocess.Popen([sys.executable, "-c", code.format(
            root=str(ROOT), path=str(path))], stdout=subprocess.PIPE, text=True))
    peaks = [int(run.communicate()[0].split("PEAK")[1]) / 1024 for run in runs]
    assert abs(peaks[1] - peaks[0]) < 12, peaks  # MB; all 40,000 images are 17, their features 138


# ---- Own features, and the report ------------------------------------------------------------------


def report(text):
    """{row: (fake, floor)} of the report's numbers."""
    rows = {}
    for line in text.splitlines():
        if match := re.match(r"(\s*[A-Za-z].{24})\s*(-?[\d.]+\S*)(?: \+- \S+)?\s*(-?[\d.]+)?", line):
            rows[match[1].strip()] = match[2], match[3]
    return rows


SMALL = "--train --steps 6 --batch-size 8 --width 4 --every 3 --device cpu".split()


def test_train_writes_what_it_promises_and_resumes_to_the_bit(tmp_path):
    """Six steps; or three, killed, and three more: the same weights. --export is half precision."""
    text = call(fid, *SMALL, "--export", "small.pt", cwd=tmp_path)
    assert "now try: python fid.py mnist:train mnist:test" in text.splitlines()[-1]
    for name in ("model.pt", "loss.csv", "loss.png", "mistakes.png"):
        assert (tmp_path / "out/fid" / name).exists(), name
    small = torch.load(tmp_path / "small.pt", weights_only=True)
    assert all(v.dtype == torch.float16 for v in small["model"].values())

    def killed(*_):
        raise KeyboardInterrupt

    saved, fid.save_loss = fid.save_loss, killed  # right after the checkpoint of step 3
    try:
        with pytest.raises(SystemExit):
            fid.main([*SMALL, "--out", str(tmp_path / "b")])
    finally:
        fid.save_loss = saved
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert torch.load(tmp_path / "b/model.pt", weights_only=True)["step"] == 3
    call(fid, *SMALL, "--resume", "--out", "b", cwd=tmp_path)
    one, two = (torch.load(tmp_path / p, weights_only=True)["model"] for p in
                ("out/fid/model.pt", "b/model.pt"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_report_on_real_digits(tmp_path):
    """Test digits are at the floor, with nearly all labels read rightly; noisy ones and ones of
    wrong labels are not; the number has its honest name."""
    x, y = read("mnist:test[:1000]")
    noisy = fid.noise(x, 60, torch.Generator().manual_seed(0))
    for name, images, labels in (("good", x, y), ("bad", noisy, (y + 1) % 10)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images.permute(0, 2, 3, 1), labels=labels)
    call(fid, "mnist:train[:5000]", "--save-stats", "ref.npz", cwd=tmp_path)
    stats = np.load(tmp_path / "ref.npz")
    assert stats["mu"].shape == (128,) and stats["sigma"].shape == (128, 128) and stats["n"] == 5000
    good, bad = (report(call(fid, "mnist:test[:4000]", f"{name}.npz", "--classes", cwd=tmp_path))
                 for name in ("good", "bad"))
    fds = [float(v) for v in (*good["FD (our features)"], bad["FD (our features)"][0])]
    assert fds[0] < 2 * fds[1] and fds[2] > 50 * fds[1]
    assert float(good["accuracy"][0]) > 0.99 and float(bad["accuracy"][0]) < 0.1
    assert float(good["precision"][0]) > 0.8 and float(bad["precision"][0]) < 0.2
    text = call(fid, "ref.npz", "good.npz", cwd=tmp_path)
    assert "FID" not in text and re.search(r"KID x 1000 +-\n", text)  # no features were kept


def test_classifier_reads_the_test_set():
    """The enclosed classifier is 99.5 % right on all 10,000 test digits, as its header says."""
    ckpt = fid.read_checkpoint(ROOT / "pretrained/fid.pt")
    args = fid.parse_args(["--device", "cpu"])
    fid.use_device(args)
    f, title, _ = fid.extractor(args, ckpt)
    images, labels = fid.load_data(SimpleNamespace(
        data="mnist", data_dir=ROOT / "data", device="cpu"), "test")
    features, logits = f(images)
    assert title == "FD (our features)" and features.shape == (10_000, 128)
    assert (logits.argmax(1) == labels).float().mean() >= 0.995


def test_floor_has_the_labels_of_fake():
    """A floor with other shares of the classes would be too high."""
    args = fid.parse_args(["mnist:test", "x"])
    f = lambda x: (x.flatten(1).double()[:, 300:310], None)
    fake = SimpleNamespace(n=50, counts={3: 20, 8: 30}, fixed=True)
    real = fid.summarise(fid.read_set("mnist:test[:100]", args), f, args, "x")
    _, found, name = fid.floor_of(real, fake, f, args)
    assert found.counts == fake.counts and name == "50 of mnist:train" and found.fixed
    fake.counts = {12: 50}  # labels that the data set does not have
    assert fid.floor_of(real, fake, f, args)[1].n == 50
    args.sets[1] = "mnist:train[:50]"  # FAKE is the other split itself: then halves of REAL
    assert fid.floor_of(real, fake, f, args)[2] == "50 of REAL, against its other 50"


def test_kept_features_are_a_fair_choice():
    """Each of 1,000 rows is kept with the same chance, wherever it stood."""
    hits = np.zeros(1000)
    for seed in range(200):
        kept = fid.Features(100, seed)
        for part in torch.arange(1000.0)[:, None].split(70):
            kept.add(part, part[:, 0].long())
        kept.cut()
        assert len(kept.kept) == 100 and kept.n == 1000 and torch.equal(kept.kept[:, 0], kept.y)
        hits[kept.kept[:, 0].long()] += 1
    assert abs(hits[:500].sum() / hits.sum() - 0.5) < 0.02 and hits.max() < 45


def test_augment_moves_a_little_and_mirrors_on_demand():
    """Brightness stays, every image changes, no digit is mirrored unless asked."""
    x = fid.to_float(read("mnist:test[:64]")[0])
    torch.manual_seed(0)
    y = fid.augment(x, False)
    assert y.shape == x.shape and (y.mean() - x.mean()).abs() < 0.05
    assert all(not torch.equal(a, b) for a, b in zip(x, y))
    near = (y - x).flatten(1).norm(dim=1)
    assert (near < (y - x.flip(3)).flatten(1).norm(dim=1)).float().mean() > 0.9
    torch.manual_seed(0)
    z = fid.augment(x, True)
    mirrored = ((z - x.flip(3)).flatten(1).norm(dim=1) < (z - x).flatten(1).norm(dim=1))
    assert 0.2 < mirrored.float().mean() < 0.8


def test_blur_and_noise():
    """Blur keeps the mean and lowers the spread; noise has the spread asked for."""
    x = read("mnist:test[:20]")[0]
    y = fid.blur(x, 1.5)
    assert abs(y.float().mean() - x.float().mean()) < 1 and y.float().std() < 0.8 * x.float().std()
    assert torch.equal(fid.blur(x, 0), x)
    dot = torch.zeros(1, 1, 15, 15, dtype=torch.uint8)
    dot[..., 7, 7] = 255
    r = torch.arange(-7.0, 8)
    want = torch.exp(-(r**2)[:, None] / 2 - r**2 / 2)
    assert (fid.blur(dot, 1)[0, 0] - 255 * want / want.sum()).abs().max() < 1
    grey = torch.full((10, 1, 20, 20), 128, dtype=torch.uint8)
    assert fid.noise(grey, 16, torch.Generator()).float().std() == pytest.approx(16, rel=0.05)


# ---- Bad input: one line, exit code 2 --------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(40, 28, 28, 1), dtype=np.uint8)
    np.save(folder / "ok.npy", x)
    np.save(folder / "one.npy", x[:1])
    np.save(folder / "big.npy", x[:, :20, :20])
    np.save(folder / "first.npy", x.transpose(0, 3, 1, 2).repeat(3, 1))
    np.save(folder / "range.npy", x / 127.5 - 1)
    np.save(folder / "int.npy", x.astype(np.int64))
    np.save(folder / "colour.npy", rng.integers(256, size=(40, 28, 28, 3), dtype=np.uint8))
    y = x / 255
    y[3, 2, 2] = np.nan
    np.save(folder / "nan.npy", y)
    (folder / "cut.npy").write_bytes((folder / "ok.npy").read_bytes()[:-100])
    np.savez(folder / "labels.npz", arr_0=x, labels=np.zeros(3, int))
    np.savez(folder / "halves.npz", arr_0=x, labels=np.full(40, 0.5))
    np.save(folder / "nothing.npy", x[:0])
    for name, text in (("said", "a red seven"), ("unsaid", "a blue two")):
        np.savez(folder / f"{name}.npz", arr_0=x, captions=np.full(40, text))
    np.savez(folder / "skew.npz", mu=np.zeros(128), sigma=np.eye(128) + np.eye(128, k=5))
    np.savez(folder / "other.npz", weights=x)
    np.savez(folder / "mu.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(folder / "munan.npz", mu=np.full(128, np.nan), sigma=np.eye(128))
    np.savez(folder / "tag.npz", mu=np.zeros(128), sigma=np.eye(128), features="inception-2048")
    np.savez(folder / "neg.npz", mu=np.zeros(128), sigma=-np.eye(128))
    (folder / "text.npz").write_text("no zip")
    for name in ("empty", "mixed", "torn", "sixteen"):
        (folder / name).mkdir()
    fid.save_png(folder / "mixed/a.png", np.zeros((1, 28, 28, 3), np.uint8))
    fid.save_png(folder / "mixed/b.png", np.zeros((1, 20, 28, 3), np.uint8))
    data = (folder / "mixed/a.png").read_bytes()
    (folder / "torn/a.png").write_bytes(data[:60])
    (folder / "sixteen/a.png").write_bytes(png(x[0], 0, [0], bits=16))
    (folder / "weights.pth").write_bytes(b"12345\n")
    return folder


@pytest.mark.parametrize("argv, words", [
    (["ok.npy", "one.npy"], "found 1 images; expected two or more"),
    (["ok.npy", "ok.npy[40:]"], "found 0 images"),
    (["ok.npy", "big.npy"], "images of shape [1, 20, 20], but the classifier was trained on"),
    (["ok.npy", "colour.npy"], "images of shape [3, 28, 28]"),
    (["ok.npy", "big.npy", "--features", "pixels"], "different dimensions"),
    (["ok.npy", "first.npy"], "expected images (N, H, W, 1 or 3)"),
    (["ok.npy", "range.npy"], "float in 0..1; found float64 in -1..1"),
    (["ok.npy", "skew.npz"], "not symmetric"),
    (["ok.npy", "nothing.npy"], "found 0 images"),
    (["ok.npy", "halves.npz"], "one whole number an image"),
    (["ok.npy", ""], "is not known"),
    (["ok.npy", "ok.npy", "--save-stats", "mu.npz"], "expected a new file"),
    (["ok.npy", "--save-stats", "stats"], "ending in .npz"),
    (["--sweep", "--data", "ok.npy"], "expected 400 or more"),
    (["--sweep", "--seed", "-1"], "--seed -1"),
    (["ok.npy", "int.npy"], "found int64"),
    (["ok.npy", "nan.npy"], "found float64 in nan..nan"),
    (["ok.npy", "cut.npy"], "cannot be read"),
    (["ok.npy", "labels.npz"], "one whole number an image"),
    (["ok.npy", "other.npz"], "found ['weights']"),
    (["ok.npy", "mu.npz"], "different dimensions"),
    (["ok.npy", "munan.npz"], "without nan"),
    (["ok.npy", "tag.npz"], "statistics of inception-2048"),
    (["ok.npy", "neg.npz"], "no covariance matrix"),
    (["ok.npy", "text.npz"], "cannot be read"),
    (["ok.npy", "nowhere.npz"], "nowhere.npz"),
    (["ok.npy", "nowhere"], "nowhere is not known"),
    (["ok.npy", "empty"], "no images found"),
    (["ok.npy", "mixed"], "images of different sizes"),
    (["ok.npy", "torn"], "a.png is cut off or damaged"),
    (["ok.npy", "mnist:val"], "expected mnist:train or mnist:test"),
    (["ok.npy"], "add the one to compare it with"),
    (["ok.npy", "ok.npy", "ok.npy"], "expected REAL and FAKE"),
    (["ok.npy", "ok.npy", "--classes"], "has no labels"),
    (["ok.npy", "ok.npy", "--features", "inception", "--weights", "weights.pth"], "another file"),
    (["ok.npy", "ok.npy", "--features", "inception", "--weights", "none.pth"], "is not there"),
    (["ok.npy", "ok.npy", "--device", "abacus"], "--device abacus"),
    (["--train", "--size", "paper"], "leave out --train"),
    (["--train", "--features", "pixels"], "leave out --train"),
    (["--train", "--data", "ok.npy"], "has no labels"),
    (["--resume"], "needs --train"),
    (["--train", "--steps", "0"], "whole number of at least 1"),
    (["--vote", "ok.npy", "one.npy"], "differ"),
    (["--vote", "said.npz[:3]", "unsaid.npz[:3]"], "captions of the two sets differ"),
    (["--vote", "ok.npy", "nothing.npy"], "no images in nothing.npy"),
    (["--vote", "ok.npy", "ok.npy", "--port", "70000"], "expected 0 to 65535"),
    (["--tally", "none.jsonl"], "is not there"),
    (["--tally", "weights.pth"], "no file of votes"),
])
def test_bad_input_is_one_line(bad, monkeypatch, capsys, argv, words):
    """Exit code 2 and a line that says what was found and expected; no traceback."""
    monkeypatch.chdir(bad)
    with pytest.raises(SystemExit) as stop:
        fid.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and len(err.strip().splitlines()) == 1, err


def test_sixteen_bits_need_pillow(bad, capsys, monkeypatch):
    """Without Pillow a PNG of 16 bits is refused by name."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SystemExit):
        fid.read_image(bad / "sixteen/a.png")
    assert "pip install pillow" in capsys.readouterr().err


def test_weights_come_from_the_cache_or_a_line_says_from_where(tmp_path, monkeypatch, capsys):
    """Without --weights, cache or network: one line with address, checksum and place. With the right
    bytes in the cache, under either public name, they are taken, and the number is called FID."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(fid, "INCEPTION_URLS", ["http://127.0.0.1:9/none.pth"])
    args = fid.parse_args(["--features", "inception", "--device", "cpu"])
    fid.use_device(args)
    with pytest.raises(SystemExit):
        fid.extractor(args, None)
    err = capsys.readouterr().err
    assert "http://127.0.0.1:9/none.pth" in err and fid.INCEPTION_SHA in err and str(tmp_path) in err
    file = io.BytesIO()
    torch.save(random_inception(), file)
    path = tmp_path / "hub/checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(file.getvalue())
    monkeypatch.setattr(fid, "INCEPTION_SHA", fid.digest(file.getvalue(), "a" * 64))
    f, title, tag = fid.extractor(args, None)
    x = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    features, logits = f(x)
    assert (title, tag, logits) == ("FID", "inception-2048", None) and features.shape == (2, 2048)
    path.write_bytes(file.getvalue()[:-1])
    with pytest.raises(SystemExit):
        fid.extractor(args, None)


# ---- Votes (slide Human Evaluation) ----------------------------------------------------------------


@pytest.mark.parametrize("won, n, low, high", [(60, 100, 0.5020, 0.6906), (9, 10, 0.5958, 0.9821),
                                               (0, 10, 0, 0.2775), (684, 1000, 0.6545, 0.7121)])
def test_wilson(won, n, low, high):
    assert fid.wilson(won, n) == pytest.approx((low, high), abs=1e-4)


def test_sign_test():
    """Golden values; and by throwing coins in every way."""
    for won, lost, p in ((60, 40, 0.0569), (9, 1, 0.0215), (0, 10, 0.00195), (5, 5, 1)):
        assert fid.sign_test(won, lost) == pytest.approx(p, rel=3e-3)
    heads = [bin(i).count("1") for i in range(2**9)]
    assert fid.sign_test(7, 2) == np.mean([abs(h - 4.5) >= 2.5 for h in heads])


def test_votes_needed():
    """About 200, 92, 51 and 23; and that many do give a power of 80 % in the exact test."""
    assert [fid.votes_needed(p) for p in (0.6, 0.65, 0.7, 0.8)] == pytest.approx([200, 92, 51, 23],
                                                                                rel=0.03)
    for p in (0.35, 0.6, 0.8):
        n = fid.votes_needed(p)
        power = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)
                    if fid.sign_test(k, n - k) < 0.05)
        assert 0.76 < power < 0.86


def test_trials():
    """Every pair once, sides by lot, a tenth again with sides swapped and behind the first; the
    seed decides."""
    trials = fid.make_trials(100, 50, 0.1, 3)
    assert trials == fid.make_trials(100, 50, 0.1, 3) != fid.make_trials(100, 50, 0.1, 4)
    first = {p: (i, left) for i, (p, left, again) in enumerate(trials) if not again}
    again = [(i, p, left) for i, (p, left, again) in enumerate(trials) if again]
    assert len(first) == 50 and len(again) == 5 and len(set(p for _, p, _ in again)) == 5
    assert all(i > first[p][0] and left != first[p][1] for i, p, left in again)
    assert 10 < sum(left for _, left in first.values()) < 40
    assert len(fid.make_trials(8, 50, 0, 0)) == 8


@pytest.fixture
def server(tmp_path, monkeypatch):
    """start(): a running ballot of two sets of 8 images; ask(vote, ...): what its page would send."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 10), ("b", 200)):
        x = np.full((8, 4, 5, 1), value, np.uint8) + np.arange(8, dtype=np.uint8)[:, None, None, None]
        np.savez(f"{name}.npz", arr_0=x, labels=np.arange(8))
    running = []

    def start(*flags):
        args = fid.parse_args(["--vote", "a.npz", "b.npz", "--port", "0", "--votes", "v.jsonl",
                               "--repeats", "0.25", *flags])
        http = fid.make_server(args)
        trials, votes = len(http.ballot.trials), http.ballot.votes
        threading.Thread(target=http.serve_forever, daemon=True).start()
        running.append(http)
        url = f"http://127.0.0.1:{http.server_address[1]}/"
        page = urllib.request.urlopen(url).read().decode()
        token = re.search(r'"X-Token": "([^"]+)"', page)[1]

        def ask(vote="show", trial=0, body=None, headers=None):
            body = json.dumps(dict(trial=trial, vote=vote, seconds=1.5)).encode() if body is None \
                else body
            request = urllib.request.Request(url, body, {"X-Token": token, **(headers or {})})
            return json.loads(urllib.request.urlopen(request).read())

        return SimpleNamespace(ask=ask, page=page, trials=trials, votes=votes, url=url, http=http)

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


def is_a(shown, side):
    import base64

    return base64.b64decode(shown[side])[0] < 100


def test_votes_are_kept_undone_and_resumed(server):
    """Each vote is in the file at once, for the right set; undo takes it back; after a kill, a torn
    last line included, it goes on where it stood; the end is the end."""
    one = server()
    assert one.trials == 10
    seen = []
    for i in range(4):
        shown = one.ask()
        assert shown["trial"] == i and shown["prompt"].startswith("class ")
        left = is_a(shown, "left")
        assert left != is_a(shown, "right")
        seen.append("tie" if i == 2 else "A" if left else "B")
        one.ask("tie" if i == 2 else "left", i)
        lines = Path("v.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["vote"] == seen[-1] and len(lines) == 2 + i
    assert one.ask("left", 2)["trial"] == 4  # late: the page had not seen the answer yet
    assert one.ask("undo", 3)["trial"] == 4  # a late one too
    assert one.ask("undo", 4)["trial"] == 3
    with open("v.jsonl", "ab") as file:
        file.write(b'{"trial": 3, "pair"')  # killed while writing
    two = server()
    assert len(two.votes) == 3 and two.ask()["trial"] == 3
    for i in range(3, 10):
        shown = two.ask()
        assert (shown["left"], shown["right"]) != (None, None)
        two.ask("left" if is_a(shown, "left") else "right", i)
    end = two.ask()
    assert end["trial"] == end["trials"] == 10 and "left" not in end
    header, votes = fid.read_votes(Path("v.jsonl"))
    assert [v["vote"] for v in votes] == seen[:3] + ["A"] * 7
    assert header["A"] == "a.npz" and sorted(v["pair"] for v in votes if not v["repeat"]) == \
        list(range(8))


def test_page_is_blind(server):
    """Neither page nor answers say which set is which."""
    one = server()
    shown = one.ask()
    text = one.page + json.dumps({k: v for k, v in shown.items() if k not in ("left", "right")})
    assert "npz" not in text and set(shown) == {"trial", "trials", "left", "right", "prompt",
                                                "width", "height"}


def test_server_keeps_strangers_out(server):
    """Another host name, no token, a wrong one, too long or broken requests, other paths: refused,
    and no vote is counted."""
    one = server()

    def code(**kw):
        with pytest.raises(urllib.error.HTTPError) as stop:
            one.ask(**kw)
        return stop.value.code

    assert code(vote="left", headers={"Host": "evil.example"}) == 403
    assert code(vote="left", headers={"X-Token": "guess"}) == 403
    assert code(vote="left", headers={"X-Token": ""}) == 403
    assert code(body=b"x" * 2000) == 413
    assert code(headers={"Content-Length": "-1"}) == 413
    for body in (b"{", b"[]", b'{"trial": 0}', b'"' * 9, b"[" * 900, b'{"trial": 0.0, "vote": '
                 b'"left", "seconds": 1}', b'{"trial": 0, "vote": "left", "seconds": NaN}'):
        assert code(body=body) == 400
    for path in ("x", "../fid.py", "v.jsonl"):
        with pytest.raises(urllib.error.HTTPError) as stop:
            urllib.request.urlopen(one.url + path)
        assert stop.value.code == 404
    with pytest.raises(urllib.error.HTTPError) as stop:
        urllib.request.urlopen(urllib.request.Request(one.url, headers={"Host": "evil.example"}))
    assert stop.value.code == 403
    assert one.http.server_address[0] == "127.0.0.1"
    assert one.ask("nonsense")["trial"] == 0 and not one.votes


def test_votes_on_other_pairs_are_not_mixed(server, capsys):
    """The same file with another seed or other sets, and a port in use, are refused in one line."""
    one = server()
    one.ask("left", 0)
    for flags in (["--seed", "1"], ["--num", "5"]):
        with pytest.raises(SystemExit):
            server(*flags)
        assert "holds votes on other pairs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        server("--port", str(one.http.server_address[1]))
    assert "choose another" in capsys.readouterr().err


def test_tally_as_on_the_slide(tmp_path, capsys):
    """684 wins, 21 ties, 295 losses of 1,000 are the slide's 68.4, 2.1, 29.5 (Emu against SDXL);
    with interval, sign test, position and self-agreement; several raters by majority."""
    header = dict(A="emu", B="sdxl", digest="x", seed=0, num=1000, repeats=0.01)
    votes = ["A"] * 684 + ["tie"] * 21 + ["B"] * 295
    lines = [dict(trial=i, pair=i, left="AB"[i % 2], vote=v, repeat=False)
             for i, v in enumerate(votes)]
    lines += [dict(trial=1000 + i, pair=i, left="AB"[(i + 1) % 2], vote="A" if i < 8 else "B",
                   repeat=True) for i in range(10)]
    write = lambda name, lines: (tmp_path / name).write_text(
        "".join(json.dumps(x) + "\n" for x in [header, *lines]))
    write("v.jsonl", lines)
    fid.main(["--tally", str(tmp_path / "v.jsonl")])
    out = capsys.readouterr().out
    assert re.search(r"A over B\s+68.4\s+2.1\s+29.5\n", out)
    low, high = fid.wilson(684, 979)
    assert f"{100 * low:.1f} to {100 * high:.1f} %" in out and "is shown at 5 %" in out
    assert "8 of 10 hidden repeats" in out and re.search(r"chosen in (49|50|51)\.\d %", out)
    few = [dict(trial=i, pair=i, left="A", vote=v, repeat=False)
           for i, v in enumerate("AAAAAABBBB")]
    write("few.jsonl", few)
    fid.main(["--tally", str(tmp_path / "few.jsonl")])
    out = capsys.readouterr().out
    assert "not shown" in out and f"about {fid.votes_needed(0.6) - 10} more" in out
    write("two.jsonl", [dict(x, vote="A") for x in few])
    fid.main(["--tally", *(str(tmp_path / n) for n in ("few.jsonl", "two.jsonl"))])
    assert re.search(r"A over B\s+60.0\s+40.0\s+0.0", capsys.readouterr().out)


def test_page_in_a_browser(server):
    """Chromium, where it is installed, draws the pair and shows the progress, without an error."""
    import shutil

    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("chromium is not installed")
    one = server()
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           "--virtual-time-budget=3000", one.url], capture_output=True, text=True,
                          timeout=60)
    assert "0 of 10 done" in done.stdout and 'width="5"' in done.stdout and "class " in done.stdout
