"""pixelcnn.py: nothing leaks, nothing is missed, probabilities sum to 1, samples follow them."""

import numpy as np
import pytest
import torch
from inprocess import call

import pixelcnn

each = pytest.mark.parametrize("arch, C", [(a, C) for a in ("Gated", "Plain") for C in (1, 3)])


def tiny(arch="Gated", C=1, H=5, W=6, K=3, dilations=(1, 2, 1)):
    """A network in which every parameter is random, the biases included; float64."""
    torch.manual_seed(1)
    model = getattr(pixelcnn, arch)([C, H, W], K, 2, 8, dilations, 8)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.double().eval()


@each
def test_what_depends_on_what(arch, C):
    """No logit depends on its own sub-pixel or a later one, in reading order, R G B within a pixel;
    those of the gated network, on all earlier ones. Every parameter that is not masked learns."""
    model, n = tiny(arch, C), 30 * C
    changed = torch.zeros(n, n, dtype=torch.bool)  # does [row] change with [column]?
    for x in torch.randint(3, (3, 1, n)):
        x = torch.cat([x, (x + torch.eye(n).long()) % 3]).view(-1, 5, 6, C)  # one at a time
        out = model(x.permute(0, 3, 1, 2), 0 * x[:, 0, 0, 0]).permute(0, 2, 3, 1, 4).flatten(1, 3)
        change = (out[1:] - out[0]).abs().amax(2).T
        changed |= change > 1e-9 * out.abs().max()  # rounding depends on the place in a batch
    assert not changed.triu().any()
    assert arch == "Plain" or (changed == torch.ones(n, n).bool().tril(-1)).all()
    pixelcnn.log_prob(model, torch.randint(3, (64, C, 5, 6)), torch.arange(64) % 3).sum().backward()
    if arch == "Plain":  # it has no vertical stack, and so no biases of it
        model.position.grad[0] = model.class_bias.grad[:, :8] = 1
    for name, p in model.named_parameters():  # of labels, each column; of others, each row
        grad = p.grad.mT if "label" in name else p.grad.flatten(1) if "weight" in name else p.grad
        assert grad.isfinite().all() and (grad.abs().sum(-1) > 0).all(), name


@pytest.mark.parametrize("dilations, gapless", [
    ([1, 2, 4], True), ([3, 6], True), ([4, 1], True), ([4], False), ([4, 4, 4], False)])
def test_blind_spots(dilations, gapless):
    """The condition in Block's docstring: the gated network sees all pixels within 3 + the sum of
    the dilations. The plain one never sees a wedge above and to the right."""
    seen = pixelcnn.field_of(tiny(H=28, W=28, dilations=dilations), 14, 14)
    earlier = torch.arange(28 * 28).view(28, 28) < 14 * 28 + 14
    near = (torch.arange(28) - 14).abs() <= 3 + sum(dilations)
    assert not seen[~earlier].any() and seen[earlier & near & near[:, None]].all() == gapless
    field = pixelcnn.field_of(tiny("Plain", H=9, W=13, dilations=[1] * 8), 6, 4)
    assert field[:5, :5].all() and field[6, :4].all() and not field[5, 10:].any()
    assert [pixelcnn.MaskedConv(mask, 1, 1).keep.sum() for mask in "AB"] == [12, 13]


@each
def test_probabilities_sum_to_one(arch, C):
    """Over all images, for each class and for none ("different values of x compete for density");
    log_joint is that of p(x | y) p(y)."""
    K, H = (3, 2) if C == 1 else (2, 1)
    model = tiny(arch, C, H, 2, K)
    x = torch.cartesian_prod(*[torch.arange(K)] * (2 * H * C)).view(-1, C, H, 2)
    p = [pixelcnn.log_probs(model, x, torch.full((len(x),), y)).exp() for y in (0, 1, 2)]
    assert all(q.sum().item() == pytest.approx(1) and q.std() > 0 for q in p)
    joint = pixelcnn.log_joint(pixelcnn.parse_args([], dict(classes=2)), model, x)
    assert torch.allclose(joint.exp(), torch.stack(p[:2], dim=1) / 2)


def test_levels_bits_and_draws():
    """Levels survive as bytes; p = 1/2 costs a bit; extreme u draw the outermost levels."""
    for x in map(torch.arange, (2, 4, 255, 256)):
        assert torch.equal(pixelcnn.to_levels(pixelcnn.from_levels(x, len(x)), len(x)), x)
    assert pixelcnn.to_levels(torch.arange(256), 4).bincount().tolist() == [43, 85, 85, 43]
    assert pixelcnn.to_bits(np.log(0.5**90), (3, 5, 6)) == pytest.approx(1)
    logits, u = torch.tensor([[-1e9, 0.0, 1, -1e9]]), torch.tensor([0.0, 1 - 2**-24])
    assert pixelcnn.draw(logits.repeat(2, 1), u).tolist() == [1, 2]
    assert pixelcnn.draw(torch.randn(999, 256), u[1:].expand(999)).max() == 255  # if sum(p) < 1 too


@pytest.mark.parametrize("C, guidance", [(1, 1.0), (3, 2.5)])
def test_cached_sampler_is_the_naive_one(C, guidance, monkeypatch):
    """The same features at every position, and so the same pixels; what is given stays."""
    model, seen, draw = tiny(C=C), [], pixelcnn.draw_pixel
    x, y, u = torch.randint(-1, 3, (4, C, 5, 6)), torch.arange(4) % 2, torch.rand(4, C, 5, 6)
    monkeypatch.setattr(pixelcnn, "draw_pixel", lambda m, h, *a: seen.append(h) or draw(m, h, *a))
    naive, cached = (f(model, x, y, u, guidance) for f in (pixelcnn.sample_naive, pixelcnn.sample))
    assert torch.allclose(torch.stack(seen[:30]), torch.stack(seen[30:]), rtol=1e-9)
    assert torch.equal(naive, cached) and torch.equal(torch.where(x < 0, -1, cached), x)


@pytest.mark.parametrize("arch, w, C", [
    ("Gated", 1, 1), ("Gated", 0, 1), ("Gated", 2.5, 2), ("Plain", 1, 1)])
def test_samples_follow_the_density(arch, w, C):
    """Frequencies of all 16 images of 2 levels; every sub-pixel in proportion to p(k | y)^w
    p(k | none)^(1 - w) (Ho & Salimans 2022)."""
    model, N = tiny(arch, C, 2 // C, 2, K=2), 1024
    x = torch.cartesian_prod(*[torch.arange(2)] * 4).view(16, C, -1, 2)
    cond, none = (model(x, torch.full((16,), y)) for y in (1, 2))
    p = ((1 - w) * none + w * cond).softmax(-1).gather(-1, x[..., None]).flatten(1).prod(1)
    u = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(N).view(N, C, -1, 2)
    sampler = {"Gated": pixelcnn.sample, "Plain": pixelcnn.sample_naive}[arch]
    found = sampler(model, torch.full(u.shape, -1), torch.ones(N, dtype=torch.long), u, w)
    shares = (found.flatten(1) @ torch.tensor([8, 4, 2, 1])).bincount(minlength=16) / N
    assert (shares - p).abs().max() < 0.01


def test_training_starts_from_the_histogram(tmp_path):
    """Before the first step a pixel has the histogram of its channel, wherever it lies."""
    images = np.random.default_rng(0).binomial(15, 0.1, (40, 5, 6, 3)).astype(np.uint8) * 17
    np.savez(tmp_path / "own.npz", images=images)
    flags = ["--data", str(tmp_path / "own.npz"), *"--steps 0 --levels 16 --device cpu".split()]
    model = pixelcnn.train(args := pixelcnn.parse_args(flags))
    x, y = pixelcnn.held_out(args)
    seen = np.delete(images, range(9, 40, 10), axis=0)
    for c, logits in enumerate(model(x, y).unbind(1)):
        count = np.bincount(seen[..., c].flatten() // 17, minlength=16) + 1
        assert torch.allclose(logits.softmax(-1), torch.tensor(count / count.sum()).float())


def test_all_verbs_from_one_checkpoint(tmp_path):
    """Pictures in colour too; a label that only test images have is none; bad input is one line."""
    images, labels = np.random.default_rng(0).integers(256, size=(40, 4, 8, 3)), np.arange(40) % 2
    labels[19] = 3
    np.savez(tmp_path / "own.npz", images=images.astype(np.uint8), labels=labels)
    flags = "--train --data own.npz --steps 2 --width 8 --levels 16 --device cpu --out".split()
    call(pixelcnn, *flags, "plain", "--arch", "plain", cwd=tmp_path)
    verbs = "--complete --score --classify --receptive-field".split()
    said = call(pixelcnn, *flags, "gated", *verbs, cwd=tmp_path)
    assert len([*(tmp_path / "gated").glob("*.png")]) == 4 and "shuffled pixels" in said
    assert "(uniform: 4 bits/dim)" in said and "classified correctly" in said
    for bad in ("--sample --arch plain", "--bpd --data own.npz"):
        assert call(pixelcnn, *bad.split(), cwd=tmp_path, code=2).count("\n") == 1
