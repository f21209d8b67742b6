"Rows of tokens and passkey books with real tokenizers and real files."
import itertools
import json
import random

import datasets
import pytest
import torch
from small import other_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flashmorph.data.mixture import Mixture, batches, stack
from flashmorph.data.passkeys import (
    BookTemplate,
    Passkeys,
    PasskeysConfig,
    encode_piece,
    ordinal,
    passkeys,
)
from flashmorph.data.sources import documents
from flashmorph.data.stories import Stories
from flashmorph.data.text import (
    SentenceEnds,
    TextConfig,
    TokenBlocks,
    text,
    tokenizer_fingerprint,
)
from flashmorph.run.pretrain import build_tokenizer

LETTERS = [chr(i) for i in range(32, 127)]


def sentencepiece_like(stops: str = ".") -> PreTrainedTokenizerFast:
    "Puts a space in front of whatever it is given, as Llama-2's does."
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tok.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special,
                                  initial_alphabet=[*LETTERS, "▁"])
    tok.train_from_iterator((Stories(3)[i].replace(".", stops) for i in range(50)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


TOKENIZERS = {"bundled": build_tokenizer, "byte-level": other_tokenizer,
              "space-in-front": sentencepiece_like,
              "space-in-front, with ...": lambda: sentencepiece_like("...")}


class Bytes:
    "One token per byte."
    eos_token_id, bos_token_id = 0, None
    def __call__(self, words, **_): return {"input_ids": list(words.encode())}
    def decode(self, ids, **_): return bytes(ids).decode(errors="replace")


def rows_of(stream, count: int) -> list[torch.Tensor]:
    return [row["input_ids"] for row in itertools.islice(stream, count)]


def copied(stream, make):
    "Another stream, at the position of `stream` as a checkpoint would hold it."
    other = make()
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    return other


# Rows

def write(path, docs):
    if path.suffix == ".txt": path.write_text("\n".join(docs))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": doc, "other": 1}) for doc in docs))
    else: datasets.Dataset.from_dict({"text": docs}).to_parquet(str(path))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_files_stream_and_resume(tmp_path, suffix):
    "A stream stopped all along three passes has the same rows, and the same positions."
    tokenizer, docs = build_tokenizer(), [Stories(1)[i] for i in range(7)]
    path = write(tmp_path / f"a{suffix}", docs)
    def make(): return text(tokenizer, path, length=50)
    ids = [tokenizer(doc)["input_ids"] + [tokenizer.eos_token_id] for doc in docs]
    expected = list(itertools.chain.from_iterable(ids))
    stream = make()
    rows, positions = [], []
    for row in itertools.islice(stream, 3 * len(expected) // 50):
        rows.append(row["input_ids"])
        positions.append(stream.state_dict())
    assert torch.cat(rows).tolist() == (expected * 3)[:50 * len(rows)]
    # stopped before every fourth row
    stream = make()
    for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
        if i % 4 == 0: stream = copied(stream, make)
        assert torch.equal(next(iter(stream))["input_ids"], row)
        assert stream.state_dict() == position


@pytest.mark.parametrize("length", [100, 333])
def test_killed_in_the_last_document_of_the_first_pass(tmp_path, length):
    "L3: what is left of the last document comes first, whatever is left."
    path = write(tmp_path / "a.txt", ["Anna went home. " * 40] * 3)
    def make(): return text(Bytes(), path, length=length)
    rows = rows_of(make(), 2000 // length * 2)
    stream = make()
    for i, row in enumerate(rows):
        stream = copied(stream, make)
        assert torch.equal(next(iter(stream))["input_ids"], row), i
    assert stream.epoch >= 1


def test_the_position_of_a_long_document_is_small(tmp_path):
    "L8: an offset, and not the tokens."
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"w{i}" for i in range(200_000)))
    def make(): return text(Bytes(), path, length=1000)
    stream = make()
    rows_of(stream, 700)
    assert len(json.dumps(stream.state_dict())) < 1000
    assert torch.equal(rows_of(copied(stream, make), 1)[0], rows_of(stream, 1)[0])


FIRST_EDITION = {"examples_iterable": {
    "examples_iterable": {"shard_idx": 0, "shard_example_idx": 3, "type": "ArrowExamplesIterable"},
    "previous_state": {"shard_idx": 0, "shard_example_idx": 0, "type": "ArrowExamplesIterable"},
    "batch_idx": 3, "num_chunks_since_previous_state": 3, "cropped_chunk_length": 0,
    "type": "RebatchedArrowExamplesIterable"}, "epoch": 0}


@pytest.mark.parametrize("left, epoch", [(0, 0), (13, 0), (300, 0), (13, 2)])
def test_positions_of_the_first_edition(tmp_path, left, epoch):
    "They hold the tokens that are left of the documents read, and go on exactly."
    docs = [Stories(1)[i] for i in range(6)]
    path = write(tmp_path / "a.jsonl", docs)
    ids = [i for doc in docs for i in (*doc.encode(), 0)]
    at = sum(len(doc.encode()) + 1 for doc in docs[:3]) - left
    def make(): return text(Bytes(), path, length=100)
    stream = make()
    position = {**FIRST_EDITION, "epoch": epoch}
    stream.load_state_dict({"docs": position, "rest": ids[at:at + left], "epoch": epoch})
    expected = torch.tensor((ids + ids)[at:at + 1000]).view(10, 100)
    for row in expected:
        stream = copied(stream, make)
        assert torch.equal(next(iter(stream))["input_ids"], row)
    stories = text(Bytes(), length=100)
    stories.load_state_dict({"docs": {"index": 1}, "rest": [7] * 30, "epoch": 0})
    assert next(iter(stories))["input_ids"].tolist() == [7] * 30 + list(Stories()[1].encode())[:70]


def damages(state):
    "Every way to lose, rename or replace one value of a nested state."
    for key, value in state.items():
        rest = {name: other for name, other in state.items() if name != key}
        yield rest
        yield {**rest, f"{key}x": value}
        yield {**rest, key: "x" if not isinstance(value, str) else 3}
        if isinstance(value, dict): yield from ({**rest, key: inner} for inner in damages(value))


@pytest.mark.parametrize("kind", ["stories", "file", "books", "mixture"])
def test_damaged_positions_are_refused(tmp_path, kind):
    "T7: with a `ValueError`, and the stream stays where it was."
    path = write(tmp_path / "a.jsonl", [Stories(1)[i] for i in range(6)])
    def make():
        if kind == "stories": return text(Bytes(), length=100)
        if kind == "file": return text(Bytes(), path, length=100)
        if kind == "books": return passkeys(Bytes(), length=400, keys=1, words_per_key=1)
        return Mixture([text(Bytes(), length=100), text(Bytes(), length=100, seed=1)], [1, 1])
    stream = make()
    rows_of(stream, 3)
    known = json.dumps(stream.state_dict())
    count = 0
    for damaged in damages(json.loads(known)):
        other = copied(stream, make)
        try: other.load_state_dict(damaged)
        except ValueError: count += 1
        else: pytest.fail(f"accepted {damaged}")
        assert json.dumps(other.state_dict()) == known
    assert count >= 6
    with pytest.raises(ValueError, match="damaged"): make().load_state_dict(None)


def test_a_text_that_became_shorter_is_noticed(tmp_path):
    path = write(tmp_path / "a.txt", ["Anna went home. " * 40])
    stream = text(Bytes(), path, length=100)
    rows_of(stream, 5)
    position = stream.state_dict()
    path.write_text("Anna went home.")
    stream = text(Bytes(), path, length=100)
    stream.load_state_dict(position)
    with pytest.raises(ValueError, match="has changed"): next(iter(stream))


def test_empty_sources(tmp_path):
    path = tmp_path / "a.txt"
    for content in ("\n\n\n", "\n" * 5000):
        path.write_text(content)
        with pytest.raises(ValueError, match="the text source is empty"):
            next(iter(text(Bytes(), path)))


def test_folder_and_list_of_files(tmp_path):
    tokenizer = build_tokenizer()
    for i in range(2): write(tmp_path / f"{i}.jsonl", [Stories(i)[0]])
    files = [str(tmp_path / f"{i}.jsonl") for i in range(2)]
    one, two = (rows_of(text(tokenizer, source, length=40), 9) for source in (tmp_path, files))
    assert torch.equal(torch.stack(one), torch.stack(two))
    write(tmp_path / "c.txt", ["hello"])
    with pytest.raises(ValueError, match="of one kind"): documents(tmp_path)
    (tmp_path / "d.csv").write_text("x")
    with pytest.raises(ValueError, match="expected one of"): documents(tmp_path / "d.csv")


# Settings

HUGE = 10**30
NO_NUMBERS = (float("nan"), float("inf"), HUGE, -1, 0, 1.5, "x", "", None, True, [1, 2], {"a": 1})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("key", ["length", "keys", "words_per_key", "depths"])
def test_numbers_are_integers_in_a_range(key, value):
    "S8: nan, inf and 1e30 ran for ever."
    with pytest.raises(ValueError, match=f"passkeys.{key}: expected an integer"):
        passkeys(Bytes(), **{key: value})
    if key == "length":
        with pytest.raises(ValueError, match="text.length: expected an integer"):
            text(Bytes(), length=value)


@pytest.mark.parametrize("words", [[], [""], ["alpha", " "], "abc", "alpha,bravo", 0, 3, [None],
                                   [1, 2], float("nan"), {"a": 1}], ids=repr)
def test_words_are_a_list_of_words(words):
    "S19: an empty list was taken for the alphabet, a string for its letters."
    with pytest.raises(ValueError, match="passkeys.words: expected a list of"):
        passkeys(Bytes(), words=words)


@pytest.mark.parametrize("make, message", [
    (lambda: text(Bytes(), lenght=3), "unknown setting text.lenght; did you mean 'length'"),
    (lambda: text(Bytes(), passkeys=0.5), "use `Mixture` and `passkeys`"),
    (lambda: TextConfig(passkeys=1.5), "text.passkeys: expected a number >= 0 and <= 1"),
    (lambda: passkeys(Bytes(), shuffle=1), "passkeys.shuffle: expected true or false"),
    (lambda: passkeys(Bytes(), shuffel=True), "did you mean 'shuffle'"),
    (lambda: Passkeys(Bytes(), documents(), source="a.txt"), "the background is given"),
])
def test_settings(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_a_thousand_passkeys_of_a_thousand_words_are_counted():
    "The largest settings end, with the shortest length that would do."
    with pytest.raises(ValueError, match="the shortest possible length is [0-9]{7,}"):
        passkeys(build_tokenizer(), length=1000, keys=1000, words_per_key=1000)


@pytest.mark.parametrize("tokenizer", [None, 3, lambda words: words])
def test_what_is_no_tokenizer(tokenizer):
    for make in (text, passkeys):
        with pytest.raises(TypeError, match="tokenizer: expected"): make(tokenizer)


def test_a_tokenizer_that_fails_is_named():
    "T2: a vocabulary of words without a token for unknown ones."
    tok = Tokenizer(models.WordLevel({"Anna": 0, "</s>": 1}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>")
    with pytest.raises(ValueError, match="the tokenizer cannot encode 'Anna the"):
        next(iter(text(tokenizer)))


# Books

@pytest.mark.parametrize("name", TOKENIZERS)
def test_books_of_any_tokenizer(name):
    "Exact length; each answer is marked as one run, and stands once more in its needle."
    tokenizer, rng = TOKENIZERS[name](), random.Random()
    for _ in range(30):
        shape = {"keys": rng.randint(1, 11), "words_per_key": rng.randint(1, 6)}
        shortest = Passkeys(tokenizer, documents(), 10**6, **shape).shortest
        length = shortest + rng.choice([0, 1, rng.randint(2, 300)])
        more = {"shuffle": rng.random() < .5, "seed": rng.randrange(10**6)}
        book = next(iter(passkeys(tokenizer, length=length, **shape, **more)))
        ids, answers = book["input_ids"], book["answers"]
        assert ids.shape == answers.shape == (length,)
        if tokenizer.bos_token_id is not None:
            assert ids[0] == tokenizer.bos_token_id and (ids[1:] != ids[0]).all()
        for n in range(1, shape["keys"] + 1):
            at = (answers == n).nonzero()[:, 0]
            assert len(at) == at[-1] - at[0] + 1
            answer = ids[at].tolist()
            words = tokenizer.decode(answer).split()
            assert len(words) == shape["words_per_key"]
            assert answer == encode_piece(tokenizer, " " + " ".join(words))
            key = " ".join(words)
            needle = f" Remember, the {ordinal(n)} passkey to the vault is: {key}."
            needle = encode_piece(tokenizer, needle)
            starts = [i for i in range(length) if ids[i:i + len(needle)].tolist() == needle]
            assert len(starts) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_answers_end_as_their_needles_do(name):
    "42: 'alpha.' and not 'alpha .', also where the tokenizer knows '..' or a space in front."
    tokenizer = TOKENIZERS[name]()
    for book in itertools.islice(passkeys(tokenizer, length=900, keys=2, words_per_key=2), 5):
        whole = tokenizer.decode(book["input_ids"])
        said = tokenizer.decode(book["input_ids"][book["answers"] == 2]).strip()
        assert whole.count(f"{said}.") == 2 and whole.endswith(f"{said}.")


def depths_of(tokenizer, source, count=80, **shape) -> torch.Tensor:
    "Where the needles of books lie, from 0 to 1."
    books = passkeys(tokenizer, source, keys=1, words_per_key=2, **shape)
    wholes = [tokenizer.decode(book["input_ids"]) for book in itertools.islice(books, count)]
    return torch.tensor([whole.index("Remember,") / len(whole) for whole in wholes])


CHINESE = ["小明住在河边。他每天去市场买鱼。晚上他回家吃饭。天气很好。大家都很高兴。",
           "山上有一座古老的塔。塔里住着一位老人。老人养了一只猫。猫喜欢睡觉。"]
HINDI = ["राम नदी के पास रहता था। वह रोज़ बाज़ार जाता था। शाम को वह घर आया।"]
UNMARKED = ["anna went home and boris stayed and clara saw the castle by the river and"]
SCRIPTS = {"Chinese": CHINESE, "Hindi": HINDI, "no marks": UNMARKED, "stories": [Stories(2)[0]]}


def byte_level(docs) -> PreTrainedTokenizerFast:
    "A byte-level tokenizer that has seen little of `docs`, so that characters are split."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator([*docs, "Remember, the first passkey to the vault is alpha."], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", SCRIPTS)
def test_needles_reach_every_depth_in_any_script(tmp_path, name):
    "41: with Chinese text, all needles lay at 2% of their books; and no character is cut."
    path = write(tmp_path / "a.txt", SCRIPTS[name] * 300)
    for tokenizer in (byte_level(SCRIPTS[name]), Bytes()):
        depths = depths_of(tokenizer, path, length=1200)
        counts = torch.histc(depths, 4, 0, .8)
        assert (counts >= 6).all(), counts
        books = passkeys(tokenizer, path, length=1200, keys=2, words_per_key=1)
        for book in itertools.islice(books, 5):
            assert "\ufffd Remember" not in tokenizer.decode(book["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_needles_reach_every_depth(name):
    depths = depths_of(TOKENIZERS[name](), "stories", count=200, length=700)
    assert (torch.histc(depths, 4, 0, .9) > 20).all()


@pytest.mark.parametrize("name", ["Chinese", "Hindi"])
def test_needles_stand_between_sentences(tmp_path, name):
    path = write(tmp_path / "a.txt", SCRIPTS[name] * 300)
    tokenizer = byte_level(SCRIPTS[name])
    marks = ("。", "।", ".")
    books = passkeys(tokenizer, path, length=900, keys=2, words_per_key=1)
    for book in itertools.islice(books, 10):
        before = tokenizer.decode(book["input_ids"]).split(" Remember,")[:-1]
        assert all(part.replace("</s>", "").rstrip().endswith(marks) for part in before)


def test_sentence_ends_against_the_text():
    "With one token a character, the ends are where the marks are."
    class Characters(Bytes):
        def decode(self, ids, **_): return "".join(map(chr, ids))
    words = 'Who? "Me." Nein! 你好。क्या। Ja… (so.) end'
    ends = SentenceEnds(Characters())(list(map(ord, words)))
    assert ends == [0, *(i + 1 for i, c in enumerate(words) if c in ".?!。।…")]


@pytest.mark.parametrize("n", [0, -1, 1.5, "x", None, True])
def test_ordinals_begin_at_one(n):
    with pytest.raises(ValueError, match="ordinal: expected an integer >= 1"): ordinal(n)


@pytest.mark.parametrize("piece", [
    {"needle": "{ordinal} {words} {x}"}, {"question": "{}{ordinal}"}, {"opening": 3},
    {"opening": "{ordinal}"}, {"stop": "}"}, {"answer": None}, {"needle": "{words}"},
])
def test_templates(piece):
    (name,) = piece
    with pytest.raises(ValueError, match=f"template.{name}: expected text"): BookTemplate(**piece)


def test_what_is_no_template():
    with pytest.raises(TypeError, match="template: expected a BookTemplate"):
        passkeys(Bytes(), length=900, keys=1, words_per_key=1, template="x")


# Mixtures, batches, fingerprints

def test_a_mixture_needs_rows_of_one_length():
    streams = [text(Bytes(), length=50), text(Bytes(), length=96)]
    with pytest.raises(ValueError, match="rows of one length"):
        rows_of(Mixture(streams, [1, 1]), 20)


@pytest.mark.parametrize("weights", [[], [1], [1, -1], [0, 0], [1, float("nan")], [1, "x"], None,
                                     [1, float("inf")]])
def test_weights(weights):
    streams = [text(Bytes(), length=50)] * 2
    with pytest.raises(ValueError, match="as many weights"): Mixture(streams, weights)


def test_batches_against_slices():
    rows = [{"input_ids": torch.randint(9, (3,)), "answers": torch.ones(3)} for _ in range(11)]
    whole = torch.stack([row["input_ids"] for row in rows])
    for size in range(1, 13):
        for count in (None, 1, 7, 11):
            made = list(batches(rows, size, count))
            assert torch.equal(torch.cat([batch["input_ids"] for batch in made]), whole[:count])
            assert all(len(batch["answers"]) == size for batch in made[:-1])


@pytest.mark.parametrize("rows, error", [
    ([], ValueError),
    ([{"a": [1]}, {"a": [1, 2]}], ValueError), ([{"a": [1]}, {"b": [1]}], ValueError),
    ([[1, 2]], TypeError), ([None], TypeError), ([torch.ones(3)], TypeError),
])
def test_rows_that_make_no_batch(rows, error):
    with pytest.raises(error, match="row"): stack(rows)


def test_fingerprints(tmp_path):
    "S3: they know tokenizer, source and settings, and not how much was read."
    path = write(tmp_path / "a.txt", [Stories(1)[i] for i in range(6)])
    shape = {"length": 400, "keys": 1, "words_per_key": 1}
    def streams(tokenizer, source):
        yield text(tokenizer, source, length=60)
        yield passkeys(tokenizer, source, **shape)
        yield Mixture([text(tokenizer, source), text(tokenizer, "stories")], [1, 1])
    prints = [stream.fingerprint() for stream in streams(Bytes(), path)]
    for stream, known in zip(streams(Bytes(), path), prints):
        rows_of(stream, 2)
        assert stream.fingerprint() == known
    other = [stream.fingerprint() for stream in streams(build_tokenizer(), path)]
    write(path, [Stories(1)[i] for i in (1, 0, 2, 3, 4, 5)])
    changed = [stream.fingerprint() for stream in streams(Bytes(), path)]
    assert len({*prints, *other, *changed}) == 9


def test_fingerprint_of_a_tokenizer(tmp_path):
    "Two swapped words are noticed; saving, loading and use are not."
    tokenizer = build_tokenizer()
    known = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    loaded(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(loaded) == known
    words = json.loads((tmp_path / "tokenizer.json").read_text())
    one, two = words["model"]["vocab"][-2:]
    one[0], two[0] = two[0], one[0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    swapped = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(swapped) != known


def test_a_config_makes_the_stream_of_its_keywords():
    config = PasskeysConfig(length=400, keys=2, words_per_key=1, words=["red", "blue"])
    one = passkeys(Bytes(), **vars(config))
    two = passkeys(Bytes(), length=400, keys=2, words_per_key=1, words=["red", "blue"])
    assert one.fingerprint() == two.fingerprint()
    assert isinstance(one.blocks, TokenBlocks)
