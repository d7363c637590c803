"""Text to ids and back: a thin, immutable wrapper over transformers' fast tokenizer.

Import this module only where text is needed: transformers takes most of a second. `AutoTokenizer`
would take 2.3 s where torch is installed, as it imports torch; the other classes that it knows are
not needed here, because tokenizer.json is read as it stands.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

# Keeps transformers from advising on every start that torch be installed; its warnings stay.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from srft_jax.config import UsageError  # noqa: E402
from srft_jax.models.chat_template import ChatTemplate, Turn, read_chat_template  # noqa: E402
from srft_jax.models.control_tokens import ControlTokens  # noqa: E402
from srft_jax.models.hf_json import read_json  # noqa: E402

THINK_TAGS = ("<think>", "</think>")

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",  # SentencePiece's, which other programs read
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its chat template, as made by `load_tokenizer`.

    Attributes:
        source: Directory it was read from.
        template: Chat template, the form of a conversation.
        template_file: File that the template was read from, if not from `source`.
        eos_id: The trained end of a completion: the token that the chat template ends an
            assistant's turn with, or the tokenizer's EOS if that is no special token.
        stop_ids: All ids that end a completion while sampling: eos_id first, then the tokenizer's
            EOS and those of generation_config.json (or config.json) beside it.
        pad_id: Filler of rows; the tokenizer's EOS if it has no padding token. No mask is derived
            from it.
        has_padding: Whether the tokenizer has a padding token.
        bos_id: Start of a text, if the tokenizer has one; the chat template writes it, we do not.
        vocab_size: Number above all ids of text, of the template's turns, of stops and padding. The
            model's embedding may have more rows. Special tokens that nothing writes do not count.
        think_prefix: End of the chat template that completions therefore lack: nothing, or the
            opening think tag and the blanks after it.
        special_ids: Ids of all special tokens.
    """

    source: Path
    template: ChatTemplate
    template_file: str | None
    eos_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    has_padding: bool
    bos_id: int | None
    vocab_size: int
    think_prefix: str
    special_ids: frozenset[int]
    _controls: ControlTokens = dataclasses.field(repr=False)

    def encode_prompts(self, conversations: Sequence[Sequence[Turn]]) -> list[list[int]]:
        """Encode each conversation in the chat template, up to where the assistant's text starts.

        Raises:
            UsageError: the template refuses a conversation or drops a part of it.
        """
        return self._controls.encode(self._controls.render(self.template, conversations))

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode an assistant's texts, each with its EOS.

        The think tags are ordinary added tokens and become one id each. The opening tag and the
        blanks after it are dropped if the chat template has written them already:

            template "... <|assistant|><think>"   In: "<think>hm</think>1".  Out: hm </think> 1 EOS
        """
        ids = self._controls.encode_data([self._without_prefix(text) for text in texts])
        return [[*completion, self.eos_id] for completion in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return text without special tokens (EOS, padding, turns) and with think tags.

        Bytes that are not UTF-8 become U+FFFD.
        """
        return self._controls.decode(ids, skip_special_tokens=True)

    def spell(self, ids: Sequence[int]) -> str:
        """Return text with special tokens."""
        return self._controls.decode(ids, skip_special_tokens=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the files it was read from; transformers would rewrite them its own way."""
        epath.Path(path).mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self.source / name).is_file():
                epath.Path(self.source / name).copy(epath.Path(path) / name, overwrite=True)
        if self.template_file is not None:  # readers prefer this file to tokenizer_config.json
            (epath.Path(path) / "chat_template.jinja").write_text(self.template.text)

    def _without_prefix(self, text: str) -> str:
        """The text after the longest start that it shares with `think_prefix`.

        A start that does not hold the whole tag stays.
        """
        shared = os.path.commonprefix([text, self.think_prefix])
        return text.removeprefix(shared) if shared.startswith(THINK_TAGS[0]) else text


def load_tokenizer(path: str | os.PathLike[str], chat_template: str | None = None) -> Tokenizer:
    """Read tokenizer.json, tokenizer_config.json and the chat template of a local directory.

    Args:
        path: The directory.
        chat_template: A Jinja file to use instead of the directory's template.

    Raises:
        UsageError: no tokenizer there, or one without EOS token, with think tags that are special,
            or with a chat template that cannot be used.
    """
    source = Path(path).resolve()
    backend = _read_backend(path, source)
    if backend.eos_token_id is None:
        raise UsageError(f"the tokenizer in {path} has no EOS token, so completions could not end")
    template = read_chat_template(backend, source, chat_template)
    vocab = backend.get_vocab()
    controls = ControlTokens(backend)
    special = frozenset(controls.aliases.values())
    # The think tags must survive decoding, as verifiers look for them.
    if lost := sorted(tag for tag in THINK_TAGS if vocab.get(tag) in special):
        raise UsageError(
            f"the tokenizer in {path} has {lost} as special tokens, which decoding drops; "
            'set "special": false in its tokenizer.json'
        )
    (prompt,) = controls.render(template, [[("user", "question")]])
    eos_id = _turn_end(controls, template, default=backend.eos_token_id)
    # In order and each once: a dict keeps the order of its keys.
    stop_ids = tuple(dict.fromkeys([eos_id, backend.eos_token_id, *_listed_stops(source, vocab)]))
    pad_id = backend.eos_token_id if backend.pad_token_id is None else backend.pad_token_id
    # A special token counts for vocab_size only if a prompt, a stop or padding writes it.
    written = {*stop_ids, pad_id, *controls.encode([prompt])[0]}
    return Tokenizer(
        source=source,
        template=template,
        template_file=chat_template,
        eos_id=eos_id,
        stop_ids=stop_ids,
        pad_id=pad_id,
        has_padding=backend.pad_token_id is not None,
        bos_id=backend.bos_token_id,
        vocab_size=1 + max(written.union(vocab.values()) - (special - written)),
        think_prefix=_think_prefix(prompt),
        special_ids=special,
        _controls=controls,
    )


def _read_backend(path: str | os.PathLike[str], source: Path) -> PreTrainedTokenizerFast:
    if not source.is_dir():
        raise UsageError(
            f"{path} is not a directory (seen from {Path.cwd()}); models are read from "
            "local directories, names on the hub are not downloaded"
        )
    if not (source / "tokenizer.json").is_file():
        raise UsageError(_without_tokenizer_json(path, source))
    try:
        return PreTrainedTokenizerFast.from_pretrained(source, local_files_only=True)
    except Exception as error:  # tokenizers raises this very class on a file it cannot read
        reason = " ".join(str(error).split())
        raise UsageError(f"the tokenizer in {path} cannot be read: {reason}") from error


def _without_tokenizer_json(path: str | os.PathLike[str], source: Path) -> str:
    convert = "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes one"
    for name in ("tokenizer.model", "vocab.json", "vocab.txt"):
        if (source / name).is_file():
            return f"{path} holds {name} but no tokenizer.json, which is what is read; {convert}"
    return f"{path} holds no tokenizer.json, so it is not a Hugging Face tokenizer"


def _turn_end(controls: ControlTokens, template: ChatTemplate, *, default: int) -> int:
    """The id of the special token right after an assistant's text, else the default.

    In: ... <|im_start|>assistant\\nanswer<|im_end|>\\n  Out: the id of <|im_end|>.
    """
    # Render a whole conversation, and read the ids behind the assistant's text.
    turns = [("user", "question"), ("assistant", "answer")]
    (text,) = controls.render(template, [turns], to_be_answered=False)
    _, answer, rest = text.rpartition("answer")
    ids = controls.encode([rest])[0] if answer and rest else []
    return ids[0] if ids and ids[0] in controls.aliases.values() else default


def _listed_stops(source: Path, vocab: Mapping[str, int]) -> list[int]:
    """eos_token_id of generation_config.json, or else of config.json: none, one or a list."""
    for name in ("generation_config.json", "config.json"):
        file = source / name
        listed = read_json(file).get("eos_token_id") if file.is_file() else None
        if listed is None:
            continue
        ids = listed if isinstance(listed, list) else [listed]
        known = set(vocab.values())
        if unknown := [id for id in ids if id not in known]:
            raise UsageError(
                f"{file} has eos_token_id {unknown}, which the tokenizer does not have"
            )
        return ids
    return []


def _think_prefix(rendered: str) -> str:
    ending = re.search(rf"{THINK_TAGS[0]}\s*\Z", rendered)
    return ending[0] if ending else ""
