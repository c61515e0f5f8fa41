"""Text to image by latent diffusion: Stable Diffusion 1 and Flux in miniature.

    python latent_diffusion.py --train            scenes of two digits, in minutes on a laptop
    python latent_diffusion.py --sample           six prompts, from your model or the pretrained one
    python latent_diffusion.py --prompt "a red seven left of a blue two" --prompt "an orange nine"
    python latent_diffusion.py --train --size unet --out out/unet        a U-Net instead of Flux
    python latent_diffusion.py --describe --size paper      the U-Net of Stable Diffusion 1, printed

First stage: an autoencoder compresses images to latents, a quarter as high and wide. Second stage:
a network that reads a text learns to remove noise from latents. To draw, start from noise, remove
it step by step, and decode.

Slides     Large scale diffusion models, Latent diffusion, Stable Diffusion 1, Note: Add time
           dependency, Unet in Stable Diffusion 1, SiLU, Flux
Equations  add noise   z_t = a_t z_0 + s_t eps,   eps ~ N(0, I)
           diffusion   a_t^2 = (1 - beta_1) ... (1 - beta_{T t}),   s_t^2 = 1 - a_t^2
           flow        a_t = 1 - t,   s_t = t: a straight line from data to noise
           loss        ||f(z_t, t, text) - target||^2
           target      eps;   z_0;   v = a_t eps - s_t z_0;   of a flow dz_t/dt = eps - z_0
           sampling    z_u = a_u z_0 + s_u eps,   u < t, with z_0 and eps estimated at t: DDIM; of
                       a flow, Euler's method
           guidance    f(z_t, t, none) + w (f(z_t, t, text) - f(z_t, t, none))
Notation   x (B, 3, 32, 32) images in [-1, 1]; z (B, D, 8, 8) latents; t (B,) time, 0 is data, 1 is
           noise; a, s (B, 1, 1, 1) are a_t, s_t; text (B, N) tokens of words, then pads; context
           (B, N, E) their embeddings
Papers     Rombach et al. 2022 (latent diffusion); Peebles & Xie 2023 (DiT, adaLN-Zero); Liu et al.
           2023 (rectified flow); Lipman et al. 2023 (flow matching); Esser et al. 2024 (SD 3);
           Song et al. 2021 (DDIM); Salimans & Ho 2022 (v); Ho & Salimans 2022 (guidance); Jordan
           et al. 2024 (Muon)
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

SIZES = ("small", "unet", "base", "paper")
HPARAMS = {  # each row is a flag; --size picks the column: small is Flux, the others U-Nets
    "scenes": (60_000, 60_000, 200_000, 200_000, "number of training scenes"),
    "latent_dim": (4, 4, 4, 4, "D: channels of the latents"),
    "ae_width": (64, 64, 128, 128, "channels of encoder and decoder"),
    "ae_steps": (1000, 1000, 20_000, 200_000, "training steps of the first stage"),
    "ae_lr": (2e-3, 2e-3, 1e-3, 1e-4, "its peak learning rate of Adam"),
    "text_width": (64, 64, 256, 768, "E: channels of the text encoder, a multiple of 32"),
    "text_layers": (2, 2, 4, 12, "its transformer blocks"),
    "backbone": ("flux", "unet", "unet", "unet", "network of the second stage"),
    "objective": ("flow", "v", "v", "eps", "its target: eps, x0 or v of a diffusion, or flow"),
    "coordinates": (1, 1, 1, 0, "1: row and column are two more channels of its input"),
    "channels": ([64, 64], [64, 64], [192, 384], [320, 640, 1280, 1280], "unet: per resolution"),
    "layers": (1, 1, 2, 2, "unet: ResNet blocks per resolution"),
    "groups": (8, 8, 32, 32, "unet: groups of the group norms, a divisor of channels"),
    "heads": (2, 2, 8, 8, "unet: attention heads, a divisor of channels"),
    "patch": (2, 2, 1, 2, "flux: patch x patch latents are one token"),
    "width": (128, 128, 384, 3072, "flux: channels of a token"),
    "double": (2, 2, 4, 19, "flux: blocks with separate weights for text and image"),
    "single": (2, 2, 8, 38, "flux: blocks with shared weights"),
    "flux_heads": (4, 4, 8, 24, "flux: attention heads, a divisor of width / 4"),
    "steps": (1100, 1500, 50_000, 500_000, "training steps of the second stage"),
    "batch_size": (64, 64, 512, 2048, "scenes per step of either stage, over all GPUs"),
    "lr": (2e-3, 4e-3, 3e-4, 1e-4, "peak learning rate of Adam there: biases, norms, outer layers"),
    "muon_lr": (0.02, 0.01, 0.01, 0.01, "peak learning rate of Muon, in both: all other matrices"),
    "every": (500, 500, 5000, 10_000, "steps between checkpoints"),
    "sample_steps": (25, 25, 25, 50, "number of sampling steps, at most T"),
    "guidance": (5.0, 3.0, 3.0, 7.5, "w: larger is more faithful to the text and less varied"),
}
CHOICES = {"backbone": ["unet", "flux"], "objective": ["eps", "x0", "v", "flow"]}

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


# ---- 2. Images to latents (slide Latent diffusion) -----------------------------------------------


class Residual(nn.Module):
    """x + convolutions of x (B, width, h, w), 3 x 3 and 1 x 1 (van den Oord et al. 2017)."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class KLAutoencoder(nn.Module):
    """A variational autoencoder, as in Stable Diffusion: image -> latents, a quarter (there an
    eighth) as high and wide -> image. A latent sees 10 x 10 pixels. (VQ-VAE: see vqvae.py.)"""

    def __init__(self, C, D, width):
        super().__init__()
        half = width // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(C, half, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(half, width, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 1), nn.SiLU(),
            nn.Conv2d(width, 2 * D, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(D, width, 3, padding=1), Residual(width), Residual(width), nn.SiLU(),
            nn.ConvTranspose2d(width, half, 4, stride=2, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(half, C, 4, stride=2, padding=1))
        # Set after the first stage, so that latents have mean 0 and standard deviation 1, as noise.
        # (Stable Diffusion's 0.18215 is its 1 / scale.)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x, noise=0.0):
        """Images (B, C, H, W), noise (B, D, h, w) or 0 -> images from noisy latents, and the mean
        of KL(N(mean, var) || N(0, 1)), which keeps latents smooth and bounded."""
        mean, log_var = self.encoder(x).float().chunk(2, dim=1)  # (B, D, h, w) each
        kl = (mean.square() + log_var.exp() - 1 - log_var).mean() / 2
        return self.decoder(mean + torch.exp(log_var / 2) * noise).float(), kl

    def encode(self, x):
        """Images (B, C, H, W) -> latents (B, D, h, w): the mean, shifted and scaled."""
        mean, _ = self.encoder(x).float().chunk(2, dim=1)
        return (mean - self.shift) / self.scale

    def decode(self, z):
        """Latents (B, D, h, w) -> images (B, C, H, W)."""
        return self.decoder(z * self.scale + self.shift).float()


@torch.no_grad()
def latents_of(autoencoder, images):
    """Images (N, C, H, W) uint8 -> latents (N, D, h, w), in batches and in float32."""
    return torch.cat([autoencoder.encode(to_float(x)) for x in images.split(500)])


# ---- 3. Noise and targets: diffusion and flow in one frame ---------------------------------------

T = 1000  # noise levels
# Stable Diffusion's schedule: sqrt(beta) grows linearly
BETA = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2
ABAR = torch.cat([torch.ones(1), (1 - BETA).cumprod(0)])  # (T + 1,): a_t^2 at t = 0, 1/T, ..., 1


def alpha_sigma(t, objective):
    """a_t and s_t, (B, 1, 1, 1) each, at times t (B,)."""
    t = t.view(-1, 1, 1, 1)
    if objective == "flow":
        return 1 - t, t
    abar = ABAR.to(t.device)[(t * T).round().long()]
    return abar.sqrt().float(), (1 - abar).sqrt().float()


def training_times(u, objective):
    """Times t (B,) from uniform numbers u (B,) in [0, 1). Diffusion: 1/T, ..., 1, equally often.
    Flow: logit-normal, most in the middle, where the velocity is hard to predict (Esser et al.)."""
    if objective == "flow":
        return torch.special.ndtri(u).sigmoid()
    return (1 + (u * T).long()) / T


def target_for(z0, eps, a, s, objective):
    """What the network should output, shaped as z0."""
    return {"eps": eps, "x0": z0, "v": a * eps - s * z0, "flow": eps - z0}[objective]


def to_z0_eps(out, zt, a, s, objective):
    """z_0 and eps from the network's output: the equations of target and z_t, solved for both."""
    if objective == "eps":
        return (zt - s * out) / a, out
    if objective == "x0":
        return out, (zt - a * out) / s
    if objective == "v":
        return a * zt - s * out, s * zt + a * out  # as a^2 + s^2 = 1
    return zt - s * out, zt + a * out  # flow: as a + s = 1


# ---- 4. The U-Net of Stable Diffusion 1 (slides Unet in Stable Diffusion 1, Add time dependency) -


def time_embedding(t, dim):
    """Cosines and sines of t (B,) at dim / 2 frequencies: (B, dim)."""
    freq = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None] * freq  # (B, dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def attend(q, k, v):
    """Attention: q (B, heads, n, d), k and v (B, heads, m, d) -> (B, n, heads d)."""
    if q.requires_grad and q.device.type == "cpu":  # PyTorch's bf16 kernel is slow in training
        h = (q / math.sqrt(q.shape[3]) @ k.mT).softmax(dim=3) @ v
    else:
        h = F.scaled_dot_product_attention(q, k, v)
    return h.transpose(1, 2).flatten(2)


class MultiHeadAttention(nn.Module):
    """Places x (B, n, C) attend to context (B, m, E), or, without one, to each other."""

    def __init__(self, C, E, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(C)
        self.to_q = nn.Linear(C, C, bias=False)
        self.to_k = nn.Linear(E, C, bias=False)
        self.to_v = nn.Linear(E, C, bias=False)
        self.to_out = nn.Linear(C, C)

    def forward(self, x, context=None):
        h = self.norm(x)
        context = h if context is None else context
        qkv = (self.to_q(h), self.to_k(context), self.to_v(context))
        q, k, v = (a.unflatten(2, (self.heads, -1)).transpose(1, 2) for a in qkv)
        return x + self.to_out(attend(q, k, v))


class SpatialTransformer(nn.Module):
    """On the H W places of a feature map: self-attention, cross-attention to the text, an MLP."""

    def __init__(self, C, E, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, C, eps=1e-6)
        self.proj_in = nn.Conv2d(C, C, 1)
        self.self_attention = MultiHeadAttention(C, C, heads)
        self.cross_attention = MultiHeadAttention(C, E, heads)
        self.mlp_norm = nn.LayerNorm(C)
        self.mlp_in = nn.Linear(C, 8 * C)
        self.mlp_out = nn.Linear(4 * C, C)
        self.proj_out = nn.Conv2d(C, C, 1)

    def forward(self, x, context):  # (B, C, H, W), (B, N, E)
        h = self.proj_in(self.norm(x)).flatten(2).mT  # (B, H W, C)
        h = self.cross_attention(self.self_attention(h), context)
        a, gate = self.mlp_in(self.mlp_norm(h)).chunk(2, dim=2)
        h = h + self.mlp_out(a * F.gelu(gate))  # GEGLU (Shazeer 2020)
        return x + self.proj_out(h.mT.reshape(x.shape))


class UNetBlock(nn.Module):
    """A ResNet block, to which the time adds one value per channel; if `attends`, a transformer."""

    def __init__(self, C_in, C, attends, D_time, E, heads, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, C_in)
        self.conv1 = nn.Conv2d(C_in, C, 3, padding=1)
        self.time = nn.Linear(D_time, C)
        self.norm2 = nn.GroupNorm(groups, C)  # groups of one channel would remove the time again
        self.conv2 = nn.Conv2d(C, C, 3, padding=1)
        self.shortcut = nn.Conv2d(C_in, C, 1) if C_in != C else nn.Identity()
        self.transformer = SpatialTransformer(C, E, heads, groups) if attends else None

    def forward(self, x, emb, context):  # (B, C_in, H, W), (B, D_time), (B, N, E)
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C, H, W)
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return self.transformer(h, context) if self.transformer else h


class StableDiffusionUNet(nn.Module):
    """f(z_t, t, text). Down and up blocks of all resolutions but the lowest attend to the text, and
    so does the middle. channels: one number per resolution; E: width of the context."""

    def __init__(self, C_in, C_out, channels, layers, heads, E, groups):
        super().__init__()
        ch, lowest = channels[0], len(channels) - 1
        shared = (4 * ch, E, heads, groups)
        self.width = ch
        self.conv_in = nn.Conv2d(C_in, ch, 3, padding=1)
        self.time_mlp = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skip_channels = [ch]
        for i, C in enumerate(channels):
            for _ in range(layers):
                self.down.append(UNetBlock(ch, C, i < lowest, *shared))
                ch = C
                skip_channels.append(ch)
            if i < lowest:  # half as high and wide
                self.down.append(nn.Conv2d(ch, ch, 3, stride=2, padding=1))
                skip_channels.append(ch)
        self.middle = nn.ModuleList([UNetBlock(ch, ch, True, *shared),
                                     UNetBlock(ch, ch, False, *shared)])
        for i, C in reversed(list(enumerate(channels))):
            for _ in range(layers + 1):
                self.up.append(UNetBlock(ch + skip_channels.pop(), C, i < lowest, *shared))
                ch = C
            if i > 0:
                self.up.append(nn.Conv2d(ch, ch, 3, padding=1))
        self.norm_out = nn.GroupNorm(groups, ch)
        self.conv_out = nn.Conv2d(ch, C_out, 3, padding=1)

    def forward(self, x, t, context):
        """x (B, C_in, h, w), t (B,) in 0..1000, context (B, N, E) -> (B, C_out, h, w)."""
        emb = self.time_mlp(time_embedding(t, self.width))  # (B, 4 width)
        h = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, context) if isinstance(layer, UNetBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb, context)
        for layer in self.up:
            if isinstance(layer, UNetBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), emb, context)
            else:  # twice as high and wide
                h = layer(F.interpolate(h, scale_factor=2.0))
        return self.conv_out(F.silu(self.norm_out(h)))


# ---- 5. The transformer of Flux (slide Flux) -----------------------------------------------------


def zero(layer):
    """Initialise a layer to zero: a residual block then starts as its shortcut."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def rotary(x, place):
    """Rotate pairs of channels of x (B, heads, n, d) by angles proportional to place (n, 2), half
    of the pairs by the row and half by the column: q k then depends on differences of places."""
    quarter = x.shape[3] // 4
    freq = 100.0 ** (-torch.arange(quarter, device=x.device) / quarter)  # Flux: 10,000 for 100
    angle = (place[:, :, None] * freq).flatten(1)  # (n, d / 2)
    a, b = x.float().unflatten(3, (-1, 2)).unbind(4)  # (B, heads, n, d / 2) each
    rotated = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(rotated, dim=4).flatten(3).type_as(x)


def modulate(x, shift, scale):
    """Layer norm of x (B, n, D), with shift and scale (B, 1, D) from time and text (adaLN)."""
    return F.layer_norm(x, x.shape[2:]) * (1 + scale) + shift


class QKV(nn.Module):
    """Queries, keys and values (B, heads, n, d) of x (B, n, D); queries and keys are normalised."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D)
        self.norm_q = nn.RMSNorm(D // heads)
        self.norm_k = nn.RMSNorm(D // heads)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.norm_q(q.float()).type_as(v), self.norm_k(k.float()).type_as(v), v


class Stream(nn.Module):
    """The weights of one stream, text or image, in a double block."""

    def __init__(self, D, heads):
        super().__init__()
        self.modulation = zero(nn.Linear(D, 6 * D))
        self.qkv = QKV(D, heads)
        self.out = nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU("tanh"), nn.Linear(4 * D, D))

    def finish(self, x, h, gate1, shift, scale, gate2):
        """x (B, n, D) after the block, from x before it and the attention's output h (B, n, D)."""
        x = x + gate1 * self.out(h)
        return x + gate2 * self.mlp(modulate(x, shift, scale))


class DoubleBlock(nn.Module):
    """Text and image have separate weights; each attends to both."""

    def __init__(self, D, heads):
        super().__init__()
        self.text = Stream(D, heads)
        self.image = Stream(D, heads)

    def forward(self, text, image, vector, place):  # (B, N, D), (B, n, D), (B, 1, D), (N + n, 2)
        shift1, scale1, *text_rest = self.text.modulation(vector).chunk(6, dim=2)
        shift2, scale2, *image_rest = self.image.modulation(vector).chunk(6, dim=2)
        text_qkv = self.text.qkv(modulate(text, shift1, scale1))
        image_qkv = self.image.qkv(modulate(image, shift2, scale2))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, image_qkv))
        h = attend(rotary(q, place), rotary(k, place), v)  # (B, N + n, D)
        N = text.shape[1]
        return (self.text.finish(text, h[:, :N], *text_rest),
                self.image.finish(image, h[:, N:], *image_rest))


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP in parallel."""

    def __init__(self, D, heads):
        super().__init__()
        self.modulation = zero(nn.Linear(D, 3 * D))
        self.qkv = QKV(D, heads)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU("tanh"))
        self.out = nn.Linear(5 * D, D)

    def forward(self, x, vector, place):  # (B, N + n, D), (B, 1, D), (N + n, 2)
        shift, scale, gate = self.modulation(vector).chunk(3, dim=2)
        h = modulate(x, shift, scale)
        q, k, v = self.qkv(h)
        attended = attend(rotary(q, place), rotary(k, place), v)
        return x + gate * self.out(torch.cat([attended, self.mlp(h)], dim=2))


class FluxTransformer(nn.Module):
    """f(z_t, t, text) on patches of latents. The text enters as tokens; its mean and the time are a
    vector that modulates every block, at first by zero (adaLN-Zero, Peebles & Xie 2023)."""

    def __init__(self, C_in, C_out, patch, D, double, single, heads, E):
        super().__init__()
        self.patch = patch
        self.image_in = nn.Linear(C_in * patch**2, D)
        self.text_in = nn.Linear(E, D)
        self.time_mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.vector_in = nn.Linear(E, D)
        self.double_blocks = nn.ModuleList(DoubleBlock(D, heads) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(D, heads) for _ in range(single))
        self.modulation = zero(nn.Linear(D, 2 * D))
        self.image_out = zero(nn.Linear(D, C_out * patch**2))

    def forward(self, x, t, context):
        """x (B, C_in, h, w), t (B,) in 0..1000, context (B, N, E) -> (B, C_out, h, w)."""
        x = F.pixel_unshuffle(x, self.patch)  # (B, C_in patch^2, rows, cols)
        N, (rows, cols) = context.shape[1], x.shape[2:]
        places = (torch.arange(1.0, n + 1, device=x.device) for n in (rows, cols))
        place = F.pad(torch.cartesian_prod(*places), (0, 0, N, 0))  # (N + n, 2); text is at (0, 0)
        vector = self.time_mlp(time_embedding(t, 256)) + self.vector_in(context.mean(1))
        vector = F.silu(vector)[:, None]  # (B, 1, D)
        text = self.text_in(context)  # (B, N, D)
        image = self.image_in(x.flatten(2).mT)  # (B, n, D)
        for block in self.double_blocks:
            text, image = block(text, image, vector, place)
        both = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            both = block(both, vector, place)
        out = modulate(both[:, N:], *self.modulation(vector).chunk(2, dim=2))
        out = self.image_out(out).mT.unflatten(2, (rows, cols))  # (B, C_out patch^2, rows, cols)
        return F.pixel_shuffle(out, self.patch)


# ---- 6. Text encoder, denoiser and loss ----------------------------------------------------------


class TextEncoder(nn.Module):
    """Tokens (B, N) -> context (B, N, E), by a small transformer that is trained with the denoiser.
    (Stable Diffusion has CLIP's, pretrained; Flux CLIP's and T5's.) Pads are not masked."""

    def __init__(self, E, layers):
        super().__init__()
        self.word = nn.Embedding(len(WORDS) + TEXT_LENGTH, E)
        # as large as the embeddings of words, or the order of words is learned late
        self.place = nn.Parameter(torch.randn(TEXT_LENGTH, E))
        self.blocks = nn.Sequential(*[
            nn.TransformerEncoderLayer(E, E // 32, 4 * E, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True) for _ in range(layers)])
        self.norm = nn.LayerNorm(E)

    def forward(self, text):
        return self.norm(self.blocks(self.word(text) + self.place))


class Denoiser(nn.Module):
    """f(z_t, t, text): text encoder and backbone."""

    def __init__(self, encoder, backbone, coordinates):
        super().__init__()
        self.encoder = encoder
        self.backbone = backbone
        self.coordinates = coordinates

    def denoise(self, z, t, context):
        """z (B, D, h, w), t (B,) in 0..1, context (B, N, E) -> the output (B, D, h, w)."""
        if self.coordinates:  # else the networks see differences of places, and little more
            rows, cols = (torch.linspace(-1, 1, n, device=z.device) for n in z.shape[2:])
            where = torch.stack(torch.meshgrid(rows, cols, indexing="ij"))  # (2, h, w)
            z = torch.cat([z, where.expand(len(z), -1, -1, -1)], dim=1)
        return self.backbone(z, T * t, context).float()

    def forward(self, z, t, text):
        return self.denoise(z, t, self.encoder(text))


def denoising_loss(denoiser, z0, text, t, eps, objective):
    """Mean squared error of the output; every scene of the batch has its own time t."""
    a, s = alpha_sigma(t, objective)
    out = denoiser(a * z0 + s * eps, t, text)
    return F.mse_loss(out, target_for(z0, eps, a, s, objective))


# ---- 7. Sampling ---------------------------------------------------------------------------------


def estimate(denoiser, zt, t, context, none, args):
    """z_0 and eps, as estimated from zt (B, D, h, w) at time t, a number, guided towards the text's
    context (B, N, E) and away from that of the empty text, none (1, N, E)."""
    times = torch.full((len(zt),), t, device=zt.device)
    both = torch.cat([context, none.expand_as(context)])
    cond, uncond = denoiser.denoise(zt.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
    out = uncond + args.guidance * (cond - uncond)
    a, s = alpha_sigma(times, args.objective)
    return to_z0_eps(out, zt, a, s, args.objective)  # z_0 is not clipped: latents are unbounded


@torch.no_grad()
def sample(denoiser, z, text, args):
    """Turn noise z (B, D, h, w) into latents of text (B, N). args are the flags, see HPARAMS."""
    context = denoiser.encoder(text)
    none = denoiser.encoder(to_tokens([""]).to(z.device))
    times = [round(T * i / args.sample_steps) / T for i in range(args.sample_steps, -1, -1)]
    for t, t_next in zip(times, times[1:]):
        z0, eps = estimate(denoiser, z, t, context, none, args)
        a, s = alpha_sigma(torch.tensor([t_next], device=z.device), args.objective)
        z = a * z0 + s * eps  # the same noise, at a lower level
    return z


@torch.no_grad()
def generate(args, model, texts):
    """Images (N, 3, 32, 32) uint8 of captions, a list of N."""
    rng = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(len(texts), args.latent_dim, 8, 8, generator=rng)  # the same on any device
    images = []
    for z, text in zip(noise.split(200), to_tokens(texts).split(200)):
        with autocast(args):
            z = sample(model.denoiser, z.to(args.device), text.to(args.device), args)
        images.append(to_uint8(model.autoencoder.decode(z)))
    return torch.cat(images)


# ---- 8. Training: first the latents, then the denoiser -------------------------------------------


def build(args):
    """Both networks, on the device."""
    C_in = args.latent_dim + 2 * args.coordinates
    if args.backbone == "unet":
        backbone = StableDiffusionUNet(C_in, args.latent_dim, args.channels, args.layers,
                                       args.heads, args.text_width, args.groups)
    else:
        backbone = FluxTransformer(C_in, args.latent_dim, args.patch, args.width, args.double,
                                   args.single, args.flux_heads, args.text_width)
    denoiser = Denoiser(TextEncoder(args.text_width, args.text_layers), backbone, args.coordinates)
    autoencoder = KLAutoencoder(3, args.latent_dim, args.ae_width)
    model = nn.ModuleDict({"autoencoder": autoencoder, "denoiser": denoiser}).to(args.device)
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


def train_autoencoder(args, model, ckpt):
    """Train encoder and decoder; the KL term has weight 1e-4."""
    images, _, _ = load_scenes(args.scenes, "train", "seen", args)
    test = to_float(load_scenes(500, "test", "all", args)[0])
    net, B = model.autoencoder, args.batch_size
    outside = ["encoder.0", "decoder.6"]  # first and last layer
    opts = optimizers(net, outside, args.ae_lr, args.muon_lr, ckpt)
    start = ckpt["step"] if ckpt else 0
    if args.compile:
        net.compile()
    ddp = DistributedDataParallel(net) if WORLD > 1 else net
    bar = tqdm(range(start + 1, args.ae_steps + 1), desc="autoencoder", initial=start,
               total=args.ae_steps, disable=RANK > 0)
    for step in bar:
        # Every step has its own seed: --resume continues exactly, and the processes of torchrun,
        # number RANK of WORLD, draw the same global batch, of which each takes its share.
        torch.manual_seed(args.seed * 10_000_000 + step)
        index = torch.randint(len(images), (B,), device=args.device)[RANK::WORLD]
        noise = torch.randn(B, args.latent_dim, 8, 8, device=args.device)[RANK::WORLD]
        x = to_float(images[index])
        with autocast(args):
            back, kl = ddp(x, noise)
            loss = F.mse_loss(back, x) + 1e-4 * kl
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rate = min(1, step / 100) * (1 - (step - 1) / args.ae_steps)  # warm up, then to almost 0
        for opt in opts:
            opt.param_groups[0]["lr"] = rate * opt.defaults["lr"]
            opt.step()
            opt.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.5f}")
        if RANK == 0 and (step % args.every == 0 or step == args.ae_steps):
            save_checkpoint(args, step, ema=model.state_dict(),
                            optimizer=[opt.state_dict() for opt in opts])
            with torch.no_grad():
                error = F.mse_loss(net(test)[0], test)
            tqdm.write(f"step {step:,}: squared error {error:.5f} in scenes of test digits")


def train_denoiser(args, model, ckpt):
    """Train the denoiser on the latents; model.denoiser becomes the averaged one."""
    # Only a quarter of the captions start with the right or lower digit. With half of them, neither
    # the order of the digits nor the word "left" alone says which is where: that is learned late.
    images, texts, _ = load_scenes(args.scenes, "train", "seen", args, turned=0.25)
    text, none = (to_tokens(t).to(args.device) for t in (texts, [""]))
    tests = [load_scenes(250, "test", pairs, args)[:2] for pairs in ("seen", "held-out")]
    autoencoder, B = model.autoencoder, args.batch_size
    z = latents_of(autoencoder, images)
    if not ckpt:  # from now on latents have mean 0 and standard deviation 1
        autoencoder.shift.copy_(z.mean())
        autoencoder.scale.copy_(z.std())
        z = (z - autoencoder.shift) / autoencoder.scale
    net = copy.deepcopy(model.denoiser).train()
    outside = ["word", "encoder.place", "conv_in", "conv_out", "image_in", "image_out"]
    opts = optimizers(net, outside, args.lr, args.muon_lr, ckpt)
    start = ckpt["step"] if ckpt else 0
    if ckpt:
        net.load_state_dict(ckpt["model"])
    if args.compile:
        net.compile()
    ddp = DistributedDataParallel(net) if WORLD > 1 else net
    bar = tqdm(range(start + 1, args.steps + 1), desc="denoiser", initial=start, total=args.steps,
               disable=RANK > 0)
    for step in bar:
        torch.manual_seed(args.seed * 10_000_000 + step)
        index = torch.randint(len(z), (B,), device=args.device)[RANK::WORLD]
        eps = torch.randn(B, *z.shape[1:], device=args.device)[RANK::WORLD]
        drop = torch.rand(B, 1, device=args.device)[RANK::WORLD]
        # the times are spread evenly over the batch
        u = (torch.rand((), device=args.device) + torch.arange(B, device=args.device) / B) % 1
        t = training_times(u[RANK::WORLD], args.objective)
        given = torch.where(drop < 0.1, none, text[index])  # 10 % empty, which guidance needs
        with autocast(args):
            loss = denoising_loss(ddp, z[index], given, t, eps, args.objective)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rate = min(1, step / 100) * (1 - (step - 1) / args.steps)
        for opt in opts:
            opt.param_groups[0]["lr"] = rate * opt.defaults["lr"]
            opt.step()
            opt.zero_grad()
        ema_update(model.denoiser, net, step)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if RANK == 0 and (step % args.every == 0 or step == args.steps):
            save_checkpoint(args, step, ema=model.state_dict(), model=net.state_dict(),
                            optimizer=[opt.state_dict() for opt in opts])
            seen, held_out = (held_out_loss(args, model, *scenes) for scenes in tests)
            tqdm.write(f"step {step:,}: test loss {seen:.4f}, {held_out:.4f} if pairs are held out")
            drawn = generate(args, model, [prompt for prompt in PROMPTS for _ in range(8)])
            save_picture(args.out / f"step_{step:06}.png", grid(drawn, 8))


@torch.no_grad()
def held_out_loss(args, model, images, texts):
    """The loss of the averaged denoiser, always at the same times and with the same noise."""
    z0, text = latents_of(model.autoencoder, images), to_tokens(texts).to(args.device)
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0)).to(args.device)
    t = training_times(torch.arange(0.5, len(z0), device=args.device) / len(z0), args.objective)
    return denoising_loss(model.denoiser, z0, text, t, eps, args.objective).item()


# ---- 9. Drawing with a trained model -------------------------------------------------------------


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


@torch.no_grad()
def draw_latents(args, model):
    """Rows of latents.png: a scene, its latent channels in grey, and their reconstruction."""
    images, _, _ = load_scenes(8, "test", "seen", args, single=0)
    z = latents_of(model.autoencoder, images)  # (8, D, 8, 8); in grey, -3 is black and 3 white
    grey = F.interpolate(to_uint8(z / 3), scale_factor=4)[:, :, None].expand(-1, -1, 3, -1, -1)
    columns = [images, *grey.unbind(1), to_uint8(model.autoencoder.decode(z))]
    picture = grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns))
    save_picture(args.out / "latents.png", picture)
    say(f"{args.out}/latents.png: images of {images[0].numel():,} numbers, their latents of "
        f"{z[0].numel()}, and images from these")


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
    add("--train", action="store_true", help="train both stages, then --sample; latents.png")
    add("--sample", action="store_true", help="sample from OUT/model.pt, or else from pretrained/")
    add("--prompt", action="append", metavar="TEXT", help="sample this; may be given repeatedly")
    add("--describe", action="store_true", help="print the network and its number of parameters")
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
        many = isinstance(values[0], list)
        add("--" + name.replace("_", "-"), type=type(values[0][0] if many else values[0]),
            nargs="+" if many else None, choices=CHOICES.get(name), help=f"{text} {tuple(values)}")
    column = SIZES.index(p.parse_known_args(argv)[0].size)
    p.set_defaults(**{name: row[column] for name, row in HPARAMS.items()} | (config or {}))
    args = p.parse_args(argv)
    to_tokens(args.prompt or [])  # or die
    return args


def main(argv=None):
    args, ckpt = parse_args(argv), None
    if args.describe:
        args.device = "meta"  # shapes alone: nothing is allocated
        with torch.device("meta"):
            net = build(args).denoiser.backbone
        return print(net, f"{sum(p.numel() for p in net.parameters()):,} parameters", sep="\n")
    if not (args.train or args.sample or args.prompt):
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
            f"{args.scenes:,} scenes, {args.ae_steps:,} + {args.steps:,} steps")
        if ckpt is None or "model" not in ckpt:  # the denoiser's training has not begun
            train_autoencoder(args, model, ckpt)
            ckpt = None
        train_denoiser(args, model, ckpt)
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0:
        if args.train:
            draw_latents(args, model)
        save_samples(args, model)


if __name__ == "__main__":
    main()
