"""Imported by the pool's workers."""

import time


def sleep(completion, gold):
    if completion.startswith("7 "):
        time.sleep(60)
    return 1.0
