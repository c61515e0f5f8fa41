"""An explicit density over images, exactly: PixelCNN, pixel after pixel.

The chain rule turns p(image) into one small question per pixel: which value comes next, given all
pixels before it? A network with masked convolutions answers all questions at once in training.

Slides     Basics: Generative Models, Discriminative vs. Generative, Recall: Bayes' Rule,
           Autoregressive Models, Autoregressive Distribution Estimation, Sampling, Inference,
           Learning - CNN, Learning - CNN Receptive Field, Results
Equations  density     p(x) = prod_i p(x_i | x_1, ..., x_{i-1}),  i in reading order, R G B within
           pixel       p(x_i = k | ...) = softmax over K levels: the exact distribution
           learning    minimise - log p(x | y), in bits/dim = nats/(C H W ln 2)
           Bayes       p(y | x) = p(x | y) p(y)/sum_y' p(x | y') p(y'),  p(x) = that sum
           guidance    logits = none + w (cond - none),  with the class and with none
Notation   x        x       (B, C, H, W)     levels 0..K-1, whole numbers
           y        y       (B,)             class, for p(x | y); `classes` for none
                    e       (B, H, W, C E)   each level as a learned vector of E numbers
           v, h     v, h    (B, H, W, D)     vertical stack: rows above; horizontal: and to the left
           logits   out     (B, C, H, W, K)  what the softmax takes; or the mixture's parameters
Run        python pixelcnn.py --train                           digits, 256 levels
           python pixelcnn.py --sample --num 100 --save x.npz   from your model, or the one enclosed
           python pixelcnn.py --bpd --complete --score --classify    what a density is good for
           python pixelcnn.py --train --arch plain --out out/plain   the slide's convolutions
Expect     digits, 256 levels, 7 minutes on 2 CPU cores: 0.873 bits/dim on the test set (a histogram
           for each pixel: 1.69); fid.py reads 97 of 100 samples as the class asked for. The
           enclosed model, --steps 12000, 20 minutes: 0.852 bits/dim, 98 of 100; as a classifier,
           by Bayes' rule, it reads 94 of 100 test digits.
           GPU: runs, not timed. In out/pixelcnn/: model.pt, samples (.png, .npz),
           trajectory (an animation), loss (.png, .csv), step_000500.png and so on; and by verb
           complete, score, classify, receptive_field (.png).
Left out   up- and downsampling inside the network, attention (PixelSNAIL), dropout, ensembles
Try        1. --levels 2: black and white digits. Their nats are not the literature's 80, whose
              digits were drawn black or white by chance; which is the harder task?
           2. --arch plain against gated at equal time: what do blind spot and missing gate cost?
           3. --sample --temperature 0.8, 1, 1.2: what is gained, what is lost?
Papers     van den Oord et al. 2016a, Pixel Recurrent Neural Networks; van den Oord et al. 2016b,
           Conditional Image Generation with PixelCNN Decoders; Salimans et al. 2017, PixelCNN++;
           Ramachandran et al. 2017, Fast Generation for Convolutional Autoregressive Models; Ho
           & Salimans 2022, Classifier-Free Diffusion Guidance
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

SIZES = {  # one dial, --size, sets all of these; a flag given by hand wins
    "small": dict(  # a laptop
        width=32, dilations=[1, 2, 4, 1, 2, 4, 1], hidden=64, steps=3600, batch_size=16, lr=6e-3,
        warmup=50, beta2=0.95, ema=0.99, guidance=1.5, num=100, every=500),
    "base": dict(  # a GPU: MNIST with 256 levels
        width=96, dilations=[1, 2, 4, 1, 2, 4, 1, 2, 4, 1], hidden=256, steps=60_000,
        batch_size=128, lr=1e-3, warmup=500, beta2=0.95, ema=0.9995, guidance=1.5, num=100,
        every=2000),
    "paper": dict(  # towards Gated PixelCNN on CIFAR-10, 3.03 bits/dim
        width=128, dilations=[1] * 15, hidden=1024, steps=200_000, batch_size=128, lr=4e-4,
        warmup=1000, beta2=0.95, ema=0.9998, guidance=1.0, num=100,
        every=10_000),
}
CONFIG = [*SIZES["small"], "size", "data", "seed", "arch", "likelihood", "levels", "mixtures",
          "flip", "unconditional", "temperature", "shape", "classes"]  # what a checkpoint keeps


def parse_args(argv=None, config=None):
    """Every knob. config, from a checkpoint, replaces the defaults; a flag given by hand wins.
    (HERE, NAME, die, positive, share and pick_device are plumbing, at the end of the file.)"""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.error = die
    add = p.add_argument
    # what to do
    add("--train", action="store_true", help="train, then write samples and a checkpoint")
    add("--sample", action="store_true", help="draw from OUT/model.pt, or else pretrained/")
    add("--bpd", action="store_true", help="bits/dim and nats of the whole test set")
    add("--complete", action="store_true", help="fill in occluded test images, several times")
    add("--score", action="store_true", help="how likely are digits, other images, noise?")
    add("--classify", action="store_true", help="p(y | x) of test images by Bayes' rule")
    add("--receptive-field", action="store_true", help="what a pixel sees, layer by layer")
    add("--export", type=Path, metavar="PT", help="write the averaged weights alone, as fp16")
    # where, and on what
    add("--data", default="mnist", help="mnist, fashion, cifar10, or a .npy/.npz file of your own")
    add("--data-dir", type=Path, default=HERE / "data", help="where data sets lie or are put")
    add("--out", type=Path, default=Path("out") / NAME, help="everything written goes there")
    add("--size", choices=["small", "base", "paper"],
        help="preset for all flags of network and training; small on a CPU, else base")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    add("--seed", type=int, default=0, help="start of all random numbers")
    add("--compile", action="store_true", help="torch.compile the training: slow start, then fast")
    add("--resume", action="store_true", help="go on from OUT/model.pt")
    add("--every", type=positive, help="checkpoint and picture every so many steps")
    # the network
    add("--arch", choices=["gated", "plain"], default="gated",
        help="two stacks without a blind spot, or the slide's masked 5 x 5 convolutions")
    add("--likelihood", choices=["softmax", "logistic"], default="softmax",
        help="of a pixel: a softmax over levels, or a mixture of logistics cut into levels")
    add("--levels", type=positive, default=256, metavar="K", help="grey levels, 2 to 256")
    add("--mixtures", type=positive, default=5, help="logistics in a mixture")
    add("--width", type=positive, help="channels D; cost grows with its square")
    add("--dilations", type=positive, nargs="+", help="one block each; how far apart its "
        "taps lie (--arch plain: only how many blocks)")
    add("--hidden", type=positive, help="units between the last block and the logits")
    add("--unconditional", action="store_true", help="ignore the labels")
    # training
    add("--steps", type=positive, help="training length")
    add("--batch-size", type=positive, help="images per step, over all GPUs")
    add("--lr", type=share, help="peak learning rate of AdamW, falling linearly to zero")
    add("--warmup", type=positive, help="steps until the peak is reached")
    add("--beta2", type=share, help="AdamW's memory of squared gradients; short for short runs")
    add("--ema", type=share, help="decay of the running mean of the weights, which is what samples")
    add("--flip", action="store_true", help="mirror half of the images (never digits)")
    # sampling
    add("--num", type=positive, help="how many samples")
    add("--save", type=Path, help="where their .npz goes, by default OUT/samples.npz")
    add("--guidance", type=float, metavar="W", help="uncond + W (cond - uncond), of logits: a "
        "larger W gives more typical and less varied samples; 1 is p(x | y)")
    add("--temperature", type=float, default=1.0, help="of the softmax; below 1 more typical")
    add("--naive", action="store_true", help="sample without caches, the whole network per pixel")
    p.set_defaults(**(config or {}))
    args = p.parse_args(argv)
    args.size = args.size or ("small" if pick_device(args.device) == "cpu" else "base")
    for key, value in SIZES[args.size].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for wrong, message in (
            (not 0 <= args.seed < 2**63, f"--seed {args.seed}: expected 0 or more, below 2^63"),
            (not 2 <= args.levels <= 256, f"--levels {args.levels}: expected 2 to 256"),
            (not args.temperature > 0, f"--temperature {args.temperature}: expected more than 0"),
            (args.beta2 == 1, "--beta2 1: expected less than 1")):
        if wrong:
            die(message)
    return args


# ---- 1. Levels, and the distribution of one pixel (slide Autoregressive Distribution Estimation) -


def to_levels(images, K):
    """uint8 0..255 -> the nearest of K levels from black to white, 0..K-1, int64."""
    return (images.float() * ((K - 1) / 255)).round().long()


def from_levels(x, K):
    """Levels 0..K-1 -> uint8."""
    return (x.float() * (255 / (K - 1))).round().to(torch.uint8)


def log_softmax_pixel(out, x):
    """log p(x_i | before) in nats (B, C, H, W), of logits out (B, C, H, W, K), levels x."""
    return -F.cross_entropy(out.float().flatten(0, 3), x.flatten(), reduction="none").view(x.shape)


def log_logistic_pixel(out, x, K):
    """The same for a mixture of M logistics, cut into K bins of width 2/(K-1) around the levels in
    [-1, 1], the outer bins open (Salimans et al. 2017). out (B, C, H, W, 3 M or more): weights (of
    channel 0, shared), means, log scales, and how strongly earlier channels shift the mean. All of
    a pixel's channels at once: (B, 1, H, W)."""
    B, C, H, W = x.shape
    f = x.float() * (2 / (K - 1)) - 1  # (B, C, H, W)
    weight, mean, scale, *shifts = out.float().chunk(2 + C, -1)  # (B, C, H, W, M) each
    total = F.log_softmax(weight[:, 0], -1)  # (B, H, W, M)
    for c in range(C):
        m = mean[:, c]
        for before in range(c):
            m = m + shifts[before][:, c].tanh() * f[:, before, ..., None]
        total = total + log_bin(f[:, c, ..., None], m, scale[:, c], K)
    return total.logsumexp(-1)[:, None]


def log_bin(f, mean, log_scale, K):
    """log of a logistic's mass between the edges of the bin around f, without cancellation:
    sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a))."""
    inverse = torch.exp(-log_scale.clamp(min=-7))
    a, b = inverse * (f - mean + 1 / (K - 1)), inverse * (f - mean - 1 / (K - 1))
    lowest, highest = f < -1 + 1 / K, f > 1 - 1 / K
    both = torch.log(-torch.expm1(-inverse * (2 / (K - 1))))
    return (torch.where(highest, 0.0, F.logsigmoid(a)) + torch.where(lowest, 0.0, F.logsigmoid(-b))
            + torch.where(lowest | highest, 0.0, both))


# ---- 2. Masked convolutions (slide Learning - CNN) -----------------------------------------------


class MaskedConv(nn.Conv2d):
    """The slide's 5 x 5 convolution: weights of pixels that come later are masked; mask A hides the
    pixel itself too, mask B does not.

        A  1 1 1 1 1     B  1 1 1 1 1
           1 1 1 1 1        1 1 1 1 1
           1 1 0 0 0        1 1 1 0 0
           0 0 0 0 0        0 0 0 0 0
           0 0 0 0 0        0 0 0 0 0
    """

    def __init__(self, mask, c_in, c_out):
        super().__init__(c_in, c_out, 5, padding=2)
        keep = torch.zeros(5, 5)
        keep[:2], keep[2, :2 if mask == "A" else 3] = 1, 1
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, x):
        # the mask is applied at use: weights that an optimiser moved cannot leak
        return F.conv2d(x, self.weight * self.keep, self.bias, padding=2)


class Above(nn.Module):
    """Vertical convolution of v (B, H, W, D): `rows` rows, the last of them the pixel's own, or, in
    the first layer, the one above; `size` columns around it."""

    def __init__(self, d_in, d_out, rows, size, dilation=1, first=False):
        super().__init__()
        self.conv = nn.Conv2d(d_in, d_out, (rows, size), dilation=dilation)
        self.top, self.side = dilation * (rows - 1) + first, dilation * (size // 2)
        self.first = first

    def forward(self, v):
        x = F.pad(v.permute(0, 3, 1, 2), (self.side, self.side, self.top, 0))
        return self.conv(x[:, :, :-1] if self.first else x).permute(0, 2, 3, 1)

    def row(self, past):
        """forward for one row only: past (B, top + 1, W, D) are the `top` rows before it and, last,
        its own."""
        step = self.conv.dilation[0]
        x = past[:, :-1] if self.first else past  # the first layer must not see its own row
        x = F.pad(x[:, ::step].permute(0, 3, 1, 2), (self.side, self.side, 0, 0))
        return F.conv2d(x, self.conv.weight, self.conv.bias, dilation=(1, step)).permute(0, 2, 3, 1)


def left(h, distance):
    """h (B, H, W, D) moved `distance` columns to the right, zeros coming in."""
    return F.pad(h, (0, 0, distance, 0))[:, :, :h.shape[2]]


class Block(nn.Module):
    """A gated block of two stacks (van den Oord et al. 2016b). v may look at its own row, since the
    first layer moved it down by one; h looks left, and at v: together all earlier pixels that are
    near enough, 3 plus the sum of all dilations, and no blind spot."""

    def __init__(self, D, classes, dilation):
        super().__init__()
        self.above = Above(D, 2 * D, 2, 3, dilation)
        self.across = nn.Linear(3 * D, 2 * D)  # of h, h further left, and v
        self.out = nn.Linear(D, D)
        self.label = nn.Embedding(classes + 1, 4 * D)  # the class, or none, in every block
        nn.init.normal_(self.label.weight, std=0.05)
        self.dilation = dilation

    def forward(self, v, h, y):
        for_v, for_h = self.label(y)[:, None, None].chunk(2, -1)
        up = F.glu(self.above(v) + for_v, -1)  # the gate: a * sigma(b), where the paper has tanh(a)
        return v + up, self.horizontal(h, left(h, self.dilation), up, for_h)

    def horizontal(self, h, further, up, for_h):
        return h + self.out(F.glu(self.across(torch.cat([h, further, up], -1)) + for_h, -1))


# ---- 3. The networks -----------------------------------------------------------------------------


class Pixels(nn.Module):
    """What both networks share: levels to vectors, and the last layers. A channel of a pixel is
    predicted from what lies before the pixel and, by sums of embeddings, from the pixel's earlier
    channels (R, then G, then B)."""

    E = 16  # length of a level's vector

    def __init__(self, shape, K, classes, D, hidden, likelihood, mixtures):
        super().__init__()
        C, H, W = shape
        self.K, self.C, self.logistic = K, C, likelihood == "logistic"
        outputs = (2 + C) * mixtures if self.logistic else K
        self.embed = nn.ModuleList(nn.Embedding(K, self.E) for _ in range(C))
        # what is usual at each place, of all images and of each class, since digits are centred:
        # added to v, to h, and to what the head gets. That of a class is coarse, one vector for
        # 4 x 4 pixels: finer ones overfit, and guidance enlarges it to grey specks
        self.place = nn.Parameter(torch.zeros(3, H, W, D))
        self.coarse = (3 * D, -(-H // 4), -(-W // 4))
        self.typical = nn.Embedding(classes + 1, math.prod(self.coarse))
        nn.init.zeros_(self.typical.weight)
        self.hidden = nn.Linear(D, hidden)
        self.earlier = nn.ModuleList(nn.Embedding(K, hidden)
                                     for _ in range(0 if self.logistic else C - 1))
        self.logits = nn.ModuleList(nn.Linear(hidden, outputs) for _ in range(C))

    def vectors(self, x):
        """Levels (B, C, H, W) -> (B, H, W, C E)."""
        return torch.cat([e(x[:, c]) for c, e in enumerate(self.embed)], -1)

    def places(self, y):
        """What is usual (3, B, H, W, D), for classes y (B,)."""
        _, H, W, D = self.place.shape
        t = F.interpolate(self.typical(y).view(-1, *self.coarse), (H, W), mode="bilinear")
        return self.place[:, None] + t.view(-1, 3, D, H, W).permute(1, 0, 3, 4, 2)

    def head(self, h, x, c):
        """Logits of channel c (B, ..., K), from h (B, ..., D) and levels x (B, C, ...)."""
        z = self.hidden(F.relu(h))
        if not self.logistic:  # a mixture couples the channels by itself
            for before in range(c):
                z = z + self.earlier[before](x[:, before])
        return self.logits[c](F.relu(z))

    def log_prob(self, x, y):
        """log p(x | y) in nats, per image (B,); levels x (B, C, H, W), classes y (B,)."""
        out = self(x, y)
        pixel = log_logistic_pixel(out, x, self.K) if self.logistic else log_softmax_pixel(out, x)
        return pixel.flatten(1).sum(1)

    def forward(self, x, y):
        """Logits (B, C, H, W, K) of every pixel, given those before it."""
        h = self.trunk(self.vectors(x), y)  # (B, H, W, D)
        return torch.stack([self.head(h, x, c) for c in range(self.C)], 1)


class Gated(Pixels):
    """Gated PixelCNN: two stacks of dilated blocks."""

    def __init__(self, shape, K, classes, D, dilations, hidden, likelihood, mixtures):
        super().__init__(shape, K, classes, D, hidden, likelihood, mixtures)
        d_in = self.C * self.E
        self.above = Above(d_in, D, 3, 7, first=True)  # the 3 rows above
        self.across = nn.Linear(3 * d_in + D, D)  # the 3 pixels to the left, and v
        self.blocks = nn.ModuleList(Block(D, classes, d) for d in dilations)

    def trunk(self, e, y):
        place = self.places(y)
        v = self.above(e)  # (B, H, W, D)
        h = self.across(torch.cat([left(e, 1), left(e, 2), left(e, 3), v], -1)) + place[1]
        v = v + place[0]
        for block in self.blocks:
            v, h = block(v, h, y)
        return h + place[2]  # (B, H, W, D)


class Plain(Pixels):
    """The slide's: mask A in the first layer, mask B in all others. A pixel does not see all that
    lies above and to its right: the blind spot."""

    def __init__(self, shape, K, classes, D, dilations, hidden, likelihood, mixtures):
        super().__init__(shape, K, classes, D, hidden, likelihood, mixtures)
        self.first = MaskedConv("A", self.C * self.E, D)
        self.blocks = nn.ModuleList(MaskedConv("B", D, D) for _ in dilations)
        self.label = nn.ModuleList(nn.Embedding(classes + 1, D) for _ in dilations)

    def trunk(self, e, y):
        _, place, last = self.places(y).permute(0, 1, 4, 2, 3)
        h = self.first(e.permute(0, 3, 1, 2)) + place  # (B, D, H, W)
        for conv, label in zip(self.blocks, self.label):
            h = h + F.relu(conv(F.relu(h)) + label(y)[:, :, None, None])
        return (h + last).permute(0, 2, 3, 1)  # (B, H, W, D)


# ---- 4. The loss (slide Autoregressive Models: "maximizing likelihood of training data") ---------


def loss(model, x, y):
    """Negative log-likelihood in bits/dim; 8 for a uniform model of 256 levels."""
    return -model.log_prob(x, y).mean() / (x[0].numel() * math.log(2))


# ---- 5. The sampler (slide Sampling) -------------------------------------------------------------


def draw(out, temperature, uniform):
    """Numbers 0..K-1 (B,) from logits (B, K), by where uniform (B,) falls among the summed
    probabilities."""
    p = F.softmax(out.float() / temperature, -1).cumsum(-1)
    return torch.searchsorted(p, uniform[:, None] * p[:, -1:]).squeeze(1).clamp(
        max=out.shape[1] - 1)


def level_logits(model, outs, x, c):
    """Logits of the levels of channel c at one pixel (B, K), from what the head gave for channels
    up to c, (B, outputs) each, and levels x (B, C)."""
    if not model.logistic:
        return outs[c]
    # the mixture as a softmax: try all levels of channel c with the known ones before it
    B, K = len(x), model.K
    tried = x[:, :c + 1, None, None].repeat(1, 1, 1, K)  # (B, c + 1, 1, K)
    tried[:, c, 0] = torch.arange(K, device=x.device)
    part = torch.stack(outs, 1).view(B, c + 1, 2 + model.C, -1)[:, :, :3 + c].flatten(2)
    part = part[:, :, None, None].expand(-1, -1, 1, K, -1)
    return log_logistic_pixel(part, tried, K)[:, 0, 0]


@torch.no_grad()
def fill_in_naive(model, x, known, y, temperature, uniform, w=1.0, watch=None):
    """Fills in x (B, C, H, W) where known (B, 1, H, W) is false, pixel by pixel in reading order,
    as the slide does: the whole network for each. uniform (B, C, H, W): the dice."""
    x = torch.where(known, x, 0)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            h = model.trunk(model.vectors(x), y)[:, i, j]  # (B, D)
            fill(model, h, x, known, i, j, temperature, uniform, w)
        if watch:
            watch(i, x)
    return x


def fill(model, h, x, known, i, j, temperature, uniform, w):
    """Draws the channels of pixel (i, j) into x, one after the other, from h (B, D). If w is not 1,
    the batch holds every image twice, with its class and with none, and both take what the guided
    logits give (Ho & Salimans 2022)."""
    outs = []
    for c in range(model.C):
        here = x[:, :, i, j]
        outs.append(model.head(h, here, c))
        logits = level_logits(model, outs, here, c)  # (B, K)
        if w != 1:
            cond, none = logits.log_softmax(-1).chunk(2)
            logits = (none + w * (cond - none)).repeat(2, 1)
        level = draw(logits, temperature, uniform[:, c, i, j])
        x[:, c, i, j] = torch.where(known[:, 0, i, j], here[:, c], level)


@torch.no_grad()
def fill_in(model, x, known, y, temperature, uniform, w=1.0, watch=None):
    """The same result as fill_in_naive, many times faster: the vertical stack is computed row by
    row, the horizontal one only at the new pixel, from what is kept of earlier ones
    (Ramachandran et al. 2017). watch(i, x): called after row i."""
    if not isinstance(model, Gated):
        return fill_in_plain(model, x, known, y, temperature, uniform, w, watch)
    x = torch.where(known, x, 0)
    B, _, H, W = x.shape
    zeros, D = model.place.new_zeros, model.place.shape[-1]
    labels = [block.label(y)[:, None, None].chunk(2, -1) for block in model.blocks]
    place = model.places(y)
    e = zeros(B, H + 3, W + 3, model.C * model.E)  # 3 rows above, 3 pixels to the left
    kept = [zeros(B, block.above.top + H, W, D) for block in model.blocks]
    for i in range(H):
        first = model.above.row(e[:, i:i + 4, 3:])  # (B, 1, W, D)
        v, ups = first + place[0, :, i:i + 1], []
        for block, past, (for_v, _) in zip(model.blocks, kept, labels):
            past[:, block.above.top + i] = v[:, 0]
            up = F.glu(block.above.row(past[:, i:i + block.above.top + 1]) + for_v, -1)
            v = v + up
            ups.append(up[:, 0])  # (B, W, D)
        hs = [zeros(B, W + block.dilation, D) for block in model.blocks]
        for j in range(W):
            near = [e[:, i + 3, j + 3 - k] for k in (1, 2, 3)]
            h = model.across(torch.cat([*near, first[:, 0, j]], -1)) + place[1, :, i, j]
            for block, row, up, (_, for_h) in zip(model.blocks, hs, ups, labels):
                row[:, j + block.dilation] = h
                h = block.horizontal(h, row[:, j], up[:, j], for_h[:, 0, 0])
            h = h + place[2, :, i, j]
            fill(model, h, x, known, i, j, temperature, uniform, w)
            e[:, i + 3, j + 3] = model.vectors(x[:, :, i:i + 1, j:j + 1])[:, 0, 0]
        if watch:
            watch(i, x)
    return x


def fill_in_plain(model, x, known, y, temperature, uniform, w=1.0, watch=None):
    """fill_in for the plain network: of each layer only the new pixel, from a 5 x 5 window."""
    x = torch.where(known, x, 0)
    B, _, H, W = x.shape
    convs, place = [model.first, *model.blocks], model.places(y)
    kept = [model.place.new_zeros(B, conv.in_channels, H + 4, W + 4) for conv in convs]
    for i in range(H):
        for j in range(W):
            h = None
            for n, (conv, past) in enumerate(zip(convs, kept)):
                if n:
                    past[:, :, i + 2, j + 2] = F.relu(h)
                out = F.conv2d(past[:, :, i:i + 5, j:j + 5], conv.weight * conv.keep, conv.bias)
                out = out[:, :, 0, 0]  # (B, D)
                h = h + F.relu(out + model.label[n - 1](y)) if n else out + place[1, :, i, j]
            h = h + place[2, :, i, j]
            fill(model, h, x, known, i, j, temperature, uniform, w)
            kept[0][:, :, i + 2, j + 2] = model.vectors(x[:, :, i:i + 1, j:j + 1])[:, 0, 0]
        if watch:
            watch(i, x)
    return x


# ---- 6. Train ------------------------------------------------------------------------------------


def make_model(args):
    """The network that args describe, on its device."""
    kind = Gated if args.arch == "gated" else Plain
    return kind(args.shape, args.levels, args.classes, args.width, args.dilations, args.hidden,
                args.likelihood, args.mixtures).to(args.device)


@torch.no_grad()
def ema_update(ema, model, step, decay):
    """ema <- decay ema + (1 - decay) model, in float32; a short memory in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Bits(nn.Module):
    """loss as a module, for DistributedDataParallel."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return loss(self.model, x, y)


def train(args, ckpt=None):
    """Trains and returns the averaged model; checkpoints and pictures on the way. ckpt: go on."""
    data, labels = load_data(args, "train")
    labels = None if args.unconditional else labels  # data (N, C, H, W) uint8, labels (N,) int64
    args.shape = list(data.shape[1:])
    args.classes = 0 if labels is None else int(labels.max()) + 1
    torch.manual_seed(args.seed)
    model = make_model(args)
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
        f"classes, {args.levels} levels; {args.steps:,} steps of {args.batch_size}")
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        model.compile()
    net = DistributedDataParallel(Bits(model)) if WORLD > 1 else Bits(model)
    config = {k: getattr(args, k) for k in CONFIG}
    B, dev, stop = args.batch_size, args.device, ctrl_c()
    total, counted, clock, since = 0.0, 0, time.time(), begin - 1
    bar = tqdm(range(begin, args.steps + 1), initial=begin - 1, total=args.steps,
               disable=RANK > 0 or None)
    for step in bar:
        # Step n draws from a seed of its own: --resume needs no saved random state, and all
        # processes of torchrun draw the same global batch, of which each takes its share.
        torch.manual_seed((args.seed * 1_000_003 + step) % 2**63)
        pick = torch.randint(len(data), (B,), device=dev)[RANK::WORLD]
        flip, drop = torch.rand(2, B, device=dev)[:, RANK::WORLD]
        x = data[pick]  # (B, C, H, W)
        if args.flip:
            x = torch.where(flip[:, None, None, None] < 0.5, x.flip(3), x)
        x = to_levels(x, args.levels)
        # 1 label in 10 becomes "none", so that the model learns p(x) too, for guidance
        y = torch.where(drop < 0.1, args.classes, labels[pick] if args.classes else 0)
        for group in opt.param_groups:  # warm up, then down to zero
            group["lr"] = args.lr * min(1, step / args.warmup) * (1 - (step - 1) / args.steps)
        with autocast(args):
            bits = net(x, y)
        bits.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        ema_update(ema, model, step, args.ema)
        total, counted, done = total + bits.detach(), counted + 1, step == args.steps or bool(stop)
        write = done or step % args.every == 0
        if write or step == 1 or step % 20 == 0:  # not each step: reading the loss waits for a GPU
            if WORLD > 1:
                dist.all_reduce(total)
            history.append((step, float(total) / counted / WORLD))
            total, counted = 0.0, 0
            recent = np.mean([bits for _, bits in history[-25:]])
            state = f"{recent:.3f} bits/dim (uniform {math.log2(args.levels):g})"
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
            if not done:
                x = draw_images(args, ema, class_labels(args, 40))
                save_png(args.out / f"step_{step:06}.png", grid(x, 8 if args.classes else 10)[None])
        if write or step == begin:  # the clock leaves out pictures, and torch.compile's first step
            clock, since = time.time(), step
        if done and step < args.steps:
            say(f"stopped at {step}; to go on: python {NAME}.py --train --resume --out {args.out}")
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return ema


# ---- 7. Sample, complete -------------------------------------------------------------------------


def class_labels(args, num):
    """Labels (num,), class by class, all classes as often as num allows; zeros without classes."""
    return torch.arange(num) * max(1, args.classes) // num


def draw_images(args, model, labels, given=None, known=None, watch=None):
    """Images (N, C, H, W) uint8, of labels (N,); given (N, C, H, W) uint8 are kept where known
    (N, 1, H, W) is true. The dice are thrown on the CPU: the same whatever the device."""
    N = len(labels)
    rng = torch.Generator().manual_seed(args.seed)
    uniform = torch.rand(N, *args.shape, generator=rng)
    x = torch.zeros(N, *args.shape, dtype=torch.long) if given is None else to_levels(
        given.cpu(), args.levels)
    known = torch.zeros(N, 1, *args.shape[1:], dtype=torch.bool) if known is None else known.cpu()
    sampler, w, out = fill_in_naive if args.naive else fill_in, args.guidance, []
    for part in zip(*(a.to(args.device).split(200) for a in (x, known, labels, uniform))):
        n = len(part[0])
        if w != 1 and args.classes:  # each image twice, the second time without its class
            part = [torch.cat([a, a]) for a in part]
            part[2][n:] = args.classes
        filled = sampler(model, *part[:3], args.temperature, part[3], w if args.classes else 1.0,
                         watch)
        out.append(filled[:n])
    return from_levels(torch.cat(out), args.levels)


def sample(args, model):
    """Samples as .npz and .png, a row per class, and trajectory.png: an image filling up."""
    labels = class_labels(args, args.num)
    start = time.time()
    x = draw_images(args, model, labels)
    say(f"{args.num} samples in {time.time() - start:.1f} s")
    save_npz(args.save or args.out / "samples.npz", x.permute(0, 2, 3, 1).cpu().numpy(),
             labels=labels.numpy())
    cols = max(1, min(10, args.num // args.classes)) if args.classes else 10
    pick = torch.cat([(labels == c).nonzero()[:cols, 0] for c in range(args.classes)]
                     or [torch.arange(min(100, args.num))])
    save_png(args.out / "samples.png", grid(x.cpu()[pick], cols)[None])
    frames, few = [], class_labels(args, 40)

    def watch(i, levels):
        frames.append(grid(from_levels(levels[:40], args.levels), 8))

    draw_images(args, model, few, watch=watch)
    # the whole image first: it is what viewers show that cannot play an animation
    save_png(args.out / "trajectory.png", np.stack(frames[-1:] * 8 + frames))
    more = "--complete --score" + " --classify" * (args.classes > 0)
    say(f"pictures in {args.out}: samples, trajectory\n"
        f"now try: python {NAME}.py {more} --out {args.out}")


def test_images(args, num=None):
    """Levels (N, C, H, W) and labels (N,) of the test set, checked against the model's shape."""
    images, labels = load_data(args, "test")
    if list(images.shape[1:]) != list(args.shape):
        die(f"--data {args.data}: images of {list(images.shape[1:])}, but the model was trained on "
            f"{args.shape}")
    if labels is None or args.unconditional:
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    labels = labels[:num].clamp(max=args.classes)  # a class never seen counts as none
    return to_levels(images[:num], args.levels), labels


@torch.no_grad()
def log_probs(args, model, x, y):
    """log p(x | y) in nats (N,), in batches; float64 on the CPU, since mps has none."""
    found = []
    for a, b in zip(x.split(100), y.split(100)):
        with autocast(args):
            found.append(model.log_prob(a, b))
    return torch.cat(found).cpu().double()


def test_set_bits(args, model):
    """Bits/dim and nats per image of the whole test set, beside two yardsticks."""
    x, y = test_images(args)
    D, K = x[0].numel(), args.levels
    counts = torch.ones(D * K, dtype=torch.long, device=x.device)  # one of each, to begin with
    for part in load_data(args, "train")[0].split(5000):
        counts += torch.bincount((to_levels(part, K).flatten(1) + K * torch.arange(
            D, device=x.device)).flatten(), minlength=D * K)
    table = counts.view(D, K).cpu().double()
    table = (table / table.sum(1, keepdim=True)).log().T  # (K, D)
    histogram = -table.gather(0, x.flatten(1).cpu()).sum(1).mean()
    nats = -log_probs(args, model, x, y).mean()
    for name, value in (("uniform", D * math.log(K)), ("histogram of each pixel", histogram),
                        (f"{NAME}.py", nats)):
        say(f"{name:26}{float(value) / D / math.log(2):8.4f} bits/dim {float(value):10.1f} nats")


def complete(args, model):
    """complete.png: test images; the same with the lower half, the right half or a box occluded;
    and seven completions of each. A pixel is drawn given only those before it: what is known below
    and to the right of a box cannot help."""
    x, y = test_images(args, 9)
    (H, W), N = args.shape[1:], len(x)
    known = torch.ones(N, 1, H, W, dtype=torch.bool)
    rng = np.random.default_rng(args.seed)
    for i in range(N):
        if i < 3:
            known[i, :, H // 2:] = False
        elif i < 6:
            known[i, :, :, W // 2:] = False
        else:
            r, c = rng.integers(H - H // 2), rng.integers(W - W // 2)
            known[i, :, r:r + H // 2, c:c + W // 2] = False
    images = from_levels(x, args.levels).cpu()
    many, mask, classes = (a.repeat_interleave(7, 0) for a in (images, known, y.cpu()))
    drawn = draw_images(args, model, classes, many, mask).cpu().view(N, 7, *args.shape)
    given = torch.where(known, images, 128)
    rows = torch.cat([images[:, None], given[:, None], drawn], 1).flatten(0, 1)
    save_png(args.out / "complete.png", grid(rows, 9)[None])
    say(f"complete.png in {args.out}: original, given, seven completions")


# ---- 8. What a density is good for (slides Generative Models, Recall: Bayes' Rule) ---------------


@torch.no_grad()
def log_joint(args, model, x):
    """log p(x | y) + log p(y) of every class (N, classes), all classes equally likely; without
    classes log p(x) (N, 1)."""
    if not args.classes:
        return log_probs(args, model, x, torch.zeros_like(x[:, 0, 0, 0]))[:, None]
    found = [log_probs(args, model, x, torch.full_like(x[:, 0, 0, 0], c))
             for c in tqdm(range(args.classes), desc="classes", leave=False, disable=None)]
    return torch.stack(found, 1) - math.log(args.classes)


def classify(args, model):
    """Bayes' rule: p(y | x) = p(x | y) p(y)/p(x). Accuracy on 1,000 test images, and classify.png
    with the surest above and the least sure below."""
    if not args.classes or load_data(args, "test")[1] is None:
        die("--classify: needs a model and a data set with labels")
    x, y = test_images(args, 1000)
    posterior = log_joint(args, model, x).softmax(1)  # (N, classes)
    sure, read = posterior.max(1)
    right = (read == y.cpu()).double().mean()
    say(f"p(y | x) by Bayes' rule: {float(right):.3f} of {len(x):,} test images read rightly")
    order = sure.argsort(descending=True)
    rows = []
    for name, pick in (("surest", order[:16]), ("least sure", order[-32:])):
        rows.append(caption(f"{name}: the true class, what is read, its probability in %", 912))
        for part in pick.split(8):
            picture = grid(from_levels(x[part], args.levels), 8)
            texts = [f"{y[i]} as {read[i]} {100 * sure[i]:.0f}%" for i in part]
            rows += [picture, np.concatenate([caption(t, picture.shape[1] // 8) for t in texts], 1)]
    save_png(args.out / "classify.png", stack(rows)[None])
    say(f"classify.png in {args.out}")


def score(args, model):
    """log p(x) of test images, of other data, of shuffled pixels, noise and constant images:
    score.png. The trap: what is simple is likely, whether it looks like the data or not."""
    x, _ = test_images(args, 500)
    rng = torch.Generator().manual_seed(args.seed)
    mix = torch.randperm(x[0].numel(), generator=rng).to(x.device)
    sets = {"test images": x, "shuffled pixels": x.flatten(1)[:, mix].view(x.shape),
            "noise": torch.randint(args.levels, x[:100].shape, generator=rng).to(x.device),
            "upside down": x.flip(2)}
    for other in ("mnist", "fashion", "cifar10"):
        where = copy.copy(args)
        where.data = other
        if other != args.data and have_data(where):
            images = load_data(where, "test")[0][:500]
            if list(images.shape[1:]) == list(args.shape):
                sets[other] = to_levels(images, args.levels)
    greys = torch.linspace(0, args.levels - 1, 5).round().long().unique().to(x.device)
    sets["constant"] = greys.view(-1, 1, 1, 1).expand(-1, *args.shape)
    scale, curves, rows = x[0].numel() * math.log(2), {}, []
    for name, images in sets.items():
        bits = -log_joint(args, model, images).logsumexp(1).numpy() / scale
        say(f"{name:18} bits/dim: mean {bits.mean():7.3f}, least {bits.min():7.3f}, most "
            f"{bits.max():7.3f}")
        count, edges = np.histogram(np.log10(bits.clip(0.0032, 31)), 40, (-2.5, 1.5))
        curves[name] = (edges[:-1] + 0.05, count / len(bits))
        picture = grid(from_levels(images[:12], args.levels), 12)
        picture = picture[:, :picture.shape[1] // 12 * min(12, len(images))]
        rows += [caption(f"{name}: {bits.mean():.3f} bits/dim", 900), picture]
    plots = [plot(dict(part), "log10 of bits/dim: left is likely", "share")
             for part in (list(curves.items())[:4], list(curves.items())[4:]) if part]
    save_png(args.out / "score.png", stack([*plots, *rows])[None])
    say(f"score.png in {args.out}")


def receptive_field(args):
    """receptive_field.png: by gradients, what the middle pixel of a 28 x 28 image sees after the
    first layer and after each block, for both architectures (slide Learning - CNN Receptive
    Field). White: seen; grey: itself; the plain network's blind spot grows to the right above."""
    rows = []
    for name, kind in (("gated", Gated), ("plain", Plain)):
        fields = []
        for n in range(len(args.dilations) + 1):
            torch.manual_seed(0)
            net = kind([1, 28, 28], 2, 0, 8, args.dilations[:n], 8, "softmax", 1).double()
            fields.append(field_of(net, 14, 14))
        rows += [caption(f"{name}: after the first layer, then each block", 900),
                 grid(torch.stack(fields), len(fields))]
    save_png(args.out / "receptive_field.png", stack(rows)[None])
    say(f"receptive_field.png in {args.out}")


def field_of(net, i, j):
    """(1, H, W) uint8: 255 where the input moves the features of pixel (i, j), 90 at the pixel."""
    H, W = net.place.shape[1:3]
    e = torch.randn(4, H, W, net.C * net.E, dtype=torch.float64, requires_grad=True)
    out = net.trunk(e, torch.zeros(4, dtype=torch.long))
    out[:, i, j].square().sum().backward()
    seen = (e.grad.abs().sum((0, 3)) > 0).to(torch.uint8) * 255
    seen[i, j] = 90 if not seen[i, j] else 255
    return seen[None]


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
    verbs = (args.train, args.sample, args.bpd, args.complete, args.score, args.classify,
             args.export)
    if not any((*verbs, args.receptive_field)):
        return parse_args(["--help"])
    path = args.out / "model.pt"
    if args.train and not args.resume and path.exists():
        if (old := read_checkpoint(path)["config"]["data"]) != args.data:
            die(f"--out {args.out} holds a model of {old}; choose another --out for {args.data}")
    if any(verbs) and (args.resume or not args.train):
        if not (path.exists() or args.resume) and (HERE / "pretrained" / f"{NAME}.pt").exists():
            path = HERE / "pretrained" / f"{NAME}.pt"
        ckpt = read_checkpoint(path)
        args = parse_args(argv, ckpt["config"])
        for key in ("data", "size", "arch", "likelihood", "levels", "mixtures", "width",
                    "dilations", "hidden", "unconditional"):
            if getattr(args, key) != ckpt["config"][key]:
                die(f"--{key} {getattr(args, key)}: {path} was trained with {ckpt['config'][key]}")
        say(f"from {path}, step {ckpt['step']:,}")
    try:
        setup(args)
        if args.receptive_field:
            receptive_field(args)
        if not any(verbs):
            return
        if args.train:
            model = train(args, ckpt)
        else:
            model = make_model(args).eval()
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
        for wanted, verb in ((args.train or args.bpd, test_set_bits),
                             (args.train or args.sample, sample), (args.complete, complete),
                             (args.score, score), (args.classify, classify)):
            if wanted:
                verb(args, model)
    except OSError as e:  # disk full, no right to write: the last checkpoint is whole
        die(f"{e.filename or args.out}: {e.strerror or e}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
