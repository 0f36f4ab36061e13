"""Scripts are read as a shell would run them, as far as text alone tells."""

from __future__ import annotations

import pytest

from megarl.from_verl.shell import trainer_call

CALL = "python3 -m verl.trainer.main_ppo"


def arguments(script: str, **variables: str) -> list[str]:
    call = trainer_call(script, variables)
    assert call is not None
    return list(call.arguments)


@pytest.mark.parametrize(
    ("before", "word", "found"),
    [
        ("", "a=1", ["a=1"]),
        ("X=3", "a=$X", ["a=3"]),
        ("X=3", 'a="${X}b"', ["a=3b"]),
        ("X=3", "a='$X'", ["a=$X"]),
        ("", "a=${X:-7}", ["a=7"]),
        ("", "a=${X:-${Y:-8}}", ["a=8"]),
        ("X=", "a=${X:-7} b=${X-7}", ["a=7", "b="]),
        ("X=1", "a=${X:+yes}${Y:+no}", ["a=yes"]),
        ("X=Qwen", "a=${X,,}", ["a=qwen"]),
        ("", "a=${X:--1}", ["a=-1"]),
        ("A=2; B=3", "a=$(((A + B) * 4)) b=$((A ** 2))", ["a=20", "b=$((A ** 2))"]),
        ("A=9", "a=$((A / 2)) b=$(($A % 4)) c=$((-A))", ["a=4", "b=1", "c=-9"]),
        ("L=(a=1 'b=x y'\n c=3) # three", '"${L[@]}"', ["a=1", "b=x y", "c=3"]),
        ("L=(a=1)\nL+=(b=2)", '"${L[@]}"', ["a=1", "b=2"]),
        ("L=()", '"${L[@]}" a=1', ["a=1"]),
        ("L=(\n # it's (a comment\n a=1\n)", '"${L[@]}"', ["a=1"]),
        ("E='a=1 b=2'", "$E", ["a=1", "b=2"]),
        ("", 'a=1 $@ "$@" ${@:1}', ["a=1"]),
        ("", "a=$(date +%s)", ["a=$(date +%s)"]),
        ("", "a=$NOWHERE", ["a=$NOWHERE"]),
        ("", "a=$HOME/x", ["a=~/x"]),
        ("F='x.parquet'", "a=\"['$F', '$F']\"", ["a=['x.parquet', 'x.parquet']"]),
        ("", "a=1 2>&1 | tee log", ["a=1"]),
        ("", "a=1 > log", ["a=1", "log"]),
        ("", "a=1 \\\n    b=2 \\\n    c=3\nd=4", ["a=1", "b=2", "c=3"]),
        ("export X=1", "a=$X", ["a=1"]),
        ("if [ 1 = 1 ]; then X=1; else X=2; fi", "a=$X", ["a=1"]),
        ('if [ "$N" = 1 ]; then X=1; elif [ -z "$N" ]; then X=2; else X=3; fi', "a=$X", ["a=2"]),
        ("if [[ 2 -gt 3 ]] || [ x != y ]; then\n X=1\nfi", "a=$X", ["a=1"]),
        ("if [ -d /tmp ]; then X=1; else X=2; fi", "a=$X", ["a=2"]),
        ("if false; then if true; then X=1; fi; X=1; fi; X=${X:-5}", "a=$X", ["a=5"]),
        ('[ "3" -gt 1 ] && X=v || X=null', "a=$X", ["a=v"]),
        ('[ "1" -gt 1 ] && X=v || X=null', "a=$X", ["a=null"]),
        ("case gpu in\n npu) X=1 ;;\n gpu | cpu)\n X=2\n ;;\n *) X=3 ;;\nesac", "a=$X", ["a=2"]),
        ("case x in n*) X=1 ;; *) X=3 ;; esac", "a=$X", ["a=3"]),
        ("for v in 1 2; do X=$v; done", "a=${X:-none}", ["a=none"]),
        ("f() {\n X=1\n}", "a=${X:-none}", ["a=none"]),
        ("{ X=1; Y=2; }", "a=$X$Y", ["a=12"]),
    ],
)
def test_an_argument_is_expanded(before: str, word: str, found: list[str]) -> None:
    assert arguments(f"{before}\n{CALL} {word}\n") == found


def test_a_variable_is_given_from_outside() -> None:
    assert arguments(f"X=${{X:-1}}\n{CALL} a=$X", X="5") == ["a=5"]


def test_the_launcher_may_be_a_list() -> None:
    assert arguments('L=(uv run "x y" python3)\n"${L[@]}" -m verl.trainer.main_ppo a=1') == ["a=1"]


def test_a_call_in_a_branch_that_is_not_read_is_found_where_there_is_no_other() -> None:
    branch = f'D=$(x)\nif [ "$D" = cuda ]; then\n  {CALL} a=1\nfi\n'
    assert arguments(branch) == ["a=1"]
    assert arguments(f"{branch}{CALL} a=2") == ["a=2"]


def test_an_undecided_case_is_named() -> None:
    call = trainer_call(f"D=${{D:-$(x)}}\ncase $D in gpu) X=1 ;; esac\n{CALL} a=$X", {})
    assert call is not None
    assert call.undecided == ["$(x)"]
    assert call.arguments == ["a=$X"]


@pytest.mark.parametrize(
    "script", ["", "echo x", "python3 -m verl.trainer.main_generation a=1", 'X="', "if", "case x in"]
)
def test_a_script_without_a_trainer_has_no_call(script: str) -> None:
    assert trainer_call(script, {}) is None


def test_another_trainer_is_named() -> None:
    call = trainer_call("python3 -m verl.experimental.one_step_off_policy.main_ppo a=1", {})
    assert call is not None and call.module == "verl.experimental.one_step_off_policy.main_ppo"
