"""One vocabulary: code, help and pages use the terms of the papers, not the house's former words for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import ROOT

STANDARD = {
    r"ranks?_?of_?first|in_turn": "broadcast_object, main_process_first",
    r"baggage": "cross-block state",
    r"beginnings|go_on": "sample_prompts, generate",
    r"foretells?|foretold": "estimates, estimated",
    r"give_back_memory|mapped_memory": "trim_heap, mmap_large_allocations",
    r"hangs? together|hung together": "coupled channels",
    r"hush\w*|say_error|say_interrupted": "silence, print_error, print_interrupted",
    r"(?<!wall street )journal|workplace": "run state, working directory",
    r"judges?\b": "validation batches, held-out",
    r"kinds of blocks": "block types",
    r"landings?|landed": "residual add",
    r"lead and follow|followers?": "rank 0, other ranks",
    r"makes? up for|made up for|making up for": "compensate",
    r"no ?room|out_of_room|with_room": "out of memory, with_oom_retry",
    r"(?<!your )own text|text of its own|writes? (?:more )?text itself": "self-generated calibration data",
    r"rehears\w+": "capture block inputs",
    r"remover": "structured solver",
    r"rewind": "recompute outputs",
    r"severable": "removable",
    r"shar(?:e|es|ing) out|shares of (?:the )?blocks": "allocate, layer-wise sparsity ratios",
    r"sinks?\b(?! size)": "consumer",
    r"travels? along": "propagated in parallel",
    r"twins?": "dense stream",
}
"""Former words, as regular expressions, and the terms that stand for them."""
ALLOWED = {
    "llmprune/reporting/schema.py",  # the keys of schema 1
    "llmprune/job.py",  # former names of fields
    "CHANGELOG.md",
    "eval/LOG.md",
    "docs/results.md",
}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "eval").glob("*.md")]
CODE = [*(ROOT / "llmprune").rglob("*.py"), *(ROOT / "examples").glob("*.py")]


def words_in(text: str) -> list[str]:
    """The former words in a text, with the terms to use; recorded commands and tables are left out."""
    prose = re.sub(r"(?s)<!-- results: .*?<!-- end -->|```.*?```", "", text)
    found = []
    for former, standard in STANDARD.items():
        for match in re.finditer(rf"(?i)(?<![a-z])(?:{former})(?![a-z])", prose):
            found.append(f"{match[0]!r}: use {standard}")
    return found


@pytest.mark.parametrize("path", [*PAGES, *CODE], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_and_code_use_the_standard_terms(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() not in ALLOWED:
        assert words_in(path.read_text(encoding="utf-8")) == []


def test_a_former_word_is_found_in_prose_and_not_in_a_recorded_command() -> None:
    said = words_in("the twin travels along")
    assert said == ["'travels along': use propagated in parallel", "'twin': use dense stream"]
    assert words_in("```\nllmprune --own 3 # own text\n```") == []
    assert words_in("intwined, landscape, prejudges") == []
