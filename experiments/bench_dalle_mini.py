"""How fast does dalle_mini.py draw with its cache, without it, and beside DALLE-pytorch?

Question   Drawing: milliseconds for 16 images of 64 codes, at the default guidance. Training:
           scenes per second of one step (forward, backward, clip, Adam, EMA). The peer's network
           has the same width, layers, heads and length of text.
Run        pip install dalle-pytorch                             it brings torchvision with it
           python experiments/bench_dalle_mini.py                a peer that is missing is left out

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
import dalle_mini


def ours(args, text, codes, u, cached):
    """A network, loss(), draw()."""
    net = dalle_mini.build(args).transformer

    def draw():
        drawn = dalle_mini.sample(net, text[:16], codes[:16, :0], u, args.guidance, cached)
        return drawn.tolist()

    return net, lambda: dalle_mini.stream_loss(net, text, codes)[0], draw


def from_dalle_pytorch(args, text, codes, u):
    from dalle_pytorch import DALLE, DiscreteVAE

    vae = DiscreteVAE(image_size=32, num_tokens=args.codebook_size, codebook_dim=args.code_dim,
                      num_layers=2, hidden_dim=args.codes_width).to(args.device)
    net = DALLE(dim=args.width, vae=vae, num_text_tokens=1 + int(text.max()), depth=args.layers,
                text_seq_len=text.shape[1], heads=args.heads, dim_head=args.width // args.heads)
    net = net.to(args.device)

    def draw():
        net.generate_images(text[:16].clamp(min=1), filter_thres=0.0, cond_scale=args.guidance,
                            use_cache=True)

    return net, lambda: net(text, codes, return_loss=True), draw


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=5, help="measurements of each, in turns")
    a, flags = p.parse_known_args(argv)  # other flags are dalle_mini.py's, such as --batch-size
    args = dalle_mini.parse_args(flags)
    B, makers = args.batch_size, {
        "dalle_mini.py, cached": lambda *data: ours(args, *data, cached=True),
        "dalle_mini.py, not cached": lambda *data: ours(args, *data, cached=False),
        "DALLE-pytorch, cached": lambda *data: from_dalle_pytorch(args, *data)}
    text = torch.randint(len(dalle_mini.WORDS), (B, dalle_mini.TEXT_LENGTH), device=args.device)
    codes = torch.randint(args.codebook_size, (B, 64), device=args.device)
    u = torch.rand(16, 64, device=args.device)
    steps, draws, times, sizes = {}, {}, {}, {}
    for name, make in makers.items():
        torch.manual_seed(0)
        try:
            net, loss, draw = make(text, codes, u)
        except ImportError as e:
            print(f"{name}: not measured, {e}")
            continue
        weights = [p for key, p in net.named_parameters() if not key.startswith("vae.")]
        opt = torch.optim.Adam(weights, 1e-4, fused=True)
        ema = copy.deepcopy(net).requires_grad_(False)

        def step(net=net, loss=loss, opt=opt, ema=ema, weights=weights):
            with dalle_mini.autocast(args):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            opt.step()
            opt.zero_grad()
            dalle_mini.ema_update(ema, net, 1)
            return value.item()

        steps[name], draws[name], times[name] = step, draw, []
        sizes[name] = sum(p.numel() for p in weights)
        step()
        draw()

    def clock(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    for _ in range(a.rounds):
        for name in steps:
            times[name].append((clock(steps[name]) / B, clock(draws[name])))
    print("| network | parameters | train scenes/s | speed | ms per 16 images | time |")
    print("| --- | --- | --- | --- | --- | --- |")
    first = times["dalle_mini.py, cached"]
    for name, found in times.items():
        train, draw = (statistics.median(t[k] for t in found) for k in (0, 1))
        slower, longer = (statistics.median(t[k] / f[k] for t, f in zip(found, first))
                          for k in (0, 1))
        print(f"| {name} | {sizes[name]:,} | {1 / train:.0f} | {1 / slower:.2f} | "
              f"{1000 * draw:.0f} | {longer:.2f} |")


if __name__ == "__main__":
    main()
