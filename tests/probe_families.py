"""Which causal language models of the installed transformers can be converted, measured.

    python tests/probe_families.py                         # every type; some minutes
    python tests/probe_families.py llama gpt2 --mixers gdn
    python tests/probe_families.py --json nbs/results/families.json

Builds a tiny random model of each type, converts it, and compares the hybrid with itself: with and
without a cache, in pieces, padded, saved and loaded. The exit status is 1 if a model was accepted
and came out wrong."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import causal_types, randomised, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from flashmorph.model.cache import cache_name
from flashmorph.model.morph import morph

MIXERS = ("lightning", "gdn")
CHOICES = ([1, 3], [0, 2], [])        # full layers
TOKENS, PAD, NEW = 28, 7, 4
TOLERANCE = 5e-4


def random_ids(rows: int = 1, length: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(6, 151, (rows, length), generator=generator)


def padded(ids: torch.Tensor, pad: int = PAD) -> dict[str, torch.Tensor]:
    "The rows with padding on the left, as the keywords of a call."
    real = torch.cat([torch.zeros(len(ids), pad), torch.ones_like(ids)], 1).long()
    filled = torch.cat([torch.zeros(len(ids), pad).long(), ids], 1)
    return {
        "input_ids": filled, "attention_mask": real,
        "position_ids": (real.cumsum(-1) - 1).clamp(min=0),
    }


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    "The difference, relative to `b`; infinite if something is no number."
    error = float((a - b).norm() / b.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def in_pieces(model: Any, cuts: tuple[int, ...], **rows: torch.Tensor) -> torch.Tensor:
    "Logits of a row that is read piece by piece through a cache."
    target = getattr(model, "host", model)
    cache, name = DynamicCache(), cache_name(type(target).forward)
    ends = (*cuts, rows["input_ids"].shape[1])
    parts = []
    for start, end in zip((0, *cuts), ends):
        piece = {key: x[:, start:end] for key, x in rows.items() if key != "attention_mask"}
        if "attention_mask" in rows: piece["attention_mask"] = rows["attention_mask"][:, :end]
        parts.append(model(**piece, **{name: cache}, use_cache=True).logits)
    return torch.cat(parts, 1)


def generated(model: Any, **kwargs: Any) -> torch.Tensor:
    return model.generate(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **kwargs
    )


# Checks of a model by itself: the hybrid's, and the teacher's as a control.


def looks_back(model: Any) -> float:
    "Does the last token leave the earlier ones alone?"
    ids = random_ids()
    other = ids.clone()
    other[:, -1] = 5
    return apart(model(other, use_cache=False).logits[:, :-1],
                 model(ids, use_cache=False).logits[:, :-1])


def pieces(model: Any) -> float:
    ids = random_ids()
    whole = model(ids, use_cache=False).logits
    return max(apart(in_pieces(model, cuts, input_ids=ids), whole)
               for cuts in ((20,), (1, 9, 27)))


def left_padded(model: Any) -> float:
    ids = random_ids()
    alone = model(ids, use_cache=False).logits
    return apart(model(**padded(ids), use_cache=False).logits[:, PAD:], alone)


def padded_pieces(model: Any) -> float:
    "The first cut is inside the padding."
    rows = padded(random_ids())
    whole = model(**rows, use_cache=False).logits[:, PAD:]
    return apart(in_pieces(model, (3, 25), **rows)[:, PAD:], whole)


def cached(model: Any) -> float:
    ids = random_ids()
    same = torch.equal(generated(model, input_ids=ids),
                       generated(model, input_ids=ids, use_cache=False))
    return 0.0 if same else 1.0


def batched(model: Any) -> float:
    "Two prompts of different lengths in one batch, and each by itself."
    long, short = random_ids(), random_ids(length=TOKENS - PAD)
    one = padded(short)
    together = generated(
        model, input_ids=torch.cat([long, one["input_ids"]]),
        attention_mask=torch.cat([torch.ones_like(long), one["attention_mask"]]),
    )[:, TOKENS:]
    single = [generated(model, input_ids=ids)[:, ids.shape[1]:] for ids in (long, short)]
    return 0.0 if torch.equal(together, torch.cat(single)) else 1.0


def beams(model: Any) -> float:
    ids = random_ids(length=12)
    kwargs = dict(input_ids=ids, num_beams=3, num_return_sequences=2)
    same = torch.equal(generated(model, **kwargs), generated(model, **kwargs, use_cache=False))
    return 0.0 if same else 1.0


ALONE = (looks_back, pieces, left_padded, padded_pieces, cached, batched, beams)


# Checks of a hybrid beside its teacher.


def identity(morphed: Any, teacher: Any) -> float:
    "With every gate at 1, the teacher: bit for bit, padded too."
    morphed.gates = 1.0
    rows = ({"input_ids": random_ids(2)}, padded(random_ids(2)))
    same = [torch.equal(morphed(**row).logits, teacher(**row, use_cache=False).logits)
            for row in rows]
    return 0.0 if all(same) else 1.0


def all_kept(morphed: Any, teacher: Any) -> float:
    "With every layer kept, the hybrid generates what the teacher does."
    ids, hybrid = random_ids(), morphed.commit(range(morphed.num_layers))
    kwargs = dict(input_ids=ids)
    return 0.0 if torch.equal(generated(hybrid, **kwargs), generated(teacher, **kwargs)) else 1.0


def all_linear(morphed: Any, teacher: Any) -> float:
    "With every gate at 0, the hybrid without full layers."
    morphed.gates = 0.0
    ids = random_ids(2)
    return apart(morphed(ids).logits, morphed.commit([])(ids, use_cache=False).logits)


def round_trip(hybrid: Any) -> float:
    ids = random_ids(2)
    before = hybrid(ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        hybrid.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    return 0.0 if torch.equal(loaded(ids, use_cache=False).logits, before) else 1.0


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def outcome(check: Callable, *args: Any) -> str | None:
    "What is wrong, or None."
    try: error = check(*args)
    except Exception as problem: return first_line(problem)
    return None if error <= TOLERANCE else f"apart by {error:.2g}"


def problems(teacher: Any, mixer: str, spared: set[str]) -> Iterator[tuple[str, str]]:
    "Each check that fails, and how."
    morphed = morph(teacher, mixer)
    for layer in morphed.layers: randomised(layer.linear.mixer, 0.05)
    for check in (identity, all_kept, all_linear):
        if problem := outcome(check, morphed, teacher): yield f"{mixer}: {check.__name__}", problem
    for full in CHOICES:
        try: hybrid = morphed.commit(full)
        except Exception as error:
            yield f"{mixer}: commit {full}", first_line(error)
            continue
        for check in (*ALONE, round_trip):
            problem = outcome(check, hybrid)
            if problem and check.__name__ not in spared:
                yield f"{mixer}: {check.__name__} with {full} full", problem


def probe(model_type: str, mixers: tuple[str, ...] = MIXERS) -> dict[str, Any]:
    "What comes of one type: not built, refused, right or wrong; and why."
    try: teacher = tiny_model(model_type)
    except Exception as error:
        return {"result": "not built", "why": first_line(error)}
    try: morph(teacher)
    except ValueError as error: return {"result": "refused", "why": reason(error)}
    except Exception as error:
        return {"result": "wrong", "why": {"morph": first_line(error)}}
    # what the teacher cannot do is not asked of the hybrid
    unable = {check.__name__: outcome(check, teacher) for check in ALONE}
    spared = {name for name, problem in unable.items() if problem}
    wrong = {}
    if "looks_back" in spared: wrong["teacher"] = "accepted, but looks ahead"
    for mixer in mixers: wrong |= dict(problems(teacher, mixer, spared))
    found: dict[str, Any] = {"result": "wrong" if wrong else "right"}
    if spared: found["unlike"] = {name: unable[name] for name in sorted(spared)}
    return found | ({"why": wrong} if wrong else {})


def reason(error: ValueError) -> str:
    "The reason in a refusal, without what is the same in each."
    text = str(error).split(". Supported families")[0]
    return text.split("cannot be converted: ")[-1]


def counts(found: dict[str, Any]) -> dict[str, int]:
    kinds = ("right", "refused", "wrong", "not built")
    results = [one["result"] for one in found.values()]
    return {kind: results.count(kind) for kind in kinds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all if none is given")
    parser.add_argument("--mixers", nargs="+", default=MIXERS)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    found = {}
    for model_type in args.types or causal_types():
        start = time.perf_counter()
        found[model_type] = probe(model_type, tuple(args.mixers))
        seconds = time.perf_counter() - start
        print(f"{model_type:28} {seconds:5.1f} s ", json.dumps(found[model_type]), flush=True)
    print(f"transformers {transformers.__version__}:", counts(found))
    if args.json: write(args.json, found, args.mixers)
    return int(counts(found)["wrong"] > 0)


def write(path: Path, found: dict[str, Any], mixers: tuple[str, ...]) -> None:
    "One type a line."
    head = {
        "command": "python tests/probe_families.py --json nbs/results/families.json",
        "transformers": transformers.__version__, "mixers": list(mixers), "counts": counts(found),
    }
    lines = [f'  "{name}": {json.dumps(value)}' for name, value in head.items()]
    types = [f'    "{name}": {json.dumps(one)}' for name, one in found.items()]
    lines.append('  "types": {\n' + ",\n".join(types) + "\n  }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.modules["fla"] = None  # type: ignore[assignment]  # transformers takes fla on a CPU too
    sys.exit(main())
