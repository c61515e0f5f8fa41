"""Where a network with cameras as input looks, and what it draws between two pictures.

Slide      Generative models + geometry: "take camera parameters as input!"
Question   A point of the first view lies on one line in every other view, the epipolar line. Do the
           drawn views show it there, and do patches attend to that line? What is drawn between a
           first and a last frame, and is it better than with the first frame alone?
Run        python experiments/video_views.py
           python experiments/video_views.py --model out/video_diffusion_orbit/model.pt
Writes     out/video_views/: epipolar.png, attention.png, between.png
"""
import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import video_diffusion as vd
import video_geometry
import video_motion

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def epipolar_line(K, pose, first, other, u, v, n=200):
    """Pixels (n, 2) of view `other` on which the point at (u, v) of view `first` may be seen: its
    ray, from near to far, projected. K (F, 3, 3), pose (F, 3, 4)."""
    pixel = torch.tensor([u, v, 1.0])
    d = pose[first, :, :3] @ torch.linalg.inv(K[first]) @ pixel
    s = torch.logspace(-1, 1.5, n)[:, None]
    return video_motion.project(K[other], pose[other], pose[first, :, 3] + s * d)


def distance_to_line(at, line):
    """Of the point at (2,) in pixels from the polyline (n, 2)."""
    a, b = line[:-1], line[1:]
    s = (((at - a) * (b - a)).sum(1) / (b - a).square().sum(1)).clamp(0, 1)
    return (at - a - s[:, None] * (b - a)).norm(dim=1).min()


def record_attention(model, x, t, rays):
    """Attention between all patches of all frames, the mean over the heads and over the layers on
    maps of h x w patches: (B, F, h, w, F, h, w)."""
    found, attend = [], vd.attend
    size = x.shape[1], *rays.shape[3:]

    def spy(q, k, v):
        if q.shape[2] == size[0] * size[1] * size[2]:
            found.append((q @ k.mT / q.shape[3] ** 0.5).softmax(3).mean(1))
        return attend(q, k, v)

    vd.attend = spy
    with torch.no_grad():
        model(x, t, rays)
    vd.attend = attend
    return torch.stack(found).mean(0).view(-1, *size, *size)


def show(ax, picture, title=""):
    ax.imshow(picture.permute(1, 2, 0).numpy())
    ax.set_title(title, fontsize=8)
    ax.axis("off")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "pretrained/video_diffusion_orbit.pt")
    p.add_argument("--num", type=int, default=50, help="scenes")
    p.add_argument("--out", type=Path, default=Path("out/video_views"))
    a, flags = p.parse_known_args(argv)  # other flags are the lesson's, such as --guidance
    a.out.mkdir(parents=True, exist_ok=True)
    ckpt = vd.load_checkpoint(a.model)
    args = vd.parse_args(flags, ckpt["config"])
    model = vd.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    rng = np.random.default_rng([args.seed, 1])  # as in load_clips
    scenes, K, pose = vd.random_world("orbit", a.num, args.frames, args.height, rng)
    real, drawn = vd.generate(args, model, a.num, [args.frames, 1]).unflatten(0, (-1, 2)).unbind(1)

    # a sphere's middle in the first view, and its epipolar lines in the others
    hues = (scenes.colour[:, :, None] - vd.HUES).abs().sum(-1).argmin(2)
    rows = {"real": real, "drawn": drawn, "another scene": real.roll(1, 0)}
    off = {name: [] for name in rows}
    for name, x in rows.items():
        at, there, _ = video_motion.find(x, hues)
        start, seen, _ = video_motion.find(real[:, :1], hues)
        for i, f, b in np.ndindex(a.num, args.frames, 2):
            if f and there[i, f, b] and seen[i, 0, b]:
                line = epipolar_line(K[i], pose[i], 0, f, *start[i, 0, b].tolist())
                off[name].append(distance_to_line(at[i, f, b], line).item())
    print("| sphere's middle from its epipolar line | pixels |\n| --- | --- |")
    for name, distances in off.items():
        print(f"| {name} | {torch.tensor(distances).mean():.2f} |")
    at = video_motion.find(real, hues)[0][0, 0, 0].tolist()
    figure, axes = plt.subplots(2, args.frames, figsize=(1.3 * args.frames, 3), squeeze=False)
    for row, (name, x) in zip(axes, list(rows.items())[:2]):
        for f, ax in enumerate(row):
            show(ax, x[0, f], f"{name}, view {f + 1}")
            line = epipolar_line(K[0], pose[0], 0, f, *at) if f else torch.tensor([at])
            ax.plot(*(line - 0.5).T.numpy(), "w." if f == 0 else "w-", linewidth=0.8)
            ax.set(xlim=(-0.5, args.height - 0.5), ylim=(args.height - 0.5, -0.5))
    figure.savefig(a.out / "epipolar.png", dpi=120, bbox_inches="tight")

    # attention of the patch with the sphere in the middle frame, half-way through sampling
    x0, t = vd.to_float(real[:1]), torch.full((1, args.frames), vd.T // 2)
    t[:, 0] = 0
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x = vd.q_sample(x0, noise, vd.cosine_abar().float()[t][:, :, None, None, None])
    rays = vd.camera_rays(K[:1], pose[:1], args.height, args.height, args.patch)
    attention = record_attention(model.cpu(), x, t, rays)
    f = args.frames // 2
    u, v = (video_motion.find(real, hues)[0][0, f, 0] / args.patch).long().tolist()
    seen = attention[0, f, v, u]
    figure, axes = plt.subplots(2, args.frames, figsize=(1.3 * args.frames, 3), squeeze=False)
    for g in range(args.frames):
        show(axes[0, g], real[0, g], f"view {g + 1}")
        axes[1, g].imshow(seen[g].numpy(), vmin=0, vmax=seen.max().item())
        axes[1, g].axis("off")
    axes[0, f].plot((u + 0.5) * args.patch - 0.5, (v + 0.5) * args.patch - 0.5, "w+")
    figure.savefig(a.out / "attention.png", dpi=120, bbox_inches="tight")

    # the first and the last frame given
    given = torch.zeros(a.num, args.frames, dtype=torch.bool)
    given[:, [0, -1]] = True
    torch.manual_seed(args.seed)
    rays = vd.camera_rays(K, pose, args.height, args.height, args.patch).to(args.device)
    with vd.autocast(args):
        x = vd.sample(model.to(args.device), vd.to_float(real).to(args.device),
                      given.to(args.device), rays, args)
    between = vd.to_uint8(x).cpu()
    print("| views between the first and the last | PSNR |\n| --- | --- |")
    for name, x in (("first given", drawn), ("first and last given", between)):
        print(f"| {name} | {video_geometry.psnr(x, real)[:, 1:-1].mean():.2f} dB |")
    pictures = torch.stack([real, drawn, between], dim=1)[:4].flatten(0, 2)
    vd.save_png(a.out / "between.png", vd.grid(pictures, args.frames))


if __name__ == "__main__":
    main()
