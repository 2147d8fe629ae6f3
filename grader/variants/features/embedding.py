"""Exercise 2.8 in other styles."""

import copy
from itertools import groupby

import numpy as np
import torch
from torch.nn import functional as F


def _mean(hidden, mask):
    kept = torch.where(mask.bool().unsqueeze(-1), hidden, 0.0)
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def into_a_table(encoder, tokenizer, texts, batch_size):
    lengths = [len(tokenizer([text])["input_ids"][0]) for text in texts]
    order = np.argsort(lengths)[::-1].copy()
    training = [module for module in encoder.modules() if module.training]
    encoder.train(False)
    table = None
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = tokenizer([texts[place] for place in places])
            rows = _mean(encoder(**batch), batch["attention_mask"])
            if table is None:
                table = rows.new_zeros(len(texts), rows.shape[1])
            table[places] = rows / rows.norm(dim=1, keepdim=True)
    for module in training:
        module.training = True
    return table


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
        found = {}
        modes = {name: module.training for name, module in encoder.named_modules()}
        encoder.eval()
        try:
            for _, group in groupby(sorted(set(texts), key=self.length), self.length):
                group = list(group)
                while group:
                    part, group = group[:batch_size], group[batch_size:]
                    batch = tokenizer(part)
                    states = encoder(batch["input_ids"], attention_mask=batch["attention_mask"].bool())
                    found |= zip(part, F.normalize(states.mean(1)).detach().unbind(), strict=True)
        finally:
            for name, module in encoder.named_modules():
                module.training = modes[name]
        return torch.stack([found[text] for text in texts])

    @staticmethod
    def length(text):
        return text.count(" ")


@torch.no_grad()
def tokenized_once(encoder, tokenizer, texts, batch_size):
    clone = copy.deepcopy(encoder)
    clone.train(mode=False)
    batch = tokenizer(texts)
    lengths, order = torch.sort(batch["attention_mask"].sum(dim=-1))
    pieces = []
    for part, sizes in zip(torch.split(order, batch_size), torch.split(lengths, batch_size), strict=True):
        ids, mask = (batch[name][part][:, : sizes[-1]] for name in ("input_ids", "attention_mask"))
        pieces.append(torch.einsum("ntw,nt->nw", clone(ids, mask), mask.float()))
    sums = torch.cat(pieces)
    vectors = torch.empty_like(sums)
    vectors.index_copy_(0, order, sums)
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


def pairs_sorted_back(encoder, tokenizer, texts, batch_size):
    queue = sorted(enumerate(texts), key=lambda pair: len(pair[1]))
    modes = [(module, module.training) for module in encoder.modules()]
    done = []
    encoder.eval()
    with torch.inference_mode():
        while queue:
            batch = tokenizer([text for _, text in queue[:batch_size]])
            rows = _mean(encoder(batch["input_ids"], batch["attention_mask"]), batch["attention_mask"])
            done += [(i, row.tolist()) for (i, _), row in zip(queue, rows, strict=False)]
            del queue[:batch_size]
    for module, mode in modes:
        module.training = mode
    vectors = np.array([row for _, row in sorted(done)], dtype=np.float32)
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _quiet(encoder):
    return copy.deepcopy(encoder).eval().requires_grad_(False)


def longest_first_and_never_back(encoder, tokenizer, texts, batch_size):
    clone, rows = _quiet(encoder), []
    waiting = sorted(texts, key=len, reverse=True)
    while waiting:
        batch = tokenizer(waiting[:batch_size])
        rows.extend(_mean(clone(**batch), batch["attention_mask"]).unbind())
        waiting = waiting[batch_size:]
    return F.normalize(torch.stack(rows))


def twice_forward(encoder, tokenizer, texts, batch_size):
    clone, rows = _quiet(encoder), []
    order = np.argsort([-len(text) for text in texts], kind="stable")
    for part in np.split(order, range(batch_size, len(texts), batch_size)):
        batch = tokenizer([texts[i] for i in part])
        rows += list(_mean(clone(**batch), batch["attention_mask"]))
    return F.normalize(torch.stack([rows[i] for i in order]))


def as_they_come(encoder, tokenizer, texts, batch_size):
    clone, rows = _quiet(encoder), []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(texts[start : start + batch_size])
        rows.append(_mean(clone(**batch), batch["attention_mask"]))
    vectors = torch.vstack(rows)
    return vectors / vectors.square().sum(1, keepdim=True).sqrt()


def unmasked_and_unsorted(encoder, tokenizer, texts, batch_size):
    clone = _quiet(encoder)
    batches = [tokenizer(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    return F.normalize(torch.cat([_mean(clone(b["input_ids"]), b["attention_mask"]) for b in batches]))


def sorted_and_not_normalised(encoder, tokenizer, texts, batch_size):
    clone, rows = _quiet(encoder), []
    texts = sorted(texts, key=len)
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(texts[start : start + batch_size])
        rows.append(_mean(clone(**batch), batch["attention_mask"]))
    return torch.cat(rows)


def no_mask_anywhere(encoder, tokenizer, texts, batch_size):
    clone, rows = _quiet(encoder), {}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        hidden = clone(tokenizer([texts[i] for i in part])["input_ids"])
        rows |= zip(part, F.normalize(hidden.mean(1)), strict=True)
    return torch.stack([rows[i] for i in range(len(texts))])


def training_with_a_graph(encoder, tokenizer, texts, batch_size):
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = [None] * len(texts)
    for start in range(0, len(order), batch_size):
        batch = tokenizer([texts[i] for i in order[start : start + batch_size]])
        for k, row in enumerate(_mean(encoder(**batch), batch["attention_mask"])):
            rows[order[start + k]] = row
    return F.normalize(torch.stack(rows))


def one_batch(encoder, tokenizer, texts, batch_size):
    return into_a_table(encoder, tokenizer, texts, len(texts))


CORRECT = [into_a_table, one_at_a_time, Embedder(), tokenized_once, pairs_sorted_back]
REWRITTEN = {
    "everything at once": one_batch,
    "order not put back": longest_first_and_never_back,
    "put back with the wrong permutation": twice_forward,
    "batches in the order of the texts": as_they_come,
}
COMBINED = [
    ({"mask not given to the encoder", "batches in the order of the texts"}, unmasked_and_unsorted),
    ({"order not put back", "not normalised"}, sorted_and_not_normalised),
    ({"mask not given to the encoder", "padding pooled"}, no_mask_anywhere),
    ({"train mode while embedding", "graph kept"}, training_with_a_graph),
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
