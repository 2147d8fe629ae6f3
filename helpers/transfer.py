"""What a pre-trained network is worth: accuracy against labels per class, four ways to use the same labels.

Every arm gets the same labelled digits, the same number of steps, and the best of three settings on the same
200 validation digits; only then it sees the 800 test digits.

    raw pixels     a linear probe on the 1,024 pixels
    probe          a linear probe on the 128 features of the frozen, pre-trained glyphnet
    from scratch   glyphnet trained from a random start
    fine-tuned     glyphnet trained from its pre-trained weights

The first two are convex: `linear_probe` goes on to their optimum, so more steps would change nothing.
"""

from collections.abc import Iterator

from torch import nn

from helpers.backbones import glyphnet
from helpers.data import Examples, digits
from helpers.features import extract, linear_probe, remove_head
from helpers.training import evaluate, fit, seed_everything

ARMS = ("raw pixels", "probe", "from scratch", "fine-tuned")
PENALTIES = (1e-3, 1e-2, 1e-1)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)


def measure_arm(arm: str, labels_per_class: int, draw: int = 0, steps: int = 300) -> float:
    """Test accuracy of one arm, its setting chosen on validation.

    Args:
        arm: one of `ARMS`.
        labels_per_class: 1 to 78.
        draw: which labelled digits, and the seed of training.
        steps: updates for the arms that train a network.
    """
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(map(repr, ARMS))}, got {arm!r}.")
    train = digits("train", labels_per_class, draw)
    validation, test = digits("validation"), digits("test")
    candidates = _probes(arm, train) if arm in ARMS[:2] else _trained(arm, train, draw, steps)
    scored = [(evaluate(model, validation), -number, model) for number, model in enumerate(candidates)]
    best = max(scored, key=lambda entry: entry[:2])[-1]  # the first of equals
    return evaluate(best, test)


def _probes(arm: str, train: Examples) -> Iterator[nn.Module]:
    backbone = nn.Flatten()
    if arm == "probe":
        backbone = glyphnet()
        remove_head(backbone)
    features = extract(backbone, train.inputs)
    for penalty in PENALTIES:
        yield nn.Sequential(backbone, linear_probe(features, train.labels, len(train.classes), penalty))


def _trained(arm: str, train: Examples, seed: int, steps: int) -> Iterator[nn.Module]:
    for lr in LEARNING_RATES:
        seed_everything(seed)  # the new head, and from scratch the whole network
        model = glyphnet(pretrained=arm == "fine-tuned", classes=len(train.classes))
        fit(model, train, steps=steps, lr=lr, batch_size=32, seed=seed, progress=False)
        yield model
