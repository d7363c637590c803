"""Families of problems of the project's own, each with its answers worked out step by step."""

from srft_jax.data.procedural.sets import load_procedural

__all__ = ["load_procedural"]
