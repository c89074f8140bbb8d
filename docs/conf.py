"""The documentation: Markdown, notebooks as they are stored, and the API from its docstrings.

``make docs`` builds it. Nothing is loaded from elsewhere when a page is read, and nothing is executed but imports.
"""

import inspect
import re
import shutil
import sys
from pathlib import Path

from sphinx.util.inspect import stringify_signature

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]

import docstrings  # noqa: E402
import tables  # noqa: E402

import jaxnorm  # noqa: E402

project = "jaxnorm"
author = "The jaxnorm developers"
copyright = author
version = release = jaxnorm.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!jaxnorm).*")]  # what other libraries define has no page here
default_role = "py:obj"  # `name` in a docstring

# Pages and notebooks -------------------------------------------------------------------------------------------------

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests execute them; their outputs are stored
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that notebooks show are tables

# The API from docstrings ---------------------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes, dtypes and units, which types do not
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # a field is described once, with its class
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Look ----------------------------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = f"jaxnorm {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(DOCS / "scorer.js")
html_sidebars = {"**": ["navbar-logo", "sbt-sidebar-nav"]}  # the search is above the page, which is always in sight
html_use_index = html_domain_indices = False  # the search finds names; these would scroll sideways
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "article_header_end": ["search-button-field", "article-header-buttons"],
    "navbar_persistent": [],
    "path_to_docs": "docs",
    "repository_branch": "main",
    "repository_url": "https://github.com/jaxnorm/jaxnorm",
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_repository_button": True,
    "use_source_button": True,
}


def fill(app, docname, source) -> None:
    """Put tables made from stored files in the place of the fences that name a function of `tables`."""

    def made(fence: re.Match[str]) -> str:
        text, read = getattr(tables, fence[1])(ROOT, *fence[2].split())
        for path in read:
            app.env.note_dependency(path)
        return text

    source[0] = re.sub(
        r"^```\{(results|verdicts|first_steps|remedies)\}(.*)\n```$", made, source[0], flags=re.MULTILINE
    )


def show_arguments(app, what, name, obj, options, lines) -> None:
    """Describe all arguments of a layer with the layer, and all settings of the training program."""
    if what == "class" and name.startswith(("jaxnorm.linen", "jaxnorm.nnx", "jaxnorm.training.Settings")):
        lines[:] = docstrings.with_arguments(obj, "\n".join(lines)).split("\n")


def shorten(app, what, name, obj, options, signature, returned):
    """Write the arguments of a class and their defaults as one would by hand."""
    if what == "class" and signature == "(*args, **kwargs)":  # the metaclass of NNX hides them
        arguments = list(inspect.signature(obj.__init__).parameters.values())[1:]
        signature = stringify_signature(inspect.Signature(arguments), show_annotation=False)
    return docstrings.shortened(signature or "") or None, returned


def copy_notebooks() -> None:
    """Put the notebooks where Sphinx looks for pages; as old as they are, so that it reads only those that changed."""
    shutil.rmtree(DOCS / "notebooks", ignore_errors=True)
    (DOCS / "notebooks").mkdir()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy2(notebook, DOCS / "notebooks")


def link(app, docname, source) -> None:
    """Let links that work in the repository work on the site: to notebooks and from them, and to Markdown elsewhere."""
    up = "../" * docname.count("/")
    text = source[0].replace(f"]({up}../notebooks/", f"]({up}notebooks/")
    if docname.startswith("notebooks/"):
        text = re.sub(r"\]\(\.\./(docs/)?", lambda found: "](../" if found[1] else "](../../", text)
    source[0] = re.sub(rf"\]\(({re.escape(up)}\.\./(?!\.\.)[^)#]+\.md)\)", r"](path:\1)", text)


def link_back(app, pagename, template, context, doctree) -> None:
    """Mend links from sources: viewcode takes all names of a file for names of the module that it saw first."""
    if pagename.startswith("_modules/"):
        wrong = r"(/api/(linen|nnx|surgery|training)(?:[/_]\w+)?\.html#jaxnorm)\.(?!\2\.)"
        context["body"] = re.sub(wrong, r"\1.\2.", context["body"])


def link_source(app, pagename, template, context, doctree) -> None:
    """Let the button of a notebook lead to where it is stored, not to its copy."""
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if "url" in button:
                button["url"] = button["url"].replace("/main/docs/notebooks/", "/main/notebooks/")


def setup(app):
    """What Sphinx calls."""
    copy_notebooks()
    app.connect("source-read", fill)
    app.connect("source-read", link)
    app.connect("html-page-context", link_back)
    app.connect("html-page-context", link_source, priority=900)  # after the theme has made the buttons
    app.connect("autodoc-process-docstring", show_arguments, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True}
