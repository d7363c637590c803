"""What the wrapper promises of the tokenizers and chat templates of every family."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import CHATML, FAMILIES, completion_ids, prompt_ids, write_family
from transformers import PreTrainedTokenizerFast

from srft_jax.config import UsageError
from srft_jax.models.tokenizer import load_tokenizer

families = pytest.mark.parametrize("name", FAMILIES)
SYSTEM_IS_REFUSED = {"mistral"}
# Each family's control tokens, and bits of them, beside what merges with a template's line ends.
PIECES = ["\n", " ", "  hello", "world", "é", "7 + 5", "<|im", "_end|>", "[", "</", "\n\nuser", "▁"]
CONTROLS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end_header_id|>", "[INST]", "</s>"]
CONTROLS += ["<end_of_turn>", "<start_of_turn>", "<|endoftext|>", "<eos>", "<s>"]


def is_harmless(text):
    """Some pieces together spell a control token: "<|im" and "_end|>"."""
    return text.strip() and not any(token in text for token in CONTROLS)


harmless = st.lists(st.sampled_from(PIECES), min_size=1).map("".join).filter(is_harmless)
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    path = tmp_path_factory.mktemp("families")
    return {name: write_family(name, path / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def tokenizers(directories):
    return {name: load_tokenizer(path) for name, path in directories.items()}


@pytest.fixture(scope="module")
def theirs(directories):
    """transformers' tokenizers, which take control tokens in data for control tokens."""
    return {
        name: PreTrainedTokenizerFast.from_pretrained(path) for name, path in directories.items()
    }


def their_ids(backend, turns, **options):
    messages = [{"role": role, "content": content} for role, content in turns]
    options |= dict(return_dict=False, date_string="26 Jul 2024")  # as ours says
    return backend.apply_chat_template(messages, **options)


@families
def test_harmless_conversations_have_the_ids_of_transformers(name, tokenizers, theirs):
    ours, backend = tokenizers[name], theirs[name]

    @quick
    @given(harmless, st.lists(st.tuples(harmless, harmless), max_size=2), st.none() | harmless)
    def check(prompt, earlier, system):
        history = [turn for q, a in earlier for turn in (("user", q), ("assistant", a))]
        if system is not None and name not in SYSTEM_IS_REFUSED:
            history.insert(0, ("system", system))
        turns = [*history, ("user", prompt)]
        expected = their_ids(backend, turns, add_generation_prompt=True)
        assert prompt_ids(ours, prompt, history) == expected

    check()


@families
def test_a_whole_turn_is_the_templates(name, tokenizers, theirs):
    """Prompt and completion together, where the template adds nothing of its own."""
    ours = tokenizers[name]
    text = "Let me think.\n\nThe answer is 12."
    turns = [("user", "What is 7 + 5?"), ("assistant", text)]
    if name == "qwen3":
        turns[1] = ("assistant", text := f"<think>\nhm\n</think>\n\n{text}")
    ids = prompt_ids(ours, turns[0][1]) + completion_ids(ours, text)
    whole = their_ids(theirs[name], turns)
    assert whole[: len(ids)] == ids
    assert ours.spell(whole[len(ids) :]) in ("", "\n")  # what follows the turn is not trained
    assert ours.decode(completion_ids(ours, text)) == text


@families
def test_control_tokens_spelled_in_data_are_text(name, tokenizers, theirs):
    ours, backend = tokenizers[name], theirs[name]
    controls = [token for token in CONTROLS if token in backend.get_vocab()]
    assert len(controls) >= 2
    template = [id for id in prompt_ids(ours, "x") if id in ours.special_ids]
    pieces = st.lists(st.sampled_from(controls + PIECES[:-1]), min_size=1)
    pieces = pieces.map("".join).filter(str.strip)

    @quick
    @given(pieces)
    def check(text):
        ids = prompt_ids(ours, text)
        assert [id for id in ids if id in ours.special_ids] == template
        assert text.strip() in ours.spell(ids)
        *completion, last = completion_ids(ours, text)
        assert last == ours.eos_id and not ours.special_ids & set(completion)
        assert ours.spell(completion) in (text, text.removeprefix(" "))  # as Mistral's decoder does

    check()
    assert their_ids(backend, [("user", controls[0])]) != prompt_ids(ours, controls[0])


def test_what_ends_a_turn_is_trained_and_all_that_stop_are_known(tokenizers):
    spelled = {
        name: [tokenizer.spell([id]) for id in (tokenizer.eos_id, *tokenizer.stop_ids)]
        for name, tokenizer in tokenizers.items()
    }
    assert spelled == {
        "qwen2.5": ["<|im_end|>", "<|im_end|>", "<|endoftext|>"],
        "qwen3": ["<|im_end|>", "<|im_end|>", "<|endoftext|>"],
        "llama3": ["<|eot_id|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"],
        "mistral": ["</s>", "</s>"],
        "gemma3": ["<end_of_turn>", "<end_of_turn>", "<eos>"],
    }
    for tokenizer in tokenizers.values():
        assert tokenizer.stop_ids[0] == tokenizer.eos_id


def test_special_tokens_that_nothing_writes_need_no_row_of_the_embedding(tmp_path):
    path = write_family("qwen2.5", tmp_path / "model")
    before = load_tokenizer(path).vocab_size
    content = json.loads((path / "tokenizer.json").read_text())
    image = content["added_tokens"][0] | {"content": "<image>", "id": before}
    content["added_tokens"].append(image)
    (path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert before in tokenizer.special_ids and tokenizer.vocab_size == before
    assert max(prompt_ids(tokenizer, "<image>")) < before
    content["added_tokens"][-1]["special"] = False  # now it may be spelled in data
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(path).vocab_size == before + 1


@pytest.mark.parametrize("template", [FAMILIES["llama3"][1]["chat_template"], None])
def test_the_date_is_always_the_same(template, tmp_path):
    path = write_family("llama3", tmp_path / "model")
    template = template or "{{ messages[0].content }} {{ strftime_now('%Y-%m-%d') }}"
    (path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(path)
    text = tokenizer.decode(prompt_ids(tokenizer, "hello"))
    assert "26 Jul 2024" in text or text == "hello 2024-07-26"


def test_the_template_may_stand_in_other_places(tmp_path, directories):
    expected = prompt_ids(load_tokenizer(directories["qwen2.5"]), "hello")
    path = write_family("qwen2.5", tmp_path / "model")
    config = json.loads((path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert prompt_ids(load_tokenizer(path), "hello") == expected
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named[:1]}))
    with pytest.raises(UsageError, match="chat templates tool_use, but none called default"):
        load_tokenizer(path)
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="no chat template, .* set model.chat_template"):
        load_tokenizer(path)
    (path / "chat_template.jinja").write_text(CHATML)
    assert prompt_ids(load_tokenizer(path), "hello") == expected


def test_a_template_of_the_users_own(tmp_path):
    """It goes before the model's and is exported."""
    path = write_family("qwen2.5", tmp_path / "model")
    file = tmp_path / "own.jinja"
    file.write_text("Question: {{ messages[-1]['content'] }}\nAnswer:")
    ours = load_tokenizer(path, str(file))
    assert ours.decode(prompt_ids(ours, "7 + 5?")) == "Question: 7 + 5?\nAnswer:"
    assert ours.spell([ours.eos_id]) == "<|im_end|>"  # the tokenizer's
    ours.save(tmp_path / "export")
    expected = prompt_ids(ours, "7 + 5?")
    assert prompt_ids(load_tokenizer(tmp_path / "export"), "7 + 5?") == expected
    with pytest.raises(UsageError, match="model.chat_template = .*none.jinja cannot be read"):
        load_tokenizer(path, str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "is not valid Jinja: line 1, "),
        ("fixed {{ bos_token }}", "drops the user turn 'question'"),
        ("{{ raise_exception('no!') }}", "refuses a conversation with the roles user: no!"),
        ("{{ messages[0].content + 1 }}", "refuses a conversation .* concatenate"),
    ],
)
def test_templates_that_cannot_be_used(template, message, tmp_path):
    path = write_family("qwen2.5", tmp_path / "model")
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match=f"the chat template of {path} {message}"):
        load_tokenizer(path)


def test_a_system_turn_that_the_template_refuses_or_drops(tokenizers, tmp_path):
    with pytest.raises(UsageError, match="roles system, user: Conversation roles must alternate"):
        prompt_ids(tokenizers["mistral"], "hello", [("system", "Be brief.")])
    path = write_family("qwen2.5", tmp_path / "model")
    (path / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    with pytest.raises(UsageError, match="drops the system turn 'Be brief.'"):
        prompt_ids(load_tokenizer(path), "hello", [("system", "Be brief.")])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "cannot be read: "),
        ("tokenizer.json", '{"model": {"type": "New"}}', "cannot be read: "),
        ("generation_config.json", '{"eos_token_id": [5, 99999]}', "eos_token_id .99999., which"),
        ("generation_config.json", "{", "generation_config.json"),
    ],
)
def test_broken_files(file, content, message, tmp_path):
    path = write_family("qwen2.5", tmp_path / "model")
    (path / file).write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_of_another_kind(name, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(UsageError, match=f"holds {name} but no tokenizer.json.*save_pretrained"):
        load_tokenizer(tmp_path)
