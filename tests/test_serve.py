"""A real engine: vLLM on a CPU serves hybrids by the plug-in, and native exports by itself.

`make test-serve` builds an environment for these tests and runs them; elsewhere they are skipped.
With `--serve-results FILE` the counts and differences are written down."""
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

# vLLM reads these when it is imported: one process, a small cache, nobody told
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
               "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.serve

import psutil
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.distributed import cleanup_dist_env_and_memory

from flashmorph.model.hybrid import HybridForCausalLM
from flashmorph.model.morph import commit, morph
from flashmorph.model.teacher import load_teacher
from flashmorph.serve.export import export
from flashmorph.serve.rearrange import runnable

VOCABULARY = 512
LENGTHS = (1, 2, 17, 64, 65, 130, 233, 300)
SIZES = dict(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
OWN = {
    "qwen3": dict(head_dim=32),
    "qwen3_moe": dict(head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2,
                      decoder_sparse_step=1),
}
MIXERS = ("lightning", "gla", "gdn")
FAMILIES = ("qwen3", "llama", "qwen3_moe")
OPTIONS = ("", "conv=4", "expand_kv=True")


def hybrid_of(family: str, mixer: str, full=(1,), committed=None, **kw) -> HybridForCausalLM:
    "A hybrid with random weights everywhere; its greedy text does not repeat itself."
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | OWN.get(family, {}) | kw)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    for name, p in teacher.named_parameters():
        noise = torch.randn_like(p)
        p.data = p.data + 0.2 * noise if "norm" in name else 0.08 * noise
        if "embed" in name: p.data *= 10
    model = morph(teacher, mixer)
    for layer in model.layers:
        for p in layer.linear.mixer.parameters(): p.data += 0.1 * torch.randn_like(p)
    return commit(model, list(full), **committed or {})


def prompts_of(lengths=LENGTHS) -> list[list[int]]:
    "Random prompts, and one that begins as the longest does."
    seed = torch.Generator().manual_seed(7)
    found = [torch.randint(3, VOCABULARY, (n,), generator=seed).tolist() for n in lengths]
    return [*found, [*found[-1][:256], 5, 6]]


def greedy(model, prompt: list[int], tokens: int) -> list[int]:
    "What `generate` writes; with the mask, for a prompt may hold the padding token."
    ids = torch.tensor([prompt])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                             do_sample=False, pad_token_id=0, eos_token_id=None)
    return written[0, len(prompt):].tolist()


@torch.no_grad()
def log_probs(model, prompt: list[int], written: list[int]) -> list[float]:
    "Of the tokens `written` after `prompt`, by one forward pass."
    logits = model(torch.tensor([prompt + written]), use_cache=False).logits[0]
    rows = logits[len(prompt) - 1:-1].log_softmax(-1)
    return rows[range(len(written)), written].tolist()


@contextmanager
def engine(folder: Path, **settings):
    "An engine in this process; everything of it is gone afterwards."
    usual = dict(skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=512,
                 max_num_seqs=4, max_num_batched_tokens=64, enable_prefix_caching=True)
    llm = None
    try:
        llm = vllm.LLM(model=str(folder), **usual | settings)
        yield llm
    finally:
        if llm is not None: llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def served(llm, prompts: list[list[int]], tokens: int = 16) -> list:
    "What an engine writes after `prompts`, greedily, with log-probabilities."
    how = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
                              logprobs=0)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(given, how, use_tqdm=False)


class Tally:
    "What the tests found, for the file of results."
    def __init__(self): self.groups: dict[str, dict] = {}

    def add(self, group: str, hybrid: str, equal: int, of: int, difference: float | None = None):
        found = self.groups.setdefault(group, {"hybrids": [], "equal": 0, "of": 0})
        if hybrid not in found["hybrids"]: found["hybrids"].append(hybrid)
        found["equal"] += equal
        found["of"] += of
        if difference is not None:
            found["largest_difference"] = max(difference, found.get("largest_difference", 0))


@pytest.fixture(scope="module")
def tally(request):
    "A `Tally`, written to the file of the option at the end."
    found = Tally()
    yield found
    path = request.config.getoption("--serve-results")
    if not path: return
    for group in found.groups.values():
        if "largest_difference" in group:
            group["largest_difference"] = float(f"{group['largest_difference']:.0e}")
    from transformers import __version__
    versions = {"vllm": vllm.__version__.partition("+")[0], "torch": torch.__version__,
                "transformers": __version__}
    written = {"versions": versions, "groups": found.groups}
    Path(path).write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")


def check_served(tally, tmp_path, group: str, name: str, hybrid, **settings) -> None:
    """An engine writes what `generate` writes, twice: from nothing, and from its cache.

    Log-probabilities are those of one forward pass to 1e-3, far above what rounding did in any
    hybrid of these tests, and far below what a lost token or a wrong position does."""
    folder = tmp_path / "hybrid"
    hybrid.save_pretrained(folder)
    prompts = prompts_of()
    expect = [greedy(hybrid, prompt, 16) for prompt in prompts]
    assert len({tuple(text) for text in expect}) > 6       # prompts matter
    with engine(folder, **settings) as llm:
        for again in (False, True):
            found = served(llm, prompts)
            texts = [list(x.outputs[0].token_ids) for x in found]
            cached = [x.num_cached_tokens for x in found]
            apart = [abs(one[token].logprob - ours) for prompt, x in zip(prompts, found)
                     for one, token, ours in zip(x.outputs[0].logprobs, x.outputs[0].token_ids,
                                                 log_probs(hybrid, prompt, x.outputs[0].token_ids))]
            equal = sum(a == b for a, b in zip(texts, expect))
            tally.add(group, name, equal, len(prompts), max(apart))
            assert texts == expect
            assert max(apart) < 1e-3
            # the prefix cache was used
            assert cached[-1] == 256 and (not again or cached[-2] == 256)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_matrix(tally, tmp_path, mixer, family, options):
    "Three mixers, three hosts, plain, with a convolution and with all key heads."
    spec = f"{mixer}({options})" if options else mixer
    check_served(tally, tmp_path, "matrix", f"{family} {spec}", hybrid_of(family, spec))


OTHERS = {
    "own decays": ("llama", "lightning(own_decays=True)", (1, 2), {}, {}),
    "native": ("qwen3", "gdn_native", (1,), {}, {}),
    "native, experts": ("qwen3_moe", "gdn_native", (1,), {}, {}),
    "no rotation": ("qwen2", "gdn(rope=False)", (0, 3), {}, {}),
    "biases": ("llama", "gdn(conv=3)", (2,), {}, dict(attention_bias=True, mlp_bias=True)),
    "one key head": ("llama", "gla(expand_kv=True)", (1,), {}, dict(num_key_value_heads=1)),
    "mistral": ("mistral", "lightning(conv=4, expand_kv=True)", (1,), {}, {}),
    "window": ("mistral", "gla", (1,), {}, dict(sliding_window=48)),
    "no window": ("qwen2", "lightning", (0, 1), {}, dict(
        use_sliding_window=True, sliding_window=48, max_window_layers=2)),
    "yarn": ("qwen3", "gdn", (1,), {}, dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=4., original_max_position_embeddings=512))),
    "llama3": ("llama", "lightning", (1,), {}, dict(rope_parameters=dict(
        rope_type="llama3", rope_theta=1e4, factor=8., low_freq_factor=1., high_freq_factor=4.,
        original_max_position_embeddings=64))),
    "hypenet": ("qwen3", "lightning(expand_kv=True)", (1, 3),
                dict(full_rope=False, logit_scale=20.), {}),
    "scaled": ("llama", "gla", (1,), dict(logit_scale=20.), {}),
    "all full": ("qwen2", "gdn", (0, 1, 2, 3), {}, {}),
    "tied": ("qwen3", "gla", (1,), {}, dict(tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(tally, tmp_path, name):
    "Every other option, and the other hosts."
    family, mixer, full, committed, kw = OTHERS[name]
    hybrid = hybrid_of(family, mixer, full, committed, **kw)
    check_served(tally, tmp_path, "options", f"{family} {mixer}: {name}", hybrid)


def test_compiled(tally, tmp_path):
    "Under torch.compile, where a linear layer is one operation."
    hybrid = hybrid_of("qwen3", "gdn(conv=4)")
    check_served(tally, tmp_path, "compiled", "qwen3 gdn(conv=4)", hybrid, enforce_eager=False)


def test_bfloat16(tmp_path):
    "In bfloat16 rounding changes texts; log-probabilities are near those of transformers."
    hybrid = hybrid_of("qwen3", "gdn(conv=4)").bfloat16()
    hybrid.save_pretrained(tmp_path / "half")
    prompts = prompts_of((40, 200))
    with engine(tmp_path / "half", dtype="bfloat16") as llm:
        for prompt, found in zip(prompts, served(llm, prompts, 1)):
            token = found.outputs[0].token_ids[0]
            theirs = found.outputs[0].logprobs[0][token].logprob
            # a tenth of a nat: eight bits, four layers
            assert abs(theirs - log_probs(hybrid, prompt, [token])[0]) < 0.1


# What is refused

def edited(folder: Path, **changes) -> None:
    "Change entries of a config.json; those of the teacher with it."
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config[name] = value
        if name in config["teacher"]: config["teacher"][name] = value
    path.write_text(json.dumps(config))


def lost(folder: Path) -> None:
    "Leave a weight out."
    weights = load_file(folder / "model.safetensors")
    del weights["host.model.layers.2.self_attn.mixer.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


REFUSED = {
    "mixer": (lambda folder: edited(folder, mixer="gnd"),
              "unknown mixer 'gnd'; did you mean 'gdn'"),
    "other mixer": (lambda folder: edited(folder, mixer="gdn(expand_kv=True)"),
                    "its weights do not fit its config.json"),
    "other heads": (lambda folder: edited(folder, num_key_value_heads=4),
                    "its weights do not fit its config.json"),
    "other layers": (lambda folder: edited(folder, full_layers=[2]),
                     "its weights do not fit its config.json"),
    "lost weight": (lost, "layers.2.self_attn.mixer.norm.weight is missing"),
    "no full layer": (lambda folder: edited(folder, full_layers=[]), "it has no full layer"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "hybrid"
    hybrid_of("qwen3", "gdn").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_refused(good, tmp_path, name):
    "A folder that is not what it says, or cannot be served, is refused with a sentence."
    spoil, why = REFUSED[name]
    folder = tmp_path / "spoilt"
    shutil.copytree(good, folder)
    spoil(folder)
    with pytest.raises(Exception) as found:  # noqa: B017 (vLLM wraps ours in its own)
        with engine(folder): pass
    messages, error = [], found.value
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    assert any(why in message for message in messages), messages


def test_refuses_other_hosts(tmp_path):
    config = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=64)
    hybrid_of("gemma2", "gdn", **config).save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match="its teacher is of family 'gemma2', the plug-in knows"):
        with engine(tmp_path / "gemma"): pass


def test_refuses_narrow_heads(tmp_path):
    "vLLM itself would start, and break down at the first request."
    hybrid_of("qwen3", "gdn", head_dim=16).save_pretrained(tmp_path / "narrow")
    narrow = "its heads have 16 channels, and vLLM's attention.*--to qwen3_5 --head-dim 64"
    with pytest.raises(ValueError, match=narrow):
        with engine(tmp_path / "narrow"): pass


SPECULATING = """
import sys, vllm
guess = dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=3)
vllm.LLM(model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, max_model_len=512,
         speculative_config=guess)
"""


def test_refuses_speculation(good):
    "In a process of its own: vLLM 0.32 starts no second engine after what speculation imports."
    done = subprocess.run([sys.executable, "-c", SPECULATING, good], capture_output=True, text=True)
    assert done.returncode != 0
    assert "speculative decoding needs states that can go back; leave it out" in done.stderr


# Engines in a process of their own: two devices, and native exports without the plug-in

ALONE = """
import json, os, sys
if os.environ.get("VLLM_PLUGINS") == "": sys.modules["flashmorph"] = None
import vllm
llm = vllm.LLM(model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, max_model_len=512,
               max_num_seqs=4, max_num_batched_tokens=64, **json.loads(sys.argv[4]))
how = vllm.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
prompts = json.loads(open(sys.argv[2]).read())
found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
json.dump([list(x.outputs[0].token_ids) for x in found], open(sys.argv[3], "w"))
"""


def alone(folder: Path, prompts: list[list[int]], environment: dict[str, str], **settings) -> list:
    "What an engine in a process of its own writes after `prompts`: 40 tokens each."
    beside = folder.parent
    (beside / "prompts.json").write_text(json.dumps(prompts))
    files = [str(folder), str(beside / "prompts.json"), str(beside / "found.json")]
    subprocess.run([sys.executable, "-c", ALONE, *files, json.dumps(settings)], check=True,
                   env=os.environ | environment)
    return json.loads((beside / "found.json").read_text())


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_devices(tmp_path):
    "Tensor parallelism: full layers in halves, linear layers whole on both."
    hybrid = hybrid_of("qwen3", "gdn(conv=4)")
    hybrid.save_pretrained(tmp_path / "hybrid")
    prompts = prompts_of()
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    found = alone(tmp_path / "hybrid", prompts, environment, dtype="float32",
                  tensor_parallel_size=2)
    assert found == [greedy(hybrid, prompt, 40) for prompt in prompts]


def counting(length: int, start: int, step: int) -> list[int]:
    "Tokens that go on by `step`, around a circle of 61."
    return [3 + (start + i * step) % 61 for i in range(length)]


def taught(family: str, head_dim: int) -> HybridForCausalLM:
    "A hybrid that has learned to count: its choices are clear, and survive bfloat16."
    hybrid = hybrid_of(family, "gdn_native", head_dim=head_dim, tie_word_embeddings=False).train()
    optimizer = torch.optim.AdamW(hybrid.parameters(), lr=2e-3)
    seed = torch.Generator().manual_seed(3)
    for _ in range(150):
        rows = torch.randint(1, 61, (16, 2), generator=seed).tolist()
        ids = torch.tensor([counting(40, start, 1 + step % 7) for start, step in rows])
        hybrid(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return hybrid.eval()


@pytest.mark.parametrize("family, form, head_dim", [
    ("qwen3", "qwen3_5", 64), ("qwen3_moe", "qwen3_next", 64),
    ("qwen3", "qwen3_5", 16), ("qwen3_moe", "qwen3_next", 16)])
def test_native(tally, tmp_path, family, form, head_dim):
    """An export in vLLM's own classes and kernels, in the format it insists on.

    Heads of 16 channels, for which vLLM has no kernel on a CPU, are widened to 64."""
    export(taught(family, head_dim), tmp_path / "native", form, engine="vllm", head_dim=64)
    prompts = [counting(12, 5, 3), counting(30, 40, 5), counting(100, 20, 2)]
    found = alone(tmp_path / "native", prompts, {"VLLM_PLUGINS": ""}, dtype="bfloat16")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.bfloat16).eval()
    with runnable(native): expect = [greedy(native, prompt, 40) for prompt in prompts]
    assert expect[0][:10] == counting(22, 5, 3)[12:]
    for theirs, ours in zip(found, expect):
        equal = sum(a == b for a, b in zip(theirs, ours))
        name = f"{family} as {form}" if head_dim == 64 else f"{family} as {form}, heads widened"
        tally.add("native", name, equal, 40)
    assert found == expect


# The server

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TEXTS = ["The key is", "Once upon a time", "One day", "There was a", "A cat and a dog", "She said",
         "Tom went to the", "It was a big red ball, and the dog ran after it. " * 5]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(port: int, path: str, body: dict | None = None) -> bytes:
    "The answer of the server, as bytes; a question if there is a `body`."
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data,
                                   {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as answer: return answer.read()


SERVER = ("--dtype float32 --max-model-len 512 --max-num-seqs 8 --max-num-batched-tokens 64 "
          "--enforce-eager").split()


@contextmanager
def server(folder: Path, log: Path, options=SERVER, **environment):
    "`vllm serve`, with several processes as users have it; afterwards none of them is left."
    port = free_port()
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | environment
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--port",
               str(port), "--host", "127.0.0.1", *options]
    with log.open("w") as out:
        started = subprocess.Popen(command, stdout=out, stderr=out, env=environment,
                                   start_new_session=True)
    family = {started.pid}
    try:
        limit = time.monotonic() + 300
        while True:
            family |= {x.pid for x in psutil.Process(started.pid).children(recursive=True)}
            assert started.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
            try: ask(port, "/health")
            except (urllib.error.URLError, ConnectionError): time.sleep(0.5)
            else: break
        family |= {x.pid for x in psutil.Process(started.pid).children(recursive=True)}
        yield port
    finally:
        started.send_signal(signal.SIGINT)
        try: started.wait(60)
        except subprocess.TimeoutExpired: started.kill()
    # engine and worker end on their own, after the process that started them
    limit = time.monotonic() + 30
    while time.monotonic() < limit and any(map(psutil.pid_exists, family)): time.sleep(0.2)
    left = [pid for pid in family if psutil.pid_exists(pid)]
    assert not left, f"{left} of {family} are still there"
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)): pass


def streamed(answer: bytes) -> list[int]:
    "The tokens of a stream of events."
    lines = [line[6:] for line in answer.decode().splitlines() if line.startswith("data: ")]
    # in parts; where cores are busy, the server puts several tokens into one
    assert lines[-1] == "[DONE]" and len(lines) > 2
    parts = [json.loads(line)["choices"][0]["token_ids"] for line in lines[:-1]]
    return [token for part in parts for token in part]


def answered(port: int, kind: int, text: str, common: dict) -> list[int]:
    "The tokens of an answer: to a chat, to a prompt, or to a prompt in a stream."
    if kind == 0:
        body = common | {"messages": [{"role": "user", "content": text}]}
        return json.loads(ask(port, "/v1/chat/completions", body))["choices"][0]["token_ids"]
    body = common | {"prompt": text, "stream": kind == 2}
    answer = ask(port, "/v1/completions", body)
    return streamed(answer) if kind == 2 else json.loads(answer)["choices"][0]["token_ids"]


def test_server(tally, tmp_path):
    """Eight clients at once, 64 questions: completions, chat and streams.

    All answers are those of `generate`. A server that is stopped leaves no process behind."""
    _, tokenizer = load_teacher()
    hybrid = hybrid_of("qwen3", "gdn(conv=4)", vocab_size=len(tokenizer))
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path / "hybrid"
    hybrid.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    expect = [greedy(hybrid, tokenizer(text)["input_ids"], 24) for text in TEXTS]
    assert len(set(map(tuple, expect))) > 6 and len(tokenizer(TEXTS[-1])["input_ids"]) > 64
    common = {"model": str(folder), "temperature": 0, "max_tokens": 24, "ignore_eos": True,
              "return_token_ids": True}

    def client(port: int, number: int) -> int:
        "How many of eight questions, of three kinds, are answered as they should be."
        found = [answered(port, (i + number) % 3, text, common) for i, text in enumerate(TEXTS)]
        return sum(ours == theirs for ours, theirs in zip(found, expect))

    with server(folder, tmp_path / "log") as port, ThreadPoolExecutor(8) as pool:
        right = sum(pool.map(lambda number: client(port, number), range(8)))
    tally.add("server", "qwen3 gdn(conv=4)", right, 64)
    assert right == 64
