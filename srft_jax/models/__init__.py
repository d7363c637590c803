"""The policy: parameters, forward pass, and Hugging Face import and export.

The tokenizer stays apart, in `srft_jax.models.tokenizer`: transformers takes a second to load.
"""

from srft_jax.models.decoder import ForwardOutput, Runtime, forward, init_params, output_head
from srft_jax.models.hf_export import save_hf
from srft_jax.models.hf_import import load_hf

__all__ = [
    "ForwardOutput",
    "Runtime",
    "forward",
    "init_params",
    "load_hf",
    "output_head",
    "save_hf",
]
