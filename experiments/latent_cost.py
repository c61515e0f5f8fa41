"""What does compressing the image first save?

Slide      Latent diffusion: "Diffusion needs many evaluations of the noise estimator. We can make
           it cheaper but first compressing the image into a latent representation."
Question   The same U-Net on latents (4 x 8 x 8) and on pixels (3 x 32 x 32) of scenes: FLOPs and
           milliseconds per image, for an evaluation and for a training step. For Stable Diffusion
           1, on latents of 64 x 64 and on images of 512 x 512, FLOPs alone.
Run        python experiments/latent_cost.py                  flags are latent_diffusion.py's

FLOPs are counted by PyTorch without computing anything: two for every multiplication and addition
of convolutions and matrix products. Times are medians; the networks take turns in every round.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import latent_diffusion as ld


def unet(args, C):
    return ld.StableDiffusionUNet(C, C, args.channels, args.layers, args.heads, args.text_width,
                                  args.groups)


def inputs(args, B, C, size, tokens, device):
    """x, t, context."""
    return (torch.randn(B, C, size, size, device=device), torch.rand(B, device=device) * 1000,
            torch.randn(B, tokens, args.text_width, device=device))


def flops(args, C, size, tokens):
    """Of one image: an evaluation, and a training step (forward and backward)."""
    with torch.device("meta"):  # shapes alone
        net, data = unet(args, C), inputs(args, 1, C, size, tokens, "meta")
        with FlopCounterMode(display=False) as counter:
            out = net(*data)
            forward = counter.get_total_flops()
            out.sum().backward()
    return forward, counter.get_total_flops()


def timed(args, C, size, tokens):
    """Functions that compute an evaluation and a training step of a batch."""
    net = unet(args, C).to(args.device)
    x, t, context = inputs(args, args.batch_size, C, size, tokens, args.device)
    opt = torch.optim.Adam(net.parameters(), 1e-4, fused=True)

    def evaluation():
        with torch.no_grad(), ld.autocast(args):
            return net(x, t, context).sum().item()

    def step():
        with ld.autocast(args):
            loss = net(x, t, context).float().square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.item()

    return evaluation, step


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=5, help="measurements of each, in turns")
    a, flags = p.parse_known_args(argv)
    args = ld.parse_args(flags)
    kinds = {f"latents, {args.latent_dim} x 8 x 8": (args.latent_dim, 8, ld.TEXT_LENGTH),
             "pixels, 3 x 32 x 32": (3, 32, ld.TEXT_LENGTH)}
    functions = {name: timed(args, *kind) for name, kind in kinds.items()}
    times = {name: [] for name in kinds}
    for _ in range(a.rounds + 1):
        for name in kinds:
            row = []
            for function in functions[name]:
                start = time.perf_counter()
                function()
                row.append((time.perf_counter() - start) / args.batch_size)
            times[name].append(row)
    print("| the same U-Net on | GFLOP: evaluation, step | ms: evaluation, step | times as much |")
    print("| --- | --- | --- | --- |")
    first_flops = first_ms = None
    for name, kind in kinds.items():
        counts = flops(args, *kind)
        ms = [1000 * statistics.median(column) for column in zip(*times[name][1:])]
        first_flops, first_ms = first_flops or counts, first_ms or ms
        ratios = [x / y for x, y in zip([*counts, *ms], [*first_flops, *first_ms])]
        print(f"| {name} | {counts[0] / 1e9:.4f}, {counts[1] / 1e9:.4f} | {ms[0]:.2f}, {ms[1]:.2f} "
              f"| FLOP {ratios[0]:.1f}, {ratios[1]:.1f}; ms {ratios[2]:.1f}, {ratios[3]:.1f} |")
    paper, first = ld.parse_args(["--size", "paper"]), None
    for name, kind in {"Stable Diffusion 1: latents, 4 x 64 x 64": (4, 64, 77),
                       "Stable Diffusion 1: pixels, 3 x 512 x 512": (3, 512, 77)}.items():
        counts = flops(paper, *kind)
        first = first or counts
        print(f"| {name} | {counts[0] / 1e9:,.0f}, {counts[1] / 1e9:,.0f} | | "
              f"FLOP {counts[0] / first[0]:.1f}, {counts[1] / first[1]:.1f} |")


if __name__ == "__main__":
    main()
