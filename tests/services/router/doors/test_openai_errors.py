"""Every error class has an HTTP form."""

import orjson
import pytest

from gearfall.core import errors
from services.router.doors.openai_errors import BY_ERROR, body_too_large, error_response


def classes(base: type[errors.GearfallError]) -> list[type[errors.GearfallError]]:
    found = [base] if base is not errors.GearfallError else []
    return found + [each for child in base.__subclasses__() for each in classes(child)]


@pytest.mark.parametrize("kind", classes(errors.GearfallError))
def test_every_class_is_mapped(kind):
    reply = error_response(kind("what to change", param="field"))
    assert reply.status_code == BY_ERROR[kind].status >= 400
    error = orjson.loads(reply.body)["error"]
    assert error["message"] == "what to change"
    assert error["param"] == "field"


def test_a_time_to_come_back_is_rounded_up():
    reply = error_response(errors.Overloaded("full", retry_after_s=1.2))
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("2", "1200")


def test_a_large_body_is_413():
    assert error_response(body_too_large(10)).status_code == 413
