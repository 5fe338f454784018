"""A model below a URL is served: registered, fetched when asked for, answered, removed."""

from pathlib import Path

from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.source import open_source
from gearfall.client import AsyncClient
from gearfall.demo import catalogue
from tests.gearfall.infra.web_servers import web_server


async def test_a_model_below_a_url_answers_as_the_local_one(client: AsyncClient, tmp_path: Path):
    local = catalogue.checkpoint_path("arith-small")
    with open_source(str(local)) as source:
        convert(source, tmp_path, lambda done, total: None)
    prompt_ids = [3, 4, 5, 6, 7]
    with web_server(tmp_path) as web:
        answers = []
        for name, path in (("of-a-url", web.url), ("of-a-directory", str(local))):
            _ = [item async for item in client.register_model(name, path)]
            answer = await client.generate(
                name, prompt_ids, temperature=0.0, max_tokens=8, logprobs=True
            )
            answers.append([item.token_id for item in answer.choices[0].logprobs])
        asked = [range_ for file, range_ in web.faults.requests if file.startswith("partition")]
    assert answers[0] == answers[1]
    assert len(asked) == len(set(asked)) > 0
