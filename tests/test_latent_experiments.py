"""experiments/latent_cost.py, latent_edit.py, bench_latent_diffusion.py: mathematics, programs."""

import numpy as np
import torch
from inprocess import call

import bench_latent_diffusion
import latent_cost
import latent_diffusion as ld
import latent_edit
from test_latent_diffusion import SMALL, small


def test_costs(tmp_path):
    """FLOPs of a small U-Net, counted by hand; Stable Diffusion 1 takes the known 803 GFLOP."""
    args = ld.parse_args("--channels 8 --groups 2 --text-width 6".split())
    places, N, C = 16, 5, 8
    resnet = lambda C_in: places * (9 * (C_in + C) * C + (C_in - C) * C_in) + 32 * C
    conv = places * 9 * 4 * C * 2 + C * 32 + 32 * 32  # in and out, and the MLP of the time
    attention = places * (20 * C * C + 2 * places * C + 2 * N * C) + 2 * N * 6 * C
    found, training = latent_cost.flops(args, 4, 4, N)
    assert found == 2 * (conv + 3 * resnet(8) + 2 * resnet(16) + attention)
    assert 2.5 * found < training < 3.1 * found
    assert "4 x 64 x 64 | 803, " in call(latent_cost, *SMALL, "--rounds", 1, cwd=tmp_path)
    said = call(bench_latent_diffusion, *SMALL, "--rounds", 1, cwd=tmp_path)
    assert "| diffusers, U-Net |" in said and "| latent_diffusion.py, Flux |" in said


def test_edits(tmp_path, monkeypatch):
    """What is hidden is not used; known latents are put back with the noise of the step. If z_0 is
    known, any strength reconstructs. Between noises the variance is 1; pairs are trained ones."""
    args, model = small()
    mask, images = torch.zeros(32, 32).bool(), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mask[3:10, 18:27] = True
    texts, other = ["a red one", ""], torch.where(mask, 255 - images, images)
    z0, moved = (ld.latents_of(model.autoencoder, x) for x in (images, other))
    hidden = latent_edit.latents_that_see(mask)
    assert torch.equal((z0 != moved).any(1).any(0), hidden)
    one, two, new = (latent_edit.inpaint(args, model, x, texts, mask, seed)
                     for x, seed in ((images, 0), (other, 0), (images, 1)))
    assert torch.equal(one[:, :, ~mask], images[:, :, ~mask]) and not torch.equal(new, one)
    assert torch.equal(two[:, :, mask], one[:, :, mask])
    noise, calls, seen = torch.randn(z0.shape), [], []

    def knows(denoiser, z, t, context, none, args):
        a, s = ld.alpha_sigma(torch.tensor([t]), args.objective)
        calls.append((t, ((z - a * z0) / s).std(), context))
        seen.append(torch.where(hidden, 0, z - a * z0 - s * noise).abs().max())
        return (z, z) if known else (z0, (z - a * z0) / s)

    monkeypatch.setattr(ld, "estimate", knows)
    known = True
    latent_edit.edit(args, model.denoiser, noise, None, known=z0, hidden=hidden)
    assert len(seen) == args.sample_steps and max(seen) < 1e-6
    known, want = False, ld.to_uint8(model.autoencoder.decode(z0)).int()
    for strength in (0.03, 1.0):
        found = latent_edit.image_to_image(args, model, images, texts, strength)
        t, spread, context = calls[-args.sample_steps]
        assert (found.int() - want).abs().max() <= 1 and not torch.equal(*context)
        assert t == strength and abs(spread - 1) < 0.2
    a, b = torch.randn(2, 1, 10_000, generator=torch.Generator().manual_seed(0))
    mixed = latent_edit.slerp(a, b, torch.linspace(0, 1, 5)[:, None])
    assert (mixed.std(dim=1) - 1).abs().max() < 0.03 and torch.equal(mixed[0], a[0])
    facts = ld.random_facts(500, np.random.default_rng(0), "seen", single=0)
    facts = facts[facts[:, 1, 0] < 10]
    for place in (1, 2):
        new = latent_edit.other_things(facts, place)
        assert (new[:, 3 - place] == facts[:, 3 - place]).all()
        assert (new[:, place] != facts[:, place]).all() and (new[:, place].sum(1) % 8 != 0).all()
    args.out = tmp_path
    ld.save_checkpoint(args, 1, ema=model.state_dict())
    monkeypatch.undo()
    call(latent_edit, "--model", "model.pt", cwd=tmp_path)
    names = sorted(path.stem for path in tmp_path.glob("out/latent_edit/*.png"))
    assert names == ["image_to_image", "inpaint", "interpolation"]
