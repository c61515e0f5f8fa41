"""The seven files lie one folder up; tests import them from there. One thread: tests are small, and
test_lessons.py has processes beside them."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
