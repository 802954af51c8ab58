"""The tokenizer: the same ids as the tokenizer it came from, harmless user text, whole characters only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_cpu import _core
from runtime_cpu._core import byte_alphabet
from runtime_cpu.synth.vocabulary import synthetic_vocabulary
from runtime_cpu.text.tokenizer import Tokenizer, TokenizerError
from tests.runtime_cpu.gguf_vocabulary import CONTROL, CORPUS, USER_DEFINED, read_metadata, train, write_gguf

pieces = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(categories=["Lo"], min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=10),
    st.text(st.sampled_from("\u0000\u0007\t\r\n\u200d\ufeff\u0301\u0327 \u00a0\u3000"), max_size=10),
    st.text(st.sampled_from("🎉👩👨\u200d🏽🇨🇳❤️"), max_size=8),
    st.sampled_from([*CORPUS, *CONTROL, *USER_DEFINED, "<|im_", "end|>", "'LL", "  \n\n ", "e\u0301", "①²½"]),
)
texts = st.lists(pieces, max_size=8).map("".join)


@pytest.fixture(scope="module")
def origin() -> tokenizers.Tokenizer:
    return train()


@pytest.fixture(scope="module")
def metadata(origin: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path: Path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    write_gguf(path, origin)
    return read_metadata(path)


@pytest.fixture(scope="module")
def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(metadata)


@settings(max_examples=400, deadline=None)
@given(text=texts)
def test_ids_equal_those_of_the_origin(origin: tokenizers.Tokenizer, tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text, parse_special=True) == origin.encode(text, add_special_tokens=False).ids


def test_ids_equal_the_library_s_with_a_vocabulary_of_full_size() -> None:
    metadata = synthetic_vocabulary(151_936)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    vocab = {text: index for index, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == 1}
    library = train(260)  # for its normalizer and pre-tokenizer
    library.model = tokenizers.models.BPE(vocab=vocab, merges=merges)
    docs = Path(__file__).parents[2] / "docs"
    text = "".join(page.read_text() for page in sorted(docs.glob("*.md"))) + "".join(CORPUS)
    for special in (*CONTROL, *USER_DEFINED):  # the library's wrapper knows those of the small vocabulary
        text = text.replace(special, "")
    expected = library.encode(text, add_special_tokens=False).ids
    assert Tokenizer.from_metadata(metadata).encode(text) == expected and len(set(expected)) > 1000


def test_a_file_gives_the_same_tokenizer_as_its_metadata() -> None:
    model = _core.Model.open(str(Path(__file__).parents[1] / "golden" / "gguf" / "tiny-21b-q4_0.gguf"))
    of_file, of_metadata = Tokenizer.from_model(model), Tokenizer.from_metadata(model.metadata())
    text = "".join(CORPUS) + "".join(CONTROL)
    assert of_file.encode(text, parse_special=True) == of_metadata.encode(text, parse_special=True)
    assert of_file.control_tokens == of_metadata.control_tokens and of_file.stop_ids == of_metadata.stop_ids
    for index in range(of_file.vocab_size):
        assert of_file.token_bytes(index) == of_metadata.token_bytes(index)


blanks = st.text(st.sampled_from(" \n\r\t\u00a0\u3000ab1!'"), max_size=40)


@settings(max_examples=500, deadline=None)
@given(text=st.one_of(texts, blanks), window=st.integers(1, 9))
def test_where_a_long_text_is_cut_changes_nothing(tokenizer: Tokenizer, text: str, window: int) -> None:
    expected = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime_cpu.text.tokenizer.WINDOW_CHARACTERS", window)
        assert tokenizer.encode(text) == expected


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_user_text_makes_no_control_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_control(token_id) for token_id in ids)
    import unicodedata

    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_plain_text_has_the_same_ids_either_way(tokenizer: Tokenizer, text: str) -> None:
    for control in CONTROL:
        text = text.replace(control, "")
    if not any(control in text for control in CONTROL):
        assert tokenizer.encode(text) == tokenizer.encode(text, parse_special=True)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_stream_gives_whole_characters_and_the_same_text(
    origin: tokenizers.Tokenizer, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, origin.get_vocab_size() - 1), max_size=40))
    stream = tokenizer.stream(skip_control=False)
    streamed = [stream.push(token_id) for token_id in ids] + [stream.finish()]
    assert "".join(streamed) == tokenizer.decode(ids) == origin.decode(ids, skip_special_tokens=False)


def test_stream_holds_a_character_until_it_is_whole(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    ids = [byte_id for byte in "🎉".encode() for byte_id in [_byte_id(tokenizer, byte)]]
    assert [stream.push(token_id) for token_id in ids] == ["", "", "", "🎉"]
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_stream_hides_control_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|im_end|>b", parse_special=True)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) == "ab"
    assert tokenizer.decode(ids, skip_control=True) == "ab"


def test_lone_surrogates_do_not_raise(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_stop_ids_and_sizes(tokenizer: Tokenizer, origin: tokenizers.Tokenizer) -> None:
    assert tokenizer.stop_ids == {origin.token_to_id("<|endoftext|>"), origin.token_to_id("<|im_end|>")}
    assert tokenizer.vocab_size == origin.get_vocab_size() + 8
    assert tokenizer.encode("") == []
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.token_bytes(tokenizer.vocab_size)
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.decode([-1])


def test_bos_is_added_as_the_file_says(metadata: dict[str, Any]) -> None:
    with_bos = Tokenizer.from_metadata({**metadata, "tokenizer.ggml.add_bos_token": True})
    assert with_bos.encode("a")[0] == with_bos.bos_id
    assert with_bos.encode("a", add_bos=False)[0] != with_bos.bos_id


def test_without_types_every_token_is_an_ordinary_one(metadata: dict[str, Any], tokenizer: Tokenizer) -> None:
    size = 256 + len(metadata["tokenizer.ggml.merges"])  # the special tokens follow, which spell no bytes
    untyped = {
        **{key: value for key, value in metadata.items() if not key.endswith(("token_type", "token_id"))},
        **change("tokens", metadata["tokenizer.ggml.tokens"][:size]),
    }
    plain = Tokenizer.from_metadata(untyped)
    assert not plain.control_tokens and plain.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


def change(key: str, value: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change("model", "llama"), "tokenizer.ggml.model is 'llama'"),
        (change("model", None), "has no tokenizer.ggml.model"),
        (change("model", 3), "should be str"),
        (change("pre", "llama-bpe"), "tokenizer.ggml.pre is 'llama-bpe'"),
        (change("tokens", None), "has no tokenizer.ggml.tokens"),
        (change("tokens", [1, 2]), r"tokenizer.ggml.tokens\[0\] should be text"),
        (change("merges", ["ab"]), r"tokenizer.ggml.merges\[0\] is 'ab'"),
        (change("merges", ["a b c"]), r"tokenizer.ggml.merges\[0\]"),
        (change("merges", ["a ž"]), "do not fit tokenizer.ggml.tokens: 'ž' of the merge 'a ž' is no token"),
        (change("merges", ["\ud800 a"]), r"tokenizer.ggml.merges\[0\] is no text"),
        (change("merges", ["<|im_ end|>"]), "special token"),
        (change("token_type", [1]), "token_type has 1 entries"),
        (change("token_type", []), "token_type has 0 entries"),
        (change("eos_token_id", 10**6), "eos_token_id is 1000000"),
        (change("eos_token_id", "x"), "should be an integer"),
        (change("bos_token_id", -1), "bos_token_id is -1"),
    ],
)
def test_malformed_metadata_is_named(metadata: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    values = {key: value for key, value in {**metadata, **changed}.items() if value is not None}
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(values)


def test_a_vocabulary_that_cannot_spell_every_byte_is_refused(metadata: dict[str, Any]) -> None:
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[tokens.index("q")] = "qq"
    with pytest.raises(TokenizerError, match="lacks 1 of the 256 bytes, first 0x71"):
        Tokenizer.from_metadata({**metadata, **change("tokens", tokens), **change("merges", [])})


def test_a_repeated_token_is_refused(metadata: dict[str, Any]) -> None:
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[300] = tokens[299]
    with pytest.raises(TokenizerError, match="occurs twice, as 299 and 300"):
        Tokenizer.from_metadata({**metadata, **change("tokens", tokens)})


@pytest.mark.parametrize(
    ("index", "text", "kind", "message"),
    [
        (290, "ĠĠ€", 1, r"token 290 \('ĠĠ€'\) has the character '€', which stands for no byte"),
        (290, "", 3, "special token 290 is empty"),
        (290, "<|im_end|>", 3, "repeats another: '<|im_end|>'"),
        (290, "x", 6, "token 290 has type 6"),
    ],
)
def test_a_token_that_cannot_be_is_named(
    metadata: dict[str, Any], index: int, text: str, kind: int, message: str
) -> None:
    tokens, kinds = (list(metadata[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type"))
    tokens[index], kinds[index] = text, kind
    changed = {**change("tokens", tokens), **change("token_type", kinds), **change("merges", [])}
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata({**metadata, **changed})


def test_every_token_has_its_bytes_wherever_special_ones_lie() -> None:
    alphabet = byte_alphabet()
    tokens, kinds, expected = [], [], []
    for byte, character in enumerate(alphabet):
        if byte % 50 == 0:  # the first token is special too
            kind = [3, 4, 5][byte // 50 % 3]
            for text in (f"<|ü{byte}|>", f"<|{byte}|>")[: 1 + byte % 100 // 50]:
                tokens, kinds = [*tokens, text], [*kinds, kind]
                expected.append(text.encode())
        tokens, kinds = [*tokens, character, character * 2], [*kinds, 1, 1]
        expected += [bytes([byte]), bytes([byte, byte])]
    built = Tokenizer(_core.Vocabulary.of(tokens, kinds=kinds, merges=[]))
    assert [built.token_bytes(index) for index in range(len(tokens))] == expected
    assert built.decode(built.encode("<|ü0|>é", parse_special=True)) == "<|ü0|>é"


def _byte_id(tokenizer: Tokenizer, byte: int) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte]))
