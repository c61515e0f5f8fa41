"""How fast is one training step of the codebook beside vector-quantize-pytorch?

Question   Nearest code, straight-through, running means and the gradient to z, for 128 grids of
           7 x 7 vectors of 64 numbers
Run        pip install vector-quantize-pytorch           it brings torchvision with it
           python experiments/bench_vqvae.py

Both take turns, and the ratio is the median over rounds: it holds on a noisy machine.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import vqvae


def ours(K, z):
    """step() -> z_q and the commitment loss."""
    book = vqvae.Codebook(K, z.shape[-1], 0.25).to(z.device)
    book.begin(z.detach())
    return lambda: book(z)[::2]


def theirs(K, z):
    from vector_quantize_pytorch import VectorQuantize

    book = VectorQuantize(z.shape[-1], K, decay=0.99, commitment_weight=0.25).to(z.device)

    def step():
        q, _, commitment = book(z.flatten(1, 2))
        return q, commitment.sum()

    return step


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--codes", type=int, default=512, help="size of the codebook")
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = p.parse_args(argv)
    torch.manual_seed(0)
    z = torch.randn(128, 7, 7, 64, device=a.device, requires_grad=True)
    try:
        steps = ours(a.codes, z), theirs(a.codes, z)
    except ImportError as e:
        return print(f"not measured: {e}")

    def clock(step):
        start = time.perf_counter()
        q, commitment = step()
        (q.sum() + commitment).backward()
        if "cuda" in a.device:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    times = [[clock(step) for step in steps] for _ in range(5 + a.rounds)][5:]  # 5 to warm up
    mine, other = (statistics.median(column) for column in zip(*times))
    ratio = statistics.median(b / m for m, b in times)
    print(f"K = {a.codes}: vqvae.py {mine:.1f} ms, vector-quantize-pytorch {other:.1f} ms per step,"
          f" {ratio:.1f} times as long")


if __name__ == "__main__":
    main()
