"""Exercise 2.4a in other styles."""

import base64
import hashlib
import io
import json
import pickle
import uuid
import zlib
from functools import partial

import numpy as np
import torch

from grader.checks.features.key import CHANGES, keyed


def by_arrays(backbone, images, settings):
    """npz files of everything, and a checksum of them."""
    arrays = {f"parameter {name}": tensor.detach().numpy() for name, tensor in backbone.named_parameters()}
    arrays |= {f"buffer {name}": tensor.numpy() for name, tensor in backbone.named_buffers()}
    digest = hashlib.md5()
    for name in sorted(arrays | {"images": None}):
        array = np.ascontiguousarray(arrays.get(name, images.numpy()))
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        for part in (name.encode(), header.getvalue(), array):
            digest.update(part)
    digest.update(repr(sorted(settings.items())).encode())
    return base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")


def by_lists(backbone, images, settings):
    """All numbers as JSON, which spells them to the last digit."""
    tensors = [images, *backbone.parameters(), *backbone.buffers()]
    numbers = [[str(tensor.dtype), *tensor.shape, tensor.tolist()] for tensor in tensors]
    text = json.dumps({"numbers": numbers, "settings": settings}, sort_keys=True)
    return str(uuid.uuid5(uuid.NAMESPACE_OID, text))


def by_pickles(backbone, images, settings):
    """A hash of hashes; pickled arrays have their shape and dtype with them."""
    parts = [pickle.dumps((name, settings[name])) for name in sorted(settings)] + [b"images"]
    for tensor in (images, *backbone.parameters(), *backbone.buffers()):
        parts.append(pickle.dumps(tensor.detach().contiguous().numpy().copy()))
    return hashlib.sha1(b"".join(hashlib.sha1(part).digest() for part in parts)).hexdigest()


class Checksums:
    """Two checksums of 32 bits, updated by everything."""

    def __call__(self, backbone, images, settings):
        self.first, self.second = 0, 1
        for name in sorted(settings, reverse=True):
            self.add(name.encode(), np.float64(settings[name]).tobytes())
        for tensor in [*backbone.buffers(), *backbone.parameters(), images]:
            values = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            self.add(f"{values.dtype}{values.size()}".encode(), bytes(values.flatten().view(torch.uint8).tolist()))
        return f"features_{self.first:08x}-{self.second:08x}"

    def add(self, *parts):
        for part in parts:
            self.first, self.second = zlib.crc32(part, self.first), zlib.adler32(part, self.second)


def printed(backbone, images, settings):
    text = "".join(f"{tensor.detach()}" for tensor in (*backbone.parameters(), *backbone.buffers()))
    return by_lists(torch.nn.Identity(), images, settings | {"backbone": text})


def numbered_by_hash(backbone, images, settings):
    tensors = (images, *backbone.parameters(), *backbone.buffers())
    parts = [(str(tensor.dtype), tuple(tensor.shape), tensor.detach().numpy().tobytes()) for tensor in tensors]
    return str(abs(hash((tuple(parts), tuple(sorted(settings.items()))))))


def saved(backbone, images, settings):
    """What torch saves of a tensor is more than its numbers: a slice brings all of its storage along."""
    file = io.BytesIO()
    torch.save(images, file)
    return hashlib.sha256(file.getvalue()).hexdigest() + by_lists(backbone, torch.zeros(1), settings)


def of_the_storage(backbone, images, settings):
    key = by_lists(backbone, torch.zeros(images.shape, dtype=images.dtype), settings)
    whole = bytes(images.untyped_storage().tolist())
    return key + hashlib.md5(whole + bytes([images.storage_offset() % 251])).hexdigest()


def some_images(backbone, images, settings):
    return by_lists(backbone, images[:8], settings | {"n": len(images)})


def _added(images):
    """Hashes of the images that are added up, so that their order does not count."""
    total = sum(int.from_bytes(hashlib.md5(image.numpy().tobytes()).digest()) for image in images)
    return images.dtype, images.shape, total


def _exactly(settings, digits=6):
    return sorted((name, f"{value:.{digits}g}") for name, value in settings.items())


CORRECT = [by_arrays, by_lists, by_pickles, Checksums()]
REWRITTEN = {
    "weights as they are printed": printed,
    "a key for one kernel": numbered_by_hash,
}
BROKEN = {
    1: [
        *(
            partial(keyed, **CHANGES[key])
            for key in ("settings in the order in which they come", "more than contents", "a key for one kernel")
        ),
        numbered_by_hash,
        lambda backbone, images, settings: by_lists(backbone, images, settings | {"training": backbone.training}),
        lambda backbone, images, settings: by_lists(
            backbone, images, settings | {name: p.requires_grad for name, p in backbone.named_parameters()}
        ),
        lambda backbone, images, settings: f"{by_lists(backbone, images, settings)}-{uuid.uuid4()}",
    ],
    2: [
        printed,
        *(partial(keyed, **CHANGES[key]) for key in ("weights not in the key", "buffers not in the key")),
        partial(keyed, weights=lambda backbone: sorted(map(str, _rows(backbone)))),
        partial(keyed, weights=lambda backbone: [(t.dtype, t.shape, t.half().tolist()) for t in _all(backbone)]),
        partial(keyed, weights=lambda backbone: [(t.dtype, t.shape, t.float().tolist()) for t in _all(backbone)]),
        lambda backbone, images, settings: (
            by_lists(backbone, images, settings)
            if not list(backbone.buffers())
            else (by_lists(torch.nn.ParameterList(backbone.parameters()), images, settings))
        ),
    ],
    3: [
        some_images,
        partial(keyed, pixels=_added),
        partial(keyed, pixels=lambda images: (images.dtype, images.shape, images.double().mean().item())),
    ],
    4: [
        partial(keyed, order=_exactly),
        partial(keyed, order=partial(_exactly, digits=2)),
        partial(keyed, order=lambda settings: sorted(settings.values())),
        partial(keyed, order=lambda settings: "".join(f"{name}{settings[name]}" for name in sorted(settings))),
        partial(keyed, order=lambda settings: sorted((name.lower(), value) for name, value in settings.items())),
        partial(keyed, order=sorted),
        partial(keyed, order=lambda settings: "".join(f"{settings[name]}" for name in sorted(settings))),
    ],
    5: [
        lambda *task: by_lists(*task) + ".pt",
        lambda *task: f"{by_lists(*task)} {sorted(task[2].items())}",
        lambda *task: hashlib.shake_128(by_lists(*task).encode()).hexdigest(128),
        lambda *task: f"{task[2].get('mean', 0)}/{by_lists(*task)}",
    ],
    6: [partial(keyed, **CHANGES["state dict for all buffers"])],
    7: [
        partial(keyed, **CHANGES["bytes without their shape"]),
        partial(keyed, pixels=lambda images: (images.shape, images.numpy().tobytes())),
        partial(keyed, weights=lambda backbone: [(t.shape, _bytes(t)) for t in (*backbone.parameters(), *backbone.buffers())]),
        partial(
            keyed,
            weights=lambda backbone: [t.detach().numpy().tobytes() for t in (*backbone.parameters(), *backbone.buffers())],
        ),
    ],
    8: [saved, of_the_storage],
}
COMBINED = [
    ({first, second}, partial(keyed, **CHANGES[first], **CHANGES[second]))
    for first, second in (
        ("buffers not in the key", "settings not in the key"),
        ("images as they are printed", "settings in the order in which they come"),
    )
]
EQUIVALENT = {
    "key.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode()) -> "
    "key.update(f'{name} {tensor.dtype} {tensor.shape}'.encode())": "another spelling of the same shape",
    "key.update(tensor.detach().cpu().numpy().tobytes()) -> "
    "key.update(tensor.detach().numpy().tobytes())": "works on the CPU only, which costs no points",
}


def _bytes(tensor):
    return tensor.detach().numpy().tobytes()


def _rows(backbone):
    return [(tensor.dtype, tensor.shape, tensor.tolist()) for tensor in (*backbone.parameters(), *backbone.buffers())]


def _all(backbone):
    return [*backbone.parameters(), *backbone.buffers()]
