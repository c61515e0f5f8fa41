"""dalle_mini.py: held-out pairs stay held out, no token sees a later one, no probability crosses
from words to codes, and the cache changes nothing."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inprocess import call

import dalle_mini as dm


def tiny(N=3, K=5, h=2, w=3, layers=3, V=4):
    """A transformer of random weights, float64: N places of text from V words, h x w codes of K."""
    torch.manual_seed(0)
    net = dm.Transformer(V, N, K, h, w, 32, layers, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.double().eval()


def text_of(net, *words):
    """Tokens (1, N) of a text of these words."""
    text = net.none.clone()
    text[:len(words)] = torch.tensor(words)
    return text[None]


def some_codes(n, K=5, places=6):
    return torch.randint(K, (n, places), generator=torch.Generator().manual_seed(3))


def autoencoder():
    torch.manual_seed(0)
    return dm.LocalAutoencoder(3, 16, dm.Codebook(7, 4, 0.25)).eval()


# ---- Scenes and captions -------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["seen", "held-out", "all"])
def test_held_out_pairs_are_held_out(pairs):
    """Over 5,000 scenes: exactly the 10 pairs with (d + c) % 8 == 0 are missing from the seen ones;
    a fifth of all scenes has one digit, in the middle, the others two at opposite places."""
    facts = dm.random_facts(5000, np.random.default_rng(0), pairs)
    found = {(int(d), int(c)) for d, c in facts.reshape(-1, 2)} - {dm.EMPTY}
    every = set(itertools.product(range(10), range(8)))
    held_out = {(d, c) for d, c in every if (d + c) % 8 == 0}
    assert found == {"seen": every - held_out, "held-out": held_out, "all": every}[pairs]
    layouts, counts = np.unique(facts[:, :, 0] < 10, axis=0, return_counts=True)
    assert [np.flatnonzero(row).tolist() for row in layouts] == [[3, 4], [1, 2], [0]]
    assert abs(counts / 5000 - [0.4, 0.4, 0.2]).max() < 0.03


def test_captions_say_what_stands_where():
    facts = np.tile(dm.EMPTY, (5, 1))
    facts[1], facts[2] = (7, 0), (2, 6)
    assert dm.caption_of(facts) == "a red seven left of an orange two"
    assert dm.caption_of(facts, turn=True) == "an orange two right of a red seven"
    facts = facts[[0, 0, 0, 1, 2]]
    assert dm.caption_of(facts) == "a red seven above an orange two"
    assert dm.caption_of(facts, turn=True) == "an orange two below a red seven"
    assert dm.caption_of(facts[[4, 0, 0, 0, 0]]) == "an orange two"


def test_scenes_show_their_facts():
    """Where something stands there is ink of its colour, within a pixel of its place; elsewhere the
    background is 16; the digit is one of the wanted class."""
    labels = np.arange(20) % 10
    digits = np.zeros((20, 1, 28, 28), np.uint8)
    digits[:, :, 8:20, 8:20] = (labels * 20 + 60)[:, None, None, None]  # brightness says which
    facts = dm.random_facts(50, np.random.default_rng(0), "all")
    x = dm.render(facts, digits, labels, np.random.default_rng(1))
    assert x.shape == (50, 3, 32, 32) and x.dtype == torch.uint8
    for scene, row in zip(x, facts):
        rest = scene.clone()
        for (r, c), (digit, colour) in zip(dm.PLACES, row):
            if digit < 10:
                rgb = torch.tensor(list(dm.COLOURS.values())[colour]).view(3, 1, 1)
                want = 16 + (digit * 20 + 60) / 255 * (rgb - 16)
                assert (scene[:, r - 1:r + 1, c - 1:c + 1] - want).abs().max() <= 1
                rest[:, max(0, r - 8):r + 8, max(0, c - 8):c + 8] = 16
        assert (rest == 16).all()


def test_scenes_move_by_up_to_a_pixel():
    """Full squares of 14 x 14, whose corner is any of the nine around its place."""
    facts = np.tile(dm.EMPTY, (200, 5, 1))
    facts[:, 0] = (0, 7)
    x = dm.render(facts, np.full((1, 1, 28, 28), 255, np.uint8), np.zeros(1),
                  np.random.default_rng(0))
    ink = x[:, 0] == 250
    corners = {tuple(scene.nonzero()[0].tolist()) for scene in ink}
    assert (ink.sum((1, 2)) == 14 * 14).all()
    assert corners == set(itertools.product((8, 9, 10), repeat=2))


def test_tokens_are_words_and_pads():
    """Every caption fits; each place has a pad of its own; the empty text is pads alone."""
    V = len(dm.WORDS)
    assert V == len(set(dm.WORDS)) == 25
    tokens = dm.to_tokens(["", "a Red  seven"])
    assert tokens[0].tolist() == [V + place for place in range(8)]
    assert [dm.WORDS[token] for token in tokens[1, :3]] == ["a", "red", "seven"]
    assert tokens[1, 3:].tolist() == tokens[0, 3:].tolist()
    facts = dm.random_facts(2000, np.random.default_rng(0), "all")
    texts = [dm.caption_of(scene, turn) for turn in (False, True) for scene in facts]
    back = [" ".join(dm.WORDS[token] for token in row if token < V) for row in dm.to_tokens(texts)]
    assert back == texts and max(len(text.split()) for text in texts) == dm.TEXT_LENGTH
    assert {word for text in texts for word in text.split()} == set(dm.WORDS)


@pytest.mark.parametrize("text, words", [
    ("a red horse", "unknown word 'horse'; the words are a an left right of above below red green"),
    ("a red seven. ", "unknown word 'seven.'"),
    ("a red seven left of a blue two above a white one", "has 12 words, more than 8"),
])
def test_bad_prompts_are_one_line(text, words, tmp_path):
    """Before anything is trained or read."""
    for verb in ("--sample", "--train"):
        said = call(dm, verb, "--prompt", text, "--device", "cpu", cwd=tmp_path, code=2)
        assert words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- Codes ---------------------------------------------------------------------------------------


def test_codes_hold_all_that_the_decoder_gets():
    net = autoencoder()
    images = torch.randint(256, (3, 3, 8, 12), dtype=torch.uint8)
    codes = dm.codes_of(net, images)
    with torch.no_grad():
        back, same, _ = net(dm.to_float(images))
        again = net.reconstruct(dm.to_float(images))
    assert codes.shape == (3, 2, 3) and torch.equal(codes, same) and torch.equal(back, again)
    assert torch.allclose(dm.images_of(net, codes), back, atol=1e-5)


def test_a_code_sees_ten_by_ten_pixels():
    """So codes of the upper half see up to 3 pixels below it, which --complete has to hide."""
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    autoencoder().encode(x)[0, 3, 4].sum().backward()
    rows, cols = x.grad[0].abs().sum(0).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (9, 18, 13, 22)


# ---- The transformer -----------------------------------------------------------------------------


def test_block_is_pytorchs():
    """With the same weights, nn.TransformerEncoderLayer with norms first and a causal mask."""
    torch.manual_seed(0)
    ours = dm.TransformerBlock(32, 4).double()
    theirs = torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True,
                                              norm_first=True, dtype=torch.double)
    names = {"norm1": "norm1", "self_attn.in_proj_": "qkv.", "self_attn.out_proj": "out",
             "norm2": "norm2", "linear1": "mlp.0", "linear2": "mlp.2"}
    state = ours.state_dict()
    for name in theirs.state_dict():
        old, new = next((old, new) for old, new in names.items() if name.startswith(old))
        theirs.state_dict()[name].copy_(state[name.replace(old, new)])
    x, mask = torch.randn(2, 7, 32).double(), torch.ones(7, 7).triu(1).bool()
    assert torch.allclose(ours(x)[0], theirs(x, mask), atol=1e-12)


def test_no_token_sees_a_later_one():
    """Each token of text and of codes changes the logits of all later ones, and of no others; the
    last token of the text changes those of the first code."""
    net = tiny()
    text, codes = text_of(net, 0, 2), some_codes(1)
    with torch.no_grad():
        before = net(text, codes)
        for i in range(9):
            t, c = text.clone(), codes.clone()
            if i < 3:
                t[0, i] = (t[0, i] + 1) % 7
            else:
                c[0, i - 3] = (c[0, i - 3] + 1) % 5
            change = [(a - b).abs().amax(-1)[0] for a, b in zip(net(t, c), before)]
            assert torch.equal(torch.cat(change) > 1e-12, torch.arange(9) > i)


def log_probs(net, text, codes):
    """log p(text) and log p(codes | text) in nats (B,) each."""
    with torch.no_grad():
        pairs = zip(net(text, codes), (text, codes))
    return [-F.cross_entropy(out.mT, tokens, reduction="none").sum(1) for out, tokens in pairs]


def test_stream_is_two_distributions():
    """p(text) sums to 1 over all texts of words and pads, p(codes | text) over all grids: nothing
    crosses from one vocabulary to the other."""
    net = tiny(N=2, K=3, h=1, w=3)
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    total = log_probs(net, text_of(net, 1).expand(27, -1), every)[1].exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-9)
    texts = torch.cartesian_prod(torch.arange(6), torch.arange(6))  # 4 words, 2 pads
    total = log_probs(net, texts, every[:1].expand(36, -1))[0].exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-9)


def test_untrained_stream_is_uniform():
    net = dm.Transformer(4, 3, 5, 2, 3, 32, 2, 2).double()
    text, codes = log_probs(net, torch.zeros(2, 3, dtype=torch.long), some_codes(2))
    assert torch.allclose(text, torch.tensor(-3 * math.log(4 + 3)).double())
    assert torch.allclose(codes, torch.tensor(-6 * math.log(5)).double())


def test_every_parameter_learns():
    """Each row of each weight gets a gradient: every word, code and place has its own vector."""
    net = tiny()
    torch.manual_seed(0)
    dm.stream_loss(net, torch.randint(7, (64, 3)), torch.randint(5, (64, 6)))[0].backward()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all() and (p.grad.abs().sum(-1) > 0).all(), name


def test_loss_is_one_part_text_and_seven_parts_codes():
    net = tiny()
    text, codes = torch.cat([text_of(net, 0, 2), text_of(net, 1)]), some_codes(2)
    loss, nats = dm.stream_loss(net, text, codes)
    of_text, of_codes = log_probs(net, text, codes)
    assert nats.item() == pytest.approx(-of_codes.mean().item() / 6)
    want = -(of_text.mean() / 3 + 7 * of_codes.mean() / 6) / 8
    assert loss.item() == pytest.approx(want.item())


def test_one_text_in_ten_is_the_empty_one(tmp_path, monkeypatch):
    """What guidance takes for "none" is what training shows: pads alone."""
    texts, loss = [], dm.stream_loss
    monkeypatch.setattr(dm, "stream_loss", lambda net, text, codes: (
        texts.append(text), loss(net, text[:4], codes[:4]))[1])
    call(dm, *TRAIN.split(), "--batch-size", 4000, "--codes-steps", 0, "--steps", 1, cwd=tmp_path)
    empty = (texts[0] == dm.to_tokens([""])).all(1)
    assert len(empty) == 4000 and abs(empty.double().mean() - 0.1) < 0.02
    assert (texts[0][~empty, 0] < len(dm.WORDS)).all()


# ---- Sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("given", [0, 1, 4])
def test_cache_changes_nothing(w, given, monkeypatch):
    """The logits of every step are those of the whole network on what is known, with and without
    cache, and after given codes; w = 0 is unconditional, 1 conditional."""
    net, seen, draw = tiny(), [], dm.draw_code
    monkeypatch.setattr(dm, "draw_code", lambda out, u: (seen.append(out), draw(out, u))[1])
    text, known = torch.cat([text_of(net, 0, 2), text_of(net, 3)]), some_codes(2)[:, :given]
    before, u = text.clone(), torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    drawn = dm.sample(net, text, known, u, w)
    assert torch.equal(dm.sample(net, text, known, u, w, cached=False), drawn)
    assert torch.equal(text, before) and torch.equal(drawn[:, :given], known)
    with torch.no_grad():
        cond, uncond = (net(t, drawn)[1][:, given:] for t in (text, net.none.expand(2, -1)))
    want = (uncond + w * (cond - uncond)).unbind(1)
    assert len(seen) == 2 * (6 - given)
    assert torch.allclose(torch.stack(seen), torch.stack(want + want), atol=1e-9)


def test_samples_follow_the_distribution():
    """Counts of two codes drawn 20,000 times against p(codes | text)."""
    net, N = tiny(K=3, h=1, w=2, layers=1), 20_000
    text = text_of(net, 1)
    u = torch.rand(N, 2, generator=torch.Generator().manual_seed(1))
    drawn = dm.sample(net, text.expand(N, -1), torch.zeros(N, 0, dtype=torch.long), u)
    found = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / N
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    want = log_probs(net, text.expand(9, -1), every)[1].exp()
    assert (found - want).abs().max() < 4 * (0.25 / N) ** 0.5


# ---- The program ---------------------------------------------------------------------------------

TRAIN = "--train --scenes 40 --codes-width 8 --code-dim 4 --width 32 --layers 1 --heads 2 " \
        "--device cpu"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with out/dalle_mini of a short training, and what it printed."""
    folder = tmp_path_factory.mktemp("dalle")
    flags = f"{TRAIN} --batch-size 8 --codes-steps 4 --steps 4 --every 2 --codebook-size 16"
    said = call(dm, *flags.split(), cwd=folder)
    return folder, said


def test_default_prompts(trained):
    """Six prompts, the last two of held-out pairs alone; codes are drawn, and their words known."""
    samples = np.load(trained[0] / "out/dalle_mini/samples.npz")
    assert samples["arr_0"].shape == (48, 32, 32, 3) and len(set(samples["captions"])) == 6
    for prompt in dm.PROMPTS:
        words = prompt.split()
        pairs = [(dm.DIGITS.index(digit), list(dm.COLOURS).index(colour))
                 for colour, digit in zip(words, words[1:]) if digit in dm.DIGITS]
        held_out = [(d + c) % 8 == 0 for d, c in pairs]
        assert all(held_out) if prompt in dm.PROMPTS[4:] else not any(held_out)


def test_prompts_may_be_repeated(trained):
    """--prompt implies --sample; every prompt gets --num images, a row each."""
    folder, _ = trained
    said = call(dm, "--prompt", "a Red seven", "--prompt", "", "--num", 3, "--save", "x.npz",
                cwd=folder)
    saved = np.load(folder / "x.npz")
    assert saved["arr_0"].shape == (6, 32, 32, 3) and "row 1: a Red seven" in said
    assert saved["captions"].tolist() == ["a Red seven"] * 3 + [""] * 3


def test_both_stages_report_held_out_numbers(trained):
    _, said = trained
    assert "parameters, 40 scenes, 4 + 4 steps of 8" in said
    for step in (2, 4):
        assert f"codes, step {step}: squared error 0." in said and "of 16 codes used" in said
        assert re.search(rf"transformer, step {step}: [34].*, [34].* if pairs are held out", said)


def test_completion_knows_nothing_of_the_lower_half(trained, monkeypatch):
    """Black or white there, what is given and what is drawn are the same."""
    folder, _ = trained
    pictures, load = [], dm.load_scenes
    monkeypatch.setattr(dm, "save_picture", lambda path, picture: pictures.append(picture))
    for below in (0, 255):
        def other(*args, **options):
            images, texts, facts = load(*args, **options)
            images[:, :, 16:] = below
            return images, texts, facts

        monkeypatch.setattr(dm, "load_scenes", other)
        call(dm, "--complete", cwd=folder)
    a, b = (picture.reshape(8, 98, 10, 98, 3) for picture in pictures)
    assert (a[:, :, 1:] == b[:, :, 1:]).all() and (a[:, :, 0] != b[:, :, 0]).any()


def test_completion_keeps_the_given_codes(monkeypatch):
    args = dm.parse_args(f"{TRAIN} --codebook-size 16".split())
    model, given = dm.build(args).eval(), torch.randint(16, (3, 32))
    monkeypatch.setattr(dm, "images_of", lambda net, codes: codes)
    monkeypatch.setattr(dm, "to_uint8", lambda codes: codes)
    codes = dm.generate(args, model, ["a red seven", "", "a blue one"], given)
    assert codes.shape == (3, 8, 8) and torch.equal(codes.flatten(1)[:, :32], given)
    assert len(codes[:, 4:].unique()) > 4


def test_guidance_must_be_finite(tmp_path):
    said = call(dm, "--sample", "--guidance", "nan", cwd=tmp_path, code=2)
    assert said == "dalle_mini.py: --guidance nan: expected a finite number\n"
