"""A scorer that a policy of random weights satisfies every other time. Imported by the workers."""


def parity(completion, gold, **metadata):
    return float(sum(map(ord, completion)) % 2)
