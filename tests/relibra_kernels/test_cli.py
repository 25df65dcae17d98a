"""The `relibra` program itself: what it says without a command, how soon, and what it makes of a wrong one."""

import subprocess
import sys

import pytest

from relibra_kernels import __version__
from relibra_kernels.cli import COMMANDS, main
from relibra_kernels.planner import InputError, find_device, find_model, model_of_routing


def test_without_a_command_it_shows_what_there_is(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out for name in COMMANDS)


def test_it_says_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"relibra-kernels {__version__}\n"


def test_a_wrong_command_is_one_line_with_the_right_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["Plna"])
    assert "'Plna' is no command (did you mean plan?)" in capsys.readouterr().err


@pytest.mark.parametrize(("argument", "heavy"), [("--help", "numpy torch"), ("plan", "torch"), ("simulate", "torch"),
                                                 ("inspect", "torch"), ("watch", "numpy torch")])  # fmt: skip
def test_help_imports_nothing_that_takes_long(argument, heavy):
    """Counted, not timed: importing torch takes seconds, numpy a tenth of one."""
    code = (
        "import sys\nfrom relibra_kernels.cli import main\n"
        f"try: main({[argument] + ['--help'] * (argument != '--help')})\nexcept SystemExit: pass\n"
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_names_are_found_as_people_write_them():
    assert find_model("openai/gpt-oss-20b").name == find_model("GPT-OSS-20B").name == "gpt-oss-20b"
    assert find_model("Qwen/Qwen3-30B-A3B-Instruct-2507").name == "Qwen3-30B-A3B"
    assert find_device("h100") is find_device("8XH100") is find_device("8xH100")
    with pytest.raises(InputError, match=r"model is 'gpt-os-20b' \(did you mean gpt-oss-20b\?\)"):
        find_model("gpt-os-20b")
    with pytest.raises(InputError, match=r"device is 'H10' \(did you mean 8xH100\?\)"):
        find_device("H10")


def test_the_likeliest_model_of_routing():
    assert model_of_routing(24, 32, 4).name == "gpt-oss-20b"
    assert model_of_routing(36, 128, 4).name == "gpt-oss-120b"
    assert model_of_routing(3, 128, 8).name == "Qwen3-30B-A3B"
    assert model_of_routing(94, 128).name == "Qwen3-235B-A22B"
    other = model_of_routing(5, 12, 3)
    assert (other.name, other.experts, other.top_k) == ("Qwen3-30B-A3B with 3 of 12 experts", 12, 3)
