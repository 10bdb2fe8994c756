"""The clients' consent: what the contract of a study is, and how each client holds the server to it.

A client answers only what its contract lists and its own policy allows, pays for it in a ledger of its own before it
says anything, and writes down what it refused and why. The server learns how many refused for which reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from fedcanary.clients.population import Population
from fedcanary.engines import guard, privacy_terms, protection
from fedcanary.engines.setup import Setup
from fedcanary.engines.slices import drill_down
from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.monitor.slices import Question
from fedcanary.privacy import contract as contracts
from fedcanary.privacy.accounting import parallel
from fedcanary.privacy.contract import ClientPolicy, Contract, Reason, Request
from fedcanary.privacy.ledger import Budget, Charge, Ledger
from fedcanary.probes import OwnProbe, slices

RETENTION = "sums are kept in the run's record; single messages are dropped when their sum is made"
UNBOUNDED = Budget(epsilon=math.inf, delta=1.0)  # a client's ceilings are its policy's, and may change with it


def contract_of(setup: Setup) -> Contract:
    """Everything that may leave a client in this study, and what it costs."""
    study, privacy = setup.study, setup.study.privacy
    protected = privacy.trust != "none"
    terms = privacy_terms.terms(study, privacy_terms.panel_size(study, len(setup.population)), setup.probes)
    times = study.rounds if protected and not privacy.rotates else 1
    panel = [m for m in (terms.mechanism(terms.floor), terms.update_mechanism(terms.floor)) if m.kind != "none"]
    panels = [panel, [terms.training] if terms.training is not None else []]  # of disjoint examples, or of the client

    def price(times: int) -> float:
        if not protected:
            return math.inf
        return parallel((each * times for each in panels), privacy.delta, neighbours=terms.neighbours)

    dimension = sum(tensor.numel() for tensor in setup.shared.values())
    return Contract(
        title=study.title,
        study=study.digest,
        model=setup.base.digest,
        suites=tuple(f"{suite.name} {suite.version} {suite.digest}" for suite in setup.suites),
        trust=privacy.trust,
        unit=privacy.unit,
        neighbours=privacy_terms.neighbours(study),
        mechanism="discrete_gaussian" if protected else "none",
        noise_source=privacy.noise,
        noise_multiplier=terms.noise_multiplier,
        norm=1.0 if protected else math.inf,
        epsilon_per_panel=price(1),
        epsilon_per_window=price(times),
        delta=privacy.delta if protected else 0.0,
        panel="rotating" if privacy.rotates else "same",
        rounds=study.rounds,
        population=len(setup.population),
        min_cohort=privacy.min_cohort if protected else 1,
        dropouts=privacy.dropouts if protected else 0.0,
        retention=RETENTION,
        updates=contracts.Update(
            dimension=dimension,
            weighting=study.personalize.weighting,
            clip=terms.update_clip,
            noise=terms.update_noise,
            quantile=privacy.updates.quantile if privacy.updates is not None else None,
            apart=True if study.clients.also_train else None,
        )
        if dimension
        else None,
        examples=examples_of(setup),
        slices=slices_of(setup),
        numbers=numbers_of(setup),
    )


def numbers_of(setup: Setup) -> tuple[contracts.Number, ...]:
    """Every number that leaves a client, as a contract lists it."""
    study, by_example = setup.study, privacy_terms.training(setup.study) is not None
    return contracts.numbers(
        privacy_terms.layout(setup),
        privacy_terms.versions(setup),
        study.privacy.trust,
        exact=privacy_terms.exact(setup.probes) if by_example else (),
        reaches={p.name: p.reach for p in setup.probes if isinstance(p, OwnProbe)} if by_example else {},
    )


def examples_of(setup: Setup) -> contracts.Examples | None:
    """How clients here train on their examples, where these are the unit."""
    record, training = setup.study.privacy.record, privacy_terms.training_mechanism(setup.study)
    if record is None or training is None:
        return None
    exact = privacy_terms.exact(setup.probes)
    return contracts.Examples(
        noise=training.noise_multiplier,
        clip=record.clip,
        sample_rate=training.sample_rate,
        steps=training.count,
        min_held_out=record.min_held_out,
        exact=tuple(name for name in privacy_terms.layout(setup) if name in exact),
        domains=record.domains,
    )


def slices_of(setup: Setup) -> contracts.Slices | None:
    """How clients here are asked about slices, if they are, and what that takes of their message."""
    table, privacy = setup.study.slices, setup.study.privacy
    if table is None:
        return None
    least, most = slices.cost(len(table.by)) if privacy.trust != "none" else (0.0, 0.0)
    return contracts.Slices(
        probe=slices.SLICES,
        attributes=table.by,
        floor=table.floor or privacy.min_cohort,
        rounds=table.rounds,
        lost_least=least,
        lost_most=most,
    )


def policies_of(setup: Setup, contract: Contract) -> Callable[[int], ClientPolicy]:
    """Each client's own policy: NAME.toml of the study's folder of policies, or its default.toml.

    Without such a folder the simulated clients agree to whatever the study says, and pin its contract.

    Raises:
        BadInput: every problem of the folder's files, and files that are no client's.
    """
    agreed = ClientPolicy(
        contract=contract.digest,
        max_delta=1.0,
        trusts=(contract.trust,),
        units=(contract.unit,),
        updates_without_noise=True,
        simulated_noise=True,
    )
    if setup.study.clients.policies is None:
        return lambda client: agreed
    folder = Path(setup.study.clients.policies)
    files = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    problems: list[Problem] = []
    if not files:
        problems.append(Problem(str(folder), "holds no policy", "put default.toml or NAME.toml there"))
    names = _names(setup.population)
    for name in sorted(files.keys() - names - {"default"}):
        problems.append(Problem(str(files[name]), f"no client is called {name!r}", did_you_mean(name, names)))
    found: dict[str, ClientPolicy] = {}
    for name, path in files.items():
        try:
            found[name] = contracts.load_policy(path, contract.probes)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    default = found.get("default", agreed)
    return lambda client: found.get(setup.population.name(client), default)


def _names(population: Population) -> set[str]:
    return {population.name(client) for client in range(len(population))}


def check(setup: Setup) -> None:
    """Say, before anything is written, why a study's privacy or its guard cannot be had.

    Raises:
        BadInput: a guard that nothing can read, too few clients, too small a budget, policies that cannot be read,
            another population's ledger.
        Refused: the ledger was changed, or its window is spent.
    """
    guard.check(setup)
    privacy_terms.check(setup)
    protection.check_ledger(setup)
    policies_of(setup, contract_of(setup))


class Consent:
    """What each of the clients of this process does before it answers. `place` is a client's own folder.

    `silent`: whoever asks has kept that nothing of the request's round has left the client, though its ledger paid.
    """

    def __init__(self, setup: Setup, place: Callable[[int], Path]) -> None:
        self.contract = contract_of(setup)
        self._policies = policies_of(setup, self.contract)
        self._sends, self._trains = numbers_of(setup), examples_of(setup)
        self._window, self._place = setup.study.privacy.window, place
        self._fresh_noise = setup.study.privacy.noise == "system"
        self.silent = False

    def hold_to(self, policies: Callable[[int], ClientPolicy]) -> None:
        """Have the clients allow what these say, where the study names no folder of theirs."""
        self._policies = policies

    def request(self, round: int, cohort: int, about: Question | None = None) -> Request:
        """What the server asks in a round: everything that the contract lists, and perhaps a drill-down."""
        c = self.contract
        return Request(
            contract=c.digest,
            round=round,
            probes=c.probes,
            update=c.updates is not None,
            cohort=max(cohort, 1),
            drill_down=None if about is None else drill_down(about),
        )

    def refuses(self, client: int, request: Request) -> list[Reason]:
        """Why a client does not answer; empty if it does, and then its ledger has the charge."""
        digest, place = self.contract.digest, self._place(client)
        place.mkdir(parents=True, exist_ok=True)
        with Ledger.open(place / protection.LEDGER, owner=f"client {client}", budget=UNBOUNDED) as ledger:
            paid = [row.charge for row in ledger.rows() if row.charge.window == self._window]
            again = any(c.panel == digest and c.round == request.round for c in paid)
            before = [c for c in paid if c.panel != digest or c.round != request.round]
            answered = sum(c.panel == digest for c in before)
            found = contracts.refusals(
                self.contract,
                self._policies(client),
                request,
                sends=self._sends,
                spent=(math.fsum(c.epsilon for c in before), math.fsum(c.delta for c in before)),
                answered=answered,
                trains=self._trains,
            )
            reasons = [refusal.reason for refusal in found]
            if (
                again and self._fresh_noise and not self.silent
            ):  # with the same noise, as in a simulation, it would say the same again
                reasons.append(Reason.ANSWERED)
            for reason in reasons:
                ledger.note_refusal(reason)
            if not reasons and not again and request.probes and self.contract.trust != "none":
                ledger.charge(self._charge(request.round, first=not answered))
        return reasons

    def _charge(self, round: int, first: bool) -> Charge:
        """The window's whole price at the first answer; later rounds of it are paid for."""
        c = self.contract
        return Charge(
            id=f"{c.digest} {round}",
            window=self._window,
            panel=c.digest,
            round=round,
            mechanism={"multiplier": c.noise_multiplier},
            purpose="answer",
            epsilon=c.epsilon_per_window if first else 0.0,
            delta=c.delta if first else 0.0,
        )
