"""`relibra simulate`, as a user starts it."""

import html
import json
import re

import numpy as np
import pytest
from browser import chromium, screenshot

from relibra_kernels.cli import main
from relibra_kernels.cli.simulation_table import COLUMNS
from relibra_kernels.planner import generate_trace

SMALL = ["--models", "Qwen3-30B-A3B", "--ep", "8,16", "--layers", "2", "--micro-batches", "4"]


def test_prints_a_table_and_json(capsys):
    assert main(["simulate", *SMALL, "--json"]) == 0
    out = capsys.readouterr().out
    assert "Modelled, not measured" in out
    assert out.count("of balanced") == 2
    rows = json.loads(out.splitlines()[-1])
    assert {(row["ep"], row["policy"]) for row in rows} >= {(8, "relibra"), (16, "static"), (16, "eplb-global")}
    ours, balanced = (next(r for r in rows if r["ep"] == 16 and r["policy"] == p) for p in ("relibra", "balanced"))
    assert balanced["modelled_seconds"] / ours["modelled_seconds"] > 0.95


def test_the_report_is_one_page_without_a_network(tmp_path):
    page = tmp_path / "report.html"
    assert main(["simulate", *SMALL, "--html", str(page)]) == 0
    text = page.read_text()
    assert text.index("<h2>Summary") < text.index("<h2>What was simulated") < text.index("<h2>Qwen3-30B-A3B, EP 8")
    assert text.count("<svg") == 4 and len(text) < 400_000
    assert all(f"<th scope=col title='{html.escape(column.meaning)}'>{column.name}" in text for column in COLUMNS)
    assert "seed 0" in text and "prefers-color-scheme:dark" in text
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_yardstick_is_forced_balance_also_where_it_is_not_asked_for(tmp_path, capsys):
    """Not the fastest of those that were: 1 would read as perfectly balanced."""
    arguments = [*SMALL, "--ep", "16", "--policies", "static,eplb-global", "--json", "--html", str(tmp_path / "r.html")]
    assert main(["simulate", *arguments]) == 0
    out = capsys.readouterr().out
    seconds = {row["policy"]: row["modelled_seconds"] for row in json.loads(out.splitlines()[-1])}
    assert list(seconds) == ["static", "eplb-global", "balanced"]
    ratio = f"{seconds['balanced'] / seconds['eplb-global']:.3f}"
    assert ratio != "1.000"
    assert re.search(rf"^eplb-global +\S+ +{ratio} ", out, re.MULTILINE)
    assert f"{seconds['eplb-global']:#.3g} s" in (tmp_path / "r.html").read_text()
    chart = (tmp_path / "r.html").read_text().split("<h3>Throughput over forced balanced routing</h3>")[1]
    assert ratio in chart.split("<h3>")[0]


def test_a_flat_heat_map_says_that_this_is_the_result(tmp_path):
    np.savez(tmp_path / "loads.npz", loads=np.full((2, 3, 128), 640))
    arguments = [str(tmp_path / "loads.npz"), "--ep", "16", "--policies", "static", "--html", str(tmp_path / "r.html")]
    assert main(["simulate", *arguments]) == 0
    assert "static: flat, and that is the result" in (tmp_path / "r.html").read_text()


def test_the_summary_says_where_another_is_level(tmp_path):
    """Balanced loads: nothing is to be gained; EPLB makes copies all the same, LLEP fetches none."""
    np.savez(tmp_path / "loads.npz", loads=np.full((2, 3, 128), 640))
    for rival in ("llep", "eplb-global"):
        arguments = ["--ep", "16", "--policies", f"static,{rival},relibra", "--html", str(tmp_path / "r.html")]
        assert main(["simulate", str(tmp_path / "loads.npz"), *arguments]) == 0
        assert "Another policy is faster" not in (tmp_path / "r.html").read_text()
        level = "level with another to 0.1% in: " in (tmp_path / "r.html").read_text()
        assert level == (rival == "llep")


def test_the_report_renders_in_a_browser(tmp_path):
    """In light, in dark and on a narrow screen: a picture with the page's colours in it."""
    browser = chromium()
    page = tmp_path / "report.html"
    assert main(["simulate", *SMALL, "--html", str(page)]) == 0
    pictures = {}
    for name, width, options in (
        ("light", 1200, []),
        ("dark", 1200, ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]),
        ("narrow", 500, []),
    ):
        pictures[name] = screenshot(browser, page, tmp_path / f"{name}.png", width, *options)
    light, dark, narrow = (pictures[name].reshape(-1, 3).mean() for name in ("light", "dark", "narrow"))
    assert light > 200 and narrow > 190 and dark < 80
    for picture in pictures.values():
        assert len(np.unique(picture.reshape(-1, 3) // 16, axis=0)) > 30  # bars and letters, not an empty page


def test_impossible_sizes_are_skipped_before_any_work(capsys):
    arguments = ["--models", "Mixtral-8x7B", "--layers", "2", "--micro-batches", "2", "--policies", "static,relibra"]
    assert main(["simulate", *arguments, "--ep", "8,16"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("skipped: Mixtral-8x7B, EP 16: 8 experts are fewer than the 16 ranks")
    assert "Mixtral-8x7B, EP 8: 2 layers" in out
    assert main(["simulate", *arguments, "--ep", "16"]) == 2
    assert "nothing is left to simulate" in capsys.readouterr().err
    odd = ["--shape", "64,32,60,4", "--ep", "16", "--layers", "1", "--micro-batches", "2"]
    assert main(["simulate", *odd, "--policies", "eplb-global,relibra"]) == 0
    assert "skipped: 64,32,60,4, EP 16, eplb-global: 92 experts and copies do not divide" in capsys.readouterr().out


def test_a_trace_brings_its_own_model_and_length(tmp_path, capsys):
    generate_trace(24, 16, 32, 4, 10, max_mean=3).save(tmp_path / "trace.npz")
    arguments = ["simulate", str(tmp_path / "trace.npz"), "--sequences-per-rank", "1", "--ep", "8"]
    assert main([*arguments, "--policies", "static,relibra"]) == 0
    out = capsys.readouterr().out
    assert "sequences of 10 tokens" in out and "gpt-oss-20b, EP 8: 24 layers x 2 micro-batches" in out
    assert main([*arguments[:-1], "8,16"]) == 2
    error = capsys.readouterr().err
    assert "--ep is 8,16, but --sequences-per-rank needs one number of ranks: give one (--ep 8), or --micro" in error
    assert main([*arguments, "--models", "Mixtral-8x7B"]) == 2
    assert "the trace chooses 4 of 32 experts, but Mixtral-8x7B chooses 2 of 8" in capsys.readouterr().err


def test_batches_in_a_row_start_from_the_homes_before(tmp_path, capsys):
    loads = np.random.default_rng(1).integers(0, 99, (1, 1, 32)).astype(np.int64) ** 2 * 40
    np.savez(tmp_path / "loads.npz", loads=np.repeat(loads, 4, 1))
    arguments = ["simulate", str(tmp_path / "loads.npz"), "--shape", "64,32,32,4", "--ep", "8", "--batches", "2"]
    assert main([*arguments, "--replica-slots", "0", "--balance", "1", "--policies", "relibra", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, second = (row for row in rows if row["policy"] == "relibra")
    assert first["moved_mean"] > second["moved_mean"] and (first["batch"], second["batch"]) == (0, 1)


POLICY = """
import numpy as np
from relibra_kernels.planner import InputError, Outcome

def spread(loads, cluster):
    load = loads.sum(2)[:, :, None]
    even = load // cluster.num_ranks + (np.arange(cluster.num_ranks) < load % cluster.num_ranks)
    return Outcome.of(even[..., None])

def loses(loads, cluster):
    return spread(loads // 2, cluster)

def breaks_at_once(loads, cluster):
    return loads["nothing"]

def breaks_on_the_batch(loads, cluster):
    find(loads.shape[1])
    return spread(loads, cluster)

def find(micro_batches):
    if micro_batches > 1:
        raise KeyError("no such expert")

def returns_none(loads, cluster):
    pass

def cannot(loads, cluster):
    raise InputError("needs 99 ranks")

def static(loads, cluster):
    return spread(loads, cluster)
"""


def test_a_policy_from_a_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(POLICY)
    arguments = ["simulate", *SMALL, "--policies", "static", "--policy"]
    assert main([*arguments, f"{tmp_path}/mine.py:spread"]) == 0
    assert capsys.readouterr().out.count("\nspread ") == 2
    assert main([*arguments, f"{tmp_path}/mine.py:cannot"]) == 0
    assert "EP 8, cannot: needs 99 ranks" in capsys.readouterr().out
    assert main([*arguments, f"{tmp_path}/mine.py:none"]) == 2
    assert "has no such function, only InputError, Outcome, spread, loses" in capsys.readouterr().err
    assert main([*arguments, f"{tmp_path}/mine.py:static"]) == 2
    assert "there is a policy of that name already" in capsys.readouterr().err
    (tmp_path / "bad.py").write_text("import numpy\n\nnumpy.nothing\n")
    assert main([*arguments, f"{tmp_path}/bad.py:mine"]) == 2
    error = capsys.readouterr().err
    assert "running" in error and "(bad.py, line 3): AttributeError" in error and error.count("\n") == 1


BROKEN = {  # a policy of the user's -> what is said of it
    "loses": "policy 'loses' computes other assignments than the table has",
    "breaks_at_once": "IndexError: only integers",
    "breaks_on_the_batch": "KeyError: 'no such expert' (mine.py, line 22)",
    "returns_none": "policy 'returns_none' returned a NoneType, but must return an Outcome",
}


def test_a_policy_that_fails_does_not_stop_the_others(tmp_path, capsys):
    """It is shown by name with its error, in the terminal, the report and for programs; the exit status says so."""
    (tmp_path / "mine.py").write_text(POLICY)
    flags = [word for name in (*BROKEN, "spread") for word in ("--policy", f"{tmp_path}/mine.py:{name}")]
    arguments = [*SMALL, "--ep", "8", "--policies", "static,relibra", "--html", str(tmp_path / "r.html"), "--json"]
    assert main(["simulate", *arguments, *flags]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].endswith(f"failed: {', '.join(sorted(BROKEN))}; the other policies are shown")
    records = json.loads(captured.out.splitlines()[-1])
    assert {r["policy"] for r in records if "error" not in r} == {"static", "relibra", "spread", "balanced"}
    page = html.unescape((tmp_path / "r.html").read_text())
    for name, why in BROKEN.items():
        assert re.search(rf"^{name} +FAILED: {re.escape(why)}", captured.out, re.MULTILINE), captured.out
        assert f"<b>{name}</b> failed: {why}" in page
        assert any(r["policy"] == name and r["error"].startswith(why) for r in records)


def test_on_recorded_loads(tmp_path, capsys):
    np.savez(tmp_path / "loads.npz", loads=np.random.default_rng(0).integers(0, 999, (2, 3, 128)))
    arguments = ["simulate", str(tmp_path / "loads.npz"), "--models", "Qwen3-30B-A3B", "--ep", "16"]
    assert main([*arguments, "--policies", "static,relibra"]) == 0
    assert "2 layers x 3 micro-batches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nope"], "--models is 'nope'"),
        (["--models", "qwen3-30b-a3"], "(did you mean Qwen3-30B-A3B?)"),
        (["--policies", "RELIBA"], "(did you mean relibra?)"),
        (["--policies", "static,eplb"], "(did you mean eplb-global?)"),
        (["--device", "8xh10"], "(did you mean 8xH100?)"),
        (["--policy", "nope.py"], "must be FILE.py:FUNCTION"),
        (["--batches", "0"], "--batches is 0"),
        (["--device", "nope"], "--device is 'nope'"),
        (["--policies", "nope"], "--policies is 'nope', but must be one of static"),
        (["--ep", "12"], "--ep names '12'"),
        (["--ep", "x"], "--ep names 'x'"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--html", "/nonexistent/report.html"], "--html"),
        (["missing.npz"], "missing.npz"),
        (["--balance", "0.5"], "--balance is 0.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    assert main(["simulate", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
