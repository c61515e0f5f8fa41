"""experiments/latent_cost.py, latent_edit.py, bench_latent_diffusion.py: their mathematics against
oracles, and each once as a program, in miniature."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import call

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import bench_latent_diffusion
import latent_cost
import latent_diffusion
import latent_edit
from test_latent_diffusion import SMALL


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """A folder, its checkpoint of latent_diffusion.py after a few steps, flags and model."""
    folder = tmp_path_factory.mktemp("latent")
    call(latent_diffusion, "--train", *SMALL, cwd=folder)
    ckpt = latent_diffusion.load_checkpoint(folder / "out/latent_diffusion/model.pt")
    args = latent_diffusion.parse_args([], ckpt["config"])
    model = latent_diffusion.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    return folder, args, model


def test_flops_of_an_evaluation():
    """Of one resolution with 8 channels, counted by hand: two per multiplication."""
    args = latent_diffusion.parse_args("--channels 8 --groups 2 --text-width 6".split())
    places, N, C = 16, 5, 8
    resnet = lambda C_in: places * (9 * (C_in + C) * C + (C_in - C) * C_in) + 32 * C
    conv = places * 9 * 4 * C * 2 + C * 32 + 32 * 32  # in and out, and the MLP of the time
    attention = places * (4 * C * C + 2 * places * C) + places * 2 * C * C + 2 * N * 6 * C
    attention += places * 2 * N * C + places * (2 * C * C + 8 * C * C + 4 * C * C)
    by_hand = 2 * (conv + 3 * resnet(8) + 2 * resnet(16) + attention)
    found, training = latent_cost.flops(args, 4, 4, N)
    assert found == by_hand and 2.5 * found < training < 3.1 * found


def test_latent_cost_in_miniature(tmp_path):
    """And Stable Diffusion 1's evaluation takes the known 803 GFLOP, or 402 GMAC."""
    said = call(latent_cost, *SMALL, "--rounds", 1, cwd=tmp_path)
    assert "| pixels, 3 x 32 x 32 |" in said and "latents, 4 x 64 x 64 | 803, " in said


def test_hidden_pixels_are_not_seen(latent):
    """Latents that see a hidden pixel are found, all of them and no other; and so inpainting does
    not depend on what is hidden, keeps the rest, and differs with the seed."""
    _, args, model = latent
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[3:9, 17:27] = True
    images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    other = torch.where(mask, 255 - images, images)
    za, zb = (latent_diffusion.latents_of(model.autoencoder, x) for x in (images, other))
    assert torch.equal((za != zb).any(1)[0], latent_edit.latents_that_see(mask))
    drawn = [latent_edit.inpaint(args, model, x, ["a red one"], mask, seed)
             for x, seed in ((images, 0), (other, 0), (images, 1))]
    assert torch.equal(drawn[0], torch.where(mask, drawn[0], images))
    assert torch.equal(torch.where(mask, drawn[1], 0), torch.where(mask, drawn[0], 0))
    assert not torch.equal(drawn[2], drawn[0])


def test_known_latents_are_put_back(latent, monkeypatch):
    """Before every step they are those of the image, noised to the time of the step."""
    _, args, model = latent
    known, noise, seen = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), []
    hidden = torch.rand(8, 8) < 0.5

    def spy(denoiser, z, t, context, none, args):
        a, s = latent_diffusion.alpha_sigma(torch.tensor([t]), args.objective)
        seen.append(torch.where(hidden, 0, z - a * known - s * noise).abs().max().item())
        return z, z

    monkeypatch.setattr(latent_diffusion, "estimate", spy)
    latent_edit.edit(args, model.denoiser, noise, None, known=known, hidden=hidden)
    assert len(seen) == args.sample_steps and max(seen) < 1e-6


def test_a_little_noise_keeps_the_image(latent, monkeypatch):
    """If the network knows z_0, any strength gives the reconstruction; the caption is used."""
    _, args, model = latent
    images, contexts = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), []
    z0 = latent_diffusion.latents_of(model.autoencoder, images)

    def knows(denoiser, z, t, context, none, args):
        contexts.append(context)
        a, s = latent_diffusion.alpha_sigma(torch.tensor([t]), args.objective)
        return z0, (z - a * z0) / s

    monkeypatch.setattr(latent_diffusion, "estimate", knows)
    with torch.no_grad():
        want = latent_diffusion.to_uint8(model.autoencoder.decode(z0)).int()
    for strength in (0.03, 1.0):
        found = latent_edit.image_to_image(args, model, images, ["a red one", ""], strength)
        assert (found.int() - want).abs().max() <= 1
    assert not torch.equal(contexts[0][0], contexts[0][1])


def test_between_two_noises_is_noise():
    a, b = torch.randn(2, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    mixed = latent_edit.slerp(a[None], b[None], torch.linspace(0, 1, 5).view(-1, 1, 1, 1))
    assert (mixed.std(dim=(1, 2, 3)) - 1).abs().max() < 0.03
    assert torch.equal(mixed[0, 0], a[0]) and torch.allclose(mixed[4, 0], b[0], atol=1e-6)


def test_other_things_are_trained_pairs():
    facts = latent_diffusion.random_facts(500, np.random.default_rng(0), "seen", single=0)
    facts = facts[facts[:, 1, 0] < 10]
    for place in (1, 2):
        new = latent_edit.other_things(facts, place)
        assert (new[:, 3 - place] == facts[:, 3 - place]).all()
        assert (new[:, place] != facts[:, place]).all()
        assert (new[:, place] < (10, 8)).all() and (new[:, place].sum(1) % 8 != 0).all()


def test_editing_in_miniature(latent):
    folder, _, _ = latent
    model = folder / "out/latent_diffusion/model.pt"
    call(latent_edit, "--model", model, cwd=folder)
    for name in ("image_to_image", "inpaint", "interpolation"):
        assert (folder / f"out/latent_edit/{name}.png").stat().st_size > 1000


def test_bench_of_latent_diffusion_in_miniature(tmp_path):
    said = call(bench_latent_diffusion, *SMALL, "--rounds", 1, cwd=tmp_path)
    for name in ("latent_diffusion.py, U-Net", "diffusers, U-Net", "latent_diffusion.py, Flux"):
        assert f"| {name} |" in said
