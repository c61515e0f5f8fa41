"""pixelcnn.py: nothing leaks, no earlier pixel is missed, probabilities sum to 1, and the cached
sampler is the slide's loop."""

import itertools
import math

import numpy as np
import pytest
import torch
from inprocess import call

import pixelcnn

KINDS = {"gated": pixelcnn.Gated, "plain": pixelcnn.Plain}
each_kind = pytest.mark.parametrize("arch", KINDS)
each_depth = pytest.mark.parametrize("C", [1, 3])


def tiny(arch="gated", C=1, H=5, W=6, K=3, classes=2, dilations=(1, 2, 1)):
    """A network in which every parameter is random, the biases included; float64."""
    torch.manual_seed(1)
    model = KINDS[arch]([C, H, W], K, classes, 8, dilations, 8)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.double().eval()


def all_images(K, C, H, W):
    return torch.tensor(list(itertools.product(range(K), repeat=C * H * W))).view(-1, C, H, W)


# ---- What depends on what ------------------------------------------------------------------------


def dependence(model, C, H, W):
    """(H W C, H W C) bool: does the logit of sub-pixel [row] change with sub-pixel [column]? By
    changing one at a time, in several random images. Reading order, R G B within a pixel."""
    n = H * W * C
    changed = torch.zeros(n, n, dtype=torch.bool)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randint(model.K, (n,))
        many = x.repeat(n, 1)
        many[range(n), range(n)] = (x + 1) % model.K

        def logits(flat):
            images = flat.view(-1, H, W, C).permute(0, 3, 1, 2)
            with torch.no_grad():
                out = model(images, torch.zeros(len(images), dtype=torch.long))
            return out.permute(0, 2, 3, 1, 4).reshape(len(images), n, -1)

        one = logits(x[None])
        change = (logits(many) - one).abs().amax(2)
        changed |= change.T > 1e-9 * one.abs().max()  # rounding depends on the place in a batch
    return changed


@each_kind
@each_depth
def test_nothing_leaks(arch, C):
    """No logit depends on its own sub-pixel or a later one (slide Learning - CNN)."""
    assert not dependence(tiny(arch, C), C, 5, 6).triu().any()


@each_depth
def test_gated_sees_all_that_came_before(C):
    """Within reach, every logit depends on every earlier sub-pixel."""
    n = 30 * C
    changed = dependence(tiny("gated", C, dilations=(1, 2, 1, 2, 1)), C, 5, 6)
    assert changed[torch.tril(torch.ones(n, n, dtype=torch.bool), -1)].all()


def earlier(H, W, i, j, reach=99):
    """The pixels before (i, j) in reading order, at most `reach` away in each direction: (H, W)."""
    rows, cols = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    before = (rows < i) | (rows == i) & (cols < j)
    return before & ((rows - i).abs() <= reach) & ((cols - j).abs() <= reach)


def test_plain_has_the_blind_spot():
    """However many layers, the plain network never sees a wedge above and to the right."""
    field = pixelcnn.field_of(tiny("plain", H=9, W=13, dilations=[1] * 8), 6, 4)
    assert field[:5, :5].all() and field[6, :4].all() and not field[5, 10:].any()
    assert not (field & ~earlier(9, 13, 6, 4)).any()


@pytest.mark.parametrize("dilations, gapless", [
    ([1, 2, 4], True), ([4, 2, 1], True), ([3, 6], True), ([4, 1], True), ([4], False),
    ([4, 4, 4], False), ([8, 8], False)])
def test_no_blind_spot_if_dilations_leave_no_gap(dilations, gapless):
    """The condition in Block's docstring: all pixels within 3 + the sum of the dilations."""
    model = tiny("gated", H=28, W=28, dilations=dilations)
    missed = earlier(28, 28, 14, 14, 3 + sum(dilations)) & ~pixelcnn.field_of(model, 14, 14)
    ordered = sorted(dilations)
    assert gapless == all(d <= 3 + sum(ordered[:n]) for n, d in enumerate(ordered))
    assert missed.any() == (not gapless)
    assert not (pixelcnn.field_of(model, 14, 14) & ~earlier(28, 28, 14, 14)).any()


@each_kind
@each_depth
def test_every_parameter_learns(arch, C):
    """No output of any layer is dead: each row of each weight gets a gradient, but for the masked
    weights and the biases of the vertical stack, which the plain network lacks."""
    model = tiny(arch, C)
    x = torch.randint(3, (64, C, 5, 6), generator=torch.Generator().manual_seed(0))
    pixelcnn.log_prob(model, x, torch.arange(64) % 3).sum().backward()
    for name, p in model.named_parameters():
        grad = p.grad
        if name in ("position", "class_bias"):
            unused = arch == "plain"
            grad = grad[unused:] if name == "position" else grad[:, 8 * unused:]
        elif p.ndim == 4:
            grad = grad.flatten(1)  # of a convolution
        assert grad.isfinite().all() and (grad.abs().sum(-1) > 0).all(), name


# ---- The density ---------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("C, K, H, W", [(1, 3, 2, 2), (3, 2, 1, 2)])
def test_probabilities_sum_to_one(arch, C, K, H, W):
    """Over all images, for each class and for none: "different values of x compete for density"
    (slide Discriminative vs. Generative)."""
    model, x = tiny(arch, C, H, W, K), all_images(K, C, H, W)
    for y in (0, 1, 2):
        p = pixelcnn.log_probs(model, x, torch.full((len(x),), y)).exp()
        assert float(p.sum()) == pytest.approx(1, abs=2e-6) and p.std() > 0


@pytest.mark.parametrize("K", [2, 256])
def test_uniform_model_costs_log2_levels(K):
    """With zero weights: 8 bits/dim at 256 levels, 1 at 2."""
    model = tiny(K=K)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    x = torch.randint(K, (4, 1, 5, 6))
    log_p = pixelcnn.log_probs(model, x, torch.zeros(4, dtype=torch.long)).mean()
    assert pixelcnn.to_bits(log_p, (1, 5, 6)).item() == pytest.approx(math.log2(K), abs=1e-5)


def test_levels_round_trip():
    """Levels to bytes and back are the same for every K; bytes at 256 levels are themselves."""
    for K in (2, 4, 16, 255, 256):
        x = torch.arange(K)
        assert torch.equal(pixelcnn.to_levels(pixelcnn.from_levels(x, K), K), x)
    x = torch.arange(256).to(torch.uint8)
    assert torch.equal(pixelcnn.from_levels(pixelcnn.to_levels(x, 256), 256), x)
    assert torch.bincount(pixelcnn.to_levels(x, 4)).tolist() == [43, 85, 85, 43]


def test_bayes_by_enumeration():
    """log_joint of all images sums to 1 over images and classes; its softmax is Bayes' rule."""
    model, x = tiny(H=2, W=2), all_images(3, 1, 2, 2)
    args = pixelcnn.parse_args([])
    args.classes = 2
    joint = pixelcnn.log_joint(args, model, x)
    px_y = [pixelcnn.log_probs(model, x, torch.full((len(x),), y)).exp() for y in (0, 1)]
    assert float(joint.exp().sum()) == pytest.approx(1, abs=2e-6)
    assert torch.allclose(joint.softmax(1)[:, 0], px_y[0] / (px_y[0] + px_y[1]))


# ---- Sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@each_depth
def test_cached_sampler_is_the_naive_one(C, guidance, monkeypatch):
    """The same features at every position, and so the same pixels for the same random numbers; what
    is given stays."""
    model = tiny("gated", C)
    torch.manual_seed(3)
    x, u = torch.randint(3, (4, C, 5, 6)), torch.rand(4, C, 5, 6)
    x = torch.where(torch.rand(4, 1, 5, 6) < 0.4, x, -1)
    y, features, draw_pixel = torch.arange(4) % 2, [], pixelcnn.draw_pixel

    def spy(model, h, *rest):
        features.append(h)
        draw_pixel(model, h, *rest)

    monkeypatch.setattr(pixelcnn, "draw_pixel", spy)
    naive = pixelcnn.sample_naive(model, x, y, u, guidance)
    cached = pixelcnn.sample(model, x, y, u, guidance)
    assert len(features) == 60
    assert torch.allclose(torch.stack(features[:30]), torch.stack(features[30:]), rtol=1e-9)
    assert torch.equal(naive, cached) and (cached >= 0).all()
    assert torch.equal(torch.where(x < 0, -1, cached), x)
    assert torch.equal(pixelcnn.sample(model, cached, y, 1 - u, guidance), cached)  # nothing to do


def frequencies(samples, images):
    """The share of samples that equal each image."""
    return torch.stack([(samples == image).flatten(1).all(1).double().mean() for image in images])


@each_kind
def test_samples_follow_the_density(arch):
    """Frequencies of all 16 images of 2 x 2 pixels and 2 levels among 20,000 samples are p(x | y);
    with two pixels given, p(rest | given, y)."""
    model, images, N = tiny(arch, H=2, W=2, K=2), all_images(2, 1, 2, 2), 20_000
    u = torch.rand(N, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y, sampler = torch.ones(N, dtype=torch.long), {"gated": "sample", "plain": "sample_naive"}[arch]
    p = pixelcnn.log_probs(model, images, y[:16]).exp()
    given = torch.full((N, 1, 2, 2), -1)
    for fixed in (False, True):
        if fixed:  # the upper row is 1 0
            given[:, 0, 0] = torch.tensor([1, 0])
            p = torch.where((images[:, 0, 0] == given[0, 0, 0]).all(1), p, 0)
        x = getattr(pixelcnn, sampler)(model, given, y, u)
        assert (frequencies(x, images) - p / p.sum()).abs().max() < 4 * (0.25 / N) ** 0.5


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_guidance(w):
    """On images of one pixel: levels are drawn with p(k) proportional to p(k | none)^(1 - w) times
    p(k | y)^w (Ho & Salimans 2022)."""
    model, N = tiny(H=1, W=1), 20_000
    with torch.no_grad():
        cond, none = model(torch.zeros(2, 1, 1, 1, dtype=torch.long),
                           torch.tensor([1, 2])).flatten(1).log_softmax(1)  # (K,) each
    u = torch.rand(N, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x = pixelcnn.sample(model, torch.full((N, 1, 1, 1), -1), torch.ones(N, dtype=torch.long), u, w)
    found = torch.bincount(x.flatten(), minlength=3) / N
    want = ((1 - w) * none + w * cond).softmax(0)
    assert (found - want).abs().max() < 4 * (0.25 / N) ** 0.5
    assert (cond.exp() - none.exp()).abs().max() > 0.04  # three times the tolerance


def test_draw_never_takes_what_has_no_probability():
    """The largest u gives the last possible level, also where p sums to less than 1; u = 0 the first
    possible one."""
    assert pixelcnn.draw(torch.tensor([[-math.inf, 0.0]]), torch.tensor([0.0])).tolist() == [1]
    logits = torch.tensor([[0.0, 1.0, -math.inf]]).repeat(2, 1)
    assert pixelcnn.draw(logits, torch.tensor([1e-9, 1 - 2**-24])).tolist() == [0, 1]
    logits = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0))
    assert pixelcnn.draw(logits, torch.full((1000,), 1 - 2**-24)).max() == 255


# ---- The program ---------------------------------------------------------------------------------


def test_all_verbs_from_one_checkpoint(tmp_path):
    """Pictures in colour data too; labels that only test images have count as none."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    labels[19] = 3
    np.savez(tmp_path / "own.npz", images=rng.integers(256, size=(40, 6, 8, 3), dtype=np.uint8),
             labels=labels)
    flags = ("--train --data own.npz --steps 2 --batch-size 4 --width 8 --dilations 1 2 --hidden 8 "
             "--levels 16 --num 8 --device cpu --complete --score --classify --receptive-field")
    for arch in KINDS:
        said = call(pixelcnn, *flags.split(), "--arch", arch, "--out", arch, cwd=tmp_path)
        for name in ("samples", "complete", "receptive_field"):
            assert (tmp_path / arch / f"{name}.png").exists(), name
        assert "(uniform: 4 bits/dim)" in said and "classified correctly" in said
        assert said.count("bits/dim") >= 4 and "shuffled pixels" in said


@pytest.mark.parametrize("flags, words", [
    (["--sample", "--guidance", "nan"], "--guidance nan: expected a finite number"),
    (["--sample", "--guidance", "inf"], "--guidance inf: expected a finite number"),
    (["--sample", "--arch", "plain"], "another network: leave out the flags that shape it"),
    (["--bpd", "--data", "own.npz"], "own.npz: shape [3, 6, 8], but the model has [1, 28, 28]"),
])
def test_bad_input_is_one_line(flags, words, tmp_path):
    np.savez(tmp_path / "own.npz", images=np.zeros((40, 6, 8, 3), np.uint8))
    said = call(pixelcnn, *flags, "--device", "cpu", cwd=tmp_path, code=2)
    assert words in said and said.count("\n") == 1
