"""The policy: parameters, forward pass, and Hugging Face import and export.

    families.py                            one table of parameters per family, with their HF names
    block.py, decoder.py, lora.py          the forward passes; adapters
    hf_config.py, hf_config_*.py           config.json <-> ModelConfig
    hf_import.py, safetensors_reader.py    load_hf
    hf_export.py, safetensors_writer.py    save_hf, export_hf, save_peft
    tokenizer.py                           text <-> ids; chat_template.py, control_tokens.py

The tokenizer is not imported here: transformers takes a second to load.
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
