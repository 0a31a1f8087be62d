"""Where prompts come from: files, JSONL, and the named sets, read from a cache that the test fills."""

import json
import os
import subprocess
import sys
import threading

import pytest

from speedrl.run.prompts import open_prompts, read_prompts


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of files on disk, by "repository/name", as hf_hub_download would give them."""

    def download(repository, name, repo_type):
        assert repo_type == "dataset"
        return str(tmp_path / repository / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return tmp_path


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("a red apple\n\n  an owl \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a red apple", "an owl"]


def test_a_jsonl_file_has_a_prompt_field(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red apple", "tag": 1}\n{"prompt": " an owl"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == ["a red apple", "an owl"]


@pytest.mark.parametrize("line", ["an owl", '{"text": "an owl"}', '{"prompt": 3}', '{"prompt": " "}', "[]"])
def test_a_jsonl_line_without_a_prompt_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red apple"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="entry 2 has no prompt"):
        read_prompts(tmp_path / "p.jsonl")


def test_the_styles_of_the_hpsv2_benchmark_follow_each_other(hub):
    folder = hub / "zhwang/HPDv2/benchmark"
    folder.mkdir(parents=True)
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / f"{style}.json").write_text(json.dumps([f"{style} 0", f"{style} 1"]), encoding="utf-8")
    assert read_prompts("hpsv2")[::2] == ["anime 0", "concept-art 0", "paintings 0", "photo 0"]
    assert read_prompts("hpsv2-photo") == ["photo 0", "photo 1"]


def test_partiprompts_are_the_first_column_quotation_marks_included(hub):
    (hub / "nateraw/parti-prompts").mkdir(parents=True)
    table = 'Prompt\tCategory\tChallenge\n"hello" on a sign\tSigns\tWriting\nan owl\tAnimals\tBasic\n'
    (hub / "nateraw/parti-prompts/PartiPrompts.tsv").write_text(table, encoding="utf-8")
    assert read_prompts("partiprompts") == ['"hello" on a sign', "an owl"]


def test_geneval_is_fetched_once(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("a photo of a bench\na photo of a cow\n", encoding="utf-8")
    monkeypatch.setattr("speedrl.run.prompts.GENEVAL", (tmp_path / "list.txt").as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert read_prompts("geneval") == ["a photo of a bench", "a photo of a cow"]
    (tmp_path / "list.txt").unlink()
    assert len(read_prompts("geneval")) == 2


def test_a_set_that_cannot_be_fetched_and_an_unknown_one_say_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match="not cached and the hub cannot be reached; give a file"):
        read_prompts("partiprompts")
    with pytest.raises(FileNotFoundError, match="no such file; give a file .* or one of hpsv2, "):
        read_prompts("drawbench")
    monkeypatch.setattr("speedrl.run.prompts.GENEVAL", "http://127.0.0.1:9/none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="geneval is not cached"):
        read_prompts("geneval")


def test_a_file_of_the_name_of_a_set_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "geneval").write_text("mine\n", encoding="utf-8")
    assert read_prompts("geneval") == ["mine"]


WANTED = ["a red owl", "a blue cat, on a mat"]
LIST, OBJECTS = json.dumps(WANTED), json.dumps([{"prompt": prompt, "seed": 1} for prompt in WANTED], indent=2)
LINES = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in WANTED)
CSV = 'seed,prompt\n1,a red owl\n2,"a blue cat, on a mat"\n'
TSV = "Caption\tseed\na red owl\t1\n\na blue cat, on a mat\t2\n"
FILES = {
    "text": ("p.txt", "\n".join(WANTED)),
    "text of capital letters": ("P.TXT", "\n".join(WANTED)),
    "text of no suffix": ("prompts", "\n".join(WANTED)),
    "list": ("p.json", LIST),
    "list, JSON": ("p.JSON", LIST),
    "list in text": ("p.txt", LIST),
    "objects": ("p.json", OBJECTS),
    "objects in text": ("p.txt", OBJECTS),
    "JSONL": ("p.jsonl", LINES),
    "JSONL, JsonL": ("p.JsonL", LINES),
    "JSONL, ndjson": ("p.ndjson", LINES),
    "JSONL in text": ("p.txt", LINES),
    "JSONL in json": ("p.json", LINES),
    "JSONL of strings": ("p.jsonl", "".join(json.dumps(prompt) + "\n" for prompt in WANTED)),
    "CSV": ("p.csv", CSV),
    "CSV, Csv": ("p.Csv", CSV),
    "CSV in text": ("p.txt", CSV),
    "CSV with semicolons": ("p.csv", "text;seed\na red owl;1\na blue cat, on a mat;2\n"),
    "CSV of one column": ("p.csv", 'prompt\na red owl\n"a blue cat, on a mat"\n'),
    "TSV": ("p.tsv", TSV),
    "TSV in text": ("p.txt", TSV),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_format_gives_the_same_prompts_whatever_the_suffix(tmp_path, kind, mark):
    name, text = FILES[kind]
    (tmp_path / name).write_bytes((mark + text).encode())
    assert list(open_prompts(tmp_path / name)) == WANTED


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.json", '{"prompts": {"a": 1}}', "entry 1 has no prompt"),
        ("p.json", '{\n "prompts": ["a red owl"]\n}', "is not a JSON list"),
        ("p.json", "a red owl\n", "cannot be read as JSON"),
        ("p.json", '["a red owl", "a bl', "cannot be read as JSON"),
        ("p.txt", '["a red owl", "a bl', "cannot be read as JSON"),
        ("p.txt", '{"prompt": "a red o', "cannot be read as JSON"),
        ("p.txt", "[" * 100_000, "cannot be read as JSON"),
        ("p.json", '["a red owl", 3]', "entry 2 has no prompt"),
        ("p.json", '[["a red owl"]]', "entry 1 has no prompt"),
        ("p.json", '["a red owl", " "]', "entry 2 has no prompt"),
        ("p.json", "[]", "no prompts in it"),
        ("p.csv", "seed,words\n1,a red owl\n", "no column prompt, caption, text, but is 'seed,words'"),
        ("p.csv", "a red owl\na blue cat\n", "no column prompt"),
        ("p.csv", "seed,prompt\n1,a red owl\n2\n", "entry 2 has no prompt"),
        ("p.csv", "prompt\n", "no prompts in it"),
        ("p.csv", "prompt\n" + "a" * 200_000, "cannot be read as a table"),
        ("p.yaml", "- a red owl\n", r"\.yaml files are not read; give text"),
        ("p.PARQUET", "PAR1", r"\.PARQUET files are not read"),
        ("p.txt", "---\n- a red owl\n", "begins with '---', which is no prompt"),
        ("p.txt", "prompts:\n  - a red owl\n", "begins with 'prompts:', which is no prompt"),
        ("p.txt", "<?xml version='1.0'?>\n", "begins with"),
    ],
)
def test_a_structured_file_that_is_none_of_these_is_refused_in_one_line(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(ValueError, match=says) as caught:
        open_prompts(tmp_path / name)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    "line", ["[red] an apple", "{red} apple", "an owl, text", "prompt", "a sign: 1,2,3", '"hello" on a sign', "- - -"]
)
def test_a_plain_line_stays_a_prompt(tmp_path, line):
    (tmp_path / "p.txt").write_text(f"{line}\nan owl\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [line, "an owl"]


def test_a_list_is_as_good_as_a_file(tmp_path):
    assert open_prompts(["a red\nowl", " a cat "]) == read_prompts(("a red owl", "a cat")) == ["a red owl", "a cat"]
    for bad, says in (([], "no prompts"), (["a", ""], "entry 2"), (["a", 3], "entry 2"), ([None], "entry 1")):
        with pytest.raises(ValueError, match=says):
            open_prompts(bad)


@pytest.mark.parametrize("text", ["\n".join(WANTED), LIST, LINES, CSV])
def test_a_pipe_is_read_once_and_opened_as_often_as_one_likes(tmp_path, text):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(text, encoding="utf-8"), daemon=True)
    writer.start()
    assert list(open_prompts(pipe)) == WANTED and read_prompts(pipe) == WANTED
    writer.join()


def test_standard_input_and_process_substitution_give_prompts():
    script = "import sys; from speedrl.run.prompts import read_prompts; print(*read_prompts(sys.argv[1]), sep='|')"
    shell = f"printf 'an owl\\na cat\\n' | {sys.executable} -c \"{script}\" /dev/stdin"
    shell += f"; {sys.executable} -c \"{script}\" <(printf 'a dog\\n')"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, encoding="utf-8")
    assert done.stdout == "an owl|a cat\na dog\n", done.stderr
