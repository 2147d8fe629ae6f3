"""What a chapter runs on: "embedded" needs no network, "hub" downloads larger models and data.

| profile  | images                            | texts                                          |
|----------|-----------------------------------|------------------------------------------------|
| embedded | glyphnet on handwritten digits    | all-MiniLM-L6-v2 on docstrings, from packages  |
| hub      | resnet18 on Oxford-IIIT Pets      | all-MiniLM-L12-v2 on docstrings, from the Hub  |

For your own data, make a `Profile` of your own:

    mine = Profile(glyphnet, partial(image_folder, "photos"), text_backbone, partial(text_table, "mails.csv"))
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from helpers.backbones import glyphnet, image_backbone, text_backbone
from helpers.data import Examples, digits, docstrings, pets
from helpers.features import drop_head
from helpers.forgetting import letters_kept, printed


class Profile(NamedTuple):
    """Backbones without heads, and the data they are tried on; nothing is loaded before it is called."""

    image_backbone: Callable[[], nn.Module]
    images: Callable[..., Examples]  # (split, labels_per_class, draw)
    text_backbone: Callable[[], nn.Module]
    texts: Callable[..., Examples]
    outside: Callable[[], Examples] | None = None  # the classes of the images in another domain
    source: Callable[[nn.Module], float] | None = None  # accuracy of the image backbone on what it was trained on


PROFILES = {
    "embedded": Profile(lambda: drop_head(glyphnet()), digits, text_backbone, docstrings, printed, letters_kept),
    "hub": Profile(
        partial(image_backbone, "ResNet18_Weights.IMAGENET1K_V1"),
        pets,
        partial(text_backbone, "sentence-transformers/all-MiniLM-L12-v2"),
        docstrings,
    ),
}


def choose(profile: str | Profile) -> Profile:
    """The profile of that name; one of your own is passed on."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise ValueError(f"profile must be 'embedded', 'hub' or a Profile of your own, got {profile!r}.")
    return PROFILES[profile]
