"""The grid of a weight: golden values of the published code, and where ours differs."""

from __future__ import annotations

import pytest
import torch

from apiq_peft.quantizer import SCHEMES, Quantizer, check, encode
from kernels_peft.packing import FORMATS
from tests.helpers import assert_close

# the published class on these rows, group size 4, both clip parameters 4.0; groups in order
W = torch.tensor([[-0.9, -0.3, 0.1, 0.4, 0.2, 0.5, 0.8, 1.1], [0, 0, 0, 0, -1, -0.5, 0.25, 1]])
# fmt: off
GOLDEN = {  # scale, zero, codes by group; group 1 is left out, where ours keeps 0 in the range
    ("asymmetric", 2): {0: (.425539285, 2, (0, 1, 2, 3)), 2: (1e-5, 0, (0, 0, 0, 0)),
                        3: (.654675841, 2, (0, 1, 2, 3))},
    ("asymmetric", 3): {0: (.182373986, 5, (0, 3, 6, 7)), 2: (1e-5, 0, (0, 0, 0, 0)),
                        3: (.280575365, 4, (0, 2, 5, 7))},
    ("asymmetric", 4): {0: (.085107855, 10, (0, 6, 11, 15)), 2: (1e-5, 0, (0, 0, 0, 0)),
                        3: (.130935162, 8, (0, 4, 10, 15))},
    ("apiq_symmetric", 2): {0: (.883812368, 1, (0, 1, 1, 1)), 1: (1.080215216, 1, (1, 1, 2, 2)),
                            2: (1e-5, 1, (1, 1, 1, 1)), 3: (.982013762, 1, (0, 0, 1, 2))},
    ("apiq_symmetric", 4): {0: (.126258925, 7, (0, 5, 8, 10)), 1: (.154316455, 7, (8, 10, 12, 14)),
                            2: (1e-5, 7, (7, 7, 7, 7)), 3: (.140287682, 7, (0, 3, 9, 14))},
}
# fmt: on


@pytest.mark.parametrize(("scheme", "bits"), GOLDEN)
def test_golden_values(scheme: str, bits: int) -> None:
    quantizer = Quantizer(W, bits, 4, scheme)
    scale, zero = (t.flatten() for t in quantizer.grid())
    codes = quantizer.codes(W).codes.view(4, 4)
    for group, (wanted, point, values) in GOLDEN[scheme, bits].items():
        assert_close(scale[group], torch.tensor(wanted), f"scale of group {group}")
        assert zero[group] == point
        if not (scheme == "apiq_symmetric" and bits == 2 and group == 1):  # a tie in fp16
            assert tuple(codes[group].tolist()) == values


def test_gradients_of_the_clipping_are_the_published_ones() -> None:
    quantizer = Quantizer(W, 2, 4)
    quantizer(W).sum().backward()
    high, low = quantizer.high_clip.grad, quantizer.low_clip.grad
    assert high is not None
    assert low is not None
    wanted = ((0, -0.00083610, -0.00188123), (2, 0, 0), (3, -0.00053376, -0.00053376))
    for group, of_high, of_low in wanted:
        assert high.flatten()[group].item() == pytest.approx(of_high, abs=1e-7)
        assert low.flatten()[group].item() == pytest.approx(of_low, abs=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", FORMATS)
def test_every_zero_point_is_a_code(scheme: str, bits: int) -> None:
    weights = torch.cat([torch.rand(4, 32) + 0.2, -torch.rand(4, 32) - 0.2, torch.randn(4, 32)])
    quantizer = Quantizer(weights, bits, 16, scheme)
    codes = quantizer.codes(weights)
    assert codes.zeros.max() < 2**bits
    assert codes.codes.max() < 2**bits
    # the scale is rounded when it is stored, which may move a weight by one step
    step = codes.scales.float().repeat_interleave(16, 1)
    assert ((codes.dequantize() - quantizer(weights)).abs() <= 1.01 * step).all()


@pytest.mark.parametrize("bits", FORMATS)
def test_without_clipping_it_is_rounding_to_nearest(bits: int) -> None:
    weight = torch.randn(8, 64)
    rounded = Quantizer(weight, bits, 32, clip_init=20.0)(weight)
    groups = weight.view(8, 2, 32)
    low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    nearest = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    assert_close(rounded, ((nearest - zero) * scale).view(8, 64))
    assert not torch.equal(Quantizer(weight, bits, 32)(weight), rounded)  # at 4.0 it clips


@pytest.mark.parametrize("bits", FORMATS)
def test_codes_come_from_the_scale_that_is_stored(bits: int) -> None:
    weight = torch.randn(16, 64)
    scale, zero = Quantizer(weight, bits, 32).grid()
    codes = encode(weight, scale, zero, bits)
    assert codes.scales.dtype == torch.float16
    stored = codes.scales.float().unsqueeze(-1)
    nearest = (weight.view(16, 2, 32) / stored).round() + zero.unsqueeze(-1)
    assert torch.equal(codes.codes.view(16, 2, 32).float(), nearest.clamp(0, 2**bits - 1))
    again = encode(codes.dequantize(), codes.scales.float(), zero, bits)
    assert torch.equal(again.codes, codes.codes)


def test_a_whole_row_may_be_one_group() -> None:
    weight = torch.randn(3, 48)
    scale, _ = Quantizer(weight, 4, -1).grid()
    assert scale.shape == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 64, "asymmetric"), "bits is 5; choose from 2, 3, 4"),
        ((2, 64, "odd"), "scheme is 'odd'; choose from asymmetric"),
        ((2, 0, "asymmetric"), "group_size is 0"),
        ((2, 64, "asymmetric", 100), "64 does not divide the 100 inputs"),
    ],
)
def test_what_cannot_be_quantised_is_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(*arguments)
