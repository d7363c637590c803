"""The direction of an optimizer's step, at a learning rate of 1: AdamW, Adafactor, Muon.

All three make updates of about the same size, so a learning rate that suits one suits the others.
A stacked parameter [L, ...] is L parameters: Adafactor and Muon take their statistics over a matrix
of one layer, never over the stack.
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
# Root mean square of AdamW's updates, measured: Liu et al., 2025, arXiv:2502.16982, section 2.2.
_ADAM_RMS = 0.2
# The last two axes are the matrix: [L, in, out], or an expert's among [L, E, in, out].
_MATRIX = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def direction(
    optimizer_config: OptimizerConfig, model_config: ModelConfig
) -> optax.GradientTransformation:
    """Return the transformation that `optimizer_config.name` names, of gradients to updates.

    Args:
        optimizer_config: Name, and the decay rates of its averages.
        model_config: Architecture, with its adapters if any.
    """
    if optimizer_config.name == "adafactor":
        return _by_layer(_adafactor())
    if optimizer_config.name == "muon":
        return _muon(optimizer_config, model_config)
    return optax.scale_by_adam(b1=optimizer_config.b1, b2=optimizer_config.b2)


def _adafactor() -> optax.GradientTransformation:
    """Shazeer and Stern, 2018, arXiv:1804.04235, without first moment and without steps relative to
    the parameter's size.

    A matrix of at least 128 rows and 128 columns keeps the means of its second moment over rows and
    over columns; a smaller one keeps the second moment itself.
    """
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(_CLIP_RMS))


def _muon(
    optimizer_config: OptimizerConfig, model_config: ModelConfig
) -> optax.GradientTransformation:
    """Jordan et al., 2024: the momentum of each matrix of a block is made nearly orthogonal.

    Embedding, head, norms and biases take Adam's updates instead.
    """

    def dimensions(params: Params) -> Any:
        return jax.tree.map(lambda _: _MATRIX, params)

    def scaled(updates: Params, params: Params | None = None) -> Params:
        """The updates at AdamW's size: an orthogonal matrix [in, out] has entries of root mean
        square 1 / sqrt(max(in, out))."""
        return jax.tree.map(lambda x: x * _ADAM_RMS * max(x.shape[-2:]) ** 0.5, updates)

    def labels(params: Params) -> Params:
        kinds = {
            parameter.path: "muon" if parameter.stacked and len(parameter.axes) >= 2 else "adam"
            for parameter in families.parameters(model_config)
        }
        return lora.trained(families.by_path(kinds), model_config)

    matrices = optax.chain(
        scale_by_muon(beta=optimizer_config.b1, weight_dimension_numbers=dimensions),
        optax.stateless(scaled),
    )
    adam = optax.scale_by_adam(b1=optimizer_config.b1, b2=optimizer_config.b2)
    return optax.partition({"muon": matrices, "adam": adam}, labels)


class _ByLayer(NamedTuple):
    """State of an optimizer that treats each layer's parameters on their own.

    Attributes:
        layers: State of the stacked parameters, each leaf with [L] in front.
        rest: State of all other parameters.
    """

    layers: Any
    rest: Any


def _by_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply the transformation to each layer's parameters on their own."""

    def init(params: Params) -> _ByLayer:
        layers, rest = _split(params)
        return _ByLayer(jax.vmap(transformation.init)(layers), transformation.init(rest))

    def update(gradient: Params, state: _ByLayer, params: Params) -> tuple[Params, _ByLayer]:
        layers, rest = _split(gradient)
        layer_params, rest_params = _split(params)
        layers, layers_state = jax.vmap(transformation.update)(layers, state.layers, layer_params)
        rest, rest_state = transformation.update(rest, state.rest, rest_params)
        return layers | rest, _ByLayer(layers_state, rest_state)

    return optax.GradientTransformation(init, update)


def _split(params: Params) -> tuple[Params, Params]:
    """Split parameters into the stacked ones of the layers, and all others."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    return {"layers": params["layers"]}, rest
