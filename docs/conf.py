"Sphinx's settings; `build.py` writes the sources it reads and calls it."
import re
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from pygments.formatters import HtmlFormatter
from pygments.token import Name, Operator, Punctuation, Text, Whitespace
from sphinx.highlighting import PygmentsBridge
from sphinx.util import logging

logger = logging.getLogger(__name__)
DOCS = Path(__file__).parent

settings = ConfigParser(delimiters=["="])
settings.read(DOCS.parent / "settings.ini", encoding="utf-8")
project = settings["DEFAULT"]["lib_name"]
author = settings["DEFAULT"]["author"]
release = settings["DEFAULT"]["version"]
copyright = settings["DEFAULT"]["copyright"]

extensions = ["myst_nb"]
exclude_patterns = [".doctrees"]
nb_execution_mode = "off"                   # notebooks come with their outputs
nb_merge_streams = True
nb_render_markdown_format = "myst"          # outputs have tables and formulas, as the text has
nb_ipywidgets_js = {}                       # no scripts from elsewhere: widgets show static twins
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_show_sourcelink = False
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_math_renderer = "mathml"               # drawn by the browser; MathJax would be fetched

BLUE = "#0072B2"
SKY = "#56B4E9"                             # the same hue on a dark page
BRAND = ("color-brand-primary", "color-brand-content", "color-brand-visited")
html_theme_options = {
    "light_css_variables": dict.fromkeys(BRAND, BLUE),
    "dark_css_variables": dict.fromkeys(BRAND, SKY),
}

# TeX that latex2mathml does not know and MathML does not need: \big, and the sides of \lVert.
SIZES = re.compile(r"\\[bB]ig(?=\\)|(?<=\\)[lr](?=Vert)")


def math(display: str):
    "How Sphinx is to write TeX: as MathML, `inline` or as a `block`."
    def visit(self, node: nodes.Element) -> None:
        latex = node.astext()
        mathml = convert(SIZES.sub("", latex), display=display)
        if "\\" in mathml:
            logger.warning("math that latex2mathml does not know: %s", latex, location=node)
        self.body.append(mathml)
        raise nodes.SkipNode

    return visit, None


class LightHtml(HtmlFormatter):
    """Marks only what has a colour of its own: pages are a quarter smaller for it."""

    def format_unencoded(self, tokensource, outfile):
        plain = {Name, Operator, Punctuation, Whitespace}
        tokens = ((Text if kind in plain else kind, text) for kind, text in tokensource)
        super().format_unencoded(tokens, outfile)


PygmentsBridge.html_formatter = LightHtml


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=math("inline"),
                               block_renderers=math("block"))
