"""Video diffusion: one 2-D U-Net for all frames, which exchange information over time. Two spheres
roll, bounce and collide on a table; or they stand still and the camera moves.

    python video_diffusion.py --train                     rolling spheres, in minutes on a laptop
    python video_diffusion.py --sample                    clips, three futures of one frame
    python video_diffusion.py --train --data orbit        new views of a scene from one picture
    torchrun --nproc_per_node=8 video_diffusion.py --train --size base --data clips.npz --out own

Slides     Video diffusion models; Shadows don't lie and lines can't bend!; Generative models +
           geometry
Equations  add noise   x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; a given frame has t = 0
           loss        g_t ||f(x_t, t, rays) - x_0||^2 over the frames that are not given, with
                       g_t = abar_t / (1 - abar_t), but at least 1 and at most 5
           sampling    x_T ~ N(0, I); estimate x_0 = f(x_t, t, rays); step to a smaller t; repeat
           guidance    f1 + w (f(x_t, t, rays) - f1), where f1 sees each frame by itself
           chain rule  p(x^1, ..., x^F) = p(x^1) p(x^2, ..., x^F | x^1): first draw a picture
           camera      a point X of the world is seen at the pixel (u, v, 1) ~ K R^T (X - c); the
                       ray of a pixel is c + s d, d = R K^-1 (u, v, 1), for s > 0
           Pluecker    (d, c x d): the same for every point c of the ray
           collision   equal masses exchange their velocities along the line of centres
Notation   x (B, F, C, H, W) clips of F frames in [-1, 1]; t (B, F) time of each frame, 0..T; abar
           (T + 1,), a_t is abar[t]: share of signal in the variance; given (B, F) bool; K (B, F, 3,
           3) intrinsics; pose (B, F, 3, 4) camera to world, [R | c]: its columns are right, down,
           forward and the centre; rays (B, F, 34, h, w) the camera as input of the network: 34
           numbers for each of h x w patches
Papers     Ho et al. 2022 (Video diffusion models); Watson et al. 2023 (3DiM: new views, clean given
           frames); Guo et al. 2024 (AnimateDiff: zero-initialised layers over time); Ho & Salimans
           2022 (guidance); Hang et al. 2023 (weight of the loss); Nichol & Dhariwal 2021 (cosine
           schedule); Levoy & Hanrahan 1996 (a ray by its crossings of two planes); Sarkar et al.
           2024 (Shadows don't lie and lines can't bend!); Jordan et al. 2024 (Muon)
"""
import argparse
import copy
import math
import os
import struct
import sys
import time
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

SIZES = ("small", "base")
HPARAMS = {  # each row is a flag; --size picks the column
    "scenes": (6000, 50_000, "clips rendered for training"),
    "frames": (8, 16, "per rendered clip"),
    "height": (32, 64, "side of the rendered frames in pixels"),
    "patch": (4, 4, "fold patch x patch pixels into channels"),
    "width": (64, 128, "channels of the first level"),
    "mults": ([1], [1, 2], "channels of each level, in units of width; [1]: one level"),
    "blocks": (2, 2, "residual blocks per level"),
    "heads": (2, 4, "of the attention between frames"),
    "picture_steps": (600, 5000, "first steps, on single pictures"),
    "picture_every": (2, 2, "afterwards, one step in so many is on pictures"),
    "steps": (2800, 70_000, "training steps"),
    "batch_size": (8, 64, "clips per step, over all GPUs"),
    "lr": (3e-3, 5e-4, "peak learning rate of Adam: biases, norms, first and last layer"),
    "muon_lr": (0.03, 0.03, "peak learning rate of Muon: all other matrices"),
    "every": (1000, 2000, "steps between checkpoints"),
    "sample_steps": (40, 40, "number of sampling steps, at most T"),
    "guidance": (2.0, 2.0, "w: how strongly frames follow one another; 1: as trained"),
}
T = 1000  # noise levels
RAYS = 34  # channels of camera_rays

# ---- 1. Cameras (slide Generative models + geometry) ---------------------------------------------
# Axes as in OpenCV: x right, y down, z forward; the centre of the pixel in row i and column j is at
# (u, v) = (j + 0.5, i + 0.5). The world's z axis points up.


def look_at(eye, target):
    """Pose (..., 3, 4) of a camera at eye (..., 3) that looks at target (..., 3)."""
    forward = F.normalize(target - eye, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0]).expand_as(forward)
    right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    return torch.stack([right, down, forward, eye], dim=-1)


def orbit(azimuth, elevation, distance, view, size):
    """Cameras around the table that look at its middle: azimuth (n, F), elevation and angle of view
    (n, 1) in degrees, distance (n, 1) -> K (n, F, 3, 3), pose (n, F, 3, 4)."""
    a, e = torch.deg2rad(azimuth), torch.deg2rad(elevation).expand_as(azimuth)
    direction = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], dim=-1)
    eye = distance[..., None] * direction
    focal = size / 2 / torch.tan(torch.deg2rad(view) / 2)  # in pixels
    K = torch.zeros(*azimuth.shape, 3, 3)
    K[..., 0, 0] = K[..., 1, 1] = focal
    K[..., 0, 2] = K[..., 1, 2] = size / 2
    K[..., 2, 2] = 1
    return K, look_at(eye, torch.tensor([0, 0, 0.15]))


def pixel_rays(K, pose, H, W, scale=1.0):
    """Unit directions d (..., H, W, 3) of the rays of all pixels, after a resize of the picture by
    scale to H x W."""
    v, u = torch.meshgrid(torch.arange(H, device=K.device) + 0.5,
                          torch.arange(W, device=K.device) + 0.5, indexing="ij")
    pixels = torch.stack([u / scale, v / scale, torch.ones_like(u)], dim=-1)  # (H, W, 3)
    to_world = pose[..., :3] @ torch.linalg.inv(K)  # R K^-1
    d = torch.einsum("...ij,hwj->...hwi", to_world, pixels)
    return d / d.square().sum(-1, keepdim=True).sqrt()  # F.normalize is slow on three numbers


def camera_rays(K, pose, H, W, patch):
    """The camera as input, (B, F, 34, h, w). For the ray through the middle of each patch of a
    picture of H x W pixels: its Pluecker coordinates (6), the (x, y) where it crosses two
    horizontal planes (4), and sines and cosines of these (24). Rays that meet on such a plane have
    the same (x, y) there, in all views: easy to match. Lengths, also the planes' heights, are in
    units of the first camera's distance."""
    centre = pose[..., 3] / pose[:, :1, :, 3].norm(dim=-1, keepdim=True)  # (B, F, 3)
    d = pixel_rays(K, pose, H // patch, W // patch, 1 / patch)  # (B, F, h, w, 3)
    c = centre[:, :, None, None].expand_as(d)
    plucker = torch.cat([d, torch.linalg.cross(c, d)], dim=-1).movedim(-1, 2)
    slope = d[..., 2:].clamp(max=-0.1)  # a ray that is level or points up gets a far point
    planes = [c[..., :2] + (z - c[..., 2:]) / slope * d[..., :2] for z in (0.0, 0.15)]
    planes = torch.cat(planes, dim=-1).clamp(-2, 2).movedim(-1, 2)  # (B, F, 4, h, w)
    angle = torch.cat([math.pi * 2**i * planes for i in range(3)], dim=2)
    return torch.cat([plucker, planes, angle.sin(), angle.cos()], dim=2)


# ---- 2. Two spheres on a chequered table under a sun ---------------------------------------------

HUES = torch.tensor([[0.95, 0.15, 0.15], [0.15, 0.85, 0.2], [0.2, 0.3, 0.95],
                     [0.95, 0.9, 0.15], [0.9, 0.2, 0.85], [0.15, 0.9, 0.9]])
TABLE, TILE, AMBIENT = 1.2, 0.8, 0.35  # half the table's side; a tile's side; light in the shadow
SKY = torch.tensor([0.10, 0.12, 0.18])


class Scenes(NamedTuple):
    centre: torch.Tensor  # (n, F, 2, 3) of the spheres in every frame
    radius: torch.Tensor  # (n, 2)
    colour: torch.Tensor  # (n, 2, 3) in 0..1
    sun: torch.Tensor  # (n, 3) unit vector towards it
    tone: torch.Tensor  # (n, 2) grey of the bright and of the dark tiles
    turn: torch.Tensor  # (n,) angle of the table in radians


def sphere_distances(centre, radius, o, d):
    """Distance (n, F, P, 2) to each sphere along the rays o + s d, inf where it is missed; centre
    (n, F, 2, 3), radius (n, 2), o and d (n, F, P, 3)."""
    # |o + s d - c|^2 = r^2:  s = -b - sqrt(b^2 - q),  b = d . (o - c),  q = |o - c|^2 - r^2
    inside = centre.square().sum(-1) - radius[:, None] ** 2  # (n, F, 2)
    b = (d * o).sum(-1, keepdim=True) - d @ centre.mT
    q = o.square().sum(-1, keepdim=True) - 2 * o @ centre.mT + inside[:, :, None]
    root = b**2 - q
    hit = (root > 1e-5) & (b < 0)
    return torch.where(hit, -b - root.clamp(min=0).sqrt(), math.inf)


def trace_rays(scenes, K, pose, H, W, fine=2):
    """Clips (n, F, 3, H, W) in 0..1 of n scenes; a pixel is the mean of fine x fine rays."""
    d = pixel_rays(K, pose, H * fine, W * fine, fine).flatten(2, 3)  # (n, F, P, 3)
    o = pose[:, :, None, :, 3].expand_as(d)
    # distance s to the table, inf where it is missed
    s = torch.where(d[..., 2] < 0, -o[..., 2] / d[..., 2], math.inf)
    at = o[..., :2] + s.nan_to_num(posinf=0)[..., None] * d[..., :2]
    cos, sin = scenes.turn.cos()[:, None, None], scenes.turn.sin()[:, None, None]
    tx = cos * at[..., 0] + sin * at[..., 1]  # in the table's own axes
    ty = cos * at[..., 1] - sin * at[..., 0]
    s = torch.where((tx.abs() <= TABLE) & (ty.abs() <= TABLE), s, math.inf)
    s = torch.cat([sphere_distances(scenes.centre, scenes.radius, o, d), s[..., None]], dim=-1)
    s, which = s.min(dim=-1)  # (n, F, P); what is hit first: 0 or 1, a sphere; 2, the table
    point = o + s.nan_to_num(posinf=0)[..., None] * d
    # the sun's light comes along a straight line, unless a sphere is in the way
    sun = scenes.sun[:, None, None].expand_as(d)
    lit = sphere_distances(scenes.centre, scenes.radius, point, sun).isinf().all(dim=-1)
    second = (which == 1)[..., None]
    centre = torch.where(second, scenes.centre[:, :, None, 1], scenes.centre[:, :, None, 0])
    colour = torch.where(second, scenes.colour[:, None, None, 1], scenes.colour[:, None, None, 0])
    radius = torch.where(second, scenes.radius[:, None, None, 1:], scenes.radius[:, None, None, :1])
    normal = (point - centre) / radius
    cosine = (normal * sun).sum(-1).clamp(min=0)  # Lambert's law
    dark = (((tx + TABLE) / TILE).floor() + ((ty + TABLE) / TILE).floor()) % 2 == 1
    tone = torch.where(dark, scenes.tone[:, 1, None, None], scenes.tone[:, 0, None, None])
    albedo = torch.where((which < 2)[..., None], colour, tone[..., None])
    light = AMBIENT + (1 - AMBIENT) * torch.where(which < 2, cosine, 1) * lit
    x = torch.where(s.isinf()[..., None], SKY.to(d.device), albedo * light[..., None])
    x = x.flatten(0, 1).mT.unflatten(2, (H * fine, W * fine))  # (n F, 3, H fine, W fine)
    return F.avg_pool2d(x, fine).unflatten(0, K.shape[:2])


# ---- 3. A world that moves (roll) and a camera that moves (orbit) --------------------------------


def roll(p, v, radius, frames, fine=8):
    """Paths (n, F, 2, 2) of the places where two spheres touch the table, which start at p
    (n, 2, 2) with velocities v (n, 2, 2) per frame; fine steps per frame. No spin, no friction."""
    edge = (TABLE - radius)[..., None]
    touch = 2 * radius.prod(dim=-1).sqrt()  # |p_1 - p_2| at contact: (a + b)^2 - (a - b)^2 = 4 a b
    path = []
    for step in range(frames * fine):
        if step % fine == 0:
            path.append(p)
        p = p + v / fine
        v = torch.where((p.abs() > edge) & (p * v > 0), -v, v)  # bounce off the table's edge
        gap, relative = p[:, 0] - p[:, 1], v[:, 0] - v[:, 1]  # (n, 2)
        meet = (gap.norm(dim=-1) < touch) & ((gap * relative).sum(-1) < 0)
        n = F.normalize(gap, dim=-1)  # line of centres, from above
        push = (relative * n).sum(-1, keepdim=True) * n * meet[:, None]
        v = torch.stack([v[:, 0] - push, v[:, 1] + push], dim=1)
    return torch.stack(path, dim=1)


def fixed_camera(n, frames, size):
    """The camera of the rolling spheres, K (n, F, 3, 3) and pose (n, F, 3, 4): high above them."""
    return orbit(torch.full((n, frames), 15.0), *torch.tensor([55.0, 3.5, 42.0]), size)


def random_world(data, n, frames, size, rng):
    """n scenes of two spheres that do not touch at first, and their cameras K and pose.

    roll: spheres move by 0.08 to 0.24 per frame; camera and sun are fixed.
    orbit: the camera turns by 15 to 45 degrees per frame; circle: once around. The x axis points to
    the first camera, which fixes the axes; so the table is turned at random.
    """
    def u(low, high, *more):
        return torch.from_numpy(rng.uniform(low, high, (n, *more))).float()

    def circle(angle):
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    moving = data == "roll"
    radius = u(0.26, 0.36, 2) if moving else u(0.22, 0.40, 2)
    first = u(0, 2 * math.pi)
    angle = torch.stack([first, first + torch.deg2rad(u(130, 230))], dim=1)
    p = u(0.45, 0.8, 2, 1) * circle(angle)  # (n, 2, 2)
    if moving:
        v = u(0.08, 0.24, 2, 1) * circle(u(0, 2 * math.pi, 2))
        path = roll(p, v, radius, frames)
        height, around = torch.full((n,), 50.0), torch.full((n,), 100.0)
        tone, turn = torch.tensor([0.85, 0.4]).expand(n, 2), torch.zeros(n)
        K, pose = fixed_camera(n, frames, size)
    else:
        path = p[:, None].expand(-1, frames, -1, -1)
        height, around = u(40, 65), u(0, 360)
        tone, turn = torch.stack([u(0.7, 0.95), u(0.3, 0.5)], dim=1), u(0, math.pi / 2)
        step = u(15, 45) * torch.from_numpy(rng.choice([-1, 1], n)).float()
        step = torch.full((n,), 360 / frames) if data == "circle" else step
        azimuth = step[:, None] * torch.arange(frames)
        K, pose = orbit(azimuth, u(25, 50, 1), u(2.7, 3.3, 1), u(38, 46, 1), size)
    centre = torch.cat([path, radius[:, None, :, None].expand(-1, frames, -1, -1)], dim=-1)
    colour = HUES[torch.from_numpy(rng.permuted(np.tile(np.arange(6), (n, 1)), axis=1)[:, :2])]
    height, around = torch.deg2rad(height), torch.deg2rad(around)
    sun = torch.cat([height.cos()[:, None] * circle(around), height.sin()[:, None]], dim=-1)
    return Scenes(centre, radius, colour, sun, tone, turn), K, pose


def render_clips(scenes, K, pose, H, W, device="cpu"):
    """Clips (n, F, 3, H, W) uint8, rendered 8 at a time."""
    clips = torch.empty(*K.shape[:2], 3, H, W, dtype=torch.uint8, device=device)
    for i in torch.arange(len(K)).split(8):
        part = Scenes(*(a[i].to(device) for a in scenes))
        x = trace_rays(part, K[i].to(device), pose[i].to(device), H, W)
        clips[i] = (255 * x).round().to(torch.uint8)
    return clips


def load_clips(args, split, num):
    """Clips (N, F, C, H, W) uint8, K (N, F, 3, 3) and pose (N, F, 3, 4); split is train or test. An
    .npz file has its own number of clips to train on, and no cameras: all get that of roll."""
    if args.data in ("roll", "orbit", "circle"):
        if args.height % args.patch:
            die(f"--height {args.height} must be divisible by --patch {args.patch}")
        if split == "train":
            say(f"rendering {num:,} clips")
        rng = np.random.default_rng([args.seed, split == "test"])
        scenes, K, pose = random_world(args.data, num, args.frames, args.height, rng)
        clips = render_clips(scenes, K, pose, args.height, args.height, args.device)
        return clips, K.to(args.device), pose.to(args.device)
    try:
        with np.load(args.data) as file:
            clips = file["clips"].astype(np.uint8, casting="safe").transpose(0, 1, 4, 2, 3)
        N, _, C, H, W = clips.shape
        if N < 2 or C not in (1, 3) or H % args.patch or W % args.patch:
            raise ValueError(f"found {N} of {H} x {W} and {C} channels; --patch {args.patch}")
        part = (np.arange(N) % 10 == 0) == (split == "test")  # a tenth for testing
        clips = torch.from_numpy(clips[part].copy())
    except Exception as e:
        die(f"--data {args.data}: expected roll, orbit, or an .npz file with clips (N, F, H, W, 1 "
            f"or 3) uint8 ({e})")
    if split == "test":
        clips = clips[torch.arange(num) % len(clips)]
    cameras = fixed_camera(*clips.shape[:2], clips.shape[3])
    return [a.to(args.device) for a in (clips, *cameras)]


# ---- 4. Network (slide Video diffusion models: "share 2D U-Net across frames, add time attention")
# Frames lie in the batch, so that 2-D layers treat each as a picture.


def time_embedding(t, dim):
    """Cosines and sines of t (B,) at dim / 2 frequencies: (B, dim)."""
    freq = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None] * freq  # (B, dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def group_norm(C):
    return nn.GroupNorm(math.gcd(32, C // 4), C)  # at most 32 groups, of at least 4 channels


def zero(layer):
    """Initialise a layer to zero: a residual block then starts as its shortcut."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def attend(q, k, v):
    """Attention: q (B, heads, n, d), k and v (B, heads, m, d) -> (B, n, heads d)."""
    if q.requires_grad and q.device.type == "cpu":  # PyTorch's bf16 kernel is slow in training
        h = (q / math.sqrt(q.shape[3]) @ k.mT).softmax(dim=3) @ v
    else:
        h = F.scaled_dot_product_attention(q, k, v)
    return h.transpose(1, 2).flatten(2)


class TimeAttention(nn.Module):
    """The slide's time attention joins one position of all frames. Where the camera or the things
    move, a point is elsewhere in the next frame: here all positions of all frames are joined."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(C)
        self.place = nn.Linear(3 * 32, C)
        # Added to queries and keys alike: q . k then grows with the likeness of two rays, so that
        # from the start patches which see the same place attend to one another. Without it the
        # views of an orbit do not find one another for thousands of steps.
        self.ray = nn.Conv2d(RAYS, C, 1, bias=False)
        nn.init.normal_(self.ray.weight, std=0.3)
        self.qkv = nn.Linear(C, 3 * C)
        self.out = zero(nn.Linear(C, C))

    def forward(self, x, rays, frames):
        """x (B F, C, h, w), rays (B F, 34, H / patch, W / patch) -> as x."""
        _, C, h, w = x.shape

        def tokens(a):  # (B F, C, h, w) -> (B, F h w, C)
            return a.flatten(2).mT.reshape(-1, frames * h * w, C)

        index = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in (frames, h, w)))
        place = self.place(time_embedding(index.flatten(), 32).view(-1, 96))  # (F h w, C)
        ray = tokens(self.ray(F.adaptive_avg_pool2d(rays, (h, w))))
        q, k, v = self.qkv(tokens(self.norm(x)) + place).chunk(3, dim=2)
        q, k, v = (a.unflatten(2, (self.heads, -1)).transpose(1, 2) for a in (q + ray, k + ray, v))
        a = self.out(attend(q, k, v))  # (B, F h w, C)
        return x + a.view(-1, h * w, C).mT.reshape(x.shape)


class FrameBlock(nn.Module):
    """Two 2-D convolutions and a shortcut; the time t adds one value per channel in between. Then
    what joins frames: a convolution over 7 of them (after 3 x 3 in space it makes a 3-D convolution
    in two parts) and, with heads, attention. Both start at zero, so that a clip starts as a pile of
    pictures; a single picture, a clip of one frame, skips them."""

    def __init__(self, C_in, C_out, D, heads=0):
        super().__init__()
        self.norm1 = group_norm(C_in)
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1)
        self.emb = nn.Linear(D, C_out)
        self.norm2 = group_norm(C_out)
        self.conv2 = zero(nn.Conv2d(C_out, C_out, 3, padding=1))
        self.skip = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()
        self.norm3 = group_norm(C_out)
        self.conv3 = zero(nn.Conv2d(C_out, C_out, (7, 1), padding=(3, 0)))  # 7 frames, 1 place
        self.attention = TimeAttention(C_out, heads) if heads else None

    def forward(self, x, emb, rays, frames):  # (B F, C_in, h, w), (B F, D), (B F, 34, ...)
        h = self.conv1(F.silu(self.norm1(x)))  # (B F, C_out, h, w)
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        x = self.skip(x) + h
        if frames > 1:
            h = F.silu(self.norm3(x)).flatten(2).unflatten(0, (-1, frames)).transpose(1, 2)
            h = self.conv3(h)  # (B, C_out, F, h w)
            x = x + h.transpose(1, 2).reshape(x.shape)
            if self.attention:
                x = self.attention(x, rays, frames)
        return x


class VideoUNet(nn.Module):
    """f(x_t, t, rays): the 2-D U-Net of ddpm.py, whose blocks join frames."""

    def __init__(self, C, patch, width, mults, blocks, heads):
        super().__init__()
        self.patch, self.width = patch, width
        D = 4 * width
        self.time_mlp = nn.Sequential(nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D))
        self.conv_in = nn.Conv2d(C * patch**2 + RAYS, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        ch, skip_channels = width, [width]
        for i, m in enumerate(mults):
            for j in range(blocks):  # the last block of each level has attention
                self.down.append(FrameBlock(ch, m * width, D, heads * (j == blocks - 1)))
                ch = m * width
                skip_channels.append(ch)
            if i < len(mults) - 1:
                self.down.append(nn.Conv2d(ch, ch, 3, stride=2, padding=1))
                skip_channels.append(ch)
        self.middle = nn.ModuleList([FrameBlock(ch, ch, D, heads), FrameBlock(ch, ch, D)])
        for i, m in reversed(list(enumerate(mults))):
            for j in range(blocks + 1):  # one more: conv_in and each downsampling left a skip too
                C_in = ch + skip_channels.pop()
                self.up.append(FrameBlock(C_in, m * width, D, heads * (j == blocks)))
                ch = m * width
            if i > 0:
                self.up.append(nn.Conv2d(ch, ch, 3, padding=1))
        self.norm_out = group_norm(ch)
        self.conv_out = zero(nn.Conv2d(ch, C * patch**2, 3, padding=1))

    def forward(self, x, t, rays):
        """x (B, F, C, H, W), t (B, F), rays (B, F, 34, H / patch, W / patch) -> as x."""
        frames = x.shape[1]
        emb = self.time_mlp(time_embedding(t.flatten(), self.width))  # (B F, D)
        rays = rays.flatten(0, 1)
        h = F.pixel_unshuffle(x.flatten(0, 1), self.patch)  # (B F, C patch^2, H / patch, W / patch)
        h = self.conv_in(torch.cat([h, rays], dim=1))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, rays, frames) if isinstance(layer, FrameBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb, rays, frames)
        for layer in self.up:
            if isinstance(layer, FrameBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), emb, rays, frames)
            else:
                h = layer(F.interpolate(h, size=skips[-1].shape[2:]))
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch).float().view_as(x)


# ---- 5. Noise (as in ddpm.py) and loss -----------------------------------------------------------


def cosine_abar():
    """abar_t for t = 0..T: (T + 1,) float64; Nichol & Dhariwal 2021, Eq. 17."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


def q_sample(x0, eps, a_t):
    """x_t given x_0, in one step (DDPM Eq. 4)."""
    return a_t**0.5 * x0 + (1 - a_t) ** 0.5 * eps


def draw_given(B, frames, device):
    """Which frames of the clips are given (B, F): the first 0 to F / 2; in 10 % of the clips also
    the last, so that what lies between can be drawn."""
    count = torch.randint(frames // 2 + 1, (B, 1), device=device)
    given = torch.arange(frames, device=device) < count
    given[:, -1] |= torch.rand(B, device=device) < 0.1
    return given


def video_loss(model, x0, rays, t, eps, abar):
    """Squared error of the estimate of x_0 (B, F, C, H, W), per clip the mean over the frames that
    are not given, those with t > 0. The less noise, the finer what is still to be learned: the
    weight is the signal-to-noise ratio, within 1 to 5 (Hang et al. 2023, with a floor)."""
    a_t = abar[t][:, :, None, None, None]
    out = model(q_sample(x0, eps, a_t), t, rays)
    error = ((a_t / (1 - a_t)).clamp(1, 5) * (out - x0).square()).mean(dim=(2, 3, 4))  # (B, F)
    return ((error * (t > 0)).sum(1) / (t > 0).sum(1).clamp(min=1)).mean()


# ---- 6. Sampler (slide Sampling from a diffusion model) ------------------------------------------


def ancestral_step(xt, x0, a_t, a_s, z):
    """A draw from q(x_s | x_t, x_0) (DDPM Eq. 6 and 7), z ~ N(0, I). The fresh noise of each step
    lets the next one correct errors. DDIM adds none, and spheres fade."""
    beta = 1 - a_t / a_s
    mean = (a_s**0.5 * beta * x0 + (a_t / a_s) ** 0.5 * (1 - a_s) * xt) / (1 - a_t)
    return mean + (beta * (1 - a_s) / (1 - a_t)) ** 0.5 * z


@torch.no_grad()
def sample(model, clean, given, rays, args):
    """Clips (B, F, C, H, W) from noise; given (B, F) frames are those of clean, at t = 0. Clips of
    which nothing is given begin with a drawn picture."""
    nothing = ~given.any(dim=1)
    if nothing.any() and clean.shape[1] > 1:
        clean, given = clean.clone(), given.clone()
        clean[nothing, :1] = sample(model, *(a[nothing, :1] for a in (clean, given, rays)), args)
        given[nothing, 0] = True
    abar = cosine_abar().tolist()
    keep, x = given[:, :, None, None, None], torch.randn_like(clean)
    times = [round(T * i / args.sample_steps) for i in range(args.sample_steps, -1, -1)]
    for t, s in zip(times, times[1:]):
        x = torch.where(keep, clean, x)
        tt = torch.where(given, 0, t)
        x0 = model(x, tt, rays)
        if args.guidance != 1 and clean.shape[1] > 1:  # go further where the other frames pull it
            alone = model(*(a.flatten(0, 1)[:, None] for a in (x, tt, rays))).view_as(x)
            x0 = alone + args.guidance * (x0 - alone)
        x = ancestral_step(x, x0.clamp(-1, 1), abar[t], abar[s], torch.randn_like(x))
    return torch.where(keep, clean, x)


# ---- 7. Training (slide Video diffusion models: "train on 2D, then video") -----------------------


def build(args):
    model = VideoUNet(args.shape[1], args.patch, args.width, args.mults, args.blocks, args.heads)
    return model.to(args.device)


class Muon(torch.optim.Optimizer):
    """Momentum as a matrix (out, rest) with all singular values made about 1: rare directions learn
    as fast as strong ones (Jordan et al. 2024). Weight decay keeps the weights small."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is not None:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                m.lerp_(p.grad, 0.05)
                x = F.normalize(p.grad.lerp(m, 0.95).flatten(1), dim=(0, 1))
                tall = max(1, len(x) / x.shape[1])  # how many times as high as wide
                x = x.mT if tall > 1 else x
                a = x @ x.mT  # the loop needs this small matrix alone
                for i in range(5):  # Newton-Schulz: x becomes (3.4445 - 4.775 a + 2.0315 a a) x
                    poly = torch.addmm(a, a, a, beta=-4.775, alpha=2.0315)
                    poly.diagonal().add_(3.4445)
                    total = poly if i == 0 else poly @ total
                    a = poly @ a @ poly  # x x^T of the new x
                x = total @ x  # all five steps at once
                x = x.mT if tall > 1 else x
                p.mul_(1 - 0.3 * group["lr"])
                p.sub_(x.reshape(p.shape), alpha=group["lr"] * tall**0.5)


def optimizers(net, outside, lr, muon_lr, ckpt=None):
    """Muon for the matrices inside the network; Adam for the rest: biases, norms, and what is named
    in `outside`. Their state is that of the checkpoint, if there is one."""
    matrices, others = [], []
    for name, p in net.named_parameters():
        inside = p.ndim > 1 and not any(f".{part}." in f".{name}." for part in outside)
        (matrices if inside else others).append(p)
    opts = [Muon(matrices, muon_lr), torch.optim.Adam(others, lr, (0.9, 0.95), fused=True)]
    for opt, state in zip(opts, ckpt["optimizer"] if ckpt else []):
        opt.load_state_dict(state)
    return opts


@torch.no_grad()
def ema_update(ema, model, step):
    """Polynomial averaging (Shamir & Zhang 2013): over about the last tenth of the training."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 10 / (step + 10))


def train(args, ckpt=None):
    """Train, from scratch or from a checkpoint, and return the averaged model."""
    clips, K, pose = load_clips(args, "train", args.scenes)
    args.frames, args.shape = clips.shape[1], list(clips.shape[1:])
    torch.manual_seed(args.seed)
    model = build(args)
    ema = copy.deepcopy(model).requires_grad_(False).eval()  # averaged weights: better samples
    opts = optimizers(model, ["conv_in", "conv_out"], args.lr, args.muon_lr, ckpt)
    start = ckpt["step"] if ckpt else 0
    if ckpt:
        model.load_state_dict(ckpt["model"])
        ema.load_state_dict(ckpt["ema"])
    say(f"{args.device}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(clips):,} clips of {args.data}, {args.steps:,} steps of {args.batch_size}")
    if args.compile:
        model.compile()
    # find_unused_parameters: what joins frames gets no gradient in steps on pictures
    net = DistributedDataParallel(model, find_unused_parameters=True) if WORLD > 1 else model
    abar = cosine_abar().float().to(args.device)
    B, frames, device = args.batch_size, args.frames, args.device
    bar = tqdm(range(start + 1, args.steps + 1), initial=start, total=args.steps, disable=RANK > 0)
    for step in bar:
        # Every step has its own seed: --resume continues exactly, and the processes of torchrun,
        # number RANK of WORLD, draw the same global batch, of which each takes its share.
        torch.manual_seed(args.seed * 10_000_000 + step)
        # first pictures, each from a clip of its own; then clips and pictures in turns (Ho et al.)
        pictures = step <= args.picture_steps or step % args.picture_every == 0
        n = B * frames if pictures else B
        frame = torch.arange(frames, device=device).expand(n, -1)  # (n, F); of pictures (n, 1)
        if pictures:
            frame = torch.randint(frames, (n, 1), device=device)
        index = torch.randint(len(clips), (n, 1), device=device)
        u = (torch.rand((), device=device) + torch.arange(n, device=device) / n) % 1  # even spread
        # With little noise each frame shows by itself where things are. Motion is learned where
        # there is much, so every second clip gets a large t.
        u[::2] = u[::2] ** 0.2
        t = (T * u).ceil().long().clamp(min=1)[:, None]
        if not pictures:  # one t for all frames of a clip, and 0 for those that are given
            t = torch.where(draw_given(B, frames, device), 0, t)
        eps = torch.randn(*t.shape, *args.shape[1:], device=device)
        drop = torch.rand(n, 1, 1, 1, 1, device=device)
        index, frame, t, eps, drop = (a[RANK::WORLD] for a in (index, frame, t, eps, drop))
        rays = camera_rays(K[index, frame], pose[index, frame], *args.shape[2:], args.patch)
        rays = rays * (drop > 0.1)  # 10 % withheld, to show what the camera is good for
        with autocast(args):
            loss = video_loss(net, to_float(clips[index, frame]), rays, t, eps, abar)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min(1, step / 100) * (1 - (step - 1) / args.steps)  # warm up, then to almost 0
        for opt in opts:
            opt.param_groups[0]["lr"] = rate * opt.defaults["lr"]
            opt.step()
            opt.zero_grad()
        ema_update(ema, model, step)
        if step % 20 == 1:  # with the default --picture-every, a step on clips
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if RANK == 0 and (step % args.every == 0 or step == args.steps):
            save_checkpoint(args, step, model=model.state_dict(), ema=ema.state_dict(),
                            optimizer=[opt.state_dict() for opt in opts])
            rows = generate(args, ema, 2, [frames, 2, 1, 0])  # real, and drawn given 2, 1, 0 frames
            save_png(args.out / f"step_{step:06}.png", grid(rows.flatten(0, 1), frames))
    return ema


# ---- 8. Sampling from a trained model ------------------------------------------------------------


def generate(args, model, num, counts, camera=1.0):
    """A row per count for each of num test clips: the first count frames are given, the others are
    drawn; camera 0 withholds the rays. Clips (num len(counts), F, C, H, W) uint8."""
    clips, K, pose = (a.repeat_interleave(len(counts), 0) for a in load_clips(args, "test", num))
    rays = camera * camera_rays(K, pose, *clips.shape[3:], args.patch)
    given = torch.arange(clips.shape[1]) < torch.tensor(counts).repeat(num)[:, None]
    torch.manual_seed(args.seed)
    parts = zip(*(a.split(50) for a in (clips, given.to(args.device), rays)))
    with autocast(args):
        return torch.cat([to_uint8(sample(model, to_float(clean), keep, ray, args)).cpu()
                          for clean, keep, ray in parts])


def save_clips(path, clips, cols):
    """PATH.png: a row per clip (N, F, C, H, W) uint8; PATH_film.png: the same clips as an
    animation, in cols columns."""
    save_png(f"{path}.png", grid(clips.flatten(0, 1), clips.shape[1]))
    save_png(f"{path}_film.png", *[grid(x, cols) for x in clips.unbind(1)])


def save_samples(args, model):
    """samples.npz and samples.png: clips from nothing, or, of orbits, views of test scenes of which
    the first is given. Then rows of test clips beside drawn ones. Each picture is also a film."""
    start, frames, out = time.time(), args.frames, args.out
    clips = generate(args, model, args.num, [1 if args.data == "orbit" else 0])
    path = args.save or out / "samples.npz"
    np.savez(path, clips.permute(0, 1, 3, 4, 2))
    say(f"{args.num} clips in {time.time() - start:.1f} s: {path} and {out}/samples.png")
    save_clips(out / "samples", clips[:10], 5)
    if args.data == "orbit":  # rows: real, and drawn from the first view; withheld: no camera
        for name, data, camera in (("views", "orbit", 1), ("circle", "circle", 1),
                                   ("withheld", "circle", 0)):
            changed = argparse.Namespace(**vars(args) | {"data": data})
            save_clips(out / name, generate(changed, model, 5, [frames, 1], camera), 2)
    else:  # rows: real, three futures of the first frame, the continuation of the first two
        save_clips(out / "futures", generate(args, model, 3, [frames, 1, 1, 1, 2]), 5)


# ---- Plumbing: the same in every file; skip it on a first reading --------------------------------

HERE, NAME = Path(__file__).resolve().parent, Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun


def say(message):
    if RANK == 0:
        print(message, flush=True)


def die(message):
    """For mistakes of the user: one line, exit code 2."""
    print(f"{NAME}.py: {message}", file=sys.stderr)
    sys.exit(2)


def to_float(x):
    return x.float() / 127.5 - 1  # 0..255 -> -1..1


def to_uint8(x):
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grid(images, cols, zoom=3):
    """Images (N, C, H, W) uint8 as one picture (H', W', 3), row by row."""
    x = images.cpu().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    x = x.repeat(zoom, 1).repeat(zoom, 2)
    x = np.pad(x, ((0, -len(x) % cols), (1, 1), (1, 1), (0, 0)), constant_values=64)
    N, H, W, _ = x.shape
    return x.reshape(N // cols, cols, H, W, 3).swapaxes(1, 2).reshape(N // cols * H, cols * W, 3)


def save_png(path, *frames, fps=8):
    """Write one picture (H, W, 3) uint8, or several as an animated PNG, which browsers play."""
    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    H, W, _ = frames[0].shape
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", W, H, 8, 2, 0, 0, 0))
    out += chunk(b"acTL", struct.pack(">2I", len(frames), 0))
    for i, frame in enumerate(frames):
        data = zlib.compress(np.pad(frame.reshape(H, W * 3), ((0, 0), (1, 0))).tobytes())
        number = max(0, 2 * i - 1)  # chunks are numbered: fcTL 0, IDAT, fcTL 1, fdAT 2, ...
        out += chunk(b"fcTL", struct.pack(">5I2H2B", number, W, H, 0, 0, 1, fps, 0, 0))
        out += chunk(b"fdAT", struct.pack(">I", 2 * i) + data) if i else chunk(b"IDAT", data)
    Path(path).write_bytes(out + chunk(b"IEND", b""))


def save_checkpoint(args, step, **state):
    """Write OUT/model.pt; the rename is atomic, so a kill leaves the previous checkpoint whole."""
    names = [*HPARAMS, "data", "seed", "shape", "classes"]
    config = {name: value for name, value in vars(args).items() if name in names}
    torch.save(dict(file=NAME, config=config, step=step, **state), args.out / "model.part")
    os.replace(args.out / "model.part", args.out / "model.pt")


def load_checkpoint(path):
    """A checkpoint of this file, on the CPU; weights_only: nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not compare checksums
                raise ValueError(damaged)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt.get("file") != NAME:
            die(f"{path} is not a checkpoint of {NAME}.py, but of {ckpt.get('file')}")
        return ckpt
    except FileNotFoundError:
        die(f"{path} is missing: run --train first")
    except Exception as e:
        die(f"{path} is not a checkpoint, or damaged ({type(e).__name__})")


def autocast(args):
    """bf16 on GPUs and CPUs that compute in it."""
    device = args.device.split(":")[0]
    bf16 = (torch.cpu.get_capabilities().get("avx512_bf16", False) if device == "cpu"
            else torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.autocast(device, torch.bfloat16, enabled=bf16)


def parse_args(argv=None, config=None):
    """Flags; those not given come from config (of a checkpoint), then from the column of --size."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--train", action="store_true", help="train, then sample")
    add("--sample", action="store_true", help="sample from OUT/model.pt, or else from pretrained/")
    add("--resume", action="store_true", help="with --train: continue from OUT/model.pt")
    add("--compile", action="store_true", help="torch.compile: slow start, faster steps")
    add("--data", default="roll", help="roll, orbit, or an .npz with clips (N, F, H, W, C)")
    add("--out", type=Path, help="folder for everything written, by default in out/")
    add("--size", choices=SIZES, default="small", help="preset for the flags below")
    add("--num", type=int, default=20, help="number of samples")
    add("--save", type=Path, help="file for the samples (.npz), default OUT/samples.npz")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, (*values, text) in HPARAMS.items():
        many = isinstance(values[0], list)
        add("--" + name.replace("_", "-"), type=type(values[0][0] if many else values[0]),
            nargs="+" if many else None, help=f"{text} {tuple(values)}")
    column = SIZES.index(p.parse_known_args(argv)[0].size)
    p.set_defaults(**{name: row[column] for name, row in HPARAMS.items()} | (config or {}))
    args = p.parse_args(argv)
    args.model = f"{NAME}_orbit" if args.data == "orbit" else NAME
    args.out = args.out or Path("out") / args.model
    return args


def main(argv=None):
    args, ckpt = parse_args(argv), None
    if not (args.train or args.sample):
        return parse_args(["--help"])
    if args.resume or not args.train:
        path = args.out / "model.pt"
        if not path.exists() and not args.resume:
            path = HERE / "pretrained" / f"{args.model}.pt"
        ckpt = load_checkpoint(path)
        args = parse_args(argv, ckpt["config"])
        say(f"{path}, step {ckpt['step']:,}")
    if WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.train:
        model = train(args, ckpt)
    else:
        model = build(args).eval()
        model.load_state_dict(ckpt["ema"])
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0:
        save_samples(args, model)


if __name__ == "__main__":
    main()
