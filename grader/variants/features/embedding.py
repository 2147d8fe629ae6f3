"""Exercise 2.8 in other styles."""

import copy
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch.nn import functional as F

from grader.checks.features.embedding import CHANGES, embedded
from grader.checks.traces import kept


def one_at_a_time(encoder, tokenizer, texts, batch_size):
    clone = copy.deepcopy(encoder).eval()
    vectors = []
    for text in texts:
        batch = tokenizer([text])
        vector = clone(batch["input_ids"], batch["attention_mask"]).detach()[0].mean(dim=0)
        vectors.append(vector.div(vector.pow(2).sum().sqrt()))
    return torch.stack(vectors)


class Embedder:
    """A class with `__call__`; texts of equal length share a batch, so there is no padding, and equal texts are one."""

    def __call__(self, encoder, tokenizer, texts, batch_size):
        vectors = {}
        with kept(encoder, "modes"):
            encoder.eval()
            for _, group in groupby(sorted(set(texts), key=self.length), self.length):
                group = list(group)
                while group:
                    part, group = group[:batch_size], group[batch_size:]
                    batch = tokenizer(part)
                    states = encoder(batch["input_ids"], attention_mask=batch["attention_mask"].bool())
                    vectors |= zip(part, F.normalize(states.mean(1)).detach().unbind(), strict=True)
        return torch.stack([vectors[text] for text in texts])

    @staticmethod
    def length(text):
        return text.count(" ")


@torch.no_grad()
def tokenized_once(encoder, tokenizer, texts, batch_size, trim=True):
    clone = copy.deepcopy(encoder)
    clone.train(mode=False)
    batch = tokenizer(texts)
    lengths, order = torch.sort(batch["attention_mask"].sum(dim=-1))
    pieces = []
    for part, sizes in zip(torch.split(order, batch_size), torch.split(lengths, batch_size), strict=True):
        ids, mask = (batch[name][part][:, : sizes[-1] if trim else None] for name in ("input_ids", "attention_mask"))
        pieces.append(torch.einsum("ntw,nt->nw", clone(ids, mask), mask.float()))
    sums = torch.cat(pieces)
    vectors = torch.empty_like(sums)
    vectors.index_copy_(0, order, sums)
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


def pairs_sorted_back(encoder, tokenizer, texts, batch_size, put_back=sorted):
    queue = sorted(enumerate(texts), key=lambda pair: len(pair[1]))
    modes = [(module, module.training) for module in encoder.modules()]
    done = []
    encoder.eval()
    with torch.inference_mode():
        while queue:
            batch = tokenizer([text for _, text in queue[:batch_size]])
            hidden, mask = encoder(batch["input_ids"], batch["attention_mask"]), batch["attention_mask"].bool()
            rows = torch.stack([states[own].mean(0) for states, own in zip(hidden, mask, strict=True)])
            done += [(i, row.tolist()) for (i, _), row in zip(queue, rows, strict=False)]
            del queue[:batch_size]
    for module, mode in modes:
        module.training = mode
    vectors = np.array([row for _, row in put_back(done)], dtype=np.float32)
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


CORRECT = [one_at_a_time, Embedder(), tokenized_once, pairs_sorted_back]
REWRITTEN = {
    "order not put back": partial(pairs_sorted_back, put_back=list),
    "padded to the longest of all": partial(tokenized_once, trim=False),
}
BROKEN = {}
COMBINED = [
    ({first, second}, partial(embedded, **CHANGES[first], **CHANGES[second]))
    for first, second in (
        ("mask not given to the encoder", "batches in the order of the texts"),
        ("order not put back", "not normalised"),
    )
]

EQUIVALENT = {
    "lengths = tokenizer(texts)['attention_mask'].sum(dim=1) -> "
    "lengths = tokenizer(texts)['attention_mask'].sum(dim=-1)": "of two axes, the last is the second",
    "try: ⏎ with torch.no_grad(): ⏎ for part in … batch['attention_mask'])) ⏎ finally: -> "
    "with torch.no_grad(): ⏎ for part in … batch['attention_mask']))": "an encoder that raises is out of scope",
    "batch = {name: rows.to(device) for name, rows in tokenizer([texts[i] … -> "
    "batch = {name: rows for name, rows in tokenizer([texts[i] …": "works on the CPU only, which costs no points",
    "vectors = torch.empty_like(rows) -> vectors = rows": "the right side is computed before anything is written",
    "vectors[order] = F.normalize(rows, dim=1) -> vectors[order] = F.normalize(rows)": "1 is the default",
    "vectors[order] = F.normalize(rows, dim=1) -> "
    "vectors[order] = F.normalize(rows, dim=-1)": "of two axes, the last is the second",
}
