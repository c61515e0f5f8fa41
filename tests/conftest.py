"""The seven files lie one folder up; tests import them from there. One thread: tests are small, and
test_lessons.py has processes beside them."""

import functools
import gzip
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
# Most tests read MNIST. What was unpacked is known by its content: a damaged file stays damaged.
gzip.decompress = functools.lru_cache(maxsize=8)(gzip.decompress)
