"""The command line: what it prints and writes, its exit codes, one clear line for what a user can mend."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from support.commands import printed, refused, run
from support.peers import require, require_backend
from support.pictures import pictures_on

import poolformer_kernels as pk
from poolformer_kernels.cli.main import main
from poolformer_kernels.ops.chain import Chain

QUICK = "demo --device cpu --image-size 64 --batch-size 2 --rounds 3 --no-compile"
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")


def demo_module():
    """The demo, or a skip where its extras are not installed."""
    for package in ("PIL", "rich", "sklearn", "timm"):
        require(package)
    from poolformer_kernels.cli import demo

    return demo


@pytest.fixture
def quick(tmp_path) -> list[str]:
    """The demo at its smallest, with every output in a temporary folder."""
    demo_module()
    return [*QUICK.split(), "--json", str(tmp_path / "demo.json"), "--report", str(tmp_path / "report")]


def result(tmp_path) -> dict:
    return json.loads((tmp_path / "demo.json").read_text())


def passed(rows: list[dict]) -> list[bool | None]:
    """Of eager, which is what the others are compared with, and ours; in both layouts."""
    return [row["passed"] for row in rows]


def test_demo_verifies_times_and_reports(quick, tmp_path, capsys) -> None:
    assert main(quick) == 0
    captured = capsys.readouterr()
    assert "11,915,176 parameters" in captured.out
    assert "verified: error(ours)" in captured.out
    assert "verifying float32 against float64" in captured.err  # the progress of a run without a terminal

    r = result(tmp_path)
    assert r["schema"] == 1
    assert r["passed"] is True
    assert r["model"]["params"] == 11_915_176
    assert [image["name"] for image in r["images"]] == ["china.jpg", "flower.jpg"]
    # what rounding costs: neither more nor nothing
    bounds = {"float32": (1e-8, 3e-6), "bfloat16": (1e-4, 2e-2)}
    for row in r["verification"]:
        low, high = bounds[row["dtype"]]
        assert low < row["error_l2"] < high
        assert row["passed"] is (None if row["implementation"] == "eager" else True)
        if row["dtype"] == "float32":
            assert row["top5_agreement"] == 1.0
    stages = [[2, 64, 16, 16], [2, 128, 8, 8], [2, 320, 4, 4], [2, 512, 2, 2]]
    assert [row["shape"] for row in r["timing"][:9]] == [*stages, *stages, [2, 3, 64, 64]]
    assert [row["what"] for row in r["timing"]] == 2 * [*["mixer"] * 4, *["mlp"] * 4, "model"]
    for row in r["timing"]:
        for provider in ("eager", "ours"):
            t = row["providers"][provider]
            assert 0 < t["p20"] <= t["median"] <= t["p80"]
        assert row["providers"]["compile"] == {"unavailable": "left out (--no-compile)"}


def test_demo_of_a_poolformerv2(quick, tmp_path) -> None:
    assert main([*quick, "--model", "v2_s12", "--dtype", "float32"]) == 0
    r = result(tmp_path)
    assert r["model"]["name"] == "poolformerv2_s12"
    assert r["model"]["params"] == pk.models.model_config("poolformerv2_s12").params
    assert passed(r["verification"]) == [None, True, None, True]
    assert all(row["providers"]["ours"]["median"] > 0 for row in r["timing"])


def test_report_is_self_contained(quick, tmp_path) -> None:
    assert main(quick) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert [picture.partition(",")[0] for picture in pictures_on(page)] == ["jpeg;base64"] * 2
    assert page.count("<svg") == 2
    assert "Verified against float64" in page
    best = result(tmp_path)["images"][0]["top5"][0]
    assert best["label"] == f"class {best['class']}"
    assert f"<span>{best['label']}</span><span>{best['probability']:.1%}</span>" in page
    assert "The classes mean nothing then" in page


@pytest.mark.parametrize(("operator", "layer"), [("pool_mixer", "mixer"), ("mlp", "mlp")])
def test_demo_fails_on_a_wrong_operator(operator, layer, quick, tmp_path, capsys, monkeypatch) -> None:
    """Wrong in the operator, and in the chain of layers that inference makes where kernels are built."""
    right, chained = getattr(pk.nn.fusion, f"{operator}_with_stats"), getattr(Chain, layer)

    def wrong(x, weight, *args, **options):
        return right(x, weight * 1.001, *args, **options)

    def wrongly_chained(self, weight, *args):
        return chained(self, weight * 1.001, *args)

    monkeypatch.setattr(pk.nn.fusion, f"{operator}_with_stats", wrong)
    monkeypatch.setattr(Chain, layer, wrongly_chained)
    assert main([*quick, "--dtype", "float32"]) == 1
    assert "VERIFICATION FAILED" in capsys.readouterr().out
    r = result(tmp_path)
    assert r["passed"] is False
    assert passed(r["verification"]) == [None, False, None, False]
    assert "Verification FAILED" in (tmp_path / "report" / "index.html").read_text()


V1 = ("network.0.1.layer_scale_1", "network.4.5.norm1.weight", "network.2.0.norm2.bias", "head.bias")
V2 = ("network.4.1.res_scale_1", "network.2.0.mlp.act.scale")


@pytest.mark.parametrize(
    ("model", "name"), [("poolformer_s12", n) for n in V1] + [("poolformerv2_s12", n) for n in V2]
)
def test_one_wrong_weight_is_seen(model: str, name: str) -> None:
    demo = demo_module()
    peer, ours = demo.make_models(model, None)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rows, _ = demo.verify_logits(peer, copy.deepcopy(ours), x, torch.float32)
    assert passed(rows) == [None, True, None, True]
    with torch.no_grad():
        ours.get_parameter(name)[-1] += 0.01
    rows, _ = demo.verify_logits(peer, ours, x, torch.float32)
    assert passed(rows) == [None, False, None, False]


def test_preprocessing_is_timms() -> None:
    demo = demo_module()
    from sklearn.datasets import load_sample_images
    from timm.data import create_transform

    for name in ("poolformer_s12", "poolformer_m36"):
        config = pk.models.model_config(name)
        options = {name: getattr(config, name) for name in ("mean", "std", "crop_pct", "interpolation")}
        transform = create_transform(config.input_size, **options)
        for file in load_sample_images().filenames:
            photo = demo.load_photo(file)
            for image in (photo, photo.rotate(90, expand=True), photo.resize((301, 300))):
                ours = demo.preprocess(image, config, 224)
                torch.testing.assert_close(ours, transform(image), rtol=0, atol=1e-6)


def test_checkpoint_gives_labels_and_photo_is_turned_upright(quick, tmp_path) -> None:
    demo = demo_module()
    from PIL import Image

    torch.manual_seed(0)
    model = pk.create_model("poolformer_s12")
    demo._randomise(model)
    with torch.no_grad():
        model.head.bias[207] += 100
    torch.save(model.state_dict(), tmp_path / "s12.pth")
    photo = Image.new("RGB", (90, 70), "red")
    photo.paste("blue", (0, 0, 90, 35))
    exif = photo.getexif()
    exif[0x0112] = 3  # turned by 180 degrees
    photo.save(tmp_path / "turned.png", exif=exif)
    upright = demo.load_photo(tmp_path / "turned.png")
    assert upright.getpixel((45, 10)) == (255, 0, 0)

    files = ["--checkpoint", tmp_path / "s12.pth", "--image", tmp_path / "turned.png"]
    assert run(*quick, "--dtype", "float32", *files) == 0
    r = result(tmp_path)
    assert r["model"]["weights"] == str(tmp_path / "s12.pth")
    best = r["images"][0]["top5"][0]
    assert (best["class"], best["label"]) == (207, "golden retriever")
    assert best["probability"] > 0.99
    assert "The classes mean nothing then" not in (tmp_path / "report" / "index.html").read_text()


def test_demo_goes_on_where_torch_compile_cannot(quick, tmp_path, capsys, monkeypatch) -> None:
    def no_compiler(module, **_):
        raise RuntimeError("no C++ compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", no_compiler)
    quick.remove("--no-compile")
    assert main([*quick, "--dtype", "float32"]) == 0
    assert "timm compiled: RuntimeError: no C++ compiler\n" in capsys.readouterr().out
    for row in result(tmp_path)["timing"]:
        assert row["providers"]["compile"] == {"unavailable": "RuntimeError: no C++ compiler"}
        assert row["providers"]["ours"]["median"] > 0


@pytest.mark.parametrize("what", ["missing", "text", "other keys", "other model"])
def test_wrong_checkpoint(quick, what, tmp_path, capsys) -> None:
    file = tmp_path / "weights.pth"
    if what == "text":
        file.write_text("not a checkpoint")
    elif what == "other keys":
        torch.save({"weight": torch.zeros(3)}, file)
    elif what == "other model":
        torch.save(pk.create_model("poolformer_s24").state_dict(), file)
    option = "--checkpoint" if what == "missing" else "checkpoint"
    assert refused(capsys, *quick, "--checkpoint", file, progress=True).startswith(f"{option} {file}")


@pytest.mark.parametrize("what", ["missing", "text", "empty", "folder", "truncated"])
def test_unreadable_image(quick, what, tmp_path, capsys) -> None:
    file = tmp_path / "photo.jpg"
    if what == "folder":
        file.mkdir()
    elif what == "truncated":
        from sklearn.datasets import load_sample_images

        with open(load_sample_images().filenames[0], "rb") as photo:
            file.write_bytes(photo.read()[:20_000])
    elif what != "missing":
        file.write_text("not a photo" if what == "text" else "")
    error = refused(capsys, *quick, "--image", file, progress=True)
    assert error.startswith(f"--image {file}: cannot be read as an image: ")


NO_CUDA = "--device cuda: torch sees no CUDA device; allowed here: cpu"
WITHOUT_A_GPU = [  # the words, and what is said where there is none
    ("demo --device cuda", NO_CUDA),
    ("demo --backend triton --image-size 64", "backend 'triton' was asked for and cannot run this call: "),
    ("profile --device cuda", NO_CUDA),
]
COMMANDS = "demo | info | verify | bench | profile | export | train | validate | predict | cam"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demo --checkpoint none.pth", "--checkpoint none.pth does not exist or is not a file"),
        ("demo --dtype int8", "argument --dtype: 'int8' is not a dtype; allowed: float32, bfloat16, float16"),
        ("demo --rounds 0", "argument --rounds: must be a positive integer, got '0'"),
        ("demo --batch-size x", "argument --batch-size: must be a positive integer, got 'x'"),
        ("demo --device tpu", "argument --device: invalid choice: 'tpu'"),
        ("demo --image-size 31", "argument --image-size: must be at least 32, the model's stride, got 31"),
        ("demo --backend reference --report /dev/null/x", "cannot write to /dev/null/x: "),
        ("profile --image-size 31", "argument --image-size: must be at least 32"),
        ("profile --batch-size 0", "argument --batch-size: must be a positive integer, got '0'"),
        ("profile --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("profile --json /dev/null/x", "cannot write to /dev/null/x"),
        *(pytest.param(*case, marks=without_a_gpu) for case in WITHOUT_A_GPU),
        ("", "the following arguments are required: demo | info | verify | bench | profile | export"),
        ("serve", f"argument {COMMANDS}: invalid choice"),
        ("info --yaml", "unrecognized arguments: --yaml"),
    ],
)
def test_requests_that_cannot_be_met(words, message, tmp_path, capsys, monkeypatch) -> None:
    demo_module()
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, words).startswith(message)


def test_info_says_what_runs(capsys) -> None:
    text, sections = printed(capsys, "info"), json.loads(printed(capsys, "info --json"))
    assert sections["versions"]["torch"] == torch.__version__
    assert sections["versions"]["poolformer-kernels"] == pk.__version__
    assert list(sections["backends"]) == ["reference", "cpp", "triton", "cuda"]
    assert sections["backends"] == dict.fromkeys(pk.available_backends(), "available") | pk.backend_reasons()
    assert sections["installation"]["package"] == str(Path(pk.__file__).parent)
    assert set(sections["selection"]) >= {"cpu, float32", "cpu, bfloat16", "cpu, float16", "cpu, float64"}
    assert sections["selection"]["cpu, float64"].startswith("reference — ")
    for rows in sections.values():
        for key, value in rows.items():
            assert re.search(rf"^  {re.escape(key)} +{re.escape(value)}$", text, re.MULTILINE)


def test_info_prints_all_of_the_build(capsys) -> None:
    require_backend("cpp")
    found = json.loads(printed(capsys, "info --json"))
    assert set(found["extension"]) == set(pk.backends.cpp.build_info())


def test_info_lists_the_kernels(capsys, monkeypatch) -> None:
    from poolformer_kernels.cli import info, kernels

    found = [kernels.Kernel("a<f16>", "sm_90a", 40, 0, 8, 32, 1024, 128, 12)]
    monkeypatch.setattr(info, "kernels", lambda: found)
    words = ["a<f16>", "sm_90a", "40", "0/8", "32", "1024", "128", "12", "48/64"]
    assert printed(capsys, "info --kernels").splitlines()[-1].split() == words
    (row,) = json.loads(printed(capsys, "info --kernels --json"))
    assert (row["registers"], row["spill_loads"], row["blocks"], row["warps"]) == (40, 8, 12, 48)

    def no_image():
        raise RuntimeError("cudaFuncGetAttributes: no kernel image")

    monkeypatch.setattr(info, "kernels", no_image)
    assert refused(capsys, "info --kernels") == "--kernels: cudaFuncGetAttributes: no kernel image"

    monkeypatch.setattr(info, "kernels", list)
    monkeypatch.setattr(info.cuda, "UNAVAILABLE", "built without CUDA")
    assert printed(capsys, "info --kernels") == "no CUDA kernels: built without CUDA\n"
    assert json.loads(printed(capsys, "info --kernels --json")) == []


@pytest.mark.parametrize("command", ["predict", "cam", "demo"])
def test_a_file_name_that_is_no_text_is_one_line(command, capsys) -> None:
    error = refused(capsys, command, b"\xff.png".decode(errors="surrogateescape"), "--checkpoint", "a.pth")
    assert error == "argument '\\udcff.png' is no UTF-8; allowed: files of other names"


@pytest.mark.parametrize("command", ["", "demo", "info", "verify", "export"])
def test_help_exits_cleanly(command, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0
    assert "usage: poolformer-kernels" in capsys.readouterr().out
