"""ddpm.py against oracles: closed forms, analytic Gaussians, published counts; and its behaviour as
a program."""

import functools
import hashlib
import http.server
import math
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm
from inprocess import call

ROOT = Path(ddpm.__file__).parent
f64 = functools.partial(torch.tensor, dtype=torch.float64)
TINY = (
    "--width 16 --mults 1 1 --blocks 1 --batch-size 8 --warmup 1 --sample-steps 3 --num 20".split()
)


def run(*argv, **env):
    """ddpm.py in a process of its own."""
    result = subprocess.run(
        [sys.executable, ROOT / "ddpm.py", *map(str, argv)],
        text=True,
        capture_output=True,
        env={**os.environ, **env},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """200 real digits in a file: --data and its path. (To look for the nearest of 60,000 takes
    seconds.)"""
    path = tmp_path_factory.mktemp("few") / "few.npz"
    args = ddpm.parse_args([])
    args.device = "cpu"
    images, labels = ddpm.load_data(args, "train")
    np.savez(path, images=images[:200, 0], labels=labels[:200])
    return ["--data", str(path)]


# ---- The forward process -------------------------------------------------------------------------


def test_schedule_golden_numbers():
    """Slide Noise schedule: abar at chosen t, from an independent computation; abar_0 = 1; T is
    free."""
    linear, cosine = ddpm.make_abar("linear", 1000), ddpm.make_abar("cosine", 1000)
    assert linear.dtype == torch.float64 and len(linear) == 1001 and linear[0] == cosine[0] == 1
    for t, value in ((1, 0.9999), (500, 0.0785872), (1000, 4.03583e-05)):
        assert linear[t].item() == pytest.approx(value, rel=2e-6)
    assert cosine[1000].item() == pytest.approx(2.42877e-09, rel=2e-6)
    assert ddpm.make_abar("linear", 4000)[-1].item() == pytest.approx(4.24665e-05, rel=2e-6)
    for T in (20, 50, 400):  # the beta range kept as it is would leave abar_50 = 0.603
        assert (
            ddpm.make_abar("linear", T)[-1] < 1e-4
            and (ddpm.make_abar("linear", T).diff() < 0).all()
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_closed_form_is_the_chain(schedule):
    """Slide Noise schedule: t single steps x_t = sqrt(1-beta) x + sqrt(beta) eps have the closed
    form's mean and variance."""
    abar = ddpm.make_abar(schedule, 300)
    scale, var = 1.0, 0.0
    for t in range(1, 301):
        beta = (1 - abar[t] / abar[t - 1]).item()
        scale, var = scale * math.sqrt(1 - beta), var * (1 - beta) + beta
        assert ddpm.q_sample(
            f64([1.0]), torch.tensor([t]), f64([0.0]), abar
        ).item() == pytest.approx(scale, rel=1e-9)
        assert ddpm.q_sample(
            f64([0.0]), torch.tensor([t]), f64([1.0]), abar
        ).item() ** 2 == pytest.approx(var, rel=1e-9)


# ---- Targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 500, 1000])
def test_targets_convert_exactly(t):
    """Slide Predicting images instead of noise: each target gives x_0 back; losses differ by the
    factors of loss_weight."""
    g = torch.Generator().manual_seed(0)
    abar = ddpm.make_abar("linear", 1000)
    x0, eps, noise = torch.randn(3, 5, 7, generator=g, dtype=torch.float64)
    tt = torch.full((5,), t)
    xt = ddpm.q_sample(x0, tt, eps, abar)
    snr = (abar[t] / (1 - abar[t])).item()
    for predict, factor in (("eps", snr), ("x0", 1.0), ("v", snr + 1)):
        target = ddpm.target_of(x0, eps, tt, abar, predict)
        assert torch.allclose(ddpm.x0_of(target, xt, tt, abar, predict), x0, atol=1e-10)
        wrong = target + 0.1 * noise  # |error|^2 in the target is factor |error|^2 in x_0
        x0_error = (ddpm.x0_of(wrong, xt, tt, abar, predict) - x0).square().sum().item()
        assert (wrong - target).square().sum().item() == pytest.approx(factor * x0_error, rel=1e-6)
        weight = ddpm.loss_weight(tt, abar, predict, 5.0)[0].item()
        assert weight * factor == pytest.approx(
            min(snr, 5.0), rel=1e-9
        )  # for v: min(SNR, 5) / (SNR + 1)


def test_v_survives_zero_signal():
    """At SNR = 0 (abar_T = 0) eps cannot be turned into x_0, but x0 and v can, and so can be
    weighted."""
    abar, t = f64([1.0, 0.5, 0.0]), torch.tensor([2])
    for predict in ("x0", "v"):
        assert ddpm.x0_of(f64([[0.3]]), f64([[2.0]]), t, abar, predict).isfinite().all()
        assert ddpm.loss_weight(t, abar, predict, 5.0).isfinite().all()


# ---- Samplers: exact, with the optimal model for a Gaussian --------------------------------------


def gaussian_denoiser(abar, mean, var):
    """The exact E[x_0 | x_t] for data N(mean, var) in one dimension."""
    a = abar.tolist()
    return lambda x, t: (
        mean + var * math.sqrt(a[t]) / (a[t] * var + 1 - a[t]) * (x - math.sqrt(a[t]) * mean)
    )


def final_moments(monkeypatch, abar, mean, var, sampler, steps, **options):
    """Mean and variance of the samples, exactly: with this model every step is affine in x and the
    noise, so one batch whose rows get a unit of noise each at one place of the chain yields all its
    coefficients."""
    calls = iter(range(10**6))

    def unit(x):
        z = torch.zeros_like(x)
        z[2 + next(calls)] = 1.0
        return z

    monkeypatch.setattr(torch, "randn_like", unit)
    x = torch.zeros(steps + 2, 1, dtype=torch.float64)
    x[1] = 1.0  # row 0: no noise at all; row 1: a unit in x_T
    out = ddpm.sample_loop(gaussian_denoiser(abar, mean, var), x, abar, sampler, steps, **options)[
        :, 0
    ]
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


@pytest.mark.parametrize(
    "sampler, options, steps, expected",
    [
        ("ddpm", dict(variance="beta"), 1000, (0.99990, 0.25075, 0.04037)),
        ("ddpm", dict(variance="posterior"), 1000, (0.99107, 0.24613, 0.03853)),
        ("ddim", dict(eta=1.0), 1000, (0.99107, 0.24613, 0.03853)),
        ("ddim", dict(eta=0.0), 10, (0.688, 0.137, 0.0095)),
        ("ddim", dict(eta=0.0), 50, (0.928, 0.222, 0.0302)),
        ("ddim", dict(eta=0.0), 1000, (0.9963, 0.2485, 0.0394)),
        ("dpm++", {}, 10, (0.899, 0.164, 0.0100)),
        ("dpm++", {}, 20, (1.0027, 0.229, 0.0223)),
        ("dpm++", {}, 50, (1.0061, 0.2506, 0.0357)),
    ],
)
def test_sampler_variances(monkeypatch, sampler, options, steps, expected):
    """Slide Sampling: final variances for data of variance 1, 0.25, 0.04, propagated without Monte
    Carlo."""
    abar = ddpm.make_abar("linear", 1000)
    for var, value in zip((1.0, 0.25, 0.04), expected):
        digits = 4 if value < 0.02 else len(str(value).split(".")[1])
        assert round(
            final_moments(monkeypatch, abar, 0.0, var, sampler, steps, **options)[1], digits
        ) == pytest.approx(value)


def test_sampler_means(monkeypatch):
    """Starting from N(0, 1) is right only if abar_T is near 0: beta up to 0.02 at T = 50 ends at
    mean 0.725, not 1."""
    mean = final_moments(monkeypatch, ddpm.make_abar("linear", 1000), 1.0, 0.25, "ddpm", 1000)[0]
    assert mean == pytest.approx(0.99999, abs=6e-6)
    short = torch.cat(
        [torch.ones(1).double(), (1 - torch.linspace(1e-4, 0.02, 50).double()).cumprod(0)]
    )
    assert short[-1].item() == pytest.approx(0.603, abs=5e-4)
    assert final_moments(monkeypatch, short, 1.0, 0.25, "ddpm", 50)[0] == pytest.approx(
        0.72482, abs=6e-6
    )
    assert (
        final_moments(monkeypatch, ddpm.make_abar("linear", 50), 1.0, 0.25, "ddpm", 50)[0] > 0.999
    )


def test_ancestral_step_is_the_slide_and_the_posterior():
    """The step's mean is the slide's formula in eps; as a posterior it satisfies coef1 + coef2
    sqrt(abar_t) = sqrt(abar_{t-1}) and 1/var = alpha/beta + 1/(1 - abar_{t-1}); var is 0 at t = 1
    and at most beta."""
    abar = ddpm.make_abar("linear", 1000).tolist()
    xt, eps, zero = f64(0.7), f64(-0.4), f64(0.0)
    for t in (1, 2, 500, 1000):
        a_t, a_s = abar[t], abar[t - 1]
        alpha, beta = a_t / a_s, 1 - a_t / a_s
        x0 = (xt - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
        slide = (xt - (1 - alpha) / math.sqrt(1 - a_t) * eps) / math.sqrt(alpha)
        assert ddpm.ddpm_step(xt, x0, a_t, a_s, zero, "beta").item() == pytest.approx(
            slide.item(), rel=1e-9
        )
        coef0, coef_t = (
            ddpm.ddpm_step(f64(a), f64(b), a_t, a_s, zero, "beta").item()
            for a, b in ((0.0, 1.0), (1.0, 0.0))
        )
        assert coef0 + coef_t * math.sqrt(a_t) == pytest.approx(math.sqrt(a_s), rel=1e-9)
        large, small = (
            ddpm.ddpm_step(zero, zero, a_t, a_s, f64(1.0), v).item() ** 2
            for v in ("beta", "posterior")
        )
        assert large == pytest.approx(beta, rel=1e-9) and small <= large
        if t == 1:
            assert small == 0
        else:
            assert 1 / small == pytest.approx(alpha / beta + 1 / (1 - a_s), rel=1e-9)


def test_ddim_with_eta_1_is_ancestral(monkeypatch):
    """With the same noise, DDIM eta = 1 and ancestral sampling of posterior variance agree in every
    state."""
    abar = ddpm.make_abar("cosine", 40)
    start = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ways = []
    for sampler, options in (("ddim", dict(eta=1.0)), ("ddpm", dict(variance="posterior"))):
        torch.manual_seed(1)
        ways.append([])
        ddpm.sample_loop(
            gaussian_denoiser(abar, 0.1, 0.3),
            start,
            abar,
            sampler,
            40,
            keep=lambda t, x, x0: ways[-1].append(x),
            **options,
        )
    assert len(ways[0]) == 41 and torch.allclose(
        torch.stack(ways[0]), torch.stack(ways[1]), atol=1e-10
    )
    assert not torch.allclose(ways[0][20], start)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_last_step_returns_the_guess(sampler):
    """At t = 1 no noise is added (the slide's z > 1 is t > 1): x_0 is the model's guess itself."""
    abar = ddpm.make_abar("linear", 30)
    for steps in (30, 7):
        out = ddpm.sample_loop(
            lambda x, t: torch.full_like(x, 0.25), torch.randn(4, 3), abar, sampler, steps
        )
        assert torch.allclose(out, torch.tensor(0.25))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_deterministic_samplers_draw_nothing(sampler):
    """DDIM eta = 0 and DPM-Solver++ do not depend on the random state, ancestral sampling does."""
    abar, x = ddpm.make_abar("linear", 30), torch.ones(2, 2)

    def end(name, seed):
        torch.manual_seed(seed)
        return ddpm.sample_loop(gaussian_denoiser(abar, 0.0, 0.5), x, abar, name, 10)

    assert torch.equal(end(sampler, 0), end(sampler, 1)) and not torch.equal(
        end("ddpm", 0), end("ddpm", 1)
    )


def test_every_level_is_visited():
    """Sampling with T steps visits T..1; with fewer, T first and equal strides, and ends at 0."""
    for steps, expected in ((30, list(range(30, -1, -1))), (3, [30, 20, 10, 0])):
        seen = []
        ddpm.sample_loop(
            lambda x, t: x,
            torch.zeros(1),
            ddpm.make_abar("linear", 30),
            "ddim",
            steps,
            keep=lambda t, x, x0: seen.append(t),
        )
        assert seen == expected


class Constant(torch.nn.Module):
    """A model that answers with a constant, and for "no class" (label 10) with another."""

    def __init__(self, value, none=0.0):
        super().__init__()
        self.label, self.value, self.none = torch.nn.Embedding(11, 1), value, none

    def forward(self, x, t, y=None):
        return torch.where(y.view(-1, 1) == 10, self.none, self.value).expand_as(x)


def test_clip_is_live():
    """A wild answer moves x_0 to the border of [-1, 1], not beyond, and eps is derived again from
    the clipped x_0: with the model's own eps the states would run away."""
    abar, y = ddpm.make_abar("linear", 1000), torch.zeros(2, dtype=torch.long)
    x, states = torch.full((2, 3), 0.5), []
    denoise = ddpm.make_denoiser(Constant(1e4), y, abar, "eps", 1.0)
    assert torch.equal(denoise(x, 900), -torch.ones(2, 3))
    for sampler in ("ddpm", "ddim", "dpm++"):
        ddpm.sample_loop(denoise, x, abar, sampler, 50, keep=lambda t, x, x0: states.append(x))
    assert torch.stack(states).abs().max() < 6
    a_t, a_s = abar[900].item(), abar[800].item()
    step = ddpm.ddim_step(x, torch.ones(2, 3), a_t, a_s, 0.0, 0.0)
    eps = (x - math.sqrt(a_t)) / math.sqrt(1 - a_t)
    assert torch.allclose(step, math.sqrt(a_s) + math.sqrt(1 - a_s) * eps)


def test_guidance():
    """w = 1 is the conditional model and w = 0 the unconditional one, to the bit; w = 3 is uncond +
    3 (cond - uncond)."""
    torch.manual_seed(0)
    model = ddpm.UNet(1, 10, 100, 2, 16, [1, 1], 1, [], 0.0).eval()
    for p in model.parameters():
        torch.nn.init.normal_(
            p, std=0.1
        )  # the output layer starts at zero: then every w would agree
    abar = ddpm.make_abar("linear", 100)
    x, y, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3]), torch.full((3,), 60)
    with torch.no_grad():
        guess = {w: ddpm.make_denoiser(model, y, abar, "x0", w)(x, 60) for w in (0, 1, 3.0)}
        cond, uncond = model(x, t, y), model(x, t, torch.full((3,), 10))
    assert torch.equal(guess[1], cond.clamp(-1, 1)) and torch.equal(guess[0], uncond.clamp(-1, 1))
    assert torch.allclose(guess[3.0], (uncond + 3 * (cond - uncond)).clamp(-1, 1), atol=1e-5)
    assert not torch.allclose(guess[0], guess[1], atol=1e-3)


def test_steps_agree_with_diffusers():
    """One DDPM and one DDIM step, and the schedules, equal those of diffusers, where it is
    installed."""
    diffusers = pytest.importorskip("diffusers")
    abar = ddpm.make_abar("linear", 1000)
    g = torch.Generator().manual_seed(0)
    xt, eps = torch.randn(2, 2, 1, 8, 8, generator=g)
    common = dict(
        num_train_timesteps=1000, beta_schedule="linear", clip_sample=True, clip_sample_range=1.0
    )
    one, two = (
        diffusers.DDPMScheduler(variance_type="fixed_small", **common),
        diffusers.DDIMScheduler(set_alpha_to_one=True, timestep_spacing="trailing", **common),
    )
    assert torch.allclose(one.alphas_cumprod.double(), abar[1:], rtol=2e-4, atol=0)
    cosine = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    assert torch.allclose(
        cosine.alphas_cumprod[:-1].double(), ddpm.make_abar("cosine", 1000)[1:-1], rtol=1e-3
    )
    for t in (999, 500, 2):  # theirs counts from 0: level t is our t + 1
        x0 = ddpm.x0_of(eps, xt, torch.full((2,), t + 1), abar, "eps").clamp(-1, 1)
        a_t, a_s = abar[t + 1].item(), abar[t].item()
        z = torch.randn(xt.shape, generator=torch.Generator().manual_seed(5))
        ours = ddpm.ddpm_step(xt, x0, a_t, a_s, z, "posterior")
        assert torch.allclose(
            ours,
            one.step(eps, t, xt, generator=torch.Generator().manual_seed(5)).prev_sample,
            atol=5e-4,  # they compute 1 - abar in float32, which shows at small t
        )
    two.set_timesteps(20)
    for t in two.timesteps.tolist():
        x0 = ddpm.x0_of(eps, xt, torch.full((2,), t + 1), abar, "eps").clamp(-1, 1)
        ours = ddpm.ddim_step(xt, x0, abar[t + 1].item(), abar[max(0, t + 1 - 50)].item(), 0.0, 0.0)
        assert torch.allclose(
            ours, two.step(eps, t, xt, use_clipped_model_output=True).prev_sample, atol=2e-4
        )


# ---- The network ---------------------------------------------------------------------------------


def meta_unet(**changes):
    names = ("patch", "width", "mults", "blocks", "attention", "dropout")
    options = {**{k: ddpm.SIZES["paper"][k] for k in names}, **changes}
    with torch.device("meta"):
        return sum(p.numel() for p in ddpm.UNet(3, 0, 1000, **options).parameters())


def test_published_parameter_counts():
    """--size paper is the network of DDPM: 35,746,307 parameters on CIFAR-10, and 113,673,219 on
    CelebA-HQ 256."""
    assert meta_unet() == 35_746_307
    assert meta_unet(mults=[1, 1, 2, 2, 4, 4], attention=[4]) == 113_673_219


def test_network_depends_on_time_after_one_step():
    """Slide Add time dependency: at first the output is 0 whatever t; after one step of training t
    matters."""
    torch.manual_seed(0)
    model, abar = ddpm.UNet(1, 0, 1000, 2, 16, [1, 1], 1, [1], 0.0), ddpm.make_abar("linear", 1000)
    x = torch.randn(4, 1, 8, 8)
    at = lambda t: model(x, torch.full((4,), t)).detach()
    assert at(1).abs().max() == 0
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # the layers before a zero layer move from the second step on
        loss = ddpm.diffusion_loss(
            model, x, None, torch.tensor([1, 300, 600, 1000]), torch.randn_like(x), abar, "eps"
        )
        opt.zero_grad(), loss.backward(), opt.step()
    assert (at(1) - at(1000)).abs().max() > 1e-4


def test_time_basis_tells_times_apart():
    """Times in 0..1, unscaled, would be 0.027 apart; in 0..1000 they are 9.1 apart, at a norm of
    11.3."""
    far = ddpm.time_basis(torch.tensor([500.0, 510.0]), 256)
    near = ddpm.time_basis(torch.tensor([0.50, 0.51]), 256)
    assert (far[0] - far[1]).norm().item() == pytest.approx(9.1, abs=0.05) and far[
        0
    ].norm().item() == pytest.approx(11.3, abs=0.05)
    assert (near[0] - near[1]).norm().item() == pytest.approx(0.027, abs=5e-4)


def test_time_is_scaled_to_a_thousand():
    """Whatever T, the networks see times up to 1000: t = T/2 looks the same at T = 10 and 1000."""
    for make in (
        lambda T: ddpm.Field(T, 16, 1),
        lambda T: ddpm.UNet(1, 0, T, 1, 16, [1], 1, [], 0.0),
    ):
        outs = []
        for T in (10, 1000):
            torch.manual_seed(0)
            model = make(T)
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.2)
            x = torch.full((1, 2) if T and isinstance(model, ddpm.Field) else (1, 1, 4, 4), 0.3)
            outs.append(model(x, torch.tensor([T // 2])))
            assert not torch.allclose(outs[-1], model(x, torch.tensor([T])), atol=1e-4)
        assert torch.allclose(*outs, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (14, 10), (6, 26)])
def test_any_size_goes_in_and_comes_out(size):
    """Odd sizes on the way down (7, 13) are met again on the way up."""
    model = ddpm.UNet(3, 4, 1000, 2, 16, [1, 1, 1], 1, [2], 0.0)
    assert model(torch.randn(2, 3, *size), torch.tensor([1, 9]), torch.tensor([0, 4])).shape == (
        2,
        3,
        *size,
    )


# ---- Training ------------------------------------------------------------------------------------


def test_training_draws_every_level_and_drops_labels_one_by_one(monkeypatch, tmp_path):
    """t covers 1..T (both ends), evenly; labels are dropped for single images, about 1 in 10."""
    seen, labels = [], []

    def spy(model, x0, y, t, eps, abar, predict, gamma):
        seen.append(t), labels.append(y)
        assert -1 <= x0.min() and x0.max() <= 1 and x0.min() == -1
        return model(x0[:1], t[:1], y[:1]).mean()

    monkeypatch.setattr(ddpm, "diffusion_loss", spy)
    args = ddpm.parse_args(
        [
            *TINY,
            "--train",
            "--timesteps",
            "50",
            "--steps",
            "60",
            "--batch-size",
            "40",
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
            "--every",
            "1000",
        ]
    )
    ddpm.setup(args)
    ddpm.train(args)
    counts = torch.cat(seen).bincount(minlength=51)
    assert (
        counts[0] == 0 and len(counts) == 51 and counts[1:].min() > 25 and counts[1:].max() < 75
    )  # 48 expected
    dropped = torch.stack(labels) == 10  # (60, 40)
    assert (
        0.06 < dropped.float().mean() < 0.14
        and (dropped.any(1) & ~dropped.all(1)).float().mean() > 0.8
    )


def test_ema():
    """The running mean is float32 and the plain formula at every step, with a memory of 2/11 in the
    first; it converges to constant weights."""
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = ema.weight.detach().clone()
    for step in range(1, 200):
        ddpm.ema_update(ema, model, step, 0.9)
        d = 2 / 11 if step == 1 else min(0.9, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.weight.detach()
        assert torch.allclose(ema.weight, expected, rtol=1e-6, atol=1e-7)
    assert ema.weight.dtype == torch.float32
    assert torch.allclose(ema.weight, model.weight, atol=1e-4)


def test_learning_rate():
    """Linear warm-up to the peak, then down to almost nothing; decay 0 stays at the peak."""
    args = ddpm.parse_args("--train --lr 1 --warmup 10 --steps 100 --decay 1 --device cpu".split())
    rates = [ddpm.learning_rate(s, args) for s in range(1, 101)]
    assert (
        rates[0] == pytest.approx(0.1)
        and max(rates) == rates[9]
        and rates[-1] == pytest.approx(0.01)
    )
    args.decay = 0.0
    assert ddpm.learning_rate(100, args) == 1


def losses(folder):
    return (folder / "loss.csv").read_text()


def test_resume_after_a_kill_is_bit_equal(tmp_path, few):
    """A run killed with SIGKILL and resumed ends with the same weights, mean and loss curve as an
    unbroken one."""
    command = [*TINY, *few, "--train", "--steps", "60", "--every", "20", "--dropout", "0.1"]
    call(ddpm, *command, "--out", "whole", cwd=tmp_path)
    killed = subprocess.Popen(
        [sys.executable, ROOT / "ddpm.py", *command, "--out", tmp_path / "cut"],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in killed.stdout:
        if line.startswith("step 20"):
            killed.send_signal(signal.SIGKILL)
            break
    killed.wait()
    assert torch.load(tmp_path / "cut/model.pt", weights_only=True)["step"] < 60
    # every other flag comes from the checkpoint
    call(ddpm, "--train", "--resume", "--out", "cut", cwd=tmp_path)
    a, b = (torch.load(tmp_path / f / "model.pt", weights_only=True) for f in ("whole", "cut"))
    for part in ("model", "ema"):
        assert (
            all(torch.equal(a[part][k], b[part][k]) for k in a[part])
            and a["history"] == b["history"]
        )
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert (tmp_path / "whole/samples.png").read_bytes() == (
        tmp_path / "cut/samples.png"
    ).read_bytes()


def test_fresh_noise_is_not_the_first_noise(monkeypatch):
    """The noise that a step adds is drawn from another start than x_T, on a CPU too."""
    args = ddpm.parse_args(["--sample", "--device", "cpu", "--timesteps", "50"])
    args.shape, args.bf16, args.classes, seen = [1, 4, 4], False, 0, []

    def watch(denoise, x, *_):
        seen.extend([x, torch.randn_like(x)])
        return x

    monkeypatch.setattr(ddpm, "sample_loop", watch)
    ddpm.generate(args, None, torch.zeros(6, dtype=torch.long))
    assert seen[0].shape == (6, 1, 4, 4) and not torch.equal(*seen)


def test_two_processes_are_one(tmp_path, few):
    """torchrun with two processes gives the losses of one process with the same global batch."""
    command = [*TINY, *few, "--train", "--steps", "8", "--every", "9", "--batch-size", "16"]
    call(ddpm, *command, "--out", "one", cwd=tmp_path)
    # "--", or torchrun would take --num for a beginning of its --numa-binding
    both = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
         ROOT / "ddpm.py", *command, "--out", tmp_path / "two"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert both.returncode == 0, both.stderr
    one, two = (torch.load(tmp_path / f / "model.pt", weights_only=True) for f in ("one", "two"))
    assert [s for s, _ in one["history"]] == [s for s, _ in two["history"]]
    assert np.allclose([v for _, v in one["history"]], [v for _, v in two["history"]], rtol=5e-3)
    for key, value in one["model"].items():  # gradients are averaged, or the weights would part
        assert torch.allclose(value, two["model"][key], atol=5e-3), key


# ---- Bits per dimension --------------------------------------------------------------------------


@pytest.mark.parametrize("mean, var", [(0.0, 1e-4), (0.9999, 1e-4), (-1.3, 0.5), (0.25, 1e-2)])
def test_decoder_is_a_distribution(mean, var):
    """The probabilities of the 256 grey levels add up to 1; the outermost bins take the tails."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    assert ddpm.decoder_log_prob(levels, f64(mean), var).exp().sum().item() == pytest.approx(
        1, abs=1e-9
    )


def test_decoder_has_no_floor():
    """A pixel 60 standard deviations off costs what the Gaussian says, about 60^2/2 nats: a floor
    on the probability would make the bound too good."""
    value = ddpm.decoder_log_prob(f64(-1.0), f64(0.2), 4e-4).item()
    edge = (-1 + 1 / 255 - 0.2) / 0.02
    tail = -(edge**2) / 2 - math.log(-edge * math.sqrt(2 * math.pi))  # log Phi far out
    assert value == pytest.approx(tail, rel=1e-3) and value < -1700


def test_normal_kl():
    """KL of equal Gaussians is 0; otherwise it is that of torch.distributions."""
    assert ddpm.normal_kl(f64(0.3), 0.2, f64(0.3), 0.2).item() == pytest.approx(0, abs=1e-12)
    N = torch.distributions.Normal
    oracle = torch.distributions.kl_divergence(
        N(f64(0.3), math.sqrt(0.2)), N(f64(-1.0), math.sqrt(0.7))
    )
    assert ddpm.normal_kl(f64(0.3), 0.2, f64(-1.0), 0.7).item() == pytest.approx(oracle.item())


def test_prior_term_is_small():
    """For |x| = 1 the linear schedule leaves about 3e-5 bits/dim at t = T."""
    a = ddpm.make_abar("linear", 1000)[-1].item()
    assert ddpm.normal_kl(f64(math.sqrt(a)), 1 - a, 0.0, 1.0).item() / math.log(2) == pytest.approx(
        3e-5, rel=0.1
    )


def test_bound_approaches_the_entropy():
    """With the exact model of Gaussian data the bound stays above the entropy and falls towards it
    as T grows."""
    var, n = 0.04, 200_000
    g = torch.Generator().manual_seed(0)
    entropy = 0.5 * math.log(2 * math.pi * math.e * var) - math.log(
        2 / 255
    )  # of x rounded to 256 levels, in nats
    gaps = []
    for T in (25, 100, 400):
        abar = ddpm.make_abar("linear", T)
        denoise, x0 = (
            gaussian_denoiser(abar, 0.0, var),
            math.sqrt(var) * torch.randn(n, 1, generator=g, dtype=torch.float64),
        )
        x0 = ((x0.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        a = abar[-1].item()
        total = ddpm.normal_kl(math.sqrt(a) * x0, 1 - a, 0.0, 1.0).mean().item()
        for t in range(1, T + 1):
            m = n if t == 1 else n // 8
            xt = ddpm.q_sample(
                x0[:m],
                torch.full((m,), t),
                torch.randn(m, 1, generator=g, dtype=torch.float64),
                abar,
            )
            total += ddpm.bound_term(x0[:m], denoise(xt, t), t, abar, "beta").mean().item()
        gaps.append(total - entropy)
    # the same sum with all expectations done by hand gives these, of order 1/T
    assert gaps == pytest.approx([0.2735, 0.0730, 0.0187], abs=0.012) and gaps[2] > 0


def test_table_adds_up(tmp_path, monkeypatch, capsys):
    """With a model that knows x_0 all L_{t-1} but the decoder vanish; the total is the sum of the
    printed terms."""
    truth = {}
    original = ddpm.q_sample

    def remember(x0, t, eps, abar):
        truth["x0"] = x0
        return original(x0, t, eps, abar)

    monkeypatch.setattr(ddpm, "q_sample", remember)
    monkeypatch.setattr(ddpm, "make_denoiser", lambda *_: lambda x, t: truth["x0"])
    args = ddpm.parse_args(
        ["--bpd", "--timesteps", "60", "--device", "cpu", "--out", str(tmp_path)]
    )
    args.variance, args.shape, args.classes, args.batch_size = "posterior", [1, 28, 28], 10, 4
    total = ddpm.bits_per_dim(args, None)
    said = capsys.readouterr().out
    terms = [float(v) for v in re.findall(r"(?:L_T|\d|L_0) +(\d+\.\d+)", said)]
    assert len(terms) > 4 and sum(terms) == pytest.approx(total, abs=1e-3)
    abar = ddpm.make_abar("cosine", 60).tolist()
    var = ddpm.step_variance(abar[2], abar[1], "posterior")
    pixel = ddpm.decoder_log_prob(f64(0.0), f64(0.0), var).item()  # of a grey one; black costs less
    assert 0 < terms[-1] < -pixel / math.log(2) and max(terms[1:-1]) < 1e-5


# ---- Pictures ------------------------------------------------------------------------------------


def test_pictures_read_back(tmp_path):
    """A PNG and an animated PNG hold the pixels given, by Pillow where it is installed, and by
    zlib's word anyway."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 7, 11, 3), np.uint8)
    for count in (1, 5):
        ddpm.save_png(tmp_path / "x.png", frames[:count])
        blob, chunks = (tmp_path / "x.png").read_bytes()[8:], []
        while blob:
            (size,) = struct.unpack(">I", blob[:4])
            chunks.append((blob[4:8], blob[8 : 8 + size]))
            assert (
                zlib.crc32(blob[4 : 8 + size]) == struct.unpack(">I", blob[8 + size : 12 + size])[0]
            )
            blob = blob[12 + size :]
        pixels = [d if k == b"IDAT" else d[4:] for k, d in chunks if k in (b"IDAT", b"fdAT")]
        numbers = [struct.unpack(">I", d[:4])[0] for k, d in chunks if k in (b"fcTL", b"fdAT")]
        assert numbers == list(range(2 * count - 1) if count > 1 else [])
        for frame, data in zip(frames[:count], pixels, strict=True):
            rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(7, 34)
            assert (rows[:, 0] == 0).all() and (rows[:, 1:].reshape(7, 11, 3) == frame).all()
        try:
            from PIL import Image
        except ImportError:
            continue
        picture = Image.open(tmp_path / "x.png")
        assert getattr(picture, "n_frames", 1) == count
        for k in range(count):
            picture.seek(k)
            assert (np.asarray(picture.convert("RGB")) == frames[k]).all()


def test_pixels_survive_the_round_trip():
    """uint8 -> [-1, 1] -> uint8 is the identity, -1 and 1 are black and white, and rounding is to
    the nearest."""
    x = torch.arange(256, dtype=torch.uint8)
    assert (
        torch.equal(ddpm.to_uint8(ddpm.to_float(x)), x)
        and ddpm.to_float(x).min() == -1
        and ddpm.to_float(x).max() == 1
    )
    for push in (0.9, -0.9):
        assert ddpm.to_uint8(ddpm.to_float(x) + push / 255).equal(x)


def test_slerp_keeps_the_length():
    """Ends at both noises, and keeps the length that noise has in between; the straight mean of two
    would have 0.7 of it."""
    a, b = torch.randn(2, 3, 1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    f = torch.linspace(0, 1, 5).view(1, 5, 1, 1, 1)
    way = ddpm.slerp(a, b, f)  # (3, 5, 1, 28, 28)
    assert torch.allclose(way[:, 0], a[:, 0], atol=1e-5)
    assert torch.allclose(way[:, 4], b[:, 0], atol=1e-5)
    lengths = way.flatten(2).norm(dim=2) / 28
    assert 0.9 < lengths.min() and lengths.max() < 1.1 and (a + b).norm(dim=(3, 4)).max() / 56 < 0.8


def test_nearest_is_brute_force():
    """The nearest training image over chunks equals a plain search."""
    g = torch.Generator().manual_seed(0)
    known, queries = (
        torch.randint(256, (25_000, 1, 2, 2), generator=g, dtype=torch.uint8),
        torch.randint(256, (9, 1, 2, 2), generator=g, dtype=torch.uint8),
    )
    distance, index = ddpm.nearest(queries, known)
    plain = (ddpm.to_float(queries)[:, None] - ddpm.to_float(known)[None]).flatten(2).norm(dim=2)
    assert torch.allclose(distance, plain.min(1).values, atol=1e-3)
    assert torch.allclose(plain.gather(1, index[:, None])[:, 0], plain.min(1).values, atol=1e-3)


# ---- The program ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tiny run by the command line, from another folder."""
    folder = tmp_path_factory.mktemp("trained")
    flags = "--train --steps 6 --every 3 --min-snr 5 --timesteps 20".split()
    return folder, call(ddpm, *TINY, *flags, cwd=folder)


def test_training_writes_what_it_promises(trained):
    """All files of a run, the settings first, the next command last; images and labels as FID tools
    read them."""
    folder, said = trained
    out = folder / "out/ddpm"
    for name in (
        "model.pt samples.png samples.npz loss.csv loss.png forward.png trajectory.png "
        "interpolation.png nearest.png step_000003.png"
    ).split():
        assert (out / name).stat().st_size > 0, name
    samples = np.load(out / "samples.npz")
    assert samples["arr_0"].shape == (20, 28, 28, 1) and samples["arr_0"].dtype == np.uint8
    assert samples["labels"].tolist() == [k // 2 for k in range(20)]
    assert (
        "torch" in said.splitlines()[0]
        and "parameters" in said.splitlines()[1]
        and "python ddpm.py" in said.splitlines()[-1]
    )
    assert not list(out.glob("*.part"))


def test_same_seed_same_samples(trained, monkeypatch):
    """Saved, loaded, sampled twice with one seed: the same bytes; with another seed, others."""
    folder, _ = trained
    monkeypatch.setattr(ddpm, "have_data", lambda args: False)  # no search for the nearest
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save = ["--seed", str(seed), "--save", str(folder / f"{name}.npz")]
        ddpm.main(["--sample", "--out", str(folder / "out/ddpm"), *save])
    a, b, c = (np.load(folder / f"{n}.npz")["arr_0"] for n in "abc")
    assert (a == b).all() and (a != c).any()


def test_verbs_run(trained):
    """--bpd prints its table, --inpaint keeps the known half, --compare draws, --export writes half
    the bytes."""
    folder, _ = trained
    said = call(ddpm, "--bpd", "--inpaint", "--export", folder / "half.pt", cwd=folder)
    assert re.search(r"prior L_T .*\n(  L_{t-1} .*\n)+  decoder L_0 .*\n  total +\d", said)
    assert (folder / "out/ddpm/bpd.png").exists() and (folder / "out/ddpm/inpaint.png").exists()
    half = torch.load(folder / "half.pt", weights_only=True)["ema"]
    assert all(v.dtype == torch.float16 for v in half.values())
    call(ddpm, "--compare", "out/ddpm/model.pt", "half.pt", cwd=folder)
    assert (folder / "out/ddpm/compare.png").exists()


def test_inpainting_keeps_the_known_half_exactly(trained):
    """The given half comes back to the last grey level, the other half does not."""
    folder, _ = trained
    ckpt = torch.load(folder / "out/ddpm/model.pt", weights_only=True)
    args = ddpm.parse_args(
        ["--inpaint", "--device", "cpu", "--out", str(folder / "i")], ckpt["config"]
    )
    ddpm.setup(args)
    model = ddpm.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    images, labels = ddpm.load_data(args, "test")
    real = images[[int((labels == c).nonzero()[0]) for c in range(10)]].repeat_interleave(2, 0)
    answers = ddpm.inpaint(args, model, answers=2, rounds=2)
    assert torch.equal(answers[:, :, :14], real[:, :, :14]) and not torch.equal(
        answers[:, :, 14:], real[:, :, 14:]
    )


@pytest.mark.parametrize("name", ddpm.TOYS)
def test_points_learn_to_flow(tmp_path, name):
    """Slides Neural flow fields, Converting samples: after a few hundred steps noise has moved
    towards the data."""
    flags = "--train --steps 300 --sample-steps 20 --width 64 --out here".split()
    said = call(ddpm, *flags, "--data", name, cwd=tmp_path)
    samples, data, noise = map(
        float, re.search(r"samples (.*), other data (.*), noise (\S+)", said).groups()
    )
    assert data < samples < 0.5 * noise
    assert (tmp_path / "here/flow.png").exists()
    assert np.load(tmp_path / "here/samples.npz")["arr_0"].shape == (2000, 2)


def test_own_data(tmp_path):
    """A .npz of colour images with labels, and a .npy of grey ones without, train and sample."""
    images = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(30) % 3)
    np.save(tmp_path / "own.npy", images[..., 0])
    for file, shape in (("own.npz", (20, 12, 12, 3)), ("own.npy", (20, 12, 12, 1))):
        flags = ["--train", "--steps", 2, "--flip", "--data", file, "--out", file[-3:]]
        call(ddpm, *TINY, *flags, cwd=tmp_path)
        assert np.load(tmp_path / file[-3:] / "samples.npz")["arr_0"].shape == shape


# ---- Bad input: one line, exit 2, nothing lost ---------------------------------------------------


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("bad")
    mnist = ROOT / "data/mnist"
    for name in ("cut", "altered"):
        (folder / name / "mnist").mkdir(parents=True)
        for file in mnist.iterdir():
            (folder / name / "mnist" / file.name).symlink_to(file)
        (folder / name / "mnist/train-labels-idx1-ubyte.gz").unlink()
    blob = bytearray((mnist / "train-labels-idx1-ubyte.gz").read_bytes())
    (folder / "cut/mnist/train-labels-idx1-ubyte.gz").write_bytes(blob[:1000])
    blob[500] ^= 1
    (folder / "altered/mnist/train-labels-idx1-ubyte.gz").write_bytes(blob)
    np.save(folder / "float.npy", np.zeros((5, 8, 8)))
    np.savez(folder / "shape.npz", images=np.zeros((5, 8, 8, 2), np.uint8))
    np.savez(folder / "labels.npz", images=np.zeros((5, 8, 8), np.uint8), labels=np.zeros(4, int))
    np.savez(folder / "nolabels.npz", images=np.zeros((5, 8, 8), np.uint8))
    (folder / "junk.npz").write_bytes(b"junk")
    (folder / "file").write_text("not a folder")
    for name, change in (("other", dict(file="vqvae")), ("junk", None)):
        (folder / name).mkdir()
        ckpt = torch.load(trained[0] / "out/ddpm/model.pt", weights_only=True)
        (folder / "half").mkdir(exist_ok=True), (folder / "tensor").mkdir(exist_ok=True)
        whole = (trained[0] / "out/ddpm/model.pt").read_bytes()
        (folder / "half/model.pt").write_bytes(whole[: len(whole) // 2])
        torch.save(torch.zeros(3), folder / "tensor/model.pt")
        if change:
            torch.save({**ckpt, **change}, folder / name / "model.pt")
        else:
            (folder / name / "model.pt").write_bytes(b"junk")
    return folder


@pytest.mark.parametrize(
    "command, words",
    [
        ("--train --data nonsense", ["--data nonsense", "mnist", "cifar10"]),
        ("--train --data {bad}/missing.npz", ["missing.npz", "No such file"]),
        (
            "--train --data-dir {bad}/cut",
            ["train-labels-idx1-ubyte.gz", "1,000 bytes", "d53e105ee54ea40749a09fcbcd1e9432"],
        ),
        ("--train --data-dir {bad}/altered", ["train-labels-idx1-ubyte.gz", "altered"]),
        ("--train --data {bad}/float.npy", ["float.npy", "uint8", "float64 (5, 8, 8)"]),
        ("--train --data {bad}/shape.npz", ["shape.npz", "(5, 8, 8, 2)"]),
        ("--train --data {bad}/labels.npz", ["labels.npz", "(4,)"]),
        ("--train --data {bad}/junk.npz", ["junk.npz", "cannot be read"]),
        ("--train --data {bad}/nolabels.npz --guidance 3", ["--guidance 3", "classes"]),
        ("--train --unconditional --guidance 3", ["--guidance 3", "classes"]),
        ("--train --steps 0", ["--steps", "'0'"]),
        ("--train --num -5", ["--num", "'-5'"]),
        ("--train --size huge", ["--size", "huge", "paper"]),
        ("--train --nonsense", ["--nonsense"]),
        ("--train --patch 5", ["--patch 5", "28"]),
        ("--train --device cuda:99", ["--device cuda:99", "cpu"]),
        ("--train --out {bad}/file", ["{bad}/file"]),
        ("--train --out {bad}/file/below", ["{bad}/file/below"]),
        ("--train --resume --out {bad}/nothing", ["{bad}/nothing/model.pt", "--train"]),
        ("--sample --out {bad}/other", ["other/model.pt", "vqvae.py"]),
        ("--sample --out {bad}/junk", ["junk/model.pt", "damaged"]),
        ("--sample --out {bad}/half", ["half/model.pt", "damaged"]),
        ("--sample --out {bad}/tensor", ["tensor/model.pt", "no checkpoint"]),
        ("--sample --out {trained} --guidance nan", ["--guidance"]),
        ("--train --data spiral --out {trained}", ["spiral", "mnist", "--out"]),
        ("--train --data spiral --bpd", ["--bpd", "spiral"]),
        ("--train --eta 2", ["--eta", "'2'"]),
        ("--train --lr -1", ["--lr", "-1"]),
        ("--compare {trained}/model.pt {bad}/junk/model.pt", ["junk/model.pt", "damaged"]),
        ("--sample --out {trained} --width 64", ["--width 64", "16"]),
        ("--sample --out {trained} --size paper", ["--size paper", "small"]),
        ("--train --resume --out {trained} --predict x0", ["--predict x0", "trained with v"]),
        ("--train --resume --out {trained}", ["--steps"]),
        ("--sample --out {trained} --save {bad}/file/x.npz", ["{bad}/file"]),
    ],
)
def test_bad_input(trained, bad_files, tmp_path, monkeypatch, capsys, command, words):
    """One line on stderr that names the flag or file and what to do; exit code 2; the user's
    checkpoint untouched."""
    places = dict(bad=bad_files, trained=trained[0] / "out/ddpm")
    model = places["trained"] / "model.pt"
    before = hashlib.md5(model.read_bytes()).hexdigest()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ddpm.main(command.format(**places).split())
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1, message
    for word in words:
        assert word.format(**places) in message
    assert hashlib.md5(model.read_bytes()).hexdigest() == before


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, trained):
    """A write that fails half-way leaves the old checkpoint whole and no temporary file."""
    path = tmp_path / "model.pt"
    ddpm.save_checkpoint(path, dict(a=1))
    original = Path.write_bytes

    def full(self, data):
        original(self, bytes(data)[:100])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        ddpm.save_checkpoint(path, dict(a=2))
    assert torch.load(path, weights_only=True) == dict(a=1) and [
        p.name for p in tmp_path.iterdir()
    ] == ["model.pt"]


def test_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    """A disk that fills up during training: exit code 2, one line with the file, nothing half-
    made."""
    original = Path.write_bytes

    def full(self, data):
        if "model.pt" in self.name:
            raise OSError(28, "No space left on device", str(self))
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit) as stop:
        ddpm.main([*TINY, "--train", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "No space left on device" in message and "model.pt" in message
    assert "Traceback" not in message and not list(tmp_path.glob("*.part"))


def test_guidance_needs_classes_when_sampling_too(tmp_path, few):
    """A model trained without labels samples, but not with guidance."""
    call(ddpm, *TINY, *few, "--train", "--steps", 2, "--unconditional", "--out", "o", cwd=tmp_path)
    message = call(ddpm, "--sample", "--guidance", 3, "--out", "o", cwd=tmp_path, code=2)
    assert "--guidance 3" in message


# ---- Downloads, against a local server -----------------------------------------------------------


@pytest.fixture
def server():
    """Serves /good whole, /wrong altered, /short cut off (fewer bytes than announced), anything
    else as 404."""
    content = bytes(range(256)) * 500

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"/good": content, "/wrong": content[::-1], "/short": content[:1000]}.get(
                self.path
            )
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", content
    web.shutdown()


def test_download_falls_back_over_mirrors(server, tmp_path):
    """404, cut off, wrong bytes and no server are passed over; the good mirror's file gets its
    name, whole."""
    url, content = server
    path = tmp_path / "new" / "file"
    mirrors = [
        f"{url}/absent",
        f"{url}/short",
        f"{url}/wrong",
        "http://127.0.0.1:9/",
        f"{url}/good",
    ]
    assert ddpm.fetch(mirrors, path, hashlib.md5(content).hexdigest()) == content
    assert path.read_bytes() == content and [p.name for p in path.parent.iterdir()] == ["file"]


def test_download_that_fails_leaves_nothing(server, tmp_path, capsys):
    """Without a good mirror: one line with file, address, checksum and place, each fault named;
    nothing is left behind."""
    url, content = server
    with pytest.raises(SystemExit) as stop:
        ddpm.fetch(
            [f"{url}/absent", f"{url}/short", f"{url}/wrong", "http://127.0.0.1:9/x"],
            tmp_path / "file",
            "0" * 32,
        )
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and not list(tmp_path.iterdir())
    for part in (
        str(tmp_path / "file"),
        f"{url}/absent",
        "0" * 32,
        "404",
        "wrong bytes",
        "refused",
    ):
        assert part in message


def test_cifar_archive_is_unpacked(tmp_path, monkeypatch):
    """The CIFAR-10 archive, fetched once, yields all its files, read as records of a label and
    three colour planes."""
    import io
    import tarfile

    records = np.random.default_rng(0).integers(0, 10, (6, 20, 3073), np.uint8)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    archive, sums = tmp_path / "remote.tar.gz", {}
    with tarfile.open(archive, "w:gz") as tar:
        for name, part in zip(names, records):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = part.nbytes
            tar.addfile(info, io.BytesIO(part.tobytes()))
            sums[name] = hashlib.md5(part.tobytes()).hexdigest()
    sums = {"cifar-10-binary.tar.gz": hashlib.md5(archive.read_bytes()).hexdigest(), **sums}

    def fetch(urls, path, checksum):
        assert (
            urls == ["https://mirror/cifar-10-binary.tar.gz"]
            and checksum == sums["cifar-10-binary.tar.gz"]
        )
        path.parent.mkdir(parents=True)
        return archive.read_bytes()

    monkeypatch.setattr(ddpm, "fetch", fetch)
    monkeypatch.setitem(ddpm.DATASETS, "cifar10", (["https://mirror/"], sums))
    args = ddpm.parse_args(
        ["--train", "--data", "cifar10", "--data-dir", str(tmp_path / "d"), "--device", "cpu"]
    )
    args.device = "cpu"
    images, labels = ddpm.load_data(args, "train")
    assert images.shape == (100, 3, 32, 32) and torch.equal(
        labels, torch.from_numpy(records[:5, :, 0].reshape(-1)).long()
    )
    assert (
        images[20, 2, 0, 5] == records[1, 0, 1 + 2 * 1024 + 5]
        and len(ddpm.load_data(args, "test")[0]) == 20
    )
