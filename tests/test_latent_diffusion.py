"""latent_diffusion.py: the U-Net is Stable Diffusion 1's, Flux starts as the identity and sees
differences of places, and samplers meet closed forms."""

import math
from types import SimpleNamespace

import diffusers
import pytest
import torch

import latent_diffusion as ld

SMALL = ("--size unet --device cpu --scenes 40 --ae-width 16 --ae-steps 4 --text-width 32 "
         "--text-layers 1 --channels 16 16 --heads 2 --width 32 --flux-heads 2 --double 1 "
         "--single 1 --steps 4 --batch-size 8 --every 2 --sample-steps 2 --num 2").split()


def small(*flags):
    """Flags and networks; no weight of the denoiser is zero, or nothing would be tested."""
    args = ld.parse_args([*SMALL, *map(str, flags)])
    torch.manual_seed(0)
    model = ld.build(args).eval()
    for p in model.denoiser.backbone.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return args, model


@torch.no_grad()
def test_autoencoder():
    """KL against 20,000 draws; decode undoes encode; a latent sees 10 x 10 pixels."""
    torch.manual_seed(0)
    net, x = ld.KLAutoencoder(3, 4, 16), torch.randn(1, 3, 32, 32)
    mean, log_var = net.encoder(x).chunk(2, dim=1)
    q, p = (torch.distributions.Normal(*v) for v in ((mean, (log_var / 2).exp()), (0, 1)))
    z, noise = q.sample((20_000,)), torch.randn(mean.shape)
    noisy, kl = net(x, noise)
    assert kl.item() == pytest.approx((q.log_prob(z) - p.log_prob(z)).mean().item(), rel=0.02)
    assert torch.allclose(noisy, net.decoder(mean + q.stddev * noise), atol=1e-6)
    net.shift.fill_(0.7)
    net.scale.fill_(3.0)
    assert torch.allclose(net.encode(x), (mean - 0.7) / 3, atol=1e-6)
    assert torch.allclose(net.decode(net.encode(x)), net.decoder(mean), atol=1e-5)
    with torch.enable_grad():
        net.encode(x.requires_grad_())[0, :, 4, 4].sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen[13:23, 13:23].all() and seen.sum() == 100


def test_schedule_and_training_times():
    """abar_1000 = 4.66010e-3 by an independent computation; diffusers'. Times of a diffusion are
    1/T..1, equally often; of a flow sigmoids of normals: Phi(log(0.2 / 0.8)) are below 0.2."""
    assert len(ld.ABAR) == 1001 and ld.ABAR[1000].item() == pytest.approx(4.66010e-3, rel=1e-6)
    theirs = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear").alphas_cumprod
    a, s = (v.flatten() for v in ld.alpha_sigma(torch.arange(1001) / 1000, "v"))
    assert torch.allclose(a[1:] ** 2, theirs, rtol=1e-4) and a[0] == 1
    assert torch.allclose(a**2 + s**2, torch.ones(1001))
    u = (torch.arange(100_000) + 0.5) / 100_000
    t = (ld.training_times(u, "v") * 1000).round().long()
    assert t.bincount().tolist() == [0] + [100] * 1000
    below = (ld.training_times(u, "flow") < 0.2).float().mean().item()
    assert below == pytest.approx((1 + math.erf(math.log(0.2 / 0.8) / math.sqrt(2))) / 2, abs=1e-4)


def draw(z, objective, steps, z0_of):
    """sample, with a network that knows z_0 = z0_of(z_t, a, s); and the (t, z_t) that it saw."""
    seen = []

    def denoise(zt, t, context):
        a, s = (v.double() for v in ld.alpha_sigma(t, objective))
        z0 = z0_of(zt, a, s).expand_as(zt)
        seen.append((t[:1], zt[:len(z)]))
        return ld.target_for(z0, (zt - a * z0) / s, a, s, objective)

    denoiser = SimpleNamespace(encoder=lambda text: torch.zeros(len(text), 8, 1), denoise=denoise)
    args = SimpleNamespace(objective=objective, sample_steps=steps, guidance=3.0)
    return ld.sample(denoiser, z, ld.to_tokens(["a"] * len(z)), args), seen


@pytest.mark.parametrize("objective", ld.CHOICES["objective"])
def test_loss_and_sampler(objective):
    """If z_0 is known, every state is a z_0 + s eps with one eps. With that of Bayes for N(1, var),
    samples have goldens' variances (flow), or mean and variance but for the start's a_T (DDIM)."""
    want, z = torch.randn(2, 3, 4, 2, 2, dtype=torch.double)
    t = torch.tensor([0.01, 0.5, 0.99])
    a, s = ld.alpha_sigma(t, objective)
    target = ld.target_for(want, z, a, s, objective)
    exact = lambda zt, times, _: target + 0.5 + (zt - a * want - s * z) + (times - t).sum()
    assert ld.denoising_loss(exact, want, "text", t, z, objective).item() == pytest.approx(0.25)
    assert objective != "flow" or torch.allclose(target, z - want)  # d z_t / dt
    end, seen = draw(z, objective, 30, lambda zt, a, s: want.repeat(len(zt) // 3, 1, 1, 1))
    a, s = ld.alpha_sigma(torch.ones(1), objective)
    eps = (z - a * want) / s
    assert torch.allclose(end, want, atol=1e-5) and len(seen) == 30
    for t, zt in seen:
        a, s = ld.alpha_sigma(t, objective)
        assert (1000 * t - (1000 * t).round()).abs() < 1e-4
        assert torch.allclose(zt, a * want + s * eps, atol=1e-4)
    cases = [(10, 1, 0.773), (10, 0.25, 0.186), (10, 0.04, 0.0238), (100, 1, 0.975),
             (100, 0.25, 0.2427), (100, 0.04, 0.0380)]
    ends = torch.tensor([0.0, 1.0], dtype=torch.double).view(2, 1, 1, 1)  # every step is affine
    for steps, var, golden in cases if objective == "flow" else [(1000, 0.25, 0.25)]:
        bayes = lambda zt, a, s: 1 + var * a / (a * a * var + s * s) * (zt - a)
        low, high = draw(ends, objective, steps, bayes)[0].flatten().tolist()
        assert (high - low) ** 2 == pytest.approx(golden, rel=5e-3 if steps < 1000 else 0.02)
    abar = ld.ABAR[-1].item()
    off = math.sqrt(abar) * 0.5 / math.sqrt(abar * 0.25 + 1 - abar)
    assert objective == "flow" or low == pytest.approx(1 - off, abs=2e-3)


@pytest.mark.parametrize("backbone", ld.CHOICES["backbone"])
@torch.no_grad()
def test_guidance_and_inputs(backbone):
    """At 1 the output is that with the text, at 0 that without, beyond it is linear, not clipped.
    Time and every token, pads too, change it; row and column are two channels of the input."""
    args, model = small("--channels", 32, 32, "--backbone", backbone, "--objective", "x0")
    net, z, t = model.denoiser, 5 * torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    tokens, none = ld.to_tokens(["a red one", "an"]), net.encoder(ld.to_tokens([""]))
    text, z0 = net.encoder(tokens), {}
    for args.guidance in (0, 1, 3):
        z0[args.guidance], _ = ld.estimate(net, z, 0.5, text, none, args)
    assert torch.allclose(z0[1], net.denoise(z, t, text), atol=1e-4)
    assert torch.allclose(z0[0], net.denoise(z, t, none.expand(2, -1, -1)), atol=1e-4)
    assert torch.allclose(z0[3], z0[0] + 3 * (z0[1] - z0[0]), atol=1e-3)
    assert z0[3].abs().max() > 1 and (z0[1] - z0[0]).abs().max() > 1e-2
    others = [torch.where(torch.arange(8) == i, (tokens + 1) % 20, tokens) for i in range(8)]
    for out in [net(z, t + 0.02, tokens)] + [net(z, t, other) for other in others]:
        assert (out - z0[1]).abs().amax((1, 2, 3)).min() > 1e-5
    net.backbone.forward = lambda x, t, context: torch.cat([x, t[0].expand(2, 1, 8, 8)], dim=1)
    x = net(z, t, tokens)
    assert torch.equal(x[:, :4], z) and (x[:, 6] == 500).all()
    assert x[0, 4:6, [0, 0, 7, 7], [0, 7, 0, 7]].tolist() == [[-1, -1, 1, 1], [-1, 1, -1, 1]]


def layers_as_they_run(net, *inputs):
    """Its layers with weights, by shape, and of one shape in the order in which they run."""
    ran = []
    for layer in net.eval().modules():
        if "weight" in layer._parameters:
            layer.register_forward_hook(lambda layer, *_: ran.append(layer))
    net(*inputs)
    return sorted(ran, key=lambda layer: layer.weight.shape)


@pytest.mark.parametrize("channels, layers", [([32, 64], 1), ([32, 64, 96], 2), ([64], 1)])
@torch.no_grad()
def test_unet_is_diffusers(channels, layers):
    """The same output as UNet2DConditionModel with the same weights: every one has its place."""
    ours, last = ld.StableDiffusionUNet(4, 4, channels, layers, 4, 24, 32), len(channels) - 1
    theirs = diffusers.UNet2DConditionModel(
        8, 4, 4, block_out_channels=channels, layers_per_block=layers, cross_attention_dim=24,
        attention_head_dim=4, up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * last,
        down_block_types=["CrossAttnDownBlock2D"] * last + ["DownBlock2D"])
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24)
    for a, b in zip(*(layers_as_they_run(net, *inputs) for net in (ours, theirs)), strict=True):
        b.load_state_dict(a.state_dict())
    assert torch.allclose(ours(*inputs), theirs(*inputs).sample, atol=1e-4)


def test_published_numbers_of_parameters(capsys):
    """Stable Diffusion 1 has 859,520,964. FLUX.1-schnell has 11,891,178,560; ours lacks its pooled
    text encoder's MLP (11,802,624), but has a layer from the mean of the context (12,585,984)."""
    flux = "--backbone flux --coordinates 0 --latent-dim 16 --text-width 4096"
    for flags, count in (("", 859_520_964), (flux, 11_891_178_560 - 11_802_624 + 12_585_984)):
        ld.main(["--describe", "--size", "paper", *flags.split()])
        said = capsys.readouterr().out
        assert said.endswith(f"\n{count:,} parameters\n") and "Linear(in_features=" in said


@torch.no_grad()
def test_flux(monkeypatch):
    """adaLN-Zero: at first no block changes its input. Queries and keys have length 1 per channel;
    attention, in training too, sees differences of places; patches return to theirs."""
    torch.manual_seed(0)
    text, image, vector = (torch.randn(2, n, 32) for n in (5, 6, 1))
    place, block, single = torch.rand(11, 2), ld.DoubleBlock(32, 2), ld.SingleBlock(32, 2)
    assert all(map(torch.equal, block(text, image, vector, place), (text, image)))
    assert torch.equal(single(image, vector, place[5:]), image)
    q, k, v = single.qkv(1000 * image)
    assert torch.allclose(torch.cat([q, k]).square().mean(3), torch.ones(4, 2, 6), atol=1e-3)
    fused = ld.attend(q, k, v)
    assert torch.allclose(ld.attend(q.requires_grad_(), k, v), fused, rtol=1e-4)
    q, k = torch.randn(2, 1, 1, 1, 24)
    turn = lambda x, *at: ld.rotary(x, torch.tensor([at]).float()).flatten()
    dot, same, *others = ((turn(q, *a) @ turn(k, *b)).item() for a, b in (
        ((2, 5), (3, 1)), ((7, 6), (8, 2)), ((2, 5), (4, 1)), ((2, 5), (3, 2))))
    assert abs(dot - same) < 1e-5 and min(abs(dot - other) for other in others) > 1e-3
    net, x = ld.FluxTransformer(4, 4, 2, 128, 0, 0, 2, 16), torch.randn(2, 4, 4, 6)
    net.image_in.weight.zero_()[:16] = torch.eye(16)
    net.image_in.bias.zero_()
    net.image_out.weight[:, :16] = torch.eye(16)
    monkeypatch.setattr(ld, "modulate", lambda x, *_: x)
    assert torch.allclose(net(x, torch.rand(2), torch.randn(2, 5, 16)), x, atol=1e-6)


def test_what_the_denoiser_is_trained_on(monkeypatch, tmp_path):
    """Latents of mean 0 and standard deviation 1, one text in ten empty, times spread evenly; the
    held-out loss does not depend on chance."""
    args, model = small("--steps", 1, "--batch-size", 10_000, "--sample-steps", 1)
    args.out, batches = tmp_path, []
    with monkeypatch.context() as patch:
        patch.setattr(ld, "denoising_loss", lambda denoiser, *batch: (
            batches.append(batch), next(denoiser.parameters()).sum())[1])
        ld.train_denoiser(args, model, None)
    z0, text, t, eps, _ = batches[0]
    assert z0.mean().abs() < 0.03 and abs(z0.std() - 1) < 0.03 and abs(eps.std() - 1) < 0.01
    empty = (text == ld.to_tokens([""])).all(1).float().mean().item()
    assert empty == pytest.approx(0.1, abs=0.015) and len(text.unique(dim=0)) > 20
    assert (1000 * t).round().long().bincount()[1:].tolist() == [10] * 1000
    images, texts, _ = ld.load_scenes(6, "test", "held-out", args)
    assert len({ld.held_out_loss(args, model, images, texts) for _ in range(2)}) == 1


def test_picture_of_latents(monkeypatch, tmp_path):
    """latents.png: images, the channels of their latents in grey, and the reconstructions."""
    args, model = small()
    args.out, pictures, grid = tmp_path, [], ld.grid
    monkeypatch.setattr(ld, "grid", lambda x, cols: pictures.append(x) or grid(x, cols))
    ld.draw_latents(args, model)
    x, *channels, back = pictures[0].view(8, 6, 3, 32, 32).unbind(1)
    z = ld.latents_of(model.autoencoder, x).clamp(-3, 3)
    for i, grey in enumerate(channels):
        assert (grey[:, :, 1::4, 2::4] - (z[:, None, i] / 3 + 1) * 127.5).abs().max() <= 0.51
    same = ld.to_uint8(model.autoencoder(ld.to_float(x))[0].detach())
    assert torch.equal(back, same)
