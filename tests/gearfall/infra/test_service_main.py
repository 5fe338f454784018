import gc
import json
import os

from gearfall.infra.service_main import announce_ready


def test_what_stands_when_a_service_is_ready_is_collected_no_more(capsys):
    try:
        announce_ready("store", "127.0.0.1:1", metrics="")
        assert gc.get_freeze_count() > 1000
        assert len(gc.get_objects()) < 1000
    finally:
        gc.unfreeze()
    line = json.loads(capsys.readouterr().out)
    expected = {"ready": True, "service": "store", "address": "127.0.0.1:1", "metrics": ""}
    assert line == {**expected, "pid": os.getpid()}
