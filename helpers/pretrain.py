"""Pre-train glyphnet on rendered letters: `python -m helpers.pretrain` writes its weights and model card.

`--score` also measures what the new weights are worth on digits; until then the card says that they have not been scored.
"""

import hashlib
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import PIL
import torch
import typer
from safetensors.torch import save_file
from torch import nn

from helpers import backbones
from helpers.backbones import GlyphNet
from helpers.data import FONTS, LETTERS, Examples, letters
from helpers.files import write_text
from helpers.recordings.transfer import TASKS, record
from helpers.training import History, evaluate, fit, seed_everything

ARMS = TASKS["digits"].arms
LETTER_COUNT = 120_000
RECIPE = {"steps": 2800, "batch_size": 128, "lr": 4e-3, "weight_decay": 1e-2}  # of AdamW; `fit` has the schedule
SEED = 0  # of the start and of the batches
TRAIN_SEED, TEST_SEED = 1, 2  # of the letters drawn


def pretrain(count: int = LETTER_COUNT, steps: int = RECIPE["steps"], progress: bool = True) -> tuple[GlyphNet, History]:
    """Train a new glyphnet on `count` rendered letters for `steps` batches; no digit is ever seen.

    Half of the letters are mirrored, and a mirrored letter is a class of its own: telling J from its mirror image makes
    better features than naming letters alone. Afterwards the head keeps the letters as they are written.
    """
    source = _half_mirrored(letters(count, TRAIN_SEED))
    seed_everything(SEED)
    model = GlyphNet(len(source.classes))
    model.mean.fill_(source.inputs.mean())
    model.std.fill_(source.inputs.std())
    history = fit(model, source, **(RECIPE | {"steps": steps}), seed=SEED, device="cpu", progress=progress)
    head = nn.Linear(model.width, len(LETTERS))
    with torch.no_grad():
        head.weight.copy_(model.fc.weight[: len(LETTERS)])
        head.bias.copy_(model.fc.bias[: len(LETTERS)])
    model.fc = head
    return model, history


def _half_mirrored(examples: Examples) -> Examples:
    images, labels, classes = examples
    mirrored = torch.rand(len(labels), generator=torch.Generator().manual_seed(TRAIN_SEED)) < 0.5
    images[mirrored] = images[mirrored].flip(-1)
    return Examples(images, labels + len(classes) * mirrored, classes + tuple(f"mirrored {c}" for c in classes))


def main(
    train: Annotated[bool, typer.Option(help="Train and write the weights.")] = True,
    score_digits: Annotated[
        bool, typer.Option("--score", help="Measure the weights on digits, 5 draws; takes longer.")
    ] = False,
) -> None:
    """Train glyphnet on rendered letters, write its weights beside this module, and its model card."""
    card = backbones.glyphnet_card() if backbones.CARD.exists() else {}
    if train:
        model, history = pretrain()
        _save(model, backbones.WEIGHTS)
        card |= {
            "name": "glyphnet",
            "classes": LETTERS,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "sha256": hashlib.sha256(backbones.WEIGHTS.read_bytes()).hexdigest(),
            "data": {"letters": LETTER_COUNT, "seed": TRAIN_SEED, "fonts": FONTS},
            "recipe": {"optimizer": "AdamW"} | RECIPE,
            "seed": SEED,
            "seconds": round(history.seconds),
            "machine": f"{platform.machine()} CPU, threads: {torch.get_num_threads()}",
            "versions": {"torch": version("torch"), "pillow": PIL.__version__},
            "letters_accuracy": round(evaluate(model, letters(5000, TEST_SEED)), 4),
        }
        _write_card(card)
    if score_digits:
        card["digits_accuracy"] = record("digits", labels_per_class=(1, 2, 5, 10), draws=5)["accuracy"]
        card["scored"] = card["sha256"]
        _write_card(card)
    print(card_text(card))


def card_text(card: dict) -> str:
    """The model card as Markdown, made from the card's facts alone."""
    data, recipe, versions = card["data"], card["recipe"], card["versions"]
    return f"""# glyphnet

A ResNet with one basic block per stage and {card["parameters"]:,} parameters, for 32 x 32 grey images, ink 1 on paper 0.
It is small so that every lesson of the course runs on a laptop; it is no character recogniser.

**Data.** {data["letters"]:,} letters of {len(card["classes"])} classes (26 capitals, and the 17 small letters that are not just
smaller capitals), drawn by `helpers.data.letters` with seed {data["seed"]} in {len(data["fonts"])} fonts:
{", ".join(data["fonts"])}.
No digit was among them. The letters O and I look much like 0 and 1, and the distortions were chosen with handwriting and
coarse scans in mind: the source is close to the target of the first chapters on purpose.

**Recipe.** {recipe["optimizer"]}, {recipe["steps"]:,} batches of {recipe["batch_size"]}, highest learning rate
{recipe["lr"]}, weight decay {recipe["weight_decay"]}, seed {card["seed"]}; {card["seconds"]} s on {card["machine"]}.
Half of the letters were mirrored, and a mirrored letter was a class of its own: more shapes to tell apart make better
features. Afterwards the head kept the {len(card["classes"])} letters as they are written. Again: `python -m helpers.pretrain`.
Versions: torch {versions["torch"]}, Pillow {versions["pillow"]}. Other versions, machines or numbers of threads give weights
that differ in the last digits, and another hash.

**Scores.** Letters never seen, in the same fonts: {card["letters_accuracy"]:.3f}.
(Some pairs, such as I and l, cannot be told apart in some fonts.)

{_scores(card)}

**When not to use it.** Colour, other sizes than about 32 pixels, dark ink on light paper without inverting it, or anything
that must not fail.

**Weights.** `glyphnet.safetensors`, SHA-256 `{card["sha256"]}`,
MIT licence like the rest of the course. The fonts are not part of it; matplotlib ships them: DejaVu (Bitstream Vera licence,
changes in the public domain), STIX (SIL Open Font License 1.1), Computer Modern in the BaKoMa version (its own licence).
"""


def _scores(card: dict) -> str:
    if card.get("scored") != card["sha256"]:
        return "Digits: these weights have not been scored yet; run `python -m helpers.pretrain --no-train --score`."
    scores = card["digits_accuracy"]
    draws = len(next(iter(scores.values()))[ARMS[0]])
    rows = [
        " | ".join([labels, *(f"{statistics.mean(arms[arm]):.3f} ± {statistics.stdev(arms[arm]):.3f}" for arm in ARMS)])
        for labels, arms in scores.items()
    ]
    return "\n".join(
        [
            "Digits of scikit-learn: accuracy on 800 test images, "
            f"mean ± standard deviation of {draws} draws of labelled digits.",
            "Every arm had 300 steps (the two probes: as many as their optimum takes) and the best of three settings on 200",
            "validation digits:",
            "",
            "| labels per class | " + " | ".join(ARMS) + " |",
            "|---|" + "---|" * len(ARMS),
            *(f"| {row} |" for row in rows),
        ]
    )


def _write_card(card: dict) -> None:
    write_text(backbones.CARD, json.dumps(card, indent=1) + "\n")
    write_text(backbones.CARD.with_suffix(".md"), card_text(card))


def _save(model: GlyphNet, path: Path) -> None:
    """Write the weights as safetensors, atomically."""
    draft = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, draft)
    draft.replace(path)


if __name__ == "__main__":
    typer.run(main)
