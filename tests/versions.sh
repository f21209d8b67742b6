#!/usr/bin/env bash
# Tests with other versions than those of constraints.txt:
#   tests/versions.sh                oldest and newest that settings.ini allows, each in an
#                                    environment of its own (`make test-versions`)
#   tests/versions.sh transformers   the newest transformers over what is in .venv; some seconds
#                                    to install, so tests/run.sh does it too
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD"

models=(tests/test_versions.py tests/test_hybrid.py tests/test_families.py)
others=(tests/test_hosts.py tests/test_mixers.py tests/test_resume.py tests/test_widget*.py)

requirements() {  # requirements oldest|newest: one a line, as settings.ini has them
    python3 - "$1" <<'PYTHON'
import configparser, re, sys
settings = configparser.ConfigParser(interpolation=None)
settings.read("settings.ini")
for key in ("requirements", "test_requirements", "lab_requirements"):
    for requirement in settings["DEFAULT"][key].split():
        oldest = re.sub(r">=([\d.]+)[^;]*", r"==\1.*", requirement)
        print(oldest if sys.argv[1] == "oldest" else requirement)
PYTHON
}

environment() {  # environment FOLDER: an empty one, with a pip that knows nothing of our pins
    test -x "$1/bin/python" || python3 -m venv "$1"
    "$1/bin/python" -m pip install -q --upgrade pip
}

pip_install() { "$1/bin/python" -m pip --disable-pip-version-check install -q "${@:2}"; }

show() {  # show FOLDER: the versions that matter
    "$1/bin/python" - <<'PYTHON'
from importlib.metadata import version
names = ("torch", "transformers", "accelerate", "datasets", "plotly", "anywidget")
print(*(f"{name} {version(name)}" for name in names), sep=", ")
PYTHON
}

check() {  # check FOLDER TEST...: one process of pytest, with the browser where there is one
    local marks='not interpret and not browser'
    if command -v chromium > /dev/null; then marks='not interpret'; fi
    PATH="$PWD/$1/bin:$PATH" "$1/bin/python" -m pytest -q -m "$marks" "${@:2}"
}

if [ "${1:-}" = transformers ]; then
    folder=.venv-transformers
    test -x "$folder/bin/python" || .venv/bin/python -m venv "$folder"
    base=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
    "$folder/bin/python" - "$base" <<'PYTHON'
import pathlib, site, sys
pathlib.Path(site.getsitepackages()[0], "base.pth").write_text(sys.argv[1] + "\n")
PYTHON
    pip_install "$folder" --upgrade "$(requirements newest | grep '^transformers')"
    show "$folder"
    check "$folder" "${models[@]}"
    exit
fi

for which in oldest newest; do
    folder=.venv-$which
    printf '\n== %s ==\n' "$which"
    environment "$folder"
    requirements "$which" > "$folder/requirements.txt"
    # torch on its own and first: by far the largest, and the rest must fit it
    pip_install "$folder" --upgrade "$(grep '^torch' "$folder/requirements.txt")"
    pip_install "$folder" --upgrade --upgrade-strategy eager -r "$folder/requirements.txt"
    pip_install "$folder" --no-deps -e .
    show "$folder"
    check "$folder" "${models[@]}" "${others[@]}"
done
