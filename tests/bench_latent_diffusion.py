"""The U-Net beside diffusers' UNet2DConditionModel of the same configuration, if that is installed, and
latent space beside pixel space: python tests/bench_latent_diffusion.py

Training steps of 32 and evaluations of 32 latents, the default network, the kinds taking turns.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import latent_diffusion as ld

try:
    from diffusers import UNet2DConditionModel
except ImportError:
    UNet2DConditionModel = None

torch.set_num_threads(2)
B, turns = 32, 9
args = ld.parse_args(["--device", "cpu", "--coordinates", "0"])
net = ld.make_backbone(args)
print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
args.latent_dim = 3
wide = ld.make_backbone(args)
t, context = torch.rand(B) * 1000, torch.randn(B, args.text_length, args.text_width)
latents, pixels = torch.randn(B, 4, 8, 8), torch.randn(B, 3, 32, 32)
kinds = {"latents, 8 x 8 x 4": (lambda x: net(x, t, context), latents),
         "pixels, 32 x 32 x 3": (lambda x: wide(x, t, context), pixels)}
if UNet2DConditionModel:
    peer = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=args.channels,
        layers_per_block=args.layers, cross_attention_dim=args.text_width,
        attention_head_dim=args.heads, norm_num_groups=args.groups,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    peer.load_state_dict(net.state_dict())
    kinds["diffusers, latents"] = (lambda x: peer(x, t, context).sample, latents)
seconds = {(name, what): [] for name in kinds for what in ("step", "evaluation")}
for turn in range(turns + 1):
    for name, (f, x) in kinds.items():
        for what in ("step", "evaluation"):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(what == "step"):
                out = f(x).float()
            if what == "step":
                F.mse_loss(out, x).backward()
            if turn:  # the first warms up
                seconds[name, what].append(time.perf_counter() - start)
median = {key: sorted(found)[turns // 2] for key, found in seconds.items()}
for (name, what), s in median.items():
    ratio = s / median["latents, 8 x 8 x 4", what]
    print(f"{name:22} {what:12} {1000 * s:8.1f} ms, {B / s:8.0f} a second, {ratio:6.2f}")
