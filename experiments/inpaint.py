"""Inpainting with a model that was never trained for it (RePaint, Lugmayr et al. 2022).

Slide      Sampling from a diffusion model: x_{t-1} is drawn given x_t, step by step
Question   Can a step also respect what is known of the image? After each step the known half is put
           in, with the noise of that time; going forward and back again a few times ("resampling")
           lets the new half agree with it. The class is not given.
Run        python experiments/inpaint.py
Writes     out/inpaint/inpaint.png: test digits, their upper halves, six answers each
"""
import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ddpm
import fid

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@torch.no_grad()
def inpaint(model, known, mask, args, steps=100, rounds=4):
    """Images (B, C, H, W) in [-1, 1] that equal `known` where mask (H, W) is True."""
    abar = ddpm.make_abar(args.schedule).tolist()
    none = torch.full((len(known),), args.classes, device=known.device)
    times = [round(ddpm.T * i / steps) for i in range(steps, -1, -1)]
    x = torch.randn_like(known)
    for t, s in tqdm(list(zip(times, times[1:])), leave=False):
        a_t, a_s = abar[t], abar[s]
        for i in range(rounds if s > 0 else 1):
            if i > 0:  # forward from s to t: q(x_t | x_s)
                x = (a_t / a_s) ** 0.5 * x + (1 - a_t / a_s) ** 0.5 * torch.randn_like(x)
            with ddpm.autocast(args):
                out = model(x, torch.full_like(none, t), none)
            x0 = ddpm.x0_of(out, x, a_t, args.predict).clamp(-1, 1)
            z = ((1 - a_s) / (1 - a_t)) ** 0.5 * torch.randn_like(x)  # the variance of q, not beta
            x = ddpm.ddpm_step(x, x0, a_t, a_s, z)
            x = torch.where(mask, ddpm.q_sample(known, torch.randn_like(x), a_s), x)
    return x  # at s = 0 the known half, exactly


def load_reader():
    """read(images): the classes (N,) that fid.py's classifier sees in images (N, C, H, W) uint8."""
    args = fid.parse_args(["--out", str(ROOT)])  # where there is no model.pt: the pretrained one
    f, _ = fid.choose_features(args)
    return lambda images: fid.summarise(f, images, None, args, "images")["logits"].argmax(1)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "pretrained/ddpm.pt")
    p.add_argument("--num", type=int, default=100, help="test digits")
    p.add_argument("--answers", type=int, default=6, help="for each of them")
    p.add_argument("--out", type=Path, default=Path("out/inpaint"))
    a = p.parse_args(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    ckpt = ddpm.load_checkpoint(a.model)
    args = ddpm.parse_args([], ckpt["config"])
    model = ddpm.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    images, labels = ddpm.load_data(args.data, "test", args.data_dir)
    images, labels = images[:a.num], labels[:a.num]
    known = ddpm.to_float(images).to(args.device)
    H, W = known.shape[2:]
    mask = (torch.arange(H, device=args.device) < H // 2)[:, None].expand(H, W)
    torch.manual_seed(0)
    answers = ddpm.to_uint8(inpaint(model, known.repeat_interleave(a.answers, 0), mask, args)).cpu()

    read, mask = load_reader(), mask.cpu()
    other = torch.where(mask, images, images.roll(1, 0))  # the lower half of another test digit
    rows = [("real test digits", images, labels), ("halves of two different digits", other, labels),
            ("upper half real, lower half drawn", answers, labels.repeat_interleave(a.answers))]
    print("| images | read as the digit of the upper half |\n| --- | --- |")
    for name, x, y in rows:
        print(f"| {name} | {(read(x) == y).float().mean():.3f} of {len(x)} |")

    first = [int((labels == c).nonzero()[0]) for c in labels.unique()]  # one of each class
    panels = (("test digit", images[first], 1), ("given", torch.where(mask, images, 0)[first], 1),
              ("drawn", answers.unflatten(0, (-1, a.answers))[first].flatten(0, 1), a.answers))
    figure, axes = plt.subplots(1, 3, figsize=(8, 10), width_ratios=[1, 1, a.answers],
                                layout="constrained")
    for ax, (title, x, cols) in zip(axes, panels):
        ax.imshow(ddpm.grid(x, cols))
        ax.set_title(title)
        ax.axis("off")
    figure.savefig(a.out / "inpaint.png", dpi=100)
    print(f"{a.out / 'inpaint.png'}: test digit, the given half, {a.answers} answers")


if __name__ == "__main__":
    main()
