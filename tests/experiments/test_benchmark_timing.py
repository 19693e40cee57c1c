"""Forms in turns, time that runs out, programs that fail."""

import functools
import time

import numpy as np
import pytest

from experiments.benchmarks import timing


def test_forms_take_turns_after_one_warm_up():
    calls = []
    forms = {name: timing.Form(functools.partial(calls.append, name), lambda _: None) for name in "ab"}
    readings = timing.time_in_turns(forms, repeats=2)
    assert "".join(calls) == "ababab"
    assert all(of_form.launches == 1 and len(of_form.seconds) == 2 for of_form in readings.values())


def test_a_step_takes_batch_after_batch_round_and_round():
    taken = []
    timing.time_in_turns({"step": timing.step_form(taken.append, "xyz")}, repeats=4)
    assert "".join(taken) == "xyzxy"


def test_ratios_are_of_medians():
    readings = {"a": timing.Readings(1, [1.0, 9.0, 2.0]), "b": timing.Readings(3, [4.0])}
    assert timing.over(readings, "a", "b") == 0.5 and timing.over(readings, "a", "c") is None
    assert readings["b"].record() == {"median_seconds": 4.0, "seconds": [4.0], "launches_a_reading": 3}


def test_stuck_forms_are_stopped_and_quick_ones_are_repeated():
    def form(seconds):
        return timing.Form(lambda: time.sleep(seconds), lambda _: None)

    failed = {}
    readings = timing.time_in_turns(
        {"quick": form(1e-4), "stuck": form(30)}, repeats=3, least_seconds=5e-3, limit=2, failed=failed
    )
    assert "TimeoutError" in failed["stuck"] and set(readings) == {"quick"}
    assert len(readings["quick"].seconds) == 3 and readings["quick"].launches > 1


def test_a_slow_form_gets_one_reading():
    calls = []
    form = timing.Form(lambda: calls.append(time.sleep(2e-3)), lambda _: None)
    readings = timing.time_in_turns({"slow": form}, repeats=5, least_seconds=1.0, slow_seconds=1e-3)
    assert len(readings["slow"].seconds) == 1 and len(calls) == 2


def test_a_form_that_fails_stops_the_comparison_unless_failures_are_noted():
    def broken():
        raise FloatingPointError("the loss is nan")

    forms = {"bad": timing.Form(broken), "good": timing.Form(lambda: None)}
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        timing.time_in_turns(forms, repeats=1)
    failed = {}
    assert set(timing.time_in_turns(forms, repeats=1, failed=failed)) == {"good"}
    assert failed == {"bad": "FloatingPointError: the loss is nan"}


def test_a_job_that_fails_or_is_not_asked_for_costs_no_other():
    def broken():
        raise RuntimeError("no memory")

    done, saved = [], []
    settings = timing.Settings("pallas_triton", True, 1, only=("scan",))
    part = timing.Part(settings, np.random.default_rng(0), timing.Budget(1e5), {}, saved.append)
    part.do_all([("scan 1", broken), ("ssd", broken), ("scan 2", lambda: done.append(2))])
    assert part.record == {"skipped": {"scan 1": "RuntimeError: no memory"}, "done": ["scan 2"], "begun": {}}
    assert done == [2] and saved == ["begin scan 1", "scan 1", "begin scan 2", "scan 2"]


def test_one_program_that_does_not_build_costs_no_other():
    def broken():
        raise RuntimeError("too many registers\nand more")

    built, failed = timing.build_all({"good": lambda: 1, "bad": broken})
    assert built == {"good": 1} and failed == {"bad": "RuntimeError: too many registers"}
