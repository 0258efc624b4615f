"""What a plan says of a ControlNet, against the engine: weights, messages, and what it hands to the blocks."""

from dataclasses import replace
from typing import Any

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from clear_dist.plan import Engine, PlanRequest
from clear_dist.plan.phases import Memory
from clear_dist.plan.questions import Module
from clear_dist.plan.traffic import step_traffic
from clear_dist.request.request import Control
from tests.plan.asked import tiny_request
from tests.ranks import run_ranks
from tests.tiny_controlnet import make_tiny_controlled, make_tiny_controlnet, picture

ROWS, COLUMNS, RADIUS = 12, 8, 2


def counted(group: Group) -> tuple[dict[str, int], list[int]]:
    """Bytes that the transformer and the ControlNet send in a step; and of the ControlNet's weights and results."""
    pipe, results = make_tiny_controlled(make_tiny_controlnet(modes=3)), []
    pipe.set_progress_bar_config(disable=True)
    handle = parallelize(pipe, window=RADIUS, text_attention="exact", text_tokens="replicated", group=group)
    pipe.controlnet.register_forward_hook(lambda *call: results.extend((*call[-1][0], *call[-1][1])))
    pipe("a hill", control_image=picture(ROWS, COLUMNS, 1), control_mode=1, height=16 * ROWS, width=16 * COLUMNS,
         num_inference_steps=1, max_sequence_length=8, output_type="latent")  # fmt: skip
    of_both = [counters.as_dict() for counters in (handle.counters, *handle.controlnet_counters)]
    names = "halo_bytes_sent", "text_bytes_reduced", "join_bytes"
    sent = {name: sum(int(sum(each[name])) for each in of_both) for name in names}
    return sent, [sum(x.nbytes for x in pipe.controlnet.parameters()), sum(x.nbytes for x in results)]


def asked() -> PlanRequest:
    net = make_tiny_controlnet(modes=3)
    pipe = make_tiny_controlled(net)
    control = Control(source="net", image=None, size=None, scale=1.0, mode=None, window="full")
    settings: dict[str, Any] = {"height": 16 * ROWS, "width": 16 * COLUMNS, "window": RADIUS, "world_size": 2}
    settings |= {"max_sequence_length": 8, "text_tokens": "replicated", "native_size": 1024, "control": control}
    found = tiny_request(pipe, **settings)
    module = Module(kind="diffusers.FluxControlNetModel", config=dict(net.config))
    return replace(found, model=replace(found.model, controlnet=module))


def test_bytes_are_those_of_the_engine(engine: Engine) -> None:
    request = asked()
    (stage,), (parts,) = request.stages, request.parts
    memory = Memory(asked=request, engine=engine)
    for part, (sent, (weights, results)) in zip(parts, run_ranks(counted, 2), strict=True):
        planned = step_traffic(engine, request, stage, part)
        found = {"halo_bytes_sent": planned.halos_sent, "text_bytes_reduced": planned.text_reduced}
        assert {**found, "join_bytes": planned.join} == sent
        assert planned.halos_received == planned.halos_sent
        rows = [phase.items for phase in memory.of_rank(part.rank).phases if phase.name == "denoise"]
        assert [each["ControlNet"] for each in rows] == [weights] * 2
        assert rows[1]["residuals"] == results < rows[0]["residuals"]


def test_without_a_controlnet_nothing_of_it_is_there(engine: Engine) -> None:
    plain = replace(asked(), model=replace(asked().model, controlnet=None)).changed(control=None)
    phases = Memory(asked=plain, engine=engine).of_rank(0).phases
    assert not any({"ControlNet", "residuals"} & phase.items.keys() for phase in phases)
