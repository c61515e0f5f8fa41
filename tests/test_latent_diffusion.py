"""latent_diffusion.py: the U-Net is Stable Diffusion 1's to the last weight, the transformer starts
as the identity and sees differences of places, samplers meet closed forms, and stages resume."""

import itertools
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from inprocess import call

import latent_diffusion as ld

each_objective = pytest.mark.parametrize("objective", ld.CHOICES["objective"])
each_backbone = pytest.mark.parametrize("backbone", ld.CHOICES["backbone"])
SMALL = ("--device cpu --scenes 40 --ae-width 16 --ae-steps 4 --text-width 32 --text-layers 1 "
         "--channels 32 32 --heads 2 --width 32 --flux-heads 2 --double 1 --single 1 --steps 4 "
         "--batch-size 8 --every 2 --sample-steps 3 --num 2").split()


def small(*flags):
    """Flags and networks; no weight of the denoiser is zero, or nothing would be tested."""
    args = ld.parse_args([*SMALL, *map(str, flags)])
    torch.manual_seed(0)
    model = ld.build(args).eval()
    for p in model.denoiser.backbone.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return args, model


def describe(capsys, *flags):
    ld.main(["--describe", *flags])
    return capsys.readouterr().out


# ---- The first stage -----------------------------------------------------------------------------


def test_kl_by_sampling():
    """The closed form against E[log q - log p] over 20,000 draws of 96 latents."""
    net, x = ld.KLAutoencoder(3, 4, 16), torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        mean, log_var = net.encoder(x).chunk(2, dim=1)
        kl = net(x, torch.zeros(1, 4, 4, 6))[1].item()
        q = torch.distributions.Normal(mean, (log_var / 2).exp())
        p, z = torch.distributions.Normal(0, 1), q.sample((20_000,))
        assert kl == pytest.approx((q.log_prob(z) - p.log_prob(z)).mean().item(), rel=0.02)


def test_latents_are_scaled_and_come_back():
    """decode undoes encode's shift and scale in the other order, noise is scaled by the standard
    deviation, and a latent sees 10 x 10 pixels."""
    net, x, noise = ld.KLAutoencoder(3, 4, 16), torch.randn(2, 3, 32, 32), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        mean, log_var = net.encoder(x).chunk(2, dim=1)
        plain = net.decoder(mean)
        net.shift.fill_(0.7)
        net.scale.fill_(3.0)
        assert torch.allclose(net.encode(x), (mean - 0.7) / 3, atol=1e-6)
        assert torch.allclose(net.reconstruct(x), plain, atol=1e-5)
        noisy = net.decoder(mean + (log_var / 2).exp() * noise)
        assert torch.allclose(net(x, noise)[0], noisy) and not torch.allclose(noisy, plain)
        x.requires_grad_()
    with torch.enable_grad():
        net.encode(x)[0, :, 4, 4].sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen[13:23, 13:23].all() and seen.sum() == 100


# ---- Noise and targets ---------------------------------------------------------------------------


def test_schedule_is_stable_diffusions():
    """abar_1 = 0.99915 and abar_1000 = 4.66010e-3, by an independent computation; diffusers'."""
    assert len(ld.ABAR) == 1001 and ld.ABAR[0] == 1
    assert ld.ABAR[1].item() == pytest.approx(0.99915, abs=1e-9)
    assert ld.ABAR[1000].item() == pytest.approx(4.66010e-3, rel=1e-6)
    theirs = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear").alphas_cumprod
    assert torch.allclose(ld.ABAR[1:].float(), theirs, rtol=1e-4)
    a, s = ld.alpha_sigma(torch.arange(1001) / 1000, "v")
    assert torch.equal(a.flatten(), ld.ABAR.sqrt().float())
    assert torch.allclose(a**2 + s**2, torch.ones(1001, 1, 1, 1))


@each_objective
def test_targets_can_be_solved(objective):
    """z_0 and eps come back from the target and z_t, at early, middle and late times."""
    z0, eps = torch.randn(2, 3, 4, 2, 2, dtype=torch.double)
    times = torch.tensor([0.01, 0.5, 0.99])
    a, s = (v.double() for v in ld.alpha_sigma(times, objective))
    out = ld.target_for(z0, eps, a, s, objective)
    for found, want in zip(ld.to_z0_eps(out, a * z0 + s * eps, a, s, objective), (z0, eps)):
        assert torch.allclose(found, want, atol=1e-4)


def test_velocity_is_the_derivative():
    """The flow's target is dz_t/dt, and z_t goes from z_0 to eps."""
    z0, eps, t = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), torch.tensor([0.3])
    path = lambda t: sum(x * y for x, y in zip(ld.alpha_sigma(t, "flow"), (z0, eps)))
    target = ld.target_for(z0, eps, *ld.alpha_sigma(t, "flow"), "flow")
    assert torch.allclose((path(t + 0.1) - path(t)) / 0.1, target, atol=1e-5)
    assert torch.equal(path(0 * t), z0) and torch.equal(path(0 * t + 1), eps)


def test_training_times():
    """Diffusion: each of 1/T..1 equally often. Flow: sigmoid of a normal, so the share below 0.2 is
    Phi(log(0.2 / 0.8)); the edges stay finite."""
    u = (torch.arange(100_000) + 0.5) / 100_000
    t = ld.training_times(u, "v") * 1000
    assert torch.equal(torch.bincount(t.round().long()), torch.tensor([0] + [100] * 1000))
    t = ld.training_times(u, "flow")
    phi = 0.5 * (1 + math.erf(math.log(0.2 / 0.8) / math.sqrt(2)))
    assert (t < 0.2).float().mean().item() == pytest.approx(phi, abs=1e-4)
    assert ld.training_times(torch.tensor([0.0, 1 - 2**-24]), "flow").isfinite().all()


@each_objective
def test_loss_of_the_right_output(objective):
    """Each scene has its own time; an output that is off by 0.5 costs 0.25."""
    z0, eps = torch.randn(2, 2, 4, 4, 6)
    t = torch.tensor([0.3, 0.8])

    def denoiser(z, times, text):
        a, s = ld.alpha_sigma(t, objective)
        assert torch.allclose(z, a * z0 + s * eps) and torch.equal(times, t) and text == "text"
        return ld.target_for(z0, eps, a, s, objective) + 0.5

    loss = ld.denoising_loss(denoiser, z0, "text", t, eps, objective)
    assert loss.item() == pytest.approx(0.25, rel=1e-5)


# ---- Sampling ------------------------------------------------------------------------------------


def draw(z, objective, steps, z0_of, seen=None):
    """sample, with a network that knows z_0 from z_t: z0_of(z_t, a, s)."""
    def denoise(zt, t, context):
        a, s = (v.double() for v in ld.alpha_sigma(t, objective))
        z0 = z0_of(zt, a, s).expand_as(zt)
        if seen is not None:
            seen.append((t[0].item(), zt[:len(z)]))
        return ld.target_for(z0, (zt - a * z0) / s, a, s, objective)

    denoiser = SimpleNamespace(encoder=lambda text: torch.zeros(len(text), 8, 1), denoise=denoise)
    args = SimpleNamespace(objective=objective, sample_steps=steps, guidance=3.0)
    return ld.sample(denoiser, z, ld.to_tokens(["a"] * len(z)), args)


def final(objective, steps, var, mean=0.0):
    """Mean and variance of samples if the data are N(mean, var), by Bayes: every step is affine, so
    that two starting points tell."""
    z = torch.tensor([0.0, 1.0], dtype=torch.double).view(2, 1, 1, 1)
    bayes = lambda zt, a, s: mean + var * a / (a * a * var + s * s) * (zt - a * mean)
    end = draw(z, objective, steps, bayes).flatten()
    return end[0].item(), (end[1] - end[0]).item() ** 2


@pytest.mark.parametrize("steps, golden", [(10, (0.773, 0.186, 0.0238)),
                                           (100, (0.975, 0.2427, 0.0380))])
def test_flow_against_goldens(steps, golden):
    """Variances for data N(0, s^2), computed independently."""
    for var, want in zip((1, 0.25, 0.04), golden):
        assert final("flow", steps, var)[1] == pytest.approx(want, rel=5e-3)


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_ddim_keeps_mean_and_variance(objective):
    """Data N(1, 0.25), 1,000 steps: the variance within 2 %. The schedule does not end in pure
    noise, so the start is off by a_T, and a deterministic sampler keeps that: the mean is
    1 - a_T 0.5 / sqrt(a_T^2 0.25 + s_T^2)."""
    mean, var = final(objective, 1000, 0.25, 1.0)
    abar = ld.ABAR[-1].item()
    off = math.sqrt(abar) * 0.5 / math.sqrt(abar * 0.25 + 1 - abar)
    assert mean == pytest.approx(1 - off, abs=2e-3) and var == pytest.approx(0.25, rel=0.02)


@each_objective
def test_all_objectives_take_the_same_path(objective):
    """If z_0 is known, every state is a z_0 + s eps with the same eps (DDIM without eta), whatever
    the network outputs; times are whole steps, also if T is no multiple of their number."""
    want = torch.randn(1, 4, 2, 2, dtype=torch.double)
    z, seen = torch.randn(1, 4, 2, 2, dtype=torch.double), []
    end = draw(z, objective, 30, lambda zt, a, s: want, seen)
    assert torch.allclose(end, want, atol=1e-5) and len(seen) == 30
    assert all(abs(1000 * t - round(1000 * t)) < 1e-4 for t, _ in seen)
    a, s = (v.item() for v in ld.alpha_sigma(torch.ones(1), objective))
    eps = (z - a * want) / s
    for t, zt in seen:
        a, s = (v.item() for v in ld.alpha_sigma(torch.tensor([t]), objective))
        assert torch.allclose(zt, a * want + s * eps, atol=1e-4)


@each_backbone
def test_guidance(backbone):
    """At 1 the output is that with the text, at 0 that without, and in between and beyond it is
    linear; latents are not clipped."""
    args, model = small("--backbone", backbone, "--objective", "x0")
    net, z = model.denoiser, 5 * torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        text, none = net.encoder(ld.to_tokens(["a red one", "an"])), net.encoder(ld.to_tokens([""]))
        z0 = {}
        for args.guidance in (0, 1, 3):
            z0[args.guidance], eps = ld.estimate(net, z, 0.5, text, none, args)
            a, s = ld.alpha_sigma(torch.tensor([0.5]), "x0")
            assert torch.allclose(a * z0[args.guidance] + s * eps, z, atol=1e-4)
        times = torch.full((2,), 0.5)
        assert torch.allclose(z0[1], net.denoise(z, times, text), atol=1e-4)
        assert torch.allclose(z0[0], net.denoise(z, times, none.expand(2, -1, -1)), atol=1e-4)
    assert (z0[1] - z0[0]).abs().max() > 1e-2
    assert torch.allclose(z0[3], z0[0] + 3 * (z0[1] - z0[0]), atol=1e-3)
    assert z0[3].abs().max() > 1


# ---- The U-Net -----------------------------------------------------------------------------------

TOP = {"conv_in.": "conv_in.", "norm_out.": "conv_norm_out.", "conv_out.": "conv_out.",
       "time_mlp.0.": "time_embedding.linear_1.", "time_mlp.2.": "time_embedding.linear_2."}
INNER = {"self_attention.norm": "transformer_blocks.0.norm1", "to_out": "to_out.0",
         "cross_attention.norm": "transformer_blocks.0.norm2", "time.": "time_emb_proj.",
         "self_attention": "transformer_blocks.0.attn1", "shortcut": "conv_shortcut",
         "cross_attention": "transformer_blocks.0.attn2", "mlp_norm": "transformer_blocks.0.norm3",
         "mlp_in": "transformer_blocks.0.ff.net.0.proj", "mlp_out": "transformer_blocks.0.ff.net.2"}


def diffusers_name(channels, layers):
    """A function: name of a parameter here -> its name in diffusers' UNet2DConditionModel."""
    blocks = {"middle.0": ("mid_block", 0), "middle.1": ("mid_block", 1)}
    for side, count in (("down", layers), ("up", layers + 1)):
        number = itertools.count()
        for i in range(len(channels)):
            for j in range(count):
                blocks[f"{side}.{next(number)}"] = f"{side}_blocks.{i}", j
            if i < len(channels) - 1:
                blocks[f"{side}.{next(number)}"] = f"{side}_blocks.{i}.{side}samplers.0.conv", None

    def rename(name):
        for ours, theirs in TOP.items():
            if name.startswith(ours):
                return name.replace(ours, theirs)
        side, number, rest = name.split(".", 2)
        block, j = blocks[f"{side}.{number}"]
        if j is None:  # a resampling convolution
            return f"{block}.{rest}"
        for ours, theirs in INNER.items():
            rest = rest.replace(ours, theirs)
        if rest.startswith("transformer."):
            return f"{block}.attentions.{j}.{rest.removeprefix('transformer.')}"
        return f"{block}.resnets.{j}.{rest}"

    return rename


def both_unets(channels, layers, heads=4, D=24):
    """Ours and diffusers' with the same weights."""
    torch.manual_seed(0)
    ours, last = ld.StableDiffusionUNet(4, 4, channels, layers, heads, D, 32), len(channels) - 1
    theirs = diffusers.UNet2DConditionModel(
        8, 4, 4, block_out_channels=channels, layers_per_block=layers, cross_attention_dim=D,
        attention_head_dim=heads,
        down_block_types=["CrossAttnDownBlock2D"] * last + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * last)
    rename = diffusers_name(channels, layers)
    theirs.load_state_dict({rename(name): p for name, p in ours.state_dict().items()})
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("channels, layers", [([32, 64], 1), ([32, 64, 96], 2), ([64], 1)])
def test_unet_is_diffusers(channels, layers):
    """The same output as UNet2DConditionModel with the same weights: every one has its place."""
    ours, theirs = both_unets(channels, layers)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24)
    with torch.no_grad():
        assert torch.allclose(ours(x, t, context), theirs(x, t, context).sample, atol=1e-4)


def test_stable_diffusion_1_has_859520964_parameters(capsys):
    """And the layers that the slide prints."""
    text = describe(capsys, "--size", "paper")
    assert text.endswith("\n859,520,964 parameters\n")
    for line in ("Conv2d(4, 320, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))",
                 "Linear(in_features=320, out_features=1280, bias=True)",
                 "Linear(in_features=1280, out_features=1280, bias=True)",
                 "GroupNorm(32, 320, eps=1e-05, affine=True",
                 "Conv2d(320, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"):
        assert line in text


def test_groups_of_one_channel_would_forget_the_time():
    """Why small networks have fewer groups than 32: the norm of a single channel removes what the
    time has added to it."""
    torch.manual_seed(0)
    x, context, moved = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 24), []
    for groups in (32, 8):
        net = ld.StableDiffusionUNet(4, 4, [32, 32], 1, 4, 24, groups)
        with torch.no_grad():
            early, late = (net(x, torch.tensor([t]), context) for t in (100.0, 900.0))
        moved.append((early - late).abs().max().item())
    assert moved[0] < 1e-5 and moved[1] > 1e-3


@each_backbone
def test_network_depends_on_all_its_inputs(backbone):
    """Every latent, the time and every token, pads too, change the output."""
    _, model = small("--backbone", backbone)
    net, text, t = model.denoiser, ld.to_tokens(["a red one"]), torch.tensor([0.5])
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        out = net(z, t, text)
        assert (net(z, t + 0.02, text) - out).abs().max() > 1e-4
        for i in range(8):
            other = text.clone()
            other[0, i] = (other[0, i] + 1) % 20
            assert (net(z, t, other) - out).abs().max() > 1e-5, i
        for i, j in ((0, 0), (3, 5)):
            moved = z.clone()
            moved[0, :, i, j] += 1
            assert (net(moved, t, text) - out).abs().max() > 1e-4


def test_coordinates_are_two_more_channels():
    """Row and column from -1 to 1; without them the input is the latents."""
    for flag in (0, 1):
        args, model = small("--coordinates", flag)
        net, inputs = model.denoiser, []
        net.backbone.forward = lambda x, t, context: inputs.append((x, t)) or x[:, :4]
        z = torch.randn(2, 4, 8, 8)
        assert torch.equal(net(z, torch.tensor([0.1, 0.7]), ld.to_tokens(["a", ""])), z)
        x, t = inputs[0]
        assert x.shape[1] == 4 + 2 * flag and torch.equal(x[:, :4], z) and t.tolist() == [100, 700]
    corners = x[0, 4:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.tolist() == [[-1, -1, 1, 1], [-1, 1, -1, 1]]


def test_attention_in_training_is_the_fused_one():
    """Two ways on a CPU, one result; bf16 too."""
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        fused = ld.attend(q.to(dtype), k.to(dtype), v.to(dtype))
        plain = ld.attend(q.to(dtype).requires_grad_(), k.to(dtype), v.to(dtype))
        assert fused.shape == (2, 6, 32) and torch.allclose(fused, plain, atol=tolerance)


# ---- The transformer of Flux ---------------------------------------------------------------------


def test_flux_has_the_published_parameters(capsys):
    """FLUX.1-schnell has 11,891,178,560; ours lacks its pooled text encoder, whose vector of 768
    passes an MLP there (11,802,624 weights), and has one layer from the mean of the 4,096-wide
    context (12,585,984)."""
    text = describe(capsys, "--size", "paper", "--backbone", "flux", "--coordinates", "0",
                    "--latent-dim", "16", "--text-width", "4096")
    assert text.endswith(f"\n{11_891_178_560 - 11_802_624 + 12_585_984:,} parameters\n")


def test_flux_starts_as_the_identity():
    """adaLN-Zero: at first no block changes its input, and the output is 0."""
    torch.manual_seed(0)
    net = ld.FluxTransformer(4, 4, 1, 32, 2, 2, 2, 16)
    text, image, vector = torch.randn(2, 5, 32), torch.randn(2, 6, 32), torch.randn(2, 1, 32)
    place = torch.randn(11, 2)
    a, b = net.double_blocks[0](text, image, vector, place)
    assert torch.equal(a, text) and torch.equal(b, image)
    assert torch.equal(net.single_blocks[0](image, vector, place[5:]), image)
    assert not net(torch.randn(2, 4, 4, 6), torch.rand(2), torch.randn(2, 5, 16)).any()


def test_rotary_sees_differences_of_places():
    """q(p) k(p') depends on p - p' alone, in rows and in columns; lengths stay; and so attention
    does not change if all places move."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 24)
    at = lambda row, col: torch.tensor([[float(row), float(col)]])
    dot = lambda a, b: (ld.rotary(q, at(*a)) * ld.rotary(k, at(*b))).sum().item()
    assert dot((2, 5), (3, 1)) == pytest.approx(dot((7, 6), (8, 2)), abs=1e-5)
    assert abs(dot((2, 5), (3, 1)) - dot((2, 5), (4, 1))) > 1e-3
    assert abs(dot((2, 5), (3, 1)) - dot((2, 5), (3, 2))) > 1e-3
    assert ld.rotary(q, at(3, 4)).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
    block = ld.SingleBlock(32, 2)
    torch.nn.init.normal_(block.modulation.weight)
    x, vector, place = torch.randn(1, 5, 32), torch.randn(1, 1, 32), torch.rand(5, 2)
    with torch.no_grad():
        out = block(x, vector, place)
        assert torch.allclose(block(x, vector, place + 3), out, atol=1e-3)
        place[4] += 1
        assert not torch.allclose(block(x, vector, place), out, atol=1e-2)


def test_queries_and_keys_are_normalised():
    """Root mean square 1 per head, however large the input."""
    q, k, _ = ld.QKV(32, 4)(1000 * torch.randn(2, 5, 32))
    for x in (q, k):
        assert torch.allclose(x.square().mean(-1), torch.ones(2, 4, 5), atol=1e-3)


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_come_back(patch, monkeypatch):
    """With the identity in place of the network, the latents return to their places."""
    width = 4 * patch**2
    net = ld.FluxTransformer(4, 4, patch, 8 * width, 0, 0, 2, 16)
    monkeypatch.setattr(ld, "modulate", lambda x, *_: x)
    with torch.no_grad():
        net.image_in.weight.zero_()[:width] = torch.eye(width)
        net.image_in.bias.zero_()
        net.image_out.weight[:, :width] = torch.eye(width)
        x = torch.randn(2, 4, 4, 6)
        assert torch.allclose(net(x, torch.rand(2), torch.randn(2, 5, 16)), x, atol=1e-6)


# ---- Training and the program --------------------------------------------------------------------


def test_what_the_denoiser_is_trained_on(monkeypatch, tmp_path):
    """Latents of mean 0 and standard deviation 1; one text in ten is the empty one of guidance; the
    times are spread evenly. And the held-out loss does not depend on chance."""
    args, model = small("--steps", 1, "--batch-size", 20_000, "--sample-steps", 1)
    args.out, batches = tmp_path, []

    def spy(denoiser, z0, text, t, eps, objective):
        batches.append((z0, text, t, eps))
        return next(iter(denoiser.parameters())).sum()

    monkeypatch.setattr(ld, "denoising_loss", spy)
    ld.train_denoiser(args, model, None)
    z0, text, t, eps = batches[0]
    assert z0.mean().abs() < 0.02 and abs(z0.std() - 1) < 0.02 and abs(eps.std() - 1) < 0.01
    empty = (text == ld.to_tokens([""])).all(1).float().mean().item()
    assert empty == pytest.approx(0.1, abs=0.01) and len(text.unique(dim=0)) > 20
    assert torch.bincount((1000 * t).round().long(), minlength=1001)[1:].unique().tolist() == [20]
    images, texts, _ = ld.load_scenes(6, "test", "held-out", args)
    monkeypatch.undo()
    losses = [ld.held_out_loss(args, model, images, texts) for _ in range(2)]
    assert losses[0] == losses[1] > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with out/latent_diffusion/ after both stages, and what was printed."""
    folder = tmp_path_factory.mktemp("latent")
    return folder, call(ld, "--train", *SMALL, cwd=folder)


def test_the_log_says_which_stage_runs(trained):
    folder, said = trained
    first, second = said.index("stage 1 of 2, the autoencoder"), said.index("stage 2 of 2, the den")
    assert first < said.index("squared error 0.") < second < said.index("if pairs are held out")
    assert said.count("if pairs are held out") == 2
    assert "images of 3,072 numbers, their latents of 256" in said
    for name in ("model.pt", "samples.npz", "samples.png", "step_000002.png", "latents.png"):
        assert (folder / "out/latent_diffusion" / name).stat().st_size > 0


def test_latents_are_drawn(trained, monkeypatch):
    """Columns: the image, its four channels, grey at their mean, and the reconstruction."""
    folder, _ = trained
    pictures = []
    monkeypatch.setattr(ld, "grid", lambda images, cols: pictures.append((images, cols)))
    monkeypatch.setattr(ld, "save_picture", lambda *_: None)
    ckpt = ld.load_checkpoint(folder / "out/latent_diffusion/model.pt")
    args = ld.parse_args(["--out", str(folder)], ckpt["config"])
    model = ld.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    ld.draw_latents(args, model)
    images, cols = pictures[0]
    x, *channels, back = images.view(8, 6, 3, 32, 32).unbind(1)
    z = ld.latents_of(model.autoencoder, x)
    assert cols == 6
    for i, channel in enumerate(channels):
        want = (z[:, i].clamp(-3, 3) / 3 + 1) * 127.5  # (8, 8, 8)
        for y, x0 in ((0, 0), (3, 3), (1, 2)):  # any pixel of the 4 x 4
            assert (channel[:, :, y::4, x0::4] - want[:, None]).abs().max() <= 0.51
    with torch.no_grad():
        want = model.autoencoder.reconstruct(ld.to_float(x))
    assert torch.equal(back, ld.to_uint8(want))


@pytest.mark.parametrize("flags", ["--size flux", "--size flux --objective v --patch 1",
                                   "--objective eps --channels 32", "--objective flow --seed 1"])
def test_other_kinds_train(flags, tmp_path):
    call(ld, "--train", *SMALL, *flags.split(), "--every", 4, cwd=tmp_path)
    call(ld, "--prompt", "a red seven", "--guidance", 1, cwd=tmp_path)
    assert np.load(tmp_path / "out/latent_diffusion/samples.npz")["arr_0"].shape == (8, 32, 32, 3)


@pytest.mark.parametrize("checkpoint", [1, 2, 3])
def test_resumes_in_every_stage(trained, checkpoint, tmp_path):
    """Interrupted right after a checkpoint of the first stage, at its end, or in the second, and
    resumed: the same bits; --scenes and latents' scale come from the checkpoint."""
    count, save = itertools.count(1), ld.save_checkpoint

    def interrupted(*args, **state):
        save(*args, **state)
        if next(count) == checkpoint:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ld, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(ld, "--train", *SMALL, cwd=tmp_path)
    call(ld, "--train", "--resume", cwd=tmp_path)
    a, b = (ld.load_checkpoint(folder / "out/latent_diffusion/model.pt")
            for folder in (trained[0], tmp_path))
    for part in ("model", "ema"):
        assert all(torch.equal(value, b[part][name]) for name, value in a[part].items())


def test_prompts_may_be_repeated(trained):
    """--prompt implies --sample; every prompt gets --num images, a row each."""
    said = call(ld, "--prompt", "a Red seven", "--prompt", "", "--num", 3, "--save", "x.npz",
                cwd=trained[0])
    saved = np.load(trained[0] / "x.npz")
    assert saved["arr_0"].shape == (6, 32, 32, 3) and "row 1: a Red seven" in said
    assert saved["captions"].tolist() == ["a Red seven"] * 3 + [""] * 3


@pytest.mark.parametrize("flags, words", [
    (["--guidance", "nan"], "--guidance nan: expected a finite number"),
    (["--prompt", "a pink seven"], "unknown word 'pink'; the words are a an left"),
    (["--prompt", "a red seven left of a blue two above"], "has 9 words, more than 8")])
def test_bad_input_is_one_line(flags, words, tmp_path):
    said = call(ld, "--sample", *flags, cwd=tmp_path, code=2)
    assert words in said and said.count("\n") == 1
