"""Where a trigger pays: on a first stage that shares its core, not on a model that has one."""

from bench.cascade.triggers import SMALL, Setting
from gearfall.gears.plan_build import WORTH
from gearfall.simulation.cascades.step_engine import StepSpeed

SMALL_STEPS, LARGE_STEPS = (StepSpeed(((1, each), (16, each)), each / 10) for each in (0.01, 0.1))


def ratio(setting: Setting, trigger: int) -> float:
    plain_s = setting.p95_s(0, {}, 0.0)
    return setting.p95_s(0, {str(SMALL): trigger}, plain_s) / plain_s


def test_a_trigger_spares_steps_that_the_model_beside_it_needs():
    shared = Setting("shared", 7.5, (SMALL_STEPS, LARGE_STEPS), 0.1)
    assert ratio(shared, 4) < 0.9


def test_a_trigger_on_a_model_alone_on_its_core_only_delays():
    assert ratio(Setting("alone", 7.5, (SMALL_STEPS,)), 4) >= WORTH
