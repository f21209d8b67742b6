"Rows from workers and shards: the same for any number of processes, resumed exactly, never shared."
import itertools
import json
import multiprocessing
import socket
import tomllib
import warnings

import pytest
import torch
import zstandard

from flashmorph import load_teacher, morph, passkeys, text, train_gates
from flashmorph.data import sources
from flashmorph.data.ahead import Ahead, useful_workers
from flashmorph.data.batches import Batches
from flashmorph.data.mixture import Mixture
from flashmorph.data.sources import documents, is_held_out
from flashmorph.data.stories import Stories
from flashmorph.run.paths import with_absolute_paths
from flashmorph.run.recipe import Recipe, load_recipe, recipe_from_dict, recipe_toml

COUNT = 60


@pytest.fixture(scope="module")
def tokenizer(): return load_teacher()[1]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "Numbered stories in a compressed file, two rows without text between."
    path = tmp_path_factory.mktemp("data") / "a.jsonl.zst"
    rows = [{"text": f"{n}. {Stories(2)[n][:60 + 7 * n % 90]}"} for n in range(COUNT)]
    rows[20:20] = [{"text": None}, {"text": ""}]
    path.write_bytes(zstandard.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


def quiet(stream):
    "Rows of a stream, without the warning of rows without text."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from stream


def taken(stream, count):
    return [row["input_ids"] for row in itertools.islice(quiet(stream), count)]


def make(kind, tokenizer, file, **settings):
    books = {"length": 220, "min_length": 180, "keys": 2, "words_per_key": 2, "group": 3}
    if kind == "books": return passkeys(tokenizer, file, **books, **settings)
    if kind == "mix":
        mix = [{"source": file, "weight": 0.5}, {"source": "stories"}]
        return text(tokenizer, mix=mix, length=64, **settings)
    return text(tokenizer, file, length=64, packed=kind == "packed", **settings)


@pytest.mark.parametrize("kind", ["text", "packed", "books", "mix"])
def test_resumed_three_times_over_epochs(kind, tokenizer, file):
    "Bit-equal, with any number of workers at any time: as one undisturbed stream without workers."
    count = {"books": 30, "mix": 330}.get(kind, 75)
    straight = list(itertools.islice(quiet(make(kind, tokenizer, file, shards=4)), count))
    state, found = None, []
    for workers, rows in ((2, 7), (0, 9), (2, 8), (1, count - 24)):
        stream = make(kind, tokenizer, file, shards=4, workers=workers)
        if state: stream.load_state_dict(json.loads(json.dumps(state)))
        found += itertools.islice(quiet(stream), rows)
        state = stream.state_dict()
    assert len(found) == len(straight) == count
    for one, other in zip(found, straight):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    # more than two passes, and the rows without text counted in each
    streams = [one["streams"][0] if kind == "mix" else one for one in state["shards"]]
    docs = [one.get("blocks", one) for one in streams]
    assert min(one["epoch"] for one in docs) >= 2
    assert sum(one["docs"].get("skipped", 0) for one in docs) >= 4


def test_one_shard_has_the_position_of_its_stream(tokenizer, file):
    "A training that began without workers goes on with them, and the other way round."
    plain, ahead = (make("text", tokenizer, file, workers=n) for n in (0, 1))
    rows = taken(make("text", tokenizer, file), 30)
    taken(plain, 13)
    ahead.load_state_dict(plain.state_dict())
    assert torch.equal(torch.stack(taken(ahead, 8)), torch.stack(rows[13:21]))
    plain.load_state_dict(json.loads(json.dumps(ahead.state_dict())))
    assert torch.equal(torch.stack(taken(plain, 9)), torch.stack(rows[21:]))


@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_reads_another_s_rows(world, tokenizer, file, monkeypatch):
    "Counted where rows of the file become documents, over two passes; together they are all."
    read = []
    genuine = sources.read_document

    def counting(row, column, name):
        read.append(row["text"])
        return genuine(row, column, name)

    monkeypatch.setattr(sources, "read_document", counting)
    found = []
    for rank in range(world):
        batches = Batches(make("text", tokenizer, file, shards=4), 3, rank, world)
        read.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append([batches.next()["input_ids"] for _ in range(60 // world)])
        texts = [one for one in read if one]
        known = set(texts)
        assert max(map(texts.count, known)) >= 2
        found[-1] = found[-1], known
    numbers = [known for _, known in found]
    assert sum(map(len, numbers)) == len(set().union(*numbers)) == COUNT

    # row by row, the ranks' batches are those of one process
    one = Batches(make("text", tokenizer, file, shards=4), 3 * world)
    for step in range(60 // world):
        ranks = torch.stack([rows[step] for rows, _ in found], 1).flatten(0, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(one.next()["input_ids"], ranks)


def test_shards_have_to_fit_the_processes(tokenizer, file):
    with pytest.raises(ValueError, match="a multiple of the 3 processes, got 4"):
        Batches(make("text", tokenizer, file, shards=4), 1, 0, 3)
    with pytest.raises(ValueError, match="of 4 shards, not of 2"):
        state = make("text", tokenizer, file, shards=4).state_dict()
        make("text", tokenizer, file, shards=2).load_state_dict(state)
    assert [useful_workers(n, 6) for n in (1, 4, 5, 9)] == [1, 3, 3, 6]


def run_rank(rank, world, port, file, out):
    "Rows of one of several processes, and the position that they write together."
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, world_size=world, rank=rank)
    warnings.simplefilter("ignore")
    stream = make("text", load_teacher()[1], file, shards=4, workers=1)
    batches = Batches(stream, 2, rank, world)
    rows = [batches.next()["input_ids"].tolist() for _ in range(5)]
    out.put((rank, rows, batches.state_dict()))
    torch.distributed.destroy_process_group()


def test_two_processes_go_on_as_one(tokenizer, file):
    "gloo: both write the same position, and one process takes the rows that follow."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    ranks = [context.Process(target=run_rank, args=(n, 2, port, file, out)) for n in range(2)]
    for process in ranks: process.start()
    found = sorted(out.get(timeout=120) for _ in ranks)
    for process in ranks: process.join()
    assert found[0][2] == found[1][2]
    straight = taken(make("text", tokenizer, file, shards=4), 32)
    rows = [row for step in zip(found[0][1], found[1][1]) for pair in zip(*step) for row in pair]
    assert rows == [row.tolist() for row in straight[:20]]
    alone = Batches(make("text", tokenizer, file, shards=4), 4)
    alone.load_state_dict(found[0][2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        then = torch.cat([alone.next()["input_ids"] for _ in range(3)])
    assert torch.equal(then, torch.stack(straight[20:]))


def test_held_out_rows_stay_held_out_of_every_shard(tokenizer, file):
    "Also where a shard has documents of one side only: it must not fall back on the other."
    held = {doc["text"] for doc in quiet(documents(file, held_out=True))}
    assert 0 < len(held) < 10
    for shards in (3, 20):
        parts = [sources.open_source(sources.SourceConfig(source=file), part=(n, shards),
                                     held_out=False) for n in range(shards)]
        read = [doc["text"] for part in parts for doc in quiet(part)]
        assert len(read) == COUNT - len(held) and not held & set(read)
    assert all(map(is_held_out, held))


def test_mixtures_in_shards_draw_as_one(tokenizer, file):
    "Row `i` comes from the same stream, whatever the number of shards."
    def mixed(part):
        streams = [make("text", tokenizer, file, part=part, seed=1),
                   text(tokenizer, length=64, part=part)]
        return Mixture(streams, [0.3, 0.7], 5, part)

    def kinds(rows):
        found = [tokenizer.decode(row) for row in rows]
        return [any(c.isdigit() for c in one) for one in found]

    one, four = taken(Ahead(mixed), 24), taken(Ahead(mixed, 4, 2), 24)
    assert kinds(one) == kinds(four)
    assert 3 <= sum(kinds(one)) <= 14


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_are_one_sentence(workers, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"story": "Anna went home."}))
    with pytest.raises(ValueError, match="expected a column 'text'") as caught:
        next(iter(text(tokenizer, path, workers=workers)))
    assert "\n" not in str(caught.value)


def test_books_of_random_lengths_fill_batches(tokenizer):
    "A batch that divides the group has no padding; another has masks that leave padding out."
    sizes = {"length": 400, "min_length": 120, "keys": 2, "words_per_key": 2, "group": 4}
    whole = Batches(passkeys(tokenizer, **sizes), 4)
    found = [whole.next() for _ in range(12)]
    lengths = [batch["input_ids"].shape[1] for batch in found]
    assert len(set(lengths)) > 8 and 120 <= min(lengths) and max(lengths) <= 400
    assert all("attention_mask" not in batch for batch in found)

    books = list(itertools.islice(passkeys(tokenizer, **sizes), 48))
    odd = Batches(passkeys(tokenizer, **sizes), 3)
    for first in range(0, 48, 3):
        batch = odd.next()
        for row, book in zip(range(3), books[first:first + 3]):
            size = len(book["input_ids"])
            assert torch.equal(batch["input_ids"][row, :size], book["input_ids"])
            assert torch.equal(batch["answers"][row, :size], book["answers"])
            assert not batch["answers"][row, size:].any()
            if "attention_mask" in batch: assert batch["attention_mask"][row].sum() == size


def test_gates_train_on_random_lengths(tokenizer):
    "A padded batch counts as its books do: the loss of the first step is that of unpadded books."
    sizes = {"length": 200, "min_length": 120, "keys": 2, "words_per_key": 2, "group": 1}
    losses = []
    for batch_size, accumulate in ((3, 1), (1, 3)):
        model = morph(load_teacher()[0])
        result = train_gates(model, passkeys(tokenizer, **sizes), steps=2, align="raw",
                             batch_size=batch_size, accumulate=accumulate, progress=False)
        losses.append(result.losses[1])
    assert losses[0] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)      # float32 rounding


def test_a_document_is_held_out_of_every_source(tokenizer, tmp_path):
    "The same documents in two sources: neither training nor evaluation reads one of the other."
    held = [one for one in (Stories(7)[n] for n in range(400)) if is_held_out(one)]
    free = [one for one in (Stories(7)[n] for n in range(40)) if not is_held_out(one)]
    for name, docs in (("a", free + held[:4]), ("b", held[:2] + free[:3])):
        lines = "\n".join(json.dumps({"text": one}) for one in docs)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    mix = [{"source": tmp_path / "a.jsonl", "weight": 2}, {"source": tmp_path / "b.jsonl"}]
    start = {one: tokenizer(one)["input_ids"][:24] for one in (*held[:4], *free)}
    for side, others in ((False, held[:4]), (True, free)):
        rows = taken(text(tokenizer, mix=mix, length=64, held_out=side), 150)
        read = torch.cat(rows).tolist()
        windows = {tuple(read[i:i + 24]) for i in range(len(read))}
        assert not any(tuple(start[one]) in windows for one in others)
        assert any(tuple(start[one]) in windows for one in (held[:4] if side else free))
    # a source with nothing on the side that is asked for is refused in a sentence
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": held[0]}))
    with pytest.raises(ValueError, match="the text source is empty"):
        taken(text(tokenizer, mix=mix, length=64), 150)


def test_a_recipe_mixes_sources(tmp_path, monkeypatch):
    "Written and read back, its paths made absolute; books lie in the source of most weight."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    mix = [{"source": "stories", "weight": 0.3}, {"source": "a.jsonl", "weight": 0.7}]
    recipe = Recipe(text={"mix": mix})
    assert recipe_from_dict(tomllib.loads(recipe_toml(recipe))) == recipe
    assert recipe.passkeys.source == recipe.evaluate.source == "a.jsonl"
    assert with_absolute_paths(recipe).text.mix[1].source == str(tmp_path / "a.jsonl")
    changes = ["text.mix=[{source = 'a.jsonl', weight = 2}]", "passkeys.source=stories"]
    changed = load_recipe("demo-cheap", changes)
    assert changed.text.main.source == "a.jsonl" and changed.passkeys.source == "stories"
    with pytest.raises(ValueError, match="text.mix.weight: expected a number > 0"):
        Recipe(text={"mix": [{"source": "stories", "weight": 0}]})
