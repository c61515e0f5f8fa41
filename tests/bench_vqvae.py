"""The quantiser beside vector-quantize-pytorch's, if that is installed: python tests/bench_vqvae.py

One training step of the codebook alone (nearest code, straight-through, running means, and the
gradient to z) for 128 grids of 7 x 7 vectors of 64 numbers, the two taking turns.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import vqvae

try:
    from vector_quantize_pytorch import VectorQuantize
except ImportError:
    VectorQuantize = None

torch.set_num_threads(2)
D, turns = 64, 15
z = torch.randn(128, 7, 7, D).requires_grad_()
for K in (512, 8192):
    ours = vqvae.Codebook(K, D, 0.25, 0.99, False)
    ours.begin(z.detach())
    kinds = {"vqvae.py": lambda: ours(z)[::2]}
    if VectorQuantize:
        theirs = VectorQuantize(D, K, decay=0.99, commitment_weight=0.25)

        def peer():
            q, _, extra = theirs(z.flatten(1, 2))
            return q, extra.sum()

        kinds["vector-quantize-pytorch"] = peer
    seconds = {name: [] for name in kinds}
    for turn in range(turns + 2):
        for name, step in kinds.items():
            start = time.perf_counter()
            q, extra = step()
            (q.sum() + extra).backward()
            z.grad = None
            if turn >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
    for name, found in seconds.items():
        median = sorted(found)[turns // 2]
        print(f"K = {K:5}  {name:24} {1000 * median:8.1f} ms a step, {128 * 49 / median:12,.0f} "
              "vectors/s")
    if VectorQuantize:
        a, b = (sorted(found)[turns // 2] for found in seconds.values())
        print(f"K = {K:5}  {b / a:.2f} times as fast")
