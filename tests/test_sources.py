"Where documents come from: names, paths, files, the hub, and what is held out of them."
import gzip
import json
import os
import random
import warnings

import datasets
import pytest
import zstandard

from flashmorph import load_teacher
from flashmorph.data.files import LOADERS, SourceConfig, content_hash
from flashmorph.data.sources import documents, is_held_out
from flashmorph.data.stories import Stories
from flashmorph.data.text import text

TEXTS = [Stories(1)[i] for i in range(300)]


def texts(*arguments, **options) -> list[str]:
    "Everything that a source has, read once."
    return [doc["text"] for doc in documents(*arguments, **options)]


def write(path, docs, column="text"):
    "A file of documents in the format of its suffix."
    lines = "\n".join(json.dumps({column: doc, "n": 1}) for doc in docs)
    if ".txt" in path.name.lower(): content = "\n".join(docs).encode()
    else: content = lines.encode()
    if path.suffix == ".gz": content = gzip.compress(content)
    if path.suffix == ".zst": content = zstandard.compress(content)
    if path.suffix == ".parquet": datasets.Dataset.from_dict({column: docs}).to_parquet(str(path))
    else: path.write_bytes(content)
    return path


# Paths

@pytest.mark.parametrize("name", ["notes [1].txt", "a*b?.txt", "{a,b}.txt", "#1 ü.txt", "B.TXT"])
@pytest.mark.parametrize("folder", ["plain", "[data] *"])
def test_a_path_is_no_pattern(tmp_path, folder, name):
    "29: brackets and stars are letters, in names of files and of folders."
    (tmp_path / folder).mkdir()
    path = write(tmp_path / folder / name, TEXTS[:3])
    write(tmp_path / folder / "other.txt", ["not this"])
    assert texts(path) == TEXTS[:3]
    assert texts([str(path)]) == TEXTS[:3]


def test_home_folder_and_relative_paths(tmp_path, monkeypatch):
    "31: `~` is expanded, and a relative path is one of the working folder."
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "corpus.txt", TEXTS[:2])
    for source in ("~/corpus.txt", "corpus.txt", "./corpus.txt"): assert texts(source) == TEXTS[:2]


@pytest.mark.parametrize("name", ["._a.jsonl", ".a.jsonl", ".DS_Store"])
def test_hidden_files_of_a_folder_are_not_read(tmp_path, name):
    "30: what a Mac or an editor puts there is no text."
    write(tmp_path / "a.jsonl", TEXTS[:2])
    (tmp_path / name).write_bytes(b'{"text": "a backup"}\n')
    (tmp_path / "sub.txt").mkdir()
    assert texts(tmp_path) == TEXTS[:2]


def test_two_colons_are_refused(tmp_path):
    "`datasets` would take them for an address and read nothing."
    path = write(tmp_path / "a::b.txt", TEXTS[:2])
    with pytest.raises(ValueError, match="'::'"): documents(path)


# What is in a file

@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.jsonl", "a.txt.zst",
                                  "a.jsonl.zst", "a.json", "a.parquet"])
def test_formats(tmp_path, name):
    "14: compressed files too."
    path = tmp_path / name
    if name == "a.json": path.write_text(json.dumps([{"text": text} for text in TEXTS[:5]]))
    else: write(path, TEXTS[:5])
    assert texts(path) == TEXTS[:5]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_byte_order_mark(tmp_path, name):
    "53: a mark at the start of a text is no part of it."
    path = write(tmp_path / name, ["\ufeffAnna went home.", "Boris \ufeffstayed."])
    assert texts(path) == ["Anna went home.", "Boris \ufeffstayed."]


def test_a_file_as_one_document(tmp_path):
    "52: lines stay the default."
    book = "Anna went home to\nthe river.\n\nThe castle."
    path = tmp_path / "book.txt"
    path.write_text(book)
    assert texts(path, sample_by="document") == [book]
    assert texts(path, sample_by="paragraph") == ["Anna went home to\nthe river.", "The castle."]
    assert texts(path) == ["Anna went home to", "the river.", "The castle."]


def test_odd_rows_are_reported_once(tmp_path):
    "S21: NUL bytes, and a column that is in some lines only."
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a\0b"}, {"text": "c"}, {"other": 1}, {"text": None}, {"text": "d\0"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert texts(path) == ["a\0b", "c", "d\0"]
    found = sorted(str(warning.message) for warning in caught)
    assert len(found) == 2 and all("a.jsonl" in message for message in found)
    assert "NUL bytes" in found[0] and "without text in column 'text'" in found[1]


@pytest.mark.parametrize("content, message", [
    (b"\xff\xfeA\0n\0", "a.txt: .*codec can't decode"),
    (gzip.compress(b"x", mtime=0), "a.txt: .*codec can't decode"),
])
def test_what_is_no_text_names_the_file(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message): texts(tmp_path / "a.txt")


@pytest.mark.parametrize("value", [3, ["a"], {"a": 1}])
def test_values_that_are_no_text(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}))
    with pytest.raises(ValueError, match="a.jsonl: expected text in column 'text', got"):
        texts(tmp_path / "a.jsonl")


def test_broken_files_name_themselves(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    (tmp_path / "a.jsonl").write_text('{"text": ')
    for name in ("a.parquet", "a.jsonl"):
        with pytest.raises(ValueError, match=name) as caught: texts(tmp_path / name)
        assert "\n" not in str(caught.value)


SKIPPED = bytes.fromhex("502a4d1805000000") + b"hello"       # a frame that says nothing of the text


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.zst"])
def test_truncated_zst(tmp_path, name, frames):
    "A cut is an error, in a frame of text or a frame to skip, and right behind a header."
    path = tmp_path / name
    docs = [f"{i}: {random.Random(i).randbytes(40).hex()}" for i in range(3000)]
    parts = []
    for i in range(frames):
        parts += [SKIPPED, write(path, docs[i::frames]).read_bytes(), zstandard.compress(b"\n")]
    whole = b"".join(parts)
    path.write_bytes(whole)
    assert texts(path) == [doc for i in range(frames) for doc in docs[i::frames]]

    before = len(whole) - sum(map(len, parts[-2:]))             # the last frame of text
    last = before + len(parts[-2])
    for cut in (3, 10, before - 1, before + 1, before + 4, before + 9, before + 12,
                (before + last) // 2, last - 1, last + 3, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{name} is truncated: its last"): texts(path)
    path.write_bytes(whole[:last])                  # between frames: nothing shows what is missing
    assert len(texts(path)) == 3000


# Conversations

CHATS = [[{"role": "user", "content": f"Where is {name}?"},
          {"role": "assistant", "content": f"{name} went home."}] for name in ("Anna", "Boris")]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


def chat_file(path, chats):
    lines = "\n".join(json.dumps({"messages": chat, "n": 1}) for chat in chats).encode()
    if path.suffix == ".zst": lines = zstandard.compress(lines)
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({"messages": chats}).to_parquet(str(path))
    else: path.write_bytes(lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_conversations_are_written_by_the_template(tmp_path, name):
    "Each conversation once, as its messages say, with nothing for fields that it lacks."
    _, tokenizer = load_teacher()
    tokenizer.chat_template = TEMPLATE
    called = [*CHATS[0], {"role": "tool", "content": "By the river.", "name": "look"}]
    path = chat_file(tmp_path / name, [called, [], CHATS[1], None])
    docs = documents(path, column="messages", held_out=None)
    with pytest.warns(UserWarning, match="without text"):
        assert [doc["messages"] for doc in docs] == [called, CHATS[1]]
    assert docs.skipped == 2

    # joined and cut into rows
    def shown(chat): return "".join(f"<{m['role']}>{m['content']}</>" for m in chat)
    both = shown(called), shown(CHATS[1])
    ids = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in both]
    joined = [*ids[0], tokenizer.eos_token_id, *ids[1]]
    blocks = text(tokenizer, path, column="messages", length=len(joined), held_out=None)
    with pytest.warns(UserWarning, match="without text"): found = next(iter(blocks))
    assert found["input_ids"].tolist() == joined


def test_errors_of_conversations_are_one_sentence(tmp_path):
    _, tokenizer = load_teacher()
    path = chat_file(tmp_path / "a.jsonl", CHATS)
    with pytest.raises(ValueError, match="no chat template") as caught:
        next(iter(text(tokenizer, path, column="messages")))
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps({"messages": [{"from": "human", "value": "Hi"}]}))
    with pytest.raises(ValueError, match="a.jsonl: expected text or a conversation in column"):
        next(iter(text(tokenizer, path, column="messages")))
    with pytest.raises(ValueError, match=r"expected a column 'text', got \['messages'\]"):
        next(iter(text(tokenizer, path)))


def test_conversations_are_held_out_by_what_is_said(tmp_path):
    "From every model alike: neither the template nor the order of the fields counts."
    chats = [[{"role": "user", "content": f"Number {n}?"}] for n in range(300)]
    turned = [[dict(reversed(m.items())) for m in chat] for chat in chats]
    sides = []
    for name, rows in (("a.jsonl", chats), ("b.jsonl", turned)):
        path = chat_file(tmp_path / name, rows)
        sides += [[doc["messages"] for doc in documents(path, column="messages", held_out=side)]
                  for side in (True, False)]
    assert sides[:2] == sides[2:] and 0 < len(sides[0]) < 30
    assert len(sides[0]) + len(sides[1]) == 300


def test_skipped_rows_are_counted_over_resumes(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": one} for one in (TEXTS[0], None, "", TEXTS[1], None, TEXTS[2])]
    path.write_text("\n".join(map(json.dumps, rows)))
    whole = documents(path, held_out=None)
    with pytest.warns(UserWarning, match="without text"):
        positions = [whole.state_dict() for _ in whole]
    assert whole.skipped == 3
    assert [place.get("skipped", 0) for place in positions] == [0, 2, 3]
    again = documents(path, held_out=None)
    again.load_state_dict(positions[1])
    with pytest.warns(UserWarning, match="without text"): assert len(list(again)) == 1
    assert again.skipped == 3


# Names and settings

@pytest.mark.parametrize("name", sorted(LOADERS))
def test_names_of_loaders_are_no_text(name):
    "S10: `datasets` would read every file below the working folder."
    with pytest.raises(ValueError, match="a way to read files"): documents(name)


def test_every_loader_is_known():
    "A new version of `datasets` may bring more of them."
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    assert set(_PACKAGED_DATASETS_MODULES) <= LOADERS


@pytest.mark.parametrize("settings", [
    {"split": "test"}, {"split": ""}, {"split": 0}, {"split": float("nan")}, {"split": [1, 2]},
    {"split": True}, {"subset": ""}, {"subset": "en"}, {"subset": -1}, {"subset": {"a": 1}},
])
@pytest.mark.parametrize("source", ["stories", "a.txt"])
def test_split_and_subset_mean_nothing_here(tmp_path, monkeypatch, source, settings):
    "S9: a setting that would be ignored is refused."
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", TEXTS[:2])
    with pytest.raises(ValueError, match="split|subset"): documents(source, **settings)


@pytest.mark.parametrize("source", [3, -1, float("nan"), True, [], {}, None, b"abc", [1, 2], "",
                                    "\0", "x" * 5000, "a b", "a/b/c", ["a/b", "c/d"]])
def test_what_is_no_source(source):
    with pytest.raises(ValueError) as caught: documents(source)
    assert "\n" not in str(caught.value) and "source" in str(caught.value)


@pytest.mark.parametrize("source", ["/nowhere/data", "./nowhere", "~/nowhere", "nowhere.txt"])
def test_missing_paths(source):
    with pytest.raises(ValueError, match="no such file"): documents(source)


@pytest.fixture
def hub(monkeypatch):
    "A stand-in for the hub, which asks for a configuration; the calls it gets."
    calls = []
    really = datasets.load_dataset

    def load(path, name=None, **options):
        if path == "text": return really(path, name, **options)
        calls.append((path, name, options["split"]))
        if name is None: raise ValueError("Config name is missing.\nPlease pick one among 2")
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_hub_datasets(hub):
    assert texts("owner/name", subset="en", split="validation") == TEXTS
    assert hub == [("owner/name", "en", "validation")]
    with pytest.raises(ValueError, match="owner/name.*Config name is missing") as caught:
        documents("owner/name")
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    "50: `datasets` wants a folder; the error names the way out."
    def load(*arguments, **options): raise FileNotFoundError(2, "No such file", "/proc/nowhere")
    monkeypatch.setattr(datasets, "load_dataset", load)
    path = write(tmp_path / "a.txt", TEXTS[:1])
    with pytest.raises(OSError, match="Set HF_HOME"): documents(path)


# Held-out documents

def test_sides_are_apart_and_whole(tmp_path, hub):
    "26: training reads what is not held out, evaluation the rest; for files and for the hub."
    path = write(tmp_path / "a.txt", TEXTS)
    for source in ((path, {}), ("owner/name", {"subset": "en"})):
        kept = texts(source[0], held_out=False, **source[1])
        held = texts(source[0], held_out=True, **source[1])
        assert kept == [text for text in TEXTS if not is_held_out(text)]
        assert held == [text for text in TEXTS if is_held_out(text)] != []


def test_a_document_is_held_out_wherever_it_stands(tmp_path):
    "In another file, in another order, and twice."
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    one = write(tmp_path / "one.txt", TEXTS)
    two = write(tmp_path / "two.jsonl", shuffled + shuffled[:99])
    assert not set(texts(one, held_out=False)) & set(texts(two, held_out=True))


def alike(count: int, side: bool) -> list[str]:
    "Documents that are all on one side."
    every = (f"Anna met {i} bakers." for i in range(100_000))
    chosen = (text for text in every if is_held_out(text) == side)
    return [next(chosen) for _ in range(count)]


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_held_out_of_a_small_source(tmp_path, side, count):
    "Neither training nor evaluation is left without text, and evaluation warns."
    docs = alike(count, side)
    path = write(tmp_path / "a.txt", docs)
    assert texts(path, held_out=False) == docs
    with pytest.warns(UserWarning, match="a.txt: no document is held out"):
        assert texts(path, held_out=True) == docs


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_stopped_pass_remembers_both_sides(tmp_path, held_out, first):
    "What comes after the stop is all on one side, but the pass was not."
    docs = alike(3, first) + alike(3, not first)
    path = write(tmp_path / "a.txt", docs)
    expected = [doc for doc in docs if is_held_out(doc) == held_out]
    for cut in range(1, 4):
        stream, again = documents(path, held_out=held_out), documents(path, held_out=held_out)
        rows = iter(stream)
        for _ in range(cut): next(rows)
        again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [doc["text"] for doc in again] == expected[cut:]
            assert [doc["text"] for doc in again] == expected


# Fingerprints

def test_fingerprint_of_files(tmp_path):
    "S3: it knows content and order; where a folder lies and when it was written do not matter."
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for i in range(3): write(tmp_path / name / f"{i}.txt", TEXTS[i * 5:i * 5 + 5])
    os.utime(tmp_path / "two" / "0.txt", (0, 0))
    known = documents(tmp_path / "one").fingerprint()
    assert documents(tmp_path / "two").fingerprint() == known
    stream = documents(tmp_path / "one")
    next(iter(stream))
    assert stream.fingerprint() == known

    files = [tmp_path / "one" / f"{i}.txt" for i in range(3)]
    found = {known, documents(files[::-1]).fingerprint(), documents(files[:2]).fingerprint(),
             documents(files, sample_by="document").fingerprint(),
             documents(files, held_out=True).fingerprint()}
    write(files[1], ["new at the top", *TEXTS[5:10]])
    found.add(documents(files).fingerprint())
    assert len(found) == 6


def test_content_hash_reads_ends_and_middle(tmp_path):
    "Of a large file only pieces are read, but first, last and size always count."
    path = tmp_path / "a.bin"
    data = bytearray(random.Random(0).randbytes(10_000))
    path.write_bytes(data)
    known = content_hash(path, most=640)
    for changed in (data[:-1], data + b"x", b"x" + data[1:], data[:-1] + b"\1"):
        path.write_bytes(changed)
        assert content_hash(path, most=640) != known
    # where all pieces are the same, the size is left
    hashes = set()
    for size in (10_000, 10_001):
        path.write_bytes(bytes(size))
        hashes.add(content_hash(path, most=640))
    assert len(hashes) == 2


def test_fingerprint_of_hub_and_stories(hub):
    prints = [documents("owner/name", subset=subset, split=split).fingerprint()
              for subset, split in (("en", "train"), ("de", "train"), ("en", "test"))]
    prints += [documents(seed=seed).fingerprint() for seed in (0, 1)]
    assert len(set(prints)) == 5


def test_settings_are_plain_values(tmp_path):
    "So that a recipe can be written: paths are strings, lists are tuples."
    assert SourceConfig(source=[tmp_path, "b.txt"]).source == (str(tmp_path), "b.txt")
