"""Bucket sizes, and batches that are padded to them."""

from __future__ import annotations

import pytest
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torch import Tensor

from aioinfer.buckets import PaddedRunner, make_bucket_sizes
from aioinfer.compilation import compiler
from aioinfer.errors import InvalidRequestError, ModelError
from aioinfer.tensors import rows


def batch(count: int, *, start: int = 0, **more: Tensor) -> TensorDict:
    values = torch.arange(start, start + count, dtype=torch.float32).view(count, 1).expand(count, 3)
    nested = TensorDict({"mask": values[:, :2] > 1}, batch_size=[count, 2])
    return TensorDict({"observation": values.clone(), "info": nested, **more}, batch_size=[count])


class Recorder:
    """A model that keeps the batches that it was given, and returns what it computes in memory of its own."""

    def __init__(self) -> None:
        self.seen: list[TensorDictBase] = []
        self.memory = torch.zeros(64, 3)

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        self.seen.append(td)
        count = td.batch_size[0]
        self.memory[:count] = td["observation"] * 2
        td["action"] = self.memory[:count]
        return td


def test_buckets_are_powers_of_two_up_to_the_largest_batch() -> None:
    assert make_bucket_sizes(1) == (1,)
    assert make_bucket_sizes(5) == (1, 2, 4, 5)
    assert make_bucket_sizes(64) == (1, 2, 4, 8, 16, 32, 64)
    assert make_bucket_sizes(6, [2, 8]) == (2, 8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "ascending"),
        ([0, 8], "at least 1"),
        ([8, 4], r"ascending order, none twice; got \[8, 4\]"),
        ([4, 4, 8], "none twice"),
        ([2, 4], r"largest of bucket_sizes, 4, must be at least max_batch_size, which is 6"),
    ],
)
def test_buckets_that_do_not_hold_all_batches_are_refused(sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_bucket_sizes(6, sizes)
    with pytest.raises(TypeError, match="sequence of integers"):
        make_bucket_sizes(6, [2.0, 8])  # type: ignore[list-item]


def test_a_batch_is_padded_with_its_first_row_and_its_output_is_without_padding() -> None:
    model = Recorder()
    run = PaddedRunner(model, (2, 4, 8))
    for count in range(1, 9):
        given = batch(count, start=5)
        output = run(given)
        (seen,) = model.seen
        size = next(size for size in (2, 4, 8) if size >= count)
        assert seen.batch_size == (size,)
        assert seen["info"].batch_size == (size, 2)
        for key in ("observation", ("info", "mask")):
            assert torch.equal(seen[key][:count], given[key])
            assert (seen[key][count:] == given[key][0]).all()
        assert output.batch_size == (count,)
        assert output["info"].batch_size == (count, 2)
        assert torch.equal(output["action"], given["observation"] * 2)
        assert "action" not in given
        model.seen.clear()
    with pytest.raises(ValueError, match="9 rows, more than the largest bucket, which has 8"):
        run(batch(9))


def test_a_batch_that_is_a_bucket_is_not_copied() -> None:
    model = Recorder()
    given = batch(4)
    PaddedRunner(model, (4,))(given)
    assert model.seen[0]["observation"] is given["observation"]


def test_replies_share_no_memory_with_what_the_next_batch_overwrites() -> None:
    run = PaddedRunner(Recorder(), (8,))
    replies = [*rows(run(batch(3))), *rows(run(batch(8, start=3)))]
    assert [reply["action"][0].item() for reply in replies] == [2 * value for value in range(11)]


def test_all_batches_have_their_entries_in_the_order_of_the_first() -> None:
    model = Recorder()
    run = PaddedRunner(model, (2,))
    first = batch(2, goal=torch.ones(2))
    run(first)
    names = ["goal", "info", "observation"]
    run(TensorDict({name: first[name] for name in names}, batch_size=[2], device="cpu"))
    assert list(model.seen[0].keys()) == list(model.seen[1].keys()) == ["observation", "info", "goal", "action"]
    assert model.seen[1].device is model.seen[0].device
    for other in (batch(2), batch(2, goals=torch.ones(2)), batch(2, goal=torch.ones(2), more=torch.ones(2))):
        with pytest.raises(InvalidRequestError, match=r"expected \['goal', 'info', 'observation'\]"):
            run(other)


def test_what_cannot_be_padded_is_refused_by_name() -> None:
    odd = TensorDict({"observation": torch.ones(2, 3)}, batch_size=[2])
    odd["name"] = NonTensorData("one", batch_size=[2])
    with pytest.raises(ValueError, match='"name" is a NonTensor'):
        PaddedRunner(Recorder(), (2,))(odd)


def test_a_model_that_returns_other_rows_than_those_of_the_padded_batch_is_to_blame() -> None:
    run = PaddedRunner(lambda td: td[:3], (4,))
    with pytest.raises(ModelError, match="for a batch of 4 rows"):
        run(batch(3))


def test_options_that_can_not_be_served_are_refused() -> None:
    assert compiler(False, cuda_graphs=False) is None
    with pytest.raises(TypeError, match=r"compile must be a bool, or a dictionary .*, got 'inductor'"):
        compiler("inductor", cuda_graphs=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="backened"):
        compiler({"backened": "eager"}, cuda_graphs=False)
    with pytest.raises(ValueError, match="captures CUDA graphs of its own"):
        compiler({"mode": "reduce-overhead"}, cuda_graphs=True)
    with pytest.raises(ValueError, match="freezing"):
        compiler({"options": {"freezing": True}}, cuda_graphs=False)
