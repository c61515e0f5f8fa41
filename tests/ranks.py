"""One of the processes of torchrun: trains several lessons, {name: flags} as JSON, one after another,
so that torch is imported once."""

import functools
import importlib
import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
store, rank, world = next(rendezvous("env://"))
start = dist.init_process_group
for name, flags in json.loads(sys.argv[1]).items():
    own = dist.PrefixStore(name, store)  # else the processes would meet at old addresses
    dist.init_process_group = functools.partial(start, store=own, rank=rank, world_size=world)
    importlib.import_module(name).main(flags)
