"""The sizes at which the same experiments are run, and what becomes of an epoch number there."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gstlib.errors import InputError, check_choice
from gstlib.spec import DataSpec, FlatnessSpec

_MOST_SEEDS = 10_000


class Size(NamedTuple):
    """How a network is run at a profile: epoch numbers divided by `divisor`, channels multiplied by `width`.

    Events are measured on `test_size` test images; None: as many as the profile's other networks.
    """

    divisor: float
    width: float
    train_size: int | None
    batch_size: int
    test_size: int | None = None


@dataclass(frozen=True)
class Profile:
    """A size at which the same experiments are run.

    `size` holds for whatever `sizes` does not name.  Seeds count
    from `first_seed`; `decay` multiplies the learning rate at each milestone;
    events are measured on `test_size` test images (None: all); runs whose
    flatness is measured have it measured as `flatness` says.
    """

    name: str
    title: str
    data: str
    size: Size
    sizes: Mapping[str, Size]
    test_size: int | None
    test_every: int
    seeds: int
    precision: str
    first_seed: int = 0
    decay: float = 0.1
    channels_last: bool = True
    flatness: FlatnessSpec = FlatnessSpec()

    def of(self, name: str) -> Size:
        """The size at which this profile runs `name`: a network, or one in other circumstances ("resnet18, SGD")."""
        return self.sizes.get(name, self.size)


_BY_SGD = ("resnet18, SGD", "resnet20, SGD", "resnet56, SGD")

# The trials that `mini` was chosen by used seeds 0 to 5, its evidence begins at 10.  A batch of few images that is cut
# off at the end of an epoch would have a tenth of the weight in the running statistics just before every t_pre: at
# reduced profiles the batch size divides the number of images.  Under SGD divisors keep three events three and two two;
# ResNet20 and 56 stay wide at mini, where a tenth of their 16 filters is one. ResNet20 gets what eight minutes of a core
# allow; for the same reason ResNet18 is narrower there than VGG11, whose four times as many operations it has. ResNet56
# gets as many steps as ResNet20 and takes twenty minutes: in eight it learnt 30% of its training images, so 95%.
# Mini measures flatness in less than half a run's time: a tenth of the eigenvalues, of a Hessian over a quarter of the
# images, and three curves of nine points.
PROFILES = {p.name: p for p in (
    Profile("smoke", "smoke (a trial of the machinery)", "digits", Size(13, 1 / 8, 96, 12),
            {"conv4": Size(4, 1 / 8, 96, 12), **dict.fromkeys(_BY_SGD, Size(30, 1 / 2, 48, 12, 20)),
             "resnet18, SGD": Size(30, 1 / 8, 48, 12, 20), "resnet18, long": Size(400, 1 / 8, 48, 12, 20)}, test_size=60,
            test_every=1, seeds=2, precision="float32", flatness=FlatnessSpec(40, 30, 4, 2, step=0.1)),
    Profile("mini", "mini (for a CPU)", "cifar10-folder", Size(4, 1 / 2, 1024, 16),
            {"conv4": Size(1, 1 / 2, 10240, 64), "resnet18": Size(4, 1 / 4, 1024, 16), "resnet18, SGD": Size(1.5, 1 / 4, 1024, 16, 1000),
             "resnet20, SGD": Size(1.5, 1.0, 1024, 16, 1000), "resnet56, SGD": Size(1.5, 1.0, 1024, 16, 500),
             "resnet18, long": Size(50, 1 / 4, 1024, 16)}, test_size=4000, test_every=3, seeds=5, precision="bf16",
            first_seed=10, decay=0.1**0.5, flatness=FlatnessSpec(512, 128, 10, 3, step=0.1)),
    Profile("quarter", "quarter (for one GPU)", "cifar10", Size(4, 1.0, 49_920, 128),
            {"conv4": Size(1, 1.0, None, 128), **dict.fromkeys(_BY_SGD, Size(3.75, 1.0, 49_920, 128))}, test_size=None,
            test_every=1, seeds=5, precision="bf16"),
    Profile("paper", "paper (as printed)", "cifar10", Size(1, 1.0, None, 128), {}, test_size=None, test_every=1,
            seeds=10, precision="bf16"),
)}


def profile(name: str) -> Profile:
    """The profile `name`. Raises `InputError` for one that is not there."""
    check_choice("profile", name, PROFILES)
    return PROFILES[name]


def data_spec(profile: Profile, name: str, fingerprint: str, classes: int = 10) -> DataSpec:
    """The profile's share of the data set `name` that `fingerprint` proves."""
    sizes = (at_least(size, classes) for size in (profile.size.train_size, profile.test_size))
    return DataSpec(name, fingerprint, classes, *sizes)


def at_least(size: int | None, classes: int) -> int | None:
    """`size` images (None: all), or one of each class where there are more classes than that."""
    return size and max(size, classes)


def rounded(epoch: float, divisor: float) -> int:
    return math.floor(epoch / divisor + 0.5)


def scaled_schedule(start, end, retrain: int, divisor: float) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Epoch numbers of a schedule divided by `divisor`.

    The layers' offsets stay as printed, so that no two layers are struck
    after the same epoch where the paper's are not.  Each window's length is
    divided and rounded down, so that the number of events stays what it was
    wherever `divisor` divides `retrain`.
    """
    first = rounded(min(start), divisor)
    start_scaled = tuple(first + s - min(start) for s in start)
    end_scaled = tuple(s + math.floor((e - s0) / divisor) for s, s0, e in zip(start_scaled, start, end))
    return start_scaled, end_scaled, max(1, rounded(retrain, divisor))


def parse_seeds(text: str | int | Iterable[int], first: int = 0) -> list[int]:
    """Seeds from a number of them (3 -> `first` and the two after it), a range ("2-5"), a list ("0,4,7"), or integers
    as they are."""
    if not isinstance(text, (int, str)):
        return list(dict.fromkeys(map(int, text)))
    whole = str(text).strip()
    if match := re.fullmatch("([0-9]{1,12})-([0-9]{1,12})", whole):
        low, high = int(match[1]), int(match[2]) + 1
    elif re.fullmatch("[0-9]{1,12}", whole):
        low, high = first, first + int(whole)
    elif re.fullmatch("[0-9]{1,12}( *, *[0-9]{1,12})* *,?", whole):
        return list(dict.fromkeys(int(part) for part in whole.split(",") if part.strip()))
    else:
        raise InputError(f"seeds {text!r} is neither a number, a range like 2-5, nor a list like 0,4,7")
    if not 0 < high - low <= _MOST_SEEDS:
        raise InputError(f"seeds {text!r} names {high - low if high > low else 'no'} seeds; give 1 to {_MOST_SEEDS}")
    return list(range(low, high))
