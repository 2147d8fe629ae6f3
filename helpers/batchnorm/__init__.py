"""BatchNorm of a pre-trained network: what it stores, what can be frozen in it, and how to measure its statistics anew.

    y = weight * (x - mean) / sqrt(var + eps) + bias            per channel, over all other dimensions of x

In train mode mean and var are the batch's, and the running buffers move towards them; in eval mode they are the
buffers. So "frozen" has four meanings, and a layer can be frozen in one without the others:

    "affine"          weight and bias get no gradient                                       requires_grad_(False)
    "statistics"      running_mean, running_var and num_batches_tracked do not move         track_running_stats = False
    "normalisation"   the stored statistics normalise, in train mode too                    eval mode that lasts
    all of it         nothing moves, and train mode computes what eval mode computes

The third implies the second. The first two together were `trainable = False` in Keras before TensorFlow 2: nothing
moved, and the batch still normalised.

Sources: Ioffe & Szegedy 2015, section 3.1; Li et al. 2016, "Revisiting Batch Normalization For Practical Domain
Adaptation" (AdaBN); Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3 (statistics over all batches);
Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

from helpers.batchnorm.freezing import freeze, unfreeze
from helpers.batchnorm.layer import MEANINGS, batch_norm, moved
from helpers.batchnorm.meanings import what_is_frozen
from helpers.batchnorm.statistics import Drift, adabn, drift, pooled_statistics, recompute_statistics

__all__ = [
    "MEANINGS",
    "Drift",
    "adabn",
    "batch_norm",
    "drift",
    "freeze",
    "moved",
    "pooled_statistics",
    "recompute_statistics",
    "unfreeze",
    "what_is_frozen",
]
