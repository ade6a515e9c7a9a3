"""What tells a whole checkpoint from a damaged one, which one is found, and that a foreign one cannot run code."""

import ast
import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dmtjepa import checkpoint_format
from dmtjepa.checkpoint_format import CheckpointError
from dmtjepa.cli.weights import main
from dmtjepa.training.checkpoint_writer import CheckpointWriter

ROOT = Path(__file__).parents[1]
WEIGHTS = {"model.encoder.weight": torch.arange(12.0).view(4, 3), "rng.0": torch.arange(8, dtype=torch.uint8)}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with step-00000016 and step-00000024, which no test changes."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        writer = CheckpointWriter(folder, dist.group.WORLD, keep_last=2, device=torch.device("cpu"))
        for step in (16, 24):
            writer.save(WEIGHTS, {"step": step, "epoch": step // 8, "keep": False})
        writer.close()
    finally:
        dist.destroy_process_group()
    return folder


@pytest.fixture
def checkpoints(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def cut(folder):
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-7])


def flip(folder):
    path = next(folder.glob("*.distcp"))
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def change_manifest(**values):
    def change(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


DAMAGES = {
    "manifest": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
    "half-manifest": (lambda folder: (folder / "manifest.json").write_text('{"format": 1, '), "cannot be read"),
    "other-json": (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
    "not-text": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff{}"), "cannot be read"),
    "format": (change_manifest(format=99), "format is 99"),
    "no-files": (change_manifest(files={}), "the list of files is malformed"),
    "files-list": (change_manifest(files=[1]), "the list of files is malformed"),
    "files-rows": (change_manifest(files={".metadata": {}, "meta.json": 3}), "the list of files is malformed"),
    "cut": (cut, "bytes instead of"),
    "flip": (flip, "other contents"),
    "missing": (lambda folder: next(folder.glob("*.distcp")).unlink(), "is missing"),
    "metadata": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_recognised_and_skipped(checkpoints, damage, caplog):
    work, message = DAMAGES[damage]
    newest = checkpoints / "step-00000024"
    assert checkpoint_format.newest_whole(checkpoints) == newest
    work(newest)
    assert message in checkpoint_format.find_fault(newest)
    assert checkpoint_format.newest_whole(checkpoints) == checkpoints / "step-00000016"
    assert "step-00000024 is damaged and skipped" in caplog.text


def test_flipped_bits_in_the_manifest_are_faults(checkpoints):
    """One bit in each byte. What is still read as the same values (blanks) is no fault."""
    newest = checkpoints / "step-00000024"
    path = newest / "manifest.json"
    sound = path.read_bytes()
    for position in range(len(sound)):
        flipped = bytearray(sound)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        if checkpoint_format.find_fault(newest) is None:
            assert json.loads(flipped) == json.loads(sound)


def test_all_checkpoints_damaged_is_an_error_and_changes_nothing(checkpoints):
    for folder in checkpoints.iterdir():
        flip(folder)
    before = sorted(checkpoints.rglob("*"))
    with pytest.raises(CheckpointError) as error:
        checkpoint_format.newest_whole(checkpoints)
    for text in ("step-00000016: __0_0.distcp has other contents", "step-00000024: ", "another logging.folder"):
        assert text in str(error.value)
    assert sorted(checkpoints.rglob("*")) == before


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint_format.newest_whole(tmp_path / "checkpoints") is None


def test_renamed_checkpoint_is_not_what_its_name_says(checkpoints):
    renamed = (checkpoints / "step-00000016").rename(checkpoints / "step-00000099")
    assert "name says step 99 and its manifest step 16" in checkpoint_format.find_fault(renamed)


def test_half_written_checkpoint_is_not_seen_and_is_removed(checkpoints):
    (checkpoints / "step-00000024").rename(checkpoints / ".writing-step-00000024")
    assert checkpoint_format.newest_whole(checkpoints).name == "step-00000016"
    checkpoint_format.remove_leftovers(checkpoints)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000016"]


def make_folders(folder, steps, keep=()):
    for step in steps:
        checkpoint = folder / checkpoint_format.name_of(step)
        checkpoint.mkdir()
        (checkpoint / "meta.json").write_text(json.dumps({"keep": step in keep}))


@pytest.mark.parametrize(("keep_last", "left"), [(1, [1, 4, 8]), (2, [1, 3, 4, 8]), (9, [1, 2, 3, 4, 8])])
def test_what_was_just_written_is_never_pruned(tmp_path, keep_last, left):
    """Step 8 is damaged: the run resumed from an earlier one, and has now written step 4. Step 1 is kept for good."""
    make_folders(tmp_path, [1, 2, 3, 4, 8], keep=[1])
    checkpoint_format.prune(tmp_path / checkpoint_format.name_of(4), keep_last)
    assert sorted(map(checkpoint_format.step_of, tmp_path.iterdir())) == left


def test_tensors_are_read_whole_and_in_place(checkpoints):
    state = checkpoint_format.load_full(checkpoints / "step-00000024")
    assert state.keys() == WEIGHTS.keys()
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in state.items())


# ---- A folder from somebody else


class Evil:
    """A pickle that calls `open` when it is loaded, and then is what it replaces."""

    def __init__(self, mark, real):
        self.mark, self.real = mark, real

    def __reduce__(self):
        code = f"[open({str(self.mark)!r}, 'w').close(), __import__('pickle').loads({self.real!r})][1]"
        return eval, (code,)


def replace_metadata(folder, contents, name=".metadata"):
    """Replace .metadata, or another file, with a manifest that fits."""
    (folder / name).write_bytes(contents)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint_format.find_fault(folder) is None


def read_all(checkpoint):
    """The ways in which a checkpoint is read."""
    state = {name: torch.empty_like(value) for name, value in WEIGHTS.items()}
    yield lambda: checkpoint_format.load_full(checkpoint)
    yield lambda: checkpoint_format.load_into(state, checkpoint)


def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(checkpoints, tmp_path, capsys):
    checkpoint, mark = checkpoints / "step-00000024", tmp_path / "code-was-run"
    replace_metadata(checkpoint, pickle.dumps(Evil(mark, (checkpoint / ".metadata").read_bytes())))
    for read in read_all(checkpoint):
        with pytest.raises(CheckpointError, match=r"\.metadata names builtins\.eval, which does not belong"):
            read()
    out = str(tmp_path / "out.pth.tar")
    for source, command in (
        (checkpoints, ["verify"]),
        (checkpoint, ["verify"]),
        (checkpoint, ["show"]),
        (checkpoint, ["export", "--format", "official", "--out", out]),
        (checkpoint, ["export", "--format", "timm", "--out", out]),
    ):
        assert main([command[0], str(source), *command[1:]]) == 1
        assert ".metadata names builtins.eval, which does not belong" in capsys.readouterr().err
    assert not mark.exists()


def find_unsafe_reads(tree):
    """Imports and calls that can make any object of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            yield from {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"} & set(names)
        elif isinstance(node, ast.Attribute | ast.Name) and "FileSystemReader" in ast.unparse(node):
            yield "FileSystemReader"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = {
                "torch.load": keywords.get("weights_only") == "True",
                "yaml.load": keywords.get("Loader") == "_Loader",  # a subclass of SafeLoader
                "yaml.unsafe_load": False,
                "yaml.full_load": False,
                "np.load": keywords.get("allow_pickle", "False") == "False",
                "dcp.load": keywords.get("storage_reader") == "reader",  # a TensorReader
            }
            if not safe.get(called, True):
                yield called


def test_nothing_else_reads_pickles():
    for path in [*ROOT.glob("dmtjepa/**/*.py"), *ROOT.glob("*.py")]:
        unsafe = set(find_unsafe_reads(ast.parse(path.read_text())))
        admitted = {"pickle", "FileSystemReader"} if path.name == "checkpoint_reader.py" else set()
        assert unsafe <= admitted, path
    assert set(find_unsafe_reads(ast.parse("import pickle\ntorch.load(path)"))) == {"pickle", "torch.load"}


@pytest.mark.parametrize("name", ["os.system", "posix.system", "torch.load", "torch.hub.load", "numpy.load"])
def test_other_names_are_refused(checkpoints, name):
    module, _, function = name.rpartition(".")
    replace_metadata(checkpoints / "step-00000024", f"c{module}\n{function}\n.".encode())
    with pytest.raises(CheckpointError, match=f"names {name}, which does not belong"):
        checkpoint_format.load_full(checkpoints / "step-00000024")


def spoil(change):
    """.metadata with something that the reader of torch.distributed.checkpoint would follow."""

    def work(checkpoint):
        loaded = pickle.loads((checkpoint / ".metadata").read_bytes())
        change(loaded)
        replace_metadata(checkpoint, pickle.dumps(loaded))

    return work


def test_code_in_the_bytes_of_a_tensor_is_refused_and_not_run(checkpoints, tmp_path):
    """Each tensor is stored as `torch.save` writes it. Here it is an object that calls a function."""
    checkpoint, mark = checkpoints / "step-00000024", tmp_path / "code-was-run"
    buffer = io.BytesIO()
    torch.save(Evil(mark, pickle.dumps(torch.zeros(3))), buffer)
    name = next(checkpoint.glob("*.distcp")).name
    replace_metadata(checkpoint, buffer.getvalue(), name)

    def point_there(loaded):
        for place in loaded.storage_data.values():
            place.offset, place.length = 0, len(buffer.getvalue())

    spoil(point_there)(checkpoint)
    for read in read_all(checkpoint):
        with pytest.raises(CheckpointError, match=r"Weights only load failed"):
            read()
    assert not mark.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert mark.exists()  # so it would have run


def as_pickled_value(loaded):
    loaded.state_dict_metadata["rng.0"] = BytesStorageMetadata()  # which is loaded without weights_only


def outside(loaded):
    for place in loaded.storage_data.values():
        place.relative_path = "../secret"


def transformed(loaded):
    for place in loaded.storage_data.values():
        place.transform_descriptors = ["zstd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_pickled_value, r"BytesStorageMetadata"),
        (outside, r"names the file \.\./secret"),
        (transformed, r"names the transformation"),
    ],
)
def test_values_that_are_not_tensors_of_the_folder_are_refused(checkpoints, change, message):
    checkpoint = checkpoints / "step-00000024"
    spoil(change)(checkpoint)
    for read in read_all(checkpoint):
        with pytest.raises(CheckpointError, match=message):
            read()


def test_metadata_that_is_no_pickle_is_an_error(checkpoints):
    for contents in (b"", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps(3)):
        replace_metadata(checkpoints / "step-00000024", contents)
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            checkpoint_format.load_full(checkpoints / "step-00000024")
