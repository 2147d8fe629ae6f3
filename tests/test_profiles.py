from functools import partial

import pytest

from helpers.backbones import glyphnet
from helpers.data import digits
from helpers.features import drop_head, extract
from helpers.profiles import PROFILES, Profile, choose


def test_the_embedded_profile_maps_its_inputs_to_features():
    profile = choose("embedded")
    for build, examples in ((profile.image_backbone, profile.images), (profile.text_backbone, profile.texts)):
        backbone, few = build(), examples("train", 1, draw=0)
        assert extract(backbone, few.inputs).shape == (len(few.classes), backbone.width)
        assert all(backbone.get_submodule(stage) for stage in backbone.stages)


def test_a_profile_of_ones_own_is_taken_as_it_is():
    mine = Profile(lambda: drop_head(glyphnet()), partial(digits, draw=3), *PROFILES["embedded"][2:])
    assert choose(mine) is mine


def test_an_unknown_profile_is_told():
    with pytest.raises(ValueError, match=r"^profile must be 'embedded', 'hub' or a Profile of your own, got 'hbu'.$"):
        choose("hbu")
