"""What a simulated fleet is made of: models, nodes, workers, and how long each thing takes."""

from dataclasses import dataclass, field
from enum import Enum

from gearfall.core.ids import DeploymentName, ModelName, NodeId
from gearfall.core.records import DeploymentRecord, ModelRecord, WorkerRecord


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """How fast one replica of a model computes."""

    prefill_s_per_token: float
    step_s: float
    """Of a decode step with one job; each running job gets one token a step."""
    step_s_per_job: float = 0.0
    """That each further job adds to the step."""
    start_s: float = 0.3
    """Attach, process, build and first token of a start: all that is not bytes."""
    device_bytes_per_s: float = 0.0
    """From DRAM to the device; 0: the worker maps the pool and copies nothing."""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model as it is registered and as it runs."""

    record: ModelRecord
    """`nodes` is filled in by the world."""
    speed: EngineSpeed


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """A node's store: what its tiers hold and how fast they give it out."""

    node_id: NodeId
    dram_bytes: int
    ssd_bytes: int
    ssd_bytes_per_s: float
    remote_bytes_per_s: float
    """Of its own network; `Site.remote_bytes_per_s` is shared by all."""
    on_ssd: tuple[ModelName, ...] = ()
    in_dram: tuple[ModelName, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerProfile:
    """A worker and how many accelerators it stands for."""

    record: WorkerRecord
    accelerators: int = 1


class Emptying(Enum):
    """What a worker does with the jobs of a replica that is taken back."""

    MOVE = "move"
    """To where the model is ready, alive; those that find no room finish here."""
    FINISH = "finish"
    PREEMPT = "preempt"
    """Stop them and put them back into the queue; their tokens are computed again."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Delays of the control plane and of moves, in seconds."""

    decide_s: float = 0.005
    """From a change to the decision that it causes: changes that come meanwhile count in."""
    follow_s: float = 0.005
    """From the leader's write to the worker or store that follows it."""
    overdue_s: float = 0.2
    """A job that waits so long is demand, though a replica is ready."""
    demand_interval_s: float = 0.1
    load_interval_s: float = 1.0
    exit_s: float = 0.05
    """Until an emptied replica is gone."""
    move_fixed_s: float = 0.1
    """Of a migration, whatever the job's length."""
    pause_s: float = 0.02
    """Between the last token at the source and the next at the target."""


@dataclass(frozen=True, slots=True)
class Site:
    """A whole fleet."""

    models: tuple[ModelProfile, ...]
    nodes: tuple[NodeProfile, ...]
    workers: tuple[WorkerProfile, ...]
    deployments: dict[DeploymentName, DeploymentRecord] = field(default_factory=dict)
    timing: Timing = Timing()
    emptying: Emptying = Emptying.MOVE
    remote_bytes_per_s: float = float("inf")
    """That what is remote gives to all nodes together; shared fairly."""
