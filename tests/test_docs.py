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
