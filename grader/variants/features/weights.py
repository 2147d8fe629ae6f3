"""Exercise 2.5 in other styles."""

import copy
import heapq
from collections import defaultdict
from functools import partial

import numpy as np
import torch

from grader.checks.features.weights import CHANGES, classified
from helpers.features import extract


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


def typed_after_the_presets_sizes(weights, model, images, k, mean=None, std=None, descending=True, sizes=None, scale=255):
    from torchvision.transforms import functional as TF

    preset = weights.transforms()
    prepared = []
    for image in images:
        resize_size, crop_size = sizes or (preset.resize_size, preset.crop_size)
        crop = TF.center_crop(TF.resize(image, resize_size, antialias=True), crop_size)
        prepared.append(TF.normalize(crop.div(scale), mean or preset.mean, std or preset.std))
    twin = copy.deepcopy(model)
    twin.eval().requires_grad_(False)
    p = torch.softmax(twin(torch.stack(prepared)), 1)
    order = p.argsort(1, descending=descending)
    return [
        [(weights.meta["categories"][order[i, rank]], p[i, order[i, rank]].item()) for rank in range(k)]
        for i in range(len(images))
    ]


def with_hooks(weights, model, images, k):
    """Hooks, a queue and a dictionary; one image at a time."""
    prepare, categories = weights.transforms(), dict(enumerate(weights.meta["categories"]))
    found, modes = [], [(module, module.training) for module in model.modules()]
    hook = model.register_forward_hook(lambda module, args, logits: found.append(logits[0].double()))
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            for image in images:
                model(prepare(image).unsqueeze(0))
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training
    answers = []
    for logits in found:
        shares = (logits - logits.logsumexp(0)).exp().tolist()
        answers.append(sorted(((categories[i], share) for i, share in enumerate(shares)), key=lambda pair: -pair[1])[:k])
    return answers


def with_sigmoids(weights, model, images, k):
    twin = copy.deepcopy(model).eval()
    outputs = twin(torch.stack([weights.transforms()(image) for image in images])).detach()
    shares = 1 / (1 + (-outputs).exp())
    answers = []
    for row in shares:
        best = row.topk(k)
        answers.append(
            [(weights.meta["categories"][i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        )
    return answers


def _changed(*keys, **changes):
    return [partial(classified, **CHANGES[key]) for key in keys] + ([partial(classified, **changes)] if changes else [])


def _padded(weights, image):
    side = max(image.shape)
    top, left = ((side - size) // 2 for size in image.shape[1:])
    padded = torch.zeros(3, side, side, dtype=image.dtype)
    padded[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return weights.transforms()(padded)


def _without_crop(weights, image):
    (size,) = weights.transforms().crop_size
    return weights.transforms(resize_size=size, crop_size=size)(image)


def _aliased(weights, image):
    return weights.transforms(antialias=False)(image)


def _nearest(weights, image):
    from torchvision.transforms import InterpolationMode

    return weights.transforms(interpolation=InterpolationMode.NEAREST)(image)


def _from_one(categories):
    return ["background", *categories]


def _in_batch_statistics(model, batch):
    with torch.no_grad():
        return copy.deepcopy(model)(batch)


def _alone_in_train_mode(model, batch):
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.train(not isinstance(module, torch.nn.Dropout))
    with torch.no_grad():
        return torch.cat([twin(image[None]) for image in batch])


def _modes_of_children_put_back(model, batch):
    modes = [(module, module.training) for module in model.children()]
    logits = extract(model.eval(), batch)
    model.training = True
    for module, mode in modes:
        module.train(mode)
    return logits


def _with_a_hook_that_stays(model, batch):
    model.register_forward_hook(lambda module, args, logits: None)
    return extract(model, batch)


def _frozen_for_good(model, batch):
    model.requires_grad_(False)
    return extract(model, batch)


def _in_train_mode_afterwards(model, batch):
    logits = extract(model, batch)
    model.train()
    return logits


def _first(shares, k):
    columns = torch.arange(k).expand(len(shares), k)
    return shares[:, :k], columns


def _in_any_order(shares, k):
    columns = shares.topk(k).indices.sort(dim=1).values
    few = shares.shape[1] <= 16  # as sorts that stop early do it
    return shares.topk(k) if few else (shares.gather(1, columns), columns)


def _four_decimals(weights, model, images, k):
    return [[(name, float(f"{p:.4f}")) for name, p in row] for row in in_numpy_on_a_copy(weights, model, images, k)]


def _backwards(*task):
    return in_numpy_on_a_copy(*task)[::-1]


CORRECT = [in_numpy_on_a_copy, through_pillow, BySize(), typed_after_the_presets_sizes, with_hooks]
REWRITTEN = {
    "ImageNet's mean and std": partial(typed_after_the_presets_sizes, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    "not normalised": partial(typed_after_the_presets_sizes, mean=[0], std=[1]),
    "other sizes than the preset's": partial(typed_after_the_presets_sizes, sizes=(256, 224)),
    "not divided by 255": partial(typed_after_the_presets_sizes, scale=1),
    "least likely": partial(typed_after_the_presets_sizes, descending=False),
    "sigmoid in place of softmax": with_sigmoids,
    "rounded": _four_decimals,
}
BROKEN = {
    1: [
        *_changed("ImageNet's mean and std", "not divided by 255", "squeezed to a square", "other sizes than the preset's"),
        *(partial(classified, prepare=prepare) for prepare in (_padded, _without_crop, _aliased, _nearest)),
    ],
    2: _changed("categories in alphabetical order", names=_from_one),
    3: [*_changed("least likely", "likeliest last", best=_first), *_changed(best=_in_any_order), _backwards],
    4: [*_changed("softmax over the k listed", "logits for probabilities", "rounded"), with_sigmoids],
    5: [
        *_changed("only BatchNorm in eval mode", outputs=_in_batch_statistics),
        partial(classified, outputs=_alone_in_train_mode),
    ],
    6: [
        *_changed("left in eval mode", outputs=_frozen_for_good),
        *(
            partial(classified, outputs=outputs)
            for outputs in (_in_train_mode_afterwards, _modes_of_children_put_back, _with_a_hook_that_stays)
        ),
    ],
}
COMBINED = [
    ({first, second}, partial(classified, **CHANGES[first], **CHANGES[second]))
    for first, second in (
        ("logits for probabilities", "train mode"),
        ("softmax over the images", "categories in alphabetical order"),
    )
]

EQUIVALENT = {
    "for row in logits.softmax(dim=1): -> for row in logits.softmax(dim=-1):": "of two axes, the last is the second",
    "answers.append([(categories[column], row[column].item()) for column in best.tolist()]) -> "
    "answers.append([(categories[column], row[column]) for column in best.tolist()])": "a tensor with one number will do",
    "… row[column].item()) for column in best.tolist()]) -> "
    "… row[column].item()) for column in best])": "a tensor with one whole number is an index too",
}
