"""The page on which `gearfall demo migrate` shows an answer and its moves."""

from gearfall.cli.demo_migrate import WIDTH, Page
from gearfall.demo.migrate import Move

MOVE = Move(7, "worker-a", "worker-b", "tokens", rounds=2, pause_s=0.0031, duration_s=0.02)


def test_notes_stand_beside_the_line_in_which_the_move_fell():
    printed: list[str] = []
    page = Page(printed.append)
    page.write("1" * (WIDTH - 1))
    page.move(1, MOVE)
    page.write("2345")
    page.move(2, MOVE)
    page.move(3, MOVE)
    page.end_line()
    first, second, third = "".join(printed).splitlines()
    assert (
        first == f"{'1' * (WIDTH - 1)}2  <- move 1, to worker-b: by tokens, 2 rounds, paused 3.1 ms"
    )
    assert second.startswith("345 ")
    assert second.index("<- move 2") == first.index("<- move 1") == third.index("<- move 3")


def test_a_page_keeps_every_character():
    printed: list[str] = []
    page = Page(printed.append)
    text = "".join(str(number % 10) for number in range(3 * WIDTH + 5))
    for start in range(0, len(text), 7):
        page.write(text[start : start + 7])
    page.end_line()
    assert "".join("".join(printed).split()) == text
