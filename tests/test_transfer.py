import statistics

import pytest

from helpers.transfer import measure_arm

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("arm", "least"), [("probe", 0.88), ("fine-tuned", 0.93)])
def test_five_labels_per_class_are_enough_on_held_out_digits(arm, least):
    accuracies = [measure_arm(arm, labels_per_class=5, draw=draw) for draw in range(5)]
    assert statistics.mean(accuracies) >= least


def test_unknown_arm():
    with pytest.raises(ValueError) as error:
        measure_arm("prob", 5)
    assert str(error.value) == "arm must be one of 'raw pixels', 'probe', 'from scratch', 'fine-tuned', got 'prob'."
