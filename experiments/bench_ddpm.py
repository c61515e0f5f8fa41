"""How fast is ddpm.py beside diffusers and lucidrains' denoising-diffusion-pytorch?

Question   Training: images per second of one step (forward, backward, clip, Adam, EMA). Sampling:
           seconds per 1,000 images, by ddpm.py's default and the peers' usual samplers. Every
           network has about 0.7 million parameters; ddpm.py is measured as it is (--patch 2 on
           28 x 28 images: 14 x 14 positions) and with the peers' positions (--patch 1 on 32 x 32).
Run        pip install denoising-diffusion-pytorch               it brings torchvision with it
           python experiments/bench_ddpm.py                      a peer that is missing is left out

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
import ddpm


def ours(device, patch, size):
    """model, size, loss(x), draw(n), sampler."""
    args = ddpm.parse_args(["--patch", str(patch), "--device", device])
    args.shape, args.classes = [1, size, size], 10
    model, abar = ddpm.build(args), ddpm.make_abar(args.schedule).float().to(device)

    def loss(x):
        t = torch.randint(1, 1001, (len(x),), device=device)
        y = torch.randint(0, 11, (len(x),), device=device)
        return ddpm.diffusion_loss(model, x, y, t, torch.randn_like(x), abar, args.predict)

    draw = lambda n: ddpm.generate(args, model, n)
    return model, size, loss, draw, "DPM-Solver++, 20 steps, guided"


def from_diffusers(device):
    from diffusers import DPMSolverMultistepScheduler, UNet2DModel

    model = UNet2DModel(
        32, 1, 1, block_out_channels=(32, 48, 48), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")).to(device)
    abar = ddpm.make_abar("linear").float().to(device)

    def loss(x):
        t, eps = torch.randint(1, 1001, (len(x),), device=device), torch.randn_like(x)
        xt = ddpm.q_sample(x, eps, abar[t].view(-1, 1, 1, 1))
        return (model(xt, t - 1).sample.float() - eps).square().mean()

    @torch.no_grad()
    def draw(n):
        scheduler = DPMSolverMultistepScheduler()
        scheduler.set_timesteps(20)
        x = torch.randn(n, 1, 32, 32, device=device)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample.float(), t, x).prev_sample

    return model, 32, loss, draw, "DPM-Solver++, 20 steps, no classes"


def from_lucidrains(device):
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    model = Unet(dim=16, dim_mults=(1, 2, 4), channels=1).to(device)
    diffusion = GaussianDiffusion(model, image_size=32, objective="pred_v",
                                  sampling_timesteps=50).to(device)
    return (model, 32, lambda x: diffusion(x / 2 + 0.5), lambda n: diffusion.sample(batch_size=n),
            "DDIM, 50 steps, no classes")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=5, help="measurements of each, in turns")
    p.add_argument("--batch-size", type=int, default=64, help="images per training step")
    p.add_argument("--num", type=int, default=50, help="images per sampling measurement")
    p.add_argument("--device", default="cpu")
    a = p.parse_args(argv)
    args, found = ddpm.parse_args(["--device", a.device]), {}
    for name, make in (("ddpm.py, 28 x 28, --patch 2", lambda d: ours(d, 2, 28)),
                       ("ddpm.py, 32 x 32, --patch 1", lambda d: ours(d, 1, 32)),
                       ("diffusers UNet2DModel, 32 x 32", from_diffusers),
                       ("lucidrains Unet, 32 x 32", from_lucidrains)):
        try:
            found[name] = make(a.device)
        except ImportError as e:
            print(f"{name}: not measured, {e}")

    def clock(f):
        start = time.time()
        f()
        if "cuda" in a.device:
            torch.cuda.synchronize()
        return time.time() - start

    steps, draws, times = {}, {}, {}
    for name, (model, size, loss, draw, _) in found.items():
        opt = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
        ema = copy.deepcopy(model).requires_grad_(False)
        x = torch.rand(a.batch_size, 1, size, size, device=a.device) * 2 - 1

        def step(model=model, loss=loss, opt=opt, ema=ema, x=x):
            with ddpm.autocast(args):
                value = loss(x)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            ddpm.ema_update(ema, model, 1)

        def some(draw=draw):
            with ddpm.autocast(args):
                draw(a.num)

        steps[name], draws[name], times[name] = step, some, []
        step()
    for _ in range(a.rounds):
        for name in found:
            times[name].append((clock(lambda: [steps[name]() for _ in range(5)]) / 5 / a.batch_size,
                                clock(draws[name]) / a.num))
    print("| network | parameters | train img/s | speed | s per 1,000 samples | time | sampling |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    first = next(iter(times.values()))
    for name, (model, _, _, _, sampler) in found.items():
        count = sum(p.numel() for p in model.parameters())
        train, draw = (statistics.median(t[k] for t in times[name]) for k in (0, 1))
        ratios = [[t[k] / f[k] for t, f in zip(times[name], first)] for k in (0, 1)]
        slower, longer = (statistics.median(r) for r in ratios)
        print(f"| {name} | {count:,} | {1 / train:.0f} | {1 / slower:.2f} | {1000 * draw:.1f} | "
              f"{longer:.2f} | {sampler} |")


if __name__ == "__main__":
    main()
