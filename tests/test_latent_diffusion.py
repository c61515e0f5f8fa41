"""latent_diffusion.py: the U-Net is Stable Diffusion 1's to the last weight, the transformer begins as
the identity and knows places by their difference, samplers meet closed forms, and what an image keeps
it keeps."""

import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import latent_diffusion as ld
from inprocess import call

OBJECTIVES = ["eps", "x0", "v", "flow"]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def small(**flags):
    """Arguments and a random LatentDiffusion: images of 16 x 24, latents of 4 x 6."""
    argv = ("--device cpu --width 16 --codebook-size 6 --channels 32 32 --heads 2 --text-width 32 "
            "--text-layers 1 --text-length 5 --merges 9 --dit-width 32 --dit-double 1 --dit-single 1 "
            "--side-width 32 --sample-steps 3 --num 2").split()
    args = ld.parse_args(argv)
    args.shape, args.learned, args.bf16, args.data = [3, 16, 24], [[32, 97], [256, 98]], False, "x"
    for key, value in flags.items():
        setattr(args, key, value)
    torch.manual_seed(0)
    model = ld.LatentDiffusion(args).eval()
    for p in model.ema.backbone.parameters():  # nothing is zero, or nothing would be tested
        torch.nn.init.normal_(p, std=0.2)
    return args, model


# ---- The first stage -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_latents_have_unit_scale_and_come_back(kind):
    """(z - shift)/scale has mean 0 and standard deviation 1; decode undoes it in the other order;
    shift and scale are in the state that is saved."""
    args, model = small(autoencoder=kind)
    images = torch.randint(256, (40, 3, 16, 24), dtype=torch.uint8)
    z = ld.scaled_latents(model, images)
    assert z.shape == (40, 4, 4, 6)
    assert abs(float(z.mean())) < 1e-4 and float(z.std()) == pytest.approx(1, abs=1e-4)
    assert torch.allclose(ld.latents_of(model, images), z, atol=1e-5)
    net = model.autoencoder
    x = ld.to_float(images)
    with torch.no_grad():
        assert torch.allclose(net.decode(z), net(x)[0], atol=1e-4)  # eval: no noise
    assert {"autoencoder.shift", "autoencoder.scale"} <= set(model.state_dict())


def test_kl_by_sampling():
    """The closed form against E[log q - log p] over 200,000 draws."""
    args, model = small()
    net, x = model.autoencoder, torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        mean, log_var = net.moments(x)
        found = float(net(x)[1])
        q = torch.distributions.Normal(mean, (log_var / 2).exp())
        z = q.sample((20_000,))
        p = torch.distributions.Normal(0.0, 1.0)
        assert found == pytest.approx(float((q.log_prob(z) - p.log_prob(z)).mean()), rel=0.02)


def test_codebook_belongs_to_the_decoder():
    """vq: latents are what stands before the codebook (Rombach et al. 2022); nearby latents give the
    same image, and z gets its gradient."""
    args, model = small(autoencoder="vq")
    net = model.autoencoder
    z = net.codebook.vectors[torch.tensor([[1, 2, 3], [4, 5, 0]])].permute(2, 0, 1)[None].detach()
    with torch.no_grad():
        assert torch.allclose(net.to_image(z)[0], net.to_image(z + 1e-4)[0])
    z.requires_grad_()
    net.to_image(z)[0].sum().backward()
    assert z.grad.abs().sum() > 0


# ---- Levels, answers, samplers -------------------------------------------------------------------


def test_schedule_is_stable_diffusions():
    """abar_1 = 0.99915, abar_1000 = 4.66010e-3 (double-checked elsewhere in float64); abar_0 = 1."""
    a, s = ld.levels("cpu")
    assert len(a) == 1001 and a[0] == 1 and s[0] == 0
    assert float(a[1] ** 2) == pytest.approx(0.99915, abs=1e-6)
    assert float(a[1000] ** 2) == pytest.approx(4.66010e-3, rel=1e-5)
    assert torch.allclose(a**2 + s**2, torch.ones(1001), atol=1e-6)


@each_objective
def test_answers_can_be_undone(objective):
    """z_0 and eps come back from the answer and z_t, at early, middle and late times."""
    z0, eps = torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.randn(3, 4, 2, 2).double()
    t = torch.tensor([0.001, 0.5, 1.0]) if objective != "flow" else torch.tensor([0.01, 0.5, 0.99])
    a, s = (v.double().view(-1, 1, 1, 1) for v in ld.level(t, objective))
    zt = a * z0 + s * eps
    found = ld.ends_of(ld.answer_of(z0, eps, a, s, objective), zt, a, s, objective)
    for one, two in zip(found, (z0, eps)):
        assert torch.allclose(one, two, atol=1e-3)


def test_training_times():
    """Diffusion: every one of 1..1000 over 1000; flow: sigmoid of a normal, so half below 0.5, and
    the share below 0.2 is Phi(log(0.2/0.8))."""
    torch.manual_seed(0)
    t = ld.draw_times(100_000, "v", "cpu") * 1000
    assert torch.equal(t.round().long().unique(), torch.arange(1, 1001))
    t = ld.draw_times(100_000, "flow", "cpu")
    phi = 0.5 * (1 + math.erf(math.log(0.2 / 0.8) / math.sqrt(2)))
    assert float((t < 0.5).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert float((t < 0.2).float().mean()) == pytest.approx(phi, abs=0.005)


def exact(mean, var, objective):
    """The ideal network for data N(mean, var), by Bayes, at z_t = a z_0 + s eps."""
    def guess(z, t):
        a, s = (float(v) for v in ld.level(torch.tensor([t]), objective))
        z0 = mean + var * a / (a * a * var + s * s) * (z - a * mean)
        return z0, (z - a * z0) / max(s, 1e-12)
    return guess


def final(objective, steps, heun, var, mean=0.0):
    """Mean and variance at the end: all steps are affine, so two starting points tell."""
    times = [i / steps for i in range(steps, -1, -1)]
    z = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    end = ld.integrate(exact(mean, var, objective), z, times, objective, heun).flatten()
    return float(end[0]), float((end[1] - end[0]) ** 2)


@pytest.mark.parametrize("steps, heun, golden", [
    (10, False, (0.773, 0.186, 0.0238)), (100, False, (0.975, 0.2427, 0.0380)),
    (10, True, (0.9987, 0.2517, 0.0418)), (50, True, (0.99999, 0.25009, 0.04009))])
def test_flow_against_goldens(steps, heun, golden):
    """Final variances for data N(0, s^2) from N(0, 1), computed independently."""
    for var, want in zip((1, 0.25, 0.04), golden):
        assert final("flow", steps, heun, var)[1] == pytest.approx(want, rel=5e-3)


def test_ddim_keeps_mean_and_variance():
    """Data N(1, 0.25), 1,000 steps, from N(0, 1): the variance within 2 %. This schedule does not end
    in pure noise, so the start is off by a_T, and a deterministic sampler keeps that: the mean is
    1 - a_T 0.5/sqrt(a_T^2 0.25 + s_T^2)."""
    mean, var = final("v", 1000, False, 0.25, 1.0)
    a, s = (float(v[-1]) for v in ld.levels("cpu"))
    assert mean == pytest.approx(1 - a * 0.5 / math.sqrt(a * a * 0.25 + s * s), abs=2e-3)
    assert var == pytest.approx(0.25, rel=0.02)


@each_objective
def test_all_objectives_take_the_same_steps(objective):
    """If the network's answer stands for the same z_0, whatever it answers, the path is the same as by
    diffusers' rule z_s = a_s z_0 + s_s eps."""
    target = torch.randn(1, 4, 2, 2)

    def net(z, t, context):
        a, s = (v.view(-1, 1, 1, 1) for v in ld.level(t, objective))
        return ld.answer_of(target, (z - a * target) / s, a, s, objective)

    context = torch.zeros(1, 5, 8)
    guess = ld.make_guess(net, context, context, objective, 1)
    z, seen = torch.randn(1, 4, 2, 2), []
    times = [1.0 if objective != "flow" else 0.99, 0.7, 0.3, 0.0]
    end = ld.integrate(guess, z, times, objective, keep=lambda t, z0: seen.append(z0))
    assert torch.allclose(end, target, atol=1e-4) and len(seen) == 3
    assert all(torch.allclose(z0, target, atol=1e-2) for z0 in seen)


@pytest.mark.parametrize("backbone", ["unet", "dit"])
def test_guidance(backbone):
    """1 is the network with the text, 0 without, and in between and beyond it is linear; the latents
    are not cut off."""
    args, model = small(backbone=backbone)
    net, text = model.ema, model.tokens(["ab", "a"])
    z, t = 5 * torch.randn(2, 4, 4, 6), torch.full((2,), 0.5)
    with torch.no_grad():
        context, none = net.text(text), net.text(model.tokens([""]))
        ends = {w: ld.make_guess(net, context, none, "x0", w)(z, 0.5)[0] for w in (0, 1, 3)}
        assert torch.equal(ends[1], net(z, t, context))
        assert torch.equal(ends[0], net(z, t, none.expand(2, -1, -1)))
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)
    assert torch.allclose(ends[3], ends[0] + 3 * (ends[1] - ends[0]), atol=1e-4)
    assert ends[3].abs().max() > 1


@each_objective
def test_loss_is_zero_for_the_right_answer(objective):
    z0, eps = torch.randn(2, 2, 4, 4, 6)
    t = torch.tensor([0.3, 0.8])

    class Right(torch.nn.Module):
        text = staticmethod(lambda text: text)

        def forward(self, z, tt, context):
            a, s = (v.view(-1, 1, 1, 1) for v in ld.level(t, objective))
            assert torch.allclose(z, a * z0 + s * eps) and torch.equal(tt, t)
            return ld.answer_of(z0, eps, a, s, objective) + 0.5

    found = ld.denoising_loss(Right(), z0, None, t, eps, objective)
    assert torch.allclose(found, torch.full((2,), 0.25))


# ---- The U-Net -----------------------------------------------------------------------------------


def test_stable_diffusion_1_has_859520964_parameters(capsys):
    """And the slide's modules, in the slide's order; nothing is allocated."""
    ld.main(["--describe", "--size", "paper", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "859,520,964 parameters" in text
    names = re.findall(r"^  \((\w+)\)", text, re.M)
    assert names == ["conv_in", "time_proj", "time_embedding", "down_blocks", "up_blocks",
                     "mid_block", "conv_norm_out", "conv_act", "conv_out"]
    blocks = re.findall(r"\(\d\): (\w+2D)\(", text)
    want = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D", "UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert [b for b in blocks if "Block2D" in b and b != "ResnetBlock2D"] == want
    assert "Conv2d(4, 320, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))" in text
    assert "(linear_1): Linear(in_features=320, out_features=1280, bias=True)" in text


def test_flux_parameters(capsys):
    """19 double and 38 single blocks of width 3072: about Flux.1's 12e9."""
    ld.main(["--describe", "--size", "paper", "--backbone", "dit", "--heads", "24", "--device", "cpu",
             "--channels", "96"])
    count = int(capsys.readouterr().out.split()[-2].replace(",", ""))
    assert 11.5e9 < count < 12.3e9


@pytest.mark.parametrize("channels, layers", [([32, 64], 1), ([32, 64, 96], 2), ([64], 1)])
def test_unet_is_diffusers(channels, layers):
    """Same keys, and with the same weights the same output as UNet2DConditionModel."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    ours, n = ld.UNet2DConditionModel(4, 4, channels, layers, 4, 24), len(channels)
    down = ["CrossAttnDownBlock2D"] * (n - 1) + ["DownBlock2D" if n > 1 else "CrossAttnDownBlock2D"]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=channels,
        layers_per_block=layers, cross_attention_dim=24, attention_head_dim=4, down_block_types=down,
        up_block_types=up)
    theirs.load_state_dict(ours.state_dict())
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24)
    with torch.no_grad():
        assert torch.allclose(ours(x, t, context), theirs(x, t, context).sample, atol=1e-4)


def test_groups_of_one_channel_would_forget_the_time():
    """Why small networks have fewer groups than 32: a norm over one channel takes away what the time
    has added to it."""
    torch.manual_seed(0)
    x, context, moved = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 24), []
    for groups in (32, 8):
        net = ld.UNet2DConditionModel(4, 4, [32, 32], 1, 4, 24, groups)
        with torch.no_grad():
            one, two = (net(x, torch.tensor([t]), context) for t in (100.0, 900.0))
        moved.append(float((one - two).abs().max()))
    assert moved[0] < 1e-5 and moved[1] > 1e-3


def test_time_basis_of_the_slide():
    """320 numbers: 160 cosines, then 160 sines, wavelengths from 2 pi to 2 pi 10^(4 159/160)."""
    out = ld.Timesteps(320)(torch.tensor([0.0, 250.0]))
    assert torch.equal(out[0], torch.cat([torch.ones(160), torch.zeros(160)]))
    k = 37
    assert float(out[1, k]) == pytest.approx(math.cos(250 * 10_000 ** (-k / 160)), abs=1e-4)
    assert float(out[1, 160 + k]) == pytest.approx(math.sin(250 * 10_000 ** (-k / 160)), abs=1e-4)


@pytest.mark.parametrize("backbone", ["unet", "dit"])
def test_network_depends_on_all_it_is_told(backbone):
    """Each latent, the time and each token, pads too, move the output."""
    args, model = small(backbone=backbone)
    net, text = model.ema, model.tokens(["ab a"])
    z, t = torch.randn(1, 4, 4, 6), torch.tensor([0.5])
    with torch.no_grad():
        one = net(z, t, net.text(text))
        assert not torch.allclose(one, net(z, t + 0.02, net.text(text)), atol=1e-5)
        for i in range(5):
            other = text.clone()
            other[0, i] = (other[0, i] + 1) % 200
            assert not torch.allclose(one, net(z, t, net.text(other)), atol=1e-6), i
        for i, j in ((0, 0), (3, 5)):
            moved = z.clone()
            moved[0, :, i, j] += 1
            assert not torch.allclose(one, net(moved, t, net.text(text)), atol=1e-5)


# ---- The transformer -----------------------------------------------------------------------------


def test_transformer_begins_as_the_identity():
    """adaLN-Zero: no block changes its input at the start, and the answer is 0."""
    torch.manual_seed(0)
    net = ld.FluxTransformer(4, 32, 2, 2, 2, 16, 1)
    text, image, vector = torch.randn(2, 5, 32), torch.randn(2, 6, 32), torch.randn(2, 32)
    place = torch.randn(11, 2)
    a, b = net.double_blocks[0](text, image, vector, place)
    assert torch.equal(a, text) and torch.equal(b, image)
    assert torch.equal(net.single_blocks[0](image, vector, place[5:]), image)
    assert not net(torch.randn(2, 4, 4, 6), torch.rand(2), torch.randn(2, 5, 16)).any()


def test_rotary_knows_differences_of_places():
    """q(p) k(p') depends on p - p' alone, in rows and in columns, and does depend on it."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    at = lambda r, c: torch.tensor([[float(r), float(c)]])
    dot = lambda a, b: float((ld.rotary(q, at(*a)) * ld.rotary(k, at(*b))).sum())
    assert dot((2, 5), (3, 1)) == pytest.approx(dot((7, 6), (8, 2)), abs=1e-5)
    assert abs(dot((2, 5), (3, 1)) - dot((2, 5), (4, 1))) > 1e-3
    assert abs(dot((2, 5), (3, 1)) - dot((2, 5), (3, 2))) > 1e-3
    assert float(ld.rotary(q, at(3, 4)).norm()) == pytest.approx(float(q.norm()), rel=1e-5)


def test_joint_attention_knows_differences_of_places():
    """Both queries and keys are turned: moving all places alike changes nothing, moving one does."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    place = torch.tensor([[0.0, 0], [1, 1], [1, 2], [2, 1], [2, 2]])
    one = ld.joint_attention(q, k, v, place)
    assert torch.allclose(one, ld.joint_attention(q, k, v, place + 3), atol=1e-4)
    place[4] += 1
    assert not torch.allclose(one, ld.joint_attention(q, k, v, place), atol=1e-3)


def test_qk_norm():
    """Queries and keys have a root mean square of 1 a head, however large the input."""
    q, k, _ = ld.Projection(32, 4)(1000 * torch.randn(2, 5, 32))
    for x in (q, k):
        assert torch.allclose(x.square().mean(-1), torch.ones(2, 4, 5), atol=1e-3)


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_come_back(patch):
    """With an identity in place of the network, the latents return to their places."""
    torch.manual_seed(0)
    net = ld.FluxTransformer(4, 4 * patch**2 * 8, 0, 0, 2, 16, patch)
    with torch.no_grad():
        width = 4 * patch**2
        net.image_in.weight.zero_()[:width] = torch.eye(width)
        net.image_in.bias.zero_()
        net.image_out.weight.zero_()[:, :width] = torch.eye(width)
        original, ld.modulate = ld.modulate, lambda x, *_: x
        try:
            x = torch.randn(2, 4, 4, 6)
            assert torch.allclose(net(x, torch.rand(2), torch.randn(2, 5, 16)), x, atol=1e-6)
        finally:
            ld.modulate = original


# ---- Text ----------------------------------------------------------------------------------------


def test_empty_text_is_the_one_trained():
    """One text in ten becomes pads only: what guidance calls "none"."""
    args, model = small(model_batch=20_000)
    stage = ld.DenoiserStage(args, model, model.tokens(["ab"]), torch.randn(1, 4, 4, 6))
    torch.manual_seed(0)
    z0, text, t, eps = stage.batch(1)
    empty = (text == model.tokens([""])).all(1)
    assert model.tokens([""])[0].tolist() == [258, 259, 260, 261, 262]
    assert float(empty.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert z0.shape == eps.shape == (20_000, 4, 4, 6) and t.shape == (20_000,)


@pytest.mark.parametrize("text, words", [
    ("red seven", ["a red seven "]), ("seven above", ["seven above"]), ("orange", ["an orange "]),
    ("seven above a blue", ["seven above a blue "]),
    ("a blue two below a red one", ["a blue two below a red one"])])
def test_short_prompts_are_filled_in(text, words):
    """What is named stays, and the result is a whole caption of the grammar."""
    thing = f"an? ({'|'.join(ld.COLOURS)}) ({'|'.join(ld.DIGITS)})"
    for seed in range(5):
        full = ld.fill_in_prompt(text, np.random.default_rng(seed))
        assert re.fullmatch(f"{thing} ({'|'.join(ld.RELATIONS)}) {thing}", full), full
        assert all(w in full for w in words) and "a orange" not in full and "an r" not in full


# ---- Verbs ---------------------------------------------------------------------------------------


def test_average_follows_the_network():
    """ema <- d ema + (1 - d) net after each step, with a short memory at first."""
    args, model = small(ema=0.9)
    stage = ld.DenoiserStage(args, model, model.tokens(["ab"]), torch.randn(1, 4, 4, 6))
    before = [p.clone() for p in model.ema.parameters()]
    stage.after(50)
    d = min(0.9, 51 / 60)
    for p, old, new in zip(model.ema.parameters(), before, model.denoiser.parameters()):
        assert torch.allclose(p, d * old + (1 - d) * new, atol=1e-5)


SMALL = ("--train --steps 4 --model-steps 4 --side-steps 2 --batch-size 8 --model-batch 8 "
         "--side-batch 8 --width 16 --codebook-size 6 --channels 32 32 --heads 2 --text-width 32 "
         "--text-layers 1 --dit-width 32 --dit-double 1 --dit-single 1 --side-width 32 --every 2 "
         "--num 2 --sample-steps 2 --device cpu").split()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A data set of 40 pairs, 16 x 24, with captions."""
    folder = tmp_path_factory.mktemp("ld")
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(40, 16, 24, 3), dtype=np.uint8)
    captions = np.array([f"thing {i % 5} of many" for i in range(40)])
    np.savez(folder / "own.npz", images=images, captions=captions)
    np.savez(folder / "odd.npz", images=images[:, :12], captions=captions)
    ld.save_png(folder / "one.png", images[:1])
    mask = np.zeros((1, 16, 24, 3), np.uint8)
    mask[:, 3:9, 5:20] = 255
    ld.save_png(folder / "mask.png", mask)
    ld.save_png(folder / "bigmask.png", mask.repeat(2, 1))
    return folder


@pytest.fixture(scope="module")
def trained(own):
    return call(ld, *SMALL, "--data", "own.npz", "--export", "small.pt", cwd=own)


def test_train_writes_what_it_promises(own, trained):
    for name in ("model.pt", "samples.png", "samples.npz", "trajectory.png", "loss.csv", "loss.png",
                 "loss_by_t.png", "latents_000002.png", "model_000002.png", "reconstruction.png",
                 "guidance.png", "attention.png"):
        assert (own / "out/latent_diffusion" / name).exists(), name
    assert "become 0 and 1" in trained


def test_exported_model_draws_the_same(own, trained, monkeypatch):
    """The averaged weights alone, in half precision: nearly the same images."""
    monkeypatch.chdir(own)
    (own / "half").mkdir(exist_ok=True)
    (own / "half/model.pt").write_bytes((own / "small.pt").read_bytes())
    assert not any(k.startswith("denoiser") for k in torch.load("small.pt", weights_only=True)["model"])
    for out in ("out/latent_diffusion", "half"):
        ld.main(["--sample", "--out", out, "--save", f"{Path(out).name}.npz", "--device", "cpu"])
    one, two = (np.load(f"{n}.npz")["arr_0"].astype(int) for n in ("latent_diffusion", "half"))
    assert abs(one - two).mean() < 3


@pytest.mark.parametrize("kind", ["--backbone dit --objective flow --sampler heun",
                                  "--backbone dit --objective eps --patch 2",
                                  "--autoencoder vq --objective x0", "--objective flow"])
def test_other_kinds_train_and_do_all_verbs(own, trained, kind):
    """Both objectives with both backbones, both autoencoders."""
    call(ld, *SMALL, "--data", "own.npz", *kind.split(), "--out", "kind", cwd=own)
    assert ("heun" in kind) == ("heun" in str(torch.load(
        own / "kind/model.pt", weights_only=True)["config"]))
    call(ld, "--out", "kind", "--sample", "--sampler", "heun", "--device", "cpu", cwd=own,
         code=0 if "flow" in kind else 2)
    text = call(ld, "--out", "kind", "--prompt", "thing 1", "--init", "one.png", "--strength", "0.5",
               "--inpaint", "one.png", "--mask", "mask.png", "--interpolate", "thing 1", "thing 2",
               "--sweep", "--attention", "--device", "cpu", cwd=own)
    for name in ("init", "inpaint", "interpolation", "guidance", "attention"):
        assert f"{name}.png" in text
    for path in (own / "kind").iterdir():
        path.unlink()


def test_inpainting_keeps_known_pixels(own, trained, monkeypatch):
    """To the bit, and draws the others."""
    monkeypatch.chdir(own)
    ld.main(["--inpaint", "one.png", "--mask", "mask.png", "--prompt", "thing 1", "--save", "i.npz",
             "--device", "cpu"])
    drawn = np.load("i.npz")["arr_0"]
    image = np.load("own.npz")["images"][0]
    known = np.ones((16, 24), bool)
    known[3:9, 5:20] = False
    assert drawn.shape == (2, 16, 24, 3) and (drawn[:, known] == image[known]).all()
    assert (drawn[:, ~known] != image[~known]).any() and (drawn[0] != drawn[1]).any()


def test_inpainting_puts_known_latents_back(own, trained, monkeypatch):
    """At each step: those with a pixel under the mask stay as they are, the others become the
    image's, at t = 0 without noise."""
    monkeypatch.chdir(own)
    changes = []
    monkeypatch.setattr(ld, "integrate", lambda guess, z, times, objective, heun, change, keep: (
        changes.append(change), z)[1])
    ld.main(["--inpaint", "one.png", "--mask", "mask.png", "--save", "i.npz", "--device", "cpu"])
    z = torch.full((2, 4, 4, 6), 7.0)
    out, noisy = changes[0](z, 0.0), changes[0](z, 0.9)
    new = torch.zeros(4, 6, dtype=torch.bool)
    new[:3, 1:5] = True  # pixels 3..8 by 5..19
    assert (out[:, :, new] == 7).all() and (noisy[:, :, new] == 7).all()
    assert not (out[:, :, ~new] == 7).any() and torch.equal(out[0], out[1])
    assert not torch.allclose(noisy[0], noisy[1])


def test_init_of_little_strength_keeps_the_image(own):
    """Image to image at strength -> 0 is the reconstruction; at 1 it forgets nearly all of it."""
    args, model = small()
    images = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8)
    z = ld.scaled_latents(model, images)
    context = ld.text_vectors(args, model, ["ab", "a"])
    a, s = ld.level(torch.tensor([0.001]), "v")
    noised = a * z + s * torch.randn_like(z)
    out = ld.new_latents(args, model, context, noised, 0.001)
    assert (out - z).square().mean() < 0.05 * z.square().mean()


@pytest.mark.parametrize("checkpoint", [1, 2, 3])
def test_resumes_to_the_bit(own, trained, checkpoint):
    """Killed right after any checkpoint, of either part or between, and resumed: the same model."""
    calls, saved = [], ld.save_history

    def killed(*a):
        calls.append(1)
        if len(calls) == checkpoint:
            raise KeyboardInterrupt
        saved(*a)

    short = [*SMALL, "--data", str(own / "own.npz"), "--out", str(own / f"b{checkpoint}")]
    ld.save_history = killed
    try:
        with pytest.raises(SystemExit):
            ld.main(short)
        ld.save_history = saved
        ld.main([*short, "--resume"])
    finally:
        ld.save_history = saved
        signal.signal(signal.SIGINT, signal.default_int_handler)
    one, two = (torch.load(own / p / "model.pt", weights_only=True)
                for p in ("out/latent_diffusion", f"b{checkpoint}"))
    assert (two["part"], two["step"]) == ("model", 4)
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])


def test_other_captions_do_not_rename_the_tokens(tmp_path, monkeypatch):
    """Resumed with other scenes, the words keep the tokens that the network has learned."""
    monkeypatch.setattr(ld, "report", lambda *_: None)
    short = [*SMALL, "--text-length", "30", "--merges", "60", "--out", "out"]
    call(ld, *short, "--scenes", 40, cwd=tmp_path)
    before = torch.load(tmp_path / "out/model.pt", weights_only=True)["config"]["learned"]
    more = ["--resume", "--scenes", 30, "--seed", 1, "--side-steps", 6]
    assert ld.BytePairs.learn(ld.load_pairs(ld.parse_args(
        [*short, *map(str, more[1:])]), "train")[1], 60) != before
    call(ld, *short, *more, cwd=tmp_path)
    assert torch.load(tmp_path / "out/model.pt", weights_only=True)["config"]["learned"] == before


def test_a_sweep_leaves_the_guidance(own, trained, tmp_path):
    """What is measured after the sweep is measured at the guidance that was asked for."""
    args, model = small(guidance=3.0, out=tmp_path, prompt=["ab"])
    ld.guidance_sweep(args, model)
    assert args.guidance == 3.0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("start, steps", [(1.0, 2000), (0.01, 25), (0.0004, 3)])
def test_small_steps_stay_finite(objective, start, steps):
    """Times so near that they are one step of the schedule: no division by zero."""
    args, model = small(objective=objective, sample_steps=steps)
    z = torch.randn(1, 4, 4, 6)
    context = ld.text_vectors(args, model, ["ab"])
    model.ema.forward = lambda z, t, context: z  # the network is not what is asked here
    assert torch.isfinite(ld.new_latents(args, model, context, z, start)).all()


def test_scenes_train_and_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ld, "report", lambda args, model, real=ld.report: real(args, model, 6))
    ld.main([*SMALL, "--scenes", "40", "--enhance", "red seven"])
    text = capsys.readouterr().out
    for row in ("real scenes, from their latents", "drawn, pairs seen", "without articles",
                "drawn, pairs never seen"):
        assert row in text
    assert text.count("red seven -> a red seven ") == 3


def refused(argv, words, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        ld.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("argv, words", [
    (["--prompt", " "], "the text is empty"),
    (["--prompt", "q" * 40], "tokens, but 16 fit"),
    (["--init", "one.png", "--strength", "0"], "expected 0 to 1, not 0"),
    (["--init", "one.png", "--strength", "1.5"], "expected 0 to 1, not 0"),
    (["--init", "bigmask.png"], "the model was trained on [3, 16, 24]"),
    (["--inpaint", "one.png", "--mask", "bigmask.png"], "--mask bigmask.png: an image of [3, 32, 24]"),
    (["--mask", "mask.png", "--sample"], "only for --inpaint"),
    (["--inpaint", "none.png"], "none.png: No such file"),
    (["--eval"], "only for our own scenes"),
    (["--enhance", "thing"], "our own captions only"),
    (["--sample", "--backbone", "dit"], "was trained with unet"),
    (["--sample", "--objective", "eps"], "was trained with v"),
    (["--sample", "--sampler", "heun"], "only for --objective flow"),
    (["--sample", "--channels", "33"], "expected even multiples of --groups 8 and --heads"),
    (["--sample", "--backbone", "dit", "--dit-width", "30"], "multiple of 4 x --heads"),
    (["--sample", "--guidance", "nan"], "finite"),
    (["--init", "one.jpg"], "--init one.jpg: expected a .png, .npz or .npy"),
    ([*SMALL, "--data", "odd.npz", "--out", "odd"], "multiples of 8"),
    (["--sample", "--out", "nowhere"], "is not there"),
])
def test_bad_input_is_one_line(own, trained, monkeypatch, capsys, argv, words):
    """Exit code 2 and one line."""
    monkeypatch.chdir(own)
    monkeypatch.setattr(ld, "HERE", own)
    refused([*argv, *([] if "--device" in argv else ["--device", "cpu"])], words, capsys)
