"Cards, pushes and pulls: against a server on this machine that answers as the hub does."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from small import save_teacher, small_recipe
from typer.testing import CliRunner

from flashmorph.card import SERVED, is_ours
from flashmorph.choose.trajectory import GateRun
from flashmorph.folder import Run
from flashmorph.model.morph import morph
from flashmorph.model.teacher import load_model
from flashmorph.results import amount
from flashmorph.run.cli import app
from flashmorph.run.recipe import recipe_toml
from flashmorph.serve.vllm import HOSTS

FEW = ["--length", "128", "--keys", "1", "--words-per-key", "2", "--books", "2"]


WORKER = """
import json, os, sys
from typer.testing import CliRunner
import flashmorph as fm
from flashmorph.results import amount
from flashmorph.run.cli import app
talk = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    args, env = json.loads(line)
    before = dict(os.environ)
    os.environ.update(env)
    done = CliRunner().invoke(app, args, prog_name="flashmorph")
    os.environ.clear()
    os.environ.update(before)
    failed = repr(done.exception) if done.exit_code == 1 else ""
    print(json.dumps([done.exit_code, done.stdout, done.stderr + failed]), file=talk, flush=True)
"""


class Hub:
    "The server, its repositories as folders, and a process that has the server for its hub."
    def __init__(self, folder: Path):
        self.folder = folder / "hub"
        server = [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(self.folder)]
        self.server = subprocess.Popen(server, stdout=subprocess.PIPE, text=True)
        address = self.server.stdout.readline().strip()
        self.home = folder / "home"
        self.env = os.environ | {
            "HF_ENDPOINT": address, "HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(self.home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "200"}
        self.worker = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=self.env, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE)

    def ask(self, *args, **env):
        "Exit code, output and errors of a command, with the hub in reach."
        print(json.dumps([[*map(str, args)], env]), file=self.worker.stdin, flush=True)
        return json.loads(self.worker.stdout.readline())

    def flashmorph(self, *args):
        code, output, errors = self.ask(*args)
        assert code == 0, errors
        return output

    def python(self, code, *args, **env):
        done = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=self.env | env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def card(self, name): return (self.folder / name / "README.md").read_text()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("stand-in"))
    yield hub
    for process in (hub.worker, hub.server):
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    "A run whose teacher was pulled from the hub by its id, pushed to `me/run`."
    teacher = save_teacher(hub.folder / "me" / "teacher")
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n# A teacher\n")
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe_toml(small_recipe("me/teacher", finetune={"steps": 0})))
    hub.flashmorph("convert", recipe, "--out", folder / "run")
    assert "/me/run/commit/" in hub.flashmorph("push", folder / "run", "me/run")
    return folder / "run"


def test_the_card_of_a_run(hub, run):
    card = ModelCard(hub.card("me/run"))
    data = yaml.safe_load(str(card).split("---")[1])
    assert data == {
        "base_model": "me/teacher", "base_model_relation": "finetune", "license": "mit",
        "library_name": "flashmorph", "pipeline_tag": "text-generation",
        "tags": ["flashmorph", "hybrid attention", "linear attention"]}
    results = json.loads((run / "results.json").read_text())
    layers = ", ".join(map(str, results["layers"]))
    recall = f"{100 * results['models']['flashmorph']['distilled']['recall']:.1f}%"
    tokens = [results["spent"][stage]["tokens"] for stage in ("align", "gates")]
    read = f"(align {amount(tokens[0], 'count')}, gates {amount(tokens[1], 'count')}, distill "
    for said in (f"layers {layers} (budget 2 of 4)", "`lightning`", read, recall,
                 "layers chosen by | `flashmorph`", "import flashmorph", "vllm serve me/run",
                 'fm.BudgetExplorer("me/run")', "steps = 4"):
        assert said in card.text, said


def test_a_run_comes_back_as_it_was(hub, run, tmp_path):
    hub.flashmorph("pull", "me/run", tmp_path / "mine")
    same = ["gates.json", "selection.json", "results.json", "recipe.toml", "report.html",
            "log.jsonl", "branches.safetensors", "hybrid/model.safetensors"]
    for name in same: assert (tmp_path / "mine" / name).read_bytes() == (run / name).read_bytes()
    assert GateRun.load(tmp_path / "mine").digest() == GateRun.load(run).digest()
    assert load_model(tmp_path / "mine" / "hybrid")[0].config.full_layers
    code, _, errors = hub.ask("pull", "me/run", tmp_path / "mine")
    assert code == 2 and "is not empty" in errors
    # whoever owns the run keeps what is theirs
    assert not (hub.folder / "me/run/run/checkpoints").exists()


def test_commands_take_ids(hub, run, tmp_path):
    chosen = hub.flashmorph("select", run, "--budget", "3")
    assert hub.flashmorph("select", "me/run", "--budget", "3") == chosen
    # asks the branches, and the teacher by its id
    other = hub.flashmorph("select", "me/run", "--budget", "1", "--method", "remove-one", "--set",
                           "count=2", "--save")
    assert "remove-one: 1 of 4" in other
    saved = list(hub.home.glob("flashmorph/me--run-*/rankings/remove-one.json"))
    assert len(saved) == 1
    hub.flashmorph("evaluate", "me/run", *FEW, "--json", tmp_path / "scores.json")
    (model,) = json.loads((tmp_path / "scores.json").read_text())["models"]
    results = json.loads((run / "results.json").read_text())
    assert model["facts"]["teacher"] == "me/teacher"
    assert model["facts"]["trained_tokens"] == sum(s["tokens"] for s in results["spent"].values())
    code, _, errors = hub.ask("export", "me/run", tmp_path / "native", "--to", "qwen3_5")
    assert code == 2 and "gdn_native" in errors


def test_python_takes_ids(hub, run):
    hub.python("""
import sys
import flashmorph as fm
own = fm.GateRun.load(sys.argv[1])
assert fm.GateRun.load("me/run").digest() == own.digest()
explorer = fm.BudgetExplorer("me/run", budget=2)
assert explorer.selection.layers == own.select(2).layers and explorer.cost is not None
pulled = fm.Run.from_hub("me/run")
assert fm.BudgetExplorer(pulled).ranking == explorer.ranking
assert tuple(fm.load_model("me/run")[0].config.full_layers) == explorer.selection.layers
# a hub that does not answer
from huggingface_hub import constants
constants.ENDPOINT = "http://127.0.0.1:9"
try: pulled.push_to_hub("me/other")
except OSError as error: assert "cannot be reached" in str(error), error
else: raise AssertionError
""", run)


def test_what_is_pushed_names_no_place(hub, tmp_path):
    teacher = save_teacher(tmp_path / "secret" / "teacher")
    hybrid = morph(load_model(teacher)[0]).commit([1])
    run = Run(tmp_path / "secret" / "run").start()
    run.path("recipe.toml").write_text(recipe_toml(small_recipe(teacher)))
    for name in ("hybrid", "plain"): hybrid.save_pretrained(run.folder.parent / name)
    hybrid.save_pretrained(run.path("hybrid"))
    hub.flashmorph("push", run.folder, "me/local")
    hub.flashmorph("push", tmp_path / "secret" / "plain", "me/local-plain")
    for name in ("me/local", "me/local-plain"):
        files = [path for path in (hub.folder / name).rglob("*") if path.is_file()]
        assert files and not [path for path in files if b"secret" in path.read_bytes()]
        # a folder is no base model, and its licence is not known
        assert {"base_model", "license"}.isdisjoint(ModelCard(hub.card(name)).data.to_dict())


def test_a_card_on_the_hub_is_not_written_over(hub, run):
    before = hub.card("me/run")
    hub.flashmorph("push", run, "me/run")
    assert hub.card("me/run") == before and is_ours(before)
    edited = before.replace("# run", "# My run")
    (hub.folder / "me/run/README.md").write_text(edited)
    hub.flashmorph("push", run, "me/run")
    assert hub.card("me/run") == edited
    # one that was written into the folder goes along
    readme = run / "hybrid" / "README.md"
    ours = readme.read_text()
    assert is_ours(ours) and "## Results" in ours
    readme.write_text("# By hand")
    try: hub.flashmorph("push", run, "me/run")
    finally: readme.write_text(ours)
    assert hub.card("me/run") == "# By hand"


def test_a_card_in_a_folder_is_not_written_over(tmp_path):
    hybrid = morph(load_model("bundled")[0]).commit([3, 4, 8])
    hybrid.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert is_ours(card) and ModelCard(card).data.license == "apache-2.0"
    (tmp_path / "README.md").write_text("an old card of ours")
    hybrid.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "an old card of ours"
    (tmp_path / "README.md").write_text(card)
    morph(load_model("bundled")[0]).commit([1]).save_pretrained(tmp_path)
    assert "layers 1 (budget 1 of 12)" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("args, said", [
    (["push", "RUN", "me/other"], "a token that may write"),
    (["push", "RUN", "not an id"], "owner/name"),
    (["push", "HERE", "me/other"], "expected a run, or the folder of a hybrid"),
    (["pull", "me/none", "NEW"], "has no such repository"),
    (["pull", "me/teacher", "NEW"], "holds no run"),
    (["select", "runs/none", "--budget", "2"], "no folder of that name, and on the hub"),
    (["evaluate", "me/none"], "Is the name right"),
])
def test_errors_of_the_hub_are_one_line(hub, run, tmp_path, args, said):
    places = {"RUN": run, "HERE": tmp_path, "NEW": tmp_path / "new"}
    code, output, errors = hub.ask(*(places.get(arg, arg) for arg in args), HF_TOKEN="hf_wrong")
    assert code == 2 and output == "" and said in errors, errors
    assert errors.splitlines()[-1].startswith("flashmorph: ") and said in errors.splitlines()[-1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("args", [
    ["push", "RUN", "me/other"], ["pull", "me/none", "NEW"], ["select", "me/none", "--budget", "2"],
    ["evaluate", "me/none"], ["export", "me/none", "NEW", "--to", "qwen3_5"],
])
def test_offline_is_said_in_one_line(run, tmp_path, monkeypatch, args):
    "huggingface_hub raises its own errors here; no server is asked."
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    places = {"RUN": str(run), "NEW": str(tmp_path / "new")}
    done = CliRunner().invoke(app, [places.get(arg, arg) for arg in args])
    assert done.exit_code == 2 and "HF_HUB_OFFLINE" in done.output, done.output
    assert done.output.splitlines()[-1].startswith("flashmorph: ")
    assert "HF_HUB_OFFLINE" in done.output.splitlines()[-1] and not (tmp_path / "new").exists()


def test_the_card_names_the_families_that_are_served(): assert set(SERVED) == set(HOSTS)
