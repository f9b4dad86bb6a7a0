"""The examples in the documents print what the documents say. All else of them is checked by `make docs`."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("document", "section"),
    [
        ("README.md", "First result"),
        ("README.md", "What a network sees"),
        ("docs/migrating.md", "Checkpoints"),
    ],
)
def test_an_example_prints_what_it_says(document, section, capsys):
    code, printed = re.search(
        rf"## {section}\n.*?```python\n(.*?)```\n\nprints\n\n```text\n(.*?)```",
        (ROOT / document).read_text(),
        re.DOTALL,
    ).groups()
    exec(compile(code, document, "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_examples_of_the_regions_follow_the_first(capsys):
    names = {}
    for section in ("First result", "Regions of interest"):
        text = (ROOT / "README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(code, section, "exec"), names)
    assert capsys.readouterr().out.endswith("pooled (2, 16, 7, 7)\n")
    assert names["grad_x"].shape == names["x"].shape
