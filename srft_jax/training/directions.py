"""Into which direction an optimizer steps, at a learning rate of 1: AdamW, Adafactor, Muon.

All three make updates of about the same size, so that a learning rate of one is one of the others.
A stacked parameter [L, ...] is L parameters: what Adafactor and Muon take over a whole matrix, they
take over one layer's.
"""

from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from srft_jax.config import ModelConfig, OptimizerConfig
from srft_jax.models import families, lora
from srft_jax.models.decoder import Params

# Largest root mean square of an update, Adafactor's section 6.
_CLIP_RMS = 1.0
# That of AdamW's updates, measured: Liu et al., 2025, arXiv:2502.16982, section 2.2.
_ADAM_RMS = 0.2
# An expert's matrix [in, out] is one of [L, E, in, out].
_MATRIX = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def direction(config: OptimizerConfig, model_config: ModelConfig) -> optax.GradientTransformation:
    """What `config.name` says of a gradient."""
    if config.name == "adafactor":
        return _by_layer(_adafactor())
    if config.name == "muon":
        return _muon(config, model_config)
    return optax.scale_by_adam(b1=config.b1, b2=config.b2)


def _adafactor() -> optax.GradientTransformation:
    """Shazeer and Stern, 2018, arXiv:1804.04235, without first moment and without steps relative to
    the parameter's size. The second moment of a matrix of 128 rows and columns at least is kept as
    the means of both."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(_CLIP_RMS))


def _muon(config: OptimizerConfig, model_config: ModelConfig) -> optax.GradientTransformation:
    """Jordan et al., 2024: the momentum of each matrix of a block made nearly orthogonal.

    Embedding, head and vectors go by Adam.
    """

    def dimensions(params: Params) -> Any:
        return jax.tree.map(lambda _: _MATRIX, params)

    def scaled(updates: Params, params: Params | None = None) -> Params:
        """An orthogonal [in, out] has entries of root mean square 1 / sqrt(max(in, out))."""
        return jax.tree.map(lambda x: x * _ADAM_RMS * max(x.shape[-2:]) ** 0.5, updates)

    def labels(params: Params) -> Params:
        rows = families.parameters(model_config)
        kinds = {row.path: "muon" if row.stacked and len(row.axes) >= 2 else "adam" for row in rows}
        return lora.trained(families.by_path(kinds), model_config)

    matrices = optax.chain(
        scale_by_muon(beta=config.b1, weight_dimension_numbers=dimensions),
        optax.stateless(scaled),
    )
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    return optax.partition({"muon": matrices, "adam": adam}, labels)


class _ByLayer(NamedTuple):
    """States of the parameters of layers, each leaf with [L] in front, and of the others."""

    layers: Any
    rest: Any


def _by_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation of each layer's parameters on their own."""

    def init(params: Params) -> _ByLayer:
        layers, rest = _split(params)
        return _ByLayer(jax.vmap(transformation.init)(layers), transformation.init(rest))

    def update(gradient: Params, state: _ByLayer, params: Params) -> tuple[Params, _ByLayer]:
        (layers, rest), (of_layers, of_rest) = _split(gradient), _split(params)
        layers, layers_state = jax.vmap(transformation.update)(layers, state.layers, of_layers)
        rest, rest_state = transformation.update(rest, state.rest, of_rest)
        return layers | rest, _ByLayer(layers_state, rest_state)

    return optax.GradientTransformation(init, update)


def _split(params: Params) -> tuple[Params, Params]:
    rest = {name: value for name, value in params.items() if name != "layers"}
    return {"layers": params["layers"]}, rest
