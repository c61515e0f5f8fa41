"""vqvae.py: the nearest code is the nearest, each loss moves what it should, the prior is a causal
distribution, and what is compressed comes back."""

import itertools
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vqvae
from inprocess import call

ROOT = Path(vqvae.__file__).parent


def codebook(K=5, D=3, beta=0.25, decay=0.9, by_gradient=False):
    torch.manual_seed(0)
    return vqvae.Codebook(K, D, beta, decay, by_gradient)


def some_z(N=40, D=3):
    return torch.randn(1, N // 5, 5, D, generator=torch.Generator().manual_seed(1))


# ---- The codebook --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 100, 2**20])
def test_nearest_code_is_the_nearest(chunk, monkeypatch):
    """By brute force in float64, whatever the number of distances held at a time."""
    monkeypatch.setattr(vqvae, "CHUNK", chunk)
    torch.manual_seed(0)
    z, e = torch.randn(53, 4), torch.randn(9, 4)
    want = (z[:, None].double() - e[None].double()).square().sum(2).argmin(1)
    assert torch.equal(vqvae.nearest_code(z, e), want)


def test_nearest_code_holds_no_large_matrix(monkeypatch):
    """With K = 8192 no product of more than CHUNK numbers is made."""
    sizes, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: (sizes.append(
        (out := addmm(*a, **k)).numel()), out)[1])
    vqvae.nearest_code(torch.randn(1000, 8), torch.randn(8192, 8))
    assert len(sizes) > 1 and max(sizes) <= vqvae.CHUNK


def test_nearest_code_is_found_in_float32_under_autocast():
    """Vectors nearer to each other than bfloat16 can tell are told apart."""
    e = torch.tensor([[1.0, 0], [1.001, 0], [1.002, 0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert vqvae.nearest_code(e, e).tolist() == [0, 1, 2]


def test_straight_through():
    """The value is the code's; the gradient is as if nothing had been there."""
    z, q = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    out, g = vqvae.straight_through(z, q), torch.randn(4, 3)
    assert torch.allclose(out, q)
    out.backward(g)
    assert torch.equal(z.grad, g) and q.grad is None


@pytest.mark.parametrize("by_gradient", [False, True])
def test_who_moves_whom(by_gradient):
    """The decoder's error reaches z alone; the commitment pulls z to the code with 2 beta (z - e)/N;
    the codebook's own loss pulls the vectors, and z not at all."""
    book = codebook(by_gradient=by_gradient).eval()
    z = some_z().requires_grad_()
    q, codes, extra = book(z)
    q.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z)) and book.vectors.grad is None
    z.grad = None
    extra.backward()
    away = z.detach() - book.vectors.detach()[codes]
    assert torch.allclose(z.grad, 2 * 0.25 * away / z.numel(), atol=1e-7)
    if by_gradient:
        pull = torch.zeros_like(book.vectors).index_add_(0, codes.flatten(), -2 * away.flatten(0, 2))
        assert torch.allclose(book.vectors.grad, pull / z.numel(), atol=1e-7)
    else:
        assert book.vectors.grad is None and not book.vectors.requires_grad


def test_doubling_beta_doubles_the_pull_on_z_alone():
    """The known slip is beta on the codebook's term."""
    grads = []
    for beta in (0.25, 0.5):
        book, z = codebook(beta=beta, by_gradient=True).eval(), some_z().requires_grad_()
        book(z)[2].backward()
        grads.append((z.grad, book.vectors.grad))
    assert torch.allclose(2 * grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_running_means_by_hand():
    """One step on two clusters: count <- decay count + (1 - decay) n, total likewise, vector =
    total/count; an unused code keeps its value; with decay 0 codes are the means."""
    z = torch.tensor([[[[1.0, 0], [3, 0], [0, 5]]]])
    for decay in (0.9, 0.0):
        book = vqvae.Codebook(3, 2, 0.25, decay, False)
        book.vectors.copy_(torch.tensor([[2.0, 0], [0, 4], [-90, -90]]))
        book.total.copy_(book.vectors)
        out, codes, _ = book(z)
        assert codes.flatten().tolist() == [0, 0, 1]
        assert torch.allclose(out.flatten(0, 2), torch.tensor([[2.0, 0], [2, 0], [0, 4]]))  # the old
        d = decay
        want = torch.tensor([[(d * 2 + (1 - d) * 4) / (d + (1 - d) * 2), 0], [0, d * 4 + (1 - d) * 5]])
        assert torch.allclose(book.vectors[:2], want)
        if decay:  # with decay 0 a code is dead at once
            assert book.vectors[2].tolist() == [-90, -90]


def test_eval_leaves_the_codebook_alone():
    book = codebook().eval()
    before = {k: v.clone() for k, v in book.state_dict().items()}
    book(some_z())
    assert all(torch.equal(before[k], v) for k, v in book.state_dict().items())


@pytest.mark.parametrize("by_gradient", [False, True])
def test_dead_codes_begin_anew(by_gradient):
    """A code that nobody chose for long lands on some z, its count and total with it; others stay."""
    book, z = codebook(by_gradient=by_gradient), some_z()
    with torch.no_grad():
        book.vectors[2] = 50.0
        book.count[2] = 1e-9
        book.total[2] = 50e-9
    others = book.vectors.detach().clone()
    book(z)
    flat = z.flatten(0, 2)
    assert (book.vectors[2] == flat).all(1).any()
    assert book.count[2] == len(flat) / 5
    assert torch.allclose(book.total[2], book.vectors[2] * book.count[2])
    if by_gradient:
        assert torch.equal(book.vectors[[0, 1, 3, 4]], others[[0, 1, 3, 4]])


def test_begin_puts_all_vectors_on_data():
    """And they are total/count at once: otherwise the second step would undo it."""
    book, z = codebook(), some_z()
    book.begin(z)
    assert all((v == z.flatten(0, 2)).all(1).any() for v in book.vectors)
    assert torch.allclose(book.total / book.count[:, None], book.vectors)


def test_perplexity():
    """1 if one code is used, K if all equally; nothing used is no fault."""
    assert vqvae.perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)
    assert vqvae.perplexity(torch.full((6,), 3)) == pytest.approx(6)
    assert math.isfinite(vqvae.perplexity(torch.zeros(4)))


@pytest.mark.parametrize("levels", [[2], [3, 2], [8, 5, 4], [7, 6]])
def test_rounding_is_a_bijection(levels):
    """All codes are reached; a code's vector has that code; values lie evenly in [-1, 1]; bfloat16
    does not lose any."""
    book = vqvae.Rounding(levels)
    codes = torch.arange(book.K).view(1, 1, -1)
    vectors = book.lookup(codes)
    assert vectors.min() == -1 and vectors.max() == 1 and len(vectors[0, 0].unique(dim=0)) == book.K
    z = torch.atanh(vectors * (1 - 0.5 / max(levels)))
    for wide in (z, z.bfloat16()):
        q, again, extra = book(wide)
        assert torch.equal(again, codes) and torch.allclose(q, vectors) and extra == 0
    reached = book(8 * torch.randn(1, 200, 200, len(levels)))[1]
    assert 0 <= reached.min() and reached.max() < book.K


def test_rounding_rounds_to_the_nearest_level():
    """Of the squashed number, by brute force; the gradient is that of the squashing."""
    book = vqvae.Rounding([4, 5])
    z = torch.randn(1, 50, 3, 2, requires_grad=True)
    q = book(z)[0]
    for i, n in enumerate((4, 5)):
        grid, y = torch.linspace(-1, 1, n), torch.tanh(z[..., i])
        want = grid[(y[..., None] - grid).abs().argmin(-1)]
        assert torch.allclose(q[..., i], want)
    q.sum().backward()
    assert torch.allclose(z.grad, 1 - torch.tanh(z.detach()) ** 2, atol=1e-6)


# ---- Networks ------------------------------------------------------------------------------------


def model(shape=(1, 8, 12), classes=2, **flags):
    argv = ["--device", "cpu", "--width", "16", "--code-dim", "4", "--codebook-size", "6", "--blocks",
            "1", "--prior-width", "32", "--prior-layers", "2"]
    args = vqvae.parse_args(argv)
    for key, value in flags.items():
        setattr(args, key, value)
    args.shape, args.classes, args.bf16 = list(shape), classes, False
    torch.manual_seed(0)
    net = vqvae.Model(args).eval()
    for p in net.prior.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return args, net


@pytest.mark.parametrize("kind", ["ema", "loss", "fsq"])
@pytest.mark.parametrize("shape", [(1, 8, 12), (3, 8, 4)])
def test_codes_hold_all_that_the_decoder_gets(kind, shape):
    """decode(codes(x)) is forward(x), for images that are not square too."""
    args, net = model(shape, codebook=kind)
    images = torch.randint(256, (3, *shape), dtype=torch.uint8)
    codes = vqvae.codes_of(net, images)
    assert codes.shape == (3, shape[1] // 4, shape[2] // 4)
    *want, same, _ = net.autoencoder(vqvae.to_float(images))
    assert torch.equal(codes, same) and all(a.shape == images.shape for a in want)
    for a, b in zip(vqvae.decoded(net, codes), want):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_density_does_not_change_the_picture():
    """The gradient of log p(x | codes) reaches the layers of the density alone."""
    args, net = model()
    x = torch.rand(2, 1, 8, 12) * 2 - 1
    _, centre, log_scale, _, _ = net.autoencoder(x)
    vqvae.log_bin(x, centre, log_scale, 256).sum().backward()
    got = {n.split(".")[0] for n, p in net.autoencoder.named_parameters() if p.grad is not None}
    assert got == {"density"}


def test_the_density_sums_to_one():
    x = (torch.arange(256) * 2 / 255 - 1)[:, None]
    mean, log_scale = torch.tensor([-1.2, -0.3, 0.999, 4.0]), torch.tensor([-7.0, -3.0, -5.0, 0.5])
    assert torch.allclose(vqvae.log_bin(x, mean, log_scale, 256).exp().sum(0), torch.ones(4),
                          atol=1e-4)


def test_prior_sees_what_came_before_and_nothing_else():
    """Each code moves all later logits and no earlier one, nor its own."""
    net = model()[1].prior.double()
    codes, y = torch.randint(6, (1, 6)), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        one = net(codes, y)
        for i in range(6):
            other = codes.clone()
            other[0, i] = (codes[0, i] + 1) % 6
            moved = (net(other, y) - one).abs().amax(-1)[0] > 1e-9
            assert moved.tolist() == [k > i for k in range(6)]
        assert ((net(codes, y + 1) - one).abs().amax(-1) > 1e-9).all()


def test_prior_is_a_distribution():
    """Over all grids of 2 x 2 codes of K = 3 it sums to 1, for each class and for none."""
    torch.manual_seed(0)
    net = vqvae.Prior(3, 2, 2, 2, 32, 2).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    for c in range(3):
        total = net.log_prob(every, torch.full((81,), c)).detach().exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-6)


def test_untrained_prior_costs_log2_K_bits():
    net = vqvae.Prior(11, 2, 3, 2, 32, 2)
    nats = net.log_prob(torch.randint(11, (5, 2, 3)), torch.zeros(5, dtype=torch.long))
    assert torch.allclose(nats, torch.full((5,), -6 * math.log(11)), atol=1e-5)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_samples_follow_the_guided_prior(w):
    """Counts of 2 codes drawn 20,000 times against p(none) (p(cond)/p(none))^w, step by step."""
    torch.manual_seed(0)
    net = vqvae.Prior(3, 1, 2, 2, 32, 1).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    N, y = 20_000, torch.ones(20_000, dtype=torch.long)
    dice = torch.rand(N, 2, generator=torch.Generator().manual_seed(1))
    drawn = vqvae.sample_codes(net, y, dice, 1.0, w)
    found = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / N
    every = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        cond, none = (net(every, torch.full((9,), c)).log_softmax(-1) for c in (1, 2))
    logp = (none + w * (cond - none)).log_softmax(-1).gather(2, every[..., None]).sum((1, 2))
    assert torch.allclose(found, logp.exp(), atol=0.012)


def test_bound_is_the_sum_of_its_parts(tmp_path, monkeypatch, capsys):
    """By hand, from log p(codes | y) and log p(x | codes), in bits/dim."""
    args, net = model()
    images = torch.randint(256, (7, 1, 8, 12), dtype=torch.uint8)
    y = torch.tensor([0, 1, 1, 0, 0, 1, 0])
    monkeypatch.setattr(vqvae, "load_data", lambda *_: (images, y))
    vqvae.bound(args, net)
    found = float(capsys.readouterr().out.split("at most ")[1].split()[0])
    x = vqvae.to_float(images)
    with torch.no_grad():
        _, centre, log_scale, codes, _ = net.autoencoder(x)
        nats = -net.prior.log_prob(codes, y) - vqvae.log_bin(x, centre, log_scale, 256).sum((1, 2, 3))
    assert found == pytest.approx(float(nats.mean()) / 96 / math.log(2), abs=1e-3)


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 3, 5, 256, 257, 8192])
def test_packed_codes_come_back(K):
    """In ceil(log2 K) bits each."""
    codes = np.random.default_rng(0).integers(K, size=37)
    codes[0], codes[1] = 0, K - 1
    data = vqvae.pack(codes, K)
    assert len(data) == math.ceil(37 * math.ceil(math.log2(K)) / 8)
    assert (vqvae.unpack(data, 37, K) == codes).all()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A data set of 40 images, 8 x 12, grey, with 2 classes."""
    folder = tmp_path_factory.mktemp("vq")
    rng = np.random.default_rng(0)
    np.savez(folder / "own.npz", images=rng.integers(256, size=(40, 8, 12), dtype=np.uint8),
             labels=np.arange(40) % 2)
    np.savez(folder / "odd.npz", images=rng.integers(256, size=(40, 9, 12), dtype=np.uint8))
    return folder


SMALL = ("--train --steps 4 --prior-steps 4 --batch-size 8 --prior-batch 8 --width 8 --code-dim 4 "
         "--codebook-size 6 --blocks 1 --prior-width 32 --prior-layers 1 --every 2 --num 8 "
         "--device cpu").split()


@pytest.fixture(scope="module")
def trained(own):
    return call(vqvae, *SMALL, "--data", own / "own.npz", "--reconstruct", cwd=own)


def test_train_writes_what_it_promises(own, trained):
    for name in ("model.pt", "samples.png", "samples.npz", "loss.csv", "loss.png", "codes_000002.png",
                 "prior_000002.png", "reconstruction.png", "codebook.png", "usage.png", "codes.png",
                 "interpolation.png"):
        assert (own / "out/vqvae" / name).exists(), name
    assert "codes used" in trained and "bits/dim" in trained


@pytest.mark.parametrize("checkpoint", [1, 2, 3])
def test_resumes_to_the_bit(own, trained, checkpoint):
    """Killed right after any checkpoint, of either stage or between them, and resumed: the same model
    to the bit."""
    calls, saved = [], vqvae.save_history

    def killed(*a):
        calls.append(1)
        if len(calls) == checkpoint:
            raise KeyboardInterrupt
        saved(*a)

    short = [*SMALL, "--data", str(own / "own.npz"), "--out", str(own / f"b{checkpoint}")]
    vqvae.save_history = killed
    try:
        with pytest.raises(SystemExit):
            vqvae.main(short)
    finally:
        vqvae.save_history = saved
        signal.signal(signal.SIGINT, signal.default_int_handler)
    call(vqvae, *short, "--resume", cwd=own)
    one, two = (torch.load(own / p / "model.pt", weights_only=True)
                for p in ("out/vqvae", f"b{checkpoint}"))
    assert (two["part"], two["step"]) == ("prior", 4)
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    assert (own / "out/vqvae/loss.csv").read_text() == (own / f"b{checkpoint}/loss.csv").read_text()


def test_resume_keeps_new_flags(own, trained):
    """More steps asked for at --resume are in the checkpoint, for the resume after that."""
    folder = own / "longer"
    call(vqvae, *SMALL, "--data", own / "own.npz", "--out", folder, cwd=own)
    call(vqvae, "--train", "--resume", "--prior-steps", 6, "--out", folder, "--device", "cpu", cwd=own)
    ckpt = torch.load(folder / "model.pt", weights_only=True)
    assert (ckpt["step"], ckpt["config"]["prior_steps"]) == (6, 6)


@pytest.mark.parametrize("n", [1, 15, 20, 33])
def test_pairs_of_any_number(n):
    """A picture comes of any number of images."""
    args, net = model()
    images = torch.randint(256, (n, 1, 8, 12), dtype=torch.uint8)
    assert vqvae.pairs(net.autoencoder, images).ndim == 3


@pytest.mark.parametrize("kind", ["loss", "fsq"])
def test_the_other_codebooks_train(own, kind):
    text = call(vqvae, *SMALL, "--data", own / "own.npz", "--codebook", kind, "--fsq-levels", "3", "2",
               "--out", kind, cwd=own)
    assert "of 6 codes used" in text


def test_compress_round_trip(own, trained, capsys, monkeypatch):
    """What comes back is what the codes decode to, the same as --reconstruct shows."""
    monkeypatch.chdir(own)
    vqvae.main(["--compress", "own.npz", "--save", "a.vq", "--device", "cpu"])
    text = capsys.readouterr().out
    size = (own / "a.vq").stat().st_size
    assert size == vqvae.HEAD.size + math.ceil(40 * 6 * 3 / 8) + 4
    assert f"3,840 bytes of pixels in {size:,} bytes" in text and "ideal" in text
    vqvae.main(["--decompress", "a.vq", "--save", "b.npz", "--device", "cpu"])
    back = np.load("b.npz")["arr_0"]
    ckpt = vqvae.read_checkpoint(own / "out/vqvae/model.pt")
    args = vqvae.parse_args(["--device", "cpu"], ckpt["config"])
    vqvae.use_device(args)
    net = vqvae.Model(args).eval()
    vqvae.load_state(net, ckpt, "model")
    images = torch.from_numpy(np.load("own.npz")["images"])[:, None]
    want = vqvae.to_uint8(vqvae.decoded(net, vqvae.codes_of(net, images))[0])
    assert (back == want.permute(0, 2, 3, 1).numpy()).all()


@pytest.mark.parametrize("damage, words", [
    (lambda d: d[:-3], "cut off or altered"),
    (lambda d: d[:10], "cut off or altered"),
    (lambda d: d + b"x", "cut off or altered"),
    (lambda d: d[:40] + bytes([d[40] ^ 1]) + d[41:], "cut off or altered"),
    (lambda d: d[:4] + b"\xff" + d[5:], "cut off or altered"),
    (lambda d: b"", "is not a file that --compress wrote"),
    (lambda d: b"PK" + d, "is not a file that --compress wrote"),
])
def test_damaged_codes_are_one_line(own, trained, capsys, monkeypatch, damage, words):
    monkeypatch.chdir(own)
    vqvae.main(["--compress", "own.npz", "--save", "c.vq", "--device", "cpu"])
    Path("c.vq").write_bytes(damage(Path("c.vq").read_bytes()))
    refused(["--decompress", "c.vq", "--device", "cpu"], words, capsys)


def test_codes_of_another_checkpoint_are_refused(own, trained, capsys, monkeypatch):
    """Weights differ, or the size of the grid."""
    monkeypatch.chdir(own)
    vqvae.main(["--compress", "own.npz", "--save", "d.vq", "--device", "cpu"])
    vqvae.main([*SMALL, "--data", "own.npz", "--out", "other", "--seed", "5"])
    refused(["--decompress", "d.vq", "--out", "other", "--device", "cpu"], "another checkpoint",
            capsys)


def refused(argv, words, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        vqvae.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("argv, words", [
    ([*SMALL, "--data", "odd.npz", "--out", "odd"], "multiples of 4"),
    (["--compress", "odd.npz"], "the model was trained on [1, 8, 12]"),
    (["--compress", "none.npz"], "cannot be read"),
    (["--decompress", "none.vq"], "none.vq: No such file"),
    (["--sample", "--codebook-size", "7"], "was trained with 6"),
    (["--sample", "--prior-width", "40"], "a multiple of 32"),
    (["--sample", "--codebook-size", "1"], "2 or more"),
    (["--sample", "--temperature", "0"], "more than 0"),
    (["--train", "--beta", "-1"], "0 or more"),
    (["--sample", "--out", "nowhere"], "is not there"),
])
def test_bad_input_is_one_line(own, trained, monkeypatch, capsys, argv, words):
    """Exit code 2 and one line."""
    monkeypatch.chdir(own)
    monkeypatch.setattr(vqvae, "HERE", own)
    refused([*argv, *([] if "--device" in argv else ["--device", "cpu"])], words, capsys)


def test_two_processes_share_a_batch(own, trained):
    """torchrun with two processes gives nearly the model that one gives: rounding differs."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--",
         str(ROOT / "vqvae.py"), *SMALL, "--data", str(own / "own.npz"), "--out", "two"],
        cwd=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(own / p / "model.pt", weights_only=True)["model"]
                for p in ("out/vqvae", "two"))
    for k in one:
        assert torch.allclose(one[k].float(), two[k].float(), atol=0.02), k
