"""Which split a file's name claims."""

from pathlib import PurePath

import pytest

from precompute.sources.splits import claimed_split


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("test.tar", "test"),
        ("test-003.tar", "test"),
        ("Val2017/0.png", "validation"),
        ("cars_train.tar", "train"),
        ("part-6-test.parquet", "test"),
        ("train_images/a/0.png", "train"),
        ("images-dev", "validation"),
        ("captions_test.jsonl", "test"),
        ("data-test-00000-of-00005.parquet", "test"),
        ("train/test.csv", "test"),
        ("cars-train-00000-of-00002-0a5bc.parquet", "train"),
        ("test-drive.tar", None),
        ("testament.tar", None),
        ("part-6.parquet", None),
        ("images/data_0.tar", None),
    ],
)
def test_the_last_word_of_a_name_claims_a_split(path: str, split: str | None) -> None:
    assert claimed_split(PurePath(path)) == split
