"The scripts of the widgets: the same rules as in Python, formatted, and without errors of types."
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from browser import chromium

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
