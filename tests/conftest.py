"""Tests import the seven files, one folder up, and experiments. One thread: tests are small, and
test_lessons.py has processes beside them."""

import functools
import gzip
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
torch.set_num_threads(1)
# Most tests read MNIST. What was unpacked is known by its content: a damaged file stays damaged.
gzip.decompress = functools.lru_cache(maxsize=8)(gzip.decompress)
