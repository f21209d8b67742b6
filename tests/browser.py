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
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--no-first-run", "--disable-default-apps", "--disable-extensions"]
LOCAL = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:", "file:")
HARMLESS = ("/lsp/status",)  # JupyterLab asks whether there is a language server


@contextlib.contextmanager
def chromium():
    "The system's Chromium. Fails without it: a browser test that is skipped would pass for one that ran."
    from playwright.sync_api import sync_playwright
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path: pytest.fail("no chromium: apt-get update && apt-get install -y --no-install-recommends chromium fonts-dejavu-core fonts-liberation")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=ARGS)
        try: yield browser
        finally: browser.close()


def open_page(browser, *, width: int = 1280, height: int = 1000, scheme: str = "light"):
    "A page that may only reach this machine; `page.problems` has what it tried beyond, and errors of its console."
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.problems = []

    def route(r):
        if r.request.url.startswith(LOCAL): r.continue_()
        else: page.problems.append(f"request to {r.request.url}"); r.abort()

    def console(message):
        where = message.location.get("url", "") if message.location else ""
        if message.type == "error" and not any(h in message.text + where for h in HARMLESS): page.problems.append(f"{message.text} ({where})")

    context.route("**/*", route)
    page.on("console", console)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.set_default_timeout(TIMEOUT)
    return page


@contextlib.contextmanager
def jupyterlab(root: Path, scratch: Path):
    "A JupyterLab on `root` with its settings in `scratch`; yields a function from the name of a notebook to its address."
    settings = scratch / "set/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = {**os.environ, "JUPYTER_NO_CONFIG": "1", "JUPYTER_CONFIG_DIR": f"{scratch}/cfg", "JUPYTER_RUNTIME_DIR": f"{scratch}/run",
           "JUPYTER_DATA_DIR": f"{scratch}/data", "JUPYTERLAB_SETTINGS_DIR": f"{scratch}/set", "JUPYTERLAB_WORKSPACES_DIR": f"{scratch}/ws",
           "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=ci", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
               "--LabApp.extension_manager=readonly", "--LabApp.news_url=None", "--ServerApp.terminals_enabled=False", "--log-level=WARN",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(scratch / "lab.log", "w") as log: server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + TIMEOUT / 1000
        while True:
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=ci", timeout=5).close(); break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None and time.monotonic() < deadline, (scratch / "lab.log").read_text()
                time.sleep(0.2)
        yield lambda name: f"http://127.0.0.1:{port}/doc/tree/{name}?token=ci&reset"
    finally:
        server.terminate()
        server.wait(30)


class LabPage:
    "A notebook in JupyterLab."
    def __init__(self, page, address: str): self.page, self.address = page, address

    def open(self):
        self.page.goto(self.address, wait_until="domcontentloaded")
        self.ready()

    def ready(self):
        "Wait for the notebook and its kernel."
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        self.page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")

    def run_all(self):
        "Start running all cells."
        self.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")

    def busy(self) -> str: return "[...document.querySelectorAll('.jp-InputPrompt')].some(e => e.textContent.includes('*'))"

    def kernel(self, expression: str):
        "The value of a Python expression in the kernel, through JSON."
        text = self.page.evaluate("""async code => {
            const future = jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code, store_history: false});
            let text = ''; future.onIOPub = m => { text += m.content.text || (m.content.evalue ? JSON.stringify(m.content.evalue) : '') };
            await future.done; return text }""", f"import json as _json\nprint(_json.dumps({expression}))")
        return json.loads(text)
