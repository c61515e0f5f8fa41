"""How fast is video_diffusion.py beside lucidrains' video-diffusion-pytorch?

Question   Training: clips per second of one step (forward, backward, clip, optimiser, EMA; ours has
           Muon, the peer Adam). Sampling: milliseconds per clip and evaluation of the network. The
           peer needs 1,000 of them; ours 40, and as many on single pictures for guidance. Both
           networks have about 1.2 million parameters.
Run        pip install video-diffusion-pytorch                   it brings torchvision with it
           python experiments/bench_video_diffusion.py           without the peer: ours alone

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
import video_diffusion as vd


def ours(args, x):
    """A network, loss(), and draw(), one sampling step."""
    model, abar = vd.build(args), vd.cosine_abar().float().to(args.device)
    B, frames = x.shape[:2]
    K, pose = (a.to(args.device) for a in vd.fixed_camera(B, frames, args.height))
    rays = vd.camera_rays(K, pose, args.height, args.height, args.patch)
    given = torch.zeros(B, frames, dtype=torch.bool, device=args.device)
    given[:, 0] = True  # else a picture would be drawn first
    one = argparse.Namespace(sample_steps=1, guidance=1.0)

    def loss():
        t = torch.randint(1, vd.T + 1, (B, 1), device=args.device).expand(B, frames)
        return vd.video_loss(model, x, rays, t, torch.randn_like(x), abar)

    return model, loss, lambda: vd.sample(model, x, given, rays, one)


def from_lucidrains(args, x):
    from video_diffusion_pytorch import GaussianDiffusion, Unet3D

    model = Unet3D(dim=20, dim_mults=(1, 2, 4), attn_heads=4).to(args.device)
    diffusion = GaussianDiffusion(model, image_size=args.height, num_frames=x.shape[1],
                                  timesteps=1000, loss_type="l2").to(args.device)
    clips = x.transpose(1, 2)  # (B, C, F, H, W)
    t = torch.full((len(x),), 500, device=args.device)

    @torch.no_grad()
    def draw():
        diffusion.p_sample(clips, t)

    return model, lambda: diffusion(clips / 2 + 0.5), draw


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=5, help="measurements of each, in turns")
    a, flags = p.parse_known_args(argv)  # other flags are the lesson's, such as --batch-size
    args = vd.parse_args(flags)
    args.shape = [args.frames, 3, args.height, args.height]
    x = torch.rand(args.batch_size, *args.shape, device=args.device) * 2 - 1
    steps, draws, times, sizes = {}, {}, {}, {}
    for name, make in (("video_diffusion.py", ours),
                       ("lucidrains' video-diffusion-pytorch", from_lucidrains)):
        torch.manual_seed(0)
        try:
            model, loss, draw = make(args, x)
        except ImportError as e:
            print(f"{name}: not measured, {e}")
            continue
        opts = (vd.optimizers(model, ["conv_in", "conv_out"], args.lr, args.muon_lr) if make is ours
                else [torch.optim.Adam(model.parameters(), 1e-4, fused=True)])
        ema = copy.deepcopy(model).requires_grad_(False)

        def step(model=model, loss=loss, opts=opts, ema=ema):
            with vd.autocast(args):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad()
            vd.ema_update(ema, model, 1)
            return value.item()

        def some(draw=draw):
            with vd.autocast(args):
                draw()

        steps[name], draws[name], times[name] = step, some, []
        sizes[name] = sum(p.numel() for p in model.parameters())
        step()
        some()

    def clock(f):
        start = time.perf_counter()
        f()
        if "cuda" in args.device:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(a.rounds):
        for name in steps:
            times[name].append((clock(steps[name]), clock(draws[name])))
    print("| network | parameters | train clips/s | time | ms per clip and evaluation | time |")
    print("| --- | --- | --- | --- | --- | --- |")
    first, B = times["video_diffusion.py"], args.batch_size
    for name, found in times.items():
        train, draw = (statistics.median(t[k] for t in found) for k in (0, 1))
        slower, longer = (statistics.median(t[k] / f[k] for t, f in zip(found, first))
                          for k in (0, 1))
        print(f"| {name} | {sizes[name]:,} | {B / train:.2f} | {slower:.1f} x | "
              f"{1000 * draw / B:.1f} | {longer:.1f} x |")


if __name__ == "__main__":
    main()
