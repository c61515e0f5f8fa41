"""Do the spheres of drawn clips roll as the law of motion says, and is the future open?

Slide      Video diffusion models
Question   In how many drawn frames are both spheres there, in their colours? How far are they from
           a path that the law allows: constant velocity, bounces, exchanged momentum? How far do
           three futures of the same frames spread? One given frame leaves them open, two fix them.
Run        python experiments/video_motion.py
           python experiments/video_motion.py --model out/video_diffusion/model.pt --num 200
Writes     out/video_motion/worst.png: the clips furthest from the law, given two frames

A sphere is found by its hue, at least 4 pixels of it; in a clip from nothing the two hues with most
pixels count. The law's path is fitted to what is found: real clips have the floor of the measure,
and their frames in another order its ceiling. Frames without the sphere do not count in it.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import video_diffusion as vd


def hues_of(clips):
    """Clips (N, F, 3, H, W) uint8 -> masks (N, F, 6, H, W) bool of the pixels of each hue with at
    least 3 neighbours of it. Shade changes a colour's brightness, not its direction."""
    x = F.normalize(clips.float() + 1e-3, dim=2)
    match = torch.einsum("nfchw,kc->nfkhw", x, F.normalize(vd.HUES, dim=1))
    match = (match > 0.985) & (clips.amax(2, keepdim=True) > 50)
    count = 9 * F.avg_pool2d(match.flatten(0, 1).float(), 3, stride=1, padding=1)
    return match & (count > 3.5).view_as(match)


def find(clips, hues=None):
    """Spheres of clips (N, F, 3, H, W) uint8: centres (N, F, 2, 2), as (u, v) in pixels, whether
    they are there (N, F, 2), and their hues (N, 2), unless these are given."""
    masks = hues_of(clips)
    if hues is None:
        hues = masks.sum(dim=(1, 3, 4)).topk(2, dim=1).indices.sort(dim=1).values
    masks = masks[torch.arange(len(hues))[:, None], :, hues].transpose(1, 2).float()
    count = masks.sum(dim=(3, 4))
    v = (masks.sum(4) @ (torch.arange(masks.shape[3]) + 0.5)) / count.clamp(min=1)
    u = (masks.sum(3) @ (torch.arange(masks.shape[4]) + 0.5)) / count.clamp(min=1)
    return torch.stack([u, v], dim=-1), count >= 4, hues


def project(K, pose, X):
    """Pixels (..., 2) of points X (..., 3): K R^T (X - c)."""
    p = K @ pose[..., :3].mT @ (X - pose[..., 3])[..., None]
    return p[..., :2, 0] / p[..., 2:, 0]


def seen_path(p, v, radius, frames, K, pose):
    """Where the law's path is seen, (N, F, 2, 2); p and v (N, 2, 2), radius (N, 2)."""
    path = vd.roll(p, v, radius, frames)
    height = radius[:, None, :, None].expand(-1, frames, -1, -1)
    return project(K[:, :, None], pose[:, :, None], torch.cat([path, height], dim=-1))


def to_table(at, K, pose, height=0.31):
    """The places on the table (N, 2, 2) of spheres seen at (N, 2, 2), with centres at height."""
    pixel, eye = F.pad(at, (0, 1), value=1)[..., None], pose[:, None, :, 3]
    ray = (pose[:, None, :, :3] @ torch.linalg.inv(K)[:, None] @ pixel)[..., 0]
    return (eye + (height - eye[..., 2:]) / ray[..., 2:] * ray)[..., :2].clamp(-1.2, 1.2)


def fit_law(at, there, K, pose, steps=50, tries=100):
    """Mean distance in pixels (N,) from the nearest path that the law allows, for spheres at
    (N, F, 2, 2) where there (N, F, 2). Random search, for bounces have no gradient: it starts at
    the place and the velocity that the first two frames show; every step keeps the best of many
    changes of place, velocity and radius, ever smaller ones."""
    N, frames = at.shape[:2]
    first, second = (to_table(at[:, f], K[:, f], pose[:, f]).flatten(1) for f in (0, 1))
    best = torch.cat([first, (second - first).clamp(-0.3, 0.3), torch.full((N, 2), 0.31)], dim=1)
    size = torch.tensor([0.1] * 8 + [0.02] * 2)
    K, pose = (a.repeat_interleave(tries, 0) for a in (K, pose))
    rng = torch.Generator().manual_seed(0)
    for step in range(steps):
        new = best[:, None] + size * 0.9**step * torch.randn(N, tries, 10, generator=rng)
        new[:, 0] = best
        p, v, radius = new.flatten(0, 1).unflatten(1, (5, 2)).split([2, 2, 1], dim=1)
        path = seen_path(p, v, radius[:, 0].clamp(0.26, 0.36), frames, K, pose)
        away = (path.unflatten(0, (N, tries)) - at[:, None]).norm(dim=-1) * there[:, None]
        error = away.sum(dim=(2, 3)) / there.sum(dim=(1, 2)).clamp(min=1)[:, None]
        error, index = error.min(dim=1)
        best = new[torch.arange(N), index]
    return error


def spread_of(at, there):
    """Mean distance in pixels between the answers (N, A, F, 2, 2) to the same question."""
    distance, both = [], []
    for i in range(at.shape[1]):
        for j in range(i):
            distance.append((at[:, i] - at[:, j]).norm(dim=-1))
            both.append(there[:, i] & there[:, j])
    distance, both = torch.stack(distance), torch.stack(both)
    return ((distance * both).sum() / both.sum().clamp(min=1)).item()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "pretrained/video_diffusion.pt")
    p.add_argument("--num", type=int, default=100, help="clips of each kind")
    p.add_argument("--out", type=Path, default=Path("out/video_motion"))
    a, flags = p.parse_known_args(argv)  # other flags are the lesson's, such as --sample-steps
    a.out.mkdir(parents=True, exist_ok=True)
    ckpt = vd.load_checkpoint(a.model)
    args = vd.parse_args(flags, ckpt["config"])
    model = vd.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    real, K, pose = (x.cpu() for x in vd.load_clips(args, "test", a.num))
    true_at, true_there, hues = find(real)
    order = torch.randperm(args.frames, generator=torch.Generator().manual_seed(0))
    alone = argparse.Namespace(**vars(args) | {"guidance": 0.0})  # frames do not see one another
    rows = [  # name, clips, answers per question, frames that do not count, hues
        ("real clips", real, 1, 0, hues),
        ("real frames in another order", real[:, order], 1, 0, hues),
        ("noise", torch.randint(256, real.shape, dtype=torch.uint8), 1, 0, None),
        ("drawn from nothing", vd.generate(args, model, a.num, [0]), 1, 0, None),
        ("drawn, 1 frame given", vd.generate(args, model, a.num, [1] * 3), 3, 1, hues),
        ("drawn, 2 frames given", vd.generate(args, model, a.num, [2] * 3), 3, 2, hues),
        ("the same, frames not joined", vd.generate(alone, model, a.num, [2]), 1, 2, hues)]
    print("| clips | both spheres there | to the law | to the truth | spread of 3 futures |\n"
          "| --- | --- | --- | --- | --- |")
    for name, x, answers, given, known in rows:
        at, there, _ = find(x, None if known is None else known.repeat_interleave(answers, 0))
        law = fit_law(at, there, *(c.repeat_interleave(answers, 0) for c in (K, pose)))
        away = (at.unflatten(0, (-1, answers)) - true_at[:, None]).norm(dim=-1)[:, :, given:]
        both = (there.unflatten(0, (-1, answers)) & true_there[:, None])[:, :, given:]
        truth = (away * both).sum() / both.sum().clamp(min=1)
        cells = [f"{there[:, given:].all(2).float().mean():.3f}", f"{law.mean():.2f} px",
                 "" if known is None else f"{truth:.2f} px", ""]
        if answers > 1:
            futures = [y.unflatten(0, (-1, answers))[:, :, given:] for y in (at, there)]
            cells[3] = f"{spread_of(*futures):.2f} px"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        if name == "drawn, 2 frames given":
            worst = x[law.argsort(descending=True)[:8]]
            vd.save_png(a.out / "worst.png", vd.grid(worst.flatten(0, 1), x.shape[1]))


if __name__ == "__main__":
    main()
