"""Text to image in token space: DALL-E in miniature.

    python dalle_mini.py --train                  scenes of two digits, in minutes on a laptop
    python dalle_mini.py --sample                 six prompts, from your model or the pretrained one
    python dalle_mini.py --prompt "a red seven left of a blue two" --prompt "an orange nine"
    python dalle_mini.py --complete               the lower half of scenes, from the upper half

First stage: a VQ-VAE turns an image into a grid of codes, whole numbers. Second stage: a caption
and the codes of its image are one stream of tokens, and a transformer learns which token comes
next. To draw, it continues a caption with codes, and the decoder turns them into pixels.

Slides     Dall-E; VQ-VAE (the first stage)
Equations  codes       k = argmin_j |z - e_j|^2,   z = encoder(x)
           first stage |x - decoder(z_q)|^2 + beta |z - stop(e_k)|^2,   z_q = z + stop(e_k - z)
           stream      p(text, codes) = prod_i p(text_i | before) prod_j p(code_j | text, before)
           loss        (text + 7 codes) / 8, both in nats per token
           guidance    logits = uncond + w (cond - uncond),   uncond: given the empty text
Notation   x (B, 3, 32, 32) images in [-1, 1]; z, z_q (B, 8, 8, d) before and after the codebook;
           e: vectors (K, d); codes (B, 8, 8) in 0..K-1, flat for the transformer: (B, n), the first
           n in reading order; text (B, N): tokens of words 0..V-1, then pads
Papers     Ramesh et al. 2021 (DALL-E); van den Oord et al. 2017 (VQ-VAE); Vaswani et al. 2017
           (transformer); Ho & Salimans 2022 (guidance); Jordan et al. 2024 (Muon)
"""
import argparse
import copy
import gzip
import math
import os
import struct
import sys
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
    "scenes": (60_000, 200_000, "number of training scenes"),
    "codebook_size": (256, 512, "K: number of codes"),
    "code_dim": (16, 32, "d: length of a code's vector"),
    "codes_width": (64, 128, "channels of encoder and decoder"),
    "codes_steps": (1200, 20_000, "training steps of the first stage"),
    "codes_lr": (2e-3, 1e-3, "its peak learning rate of Adam"),
    "width": (128, 512, "D: channels of the transformer"),
    "layers": (4, 8, "its blocks"),
    "heads": (4, 8, "its attention heads, a divisor of width"),
    "steps": (1200, 50_000, "training steps of the second stage, the transformer"),
    "batch_size": (64, 256, "scenes per step of either stage, over all GPUs"),
    "lr": (3e-3, 5e-4, "peak learning rate of Adam there: biases, norms, embeddings, output"),
    "muon_lr": (0.02, 0.01, "peak learning rate of Muon, in both: all other matrices"),
    "every": (500, 5000, "steps between checkpoints"),
    "guidance": (2.0, 2.0, "w: larger is more faithful to the text and less varied; 1 is off"),
}

# ---- 1. Scenes and captions (slide Dall-E: "Conditioned on text prompts") ------------------------
#
# Two coloured digits on a dark canvas, and a sentence about them. This world is made of parts: we
# can ask for what training never showed, like the slide's daikon radish in a tutu, and count.

DIGITS = "zero one two three four five six seven eight nine".split()
COLOURS = {"red": (255, 40, 40), "green": (40, 210, 60), "blue": (70, 90, 255),
           "yellow": (255, 240, 60), "purple": (170, 60, 220), "cyan": (60, 230, 240),
           "orange": (255, 140, 20), "white": (250, 250, 250)}
PLACES = [(16, 16), (16, 8), (16, 24), (8, 16), (24, 16)]  # (y, x): middle, left, right, up, down
RELATIONS = {(1, 2): "left of", (2, 1): "right of", (3, 4): "above", (4, 3): "below"}  # of places
EMPTY = (10, 8)  # digit and colour of a place where nothing stands
WORDS = ["a", "an", "left", "right", "of", "above", "below", *COLOURS, *DIGITS]
TEXT_LENGTH = 8  # words of the longest caption
PROMPTS = ["a red seven", "a green three left of a white five", "a purple one above a yellow two",
           "an orange nine right of a cyan six",
           "a red eight left of a white nine", "a blue six below a green seven"]  # held-out pairs


def random_facts(n, rng, pairs, single=0.2):
    """What stands where in n scenes: facts (n, 5, 2), digit and colour at each of PLACES, or EMPTY.
    A share `single` has one digit, the others have two. Of the 80 pairs of digit and colour, 10
    never occur in training; pairs is "seen", "held-out" or "all"."""
    held_out = {"seen": [False], "held-out": [True], "all": [False, True]}[pairs]
    allowed = [(d, c) for d in range(10) for c in range(8) if ((d + c) % 8 == 0) in held_out]
    facts = np.tile(EMPTY, (n, 5, 1))
    for scene in facts:
        places = [0] if rng.random() < single else [[1, 2], [3, 4]][rng.integers(2)]
        for place in places:
            scene[place] = allowed[rng.integers(len(allowed))]
    return facts


def caption_of(facts, turn=False):
    """The caption of a scene, from its facts (5, 2); turn: start with the right or lower digit."""
    places = [place for place in range(5) if facts[place, 0] < 10]
    places = places[::-1] if turn else places
    names = []
    for digit, colour in facts[places]:
        colour = list(COLOURS)[colour]
        names.append(f"{'an' if colour == 'orange' else 'a'} {colour} {DIGITS[digit]}")
    return names[0] if len(names) == 1 else f"{names[0]} {RELATIONS[tuple(places)]} {names[1]}"


def render(facts, digits, labels, rng):
    """Scenes (N, 3, 32, 32) uint8 of facts (N, 5, 2). Each digit is a random one of its class, from
    digits (M, 1, 28, 28) uint8 with labels (M,), scaled to 14 x 14 and moved by up to a pixel."""
    of_class = [np.flatnonzero(labels == d) for d in range(10)]
    where = np.argwhere(facts[:, :, 0] < 10)  # (S, 2): scene and place
    what = facts[where[:, 0], where[:, 1]]  # (S, 2): digit and colour
    picks = [of_class[d][rng.integers(len(of_class[d]))] for d in what[:, 0]]
    ink = torch.from_numpy(digits[picks, :, 3:25, 3:25]).float() / 255  # with 99 % of the ink
    ink = F.interpolate(ink, size=14, mode="bilinear", antialias=True).numpy()  # (S, 1, 14, 14)
    colours = np.array(list(COLOURS.values()))[what[:, 1], :, None, None]  # (S, 3, 1, 1)
    scenes = np.full((len(facts), 3, 32, 32), 16, np.uint8)
    for (scene, place), alpha, colour in zip(where, ink, colours):
        y, x = PLACES[place] + rng.integers(-1, 2, size=2) - 7  # the upper left corner
        scenes[scene, :, y:y + 14, x:x + 14] = (16 + alpha * (colour - 16)).round()
    return torch.from_numpy(scenes)


def load_scenes(n, split, pairs, args, single=0.2, turned=0.5):
    """n scenes: images (n, 3, 32, 32) uint8 on the device, captions (a list), facts (n, 5, 2).
    split: train or test, the part of MNIST whose digits are used; pairs, single: see random_facts;
    turned: share of captions that start with the right or lower digit."""
    part = {"train": "train", "test": "t10k"}[split]
    digits = data_file("mnist", f"{part}-images-idx3-ubyte.gz", args.data_dir)
    labels = data_file("mnist", f"{part}-labels-idx1-ubyte.gz", args.data_dir)
    digits = np.frombuffer(digits, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.frombuffer(labels, np.uint8, offset=8)
    rng = np.random.default_rng([args.seed, split == "test"])
    facts = random_facts(n, rng, pairs, single)
    images = render(facts, digits, labels, rng).to(args.device)
    texts = [caption_of(scene, rng.random() < turned) for scene in facts]
    return images, texts, torch.from_numpy(facts).to(args.device)


def to_tokens(texts):
    """Captions -> tokens (B, TEXT_LENGTH): word numbers, then pads; the empty text is pads alone.
    Every place has a pad of its own, len(WORDS) + place. An unknown word ends the program."""
    rows = []
    for text in texts:
        words = text.lower().split()
        if unknown := [word for word in words if word not in WORDS]:
            die(f"{text!r}: {', '.join(unknown)} unknown; the words are {' '.join(WORDS)}")
        if len(words) > TEXT_LENGTH:
            die(f"{text!r} has {len(words)} words, more than {TEXT_LENGTH}")
        pads = [len(WORDS) + place for place in range(len(words), TEXT_LENGTH)]
        rows.append([WORDS.index(word) for word in words] + pads)
    return torch.tensor(rows)


# ---- 2. Codes (slide VQ-VAE: "closest vector from a learned codebook") ---------------------------


def nearest_code(z, vectors):
    """The index (N,) of the vector, of (K, D), that is nearest to each z (N, D)."""
    # |z - e|^2 = |z|^2 - 2 z e + |e|^2, and |z|^2 is the same for all e. In bf16, near vectors
    # would be confused.
    with torch.autocast(z.device.type, enabled=False):
        return torch.addmm(vectors.square().sum(1) / 2, z, vectors.T, alpha=-1).argmin(1)


def straight_through(z, q):
    """The value of q with the gradient of z."""
    return z + (q - z).detach()


class Codebook(nn.Module):
    """K vectors of length D, the running means of the z that choose them (van den Oord et al. 2017,
    appendix A.1). Unused ones restart at some z."""

    def __init__(self, K, D, beta, decay=0.99):
        super().__init__()
        self.K, self.D = K, D
        self.beta, self.decay = beta, decay
        self.register_buffer("vectors", torch.randn(K, D))
        self.register_buffer("count", torch.ones(K))  # running: how many z per step choose a code,
        self.register_buffer("total", self.vectors.clone())  # and the sum of these z

    @torch.no_grad()
    def begin(self, z):
        """Start from vectors of z (..., D), all different if there are K: random numbers, far from
        all z, would stay unused."""
        z = z.flatten(0, -2).unique(dim=0)
        self.vectors.copy_(z[torch.randperm(len(z))[torch.arange(self.K) % len(z)]])
        self.total.copy_(self.vectors)
        self.count.fill_(1)

    def forward(self, z):
        """z (B, h, w, D) -> z_q (B, h, w, D), codes (B, h, w), commitment loss (a scalar)."""
        flat = z.detach().flatten(0, 2)  # (B h w, D)
        k = nearest_code(flat, self.vectors)
        codes = k.view(z.shape[:3])
        q = self.vectors[codes]
        if self.training:  # after the lookup: this step still uses the old vectors
            self.follow(flat, k)
        return straight_through(z, q), codes, self.beta * F.mse_loss(z, q.detach())

    @torch.no_grad()
    def follow(self, z, k):
        """One step of the running means, from z (N, D) and their codes k (N,). Returns which codes
        have restarted, (K,) bool."""
        count = torch.zeros_like(self.count).index_add_(0, k, torch.ones_like(z[:, 0]))
        total = torch.zeros_like(self.total).index_add_(0, k, z)
        fresh = z[torch.randint(len(z), (self.K,), device=z.device)]
        if dist.is_initialized():  # the processes of torchrun keep the same codebook
            dist.all_reduce(count)
            dist.all_reduce(total)
            dist.broadcast(fresh, 0)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        # unused: chosen less than once in two steps, and 30 times less than if all codes were equal
        unused = self.count < (0.03 * count.sum() / self.K).clamp(max=0.5)
        self.count.masked_fill_(unused, 1)
        self.total.copy_(torch.where(unused[:, None], fresh, self.total))
        self.vectors.copy_(self.total / self.count[:, None])
        return unused


class Residual(nn.Module):
    """x + convolutions of x (B, width, h, w), 3 x 3 and 1 x 1 (van den Oord et al. 2017)."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class LocalAutoencoder(nn.Module):
    """Image -> z, a quarter as high and wide -> codebook -> image. Each z sees only 10 x 10 pixels:
    if it saw more, every stroke would change many codes, and they would be harder to predict."""

    def __init__(self, C, width, codebook):
        super().__init__()
        half = width // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(C, half, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(half, width, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 1), nn.ReLU(),
            nn.Conv2d(width, codebook.D, 1))
        self.codebook = codebook
        self.decoder = nn.Sequential(
            nn.Conv2d(codebook.D, width, 3, padding=1), Residual(width), Residual(width), nn.ReLU(),
            nn.ConvTranspose2d(width, half, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(half, C, 4, stride=2, padding=1))

    def encode(self, x):
        """Images (B, C, H, W) -> z (B, h, w, d)."""
        return self.encoder(x).permute(0, 2, 3, 1).float()

    def decode(self, q):
        """z_q (B, h, w, d) -> images (B, C, H, W)."""
        return self.decoder(q.permute(0, 3, 1, 2)).float()

    def forward(self, x):
        """Images -> images from their codes, codes (B, h, w), commitment loss."""
        q, codes, commitment = self.codebook(self.encode(x))
        return self.decode(q), codes, commitment


@torch.no_grad()
def codes_of(autoencoder, images):
    """Images (N, C, H, W) uint8 -> codes (N, h, w), in batches and in float32."""
    batches = [autoencoder.encode(to_float(x)) for x in images.split(500)]
    return torch.cat([autoencoder.codebook(z)[1] for z in batches])


@torch.no_grad()
def images_of(autoencoder, codes):
    """Codes (N, h, w) -> images (N, C, H, W) in [-1, 1], in batches and in float32."""
    vectors = autoencoder.codebook.vectors
    return torch.cat([autoencoder.decode(vectors[k]) for k in codes.split(500)])


# ---- 3. One transformer over text and codes (slide Dall-E: "Generation in token-space") ----------


class TransformerBlock(nn.Module):
    """Causal self-attention, then an MLP at every place."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x, past=None):
        """x (B, n, D) -> x (B, n, D), and the keys and values of all places so far: with these as
        `past`, the next x are the places that follow."""
        B, n, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, n, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, n, D / heads) each
        if past is not None:
            k = torch.cat([past[0], k], dim=2)  # (B, heads, m, D / heads), m places so far
            v = torch.cat([past[1], v], dim=2)
        m = k.shape[2]
        scores = q @ k.mT / math.sqrt(D / self.heads)  # (B, heads, n, m)
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(m - n + 1)
        weights = scores.masked_fill(later, -math.inf).softmax(dim=3)
        h = (weights @ v).transpose(1, 2).reshape(B, n, D)
        x = x + self.out(h)
        return x + self.mlp(self.norm2(x)), (k, v)


class Transformer(nn.Module):
    """p(text, codes) = p(text) p(codes | text), token by token. The stream has N + h w places. A
    place gets the token before it as input (the first place a learned start) and predicts its own:
    the last token of the text, often a pad, is the input that predicts the first code. Words and
    codes have separate embeddings and heads, so that none is predicted where the other belongs."""

    def __init__(self, V, N, K, h, w, D, layers, heads):
        super().__init__()
        self.N = N
        self.word = nn.Embedding(V + N, D)  # words, and a pad for each place
        self.code = nn.Embedding(K, D)
        self.start = nn.Parameter(torch.zeros(D))
        self.place = nn.Parameter(torch.zeros(N, D))
        self.row = nn.Parameter(torch.zeros(h, 1, D))
        self.col = nn.Parameter(torch.zeros(1, w, D))
        self.blocks = nn.ModuleList(TransformerBlock(D, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(D)
        self.word_head = nn.Linear(D, V + N)
        self.code_head = nn.Linear(D, K)
        self.register_buffer("none", V + torch.arange(N), persistent=False)  # the empty text
        for embedding in (self.word, self.code):
            nn.init.normal_(embedding.weight, std=0.1)
        for p in [*self.word_head.parameters(), *self.code_head.parameters()]:
            nn.init.zeros_(p)  # at first all tokens are equally likely

    def features(self, text, codes, past=None):
        """text (B, N), codes (B, n) -> features (B, N + n + 1, D) for the heads, at most N + h w of
        them, and the keys and values of every block. With these as `past`, the next call, with one
        code more, computes only the newest place: (B, 1, D)."""
        start = self.start.expand(len(text), 1, -1)
        tokens = torch.cat([start, self.word(text), self.code(codes)], dim=1)
        places = torch.cat([self.place, (self.row + self.col).flatten(0, 1)])  # (N + h w, D)
        x = tokens[:, :len(places)] + places[:tokens.shape[1]]
        if past:
            x = x[:, -1:]
        cache = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, past[i] if past else None)
            cache.append(kv)
        return self.norm(x), cache

    def forward(self, text, codes):
        """Logits of text (B, N, V + N), and of codes (B, n + 1, K), but at most h w of them."""
        h, _ = self.features(text, codes)
        return self.word_head(h[:, :self.N]), self.code_head(h[:, self.N:])


def stream_loss(transformer, text, codes):
    """DALL-E's loss, and its part for the codes, in nats per token; text (B, N), codes (B, h w)."""
    of_text, of_codes = transformer(text, codes)
    text_nats = F.cross_entropy(of_text.float().flatten(0, 1), text.flatten())
    code_nats = F.cross_entropy(of_codes.float().flatten(0, 1), codes.flatten())
    return (text_nats + 7 * code_nats) / 8, code_nats


# ---- 4. Sampling ---------------------------------------------------------------------------------


def draw(logits, u):
    """Values (B,) from logits (B, K): where u (B,) falls in the cumulative distribution."""
    p = logits.float().softmax(1).cumsum(1)
    return torch.searchsorted(p, u[:, None] * p[:, -1:], right=True)[:, 0]


@torch.no_grad()
def sample(transformer, text, codes, u, guidance=1.0, cached=True):
    """Continue codes (B, n), n may be 0, after text (B, N): all codes (B, h w), from uniform random
    numbers u (B, h w). cached: compute only the newest place, from the cached keys and values of
    those before it; otherwise all places, again for every code."""
    both = torch.cat([text, transformer.none.expand_as(text)])  # (2 B, N): the text, the empty one
    past = None
    for i in range(codes.shape[1], u.shape[1]):
        h, cache = transformer.features(both, codes.repeat(2, 1), past)
        cond, uncond = transformer.code_head(h[:, -1]).chunk(2)  # (B, K) each
        code = draw(uncond + guidance * (cond - uncond), u[:, i])
        codes = torch.cat([codes, code[:, None]], dim=1)
        past = cache if cached else None
    return codes


def generate(args, model, texts, codes=None):
    """Images (N, 3, 32, 32) uint8 of captions, a list of N; codes (N, n): the first n of each."""
    text = to_tokens(texts).to(args.device)
    codes = text[:, :0] if codes is None else codes
    u = torch.rand(len(text), 64, generator=torch.Generator().manual_seed(args.seed))  # on the CPU
    batches = zip(text.split(200), codes.split(200), u.to(args.device).split(200))
    codes = torch.cat([sample(model.transformer, *batch, args.guidance) for batch in batches])
    return to_uint8(images_of(model.autoencoder, codes.view(-1, 8, 8)))


# ---- 5. Training: first the codes, then the transformer ------------------------------------------


def build(args):
    """Both networks; scenes have 8 x 8 codes."""
    K = args.codebook_size
    autoencoder = LocalAutoencoder(3, args.codes_width, Codebook(K, args.code_dim, beta=0.25))
    transformer = Transformer(len(WORDS), TEXT_LENGTH, K, 8, 8, args.width, args.layers, args.heads)
    return nn.ModuleDict({"autoencoder": autoencoder, "transformer": transformer}).to(args.device)


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


def train_autoencoder(args, model, ckpt):
    """First stage: encoder, codebook and decoder."""
    images, _, _ = load_scenes(args.scenes, "train", "seen", args)
    test, _, _ = load_scenes(500, "test", "all", args)
    net = model.autoencoder
    outside = ["encoder.0", "decoder.6"]  # first and last layer
    opts = optimizers(net, outside, args.codes_lr, args.muon_lr, ckpt)
    start = ckpt["step"] if ckpt else 0
    if not ckpt:
        net.codebook.begin(net.encode(to_float(images[:1000])))
    if args.compile:
        net.compile()
    ddp = DistributedDataParallel(net) if WORLD > 1 else net
    net.train()
    bar = tqdm(range(start + 1, args.codes_steps + 1), desc="codes", initial=start,
               total=args.codes_steps, disable=RANK > 0)
    for step in bar:
        # Every step has its own seed: --resume continues exactly, and the processes of torchrun,
        # number RANK of WORLD, draw the same global batch, of which each takes its share.
        torch.manual_seed(args.seed * 10_000_000 + step)
        index = torch.randint(len(images), (args.batch_size,), device=args.device)[RANK::WORLD]
        x = to_float(images[index])
        with autocast(args):
            back, _, commitment = ddp(x)
            error = F.mse_loss(back, x)
        (error + commitment).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rate = min(1, step / 100) * (1 - (step - 1) / args.codes_steps)  # warm up, then to almost 0
        for opt in opts:
            opt.param_groups[0]["lr"] = rate * opt.defaults["lr"]
            opt.step()
            opt.zero_grad()
        if step % 20 == 0:
            bar.set_postfix_str(f"squared error {error.item():.4f}")
        if RANK == 0 and (step % args.every == 0 or step == args.codes_steps):
            save_checkpoint(args, step, ema=model.state_dict(),
                            optimizer=[opt.state_dict() for opt in opts])
            net.eval()
            codes = codes_of(net, test)
            error = F.mse_loss(images_of(net, codes), to_float(test))
            net.train()
            tqdm.write(f"codes, step {step:,}: squared error {error:.5f} in scenes of test digits, "
                       f"{len(codes.unique())} of {args.codebook_size} codes used")
    net.eval()


def load_tokens(args, model, n, split, pairs):
    """n scenes as tokens: text (n, N) and codes (n, 64)."""
    images, texts, _ = load_scenes(n, split, pairs, args)
    return to_tokens(texts).to(args.device), codes_of(model.autoencoder, images).flatten(1)


def train_transformer(args, model, ckpt):
    """Second stage, over the codes of the first. model.transformer becomes the average of net."""
    text, codes = load_tokens(args, model, args.scenes, "train", "seen")
    tests = [load_tokens(args, model, 250, "test", pairs) for pairs in ("seen", "held-out")]
    net = copy.deepcopy(model.transformer)
    outside = ["word", "code", "start", "place", "row", "col", "word_head", "code_head"]
    opts = optimizers(net, outside, args.lr, args.muon_lr, ckpt)
    start = ckpt["step"] if ckpt else 0
    if ckpt:
        net.load_state_dict(ckpt["model"])
    if args.compile:
        net.compile()
    ddp = DistributedDataParallel(net) if WORLD > 1 else net
    bar = tqdm(range(start + 1, args.steps + 1), desc="transformer", initial=start,
               total=args.steps, disable=RANK > 0)
    for step in bar:
        torch.manual_seed(args.seed * 10_000_000 + step)
        index = torch.randint(len(codes), (args.batch_size,), device=args.device)[RANK::WORLD]
        drop = torch.rand(args.batch_size, 1, device=args.device)[RANK::WORLD]
        given = torch.where(drop < 0.1, net.none, text[index])  # 10 % empty, which guidance needs
        with autocast(args):
            loss, nats = stream_loss(ddp, given, codes[index])
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rate = min(1, step / 100) * (1 - (step - 1) / args.steps)
        for opt in opts:
            opt.param_groups[0]["lr"] = rate * opt.defaults["lr"]
            opt.step()
            opt.zero_grad()
        ema_update(model.transformer, net, step)
        if step % 20 == 0:
            bar.set_postfix_str(f"{nats.item() / math.log(2):.3f} bits per code")
        if RANK == 0 and (step % args.every == 0 or step == args.steps):
            save_checkpoint(args, step, ema=model.state_dict(), model=net.state_dict(),
                            optimizer=[opt.state_dict() for opt in opts])
            with torch.no_grad():
                nats = [stream_loss(model.transformer, *tokens)[1].item() for tokens in tests]
            tqdm.write(f"transformer, step {step:,}: {nats[0] / math.log(2):.3f} bits per code in "
                       f"scenes of test digits, {nats[1] / math.log(2):.3f} if pairs are held out")
            drawn = generate(args, model, [prompt for prompt in PROMPTS for _ in range(8)])
            save_picture(args.out / f"step_{step:06}.png", grid(drawn, 8))


# ---- 6. Drawing with a trained model -------------------------------------------------------------


def save_samples(args, model):
    """Draw --num images per prompt: samples.npz and samples.png, with a row per prompt."""
    start = time.time()
    prompts = args.prompt or PROMPTS
    texts = [prompt for prompt in prompts for _ in range(args.num)]
    images = generate(args, model, texts)
    path = args.save or args.out / "samples.npz"
    np.savez(path, images.permute(0, 2, 3, 1).cpu(), captions=texts)
    save_picture(args.out / "samples.png", grid(images, args.num))
    for number, prompt in enumerate(prompts, 1):
        say(f"row {number}: {prompt}")
    say(f"{len(texts)} samples in {time.time() - start:.1f} s: {path} and {args.out}/samples.png")


def complete_scenes(args, model):
    """Complete the lower half of scenes of test digits: complete.png.

    Columns: the scene, what is given, four completions with the caption, four without any text."""
    images, texts, _ = load_scenes(8, "test", "seen", args, single=0)
    given = images.clone()
    given[:, :, 16:] = images[:, :, 15:16]  # codes of the fourth row see 3 pixels below the half
    codes = codes_of(model.autoencoder, given).flatten(1)[:, :32]
    captions = [caption for text in texts for caption in 4 * [text] + 4 * [""]]
    drawn = generate(args, model, captions, codes.repeat_interleave(8, dim=0))
    given[:, :, 16:] = 128
    columns = [images, given, *drawn.view(8, 8, 3, 32, 32).unbind(1)]
    save_picture(args.out / "complete.png", grid(torch.stack(columns, dim=1).flatten(0, 1), 10))
    for number, text in enumerate(texts, 1):
        say(f"row {number}: {text}")


# ---- Plumbing: the same in every file; skip it on a first reading --------------------------------

HERE, NAME = Path(__file__).resolve().parent, Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
URLS = {"mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/"}


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
    add("--train", action="store_true", help="train both stages, then sample")
    add("--sample", action="store_true", help="sample from OUT/model.pt, or else from pretrained/")
    add("--complete", action="store_true", help="lower halves of scenes: complete.png")
    add("--prompt", action="append", metavar="TEXT", help="sample this; may be given repeatedly")
    add("--resume", action="store_true", help="with --train: continue from OUT/model.pt")
    add("--compile", action="store_true", help="torch.compile: slow start, faster steps")
    add("--data-dir", type=Path, default=HERE / "data", help="folder of the data sets")
    add("--out", type=Path, default=Path("out") / NAME, help="folder for everything written")
    add("--size", choices=SIZES, default="small", help="preset for the flags below")
    add("--num", type=int, default=8, help="number of samples per prompt")
    add("--save", type=Path, help="file for the samples (.npz), default OUT/samples.npz")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, (*values, text) in HPARAMS.items():
        add("--" + name.replace("_", "-"), type=type(values[0]), help=f"{text} {tuple(values)}")
    column = SIZES.index(p.parse_known_args(argv)[0].size)
    p.set_defaults(**{name: row[column] for name, row in HPARAMS.items()} | (config or {}))
    args = p.parse_args(argv)
    to_tokens(args.prompt or [])  # or die
    return args


def main(argv=None):
    args, ckpt = parse_args(argv), None
    draws = args.train or args.sample or args.prompt
    if not (draws or args.complete):
        return parse_args(["--help"])
    if args.resume or not args.train:
        path = args.out / "model.pt"
        if not path.exists() and not args.resume:
            path = HERE / "pretrained" / f"{NAME}.pt"
        ckpt = load_checkpoint(path)
        args = parse_args(argv, ckpt["config"])
        say(f"{path}, step {ckpt['step']:,}")
        if not args.train and "optimizer" in ckpt and "model" not in ckpt:
            say("only the first stage is trained: samples are noise")
    if WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = build(args).eval()
    if ckpt:
        model.load_state_dict(ckpt["ema"])
    if args.train:
        say(f"{args.device}: {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{args.scenes:,} scenes, {args.codes_steps:,} + {args.steps:,} steps")
        if ckpt is None or "model" not in ckpt:  # the transformer's training has not begun
            train_autoencoder(args, model, ckpt)
            ckpt = None
        train_transformer(args, model, ckpt)
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0 and draws:
        save_samples(args, model)
    if RANK == 0 and args.complete:
        complete_scenes(args, model)


if __name__ == "__main__":
    main()
