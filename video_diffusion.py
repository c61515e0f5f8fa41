"""Video by diffusion, and new views of a scene: a 2-D U-Net shared across frames, joined in time.

Single pictures are learned first, then how they follow one another; frames that are given stay as
they are. With a camera for every frame, the same network shows a scene from where nobody stood.

Slides     Video diffusion models; Generative models don't know projective geometry; Generative
           models + geometry
Equations  noised       x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, a given frame has t = 0
           loss         |f(x_t, t, rays) - target|^2 over the frames that are not given
           guidance     out = none + w (told - none): with rays, or digits, and without
           camera       pixel (u, v, 1) ~ K R^T (X - c); the ray that it sees: o + s d, o = c,
                        d = R K^-1 (u, v, 1) / |...|; as Pluecker coordinates (d, o x d)
           bounce       p(f) = thrown back at the walls from p(0) + f velocity
           shadow       X lies in it if X + s light meets a sphere, s > 0
Notation   x_0, x_t     x0, xt   (B, F, C, H, W)  clips in [-1, 1]; F frames, in code `frames`
           t            t        (B, F)           1..T; 0 for frames that are given
           given        known    (B, F)           true or false
           K            K        (B, F, 3, 3)     intrinsics, in pixels
           [R|c]        pose     (B, F, 3, 4)     camera-to-world: R's columns are right, down and
                                                  forward, the last is the centre c
           rays         rays     (B, F, k, h, w)  Pluecker coordinates, where they cross two
                                                  planes; or place, which digits; h x w patches
Run        python video_diffusion.py --train                   a table with spheres, and a camera
           python video_diffusion.py --orbit                   around a scene, from one picture
           python video_diffusion.py --between                 from the first and the last frame
           python video_diffusion.py --eval                    geometry, or motion, measured
           python video_diffusion.py --train --data moving-mnist --out out/digits    two digits
           python video_diffusion.py --sample --digits 3 8 --out out/digits    these two
           python video_diffusion.py --given 4 --length 24 --out out/digits    from 4 real frames
Expect     12 minutes on 2 CPU cores: new views from one picture at 20.8 dB (that picture copied:
           10.9), spheres 1.3 pixels from where they should be; the enclosed model, over an hour:
           23.1 dB, 0.84 pixels. Moving digits, 14 minutes: they bounce, but change their shape on
           the way. One H100, --size base --time-kernel 3, few scenes: 476 clips/s.
           In out/video_diffusion/: model.pt, samples (.npz, .png, and _film.png, which moves),
           prediction, orbit, epipolar, attention (.png), loss (.png, .csv).
Left out   text, the cascade that makes videos large, a first stage of latents (see
           latent_diffusion.py), FVD: below ten frames its features say nothing, and here the truth
           is known
Try        1. --stage video: no pictures first. What is the held-out error after equal time?
           2. --loose 0 and 0.5: clips alone, or half of the batch single pictures?
           3. TimeBlock without `same`: how long until frames find one another?
Papers     Ho et al. 2022, Video Diffusion Models; Sarkar et al. 2024, Shadows Don't Lie and Lines
           Can't Bend!; Watson et al. 2023, Novel View Synthesis with Diffusion Models; Guo et al.
           2024, AnimateDiff; Srivastava et al. 2015, Unsupervised Learning of Video
           Representations (moving digits); Mildenhall et al. 2020, NeRF (Fourier basis)
"""
import argparse
import copy
import gzip
import hashlib
import io
import math
import os
import signal
import struct
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

SIZES = {  # one dial, --size, sets all of these; a flag given by hand wins
    "small": dict(  # a laptop
        height=32, frames=8, scenes=6000, patch=2, width=32, mults=[1, 1], blocks=1, heads=2,
        time_kernel=3, dropout=0.0, predict="x0", noisy=0.7, image_steps=800, image_lr=3e-3,
        steps=2250, batch_size=8, loose=0.125, lr=3e-3, ema=0.998, side_width=64, side_steps=2000,
        side_batch=32, side_lr=2e-3, warmup=50, sample_steps=10, guidance=4.0, num=8, every=500),
    "base": dict(  # a GPU
        height=64, frames=16, scenes=50_000, patch=4, width=128, mults=[1, 2], blocks=2, heads=4,
        time_kernel=3, dropout=0.0, predict="x0", noisy=0.5, image_steps=20_000, image_lr=5e-4,
        steps=50_000, batch_size=64, loose=0.125, lr=5e-4, ema=0.9995, side_width=96,
        side_steps=5000, side_batch=256, side_lr=1e-3, warmup=1000, sample_steps=20, guidance=2.0,
        num=8, every=5000),
    "paper": dict(  # of the kind of Ho et al. 2022
        height=64, frames=16, scenes=100_000, patch=1, width=128, mults=[1, 2, 4, 8], blocks=2,
        heads=8, time_kernel=3, dropout=0.1, predict="eps", noisy=1.0, image_steps=100_000,
        image_lr=1e-4, steps=400_000, batch_size=128, loose=0.125, lr=1e-4, ema=0.9999,
        side_width=96, side_steps=5000, side_batch=256, side_lr=1e-3, warmup=5000,
        sample_steps=100, guidance=2.0, num=4, every=10_000),
}
# --data orbit: a wide network on coarse places, for colours must find their way far. A convolution
# over time does not help, and frames are not always side by side (see windows)
ORBIT = {"small": dict(patch=4, width=72, mults=[1, 1], noisy=0.4, steps=3600)}
CONFIG = [*SIZES["small"], "size", "data", "seed", "schedule", "shape"]  # kept


def parse_args(argv=None, config=None):
    """Every knob. config, from a checkpoint, replaces the defaults; a flag given by hand wins.
    (HERE, NAME, die, positive, share and pick_device are plumbing, at the end of the file.)"""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.error = die
    add = p.add_argument
    # what to do
    add("--train", action="store_true", help="train all parts, then sample and measure")
    add("--sample", action="store_true", help="new clips, and real ones continued")
    add("--given", type=positive, metavar="K", help="go on from the first K frames of real clips")
    add("--length", type=positive, metavar="N", help="frames to make: more than were trained are "
        "made window by window")
    add("--between", action="store_true", help="fill in between first and last frame of real clips")
    add("--orbit", nargs="?", type=Path, const=Path(), metavar="IMG", help="new views from one "
        "picture: a .png or .npz, or, left out, a held-out scene")
    add("--path", type=Path, metavar="NPZ", help="for --orbit: cameras as K (3, 3) or (F, 3, 3) "
        "and pose (F, 3, 4), camera-to-world, z up, the table around the origin, the first that of "
        "IMG; left out, a full circle, 37 degrees high, at a distance of 3, field of view 42")
    add("--eval", action="store_true", help="how well are motion, or geometry, kept?")
    add("--attention", action="store_true", help="where the last frame looks in the others")
    add("--export", type=Path, metavar="PT", help="write the averaged weights alone, as fp16")
    # where, and on what
    add("--data", default="orbit", help="orbit, moving-mnist, or a .npz file of your own with "
        "clips")
    add("--data-dir", type=Path, default=HERE / "data", help="where data sets lie or are put")
    add("--out", type=Path, default=Path("out") / NAME, help="everything written goes there")
    add("--size", choices=["small", "base", "paper"],
        help="preset for all flags of networks and training; small on a CPU, else base")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    add("--seed", type=int, default=0, help="start of all random numbers")
    add("--compile", action="store_true", help="torch.compile the training: slow start, then fast")
    add("--resume", action="store_true", help="go on from OUT/model.pt")
    add("--every", type=positive, help="checkpoint and picture every so many steps")
    add("--height", type=positive, help="of our own clips, which are square: 32, or the classic 64")
    add("--frames", type=positive, metavar="F", help="of a clip in training")
    add("--scenes", type=positive, help="orbit: how many scenes are rendered, a clip each")
    # the network
    add("--patch", type=positive, help="squares of so many pixels are one place for the network")
    add("--width", type=positive, help="channels at the finest size")
    add("--mults", type=positive, nargs="+", metavar="M", help="width times these, a size each")
    add("--blocks", type=positive, help="ResBlocks a size on the way down")
    add("--heads", type=positive, help="of attention in time; they must divide the channels")
    add("--time-kernel", type=int, choices=[0, 1, 3], help="height and width of the convolution "
        "over the frame before, this one and the next; 0: none")
    add("--dropout", type=share, help="in the ResBlocks")
    add("--predict", choices=["eps", "x0", "v"], help="what the network's output means")
    add("--schedule", choices=["linear", "cosine"], default="cosine",
        help="how beta_t grows with t")
    # training
    add("--stage", choices=["both", "image", "video"], default="both",
        help="pictures first, then clips; or one of them alone")
    add("--image-steps", type=positive, help="training length on single pictures")
    add("--image-lr", type=share, help="their peak learning rate, falling linearly to zero")
    add("--steps", type=positive, help="training length on clips")
    add("--lr", type=share, help="their peak learning rate")
    add("--batch-size", type=positive, help="clips per step, over all GPUs")
    add("--noisy", type=share, help="t is drawn as T u^noisy, u from 0 to 1: less than 1 is more "
        "often noisy, where frames need one another")
    add("--loose", type=share, help="share of them whose frames are taken as single pictures")
    add("--warmup", type=positive, help="steps until the peak is reached, in all parts")
    add("--ema", type=share, help="decay of the running mean of the weights, which is what samples")
    # the tracker of the report
    add("--side-width", type=positive, help="of the tracker")
    add("--side-steps", type=positive, help="its training length")
    add("--side-batch", type=positive, help="pictures per step, over all GPUs")
    add("--side-lr", type=share, help="its peak learning rate")
    # sampling
    add("--num", type=positive, help="clips")
    add("--digits", type=int, nargs=2, choices=range(10), metavar="D", help="which two, in new "
        "clips of moving-mnist")
    add("--guidance", type=float, metavar="W", help="uncond + W (cond - uncond), given which "
        "digits and without: a larger W gives more typical and less varied samples")
    add("--save", type=Path, help="where the samples go, by default OUT/samples.npz")
    add("--sample-steps", type=positive, help="evaluations of the network from noise to clip")
    p.set_defaults(**{"timesteps": 1000, **(config or {})})
    args = p.parse_args(argv)
    args.size = args.size or ("small" if pick_device(args.device) == "cpu" else "base")
    preset = SIZES[args.size]
    if args.data == "orbit":
        preset = preset | ORBIT.get(args.size, {}) | dict(time_kernel=0, guidance=1.0)
    settled = config or args.train and not args.resume  # else the checkpoint will tell
    for key, value in preset.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for wrong, message in (
            (not 0 <= args.seed < 2**63, f"--seed {args.seed}: expected 0 or more, below 2^63"),
            (args.frames < 2, f"--frames {args.frames}: expected 2 or more"),
            (any(args.width * m % (4 * args.heads) for m in args.mults), f"--width {args.width}: "
             f"expected a multiple of 4 x --heads {args.heads}"),
            (settled and args.given and args.given > args.frames // 2, f"--given {args.given}: the "
             f"model is trained with at most {args.frames // 2} given frames"),
            (args.given and args.length and args.length <= args.given,
             f"--length {args.length}: expected more than the {args.given} frames that are given"),
            (args.length and (args.between or args.path), "--length: not for --between or --path"),
            (settled and args.orbit is not None and args.data != "orbit",
             "--orbit: only for a model of --data orbit"),
            (args.path and args.orbit is None, "--path: only for --orbit"),
            (settled and args.digits and args.data != "moving-mnist",
             f"--digits: only for moving-mnist, and this is {args.data}"),
            (not math.isfinite(args.guidance), "--guidance: expected a finite number")):
        if wrong:
            die(message)
    return args


# ---- 1. Cameras (slide Generative models + geometry: "take camera parameters as input!") ---------
# A camera is K, its intrinsics, and a pose, its extrinsics, as camera-to-world: the columns of
# pose (3, 4) are where its right, down and forward point in the world (axes as in OpenCV), and its
# centre. A point X of the world is seen at K R^T (X - c), R = pose[:, :3], c = pose[:, 3]; the
# usual [R|t], world-to-camera, is [R^T | -R^T c]. The middle of the pixel in row i and column j
# is (j + 0.5, i + 0.5).


def intrinsics(fov, size):
    """K (..., 3, 3) for a field of view (...) in degrees, of square pictures of size x size."""
    K = torch.zeros(*fov.shape, 3, 3, device=fov.device)
    K[..., 0, 0] = K[..., 1, 1] = size / 2 / torch.tan(torch.deg2rad(fov) / 2)
    K[..., 0, 2] = K[..., 1, 2] = size / 2
    K[..., 2, 2] = 1
    return K


def resized(K, scale, left=0.0, top=0.0):
    """K (..., 3, 3) after the picture was enlarged `scale` times and then cut from (left, top): a
    resize scales focal lengths and centre alike, a cut moves the centre only."""
    M = K.new_tensor([[scale, 0, -left], [0, scale, -top], [0, 0, 1]])
    return M @ K


def look_at(eye, target):
    """Poses (..., 3, 4) of cameras at eye (..., 3) that look at target (..., 3), z being up."""
    forward = F.normalize(target - eye, dim=-1)
    up = torch.zeros_like(forward)
    up[..., 2] = 1
    right = F.normalize(torch.linalg.cross(forward, up, dim=-1), dim=-1)
    down = torch.linalg.cross(forward, right, dim=-1)
    return torch.stack([right, down, forward, eye], -1)


def project(K, pose, X):
    """Points X (..., 3) of the world -> pixels (..., 2), (u, v), and depth (...)."""
    local = ((X - pose[..., 3])[..., None, :] @ pose[..., :3])[..., 0, :]  # R^T (X - c)
    u = (K @ local[..., None])[..., 0]
    return u[..., :2] / u[..., 2:], local[..., 2]


def pixel_rays(K, pose, H, W):
    """Unit directions (..., H, W, 3), in the world, in which the pixels look: R K^-1 (u, v, 1)."""
    v, u = torch.meshgrid(torch.arange(H, device=K.device) + 0.5,
                          torch.arange(W, device=K.device) + 0.5, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], -1).to(K.dtype)  # (H, W, 3)
    M = pose[..., :3] @ torch.linalg.inv(K)  # (..., 3, 3)
    return F.normalize(torch.einsum("...ij,hwj->...hwi", M, pixels), dim=-1)


def plucker(K, pose, H, W):
    """Pluecker coordinates (..., 6, H, W) of the pixels' rays: direction d and moment o x d, which
    is the same for every point o of the ray. Translations are as pose has them: see normalised."""
    d = pixel_rays(K, pose, H, W)  # (..., H, W, 3)
    o = pose[..., None, None, :, 3].expand_as(d)
    return torch.cat([d, torch.linalg.cross(o, d, dim=-1)], -1).movedim(-1, -3)


def normalised(pose):
    """Poses (B, F, 3, 4) with the first camera at distance 1 from the origin: a scene twice as
    large, seen from twice as far, makes the same pictures and must be the same input."""
    unit = pose[:, :1, :, 3:].norm(dim=2, keepdim=True)  # (B, 1, 1, 1)
    return torch.cat([pose[..., :3], pose[..., 3:] / unit], -1)


def plane_points(K, pose, H, W, heights=(0.0, 0.15)):
    """Where the pixels' rays cross two horizontal planes, heights in the unit of pose: x and y on
    each, (..., 4, H, W), the coordinates of a light field (Levoy & Hanrahan 1996). A thing near a
    plane has there, seen by any camera, nearly the same ones. Rays that do not fall are taken to
    fall a little."""
    d, o = pixel_rays(K, pose, H, W), pose[..., None, None, :, 3]  # (..., H, W, 3), (..., 1, 1, 3)
    points = [o[..., :2] + (h - o[..., 2:]) / d[..., 2:].clamp(max=-0.1) * d[..., :2]
              for h in heights]
    return torch.cat(points, -1).movedim(-1, -3).clamp(-2, 2)


def ray_basis(rays):
    """Numbers (..., k, H, W) and their Fourier basis, (..., 7 k, H, W): sines and cosines of pi,
    2 pi and 4 pi times each. A network tells near rays apart only so (Mildenhall et al. 2020)."""
    angle = torch.cat([math.pi * 2**k * rays for k in range(3)], -3)
    return torch.cat([rays, angle.sin(), angle.cos()], -3)


def mirrored(K, pose, W):
    """The cameras of the mirrored pictures in the mirrored world: R -> M R M and c -> M c with M =
    diag(-1, 1, 1), and the centre's column cx -> W - cx. Still right-handed, unlike rays that are
    mirrored as a picture."""
    M = torch.diag(pose.new_tensor([-1, 1, 1]))
    K = K.clone()
    K[..., 0, 2] = W - K[..., 0, 2]
    return K, torch.cat([M @ pose[..., :3] @ M, M @ pose[..., 3:]], -1)


# ---- 2. Two worlds whose laws are known ----------------------------------------------------------


def bounce(start, velocity, frames, low, high):
    """Where something is in each frame that starts at `start`, moves by `velocity` pixels a frame
    and is thrown back at low and high. start, velocity (...) -> (..., frames)."""
    f = torch.arange(frames, device=start.device)
    span = high - low
    way = (start[..., None] - low + velocity[..., None] * f) % (2 * span)
    return low + span - (way - span).abs()


def digit_clips(digits, labels, n, frames, H):
    """n clips of two digits that move by half a pixel to 2 pixels a frame (at 32 x 32) and bounce:
    video (n, F, 1, H, H) in [-1, 1], centres (n, F, 2, 2) as (row, column) in pixels, labels
    (n, 2). digits (M, 1, s, s) in 0..1. Randomness: torch's."""
    s, device = digits.shape[-1], digits.device
    pick = torch.randint(len(digits), (n, 2), device=device)
    start = s / 2 + (H - s) * torch.rand(n, 2, 2, device=device)
    speed = (0.5 + 1.5 * torch.rand(n, 2, device=device)) * H / 32  # pixels a frame
    angle = 2 * math.pi * torch.rand(n, 2, device=device)
    velocity = speed[..., None] * torch.stack([angle.sin(), angle.cos()], -1)
    centres = bounce(start, velocity, frames, s / 2, H - s / 2).permute(0, 3, 1, 2)  # (n, F, 2, 2)
    # where in a digit's square, -1..1, does a pixel at -1..1 fall: (H/s) x + shift
    shift = (H - 2 * centres.flatten(0, 2)) / s  # (n F 2, 2)
    theta = torch.zeros(len(shift), 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = H / s
    theta[:, 0, 2], theta[:, 1, 2] = shift[:, 1], shift[:, 0]
    ink = digits[pick][:, None].expand(-1, frames, -1, -1, -1, -1).flatten(0, 2)  # (n F 2, 1, s, s)
    place = F.affine_grid(theta, (len(shift), 1, H, H), align_corners=False)
    x = F.grid_sample(ink, place, align_corners=False).view(n, frames, 2, 1, H, H).amax(2)
    return 2 * x - 1, centres, labels[pick]


HUES = torch.tensor([[0.95, 0.15, 0.15], [0.15, 0.85, 0.2], [0.2, 0.3, 0.95],
                     [0.95, 0.9, 0.15], [0.9, 0.2, 0.85], [0.15, 0.9, 0.9]])  # of the spheres
TABLE, TILE = 1.2, 0.8  # a square from -1.2 to 1.2, of 3 x 3 tiles
SKY = torch.tensor([0.10, 0.12, 0.18])


class Scenes(NamedTuple):
    """n scenes of S spheres on a chequered table at z = 0, under one sun."""
    centre: torch.Tensor  # (n, S, 3)
    radius: torch.Tensor  # (n, S)
    colour: torch.Tensor  # (n, S, 3), 0..1
    light: torch.Tensor  # (n, 3) unit vector towards the sun
    tone: torch.Tensor  # (n, 2) grey of bright and dark tiles, 0..1

    def pick(self, index):
        return Scenes(*(a[index] for a in self))


def random_scenes(n, rng):
    """n scenes of two spheres of different colours that do not touch, on the CPU."""
    u = lambda low, high, *size: torch.from_numpy(rng.uniform(low, high, (n, *size))).float()
    radius = u(0.22, 0.4, 2)
    angle = torch.stack([a := u(0, 2 * math.pi), a + torch.deg2rad(u(130, 230))], 1)
    away = u(0.45, 0.8, 2)
    centre = torch.stack([away * angle.cos(), away * angle.sin(), radius], -1)
    colour = HUES[torch.from_numpy(rng.permuted(np.tile(np.arange(6), (n, 1)), axis=1)[:, :2])]
    high, around = torch.deg2rad(u(40, 65)), u(0, 2 * math.pi)
    light = torch.stack([high.cos() * around.cos(), high.cos() * around.sin(), high.sin()], -1)
    return Scenes(centre, radius, colour, light, torch.stack([u(0.7, 0.95), u(0.3, 0.5)], 1))


def orbit(azimuth, elevation, distance, fov, size):
    """Cameras on a circle around the table: azimuth (..., F), others (...), all angles in degrees
    -> K (..., F, 3, 3), pose (..., F, 3, 4)."""
    a, e = torch.deg2rad(azimuth), torch.deg2rad(elevation)[..., None].expand_as(azimuth)
    eye = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], -1)
    eye = distance[..., None, None] * eye
    pose = look_at(eye, torch.zeros_like(eye) + eye.new_tensor([0, 0, 0.15]))
    return intrinsics(fov[..., None].expand_as(azimuth), size), pose


def random_orbits(n, frames, size, rng):
    """n paths: anywhere on the circle, 12 to 24 degrees from frame to frame, in either sense."""
    u = lambda low, high: torch.from_numpy(rng.uniform(low, high, n)).float()
    step = u(12, 24) * torch.from_numpy(rng.choice([-1, 1], n)).float()
    azimuth = u(0, 360)[:, None] + step[:, None] * torch.arange(frames)
    return orbit(azimuth, u(25, 50), u(2.7, 3.3), u(38, 46), size)


def cast(scenes, o, d):
    """What rays meet. scenes of n, o (n, 3), d (n, P, 3) -> which (n, P): 0..S-1 a sphere, S the
    table, S + 1 nothing; point (n, P, 3); lit (n, P), whether the sun shines there."""
    # |o + t d - centre|^2 = r^2:  t = -b - sqrt(b^2 - c)
    oc = o[:, None] - scenes.centre  # (n, S, 3)
    b, c = d @ oc.mT, (oc.square().sum(-1) - scenes.radius**2)[:, None]  # (n, P, S), (n, 1, S)
    root = b * b - c
    t = torch.where((root > 0) & (b < 0), -b - root.clamp(min=0).sqrt(), math.inf)
    floor = torch.where(d[..., 2] < 0, -o[:, None, 2] / d[..., 2], math.inf)
    at = o[:, None, :2] + floor.nan_to_num(posinf=0)[..., None] * d[..., :2]
    floor = torch.where((at.abs() <= TABLE).all(-1), floor, math.inf)
    t, which = torch.cat([t, floor[..., None]], -1).min(-1)  # (n, P)
    which = torch.where(t.isinf(), len(scenes.radius[0]) + 1, which)
    point = o[:, None] + t.nan_to_num(posinf=0)[..., None] * d
    # the same equation from the point towards the sun: is any sphere in the way?
    b = (point @ scenes.light[..., None]) - (scenes.centre @ scenes.light[..., None]).mT
    away = (point.square().sum(-1, keepdim=True) - 2 * point @ scenes.centre.mT
            + scenes.centre.square().sum(-1)[:, None])  # |point - centre|^2 (n, P, S)
    shaded = (b < 0) & (b * b - away + scenes.radius[:, None] ** 2 > 1e-5)
    # a sphere shades itself where it turns away from the sun, which `shade` sees to
    own = F.one_hot(which, len(scenes.radius[0]) + 2)[..., :-2].bool()
    return which, point, ~(shaded & ~own).any(-1)


def shade(scenes, which, point, lit):
    """Colours (n, P, 3) in 0..1 of what rays meet: ambient light, the sun's by Lambert's law."""
    S = len(scenes.radius[0])
    ball = which.clamp(max=S - 1)[..., None]
    pick = lambda a: a.gather(1, ball.expand(*which.shape, a.shape[-1]))  # (n, S, k) -> (n, P, k)
    normal = (point - pick(scenes.centre)) / pick(scenes.radius[..., None])
    facing = (normal @ scenes.light[..., None])[..., 0].clamp(min=0)
    sphere = pick(scenes.colour) * (0.35 + 0.65 * facing * lit)[..., None]
    tile = ((point[..., :2] + TABLE) / TILE).floor().sum(-1).long() % 2  # (n, P)
    floor = (scenes.tone.gather(1, tile) * (0.35 + 0.65 * lit))[..., None].expand_as(point)
    x = torch.where((which < S)[..., None], sphere, floor)
    return torch.where((which > S)[..., None], SKY.to(x.device), x)


def ray_trace(scenes, K, pose, size, fine=2):
    """Pictures (n, 3, size, size) uint8 of n scenes by n cameras, each pixel the mean of fine^2
    rays: at one ray a pixel a far chequerboard is noise, not a picture."""
    out = []
    for part in torch.arange(len(K), device=K.device).split(64):
        n, S, P = len(part), scenes.pick(part), size * fine
        d = pixel_rays(resized(K[part], fine), pose[part], P, P).flatten(1, 2)  # (n, P P, 3)
        x = shade(S, *cast(S, pose[part, :, 3], d)).mT.reshape(n, 3, P, P)
        out.append((255 * F.avg_pool2d(x, fine)).round().to(torch.uint8))
    return torch.cat(out)


def render_clips(scenes, K, pose, size):
    """Clips (n, F, 3, size, size) uint8 of n scenes, F cameras each."""
    every = torch.arange(len(K), device=K.device).repeat_interleave(K.shape[1])
    x = ray_trace(scenes.pick(every), K.flatten(0, 1), pose.flatten(0, 1), size)
    return x.unflatten(0, K.shape[:2])


# ---- 3. Noise (as in ddpm.py, frame by frame) ----------------------------------------------------


def make_abar(schedule, T):
    """abar_t for t = 0..T, float64 (T+1,). Linear: DDPM section 4; cosine: Improved DDPM Eq. 17."""
    t = torch.arange(T + 1, dtype=torch.float64)
    if schedule == "linear":  # beta scaled by 1000/T, or a short T would end far from pure noise
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    else:
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = 1 - f[1:] / f[:-1]
    # abar_t = prod_{i=1..t} (1 - beta_i), abar_0 = 1     (the slide prints a sum; that exceeds 1)
    return torch.cat([torch.ones(1).double(), (1 - beta.clamp(max=0.999)).cumprod(0)])


def schedule_of(args):
    """abar on the device, in float64 except on mps, which has none."""
    abar = make_abar(args.schedule, args.timesteps)
    return abar.to(args.device, torch.float32 if "mps" in args.device else torch.float64)


def signal_and_noise(abar, t, x):
    """sqrt(abar_t) and sqrt(1 - abar_t): how much of both is in x_t; shaped to multiply x."""
    a = abar[t].view(-1, *[1] * (x.ndim - 1))  # (B, 1, 1, 1)
    return a.sqrt().to(x.dtype), (1 - a).sqrt().to(x.dtype)


def q_sample(x0, t, eps, abar):
    """x_t from x_0 at once (slide: Noise schedule; DDPM Eq. 4). x0, eps (B, ...); t (B,), 0..T."""
    signal, noise = signal_and_noise(abar, t, x0)
    # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    return signal * x0 + noise * eps


def target_of(x0, eps, t, abar, predict):
    """What the network shall answer: eps, x0, or v (Salimans & Ho 2022), all shaped as x0."""
    signal, noise = signal_and_noise(abar, t, x0)
    # v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
    return {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[predict]


def x0_of(out, xt, t, abar, predict):
    """The clean image that the network's answer stands for; the equations above, solved for x_0."""
    signal, noise = signal_and_noise(abar, t, xt)
    if predict == "eps":
        return (xt - noise * out) / signal  # near t = T this divides by almost 0
    return out if predict == "x0" else signal * xt - noise * out


# ---- 4. The network (slide Video diffusion models) -----------------------------------------------
# "Share the 2D U-Net across frames, add time attention": frames are put into the batch, so the 2-D
# network is what it was, and between its blocks layers are added in which frames see one another.


def time_basis(t, width):
    """Fourier basis of t (B,) in 0..1000 -> (B, width): wavelengths from 2 pi to 20,000 pi."""
    freq = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = t[:, None] * freq  # (B, width/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, width)


def group_norm(C):
    return nn.GroupNorm(math.gcd(32, C // 4), C)  # DDPM's 32, or fewer, of at least 4 channels


def zero(layer):
    """Starts a layer at zero, so that the branch it ends says nothing at first."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def attend(q, k, v, **mask):
    """softmax(q k^T / sqrt(d)) v: (B, heads, L, d) each. On a CPU in float32: in training PyTorch's
    bf16 kernel is five times slower there."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **mask)
    return F.scaled_dot_product_attention(q, k, v, **mask)


class Attention(nn.Module):
    """Self-attention among the H W places of a feature map; one head."""

    def __init__(self, C):
        super().__init__()
        self.norm, self.qkv = group_norm(C), nn.Conv2d(C, 3 * C, 1)
        self.out = zero(nn.Conv2d(C, C, 1))

    def forward(self, x):  # (B, C, H, W)
        qkv = self.qkv(self.norm(x)).flatten(2).mT[:, None]  # (B, 1, HW, 3C); the 1 is the head
        q, k, v = qkv.chunk(3, dim=3)  # (B, 1, HW, C) each
        h = attend(q, k, v)  # (B, 1, HW, C)
        return x + self.out(h[:, 0].mT.reshape(x.shape))  # (B, C, H, W)


class ResBlock(nn.Module):
    """Two convolutions and a shortcut; time and class enter as one scalar a channel.

    silu(x) = x sigmoid(x). (The slide's sigmoid e^x/(1 + e^x) is inf/inf in code for large x.)
    """

    def __init__(self, C_in, C_out, D, dropout, attends):
        super().__init__()
        self.norm1, self.conv1 = group_norm(C_in), nn.Conv2d(C_in, C_out, 3, padding=1)
        self.time = nn.Linear(D, C_out)
        self.norm2, self.conv2 = group_norm(C_out), zero(nn.Conv2d(C_out, C_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()
        self.attention = Attention(C_out) if attends else nn.Identity()

    def forward(self, x, emb):  # (B, C_in, H, W), (B, D)
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = h + self.time(F.silu(emb))[:, :, None, None]  # f(t): the same at every place
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.skip(x) + h)


class FrameUNet(nn.Module):
    """The 2-D network, f(x_t, t, rays) of single frames: the U-Net of ddpm.py, but that more
    channels may come in than go out (`more`: what is told of each patch, see Clips.rays), and that
    `between(i, h)`, if given, may change what leaves the last block of each size."""

    def __init__(self, C, C_more, patch, width, mults, blocks, dropout):
        super().__init__()
        self.patch, self.width, D = patch, width, 4 * width
        self.time_mlp = nn.Sequential(nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D))
        self.conv_in = nn.Conv2d(C * patch**2 + C_more, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        ch, skips, last = width, [width], len(mults) - 1  # channels now, and of every skip
        for i, m in enumerate(mults):
            for _ in range(blocks):
                self.down.append(ResBlock(ch, m * width, D, dropout, i == last))
                ch = m * width
                skips.append(ch)
            if i < last:
                self.down.append(nn.Conv2d(ch, ch, 3, stride=2, padding=1))
                skips.append(ch)
        self.middle = nn.ModuleList([ResBlock(ch, ch, D, dropout, True),
                                     ResBlock(ch, ch, D, dropout, False)])
        for i, m in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(ch + skips.pop(), m * width, D, dropout, i == last))
                ch = m * width
            if i > 0:
                self.up.append(nn.Conv2d(ch, ch, 3, padding=1))
        self.norm_out = group_norm(ch)
        self.conv_out = zero(nn.Conv2d(ch, C * patch**2, 3, padding=1))

    def forward(self, x, t, more, between=lambda i, h: h):
        """x (B, C, H, W), t (B,) in 0..1000, more (B, C_more, H/patch, W/patch) -> (B, C, H, W)."""
        emb = self.time_mlp(time_basis(t, self.width))  # (B, D)
        x = F.pixel_unshuffle(x, self.patch)  # (B, C patch^2, H/patch, W/patch)
        h, at = self.conv_in(torch.cat([x, more], 1)), 0
        skips = [h]
        for i, layer in enumerate(self.down):
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
                if i + 1 == len(self.down) or not isinstance(self.down[i + 1], ResBlock):
                    h, at = between(at, h), at + 1
            else:
                h = layer(h)
            skips.append(h)
        h = self.middle[0](h, emb)
        h, at = between(at, h), at + 1
        h = self.middle[1](h, emb)
        for i, layer in enumerate(self.up):
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], 1), emb)
                if i + 1 == len(self.up) or not isinstance(self.up[i + 1], ResBlock):
                    h, at = between(at, h), at + 1
            else:
                h = layer(F.interpolate(h, size=skips[-1].shape[2:]))
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch).float()


class TimeBlock(nn.Module):
    """Joins frames: a convolution over the frames beside (kernel: its height and width; 0: none),
    for what moves a little, then attention, for what is far: on maps of at most joint x joint each
    place looks at all places of all frames, which a moving camera needs; on larger ones at the
    same place only, which is cheap. Both add nothing at first: a clip is a pile of pictures."""

    def __init__(self, C, C_more, heads, kernel, joint):
        super().__init__()
        self.heads, self.joint, self.seen = heads, joint, None
        if kernel:
            self.norm_conv = group_norm(C)
            self.conv = zero(nn.Conv3d(C, C, (3, kernel, kernel), padding=(1, *[kernel // 2] * 2)))
        self.norm, self.place = group_norm(C), nn.Linear(3 * 32, C)
        # added to queries and keys alike: what is told alike is looked at first, before anything
        # is learned. With random queries and keys it takes thousands of steps to find what fits.
        self.more = nn.Conv2d(C_more, C, 1, bias=False)
        nn.init.normal_(self.more.weight, std=0.3)
        self.qkv, self.out = nn.Linear(C, 3 * C), zero(nn.Linear(C, C))

    def forward(self, x, frames, more):
        """x (B F, C, h, w) -> the same; frames: F; more (B F, C_more, H', W')."""
        h, w = x.shape[2:]
        if hasattr(self, "conv"):  # (B, C, F, h, w)
            a = F.silu(self.norm_conv(x)).unflatten(0, (-1, frames)).transpose(1, 2)
            x = x + self.conv(a).transpose(1, 2).flatten(0, 1)  # (B F, C, h, w)
        everywhere = max(h, w) <= self.joint
        rows = lambda b: b.flatten(2).mT.unflatten(0, (-1, frames))  # -> (B, F, h w, C)
        # which frame, row and column: without it time would have no direction
        where = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in (frames, h, w)))
        a = rows(self.norm(x))
        a = a + self.place(time_basis(where.flatten().float(), 32).view(frames, h * w, 96))
        q, k, v = self.qkv(a).chunk(3, -1)
        same = rows(self.more(F.adaptive_avg_pool2d(more, (h, w))))
        q, k = q + same, k + same
        # tokens that see one another side by side: (B, 1, F h w, C), or (B, h w, F, C)
        turn = lambda b: b.flatten(1, 2)[:, None] if everywhere else b.transpose(1, 2)
        q, k, v = (turn(b).unflatten(3, (self.heads, -1)).transpose(2, 3).flatten(0, 1)
                   for b in (q, k, v))  # (B or B h w, heads, tokens, C/heads) each
        if self.seen is not None and everywhere:
            self.size = h, w
            weight = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1)
            self.seen.append(weight.mean(1))  # (B, tokens, tokens)
        a = attend(q, k, v).transpose(1, 2).flatten(2).unflatten(0, (len(x) // frames, -1))
        a = a.unflatten(2, (frames, h * w))[:, 0] if everywhere else a.transpose(1, 2)
        return x + self.out(a).flatten(0, 1).mT.reshape(x.shape)


class VideoUNet(nn.Module):
    """f(x_t, t, rays) of clips: `image`, the 2-D network, whose checkpoints load unchanged, and
    `time`, what is added for video."""

    def __init__(self, C, C_more, patch, width, mults, blocks, dropout, heads, kernel, joint=8):
        super().__init__()
        self.image = FrameUNet(C, C_more, patch, width, mults, blocks, dropout)
        levels = [*range(len(mults)), len(mults) - 1, *reversed(range(len(mults)))]
        self.time = nn.ModuleList([TimeBlock(mults[i] * width, C_more, heads, kernel, joint)
                                   for i in levels])

    def forward(self, x, t, rays, joined=None):
        """x (B, F, C, H, W); t (B, F), each frame's own: 0 says that it is known; rays
        (B, F, C_more, H/patch, W/patch): see Clips. Only the first `joined` of the batch are clips,
        all of them if it is None; frames of the others are single pictures: they skip time."""
        B, frames = x.shape[:2]
        n, more = (B if joined is None else joined) * frames, rays.flatten(0, 1)

        def between(i, h):
            return torch.cat([self.time[i](h[:n], frames, more[:n]), h[n:]]) if n else h

        return self.image(x.flatten(0, 1), t.flatten(), more, between).view_as(x)


# ---- 5. The loss ---------------------------------------------------------------------------------


def draw_known(B, frames, device):
    """Which frames of clips in training are given, (B, F) bool: none, the first, the first few up
    to half of them, or the first and the last."""
    kind = torch.multinomial(torch.tensor([0.15, 0.5, 0.2, 0.15]), B, replacement=True).to(device)
    few = torch.randint(1, frames // 2 + 1, (B,), device=device)
    count = torch.where(kind == 0, 0, torch.where(kind == 2, few, 1))
    known = torch.arange(frames, device=device) < count[:, None]
    known[:, -1] |= kind == 3
    return known


def video_loss(net, x0, rays, t, eps, known, joined, abar, predict):
    """Mean of |f(x_t, t, rays) - target|^2 over the frames that are not known. x0, eps
    (B, F, C, H, W), t (B, F), which is 0 and leaves x_0 as it is where known (B, F) is true."""
    x, e, tt = x0.flatten(0, 1), eps.flatten(0, 1), t.flatten()
    out = net(q_sample(x, tt, e, abar).view_as(x0), t, rays, joined).flatten(0, 1)
    error = (out - target_of(x, e, tt, abar, predict)).square().mean((1, 2, 3))  # (B F,)
    new = ~known.flatten()
    return (error * new).sum() / new.sum().clamp(min=1)


# ---- 6. The sampler ------------------------------------------------------------------------------


def dpmpp_step(xt, x0, a_t, a_s, x0_prev, a_prev):
    """DPM-Solver++(2M) (Lu et al. 2022): DDIM, with x0 extrapolated from the previous guess.

    The first step has no previous guess, the final one (a_s = 1) infinite log-SNR: both are DDIM.
    """
    if a_s == 1:
        return x0
    half_log_snr = lambda a: 0.5 * math.log(a / (1 - a))
    lam_t, lam_s = half_log_snr(a_t), half_log_snr(a_s)
    if x0_prev is not None:
        r = (lam_t - half_log_snr(a_prev)) / (lam_s - lam_t)
        x0 = x0 + (x0 - x0_prev) / (2 * r)
    return math.sqrt((1 - a_s) / (1 - a_t)) * xt - math.sqrt(a_s) * math.expm1(lam_t - lam_s) * x0


def stride(T, steps):
    """Pairs (t, s) from T down to 0 in `steps` equal strides, at most T of them."""
    steps = min(steps, T)
    times = [round(T * i / steps) for i in range(steps, -1, -1)]
    return list(zip(times, times[1:]))


@torch.no_grad()
def sample_clips(net, x, clean, known, rays, abar, predict, steps, joined=None, none=None, w=1.0):
    """From noise x (B, F, C, H, W) to clips; frames that are known (B, F) are those of clean, and
    the network is told so by their t = 0. If w is not 1, guided away from what it says when it is
    told `none` instead of rays (Ho & Salimans 2022)."""
    a, x0_prev, a_prev = abar.tolist(), None, None
    given, flat = known[:, :, None, None, None], lambda v: v.flatten(0, 1)
    for t, s in stride(len(abar) - 1, steps):
        x = torch.where(given, clean, x)
        tt = torch.where(known, 0, t)  # (B, F)
        out = net(x, tt, rays, joined)
        if w != 1:
            uncond = net(x, tt, none, joined)
            out = uncond + w * (out - uncond)
        x0 = x0_of(flat(out), flat(x), flat(tt), abar, predict).clamp(-1, 1).view_as(x)
        x = dpmpp_step(x, x0, a[t], a[s], x0_prev, a_prev)
        x0_prev, a_prev = x0, a[t]
    return torch.where(given, clean, x)


# ---- 7. A tracker for the report -----------------------------------------------------------------


class Tracker(nn.Module):
    """Finds two digits in a picture, white on black and perhaps over one another: for each cell of
    2 x 2 pixels, which digit, or none, has its centre there, and where in the cell."""

    def __init__(self, D):
        super().__init__()
        layers = [nn.Conv2d(1, D, 3, padding=1), nn.ReLU(), nn.Conv2d(D, D, 4, 2, 1), nn.ReLU()]
        for far in (1, 2, 1, 4, 1):
            layers += [nn.Conv2d(D, D, 3, padding=far, dilation=far), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(D, 11 + 2, 1))

    def forward(self, x):
        """x (B, 1, H, W) in [-1, 1] -> logits (B, 11, H/2, W/2), the last of no digit, and the
        centre's distance from the cell's, in cells (B, 2, H/2, W/2)."""
        return self.net(x).float().split([11, 2], 1)


def tracker_loss(tracker, x, centres, labels):
    """Cross-entropy of all cells, and squared distance in those with a digit; a digit each. x
    (B, 1, H, W), centres (B, 2, 2) in pixels, labels (B, 2)."""
    logits, off = tracker(x)
    cell = (centres / 2).long()  # (B, 2, 2)
    b, (row, col) = torch.arange(len(x), device=x.device)[:, None], cell.unbind(-1)
    target = torch.full_like(logits[:, 0], 10, dtype=torch.long)
    target[b, row, col] = labels
    found = F.cross_entropy(logits, target, reduction="sum") / labels.numel()
    return found + (off[b, :, row, col] - (centres / 2 - cell - 0.5)).square().mean()


@torch.no_grad()
def found_digits(tracker, x):
    """Pictures (N, 1, H, W) in [-1, 1] -> centres (N, 2, 2) in pixels, labels (N, 2), and how sure
    it is that they are there (N, 2), as numpy arrays. Order: the surer first."""
    found = []
    for part in x.split(512):
        logits, off = tracker(part)
        p = logits.softmax(1)[:, :10]  # (n, 10, h, w)
        h, w = p.shape[2:]
        row, col = torch.meshgrid(*(torch.arange(k, device=x.device) for k in (h, w)),
                                  indexing="ij")
        centre = 2 * (torch.stack([row, col]) + 0.5 + off)  # (n, 2, h, w)
        here = []
        for _ in range(2):
            mass = p.sum(1)  # (n, h, w)
            peak = (F.avg_pool2d(mass, 3, 1, 1, count_include_pad=False)).flatten(1).argmax(1)
            r, c = (peak // w)[:, None, None], (peak % w)[:, None, None]
            near = ((row - r).abs() <= 1) & ((col - c).abs() <= 1)  # (n, h, w)
            weight = mass * near
            total = weight.sum((1, 2))
            at = (centre * weight[:, None]).sum((2, 3)) / total[:, None]  # (n, 2)
            label = (p * near[:, None]).sum((2, 3)).argmax(1)
            here.append((at, label, total))
            p = p * ~near[:, None]
        found.append([torch.stack(v, 1) for v in zip(*here)])
    return [torch.cat(v).cpu().numpy() for v in zip(*found)]


# ---- 8. Train ------------------------------------------------------------------------------------


class Film(nn.Module):
    """All parts: the network and its average, and for moving digits the tracker."""

    def __init__(self, args):
        super().__init__()
        C, more = args.shape[0], {"orbit": 34, "moving-mnist": 31}.get(args.data, 21)
        self.net = VideoUNet(C, more, args.patch, args.width, args.mults, args.blocks,
                             args.dropout, args.heads, args.time_kernel)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        if args.data == "moving-mnist":
            self.tracker = Tracker(args.side_width)


class ClipStage(nn.Module):
    """Single pictures (`image`), or clips with some pictures among them (`video`), for fit:
    batches, the loss, and what the bar shows."""

    unit = "squared error"

    def __init__(self, args, model, source, name):
        super().__init__()
        self.name, self.args, self.source, video = name, args, source, name == "video"
        self.net = model.net if video else model.net.image
        self.model = (model,)  # a tuple, so that the other parts' weights do not count as its own
        self.abar = schedule_of(args)
        self.steps = args.steps if video else args.image_steps
        self.batch_size, self.lr = args.batch_size, args.lr if video else args.image_lr
        self.joined = self.batch_size - round(args.loose * self.batch_size) if video else 0
        if video and self.joined < WORLD:
            die(f"--loose {args.loose} leaves {self.joined} clips a batch, for {WORLD} processes")

    def batch(self, step):
        B, frames, device = self.batch_size, self.args.frames, self.args.device
        clips = self.source.draw(B)
        # of 1 clip in 10 cameras or digits are not told, to compare with, and for guidance
        told = torch.rand(B, 1, 1, 1, 1, device=device) > 0.1
        x0, rays = clips.video, clips.rays(self.args.patch, told)
        loose = torch.arange(B, device=device)[:, None] >= self.joined  # (B, 1)
        known = draw_known(B, frames, device) & ~loose
        u = 1 - torch.rand(B, frames, device=device)  # 0 < u <= 1
        t = (self.args.timesteps * u**self.args.noisy).ceil().long()
        t = torch.where(loose, t, t[:, :1])  # a clip's frames are equally noisy
        batch = [x0, rays, torch.where(known, 0, t), torch.randn_like(x0), known]
        return [a[RANK::WORLD] for a in batch]

    def forward(self, x0, rays, t, eps, known):
        joined = len(range(RANK, self.joined, WORLD))
        error = video_loss(self.model[0].net, x0, rays, t, eps, known, joined, self.abar,
                           self.args.predict)
        return error, error

    def after(self, step):
        ema_update(self.model[0].ema, self.model[0].net, step, self.args.ema)

    def text(self):
        return f" of {self.args.predict}"

    def picture(self):
        clips = fixed_clips(self.args, 6)
        return film_strip(new_clips(self.args, self.model[0], clips, nothing_known(clips),
                                    alone=self.name == "image"))


class TrackerStage(nn.Module):
    """Frames of real clips and what is in them."""

    name, unit = "tracker", "nats a digit"

    def __init__(self, args, model, source):
        super().__init__()
        self.net, self.args, self.source = model.tracker, args, source
        self.steps, self.batch_size, self.lr = args.side_steps, args.side_batch, args.side_lr

    def batch(self, step):
        clips = self.source.draw(self.batch_size, 1)
        found = clips.video[:, 0], clips.centres[:, 0], clips.labels
        return [a[RANK::WORLD] for a in found]

    def forward(self, x, centres, labels):
        loss = tracker_loss(self.net, x, centres, labels)
        return loss, loss

    def text(self):
        return ""


@torch.no_grad()
def ema_update(ema, model, step, decay):
    """ema <- decay ema + (1 - decay) model, in float32; a short memory in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def fit(args, model, stage, state):
    """Trains one stage from where state, a checkpoint, stands; writes it and pictures on the way.
    False: stopped by Ctrl-C."""
    weights = [p for p in stage.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(weights, stage.lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    begin, history = 1, state["history"].setdefault(stage.name, [])
    if state["part"] == stage.name:
        load_state(opt, state, "optimizer")
        begin = state["step"] + 1
    if stage.batch_size % WORLD:
        die(f"a batch of {stage.batch_size} cannot be shared evenly by {WORLD} processes")
    say(f"{stage.name}: {sum(p.numel() for p in weights):,} parameters, {stage.steps:,} steps of "
        f"{stage.batch_size}")
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        stage.net.compile()
    net = DistributedDataParallel(stage) if WORLD > 1 else stage
    stop, total, counted, clock, since = ctrl_c(), 0.0, 0, time.time(), begin - 1
    bar = tqdm(range(begin, stage.steps + 1), initial=begin - 1, total=stage.steps,
               desc=stage.name, disable=RANK > 0 or None)
    model.train()
    for step in bar:
        # Step n draws from a seed of its own: --resume needs no saved random state, and all
        # processes of torchrun draw the same global batch, of which each takes its share.
        torch.manual_seed((args.seed * 1_000_003 + step) % 2**63)
        batch = stage.batch(step)
        for group in opt.param_groups:  # warm up, then down to zero
            group["lr"] = stage.lr * min(1, step / args.warmup) * (1 - (step - 1) / stage.steps)
        with autocast(args):
            error, figure = net(*batch)
        error.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        opt.zero_grad()
        if hasattr(stage, "after"):
            stage.after(step)
        total, counted = total + figure.detach(), counted + 1
        done = step == stage.steps or bool(stop)
        write = done or step % args.every == 0
        if write or step == 1 or step % 20 == 0:  # not each step: reading the loss waits for a GPU
            if WORLD > 1:
                dist.all_reduce(total)
            history.append((step, float(total) / counted / WORLD))
            total, counted = 0.0, 0
            recent = np.mean([figure for _, figure in history[-25:]])
            text = f"{recent:.4f} {stage.unit}{stage.text()}"
            bar.set_postfix_str(text)
            if not math.isfinite(history[-1][1]):
                die(f"the loss is {history[-1][1]} at step {step}: lower the learning rate "
                    f"{stage.lr}; the last checkpoint is kept")
        if write and RANK == 0:
            speed = (step - since) / (time.time() - clock)
            state.update(part=stage.name, step=step, model=model.state_dict(),
                         optimizer=opt.state_dict())
            save_checkpoint(args.out / "model.pt", state)
            save_history(args.out, state["history"])
            tqdm.write(f"{stage.name} {step:,}: {text}, {speed:.1f} steps/s, "
                       f"{speed * stage.batch_size:.0f} samples/s")
            sys.stdout.flush()
            if not done and hasattr(stage, "picture"):
                model.eval()
                save_png(args.out / f"{stage.name}_{step:06}.png", stage.picture()[None])
                model.train()
        if write or step == begin:  # the clock leaves out pictures, and torch.compile's first step
            clock, since = time.time(), step
        if done and step < stage.steps:
            say(f"stopped at {step}; to go on: python {NAME}.py --train --resume --out {args.out}")
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model.eval()
    return not stop


def train(args, ckpt=None):
    """Trains one part after the other and returns the model; ckpt: go on."""
    if ckpt and "optimizer" not in ckpt:
        die("--resume: the checkpoint was made to sample, and cannot be trained further")
    source = SOURCES.get(args.data, OwnClips)(args, "train")
    args.shape = list(source.shape)
    side = args.patch * 2 ** (len(args.mults) - 1)
    if args.shape[1] % side or args.shape[2] % side:
        die(f"--data {args.data}: pictures of {args.shape[1]} x {args.shape[2]}, but height and "
            f"width must be multiples of {side} for this --patch and --mults")
    torch.manual_seed(args.seed)
    model = Film(args).to(args.device).eval()
    state = ckpt or dict(file=NAME, part="", step=0, history={})
    state["config"] = {k: getattr(args, k) for k in CONFIG}
    if ckpt:
        load_state(model, ckpt, "model")
    say(f"{source.text}; clips of {args.frames} frames, {args.shape}")
    parts = ["image"] * (args.stage != "video") + ["video"] * (args.stage != "image")
    parts += ["tracker"] * (args.data == "moving-mnist" and args.stage != "image")
    steps = {"image": args.image_steps, "video": args.steps, "tracker": args.side_steps}
    if state["part"] in parts:  # what comes before it is done
        parts = parts[parts.index(state["part"]) + (state["step"] >= steps[state["part"]]):]
        if not parts:
            die(f"--resume: all {state['step']} steps of the {state['part']} are done")
    for part in parts:
        stage = TrackerStage(args, model, source) if part == "tracker" else ClipStage(
            args, model, source, part)
        start = time.time()
        if not fit(args, model, stage, state):
            sys.exit(0)
        say(f"{part}: {(time.time() - start) / 60:.1f} minutes"
            + (f", held-out error of x_0 {held_out(args, model):.4f}" if part == "video" else ""))
    return model


@torch.no_grad()
def held_out(args, model, num=64):
    """Squared error of x_0, as guessed from one known frame, over noise levels and the other frames
    of held-out clips: a number by which trainings compare."""
    clips, abar, errors = fixed_clips(args, num), schedule_of(args), []
    known = nothing_known(clips)
    known[:, 0] = True
    rays, rng = clips.rays(args.patch), torch.Generator().manual_seed(0)
    for t in range(args.timesteps // 20, args.timesteps, args.timesteps // 10):
        eps = torch.randn(clips.video.shape, generator=rng).to(args.device)
        tt = torch.where(known, 0, t)
        flat = [a.flatten(0, 1) for a in (clips.video, tt, eps)]
        xt = q_sample(*flat, abar)
        with autocast(args):
            out = model.ema(xt.view_as(eps), tt, rays).flatten(0, 1)
        x0 = x0_of(out, xt, flat[1], abar, args.predict)
        errors.append((x0 - flat[0]).square()[~known.flatten()].mean())
    return float(torch.stack(errors).mean())


# ---- 9. Generate ---------------------------------------------------------------------------------


def nothing_known(clips):
    """No frame is given: (N, F) all false."""
    return torch.zeros(clips.video.shape[:2], dtype=torch.bool, device=clips.video.device)


def new_clips(args, model, clips, known, alone=False, told=True, more=0):
    """Clips (N, F, C, H, W) in [-1, 1]: frames where known (N, F) is true are those of clips, the
    others are new. alone: each frame for itself, without time; told: the cameras, or digits; more:
    is added to --seed, for other noise."""
    rng, abar, found = torch.Generator().manual_seed(args.seed + more), schedule_of(args), []
    noise = torch.randn(clips.video.shape, generator=rng)  # on the CPU: the same whatever device
    rays, none = clips.rays(args.patch, told), clips.rays(args.patch, False)
    told = told and not (clips.K is None and clips.labels is None)  # else there is nothing to tell
    w = args.guidance if told else 1.0
    for i in torch.arange(len(noise)).split(64):
        with autocast(args):
            found.append(sample_clips(
                model.ema, noise[i].to(args.device), clips.video[i], known[i], rays[i], abar,
                args.predict, args.sample_steps, 0 if alone else None, none[i], w))
    return torch.cat(found)


def windows(length, most, given, anchor):
    """How a clip of `length` frames is made by a network for `most` at a time, from the first
    `given` frames: (known, new), lists of frame numbers. Later windows go on from the last half of
    a window; anchor: from the first frame, which alone is real, and the latest of the others."""
    done, found = given, []
    while done < length:
        known = list(range(max(0, done - max(given, most // 2)) if found else 0, done))
        if anchor and found:
            known = ([0] + known[1 - most // 2:])[:most - 1]
        new = list(range(done, min(length, done + most - len(known))))
        found.append((known, new))
        done = new[-1] + 1
    return found


def long_clips(args, model, clips, given):
    """Clips as long as clips, whose first `given` frames are kept; window by window if that is more
    than was trained."""
    video = clips.video.clone()
    parts = windows(video.shape[1], args.frames, given, args.data == "orbit")
    for i, (known, new) in enumerate(parts):
        part = clips.frames(known + new)._replace(video=video[:, known + new])
        mask = nothing_known(part)
        mask[:, :len(known)] = True
        video[:, new] = new_clips(args, model, part, mask, more=i)[:, len(known):]
    return video


def sample(args, model):
    """New clips in samples.png, a film strip, samples_film.png, which moves, and samples.npz; and
    in prediction.png the truth, and below it what was made of its first frame or frames."""
    start, length = time.time(), args.length or args.frames
    clips = fixed_clips(args, args.num, length)
    if args.digits:
        clips = clips._replace(labels=torch.tensor([args.digits] * args.num, device=args.device))
    x = long_clips(args, model, clips, 0)
    say(f"{args.num} clips of {length} frames in {time.time() - start:.1f} s")
    save_npz(args.save or args.out / "samples.npz",
             to_uint8(x).permute(0, 1, 3, 4, 2).cpu().numpy())
    save_png(args.out / "samples.png", film_strip(x[:8])[None])
    save_png(args.out / "samples_film.png", moving(x))
    given = args.given or min(1 if args.data == "orbit" else args.frames // 2, length - 1)
    predict_clips(args, model, given)
    if args.data == "orbit":
        new_views(args, model)
    say(f"pictures in {args.out}: samples, samples_film, prediction\n"
        f"now try: python {NAME}.py --between --out {args.out}")


def predict_clips(args, model, given):
    """The first `given` frames of held-out clips, continued: prediction.png, truth above it, and
    prediction_film.png."""
    clips = fixed_clips(args, args.num, args.length or args.frames)
    x = long_clips(args, model, clips, given)
    save_png(args.out / "prediction.png", film_strip(x[:6], clips.video[:6], given)[None])
    both = torch.stack([clips.video, x], 1).flatten(0, 1)
    save_png(args.out / "prediction_film.png", moving(both))
    say(f"prediction.png in {args.out}: {given} given frames continued, truth above")


def fill_between(args, model):
    """First and last frame of held-out clips, and what may have been between: between.png, truth
    above it."""
    clips = fixed_clips(args, args.num)
    known = nothing_known(clips)
    known[:, 0] = known[:, -1] = True
    x = new_clips(args, model, clips, known)
    save_png(args.out / "between.png", film_strip(x[:6], clips.video[:6])[None])
    say(f"between.png in {args.out}: all but the first and last frame are new, truth above")


def read_path(path):
    """K (F, 3, 3) and pose (F, 3, 4) of a .npz file, checked."""
    try:
        file = np.load(path)
        K, pose = (torch.from_numpy(np.asarray(file[k], np.float32)) for k in ("K", "pose"))
    except Exception as e:
        die(f"--path {path} cannot be read: {e}")
    if pose.ndim != 3 or pose.shape[1:] != (3, 4) or len(pose) < 2:
        die(f"--path {path}: pose is {tuple(pose.shape)}, expected (F, 3, 4), two frames or more")
    K = K.expand(len(pose), 3, 3) if K.shape == (3, 3) else K
    if K.shape != (len(pose), 3, 3):
        die(f"--path {path}: K is {tuple(K.shape)}, expected (3, 3) or ({len(pose)}, 3, 3)")
    if not (torch.isfinite(K).all() and (K[:, 2] == torch.tensor([0.0, 0, 1])).all()
            and (torch.linalg.det(K).abs() > 1e-6).all()):
        die(f"--path {path}: K is singular or no matrix of intrinsics, whose last row is 0 0 1")
    R = pose[..., :3]
    if not (torch.isfinite(pose).all() and (torch.linalg.det(R) > 0).all()
            and (R @ R.mT - torch.eye(3)).abs().max() < 1e-3):
        die(f"--path {path}: pose[:, :, :3] is no rotation")
    if pose[0, :, 3].norm() < 1e-3:
        die(f"--path {path}: the first camera is at the origin, where the table is")
    return K, pose


def image_file(args, flag, path, any_channels=False):
    """The one image (1, C, H, W) uint8 of a .png, or the first of a .npz or .npy; of the size that
    the model was trained on."""
    if path.suffix.lower() not in (".png", ".npz", ".npy"):
        die(f"{flag} {path}: expected a .png, .npz or .npy file")
    if path.suffix.lower() == ".png":
        data = path.read_bytes()
        try:
            x = read_png(data)[None]
        except NotImplementedError:
            die(f"{flag} {path}: only PNG with 8 bits, not interlaced, is read")
        except Exception as e:
            die(f"{flag} {path} is cut off or damaged ({e})")
        x = x.transpose(0, 3, 1, 2)
    else:
        x = own_data(str(path), flag)[0][:1]
    if list(x.shape[any_channels + 1:]) != args.shape[any_channels:]:
        die(f"{flag} {path}: an image of {list(x.shape[1:])}, but the model was trained on "
            f"{args.shape}")
    return torch.from_numpy(x.copy()).to(args.device)


def new_views(args, model):
    """A scene from one picture: orbit.png, the views side by side, orbit_film.png, and
    epipolar.png."""
    truth, H = None, args.shape[1]
    if args.path:
        K, pose = read_path(args.path)
    else:
        n = args.length or 24
        K, pose = orbit(torch.arange(n) * 360 / n, *torch.tensor([37.0, 3.0, 42.0]), H)
    K, pose = K[None].to(args.device), pose[None].to(args.device)  # (1, F, 3, 3), (1, F, 3, 4)
    if args.orbit and args.orbit != Path():
        first = image_file(args, "--orbit", args.orbit)
        video = to_float(first)[:, None].expand(1, K.shape[1], *args.shape)
    else:
        scenes = random_scenes(1, np.random.default_rng([args.seed, 7]))
        scenes = Scenes(*(a.to(args.device) for a in scenes))
        truth = video = to_float(render_clips(scenes, K, pose, H))
        save_png(args.out / "view.png", to_uint8(video[0, :1]).permute(0, 2, 3, 1).cpu().numpy())
        save_npz(args.out / "cameras.npz", pose[0].cpu(), K=K[0].cpu(), pose=pose[0].cpu())
    x = long_clips(args, model, Clips(video, K, pose), 1)
    shown = range(0, x.shape[1], max(1, x.shape[1] // 8))
    save_png(args.out / "orbit.png", film_strip(
        x[:, shown], None if truth is None else truth[:, shown], 1)[None])
    save_png(args.out / "orbit_film.png", moving(x, 1))
    save_png(args.out / "epipolar.png", epipolar_lines(x[0, shown], K[0, shown], pose[0, shown]))
    say(f"orbit.png, orbit_film.png and epipolar.png in {args.out}; truth above, if it is known")


def epipolar_lines(x, K, pose, width=192):
    """A picture: views x (F, C, H, W), three points of the first marked, the most colourful of its
    left and right half and one in between, and in the others the lines on which these must be seen,
    wherever on its ray each point is."""
    H = x.shape[-1]
    k, half = width // H, H // 2
    colour = F.avg_pool2d(eye_catching(x[0]), 5, 1, 2, count_include_pad=False)[0].cpu()  # (H, H)
    (v1, u1), (v2, u2) = (divmod(int(part.flatten().argmax()), part.shape[1])
                          for part in (colour[:, :half], colour[:, half:]))
    pixels = torch.tensor([[u1, v1], [half + u2, v2], [half, 3 * H // 4]]) + 0.5  # (u, v)
    tiles = []
    for f in range(len(x)):
        tile = to_uint8(x[f]).permute(1, 2, 0).cpu().numpy().repeat(k, 0).repeat(k, 1)
        for p, paint in zip(pixels.tolist(), ((255, 160, 60), (0, 220, 255), (255, 255, 255))):
            if f == 0:
                u, v = (int(k * c) for c in p)
                tile[v - 3:v + 4, u - 3:u + 4] = paint
                continue
            d = pixel_rays(K[:1], pose[:1], H, H)[0, int(p[1]), int(p[0])]
            depth = torch.linspace(0.5, 6, 200, device=d.device)[:, None]
            uv, z = project(K[f], pose[f], pose[0, :, 3] + depth * d)
            uv = (k * uv[z > 0.1]).tolist()
            for a, b in zip(uv, uv[1:]):
                draw_line(tile, a, b, paint)
        tiles.append(np.pad(tile, ((0, 1), (0, 1), (0, 0)), constant_values=90))
    cols = 5
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % cols)
    return np.concatenate([np.concatenate(tiles[i:i + cols], 1)
                           for i in range(0, len(tiles), cols)])[None]


@torch.no_grad()
def frame_attention_maps(args, model, rows=3):
    """Where the brightest, or most colourful, place of the last frame of a held-out clip looks in
    all frames, mean of the layers that look everywhere: attention.png, the clip above, that place
    white in it."""
    clips, parts = fixed_clips(args, rows), []
    H, W = clips.video.shape[3:]
    eps = torch.randn(clips.video.shape, generator=torch.Generator().manual_seed(args.seed))
    xt = q_sample(clips.video.flatten(0, 1), torch.tensor(args.timesteps // 5, device=args.device),
                  eps.flatten(0, 1).to(args.device), schedule_of(args))
    t = torch.full(clips.video.shape[:2], args.timesteps // 5, device=args.device)
    rays = clips.rays(args.patch)
    for layer in model.ema.time:
        layer.seen = []
    with autocast(args):
        model.ema(xt.view_as(clips.video), t, rays)
    seen = [(layer.size, w) for layer in model.ema.time for w in layer.seen]
    for layer in model.ema.time:
        layer.seen = None
    if not seen:
        return say("attention.png left out: all maps are too large to look everywhere")
    h, w = max(size for size, _ in seen)
    weight = torch.stack([a for size, a in seen if size == (h, w)]).mean(0)  # (rows, F h w, F h w)
    for clip, a in zip(clips.video, weight):
        at = int(F.adaptive_avg_pool2d(eye_catching(clip[-1]), (h, w)).argmax())
        looks = a[at - h * w].view(-1, 1, h, w)  # (F, 1, h, w), of a place of the last frame
        looks = F.interpolate((looks / looks.max()).sqrt(), (H, W)).expand_as(clip) * 2 - 1
        mark = F.one_hot(torch.tensor(at), h * w).view(1, 1, h, w).float().to(clip.device)
        last = torch.maximum(clip[-1], F.interpolate(mark, (H, W))[0] * 2 - 1)
        parts += [torch.cat([clip[:-1], last[None]]), looks]
    save_png(args.out / "attention.png", film_strip(torch.stack(parts))[None])
    say(f"attention.png in {args.out}: there looks the white square of the last frame")


def eye_catching(x):
    """How colourful, or bright if it has no colours, each pixel is: (C, H, W) -> (1, H, W)."""
    return x.amax(0, keepdim=True) - (x.amin(0, keepdim=True) if len(x) == 3 else 0)


def film_strip(x, truth=None, given=0):
    """Clips (N, F, C, H, W) in [-1, 1] as a picture, a row a clip; truth: above each row the real
    clip, and a white line where the `given` frames end."""
    rows = []
    for i, clip in enumerate(x):
        both = [clip] if truth is None else [truth[i], clip]
        row = grid(to_uint8(torch.cat(both)), len(clip), 900)
        if given:
            at = row.shape[1] // len(clip) * given
            row[:, at - 2:at] = 255
        rows += [row, np.full((4, row.shape[1], 3), 255, np.uint8)][:1 if truth is None else 2]
    return np.concatenate(rows)


def moving(x, cols=4):
    """Clips (N, F, C, H, W) in [-1, 1] as frames (F, H', W', 3) of an animation."""
    return np.stack([grid(to_uint8(frame), cols, 600) for frame in x.transpose(0, 1)])


# ---- 10. Is motion kept? -------------------------------------------------------------------------


def follow(tracker, x):
    """Two tracks a clip, of clips x (N, F, 1, H, W): centres (N, 2, F, 2) in pixels, NaN where a
    digit was not found, and labels (N, 2, F). A digit is taken for the track that is to be expected
    nearest, by its last place and velocity."""
    N, frames = x.shape[:2]
    centres, labels, sure = (a.reshape(N, frames, *a.shape[1:])
                             for a in found_digits(tracker, x.flatten(0, 1)))
    centres = np.where(sure[..., None] > 0.5, centres, np.nan)
    for n in range(N):
        at, velocity = np.nan_to_num(centres[n, 0], nan=x.shape[-1] / 2), np.zeros((2, 2))
        for f in range(1, frames):
            far = lambda new: np.nansum(np.linalg.norm(new - at - velocity, axis=1))
            if far(centres[n, f, ::-1]) < far(centres[n, f]):
                centres[n, f], labels[n, f] = centres[n, f, ::-1].copy(), labels[n, f, ::-1].copy()
            new = centres[n, f]
            velocity = np.where(np.isnan(new), velocity, new - at)
            at = np.where(np.isnan(new), at + velocity, new)
    return centres.transpose(0, 2, 1, 3), labels.transpose(0, 2, 1)


def law_error(tracks, low, high, fastest=3.5):
    """How far tracks (M, F, 2) are from the nearest that obey the law, constant velocity and
    bouncing at low and high: mean distance in pixels (M,), over the frames that are not NaN. By
    trying starts and velocities on a grid; rows and columns move independently."""
    M, frames = tracks.shape[:2]
    start, velocity = np.meshgrid(np.arange(low, high, 0.25), np.arange(-fastest, fastest, 0.1))
    law = bounce(torch.from_numpy(start.ravel()), torch.from_numpy(velocity.ravel()), frames, low,
                 high).numpy()  # (tries, F)
    off = np.empty_like(tracks)
    for m in range(M):
        for axis in range(2):
            try_ = law - tracks[m, :, axis]  # (tries, F)
            off[m, :, axis] = try_[np.nansum(try_**2, 1).argmin()]
    return np.nanmean(np.linalg.norm(off, axis=2), 1)


def motion_of(args, tracker, x, asked):
    """Of clips x (N, F, 1, H, W): share of digits found; share of neighbouring frames in which a
    track is read as the same digit; share of frames in which both are those asked for (N, 2); error
    of the law, a mean distance in pixels; and flicker, the mean second difference in time of a
    pixel, of 0..255."""
    tracks, labels = follow(tracker, x)  # (N, 2, F, 2), (N, 2, F)
    there = ~np.isnan(tracks[..., 0])
    both = there[..., 1:] & there[..., :-1]
    same = (labels[..., 1:] == labels[..., :-1])[both].mean()
    right = np.sort(labels, 1) == np.sort(asked.cpu().numpy(), 1)[..., None]
    right = right.all(1)[there.all(1)].mean()
    s = args.height * 28 // 64
    enough = there.sum(-1) >= 4
    error = law_error(tracks[enough], s / 2, args.height - s / 2, 3.5 * args.height / 32).mean()
    flicker = x.diff(dim=1).diff(dim=1).abs().mean() * 127.5 if x.shape[1] > 2 else np.nan
    return there.mean(), same, right, error, float(flicker)


def report_motion(args, model, num=200):
    """Prints motion_of real clips, of new ones, of predictions, and of frames drawn without time;
    and how near predictions come to what really followed."""
    clips = fixed_clips(args, num)
    none, known = nothing_known(clips), nothing_known(clips)
    half = args.frames // 2
    known[:, :half] = True
    ahead = new_clips(args, model, clips, known)
    say(f"{num} clips of {args.frames} frames       found   same digit   as asked   off the law"
        "   flicker")
    for name, x in (("real", clips.video), ("new", new_clips(args, model, clips, none)),
                    (f"from {half} given frames", ahead),
                    ("new, without time", new_clips(args, model, clips, none, alone=True))):
        found, same, right, error, flicker = motion_of(args, model.tracker, x, clips.labels)
        say(f"{name:28}  {found:6.3f}     {same:6.3f}      {right:6.3f}       {error:5.2f} px     "
            f"{flicker:5.1f}")
    psnr = lambda a: float(psnr_of(a, clips.video)[:, half:].mean())
    still = clips.video[:, half - 1:half].expand_as(clips.video)
    say(f"frames predicted from {half}: PSNR {psnr(ahead):.1f} dB, of standing still "
        f"{psnr(still):.1f} dB")


def psnr_of(x, y):
    """Peak signal-to-noise ratio in dB (N, F) of clips in [-1, 1], each frame."""
    return 10 * torch.log10(4 / (x - y).square().mean((2, 3, 4)).clamp(min=1e-10))


# ---- 11. Is geometry kept? (slide "Shadows don't lie and lines can't bend!") ---------------------


def spheres_found(picture, scene, K, pose, which, alone):
    """Distances in pixels between where the spheres' colours are found, the centre of their pixels,
    and where the camera sees their centres. picture (H, W, 3) in 0..1; only spheres that are wholly
    seen: in which (H, W) at all pixels of alone (S, H, W). NaN: not found."""
    H, W = picture.shape[:2]
    tint = picture - picture.mean(-1, keepdims=True)
    uv = project(K, pose, scene.centre)[0].cpu().numpy()  # (S, 2)
    off = []
    for j, colour in enumerate(scene.colour.cpu().numpy()):
        border = alone[j].copy()
        border[1:-1, 1:-1] = False
        if alone[j].sum() < 6 or border.any() or (which[alone[j]] != j).any():
            continue
        hue = (colour - colour.mean()) / np.linalg.norm(colour - colour.mean())
        along = tint @ hue
        mine = (along > 0.08) & (along > 0.85 * np.linalg.norm(tint, axis=-1))
        row, col = mine.nonzero()
        off.append(np.hypot(col.mean() + 0.5 - uv[j, 0], row.mean() + 0.5 - uv[j, 1])
                   if len(row) > 2 else np.nan)
    return off


def bilinear(a, u, v):
    """Values of a picture a (H, W) at (u, v), pixel centres being at + 0.5; at the border its
    edge's."""
    col = np.clip(u - 0.5, 0, a.shape[1] - 1.001)
    row = np.clip(v - 0.5, 0, a.shape[0] - 1.001)
    c, r = col.astype(int), row.astype(int)
    x, y = col - c, row - r
    return ((1 - y) * ((1 - x) * a[r, c] + x * a[r, c + 1])
            + y * ((1 - x) * a[r + 1, c] + x * a[r + 1, c + 1]))


def lines_found(picture, K, pose, floor):
    """The table's lines, found as edges across where they should be: distances of the edges from
    there in pixels; how bent each is, the rms distance of its edges from a straight line; and, of
    each of the two families of parallels, by how many degrees their vanishing point is off.
    picture (H, W, 3) in 0..1; floor (H, W): the table, where evenly lit."""
    grey, (H, W) = picture.mean(-1), picture.shape[:2]
    s = np.arange(-TABLE + 0.03, TABLE, 0.06)
    s = s[np.abs(np.abs(s) - TILE / 2) > 0.12]  # at corners of tiles there is no edge
    reach = np.linspace(-2.5, 2.5, 21)
    off, bent, turned = [], [], []
    for axis in range(2):
        planes = []
        for c in (-TILE / 2, TILE / 2):
            X = np.full((len(s), 3), c)
            X[:, axis], X[:, 2] = s, 0
            step = np.eye(3)[axis] * 0.01
            uv, more = (project(K, pose, torch.from_numpy(Y).float())[0].numpy()
                        for Y in (X, X + step))
            along = (more - uv) / np.linalg.norm(more - uv, axis=1, keepdims=True)
            across = np.stack([-along[:, 1], along[:, 0]], 1)  # (n, 2)
            at = uv[:, None] + reach[:, None] * across[:, None]  # (n, 21, 2)
            inside = ((at > 0.5) & (at < [W - 0.5, H - 0.5])).all((1, 2))
            cell = np.clip(at.astype(int), 0, [W - 1, H - 1])
            clear = inside & floor[cell[..., 1], cell[..., 0]].all(1)
            value = bilinear(grey, at[clear, :, 0], at[clear, :, 1])  # (k, 21)
            slope = np.abs(value[:, 4:] - value[:, :-4])  # over a pixel, (k, 17)
            sharp = slope.max(1, initial=0) > 0.05
            weight = slope[sharp] * (slope[sharp] > 0.7 * slope[sharp].max(1, keepdims=True))
            edge = (weight * reach[2:-2]).sum(1) / weight.sum(1)
            off += list(np.abs(edge))
            points = uv[clear][sharp] + edge[:, None] * across[clear][sharp]
            if len(points) < 5 or np.ptp(points, axis=0).max() < 5:
                continue
            middle = points.mean(0)
            _, spread, directions = np.linalg.svd(points - middle)
            bent.append(spread[1] / math.sqrt(len(points)))
            line = np.append(directions[1], -directions[1] @ middle)  # a u + b v + c = 0
            planes.append(K.numpy().T @ line)  # through the camera's centre
            planes[-1] /= np.linalg.norm(planes[-1])
        if len(planes) > 1:
            meet = pose[:, :3].numpy() @ np.linalg.svd(planes)[2][2]  # the direction all share
            turned.append(math.degrees(math.acos(min(1, abs(meet[axis])))))
    return off, bent, turned


def shadows_found(picture, scene, floor, point, tile, lit):
    """Angles in degrees, seen from where each sphere stands on the table, between the middle of its
    shadow in the picture and of the one that the sun demands, as far as it is in view. picture
    (H, W, 3) in 0..1; floor (H, W): table, and of a single tile; point (H, W, 2) on the table; tile
    (H, W), 0 or 1; lit (H, W): whether the sun should shine there. NaN: none found."""
    ratio = picture.mean(-1) / scene.tone.numpy()[tile]
    foot, light = scene.centre.numpy(), scene.light.numpy()
    falls = foot[:, :2] - light[:2] * foot[:, 2:] / light[2]  # the centres of the shadows
    nearest = np.linalg.norm(point[:, :, None] - falls, axis=3).argmin(2)  # (H, W)
    near = np.linalg.norm(point - falls[nearest], axis=2) < 0.6
    angles = []
    for j in range(len(foot)):
        demanded = floor & ~lit & (nearest == j)
        found = floor & (ratio < 0.7) & (nearest == j) & near  # a shadow's ratio is 0.35
        if demanded.sum() < 4:
            continue
        a, b = (point[mask].mean(0) - foot[j, :2] if mask.sum() > 3 else np.full(2, np.nan)
                for mask in (demanded, found))
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        angles.append(math.degrees(math.acos(np.clip(cosine, -1, 1))))
    return angles


def geometry_of(x, scenes, K, pose):
    """All of it, means over the views but the first, of clips x (N, F, 3, H, W) in [-1, 1]:
    distance of spheres from where they should be (pixels), share of them found, distance of edges
    from the table's lines (pixels), how bent lines are (pixels), vanishing points (degrees),
    shadows (degrees)."""
    N, frames, _, H, W = x.shape
    found = [[] for _ in range(5)]
    for n in range(N):
        scene = Scenes(*(a[n].cpu() for a in scenes))
        some = Scenes(*(a[None].expand(frames, *a.shape) for a in scene))
        k, p = K[n].cpu(), pose[n].cpu()
        d = pixel_rays(resized(k, 2), p, 2 * H, 2 * W).flatten(1, 2)  # four rays a pixel
        split = lambda a: a.view(frames, H, 2, W, 2, -1).transpose(2, 3).flatten(3, 4)
        which, point, lit = cast(some, p[:, :, 3], d)
        which, point, lit = split(which)[..., 0], split(point)[..., :2], split(lit)[..., 0]
        S = len(scene.radius)
        tile = ((point + TABLE) / TILE).floor().sum(-1).long() % 2  # (F, H, W, 4)
        same = lambda a: (a == a[..., :1]).all(-1)
        table = (which == S).all(-1)
        even = table & same(lit)
        alone = torch.stack([split(cast(Scenes(*(a[:, j:j + 1] for a in some[:3]), *some[3:]),
                                        p[:, :, 3], d)[0])[..., 0].eq(0).all(-1) for j in range(S)])
        for f in range(1, frames):
            picture = ((x[n, f].cpu() + 1) / 2).permute(1, 2, 0).numpy()
            mine = which[f, ..., 0].where(same(which[f]), torch.tensor(-1)).numpy()
            found[0] += spheres_found(picture, scene, k[f], p[f], mine, alone[:, f].numpy())
            for kind, more in zip(found[1:4], lines_found(picture, k[f], p[f], even[f].numpy())):
                kind += more
            found[4] += shadows_found(picture, scene, (table & same(tile))[f].numpy(),
                                      point[f].mean(2).numpy(), tile[f, ..., 0].numpy(),
                                      lit[f].any(-1).numpy())
    mean = [np.mean(ok) if (ok := [a for a in v if np.isfinite(a)]) else np.nan for v in found]
    return mean[0], np.isfinite(found[0]).mean(), *mean[1:]


def report_geometry(args, model, num=100):
    """Prints PSNR and geometry_of new views from one picture, beside real renders, views without
    being told the cameras, and the first picture copied."""
    clips = fixed_clips(args, num)
    known = nothing_known(clips)
    known[:, 0] = True
    copied = clips.video[:, :1].expand_as(clips.video)
    say(f"{num} scenes, {args.frames - 1} new views each")
    say("                        PSNR   spheres off (found)   lines off  bent  vanishing   shadows")
    for name, x in (("real", clips.video), ("new views", new_clips(args, model, clips, known)),
                    ("cameras not told", new_clips(args, model, clips, known, told=False)),
                    ("the first view, copied", copied)):
        psnr = float(psnr_of(x, clips.video)[:, 1:].mean())
        psnr = "     -" if name == "real" else f"{psnr:6.2f}"
        off, share, line, bent, turned, shadow = geometry_of(x, clips.scenes, clips.K, clips.pose)
        say(f"{name:22}{psnr} dB   {off:5.2f} px ({share:.2f})       {line:5.2f} px  "
            f"{bent:4.2f} px  {turned:5.1f} deg  {shadow:5.1f} deg")


def report_laws(args, model):
    """Measures what the data's laws allow."""
    if args.data not in SOURCES:
        die("--eval: only for moving-mnist and orbit, whose laws are known")
    (report_geometry if args.data == "orbit" else report_motion)(args, model)


# ---- 12. Data ------------------------------------------------------------------------------------


class Clips(NamedTuple):
    """Clips, and what is known of them."""
    video: torch.Tensor  # (n, F, C, H, W) in [-1, 1]
    K: torch.Tensor = None  # (n, F, 3, 3)
    pose: torch.Tensor = None  # (n, F, 3, 4)
    scenes: Scenes = None
    centres: torch.Tensor = None  # (n, F, 2, 2), of moving digits
    labels: torch.Tensor = None  # (n, 2)

    def rays(self, patch, told=True):
        """What the network is told of each patch of pixels, (n, F, k, H/patch, W/patch): the ray in
        its middle (k = 34), or, where there is no camera, its frame, row and column (k = 21), and
        how often each digit is in the clip (k = 31). Zeros where told (n, 1, 1, 1, 1), or one for
        all, is false: for rays, or for digits."""
        n, frames, _, H, W = self.video.shape
        H, W = H // patch, W // patch
        if self.K is None:
            at = [torch.arange(k, device=self.video.device) for k in (frames, H, W)]
            at = torch.meshgrid(at[0] / 8, at[1] / H - 0.5, at[2] / W - 0.5, indexing="ij")
            where = ray_basis(torch.stack(at, 1)).expand(n, -1, -1, -1, -1)
            if self.labels is None:
                return where
            count = F.one_hot(self.labels, 10).sum(1).view(n, 1, 10, 1, 1) * told
            return torch.cat([where, count.expand(-1, frames, -1, H, W)], 2)
        camera = resized(self.K, 1 / patch), normalised(self.pose), H, W
        return torch.cat([plucker(*camera), ray_basis(plane_points(*camera))], -3) * told

    def frames(self, index):
        """The same clips, these frames."""
        return self._replace(**{k: a if a is None else a[:, index] for k, a in zip(
            ("video", "K", "pose", "centres"), (self.video, self.K, self.pose, self.centres))})

    def part(self, index):
        """These clips."""
        pick = lambda a: a if a is None else a.pick(index) if isinstance(a, Scenes) else a[index]
        return Clips(*(pick(a) for a in self))


class Digits:
    """Two digits of MNIST that bounce; new clips without end."""

    def __init__(self, args, split):
        mnist = copy.copy(args)
        mnist.data = "mnist"
        images, self.labels = load_data(mnist, split)
        self.H, self.count, side = args.height, args.frames, args.height * 28 // 64
        self.digits = F.interpolate(images.float() / 255, size=side, mode="bilinear",
                                    antialias=True).clamp(0, 1)
        self.shape = 1, self.H, self.H
        self.text = f"two of {len(images):,} digits bouncing"

    def draw(self, n, frames=None):
        video, centres, labels = digit_clips(self.digits, self.labels, n, frames or self.count,
                                             self.H)
        return Clips(video, centres=centres, labels=labels)

    def fixed(self, args, n, frames):
        with torch.random.fork_rng([args.device] if "cuda" in args.device else []):
            torch.manual_seed(args.seed)
            return self.draw(n, frames)


class Orbits:
    """Scenes of spheres on a table, rendered once, a path of cameras each."""

    def __init__(self, args, split):
        self.shape = 3, args.height, args.height
        if split == "train":
            self.clips = self.made(args, args.scenes, args.frames, 0)
            self.text = f"{args.scenes:,} scenes of {args.frames} views"

    def draw(self, n):
        made = self.clips.part(torch.randint(len(self.clips.K), (n,), device=self.clips.K.device))
        # half of them mirrored, picture and cameras alike
        flip = torch.rand(n, 1, 1, 1, device=made.K.device) < 0.5
        K, pose = mirrored(made.K, made.pose, self.shape[2])
        video = torch.where(flip[..., None], made.video.flip(-1), made.video)
        return Clips(to_float(video), torch.where(flip, K, made.K),
                     torch.where(flip, pose, made.pose))

    def fixed(self, args, n, frames):
        made = self.made(args, n, frames, 1)
        return made._replace(video=to_float(made.video))

    def made(self, args, n, frames, which):
        """As fixed, but video in uint8: floats of all that is trained on would fill a GPU."""
        rng = np.random.default_rng([args.seed, which])
        scenes, path = random_scenes(n, rng), random_orbits(n, frames, args.height, rng)
        scenes = Scenes(*(a.to(args.device) for a in scenes))
        K, pose = (a.to(args.device) for a in path)
        return Clips(render_clips(scenes, K, pose, args.height), K, pose, scenes)


class OwnClips:
    """Clips of a .npz file: all but every tenth are to train on."""

    def __init__(self, args, split):
        try:
            file = np.load(args.data)
            video = np.asarray(file[next(k for k in ("clips", "arr_0") if k in file)])
        except Exception as e:
            die(f"--data {args.data}: expected moving-mnist, orbit or a .npz file with clips ({e})")
        video = video[..., None] if video.ndim == 4 else video
        if video.dtype != np.uint8 or video.ndim != 5 or len(video) < 2 or (
                video.shape[1] < args.frames or video.shape[4] not in (1, 3)):
            die(f"--data {args.data}: expected 'clips', uint8 of (N, F, H, W) or (N, F, H, W, 1 or "
                f"3), F at least --frames {args.frames}; found {video.dtype} {video.shape}")
        part = (np.arange(len(video)) % 10 == 1) == (split == "test")
        self.video = torch.from_numpy(video[part]).permute(0, 1, 4, 2, 3).to(args.device)
        self.shape, self.count = tuple(self.video.shape[2:]), args.frames
        self.text = f"{len(self.video):,} clips of {args.data}"

    def draw(self, n):
        pick = torch.randint(len(self.video), (n, 1), device=self.video.device)
        start = torch.randint(self.video.shape[1] - self.count + 1, (n, 1), device=pick.device)
        frames = start + torch.arange(self.count, device=pick.device)
        return Clips(to_float(self.video[pick, frames]))

    def fixed(self, args, n, frames):
        if frames > self.video.shape[1]:
            die(f"--length {frames}: the clips of {args.data} have {self.video.shape[1]} frames")
        return Clips(to_float(self.video[torch.arange(n) % len(self.video), :frames]))


SOURCES = {"moving-mnist": Digits, "orbit": Orbits}


def fixed_clips(args, num, frames=None):
    """Held-out clips, the same each time: of test digits, of other scenes, of a file's tenth."""
    return SOURCES.get(args.data, OwnClips)(args, "test").fixed(args, num, frames or args.frames)


def save_history(out, history):
    """loss.csv and loss.png from {part: [(step, loss), ...]}."""
    rows = "".join(f"{part},{step},{loss:.6f}\n"
                   for part, curve in history.items() for step, loss in curve)
    write_whole(out / "loss.csv", f"part,step,loss\n{rows}".encode())
    save_png(out / "loss.png", stack([plot({part: list(zip(*curve))}, "step", log=True)
                                      for part, curve in history.items() if curve])[None])


# ---- Plumbing: copied, the same in every file; skip it on the first reading ----------------------

HERE, NAME = Path(__file__).resolve().parent, Path(__file__).stem
RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's
DATASETS = {  # name: mirrors, {file: md5, or sha1}
    "mnist": (["https://ossci-datasets.s3.amazonaws.com/mnist/",
               "https://storage.googleapis.com/cvdf-datasets/mnist/"], {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}),
    "fashion": (["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                 "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"], {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}),
    "cifar10": (["https://www.cs.toronto.edu/~kriz/"], {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c"}),
}
# A font of 3 x 5 pixels: five octal digits a character, one a row, their bits the pixels.
FONT = dict(zip(
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz .-+=/_:,()%>", (
        "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717 25755 65656 34443 65556 74647 "
        "74644 34553 55755 72227 11152 55655 44447 57755 65555 25552 65644 25563 65655 34216 72222 "
        "55557 55552 55775 55255 55222 71247 03553 44656 03443 11353 02563 12722 03536 44655 20222 "
        "10116 44565 62227 07755 06555 02552 06564 03531 05644 03416 27221 05553 05552 05577 00525 "
        "05536 07247 00000 00002 00700 02720 07070 11244 00007 02020 00024 12221 42224 51245 42124"
    ).split()))


def die(message):
    """Bad input: one line, exit code 2, no traceback."""
    print(f"{NAME}.py: {message}", file=sys.stderr)
    sys.exit(2)


def say(message, end="\n"):
    if RANK == 0:
        print(message, end=end, flush=True)


def positive(text):
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text):
    """A number from 0 to 1, for argparse."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return float(text)


def pick_device(device):
    """auto: cuda, then mps, then cpu."""
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    return best if device == "auto" else device


def use_device(args):
    """Settles args.device and args.bf16, joins the processes of torchrun."""
    args.device = pick_device(args.device)
    cuda = args.device.startswith("cuda")
    try:
        if WORLD > 1 and cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        die(f"--device {args.device} cannot be used ({str(e).splitlines()[0]}); try --device cpu")
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32, where float32 is left at all
    has = torch.cpu.get_capabilities() if args.device == "cpu" else {}
    args.bf16 = bool(torch.cuda.is_bf16_supported(False) if cuda else
                     has.get("amx_bf16") or has.get("avx512_bf16"))


def setup(args):
    """use_device, the output folder, and the first line printed."""
    use_device(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.train and RANK == 0:
        claim(args)
    say(f"{args.device}, torch {torch.__version__}, {'bf16' if args.bf16 else 'float32'}, "
        f"size {args.size}, writing to {args.out}")


def claim(args):
    """Refuses an output folder that another training writes to; ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    args.lock = open(args.out / ".lock", "w")
    try:
        fcntl.lockf(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(f"--out {args.out}: another training is writing there; choose another folder")
    except OSError:  # a file system without locks
        pass


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def write_whole(path, data):
    """Writes a file whole or not at all: under another name first, then moved into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def digest(data, like):
    """md5, sha1 or sha256 of bytes as hex, whichever is as long as `like`."""
    return hashlib.new({32: "md5", 40: "sha1", 64: "sha256"}[len(like)], data).hexdigest()


def fetch(urls, path, checksum):
    """Downloads path from the first mirror that has the right bytes, and returns them."""
    faults = []
    for url in urls:
        say(f"downloading {url}")
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                data = response.read()
        except Exception as e:  # no network, 404, cut off
            faults.append(f"{url}: {e}")
            continue
        if digest(data, checksum) == checksum:
            write_whole(path, data)
            return data
        faults.append(f"{url}: wrong bytes")
    die(f"{path} is missing and could not be downloaded ({'; '.join(faults)}); get it from "
        f"{urls[0]} (checksum {checksum}) and put it there")


def data_file(args, file):
    """The bytes of a data set's file: downloaded if missing, refused if not the official ones."""
    (mirrors, sums), path = DATASETS[args.data], args.data_dir / args.data / file
    if not path.exists() and args.data == "cifar10":
        name = next(iter(sums))  # all files come in one archive
        archive = fetch([m + name for m in mirrors], path.with_name(name), sums[name])
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                if (name := Path(member.name).name) in sums:
                    write_whole(path.with_name(name), tar.extractfile(member).read())
    elif not path.exists():
        fetch([m + file for m in mirrors], path, sums[file])
    data = path.read_bytes()
    if (found := digest(data, sums[file])) != sums[file]:
        die(f"{path} is cut off or altered: {len(data):,} bytes with checksum {found}, expected "
            f"{sums[file]}; delete it, and it is downloaded anew")
    return gzip.decompress(data) if file.endswith(".gz") else data


def load_data(args, split):
    """Images (N, C, H, W) uint8 and labels (N,) int64 or None, all on the device; split is "train"
    or "test", which in a file of your own is every tenth image."""
    if args.data in ("mnist", "fashion"):
        name = {"train": "train", "test": "t10k"}[split]
        images, labels = (np.frombuffer(data_file(args, f"{name}-{kind}-ubyte.gz"), np.uint8)
                          for kind in ("images-idx3", "labels-idx1"))
        images, labels = images[16:].reshape(-1, 1, 28, 28), labels[8:]  # behind their headers
    elif args.data == "cifar10":
        names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        records = np.frombuffer(b"".join(data_file(args, f"{n}.bin") for n in names), np.uint8)
        records = records.reshape(-1, 3073)  # a label, then planes of red, green and blue
        labels, images = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32)
    else:
        images, labels = own_data(args.data)
        part = (np.arange(len(images)) % 10 == 1) == (split == "test")
        images, labels = images[part], labels if labels is None else labels[part]
    images = torch.from_numpy(images.copy()).to(args.device)
    if labels is not None:
        labels = torch.from_numpy(labels.astype(np.int64)).to(args.device)
    return images, labels


def own_data(path, flag="--data"):
    """Images (N, C, H, W) uint8 and labels (N,) or None of a .npy or .npz file."""
    least, names = (2, f"{', '.join(DATASETS)} or ") if flag == "--data" else (1, "")
    if not path.endswith((".npy", ".npz")):
        die(f"{flag} {path} is not known; choose {names}a .npy or .npz file")
    try:
        file = np.load(path)
        named = not isinstance(file, np.ndarray)
        arrays = {k: np.asarray(file[k]) for k in file.files} if named else {"images": file}
    except Exception as e:
        die(f"{flag} {path} cannot be read: {e}")
    images, labels = arrays.get("images", arrays.get("arr_0")), arrays.get("labels")
    found = ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in arrays.items())
    if (images is None or images.dtype != np.uint8 or images.ndim not in (3, 4)
            or len(images) < least or images.ndim == 4 and images.shape[3] not in (1, 3)):
        die(f"{flag} {path}: expected 'images', uint8 of (N, H, W) or (N, H, W, 1 or 3), N at "
            f"least {least}; found {found}")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"
                               or labels.min() < 0 or len(np.unique(labels)) != labels.max() + 1):
        die(f"{flag} {path}: expected 'labels', one an image, from 0 to K - 1, each at least once; "
            f"found {found}")
    return images.reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2), labels


def to_float(x):
    """uint8 0..255 -> float -1..1; floats pass."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def to_uint8(x):
    """float -1..1 -> uint8 0..255, rounded (to cut off would darken)."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grid(images, cols, width=900):
    """Images (N, C, H, W) uint8 -> a picture (H', W', 3), row by row, enlarged to about width."""
    x = images.cpu().numpy().transpose(0, 2, 3, 1)  # (N, H, W, C)
    x = np.concatenate([x, np.zeros((-len(x) % cols, *x.shape[1:]), np.uint8)])
    x, k = x.repeat(3 // x.shape[3], 3), max(1, min(8, width // (cols * x.shape[2])))
    x = np.pad(x.repeat(k, 1).repeat(k, 2), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=90)
    N, H, W, _ = x.shape
    return x.reshape(N // cols, cols, H, W, 3).swapaxes(1, 2).reshape(N // cols * H, cols * W, 3)


def stack(pictures):
    """Pictures (H, W, 3) one below the other, white to their right."""
    W = max(p.shape[1] for p in pictures)
    return np.concatenate([np.pad(p, ((0, 0), (0, W - p.shape[1]), (0, 0)), constant_values=255)
                           for p in pictures])


def save_png(path, frames, fps=8):
    """Writes frames (F, H, W, 3) uint8; several become an animated PNG, which browsers play."""
    F, H, W, _ = frames.shape

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", W, H, 8, 2, 0, 0, 0))
    out += chunk(b"acTL", struct.pack(">2I", F, 0)) if F > 1 else b""
    for f, frame in enumerate(frames):  # a 0 before each row: no filter
        data = zlib.compress(np.pad(frame.reshape(H, W * 3), ((0, 0), (1, 0))).tobytes())
        if F > 1:  # chunks of an animation are numbered: fcTL 0, IDAT, fcTL 1, fdAT 2, fcTL 3, ...
            number = max(0, 2 * f - 1)
            out += chunk(b"fcTL", struct.pack(">5I2H2B", number, W, H, 0, 0, 1, fps, 0, 0))
        out += chunk(b"fdAT", struct.pack(">I", 2 * f) + data) if f else chunk(b"IDAT", data)
    write_whole(path, out + chunk(b"IEND", b""))


def read_png(data):
    """(H, W, 1 or 3) uint8; transparency is dropped, as public FID tools do. Errors: ValueError if
    damaged, NotImplementedError if interlaced or not of 8 bits."""
    at, pixels, palette, tag = 8, b"", None, b""
    while tag != b"IEND":
        length, tag = struct.unpack(">I4s", data[at:at + 8])
        body, crc = data[at + 8:at + 8 + length], data[at + 8 + length:at + 12 + length]
        if crc != struct.pack(">I", zlib.crc32(tag + body)):
            raise ValueError(f"chunk {tag} at byte {at}")
        if tag == b"IHDR":
            W, H, bits, kind, _, _, interlaced = struct.unpack(">2I5B", body)
            if bits != 8 or interlaced:
                raise NotImplementedError
        elif tag == b"PLTE":
            palette = np.frombuffer(body, np.uint8).reshape(-1, 3)
        elif tag == b"IDAT":
            pixels += body
        at += 12 + length
    C = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]  # grey, RGB, palette, grey and alpha, RGBA
    pixels = zlib.decompressobj().decompress(pixels, H * (1 + W * C) + 1)  # and no bomb
    rows = np.frombuffer(pixels, np.uint8).reshape(H, 1 + W * C)
    kinds, x = rows[:, 0], rows[:, 1:].reshape(H, W, C)
    if kinds.max() > 4:
        raise ValueError(f"filter {kinds.max()}")
    if kinds.any():
        x = unfilter(kinds, x)
    return palette[x[:, :, 0]] if kind == 3 else x[:, :, :C - 1] if kind in (4, 6) else x


def unfilter(kinds, x):
    """Undoes PNG's prediction of each byte from those to its left a, above b and both c; kinds (H,)
    per row: 0 none, 1 a, 2 b, 3 their mean, 4 Paeth's choice. x (H, W, C) uint8."""
    # A pixel needs its neighbours first: go by diagonals, all rows of one diagonal at once.
    H, W, C = x.shape
    out = np.zeros((H + 1, W + 1, C), np.int32)  # a border of zeros above and to the left
    for d in range(H + W - 1):
        r = np.arange(max(0, d - W + 1), min(H, d + 1))
        col, kind = d - r, kinds[r, None]
        a, b, c = out[r + 1, col], out[r, col + 1], out[r, col]
        to_a, to_b, to_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
        paeth = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
        guess = np.select([kind == 1, kind == 2, kind == 3, kind == 4], [a, b, (a + b) // 2, paeth])
        out[r + 1, col + 1] = (x[r, col] + guess) & 255
    return out[1:, 1:].astype(np.uint8)


def draw_line(picture, p, q, colour, thick=1):
    """A line from p to q, (column, row) each, into picture (H, W, 3), cut at its borders."""
    n = int(max(abs(q[0] - p[0]), abs(q[1] - p[1]))) + 2
    cols, rows = (np.linspace(a, b, n).round().astype(int) for a, b in zip(p, q))
    for k in range(thick * thick):
        r, c = rows + k // thick, cols + k % thick
        inside = (r >= 0) & (r < picture.shape[0]) & (c >= 0) & (c < picture.shape[1])
        picture[r[inside], c[inside]] = colour


def draw_text(picture, text, col, row, colour=(0, 0, 0)):
    """Text, 10 pixels high, into picture (H, W, 3) from (col, row) on, as much as fits."""
    for i, char in enumerate(text[:(picture.shape[1] - col) // 8]):
        bits = np.array([[int(d) >> s & 1 for s in (2, 1, 0)] for d in FONT.get(char, FONT[" "])])
        bits = bits.repeat(2, 0).repeat(2, 1).astype(bool)
        picture[row:row + 10, col + 8 * i:col + 8 * i + 6][bits] = colour


def caption(text, width):
    """A white strip (18, width, 3) with text."""
    strip = np.full((18, width, 3), 255, np.uint8)
    draw_text(strip, text, 4, 4)
    return strip


def ticks(low, high, log):
    """About five round numbers in low..high; log: of exponents, those of 1, 2, 3, 5, 7, 10, ..."""
    if log:
        for digits in ((1, 2, 3, 5, 7), (1, 3), (1,)):
            marks = [k + math.log10(m) for k in range(math.floor(low), math.ceil(high))
                     for m in digits]
            marks = [m for m in marks if low <= m <= high]
            if len(marks) < 9:
                return marks
        return marks[::len(marks) // 4]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def plot(curves, xlabel, ylabel="", log=False, W=900, H=400):
    """Curves {name: (xs, ys)} as a picture (H, W, 3); log: the vertical axis is logarithmic."""
    picture, left, right, top, bottom = np.full((H, W, 3), 255, np.uint8), 100, W - 50, 30, H - 45
    scale = (lambda y: np.log10(np.maximum(y, 1e-12))) if log else np.array
    curves = {name: (np.array(x, float), scale(y).astype(float)) for name, (x, y) in curves.items()}
    xs, ys = (np.concatenate([c[i] for c in curves.values()]) for i in (0, 1))
    xs, ys = ((v.min(), max(v.max(), v.min() + 1e-9)) for v in (xs, ys))
    col = lambda x: left + (x - xs[0]) / (xs[1] - xs[0]) * (right - left)
    row = lambda y: bottom - (y - ys[0]) / (ys[1] - ys[0]) * (bottom - top)
    for y in ticks(*ys, log):
        draw_line(picture, (left, row(y)), (right, row(y)), (225, 225, 225))
        draw_text(picture, f"{10**y if log else y:.3g}", 8, int(row(y)) - 5)
    for x in ticks(*xs, False):
        draw_text(picture, f"{x:g}", int(col(x)) - 4 * len(f"{x:g}"), bottom + 10)
    draw_text(picture, xlabel, (left + right) // 2 - 4 * len(xlabel), H - 16)
    draw_text(picture, ylabel, 8, 8)
    for i, (name, (x, y)) in enumerate(curves.items()):
        colour = ((31, 90, 180), (220, 80, 20), (30, 140, 60), (150, 60, 160))[i % 4]
        for k in range(len(x) - 1):
            draw_line(picture, (col(x[k]), row(y[k])), (col(x[k + 1]), row(y[k + 1])), colour, 2)
        draw_text(picture, name, left + 150 * i, 12, colour)
    return picture


def save_npz(path, array, **arrays):
    """Writes arr_0 and more; whole, and under just that name."""
    buffer = io.BytesIO()
    np.savez(buffer, array, **arrays)
    write_whole(path, buffer.getbuffer())


def save_checkpoint(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def read_checkpoint(path):
    """A checkpoint that this file wrote, on the CPU; nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not compare checksums
                raise ValueError(damaged)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        die(f"{path} is not there; train first: python {NAME}.py --train")
    except Exception as e:
        die(f"{path} is no checkpoint, or a damaged one ({type(e).__name__})")
    file = ckpt.get("file") if isinstance(ckpt, dict) else None
    if file != NAME or "config" not in ckpt:
        die(f"{path} is no checkpoint of {NAME}.py{f', but of {file}.py' if file else ''}")
    return ckpt


def load_state(part, ckpt, key):
    """Puts ckpt[key] into a module or optimiser, or says in a line that it does not fit."""
    try:
        part.load_state_dict(ckpt[key])
    except KeyError:
        die(f"the checkpoint has no {key}: it was made to sample, and cannot be trained further")
    except (RuntimeError, ValueError):
        die(f"the checkpoint's {key} does not fit; leave out the flags that shape the network")


def ctrl_c():
    """A list that the first Ctrl-C fills, for the loop to end in good order; the second kills."""
    pressed = []

    def handler(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if WORLD == 1:
        signal.signal(signal.SIGINT, handler)
    return pressed


# ---- Main ----------------------------------------------------------------------------------------


def main(argv=None):
    args, ckpt = parse_args(argv), None
    verbs = (args.train, args.sample, args.given, args.between, args.orbit is not None, args.eval,
             args.attention, args.export)
    if not any(verbs):
        return parse_args(["--help"])
    path = args.out / "model.pt"
    if args.train and not args.resume and path.exists():
        if (old := read_checkpoint(path)["config"]["data"]) != args.data:
            die(f"--out {args.out} holds a model of {old}; choose another --out for {args.data}")
    if args.resume or not args.train:
        if not (path.exists() or args.resume) and (HERE / "pretrained" / f"{NAME}.pt").exists():
            path = HERE / "pretrained" / f"{NAME}.pt"
        ckpt = read_checkpoint(path)
        args = parse_args(argv, ckpt["config"])
        for key in ("data", "size", "height", "frames", "patch", "width", "mults", "blocks",
                    "heads", "time_kernel", "predict", "schedule", "side_width"):
            if getattr(args, key) != ckpt["config"][key]:
                die(f"--{key.replace('_', '-')} {getattr(args, key)}: {path} was trained with "
                    f"{ckpt['config'][key]}")
        say(f"from {path}, step {ckpt['step']:,} of the {ckpt['part']}")
    try:
        setup(args)
        if args.train:
            model = train(args, ckpt)
        else:
            model = Film(args).to(args.device).eval()
            weights = ckpt["model"]  # an exported one has the averaged network alone
            weights |= {k.replace("ema.", "net.", 1): v for k, v in weights.items()
                        if k.startswith("ema.")}
            load_state(model, ckpt, "model")
        if RANK > 0:
            time.sleep(1)  # a thread of gloo that still holds a tensor would abort a quicker exit
            return
        if args.export:
            ckpt = read_checkpoint(args.out / "model.pt")
            small = {k: ckpt[k] for k in ("file", "config", "part", "step")}
            small["model"] = {k: v.half() for k, v in ckpt["model"].items()
                              if not k.startswith("net.")}
            save_checkpoint(args.export, small)
        if args.train or args.sample:
            sample(args, model)
        elif args.given:
            predict_clips(args, model, args.given)
        if args.between:
            fill_between(args, model)
        if args.orbit is not None:
            new_views(args, model)
        if args.attention or args.train:
            frame_attention_maps(args, model)
        if args.eval or args.train and args.data in SOURCES and args.stage != "image":
            report_laws(args, model)
    except OSError as e:  # disk full, no right to write: the last checkpoint is whole
        die(f"{e.filename or args.out}: {e.strerror or e}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
