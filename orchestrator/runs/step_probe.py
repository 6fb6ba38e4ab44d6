"""The arguments of a probe of a micro-batch, and the seconds that it measures: plain records."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.provenance import hardware
from bim.orchestrator.training.spec import OptimSpec, Precision, PretrainSpec


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one micro-batch, scaled to that of the run.

    Args:
        stages: of work in every stage.
        loading: of decoding and cropping, in one process.
        scale: images of the run's micro-batch over those of the probe; above 1 the times are extrapolated.
    """

    stages: tuple[float, ...]
    loading: float
    scale: float = 1.0


@dataclass(frozen=True)
class Probe:
    """What the seconds of a micro-batch depend on; it travels to the machine that has the device.

    Args:
        data: with the phase that is timed alone, and without workers.
    """

    spec: PretrainSpec
    data: DataSpec
    layout: StageLayout

    @classmethod
    def of(cls, run: ResolvedRun, layout: StageLayout, precision: Precision) -> Probe:
        """The last phase of a run. Weights that `init_from` names are not read, and learning rates do not count."""
        spec = replace(run.spec, init_from=None, seed=0, optim=OptimSpec(precision=precision))
        phase = replace(run.data.phases[-1], first_epoch=0, grad_accum_steps=1)
        return cls(spec, replace(run.data, phases=(phase,), workers=0, fingerprint=None), layout)

    @property
    def key(self) -> str:
        """A digest; two probes with the same one take the same time on the same machine."""
        data, machine = self.data, hardware()
        facts = {
            "spec": asdict(self.spec),
            "images": [data.source, data.image_column, data.crop_scale, data.flip, asdict(data.phases[0])],
            "layout": [self.layout.stage_blocks, self.layout.gpus, self.layout.threads],
            "machine": [machine.cpu, machine.cpus, machine.gpus],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
