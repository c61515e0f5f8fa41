"""pixelcnn.py: nothing leaks, nothing earlier is missed, probabilities sum to 1, and the cached
sampler is the plain one."""

import itertools
import math
import signal

import numpy as np
import pytest
import torch

import pixelcnn
from inprocess import call

KINDS = [("gated", "softmax", 1), ("gated", "softmax", 3), ("gated", "logistic", 3),
         ("plain", "softmax", 1), ("plain", "softmax", 3)]
each_kind = pytest.mark.parametrize("arch, likelihood, C", KINDS)


def tiny(arch="gated", likelihood="softmax", C=1, H=5, W=6, K=3, classes=2, D=8,
         dilations=(1, 2, 1)):
    """A network with random weights, place and biases included."""
    torch.manual_seed(0)
    kind = pixelcnn.Gated if arch == "gated" else pixelcnn.Plain
    net = kind([C, H, W], K, classes, D, dilations, 8, likelihood, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return net.eval()


def dependence(net, H, W, C):
    """(H W C, H W C) bool: does the logit of sub-pixel [row] move with sub-pixel [column]? By
    changing one at a time, in float64, over several random images."""
    net = net.double()
    moved = torch.zeros(H * W * C, H * W * C, dtype=torch.bool)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randint(net.K, (1, C, H, W))
        flat = x.permute(0, 2, 3, 1).reshape(-1)  # in reading order, R G B within a pixel
        many = flat.repeat(len(flat), 1)
        many[range(len(flat)), range(len(flat))] = (flat + 1) % net.K
        back = lambda a: a.view(-1, H, W, C).permute(0, 3, 1, 2)
        y = torch.zeros(len(flat), dtype=torch.long)
        with torch.no_grad():
            one, all_ = net(back(flat), y[:1]), net(back(many), y)
        change = (all_ - one).abs().amax(-1).permute(0, 2, 3, 1).reshape(len(flat), -1)
        moved |= change.T > 1e-9 * one.abs().max()  # rounding differs from row to row of a batch
    return moved


@each_kind
def test_nothing_leaks(arch, likelihood, C):
    """No logit moves with its own or a later sub-pixel (slide Learning - CNN)."""
    moved = dependence(tiny(arch, likelihood, C), 5, 6, C)
    if likelihood == "logistic":  # earlier channels act in the likelihood, not through the logits
        pixel = moved.view(30, C, 30, C).any(3).any(1)
        assert not pixel.triu().any()
    else:
        assert not moved.triu().any()


@pytest.mark.parametrize("C", [1, 3])
def test_gated_sees_all_that_came_before(C):
    """Every earlier sub-pixel, whose pixels lie within reach, moves every later one."""
    moved = dependence(tiny("gated", "softmax", C, dilations=(1, 2, 1, 2, 1)), 5, 6, C)
    n = 30 * C
    assert moved[torch.tril(torch.ones(n, n, dtype=torch.bool), -1)].all()


def test_plain_has_the_blind_spot():
    """However many layers, the plain network never sees some pixels above and to the right."""
    net = tiny("plain", H=9, W=13, dilations=[1] * 8).double()
    seen = pixelcnn.field_of(net, 6, 4)[0]
    assert (seen[:5, :5] == 255).all()  # above, left and straight: seen
    assert (seen[5, 10:] == 0).all() and (seen[6, 4:] != 255).all() and (seen[7:] == 0).all()
    full = pixelcnn.field_of(tiny("gated", H=9, W=13, dilations=[1, 2, 4, 1, 2, 4]).double(), 6, 4)[0]
    assert (full[:6] == 255).all() and (full[6, :4] == 255).all()
    assert (full[6, 5:] == 0).all() and (full[7:] == 0).all()


@pytest.mark.parametrize("likelihood, C, K", [("softmax", 1, 3), ("logistic", 1, 3),
                                              ("softmax", 3, 2), ("logistic", 3, 2)])
@pytest.mark.parametrize("arch", ["gated", "plain"])
def test_probabilities_sum_to_one(arch, likelihood, C, K):
    """Over all images of 2 x 2 (1 x 2 in colour) pixels, for each class: "different values of x
    compete for density" (slide Generative Models)."""
    H, W = (2, 2) if C == 1 else (1, 2)
    net = tiny(arch, likelihood, C, H, W, K).double()
    x = torch.tensor(list(itertools.product(range(K), repeat=C * H * W))).view(-1, C, H, W)
    for y in (0, 1):
        with torch.no_grad():
            p = net.log_prob(x, torch.full((len(x),), y)).double().exp()
        assert float(p.sum()) == pytest.approx(1, abs=2e-6) and p.std() > 0


@pytest.mark.parametrize("K", [2, 4, 256])
def test_logistic_bins_sum_to_one(K):
    """The mass of the K bins of any logistic, narrow or wide, inside or out of range, is 1."""
    f = (torch.arange(K).double() * 2 / (K - 1) - 1)[:, None]
    for mean, scale in ((0.1, -1.0), (3.0, -2.0), (-0.9, -6.5), (0.0, 2.0), (1.0, -9.0)):
        mass = pixelcnn.log_bin(f, torch.tensor([mean]).double(), torch.tensor([scale]).double(), K)
        assert float(mass.exp().sum()) == pytest.approx(1, abs=1e-9)
        assert torch.isfinite(mass).all()


def test_uniform_model_costs_log2_levels():
    """With zero logits: 8 bits/dim at 256 levels, 1 at 2."""
    for K in (2, 256):
        net = tiny(K=K)
        for p in net.parameters():
            torch.nn.init.zeros_(p)
        x = torch.randint(K, (4, 1, 5, 6))
        bits = pixelcnn.loss(net, x, torch.zeros(4, dtype=torch.long)).item()
        assert bits == pytest.approx(math.log2(K), abs=1e-5)


def test_levels_round_trip():
    """Levels to bytes and back are the same for every K; bytes at 256 levels are themselves."""
    for K in (2, 4, 16, 255, 256):
        x = torch.arange(K)
        assert torch.equal(pixelcnn.to_levels(pixelcnn.from_levels(x, K), K), x)
    x = torch.arange(256).to(torch.uint8)
    assert torch.equal(pixelcnn.from_levels(pixelcnn.to_levels(x, 256), 256), x)
    assert torch.bincount(pixelcnn.to_levels(x, 4)).tolist() == [43, 85, 85, 43]


def settings(net, B=4, H=5, W=6):
    g = torch.Generator().manual_seed(3)
    x = torch.randint(net.K, (B, net.C, H, W), generator=g)
    known = torch.rand(B, 1, H, W, generator=g) < 0.4
    y = torch.tensor([0, 1, 0, 1])[:B]
    return x, known, y, 0.9, torch.rand(B, net.C, H, W, generator=g)


@each_kind
def test_cached_sampler_is_the_naive_one(arch, likelihood, C, monkeypatch):
    """The same features at every position to 1e-9 in float64, and so the same pixels for the same dice; what is
    given stays; what stands on the canvas elsewhere does not matter."""
    net = tiny(arch, likelihood, C).double()
    x, known, y, temperature, dice = settings(net)
    seen = {"now": []}
    fill = pixelcnn.fill

    def spy(model, h, *rest):
        seen["now"].append(h.clone())
        fill(model, h, *rest)

    monkeypatch.setattr(pixelcnn, "fill", spy)
    a = pixelcnn.fill_in_naive(net, x, known, y, temperature, dice)
    naive, seen["now"] = seen["now"], []
    b = pixelcnn.fill_in(net, x, known, y, temperature, dice)
    now, seen["now"] = torch.stack(seen["now"]), []
    assert len(naive) == 30 and torch.allclose(torch.stack(naive), now, rtol=1e-9)
    assert torch.equal(a, b)
    assert torch.equal(torch.where(known, a, 0), torch.where(known, x, 0))
    other = torch.where(known, x, (x + 1) % net.K)
    assert torch.equal(pixelcnn.fill_in(net, other, known, y, temperature, dice), a)
    twice = [torch.cat([a, a]) for a in (x, known, y, dice)]
    twice[2][4:] = 2  # no class
    guided = [f(net, *twice[:3], 0.9, twice[3], 2.5) for f in
              (pixelcnn.fill_in_naive, pixelcnn.fill_in)]
    assert torch.equal(*guided) and torch.equal(guided[0][:4], guided[0][4:])
    everything = torch.ones_like(known)
    assert torch.equal(pixelcnn.fill_in(net, x, everything, y, temperature, dice), x)


@pytest.mark.parametrize("likelihood", ["softmax", "logistic"])
def test_samples_follow_the_density(likelihood):
    """Frequencies of all 16 images of 2 x 2 pixels and 2 levels among 20,000 samples are p(x)."""
    net = tiny("gated", likelihood, 1, 2, 2, 2)
    N = 20_000
    dice = torch.rand(N, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.ones(N, dtype=torch.long)
    x = pixelcnn.fill_in(net, torch.zeros(N, 1, 2, 2, dtype=torch.long),
                         torch.zeros(N, 1, 2, 2, dtype=torch.bool), y, 1.0, dice)
    found = torch.bincount((x.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16) / N
    images = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, 1, 2, 2)
    with torch.no_grad():
        p = net.log_prob(images, y[:16]).exp()
    assert (found - p).abs().max() < 4 * (0.25 / N) ** 0.5


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_guidance(w):
    """On images of one pixel: levels are drawn with p(k) proportional to p(k | none)^(1 - w) times
    p(k | y)^w; w = 0 is unconditional, 1 conditional (Ho & Salimans 2022)."""
    net, N = tiny(H=1, W=1), 20_000
    x, y = torch.zeros(N, 1, 1, 1, dtype=torch.long), torch.ones(N, dtype=torch.long)
    dice = torch.rand(N, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    twice = [torch.cat([a, a]) for a in (x, x.bool(), y, dice)]
    twice[2][N:] = 2  # no class
    with torch.no_grad():
        cond, none = net(x[:2], torch.tensor([1, 2])).flatten(1).log_softmax(1)  # (K,) each
    if w == 1:
        drawn = pixelcnn.fill_in(net, x, x.bool(), y, 1.0, dice, w)
    else:
        drawn = pixelcnn.fill_in(net, *twice[:3], 1.0, twice[3], w)[:N]
    found = torch.bincount(drawn.flatten(), minlength=3) / N
    want = ((1 - w) * none + w * cond).softmax(0)
    assert (found - want).abs().max() < 4 * (0.25 / N) ** 0.5
    assert (cond.exp() - none.exp()).abs().max() > 0.04  # three times the tolerance


def test_temperature():
    """Near zero the likeliest level is drawn; 1 follows the softmax."""
    out = torch.tensor([[0.0, 2.0, 1.0]]).repeat(4000, 1)
    dice = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    assert (pixelcnn.draw(out, 1e-3, dice) == 1).all()
    share = torch.bincount(pixelcnn.draw(out, 1.0, dice), minlength=3) / 4000
    assert torch.allclose(share, out[0].softmax(0), atol=0.03)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A data set of 40 images, 6 x 8, grey, with 2 classes."""
    folder = tmp_path_factory.mktemp("pixel")
    rng = np.random.default_rng(0)
    np.savez(folder / "own.npz", images=rng.integers(256, size=(40, 6, 8), dtype=np.uint8),
             labels=np.arange(40) % 2)
    np.save(folder / "bare.npy", rng.integers(256, size=(40, 6, 8), dtype=np.uint8))
    return folder


SMALL = ("--train --steps 4 --batch-size 8 --width 8 --dilations 1 2 --hidden 8 --every 2 "
         "--num 8 --levels 16 --device cpu").split()


def test_train_writes_what_it_promises_and_resumes_to_the_bit(own):
    """All pictures of all verbs; killed after two of four steps and resumed, it is the same model to
    the bit."""
    text = call(pixelcnn, *SMALL, "--data", own / "own.npz", "--complete", "--classify", "--score",
               "--receptive-field", cwd=own)
    for name in ("model.pt", "samples.png", "samples.npz", "loss.csv", "loss.png", "trajectory.png",
                 "complete.png", "classify.png", "score.png", "receptive_field.png",
                 "step_000002.png"):
        assert (own / "out/pixelcnn" / name).exists(), name
    assert "uniform" in text and "nats" in text

    def killed(*_):
        raise KeyboardInterrupt

    short = [*SMALL, "--data", str(own / "own.npz"), "--out", str(own / "b")]
    saved, pixelcnn.save_loss = pixelcnn.save_loss, killed  # right after the first checkpoint
    try:
        with pytest.raises(SystemExit):
            pixelcnn.main(short)
    finally:
        pixelcnn.save_loss = saved
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert torch.load(own / "b/model.pt", weights_only=True)["step"] == 2
    call(pixelcnn, *short, "--resume", cwd=own)
    one, two = (torch.load(own / p / "model.pt", weights_only=True) for p in ("out/pixelcnn", "b"))
    assert two["step"] == 4
    assert all(torch.equal(one["ema"][k], two["ema"][k]) for k in one["ema"])


@pytest.mark.parametrize("flags, words", [
    (["--data", "bare.npy", "--classify"], "needs a model and a data set with labels"),
    (["--classify", "--unconditional"], "needs a model and a data set with labels"),
])
def test_classify_needs_labels(own, monkeypatch, capsys, flags, words):
    """A model or a data set without labels cannot be asked for p(y | x)."""
    monkeypatch.chdir(own)
    with pytest.raises(SystemExit) as stop:
        pixelcnn.main([*SMALL, "--data", "own.npz", "--out", f"c{len(flags)}", *flags])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_class_of_test_images_alone_counts_as_none(own, tmp_path):
    """Every tenth image is a test image; a label that only these have was never learned."""
    labels = np.arange(40) % 2
    labels[11], labels[21] = 2, 3
    np.savez(tmp_path / "rare.npz", images=np.load(own / "own.npz")["images"], labels=labels)
    said = call(pixelcnn, *SMALL, "--data", "rare.npz", "--bpd", cwd=tmp_path)
    assert "uniform" in said


def test_other_image_size_is_refused(own, monkeypatch, capsys):
    """Test images of another size than the checkpoint's are refused in one line."""
    monkeypatch.chdir(own)
    pixelcnn.main([*SMALL, "--data", "own.npz", "--out", "d"])
    np.savez("own.npz", images=np.zeros((40, 7, 8), np.uint8), labels=np.arange(40) % 2)
    with pytest.raises(SystemExit) as stop:
        pixelcnn.main(["--bpd", "--out", "d", "--device", "cpu"])
    assert stop.value.code == 2 and "the model was trained on [1, 6, 8]" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["--train", "--levels", "1"], "expected 2 to 256"),
    (["--train", "--levels", "300"], "expected 2 to 256"),
    (["--sample", "--temperature", "0"], "expected more than 0"),
    (["--sample", "--out", "nowhere"], "is not there"),
])
def test_bad_input_is_one_line(own, monkeypatch, capsys, argv, words):
    """Exit code 2 and one line."""
    monkeypatch.chdir(own)
    monkeypatch.setattr(pixelcnn, "HERE", own)
    with pytest.raises(SystemExit) as stop:
        pixelcnn.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and len(err.strip().splitlines()) == 1, err
