"""VQ-VAE: an image becomes a small grid of codes, and a transformer learns which grids occur.

    python vqvae.py --train                       both stages on MNIST, in minutes on a laptop
    python vqvae.py --sample                      100 digits from your model, or the pretrained one
    python vqvae.py --reconstruct                 test images, from their codes alone
    python vqvae.py --compress x.npz --save codes.npz
    python vqvae.py --decompress codes.npz --save y.npz

First stage: an encoder shrinks the image to a grid of vectors, each is replaced by the nearest of K
learned ones, and a decoder restores the image. Second stage: an exact density over grids of codes.

Slides     VQ-VAE; Dall-E (its first stage); Latent Diffusion (the compressed space);
           Autoregressive Models, Sampling (of codes)
Equations  nearest     k = argmin_j |z - e_j|^2
           gradient    z_q = z + stop(e_k - z): the decoder's gradient goes straight to the encoder
           loss        |x - decoder(z_q)|^2 + beta |z - stop(e_k)|^2
           codebook    e_k = running mean of the z that choose it
           prior       p(codes | y) = prod_i p(code_i | code_1, ..., code_{i-1}, y)
           guidance    logits = uncond + w (cond - uncond)
Notation   x (B, C, H, W) images in [-1, 1]; z and z_q, or q, (B, h, w, D) before and after the
           codebook, h = H / 4, w = W / 4; e, or vectors, (K, D); codes (B, h, w) in 0..K-1, for
           the prior (B, n), n = h w, row by row; y (B,) class in 0..classes-1, and one more,
           `classes`, for "none"
Papers     van den Oord et al. 2017 (VQ-VAE); Razavi et al. 2019 (VQ-VAE-2); Vaswani et al. 2017
           (transformer); Ho & Salimans 2022 (guidance); Jordan et al. 2024 (Muon)
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
    "codebook_size": (256, 1024, "K: number of codes"),
    "code_dim": (16, 32, "D: length of their vectors"),
    "beta": (0.25, 0.25, "weight of the commitment loss"),
    "width": (64, 128, "channels of encoder and decoder"),
    "blocks": (2, 3, "residual blocks in each"),
    "codes_steps": (700, 30_000, "training steps of the first stage"),
    "codes_batch_size": (64, 256, "its images per step, over all GPUs"),
    "codes_lr": (2e-3, 5e-4, "its peak learning rate of Adam"),
    "prior_width": (128, 512, "channels of the transformer, a multiple of 32"),
    "prior_layers": (4, 12, "its layers"),
    "steps": (1000, 30_000, "training steps of the second stage"),
    "batch_size": (64, 256, "its images per step, over all GPUs"),
    "lr": (2e-3, 3e-4, "its peak learning rate of Adam: biases, norms, embeddings, output layer"),
    "muon_lr": (0.02, 0.01, "peak learning rate of Muon, in both: all other matrices"),
    "every": (500, 2000, "steps between checkpoints"),
    "guidance": (1.5, 1.5, "w: larger is more typical and less varied; 1 is off"),
}

# ---- 1. Codebook (slide VQ-VAE: "closest vector from a learned codebook") ------------------------


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


# ---- 2. Autoencoder (slide VQ-VAE: "down-sample and compress the image") -------------------------


class Residual(nn.Module):
    """x + convolutions of x (B, width, h, w), 3 x 3 and 1 x 1 (van den Oord et al. 2017)."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Autoencoder(nn.Module):
    """Image -> z, a quarter as high and wide -> codebook -> image."""

    def __init__(self, C, width, blocks, codebook):
        super().__init__()
        half = width // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(C, half, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(half, width, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            *(Residual(width) for _ in range(blocks)), nn.ReLU(),
            nn.Conv2d(width, codebook.D, 1))
        self.codebook = codebook
        self.decoder = nn.Sequential(
            nn.Conv2d(codebook.D, width, 3, padding=1),
            *(Residual(width) for _ in range(blocks)), nn.ReLU(),
            nn.ConvTranspose2d(width, half, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(half, C, 4, stride=2, padding=1))

    def encode(self, x):
        """Images (B, C, H, W) -> z (B, h, w, D)."""
        return self.encoder(x).permute(0, 2, 3, 1).float()

    def decode(self, q):
        """z_q (B, h, w, D) -> images (B, C, H, W)."""
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


# ---- 3. Prior (slide Autoregressive Models: the chain rule, for codes instead of pixels) ---------


class Layer(nn.Module):
    """A transformer layer: causal self-attention in heads of 32 channels, then an MLP."""

    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):  # (B, n, width)
        qkv = self.qkv(self.norm1(x)).to(x.dtype).unflatten(2, (3, -1, 32))  # (B, n, 3, heads, 32)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, n, 32) each
        with torch.autocast(x.device.type, enabled=False):  # CPUs are slow at this in bf16
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Prior(nn.Module):
    """p(codes | y): a transformer that reads the grid row by row and predicts the next code."""

    def __init__(self, K, n, classes, width, layers):
        super().__init__()
        self.classes = classes
        self.code = nn.Embedding(K, width)
        self.label = nn.Embedding(classes + 1, width)  # the last one means "none"
        self.start = nn.Parameter(torch.zeros(width))  # stands before the first code
        self.place = nn.Parameter(torch.zeros(n, width))
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, K)
        nn.init.normal_(self.code.weight, std=0.1)
        nn.init.normal_(self.label.weight, std=0.1)
        nn.init.zeros_(self.head.weight)  # at first all codes are equally likely: log2(K) bits each
        nn.init.zeros_(self.head.bias)

    def forward(self, codes, y):
        """The first i codes (B, i) of the n and classes y (B,) -> logits (B, i + 1, K), at most n:
        output j is for code j, given those before it."""
        x = torch.cat([self.start.expand(len(y), 1, -1), self.code(codes)], dim=1)
        x = x[:, :len(self.place)]  # (B, i + 1, width)
        x = x + self.place[:x.shape[1]] + self.label(y)[:, None]
        return self.head(self.norm(self.layers(x)))


def bits_per_code(prior, codes, y):
    """-log2 p(codes | y) / n, the mean over grids of codes (B, n) of classes y (B,)."""
    logits = prior(codes, y).float()  # (B, n, K)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten()) / math.log(2)


def build(args):
    """Both networks."""
    C, H, W = args.shape
    codebook = Codebook(args.codebook_size, args.code_dim, args.beta)
    autoencoder = Autoencoder(C, args.width, args.blocks, codebook)
    prior = Prior(args.codebook_size, H // 4 * (W // 4), args.classes, args.prior_width,
                  args.prior_layers)
    return nn.ModuleDict({"autoencoder": autoencoder, "prior": prior}).to(args.device)


# ---- 4. Sampling (slide Sampling) ----------------------------------------------------------------


def draw(logits, u):
    """Values (B,) from logits (B, K): where u (B,) falls in the cumulative distribution."""
    p = logits.float().softmax(1).cumsum(1)
    return torch.searchsorted(p, u[:, None] * p[:, -1:], right=True)[:, 0]


@torch.no_grad()
def sample(prior, y, u, guidance=1.0):
    """Codes (B, n), one after another, of classes y (B,); u (B, n) uniform random numbers."""
    none = torch.full_like(y, prior.classes)
    codes = y.new_zeros(len(y), 0)
    for i in range(u.shape[1]):
        logits = prior(codes, y)[:, -1].float()  # (B, K)
        if guidance != 1:  # go further in the direction in which the class changes the logits
            uncond = prior(codes, none)[:, -1].float()
            logits = uncond + guidance * (logits - uncond)
        codes = torch.cat([codes, draw(logits, u[:, i])[:, None]], dim=1)
    return codes


def generate(args, model, y):
    """Images (N, C, H, W) uint8 of classes y (N,): codes from the prior, then the decoder."""
    h, w = args.shape[1] // 4, args.shape[2] // 4
    u = torch.rand(len(y), h * w, generator=torch.Generator().manual_seed(args.seed))  # on the CPU
    batches = zip(y.to(args.device).split(500), u.to(args.device).split(500))
    with autocast(args):
        codes = torch.cat([sample(model.prior, *b, args.guidance) for b in batches])
    return to_uint8(images_of(model.autoencoder, codes.view(-1, h, w)))


# ---- 5. Training: first the codes, then the prior over them --------------------------------------


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


def train_autoencoder(args, model, images, ckpt):
    """First stage: model.autoencoder."""
    net = model.autoencoder
    test, _ = test_set(args, 1000)
    outside = ["encoder.0", f"decoder.{len(net.decoder) - 1}"]  # first and last layer
    opts = optimizers(net, outside, args.codes_lr, args.muon_lr, ckpt)
    start = ckpt["step"] if ckpt else 0
    if not ckpt:
        some = images[torch.randperm(len(images))[:1000].to(args.device)]
        net.codebook.begin(net.encode(to_float(some)))
    if args.compile:
        net.compile()
    ddp = DistributedDataParallel(net) if WORLD > 1 else net
    net.train()  # from now on the codebook follows
    bar = tqdm(range(start + 1, args.codes_steps + 1), "codes", initial=start,
               total=args.codes_steps, disable=RANK > 0)
    for step in bar:
        # Every step has its own seed: --resume continues exactly, and the processes of torchrun,
        # number RANK of WORLD, draw the same global batch, of which each takes its share.
        torch.manual_seed(args.seed * 10_000_000 + step)
        index = torch.randint(len(images), (args.codes_batch_size,), device=args.device)
        x = to_float(images[index[RANK::WORLD]])
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
            _, error, used, perplexity = through_codes(net, test)
            tqdm.write(f"codes, step {step:,}: squared error {error:.5f}, {used} codes used, "
                       f"perplexity {perplexity:.1f}, of {len(test):,} held-out images")
            net.train()
    net.eval()


def train_prior(args, model, images, labels, ckpt):
    """Second stage: a prior over codes, which no longer change. Its average is model.prior."""
    prior = copy.deepcopy(model.prior)
    model.prior.requires_grad_(False)
    opts = optimizers(prior, ["code", "label", "place", "head"], args.lr, args.muon_lr, ckpt)
    start = ckpt["step"] if ckpt else 0
    if ckpt:
        prior.load_state_dict(ckpt["model"])
    codes = codes_of(model.autoencoder, images).flatten(1)  # (N, n)
    test, test_labels = test_set(args, 1000)
    test_codes = codes_of(model.autoencoder, test).flatten(1)
    if args.compile:
        prior.compile()
    ddp = DistributedDataParallel(prior) if WORLD > 1 else prior
    bar = tqdm(range(start + 1, args.steps + 1), "prior", initial=start, total=args.steps,
               disable=RANK > 0)
    for step in bar:
        torch.manual_seed(args.seed * 10_000_000 + step)
        index = torch.randint(len(codes), (args.batch_size,), device=args.device)[RANK::WORLD]
        drop = torch.rand(args.batch_size, device=args.device)[RANK::WORLD]
        y = labels[index].masked_fill(drop < 0.1, args.classes)  # 10 % "none", which guidance needs
        with autocast(args):
            loss = bits_per_code(ddp, codes[index], y)
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        rate = min(1, step / 100) * (1 - (step - 1) / args.steps)
        for opt in opts:
            opt.param_groups[0]["lr"] = rate * opt.defaults["lr"]
            opt.step()
            opt.zero_grad()
        ema_update(model.prior, prior, step)
        if step % 20 == 0:
            bar.set_postfix_str(f"{loss.item():.3f} bits per code")
        if RANK == 0 and (step % args.every == 0 or step == args.steps):
            save_checkpoint(args, step, ema=model.state_dict(), model=prior.state_dict(),
                            optimizer=[opt.state_dict() for opt in opts])
            bits = bits_per_code(model.prior, test_codes, test_labels)
            tqdm.write(f"prior, step {step:,}: {bits:.4f} bits per code, of {len(test_codes):,} "
                       f"held-out images (uniform: {math.log2(args.codebook_size):g})")
            picture = grid(generate(args, model, torch.arange(20) % args.classes), 10)
            save_picture(args.out / f"step_{step:06}.png", picture)


def train(args, ckpt=None):
    """Train both stages, from scratch or from a checkpoint of either, and return the model."""
    images, labels = (a.to(args.device) for a in load_data(args.data, "train", args.data_dir))
    args.shape = list(images.shape[1:])
    args.classes = int(labels.max()) + 1
    if args.shape[1] % 4 or args.shape[2] % 4:
        die(f"--data {args.data}: height and width must be multiples of 4, not {args.shape[1:]}")
    torch.manual_seed(args.seed)
    model = build(args).eval()
    if ckpt:
        model.load_state_dict(ckpt["ema"])
    say(f"{args.device}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(images):,} images of {args.data}, {args.codes_steps:,} + {args.steps:,} steps")
    if ckpt is None or "model" not in ckpt:  # the prior's training has not begun
        train_autoencoder(args, model, images, ckpt)
        ckpt = None
    train_prior(args, model, images, labels, ckpt)
    return model


# ---- 6. Using a trained model --------------------------------------------------------------------


def test_set(args, num=None):
    """The first num test images (N, C, H, W) uint8 and their classes (N,), on the device. A class
    that the training images lack is "none"."""
    images, labels = load_data(args.data, "test", args.data_dir)
    if list(images.shape[1:]) != args.shape:
        die(f"--data {args.data}: shape {list(images.shape[1:])}, but the model has {args.shape}")
    return images[:num].to(args.device), labels[:num].clamp(max=args.classes).to(args.device)


def through_codes(autoencoder, images):
    """Images (N, C, H, W) uint8 to codes and back: images in [-1, 1], their squared error, how many
    of the K codes occur, and the perplexity, which is the exponential of the entropy: K if all
    occur equally often, 1 if there is only one."""
    codes = codes_of(autoencoder, images)
    back = images_of(autoencoder, codes)
    error = F.mse_loss(back, to_float(images)).item()
    p = torch.bincount(codes.flatten(), minlength=autoencoder.codebook.K) / codes.numel()
    return back, error, int((p > 0).sum()), torch.special.entr(p).sum().exp().item()


def reconstruct(args, model):
    """Reconstruct the test images from their codes: reconstruction.png, error, usage."""
    images, _ = test_set(args)
    back, error, used, perplexity = through_codes(model.autoencoder, images)
    rows = zip(images[:50].split(10), to_uint8(back[:50]).split(10))
    picture = grid(torch.cat([torch.cat(pair) for pair in rows]), 10)  # originals above
    save_picture(args.out / "reconstruction.png", picture)
    say(f"test set: squared error {error:.5f}, {used} of {args.codebook_size} codes used, "
        f"perplexity {perplexity:.1f}; {args.out}/reconstruction.png")


def save_samples(args, model):
    """Draw --num samples: samples.npz and samples.png."""
    start = time.time()
    labels = torch.arange(args.num) % args.classes
    images = generate(args, model, labels)
    path = args.save or args.out / "samples.npz"
    np.savez(path, images.permute(0, 2, 3, 1).cpu(), labels=labels)
    save_picture(args.out / "samples.png", grid(images[:100], 10))
    say(f"{args.num} samples in {time.time() - start:.1f} s: {path} and {args.out}/samples.png")


def compress(args, model):
    """Turn images into codes. FILE: an .npz with images or arr_0, (N, H, W, C) uint8."""
    try:
        with np.load(args.compress) as file:
            images = file["images" if "images" in file else "arr_0"]
        images = torch.from_numpy(images.astype(np.uint8, casting="safe").transpose(0, 3, 1, 2))
        if list(images.shape[1:]) != args.shape:
            raise ValueError(f"shape {list(images.shape[1:])}, but the model has {args.shape}")
    except Exception as e:
        die(f"--compress {args.compress}: expected images or arr_0, (N, H, W, C) uint8 ({e})")
    codes = codes_of(model.autoencoder, images.to(args.device))
    kind = np.uint8 if args.codebook_size <= 256 else np.uint16
    path = (args.save or args.out / "codes").with_suffix(".npz")
    np.savez_compressed(path, codes=codes.cpu().numpy().astype(kind))
    say(f"{path}: {path.stat().st_size:,} bytes instead of {images.numel():,}")


def decompress(args, model):
    """Turn codes back into images. FILE: what --compress wrote, with the same model."""
    try:
        with np.load(args.decompress) as file:
            codes = torch.from_numpy(file["codes"].astype(np.int64, casting="safe"))
        if codes.ndim != 3 or codes.min() < 0 or codes.max() >= args.codebook_size:
            raise ValueError(f"shape {list(codes.shape)}, {codes.min()} to {codes.max()}")
    except Exception as e:
        die(f"--decompress {args.decompress}: expected codes that this model has written ({e})")
    images = to_uint8(images_of(model.autoencoder, codes.to(args.device)))
    path = (args.save or args.out / "images").with_suffix(".npz")
    np.savez(path, images.permute(0, 2, 3, 1).cpu())
    say(f"{path}: {len(images):,} images")


VERBS = {"reconstruct": reconstruct, "sample": save_samples, "compress": compress,
         "decompress": decompress}


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
    add("--train", action="store_true", help="train both stages, then --reconstruct and --sample")
    add("--reconstruct", action="store_true", help="test images, from their codes alone")
    add("--sample", action="store_true", help="sample from OUT/model.pt, or else from pretrained/")
    add("--compress", type=Path, metavar="FILE", help="images (.npz) into codes")
    add("--decompress", type=Path, metavar="FILE", help="codes (.npz) into images")
    add("--resume", action="store_true", help="with --train: continue from OUT/model.pt")
    add("--compile", action="store_true", help="torch.compile: slow start, faster steps")
    add("--data", default="mnist", help="mnist, fashion, cifar10, or an .npz with images, labels")
    add("--data-dir", type=Path, default=HERE / "data", help="folder of the data sets")
    add("--out", type=Path, default=Path("out") / NAME, help="folder for everything written")
    add("--size", choices=SIZES, default="small", help="preset for the flags below")
    add("--num", type=int, default=100, help="number of samples")
    add("--save", type=Path, help="file for samples, codes or images (.npz), default in OUT")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, (*values, text) in HPARAMS.items():
        add("--" + name.replace("_", "-"), type=type(values[0]), help=f"{text} {tuple(values)}")
    column = SIZES.index(p.parse_known_args(argv)[0].size)
    p.set_defaults(**{name: row[column] for name, row in HPARAMS.items()} | (config or {}))
    args = p.parse_args(argv)
    return args


def main(argv=None):
    args, ckpt = parse_args(argv), None
    verbs = [verb for name, verb in VERBS.items()
             if getattr(args, name) or args.train and name in ("reconstruct", "sample")]
    if not verbs:
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
    if args.train:
        model = train(args, ckpt)
    else:
        model = build(args).eval()
        model.load_state_dict(ckpt["ema"])
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0:
        for verb in verbs:
            verb(args, model)


if __name__ == "__main__":
    main()
