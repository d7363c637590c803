"""RMSNorm and rotary positions against float64 and against their defining properties."""

import jax.numpy as jnp
import numpy as np

from srft_jax.ops.layers import rms_norm
from srft_jax.ops.rope import rope, rope_tables

H, THETA = 8, 10_000.0


def vectors(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def at_positions(x, positions, theta):
    return rope(x, *rope_tables(jnp.asarray(positions), x.shape[-1], theta))


def rotated(vector, position, theta=THETA):
    """One head's vector [H] at one position."""
    return np.asarray(at_positions(vector[None, None, None], [[position]], theta))[0, 0, 0]


def rope_of_hugging_face(x, positions, theta):
    """modeling_llama's formula, float64, on [B, T, heads, H]: x cos + rotate_half(x) sin."""
    inverse = 1.0 / theta ** (np.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = positions[..., None] * inverse
    angles = np.concatenate([angles, angles], axis=-1)[:, :, None]
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    return x * np.cos(angles) + np.concatenate([-second, first], axis=-1) * np.sin(angles)


def test_rms_norm():
    x, scale = 100 * vectors(3, 5), vectors(5)
    mean_square = np.mean(np.square(x.astype(np.float64)), axis=-1, keepdims=True)
    np.testing.assert_allclose(
        rms_norm(x, scale, 0.5), x / np.sqrt(mean_square + 0.5) * scale, rtol=1e-5
    )


def test_rms_norm_rounds_bfloat16_only_once():
    x, scale = jnp.asarray(vectors(16, 64), jnp.bfloat16), vectors(64)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt(np.mean(np.square(wide), axis=-1, keepdims=True) + 0.5) * scale
    out = rms_norm(x, scale, 0.5)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.asarray(exact, jnp.bfloat16))


def test_rope_has_the_layout_of_hugging_face():
    x, positions = vectors(2, 5, 3, H), np.array([[0, 1, 2, 3, 4], [7, 0, 1000, 2, 3]])
    for theta in (100.0, 1_000_000.0):
        np.testing.assert_allclose(
            at_positions(x, positions, theta), rope_of_hugging_face(x, positions, theta), atol=2e-4
        )


def test_rope_scores_depend_on_the_distance_only():
    query, key = vectors(2, H)
    scores = [rotated(query, m) @ rotated(key, m - 5) for m in (5, 9, 200)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
    assert abs(rotated(query, 9) @ rotated(key, 5) - scores[0]) > 1e-2


def test_rope_keeps_lengths_and_leaves_position_zero():
    x = vectors(H)
    np.testing.assert_array_equal(rotated(x, 0), x)
    np.testing.assert_allclose(np.linalg.norm(rotated(x, 123)), np.linalg.norm(x), rtol=1e-6)


def test_rope_angles_are_float32_for_bfloat16_inputs():
    x = vectors(H)
    rounded = jnp.asarray(x, jnp.bfloat16)
    out = at_positions(rounded[None, None, None], [[257]], THETA)
    assert out.dtype == jnp.bfloat16
    exact = rotated(np.asarray(rounded, np.float32), 257)
    np.testing.assert_allclose(out.astype(np.float32)[0, 0, 0], exact, atol=2e-2)
    assert np.abs(exact - rotated(np.asarray(rounded, np.float32), 256)).max() > 0.1
