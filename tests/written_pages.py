"""The README and the guide: their code blocks."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        CARDS / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((CARDS / "docs").glob("*.md")),
    )
}


def blocks(language: str) -> dict[str, str]:
    """Every block in this language: page and number in it -> code."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return {
        f"{page} {number}": code
        for page, text in PAGES.items()
        for number, code in enumerate(pattern.findall(text), start=1)
    }


def commands(code: str) -> list[str]:
    """The command lines of a block, without their comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [stripped for line in lines if (stripped := re.sub(r"(^|\s)#.*", "", line).strip())]
