"""ddpm.py against oracles: closed forms, analytic Gaussians, published counts, diffusers."""

import functools
import io
import math
import tarfile
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

import ddpm

f64 = functools.partial(torch.tensor, dtype=torch.float64)


# ---- 1. Forward process --------------------------------------------------------------------------


def test_schedule_golden_numbers():
    """Slide Noise schedule: abar at chosen t, from an independent computation in float64; abar_0 is
    1 and abar falls."""
    linear, cosine = ddpm.make_abar("linear"), ddpm.make_abar("cosine")
    for abar in (linear, cosine):
        assert abar.dtype == torch.float64 and len(abar) == 1001
        assert abar[0] == 1 and (abar.diff() < 0).all()
    for t, value in ((1, 0.9999), (500, 0.0785872), (1000, 4.03583e-05)):
        assert linear[t].item() == pytest.approx(value, rel=2e-6)
    assert cosine[1000].item() == pytest.approx(2.42877e-09, rel=2e-6)


def test_schedules_are_those_of_diffusers():
    theirs = diffusers.DDPMScheduler(1000, beta_schedule="linear").alphas_cumprod.double()
    assert torch.allclose(ddpm.make_abar("linear")[1:], theirs, rtol=2e-4, atol=0)
    theirs = diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert torch.allclose(ddpm.make_abar("cosine")[1:-1], theirs[:-1].double(), rtol=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_closed_form_is_the_chain(schedule):
    """Slide Noise schedule: t single steps x_t = sqrt(1 - beta) x + sqrt(beta) eps have the mean
    and variance of the closed form."""
    abar = ddpm.make_abar(schedule).tolist()
    scale, var = 1.0, 0.0
    for t in range(1, 301):
        beta = 1 - abar[t] / abar[t - 1]
        scale, var = scale * math.sqrt(1 - beta), var * (1 - beta) + beta
        assert ddpm.q_sample(1.0, 0.0, abar[t]) == pytest.approx(scale, rel=1e-9)
        assert ddpm.q_sample(0.0, 1.0, abar[t]) ** 2 == pytest.approx(var, rel=1e-9)


# ---- 2. Targets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 500, 1000])
def test_targets_convert_exactly(t):
    """Slide Predicting images instead of noise: each target gives x_0 back, and a squared error in
    it is one in x_0 times SNR (eps), 1 (x0) or SNR + 1 (v)."""
    g = torch.Generator().manual_seed(0)
    a_t = ddpm.make_abar("linear")[t].item()
    x0, eps, noise = torch.randn(3, 5, 7, generator=g, dtype=torch.float64)
    xt, snr = ddpm.q_sample(x0, eps, a_t), a_t / (1 - a_t)
    for predict, factor in (("eps", snr), ("x0", 1.0), ("v", snr + 1)):
        target = ddpm.target_of(x0, eps, a_t, predict)
        assert torch.allclose(ddpm.x0_of(target, xt, a_t, predict), x0, atol=1e-10)
        wrong = target + 0.1 * noise
        x0_error = (ddpm.x0_of(wrong, xt, a_t, predict) - x0).square().sum().item()
        assert (wrong - target).square().sum().item() == pytest.approx(factor * x0_error, rel=1e-6)


def test_v_survives_zero_signal():
    """At abar_T = 0 eps says nothing about x_0, but x0 and v do."""
    for predict in ("x0", "v"):
        assert math.isfinite(ddpm.x0_of(0.3, 2.0, 0.0, predict))


def test_loss_gives_every_image_its_own_time():
    """The loss of a batch is the mean of the losses of its images at their times, to float32."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 1, 6, 6, generator=g)
    t, abar = torch.tensor([1, 300, 600, 1000]), ddpm.make_abar("cosine").float()
    model = lambda x, t, y: x * t.view(-1, 1, 1, 1) / 1000
    whole = ddpm.diffusion_loss(model, x0, None, t, eps, abar, "v")
    single = [ddpm.diffusion_loss(model, x0[i:i + 1], None, t[i:i + 1], eps[i:i + 1], abar, "v")
              for i in range(4)]
    by_hand = (abar[300].sqrt() * x0[1] + (1 - abar[300]).sqrt() * eps[1]) * 0.3
    by_hand = (by_hand - abar[300].sqrt() * eps[1] + (1 - abar[300]).sqrt() * x0[1]).square().mean()
    assert torch.allclose(whole, torch.stack(single).mean()) and torch.allclose(single[1], by_hand)


# ---- 3. Network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, published", [
    ({}, 35_746_307),  # CIFAR-10
    (dict(mults=[1, 1, 2, 2, 4, 4], attention=[4]), 113_673_219)])  # CelebA-HQ 256
def test_published_parameter_counts(changes, published):
    """--size paper is the network of DDPM, but for the embedding of classes, which it has not."""
    names = ("patch", "width", "mults", "blocks", "attention", "dropout")
    options = {name: ddpm.HPARAMS[name][2] for name in names} | changes
    with torch.device("meta"):
        model = ddpm.UNet(3, 10, **options)
    count = sum(p.numel() for p in model.parameters())
    assert count - model.label.weight.numel() == published


def tiny_unet(**changes):
    options = dict(patch=2, width=16, mults=[1, 1], blocks=1, attention=[1], dropout=0.0)
    return ddpm.UNet(1, 10, **options | changes)


def test_network_depends_on_time_and_class_after_training():
    """Slide Add time dependency: at first the output is 0 whatever t; after a few steps t and y
    matter."""
    torch.manual_seed(0)
    model, abar = tiny_unet(), ddpm.make_abar("linear").float()
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 7, 10])
    t = torch.tensor([1, 300, 600, 1000])
    assert model(x, t, y).abs().max() == 0
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # the layers before a zero layer move from the second step on
        opt.zero_grad()
        ddpm.diffusion_loss(model, x, y, t, torch.randn_like(x), abar, "eps").backward()
        opt.step()
    assert (model(x, t, y) - model(x, t.flip(0), y)).abs().max() > 1e-4
    assert (model(x, t, y) - model(x, t, y.flip(0))).abs().max() > 1e-5


def test_time_embedding_tells_times_apart():
    """Times in 0..1, unscaled, would be 0.027 apart; in 0..1000 they are 9.1 apart, at a norm of
    11.3."""
    far = ddpm.time_embedding(torch.tensor([500.0, 510.0]), 256)
    near = ddpm.time_embedding(torch.tensor([0.50, 0.51]), 256)
    assert (far[0] - far[1]).norm().item() == pytest.approx(9.1, abs=0.05)
    assert far[0].norm().item() == pytest.approx(11.3, abs=0.05)
    assert (near[0] - near[1]).norm().item() == pytest.approx(0.027, abs=5e-4)


def test_attention_sees_all_positions():
    """It equals softmax(q k^T / sqrt(C)) v written out, and reaches every position."""
    torch.manual_seed(0)
    layer, x = ddpm.Attention(16), torch.randn(2, 16, 3, 5)
    torch.nn.init.normal_(layer.out.weight)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)  # (2, 16, 15) each
    weights = torch.einsum("bci,bcj->bij", q, k).div(4).softmax(dim=2)
    expected = x + layer.out(torch.einsum("bij,bcj->bci", weights, v).view(2, 16, 3, 5))
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (14, 10), (6, 26)])
def test_any_size_goes_in_and_comes_out(size):
    """Odd sizes on the way down (7, 13) are met again on the way up."""
    model = tiny_unet(mults=[1, 1, 1], attention=[2])
    x = torch.randn(2, 1, *size)
    assert model(x, torch.tensor([1, 9]), torch.tensor([0, 10])).shape == x.shape


# ---- 5. Samplers: exact, with the optimal model for Gaussian data --------------------------------


def gaussian_model(abar, mean, var):
    """E[x_0 | x_t] for data N(mean, var), elementwise; it predicts x0."""
    def model(x, t, y):
        a = abar[t].view(-1, *[1] * (x.ndim - 1))
        return mean + var * a.sqrt() / (a * var + 1 - a) * (x - a.sqrt() * mean)

    return model


def options(sampler, steps, predict="x0", guidance=1):
    return SimpleNamespace(sampler=sampler, sample_steps=steps, schedule="linear", predict=predict,
                           guidance=guidance, classes=10)


def final_variance(monkeypatch, var, sampler, steps):
    """The variance of the samples, exactly: with this model every step is linear in x and the
    noise, so a batch whose rows get a unit of noise each, at one place of the chain, yields all
    coefficients. (The unit is 0.001, so that nothing is clipped.)"""
    calls = iter(range(steps))

    def unit(x):
        z = torch.zeros_like(x)
        z[1 + next(calls)] = 1e-3
        return z

    monkeypatch.setattr(torch, "randn_like", unit)
    x = torch.zeros(steps + 1, 1, dtype=torch.float64)
    x[0] = 1e-3
    y = torch.zeros(steps + 1, dtype=torch.long)
    model = gaussian_model(ddpm.make_abar("linear"), 0.0, var)
    return ddpm.sample(model, x, y, options(sampler, steps)).square().sum().item() * 1e6


@pytest.mark.parametrize("sampler, steps, expected", [
    ("ddpm", 1000, (0.99990, 0.25075, 0.04037)),
    ("ddim", 10, (0.688, 0.137, 0.0095)),
    ("ddim", 50, (0.928, 0.222, 0.0302)),
    ("ddim", 1000, (0.9963, 0.2485, 0.0394)),
    ("dpm++", 10, (0.899, 0.164, 0.0100)),
    ("dpm++", 20, (1.0027, 0.229, 0.0223)),
    ("dpm++", 50, (1.0061, 0.2506, 0.0357)),
])
def test_sampler_variances(monkeypatch, sampler, steps, expected):
    """Slide Sampling: final variances for data of variance 1, 0.25 and 0.04, propagated without
    Monte Carlo, as an independent computation gives them."""
    for var, value in zip((1.0, 0.25, 0.04), expected):
        digits = 4 if value < 0.02 else len(str(value).split(".")[1])
        found = final_variance(monkeypatch, var, sampler, steps)
        assert round(found, digits) == pytest.approx(value)


@pytest.mark.parametrize("sampler, bound", [("ddpm", 6e-6), ("ddim", 2e-3), ("dpm++", 2e-3)])
def test_sampler_means(monkeypatch, sampler, bound):
    """From x_T = 0 the mean of the data is reached: abar_T is near enough to 0."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    model = gaussian_model(ddpm.make_abar("linear"), 0.5, 0.25)
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    assert ddpm.sample(model, x, y, options(sampler, 1000)).item() == pytest.approx(0.5, abs=bound)


def test_ancestral_step_is_the_slide_and_the_posterior():
    """The mean is the slide's formula in eps; as that of q(x_s | x_t, x_0) it satisfies coef_0 +
    coef_t sqrt(abar_t) = sqrt(abar_s), with 1/var = alpha/beta + 1/(1 - abar_s)."""
    abar = ddpm.make_abar("linear").tolist()
    xt, eps = 0.7, -0.4
    for t in (1, 2, 500, 1000):
        a_t, a_s = abar[t], abar[t - 1]
        alpha, beta = a_t / a_s, 1 - a_t / a_s
        slide = (xt - (1 - alpha) / math.sqrt(1 - a_t) * eps) / math.sqrt(alpha)
        x0 = ddpm.x0_of(eps, xt, a_t, "eps")
        assert ddpm.ddpm_step(xt, x0, a_t, a_s, 0.0) == pytest.approx(slide, rel=1e-9)
        coef_0, coef_t = (ddpm.ddpm_step(*pair, a_t, a_s, 0.0) for pair in ((0, 1), (1, 0)))
        assert coef_0 + coef_t * math.sqrt(a_t) == pytest.approx(math.sqrt(a_s), rel=1e-9)
        assert ddpm.ddpm_step(0.0, 0.0, a_t, a_s, 1.0) ** 2 == pytest.approx(beta, rel=1e-9)
        if t > 1:  # Bayes: precisions of x_t given x_s and of x_s given x_0 add up
            precision = alpha / beta + 1 / (1 - a_s)
            assert coef_t == pytest.approx(math.sqrt(alpha) / beta / precision, rel=1e-9)
            assert coef_0 == pytest.approx(math.sqrt(a_s) / (1 - a_s) / precision, rel=1e-9)


def test_dpm_solver_begins_as_ddim():
    """DPM-Solver++(2M) is a DDIM step where the estimate is the first, or has not changed."""
    for a_t, a_s in ((1e-9, 0.01), (0.3, 0.31), (0.5, 1 - 1e-4), (0.9, 1.0)):
        ddim = ddpm.ddim_step(0.7, -0.4, a_t, a_s)
        for previous in ((None, None), (-0.4, 1e-10)):
            assert ddpm.dpmpp_step(0.7, -0.4, a_t, a_s, *previous) == pytest.approx(ddim, rel=1e-9)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("steps", [30, 7])
def test_last_step_returns_the_estimate(sampler, steps):
    """No noise is added in the last step (the slide's z > 1 means t > 1): the sample is the model's
    last estimate of x_0."""
    model, y = lambda x, t, y: torch.full_like(x, 0.25), torch.zeros(4, dtype=torch.long)
    out = ddpm.sample(model, torch.randn(4, 3), y, options(sampler, steps))
    assert torch.allclose(out, torch.tensor(0.25))


def test_only_ancestral_sampling_draws():
    """DDIM and DPM-Solver++ do not depend on the random state."""
    model, y = gaussian_model(ddpm.make_abar("linear"), 0.0, 0.5), torch.zeros(2, dtype=torch.long)
    for sampler, same in (("ddpm", False), ("ddim", True), ("dpm++", True)):
        ends = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            ends.append(ddpm.sample(model, torch.ones(2, 2).double(), y, options(sampler, 10)))
        assert torch.equal(*ends) == same


@pytest.mark.parametrize("steps, expected", [
    (1000, list(range(1000, 0, -1))), (4, [1000, 750, 500, 250])])
def test_every_level_is_visited(steps, expected):
    """Sampling with T steps visits T..1; with fewer, T first and equal strides."""
    seen = []

    def model(x, t, y):
        seen.append(t.item())
        return x

    ddpm.sample(model, torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), options("ddim", steps))
    assert seen == expected


def test_clip_is_live():
    """A wild output moves the estimate of x_0 to the border of [-1, 1], not beyond, and eps is
    derived again from the clipped x_0: with the model's own eps the states would run away."""
    wild, y = lambda x, t, y: torch.full_like(x, 1e4), torch.zeros(2, dtype=torch.long)
    for sampler in ("ddpm", "ddim", "dpm++"):
        states, guesses = [], []
        ddpm.sample(wild, torch.full((2, 3), 0.5), y, options(sampler, 50, "eps"),
                    on_step=lambda x, x0: (states.append(x), guesses.append(x0)))
        assert torch.stack(states).abs().max() < 6 and (torch.stack(guesses) == -1).all()


def test_guidance():
    """w = 1 is the conditional model and w = 0 the unconditional one; w = 3 is uncond + 3 (cond -
    uncond)."""
    torch.manual_seed(0)
    model = tiny_unet().eval()
    for p in model.parameters():  # the output layer starts at zero: then every w would agree
        torch.nn.init.normal_(p, std=0.1)
    x, y, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3]), torch.full((3,), 1000)
    guess = {}
    for w in (0, 1, 3.0):
        ddpm.sample(model, x, y, options("ddim", 1, guidance=w),
                    on_step=lambda xt, x0: guess.update({w: x0}))
    with torch.no_grad():
        cond, uncond = model(x, t, y), model(x, t, torch.full((3,), 10))
    assert torch.equal(guess[1], cond.clamp(-1, 1)) and torch.equal(guess[0], uncond.clamp(-1, 1))
    assert torch.allclose(guess[3.0], (uncond + 3 * (cond - uncond)).clamp(-1, 1), atol=1e-5)
    assert not torch.allclose(guess[0], guess[1], atol=1e-3)


@pytest.mark.parametrize("sampler, scheduler", [
    ("ddpm", diffusers.DDPMScheduler(
        1000, variance_type="fixed_large", timestep_spacing="trailing")),
    ("ddim", diffusers.DDIMScheduler(1000, set_alpha_to_one=True, timestep_spacing="trailing")),
    ("dpm++", diffusers.DPMSolverMultistepScheduler(
        1000, timestep_spacing="trailing", final_sigmas_type="zero", lower_order_final=False)),
])
def test_whole_trajectories_agree_with_diffusers(monkeypatch, sampler, scheduler):
    """The same noise and the same model, which predicts eps: all states on the way, in 20 steps of
    DDIM and DPM-Solver++ and 1,000 of DDPM. Their level t is our t + 1."""
    abar = ddpm.make_abar("linear")
    x0_model = gaussian_model(abar, 0.2, 0.3)

    def model(x, t, y):  # the eps that belongs to the estimate of x_0
        a = abar[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * x0_model(x, t, y)) / (1 - a).sqrt()

    steps = 1000 if sampler == "ddpm" else 20
    g = torch.Generator().manual_seed(0)
    start = 0.5 * torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64)
    noise = list(0.1 * torch.randn(steps, 2, 1, 4, 4, generator=g, dtype=torch.float64))
    theirs, draws = [start], iter(noise)
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *a, **k: next(draws),
                        raising=False)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        eps = model(theirs[-1], torch.full((2,), t.item() + 1), None)
        theirs.append(scheduler.step(eps, t, theirs[-1]).prev_sample.double())
    ours, draws = [], iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws))
    y = torch.zeros(2, dtype=torch.long)
    last = ddpm.sample(model, start, y, options(sampler, steps, "eps"),
                       on_step=lambda x, x0: ours.append(x))
    assert torch.allclose(torch.stack([*ours, last]), torch.stack(theirs), atol=2e-3)


# ---- 6. Training ---------------------------------------------------------------------------------


def test_training_draws_every_level_and_drops_labels_one_by_one(monkeypatch, tmp_path):
    """t covers 1..T, both ends, evenly; labels are dropped for single images, about 1 in 10; --flip
    mirrors single images; nothing of it is the same in the next step."""
    seen, T = [], 50
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 4, 4).clone()
    images[..., 0] = 255  # the left column is white

    def spy(model, x0, y, t, eps, abar, predict):
        seen.append((x0, y, t, eps))
        return model(x0[:1], t[:1], y[:1]).mean()

    monkeypatch.setattr(ddpm, "T", T)
    monkeypatch.setattr(ddpm, "diffusion_loss", spy)
    monkeypatch.setattr(ddpm, "load_data", lambda *a: (images, torch.arange(40) % 10))
    args = ddpm.parse_args(
        ["--width", "16", "--mults", "1", "--steps", "60", "--batch-size", "40", "--every", "99",
         "--sample-steps", "2", "--flip", "0.3", "--device", "cpu", "--out", str(tmp_path)])
    ddpm.train(args)
    x0, y, t, eps = (torch.stack(a) for a in zip(*seen))  # (60, 40, ...)
    counts = t.flatten().bincount(minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1 and 25 < counts[1:].min() and counts.max() < 75
    dropped, mirrored = y == 10, x0[:, :, 0, 0, 3] == 1
    for chosen, share in ((dropped, 0.1), (mirrored, 0.3)):
        assert abs(chosen.float().mean() - share) < 0.04
        assert (chosen.any(1) & ~chosen.all(1)).float().mean() > 0.8
    assert (x0[:, :, 0, 0, :] == 1).any(2).all() and x0.max() == 1 and x0.min() == -1
    assert eps.mean().abs() < 0.05 and abs(eps.std() - 1) < 0.05
    assert not torch.equal(eps[0], eps[1]) and not torch.equal(t[0], t[1])


def test_ema_is_a_mean_over_the_last_tenth():
    """After n steps the weight of step i is w_i = a_i (1 - a_{i+1}) ... (1 - a_n), where a_i is
    10/(i + 10): the sum is 1, the mean age n/11. Constant weights are met exactly."""
    n = 500
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step in range(1, n + 1):
        torch.nn.init.constant_(model.weight, step)
        torch.nn.init.constant_(model.bias, 0.5)
        ddpm.ema_update(ema, model, step)
    a = 10 / (np.arange(1, n + 1) + 10)
    w = a * np.append(np.cumprod((1 - a)[::-1])[::-1][1:], 1)
    assert ema.weight.dtype == torch.float32 and w.sum() == pytest.approx(1, abs=1e-9)
    assert ema.weight.item() == pytest.approx((w * np.arange(1, n + 1)).sum(), rel=1e-5)
    assert n - ema.weight.item() == pytest.approx(n / 11, rel=0.05)
    assert ema.bias.item() == pytest.approx(0.5)


# ---- 7. Sampling, data and pictures --------------------------------------------------------------


def test_noise_is_drawn_once(monkeypatch):
    """Classes take turns; the noise of a step is not x_T again, nor that of another batch."""
    args = ddpm.parse_args(["--device", "cpu", "--sampler", "ddpm"])
    args.shape, args.classes, seen = [1, 4, 4], 3, []

    def watch(model, x, y, args, on_step):
        seen.extend([x, torch.randn_like(x)])
        return x

    monkeypatch.setattr(ddpm, "sample", watch)
    images, labels = ddpm.generate(args, None, 500)
    assert images.shape == (500, 1, 4, 4) and labels[:5].tolist() == [0, 1, 2, 0, 1]
    assert len(seen) == 4 and len({x.sum().item() for x in seen}) == 4


def test_own_data(tmp_path):
    """An .npz of images, with labels or without: every tenth image is for testing."""
    images = np.random.default_rng(0).integers(0, 256, (30, 5, 7, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(30) % 3)
    np.savez(tmp_path / "b.npz", images=images)
    train, labels = ddpm.load_data(f"{tmp_path}/a.npz", "train", None)
    test, test_labels = ddpm.load_data(f"{tmp_path}/a.npz", "test", None)
    assert train.shape == (27, 3, 5, 7) and test.shape == (3, 3, 5, 7)
    assert train[1, 2, 3, 4] == images[1, 3, 4, 2]
    assert labels[1] == 1 and labels.dtype == torch.int64
    assert (test[1].permute(1, 2, 0).numpy() == images[19]).all() and test_labels[1] == 19 % 3
    assert (ddpm.load_data(f"{tmp_path}/b.npz", "train", None)[1] == 0).all()


def test_mnist_is_read():
    """The number of images of each class, and the first labels, as published."""
    images, labels = ddpm.load_data("mnist", "train", ddpm.HERE / "data")
    assert images.shape == (60_000, 1, 28, 28) and labels[:5].tolist() == [5, 0, 4, 1, 9]
    published = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels.bincount().tolist() == published
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_cifar_is_read(tmp_path):
    """The official archive: five training files and one for testing, records of a label and three
    colour planes."""
    records = np.random.default_rng(0).integers(0, 10, (6, 20, 3073), np.uint8)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    (tmp_path / "cifar10").mkdir()
    with tarfile.open(tmp_path / "cifar10/cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, part in zip(names, records):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = part.nbytes
            tar.addfile(info, io.BytesIO(part.tobytes()))
    images, labels = ddpm.load_data("cifar10", "train", tmp_path)
    assert images.shape == (100, 3, 32, 32)
    assert labels.tolist() == records[:5, :, 0].flatten().tolist()
    assert images[20, 2, 0, 5] == records[1, 0, 1 + 2 * 1024 + 5]
    assert (ddpm.load_data("cifar10", "test", tmp_path)[1].numpy() == records[5, :, 0]).all()
