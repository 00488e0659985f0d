"""Boxes that a page shows (HTML): the verdict on a claim, and what stands where no run is stored.

Every word comes from the store, from the claims' statements and rules, or from the profiles; every text is escaped.
"""

from collections.abc import Iterable, Mapping
from html import escape

from gstlib.bench import cost
from gstlib.book import tables
from gstlib.claims import CLAIMS, CONTRADICTED, INCONCLUSIVE, NOT_RUN, SUPPORTED, Claim
from gstlib.claims.beyond import PREDICTIONS
from gstlib.claims.verdicts import SMALL
from gstlib.experiments import PROFILES, Experiment, Labelled, data_spec, experiment
from gstlib.reading.interval import FEWEST, LEVEL
from gstlib.store import Store

_CHANGES = {SUPPORTED: "with which this no longer holds", CONTRADICTED: "with which this holds after all",
            INCONCLUSIVE: "with which this holds", NOT_RUN: "with which this holds"}
# what a reduced profile may do otherwise than the paper: name, and how a specification says it
_SIZES = (
    ("epochs", lambda spec: f"{spec.optimiser.epochs}"), ("times the width", lambda spec: f"{spec.model.width:g}"),
    ("training images", lambda spec: f"{spec.data.train_size:,}" if spec.data.train_size else "all"),
    ("images tested at events", lambda spec: f"{spec.data.test_size:,}" if spec.data.test_size else "all"),
    ("images a batch", lambda spec: f"{spec.optimiser.batch_size}"),
    ("times the rate at a milestone", lambda spec: f"{spec.optimiser.decay:.2g}"),
    ("batches of disturbance", lambda spec: f"{spec.pruning.batches}" if spec.pruning else "0"))


def verdict(claim: Claim, row: Mapping, made_of: Mapping[str, Iterable[str]]) -> str:
    """The box of a claim; `row` of `claims.evaluate`, `made_of`: profile -> titles of the data that its runs saw.

    Says what is claimed, what the paper found and what was found here, full width and small scale apart, why that may
    differ, what would change it, how many seeds decide it and which command makes them.
    """
    scales = (("full width", row["profile"], "", row["verdict"]), ("small scale", SMALL, "small_", row["small_scale"]))
    scales = scales[:1 + bool(claim.needs)]  # what needs no run is measured on full-width networks alone
    facts = [("The paper", escape(claim.published))]
    facts += [(f"Here, {name} ({profile})", _found(claim, row, prefix, said)) for name, profile, prefix, said in scales]
    differs = [f"<em>{name}:</em> {escape(words)}" for name, profile, _, said in scales if claim.needs
               and said != NOT_RUN and (words := _differences(claim, profile, made_of.get(profile, ())))]
    if differs:
        facts.append(("Why it may differ", "<br>".join(differs)))
    deciding = next((said for *_, said in scales if said != NOT_RUN), NOT_RUN)
    facts.append(("What would change it", escape(
        f"More {claim.counted} {_CHANGES[deciding]}: {claim.test}. What is judged: {claim.statistic.rstrip('.')}.")))
    facts.append(("What it takes", "<br>".join(f"<em>{name}:</em> {_takes(claim, row, prefix, said)}"
                                                for name, _, prefix, said in scales)))
    return _box(f"Verdict on claim {claim.id}",
                f'<a href="claims.html"><strong>{claim.id}</strong></a> {escape(claim.statement)}', facts)


def nothing(what: Experiment, profile: str, missing: Iterable[Labelled], command: str, store: Store, lacks: str) -> str:
    """The box in the place of panels of `what` at `profile`, which `lacks` something: what the paper shows there (or was
    predicted), the runs that are `missing` with their hours, as far as `bench.cost` knows, and the command."""
    facts = [(f"The paper ({claim.published})", f"{claim.id}: {escape(claim.statement)}") for claim in CLAIMS
             if what.name in {claim.figure, *claim.needs}]
    facts += [(f"Predicted ({claim.published})", f"{claim.id}: {escape(claim.statement)}") for claim in PREDICTIONS
              if claim.figure == what.name]
    specs = {run.spec.id: run.spec for run in missing}.values()
    device, name = ("cuda", "an H100 or H200") if PROFILES[profile].size.width == 1 else ("cpu", f"{cost.CORES} cores of a CPU")
    hours, basis = cost.hours(specs, device, cost.durations(store))
    known = f", {cost.readable(hours)} on {name} ({basis}: see <a href=\"cost.html\">what it costs</a>)" if basis else ""
    facts += [("What it takes", f"{len(specs)} runs{known}"), ("The command", f"<code>{escape(command)}</code>")]
    return _box(f"Nothing of {what.name} at {profile}", f"<strong>{escape(what.title)}</strong>: {lacks}", facts)


def _box(label: str, lead: str, facts: Iterable[tuple[str, str]]) -> str:
    told = "".join(f"<dt>{name}</dt><dd>{words}</dd>" for name, words in facts)
    return f'<section class="box" aria-label="{label}"><p>{lead}</p><dl>{told}</dl></section>'


def _found(claim: Claim, row: Mapping, prefix: str, said: str) -> str:
    """A verdict with its parts; of fewer than three seeds, which are no evidence, only that they are too few."""
    badge = f'<span class="verdict {said.replace(" ", "-")}">{said}</span>'
    if said == NOT_RUN:
        return f"{badge}: {escape(row[prefix + 'why'].partition('; make them with')[0])}"
    parts = "".join(f"<li>{escape(part)}</li>" for part in row[prefix + "note"].split("; "))
    but = f", but {escape(row[prefix + 'but'])}" * bool(row[prefix + "but"])
    return f"{badge}, {row[prefix + 'n']:.0f} {claim.counted}{but}<ul>{parts}</ul>"


def _differences(claim: Claim, profile: str, titles: Iterable[str]) -> str:
    """What the runs at `profile` are that the paper's are not: sizes from the specifications, images by their titles."""
    words = dict.fromkeys(titles)
    for figure, needs in claim.needs.items():
        here, printed = ({run.label: run.spec for run in experiment(figure).runs(
            PROFILES[name], data_spec(PROFILES[name], "cifar10", "any"), [0])} for name in (profile, "paper"))
        for name, size in _SIZES:
            both = {(size(here[label]), size(printed[label])) for labels in needs.values() for label in labels}
            words |= {f"{a} {name} instead of {b}": None for a, b in sorted(both) if a != b}
    return ", ".join(words)


def _takes(claim: Claim, row: Mapping, prefix: str, said: str) -> str:
    """What a decision takes at one scale: seeds, from the power of those that are there, and the command."""
    if not claim.needs:
        words = f"more {claim.counted} measured"
    elif said == NOT_RUN:
        words = f"{FEWEST} complete seeds at least"
    elif said == INCONCLUSIVE:
        words = tables.aside(row, prefix)
    elif row[prefix + "p_holm"] >= LEVEL:
        words = f"{tables.aside(row, prefix)}: more {claim.counted}"
    else:
        words = "decided"
    command = row[prefix + "command"]
    return escape(words) + (f"; <code>{escape(command)}</code>" if command else "")
