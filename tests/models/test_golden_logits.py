"""Our logits against those that transformers once computed, committed beside the weights."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import FAMILIES, logits, random_params

from srft_jax.models import load_hf
from srft_jax.models.hf_config import read_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = Path(__file__).parent / "golden"

MOVED = """Logits differ from transformers' by {error:.2e}.
The golden numbers are not ours to move: find what changed in the decoder or in the import. If
`pytest -m oracle` agrees with us, transformers itself changed: then make them anew with
`python tests/models/make_golden.py` and say so in BUILD_NOTES.md."""


def assert_golden(name, params, config):
    golden = np.load(GOLDEN / name / "logits.npz")
    ours = logits(params, config, golden["tokens"], golden["positions"], golden["mask"])
    error = np.abs(ours - golden["logits"])[golden["mask"] > 0].max()
    assert np.abs(golden["logits"]).mean() > 0.5  # the numbers say something
    assert error < 1e-4, MOVED.format(error=error)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_logits_equal_transformers(name):
    config, params = load_hf(GOLDEN / name)
    assert config.tie_embeddings == (name == "tied")
    assert_golden(name, params, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_equal_transformers(family):
    """Windows are exceeded, scaled frequencies turn, caps bend; a row is padded on the left."""
    config = read_config(GOLDEN / family)
    assert config == FAMILIES[family]
    assert_golden(family, random_params(config), config)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_on_the_right_they_are_the_same(family):
    """One row holds the plain row, the left-padded row without its padding, and padding behind.

    Between the two stands a sequence that would change the logits if they could see it.
    """
    config, golden = FAMILIES[family], np.load(GOLDEN / family / "logits.npz")
    plain, padded = (golden["mask"][row] > 0 for row in (0, 1))
    tokens, positions, expected = (
        [golden[name][0][plain], golden[name][1][padded]]
        for name in ("tokens", "positions", "logits")
    )
    lengths = len(tokens[0]), 7, len(tokens[1]), 5
    segments = np.repeat([1, 2, 3, 0], lengths)
    between, behind = np.arange(7), np.zeros(5, int)
    packed = logits(
        random_params(config),
        config,
        np.concatenate([tokens[0], between, tokens[1], behind])[None],
        np.concatenate([positions[0], between, positions[1], behind])[None],
        segments[None],
    )[0]
    for segment, sequence_logits in zip((1, 3), expected, strict=True):
        error = np.abs(packed[segments == segment] - sequence_logits).max()
        assert error < 1e-4, MOVED.format(error=error)
