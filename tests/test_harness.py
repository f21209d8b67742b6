"lm-evaluation-harness on hybrids: numbers equal to loops over logits, and nothing done twice."
import json
import math
import re
import statistics
import subprocess
import sys

import datasets
import pytest
import torch
from small import other_tokenizer
from transformers import AutoModelForCausalLM

from flashmorph.measure import harness
from flashmorph.measure.harness import HarnessResult, lm_eval
from flashmorph.measure.tasks import HarnessConfig, load_tasks, task_manager
from flashmorph.model.morph import morph
from flashmorph.model.teacher import load_teacher

LINES = [
    ("Anna went home to the", ["river", "village by the river", "of"], 1),
    ("The baker gave Olga a", ["bread", "ran", "loaf of bread and a cup"], 0),
    ("Remember, the first", ["passkey", "the"], 0),
    ("Karin the smith lived near the", ["well", "garden", "to"], 1),
    ("What is the", ["first passkey to the vault?", "third", "house"], 0),
]


class Tasks:
    "A folder of tasks that the test writes."
    def __init__(self, folder): self.folder = folder

    def write(self, name, rows, **settings):
        data = self.folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        task = {"task": name, "test_split": "test", **source, **settings}
        (self.folder / f"{name}.yaml").write_text(json.dumps(task))

    def choices(self, name="choices", lines=LINES):
        rows = [{"text": text, "words": words, "right": right} for text, words, right in lines]
        metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
        self.write(name, rows, output_type="multiple_choice", doc_to_text="{{text}}",
                   doc_to_choice="words", doc_to_target="right", metric_list=metrics)

    def texts(self, texts):
        self.write("texts", [{"text": text} for text in texts], doc_to_text="",
                   output_type="loglikelihood_rolling", doc_to_target="{{text}}",
                   metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}])

    def answers(self, rows, name="answers"):
        self.write(name, rows, output_type="generate_until", doc_to_text="{{text}}",
                   doc_to_target="{{answer}}", metric_list=[{"metric": "exact_match"}],
                   generation_kwargs={"until": ["."], "max_gen_toks": 6})

    def run(self, *names, model, **settings):
        return lm_eval(*model, list(names), include=[self.folder], **settings)


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "tasks").mkdir()
    return Tasks(tmp_path / "tasks")


@pytest.fixture(scope="module")
def bundled(): return load_teacher()


@pytest.fixture(scope="module")
def hybrid(bundled):
    "The bundled teacher with linear attention in four layers."
    teacher, tokenizer = bundled
    return morph(teacher).commit([0, 1, 2, 4, 6, 8, 9, 11]), tokenizer


@pytest.fixture(params=["teacher", "hybrid"])
def model(request, bundled, hybrid): return {"teacher": bundled, "hybrid": hybrid}[request.param]


@torch.no_grad()
def loglikelihood(model, context, continuation):
    "The log probability of the tokens of a continuation, one row and one token at a time."
    network, tokenizer = model
    before = tokenizer(context)["input_ids"]
    ids = tokenizer(context + continuation)["input_ids"]
    logits = network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(len(before), len(ids)))


def best(numbers): return max(range(len(numbers)), key=numbers.__getitem__)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_multiple_choice(tasks, model, batch_size):
    tasks.choices()
    found = tasks.run("choices", model=model, batch_size=batch_size).scores
    hits = {"acc": [], "acc_norm": []}
    for text, words, right in LINES:
        scores = [loglikelihood(model, text, f" {word}") for word in words]
        by_length = [score / len(word) for score, word in zip(scores, words)]
        hits["acc"].append(best(scores) == right)
        hits["acc_norm"].append(best(by_length) == right)
    for metric, right in hits.items():
        score = found[f"choices {metric}"]
        assert score.value == statistics.fmean(right) and score.count == len(LINES)
        error = statistics.stdev(map(float, right)) / math.sqrt(len(right))
        if error:
            assert score.low == pytest.approx(max(0, score.value - 1.96 * error))
            assert score.how == "standard error"
        else: assert score.how == "exact bound"


def test_loglikelihoods_of_whole_texts(tasks, model):
    network, tokenizer = model
    texts = ["Anna went home to the river and met a baker.", "Olga had a red cup of bread. " * 9]
    tasks.texts(texts)
    found = tasks.run("texts", model=model).scores
    total = 0.0
    for text in texts:
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        ids = [first, *tokenizer(text)["input_ids"]]
        with torch.no_grad(): logits = network(torch.tensor([ids])).logits[0].double()
        total += sum(logits.log_softmax(-1)[i - 1, ids[i]].item() for i in range(1, len(ids)))
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    score = found["texts word_perplexity"]
    assert score.value == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert found["texts byte_perplexity"].value == pytest.approx(math.exp(-total / size), rel=1e-5)
    # the library has no standard error for these
    assert score.low < score.value < score.high and score.how.startswith("bootstrap")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generated_answers(tasks, model, batch_size):
    network, tokenizer = model
    answers = []
    for text, *_ in LINES:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        said = network.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1]:]
        answers.append(tokenizer.decode(said, skip_special_tokens=True).split(".")[0])
    rows = [{"text": text, "answer": answer}
            for (text, *_), answer in zip(LINES, [*answers[:3], "no", "no"])]
    tasks.answers(rows)
    score = tasks.run("answers", model=model, batch_size=batch_size).scores["answers exact_match"]
    assert score.value == 3 / 5


class Interrupted(BaseException): "As Ctrl-C, which no handler of errors takes."


def test_a_killed_evaluation_goes_on_with_the_next_task(tasks, hybrid, tmp_path, monkeypatch):
    for name in ("one", "two", "three"): tasks.choices(name)
    expected = tasks.run("one", "two", "three", model=hybrid)
    run, ran = harness.run_task, []

    def dies(lm, task, *args):
        if task.config.task == "two" and not ran.count("two"):
            ran.append("two")
            raise Interrupted
        ran.append(task.config.task)
        return run(lm, task, *args)
    monkeypatch.setattr(harness, "run_task", dies)
    ask = {"model": hybrid, "folder": tmp_path / "kept"}
    with pytest.raises(Interrupted): tasks.run("one", "two", "three", **ask)
    assert tasks.run("one", "two", "three", **ask).scores == expected.scores
    assert ran == ["one", "two", "two", "three"]
    assert tasks.run("three", **ask).scores.keys() == {"three acc", "three acc_norm"}
    assert len(ran) == 4


def test_answers_of_a_killed_task_are_kept(tasks, hybrid, tmp_path, monkeypatch):
    tasks.choices()
    ask = {"model": hybrid, "folder": tmp_path, "batch_size": 1}
    made = harness.model_class()
    call, calls = made._model_call, []

    def counted(self, rows, *args, **kwargs):
        calls.append(len(rows))
        if len(calls) == 9: raise Interrupted
        return call(self, rows, *args, **kwargs)
    monkeypatch.setattr(made, "_model_call", counted)
    with pytest.raises(Interrupted): tasks.run("choices", **ask)
    found = tasks.run("choices", **ask)
    monkeypatch.setattr(made, "_model_call", call)
    assert found.scores == tasks.run("choices", model=hybrid).scores
    # as many calls as without an interruption, and the one that died
    total = len(calls)
    calls.clear()
    monkeypatch.setattr(made, "_model_call", counted)
    calls += [0] * 9
    tasks.run("choices", model=hybrid, batch_size=1)
    assert total == len(calls) - 9 + 1


def test_what_is_kept_is_used_only_for_the_same(tasks, bundled, hybrid, tmp_path, monkeypatch):
    "Another model, changed documents, and other settings are computed."
    run, ran = harness.run_task, []
    monkeypatch.setattr(harness, "run_task", lambda *args: ran.append(1) or run(*args))

    def count(model, **settings):
        ran.clear()
        tasks.run("choices", model=model, folder=tmp_path / "kept", **settings)
        return len(ran)
    tasks.choices()
    assert [count(hybrid), count(hybrid), count(bundled)] == [1, 0, 1]
    assert [count(hybrid, limit=2), count(hybrid, limit=2), count(hybrid)] == [1, 0, 0]
    assert count(hybrid, batch_size=2) == 0
    tasks.choices(lines=LINES[::-1])
    assert [count(hybrid), count(hybrid)] == [1, 0]


def test_groups(tasks, hybrid):
    tasks.choices("a_one")
    tasks.choices("a_two", LINES[:2])
    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "pair", "task": ["a_one", "a_two"], "aggregate_metric_list": metrics}
    (tasks.folder / "pair.yaml").write_text(json.dumps(group))
    found = tasks.run("pair", model=hybrid).scores
    one, two, both = (found[f"{name} acc"] for name in ("a_one", "a_two", "pair"))
    assert both.value == pytest.approx((one.value * 5 + two.value * 2) / 7)
    assert both.count == 7 and both.low is not None


def test_batches_are_halved_when_memory_is_short(tasks, hybrid, monkeypatch):
    tasks.choices()
    expected = tasks.run("choices", model=hybrid, batch_size=1)
    made = harness.model_class()
    call, calls = made._model_call, []

    def small(self, rows, *args, **kwargs):
        calls.append(len(rows))
        if len(rows) > 2: raise RuntimeError("CUDA out of memory. Tried to allocate")
        return call(self, rows, *args, **kwargs)
    monkeypatch.setattr(made, "_model_call", small)
    assert tasks.run("choices", model=hybrid, batch_size=8).scores == expected.scores
    assert calls[:3] == [8, 4, 2] and max(calls[2:]) == 2


def test_longer_requests_than_positions(tasks, hybrid):
    tasks.choices()
    tasks.answers([{"text": "word " * 40, "answer": "x"}] * 2)
    for name, length in (("choices", 20), ("answers", 30)):
        with pytest.raises(ValueError, match=f"task '{name}'.*has {length} positions. Leave"):
            tasks.run(name, model=hybrid, max_length=length)
        cut = tasks.run(name, model=hybrid, max_length=length, truncate=True)
        assert isinstance(cut, HarnessResult)
    # a request of exactly as many tokens is none too many
    longest = max(len(hybrid[1](f"{text} {word}")["input_ids"])
                  for text, words, _ in LINES for word in words)
    assert tasks.run("choices", model=hybrid, max_length=longest - 1).scores
    with pytest.raises(ValueError, match="positions"):
        tasks.run("choices", model=hybrid, max_length=longest - 2)
    # an answer is never cut
    with pytest.raises(ValueError, match="positions"):
        tasks.run("choices", model=hybrid, max_length=4, truncate=True)


def test_documents_that_cannot_be_fetched(tasks, hybrid, monkeypatch):
    tasks.choices()

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="task 'choices' .* not here, and cannot be .*HF_HOME"):
        tasks.run("choices", model=hybrid)


def test_errors_say_what_to_do(tasks, bundled, hybrid, monkeypatch):
    tasks.choices()
    with pytest.raises(ValueError, match="task 'hellswag'.*did you mean 'hellaswag'") as caught:
        lm_eval(*hybrid, "hellswag")
    assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match="expected at least one name"): lm_eval(*hybrid, [])
    with pytest.raises(ValueError, match="include: expected a folder"):
        lm_eval(*hybrid, "choices", include=["/no/such"])
    with pytest.raises(TypeError, match="expected a transformers model"):
        tasks.run("choices", model=(None, hybrid[1]))
    # a tokenizer with more tokens than the model
    tokenizer = other_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(3000)])
    with pytest.raises(ValueError, match="lm_eval: the tokenizer has .* tokens, the model only"):
        tasks.run("choices", model=(bundled[0], tokenizer))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'flashmorph\[lm-eval\]'"):
        tasks.run("choices", model=hybrid)


def test_a_model_is_left_as_it_was(tasks, hybrid):
    tasks.choices()
    hybrid[0].train()
    try:
        tasks.run("choices", model=hybrid)
        assert hybrid[0].training
    finally: hybrid[0].eval()


def test_the_library_knows_its_tasks():
    "The tasks of papers, by name, without their documents."
    config = HarnessConfig(tasks=["arc_easy", "hellaswag", "fda", "swde", "squad_completion"])
    assert set(config.tasks) <= set(task_manager(config).all_tasks)


def test_the_command_line_of_the_library(tasks, hybrid, tmp_path):
    "A folder with a hybrid, through the library's own program."
    model, tokenizer = hybrid
    for part in hybrid: part.save_pretrained(tmp_path / "hybrid")
    tasks.choices()
    program = "from flashmorph.run.cli import app; app(prog_name='flashmorph')"
    done = subprocess.run(
        [sys.executable, "-c", program, "lm-eval", "run", "--model", "hf", "--model_args",
         f"pretrained={tmp_path / 'hybrid'}", "--tasks", "choices", "--device", "cpu",
         "--include_path", str(tasks.folder), "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text())["results"]["choices"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    ours = tasks.run("choices", model=(loaded, tokenizer))
    for metric in ("acc", "acc_norm"):
        assert results[f"{metric},none"] == ours.scores[f"choices {metric}"].value


def test_facts_do_not_depend_on_the_process(tasks):
    "The same task, loaded twice, has the same facts, although functions lie elsewhere."
    tasks.choices()
    config = HarnessConfig(tasks=["choices"], include=[tasks.folder])
    facts = [harness.task_facts(load_tasks(config)[0]["choices"], config) for _ in range(2)]
    assert facts[0] == facts[1]
