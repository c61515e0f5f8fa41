"""ddpm.py against oracles: analytic Gaussians, published counts and diffusers."""

import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from inprocess import call

import ddpm


@pytest.mark.parametrize("schedule, name, last", [
    ("linear", "linear", 4.03583e-05), ("cosine", "squaredcos_cap_v2", 2.42877e-09)])
def test_schedules_targets_and_loss(schedule, name, last):
    """abar, x_t, v and the loss are those of diffusers. Slide Predicting images instead of noise: a
    squared error in a target is one in x_0 times SNR (eps), 1 (x0) or SNR + 1 (v)."""
    abar, theirs = ddpm.make_abar(schedule), diffusers.DDPMScheduler(beta_schedule=name)
    assert abar[0] == 1 and abar[1000].item() == pytest.approx(last, rel=2e-6)
    assert torch.allclose(abar[1:-1], theirs.alphas_cumprod[:-1].double(), 2e-4, 1e-10)
    x0, eps, off = torch.randn(3, 4, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    t, model = torch.tensor([1, 300, 600, 1000]), lambda x, t, y: x * t[:, None, None, None] / 1000
    out = model(theirs.add_noise(x0, eps, t - 1), t, None)  # their level t is our t + 1
    loss = (out - theirs.get_velocity(x0, eps, t - 1)).square().mean()
    assert torch.allclose(ddpm.diffusion_loss(model, x0, None, t, eps, abar, "v"), loss, 1e-4)
    for a_t in abar[t].tolist():
        xt, snr = ddpm.q_sample(x0, eps, a_t), a_t / (1 - a_t)
        for predict, factor in (("eps", snr), ("x0", 1), ("v", snr + 1)):
            wrong = ddpm.target_of(x0, eps, a_t, predict) + off
            error = ddpm.x0_of(wrong, xt, a_t, predict) - x0
            assert torch.allclose(off.square().sum(), factor * error.square().sum())
    assert ddpm.x0_of(0.3, 2.0, 0.0, "x0") == -ddpm.x0_of(0.3, 2.0, 0.0, "v")  # without signal


def test_network():
    """--size paper has the parameters of DDPM (CIFAR-10; CelebA), but for classes. Any size comes
    out, as 0 at first. Times are embedded as in diffusers; attention is that of the paper."""
    cifar = {name: row[2] for name, row in [*ddpm.HPARAMS.items()][:6]}  # the network's flags
    celeba = cifar | dict(mults=[1, 1, 2, 2, 4, 4], attention=[4])
    for options, published in ((cifar, 35_746_307), (celeba, 113_673_219)):
        with torch.device("meta"):
            model = ddpm.UNet(3, 10, **options)
        assert sum(p.numel() for p in model.parameters()) - model.label.weight.numel() == published
    model, t = ddpm.UNet(1, 10, 2, 16, [1, 1, 1], 1, [1], 0.0), torch.tensor([1, 1000])
    for size in ((14, 10), (6, 26)):  # odd on the way down (7, 13)
        assert torch.equal(model(torch.randn(2, 1, *size), t, t % 11), torch.zeros(2, 1, *size))
    theirs = diffusers.models.embeddings.get_timestep_embedding(t, 256, True, 0)
    assert torch.allclose(ddpm.time_embedding(t, 256), theirs, atol=1e-4)
    layer, x = ddpm.Attention(16), torch.randn(2, 16, 3, 5)
    torch.nn.init.normal_(layer.out.weight)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)  # (2, 16, 15) each
    h = torch.einsum("bij,bcj->bci", torch.einsum("bci,bcj->bij", q, k).div(4).softmax(2), v)
    assert torch.allclose(layer(x), x + layer.out(h.view(x.shape)), atol=1e-5)


def sample(model, x, sampler, steps, schedule, guidance=1, y=torch.tensor([0]), on_step=None):
    args = SimpleNamespace(sampler=sampler, sample_steps=steps, schedule=schedule, predict="x0",
                           guidance=guidance, classes=10)
    return ddpm.sample(model, x, y.expand(len(x)), args, on_step)


@pytest.mark.parametrize("sampler, steps, variances, name, options", [
    ("ddpm", 1000, (0.99990, 0.25075, 0.04037), "DDPM", dict(variance_type="fixed_large")),
    ("ddim", 10, (0.688, 0.137, 0.0095), "DDIM", {}),
    ("dpm++", 20, (1.0027, 0.229, 0.0223), "DPMSolverMultistep",
     dict(final_sigmas_type="zero", lower_order_final=False))])
def test_samplers(monkeypatch, sampler, steps, variances, name, options):
    """States are those of diffusers, also if a wild model is clipped; the last step adds no noise
    (the slide's z > 1 means t > 1). With the optimal model for N(mean, var), steps are linear: if
    every row starts with, or gets, one unit of noise, the squares add up to the final variances."""
    abar, scheduler = ddpm.make_abar("cosine"), getattr(diffusers, f"{name}Scheduler")(
        1000, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing",
        prediction_type="sample", **options)

    def optimal(x, t, y, mean=0.0, var=torch.tensor([1, 0.25, 0.04])):
        a = abar[t][:, None]
        return mean + var * a.sqrt() / (a * var + 1 - a) * (x - mean * a.sqrt())

    for model in (lambda *a: optimal(*a, 0.2, 0.3), lambda x, t, y: torch.full_like(x, -1e4)):
        theirs, ours = [torch.randn(2, 16, dtype=torch.float64) / 2], []
        scheduler.set_timesteps(50)
        torch.manual_seed(1)
        for t in scheduler.timesteps:
            x0 = model(theirs[-1], t.repeat(2) + 1, None).clamp(-1, 1)
            theirs.append(scheduler.step(x0, t, theirs[-1]).prev_sample.double())
        torch.manual_seed(1)
        last = sample(model, theirs[0], sampler, 50, "cosine", on_step=lambda *a: ours.append(a[0]))
        assert torch.allclose(torch.stack([*ours, last]), torch.stack([*theirs[:-1], x0]), 0, 2e-3)
    abar = ddpm.make_abar("linear")
    units = iter(1e-3 * torch.eye(steps + 1, dtype=torch.float64)[:, :, None])  # so none is clipped
    monkeypatch.setattr(torch, "randn_like", lambda x: next(units).expand_as(x))
    out = sample(optimal, next(units).repeat(1, 3), sampler, steps, "linear") / 1e-3
    assert out.square().sum(0).tolist() == pytest.approx(variances, abs=6e-4)


def test_guidance():
    """The estimate is uncond + w (cond - uncond), clipped; the class and the time matter."""
    model, x = ddpm.UNet(1, 10, 2, 16, [1, 1], 1, [1], 0.0), torch.randn(3, 1, 8, 8)
    for p in model.parameters():  # the output layer starts at zero: then every w would agree
        torch.nn.init.normal_(p, std=0.1)
    y, t = torch.tensor([1, 2, 3]), torch.full((3,), 1000)
    with torch.no_grad():
        cond, uncond, sooner = model(x, t, y), model(x, t, 0 * y + 10), model(x, t - 500, y)
    for w in (0, 1, 3.0):
        found = sample(model, x, "ddim", 1, "linear", w, y)  # of one step: the estimate
        assert torch.allclose(found, (uncond + w * (cond - uncond)).clamp(-1, 1), atol=1e-5)
    assert min((cond - other).abs().max() for other in (uncond, sooner)) > 1e-3


def test_training(monkeypatch, tmp_path):
    """t covers 1..T, both ends; 1 in 10 labels is dropped, and --flip mirrors, for single images;
    the next step draws anew. Average of weights that equal the step: the mean age is n / 11."""
    images, seen = torch.zeros(40, 1, 4, 4, dtype=torch.uint8), []
    images[..., 0] = 255  # the left column is white
    fakes = dict(T=50, load_data=lambda *a: (images, torch.arange(40) % 10),
                 diffusion_loss=lambda model, *a: seen.append(a[:4]) or model.weight.sum(),
                 build=lambda args: torch.nn.Linear(1, 1), generate=lambda *a: [images])
    for name, fake in fakes.items():
        monkeypatch.setattr(ddpm, name, fake)
    ddpm.train(ddpm.parse_args(
        f"--steps 60 --batch-size 40 --flip 0.3 --device cpu --out {tmp_path}".split()))
    x0, y, t, eps = (torch.stack(a) for a in zip(*seen))  # (60, 40, ...)
    counts, sides = t.flatten().bincount(minlength=51), x0[:, :, 0, 0, [0, 3]]
    assert counts[0] == 0 and len(counts) == 51 and 25 < counts[1:].min() and counts.max() < 75
    for chosen, share in ((y == 10, 0.1), (sides[..., 1] == 1, 0.3)):
        assert abs(chosen.float().mean() - share) < 0.04
        assert (chosen.any(1) & ~chosen.all(1)).float().mean() > 0.8
    assert (sides.sum(2) == 0).all() and eps.mean().abs() < 0.05 and abs(eps.std() - 1) < 0.05
    assert not torch.equal(eps[0], eps[1]) and not torch.equal(t[0], t[1])
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step in range(1, 501):
        torch.nn.init.constant_(model.weight, step)
        ddpm.ema_update(ema, model, step)
    assert ema.weight.item() == pytest.approx(500 - 500 / 11, rel=1e-5)


def test_noise_is_drawn_once(monkeypatch):
    """Classes take turns; the noise of a step is not x_T again, nor that of another batch."""
    args, seen = ddpm.parse_args(["--device", "cpu"], dict(shape=[1, 4, 4], classes=3)), []
    monkeypatch.setattr(ddpm, "sample", lambda model, x, *_: seen.append(x) or torch.randn_like(x))
    images, labels = ddpm.generate(args, None, 500)
    sums = {x[0].sum().item() for x in [*map(ddpm.to_uint8, seen), *images.split(250)]}
    assert images.shape == (500, 1, 4, 4) and labels[:4].tolist() == [0, 1, 2, 0] and len(sums) == 4


def test_data(tmp_path):
    """Every tenth image of an .npz file is for testing; it may lack labels; odd sizes do not fit
    patches of two pixels. CIFAR-10 are labels with three colour planes. MNIST's classes, first
    labels and mean are as published."""
    rng, test = np.random.default_rng(0), np.arange(30) % 10 == 9
    own, cifar = (rng.integers(0, 256, shape, np.uint8) for shape in ((30, 5, 7, 3), (6, 20, 3073)))
    np.savez(tmp_path / "a.npz", images=own, labels=np.arange(30) % 4)
    np.savez(tmp_path / "b.npz", images=own)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name, part in zip([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], cifar):
        part.tofile(tmp_path / f"cifar-10-batches-bin/{name}.bin")
    shutil.make_archive(
        tmp_path / "cifar10/cifar-10-binary", "gztar", tmp_path, "cifar-10-batches-bin")
    for split, rows, part in (("train", ~test, cifar[:5]), ("test", test, cifar[5:])):
        images, labels = ddpm.load_data(f"{tmp_path}/a.npz", split, None)
        assert np.array_equal(images.permute(0, 2, 3, 1), own[rows])
        assert np.array_equal(labels, np.arange(30)[rows] % 4)
        assert (ddpm.load_data(f"{tmp_path}/b.npz", split, None)[1] == 0).all()
        images, labels = ddpm.load_data("cifar10", split, tmp_path)
        assert np.array_equal(images, part[..., 1:].reshape(-1, 3, 32, 32))
        assert np.array_equal(labels, part[..., 0].flatten())
    assert "multiples of --patch 2" in call(ddpm, "--train", "--data", "a.npz", cwd=tmp_path, code=2)
    images, labels = ddpm.load_data("mnist", "train", ddpm.HERE / "data")
    published = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels.bincount().tolist() == published and labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
