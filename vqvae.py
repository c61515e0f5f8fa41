"""Images as a few whole numbers, and new images from new numbers: a VQ-VAE and its prior.

An encoder shrinks an image to a small grid of vectors; each is replaced by the nearest of K learned
ones, so that the image is a grid of codes. A second network learns which grids occur: p(codes).

Slides     VQ-VAE; first stage of DALL-E; Latent Diffusion (the compressed space)
Equations  nearest      k = argmin_j |z - e_j|^2
           gradient     z_q = z + stop(e_k - z):  decoder's gradient goes straight to the encoder
           loss         |x - decode(z_q)|^2 + beta |z - stop(e_k)|^2
           codebook     e_k = running mean of the z that chose it  (or: + |stop(z) - e_k|^2)
           prior        p(codes | y) = prod_i p(code_i | codes before, y)
           bound        - log p(x | y) <= - log p(codes | y) - log p(x | codes)
Notation   x            x        (B, C, H, W)   image in [-1, 1]
           z, z_q       z, q     (B, h, w, D)   before and after the codebook; h = H/4, w = W/4
           k            codes    (B, h, w)      whole numbers 0..K-1
           e            vectors  (K, D)         the codebook
           y            y        (B,)           class, for p(codes | y); `classes` for none
           beta         beta                    how strongly z is held to its code
                        D                       length of a code's vector; of a network, its width
Run        python vqvae.py --train                              both stages, then samples
           python vqvae.py --sample --num 100 --save x.npz      from your model, or the one enclosed
           python vqvae.py --reconstruct --bpd                  pictures of the codes; bits/dim
           python vqvae.py --compress x.npz --save x.vq         images to codes in a file
           python vqvae.py --decompress x.vq --save y.npz       and back
           python vqvae.py --train --codebook fsq --out out/fsq no codebook: rounding
Expect     digits, 5 minutes on 2 CPU cores for both stages: squared error 0.012 on the test set,
           all 256 codes used, 99.7 of 100 reconstructions read by fid.py as their originals, 96 of
           100 samples as the class asked for, at most 1.50 bits/dim. The enclosed model, 10
           minutes: 0.009, 99.7, 98, 1.45. GPU: runs, not timed. In out/vqvae/: model.pt,
           samples (.png, .npz), loss (.png, .csv), codes_000500.png, prior_000500.png and so on;
           by --reconstruct reconstruction, codebook, usage, codes, interpolation (.png).
Left out   levels of codes above one another (VQ-VAE-2), losses that make images sharp (VQGAN's
           perceptual and adversarial ones), an arithmetic coder that would reach the ideal size
Try        1. --codebook ema, loss (with --codebook-size 240) and fsq: usage and error at equal K.
           2. --codebook-size 16, 64, 512: error falls, the prior's work grows. Where does fid.py
              find samples best?
           3. --beta 0, 0.25, 4: what becomes of the squared error when nothing holds z?
Papers     van den Oord et al. 2017, Neural Discrete Representation Learning; Razavi et al. 2019,
           VQ-VAE-2; Mentzer et al. 2023, Finite Scalar Quantization; Vaswani et al. 2017, Attention
           Is All You Need; Ho & Salimans 2022, Classifier-Free Diffusion Guidance
"""
import argparse
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
        width=64, code_dim=16, codebook_size=256, fsq_levels=[8, 6, 5], blocks=2, steps=1500,
        batch_size=128, lr=2e-3, prior_width=128, prior_layers=4, prior_steps=1500, prior_batch=64,
        prior_lr=2e-3, warmup=50, guidance=1.5, num=100, every=500),
    "base": dict(  # a GPU
        width=128, code_dim=32, codebook_size=1024, fsq_levels=[8, 5, 5, 5], blocks=3,
        steps=50_000, batch_size=256, lr=5e-4, prior_width=512, prior_layers=12,
        prior_steps=50_000, prior_batch=256, prior_lr=3e-4, warmup=500, guidance=1.5, num=100,
        every=5000),
    "paper": dict(  # van den Oord et al. on CIFAR-10: 8 x 8 x 10 codes, here 8 x 8; 4.67 bits/dim
        width=256, code_dim=64, codebook_size=512, fsq_levels=[8, 8, 8], blocks=2, steps=250_000,
        batch_size=128, lr=2e-4, prior_width=512, prior_layers=15, prior_steps=100_000,
        prior_batch=128, prior_lr=3e-4, warmup=500, guidance=1.0, num=100, every=10_000),
}
CONFIG = [*SIZES["small"], "size", "data", "seed", "codebook", "beta", "decay", "unconditional",
          "temperature", "shape", "classes"]  # what a checkpoint keeps


def parse_args(argv=None, config=None):
    """Every knob. config, from a checkpoint, replaces the defaults; a flag given by hand wins.
    (HERE, NAME, die, positive, share and pick_device are plumbing, at the end of the file.)"""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.error = die
    add = p.add_argument
    # what to do
    add("--train", action="store_true", help="train both stages, then write samples")
    add("--sample", action="store_true", help="draw from OUT/model.pt, or else pretrained/")
    add("--reconstruct", action="store_true", help="the test set through its codes, in pictures")
    add("--bpd", action="store_true", help="a bound on bits/dim of the whole test set")
    add("--compress", type=Path, metavar="NPZ", help="images to a file of codes")
    add("--decompress", type=Path, metavar="VQ", help="and back")
    add("--export", type=Path, metavar="PT", help="write the weights alone, as fp16")
    # where, and on what
    add("--data", default="mnist", help="mnist, fashion, cifar10, or a .npy/.npz file of your own")
    add("--data-dir", type=Path, default=HERE / "data", help="where data sets lie or are put")
    add("--out", type=Path, default=Path("out") / NAME, help="everything written goes there")
    add("--size", choices=["small", "base", "paper"],
        help="preset for all flags of networks and training; small on a CPU, else base")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    add("--seed", type=int, default=0, help="start of all random numbers")
    add("--compile", action="store_true", help="torch.compile the training: slow start, then fast")
    add("--resume", action="store_true", help="go on from OUT/model.pt")
    add("--every", type=positive, help="checkpoint and picture every so many steps")
    # first stage
    add("--codebook", choices=["ema", "loss", "fsq"], default="ema", help="vectors learned as "
        "running means, or by gradient; or none: each number of z rounded to a few levels")
    add("--codebook-size", type=positive, metavar="K", help="how many vectors (not fsq)")
    add("--code-dim", type=positive, help="their length D (not fsq)")
    add("--fsq-levels", type=positive, nargs="+", metavar="N",
        help="levels of each number of z under --codebook fsq; their product is K")
    add("--beta", type=float, default=0.25, help="weight of the commitment "
        "|z - stop(e)|^2 (not fsq)")
    add("--decay", type=share, default=0.99, help="of the codebook's running means (not "
        "fsq)")
    add("--width", type=positive, help="channels of encoder and decoder")
    add("--blocks", type=positive, help="residual blocks of each")
    add("--steps", type=positive, help="training length")
    add("--batch-size", type=positive, help="images per step, over all GPUs")
    add("--lr", type=share, help="peak learning rate of AdamW, falling linearly to zero")
    # second stage
    add("--prior-width", type=positive, help="of the transformer over codes; a multiple of 32")
    add("--prior-layers", type=positive, help="its blocks")
    add("--prior-steps", type=positive, help="its training length")
    add("--prior-batch", type=positive, help="grids per step, over all GPUs")
    add("--prior-lr", type=share, help="its peak learning rate")
    add("--warmup", type=positive, help="steps until the peak is reached, in both stages")
    add("--unconditional", action="store_true", help="ignore the labels")
    # sampling
    add("--num", type=positive, help="how many samples")
    add("--save", type=Path, help="where the result goes, by default into OUT")
    add("--guidance", type=float, metavar="W", help="uncond + W (cond - uncond), of logits: a "
        "larger W gives more typical and less varied samples; 1 is p(codes | y)")
    add("--temperature", type=float, default=1.0, help="of the softmax; below 1 more typical")
    p.set_defaults(**(config or {}))
    args = p.parse_args(argv)
    args.size = args.size or ("small" if pick_device(args.device) == "cpu" else "base")
    for key, value in SIZES[args.size].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for wrong, message in (
            (not 0 <= args.seed < 2**63, f"--seed {args.seed}: expected 0 or more, below 2^63"),
            (args.codebook_size < 2, f"--codebook-size {args.codebook_size}: expected 2 or more"),
            (min(args.fsq_levels) < 2, f"--fsq-levels {min(args.fsq_levels)}: expected 2 or more"),
            (args.prior_width % 32, f"--prior-width {args.prior_width}: expected a multiple of 32"),
            (not args.temperature > 0, f"--temperature {args.temperature}: expected more than 0"),
            (not args.beta >= 0, f"--beta {args.beta}: expected 0 or more")):
        if wrong:
            die(message)
    return args


# ---- 1. The bottleneck (slide VQ-VAE: "closest vector from a learned codebook") ------------------

CHUNK = 2**20  # distances held at a time, so that a large codebook needs no large matrix


def nearest_code(z, vectors):
    """Index (N,) of the nearest of vectors (K, D) to each of z (N, D), by squared distance
    |z - e|^2 = |z|^2 - 2 z e + |e|^2, of which |z|^2 is the same for all e. At most CHUNK
    distances, or one row of K, are held at a time; not in bf16, for near ties."""
    half = vectors.square().sum(1) / 2  # (K,)
    with torch.autocast(z.device.type, enabled=False):
        return torch.cat([torch.addmm(half, part, vectors.T, alpha=-1).argmin(1)  # (n, K) -> (n,)
                          for part in z.split(max(1, CHUNK // len(vectors)))])


def straight_through(z, q):
    """The value of q with the gradient of z: z + stop(q - z)."""
    return z + (q - z).detach()


def perplexity(counts):
    """exp of the entropy of how often each code is used (K,): 1 if one is, K if all equally."""
    p = counts.cpu().double() / max(1, int(counts.sum()))
    return float(torch.special.entr(p).sum().exp())


class Codebook(nn.Module):
    """K vectors of length D. In training they follow the z that choose them, as running means (van
    den Oord et al. 2017, appendix A.1) or by gradient of |stop(z) - e|^2; those that nobody chooses
    are put where some z is."""

    def __init__(self, K, D, beta, decay, by_gradient):
        super().__init__()
        self.K, self.D, self.beta, self.decay, self.by_gradient = K, D, beta, decay, by_gradient
        vectors = torch.randn(K, D)
        self.vectors = nn.Parameter(vectors, requires_grad=by_gradient)
        self.register_buffer("count", torch.ones(K))  # running: how many z a step choose each code,
        self.register_buffer("total", vectors.clone())  # and their sum

    def forward(self, z):
        """z (B, h, w, D) -> z_q (B, h, w, D), codes (B, h, w), and the loss to add (a scalar)."""
        flat = z.flatten(0, 2)  # (B h w, D)
        k = nearest_code(flat.detach(), self.vectors.detach())  # (B h w,)
        codes = k.view(z.shape[:3])
        q = self.lookup(codes)
        loss = self.beta * F.mse_loss(z, q.detach())  # beta holds z, not the codebook
        if self.by_gradient:
            loss = loss + F.mse_loss(q, z.detach())
        out = straight_through(z, q)
        if self.training:  # behind the lookup: this step used the old vectors
            self.follow(flat.detach(), k)
        return out, codes, loss

    def lookup(self, codes):
        """Codes (...) -> vectors (..., D)."""
        return F.embedding(codes, self.vectors)

    @torch.no_grad()
    def follow(self, flat, k):
        """One step of the running means, then dead codes begin anew. flat (N, D), k (N,)."""
        count = torch.zeros_like(self.count).index_add_(0, k, torch.ones_like(flat[:, 0]))
        total = torch.zeros_like(self.total).index_add_(0, k, flat)
        if WORLD > 1:
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        if not self.by_gradient:  # an unused code has count and total shrink alike: it stays
            self.vectors.copy_(self.total / self.count[:, None])
        fair = len(flat) * WORLD / self.K
        dead = self.count < min(0.5, 0.03 * fair)  # for long chosen 30 times less than its share,
        # or less than every second step
        self.replace(dead, flat)

    @torch.no_grad()
    def begin(self, z):
        """All vectors become some of z (B, h, w, D), before the first step: random ones, far from
        all z, would lie unused."""
        self.replace(torch.ones_like(self.count, dtype=torch.bool), z.flatten(0, 2))
        self.count.fill_(1)
        self.total.copy_(self.vectors)

    @torch.no_grad()
    def replace(self, which, flat):
        """Codes where which (K,) is true become vectors drawn from flat (N, D), their count and
        total with them."""
        pick = torch.randint(len(flat), (self.K,), device=flat.device)
        new = flat[pick].contiguous()
        if WORLD > 1:
            dist.broadcast(new, 0)
        count = torch.full_like(self.count, len(flat) * WORLD / self.K)
        self.count.copy_(torch.where(which, count, self.count))
        self.vectors.copy_(torch.where(which[:, None], new, self.vectors))
        self.total.copy_(torch.where(which[:, None], new * count[:, None], self.total))


class Rounding(nn.Module):
    """No codebook (Mentzer et al. 2023): each of the D numbers of z is squashed and rounded to one
    of levels[i] values; a code is the number that these digits spell. Nothing to learn, nothing to
    collapse."""

    def __init__(self, levels):
        super().__init__()
        self.K, self.D = math.prod(levels), len(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        places = [math.prod(levels[:i]) for i in range(len(levels))]  # 1, l0, l0 l1, ...
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, z):
        """z (B, h, w, D) -> z_q, codes (B, h, w), and no loss."""
        half = (self.levels - 1) / 2
        bounded = half * torch.tanh(z.float())  # (B, h, w, D) in -half..half
        # an even number of levels lies at ..., -1/2, 1/2, ...: move, round, move back
        shift = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        digits = ((bounded - shift).round() + shift + half).round().long().clamp(min=0)
        digits = digits.minimum(self.levels - 1)
        codes = (digits * self.places).sum(-1)
        return straight_through(bounded / half, self.lookup(codes)), codes, z.new_zeros(())

    def lookup(self, codes):
        """Codes (...) -> vectors (..., D) in [-1, 1]."""
        digits = codes[..., None] // self.places % self.levels
        return digits * (2 / (self.levels - 1)) - 1


# ---- 2. The networks -----------------------------------------------------------------------------


class Residual(nn.Module):
    """x + convolutions of x (B, D, h, w), as in the paper: 3 x 3, then 1 x 1."""

    def __init__(self, D):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(D, D, 3, padding=1), nn.Conv2d(D, D, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Autoencoder(nn.Module):
    """Image to a grid a quarter as high and wide, codebook, and back. The decoder gives an
    image; and, for the density of each of its numbers, a logistic's centre and log scale."""

    def __init__(self, C, D, blocks, codebook):
        super().__init__()
        res = lambda: [Residual(D) for _ in range(blocks)]
        self.encoder = nn.Sequential(
            nn.Conv2d(C, D // 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(D // 2, D, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(D, D, 3, padding=1), *res(), nn.ReLU(), nn.Conv2d(D, codebook.D, 1))
        self.codebook = codebook
        self.decoder = nn.Sequential(
            nn.Conv2d(codebook.D, D, 3, padding=1), *res(), nn.ReLU(),
            nn.ConvTranspose2d(D, D // 2, 4, 2, 1), nn.ReLU())
        self.image = nn.ConvTranspose2d(D // 2, C, 4, 2, 1)
        self.density = nn.Sequential(nn.Conv2d(D // 2, D // 2, 3, padding=1), nn.ReLU(),
                                     nn.ConvTranspose2d(D // 2, 2 * C, 4, 2, 1))

    def encode(self, x):
        """Images (B, C, H, W) in [-1, 1] -> z (B, h, w, D), before the codebook."""
        return self.encoder(x).permute(0, 2, 3, 1).float()

    def decode(self, q):
        """z_q (B, h, w, D) -> image, centre and log scale (B, C, H, W) each."""
        features = self.decoder(q.permute(0, 3, 1, 2))  # (B, D/2, H/2, W/2)
        image = self.image(features).float()
        # its gradient stops here: the density is not to change what the image looks like
        shift, log_scale = self.density(features.detach()).float().chunk(2, 1)
        return image, image.detach() + shift, log_scale - 3

    def forward(self, x):
        """Images -> what decode gives, codes (B, h, w), and the codebook's loss."""
        q, codes, extra = self.codebook(self.encode(x))
        return *self.decode(q), codes, extra


def attend(q, k, v, **mask):
    """softmax(q k^T / sqrt(d)) v: (B, heads, L, d) each. On a CPU in float32: in training PyTorch's
    bf16 kernel is five times slower there."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **mask)
    return F.scaled_dot_product_attention(q, k, v, **mask)


class CausalAttention(nn.Module):
    """Self-attention of x (B, L, D) in which no position sees a later one; heads of 32 numbers."""

    def __init__(self, D):
        super().__init__()
        self.heads = D // 32
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, n, L, D/n)
        x = attend(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).reshape(B, L, D))


class Layer(nn.Module):
    """A transformer block: attention between positions, then an MLP at each."""

    def __init__(self, D):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(D), CausalAttention(D)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Prior(nn.Module):
    """p(codes | y): a transformer that reads the grid row by row and predicts the next code."""

    def __init__(self, K, h, w, classes, D, layers):
        super().__init__()
        self.code, self.label = nn.Embedding(K, D), nn.Embedding(classes + 1, D)
        self.start = nn.Parameter(torch.zeros(D))  # stands before the first code
        self.place = nn.Parameter(torch.zeros(h * w, D))
        self.layers = nn.Sequential(*[Layer(D) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, K)
        for embedding in (self.code, self.label):
            nn.init.normal_(embedding.weight, std=0.1)
        nn.init.zeros_(self.head.weight)  # a uniform start: log2(K) bits a code
        nn.init.zeros_(self.head.bias)

    def forward(self, codes, y):
        """Codes (B, n) that are known, classes (B,) -> logits (B, n + 1, K): output i is of code i,
        given those before it; at most h w of them."""
        x = torch.cat([self.start.expand(len(y), 1, -1), self.code(codes)], 1)  # (B, n + 1, D)
        x = x[:, :len(self.place)]
        x = x + self.place[:x.shape[1]] + self.label(y)[:, None]
        return self.head(self.norm(self.layers(x)))

    def log_prob(self, codes, y):
        """log p(codes | y) in nats (B,), codes (B, h, w)."""
        codes = codes.flatten(1)
        logits = self(codes, y).float()  # (B, h w, K)
        return -F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").sum(1)


# ---- 3. The decoder's density of an image given its codes ----------------------------------------


def log_bin(f, mean, log_scale, K):
    """log of a logistic's mass between the edges of the bin around f, without cancellation:
    sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a))."""
    inverse = torch.exp(-log_scale.clamp(min=-7))
    a, b = inverse * (f - mean + 1 / (K - 1)), inverse * (f - mean - 1 / (K - 1))
    lowest, highest = f < -1 + 1 / K, f > 1 - 1 / K
    both = torch.log(-torch.expm1(-inverse * (2 / (K - 1))))
    return (torch.where(highest, 0.0, F.logsigmoid(a)) + torch.where(lowest, 0.0, F.logsigmoid(-b))
            + torch.where(lowest | highest, 0.0, both))


# ---- 4. The sampler ------------------------------------------------------------------------------


@torch.no_grad()
def sample_codes(prior, y, uniform, temperature=1.0, w=1.0):
    """Grids of codes (B, h w), code after code, for classes y (B,); uniform (B, h w): the dice. If
    w is not 1, logits = none + w (cond - none), with the class and without (Ho & Salimans 2022)."""
    none = torch.full_like(y, prior.label.num_embeddings - 1)
    codes = torch.zeros(len(y), 0, dtype=torch.long, device=y.device)
    for i in range(uniform.shape[1]):
        logits = prior(codes, y)[:, -1].float()  # (B, K)
        if w != 1:
            other = prior(codes, none)[:, -1].float()
            logits = other + w * (logits - other)
        codes = torch.cat([codes, draw(logits, temperature, uniform[:, i])[:, None]], 1)
    return codes


def draw(out, temperature, uniform):
    """Numbers 0..K-1 (B,) from logits (B, K), by where uniform (B,) falls among the summed
    probabilities."""
    p = F.softmax(out.float() / temperature, -1).cumsum(-1)
    return torch.searchsorted(p, uniform[:, None] * p[:, -1:]).squeeze(1).clamp(
        max=out.shape[1] - 1)


# ---- 5. Train ------------------------------------------------------------------------------------


class Model(nn.Module):
    """Both stages."""

    def __init__(self, args):
        super().__init__()
        codebook = Rounding(args.fsq_levels) if args.codebook == "fsq" else Codebook(
            args.codebook_size, args.code_dim, args.beta, args.decay, args.codebook == "loss")
        self.K, self.grid = codebook.K, (args.shape[1] // 4, args.shape[2] // 4)
        self.autoencoder = Autoencoder(args.shape[0], args.width, args.blocks, codebook)
        self.prior = Prior(self.K, *self.grid, args.classes, args.prior_width, args.prior_layers)


class CodesStage(nn.Module):
    """The first stage, for fit: batches of images, the loss, and what the bar shows."""

    name, unit = "codes", "squared error"

    def __init__(self, args, model, images):
        super().__init__()
        self.net, self.args, self.images = model.autoencoder, args, images
        self.steps, self.batch_size, self.lr = args.steps, args.batch_size, args.lr
        self.used = self.before = torch.zeros(model.K, dtype=torch.long, device=args.device)

    def batch(self, step):
        if step % max(1, len(self.images) // self.batch_size) == 0:  # an epoch: count codes anew
            self.used, self.before = torch.zeros_like(self.used), self.used
        pick = torch.randint(len(self.images), (self.batch_size,), device=self.args.device)
        return (to_float(self.images[pick[RANK::WORLD]]),)  # (B, C, H, W)

    def forward(self, x):
        """What to minimise, and the squared error."""
        image, centre, log_scale, codes, extra = self.net(x)
        error = F.mse_loss(image, x)
        k = codes.flatten()
        self.used.index_add_(0, k, torch.ones_like(k))
        return error + extra - log_bin(x, centre, log_scale, 256).mean(), error

    def text(self):
        used = (self.before if self.before.any() else self.used).clone()
        if WORLD > 1:
            dist.all_reduce(used)
        return f", {(used > 0).sum()} of {len(used)} codes used, perplexity {perplexity(used):.0f}"

    def picture(self):
        return pairs(self.net, self.images[:32])


class PriorStage(nn.Module):
    """The second stage: batches of grids of codes with their classes."""

    name, unit = "prior", "bits a code"

    def __init__(self, args, model, codes, labels):
        super().__init__()
        self.net, self.args = model.prior, args
        self.model = (model,)  # a tuple, so that the first stage's weights do not count as its own
        self.codes, self.labels = codes, labels
        self.steps, self.batch_size, self.lr = args.prior_steps, args.prior_batch, args.prior_lr

    def batch(self, step):
        pick = torch.randint(len(self.codes), (self.batch_size,), device=self.args.device)
        drop = torch.rand(self.batch_size, device=self.args.device)
        # 1 label in 10 becomes "none", so that the model learns p(codes) too, for guidance
        y = torch.where(drop < 0.1, self.args.classes, self.labels[pick])
        return self.codes[pick[RANK::WORLD]], y[RANK::WORLD]

    def forward(self, codes, y):
        bits = -self.net.log_prob(codes, y).mean() / (codes[0].numel() * math.log(2))
        return bits, bits

    def text(self):
        return f" (uniform {math.log2(self.net.head.out_features):g})"

    def picture(self):
        x = new_images(self.args, self.model[0], class_labels(self.args, 40))
        return grid(x, 8 if self.args.classes else 10)


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
    """Trains both stages and returns the model; ckpt: go on."""
    if ckpt and "optimizer" not in ckpt:
        die("--resume: the checkpoint was made to sample, and cannot be trained further")
    images, labels = load_data(args, "train")  # (N, C, H, W) uint8, (N,) int64
    if args.unconditional or labels is None:
        labels = torch.zeros(len(images), dtype=torch.long, device=args.device)
        args.classes = 0
    else:
        args.classes = int(labels.max()) + 1
    args.shape = list(images.shape[1:])
    if args.shape[1] % 4 or args.shape[2] % 4:
        die(f"--data {args.data}: images of {args.shape[1]} x {args.shape[2]}, but a code stands "
            "for 4 x 4 pixels: height and width must be multiples of 4")
    torch.manual_seed(args.seed)
    model = Model(args).to(args.device).eval()
    state = ckpt or dict(file=NAME, part="", step=0, history={})
    state["config"] = {k: getattr(args, k) for k in CONFIG}
    if ckpt:
        load_state(model, ckpt, "model")
    elif args.codebook != "fsq":  # the codebook starts from vectors of the data
        some = images[torch.randperm(len(images))[:1000].to(args.device)]
        with torch.no_grad():
            model.autoencoder.codebook.begin(model.autoencoder.encode(to_float(some)))
    if state["part"] == "prior" and state["step"] >= args.prior_steps:
        die(f"--resume: all {args.prior_steps} steps are done; ask for more with --prior-steps")
    say(f"{len(images):,} of {args.data}, shape {args.shape}, {args.classes} classes")
    if state["part"] != "prior" and not fit(args, model, CodesStage(args, model, images), state):
        sys.exit(0)
    codes = codes_of(model, images)  # all of them, once
    fit(args, model, PriorStage(args, model, codes, labels), state)
    return model


# ---- 6. Sample, reconstruct, measure -------------------------------------------------------------


def class_labels(args, num):
    """Labels (num,), class by class, all classes as often as num allows; zeros without classes."""
    return torch.arange(num) * max(1, args.classes) // num


@torch.no_grad()
def codes_of(model, images):
    """Codes (N, h, w) of images (N, C, H, W) uint8; in float32, unlike training."""
    net = model.autoencoder
    return torch.cat([net.codebook(net.encode(to_float(part)))[1] for part in images.split(500)])


@torch.no_grad()
def decoded(model, codes):
    """What the decoder says of codes (N, h, w): images, centres, log scales (N, C, H, W)."""
    net = model.autoencoder
    found = [net.decode(net.codebook.lookup(part)) for part in codes.split(500)]
    return [torch.cat(f) for f in zip(*found)]


def new_images(args, model, labels):
    """Images (N, C, H, W) uint8, of labels (N,). The dice are thrown on the CPU: the same whatever
    the device."""
    rng = torch.Generator().manual_seed(args.seed)
    uniform = torch.rand(len(labels), math.prod(model.grid), generator=rng)
    w, codes = args.guidance if args.classes else 1.0, []
    for y, dice in zip(*(a.to(args.device).split(500) for a in (labels, uniform))):
        with autocast(args):
            codes.append(sample_codes(model.prior, y, dice, args.temperature, w))
    return to_uint8(decoded(model, torch.cat(codes).view(-1, *model.grid))[0])


def sample(args, model):
    """Samples as .npz and .png, a row per class."""
    labels = class_labels(args, args.num)
    start = time.time()
    x = new_images(args, model, labels)
    say(f"{args.num} samples in {time.time() - start:.1f} s")
    save_npz(args.save or args.out / "samples.npz", x.permute(0, 2, 3, 1).cpu().numpy(),
             labels=labels.numpy())
    cols = max(1, min(10, args.num // args.classes)) if args.classes else 10
    pick = torch.cat([(labels == c).nonzero()[:cols, 0] for c in range(args.classes)]
                     or [torch.arange(min(100, args.num))])
    save_png(args.out / "samples.png", grid(x.cpu()[pick], cols)[None])
    say(f"samples.png in {args.out}\n"
        f"now try: python {NAME}.py --reconstruct --bpd --out {args.out}")


def test_set(args, num=None):
    """Images (N, C, H, W) uint8 and labels (N,) of the test set, checked against the model."""
    images, labels = load_data(args, "test")
    check_shape(args, args.data, images)
    if labels is None or not args.classes:
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    return images[:num], labels[:num].clamp(max=args.classes)  # a class never seen counts as none


def check_shape(args, name, images):
    if list(images.shape[1:]) != list(args.shape):
        die(f"{name}: images of {list(images.shape[1:])}, but the model was trained on "
            f"{args.shape}")


@torch.no_grad()
def bits_of(args, model, codes, labels):
    """- log2 p(codes | y) (N,), codes (N, h, w)."""
    found = []
    for part, y in zip(codes.split(500), labels.split(500)):
        with autocast(args):
            found.append(-model.prior.log_prob(part, y) / math.log(2))
    return torch.cat(found)


def bound(args, model):
    """Over the test set: squared error, usage of the codes, and an upper bound on bits/dim, given
    the class. p(x | y) is a sum over all grids of codes; the one that the encoder chooses is a
    single term of it, so -log p(x | y) <= -log p(codes | y) - log p(x | codes)."""
    images, labels = test_set(args)
    codes = codes_of(model, images)
    used = torch.bincount(codes.flatten(), minlength=model.K)
    error, image = 0.0, 0.0
    for part, k in zip(images.split(500), codes.split(500)):
        x, (back, centre, log_scale) = to_float(part), decoded(model, k)
        error += float((back - x).square().sum()) / images.numel()
        image -= float(log_bin(x, centre, log_scale, 256).sum()) / images.numel() / math.log(2)
    prior = float(bits_of(args, model, codes, labels).mean()) / images[0].numel()
    say(f"test set: squared error {error:.5f}; {(used > 0).sum()} of {model.K} codes used, "
        f"perplexity {perplexity(used):.0f}\n"
        f"at most {prior + image:.4f} bits/dim: codes {prior:.4f}, image given codes {image:.4f}")


def pairs(autoencoder, images):
    """A picture: rows of 16 images, and below each row the same from their codes."""
    images = images[:max(16, len(images) // 16 * 16)]  # full rows
    with torch.no_grad():
        back = autoencoder(to_float(images))[0]
    both = torch.stack([images.cpu(), to_uint8(back).cpu()], 1)  # (N, 2, C, H, W)
    rows = [part.transpose(0, 1).flatten(0, 1) for part in both.split(16)]
    return np.concatenate([grid(row, len(row) // 2, 1100) for row in rows])


def reconstruct(args, model):
    """Five pictures of the first stage: reconstruction, codebook, usage, codes, interpolation."""
    images, _ = test_set(args)
    h, w = model.grid
    codes = codes_of(model, images)
    save_png(args.out / "reconstruction.png", pairs(model.autoencoder, images[:64])[None])
    # what a code stands for: put into the middle of a black image's codes
    used = torch.bincount(codes.flatten(), minlength=model.K)
    order = used.argsort(descending=True)
    alone = codes_of(model, torch.zeros_like(images[:1])).repeat(model.K, 1, 1)
    alone[:, h // 2, w // 2] = order
    i, j = h // 2 * 4 - 4, w // 2 * 4 - 4
    x = to_uint8(decoded(model, alone)[0])[:, :, max(0, i):i + 12, max(0, j):j + 12]
    save_png(args.out / "codebook.png", grid(x, 24)[None])
    part = used[order].cpu().double() / int(used.sum())
    rank = range(1, int((part > 0).sum()) + 1)  # of those that are used
    save_png(args.out / "usage.png", plot(
        {"share": (rank, part[:len(rank)].numpy()),
         "if all were equal": (rank, [1 / model.K] * len(rank))},
        "codes, most used first", log=True)[None])
    save_png(args.out / "codes.png", numbers(images[:8].cpu(), codes[:8].cpu(), model.K)[None])
    # between two images: of their pixels, of z, and of z quantised
    rows, t = [], torch.linspace(0, 1, 9, device=images.device).view(-1, 1, 1, 1)
    for a, b in images[torch.arange(6) % len(images)].view(3, 2, *args.shape):
        with torch.no_grad():
            za, zb = model.autoencoder.encode(to_float(torch.stack([a, b])))
            z = (1 - t) * za + t * zb  # (9, h, w, D)
            q = model.autoencoder.codebook(z)[0]
            z = z.tanh() if args.codebook == "fsq" else z  # as the decoder knows it
            plain, quantised = (model.autoencoder.decode(v)[0] for v in (z, q))
        rows += [(1 - t) * to_float(a) + t * to_float(b), plain, quantised]
    save_png(args.out / "interpolation.png", stack([
        caption("three rows a pair: pixels mixed, z mixed, z mixed and quantised", 900),
        grid(to_uint8(torch.cat(rows)), 9)])[None])
    say(f"pictures in {args.out}: reconstruction, codebook, usage, codes, interpolation")


def numbers(images, codes, K):
    """Images (N, C, H, W) and, beside each, its codes (N, h, w) as numbers: a picture."""
    (_, h, w), digits, tiles = codes.shape, len(str(K - 1)), []
    cell = 8 * digits + 8  # pixels for a number
    for image, code in zip(images, codes):
        k = max(1, h * cell // image.shape[1])
        left = grid(image[None], 1, k * image.shape[2])
        right = np.full((max(h * cell, left.shape[0]), w * cell, 3), 255, np.uint8)
        for i in range(h):
            for j in range(w):
                draw_text(right[:, :(j + 1) * cell], f"{code[i, j]:{digits}}", j * cell + 4,
                          i * cell + cell // 2 - 5)
        left = np.pad(left, ((0, len(right) - len(left)), (0, 8), (0, 0)), constant_values=255)
        tiles.append(np.concatenate([left, right], 1))
    tiles += [np.full_like(tiles[0], 255)] * (len(tiles) % 2)
    return np.concatenate([np.concatenate(pair, 1) for pair in zip(tiles[::2], tiles[1::2])])


# ---- 7. Compress (slide VQ-VAE: "compress the image into ... discrete representation") -----------

HEAD = struct.Struct("<4sIHHI16s")  # magic, images, h, w, K, digest of the model: 32 bytes


def model_digest(model):
    """16 bytes that name the autoencoder: codes of one mean nothing to another."""
    parts = model.autoencoder.state_dict()
    return hashlib.md5(b"".join(parts[k].cpu().numpy().tobytes() for k in sorted(parts))).digest()


def pack(codes, K):
    """Whole numbers 0..K-1 (N,) -> bytes, ceil(log2 K) bits each."""
    bits = codes[:, None] >> np.arange(max(1, (K - 1).bit_length())) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def unpack(data, count, K):
    """The reverse of pack, for count numbers."""
    size = max(1, (K - 1).bit_length())
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * size).reshape(count, size)
    return bits.astype(np.int64) @ (1 << np.arange(size))


def compress(args, model):
    """Images of an .npz file -> a file of codes; the ratio, and what an ideal coder would need."""
    images = torch.from_numpy(own_data(str(args.compress), "--compress")[0].copy()).to(args.device)
    check_shape(args, args.compress, images)
    codes = codes_of(model, images)
    data = HEAD.pack(b"VQ1\n", len(images), *model.grid, model.K, model_digest(model))
    data += pack(codes.flatten().cpu().numpy(), model.K)
    data += struct.pack("<I", zlib.crc32(data))
    path = args.save or args.out / "compressed.vq"
    write_whole(path, data)
    none = torch.full((len(images),), args.classes, device=args.device)
    ideal = HEAD.size + 4 + float(bits_of(args, model, codes, none).cpu().double().sum()) / 8
    say(f"{path}: {images.numel():,} bytes of pixels in {len(data):,} bytes, 1/"
        f"{images.numel() / len(data):.1f}; an ideal coder with the prior: {ideal:,.0f} bytes, 1/"
        f"{images.numel() / ideal:.1f}")


def decompress(args, model):
    """A file of codes -> images, as an .npz file."""
    data = args.decompress.read_bytes()
    head = data[:HEAD.size].ljust(HEAD.size, b"\0")
    magic, N, h, w, K, digest_ = HEAD.unpack(head)
    if magic != b"VQ1\n":
        die(f"{args.decompress} is not a file that --compress wrote")
    size = (N * h * w * max(1, (K - 1).bit_length()) + 7) // 8
    if len(data) != HEAD.size + size + 4 or zlib.crc32(data[:-4]) != int.from_bytes(
            data[-4:], "little"):
        die(f"{args.decompress} is cut off or altered")
    if (digest_, h, w, K) != (model_digest(model), *model.grid, model.K):
        die(f"{args.decompress} was written with another checkpoint")
    codes = unpack(data[HEAD.size:-4], N * h * w, K)
    x = to_uint8(decoded(model, torch.from_numpy(codes).to(args.device).view(N, h, w))[0])
    path = args.save or args.out / "decompressed.npz"
    save_npz(path, x.permute(0, 2, 3, 1).cpu().numpy())
    say(f"{path}: {N} images")


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
    verbs = (args.train, args.sample, args.reconstruct, args.bpd, args.compress, args.decompress,
             args.export)
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
        for key in ("data", "size", "codebook", "codebook_size", "code_dim", "fsq_levels", "width",
                    "blocks", "prior_width", "prior_layers", "unconditional"):
            if getattr(args, key) != ckpt["config"][key]:
                die(f"--{key.replace('_', '-')} {getattr(args, key)}: {path} was trained with "
                    f"{ckpt['config'][key]}")
        say(f"from {path}, step {ckpt['step']:,} of the {ckpt['part']}")
    try:
        setup(args)
        if args.train:
            model = train(args, ckpt)
        else:
            model = Model(args).to(args.device).eval()
            load_state(model, ckpt, "model")
        if RANK > 0:
            time.sleep(1)  # a thread of gloo that still holds a tensor would abort a quicker exit
            return
        if args.export:
            ckpt = read_checkpoint(args.out / "model.pt")
            if not args.train or (ckpt["part"], ckpt["step"]) == ("prior", args.prior_steps):
                small = {k: ckpt[k] for k in ("file", "config", "part", "step")}
                small["model"] = {k: v.half() for k, v in ckpt["model"].items()}
                save_checkpoint(args.export, small)
        for wanted, verb in ((args.train or args.bpd, bound), (args.train or args.sample, sample),
                             (args.reconstruct, reconstruct), (args.compress, compress),
                             (args.decompress, decompress)):
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
