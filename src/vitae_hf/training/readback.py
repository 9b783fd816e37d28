# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Answers that Python needs from the device in every step, read without holding the device up."""

import torch


class Readback:
    """A yes or no on its way from the device to Python.

    Whoever asks for it, by `bool`, waits only for what a GPU was given before this. `bool(tensor)` waits for all that
    it was given, and then the GPU waits until it is given more. On devices other than CUDA's the two are the same.

    Args:
        answer: a tensor of one number; 0 means no.
    """

    def __init__(self, answer: torch.Tensor):
        self._answer, self._arrival = answer, None
        if answer.is_cuda:
            self._answer = answer.to("cpu", non_blocking=True)  # into pinned memory, which torch takes by itself
            self._arrival = torch.cuda.current_stream(answer.device).record_event()

    def __bool__(self) -> bool:
        if self._arrival is not None:
            self._arrival.synchronize()
        return bool(self._answer)
