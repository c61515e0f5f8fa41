"""Denoising diffusion: images from noise in many small steps (DDPM, DDIM, DPM-Solver++).

A network learns to see through Gaussian noise of every strength. Sampling starts from noise alone
and removes a little of it, again and again, until an image is left.

Slides     Converting samples, Flow between distributions, Diffusion models, Noise schedule,
           Training and Sampling a diffusion model, Predicting images instead of noise,
           Add time dependency, SiLU
Equations  add noise       x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   eps ~ N(0, I)
           schedule        alpha_t = 1 - beta_t, abar_t = alpha_1 ... alpha_t, from 1 to near 0
           loss            |f(x_t, t) - target|^2     target: eps, x_0, or v, a mixture of the two
           sample          x_{t-1} = (x_t - (1 - alpha_t)/sqrt(1 - abar_t) eps)/sqrt(alpha_t)
                                     + sqrt(beta_t) z,   z ~ N(0, I) if t > 1 else 0;
                           eps = f(x_t, t), or derived from the guess of x_0, clipped
           guidance        out = f(x_t, t, none) + w (f(x_t, t, y) - f(x_t, t, none))
Notation   t         t       (B,)            time, 1..T; tables have T + 1 entries, 0 is clean
           abar_t    abar    (T+1,)          share of the image's variance left in x_t
           x_0, x_t  x0, xt  (B, C, H, W)    the image, and under noise; pixels in [-1, 1]
           eps, z    eps, z  (B, C, H, W)    noise
           y         y       (B,)            class, `classes` for none
                     emb     (B, D)          time and class as a vector
Run        python ddpm.py --train                             digits
           python ddpm.py --sample --num 1000 --save x.npz    from your model, or the one enclosed
           python ddpm.py --train --data spiral --out out/spiral        the flow, in the plane
           python ddpm.py --train --data cifar10 --size paper --unconditional --flip --out out/cifar
Expect     digits: 5 minutes on 2 CPU cores; 99 of 100 samples are read as the class asked for by a
           99.6 % classifier; 1,000 samples in 18 s. Points: under a minute. One H100, --size base
           --compile: 5,240 img/s.
           In out/ddpm/: model.pt, samples (.png, .npz), trajectory (an animation), interpolation,
           nearest, forward, loss (.png, .csv), step_000500.png and so on from the same noise.
Left out   learned variances, the full list of samplers, other architectures; text as the
           condition and latents instead of pixels are in latent_diffusion.py
Try        1. --train --predict eps --out out/eps, the same with x0 and v; then --compare
              out/eps/model.pt out/x0/model.pt out/v/model.pt, and --bpd for each.
           2. --sample --guidance 0, 1, 3, 10: what is gained, what is lost?
           3. --sample --sampler ddpm, ddim and dpm++ with --sample-steps 5, 10, 50.
Papers     Ho et al. 2020, DDPM; Nichol & Dhariwal 2021, Improved DDPM; Song et al. 2021, DDIM;
           Salimans & Ho 2022, v; Ho & Salimans 2022, guidance; Lu et al. 2022, DPM-Solver++;
           Hang et al. 2023, min-SNR; Lugmayr et al. 2022, RePaint
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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

TOYS = ["spiral", "moons", "rings"]
SIZES = {  # one dial, --size, sets all of these; a flag given by hand wins
    "small": dict(  # a laptop
        patch=2, width=32, mults=[1, 2], blocks=1, attention=[1], dropout=0.0, predict="v",
        schedule="cosine", steps=3000, batch_size=64, lr=3e-3, warmup=100, decay=0.5, beta2=0.99,
        ema=0.999, sampler="dpm++", sample_steps=20, guidance=1.5, num=100, every=500),
    "base": dict(  # a GPU, tens of minutes
        patch=1, width=96, mults=[1, 2, 2], blocks=2, attention=[1], dropout=0.1, predict="v",
        schedule="cosine", steps=30_000, batch_size=256, lr=5e-4, warmup=500, decay=0.5, beta2=0.99,
        ema=0.9995, sampler="dpm++", sample_steps=25, guidance=1.5, num=100, every=2000),
    "paper": dict(  # Ho et al. 2020 on CIFAR-10: 35,746,307 parameters, with --unconditional --flip
        patch=1, width=128, mults=[1, 2, 2, 2], blocks=2, attention=[1], dropout=0.1, predict="eps",
        schedule="linear", steps=800_000, batch_size=128, lr=2e-4, warmup=5000, decay=0.0,
        beta2=0.999, ema=0.9999, sampler="ddpm", sample_steps=1000, guidance=1.0, num=100,
        every=20_000),
    "points": dict(  # the flow in the plane: an MLP with as many layers as there are mults
        patch=1, width=192, mults=[1, 1, 1], blocks=1, attention=[], dropout=0.0, predict="v",
        schedule="cosine", steps=6000, batch_size=1024, lr=2e-3, warmup=100, decay=0.5, beta2=0.99,
        ema=0.999, sampler="ddim", sample_steps=100, guidance=1.0, num=2000, every=1000),
}
CONFIG = [*SIZES["small"], "size", "data", "seed", "timesteps", "min_snr", "flip", "unconditional",
          "eta", "variance", "shape", "classes"]  # what a checkpoint keeps of the flags


def parse_args(argv=None, config=None):
    """Every knob. config, from a checkpoint, replaces the defaults; a flag given by hand wins.
    (HERE, NAME, die, positive, share and pick_device are plumbing, at the end of the file.)"""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.error = die
    add = p.add_argument
    # what to do
    add("--train", action="store_true", help="train, then write samples and a checkpoint")
    add("--sample", action="store_true", help="draw from OUT/model.pt, or else pretrained/")
    add("--bpd", action="store_true", help="bits per dimension of the test set, term by term")
    add("--inpaint", action="store_true", help="complete the lower half of test images")
    add("--compare", nargs="+", metavar="PT", help="several checkpoints from the same noise")
    add("--export", type=Path, metavar="PT", help="write the averaged weights alone, as fp16")
    # where, and on what
    add("--data", default="mnist", help="mnist, fashion, cifar10, a .npy/.npz file of your own, "
        "or points in the plane: spiral, moons, rings")
    add("--data-dir", type=Path, default=HERE / "data", help="where data sets lie or are put")
    add("--out", type=Path, default=Path("out") / NAME, help="everything written goes there")
    add("--size", choices=["small", "base", "paper"],
        help="preset for all flags of network, training and sampling; small on a CPU, else base")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    add("--seed", type=int, default=0, help="start of all random numbers")
    add("--compile", action="store_true", help="torch.compile the training: slow start, then fast")
    add("--resume", action="store_true", help="go on from OUT/model.pt")
    add("--every", type=positive, help="checkpoint and picture every so many steps")
    # the network
    add("--patch", type=positive, help="fold patch x patch pixels into channels: faster, coarser")
    add("--width", type=positive, help="channels at the first level; cost grows with its square")
    add("--mults", type=positive, nargs="+", help="channels of each level, as multiples of width")
    add("--blocks", type=positive, help="residual blocks per level")
    add("--attention", type=int, nargs="*", help="levels with self-attention, "
        "besides the middle, which always has it; 0 is the finest")
    add("--dropout", type=share, help="raise it when a small data set is memorised")
    add("--unconditional", action="store_true", help="ignore the labels")
    # training
    add("--timesteps", type=positive, default=1000, metavar="T", help="diffusion steps T")
    add("--schedule", choices=["linear", "cosine"], help="how beta_t grows with t")
    add("--predict", choices=["eps", "x0", "v"], help="what the network's output means")
    add("--min-snr", type=float, default=0.0, metavar="GAMMA", help="weight "
        "the error in x_0 by min(SNR, GAMMA); 0: off")
    add("--steps", type=positive, help="training length")
    add("--batch-size", type=positive, help="images per step, over all GPUs; for "
        "--bpd, test images per t")
    add("--lr", type=share, help="peak learning rate of AdamW")
    add("--warmup", type=positive, help="steps until the peak is reached")
    add("--decay", type=float, help="lr (1 - step/steps)^decay; 0: constant, 1: linear to zero")
    add("--beta2", type=share, help="AdamW's memory of squared gradients; short for short runs")
    add("--ema", type=share, help="decay of the running mean of the weights, which is what samples")
    add("--flip", action="store_true", help="mirror half of the images (never digits)")
    # sampling
    add("--num", type=positive, help="how many samples")
    add("--save", type=Path, help="where their .npz goes, by default OUT/samples.npz")
    add("--guidance", type=float, metavar="W", help="uncond + W (cond - uncond): a larger W gives "
        "more typical and less varied samples")
    add("--sampler", choices=["ddpm", "ddim", "dpm++"], help="ancestral sampling, "
        "DDIM, or DPM-Solver++(2M)")
    add("--sample-steps", type=positive, help="steps from noise to image, at most T")
    add("--eta", type=share, default=0.0, help="ddim's noise: 0 none, 1 as much as ancestral")
    add("--variance", choices=["beta", "posterior"], default="beta",
        help="ddpm's noise: the slide's beta_t, or the variance of q(x_{t-1} | x_t, x_0)")
    p.set_defaults(**(config or {}))
    args = p.parse_args(argv)
    if args.data in TOYS:
        if args.size not in (None, "points"):
            die(f"--size {args.size}: points have one size; leave it out")
        args.size = "points"
    args.size = args.size or ("small" if pick_device(args.device) == "cpu" else "base")
    for key, value in SIZES[args.size].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for wrong, message in (
            (not 0 <= args.seed < 2**63, f"--seed {args.seed}: expected 0 or more, below 2^63"),
            (args.width % 4, f"--width {args.width}: expected a multiple of 4"),
            (args.timesteps < 2, f"--timesteps {args.timesteps}: expected 2 or more"),
            (args.beta2 == 1, "--beta2 1: expected less than 1"),
            (not args.min_snr >= 0, f"--min-snr {args.min_snr}: expected 0 or more"),
            (not args.decay >= 0, f"--decay {args.decay}: expected 0 or more"),
            (not math.isfinite(args.guidance), "--guidance: expected a finite number"),
            (args.data in TOYS and (args.bpd or args.inpaint),
             f"--bpd and --inpaint need images; --data {args.data} is points")):
        if wrong:
            die(message)
    return args


# ---- 1. The forward process (slides: Diffusion models, Noise schedule) ---------------------------


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


# ---- 2. Three targets, one model (slide: Predicting images instead of noise) ---------------------


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


def loss_weight(t, abar, predict, gamma):
    """Min-SNR (Hang et al. 2023): min(SNR, gamma) |guess - x_0|^2, told for each target; (B,)."""
    snr = abar[t] / (1 - abar[t])
    # |eps error|^2 = SNR |x0 error|^2        |v error|^2 = (SNR + 1) |x0 error|^2
    return {"eps": (gamma / snr).clamp(max=1), "x0": snr.clamp(max=gamma),
            "v": snr.clamp(max=gamma) / (snr + 1)}[predict]


# ---- 3. The network (slides: Add time dependency, SiLU; DDPM appendix B) -------------------------


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


class UNet(nn.Module):
    """f(x_t, t, y): from fine to coarse and back, each layer down handing a skip to its mirror up.

    x (B, C, H, W) about -1..1; t (B,) 1..T; y (B,) labels, the number `classes` meaning "none"; y
    is None if classes is 0.
    """

    def __init__(self, C, classes, T, patch, width, mults, blocks, attention, dropout):
        super().__init__()
        self.T, self.patch, self.width, D = T, patch, width, 4 * width
        self.time_mlp = nn.Sequential(nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(classes + 1, D) if classes else None
        self.conv_in = nn.Conv2d(C * patch**2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        ch, skips = width, [width]  # channels now, and of every skip
        for i, m in enumerate(mults):
            for _ in range(blocks):
                self.down.append(ResBlock(ch, m * width, D, dropout, i in attention))
                ch = m * width
                skips.append(ch)
            if i < len(mults) - 1:
                self.down.append(nn.Conv2d(ch, ch, 3, stride=2, padding=1))
                skips.append(ch)
        self.middle = nn.ModuleList([ResBlock(ch, ch, D, dropout, True),
                                     ResBlock(ch, ch, D, dropout, False)])
        for i, m in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(ch + skips.pop(), m * width, D, dropout, i in attention))
                ch = m * width
            if i > 0:
                self.up.append(nn.Conv2d(ch, ch, 3, padding=1))
        self.norm_out = group_norm(ch)
        self.conv_out = zero(nn.Conv2d(ch, C * patch**2, 3, padding=1))

    def forward(self, x, t, y=None):
        emb = self.time_mlp(time_basis(t * (1000 / self.T), self.width))  # (B, D)
        if self.label is not None:
            emb = emb + self.label(y)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))  # (B, width, H/patch, W/patch)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
            else:  # enlarge to the size of the next skip: 4 -> 8, but also 4 -> 7
                h = layer(F.interpolate(h, size=skips[-1].shape[2:]))
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch).float()  # (B, C, H, W)


class Field(nn.Module):
    """The lecture's neural flow field, Phi: R^2 -> R^2, at time t. x (B, 2), t (B,) -> (B, 2)."""

    def __init__(self, T, width, depth):
        super().__init__()
        self.T, self.width = T, width
        self.point, self.time = nn.Linear(2, width), nn.Linear(width, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.out = zero(nn.Linear(width, 2))

    def forward(self, x, t, y=None):
        h = self.point(x) + self.time(time_basis(t * (1000 / self.T), self.width))  # (B, width)
        for layer in self.hidden:
            h = h + F.silu(layer(F.silu(h)))
        return self.out(h).float()


# ---- 4. The loss (slide: Training a diffusion model; DDPM Algorithm 1) ---------------------------


def diffusion_loss(model, x0, y, t, eps, abar, predict, gamma=0.0):
    """Mean of |f(x_t, t) - target|^2 (DDPM Eq. 14); gamma > 0 weights it. x0, eps (B, ...)."""
    out = model(q_sample(x0, t, eps, abar), t, y)
    error = (out - target_of(x0, eps, t, abar, predict)).square().flatten(1).mean(1)  # (B,)
    return (loss_weight(t, abar, predict, gamma) * error).mean() if gamma else error.mean()


# ---- 5. The samplers (slides: Converting samples, Sampling from a diffusion model) ---------------
# Each steps from x_t to x_s, s < t, given x0, the model's guess of the clean image, clipped to
# [-1, 1]. a_t, a_s are abar at t and s; a_t/a_s is the slide's alpha_t if s = t - 1, and the
# product of the alphas in between if the stride is longer. z is fresh noise.


def step_variance(a_t, a_s, variance):
    """Of the noise in a step: the slide's beta_t, or that of q(x_s | x_t, x_0) (DDPM Eq. 7)."""
    beta = 1 - a_t / a_s
    return beta if variance == "beta" else beta * (1 - a_s) / (1 - a_t)


def ddpm_step(xt, x0, a_t, a_s, z, variance):
    """Ancestral sampling: x_s ~ p(x_s | x_t), the mean of q(x_s | x_t, x_0) (DDPM Eq. 7) and noise.

    With x_0 = (x_t - sqrt(1 - abar_t) eps)/sqrt(abar_t) put in, the mean is the slide's
    (x_t - (1 - alpha_t)/sqrt(1 - abar_t) eps)/sqrt(alpha_t), in which there is no x_0 to clip.
    """
    alpha, beta = a_t / a_s, 1 - a_t / a_s
    mean = (math.sqrt(a_s) * beta * x0 + math.sqrt(alpha) * (1 - a_s) * xt) / (1 - a_t)
    return mean + math.sqrt(step_variance(a_t, a_s, variance)) * z


def ddim_step(xt, x0, a_t, a_s, z, eta):
    """DDIM (Song et al. 2021, Eq. 12): keeps the noise it found, but for a fresh part, sigma."""
    eps = (xt - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)  # from the clipped x0, to agree with it
    sigma = eta * math.sqrt(step_variance(a_t, a_s, "posterior"))
    return math.sqrt(a_s) * x0 + math.sqrt(1 - a_s - sigma**2) * eps + sigma * z


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
def sample_loop(denoise, x, abar, sampler, steps, eta=0.0, variance="beta", keep=None):
    """From noise x = x_T to x_0 in `steps` equal strides; steps = T visits every t (Algorithm 2).

    denoise(x, t) guesses x_0; keep(t, x, x0), if given, is shown every state on the way.
    """
    a, x0_prev, a_prev = abar.tolist(), None, None
    for t, s in stride(len(abar) - 1, steps):
        x0 = denoise(x, t)
        if keep:
            keep(t, x, x0)
        z = torch.randn_like(x) if s > 0 else torch.zeros_like(x)  # slide: z > 1, meant t > 1
        if sampler == "ddpm":
            x = ddpm_step(x, x0, a[t], a[s], z, variance)
        elif sampler == "ddim":
            x = ddim_step(x, x0, a[t], a[s], z, eta)
        else:
            x = dpmpp_step(x, x0, a[t], a[s], x0_prev, a_prev)
            x0_prev, a_prev = x0, a[t]
    if keep:
        keep(0, x, x)
    return x


def make_denoiser(model, y, abar, predict, w):
    """denoise(x, t): the model's guess of x_0, guided by w towards class y (Ho & Salimans 2022)."""

    def denoise(x, t):
        tt = torch.full((len(x),), t, device=x.device)
        none = None if y is None else torch.full_like(y, model.label.num_embeddings - 1)
        if y is None or w in (0, 1):
            out = model(x, tt, y if w == 1 else none)
        else:  # with and without the class in one batch of twice the size
            twice = torch.cat([x, x]), torch.cat([tt, tt]), torch.cat([y, none])
            cond, uncond = model(*twice).chunk(2)
            out = uncond + w * (cond - uncond)
        return x0_of(out, x, tt, abar, predict).clamp(-1, 1)

    return denoise


# ---- 6. Train ------------------------------------------------------------------------------------


def build(args):
    """The network that args describe, on its device."""
    if not args.classes and args.guidance != 1:
        die(f"--guidance {args.guidance:g}: needs a model trained with classes; this one has none")
    if args.data in TOYS:
        return Field(args.timesteps, args.width, len(args.mults)).to(args.device)
    if args.shape[1] % args.patch or args.shape[2] % args.patch:
        die(f"--patch {args.patch} does not divide images of {args.shape[1:]}; take --patch 1")
    model = UNet(args.shape[0], args.classes, args.timesteps, args.patch, args.width, args.mults,
                 args.blocks, args.attention, args.dropout).to(args.device)
    # NHWC is what tensor cores read; on a CPU it made small networks slower
    return model.to(memory_format=torch.channels_last) if "cuda" in args.device else model


@torch.no_grad()
def ema_update(ema, model, step, decay):
    """ema <- decay ema + (1 - decay) model, in float32; a short memory in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def learning_rate(step, args):
    """Linear warm-up, then decay; step from 1 to args.steps."""
    return args.lr * min(1, step / args.warmup) * (1 - (step - 1) / args.steps) ** args.decay


def train(args, ckpt=None):
    """Trains and returns the averaged model; checkpoints and pictures on the way. ckpt: go on."""
    data, labels = toy_points(args) if args.data in TOYS else load_data(args, "train")
    labels = None if args.unconditional else labels  # data (N, C, H, W) uint8, labels (N,) int64
    args.shape = list(data.shape[1:])
    args.classes = 0 if labels is None else int(labels.max()) + 1
    if not args.classes and args.guidance == SIZES[args.size]["guidance"]:
        args.guidance = 1.0  # it was only the preset
    torch.manual_seed(args.seed)
    model = build(args)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.AdamW(model.parameters(), args.lr, (0.9, args.beta2), weight_decay=0.0,
                            fused=True)
    begin, history = 1, []
    if ckpt:
        for part, key in ((model, "model"), (ema, "ema"), (opt, "optimizer")):
            load_state(part, ckpt, key)
        begin, history = ckpt["step"] + 1, ckpt["history"]
    if begin > args.steps:
        die(f"--resume: all {args.steps} steps are done; ask for more with --steps")
    if args.batch_size % WORLD:
        die(f"--batch-size {args.batch_size} cannot be shared evenly by {WORLD} processes")
    count = sum(p.numel() for p in model.parameters())
    say(f"{count:,} parameters; {len(data):,} of {args.data}, shape {args.shape}, {args.classes} "
        f"classes; {args.steps:,} steps of {args.batch_size}")
    if RANK == 0:
        forward_picture(args, data)
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        model.compile()
    net = DistributedDataParallel(model) if WORLD > 1 else model
    config = {k: getattr(args, k) for k in CONFIG}
    abar, B, dev, stop = schedule_of(args), args.batch_size, args.device, ctrl_c()
    total, counted, clock, since = 0.0, 0, time.time(), begin - 1
    bar = tqdm(range(begin, args.steps + 1), initial=begin - 1, total=args.steps,
               disable=RANK > 0 or None)
    for step in bar:
        # Step n draws from a seed of its own: --resume needs no saved random state, and all
        # processes of torchrun draw the same global batch, of which each takes its share.
        torch.manual_seed((args.seed * 1_000_003 + step) % 2**63)
        pick = torch.randint(len(data), (B,), device=dev)
        # t uniform in 1..T, one from each of B equal strata: every batch sees all noise levels
        u = (torch.rand(1, device=dev) + torch.arange(B, device=dev) / B) % 1
        t = (1 + (u * args.timesteps).long()).clamp(max=args.timesteps)  # (B,)
        eps = torch.randn(B, *args.shape, device=dev)  # (B, C, H, W)
        drop, flip = torch.rand(2, B, device=dev)
        pick, t, eps, drop, flip = (a[RANK::WORLD] for a in (pick, t, eps, drop, flip))
        if RANK:
            torch.manual_seed(step * WORLD + RANK)  # dropout of its own in every process
        x0 = to_float(data[pick])  # (B, C, H, W) in [-1, 1]
        if args.flip and x0.ndim == 4:
            x0 = torch.where(flip[:, None, None, None] < 0.5, x0.flip(3), x0)
        # 1 label in 10 becomes "none", so that the model learns p(x) too, for guidance
        y = torch.where(drop < 0.1, args.classes, labels[pick]) if args.classes else None
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, args)
        with autocast(args):
            loss = diffusion_loss(net, x0, y, t, eps, abar, args.predict, args.min_snr)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        ema_update(ema, model, step, args.ema)
        total, counted, done = total + loss.detach(), counted + 1, step == args.steps or bool(stop)
        write = done or step % args.every == 0
        if write or step == 1 or step % 20 == 0:  # not each step: reading the loss waits for a GPU
            if WORLD > 1:
                dist.all_reduce(total)
            history.append((step, float(total) / counted / WORLD))
            total, counted = 0.0, 0
            state = f"loss {history[-1][1]:.4f} (untrained {history[0][1]:.2f})"
            bar.set_postfix_str(state)
            if not math.isfinite(history[-1][1]):
                die(f"the loss is {history[-1][1]} at step {step}: lower --lr {args.lr}; the last "
                    "checkpoint is kept")
        if write and RANK == 0:
            speed = (step - since) / (time.time() - clock)
            save_checkpoint(args.out / "model.pt", dict(
                file=NAME, config=config, step=step, history=history, model=model.state_dict(),
                ema=ema.state_dict(), optimizer=opt.state_dict()))
            save_loss(args.out, history)
            tqdm.write(f"step {step:,}: {state}, {speed:.1f} steps/s, {speed * B:.0f} img/s")
            sys.stdout.flush()
            if not done and args.data not in TOYS:
                x = generate(args, ema, class_labels(args, 80))
                save_png(args.out / f"step_{step:06}.png", grid(x, 8 if args.classes else 10)[None])
        if write or step == begin:  # the clock leaves out pictures, and torch.compile's first step
            clock, since = time.time(), step
        if done and step < args.steps:
            say(f"stopped at {step}; to go on: python {NAME}.py --train --resume --out {args.out}")
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return ema


# ---- 7. Sample, and the pictures -----------------------------------------------------------------


def class_labels(args, num):
    """Labels (num,), class by class, all classes as often as num allows; zeros without classes."""
    return torch.arange(num) * max(1, args.classes) // num


def noise_of(args, *size):
    """Noise (*size, C, H, W) of --seed, drawn on the CPU: the same whatever the device."""
    return torch.randn(*size, *args.shape, generator=torch.Generator().manual_seed(args.seed))


def generate(args, model, labels, noise=None, keep=None):
    """Images (N, C, H, W) uint8 for labels (N,), from noise (N, C, H, W) or that of --seed."""
    noise = noise_of(args, len(labels)) if noise is None else noise
    torch.manual_seed(args.seed + 1)  # or a CPU would draw x_T once more as the first fresh noise
    abar, out = schedule_of(args), []
    for i in tqdm(range(0, len(noise), 250), desc="samples", leave=False, disable=None):
        y = labels[i:i + 250].to(args.device) if args.classes else None
        denoise = make_denoiser(model, y, abar, args.predict, args.guidance)
        with autocast(args):
            x = sample_loop(denoise, noise[i:i + 250].to(args.device), abar, args.sampler,
                            args.sample_steps, args.eta, args.variance, keep)
        out.append(to_uint8(x))
    return torch.cat(out)


def sample(args, model):
    """samples.npz and .png, a film of the sampling, interpolations, nearest training images."""
    if args.data in TOYS:
        return sample_points(args, model)
    labels, start = class_labels(args, args.num), time.time()
    images = generate(args, model, labels)  # (N, C, H, W)
    path = args.save or args.out / "samples.npz"
    save_npz(path, images.permute(0, 2, 3, 1).cpu().numpy(), labels=labels.numpy())
    say(f"{args.num} samples in {time.time() - start:.1f} s ({args.sampler}, "
        f"{min(args.sample_steps, args.timesteps)} steps, guidance {args.guidance:g}): {path}")
    # a row of up to ten for each of the first ten classes
    cols = min(10, args.num // max(1, args.classes)) or 10
    rows = [(labels == c).nonzero()[:cols, 0] for c in labels.unique()[:10] if args.classes]
    shown = images[torch.cat(rows) if rows else slice(100)]
    save_png(args.out / "samples.png", grid(shown, cols)[None])

    # A film: x_t on the left, the guess of x_0 on the right.
    brief, frames = copy.copy(args), []
    brief.sample_steps = min(40, args.sample_steps)
    generate(brief, model, class_labels(args, 40), keep=lambda t, x, x0: frames.append(
        np.concatenate([grid(to_uint8(x), 4, 300), grid(to_uint8(x0), 4, 300)], axis=1)))
    save_png(args.out / "trajectory.png", np.stack(frames + frames[-1:] * 8))

    a, b = noise_of(args, 2, 10, 1)  # (10, 1, C, H, W)
    noise = slerp(a, b, torch.linspace(0, 1, 10).view(1, 10, 1, 1, 1))  # (10, 10, C, H, W)
    brief.sampler, brief.eta = "dpm++", 0.0  # no fresh noise on the way
    labels = class_labels(args, 10).repeat_interleave(10)
    save_png(args.out / "interpolation.png",
             grid(generate(brief, model, labels, noise.flatten(0, 1)), 10)[None])

    # Has it memorised? Each sample beside its nearest training image, where there are any.
    if have_data(args):
        known = load_data(args, "train")[0]
        distance, index = nearest(shown, known)
        pairs = torch.stack([shown, known[index]], 1).flatten(0, 1)  # (2 N, C, H, W)
        save_png(args.out / "nearest.png", grid(pairs, 2 * cols, 1200)[None])
        say("distance to the nearest training image (0: a copy), median and least: "
            f"samples {distance.median():.1f} {distance.min():.1f}", end="")
        real = nearest(load_data(args, "test")[0][:100], known)[0]
        say(f", test images {real.median():.1f} {real.min():.1f} (nearest.png)")
    else:
        say(f"nearest.png left out: not all of {args.data} is on this disk")
    say(f"pictures in {args.out}: samples, trajectory, interpolation\n"
        f"now try: python {NAME}.py --sample {'--guidance 3' if args.classes else '--seed 1'} "
        f"--out {args.out}")


def slerp(a, b, f):
    """From noise a (f = 0) to b (f = 1) along the sphere: noise has length near sqrt(dimension),
    and the straight way would lead through shorter vectors, which the model never saw. a, b
    (N, 1, C, H, W), f broadcast to them."""
    angle = F.cosine_similarity(a.flatten(1), b.flatten(1)).acos().view(-1, 1, 1, 1, 1)
    return (((1 - f) * angle).sin() * a + (f * angle).sin() * b) / angle.sin()


def nearest(queries, known):
    """Distance (Q,) to and index (Q,) of the nearest of known, for sets of images or of points."""
    q = to_float(queries).flatten(1)  # (Q, C H W); exact distances, not by rounded products
    d = [torch.cdist(q, to_float(k).flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
         for k in known.split(10_000)]
    return torch.cat(d, 1).min(dim=1)


def forward_picture(args, data):
    """forward.png: one image under growing noise, and the two curves of the schedule."""
    T, abar = args.timesteps, make_abar(args.schedule, args.timesteps)
    rows = [plot({"signal": (range(T + 1), abar.sqrt().tolist()),
                  "noise": (range(T + 1), (1 - abar).sqrt().tolist())}, "t")]
    if args.data not in TOYS:
        t = torch.linspace(0, T, 9).long()
        x0 = to_float(data[:1].cpu()).expand(9, *args.shape)
        noisy = grid(to_uint8(q_sample(x0, t, noise_of(args, 1).expand_as(x0), abar)), 9)
        names = [caption(f"t={k}", noisy.shape[1] // 9) for k in t.tolist()]
        rows = [np.concatenate(names, 1), noisy] + rows
    save_png(args.out / "forward.png", stack(rows)[None])


# ---- 8. Bits per dimension by the variational bound (slide: Evaluation; DDPM Eq. 5) --------------


def normal_kl(mean1, var1, mean2, var2):
    """KL( N(mean1, var1) || N(mean2, var2) ) in nats, element by element; variances are numbers."""
    return 0.5 * (math.log(var2 / var1) + (var1 + (mean1 - mean2) ** 2) / var2 - 1)


def decoder_log_prob(x, mean, var):
    """log P(x) in nats of the 256 grey levels x in [-1, 1] under N(mean, var), cut into bins.

    The bins of black and white take the tails, so that the 256 add up to 1 (DDPM Eq. 13).
    """
    lower = torch.where(x < -0.999, -math.inf, (x - 1 / 255 - mean) / math.sqrt(var))
    upper = torch.where(x > 0.999, math.inf, (x + 1 / 255 - mean) / math.sqrt(var))
    # Phi(upper) - Phi(lower), mirrored to the left tail, where its logarithm can be computed
    lower, upper = (torch.where(lower > 0, a, b) for a, b in ((-upper, lower), (-lower, upper)))
    log_phi = torch.special.log_ndtr
    return log_phi(upper) + torch.log1p(-(log_phi(lower) - log_phi(upper)).exp())


def bound_term(x0, guess, t, abar, variance):
    """L_{t-1} = KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ) in nats an image (B,); guess is the
    model's x_0 from x_t. At t = 1 it is the decoder's -log p(x_0 | x_1)."""
    a = abar.tolist()
    if t == 1:  # the posterior variance is 0 here; that of t = 2, the next smallest, stands in
        var = step_variance(*((a[1], a[0]) if variance == "beta" else (a[2], a[1])), variance)
        return -decoder_log_prob(x0, guess, var).flatten(1).sum(1)
    # both means have the same part in x_t; that in x_0 is sqrt(abar_{t-1}) beta_t / (1 - abar_t)
    k = math.sqrt(a[t - 1]) * (1 - a[t] / a[t - 1]) / (1 - a[t])
    q, p = (step_variance(a[t], a[t - 1], kind) for kind in ("posterior", variance))
    return normal_kl(k * x0, q, k * guess, p).flatten(1).sum(1)


@torch.no_grad()
def bits_per_dim(args, model):
    """The bound over the test set: a table of its terms, and bpd.png. Each L_{t-1} is estimated on
    a batch of test images drawn for it; standard errors are printed. Returns the total."""
    images, labels = load_data(args, "test")
    T, abar, n = args.timesteps, schedule_of(args), args.batch_size
    per_dim = 1 / (math.log(2) * math.prod(args.shape))  # nats an image -> bits a dimension
    x0, a_T = to_float(images.cpu()).double(), abar[T].item()
    prior = normal_kl(math.sqrt(a_T) * x0, 1 - a_T, 0.0, 1.0).flatten(1).sum(1).mean().item()
    mean, error = [prior * per_dim], [0.0]  # mean[t] is L_{t-1}, mean[0] the prior
    torch.manual_seed(args.seed)
    for t in tqdm(range(1, T + 1), desc="bits/dim", leave=False, disable=None):
        i = torch.randint(len(images), (n,), device=images.device)
        x0 = to_float(images[i])
        xt = q_sample(x0, torch.full_like(i, t), torch.randn_like(x0), abar)
        # a class never seen counts as none
        y = labels[i].clamp(max=args.classes) if args.classes else None
        guess = make_denoiser(model, y, abar, args.predict, 1.0)(xt, t)  # not in bf16
        nats = bound_term(x0.cpu().double(), guess.cpu().double(), t, abar, args.variance) * per_dim
        mean.append(nats.mean().item())
        error.append(nats.std().item() / math.sqrt(n))
    say(f"bits per dimension of {args.data}:test, variance {args.variance}; uniform is 8")
    say(f"  prior L_T         {mean[0]:9.5f}")
    edges = sorted({2, *(max(2, T * k // 100) for k in (1, 10, 25, 50)), T + 1}, reverse=True)
    for hi, lo in zip(edges, edges[1:]):
        part, e = sum(mean[lo:hi]), math.hypot(*error[lo:hi])
        say(f"  L_{{t-1}} {lo:4}..{hi - 1:<5} {part:9.5f} +- {e:.5f}")
    say(f"  decoder L_0       {mean[1]:9.5f} +- {error[1]:.5f}")
    say(f"  total             {sum(mean):9.5f} +- {math.hypot(*error):.5f}")
    picture = plot({"L_(t-1)": (range(1, T + 1), mean[1:])}, "t", "bits/dim", log=True)
    save_png(args.out / "bpd.png", picture[None])
    return sum(mean)


# ---- 9. Inpainting, and checkpoints side by side -------------------------------------------------


@torch.no_grad()
def inpaint(args, model, answers=6, rounds=4):
    """inpaint.png: the lower halves of test images drawn anew, the class not told (RePaint,
    Lugmayr et al. 2022): after each step back the known half is put in, at that step's noise;
    going forward and back again, a few rounds, lets the new half agree with it. Returns images."""
    images, labels = load_data(args, "test")
    first = [] if labels is None else np.unique(labels.cpu(), return_index=True)[1][:10].tolist()
    real = to_float(images[first or slice(10)])  # (R, C, H, W), an image of each class
    known, R = real.repeat_interleave(answers, 0), len(real)
    mask = (torch.arange(known.shape[2], device=known.device) < known.shape[2] // 2)[:, None]
    abar = schedule_of(args)
    a = abar.tolist()
    y = torch.full((len(known),), args.classes, device=known.device) if args.classes else None
    denoise = make_denoiser(model, y, abar, args.predict, 1.0)  # y says "none" to all
    torch.manual_seed(args.seed)
    x = torch.randn_like(known)
    for t, s in tqdm(stride(args.timesteps, 100), desc="inpaint", leave=False, disable=None):
        for again in range(rounds if s else 1):
            if again:  # forward from s to t: q(x_t | x_s)
                x = math.sqrt(a[t] / a[s]) * x + math.sqrt(1 - a[t] / a[s]) * torch.randn_like(x)
            with autocast(args):
                x0 = denoise(x, t)
            z = torch.randn_like(x) if s else torch.zeros_like(x)
            x = ddpm_step(x, x0, a[t], a[s], z, "posterior")
            there = math.sqrt(a[s]) * known + math.sqrt(1 - a[s]) * torch.randn_like(x)
            x = torch.where(mask, there, x)  # at s = 0 the known half, exactly
    given = torch.where(mask, real, 0.0)
    table = torch.cat([real[:, None], given[:, None], x.unflatten(0, (R, answers))], 1)
    save_png(args.out / "inpaint.png", grid(to_uint8(table.flatten(0, 1)), 2 + answers)[None])
    say(f"{args.out / 'inpaint.png'}: test image, the half that is given, {answers} answers")
    return to_uint8(x)


def compare(args, argv):
    """compare.png: the same noise through several checkpoints, one row each."""
    rows = []
    for path in args.compare:
        ckpt = read_checkpoint(Path(path))
        one = parse_args(argv, ckpt["config"])
        one.device, one.bf16, one.seed = args.device, args.bf16, args.seed
        if one.data in TOYS:
            die(f"--compare {path}: a model of {one.data}; expected one of images")
        model = build(one).eval()
        load_state(model, ckpt, "ema")
        x = grid(generate(one, model, class_labels(one, 10)), 10, 700)
        rows += [caption(f"{one.predict}, step {ckpt['step']}, {path}", x.shape[1]), x]
    save_png(args.out / "compare.png", stack(rows)[None])
    say(f"one row per checkpoint: {args.out / 'compare.png'}")


# ---- 10. Two dimensions: the flow itself (slides: Neural flow fields, Flow between distributions)


def toy_points(args, n=20_000):
    """Points (n, 2) within [-1, 1] on a spiral, two moons or three rings; and None, no labels."""
    g = torch.Generator().manual_seed(0)
    u, k = torch.rand(n, generator=g), torch.randint(6, (n,), generator=g)
    if args.data == "moons":
        side = (k % 2 * 2 - 1).float()
        x, y = 0.6 * (math.pi * u).cos() + 0.25 * side, side * (0.6 * (math.pi * u).sin() - 0.2)
    else:
        r = 0.9 * u.sqrt() if args.data == "spiral" else 0.3 * (k % 3 + 1)
        angle = 3 * math.pi * u.sqrt() if args.data == "spiral" else 2 * math.pi * u
        x, y = r * angle.cos(), r * angle.sin()
    points = torch.stack([x, y], 1) + 0.02 * torch.randn(n, 2, generator=g)
    return points.to(args.device), None


def sample_points(args, model, side=320, reach=1.8):
    """flow.png: the field as arrows at four times; data, samples, and paths from noise to data;
    trajectory.png: the film; samples.npz: the points."""
    def pixel(p):  # (N, 2), both coordinates in -reach..reach -> column and row
        return (p.cpu().numpy() * [1, -1] / reach + 1) * side / 2

    def panel(title, *layers):  # layers: points (N, 2), colour
        canvas = np.full((side, side, 3), 255, np.uint8)
        for points, colour in layers:
            p = pixel(points).round().astype(int)
            cols, rows = p[((p >= 0) & (p < side - 1)).all(1)].T  # leaving out what is beyond
            for k in range(4):
                canvas[rows + k // 2, cols + k % 2] = colour
        draw_text(canvas, title, 6, 6)
        return canvas

    blue, red, grey, dark = (70, 110, 220), (220, 70, 30), (150, 150, 150), (50, 50, 50)
    path, abar = {}, schedule_of(args)
    torch.manual_seed(args.seed + 1)  # as in generate
    denoise = make_denoiser(model, None, abar, args.predict, 1.0)
    with torch.no_grad():
        sample_loop(denoise, noise_of(args, args.num).to(args.device), abar, args.sampler,
                    args.sample_steps, args.eta, args.variance,
                    keep=lambda t, x, x0: path.update({t: x}))
        times, data = list(path), toy_points(args)[0]  # times from T down to 0
        line = torch.linspace(-0.85, 0.85, 16) * reach
        mesh, fields = torch.cartesian_prod(line, line).to(args.device), []  # (256, 2)
        for at in (0, 0.5, 0.8, 0.95):
            t, s = times[int(at * (len(times) - 2)):][:2]
            fields.append(panel(f"field, t={t}", (path[t], (190, 210, 245))))
            # slide: x_{t-1} = f(x_t) + x_t; the arrow is f, DDIM's step, to a panel's own scale
            f = ddim_step(mesh, denoise(mesh, t), abar[t].item(), abar[s].item(), 0.0, 0.0) - mesh
            f = f / f.norm(dim=1).max().clamp(min=1e-9) * 1.5 * (line[1] - line[0]).item()
            for p, q in zip(pixel(mesh), pixel(mesh + f)):
                draw_line(fields[-1], p, q, dark)
                draw_line(fields[-1], q, q, red, 3)
    paths = panel("from noise to data", (path[0], (255, 220, 190)), (path[times[0]][:40], blue))
    for t, s in zip(times, times[1:]):
        for p, q in zip(pixel(path[t][:40]), pixel(path[s][:40])):
            draw_line(paths, p, q, grey)
    below = [panel("noise", (path[times[0]], blue)), paths, panel("samples", (path[0], red)),
             panel("data", (data[:2000], dark))]
    picture = stack([np.concatenate(fields, 1), np.concatenate(below, 1)])
    save_png(args.out / "flow.png", picture[None])
    film = [panel(f"t={t}", (path[t], blue)) for t in times[::max(1, len(times) // 40)]]
    save_png(args.out / "trajectory.png", np.stack(film + [panel("t=0", (path[0], red))] * 10))
    save_npz(args.save or args.out / "samples.npz", path[0].cpu().numpy())
    miss = [nearest(p, data[2000:])[0].mean() for p in (path[0], data[:2000], path[times[0]])]
    say(f"mean distance to the nearest data point: samples {miss[0]:.3f}, other data {miss[1]:.3f},"
        f" noise {miss[2]:.3f}\npictures in {args.out}: flow, trajectory\n"
        f"now try: python {NAME}.py --train --data moons --out out/moons")


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


def have_data(args):
    """Is all of --data on this disk, so that nothing need be downloaded?"""
    if args.data not in DATASETS:
        return Path(args.data).exists()
    files = [f for f in DATASETS[args.data][1] if not f.endswith(".tar.gz")]
    return all((args.data_dir / args.data / f).exists() for f in files)


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


def save_loss(out, history):
    """loss.csv and loss.png from history [(step, loss), ...]."""
    rows = "".join(f"{step},{loss:.6f}\n" for step, loss in history)
    write_whole(out / "loss.csv", f"step,loss\n{rows}".encode())
    save_png(out / "loss.png", plot({"loss": list(zip(*history))}, "step", log=True)[None])


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
    if not any((args.train, args.sample, args.bpd, args.inpaint, args.compare, args.export)):
        return parse_args(["--help"])
    if args.compare and (args.train or args.sample or args.bpd or args.inpaint or args.export):
        die("--compare stands alone; leave out the other verbs")
    path = args.out / "model.pt"
    if args.train and not args.resume and path.exists():
        if (old := read_checkpoint(path)["config"]["data"]) != args.data:
            die(f"--out {args.out} holds a model of {old}; choose another --out for {args.data}")
    if not args.compare and (args.resume or not args.train):
        if not (path.exists() or args.resume) and (HERE / "pretrained" / f"{NAME}.pt").exists():
            path = HERE / "pretrained" / f"{NAME}.pt"
        ckpt = read_checkpoint(path)
        args = parse_args(argv, ckpt["config"])
        for key in ("data", "size", "patch", "width", "mults", "blocks", "attention", "timesteps",
                    "schedule", "predict", "unconditional"):
            if getattr(args, key) != ckpt["config"][key]:
                die(f"--{key} {getattr(args, key)}: {path} was trained with {ckpt['config'][key]}")
        say(f"from {path}, step {ckpt['step']:,}")
    try:
        setup(args)
        if args.compare:
            return compare(args, argv)
        if args.train:
            model = train(args, ckpt)
        else:
            model = build(args).eval()
            load_state(model, ckpt, "ema")
        if RANK > 0:
            time.sleep(1)  # a thread of gloo that still holds a tensor would abort a quicker exit
            return
        if args.export:
            ckpt = read_checkpoint(args.out / "model.pt")
            if not args.train or ckpt["step"] == args.steps:  # not what Ctrl-C left
                small = {k: ckpt[k] for k in ("file", "config", "step")}
                small["ema"] = {k: v.half() for k, v in ckpt["ema"].items()}
                save_checkpoint(args.export, small)
        if args.train or args.sample:
            sample(args, model)
        if args.bpd:
            bits_per_dim(args, model)
        if args.inpaint:
            inpaint(args, model)
    except OSError as e:  # disk full, no right to write: the last checkpoint is whole
        die(f"{e.filename or args.out}: {e.strerror or e}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
