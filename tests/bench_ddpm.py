"""Speed of ddpm.py beside its peers: python tests/bench_ddpm.py [--rounds 5]

Training: images a second of one step (forward, backward, clip, AdamW, EMA) at the image size that
each network takes, 28 or 32. Sampling: seconds per 1,000 images, with ddpm.py's defaults and the
peers' usual samplers. Every peer that is installed is built with about as many parameters as ours
and measured in turns with it, so that the ratios hold on a noisy machine:

    pip install diffusers denoising-diffusion-pytorch
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


def ours(device):
    args = ddpm.parse_args(["--train", "--device", device])
    ddpm.setup(args)
    args.shape, args.classes = [1, 28, 28], 10
    model, abar = ddpm.build(args), ddpm.schedule_of(args)

    def loss(x):
        t = torch.randint(1, 1001, (len(x),), device=device)
        y = torch.randint(0, 11, (len(x),), device=device)
        return ddpm.diffusion_loss(model, x, y, t, torch.randn_like(x), abar, args.predict)

    def draw(n):  # with guidance: two calls of the network a step
        ddpm.generate(args, model, torch.arange(n) % 10)

    return model, 28, loss, draw, f"{args.sampler}, {args.sample_steps} steps, guided", args


def from_diffusers(device):
    from diffusers import DPMSolverMultistepScheduler, UNet2DModel

    model = UNet2DModel(
        32,
        1,
        1,
        block_out_channels=(32, 48, 48),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).to(device)
    abar = ddpm.make_abar("linear", 1000).to(device)

    def loss(x):
        t = torch.randint(1, 1001, (len(x),), device=device)
        eps = torch.randn_like(x)
        return (model(ddpm.q_sample(x, t, eps, abar), t - 1).sample.float() - eps).square().mean()

    @torch.no_grad()
    def draw(n):
        scheduler = DPMSolverMultistepScheduler()
        scheduler.set_timesteps(20)
        x = torch.randn(n, 1, 32, 32, device=device)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample.float(), t, x).prev_sample

    return model, 32, loss, draw, "dpm++, 20 steps, no classes"


def from_lucidrains(device):
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    model = Unet(dim=16, dim_mults=(1, 2, 4), channels=1).to(device)
    diffusion = GaussianDiffusion(
        model, image_size=32, objective="pred_v", sampling_timesteps=50
    ).to(device)
    return (
        model,
        32,
        lambda x: diffusion(x / 2 + 0.5),
        lambda n: diffusion.sample(batch_size=n),
        "ddim, 50 steps, no classes",
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rounds", type=int, default=5, help="measurements of each, in turns")
    p.add_argument("--batch", type=int, default=64, help="images a training step")
    p.add_argument("--draw", type=int, default=50, help="images a sampling measurement")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    a = p.parse_args()
    found = {"ddpm.py": ours(a.device)}
    args = found["ddpm.py"][5]
    for name, make in (
        ("diffusers UNet2DModel", from_diffusers),
        ("lucidrains Unet", from_lucidrains),
    ):
        try:
            found[name] = make(a.device)
        except ImportError as e:
            print(f"{name}: not measured, {e}")

    def clock(f):
        start = time.time()
        f()
        if a.device == "cuda":
            torch.cuda.synchronize()
        return time.time() - start

    step, draw, times = {}, {}, {}
    for name, (model, size, loss, sampler, *_) in found.items():
        opt, ema = torch.optim.AdamW(model.parameters(), 1e-4), copy.deepcopy(model)
        x = torch.rand(a.batch, 1, size, size, device=a.device) * 2 - 1

        def one(model=model, loss=loss, opt=opt, ema=ema, x=x):
            with ddpm.autocast(args):
                value = loss(x)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            ddpm.ema_update(ema, model, 1, 0.999)

        def some(model=model, sampler=sampler):
            with ddpm.autocast(args):
                sampler(a.draw)

        step[name], draw[name], times[name] = one, some, ([], [])
        one(), one()
    for _ in range(a.rounds):
        for name in found:
            times[name][0].append(clock(lambda: [step[name]() for _ in range(5)]) / 5)
            times[name][1].append(clock(draw[name]) / a.draw)
    print(
        "\n| network | parameters | train img/s | ratio | s per 1,000 samples | ratio | sampling |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (model, _, _, _, how, *_) in found.items():
        train, sample = (statistics.median(t) for t in times[name])
        ratio = [
            statistics.median(b / o for b, o in zip(times[name][k], times["ddpm.py"][k]))
            for k in (0, 1)
        ]
        print(
            f"| {name} | {sum(p.numel() for p in model.parameters()):,} "
            f"| {a.batch / train:.0f} | {1 / ratio[0]:.2f} | "
            f"{1000 * sample:.1f} | {ratio[1]:.2f} | {how} |"
        )


if __name__ == "__main__":
    main()
