"""Text to ids and back: a thin, immutable wrapper over transformers' fast tokenizer.

Import this module where text is needed and nowhere else: transformers takes most of a second.
`AutoTokenizer` would take 2.3 s where torch is installed, as it imports torch; what it adds, other
classes than the one that reads tokenizer.json as it stands, is not needed here.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

# Keeps transformers from advising on every start that torch be installed; its warnings stay.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from srft_jax.config import UsageError  # noqa: E402

THINK_TAGS = ("<think>", "</think>")

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",  # of SentencePiece, which others read
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """As made by `load_tokenizer`.

    Attributes:
        source: Directory it was read from.
        eos_id: Ends a completion.
        pad_id: Fills rows; eos_id where the tokenizer has no padding token. Masks never look at it.
        bos_id: Starts a text, where the tokenizer has one; the chat template writes it, we do not.
        vocab_size: Ids are below it; the model's embedding may have more rows.
        think_prefix: What the chat template ends with and completions therefore lack: nothing, the
            opening think tag, or the tag and a newline.
    """

    source: Path
    eos_id: int
    pad_id: int
    bos_id: int | None
    vocab_size: int
    think_prefix: str
    _backend: PreTrainedTokenizerFast = dataclasses.field(repr=False)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of the chat template with one user turn, up to where the assistant's text starts."""
        return self._backend.encode(_render(self._backend, prompt), add_special_tokens=False)

    def encode_completion(self, text: str) -> list[int]:
        """Ids of an assistant's text, then EOS.

        A special token spelled in `text` stays text, so that data cannot end a turn; the think
        tags are ordinary added tokens and become one id each. The opening tag is dropped where the
        chat template has written it already:

            template "... <|assistant|><think>"   In: "<think>hm</think>1".  Out: hm </think> 1 EOS
        """
        if self.think_prefix:
            whole = text.startswith(self.think_prefix)
            text = text.removeprefix(self.think_prefix if whole else THINK_TAGS[0])
        ids = self._backend.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*ids, self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens (EOS, padding, turns) and with think tags.

        Bytes that are not UTF-8 become U+FFFD.
        """
        text = self._backend.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return cast(str, text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copies the files it was read from; transformers would rewrite them its own way."""
        epath.Path(path).mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self.source / name).is_file():
                epath.Path(self.source / name).copy(epath.Path(path) / name, overwrite=True)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads tokenizer.json, tokenizer_config.json and the chat template of a local directory.

    Raises:
        UsageError: no tokenizer there, or one without EOS token, without chat template, or with
            think tags that are special.
    """
    source = Path(path).resolve()
    if not source.is_dir():
        raise UsageError(
            f"{path} is not a directory (seen from {Path.cwd()}); models are read from "
            "local directories, names on the hub are not downloaded"
        )
    if not (source / "tokenizer.json").is_file():
        raise UsageError(f"{path} holds no tokenizer.json, so it is not a Hugging Face tokenizer")
    backend = PreTrainedTokenizerFast.from_pretrained(source, local_files_only=True)
    if backend.eos_token_id is None:
        raise UsageError(f"the tokenizer in {path} has no EOS token, so completions could not end")
    if backend.chat_template is None:
        raise UsageError(f"the tokenizer in {path} has no chat template, so prompts have no form")
    special = {token.content for token in backend.added_tokens_decoder.values() if token.special}
    if lost := special & set(THINK_TAGS):
        raise UsageError(
            f"the tokenizer in {path} has {sorted(lost)} as special tokens, which decoding drops; "
            'set "special": false in its tokenizer.json'
        )
    return Tokenizer(
        source=source,
        eos_id=backend.eos_token_id,
        pad_id=backend.eos_token_id if backend.pad_token_id is None else backend.pad_token_id,
        bos_id=backend.bos_token_id,
        vocab_size=len(backend),
        think_prefix=_think_prefix(_render(backend, "prompt")),
        _backend=backend,
    )


def _render(backend: PreTrainedTokenizerFast, prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    text = backend.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return cast(str, text)


def _think_prefix(rendered: str) -> str:
    opening = THINK_TAGS[0]
    return next((end for end in (opening + "\n", opening) if rendered.endswith(end)), "")
