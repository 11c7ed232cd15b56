"""train/writer.py: metrics that survive kills and resumes."""

import json

from semflow_jax.train.writer import Writer, read_metrics


def test_rows_are_read_as_they_were_written(tmp_path):
    writer = Writer(tmp_path, 0)
    writer.scalars(1, {"loss": 0.5})
    writer.scalars(2, {"loss": 0.25, "val/miou": 0.125})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "val/miou": 0.125}]
    writer.close()


def test_nothing_written_nothing_read(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_resumed_run_forgets_what_lies_beyond_its_step(tmp_path):
    writer = Writer(tmp_path, 0)
    for step in range(1, 6):
        writer.scalars(step, {"loss": 1.0 / step})
    writer.close()
    writer = Writer(tmp_path, 3)
    writer.scalars(4, {"loss": 9.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]


def test_a_line_cut_short_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer = Writer(tmp_path, 1)
    writer.scalars(2, {"loss": 2.0})
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
