"""Text to image by diffusion in a compressed space: Stable Diffusion and Flux in miniature.

An autoencoder makes an image a small grid of latents; a network, told a text, learns to remove
noise from them. Once it can, noise and a text become latents, and those an image.

Slides     Large scale diffusion models; Latent diffusion; Stable Diffusion 1; Note: add time
           dependency; Unet in Stable Diffusion 1; SiLU; Flux; Learning better prompts
Equations  noised       z_t = a_t z_0 + s_t eps
           diffusion    a_t^2 = abar_t = prod_{i=1..t} (1 - beta_i), s_t^2 = 1 - abar_t
           flow         a_t = 1 - t, s_t = t:  from data to noise in a straight line
           answer       eps;  z_0;  v = a_t eps - s_t z_0;  or the flow's velocity eps - z_0
           loss         |f(z_t, t, text) - answer|^2
           step         z_s = a_s z_0 + s_s eps, both as guessed at t: DDIM; for a flow, Euler
           guidance     out = none + w (cond - none), `none` from an empty text
Notation   x            x        (B, C, H, W)    image in [-1, 1]
           z_0, z_t     z0, zt   (B, D, h, w)    latents, h = H/4, w = W/4, D = 4 as on the slide
           t            t        (B,)            0 clean, 1 noise; the slides' t over T = 1000
           a_t, s_t     a, s                     how much of z_0 and of noise is in z_t
           text         text     (B, N)          tokens; context (B, N, D') the vectors made of them
                        facts    (B, 5, 2)       what stands at five places of a scene
Run        python latent_diffusion.py --train                    all parts, samples, a report
           python latent_diffusion.py --prompt "a red seven left of a blue two"
           python latent_diffusion.py --init IMG --strength 0.6 --prompt TEXT
           python latent_diffusion.py --inpaint IMG --mask M --prompt TEXT
           python latent_diffusion.py --interpolate TEXT1 TEXT2
           python latent_diffusion.py --train --backbone dit --objective flow --out out/flux
           python latent_diffusion.py --describe --size paper    the slide's U-Net, module by module
Expect     scenes of two digits. On 2 CPU cores, 10 minutes: everything asked for is seen in 0.99 of
           images, in 0.90 if training never showed such digits in such colours; the enclosed model,
           18 minutes: 0.999 and 0.99. GPU: runs, not timed. In out/latent_diffusion/: model.pt,
           samples (.png, .npz), trajectory, guidance, loss_by_t, attention, reconstruction (.png),
           loss (.png, .csv).
Left out   the adversarial and perceptual losses of the real first stage, a text encoder trained on
           the web (CLIP, T5), Flux's distilled guidance and its shift of t with resolution
Try        1. --objective eps, x0, v and flow at equal steps: --eval for each.
           2. --latent-dim 2, 4, 16: what the autoencoder loses, the denoiser gains?
           3. --turned 0.5: then "left" or "right" and who is named first say it only together, an
              exclusive or. How many more steps until colours are no longer swapped?
Papers     Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models; Esser
           et al. 2024, Scaling Rectified Flow Transformers; Peebles & Xie 2022, Scalable Diffusion
           Models with Transformers; Song et al. 2021, DDIM; Ho & Salimans 2022, Guidance; Meng et
           al. 2022, SDEdit; Salimans & Ho 2022, Progressive Distillation (v)
"""
import argparse
import collections
import copy
import functools
import gzip
import hashlib
import io
import math
import os
import re
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
        scenes=60_000, width=64, latent_dim=4, codebook_size=512, steps=2000, batch_size=64,
        lr=2e-3, text_length=16, merges=128, text_width=64, text_layers=2, channels=[64, 64],
        coordinates=1, layers=1, groups=8, heads=2, dit_width=128, dit_double=2, dit_single=2,
        patch=1, model_steps=3000, model_batch=64, model_lr=4e-3, ema=0.998, side_width=48,
        side_steps=1500, side_batch=128, side_lr=2e-3, warmup=50, guidance=3.0,
        sample_steps=25, num=8, every=500),
    "base": dict(  # a GPU
        scenes=200_000, width=128, latent_dim=4, codebook_size=1024, steps=20_000, batch_size=256,
        lr=1e-3, text_length=16, merges=128, text_width=256, text_layers=4, channels=[192, 384],
        coordinates=1, layers=2, groups=32, heads=8, dit_width=384, dit_double=4, dit_single=8,
        patch=1, model_steps=50_000, model_batch=512, model_lr=3e-4, ema=0.9995, side_width=96,
        side_steps=5000, side_batch=512, side_lr=1e-3, warmup=1000, guidance=3.0,
        sample_steps=25, num=8, every=5000),
    "paper": dict(  # Stable Diffusion 1's U-Net; with --heads 24 Flux.1's transformer, but for
        # its 16 channels of latents and its text encoders; pairs of 256 x 256 or more
        scenes=200_000, width=128, latent_dim=4, codebook_size=8192, steps=200_000, batch_size=64,
        lr=1e-4, text_length=77, merges=49_152, text_width=768, text_layers=12,
        channels=[320, 640, 1280, 1280], coordinates=0, layers=2, groups=32, heads=8,
        dit_width=3072, dit_double=19, dit_single=38, patch=2, model_steps=500_000,
        model_batch=2048, model_lr=1e-4, ema=0.9999, side_width=128, side_steps=5000,
        side_batch=512, side_lr=1e-3, warmup=10_000, guidance=7.5, sample_steps=50, num=4,
        every=10_000),
}
CONFIG = [*SIZES["small"], "size", "data", "seed", "autoencoder", "kl", "backbone", "objective",
          "sampler", "shape", "learned", "examples", "turned"]  # what a checkpoint keeps


def parse_args(argv=None, config=None):
    """Every knob. config, from a checkpoint, replaces the defaults; a flag given by hand wins.
    (HERE, NAME, die, positive, share and pick_device are plumbing, at the end of the file.)"""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.error = die
    add = p.add_argument
    # what to do
    add("--train", action="store_true", help="train all parts, then draw and measure")
    add("--sample", action="store_true", help="draw the prompts, or some of our own")
    add("--prompt", action="append", metavar="TEXT", help="what to draw; may be given repeatedly")
    add("--init", type=Path, metavar="IMG", help="image to image: begin from a .png or .npz, "
        "noised by --strength")
    add("--strength", type=float, default=0.6, help="of --init: 1 forgets it, near 0 keeps it")
    add("--inpaint", type=Path, metavar="IMG", help="draw anew where --mask is bright")
    add("--mask", type=Path, metavar="IMG", help="for --inpaint; the right half if left out")
    add("--interpolate", nargs=2, metavar=("TEXT1", "TEXT2"), help="from one text to the other")
    add("--enhance", metavar="TEXT", help="fill a short prompt up to a whole caption, draw both")
    add("--eval", action="store_true", help="how often is the right thing drawn?")
    add("--attention", action="store_true", help="where each word of the first prompt is looked at")
    add("--sweep", action="store_true", help="the first prompt at guidance 1, 2, 4 and 8")
    add("--describe", action="store_true", help="the network's modules and its parameter count")
    add("--export", type=Path, metavar="PT", help="write the averaged weights alone, as fp16")
    # where, and on what
    add("--data", default="mnist", help="mnist: scenes made of its digits; or a .npz file of your "
        "own with images and captions")
    add("--data-dir", type=Path, default=HERE / "data", help="where data sets lie or are put")
    add("--out", type=Path, default=Path("out") / NAME, help="everything written goes there")
    add("--size", choices=["small", "base", "paper"],
        help="preset for all flags of networks and training; small on a CPU, else base")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    add("--seed", type=int, default=0, help="start of all random numbers")
    add("--compile", action="store_true", help="torch.compile the training: slow start, then fast")
    add("--resume", action="store_true", help="go on from OUT/model.pt")
    add("--every", type=positive, help="checkpoint and picture every so many steps")
    add("--scenes", type=positive, help="how many scenes to train on")
    add("--turned", type=share, default=0.25, help="share of captions in training that begin with "
        "the digit to the right or below")
    # image to latents
    add("--autoencoder", choices=["kl", "vq"], default="kl",
        help="kl: latents near a Gaussian; vq: a codebook, which belongs to the decoder")
    add("--kl", type=float, default=1e-4, help="weight of the KL term, per number of the latents")
    add("--latent-dim", type=positive, help="channels of the latents, the slide's D")
    add("--codebook-size", type=positive, metavar="K", help="of vq")
    add("--width", type=positive, help="channels of encoder and decoder")
    add("--steps", type=positive, help="training length")
    add("--batch-size", type=positive, help="images per step, over all GPUs")
    add("--lr", type=share, help="peak learning rate of AdamW, falling linearly to zero")
    # text to latents
    add("--backbone", choices=["unet", "dit"], default="unet",
        help="unet: Stable Diffusion 1's; dit: Flux's transformer")
    add("--objective", choices=["eps", "x0", "v", "flow"], default="v",
        help="what is predicted: noise, latents, v; or the velocity of a rectified flow")
    add("--text-length", type=positive, metavar="N", help="tokens of text; shorter ones are padded")
    add("--merges", type=positive, help="tokens beyond the 256 bytes, at most")
    add("--text-width", type=positive, help="of the text encoder; a multiple of 32")
    add("--text-layers", type=positive, help="its blocks")
    add("--channels", type=positive, nargs="+", metavar="C",
        help="unet: of each size, from the largest; multiples of groups and heads")
    add("--coordinates", type=int, choices=[0, 1],
        help="unet: whether two channels more tell a latent's row and column")
    add("--layers", type=positive, help="unet: ResnetBlocks a size on the way down")
    add("--groups", type=positive, help="unet: of the group norms")
    add("--heads", type=positive, help="of attention, in both backbones")
    add("--dit-width", type=positive, help="dit: a multiple of 4 heads")
    add("--dit-double", type=positive, help="dit: blocks with streams of their own")
    add("--dit-single", type=positive, help="dit: blocks with one stream")
    add("--patch", type=positive, help="dit: patches of so many latents squared are tokens")
    add("--model-steps", type=positive, help="training length")
    add("--model-batch", type=positive, help="pairs per step, over all GPUs")
    add("--model-lr", type=share, help="peak learning rate")
    add("--ema", type=share, help="decay of the running mean of the weights, which is what samples")
    # the checker of the report
    add("--side-width", type=positive, help="of the checker")
    add("--side-steps", type=positive, help="its training length")
    add("--side-batch", type=positive, help="images per step, over all GPUs")
    add("--side-lr", type=share, help="its peak learning rate")
    add("--warmup", type=positive, help="steps until the peak is reached, in all parts")
    # sampling
    add("--num", type=positive, help="images a prompt")
    add("--save", type=Path, help="where the samples go, by default OUT/samples.npz")
    add("--guidance", type=float, metavar="W", help="uncond + W (cond - uncond): a larger W is "
        "more faithful to the text and less varied; 1 is conditional, 0 unconditional")
    add("--sample-steps", type=positive, help="from noise to image; heun evaluates the network "
        "twice in each")
    add("--sampler", choices=["euler", "heun"], default="euler",
        help="euler, which for diffusion is DDIM; heun, of second order, is for --objective flow")
    p.set_defaults(**(config or {}))
    args = p.parse_args(argv)
    args.size = args.size or ("small" if pick_device(args.device) == "cpu" else "base")
    for key, value in SIZES[args.size].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for wrong, message in (
            (not 0 <= args.seed < 2**63, f"--seed {args.seed}: expected 0 or more, below 2^63"),
            (args.codebook_size < 2, f"--codebook-size {args.codebook_size}: expected 2 or more"),
            (args.width < 2, f"--width {args.width}: expected 2 or more"),
            (args.backbone == "unet" and any(
                c % 2 or c % args.groups or c % args.heads for c in args.channels),
             f"--channels {args.channels}: expected even multiples of --groups {args.groups} and "
             f"--heads {args.heads}"),
            (args.text_width % 32, f"--text-width {args.text_width}: expected a multiple of 32"),
            (args.backbone == "dit" and args.dit_width % (4 * args.heads), f"--dit-width "
             f"{args.dit_width}: expected a multiple of 4 x --heads {args.heads}"),
            (not math.isfinite(args.guidance), "--guidance: expected a finite number"),
            (args.data != "mnist" and args.eval,
             "--eval: only for our own scenes, where it is known what should be seen"),
            (args.data != "mnist" and args.enhance is not None,
             "--enhance: knows the grammar of our own captions only"),
            (not 0 < args.strength <= 1, f"--strength {args.strength}: expected 0 to 1, not 0"),
            (args.mask and not args.inpaint, "--mask: only for --inpaint"),
            (args.sampler == "heun" and args.objective != "flow" and (
                config or args.train and not args.resume),  # else the checkpoint will tell
             "--sampler heun: only for --objective flow"),
            (not args.kl >= 0, f"--kl {args.kl}: expected 0 or more")):
        if wrong:
            die(message)
    return args


# ---- 1. The world of captions --------------------------------------------------------------------
# Two handwritten digits, coloured, and a sentence about them. It is small, and made of parts: so we
# can ask for what was never shown ("a baby daikon radish in a tutu walking a dog") and count.

DIGITS = "zero one two three four five six seven eight nine".split()
COLOURS = {"red": (255, 40, 40), "green": (40, 210, 60), "blue": (70, 90, 255),
           "yellow": (255, 240, 60), "purple": (170, 60, 220), "cyan": (60, 230, 240),
           "orange": (255, 140, 20), "white": (250, 250, 250)}
PLACES = [(16, 16), (16, 8), (16, 24), (8, 16), (24, 16)]  # (row, column): middle, left, right, ...
RELATIONS = {"left of": (1, 2), "right of": (2, 1), "above": (3, 4), "below": (4, 3)}
NONE = (10, 8)  # digit and colour of a place with nothing there


def shown(digit, colour):
    """Whether training shows this digit in this colour: of the 80 pairs, 10 are held out."""
    return (digit + colour) % 8 != 0


def random_facts(n, rng, seen=True, single=0.2):
    """What stands where, facts (n, 5, 2): at each of PLACES digit and colour, or NONE. A share
    `single` has one digit in the middle; the others two, side by side or one above the other. All
    pairs of digit and colour are such that training shows, or (seen=False) none."""
    pairs = np.array([(d, c) for d in range(10) for c in range(8) if shown(d, c) == seen])
    facts, i = np.tile(NONE, (n, 5, 1)), np.arange(n)
    layout = rng.choice(3, n, p=[single, (1 - single) / 2, (1 - single) / 2])
    first, second = pairs[rng.integers(len(pairs), size=(2, n))]
    facts[i, np.array([0, 2, 4])[layout]] = second
    facts[i, np.array([0, 1, 3])[layout]] = first
    return facts


def describe(facts, turn=False, short=False):
    """The caption of one scene's facts (5, 2). turn: begins with the digit to the right or below;
    short: without articles."""
    def thing(place):
        name = f"{list(COLOURS)[facts[place, 1]]} {DIGITS[facts[place, 0]]}"
        return name if short else f"{'an' if name[0] == 'o' else 'a'} {name}"

    at = [p for p in range(5) if facts[p, 0] < 10]
    if len(at) == 1:
        return thing(at[0])
    at = at[::-1] if turn else at
    return f"{thing(at[0])} {next(r for r, p in RELATIONS.items() if [*p] == at)} {thing(at[1])}"


def render(facts, images, labels, rng):
    """Scenes (N, 3, 32, 32) uint8 of facts (N, 5, 2), from MNIST's images (M, 1, 28, 28) and labels
    (M,): each digit 14 x 14, its centre moved by up to a pixel."""
    x = torch.full((len(facts), 3, 32, 32), 16, dtype=torch.uint8)
    rgb = torch.tensor(list(COLOURS.values())).float()
    by_digit = labels.argsort()
    count = torch.bincount(labels, minlength=10)
    for part in np.array_split(np.argwhere(facts[:, :, 0] < 10), len(facts) // 5000 + 1):
        n, place = torch.from_numpy(part).unbind(1)  # scene and place of each thing
        digit, colour = torch.from_numpy(facts[part[:, 0], part[:, 1]]).unbind(1)
        among = (torch.from_numpy(rng.random(len(n))) * count[digit]).long()
        ink = images[by_digit[count.cumsum(0)[digit] - 1 - among]][:, :, 3:25, 3:25].float() / 255
        ink = F.interpolate(ink, size=14, mode="bilinear", antialias=True).clamp(0, 1)
        patch = 16 + ink * (rgb[colour][:, :, None, None] - 16)  # (n, 3, 14, 14)
        moved = torch.from_numpy(rng.integers(-1, 2, (len(n), 2)))
        corner = torch.tensor(PLACES)[place] - 7 + moved
        row, col = (corner.T[..., None] + torch.arange(14)).unbind(0)  # (n, 14) each
        x[n[:, None, None], :, row[:, :, None], col[:, None, :]] = patch.round().byte().permute(
            0, 2, 3, 1)
    return x


# ---- 2. Text as tokens ---------------------------------------------------------------------------


class BytePairs:
    """A byte-pair encoder (Sennrich et al. 2016) on bytes: any text can be written, common words
    are one token. Tokens 0..255 are bytes; 256 + i is the i-th learned pair of earlier tokens."""

    def __init__(self, pairs):
        self.rank = {tuple(pair): 256 + i for i, pair in enumerate(pairs)}
        self.bytes = [bytes([i]) for i in range(256)]
        for a, b in self.rank:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.known = {}

    @staticmethod
    def words(text):
        """Each word with the space before it; joined they are the text, with one space in front.
        An empty text has none."""
        return re.findall(" [^ ]*", f" {text}") if text else []

    @classmethod
    def learn(cls, texts, most):
        """At most so many pairs (a, b), each the one most often side by side, then made one."""
        counts = collections.Counter(word for text in texts for word in cls.words(text))
        words, pairs = {word: list(word.encode()) for word in counts}, []
        while len(pairs) < most:
            found = collections.Counter()
            for word, tokens in words.items():
                for pair in zip(tokens, tokens[1:]):
                    found[pair] += counts[word]
            if not found:
                break
            best = max(found, key=lambda pair: (found[pair], pair))
            words = {w: cls.merge(t, best, 256 + len(pairs)) for w, t in words.items()}
            pairs.append(best)
        return pairs

    @staticmethod
    def merge(tokens, pair, new):
        """tokens, in which new stands wherever the pair stood."""
        out = []
        for token in tokens:
            if out and (out[-1], token) == pair:
                out[-1] = new
            else:
                out.append(token)
        return out

    def encode(self, text):
        """Text -> tokens, a list."""
        return [token for word in self.words(text) for token in self.encode_word(word)]

    def encode_word(self, word):
        if word not in self.known:
            tokens = list(word.encode(errors="replace"))
            while len(tokens) > 1:  # in the order in which pairs were learned
                pair = min(zip(tokens, tokens[1:]), key=lambda p: self.rank.get(p, math.inf))
                if pair not in self.rank:
                    break
                tokens = self.merge(tokens, pair, self.rank[pair])
            self.known[word] = tokens
        return self.known[word]

    def decode(self, tokens):
        """Tokens -> text; bytes that are no text become a mark."""
        return b"".join(self.bytes[t] for t in tokens).decode(errors="replace")[1:]


# ---- 3. Images as latents (slide Latent diffusion: "first compressing the image") ----------------


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


class Residual(nn.Module):
    """x + convolutions of x (B, D, h, w), as in the paper: 3 x 3, then 1 x 1."""

    def __init__(self, D):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(D, D, 3, padding=1), nn.Conv2d(D, D, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class VariationalAutoencoder(nn.Module):
    """Image to latents, a quarter as high and wide, and back. A latent sees 10 x 10 pixels and no
    more. kl: a little noise and a pull towards N(0, I) keep latents from being wild; vq: the
    decoder first replaces each by the nearest vector of a codebook (Rombach et al. 2022)."""

    def __init__(self, C, D, width, codebook=None):
        super().__init__()
        self.codebook, W = codebook, width
        self.encoder = nn.Sequential(
            nn.Conv2d(C, W // 2, 4, 2, 1), nn.SiLU(), nn.Conv2d(W // 2, W, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(W, W, 1), nn.SiLU(), nn.Conv2d(W, D if codebook else 2 * D, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(D, W, 3, padding=1), Residual(W), Residual(W), nn.SiLU(),
            nn.ConvTranspose2d(W, W // 2, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(W // 2, C, 4, 2, 1))
        # latents for diffusion are (z - shift) / scale: mean 0 and standard deviation 1 over the
        # training set, so that a noise schedule fits (Stable Diffusion's 0.18215 is its 1 / scale)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def moments(self, x):
        """Images (B, C, H, W) in [-1, 1] -> mean and log variance of z (B, D, h, w)."""
        z = self.encoder(x).float()
        return (z, None) if self.codebook else z.chunk(2, 1)

    def to_image(self, z):
        """z (B, D, h, w) -> images (B, C, H, W), and the codebook's loss."""
        extra = z.new_zeros(())
        if self.codebook:
            z, _, extra = self.codebook(z.permute(0, 2, 3, 1))
            z = z.permute(0, 3, 1, 2)
        return self.decoder(z).float(), extra

    def forward(self, x):
        """Images -> images, and what else is to be minimised: KL of N(mean, var) from N(0, I), mean
        of all numbers; or the codebook's loss."""
        mean, log_var = self.moments(x)
        if self.codebook:
            return self.to_image(mean)
        log_var = log_var.clamp(-20, 10)
        z = mean + torch.exp(log_var / 2) * torch.randn_like(mean) if self.training else mean
        # KL = (mean^2 + var - 1 - log var) / 2
        return self.to_image(z)[0], (mean.square() + log_var.exp() - 1 - log_var).mean() / 2

    def encode(self, x):
        """Images (B, C, H, W) in [-1, 1] -> latents (B, D, h, w) of unit scale."""
        return (self.moments(x)[0] - self.shift) / self.scale

    def decode(self, z):
        """Latents of unit scale -> images (B, C, H, W), about [-1, 1]."""
        return self.to_image(z * self.scale + self.shift)[0]


# ---- 4. From noise to latents: one frame for diffusion and flow ----------------------------------
# Both mix latents z_0 with noise: z_t = a_t z_0 + s_t eps. Diffusion: a_t = sqrt(abar_t), s_t =
# sqrt(1 - abar_t). Rectified flow: a_t = 1 - t, s_t = t, a straight line. In both time runs from 0,
# clean, to 1, noise.

T = 1000  # diffusion's steps


@functools.cache  # a device has them once
def levels(device):
    """sqrt(abar_t) and sqrt(1 - abar_t) for t = 0..T, (T+1,) each: Stable Diffusion's schedule, in
    which sqrt(beta) is linear. (Its sqrt(abar_T) is 0.068, not 0: a little of z_0 shows in z_T.)"""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2
    # abar_t = prod_{i=1..t} (1 - beta_i), abar_0 = 1
    abar = torch.cat([torch.ones(1).double(), (1 - beta).cumprod(0)])
    return abar.sqrt().float().to(device), (1 - abar).sqrt().float().to(device)


def level(t, objective):
    """a_t and s_t (B,) for t (B,) in 0..1."""
    if objective == "flow":
        return 1 - t, t
    step = (t * T).round().long().clamp(min=(t > 0).long())  # what is not clean is at least at 1
    a, s = (table[step] for table in levels(t.device))
    return a, s


def draw_times(n, objective, device):
    """Times for training (n,): diffusion's 1..T, over T, all alike; for a flow logit-normal, more
    in the middle (Esser et al. 2024), where the direction is hardest to tell."""
    if objective == "flow":
        return torch.sigmoid(torch.randn(n, device=device))
    return torch.randint(1, T + 1, (n,), device=device) / T


def answer_of(z0, eps, a, s, objective):
    """What the network shall say; z0, eps (B, ...), a and s that multiply them."""
    return {"eps": eps, "x0": z0, "v": a * eps - s * z0, "flow": eps - z0}[objective]


def ends_of(out, zt, a, s, objective):
    """z_0 and eps that an answer stands for: the equations above, with z_t, solved for them."""
    if objective == "eps":
        return (zt - s * out) / a, out
    if objective == "x0":
        return out, (zt - a * out) / s
    if objective == "v":  # as a^2 + s^2 = 1
        return a * zt - s * out, s * zt + a * out
    return zt - s * out, zt + a * out  # as a + s = 1


# ---- 5. The U-Net of Stable Diffusion 1 (slide Unet in Stable Diffusion 1) -----------------------
# Modules have the slide's names, those of the library diffusers: same weights, same output.


class Timesteps(nn.Module):
    """Fourier basis of t (B,) in 0..1000 -> (B, width): cosines, then sines."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, t):
        half = self.width // 2
        freq = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        angle = t[:, None] * freq  # (B, width/2)
        return torch.cat([angle.cos(), angle.sin()], 1)


class TimestepEmbedding(nn.Module):
    """Two linear layers on the Fourier basis (slide Note: add time dependency)."""

    def __init__(self, width, D):
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D)

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(x)))


class Dims(NamedTuple):
    """What all blocks share: length of the time's and of the text's vectors, heads, norm groups. A
    group must hold several channels, or the norm undoes what the time has added to one."""
    time: int
    text: int
    heads: int
    groups: int


class ResnetBlock2D(nn.Module):
    """Two convolutions and a shortcut; the time enters as one scalar a channel, as the slide says.
    silu(x) = x sigmoid(x). (The slide's sigmoid e^x/(1 + e^x) is inf/inf in code for large x.)"""

    def __init__(self, C_in, C_out, dims):
        super().__init__()
        self.norm1 = nn.GroupNorm(dims.groups, C_in)
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(dims.time, C_out)
        self.norm2 = nn.GroupNorm(dims.groups, C_out)
        self.conv2 = nn.Conv2d(C_out, C_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(self, x, temb):
        """x (B, C_in, H, W), temb (B, time) -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def attend(q, k, v, **mask):
    """softmax(q k^T / sqrt(d)) v: (B, heads, L, d) each. On a CPU in float32: in training PyTorch's
    bf16 kernel is five times slower there."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **mask)
    return F.scaled_dot_product_attention(q, k, v, **mask)


class CrossAttention(nn.Module):
    """Places x (B, n, C) look at context (B, m, D), or at one another."""

    def __init__(self, C, D, heads):
        super().__init__()
        self.heads, self.seen = heads, None  # a list, if attention is to be looked at
        self.to_q, self.to_k = nn.Linear(C, C, bias=False), nn.Linear(D, C, bias=False)
        self.to_v = nn.Linear(D, C, bias=False)
        self.to_out = nn.Sequential(nn.Linear(C, C))

    def forward(self, x, context=None):
        context = x if context is None else context
        split = lambda a: a.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, n, C/heads)
        q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
        if self.seen is not None:
            weight = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1)
            self.seen.append(weight.mean(1))  # (B, n, m)
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Half of the numbers, each times gelu of one of the other half (Shazeer 2020)."""

    def __init__(self, C_in, C_out):
        super().__init__()
        self.proj = nn.Linear(C_in, 2 * C_out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """An MLP at each place."""

    def __init__(self, C):
        super().__init__()
        self.net = nn.Sequential(GEGLU(C, 4 * C), nn.Identity(), nn.Linear(4 * C, C))

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Attention among places, attention to the text, an MLP."""

    def __init__(self, C, D, heads):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(C), CrossAttention(C, C, heads)
        self.norm2, self.attn2 = nn.LayerNorm(C), CrossAttention(C, D, heads)
        self.norm3, self.ff = nn.LayerNorm(C), FeedForward(C)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """A transformer block on the H W places of a feature map."""

    def __init__(self, C, dims):
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(dims.groups, C, eps=1e-6), nn.Conv2d(C, C, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(C, dims.text, dims.heads)])
        self.proj_out = nn.Conv2d(C, C, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x)).flatten(2).mT  # (B, H W, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.mT.reshape(x.shape))


class Downsample2D(nn.Module):
    """Half as high and wide."""

    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, 2, 1)

    def forward(self, x):
        return self.conv(x)


class Upsample2D(nn.Module):
    """Twice as high and wide."""

    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock2D(nn.Module):
    """ResnetBlocks, each followed by attention if it `attends`; then half as high and wide, if
    `down`. Everything that comes out on the way is kept for the way up."""

    def __init__(self, C_in, C, dims, layers, attends, down):
        super().__init__()
        if attends:
            self.attentions = nn.ModuleList([Transformer2DModel(C, dims) for _ in range(layers)])
        self.resnets = nn.ModuleList([ResnetBlock2D(C if i else C_in, C, dims)
                                      for i in range(layers)])
        if down:
            self.downsamplers = nn.ModuleList([Downsample2D(C)])

    def forward(self, x, temb, context):
        kept = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
            kept.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            kept.append(x)
        return x, kept


class UpBlock2D(nn.Module):
    """The way up: each ResnetBlock gets, besides what comes from below, what was kept."""

    def __init__(self, C_below, C, C_kept, dims, layers, attends, up):
        super().__init__()
        if attends:
            self.attentions = nn.ModuleList([Transformer2DModel(C, dims) for _ in range(layers)])
        self.resnets = nn.ModuleList([
            ResnetBlock2D((C if i else C_below) + (C_kept if i == layers - 1 else C), C, dims)
            for i in range(layers)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample2D(C)])

    def forward(self, x, kept, temb, context):
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, kept.pop()], 1), temb)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class CrossAttnDownBlock2D(DownBlock2D):
    """With attention to the text."""


class CrossAttnUpBlock2D(UpBlock2D):
    """With attention to the text."""


class UNetMidBlock2DCrossAttn(nn.Module):
    """At the bottom: ResnetBlock, attention, ResnetBlock."""

    def __init__(self, C, dims):
        super().__init__()
        self.attentions = nn.ModuleList([Transformer2DModel(C, dims)])
        self.resnets = nn.ModuleList([ResnetBlock2D(C, C, dims) for _ in range(2)])

    def forward(self, x, temb, context):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, temb), context), temb)


class UNet2DConditionModel(nn.Module):
    """f(z_t, t, text): a U-Net with attention to the text at all sizes but the smallest. channels:
    of each size; C_in and C: of what goes in and out; D: length of the text's vectors."""

    def __init__(self, C_in, C, channels, layers, heads, D, groups=32):
        super().__init__()
        n, first, dims = len(channels), channels[0], Dims(4 * channels[0], D, heads, groups)
        self.conv_in = nn.Conv2d(C_in, first, 3, padding=1)
        self.time_proj, self.time_embedding = Timesteps(first), TimestepEmbedding(first, dims.time)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(channels):
            attends = i < n - 1 or n == 1
            self.down_blocks.append((CrossAttnDownBlock2D if attends else DownBlock2D)(
                channels[max(0, i - 1)], width, dims, layers, attends, i < n - 1))
        self.mid_block = UNetMidBlock2DCrossAttn(channels[-1], dims)
        for i in reversed(range(n)):
            attends = i < n - 1 or n == 1
            self.up_blocks.append((CrossAttnUpBlock2D if attends else UpBlock2D)(
                channels[min(i + 1, n - 1)], channels[i], channels[max(0, i - 1)], dims, layers + 1,
                attends, i > 0))
        self.conv_norm_out, self.conv_act = nn.GroupNorm(groups, first), nn.SiLU()
        self.conv_out = nn.Conv2d(first, C, 3, padding=1)

    def forward(self, x, t, context):
        """x (B, C_in, h, w), t (B,) in 0..1000, context (B, N, D) -> (B, C, h, w)."""
        temb = self.time_embedding(self.time_proj(t).to(x.dtype))  # (B, 4 channels[0])
        x = self.conv_in(x)
        kept = [x]
        for block in self.down_blocks:
            x, more = block(x, temb, context)
            kept += more
        x = self.mid_block(x, temb, context)
        for block in self.up_blocks:
            x = block(x, kept, temb, context)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


# ---- 6. The transformer of Flux (slide Flux: "transformer-based architecture, flow-based model") -


def rotary(x, place):
    """Turns pairs of numbers of x (B, heads, n, d) by angles that grow with place (n, 2), the row
    for the first half of the pairs and the column for the other: products then depend on
    differences of places alone (Su et al. 2021)."""
    quarter = x.shape[-1] // 4
    freq = 100.0 ** -(torch.arange(quarter, device=x.device) / quarter)
    angle = (place[:, :, None] * freq).flatten(1)  # (n, d/2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, n, d/2) each
    turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.stack(turned, -1).flatten(-2).type_as(x)


def modulate(x, shift, scale):
    """Layer norm without weights of its own: time and text set them, x (B, n, D), others (B, D)."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """n vectors (B, D) from the time and text vector (B, D): shifts, scales and gates; all 0 at the
    start, so that a block begins as the identity (adaLN-Zero, Peebles & Xie 2022)."""

    def __init__(self, D, n):
        super().__init__()
        self.n, self.linear = n, nn.Linear(D, n * D)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vector):
        return self.linear(F.silu(vector)).chunk(self.n, 1)


class Projection(nn.Module):
    """q, k, v (B, heads, n, d) of x (B, n, D); q and k brought to length 1 a number (QK-norm)."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(D, 3 * D)
        self.norm_q, self.norm_k = nn.RMSNorm(D // heads), nn.RMSNorm(D // heads)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.norm_q(q.float()).type_as(v), self.norm_k(k.float()).type_as(v), v


def joint_attention(q, k, v, place, seen=None):
    """Text and image tokens in one row look at one another: (B, heads, n, d) each -> (B, n, D)."""
    q, k = rotary(q, place), rotary(k, place)
    if seen is not None:
        seen.append((q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1).mean(1))
    return attend(q, k, v).transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """Text and image keep weights of their own, but look at one another."""

    def __init__(self, D, heads):
        super().__init__()
        self.seen = None  # a list, if attention is to be looked at
        two = lambda make: nn.ModuleList([make(), make()])  # for text, for image
        self.modulation, self.qkv = two(lambda: Modulation(D, 6)), two(lambda: Projection(D, heads))
        self.out = two(lambda: nn.Linear(D, D))
        self.mlp = two(lambda: nn.Sequential(nn.Linear(D, 4 * D), nn.GELU("tanh"),
                                             nn.Linear(4 * D, D)))

    def forward(self, text, image, vector, place):
        m = [modulation(vector) for modulation in self.modulation]
        parts = [project(modulate(x, *mod[:2]))
                 for project, x, mod in zip(self.qkv, (text, image), m)]
        q, k, v = (torch.cat(both, 2) for both in zip(*parts))
        looked = joint_attention(q, k, v, place, self.seen)  # (B, N + n, D)
        looked = looked.split([text.shape[1], image.shape[1]], 1)
        result = []
        for x, a, mod, out, mlp in zip((text, image), looked, m, self.out, self.mlp):
            x = x + mod[2][:, None] * out(a)
            result.append(x + mod[5][:, None] * mlp(modulate(x, *mod[3:5])))
        return result


class SingleBlock(nn.Module):
    """One row of tokens; attention and MLP side by side."""

    def __init__(self, D, heads):
        super().__init__()
        self.seen = None
        self.modulation, self.qkv = Modulation(D, 3), Projection(D, heads)
        self.mlp, self.out = nn.Linear(D, 4 * D), nn.Linear(5 * D, D)

    def forward(self, x, vector, place):
        shift, scale, gate = self.modulation(vector)
        h = modulate(x, shift, scale)
        looked = joint_attention(*self.qkv(h), place, self.seen)
        both = torch.cat([looked, F.gelu(self.mlp(h), approximate="tanh")], 2)
        return x + gate[:, None] * self.out(both)


class FluxTransformer(nn.Module):
    """f(z_t, t, text) by a transformer on patches of the latents: first blocks with two streams,
    then with one. Time and the mean of the text enter by modulation, the text itself as tokens."""

    def __init__(self, C, D, double, single, heads, D_text, patch):
        super().__init__()
        self.patch = patch
        self.image_in, self.text_in = nn.Linear(C * patch**2, D), nn.Linear(D_text, D)
        self.time_in, self.vector_in = TimestepEmbedding(256, D), nn.Linear(D_text, D)
        self.time_proj = Timesteps(256)
        self.double_blocks = nn.ModuleList([DoubleBlock(D, heads) for _ in range(double)])
        self.single_blocks = nn.ModuleList([SingleBlock(D, heads) for _ in range(single)])
        self.modulation, self.image_out = Modulation(D, 2), nn.Linear(D, C * patch**2)
        nn.init.zeros_(self.image_out.weight)
        nn.init.zeros_(self.image_out.bias)

    def forward(self, x, t, context):
        """x (B, C, h, w), t (B,) in 0..1000, context (B, N, D_text) -> (B, C, h, w)."""
        B, C, h, w = x.shape
        p, N = self.patch, context.shape[1]
        place = torch.cartesian_prod(torch.arange(1.0, h // p + 1, device=x.device),
                                     torch.arange(1.0, w // p + 1, device=x.device))  # (n, 2)
        place = torch.cat([place.new_zeros(N, 2), place])  # all text at one place
        vector = self.time_in(self.time_proj(t).to(x.dtype)) + self.vector_in(context.mean(1))
        text, image = self.text_in(context), self.image_in(F.unfold(x, p, stride=p).mT)  # (B, n, D)
        for block in self.double_blocks:
            text, image = block(text, image, vector, place)
        both = torch.cat([text, image], 1)  # (B, N + n, D)
        for block in self.single_blocks:
            both = block(both, vector, place)
        out = self.image_out(modulate(both[:, N:], *self.modulation(vector)))  # (B, n, C p p)
        return F.fold(out.float().mT, (h, w), p, stride=p)


# ---- 7. Text, network and loss -------------------------------------------------------------------


class TextEncoder(nn.Module):
    """Tokens (B, N) -> vectors (B, N, D), by a small transformer trained with the rest. Pads, one
    for each place, are tokens like others and are not masked, as in Stable Diffusion 1."""

    def __init__(self, vocabulary, N, D, layers):
        super().__init__()
        # places as large as words, N(0, 1): or it would take long to tell whose "red" it is
        self.word = nn.Embedding(vocabulary + N, D)
        self.place = nn.Parameter(torch.randn(N, D))
        self.blocks = nn.Sequential(*[
            nn.TransformerEncoderLayer(D, D // 32, 4 * D, 0.0, "gelu", batch_first=True,
                                       norm_first=True) for _ in range(layers)])
        self.norm = nn.LayerNorm(D)

    def forward(self, text):
        return self.norm(self.blocks(self.word(text) + self.place))


def make_backbone(args):
    """The network that args describe."""
    if args.backbone == "unet":
        return UNet2DConditionModel(args.latent_dim + 2 * args.coordinates, args.latent_dim,
                                    args.channels, args.layers, args.heads, args.text_width,
                                    args.groups)
    return FluxTransformer(args.latent_dim, args.dit_width, args.dit_double, args.dit_single,
                           args.heads, args.text_width, args.patch)


class Denoiser(nn.Module):
    """Text encoder and backbone: f(z_t, t, text). Convolutions do not know where they are, but by
    the zeros at the border; two channels more, the coordinates, tell a U-Net (Liu et al. 2018,
    CoordConv). After 600 steps 0.74 of scenes are right with them, 0.39 without."""

    def __init__(self, args, vocabulary):
        super().__init__()
        self.text = TextEncoder(vocabulary, args.text_length, args.text_width, args.text_layers)
        self.backbone = make_backbone(args)
        self.coordinates = args.coordinates and args.backbone == "unet"

    def forward(self, z, t, context):
        """z (B, D, h, w), t (B,) in 0..1, context (B, N, D') = text(tokens) -> the answer
        (B, D, h, w), in float32."""
        if self.coordinates:
            row, col = (torch.linspace(-1, 1, n, device=z.device) for n in z.shape[2:])
            where = torch.stack(torch.meshgrid(row, col, indexing="ij"))  # (2, h, w)
            z = torch.cat([z, where.expand(len(z), -1, -1, -1)], 1)
        return self.backbone(z, 1000 * t, context).float()


def denoising_loss(net, z0, text, t, eps, objective):
    """|f(z_t, t, text) - answer|^2 of each pair (B,)."""
    a, s = (v.view(-1, 1, 1, 1) for v in level(t, objective))
    zt = a * z0 + s * eps
    out = net(zt, t, net.text(text))
    return (out - answer_of(z0, eps, a, s, objective)).square().mean((1, 2, 3))


# ---- 8. The sampler ------------------------------------------------------------------------------


def make_guess(net, context, none, objective, w):
    """guess(z, t) -> z_0 and eps, as far as the network can tell, for context (B, N, D'); w:
    guidance, away from that of an empty text, none (1, N, D') (Ho & Salimans 2022). z_0 is not
    clipped: latents know no limits."""

    def guess(z, t):
        tt = torch.full((len(z),), t, device=z.device)
        if w in (0, 1):
            out = net(z, tt, context if w == 1 else none.expand_as(context))
        else:  # with and without the text in one batch of twice the size
            both = torch.cat([context, none.expand_as(context)])
            cond, uncond = net(torch.cat([z, z]), torch.cat([tt, tt]), both).chunk(2)
            out = uncond + w * (cond - uncond)
        a, s = (float(v) for v in level(torch.tensor([t]), objective))
        return ends_of(out, z, a, s, objective)

    return guess


@torch.no_grad()
def integrate(guess, z, times, objective, heun=False, change=None, keep=None):
    """z (B, D, h, w) from times[0] to times[-1], falling numbers in 0..1. Each step keeps z_0 and
    eps of a guess and mixes them for the next time: for diffusion this is DDIM (Song et al. 2021),
    for a flow Euler's method. heun: the flow's velocity is averaged with that at the step's end.
    change(z, t) may alter each state; keep(t, z_0) is shown each guess."""
    for t, t_next in zip(times, times[1:]):
        z0, eps = guess(z, t)
        if keep:
            keep(t, z0)
        a, s = (float(v) for v in level(torch.tensor([t_next]), objective))
        new = a * z0 + s * eps
        if heun:
            z0_next, eps_next = guess(new, t_next)
            # dz/dt = eps - z_0
            new = z + (t_next - t) * ((eps - z0) + (eps_next - z0_next)) / 2
        z = change(new, t_next) if change else new
    return z


# ---- 9. A checker for the report -----------------------------------------------------------------


def to_grid(C, D):
    """Convolutions from images (B, C, H, W) to features (B, D, H/4, W/4)."""
    return nn.Sequential(
        nn.Conv2d(C, D // 2, 3, padding=1), nn.ReLU(), nn.Conv2d(D // 2, D, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(D, D, 3, padding=1), nn.ReLU(), nn.Conv2d(D, D, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(D, D, 3, padding=1), nn.ReLU())


class Checker(nn.Module):
    """Reads a scene: at each of PLACES which digit, or none, and in which colour."""

    def __init__(self, D):
        super().__init__()
        self.grid = to_grid(3, D)
        self.head = nn.Sequential(nn.Linear(16 * D, 2 * D), nn.ReLU(), nn.Linear(2 * D, 11 + 8))

    def forward(self, x):
        """x (B, 3, 32, 32) in [-1, 1] -> logits of digits (B, 5, 11) and of colours (B, 5, 8)."""
        x = self.grid(x)  # (B, D, 8, 8)
        parts = [x[:, :, r // 4 - 2:r // 4 + 2, c // 4 - 2:c // 4 + 2].flatten(1)
                 for r, c in PLACES]
        return self.head(torch.stack(parts, 1)).float().split([11, 8], -1)


def checker_loss(checker, x, facts):
    """x (B, 3, 32, 32), facts (B, 5, 2) -> a scalar; the colour of nothing does not count."""
    digit, colour = checker(x)
    return (F.cross_entropy(digit.flatten(0, 1), facts[..., 0].flatten())
            + F.cross_entropy(colour.flatten(0, 1), facts[..., 1].flatten(), ignore_index=NONE[1]))


@torch.no_grad()
def accuracy(checker, images, facts):
    """Of scenes (N, 3, 32, 32) uint8 that should show facts (N, 5, 2), how many are right in digit,
    in colour (a thing each), in relation (all places that should be empty are, and no other), and
    in all: (N,) of 0..1 each."""
    found = [checker(to_float(part)) for part in images.split(500)]
    digit, colour = (torch.cat(f).argmax(-1) for f in zip(*found))  # (N, 5) each
    there = facts[..., 0] < NONE[0]
    digit_right, colour_right = digit == facts[..., 0], colour == facts[..., 1]
    of_things = lambda right: (right & there).sum(1) / there.sum(1)  # (N,)
    relation = ((digit < NONE[0]) == there).all(1).float()
    everything = (torch.where(there, digit_right & colour_right, digit_right)).all(1).float()
    return of_things(digit_right), of_things(colour_right), relation, everything


# ---- 10. Train -----------------------------------------------------------------------------------


class LatentDiffusion(nn.Module):
    """All parts: images to latents, the denoiser and its average, and the checker."""

    def __init__(self, args):
        super().__init__()
        C, H, W = args.shape
        self.latent_shape, self.N = (args.latent_dim, H // 4, W // 4), args.text_length
        book = Codebook(args.codebook_size, args.latent_dim, 0.25, 0.99, False)
        self.autoencoder = VariationalAutoencoder(C, args.latent_dim, args.width,
                                                  book if args.autoencoder == "vq" else None)
        self.bpe = BytePairs(args.learned)
        self.denoiser = Denoiser(args, 256 + len(args.learned))
        self.ema = copy.deepcopy(self.denoiser).requires_grad_(False)
        if args.data == "mnist":
            self.checker = Checker(args.side_width)

    def tokens(self, texts):
        """Texts -> (B, N) on the model's device, each place left with a pad of its own; they must
        fit."""
        pads = [256 + len(self.bpe.rank) + i for i in range(self.N)]
        rows = [self.bpe.encode(text) for text in texts]
        return torch.tensor([row + pads[len(row):] for row in rows],
                            device=self.autoencoder.scale.device)


class AutoencoderStage(nn.Module):
    """Images to latents and back, for fit: batches, the loss, and what the bar shows."""

    name, unit = "latents", "squared error"

    def __init__(self, args, model, images):
        super().__init__()
        self.net, self.args, self.images = model.autoencoder, args, images
        self.steps, self.batch_size, self.lr = args.steps, args.batch_size, args.lr

    def batch(self, step):
        pick = torch.randint(len(self.images), (self.batch_size,), device=self.args.device)
        return (to_float(self.images[pick[RANK::WORLD]]),)  # (B, C, H, W)

    def forward(self, x):
        """What to minimise, and the squared error."""
        image, extra = self.net(x)
        error = F.mse_loss(image, x)
        return error + extra * (1 if self.net.codebook else self.args.kl), error

    def text(self):
        return ""

    def picture(self):
        return pairs(self.net, self.images[:32])


class DenoiserStage(nn.Module):
    """Latents, noised, and their texts."""

    name, unit = "model", "squared error"

    def __init__(self, args, model, text, latents):
        super().__init__()
        self.net, self.args, self.words, self.latents = model.denoiser, args, text, latents
        self.model = (model,)  # a tuple, so that the other parts' weights do not count as its own
        self.empty = model.tokens([""])
        self.steps, self.batch_size, self.lr = args.model_steps, args.model_batch, args.model_lr
        self.bins = torch.zeros(2, 10, device=args.device)  # count and loss by tenth of t

    def batch(self, step):
        pick = torch.randint(len(self.latents), (self.batch_size,), device=self.args.device)
        drop = torch.rand(self.batch_size, 1, device=self.args.device)
        # 1 text in 10 becomes empty, so that the model learns p(z_0) too, for guidance
        text, z0 = torch.where(drop < 0.1, self.empty, self.words[pick]), self.latents[pick]
        t = draw_times(self.batch_size, self.args.objective, self.args.device)
        return [a[RANK::WORLD] for a in (z0, text, t, torch.randn_like(z0))]

    def forward(self, z0, text, t, eps):
        error = denoising_loss(self.net, z0, text, t, eps, self.args.objective)  # (B,)
        tenth = (10 * t).long().clamp(max=9)
        self.bins.index_add_(1, tenth, torch.stack([torch.ones_like(error), error.detach()]))
        return error.mean(), error.mean()

    def after(self, step):
        ema_update(self.model[0].ema, self.net, step, self.args.ema)

    def text(self):
        return f" of {self.args.objective}"

    def picture(self):
        texts = self.args.examples
        text = self.model[0].tokens(texts)
        return rows_of(texts, draw_texts(self.args, self.model[0], text, 8))


class CheckerStage(nn.Module):
    """Real scenes and what is in them."""

    name, unit = "checker", "nats a place"

    def __init__(self, args, model, images, facts):
        super().__init__()
        self.net, self.args, self.images, self.facts = model.checker, args, images, facts
        self.steps, self.batch_size, self.lr = args.side_steps, args.side_batch, args.side_lr

    def batch(self, step):
        pick = torch.randint(len(self.facts), (self.batch_size,), device=self.args.device)
        pick = pick[RANK::WORLD]
        return to_float(self.images[pick]), self.facts[pick]

    def forward(self, x, facts):
        loss = checker_loss(self.net, x, facts)
        return loss, loss

    def text(self):
        return f" (by chance {math.log(11) + math.log(8):.2f})"


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
    images, texts, facts = load_pairs(args, "train")
    args.shape = list(images.shape[1:])
    if not ckpt:  # or other captions would give words other tokens
        args.learned = BytePairs.learn(texts, args.merges)
    side = 4 * (args.patch if args.backbone == "dit" else 2 ** (len(args.channels) - 1))
    if args.shape[1] % side or args.shape[2] % side:
        die(f"--data {args.data}: images of {args.shape[1]} x {args.shape[2]}, but height and "
            f"width must be multiples of {side}: 4 by the latents, the rest by the network")
    args.examples = PROMPTS if facts is not None else sorted(set(texts))[:6]
    torch.manual_seed(args.seed)
    model = LatentDiffusion(args).to(args.device).eval()
    text = model.tokens([read_prompt(model, t, f"--data {args.data}") for t in texts])
    state = ckpt or dict(file=NAME, part="", step=0, history={})
    state["config"] = {k: getattr(args, k) for k in CONFIG}
    if ckpt:
        load_state(model, ckpt, "model")
    elif model.autoencoder.codebook:  # the codebook starts from vectors of the data
        with torch.no_grad():
            z = model.autoencoder.moments(to_float(images[:1000]))[0]
            model.autoencoder.codebook.begin(z.permute(0, 2, 3, 1))
    say(f"{len(images):,} of {args.data}, shape {args.shape}; text of {args.text_length} tokens, "
        f"{len(args.learned)} of them learned; {args.backbone}, {args.objective}")
    parts = ["latents", "model"] + ["checker"] * (facts is not None)
    steps = [args.steps, args.model_steps, args.side_steps]
    first = parts.index(state["part"]) if ckpt else 0
    first += bool(ckpt) and state["step"] >= steps[first]
    if first == len(parts):
        die(f"--resume: all {state['step']} steps of the {parts[-1]} are done")
    for part in parts[first:]:
        if part == "latents":
            stage = AutoencoderStage(args, model, images)
        elif part == "model":
            stage = DenoiserStage(args, model, text, scaled_latents(model, images))
        else:
            stage = CheckerStage(args, model, images, facts)
        if not fit(args, model, stage, state):
            sys.exit(0)
        if part == "model":
            count, total = stage.bins.cpu()
            at, seen = torch.arange(10) / 10 + 0.05, count > 0
            curve = {"": (at[seen].numpy(), (total / count)[seen].numpy())}
            save_png(args.out / "loss_by_t.png",
                     plot(curve, "t, in tenths", f"squared error of {args.objective}")[None])
    save_png(args.out / "reconstruction.png", pairs(model.autoencoder, images[:64])[None])
    return model


# ---- 11. Draw ------------------------------------------------------------------------------------

PROMPTS = ["a red seven", "a green three left of a white five", "a purple one above a yellow two",
           "an orange nine right of a cyan six",
           "a red eight left of a white nine", "a blue six below a green seven"]  # never shown


@torch.no_grad()
def latents_of(model, images):
    """Latents (N, D, h, w) of images (N, C, H, W) uint8; in float32, unlike training."""
    return torch.cat([model.autoencoder.encode(to_float(part)) for part in images.split(500)])


@torch.no_grad()
def decoded_latents(model, z):
    """Images (N, C, H, W) uint8 of latents (N, D, h, w)."""
    return torch.cat([to_uint8(model.autoencoder.decode(part)) for part in z.split(500)])


def scaled_latents(model, images):
    """All latents of the training set, once; sets shift and scale so that they have mean 0 and
    standard deviation 1."""
    net = model.autoencoder
    net.shift.fill_(0), net.scale.fill_(1)
    z = latents_of(model, images)
    net.shift.copy_(z.mean()), net.scale.copy_(z.std())
    say(f"latents: mean {float(net.shift):.3f} and standard deviation {float(net.scale):.3f} "
        "become 0 and 1")
    return (z - net.shift) / net.scale


def noise_for(args, model, n, seed=0):
    """Noise (n, D, h, w), drawn on the CPU: the same whatever the device."""
    rng = torch.Generator().manual_seed(args.seed + seed)
    return torch.randn(n, *model.latent_shape, generator=rng).to(args.device)


def new_latents(args, model, context, z, start=1.0, change=None, keep=None):
    """Latents (n, D, h, w) for context (n, N, D'), from z, noised as at time `start`."""
    times = [start * i / args.sample_steps for i in range(args.sample_steps, -1, -1)]
    with torch.no_grad(), autocast(args):
        none = model.ema.text(model.tokens([""]))
        guess = make_guess(model.ema, context, none, args.objective, args.guidance)
        return integrate(guess, z, times, args.objective, args.sampler == "heun", change, keep)


def draw_texts(args, model, text, num):
    """Images (P, num, C, H, W) uint8 of text (P, N)."""
    text, z = text.repeat_interleave(num, 0), noise_for(args, model, len(text) * num)
    found = []
    for part, noise in zip(text.split(500), z.split(500)):
        with torch.no_grad(), autocast(args):
            context = model.ema.text(part)
        found.append(decoded_latents(model, new_latents(args, model, context, noise)))
    return torch.cat(found).view(-1, num, *args.shape)


def sample(args, model):
    """Draws the prompts: samples.npz, samples.png with each prompt above its row, and, in
    trajectory.png, what the network thinks the image is on the way."""
    texts = [prompt_of(model, text) for text in args.prompt or args.examples]
    start = time.time()
    x = draw_texts(args, model, model.tokens(texts), args.num)
    say(f"{args.num} images of each of {len(texts)} prompts in {time.time() - start:.1f} s")
    save_npz(args.save or args.out / "samples.npz",
             x.flatten(0, 1).permute(0, 2, 3, 1).cpu().numpy(), captions=np.repeat(texts, args.num))
    save_png(args.out / "samples.png", rows_of(texts, x)[None])
    guesses = []
    context = text_vectors(args, model, texts)
    new_latents(args, model, context, noise_for(args, model, len(texts)),
                keep=lambda t, z0: guesses.append(decoded_latents(model, z0)))
    shown = torch.stack(guesses[::max(1, len(guesses) // 8)] + guesses[-1:], 1)  # (P, n, C, H, W)
    save_png(args.out / "trajectory.png", rows_of(texts, shown)[None])
    say(f"samples.png and trajectory.png in {args.out}\n"
        f"now try: python {NAME}.py --prompt \"a red eight above a cyan two\" --out {args.out}")


def text_vectors(args, model, texts):
    """What the averaged text encoder makes of texts: (P, N, D')."""
    with torch.no_grad(), autocast(args):
        return model.ema.text(model.tokens(texts))


def read_prompt(model, text, what):
    """A text as the model knows texts, in small letters; refused if empty or too long."""
    text, N = " ".join(text.lower().split()), model.N
    if not text:
        die(f"{what}: the text is empty")
    if (n := len(model.bpe.encode(text))) > N:
        die(f"{what} {text!r} has {n} tokens, but {N} fit"
            + ("; take a larger --text-length" if what.startswith("--data") else ""))
    return text


def prompt_of(model, text):
    """A --prompt, checked; words that the model has no token for are named."""
    text = read_prompt(model, text, "--prompt")
    for word in text.split():
        if len(model.bpe.encode(word)) > 1:
            say(f"{word!r} has no token of its own and is spelled: perhaps never seen in training")
    return text


def rows_of(texts, images):
    """A picture: each text, and below it its images, (P, n, C, H, W) or a list of (n, C, H, W)."""
    parts = []
    for text, x in zip(texts, images):
        row = grid(x, len(x), 776)
        parts += [caption(text, max(row.shape[1], 8 * len(text) + 8)), row]
    return stack(parts)


def pairs(autoencoder, images):
    """A picture: rows of 16 images, and below each row the same from their codes."""
    images = images[:max(16, len(images) // 16 * 16)]  # full rows
    with torch.no_grad():
        back = autoencoder(to_float(images))[0]
    both = torch.stack([images.cpu(), to_uint8(back).cpu()], 1)  # (N, 2, C, H, W)
    rows = [part.transpose(0, 1).flatten(0, 1) for part in both.split(16)]
    return np.concatenate([grid(row, len(row) // 2, 1100) for row in rows])


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


def image_to_image(args, model):
    """An image, noised up to --strength and denoised as the prompts say (SDEdit, Meng et al. 2022):
    init.png."""
    x = image_file(args, "--init", args.init)
    texts = [prompt_of(model, text) for text in args.prompt or []] or [""]
    a, s = level(torch.tensor([args.strength]), args.objective)
    rows = []
    for context in text_vectors(args, model, texts):
        z = float(a) * latents_of(model, x) + float(s) * noise_for(args, model, args.num)
        z = new_latents(args, model, context.expand(args.num, -1, -1), z, args.strength)
        rows.append(torch.cat([x, decoded_latents(model, z)]))
    heads = [f"image, then drawn from it: {text or '(no text)'}" for text in texts]
    save_png(args.out / "init.png", rows_of(heads, rows)[None])
    say(f"init.png in {args.out}")


def inpaint_image(args, model):
    """Draws anew where the mask is bright, as the prompts say; pixels elsewhere stay: inpaint.png.
    At each step the known latents are put back, as noisy as the rest."""
    x = image_file(args, "--inpaint", args.inpaint)
    if args.mask:
        mask = image_file(args, "--mask", args.mask, any_channels=True).amax(1, keepdim=True) > 127
    else:
        mask = torch.zeros_like(x[:, :1], dtype=torch.bool)
        mask[..., args.shape[2] // 2:] = True  # the right half
    new = F.max_pool2d(mask.float(), 4) > 0  # (1, 1, h, w): latents with a pixel to draw
    known, noise = latents_of(model, x), noise_for(args, model, args.num, 1)
    texts = [prompt_of(model, text) for text in args.prompt or []] or [""]

    def change(z, t):
        a, s = (float(v) for v in level(torch.tensor([t]), args.objective))
        return torch.where(new, z, a * known + s * noise)

    rows = []
    for context in text_vectors(args, model, texts):
        z = new_latents(args, model, context.expand(args.num, -1, -1),
                        noise_for(args, model, args.num), change=change)
        rows.append(torch.cat([x, torch.where(mask, 127, x).byte(),
                               torch.where(mask, decoded_latents(model, z), x)]))
    heads = [f"image, what is kept, drawn: {text or '(no text)'}" for text in texts]
    save_png(args.out / "inpaint.png", rows_of(heads, rows)[None])
    save_npz(args.save or args.out / "inpaint.npz",
             torch.cat([r[2:] for r in rows]).permute(0, 2, 3, 1).cpu().numpy())
    say(f"inpaint.png in {args.out}")


def interpolate(args, model, steps=9, ways=4):
    """From one text to the other by vectors between theirs, a row a noise: interpolation.png."""
    texts = [prompt_of(model, text) for text in args.interpolate]
    a, b = text_vectors(args, model, texts)
    f = torch.linspace(0, 1, steps, device=a.device).view(-1, 1, 1)
    context = ((1 - f) * a + f * b).repeat(ways, 1, 1)
    noise = noise_for(args, model, ways).repeat_interleave(steps, 0)
    x = decoded_latents(model, new_latents(args, model, context, noise))
    save_png(args.out / "interpolation.png", stack([
        caption(f"{texts[0]} -> {texts[1]}", 900), grid(x, steps)])[None])
    say(f"interpolation.png in {args.out}")


def guidance_sweep(args, model):
    """The first prompt at guidance 1, 2, 4 and 8, from the same noise: guidance.png."""
    text = prompt_of(model, (args.prompt or args.examples[1:] + args.examples)[0])
    rows, weights, one = [], (1, 2, 4, 8), copy.copy(args)
    for one.guidance in weights:
        rows.append(draw_texts(one, model, model.tokens([text]), args.num)[0])
    heads = [f"{text}, guidance {w}" for w in weights]
    save_png(args.out / "guidance.png", rows_of(heads, rows)[None])
    say(f"guidance.png in {args.out}")


def attention_maps(args, model):
    """Draws the first prompt and shows from where each of its words is looked at, mean over steps,
    layers and heads: attention.png."""
    text = prompt_of(model, (args.prompt or args.examples[1:] + args.examples)[0])
    words, h, w = text.split(), *model.latent_shape[1:]
    size = h * w // (args.patch**2 if args.backbone == "dit" else 1)
    looking = [m for name, m in model.ema.named_modules() if hasattr(m, "seen")
               and not name.endswith("attn1")]
    for module in looking:
        module.seen = []
    z = new_latents(args, model, text_vectors(args, model, [text]), noise_for(args, model, 1))
    maps = []
    for module in looking:
        for weight in module.seen:  # the first of the batch has the text
            weight = weight[0, -size:, :model.N] if args.backbone == "dit" else weight[0]
            if len(weight) == size:  # of the latents' size
                maps.append(weight)
        module.seen = None
    high = h // (args.patch if args.backbone == "dit" else 1)
    mean = torch.stack(maps).mean(0).T.view(model.N, high, -1)
    at, tiles = 0, [decoded_latents(model, z)]
    for n in [len(model.bpe.encode(word)) for word in words]:
        seen = mean[at:at + n].sum(0)
        seen = (255 * (seen - seen.min()) / (seen.max() - seen.min()).clamp(min=1e-9)).byte()
        seen = F.interpolate(seen[None, None].float(), args.shape[1:]).byte()
        tiles.append(seen.expand(1, *args.shape))
        at += n
    row = grid(torch.cat(tiles), len(tiles), 900)
    head, each = caption("", row.shape[1]), row.shape[1] // len(tiles)
    for i, word in enumerate(["image", *words]):
        draw_text(head, word, i * each + 4, 4)
    save_png(args.out / "attention.png", stack([head, row])[None])
    say(f"attention.png in {args.out}")


# ---- 12. Better prompts (slide Learning better prompts), and a report ----------------------------


def fill_in_prompt(text, rng):
    """A short prompt as a whole caption: what colours, digits and relation it names stay where they
    are; what is missing is drawn. "seven above a blue" -> "a red seven above a blue two"."""
    things, at = [{}, {}], 0  # the relation, a second digit or colour begin the second thing
    for word in text.split():
        kind = "colour" if word in COLOURS else "digit" if word in DIGITS else None
        at = 1 if word in " ".join(RELATIONS).split() or kind in things[at] else at
        if kind:
            things[at][kind] = word
    relation = next((r for r in RELATIONS if f" {r} " in f" {text} "), rng.choice([*RELATIONS]))
    parts = []
    for thing in things:
        colour = thing.get("colour", rng.choice([*COLOURS]))
        digit = thing.get("digit", rng.choice(DIGITS))
        parts.append(f"{'an' if colour[0] == 'o' else 'a'} {colour} {digit}")
    return f"{parts[0]} {relation} {parts[1]}"


def enhance_prompt(args, model, ways=3):
    """Fills in a short prompt, and draws it and each longer one: enhance.png."""
    short, rng = prompt_of(model, args.enhance), np.random.default_rng(args.seed)
    texts = [short] + [fill_in_prompt(short, rng) for _ in range(ways)]
    for text in texts[1:]:
        say(f"{short} -> {text}")
    x = draw_texts(args, model, model.tokens(texts), args.num)
    save_png(args.out / "enhance.png", rows_of(texts, x)[None])
    say(f"enhance.png in {args.out}")


def report(args, model, num=1000):
    """Prints how often the right thing is seen: in real scenes of test digits, in the same from
    their latents, and in what is drawn for prompts whose pairs of digit and colour training shows,
    in whole captions and short ones, and for prompts whose pairs it never shows."""
    images, _, facts = load_pairs(args, "test")
    say(f"{'share that is right':38}   digit  colour  relation   all")

    def line(name, images, facts):
        share = [float(v.mean()) for v in accuracy(model.checker, images, facts)]
        say(f"{name:38}  {share[0]:6.3f}  {share[1]:6.3f}    {share[2]:6.3f}  {share[3]:.3f}")

    line("real scenes", images[:num], facts[:num])
    line("real scenes, from their latents",
         decoded_latents(model, latents_of(model, images[:num])), facts[:num])
    for seen, short, name in ((True, False, "drawn, pairs seen"),
                              (True, True, "the same, prompts without articles"),
                              (False, False, "drawn, pairs never seen")):
        rng = np.random.default_rng(args.seed + 1)
        wanted = random_facts(num, rng, seen, single=0)
        texts = [describe(f, rng.random() < 0.5 and args.turned > 0, short) for f in wanted]
        x = draw_texts(args, model, model.tokens(texts), 1).flatten(0, 1)
        line(name, x, torch.from_numpy(wanted).to(args.device))


# ---- 13. Data ------------------------------------------------------------------------------------


def load_pairs(args, split):
    """Images (N, C, H, W) uint8 on the device, their captions, and of our own scenes facts
    (N, 5, 2), else None. split "train" or "test": scenes of MNIST's training or test digits; of a
    file of your own, all but every tenth pair, or those."""
    if args.data == "mnist":
        digits, labels = (a.cpu() for a in load_data(args, split))
        rng = np.random.default_rng([args.seed, split == "test"])
        facts = random_facts(args.scenes if split == "train" else 1000, rng,
                             single=0.2 if split == "train" else 0)
        images = render(facts, digits, labels, rng)
        turn, short = rng.random(len(facts)) < args.turned, rng.random(len(facts)) < 0.25
        texts = [describe(*f) for f in zip(facts, turn, short)]
        return images.to(args.device), texts, torch.from_numpy(facts).to(args.device)
    if not args.data.endswith(".npz"):
        die(f"--data {args.data} is not known; expected mnist, or a .npz file with images and "
            "captions")
    images, _ = own_data(args.data)
    captions = np.asarray(np.load(args.data).get("captions"))
    if captions.dtype.kind != "U" or captions.shape != (len(images),):
        die(f"--data {args.data}: expected 'captions', a text for each of {len(images)} images")
    part = (np.arange(len(images)) % 10 == 1) == (split == "test")
    try:
        texts = [" ".join(text.lower().split()) for text in captions[part].tolist()]
    except Exception as e:
        die(f"--data {args.data}: captions are damaged ({e})")
    return torch.from_numpy(images[part].copy()).to(args.device), texts, None


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
    if args.describe:
        with torch.device("meta"):  # shapes alone: nothing is allocated
            backbone = make_backbone(args)
        count = sum(p.numel() for p in backbone.parameters())
        return say(f"{backbone}\n{args.backbone}, size {args.size}: {count:,} parameters")
    verbs = (args.train, args.sample, args.prompt, args.init, args.inpaint, args.interpolate,
             args.enhance is not None, args.eval, args.attention, args.sweep, args.export)
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
        for key in ("data", "size", "autoencoder", "latent_dim", "codebook_size", "width",
                    "backbone", "objective", "text_length", "merges", "text_width", "text_layers",
                    "channels", "coordinates", "layers", "groups", "heads", "dit_width",
                    "dit_double", "dit_single", "patch", "side_width"):
            if getattr(args, key) != ckpt["config"][key]:
                die(f"--{key.replace('_', '-')} {getattr(args, key)}: {path} was trained with "
                    f"{ckpt['config'][key]}")
        say(f"from {path}, step {ckpt['step']:,} of the {ckpt['part']}")
    args.sample |= bool(args.prompt) and not any(verbs[3:])
    try:
        setup(args)
        if args.train:
            model = train(args, ckpt)
        else:
            model = LatentDiffusion(args).to(args.device).eval()
            weights = ckpt["model"]  # an exported one has the averaged network alone
            weights |= {k.replace("ema.", "denoiser.", 1): v for k, v in weights.items()
                        if k.startswith("ema.")}
            load_state(model, ckpt, "model")
        if RANK > 0:
            time.sleep(1)  # a thread of gloo that still holds a tensor would abort a quicker exit
            return
        if args.export:
            ckpt = read_checkpoint(args.out / "model.pt")
            small = {k: ckpt[k] for k in ("file", "config", "part", "step")}
            small["model"] = {k: v.half() for k, v in ckpt["model"].items()
                              if not k.startswith("denoiser.")}
            save_checkpoint(args.export, small)
        for wanted, verb in ((args.train or args.sample, sample), (args.init, image_to_image),
                             (args.inpaint, inpaint_image), (args.interpolate, interpolate),
                             (args.enhance is not None, enhance_prompt),
                             (args.train or args.sweep, guidance_sweep),
                             (args.eval or args.train and args.data == "mnist", report),
                             (args.train or args.attention, attention_maps)):
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
