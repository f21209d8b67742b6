"Text sources and passkey books with real tokenizers and real files."
import itertools
import json
import random

import pytest
import torch
from small import other_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flashmorph.data.passkeys import Passkeys, encode_piece, ordinal, passkeys
from flashmorph.data.sources import documents
from flashmorph.data.stories import Stories
from flashmorph.data.text import text
from flashmorph.run.pretrain import build_tokenizer


def sentencepiece_like() -> PreTrainedTokenizerFast:
    "Puts a space in front of whatever it is given, as Llama-2's does."
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace(prepend_scheme="always")
    letters = [chr(i) for i in range(32, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters)
    tok.train_from_iterator((Stories(3)[i] for i in range(50)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bundled": build_tokenizer, "byte-level": other_tokenizer, "space-in-front": sentencepiece_like}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_books_of_any_tokenizer(name):
    "Exact length; answers marked exactly; each marked answer stands in the book as one run, and once more in its needle."
    tokenizer, rng = TOKENIZERS[name](), random.Random()
    for _ in range(30):
        keys, words = rng.randint(1, 11), rng.randint(1, 6)
        shortest = Passkeys(tokenizer, documents("stories"), 10**6, keys=keys, words_per_key=words).shortest
        length = shortest + rng.choice([0, 1, rng.randint(2, 300)])
        book = next(iter(passkeys(tokenizer, length=length, keys=keys, words_per_key=words, shuffle=rng.random() < .5, seed=rng.randrange(10**6))))
        ids, answers = book["input_ids"], book["answers"]
        assert ids.shape == answers.shape == (length,)
        if tokenizer.bos_token_id is not None: assert ids[0] == tokenizer.bos_token_id and (ids[1:] != ids[0]).all()
        for n in range(1, keys + 1):
            at = (answers == n).nonzero()[:, 0]
            assert len(at) == at[-1] - at[0] + 1
            answer = ids[at].tolist()
            said = tokenizer.decode(answer).split()
            assert len(said) == words and answer == encode_piece(tokenizer, " " + " ".join(said))
            before = encode_piece(tokenizer, f" Remember, the {ordinal(n)} passkey to the vault is: {' '.join(said)}.")
            starts = [i for i in range(length) if ids[i:i + len(before)].tolist() == before]
            assert len(starts) == 1


def test_needles_reach_every_depth():
    "Depths are spread over the whole book."
    tokenizer = build_tokenizer()
    needle = encode_piece(tokenizer, " Remember,")[0]
    books = itertools.islice(passkeys(tokenizer, length=400, keys=1, words_per_key=2), 300)
    depth = [(book["input_ids"] == needle).nonzero()[0, 0].item() / 400 for book in books]
    counts = torch.histc(torch.tensor(depth), 4, 0, 1)
    assert (counts > 30).all(), counts


def write(path, docs):
    if path.suffix == ".txt": path.write_text("\n".join(docs))
    elif path.suffix == ".jsonl": path.write_text("\n".join(json.dumps({"text": d, "other": 1}) for d in docs))
    else:
        import datasets
        datasets.Dataset.from_dict({"text": docs}).to_parquet(str(path))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_files_stream_and_resume(tmp_path, suffix):
    tokenizer, docs = build_tokenizer(), [Stories(1)[i] for i in range(7)]
    write(tmp_path / f"a{suffix}", docs)
    expected = list(itertools.chain.from_iterable(tokenizer(d)["input_ids"] + [tokenizer.eos_token_id] for d in docs))
    stream = text(tokenizer, tmp_path / f"a{suffix}", length=50)
    rows = [r["input_ids"] for r in itertools.islice(stream, 3 * len(expected) // 50)]                        # three passes
    assert torch.cat(rows).tolist() == (expected * 3)[:50 * len(rows)]
    for cut in (1, 13, len(rows) - 2):
        one, two = (text(tokenizer, tmp_path / f"a{suffix}", length=50) for _ in range(2))
        list(itertools.islice(one, cut))
        two.load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert torch.equal(torch.stack([r["input_ids"] for r in itertools.islice(two, len(rows) - cut)]), torch.stack(rows[cut:]))


def test_folder_and_list_of_files(tmp_path):
    tokenizer = build_tokenizer()
    for i in range(2): write(tmp_path / f"{i}.jsonl", [Stories(i)[0]])
    files = [str(tmp_path / f"{i}.jsonl") for i in range(2)]
    one, two = ([r["input_ids"] for r in itertools.islice(text(tokenizer, source, length=40), 9)] for source in (tmp_path, files))
    assert torch.equal(torch.stack(one), torch.stack(two))
    write(tmp_path / "c.txt", ["hello"])
    with pytest.raises(ValueError, match="of one kind"): documents(tmp_path)
    (tmp_path / "d.csv").write_text("x")
    with pytest.raises(ValueError, match="expected one of"): documents(tmp_path / "d.csv")
