"""How `gearfall profile` puts together what it measured."""

from gearfall.cli.profile import measure_models
from gearfall.profiling.measure import MeasureSettings
from gearfall.profiling.queries import LabelledQuery


async def test_a_profile_says_at_which_temperature_its_answers_were_drawn() -> None:
    """No model is measured: nobody listens there."""
    settings = MeasureSettings(samples=2, temperature=0.9)
    queries = [LabelledQuery("q1", "2+2=", "4")]
    made = await measure_models("127.0.0.1:1", (), queries, settings, quiet=True)
    assert (made.drawn_temperature, made.queries) == (0.9, ("q1",))
