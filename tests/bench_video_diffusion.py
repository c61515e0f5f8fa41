"""Speed of video_diffusion.py beside lucidrains' video-diffusion-pytorch, if that is installed:
python tests/bench_video_diffusion.py

A training step on 4 clips of 8 frames of 32 x 32 in colour, and 4 clips sampled, by networks of about
as many parameters, taking turns. Each with its own loss and sampler: ours DPM-Solver++, theirs
ancestral, of whose 1,000 steps a few are timed; seconds a step are given as well.

    pip install video-diffusion-pytorch
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import video_diffusion as vd

try:
    from video_diffusion_pytorch import GaussianDiffusion, Unet3D
except ImportError:
    Unet3D = None

torch.set_num_threads(2)
B, turns, peer_steps = 4, 5, 5
args = vd.parse_args(["--data", "orbit", "--device", "cpu"])
vd.use_device(args)
args.shape = [3, 32, 32]
model = vd.Film(args)
net, abar = model.net, vd.schedule_of(args)
K, pose = vd.random_orbits(B, 8, 32, vd.np.random.default_rng(0))
video = torch.rand(B, 8, 3, 32, 32) * 2 - 1
clips = vd.Clips(video, K, pose)
rays, none = clips.rays(args.patch), vd.nothing_known(clips)


def our_step():
    t = torch.randint(1, 1001, (B, 1)).expand(B, 8)
    with vd.autocast(args):
        return vd.video_loss(net, video, rays, t, torch.randn_like(video), none, None, abar, "x0")


def our_sample():
    vd.new_clips(args, model, clips, none)


kinds = {"ours": (net, our_step, our_sample, args.sample_steps)}
if Unet3D:
    peer = Unet3D(dim=24, dim_mults=(1, 2, 4), attn_heads=4)
    diffusion = GaussianDiffusion(peer, image_size=32, num_frames=8, timesteps=1000, loss_type="l2")
    theirs = video.transpose(1, 2).add(1).div(2)

    def peer_step():
        with vd.autocast(args):
            return diffusion(theirs)

    @torch.no_grad()
    def peer_sample():
        x = torch.randn_like(theirs)
        with vd.autocast(args):
            for t in range(peer_steps):
                x = diffusion.p_sample(x, torch.full((B,), 999 - t))

    kinds["lucidrains"] = (peer, peer_step, peer_sample, peer_steps)
seconds = {(name, what): [] for name in kinds for what in ("training step", "sampling step")}
for turn in range(turns + 1):
    for name, (network, step, draw, steps) in kinds.items():
        start = time.perf_counter()
        step().backward()
        network.zero_grad()
        middle = time.perf_counter()
        draw()
        if turn:  # the first warms up
            seconds[name, "training step"].append(middle - start)
            seconds[name, "sampling step"].append((time.perf_counter() - middle) / steps)
for (name, what), found in seconds.items():
    s = sorted(found)[turns // 2]
    ratio = s / sorted(seconds["ours", what])[turns // 2]
    count = sum(p.numel() for p in kinds[name][0].parameters())
    whole = f", {s * (kinds[name][3] if name == 'ours' else 1000):.1f} s in all" * (what[0] == "s")
    print(f"{name:11} {count:10,} parameters, {what}: {1000 * s:7.1f} ms{whole}, ratio {ratio:.1f}")
