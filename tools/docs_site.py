"""Hooks of mkdocs: add pages and files from outside docs/ that the documentation links to.

README.md becomes the front page. Links such as `../recipes/quickstart.yaml`, valid in the repository, lead
to a copy of the file inside the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FRONT_PAGE = "index.md"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
FOLDERS = ("recipes", "tools/launch")
# The target of a Markdown link or of a picture's `src` or `srcset`, without its anchor.
TARGET = re.compile(r"""(?P<before>\]\(|\bsrc(?:set)?=")(?P<path>[^)"#:\s]+)(?=[)"#])""")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files from outside docs/."""
    files.append(File.generated(config, FRONT_PAGE, abs_src_path=str(ROOT / "README.md")))
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in (*(ROOT / page for page in PAGES), *inside, ROOT / "LICENSE"):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that are relative to the file's place in the repository."""
    name = page.file.src_uri
    outside = name in (FRONT_PAGE, *PAGES)
    source = ("README.md" if name == FRONT_PAGE else name) if outside else f"docs/{name}"

    def inside(target: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target["path"]))
        path = FRONT_PAGE if path == "README.md" else path.removeprefix("docs/")
        return target["before"] + posixpath.relpath(path, posixpath.dirname(name) or ".")

    return TARGET.sub(inside, markdown)
