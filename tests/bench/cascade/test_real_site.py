"""What the flags of both benches refuse before a cluster is started."""

import pytest

from bench.cascade.real_site import Settings


def test_a_directory_that_exists_is_not_taken_to_keep_in(tmp_path, capsys):
    flags = Settings.flags("bench", None)
    assert flags.parse_args(["--keep", str(tmp_path / "new")]).keep == tmp_path / "new"
    with pytest.raises(SystemExit):
        flags.parse_args(["--keep", str(tmp_path)])
    assert f"{tmp_path} exists" in capsys.readouterr().err
