"""Fixtures of dense prediction: backbones of every kind, and the scenes in examples."""

import pytest
from dense_networks import BACKBONES, SCENES

from vitae_hf.dense.segmentation.data import load_masked_images


@pytest.fixture(params=list(BACKBONES))
def backbone_config(request):
    """A function that makes the tiny backbone's configuration of either kind, with changes."""
    return BACKBONES[request.param]


@pytest.fixture(scope="module")
def scenes():
    return load_masked_images(str(SCENES))
