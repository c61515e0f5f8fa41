"""Do lines bend and do shadows lie in new views of a scene?

Slide      Shadows don't lie and lines can't bend!; Generative models + geometry
Question   Views drawn from one picture and the cameras: how near are they to real renders, and are
           the spheres, the table's lines and the shadows where projective geometry has them?
Run        python experiments/video_geometry.py
           python experiments/video_geometry.py --model out/video_diffusion_orbit/model.pt
Writes     out/video_geometry/views.png: real views, drawn ones, and those of one sampling step

Every measure has rows for what is right (real renders) and for what knows nothing: the empty table,
rendered from the camera and the table's angle alone; another scene from the same cameras; noise.
PSNR      of views 2..F, in dB. The mean of all possible answers has the best PSNR and is blurred:
sharp     so the mean square of neighbouring pixels' differences stands beside it; real renders: 1
spheres   distance in pixels of each colour's middle from that in the real render; found: its share
lines     offset in pixels of the steepest place across the table's lines, where these are in sight;
          looked for within 2.5 pixels, so what knows nothing has about 1.4
shadows   how much of the shadows' darkness is there: 1 in real renders, 0 with light everywhere
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import video_diffusion as vd
import video_motion


def psnr(x, real):
    """Of clips (N, F, C, H, W) uint8, per frame (N, F), in dB."""
    mse = (x.float() - real.float()).square().mean(dim=(2, 3, 4)).clamp(min=1e-3)
    return 10 * torch.log10(255**2 / mse)


def sharpness(x):
    """Mean square of the differences of neighbouring pixels of clips (N, F, C, H, W) uint8."""
    x = x.float()
    return (x.diff(dim=3).square().mean() + x.diff(dim=4).square().mean()).item()


def without(scenes, what):
    """The scenes with an empty table, or without shadows: light from below the table falls on it
    past the spheres."""
    if what == "spheres":
        return scenes._replace(centre=scenes.centre - torch.tensor([0, 0, 9.0]))
    return scenes._replace(sun=scenes.sun * torch.tensor([1, 1, -1]))


def line_points(turn, n=25):
    """Points on the inner lines between tiles (N, P, 3), and their normals (N, P, 3)."""
    along = torch.linspace(-1, 1, n) * (vd.TABLE - 0.1)
    points, normals = [], []
    for where in np.arange(-vd.TABLE + vd.TILE, vd.TABLE - 0.01, vd.TILE):
        away, zero, one = torch.full((n,), float(where)), torch.zeros(n), torch.ones(n)
        points += [torch.stack([away, along, zero], 1), torch.stack([along, away, zero], 1)]
        normals += [torch.stack([one, zero, zero], 1), torch.stack([zero, one, zero], 1)]
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    R = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, zero + 1], 1).view(-1, 3, 3)
    return torch.cat(points) @ R.mT, torch.cat(normals) @ R.mT


def line_offsets(x, real, empty, scenes, K, pose, reach=2.5):
    """Mean offset in pixels of the lines of clips x (N, F, 3, H, W) uint8, at points that are near
    no sphere and no shadow: there the real render is that of the empty table."""
    H, W = x.shape[3:]
    points, normals = (a[:, None] for a in line_points(scenes.turn))
    K, pose = K[:, :, None], pose[:, :, None]
    at = video_motion.project(K, pose, points)  # (N, F, P, 2)
    n = F.normalize(video_motion.project(K, pose, points + 0.01 * normals) - at, dim=-1)
    s = torch.linspace(-reach, reach, 21)
    places = at[..., None, :] + s[:, None] * n[..., None, :]  # (N, F, P, 21, 2)
    grid = (2 * places / torch.tensor([W, H]) - 1).flatten(0, 1)

    def profile(clips):
        grey = clips.float().mean(2, keepdim=True).flatten(0, 1)
        return F.grid_sample(grey, grid, align_corners=False)[:, 0]  # (N F, P, 21)

    free = (profile(real) - profile(empty)).abs().amax(2) < 3
    free &= ((grid > -1) & (grid < 1)).all(3).all(2)
    steepest = profile(x).diff(dim=2).abs().argmax(2)  # between s and its neighbour
    offset = ((s[1:] + s[:-1]) / 2)[steepest].abs()
    return (offset * free).sum().item() / free.sum().clamp(min=1).item()


def shadow_depth(x, real, bright):
    """Share of the darkness of the real shadows, bright - real on the table, that x has."""
    dark, missing = ((bright.float() - y.float()).mean(2) for y in (real, x))
    shadow = (dark > 20) & (real.amax(2) - real.amin(2) < 12)  # the table is grey
    return ((missing * dark)[shadow].sum() / dark[shadow].square().sum().clamp(min=1)).item()


def measures(x, real, empty, bright, scenes, K, pose):
    """PSNR, sharpness, spheres' distance and share found, lines, shadows; clips (N, F, 3, H, W)."""
    hues = (scenes.colour[:, :, None] - vd.HUES).abs().sum(-1).argmin(2)
    at, there, _ = video_motion.find(x, hues)
    true_at, true_there, _ = video_motion.find(real, hues)
    both = there & true_there
    off = ((at - true_at).norm(dim=-1) * both).sum() / both.sum().clamp(min=1)
    return [psnr(x, real).mean().item(), sharpness(x) / sharpness(real), off.item(),
            (both.sum() / true_there.sum()).item(), line_offsets(x, real, empty, scenes, K, pose),
            shadow_depth(x, real, bright)]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "pretrained/video_diffusion_orbit.pt")
    p.add_argument("--num", type=int, default=100, help="scenes")
    p.add_argument("--out", type=Path, default=Path("out/video_geometry"))
    a, flags = p.parse_known_args(argv)  # other flags are the lesson's, such as --guidance
    a.out.mkdir(parents=True, exist_ok=True)
    ckpt = vd.load_checkpoint(a.model)
    args = vd.parse_args(flags, ckpt["config"])
    model = vd.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    frames, size = args.frames, args.height
    rng = np.random.default_rng([args.seed, 1])  # as in load_clips
    scenes, K, pose = vd.random_world("orbit", a.num, frames, size, rng)
    real, empty, bright, other = (
        vd.render_clips(s, K, pose, size, size) for s in (
            scenes, without(scenes, "spheres"), without(scenes, "shadows"),
            vd.Scenes(*(b.roll(1, 0) for b in scenes))))
    drawn = vd.generate(args, model, a.num, [1])
    args.sample_steps = 1
    rows = {"real renders": real, "drawn": drawn,
            "drawn, one sampling step": vd.generate(args, model, a.num, [1]),
            "the empty table": empty, "another scene": other,
            "noise": torch.randint(256, real.shape, dtype=torch.uint8)}
    print("| views 2 and later | PSNR | sharp | spheres | found | lines | shadows |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    scenes = scenes._replace(centre=scenes.centre[:, 1:])
    for name, x in rows.items():
        later = (y[:, 1:] for y in (x, real, empty, bright))
        found = measures(*later, scenes, K[:, 1:], pose[:, 1:])
        print("| {} | {:.2f} | {:.2f} | {:.2f} px | {:.2f} | {:.2f} px | {:.2f} |".format(
            name, *found), flush=True)
    pictures = torch.stack([real, drawn, rows["drawn, one sampling step"]], dim=1)[:4].flatten(0, 2)
    vd.save_png(a.out / "views.png", vd.grid(pictures, frames))


if __name__ == "__main__":
    main()
