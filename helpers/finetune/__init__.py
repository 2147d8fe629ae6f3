"""Fine-tuning: which parameters train, each stage at what learning rate, from when on, and until when.

    lr of the k-th stage from the end = lr / factor**k                  k = 0 for the head

A parameter is frozen when `requires_grad` is False; whether the buffers of a frozen part move is a matter of modes, see
`helpers.training.train_mode`. `model.fc.requires_grad = True` does neither: it sets an attribute on a module, and no
parameter notices.

Stages are names of modules from stem to head. A stage goes on until the next begins, in the order of
`model.named_parameters()`; what comes before the first belongs to the first. A parameter that is used in two places
is one parameter, at the first of its places.

Sources: Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification" (ULMFiT), section 3.2 for
discriminative learning rates and 3.3 for gradual unfreezing; Kumar et al. 2022, "Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution", for LP-FT; Smith 2017, "Cyclical Learning Rates for Training Neural
Networks", section 3.3, for the range test.
"""

from helpers.finetune.finder import LearningRates, find_lr
from helpers.finetune.heads import lp_ft, probe_head
from helpers.finetune.parts import Report, freeze, report, train_last, train_only, unfreeze
from helpers.finetune.rates import GradualUnfreezing, parameter_groups, unfreeze_into
from helpers.finetune.restore import put_back
from helpers.stopping import EarlyStopping

__all__ = [
    "EarlyStopping",
    "GradualUnfreezing",
    "LearningRates",
    "Report",
    "find_lr",
    "freeze",
    "lp_ft",
    "parameter_groups",
    "probe_head",
    "put_back",
    "report",
    "train_last",
    "train_only",
    "unfreeze",
    "unfreeze_into",
]
