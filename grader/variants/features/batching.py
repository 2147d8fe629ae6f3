"""Exercise 2.8a in other styles."""

from functools import partial

import numpy as np
import torch

from grader.checks.features.batching import solution


def with_sorted(lengths, batch_size):
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i].item())
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    back = [0] * len(order)
    for place, index in enumerate(order):
        back[index] = place
    return batches, back


def in_numpy(lengths, batch_size):
    order = np.argsort(lengths.numpy(), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    cuts = range(batch_size, len(order), batch_size)
    return [torch.from_numpy(part) for part in np.split(order, cuts)], torch.from_numpy(place)


class Packed:
    """Batches of nearly equal sizes, the longest texts first; the way back is looked up."""

    def __call__(self, lengths, batch_size):
        parts = -(-len(lengths) // batch_size)
        batches = torch.tensor_split(lengths.argsort(descending=True), parts)
        where = {index: place for place, index in enumerate(torch.cat(batches).tolist())}
        return batches, torch.tensor([where[index] for index in range(len(lengths))])


def by_a_queue(lengths, batch_size):
    queue = [(length, index) for index, length in enumerate(lengths.tolist())]
    queue.sort()
    batches, place = [], {}
    while queue:
        part, queue = queue[:batch_size], queue[batch_size:]
        batches.insert(len(batches) // 2, [index for _, index in part])  # the batches themselves may come in any order
    for part in batches:
        for index in part:
            place[index] = len(place)
    return tuple(map(torch.tensor, batches)), torch.tensor([place[index] for index in sorted(place)])


def scattered_with_its_own_order(lengths, batch_size):
    order = torch.sort(lengths)[1]
    back = torch.zeros_like(order).scatter_(0, torch.arange(len(order)), order)
    return torch.split(order, batch_size), back


def as_they_came(lengths, batch_size):
    everything = list(range(len(lengths)))
    return [everything[k : k + batch_size] for k in everything[::batch_size]], everything


def argsort_once_too_often(lengths, batch_size):
    order = np.argsort(np.argsort(lengths.tolist()))
    return np.split(order, range(batch_size, len(order), batch_size)), np.argsort(order)


def filled_up(lengths, batch_size):
    order = lengths.argsort()
    missing = -len(order) % batch_size
    copies = order[-1:].repeat(missing)
    return list(torch.cat([order, copies]).split(batch_size)), order.argsort()


def one_text_for_each_length(lengths, batch_size):
    index_of = {length: index for index, length in enumerate(lengths.tolist())}
    order = torch.tensor([index_of[length] for length in sorted(index_of)])
    return solution(order, batch_size, order=lambda indices: indices)


def without_the_last(lengths, batch_size):
    order = lengths.argsort()
    return [order[k : k + batch_size] for k in range(0, len(order) - 1, batch_size)], order.argsort()


def last_one_taken_along(lengths, batch_size):
    batches, back = solution(lengths, batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1 < batch_size:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches, back


def sorted_in_windows(lengths, batch_size, most=4):
    starts = range(0, len(lengths), most * batch_size)
    order = torch.cat([start + lengths[start : start + most * batch_size].argsort() for start in starts])
    return list(order.split(batch_size)), order.argsort()


def in_eight_bits(lengths, batch_size):
    return solution(lengths.to(torch.uint8), batch_size)


def one_too_many(lengths, batch_size):
    return solution(lengths, batch_size + 1)


def one_length_a_batch(lengths, batch_size):
    order = lengths.argsort()
    runs = torch.unique_consecutive(lengths[order], return_counts=True)[1].tolist()
    return [piece for run in order.split(runs) for piece in run.split(batch_size)], order.argsort()


def an_empty_one_at_the_end(lengths, batch_size):
    order = lengths.argsort()
    return [order[k * batch_size : (k + 1) * batch_size] for k in range(len(order) // batch_size + 1)], order.argsort()


def all_in_one(lengths, batch_size):
    order = lengths.argsort()
    return [order], order.argsort()


def dealt_out(lengths, batch_size):
    order, parts = lengths.argsort(), -(-len(lengths) // batch_size)
    batches = [order[k::parts] for k in range(parts)]
    return batches, torch.cat(batches).argsort()


def as_strings(lengths, batch_size):
    order = torch.tensor(sorted(range(len(lengths)), key=lambda i: str(int(lengths[i]))))
    return solution(order, batch_size, order=lambda indices: indices)


def turned_round(lengths, batch_size):
    return solution(lengths, batch_size, back=lambda order: order.flip(0))


def back_to_the_lengths(lengths, batch_size):
    return solution(lengths, batch_size, back=lambda order: order.argsort(descending=True))


CORRECT = [with_sorted, in_numpy, Packed(), by_a_queue]
REWRITTEN = {
    "put back with the wrong permutation": scattered_with_its_own_order,
    "batches in the order of the texts": as_they_came,
    "ranks in place of indices": argsort_once_too_often,
    "one text of each length": one_text_for_each_length,
}
BROKEN = {
    1: [filled_up, one_text_for_each_length, without_the_last],
    2: [one_too_many, one_length_a_batch, an_empty_one_at_the_end, all_in_one, last_one_taken_along],
    3: [dealt_out, as_strings, as_they_came, sorted_in_windows, partial(sorted_in_windows, most=50), in_eight_bits],
    4: [turned_round, back_to_the_lengths, scattered_with_its_own_order],
}
COMBINED = [
    (
        {"put back with the wrong permutation", "batch_size as a number of batches"},
        lambda lengths, batch_size: solution(lengths, batch_size, cut=torch.chunk, back=lambda order: order),
    ),
    (
        {"order not put back", "last batch dropped"},
        lambda lengths, batch_size: (solution(lengths, batch_size)[0][:-1], torch.arange(len(lengths))),
    ),
]
EQUIVALENT = {
    "return (list(order.split(batch_size)), order.argsort()) -> "
    "return (order.split(batch_size), order.argsort())": "the statement says that a tuple will do",
}
