"""The experiments: their mathematics against oracles, and each once as a program, in miniature."""

import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from inprocess import call

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import all_models
import attention_maps
import bench_dalle_mini
import bench_pixelcnn
import bench_vqvae
import better_prompts
import codebooks
import dalle_mini
import ddpm
import ddpm_targets
import export
import fid
import fid_bias
import flow_2d
import generative_classifier
import human_eval
import inpaint
import pixelcnn
import rerank
import scene_accuracy
import vqvae
from test_dalle_mini import text_of
from test_dalle_mini import tiny as tiny_transformer
from test_ddpm import f64, gaussian_model
from test_fid import power
from test_vqvae import SMALL, some_z
from test_vqvae import tiny as tiny_vqvae

TINY = "--width 16 --mults 1 1 --batch-size 8 --sample-steps 3 --steps 2 --device cpu".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a checkpoint of digits, after two steps."""
    folder = tmp_path_factory.mktemp("tiny")
    call(ddpm, "--train", *TINY, "--num", 10, cwd=folder)
    return folder / "out/ddpm/model.pt"


# ---- ddpm_targets.py: the bound ------------------------------------------------------------------


@pytest.mark.parametrize("mean, var", [(0.0, 1e-4), (0.9999, 1e-4), (-1.3, 0.5), (0.25, 1e-2)])
def test_decoder_is_a_distribution(mean, var):
    """The probabilities of the 256 grey levels sum to 1; the outermost bins take the tails."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    total = ddpm_targets.log_prob_of_level(levels, f64(mean), var).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-9)


def test_decoder_has_no_floor():
    """A pixel 60 standard deviations off costs what the Gaussian says, about 60^2 / 2 nats: a floor
    on the probability would make the bound too good."""
    value = ddpm_targets.log_prob_of_level(f64(-1.0), f64(0.2), 4e-4).item()
    edge = (-1 + 1 / 255 - 0.2) / 0.02
    tail = -(edge**2) / 2 - math.log(-edge * math.sqrt(2 * math.pi))  # log Phi far out
    assert value == pytest.approx(tail, rel=1e-3) and value < -1700


def test_normal_kl():
    """It is torch.distributions'; and for |x| = 1 the linear schedule leaves 3e-5 bits/dim at T."""
    N = torch.distributions.Normal
    oracle = torch.distributions.kl_divergence(N(f64(0.3), 0.2**0.5), N(f64(-1.0), 0.7**0.5))
    found = ddpm_targets.normal_kl(f64(0.3), 0.2, f64(-1.0), 0.7)
    assert found.item() == pytest.approx(oracle.item())
    a = ddpm.make_abar("linear")[-1].item()
    prior = ddpm_targets.normal_kl(f64(a**0.5), 1 - a, 0.0, 1.0).item() / math.log(2)
    assert prior == pytest.approx(3e-5, rel=0.1)


def test_bound_approaches_the_entropy():
    """Pixels with any distribution p over the 256 levels, and the exact E[x_0 | x_t]: the bound
    stays above the entropy of p and falls to it like 1/T as the steps get shorter (the log SNR is
    evenly spaced, from where the levels are certain to where they are lost)."""
    g = torch.Generator().manual_seed(0)
    p = torch.rand(256, generator=g, dtype=torch.float64) ** 4
    p = p / p.sum()
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    entropy, gaps = -(p * p.log()).sum().item(), []
    for T in (50, 200, 800):
        abar = [1.0, *torch.linspace(16, -10, T, dtype=torch.float64).sigmoid().tolist()]
        x0, a_T, n = levels[p.multinomial(2000, True, generator=g)], abar[-1], 2000
        total = ddpm_targets.normal_kl(a_T**0.5 * x0, 1 - a_T, 0.0, 1.0).mean().item()
        for t in range(1, T + 1):
            a_t = abar[t]
            xt = ddpm.q_sample(x0, torch.randn(n, generator=g, dtype=torch.float64), a_t)
            distance = (xt[:, None] - a_t**0.5 * levels).square()  # (n, 256)
            guess = (p.log() - distance / (2 * (1 - a_t))).softmax(1) @ levels
            total += ddpm_targets.bound_term(x0[:, None], guess[:, None], t, abar).mean().item()
        gaps.append(total - entropy)
    assert 0 < gaps[2] < 0.15 and gaps[0] > 3 * gaps[1] > 9 * gaps[2], gaps


def test_bound_of_a_model_that_knows(monkeypatch):
    """With the right x_0 from every x_t, all terms vanish but L_T and the decoder's."""
    monkeypatch.setattr(ddpm, "T", 60)
    args = ddpm.parse_args(["--predict", "x0", "--device", "cpu"])
    args.shape = [1, 28, 28]
    model = lambda x, t, y: torch.full_like(x, 0.2)
    images = torch.full((9, 1, 28, 28), 153, dtype=torch.uint8)  # 0.2 in [-1, 1]
    terms, error = ddpm_targets.bound(model, args, images, torch.zeros(9, dtype=torch.long), n=4)
    assert len(terms) == 61 and error == pytest.approx(0, abs=1e-9)
    assert terms[2:].max() < 1e-9 < terms[1] < 8 and terms[0] > 0


def test_targets_in_miniature(tmp_path, monkeypatch):
    """Three trainings and the table, with few steps, and a judge that only counts."""
    monkeypatch.setattr(ddpm, "T", 20)
    monkeypatch.setattr(ddpm_targets, "load_judge", lambda: lambda x, y: (len(x), 0.5))
    for name, value in (("width", 16), ("batch_size", 8), ("sample_steps", 2)):
        monkeypatch.setitem(ddpm.HPARAMS, name, (value, value, value, "small"))
    said = call(ddpm_targets, "--steps", 2, "--num", 20, cwd=tmp_path)
    for name in ("eps", "x0", "v"):
        assert f"| {name} | 2 | 20.000, 0.500 | 20.000, 0.500 | " in said
    assert (tmp_path / "out/ddpm_targets/targets.png").stat().st_size > 5000


# ---- flow_2d.py, inpaint.py, export.py -----------------------------------------------------------


@pytest.mark.parametrize("name", ["spiral", "moons", "rings"])
def test_points_learn_to_flow(tmp_path, name):
    """Slide Converting samples: after a few hundred steps noise has moved towards the data."""
    said = call(flow_2d, "--data", name, "--steps", 300, "--num", 300, cwd=tmp_path)
    samples, data, noise = (float(v) for v in re.findall(r"\| (0\.\d+) \|", said))
    assert data < samples < 0.5 * noise and (tmp_path / "out/flow_2d/flow.png").exists()


def test_inpainting_keeps_the_known_half_exactly(tiny):
    """What is given comes back to the last grey level, the rest does not."""
    ckpt = ddpm.load_checkpoint(tiny)
    args = ddpm.parse_args([], ckpt["config"])
    model = ddpm.build(args).eval()
    known = ddpm.load_data("mnist", "test", ROOT / "data")[0][:4]
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[3:9, 5:20] = True
    x = ddpm.to_uint8(inpaint.inpaint(model, ddpm.to_float(known), mask, args, steps=5, rounds=2))
    assert (x == known)[:, :, mask].all() and not (x == known)[:, :, ~mask].all()


def test_inpainting_in_miniature(tiny):
    said = call(inpaint, "--model", tiny, "--num", 20, "--answers", 1, cwd=tiny.parent)
    shares = [float(v) for v in re.findall(r"\| (\d\.\d+) of 20 \|", said)]
    assert len(shares) == 3 and shares[0] > 0.9
    assert (tiny.parent / "out/inpaint/inpaint.png").exists()


def test_export_halves_and_samples_the_same(tiny):
    """Half-precision averaged weights, which ddpm.py samples from; the optimiser is left out."""
    small = tiny.parent / "small/model.pt"
    small.parent.mkdir()
    export.main([tiny, small])
    ckpt = ddpm.load_checkpoint(small)
    assert set(ckpt) == {"file", "config", "step", "ema"}
    assert all(v.dtype == torch.float16 for v in ckpt["ema"].values())
    call(ddpm, "--sample", "--num", 10, "--out", small.parent, cwd=tiny.parent)
    a, b = (np.load(tiny.parent / f / "samples.npz")["arr_0"].astype(int) for f in (".", "small"))
    assert abs(a - b).mean() < 2


# ---- generative_classifier.py, bench_pixelcnn.py --------------------------------------------------


@pytest.fixture(scope="module")
def density(tmp_path_factory):
    """A folder with a checkpoint of pixelcnn.py, after two steps on digits with 16 levels."""
    folder = tmp_path_factory.mktemp("density")
    call(pixelcnn, "--train", *"--steps 2 --batch-size 4 --width 8 --dilations 1 --hidden 8 --levels "
         "16 --num 10 --device cpu".split(), cwd=folder)
    return folder / "out/pixelcnn/model.pt"


def test_confusions_and_hard_pairs(density):
    """gaps are log ratios, -inf for the right class; pairs are drawn where they are large."""
    ckpt = pixelcnn.load_checkpoint(density)
    args = pixelcnn.parse_args(["--device", "cpu"], ckpt["config"])
    model = pixelcnn.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    x, y = pixelcnn.held_out(args, 3)
    gaps = generative_classifier.confusions(args, model, x, y)
    for k in range(10):
        ratio = pixelcnn.log_probs(model, x, y * 0 + k) - pixelcnn.log_probs(model, x, y)
        want = torch.where(y == k, -math.inf, ratio)
        assert torch.allclose(gaps[:, k], want)
    gaps = torch.full((100, 10), -60.0)
    gaps[range(100), torch.arange(100) % 10] = -math.inf
    gaps[7, 3] = 0.0
    torch.manual_seed(0)
    images, classes = generative_classifier.hard_pairs(gaps, 400)
    assert (images[100:] == 7).float().mean() > 0.99 and len(images[:100].unique()) > 50
    assert (classes[images == 7] == 3).all() and (classes != images % 10).all()


def test_generative_classifier_in_miniature(density, monkeypatch):
    """The table, the picture, and a checkpoint from which pixelcnn.py samples."""
    digits = ddpm.load_data("mnist", "train", ROOT / "data")
    monkeypatch.setattr(pixelcnn, "load_data", lambda *a: tuple(x[:40] for x in digits))
    said = call(generative_classifier, "--steps", 2, "--num", 10, "--model", density,
                cwd=density.parent)
    out = density.parent / "out/generative_classifier"
    assert len(re.findall(r"\| (?:0\.\d{4}|1\.0000) \|", said)) == 2 and (out / "samples.png").exists()
    call(pixelcnn, "--sample", "--num", 2, "--out", out, cwd=density.parent)


def test_bench_in_miniature(density):
    said = call(bench_pixelcnn, "--model", density, "--num", 1, cwd=density.parent)
    assert "100.00 % of the pixels are the same" in said


# ---- scene_accuracy.py, rerank.py, better_prompts.py, attention_maps.py --------------------------

SCENES = "--scenes 40 --codes-width 8 --code-dim 4 --codebook-size 16 --width 32 --layers 2 " \
         "--heads 2 --batch-size 8 --codes-steps 2 --steps 2 --device cpu"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with a checkpoint of dalle_mini.py after a few steps, and a judge after as many."""
    folder = tmp_path_factory.mktemp("scenes")
    call(dalle_mini, "--train", *SCENES.split(), "--num", 1, cwd=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_accuracy, "JUDGE", folder / "judge.pt")
        model = folder / "out/dalle_mini/model.pt"
        said = call(scene_accuracy, "dalle_mini", "--train", "--scenes", 200, "--steps", 2,
                    "--model", model, "--num", 10, "--device", "cpu", cwd=folder)
        yield folder, model, said


def test_judged_table(scenes):
    """Real, through the first stage and drawn, for both kinds of pairs; the judge is in fp16."""
    folder, _, said = scenes
    for pairs, row in itertools.product(("seen", "held-out"), ("real", "real, through", "drawn")):
        assert f"| {pairs} pairs: {row}" in said
    judge = torch.load(folder / "judge.pt", weights_only=True)["model"]
    assert all(weight.dtype == torch.float16 for weight in judge.values())


def scene_facts(n):
    """Facts (n, 5, 2) of a red seven left of a green two."""
    facts = torch.tensor(dalle_mini.EMPTY).repeat(n, 5, 1)
    facts[:, 1], facts[:, 2] = torch.tensor([7, 0]), torch.tensor([2, 1])
    return facts


def reader(facts):
    """A judge that reads these facts, whatever it sees."""
    one_hot = torch.nn.functional.one_hot
    colours = facts[..., 1].clamp(max=7)
    return lambda images: (one_hot(facts[..., 0], 11).float(), one_hot(colours, 8).float())


def test_accuracy_counts_what_is_right():
    """Right in all, a wrong digit, a wrong colour, one thing too many, one missing."""
    facts = scene_facts(5)
    found = facts.clone()
    found[1, 1, 0], found[2, 2, 1], found[3, 0, 0], found[4, 2, 0] = 6, 5, 3, 10
    images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    digit, colour, relation, everything = scene_accuracy.accuracy(reader(found), images, facts).T
    assert digit.tolist() == [1, 0.5, 1, 1, 0.5] and colour.tolist() == [1, 1, 0.5, 1, 1]
    assert relation.tolist() == [1, 1, 1, 0, 0] and everything.tolist() == [1, 0, 0, 0, 0]


def test_judge_loss():
    """The mean over places of -log p(digit), and over things of -log p(colour)."""
    facts, logits = scene_facts(2), (torch.randn(2, 5, 11), torch.randn(2, 5, 8))
    loss = scene_accuracy.judge_loss(lambda images: logits, None, facts)
    digit, colour = (x.log_softmax(2) for x in logits)
    of_digit = sum(digit[n, p, facts[n, p, 0]] for n in (0, 1) for p in range(5)) / 10
    of_colour = sum(colour[n, p, facts[n, p, 1]] for n in (0, 1) for p in (1, 2)) / 4
    assert torch.allclose(loss, -of_digit - of_colour)


def test_contrastive_loss_by_hand():
    """Cross-entropy of cosines both ways; a second image with the same text is left out."""
    torch.manual_seed(0)
    scorer, text = rerank.Scorer(9, 3), torch.tensor([[1, 2, 3], [2, 2, 2], [1, 2, 3]])
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        a, b = scorer.of_text(text), scorer.of_image(images)
        assert torch.allclose(a.norm(dim=1), torch.ones(3)) and torch.allclose(a[0], a[2])
        cosines, total = 10 * a @ b.T, 0
        for m in (cosines, cosines.T):
            total -= m[0, 0] - torch.logsumexp(m[0, [0, 1]], 0)
            total -= m[1, 1] - torch.logsumexp(m[1], 0)
            total -= m[2, 2] - torch.logsumexp(m[2, [1, 2]], 0)
        assert torch.allclose(rerank.contrastive_loss(scorer, text, images), total / 6, atol=1e-5)


def test_best_of():
    """The image of the largest cosine; best of one is the first."""
    torch.manual_seed(0)
    scorer, text = rerank.Scorer(9, 3), torch.tensor([[1, 2, 3], [2, 2, 2]])
    images = torch.randint(256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    best = rerank.best_of(scorer, text, images, 4)
    with torch.no_grad():
        for i in (0, 1):
            cosines = scorer.of_image(images[i]) @ scorer.of_text(text[i:i + 1])[0]
            assert torch.equal(best[i], images[i, cosines.argmax()])
    assert torch.equal(rerank.best_of(scorer, text, images, 1), images[:, 0])


def test_reranking_in_miniature(scenes):
    folder, model, _ = scenes
    said = call(rerank, "--model", model, "--num", 3, "--steps", 2, "--device", "cpu", cwd=folder)
    assert said.count("best of 16") == 2 and "held-out pairs: best of 4" in said


def test_text_is_continued_from_the_prompt():
    """Given words stay; at least one word is added; behind the first pad are only pads; the first
    word added follows p(text), without the pads."""
    net, N = tiny_transformer(layers=1), 10_000
    short = torch.cat([text_of(net, 1), text_of(net, 0, 2)])
    text = short.repeat_interleave(N, dim=0)
    u = torch.rand(text.shape, generator=torch.Generator().manual_seed(0))
    longer = better_prompts.continue_text(net, text, u)
    given = text < 4
    assert torch.equal(longer[given], text[given])
    assert (longer[:N, 1] < 4).all() and (longer[N:, 2] < 4).all()
    ended = longer[:N, 2] >= 4
    assert (longer[:N, 2][ended] == 6).all() and 0 < ended.sum() < N
    with torch.no_grad():
        want = net(short, short[:, :0])[0][0, 1, :4].softmax(0)
    found = torch.bincount(longer[:N, 1], minlength=4) / N
    assert (found - want).abs().max() < 4 * (0.25 / N) ** 0.5


def test_what_a_short_prompt_says():
    """The seven is seen at the left, in red; nothing else counts."""
    pairs = torch.tensor([[7, 0], [2, 1], [7, 1], [3, 1], [3, 5]])
    texts = [better_prompts.prompts_of(kind, [(7, 0), (1, 6)]) for kind in better_prompts.KINDS]
    assert texts == [["a red seven", "an orange one"], ["a red seven above", "an orange one above"],
                     ["a red", "an orange"]]
    images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    judge, above = reader(scene_facts(5)), reader(scene_facts(5)[:, [0, 3, 4, 1, 2]])
    follows = [better_prompts.follows(judge, kind, images, pairs) for kind in better_prompts.KINDS]
    assert [f.tolist() for f in follows] == [[True, True, False, False, False], [False] * 5,
                                             [True, True, True, True, False]]
    follows = better_prompts.follows(above, "unfinished", images, pairs)
    assert follows.tolist() == [True, False, False, False, False]


def test_better_prompts_in_miniature(scenes):
    folder, model, _ = scenes
    said = call(better_prompts, "--model", model, "--num", 1, "--device", "cpu", cwd=folder)
    assert said.count("\n") == 7 and (folder / "out/better_prompts/better_prompts.png").exists()


def test_attention_maps_of_uniform_attention(scenes):
    """Without queries and keys every place sees itself and all earlier ones equally: a word has
    weight 1 / (N + j + 1) while code j is predicted."""
    args, model = scene_accuracy.load_model(dalle_mini, scenes[1], [])
    for block in model.transformer.blocks:
        torch.nn.init.zeros_(block.qkv.weight)
    image, maps = attention_maps.stream_maps(dalle_mini, args, model, "a red seven")
    want = 1 / (8 + torch.arange(64) + 1)
    assert image.shape == (3, 32, 32) and torch.allclose(maps, want.expand(8, -1))


def test_attention_maps_in_miniature(scenes):
    folder, model, _ = scenes
    call(attention_maps, "dalle_mini", "--model", model, "--prompt", "a red seven", cwd=folder)
    assert (folder / "out/attention_maps/dalle_mini.png").stat().st_size > 3000


def test_bench_of_the_cache_in_miniature(tmp_path):
    flags = [*SCENES.split(), "--batch-size", 16]
    said = call(bench_dalle_mini, *flags, "--rounds", 1, cwd=tmp_path)
    assert "| dalle_mini.py, not cached |" in said


# ---- all_models.py --------------------------------------------------------------------------------


def test_all_models_in_miniature(monkeypatch, tmp_path):
    """A row of numbers for every model, and for real images."""
    digits = fid.load_data("mnist", "train", ROOT / "data")
    monkeypatch.setattr(fid, "load_data", lambda *a: tuple(x[:300] for x in digits))
    said = call(all_models, "--num", 10, cwd=tmp_path)
    for name in ("pixelcnn", "vqvae", "ddpm"):
        measures = r"\d+\.\d{3} \| nan \| [01]\.\d{3}"  # too few images for a line in 1/N
        assert re.search(rf"`{name}.py` \| {measures} \| [\d,]+ \| \d+\.\d \|", said)
    for name in ("dalle_mini", "latent_diffusion"):
        assert re.search(rf"`{name}.py` \|( [01]\.\d{{3}} \|){{2}} [\d,]+ \| \d+\.\d \|", said)
    assert said.count("| real ") == 2


# ---- fid_bias.py ---------------------------------------------------------------------------------


def fd(X, Y):
    return fid.frechet_distance(*fid.gaussian(X), *fid.gaussian(Y))


def test_bias_of_unit_covariances():
    """For S = I: 2 D/N + D (D + 1)/(2 (N - 1))."""
    eye, by_hand = torch.eye(16).double(), 32 / 200 + 16 * 17 / 2 / 199
    assert fid_bias.frechet_bias(eye, eye, 200, 200) == pytest.approx(by_hand)


@pytest.mark.parametrize("second", ["same", "other"])
def test_bias_is_what_sampling_shows(second):
    """Mean distance of 500 pairs of samples less the true one is the closed form to 6 %, for equal
    and for different covariances."""
    D, n1, n2, zero, eye = 8, 200, 300, torch.zeros(8), torch.eye(8)
    A = torch.diag(1 / torch.arange(1.0, D + 1)).double()
    B = A if second == "same" else A.flip(0, 1)
    S1, S2 = A.T @ A, B.T @ B
    inverse = torch.linalg.inv(A)
    T = inverse @ power(A @ S2 @ A, 0.5) @ inverse  # T S1 T = S2
    g, draws = torch.Generator().manual_seed(0), []
    for _ in range(500):
        X = torch.randn(n1, D, generator=g, dtype=torch.float64) @ A
        Y = torch.randn(n2, D, generator=g, dtype=torch.float64) @ B
        # the derivatives are I - T and I - T^-1: without these terms, of mean zero, less noise
        linear = ((eye - T) @ (torch.cov(X.T) - S1)).trace()
        linear += ((eye - torch.linalg.inv(T)) @ (torch.cov(Y.T) - S2)).trace()
        draws.append(fd(X, Y) - float(linear))
    bias = np.mean(draws) - fid.frechet_distance(zero, S1, zero, S2)
    assert np.std(draws) / 500**0.5 < 0.025 * bias
    assert bias == pytest.approx(fid_bias.frechet_bias(S1, S2, n1, n2), rel=0.06)
    if second == "other":  # and it is not the bias of equal covariances
        assert abs(bias / fid_bias.frechet_bias(S1, S1, n1, n2) - 1) > 0.1


def test_bias_of_fixed_classes():
    """Classes in fixed numbers leave less to chance: the mean distance of 300 such samples of a
    mixture to the whole is the closed form with the class means taken out, not the one without."""
    g = torch.Generator().manual_seed(0)
    D, K, n = 6, 5, 40
    centers = 3 * torch.randn(K, D, generator=g).double()
    A = torch.randn(D, D, generator=g).double()
    y = torch.arange(K).repeat_interleave(n)
    between = torch.cov(centers.T, correction=0)
    S, draws = between + A.T @ A, []
    for _ in range(300):
        X = centers[y] + torch.randn(K * n, D, generator=g, dtype=torch.float64) @ A
        draws.append(fid.frechet_distance(centers.mean(0), S, *fid.gaussian(X)))
    bias = np.mean(draws)
    assert np.std(draws) / 300**0.5 < 0.03 * bias
    assert bias == pytest.approx(fid_bias.frechet_bias(S, S, 10**9, K * n, between), rel=0.1)
    assert fid_bias.frechet_bias(S, S, 10**9, K * n) > 1.4 * bias


def test_bias_in_miniature(tmp_path, monkeypatch):
    """The tables and the plot, with few images and pixel sums as features."""
    digits = ddpm.load_data("mnist", "test", ROOT / "data")
    monkeypatch.setattr(fid, "load_data", lambda *a: tuple(x[:600] for x in digits))
    monkeypatch.setattr(fid, "choose_features", lambda args: (
        lambda x: (x.float().mean(2)[:, 0, 10:18] / 255, None), "FD (columns)"))
    said = call(fid_bias, "--runs", 2, "--num", 400, cwd=tmp_path)
    assert "FD (columns)" in said and (tmp_path / "out/fid_bias/bias.png").exists()


# ---- human_eval.py -------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    """A page on 20 pairs of images; those of A are all black, those of B all white."""
    for name, value in (("a", 0), ("b", 255)):
        np.savez(tmp_path / f"{name}.npz", np.full((30, 4, 4, 1), value, np.uint8),
                 labels=np.arange(30) % 3)
    call(human_eval, "a.npz", "b.npz", "--num", 20, cwd=tmp_path)
    folder = tmp_path / "out/human_eval"
    text, key = (folder / "vote.html").read_text(), json.loads((folder / "key.json").read_text())
    return tmp_path, json.loads(re.search(r"const study = (.*), key = ", text)[1]), key


def test_page_is_blind_and_right(page):
    """Every trial shows one image of A and one of B, on the sides that the key says, about half of
    the time A on the left; the page does not name them. Two pairs come again, sides swapped."""
    _, study, key = page
    black = human_eval.png_of(torch.zeros(1, 4, 4, dtype=torch.uint8))
    assert len(study["trials"]) == len(key["trials"]) == 22 and "a.npz" not in json.dumps(study)
    for (left, right, caption), (pair, a_left, _) in zip(study["trials"], key["trials"]):
        assert (study["images"][left] == black) == a_left == (study["images"][right] != black)
        assert caption == f"class {pair % 3}"
    sides = {pair: a_left for pair, a_left, repeat in key["trials"] if not repeat}
    again = [(pair, a_left) for pair, a_left, repeat in key["trials"] if repeat]
    assert 4 < sum(sides.values()) < 16 and len(again) == 2
    assert all(sides[pair] != a_left for pair, a_left in again)


def test_tally(page):
    """A rater who prefers A except in three pairs and is undecided in two; a second rater turns a
    tie; votes of another page, or that are no votes, are refused."""
    folder, study, key = page
    trials = key["trials"]
    side = lambda a_left, a_wins: "left" if a_left == a_wins else "right"
    votes = [side(a_left, True) for _, a_left, _ in trials]
    for i in (0, 1, 2):
        votes[i] = side(trials[i][1], False)
    votes[3] = votes[4] = "tie"
    one = dict(id=key["id"], votes=votes)
    lost_again = sum(pair in [t[0] for t in trials[:5]] for pair, _, repeat in trials if repeat)
    assert human_eval.tally(key, [one]) == ((15, 2, 3), (2 - lost_again, 2))
    two = dict(id=key["id"], votes=[side(a, True) for _, a, _ in trials[:4]])
    assert human_eval.tally(key, [one, two])[0] == (16, 4, 0)
    (folder / "votes.json").write_text(json.dumps(one))
    said = call(human_eval, "--tally", "votes.json", cwd=folder)
    assert "| 75.0% | 10.0% | 15.0% | 83.3% |" in said
    for wrong in (dict(one, id="x"), dict(one, votes=["up"])):
        with pytest.raises(ValueError):
            human_eval.tally(key, [wrong])


# ---- codebooks.py, bench_vqvae.py ----------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.25, 0.5])
def test_gradient_codebook_moves_what_it_should(beta):
    """beta scales the pull on z, not that on the vectors (the known slip is the reverse); the
    decoder's error moves z alone."""
    torch.manual_seed(0)
    book, z = codebooks.Gradient(5, 3, beta).eval(), some_z().requires_grad_()
    q, codes, extra = book(z)
    away = (z - book.vectors[codes]).detach()
    on_z, on_vectors = torch.autograd.grad(extra, (z, book.vectors))
    assert torch.allclose(on_z, 2 * beta * away / z.numel(), atol=1e-7)
    pull = torch.zeros(5, 3).index_add_(0, codes.flatten(), -2 * away.flatten(0, 2)) / z.numel()
    assert torch.allclose(on_vectors, pull, atol=1e-7)
    on_z, on_vectors = torch.autograd.grad(q.sum(), (z, book.vectors), allow_unused=True)
    assert torch.equal(on_z, torch.ones_like(z)) and on_vectors is None


def test_unused_codes_of_the_gradient_codebook_restart():
    """At some z; a step leaves all others to the optimiser."""
    torch.manual_seed(0)
    book, z = codebooks.Gradient(5, 3, 0.25), some_z()
    with torch.no_grad():
        book.vectors[2], book.count[2] = 50.0, 1e-9
    before = book.vectors.detach().clone()
    book(z)
    assert (book.vectors[2] == z.flatten(0, 2)).all(1).any()
    keep = [0, 1, 3, 4]
    assert torch.equal(book.vectors[keep], before[keep]) and book.count[2] == 1


@pytest.mark.parametrize("levels", [[2], [3, 2], [8, 5, 4], [7, 6]])
def test_rounding_is_a_bijection(levels):
    """Each code's vector has that code, in bfloat16 too; they are K different ones in [-1, 1]; no z
    leads elsewhere."""
    book = codebooks.Rounding(levels)
    assert book.vectors.min() == -1 and book.vectors.max() == 1
    assert len(book.vectors.unique(dim=0)) == len(book.vectors) == book.K
    z = torch.atanh(book.vectors * (1 - 0.5 / max(levels)))[None, None]
    for wide in (z, z.bfloat16()):
        q, codes, extra = book(wide)
        assert codes.flatten().tolist() == list(range(book.K)) and extra == 0
        assert torch.allclose(q[0, 0], book.vectors, atol=1e-6)
    codes = book(8 * torch.randn(1, 50, 50, len(levels)))[1]
    assert 0 <= codes.min() and codes.max() < book.K


def test_rounding_is_to_the_nearest_level():
    """Of the squashed number, by brute force; the gradient is that of the squashing."""
    z = torch.randn(1, 50, 3, 2, requires_grad=True)
    q = codebooks.Rounding([4, 5])(z)[0]
    for i, n in enumerate((4, 5)):
        levels, y = torch.linspace(-1, 1, n), torch.tanh(z[..., i])
        want = levels[(y[..., None] - levels).abs().argmin(-1)]
        assert torch.allclose(q[..., i], want, atol=1e-6)
    q.sum().backward()
    assert torch.allclose(z.grad, 1 - torch.tanh(z.detach()) ** 2, atol=1e-6)


def test_logistic_is_a_distribution():
    """The 256 levels sum to 1, for a narrow one and a centre outside too; gradients are finite;
    the tail has no floor."""
    x = (torch.arange(256) * 2 / 255 - 1)[:, None]
    centre = torch.tensor([-1.2, -0.3, 0.999, 4.0], requires_grad=True)
    log_scale = torch.tensor([-7.0, -3.0, -5.0, 0.5], requires_grad=True)
    log_p = codebooks.log_bin(x, centre, log_scale)
    assert torch.allclose(log_p.exp().sum(0), torch.ones(4), atol=1e-4)
    log_p.sum().backward()
    assert centre.grad.isfinite().all() and log_scale.grad.isfinite().all()
    far = codebooks.log_bin(torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(-7.0)).item()
    assert far == pytest.approx((-2 + 1 / 255) * math.exp(7), rel=1e-5)


def test_bound_by_hand():
    """Of 600 images in batches of 500, from the logits and from log p(x | codes); the head alone
    gets a gradient."""
    _, model = tiny_vqvae()
    images = torch.randint(256, (600, 1, 8, 12), dtype=torch.uint8)
    x, y = vqvae.to_float(images), torch.arange(600) % 3
    head = torch.nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1)
    prior, image = codebooks.bound(model, head, images, y)
    codes = vqvae.codes_of(model.autoencoder, images)
    with torch.no_grad():
        logp = model.prior(codes.flatten(1), y).log_softmax(-1)
        logp = logp.gather(2, codes.flatten(1)[..., None])
        q = model.autoencoder.codebook.vectors[codes].permute(0, 3, 1, 2)
        shift, log_scale = head(model.autoencoder.decoder[:-1](q)).chunk(2, 1)
        nats = codebooks.log_bin(x, model.autoencoder.decoder(q) + shift, log_scale - 3)
    assert prior == pytest.approx(-logp.sum().item() / 600 / 96 / math.log(2), rel=1e-4)
    assert image == pytest.approx(-nats.sum().item() / 600 / 96 / math.log(2), rel=1e-4)
    codebooks.image_bits(head, model.autoencoder, x, codes).backward()
    assert head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_codebooks_in_miniature(tmp_path):
    """Both tables, of a model and data that take no time."""
    images = np.random.default_rng(0).integers(256, size=(40, 8, 12, 1), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images)
    call(vqvae, *SMALL, cwd=tmp_path)
    said = call(codebooks, "--model", "out/vqvae/model.pt", "--seconds", 0.2, cwd=tmp_path)
    for name in ("Codebook", "Gradient", "Rounding"):
        assert re.search(rf"\| {name} \| \d+ \| [\d.]+ \| \d+ \| [\d.]+ \|", said)
    total, prior, image = map(float, re.findall(r"\d\.\d{4}", said.splitlines()[-1]))
    assert total == pytest.approx(prior + image, abs=2e-4)


def test_bench_vqvae_takes_turns(tmp_path, monkeypatch):
    """With a stand-in for the other library."""
    class VectorQuantize(torch.nn.Module):
        def __init__(self, dim, codebook_size, decay, commitment_weight):
            super().__init__()

        def forward(self, z):
            return z, None, z.new_zeros(1)

    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch",
                        SimpleNamespace(VectorQuantize=VectorQuantize))
    said = call(bench_vqvae, "--codes", 8, "--rounds", 1, "--device", "cpu", cwd=tmp_path)
    assert re.search(r"K = 8: vqvae.py [\d.]+ ms, vector-quantize-pytorch [\d.]+ ms per step", said)
