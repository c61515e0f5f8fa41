"""Human evaluation without a server: one page to vote on, and the slide's table from the votes.

Slide      Human Evaluation: win, tie, lose; "preference is vague, difficult to scale"
Question   Which of two sets of samples do people prefer, and is that more than chance?
Run        python experiments/human_eval.py a.npz b.npz          writes out/human_eval/vote.html
           open the page, vote by the keys left, right and space, and save votes.json
           python experiments/human_eval.py --tally votes.json   of one rater or of several

The page is blind: pairs and sides are shuffled, and only key.json says which side is A. A tenth of
the pairs comes twice, sides swapped: does a rater agree with himself or herself?
"""
import argparse
import base64
import io
import json
import random
import sys
from pathlib import Path

import matplotlib.image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fid

PAGE = """<!doctype html><meta charset="utf-8"><title>Which do you prefer?</title>
<style>body { font: 18px sans-serif; text-align: center; background: #eee }
img { width: 280px; image-rendering: pixelated; margin: 20px; border: 4px solid #bbb }
img:hover { border-color: #36c } button { font-size: 18px; padding: 8px 20px }</style>
<h2>Which one do you prefer?</h2><p id="caption"></p>
<div><img id="left"><img id="right"></div>
<button id="tie">no difference (space)</button> <button id="undo">back (Backspace)</button>
<p id="progress"></p><p><button id="save">save votes.json</button></p>
<script>
const study = STUDY, key = "votes " + study.id
let votes = JSON.parse(localStorage.getItem(key) || "[]")
const $ = id => document.getElementById(id)
function show() {
  const trial = study.trials[votes.length]
  $("progress").textContent = `${votes.length} of ${study.trials.length} done`
  for (const [i, side] of ["left", "right"].entries()) {
    $(side).style.visibility = trial ? "visible" : "hidden"
    if (trial) $(side).src = "data:image/png;base64," + study.images[trial[i]]
  }
  $("caption").textContent = trial ? trial[2] : "Thank you. Please save your votes."
}
function vote(choice) {
  if (votes.length < study.trials.length) votes.push(choice)
  localStorage.setItem(key, JSON.stringify(votes)); show()
}
function undo() { votes.pop(); localStorage.setItem(key, JSON.stringify(votes)); show() }
for (const choice of ["left", "right", "tie"]) $(choice).onclick = () => vote(choice)
$("undo").onclick = undo
document.onkeydown = e => {
  const choice = {ArrowLeft: "left", ArrowRight: "right", " ": "tie"}[e.key]
  if (choice) { e.preventDefault(); vote(choice) } else if (e.key == "Backspace") undo()
}
$("save").onclick = () => {
  const link = document.createElement("a")
  link.href = URL.createObjectURL(new Blob([JSON.stringify({id: study.id, votes})]))
  link.download = "votes.json"; link.click()
}
show()
</script>
"""


def png_of(image):
    """An image (C, H, W) uint8 as base64 text of a PNG file."""
    file = io.BytesIO()
    matplotlib.image.imsave(file, image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), format="png")
    return base64.b64encode(file.getvalue()).decode()


def make_page(path_a, path_b, num, seed):
    """The page, and its key: of every trial the pair, whether A is left, and whether it repeats."""
    (a, labels), (b, _) = (fid.read_images(str(path), None) for path in (path_a, path_b))
    rng = random.Random(seed)
    pairs = rng.sample(range(min(len(a), len(b))), min(num, len(a), len(b)))
    trials = [(pair, rng.random() < 0.5, False) for pair in pairs]
    again = rng.sample(trials, len(trials) // 10)
    trials += [(pair, not a_left, True) for pair, a_left, _ in again]
    images, shown = [], []
    for pair, a_left, _ in trials:
        sides = [png_of(a[pair]), png_of(b[pair])]
        images += sides if a_left else sides[::-1]
        caption = "" if labels is None else f"class {labels[pair].item()}"
        shown.append([len(images) - 2, len(images) - 1, caption])
    name = f"{rng.getrandbits(32):08x}"
    study = json.dumps(dict(id=name, images=images, trials=shown)).replace("<", "\\u003c")
    key = dict(id=name, a=str(path_a), b=str(path_b), trials=trials)
    return PAGE.replace("STUDY", study), key


def tally(key, files):
    """Votes of one rater or several -> (win, tie, lose) of A over pairs, by majority; and of the
    repeated pairs (agreed, asked). ValueError if the votes are not of this page."""
    score, agreed, asked = {}, 0, 0
    for file in files:
        if file["id"] != key["id"]:
            raise ValueError(f"votes of page {file['id']}, but the key is of page {key['id']}")
        first = {}
        for vote, (pair, a_left, repeat) in zip(file["votes"], key["trials"]):
            if vote not in ("left", "right", "tie"):
                raise ValueError(f"a vote is left, right or tie, not {vote!r}")
            value = 0 if vote == "tie" else 1 if (vote == "left") == a_left else -1
            if repeat:
                agreed, asked = agreed + (value == first[pair]), asked + 1
            else:
                first[pair] = value
                score[pair] = score.get(pair, 0) + value
    won, lost = (sum(s * sign > 0 for s in score.values()) for sign in (1, -1))
    return (won, len(score) - won - lost, lost), (agreed, asked)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("sets", nargs="*", metavar="A B", help="two .npz files of samples")
    p.add_argument("--tally", type=Path, nargs="+", help="votes.json of one rater or of several")
    p.add_argument("--num", type=int, default=50, help="pairs to vote on")
    p.add_argument("--seed", type=int, default=0, help="of the shuffling")
    p.add_argument("--out", type=Path, default=Path("out/human_eval"))
    a = p.parse_args(argv)
    if not a.tally:
        a.out.mkdir(parents=True, exist_ok=True)
        page, key = make_page(*a.sets, a.num, a.seed)
        (a.out / "vote.html").write_text(page, encoding="utf-8")
        (a.out / "key.json").write_text(json.dumps(key))
        return print(f"{a.out / 'vote.html'}: open it in a browser; key.json stays with you")
    key = json.loads((a.out / "key.json").read_text())
    counts, (agreed, asked) = tally(key, [json.loads(path.read_text()) for path in a.tally])
    found = fid.preference(*counts)
    print(f"A = {key['a']}, B = {key['b']}, {sum(counts)} pairs")
    print("| win | tie | lose | of the decided, A won | 95 % interval | p-value |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("| {win:.1%} | {tie:.1%} | {lose:.1%} | {decided:.1%} | {low:.1%} to {high:.1%} | "
          "{p:.3g} |".format(**found))
    print(f"{agreed} of {asked} repeated pairs got the same answer")


if __name__ == "__main__":
    main()
