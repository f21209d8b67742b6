"Chromium without a network, and a JupyterLab for it."
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

TIMEOUT = 60_000  # ms, for whatever should happen soon
ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-default-apps",
    "--disable-extensions"]
LOCAL = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:", "file:")
HARMLESS = ("/lsp/status",)  # JupyterLab asks whether there is a language server
NAMES = ("chromium", "chromium-browser", "google-chrome")
INSTALL = ("apt-get update && apt-get install -y --no-install-recommends chromium "
           "fonts-dejavu-core fonts-liberation")


@contextlib.contextmanager
def chromium():
    "The system's Chromium. Fails without it: a skipped browser test would pass for one that ran."
    from playwright.sync_api import sync_playwright
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if not path: pytest.fail(f"no chromium: {INSTALL}")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=ARGS)
        try: yield browser
        finally: browser.close()


def open_page(browser, *, width: int = 1280, height: int = 1000, scheme: str = "light"):
    """A page that may only reach this machine.

    `page.problems` has what it tried beyond, and the errors of its console."""
    size = {"width": width, "height": height}
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    page.problems = []

    def route(r):
        if r.request.url.startswith(LOCAL):
            r.continue_()
            return
        page.problems.append(f"request to {r.request.url}")
        r.abort()

    def console(message):
        where = message.location.get("url", "") if message.location else ""
        said = message.text + where
        if message.type == "error" and not any(harmless in said for harmless in HARMLESS):
            page.problems.append(f"{message.text} ({where})")

    context.route("**/*", route)
    page.on("console", console)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.set_default_timeout(TIMEOUT)
    return page


def free_port() -> int:
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def lab_environment(scratch: Path) -> dict[str, str]:
    "The environment of a JupyterLab that keeps everything in `scratch`."
    settings = scratch / "set/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    quiet = '{"fetchNews": "false", "checkForUpdates": false}'
    (settings / "notification.jupyterlab-settings").write_text(quiet)
    folders = {
        "JUPYTER_CONFIG_DIR": "cfg", "JUPYTER_RUNTIME_DIR": "run", "JUPYTER_DATA_DIR": "data",
        "JUPYTERLAB_SETTINGS_DIR": "set", "JUPYTERLAB_WORKSPACES_DIR": "ws"}
    places = {name: str(scratch / folder) for name, folder in folders.items()}
    return {**os.environ, **places, "JUPYTER_NO_CONFIG": "1", "OMP_NUM_THREADS": "1"}


def wait_until_up(url: str, server: subprocess.Popen, log: Path) -> None:
    "Wait until a server answers; fails with its log if it ends, or takes too long."
    deadline = time.monotonic() + TIMEOUT / 1000
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


@contextlib.contextmanager
def jupyterlab(root: Path, scratch: Path):
    "A JupyterLab on `root`; yields a function from the name of a notebook to its address."
    port = free_port()
    here = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1",
        f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=ci",
        f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly", "--LabApp.news_url=None",
        "--ServerApp.terminals_enabled=False", "--log-level=WARN",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    log = scratch / "lab.log"
    with open(log, "w") as out:
        server = subprocess.Popen(command, env=lab_environment(scratch), stdout=out,
                                  stderr=subprocess.STDOUT)
    try:
        wait_until_up(f"{here}/api/status?token=ci", server, log)
        yield lambda name: f"{here}/doc/tree/{name}?token=ci&reset"
    finally:
        server.terminate()
        server.wait(30)


KERNEL_IDLE = ("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
               "?.status === 'idle'")
EXECUTE = """async code => {
    const session = jupyterapp.shell.currentWidget.sessionContext.session;
    const future = session.kernel.requestExecute({code, store_history: false});
    let text = '';
    future.onIOPub = m => {
        text += m.content.text || (m.content.evalue ? JSON.stringify(m.content.evalue) : '');
    };
    await future.done;
    return text }"""


class LabPage:
    "A notebook in JupyterLab."
    def __init__(self, page, address: str):
        self.page = page
        self.address = address

    def open(self):
        self.page.goto(self.address, wait_until="domcontentloaded")
        self.ready()

    def ready(self):
        "Wait for the notebook and its kernel."
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        self.page.wait_for_function(KERNEL_IDLE)

    def run_all(self):
        "Start running all cells."
        self.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")

    def busy(self) -> str:
        "JavaScript: whether a cell waits or runs."
        prompts = "[...document.querySelectorAll('.jp-InputPrompt')]"
        return f"{prompts}.some(e => e.textContent.includes('*'))"

    def kernel(self, expression: str):
        "The value of a Python expression in the kernel, through JSON."
        code = f"import json as _json\nprint(_json.dumps({expression}))"
        return json.loads(self.page.evaluate(EXECUTE, code))
