"""fid.py against closed forms, brute force and published numbers. (The
comparison with pytorch-fid and torch-fidelity is experiments/bench_fid.py.)"""

import gzip
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from inprocess import call
from PIL import Image

import fid

ROOT = fid.HERE


def cloud(n, d, seed=0, mix=True):
    """Points (n, d) of a Gaussian with a mean and a full covariance of its own."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    A = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
    A = A if mix else torch.eye(d, dtype=torch.float64)
    return x @ A + torch.randn(d, generator=g, dtype=torch.float64)


def fd(X, Y):
    return fid.frechet_distance(*fid.gaussian(X), *fid.gaussian(Y))


def power(S, p):
    w, V = torch.linalg.eigh(S)
    return V * w**p @ V.T


# ---- 1. The distance -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 10, 40, 300])
def test_distance_against_the_data_themselves(n):
    """d_F from mu and S is, with centred, scaled data, |gap|^2 + |X|^2 + |Y|^2 - 2 times the
    nuclear norm of X Y^T, where no covariance and no root is ever formed; for N < D too."""
    for seed in range(5):
        X, Y = cloud(n, 24, seed), cloud(n + 5, 24, seed + 50)
        a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (X, Y))
        gap = (X.mean(0) - Y.mean(0)).square().sum()
        oracle = gap + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
        assert fd(X, Y) == pytest.approx(float(oracle), rel=1e-10)


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
    assert fd(X, X + torch.arange(6.0).double()) == pytest.approx(55, rel=1e-10)
    a, b = X[:, :1], Y[:, :1]
    one = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
    found = fid.frechet_distance(a.mean(0), a.var(0)[None], b.mean(0), b.var(0)[None])
    assert found == pytest.approx(one, rel=1e-10)
    zero, A, B = np.zeros(3), np.diag([1.0, 4, 9]), np.diag([4.0, 1, 9])
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    assert fid.frechet_distance(zero, A, zero, B) == pytest.approx(2, abs=1e-12)
    assert fid.frechet_distance(zero, Q @ A @ Q.T, zero, Q @ B @ Q.T) == pytest.approx(2, abs=1e-12)
    assert fd(3 * X, 3 * Y) == pytest.approx(9 * fd(X, Y), rel=1e-10)
    assert fd(X, Y) == pytest.approx(fd(Y, X), rel=1e-10)
    R = torch.linalg.qr(cloud(6, 6, 9))[0]
    assert fd(X @ R, Y @ R) == pytest.approx(fd(X, Y), rel=1e-10)


def test_distance_is_the_least_mean_squared_gap():
    """The best pairing of two Gaussians' points, x -> m2 + T (x - m1) with T S1 T = S2, has d_F as
    its mean squared gap; another pairing has more."""
    X, Y, eye = cloud(400, 5, 5), cloud(400, 5, 6), torch.eye(5)
    (m1, S1), (m2, S2) = fid.gaussian(X), fid.gaussian(Y)
    half = power(S1, 0.5)
    T = power(S1, -0.5) @ power(half @ S2 @ half, 0.5) @ power(S1, -0.5)
    other = power(S2, 0.5) @ torch.linalg.qr(cloud(5, 5, 7))[0] @ power(S1, -0.5)

    def gap(M):
        return float((m1 - m2).square().sum() + torch.trace((M - eye) @ S1 @ (M - eye).T))

    for M in (T, other):
        assert torch.allclose(M @ S1 @ M.T, S2)
    assert gap(T) == pytest.approx(fd(X, Y), rel=1e-10) and gap(other) > fd(X, Y) + 0.1


def test_distance_of_2048_features():
    """pytorch-fid's own test: unit covariances, means 0 and 1, 2048 features: 2048."""
    eye = torch.eye(2048).double()
    assert fid.frechet_distance(0 * eye[0], eye, 0 * eye[0] + 1, eye) == pytest.approx(2048, 1e-12)


def test_distance_refuses_what_is_no_covariance():
    """Unequal shapes, negative eigenvalues and NaN raise ValueError, and do not give a number."""
    eye, zero = np.eye(3), np.zeros(3)
    for bad in ((zero, eye, np.zeros(2), np.eye(2)), (zero, eye, zero, np.eye(2)),
                (zero, eye, zero, np.diag([1, 1, -1.0]))):
        with pytest.raises(ValueError):
            fid.frechet_distance(*bad)


def test_usual_mistakes_are_larger_than_the_tolerances():
    """Transposed features and dividing by N change the number by more than any tolerance above;
    float32 features with a far mean keep their covariance."""
    X, Y = cloud(40, 40, 1), cloud(40, 40, 2)
    (m1, S1), (m2, S2) = fid.gaussian(X), fid.gaussian(Y)
    for wrong in ((X.mean(0), torch.cov(X), Y.mean(0), torch.cov(Y)),
                  (m1, S1 * 39 / 40, m2, S2 * 39 / 40)):
        assert abs(fid.frechet_distance(*wrong) / fd(X, Y) - 1) > 1e-3
    far = (X + 3000).float()
    assert (fid.gaussian(far)[1] - torch.cov(far.double().T)).abs().max() < 1e-9


def test_distance_at_infinity_is_nearer_to_the_truth():
    """The line in 1/N is closer to the true distance, 0, than plain d_F, over 20 seeds."""
    plain, far = [], []
    for seed in range(20):
        X, Y = cloud(20_000, 16, seed, mix=False), cloud(1000, 16, seed + 99, mix=False)
        X, Y = X - X.mean(0), Y - Y.mean(0)
        plain.append(abs(fd(X, Y)))
        far.append(abs(fid.distance_at_infinity(*fid.gaussian(X), Y)))
    assert np.mean(far) < 0.35 * np.mean(plain)


def test_distance_at_infinity_of_sorted_classes():
    """Samples sorted by class, as many of each: parts of them have all classes."""
    X, y = cloud(1000, 8, mix=False), torch.arange(1000) // 500
    X[:, 0] += 20 * y
    whole = cloud(40_000, 8, mix=False)
    whole[:, 0] += 20 * (torch.arange(40_000) % 2)
    assert abs(fid.distance_at_infinity(*fid.gaussian(whole), X)) < 1.5 * fd(whole, X)


# ---- 2. Other numbers ----------------------------------------------------------------------------


def test_kid_is_unbiased():
    """For two samples of one distribution it is 0 on average; for others it is above 0."""
    g = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randn(n, 8, generator=g)
    values = [fid.kid(draw(300), draw(200)) for _ in range(40)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 40**0.5 and min(values) < 0
    assert fid.kid(draw(300), 1 + draw(200)) > 20 * np.std(values)


def test_kid_against_loops():
    """By the definition, pair by pair; and in several chunks."""
    X, Y = cloud(7, 3, 1), cloud(5, 3, 2)
    k = lambda a, b: (float(a @ b) / 3 + 1) ** 3
    mean = lambda A, B, same: np.mean([k(a, b) for i, a in enumerate(A) for j, b in enumerate(B)
                                       if not (same and i == j)])
    expected = mean(X, X, True) + mean(Y, Y, True) - 2 * mean(X, Y, False)
    assert fid.kid(X, Y) == pytest.approx(expected)
    X, Y = cloud(2500, 3, 1), cloud(1500, 3, 2)
    kernel = lambda A, B: (A @ B.T / 3 + 1) ** 3
    off = lambda K: (K.sum() - K.trace()) / (len(K) * (len(K) - 1))
    expected = off(kernel(X, X)) + off(kernel(Y, Y)) - 2 * kernel(X, Y).mean()
    assert fid.kid(X, Y) == pytest.approx(float(expected))


def test_precision_and_recall_by_hand():
    """On a line: real 0..9, samples inside, outside, and both; a set against itself is 1 and 1."""
    real = torch.arange(10.0)[:, None]
    assert fid.precision_recall(real, real) == (1.0, 1.0)
    assert fid.precision_recall(real, real + 100) == (0.0, 0.0)
    narrow = 4.5 + torch.arange(10.0)[:, None] / 100
    assert fid.precision_recall(real, narrow) == (1.0, 0.0)
    half = torch.cat([real[:5], real[:5] + 1000])
    precision, recall = fid.precision_recall(real, half, k=1)
    assert precision == 0.5 and recall >= 0.5


def test_balls_reach_to_the_kth_neighbour():
    """Of real points 0..9 the outermost one's k-th neighbour is at distance k: a sample just within
    counts, one just beyond does not. The point itself is no neighbour."""
    real = torch.arange(10.0)[:, None]
    for k in (1, 2, 3):
        inside, outside = (torch.full((10, 1), 9 + k + d) for d in (-0.1, 0.1))
        assert fid.precision_recall(real, inside, k)[0] == 1.0
        assert fid.precision_recall(real, outside, k)[0] == 0.0


# ---- 3. Inception --------------------------------------------------------------------------------


def published_names(counters):
    """Names and shapes of the published file, and weights under which nothing vanishes: He's scale,
    batch norms far from the identity."""
    g, state = torch.Generator().manual_seed(0), {}
    model = fid.inception()
    names = [f"Conv2d_{n}" for n in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    for block, kind in zip("5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split(), "aaabccccdee"):
        names += [f"Mixed_{block}.branch{b}" for b in fid.BRANCHES[kind].split()]
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.BatchNorm2d))]
    for name, conv, bn in zip(names, layers[::2], layers[1::2], strict=True):
        shape, C = conv.weight.shape, bn.num_features
        state[f"{name}.conv.weight"] = (torch.randn(shape, generator=g)
                                        * (2 / shape[1:].numel()) ** 0.5)
        state[f"{name}.bn.weight"] = 0.5 + torch.rand(C, generator=g)
        state[f"{name}.bn.bias"] = 0.2 * torch.randn(C, generator=g)
        state[f"{name}.bn.running_mean"] = 0.2 * torch.randn(C, generator=g)
        state[f"{name}.bn.running_var"] = 0.5 + torch.rand(C, generator=g)
        if counters:
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"], state["fc.bias"] = torch.randn(1008, 2048, generator=g), torch.zeros(1008)
    return state


def test_inception_counts():
    """94 convolutions; parameters, names and shapes of the published file, which comes with and
    without the counters of batch norm (566 and 472 names)."""
    model = fid.inception()
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 94 and sum(c.weight.numel() for c in convs) == 21_751_136
    assert sum(p.numel() for p in model.parameters()) == 21_785_568
    for counters, count in ((True, 566), (False, 472)):
        state = published_names(counters)
        assert len(state) == count
        for conv, shape in (("Conv2d_1a_3x3", (32, 3, 3, 3)),
                            ("Mixed_5b.branch5x5_2", (64, 48, 5, 5)),
                            ("Mixed_5d.branch_pool", (64, 288, 1, 1)),
                            ("Mixed_6a.branch3x3", (384, 288, 3, 3)),
                            ("Mixed_6a.branch3x3dbl_3", (96, 96, 3, 3)),
                            ("Mixed_6b.branch7x7_3", (192, 128, 7, 1)),
                            ("Mixed_6b.branch7x7dbl_5", (192, 128, 1, 7)),
                            ("Mixed_7a.branch7x7x3_2", (192, 192, 1, 7)),
                            ("Mixed_7b.branch3x3_2a", (384, 384, 1, 3)),
                            ("Mixed_7c.branch3x3dbl_3b", (384, 384, 3, 1))):
            assert state[f"{conv}.conv.weight"].shape == shape, conv
        fid.load_published(model, state)
    first = state["Conv2d_1a_3x3.conv.weight"]
    assert torch.equal(next(model.parameters()), first)


def test_features_are_torch_fidelitys():
    """Eight of the 2,048 features of two images, as torch-fidelity 0.4.0 computes them with these
    weights; and, in eval mode, the same alone and in a batch."""
    model = fid.load_published(fid.inception(), published_names(False))
    x = torch.randint(256, (2, 3, 20, 24), generator=torch.Generator().manual_seed(0)).float()
    x = (fid.resize_tf1(x, 299) - 128) / 128
    golden = torch.tensor([[0.0064, 0.2293, 0.0251, 0.0143, 7.9797, 0.0202, 3.5437, 0.1239],
                           [0.0, 0.2153, 0.0886, 0.0165, 8.3663, 0.0176, 3.2154, 0.155]])
    with torch.no_grad():
        found = model(x)
        assert found.shape == (2, 2048) and torch.allclose(found[:, ::256], golden, atol=1e-3)
        assert found.mean().item() == pytest.approx(2.398002, rel=1e-4)
        assert torch.allclose(model(x[1:]), found[1:], rtol=1e-4, atol=1e-5)


def test_resize_is_tensorflow_1s():
    """Vectors that tell it from the two resizes of PyTorch; rows like columns; same size, same."""
    def line(v, n):
        return fid.resize_tf1(torch.tensor(v).view(1, 1, 1, -1).float(), n)[0, 0, 0].tolist()

    assert line([0, 10, 20, 30], 6) == pytest.approx([0, 20 / 3, 40 / 3, 20, 80 / 3, 30], abs=1e-5)
    assert line(list(range(8)), 3) == pytest.approx([0, 8 / 3, 16 / 3], abs=1e-5)
    x = torch.rand(2, 3, 5, 9)
    turned = fid.resize_tf1(x.transpose(2, 3), 7).transpose(2, 3)
    assert torch.allclose(turned, fid.resize_tf1(x, 7), atol=1e-6)
    y = torch.rand(1, 2, 11, 11)
    assert torch.equal(fid.resize_tf1(y, 11), y)


def test_wrong_weights_are_refused(tmp_path, monkeypatch):
    """The file in torch's cache is checked by its size and its sha256."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / fid.WEIGHTS).write_bytes(b"12345")
    for size in (fid.WEIGHTS_BYTES, 5):
        monkeypatch.setattr(fid, "WEIGHTS_BYTES", size)
        with pytest.raises(ValueError, match="is not the published file: 5 bytes"):
            fid.load_inception()


# ---- 4. and 5. Features of our own ---------------------------------------------------------------


@pytest.fixture(scope="module")
def judge():
    args = fid.parse_args(["--device", "cpu", "--data-dir", str(ROOT / "data")])
    f, title = fid.choose_features(args)
    assert title == "FD (our features)"
    return f, args


def test_classifier_reads_the_test_set(judge):
    """The pretrained classifier has an accuracy of at least 0.995 on all 10,000 test digits."""
    f, args = judge
    found = fid.summarise(f, *fid.load_data("mnist", "test", ROOT / "data"), args, "test")
    assert found["X"].shape == (10_000, 128) and found["mu"].dtype == torch.float64
    assert (found["logits"].argmax(1) == found["labels"]).float().mean() >= 0.995


def test_kid_of_real_digits_hardly_varies(judge):
    """1,000 test digits, 100 of each class, against 10,000 training digits: over ten such sets KID
    x 1000 varies by 0.03 (0.12 with classes by chance), where blocks of 100 images vary by 1."""
    f, args = judge
    x, y = fid.load_data("mnist", "test", ROOT / "data")
    X = fid.summarise(f, x, None, args, "test")["X"]
    known = fid.load_data("mnist", "train", ROOT / "data")[0][:10_000]
    Y, g = fid.summarise(f, known, None, args, "train")["X"], torch.Generator().manual_seed(0)
    values = []
    for _ in range(10):
        index = torch.randperm(len(y), generator=g)
        index = torch.cat([index[y[index] == c][:100] for c in range(10)])
        values.append(1000 * fid.kid(Y, X[index]))
    assert np.std(values) < 0.1, values


def test_a_classifier_needs_two_classes(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 8, 8, 1), np.uint8))
    said = call(fid, "--train", "--data", "x.npz", cwd=tmp_path, code=2)
    assert "x.npz has one class" in said


def test_augment_moves_a_little_and_mirrors_on_demand():
    """Brightness stays, every image changes, no digit is mirrored unless asked."""
    x = fid.to_float(fid.load_data("mnist", "test", ROOT / "data")[0][:64])
    torch.manual_seed(0)
    for flip, low, high in ((0.0, 0.0, 0.1), (0.5, 0.3, 0.7)):
        y = fid.augment(x, flip)
        assert y.shape == x.shape and (y.mean() - x.mean()).abs() < 0.05
        assert not any(torch.equal(a, b) for a, b in zip(x, y))
        mirrored = (y - x.flip(3)).flatten(1).norm(dim=1) < (y - x).flatten(1).norm(dim=1)
        assert low <= mirrored.float().mean() <= high


# ---- 6. Sets of images ---------------------------------------------------------------------------


def test_all_sources_give_the_same_images(tmp_path):
    """A folder of PNG files with a subfolder, .npy, .npz with and without labels, grey without a
    channel axis; slices of each."""
    x = np.random.default_rng(0).integers(256, size=(40, 5, 4, 3), dtype=np.uint8)
    y = np.arange(40) % 7
    (tmp_path / "a/b").mkdir(parents=True)
    for i in range(30):
        Image.fromarray(x[i]).save(tmp_path / "a" / ("b" * (i > 20)) / f"{i:03}.png")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "g.npy", x[..., 0])
    np.savez(tmp_path / "x.npz", arr_0=x, labels=y)
    np.savez_compressed(tmp_path / "z.npz", images=x)
    want = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    for name in ("x.npy", "x.npz", "z.npz"):
        for part, rows in (("", slice(None)), ("[9:21]", slice(9, 21)), ("[:3]", slice(3))):
            assert torch.equal(fid.read_images(f"{tmp_path / name}{part}", None)[0], want[rows])
    labels = fid.read_images(f"{tmp_path / 'x.npz'}[6:]", None)[1]
    assert torch.equal(labels, torch.from_numpy(y[6:]))
    assert torch.equal(fid.read_images(f"{tmp_path / 'g.npy'}", None)[0], want[:, :1])
    assert torch.equal(fid.read_images(f"{tmp_path / 'a'}", None)[0], want[:30])
    assert torch.equal(fid.read_images(f"{tmp_path / 'a'}[2:4]", None)[0], want[2:4])
    raw = gzip.decompress((ROOT / "data/mnist/t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    digits = fid.read_images("mnist:test[3:5]", ROOT / "data")[0]
    assert digits.numpy().tobytes() == raw[3 * 784:5 * 784]


def test_pixel_anchors():
    """Golden numbers of MNIST in pixel space, to 8 digits; the rank is 661 of 784."""
    def pixels(spec):
        return fid.gaussian(fid.read_images(spec, ROOT / "data")[0].flatten(1).double() / 255)

    test = pixels("mnist:test")
    for spec, golden in (("mnist:train[:10000]", 0.589357622), ("mnist:train[:500]", 4.660333231),
                         ("mnist:train[:2000]", 1.759719643)):
        assert fid.frechet_distance(*pixels(spec), *test) == pytest.approx(golden, rel=1e-8)
    shifted = fid.frechet_distance(*test, test[0] + 1 / 255, test[1])
    assert shifted == pytest.approx(0.012056901, rel=1e-7)


# ---- 7. The report -------------------------------------------------------------------------------


def table(text):
    """{row: numbers} of the report."""
    rows = {}
    for line in text.splitlines():
        name, cells = line[:20].strip(), line[20:].split()
        with np.errstate(all="ignore"):
            try:
                rows[name] = [float(c) for c in cells if c != "-"]
            except ValueError:
                continue
    return rows


def test_report_on_real_digits(tmp_path):
    """Test digits are at the floor with nearly all labels read; noisy ones with wrong labels are
    not. Statistics that are saved stand for their set."""
    x, y = fid.load_data("mnist", "test", ROOT / "data")
    for name, images, labels in (("good", x[:1000], y[:1000]),
                                 ("bad", fid.noise(x[:1000], 60), (y[:1000] + 1) % 10)):
        np.savez(tmp_path / f"{name}.npz", images.permute(0, 2, 3, 1), labels=labels)
    real = "mnist:train[:5000]"
    data = ["--data-dir", ROOT / "data"]
    call(fid, real, "--save-stats", "ref.npz", *data, cwd=tmp_path)
    good, bad = (table(call(fid, real, f"{n}.npz", *data, cwd=tmp_path)) for n in ("good", "bad"))
    distance = "FD (our features)"
    assert good[distance][0] < 2 * good[distance][1] and bad[distance][0] > 50 * bad[distance][1]
    assert good["accuracy"][0] > 0.99 > 0.1 > bad["accuracy"][0]
    assert good["precision"][0] > 0.8 and bad["precision"][0] < 0.2
    assert good["at infinite N"][0] < good[distance][0]
    stats = table(call(fid, "ref.npz", "good.npz", *data, cwd=tmp_path))
    assert stats[distance] == [pytest.approx(good[distance][0], abs=1e-3)]
    assert "KID x 1000" not in stats


def test_floor_has_the_classes_of_the_samples(judge):
    f, args = judge
    args.sets = ["mnist:test", "x"]
    real = fid.read_set("mnist:test[:100]", f, args)
    fake = dict(real, n=50, labels=torch.tensor([3] * 20 + [8] * 30))
    _, found = fid.floor_of(real, fake, f, args)
    assert found["labels"].bincount()[[3, 8]].tolist() == [20, 30] and found["n"] == 50
    args.sets = ["x.npz", "x"]
    rest, found = fid.floor_of(real, fake, f, args)
    assert (rest["n"], found["n"]) == (50, 50) and not torch.equal(rest["X"], found["X"])


# ---- 8. and 9. Votes and damage ------------------------------------------------------------------


def test_preference_of_the_slide():
    """684 wins, 21 ties, 295 losses: the slide's 68.4, 2.1, 29.5 (Emu against SDXL); Wilson's
    interval solves |p - share| = z sqrt(p (1 - p) / n); the sign test by counting all outcomes."""
    found = fid.preference(684, 21, 295)
    assert (found["win"], found["tie"], found["lose"]) == (0.684, 0.021, 0.295)
    for p in (found["low"], found["high"]):
        assert abs(p - 684 / 979) == pytest.approx(1.96 * (p * (1 - p) / 979) ** 0.5)
    assert found["p"] < 1e-30 and fid.preference(5, 0, 5)["p"] == 1
    outcomes = [bin(i).count("1") for i in range(2**10)]
    by_hand = np.mean([min(k, 10 - k) <= 2 for k in outcomes])
    assert fid.preference(8, 3, 2)["p"] == pytest.approx(by_hand)


def test_damages():
    """Blur is a mean over neighbours; noise has the spread asked for; shares are kept."""
    dot = torch.full((2, 3, 9, 9), 9, dtype=torch.uint8)
    dot[..., 4, 0] = 90
    want = dot.clone()
    want[..., 3:6, 0], want[..., 3:6, 1] = 22, 18  # at the border: of 6 pixels instead of 9
    assert torch.equal(fid.blur(dot, 3), want)
    grey = torch.full((10, 1, 20, 20), 128, dtype=torch.uint8)
    assert fid.noise(grey, 16).float().std() == pytest.approx(16, rel=0.05)
    x = torch.randint(256, (100, 1, 6, 6), dtype=torch.uint8)
    shuffled, repeated = fid.shuffle_pixels(x, 0.3), fid.repeat_images(x, 0.3)
    for y in (shuffled, repeated):
        assert y.shape == x.shape and torch.equal(y[:70], x[30:])
    assert torch.equal(shuffled[70:].flatten(1).sort().values, x[:30].flatten(1).sort().values)
    assert not any(torch.equal(a, b) for a, b in zip(shuffled[70:], x[:30]))
    assert torch.equal(repeated[70:90], x[:20]) and torch.equal(repeated[90:], x[:10])


# ---- Bad input: one line, exit code 2 ------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    x = np.random.default_rng(0).integers(256, size=(40, 28, 28, 1), dtype=np.uint8)
    for name, array in (("ok", x), ("one", x[:1]), ("big", x[:, :20, :20]),
                        ("range", x / 127.5 - 1), ("first", x.transpose(0, 3, 1, 2).repeat(3, 1))):
        np.save(folder / f"{name}.npy", array)
    (folder / "cut.npy").write_bytes((folder / "ok.npy").read_bytes()[:-100])
    np.savez(folder / "other.npz", weights=x)
    np.savez(folder / "few.npz", images=x, labels=np.zeros(3, int))
    np.savez(folder / "minus.npz", images=x, labels=np.full(40, -1))
    np.savez(folder / "mu.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(folder / "nan.npz", mu=np.full(128, np.nan), sigma=np.eye(128))
    np.savez(folder / "neg.npz", mu=np.zeros(128), sigma=-np.eye(128))
    (folder / "text.npz").write_text("no zip")
    for name in ("empty", "mixed", "torn"):
        (folder / name).mkdir()
    Image.fromarray(x[0, :, :, 0]).save(folder / "mixed/a.png")
    Image.fromarray(x[0, :9, :, 0]).save(folder / "mixed/b.png")
    (folder / "torn/a.png").write_bytes((folder / "mixed/a.png").read_bytes()[:60])
    return folder


@pytest.mark.parametrize("fake, words", [
    ("one.npy", "1 images; expected two or more"), ("ok.npy[40:]", "0 images"),
    ("big.npy", "images of shape [1, 20, 20], but the classifier was trained on"),
    ("first.npy", "expected uint8 (N, H, W, 1 or 3)"), ("range.npy", "found float64"),
    ("few.npz", "found labels (3,)"), ("minus.npz", "found labels (40,)"), ("cut.npy", "cut.npy"),
    ("other.npz", "images"), ("mu.npz", "shapes differ"),
    ("nan.npz", "not finite"), ("neg.npz", "not a covariance"), ("text.npz", "text.npz"),
    ("empty", "empty"), ("mixed", "same shape"), ("torn", "torn"), ("none.npz", "No such file"),
    ("nonsense", "nonsense")])
def test_bad_sets(bad, fake, words):
    message = call(fid, "ok.npy", fake, "--device", "cpu", cwd=bad, code=2)
    assert words in message and message.count("\n") == 1 and message.startswith("fid.py: ")
