"""A zoo of small teachers to judge selectors on: `python tests/zoo.py NAME` makes one of them.

The planted teachers are written down, not trained: which layers they need is known. The others are
trained for some minutes on one core. Each is compared with all sets of layers of every size that is
asked for, and the comparison becomes `nbs/results/zoo_NAME.json`.
"""
import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flashmorph.model.morph import MorphableModel, morph
from flashmorph.run.compare import compare_selections, write_selections
from flashmorph.train.align import align
from flashmorph.train.distill import finetune

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


# Trained teachers: family, layers, heads, and the tasks of the last phase.
TRAINED = {
    "qwen3": ("qwen3", 6, 2, Task(pairs=6, repeated=0.3)),
    "llama": ("llama", 8, 1, Task(pairs=5, repeated=0.5)),
    "mistral": ("mistral", 6, 1, Task(pairs=8, questions=6, repeated=0.2)),
    "qwen2": ("qwen2", 10, 1, Task(pairs=6, repeated=0.4)),
}
COMMON = {"answer_weight": 2.0, "betas": (0.9, 0.98), "weight_decay": 0.02, "batch_size": 32,
          "lr": 2e-3, "progress": False}


def trained(name: str, steps: int = 900) -> PreTrainedModel:
    "A teacher with random weights, trained on repeated rows and then on all of its tasks."
    family, layers, heads, task = TRAINED[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, head_dim=16,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config.head_dim = 16
    model = AutoModelForCausalLM.from_config(config)
    third = steps // 3
    finetune(model, Task(repeated=1.0, seed=1), steps=third, warmup=third // 2, **COMMON)
    finetune(model, task, steps=steps - third, warmup=20, lr_end=1e-4, **COMMON)
    return model.eval().requires_grad_(False)


def morphable(name: str) -> tuple[MorphableModel, Task]:
    "The model with both branches, and its task. A planted layer that turns linear writes nothing."
    if name in TRAINED:
        task = TRAINED[name][3]
        model = morph(trained(name))
        align(model, Task(task.pairs, task.questions, task.repeated, seed=2), steps=100,
              batch_size=16, progress=False)
        return model, task
    model = morph(planted(name))
    for layer in model.layers: layer.linear.attn.o_proj.weight.detach().zero_()
    return model, Task()


METHODS = ("flashmorph", "remove-one", "add-one", "eliminate", "gather", "uniform")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*PLANTED, *TRAINED])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budgets", default="2,3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--log", type=Path, help="keeps every measurement, to go on from")
    parser.add_argument("--json", type=Path, help="the result, by default in nbs/results")
    asked = parser.parse_args()
    model, task = morphable(asked.name)

    def rows(seed: int) -> Task:
        return Task(task.pairs, task.questions, task.repeated, seed=1000 + seed)

    about = PLANTED[asked.name][0] if asked.name in PLANTED else TRAINED[asked.name][0]
    shown = compare_selections(
        model, rows, rows(1_000_000), methods=tuple(asked.methods.split(",")),
        budgets=tuple(map(int, asked.budgets.split(","))), seeds=asked.seeds, count=asked.count,
        batch_size=32, log=asked.log, facts={"teacher": asked.name, "family": about},
        say=lambda line: print(">", line, file=sys.stderr))
    write_selections(shown, asked.json or RESULTS / f"zoo_{asked.name}.json")


if __name__ == "__main__": main()
