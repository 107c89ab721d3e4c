"""The benchmark of decoding, on a few made-up photographs: that it runs and says what it should."""

import json
from pathlib import Path

import numpy as np
from forks import Forks
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks/decode_speed.py"


def test_decoding_is_measured_against_pillow_and_stays_close_to_it(
    tmp_path: Path, forks: Forks
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        photo = coarse.resize((500, 400), Image.Resampling.BICUBIC)
        photo.save(tmp_path / "photos" / f"{number}.jpg", quality=95)
    done = forks.run(
        SCRIPT, "--photos=photos", "--rounds=2", "--repeats=22", "--output=results", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("decode-speed_*.json")
    result = json.loads(path.read_text())
    assert result["photographs"] == 3
    assert result["mean_absolute_error_of_255"]["worst_picture"] < 2
    assert result["mean_bytes_packed"] < result["mean_bytes"]
    images = result["images_per_second_of_one_core"]
    # Which is faster is for the benchmark to say: here, other tests compute beside it.
    assert min(images["packed"]) > 0 and min(images["files"]) > 0
    assert {len(turns) for turns in images.values()} == {2}
    assert result["all_cores"]["images_of_an_epoch"] == 64
    assert result["all_cores"]["share_of_the_limit"]["median"] > 0
    assert str(tmp_path) not in path.read_text()
