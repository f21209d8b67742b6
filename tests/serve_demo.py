"""Serve the native checkpoint of a demo with vLLM, without the plug-in, and write its answers down.

Run in the environment of `make test-serve`, after the first two of `COMMANDS`:

    .venv-serve/bin/python tests/serve_demo.py runs/native served nbs/results/serve_demo.json"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import test_serve as serving
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashmorph as fm
from flashmorph.serve.rearrange import runnable

OPTIONS = ["--served-model-name", "demo", "--dtype", "bfloat16", "--max-model-len", "1024",
           "--chat-template", "chat.jinja"]
COMMANDS = ["flashmorph demo --mixer gdn_native --out runs/native",
            "flashmorph export runs/native/hybrid served --to qwen3_5 --engine vllm --head-dim 64",
            " ".join(["vllm serve served", *OPTIONS])]
STORIES = ("Once upon a time, there was a little girl named", "Tom and his dog went to the park. ",
           "One day, a bird found a big red")
TOKENS = 40
END = "Passkey:"


def books(tokenizer, seeds):
    "Texts of unseen books: the story with all questions, and the right answers."
    for seed in seeds:
        row = next(iter(fm.passkeys(tokenizer, length=256, keys=4, words_per_key=6, seed=seed,
                                    held_out=True)))
        yield tokenizer.decode(row["input_ids"])


def parted(model, prompt, ours, theirs):
    "Where two texts part, and by how much `model` prefers our token, in nats; `None` if nowhere."
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    if at is None: return None
    with torch.no_grad():
        row = model(torch.tensor([prompt + ours[:at]]), use_cache=False).logits[0, -1]
    return {"at": at, "nats": round(float(row[ours[at]] - row[theirs[at]]), 4)}


def completions(port, tokenizer, native, hybrid, texts):
    "What server and transformers write after each text, both in bfloat16."
    for kind, text in texts:
        ids = tokenizer(text)["input_ids"]
        body = {"model": "demo", "prompt": ids, "max_tokens": TOKENS, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True}
        answer = json.loads(serving.ask(port, "/v1/completions", body))["choices"][0]
        theirs = answer["token_ids"]
        with runnable(native): ours = serving.greedy(native, ids, TOKENS)
        yield {"kind": kind, "text": text, "tokens": len(ids), "answer": answer["text"],
               "of": TOKENS, "equal": sum(a == b for a, b in zip(ours, theirs)),
               "parted": parted(hybrid, ids, ours, theirs)}


def chat(port, book):
    "A chat about a book: its four questions, asked by curl, and what the book says."
    story, *rest = re.split(f"(?<={END})", book)
    asked = [story, *(re.sub(r"^[^.]*\.", "", part) for part in rest[:-1])]
    right = [re.match(r"[^.]*\.", part)[0] for part in rest]
    messages = []
    for question in asked:
        messages.append({"role": "user", "content": question})
        body = {"model": "demo", "messages": messages, "max_tokens": 7, "temperature": 0}
        address = f"http://127.0.0.1:{port}/v1/chat/completions"
        done = subprocess.run(["curl", "-s", address, "-H", "Content-Type: application/json",
                               "-d", json.dumps(body)], capture_output=True, check=True)
        answer = json.loads(done.stdout)["choices"][0]["message"]
        messages.append({"role": "assistant", "content": answer["content"]})
    return {"messages": messages, "right": right}


def refusal(folder, log):
    "What the plug-in answers to the hybrid itself, whose heads are too narrow for vLLM on a CPU."
    try:
        with serving.server(folder, log, []): return None
    except AssertionError:
        return re.search(r"flashmorph cannot .*", log.read_text())[0]


def main(run, served, results):
    tokenizer = AutoTokenizer.from_pretrained(served)
    native = AutoModelForCausalLM.from_pretrained(served, dtype=torch.bfloat16).eval()
    hybrid = fm.load_model(run / "hybrid")[0]
    first, *others = books(tokenizer, range(10, 16))
    # up to the second question, so that an answer has been seen
    cut = [END.join(book.split(END)[:2]) + END for book in others]
    texts = [("story", text) for text in STORIES] + [("book", text) for text in cut]
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch, "chat.jinja")
        template.write_text(serving.TEMPLATE)
        options = [*OPTIONS[:-1], str(template)]
        with serving.server(served, Path(scratch, "log"), options, VLLM_PLUGINS="") as port:
            found = {"chat": chat(port, first), "prompts": list(
                completions(port, tokenizer, native, hybrid, texts))}
        found["refusal"] = refusal(run / "hybrid", Path(scratch, "log"))
    models = json.loads((run / "results.json").read_text())["models"]
    found["recall"] = {"teacher": models["teacher"]["zero_shot"]["recall"],
                       "hybrid": models["flashmorph"]["distilled"]["recall"]}
    found |= {"commands": COMMANDS, "template": serving.TEMPLATE,
              "export": json.loads((served / "export.json").read_text()),
              "versions": {"vllm": serving.vllm.__version__.partition("+")[0],
                           "torch": torch.__version__, "transformers": transformers.__version__}}
    results.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__": main(*map(Path, sys.argv[1:]))
