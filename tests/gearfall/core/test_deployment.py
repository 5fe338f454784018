from dataclasses import replace

import pytest

from gearfall.core.certainty.escalation import AtOverload, EscalationPolicy, check_has_target
from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.deployment import check_deployment_shape
from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.streaming import MAX_HOLD_TOKENS, Streaming, StreamMode
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage

NAN = float("nan")


def deployment(*stages, name="both", **fields) -> DeploymentRecord:
    built = tuple(Stage(ModelName(model), threshold) for model, threshold in stages)
    return DeploymentRecord(DeploymentName(name), built or (Stage(ModelName("large")),), **fields)


def counting(samples: int, temperature: float = 0.7, **fields) -> DeploymentRecord:
    """A cascade whose first stage counts equal answers."""
    asked = SelfConsistency(samples, temperature)
    stages = (Stage(ModelName("small"), 0.5, asked), Stage(ModelName("large")))
    return replace(deployment(**fields), stages=stages)


@pytest.mark.parametrize(
    "wanted",
    [
        deployment(),
        counting(2),
        counting(8, 2.0, streaming=Streaming(StreamMode.DRAFT)),
        deployment(("small", 0.0), ("large", None)),
        deployment(("small", 1.0), ("large", None), min_replicas=3, max_replicas=3),
        deployment(keep_alive_s=0.0, target_jobs=8, target_queued_tokens=4096),
        deployment(labels={"zone": "a", "empty": ""}, spread=True, accelerators=4),
        deployment(shadow_share=0.0, cache_bytes=1 << 16),
        deployment(shadow_share=0.05, cache_bytes=1 << 36),
        deployment(escalation=EscalationPolicy(queue_target_s=3600.0)),
        deployment(streaming=Streaming(StreamMode.EARLY, MAX_HOLD_TOKENS)),
    ],
)
def test_what_can_work_is_taken(wanted):
    check_deployment_shape(wanted)


@pytest.mark.parametrize(
    ("wanted", "param", "says"),
    [
        (deployment(name="../x"), "name", "valid name"),
        (deployment(certainty="vibes"), "certainty", "vibes"),
        (deployment(*((f"m{n}", 0.5) for n in range(9))), "stages", "1 to 8"),
        (deployment(("both", None)), "stages[0].model", "stage of itself"),
        (deployment(("a", 0.5), ("b", 0.5), ("a", None)), "stages[2].model", "stands twice"),
        (deployment(("a", None), ("b", None)), "stages[0].threshold", "has none"),
        (deployment(("a", 1.5), ("b", None)), "stages[0].threshold", "it has 1.5"),
        (deployment(("a", -0.1), ("b", None)), "stages[0].threshold", "it has -0.1"),
        (deployment(("a", NAN), ("b", None)), "stages[0].threshold", "it has nan"),
        (deployment(("a", 0.5)), "stages[0].threshold", "leave out that of a"),
        (counting(9), "stages[0].self_consistency.samples", "9 must be between 2 and 8"),
        (counting(3, 0.0), "stages[0].self_consistency.temperature", "above 0"),
        (
            counting(3, streaming=Streaming(StreamMode.EARLY)),
            "streaming.mode",
            "small is decided by how many whole answers are the same: ask for buffer or draft",
        ),
        (
            replace(deployment(), stages=(Stage(ModelName("a"), None, SelfConsistency(3)),)),
            "stages[0].self_consistency",
            "leave out the self_consistency of a",
        ),
        (deployment(min_replicas=2, max_replicas=1), "max_replicas", "below min_replicas 2"),
        (deployment(min_replicas=-1), "min_replicas", "-1 must be between 0"),
        (deployment(max_replicas=0), "max_replicas", "0 must be between 1"),
        (deployment(max_replicas=5000), "max_replicas", "and 1024"),
        (deployment(keep_alive_s=-1.0), "keep_alive_s", "at least 0"),
        (deployment(keep_alive_s=NAN), "keep_alive_s", "nan"),
        (deployment(keep_alive_s=float("inf")), "keep_alive_s", "inf"),
        (deployment(target_jobs=-1), "target_jobs", "-1"),
        (deployment(target_queued_tokens=-5), "target_queued_tokens", "-5"),
        (deployment(accelerators=0), "accelerators", "between 1"),
        (deployment(accelerators=-2), "accelerators", "-2"),
        (deployment(shadow_share=0.051), "shadow_share", "between 0 and 0.05"),
        (deployment(shadow_share=-0.01), "shadow_share", "-0.01"),
        (deployment(shadow_share=NAN), "shadow_share", "nan"),
        (deployment(cache_bytes=-1), "cache_bytes", "-1 must be 0"),
        (deployment(cache_bytes=100), "cache_bytes", "and 68719476736"),
        (deployment(cache_bytes=1 << 37), "cache_bytes", "must be 0"),
        (
            deployment(escalation=EscalationPolicy(queue_target_s=-1)),
            "escalation.queue_target_s",
            "-1",
        ),
        (
            deployment(escalation=EscalationPolicy(queue_target_s=NAN)),
            "escalation.queue_target_s",
            "nan",
        ),
        (
            deployment(streaming=Streaming(StreamMode.EARLY, 0)),
            "streaming.hold_tokens",
            "between 1 and 4096",
        ),
        (deployment(labels={"": "a"}), "labels", "keys"),
        (deployment(labels={"k": "v" * 200}), "labels", "128"),
        (deployment(labels={f"k{n}": "v" for n in range(17)}), "labels", "at most 16"),
    ],
)
def test_what_can_not_is_refused_with_what_to_change(wanted, param, says):
    with pytest.raises(InvalidRequest) as refused:
        check_deployment_shape(wanted)
    assert refused.value.param == param
    assert says in refused.value.message


def test_a_cap_on_escalations_needs_a_target_from_somewhere():
    policy = EscalationPolicy(at_overload=AtOverload.ANSWER)
    with pytest.raises(InvalidRequest, match="needs queue_target_s: there is no gear plan"):
        check_has_target(policy, [])
    with pytest.raises(InvalidRequest, match=r"needs queue_target_s: a gear .* promises no p95_s"):
        check_has_target(policy, [1.0, 0.0])
    check_has_target(policy, [1.0, 0.5])
    check_has_target(EscalationPolicy(), [])
    check_has_target(replace(policy, queue_target_s=1.0), [0.0])
