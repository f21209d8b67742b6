"""The scripts of the widgets: the same rules as in Python, formatted, and without errors of types.
Then the script for a GPU, as it runs without one."""
import argparse
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from gpu_all import DRY, PARTS, Job

from flashmorph import results
from flashmorph.show.chooser import Choice, choice_of, state_of
from flashmorph.show.widget import script

STATIC = Path(__file__).resolve().parent.parent / "flashmorph/static"
SCRIPTS = sorted(STATIC.glob("*.js"))


def run(expression: str, cases: list) -> list:
    "`expression` of `x` in JavaScript for each of the cases: in node, or else in Chromium."
    code = f"{script('choice.js')}\n;"
    program = f"JSON.stringify({json.dumps(cases)}.map((x) => {expression}))"
    if node := shutil.which("node"):
        done = subprocess.run([node, "-"], input=f"{code}console.log({program})", text=True,
                              capture_output=True, check=True)
        return json.loads(done.stdout)
    with chromium() as browser:
        page = browser.new_page()
        return json.loads(page.evaluate(f"() => {{ {code} return {program}; }}"))


@pytest.mark.parametrize("unit", results.UNITS)
def test_amounts(unit):
    sizes = [0, 999, 1000, 122_500, 999_499, 999_500, 12_250_000, 0.5, 1e17]
    sizes += [10 ** random.uniform(0, 15) for _ in range(300)]
    sizes += [random.randint(0, 10 ** random.randint(1, 13)) for _ in range(300)]
    expected = [results.amount(size, unit) for size in sizes]
    assert run(f"amount(x, {json.dumps(unit)})", sizes) == expected


def test_shares_times_and_rounding():
    shares = [0.145, 0.5, 0.0049, 1.0, *(random.random() for _ in range(200))]
    for decimals in (0, 1):
        expected = [results.percent(share, decimals) for share in shares]
        assert run(f"percent(x, {decimals})", shares) == expected
    seconds = [0, 59.94, 59.96, 3599.4, 3599.7, *(10 ** random.uniform(-1, 5) for _ in range(200))]
    assert run("duration(x)", seconds) == [results.duration(s) for s in seconds]
    halves = [0.125, 122.5, -2.5, -0.001, 0.0]
    assert run("rounded(x, 2)", halves) == [results.rounded(h, 2) for h in halves]


def choices(number: int) -> list[Choice]:
    "Choices at random, of 1 to 12 layers."
    made = []
    while len(made) < number:
        L = random.randint(1, 12)
        layers = random.sample(range(L), L)
        full, linear = random.randint(0, L), random.randint(0, L)
        pins = tuple(layers[:full]), tuple(layers[full:full + linear])
        try: made.append(Choice(L, random.randint(0, L), *pins))
        except ValueError: continue
    return made


def test_choices():
    "The same layers, the same pins, and a refusal where Python refuses."
    cases, layers, pinned = [], [], []
    for choice in choices(400):
        L = choice.num_layers
        order = random.sample(range(L), L)
        layer, kind = random.randrange(L), random.choice(["full", "linear", ""])
        cases.append({"order": order, "choice": state_of(choice), "layer": layer, "kind": kind})
        layers.append(list(choice.layers(order)))
        try: pinned.append(state_of(choice.pin(layer, kind or None)))
        except ValueError: pinned.append(None)
    assert None in pinned
    assert run("chosen(x.order, x.choice)", cases) == layers
    repinned = "repinned(x.choice, x.layer, x.kind)"
    refused = f"(refusal({repinned}, x.order.length) ? null : {repinned})"
    assert run(refused, cases) == pinned


def test_budgets():
    "A budget is refused where Python refuses it."
    cases, expected = [], []
    for choice in choices(100):
        L = choice.num_layers
        for budget in range(L + 1):
            state = {**state_of(choice), "budget": budget}
            cases.append([state, L])
            try: expected.append(bool(choice_of(L, state)))
            except ValueError: expected.append(False)
    assert not all(expected)
    assert run("refusal(...x) === ''", cases) == expected


def test_tokens():
    typed = ["4096", "4,096", " 4k ", "1.5K", "1m", "many", "", "-3", "4kk"]
    found = run("parseTokens(x)", typed)
    assert found == [4096, 4096, 4096, 1536, 2 ** 20, None, None, None, None]  # NaN is null in JSON


def test_masks_and_sums():
    assert run("maskOf(...x)", [[[2, 0], 4]]) == ["1010"]
    assert run("layersOf(x)", ["1010", ""]) == [[0, 2], []]
    assert run("[...unpack(...x)]", [["AP8=", 1], ["AAEBAA==", 2]]) == [[0, 255], [256, 1]]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_checked_for_types(path):
    assert path.read_text(encoding="utf-8").startswith("// @ts-check\n")


@pytest.mark.skipif(not shutil.which("prettier"), reason="no prettier")
def test_scripts_are_formatted():
    files = [str(path) for path in (*SCRIPTS, *STATIC.glob("*.css"), *STATIC.glob("*.ts"))]
    command = ["prettier", "--print-width", "100", "--check", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("tsc"), reason="no typescript")
def test_types():
    files = [str(path) for path in (STATIC / "types.d.ts", *SCRIPTS)]
    options = ["--noEmit", "--allowJs", "--checkJs", "--strict", "--target", "es2022",
               "--module", "esnext"]
    done = subprocess.run(["tsc", *options, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# All that needs a GPU

SCRIPT = Path(__file__).with_name("gpu_all.py")


def dry_run(file: Path, *options: str) -> tuple[int, dict[str, Any]]:
    "The status of a dry run of the script for a GPU, and the parts in its JSON."
    command = [sys.executable, str(SCRIPT), "--dry", "--json", str(file), *options]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    return done.returncode, json.loads(file.read_text())["parts"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Any]:
    "Every part, with a text of its own for stage 1."
    folder = tmp_path_factory.mktemp("gpu_all")
    lines = [json.dumps({"text": f"The {i}th road leads to the sea. " * 20}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    status, found = dry_run(folder / "all.json", "--text", str(folder / "text.jsonl"))
    problems = {name: part["problems"] for name, part in found.items() if part["problems"]}
    assert status == 0, problems
    return found


def leaves(figures: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    "The values in nested figures; the name of a list is that of each of its values."
    if isinstance(figures, dict):
        for key, value in figures.items(): yield from leaves(value, key)
    elif isinstance(figures, list):
        for value in figures: yield from leaves(value, name)
    else:
        yield name, figures


POSITIVE = {"tokens_s", "step_s", "first_s", "start_s", "data_s", "seconds", "prefill_s",
            "decode_ms", "peak_gib", "ms", "ours_us", "over_flash", "over_peer", "flops", "bytes"}
COUNTS = {"cache_bytes", "steps", "tokens", "distinct", "order"}


def test_every_part_runs(parts):
    assert list(parts) == list(PARTS)
    for part in parts.values():
        assert part["status"] == "ok" and not part["problems"]
        assert part["seconds"] > 0 and part["figures"]
        assert part["on"]["device"] == "cpu" and len(part["on"]["commit"]) == 40
        assert {"torch", "triton", "transformers", "date"} <= part["on"].keys()


def test_every_figure_is_finite_and_of_its_kind(parts):
    for name, value in leaves({name: part["figures"] for name, part in parts.items()}):
        assert type(value) in (int, float) and math.isfinite(value), (name, value)
        assert value > 0 if name in POSITIVE else value >= 0, (name, value)
        assert type(value) is int or name not in COUNTS, (name, value)


def test_kernels_are_right_and_timed(parts):
    found = parts["kernels"]["figures"]
    for kind, most in (("float32", 1e-5), ("float16", 2e-2)):
        for name in ("lightning", "carried"):
            assert 0 < found[f"error of {name}, {kind}"][kind] < most
        steps = found[f"error of steps, {kind}"]
        assert set(steps) == {"lightning", "gla", "gdn"} and max(steps.values()) < most
    assert len(found["times, B1 H2 D16 T70"]) == 2
    assert len(found["times of a step, 1"]) == 2 * 3


def test_ops_are_timed_beside_flash_attention(parts):
    found = parts["ops"]["figures"]["lightning gla gdn, 64 tokens"]
    for op in ("lightning", "gla", "gdn"):
        for passes in ("forward", "forward+backward"):
            ours, flash = (found[f"{op} {passes} {name}"] for name in ("torch", "sdpa"))
            assert ours["over_flash"] == pytest.approx(ours["ms"] / flash["ms"])


def test_every_stage_is_timed(parts):
    found = parts["stages"]["figures"]
    stages = ("align", "train_gates", "distill", "finetune")
    expected = {f"tiny {stage} 32" for stage in stages} | {"tiny align 64"}
    assert set(found) == expected | {f"tiny {stage} 64, checkpointing" for stage in stages[1:]}
    for name, figures in found.items():
        tokens = 32 if name.endswith("32") else 64
        assert figures["tokens_s"] * figures["step_s"] == pytest.approx(tokens)


def test_the_real_teacher_is_aligned_and_its_gates_are_compared(parts):
    found = parts["smollm2"]["figures"]
    assert found["teacher"]["answer_kl"] == pytest.approx(0, abs=1e-6)
    assert sorted(found["gates"]["order"]) == list(range(12))
    wanted = {f"K = {k}, {method}" for k in DRY.budgets for method in ("gates", "uniform")}
    assert wanted < set(found)
    assert all(0 <= found[name]["recall"] <= 1 for name in wanted)
    # the start reads as many tokens as the steps
    assert found["align"]["steps"] * DRY.align_batch * DRY.row == DRY.align_tokens
    assert found["align"]["tokens"] == 2 * DRY.align_tokens


def test_caches_are_counted(parts):
    "Keys and values: 8 numbers of 2 bytes each, a layer; a state: 2 heads of 8 x 8 float32."
    found = parts["generate"]["figures"]
    for length in DRY.prompts:
        layer = 2 * 8 * 2 * length
        assert found[f"tiny teacher {length}"]["cache_bytes"] == 2 * layer
        assert found[f"tiny hybrid {length}"]["cache_bytes"] == layer + 2 * 8 * 8 * 4


def test_a_part_that_raises_leaves_the_others_whole(tmp_path):
    file = tmp_path / "all.json"
    status, found = dry_run(file, "--parts", "generate", "--patience", "1e-4")
    assert status == 1 and found["generate"]["status"] == "out of time"
    nowhere = str(tmp_path / "nowhere")
    status, found = dry_run(file, "--parts", "smollm2,generate", "--teacher", nowhere)
    assert status == 1
    assert found["smollm2"]["status"] == "failed" and not found["smollm2"]["figures"]
    assert "nowhere" in found["smollm2"]["problems"]["the part"]
    assert found["generate"]["status"] == "ok" and len(found["generate"]["figures"]) == 6
    # a part that is run alone leaves the others in the file as they are
    before = found["generate"]
    status, found = dry_run(file, "--parts", "smollm2", "--patience", "1e-4")
    assert found["smollm2"]["status"] == "out of time" and found["generate"] == before


def test_a_measurement_that_raises_leaves_the_others_of_its_part_whole(tmp_path):
    options = argparse.Namespace(dry=True, commit="none")
    job = Job(options, tmp_path / "part.json", 60)
    assert not job.attempt("bad", lambda: {"x": 1 / 0})
    assert job.attempt("good", lambda: {"x": 1, "y": None})
    record = json.loads((tmp_path / "part.json").read_text())
    assert record["figures"] == {"good": {"x": 1}}
    assert list(record["problems"]) == ["bad"]
    assert "ZeroDivisionError" in record["problems"]["bad"]
