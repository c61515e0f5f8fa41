"""Editing scenes with a model that was trained to draw from nothing.

Slide      Large scale diffusion models: text to image, and what a step-by-step sampler allows
Questions  Image to image: if a scene is noised to time t and denoised with another caption, what
           stays? (SDEdit, Meng et al. 2022.) Inpainting: if half of a scene is hidden, is the rest
           enough to continue it? Interpolation: what lies between two captions, and two noises?
Run        python experiments/latent_edit.py                  other flags are latent_diffusion.py's
Writes     out/latent_edit/image_to_image.png, inpaint.png, interpolation.png

Inpainting puts the known latents back before every step, with the noise of its time. A latent sees
10 x 10 pixels: those that see a hidden pixel are drawn, so that nothing under the mask is used.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import latent_diffusion as ld


@torch.no_grad()
def edit(args, denoiser, z, context, start=1.0, known=None, hidden=None):
    """Latents (N, D, 8, 8) of context (N, tokens, E), from z, which is as noisy as at time `start`.
    If z is pure noise, they are `known` (N, D, 8, 8) where hidden (8, 8) is False."""
    none = denoiser.encoder(ld.to_tokens([""]).to(z.device))
    steps, noise = args.sample_steps, z
    times = [round(ld.T * start * i / steps) / ld.T for i in range(steps, -1, -1)]
    for t, t_next in zip(times, times[1:]):
        if known is not None:
            a, s = ld.alpha_sigma(torch.tensor([t], device=z.device), args.objective)
            z = torch.where(hidden, z, a * known + s * noise)
        z0, eps = ld.estimate(denoiser, z, t, context, none, args)
        a, s = ld.alpha_sigma(torch.tensor([t_next], device=z.device), args.objective)
        z = a * z0 + s * eps
    return z


def latents_that_see(mask):
    """Which latents (H / 4, W / 4) see a pixel of mask (H, W), bool. Latent i sees 4 i - 3 to
    4 i + 6."""
    return F.max_pool2d(mask[None].float(), 10, stride=4, padding=3)[0] > 0


@torch.no_grad()
def image_to_image(args, model, images, texts, strength):
    """Images (N, 3, 32, 32) uint8, noised to time `strength` in (0, 1], denoised as texts say."""
    z = ld.latents_of(model.autoencoder, images)
    a, s = ld.alpha_sigma(torch.tensor([strength], device=z.device), args.objective)
    context = model.denoiser.encoder(ld.to_tokens(texts).to(z.device))
    z = edit(args, model.denoiser, a * z + s * noise_like(z, args.seed), context, strength)
    return ld.to_uint8(model.autoencoder.decode(z))


@torch.no_grad()
def inpaint(args, model, images, texts, mask, seed=0):
    """Images (N, 3, 32, 32) uint8, drawn anew where mask (32, 32) is True, as texts say."""
    known = ld.latents_of(model.autoencoder, torch.where(mask, 128, images))
    context = model.denoiser.encoder(ld.to_tokens(texts).to(known.device))
    noise, hidden = noise_like(known, args.seed + seed), latents_that_see(mask)
    z = edit(args, model.denoiser, noise, context, known=known, hidden=hidden)
    return torch.where(mask, ld.to_uint8(model.autoencoder.decode(z)), images)


def noise_like(z, seed):
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z.device)


def slerp(a, b, f):
    """Between noises a and b (1, ...), shares f (n, 1, 1, 1) of the way: the variance stays 1."""
    return torch.cos(f * torch.pi / 2) * a + torch.sin(f * torch.pi / 2) * b


@torch.no_grad()
def interpolate(args, model, texts, n=9):
    """Two rows (n, 3, 32, 32) uint8: from caption to caption, then from noise to noise."""
    f = torch.linspace(0, 1, n, device=args.device)
    first, second = model.denoiser.encoder(ld.to_tokens(texts).to(args.device))[:, None]
    shape = (1, args.latent_dim, 8, 8)
    noise = [noise_like(torch.empty(shape, device=args.device), seed) for seed in (0, 1)]
    rows = []
    for context, z in ((torch.lerp(first, second, f[:, None, None]), noise[0].repeat(n, 1, 1, 1)),
                       (first.repeat(n, 1, 1), slerp(*noise, f[:, None, None, None]))):
        z = edit(args, model.denoiser, z, context)
        rows.append(ld.to_uint8(model.autoencoder.decode(z)))
    return rows


def other_things(facts, place):
    """facts (N, 5, 2) with another digit and colour at a place, such that the pair was trained."""
    facts = facts.copy()
    digit, colour = (facts[:, place, 0] + 3) % 10, (facts[:, place, 1] + 3) % 8
    colour += (digit + colour) % 8 == 0
    facts[:, place, 0], facts[:, place, 1] = digit, colour % 8
    return facts


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "pretrained/latent_diffusion.pt")
    p.add_argument("--folder", type=Path, default=Path("out/latent_edit"))
    a, flags = p.parse_known_args(argv)
    a.folder.mkdir(parents=True, exist_ok=True)
    ckpt = ld.load_checkpoint(a.model)
    args = ld.parse_args(flags, ckpt["config"])
    model = ld.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    images, _, facts = ld.load_scenes(100, "test", "seen", args, single=0)
    beside = (facts[:, 1, 0] < 10).cpu()  # one digit at the left, one at the right
    images, facts = images[beside.to(images.device)][:6], facts.cpu()[beside][:6].numpy()
    left, right = ([ld.caption_of(scene) for scene in other_things(facts, place)]
                   for place in (1, 2))
    columns = [images]
    print("| image to image | change of the half whose text stays | of the other half |")
    print("| --- | --- | --- |")
    for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
        columns.append(image_to_image(args, model, images, left, strength))
        change = (columns[-1].float() - columns[0].float()).abs().mean((0, 1, 2))
        print(f"| noised to t = {strength} | {change[16:].mean():.1f} | {change[:16].mean():.1f} |")
    rows = torch.stack(columns, dim=1).flatten(0, 1)
    ld.save_picture(a.folder / "image_to_image.png", ld.grid(rows, len(columns)))
    print("image_to_image.png, scenes and what became of them:", *left, sep="\n  ")
    mask = torch.zeros(32, 32, dtype=torch.bool, device=args.device)
    mask[:, 16:] = True
    columns = [images, torch.where(mask, 128, images)]
    for seed in range(3):
        columns.append(inpaint(args, model, images, right, mask, seed))
    for seed in range(3):
        columns.append(inpaint(args, model, images, [""] * len(images), mask, seed))
    rows = torch.stack(columns, dim=1).flatten(0, 1)
    ld.save_picture(a.folder / "inpaint.png", ld.grid(rows, len(columns)))
    print("inpaint.png, what is given, three with this text, three without:", *right, sep="\n  ")
    ends = ["a red seven left of a blue two", "a yellow zero left of a purple one"]
    rows = torch.cat(interpolate(args, model, ends))
    ld.save_picture(a.folder / "interpolation.png", ld.grid(rows, len(rows) // 2))
    print("interpolation.png, from text to text and from noise to noise:", *ends, sep="\n  ")


if __name__ == "__main__":
    main()
