"""Pre-train glyphnet on rendered letters and write its weights and model card: `python -m helpers.pretrain`.

Takes about four minutes on two CPU cores, then four more to measure what the weights are worth on digits.
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

from helpers import backbones
from helpers.backbones import GlyphNet
from helpers.data import FONTS, LETTERS, letters
from helpers.files import write_text
from helpers.training import History, evaluate, fit, seed_everything
from helpers.transfer import ARMS, measure_arm

SEED = 0
TRAIN_SEED, TEST_SEED = 1, 2  # of the letters drawn


def pretrain(count: int = 30_000, steps: int = 1400, progress: bool = True) -> tuple[GlyphNet, History]:
    """Train a new glyphnet on `count` rendered letters for `steps` batches of 128; no digit is ever seen."""
    source = letters(count, TRAIN_SEED)
    seed_everything(SEED)
    model = GlyphNet(len(LETTERS))
    model.mean.fill_(source.inputs.mean())
    model.std.fill_(source.inputs.std())
    history = fit(
        model, source, steps=steps, lr=4e-3, batch_size=128, weight_decay=1e-2, seed=SEED, device="cpu", progress=progress
    )
    return model, history


def score(draws: int = 5, labels_per_class: tuple[int, ...] = (1, 2, 5, 10)) -> dict[str, dict[str, list[float]]]:
    """Test accuracies on digits with the shipped weights: {labels per class: {arm: one accuracy per draw}}."""
    return {
        str(labels): {arm: [round(measure_arm(arm, labels, draw), 4) for draw in range(draws)] for arm in ARMS}
        for labels in labels_per_class
    }


def main(
    draws: Annotated[int, typer.Option(help="Draws of labelled digits per entry of the score table.")] = 5,
) -> None:
    """Train glyphnet, write its weights beside this module, score it on digits, write the model card."""
    model, history = pretrain()
    save(model.eval(), backbones.WEIGHTS)
    card = {
        "name": "glyphnet",
        "classes": LETTERS,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": hashlib.sha256(backbones.WEIGHTS.read_bytes()).hexdigest(),
        "data": {"letters": 30_000, "seed": TRAIN_SEED, "fonts": FONTS},
        "recipe": {"optimizer": "AdamW", "steps": 1400, "batch_size": 128, "lr": 4e-3, "weight_decay": 1e-2},
        "seed": SEED,
        "seconds": round(history.seconds),
        "machine": f"{torch.get_num_threads()} threads of a {platform.machine()} CPU",
        "versions": {"torch": version("torch"), "torchvision": version("torchvision"), "pillow": PIL.__version__},
        "letters_accuracy": round(evaluate(model, letters(5000, TEST_SEED)), 4),
    }
    write_text(backbones.CARD, json.dumps(card, indent=1) + "\n")  # the weights can be loaded from here on
    card["digits_accuracy"] = score(draws)
    write_text(backbones.CARD, json.dumps(card, indent=1) + "\n")
    write_text(backbones.CARD.with_suffix(".md"), card_text(card))
    print(card_text(card))


def save(model: GlyphNet, path: Path) -> None:
    """Write the weights as safetensors, atomically."""
    draft = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, draft)
    draft.replace(path)


def card_text(card: dict) -> str:
    """The model card as Markdown, made from the card's facts alone."""
    rows = [
        f"| {labels} | "
        + " | ".join(f"{statistics.mean(arms[arm]):.3f} ± {statistics.stdev(arms[arm]):.3f}" for arm in ARMS)
        + " |"
        for labels, arms in card["digits_accuracy"].items()
    ]
    draws = len(next(iter(card["digits_accuracy"].values()))[ARMS[0]])
    recipe, versions = card["recipe"], card["versions"]
    return "\n".join(
        [
            "# glyphnet",
            "",
            f"A ResNet with one basic block per stage and {card['parameters']:,} parameters, for 32 x 32 grey images, "
            "ink 1 on paper 0.",
            "It is small so that every lesson of the course runs on a laptop; it is no character recogniser.",
            "",
            f"**Data.** {card['data']['letters']:,} letters of {len(card['classes'])} classes (26 capitals, 17 small "
            "letters that are not just smaller capitals), drawn by `helpers.data.letters` "
            f"with seed {card['data']['seed']} in {len(card['data']['fonts'])} fonts: {', '.join(card['data']['fonts'])}.",
            "No digit was among them. The letters O and I look much like 0 and 1, and the distortions were chosen with",
            "handwriting and coarse scans in mind: the source is close to the target of the first chapters on purpose.",
            "",
            f"**Recipe.** {recipe['optimizer']}, {recipe['steps']:,} batches of {recipe['batch_size']}, highest learning "
            f"rate {recipe['lr']}, weight decay {recipe['weight_decay']}, seed {card['seed']}; "
            f"{card['seconds']} s on {card['machine']}.",
            "Again: `python -m helpers.pretrain`. "
            f"Versions: torch {versions['torch']}, torchvision {versions['torchvision']}, Pillow {versions['pillow']}. "
            "Other versions, machines or numbers of threads give weights that differ in the last digits, and another hash.",
            "",
            f"**Scores.** Letters never seen, same fonts: {card['letters_accuracy']:.3f}. "
            "(Some pairs, such as I and l, cannot be told apart in some fonts.)",
            f"Digits of scikit-learn, 800 test images, mean ± standard deviation of {draws} draws of labelled digits. "
            "Every arm had 300 steps (the probes: their optimum) "
            "and the best of three settings on 200 validation digits:",
            "",
            "| labels per class | " + " | ".join(ARMS) + " |",
            "|---|" + "---|" * len(ARMS),
            *rows,
            "",
            "**When not to use it.** Colour, other sizes than about 32 pixels, dark ink on light paper "
            "without inverting it, or anything that must not fail.",
            "",
            f"**Weights.** `glyphnet.safetensors`, SHA-256 `{card['sha256']}`, MIT licence like the rest of the course. "
            "The fonts are not part of it; matplotlib ships them: DejaVu (Bitstream Vera licence and public-domain "
            "changes), STIX (SIL Open Font License 1.1), and Computer Modern in the BaKoMa version (its own licence).",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
