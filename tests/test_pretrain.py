import pytest

from helpers.backbones import CARD, glyphnet_card
from helpers.data import letters
from helpers.pretrain import card_text, pretrain
from helpers.training import evaluate


@pytest.mark.slow
def test_a_short_training_learns_letters():
    model, history = pretrain(count=3000, steps=150, progress=False)
    assert sum(history.loss[-10:]) < 0.6 * sum(history.loss[:10])
    assert evaluate(model, letters(500, seed=12)) > 0.3  # chance is 0.02
    assert model.mean.item() == pytest.approx(letters(3000, seed=1).inputs.mean().item())


def test_the_model_card_is_made_from_its_facts():
    assert CARD.with_suffix(".md").read_text(encoding="utf-8") == card_text(glyphnet_card())


def test_the_readme_quotes_the_card(root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    row = next(line for line in CARD.with_suffix(".md").read_text(encoding="utf-8").splitlines() if line.startswith("| 5 |"))
    assert row in readme
