"""Text to image in token space: DALL-E in miniature.

A VQ-VAE makes an image a grid of codes; a byte-pair encoder makes a caption a few tokens; and one
transformer learns the joint stream, text then image. To draw is to go on where a text ends.

Slides     Dall-E; VQ-VAE (first stage); Learning better prompts
Equations  stream       p(text, codes) = prod_i p(text_i | before) prod_j p(code_j | text, before)
           loss         (text + 7 image) / 8, each in nats a token
           guidance     logits = none + w (cond - none), `none` from an empty text
           caption      p(text | image) = p(image | text) p(text) / p(image)
           reranking    keep the image whose direction is nearest to the text's: cos(f(text), g(x))
Notation   x            x        (B, C, H, W)   image in [-1, 1]
           z, z_q       z, q     (B, h, w, d)   before and after the codebook; h = H/4, w = W/4
           code_j       codes    (B, h, w)      whole numbers 0..K-1
           text_i       text     (B, N)         tokens, then a pad of its own for each place left
                        facts    (B, 5, 2)      what stands at five places of a scene: digit, colour
                        L        N + h w        places of the stream; D, the width of a network
Run        python dalle_mini.py --train                        all parts, samples, a report
           python dalle_mini.py --prompt "a red seven left of a blue two" --best-of 16
           python dalle_mini.py --complete IMG --prompt TEXT   the top half is kept
           python dalle_mini.py --enhance "a red seven"        the model writes the rest
           python dalle_mini.py --caption IMG                  image to text, by Bayes
           python dalle_mini.py --eval --best-of 16            how often it is right
           python dalle_mini.py --attention                    where a code looks
Expect     scenes of two digits, 9 minutes on 2 CPU cores: everything asked for is seen in 0.90 of
           images, in 0.57 if training never showed such digits in such colours. The enclosed model,
           40 minutes: 0.98 and 0.73; best of 16: 1.00 and 0.83; captions found 0.96. GPU: runs,
           not timed. In out/dalle_mini/: model.pt, samples (.png, .npz), loss (.png, .csv),
           codes_000500.png, model_000500.png and so on, attention.png; by other verbs complete.png,
           enhance.png.
Left out   the discrete VAE of the paper (Gumbel-softmax and a KL weight: a VQ-VAE here), data from
           the web, BPE dropout, training in 16-bit with per-block loss scales
Try        1. --guidance 0, 1, 2, 5 with --eval: when does it draw better, and when only louder?
           2. --masks sparse: rows, columns and windows instead of everything. What is lost?
           3. Hold out a whole colour for single digits (shown, random_facts). Does it generalise?
Papers     Ramesh et al. 2021, Zero-Shot Text-to-Image Generation; van den Oord et al. 2017, Neural
           Discrete Representation Learning; Radford et al. 2021, Learning Transferable Visual
           Models from Natural Language Supervision; Sennrich et al. 2016, Neural Machine
           Translation of Rare Words with Subword Units; Ho & Salimans 2022, Classifier-Free
           Diffusion Guidance
"""
import argparse
import collections
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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

SIZES = {  # one dial, --size, sets all of these; a flag given by hand wins
    "small": dict(  # a laptop
        scenes=60_000, width=64, code_dim=16, codebook_size=256, blocks=2, steps=2500,
        batch_size=64, lr=2e-3, text_length=16, merges=128, model_width=128, model_layers=4,
        heads=4, masks="full", model_steps=3000, model_batch=64, model_lr=3e-3, side_width=64,
        side_steps=1500, side_batch=128, side_lr=2e-3, warmup=50, guidance=2.5, num=8, every=500),
    "base": dict(  # a GPU
        scenes=200_000, width=128, code_dim=32, codebook_size=512, blocks=2, steps=20_000,
        batch_size=256, lr=1e-3, text_length=16, merges=128, model_width=512, model_layers=8,
        heads=8, masks="full", model_steps=50_000, model_batch=256, model_lr=5e-4,
        side_width=128, side_steps=5000, side_batch=512, side_lr=1e-3, warmup=500, guidance=2.5,
        num=8, every=5000),
    "paper": dict(  # Ramesh et al. 2021, for pairs of 128 x 128: 256 + 1,024 tokens, 12e9 weights
        scenes=200_000, width=256, code_dim=128, codebook_size=8192, blocks=4, steps=3_000_000,
        batch_size=512, lr=1e-4, text_length=256, merges=16_384 - 256, model_width=3968,
        model_layers=64, heads=62, masks="sparse", model_steps=430_000, model_batch=1024,
        model_lr=4.5e-4, side_width=512, side_steps=100_000, side_batch=4096, side_lr=5e-4,
        warmup=5000, guidance=1.0, num=8, every=10_000),
}
CONFIG = [*SIZES["small"], "size", "data", "seed", "beta", "decay", "temperature", "top_k", "top_p",
          "shape", "learned", "examples", "turned"]  # what a checkpoint keeps


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
    add("--complete", type=Path, metavar="IMG", help="keep the top half of a .png or .npz, draw "
        "the rest; with --prompt, as that says")
    add("--enhance", metavar="TEXT", help="go on with a short prompt by the model's own p(text), "
        "and draw both")
    add("--caption", type=Path, metavar="IMG", help="which caption made this image?")
    add("--eval", action="store_true", help="how often is the right thing drawn?")
    add("--attention", action="store_true", help="where codes of the first prompt look")
    add("--export", type=Path, metavar="PT", help="write the weights alone, as fp16")
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
    add("--turned", type=share, default=0.5, help="share of captions in training that begin with "
        "the digit to the right or below")
    # image to codes
    add("--codebook-size", type=positive, metavar="K", help="how many vectors")
    add("--code-dim", type=positive, help="their length")
    add("--beta", type=float, default=0.25, help="weight of the commitment |z - stop(e)|^2")
    add("--decay", type=share, default=0.99, help="of the codebook's running means")
    add("--width", type=positive, help="channels of encoder and decoder")
    add("--blocks", type=positive, help="residual blocks of each")
    add("--steps", type=positive, help="training length")
    add("--batch-size", type=positive, help="images per step, over all GPUs")
    add("--lr", type=share, help="peak learning rate of AdamW, falling linearly to zero")
    # text and codes
    add("--text-length", type=positive, metavar="N", help="tokens of text; shorter ones are padded")
    add("--merges", type=positive, help="tokens beyond the 256 bytes, at most")
    add("--model-width", type=positive, help="of the transformer")
    add("--model-layers", type=positive, help="its blocks")
    add("--heads", type=positive, help="of its attention; a divisor of --model-width")
    add("--masks", choices=["full", "sparse"],
        help="who looks at whom: sparse has row, column and convolutional layers, as the paper")
    add("--model-steps", type=positive, help="its training length")
    add("--model-batch", type=positive, help="pairs per step, over all GPUs")
    add("--model-lr", type=share, help="its peak learning rate")
    # the two that judge: scorer and checker
    add("--side-width", type=positive, help="of scorer and checker")
    add("--side-steps", type=positive, help="their training length, each")
    add("--side-batch", type=positive, help="images per step, over all GPUs")
    add("--side-lr", type=share, help="their peak learning rate")
    add("--warmup", type=positive, help="steps until the peak is reached, in all parts")
    # sampling
    add("--num", type=positive, help="images a prompt")
    add("--best-of", type=positive, default=1, metavar="N",
        help="draw N for each image, keep the one that the scorer finds nearest to the text")
    add("--save", type=Path, help="where the samples go, by default OUT/samples.npz")
    add("--guidance", type=float, metavar="W", help="uncond + W (cond - uncond), of logits: a "
        "larger W is more faithful to the text and less varied; 1 is p(codes | text)")
    add("--temperature", type=float, default=1.0, help="of the softmax; below 1 more typical")
    add("--top-k", type=int, default=0, help="draw from the k likeliest codes only; 0 is all")
    add("--top-p", type=share, default=1.0,
        help="draw from the likeliest codes that hold this much of the probability; 1 is all")
    p.set_defaults(**(config or {}))
    args = p.parse_args(argv)
    args.size = args.size or ("small" if pick_device(args.device) == "cpu" else "base")
    for key, value in SIZES[args.size].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for wrong, message in (
            (not 0 <= args.seed < 2**63, f"--seed {args.seed}: expected 0 or more, below 2^63"),
            (args.codebook_size < 2, f"--codebook-size {args.codebook_size}: expected 2 or more"),
            (args.model_width % args.heads, f"--heads {args.heads}: expected a divisor of "
             f"--model-width {args.model_width}"),
            (args.side_width % 32, f"--side-width {args.side_width}: expected a multiple of 32"),
            (args.data != "mnist" and args.eval,
             "--eval: only for our own scenes, where it is known what should be seen"),
            (args.data != "mnist" and args.caption and not args.prompt,
             "--caption: give the captions to choose from, each by --prompt"),
            (not math.isfinite(args.guidance), "--guidance: expected a finite number"),
            (not args.temperature > 0, f"--temperature {args.temperature}: expected more than 0"),
            (not args.top_p > 0, f"--top-p {args.top_p}: expected more than 0"),
            (args.top_k < 0, f"--top-k {args.top_k}: expected 0 or more"),
            (not args.beta >= 0, f"--beta {args.beta}: expected 0 or more")):
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


# ---- 3. Images as codes (slide VQ-VAE: "closest vector from a learned codebook") -----------------

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


class Residual(nn.Module):
    """x + convolutions of x (B, D, h, w), as in the paper: 3 x 3, then 1 x 1."""

    def __init__(self, D):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(D, D, 3, padding=1), nn.Conv2d(D, D, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class VQVAE(nn.Module):
    """Image to a grid a quarter as high and wide, codebook, and back. A code sees 10 x 10 pixels
    and no more: what is near by is easier to predict than a bit of everything."""

    def __init__(self, C, D, blocks, codebook):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(C, D // 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(D // 2, D, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(D, D, 1), nn.ReLU(), nn.Conv2d(D, codebook.D, 1))
        self.codebook = codebook
        self.decoder = nn.Sequential(
            nn.Conv2d(codebook.D, D, 3, padding=1), *[Residual(D) for _ in range(blocks)],
            nn.ReLU(), nn.ConvTranspose2d(D, D // 2, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(D // 2, C, 4, 2, 1))

    def encode(self, x):
        """Images (B, C, H, W) in [-1, 1] -> z (B, h, w, D), before the codebook."""
        return self.encoder(x).permute(0, 2, 3, 1).float()

    def decode(self, q):
        """z_q (B, h, w, D) -> images (B, C, H, W)."""
        return self.decoder(q.permute(0, 3, 1, 2)).float()

    def forward(self, x):
        """Images -> images, codes (B, h, w), and the codebook's loss."""
        q, codes, extra = self.codebook(self.encode(x))
        return self.decode(q), codes, extra


# ---- 4. The transformer: one stream of text and image --------------------------------------------


def attention_mask(kind, text, h, w):
    """Who may look at whom (L, L), True where allowed: of L = text + h w places, all see themselves
    and earlier ones; codes see all text, and of earlier codes "full": all; "row": the last w;
    "column": those straight above; "conv": those in a window of 11 x 11. Codes are counted in
    reading order, so windows wrap at the edges, as in the paper (appendix B.1, figure 11). A place
    takes in the token before it, place 0 a start: the code a place sees from is the last one known,
    not the one it predicts."""
    place = torch.arange(text + h * w)
    back = place[:, None] - place  # (L, L) how far behind
    up = (back + 5) // w  # rows above; up to 5 to the right of straight above
    near = {"full": back >= 0, "row": back <= w, "column": back % w == 0,
            "conv": (up <= 5) & ((back - up * w).abs() <= 5)}[kind]
    return (back >= 0) & (near | (place <= text))


def kinds_of(masks, layers):
    """The mask of each layer; sparse: row, column, row, row and again, conv in the last."""
    if masks == "full":
        return ["full"] * layers
    return ["column" if i % 4 == 1 else "row" for i in range(layers - 1)] + ["conv"]


def attend(q, k, v, **mask):
    """softmax(q k^T / sqrt(d)) v: (B, heads, L, d) each. On a CPU in float32: in training PyTorch's
    bf16 kernel is five times slower there."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **mask)
    return F.scaled_dot_product_attention(q, k, v, **mask)


class SelfAttention(nn.Module):
    """Self-attention that can keep keys and values of the places it has seen."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(D, 3 * D), nn.Linear(D, D)

    def split(self, x):
        """x (B, n, D) -> q, k, v (B, heads, n, D / heads)."""
        B, n, D = x.shape
        return self.qkv(x).view(B, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, mask=None, cache=None, at=0):
        """x (B, n, D) stands at places at, at + 1, ...; cache (2, B, heads, L, D / heads) holds
        keys and values of those before, and gets theirs."""
        q, k, v = self.split(x)
        if cache is not None:
            end = at + x.shape[1]
            cache[0, :, :, at:end], cache[1, :, :, at:end] = k, v
            k, v = cache[:, :, :, :end]
            mask = mask[at:end, :end]
        return self.out(attend(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape))


class TransformerBlock(nn.Module):
    """Attention between places, then an MLP at each."""

    def __init__(self, D, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(D), SelfAttention(D, heads)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x, *where):
        x = x + self.attention(self.norm1(x), *where)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """p(text, codes) = p(text) p(codes | text), token by token: the place of a token sees those
    before it and predicts it. Words and codes have an embedding and a head each, so that no
    probability can cross from one to the other. A text shorter than N ends in pads, and each place
    has a pad of its own, which is learned and predicted like any token."""

    def __init__(self, args, vocabulary, K, h, w):
        super().__init__()
        D, self.N, self.V, self.h, self.w = args.model_width, args.text_length, vocabulary, h, w
        self.word, self.code = nn.Embedding(self.V + self.N, D), nn.Embedding(K, D)
        self.start = nn.Parameter(torch.zeros(D))  # stands before the first word
        self.place = nn.Parameter(torch.zeros(self.N, D))
        self.row, self.col = nn.Parameter(torch.zeros(h, 1, D)), nn.Parameter(torch.zeros(1, w, D))
        self.kinds = kinds_of(args.masks, args.model_layers)
        self.blocks = nn.ModuleList([TransformerBlock(D, args.heads) for _ in self.kinds])
        for kind in set(self.kinds):
            mask = attention_mask(kind, self.N, h, w)
            self.register_buffer(f"{kind}_mask", mask, persistent=False)
        self.norm = nn.LayerNorm(D)
        self.word_head, self.code_head = nn.Linear(D, self.V + self.N), nn.Linear(D, K)
        for embedding in (self.word, self.code):
            nn.init.normal_(embedding.weight, std=0.1)
        for head in (self.word_head, self.code_head):  # a uniform start
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def pad(self, tokens):
        """A list of at most N tokens -> exactly N."""
        return tokens + [self.V + i for i in range(len(tokens), self.N)]

    def embed(self, text, codes):
        """text (B, N), codes (B, n) -> x (B, N + n + 1, D), at most N + h w places: at each the
        token before it and the place itself."""
        x = torch.cat([self.start.expand(len(text), 1, -1), self.word(text), self.code(codes)], 1)
        places = torch.cat([self.place, (self.row + self.col).flatten(0, 1)])  # (N + h w, D)
        return x[:, :len(places)] + places[:x.shape[1]]

    def embed_next(self, codes):
        """The last of these places alone, (B, 1, D), for codes (B, n), n from 1 to h w - 1."""
        i, j = divmod(codes.shape[1], self.w)
        return self.code(codes[:, -1:]) + self.row[i] + self.col[0, j]

    def run(self, x, caches=None, at=0):
        """x (B, n, D) at places at, at + 1, ... -> the same, for the heads."""
        for i, (block, kind) in enumerate(zip(self.blocks, self.kinds)):
            mask = getattr(self, f"{kind}_mask")
            x = block(x, mask[:x.shape[1], :x.shape[1]]) if caches is None else block(
                x, mask, caches[i], at)
        return self.norm(x)

    def forward(self, text, codes):
        """text (B, N), codes (B, n) that are known -> logits of the text (B, N, V + N), and of
        codes (B, n + 1, K), at most h w of them."""
        x = self.run(self.embed(text, codes))
        return self.word_head(x[:, :self.N]), self.code_head(x[:, self.N:])

    def log_prob(self, text, codes):
        """log p(text) and log p(codes | text) in nats (B,) each; text (B, N), codes (B, h, w)."""
        codes = codes.flatten(1)
        return [-F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none").sum(1)
                for logits, target in zip(self(text, codes), (text, codes))]


# ---- 5. The sampler ------------------------------------------------------------------------------


def keep_likely(logits, top_k=0, top_p=1.0):
    """Logits (B, K) with -inf for all but the top_k likeliest (0: all; ties stay) and, of these,
    all but the likeliest that together hold top_p of the probability."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        over = p.cumsum(-1) - p >= top_p  # those before it suffice; never the first
        logits = logits.masked_fill(torch.zeros_like(over).scatter(1, order, over), -math.inf)
    return logits


def draw(out, temperature, uniform):
    """Numbers 0..K-1 (B,) from logits (B, K), by where uniform (B,) falls among the summed
    probabilities."""
    p = F.softmax(out.float() / temperature, -1).cumsum(-1)
    return torch.searchsorted(p, uniform[:, None] * p[:, -1:]).squeeze(1).clamp(
        max=out.shape[1] - 1)


@torch.no_grad()
def draw_codes(net, text, uniform, given=None, w=1.0, temperature=1.0, top_k=0, top_p=1.0):
    """Codes (B, h w) for text (B, N), after those given (B, n); uniform (B, h w): the dice. If w is
    not 1, logits = none + w (cond - none), with the text and an empty one (Ho & Salimans 2022).
    Each place is computed once: its keys and values are kept for those behind."""
    B, codes = len(text), text.new_zeros(len(text), 0) if given is None else given
    if w != 1:  # both in one batch
        text = torch.cat([text, torch.tensor(net.pad([]), device=text.device).expand(B, -1)])
    D, L = len(net.start), net.N + net.h * net.w
    caches = [torch.empty(2, len(text), b.attention.heads, L, D // b.attention.heads,
                          dtype=net.start.dtype, device=text.device) for b in net.blocks]
    at, x = 0, net.embed(text, codes.repeat(len(text) // B, 1))  # all that is known
    for i in range(codes.shape[1], net.h * net.w):
        logits = net.code_head(net.run(x, caches, at)[:, -1]).float()  # (B or 2 B, K)
        at += x.shape[1]
        if w != 1:
            cond, none = logits.chunk(2)
            logits = none + w * (cond - none)
        logits = keep_likely(logits / temperature, top_k, top_p)
        codes = torch.cat([codes, draw(logits, 1.0, uniform[:, i])[:, None]], 1)
        if i + 1 < net.h * net.w:
            x = net.embed_next(codes).repeat(len(text) // B, 1, 1)
    return codes


@torch.no_grad()
def go_on(net, text, known, uniform, temperature=1.0):
    """text (B, N) with all tokens from place `known` on drawn anew from p(text), at least one of
    them a word; uniform (B, N): the dice. (At most N short steps: no cache.)"""
    text, over = text.clone(), torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for i in range(known, net.N):
        logits = net(text, text[:, :0])[0][:, i].float()  # (B, V + N)
        if i == known:
            logits[:, net.V:] = -math.inf
        token = draw(logits, temperature, uniform[:, i])
        over |= token >= net.V  # the first pad ends the text
        text[:, i] = torch.where(over, net.V + i, token)
    return text


# ---- 6. Two that judge: a scorer for reranking, a checker for the report -------------------------


def to_grid(C, D):
    """Convolutions from images (B, C, H, W) to features (B, D, H/4, W/4)."""
    return nn.Sequential(
        nn.Conv2d(C, D // 2, 3, padding=1), nn.ReLU(), nn.Conv2d(D // 2, D, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(D, D, 3, padding=1), nn.ReLU(), nn.Conv2d(D, D, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(D, D, 3, padding=1), nn.ReLU())


class Scorer(nn.Module):
    """CLIP in miniature (Radford et al. 2021): texts and images as directions; those of a pair
    agree."""

    def __init__(self, tokens, N, C, h, w, D, E=64):
        super().__init__()
        self.word, self.place = nn.Embedding(tokens, D), nn.Parameter(0.1 * torch.randn(N, D))
        self.blocks = nn.Sequential(TransformerBlock(D, D // 32), TransformerBlock(D, D // 32))
        self.text_out = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, E))
        self.image = nn.Sequential(to_grid(C, D), nn.Conv2d(D, D, 4, 2, 1), nn.ReLU(), nn.Flatten(),
                                   nn.Linear(D * (h // 2) * (w // 2), E))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def of_text(self, text):
        """text (B, N) -> (B, E), of length 1."""
        x = self.blocks(self.word(text) + self.place).mean(1)
        return F.normalize(self.text_out(x).float(), dim=1)

    def of_image(self, x):
        """x (B, C, H, W) in [-1, 1] -> (B, E), of length 1."""
        return F.normalize(self.image(x).float(), dim=1)


def contrastive_loss(scorer, text, x):
    """Each image is to find its text among those of the batch, and each text its image. An image
    whose text is word for word the same is no wrong answer, and is left out."""
    a, b = scorer.of_text(text), scorer.of_image(x)  # (B, E)
    logits = scorer.log_scale.exp().clamp(max=100) * a @ b.T  # (B, B)
    right = torch.arange(len(a), device=a.device)
    same = (text[:, None] == text).all(2) & (right[:, None] != right)
    logits = logits.masked_fill(same, -math.inf)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


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


# ---- 7. Train ------------------------------------------------------------------------------------


class DallE(nn.Module):
    """All parts: codes of images, the transformer over text and codes, and the two that judge."""

    def __init__(self, args):
        super().__init__()
        C, H, W = args.shape
        self.h, self.w, self.K, self.N = H // 4, W // 4, args.codebook_size, args.text_length
        book = Codebook(self.K, args.code_dim, args.beta, args.decay, False)
        self.autoencoder = VQVAE(C, args.width, args.blocks, book)
        self.bpe = BytePairs(args.learned)
        vocabulary = 256 + len(args.learned)
        self.transformer = Transformer(args, vocabulary, self.K, self.h, self.w)
        self.scorer = Scorer(vocabulary + args.text_length, args.text_length, C, self.h, self.w,
                             args.side_width)
        if args.data == "mnist":
            self.checker = Checker(args.side_width)

    def tokens(self, texts):
        """Texts -> (B, N) on the model's device; they must fit."""
        return torch.tensor([self.transformer.pad(self.bpe.encode(text)) for text in texts],
                            device=self.transformer.start.device)


class ImageStage(nn.Module):
    """Images to codes and back, for fit: batches, the loss, and what the bar shows."""

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
        image, codes, extra = self.net(x)
        error, k = F.mse_loss(image, x), codes.flatten()
        self.used.index_add_(0, k, torch.ones_like(k))
        return error + extra, error

    def text(self):
        used = (self.before if self.before.any() else self.used).clone()
        if WORLD > 1:
            dist.all_reduce(used)
        return f", {(used > 0).sum()} of {len(used)} codes used, perplexity {perplexity(used):.0f}"

    def picture(self):
        return pairs(self.net, self.images[:32])


class TokenStage(nn.Module):
    """Text and codes, one stream."""

    name, unit = "model", "bits a code"

    def __init__(self, args, model, text, codes):
        super().__init__()
        self.net, self.args, self.codes, self.words = model.transformer, args, codes, text
        self.model = (model,)  # a tuple, so that the other parts' weights do not count as its own
        self.empty = model.tokens([""])
        self.steps, self.batch_size, self.lr = args.model_steps, args.model_batch, args.model_lr

    def batch(self, step):
        pick = torch.randint(len(self.codes), (self.batch_size,), device=self.args.device)
        drop = torch.rand(self.batch_size, 1, device=self.args.device)
        # 1 text in 10 becomes empty, so that the model learns p(codes) too, for guidance
        text = torch.where(drop < 0.1, self.empty, self.words[pick])
        return text[RANK::WORLD], self.codes[pick[RANK::WORLD]]

    def forward(self, text, codes):
        """(text + 7 image) / 8, in nats a token, as in the paper; and bits a code."""
        of_text, of_codes = (-p.mean() for p in self.net.log_prob(text, codes))
        of_text, of_codes = of_text / text.shape[1], of_codes / codes[0].numel()
        return (of_text + 7 * of_codes) / 8, of_codes / math.log(2)

    def text(self):
        return f" (uniform {math.log2(self.net.code_head.out_features):g})"

    def picture(self):
        texts = self.args.examples
        text = self.model[0].tokens(texts)
        return rows_of(texts, draw_prompts(self.args, self.model[0], text, 8))


class ScorerStage(nn.Module):
    """Texts and images, as they come back from their codes: those are what it will judge."""

    name, unit = "scorer", "nats"

    def __init__(self, args, model, text, codes):
        super().__init__()
        self.net, self.args, self.words = model.scorer, args, text
        self.images = torch.cat([to_uint8(pictures_of(model, c)) for c in codes.split(500)])
        self.steps, self.batch_size, self.lr = args.side_steps, args.side_batch, args.side_lr

    def batch(self, step):
        pick = torch.randint(len(self.words), (self.batch_size,), device=self.args.device)
        pick = pick[RANK::WORLD]
        return self.words[pick], to_float(self.images[pick])

    def forward(self, text, x):
        loss = contrastive_loss(self.net, text, x)
        return loss, loss

    def text(self):
        return f" (by chance {math.log(self.batch_size / WORLD):.2f})"


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
    if args.shape[1] % 4 or args.shape[2] % 4:
        die(f"--data {args.data}: images of {args.shape[1]} x {args.shape[2]}, but a code stands "
            "for 4 x 4 pixels: height and width must be multiples of 4")
    args.examples = PROMPTS if facts is not None else sorted(set(texts))[:6]
    torch.manual_seed(args.seed)
    model = DallE(args).to(args.device).eval()
    text = model.tokens([read_prompt(model, t, f"--data {args.data}") for t in texts])
    state = ckpt or dict(file=NAME, part="", step=0, history={})
    state["config"] = {k: getattr(args, k) for k in CONFIG}
    if ckpt:
        load_state(model, ckpt, "model")
    else:  # the codebook starts from vectors of the data
        with torch.no_grad():
            some = model.autoencoder.encode(to_float(images[:1000]))
            model.autoencoder.codebook.begin(some)
    say(f"{len(images):,} of {args.data}, shape {args.shape}; text of {args.text_length} tokens, "
        f"{len(args.learned)} of them learned")
    parts = ["codes", "model", "scorer"] + ["checker"] * (facts is not None)
    steps = [args.steps, args.model_steps, args.side_steps, args.side_steps]
    first = parts.index(state["part"]) if ckpt else 0
    first += bool(ckpt) and state["step"] >= steps[first]
    if first == len(parts):
        die(f"--resume: all {state['step']} steps of the {parts[-1]} are done")
    codes = None
    for part in parts[first:]:
        if part != "codes" and codes is None:
            codes = codes_of(model, images)  # all of them, once
        stage = (ImageStage(args, model, images) if part == "codes" else
                 TokenStage(args, model, text, codes) if part == "model" else
                 ScorerStage(args, model, text, codes) if part == "scorer" else
                 CheckerStage(args, model, images, facts))
        if not fit(args, model, stage, state):
            sys.exit(0)
    return model


# ---- 8. Draw -------------------------------------------------------------------------------------

PROMPTS = ["a red seven", "a green three left of a white five", "a purple one above a yellow two",
           "an orange nine right of a cyan six",
           "a red eight left of a white nine", "a blue six below a green seven"]  # never shown


@torch.no_grad()
def codes_of(model, images):
    """Codes (N, h, w) of images (N, C, H, W) uint8; in float32, unlike training."""
    net = model.autoencoder
    return torch.cat([net.codebook(net.encode(to_float(part)))[1] for part in images.split(500)])


@torch.no_grad()
def pictures_of(model, codes):
    """Images (N, C, H, W) in [-1, 1] of codes (N, h, w)."""
    net = model.autoencoder
    return torch.cat([net.decode(net.codebook.lookup(part)) for part in codes.split(500)])


def read_prompt(model, text, what):
    """A text as the model knows texts, in small letters; refused if empty or too long."""
    text, N = " ".join(text.lower().split()), model.N
    if not text:
        die(f"{what}: the text is empty")
    if (n := len(model.bpe.encode(text))) > N:
        die(f"{what} {text!r} has {n} tokens, but {N} fit"
            + ("; take a larger --text-length" if what.startswith("--data") else ""))
    return text


def new_codes(args, model, text, num, given=None):
    """Codes (P, num, h, w): num a text (P, N), after those given (n,). The dice are thrown on
    the CPU: the same whatever the device."""
    net, rng, found = model.transformer, torch.Generator().manual_seed(args.seed), []
    text = text.repeat_interleave(num, 0)
    uniform = torch.rand(len(text), model.h * model.w, generator=rng).to(args.device)
    for part, dice in zip(text.split(500), uniform.split(500)):
        known = None if given is None else given.expand(len(part), -1)
        found.append(draw_codes(net, part, dice, known, args.guidance, args.temperature,
                                args.top_k, args.top_p))  # in float32: on a CPU the fastest here
    return torch.cat(found).view(-1, num, model.h, model.w)


@torch.no_grad()
def draw_prompts(args, model, text, num, best_of=1, given=None):
    """Images (P, num, C, H, W) uint8 of text (P, N); best_of: of so many drawn for each, the one
    whose direction agrees best with the text's, by the scorer."""
    codes = new_codes(args, model, text, num * best_of, given)
    x = to_uint8(pictures_of(model, codes.flatten(0, 1)))
    if best_of > 1:
        of_text = model.scorer.of_text(text)  # (P, E)
        of_image = torch.cat([model.scorer.of_image(to_float(part)) for part in x.split(500)])
        agree = (of_image.view(len(text), num, best_of, -1) * of_text[:, None, None]).sum(-1)
        best = agree.argmax(2).flatten()
        x = x.view(-1, best_of, *x.shape[1:])[torch.arange(len(best), device=best.device), best]
    return x.view(len(text), num, *x.shape[1:])


def rows_of(texts, images):
    """A picture: each text, and below it its images, (P, n, C, H, W) or a list of (n, C, H, W)."""
    parts = []
    for text, x in zip(texts, images):
        row = grid(x, len(x), 776)
        parts += [caption(text, max(row.shape[1], 8 * len(text) + 8)), row]
    return stack(parts)


def sample(args, model):
    """Draws the prompts: samples.npz, and samples.png with each prompt above its row."""
    texts = [prompt_of(model, text) for text in args.prompt or args.examples]
    start = time.time()
    x = draw_prompts(args, model, model.tokens(texts), args.num, args.best_of)
    say(f"{args.num} images of each of {len(texts)} prompts in {time.time() - start:.1f} s")
    save_npz(args.save or args.out / "samples.npz",
             x.flatten(0, 1).permute(0, 2, 3, 1).cpu().numpy(), captions=np.repeat(texts, args.num))
    save_png(args.out / "samples.png", rows_of(texts, x)[None])
    say(f"samples.png in {args.out}\n"
        f"now try: python {NAME}.py --prompt \"a red eight above a cyan two\" --best-of 16 "
        f"--out {args.out}")


def prompt_of(model, text):
    """A --prompt, checked; words that the model has no token for are named."""
    text = read_prompt(model, text, "--prompt")
    for word in text.split():
        if len(model.bpe.encode(word)) > 1:
            say(f"{word!r} has no token of its own and is spelled: perhaps never seen in training")
    return text


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


def complete_image(args, model):
    """Keeps the codes of an image's top half and draws the rest: complete.png. The lowest of them
    see 3 rows below the half; these are not given away, but hold the last row known, repeated."""
    x = image_file(args, "--complete", args.complete)
    texts = [prompt_of(model, text) for text in args.prompt or []] or [""]
    n, half = model.h // 2, x.clone()
    half[:, :, 4 * n:] = x[:, :, 4 * n - 1:4 * n]
    top = codes_of(model, half)[:, :n].flatten()
    best_of = args.best_of if args.prompt else 1  # the scorer judges by a text
    drawn = draw_prompts(args, model, model.tokens(texts), args.num, best_of, top)
    half[:, :, 4 * n:] = 127
    rows = [torch.cat([x, half, d]) for d in drawn]
    heads = [f"image, what is given, drawn: {text or '(no text)'}" for text in texts]
    save_png(args.out / "complete.png", rows_of(heads, rows)[None])
    say(f"complete.png in {args.out}")


# ---- 9. Better prompts (slide Learning better prompts), captions by Bayes' rule ------------------


def enhance(args, model, ways=3):
    """Goes on with a short prompt by p(text), and draws it and each longer one: enhance.png."""
    short, net = prompt_of(model, args.enhance), model.transformer
    known = len(model.bpe.encode(short))
    if known == net.N:
        die(f"--enhance {short!r} has {known} tokens: no room for more")
    dice = torch.rand(ways, net.N, generator=torch.Generator().manual_seed(args.seed))
    tokens = go_on(net, model.tokens([short] * ways), known, dice.to(args.device), args.temperature)
    tokens = torch.cat([model.tokens([short]), tokens])
    texts = [model.bpe.decode([t for t in row if t < net.V]) for row in tokens.tolist()]
    for text in texts[1:]:
        say(f"{short} -> {text}")
    save_png(args.out / "enhance.png",
             rows_of(texts, draw_prompts(args, model, tokens, args.num, args.best_of))[None])
    say(f"enhance.png in {args.out}")


def all_captions():
    """One caption for every scene there can be: 80 of one thing, 12,800 of two."""
    things = [(d, c) for d in range(10) for c in range(8)]
    facts = np.tile(NONE, (80 + 2 * 6400, 5, 1))
    facts[:80, 0] = things
    both = np.array([(a, b) for a in things for b in things])  # (6400, 2, 2)
    facts[80:6480, 1:3], facts[6480:, 3:5] = both, both
    return [describe(f) for f in facts]


@torch.no_grad()
def captions_of(args, model, images, texts, shortlist=32):
    """For images (N, C, H, W) uint8, the likeliest of texts. The scorer picks a shortlist; in it,
    p(text | image) = p(image | text) p(text) / p(image), and the last is the same for all. Returns
    indices of texts (N, n), the scorer's best first, and log p(text) p(image | text) (N, n)."""
    codes, tokens = codes_of(model, images), model.tokens(texts)
    of_text = torch.cat([model.scorer.of_text(part) for part in tokens.split(1000)])
    of_image = model.scorer.of_image(to_float(to_uint8(pictures_of(model, codes))))
    short = (of_image @ of_text.T).topk(min(shortlist, len(texts)), dim=1).indices  # (N, n)
    ask, given = tokens[short].flatten(0, 1), codes.repeat_interleave(short.shape[1], 0)
    found = []
    for t, c in zip(ask.split(500), given.split(500)):
        with autocast(args):
            found.append(sum(model.transformer.log_prob(t, c)))
    return short, torch.cat(found).view(short.shape)


def caption_image(args, model):
    """The likeliest captions of an image: of the prompts, or of all that there are."""
    x = image_file(args, "--caption", args.caption)
    texts = [prompt_of(model, text) for text in args.prompt or []] or all_captions()
    short, log_p = captions_of(args, model, x, texts)
    p = log_p[0].softmax(0)
    for i in p.argsort(descending=True)[:3]:
        say(f"{float(p[i]):.3f}  {texts[short[0, i]]}")


# ---- 10. Measure ---------------------------------------------------------------------------------


def measure(args, model, num=1000):
    """Prints how often the right thing is seen: in real scenes of test digits, in the same from
    their codes, and in what is drawn for prompts whose pairs of digit and colour training shows,
    and whose pairs it never shows; then how often an image's caption is found."""
    images, _, facts = load_pairs(args, "test")
    say(f"{'share that is right':34}   digit  colour  relation   all")

    def report(name, images, facts):
        share = [float(v.mean()) for v in accuracy(model.checker, images, facts)]
        say(f"{name:34}  {share[0]:6.3f}  {share[1]:6.3f}    {share[2]:6.3f}  {share[3]:.3f}")

    report("real scenes", images[:num], facts[:num])
    report("real scenes, from their codes",
           to_uint8(pictures_of(model, codes_of(model, images[:num]))), facts[:num])
    for seen, name in ((True, "drawn, pairs seen"), (False, "drawn, pairs never seen")):
        rng = np.random.default_rng(args.seed + 1)
        wanted = random_facts(num, rng, seen, single=0)
        texts = [describe(f, turn=rng.random() < 0.5 and args.turned > 0) for f in wanted]
        for best_of in sorted({1, args.best_of}):
            x = draw_prompts(args, model, model.tokens(texts), 1, best_of).flatten(0, 1)
            report(name + f", best of {best_of}" * (best_of > 1), x,
                   torch.from_numpy(wanted).to(args.device))
    texts, n = all_captions(), min(num, 200)
    right = [describe(f) for f in facts[:n].cpu().numpy()]
    short, log_p = captions_of(args, model, images[:n], texts)
    bayes = [texts[row[i]] == r for row, i, r in zip(short, log_p.argmax(1), right)]
    scorer = [texts[row[0]] == r for row, r in zip(short, right)]
    say(f"captions of {n} real scenes, all right: by the scorer {np.mean(scorer):.3f}, by p(text | "
        f"image) among its first {short.shape[1]} {np.mean(bayes):.3f}")


@torch.no_grad()
def attention_picture(args, model):
    """Draws the first prompt and shows where five of its codes look, mean over heads: in the image,
    a map a layer, and in the text, its words."""
    first = (args.prompt or args.examples[1:] + args.examples)[0]
    net, text = model.transformer, prompt_of(model, first)
    tokens = model.tokens([text])
    codes = new_codes(args, model, tokens, 1)[0]
    image = to_uint8(pictures_of(model, codes))[0]
    x, maps = net.embed(tokens, codes.flatten(1)), []
    for block, kind in zip(net.blocks, net.kinds):
        q, k, _ = block.attention.split(block.norm1(x))
        mask = getattr(net, f"{kind}_mask")
        weight = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf).softmax(-1)
        maps.append(weight[0].mean(0))  # (L, L)
        x = block(x, mask)
    words = [model.bpe.bytes[t].decode(errors="replace") for t in tokens[0].tolist() if t < net.V]
    maps, rows, h, w = torch.stack(maps), [], model.h, model.w
    for r, c in ((h // 4, w // 2), (h // 2, w // 4), (h // 2, w // 2), (h // 2, w * 3 // 4),
                 (h * 3 // 4, w // 2)):
        look = maps[:, net.N + r * w + c]  # (layers, L)
        tiles, here = [image.clone()], (..., slice(r * 4, r * 4 + 4), slice(c * 4, c * 4 + 4))
        tiles[0][here] = 255 - tiles[0][here]
        for weight in look:  # a place takes in the token before it: code j stands at place j + 1
            seen = F.pad(weight[net.N + 1:], (0, 1)).view(1, h, w)
            seen = (255 * seen / seen.max().clamp(min=1e-9)).byte().repeat_interleave(4, 1)
            tiles.append(seen.repeat_interleave(4, 2).expand(image.shape))
        row = grid(torch.stack(tiles), len(tiles), 600)
        side = np.full((row.shape[0], 300, 3), 255, np.uint8)
        of_words = look[:, 1:len(words) + 1].mean(0)
        for i, word in enumerate(words[:row.shape[0] // 12]):
            end = 100 + int(190 * of_words[i] / of_words.max())
            side[i * 12 + 1:i * 12 + 11, 100:end] = (31, 90, 180)
            draw_text(side, word.strip(), 8, i * 12 + 1)
        rows.append(np.concatenate([row, side], 1))
    head = caption("the code asked, where each layer looks, and at which words", rows[0].shape[1])
    save_png(args.out / "attention.png", stack([head, *rows])[None])
    say(f"attention.png in {args.out}")


# ---- 11. Data ------------------------------------------------------------------------------------


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
    args.sample |= bool(args.prompt) and not (args.complete or args.caption or args.attention)
    verbs = (args.train, args.sample, args.complete, args.enhance is not None, args.caption,
             args.eval, args.attention, args.export)
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
        wanted_sample, args = args.sample, parse_args(argv, ckpt["config"])
        args.sample = wanted_sample
        for key in ("data", "size", "codebook_size", "code_dim", "width", "blocks", "text_length",
                    "merges", "model_width", "model_layers", "heads", "masks", "side_width"):
            if getattr(args, key) != ckpt["config"][key]:
                die(f"--{key.replace('_', '-')} {getattr(args, key)}: {path} was trained with "
                    f"{ckpt['config'][key]}")
        say(f"from {path}, step {ckpt['step']:,} of the {ckpt['part']}")
    try:
        setup(args)
        if args.train:
            model = train(args, ckpt)
        else:
            model = DallE(args).to(args.device).eval()
            load_state(model, ckpt, "model")
        if RANK > 0:
            time.sleep(1)  # a thread of gloo that still holds a tensor would abort a quicker exit
            return
        if args.export:
            ckpt = read_checkpoint(args.out / "model.pt")
            small = {k: ckpt[k] for k in ("file", "config", "part", "step")}
            small["model"] = {k: v.half() for k, v in ckpt["model"].items()}
            save_checkpoint(args.export, small)
        for wanted, verb in ((args.train or args.sample, sample), (args.complete, complete_image),
                             (args.enhance is not None, enhance), (args.caption, caption_image),
                             (args.eval or args.train and args.data == "mnist", measure),
                             (args.train or args.attention, attention_picture)):
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
