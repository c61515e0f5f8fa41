"""How fast is latent_diffusion.py beside diffusers?

Question   Milliseconds per evaluation of a batch of latents, and per training step (forward,
           backward, clip, Adam, EMA): the U-Net and diffusers' UNet2DConditionModel with the same
           configuration, and Flux's transformer, whose steps tell what "equal time" is.
Run        pip install diffusers
           python experiments/bench_latent_diffusion.py       flags are latent_diffusion.py's

All take turns within every round, and ratios are medians over rounds: they hold on a noisy machine.
"""
import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import latent_diffusion as ld


def ours(args, backbone):
    """f(x, t, context) and its network."""
    args = copy.copy(args)
    args.backbone = backbone
    net = ld.build(args).denoiser.backbone
    return net, net


def from_diffusers(args):
    from diffusers import UNet2DConditionModel

    last = len(args.channels) - 1
    net = UNet2DConditionModel(
        8, args.latent_dim, args.latent_dim, block_out_channels=args.channels,
        layers_per_block=args.layers, cross_attention_dim=args.text_width,
        attention_head_dim=args.heads, norm_num_groups=args.groups,
        down_block_types=["CrossAttnDownBlock2D"] * last + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * last).to(args.device)
    if "cuda" in args.device:
        net.to(memory_format=torch.channels_last)
    return net, lambda x, t, context: net(x, t, context).sample


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=9, help="measurements of each, in turns")
    p.add_argument("--side", type=int, default=8, help="latents are side x side")
    a, flags = p.parse_known_args(argv)
    args = ld.parse_args(["--coordinates", "0", *flags])  # diffusers has none
    B, D = args.batch_size, args.latent_dim
    x, t = torch.randn(B, D, a.side, a.side, device=args.device), torch.rand(B, device=args.device)
    data = x, 1000 * t, torch.randn(B, ld.TEXT_LENGTH, args.text_width, device=args.device)
    functions, times, sizes = {}, {}, {}
    for name, make in {"latent_diffusion.py, U-Net": lambda: ours(args, "unet"),
                       "diffusers, U-Net": lambda: from_diffusers(args),
                       "latent_diffusion.py, Flux": lambda: ours(args, "flux")}.items():
        try:
            net, f = make()
        except ImportError as e:
            print(f"{name}: not measured, {e}")
            continue
        if args.compile:
            net.compile()
        opt = torch.optim.Adam(net.parameters(), 1e-4, fused=True)
        ema = copy.deepcopy(net).requires_grad_(False)

        def evaluation(f=f):
            with torch.no_grad(), ld.autocast(args):
                return f(*data).sum().item()

        def step(f=f, net=net, opt=opt, ema=ema):
            with ld.autocast(args):
                loss = (f(*data).float() - x).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            ld.ema_update(ema, net, 1)
            return loss.item()

        functions[name], times[name] = (evaluation, step), []
        sizes[name] = sum(p.numel() for p in net.parameters())

    def clock(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    for i in range(a.rounds + 1):  # the first is not counted
        for name, pair in functions.items():
            times[name].append([clock(f) for f in pair])
    print(f"| {B} latents of {a.side} x {a.side} | parameters | evaluation, ms | time | "
          "training step, ms | time |")
    print("| --- | --- | --- | --- | --- | --- |")
    first = times["latent_diffusion.py, U-Net"][1:]
    for name, found in times.items():
        cells = []
        for k in (0, 1):
            ms = 1000 * statistics.median(row[k] for row in found[1:])
            ratio = statistics.median(row[k] / own[k] for row, own in zip(found[1:], first))
            cells.append(f"{ms:.1f} | {ratio:.2f}")
        print(f"| {name} | {sizes[name]:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
