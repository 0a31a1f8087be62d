"""Where prompts come from: files, JSONL, and the named sets, read from a cache that the test fills."""

import json

import pytest

from speedrl.run.prompts import read_prompts


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
