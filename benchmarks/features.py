"""Check the claims of benchmarks/features.json about snn_rl and six other libraries; write docs/features.md from them.

    python benchmarks/features.py            # write docs/features.md
    python benchmarks/features.py --check    # write nothing; status 1 where the document or a claim is not so
    python benchmarks/features.py --tests    # run the tests that the cells of snn_rl name

A cell is its words and what they rest on; of a library that is not installed here, nothing is checked. The kinds:

    imports MODULE:NAME       it can be imported
    defines FILE:NAME         a class or function at the top of the file, which is not imported
    has FILE REGEX            the file has it
    lacks REGEX               no Python file of the library has it, tests apart
    no_files .pt .zip ...     the library has no file with such an ending
    says SENTENCE             the description that the installed package carries
    tested FILE::NAME         a test of this repository is there; --tests runs it
    measured WORDS            what came of running the library, in the version that features.json names and no other
    cites WORDS, note WORDS   checked by nobody
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from snn_rl.base.files import atomic  # noqa: E402  the repository goes onto the path first

DATA = ROOT / "benchmarks" / "features.json"
DOCUMENT = ROOT / "docs" / "features.md"

INTRODUCTION = """# Features, side by side

Written by `make features` from `benchmarks/features.json`. `python benchmarks/features.py --check`, which `make test`
runs, checks it against the packages in `.venv`. "no" means that the Python files of the package, tests apart, were
searched and nothing was found. The second part of the page says what each cell rests on: what was imported, found,
searched or tested, or what was measured with the version named here. A cell says what is there, not how good it is;
speed is in [benchmarks.md](benchmarks.md). Packages beside these, such as Tonic, sinabs-exodus and Lava, are not
compared. SB3 stands for stable-baselines3 and sb3-contrib.
"""


@dataclass(frozen=True)
class Library:
    name: str
    packages: Sequence[str]  # as imported
    distributions: dict[str, str]  # as pip calls them, with the versions that the claims are about

    def here(self) -> dict[str, str]:
        """The versions of its distributions that are installed."""
        found = {}
        for name in self.distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found

    @property
    def is_installed(self) -> bool:
        return len(self.here()) == len(self.distributions)

    def files(self, pattern: str) -> Iterator[Path]:
        """Its files, without its tests."""
        for folder in map(folder_of, self.packages):
            for file in sorted(folder.rglob(pattern)):
                if not {"test", "tests"} & set(file.relative_to(folder).parts):
                    yield file


@dataclass(frozen=True)
class Claim:
    row: str
    library: Library
    words: str
    evidence: Sequence[str]  # each "KIND VALUE"

    def faults(self) -> list[str]:
        """What is not so."""
        found = []
        for line in self.evidence:
            kind, _, value = line.partition(" ")
            try:
                fault = CHECKS[kind](self.library, value)
            except (ImportError, AttributeError, OSError, KeyError) as error:
                fault = f"{type(error).__name__}: {error}"
            if fault is not None:
                found.append(f"{self.row} / {self.library.name}: {self.words!r}, by {line!r}: {fault}")
        return found


def folder_of(package: str) -> Path:
    if (ROOT / package).is_dir():
        return ROOT / package
    spec = importlib.util.find_spec(package)  # does not run the package
    if spec is None or spec.origin is None:
        raise ImportError(f"no package {package}")
    return Path(spec.origin).parent


def text_of(path: str) -> str:
    package, _, file = path.partition("/")
    return (folder_of(package) / file).read_text()


def names_at_the_top(source: str) -> set[str]:
    return {getattr(node, "name", "") for node in ast.parse(source).body}


# --- kinds of evidence: each returns what is not so, or None ---


def imports(library: Library, value: str) -> str | None:
    module, _, attribute = value.partition(":")
    getattr(importlib.import_module(module), attribute)
    return None  # or an error


def defines(library: Library, value: str) -> str | None:
    file, _, name = value.partition(":")
    return None if name in names_at_the_top(text_of(file)) else "it is not defined there"


def has(library: Library, value: str) -> str | None:
    file, _, pattern = value.partition(" ")
    return None if re.search(pattern, text_of(file)) else "it is not found there"


def lacks(library: Library, value: str) -> str | None:
    for file in library.files("*.py"):
        for number, line in enumerate(file.read_text(errors="ignore").splitlines(), 1):
            if re.search(value, line, re.IGNORECASE):
                return f"found in {file.name}:{number}: {line.strip()[:80]}"
    return None


def no_files(library: Library, value: str) -> str | None:
    endings = value.split()
    return next((f"there is {file.name}" for file in library.files("*") if file.suffix in endings), None)


def says(library: Library, value: str) -> str | None:
    texts = (importlib.metadata.distribution(name).read_text("METADATA") or "" for name in library.distributions)
    return None if any(value in " ".join(text.split()) for text in texts) else "its description does not say so"


def tested(library: Library, value: str) -> str | None:
    file, _, name = value.partition("::")
    return None if name in names_at_the_top((ROOT / "tests" / file).read_text()) else "there is no such test"


def measured(library: Library, value: str) -> str | None:
    if (here := library.here()) != library.distributions:
        return f"{here} is here, not {library.distributions}; measure again and change features.json"
    return None


CHECKS: dict[str, Callable[[Library, str], str | None]] = {
    **{check.__name__: check for check in (imports, defines, has, lacks, no_files, says, tested, measured)},
    **dict.fromkeys(("cites", "note"), lambda library, value: None),
}


def read(data: dict[str, dict[str, dict[str, list[str]]]]) -> tuple[list[Library], list[Claim]]:
    libraries = [Library(name, **of) for name, of in data["libraries"].items()]  # type: ignore[arg-type]
    claims = []
    for row, cells in data["rows"].items():
        claims += [Claim(row, library, cells[library.name][0], cells[library.name][1:]) for library in libraries]
    return libraries, claims


def render(libraries: Sequence[Library], claims: Sequence[Claim]) -> str:
    versions = (", ".join(f"{name} {version}" for name, version in of.distributions.items()) for of in libraries)
    lines = [INTRODUCTION, f"Versions: {'; '.join(versions)}.", ""]
    lines += [f"| | {' | '.join(library.name for library in libraries)} |", "| --- " * (len(libraries) + 1) + "|"]
    of_row: dict[str, list[Claim]] = {}
    for claim in claims:
        of_row.setdefault(claim.row, []).append(claim)
    lines += [f"| {row} | {' | '.join(claim.words for claim in of)} |" for row, of in of_row.items()]
    lines += ["", "## What each cell rests on"]
    for row, of in of_row.items():
        lines += ["", f"### {row}", ""]
        for claim in of:
            said = "; ".join(filter(None, (sentence(line) for line in claim.evidence)))
            lines.append(f"- {claim.library.name}: **{claim.words}**. {said}")
    return "\n".join(lines) + "\n"


def sentence(line: str) -> str:
    """Evidence as the document has it; asterisks and bars outside code mean what they say."""
    kind, _, value = line.partition(" ")
    file, _, pattern = value.partition(" ")
    text = {
        "imports": f"`{value.replace(':', '.')}`",
        "defines": f"`{value}`",
        "has": f"`{file}` has `{pattern}`",
        "lacks": f"not found: searched for `{value}`",
        "no_files": f"not found: searched the package for files ending in {value}",
        "says": f'its own description (METADATA): "{value}"',
        "tested": f"`pytest tests/{value}`",
        "measured": f"measured: {value}",
        "cites": f"citation, not checked: {value}",
        "note": value,
    }[kind]
    parts = text.split("`")
    return "`".join(p if i % 2 else p.replace("*", r"\*").replace("|", r"\|") for i, p in enumerate(parts))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--tests", action="store_true", help="run the tests of this repository that cells name")
    options = parser.parse_args(argv)
    libraries, claims = read(json.loads(DATA.read_text()))
    if options.tests:
        tests = sorted({line.split()[1] for claim in claims for line in claim.evidence if line.startswith("tested ")})
        return subprocess.run([sys.executable, "-m", "pytest", *(f"tests/{t}" for t in tests)], cwd=ROOT).returncode
    for library in libraries:
        if not library.is_installed:
            print(f"{library.name} is not installed here: its cells are not checked")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # of torch and Triton
    checked = [claim for claim in claims if claim.library.is_installed]
    with contextlib.redirect_stderr(io.StringIO()):
        faults = [fault for claim in checked for fault in claim.faults()]
    text = render(libraries, claims)
    if options.check and DOCUMENT.read_text() != text:
        faults.append(f"{DOCUMENT.name} is not as features.json has it: run python benchmarks/features.py")
    print("\n".join(faults) or f"{len(checked)} cells agree with what is installed")
    if not faults and not options.check:
        with atomic(DOCUMENT) as temporary:
            temporary.write_text(text)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
