"""Makes assets/tokenizer: one token a byte, the turns of a chat, and the think tags; 262 tokens.

    python assets/make_tokenizer.py [DIRECTORY]

Needs no network and gives the same bytes each time. Ids never change: a model is trained on them.
"""

import itertools
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")  # ids 0 to 3
THINK = ("<think>", "</think>")  # ids 4 and 5; ordinary added tokens, so decoding keeps them

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('roles are user and assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<|pad|>",
    "eos_token": "<|end|>",
    "model_max_length": 4096,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def byte_characters() -> list[str]:
    """The visible character that the ByteLevel pre-tokenizer writes for each byte.

    Printable Latin-1 stands for itself; the 68 others, in order, are 256, 257, ...

    In: byte 32, a space.  Out: chr(288), "Ġ".
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = itertools.count(256)
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def make_tokenizer() -> Tokenizer:
    vocab = {token: id for id, token in enumerate([*SPECIAL, *THINK, *byte_characters()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # use_regex cuts text into words so that merges stay within them; there are no merges.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINK])
    return tokenizer


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    config = json.dumps(CONFIG, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(config)


if __name__ == "__main__":
    here = Path(__file__).parent / "tokenizer"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here)
