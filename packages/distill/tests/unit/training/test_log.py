from __future__ import annotations

from pathlib import Path

from slimtron_distill.training.log import TrainingLog, read_log


def test_records_after_the_last_checkpoint_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    log = TrainingLog(path, step=0)
    for step in range(1, 5):
        log.write(step, loss=1 / step, updated=True)
    log.close()
    with path.open("a") as file:
        # The process was ended in the middle of a line.
        file.write('{"step": 5, "lo')
    assert [record["step"] for record in read_log(path)] == [1, 2, 3, 4]
    log = TrainingLog(path, step=2)
    log.write(3, loss=7.0)
    log.close()
    assert read_log(path)[1:] == [
        {"step": 2, "loss": 0.5, "updated": True},
        {"step": 3, "loss": 7.0},
    ]
