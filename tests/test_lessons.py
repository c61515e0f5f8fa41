"""Every lesson as a program: a few steps from another folder, exact resume, kill -9, two processes,
bad input. What all lessons share to the letter (test_copies.py) is tested in ddpm.py."""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import call

ROOT = Path(__file__).resolve().parents[1]
LESSONS = {  # flags of a tiny network, and its data
    "pixelcnn": "--data own.npz --num 20 --width 8 --dilations 1 2 --hidden 8 --levels 16 "
                "--batch-size 8",
    "vqvae": "--data own.npz --num 20 --width 8 --blocks 1 --code-dim 4 --codebook-size 6 "
             "--codes-steps 8 --codes-batch-size 8 --prior-width 32 --prior-layers 1 "
             "--batch-size 8",
    "dalle_mini": "--scenes 40 --num 4 --codes-width 8 --codes-steps 12 --width 16 --layers 1 "
                  "--heads 2 --batch-size 8",
    "latent_diffusion": "--scenes 40 --num 4 --ae-width 8 --ae-steps 12 --text-width 32 "
                        "--text-layers 1 --width 32 --double 1 --single 1 --flux-heads 2 "
                        "--batch-size 8 --sample-steps 2",
    "video_diffusion": "--scenes 12 --num 3 --frames 4 --height 16 --width 16 --blocks 1 "
                       "--batch-size 8 --picture-steps 1 --sample-steps 2",
    "ddpm": "--data own.npz --num 20 --width 16 --mults 1 1 --batch-size 8 --sample-steps 3",
    "fid": "--data own.npz --width 4 --batch-size 8",
}
SCENES = ["dalle_mini", "latent_diffusion"]  # samples of prompts, not of classes
STAGES = {"vqvae": "prior.", "dalle_mini": "transformer.", "latent_diffusion": "denoiser."}
USE = {name: ["--sample"] for name in LESSONS} | {"fid": ["own.npz", "own.npz"]}  # a checkpoint
ADAM = {  # who has matrices outside the network's inside, which are not Muon's, stage by stage
    "pixelcnn": ["position class_bias embeddings.0.weight logits.0.weight blocks.0.label.weight "
                 "blocks.1.label.weight"],
    "ddpm": ["conv_in.weight conv_out.weight label.weight"],
    "video_diffusion": ["conv_in.weight conv_out.weight"],
    "vqvae": ["encoder.0.weight decoder.5.weight", "code.weight label.weight place head.weight"],
    "dalle_mini": ["encoder.0.weight decoder.6.weight", "word.weight code.weight place row col "
                   "word_head.weight code_head.weight"],
    "latent_diffusion": ["encoder.0.weight decoder.6.weight", "encoder.word.weight encoder.place "
                         "backbone.image_in.weight backbone.image_out.weight"]}
OPTIMIZERS = {name: [] for name in ADAM}  # of the trainings below: (network, its optimizers)
each_lesson = pytest.mark.parametrize("name", LESSONS)
SAMPLERS = [name for name in LESSONS if name != "fid"]
each_sampler = pytest.mark.parametrize("name", SAMPLERS)
FORKS = multiprocessing.get_context("forkserver")  # imports once, then forks
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "tqdm"])


def lesson(name):
    return importlib.import_module(name)


def flags(name, steps, *more):
    return ["--train", "--device", "cpu", "--steps", steps, *LESSONS[name].split(), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with own.npz: 40 images of 12 x 12, with labels."""
    path = tmp_path_factory.mktemp("lessons")
    images = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 1), np.uint8)
    np.savez(path / "own.npz", images=images, labels=np.arange(40) % 2)
    return path


@pytest.fixture(scope="module")
def trained(folder):
    """OUT of a short training of every lesson, with all its checkpoints: 0.pt, 1.pt, ..."""
    for name in LESSONS:
        module, out, number = lesson(name), folder / "whole" / name, itertools.count()
        save = module.save_checkpoint

        def save_and_keep(*args, **state):
            save(*args, **state)
            shutil.copy(out / "model.pt", out / f"{next(number)}.pt")

        def optimizers_kept(net, *args, make=getattr(module, "optimizers", None)):
            OPTIMIZERS[name].append((net, make(net, *args)))
            return OPTIMIZERS[name][-1][1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "save_checkpoint", save_and_keep)
            patch.setattr(module, "optimizers", optimizers_kept, raising=False)
            call(module, *flags(name, 40, "--every", 20, "--out", out), cwd=folder)
    return folder / "whole"


def assert_equal(a, b):
    """Two checkpoints hold the same bits, in the model and in its average."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    assert a["step"] == b["step"]
    for part in {"model", "ema"} & set(a):
        for key, value in a[part].items():
            assert torch.equal(value, b[part][key]), (part, key)


@each_sampler
def test_training_writes_what_it_promises(name, folder, trained):
    """Pictures and samples. The checkpoint gives the same samples, with another seed others."""
    out = trained / name
    assert (out / "samples.png").stat().st_size * (out / "step_000020.png").stat().st_size > 0
    samples = np.load(out / "samples.npz")
    if name in SCENES:
        prompts = lesson(name).PROMPTS
        assert samples["captions"].tolist() == [text for text in prompts for _ in range(4)]
        shape = (24, 32, 32, 3)
    elif name == "video_diffusion":
        shape = (3, 4, 16, 16, 3)
    else:
        assert samples["labels"].tolist() == [0, 1] * 10
        shape = (20, 12, 12, 1)
    assert samples["arr_0"].shape == shape and samples["arr_0"].dtype == np.uint8
    for seed in (0, 1):
        call(lesson(name), "--sample", *LESSONS[name].split(), "--out", out, "--seed", seed,
             "--save", "again.npz", cwd=folder)
        again = np.load(folder / "again.npz")["arr_0"]
        assert np.array_equal(again, samples["arr_0"]) == (seed == 0)


@each_sampler
def test_pretrained_is_the_default(name, tmp_path):
    """Without a model in OUT, --sample takes the one in pretrained/, from any folder."""
    few = ["--sample-steps", 1] if "sample_steps" in lesson(name).HPARAMS else []
    said = call(lesson(name), "--sample", "--num", 1, "--device", "cpu", *few, cwd=tmp_path)
    assert f"pretrained/{name}.pt" in said and (tmp_path / f"out/{name}/samples.npz").exists()


@pytest.mark.parametrize("name", STAGES)
def test_a_first_stage_alone_is_named(name, trained, tmp_path):
    """--sample draws noise from it; a checkpoint of the second stage also has `model`."""
    ckpt = lesson(name).load_checkpoint(trained / name / "model.pt")
    for stage in ("second", "first"):
        torch.save(ckpt, tmp_path / "model.pt")
        said = call(lesson(name), "--sample", "--num", 1, "--out", tmp_path, cwd=tmp_path)
        assert ("only the first stage is trained" in said) == (stage == "first")
        ckpt.pop("model", None)


def run(name, argv, folder):
    """What a process of its own does. As many threads as here: other sums round otherwise."""
    torch.set_num_threads(1)
    call(lesson(name), *argv, cwd=folder)


@each_lesson
def test_kill_and_resume_are_bit_equal(name, folder, trained):
    """Killed at a random moment while it writes checkpoints, then resumed: the same bits as the
    unbroken run. The other flags come from the checkpoint."""
    out = folder / "killed" / name
    argv = flags(name, 40, "--every", 1, "--out", out)
    process = FORKS.Process(target=run, args=(name, argv, folder))
    process.start()
    while not (out / "model.pt").exists():
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(random.random() * 0.1)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert lesson(name).load_checkpoint(out / "model.pt")["step"] < 40
    call(lesson(name), "--train", "--resume", "--every", 40, "--out", out, cwd=folder)
    assert_equal(out / "model.pt", trained / name / "model.pt")


@pytest.mark.parametrize("name", STAGES)
def test_either_stage_resumes_to_the_bit(name, folder, trained):
    """From the end of the first stage, and from the middle of the second."""
    out = folder / "again" / name
    out.mkdir(parents=True)
    for number in (0, 1):
        shutil.copy(trained / name / f"{number}.pt", out / "model.pt")
        said = call(lesson(name), "--train", "--resume", "--num", 1, "--out", out, cwd=folder)
        assert "samples are noise" not in said  # they will be drawn after the second stage
        assert_equal(out / "model.pt", trained / name / "model.pt")


@each_sampler
def test_the_average_is_one(name, trained):
    """It moves from checkpoint to checkpoint, and is not the latest weights."""
    half, end = (torch.load(trained / name / file, weights_only=True)
                 for file in ("1.pt" if name in STAGES else "0.pt", "model.pt"))
    averaged = {key: STAGES.get(name, "") + key for key in end["model"]}
    assert any((end["ema"][key] != half["ema"][key]).any() for key in averaged.values())
    assert any((end["ema"][b] != end["model"][a]).any() for a, b in averaged.items())


@each_sampler
def test_learning_rates_warm_up_and_decay(name, trained):
    """Over 100 steps, and over all: in the middle and at the end of 40."""
    for file, share in (("1.pt" if name in STAGES else "0.pt", 21 / 40), ("model.pt", 1 / 40)):
        ckpt = lesson(name).load_checkpoint(trained / name / file)
        for flag, state in zip(("muon_lr", "lr"), ckpt["optimizer"]):
            rate = state["param_groups"][0]["lr"] / ckpt["config"][flag]
            assert rate == pytest.approx(ckpt["step"] / 100 * share)


@pytest.mark.parametrize("name", ADAM)
def test_each_parameter_has_one_optimizer(name, trained):
    """Muon has the matrices inside the network, Adam all else, and each its own learning rate."""
    module = lesson(name)
    assert len(OPTIMIZERS[name]) == len(ADAM[name])
    for (net, (muon, adam)), outside in zip(OPTIMIZERS[name], ADAM[name]):
        assert type(muon) is module.Muon and type(adam) is torch.optim.Adam
        muon, adam = ({*map(id, opt.param_groups[0]["params"])} for opt in (muon, adam))
        assert not muon & adam and muon | adam == {*map(id, net.parameters())}
        large = {key for key, p in net.named_parameters() if p.ndim > 1 and id(p) in adam}
        assert large == {*outside.split()}
    muon, adam = module.optimizers(net, [], 0.5, 0.25)
    assert (muon.defaults["lr"], adam.defaults["lr"]) == (0.25, 0.5)


def test_a_torn_write_leaves_the_old_checkpoint(trained, tmp_path, monkeypatch):
    """A process that dies half-way through torch.save has not touched model.pt."""
    module, whole = lesson("ddpm"), (trained / "ddpm/model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole)
    ckpt = module.load_checkpoint(tmp_path / "model.pt")
    args = module.parse_args(["--out", str(tmp_path)], ckpt["config"])

    def torn(state, path):
        Path(path).write_bytes(whole[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        module.save_checkpoint(args, 99, model={})
    assert (tmp_path / "model.pt").read_bytes() == whole


@pytest.fixture(scope="module", autouse=True)
def doubled(folder):
    """Trainings of all samplers by two processes of torchrun, beside the other tests."""
    runs = {name: [*map(str, flags(name, 4, "--out", f"two/{name}"))] for name in SAMPLERS}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "tests/ranks.py", json.dumps(runs)]
    with open(folder / "two.txt", "w") as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield process
    process.terminate()


@each_sampler
def test_two_processes_are_one(name, folder, doubled):
    """torchrun with two gloo processes ends with the averaged gradients (first moments) of one
    process with the same global batch, to the rounding of bf16."""
    call(lesson(name), *flags(name, 4, "--out", f"one/{name}"), cwd=folder)
    assert doubled.wait(timeout=600) == 0, (folder / "two.txt").read_text()
    moments = []
    for out in ("one", "two"):
        opts = lesson(name).load_checkpoint(folder / out / name / "model.pt")["optimizer"]
        moments.append(torch.cat([state["exp_avg"].flatten() for opt in opts
                                  for state in opt["state"].values()]))
    assert (moments[0] - moments[1]).norm() < 0.1 * moments[0].norm()


# ---- Bad input: one line, exit code 2, nothing overwritten ---------------------------------------


def refused(name, cwd, *argv):
    """The one line that the lesson prints before it exits with code 2."""
    message = call(lesson(name), *argv, cwd=cwd, code=2)
    assert message.startswith(f"{name}.py: ") and message.count("\n") == 1, message
    return message


class Malicious:
    """Unpickled by a careless loader, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@each_lesson
def test_bad_checkpoints(name, trained, tmp_path):
    """Missing, empty, cut off, with a flipped bit, malicious, of another kind or another lesson."""
    whole = (trained / name / "model.pt").read_bytes()
    other = torch.load(trained / name / "model.pt", weights_only=True) | {"file": "other"}
    half, flipped = whole[:len(whole) // 2], bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    said = refused(name, tmp_path, "--train", "--resume", "--out", "out")
    assert "out/model.pt is missing" in said
    path = tmp_path / "out/model.pt"
    path.parent.mkdir()
    raw = pickle.dumps(Malicious())
    for content in (b"", half, flipped, raw, Malicious(), torch.zeros(3), other):
        if isinstance(content, (bytes, bytearray)):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        before = path.read_bytes()
        for verbs in (["--train", "--resume"], USE[name]):
            said = refused(name, tmp_path, *verbs, "--out", "out")
            assert "out/model.pt" in said
            assert ("but of other" if content is other else "damaged") in said
        assert path.read_bytes() == before and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [n for n in LESSONS if "own.npz" in LESSONS[n]])
def test_bad_data(name, trained, tmp_path):
    """Wrong names, wrong arrays, a damaged file of MNIST; the old checkpoint stays."""
    model = trained / name / "model.pt"
    before = model.read_bytes()
    np.savez(tmp_path / "float.npz", images=np.zeros((20, 8, 8, 1)))
    np.savez(tmp_path / "flat.npz", images=np.zeros((20, 8), np.uint8))
    np.savez(tmp_path / "rgba.npz", images=np.zeros((20, 8, 8, 4), np.uint8))
    np.savez(tmp_path / "labels.npz", images=np.zeros((20, 8, 8, 1), np.uint8), labels=[0, 1])
    np.savez(tmp_path / "pickle.npz", images=np.array([Malicious()]))
    (tmp_path / "junk.npz").write_bytes(b"junk")
    files = "nonsense none.npz float.npz flat.npz rgba.npz labels.npz pickle.npz junk.npz"
    for data in files.split():
        said = refused(name, tmp_path, "--train", "--data", data, "--out", model.parent)
        assert f"--data {data}: expected mnist, fashion, cifar10, or an .npz file" in said
    shutil.copytree(ROOT / "data/mnist", tmp_path / "mnist", copy_function=shutil.copyfile)
    labels = tmp_path / "mnist/train-labels-idx1-ubyte.gz"
    labels.write_bytes(labels.read_bytes()[:1000])
    said = refused(name, tmp_path, "--train", "--data", "mnist", "--data-dir", tmp_path, "--out",
                   model.parent)
    assert str(labels) in said and "damaged" in said and "https://" in said
    assert not (tmp_path / "executed").exists() and model.read_bytes() == before


def test_downloads_are_whole_or_absent(tmp_path, monkeypatch):
    """A missing file is fetched and kept; if that fails, nothing is left behind."""
    module, file = lesson("ddpm"), "t10k-labels-idx1-ubyte.gz"
    monkeypatch.setitem(module.URLS, "mnist", f"file://{tmp_path}/none/")
    with pytest.raises(SystemExit):
        module.data_file("mnist", file, tmp_path)
    assert not any((tmp_path / "mnist").iterdir())
    monkeypatch.setitem(module.URLS, "mnist", f"file://{ROOT}/data/mnist/")
    assert len(module.data_file("mnist", file, tmp_path)) == 10_008
    assert (tmp_path / "mnist" / file).read_bytes() == (ROOT / "data/mnist" / file).read_bytes()


def mutate(data, rng):
    """Cut off, with a few bytes changed, or with a piece repeated."""
    data, kind = bytearray(data), rng.randrange(3)
    at = rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return data
    return data[:at] + data[at // 2:at] + data[at:]


@pytest.mark.parametrize("kind", ["images", "clips", "checkpoint", "gzip"])
def test_damaged_files_never_give_a_traceback(kind, folder, trained, tmp_path):
    """200 mutated files of each kind are read or refused in one line."""
    module, video, rng, refusals = lesson("ddpm"), lesson("video_diffusion"), random.Random(0), 0
    np.savez(tmp_path / "clips.npz", clips=np.zeros((20, 3, 8, 8, 1), np.uint8))
    file, whole, read = {
        "images": ("x.npz", folder / "own.npz", lambda x: module.load_data(str(x), "train", None)),
        "clips": ("x.npz", tmp_path / "clips.npz", lambda x: video.load_clips(
            video.parse_args(["--data", str(x), "--device", "cpu"]), "train", 5)),
        "checkpoint": ("model.pt", trained / "ddpm/model.pt", module.load_checkpoint),
        "gzip": ("mnist/t10k-labels-idx1-ubyte.gz", ROOT / "data/mnist/t10k-labels-idx1-ubyte.gz",
                 lambda x: module.data_file("mnist", x.name, tmp_path))}[kind]
    file, whole = tmp_path / file, whole.read_bytes()
    file.parent.mkdir(exist_ok=True)
    for _ in range(200):
        file.write_bytes(mutate(whole, rng))
        with contextlib.redirect_stderr(None):
            try:
                read(file)
            except SystemExit as e:
                assert e.code == 2
                refusals += 1
    assert refusals > 100


# ---- Pictures ------------------------------------------------------------------------------------


def test_pictures_are_read_back_by_pillow(tmp_path):
    """A PNG, and an animated PNG, hold the pixels given."""
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 256, (5, 7, 11, 3), np.uint8)
    for name, save, count in (("pixelcnn", "save_picture", 1), ("ddpm", "save_png", 1),
                              ("ddpm", "save_png", 5)):
        getattr(lesson(name), save)(tmp_path / "x.png", *frames[:count])
        picture = Image.open(tmp_path / "x.png")
        assert getattr(picture, "n_frames", 1) == count
        for i in range(count):
            picture.seek(i)
            assert (np.asarray(picture.convert("RGB")) == frames[i]).all()


def test_grid_is_row_by_row():
    """Seven images in rows of three, each pixel enlarged, with a border; gaps have its colour."""
    x = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 1, 4, 5)
    picture = lesson("ddpm").grid(x, 3, zoom=2)
    assert picture.shape == (3 * 10, 3 * 12, 3) and picture.dtype == np.uint8
    for i in range(7):
        cell = picture[i // 3 * 10:i // 3 * 10 + 10, i % 3 * 12:i % 3 * 12 + 12]
        assert (cell[1:-1, 1:-1] == i).all() and (cell[0] == 64).all()
    assert (picture[20:, 12:] == 64).all()


def test_pixels_survive_the_round_trip():
    """uint8 -> [-1, 1] -> uint8 is the identity, and rounding is to the nearest."""
    to_float, to_uint8 = lesson("ddpm").to_float, lesson("ddpm").to_uint8
    x = torch.arange(256, dtype=torch.uint8)
    assert to_float(x)[0] == -1 and to_float(x)[255] == 1
    for push in (0, 0.9, -0.9):
        assert torch.equal(to_uint8(to_float(x) + push / 255), x)
