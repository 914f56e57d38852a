"""Files of options: any flag of any command, with the command line above them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moescope.cli.parser import Described, Flag, commands
from tests.cli.conftest import Cli


def _commands() -> list[Described]:
    from moescope.cli.app import app

    return list(commands(app))


ALL = _commands()


def _value(flag: Flag) -> Any:
    """Some value of the flag's type that is not its default."""
    if flag.kind is bool:
        return not flag.default
    if flag.choices:
        return next(each for each in flag.choices if each != flag.default)
    if flag.kind in (int, float):
        least = flag.least if flag.least is not None else 1
        number = flag.kind(least) if least != flag.default else flag.kind(least + 1)
        return min(number, flag.kind(flag.most)) if flag.most is not None else number
    return f"some {flag.name}"


def _file(flags: tuple[Flag, ...]) -> dict[str, Any]:
    found = {}
    for flag in flags:
        value = _value(flag)
        found[flag.name] = [value, value] if flag.repeatable or flag.values == 2 else value
    return found


def _words(flags: tuple[Flag, ...]) -> list[str]:
    """The same values as somebody types them."""
    places, typed = [], []
    for flag in flags:
        value = _value(flag)
        if flag.positional:
            places += [value, value] if flag.repeatable else [value]
        elif flag.kind is bool:
            typed.append(flag.spellings[0].split("/")[0] if value else flag.spellings[0].split("/")[1])
        else:
            spelt = [flag.spellings[0], *[str(value)] * flag.values]
            typed += [*spelt, *spelt] if flag.repeatable else spelt
    return [*map(str, places), *typed]


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_every_flag_of_every_command_comes_from_a_file_as_it_is_typed(each: Described, cli: Cli) -> None:
    words = each.name.split()
    typed = cli(*words, *_words(each.flags), "--show-config")
    assert typed.code == 0, typed.err
    assert typed.out.startswith(f"# moescope {each.name}\n")
    given = _file(each.flags)
    assert yaml.safe_load(typed.out) == {flag.name: given[flag.name] for flag in each.flags if not flag.secret}
    Path("run.yaml").write_text(typed.out, encoding="utf-8")
    secret = _words(tuple(flag for flag in each.flags if flag.secret and flag.required))
    assert cli(*words, *secret, "--config", "run.yaml", "--show-config").out == typed.out


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_defaults_printed_are_defaults_read(each: Described, cli: Cli) -> None:
    needed = tuple(flag for flag in each.flags if flag.required)
    shown = cli(*each.name.split(), *_words(needed), "--show-config")
    assert shown.code == 0, shown.err
    Path("run.yaml").write_text(shown.out, encoding="utf-8")
    secret = _words(tuple(flag for flag in needed if flag.secret))
    assert cli(*each.name.split(), *secret, "--config", "run.yaml", "--show-config").out == shown.out


def _shown(cli: Cli, text: str, *words: str) -> Any:
    Path("run.yaml").write_text(text, encoding="utf-8")
    outcome = cli(*words, "--config", "run.yaml", "--show-config")
    assert outcome.code == 0, outcome.err
    return yaml.safe_load(outcome.out)


def test_what_is_typed_wins_over_the_file(cli: Cli) -> None:
    text = "model: other\nbatch_size: 4\nmax-length: 64\nprobe: [tokens, routing]\ndry-run: true\njson: true\n"
    shown = _shown(cli, text, "profile", "demo", "--batch-size", "2", "--probe", "experts", "--no-dry-run")
    assert shown["model"] == "demo"
    assert shown["batch-size"] == 2
    assert shown["max-length"] == 64
    assert shown["probe"] == ["experts"]
    assert shown["dry-run"] is False
    assert shown["json"] is True


def test_positional_arguments_of_the_file_follow_those_typed(cli: Cli) -> None:
    text = "out: all.duckdb\nshards: [a.duckdb, b.duckdb]\n"
    assert _shown(cli, text, "merge")["shards"] == ["a.duckdb", "b.duckdb"]
    shown = _shown(cli, text, "merge", "mine.duckdb")
    assert (shown["out"], shown["shards"]) == ("mine.duckdb", ["a.duckdb", "b.duckdb"])
    shown = _shown(cli, text, "merge", "mine.duckdb", "c.duckdb")
    assert (shown["out"], shown["shards"]) == ("mine.duckdb", ["c.duckdb"])
    shown = _shown(cli, "names: ['-odd']\n", "runs", "delete")
    assert shown["names"] == ["-odd"]


def test_a_switch_that_is_on_by_default_is_turned_off_by_the_file(cli: Cli) -> None:
    assert _shown(cli, "needles: false\n", "phenomena", "demo")["needles"] is False
    assert _shown(cli, "needles: false\n", "phenomena", "demo", "--needles")["needles"] is True


def test_sections_serve_several_commands(cli: Cli) -> None:
    text = "store: all.duckdb\nlabel-field: kind\nprofile:\n  model: demo\n  name: base\n  store: own.duckdb\nruns list: {json: true}\n"
    shown = _shown(cli, text, "profile")
    assert (shown["model"], shown["name"], shown["store"], shown["label-field"]) == (
        "demo",
        "base",
        "own.duckdb",
        "kind",
    )
    shown = _shown(cli, text, "runs", "list")
    assert shown == {"store": "all.duckdb", "json": True}


def test_numbers_stay_text_where_text_is_asked_for(cli: Cli) -> None:
    shown = _shown(
        cli, "model: demo\ntokens: 500000\nsite: [blocks.3.hook_mlp_out]\nname: 2026-01-01\n", "sae", "record"
    )
    assert (shown["tokens"], shown["name"]) == ("500000", "2026-01-01")
    assert _shown(cli, "model: demo\nsample: 1e-1\n", "profile")["sample"] == 0.1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch-siez: 4\n", ["line 1", "batch-siez", "did you mean batch-size"]),
        ("store: a.duckdb\nbatch-size: 4\nbatch_size: 5\n", ["line 3", "twice"]),
        ("seed: 1\nbatch-size: many\n", ["line 2", "batch-size cannot be 'many'", "a whole number, 1 or more"]),
        ("batch-size: 0\n", ["line 1", "1 or more"]),
        ("batch-size: 2.5\n", ["line 1", "a whole number"]),
        ("batch-size: true\n", ["line 1", "true", "a whole number"]),
        ("json: 1\n", ["line 1", "true or false"]),
        ("json: 'yes'\n", ["line 1", "true or false"]),
        ("name: true\n", ["line 1", "text"]),
        ("name: [a, b]\n", ["line 1", "a list"]),
        ("probe: [[a], b]\n", ["line 1", "plain values"]),
        ("profil:\n  name: a\n", ["line 1", "profil", "did you mean profile"]),
        ("profile:\n  naem: a\n", ["line 2", "naem", "name"]),
        ("profile:\n  name: {a: b}\n", ["line 2", "section"]),
        ("- a\n- b\n", ["keys and values"]),
        ("a: [b\n", ["YAML"]),
        ("? [a, b]\n: c\n", ["a key is a word"]),
        ("name: !!python/object/apply:os.system [id]\n", ["line 1"]),
        ("\x00", ["YAML"]),
        ("batch-size: !!int x\n", ["batch-size cannot be 'x'", "a whole number"]),
        ("batch-size: !!int ''\n", ["a whole number"]),
        ("sample: !!float ''\n", ["line 1", "a number"]),
        ("dry-run: !!bool x\n", ["true or false"]),
        (f"sample: {'9' * 400}\n", ["line 1", "a number", "999…"]),
        (f"batch-size: 0x{'f' * 5000}\n", ["line 1", "a whole number"]),
        ("probe: [routing, no]\n", ["line 1", "probe cannot be false", "text"]),
        ("probe: {routing: 16}\n", ["line 1", "probe cannot be a section", "a list such as [routing=16]"]),
        ("profile:\n  name: a\nsae train:\n  spce: topk\n", ["line 4", "'spce'", "did you mean spec"]),
    ],
)
def test_a_file_that_cannot_be_is_refused(text: str, words: list[str], cli: Cli) -> None:
    Path("run.yaml").write_text(text, encoding="utf-8")
    cli("profile", "demo", "--config", "run.yaml").assert_refused("run.yaml", *words)
    assert not Path("runs.duckdb").exists()


@pytest.mark.parametrize(
    "written",
    ["0123", "1.10", "007", "1:30", "3.10", "1_000", "0x10", "2026-02-30", "2026-01-01", "1e3", "0x" + "f" * 5000],
)
def test_text_comes_as_it_is_written(written: str, cli: Cli) -> None:
    shown = _shown(cli, f"name: {written}\nrevision: {written}\nprobe: [{written}]\n", "profile", "demo")
    assert (shown["name"], shown["revision"], shown["probe"]) == (written, written, [written])


@pytest.mark.parametrize("tagged", ['!!int ""', '!!float ""', "!!bool x", "!!timestamp x"])
def test_text_with_a_tag_that_does_not_fit_is_text(tagged: str, cli: Cli) -> None:
    assert _shown(cli, f"name: {tagged}\n", "profile", "demo")["name"] == tagged.split()[1].strip('"')


@pytest.mark.parametrize("section", ["profile:\n  # name: a\n", "profile: {}\n", "sae train:\nprofile: ~\n"])
def test_a_section_that_says_nothing_is_passed_over(section: str, cli: Cli) -> None:
    assert _shown(cli, f"{section}batch-size: 4\n", "profile", "demo")["batch-size"] == 4


def test_the_key_of_a_flag_in_place_of_a_list_is_told_so(cli: Cli) -> None:
    Path("run.yaml").write_text("store: a.duckdb\nparam: {segment: 16}\n", encoding="utf-8")
    cli("analyze", "--config", "run.yaml").assert_refused("line 2", "param", "a list such as [segment=16]")


def test_one_file_of_options_and_no_second(cli: Cli) -> None:
    Path("a.yaml").write_text("batch-size: 4\n", encoding="utf-8")
    cli("profile", "demo", "--config", "a.yaml", "--config", "a.yaml").assert_refused("--config", "one file")
    assert cli("profile", "demo", "--config", "a.yaml", "--show-config").code == 0


def test_the_last_word_about_a_switch_wins(cli: Cli) -> None:
    def resume(*words: str) -> bool:
        return bool(yaml.safe_load(cli("profile", "demo", *words, "--show-config").out)["resume"])

    assert resume("--resume")
    assert not resume("--resume", "--no-resume")
    assert resume("--no-resume", "--resume")
    Path("a.yaml").write_text("resume: true\n", encoding="utf-8")
    assert not resume("--config", "a.yaml", "--no-resume")
    assert not resume("--resume", "--no-resume", "--config", "a.yaml")
    assert resume("--no-resume", "--resume", "--config", "a.yaml")


def test_an_empty_list_comes_back_as_one(cli: Cli) -> None:
    shown = _shown(cli, "group: []\n", "intervene", "effect", "demo")
    assert shown["group"] == []
    assert _shown(cli, yaml.safe_dump(shown), "intervene", "effect")["group"] == []
    assert "edit" not in shown


def test_a_missing_or_binary_file_is_refused(cli: Cli) -> None:
    cli("profile", "demo", "--config", "none.yaml").assert_refused("cannot read none.yaml", "--config")
    Path("run.yaml").write_bytes(b"\xff\xfe\x00")
    cli("profile", "demo", "--config", "run.yaml").assert_refused("UTF-8")
    cli("profile", "demo", "--config", ".").assert_refused("a folder")


def test_secrets_are_not_printed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESCOPE_TOKEN", "hushhush")
    assert "hushhush" not in cli("dashboard", "--show-config").out
    assert "hushhush" not in cli("dashboard", "--token", "hushhush", "--show-config").out
    assert "hushhush" not in cli("sae", "describe", "--command", "llm --key hushhush", "--unit", 1, "--show-config").out


def test_a_command_runs_with_the_options_of_a_file(cli: Cli) -> None:
    Path("run.yaml").write_text("format: json\n", encoding="utf-8")
    outcome = cli("intervene", "edits", "--config", "run.yaml")
    assert {"ablate", "force"} <= {each["kind"] for each in outcome.json}
