"""A zoo of small teachers to judge selectors on: `python tests/zoo.py` makes the whole table.

The planted teachers are written down, not trained: which layers they need is known. The others are
trained for some minutes on one core. Each is compared with all sets of layers of every size that is
asked for, and the comparison becomes `nbs/results/zoo_NAME_MIXER.json`. `NAME --mixer MIXER` makes
one of them.
"""
import argparse
import itertools
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import flashmorph  # noqa: F401 (registers all selectors)
from flashmorph.choose.rank import SELECTORS
from flashmorph.data.passkeys import passkeys
from flashmorph.model.morph import MorphableModel, morph
from flashmorph.model.teacher import load_teacher
from flashmorph.run.compare import compare_selections
from flashmorph.run.subsets import HeldOut
from flashmorph.scores import Selections
from flashmorph.train.align import align
from flashmorph.train.distill import finetune

Rows = Callable[[int], Iterable[dict[str, torch.Tensor]]]
RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results"

# The tokens: 16 keys, 16 values, 15 fillers and a question mark.
KEYS, VALUES, FILLERS = range(16), range(16, 32), range(32, 47)
ASK, VOCABULARY, LENGTH = 47, 48, 64


@dataclass(frozen=True)
class Task:
    "Rows of one kind: `pairs` of a key and its value, `questions`, and the share of repeated rows."
    pairs: int = 6
    questions: int = 4
    repeated: float = 0.0
    seed: int = 0

    def pairs_row(self, rng: random.Random) -> tuple[list[int], list[int]]:
        "Pairs among fillers, then `? key value` for some of the keys."
        keys = rng.sample(KEYS, self.pairs)
        values = [rng.choice(VALUES) for _ in keys]
        free = LENGTH - 2 * self.pairs - 3 * self.questions
        places = sorted(rng.choices(range(free + 1), k=self.pairs))
        story = [rng.choice(FILLERS) for _ in range(free)]
        ids: list[int] = []
        for n, (key, value) in enumerate(zip(keys, values)):
            ids += [*story[places[n - 1] if n else 0:places[n]], key, value]
        ids += story[places[-1]:]
        answers = [0] * len(ids)
        for n in rng.sample(range(self.pairs), self.questions):
            ids += [ASK, keys[n], values[n]]
            answers += [0, 0, n + 1]
        return ids, answers

    def repeated_row(self, rng: random.Random) -> tuple[list[int], list[int]]:
        "Values in a random order, again and again; what the first period shows is an answer."
        period = rng.randrange(6, 25)
        once = [rng.choice(VALUES) for _ in range(period)]
        ids = [once[i % period] for i in range(LENGTH)]
        return ids, [int(i > period) for i in range(LENGTH)]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = random.Random(f"zoo {self.seed}")
        while True:
            kind = self.repeated_row if rng.random() < self.repeated else self.pairs_row
            ids, answers = kind(rng)
            yield {"input_ids": torch.tensor(ids), "answers": torch.tensor(answers)}


# Planted teachers. The stream of a token has four parts: the token itself, the token before, the
# answer, and a constant.
HERE, BEFORE, ANSWER, CONSTANT = 0, VOCABULARY, 2 * VOCABULARY, 3 * VOCABULARY
WIDTH, HEAD = 3 * VOCABULARY + 16, 64
UNIT = (WIDTH / 2) ** 0.5           # a one-hot part and the constant, after the norm


def hadamard(n: int) -> torch.Tensor:
    "`n` orthogonal rows of ones and minus ones, `n` a power of two."
    rows = torch.ones(1, 1)
    while len(rows) < n:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows


def look_back(attention: torch.nn.Module, angles: torch.Tensor) -> None:
    "Attend to the token before, and write that token into the part `BEFORE`."
    quick = range(HEAD // 4)                                # half of the angles, the fast ones
    for i in quick:
        attention.k_proj.weight[i, CONSTANT] = 13 / UNIT
        attention.q_proj.weight[i, CONSTANT] = 13 / UNIT * angles[i].cos()
        attention.q_proj.weight[i + HEAD // 2, CONSTANT] = -13 / UNIT * angles[i].sin()
    copy_token(attention, BEFORE)


def recall(attention: torch.nn.Module) -> None:
    "Attend to what came after the same key before, and write that token into the part `ANSWER`."
    codes = hadamard(len(KEYS))
    slow = HEAD // 4                                        # angles that hardly turn
    for key in KEYS:
        attention.q_proj.weight[slow:2 * slow, HERE + key] = 4 * codes[key] / UNIT
        attention.k_proj.weight[slow:2 * slow, BEFORE + key] = 4 * codes[key] / UNIT
    copy_token(attention, ANSWER)


def copy_token(attention: torch.nn.Module, part: int) -> None:
    "Write the token that is attended to into a part of the stream."
    for token in range(VOCABULARY):
        attention.v_proj.weight[token, HERE + token] = 1 / UNIT
        attention.o_proj.weight[part + token, token] = 1


PLANTED = {
    # family, layers, those that look back, those that recall
    "twins": ("llama", 6, (0,), (2, 4)),
    "chains": ("mistral", 8, (1, 3), (4, 6)),
    "pair": ("qwen2", 6, (1,), (4,)),
}


@torch.no_grad()
def planted(name: str) -> PreTrainedModel:
    "A teacher that is written down; its other layers write a little noise."
    family, layers, backward, recalling = PLANTED[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=16, head_dim=HEAD,
        num_hidden_layers=layers, num_attention_heads=1, num_key_value_heads=1,
        max_position_embeddings=512, tie_word_embeddings=False, rope_theta=1e8,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config.head_dim = HEAD
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.embed_tokens.weight.zero_()
    model.lm_head.weight.zero_()
    for token in range(VOCABULARY):
        model.model.embed_tokens.weight[token, HERE + token] = 1
        model.lm_head.weight[token, ANSWER + token] = 2
    model.model.embed_tokens.weight[:, CONSTANT] = 1
    angles = 1e8 ** (-torch.arange(0, HEAD, 2) / HEAD)
    for i, block in enumerate(model.model.layers):
        block.mlp.down_proj.weight.zero_()
        block.self_attn.o_proj.weight.mul_(0.3)
        if i not in backward + recalling: continue
        for weight in block.self_attn.parameters(): weight.zero_()
        if i in backward: look_back(block.self_attn, angles)
        else: recall(block.self_attn)
    return model


@dataclass(frozen=True)
class Trained:
    "A teacher to train, its name that of its family: its size, and the tasks of the last phase."
    layers: int
    steps: int
    task: Task
    heads: int = 1
    head_dim: int = 16


# With small heads a layer can recall less alone, so that more layers matter.
TRAINED = {
    "qwen3": Trained(6, 1200, Task(pairs=6, repeated=0.3), heads=2),
    "llama": Trained(8, 1500, Task(pairs=5, repeated=0.5)),
    "mistral": Trained(6, 2700, Task(pairs=8, questions=6, repeated=0.2)),
    "qwen2": Trained(10, 1500, Task(pairs=6, repeated=0.4)),
    "cohere2": Trained(10, 2400, Task(pairs=5, repeated=0.4), head_dim=8),
    "smollm3": Trained(12, 2400, Task(pairs=6, repeated=0.4), head_dim=8),
}
BUNDLED = {"length": 128, "keys": 2, "words_per_key": 3}
COMMON = {"answer_weight": 2.0, "betas": (0.9, 0.98), "weight_decay": 0.02, "batch_size": 32,
          "lr": 2e-3, "progress": False}


def trained(name: str) -> PreTrainedModel:
    "A teacher with random weights, trained on repeated rows and then on all of its tasks."
    one = TRAINED[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, head_dim=one.head_dim,
        num_hidden_layers=one.layers, num_attention_heads=one.heads, num_key_value_heads=1,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config.head_dim = one.head_dim
    model = AutoModelForCausalLM.from_config(config)
    third = one.steps // 3
    finetune(model, Task(repeated=1.0, seed=1), steps=third, warmup=third // 2, **COMMON)
    finetune(model, one.task, steps=one.steps - third, warmup=20, lr_end=1e-4, **COMMON)
    return model.eval().requires_grad_(False)


def kept_teacher(name: str, folder: Path | None) -> PreTrainedModel:
    "The trained teacher, from the folder if it is there, else trained now and saved."
    if folder is None: return trained(name)
    if not (folder / name).exists(): trained(name).save_pretrained(folder / name)
    loaded = AutoModelForCausalLM.from_pretrained(folder / name)
    return loaded.eval().requires_grad_(False)


def morphable(
    name: str, mixer: str = "lightning", folder: Path | None = None
) -> tuple[MorphableModel, Rows]:
    """The model with both branches, and a function that gives the rows of a seed.

    A planted layer that turns linear writes nothing; the others are aligned."""
    if name in PLANTED:
        model = morph(planted(name), mixer)
        for layer in model.layers: layer.linear.attn.o_proj.weight.detach().zero_()
        return model, lambda seed: Task(seed=seed)
    if name == "bundled":
        teacher, tokenizer = load_teacher()

        def rows(seed: int) -> Iterable[dict[str, torch.Tensor]]:
            return passkeys(tokenizer, seed=seed, **BUNDLED)
    else:
        teacher, task = kept_teacher(name, folder), TRAINED[name].task

        def rows(seed: int) -> Iterable[dict[str, torch.Tensor]]: return replace(task, seed=seed)
    torch.manual_seed(0)        # the same branches, whether the teacher was trained now or loaded
    model = morph(teacher, mixer)
    align(model, rows(2), steps=100, batch_size=16, progress=False)
    return model, rows


# All selectors but those that another one covers here: all sets are measured anyway.
METHODS = tuple(name for name in SELECTORS if name not in ("exhaustive", "uniform-start"))


def matters(model: MorphableModel, held_out: Iterable[Any], count: int) -> dict[str, Any]:
    "Answer NLL and recall of the teacher, NLL without any full layer, and without each one."
    held, layers = HeldOut(model, held_out, count, batch_size=64), range(model.num_layers)

    def mean(what: str, full: Iterable[int]) -> float: return statistics.fmean(held(full)[what])
    nll = mean("nll", layers)
    alone = [mean("nll", [i for i in layers if i != layer]) - nll for layer in layers]
    return {"recall": mean("recall", layers), "nll": nll, "nll of no full layer": mean("nll", []),
            "more nll without": [round(more, 4) for more in alone]}


def in_short(shown: Selections) -> dict[str, Any]:
    "What is kept of a comparison: what was asked, what it took, and how good each set is."
    asked = [{"method": a.method, "seed": a.seed, "order": a.order, "passes": round(a.passes),
              "tokens": a.tokens, "seconds": round(a.seconds, 2)} for a in shown.ranked]
    kept = [{"method": one.method, "seed": one.seed, "layers": one.layers,
             "kl": round(one.scores["kl"].value, 5), "percentile": round(one.percentile, 2),
             "regret": round(one.regret, 4)} for one in shown.kept]
    subsets = [{**asdict(every), "best": round(every.best, 5), "median": round(every.median, 5),
                "worst": round(every.worst, 5)} for every in shown.subsets]
    return {"subsets": subsets, "asked": asked, "kept": kept}


def compared(name: str, mixer: str, asked: argparse.Namespace) -> dict[str, Any]:
    "One teacher with one mixer: itself, all its sets, and what selectors keep."
    model, rows = morphable(name, mixer, asked.teachers)
    sizes = range(2, model.num_layers // 2 + 1)
    budgets = tuple(map(int, asked.budgets.split(","))) if asked.budgets else tuple(sizes)
    shown = compare_selections(
        model, lambda seed: rows(1000 + seed), rows(1_000_000), count=asked.count, budgets=budgets,
        methods=tuple(asked.methods.split(",")), seeds=asked.seeds, batch_size=64, log=asked.log,
        closely=False, interactions=False, say=lambda line: print(">", line, file=sys.stderr))
    about = {"teacher": name, "family": model.config.model_type, "layers": model.num_layers,
             "mixer": mixer, "held-out rows": asked.count}
    return {**about, **matters(model, rows(1_000_000), asked.count), **in_short(shown)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="by default all teachers")
    parser.add_argument("--mixer", action="append", help="by default lightning, and then gdn")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budgets", help="by default from 2 to half of the layers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--teachers", type=Path, help="folder that keeps trained teachers")
    parser.add_argument("--log", type=Path, help="keeps every measurement, to go on from")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the results")
    asked = parser.parse_args()
    names = asked.names or [*PLANTED, *TRAINED]
    if unknown := {*names} - {*PLANTED, *TRAINED, "bundled"}:
        parser.error(f"no teacher {', '.join(sorted(unknown))}")
    for name, mixer in itertools.product(names, asked.mixer or ["lightning", "gdn"]):
        found = compared(name, mixer, asked)
        file = asked.folder / f"zoo_{name}_{mixer}.json"
        file.write_text(packed(found), encoding="utf-8")


def packed(found: dict[str, Any]) -> str:
    "JSON with one line for each member of a list of objects."
    parts = []
    for name, value in found.items():
        text = json.dumps(value)
        if value and isinstance(value, list) and isinstance(value[0], dict):
            text = "[\n" + ",\n".join("  " + json.dumps(one) for one in value) + "\n ]"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__": main()
