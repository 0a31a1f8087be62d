"""Input that means no good: prompts and flags. One line and status 2, never a traceback, never a lost file."""

import json
import shutil
import tracemalloc

import pytest
import torch
from typer.testing import CliRunner

import speedrl.evaluation.measuring
import speedrl.models.loading
import speedrl.training
from speedrl import cli
from speedrl.evaluation.figures import contact_sheet
from speedrl.models.generator import encode_prompts
from speedrl.run.checkpoints import append_row
from speedrl.run.prompts import open_prompts, read_prompts
from speedrl.system.files import seal
from speedrl.training import train

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
)
def test_a_file_without_prompts_in_utf_8_is_one_line(tmp_path, content, says):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        open_prompts(tmp_path / "p.txt")


def numbered(path, count):
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"image number {i} of something that has a rather long description\n" for i in range(count))
    return path


def test_a_million_prompts_stay_in_their_file(tmp_path):
    lines = open_prompts(numbered(tmp_path / "million.txt", 1_000_000))
    assert len(lines) == 1_000_000 and lines[torch.tensor(777_777)].startswith("image number 777777 ")
    assert lines[-1].startswith("image number 999999 ") and len(lines[5:8]) == 3
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
    (tmp_path / "p.txt").write_text(f"{long}\nb\n", encoding="utf-8")
    train(out=tmp_path / "run", model=str(tiny_generator_folder), prompts=tmp_path / "p.txt", iterations=1, steps="1",
          search=0, quality="tests.test_hostile:dark", groups=3, group_size=2, compile=False)
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
NO_LISTS = (NOT_NUMBERS | NOT_FINITE).filter(lambda text: text != "1,2")
COUNTS = NOT_NUMBERS | NOT_FINITE | BELOW_ONE | st.just("1.5")
BAD = {  # each value of each option is bad whatever the others are
    **dict.fromkeys(("--iterations", "--groups", "--micro-batch", "--updates", "--save-every",
                     "--lora", "--train-steps"), COUNTS),
    "--group-size": COUNTS | st.just("1"),
    "--seed": NOT_NUMBERS | st.integers(min_value=2**63).map(str),
    "--steps": NO_LISTS | BELOW_ONE | st.sampled_from(["8-2", "1-", "-", "99", "1-17", "9" * 5000]),
    **dict.fromkeys(("--lr", "--clip-range"),
                    NOT_NUMBERS | NOT_FINITE | NEGATIVE | st.just("0")),
    **dict.fromkeys(("--kl-weight", "--steps-reward", "--hindsight",
                     "--temperature", "--quality-clip"),
                    NOT_NUMBERS | NOT_FINITE | NEGATIVE),
    **dict.fromkeys(("--quality-gate", "--guidance"), NOT_NUMBERS | NOT_FINITE),
    "--min-quality": NOT_NUMBERS | st.sampled_from(["nan", "inf"]),
    "--search": NOT_NUMBERS | NOT_FINITE | st.just("1.5") | st.integers(max_value=-1).map(str),
    "--percentile": NOT_NUMBERS | NOT_FINITE | NEGATIVE | st.floats(min_value=100.01).map(repr),
    "--ema": NOT_NUMBERS | NOT_FINITE | NEGATIVE | st.floats(min_value=1).map(repr),
    **dict.fromkeys(("--schedule", "--order", "--likelihood", "--advantage-std", "--kl", "--parallel", "--tracker",
                     "--device", "--size", "--model", "--prompts", "--micro-conds"), WORDS),
    "--quality": st.sampled_from(["", "=", "a=b", "embedded=nan", "embedded=0", "a,a", "nowhere:nothing"]),
    "--remask": NOT_NUMBERS | NOT_FINITE | NEGATIVE | st.floats(min_value=1.01).map(repr),
    "--reference-guidance": NOT_NUMBERS | NOT_FINITE,
    "--reward-weights": WORDS | WORDS.map(lambda text: f"clip={text}"),
    "--text-encoder": WORDS.map(lambda text: f"./{text}"),  # no name of the hub
    "--no-such-flag": WORDS,
}
SWITCHES = {"--offload": ""}  # contradictory without --parallel fsdp
SHARED = {name: BAD[name] for name in ("--schedule", "--order", "--device", "--size", "--micro-conds", "--model",
                                       "--text-encoder", "--no-such-flag")}
SHARED |= {"--precision": WORDS, "--count": COUNTS}
OF_OTHERS = {  # the options of the other commands; "" is what has no flag
    "sample": SHARED | {"--seed": NOT_NUMBERS, "--steps": BAD["--steps"], "--guidance": NOT_NUMBERS | NOT_FINITE,
                        "--temperature": BAD["--temperature"], "--remask": BAD["--remask"],
                        "": st.sampled_from(["", " ", "\ud800"])},
    "eval": SHARED | {"--steps": NO_LISTS | BELOW_ONE | st.sampled_from(["8-2", "2,0", "auto", "9" * 5000]),
                      **dict.fromkeys(("--guidance", "--temperature", "--remask", "--shared-noise"), NO_LISTS),
                      "--prompts": WORDS, "--held-out": WORDS, "--quality": BAD["--quality"].filter(bool),
                      "--reward-weights": BAD["--reward-weights"],
                      "--seeds": COUNTS, "--batch": COUNTS, "--images": NOT_NUMBERS},
    "ablate": {"": WORDS, "--seeds": NO_LISTS, "--eval-steps": NO_LISTS, "--jobs": COUNTS, "--set": WORDS,
               "--model": BAD["--model"], "--no-such-flag": WORDS,
               **dict.fromkeys(("--iterations", "--groups", "--group-size", "--lr", "--eval-count", "--eval-seeds"),
                               NOT_NUMBERS)},
    "export": {"": WORDS, "--no-such-flag": WORDS, "--raw": st.just("yes")},
}


@pytest.fixture
def place(tiny_generator_folder, tiny_generator, tmp_path, monkeypatch):
    """A folder with a finished run and prompts; the tiny generator is loaded once."""
    (tmp_path / "p.txt").write_text("a b\nc d\n", encoding="utf-8")
    (tmp_path / "run/checkpoints/000001").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"iteration": 1}\n', encoding="utf-8")
    plain, same = speedrl.models.loading.load_generator, str(tiny_generator_folder)

    def load(model, **how):
        usual = model == same and how.keys() <= {"device"} and how.get("device", "cpu") == "cpu"
        return tiny_generator if usual else plain(model, **how)

    for module in (speedrl.models.loading, speedrl.training, speedrl.evaluation.measuring):
        monkeypatch.setattr(module, "load_generator", load)
    monkeypatch.setattr(speedrl.evaluation.measuring, "judge_if_there", lambda *_: None)  # seconds, each time
    return tmp_path


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def examples(count):
    """The same `count` examples in every run."""
    return hypothesis.settings(max_examples=count, deadline=None, database=None, derandomize=True,
                               suppress_health_check=list(hypothesis.HealthCheck))


def refused(arguments, *, also=()):
    """Runs the command line, which must say why it cannot in one line with status 2; or end with a status of `also`."""
    result = CliRunner().invoke(cli.app, arguments)
    said = result.stderr
    assert result.exit_code in (2, *also), (arguments, result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit) and "Traceback" not in said
    # the option parser has its own words
    parsers = said.lstrip().startswith(("Usage:", "Error: ", "╭")) or result.exit_code != 2
    assert parsers or (said.startswith("error: ") and said.count("\n") == 1), (arguments, said)
    return result.exit_code


# the three below try more than 500 bad inputs, the same ones in every run


def test_bad_flags_are_one_line_and_lose_no_file(place, tiny_generator_folder):
    before, tried = files(place), set()

    @examples(340)
    @hypothesis.given(st.data())
    def bad(data):
        flag = data.draw(st.sampled_from([*BAD, *SWITCHES]))
        given = {"--model": str(tiny_generator_folder), "--prompts": str(place / "p.txt"), "--steps": "2",
                 "--quality": "tests.test_hostile:dark", "--out": str(place / "new")}
        given[flag] = data.draw(BAD[flag]) if flag in BAD else None
        tried.add(flag)
        refused(["train", "--no-compare", "--no-compile", *flags_of(given)])
        assert files(place) == before and not (place / "new").exists()

    bad()
    assert tried == BAD.keys() | SWITCHES.keys()


def flags_of(given):
    return [name if value is None else f"{name}={value}" for name, value in given.items()]


def test_bad_flags_of_the_other_commands_are_one_line_and_lose_no_file(place, tiny_generator_folder, monkeypatch):
    monkeypatch.chdir(place)
    before, tried = files(place), set()
    model, prompts = {"--model": str(tiny_generator_folder)}, {"--prompts": "p.txt"}
    works = {"sample": model | {"--out": "new.png", "--steps": "2"},
             "eval": model | prompts | {"--out": "new", "--steps": "2", "--quality": "tests.test_hostile:dark"},
             "ablate": model | {"--out": "new"}, "export": {"--out": "new"}}

    @examples(150)
    @hypothesis.given(st.data())
    def bad(data):
        command, flag = data.draw(st.sampled_from([(name, flag) for name, of in OF_OTHERS.items() for flag in of]))
        value = data.draw(OF_OTHERS[command][flag])
        words = {"sample": "an owl", "ablate": "kl", "export": "run"}  # what has no flag
        first = [value if flag == "" else words[command]] if command in words else []
        tried.add((command, flag))
        refused([command, *flags_of(works[command] | ({flag: value} if flag else {})), "--", *first])
        assert files(place) == before and not (place / "new").exists()

    bad()
    assert len(tried) > 0.9 * sum(map(len, OF_OTHERS.values()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("9" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)


def damaged(data, content):
    """Bytes that are cut, changed, or have something else in them."""
    at, to = sorted(data.draw(st.integers(0, len(content))) for _ in range(2))
    return content[:at] + data.draw(st.binary(max_size=20) | st.just(b"[" * 100_000)) + content[to:]


def altered(data, value):
    """JSON with one of its parts taken away or another in its place."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 3)) == 0:
        return data.draw(JSON)
    key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    copy = value.copy()
    if data.draw(st.integers(0, 3)) == 0:
        del copy[key]
    else:
        copy[key] = altered(data, value[key])
    return copy


@pytest.fixture(scope="module")
def finished(tiny_generator_folder, tmp_path_factory):
    """A run of two iterations, and its options."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "p.txt").write_text("a b\nc d\n", encoding="utf-8")
    train(out=folder / "run", model=str(tiny_generator_folder), prompts=folder / "p.txt", iterations=2, steps="2",
          search=0, quality="tests.test_hostile:dark", groups=1, group_size=2, save_every=1, compile=False)
    return folder


def test_damaged_files_are_one_line_or_do_no_harm_and_nothing_is_lost(finished, place, tiny_generator_folder):
    """A checkpoint's files are sealed again after the damage, as by one who means no good."""
    kinds, ended = ("p.txt", "p.jsonl", "metrics.jsonl", "state.json", "manifest.json", "random.st",
                    "tensors.safetensors"), {}
    prompts = {"--model": str(tiny_generator_folder), "--prompts": str(place / "p.txt"), "--steps": "2"}
    given = prompts | {
        "--quality": "tests.test_hostile:dark",
        "--search": "0",
        "--groups": "1",
        "--group-size": "2",
        "--iterations": "3",
    }

    @examples(90)
    @hypothesis.given(st.data())
    def bad(data):
        kind = data.draw(st.sampled_from(kinds))
        run = place / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished / "run", run, ignore=shutil.ignore_patterns("model"))
        folder = run / "checkpoints/000002"
        shutil.rmtree(run / "checkpoints/000001")
        flags, command = given | {"--out": str(run), "--resume": None}, "train"
        if kind in ("p.txt", "p.jsonl"):
            line = data.draw(st.sampled_from([b"\xff\xfe", b"\xed\xa0\x80", b"", b" \x00 "]))
            if kind == "p.jsonl":
                line = data.draw(st.sampled_from([line.strip() or b"x", b'{"prompt": "\\ud800"}', b"[" * 100_000]))
            (run / kind).write_bytes(line + b"\n")
            flags["--prompts"] = str(run / kind)
        else:
            path = run / kind if kind == "metrics.jsonl" else folder / kind
            if kind == "state.json" and data.draw(st.booleans()):
                path.write_text(
                    json.dumps(altered(data, json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8"
                )
            else:
                path.write_bytes(damaged(data, path.read_bytes()))
            if path.parent == folder and kind != "manifest.json":
                (folder / "manifest.json").unlink()
                seal(folder)
            if data.draw(st.booleans()) and kind != "metrics.jsonl":
                command, flags = "export", {"--out": str(place / "new"), "--": None, str(folder): None}
        before = files(run)
        more = ["--no-compare", "--no-compile"] if command == "train" else []
        status = refused([command, *more, *flags_of(flags)], also=(0,))
        ended.setdefault((kind, command), set()).add(status)
        after = files(run)
        shutil.rmtree(place / "new", ignore_errors=True)
        if status == 2:  # the lines past a checkpoint leave metrics.jsonl where a training goes on
            assert {n: c for n, c in after.items() if n != "metrics.jsonl"} == {
                n: c for n, c in before.items() if n != "metrics.jsonl"
            }
        else:
            assert after.keys() >= before.keys()

    bad()
    assert {kind for kind, _ in ended} == set(kinds)
    assert ended["p.txt", "train"] == ended["p.jsonl", "train"] == {2}
    assert ended["metrics.jsonl", "train"] == {0}
    assert all(2 in ended[kind, "train"] for kind in ("state.json", "manifest.json", "tensors.safetensors"))


@pytest.mark.parametrize(
    "arguments",
    [["--out", "run"], ["--out", "p.txt"], ["--out", "p.txt/run"], ["--out", "run/metrics.jsonl", "--resume"],
     ["--out", "run", "--resume"]],
)
def test_a_folder_that_holds_something_else_stays_as_it_is(place, tiny_generator_folder, arguments, monkeypatch):
    monkeypatch.chdir(place)
    before = files(place)
    given = [
        "--model",
        str(tiny_generator_folder),
        "--prompts",
        "p.txt",
        "--quality",
        "tests.test_hostile:dark",
        "--steps",
        "1",
    ]
    result = CliRunner().invoke(cli.app, ["train", "--no-compare", "--no-compile", *given, *arguments])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert files(place) == before


@pytest.mark.parametrize(
    "arguments",
    [["export", "nowhere", "--out", "x"], ["export", ".", "--out", "x"], ["eval", "--guidance", "1,nan"],
     ["ablate", "no", "--seeds", "a"], ["sample", "a", "--micro-conds", "1,2,3,4,inf"]],
)
def test_other_commands_refuse_in_one_line_too(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert files(tmp_path) == {}


def test_metrics_are_json_also_where_a_number_is_not(tmp_path):
    assert append_row(tmp_path, {"iteration": 1, "grad_norm": float("nan"), "kl": 0.5}, []) is None
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert strict == {"iteration": 1, "grad_norm": None, "kl": 0.5}
