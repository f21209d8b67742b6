"Small teachers and recipes for the tests."
import os
import signal
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from flashmorph.data.stories import Stories
from flashmorph.run.pretrain import build_tokenizer
from flashmorph.run.recipe import Recipe
from flashmorph.store import EventLog
from flashmorph.train.fit import Callback

# the command line, whatever is installed
PROGRAM = [sys.executable, "-c",
           "from flashmorph.run.cli import app; app(prog_name='flashmorph')"]


def save_teacher(folder: Path, family: str = "qwen3", tokenizer=None, **kwargs) -> Path:
    "A random decoder with a tokenizer (the bundled teacher's unless given), as a folder."
    tokenizer = tokenizer or build_tokenizer()
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "initializer_range": 0.1,
    }
    special = ("pad_token_id", "eos_token_id", "bos_token_id")
    ids = {name: getattr(tokenizer, name) for name in special}
    config = AutoConfig.for_model(family, **sizes | ids | kwargs)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def other_tokenizer() -> PreTrainedTokenizerFast:
    "A byte-level BPE tokenizer with its own vocabulary and a beginning-of-text token."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator((Stories(9)[i] for i in range(50)), trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tok, **names)


class Stop(Callback):
    "Presses Ctrl-C after a step of a stage."
    def __init__(self, stage: str, step: int):
        self.at = (stage, step)

    def step(self, event):
        if (event["stage"].split("-")[0], event["step"]) == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def small_recipe(teacher: Path | str, **kwargs) -> Recipe:
    "A few steps of every stage."
    steps = {"steps": 4, "batch_size": 2}
    settings = {
        "teacher": str(teacher), "budget": 2, "text": {"length": 64},
        "passkeys": {"length": 128, "keys": 2, "words_per_key": 2},
        "align": {**steps, "start_tokens": 300}, "gates": dict(steps), "distill": dict(steps),
        "finetune": {"steps": 2}, "evaluate": {"books": 4},
    }
    return Recipe(**settings | kwargs)


def events(folder: Path) -> list[dict]:
    "The log of a run, without the times."
    log = EventLog(folder / "log.jsonl")
    return [{key: value for key, value in event.items() if key != "seconds"} for event in log]
