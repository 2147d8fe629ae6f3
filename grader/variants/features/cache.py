"""Exercise 2.4 in other styles."""

import hashlib
import json
import pickle
import sqlite3
import uuid
import zlib
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from grader.checks.features.cache import CHANGES, cached


def by_looking_at_every_file(folder, compute, backbone, images, settings):
    """No key at all: a file holds what its features were made from."""
    state = backbone.state_dict()
    for path in folder.glob("*.pickle"):
        try:
            kept = pickle.loads(path.read_bytes())
            same = kept["settings"] == settings and torch.equal(kept["images"], images)
            if same and all(torch.equal(kept["state"][name], state[name]) for name in state):
                return kept["features"]
        except (pickle.UnpicklingError, EOFError, KeyError):
            path.unlink()
    features = compute(backbone, images, **settings)
    kept = {"state": state, "images": images, "settings": settings, "features": features}
    (folder / f"{uuid.uuid4()}.pickle").write_bytes(pickle.dumps(kept))
    return features


def by_one_text_file(folder, compute, backbone, images, settings):
    path = folder / "cache.json"
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        kept = {}
    weights = {name: tensor.tolist() for name, tensor in backbone.state_dict().items()}
    key = hashlib.md5(json.dumps([weights, images.tolist(), settings], sort_keys=True).encode()).hexdigest()
    if key not in kept:
        kept[key] = compute(backbone, images, **settings).tolist()
        path.write_text(json.dumps(kept))
    return torch.tensor(kept[key])


def by_a_database(folder, compute, backbone, images, settings):
    path = folder / "features.sqlite"
    key = hashlib.sha1(repr(sorted(settings.items())).encode())
    for name, tensor in [("images", images), *backbone.named_parameters(), *backbone.named_buffers()]:
        key.update(name.encode())
        key.update(memoryview(tensor.detach().contiguous().view(-1).numpy()))

    def look_up():
        database = sqlite3.connect(path)
        database.execute("pragma synchronous = off")
        database.execute("create table if not exists features (key text primary key, width integer, sum integer, numbers blob)")
        rows = database.execute("select width, sum, numbers from features where key = ?", [key.hexdigest()])
        return database, rows.fetchone()

    try:
        database, row = look_up()
    except sqlite3.DatabaseError:
        path.unlink()
        database, row = look_up()
    try:
        if row and zlib.crc32(row[2]) == row[1]:
            return torch.frombuffer(bytearray(row[2]), dtype=torch.float32).view(-1, row[0])
        features = compute(backbone, images, **settings)
        numbers = features.numpy().tobytes()
        row = key.hexdigest(), features.shape[1], zlib.crc32(numbers), numbers
        with database:
            database.execute("insert or replace into features values (?, ?, ?, ?)", row)
        return features
    finally:
        database.close()


class InSubfolders:
    """A folder for each backbone, in it one for each set of images, in it a file for each settings."""

    def __call__(self, folder, compute, backbone, images, settings):
        weights = b"".join(value.numpy().tobytes() for value in backbone.state_dict().values())
        pixels = images.numpy().tobytes()
        place = folder.joinpath(*(hashlib.sha256(part).hexdigest()[:20] for part in (weights, pixels)))
        place.mkdir(parents=True, exist_ok=True)
        name = "_".join(f"{key}={value}" for key, value in sorted(settings.items()))
        features = self.read(place / name)
        if features is None:
            features = compute(backbone, images, **settings)
            save_file({"features": features}, place / name)
        return features

    @staticmethod
    def read(path):
        try:
            return load_file(path)["features"]
        except Exception:
            return None


def _read_or_make(path, make):
    try:
        return torch.from_numpy(np.load(path))
    except (ValueError, EOFError, OSError):
        features = make()
        np.save(path, features.numpy())
        return features


def printed_weights(folder, compute, backbone, images, settings):
    key = hashlib.sha256(images.numpy().tobytes())
    key.update(json.dumps([settings, *map(str, backbone.state_dict().values())]).encode())
    return _read_or_make(folder / f"{key.hexdigest()}.npy", lambda: compute(backbone, images, **settings))


class NamedByHash:
    def __call__(self, folder, compute, backbone, images, settings):
        contents = tuple(tensor.numpy().tobytes() for tensor in (*backbone.state_dict().values(), images))
        number = hash((contents, json.dumps(settings)))
        return _read_or_make(folder / f"{number:x}.npy", lambda: compute(backbone, images, **settings))


CORRECT = [by_looking_at_every_file, by_one_text_file, by_a_database, InSubfolders()]
REWRITTEN = {
    "weights as they are printed in the key": printed_weights,
    "a key for one kernel": NamedByHash(),
}
BROKEN = {}
COMBINED = [
    ({first, second}, partial(cached, **CHANGES[first], **CHANGES[second]))
    for first, second in (
        ("buffers not in the key", "settings not in the key"),
        ("order of the images not in the key", "damaged file believed"),
    )
]

EQUIVALENT = {
    "key.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode()) -> "
    "key.update(f'{name} {tensor.dtype} {tensor.shape}'.encode())": "another spelling of the same shape",
    "key.update(tensor.detach().cpu().numpy().tobytes()) -> "
    "key.update(tensor.detach().numpy().tobytes())": "works on the CPU only, which costs no points",
    "draft = path.with_suffix('.part') -> draft = path": "a file cut short counts as no file",
}
