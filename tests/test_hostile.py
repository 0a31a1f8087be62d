"""Input that means no good: prompts and flags. One line and status 2, never a traceback, never a lost file."""

import json
import tracemalloc

import pytest
import torch
from typer.testing import CliRunner

import speedrl.train
from speedrl import cli
from speedrl.models.checkpoint import encode_prompts
from speedrl.prompts import open_prompts, read_prompts
from speedrl.sample import contact_sheet
from speedrl.state import append_row
from speedrl.train import train

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def test_marks_blank_lines_and_control_characters_leave_the_prompts(tmp_path):
    text = "\ufeffa red\tapple\r\n\r\n \x00 \n\x1b[31mred\x07 owl\x85\na 👩‍🚀 in 雪\nb\u2028c\n\n".encode()
    (tmp_path / "p.txt").write_bytes(text)
    assert read_prompts(tmp_path / "p.txt") == ["a red apple", "[31mred  owl", "a 👩‍🚀 in 雪", "b c"]
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "an\\nowl"}\n'.encode())
    assert read_prompts(tmp_path / "p.jsonl") == ["an owl"]


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"an owl\n\xff\xfe\n", "not a text file"), ("an owl\n".encode("utf-16"), "not a text file"), (b"", "no prompts"),
     (b"\n \n\x00\n", "no prompts")],
)  # fmt: skip
def test_a_file_without_prompts_in_utf_8_is_one_line(tmp_path, content, says):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        open_prompts(tmp_path / "p.txt")


def numbered(path, count):
    with path.open("w") as file:
        file.writelines(f"picture number {i} of something that has a rather long description\n" for i in range(count))
    return path


def test_a_million_prompts_stay_in_their_file(tmp_path):
    lines = open_prompts(numbered(tmp_path / "million.txt", 1_000_000))
    assert len(lines) == 1_000_000 and lines[torch.tensor(777_777)].startswith("picture number 777777 ")
    assert lines[-1].startswith("picture number 999999 ") and len(lines[5:8]) == 3
    with pytest.raises(IndexError):
        lines[1_000_000]
    few = numbered(tmp_path / "few.txt", 20_000)
    tracemalloc.start()
    open_prompts(few)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20_000 * 8 * 2 + 100_000 < few.stat().st_size / 3


def test_a_prompt_of_100000_characters_trains_and_is_drawn(tiny_generator_folder, tiny_generator, tmp_path):
    long = "a red apple 🦉 " * 7000
    (tmp_path / "p.txt").write_text(f"{long}\nb\n")
    train(out=tmp_path / "run", model=str(tiny_generator_folder), prompts=tmp_path / "p.txt", iterations=1, steps="1",
          quality="tests.test_hostile:dark", groups=3, group_size=2, compile=False)  # fmt: skip
    assert encode_prompts(tiny_generator, [long]).text.shape == (1, 8, 24)
    sheet = contact_sheet([torch.zeros(1, 3, 16, 16)], labels=[long], titles=[long])
    assert sheet.width < 2000


def dark(images, prompts):
    return -images.mean((1, 2, 3))


NOT_NUMBERS = st.sampled_from(["", "x", "1e", "--", "0x", "١٢z", "None", "1,2", "\x00", "💥", " "])
NOT_FINITE = st.sampled_from(["nan", "inf", "-inf"])
BELOW_ONE = st.integers(max_value=0).map(str)
NEGATIVE = st.floats(max_value=-1e-9, allow_infinity=False).map(repr)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).filter(lambda t: not t.startswith("-"))
WORDS = WORDS.map(lambda text: f"no-{text}")
COUNTS = NOT_NUMBERS | NOT_FINITE | BELOW_ONE | st.just("1.5")
BAD = {  # each value of each option is bad whatever the others are
    **dict.fromkeys(("--iterations", "--groups", "--micro-batch", "--updates", "--save-every", "--keep-checkpoints",
                     "--max-skipped", "--lora", "--trained"), COUNTS),
    "--group-size": COUNTS | st.just("1"),
    "--seed": NOT_NUMBERS | st.integers(min_value=2**63).map(str),
    "--steps": NOT_NUMBERS | BELOW_ONE | st.sampled_from(["8-2", "1-", "-", "99", "1-17", "9" * 5000]),
    **dict.fromkeys(("--lr", "--clip-range", "--clip-grad", "--tune-rate"),
                    NOT_NUMBERS | NOT_FINITE | NEGATIVE | st.just("0")),
    **dict.fromkeys(("--kl-weight", "--temperature", "--quality-clip"), NOT_NUMBERS | NOT_FINITE | NEGATIVE),
    **dict.fromkeys(("--steps-reward", "--quality-gate", "--guidance", "--least-quality"), NOT_NUMBERS | NOT_FINITE),
    "--percentile": NOT_NUMBERS | NOT_FINITE | NEGATIVE | st.floats(min_value=100.01).map(repr),
    "--ema": NOT_NUMBERS | NOT_FINITE | NEGATIVE | st.floats(min_value=1).map(repr),
    **dict.fromkeys(("--schedule", "--order", "--likelihood", "--credit", "--kl", "--parallel", "--tracker", "--device",
                     "--size", "--model", "--prompts", "--micro-conds"), WORDS),
    "--quality": st.sampled_from(["", "=", "a=b", "embedded=nan", "embedded=0", "a,a", "nowhere:nothing"]),
    "--lora-alpha": NOT_NUMBERS | st.just("2"),  # without --lora
    "--lora-targets": WORDS,
    "--no-such-flag": WORDS,
}  # fmt: skip
SWITCHES = {"--merge": "", "--offload": ""}  # contradictory without --lora, --parallel fsdp


@pytest.fixture
def place(tiny_generator_folder, tiny_generator, tmp_path, monkeypatch):
    """A folder with a finished run and prompts; the tiny generator is loaded once."""
    (tmp_path / "p.txt").write_text("a b\nc d\n")
    (tmp_path / "run/checkpoints/000001").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"iteration": 1}\n')
    plain = speedrl.train.load_generator
    same = str(tiny_generator_folder)
    monkeypatch.setattr(speedrl.train, "load_generator", lambda m, **o: tiny_generator if m == same else plain(m, **o))
    return tmp_path


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_500_bad_flags_are_one_line_and_lose_no_file(place, tiny_generator_folder):
    before, tried = files(place), set()

    @hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(st.data())
    def bad(data):
        flag = data.draw(st.sampled_from([*BAD, *SWITCHES]))
        given = {"--model": str(tiny_generator_folder), "--prompts": str(place / "p.txt"), "--steps": "2",
                 "--quality": "tests.test_hostile:dark", "--out": str(place / "new")}  # fmt: skip
        given[flag] = data.draw(BAD[flag]) if flag in BAD else None
        arguments = ["train", "--no-compare", "--no-compile"]
        for name, value in given.items():
            arguments += [name] if value is None else [f"{name}={value}"]
        tried.add((flag, given[flag]))
        result = CliRunner().invoke(cli.app, arguments)
        said = result.stderr
        assert result.exit_code == 2, (arguments, result.output)
        assert isinstance(result.exception, SystemExit) and "Traceback" not in said
        assert said.startswith("Usage:") or (said.startswith("error: ") and said.count("\n") == 1), said
        assert files(place) == before and not (place / "new").exists()

    bad()
    assert len({flag for flag, _ in tried}) == len(BAD) + len(SWITCHES)


@pytest.mark.parametrize(
    "arguments",
    [["--out", "run"], ["--out", "p.txt"], ["--out", "p.txt/run"], ["--out", "run/metrics.jsonl", "--resume"],
     ["--out", "run", "--resume"]],
)  # fmt: skip
def test_a_folder_that_holds_something_else_stays_as_it_is(place, tiny_generator_folder, arguments, monkeypatch):
    monkeypatch.chdir(place)
    before = files(place)
    given = ["--model", str(tiny_generator_folder), "--prompts", "p.txt", "--quality", "embedded", "--steps", "1"]
    monkeypatch.setattr(speedrl.train, "load_qualities", lambda *_, **__: ({"dark": dark}, {"dark": 1.0}))
    result = CliRunner().invoke(cli.app, ["train", "--no-compare", "--no-compile", *given, *arguments])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert files(place) == before


@pytest.mark.parametrize(
    "arguments",
    [["export", "nowhere", "--out", "x"], ["export", ".", "--out", "x"], ["eval", "--guidance", "1,nan"],
     ["ablate", "no", "--seeds", "a"], ["sample", "a", "--micro-conds", "1,2,3,4,inf"]],
)  # fmt: skip
def test_other_commands_refuse_in_one_line_too(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert files(tmp_path) == {}


def test_metrics_are_json_also_where_a_number_is_not(tmp_path):
    assert append_row(tmp_path, {"iteration": 1, "grad_norm": float("nan"), "kl": 0.5}, []) is None
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert strict == {"iteration": 1, "grad_norm": None, "kl": 0.5}
