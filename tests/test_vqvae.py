"""vqvae.py: the nearest code is the nearest, each loss moves what it should, the prior is a causal
distribution, and what is compressed comes back."""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from inprocess import call

import vqvae

SMALL = ("--train --data own.npz --codes-steps 4 --steps 4 --codes-batch-size 8 --batch-size 8 "
         "--width 8 --code-dim 4 --codebook-size 6 --blocks 1 --prior-width 32 --prior-layers 1 "
         "--every 2 --num 8 --device cpu").split()


def codebook(K=5, D=3, beta=0.25, decay=0.9):
    torch.manual_seed(0)
    return vqvae.Codebook(K, D, beta, decay)


def some_z(N=40, D=3, seed=1):
    return torch.randn(1, N // 5, 5, D, generator=torch.Generator().manual_seed(seed))


# ---- The codebook --------------------------------------------------------------------------------


def test_nearest_code_is_the_nearest():
    """By brute force in float64."""
    torch.manual_seed(0)
    z, e = torch.randn(53, 4), torch.randn(9, 4)
    want = (z[:, None].double() - e[None].double()).square().sum(2).argmin(1)
    assert torch.equal(vqvae.nearest_code(z, e), want)


def test_nearest_code_is_found_in_float32_under_autocast():
    """Vectors nearer to each other than bfloat16 can tell are told apart."""
    e = torch.tensor([[1.0, 0], [1.001, 0], [1.002, 0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert vqvae.nearest_code(e, e).tolist() == [0, 1, 2]


def test_straight_through():
    """The value is the code's; the gradient is as if nothing had been there."""
    z, q = torch.randn(2, 4, 3, requires_grad=True)
    out, g = vqvae.straight_through(z, q), torch.randn(4, 3)
    assert torch.allclose(out, q)
    assert torch.equal(torch.autograd.grad(out, z, g, retain_graph=True)[0], g)
    assert torch.autograd.grad(out, q, g, allow_unused=True)[0] is None


@pytest.mark.parametrize("beta", [0.25, 0.5])
def test_who_moves_whom(beta):
    """The decoder's error reaches z alone; the commitment loss pulls z to the code with 2 beta (z -
    e) / N; the vectors have no gradient."""
    book = codebook(beta=beta).eval()
    z = some_z().requires_grad_()
    q, codes, commitment = book(z)
    assert torch.equal(torch.autograd.grad(q.sum(), z)[0], torch.ones_like(z))
    away = z.detach() - book.vectors[codes]
    pull = torch.autograd.grad(commitment, z)[0]
    assert torch.allclose(pull, 2 * beta * away / z.numel(), atol=1e-7)
    assert commitment.item() == pytest.approx(beta * away.square().mean().item())
    assert not list(book.parameters())


def test_running_means_by_hand():
    """One step on two clusters: count <- decay count + (1 - decay) n, total likewise, vector =
    total / count. An unused code keeps its value; with decay 0 codes are the means, and it is
    replaced at once. The step itself uses the old vectors."""
    z = torch.tensor([[[[1.0, 0], [3, 0], [0, 5]]]])
    for d in (0.9, 0.0):
        book = vqvae.Codebook(3, 2, 0.25, d)
        book.vectors.copy_(torch.tensor([[2.0, 0], [0, 4], [-90, -90]]))
        book.total.copy_(book.vectors)
        out, codes, _ = book(z)
        assert codes.flatten().tolist() == [0, 0, 1]
        assert torch.allclose(out.flatten(0, 2), torch.tensor([[2.0, 0], [2, 0], [0, 4]]))
        want = torch.tensor([[(d * 2 + (1 - d) * 4) / (d + (1 - d) * 2), 0],
                             [0, d * 4 + (1 - d) * 5]])
        assert torch.allclose(book.vectors[:2], want)
        assert (book.vectors[2].tolist() == [-90, -90]) == (d == 0.9)


def test_eval_leaves_the_codebook_alone():
    book = codebook().eval()
    before = {k: v.clone() for k, v in book.state_dict().items()}
    book(some_z())
    assert all(torch.equal(before[k], v) for k, v in book.state_dict().items())


def test_unused_codes_restart():
    """A code that nobody has chosen for long lands on some z, its count and total with it; the
    others are running means as ever."""
    book, other, z = codebook(), codebook(), some_z().flatten(0, 2)
    for b, count in ((book, 1e-9), (other, 1.0)):
        b.vectors[2], b.count[2], b.total[2] = 50.0, count, 50 * count
        restarted = b.follow(z, vqvae.nearest_code(z, b.vectors))
        assert restarted.tolist() == [False, False, count < 1, False, False]
    assert (book.vectors[2] == z).all(1).any() and book.count[2] == 1
    assert torch.equal(book.total[2], book.vectors[2])
    keep = [0, 1, 3, 4]
    assert torch.equal(book.vectors[keep], other.vectors[keep])


@pytest.mark.parametrize("K, N, least", [(4, 4000, 0.5), (400, 40, 0.003)])
def test_what_counts_as_unused(K, N, least):
    """Both: less than once in two steps, and 30 times less than an equal share."""
    assert least == min(0.5, 0.03 * N / K)
    book, z = codebook(K, decay=1.0), some_z(N).flatten(0, 2)
    book.count[0], book.count[1] = 0.99 * least, 1.01 * least
    restarted = book.follow(z, torch.full((N,), K - 1))
    assert restarted.nonzero().flatten().tolist() == [0]


def test_start_is_on_distinct_vectors_of_the_data():
    """Although half of z are twins; and they are total / count at once: otherwise the second step
    would undo it. With fewer distinct vectors than codes, all of them are in use."""
    book, z = codebook(20), some_z()
    z[:, :4] = z[:, :1, :1]
    book.begin(z)
    assert all((v == z.flatten(0, 2)).all(1).any() for v in book.vectors)
    assert len(book.vectors.unique(dim=0)) == 20
    assert torch.allclose(book.total / book.count[:, None], book.vectors)
    book.begin(z[:, 4:6])
    assert len(book.vectors.unique(dim=0)) == 10


def test_processes_of_torchrun_keep_one_codebook(monkeypatch):
    """Two processes that happen to see the same z are one process that sees them twice; a restart
    takes the first process's choice."""
    z, one, two = some_z().flatten(0, 2), codebook(), codebook()
    k = vqvae.nearest_code(z, one.vectors)
    one.follow(torch.cat([z, z]), torch.cat([k, k]))
    monkeypatch.setattr(vqvae, "dist", SimpleNamespace(
        is_initialized=lambda: True, all_reduce=lambda a: a.mul_(2),
        broadcast=lambda a, source: a.fill_(7 + source)))
    two.follow(z, k)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, two.state_dict()[name], atol=1e-6), name
    two.count[2] = -99
    assert two.follow(z, k)[2] and (two.vectors[2] == 7).all()


# ---- Networks ------------------------------------------------------------------------------------


def tiny(shape=(1, 8, 12), classes=2):
    """args and a network whose prior is random; float32."""
    args = vqvae.parse_args(SMALL)
    args.shape, args.classes = list(shape), classes
    torch.manual_seed(0)
    model = vqvae.build(args).eval()
    for p in model.prior.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return args, model


def tiny_prior(K=3, n=4, layers=2):
    """Every parameter is random, the biases included; float64."""
    torch.manual_seed(0)
    prior = vqvae.Prior(K, n, 2, 32, layers)
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return prior.double().eval()


@pytest.mark.parametrize("shape", [(1, 8, 12), (3, 8, 4)])
def test_codes_hold_all_that_the_decoder_gets(shape):
    """images_of(codes_of(x)) is forward(x), for images that are not square too."""
    _, model = tiny(shape)
    images = torch.randint(256, (3, *shape), dtype=torch.uint8)
    codes = vqvae.codes_of(model.autoencoder, images)
    assert codes.shape == (3, shape[1] // 4, shape[2] // 4)
    back, same, _ = model.autoencoder(vqvae.to_float(images))
    assert torch.equal(codes, same) and back.shape == images.shape
    assert torch.allclose(vqvae.images_of(model.autoencoder, codes), back, atol=1e-5)


def test_every_parameter_learns():
    """Through the codebook, the error reaches the encoder; the prior's loss all of the prior."""
    _, model = tiny()
    back, codes, _ = model.autoencoder(torch.rand(8, 1, 8, 12))
    bits = vqvae.bits_per_code(model.prior, codes.flatten(1), torch.arange(8) % 3)
    (back.square().mean() + bits).backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().sum() > 0, name


def test_usage_by_hand(monkeypatch):
    """Perplexity is 1 if one code is used, K if all equally often, and exp of the entropy."""
    _, model = tiny()
    for codes, used, perplexity in (([4] * 6, 1, 1.0), (range(6), 6, 6.0),
                                    ([0, 0, 0, 0, 1, 5], 3, math.exp(2 / 3 * math.log(3 / 2)
                                                                      + 1 / 3 * math.log(6)))):
        codes = torch.tensor([*codes]).view(1, 2, 3)
        monkeypatch.setattr(vqvae, "codes_of", lambda *a: codes)
        images = vqvae.to_uint8(vqvae.images_of(model.autoencoder, codes))
        back, error, *found = vqvae.through_codes(model.autoencoder, images)
        assert found == [used, pytest.approx(perplexity, rel=1e-5)]
        assert error == pytest.approx((back - vqvae.to_float(images)).square().mean().item())


def test_prior_sees_what_came_before_and_nothing_else():
    """Each code moves all later logits, no earlier one, and not its own; the class moves all."""
    prior = tiny_prior(6, 6)
    codes, y = torch.randint(6, (1, 6)), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        one = prior(codes, y)
        for i in range(6):
            other = codes.clone()
            other[0, i] = (codes[0, i] + 1) % 6
            moved = (prior(other, y) - one).abs().amax(-1)[0] > 1e-9
            assert moved.tolist() == [k > i for k in range(6)]
            assert torch.allclose(prior(codes[:, :i], y), one[:, :i + 1], atol=1e-9)
        assert ((prior(codes, y + 1) - one).abs().amax(-1) > 1e-9).all()


def test_prior_is_a_distribution():
    """Over all grids of 4 codes of K = 3 it sums to 1, for each class and for none; bits_per_code
    is its logarithm."""
    prior = tiny_prior()
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    for c in range(3):
        y = torch.full((81,), c)
        with torch.no_grad():
            bits = [vqvae.bits_per_code(prior, k[None], y[:1]) for k in every]
            p = 2 ** (-4 * torch.stack(bits).double())
            mean = vqvae.bits_per_code(prior, every, y)
        assert p.sum().item() == pytest.approx(1, abs=1e-5) and p.std() > 0
        assert mean.item() == pytest.approx(-p.log2().mean().item() / 4, rel=1e-5)


def test_untrained_prior_costs_log2_K_bits():
    prior = vqvae.Prior(11, 6, 2, 32, 2)
    bits = vqvae.bits_per_code(prior, torch.randint(11, (5, 6)), torch.zeros(5, dtype=torch.long))
    assert bits.item() == pytest.approx(math.log2(11), abs=1e-5)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_samples_follow_the_guided_prior(w):
    """Frequencies of all pairs of codes among 20,000 samples are p(none) (p(cond) / p(none))^w,
    normalised for each code (Ho & Salimans 2022)."""
    prior, N = tiny_prior(n=2, layers=1).float(), 20_000
    y, u = torch.ones(N, dtype=torch.long), torch.rand(
        N, 2, generator=torch.Generator().manual_seed(1))
    codes = vqvae.sample(prior, y, u, w)
    found = torch.bincount(codes[:, 0] * 3 + codes[:, 1], minlength=9) / N
    every = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        cond, none = (prior(every, torch.full((9,), c)).log_softmax(-1) for c in (1, 2))
    logp = (none + w * (cond - none)).log_softmax(-1).gather(2, every[..., None]).sum((1, 2))
    assert (found - logp.exp()).abs().max() < 4 * (0.25 / N) ** 0.5
    assert (cond.exp() - none.exp()).abs().max() > 0.1


def test_draw_never_takes_what_has_no_probability():
    """The largest u gives the last possible code, also where p sums to less than 1."""
    logits = torch.tensor([[0.0, 1.0, -math.inf]]).repeat(2, 1)
    assert vqvae.draw_code(logits, torch.tensor([1e-9, 1 - 2**-24])).tolist() == [0, 1]
    logits = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0))
    assert vqvae.draw_code(logits, torch.full((1000,), 1 - 2**-24)).max() == 255


# ---- Training and files --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with own.npz: 40 grey images, 8 x 12, of 2 classes; and a model trained on it."""
    folder = tmp_path_factory.mktemp("vq")
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(40, 8, 12, 1), dtype=np.uint8)
    np.savez(folder / "own.npz", images=images, labels=np.arange(40) % 2)
    np.savez(folder / "odd.npz", images=images.repeat(9, 1)[:, :9])
    (folder / "said").write_text(call(vqvae, *SMALL, cwd=folder))
    return folder


def test_training_reports_held_out_losses(own):
    """Of both stages, at every checkpoint; the pictures are there."""
    said = (own / "said").read_text()
    for step in (2, 4):
        assert re.search(rf"codes, step {step}: squared error [\d.]+, \d codes used, perpl", said)
        assert re.search(rf"prior, step {step}: [\d.]+ bits per code, of 4 held-out images", said)
    assert (own / "out/vqvae/reconstruction.png").exists()


def test_checkpoint_holds_the_averaged_prior(own):
    """By hand: a spy sees the weights of all four steps."""
    seen, update = [], vqvae.ema_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqvae, "ema_update", lambda ema, model, step: (
            seen.append(model.head.bias.detach().clone()), update(ema, model, step)))
        call(vqvae, *SMALL, "--out", "average", cwd=own)
    want = torch.zeros(6)
    for step, bias in enumerate(seen, 1):
        want = want + 10 / (step + 10) * (bias - want)
    ckpt = torch.load(own / "average/model.pt", weights_only=True)
    assert len(seen) == 4 and torch.equal(ckpt["model"]["head.bias"], seen[-1])
    assert torch.allclose(ckpt["ema"]["prior.head.bias"], want) and want.abs().min() > 0


@pytest.mark.parametrize("checkpoint", [1, 2, 3])
def test_resumes_to_the_bit(own, checkpoint, monkeypatch):
    """Killed right after any checkpoint, of either stage or between them, and resumed: the same
    bits in the model, in its average and in the optimiser."""
    calls, save = [], vqvae.save_checkpoint

    def killed(*a, **k):
        save(*a, **k)
        calls.append(1)
        if len(calls) == checkpoint:
            raise KeyboardInterrupt

    monkeypatch.setattr(vqvae, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        call(vqvae, *SMALL, "--out", f"killed{checkpoint}", cwd=own)
    monkeypatch.undo()
    call(vqvae, "--train", "--resume", "--out", f"killed{checkpoint}", cwd=own)
    one, two = (torch.load(own / out / "model.pt", weights_only=True)
                for out in ("out/vqvae", f"killed{checkpoint}"))
    assert one["step"] == two["step"] == 4 and one["config"] == two["config"]
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    for i, state in one["optimizer"]["state"].items():
        assert all(torch.equal(v, two["optimizer"]["state"][i][k]) for k, v in state.items())


def test_one_label_in_ten_is_none(monkeypatch, own):
    """Single labels, others in the next step; guidance needs p(codes) too."""
    seen, bits_per_code = [], vqvae.bits_per_code

    def spy(prior, codes, y):
        seen.append(y)
        return bits_per_code(prior, codes, y)

    monkeypatch.setattr(vqvae, "bits_per_code", spy)
    call(vqvae, *SMALL, "--steps", 40, "--batch-size", 50, "--every", 99, "--out", "none", cwd=own)
    y = torch.stack(seen[:40])
    assert abs((y == 2).float().mean() - 0.1) < 0.03 and (y < 2).any(1).all()
    assert not torch.equal(y[0] == 2, y[1] == 2)


@pytest.mark.parametrize("K, kind", [(256, np.uint8), (257, np.uint16)])
def test_compress_round_trip(own, K, kind):
    """A byte per code, or two for more than 256 codes; images or samples; what comes back is what
    the codes decode to."""
    call(vqvae, *SMALL, "--codebook-size", K, "--out", K, "--num", 20, cwd=own)
    file, key = ("own.npz", "images") if K == 256 else (f"{K}/samples.npz", "arr_0")
    said = call(vqvae, "--compress", file, "--save", "a.npz", "--out", K, cwd=own)
    images = torch.from_numpy(np.load(own / file)[key]).permute(0, 3, 1, 2)
    assert f"a.npz: {(own / 'a.npz').stat().st_size:,} bytes instead of {images.numel():,}" in said
    codes = np.load(own / "a.npz")["codes"]
    assert codes.dtype == kind and codes.shape == (len(images), 2, 3)
    assert f"{len(images)} images" in call(vqvae, "--decompress", "a.npz", "--out", K, cwd=own)
    ckpt = vqvae.load_checkpoint(own / str(K) / "model.pt")
    model = vqvae.build(vqvae.parse_args([], ckpt["config"])).eval()
    model.load_state_dict(ckpt["ema"])
    want = vqvae.to_uint8(vqvae.through_codes(model.autoencoder, images)[0])
    back = np.load(own / str(K) / "images.npz")["arr_0"]
    assert (back == want.permute(0, 2, 3, 1).numpy()).all()


@pytest.mark.parametrize("flags, words", [
    ([*SMALL, "--data", "odd.npz", "--out", "odd"], "must be multiples of 4, not [9, 12]"),
    (["--reconstruct", "--data", "odd.npz"], "shape [1, 9, 12], but the model has [1, 8, 12]"),
    (["--compress", "odd.npz"], "shape [1, 9, 12], but the model has [1, 8, 12]"),
    (["--compress", "none.npz"], "expected images or arr_0, (N, H, W, C) uint8"),
    (["--compress", "said"], "expected images or arr_0, (N, H, W, C) uint8"),
    (["--decompress", "own.npz"], "expected codes that this model has written"),
    (["--decompress", "large.npz"], "shape [1, 2, 3], up to 6"),
    (["--sample", "--guidance", "nan"], "--guidance nan: expected a finite number"),
])
def test_bad_input_is_one_line(flags, words, own):
    np.savez(own / "large.npz", codes=np.full((1, 2, 3), 6, np.uint8))
    said = call(vqvae, *flags, cwd=own, code=2)
    assert words in said and said.count("\n") == 1
