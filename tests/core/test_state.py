"""Packing of user states into (B, D), and the messages for states that cannot be packed."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria import StateError, UserError, solve
from equilibria.core.state import Layout

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


class Pair(NamedTuple):
    left: torch.Tensor
    right: list[torch.Tensor]


@given(
    batch=st.integers(0, 3),
    leaves=st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=4),
    batch_dims=st.sampled_from([0, 1]),
)
def test_unpacking_undoes_packing(batch, leaves, batch_dims):
    lead = (batch,) * batch_dims
    tensors = [torch.randn((*lead, *shape)).to(dtype) for shape, dtype in leaves]
    state = {"first": tensors[0], "rest": Pair(tensors[-1], tensors[1:])}
    layout = Layout.of(state, batch_dims)
    packed = layout.pack(state)
    widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    assert packed.dtype == widest
    sizes = [leaf.size for leaf in layout.leaves]
    assert packed.shape == (batch if batch_dims else 1, sum(sizes))
    back = layout.unpack(packed)
    assert isinstance(back["rest"], Pair)
    torch.testing.assert_close(back, state, rtol=0.0, atol=0.0)


def test_one_contiguous_tensor_is_packed_without_a_copy():
    z = torch.randn(2, 3, 4)
    assert Layout.of(z).pack(z).data_ptr() == z.data_ptr()


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("num_positions", [2, 3])
def test_channels_last_is_kept(batch_dims, num_positions):
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[num_positions]
    z0 = torch.randn(2, 3, *[4] * num_positions).to(memory_format=layout)
    seen = []

    def f(z):
        seen.append(z.is_contiguous(memory_format=layout))
        return torch.cos(z)

    solution = solve(f, z0, batch_dims=batch_dims)
    assert all(seen)
    assert solution.z.is_contiguous(memory_format=layout)
    torch.testing.assert_close(solution.z, solve(torch.cos, z0.contiguous()).z, rtol=1e-3, atol=0)


def test_another_order_of_names_is_called_that():
    z0 = {"h": torch.zeros(2, 3), "c": torch.zeros(2, 3)}
    with pytest.raises(StateError, match=r"order \['c'\], \['h'\], its input has \['h'\], \['c'\]"):
        solve(lambda z: {"c": z["c"], "h": z["h"]}, z0)


def test_rounding_is_known_to_the_layout():
    assert not Layout.of(torch.zeros(2, 3)).rounds
    assert Layout.of(torch.zeros(2, 3, dtype=torch.bfloat16)).rounds
    assert Layout.of([torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)]).rounds


@pytest.mark.parametrize(
    ("z0", "message"),
    [
        (None, "z0 is a NoneType, expected a tensor"),
        ([], "holds no tensors"),
        ({"a": torch.zeros(2), "b": 1.0}, r"z0\['b'\] is a float, expected a tensor"),
        (torch.zeros(2, 3, dtype=torch.int64), "dtype torch.int64, expected a real floating"),
        (torch.zeros(2, dtype=torch.complex64), "view_as_real"),
        (torch.tensor(1.0), "batch_dims=0"),
        ([torch.zeros(2, 3), torch.zeros(4, 3)], r"z0\[1\] has batch size 4.* has 2"),
        ([torch.zeros(2, 3), torch.zeros(2, 3, device="meta")], "move the whole state"),
    ],
)
def test_states_that_cannot_be_solved_for(z0, message):
    with pytest.raises(StateError, match=message):
        Layout.of(z0)


def test_unknown_batch_dims():
    with pytest.raises(UserError, match=r"batch_dims must be 0 .* not 2"):
        Layout.of(torch.zeros(2, 3), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (lambda z: (z["a"], z["b"]), "f returned the tree TreeSpec.tuple"),
        (lambda z: {"a": z["a"]}, r"f returned the tree .*\['a'\].* its input .*\['a', 'b'\]"),
        (lambda z: {"b": z["a"], "a": z["b"]}, r"in the order \['b'\], \['a'\]"),
        (lambda z: z | {"b": None}, r"f\(z\)\['b'\] is a NoneType"),
        (lambda z: z | {"b": z["b"][:1]}, r"f\(z\)\['b'\] has shape \(1, 4\).*keep the shape"),
        (lambda z: z | {"b": z["b"].mean(1)}, r"has shape \(2,\), z\['b'\] has \(2, 4\)"),
        (lambda z: z | {"b": z["b"].double()}, "is torch.float64, .* is torch.float32"),
        (lambda z: z | {"b": z["b"].to("meta")}, "is on meta, .* on cpu"),
    ],
)
def test_images_of_another_form_than_the_state(image, message):
    state = {"a": torch.zeros(2, 4), "b": torch.ones(2, 4)}
    with pytest.raises(StateError, match=message):
        Layout.of(state).pack(image(state))


def test_autocast_may_narrow_the_image():
    layout = Layout.of(torch.zeros(2, 3))
    image = torch.ones(2, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layout.pack(image).dtype == torch.float32
    with pytest.raises(StateError, match=r"start from a z0 of torch.bfloat16, or cast"):
        layout.pack(image)
