"""Drawing with kept keys and values against running the whole network anew for each code, and
against dalle-pytorch's generate, if that is installed: python tests/bench_dalle_mini.py

A batch of 16 texts, 64 codes, the default network with random weights and the default guidance, the
kinds taking turns.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dalle_mini as dm

try:
    from dalle_pytorch import DALLE, DiscreteVAE
except ImportError:
    DALLE = None

torch.set_num_threads(2)
B, turns = 16, 5
args = dm.parse_args(["--device", "cpu"])
args.shape, args.learned = [3, 32, 32], [[i // 256, i % 256] for i in range(81)]
net = dm.DallE(args).eval().transformer
for p in net.parameters():
    torch.nn.init.normal_(p, std=0.05)
text = torch.randint(256, (B, net.N))
dice = torch.rand(B, 64)


@torch.no_grad()
def naive(whole):
    """Code after code, the network run anew on those known, or, whole, on all 64 places."""
    codes = torch.zeros(B, 64, dtype=torch.long)
    both = torch.cat([text, torch.tensor(net.pad([])).expand(B, -1)])
    for i in range(64):
        logits = net(both, (codes[:, :63] if whole else codes[:, :i]).repeat(2, 1))[1][:, i]
        cond, none = logits.chunk(2)
        codes[:, i] = dm.draw(none + args.guidance * (cond - none), 1.0, dice[:, i])
    return codes


kinds = {"kept keys and values": lambda: dm.draw_codes(net, text, dice, w=args.guidance),
         "anew, what is known": lambda: naive(False),
         "anew, all places": lambda: naive(True)}
assert torch.equal(*[kinds[k]() for k in ("kept keys and values", "anew, what is known")])
if DALLE:
    vae = DiscreteVAE(image_size=32, num_tokens=256, codebook_dim=16, num_layers=2, hidden_dim=64)
    peer = DALLE(dim=128, vae=vae, num_text_tokens=337, text_seq_len=16, depth=4, heads=4,
                 dim_head=32).eval()
    kinds["dalle-pytorch"] = lambda: peer.generate_images(
        text.clamp(min=1), filter_thres=0.0, cond_scale=args.guidance, use_cache=True)
seconds = {name: [] for name in kinds}
for turn in range(turns + 1):
    for name, draw in kinds.items():
        start = time.perf_counter()
        draw()
        if turn:  # the first warms up
            seconds[name].append(time.perf_counter() - start)
median = {name: sorted(found)[turns // 2] for name, found in seconds.items()}
for name, s in median.items():
    print(f"{name:22} {1000 * s:8.0f} ms for {B} images, {s / median['kept keys and values']:5.1f}")
