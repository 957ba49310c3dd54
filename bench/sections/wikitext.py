"""WikiText-2 back to ordinary prose, and its articles cut into sections."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from saltire.errors import SaltireError

HEADING = re.compile(r"^((?:= )+)(.+?)((?: =)+)$")
SHORTEST, LONGEST = 400, 2400  # characters of a section, about 100 and 600 tokens


@dataclass(frozen=True)
class Article:
    title: str
    sections: list[str]  # in the order of the article, headings left out


def data_folder() -> Path:
    """The folder of real inputs. Raises SaltireError that says how to name it."""
    folder = Path(os.environ.get("SALTIRE_DATA", "../shared/data"))
    if not (folder / "wikitext-2").is_dir():
        raise SaltireError(f"{folder} holds no wikitext-2. Set SALTIRE_DATA to the folder of data.")
    return folder


def plain(line: str) -> str:
    """Undo the tokenised form: spaces around punctuation, @-@, split contractions."""
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    line = re.sub(r" ([,.;:!?%)\]])", r"\1", line)
    line = re.sub(r"([(\[$]) ", r"\1", line)
    line = re.sub(r" (n't|'(?:s|re|ve|ll|d|m))\b", r"\1", line)
    return re.sub(r"(\d) – (\d)", r"\1–\2", line).strip()


def articles(*names: str) -> list[Article]:
    """The articles of wikitext-2/NAME.txt, each file's in its order."""
    found: list[Article] = []
    for name in names:
        for raw in (data_folder() / "wikitext-2" / f"{name}.txt").read_text().splitlines():
            line = raw.strip()
            heading = HEADING.match(line)
            if heading and heading[1] == "= ":
                found.append(Article(heading[2], [""]))
            elif heading and found:
                found[-1].sections.append("")
            elif line and found:
                sections = found[-1].sections
                sections[-1] = f"{sections[-1]}\n{plain(line)}".strip()
    return found


def cut(article: Article, most: int) -> list[str]:
    """Its first ``most`` sections of at least SHORTEST characters, each up to the last paragraph
    within LONGEST."""
    pieces = []
    for section in article.sections:
        paragraphs = section.split("\n")
        piece = paragraphs[0]
        for paragraph in paragraphs[1:]:
            if len(piece) + 1 + len(paragraph) > LONGEST:
                break
            piece = f"{piece}\n{paragraph}"
        if len(piece) >= SHORTEST:
            pieces.append(piece)
    return pieces[:most]


def documents_of(names: tuple[str, ...], longest: int = 1600) -> list[str]:
    """All of the text as documents of whole paragraphs, about 300 tokens each."""
    found: list[str] = []
    for article in articles(*names):
        piece = ""
        for paragraph in (p for section in article.sections for p in section.split("\n") if p):
            if piece and len(piece) + 1 + len(paragraph) > longest:
                found.append(piece)
                piece = ""
            piece = f"{piece}\n{paragraph}".strip()
        if piece:
            found.append(piece)
    return found
