"""The gRPC face of the scheduler: convert, call, convert back."""

from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName
from gearfall.infra.net.grpc_errors import Context
from gearfall.pb import scheduler_pb2 as pb
from gearfall.pb import scheduler_pb2_grpc
from services.scheduler.service import Explanation, SchedulerService


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServicer):
    """Serves `gearfall.v1.Scheduler`."""

    def __init__(self, service: SchedulerService) -> None:
        self._service = service

    async def GetStatus(  # noqa: N802 - named by the proto
        self, _request: pb.SchedulerStatusRequest, _context: Context
    ) -> pb.SchedulerStatus:
        """Say who leads."""
        status = self._service.status()
        return pb.SchedulerStatus(
            scheduler_id=status.scheduler_id,
            leader_id=status.leader_id,
            is_leader=status.is_leader,
            fence_revision=status.fence_revision,
        )

    async def Explain(  # noqa: N802 - named by the proto
        self, request: pb.ExplainRequest, _context: Context
    ) -> pb.ExplainReply:
        """Say why a model is where it is."""
        if request.WhichOneof("subject") != "model":
            raise InvalidRequest("the scheduler explains models; ask a router for a request")
        found = self._service.explain(ModelName(request.model))
        return pb.ExplainReply(explanations=[explanation_to_pb(e) for e in found])


def explanation_to_pb(explanation: Explanation) -> pb.Explanation:
    """Return the message for `explanation`."""
    return pb.Explanation(
        at_unix_s=explanation.at_unix_s,
        subject=explanation.subject,
        decision=explanation.decision,
        reason=explanation.reason,
        rejected=[
            pb.Alternative(choice=choice, reason=reason) for choice, reason in explanation.rejected
        ],
        predicted_s=explanation.predicted_s,
        measured_s=explanation.measured_s,
    )
