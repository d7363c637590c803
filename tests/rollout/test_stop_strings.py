"""Stop strings are found by decoding the end of a text, where decoding all of it finds them."""

import bisect
import types

import numpy as np
import pytest

from srft_jax.rollout.finished import stop_string_cut


class Letters:
    """Ids 0, 1, ... are a, b, ...; 9 is a special token, which is skipped. Counts its work."""

    decoded = 0

    def decode(self, tokens):
        self.decoded += len(tokens)
        return "".join(chr(ord("a") + token) for token in tokens if token != 9)


class Bytes:
    """Ids are bytes of a few characters; a part of a character becomes U+FFFD."""

    alphabet = "aé€😀".encode()

    def decode(self, tokens):
        return bytes(self.alphabet[token] for token in tokens).decode(errors="replace")


class ByteFallback:
    """As SentencePiece: a run of bytes that is not UTF-8 is U+FFFD throughout, 9 is a blank."""

    def decode(self, tokens):
        runs = bytes(b" "[0] if t == 9 else Bytes.alphabet[t] for t in tokens).split(b" ")
        return " ".join(map(self.run, runs)).removeprefix(" ")

    def run(self, run):
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)


def row_of(chunks, stop_strings):
    request = types.SimpleNamespace(stop_strings=stop_strings)
    return types.SimpleNamespace(
        completion=types.SimpleNamespace(request=request),
        chunks=[(np.asarray(chunk, np.int32), None) for chunk in chunks],
    )


def cut_by_whole_text(tokens, first, stop_strings, tokenizer):
    """The same by decoding from the start each time."""

    def stops(count):
        return any(stop in tokenizer.decode(tokens[:count]) for stop in stop_strings)

    if not stops(len(tokens)):
        return None
    return first + 1 + bisect.bisect_left(range(first + 1, len(tokens)), True, key=stops)


@pytest.mark.parametrize(
    ("tokenizer", "stop_strings", "weights"),
    [
        (Letters(), ("abc", "ccaab"), [3, 3, 3, 0, 0, 0, 0, 0, 0, 20]),
        (Letters(), ("ab",), [1] * 10),
        (Bytes(), ("é€", "a😀a"), [1] * 10),
        (ByteFallback(), ("a€", " a", "😀"), [1] * 10),
    ],
)
def test_the_end_of_a_text_tells_what_all_of_it_tells(tokenizer, stop_strings, weights):
    """Whole characters most of the time, so that some text is seen."""
    rng, pieces = np.random.default_rng(0), ([0], [1, 2], [3, 4, 5], [6, 7, 8, 9], [5], [7], [9])
    if isinstance(tokenizer, Letters):
        pieces = [[token] for token in range(10)]
    share = np.asarray(weights, float) if len(pieces) == 10 else np.asarray([4, 4, 4, 4, 1, 1, 1.0])
    found = 0
    for _ in range(300):
        drawn = [t for i in rng.choice(len(pieces), 90, p=share / share.sum()) for t in pieces[i]]
        chunks = []
        for start in range(0, 88, 8):
            chunks.append(drawn[start : start + 8])
            tokens = drawn[: start + 8]
            wanted = cut_by_whole_text(tokens, start, stop_strings, tokenizer)
            assert stop_string_cut(row_of(chunks, stop_strings), 8, tokenizer) == wanted
            if wanted is not None:
                found += start > 0
                break
    assert found > 50


def test_a_long_text_is_not_decoded_anew():
    tokenizer, chunks = Letters(), [[0] * 64] * 100
    assert stop_string_cut(row_of(chunks, ["ab"]), 64, tokenizer) is None
    assert tokenizer.decoded < 100
    chunks.append([0, 1] + [0] * 62)
    assert stop_string_cut(row_of(chunks, ["ab"]), 64, tokenizer) == 6402
