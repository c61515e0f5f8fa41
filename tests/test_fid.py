"""fid.py against closed forms, brute force and published numbers."""

import numpy as np
import pytest
import torch
from inprocess import call
from PIL import Image

import bench_fid
import fid
import fid_damage

DATA = fid.HERE / "data"


def cloud(n, d, seed=0):
    """Points (n, d) of a Gaussian with a mean and a full covariance of its own."""
    g = torch.Generator().manual_seed(seed)
    x, A, mean = (torch.randn(k, d, generator=g, dtype=torch.float64) for k in (n, d, 1))
    return x @ A / d**0.5 + mean


def power(S, p):
    w, V = torch.linalg.eigh(S)
    return V * w**p @ V.T


def test_distance_by_three_other_ways():
    """By the nuclear norm of X Y^T, centred, also for N < D; by the eigenvalues of S1 S2; as the
    mean squared gap of the best pairing, x -> m2 + T (x - m1) with T S1 T = S2; and 0 to itself."""
    for n in (3, 10, 40, 300):
        X, Y = cloud(n, 24, n), cloud(n + 5, 24, n + 1)
        a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (X, Y))
        gap = (X.mean(0) - Y.mean(0)).square().sum()
        want = gap + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
        found = fid.frechet_distance(*fid.gaussian(X), *fid.gaussian(Y))
        assert found == pytest.approx(float(want), rel=1e-10)
    S1, S2, half, back = a.T @ a, b.T @ b, power(a.T @ a, 0.5), power(a.T @ a, -0.5)
    want = gap + torch.trace(S1 + S2) - 2 * torch.linalg.eigvals(S1 @ S2).sqrt().real.sum()
    assert found == pytest.approx(float(want), rel=1e-8)
    M = back @ power(half @ S2 @ half, 0.5) @ back - torch.eye(24)
    assert found == pytest.approx(float(gap + torch.trace(M @ S1 @ M.T)), rel=1e-8)
    constant = X * (torch.arange(24) != 3)
    for x in (X, X[:10], X[:5].repeat(4, 1), constant, torch.ones(5, 8)):
        mu, S = fid.gaussian(x)
        assert abs(fid.frechet_distance(mu, S, mu, S)) <= 1e-9 * max(1.0, float(S.trace()))
    far = (X + 3000).float()  # float32 features keep their covariance
    assert (fid.gaussian(far)[1] - torch.cov(far.double().T)).abs().max() < 1e-9


def test_distance_at_infinity_is_nearer_to_the_truth():
    """0, over 20 seeds, than plain d_F; also for samples sorted by class. NaN for N <= 4 D."""
    zero, eye, step = torch.zeros(8), torch.eye(8), 10 * torch.eye(8)[0]
    draws = [torch.randn(500, 8, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    plain = [abs(fid.frechet_distance(zero, eye, *fid.gaussian(Y))) for Y in draws]
    far = [abs(fid.distance_at_infinity(zero, eye, Y, 5)) for Y in draws]
    assert np.mean(far) < 0.5 * np.mean(plain)
    Y, S = draws[0] + torch.linspace(-1, 1, 500).sign()[:, None] * step, eye + step.diag() * 10
    plain = fid.frechet_distance(zero, S, *fid.gaussian(Y))
    assert abs(fid.distance_at_infinity(zero, S, Y)) < 1.5 * plain
    assert np.isnan(fid.distance_at_infinity(zero, eye, draws[0][:32]))


def test_kid_precision_and_recall():
    """KID by its definition, also in chunks; on a line 0..9, the ball around 9 reaches k on."""
    for n, m in ((7, 5), (2100, 1100)):
        X, Y = cloud(n, 3, 1), cloud(m, 3, 2)
        xx, yy, xy = ((A @ B.T / 3 + 1) ** 3 for A, B in ((X, X), (Y, Y), (X, Y)))
        within = [K[~torch.eye(len(K), dtype=torch.bool)].mean() for K in (xx, yy)]
        assert fid.kid(X, Y) == pytest.approx(float(sum(within) - 2 * xy.mean()))
    real = torch.arange(10.0)[:, None]
    assert fid.precision_recall(real, real) == (1.0, 1.0)
    assert fid.precision_recall(real, 4.5 + real / 100) == (1.0, 0.0)
    half = torch.cat([real[:5], real[:5] + 1000])  # whose ball around 4 reaches to 5
    assert fid.precision_recall(real, half, k=1) == (0.5, pytest.approx(0.6))
    for k, d in ((1, 0.1), (1, -0.1), (2, 0.1), (2, -0.1), (3, 0.1), (3, -0.1)):
        assert fid.precision_recall(real, torch.full((10, 1), 9 + k + d), k)[0] == (d < 0)


def test_features_are_torch_fidelitys(monkeypatch):
    """Names and shapes are the published file's; features of two images are torch-fidelity 0.4.0's
    with the same random weights. torch.hub is asked to check the hash of the file."""
    state = bench_fid.random_weights()
    model = fid.load_published(fid.inception(), state)
    assert len(state) == 5 * 94 and sum(p.numel() for p in model.parameters()) == 21_785_568
    assert {f"{name[6:-12]} {tuple(v.shape)}" for name, v in state.items()} > {
        "5b.branch5x5_2 (64, 48, 5, 5)", "5d.branch_pool (64, 288, 1, 1)",
        "6a.branch3x3 (384, 288, 3, 3)", "6b.branch7x7_3 (192, 128, 7, 1)",
        "6b.branch7x7dbl_5 (192, 128, 1, 7)", "7a.branch7x7x3_2 (192, 192, 1, 7)",
        "7b.branch3x3_2a (384, 384, 1, 3)", "7c.branch3x3dbl_3b (384, 384, 3, 1)"}
    x = torch.randint(256, (2, 3, 20, 24), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        found = model((fid.resize_tf1(x, 299) - 128) / 128)
    golden = torch.tensor([[0.0064, 0.2293, 0.0251, 0.0143, 7.9797, 0.0202, 3.5437, 0.1239],
                           [0.0, 0.2153, 0.0886, 0.0165, 8.3663, 0.0176, 3.2154, 0.155]])
    assert found.shape == (2, 2048) and torch.allclose(found[:, ::256], golden, atol=1e-3)
    assert found.mean().item() == pytest.approx(2.398002, rel=1e-4)
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: (
        asked.append((url[-13:], options)), state)[1])
    pairs = zip(fid.load_inception().state_dict().values(), model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert asked == [("-6726825d.pth", {"check_hash": True, "weights_only": True})]


def test_measures_of_real_digits():
    """Test digits are at the floor, which has their classes; noisy ones, wrong labels are not."""
    args = fid.parse_args(["mnist:train", "x", "--device", "cpu"])
    f, _ = fid.choose_features(args)
    real = fid.read_set("mnist:train[:400]", f, args)
    x, y = fid.read_images("mnist:test[:200]", DATA)
    good = fid.summarise(f, x, y, args, "good")
    bad = fid.summarise(f, fid_damage.noise(x, 60), (y + 1) % 10, args, "bad")
    _, base = fid.floor_of(real, good, f, args)
    assert torch.equal(base["labels"].bincount(), y.bincount())
    good, bad, base = (fid.measures(real, found) for found in (good, bad, base))
    assert good["distance"] < 2 * base["distance"] < bad["distance"] / 5
    assert min(good["accuracy"], base["accuracy"]) > 0.97 and bad["accuracy"] < 0.2
    assert good["precision"] > 0.7 and bad["precision"] < 0.2
    args.sets = ["x.npz", "x"]
    rest, part = fid.floor_of(real, dict(real, n=150), f, args)
    assert torch.equal(torch.cat([rest["X"], part["X"]]).sort(0)[0], real["X"].sort(0)[0])


def test_sources_and_saved_statistics(tmp_path):
    """PNG files, .npy, .npz, and slices give the same images, and statistics the same distance."""
    x = np.random.default_rng(0).integers(256, size=(30, 5, 4, 3), dtype=np.uint8)
    (tmp_path / "a/b").mkdir(parents=True)
    for i in range(30):
        Image.fromarray(x[i]).save(tmp_path / "a" / ("b" * (i > 20)) / f"{i:03}.png")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "g.npy", x[..., 0])
    np.savez(tmp_path / "x.npz", arr_0=x, labels=np.arange(30))
    want = torch.from_numpy(x).permute(0, 3, 1, 2)
    for name in ("a", "x.npy", "x.npz", "g.npy"):
        for part, rows in (("", slice(None)), ("[9:21]", slice(9, 21)), ("[:3]", slice(3))):
            images, labels = fid.read_images(f"{tmp_path / name}{part}", None)
            assert torch.equal(images, want[rows, :1] if name == "g.npy" else want[rows])
            assert name != "x.npz" or torch.equal(labels, torch.arange(30)[rows])
    call(fid, "x.npz", "--save-stats", "stats.npz", "--features", "pixels", cwd=tmp_path)
    rows = [call(fid, real, "x.npy[:9]", "--features", "pixels", cwd=tmp_path).splitlines()[1]
            for real in ("x.npz", "stats.npz")]
    assert rows[0].split()[:3] == rows[1].split()[:3] and rows[0].startswith("FD (pixels)  ")


def test_preference_of_the_slide():
    """Wilson's interval solves |p - share| = z sqrt(p (1 - p) / n); all outcomes are counted."""
    found = fid.preference(684, 21, 295)
    assert (found["win"], found["tie"], found["lose"]) == (0.684, 0.021, 0.295)
    for p in (found["low"], found["high"]):
        assert abs(p - 684 / 979) == pytest.approx(1.96 * (p * (1 - p) / 979) ** 0.5)
    by_hand = np.mean([not 2 < bin(i).count("1") < 8 for i in range(2**10)])
    assert fid.preference(8, 3, 2)["p"] == pytest.approx(by_hand)


def test_damages():
    """By hand; in training, brightness stays, and no digit is mirrored unless asked."""
    dot = torch.full((2, 3, 9, 9), 9, dtype=torch.uint8)
    dot[..., 4, 0] = 90
    want = dot.clone()
    want[..., 3:6, 0], want[..., 3:6, 1] = 22, 18  # at the border: of 6 pixels instead of 9
    assert torch.equal(fid_damage.blur(dot, 3), want)
    noisy = fid_damage.noise(dot.new_full((4000,), 128), 16).float()
    assert noisy.std() == pytest.approx(16, rel=0.05)
    x = fid.read_images("mnist:test[:100]", DATA)[0]
    shuffled, repeated = (f(x, 0.3) for f in (fid_damage.shuffle_pixels, fid_damage.repeat_images))
    assert torch.equal(shuffled[:70], x[30:]) and (shuffled[70:] != x[:30]).flatten(1).any(1).all()
    assert torch.equal(shuffled[70:].flatten(1).sort().values, x[:30].flatten(1).sort().values)
    assert torch.equal(repeated, x[[*range(30, 100), *range(20), *range(10)]])
    x = fid.to_float(x)
    for flip, low, high in ((0.0, 0.0, 0.1), (0.5, 0.3, 0.7)):
        y = fid.augment(x, flip)
        assert (y.mean() - x.mean()).abs() < 0.05 < (y - x).abs().mean()
        mirrored = (y - x.flip(3)).flatten(1).norm(dim=1) < (y - x).flatten(1).norm(dim=1)
        assert low <= mirrored.float().mean() <= high


def test_bad_sets_are_refused_in_one_line(tmp_path):
    """Of images, labels or statistics; a damaged picture, and data of one class for training."""
    x = np.zeros((40, 28, 28, 1), np.uint8)
    real = ["--device", "cpu", "ok.npz"]
    for name, words, content in (
            ("ok", "ok.npz has one class", {"images": x}),
            ("one", "1 images; expected two or more", {"images": x[:1]}),
            ("big", "images of shape [1, 20, 20], but", {"images": x[:, :20, :20]}),
            ("first", "expected uint8 (N, H, W, 1 or 3)", {"images": x.transpose(0, 3, 1, 2)}),
            ("range", "found float64", {"images": x / 127.5 - 1}),
            ("few", "found labels (3,)", {"images": x, "labels": np.zeros(3, int)}),
            ("minus", "found labels (40,)", {"images": x, "labels": np.full(40, -1)}),
            ("mu", "shapes differ", {"mu": np.zeros(64), "sigma": np.eye(64)}),
            ("neg", "not a covariance", {"mu": np.zeros(128), "sigma": -np.eye(128)})):
        np.savez(tmp_path / f"{name}.npz", **content)
        flags = ["--train", "--steps", "1", "--data"] if name == "ok" else real
        said = call(fid, *flags, f"{name}.npz", cwd=tmp_path, code=2)
        assert words in said and said.count("\n") == 1 and said.startswith("fid.py: ")
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    for fake in (".", "none.npz", "nonsense"):
        assert call(fid, *real, fake, cwd=tmp_path, code=2).count("\n") == 1
