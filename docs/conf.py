"""Settings of the documentation site: ``make docs``.

The source folder is the repository's, so that a link from page to page is the same here and in the repository.
"""

import couplings

project = "couplings"
version = release = couplings.__version__
copyright = "the couplings developers"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "benchmarks/results/**.md",
    "integrations/launch/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = ["build", "dist", "runs", ".venv*", ".git", "**/.*", "**/__pycache__", "couplings", "tests"]
myst_enable_extensions = ["colon_fence", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3

default_role = "py:obj"
autodoc_typehints = "none"  # docstrings give types with their shapes
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = f"couplings {release}"
html_theme_options = {
    "logo": {"text": "couplings"},
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
html_sidebars = {"**": ["sidebar-nav-bs"]}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # an index.html that leads to docs/index.html
html_show_sourcelink = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def escape_shapes(app, what, name, obj, options, lines):
    """Let the star of ``(n, *shape)``, where a docstring gives it as a type, begin no emphasis."""
    lines[:] = [line if "``" in line else line.replace(", *shape", ", \\*shape") for line in lines]


def setup(app):
    """Connect before napoleon reads the docstrings."""
    app.connect("autodoc-process-docstring", escape_shapes, priority=400)
