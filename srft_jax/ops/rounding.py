"""How programs that must agree in bfloat16 are compiled."""

# XLA may leave out a rounding to bfloat16 between two operations that it fuses, other ones in other
# programs. What sampler and trainer say of a token then differs as much as bfloat16 from float32.
ROUND_AS_WRITTEN = {"xla_allow_excess_precision": False}
