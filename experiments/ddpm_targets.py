"""Which target should the network predict: the noise eps, the image x_0, or v?

Slide      Predicting images instead of noise: "In practice predicting noise works often a bit
           better"
Question   After equally many steps, which target gives the best pictures, and which the best bound
           on the likelihood?
Run        python experiments/ddpm_targets.py                    three trainings, then the table
           python experiments/ddpm_targets.py --models pretrained/ddpm.pt        only the table
Writes     out/ddpm_targets/targets.png: samples from the same noise; the terms of the bound

The bound is DDPM's Eq. 5 in bits/dim, given the class, on the MNIST test set:
L_T + L_{T-1} + ... + L_0, with L_{t-1} = KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ).
"""
import argparse
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ddpm
import fid

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def normal_kl(mean1, var1, mean2, var2):
    """KL( N(mean1, var1) || N(mean2, var2) ) in nats per element; the variances are numbers."""
    return 0.5 * (math.log(var2 / var1) + (var1 + (mean1 - mean2) ** 2) / var2 - 1)


def log_prob_of_level(x, mean, var):
    """log P(x) in nats of grey levels x in [-1, 1], 1/127.5 apart, under N(mean, var) cut into 256
    bins; the outermost bins take the tails, so that the 256 sum to 1 (DDPM Eq. 13)."""
    lower = torch.where(x < -0.999, -math.inf, (x - 1 / 255 - mean) / math.sqrt(var))
    upper = torch.where(x > 0.999, math.inf, (x + 1 / 255 - mean) / math.sqrt(var))
    # Phi(upper) - Phi(lower), mirrored to the left tail, where its logarithm is accurate
    right = lower > 0
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_phi = torch.special.log_ndtr
    return log_phi(upper) + torch.log1p(-(log_phi(lower) - log_phi(upper)).exp())


def bound_term(x0, guess, t, abar):
    """L_{t-1} in nats per image (B,), for images x0 and the model's estimates of them from x_t; at
    t = 1 the decoder's -log p(x_0 | x_1). abar: a list. p has the variance of q (DDPM, section 3.2:
    the best choice for one image), which is 0 at t = 1; that of t = 2 stands in."""
    a_t, a_s = (abar[t], abar[t - 1]) if t > 1 else (abar[2], abar[1])
    var = (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
    if t == 1:
        return -log_prob_of_level(x0, guess, var).flatten(1).sum(1)
    k = math.sqrt(a_s) * (1 - a_t / a_s) / (1 - a_t)  # the share of x_0 in the mean of q (Eq. 7)
    return normal_kl(k * x0, var, k * guess, var).flatten(1).sum(1)


@torch.no_grad()
def bound(model, args, images, labels, n=64):
    """Terms of the bound in bits/dim, (T + 1,): L_T, L_0, L_1, ..., L_{T-1}, each the mean over n
    images of the test set drawn for it; and the standard error of their sum."""
    abar = ddpm.make_abar(args.schedule).tolist()
    scale = 1 / (math.log(2) * math.prod(args.shape))  # nats per image -> bits per dimension
    x0 = ddpm.to_float(images).double()
    prior = normal_kl(abar[-1] ** 0.5 * x0, 1 - abar[-1], 0.0, 1.0).flatten(1).sum(1)
    terms, variance = [prior.mean().item() * scale], 0.0
    torch.manual_seed(args.seed)
    for t in tqdm(range(1, ddpm.T + 1), desc=f"bound of {args.predict}", leave=False):
        i = torch.randint(len(images), (n,))
        x0 = ddpm.to_float(images[i]).to(args.device)
        xt = ddpm.q_sample(x0, torch.randn_like(x0), abar[t])
        out = model(xt, torch.full((n,), t, device=args.device), labels[i].to(args.device))
        guess = ddpm.x0_of(out, xt, abar[t], args.predict).clamp(-1, 1)
        nats = bound_term(x0.cpu().double(), guess.cpu().double(), t, abar) * scale
        terms.append(nats.mean().item())
        variance += nats.var().item() / n
    return np.array(terms), math.sqrt(variance)


def load_judge():
    """score(images, labels): the Frechet distance to MNIST's training set in the features of
    fid.py's classifier, and the share of images that the classifier reads as their labels."""
    args = fid.parse_args(["--out", str(ROOT)])  # where there is no model.pt: the pretrained one
    f, _ = fid.choose_features(args)
    images, labels = ddpm.load_data("mnist", "train", ROOT / "data")
    real = fid.summarise(f, images, labels, args, "mnist:train")

    def score(images, labels):
        fake = fid.summarise(f, images, labels, args, "samples")
        accuracy = (fake["logits"].argmax(1) == labels).float().mean().item()
        return fid.frechet_distance(real["mu"], real["S"], fake["mu"], fake["S"]), accuracy

    return score


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--models", type=Path, nargs="+", help="checkpoints, instead of training")
    p.add_argument("--steps", type=int, default=1100, help="of training, for each target")
    p.add_argument("--num", type=int, default=1000, help="samples for FD and accuracy")
    p.add_argument("--out", type=Path, default=Path("out/ddpm_targets"))
    a = p.parse_args(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    models = a.models or [a.out / name / "model.pt" for name in ("eps", "x0", "v")]
    for path in models:
        if not path.exists():
            ddpm.main(["--train", "--steps", str(a.steps), "--out", str(path.parent), "--predict",
                       path.parent.name])
    test, test_labels = ddpm.load_data("mnist", "test", ROOT / "data")
    score = load_judge()
    heights = [0.8] * len(models) + [3]
    figure, rows = plt.subplots(len(heights), height_ratios=heights, figsize=(8, sum(heights)),
                                layout="constrained")
    print("| target | steps | w = 1: FD, accuracy | w = 1.75: FD, accuracy | bits/dim | L_T | L_0 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path, row in zip(models, rows):
        ckpt = ddpm.load_checkpoint(path)
        args = ddpm.parse_args([], ckpt["config"])
        model = ddpm.build(args).eval()
        model.load_state_dict(ckpt["ema"])
        cells = []
        for args.guidance in (1.0, 1.75):
            images, labels = ddpm.generate(args, model, a.num)
            cells.append("{:.3f}, {:.3f}".format(*score(images, labels)))
        row.imshow(ddpm.grid(images[:10], 10))
        row.set_ylabel(args.predict)
        row.set(xticks=[], yticks=[])
        terms, error = bound(model, args, test, test_labels)
        rows[-1].loglog(range(1, ddpm.T + 1), terms[1:], label=args.predict)
        print(f"| {args.predict} | {ckpt['step']:,} | {cells[0]} | {cells[1]} | {terms.sum():.3f} "
              f"+- {error:.3f} | {terms[0]:.5f} | {terms[1]:.3f} |", flush=True)
    index = [(test_labels == c).nonzero()[:, 0] for c in range(10)]
    index = torch.cat([i[torch.linspace(0, len(i) - 1, a.num // 10).long()] for i in index])
    floor = score(test[index], test_labels[index])  # as many of each class as there are samples
    print("| real test digits | | | {:.3f}, {:.3f} | 8 (uniform) | | |".format(*floor))
    rows[-1].set(xlabel="t", ylabel="$L_{t-1}$ in bits/dim")
    rows[-1].legend()
    figure.savefig(a.out / "targets.png", dpi=120)
    print(f"{a.out / 'targets.png'}: samples from the same noise, and the terms of the bound")


if __name__ == "__main__":
    main()
