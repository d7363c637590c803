"""Scorers as users write them, good and bad. Imported by the pool's workers, not by the tests."""

import math
import os
import signal
import sys
import time

not_callable = 3


def length(completion, gold, **metadata):
    return len(completion) / metadata.get("scale", 1.0)


def needs_column(completion, gold, *, column, **metadata):
    return float(column == gold)


def two_columns(completion, gold, target, source="unknown"):
    return float(completion == target and source != "bad")


def swapped(gold, completion):
    return 1.0


def prints(completion, gold, **metadata):
    print("a line", flush=True)
    print('[0, 1.0, "right", ""]', flush=True)
    os.system("echo from a child")
    return float(sys.stdin.read() == "")


def returns_none(completion, gold, **metadata):
    return None


def returns_nan(completion, gold, **metadata):
    return math.nan


def raises(completion, gold, **metadata):
    raise KeyError("target")


def exits(completion, gold, **metadata):
    os._exit(3)


def process_id(completion, gold, **metadata):
    return os.getpid()


def has_module(completion, gold, **metadata):
    return gold in sys.modules


def behave(completion, gold, **metadata):
    """Does what the completion says; anything else scores 1."""
    match completion:
        case "sleep":
            time.sleep(60)
        case "hold the lock":
            10**10**9
        case "exit":
            os._exit(3)
        case "raise":
            raise RuntimeError("of the user's own")
        case "none":
            return None
        case "allocate":
            bytearray(5 << 30)  # above the limit, below what most machines have
        case "fork" if os.fork() == 0:
            return 0.0
        case "nap":
            time.sleep(0.3)
        case "ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
    return 1.0
