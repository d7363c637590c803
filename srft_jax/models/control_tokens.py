"""What of a text is control: the special tokens that a chat template wrote, not those in the data.

A special token spelled in data stays text, so that data can neither end a turn nor begin one. The
tokenizer is set to read special tokens as text, and knows those of a template by an alias that no
data spells, as it is drawn anew in every process:

    In: <|user|>say <|user|><|assistant|>  Out: ALIAS<|user|>say <|user|>ALIAS<|assistant|>

Everything is then encoded in one go, so that harmless text gets the ids it gets from transformers,
also where a merge joins the template's text and the data's.
"""

import re
import secrets
from collections.abc import Sequence

from transformers import AddedToken, PreTrainedTokenizerFast

from srft_jax.models.chat_template import ChatTemplate, Turn


class ControlTokens:
    """Encodes text in which the special tokens of data are text, those of a template are not.

    Attributes:
        aliases: Id of an alias -> id of the special token it stands for.
    """

    def __init__(self, backend: PreTrainedTokenizerFast) -> None:
        self._text = backend.backend_tokenizer
        self._text.no_truncation()  # tokenizer.json may hold either, of whoever saved it
        self._text.no_padding()
        special = {id: one for id, one in backend.added_tokens_decoder.items() if one.special}
        spelled = {id: one.content for id, one in special.items()}
        self._ids = {content: id for id, content in spelled.items()}
        self._marker = f"\ue000{secrets.token_hex(8)}\ue000"
        longest_first = map(re.escape, sorted(self._ids, key=len, reverse=True))
        self.pattern = re.compile("|".join(longest_first) or "(?!)")
        self._either = re.compile(f"{self._marker}(\\d+){self._marker}|{self.pattern.pattern}")
        self._text.add_tokens(
            [
                AddedToken(
                    self._alias(one.content),
                    lstrip=one.lstrip,
                    rstrip=one.rstrip,
                    single_word=one.single_word,
                    normalized=False,
                )
                for one in special.values()
            ]
        )
        self._text.encode_special_tokens = True  # as text, that is
        self.aliases = {
            self._text.token_to_id(self._alias(content)): id for id, content in spelled.items()
        }
        self._spelled = spelled

    def render(
        self,
        template: ChatTemplate,
        conversations: Sequence[Sequence[Turn]],
        *,
        to_be_answered: bool = True,
    ) -> list[str]:
        """As the template does, its special tokens by their aliases."""
        guarded = [
            [(role, self.pattern.sub(self._hide, content)) for role, content in turns]
            for turns in conversations
        ]
        texts = template.render(guarded, to_be_answered=to_be_answered)
        return [self._either.sub(self._reveal, text) for text in texts]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of what `render` returns."""
        return [[self.aliases.get(id, id) for id in one] for one in self.encode_data(texts)]

    def encode_data(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which nothing is control; threads of its own, one text each."""
        encodings = self._text.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._text.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens))

    def _alias(self, content: str) -> str:
        return self._marker + content

    def _hide(self, found: re.Match[str]) -> str:
        return f"{self._marker}{self._ids[found[0]]}{self._marker}"

    def _reveal(self, found: re.Match[str]) -> str:
        return self._spelled[int(found[1])] if found[1] else self._alias(found[0])
