from __future__ import annotations

from megarl.controller.inputs import notes_on
from megarl.data.mixing import MixedOrder
from megarl.data.order import Order


def test_a_file_that_is_smaller_than_its_share_of_a_step_is_told_of() -> None:
    [note] = notes_on(MixedOrder((50, 7000), (1.0, 2.0), 256, True, 0), 0)
    assert note == (
        "data.train_file_weights: file 1 of data.train_files has 50 rows and gives 85.33 to a step: "
        "rows of it may come more than once in a step"
    )
    assert notes_on(MixedOrder((500, 7000), (1.0, 1.0), 256, True, 0), 0) == ()


def test_prompts_that_were_left_out_are_told_of() -> None:
    assert notes_on(Order(8, 4, True, 0), 3) == ("left out as longer than data.max_prompt_length: 3 prompts",)
