"""Sphinx configuration; `python3 run.py docs` builds the site."""

import soundnet_port

project = "soundnet-port"
release = soundnet_port.__version__
exclude_patterns = ["_build"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = f"soundnet-port {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False

myst_heading_anchors = 3  # anchors for links between pages, as on GitHub
default_role = "code"  # docstrings use single backticks, as Markdown

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shape", "Shape")]
napoleon_use_ivar = True
autodoc_mock_imports = ["fsspec", "huggingface_hub", "joblib", "ray", "sklearn"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 90

# Types of other projects, whose inventories would have to be downloaded, and internal types
nitpick_ignore_regex = [
    ("py:class", r"(torch|nn|numpy|np|os|pathlib|collections|contextlib|huggingface_hub)\..*|Path|Tensor"),
    ("py:class", r"(PIL\.)?Image\.Image|Fabric|Figure|ModelCard"),
    ("py:class", r".*\b(LayerKey|ElementReader|ScaleWatch|Window)"),
]
