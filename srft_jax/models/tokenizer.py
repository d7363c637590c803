"""Text to ids and back: a thin, immutable wrapper over transformers' fast tokenizer.

Import this module where text is needed and nowhere else: transformers takes most of a second.
`AutoTokenizer` would take 2.3 s where torch is installed, as it imports torch; what it adds, other
classes than the one that reads tokenizer.json as it stands, is not needed here.
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
    "tokenizer.model",  # of SentencePiece, which others read
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """As made by `load_tokenizer`.

    Attributes:
        source: Directory it was read from.
        template: Form of a conversation.
        template_file: Where the template was read from, if not from `source`.
        eos_id: Ends a completion and is trained: what the chat template ends an assistant's turn
            with, or the tokenizer's EOS where that is no special token.
        stop_ids: All that end a completion while sampling: eos_id first, then the tokenizer's EOS
            and those of generation_config.json (or config.json) beside it.
        pad_id: Fills rows; the tokenizer's EOS where it has no padding token. Masks never look at
            it.
        has_padding: It has a padding token.
        bos_id: Starts a text, where the tokenizer has one; the chat template writes it, we do not.
        vocab_size: Ids of text, of the template's turns, of stops and padding are below it; the
            model's embedding may have more rows. Special tokens that nothing writes do not count.
        think_prefix: What the chat template ends with and completions therefore lack: nothing, or
            the opening think tag and the blanks after it.
        special_ids: Of all special tokens.
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
        """Ids of each conversation in the chat template, up to where the assistant's text starts.

        Raises:
            UsageError: the template refuses a conversation or drops a part of it.
        """
        return self._controls.encode(self._controls.render(self.template, conversations))

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of an assistant's texts, each with its EOS.

        The think tags are ordinary added tokens and become one id each. The opening tag, and the
        blanks after it, are dropped where the chat template has written them already:

            template "... <|assistant|><think>"   In: "<think>hm</think>1".  Out: hm </think> 1 EOS
        """
        ids = self._controls.encode_data([self._without_prefix(text) for text in texts])
        return [[*one, self.eos_id] for one in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens (EOS, padding, turns) and with think tags.

        Bytes that are not UTF-8 become U+FFFD.
        """
        return self._controls.decode(ids, skip_special_tokens=True)

    def spell(self, ids: Sequence[int]) -> str:
        """Text with special tokens."""
        return self._controls.decode(ids, skip_special_tokens=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copies the files it was read from; transformers would rewrite them its own way."""
        epath.Path(path).mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self.source / name).is_file():
                epath.Path(self.source / name).copy(epath.Path(path) / name, overwrite=True)
        if self.template_file is not None:  # this file goes before the one in tokenizer_config.json
            (epath.Path(path) / "chat_template.jinja").write_text(self.template.text)

    def _without_prefix(self, text: str) -> str:
        """The longest start that text and `think_prefix` share, if the tag is whole in it."""
        shared = os.path.commonprefix([text, self.think_prefix])
        return text.removeprefix(shared) if shared.startswith(THINK_TAGS[0]) else text


def load_tokenizer(path: str | os.PathLike[str], chat_template: str | None = None) -> Tokenizer:
    """Reads tokenizer.json, tokenizer_config.json and the chat template of a local directory.

    Args:
        path: Of the directory.
        chat_template: A Jinja file used instead of the directory's.

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
    if lost := sorted(tag for tag in THINK_TAGS if vocab.get(tag) in special):
        raise UsageError(
            f"the tokenizer in {path} has {lost} as special tokens, which decoding drops; "
            'set "special": false in its tokenizer.json'
        )
    (prompt,) = controls.render(template, [[("user", "question")]])
    eos_id = _turn_end(controls, template, default=backend.eos_token_id)
    stop_ids = tuple(dict.fromkeys([eos_id, backend.eos_token_id, *_listed_stops(source, vocab)]))
    pad_id = backend.eos_token_id if backend.pad_token_id is None else backend.pad_token_id
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
    """Id of the special token right after an assistant's text.

    In: ... <|im_start|>assistant\\nanswer<|im_end|>\\n  Out: the id of <|im_end|>.
    """
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
        if wrong := [id for id in ids if id not in known]:
            raise UsageError(f"{file} has eos_token_id {wrong}, which the tokenizer does not have")
        return ids
    return []


def _think_prefix(rendered: str) -> str:
    found = re.search(rf"{THINK_TAGS[0]}\s*\Z", rendered)
    return found[0] if found else ""
