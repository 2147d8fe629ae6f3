"""Where the numbers in the prose of chapter 08 come from; see `tests/prose.py`."""

import re

from helpers.data import digits
from helpers.recordings import formats


def share(network, batch, name):
    """The median time of a format as a share of eager's, as recorded."""
    rows = {row.name: row for row in formats.recorded(network)[batch]}
    return rows[name].milliseconds[1] / rows["eager"].milliseconds[1]


def best(network, batch):
    return min(share(network, batch, name) for name, needs in formats.NEEDS.items() if name != "eager" and not needs.gpu)


def printed_number(pattern):
    return lambda printed: float(re.search(pattern, printed, re.MULTILINE)[1])


def lost_one_at_a_time(printed):
    """Digits of 200 that a trace in train mode names wrongly, one image at a time, and the right model does not."""
    right, train_mode = (
        int(re.search(rf"^{name} +\S+ +(\d+) +\d+$", printed, re.MULTILINE)[1])
        for name in (r"\(the model in eval mode\)", r"torch\.jit\.trace")
    )
    return right - train_mode


def shown_image():
    return digits("test").inputs


MEASURED = {
    "taking the {} MB of the weights": lambda _: formats.recorded("glyphnet")[1][0].bytes / 1e6,
    "are off by more than {}": (lambda printed: min(1.0, printed_number(r"^ +inverted images +(\S+)$")(printed)), 0),
    "here they add up to {} %": (lambda printed: 100 * printed_number(r"^bfloat16 {2,}(\S+)$")(printed), 0.4),
    "here {} test images of {} KB": lambda _: [len(shown_image()), shown_image()[0].nbytes / 1024],
    "{} digits of 200 are lost": (lost_one_at_a_time, 20),
    "In the record ONNX Runtime takes {} of eager's time for one image and this small network, TorchScript {}": lambda _: [
        share("glyphnet", 1, name) for name in ("ONNX Runtime", "TorchScript")
    ],
    "An exported program gains nothing ({})": lambda _: share("glyphnet", 1, "torch.export"),
    "a compiled resnet18 takes {} of eager's time on 1 row, {} on 8 and {} on 32": lambda _: [
        share("resnet18", rows, "torch.compile") for rows in (1, 8, 32)
    ],
    "glyphnet in ONNX Runtime goes from {} to {}": lambda _: [share("glyphnet", rows, "ONNX Runtime") for rows in (1, 32)],
    "On 32 texts for MiniLM the fastest takes {}": lambda _: best("MiniLM", 32),
}

GIVEN = [
    "for one image, as 1.",
    "of the weights as 1?",
    "beside an output near 0",
    "rounds by up to 6e-8 of its result",
    "1e-5 leaves room for some 170 roundings",  # 1e-5 / 6e-8
    "bfloat16 keeps 8 significant bits: one rounding is up to 0.4 %",  # 2 ** -8
    "deprecated since PyTorch 2.5; PyTorch 2.14 warns at each call, and for Python 3.14",
    "a size of 1 stays a constant",
    "Accuracy on 200 images at once",
    "digits of 200 are lost",
    "keeps 10 bits of a float32's 23 in products; a tolerance of 1e-5",
]
