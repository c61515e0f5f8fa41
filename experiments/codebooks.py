"""Three codebooks after equal time, and an honest bound on the likelihood of a VQ-VAE.

Slide      VQ-VAE: "replace activations with closest vector from a learned codebook"
Question   Running means (vqvae.py), vectors learned by gradient (the paper's Eq. 3), or rounding
           without vectors (FSQ, Mentzer et al. 2023)? And how good a density is a VQ-VAE?
Run        python experiments/codebooks.py            four trainings of 75 s

p(x | y) is a sum over all grids of codes. The grid that the encoder chooses is one term of it, so
    -log p(x | y) <= -log p(codes | y) - log p(x | codes).
"""
import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import vqvae


class Gradient(vqvae.Codebook):
    """Vectors moved by the gradient of |stop(z) - e|^2; unused ones restart as in vqvae.py."""

    def __init__(self, K, D, beta):
        super().__init__(K, D, beta)
        del self.vectors
        self.vectors = nn.Parameter(self.total.clone())

    def forward(self, z):
        q, codes, commitment = super().forward(z)
        return q, codes, commitment + F.mse_loss(self.vectors[codes], z.detach())

    @torch.no_grad()
    def follow(self, z, k):
        before = self.vectors.clone()
        unused = super().follow(z, k)
        self.vectors.copy_(torch.where(unused[:, None], self.vectors, before))


class Rounding(nn.Module):
    """Every number of z is squashed into [-1, 1] and rounded to a level: a digit of its code."""

    def __init__(self, levels):
        super().__init__()
        self.K, self.D = math.prod(levels), len(levels)
        self.register_buffer("levels", torch.tensor(levels))
        self.register_buffer("places", torch.tensor([1, *levels[:-1]]).cumprod(0))
        digits = torch.arange(self.K)[:, None] // self.places % self.levels
        self.register_buffer("vectors", digits * (2 / (self.levels - 1)) - 1)

    def forward(self, z):
        z = z.float().tanh()
        digits = ((z + 1) / 2 * (self.levels - 1)).round().long()  # (B, h, w, D) in 0..level-1
        codes = (digits * self.places).sum(-1)
        return vqvae.straight_through(z, self.vectors[codes]), codes, z.new_zeros(())


def train(args, net, images, seconds, loss_of):
    """Minimise loss_of(x, index) for so many seconds. Returns the number of steps."""
    opt = torch.optim.Adam(net.parameters(), args.codes_lr, (0.9, 0.95), fused=True)
    start, step = time.time(), 0
    net.train()
    while (spent := (time.time() - start) / seconds) < 1:
        step += 1
        torch.manual_seed(step)
        index = torch.randint(len(images), (args.codes_batch_size,), device=args.device)
        opt.param_groups[0]["lr"] = args.codes_lr * min(1, step / 100) * (1 - spent)
        with vqvae.autocast(args):
            loss = loss_of(vqvae.to_float(images[index]), index)
        loss.backward()
        opt.step()
        opt.zero_grad()
    net.eval()
    return step


def codes_loss(net, x):
    back, _, extra = net(x)
    return F.mse_loss(back, x) + extra


def log_bin(x, centre, log_scale):
    """log P(x) in nats of 256 grey levels x in [-1, 1] under a logistic distribution, in bins:
    sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - exp(a - b)). The outermost take the tails."""
    inverse = torch.exp(-log_scale.clamp(min=-7))
    a = torch.where(x < -0.999, -math.inf, inverse * (x - centre - 1 / 255))
    b = torch.where(x > 0.999, math.inf, inverse * (x - centre + 1 / 255))
    return F.logsigmoid(b) + F.logsigmoid(-a) + torch.log(-torch.expm1(a - b))


def image_bits(head, autoencoder, x, codes):
    """-log2 p(x | codes) in bits/dim, of images x (B, C, H, W): a logistic for every number, whose
    shift and log scale the head, which alone gets a gradient, reads off the decoder's features."""
    with torch.no_grad():
        q = autoencoder.codebook.vectors[codes]
        features = autoencoder.decoder[:-1](q.permute(0, 3, 1, 2))  # (B, width / 2, H / 2, W / 2)
        image = autoencoder.decoder[-1](features).float()
    shift, log_scale = head(features).float().chunk(2, dim=1)
    return -log_bin(x, image + shift, log_scale - 3).mean() / math.log(2)


@torch.no_grad()
def bound(model, head, images, labels):
    """-log2 p(codes | y) and -log2 p(x | codes) in bits/dim, means over images (N, C, H, W)."""
    total = torch.zeros(2)
    for x, y in zip(images.split(500), labels.split(500)):
        codes = vqvae.codes_of(model.autoencoder, x)
        prior = vqvae.bits_per_code(model.prior, codes.flatten(1), y) * codes.numel() / x.numel()
        image = image_bits(head, model.autoencoder, vqvae.to_float(x), codes)
        total += torch.tensor([prior, image]) * len(x) / len(images)
    return total.tolist()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "pretrained/vqvae.pt", help="for the bound")
    p.add_argument("--seconds", type=float, default=75, help="of each training")
    a = p.parse_args(argv)
    ckpt = vqvae.load_checkpoint(a.model)
    args = vqvae.parse_args([], ckpt["config"])
    images = vqvae.load_data(args.data, "train", args.data_dir)[0].to(args.device)
    test, test_labels = vqvae.test_set(args)
    size = 240, args.code_dim, args.beta
    print(f"| {a.seconds:g} s each | steps | error | used | perplexity |\n|---|---|---|---|---|")
    for book in (vqvae.Codebook(*size), Gradient(*size), Rounding([8, 6, 5])):
        torch.manual_seed(args.seed)
        net = vqvae.Autoencoder(args.shape[0], args.width, args.blocks, book).to(args.device)
        if hasattr(book, "begin"):
            book.begin(net.encode(vqvae.to_float(images[:1000])))
        steps = train(args, net, images, a.seconds, lambda x, _: codes_loss(net, x))
        _, error, used, perplexity = vqvae.through_codes(net, test)
        print(f"| {type(book).__name__} | {steps:,} | {error:.5f} | {used} | {perplexity:.1f} |")
    model = vqvae.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    codes = vqvae.codes_of(model.autoencoder, images)
    head = nn.Sequential(nn.Conv2d(args.width // 2, 64, 3, padding=1), nn.ReLU(),
                         nn.ConvTranspose2d(64, 2 * args.shape[0], 4, 2, 1)).to(args.device)
    train(args, head, images, a.seconds,
          lambda x, index: image_bits(head, model.autoencoder, x, codes[index]))
    prior, image = bound(model, head, test, test_labels)
    print(f"at most {prior + image:.4f} bits/dim: codes {prior:.4f}, image given them {image:.4f}")


if __name__ == "__main__":
    main()
