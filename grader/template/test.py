"""Tests of what chapter 00 teaches: the name of each is a claim."""

import torch


def test_a_name_leaves_a_mean_of_zero():
    from helpers.a_topic import a_name

    y = a_name(torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    assert torch.equal(y, torch.tensor([[-2.0, -1.0], [1.0, 2.0]]))
