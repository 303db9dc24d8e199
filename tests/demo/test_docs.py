"""What the pages show is what the examples are, and any code host can show it."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
CODE = runpy.run_path(str(ROOT / "docs" / "update_code.py"))
PAGES: list[Path] = CODE["PAGES"]
DRAWINGS = sorted((ROOT / "docs" / "images").glob("*.svg"))
ONLY_ON_OUR_SITE = re.compile(
    r"^(!!!|\?\?\?|===)|--8<--|^``` *\{|:(material|octicons)-|\{ *[.#:][^}`]*\}$", re.MULTILINE
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_shows_its_examples_as_they_are(page: Path) -> None:
    assert CODE["with_code"](page) == page.read_text(encoding="utf-8"), "run python docs/update_code.py"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_is_plain_markdown(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not ONLY_ON_OUR_SITE.search(text)
    assert text.count("<!-- code:") == text.count("<!-- end of code -->")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_of_a_page_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    for target in targets:
        assert "://" in target or (page.parent / target).exists(), f"{name(page)} links {target}"


EXPLANATIONS = [page for page in PAGES if page.parent.name == "explanation"]


@pytest.mark.parametrize("page", EXPLANATIONS, ids=name)
def test_the_files_and_classes_that_an_explanation_names_exist(page: Path) -> None:
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    files = set(re.findall(r"(?<![\w./])[\w/]+\.py\b", text)) | set(re.findall(r"`([\w/]+/)`", text))
    for file in files:
        assert (ROOT / "aioinfer" / file).exists() or (ROOT / file).exists(), f"{name(page)} names {file}"
    if page.name == "architecture.md":
        sources = "".join(source.read_text(encoding="utf-8") for source in (ROOT / "aioinfer").rglob("*.py"))
        for owner, method in re.findall(r"`([A-Z]\w+)(?:\.(\w+))?`", text):
            assert re.search(rf"^class {owner}\b", sources, re.MULTILINE), f"{name(page)} names {owner}"
            assert not method or f"def {method}(" in sources, f"{name(page)} names {owner}.{method}"


def test_every_example_is_shown_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = set(re.findall(r"<!-- code: (\S+) -->", text))
    assert shown == {example.name for example in (ROOT / "docs" / "examples").glob("*.py")}


@pytest.mark.parametrize("drawing", DRAWINGS, ids=name)
def test_a_drawing_is_light_and_dark_has_a_title_and_needs_nothing_from_elsewhere(drawing: Path) -> None:
    text = drawing.read_text(encoding="utf-8")
    svg = ElementTree.fromstring(text)
    assert svg.findtext("{http://www.w3.org/2000/svg}title")
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"href|url\((?!#)|@import", text)
    assert any(drawing.name in page.read_text(encoding="utf-8") for page in PAGES)


def test_a_page_whose_example_has_changed_is_found_and_mended(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Look:\n\n<!-- code: threads.py -->\nold\n<!-- end of code -->\n\nThere.\n", encoding="utf-8")
    mended: str = CODE["with_code"](page)
    assert "old" not in mended
    assert mended.startswith("Look:\n\n<!-- code: threads.py -->\n")
    assert mended.endswith("```\n\n<!-- end of code -->\n\nThere.\n")
    assert (ROOT / "docs" / "examples" / "threads.py").read_text(encoding="utf-8") in mended
    page.write_text(mended, encoding="utf-8")
    assert CODE["with_code"](page) == mended
