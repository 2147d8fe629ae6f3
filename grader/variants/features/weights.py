"""Exercise 2.5 in other styles."""

import copy
import heapq
from collections import defaultdict
from functools import partial

import numpy as np
import torch

from grader.checks.features.weights import CHANGES, classified


def in_numpy_on_a_copy(weights, model, images, k):
    batch = np.stack([weights.transforms()(image).numpy() for image in images])
    clone = copy.deepcopy(model).eval()
    z = clone(torch.from_numpy(batch)).detach().numpy().astype(np.float64)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    names = np.array(weights.meta["categories"])
    best = np.argsort(p, axis=1)[:, ::-1][:, :k]
    return [[[names[j], p[i, j]] for j in row] for i, row in enumerate(best)]


def through_pillow(weights, model, images, k):
    from torchvision.transforms.functional import to_pil_image

    preset = weights.transforms()
    training = {name for name, module in model.named_modules() if module.training}
    model.train(False)
    with torch.inference_mode():
        logits = model(torch.cat([preset(to_pil_image(image))[None] for image in images]))
    for name in training:
        model.get_submodule(name).training = True
    top = torch.topk(logits.log_softmax(1).exp(), k)
    label = weights.meta["categories"].__getitem__
    return tuple(tuple(zip(map(label, js), ps, strict=True)) for js, ps in zip(top.indices.tolist(), top.values, strict=True))


class BySize:
    """Images of one size go through the preset and the network together; each result finds its place again."""

    def __call__(self, weights, model, images, k):
        groups = defaultdict(list)
        for position, image in enumerate(images):
            groups[image.shape].append(position)
        network, results = copy.deepcopy(model), {}
        for module in network.modules():
            module.training = False
        for positions in groups.values():
            batch = weights.transforms()(torch.stack([images[position] for position in positions]))
            for position, logits in zip(positions, network(batch).tolist(), strict=True):
                total = sum(map(np.exp, logits))
                pairs = [(np.exp(logit) / total, name) for logit, name in zip(logits, weights.meta["categories"], strict=True)]
                results[position] = [(name, share) for share, name in heapq.nlargest(k, pairs)]
        return [results[position] for position in range(len(images))]


def typed_after_the_presets_sizes(weights, model, images, k, mean=None, std=None, descending=True):
    from torchvision.transforms import functional as TF

    preset = weights.transforms()
    prepared = []
    for image in images:
        crop = TF.center_crop(TF.resize(image, preset.resize_size, antialias=True), preset.crop_size)
        prepared.append(TF.normalize(crop.div(255), mean or preset.mean, std or preset.std))
    twin = copy.deepcopy(model)
    twin.eval().requires_grad_(False)
    p = torch.softmax(twin(torch.stack(prepared)), 1)
    order = p.argsort(1, descending=descending)
    return [
        [(weights.meta["categories"][order[i, rank]], p[i, order[i, rank]].item()) for rank in range(k)]
        for i in range(len(images))
    ]


CORRECT = [in_numpy_on_a_copy, through_pillow, BySize(), typed_after_the_presets_sizes]
REWRITTEN = {
    "ImageNet's mean and std": partial(typed_after_the_presets_sizes, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    "not normalised": partial(typed_after_the_presets_sizes, mean=[0], std=[1]),
    "least likely": partial(typed_after_the_presets_sizes, descending=False),
}
BROKEN = {}
COMBINED = [
    ({first, second}, partial(classified, **CHANGES[first], **CHANGES[second]))
    for first, second in (
        ("logits for probabilities", "train mode"),
        ("softmax over the images", "categories in alphabetical order"),
    )
]

EQUIVALENT = {
    "try: ⏎ with torch.no_grad(): ⏎ probabilities = … for image in images])).softmax(dim=1) ⏎ finally: -> "
    "with torch.no_grad(): ⏎ probabilities = … for image in images])).softmax(dim=1)": "a network that raises is out of scope",
    "with torch.no_grad(): ->": "`.item()` leaves the graph behind",
    "… images])).softmax(dim=1) -> … images])).softmax(dim=-1)": "of two axes, the last is the second",
    "answers.append([(categories[column], row[column].item()) for column in best.tolist()]) -> "
    "answers.append([(categories[column], row[column]) for column in best.tolist()])": "a tensor with one number will do",
    "… row[column].item()) for column in best.tolist()]) -> "
    "… row[column].item()) for column in best])": "a tensor with one whole number is an index too",
}
