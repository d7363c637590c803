"""Rotary positions, also stretched beyond the length that a model was trained on.

Frequencies are made on the host and rounded where transformers rounds them: one float32 ulp of a
frequency turns position 30,000 by 2e-3 rad.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from srft_jax.config import RopeScaling


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Return cosine and sine of positions * theta^(-2i/H), i < H/2, scaled; for all layers.

    Angles are float32: in bfloat16 position 257 would already equal 256.
    """
    frequencies, factor = rope_frequencies(head_dim, theta, scaling)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, float]:
    """Return frequencies, float32 [H / 2] in radians per position, and a factor.

    Cosines and sines are multiplied by the factor; it is 1 except for yarn.
    """
    half = head_dim // 2
    # Exponents and periods are float32, as in transformers; float64 between makes powers exact.
    exponents = (np.arange(half, dtype=np.float32) / np.float32(half)).astype(np.float64)
    periods = (np.float64(np.float32(theta)) ** exponents).astype(np.float32)
    if scaling is None:
        return np.float32(1) / periods, 1.0
    if scaling.kind == "linear":
        return np.float32(1) / periods / np.float32(scaling.factor), 1.0
    if scaling.kind == "llama3":
        return _llama3(np.float32(1) / periods, scaling), 1.0
    return _yarn(periods, theta, scaling), _yarn_attention_factor(scaling)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Divide frequencies of long wavelengths by the factor, keep short ones, mix those between."""
    assert scaling.original_max_positions is not None  # checked where the architecture is read
    length, low, high = (
        scaling.original_max_positions,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    wavelengths = (2 * math.pi) / frequencies
    scaled = frequencies / np.float32(scaling.factor)
    kept = (length / wavelengths - low) / (high - low)  # 0 at the longest wavelength between
    mixed = (1 - kept) * frequencies / np.float32(scaling.factor) + kept * frequencies
    long_or_short = np.where(wavelengths > length / low, scaled, frequencies)
    between = ~(wavelengths < length / high) & ~(wavelengths > length / low)
    return np.where(between, mixed, long_or_short).astype(np.float32)


def _yarn(periods: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Divide frequencies that turn slowly by the factor, keep fast ones, mix by a ramp between.

    Slow ones turn less than `beta_slow` times over the original length, fast ones more than
    `beta_fast` times.
    Peng et al., https://arxiv.org/abs/2309.00071.
    """
    assert scaling.original_max_positions is not None
    half, length = len(periods), scaling.original_max_positions

    def dimension_at(turns: float) -> float:
        """Return the dimension whose frequency turns this often over the original length."""
        return 2 * half * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_at(scaling.beta_fast), dimension_at(scaling.beta_slow)
    # Dimensions below `low` turn fast and are kept, dimensions above `high` are divided.
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    high = high + 0.001 if low == high else high  # no division by 0 in the ramp
    ramp = np.clip((np.arange(half, dtype=np.float32) - np.float32(low)) / (high - low), 0, 1)
    kept = (1 - ramp).astype(np.float32)
    scaled, whole = 1 / (np.float32(scaling.factor) * periods), np.float32(1) / periods
    return (scaled * (1 - kept) + whole * kept).astype(np.float32)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    """Return the factor of cosines and sines: 0.1 mscale log(factor) + 1, unless it is given."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def factor(coefficient: float) -> float:
        return 0.1 * coefficient * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return factor(scaling.mscale) / factor(scaling.mscale_all_dim)
    return factor(1.0)


def rope(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T heads H"]:
    """Rotate each pair (x[i], x[i + H/2]) by its angle: the layout of all our model families."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
