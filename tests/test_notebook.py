import json

from tests.conftest import ROOT, run_training
from tests.test_train import with_flags


def test_the_notebook_runs(train_flags, monkeypatch):
    run = run_training(with_flags(train_flags, "--max-train-steps", "1"))
    monkeypatch.setenv("REG_CHECKPOINT", str(run / "checkpoints" / "0000001.pt"))
    monkeypatch.chdir(ROOT / "notebooks")
    notebook = json.loads((ROOT / "notebooks" / "sample.ipynb").read_text())
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["images"].shape == (20, 16, 16, 3) and names["cls_tokens"].shape == (20, 32)
    assert names["labels"][:4] == [0, 1, 2, 0] and names["classes"].labels == (0, 1, 2)
    assert names["picture"].size[0] > 10 * 16
