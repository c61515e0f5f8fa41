"""A trial of the second stage on a first stage that is trained already (not part of the repository).

    python flux_trial.py AE.pt OUT FLAGS...        AE.pt: a checkpoint of latent_diffusion.py

Builds the networks of FLAGS, takes the autoencoder from AE.pt, and runs --train --resume in OUT.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import latent_diffusion as ld

source, out, flags = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
ckpt = ld.load_checkpoint(source)
args = ld.parse_args([*flags, "--out", str(out)])
args.ae_width, args.latent_dim = ckpt["config"]["ae_width"], ckpt["config"]["latent_dim"]
args.device = "cpu"
torch.manual_seed(args.seed)
model = ld.build(args)
weights = {k.removeprefix("autoencoder."): v.float() for k, v in ckpt["ema"].items()
           if k.startswith("autoencoder.")}
weights["shift"], weights["scale"] = torch.zeros(()), torch.ones(())
model.autoencoder.load_state_dict(weights)
opt = torch.optim.Adam(model.autoencoder.parameters())
args.ae_steps = 0  # nothing left to do in the first stage
out.mkdir(parents=True, exist_ok=True)
ld.save_checkpoint(args, 0, ema=model.state_dict(), optimizer=opt.state_dict())
ld.main(["--train", "--resume", "--out", str(out), *flags, "--ae-steps", "0"])
