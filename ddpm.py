"""Denoising diffusion: a network learns to remove Gaussian noise; sampling starts from pure noise.

    python ddpm.py --train                        MNIST, in minutes on a laptop
    python ddpm.py --sample                       100 digits from your model, or the pretrained one
    python ddpm.py --sample --num 1000 --guidance 2 --sampler ddim --save digits.npz
    torchrun --nproc_per_node=8 ddpm.py --train --size paper --data cifar10 --out out/cifar

Slides     Converting samples, Flow between distributions, Diffusion models, Noise schedule,
           Training a diffusion model, Sampling from a diffusion model, Predicting images instead of
           noise, Add time dependency, SiLU
Equations  add noise   x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   eps ~ N(0, I)
           schedule    abar_t = (1 - beta_1) ... (1 - beta_t), from 1 to almost 0
           loss        ||f(x_t, t, y) - target||^2,   target: eps, x_0, or a mixture of both,
                       v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
           sampling    x_T ~ N(0, I); estimate x_0 from f(x_t, t, y); step to a smaller t; repeat
           guidance    f(x_t, t, none) + w (f(x_t, t, y) - f(x_t, t, none))
Notation   x (B, C, H, W) images in [-1, 1]; t (B,) time in 1..T; y (B,) class in 0..classes-1,
           and one more, `classes`, for "none"; abar (T + 1,) share of signal variance left at time
           t, abar[0] = 1; a_t is abar[t]; emb (B, D) embedding of t and y
Papers     Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (cosine schedule); Song et al. 2021 (DDIM);
           Salimans & Ho 2022 (v); Ho & Salimans 2022 (guidance); Lu et al. 2022 (DPM-Solver++);
           Jordan et al. 2024 (Muon)
"""
import argparse
import copy
import gzip
import io
import math
import os
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

SIZES = ("small", "base", "paper")
HPARAMS = {  # each row is a flag; --size picks the column. paper: the network of Ho et al. 2020
    "patch": (2, 1, 1, "fold patch x patch pixels into channels"),
    "width": (32, 96, 128, "channels of the first level"),
    "mults": ([1, 2], [1, 2, 2], [1, 2, 2, 2], "channels of each level, in units of width"),
    "blocks": (1, 2, 2, "residual blocks per level"),
    "attention": ([1], [1], [1], "levels with self-attention; 0 is the finest"),
    "dropout": (0.0, 0.1, 0.1, "in the residual blocks"),
    "predict": ("v", "v", "eps", "what the network outputs"),
    "schedule": ("cosine", "cosine", "linear", "how the noise grows with t"),
    "steps": (1100, 30_000, 800_000, "training steps"),
    "batch_size": (64, 256, 128, "images per step, over all GPUs"),
    "lr": (3e-3, 5e-4, 2e-4, "peak learning rate of Adam: biases, norms, labels, outer layers"),
    "muon_lr": (0.01, 0.01, 0.01, "peak learning rate of Muon: all other matrices"),
    "flip": (0.0, 0.0, 0.5, "share of images mirrored in training; 0 for digits"),
    "every": (500, 2000, 20_000, "steps between checkpoints"),
    "sampler": ("dpm++", "dpm++", "ddpm", "how to step from noise to image"),
    "sample_steps": (20, 25, 1000, "number of sampling steps, at most T"),
    "guidance": (1.75, 1.5, 1.0, "w: larger is more typical and less varied; 1 is off"),
}
CHOICES = {"predict": ["eps", "x0", "v"], "schedule": ["linear", "cosine"],
           "sampler": ["ddpm", "ddim", "dpm++"]}
T = 1000  # noise levels

# ---- 1. Forward process (slides Diffusion models, Noise schedule) --------------------------------


def make_abar(schedule):
    """abar_t for t = 0..T: (T + 1,) float64."""
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    else:  # cosine: Nichol & Dhariwal, Eq. 17
        t = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    # abar_t = prod_{i=1..t} (1 - beta_i)          (the slide prints a sum, which would exceed 1)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


# In the functions below a_t is abar at time t: a number, or (B, 1, 1, 1) with a time per image.


def q_sample(x0, eps, a_t):
    """x_t given x_0, in one step (DDPM Eq. 4)."""
    return a_t**0.5 * x0 + (1 - a_t) ** 0.5 * eps


# ---- 2. What to predict (slide Predicting images instead of noise) -------------------------------


def target_of(x0, eps, a_t, predict):
    """What the network should output: eps, x0, or v (Salimans & Ho 2022), shaped as x0."""
    # Near t = T, x_t says almost all of eps and nothing of x_0; near t = 0, the reverse. v asks at
    # both ends for what x_t does not show.
    v = a_t**0.5 * eps - (1 - a_t) ** 0.5 * x0
    return {"eps": eps, "x0": x0, "v": v}[predict]


def x0_of(out, xt, a_t, predict):
    """The estimate of x_0 that follows from the network's output: the equations above, inverted."""
    if predict == "eps":
        return (xt - (1 - a_t) ** 0.5 * out) / a_t**0.5  # amplifies errors where a_t is almost 0
    if predict == "x0":
        return out
    return a_t**0.5 * xt - (1 - a_t) ** 0.5 * out  # v


# ---- 3. Network (slides Add time dependency, SiLU; DDPM appendix B) ------------------------------


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


class Attention(nn.Module):
    """Self-attention between all positions of a feature map, with one head."""

    def __init__(self, C):
        super().__init__()
        self.norm = group_norm(C)
        self.qkv = nn.Conv2d(C, 3 * C, 1)
        self.out = zero(nn.Conv2d(C, C, 1))

    def forward(self, x):  # (B, C, H, W)
        qkv = self.qkv(self.norm(x)).flatten(2).mT[:, None]  # (B, 1, H W, 3 C); 1 is the head
        q, k, v = qkv.chunk(3, dim=3)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H W, C)
        return x + self.out(h[:, 0].mT.reshape(x.shape))


class ResBlock(nn.Module):
    """Two convolutions and a shortcut; time and class add one value per channel in between."""

    def __init__(self, C_in, C_out, D, dropout, attends):
        super().__init__()
        self.norm1 = group_norm(C_in)
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1)
        self.emb = nn.Linear(D, C_out)
        self.norm2 = group_norm(C_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(C_out, C_out, 3, padding=1))
        self.skip = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()
        self.attention = Attention(C_out) if attends else nn.Identity()

    def forward(self, x, emb):  # (B, C_in, H, W), (B, D)
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """f(x_t, t, y): down to coarse features and back up, with a skip connection for every layer."""

    def __init__(self, C, classes, patch, width, mults, blocks, attention, dropout):
        super().__init__()
        self.patch, self.width = patch, width
        D = 4 * width
        self.time_mlp = nn.Sequential(nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(classes + 1, D)  # the last one means "none"
        self.conv_in = nn.Conv2d(C * patch**2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        ch, skip_channels = width, [width]
        for i, m in enumerate(mults):
            for _ in range(blocks):
                self.down.append(ResBlock(ch, m * width, D, dropout, i in attention))
                ch = m * width
                skip_channels.append(ch)
            if i < len(mults) - 1:
                self.down.append(nn.Conv2d(ch, ch, 3, stride=2, padding=1))
                skip_channels.append(ch)
        self.middle = nn.ModuleList([ResBlock(ch, ch, D, dropout, attends=True),
                                     ResBlock(ch, ch, D, dropout, attends=False)])
        for i, m in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):  # one more: conv_in and each downsampling left a skip too
                C_in = ch + skip_channels.pop()
                self.up.append(ResBlock(C_in, m * width, D, dropout, i in attention))
                ch = m * width
            if i > 0:
                self.up.append(nn.Conv2d(ch, ch, 3, padding=1))
        self.norm_out = group_norm(ch)
        self.conv_out = zero(nn.Conv2d(ch, C * patch**2, 3, padding=1))

    def forward(self, x, t, y):  # (B, C, H, W), (B,), (B,)
        emb = self.time_mlp(time_embedding(t, self.width)) + self.label(y)  # (B, D)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))  # (B, width, H / patch, W / patch)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
            else:  # upsample to the size of the next skip: 4 -> 8, or 4 -> 7
                h = layer(F.interpolate(h, size=skips[-1].shape[2:]))
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch).float()  # (B, C, H, W)


# ---- 4. Loss (slide Training a diffusion model; DDPM Algorithm 1) --------------------------------


def diffusion_loss(model, x0, y, t, eps, abar, predict):
    """Mean squared error of the network's output; every image of the batch has its own t."""
    a_t = abar[t].view(-1, *[1] * (x0.ndim - 1))  # (B, 1, 1, 1)
    out = model(q_sample(x0, eps, a_t), t, y)
    return F.mse_loss(out, target_of(x0, eps, a_t, predict))


# ---- 5. Samplers (slides Converting samples, Sampling from a diffusion model) --------------------
# Each step goes from x_t to x_s, s < t; x_s - x_t is the slide's flow. x0 is now the estimate of
# x_0. With s = t - 1, a_t / a_s is the slide's alpha_t; in longer steps, a product of alphas.


def ddpm_step(xt, x0, a_t, a_s, z):
    """Ancestral (DDPM Eq. 7): the mean of q(x_s | x_t, x_0), and noise z scaled to variance beta.

    The slide writes the same mean with eps. We know that x_0 is in [-1, 1], and can clip it.
    """
    alpha, beta = a_t / a_s, 1 - a_t / a_s
    mean = (a_s**0.5 * beta * x0 + alpha**0.5 * (1 - a_s) * xt) / (1 - a_t)
    return mean + beta**0.5 * z


def ddim_step(xt, x0, a_t, a_s):
    """Deterministic (DDIM Eq. 12): the same noise, at the lower level of s."""
    eps = (xt - a_t**0.5 * x0) / (1 - a_t) ** 0.5
    return a_s**0.5 * x0 + (1 - a_s) ** 0.5 * eps


def dpmpp_step(xt, x0, a_t, a_s, x0_prev, a_prev):
    """DPM-Solver++(2M) (Lu et al. 2022): DDIM, with x_0 extrapolated from the previous estimate.

    Its last line is ddim_step in the form of the paper; lam is half the log signal-to-noise ratio.
    """
    if a_s == 1:  # lam is infinite
        return x0
    lam_t, lam_s = (0.5 * math.log(a / (1 - a)) for a in (a_t, a_s))
    if x0_prev is not None:
        r = (lam_t - 0.5 * math.log(a_prev / (1 - a_prev))) / (lam_s - lam_t)
        x0 = x0 + (x0 - x0_prev) / (2 * r)
    return ((1 - a_s) / (1 - a_t)) ** 0.5 * xt - a_s**0.5 * math.expm1(lam_t - lam_s) * x0


@torch.no_grad()
def sample(model, x, y, args, on_step=None):
    """Turn noise x (B, C, H, W) into images of classes y (B,). args are the flags, see HPARAMS;
    on_step(x_t, x_0), if given, is called with every state and estimate."""
    abar = make_abar(args.schedule).tolist()
    times = [round(T * i / args.sample_steps) for i in range(args.sample_steps, -1, -1)]
    x0_prev, a_prev = None, None
    for t, s in zip(times, times[1:]):
        a_t, a_s = abar[t], abar[s]
        tt = torch.full_like(y, t)
        out = model(x, tt, y)
        if args.guidance != 1:  # go further in the direction in which the class changes the output
            uncond = model(x, tt, torch.full_like(y, args.classes))
            out = uncond + args.guidance * (out - uncond)
        x0 = x0_of(out, x, a_t, args.predict).clamp(-1, 1)
        if on_step:
            on_step(x, x0)
        if args.sampler == "ddpm":  # no noise in the last step (the slide's z > 1 should be t > 1)
            x = ddpm_step(x, x0, a_t, a_s, torch.randn_like(x) if s > 0 else 0)
        elif args.sampler == "ddim":
            x = ddim_step(x, x0, a_t, a_s)
        else:
            x = dpmpp_step(x, x0, a_t, a_s, x0_prev, a_prev)
            x0_prev, a_prev = x0, a_t
    return x


# ---- 6. Training ---------------------------------------------------------------------------------


def build(args):
    model = UNet(args.shape[0], args.classes, args.patch, args.width, args.mults, args.blocks,
                 args.attention, args.dropout).to(args.device)
    # channels last is the layout that tensor cores read; on a CPU it is slower
    return model.to(memory_format=torch.channels_last) if "cuda" in args.device else model


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
    images, labels = (a.to(args.device) for a in load_data(args.data, "train", args.data_dir))
    args.shape = list(images.shape[1:])
    args.classes = int(labels.max()) + 1
    if args.shape[1] % args.patch or args.shape[2] % args.patch:
        die(f"--data {args.data}: height and width must be multiples of --patch {args.patch}")
    torch.manual_seed(args.seed)
    model = build(args)
    ema = copy.deepcopy(model).requires_grad_(False).eval()  # averaged weights: better samples
    opts = optimizers(model, ["label", "conv_in", "conv_out"], args.lr, args.muon_lr, ckpt)
    start = ckpt["step"] if ckpt else 0
    if ckpt:
        model.load_state_dict(ckpt["model"])
        ema.load_state_dict(ckpt["ema"])
    say(f"{args.device}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(images):,} images of {args.data}, {args.steps:,} steps of {args.batch_size}")
    if args.compile:
        model.compile()
    net = DistributedDataParallel(model) if WORLD > 1 else model
    abar = make_abar(args.schedule).float().to(args.device)
    B = args.batch_size
    bar = tqdm(range(start + 1, args.steps + 1), initial=start, total=args.steps, disable=RANK > 0)
    for step in bar:
        # Every step has its own seed: --resume continues exactly, and the processes of torchrun,
        # number RANK of WORLD, draw the same global batch, of which each takes its share.
        torch.manual_seed(args.seed * 10_000_000 + step)
        index = torch.randint(len(images), (B,), device=args.device)
        u = (torch.rand((), device=args.device) + torch.arange(B, device=args.device) / B) % 1
        t = 1 + (u * T).long()  # uniform in 1..T, evenly spread over the batch
        eps = torch.randn(B, *args.shape, device=args.device)
        drop, mirror = torch.rand(2, B, device=args.device)
        index, t, eps, drop, mirror = (a[RANK::WORLD] for a in (index, t, eps, drop, mirror))
        torch.manual_seed(-(args.seed * 10_000_000 + step) * WORLD - RANK)  # dropout: own stream
        x0 = to_float(images[index])
        x0 = torch.where((mirror < args.flip)[:, None, None, None], x0.flip(3), x0)
        y = labels[index].masked_fill(drop < 0.1, args.classes)  # 10 % "none", which guidance needs
        with autocast(args):
            loss = diffusion_loss(net, x0, y, t, eps, abar, args.predict)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min(1, step / 100) * (1 - (step - 1) / args.steps)  # warm up, then to almost 0
        for opt in opts:
            opt.param_groups[0]["lr"] = rate * opt.defaults["lr"]
            opt.step()
            opt.zero_grad()
        ema_update(ema, model, step)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if RANK == 0 and (step % args.every == 0 or step == args.steps):
            save_checkpoint(args, step, model=model.state_dict(), ema=ema.state_dict(),
                            optimizer=[opt.state_dict() for opt in opts])
            save_png(args.out / f"step_{step:06}.png", grid(generate(args, ema, 50)[0], 10))
    return ema


# ---- 7. Sampling from a trained model ------------------------------------------------------------


def generate(args, model, num, on_step=None):
    """num images (N, C, H, W) uint8 and their labels (N,): 0, 1, ..., classes - 1, 0, 1, ..."""
    torch.manual_seed(args.seed)
    labels = torch.arange(num) % args.classes
    noise = torch.randn(num, *args.shape)  # drawn on the CPU: the same for every device
    images = []
    with autocast(args):
        for y, x in zip(labels.split(250), noise.split(250)):
            x = sample(model, x.to(args.device), y.to(args.device), args, on_step)
            images.append(to_uint8(x))
    return torch.cat(images), labels


def save_samples(args, model):
    """samples.npz, samples.png, and trajectory.png: x_t and the estimate of x_0, step by step."""
    start = time.time()
    images, labels = generate(args, model, args.num)
    path = args.save or args.out / "samples.npz"
    np.savez(path, images.permute(0, 2, 3, 1).cpu(), labels=labels)
    save_png(args.out / "samples.png", grid(images[:100], 10))
    say(f"{args.num} samples in {time.time() - start:.1f} s: {path} and {args.out}/samples.png")
    states = []
    generate(args, model, 20, lambda xt, x0: states.append((to_uint8(xt), to_uint8(x0))))
    states = states[::max(1, len(states) // 40)] + states[-1:] * 8  # some, and a pause on the last
    frames = [np.concatenate([grid(xt, 5), grid(x0, 5)], axis=1) for xt, x0 in states]
    save_png(args.out / "trajectory.png", *frames)


# ---- Plumbing: the same in every file; skip it on a first reading --------------------------------

HERE, NAME = Path(__file__).resolve().parent, Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
URLS = {"mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "fashion": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "cifar10": "https://www.cs.toronto.edu/~kriz/"}


def say(message):
    if RANK == 0:
        print(message, flush=True)


def die(message):
    """For mistakes of the user: one line, exit code 2."""
    print(f"{NAME}.py: {message}", file=sys.stderr)
    sys.exit(2)


def data_file(name, file, folder):
    """The content of a gzip file of a data set, downloaded if missing; gzip checks its CRC."""
    path, url = Path(folder) / name / file, URLS[name] + file
    try:
        if not path.exists():
            say(f"downloading {url}")
            path.parent.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(url, f"{path}.{RANK}.part")
            os.replace(f"{path}.{RANK}.part", path)
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as e:
        die(f"{path} is missing or damaged ({e}); get it from {url}")


def load_data(name, split, folder):
    """Images (N, C, H, W) uint8 and labels (N,) int64; split is train or test."""
    if name in ("mnist", "fashion"):
        part = {"train": "train", "test": "t10k"}[split]
        images = data_file(name, f"{part}-images-idx3-ubyte.gz", folder)
        labels = data_file(name, f"{part}-labels-idx1-ubyte.gz", folder)
        images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        labels = np.frombuffer(labels, np.uint8, offset=8)
    elif name == "cifar10":
        tar = tarfile.open(fileobj=io.BytesIO(data_file(name, "cifar-10-binary.tar.gz", folder)))
        files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{f}.bin").read() for f in files)
        records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)  # a label, then three planes
        images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
    else:
        try:
            with np.load(name) as file:
                images = file["images"].astype(np.uint8, casting="safe").transpose(0, 3, 1, 2)
                labels = file.get("labels", np.zeros(len(images), np.uint8))
            if images.shape[1] not in (1, 3):
                raise ValueError(f"{images.shape[1]} channels")
            part = (np.arange(len(images)) % 10 == 9) == (split == "test")  # a tenth for testing
            images, labels = images[part], labels[part]
        except Exception as e:
            die(f"--data {name}: expected {', '.join(URLS)}, or an .npz file with images "
                f"(N, H, W, 1 or 3) uint8 and labels (N,) from 0 ({e})")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


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
    add("--data", default="mnist", help="mnist, fashion, cifar10, or an .npz with images, labels")
    add("--data-dir", type=Path, default=HERE / "data", help="folder of the data sets")
    add("--out", type=Path, default=Path("out") / NAME, help="folder for everything written")
    add("--size", choices=SIZES, default="small", help="preset for the flags below")
    add("--num", type=int, default=100, help="number of samples")
    add("--save", type=Path, help="file for the samples (.npz), default OUT/samples.npz")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, (*values, text) in HPARAMS.items():
        many = isinstance(values[0], list)
        add("--" + name.replace("_", "-"), type=type(values[0][0] if many else values[0]),
            nargs="+" if many else None, choices=CHOICES.get(name), help=f"{text} {tuple(values)}")
    column = SIZES.index(p.parse_known_args(argv)[0].size)
    p.set_defaults(**{name: row[column] for name, row in HPARAMS.items()} | (config or {}))
    return p.parse_args(argv)


def main(argv=None):
    args, ckpt = parse_args(argv), None
    if not (args.train or args.sample):
        return parse_args(["--help"])
    if args.resume or not args.train:
        path = args.out / "model.pt"
        if not path.exists() and not args.resume:
            path = HERE / "pretrained" / f"{NAME}.pt"
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
