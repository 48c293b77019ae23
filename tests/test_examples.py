"""The scripts in examples/, each as a user runs it: a process of its own, in a folder of its own."""

import re
from pathlib import Path

import pytest
from support.peers import require

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
ULP = 2.0**-24


@pytest.fixture
def run(sandbox):
    """What a script prints."""
    return lambda script, *arguments, code=0: sandbox.python(str(EXAMPLES / script), *arguments, code=code)


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_each_is_short_and_is_listed_and_tested():
    listed = re.findall(r"^- \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == SCRIPTS
    assert len(SCRIPTS) == 5
    for script in SCRIPTS:
        text = (EXAMPLES / script).read_text()
        assert len(text.splitlines()) <= 80
        assert f"python examples/{script}" in text.partition('"""\n')[0]  # how to run it
        assert f'run("{script}"' in Path(__file__).read_text()


@pytest.mark.long
def test_accelerate(run):
    require("timm")
    out = run("accelerate.py", "--batch-size", "2", "--image-size", "96", "--rounds", "3")
    before, after = numbers(r"([\d.]+) ms", out)
    (ratio,) = numbers(r"([\d.]+) times as fast", out)
    assert before > 0
    assert after > 0
    assert ratio == pytest.approx(before / after, abs=0.02 + 0.1 / after * ratio)
    (difference,) = numbers(r"difference of the logits: (\S+)", out)
    assert ULP < difference < 1e-5  # rounding: not nothing, or nothing was replaced
    assert "24 of 24 on " in out.splitlines()[-1]


@pytest.mark.long
def test_finetune_digits(run, sandbox):
    require("sklearn")
    tuned, random = numbers(r"([\d.]+)% of 557 unseen", run("finetune_digits.py"))
    assert tuned >= 85
    assert random < tuned
    assert not list(sandbox.folder.iterdir())  # its checkpoint is gone


@pytest.mark.long
def test_finetune_digits_fails_where_too_little_was_learned(run):
    require("sklearn")
    out = run("finetune_digits.py", "--steps", "2", code=1)
    tuned, _ = numbers(r"([\d.]+)% of 557 unseen", out)
    assert tuned < 85


@pytest.mark.long
def test_export(run, sandbox):
    require("onnxscript")
    require("onnxruntime")
    out = run("export.py", "--image-size", "64", "--out", "made")
    assert re.findall(r"(\S+), (\d) images", out) == [
        (f"made/{file}", size) for file in ("model.onnx", "model.pt2") for size in "25"
    ]
    assert all(0 < found < 1e-5 for found in numbers(r"difference (\S+)", out))
    assert {path.name for path in (sandbox.folder / "made").iterdir()} >= {"model.onnx", "model.pt2"}


@pytest.mark.long
def test_own_metaformer(run):
    out = run("own_metaformer.py")
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith("network.")]
    mixers = [backend for _, operator, backend in rows if operator == "pool_mixer"]
    mlps = [backend for _, operator, backend in rows if operator == "mlp"]
    assert len(mixers) == len(mlps) == 12
    assert "modules" not in mixers[:4]  # the pooling of the first two stages
    assert mixers[4:] == ["modules"] * 8
    assert "modules" not in mlps
    (difference,) = numbers(r"difference of the logits: (\S+)", out)
    assert ULP < difference < 1e-5
    first, last = map(float, re.search(r"loss in 8 steps: (\S+) -> (\S+)", out).groups())
    assert last < first / 2


@pytest.mark.long
def test_serve(run):
    out = run("serve.py", "--threads", "3", "--requests", "24", "--image-size", "96")
    alone, together = numbers(r"threads?: +([\d.]+) images a second", out)
    assert alone > 0
    assert together > 0
    assert "0 of 24 answers differ" in out


@pytest.mark.long
def test_serve_sees_a_wrong_answer(sandbox):
    """A model whose answers depend on what others asked before, put in the place of ours."""
    code = "\n".join(
        (
            "import itertools, runpy, sys, torch, poolformer_kernels as pk",
            "calls = itertools.count()",
            "class Model(torch.nn.Module):",
            "    def forward(self, x): return x.mean((2, 3)) + next(calls)",
            "pk.create_model = lambda name: Model()",
            "sys.argv = ['serve.py', '--threads', '2', '--requests', '6', '--image-size', '32']",
            f"runpy.run_path({str(EXAMPLES / 'serve.py')!r}, run_name='__main__')",
        )
    )
    assert "6 of 6 answers differ" in sandbox.python("-c", code, code=1)
