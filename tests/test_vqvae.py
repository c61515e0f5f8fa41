"""vqvae.py: the codebook, the prior as a distribution, and compression, by oracles."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from inprocess import call

import vqvae

SMALL = ("--train --data own.npz --codes-steps 20 --steps 20 --codes-batch-size 8 --batch-size 50 "
         "--width 8 --code-dim 4 --codebook-size 6 --blocks 1 --prior-width 32 --prior-layers 1 "
         "--every 10 --num 8 --device cpu").split()
IMAGES = np.random.default_rng(0).integers(256, size=(40, 8, 12, 3), dtype="u1")


def tiny(shape=(3, 8, 12), K=6):
    """args and a network whose prior is random."""
    args = vqvae.parse_args([*SMALL, "--codebook-size", str(K)])
    args.shape, args.classes = list(shape), 2
    torch.manual_seed(0)
    model = vqvae.build(args).eval()
    for p in model.prior.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return args, model


def test_codebook_by_hand():
    """The nearest by brute force, under bf16 too. Gradients pass; commitment pulls z to its code;
    in training, after the lookup, codes become running means of their z."""
    torch.manual_seed(0)
    z, e = 1 + 0.01 * torch.randn(2, 60, 4)
    with torch.autocast("cpu", torch.bfloat16):
        nearest = vqvae.nearest_code(z, e)
    assert torch.equal(nearest, (z[:, None].double() - e).square().sum(2).argmin(1))
    assert not vqvae.straight_through(z, e.requires_grad_()).requires_grad
    z = torch.tensor([[[[1.0, 0], [3, 0], [0, 5]]]], requires_grad=True)
    for d in (0.9, 0.0):
        book = vqvae.Codebook(3, 2, 0.25, d)
        book.vectors.copy_(torch.tensor([[2.0, 0], [0, 4], [-90, -90]]))
        book.total.copy_(book.vectors)
        book.eval()(z)
        q, codes, commitment = book.train()(z)
        assert codes.tolist() == [[[0, 0, 1]]] and q.tolist() == [[[[2, 0], [2, 0], [0, 4]]]]
        grad, = torch.autograd.grad(q.sum() + commitment, z)
        assert torch.allclose(grad, 1 + 0.25 * 2 * (z - q) / 6)
        want = [[(d * 2 + (1 - d) * 4) / (d + (1 - d) * 2), 0], [0, d * 4 + (1 - d) * 5]]
        assert torch.allclose(book.vectors[:2], torch.tensor(want))


@pytest.mark.parametrize("K, N, least", [(4, 2000, 0.5), (400, 20, 0.003)])
def test_codes_start_and_restart_on_data(K, N, least, monkeypatch):
    """On distinct z; later if chosen less than once in two steps, and 30 times less than an equal
    share. Two processes that see the same z are one that sees them twice."""
    torch.manual_seed(0)
    z, k, one = torch.randn(N, 3), torch.full((N,), K - 1), vqvae.Codebook(K, 3, 0.25, 0.9)
    one.begin(z[:4].repeat(9, 1))
    assert one.vectors.unique(dim=0).equal(z[:4].unique(dim=0))
    assert torch.equal(one.total / one.count[:, None], one.vectors)
    one.count[:2] = torch.tensor([0.99, 1.01]) * least / 0.9
    two = copy.deepcopy(one)
    assert one.follow(z.repeat(2, 1), k.repeat(2)).nonzero().tolist() == [[0]]
    assert (one.vectors[0] == z).all(1).any() and one.total[0].equal(one.vectors[0])
    monkeypatch.setattr(vqvae, "dist", SimpleNamespace(
        is_initialized=lambda: True, all_reduce=lambda a: a.mul_(2),
        broadcast=lambda a, source: a.fill_(7 + source)))
    two.follow(z, k)
    assert (two.vectors[0] == 7).all() and torch.allclose(two.vectors[1:], one.vectors[1:])


@torch.no_grad()
def test_prior_is_a_causal_distribution_and_is_sampled():
    """Over all grids of codes it sums to 1; bits are its logarithm; a code moves all later logits.
    Samples are as frequent as p(none) (p(class) / p(none))^w (Ho & Salimans 2022)."""
    prior, N = tiny((1, 8, 8), K=3)[1].prior.double(), 5000
    grids = torch.tensor([*itertools.product(range(3), repeat=4)])
    logits = torch.stack([prior(grids, torch.full((81,), c)) for c in range(3)])
    logp = logits.log_softmax(3).gather(3, grids.expand(3, -1, -1)[..., None]).sum((2, 3))
    assert torch.allclose(logp.exp().sum(1), torch.ones(3).double())
    assert (logits - logits.roll(1, 0)).abs().amax(3).min() > 1e-9
    y, uniform = torch.full((81,), 2), vqvae.Prior(3, 4, 2, 32, 1)
    for net, want in ((prior, -logp[2].mean().item() / 4), (uniform, np.log(3))):
        bits = vqvae.bits_per_code(net, grids, y).item()
        assert bits == pytest.approx(want / np.log(2), rel=1e-5)
    for i in range(4):
        other = torch.where(torch.arange(4) == i, (grids + 1) % 3, grids)
        moved = (prior(other, y) - logits[2]).abs().amax((0, 2)) > 1e-9
        assert moved.nonzero().flatten().tolist() == [*range(i + 1, 4)]
        assert torch.allclose(prior(grids[:, :i], y), logits[2, :, :i + 1])
    u = torch.rand(N, 2, generator=torch.Generator().manual_seed(1))
    for w in (0.0, 1.0, 2.5):
        found = vqvae.sample(prior, torch.ones(N).long(), u, w) @ torch.tensor([3, 1])
        p = (logits[2] + w * (logits[1] - logits[2])).softmax(2)
        want = (p[0, 0, :, None] * p[::27, 1]).flatten()  # the first code of grid 27 k is k
        assert (found.bincount(minlength=9) / N - want).abs().max() < 4 * (0.25 / N) ** 0.5
    logits = torch.randn(1000, 256).index_fill(1, torch.tensor(255), -np.inf)
    assert vqvae.draw(logits, torch.full((1000,), 1 - 2**-24)).max() == 254


def test_one_label_in_ten_is_none(tmp_path, monkeypatch):
    """In the training of the prior, and not always that of the same image."""
    np.savez(tmp_path / "own.npz", images=IMAGES, labels=np.arange(40) % 2)
    bits, seen = vqvae.bits_per_code, []
    monkeypatch.setattr(vqvae, "bits_per_code", lambda *a: seen.append(a[2]) or bits(*a))
    call(vqvae, *SMALL, cwd=tmp_path)
    none = torch.stack([y for y in seen if len(y) == 50]) == 2
    assert abs(none.float().mean() - 0.1) < 0.04 and (none.sum(0) < 9).all()


@pytest.mark.parametrize("K, kind", [(256, "u1"), (257, "u2")])
def test_codes_hold_all_that_the_decoder_gets(K, kind, tmp_path):
    """Files of codes, a byte or two each, give the images of the training's forward pass; usage is
    counted, every parameter learns, and what does not fit is refused in a line."""
    args, model = tiny(K=K)
    (net, prior), args.out = model.values(), tmp_path
    x = vqvae.to_float(torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    net.codebook.begin(net.encode(x[:4]))
    vqvae.save_checkpoint(args, 1, ema=model.state_dict())
    np.savez(tmp_path / "own.npz", images=IMAGES, codes=np.full((1, 2, 3), K, "u2"))
    np.savez(tmp_path / "odd.npz", images=IMAGES.repeat(9, 1)[:, :9], codes=np.full((1, 2, 3), -1))
    run = lambda flags, code=0: call(vqvae, *flags.split(), "--out", ".", cwd=tmp_path, code=code)
    run("--compress own.npz --save a.npz")
    run("--decompress a.npz --save b.npz")
    out, codes, _ = net(x)
    found, images = np.load(tmp_path / "a.npz")["codes"], np.load(tmp_path / "b.npz")["arr_0"]
    assert found.dtype == kind and found.tolist() == codes.tolist() and codes.shape[1:] == (2, 3)
    assert abs(images - (out.detach().permute(0, 2, 3, 1).numpy() + 1) * 127.5).max() < 0.51
    _, error, used, perplexity = vqvae.through_codes(net, vqvae.to_uint8(x))
    p = codes.flatten().bincount() / codes.numel()
    assert used == len(codes.unique()) > 9
    assert perplexity == pytest.approx((1 / p**p).prod().item(), rel=1e-4)
    assert error == pytest.approx((out - x).square().mean().item(), rel=1e-5)
    bits = vqvae.bits_per_code(prior, codes.flatten(1), torch.arange(40) % 3)
    (out.square().mean() + bits).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    for flags in ("--train --data odd.npz", "--reconstruct --data odd.npz", "--compress odd.npz",
                  "--decompress own.npz", "--decompress odd.npz"):
        assert run(flags, code=2).count("\n") == 1
