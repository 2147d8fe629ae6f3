"""Exercise 2.4 in other styles."""

import hashlib
import json
import os
import pickle
import sqlite3
import uuid
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from grader.checks.features.cache import CHANGES, cached
from helpers.features import cache_key


def by_looking_at_every_file(folder, compute, backbone, images, settings):
    """No key at all: a file holds what its features were made from."""
    state = backbone.state_dict()
    for path in folder.glob("*.pickle"):
        try:
            kept = pickle.loads(path.read_bytes())
            same = kept["settings"] == settings and kept["images"].shape == images.shape and torch.equal(kept["images"], images)
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
        key.update(f"{name} {list(tensor.shape)}".encode())
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
        pixels = repr(images.shape).encode() + images.numpy().tobytes()
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
    described = [settings, images.shape, *map(str, backbone.state_dict().values())]
    key.update(json.dumps(described, sort_keys=True).encode())
    return _read_or_make(folder / f"{key.hexdigest()}.npy", lambda: compute(backbone, images, **settings))


class NamedByHash:
    def __call__(self, folder, compute, backbone, images, settings):
        contents = tuple(tensor.numpy().tobytes() for tensor in (*backbone.state_dict().values(), images))
        number = hash((contents, images.shape, json.dumps(settings, sort_keys=True)))
        return _read_or_make(folder / f"{number:x}.npy", lambda: compute(backbone, images, **settings))


def with_a_list_of_contents(folder, compute, backbone, images, settings, parts=("weights", "images", "settings"), forget=False):
    """A file beside each result says what it was made from; `parts` are compared."""
    made_from = {
        "weights": [tensor.tolist() for tensor in (*backbone.parameters(), *backbone.buffers())],
        "images": [list(images.shape), images.flatten().tolist()],
        "settings": dict(sorted(settings.items())),
    }
    wanted = json.dumps({part: made_from[part] for part in parts})
    for described in folder.glob("*.json"):
        with suppress(Exception):
            if described.read_text() == wanted:
                return np_to_torch(described.with_suffix(".npz"))
    features = compute(backbone, images, **settings)
    for path in folder.iterdir() if forget else ():
        path.unlink()
    path = folder / f"{uuid.uuid4()}.npz"
    np.savez(path, features=features.numpy(), sha=[hashlib.sha256(features.numpy().tobytes()).hexdigest()])
    path.with_suffix(".json").write_text(wanted)
    return features


def np_to_torch(path):
    kept = np.load(path)
    if hashlib.sha256(kept["features"].tobytes()).hexdigest() != kept["sha"][0]:
        raise ValueError("damaged")
    return torch.from_numpy(kept["features"])


def with_all_in_the_name(folder, compute, backbone, images, settings, *, salt=b"", read=None, draft=False):
    """The learner's own key, and a function around it."""
    tensors = [*backbone.named_parameters(), *backbone.named_buffers(), ("", images)]
    key = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode() + salt)
    for name, tensor in tensors:
        key.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.detach().numpy().tobytes())
    path = folder / key.hexdigest()
    if draft:
        path.with_suffix(".lock").touch(exist_ok=False)
    found = (read or _loaded)(path)
    if found is None:
        found = compute(backbone, images, **settings)
        torch.save(found, path)
    if draft:
        path.with_suffix(".lock").unlink()
    return found


def _loaded(path):
    with suppress(Exception):
        return torch.load(path)


def _loaded_if_not_empty(path):
    return torch.load(path) if path.exists() and path.stat().st_size else None


def raw_numbers(folder, compute, backbone, images, settings):
    """Bytes without a length: what is left of a file that was cut is taken for all rows."""
    path = folder / cache_key(backbone, images, settings)
    if path.exists() and path.stat().st_size:
        numbers = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
        return numbers.view(-1, backbone[-1].num_features)
    features = compute(backbone, images, **settings)
    path.write_bytes(features.numpy().tobytes())
    return features


def as_text_with_commas(folder, compute, backbone, images, settings):
    path = folder / f"{cache_key(backbone, images, settings)}.csv"
    with suppress(OSError, ValueError):
        return torch.tensor([[float(number) for number in line.split(",")] for line in path.read_text().splitlines()])
    features = compute(backbone, images, **settings)
    path.write_text("\n".join(",".join(map(repr, row)) for row in features.tolist()))
    return features


def in_the_folder_above(folder, compute, backbone, images, settings):
    shared = Path(gettempdir()) / f"features-{os.getpid()}"
    shared.mkdir(exist_ok=True)
    return with_all_in_the_name(shared, compute, backbone, images, settings)


def swallowed(folder, compute, backbone, images, settings):
    try:
        return with_all_in_the_name(folder, compute, backbone, images, settings)
    except RuntimeError:
        return None


def _changed(*keys):
    return [partial(cached, **CHANGES[key]) for key in keys]


CORRECT = [by_looking_at_every_file, by_one_text_file, by_a_database, InSubfolders(), with_a_list_of_contents]
REWRITTEN = {
    "weights as they are printed in the key": printed_weights,
    "a key for one kernel": NamedByHash(),
}
BROKEN = {
    1: [*_changed("more than contents in the key", "a key for one kernel")],
    2: [
        partial(with_a_list_of_contents, forget=True),
        partial(with_a_list_of_contents, parts=("images", "settings")),
        partial(with_a_list_of_contents, parts=("weights", "settings")),
        partial(with_a_list_of_contents, parts=("weights", "images")),
        *_changed("sums in place of contents in the key", "order of the images not in the key", "buffers not in the key"),
    ],
    3: [*_changed("kept in memory"), in_the_folder_above],
    4: [
        *_changed("damaged file believed"),
        raw_numbers,
        as_text_with_commas,
        partial(with_all_in_the_name, read=_loaded_if_not_empty),
    ],
    5: [*_changed("file made before the features"), swallowed, partial(with_all_in_the_name, draft=True)],
    6: [*_changed("settings in the order in which they come", "settings rounded in the key")],
    7: [*_changed("bytes without their shape in the key")],
}
COMBINED = [
    ({first, second}, partial(cached, **CHANGES[first], **CHANGES[second]))
    for first, second in (
        ("buffers not in the key", "settings not in the key"),
        ("order of the images not in the key", "damaged file believed"),
    )
]

EQUIVALENT = {
    "draft = path.with_suffix('.part') -> draft = path": "a file cut short counts as no file",
}
