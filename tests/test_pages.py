"""What runs the documentation notices what is wrong with a page."""

import pytest
from pages import Done, find_blocks
from sybil import Document


class FakeReader:
    """Runs nothing: knows what two snippets do."""

    whole = False
    does = {"good": Done(False, "one\ntwo 2.5\n", ""), "bad": Done(True, "", "Traceback …\nValueError: no\n")}

    def home_of(self, page):
        return page

    def submit(self, function, home, code):
        return self.does[code.strip()]


def complaint(folder, text: str) -> str | None:
    """What is wrong with the first block of a page, if anything is."""
    (folder / "page.md").write_text(text)
    document = Document.parse(str(folder / "page.md"), find_blocks)
    document.namespace["reader"] = FakeReader()
    example = next(iter(document.examples()))
    return example.region.evaluator(example)


def page(code: str, shown: str = "", above: str = "") -> str:
    return f"Text.\n\n{above}```python\n{code}\n```\n" + (f"\n```text\n{shown}\n```\n" if shown else "")


@pytest.mark.parametrize(
    "text",
    [
        page("good"),
        page("good", "two 2.5"),
        page("good", "one\ntwo 2.…"),
        page("good", "…\ntwo …"),
        page("bad", "ValueError: no"),
        page("good", "two 99", "<!-- quick: --max_steps 1 -->\n"),
    ],
)
def test_a_page_that_shows_the_end_of_what_is_printed_is_right(tmp_path, text):
    assert complaint(tmp_path, text) is None


@pytest.mark.parametrize(
    "text, said",
    [
        (page("good", "two 2.6"), "but prints"),
        (page("good", "one"), "but prints"),
        (page("good", "wo 2.5"), "but prints"),
        (page("good", "ValueError: no"), "did not fail"),
        (page("bad"), "failed"),
        (page("bad", "ValueError: yes"), "but prints"),
        (page("good", "three 99", "<!-- quick: --max_steps 1 -->\n"), "but prints"),
    ],
)
def test_a_page_that_shows_something_else_is_wrong(tmp_path, text, said):
    assert said in complaint(tmp_path, text)


@pytest.mark.parametrize(
    "text, said",
    [("```\nvitae\n```\n", "1 blocks without a language"), ("- an item\n  ```bash\n  vitae\n  ```\n", "left margin")],
)
def test_a_block_that_would_not_run_unnoticed_is_an_error(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        complaint(tmp_path, text)
