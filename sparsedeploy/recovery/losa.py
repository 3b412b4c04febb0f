"""LoSA: prune in steps, spread sparsity and ranks anew at each, train masked adapters in between (Huang et al., ICLR
2025, arXiv 2502.14816).

Unstructured, N:M and mixed N:M; the masks are explicit at every step, so what is pruned stays exactly zero. After step
t of T the sparsity is s (1 - (1 - t / T)^3); the adapters are y = W x + (alpha / 8) ((B A) * M) x under the mask M.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from sparsedeploy import progress
from sparsedeploy.allocation.allocate import measure_layers, model_layers
from sparsedeploy.allocation.base import Allocation, sequences_read
from sparsedeploy.errors import UserError
from sparsedeploy.masks import apply_mask, pack_bits, unpack_bits
from sparsedeploy.models.layers import ResidentLayers
from sparsedeploy.options import Options, option
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.pruning.layers import prune_layers
from sparsedeploy.recovery.adapter_ranks import allocate_ranks
from sparsedeploy.recovery.adapters import Adapter, ReinitPolicy, merged, unmerged
from sparsedeploy.recovery.base import Recovered, RecoveryJob
from sparsedeploy.recovery.data import step_slices
from sparsedeploy.recovery.objective import Objective
from sparsedeploy.recovery.reconstruction import reconstruction_losses
from sparsedeploy.recovery.schedule import Shape, mean_ranks, sparsity_schedule
from sparsedeploy.recovery.step_plan import step_plan
from sparsedeploy.recovery.training import STATE, AdapterTraining
from sparsedeploy.registry import ALLOCATORS, RECOVERIES

_PHASE = "phase"
_ALLOCATION = "rmi"  # where none is asked for
_CODE_RANK = 8  # the size of the released code's adapters: it slices them, so larger ranks silently become this


@dataclass(frozen=True)
class LosaOptions(Options):
    """The steps and the adapters; the defaults are the published settings."""

    steps: int = option(5, "Number of rounds of pruning and training.", at_least=1)
    schedule: Shape = option("cubic", "How sparsity grows over the steps.")
    first_rank: float = option(6.0, "Mean rank of the first step.", above=0)
    rank_increment: float = option(1.0, "Increase of the mean rank per step.")
    r_max: int = option(16, "Maximum rank of a layer.", at_least=1)
    alpha: float = option(16.0, "The adapters' output is scaled by alpha / 8.", above=0)
    dropout: float = option(0.1, "Dropout on the adapters' inputs in training.", at_least=0, below=1)
    regrow: Literal["reinit", "retain"] = option(
        "reinit",
        "A rank that grows again starts its new part from scratch (the paper) or where it was (the released code).",
    )
    layer_rates: bool = option(True, "Allocate sparsity per layer; false: the same rate everywhere.")
    rank_allocation: bool = option(True, "Allocate ranks by reconstruction error; false: the mean rank everywhere.")
    dynamic: bool = option(
        True,
        "False: prune once to the target and train once, on all the data, with the average of the mean ranks.",
    )
    reference_ranks: bool = option(
        False, "Use the released code's rank allocation: one pass of the budget correction, nothing above rank 8."
    )
    reference_slices: bool = option(False, "Give each step the released code's share of the data.")


@RECOVERIES.register("losa", LosaOptions, starts_from="dense", trains=True, calibrates=True, allocation=_ALLOCATION)
def losa(job: RecoveryJob, options: LosaOptions) -> Recovered:
    """Progressive pruning with masked adapters, ranks by reconstruction error, merged without cost (LoSA)."""
    data = job.training_data()
    if job.mixed.rule != "apportion" or job.mixed.wanted != "importance":
        raise UserError(
            "LoSA chooses the N of mixed patterns by importance", "Leave the pattern options rule and wanted out."
        )
    if not options.layer_rates and job.allocation not in (None, "uniform"):
        raise UserError(
            f"layer_rates=false leaves no use for the allocation {job.allocation}", "Leave one of them out."
        )
    omegas = mean_ranks(options.steps, options.first_rank, options.rank_increment)
    targets = sparsity_schedule(job.sparsity, options.steps, options.schedule)
    if not options.dynamic:
        omegas, targets = [sum(omegas) / len(omegas)], [job.sparsity]
    slices = step_slices(len(data.sequences), len(targets), reference=options.reference_slices)
    run = _Run(job, options, job.objective())
    start = run.restore()
    for step in range(start, len(targets)):
        if not run.pruned(step):
            run.prune(step, targets[step], omegas[step])
        run.train(step, slices[step])
    return run.finish()


class _Run:
    """The state between the phases: base weights in the model, adapters and masks beside them."""

    def __init__(self, job: RecoveryJob, options: LosaOptions, objective: Objective) -> None:
        self.job = job
        self.options = options
        self.objective = objective
        self.linears = job.linears
        self.layers = model_layers(job.model)
        self.plan: SparsityPlan | None = None
        self.masks: dict[str, torch.Tensor] = {}
        self.adapters: dict[str, Adapter] = {}
        self.losses: dict[str, float] = {}
        self.steps: list[dict[str, Any]] = []

    @torch.no_grad()
    def prune(self, step: int, sparsity: float, omega: float) -> None:
        """Merge, spread, prune, measure, take the merge back, set masks and ranks."""
        job, tokens = self.job, self.job.calibration_tokens()
        progress.note(f"LoSA step {step + 1}: {sparsity:.2%} sparsity, mean rank {omega:g}")
        base = self._merge()
        allocated = self._shares(sparsity)
        plan = step_plan(
            allocated,
            self.layers,
            sparsity,
            job.pattern,
            before=self.plan,
            mixed=job.mixed,
            allocation=self._allocation,
            options=asdict(self._allocation_options),
            model_sha256=job.model_sha256,
        )
        masks: dict[str, torch.Tensor] = {}
        self.losses = {}
        source = ResidentLayers(job.model)
        measuring: dict[str, Any] = {"batch_size": job.batch_size, "accumulate": job.accumulate}
        for layer in prune_layers(source, tokens, plan, job.pruner, job.pruner_options, **measuring):
            for name, module in layer.modules.items():
                masks[name] = module.mask
                if module.loss is not None:
                    self.losses[name] = module.loss
        errors = reconstruction_losses(job.dense(), job.model, tokens, batch_size=job.batch_size)
        ranks = self._ranks(errors, omega)
        self._unmerge(base, masks)
        self.plan, self.masks = plan, {name: mask.cpu() for name, mask in masks.items()}
        self._resize(ranks, step)
        self.steps.append(
            {
                "sparsity": plan.achieved,
                "rates": self._rates(plan),
                "reconstruction_loss": errors,
                "mean_rank": omega,
                "ranks": ranks,
            }
        )
        self._save(step)

    def train(self, step: int, which: range) -> None:
        """Train the adapters on those sequences of the text; the base weights stay."""
        training = AdapterTraining(self.job.model, self.adapters)
        report = self.job.train(training, self.objective, f"losa-{step}", step=step, which=which)
        self.steps[step].update(
            tokens=report.tokens, seconds=report.seconds, first_loss=report.losses[0], last_loss=report.losses[-1]
        )

    @torch.no_grad()
    def finish(self) -> Recovered:
        """Merge for good."""
        for name, linear in self.linears.items():
            linear.weight.data.copy_(merged(linear.weight.data, self.adapters[name], self.masks[name]))
        assert self.plan is not None
        return Recovered(self.plan, self.masks, self.losses, {"steps": self.steps})

    @property
    def _allocation(self) -> str:
        if not self.options.layer_rates:
            return "uniform"
        return self.job.allocation or _ALLOCATION

    @property
    def _allocation_options(self) -> Any:
        if self._allocation == (self.job.allocation or _ALLOCATION) and self.job.allocation_options is not None:
            return self.job.allocation_options
        return ALLOCATORS.get(self._allocation).make_options()

    def _merge(self) -> dict[str, torch.Tensor]:
        """Put the merged weights into the model; returns the base weights, none at the first step."""
        base: dict[str, torch.Tensor] = {}
        for name, adapter in self.adapters.items():
            weight = self.linears[name].weight.data
            base[name] = weight.clone()
            weight.copy_(merged(weight, adapter, self.masks[name]))
        return base

    def _unmerge(self, base: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> None:
        """Base weights under the new masks: exact where the pruner left the survivors as they were."""
        for name, adapter in self.adapters.items():
            weight, mask = self.linears[name].weight.data, masks[name]
            expected = apply_mask(merged(base[name], adapter, self.masks[name]), mask.to(weight.device))
            adapter.set_mask(mask)
            if torch.equal(weight, expected):
                weight.copy_(apply_mask(base[name], mask.to(weight.device)))
            else:
                weight.copy_(unmerged(weight, adapter, mask))

    def _shares(self, sparsity: float) -> Allocation:
        method = ALLOCATORS.get(self._allocation)
        allocator = method.function(self._allocation_options)
        needs, tokens = method.traits["needs"], self.job.calibration_tokens()
        measured: list[Any] = [None] * len(self.layers)
        if needs != "none":
            measured = measure_layers(
                self.job.model,
                tokens[: sequences_read(method, self._allocation_options)] if needs == "inputs" else tokens,
                needs,
                allocator.measure,
                name=self._allocation,
                batch_size=self.job.batch_size,
                accumulate=self.job.accumulate,
            )
        return allocator.allocate(measured, self.layers, sparsity)

    def _rates(self, plan: SparsityPlan) -> list[float]:
        """The sparsity of each layer."""
        targets = plan.by_name
        return [sum(targets[m.name].zeros for m in layer) / sum(m.size for m in layer) for layer in self.layers]

    def _ranks(self, errors: list[float], omega: float) -> list[int]:
        """One rank per layer."""
        options = self.options
        losses = errors if options.rank_allocation else [1.0] * len(errors)
        ranks = allocate_ranks(losses, omega, r_max=options.r_max, one_pass=options.reference_ranks)
        return [min(rank, _CODE_RANK) for rank in ranks] if options.reference_ranks else ranks

    def _resize(self, ranks: list[int], step: int) -> None:
        generator = torch.Generator().manual_seed(self.job.seed * 1009 + step)
        regrow: ReinitPolicy = self.options.regrow
        for layer, rank in zip(self.layers, ranks, strict=True):
            for module in layer:
                if module.name in self.adapters:
                    self.adapters[module.name].set_rank(rank, regrow=regrow, generator=generator)
                else:
                    self.adapters[module.name] = self._adapter(module.name, rank, generator)

    def _adapter(self, name: str, rank: int, generator: torch.Generator | None = None) -> Adapter:
        return Adapter(
            self.linears[name],
            rank,
            self.masks[name],
            alpha=self.options.alpha,
            dropout=self.options.dropout,
            generator=generator,
        )

    def pruned(self, step: int) -> bool:
        """Whether the step's pruning is done already, by the run that was interrupted."""
        return len(self.steps) > step

    def _save(self, step: int) -> None:
        """Everything that the next phase starts from."""
        if self.job.state is None:
            return
        assert self.plan is not None
        tensors: dict[str, torch.Tensor] = {}
        for name, linear in self.linears.items():
            tensors[f"{name}.weight"] = linear.weight
            tensors[f"{name}.mask"] = pack_bits(self.masks[name])
            tensors.update({f"{name}.{key}": value for key, value in self.adapters[name].state_dict().items()})
        values = {"step": step, "plan": self.plan.to_dict(), "losses": self.losses, "steps": self.steps}
        self.job.state.save(_PHASE, tensors, values)
        self.job.state.drop(STATE)

    def restore(self) -> int:
        """Go on from what was saved; returns the step to go on with."""
        saved = self.job.state.load(_PHASE) if self.job.state is not None else None
        if saved is None:
            return 0
        tensors, values = saved
        self.plan = SparsityPlan.from_dict(values["plan"])
        self.losses, self.steps = values["losses"], values["steps"]
        for name, linear in self.linears.items():
            linear.weight.data.copy_(tensors[f"{name}.weight"])
            self.masks[name] = unpack_bits(tensors[f"{name}.mask"], linear.in_features)
            self.adapters[name] = adapter = self._adapter(name, len(tensors[f"{name}.a"]))
            adapter.load_tensors({key: tensors[f"{name}.{key}"] for key in adapter.state_dict()})
        return int(values["step"])
