"""The experiments: each once as a program, in miniature; what they measure, against oracles."""

import functools
import importlib
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inprocess import call
from test_lessons import LESSONS

import attention_maps
import better_prompts
import codebooks
import dalle_mini
import ddpm
import ddpm_targets
import export
import fid
import fid_bias
import human_eval
import inpaint
import pixelcnn
import scene_accuracy
import vqvae

f64 = lambda x: torch.tensor(x, dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of four lessons and of the judge, after two steps; 300 images per data set."""
    path = tmp_path_factory.mktemp("experiments")
    first = lambda load: lambda *args: tuple(x[:300] for x in load(*args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_accuracy, "JUDGE", path / "judge.pt")
        for lesson in (ddpm, fid, pixelcnn, vqvae):
            patch.setattr(lesson, "load_data", first(lesson.load_data))
        for lesson in (ddpm, pixelcnn, vqvae, dalle_mini):
            flags = LESSONS[lesson.NAME].replace("own.npz", "mnist")
            with pytest.MonkeyPatch.context() as faster:  # without samples, pixel by pixel
                faster.setattr(pixelcnn, "sample", lambda model, x, *_: x.clamp(min=0))
                call(lesson, "--train", *flags.split(), *"--num 1 --steps 2".split(), cwd=path)
        scene_accuracy.train_judge(dalle_mini, dalle_mini.parse_args([]), scenes=200, steps=2)
        yield path


def load(folder, lesson):
    return scene_accuracy.load_model(lesson, folder / f"out/{lesson.NAME}/model.pt", [])


@pytest.mark.parametrize("script, flags, said", [
    ("ddpm_targets", "--steps 2 --num 20", r"eps \| 2 .*\n.* x0 \| 2 .*\n.* v \| 2 .*\n.* real"),
    ("fid_bias", "--runs 2 --num 300", r"(\|.*\n){6}\n(\|.*\n){8}"),
    ("fid_damage", "--num 200", r"(\|.*\n){15}"),
    ("flow_2d", "--data rings --steps 100 --num 100", r"(\|.*\n){5}"),
    ("inpaint", "--model out/ddpm/model.pt --num 10 --answers 1", r"(\|.*\n){5}"),
    ("generative_classifier", "--steps 2 --num 10 --model out/pixelcnn/model.pt", r"(\|.*\n){4}"),
    ("bench_pixelcnn", "--num 1 --model out/pixelcnn/model.pt", "100.00 % of the pixels"),
    ("scene_accuracy", "dalle_mini --model out/dalle_mini/model.pt --num 10", r"(\|.*\n){10}"),
    ("rerank", "--model out/dalle_mini/model.pt --num 2 --steps 2", r"(\|.*\n){8}"),
    ("better_prompts", "--model out/dalle_mini/model.pt --num 1", r"(\|.*\n){7}"),
    ("attention_maps", "dalle_mini --model out/dalle_mini/model.pt --prompt one", "each word"),
    ("bench_dalle_mini", LESSONS["dalle_mini"] + " --batch-size 16 --rounds 1", r"(\|.*\n){4}"),
    ("all_models", "--num 4", r"(\|.*\n){6}\n(\|.*\n){5}"), ("bench_vqvae", "--rounds 1", " m"),
    ("codebooks", "--model out/vqvae/model.pt --seconds 0.1", r"(\|.*\n){5}at most \d")])
def test_in_miniature(script, flags, said, folder, monkeypatch):
    """Each as a program: as many rows as promised, its picture, and what its numbers must obey."""
    module = importlib.import_module(script)
    monkeypatch.setattr(inpaint, "inpaint", functools.partial(inpaint.inpaint, steps=3))
    if script == "ddpm_targets":  # small networks, few steps, no samples after training
        monkeypatch.setattr(ddpm, "T", 20)
        monkeypatch.setattr(ddpm, "save_samples", lambda args, model: None)
        for name, value in (("width", 16), ("batch_size", 8), ("sample_steps", 2)):
            monkeypatch.setitem(ddpm.HPARAMS, name, (value, value, value, ""))
    found = call(module, *flags.split(), cwd=folder)
    assert re.search(said, found), found
    assert list((folder / "out" / script).glob("*.png")) or ".png" not in module.__doc__
    if script == "flow_2d":  # noise has moved towards the data
        samples, data, noise = map(float, re.findall(r"\| (0\.\d+) \|", found))
        assert data < samples < 0.5 * noise


def test_bound_of_ddpm(monkeypatch):
    """The decoder's probabilities sum to 1, without a floor; the terms are those of Bayes' rule;
    who knows x_0 leaves L_T and the decoder's."""
    level = ddpm_targets.log_prob_of_level
    for mean, var in ((0.0, 1e-4), (0.9999, 1e-4), (-1.3, 0.5)):
        p = level(torch.arange(256, dtype=torch.float64) / 127.5 - 1, f64(mean), var).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-9)
    far = (1.2 - 1 / 255) / 0.02  # 60 standard deviations
    tail = -(far**2) / 2 - math.log(far * math.sqrt(2 * math.pi))
    ends = level(f64([-1.0, 1.0]), f64([0.2, -0.2]), 4e-4).tolist()
    assert ends == pytest.approx([tail, tail], rel=1e-3)
    assert ddpm_targets.normal_kl(1.0, 0.5, 0.0, 2.0) == pytest.approx(math.log(2) - 1 / 8)
    abar, x0, guess = [1.0, 0.9, 0.7, 0.4], f64([[0.2]]), f64([[0.1]])
    for t in (1, 2, 3):
        a_s, step = abar[max(t, 2) - 1], abar[max(t, 2)] / abar[max(t, 2) - 1]
        precision = 1 / (1 - a_s) + step / (1 - step)
        want = -level(x0, guess, 1 / precision)
        if t > 1:  # half of precision times the squared distance of the means
            want = (x0 - guess).square() * a_s / (1 - a_s) ** 2 / precision / 2
        assert torch.allclose(ddpm_targets.bound_term(x0, guess, t, abar), want[0])
    monkeypatch.setattr(ddpm, "T", 60)
    args = ddpm.parse_args(["--predict", "x0", "--device", "cpu"])
    args.shape, knows = [1, 28, 28], lambda x, t, y: torch.full_like(x, 0.2)
    images = torch.full((9, 1, 28, 28), 153, dtype=torch.uint8)  # 0.2 in [-1, 1]
    terms, error = ddpm_targets.bound(knows, args, images, torch.zeros(9, dtype=torch.long), n=4)
    assert 0 < terms[0] < 0.01 and max(error, *terms[2:]) < 1e-9 < terms[1] < 8


def test_inpainting_and_export(folder):
    """What is given comes back to the last grey level. Exported: averaged weights alone, halved."""
    args, model = load(folder, ddpm)
    known = ddpm.load_data("mnist", "test", args.data_dir)[0][:4]
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[3:9, 5:20] = True
    drawn = inpaint.inpaint(model, ddpm.to_float(known), mask, args, steps=5, rounds=2)
    same = ddpm.to_uint8(drawn) == known
    assert same[:, :, mask].all() and not same[:, :, ~mask].all()
    export.main([folder / "out/ddpm/model.pt", folder / "small.pt"])
    small = ddpm.load_checkpoint(folder / "small.pt")
    assert set(small) == {"file", "config", "step", "ema"}
    for name, weight in model.state_dict().items():
        assert torch.equal(small["ema"][name], weight.half())


def test_what_is_read_in_scenes():
    """Right, a wrong digit, a wrong colour, one too many, one missing; who follows prompts."""
    facts = torch.tensor(dalle_mini.EMPTY).repeat(5, 5, 1)  # a red seven left of a green two
    facts[:, 1], facts[:, 2] = torch.tensor([7, 0]), torch.tensor([2, 1])
    found, images = facts.clone(), torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    found[1, 1, 0], found[2, 2, 1], found[3, 0, 0], found[4, 2, 0] = 6, 5, 3, 10
    judge = lambda facts: lambda images: (  # reads these facts, whatever it sees
        F.one_hot(facts[..., 0], 11).float(), F.one_hot(facts[..., 1].clamp(max=7), 8).float())
    shares = scene_accuracy.accuracy(judge(found), images, facts)
    assert shares.T.tolist() == [[1, 0.5, 1, 1, 0.5], [1, 1, 0.5, 1, 1], [1, 1, 1, 0, 0],
                                 [1, 0, 0, 0, 0]]  # digit, colour, relation, all
    pairs = torch.tensor([[7, 0], [2, 1], [7, 1], [3, 1], [3, 5]])
    for kind, seen, want in (
            ("a whole caption", facts, [1, 1, 0, 0, 0]), ("a colour", facts, [1, 1, 1, 1, 0]),
            ("unfinished", facts, [0] * 5), ("unfinished", facts.roll(2, 1), [1, 0, 0, 0, 0])):
        assert better_prompts.follows(judge(seen), kind, images, pairs).int().tolist() == want
    assert better_prompts.prompts_of("a colour", [(7, 0), (1, 6)]) == ["a red", "an orange"]


def test_attention_maps(folder):
    """Without queries and keys every place sees itself and all before equally."""
    args, model = load(folder, dalle_mini)
    blocks = model.transformer.blocks
    blocks.append(blocks[0])
    torch.nn.init.zeros_(blocks[0].qkv.weight)
    _, maps = attention_maps.stream_maps(dalle_mini, args, model, "a red seven")
    assert torch.allclose(maps, (1 / (8 + torch.arange(64) + 1)).expand(8, -1))


def test_bias_is_what_sampling_shows():
    """By hand for S = I; and for 400 pairs of samples, the second one of classes in fixed numbers,
    the mean distance less the true one and less terms of first order, whose mean is no bias."""
    D, n1, n2, draws = 6, 400, 240, []
    g, eye = torch.Generator().manual_seed(0), torch.eye(D).double()
    assert fid_bias.frechet_bias(eye, eye, n1, n1) == pytest.approx(12 / n1 + 21 / (n1 - 1))
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    Q, s1 = torch.linalg.qr(normal(D, D))[0], 1 / torch.arange(1, D + 1).double()
    s2, t = 4 * s1.flip(0), 2 * (s1.flip(0) / s1).sqrt()
    S1, S2, T, inverse = (Q * s @ Q.T for s in (s1, s2, t, 1 / t))
    half = (Q * (0.9 * D * s2).sqrt()).T  # with -half twelve classes: 0.9 S2 lies between them
    centres = torch.cat([half, -half]).repeat(n2 // 12, 1)
    for _ in range(400):
        X = normal(n1, D) @ (Q * s1.sqrt()).T
        Y = centres + normal(n2, D) @ (Q * (0.1 * s2).sqrt()).T
        found = *fid.gaussian(X), *fid.gaussian(Y)
        first = (eye - T) @ (found[1] - S1) + (eye - inverse) @ (found[3] - S2)  # T S1 T = S2
        draws.append(fid.frechet_distance(*found) - first.trace().item())
    bias = np.mean(draws) - fid.frechet_distance(eye[0], S1, eye[0], S2)
    assert bias == pytest.approx(fid_bias.frechet_bias(S1, S2, n1, n2, 0.9 * S2), rel=0.05)


def test_human_evaluation(tmp_path):
    """A trial shows A (black) and B (white) on the sides that the key alone tells; two come again,
    swapped. One rater prefers A but in three pairs and two ties; another turns a tie."""
    for name, value in (("a", 0), ("b", 255)):
        images = np.full((30, 4, 4, 1), value, np.uint8)
        np.savez(tmp_path / f"{name}.npz", images, labels=np.arange(30) % 3)
    call(human_eval, "a.npz", "b.npz", "--num", 20, cwd=tmp_path)
    page = (tmp_path / "out/human_eval/vote.html").read_text()
    key = json.loads((tmp_path / "out/human_eval/key.json").read_text())
    study = json.loads(re.search(r"const study = (.*), key = ", page)[1])
    trials, black = key["trials"], human_eval.png_of(torch.zeros(1, 4, 4, dtype=torch.uint8))
    assert len(study["trials"]) == len(trials) == 22 and "a.npz" not in page
    for (left, right, caption), (pair, a_left, _) in zip(study["trials"], trials):
        assert (study["images"][left] == black) == a_left == (study["images"][right] != black)
        assert caption == f"class {pair % 3}"
    sides, again = ({pair: a_left for pair, a_left, repeat in trials if repeat == which}
                    for which in (False, True))
    assert len(sides) == 20 and 4 < sum(sides.values()) < 16 and len(again) == 2
    assert all(sides[pair] != a_left for pair, a_left in again.items())
    votes = ["left" if a_left == (i > 2) else "right" for i, (_, a_left, _) in enumerate(trials)]
    other = dict(id=key["id"], votes=["left" if a_left else "right" for _, a_left, _ in trials[:4]])
    one = dict(id=key["id"], votes=[*votes[:3], "tie", "tie", *votes[5:]])
    changed = len(again.keys() & {pair for pair, _, _ in trials[:5]})
    assert human_eval.tally(key, [one]) == ((15, 2, 3), (2 - changed, 2))
    assert human_eval.tally(key, [one, other])[0] == (16, 4, 0)


def test_bound_of_codes(folder):
    """The logistic's 256 levels sum to 1, without a floor; the bound of 600 images in two batches,
    from the logits and from log p(x | codes); the head alone gets a gradient."""
    x = torch.linspace(-1, 1, 256)[:, None]
    centre, log_scale = torch.tensor([[-1.2, -0.3, 0.999, 4.0], [-7.0, -3.0, -5.0, 0.5]])
    assert codebooks.log_bin(x, centre, log_scale).exp().sum(0).sub(1).abs().max() < 1e-4
    far = codebooks.log_bin(x[0], 1.0, torch.tensor(-7.0)).item()
    assert far == pytest.approx((-2 + 1 / 255) * math.exp(7), rel=1e-5)
    _, model = load(folder, vqvae)
    torch.nn.init.normal_(model.prior.head.weight, std=0.3)
    images, y = torch.randint(256, (600, 1, 28, 28), dtype=torch.uint8), torch.arange(600) % 10
    head = torch.nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1)
    found = codebooks.bound(model, head, images, y)
    x, codes = vqvae.to_float(images), vqvae.codes_of(model.autoencoder, images)
    with torch.no_grad():
        prior = model.prior(codes.flatten(1), y).log_softmax(-1)
        q = model.autoencoder.codebook.vectors[codes].permute(0, 3, 1, 2)
        shift, log_scale = head(model.autoencoder.decoder[:-1](q)).chunk(2, 1)
        image = codebooks.log_bin(x, model.autoencoder.decoder(q) + shift, log_scale - 3)
    nats = prior.gather(2, codes.flatten(1)[..., None]).sum(), image.sum()
    want = [-part.item() / images.numel() / math.log(2) for part in nats]
    assert found == pytest.approx(want, rel=1e-4)
    codebooks.image_bits(head, model.autoencoder, x, codes).backward()
    assert head.weight.grad.isfinite().all() and all(p.grad is None for p in model.parameters())
