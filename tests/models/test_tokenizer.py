"""The byte-level tokenizer that is shipped, and what the wrapper promises of any tokenizer."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TIED, random_params
from tokenizer_families import completion_ids, prompt_ids

from srft_jax.config import UsageError
from srft_jax.models import load_hf, save_hf
from srft_jax.models.tokenizer import load_tokenizer

ASSETS = Path(__file__).parents[2] / "assets"
PAD, END, USER, ASSISTANT, THINK, END_THINK = range(6)
TOKENIZER = load_tokenizer(ASSETS / "tokenizer")


def spelled(text: str) -> list[int]:
    """Bytes come after the six named tokens, in order."""
    return [6 + byte for byte in text.encode()]


def changed(tmp_path, file="tokenizer_config.json", **changes):
    """A copy of the shipped tokenizer with other keys in one of its files; None removes a key."""
    copy = tmp_path / "tokenizer"
    shutil.copytree(ASSETS / "tokenizer", copy)
    content = json.loads((copy / file).read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    (copy / file).write_text(json.dumps(kept))
    return copy


def test_recipe_makes_what_is_shipped(tmp_path):
    subprocess.run([sys.executable, ASSETS / "make_tokenizer.py", tmp_path], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (ASSETS / "tokenizer" / name).read_bytes(), name


def test_ids_are_stable():
    assert (TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.bos_id) == (PAD, END, None)
    assert TOKENIZER.vocab_size == 262
    assert prompt_ids(TOKENIZER, "1+1=é") == [USER, *spelled("1+1=é"), ASSISTANT]
    text = "<think>two ones</think>2"
    ids = [THINK, *spelled("two ones"), END_THINK, *spelled("2"), END]
    assert completion_ids(TOKENIZER, text) == ids
    assert TOKENIZER.decode([PAD, PAD, ASSISTANT, *ids]) == text


@given(st.text())
def test_any_text_comes_back(text):
    ids = completion_ids(TOKENIZER, text)
    assert ids[-1] == END and END not in ids[:-1]
    assert TOKENIZER.decode(ids) == text
    assert prompt_ids(TOKENIZER, text)[1:-1] == ids[:-1]


@given(st.lists(st.sampled_from(["<|end|>", "<|user|>", "<|pad|>", "<think>", "a", " "])))
def test_special_tokens_spelled_in_data_are_text(pieces):
    text = "".join(pieces)
    ids = completion_ids(TOKENIZER, text)
    assert not {PAD, END, USER, ASSISTANT} & set(ids[:-1])
    assert ids.count(THINK) == pieces.count("<think>")
    assert TOKENIZER.decode(ids) == text


def test_broken_utf8_is_marked():
    assert TOKENIZER.decode(spelled("é")[:1]) == "\ufffd"


@pytest.mark.parametrize(
    ("prefix", "text", "kept"),
    [
        ("", "<think>\na", "<think>\na"),
        ("<think>", "<think>\na", "\na"),
        ("<think>\n", "<think>\na", "a"),
        ("<think>\n", "<think>a", "a"),
        ("<think>\n", "a<think>\n", "a<think>\n"),
        ("<think>\n", "<think>\n<think>a", "<think>a"),
    ],
)
def test_opening_tag_is_not_written_twice(tmp_path, prefix, text, kept):
    template = "{{ messages[0].content }}<|assistant|>" + prefix.replace("\n", "{{ '\\n' }}")
    tokenizer = load_tokenizer(changed(tmp_path, chat_template=template))
    assert tokenizer.think_prefix == prefix
    assert tokenizer.decode(prompt_ids(tokenizer, "p")) == "p" + prefix
    assert tokenizer.decode(completion_ids(tokenizer, text)) == kept


def test_eos_stands_in_for_padding(tmp_path):
    assert load_tokenizer(changed(tmp_path, pad_token=None)).pad_id == END


def test_unfit_tokenizers(tmp_path):
    with pytest.raises(UsageError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="is not a directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UsageError, match="no EOS token"):
        load_tokenizer(changed(tmp_path / "1", eos_token=None))
    with pytest.raises(UsageError, match="no chat template"):
        load_tokenizer(changed(tmp_path / "2", chat_template=None))
    added = json.loads((ASSETS / "tokenizer/tokenizer.json").read_text())["added_tokens"]
    added[THINK]["special"] = True
    with pytest.raises(UsageError, match=r"\['<think>'\] as special tokens, which decoding drops"):
        load_tokenizer(changed(tmp_path / "3", "tokenizer.json", added_tokens=added))


def test_export_carries_the_tokenizer(tmp_path):
    """AutoTokenizer must not take a qwen2 model for a reason to read it another way."""
    from transformers import AutoTokenizer

    config = dataclasses.replace(TIED, vocab_size=262)
    save_hf(tmp_path / "model", config, random_params(config), TOKENIZER)
    assert load_hf(tmp_path / "model")[0] == config
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((tmp_path / "model" / name).read_text())
        assert (raw["eos_token_id"], raw["pad_token_id"]) == (END, PAD), name

    text = "1+1= \n  é<think>"
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "model"), TOKENIZER
    turns = [{"role": "user", "content": text}]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == prompt_ids(ours, text)
    turns.append({"role": "assistant", "content": "2"})
    ids = theirs.apply_chat_template(turns, return_dict=False)
    assert ids == prompt_ids(ours, text) + completion_ids(ours, "2")
    assert prompt_ids(load_tokenizer(tmp_path / "model"), text) == prompt_ids(ours, text)


def test_models_room_does_not_import_transformers():
    script = "import sys, srft_jax.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_import_does_not_advise_torch():
    script = "import sys; sys.modules['torch'] = None; import srft_jax.models.tokenizer"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
