"""The documentation: generated pages are current, links lead somewhere, and the text keeps to its limits."""

import json
import re
from pathlib import Path

import pytest

import speedrl
from experiments.docs import between, cli_page, pages
from experiments.result_figures import draw_figures
from experiments.result_pages import RESULTS, SEARCHED, named, read_results, result_pages
from speedrl.studies.ablations import AGAIN, all_ablations

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORDS, LINES, SENTENCE = 1100, 150, 30


def prose(text: str) -> str:
    """A page without code, tables, comments and the targets of links."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
    text = re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))
    return re.sub(r"`[^`]*`", "code", text)


def sentences(text: str) -> list[str]:
    """The sentences of a page; list items and headings are sentences of their own."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-#]|\d+\.) )", prose(text))
    return [part for block in blocks for part in re.split(r"(?<=[.!?:;])\s+", " ".join(block.split())) if part]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in pages()])
def test_generated_pages_are_current(path):
    assert path.read_text(encoding="utf-8") == pages()[path], "run python -m experiments.docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_images_of_pages_are_there(page):
    for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{target}: run python -m experiments.docs"


def test_the_site_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {page.name for page in PAGES} - {"README.md"} <= set(re.findall(r": (\S+\.md)$", text, re.MULTILINE))


def test_the_python_api_has_every_public_name_once():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    places = [f"speedrl.{module}.{name.rpartition('=')[2]}" for module, own in speedrl._PLACES.items() for name in own]
    assert sorted(named) == sorted(places)
    for module, own in speedrl._PLACES.items():
        for name in own:
            public, equals, real = name.partition("=")
            heading = f"::: speedrl.{module}.{real}\n    options: {{heading: {public}}}\n"
            assert not equals or heading in text, f"{public} is not called by its public name"


def test_recipes_and_folders_that_pages_name_exist():
    recipes = set(re.findall(r"^([\w-]+)(?: \*?\w+)*:", (ROOT / "justfile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in [*PAGES, *ROOT.glob("experiments/**/README.md")]:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"`just ([\w][\w-]*)", text)) <= recipes, page
        for path in re.findall(r"`((?:speedrl|experiments|tests)/[\w./]*)`", text):
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES and len(text.split()) <= WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_in_plain_words(page):
    text = page.read_text(encoding="utf-8")
    long = [sentence for sentence in sentences(text) if len(sentence.split()) > SENTENCE]
    assert not long
    bare = re.findall(r"(?<![\w.)\]])\.\d+\b", prose(text) + "\n".join(re.findall(r"^\|.*", text, re.MULTILINE)))
    assert not bare, "a number without its leading zero"
    assert not re.search(r"pip install [\"']?speedrl(?!\[[a-z,]+\] @)", text), "that name is another project's"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_commands_exist(page):
    sections = dict(re.findall(r"^## speedrl (\w+)\n(.*?)(?=^## |\Z)", cli_page(), re.DOTALL | re.MULTILINE))
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for command, rest in re.findall(r"(?:\.venv/bin/|-m |^)speedrl (\w+)([^#&]*)", line):
            for option in re.findall(r"--[a-z0-9-]+", rest):
                assert re.search(rf"{option}(?![\w-])", sections[command]), f"speedrl {command} has no {option}"


def test_the_python_example_of_the_front_page_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_model" in block)
    names: dict = {}
    exec(code, names)
    names["loss"].backward()
    assert names["loss"].isfinite()


def test_the_evidence_for_deviations_is_in_the_results():
    table = re.search(r"^\| deviation .*?\n\n", (ROOT / "docs/method.md").read_text(encoding="utf-8"), re.M | re.S)
    sources = ("docs/results.md", "docs/ablations.md", "speedrl/models/embedded/README.md")
    measured = {number for source in sources
                for number in re.findall(r"\d\.\d{3}", (ROOT / source).read_text(encoding="utf-8"))}
    assert set(re.findall(r"\d\.\d{3}", table[0])) <= measured


def test_every_licence_that_files_are_under_has_its_text():
    text = (ROOT / "REUSE.toml").read_text(encoding="utf-8")
    named = {name for line in re.findall(r'SPDX-License-Identifier = "(.+)"', text) for name in line.split(" AND ")}
    assert named == {path.stem for path in (ROOT / "LICENSES").iterdir()}


# GENERATED RESULTS

VALUES = {"reward": 0.5711, "judge_r1": 0.4044, "judge_margin": 0.1234, "diversity": 0.3333, "judge_r5": 0.6,
          "frechet": 12.34, "pixel_diversity": 0.2}


def row(model, steps, *, prompts="training", guidance=1.0, runs=3, **values):
    found = {"model": model, "prompts": prompts, "steps": steps, "guidance": guidance, "temperature": 4.5, "runs": runs,
             "schedule": "cosine", "order": "confidence", "remask": 0.5, "seconds_per_image": 0.01}
    found |= {"network_evaluations": 7.26, "steps_mean": 7.26, "steps_mode": 8} if steps == "auto" else {
        "network_evaluations": steps * (1 if guidance == 1 else 2)}
    spread = {f"{name}_interval": None if runs == 1 else 0.0123 for name in VALUES}
    return found | VALUES | spread | {f"{name}_spread": None for name in VALUES} | values


def difference(variant, metric, size, *, outside=True, steps=4):
    return {"variant": variant, "prompts": "training", "steps": steps, "network_evaluations": steps, "metric": metric,
            "difference": size, "interval": 0.004, "seeds": 3, "outside": outside}


def ablation(name="method", base="embedded", searched="start"):
    """An ablation's file as of `speedrl ablate`: the base at 32 steps with guidance, all others from 4 steps on."""
    sets, variants = ("training", "held-out"), [*all_ablations()[name]]
    rows = [row(base, 32, prompts=which, guidance=1.3, runs=1) for which in sets]
    rows += [row(model, steps, prompts=which, runs=1 if model in (base, searched) else 3)
             for model in (base, searched, *variants) for which in sets for steps in (4, 8, "auto")]
    differences = [difference(AGAIN, "reward", -0.011), difference(AGAIN, "judge_r1", 0.021),
                   difference("no reward", "reward", -0.2), difference("no reward", "judge_r1", 0.02)]
    commands = [f"speedrl {line}" for seed in (0, 1, 2) for line in (
        f"train --out runs/a/runs/default/seed-{seed}/run --iterations 50 --ema 0.5 --model embedded --seed {seed} "
        "--no-compare",
        f"eval --model runs/a/runs/default/seed-{seed}/run --steps 4,8,auto --count 4 --seeds 1",
    )]
    return {"ablation": name, "failed": {"no reward, seed 1": "no file c.txt"}, "rows": rows,
            "differences": differences, "words": [], "commands": commands}


@pytest.fixture
def found(tmp_path):
    for name in ("method", "speed-reward"):
        (tmp_path / f"{name}.json").write_text(json.dumps(ablation(name)), encoding="utf-8")
    return read_results(tmp_path)


def test_a_page_without_measurements_says_so_and_how_to_make_them():
    pages = result_pages({})
    assert pages.keys() == {"docs/results.md", "docs/ablations.md"}
    for name, command in (("results", "just results method"), ("ablations", "just results NAME")):
        assert "No measurement of this version is here yet" in pages[f"docs/{name}.md"]
        assert command in pages[f"docs/{name}.md"] and "±0" not in pages[f"docs/{name}.md"]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_numbers_of_the_present_version_are_those_that_were_measured(page):
    """Rows "| model | NFE | reward | R@1 | margin | diversity |", each cell of training and of held-out prompts."""
    file = ROOT / "experiments/results/hindsight.json"
    measured = {(row["model"], row["network_evaluations"], row["prompts"]): row
                for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    text = (ROOT / page).read_text(encoding="utf-8")
    names = "|".join({re.escape(model) for model, *_ in measured})
    rows = re.findall(rf"^\| ({names}) \| (\d+) \| (.*?) \|$", text, re.MULTILINE)
    assert len(rows) >= 4
    for model, nfe, cells in rows:
        for metric, cell in zip(("reward", "judge_r1", "judge_margin", "diversity"), cells.split(" | "), strict=False):
            of = [measured[model, int(nfe), which][metric] for which in ("training", "held-out")]
            assert cell == " / ".join(f"{value:.3f}" for value in of), (model, nfe, metric)


@pytest.mark.parametrize("names", [("embedded", "start"), ("start", "runs/searched"), ("start", SEARCHED)])
def test_the_base_is_told_from_the_one_with_a_searched_sampler(names):
    rows = named(ablation("method", *names))["rows"]
    assert [row["model"] for row in rows[:3]] == ["base"] * 3 and rows[0]["steps"] == 32
    assert [*dict.fromkeys(row["model"] for row in rows)][:3] == ["base", SEARCHED, "GRPO"]


def test_results_have_the_numbers_of_the_file_and_the_floor_of_the_pair(found):
    text = result_pages(found)["docs/results.md"]
    assert "Sizes: trainings of each variant 3, images of each prompt 4, sampling seeds 1." in text
    assert "| GRPO | 4 | 4 | " in text and "0.571 ±0.012" in text and "0.404 ±0.012" in text
    assert "| training | 4 | -0.011 ±0.004 | +0.021 ±0.004 |" in text
    assert "| **largest size** |  | **0.011** | **0.021** |" in text
    assert "no reward: 1 of 2" in text and "| no reward | training | 4 | -0.200 ±0.004 * | " in text
    assert "0.020 ±0.004 |" in text and "0.020 ±0.004 *" not in text, "it is no larger than the pair's"
    assert "No measurement" not in text and "quality_against_nfe.svg" in text


def test_a_part_between_marks_is_replaced_and_nothing_else():
    page = "before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n"
    assert between(page, "new\n", mark="a") == page.replace("old", "new")


def test_results_have_each_command_once(found):
    text = result_pages(found)["docs/results.md"]
    assert "`no file c.txt`" in text and "`just results method` measures it" in text
    assert text.count("speedrl train --out runs/a/runs/default/seed-N/run") == 1


def test_every_other_ablation_has_a_section_with_what_it_varies(found):
    text = result_pages(found)["docs/ablations.md"]
    assert text.startswith("## speed-reward\n") and "| steps reward 0.5 | `--steps-reward 0.5` |" in text
    assert "\n## method\n" not in text and "\n## kl\n" not in text
    assert text.index("## speed-reward") < text.index("## Not measured") < text.index("| `kl` | ce, weight 0.2; ")


def test_figures_are_the_same_twice(found, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw_figures(found, tmp_path / folder)
    for name in ("quality_against_nfe.svg", "speed_reward_front.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_measurements_name_no_folder_of_a_machine():
    for path in RESULTS.glob("*.json"):
        named = re.search(r"(?<![\w.~-])/(?:[\w.+~-]+/)+", path.read_text(encoding="utf-8"))
        assert not named, f"{path} names {named[0]}: measure with a relative --out, or edit the file"
