import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.backbones import text_backbone
from helpers.data import docstrings
from helpers.text import batches_by_length, embed, mean_pool, tokenize

pytestmark = pytest.mark.usefixtures("device")  # see conftest.py

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "pad", "##ding", "##d", "a", "batch", "##es", "##ing")
VOCABULARY = {piece: 7 * n % 11 for n, piece in enumerate(PIECES)}


def pieces(ids):
    return [{number: piece for piece, number in VOCABULARY.items()}[number] for number in ids.tolist()]


@pytest.fixture(scope="module")
def loaded():
    return text_backbone(max_length=32).eval()


@pytest.fixture
def minilm(loaded, device):
    return copy.deepcopy(loaded).to("cpu" if device == "cpu" else "cuda")


# --- tokenize -----------------------------------------------------------------------------------------------------


def test_longest_piece_first_and_one_unknown_for_a_whole_word():
    ids = tokenize(VOCABULARY, ["Padding a batches padzz"], 20)["input_ids"][0]
    assert pieces(ids) == ["[CLS]", "pad", "##ding", "a", "batch", "##es", "[UNK]", "[SEP]"]


def test_a_batch_is_padded_to_its_longest_text_and_cut_before_the_last_token():
    batch = tokenize(VOCABULARY, ["a", "a a a a a a", ""], 5)
    assert [pieces(row) for row in batch["input_ids"]] == [
        ["[CLS]", "a", "[SEP]", "[PAD]", "[PAD]"],
        ["[CLS]", "a", "a", "a", "[SEP]"],
        ["[CLS]", "[SEP]", "[PAD]", "[PAD]", "[PAD]"],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.cpu(reason="tokens are made on the CPU")
def test_tokens_are_those_of_the_real_tokenizer(minilm):
    texts = [text for text in docstrings("test").inputs if text.isascii() and text.rstrip(".").replace(" ", "").isalnum()]
    assert len(texts) > 80
    texts = [text.rstrip(".").strip() for text in texts]
    ours, real = tokenize(minilm.tokenizer.get_vocab(), texts, 32), minilm.preprocess(texts)
    assert all(torch.equal(ours[name], real[name]) for name in real)


# --- mean_pool ----------------------------------------------------------------------------------------------------


def test_the_mean_leaves_out_padding_whatever_stands_there():
    hidden, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0]])
    wanted = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0), hidden[2, [0, 2]].mean(0)])
    hidden[0, 2:], hidden[2, 3] = torch.nan, torch.inf
    torch.testing.assert_close(mean_pool(hidden, mask), wanted)
    torch.testing.assert_close(mean_pool(hidden, mask.bool()), wanted)


def test_a_text_without_tokens_gives_zeros():
    assert mean_pool(torch.randn(1, 3, 2), torch.zeros(1, 3)).tolist() == [[0, 0]]


# --- batches_by_length --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 4), (7, 3), (6, 3), (5, 1), (20, 64)])
def test_batches_by_length_hold_each_index_once_and_lead_back(n, batch_size):
    lengths = torch.randint(2, 9, (n,))
    batches, back = batches_by_length(lengths, batch_size)
    together = torch.cat(batches)
    assert sorted(together.tolist()) == list(range(n)) and together[back].tolist() == list(range(n))
    assert [len(part) for part in batches] == [min(batch_size, n - start) for start in range(0, n, batch_size)]
    assert lengths[together].tolist() == sorted(lengths.tolist())


def test_the_way_back_is_not_the_order():
    batches, back = batches_by_length(torch.tensor([5, 2, 9, 4]), 3)
    assert [part.tolist() for part in batches] == [[1, 3, 0], [2]] and back.tolist() == [2, 0, 3, 1]


# --- embed --------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.shapes = inner, []

    def forward(self, input_ids, attention_mask):
        self.shapes.append(tuple(input_ids.shape))
        return self.inner(input_ids, attention_mask)


def test_embeddings_depend_on_their_own_text_alone(minilm):
    texts = docstrings("test").inputs[:20]
    together = embed(minilm.encoder, minilm.preprocess, texts, 8)
    alone = torch.cat([embed(minilm.encoder, minilm.preprocess, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(20, device="cpu"))
    torch.testing.assert_close(embed(minilm.encoder, minilm.preprocess, texts[::-1], 7).flip(0), together, rtol=0, atol=2e-6)


def test_embeddings_are_the_backbones_features_at_unit_length(minilm):
    texts = docstrings("test").inputs[:10]
    with torch.no_grad():
        wanted = F.normalize(minilm(texts), dim=1).cpu()
    torch.testing.assert_close(embed(minilm.encoder, minilm.preprocess, texts), wanted, rtol=0, atol=2e-6)


def test_texts_of_like_length_share_a_batch(minilm):
    counting, texts = Counting(minilm.encoder), docstrings("test").inputs[:60]
    embed(counting, minilm.preprocess, texts, 10)
    lengths = sorted(minilm.preprocess(texts)["attention_mask"].sum(1).tolist())
    assert [shape[0] for shape in counting.shapes] == [10] * 6
    assert [shape[1] for shape in counting.shapes] == lengths[9::10]


def test_embedding_leaves_the_encoder_as_it_was(minilm):
    minilm.encoder.train()
    minilm.encoder.model.embeddings.eval()
    before = [module.training for module in minilm.encoder.modules()]
    first = embed(minilm.encoder, minilm.preprocess, ["dropout is off"])
    assert torch.equal(first, embed(minilm.encoder, minilm.preprocess, ["dropout is off"])) and not first.requires_grad
    assert [module.training for module in minilm.encoder.modules()] == before
    minilm.eval()


def left(texts):
    return {"input_ids": torch.tensor([[0, 5], [6, 7]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: tokenize(VOCABULARY, ["a"], 1),
            ValueError,
            "max_length must be a whole number of at least 2, got 1. [CLS] and [SEP] need two places.",
        ),
        (
            lambda: mean_pool(torch.zeros(2, 3, 4), torch.ones(2, 4)),
            ValueError,
            "attention_mask must have shape (2, 3), got (2, 4).",
        ),
        (
            lambda: mean_pool(torch.zeros(2, 3), torch.ones(2, 3)),
            ValueError,
            "hidden must have shape (n, tokens, width), got (2, 3).",
        ),
        (
            lambda: tokenize(VOCABULARY, "one text", 5),
            ValueError,
            "texts must be a list of at least 1 text, got 'one text'. Put one text in brackets.",
        ),
        (
            lambda: embed(nn.Identity(), left, ["a", "b c"]),
            ValueError,
            'padding must be at the end, got tokens after it. Set tokenizer.padding_side = "right".',
        ),
        (
            lambda: batches_by_length(torch.ones(1, 2), 4),
            ValueError,
            "lengths must have shape (n,), got (1, 2).",
        ),
        (
            lambda: embed(nn.Identity(), list, "one text"),
            ValueError,
            "texts must be a list of at least 1 text, got 'one text'. Put one text in brackets.",
        ),
        (
            lambda: batches_by_length(torch.ones(1), 0),
            ValueError,
            "batch_size must be a whole number of at least 1, got 0. 64 suits a CPU.",
        ),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message
