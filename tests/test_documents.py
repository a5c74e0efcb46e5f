"""The pages that people read: width of lines, links, and the lines that stand on two pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "datasets" / "README.md"]
WIDTH = 120
WIDE = ("benchmarks.md",)  # reflowed by hand, where its tables are


def prose(text):
    """Numbered lines outside code blocks and tables."""
    lines, code = [], False
    for number, line in enumerate(text.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        code ^= fence
        if not (code or fence or line.startswith("|")):
            lines.append((number, line))
    return lines


def too_wide(text):
    """Lines that are wider than the page; a link that stands alone on its line cannot be broken."""
    return [
        (number, len(line))
        for number, line in prose(text)
        if len(line) > WIDTH and not re.fullmatch(r"\s*(- )?!?\[[^]]*\]\([^)]*\)[.,;:]?", line)
    ]


def anchors(text):
    """Names of the headings as links spell them."""
    headings = [line.lstrip("#").strip().lower() for _, line in prose(text) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def own_data(text):
    """The code block of the ten lines for own data."""
    return re.search(r"```\n(# datasets/my_set/ holds .*?)```", text, re.S)[1]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in WIDE], ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_fit_the_page(page):
    assert not too_wide(page.read_text())


def test_what_may_be_wide():
    wide = "word " * 30
    page = f"{wide}\n| {wide} |\n```\n{wide}\n```\n- [{wide}](x.md)\n- see [{wide}](x.md)\n  {wide}"
    assert [number for number, _ in too_wide(page)] == [1, 7, 8]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not re.match(r"https?:", link) and not (
            target.exists() and (not anchor or anchor in anchors(target.read_text()))
        ):
            lost.append(link)
    assert not lost


def test_own_data_is_the_same_on_both_pages():
    """tests/engine/test_engine_own_data.py runs the lines of docs/datasets.md."""
    first, second = (own_data((ROOT / page).read_text()) for page in ("README.md", "docs/datasets.md"))
    assert first == second and "FEWSHOT.ROOT datasets/my_set" in first


def commands(text):
    """Shell commands of the code blocks, continued lines joined and the page's own variables put in."""
    found = []
    for block in re.findall(r"```\n(.*?)```", text, re.S):
        variables = {}
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip()
            for name, value in variables.items():
                line = re.sub(rf"\$(?:{name}\b|{{{name}}})", lambda _, value=value: value, line)
            if assigned := re.fullmatch(r'(\w+)=(?:"(.*)"|(\S+))', line):
                variables[assigned[1]] = assigned[2] or assigned[3] or ""
            elif line.startswith("python "):
                found.append(line)
    return found


def swallowed_flags(command):
    """Options behind the first KEY VALUE pair, where the programs take them for a part of the pairs."""
    words = command.partition("#")[0].split()
    first = next((place for place, word in enumerate(words) if re.fullmatch(r"[A-Z]\w*(\.[A-Z_]+)+", word)), len(words))
    return [word for word in words[first:] if word.startswith("--")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_options_stand_before_overrides(page):
    assert [line for line in commands(page.read_text(encoding="utf-8")) if swallowed_flags(line)] == []


def test_a_swallowed_flag_is_found():
    text = '```\nT="A.KEY 1"\npython tool.py $T \\\n    --eval-only\npython tool.py --eval-only $T\n```\n'
    assert [swallowed_flags(line) for line in commands(text)] == [["--eval-only"], []]
