"""Docstrings of Python's standard library, by topic: what `helpers.data.docstrings` is made of.

They are read from the source files of the Python that runs, by parsing: nothing is imported, nothing downloaded. A text
is the first paragraph of a function's or class's docstring, of four words or more. Training, validation and test texts
come from different modules, so that copies with small changes, of which one module has many, do not leak.

`docstrings.txt` lists what belongs to the task: one line per text, the beginning of the SHA-256 of module, name and text.
It holds only texts that are word for word the same in Python 3.11.7, 3.12.1 and 3.13.0, once each, balanced over the
topics in validation and test. So these three give the same texts, in the same order. Another patch release may have
reworded a docstring; it is then left out, and its split is that much smaller.

Written by `python -m helpers.docstrings python3.11 python3.12 python3.13`. Only the standard library is imported here.
"""

import ast
import hashlib
import json
import random
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LIST = Path(__file__).with_suffix(".txt")
BALANCED = {"validation": 36, "test": 60}  # texts per topic
ALIKE = 0.6  # shared share of words from which a training text counts as a copy of a test text

# Modules with their submodules. Each module is in one split only.
TOPICS = {
    "concurrency": {
        "train": "asyncio queue sched",
        "validation": "concurrent threading",
        "test": "multiprocessing subprocess",
    },
    "files and archives": {
        "train": "tarfile shutil genericpath posixpath fileinput filecmp glob bz2 lzma",
        "validation": "tempfile gzip stat zipapp",
        "test": "zipfile os _pyio ntpath",
    },
    "mail and markup": {
        "train": "email html base64 csv quopri",
        "validation": "plistlib json xml.dom xml.sax",
        "test": "mailbox xml.etree configparser mimetypes",
    },
    "networking": {
        "train": "urllib smtplib ftplib socketserver ssl wsgiref netrc",
        "validation": "poplib selectors xmlrpc.client webbrowser",
        "test": "http imaplib socket ipaddress xmlrpc.server",
    },
    "numbers and dates": {
        "train": "_pydecimal calendar",
        "validation": "numbers _strptime zoneinfo",
        "test": "fractions statistics random",
    },
    "testing and debugging": {
        "train": "unittest traceback trace timeit",
        "validation": "pdb pstats profile tracemalloc",
        "test": "doctest bdb",
    },
}


class Docstring(NamedTuple):
    """One text, where it stands, and what it is an example of."""

    topic: str
    split: str
    module: str
    name: str
    text: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.module}|{self.name}|{self.text}".encode()).hexdigest()[:12]


def listed() -> list[Docstring]:
    """The texts of the task that this Python has, in the order of modules and lines.

    Raises:
        RuntimeError: half of them or more are missing, as where the standard library comes without source files.
    """
    keys = set(LIST.read_text(encoding="utf-8").split())
    docstrings = list({docstring.key: docstring for docstring in collect() if docstring.key in keys}.values())
    if len(docstrings) <= len(keys) / 2:
        raise RuntimeError(
            f"docstrings are read from the source files in {sysconfig.get_path('stdlib')}, where {len(docstrings)} of "
            f"{len(keys)} were found. Use a Python from 3.11 to 3.13 that has its standard library as .py files."
        )
    return docstrings


def collect() -> Iterator[Docstring]:
    """Every text of the modules in `TOPICS`, copies included."""
    for topic, splits in TOPICS.items():
        for split, modules in splits.items():
            for module, tree in _trees(modules.split()):
                for name, text in _texts(tree):
                    yield Docstring(topic, split, module, name, text)


def _trees(modules: Iterable[str]) -> Iterator[tuple[str, ast.Module]]:
    library = Path(sysconfig.get_path("stdlib"))
    for module in modules:
        path = library.joinpath(*module.split("."))
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            parts = file.relative_to(library).with_suffix("").parts
            if file.is_file() and not {"test", "tests"} & set(parts):
                yield ".".join(parts).removesuffix(".__init__"), ast.parse(file.read_bytes())


def _texts(node: ast.AST, path: str = "") -> Iterator[tuple[str, str]]:
    """Qualified name and first paragraph of everything below `node` that has a docstring."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
            if len(text.split()) >= 4:
                yield path + child.name, text
            yield from _texts(child, f"{path}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _texts(child, path)


def choose(versions: list[set[Docstring]]) -> list[Docstring]:
    """The texts of the task: in all `versions`, once each, none in two topics, none nearly the same in train and test."""
    common = sorted(set.intersection(*versions))
    topics = defaultdict(set)
    for docstring in common:
        topics[docstring.text.lower()].add(docstring.topic)
    once = {d.text.lower(): d for d in reversed(common) if len(topics[d.text.lower()]) == 1}.values()
    rows = sorted(once)
    random.Random(0).shuffle(rows)
    taken, kept = Counter(), []
    for docstring in rows:
        place = docstring.split, docstring.topic
        if taken[place] < BALANCED.get(docstring.split, len(rows)):
            taken[place] += 1
            kept.append(docstring)
    held_out = [_words(d) for d in kept if d.split != "train"]
    return [d for d in kept if d.split != "train" or all(_overlap(_words(d), words) < ALIKE for words in held_out)]


def _words(docstring: Docstring) -> frozenset[str]:
    return frozenset(docstring.text.lower().strip(".").split())


def _overlap(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)


def main(pythons: list[str]) -> None:
    """Write `docstrings.txt` from what the given Pythons have in common, or print what this one has."""
    if not pythons:
        print(json.dumps([list(docstring) for docstring in collect()]))
        return
    versions = []
    for python in pythons:
        done = subprocess.run([python, "-W", "ignore", __file__], check=True, capture_output=True, text=True)
        versions.append({Docstring(*fields) for fields in json.loads(done.stdout)})
    LIST.write_text("\n".join(sorted(d.key for d in choose(versions))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
