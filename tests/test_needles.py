"RULER's tasks: right prompts for any tokenizer and length, and scores that a perfect reader gets."
import json
import os
import random
import re
import time
from itertools import islice

import pytest
import torch
from oracle import solve
from small import other_tokenizer, save_teacher
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import flashmorph as fm
from flashmorph.data.batches import stack
from flashmorph.data.needles import Needles, NeedlesConfig, needles
from flashmorph.data.text import encode
from flashmorph.longtasks import NEEDLE_TASKS, NIAH, WORDING, TooShort, score
from flashmorph.measure.evaluate import evaluate_recall
from flashmorph.measure.ruler import generated, read_ruler, ruler
from flashmorph.train.distill import NextTokenObjective

every_task = pytest.mark.parametrize("task", NEEDLE_TASKS)


class Bytes:
    "One token per byte, with an end-of-text token and no beginning-of-text token."
    eos_token_id, bos_token_id = 0, None
    def __call__(self, text, **_): return {"input_ids": list(text.encode())}
    def decode(self, ids, **_): return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def tokenizers():
    "By name: the bundled teacher's, a byte-level BPE one with few merges, and one token a byte."
    return {"bundled": fm.load_teacher()[1], "bpe": other_tokenizer(), "bytes": Bytes()}


@pytest.fixture(scope="module", params=["bundled", "bpe", "bytes"])
def tokenizer(request, tokenizers): return tokenizers[request.param]


def first(tokenizer, task, length, **settings):
    return next(needles(tokenizer, task=task, length=length, **settings).samples())


# Prompts

@every_task
def test_a_perfect_reader_scores_100_and_a_random_one_0(tokenizer, task):
    rng = random.Random(task)
    for length in (1500, 5000):
        for sample in islice(needles(tokenizer, task=task, length=length).samples(), 3):
            answer = solve(tokenizer.decode(sample.prompt))
            assert score(task, answer, sample.references) == 1, (answer, sample.references)
            guess = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789 -", k=200))
            assert score(task, guess, sample.references) == 0


@every_task
def test_lengths_are_within_one_percent_and_never_above(tokenizer, task):
    for length in (512, 4096, 32768):
        try: sample = first(tokenizer, task, length, generate=0)
        except TooShort as error:
            # the length that the error names does work
            assert length == 512 < error.shortest
            sample = first(tokenizer, task, error.shortest, generate=0)
            assert len(sample.prompt) + len(sample.answer) <= error.shortest
            continue
        used = len(sample.prompt) + len(sample.answer)
        assert 0.99 * length <= used <= length
        assert sample.room == length - len(sample.prompt)


@every_task
def test_rulers_room_is_kept_free(tokenizers, task):
    room = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}.get(task, 128)
    sample = first(tokenizers["bpe"], task, 4096)
    least = max(room, len(sample.answer))
    assert least <= sample.room <= least + 41


@pytest.mark.parametrize("name", ["bundled", "bpe"])
@every_task
def test_pieces_are_the_tokens_of_the_whole_text(tokenizers, name, task):
    """The first line is cut anywhere, and a cut document ends anywhere: around these places alone
    may a tokenizer merge otherwise."""
    tokenizer = tokenizers[name]
    sample = first(tokenizer, task, 3000)
    ids = sample.prompt + sample.answer
    again = encode(tokenizer, tokenizer.decode(ids))
    assert abs(len(again) - len(ids)) <= 4
    assert again[-200:] == ids[-200:]
    assert again[:20] == ids[:20]


@every_task
def test_depths_are_where_the_needles_begin(tokenizers, task):
    tokenizer = tokenizers["bpe"]
    for sample in islice(needles(tokenizer, task=task, length=3000).samples(), 4):
        starts = [round(depth * len(sample.prompt)) for depth in sample.depths]
        told = [tokenizer.decode(sample.prompt[start:start + 150]).strip() for start in starts]
        if task in NIAH:
            assert len(told) == len(sample.references)
            for text, value in zip(told, sample.references):
                assert text.startswith("One of the special magic ")
                assert f" is: {value}." in text
        elif task == "vt":
            names = [text.split()[1] for text in told]
            assert names == list(sample.references) and starts == sorted(starts)
        elif task.startswith("qa"):
            assert all(text.startswith("Document ") for text in told)
        else: assert not told


def test_needles_spread_over_the_whole_text(tokenizers):
    samples = islice(needles(tokenizers["bytes"], task="niah_single_2", length=2000).samples(), 40)
    depths = [depth for sample in samples for depth in sample.depths]
    assert min(depths) < 0.2 and max(depths) > 0.75
    assert 0.35 < sum(depths) / len(depths) < 0.65


def test_haystacks_of_text_hold_the_documents_of_the_source(tokenizers, tmp_path):
    file = tmp_path / "docs.txt"
    file.write_text("\n".join(f"Sentence {n} is here. It is  short." for n in range(40)))
    stream = needles(tokenizers["bytes"], file, task="niah_single_2", length=900, held_out=None)
    one, two = (Bytes().decode(sample.prompt) for sample in islice(stream.samples(), 2))
    assert "is here. It is short. Sentence" in one.replace("\n", " ")
    assert one != two
    # three times as long as the source: its documents come again
    long = needles(tokenizers["bytes"], file, task="niah_single_2", length=5000, held_out=None)
    text = Bytes().decode(next(long.samples()).prompt)
    assert text.count("Sentence 7 is here.") in (2, 3, 4)


@pytest.mark.parametrize("task, opening, word", [
    ("vt", "Memorize and track", "[A-Z]{3}"), ("cwe", "Below is a numbered", "[a-z][a-z-]+")])
def test_a_right_example_stands_before_long_prompts(tokenizers, task, opening, word):
    tokenizer = tokenizers["bpe"]
    lengths = (600 if task == "vt" else 1300, 8000)
    short, long = (tokenizer.decode(first(tokenizer, task, n).prompt) for n in lengths)
    assert short.count(opening) == 1 and long.count(opening) == 2
    example = opening + long.split(opening)[1]
    prompt, _, answer = example.rpartition(":")
    words = re.findall(word, answer)
    assert len(words) == (5 if task == "vt" else 10)
    assert score(task, solve(prompt), words) == 1


# Streams

def test_rows_mark_the_references(tokenizer):
    for task in ("niah_multivalue", "vt", "qa_1"):
        stream = needles(tokenizer, task=task, length=1200)
        sample = next(stream.samples())
        row = sample.row(0)
        assert {len(value) for value in row.values()} == {1200}
        for n in range(1, int(row["answers"].max()) + 1):
            marked = row["input_ids"][row["answers"] == n].tolist()
            assert tokenizer.decode(marked).strip() == sample.references[n - 1]
        assert row["attention_mask"].sum() == len(sample.prompt) + len(sample.answer)


def test_a_stream_resumes_exactly_in_the_middle_of_a_source(tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"Sentence {n}. " * 9}) for n in range(30)))

    def stream():
        return needles(Bytes(), file, task="niah_multikey_1", length=1500, held_out=None)
    one = stream()
    rows = stack(islice(one, 7))["input_ids"]
    two = stream()
    next(iter(two))
    state = json.loads(json.dumps(two.state_dict()))
    three = stream()
    three.load_state_dict(state)
    assert torch.equal(stack(islice(three, 6))["input_ids"], rows[1:])


def test_seeds_and_held_out_text_differ(tokenizers):
    def ids(**settings):
        return first(tokenizers["bytes"], "niah_single_2", 900, **settings).prompt
    assert ids() == ids() and ids() != ids(seed=1)


def test_files_of_questions(tokenizers, tmp_path):
    rows = [{"question": f"What is {n}?", "answers": [f"the {n}", f"<{n}>"],
             "documents": [f"They say that <{n}> is number {n}. " + "Nothing else. " * n]}
            for n in range(9)]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    stream = needles(Bytes(), task="qa_1", length=1500, questions=str(file))
    for sample in islice(stream.samples(), 5):
        text = Bytes().decode(sample.prompt)
        n = int(text.rpartition("What is ")[2].partition("?")[0])
        assert rows[n]["documents"][0] in text
        assert sample.references == (f"the {n}", f"<{n}>")
        assert score("qa_1", f"It is <{n}>.", sample.references) == 1


# Size and time

LONG = int(os.environ.get("FLASHMORPH_LONG_PROMPTS", 100_000))


@every_task
def test_long_prompts_take_linear_time(tokenizers, task):
    "A million tokens in a minute. The time of this process counts, on one thread."
    tokenizer = tokenizers["bpe"]
    tokenizer._tokenizer.encode("x")
    stream = needles(tokenizer, task=task, length=LONG)
    began = time.process_time()
    sample = next(stream.samples())
    seconds = time.process_time() - began
    assert sample.length - sample.room >= 0.99 * (LONG - 400)
    assert seconds <= 60 * LONG / 1_000_000, seconds
    print(f"{task}: {LONG:,} tokens in {seconds:.1f} s")


# Errors

@pytest.mark.parametrize("settings, said", [
    ({"task": "niah_singel_1"}, "did you mean 'niah_single_1'"),
    ({"task": "cwe", "length": 300}, "the shortest possible length is"),
    ({"task": "niah_single_2", "source": "missing.txt"}, "missing.txt: no such file"),
    ({"task": "qa_2", "questions": "missing.jsonl"}, "missing.jsonl cannot be read: No such file"),
    ({"length": 1}, "needles.length"),
    ({"generate": -1}, "needles.generate"),
    ({"depth": 3}, "unknown setting needles.depth"),
])
def test_errors_say_what_to_do(settings, said):
    with pytest.raises(ValueError) as error: needles(Bytes(), **settings)
    assert said in str(error.value)


def test_a_hub_dataset_that_is_out_of_reach_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    said = "owner/essays.*A local file or folder needs none"
    with pytest.raises((ValueError, OSError), match=said):
        needles(Bytes(), "owner/essays", task="niah_single_2")


# A model on the tasks

class Reader(PreTrainedModel):
    "Answers prompts with a function of their text; has a table of tokens, as models have."
    def __init__(self, tokenizer, answer, vocabulary):
        super().__init__(PreTrainedConfig())
        self.embedding = nn.Embedding(vocabulary, 1)
        self.tokenizer = tokenizer
        self.answer = answer
        self.batches = []

    def get_input_embeddings(self): return self.embedding

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        self.batches.append(len(input_ids))
        if len(input_ids) > 3: raise torch.OutOfMemoryError("CUDA out of memory")
        rows = []
        for ids, mask in zip(input_ids, attention_mask.bool()):
            text = self.tokenizer.decode(ids[mask].tolist())
            made = encode(self.tokenizer, " " + self.answer(text))[:max_new_tokens]
            rows.append(made + [self.tokenizer.eos_token_id] * (max_new_tokens - len(made)))
        return torch.cat([input_ids, torch.tensor(rows)], 1)


def test_ruler_gives_a_perfect_reader_100_and_a_random_one_0(tokenizers):
    tokenizer = tokenizers["bundled"]
    settings = {"lengths": [2048], "samples": 4, "force": False}
    reader = Reader(tokenizer, solve, len(tokenizer))
    scores = ruler(reader, tokenizer, **settings)
    assert [cell.score.value for cell in scores.cells] == [1.0] * 13
    # batches of 4 did not fit into memory, batches of 2 did
    assert reader.batches[:3] == [4, 2, 2]
    rng = random.Random(0)
    guesser = Reader(tokenizer, lambda _: "".join(rng.choices("abcdefgh0123456789 ", k=80)), 511)
    wrong = ruler(guesser, tokenizer, **settings)
    assert [cell.score.value for cell in wrong.cells] == [0.0] * 13
    assert wrong.cells[0].score.low == 0 < wrong.cells[0].score.high
    assert "average" in str(scores) and read_ruler(scores.record()) == scores


def test_half_of_the_references_score_half(tokenizers):
    tokenizer = tokenizers["bundled"]
    reader = Reader(tokenizer, lambda text: " ".join(solve(text).split()[:2]), 511)
    scores = ruler(reader, tokenizer, tasks=["niah_multivalue"], lengths=[2048], samples=2,
                   force=False)
    assert scores.average(2048) == 0.5


@pytest.fixture(scope="module")
def hybrid():
    teacher, tokenizer = fm.load_teacher()
    return fm.morph(teacher, mixer="lightning").commit([1, 5]).eval(), tokenizer


def test_answers_do_not_depend_on_the_batch(hybrid):
    model, tokenizer = hybrid
    samples = [first(tokenizer, task, n) for task, n in (("vt", 700), ("qa_1", 600), ("vt", 500))]
    alone = [generated(model, tokenizer, [sample])[0] for sample in samples]
    assert generated(model, tokenizer, samples) == alone


def test_forced_recall_is_that_of_evaluate(hybrid):
    model, tokenizer = hybrid
    scores = ruler(model, tokenizer, tasks=["niah_single_1"], lengths=[600], samples=6,
                   batch_size=4, generate=False, seed=5)
    rows = needles(tokenizer, task="niah_single_1", length=600, seed=5, held_out=True)
    # every number is of seven tokens, so that means over prompts and over tokens are the same
    expected = evaluate_recall(model, rows, count=6)["recall"]
    assert scores.cells[0].recall.value == pytest.approx(expected, abs=1e-6)
    assert scores.cells[0].score is None


def test_ruler_reports_progress_and_leaves_the_model_as_it_was(hybrid):
    model, tokenizer = hybrid
    model.train()
    seen = []
    ruler(model, tokenizer, tasks=["vt", "cwe"], lengths=[600], samples=3, batch_size=2,
          generate=False, progress=lambda *news: seen.append(news))
    assert model.training
    model.eval()
    assert [news[:2] for news in seen] == [(0, 3), (2, 3), (3, 3)]


def test_a_task_that_does_not_fit_has_a_note(hybrid):
    model, tokenizer = hybrid
    scores = ruler(model, tokenizer, tasks=["vt", "cwe"], lengths=[600], samples=1, generate=False)
    assert scores.cell("cwe", 600).score is None
    assert "too short for cwe" in scores.cell("cwe", 600).note
    with pytest.raises(TooShort, match="shortest possible length"):
        ruler(model, tokenizer, tasks=["cwe"], lengths=[600])


def test_lengths_beyond_the_positions_are_refused_unless_asked_for(tmp_path):
    model, tokenizer = fm.load_model(save_teacher(tmp_path, max_position_embeddings=512))
    short = {"tasks": ["vt"], "samples": 1, "generate": False}
    with pytest.raises(ValueError, match="at most 512 tokens.*got 600"):
        ruler(model, tokenizer, lengths=[600], **short)
    assert ruler(model, tokenizer, lengths=[600], beyond=True, **short).cells[0].recall is not None


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model, _ = fm.load_model(save_teacher(tmp_path, vocab_size=511))
    with pytest.raises(ValueError, match="use the tokenizer that belongs to the model"):
        ruler(model, BigIds(), tasks=["vt"], lengths=[500], samples=1, force=False)


class BigIds(Bytes):
    def __call__(self, text, **_): return {"input_ids": [1000 + i for i in text.encode()]}
    def decode(self, ids, **_): return bytes(i - 1000 for i in ids).decode(errors="replace")


def test_the_stream_is_what_the_public_name_makes():
    assert isinstance(fm.needles(Bytes(), task="vt", length=900), Needles)
    assert NeedlesConfig(task="vt").length == 4096
    assert callable(fm.ruler)


def test_needles_beside_passkeys():
    """Rows with and without padding share a batch, in training and in evaluation.

    The loss of a mixed batch is the mean of its tokens, each row read alone without padding."""
    teacher, tokenizer = fm.load_teacher()
    prompts = needles(tokenizer, task="niah_single_1", length=450)
    books = fm.passkeys(tokenizer, length=450, keys=2, words_per_key=3)
    rows = list(islice(fm.Mixture([prompts, books], [0.5, 0.5]), 8))
    batch = stack(rows)
    assert {"attention_mask" in row for row in rows} == {True, False}
    assert not batch["attention_mask"].all()
    losses = []
    for row, mask in zip(rows, batch["attention_mask"]):
        real = row["input_ids"][mask.bool()][None]
        with torch.no_grad(): logits = teacher(real).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(logits, real[0, 1:], reduction="none"))
    objective = NextTokenObjective(teacher)
    torch.testing.assert_close(objective(batch)[0].detach(), torch.cat(losses).mean())
    fm.finetune(teacher, rows, steps=1, batch_size=8, progress=False)


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multiquery", "vt", "cwe", "fwe", "qa_1"])
def test_prompts_in_a_chat_template(task):
    """The message is the plain prompt, without its prefix; the prefix begins the answer.

    transformers renders the template; length, mask and the right answer stay what they were."""
    tokenizer = other_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}[model]{% endif %}")
    sample = first(tokenizer, task, 4096, chat=True, source="stories")
    text = tokenizer.decode(sample.prompt)
    message = text.removeprefix("[user] ").partition("\n[model]")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": message[0]}], tokenize=False, add_generation_prompt=True)
    kind = "niah_one" if task == "niah_single_2" else task.partition("_")[0]
    assert text == rendered + message[2] and message[0][-40:] not in message[2]
    opening = re.split(r"[{]", WORDING[kind].opening)[0]
    assert message[0].startswith(opening[:30])
    assert message[2].startswith(WORDING[kind].prefix[:12])
    assert len(sample.prompt) + sample.room <= 4096
    assert score(task, solve(text), sample.references) == 1.0
    streams = [needles(tokenizer, task=task, length=4096, chat=chat) for chat in (False, True)]
    assert len({stream.fingerprint() for stream in streams}) == 2
