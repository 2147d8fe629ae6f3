"""Exercise 2.8 in other styles."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch.nn import functional as F

from grader.checks.features.embedding import CHANGES, embedded
from grader.checks.traces import kept
from helpers.modes import eval_mode
from helpers.text import mean_pool


def one_at_a_time(encoder, tokenizer, texts, batch_size, begin=0):
    clone = copy.deepcopy(encoder).eval()
    vectors = []
    for text in texts:
        batch = tokenizer([text])
        vector = clone(batch["input_ids"], batch["attention_mask"]).detach()[0, begin:].mean(dim=0)
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


class HandedIn:
    """A copy of the encoder that a hook makes pool; one thread of a pool tokenizes each batch."""

    def __call__(self, encoder, tokenizer, texts, batch_size):
        pooled = {}

        def keep(module, inputs, states):
            mask = inputs[1]
            pooled.setdefault("rows", []).append((states * mask[..., None].to(states)).sum(1))

        clone = copy.deepcopy(encoder).requires_grad_(False)
        handle = clone.eval().register_forward_hook(keep)
        order = sorted(range(len(texts)), key=lambda i: tokenizer([texts[i]])["input_ids"].shape[1], reverse=True)
        with ThreadPoolExecutor(1) as pool:
            parts = [[texts[i] for i in order[k : k + batch_size]] for k in range(0, len(order), batch_size)]
            for batch in pool.map(tokenizer, parts):
                clone(batch["input_ids"], batch["attention_mask"])
        handle.remove()
        rows = dict(zip(order, torch.cat(pooled["rows"]), strict=True))
        return torch.stack([rows[i] / rows[i].norm() for i in range(len(texts))])


def last_token(encoder, tokenizer, texts, batch_size):
    def mean(encoder, ids, mask):
        return encoder(ids, mask)[torch.arange(len(ids)), mask.sum(1) - 1]

    return embedded(encoder, tokenizer, texts, batch_size, mean=mean)


def rows_of_sorted_texts(encoder, tokenizer, texts, batch_size):
    return embedded(encoder, tokenizer, sorted(texts), batch_size)


def equal_texts_once(encoder, tokenizer, texts, batch_size):
    different = list(dict.fromkeys(texts))
    rows = embedded(encoder, tokenizer, different, batch_size)
    return rows[[min(i, len(different) - 1) for i in range(len(texts))]]


def columns_scaled_by_the_largest(encoder, tokenizer, texts, batch_size):
    return embedded(encoder, tokenizer, texts, batch_size, scale=lambda rows: rows / rows.amax(1, keepdim=True))


def sums_to_one(encoder, tokenizer, texts, batch_size):
    return embedded(encoder, tokenizer, texts, batch_size, scale=partial(F.normalize, p=1.0))


def never_longer_than_one(encoder, tokenizer, texts, batch_size):
    def scale(rows):
        return rows / rows.norm(dim=1, keepdim=True).clamp(min=1)

    return embedded(encoder, tokenizer, texts, batch_size, scale=scale)


def every_place_seen(encoder, tokenizer, texts, batch_size):
    def mean(encoder, ids, mask):
        return mean_pool(encoder(ids, torch.ones_like(mask)), mask)

    return embedded(encoder, tokenizer, texts, batch_size, mean=mean)


def dropout_with_a_seed(encoder, tokenizer, texts, batch_size):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return embedded(encoder, tokenizer, texts, batch_size, inside=lambda encoder: nullcontext())


def layers_of_dropout_alone(encoder, tokenizer, texts, batch_size):
    layers = [module for module in encoder.modules() if isinstance(module, torch.nn.Dropout) and module.training]
    with torch.no_grad():
        for module in layers:
            module.eval()
        rows = embedded(encoder, tokenizer, texts, batch_size, inside=lambda encoder: nullcontext())
        for module in layers:
            module.train()
    return rows


def mask_of_what_is_not_0(encoder, tokenizer, texts, batch_size):
    def mean(encoder, ids, mask):
        return mean_pool(encoder(ids, mask), (ids != 0).long())

    return embedded(encoder, tokenizer, texts, batch_size, mean=mean)


def first_64_tokens(encoder, tokenizer, texts, batch_size):
    def mean(encoder, ids, mask):
        return mean_pool(encoder(ids[:, :64], mask[:, :64]), mask[:, :64])

    return embedded(encoder, tokenizer, texts, batch_size, mean=mean)


def all_but_the_last(encoder, tokenizer, texts, batch_size):
    def mean(encoder, ids, mask):
        return mean_pool(encoder(ids, mask), (mask.cumsum(1) < mask.sum(1, keepdim=True)).long() * mask)

    return embedded(encoder, tokenizer, texts, batch_size, mean=mean)


def at_least_eight(encoder, tokenizer, texts, batch_size):
    return embedded(encoder, tokenizer, texts, max(batch_size, 8))


def one_more(encoder, tokenizer, texts, batch_size):
    return embedded(encoder, tokenizer, texts, batch_size + 1)


def sorted_within_each_batch(encoder, tokenizer, texts, batch_size):
    def order(texts):
        starts = range(0, len(texts), batch_size)
        return [
            i for start in starts for i in sorted(range(len(texts))[start : start + batch_size], key=lambda i: len(texts[i]))
        ]

    return embedded(encoder, tokenizer, texts, batch_size, order=order)


def shortest_and_longest_by_turns(encoder, tokenizer, texts, batch_size):
    def order(texts):
        rising = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        pairs = zip(rising, rising[::-1], strict=True)
        return list(dict.fromkeys(i for pair in pairs for i in pair))

    return embedded(encoder, tokenizer, texts, batch_size, order=order)


def leaves_that_require_gradients(encoder, tokenizer, texts, batch_size):
    return embedded(encoder, tokenizer, texts, batch_size).requires_grad_()


def only_the_children(encoder, tokenizer, texts, batch_size):
    mode = encoder.training
    encoder.eval()
    rows = embedded(encoder, tokenizer, texts, batch_size)
    for module in encoder.modules():
        module.training = mode
    return rows


def hook_left_behind(encoder, tokenizer, texts, batch_size):
    encoder.register_forward_hook(lambda module, args, states: None)
    return embedded(encoder, tokenizer, texts, batch_size)


def dropout_of_zero(encoder, tokenizer, texts, batch_size):
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return embedded(encoder, tokenizer, texts, batch_size)


CORRECT = [one_at_a_time, Embedder(), tokenized_once, pairs_sorted_back, HandedIn()]
REWRITTEN = {
    "order not put back": partial(pairs_sorted_back, put_back=list),
    "padded to the longest of all": partial(tokenized_once, trim=False),
    "first token left out": partial(one_at_a_time, begin=1),
}
BROKEN = {
    1: [last_token, rows_of_sorted_texts, equal_texts_once, mask_of_what_is_not_0, first_64_tokens, all_but_the_last],
    2: [columns_scaled_by_the_largest, sums_to_one, never_longer_than_one],
    3: [every_place_seen, dropout_with_a_seed, layers_of_dropout_alone],
    4: [at_least_eight, one_more],
    5: [sorted_within_each_batch, shortest_and_longest_by_turns],
    6: [leaves_that_require_gradients, partial(embedded, inside=eval_mode), torch.inference_mode()(embedded)],
    7: [only_the_children, dropout_of_zero, hook_left_behind],
}
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
    "ids, mask = (batch[name].to(device) for name in ('input_ids', … -> "
    "ids, mask = (batch[name] for name in ('input_ids', …": "works on the CPU only, which costs no points",
    "return F.normalize(torch.cat(rows)[back], dim=1) -> return F.normalize(torch.cat(rows)[back])": "1 is the default",
    "return F.normalize(torch.cat(rows)[back], dim=1) -> "
    "return F.normalize(torch.cat(rows)[back], dim=-1)": "of two axes, the last is the second",
}
