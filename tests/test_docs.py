"""What the README and docs/ tell a reader to run, runs.

Each page is gone through from top to bottom in a folder of its own, which has this repository's files and nothing else.

- Fenced Python is executed.
- A command of scripts/ is run as it stands where its first file is there by then: in the repository, or made
  further up the page.
- A training in docs/guide.md is run with ``--smoke``.
- Any other command (it trains for hours, or its file is a placeholder) is asked for its ``--help``, which has to
  succeed and to know every option that the page gives. An ``N`` is a number.
- A command of snn-rl is checked as those of scripts/ are.
- Of make, the targets are tried with ``--dry-run``; of other programs, it is looked whether they are installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from agents import RECIPES
from snn_rl import cli, to_spiking
from snn_rl.base.files import write_json
from snn_rl.cli import sweep
from snn_rl.cli.sweeping.jobs import jobs
from snn_rl.cli.sweeping.table import gather
from snn_rl.vision import Classifier, build, save_classifier

ROOT = Path(__file__).resolve().parents[1]
GUIDE = "docs/guide.md"
PAGES = ["README.md", "CONTRIBUTING.md", "agents/pretrained/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n)+")
SPAN = re.compile(r"`((?:python|make|torchrun|tensorboard|pip|snn-rl) [^`]+)`")
# A wrapper's own options, and a recipe's fields, are in another help than that of the command which takes them.
OPTIONS_ELSEWHERE = {
    "scripts/zoo.py": ["scripts/zoo.py"],
    "scripts/reproduce.py": ["scripts/train_vision.py", "vgg6-cifar10"],
}
PROGRAMS = ("python", "make", "torchrun", "tensorboard", "pip", "snn-rl")


def snippets(page: str) -> Iterator[tuple[str, str]]:
    """("python", code) and ("command", one line), in the page's order."""
    text = (ROOT / page).read_text()
    found: list[tuple[int, str, str]] = []
    for match in FENCED.finditer(text):
        assert match[1] in ("python", "sh"), f"{page}: a fence of {match[1]!r} would not be run"
        found.append((match.start(), match[1], match[2]))
    outside = FENCED.sub(lambda match: "\n" * 2 + "." * (len(match[0]) - 2), text)  # every character keeps its place
    found += [(match.start(), "sh", match[0]) for match in INDENTED.finditer(outside)]
    found += [(match.start(), "sh", " ".join(match[1].split())) for match in SPAN.finditer(outside)]
    for _, kind, code in sorted(found):
        if kind == "python":
            yield "python", code
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip(), comments=True) if line.strip().startswith(PROGRAMS) else []
            if words and words[0] in PROGRAMS:
                yield "command", shlex.join(words)


def test_no_python_hides_in_an_indented_block() -> None:
    for page in PAGES:
        outside = FENCED.sub("", (ROOT / page).read_text())
        for block in INDENTED.findall(outside):
            assert not re.search(r"^ +(from|import) ", block, re.MULTILINE), f"{page}: fence it\n{block}"


def test_every_topic_of_the_path_has_a_section_with_something_to_run() -> None:
    path = (ROOT / "docs/README.md").read_text()
    for section in (ROOT / GUIDE).read_text().split("\n## ")[1:]:
        title = section.splitlines()[0]
        assert f"[{title}](guide.md#{title.lower().replace(' ', '-')})" in path
        assert FENCED.search(section), title


def test_every_page_is_in_the_index_and_links_lead_somewhere() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in PAGES:
        name = Path(page).name
        assert page in ("docs/README.md",) or f"]({name}" in index or f"](../{page})" in index, page
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    """Each of the README's table, under the agent, the stage and the kind of figure that it has there."""
    results = (ROOT / "docs/results.md").read_text()
    sections = {"pong-lite": "## Pong, `pong-lite`", "pong": "## Pong, `pong`:", "cartpole": "## CartPole-v1\n"}
    figures = re.findall(
        r"^\| (?:`([\w-]+)`)? ?\| (ANN|T\d) \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(figures) == 9
    agent = ""
    for name, stage, row in figures:
        agent = name or agent
        section = results.split(sections[agent])[1].split("\n## ")[0]
        table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
        measured = next(line for line in table if line[0] == stage)
        header = next(line for line in table if line[:2] == ["stage", "return"])
        sticky = [line for line in table if "ANN" in line and "T1" in line and "seed" not in line]
        returned, theirs, robust, energy, their_energy = (cell.strip() for cell in row.split(" |"))
        assert (returned, theirs) == (measured[1], measured[2]), (agent, stage)
        assert energy == measured[header.index("energy")], (agent, stage)
        if header.count("paper") == 2:
            assert their_energy == measured[len(header) - header[::-1].index("paper") - 1], (agent, stage)
        if robust:
            here = table[table.index(sticky[0]) + 2]  # behind the line of dashes
            assert robust == here[sticky[0].index(stage)], (agent, stage)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("agents", "benchmarks", "docs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    if page == "docs/classifiers.md":
        a_classifier(tmp_path)
    if page == "docs/sweep.md":
        a_table(tmp_path)
    if page == "docs/README.md":
        monkeypatch.setattr(sys, "path", list(sys.path))  # which snn-rl adds the folder to
        (tmp_path / "my_recipes.py").write_text("from agents.cartpole import CARTPOLE as ACROBOT")
    asked: set[str] = set()
    for kind, code in snippets(page):
        if kind == "python":
            exec(compile(code, page, "exec"), {"__name__": "__main__"})
        elif page == GUIDE and re.match(r"python scripts/train_\w+\.py(?!.*--help)", code):
            assert run([*shlex.split(code)[1:], "--smoke"]) == 0, code
        else:
            command(code, asked)


def command(code: str, asked: set[str]) -> None:
    program, *arguments = shlex.split(code)
    if program == "make":
        tried = subprocess.run(["make", "--dry-run", arguments[0]], cwd=ROOT, capture_output=True, text=True)
        assert tried.returncode == 0, f"{code}: {tried.stderr}"
    elif program == "snn-rl":
        if any(word.endswith((".zip", ".safetensors")) and Path(word).exists() for word in arguments):
            assert run([program, *arguments]) == 0, code
        elif code not in asked:
            asked.add(code)
            check_options([program, *arguments])
    elif program == "python" or (program == "torchrun" and (arguments := from_script(arguments))):
        files = [word for word in arguments[1:] if not word.startswith("-")][:1]
        if program == "python" and arguments[0].startswith("scripts/") and files and Path(files[0]).exists():
            assert run(arguments) == 0, code
        elif code not in asked:
            asked.add(code)
            check_options(arguments)
            if arguments[0] == "scripts/sweep.py":  # its recipes, fields and values too
                sweep.runs(sweep.parse(arguments[1:]), RECIPES)
    else:
        assert shutil.which(program, path=str(Path(sys.executable).parent)), f"{program} is not installed"
        for extras in re.findall(r"\.\[([\w,]+)\]", code):
            assert set(extras.split(",")) <= set(importlib.metadata.metadata("snn_rl").get_all("Provides-Extra") or [])


def from_script(arguments: list[str]) -> list[str]:
    """torchrun's arguments without its own, from the script on."""
    return arguments[next(i for i, word in enumerate(arguments) if word.endswith(".py")) :]


def run(arguments: list[str]) -> int:
    """A script of this repository or snn-rl with its arguments, in this process; the exit status."""
    script = Path(arguments[0])
    if arguments[0] == "snn-rl":
        main = cli.main
    else:
        assert script.parts[0] == "scripts", arguments
        main = importlib.import_module(f"scripts.{script.stem}").main
    with warnings.catch_warnings():
        if script.stem == "zoo":
            warnings.simplefilter("ignore")  # RL Zoo's and its dependencies' are not ours
        try:
            return int(main(arguments[1:]))
        except SystemExit as end:
            return int(end.code or 0)


def check_options(arguments: list[str]) -> None:
    """``--help`` of the command succeeds and knows the command's options."""
    asked = ["1" if word == "N" else word for word in arguments if word != "--help"]
    status, text = help_of(asked)
    assert status == 0, f"{' '.join(arguments)}: {text}"
    if elsewhere := OPTIONS_ELSEWHERE.get(asked[0]):
        text += help_of(elsewhere)[1]
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w.-]*", text))
    for option in (word.split("=")[0] for word in asked if re.match(r"--?[A-Za-z]", word)):
        assert option in known, f"{' '.join(arguments)}: no option {option}"


@functools.cache
def help_of_benchmark(*words: str) -> tuple[int, str]:
    """In a process of its own: it imports what lies beside it. ``words``: the script, and which part of it."""
    result = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def help_of(arguments: list[str]) -> tuple[int, str]:
    if not arguments[0].startswith(("scripts/", "snn-rl")):
        return help_of_benchmark(*itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = run([*arguments, "--help"])
    return status, output.getvalue()


def a_classifier(folder: Path) -> None:
    """What the snippet on images has: a run's classifier and two pictures."""
    from PIL import Image

    ann = build("vgg6", classes=3, image_size=8, width=0.0625, batch_norm=True, dropout=0.0).eval()
    network = to_spiking(ann, torch.randn(8, 3, 8, 8), timesteps=1)
    architecture = {"model": "vgg6", "image_size": 8, "width": 0.0625, "batch_norm": True, "dropout": 0.0}
    classifier = Classifier(network, architecture, ("a", "b", "c"), (0.5,) * 3, (0.2,) * 3, {})  # type: ignore[arg-type]
    file = folder / "runs/vgg6-cifar10-w0.25/seed-0/T1/model.safetensors"
    file.parent.mkdir(parents=True)
    save_classifier(classifier, file)
    for name in ("cat.png", "dog.png"):
        Image.new("RGB", (8, 8)).save(folder / name)


def a_table(folder: Path) -> None:
    """What the snippet on sweeps reads: the table of a sweep of CartPole."""
    todo = jobs([RECIPES["cartpole"]], [[]], [0, 1], Path("runs/sweep"))
    stage = {"stage": "T1", "eval": {"mean": 500.0}, "spike_rate": None, "energy": None}
    write_json(folder / "runs/sweep/sweep.json", gather(todo, {job: {"stages": [stage]} for job in todo}, {}))


def test_an_option_that_is_unknown_and_a_command_that_fails_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no option --stickiness"):
        check_options(["scripts/evaluate.py", "FILE", "--stickiness", "0.25"])
    (tmp_path / "none").write_bytes(b"")
    with pytest.raises(AssertionError, match="evaluate"):
        command(f"python scripts/evaluate.py {tmp_path / 'none'}", set())
    with pytest.raises(ValueError, match="unknown recipe 'cartpool'"):
        command("python scripts/sweep.py cartpool", set())
    with pytest.raises(ValueError, match=r"--set snn\.lek=1: cartpole has no such field"):
        command("python scripts/sweep.py cartpole --set snn.lek=1", set())
    with pytest.raises(AssertionError, match="no option --stickiness"):
        command("snn-rl evaluate FILE --stickiness 0.25", set())
    with pytest.raises(AssertionError, match="snn-rl fly"):
        command("snn-rl fly FILE", set())
    with pytest.raises(AssertionError, match="kils"):
        command("python benchmarks/endurance.py kils", set())
    with pytest.raises(AssertionError, match="make train"):
        command("make train", set())
