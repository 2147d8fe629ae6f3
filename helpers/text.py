"""Texts to vectors: tokens with a mask, means that leave padding out, embeddings that depend on their own text alone.

    tokens     "padding" -> [CLS] pad ##ding [SEP]
    batch      every text filled up with [PAD] to the longest; attention_mask is 1 on tokens and 0 on padding
    pooling    sum over tokens of mask * hidden / sum of mask
    embedding  pooled / |pooled|

The encoder between batch and pooling looks at the tokens that the mask leaves it.

Sources: Wu et al. 2016, section 4.1, and Devlin et al. 2018, for word pieces; Reimers & Gurevych 2019 for the pooling.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import expect
from helpers.modes import eval_mode


def tokenize(vocabulary: Mapping[str, int], texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Cut texts into word pieces, and make one batch of them.

    A text is put in lower case and split at white space; each word becomes the longest piece of the vocabulary that it
    begins with, then the longest that the rest begins with, and so on. Pieces after a word's first are looked up with
    `##` before them. A word that cannot be made up of pieces becomes one [UNK]. [CLS] comes first and [SEP] last.

    Args:
        vocabulary: piece -> number, with [PAD], [UNK], [CLS] and [SEP] among the pieces.
        texts: n texts, n >= 1.
        max_length: a longer text loses tokens at its end, but never its [SEP]; at least 2.

    Returns:
        {"input_ids", "attention_mask"}, each (n, tokens) of int64; `tokens` is the length of the longest text.
    """
    _check_texts(texts)
    expect.whole_number("max_length", max_length, least=2, advice="[CLS] and [SEP] need two places.")
    rows = []
    for text in texts:
        pieces = [piece for word in text.lower().split() for piece in _pieces(vocabulary, word)]
        rows.append(["[CLS]", *pieces[: max_length - 2], "[SEP]"])
    longest = max(map(len, rows))
    ids = [[vocabulary[piece] for piece in row + ["[PAD]"] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _pieces(vocabulary: Mapping[str, int], word: str) -> list[str]:
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary)
        end = next(ends, None)
        if end is None:
            return ["[UNK]"]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of a text's hidden states over its own tokens.

    Args:
        hidden: (n, tokens, width). What stands at padding does not matter, be it infinite or NaN.
        attention_mask: (n, tokens), 1 or True on tokens and 0 or False on padding.

    Returns:
        (n, width) in the dtype of `hidden`; zeros for a text without tokens.
    """
    n, tokens, _ = expect.tensor("hidden", hidden, ("n", "tokens", "width")).shape
    mask = expect.tensor("attention_mask", attention_mask, (n, tokens)).bool()
    total = hidden.masked_fill(~mask[..., None], 0).sum(1)  # not hidden * mask: NaN * 0 is NaN
    return total / mask.sum(1, keepdim=True).clamp_min(1)


def batches_by_length(lengths: Tensor, batch_size: int) -> tuple[list[Tensor], Tensor]:
    """Batches in which texts of like length meet, and the way back.

        rows = torch.cat([rows_of(part) for part in batches])[back]          row i is that of text i again

    Args:
        lengths: (n,), how long each text is, n >= 1.
        batch_size: at most that many texts share a batch.

    Returns:
        batches: tensors of indices from 0 to n - 1, each index in one of them; as few as there can be, from short to long.
        back: (n,), where the row of each text stands among the batches' rows one after the other.
    """
    expect.whole_number("batch_size", batch_size, advice="64 suits a CPU.")
    order = expect.tensor("lengths", lengths, ("n",)).argsort(stable=True)
    return list(order.split(batch_size)), order.argsort()


def embed(
    encoder: nn.Module,
    tokenizer: Callable[[list[str]], Mapping[str, Tensor]],
    texts: Sequence[str],
    batch_size: int = 64,
) -> Tensor:
    """Unit vectors for texts, each depending on its own text alone; texts of like length share a batch.

    The encoder is left bit-identical, as by `helpers.features.extract`.

    Args:
        encoder: called as `encoder(input_ids, attention_mask)`, gives hidden states (n, tokens, width).
        tokenizer: texts -> {"input_ids", "attention_mask"}, each (n, tokens), padded at the end, on any device.
        texts: n texts, n >= 1.
        batch_size: at most that many texts are in the encoder at once.

    Returns:
        (n, width), in the order of the texts, each row of length 1, on the CPU, without a graph.

    Raises:
        ValueError: no texts, or a tokenizer that pads at the beginning.
    """
    expect.module("encoder", encoder)
    _check_texts(texts)
    batch = tokenizer(list(texts))
    if (batch["attention_mask"].diff(dim=1) > 0).any():
        raise ValueError('padding must be at the end, got tokens after it. Set tokenizer.padding_side = "right".')
    device = next((tensor.device for tensor in (*encoder.parameters(), *encoder.buffers())), torch.device("cpu"))
    lengths = batch["attention_mask"].sum(1).cpu()
    batches, back = batches_by_length(lengths, batch_size)
    rows = []
    with eval_mode(encoder), torch.no_grad():
        for part in batches:
            longest = int(lengths[part].max())
            ids, mask = (batch[name][part, :longest].to(device) for name in ("input_ids", "attention_mask"))
            rows.append(mean_pool(encoder(ids, mask), mask).cpu())
    return F.normalize(torch.cat(rows)[back], dim=1)


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or len(texts) == 0:
        raise ValueError(f"texts must be a list of at least 1 text, got {expect.describe(texts)}. Put one text in brackets.")
