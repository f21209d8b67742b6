"Sphinx's settings; `build.py` writes the sources it reads and calls it."
import re
from configparser import ConfigParser
from pathlib import Path

import plotly
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

logger = logging.getLogger(__name__)
settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
project, author, release = (settings["DEFAULT"][name] for name in ("lib_name", "author", "version"))
copyright = settings["DEFAULT"]["copyright"]
extensions = ["myst_nb"]
exclude_patterns = [".doctrees"]

nb_execution_mode = "off"                   # notebooks come with their outputs
nb_merge_streams = True
nb_ipywidgets_js = {}                       # no scripts from elsewhere; widgets are shown as their static twins
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = project
html_static_path = ["_static", str(Path(plotly.__file__).parent / "package_data/plotly.min.js")]
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_logo, html_favicon = "_static/logo.svg", "_static/logo.svg"
html_show_sourcelink = html_copy_source = html_use_index = html_domain_indices = False
html_math_renderer = "mathml"               # browsers draw it themselves; MathJax would be fetched from elsewhere
colours = {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2", "color-brand-visited": "#0072B2"}
html_theme_options = {"light_css_variables": colours, "dark_css_variables": dict.fromkeys(colours, "#56B4E9")}


def math(display: str):
    def visit(self, node: nodes.Element) -> None:
        latex = node.astext()
        mathml = convert(re.sub(r"\\[bB]ig(?=\\)|(?<=\\)[lr](?=Vert)", "", latex), display=display)    # \big\lVert -> \Vert
        if "\\" in mathml: logger.warning("math that latex2mathml does not know: %s", latex, location=node)
        self.body.append(mathml)
        raise nodes.SkipNode
    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=math("inline"), block_renderers=math("block"))
