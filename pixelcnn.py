"""PixelCNN: an exact density over images, one pixel after another.

    python pixelcnn.py --train                    MNIST, in minutes on a laptop
    python pixelcnn.py --sample                   100 digits from your model, or the pretrained one
    python pixelcnn.py --bpd --complete --score --classify          what a density is good for
    python pixelcnn.py --train --arch plain --num 10 --out out/plain    the slide's convolutions

The chain rule turns p(image) into one prediction per pixel: which value comes next, given all
pixels before it? In training, one pass of a convolutional network makes all of these at once.

Slides     Basics, Discriminative vs. Generative, Generative Models, Recall: Bayes' Rule,
           Autoregressive Models, Autoregressive Distribution Estimation, Sampling, Inference,
           Learning - CNN, Learning - CNN Receptive Field, Results
Equations  density     p(x | y) = prod_i p(x_i | x_1, ..., x_{i-1}, y),   i in reading order
           pixel       p(x_i = k | ...) = softmax over K levels: the exact distribution
           loss        -log2 p(x | y) / (C H W), in bits/dim
           Bayes       p(y | x) = p(x | y) p(y) / p(x),   p(x) = sum_y p(x | y) p(y)
           guidance    logits = uncond + w (cond - uncond)
Notation   x (B, C, H, W) levels 0..K-1; y (B,) class in 0..classes-1, and one more, `classes`, for
           "none"; e (B, H, W, E) embedded levels; v, h (B, H, W, D) features of the vertical stack
           (the rows above) and of the horizontal stack (the pixels to the left)
Papers     van den Oord et al. 2016a (PixelRNN, PixelCNN); van den Oord et al. 2016b (Gated
           PixelCNN); Ramachandran et al. 2017 (cached sampling); Ho & Salimans 2022 (guidance);
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

SIZES = ("small", "base")
HPARAMS = {  # each row is a flag; --size picks the column
    "arch": ("gated", "gated", "gated: two stacks; plain: the slide's masked convolutions"),
    "levels": (256, 256, "K: grey levels, or values per colour channel"),
    "width": (32, 96, "D: channels"),
    "dilations": ([1, 2, 4, 1, 2, 4, 1], [1, 2, 4, 1, 2, 4, 1, 2, 4, 1], "one block for each"),
    "hidden": (64, 256, "channels before the logits"),
    "steps": (3800, 60_000, "training steps"),
    "batch_size": (8, 128, "images per step, over all GPUs"),
    "lr": (6e-3, 1e-3, "peak learning rate of Adam: biases, tables, logits"),
    "muon_lr": (0.015, 0.01, "peak learning rate of Muon: all other matrices"),
    "every": (500, 2000, "steps between checkpoints"),
    "guidance": (1.5, 1.5, "w: larger is more typical and less varied; 1 is off"),
}
CHOICES = {"arch": ["gated", "plain"]}

# ---- 1. Levels (slide Autoregressive Distribution Estimation) ------------------------------------


def to_levels(images, K):
    """uint8 0..255 -> the nearest of K levels 0..K-1, int64."""
    return (images.float() * ((K - 1) / 255)).round().long()


def from_levels(x, K):
    """Levels 0..K-1 -> uint8."""
    return (x.float() * (255 / (K - 1))).round().to(torch.uint8)


# ---- 2. Masked convolutions (slide Learning - CNN) -----------------------------------------------


class MaskedConv(nn.Conv2d):
    """The slide's 5 x 5 convolution. Mask A, of the first layer, also hides the pixel itself.

        A  1 1 1 1 1     B  1 1 1 1 1
           1 1 1 1 1        1 1 1 1 1
           1 1 0 0 0        1 1 1 0 0
           0 0 0 0 0        0 0 0 0 0
           0 0 0 0 0        0 0 0 0 0
    """

    def __init__(self, mask, C_in, C_out):
        super().__init__(C_in, C_out, 5, padding=2)
        seen = 12 if mask == "A" else 13  # of the 25 weights, in reading order
        keep = (torch.arange(25).view(5, 5) < seen).float()
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, x):  # (B, C_in, H, W)
        # masked at every use: weights that the optimiser has moved cannot leak
        return F.conv2d(x, self.weight * self.keep, self.bias, padding=2)


def convolve(conv, v):
    """conv of v (B, H, W, D): features come last in this file, and first in nn.Conv2d."""
    return conv(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# ---- 3. Two stacks instead of masks (van den Oord et al. 2016b) ----------------------------------
#
# However many masked layers, a pixel never sees a wedge above and to its right: the blind spot
# (--receptive-field draws it). Two stacks have none. Instead of masks, they shift and pad.


def below(v, d):
    """v (B, H, W, D) below d rows of zeros."""
    return F.pad(v, (0, 0, 0, 0, d, 0))


def left(h, d):
    """h (B, H, W, D) shifted right by d columns: every pixel reads the pixel d to its left."""
    return F.pad(h, (0, 0, d, 0))[:, :, :h.shape[2]]


class Block(nn.Module):
    """A gated block: v takes in the rows above; h takes in the pixels to the left, and v.

    There is no blind spot within the reach of 3 + the sum of all dilations, provided that they
    leave no gap: in ascending order, each is at most 3 + the sum of those before it.
    """

    def __init__(self, D, classes, dilation):
        super().__init__()
        self.conv = nn.Conv2d(D, 2 * D, (2, 3), dilation=dilation, padding=(0, dilation))
        self.across = nn.Linear(3 * D, 2 * D)
        self.out = nn.Linear(D, D)
        self.label = nn.Embedding(classes + 1, 4 * D)  # the last one means "none"
        nn.init.normal_(self.label.weight, std=0.05)
        self.dilation = dilation

    def vertical(self, v, label):
        """The update (B, H, W, D) of v, from v and the `dilation` rows above it. The gate is
        a * sigmoid(b); the paper has tanh(a) * sigmoid(b)."""
        return F.glu(convolve(self.conv, v) + label, dim=-1)

    def horizontal(self, h, h_left, update, label):
        """The new h, from h, from h `dilation` pixels to the left, and from the update of v."""
        gated = F.glu(self.across(torch.cat([h, h_left, update], dim=-1)) + label, dim=-1)
        return h + self.out(gated)

    def forward(self, v, h, y):  # (B, H, W, D), (B, H, W, D), (B,)
        label_v, label_h = self.label(y)[:, None, None].chunk(2, dim=-1)  # (B, 1, 1, 2 D)
        update = self.vertical(below(v, self.dilation), label_v)
        return v + update, self.horizontal(h, left(h, self.dilation), update, label_h)


# ---- 4. The networks -----------------------------------------------------------------------------


class PixelCNN(nn.Module):
    """What both networks share: embedded levels, biases, and the output layers. A subclass defines
    trunk(e, y): features (B, H, W, D) of every pixel, from the pixels before it."""

    def __init__(self, shape, K, classes, D, hidden):
        super().__init__()
        C, H, W = shape
        self.classes = classes
        self.embeddings = nn.ModuleList(nn.Embedding(K, 16) for _ in range(C))
        # A bias for every position, since digits are centred, and one for every class and 4 x 4
        # pixels (2016b computes it by a network of the class), which conveys the class better than
        # Block.label alone. They are added to v and h after the first layer, and to h before the
        # output layers. Finer class biases overfit, and guidance turns their noise into specks.
        self.position = nn.Parameter(torch.zeros(3, H, W, D))
        self.class_bias = nn.Parameter(torch.zeros(classes + 1, 3 * D, -(-H // 4), -(-W // 4)))
        self.hidden = nn.Linear(D, hidden)
        self.earlier = nn.ModuleList(nn.Embedding(K, hidden) for _ in range(C - 1))
        self.logits = nn.ModuleList(nn.Linear(hidden, K) for _ in range(C))

    def embed(self, x):
        """Levels (B, C, H, W) -> (B, H, W, 16 C)."""
        return torch.cat([table(x[:, c]) for c, table in enumerate(self.embeddings)], dim=-1)

    def biases(self, y):
        """Three biases (B, H, W, D), for classes y (B,)."""
        _, H, W, D = self.position.shape
        fine = F.interpolate(self.class_bias, (H, W), mode="bilinear")  # (classes + 1, 3 D, H, W)
        fine = F.embedding(y, fine.permute(0, 2, 3, 1).flatten(1)).view(-1, H, W, 3, D)
        return (self.position.permute(1, 2, 0, 3) + fine).unbind(3)

    def head(self, h, x, c):
        """Logits (B, ..., K) of channel c, from h (B, ..., D) and levels x (B, C, ...). G also
        depends on the pixel's own R, and B on R and G."""
        z = self.hidden(F.relu(h))
        for earlier in range(c):
            z = z + self.earlier[earlier](x[:, earlier])
        return self.logits[c](F.relu(z))

    def forward(self, x, y):
        """Logits (B, C, H, W, K) of every pixel, given the pixels before it and y (B,)."""
        h = self.trunk(self.embed(x), y)  # (B, H, W, D)
        return torch.stack([self.head(h, x, c) for c in range(x.shape[1])], dim=1)


class Gated(PixelCNN):
    """Gated PixelCNN: two stacks of gated blocks."""

    def __init__(self, shape, K, classes, D, dilations, hidden):
        super().__init__(shape, K, classes, D, hidden)
        E = 16 * shape[0]
        self.conv = nn.Conv2d(E, D, (3, 7), padding=(0, 3))  # of the 3 rows above
        self.across = nn.Linear(3 * E + D, D)  # of the 3 pixels to the left, and v
        self.blocks = nn.ModuleList(Block(D, classes, d) for d in dilations)

    def trunk(self, e, y):
        bias_v, bias_h, bias_out = self.biases(y)
        # Row i of v knows only the image rows above i. Later layers may therefore read v's row i.
        v = convolve(self.conv, below(e, 3)[:, :-1])
        h = self.across(torch.cat([left(e, 1), left(e, 2), left(e, 3), v], dim=-1)) + bias_h
        v = v + bias_v
        for block in self.blocks:
            v, h = block(v, h, y)
        return h + bias_out


class Plain(PixelCNN):
    """The slide's network: mask A in the first layer, mask B in all others."""

    def __init__(self, shape, K, classes, D, dilations, hidden):
        super().__init__(shape, K, classes, D, hidden)
        self.first = MaskedConv("A", 16 * shape[0], D)
        self.blocks = nn.ModuleList(MaskedConv("B", D, D) for _ in dilations)

    def trunk(self, e, y):
        _, bias_h, bias_out = self.biases(y)
        h = convolve(self.first, e) + bias_h
        for conv in self.blocks:
            h = h + F.relu(convolve(conv, F.relu(h)))
        return h + bias_out


def build(args):
    kind = Gated if args.arch == "gated" else Plain
    model = kind(args.shape, args.levels, args.classes, args.width, args.dilations, args.hidden)
    return model.to(args.device)


# ---- 5. Likelihood (slides Inference, Autoregressive Models) -------------------------------------


def log_prob(model, x, y):
    """log p(x | y) in nats (B,), of levels x (B, C, H, W) and classes y (B,)."""
    logits = model(x, y).float()
    nats = F.cross_entropy(logits.flatten(0, 3), x.flatten(), reduction="none")
    return -nats.view(len(x), -1).sum(1)


@torch.no_grad()
def log_probs(model, x, y):
    """log_prob in batches, without autocast, for any number of images; returned in float64."""
    batches = zip(x.split(25), y.split(25))
    return torch.cat([log_prob(model, a, b).cpu().double() for a, b in batches])


def to_bits(log_p, shape):
    """log p(x) in nats -> -log2 p(x) / (C H W), in bits/dim."""
    return -log_p / (math.prod(shape) * math.log(2))


# ---- 6. Sampling (slide Sampling) ----------------------------------------------------------------
# Both samplers draw levels into x (B, C, H, W) where it is -1, and keep the others. y (B,) are the
# classes, u (B, C, H, W) uniform random numbers in [0, 1). The networks run on a doubled batch: its
# first half has the classes y, its second half "none", for guidance.


def draw(logits, u):
    """Values (B,) from logits (B, K): where u (B,) falls in the cumulative distribution."""
    p = logits.float().softmax(1).cumsum(1)
    return torch.searchsorted(p, u[:, None] * p[:, -1:], right=True)[:, 0]


def draw_pixel(model, h, x, u, i, j, guidance):
    """Draw the channels of pixel (i, j) into x, from its features h (2 B, D)."""
    for c in range(x.shape[1]):
        cond, uncond = model.head(h, x[:, :, i, j].repeat(2, 1), c).chunk(2)  # (B, K) each
        level = draw(uncond + guidance * (cond - uncond), u[:, c, i, j])
        x[:, c, i, j] = torch.where(x[:, c, i, j] < 0, level, x[:, c, i, j])


@torch.no_grad()
def sample_naive(model, x, y, u, guidance=1.0):
    """The slide's loop: the whole network, again for every pixel."""
    x, y = x.clone(), torch.cat([y, torch.full_like(y, model.classes)])
    for i in tqdm(range(x.shape[2]), "rows", leave=False):
        for j in range(x.shape[3]):
            e = model.embed(x.clamp(min=0).repeat(2, 1, 1, 1))
            h = model.trunk(e, y)[:, i, j]
            draw_pixel(model, h, x, u, i, j, guidance)
    return x


@torch.no_grad()
def sample(model, x, y, u, guidance=1.0):
    """The same pixels from a Gated model, some 200 times faster: v is computed once per row and h
    once per pixel, both from cached features of earlier rows and pixels."""
    x, y = x.clone(), torch.cat([y, torch.full_like(y, model.classes)])
    bias_v, bias_h, bias_out = model.biases(y)
    B, H, W, D = bias_v.shape  # B of the doubled batch
    zeros = bias_v.new_zeros
    labels = [block.label(y)[:, None, None].chunk(2, dim=-1) for block in model.blocks]
    e = zeros(B, H + 3, W + 3, 16 * x.shape[1])  # 3 rows above the image, 3 columns to its left
    v_caches = [zeros(B, block.dilation + H, W, D) for block in model.blocks]
    for i in range(H):
        v_first = convolve(model.conv, e[:, i:i + 3, 3:])  # (B, 1, W, D), of the 3 rows above
        v = v_first + bias_v[:, i:i + 1]
        updates = []
        for block, cache, (label_v, _) in zip(model.blocks, v_caches, labels):
            cache[:, block.dilation + i] = v[:, 0]
            updates.append(block.vertical(cache[:, i:i + block.dilation + 1], label_v))
            v = v + updates[-1]
        h_caches = [zeros(B, block.dilation + W, D) for block in model.blocks]
        for j in range(W):
            near = [e[:, i + 3, j + 3 - d] for d in (1, 2, 3)]
            h = model.across(torch.cat([*near, v_first[:, 0, j]], dim=-1)) + bias_h[:, i, j]
            for block, cache, update, (_, label_h) in zip(model.blocks, h_caches, updates, labels):
                cache[:, block.dilation + j] = h
                h = block.horizontal(h, cache[:, j], update[:, 0, j], label_h[:, 0, 0])
            draw_pixel(model, h + bias_out[:, i, j], x, u, i, j, guidance)
            e[:, i + 3, j + 3] = model.embed(x[:, :, i, j].repeat(2, 1))
    return x


def generate(args, model, y, x=None):
    """Images (N, C, H, W) uint8 of classes y (N,). x: levels to keep, -1 elsewhere."""
    x = torch.full((len(y), *args.shape), -1) if x is None else x
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(args.seed))  # on the CPU
    sampler = sample if args.arch == "gated" else sample_naive
    batches = zip(*(a.to(args.device).split(200) for a in (x, y, u)))
    return from_levels(torch.cat([sampler(model, *b, args.guidance) for b in batches]), args.levels)


# ---- 7. Training (slide Autoregressive Models: "maximizing likelihood of training data") ---------


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
    test = held_out(args, 500)
    torch.manual_seed(args.seed)
    model = build(args)
    with torch.no_grad():  # start from the histogram of levels
        for c, layer in enumerate(model.logits):
            levels = to_levels(images[:1000, c], args.levels).flatten()
            count = torch.bincount(levels, minlength=args.levels) + 1
            layer.bias.copy_((count / count.sum()).log())
            layer.weight.zero_()
    ema = copy.deepcopy(model).requires_grad_(False).eval()  # averaged weights: better samples
    outside = ["embeddings", "position", "class_bias", "label", "earlier", "logits"]
    opts = optimizers(model, outside, args.lr, args.muon_lr, ckpt)
    start = ckpt["step"] if ckpt else 0
    if ckpt:
        model.load_state_dict(ckpt["model"])
        ema.load_state_dict(ckpt["ema"])
    say(f"{args.device}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(images):,} images of {args.data}, {args.steps:,} steps of {args.batch_size}")
    if args.compile:
        model.compile()
    net = DistributedDataParallel(model) if WORLD > 1 else model
    bar = tqdm(range(start + 1, args.steps + 1), initial=start, total=args.steps, disable=RANK > 0)
    for step in bar:
        # Every step has its own seed: --resume continues exactly, and the processes of torchrun,
        # number RANK of WORLD, draw the same global batch, of which each takes its share.
        torch.manual_seed(args.seed * 10_000_000 + step)
        index = torch.randint(len(images), (args.batch_size,), device=args.device)[RANK::WORLD]
        drop = torch.rand(args.batch_size, device=args.device)[RANK::WORLD]
        x = to_levels(images[index], args.levels)
        y = labels[index].masked_fill(drop < 0.1, args.classes)  # 10 % "none", which guidance needs
        with autocast(args):
            loss = to_bits(log_prob(net, x, y).mean(), args.shape)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min(1, step / 100) * (1 - (step - 1) / args.steps)  # warm up, then to almost 0
        for opt in opts:
            opt.param_groups[0]["lr"] = rate * opt.defaults["lr"]
            opt.step()
            opt.zero_grad()
        ema_update(ema, model, step)
        if step % 20 == 0:
            bar.set_postfix_str(f"{loss.item():.3f} bits/dim")
        if RANK == 0 and (step % args.every == 0 or step == args.steps):
            save_checkpoint(args, step, model=model.state_dict(), ema=ema.state_dict(),
                            optimizer=[opt.state_dict() for opt in opts])
            bits = to_bits(log_probs(ema, *test).mean(), args.shape)
            tqdm.write(f"step {step:,}: {bits:.4f} bits/dim of {len(test[0])} held-out images")
            if args.arch == "gated":  # the slide's loop would take minutes
                picture = grid(generate(args, ema, torch.arange(20) % args.classes), 10)
                save_picture(args.out / f"step_{step:06}.png", picture)
    return ema


# ---- 8. Using a trained model (slides Results, Generative Models, Recall: Bayes' Rule) -----------


def held_out(args, num=None):
    """Levels (N, C, H, W) and classes (N,) of the first num test images, on the device. A class
    that the training images lack is "none"."""
    images, labels = load_data(args.data, "test", args.data_dir)
    if list(images.shape[1:]) != args.shape:
        die(f"--data {args.data}: shape {list(images.shape[1:])}, but the model has {args.shape}")
    x, y = to_levels(images[:num], args.levels), labels[:num].clamp(max=args.classes)
    return x.to(args.device), y.to(args.device)


def save_samples(args, model):
    """Draw --num samples: samples.npz and samples.png."""
    start = time.time()
    labels = torch.arange(args.num) % args.classes
    images = generate(args, model, labels)
    path = args.save or args.out / "samples.npz"
    np.savez(path, images.permute(0, 2, 3, 1).cpu(), labels=labels)
    save_picture(args.out / "samples.png", grid(images[:100], 10))
    say(f"{args.num} samples in {time.time() - start:.1f} s: {path} and {args.out}/samples.png")


def complete(args, model):
    """Complete test images: complete.png.

    Columns: the image, the given pixels, four completions with the class and guidance, and four
    without. A pixel is drawn given only the pixels before it: of a lower half this is p(rest |
    given); of a right half or a box, given pixels to the right or below cannot help."""
    x, y = held_out(args, 9)
    _, H, W = args.shape
    given = x.clone()
    given[:3, :, H // 2:] = -1
    given[3:6, :, :, W // 2:] = -1
    given[6:, :, H // 4:3 * H // 4, W // 4:3 * W // 4] = -1
    classes = torch.stack([y] * 4 + [torch.full_like(y, args.classes)] * 4, dim=1)  # (9, 8)
    drawn = generate(args, model, classes.flatten(), given.repeat_interleave(8, dim=0))
    seen = torch.where(given < 0, 128, from_levels(given, args.levels))
    columns = [from_levels(x, args.levels), seen, *drawn.view(-1, 8, *args.shape).unbind(1)]
    save_picture(args.out / "complete.png", grid(torch.stack(columns, dim=1).flatten(0, 1), 10))


def bpd(args, model):
    """Bits/dim of the test set, given the class."""
    log_p = log_probs(model, *held_out(args)).mean()
    say(f"test set: {to_bits(log_p, args.shape):.4f} bits/dim given the class, {-log_p:.1f} nats "
        f"(uniform: {math.log2(args.levels):g} bits/dim)")


def log_joint(args, model, x):
    """log p(x, y) of levels x (N, C, H, W) and all classes, assumed equally likely: (N, classes),
    float64. Its logsumexp is log p(x), its softmax p(y | x)."""
    given = [log_probs(model, x, torch.full_like(x[:, 0, 0, 0], y)) for y in range(args.classes)]
    return torch.stack(given, dim=1) - math.log(args.classes)


def classify(args, model):
    """Classify test images by Bayes' rule."""
    x, y = held_out(args, 1000)
    joint = log_joint(args, model, x)
    correct = (joint.argmax(1) == y.cpu()).double().mean()
    given = to_bits(log_probs(model, x, y).mean(), args.shape)
    without = to_bits(joint.logsumexp(1).mean(), args.shape)
    say(f"of the first {len(x):,} test images, {correct:.3f} are classified correctly by p(y | x); "
        f"bits/dim given the class {given:.4f}, without {without:.4f}")


def score(args, model):
    """How likely are digits, noise, a black image? Simple images score high, digit or not."""
    x, _ = held_out(args, 200)
    torch.manual_seed(args.seed)
    order = torch.randperm(x[0].numel())
    sets = {"test images": x, "upside down": x.flip(2),
            "shuffled pixels": x.flatten(1)[:, order].view(x.shape),
            "noise": torch.randint_like(x[:20], args.levels), "black": torch.zeros_like(x[:1]),
            "grey": torch.full_like(x[:1], args.levels // 2)}
    for name, images in sets.items():
        bits = to_bits(log_joint(args, model, images).logsumexp(1), args.shape)
        say(f"{name:16}{bits.mean():8.3f} bits/dim, {bits.min():.3f} to {bits.max():.3f}")


def field_of(model, i, j):
    """The pixels that the features of pixel (i, j) depend on, by gradients: (H, W) bool."""
    _, H, W, _ = model.position.shape
    e = torch.randn(4, H, W, 16, dtype=torch.double, requires_grad=True)
    model.double().trunk(e, torch.zeros(4, dtype=torch.long))[:, i, j].square().sum().backward()
    return e.grad.abs().sum((0, 3)) > 0


def receptive_field(args, model):
    """Draw what a pixel (grey) sees (white), block by block: gated above, plain below."""
    columns = len(args.dilations) + 1
    fields = [field_of(network([1, 28, 28], 2, 0, 8, args.dilations[:n], 8), 14, 14)
              for network in (Gated, Plain) for n in range(columns)]
    picture = 255 * torch.stack(fields)[:, None].to(torch.uint8)
    picture[..., 14, 14] = 128
    save_picture(args.out / "receptive_field.png", grid(picture, columns))


VERBS = {"bpd": bpd, "sample": save_samples, "complete": complete, "classify": classify,
         "score": score, "receptive_field": receptive_field}


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


def grid(images, cols, zoom=3):
    """Images (N, C, H, W) uint8 as one picture (H', W', 3), row by row."""
    x = images.cpu().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    x = x.repeat(zoom, 1).repeat(zoom, 2)
    x = np.pad(x, ((0, -len(x) % cols), (1, 1), (1, 1), (0, 0)), constant_values=64)
    N, H, W, _ = x.shape
    return x.reshape(N // cols, cols, H, W, 3).swapaxes(1, 2).reshape(N // cols * H, cols * W, 3)


def save_picture(path, picture):
    """Write a picture (H, W, 3) uint8 as a PNG file."""
    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    H, W, _ = picture.shape
    rows = np.pad(picture.reshape(H, W * 3), ((0, 0), (1, 0)))  # each behind a 0: no filter
    Path(path).write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", W, H, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b""))


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
    add("--train", action="store_true", help="train, then --bpd and --sample")
    for name, verb in VERBS.items():
        add("--" + name.replace("_", "-"), action="store_true", help=verb.__doc__.splitlines()[0])
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
    verbs = [verb for name, verb in VERBS.items()
             if getattr(args, name) or args.train and name in ("bpd", "sample")]
    if not verbs:
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
        try:
            model.load_state_dict(ckpt["ema"])
        except RuntimeError:
            die(f"{path} has another network: leave out the flags that shape it (--arch, --width)")
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0:
        for verb in verbs:
            verb(args, model)


if __name__ == "__main__":
    main()
