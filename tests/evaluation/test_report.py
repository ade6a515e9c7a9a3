import json
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmtjepa.cli.evaluate import main
from dmtjepa.cli.weights import main as export
from dmtjepa.config import change_settings
from dmtjepa.data import DataError
from dmtjepa.errors import UserError
from dmtjepa.evaluation.context import EvaluationContext, load_encoders, load_start, load_teacher
from dmtjepa.evaluation.errors import NotMeasuredError
from dmtjepa.evaluation.formatting import Report, format_table, format_verdict
from dmtjepa.evaluation.report import measure_features
from dmtjepa.evaluation.splits import find_splits
from dmtjepa.evaluation.subject import find_subject
from dmtjepa.objective import build_model
from dmtjepa.run_folder import open_run
from tests.helpers.run_folders import write_images, write_masks, write_run
from tests.helpers.signal_stack import has_signal_stack

LATEST = "tiny-latest.pth.tar"


def replace(path, text):
    path.unlink()
    path.write_text(text)


@pytest.fixture(scope="module")
def finished(run_template, tmp_path_factory):
    """A run folder after `dmtjepa evaluate RUN`, and what that printed."""
    run = Path(shutil.copytree(run_template, tmp_path_factory.mktemp("finished") / "tiny"))
    rows = [{"step": step, "train/momentum": 0.5, "targets/explained_variance": 0.4} for step in range(20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        patch.setattr("dmtjepa.evaluation.attentive.MIN_STEPS", 50)
        assert main([str(run), "--device", "cpu"]) == 0
    return run, "\n".join(printed)


@pytest.mark.slow
def test_everything_is_measured(finished):
    run, _ = finished
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["data"]["train_images"] == 30
    assert report["data"]["validation_images"] == 12
    assert report["data"]["classes"] == 3
    assert report["data"]["most_frequent_class"] == pytest.approx(1 / 3)
    encoders = {"trained", "student", "untrained"}
    assert set(report["knn"]) == set(report["knn_plain"]) == encoders | {"pixels"}
    assert list(report["knn"]["trained"]) == ["5", "10", "20"]
    assert set(report["knn_layout"]) == set(report["attentive"]) == encoders
    assert report["knn_layout"]["untrained"]["5"] > 0.6
    # Colours tell the classes apart, even for a network that was not trained.
    assert report["knn"]["untrained"]["5"] > 0.6
    assert set(report["linear"]) == encoders | {"pixels"}
    assert report["attentive"]["untrained"] > 0.6
    assert set(report["collapse"]) == encoders
    protocols = ["I-JEPA linear probe, last layer", "DINO k-NN, k = 10", "I-JEPA linear probe, last 4 layers"]
    assert set(protocols) <= set(report["protocols"])
    assert report["protocols"][protocols[0]]["trained"] == report["linear"]["trained"]
    assert set(report["protocols"][protocols[2]]) == encoders
    assert report["low_shot"]["5 per class"]["pixels"]["num_images"] == 15
    assert report["collapse"]["trained"]["num_dimensions"] == 128
    # The checkpoint was drawn with another seed than the run's: both networks were really measured.
    assert report["collapse"]["trained"]["effective_rank"] != report["collapse"]["untrained"]["effective_rank"]
    assert set(report["segmentation"]) == encoders | {"pixels"}
    assert report["segmentation"]["trained"]["object_iou"] > 0.5
    assert report["loss"]["steps"] == 120
    assert report["loss"]["last"] < report["loss"]["first"]
    assert report["run"]["epoch"] == 2
    assert report["skipped"] == []


@pytest.mark.slow
def test_the_verdict_on_the_training_is_told(finished):
    run, printed = finished
    figures, finding = json.loads((run / "report" / "report.json").read_text())["verdict"]
    assert "follows the student within 2.0 steps" in finding
    assert "40%" in figures  # of the variance is explained
    for text in (printed, (run / "report" / "report.md").read_text()):
        assert f"training: {finding}" in text
        assert f"training: {figures}" in text


@pytest.mark.slow
def test_files_are_written_and_named(finished):
    run, printed = finished
    names = {
        "report.html",
        "report.md",
        "report.json",
        "report.png",
        "loss.png",
        "accuracy.png",
        "masks.png",
        "neighbors.png",
        "pca.png",
        "nearest.png",
        "segmentation.png",
    }
    assert {path.name for path in (run / "report").iterdir()} == names
    for name in names:
        assert name in printed
    text = (run / "report" / "report.md").read_text()
    for part in (
        "k-NN, k = 10",
        "linear probe",
        "DINO k-NN, k = 20",
        "Low-shot",
        "Segmentation",
        "effective rank",
        "(report.png)",
        "vit_nano",
    ):
        assert part in text


@pytest.mark.slow
def test_prints_a_table_a_verdict_and_what_to_run_next(finished):
    run, printed = finished
    for part in ("features", "trained", "untrained", "pixels", "k-NN k=20", "linear", "mIoU"):
        assert part in printed
    assert "points against untrained" in printed
    assert f"dmtjepa export {run}" in printed


@pytest.mark.slow
def test_plain_ijepa_has_no_neighbours_and_unlabelled_data_no_knn(tmp_path, capsys):
    write_images(tmp_path / "data", 4, seed=0)
    for image in list((tmp_path / "data").glob("*/*.png")):
        image.rename(tmp_path / "data" / f"{image.parent.name}-{image.name}")
    run = write_run(tmp_path / "run", tmp_path / "data", patch={"local_agg_head": False})
    (run / "tiny_r0.csv").unlink()
    assert main([str(run), "--device", "cpu", "--out", str(tmp_path / "elsewhere")]) == 0
    printed = capsys.readouterr().out
    assert "skipped k-NN and linear probe" in printed
    assert "one folder per class" in printed
    assert "skipped loss curve" in printed
    assert {path.name for path in (tmp_path / "elsewhere").glob("*.png")} == {
        "report.png",
        "masks.png",
        "pca.png",
        "nearest.png",
    }
    assert not (run / "report").exists()
    assert "k-NN" not in (tmp_path / "elsewhere" / "report.md").read_text().split("Accuracy")[-1].split("Collapse")[-1]


def test_the_untrained_network_is_the_one_the_run_started_from(run):
    """Drawn with the run's seed; the caller's random numbers are left as they were."""
    folder, config = open_run(run)
    checkpoint = folder.latest_export
    state = torch.random.get_rng_state()
    trained, untrained = load_teacher(config, checkpoint)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(config.runtime.seed)
    start = build_model(config).encoder.state_dict()
    weights = torch.load(checkpoint, weights_only=True)["target_encoder"]
    for name, value in trained.state_dict().items():
        assert torch.equal(value, weights[name])
        assert torch.equal(untrained.state_dict()[name], start[name])
    assert not torch.equal(untrained.blocks[0].mlp.fc1.weight, trained.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda run: shutil.rmtree(run), [], "does not exist"),
        (lambda run: (run / "config.yaml").unlink(), [], "holds no config.yaml"),
        (lambda run: replace(run / "config.yaml", "metta: {}\n"), [], "did you mean meta"),
        (lambda run: (run / LATEST).unlink(), [], "its folder holds no .pth.tar file"),
        (lambda run: (run / LATEST).rename(run / "tiny-ep1.pth.tar"), [], "its folder holds tiny-ep1.pth.tar"),
        (lambda run: replace(run / LATEST, "not a checkpoint"), [], "cannot be read as a checkpoint"),
        (lambda run: None, ["--data", "no/such/folder"], "does not exist"),
        (lambda run: None, ["--train", "no/such/folder"], "both --train and --val"),
        (lambda run: None, ["--max-images", "0"], "--max-images must be at least 1"),
        (lambda run: None, ["--num-workers", "-1"], "--num-workers must be at least 0"),
        (lambda run: None, ["--out", __file__], "test_report.py (--out) cannot be written to"),
    ],
)  # fmt: skip
def test_wrong_input_is_explained(run, capsys, spoil, arguments, message):
    spoil(run)
    assert main([str(run), "--device", "cpu", *arguments]) == 1
    printed = capsys.readouterr()
    assert re.match(r"\w+: ", printed.err)
    assert message in printed.err
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("ruin", {}, "ruin does not exist. Did you mean run?"),
        ("tiny-latest", {}, "tiny-latest does not exist. Give a run folder, a file of weights, "),
        (
            "runs/mine",
            {},
            "no file or folder runs/mine; to measure weights of this name on Hugging Face, give",
        ),
        ("run/config.yaml", {}, "it is no file of PyTorch"),
        ("colors", {}, "colors holds no config.yaml"),
        (
            f"run/{LATEST}",
            {"checkpoint": Path("run")},
            "checkpoint names weights of a run, and run/tiny",
        ),
    ],
)
def test_what_cannot_be_measured_is_explained(run, data, monkeypatch, source, options, message):
    monkeypatch.chdir(run.parent)
    Path("colors").symlink_to(data)
    with pytest.raises(UserError) as error:
        find_subject(Path(source), has_images=False, **options)
    assert message in str(error.value)


def test_a_checkpoint_below_the_run_folder_is_found(run, monkeypatch):
    """And weights in the current folder have its name."""
    monkeypatch.chdir(run.parent)
    assert find_subject(Path("run"), has_images=False, checkpoint=Path(LATEST)).checkpoint == Path("run", LATEST)
    assert export(["export", "run", "--format", "hf", "--out", "hf"]) == 0
    monkeypatch.chdir("hf")
    subject = find_subject(Path("."), has_images=True)
    assert (subject.name, subject.out) == ("hf", run.parent / "hf-report")


def test_other_weights_have_a_report_of_their_own(run, tmp_path):
    """Whoever reads RUN/report finds the run's weights in it."""
    shutil.copy(run / LATEST, run / "tiny-best.pth.tar")
    for own in (LATEST, "tiny-best.pth.tar"):
        subject = find_subject(run, has_images=False, checkpoint=run / own)
        assert (subject.name, subject.out) == ("run", run / "report")
        assert subject.run is not None
    shutil.copy(run / LATEST, tmp_path / "tiny-best.pth.tar")
    shutil.copy(run / LATEST, run / "official.pth.tar")
    for other in (tmp_path / "tiny-best.pth.tar", run / "official.pth.tar"):
        subject = find_subject(run, has_images=False, checkpoint=other)
        name = other.name.removesuffix(".pth.tar")
        assert (subject.name, subject.run, subject.out) == (name, None, other.with_name(f"{name}-report"))
        assert subject.config == open_run(run)[1]


@pytest.mark.parametrize("images", ["run", f"run/{LATEST}"])
def test_weights_in_place_of_images_are_named(run, data, monkeypatch, images):
    monkeypatch.chdir(run.parent)
    with pytest.raises(DataError, match=rf"^run/{LATEST} holds weights, not images; name images in place of {images}$"):
        find_splits(open_run(run)[1].data, data=Path(images))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_an_error(run, capsys):
    assert main([str(run), "--device", "cuda:0"]) == 1
    assert "no usable CUDA device" in capsys.readouterr().err


def make_report(**values):
    return Report(run={}, data={"validation_images": 400}, **values)


def test_every_kind_of_features_is_compared_at_its_own_best_k():
    knn = {"trained": {5: 0.6, 10: 0.5}, "untrained": {5: 0.1, 10: 0.4}, "pixels": {5: 0.2, 10: 0.1}}
    verdict = format_verdict(make_report(knn=knn))[0]
    assert "60.0% +- 2.4" in verdict
    assert "+20.0 points against untrained" in verdict
    assert "+40.0 points against pixels" in verdict


def test_features_with_layout_are_compared_too():
    knn = {"trained": {5: 0.4}, "untrained": {5: 0.3}, "pixels": {5: 0.45}}
    layout = {"trained": {5: 0.5}, "untrained": {5: 0.35}}
    assert format_verdict(make_report(knn=knn, knn_layout=layout))[1] == (
        "with layout: 50.0%; +15.0 points against untrained, +5.0 against pixels"
    )


@pytest.mark.slow
def test_layout_too_large_to_hold_is_skipped(run, monkeypatch, capsys, without_figures):
    monkeypatch.setattr("dmtjepa.evaluation.measurements.LAYOUT_BYTES", 1000)
    assert main([str(run), "--device", "cpu", "--quick"]) == 0
    assert "k-NN with layout: its features would take" in capsys.readouterr().out
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["knn_layout"] == report["attentive"] == report["low_shot"] == {}
    assert "I-JEPA linear probe, last layer" in report["protocols"]
    assert "low-shot and attentive probes, and the last four layers (--quick)" in report["skipped"]


def test_collapse_is_called_so():
    numbers = {"effective_rank": 1.2, "num_dimensions": 192, "mean_cosine": 0.999}
    assert "COLLAPSED" in format_verdict(make_report(collapse={"trained": numbers}, collapsed=True))[0]
    assert "no sign of collapse" in format_verdict(make_report(collapse={"trained": numbers}, collapsed=False))[0]


def test_table_marks_what_was_not_measured():
    knn = {name: {5: 0.5} for name in ("trained", "untrained", "pixels")}
    layout = {"trained": {5: 0.75}}
    lines = format_table(
        make_report(knn=knn, knn_layout=layout, linear={"trained": 0.25, "untrained": 0.125})
    ).splitlines()
    assert [line.split() for line in lines] == [
        ["features", "k-NN", "k=5", "linear"],
        ["trained", "50.0", "25.0"],
        ["untrained", "50.0", "12.5"],
        ["pixels", "50.0", "-"],
        ["trained,", "with", "layout", "75.0", "-"],
    ]
    assert format_table(make_report()) == ""


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr("dmtjepa.evaluation.report.save_figures", lambda *_: [])


def test_few_training_images_skip_the_linear_probe(run, tmp_path, capsys, caplog, without_figures):
    """Images that cannot be read do not count. The log and the report name them once."""
    write_images(tmp_path / "small" / "train", 3, seed=0)
    (tmp_path / "small" / "train" / "class0" / "bad.jpg").touch()
    write_images(tmp_path / "small" / "val", 3, seed=1)
    assert main([str(run), "--device", "cpu", "--data", str(tmp_path / "small")]) == 0
    assert "skipped linear probe: it needs at least 10 training images, not 9" in capsys.readouterr().out
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["linear"] == {}
    assert report["data"]["train_images"] == 9
    bad = tmp_path / "small" / "train" / "class0" / "bad.jpg"
    assert report["notes"] == [f"left out because they cannot be read: {bad}"]
    assert sum(str(bad) in record.message for record in caplog.records) == 1
    assert list(report["knn"]["trained"]) == ["5"]
    assert "k-NN, k = 5" in (run / "report" / "report.md").read_text()


@pytest.mark.slow
def test_max_images_below_ten_is_measured(run, without_figures):
    assert main([str(run), "--device", "cpu", "--quick", "--max-images", "9"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs sigaltstack")
def test_the_measuring_thread_has_a_signal_stack(run, without_figures):
    """Tested in a thread of its own, because pytest gives the first one a stack."""
    found = []

    def measure():
        found.append(has_signal_stack())
        assert main([str(run), "--device", "cpu", "--max-images", "9"]) == 0
        found.append(has_signal_stack())

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    assert found == [False, True]


def test_a_teacher_that_is_not_finite_is_named(run, tmp_path, capsys):
    checkpoint = torch.load(run / LATEST, weights_only=True)
    checkpoint["target_encoder"]["norm.bias"][3] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pth.tar")
    assert main([str(run), "--device", "cpu", "--checkpoint", str(tmp_path / "nan.pth.tar")]) == 1
    assert "nan.pth.tar holds values that are not finite (norm.bias)" in capsys.readouterr().err


def test_validation_images_that_cannot_be_read_are_an_error(run, tmp_path, capsys):
    write_images(tmp_path / "bad" / "train", 10, seed=0)
    write_images(tmp_path / "bad" / "val", 4, seed=0)
    for image in (tmp_path / "bad" / "val").glob("*/*.png"):
        image.write_bytes(b"no image")
    assert main([str(run), "--device", "cpu", "--data", str(tmp_path / "bad")]) == 1
    assert "validation: no images could be read" in capsys.readouterr().err


@pytest.mark.slow
def test_masks_that_cannot_be_used_skip_the_segmentation(run, tmp_path, capsys, without_figures):
    write_images(tmp_path / "color" / "train", 4, seed=0)
    write_images(tmp_path / "color" / "val", 4, seed=1)
    write_masks(tmp_path / "color")
    for mask in (tmp_path / "color" / "masks" / "val").glob("*/*.png"):
        Image.new("RGB", (32, 32)).save(mask)
    assert main([str(run), "--device", "cpu", "--quick", "--data", str(tmp_path / "color")]) == 0
    assert "skipped segmentation: the mask" in capsys.readouterr().out


@pytest.mark.slow
def test_segmentation_needs_no_classes(run, tmp_path, without_figures):
    """Images without class folders, as in CamVid and VOC."""
    root = tmp_path / "flat"
    for split, seed in (("train", 0), ("val", 1)):
        write_images(root / split, 4, seed=seed)
    write_masks(root)
    for image in [*root.glob("*/class*/*.png"), *root.glob("masks/*/class*/*.png")]:
        image.rename(image.parents[1] / f"{image.parent.name}-{image.name}")
    for folder in [*root.glob("*/class?"), *root.glob("masks/*/class?")]:
        folder.rmdir()
    assert main([str(run), "--device", "cpu", "--data", str(root)]) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["segmentation"]["trained"]["object_iou"] > 0.5
    assert report["knn"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file of a run", "hf"])
def test_weights_alone_are_measured_as_in_their_run(run, data, tmp_path, capsys, without_figures, form):
    """Without anything of a run: also where a file lies in the folder of one."""
    options = ["--device", "cpu", "--quick", "--data", str(data)]
    assert main([str(run), *options]) == 0
    expected = json.loads((run / "report" / "report.json").read_text())
    if form == "hf":
        weights = tmp_path / "hf"
        assert export(["export", str(run), "--format", "hf", "--out", str(weights)]) == 0
    else:
        weights = run / LATEST
        rows = [{"step": step, "train/momentum": 0.5, "targets/explained_variance": 0.4} for step in range(20)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "environment.json").write_text(json.dumps({"starts": [{"host": "of the run"}]}))
        shutil.copy(run / "tiny_r0.csv", run / f"{LATEST}_r0.csv")
    assert main([str(weights), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "are weights by themselves, without images: give --data a folder" in error
    assert (f"or name the run folder {run}, and these weights as --checkpoint" in error) == (form != "hf")
    assert main([str(weights), *options]) == 0
    assert "training:" not in capsys.readouterr().out
    report = weights.with_name(f"{weights.name.removesuffix('.pth.tar')}-report")
    found = json.loads((report / "report.json").read_text())
    assert found["knn"]["trained"] == expected["knn"]["trained"]
    assert found["linear"]["trained"] == expected["linear"]["trained"]
    assert ("student" in found["knn"]) == (form != "hf")
    assert found["verdict"] == []
    assert found["loss"] == {}
    assert [reason for reason in found["skipped"] if "loss" in reason or "run" in reason] == []
    name = "hf" if form == "hf" else "tiny-latest"
    assert (found["run"]["name"], found["run"]["folder"]) == (name, None)
    assert (report / "report.md").read_text().startswith(f"# Report of {name}\n")
    page = (report / "report.html").read_text()
    assert f"<title>{name}: report</title>" in page
    assert "Report of weights by themselves" in page
    for part in ('id="training"', "Run folder", "of the run", "the start of this run"):
        assert part not in page


@pytest.mark.slow
def test_a_run_is_compared_with_the_weights_that_it_started_from(run_template, data, tmp_path):
    """Those of `run_template` are the run's own: the difference is 0."""
    file = tmp_path / "given.pth.tar"
    shutil.copy(run_template / LATEST, file)
    meta = {"load_checkpoint": True, "read_checkpoint": str(file)}
    run, config = open_run(write_run(tmp_path / "run", data, meta=meta))
    splits = find_splits(config.data, max_images=12)
    encoders = load_encoders(config, run.latest_export)
    encoders["start"] = load_start(config, run, encoders["untrained"])
    context = EvaluationContext(config, encoders, splits, progress=False, quick=True)
    report = Report({"start": str(file)}, {"validation_images": len(splits.validation)})
    measure_features(report, context)
    assert report.linear["start"] == report.linear["trained"]
    assert report.collapse["start"] == report.collapse["trained"] != report.collapse["untrained"]
    (sentence,) = (line for line in format_verdict(report) if line.startswith("against the weights"))
    assert f"({file}): linear probe +0.0 +- " in sentence
    assert "k-NN +0.0 +- " in sentence

    run.environment_file.write_text(json.dumps({"starts": [{"time": "2020-01-01T00:00:00+0000"}]}))
    with pytest.raises(NotMeasuredError, match=r"given\.pth\.tar was written after the run had started"):
        load_start(config, run, encoders["untrained"])
    file.unlink()
    elsewhere = change_settings(config, {"meta.read_checkpoint": "$NOT_SET_HERE/given.pth.tar"})
    with pytest.raises(NotMeasuredError, match="NOT_SET_HERE"):
        load_start(elsewhere, run, encoders["untrained"])
    with pytest.raises(NotMeasuredError, match=r"the run started from: there is no checkpoint .*given\.pth\.tar"):
        load_start(config, run, encoders["untrained"])
    drawn, drawn_config = open_run(run_template)
    assert load_start(drawn_config, drawn, encoders["untrained"]) is None


def test_better_and_worse_are_beyond_two_standard_errors():
    data = {"validation_images": 100}
    miou = {"trained": {"mean_iou": 0.5, "mean_iou_error": 0.03}, "start": {"mean_iou": 0.6, "mean_iou_error": 0.03}}
    report = Report(
        {"start": "a.pth.tar"},
        data,
        linear={"trained": 0.8, "start": 0.5},
        knn={"trained": {5: 0.3, 10: 0.4}, "start": {5: 0.6, 10: 0.2}},
        segmentation=miou,
    )
    for scores in (report.linear, report.knn, report.segmentation):
        scores["untrained"] = scores["pixels"] = scores["start"]
    (sentence,) = (line for line in format_verdict(report) if line.startswith("against the weights"))
    assert sentence == (
        "against the weights that the run started from (a.pth.tar): linear probe +30.0 +- 6.4 points (better), "
        "k-NN -20.0 +- 6.9 points (worse), mIoU -10.0 +- 4.2 points (worse)"
    )
    miou["start"]["mean_iou"] = 0.55
    assert "mIoU -5.0 +- 4.2 points (not clearly different)" in format_verdict(report)[-1]


@pytest.mark.slow
def test_a_run_on_four_channels_is_measured_and_shown(tmp_path, data):
    """The fourth channel alone tells the classes apart."""
    rng = np.random.default_rng(0)
    for path in data.glob("*/class*/*.png"):
        pixels = rng.integers(0, 256, (32, 32, 4), dtype=np.uint8)
        pixels[..., 3] = 100 * int(path.parent.name[-1]) + pixels[..., 3] // 8
        out = tmp_path / "four" / path.relative_to(data)
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(out)
    settings = {"channels": 4, "root_path": str(tmp_path), "image_folder": "four", "mean": [0.5] * 4, "std": [0.3] * 4}
    run = write_run(tmp_path / "tiny", tmp_path / "four", data=settings)
    assert main([str(run), "--device", "cpu", "--quick"]) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["linear"]["untrained"] > 0.9
    assert {"masks.png", "nearest.png", "report.html"} <= {path.name for path in (run / "report").iterdir()}
