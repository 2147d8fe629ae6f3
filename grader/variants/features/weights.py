"""Exercise 2.5 in other styles."""

import copy
import heapq
from collections import defaultdict

import numpy as np
import torch
from torch.nn import functional as F


def one_image_at_a_time(weights, model, images, k):
    prepare, names = weights.transforms(), weights.meta["categories"]
    modes = [module.training for module in model.modules()]
    model.eval()
    results = []
    try:
        with torch.no_grad():
            for image in images:
                (probabilities,) = F.softmax(model(prepare(image).unsqueeze(0)), dim=-1)
                ranking = sorted(zip(names, probabilities, strict=True), key=lambda pair: pair[1], reverse=True)
                results.append(ranking[:k])  # the probabilities stay tensors without dimensions
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    return results


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
    was = {name for name, module in model.named_modules() if module.training}
    model.train(False)
    with torch.inference_mode():
        logits = model(torch.cat([preset(to_pil_image(image))[None] for image in images]))
    for name in was:
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


def typed_after_the_presets_sizes(weights, model, images, k):
    from torchvision.transforms import functional as TF

    preset = weights.transforms()
    prepared = []
    for image in images:
        crop = TF.center_crop(TF.resize(image, preset.resize_size, antialias=True), preset.crop_size)
        prepared.append(TF.normalize(crop.div(255), preset.mean, preset.std))
    twin = copy.deepcopy(model)
    twin.eval().requires_grad_(False)
    p = torch.softmax(twin(torch.stack(prepared)), 1)
    order = p.argsort(1, descending=True)
    return [
        [(weights.meta["categories"][order[i, rank]], p[i, order[i, rank]].item()) for rank in range(k)]
        for i in range(len(images))
    ]


def _predict(model, batch):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(batch)


def _top(weights, numbers, k):
    order = numbers.argsort(dim=1, descending=True)[:, :k]
    return [[(weights.meta["categories"][j], row[j].item()) for j in js] for js, row in zip(order, numbers, strict=True)]


def numbers_from_memory(weights, model, images, k):
    from torchvision.transforms import functional as TF

    preset, batch = weights.transforms(), []
    for image in images:
        crop = TF.center_crop(TF.resize(image, preset.resize_size), preset.crop_size) / 255
        batch.append(TF.normalize(crop, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return _top(weights, _predict(model, torch.stack(batch)).softmax(1), k)


def divided_by_255(weights, model, images, k):
    from torchvision.transforms import functional as TF

    preset = weights.transforms()
    crops = [TF.center_crop(TF.resize(image, preset.resize_size), preset.crop_size) / 255 for image in images]
    return _top(weights, _predict(model, torch.stack(crops)).softmax(1), k)


def first_of_the_sorted(weights, model, images, k):
    p = _predict(model, torch.stack([weights.transforms()(image) for image in images])).softmax(1)
    return [sorted(zip(weights.meta["categories"], row.tolist(), strict=True), key=lambda pair: pair[1])[:k] for row in p]


def all_by_hand(weights, model, images, k):
    from torchvision import transforms

    pipeline = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    return _top(weights, _predict(model, torch.stack([pipeline(image) for image in images])).softmax(1), k)


def logits_in_train_mode(weights, model, images, k):
    with torch.no_grad():
        logits = model(torch.stack([weights.transforms()(image) for image in images]))
    return _top(weights, logits, k)


def sorted_names_over_the_images(weights, model, images, k):
    p = _predict(model, torch.stack([weights.transforms()(image) for image in images])).softmax(0)
    names = sorted(weights.meta["categories"])
    return [[(names[int(j)], float(row[j])) for j in row.argsort(descending=True)[:k]] for row in p]


def logits_not_normalised_in_eval_mode(weights, model, images, k):
    from torchvision.transforms import functional as TF

    preset = weights.transforms()
    batch = [TF.center_crop(TF.resize(image, preset.resize_size), preset.crop_size).div(255) for image in images]
    with torch.no_grad():
        return _top(weights, model.eval()(torch.stack(batch)), k)


CORRECT = [one_image_at_a_time, in_numpy_on_a_copy, through_pillow, BySize(), typed_after_the_presets_sizes]
REWRITTEN = {
    "ImageNet's mean and std": numbers_from_memory,
    "least likely": first_of_the_sorted,
    "not normalised": divided_by_255,
}
COMBINED = [
    ({"ImageNet's mean and std", "other sizes than the preset's"}, all_by_hand),
    ({"logits for probabilities", "train mode"}, logits_in_train_mode),
    ({"softmax over the images", "categories in alphabetical order"}, sorted_names_over_the_images),
    ({"not normalised", "logits for probabilities", "left in eval mode"}, logits_not_normalised_in_eval_mode),
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
